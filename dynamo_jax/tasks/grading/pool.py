"""Killable workers: fresh Python interpreters (`verifier_worker.py`) that judge one answer at a time.

Their CPU time and address space are limited by the kernel, even inside a C library; a wall-clock limit is behind that.
A worker is started when an answer needs one, and replaced when it dies.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

from dynamo_jax.tasks.grading.killed import KilledFile
from dynamo_jax.tasks.grading.verifier_worker import packed, read_message

START_SECONDS = 120.0  # wall clock; importing sympy takes about a second, on a loaded machine many
WALL_FACTOR = 6.0  # wall-clock seconds allowed for each CPU second: workers share cores with everything else
BEAT_SECONDS = 5.0  # how often it is counted that a worker is waited for, within its limits
RECYCLE = 3000  # answers after which a worker is replaced: the parser's tables grow by about 8 kB an answer
PENDING = 256  # answers a worker that wait in memory; a caller with more waits
_PACKAGE_ROOT = Path(__file__).resolve().parents[3]
_T = TypeVar("_T")


class Killed(Exception):
    """The answer cost a worker its life; `timed_out` if it had used up its time."""

    def __init__(self, timed_out: bool) -> None:
        super().__init__("timed out" if timed_out else "died")
        self.timed_out = timed_out


class _Death(Exception):
    """The worker died; `timed_out` if it had used up its time, `outside` if the answer need not be the reason."""

    def __init__(self, timed_out: bool, outside: bool) -> None:
        super().__init__("timed out" if timed_out else "died")
        self.timed_out, self.outside = timed_out, outside


class RefusedError(ValueError):
    """The worker has been started, and says why it cannot do what it is meant for."""


class Worker:
    """One slot of the pool: a process, or none until the next answer needs one. Used by one thread at a time."""

    def __init__(self, timeout: float, memory_mb: float, arguments: Sequence[str]) -> None:
        self.arguments = [str(timeout), str(memory_mb), *arguments]
        self.imports = arguments[0] if arguments else "sympy and latex2sympy2_extended"
        self.wall = WALL_FACTOR * timeout + 5.0  # seconds that an answer may take
        self.process: subprocess.Popen[bytes] | None = None
        self.asked = 0  # of the process
        self.waits = 0  # of `BEAT_SECONDS`

    @property
    def ready(self) -> bool:
        """Has it a process that can be asked?"""
        return self.process is not None and self.process.poll() is None and self.asked < RECYCLE

    def ask(self, kind: str, gold: str, answer: str) -> dict[str, Any]:
        """The reply of a worker that is ready. Raises `_Death`."""
        process = self.process
        if process is None:
            raise RuntimeError("the worker has no process")
        self.asked += 1
        try:
            in_time = self._send(process, [kind, gold, answer])
            reply = self.receive(process, self.wall) if in_time else TimeoutError
        except BrokenPipeError:
            reply = None
        short_of_memory = isinstance(reply, dict) and reply.get("error") == "MemoryError"
        if isinstance(reply, dict) and not short_of_memory:
            return reply
        waits = reply is TimeoutError and _state(process.pid) == "S"
        # A worker that ended by itself has a status of its own, soon.
        status = self.stop(grace=1.0 if reply is None else 0.0)
        # Killed by another's hand, as where memory is short; frozen or starved; full of what earlier answers left: none
        # of them need be this answer's doing. One that sleeps waits for what does not come.
        killed = reply is None and status == -signal.SIGKILL
        outside = killed or (reply is TimeoutError and not waits) or (short_of_memory and self.asked > 1)
        raise _Death(timed_out=status == -signal.SIGXCPU or reply is TimeoutError, outside=outside)

    def start(self) -> None:
        """A new process. Raises `RuntimeError` if it does not start, `RefusedError` if it says why it cannot work."""
        self.stop()
        self.asked = 0
        paths = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # The devices are the trainer's, whatever a reward function may import.
        changed = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "dynamo_jax.tasks.grading.verifier_worker", *self.arguments]
        with tempfile.TemporaryFile() as errors:
            self.process = process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **changed}
            )
            os.set_blocking(_pipe(process.stdin).fileno(), False)
            reply = self.receive(process, START_SECONDS)
            if reply == {"ready": True}:
                return
            status = self.stop(grace=1.0 if reply is None else 0.0)
            if isinstance(reply, dict):
                raise RefusedError(reply["refused"])
            errors.seek(0)
            reason = errors.read()[-2000:].decode(errors="replace").strip()
            raise RuntimeError(
                f"a grading worker did not start (exit status {status}): {' '.join(command)}\n{reason}\n"
                f"Remedy: check that this Python can import {self.imports}, and that "
                f"{START_SECONDS:.0f} seconds and verifier.memory_mb are enough."
            )

    def _send(self, process: subprocess.Popen[bytes], message: list[str]) -> bool:
        """Whether the worker took it in time: a frozen one reads nothing, and a long answer does not fit in a pipe."""
        stream, data, end = _pipe(process.stdin).fileno(), memoryview(packed(message)), time.monotonic() + self.wall
        poll = select.poll()
        poll.register(stream, select.POLLOUT)
        while data:
            if not self._ready_until(end, poll):
                return False
            data = data[os.write(stream, data) :]
        return True

    def receive(self, process: subprocess.Popen[bytes], seconds: float) -> Any:
        """The next reply, None if the process died, `TimeoutError` (the class) if nothing came in time."""
        stream = _pipe(process.stdout)
        poll = select.poll()
        poll.register(stream, select.POLLIN)
        # Replies are smaller than a pipe's buffer and are written at once: what has begun is complete.
        return read_message(stream) if self._ready_until(time.monotonic() + seconds, poll) else TimeoutError

    def _ready_until(self, end: float, poll: select.poll) -> bool:
        """Wait for a pipe, and count it. False if nothing came of it up to `end`."""
        while not poll.poll(max(0.0, min(BEAT_SECONDS, end - time.monotonic())) * 1000):
            if time.monotonic() >= end:
                return False
            self.waits += 1
        return True

    def stop(self, grace: float = 0.0) -> int | None:
        """End and reap the process, if there is one, after `grace` seconds to end by itself. Its exit status."""
        process, self.process = self.process, None
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        process.kill()
        status = process.wait()
        for pipe in (process.stdin, process.stdout):
            _pipe(pipe).close()
        return status


class Pool:
    """Workers that are asked in any thread, `workers` at once, and die for what takes too much.

    Args:
        workers: processes; as many answers are judged at once.
        timeout: seconds of CPU time that one answer may take (the kernel rounds up to whole seconds); of wall clock,
            `WALL_FACTOR` times as many and five.
        memory_mb: MiB of address space that an answer may take beyond a worker's size at start.
        arguments: of the worker's command, after these limits.
        killed_file: where the newest answers that cost a worker its life are written (`killed.py`).

    `counts`: workers ended by `timeouts` and `crashes`, both of them as `killed`; `starts` of processes; `waits` of
    `BEAT_SECONDS` for a worker that is within its limits: they move as long as the pool works, whatever the limits are.
    `killed_answers` holds the latest (gold, answer) pairs whose worker died.
    """

    def __init__(
        self, workers: int, timeout: float, memory_mb: int, arguments: Sequence[str] = (), *,
        killed_file: str | Path | None = None,
    ) -> None:  # fmt: skip
        if workers < 1 or timeout <= 0 or memory_mb <= 0:
            raise ValueError(
                f"workers={workers}, timeout={timeout}, memory_mb={memory_mb}: all must be positive; "
                "the defaults are 2, 5.0 and 1024"
            )
        self.workers = [Worker(timeout, memory_mb, arguments) for _ in range(workers)]
        self.killed_answers: deque[tuple[str, str]] = deque(maxlen=32)
        self._killed_file = None if killed_file is None else KilledFile(killed_file)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._free: queue.LifoQueue[Worker] = queue.LifoQueue()  # the one that has a process comes before one without
        for worker in self.workers:
            self._free.put(worker)
        # One thread a worker: it waits for the reply while the callers go on.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")
        self._room = threading.BoundedSemaphore(PENDING * workers)
        self._closing = threading.Event()
        self._finalizer = weakref.finalize(self, _shut_down, self._closing, self._threads, self.workers)

    @property
    def counts(self) -> dict[str, int]:
        with self._lock:
            counts = {name: self._counts[name] for name in ("timeouts", "crashes", "starts")}
        waits = sum(worker.waits for worker in self.workers)
        return {**counts, "waits": waits, "killed": counts["timeouts"] + counts["crashes"]}

    def submit(self, function: Callable[..., _T], *arguments: Any) -> Future[_T]:
        """Call a function that asks, in a thread of the pool. Waits where many are waiting already.

        Raises `RuntimeError` if the pool is closed.
        """
        if self._closing.is_set():
            raise RuntimeError("this grader is closed; make a new one")
        self._room.acquire()
        try:
            future = self._threads.submit(function, *arguments)
        except RuntimeError:
            self._room.release()
            raise RuntimeError("this grader is closed; make a new one") from None
        future.add_done_callback(lambda _: self._room.release())
        return future

    def start(self) -> None:
        """Start a worker now, to see whether it can work. Raises `RefusedError` and `RuntimeError` if not."""
        self.submit(self._start_one).result()

    def ask(self, kind: str, gold: str, answer: str) -> dict[str, Any]:
        """A worker's reply, in the thread of `submit`.

        Raises `Killed`, `RefusedError`, and `RuntimeError` if no worker can be started or the pool was closed.
        """
        with self._one() as worker:
            try:
                try:
                    return self._asked(worker, kind, gold, answer)
                except _Death as death:
                    if not death.outside or self._closing.is_set():
                        raise
                    # Once more: a verdict must not depend on the machine.
                    return self._asked(worker, kind, gold, answer)
            except (_Death, RuntimeError) as error:
                if self._closing.is_set():
                    raise RuntimeError("this grader was closed while it graded") from error
                if isinstance(error, RuntimeError):
                    raise
                self._bury(error.timed_out, kind, gold, answer)
                raise Killed(error.timed_out) from None

    def close(self) -> None:
        """End the workers; answers still in work raise `RuntimeError`. May be called again."""
        self._finalizer()

    @contextlib.contextmanager
    def _one(self) -> Iterator[Worker]:
        worker = self._free.get()
        try:
            if self._closing.is_set():
                raise RuntimeError("this grader was closed while it graded")
            yield worker
        finally:
            self._free.put(worker)

    def _start_one(self) -> None:
        with self._one() as worker:
            self._make_ready(worker)

    def _make_ready(self, worker: Worker) -> None:
        if not worker.ready:
            worker.start()
            with self._lock:  # only now: who watches the counts sees the start and the answer as two steps
                self._counts["starts"] += 1

    def _asked(self, worker: Worker, kind: str, gold: str, answer: str) -> dict[str, Any]:
        self._make_ready(worker)
        return worker.ask(kind, gold, answer)

    def _bury(self, timed_out: bool, kind: str, gold: str, answer: str) -> None:
        with self._lock:
            self._counts["timeouts" if timed_out else "crashes"] += 1
            self.killed_answers.append((gold, answer))
        if self._killed_file is not None:
            self._killed_file.add(cause="timeout" if timed_out else "crash", kind=kind, gold=gold, answer=answer)


def _shut_down(closing: threading.Event, threads: ThreadPoolExecutor, workers: list[Worker]) -> None:
    closing.set()
    for worker in workers:
        if worker.process is not None:
            worker.process.kill()  # wakes the thread that waits for it, which then sees `closing`
    threads.shutdown(wait=True, cancel_futures=True)
    for worker in workers:
        worker.stop()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise RuntimeError("the worker has no pipe")
    return pipe


def _state(pid: int) -> str:
    """What the kernel says the process is doing: R runs or would like to, S sleeps, T is stopped (proc(5))."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # gone meanwhile
        return ""
