"""Pass@k and its interval."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest

from dynamo_jax.evaluation.scores import Evaluation, pass_at_k, table, wide_table

# --- pass_at_k


@pytest.mark.shared
def test_golden(shared):
    golden = np.load(shared / "golden" / "pass_at_k.npz")
    cases = zip(golden["n"], golden["c"], golden["k"], strict=True)
    ours = [pass_at_k(int(n), int(c), int(k)) for n, c, k in cases]
    np.testing.assert_allclose(ours, golden["unbiased"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 64, 200])
def test_against_exact_fractions(n):
    for c in {0, 1, n // 2, n - 1, n}:
        for k in {1, n // 3 + 1, n}:
            exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
            assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-12)


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 1, 1, 0.25),  # Pass@1 is the share of right ones
        (4, 1, 2, 0.5),  # 1 - C(3, 2) / C(4, 2)
        (4, 2, 2, 5 / 6),
        (4, 0, 4, 0.0),
        (4, 1, 4, 1.0),  # all four are looked at
        (4, 3, 2, 1.0),  # of two, at most one is wrong
        (10_000, 1, 1, 1e-4),  # C(10000, 5000) has no float
        (10_000, 1, 5_000, 0.5),
    ],
)
def test_by_hand(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1), (4, 2, -1)])
def test_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


# --- Evaluation


def evaluation(correct: list[list[int]], name: str = "bench") -> Evaluation:
    array = np.array(correct, bool)
    length = np.arange(array.size, dtype=np.int32).reshape(array.shape)
    return Evaluation(name, tuple(f"p{i}" for i in range(len(array))), array.shape[1], array, length, length % 4 == 0)


def random_evaluation(problems: int, seed: int = 0) -> Evaluation:
    rng = np.random.default_rng(seed)
    return evaluation(rng.random((problems, 8)) < rng.random((problems, 1)))


def test_pass_at_is_the_mean_over_problems():
    # Two, one and no right one of four.
    mean, _, _ = evaluation([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).pass_at(2)
    assert mean == pytest.approx((5 / 6 + 1 / 2 + 0) / 3)


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("problems", [2, 30])
def test_the_interval_holds_the_mean_and_stays_within_0_and_1(problems, k):
    for seed in range(5):
        mean, low, high = random_evaluation(problems, seed).pass_at(k)
        assert 0 <= low <= mean <= high <= 1


def test_the_interval_has_the_width_that_the_scores_say():
    evaluation = random_evaluation(400)
    mean, low, high = evaluation.pass_at(1)
    error = evaluation.correct.mean(axis=1).std() / math.sqrt(400)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.3 * error)


def test_equal_scores_have_no_interval():
    assert evaluation([[1, 0], [0, 1], [1, 0]]).pass_at(1) == (0.5, 0.5, 0.5)


def test_the_interval_is_the_same_each_time():
    np.random.seed(1)  # the global state must not matter
    first = random_evaluation(20).pass_at(4)
    np.random.seed(2)
    assert random_evaluation(20).pass_at(4) == first


def test_k_above_the_samples_is_refused():
    with pytest.raises(ValueError, match="k=9"):
        random_evaluation(3).pass_at(9)


def test_metrics_have_the_names_that_reports_read():
    metrics = evaluation([[1, 0], [0, 0]], name="aime24").metrics([1, 2])
    assert set(metrics) == {
        f"eval/aime24/{key}"
        for key in ("pass@1", "pass@1_low", "pass@1_high", "pass@2", "pass@2_low", "pass@2_high",
                    "length_mean", "truncated_fraction", "dropped")
    }  # fmt: skip
    assert metrics["eval/aime24/pass@1"] == 0.25
    assert metrics["eval/aime24/pass@2"] == 0.5
    assert metrics["eval/aime24/length_mean"] == 1.5  # 0, 1, 2, 3
    assert metrics["eval/aime24/truncated_fraction"] == 0.25
    assert all(type(value) is float for value in metrics.values())  # JSON takes no numpy numbers


def test_problems_that_were_too_long_count_as_wrong():
    short = [[1, 1, 0, 0], [1, 1, 1, 1]]
    whole, part = evaluation([*short, [0, 0, 0, 0], [0, 0, 0, 0]]), evaluation(short)
    part = dataclasses.replace(part, dropped=("p2", "p3"))
    for k in (1, 2, 4):
        assert part.pass_at(k) == whole.pass_at(k)  # the interval, too
    assert part.right_counts == {"p0": 2, "p1": 4, "p2": 0, "p3": 0}
    assert part.metrics([1])["eval/bench/dropped"] == 2.0
    assert part.metrics([1])["eval/bench/length_mean"] == 3.5  # of those that were sampled
    assert evaluation(short).metrics([1])["eval/bench/dropped"] == 0.0
    allowed = dataclasses.replace(part, allow_dropped=True)
    assert allowed.pass_at(1) == evaluation(short).pass_at(1)
    assert allowed.right_counts == {"p0": 2, "p1": 4}
    assert allowed.metrics([1])["eval/bench/dropped"] == 2.0


# --- table


def test_table_of_one_benchmark():
    lines = table([evaluation([[1, 0], [1, 1]])], [1, 2]).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert cells[0] == ["benchmark", "problems", "samples", "Pass@1", "Pass@2", "mean tokens", "truncated", "no answer"]
    assert set("".join(cells[1])) == {"-"}
    assert cells[2] == ["bench", "2", "2", "75.0 (50.0 to 100.0)", "100.0 (100.0 to 100.0)", "2", "25.0%", ""]
    assert len(cells) == 3


def test_table_ends_with_the_mean_of_the_benchmarks():
    # Each benchmark counts the same, however many problems it has.
    one, other = evaluation([[1, 1]], "one"), evaluation([[0, 0], [0, 0], [0, 1]], "other")
    last = [cell.strip() for cell in table([one, other], [1]).splitlines()[-1].strip("|").split(" | ")]
    assert last == ["mean", "", "", f"{100 * (1 + 1 / 6) / 2:.1f}", "", "", ""]


@pytest.mark.parametrize(("allowed", "problems", "score"), [(False, "3", "50.0"), (True, "2", "75.0")])
def test_table_shows_how_many_were_dropped(allowed, problems, score):
    some = evaluation([[1, 0], [1, 1]], "some")
    some = dataclasses.replace(some, dropped=("x",), allow_dropped=allowed)
    lines = table([some, evaluation([[1, 1]], "none")], [1]).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert cells[0][-1] == "dropped"
    assert (cells[2][1], cells[2][3].split()[0], cells[2][-1]) == (problems, score, "1")
    assert (cells[3][1], cells[3][-1]) == ("1", "0")
    assert cells[4][3] == f"{(float(score) + 100) / 2:.1f}"


def test_the_papers_layout_has_a_column_for_each_benchmark():
    one, other = evaluation([[1, 1]], "one"), evaluation([[0, 0], [0, 0], [0, 1]], "other")
    cells = [
        [c.strip() for c in line.strip("|").split(" | ")] for line in wide_table([one, other], [1, 2]).splitlines()
    ]
    assert cells[0] == ["", "one", "other", "mean"]
    assert cells[2] == ["Avg@2", "100.0", "16.7", "58.3"]
    assert cells[3] == ["Pass@2", "100.0", "33.3", "66.7"]
