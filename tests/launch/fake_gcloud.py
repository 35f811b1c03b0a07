"""A stand-in for gcloud: it records every call, and keeps a slice of hosts and a bucket in the folder $FAKE_CLOUD.

`ssh --command` really runs the command, in bash, once for each host with a home folder of its own. What happens is in
`cloud.json`; tests write it and read it back:

    queue, node    states, or null where there is none; a list is walked through, one state a look
    on_create      what `queue` becomes when a slice is requested
    hosts          how many
    rules          [{"match": "tpu-vm ssh", "times": 2, "skip": 1, "status": 1, "stderr": "...", "hang": true}, ...]:
                   calls whose words contain `match` fail, but not the first `skip`, and `times` of them (default: all)
                   ("heard": true: after they did what was asked)
    attempts       what the trainer does when it is started for the nth time; see fake_trainer.py

It is started hundreds of times, so it imports as little as it can.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys

CLOUD = os.environ["FAKE_CLOUD"]


class cloud:
    """The state, locked, and saved at the end: `with cloud() as state`."""

    def __enter__(self) -> dict:
        self.lock = open(f"{CLOUD}/cloud.lock", "w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        with open(f"{CLOUD}/cloud.json") as file:
            self.state = json.load(file)
        return self.state

    def __exit__(self, *error: object) -> None:
        with open(f"{CLOUD}/cloud.json.new", "w") as file:
            json.dump(self.state, file)
        os.rename(f"{CLOUD}/cloud.json.new", f"{CLOUD}/cloud.json")
        self.lock.close()


def main(words: list[str]) -> int:
    with open(f"{CLOUD}/calls.jsonl", "a") as calls:
        calls.write(json.dumps(words) + "\n")
    with cloud() as state:
        rule = next((rule for rule in state["rules"] if matches(rule, " ".join(words))), None)
    if rule:
        if rule.get("heard"):
            obey(words)
        if rule.get("hang"):
            import time

            time.sleep(60)
        sys.stderr.write(rule.get("stderr", "ERROR: (gcloud) UNAVAILABLE: try again\n"))
        return int(rule.get("status", 1))
    return obey(words)


def obey(words: list[str]) -> int:
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--"))
    names = [word for word in words if not word.startswith("--")]
    match names:
        case ["storage", "cat", address]:
            return cat(address)
        case ["storage", "rsync", source, target]:
            import shutil

            shutil.copytree(bucket(source), target, dirs_exist_ok=True)
            return 0
        case ["compute", "tpus", group, verb, *rest]:
            assert flags["zone"] == "us-west4-a"
            assert flags["project"] == "mine"
            return {
                "queued-resources describe": describe,
                "tpu-vm describe": describe,
                "queued-resources create": create,
                "queued-resources delete": delete,
                "tpu-vm ssh": ssh,
                "tpu-vm scp": scp,
            }[f"{group} {verb}"](flags, group, *rest)
    raise AssertionError(words)


def matches(rule: dict, call: str) -> bool:
    if rule["match"] not in call:
        return False
    rule["seen"] = rule.get("seen", 0) + 1
    return 0 < rule["seen"] - rule.get("skip", 0) <= rule.get("times", 1000)


def error(text: str) -> int:
    sys.stderr.write(f"ERROR: (gcloud.compute.tpus) {text}\n")
    return 1


def bucket(address: str) -> str:
    return f"{CLOUD}/bucket/{address.removeprefix('gs://')}"


def cat(address: str) -> int:
    if not os.path.isfile(bucket(address)):
        sys.stderr.write(f"ERROR: (gcloud.storage.cat) The following URLs matched no objects or files:\n-{address}\n")
        return 1
    with open(bucket(address)) as file:
        sys.stdout.write(file.read())
    return 0


def describe(flags: dict, group: str, name: str) -> int:
    key = "queue" if group == "queued-resources" else "node"
    with cloud() as state:
        now = state[key]
        if isinstance(now, list):
            now, rest = now[0], now[1:]
            state[key] = rest if len(rest) > 1 else rest[0]
    if now is None:
        return error(f"NOT_FOUND: Resource 'projects/mine/locations/us-west4-a/{group}/{name}' was not found")
    if "failedData" in flags["format"]:
        now = "no capacity"
    sys.stdout.write(now + "\n")
    return 0


def create(flags: dict, group: str, name: str) -> int:
    with cloud() as state:
        if state["queue"] is not None:
            return error("ALREADY_EXISTS: Resource already exists")
        state["queue"], state["node"] = state["on_create"], "READY"
    return 0


def delete(flags: dict, group: str, name: str) -> int:
    with cloud() as state:
        if state["queue"] is None:
            return error("NOT_FOUND: Resource was not found")
        state["queue"], state["node"] = ["DELETING", None], None
        hosts = state["hosts"]
    import shutil

    for home in (f"{CLOUD}/host{n}" for n in range(hosts)):
        if os.path.exists(f"{home}/dynamo_jax/pid"):
            with open(f"{home}/dynamo_jax/pid") as file:
                pid = int(file.read())
            if os.path.exists(f"/proc/{pid}"):
                os.kill(pid, 9)
        shutil.rmtree(home, ignore_errors=True)
    return 0


def homes(flags: dict) -> list[str]:
    with cloud() as state:
        assert state["node"] == "READY", state["node"]
        chosen = range(state["hosts"]) if flags["worker"] == "all" else [int(flags["worker"])]
    found = [f"{CLOUD}/host{n}" for n in chosen]
    for home in found:
        os.makedirs(home, exist_ok=True)
    return found


def scp(flags: dict, group: str, source: str, target: str) -> int:
    import shutil

    for home in homes(flags):
        shutil.copy(source, f"{home}/{target.partition(':')[2]}")
    return 0


def ssh(flags: dict, group: str, name: str) -> int:
    with cloud() as state:
        if state["node"] != "READY":
            return error(f'This TPU has terminal state "{state["node"]}", so it cannot be used anymore.')
    # As gcloud does: split at spaces, and joined by ssh for the login shell.
    command = " ".join(flags["command"].split(" "))
    children = []
    for home in homes(flags):
        environment = {
            "HOME": home,
            "PATH": f"{CLOUD}/host_bin:/usr/bin:/bin",
            "FAKE_CLOUD": CLOUD,
            "FAKE_HOST": os.path.basename(home),
        }
        child = os.fork()
        if child == 0:
            os.chdir(home)
            os.execve("/bin/bash", ["bash", "-c", command], environment)  # noqa: S606
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return next((status for status in statuses if status), 0)
