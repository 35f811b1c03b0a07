"""A stand-in for `dynamo-jax` on the hosts of fake_gcloud.py: each attempt does what the test wrote down for it.

An attempt is {"step": 57, "state": "running", "exit": 75, "exits": {"host1": 2}, "holds": ["host0"], "deaf": true,
"preempt": [queue, node]}, all of it optional. Host 0 writes status.json if there is a step, and preempts the slice if
that is asked for. The hosts in `holds`, and all if the slice is preempted, wait for SIGTERM or for a file `release`.
`exits` gives single hosts an exit status of their own. A deaf one ignores SIGTERM.
"orphan": a child outlives it by a second, with all that it inherited.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from fake_gcloud import CLOUD, bucket, cloud


def main(words: list[str]) -> int:
    host = os.environ["FAKE_HOST"]
    with cloud() as state:
        count = state.setdefault("started", {}).get(host, 0)
        state["started"][host] = count + 1
        state.setdefault("trained", []).append({"host": host, "words": words, "folder": os.getcwd()})
        attempt = state["attempts"][min(count, len(state["attempts"]) - 1)]
    signal.signal(signal.SIGTERM, signal.SIG_IGN if attempt.get("deaf") else lambda *_: sys.exit(143))
    print(f"attempt {count} on {host}", flush=True)  # noqa: T201
    run_dir = next(word.partition("=")[2] for word in reversed(words) if word.startswith("run_dir="))
    if host == "host0" and "step" in attempt:
        status = {"state": attempt.get("state", "running"), "step": attempt["step"], "steps": 150, "message": 'a "b"'}
        folder = bucket(run_dir)
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}/new", "w") as file:
            json.dump(status, file)
        os.rename(f"{folder}/new", f"{folder}/status.json")
    if attempt.get("preempt") and host == "host0":
        with cloud() as state:
            state["queue"], state["node"] = attempt["preempt"]
    if attempt.get("orphan"):
        subprocess.Popen(["sleep", "1"], close_fds=False)
    while attempt.get("preempt") or host in attempt.get("holds", []):
        if os.path.exists(f"{CLOUD}/release"):
            break
        time.sleep(0.02)
    return int(attempt.get("exits", {}).get(host, attempt.get("exit", 0)))
