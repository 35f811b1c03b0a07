"""The programs of allocation: every rule over a run, on one device and on eight, from and to a checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.allocation import RULES, PromptStats, Rule, prompt_features, released_allocate, released_priority
from dynamo_jax.allocation.programs import OLDER_GP_NAMES, AllocationPrograms, AllocationState
from dynamo_jax.batch import Pool, PromptBatch, Rollouts
from dynamo_jax.config import AllocationConfig, MeshConfig, choices
from dynamo_jax.config.methods import VIPConfig
from dynamo_jax.run.checkpoint import Checkpointer
from dynamo_jax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("compiled_once")

N, P, B = 40, 8, 64
CONFIG = AllocationConfig(low=2, high=24, half_life=20.0, vip=VIPConfig(features=16, fourier=32))
EIGHT = MeshConfig(2, 2, 2)


def programs(rule: str = "bernoulli", mesh: MeshConfig = MeshConfig(), **changes: Any) -> AllocationPrograms:  # noqa: B008
    config = dataclasses.replace(CONFIG, rule=rule, **changes)
    tokens = [[i % 7, i // 7, 3] + [1] * (i % 5) for i in range(N)]
    features_NE = prompt_features(tokens, config.vip.features) if RULES[rule].features else None
    return AllocationPrograms(config, N, B, make_mesh(mesh, jax.devices()[: mesh.size]), features_NE=features_NE)


def history(rates: Any, trials: float) -> AllocationState:
    """All prompts tried `trials` times at step 0, prompt i with success rate rates[i]."""
    successes = np.resize(np.asarray(rates, np.float32), N) * trials
    stats = PromptStats(successes, np.full(N, trials, np.float32), successes * 0, np.zeros(N, np.int32))
    return AllocationState(stats, None)


def run(p: AllocationPrograms, steps: int, seed: int = 0) -> list[Any]:
    """Random batches of prompts of every success rate. What each step gave, the state last."""
    rng = np.random.default_rng(seed)
    rate_N = rng.uniform(0, 1, N) ** np.where(rng.random(N) < 0.5, 6, 0.1)  # mostly near 0 and near 1
    stats, seen = p.init(), []
    for step in range(1, steps + 1):
        index_P = rng.permutation(N)[:P].astype(np.int32)
        counts_P, prompt_of_B, success_P = jax.device_get(p.allocate(stats, index_P, step))
        reward_B = (rng.random(B) < rate_N[index_P[prompt_of_B]]).astype(np.float32)
        norm_B = rng.uniform(0.1, 3.0, B).astype(np.float32)
        stats = p.record(stats, index_P, prompt_of_B, reward_B, norm_B, step)
        seen.append((index_P, counts_P, prompt_of_B, success_P, reward_B))
    return [*seen, jax.device_get(stats), rate_N]


def test_the_table_and_the_config_name_the_same_rules() -> None:
    assert set(RULES) == set(get_args(choices.Rule))


@pytest.mark.parametrize("on_host", [False, True])
def test_an_entry_makes_a_rule(on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced or with numpy: what the function answers is what prompts get. Here: all to the least solved one."""

    def to_the_hardest(known: Any, terms: Any, config: AllocationConfig) -> Any:
        assert isinstance(known.success_P, np.ndarray if on_host else jax.Array)
        xp = np if on_host else jnp
        best_P = xp.arange(known.success_P.shape[0]) == xp.argmin(known.success_P)
        return xp.where(best_P, terms.budget - (P - 1) * terms.low, terms.low).astype(xp.int32)

    monkeypatch.setitem(RULES, "hardest", Rule(to_the_hardest, on_host=on_host))
    config = dataclasses.replace(CONFIG)
    object.__setattr__(config, "rule", "hardest")  # the config's own list has no such name
    p = AllocationPrograms(config, N, B, make_mesh(MeshConfig(), jax.devices()[:1]))
    for hardest in (2, 5):
        found = p.allocate(history(np.where(np.arange(P) == hardest, 0.1, 0.6), 10.0), np.arange(P, dtype=np.int32), 1)
        counts_P = np.where(np.arange(P) == hardest, B - (P - 1) * 2, 2)
        np.testing.assert_array_equal(found.counts_P, counts_P)
        np.testing.assert_array_equal(found.prompt_of_B, np.repeat(np.arange(P), counts_P))
        assert found.success_P.argmin() == hardest
    assert p.traces["allocate"] == 1


@pytest.mark.parametrize("rule", RULES)
def test_any_rule_over_a_run(rule: str) -> None:
    """Bounds and sums whatever the history; one trace each; results go to the prompts that they are of."""
    p = programs(rule)
    *steps, stats, rate_N = run(p, 24)
    successes_N, trials_N, distinct = np.zeros(N), np.zeros(N), set()
    for index_P, counts_P, prompt_of_B, success_P, reward_B in steps:
        assert (counts_P.dtype, prompt_of_B.dtype, success_P.dtype) == (np.int32, np.int32, np.float32)
        assert counts_P.sum() == B
        assert CONFIG.low <= counts_P.min() <= counts_P.max() <= CONFIG.high
        np.testing.assert_array_equal(prompt_of_B, np.repeat(np.arange(P), counts_P))
        assert np.all((success_P > 0) & (success_P < 1))
        np.add.at(successes_N, index_P[prompt_of_B], reward_B)
        np.add.at(trials_N, index_P[prompt_of_B], 1)
        distinct.add(tuple(counts_P))
    assert len(distinct) == 1 if rule in ("uniform", "reinforce_ada") else len(distinct) > 12
    assert p.traces == {"allocate": 1, "record": 1}
    # Each prompt's results went to that prompt: its discounted history never exceeds all it ever got.
    assert np.all(stats.prompts.trials_N <= trials_N + 1e-3)
    once = stats.prompts.trials_N > 0
    np.testing.assert_array_equal(once, trials_N > 0)
    assert np.corrcoef((successes_N / np.maximum(trials_N, 1))[once], rate_N[once])[0, 1] > 0.9
    assert (stats.gp is not None) == (rule == "vip")


@pytest.mark.parametrize("rule", RULES)
def test_eight_devices_do_the_same(rule: str) -> None:
    one, eight = run(programs(rule), 4), run(programs(rule, mesh=EIGHT), 4)
    jax.tree.map(np.testing.assert_array_equal, one, eight)


def test_rules_share_as_they_say() -> None:
    """p(1-p) of 0.25, 0.09 and 0.0099: shares in proportion to it, to its root, or equal."""
    stats = history([0.5, 0.9, 0.99, 0.5, 0.1, 0.01, 0.5, 0.9], trials=1e6)
    variance_P = np.array([0.25, 0.09, 0.0099, 0.25, 0.09, 0.0099, 0.25, 0.09])
    index_P = np.arange(P, dtype=np.int32)
    for rule, weight_P in (("uniform", np.ones(P)), ("bernoulli", variance_P), ("neyman", np.sqrt(variance_P))):
        counts_P = np.asarray(programs(rule, low=1, half_life=1e9).allocate(stats, index_P, 1)[0])
        np.testing.assert_allclose(counts_P, np.maximum(B * weight_P / weight_P.sum(), 1), atol=1.0)
        assert np.abs(counts_P[[0, 1, 2]] - counts_P[[3, 4, 5]]).max() <= 1  # equals may have to share an odd number


def test_history_moves_the_allocation_and_fades() -> None:
    p, index_P = programs(), np.arange(P, dtype=np.int32)
    stats = p.init()
    counts_P, prompt_of_B, success_P = jax.device_get(p.allocate(stats, index_P, 1))
    np.testing.assert_array_equal(counts_P, B // P)  # nothing is known
    np.testing.assert_allclose(success_P, 0.5)
    # Prompts 0 to 2 always right, 3 to 5 always wrong, 6 and 7 right every other time.
    reward_B = np.select([prompt_of_B < 3, prompt_of_B < 6], [1.0, 0.0], np.arange(B) % 2).astype(np.float32)
    stats = p.record(stats, index_P, prompt_of_B, reward_B, None, 1)
    counts_P, _, success_P = jax.device_get(p.allocate(stats, index_P, 2))
    assert counts_P[6:].min() > 2 * counts_P[:6].max()
    assert success_P[:3].min() > 0.85
    assert success_P[3:6].max() < 0.15
    # A batch's slot is not the prompt: the same prompts in another order get the same counts.
    order = np.array([7, 0, 3, 6, 1, 4, 2, 5])
    moved_P = np.asarray(p.allocate(stats, order.astype(np.int32), 2)[0])
    assert moved_P[order >= 6].min() > 2 * moved_P[order < 6].max()
    later_P = np.asarray(p.allocate(stats, index_P, 1000)[0])
    np.testing.assert_array_equal(later_P, B // P)  # fifty half-lives later nothing is known again


@pytest.mark.parametrize("rule", ["bernoulli", "vip"])
def test_state_survives_a_checkpoint(rule: str, tmp_path: Path) -> None:
    p = programs(rule, mesh=EIGHT)
    stats = p.init()
    index_P, prompt_of_B = np.arange(P, dtype=np.int32), np.repeat(np.arange(P, dtype=np.int32), B // P)
    stats = p.record(stats, index_P, prompt_of_B, (np.arange(B) % 3 == 0).astype(np.float32), None, 3)
    with Checkpointer(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, {"stats": stats}, {}, None)
    with Checkpointer(tmp_path / "checkpoints", keep=1) as checkpoints:
        saved, _ = checkpoints.restore(1, {"stats": p.abstract_stats})
    assert isinstance(saved["stats"], AllocationState)
    jax.tree.map(np.testing.assert_array_equal, saved["stats"], stats)
    assert jax.tree.structure(saved["stats"]) == jax.tree.structure(stats)


@pytest.mark.parametrize("rule", ["bernoulli", "vip"])
def test_padding_teaches_nothing(rule: str) -> None:
    p, index_P = programs(rule), np.arange(P, dtype=np.int32)
    nothing = p.record(p.init(), index_P, np.full(B, P, np.int32), np.ones(B, np.float32), None, 1)
    for found, expected in zip(nothing.prompts[:3], p.init().prompts[:3], strict=True):
        np.testing.assert_array_equal(found, expected)
    if nothing.gp is not None:
        assert not nothing.gp.precision_WW.any()


def test_released_is_the_released_rule() -> None:
    """With a half-life that never fades anything, its counts are whole and its priorities the released ones."""
    p = programs("released", half_life=1e9)
    *steps, _, _ = run(p, 30)
    successes_N, trials_N = np.zeros(N, int), np.zeros(N, int)
    for index_P, counts_P, prompt_of_B, success_P, reward_B in steps:
        priority_P = released_priority(successes_N[index_P], trials_N[index_P])
        np.testing.assert_array_equal(counts_P, released_allocate(trials_N[index_P], priority_P, B, 2, 24, 4))
        np.testing.assert_allclose(success_P, (successes_N[index_P] + 1) / (trials_N[index_P] + 2), rtol=1e-5)
        np.add.at(successes_N, index_P[prompt_of_B], reward_B > 0.5)
        np.add.at(trials_N, index_P[prompt_of_B], 1)


def test_gvm_gives_more_where_gradients_are_large() -> None:
    p, index_P = programs("gvm", low=1), np.arange(P, dtype=np.int32)
    prompt_of_B = np.repeat(index_P, B // P)
    norm_B = np.where(prompt_of_B < 4, 1.0, 3.0).astype(np.float32)
    reward_B = (np.arange(B) % 2).astype(np.float32)
    stats = p.record(p.init(), index_P, prompt_of_B, reward_B, norm_B, 1)
    counts_P = np.asarray(p.allocate(stats, index_P, 1)[0])
    np.testing.assert_array_equal(counts_P, [4] * 4 + [12] * 4)
    with pytest.raises(ValueError, match="norm_B = None; rule gvm"):
        p.record(stats, index_P, prompt_of_B, reward_B, None, 2)


def test_what_is_recorded_of_a_round() -> None:
    """Rounds of any size, one trace; verdicts, not rewards; gvm also how large gradients are."""
    index_P, names = np.arange(4, 4 + P, dtype=np.int32), tuple("abcdefgh")
    prompts = PromptBatch(index_P, index_P[:, None], index_P, names, names, names)
    logp = np.float32([[-0.5, -0.5], [-0.5, 0], [-0.5, -0.5], [-0.5, -0.5]])  # 0 is padding
    rollouts = Rollouts(np.zeros((4, 2), np.int32), np.ones(4, np.int32), np.ones(4, bool), logp)
    right = np.array([True, True, False, True])
    none = np.zeros(4, np.float32)
    pool = Pool(prompts, np.array([0, 1, 1, 6]), rollouts, right, right - np.float32(0.6), none, np.zeros(P))
    for rule in ("bernoulli", "gvm"):
        p = programs(rule)
        stats = p.record_pool(p.init(), pool, 3)
        for name, expected in (("successes_N", [1, 1, 1]), ("trials_N", [1, 2, 1])):
            found_N = np.asarray(getattr(stats.prompts, name))
            assert found_N[[4, 5, 10]].tolist() == expected
            assert found_N.sum() == sum(expected)
        # A token of log-prob -1/2: 1 - e^-1/2 = 0.3935; two of them: sqrt(2) times that.
        norms = np.array([0.5565, 0.3935, 0.5565]) if rule == "gvm" else np.zeros(3)
        np.testing.assert_allclose(np.asarray(stats.prompts.norm_N)[[4, 5, 10]], norms, atol=1e-3)
        full = pool._replace(prompt_of_R=np.repeat(np.arange(P), B // P), right_R=np.resize(right, B))
        p.record_pool(stats, full._replace(rollouts=rollouts._replace(logp_BC=np.resize(logp, (B, 2)))), 4)
        assert p.traces["record"] == 1


def test_vip_needs_features() -> None:
    config = dataclasses.replace(CONFIG, rule="vip")
    for features_NE in (None, np.zeros((N - 1, 4), np.float32)):
        with pytest.raises(ValueError, match="needs features of all 40 prompts"):
            AllocationPrograms(config, N, B, make_mesh(MeshConfig(), jax.devices()[:1]), features_NE=features_NE)


def test_reinforce_ada_needs_an_even_first_round() -> None:
    p = programs("reinforce_ada")
    with pytest.raises(ValueError, match="budget = 64 is not a multiple of 7 prompts"):
        p.allocate(p.init(), np.arange(7, dtype=np.int32), 1)


def test_a_state_with_the_names_of_an_older_version_is_taken_over(tmp_path: Path) -> None:
    """Before W was their letter, arrays over Fourier features were called otherwise."""
    allocation = programs("vip")
    stats = allocation.init()
    stats = stats._replace(gp=stats.gp._replace(precision_WW=stats.gp.precision_WW + 2.0, last_step=jnp.int32(7)))
    older = stats._replace(gp=dict(zip(OLDER_GP_NAMES, stats.gp, strict=True)))
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, older, {})
        today, *others = allocation.forms
        found = checkpoints.restore_newest(today.arrays, others)
    assert found is not None
    jax.tree.map(np.testing.assert_array_equal, found[1], stats)
