"""Runs whose storage or machine fails them. What they leave equals what an undisturbed run does."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from buckets import gcs_of_module, hasty, in_bucket, machine, quick_locks  # noqa: F401 - two are fixtures
from command_line import compiled_once, write_config  # noqa: F401 - a fixture of this module
from fake_gcs import FakeGCS

from dynamo_jax import cli
from dynamo_jax import trainer as loop
from dynamo_jax.run import bucket_folder, storage
from dynamo_jax.run.checkpoint import Checkpointer, resolve_checkpoint
from dynamo_jax.run.folder import Status
from dynamo_jax.run.metrics import read_metrics
from dynamo_jax.run.storage import TemporaryFailure
from dynamo_jax.run.writer import RolloutFiles, RunWriter

STEPS = 3


def train(folder: Path, *overrides: str, steps: int = STEPS) -> int:
    folder.mkdir(exist_ok=True)
    return cli.main(["train", str(write_config(folder)), f"trainer.steps={steps}", *overrides])


def result(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Everything that does not measure time."""
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    rollouts = [path.read_text() for path in sorted((folder / "run" / "rollouts").iterdir())]
    timeless = [{k: v for k, v in x.items() if not k.startswith("time/") and "per_second" not in k} for x in lines]
    return timeless, rollouts


def bucket_result(files: dict[str, bytes], folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    for name, data in files.items():
        path = folder / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return result(folder)


def status(folder: Path) -> tuple[str, int, str]:
    values = json.loads((folder / "run" / "status.json").read_text())
    assert (values["pid"], values["host"], values["steps"]) == (os.getpid(), socket.gethostname(), STEPS)
    return values["state"], values["step"], values["message"]


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the runs of a test warn of."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(lambda record: "devices" not in record.getMessage())  # the tests have eight, a run uses one
    logger = logging.getLogger("dynamo_jax")
    monkeypatch.setattr(loop, "setup_logging", lambda _: logger)
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[str]]:
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder) == 0
    return result(folder)


def test_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(
    whole: Any, tmp_path: Path, warnings: list[str]
) -> None:
    assert train(tmp_path, "checkpoint.keep=3", steps=2) == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    host = checkpoints / "2" / "host" / "metadata"
    host.write_bytes(host.read_bytes()[:-3])
    assert train(tmp_path) == 0
    assert result(tmp_path) == whole
    assert [("2: is damaged" in line, "goes on from step 1" in line) for line in warnings] == [(True, True)]
    assert [path.name for path in (tmp_path / "run" / "checkpoints_damaged").iterdir()] == ["2"]


class SmallDisk:
    """A file system of its own, which can be filled to the last byte and freed again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], capture_output=True).returncode:
            pytest.skip("a full disk needs the right to mount one")

    def fill(self) -> None:
        with open(self.path / "filler", "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)

    def free(self) -> None:
        (self.path / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", self.path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.close()


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between tries, which take no time here."""
    taken: list[float] = []

    def nap(seconds: float, stop: Callable[[], None]) -> None:
        stop()
        taken.append(seconds)

    monkeypatch.setattr(storage, "_sleep", nap)
    return taken


def before(monkeypatch: pytest.MonkeyPatch, kind: type, name: str, step: int, do: Callable[[], None]) -> None:
    """`do()` once, when the method is first called for `step`."""
    method, todo = getattr(kind, name), [do]

    def wrapped(self: Any, number: int, *arguments: Any, **options: Any) -> Any:
        if number == step and todo:
            todo.pop()()
        return method(self, number, *arguments, **options)

    monkeypatch.setattr(kind, name, wrapped)


def test_full_disk_is_waited_out_and_changes_nothing(
    whole: Any, disk: SmallDisk, naps: list[float], warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full to the last byte before the metrics of step 1, a checkpoint in between and the last one; freed each time."""
    before(monkeypatch, RunWriter, "write", 1, disk.fill)
    before(monkeypatch, Checkpointer, "save", 2, disk.fill)
    before(monkeypatch, Checkpointer, "save", STEPS, disk.fill)
    nap = storage._sleep
    ends: list[int] = []

    def freed(seconds: float, stop: Callable[[], None]) -> None:
        nap(seconds, stop)
        if seconds == 1.0:  # the second try
            ends.append(len(naps))
            disk.free()

    monkeypatch.setattr(storage, "_sleep", freed)
    assert train(disk.path, "logging.tensorboard=true") == 0
    assert result(disk.path) == whole
    assert len(ends) >= 2  # what a failed save leaves is removed, which may be enough for the next one
    tries = [line for line in warnings if "trying again in" in line]
    assert len(tries) == len(naps)
    assert all("No space left on device" in line for line in tries)
    names = sorted(path.name for path in (disk.path / "run" / "checkpoints").iterdir())
    assert names in (["0", "3"], ["1", "3"], ["2", "3"])  # those that failed are superseded, and leave nothing
    assert sum("TensorBoard gets no more events" in line for line in warnings) <= 1  # its thread may have been late


def test_disk_that_stays_full_ends_the_run_which_goes_on_later(
    whole: Any,
    disk: SmallDisk,
    naps: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as context:
        before(context, RolloutFiles, "write", 2, disk.fill)
        assert train(disk.path, "checkpoint.patience=5") == os.EX_TEMPFAIL
    assert re.search(r"step 2: failed for 5 s: .*No space left.* the same command goes on", capsys.readouterr().err)
    assert sum(naps) == 5
    disk.free()
    assert train(disk.path) == 0
    assert result(disk.path) == whole
    assert status(disk.path) == ("complete", STEPS, "all 3 steps are done")


def test_signal_ends_the_waiting_for_a_full_disk(
    disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        disk.fill()
        signal.setitimer(signal.ITIMER_REAL, 0.2)

    before(monkeypatch, Checkpointer, "save", 2, full)
    old = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        began = time.monotonic()
        assert train(disk.path) == 128 + signal.SIGTERM
        assert time.monotonic() - began < 20
    finally:
        signal.signal(signal.SIGALRM, old)
    assert "stopped by SIGTERM" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "state"), [(TemporaryFailure("the bucket"), "stopped"), (ValueError("the key"), "failed")]
)
def test_status_tells_a_run_to_start_again_from_one_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, state: str
) -> None:
    seen: list[tuple[str, int, str]] = []

    def stop(*_: object) -> None:
        seen.append(status(tmp_path))
        raise error

    monkeypatch.setattr(loop.Trainer, "run", stop)
    assert train(tmp_path) == (os.EX_TEMPFAIL if state == "stopped" else 2)
    assert seen == [("running", 0, "")]
    assert status(tmp_path) == (state, 0, str(error))


def test_a_checkpoint_that_fails_while_its_step_is_evaluated_is_written_again(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float]
) -> None:
    """Before the next step, and it gets its score."""
    write, failures = Checkpointer._write_files_list, iter([True])

    def failing(self: Checkpointer) -> None:
        if next(failures, False):
            raise OSError(5, os.strerror(5))
        write(self)

    monkeypatch.setattr(Checkpointer, "_write_files_list", failing)
    assert train(tmp_path, "checkpoint.keep=9") == 0
    assert result(tmp_path) == whole
    with Checkpointer(tmp_path / "run" / "checkpoints", keep=9, read_only=True) as checkpoints:
        assert checkpoints.steps() == [0, 1, 2, 3]
    assert all((tmp_path / "run" / "checkpoints" / step / "metrics" / "metrics").exists() for step in ("0", "3"))


def test_what_ends_a_run_that_hangs_tells_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog's way out and the one that knows `status.json` and the other processes are one."""
    statuses: list[int] = []

    def leave(exit_status: int) -> None:
        statuses.append(exit_status)
        raise TemporaryFailure("the process is gone")

    def hang(trainer: loop.Trainer, *_: object) -> None:
        seen.append(trainer.ending.peers)
        trainer.ending.hangs("step 7 has taken 1800 s")

    seen: list[object] = []
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(loop.Trainer, "run", hang)
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(Status, "end", lambda _, state, message: told.append((state, message)))
    train(tmp_path)
    assert told[0][0] == "stopped"
    assert "step 7 has taken 1800 s" in told[0][1]
    assert statuses == [os.EX_TEMPFAIL]


def test_other_held_out_prompts_are_refused_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same config, but a held-out file with other content."""
    assert train(tmp_path, steps=1) == 0
    before = result(tmp_path)
    build = loop.build_task

    def other(*given: Any) -> Any:
        task = build(*given)
        held_out = dataclasses.replace(task.evals[0], fingerprint="of other content")
        return dataclasses.replace(task, evals=(held_out,))

    monkeypatch.setattr(loop, "build_task", other)
    assert train(tmp_path) == 2
    assert "evaluated on other prompts" in capsys.readouterr().err
    assert result(tmp_path) == before


def newest_checkpoint(gcs: FakeGCS, run: str) -> int:
    """The step of the newest one that is whole; -1: there is none."""
    whole = re.compile(rf"{run}/checkpoints/(\d+)/commit_success.txt$")
    found = [whole.match(name) for name in gcs.names(run)]
    return max((int(match[1]) for match in found if match), default=-1)


@pytest.mark.usefixtures("quick")
def test_killed_run_goes_on_on_another_machine_and_is_read_from_there(
    whole: Any, gcs: FakeGCS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, Path("unused"))
    arguments = ["train", str(config), "run_dir=gs://bucket/runs/killed", "logging.tensorboard=true"]
    machine(monkeypatch, tmp_path / "first")
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "dynamo_jax", *arguments, "trainer.steps=1000"]
    process = subprocess.Popen(command, env={**os.environ, **cache})
    try:
        end = time.monotonic() + 600  # for one that hangs: on a busy machine the imports alone take minutes
        while newest_checkpoint(gcs, "bucket/runs/killed") < 2 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    saved = newest_checkpoint(gcs, "bucket/runs/killed")
    assert (process.returncode, saved >= 2) == (-signal.SIGKILL, True)
    steps = saved + 2  # the bucket may be at the last requests of the killed run, which may commit one more
    assert ".lock" in in_bucket(gcs, "bucket/runs/killed")

    machine(monkeypatch, tmp_path / "second")
    assert cli.main([*arguments, f"trainer.steps={steps}"]) == 0
    files = in_bucket(gcs, "bucket/runs/killed")
    lines, rollouts = bucket_result(files, tmp_path / "downloaded")
    assert [line["step"] for line in lines] == list(range(steps + 1))
    eval_names = {name for line in lines for name in line if name.startswith("eval/")}
    expected = [{k: v for k, v in line.items() if k not in eval_names} for line in whole[0]]
    assert [{k: v for k, v in line.items() if k not in eval_names} for line in lines[: STEPS + 1]] == expected
    assert rollouts[:STEPS] == whole[1]
    assert {"config.yaml", "report.html", "status.json"} <= files.keys()
    assert json.loads(files["status.json"])["state"] == "complete"
    assert ".lock" not in files
    assert len([name for name in files if name.startswith("tensorboard/")]) == 2
    committed = sorted(int(name.split("/")[1]) for name in files if name.endswith("s/commit_success.txt") or
                       (name.count("/") == 2 and name.endswith("/commit_success.txt")))  # fmt: skip
    assert committed[-1] == steps
    assert resolve_checkpoint("gs://bucket/runs/killed")[1] == steps

    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    run = "gs://bucket/runs/killed"
    assert cli.main(["eval", str(config), f"run_dir={run}", "--checkpoint", run, "--samples", "2", "--k", "1"]) == 0
    assert "heldout" in capsys.readouterr().out
    assert (tmp_path / "killed_eval" / f"step_{steps}" / "results.json").is_file()
    assert cli.main(["export", str(config), "--checkpoint", f"{run}/checkpoints", "--out", "exported"]) == 0
    assert (tmp_path / "exported" / "config.json").is_file()
    assert cli.main(["report", run, "--out", "page.html"]) == 0
    assert "killed" in (tmp_path / "page.html").read_text()


@pytest.mark.usefixtures("quick")
def test_bucket_that_fails_for_a_while_loses_nothing(
    whole: Any, gcs: FakeGCS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, tmp_path / "work")
    hasty(monkeypatch)
    monkeypatch.setattr(bucket_folder, "BEAT_SECONDS", 60.0)  # the lock is not what fails here
    failures: list[int] = []
    save = Checkpointer.save

    def failing(self: Checkpointer, step: int, *arguments: Any, **options: Any) -> bool:
        if step in (1, STEPS) and step not in failures:
            failures.append(step)
            if step == 1:
                gcs.fail(requests=7, match="uploadType=multipart")  # the mirror's
            else:
                gcs.fail(requests=6, match="files.json")  # in the background
        return save(self, step, *arguments, **options)

    monkeypatch.setattr(Checkpointer, "save", failing)
    tries: list[float] = []
    sleep = storage._sleep

    def counted(seconds: float, stop: Callable[[], None]) -> None:
        tries.append(seconds)
        sleep(0.05, stop)

    monkeypatch.setattr(storage, "_sleep", counted)
    config = write_config(tmp_path, Path("unused"))
    before = gcs.refused
    assert cli.main(["train", str(config), "run_dir=gs://bucket/runs/failing", f"trainer.steps={STEPS}"]) == 0
    assert gcs.refused - before == 13
    assert tries == [0.5, 0.5]
    files = in_bucket(gcs, "bucket/runs/failing")
    assert bucket_result(files, tmp_path / "downloaded") == whole
    assert "checkpoints/3/commit_success.txt" in files
    folders = {name.split("/")[1] for name in files if name.startswith("checkpoints/")}
    assert all(f"checkpoints/{folder}/commit_success.txt" in files for folder in folders)
