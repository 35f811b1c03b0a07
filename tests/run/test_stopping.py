"""How a run stops before its end."""

import json
import os
import subprocess
import sys

import pytest

from dynamo_jax.run.stopping import Ending, Interrupted
from dynamo_jax.run.storage import TemporaryFailure

PROGRAM = """
import sys, threading, time
from pathlib import Path
from dynamo_jax.run.folder import RunFolder, Status
from dynamo_jax.run.stopping import Ending

ending = Ending()
folder = RunFolder(sys.argv[1])
ending.status = Status(folder, 150, ())
ending.status.__enter__()
if sys.argv[2] == "stuck":
    ending.status.end = lambda *_: time.sleep(60)
    import dynamo_jax.run.stopping
    dynamo_jax.run.stopping.LAST_WORD_SECONDS = 0.2
threading.Timer(0.1, getattr(ending, sys.argv[3]), args=sys.argv[4:5]).start()
time.sleep(60)  # the main thread waits for what will never come
"""


class Peers:
    def __init__(self):
        self.calls = []

    def fail(self, reason, status):
        self.calls.append((reason, status))

    def close(self):
        self.calls.append("bye")


def ended(folder, how, method):
    command = [sys.executable, "-c", PROGRAM, str(folder), how, method, "process 1 of 2 on host b died"]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


@pytest.mark.parametrize("method", ["lost", "hangs"])
def test_a_thread_ends_the_process_and_tells_why(tmp_path, method):
    done = ended(tmp_path / "run", "well", method)
    assert done.returncode == os.EX_TEMPFAIL
    assert "process 1 of 2 on host b died" in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "stopped"
    assert "process 1 of 2 on host b died" in status["message"]


def test_storage_that_hangs_does_not_hold_the_end_up(tmp_path):
    assert ended(tmp_path / "run", "stuck", "lost").returncode == os.EX_TEMPFAIL


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("data.jsonl:3: is no JSON"), ("data.jsonl:3: is no JSON", 2)),
        (OSError(28, "No space left on device"), ("[Errno 28] No space left on device", 2)),
        (KeyError("x"), ("'x'", 1)),
        (MemoryError(), ("MemoryError", 1)),
        (Interrupted(15, "saved"), "bye"),  # the others have raised it, too
        (TemporaryFailure("the bucket"), "bye"),
    ],
)
def test_what_one_process_alone_raises_ends_the_others(error, said):
    ending = Ending()
    ending.peers = Peers()
    assert not ending.announce(type(error), error, None)  # it is not swallowed
    assert ending.peers.calls == [said]


def test_a_good_end_announces_nothing():
    ending = Ending()
    ending.announce(None, None, None)
    ending.peers = Peers()
    ending.announce(None, None, None)
    assert ending.peers.calls == []
