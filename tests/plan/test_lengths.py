"""Lengths of prompts and responses: the distribution that is promised, where they are read from, what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dynamo_jax.config import load_config
from dynamo_jax.plan.lengths import SIGMA, Lengths, read_lengths

ROOT = Path(__file__).resolve().parents[2]
RECIPE = load_config(ROOT / "configs" / "qwen2.5_math_1.5b.yaml")  # prompts up to 1,024, responses up to 3,072


@pytest.mark.parametrize("mean", [20, 900, 2000, 3000])
def test_the_mean_after_the_cut_is_what_was_asked(mean):
    responses = Lengths(150, mean, 3072, "").responses(8192)
    assert responses.mean() == pytest.approx(mean, rel=2e-3)
    assert responses.min() >= 1
    assert responses.max() <= 3072
    free = np.log(responses[responses < 3072])
    if mean <= 900:  # of more, much is cut
        assert np.std(free) == pytest.approx(SIGMA, abs=0.1)


def test_responses_at_the_limit_are_all_of_that_length():
    lengths = Lengths(150, 64, 64, "")
    assert set(lengths.responses(10)) == {64}
    assert lengths.longest(10) == 64


def test_totals_are_prompts_and_responses_in_no_order():
    lengths = Lengths(150, 900, 3072, "")
    totals = lengths.totals(512)
    assert sorted(totals) == sorted(lengths.responses(512) + 150)
    assert 0 < np.mean(np.diff(totals) > 0) < 1
    assert np.array_equal(totals, lengths.totals(512))


def test_the_longest_of_many_is_what_a_draw_gives():
    """Of 20,000 draws from the distribution itself, in groups of 16 and of 1,024."""
    lengths, draw = Lengths(150, 900, 3072, ""), np.random.default_rng(0)
    for count in (1, 16, 256):
        drawn = lengths.median * np.exp(SIGMA * draw.standard_normal((4000, count)))
        longest = np.clip(np.rint(drawn), 1, 3072).max(axis=1)
        assert lengths.longest(count) == pytest.approx(longest.mean(), rel=0.02)


def test_without_lengths_rows_are_full_and_that_is_said():
    lengths = read_lengths(None, RECIPE)
    assert set(lengths.totals(5)) == {4096}
    assert str(lengths).endswith("(all of this length): the recipe's limits, as --lengths is not given")


def test_means():
    assert dataclasses.astuple(read_lengths("response=900,prompt=150", RECIPE))[:3] == (150, 900, 3072)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt=150", "the mean of response is missing"),
        ("prompt=150,answer=3", "'answer=3' is not one of prompt=MEAN and response=MEAN"),
        ("prompt=150,prompt=3", "'prompt=3' is not one of"),
        ("prompt=150,response=many", "response = 'many' is not a number of tokens of at least 1"),
        ("prompt=150,response=-3", "response = '-3' is not a number"),
        ("prompt=nan,response=3", "prompt = 'nan' is not a number"),
        ("prompt=1e999,response=3", "prompt = '1e999' is not a number"),
        ("prompt=1025,response=900", r"above the recipe's limit task.max_prompt_tokens = 1024. Give a mean of at most"),
        ("prompt=150,response=3073", r"response = 3073 .* limit rollout.max_tokens = 3072"),
        ("no/folder", "is neither a folder nor means"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_remedy(text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_lengths(text, RECIPE)
    assert "--lengths" in str(error.value)
    assert "Give " in str(error.value)


def line(step, **more):
    return json.dumps({"step": step, **more}) + "\n"


def test_a_run_tells_its_newest_lengths(tmp_path):
    old = "".join(line(n, **{"rollout/length_mean": 3000, "rollout/prompt_length_mean": 9}) for n in range(1, 9))
    new = "".join(line(n, **{"rollout/length_mean": 500 + n, "rollout/prompt_length_mean": 80}) for n in range(9, 19))
    (tmp_path / "metrics.jsonl").write_text(line(0, **{"policy/parameters": 3}) + old + new)
    lengths = read_lengths(str(tmp_path), RECIPE)
    assert (lengths.prompt, lengths.response) == (80, 513.5)
    assert lengths.source == f"the run {tmp_path}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is no JSON"),
        (
            '{"step": 1, "rollout/prompt_length_mean": 5, "rollout/length_mean": null}\n',
            "no step .* rollout/length_mean",
        ),
        ('{"step": 1, "rollout/length_mean": 5}\n', "no step .* has rollout/prompt_length_mean"),
        ('{"rollout/length_mean": 5000, "rollout/prompt_length_mean": 5}', "response = 5000 .the run .* is above"),
    ],
)
def test_a_run_that_does_not_tell(tmp_path, text, message):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_lengths(str(tmp_path), RECIPE)
