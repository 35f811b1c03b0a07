"""A bucket as run folder, on a fake of Google Cloud Storage that gcsfs, tensorstore and orbax really talk to."""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from buckets import gcs_of_module, hasty, in_bucket, machine, quick_locks  # noqa: F401 - two are fixtures
from fake_gcs import FakeGCS

from dynamo_jax.config import ConfigError
from dynamo_jax.run import bucket_folder
from dynamo_jax.run.bucket import filesystem, locations
from dynamo_jax.run.bucket_folder import Lease, Mirror, open_run_folder
from dynamo_jax.run.checkpoint import Checkpointer, resolve_checkpoint
from dynamo_jax.run.storage import StorageError, TemporaryFailure

pytestmark = pytest.mark.usefixtures("quick")


# --- checkpoints


def tree(value: float) -> dict[str, jax.Array]:
    return {"w": jnp.full((30, 40), value)}


def test_damaged_checkpoint_in_a_bucket_is_moved_aside(gcs: FakeGCS, caplog: pytest.LogCaptureFixture) -> None:
    place = locations("gs://bucket/damaged").checkpoints
    with Checkpointer(place, keep=3) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, tree(step), {"step": step}, score=0.1)
    newest = "bucket/damaged/checkpoints/3/"
    name = next(name for name in gcs.names(newest + "state/d/"))
    gcs.objects[name] = (gcs.objects[name][0][:-1] + b"!", 10**6)
    del gcs.objects["bucket/damaged/checkpoints/2/host/metadata"]
    with caplog.at_level(logging.WARNING, "dynamo_jax"), Checkpointer(place, keep=3) as checkpointer:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree(0))
        found = checkpointer.restore_newest(abstract)
        assert found is not None
        step, state, host = found
        assert (step, host) == (1, {"step": 1})
        np.testing.assert_array_equal(state["w"], tree(1)["w"])
        assert checkpointer.steps() == [1]
        checkpointer.save(2, tree(2), {"step": 2})
    (record,) = [record for record in caplog.records if record.name == "dynamo_jax"]
    for part in ("3: is damaged: the content", "2: is damaged: the file host/metadata is missing", "from step 1"):
        assert part in record.getMessage()
    aside = {name.split("/")[3] for name in gcs.names("bucket/damaged/checkpoints_damaged/")}
    assert aside == {"2", "3"}
    assert resolve_checkpoint("gs://bucket/damaged/checkpoints/2") == (place, 2)


def test_bucket_that_does_not_answer_is_no_damage(gcs: FakeGCS, monkeypatch: pytest.MonkeyPatch) -> None:
    hasty(monkeypatch)
    place = locations("gs://bucket/unreachable").checkpoints
    with Checkpointer(place, keep=3) as checkpointer:
        checkpointer.save(1, tree(1), {})
    gcs.fail(requests=6, match="GET /download.*files.json")
    with pytest.raises(StorageError, match=r"checkpoints: cannot be changed: HttpError: .* 503"):
        Checkpointer(place, keep=3)
    with Checkpointer(place, keep=3) as checkpointer:
        assert checkpointer.latest() == 1


# --- what is refused before any work


def test_run_dirs_that_cannot_be(monkeypatch: pytest.MonkeyPatch, gcs: FakeGCS) -> None:
    for run_dir, why in (
        ("s3://b/x", "only gs://"),
        ("gs://bucket", "names no folder"),
        ("gs:///x", "names no folder"),
    ):
        with pytest.raises(ConfigError, match=f"run_dir = {run_dir}: .*{why}"):
            locations(run_dir)
    filesystem.cache_clear()
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "gcsfs", None)
        with pytest.raises(ConfigError, match=r"pip install 'dynamo_jax\[gcs\]'"):
            locations("gs://bucket/x")
    local = locations("runs/x")
    assert local == (Path("runs/x"), Path("runs/x/checkpoints"), "runs/x/xla_cache")
    remote = locations("gs://bucket/runs/x/")
    assert (str(remote.checkpoints), remote.xla_cache) == (
        "gs://bucket/runs/x/checkpoints",
        "gs://bucket/runs/x/xla_cache",
    )
    assert remote.work == locations("gs://bucket/runs/x").work != locations("gs://bucket/other/x").work


def test_foreign_folder_in_a_bucket_is_refused_and_not_touched(
    gcs: FakeGCS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, tmp_path)
    gcs.objects["bucket/foreign/thesis.tex"] = (b"years of work", 1)
    with pytest.raises(ConfigError, match=r"gs://bucket/foreign: is not empty \(thesis.tex\).*nothing was touched"):
        open_run_folder("gs://bucket/foreign", 0.0)
    assert in_bucket(gcs, "bucket/foreign") == {"thesis.tex": b"years of work"}


# --- the lock and the mirror


def test_bucket_is_the_truth_and_the_lock_is_one(gcs: FakeGCS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, tmp_path / "a")
    url = "gs://bucket/shared"
    with open_run_folder(url, 0.0) as folder:
        folder.write_atomic("config.yaml", "run_dir: x\ntrainer: {}\n")
        assert "config.yaml" in in_bucket(gcs, "bucket/shared")
        (folder.path / "rollouts").mkdir()
        (folder.path / "rollouts" / "1").write_text("one")
        machine(monkeypatch, tmp_path / "b")
        with pytest.raises(ConfigError, match=f"{url}: is in use by process {os.getpid()} on host"):
            open_run_folder(url, 0.0)
        machine(monkeypatch, tmp_path / "a")
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):  # this machine's own lock
            open_run_folder(url, 0.0)
    assert sorted(in_bucket(gcs, "bucket/shared")) == ["config.yaml", "rollouts/1"]
    (folder.path / "rollouts" / "2").write_text("of a run that the bucket knows nothing of")
    with open_run_folder(url, 0.0) as folder:
        assert [path.name for path in (folder.path / "rollouts").iterdir()] == ["1"]


def test_run_that_lost_its_lock_stops_writing(gcs: FakeGCS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, tmp_path / "a")
    folder = open_run_folder("gs://bucket/lost", 0.0)
    folder.write_atomic("config.yaml", "x")
    gcs.objects["bucket/lost/.lock"] = (json.dumps({"token": "t", "pid": 7, "host": "other"}).encode(), 10**6)
    folder._lease._thread.join(5)  # until it has seen that
    with pytest.raises(TemporaryFailure, match="taken over by process 7 on host other"):
        folder.sync()
    (folder.path / "new").write_text("x")
    with pytest.raises(TemporaryFailure):
        folder.close()
    assert sorted(in_bucket(gcs, "bucket/lost")) == [".lock", "config.yaml"]


@pytest.fixture
def memory() -> Any:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    return fs


def test_lock_of_a_dead_process_is_taken_over_and_one_of_a_live_one_not(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Lease(memory, "memory://run/.lock")
    monkeypatch.setattr(bucket_folder, "DEAD_SECONDS", 60.0)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=f"memory://run: is in use by process {os.getpid()}"):
        Lease(memory, "memory://run/.lock")
    assert time.monotonic() - began < 50  # it is seen alive long before its time is over
    first._ended.set()  # as a kill does: the file stays
    first._thread.join()
    monkeypatch.setattr(bucket_folder, "DEAD_SECONDS", 0.5)
    began = time.monotonic()
    second = Lease(memory, "memory://run/.lock")
    assert time.monotonic() - began >= 0.5
    second._ended.set()
    second._thread.join()
    monkeypatch.setattr(bucket_folder, "DEAD_SECONDS", 60.0)
    began = time.monotonic()
    third = Lease(memory, "memory://run/.lock", ours=lambda token: token == second.token)
    assert time.monotonic() - began < 50
    third.release()
    assert not memory.exists("memory://run/.lock")


def test_of_two_that_take_over_a_lock_one_gives_in(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe_file("memory://run/.lock", json.dumps({"token": "dead", "pid": 1, "host": "gone"}).encode())
    sleep = time.sleep

    def overtaken(seconds: float) -> None:
        if seconds == bucket_folder.SETTLE_SECONDS:
            memory.pipe_file("memory://run/.lock", json.dumps({"token": "b", "pid": 2, "host": "faster"}).encode())
        sleep(seconds)

    monkeypatch.setattr(bucket_folder.time, "sleep", overtaken)
    with pytest.raises(ConfigError, match="in use by process 2 on host faster"):
        Lease(memory, "memory://run/.lock")


def test_mirror_uploads_what_changed_and_deletes_what_went(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[str] = []
    pipe = memory.pipe_file
    monkeypatch.setattr(
        memory, "pipe_file", lambda url, data: (uploads.append(url.rpartition("/")[2]), pipe(url, data))
    )
    (tmp_path / "rollouts").mkdir()
    for name in ("metrics.jsonl", "rollouts/1", "rollouts/2", ".lock", ".tmp-x", ".lease"):
        (tmp_path / name).write_text("one")
    mirror = Mirror(memory, "memory://run", tmp_path)
    mirror.sync()
    assert sorted(uploads) == ["1", "2", "metrics.jsonl"]
    mirror.sync()
    assert len(uploads) == 3
    stat = (tmp_path / "metrics.jsonl").stat()
    (tmp_path / "new").write_text("two")
    os.utime(tmp_path / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # within the clock's tick, and of equal size
    os.replace(tmp_path / "new", tmp_path / "metrics.jsonl")
    (tmp_path / "rollouts" / "1").unlink()
    pipe("memory://run/rollouts/0", b"not ours to delete")
    mirror.sync()
    assert uploads[3:] == ["metrics.jsonl"]
    assert memory.cat_file("memory://run/metrics.jsonl") == b"two"
    assert sorted(memory.find("memory://run")) == ["/run/metrics.jsonl", "/run/rollouts/0", "/run/rollouts/2"]


def test_mirror_fetches_all_but_what_is_large(memory: Any, tmp_path: Path) -> None:
    names = ["config.yaml", "rollouts/1", "checkpoints/1/x", "checkpoints_damaged/1/x", "xla_cache/x", "tensorboard/x"]
    for name in [*names, ".lock"]:
        memory.pipe_file(f"memory://run/{name}", name.encode())
    (tmp_path / "old").mkdir()
    for name in ("old/file", "metrics.jsonl", ".lock"):
        (tmp_path / name).write_text("of another attempt")
    mirror = Mirror(memory, "memory://run", tmp_path)
    mirror.fetch([*names, ".lock"])
    files = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"config.yaml": "config.yaml", "rollouts/1": "rollouts/1", ".lock": "of another attempt"}


def test_mirror_goes_on_after_a_failure(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = Mirror(memory, "memory://run", tmp_path)
    (tmp_path / "a").write_text("1")

    def failing(*_: object) -> None:
        raise RuntimeError("503")

    with monkeypatch.context() as context:
        context.setattr(memory, "pipe_file", failing)
        with pytest.raises(StorageError, match=r"memory://run/a: the bucket cannot be used: RuntimeError: 503"):
            mirror.sync()
    mirror.sync()
    assert memory.cat_file("memory://run/a") == b"1"
