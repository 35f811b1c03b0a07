"""Supervised warm-up on the built-in task's worked solutions, so that a random policy has something to reinforce.

It runs on one device, whatever the mesh: the policy that reinforcement starts from must not depend on how many devices
there are, and a hundred optimizer steps would turn the last bit of a sum into a different policy.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dynamo_jax.batch import PackedRows, Tokens, TokenStats
from dynamo_jax.config import Config
from dynamo_jax.policy.model import DecoderConfig, abstract_policy, init_policy, param_shardings
from dynamo_jax.run.metrics import ProgressBar
from dynamo_jax.sharding import of_process_0, to_mesh
from dynamo_jax.tasks.arithmetic import ArithmeticTokenizer, worked_solutions
from dynamo_jax.update import State, apply_gradients, init_state
from dynamo_jax.update.gradient import gradient, nothing, whole_gradient

log = logging.getLogger("dynamo_jax")


def warmed_up(
    policy: DecoderConfig, config: Config, heldout: list[str], key: jax.Array, check: Callable[[], None]
) -> Any:
    """`warm_up` on every process, shown as it goes, and its parameters on the policy's mesh. `check` may raise."""
    log.info("Supervised warm-up: %d steps", config.warmup.steps)
    shown = config.logging.progress and jax.process_index() == 0
    with ProgressBar(config.warmup.steps, enabled=shown, what="warm-up") as bar:

        def each_step(done: int) -> None:
            bar.update(done)
            check()

        # Every process trains its own, alike; hosts of another make may differ in the last bit.
        alone = dataclasses.replace(policy, mesh=None)
        params = of_process_0(warm_up(alone, config, heldout, key, each_step))
    return params if policy.mesh is None else to_mesh(params, param_shardings(params, policy.mesh))


def warm_up(
    policy: DecoderConfig, config: Config, heldout: list[str], key: jax.Array, each_step: Callable[[int], None]
) -> Any:
    """Parameters, as host arrays, after `config.warmup.steps` steps of Adam, linear then cosine, from `init_policy`.

    Minimises the mean over the batch's completion tokens of -log pi(token), end-of-sequence included. `policy` has no
    mesh. `heldout` problems are left out. `each_step(steps done)` is called after every step, for progress and signals.
    """
    w, tokenizer = config.warmup, ArithmeticTokenizer()
    graph, _ = abstract_policy(policy)
    rate = optax.warmup_cosine_decay_schedule(0.0, w.learning_rate, max(w.steps // 20, 1), max(w.steps, 2))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))

    @jax.jit
    def step(state: State, rows: PackedRows, tokens: Tokens) -> State:
        def objective(stats: TokenStats) -> tuple[jax.Array, dict[str, jax.Array]]:
            return -jnp.sum(stats.logp * tokens.mask) / jnp.sum(tokens.mask), {}

        zeros = nothing(state.params, 1, ["objective/loss"])
        total = gradient(zeros, graph, state.params, rows, tokens, objective, temperature=1.0)
        return apply_gradients(state, whole_gradient(total.grads, None), optimizer)

    with jax.default_device(jax.local_devices()[0]):
        state = init_state(init_policy(policy, key), optimizer)
        batches = worked_solutions(
            config.seed, w.batch, config.task.arithmetic.max_operations, w.multiplication_rate, heldout
        )
        for done, pairs in zip(range(1, w.steps + 1), batches, strict=False):
            slots = config.task.max_prompt_tokens + config.rollout.max_tokens
            state = step(state, *_supervised_rows(pairs, tokenizer, slots))
            each_step(done)
        return jax.device_get(state.params)


def _supervised_rows(
    pairs: list[tuple[str, str]], tokenizer: ArithmeticTokenizer, slots: int
) -> tuple[PackedRows, Tokens]:
    """One problem with its solution a row. The mask of the tokens has what is learned: the solutions."""
    G = len(pairs)
    tokens, rollout = np.full((G, slots), tokenizer.pad_id, np.int32), np.full((G, slots), G, np.int32)
    mask = np.zeros((G, slots), np.float32)
    for g, (problem, solution) in enumerate(pairs):
        prompt, completion = tokenizer.encode(problem), [*tokenizer.encode(solution), tokenizer.eos_id]
        end = len(prompt) + len(completion)
        tokens[g, :end], rollout[g, :end] = prompt + completion, g
        mask[g, len(prompt) - 1 : end - 1] = 1
    position = np.broadcast_to(np.arange(slots, dtype=np.int32), (G, slots))
    unused = np.zeros_like(mask)
    rows = PackedRows(tokens, rollout, position, unused)  # type: ignore[arg-type]
    return rows, Tokens(mask, position, rollout, unused, unused, unused, unused)  # type: ignore[arg-type]
