"""The newest rollout files are kept, whatever a killed run left."""

from pathlib import Path

import pytest

from dynamo_jax.run.writer import RolloutFiles


def names(folder: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (folder / "rollouts").iterdir())


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
