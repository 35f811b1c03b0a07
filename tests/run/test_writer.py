"""The newest rollout files are kept, whatever a killed run left."""

import json
from pathlib import Path

import numpy as np
import pytest

from dynamo_jax.batch import Pool, PromptBatch, Rollouts
from dynamo_jax.run.writer import RolloutFiles, sample_lines


def names(folder: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (folder / "rollouts").iterdir())


def test_each_sample_is_of_its_own_prompt():
    slots = np.arange(2, dtype=np.int32)
    prompts = PromptBatch(slots, slots[:, None], slots, ("a", "b"), ("1+1", "2+2"), ("2", "4"))
    rollouts = Rollouts(np.zeros((4, 3), np.int32), np.array([1, 2, 3, 3]), np.array([True, True, True, False]), None)
    reward_R, none = np.float32([0.25, 1, 0, 0.5]), np.zeros(4, np.float32)
    pool = Pool(prompts, np.array([1, 0, 0, 1]), rollouts, reward_R > 0.4, reward_R, none - 1, none[:2])
    lines = sample_lines(7, pool, np.array([0, 3]), ["four", "vier\u00e4"])
    assert "\u00e4" in lines
    first, second = map(json.loads, lines.splitlines())
    assert first == {
        "step": 7, "rollout": 0, "prompt_id": "b", "prompt": "2+2", "text": "four", "answer": "4", "right": False,
        "reward": 0.25, "length": 1, "ended": True,
    }  # fmt: skip
    assert (second["rollout"], second["text"], second["right"], second["ended"]) == (3, "vier\u00e4", True, False)
    assert sample_lines(7, pool, np.array([], int), []) == ""


@pytest.mark.parametrize(
    ("keep", "left"), [(None, list(range(1, 8))), (3, [5, 6, 7]), (1, [7]), (100, list(range(1, 8)))]
)
def test_newest_files_are_kept(tmp_path, keep, left):
    files = RolloutFiles(tmp_path, keep)
    files.write(0, "")
    for step in range(1, 8):
        files.write(step, f"{step}\n")
        assert len(names(tmp_path)) <= (keep or 8)
    assert names(tmp_path) == left
    assert (tmp_path / "rollouts" / "step_000007.jsonl").read_text() == "7\n"


def test_resumed_run_counts_what_is_there(tmp_path):
    for step in range(1, 8):
        RolloutFiles(tmp_path, None).write(step, "old")
    files = RolloutFiles(tmp_path, 4)
    files.write(6, "new")  # steps 6 and 7 are done again
    assert names(tmp_path) == [4, 5, 6, 7][-4:]
    files.write(7, "new")
    files.write(8, "new")
    assert names(tmp_path) == [5, 6, 7, 8]
    assert (tmp_path / "rollouts" / "step_000006.jsonl").read_text() == "new"


def test_folder_is_listed_once(tmp_path, monkeypatch):
    files = RolloutFiles(tmp_path, 2)
    files.write(1, "1")
    monkeypatch.setattr(Path, "glob", lambda *_: pytest.fail("listed again"))
    files.write(2, "2")
    files.write(3, "3")
    monkeypatch.undo()
    assert names(tmp_path) == [2, 3]
