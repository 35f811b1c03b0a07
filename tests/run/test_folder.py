"""The run folder: one owner, one config, nothing half written, nothing of others touched."""

import dataclasses
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_jax.config import Config, ConfigError, dump_config
from dynamo_jax.run import folder as module
from dynamo_jax.run.folder import RunFolder, Status, write_atomic

HOLD = """
import os, sys, time
from dynamo_jax.run.folder import RunFolder
folder = RunFolder(sys.argv[1])
if os.fork() == 0:  # a worker that outlives its parent
    print("held", flush=True)
    os.close(1)
    time.sleep(10)
    os._exit(0)
time.sleep(30)
"""


def config(path: Path, **changes: object) -> Config:
    return dataclasses.replace(Config(run_dir=str(path)), **changes)


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_makes_the_folder_and_leaves_only_the_lock(tmp_path):
    with RunFolder(tmp_path / "a" / "b") as folder:
        assert [p.name for p in folder.path.iterdir()] == [".lock"]
        assert folder.checkpoints == tmp_path / "a" / "b" / "checkpoints"


def test_import_needs_no_jax():
    code = "import sys, dynamo_jax.run.folder; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_config_is_written_once_and_compared_afterwards(tmp_path):
    with RunFolder(tmp_path) as folder:
        assert folder.check_or_write_config(config(tmp_path)) is False
        text = folder.config_path.read_text()
        assert folder.check_or_write_config(config(tmp_path)) is True
        assert folder.config_path.read_text() == text == dump_config(config(tmp_path))


def test_config_that_changes_the_result_is_refused_with_each_difference(tmp_path):
    old = config(tmp_path)
    new = dataclasses.replace(old, seed=7, optimizer=dataclasses.replace(old.optimizer, learning_rate=1e-6))
    with RunFolder(tmp_path) as folder:
        folder.check_or_write_config(old)
        (tmp_path / "checkpoints" / "0").mkdir(parents=True)
        before = snapshot(tmp_path)
        with pytest.raises(ConfigError, match=r"optimizer.learning_rate: 0.0005 -> 1e-06; seed: 0 -> 7") as caught:
            folder.check_or_write_config(new)
        assert "run_dir" in str(caught.value)
        assert "put the values back" in str(caught.value)
        assert snapshot(tmp_path) == before


def test_config_may_be_corrected_before_the_first_checkpoint(tmp_path):
    old = config(tmp_path)
    new = dataclasses.replace(old, seed=7)
    with RunFolder(tmp_path) as folder:
        folder.check_or_write_config(old)
        (tmp_path / "checkpoints").mkdir()
        folder.check_or_write_config(new)
        assert folder.config_path.read_text() == dump_config(new)


def test_free_keys_take_their_new_values(tmp_path):
    old = config(tmp_path)
    new = dataclasses.replace(old, trainer=dataclasses.replace(old.trainer, steps=300))
    with RunFolder(tmp_path) as folder:
        folder.check_or_write_config(old)
        assert folder.check_or_write_config(new) is True
        assert folder.config_path.read_text() == dump_config(new)


@pytest.mark.parametrize("content", [b"", b"a: [1", b"\xff\xfe", b"model: x\n"])
def test_unreadable_config_is_an_error_and_stays(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config.yaml: .*another run_dir"):
        RunFolder(tmp_path)
    assert snapshot(tmp_path) == {"config.yaml": content}


def test_foreign_folder_is_refused_and_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "figures").mkdir()
    with pytest.raises(ConfigError, match=r"is not empty \(figures, thesis.tex\)"):
        RunFolder(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures", "thesis.tex"]


def test_goes_on_after_a_kill_before_the_config_was_written(tmp_path):
    for name in (".lock", ".tmp-config.yaml", ".tmp-probe"):
        (tmp_path / name).write_text("partial")
    with RunFolder(tmp_path) as folder:
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
        assert folder.check_or_write_config(config(tmp_path)) is False


@pytest.mark.parametrize("parts", [("file",), ("file", "below")])
def test_path_that_is_or_goes_through_a_file(tmp_path, parts):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"cannot be written: (File exists|Not a directory)\. .*another run_dir"):
        RunFolder(tmp_path.joinpath(*parts))
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_full_disk_is_seen_before_any_work(tmp_path, monkeypatch):
    with RunFolder(tmp_path) as folder:
        folder.check_or_write_config(config(tmp_path))
        text = folder.config_path.read_text()
    monkeypatch.setattr(module.os, "fsync", full_disk)
    with pytest.raises(ConfigError, match=r"cannot be written: No space left on device\. Free space"):
        RunFolder(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == text
    monkeypatch.undo()
    RunFolder(tmp_path).close()  # the lock was given back


def test_read_only_file_system(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(module.os, "open", refuse)
    with pytest.raises(ConfigError, match="Read-only file system"):
        RunFolder(tmp_path)


def test_write_atomic_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a.txt", "old")
    monkeypatch.setattr(module.os, "fsync", full_disk)
    with pytest.raises(ConfigError, match=r"a.txt: cannot be written: No space left"):
        write_atomic(tmp_path / "a.txt", "new")
    assert snapshot(tmp_path) == {"a.txt": b"old"}


def test_write_atomic_to_a_full_device(tmp_path):
    (tmp_path / ".tmp-a.txt").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="No space left"):
        write_atomic(tmp_path / "a.txt", "text")
    assert snapshot(tmp_path) == {}


def test_second_process_is_refused_until_the_first_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"in use by process {holder.pid} on host {socket.gethostname()}"):
            RunFolder(tmp_path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    RunFolder(tmp_path).close()  # although the killed process left a forked worker behind


def status(path: Path) -> dict[str, object]:
    return json.loads((path / "status.json").read_text())


def test_status_is_refreshed_now_and_then(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    (tmp_path / "config.yaml").write_text(dump_config(config(tmp_path)))
    with RunFolder(tmp_path) as folder, Status(folder, 9, stopped=()) as running:
        whole = {"state": "running", "step": 0, "steps": 9, "message": "", "host": socket.gethostname()}
        assert status(tmp_path) == whole | {"pid": os.getpid()}
        running.update(1)
        assert status(tmp_path)["step"] == 0
        running.update(2, now=True)
        assert status(tmp_path)["step"] == 2
        clock[0] += 60
        running.update(3)
        assert status(tmp_path)["step"] == 3
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("complete", 3)
    with RunFolder(tmp_path) as folder, Status(folder, 12, stopped=()):
        assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("running", 3)


@pytest.mark.parametrize(("error", "state"), [(OSError("the  bucket"), "stopped"), (KeyError(), "failed")])
def test_status_ends_with_the_reason(tmp_path, monkeypatch, caplog, error, state):
    (tmp_path / "config.yaml").write_text(dump_config(config(tmp_path)))

    def failing() -> None:
        with RunFolder(tmp_path) as folder, Status(folder, 9, stopped=(OSError,)):
            raise error

    with pytest.raises(type(error)):
        failing()
    assert (status(tmp_path)["state"], status(tmp_path)["message"]) == (
        state,
        "the bucket" if error.args else "KeyError",
    )

    def failing_on_a_full_disk() -> None:
        with RunFolder(tmp_path) as folder, Status(folder, 9, stopped=(OSError,)):
            monkeypatch.setattr(module.os, "fsync", full_disk)
            raise error

    with pytest.raises(type(error)):
        failing_on_a_full_disk()
    assert "status.json: cannot be written: No space left" in caplog.text
