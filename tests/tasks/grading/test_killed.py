"""The file of answers that cost a worker its life: the newest ones, of bounded size, on a disk or in a bucket."""

import json
from pathlib import Path

import pytest
from buckets import gcs_of_module, in_bucket  # noqa: F401 - one is a fixture
from fake_gcs import FakeGCS

from dynamo_jax.run.bucket import place
from dynamo_jax.tasks.grading import killed
from dynamo_jax.tasks.grading.killed import KEPT, MAX_BYTES, KilledFile


def add(file: KilledFile, *answers: str, gold: str = "1") -> None:
    for answer in answers:
        file.add(cause="crash", kind="math", gold=gold, answer=answer)


def answers(text: str | bytes) -> list[str]:
    return [json.loads(line)["answer"] for line in text.splitlines()]


def test_the_newest_are_kept_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "killed.jsonl"
    numbers = [str(n) for n in range(KEPT + 30)]
    add(KilledFile(path), *numbers[:20])
    assert answers(path.read_text()) == numbers[:20]
    add(KilledFile(str(path)), *numbers[20:])  # the run was started again
    assert answers(path.read_text()) == numbers[30:]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("letter", ["x", "\0", "é", "\U0001f600", "\ud800"])
def test_a_line_is_bounded_whatever_the_text(tmp_path: Path, letter: str) -> None:
    path = tmp_path / "killed.jsonl"
    add(KilledFile(path), letter * 10**6, gold=letter * 10**6)
    assert MAX_BYTES < path.stat().st_size <= 2 * 6 * MAX_BYTES + 100  # JSON writes \u0000 for one byte
    (answer,) = answers(path.read_text())
    assert set(answer) == {letter if letter != "\ud800" else "?"}
    assert len(answer.encode()) == MAX_BYTES // len(answer[0].encode()) * len(answer[0].encode())


def test_what_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(killed.log, "warning", lambda form, *values: said.append(form % values))
    file = KilledFile(tmp_path / "nowhere" / "killed.jsonl")
    add(file, "a")
    (warning,) = said
    assert warning.startswith(f"{tmp_path}/nowhere/killed.jsonl: cannot be written: FileNotFoundError")
    (tmp_path / "nowhere").mkdir()
    add(file, "b")
    assert answers((tmp_path / "nowhere" / "killed.jsonl").read_text()) == ["a", "b"]  # nothing is lost meanwhile


def test_in_a_bucket(gcs: FakeGCS) -> None:
    path = place("gs://bucket/killed_answers/killed_answers.1.jsonl")
    add(KilledFile(path), "a", "b")
    add(KilledFile(path), "c")
    files = in_bucket(gcs, "bucket/killed_answers")
    assert list(files) == ["killed_answers.1.jsonl"]
    assert answers(files["killed_answers.1.jsonl"]) == ["a", "b", "c"]
