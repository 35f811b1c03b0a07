"""Grades mathematics: the exact path in this process, the symbolic one in killable workers (`pool.py`).

An answer whose worker dies is wrong, is counted, and the worker is replaced.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import TracebackType

from dynamo_jax.config.choices import VerifierKind
from dynamo_jax.tasks.grading.alternatives import alternatives
from dynamo_jax.tasks.grading.answers import cache_key, check_gold, compare, readable
from dynamo_jax.tasks.grading.extract import extract
from dynamo_jax.tasks.grading.pool import Killed, Pool

CACHE_SIZE = 8192


class Verifier:
    """Grades responses against reference answers, in any thread, with bounded time and memory for each.

    Args:
        workers: processes for answers that need algebra; as many are compared at once.
        timeout: seconds of CPU time that one answer may take in a worker (the kernel rounds up to whole seconds).
        memory_mb: MiB of address space that an answer may take beyond a worker's size at start.
        kind: `math`, or `math_verify_compat`: every response goes through math-verify with 3 decimals, in a worker, as
            in the paper's released code. It is slow and can be fooled; for comparing numbers only.
        killed_file: a JSONL file for the newest answers that cost a worker its life (`killed.py`).

    `counts` says what happened so far: `graded` answers, of which `symbolic` needed a worker and `cached` were known;
    `no_answer` responses gave none; `unreadable` ones no parser could read; `killed` ones cost their worker its life,
    by `timeouts` or `crashes`; `starts` of worker processes and `waits` for them (see `Pool`). `killed_answers` holds
    the latest (gold, answer) pairs whose worker died.
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
        self.kind = kind
        self._pool = Pool(workers, timeout, memory_mb, killed_file=killed_file)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._cache: OrderedDict[tuple[str, str, str], bool] = OrderedDict()

    @property
    def counts(self) -> dict[str, int]:
        with self._lock:
            counts = {name: self._counts[name] for name in ("graded", "no_answer", "symbolic", "cached", "unreadable")}
        return {**counts, **self._pool.counts}

    @property
    def killed_answers(self) -> deque[tuple[str, str]]:
        return self._pool.killed_answers

    def grade_batch(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """For each (response, reference answer) whether it is right, in order.

        A response is right if it is right by any of the texts of a reference that is a list (`alternatives`).

        Raises `RuntimeError` if workers cannot be started or the verifier was closed.
        """
        results: list[bool | list[Future[bool]]] = []
        pending: dict[tuple[str, str, str], Future[bool]] = {}
        try:
            for output, gold in pairs:
                results.append(self._judge(output, gold, pending))
            with self._lock:
                self._counts["graded"] += len(results)
            return [r if isinstance(r, bool) else any(future.result() for future in r) for r in results]
        except CancelledError as error:
            raise RuntimeError("this Verifier was closed while it graded") from error
        finally:
            for future in pending.values():
                future.cancel()  # after an error: do not go on with what nobody waits for

    def _judge(
        self, output: str, gold: str, pending: dict[tuple[str, str, str], Future[bool]]
    ) -> bool | list[Future[bool]]:
        """At once where the exact path can tell, else what workers will say; `pending` holds what was asked."""
        answer = output if self.kind == "math_verify_compat" else extract(output)
        if answer is None:
            with self._lock:
                self._counts["no_answer"] += 1
            return False
        asked: list[Future[bool]] = []
        for one in alternatives(gold):
            verdict = self._verdict(one, answer, pending)
            if verdict is True:
                return True
            if isinstance(verdict, Future):
                asked.append(verdict)
        return asked or False

    def _verdict(
        self, gold: str, answer: str, pending: dict[tuple[str, str, str], Future[bool]]
    ) -> bool | Future[bool]:
        if self.kind == "math_verify_compat":
            return self._later((self.kind, gold, answer), answer, pending)
        verdict = compare(gold, answer)
        return verdict if verdict is not None else self._later((self.kind, *cache_key(gold, answer)), answer, pending)

    def unreadable(self, golds: Sequence[str]) -> list[str | None]:
        """For each reference answer why no response could ever equal it, or one of its alternatives; else None.

        Formulas that the exact path does not read are parsed in the workers.
        """
        parts = [alternatives(gold) for gold in golds]
        reasons: list[str | None] = [next(filter(None, map(check_gold, part)), None) for part in parts]
        pending: dict[tuple[str, str, str], Future[bool]] = {}
        waiting = []
        for index, part in enumerate(parts):
            if reasons[index] is None and self.kind == "math":
                waiting += [
                    (index, one, self._later(("parse", one, ""), "", pending)) for one in part if not readable(one)
                ]
        for index, one, reply in waiting:
            if not (reply.result() if isinstance(reply, Future) else reply):
                reasons[index] = f"the reference answer {one[:80]!r} is no formula that the grader can read"
        return reasons

    def _later(
        self, request: tuple[str, str, str], answer: str, pending: dict[tuple[str, str, str], Future[bool]]
    ) -> bool | Future[bool]:
        known = self._recall(request)
        if known is not None:
            return known
        if request not in pending:
            pending[request] = self._pool.submit(self._ask, request, answer)
        return pending[request]

    def grade(self, output: str, gold: str) -> bool:
        """`grade_batch` of one."""
        return self.grade_batch([(output, gold)])[0]

    def close(self) -> None:
        """End the workers; answers still in work raise `RuntimeError`. May be called again."""
        self._pool.close()

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
        with self._lock:
            self._counts["symbolic"] += 1
        try:
            reply = self._pool.ask(request[0], request[1], answer)
        except Killed as killed:
            # A crash may have come from outside: worth another try next time. A timeout is not.
            if killed.timed_out:
                self._remember(request, False)
            return False
        if "error" in reply:
            with self._lock:
                self._counts["unreadable"] += 1
        same = reply.get("same") is True
        self._remember(request, same)
        return same

    def _remember(self, request: tuple[str, str, str], same: bool) -> None:
        with self._lock:
            self._cache[request] = same
            while len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)


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
