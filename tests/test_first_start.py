"""What a run settles at its first start holds to its end: the day that a template shows, and how files are read."""

import datetime
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import TINY
from small_tokenizer import save_tokenizer

from dynamo_jax import cli
from dynamo_jax.run.start import READING, START_NAME, Start

TEMPLATE = "[user] {{ strftime_now('%d') }} {{ messages[-1].content }} [assistant] "
PROBLEMS = [("1 + 1", "2"), ("1 + 2", "3"), ("1 + 1", "2"), ("2 + 1", '["3", "three"]')]

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture
def command(tmp_path: Path) -> Any:
    """Runs a command on a day of February 2024, with a config of a run on a file that holds a problem twice."""
    lines = [json.dumps({"problem": problem, "answer": answer}) for problem, answer in PROBLEMS]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    config = TINY | {
        "run_dir": str(tmp_path / "run"),
        "task": {
            "kind": "math", "train": [str(tmp_path / "data.jsonl")], "tokenizer": save_tokenizer(tmp_path, TEMPLATE),
            "max_prompt_tokens": 8, "reward": {"kind": "exact"},
        },
        "warmup": {},
        "rollout": {"prompts": 2, "per_prompt": 4, "max_tokens": 2},
        "trainer": {"steps": 1},
        "eval": {"every": 0, "samples": 1, "k": [1]},
        "checkpoint": {"every": 1, "notice_seconds": 1e6},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def run(day: int, name: str, *words: str, reading: int = READING) -> int:
        with pytest.MonkeyPatch.context() as context:
            context.setattr(Start, "today", lambda: Start(datetime.datetime(2024, 2, day, 23, 59), reading))
            return cli.main([name, str(tmp_path / "run.yaml"), *words])

    return run


def prompts(run: Path, step: int) -> list[dict[str, Any]]:
    lines = (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_that_passes_midnight_keeps_its_day(tmp_path, command):
    run, samples = tmp_path / "run", tmp_path / "run" / "eval" / "step_2"
    assert command(28, "train") == command(29, "train", "trainer.steps=2") == 0
    for step in (1, 2):
        assert {row["prompt"][:10] for row in prompts(run, step)} == {"[user] 28 "}
    words = ("--checkpoint", str(run), "--samples", "1", "--benchmark", str(tmp_path / "data.jsonl"))
    assert command(29, "eval", *words) == command(29, "eval", *words) == 0
    assert Start(datetime.datetime(2024, 2, 28, 23, 59)).text() == (samples / START_NAME).read_text()


def test_a_run_of_an_older_version_goes_on_with_its_prompts(tmp_path, command):
    """It read equal rows as prompts of their own, and lists as texts; it kept no start."""
    old = tmp_path / "run"
    assert command(28, "train", reading=1) == 0
    (old / START_NAME).unlink()
    os.utime(old / "config.yaml", (datetime.datetime(2024, 2, 28, 12).timestamp(),) * 2)
    assert command(29, "train", "trainer.steps=2") == 0
    rows = [row for step in (1, 2) for row in prompts(old, step)]
    assert len({row["prompt_id"] for row in rows}) == 4
    assert sum(row["prompt_id"].endswith("#2") for row in {row["prompt_id"]: row for row in rows}.values()) == 1
