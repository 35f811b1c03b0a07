"""The device programs of a run, with the abstract arguments that the trainer calls them with.

The compiler that a TPU machine uses (libtpu) needs no TPU. It is given the trainer's own jitted functions with
abstract arguments, so what it says of memory is what it would say there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamo_jax.allocation.programs import AllocationPrograms
from dynamo_jax.allocation.rules import RULES
from dynamo_jax.batch import PackedRows, TokenStats, TrainBatch
from dynamo_jax.config import Config
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.policy.hf import read_architecture
from dynamo_jax.policy.model import DecoderConfig, abstract_policy
from dynamo_jax.rollout.build import SpecialTokens, make_samplers
from dynamo_jax.rollout.sampler import Sampler
from dynamo_jax.sharding import sharding
from dynamo_jax.tasks.task import build_tokenizer
from dynamo_jax.update import Programs
from dynamo_jax.update.reference import abstract_reference

# Rows of the success statistics if only the data would tell. They take 16 bytes a prompt.
UNKNOWN_PROMPTS = 100_000


@dataclasses.dataclass(frozen=True)
class _AnyTokens:
    """Stands in for a tokenizer. These ids are constants of the sampler: which ones makes no difference to its cost."""

    stop_ids: tuple[int, ...] = (0, 1)
    pad_id: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """A jitted function of the run, the abstract arguments it is called with, and what else is on the devices then."""

    name: str
    function: Any
    arguments: tuple[Any, ...]
    resident: Any = ()  # pytree of abstract arrays


def planned_policy(config: Config, mesh: Mesh) -> tuple[SpecialTokens, DecoderConfig]:
    """What sampling asks of a tokenizer, and the decoder. Needs neither weights nor, if it can be, the tokenizer.

    Raises `ValueError` if the vocabulary is neither in the config nor in `config.json` and there is no tokenizer.
    """
    policy = config.policy
    shape = policy.architecture if policy.load is None else read_architecture(policy.load)
    special: SpecialTokens = _AnyTokens()
    size = shape.vocab_size if shape else None
    if size is None or config.task.kind == "arithmetic":  # whose tokenizer needs no files
        tokenizer = build_tokenizer(config)
        special, size = tokenizer, tokenizer.size
    return special, decoder_config(config, size, mesh)


def run_jobs(config: Config, mesh: Mesh) -> list[Job]:
    """The programs of a run of `config` on `mesh`, built as the trainer builds them. Needs neither weights nor data.

    Raises what `planned_policy` raises.
    """
    special, decoder = planned_policy(config, mesh)
    graph, abstract_params = abstract_policy(decoder)
    prompts = config.task.arithmetic.train_prompts if config.task.kind == "arithmetic" else UNKNOWN_PROMPTS
    programs = Programs(graph, abstract_params, config, mesh)
    a = config.allocation
    features_NE = np.broadcast_to(np.float32(0), (prompts, a.vip.features)) if RULES[a.rule].features else None
    allocation = AllocationPrograms(a, prompts, config.rollout.budget, mesh, features_NE=features_NE)
    return jobs(config, mesh, programs, allocation, *make_samplers(graph, config, special, mesh))


def jobs(
    config: Config,
    mesh: Mesh,
    programs: Programs,
    allocation: AllocationPrograms,
    sampler: Sampler,
    eval_sampler: Sampler,
) -> list[Job]:
    """Each program with the abstract values of what `trainer.py` and `rollout/sampler.py` call it with."""
    rows = sharding(mesh, "batch")
    P, B, L = config.rollout.prompts, config.rollout.budget, config.task.max_prompt_tokens

    def split(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    def host(*shape: int, dtype: Any = jnp.int32, weak_type: bool = False) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, weak_type=weak_type)  # numpy arrays come without a sharding

    state, stats = programs.abstract_state, allocation.abstract_stats
    key_type = jax.eval_shape(lambda: jax.random.key(0)).dtype
    key: Any = jax.ShapeDtypeStruct((), key_type, sharding=sharding(mesh))
    step = host(weak_type=True)  # a Python integer
    index_P, reward_B = host(P), host(B, dtype=jnp.float32)

    a = config.allocation
    features = host(P, a.vip.features, dtype=jnp.float32) if RULES[a.rule].features else None

    def everywhere(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh))

    def packed(dtype: Any, batches: int = 1) -> Any:
        shape = programs.shape._replace(micro_batches=batches * programs.shape.micro_batches)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, None, "batch"))

    def mini_batch(batches: int = 1) -> tuple[TrainBatch, TokenStats]:
        int_IGS, float_IGS, M = packed(jnp.int32, batches), packed(jnp.float32, batches), config.mini_batch * batches
        float_M, random_M = everywhere(M, dtype=jnp.float32), everywhere(M, dtype=jnp.uint32)
        rows = PackedRows(int_IGS, int_IGS, int_IGS, float_IGS)
        batch = TrainBatch(rows, everywhere(M), everywhere(M), float_M, float_M, random_M)
        return batch, TokenStats(float_IGS, float_IGS, float_IGS)

    kl = config.objective.kl
    unread, old = mini_batch()  # the reference has not read it
    batch = unread
    if kl.coefficient and kl.in_ == "loss":
        batch = unread._replace(rows=unread.rows._replace(reference_logp=packed(jnp.float32)))
    # All mini-batches of a step and their scores wait on the devices for their updates.
    waiting = mini_batch(B // config.mini_batch - 1)
    index = host()
    moments = (state._replace(params=None), stats)  # and masters, if it has any

    found = [Job("allocate", allocation.allocate_program, (stats, index_P, step, features), state)]
    for name, s in {"sample": sampler, "sample (eval)": eval_sampler}.items():
        window, b = s.config.window, s.config.batch
        inputs = (split(window, L), split(window), split(b), split(b), key)
        if s is not sampler or name == "sample":
            found.append(Job(name, s.program, (state.params, *inputs), moments))
    found += [
        *update_jobs(programs, state, batch, old, index, moments, (stats, waiting)),
        Job("record", allocation.record_program, (stats, index_P, host(B), reward_B, reward_B, step, features), state),
    ]
    if not kl.coefficient:
        return found
    reference = abstract_reference(programs)
    arguments = (reference, unread, index, old)
    kept = () if kl.host_memory else reference
    return [
        *(dataclasses.replace(job, resident=(job.resident, kept)) for job in found),
        Job("score (reference)", programs.score_program, arguments, (state, stats, waiting)),
    ]


def update_jobs(
    programs: Programs, state: Any, batch: TrainBatch, old: TokenStats, index: Any, moments: Any, waiting: Any
) -> list[Job]:
    """The programs of `update/programs.py` that this run uses."""
    beside, found = (moments, waiting), []
    if programs.scores_first or not programs.alone:
        found.append(Job("score", programs.score_program, (state.params, batch, index, old), beside))
    if programs.alone:
        old_logp = old.logp if programs.scores_first else None
        return [*found, Job("update", programs.whole_program, (state, batch, old_logp), waiting)]
    of_terms = (state.params, batch, old.logp, old)
    terms, metrics, total = jax.tree.map(
        lambda where, below: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), below),
        programs.terms_shardings,
        jax.eval_shape(programs.terms_program, *of_terms),
    )
    of_update = (total, state.params, batch, old.logp, terms, index)
    return [
        *found,
        Job("terms", programs.terms_program, of_terms, beside),
        Job("update", programs.gradient_program, of_update, beside),
        Job("update (apply)", programs.apply_program, (state, total, metrics), waiting),
    ]
