"""The process that judges what could hang: `python -m ...grading.verifier_worker TIMEOUT MEMORY_MB [REWARD PATHS]`.

Reads requests from standard input and writes replies to standard output, each a four-byte big-endian length and JSON.
A request is `[kind, gold, answer]`: `math` (compare the two), `math_verify_compat` (the same by math-verify; the answer
is the whole response) or `parse` (can the gold be read?). Its reply is `{"same": bool}` or `{"error": name}`.
A worker of the reward `module:function`, to be imported from PATHS (a list in JSON), is asked for
nothing else (`reward`; the answer is the whole response) and replies as `own.call` says.
`{"ready": true}` comes before all, or `{"refused": why}`.
Ends at end of file, and with its parent. Never imports jax.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import IO, Any

from dynamo_jax.tasks.grading import own
from dynamo_jax.tasks.grading.answers import Algebra, compare, readable

HEADER = struct.Struct(">I")
MAX_MESSAGE = 1 << 26  # bytes; a response of 100,000 tokens may take a few million as JSON
PR_SET_PDEATHSIG = 1


def packed(message: Any) -> bytes:
    body = json.dumps(message).encode()
    return HEADER.pack(len(body)) + body


def write_message(stream: IO[bytes], message: Any) -> None:
    stream.write(packed(message))
    stream.flush()


def read_message(stream: IO[bytes]) -> Any:
    """The next message, None at the end of the stream."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (size,) = HEADER.unpack(header)
    if size > MAX_MESSAGE:
        return None
    body = stream.read(size)
    return json.loads(body) if len(body) == size else None


def _limit_memory(megabytes: float) -> None:
    """Allow `megabytes` of address space beyond what the process has once everything is imported."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + int(megabytes * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _limit_cpu(seconds: float) -> None:
    """Kill this process once it has used `seconds` more CPU seconds, rounded up to the kernel's whole seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _decide(kind: str, gold: str, answer: str, algebra: Algebra) -> bool:
    if kind == "math":
        return compare(gold, answer, algebra) is True
    if kind == "parse":
        return readable(gold, algebra)
    from dynamo_jax.tasks.grading.compat import math_verify_equal

    return math_verify_equal(gold, answer)


def _mathematician() -> Callable[[str, str, str], dict[str, Any]]:
    # After the pipes are safe: importing may print.
    from dynamo_jax.tasks.grading.symbolic import Symbolic, forbid_evaluation, warm_up

    forbid_evaluation()
    algebra = Symbolic()
    warm_up()
    return lambda kind, gold, answer: {"same": _decide(kind, gold, answer, algebra)}


def _own_reward(name: str, paths: str) -> Callable[[str, str, str], dict[str, Any]]:
    function = own.load(name, json.loads(paths))
    return lambda _, gold, output: own.call(function, output, gold)


def main() -> None:
    timeout, memory_mb, reward = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    # A function that waits for something would never look for the end of file.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Whatever a library prints must not land among the replies, nor may it wait for input.
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    try:
        reply_to = _own_reward(*reward) if reward else _mathematician()
    except own.LoadError as error:
        write_message(replies, {"refused": str(error)[:4000]})
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(memory_mb)
    write_message(replies, {"ready": True})
    os.dup2(nowhere, 2)  # up to here standard error tells the parent why a start failed

    while (request := read_message(requests)) is not None:
        _limit_cpu(timeout)
        try:
            reply = reply_to(*request)
        except Exception as error:  # whatever a parser raises on hostile text; the parent counts it
            reply = {"error": own.name_of(error)}
        write_message(replies, reply)


if __name__ == "__main__":
    main()
