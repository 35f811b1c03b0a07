"""Grades responses: the exact path in this process, the symbolic one in killable workers.

`Verifier` keeps a pool of fresh Python interpreters (`verifier_worker.py`), started when the first answer needs one.
Their CPU time and address space are limited by the kernel, even inside a C library; a wall-clock limit is behind that.
An answer whose worker dies is wrong, is counted, and the worker is replaced.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from dynamo_jax.config.choices import VerifierKind
from dynamo_jax.tasks.grading.answers import cache_key, check_gold, compare, readable
from dynamo_jax.tasks.grading.extract import extract
from dynamo_jax.tasks.grading.verifier_worker import read_message, write_message

START_SECONDS = 120.0  # wall clock; importing sympy takes about a second, on a loaded machine many
WALL_FACTOR = 6.0  # wall-clock seconds allowed for each CPU second: workers share cores with everything else
CACHE_SIZE = 8192
RECYCLE = 3000  # answers after which a worker is replaced: the parser's tables grow by about 8 kB an answer
PENDING = 256  # answers a worker that wait in memory; a caller with more waits
MAX_SAVED = 20_000  # characters of a killed answer
log = logging.getLogger("dynamo_jax")
_PACKAGE_ROOT = Path(__file__).resolve().parents[3]


class _Death(Exception):
    """The worker died; `timed_out` if it had used up its time, `outside` if the answer need not be the reason."""

    def __init__(self, timed_out: bool, outside: bool) -> None:
        super().__init__("timed out" if timed_out else "died")
        self.timed_out, self.outside = timed_out, outside


class _Worker:
    """One slot of the pool: a process, or none until the next answer needs one. Used by one thread at a time."""

    def __init__(self, timeout: float, memory_mb: float) -> None:
        self.timeout, self.memory_mb = timeout, memory_mb
        self.process: subprocess.Popen[bytes] | None = None
        self.asked = 0  # of the process

    def ask(self, kind: str, gold: str, answer: str) -> dict[str, Any]:
        """The worker's reply. Raises `_Death`, and `RuntimeError` if no worker can be started."""
        process = self.process
        if process is None or process.poll() is not None or self.asked >= RECYCLE:
            process = self.start()
        self.asked += 1
        try:
            write_message(_pipe(process.stdin), [kind, gold, answer])
            reply = self.receive(process, WALL_FACTOR * self.timeout + 5.0)
        except BrokenPipeError:
            reply = None
        if isinstance(reply, dict) and reply.get("error") != "MemoryError":
            return reply
        # A worker that ended by itself has a status of its own, soon.
        status = self.stop(grace=1.0 if reply is None else 0.0)
        # Killed by another's hand, as where memory is short, or frozen: neither is what our limits do to a bad answer.
        outside = reply is TimeoutError or (reply is None and status == -signal.SIGKILL)
        raise _Death(timed_out=status == -signal.SIGXCPU or reply is TimeoutError, outside=outside)

    def start(self) -> subprocess.Popen[bytes]:
        self.stop()
        self.asked = 0
        paths = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
        command = [
            sys.executable,
            "-m",
            "dynamo_jax.tasks.grading.verifier_worker",
            str(self.timeout),
            str(self.memory_mb),
        ]
        with tempfile.TemporaryFile() as errors:
            self.process = process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
            )
            reply = self.receive(process, START_SECONDS)
            if reply != {"ready": True}:
                status = self.stop(grace=1.0 if reply is None else 0.0)
                errors.seek(0)
                reason = errors.read()[-2000:].decode(errors="replace").strip()
                raise RuntimeError(
                    f"a grading worker did not start (exit status {status}): {' '.join(command)}\n{reason}\n"
                    "Remedy: check that this Python can import sympy and latex2sympy2_extended, and that "
                    f"{START_SECONDS:.0f} seconds and verifier.memory_mb are enough."
                )
        return process

    @staticmethod
    def receive(process: subprocess.Popen[bytes], seconds: float) -> Any:
        """The next reply, None if the process died, `TimeoutError` (the class) if nothing came in time."""
        stream = _pipe(process.stdout)
        poll = select.poll()
        poll.register(stream, select.POLLIN)
        # Replies are smaller than a pipe's buffer and are written at once: what has begun is complete.
        return read_message(stream) if poll.poll(seconds * 1000) else TimeoutError

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
            with contextlib.suppress(BrokenPipeError):  # a request that the worker never read
                _pipe(pipe).close()
        return status


class Verifier:
    """Grades responses against reference answers, in any thread, with bounded time and memory for each.

    Args:
        workers: processes for answers that need algebra; as many are compared at once.
        timeout: seconds of CPU time that one answer may take in a worker (the kernel rounds up to whole seconds).
        memory_mb: MiB of address space that an answer may take beyond a worker's size at start.
        kind: `math`, or `math_verify_compat`: every response goes through math-verify with 3 decimals, in a worker, as
            in the paper's released code. It is slow and can be fooled; for comparing numbers only.
        killed_file: a JSONL file to which every answer that costs its worker its life is added.

    `counts` says what happened so far: `graded` answers, of which `symbolic` needed a worker and `cached` were known;
    `no_answer` responses gave none; `unreadable` ones no parser could read; `killed` ones cost their worker its life,
    by `timeouts` or `crashes`; `starts` of worker processes. `killed_answers` holds the latest (gold, answer) pairs
    whose worker died.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout: float = 5.0,
        memory_mb: int = 1024,
        *,
        kind: VerifierKind = "math",
        killed_file: str | Path | None = None,
    ) -> None:
        if workers < 1 or timeout <= 0 or memory_mb <= 0:
            raise ValueError(
                f"workers={workers}, timeout={timeout}, memory_mb={memory_mb}: all must be positive; "
                "the defaults are 2, 5.0 and 1024"
            )
        self.kind, self.killed_file = kind, killed_file
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._cache: OrderedDict[tuple[str, str, str], bool] = OrderedDict()
        self.killed_answers: deque[tuple[str, str]] = deque(maxlen=32)
        self._workers = [_Worker(timeout, memory_mb) for _ in range(workers)]
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        # One thread a worker: it waits for the reply while the callers go on with the exact path.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")
        self._room = threading.BoundedSemaphore(PENDING * workers)
        self._closing = threading.Event()
        self._finalizer = weakref.finalize(self, _shut_down, self._closing, self._threads, self._workers)

    @property
    def counts(self) -> dict[str, int]:
        with self._lock:
            names = ("graded", "no_answer", "symbolic", "cached", "unreadable", "timeouts", "crashes", "starts")
            counts = {name: self._counts[name] for name in names}
        return {**counts, "killed": counts["timeouts"] + counts["crashes"]}

    def grade_batch(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """For each (response, reference answer) whether it is right, in order.

        Raises `RuntimeError` if workers cannot be started or the verifier was closed.
        """
        results: list[bool | Future[bool]] = []
        pending: dict[tuple[str, str, str], Future[bool]] = {}
        try:
            for output, gold in pairs:
                results.append(self._judge(output, gold, pending))
            with self._lock:
                self._counts["graded"] += len(results)
            return [r.result() if isinstance(r, Future) else r for r in results]
        except CancelledError as error:
            raise RuntimeError("this Verifier was closed while it graded") from error
        finally:
            for future in pending.values():
                future.cancel()  # after an error: do not go on with what nobody waits for

    def _judge(self, output: str, gold: str, pending: dict[tuple[str, str, str], Future[bool]]) -> bool | Future[bool]:
        """At once where the exact path can tell, else what a worker will say; `pending` holds what was asked."""
        if self.kind == "math_verify_compat":
            return self._later((self.kind, gold, output), output, pending)
        answer = extract(output)
        if answer is None:
            with self._lock:
                self._counts["no_answer"] += 1
            return False
        verdict = compare(gold, answer)
        return verdict if verdict is not None else self._later((self.kind, *cache_key(gold, answer)), answer, pending)

    def unreadable(self, golds: Sequence[str]) -> list[str | None]:
        """For each reference answer why no response could ever equal it; None where all is well.

        Formulas that the exact path does not read are parsed in the workers.
        """
        reasons: list[str | None] = [check_gold(gold) for gold in golds]
        pending: dict[tuple[str, str, str], Future[bool]] = {}
        waiting = {}
        for index, gold in enumerate(golds):
            if reasons[index] is None and self.kind == "math" and not readable(gold):
                waiting[index] = self._later(("parse", gold, ""), "", pending)
        for index, reply in waiting.items():
            if not (reply.result() if isinstance(reply, Future) else reply):
                reasons[index] = f"the reference answer {golds[index][:80]!r} is no formula that the grader can read"
        return reasons

    def _later(
        self, request: tuple[str, str, str], answer: str, pending: dict[tuple[str, str, str], Future[bool]]
    ) -> bool | Future[bool]:
        known = self._recall(request)
        if known is not None:
            return known
        if request not in pending:
            if self._closing.is_set():
                raise RuntimeError("this Verifier is closed; make a new one")
            self._room.acquire()
            try:
                future = pending[request] = self._threads.submit(self._ask, request, answer)
            except RuntimeError:
                self._room.release()
                raise RuntimeError("this Verifier is closed; make a new one") from None
            future.add_done_callback(lambda _: self._room.release())
        return pending[request]

    def grade(self, output: str, gold: str) -> bool:
        """`grade_batch` of one."""
        return self.grade_batch([(output, gold)])[0]

    def close(self) -> None:
        """End the workers; answers still in work raise `RuntimeError`. May be called again."""
        self._finalizer()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _recall(self, request: tuple[str, str, str]) -> bool | None:
        with self._lock:
            known = self._cache.get(request)
            if known is not None:
                self._cache.move_to_end(request)
                self._counts["cached"] += 1
            return known

    def _ask(self, request: tuple[str, str, str], answer: str) -> bool:
        worker = self._free.get()
        try:
            if self._closing.is_set():
                raise RuntimeError("this Verifier was closed while it graded")
            fresh = worker.process is None or worker.process.poll() is not None or worker.asked >= RECYCLE
            with self._lock:
                self._counts["symbolic"] += 1
                self._counts["starts"] += fresh
            try:
                reply = worker.ask(request[0], request[1], answer)
            except _Death as death:
                if not death.outside or self._closing.is_set():
                    raise
                with self._lock:
                    self._counts["starts"] += 1
                reply = worker.ask(
                    request[0], request[1], answer
                )  # once more: a verdict must not depend on the machine
        except (_Death, RuntimeError) as death:
            if self._closing.is_set():
                raise RuntimeError("this Verifier was closed while it graded") from death
            if isinstance(death, RuntimeError):
                raise
            with self._lock:
                self._counts["timeouts" if death.timed_out else "crashes"] += 1
                self.killed_answers.append((request[1], answer))
                self._save_killed(request, answer, death.timed_out)
            # A crash may have come from outside: worth another try next time. A timeout is not.
            if death.timed_out:
                self._remember(request, False)
            return False
        finally:
            self._free.put(worker)
        if "error" in reply:
            with self._lock:
                self._counts["unreadable"] += 1
        same = reply.get("same") is True
        self._remember(request, same)
        return same

    def _save_killed(self, request: tuple[str, str, str], answer: str, timed_out: bool) -> None:
        if self.killed_file is None:
            return
        cause = "timeout" if timed_out else "crash"
        line = json.dumps({"cause": cause, "kind": request[0], "gold": request[1], "answer": answer[:MAX_SAVED]})
        try:
            with open(self.killed_file, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:  # a full disk must not cost the run: the answer is wrong either way
            log.warning("%s: cannot be written: %s", self.killed_file, error.strerror)

    def _remember(self, request: tuple[str, str, str], same: bool) -> None:
        with self._lock:
            self._cache[request] = same
            while len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)


def _shut_down(closing: threading.Event, threads: ThreadPoolExecutor, workers: list[_Worker]) -> None:
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


_shared_lock = threading.Lock()
_shared: dict[int, Verifier] = {}  # by process id: a forked child must not write into its parent's pipes


def grade(output: str, gold: str) -> bool:
    """Is the response `output` right, judged against the reference answer `gold`?

    One `Verifier` with its default limits serves all calls, is made by the first and ends with the process.
    """
    with _shared_lock:
        verifier = _shared.get(os.getpid())
        if verifier is None:
            verifier = _shared[os.getpid()] = Verifier()
    return verifier.grade(output, gold)
