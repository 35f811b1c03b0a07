"""What a run settles at its first start, and what stands in for it where an older version has started the run."""

import datetime
import os
from pathlib import Path

import pytest
from buckets import gcs_of_module, hasty, quick_locks  # noqa: F401 - two are fixtures
from fake_gcs import FakeGCS

from dynamo_jax.config import ConfigError
from dynamo_jax.run.agreement import start_of_process_0
from dynamo_jax.run.start import READING, START_NAME, Start, start_in, start_of_evaluation, start_of_run
from dynamo_jax.run.storage import TemporaryFailure

MOMENT = datetime.datetime(2026, 2, 28, 23, 59, 58)


def of_today(start: Start) -> bool:
    return abs(datetime.datetime.now() - start.now) < datetime.timedelta(minutes=1)


def test_what_is_kept_is_read_back(tmp_path: Path) -> None:
    for start in (Start(MOMENT), Start(MOMENT, reading=1)):
        (tmp_path / START_NAME).write_text(start.text())
        assert start_in(tmp_path, began=True) == start_in(tmp_path, began=False) == start


def test_a_new_run_starts_today(tmp_path: Path) -> None:
    start = start_in(tmp_path, began=False)
    assert of_today(start)
    assert start.reading == READING
    assert start.now.microsecond == 0  # what is not kept cannot be shown


def test_an_old_run_keeps_its_reading_and_the_day_of_its_config(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("run_dir: old")
    os.utime(config, (MOMENT.timestamp(),) * 2)
    assert start_in(tmp_path, began=True) == Start(MOMENT, reading=1)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"now": "yesterday", "reading": 2}', '{"now": "2026-02-28T00:00:00"}', "\xff",
             '{"now": 5, "reading": 2}', '{"now": "2026-02-28T00:00:00", "reading": 3}',
             '{"now": "2026-02-28T00:00:00", "reading": "2"}', '{"now": "2026-02-28T00:00:00+01:00", "reading": 2}'],
)  # fmt: skip
def test_a_file_that_says_nothing_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / START_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"started.json: cannot be read: .* Restore the file"):
        start_in(tmp_path, began=True)


def test_an_evaluation_starts_with_its_samples_then_with_its_run(tmp_path: Path) -> None:
    run, samples = tmp_path / "run", tmp_path / "samples"
    checkpoint = run / "checkpoints" / "12"
    for folder in (checkpoint, samples):
        folder.mkdir(parents=True)
    assert of_today(start_of_evaluation(samples, checkpoint))
    (samples / "aime24_n4.jsonl").touch()  # drawn by a version that kept no start
    assert start_of_evaluation(samples, checkpoint).reading == 1
    (run / "config.yaml").write_text("run_dir: run")
    (run / START_NAME).write_text(Start(MOMENT).text())
    for place in (run, checkpoint.parent, checkpoint):
        assert start_of_evaluation(samples, place) == Start(MOMENT)
    (run / START_NAME).unlink()  # an old run
    assert start_of_evaluation(samples, run).reading == 1
    (samples / START_NAME).write_text(Start(MOMENT).text())
    assert start_of_evaluation(samples, run) == start_of_evaluation(samples, tmp_path / "gone") == Start(MOMENT)


def test_the_processes_have_one_start() -> None:
    assert start_of_process_0(Start(MOMENT, reading=1)) == Start(MOMENT, reading=1)


def test_the_start_of_a_run_is_read_before_its_folder_is_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert of_today(start_of_run(str(run), 0.0))
    assert not run.exists()
    (run / "checkpoints" / "3").mkdir(parents=True)
    assert start_of_run(str(run), 0.0).reading == 1
    (run / START_NAME).write_text(Start(MOMENT).text())
    assert start_of_run(str(run), 0.0) == Start(MOMENT)
    (tmp_path / "file").touch()
    assert of_today(start_of_run(str(tmp_path / "file"), 0.0))  # refused when it is opened


@pytest.mark.usefixtures("quick")
def test_the_start_of_a_run_in_a_bucket(gcs: FakeGCS, monkeypatch: pytest.MonkeyPatch) -> None:
    hasty(monkeypatch)
    url = "gs://bucket/started"
    assert of_today(start_of_run(url, 0.0))
    gcs.objects["bucket/started/started.json"] = (Start(MOMENT).text().encode(), 1)
    assert start_of_run(url, 0.0) == Start(MOMENT)
    gcs.fail(requests=15, match="started.json")
    assert start_of_run(url, 60.0) == Start(MOMENT)
    gcs.fail(requests=99, match="started.json")
    with pytest.raises(TemporaryFailure, match="run_dir = gs://bucket/started"):
        start_of_run(url, 0.0)
