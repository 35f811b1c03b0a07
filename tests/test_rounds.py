"""Sampling in rounds: what is merged, when it ends, what is trained on; and the runs that sample so, killed or not."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_runs import Coin, run, timeless

from dynamo_jax.batch import Pool, PromptBatch, Rollouts
from dynamo_jax.config import Config, load_config
from dynamo_jax.objective import group_advantage
from dynamo_jax.rounds import EMPTY, Draw, Once, make_rounds, merged, mixed_groups

pytestmark = pytest.mark.usefixtures("compiled_once")

TEXT = "run_dir: r\npolicy: {architecture: {}}\nrollout: {prompts: 3, per_prompt: 4, max_tokens: 8}\n"
DYNAMIC = "rollout.dynamic_sampling.enabled=true"
ADA = "allocation.rule=reinforce_ada"


def config(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(TEXT)
    return load_config(path, overrides)


def rounds(tmp_path: Path, *overrides: str) -> Once:
    return make_rounds(config(tmp_path, *overrides))


def prompts(first: int) -> PromptBatch:
    slots = np.arange(first, first + 3, dtype=np.int32)
    names = tuple(f"p{i}" for i in slots)
    return PromptBatch(slots, slots[:, None], np.ones(3, np.int32), names, names, names)


def pool(batch: PromptBatch, rewards: list[list[float]], penalties: list[float] | None = None) -> Pool:
    """One round with the given rewards for each slot; a rollout's token says (prompt, number)."""
    prompt_of = np.repeat(np.arange(3), [len(group) for group in rewards])
    reward = np.array([r for group in rewards for r in group], np.float32)
    R = len(reward)
    tokens = np.stack([batch.index_P[prompt_of], np.arange(R)], 1).astype(np.int32)
    rollouts = Rollouts(tokens, np.full(R, 2, np.int32), np.ones(R, bool), np.full((R, 2), -0.5, np.float32))
    penalty = np.zeros(R, np.float32) if penalties is None else np.array(penalties, np.float32)
    return Pool(batch, prompt_of, rollouts, reward > 0.5, reward, penalty, batch.index_P / np.float32(100))


def no_draw() -> Draw:
    raise AssertionError("new prompts were drawn")


def drawn(batch: PromptBatch) -> Draw:
    return Draw(batch, np.repeat(np.arange(3), 4), np.zeros(3, np.float32))


def test_merged_rounds_keep_every_rollout_with_its_prompt():
    first, again, new = prompts(0), prompts(0), prompts(10)
    sampled = [pool(first, [[1, 0], [0], [1]]), pool(new, [[1], [0, 0, 1], []]), pool(first, [[], [1, 1], []])]
    together = merged(sampled)
    assert together.prompts.ids == ("p0", "p1", "p2", "p10", "p11", "p12")
    assert together.prompt_of_R.tolist() == [0, 0, 1, 2, 3, 4, 4, 4, 1, 1]
    np.testing.assert_array_equal(together.prompts.index_P[together.prompt_of_R], together.rollouts.tokens_BC[:, 0])
    assert together.reward_R.tolist() == [1, 0, 0, 1, 1, 0, 0, 1, 1, 1]
    assert together.rollouts.tokens_BC[-1].tolist() == [1, 1]
    np.testing.assert_allclose(together.success_P, [0, 0.01, 0.02, 0.1, 0.11, 0.12])
    assert merged([sampled[0]]) is sampled[0]
    # Equal prompts of another batch are other slots: only the same batch is sampled again.
    assert len(merged([pool(first, [[1], [1], [1]]), pool(again, [[1], [1], [1]])]).prompts.ids) == 6


def test_one_round_without_a_method_that_asks_for_more(tmp_path):
    once, batch = rounds(tmp_path), prompts(0)
    assert once.next([], lambda: drawn(batch)).prompts is batch
    one = pool(batch, [[1] * 4, [0] * 4, [0] * 4])
    assert once.next([one], no_draw) is None
    assert once.trained_rows(one, np.random.default_rng(0)).tolist() == list(range(12))
    assert once.metrics([one], one, np.arange(12)) == {}
    assert (once.slots, once.capacity) == (3, 12)


def test_dynamic_sampling_keeps_whole_mixed_groups(tmp_path):
    """Budget 12. Mixed: 4 + 5 in the first two rounds, then a group of 6 that does not fit and one of 3 that does."""
    dynamic, new = rounds(tmp_path, DYNAMIC, "rollout.dynamic_sampling.max_refills=2"), prompts(10)
    sampled = [pool(prompts(0), [[1] * 4, [0, 0, 0, 1], [0] * 4])]
    assert dynamic.next(sampled, lambda: drawn(new)).prompts is new
    sampled.append(pool(new, [[1, 0, 1, 1, 1], [0] * 4, [1] * 3]))
    assert dynamic.next(sampled, lambda: drawn(new)) is not None
    sampled.append(pool(prompts(20), [[1] * 5 + [0], [0, 1, 1], [1] * 3]))
    assert dynamic.next(sampled, no_draw) is None
    together = merged(sampled)
    rows = dynamic.trained_rows(together, np.random.default_rng(0))
    assert together.prompt_of_R[rows].tolist() == [1] * 4 + [3] * 5 + [7] * 3
    assert len(set(rows.tolist())) == 12


def test_dynamic_sampling_ends_before_its_limit_if_the_batch_is_full(tmp_path):
    dynamic = rounds(tmp_path, DYNAMIC)
    assert dynamic.next([pool(prompts(0), [[1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 0, 1]])], no_draw) is None
    assert dynamic.next([pool(prompts(0), [[1, 0, 0, 0], [0, 1, 0, 1], [1, 0, 1]])], lambda: drawn(prompts(3)))


def test_groups_of_equal_rewards_are_dropped_and_no_others(tmp_path):
    """Graded rewards differ on one side of a half, too; equal ones do not, whatever they are. As advantages see it."""
    rewards = [[0.1, 0.2, 0.3, 0.4], [0.7, 0.7, 0.7, 0.7], [0.9, 0.8, 0.9, 0.9]]
    one = pool(prompts(0), rewards)
    assert mixed_groups(one).tolist() == [True, False, True]
    advantage = np.asarray(group_advantage(one.shaped_R, one.prompt_of_R.astype(np.int32), 3))
    assert [bool(advantage[4 * p : 4 * p + 4].any()) for p in range(3)] == [True, False, True]
    dynamic = rounds(tmp_path, DYNAMIC, "rollout.dynamic_sampling.max_refills=1")
    rows = dynamic.trained_rows(one, np.random.default_rng(0))
    assert rows.tolist() == [0, 1, 2, 3, 8, 9, 10, 11, *[EMPTY] * 4]
    assert dynamic.metrics([one], one, rows)["rollout/mixed_groups"] == 2
    # Penalties make equal rewards unequal, and unequal ones equal; a group of one, or of none, has nothing to compare.
    shaped = pool(prompts(0), [[1, 1, 1], [0.5, 1.0], [1]], [0, -0.5, 0, 0, -0.5, 0])
    assert mixed_groups(shaped).tolist() == [True, False, False]
    assert not mixed_groups(pool(prompts(0), [[], [0], [0.3, 0.3]])).any()


def test_dynamic_sampling_stops_at_its_limit_and_leaves_rows_empty(tmp_path):
    dynamic = rounds(tmp_path, DYNAMIC, "rollout.dynamic_sampling.max_refills=1")
    sampled = [pool(prompts(0), [[1] * 4, [0, 0, 0, 1], [0] * 4]), pool(prompts(10), [[1] * 4, [0] * 4, [1] * 4])]
    assert dynamic.next(sampled[:1], lambda: drawn(prompts(10))) is not None
    assert dynamic.next(sampled, no_draw) is None
    together = merged(sampled)
    rows = dynamic.trained_rows(together, np.random.default_rng(0))
    assert rows.tolist() == [4, 5, 6, 7] + [EMPTY] * 8
    assert dynamic.metrics(sampled, together, rows) == {
        "rollout/rounds": 2, "rollout/sampled": 24, "rollout/mixed_groups": 1, "rollout/empty_rows": 8,
    }  # fmt: skip
    assert dynamic.slots == 6
    reward, prompt_of = dynamic.padded(sampled[0].reward_R, sampled[0].prompt_of_R)
    assert (len(reward), len(prompt_of), prompt_of[-1]) == (24, 24, 6)


def test_reinforce_ada_samples_the_unsatisfied_again_and_balances(tmp_path):
    """Four rollouts a prompt, two right and two wrong wanted. Verdicts decide, not rewards."""
    ada, batch = rounds(tmp_path, ADA, "allocation.reinforce_ada.max_rounds=3"), prompts(0)
    sampled = [pool(batch, [[1, 1, 0, 0], [1, 0.9, 0.7, 0], [0, 0.1, 0.2, 0.3]])]
    again = ada.next(sampled, no_draw)
    assert again.prompts is batch
    assert again.prompt_of_R.tolist() == [1] * 4 + [2] * 4
    sampled.append(pool(batch, [[], [1, 0, 0, 1], [0, 0, 0, 0]]))
    again = ada.next(sampled, no_draw)
    assert again.prompts is batch
    assert again.prompt_of_R.tolist() == [2] * 4
    sampled.append(pool(batch, [[], [], [0, 1, 0, 0]]))
    assert ada.next(sampled, no_draw) is None  # prompt 2 still lacks one, but three rounds are the limit
    together = merged(sampled)
    assert (ada.slots, ada.capacity) == (3, 36)
    for seed in range(5):
        rows = ada.trained_rows(together, np.random.default_rng(seed))
        assert len(set(rows.tolist())) == 12
        right = [together.right_R[rows][together.prompt_of_R[rows] == p].sum() for p in range(3)]
        assert right == [2, 2, 1]
    both = [pool(batch, [[1, 0, 1, 0]] * 3)]
    assert ada.next(both, no_draw) is None  # all are satisfied


@pytest.mark.parametrize("method", [DYNAMIC, ADA])
def test_run_in_rounds_resumes_and_does_not_know_the_mesh(method: str, tmp_path: Path) -> None:
    """Refills move the data position by more than a batch a step; a stop between steps must not lose them."""
    everything = "logging.rollouts_per_step=1000"
    whole = run(tmp_path / "whole", method, everything)
    assert max(line["rollout/rounds"] for line in whole.metrics[1:]) > 1
    for line in whole.metrics[1:]:  # all rounds count
        rows = [json.loads(row) for row in whole.rollouts(line["step"]).splitlines()]
        counts = Counter(row["prompt_id"] for row in rows)
        assert len(rows) == line["rollout/sampled"] == sum(counts.values())
        assert (line["allocation/min"], line["allocation/max"]) == (min(counts.values()), max(counts.values()))
        assert sum(line[f"allocation/prompts_{kind}"] for kind in ("hard", "middle", "easy")) == len(counts)
        means = [np.mean([row["reward"] for row in rows if row["prompt_id"] == name]) for name in counts]
        assert line["reward/prompt_mean"] == pytest.approx(np.mean(means))
    assert whole.trainer.programs.traces == {"score": 1, "terms": 0, "update": 1, "update (apply)": 0}
    assert whole.trainer.sampler.traces == 1
    run(tmp_path / "parts", method, everything, "trainer.steps=2")
    run(tmp_path / "parts", method, everything)
    assert timeless(tmp_path / "parts") == whole.metrics
    mesh = run(tmp_path / "mesh", method, everything, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    for a, b in zip(mesh.metrics, whole.metrics, strict=True):
        assert a == pytest.approx(b, abs=1e-5, rel=1e-5)


def test_data_position_counts_refills(tmp_path: Path) -> None:
    whole = run(tmp_path / "run", DYNAMIC, "trainer.steps=3")
    drawn = sum(line["rollout/rounds"] for line in whole.metrics[1:])
    assert whole.metrics[-1]["data/epoch"] == drawn * 8 / 16
    assert dataclasses.asdict(whole.trainer.config)["rollout"]["dynamic_sampling"]["enabled"]


@pytest.mark.parametrize("verdict", [True, False])
def test_a_step_in_which_no_group_teaches_changes_no_number_to_nan(verdict, tmp_path, monkeypatch):
    """All right or all wrong: after the last refill every row of the batch is empty."""
    monkeypatch.setattr(Coin, "grade_batch", lambda self, pairs: [verdict] * len(pairs))
    none = run(tmp_path / "run", DYNAMIC, "rollout.dynamic_sampling.max_refills=1", "trainer.steps=2")
    for line in none.metrics[1:]:
        assert line["rollout/empty_rows"] == 32
        assert all(value is not None for value in line.values())
        assert line["objective/grad_norm"] == line["objective/skipped_updates"] == 0
