"""The reference policy: what it says of tokens, what that costs rollouts, and that it outlives updates and restarts."""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import Coin, timeless, write_config

from dynamo_jax import trainer as loop
from dynamo_jax.batch import Pool, PromptBatch, Rollouts
from dynamo_jax.config import (
    ArchitectureConfig,
    Config,
    MeshConfig,
    ModulationConfig,
    ObjectiveConfig,
    PolicyConfig,
    RolloutConfig,
    TaskConfig,
    TrainerConfig,
    load_config,
)
from dynamo_jax.config.methods import KLConfig
from dynamo_jax.policy import abstract_policy, init_policy
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.run.bucket import locations
from dynamo_jax.run.checkpoint import CheckpointError
from dynamo_jax.run.keeper import Keeper
from dynamo_jax.sharding import make_mesh
from dynamo_jax.update import MiniBatch, Programs, make_reference, pack
from dynamo_jax.update.reference import NoReference, Reference

pytestmark = pytest.mark.usefixtures("compiled_once")

R, L, C, V = 8, 4, 6, 16
LENGTHS = np.array([6, 1, 3, 1, 5, 2, 6, 4], np.int32)
SHAPE = ArchitectureConfig(
    hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=16, vocab_size=V,
    tie_word_embeddings=False,
)  # fmt: skip


def config_of(micro_batch: int | None = None, **kl: Any) -> Config:
    return Config(
        run_dir="unused",
        task=TaskConfig(max_prompt_tokens=L),
        policy=PolicyConfig(architecture=SHAPE),
        rollout=RolloutConfig(prompts=2, per_prompt=4, max_tokens=C),
        objective=ObjectiveConfig(kl=KLConfig(**({"coefficient": 0.25} | kl))),
        modulation=ModulationConfig(enabled=False),
        trainer=TrainerConfig(micro_batch=micro_batch),
    )


def programs_of(config: Config) -> Programs:
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.size])
    return Programs(*abstract_policy(decoder_config(config, V, mesh)), config, mesh)


def params_of(config: Config) -> Any:
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.size])
    return init_policy(decoder_config(config, V, mesh), jax.random.key(1))


def rounded(params: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)


def pool() -> Pool:
    rng = np.random.default_rng(0)
    length_P = np.array([4, 2], np.int32)
    tokens_PL = np.where(np.arange(L) >= L - length_P[:, None], rng.integers(1, V, (2, L)), 0).astype(np.int32)
    prompts = PromptBatch(np.arange(2), tokens_PL, length_P, ("a", "b"), ("a", "b"), ("", ""))
    real_RC = np.arange(C) < LENGTHS[:, None]
    tokens_RC = np.where(real_RC, rng.integers(0, V, (R, C)), 0).astype(np.int32)
    logp_RC = np.where(real_RC, rng.normal(-2, 0.5, (R, C)), 0).astype(np.float32)
    rollouts: Any = Rollouts(tokens_RC, LENGTHS, LENGTHS < C, logp_RC)
    penalty_R = np.where(np.arange(R) == 3, -0.5, 0).astype(np.float32)
    right_R = np.arange(R) % 2 == 0
    prompt_of_R = np.repeat(np.arange(2, dtype=np.int32), R // 2)
    return Pool(prompts, prompt_of_R, rollouts, right_R, right_R.astype(np.float32), penalty_R, np.zeros(2, np.float32))


def mini(programs: Programs) -> MiniBatch:
    advantage_R = np.array([1.0, -0.5, 0.7, -1.2, 0.0, 2.0, -0.1, 0.4], np.float32)
    rows_M = np.array([3, 1, 4, 0, 5, 2, 7, 6])
    packed = pack(pool(), advantage_R, np.ones(R, np.float32), np.arange(R, dtype=np.uint32), rows_M, programs.shape)
    return programs.place(packed)


@contextmanager
def keeper(folder: Path, config: Config) -> Iterator[Keeper]:
    with Keeper(config, locations(str(folder)), None, None, lambda: None) as found:
        yield found


def started(folder: Path, config: Config) -> tuple[Programs, Reference]:
    programs = programs_of(config)
    reference = make_reference(config, programs)
    assert isinstance(reference, Reference)
    with keeper(folder, config) as keep:
        reference.start(params_of(config), keep)
    return programs, reference


def test_without_a_coefficient_there_is_none(tmp_path: Path) -> None:
    config = config_of(coefficient=0.0)
    programs = programs_of(config)
    reference, batch, sampled = make_reference(config, programs), mini(programs), pool()
    assert type(reference) is NoReference
    with keeper(tmp_path, config) as keep:
        reference.start(params_of(config), keep)
    assert not (tmp_path / "reference").exists()
    assert reference.in_loss(batch) is batch
    assert reference.in_reward(sampled)[0] is sampled
    assert len(jax.tree.leaves(batch.batch.rows)) == 4


def test_the_loss_has_the_penalty_in_any_micro_batches(tmp_path: Path) -> None:
    """The loss is the one without it, and the mean k2 of the tokens; the reference's log-probs are the rounded ones."""
    found: dict[int | None, tuple[dict[str, float], Any]] = {}
    for micro_batch in (None, 2):
        config = config_of(micro_batch)
        programs, reference = started(tmp_path / str(micro_batch), config)
        batch = reference.in_loss(mini(programs))
        stats, _ = programs.score(rounded(params_of(config)), batch)
        np.testing.assert_allclose(batch.batch.rows.reference_logp, stats.logp, atol=1e-5)
        away = stats.logp + 0.2 * batch.batch.rows.position  # of the policy, to be pulled to
        rows = batch.batch.rows._replace(reference_logp=away)
        batch = batch._replace(batch=batch.batch._replace(rows=rows))
        old, _ = programs.score(params_of(config), batch)
        state, metrics = programs.update(programs.init(params_of(config)), batch, old, first=True)
        found[micro_batch] = {k: float(v) for k, v in metrics.items()}, jax.device_get(state.params)
    (metrics, params), (in_parts, params_in_parts) = found[None], found[2]
    assert in_parts == pytest.approx(metrics, abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params_in_parts, params)

    _, without = programs.update(programs.init(params_of(config)), mini(programs), old, first=True)
    assert metrics["objective/kl_penalty"] > 0.01
    assert metrics["objective/loss"] - without["objective/loss"] == pytest.approx(
        metrics["objective/kl_penalty"], abs=1e-6
    )
    assert abs(metrics["objective/grad_norm"] - without["objective/grad_norm"]) > 1e-3
    assert not {"objective/kl_penalty", "objective/kl_reference"} & without.keys()


@pytest.mark.parametrize(("estimator", "micro_batch"), [("k1", 2), ("k3", None)])
def test_rewards_lose_what_rollouts_pay(tmp_path: Path, estimator: str, micro_batch: int | None) -> None:
    """Of each rollout by itself, from the log-probs of its tokens in a batch that is packed otherwise."""
    config = config_of(estimator=estimator, in_="reward", micro_batch=micro_batch)
    programs, reference = started(tmp_path, config)
    before = pool()
    batch = mini(programs)
    assert reference.in_loss(batch) is batch
    paid, metrics = reference.in_reward(before)
    stats, _ = programs.score(rounded(params_of(config)), batch)
    rows, logp = jax.device_get((batch.batch.rows, stats.logp))
    order = [3, 1, 4, 0, 5, 2, 7, 6]
    expected = np.zeros(R)
    for m, r in enumerate(order):
        here = (rows.rollout == m) & (rows.sampled_logp != 0)
        assert here.sum() == LENGTHS[r]
        d = logp[here].astype(np.float64) - rows.sampled_logp[here]
        expected[r] = 0.25 * np.sum(-d if estimator == "k1" else np.exp(d) - 1 - d)
    np.testing.assert_allclose(paid.penalty_R, before.penalty_R - expected, atol=1e-5)
    np.testing.assert_allclose(paid.shaped_R, before.shaped_R - expected, atol=1e-5)
    assert metrics["reward/kl_penalty"] == pytest.approx(expected.mean(), abs=1e-5)
    assert metrics["objective/kl_reference"] > 0.01
    assert paid._replace(penalty_R=before.penalty_R) == before


def test_it_outlives_updates_and_restarts_on_another_mesh(tmp_path: Path) -> None:
    """Also of a policy in bfloat16, whose arrays the reference could share: updates are given them to overwrite."""
    config = config_of()
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, param_dtype="bfloat16"))
    programs = programs_of(config)
    reference, state = make_reference(config, programs), programs.init(params_of(config))
    with keeper(tmp_path, config) as keep:
        make_reference(config, programs).start(jax.tree.map(lambda x: x * 2, state.params), keep)  # killed there
        reference.start(state.params, keep)
    before = np.asarray(reference.in_loss(mini(programs)).batch.rows.reference_logp)
    programs.update(state, mini(programs), None, first=True)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    np.testing.assert_array_equal(reference.in_loss(mini(programs)).batch.rows.reference_logp, before)

    other = dataclasses.replace(config, mesh=MeshConfig(fsdp=2, tensor=2))
    other = dataclasses.replace(other, objective=ObjectiveConfig(kl=KLConfig(coefficient=0.25, host_memory=True)))
    programs = programs_of(other)
    resumed = make_reference(other, programs)
    with keeper(tmp_path, other) as keep:
        resumed.resume(keep)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(resumed._params)} == {"pinned_host"}
    assert {x.dtype for x in jax.tree.leaves(resumed._params)} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(resumed.in_loss(mini(programs)).batch.rows.reference_logp, before, atol=1e-5)


def test_a_reference_that_is_missing_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = config_of()
    _, reference = started(tmp_path, config)
    wider = dataclasses.replace(SHAPE, intermediate_size=32)
    other = dataclasses.replace(config, policy=PolicyConfig(architecture=wider))
    with keeper(tmp_path, config) as keep:
        with pytest.raises(CheckpointError, match=r"reference/1: was saved from another model .*16.*32"):
            make_reference(other, programs_of(other)).resume(keep)
        shutil.rmtree(tmp_path / "reference")
        with pytest.raises(CheckpointError, match=r"reference: is missing or empty.* Restore the folder, or"):
            reference.resume(keep)


def test_k1_in_the_loss_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for options, warned in (({"estimator": "k1"}, True), ({"estimator": "k1", "in_": "reward"}, False), ({}, False)):
        caplog.clear()
        config = config_of(**options)
        make_reference(config, programs_of(config))
        assert ("expectation of its gradient is 0" in caplog.text) == warned


def test_a_resumed_run_pays_as_if_it_had_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a warm-up, which is not done again: step 2 from the saved reference is step 2 of the run in one go."""
    build_task = loop.build_task
    monkeypatch.setattr(loop, "build_task", lambda *given: dataclasses.replace(build_task(*given), verifier=Coin()))

    def train(name: str, steps: int) -> list[dict[str, Any]]:
        overrides = ["objective.kl.coefficient=0.5", "eval.every=0", "warmup.steps=1", f"trainer.steps={steps}"]
        loop.train(load_config(write_config(tmp_path / name), overrides))
        lines = timeless(tmp_path / name)  # the first part evaluates its last step
        return [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in lines]

    whole = train("whole", 2)
    train("parts", 1)
    assert train("parts", 2) == whole
    assert whole[-1]["objective/kl_penalty"] > 1e-3
