"""Sampling in rounds: what is merged, when it ends, what is trained on; and the runs that sample so, killed or not."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from small_runs import Coin, run, timeless

from dynamo_jax.batch import Pool, PromptBatch, Rollouts
from dynamo_jax.config import Config, load_config
from dynamo_jax.rounds import (
    EMPTY,
    merged,
    padded_pool,
    record_arrays,
    round_metrics,
    shaped_rewards,
    slots,
    trained_rows,
    unfinished,
    unsatisfied,
)

pytestmark = pytest.mark.usefixtures("compiled_once")

TEXT = "run_dir: r\npolicy: {architecture: {}}\nrollout: {prompts: 3, per_prompt: 4, max_tokens: 8}\n"
DYNAMIC = "rollout.dynamic_sampling.enabled=true"
ADA = "allocation.rule=reinforce_ada"


def config(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(TEXT)
    return load_config(path, overrides)


def prompts(first: int) -> PromptBatch:
    slots = np.arange(first, first + 3, dtype=np.int32)
    names = tuple(f"p{i}" for i in slots)
    return PromptBatch(slots, slots[:, None], np.ones(3, np.int32), names, names, names)


def pool(batch: PromptBatch, rewards: list[list[int]]) -> Pool:
    """One round with the given rewards for each slot; a rollout's token says (prompt, number)."""
    prompt_of = np.repeat(np.arange(3), [len(group) for group in rewards])
    reward = np.array([r for group in rewards for r in group], np.float32)
    R = len(reward)
    tokens = np.stack([batch.index_P[prompt_of], np.arange(R)], 1).astype(np.int32)
    rollouts = Rollouts(tokens, np.full(R, 2, np.int32), np.ones(R, bool), np.full((R, 2), -0.5, np.float32))
    return Pool(batch, prompt_of, rollouts, reward > 0.5, reward)


def test_merged_rounds_keep_every_rollout_with_its_prompt():
    first, again, new = prompts(0), prompts(0), prompts(10)
    rounds = [pool(first, [[1, 0], [0], [1]]), pool(new, [[1], [0, 0, 1], []]), pool(first, [[], [1, 1], []])]
    together = merged(rounds)
    assert together.prompts.ids == ("p0", "p1", "p2", "p10", "p11", "p12")
    assert together.prompt_of_R.tolist() == [0, 0, 1, 2, 3, 4, 4, 4, 1, 1]
    np.testing.assert_array_equal(together.prompts.index_P[together.prompt_of_R], together.rollouts.tokens_BC[:, 0])
    assert together.reward_R.tolist() == [1, 0, 0, 1, 1, 0, 0, 1, 1, 1]
    assert together.rollouts.tokens_BC[-1].tolist() == [1, 1]
    assert merged([rounds[0]]) is rounds[0]
    # Equal prompts of another batch are other slots: only the same batch is sampled again.
    assert len(merged([pool(first, [[1], [1], [1]]), pool(again, [[1], [1], [1]])]).prompts.ids) == 6


def test_one_round_without_a_method_that_asks_for_more(tmp_path):
    c = config(tmp_path)
    one = pool(prompts(0), [[1] * 4, [0] * 4, [0] * 4])
    assert not unfinished(c, [one])
    assert trained_rows(c, one, np.random.default_rng(0)).tolist() == list(range(12))
    assert round_metrics(c, [one], one, np.arange(12)) == {}


def test_dynamic_sampling_keeps_whole_mixed_groups(tmp_path):
    """Budget 12. Mixed: 4 + 5 in the first two rounds, then a group of 6 that does not fit and one of 3 that does."""
    c = config(tmp_path, DYNAMIC, "rollout.dynamic_sampling.max_refills=2")
    rounds = [pool(prompts(0), [[1] * 4, [0, 0, 0, 1], [0] * 4])]
    assert unfinished(c, rounds)
    rounds.append(pool(prompts(10), [[1, 0, 1, 1, 1], [0] * 4, [1] * 3]))
    assert unfinished(c, rounds)
    rounds.append(pool(prompts(20), [[1] * 5 + [0], [0, 1, 1], [1] * 3]))
    assert not unfinished(c, rounds)
    together = merged(rounds)
    rows = trained_rows(c, together, np.random.default_rng(0))
    assert together.prompt_of_R[rows].tolist() == [1] * 4 + [3] * 5 + [7] * 3
    assert len(set(rows.tolist())) == 12


def test_dynamic_sampling_stops_at_its_limit_and_leaves_rows_empty(tmp_path):
    c = config(tmp_path, DYNAMIC, "rollout.dynamic_sampling.max_refills=1")
    rounds = [pool(prompts(0), [[1] * 4, [0, 0, 0, 1], [0] * 4]), pool(prompts(10), [[1] * 4, [0] * 4, [1] * 4])]
    assert unfinished(c, rounds[:1])
    assert not unfinished(c, rounds)
    together = merged(rounds)
    rows = trained_rows(c, together, np.random.default_rng(0))
    assert rows.tolist() == [4, 5, 6, 7] + [EMPTY] * 8
    assert round_metrics(c, rounds, together, rows) == {
        "rollout/rounds": 2, "rollout/sampled": 24, "rollout/mixed_groups": 1, "rollout/empty_rows": 8,
    }  # fmt: skip
    assert slots(c) == 6
    reward, prompt_of = padded_pool(c, rounds[0].reward_R, rounds[0].prompt_of_R)
    assert (len(reward), len(prompt_of), prompt_of[-1]) == (24, 24, 6)


def test_reinforce_ada_samples_the_unsatisfied_again_and_balances(tmp_path):
    """Four rollouts a prompt, two right and two wrong wanted."""
    c = config(tmp_path, ADA, "allocation.reinforce_ada.max_rounds=3")
    batch = prompts(0)
    rounds = [pool(batch, [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])]
    assert unsatisfied(c, rounds).tolist() == [False, True, True]
    assert unfinished(c, rounds)
    rounds.append(pool(batch, [[], [1, 0, 0, 1], [0, 0, 0, 0]]))
    assert unsatisfied(c, rounds).tolist() == [False, False, True]
    rounds.append(pool(batch, [[], [], [0, 1, 0, 0]]))
    assert not unfinished(c, rounds)  # prompt 2 still lacks one, but three rounds are the limit
    together = merged(rounds)
    assert slots(c) == 3
    for seed in range(5):
        rows = trained_rows(c, together, np.random.default_rng(seed))
        assert len(set(rows.tolist())) == 12
        right = [together.reward_R[rows][together.prompt_of_R[rows] == p].sum() for p in range(3)]
        assert right == [2, 2, 1]


def test_what_the_allocation_records_of_a_round(tmp_path):
    c = config(tmp_path, ADA)
    one = pool(prompts(4), [[1], [0, 1], []])
    graded = one._replace(reward_R=one.reward_R - 0.6)  # a penalty does not make a right answer a failure
    index, prompt_of, reward, size = record_arrays(c, graded)
    assert index.tolist() == [4, 5, 6]
    assert prompt_of.tolist() == [0, 1, 1] + [3] * 9
    assert reward.tolist() == [1, 0, 1] + [0] * 9
    assert not size.any()
    # Two tokens of log-prob -1/2: sqrt(2) (1 - e^-1/2) = 0.5564
    size = record_arrays(config(tmp_path, "allocation.rule=gvm"), one)[3]
    np.testing.assert_allclose(size, [0.55645] * 3 + [0] * 9, atol=1e-4)


def test_overlong_rollouts_lose_reward(tmp_path):
    """max_tokens 8, buffer 4: free up to 4 tokens, then a quarter of the factor 2 for each."""
    c = config(tmp_path, "objective.overlong={enabled: true, buffer: 4, factor: 2}")
    one = pool(prompts(0), [[1], [0, 1], [1]])
    rollouts = one.rollouts._replace(length_B=np.array([4, 5, 7, 8], np.int32))
    assert shaped_rewards(c, one._replace(rollouts=rollouts)).tolist() == [1.0, -0.5, -0.5, -1.0]
    assert shaped_rewards(config(tmp_path), one).tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("method", [DYNAMIC, ADA])
def test_run_in_rounds_resumes_and_does_not_know_the_mesh(method: str, tmp_path: Path) -> None:
    """Refills move the data position by more than a batch a step; a stop between steps must not lose them."""
    whole = run(tmp_path / "whole", method)
    assert max(line["rollout/rounds"] for line in whole.metrics[1:]) > 1
    assert whole.trainer.programs.traces == {"score": 1, "update": 1}
    assert whole.trainer.sampler.traces == 1
    run(tmp_path / "parts", method, "trainer.steps=2")
    run(tmp_path / "parts", method)
    assert timeless(tmp_path / "parts") == whole.metrics
    mesh = run(tmp_path / "mesh", method, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
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
