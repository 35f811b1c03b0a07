"""A process is lost: noticed, named and told to all. Three watchers in one process, over real connections."""

import json
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from dynamo_jax.hosts import peers as module
from dynamo_jax.hosts.peers import Link, Peers, laggard, watched
from dynamo_jax.hosts.progress import Progress, Standing

COUNT = 3


class Host:
    """One process: its progress, its watcher, and what it was told."""

    def __init__(self, index: int, greetings: list[queue.Queue[dict]]) -> None:
        self.progress = Progress()
        self.ended: queue.Queue[tuple[str, int]] = queue.Queue()

        def from_process_0(message: dict) -> dict:
            if index == 0:
                for greeting in greetings:
                    greeting.put(message)
            return greetings[index].get(timeout=10)

        def end(reason: str, status: int) -> None:
            self.ended.put((reason, status))

        self.peers = Peers(index, COUNT, from_process_0, end, self.progress, f"host{index}")

    def die(self) -> None:
        """As the kernel does for a killed process: the connections close, and nothing is said."""
        self.peers._closed.set()
        for link in self.peers._links.values():
            link._socket.shutdown(socket.SHUT_RDWR)

    def told(self, seconds: float = 5.0) -> tuple[str, int]:
        return self.ended.get(timeout=seconds)


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Host]]:
    for name, value in (("BEAT_SECONDS", 0.05), ("SILENCE_SECONDS", 1.0), ("HANG_SECONDS", 0.5)):
        monkeypatch.setattr(module, name, value)
    greetings: list[queue.Queue[dict]] = [queue.Queue() for _ in range(COUNT)]
    made: dict[int, Host] = {}
    threads = [
        threading.Thread(target=lambda i=i: made.__setitem__(i, Host(i, greetings)), daemon=True) for i in range(COUNT)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    yield [made[i] for i in range(COUNT)]
    for host in made.values():
        host.peers.close()


def test_a_run_that_ends_well_accuses_nobody(hosts):
    time.sleep(0.3)
    for host in hosts:
        host.peers.close()
    time.sleep(0.3)
    for host in hosts:
        host.die()
    time.sleep(0.3)
    assert all(host.ended.empty() for host in hosts)


@pytest.mark.parametrize("victim", [1, 2])
def test_a_death_is_told_to_all_with_its_host(hosts, victim):
    began = time.monotonic()
    hosts[victim].die()
    for host in hosts:
        if host is not hosts[victim]:
            reason, status = host.told()
            assert f"process {victim} of 3 on host host{victim} died" in reason
            assert "goes on from the newest checkpoint" in reason
            assert status == os.EX_TEMPFAIL
    assert time.monotonic() - began < 2


def test_the_death_of_process_0_is_noticed_by_each(hosts):
    hosts[0].die()
    for host in hosts[1:]:
        assert "process 0 of 3 on host host0 died" in host.told()[0]


def test_a_frozen_process_is_noticed_by_its_silence(hosts):
    hosts[1].peers._closed.set()  # its threads say nothing more, its connection stays
    for host in (hosts[0], hosts[2]):
        assert "nothing was heard of process 1 of 3 on host host1" in host.told()[0]


def test_a_process_that_does_not_move_while_others_wait_is_named(hosts):
    def wait(host: Host) -> None:
        with host.progress.meeting():
            time.sleep(3)

    for host in (hosts[0], hosts[1]):
        threading.Thread(target=wait, args=(host,), daemon=True).start()
    with hosts[2].progress.doing("grade"):
        for host in hosts:
            assert "process 2 of 3 on host host2 (grade) has not moved for" in host.told()[0]


def test_a_process_that_says_that_it_works_is_waited_for(hosts):
    def wait(host: Host) -> None:
        with host.progress.meeting():
            time.sleep(1.5)

    threads = [threading.Thread(target=wait, args=(host,)) for host in hosts[:2]]
    for thread in threads:
        thread.start()
    with hosts[2].progress.doing("grade"):
        for _ in range(12):
            time.sleep(0.1)
            hosts[2].progress.pulse()
    assert all(host.ended.empty() for host in hosts)
    for thread in threads:
        thread.join()


def test_a_failure_ends_all_with_its_status_and_reason(hosts):
    hosts[2].peers.fail("data/train.jsonl:3: is no JSON", 2)
    for host in hosts[:2]:
        assert host.told() == ("process 2 of 3 on host host2 has ended: data/train.jsonl:3: is no JSON", 2)
    assert hosts[2].ended.empty()


def standing(arrived=5, waiting=False, patient=False, idle=100.0):
    return Standing(arrived, waiting, patient, idle, "step")


@pytest.mark.parametrize(
    ("one", "others", "late"),
    [
        (standing(), [standing(6, waiting=True)], True),
        (standing(), [standing(6, waiting=True), standing(6)], True),
        (standing(6), [standing(6, waiting=True)], False),  # it has been there: what they wait for is the device
        (standing(waiting=True), [standing(6, waiting=True)], False),
        (standing(patient=True), [standing(6, waiting=True)], False),  # it compiles
        (standing(idle=1), [standing(6, waiting=True)], False),  # it has moved
        (standing(), [standing(6, waiting=True, idle=1)], False),  # nobody has waited long
        (standing(), [standing(6)], False),
    ],
)
def test_laggard(one, others, late):
    standings = {7: one} | dict(enumerate(others))
    assert (laggard(standings) == 7) is late


def test_strangers_are_not_taken_for_a_process(monkeypatch):
    """A port scanner, and a process that does not know the run's secret, change nothing."""
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.5)
    greetings: queue.Queue[dict] = queue.Queue()

    def strangers(message: dict) -> dict:
        greetings.put(message)
        for text in (
            b"GET / HTTP/1.1\r\n\r\n",
            json.dumps({"secret": "no", "process": 1, "host": "x"}).encode() + b"\n",
        ):
            connection = socket.create_connection(("127.0.0.1", message["port"]))
            connection.sendall(text)
        return message

    with pytest.raises(ValueError, match=r"processes \[1\] did not connect to process 0.*DYNAMO_JAX_PEERS_PORT"):
        Peers(0, 2, strangers, lambda *_: None, Progress(), "host0")


def test_a_silent_stranger_keeps_nobody_out(monkeypatch):
    monkeypatch.setattr(module, "HELLO_SECONDS", 0.2)
    greetings: queue.Queue[dict] = queue.Queue()
    held = []

    def first_a_stranger(message: dict) -> dict:
        held.append(socket.create_connection(("127.0.0.1", message["port"])))
        greetings.put(message)
        return message

    def join() -> None:
        held.append(Peers(1, 2, lambda _: greetings.get(timeout=10), lambda *_: None, Progress(), "host1"))

    joining = threading.Thread(target=join)
    joining.start()
    zero = Peers(0, 2, first_a_stranger, lambda *_: None, Progress(), "host0")
    joining.join(10)
    assert zero._hosts == {0: "host0", 1: "host1"}
    for peers in (zero, held[-1]):
        peers.close()


def test_an_unreachable_process_0_is_an_error_with_a_remedy():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    greeting = {"addresses": ["127.0.0.1"], "port": port, "secret": "s", "host": "host0"}
    with pytest.raises(
        ValueError, match=rf"process 0 on host0 cannot be reached at 127.0.0.1:{port}.*firewall|all ports"
    ):
        Peers(1, 2, lambda _: greeting, lambda *_: None, Progress(), "host1")


def test_messages_are_bounded_and_never_unpickled():
    ours, theirs = socket.socketpair()
    link = Link(ours)
    theirs.sendall(b"x" * 100_000 + b"\n")
    with pytest.raises(ValueError, match=r"JSON|Expecting"):
        link.receive()


def test_one_process_has_nobody_to_watch():
    with pytest.raises(KeyError), watched(lambda *_: None):
        raise KeyError
