"""Several processes on loopback, as several hosts: the same run as one process makes, whoever is lost on the way."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import TINY, Coin, Run, timeless
from small_runs import run as run_here
from small_runs import write_config as write

from dynamo_jax import cli
from dynamo_jax.config import load_config

pytestmark = pytest.mark.usefixtures("compiled_once")

STEPS = 10
MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
SECONDS = 240  # of any process; far beyond what one takes


class Job:
    """The processes of one run, or of another command on its folder, four CPU devices each."""

    def __init__(
        self, config: Path, folder: Path, count: int, *more: str, command: str = "train", **environment: str
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
        self.folder, self.processes, self.logs = folder, [], []
        for index in range(count):
            log = folder.parent / f"{folder.name}.{port}.{index}.log"
            variables = {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
                "DYNAMO_JAX_HOST_NAME": f"host{index}",
                "XLA_FLAGS": " ".join(flags),
            }
            words = [command, str(config), f"run_dir={folder}", *more]
            program = [sys.executable, str(Path(__file__).with_name("several.py")), *words]
            everything = {**os.environ, **variables, **environment}
            with open(log, "wb") as file:
                self.processes.append(subprocess.Popen(program, stdout=file, stderr=file, env=everything))
            self.logs.append(log)

    def until(self, step: int) -> None:
        """Wait until the line of `step` is there."""
        self._wait(lambda: len(lines(self.folder)) > step)

    def statuses(self) -> list[int]:
        self._wait(lambda: all(process.poll() is not None for process in self.processes))
        return [process.returncode for process in self.processes]

    def said(self, process: int) -> str:
        return self.logs[process].read_text(errors="replace")

    def _wait(self, done: Callable[[], bool]) -> None:
        until = time.monotonic() + SECONDS
        while not done():
            if time.monotonic() > until:
                for process in self.processes:
                    process.kill()
                pytest.fail("\n".join(self.said(i)[-3000:] for i in range(len(self.logs))))
            time.sleep(0.02)


def lines(folder: Path) -> list[bytes]:
    try:
        return (folder / "metrics.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return []


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name] == pytest.approx(y[name], abs=1e-5, rel=1e-5), f"step {x['step']}: {name}"


@pytest.fixture(scope="module")
def whole(compiled_once: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ten steps of one process on one device, without interruption."""
    return run_here(tmp_path_factory.mktemp("whole") / "run", f"trainer.steps={STEPS}")


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Job, float]:
    """Two processes of four devices. One is killed, both start again, one of them gets a SIGTERM. Seconds to notice."""
    folder = tmp_path_factory.mktemp("two") / "run"
    config = write(folder, trainer=TINY["trainer"] | {"steps": STEPS})
    first = Job(config, folder, 2, *MESH, PAUSE="0.2")
    first.until(3)
    first.processes[1].kill()
    began = time.monotonic()
    first.statuses()
    seconds = time.monotonic() - began
    second = Job(config, folder, 2, *MESH, PAUSE="0.2")
    second.until(6)
    second.processes[1].send_signal(signal.SIGTERM)
    second.statuses()
    return first, second, seconds


def test_the_loss_of_a_process_ends_the_others_with_its_name(lost: tuple[Job, Job, float]) -> None:
    first, _, seconds = lost
    assert first.statuses() == [os.EX_TEMPFAIL, -signal.SIGKILL]
    assert "process 1 of 2 on host host1 died" in first.said(0)
    assert seconds < 60


def test_a_signal_to_one_process_saves_and_stops_all(lost: tuple[Job, Job, float]) -> None:
    _, second, _ = lost
    assert second.statuses() == [128 + signal.SIGTERM] * 2
    done = [x["step"] for x in timeless(second.folder)]
    assert done == list(range(len(done)))
    assert 7 <= len(done) <= STEPS
    assert (second.folder / "checkpoints" / str(done[-1])).is_dir()
    assert "stopped by SIGTERM; run the same command to go on" in second.said(0)


def test_every_process_knows_the_same(lost: tuple[Job, Job, float]) -> None:
    """Metrics and statistics, to the bit; those of a killed process end earlier."""
    folder = lost[0].folder
    zero, one = (folder.with_suffix(f".knows{i}").read_text().splitlines() for i in range(2))
    assert len(set(zero) & set(one)) >= 6
    assert not set(one) - set(zero)


def test_two_processes_and_another_mesh_make_the_same_run(whole: Run, lost: tuple[Job, Job, float]) -> None:
    """Elastic: from 2 processes with 2 x 2 x 2 devices to one process with 4, fsdp to tensor; against one device."""
    folder = lost[0].folder
    before = timeless(folder)
    same(before, whole.metrics[: len(before)])
    run_here(folder, f"trainer.steps={STEPS}", "mesh.fsdp=2", "mesh.tensor=2")
    same(timeless(folder), whole.metrics)
    for step in range(1, STEPS + 1):
        assert Run(folder, whole.trainer).rollouts(step) == whole.rollouts(step)


def test_an_evaluation_is_shared_by_all_processes(whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the grading each, and the same file as one process's, which decodes all in one piece."""
    config = whole.folder / "config.yaml"
    words = ("--checkpoint", str(whole.folder), "--samples", "3", "--k", "1", "--out")
    monkeypatch.setattr("dynamo_jax.evaluation.command.build_verifier", lambda _, **__: Coin())
    assert cli.main(["eval", str(config), *words, str(tmp_path / "one")]) == 0
    job = Job(config, whole.folder, 2, *words, str(tmp_path / "two"), *MESH, "rollout.batch=8", command="eval")
    assert job.statuses() == [0, 0]
    for name in ("heldout_n3.jsonl", "results.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    problems = TINY["task"]["arithmetic"]["heldout_prompts"]
    graded = [int(whole.folder.with_suffix(f".graded{i}").read_text()) for i in range(2)]
    assert graded == [problems * 3 // 2] * 2
    assert ["| heldout " in job.said(i) for i in range(2)] == [True, False]
    # What process 0 finds in the folder ends both.
    more = (*words, str(tmp_path / "two"), "eval.temperature=0.5", "mesh.data=2")
    job = Job(config, whole.folder, 2, *more, command="eval")
    assert job.statuses() == [2, 2]
    assert "was drawn with temperature = 1.0" in job.said(0)
    assert "process 0 of 2 on host host0 has ended" in job.said(1)


def test_a_folder_in_use_is_refused_by_all_processes(tmp_path: Path) -> None:
    from dynamo_jax.run.folder import RunFolder

    folder = tmp_path / "run"
    config = write(folder)
    with RunFolder(folder):
        job = Job(config, folder, 2, "mesh.data=2")
        assert job.statuses() == [2, 2]
    assert "is in use by process" in job.said(0)
    assert "is in use by process" in job.said(1)  # told by process 0
    assert load_config(config).run_dir == str(folder)
