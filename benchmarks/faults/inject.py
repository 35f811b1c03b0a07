"""Break a run in every way that we know, start it again with the same command, and compare it with an undisturbed one.

    python benchmarks/faults/inject.py [--only kill,disk] [--list]

Needs 2 CPU cores and about 15 minutes; a full disk needs the right to mount a small one. The run is a tiny policy on
the built-in task, seven steps, a checkpoint every third; two processes have four CPU devices each. A row a fault:
what happened, how long until the run had ended by itself (where another process had to notice), how many steps were
done again, and how many values of `metrics.jsonl` (times left out) and saved rollouts differ from the undisturbed run.
Exit status 1 if any does, or a fault ends otherwise than expected.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from fake_gcs import FakeGCS  # noqa: E402
from kill_resume import compare, compare_rollouts, last_step, read  # noqa: E402

STEPS = 7
CONFIG = """
run_dir: unused
device: cpu
task: {max_prompt_tokens: 8, arithmetic: {train_prompts: 16, heldout_prompts: 8, max_operations: 3}}
policy:
  architecture: {hidden_size: 16, num_layers: 1, num_heads: 2, num_kv_heads: 2, intermediate_size: 16,
                 vocab_size: 16, tie_word_embeddings: false}
warmup: {steps: 3, batch: 16}
rollout: {prompts: 8, per_prompt: 4, max_tokens: 5}
allocation: {low: 2, high: 8, half_life: 10.0}
optimizer: {learning_rate: 5e-3}
trainer: {steps: 7, mini_batch: 16}
eval: {every: 4, samples: 2, k: [1, 2]}
checkpoint: {every: 3}
logging: {tensorboard: false, progress: false, rollouts_per_step: 32, rollouts_keep: null}
"""
MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
TEMPFAIL = os.EX_TEMPFAIL
SECONDS = 300.0  # no run takes so long


class Outcome(NamedTuple):
    """A row of the table."""

    what: str
    again: int  # steps done a second time
    noticed: float | None = None  # seconds until the processes had ended by themselves


class Run:
    """One run folder, and the processes that are started on it."""

    def __init__(self, folder: Path, count: int = 1) -> None:
        self.folder, self.count, self.starts = folder / "run", count, 0
        self.beside = folder
        self.address: str | None = None  # where `folder` is only a working folder
        self.environ: dict[str, str] = {}
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *overrides: str, fault: str = "", pause: float = 0.0, **environ: str) -> None:
        self.starts += 1
        config = self.beside / "config.yaml"
        config.write_text(CONFIG)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.processes = []
        for index in range(self.count):
            several = {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(self.count),
                "JAX_PROCESS_ID": str(index),
                "DYNAMO_JAX_HOST_NAME": f"host{index}",
            }
            variables = os.environ | {"FAULT": fault, "PAUSE": str(pause)} | self.environ | environ
            variables |= several if self.count > 1 else {}
            words = [*(MESH if self.count > 1 else ()), f"run_dir={self.address or self.folder}", *overrides]
            command = [sys.executable, str(ROOT / "benchmarks" / "faults" / "subject.py"), str(config), *words]
            with open(self.log(index), "wb") as log:
                self.processes.append(subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log))

    def log(self, index: int = 0) -> Path:
        return self.beside / f"log{self.starts}.{index}"

    def said(self, index: int = 0) -> str:
        return self.log(index).read_text(errors="replace")

    def until(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + SECONDS
        while not condition():
            if time.monotonic() > until or all(process.poll() is not None for process in self.processes):
                raise Failed(f"the moment did not come: {self.said()[-2000:]}")
            time.sleep(0.002)

    def until_step(self, step: int) -> None:
        self.until(lambda: last_step(self.folder) >= step)

    def kill(self, *indices: int, number: int = signal.SIGKILL) -> None:
        for index in indices or range(self.count):
            self.processes[index].send_signal(number)

    def wait(self, *expected: int) -> float:
        """Seconds until all have ended, with these statuses."""
        began = time.monotonic()
        try:
            statuses = [process.wait(SECONDS) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise Failed(f"it did not end: {self.said()[-2000:]}") from None
        if statuses != list(expected or [0] * self.count):
            raise Failed(f"statuses {statuses} instead of {list(expected)}: {self.said()[-3000:]}")
        return time.monotonic() - began

    def finish(self, *overrides: str, **environ: str) -> int:
        """The same command again, to the end. How many steps it did that were done before."""
        before = last_step(self.folder)
        self.start(*overrides, **environ)
        self.wait()
        resumed = re.search(r"Resuming after step (\d+)", self.said())
        return max(before - (int(resumed[1]) if resumed else 0), 0)

    def stop_all(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


class Failed(Exception):
    """A fault did not end as it should."""


Fault = Callable[[Run], Outcome]
FAULTS: dict[str, tuple[int, Fault]] = {}  # name -> processes, what to do


def fault(name: str, processes: int = 1) -> Callable[[Fault], Fault]:
    def add(function: Fault) -> Fault:
        FAULTS[name] = processes, function
        return function

    return add


def expect(text: str, said: str) -> None:
    if not re.search(text, said):
        raise Failed(f"{text!r} was not said: {said[-2000:]}")


@fault("kill -9 in a step")
def kill_step(run: Run) -> Outcome:
    run.start(pause=0.2)
    run.until_step(4)
    run.kill()
    run.wait(-signal.SIGKILL)
    return Outcome("goes on from the newest checkpoint", run.finish())


@fault("kill -9 of one process of two", processes=2)
def kill_one(run: Run) -> Outcome:
    run.start(pause=0.2)
    run.until_step(4)
    run.kill(1)
    seconds = run.wait(TEMPFAIL, -signal.SIGKILL)
    expect("process 1 of 2 on host host1 died", run.said())
    return Outcome("the other names its host and ends with 75", run.finish(), seconds)


@fault("kill -9 of both processes of two", processes=2)
def kill_both(run: Run) -> Outcome:
    run.start(pause=0.2)
    run.until_step(4)
    run.kill(0, 1)
    run.wait(-signal.SIGKILL, -signal.SIGKILL)
    return Outcome("go on from the newest checkpoint", run.finish())


@fault("kill -9 of process 0 of two", processes=2)
def kill_zero(run: Run) -> Outcome:
    run.start(pause=0.2)
    run.until_step(4)
    run.kill(0)
    began = time.monotonic()
    status = run.processes[1].wait(SECONDS)
    seconds = time.monotonic() - began
    if status not in (TEMPFAIL, -signal.SIGABRT):  # jax's own client may be first to abort, without a name
        raise Failed(f"status {status}")
    expect("process 0 of 2 on host host0 died|coordination service", run.said(1))
    run.processes[0].wait()
    return Outcome("the other names its host and ends with 75", run.finish(), seconds)


@fault("one host of two freezes (SIGSTOP)", processes=2)
def freeze(run: Run) -> Outcome:
    run.start(pause=0.2)
    run.until_step(4)
    run.kill(1, number=signal.SIGSTOP)
    began = time.monotonic()
    status = run.processes[0].wait(SECONDS)
    seconds = time.monotonic() - began
    if status != TEMPFAIL:
        raise Failed(f"status {status}: {run.said()[-2000:]}")
    expect("nothing was heard of process 1 of 2 on host host1", run.said())
    run.kill(1)
    run.processes[1].wait()
    return Outcome("the other names its host and ends with 75", run.finish(), seconds)


@fault("one process of two hangs, its threads alive", processes=2)
def hang(run: Run) -> Outcome:
    run.start(fault="hang:5")
    run.until_step(4)
    seconds = run.wait(TEMPFAIL, TEMPFAIL)
    expect(r"process 1 of 2 on host host1 \(.*\) has not moved", run.said())
    return Outcome("both end with 75, its host is named", run.finish(), seconds)


@fault("kill -9 while a checkpoint is written")
def kill_checkpoint(run: Run) -> Outcome:
    run.start(fault="slow_checkpoint")
    run.until(lambda: any(run.folder.glob("checkpoints/6*tmp*")))
    run.kill()
    run.wait(-signal.SIGKILL)
    return Outcome("the unfinished one is removed", run.finish())


@fault("kill -9 while answers are graded")
def kill_grading(run: Run) -> Outcome:
    marker = run.beside / "grading"
    run.start(fault="slow_grading")
    run.until_step(4)
    marker.unlink(missing_ok=True)
    run.until(marker.exists)
    run.kill()
    run.wait(-signal.SIGKILL)
    return Outcome("goes on from the newest checkpoint", run.finish())


@fault("SIGTERM")
def terminate(run: Run) -> Outcome:
    run.start(pause=0.2)
    run.until_step(4)
    run.kill(number=signal.SIGTERM)
    run.wait(128 + signal.SIGTERM)
    return Outcome("saves, ends with 143", run.finish())


@fault("SIGTERM to one process of two", processes=2)
def terminate_one(run: Run) -> Outcome:
    run.start(pause=0.2)
    run.until_step(4)
    run.kill(1, number=signal.SIGTERM)
    seconds = run.wait(128 + signal.SIGTERM, 128 + signal.SIGTERM)
    return Outcome("both save and end with 143", run.finish(), seconds)


@fault("the newest checkpoint is truncated")
def truncated(run: Run) -> Outcome:
    run.start("trainer.steps=6")
    run.wait()
    files = [path for path in (run.folder / "checkpoints" / "6" / "state").rglob("*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    os.truncate(victim, victim.stat().st_size // 2)
    again = run.finish()
    expect("is damaged.*goes on from step", run.said())
    return Outcome("said, moved aside, goes on from the one before", again)


@fault("the newest checkpoint lost a file")
def incomplete(run: Run) -> Outcome:
    run.start("trainer.steps=6")
    run.wait()
    files = [path for path in (run.folder / "checkpoints" / "6" / "state").rglob("*") if path.is_file()]
    min(files).unlink()
    again = run.finish()
    expect("is damaged.*goes on from step", run.said())
    return Outcome("said, moved aside, goes on from the one before", again)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        raise Failed("a full disk needs the right to mount one")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@fault("the disk is full for a while")
def full_disk(run: Run) -> Outcome:
    run.folder = run.beside / "disk" / "run"
    with small_disk(run.beside / "disk", 64):
        run.start(pause=0.2)
        run.until_step(5)  # no checkpoint is on its way: steps 4, which is evaluated, and 6 have one
        filler = run.beside / "disk" / "filler"
        # Without a buffer, whose rest would be written once more, and fail, when the file is closed.
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 65536)
        run.until(lambda: "No space left" in run.said())
        time.sleep(2.0)
        filler.unlink()
        run.wait()
        expect("Nothing is lost: trying again", run.said())
        shutil.copytree(run.folder, run.beside / "run")
    run.folder = run.beside / "run"
    return Outcome("waits, says so, goes on when there is space", 0)


@fault("one process of two cannot write its part of a checkpoint", processes=2)
def failing_part(run: Run) -> Outcome:
    run.start(fault="commit")
    run.wait()
    expect("Nothing is lost: trying again", run.said())
    return Outcome("both try again", 0)


@fault("the disk is full for a while, two processes", processes=2)
def full_disk_of_two(run: Run) -> Outcome:
    return full_disk(run)


@fault("the disk stays full")
def full_for_good(run: Run) -> Outcome:
    run.folder = run.beside / "disk" / "run"
    with small_disk(run.beside / "disk", 64):
        run.start("checkpoint.patience=2", pause=0.2)
        run.until_step(4)
        filler = run.beside / "disk" / "filler"
        # Without a buffer, whose rest would be written once more, and fail, when the file is closed.
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 65536)
        run.wait(TEMPFAIL)
        expect("Mend the storage; the same command goes on", run.said())
        run.start()
        run.wait(2)  # before any device work
        expect("No space left on device. Free space", run.said())
        filler.unlink()
        again = run.finish()
        shutil.copytree(run.folder, run.beside / "run")
    run.folder = run.beside / "run"
    return Outcome("ends with 75 after `checkpoint.patience`, with 2 at the start", again)


@contextlib.contextmanager
def bucket(run: Run) -> Iterator[FakeGCS]:
    """The run folder is in a bucket on loopback; at the end it is downloaded to where it is compared."""
    with FakeGCS() as server:
        run.environ = server.environment() | {"DYNAMO_JAX_WORK_DIR": str(run.beside / "machine1")}
        run.address, run.folder = "gs://faults/run", run.beside / "machine1" / f"run-{_hash('gs://faults/run')}"
        yield server
        for name in server.names("faults/run/"):
            path = run.beside / "downloaded" / name.removeprefix("faults/run/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(server.objects[name][0])
    run.folder = run.beside / "downloaded"


def _hash(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:8]


def another_machine(run: Run) -> None:
    """What was on the machine's own disk is gone."""
    run.environ["DYNAMO_JAX_WORK_DIR"] = str(run.beside / "machine2")
    run.folder = run.beside / "machine2" / run.folder.name


@fault("a bucket answers 503 for a while")
def bucket_errs(run: Run) -> Outcome:
    with bucket(run) as server:
        run.start(pause=0.2)
        run.until_step(2)
        server.fail(seconds=45.0)  # longer than the libraries try by themselves
        run.wait()
        if not server.refused:
            raise Failed("it refused nothing")
        expect("Nothing is lost: trying again", run.said())
    return Outcome(f"waits; {server.refused} requests were refused", 0)


@fault("kill -9, the run is in a bucket, the machine's disk is lost")
def bucket_other_machine(run: Run) -> Outcome:
    with bucket(run):
        run.start(pause=0.2)
        run.until_step(5)
        run.kill()
        run.wait(-signal.SIGKILL)
        done = last_step(run.folder)
        another_machine(run)
        run.finish()
        resumed = re.search(r"Resuming after step (\d+)", run.said())
    return Outcome("another machine goes on from the bucket", done - int(resumed[1]) if resumed else done)


@fault("kill -9 of one process of two, the run is in a bucket", processes=2)
def bucket_of_two(run: Run) -> Outcome:
    with bucket(run):
        run.start(pause=0.2)
        run.until_step(5)
        run.kill(1)
        seconds = run.wait(TEMPFAIL, -signal.SIGKILL)
        done = last_step(run.folder)
        another_machine(run)
        run.finish()
        resumed = re.search(r"Resuming after step (\d+)", run.said())
    return Outcome("other machines go on from the bucket", done - int(resumed[1]) if resumed else done, seconds)


@fault("a second process on a run in a bucket")
def bucket_second(run: Run) -> Outcome:
    with bucket(run):
        run.start(pause=6.0)  # longer than the 30 s after which a lock is thought dead
        run.until_step(1)
        other = Run(run.beside)
        other.environ = run.environ | {"DYNAMO_JAX_WORK_DIR": str(run.beside / "machine3")}
        other.address, other.starts = run.address, 10
        other.start()
        other.wait(2)
        expect(r"is in use by process \d+ on host", other.said())
        run.wait()
    return Outcome("refused with 2, naming the first, which goes on", 0)


def worker_of(run: Run) -> int | None:
    """The process id of a grading worker that is busy."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        pid, parent, command = line.split(None, 2)
        if "verifier_worker" in command and parent == str(run.processes[0].pid):
            return int(pid)
    return None


def hit_workers(run: Run, number: int, times: int) -> None:
    run.start(fault="verifier", pause=0.3)
    for _ in range(times):
        victim: list[int | None] = []
        run.until(
            lambda victim=victim: bool(victim.append(worker_of(run)) or victim[-1]) and last_step(run.folder) >= 1
        )
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(victim[-1] or 0), number)
        time.sleep(0.5)
    run.wait()


@fault("grading workers are killed")
def kill_workers(run: Run) -> Outcome:
    hit_workers(run, signal.SIGKILL, 3)
    return Outcome("a new worker is asked the same again", 0)


@fault("a grading worker hangs (SIGSTOP)")
def freeze_worker(run: Run) -> Outcome:
    hit_workers(run, signal.SIGSTOP, 1)
    return Outcome("after its wall-clock limit a new worker is asked", 0)


@fault("NaN in one gradient")
def nan(run: Run) -> Outcome:
    run.start(fault="nan:5")
    run.wait()
    expect(r"step 5, update \d: objective/loss is nan; the update is skipped", run.said())
    lines = read(run.folder)
    if [line["objective/skipped_updates"] for line in lines[1:]] != [0, 0, 0, 0, 1, 0, 0]:
        raise Failed("not exactly one update was skipped")
    # From there on it is another run: compared are the steps before.
    (run.folder / "metrics.jsonl").write_text("".join((run.folder / "metrics.jsonl").open().readlines()[:5]))
    for path in sorted((run.folder / "rollouts").iterdir())[4:]:
        path.unlink()
    return Outcome("that update is skipped, counted and named", 0)


@fault("a corrupt data row")
def corrupt_row(run: Run) -> Outcome:
    data = run.beside / "train.jsonl"
    data.write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "1+')
    config = ["task.kind=math", f"task.train=[{data}]", "task.tokenizer=nowhere", "warmup.steps=0"]
    tokenizer = run.beside / "tokenizer"
    _write_tokenizer(tokenizer)
    run.start(*config[:2], f"task.tokenizer={tokenizer}", config[3])
    run.wait(2)
    expect(r"train\.jsonl, line 2", run.said())
    if run.folder.exists():
        raise Failed("a run folder was made")
    return Outcome("refused before any work, with file and line", run.finish())


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {"eos_token": "<eos>", "unk_token": "<unk>"}
    words = {word: index for index, word in enumerate([*special.values(), *"0123456789+-*=?"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=special["unk_token"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@fault("the clock steps, by hours and by years")
def clock(run: Run) -> Outcome:
    run.start(fault="clock", pause=0.2)
    run.until_step(5)
    run.kill()
    run.wait(-signal.SIGKILL)
    return Outcome("a save that orbax gives up is made again; else nothing", run.finish(FAULT="clock"))


@fault("a second process on the same run folder")
def second(run: Run) -> Outcome:
    run.start(pause=0.3)
    run.until_step(2)
    other = Run(run.beside)
    other.starts = 10
    other.start()
    other.wait(2)
    expect(r"is in use by process \d+ on host", other.said())
    run.wait()
    return Outcome("refused with 2, naming the first, which goes on", 0)


def main() -> int:
    parser = argparse.ArgumentParser(description="Inject faults and compare with an undisturbed run.")
    parser.add_argument("--only", default="", help="run the faults whose names contain one of these, comma-separated")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    chosen = [name for name in FAULTS if any(word in name for word in arguments.only.split(","))]
    if arguments.list:
        print("\n".join(chosen))
        return 0
    failed = 0
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        wholes: dict[int, Run] = {}
        for count in sorted({FAULTS[name][0] for name in chosen}):
            (Path(folder) / f"whole{count}").mkdir()
            wholes[count] = Run(Path(folder) / f"whole{count}", count)
            wholes[count].start()
            wholes[count].wait()
        print("| fault | what happens | ended after | steps done again | values that differ |")
        print("| --- | --- | --- | --- | --- |", flush=True)
        for number, name in enumerate(chosen):
            count, function = FAULTS[name]
            (Path(folder) / str(number)).mkdir()
            run = Run(Path(folder) / str(number), count)
            try:
                outcome = function(run)
                whole = wholes[count].folder
                expected = read(whole)[: len(read(run.folder))] if name == "NaN in one gradient" else read(whole)
                wrong = compare(expected, read(run.folder))
                wrong += [w for w in compare_rollouts(whole, run.folder) if name != "NaN in one gradient"]
                noticed = "" if outcome.noticed is None else f"{outcome.noticed:.1f} s"
                print(f"| {name} | {outcome.what} | {noticed} | {outcome.again} | {len(wrong)} |", flush=True)
                for line in wrong[:5]:
                    print("DIFFERENT", line)
                failed += bool(wrong)
            except Failed as error:
                failed += 1
                print(f"| {name} | FAILED: {error} | | | |", flush=True)
            finally:
                run.stop_all()
    print(f"{len(chosen) - failed} of {len(chosen)} faults end as they should, without loss")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
