"""The file of answers that cost a worker its life."""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from pathlib import Path

KEPT = 100  # answers, the newest ones
MAX_BYTES = 16_384  # of an answer, and of a reference
log = logging.getLogger("dynamo_jax")


class KilledFile:
    """A JSONL file of the newest `KEPT` answers, each cut to `MAX_BYTES`; those of earlier starts count. Thread-safe.

    `file` belongs to this process alone: a path, or what has the same methods for a bucket.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file) if isinstance(file, str) else file
        self._lines: deque[bytes] | None = None  # None: not read yet
        self._lock = threading.Lock()

    def add(self, *, cause: str, kind: str, gold: str, answer: str) -> None:
        """Write it down. A failure is a warning."""
        line = json.dumps({"cause": cause, "kind": kind, "gold": _cut(gold), "answer": _cut(answer)}).encode()
        with self._lock:
            try:
                if self._lines is None:
                    self._lines = deque(self._read(), maxlen=KEPT)
                self._lines.append(line)
                self._write(b"".join(line + b"\n" for line in self._lines))
            except Exception as error:  # a full disk, a bucket of many errors: the answer is wrong either way
                log.warning("%s: cannot be written: %s: %s", self.file, type(error).__name__, error)

    def _read(self) -> list[bytes]:
        return self.file.read_bytes().splitlines() if self.file.exists() else []

    def _write(self, data: bytes) -> None:
        """As a whole: what is killed here leaves the old lines."""
        if not isinstance(self.file, Path):  # an object in a bucket is never half written
            self.file.write_bytes(data)
            return
        temporary = self.file.with_name(f".tmp-{self.file.name}")  # a run clears away what begins so
        temporary.write_bytes(data)
        temporary.replace(self.file)


def _cut(text: str) -> str:
    return text.encode("utf-8", "replace")[:MAX_BYTES].decode("utf-8", "ignore")
