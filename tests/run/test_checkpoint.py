"""Checkpoints: what is kept, what a kill or a damage leaves, other meshes, donated arrays, errors of the writer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dynamo_jax.run import checkpoint as checkpoint_module
from dynamo_jax.run import checkpoint_files
from dynamo_jax.run.checkpoint import Checkpointer, CheckpointError, resolve_checkpoint
from dynamo_jax.run.checkpoint_files import written
from dynamo_jax.run.metrics import read_metrics

KILLS = 10

# A training loop that is killed and started again: arguments FOLDER KILLS. The parent imports jax but starts no
# backend, so that each forked run starts in milliseconds.
TRAIN_AND_KILL = """
import os
import random
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from dynamo_jax.run.checkpoint import Checkpointer
from dynamo_jax.config import Config, resolved
from dynamo_jax.run.metrics import MetricsLog
from dynamo_jax.run.folder import RunFolder

STEPS, EVERY = 80, 3


def train(path: Path, pause: float) -> None:
    config = Config(run_dir=str(path))
    with RunFolder(path) as folder:
        folder.check_or_write_config(config)
        checkpointer = Checkpointer(folder.checkpoints, keep=2)
        state = {"x": jnp.arange(2000, dtype=jnp.float32), "step": jnp.int32(0)}
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
        update = jax.jit(lambda s: {"x": s["x"] * 0.99 + s["step"], "step": s["step"] + 1}, donate_argnums=0)
        resume, host = checkpointer.latest(), {"sum": 0.0}
        if resume is not None:
            state, host = checkpointer.restore(resume, abstract)
        metrics = MetricsLog(path, resume, tensorboard=False, config=resolved(config))
        total = host["sum"]
        for step in range((resume or 0) + 1, STEPS + 1):
            state = update(state)
            mean = float(state["x"].mean())
            total += mean
            time.sleep(pause)
            metrics.write(step, {"mean": mean, "sum": total, "step_seen": state["step"]})
            if step % EVERY == 0 or step == STEPS:
                metrics.sync()
                checkpointer.save(step, state, {"sum": total}, score=-abs(step - 20.0))
        metrics.close()
        checkpointer.close()


def lines(path: Path) -> int:
    file = path / "metrics.jsonl"
    return file.read_bytes().count(b"\\n") if file.exists() else 0


def main(path: Path, kills: int) -> None:
    # Each kill falls a random number of steps and milliseconds after the last one, so that on a fast machine the run
    # does not end before the last kill: at most 5 steps and 2 or 3 more in 0.05 s, ten times, are fewer than STEPS.
    chance = random.Random(0)
    for _ in range(kills):
        enough = lines(path) + chance.randint(0, 5)
        child = os.fork()
        if child == 0:
            train(path, pause=0.02)
            os._exit(1)  # the run ended before its kill
        while lines(path) < enough and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            sys.exit(f"a run ended before its kill: {status}")
    train(path, pause=0.0)


main(Path(sys.argv[1]), int(sys.argv[2]))
"""


class State(NamedTuple):
    params: Any
    optimizer: Any
    statistics: jax.Array
    step: jax.Array
    key: jax.Array
    raw_key: jax.Array


def mesh(shape: tuple[int, int, int]) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("data", "fsdp", "tensor"))


def shard(tree: Any, on: Mesh) -> Any:
    """Abstract leaves, matrices split over fsdp and tensor."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec("fsdp", "tensor") if len(leaf.shape) == 2 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(on, spec))

    return jax.tree.map(one, tree)


def make_state(on: Mesh, seed: int = 0) -> State:
    params = {
        "layers": {"w": jax.random.normal(jax.random.key(seed), (16, 32))},
        "bias": jnp.arange(6, dtype=jnp.bfloat16) / 3,
    }
    optimizer = optax.adamw(1e-3).init(params)
    state = State(
        params, optimizer, jnp.arange(5, dtype=jnp.int32), jnp.int32(seed), jax.random.key(7), jax.random.PRNGKey(8)
    )
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, shard(state, on)))


def small(value: float = 1.0) -> dict[str, jax.Array]:
    return {"w": jnp.full((40, 50), value) + jax.random.normal(jax.random.key(0), (40, 50)), "n": jnp.int32(3)}


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with the checkpoints of steps 1 and 2, to be copied and damaged."""
    path = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpointer(path, keep=2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, small(step), {"position": step}, score=0.1 * step)
    return path


def test_every_kind_of_leaf_on_other_meshes_bit_for_bit(tmp_path):
    state = make_state(mesh((2, 2, 2)))
    host = {"position": {"epoch": 1, "offset": 17}, "best": 0.5, "fingerprint": "abc"}
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        assert checkpointer.save(3, state, host, score=0.5) is True
        on_one, host_back = checkpointer.restore(3, shard(state, mesh((1, 1, 1))))
        assert host_back == host
        assert_equal(on_one, state)
        assert {d for leaf in jax.tree.leaves(on_one) for d in leaf.sharding.device_set} == {jax.devices()[0]}
        checkpointer.save(4, on_one, host)
        target = shard(state, mesh((2, 2, 2)))
        on_eight, _ = checkpointer.restore(4, target)
        assert_equal(on_eight, state)
        same = jax.tree.map(lambda x, to: x.sharding.is_equivalent_to(to.sharding, x.ndim), on_eight, target)
        assert jax.tree.all(same)
        assert checkpointer.restore_host(4) == host
        part, _ = checkpointer.restore(4, {"params": abstract(state.params)}, partial=True)
        assert_equal(part, {"params": state.params})


def test_keeps_the_last_ones_and_the_best(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: 0.3, 4: None, 5: float("nan"), 6: 0.4, 7: 0.9, 8: 0.1, 9: 0.2}
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert (checkpointer.latest(), checkpointer.best(), checkpointer.steps()) == (None, None, [])
        for step, score in scores.items():
            checkpointer.save(step, small(step), {"step": step}, score)
            checkpointer.wait()
            assert folders(tmp_path) == [str(s) for s in checkpointer.steps()]
            if step == 6:
                assert checkpointer.steps() == [2, 5, 6]
                assert checkpointer.best() == 2
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.steps() == [7, 8, 9]
        assert (checkpointer.latest(), checkpointer.best()) == (9, 7)  # of equal scores the newest
        assert_equal(checkpointer.restore(7, abstract(small()))[0], small(7))


def test_a_score_that_comes_after_the_save_counts_as_one_that_came_with_it(tmp_path):
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        for step, score in {1: 0.2, 2: 0.9, 3: 0.3, 4: None, 5: float("nan"), 6: 0.4}.items():
            checkpointer.save(step, small(step), {"step": step})
            checkpointer.wait()
            before = written(tmp_path / str(step))
            checkpointer.add_score(step, score)
            assert written(tmp_path / str(step)) == before  # what was sampled from it may be gone on with
        assert (checkpointer.steps(), checkpointer.best()) == ([2, 6], 2)
        checkpointer.add_score(5, 1.0)  # it is not there any more
        checkpointer.add_score(6, 0.4)  # once more, as after a kill
        assert folders(tmp_path) == ["2", "6"]
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(7, small(7), {})
        checkpointer.wait()
        assert (checkpointer.steps(), checkpointer.best()) == ([2, 7], 2)
        assert_equal(checkpointer.restore(2, abstract(small()))[0], small(2))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_arrays_donated_right_after_save(tmp_path, shape):
    sharding = NamedSharding(mesh(shape), PartitionSpec("fsdp", "tensor"))
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {"w": jax.device_put(jax.random.normal(jax.random.key(0), (2048, 1024)), sharding)}
    before = np.array(state["w"], copy=True)
    host = {"list": [1]}
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, state, host)
        for _ in range(3):
            state = update(state)
        host["list"].append(2)
        jax.block_until_ready(state)
        restored, host = checkpointer.restore(1, abstract(state))
    assert np.array_equal(np.asarray(restored["w"]), before)
    assert host == {"list": [1]}


def test_saving_a_step_again_is_a_no_op_and_an_older_one_an_error(saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / "c")
    with Checkpointer(path, keep=2) as checkpointer:
        assert checkpointer.save(2, small(9), {}) is False
        with pytest.raises(CheckpointError, match="3: the host data is not JSON"):
            checkpointer.save(3, small(), {"array": np.ones(2)})
        assert_equal(checkpointer.restore(2, abstract(small()))[0], small(2))
    shutil.rmtree(path / "1")
    with (
        Checkpointer(path, keep=2) as checkpointer,
        pytest.raises(CheckpointError, match=r"1: is older than .* step 2"),
    ):
        checkpointer.save(1, small(), {})


def test_goes_on_from_the_one_before_after_the_newest_is_deleted(saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / "c")
    shutil.rmtree(path / "2")
    with Checkpointer(path, keep=2) as checkpointer:
        assert checkpointer.latest() == 1
        assert checkpointer.save(2, small(5), {"again": True}) is True
        state, host = checkpointer.restore(2, abstract(small()))
    assert_equal(state, small(5))
    assert host == {"again": True}


def test_leftovers_of_killed_saves_and_removals_go_at_the_start(saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / "c")
    shutil.copytree(path / "2", path / "3.orbax-checkpoint-tmp")
    shutil.copytree(path / "1", path / ".deleted" / "0")
    with Checkpointer(path, keep=2, read_only=True) as checkpointer:
        assert checkpointer.steps() == [1, 2]
    assert folders(path) == [".deleted", "1", "2", "3.orbax-checkpoint-tmp"]  # reading alone removes nothing
    with Checkpointer(path, keep=2) as checkpointer:
        assert checkpointer.steps() == [1, 2]
        checkpointer.save(3, small(3), {})
    assert folders(path) == ["2", "3"]


def test_read_only_saves_and_creates_nothing(tmp_path):
    with Checkpointer(tmp_path / "none", keep=2, read_only=True) as checkpointer:
        assert checkpointer.latest() is None
        with pytest.raises(CheckpointError, match="opened to read only"):
            checkpointer.save(1, small(), {})
    assert not (tmp_path / "none").exists()


def file_names(root: Path) -> list[Path]:
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


def attempt(path: Path) -> str | None:
    """The error of restoring step 2, or None where it comes back exactly."""
    try:
        with Checkpointer(path, keep=2, read_only=True) as checkpointer:
            state, host = checkpointer.restore(2, abstract(small()))
    except CheckpointError as error:
        return str(error)
    assert_equal(state, small(2))
    assert host == {"position": 2}
    return None


def spoil(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "delete":
        file.unlink()
        return
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :] if content else b""
    file.write_bytes({"empty": b"", "half": content[:middle], "flip": flipped}[how])


HOW = ["delete", "empty", "half", "flip"]


@pytest.mark.parametrize("how", HOW)
def test_damage_is_one_paragraph_and_reading_deletes_nothing(saved, tmp_path, how, capfd):
    """Each file of a checkpoint in turn: an error that names folder, reason and remedy, or the exact state."""
    refused = 0
    for index, name in enumerate(file_names(saved / "2")):
        path = shutil.copytree(saved, tmp_path / str(index))
        spoil(path / "2" / name, how)
        before = folders(path)
        message = attempt(path)
        if message is not None:
            refused += 1
            assert str(path / "2") in message
            assert "Delete the folder" in message
            assert "\n" not in message
        assert folders(path) == before
    assert refused >= len(file_names(saved / "2")) - 2  # the two at the top are orbax's own notes
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("how", ["delete", "flip"])
def test_damaged_newest_is_moved_aside_and_the_one_before_goes_on(saved, tmp_path, how, caplog, capfd):
    """Each file of the newest checkpoint in turn."""
    fallen = 0
    for index, name in enumerate(file_names(saved / "2")):
        path = shutil.copytree(saved, tmp_path / str(index) / "checkpoints")
        spoil(path / "2" / name, how)
        caplog.clear()
        with caplog.at_level("WARNING", "dynamo_jax"), Checkpointer(path, keep=2) as checkpointer:
            step, state, host = checkpointer.restore_newest(abstract(small()))
            assert_equal(state, small(step))
            assert host == {"position": step}
            if step == 2:
                assert not caplog.records
                continue
            fallen += 1
            assert folders(path) == ["1"]
            aside = path.parent / "checkpoints_damaged"
            assert folders(aside) == ["2"]
            message = "\n".join(record.getMessage() for record in caplog.records)
            for part in (f"{path / '2'}: is damaged: ", f"Moved to {aside}/", "goes on from step 1"):
                assert message.count(part) == 1
            assert checkpointer.save(2, small(2), {"position": 2})
        assert attempt(path) is None
    assert fallen >= len(file_names(saved / "2")) - 2
    assert "Traceback" not in capfd.readouterr().err


def test_no_sound_checkpoint_is_said_loudly_and_damaged_ones_do_not_pile_up(saved, tmp_path, caplog):
    path = shutil.copytree(saved, tmp_path / "checkpoints")
    shutil.copytree(path / "1", tmp_path / "checkpoints_damaged" / "0")  # of an earlier start
    for step in (1, 2):
        spoil(path / str(step) / "files.json", "half")
    with caplog.at_level("WARNING", "dynamo_jax"), Checkpointer(path, keep=2) as checkpointer:
        assert checkpointer.restore_newest(abstract(small())) is None
    assert folders(path) == []
    assert folders(tmp_path / "checkpoints_damaged") == ["1", "2"]
    assert [r.getMessage().count("THE RUN STARTS ANEW") for r in caplog.records] == [1]


def test_older_checkpoint_whose_score_cannot_be_read_does_not_end_the_run(saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / "checkpoints")
    (path / "1" / "metrics" / "metrics").write_text('{"score"')
    with pytest.raises(CheckpointError, match=r"1: is damaged: the file metrics/metrics .* Delete the folder"):
        Checkpointer(path, keep=2, read_only=True)
    with Checkpointer(path, keep=2) as checkpointer:
        assert (checkpointer.steps(), checkpointer.best()) == ([2], 2)
    assert folders(tmp_path / "checkpoints_damaged") == ["1"]


def test_empty_step_folder_and_missing_step(saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / "c")
    (path / "5").mkdir()
    with Checkpointer(path, keep=2, read_only=True) as checkpointer:
        assert checkpointer.latest() == 5
        with pytest.raises(CheckpointError, match=r"c/5: is damaged: the file files.json cannot be read"):
            checkpointer.restore_host(5)
        with pytest.raises(CheckpointError, match=r"c/4: no such checkpoint. There are steps \[1, 2, 5\]"):
            checkpointer.restore(4, abstract(small()))


def test_damage_that_only_orbax_sees_is_wrapped(saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / "c")
    shutil.rmtree(path / "2" / "state" / "d")
    (path / "2" / "files.json").write_text("{}")
    with Checkpointer(path, keep=2) as checkpointer:
        with pytest.raises(CheckpointError, match=r"c/2: cannot be read: .*Delete the folder") as caught:
            checkpointer.restore(2, abstract(small()))
        assert len(str(caught.value)) < 700
        step, state, _ = checkpointer.restore_newest(abstract(small()))
    assert step == 1
    assert_equal(state, small(1))
    assert folders(tmp_path / "c_damaged") == ["2"]


def test_other_structure_shape_or_dtype_names_the_arrays(saved):
    target = abstract(small())
    with Checkpointer(saved, keep=2, read_only=True) as checkpointer:
        other = {"w": jax.ShapeDtypeStruct((40, 51), jnp.bfloat16), "n": target["n"], "extra": target["n"]}
        with pytest.raises(CheckpointError) as caught:
            checkpointer.restore(1, other)
        assert "extra is nothing in the checkpoint, int32[] in this run" in str(caught.value)
        assert "w is float32[40, 50] in the checkpoint, bfloat16[40, 51] in this run" in str(caught.value)
        with pytest.raises(CheckpointError, match=r"n is int32\[\] in the checkpoint, nothing in this run"):
            checkpointer.restore(1, {"w": target["w"]})


def test_checkpoint_of_another_model_is_an_error_and_stays(saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / "c")
    other = {"w": jax.ShapeDtypeStruct((40, 51), jnp.float32)}
    with (
        Checkpointer(path, keep=2) as checkpointer,
        pytest.raises(CheckpointError, match="2: was saved from another model"),
    ):
        checkpointer.restore_newest(other)
    assert folders(path) == ["1", "2"]


def test_error_of_the_background_writer_surfaces_once_on_save_or_close(tmp_path, monkeypatch, capfd):
    def full(*_: object) -> list[int]:
        raise OSError(28, "No space left on device")

    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, small(), {})
    checkpointer.wait()
    monkeypatch.setattr(checkpoint_files, "_fingerprint", full)
    checkpointer.save(2, small(), {})
    with pytest.raises(CheckpointError, match=r"2: cannot be written: OSError: .*No space left.* Free space"):
        checkpointer.save(3, small(), {})
    assert checkpointer.steps() == [1]
    monkeypatch.undo()
    checkpointer.save(3, small(), {})
    checkpointer.wait()
    assert folders(tmp_path)[-1] == "3"
    monkeypatch.setattr(checkpoint_files, "_fingerprint", full)
    checkpointer.save(4, small(), {})
    with pytest.raises(CheckpointError, match="4: cannot be written"):
        checkpointer.close()
    assert "Traceback" not in capfd.readouterr().err


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: cannot be opened: .*Free space or permit"):
        Checkpointer(tmp_path / "file", keep=1)


def test_resolve_checkpoint(saved, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(saved, run / "checkpoints")
    checkpoints = run / "checkpoints"
    assert resolve_checkpoint(run) == (checkpoints, 2)
    assert resolve_checkpoint(str(checkpoints)) == (checkpoints, 2)
    assert resolve_checkpoint(checkpoints / "1") == (checkpoints, 1)
    monkeypatch.chdir(checkpoints / "1")
    assert resolve_checkpoint(".") == (checkpoints, 1)
    numbered = tmp_path / "7"
    shutil.copytree(run, numbered)  # a run folder may have a number as its name
    assert resolve_checkpoint(numbered) == (numbered / "checkpoints", 2)
    (tmp_path / "empty").mkdir()
    for name, what in (("empty", "holds no checkpoint"), ("missing", "no such folder")):
        with pytest.raises(CheckpointError, match=rf"{what}\. Give a run folder"):
            resolve_checkpoint(tmp_path / name)


def test_killed_ten_times_while_saving_and_writing(tmp_path):
    """The driver forks a training loop and kills it at random moments, then lets it end."""
    package = str(Path(checkpoint_module.__file__).parents[2])
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": package}
    command = [sys.executable, "-c", TRAIN_AND_KILL]
    arguments = [str(tmp_path / "killed"), str(KILLS)]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    subprocess.run([*command, str(tmp_path / "whole"), "0"], env=environment, check=True, capture_output=True)
    killed, whole = ((tmp_path / run / "metrics.jsonl").read_bytes() for run in ("killed", "whole"))
    assert killed == whole
    assert [line["step"] for line in read_metrics(tmp_path / "killed" / "metrics.jsonl")] == list(range(1, 81))
