"""metrics.jsonl across kills, TensorBoard, W&B, the progress bar and the log."""

import errno
import json
import logging
import math
import os
import sys
import threading
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.run import metrics as metrics_module
from dynamo_jax.run.metrics import MetricsLog, ProgressBar, read_metrics, setup_logging
from dynamo_jax.run.storage import StorageError


def log(folder: Path, resume_step: int | None = None, **options: object) -> MetricsLog:
    return MetricsLog(folder, resume_step, tensorboard=False, **options)


def fill(folder: Path, steps: range, resume_step: int | None = None) -> bytes:
    writer = log(folder, resume_step)
    for step in steps:
        writer.write(step, {"reward/mean": step / 7, "allocation/max": step})
    writer.close()
    return (folder / "metrics.jsonl").read_bytes()


@pytest.fixture
def package_logger():
    logger = logging.getLogger("dynamo_jax")
    saved = logger.handlers[:], logger.level, logger.propagate
    yield logger
    logger.handlers[:], logger.level, logger.propagate = saved


def test_line_holds_the_step_first_and_plain_numbers(tmp_path):
    writer = log(tmp_path)
    values = {"z": np.float32(0.5), "b": jnp.bfloat16(2), "a": jnp.int32(3), "i": 4, "f": 0.1, "one": np.ones((1,))}
    writer.write(0, values)
    writer.close()
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 0, "a": 3, "b": 2.0, "f": 0.1, "i": 4, "one": 1.0, "z": 0.5}\n'


def test_not_finite_is_null_and_said_once(tmp_path, caplog):
    writer = log(tmp_path)
    with caplog.at_level(logging.WARNING, "dynamo_jax"):
        for step in range(3):
            writer.write(step, {"loss": math.nan, "kl": jnp.float32(jnp.inf), "ok": 1.0})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[2] == {"step": 2, "kl": None, "loss": None, "ok": 1.0}
    assert [record.getMessage()[:13] for record in caplog.records] == ["kl is inf at ", "loss is nan a"]


@pytest.mark.parametrize("value", ["0.5", None, np.ones(2), [1.0]])
def test_value_that_is_no_number(tmp_path, value):
    writer = log(tmp_path)
    with pytest.raises(ValueError, match=r"'reward/mean'.*not a single number"):
        writer.write(1, {"reward/mean": value})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("steps", [(2,), (0, 2), (1, 1), (0, 1, 0), (-1,)])
def test_steps_must_be_consecutive(tmp_path, steps):
    writer = log(tmp_path)
    for step in steps[:-1]:
        writer.write(step, {})
    with pytest.raises(ValueError, match=f"step {steps[-1]} after"):
        writer.write(steps[-1], {})
    writer.close()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("tail", [b"", b'{"step": 9', b"\x00\x00"])
@pytest.mark.parametrize("resume", [None, 0, 1, 4, 8])
def test_resumed_file_equals_the_uninterrupted_one(tmp_path, first, tail, resume):
    (tmp_path / "whole").mkdir()
    whole = fill(tmp_path / "whole", range(first, 12))
    fill(tmp_path, range(first, 9))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    if first == 1 and resume == 0:
        assert fill(tmp_path, range(1, 12), resume) == whole  # a checkpoint of step 0, before the first line
    else:
        assert fill(tmp_path, range(first if resume is None else resume + 1, 12), resume) == whole
    assert not list(tmp_path.glob(".tmp-*"))


def test_kept_lines_stay_byte_for_byte(tmp_path):
    odd = b'{"b": 1,  "step":0}\n{"step": 1, "x": 1.50}\n'
    (tmp_path / "metrics.jsonl").write_bytes(odd + b'{"step": 2}\n')
    log(tmp_path, 1).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == odd


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"metrics.jsonl: is empty, but .* is of step 3"),
        (None, r"metrics.jsonl: is empty, but .* is of step 3"),
        (b'{"step": 1}\n{"step": 2}\n', r"ends after step 2, but the checkpoint to resume from is of step 3"),
        (b'{"step": 1}\n{"step": 2}\n{"step": 3}', r"ends after step 2"),
        (b'{"step": 1}\n{"step": 3}\n', r"metrics.jsonl:2: step 3 after step 1: a line is missing"),
        (b'{"step": 2}\n{"step": 3}\n', r"metrics.jsonl:1: step 2 at the start"),
        (b'{"step": 1}\n{"st\n{"step": 3}\n', r"metrics.jsonl:2: not valid JSON"),
        (b'{"step": 1}\n[2]\n', r"metrics.jsonl:2: not an object"),
        (b'{"step": 1}\n{"step": 1}\n', r"metrics.jsonl:2: step 1 after step 1"),
    ],
)
def test_missing_or_broken_line_before_the_checkpoint(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        log(tmp_path, 3)
    assert "another run_dir" in str(caught.value)
    assert content is None or (tmp_path / "metrics.jsonl").read_bytes() == content


def test_full_disk_names_the_file(tmp_path):
    writer = log(tmp_path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._file)
    os.close(full)
    with pytest.raises(ValueError, match=r"metrics.jsonl: cannot be written: No space left on device"):
        writer.write(1, {"a": 1})


def test_nearly_full_disk_takes_a_part_of_a_line(tmp_path, monkeypatch):
    writer = log(tmp_path)
    writer.write(1, {"a": 1})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    real = os.write

    def short(descriptor: int, data: bytes) -> int:
        if len(data) < 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(metrics_module.os, "write", short)
    with pytest.raises(ValueError, match="No space left"):
        writer.write(2, {"a": 2})
    monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_bytes() > whole
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    log(tmp_path, 1).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_line_that_failed_half_way_is_whole_after_the_next_try(tmp_path, monkeypatch):
    """Cut anywhere, and the tries after it fail, too."""
    whole = fill(tmp_path, range(4))
    (tmp_path / "again").mkdir()
    writer = log(tmp_path / "again")
    real = os.write
    for step in range(4):
        room = [5 + step]  # bytes left on the disk

        def short(descriptor: int, data: bytes, room: list[int] = room) -> int:
            if not room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = real(descriptor, data[: room[0]])
            room[0] -= taken
            return taken

        values = {"reward/mean": step / 7, "allocation/max": step}
        with monkeypatch.context() as context:
            context.setattr(metrics_module.os, "write", short)
            for _ in range(2):
                with pytest.raises(StorageError, match="No space left"):
                    writer.write(step, values)
        if step == 2:
            writer.sync()
        writer.write(step, values)
    writer.close()
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == whole


def test_lines_lost_by_a_failed_sync_are_written_again(tmp_path, monkeypatch):
    """Linux drops the pages that it could not write, and says that all is well when asked again."""
    writer = log(tmp_path)
    writer.write(1, {"a": 1})
    writer.sync()
    writer.write(2, {"a": 2})
    size = (tmp_path / "metrics.jsonl").stat().st_size

    def failing(descriptor: int) -> None:
        os.ftruncate(descriptor, 25)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as context:
        context.setattr(metrics_module.os, "fsync", failing)
        with pytest.raises(StorageError, match=r"metrics.jsonl: cannot be written: Input/output error"):
            writer.sync()
    writer.sync()
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
    writer.write(3, {"a": 3})
    writer.close()
    assert [line["a"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_close_after_a_failure_does_not_hide_it(tmp_path, monkeypatch, caplog):
    def failing(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(metrics_module.os, "fsync", failing)
    with pytest.raises(KeyError), caplog.at_level(logging.WARNING, "dynamo_jax"), log(tmp_path):
        raise KeyError
    assert "Input/output error" in caplog.text
    with pytest.raises(StorageError), log(tmp_path):
        pass


def test_tensorboard_on_a_full_disk_is_one_warning(tmp_path, monkeypatch, caplog):
    """Its own thread would die of it, and the eleventh event would wait for ever."""
    writer = MetricsLog(tmp_path, None)
    writer.write(0, {"a": 0})
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        if threading.current_thread() is threading.main_thread():
            return real(descriptor, data)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics_module.os, "write", full)
    with caplog.at_level(logging.WARNING, "dynamo_jax"):
        for step in range(1, 40):
            writer.write(step, {"a": step})
        writer.sync()
        writer.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 40
    assert ["TensorBoard gets no more events" in record.getMessage() for record in caplog.records] == [True]


def test_read_metrics_errors_name_file_and_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(ValueError, match=r"metrics.jsonl: cannot be read: No such file"):
        read_metrics(path)
    path.write_bytes(b'{"step": 1}\nx\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not valid JSON"):
        read_metrics(path)


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    for resume, steps in ((None, range(1, 6)), (3, range(4, 8))):
        writer = MetricsLog(tmp_path, resume)
        for step in steps:
            writer.write(step, {"reward/mean": step})
        writer.sync()
        writer.close()
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) == 2
    shown: list[int] = []
    for file in files:
        data = file.read_bytes()  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == SessionLog.START:
                shown = [step for step in shown if step < event.step]  # what TensorBoard does on such an event
            elif event.summary.value:
                shown.append(event.step)
    assert shown == list(range(1, 8))


def test_wandb_missing_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"logging.wandb_project = 'p'.*pip install wandb"):
        log(tmp_path, wandb_project="p")


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    calls: list[dict] = []
    rows: list[tuple] = []

    def init(**options: object) -> types.SimpleNamespace:
        calls.append(options)
        return types.SimpleNamespace(log=lambda row, step: rows.append((step, row)), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for resume, step in ((None, 1), (1, 2)):
        writer = log(tmp_path, resume, wandb_project="p", config={"seed": 1}, run_name="r")
        writer.write(step, {"a": 1.0})
        writer.close()
    assert calls[0] == calls[1]
    assert calls[0]["id"] == (tmp_path / "wandb_id").read_text()
    assert (calls[0]["project"], calls[0]["resume"], calls[0]["config"]) == ("p", "allow", {"seed": 1})
    assert rows == [(1, {"a": 1.0}), (2, {"a": 1.0})]


@pytest.mark.parametrize(("there", "last"), [(2, 2), (3, 3), (5, 3)])
def test_the_line_of_the_checkpoint_itself_may_be_missing(tmp_path, there, last):
    with MetricsLog(tmp_path, None, tensorboard=False) as log:
        for step in range(there + 1):
            log.write(step, {"a": step})
    with MetricsLog(tmp_path, 3, may_lack=True, tensorboard=False) as log:
        assert log.last == last
        if log.last == 2:
            log.write(3, {"a": 3})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"ends after step 3, but the checkpoint to resume from is of step 5"):
        MetricsLog(tmp_path, 5, may_lack=True, tensorboard=False)


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, caplog):
    clock = [100.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: clock[0])
    with caplog.at_level(logging.INFO, "dynamo_jax"):
        progress = ProgressBar(20, initial=10)
        for step in range(11, 21):
            clock[0] += 1.0
            progress.update(step, {"reward": "0.500", "tokens/s": "1234"})
        progress.close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "step 11/20: reward 0.500, tokens/s 1234, time left 00:09"
    assert [line.split(":")[0] for line in lines] == ["step 11/20", "step 16/20", "step 20/20"]


def test_progress_of_something_before_the_run_says_what(monkeypatch, caplog):
    clock = [100.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: clock[0])
    with caplog.at_level(logging.INFO, "dynamo_jax"), ProgressBar(40, what="warm-up") as progress:
        for step in range(1, 41):
            clock[0] += 0.25
            progress.update(step)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["warm-up, step 20/40: time left 00:05", "warm-up, step 40/40: time left 00:00"]


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = ProgressBar(3)
    for step in (1, 2, 3):
        progress.update(step, {"reward": f"{step / 10:.3f}", "held-out": "0.500"})
    progress.close()
    text = capsys.readouterr().err
    assert "3/3" in text
    assert "reward=0.300, held-out=0.500" in text


def test_progress_switched_off_says_nothing(caplog, capsys):
    with caplog.at_level(logging.INFO, "dynamo_jax"):
        progress = ProgressBar(1, enabled=False)
        progress.update(1, {"reward": "1.000"})
        progress.close()
    assert not caplog.records
    assert capsys.readouterr().err == ""


def test_logging_on_process_0_only_and_once(package_logger, capsys):
    setup_logging(0)
    setup_logging(0).info("hello")
    captured = capsys.readouterr()
    assert captured.err.endswith(" INFO hello\n")
    assert captured.err.count("hello") == 1
    assert captured.out == ""
    setup_logging(3).error("from process 3")
    assert capsys.readouterr().err == ""


def test_json_lines_are_strict(tmp_path):
    fill(tmp_path, range(3))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
