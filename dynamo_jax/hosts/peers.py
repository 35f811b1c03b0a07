"""Ends a run on all hosts, within a minute and with a name, when one of its processes dies or hangs.

Without it the others would wait in their next collective operation: for jax's heartbeat, which names no host, or, where
the process lives but does not move, for ever. Every process keeps one connection to process 0 and says each second how
far it is (`progress.py`). A process is lost when its connection closes without a goodbye, when it is silent for
`SILENCE_SECONDS` (a machine that vanished, a frozen process), or when it neither moves nor says that it works for
`HANG_SECONDS` while others wait for it. Process 0 then tells all, and everyone ends with exit status 75: the same
command goes on from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dynamo_jax.hosts.cluster import host_name
from dynamo_jax.hosts.progress import PROGRESS, Progress, Standing

log = logging.getLogger("dynamo_jax")

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 30.0  # a busy host may starve a thread for seconds, not for so long
HANG_SECONDS = 40.0  # above the wall-clock limit of one answer's grading (`tasks/grading/verifier.py`) by default
CONNECT_SECONDS = 60.0
HELLO_SECONDS = 5.0
GREETING_BYTES = 1024
MESSAGE_BYTES = 4096

Ended = Callable[[str, int], None]  # reason, exit status; called from a thread


class Link:
    """One connection: a JSON object a line, each way."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.settimeout(SILENCE_SECONDS)
        self._lines = connection.makefile("rb")
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Raises `OSError` if the other end is gone."""
        with self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message, None at the end. Raises `TimeoutError` after `SILENCE_SECONDS`, `OSError`, `ValueError`."""
        line = self._lines.readline(MESSAGE_BYTES)
        return dict(json.loads(line)) if line else None


class Peers:
    """Watches over the `count` processes of a run; see the module. Each makes one, at the same time.

    `from_process_0(message)` gives what process 0 called it with, on every process. `ended(reason, status)` is called,
    once and from a thread, when a process is lost or called `fail`. Raises `ValueError` if process 0 cannot be reached.
    """

    def __init__(
        self,
        index: int,
        count: int,
        from_process_0: Callable[[dict[str, Any]], dict[str, Any]],
        ended: Ended,
        progress: Progress,
        host: str,
    ) -> None:
        self._index, self._count, self._ended, self._progress = index, count, ended, progress
        self._closed = threading.Event()
        self._over = threading.Lock()  # taken by whoever ends the run
        self._hosts = {self._index: host}
        self._standings: dict[int, Standing] = {}
        self._left: set[int] = set()  # processes that said goodbye
        if self._index == 0:
            port = int(os.environ.get("DYNAMO_JAX_PEERS_PORT", "0"))  # 0: any. For a firewall that lets one through
            with socket.create_server(("", port), backlog=1024) as server:
                greeting = {"addresses": _own_addresses(), "port": server.getsockname()[1],
                            "secret": secrets.token_hex(16), "host": self._hosts[0]}  # fmt: skip
                from_process_0(greeting)
                self._links = self._accept(server, greeting["secret"])
        else:
            greeting = from_process_0({})
            self._hosts[0] = greeting["host"]
            self._links = {0: self._connect(greeting)}
        for process in self._links:
            threading.Thread(target=self._receive, args=(process,), name=f"peer {process}", daemon=True).start()
        threading.Thread(target=self._beat, name="peers", daemon=True).start()

    def fail(self, reason: str, status: int) -> None:
        """This process ends with `status` although the others go on: they end with the same. Returns."""
        self._closed.set()
        if self._over.acquire(blocking=False):
            self._tell({"end": f"{self._name(self._index)} has ended: {reason}", "status": status})

    def close(self) -> None:
        """Say goodbye: this process ends, as all do."""
        self._closed.set()
        self._tell({"bye": True})

    # --- connections

    def _accept(self, server: socket.socket, secret: str) -> dict[int, Link]:
        links: dict[int, Link] = {}
        until = time.monotonic() + CONNECT_SECONDS
        while len(links) < self._count - 1:
            server.settimeout(max(until - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, self._count)) - links.keys())
                raise ValueError(f"processes {missing} did not connect to process 0. {_FIREWALL}") from None
            link = Link(connection)
            connection.settimeout(HELLO_SECONDS)
            try:
                hello = link.receive() or {}
            except (OSError, ValueError):
                continue  # a stranger, who may as well be silent
            if hello.get("secret") == secret:
                connection.settimeout(SILENCE_SECONDS)
                links[int(hello["process"])] = link
                self._hosts[int(hello["process"])] = str(hello["host"])
        return links

    def _connect(self, greeting: dict[str, Any]) -> Link:
        for address in greeting["addresses"]:
            with contextlib.suppress(OSError):
                link = Link(socket.create_connection((address, greeting["port"]), timeout=CONNECT_SECONDS / 4))
                link.send({"secret": greeting["secret"], "process": self._index, "host": self._hosts[self._index]})
                return link
        where = " or ".join(f"{address}:{greeting['port']}" for address in greeting["addresses"])
        raise ValueError(f"process 0 on {greeting['host']} cannot be reached at {where}. {_FIREWALL}")

    def _tell(self, message: dict[str, Any]) -> None:
        for link in self._links.values():
            with contextlib.suppress(OSError):  # whoever is gone already needs no word
                link.send(message)

    # --- threads

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            self._tell({"standing": self._progress.standing()})
            if self._index == 0:
                self._standings[0] = self._progress.standing()
                late = laggard(self._standings)
                if late is not None:
                    standing = self._standings[late]
                    doing = f"({standing.doing}) has not moved for {standing.idle:.0f} s"
                    self._end(f"{self._name(late)} {doing}, and others wait for it")

    def _receive(self, process: int) -> None:
        link = self._links[process]
        while True:
            try:
                message = link.receive()
            except TimeoutError:
                return self._end(f"nothing was heard of {self._name(process)} for {SILENCE_SECONDS:.0f} s")
            except ConnectionError:  # killed with something of ours unread, which resets the connection
                message = None
            except (OSError, ValueError) as error:
                return self._end(f"the connection to {self._name(process)} broke: {error}")
            if message is None:
                if process not in self._left:
                    self._end(f"{self._name(process)} died")
                return None
            if "bye" in message:
                self._left.add(process)
                self._standings.pop(process, None)
            elif "end" in message:
                return self._end(str(message["end"]), int(message["status"]), told=True)
            elif process not in self._left:
                self._standings[process] = Standing(*message["standing"])

    def _end(self, reason: str, status: int = os.EX_TEMPFAIL, told: bool = False) -> None:
        if self._closed.is_set() or not self._over.acquire(blocking=False):
            return
        self._closed.set()
        if not told and status == os.EX_TEMPFAIL:
            reason = f"{reason}. The run ends on all hosts; the same command goes on from the newest checkpoint."
        if self._index == 0:
            self._tell({"end": reason, "status": status})
        self._ended(reason, status)

    def _name(self, process: int) -> str:
        return f"process {process} of {self._count} on host {self._hosts.get(process, 'unknown')}"


def laggard(standings: dict[int, Standing]) -> int | None:
    """The process that others have waited for `HANG_SECONDS` for while it did not move. None if all is well."""
    for process, one in standings.items():
        if one.waiting or one.patient or one.idle < HANG_SECONDS:
            continue
        if any(o.waiting and o.arrived > one.arrived and o.idle >= HANG_SECONDS for o in standings.values()):
            return process
    return None


_FIREWALL = "Let the hosts of a run reach each other on all ports, or name an open one in DYNAMO_JAX_PEERS_PORT."


def _own_addresses() -> list[str]:
    """Where the other hosts may find this one, best first."""
    addresses = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 1))  # sends nothing; the kernel chooses the interface that leads outside
        addresses.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        addresses.append(socket.gethostbyname(socket.gethostname()))
    return list(dict.fromkeys([*addresses, "127.0.0.1"]))  # the last for several processes on one machine


def _from_process_0(message: dict[str, Any]) -> dict[str, Any]:
    """What process 0 gave, on every process."""
    text = json.dumps(message).encode().ljust(GREETING_BYTES)
    shared = multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))
    return dict(json.loads(np.asarray(shared).tobytes()))


@contextmanager
def watched(ended: Ended) -> Iterator[Peers | None]:
    """Watch over the other processes, if there are any, while the block runs. `ended` as for `Peers`."""
    if jax.process_count() == 1:
        yield None
        return
    peers = Peers(jax.process_index(), jax.process_count(), _from_process_0, ended, PROGRESS, host_name(os.environ))
    yield peers
    peers.close()
