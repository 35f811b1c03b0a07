"""Eight rollouts and a tiny policy, which the tests of the update share."""

from functools import cache
from typing import Any

import jax
import numpy as np
from flax import nnx
from packed_rows import Flat, of_rollouts, packed, replaced, tokens_in

from dynamo_jax.batch import TokenStats
from dynamo_jax.config import ArchitectureConfig, Config, PolicyConfig, RolloutConfig
from dynamo_jax.policy import Decoder, abstract_policy
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.update.gradient import row_stats
from dynamo_jax.update.packing import Shape

M, L, C, V = 8, 4, 6, 16
LENGTHS = np.array([6, 1, 3, 1, 5, 2, 6, 4], np.int32)
ARCHITECTURE = ArchitectureConfig(
    hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=16, vocab_size=V,
    tie_word_embeddings=False,
)  # fmt: skip
CONFIG = Config(
    run_dir="unused",
    policy=PolicyConfig(architecture=ARCHITECTURE),
    rollout=RolloutConfig(prompts=2, per_prompt=4, max_tokens=C, temperature=0.7),
)
CONFIG = replaced(CONFIG, task={"max_prompt_tokens": L})
ONE_EACH, SEVERAL = Shape(1, M, L + C), Shape(4, 2, L + C)


def graph_of(config: Config) -> nnx.GraphDef[Decoder]:
    return abstract_policy(decoder_config(config, V, None))[0]


@cache
def params(config: Config = CONFIG) -> Any:
    """Random host arrays, the norms and biases too."""
    rng = np.random.default_rng(0)
    abstract = abstract_policy(decoder_config(config, V, None))[1]
    return jax.tree.map(lambda x: rng.normal(0.3, 0.4, x.shape).astype(x.dtype), abstract)


@cache
def flat() -> Flat:
    """Lengths from 1 token to all, prompts from 1 token to all; padding holds tokens like any other."""
    rng = np.random.default_rng(1)
    return Flat(
        prompts_ML=rng.integers(0, V, (M, L)).astype(np.int32),
        prompt_length_M=np.array([4, 1, 2, 3, 4, 1, 2, 3], np.int32),
        tokens_MC=rng.integers(0, V, (M, C)).astype(np.int32),
        length_M=LENGTHS,
        advantage_M=np.array([1.0, -0.5, 0.7, -1.2, 0.0, 2.0, -0.1, 0.4], np.float32),
        weight_M=np.ones(M, np.float32),
        random_M=rng.integers(2**32, size=M, dtype=np.uint32),
        sampled_logp_MC=rng.normal(-2, 0.5, (M, C)).astype(np.float32),
    )


@cache
def now_stats() -> TokenStats:
    """[M, C], of `params()`, a rollout a row."""
    mini, graph = packed(flat(), ONE_EACH, alone=True), graph_of(CONFIG)
    rows, mask = jax.tree.map(lambda x: x[0], (mini.batch.rows, tokens_in(mini).mask))

    @jax.jit
    def run(params: Any) -> TokenStats:
        model = nnx.merge(graph, params)
        tables = model.tables()
        return row_stats(model, model.embedded(rows.tokens, tables.embedding), tables.head, rows, mask, 0.7)

    return TokenStats(*(of_rollouts(mini, x[None], C) for x in run(params())))


@cache
def old_stats() -> TokenStats:
    """Of a policy that is not the current one, far enough for some tokens to be clipped."""
    stats = now_stats()
    shift = np.random.default_rng(2).normal(0, 0.3, (M, C)).astype(np.float32)
    return TokenStats(stats.logp + shift, stats.entropy + 0.1, stats.lambda_mean * 1.1)
