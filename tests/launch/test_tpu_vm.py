"""launch/tpu_vm.sh against a stand-in for gcloud whose hosts run the remote commands in a real bash."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
BUCKET_RUN = "gs://bucket/runs/tiny"
SETTINGS = {"TPU_NAME": "slice", "ZONE": "us-west4-a", "PROJECT": "mine", "BUCKET": "bucket"}
SETTINGS |= {"ACCELERATOR_TYPE": "v5litepod-16", "RUNTIME_VERSION": "v2-alpha-tpuv5-lite"}
PLACE = ["--zone=us-west4-a", "--project=mine", "--quiet"]
TPUS = ["compute", "tpus"]
SUPERVISE = ["supervise", "configs/tiny.yaml", "--spot"]


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(LAUNCH, folder / "launch")
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny.yaml").write_text("trainer: {steps: 150}\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "all")
    return folder


class Cloud:
    def __init__(self, folder: Path, checkout: Path) -> None:
        self.folder, self.script = folder, checkout / "launch" / "tpu_vm.sh"
        for program in ("gcloud", "trainer"):  # imported, so that Python compiles them once
            code = f"import sys; sys.path[0] = '{HERE}'; from fake_{program} import main; sys.exit(main(sys.argv[1:]))"
            executable(folder / program, f'#!/bin/sh\nexec {sys.executable} -S -E -c "{code}" "$@"\n')
        (folder / "bin").mkdir()
        (folder / "gcloud").rename(folder / "bin" / "gcloud")
        install = f"echo $* >>$HOME/pip.log\ncp {folder}/trainer ${{0%/*}}/dynamo-jax\n"
        executable(folder / "pip", f"#!/bin/bash\n[ $1 = install ] || exit 0\n{install}")
        shutil.copytree(folder / "bin", folder / "host_bin")
        make_venv = f"mkdir -p ${{!#}}/bin && cp {folder}/pip ${{!#}}/bin/pip\n"
        executable(folder / "host_bin" / "python3.13", f"#!/bin/bash\n[ $1 = -c ] && exit\n{make_venv}")
        self.environment = SETTINGS | {
            "PATH": f"{folder}/bin:/usr/bin:/bin",
            "FAKE_CLOUD": str(folder),
            "HOME": "/none",
        }
        self.state: dict[str, Any] = {"queue": None, "node": None, "hosts": 2, "rules": [], "attempts": [{}]}
        self.set(on_create=["WAITING_FOR_RESOURCES", "ACTIVE"])

    def set(self, **changes: Any) -> None:
        if (self.folder / "cloud.json").exists():
            self.state = json.loads((self.folder / "cloud.json").read_text())
        self.state |= changes
        (self.folder / "cloud.json").write_text(json.dumps(self.state))

    def get(self, key: str) -> Any:
        return json.loads((self.folder / "cloud.json").read_text()).get(key, [])

    def command(self, words: tuple[str, ...]) -> list[str]:
        quick = ["--poll=0", "--backoff=0", "--call-timeout=10", "--setup-timeout=10"]
        return [str(self.script), words[0], *quick, *words[1:]]

    def run(self, *words: str, stdin: Any = subprocess.DEVNULL, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in (self.environment | settings).items() if value}
        command = self.command(words)
        return subprocess.run(command, env=environment, stdin=stdin, capture_output=True, text=True, timeout=30)

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = self.command(words)
        return subprocess.Popen(
            command, env=self.environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def calls(self, part: str = "") -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if part in " ".join(call)]

    def trained(self, host: str) -> list[list[str]]:
        return [entry["words"] for entry in self.get("trained") if entry["host"] == host]

    def home(self, host: int = 0) -> Path:
        return self.folder / f"host{host}" / "dynamo_jax"

    def put_status(self, state: str, step: int) -> None:
        folder = self.folder / "bucket" / "bucket" / "runs" / "tiny"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "status.json").write_text(json.dumps({"state": state, "step": step, "steps": 150, "message": ""}))

    def set_up(self, **changes: Any) -> None:
        """Hosts as `setup` leaves them, but faster."""
        self.set(queue="ACTIVE", node="READY", **changes)
        checkout = self.script.parents[1]
        commit = subprocess.run(
            ["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        for host in range(self.state["hosts"]):
            (self.home(host) / "venv" / "bin").mkdir(parents=True)
            for folder in ("checkout", "logs"):
                (self.home(host) / folder).mkdir()
            shutil.copy(self.folder / "trainer", self.home(host) / "venv" / "bin" / "dynamo-jax")
            shutil.copy(LAUNCH / "worker.sh", self.home(host))
            (self.home(host) / "stamp").write_text(f"{commit.stdout.strip()},-,-\n")

    def wait(self, holds: Callable[[], bool]) -> None:
        for _ in range(500):
            if holds():
                return
            time.sleep(0.02)
        raise AssertionError("waited for nothing")

    def ended(self, host: int = 0) -> str:
        self.wait(lambda: (self.home(host) / "exit").exists())
        return (self.home(host) / "exit").read_text().strip()


@pytest.fixture
def cloud(tmp_path: Path, checkout: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path, checkout)
    yield cloud
    (tmp_path / "release").touch()
    for pid in tmp_path.glob("host*/dynamo_jax/pid"):
        if not (pid.parent / "exit").exists():
            try:
                os.kill(int(pid.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                continue


HOLD = {"step": 1, "holds": ["host0", "host1"]}
COMPLETE = {"step": 150, "state": "complete"}


def test_shellcheck() -> None:
    binary = Path(sys.executable).parent / "shellcheck"
    names = sorted(path.name for path in LAUNCH.glob("*.sh"))
    assert "tpu_vm.sh" in names
    command = [str(binary), *(f"launch/{name}" for name in names)]
    result = subprocess.run(command, cwd=LAUNCH.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_help_needs_no_settings(cloud: Cloud) -> None:
    result = cloud.run("create", "--help", **dict.fromkeys(SETTINGS, ""))
    assert result.returncode == 0
    assert all(f"{variable} " in result.stdout for variable in SETTINGS)


# --- dry runs


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["create", "--spot"], ["queued-resources create slice"]),
        (["setup"], ["git -C", "tpu-vm scp", "worker.sh setup"]),
        (["run", "configs/tiny.yaml", "eval.k=[1, 8]"], ["worker.sh start tiny configs/tiny.yaml"]),
        (["logs"], ["worker.sh log 50 follow"]),
        (["status", "configs/tiny.yaml"], ["queued-resources describe", "worker.sh state", "storage cat"]),
        (["stop"], ["worker.sh stop 120 user"]),
        (["delete"], ["queued-resources delete slice --force"]),
        (
            [*SUPERVISE, "--delete-when-done"],
            ["queued-resources create", "tpu-vm scp", "worker.sh start", "queued-resources delete"],
        ),
    ],
)
def test_dry_run_prints_commands_and_runs_none(cloud: Cloud, words: list[str], expected: list[str]) -> None:
    result = cloud.run(*words, "--dry-run")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    at = [next(i for i, line in enumerate(lines) if part in line) for part in expected]
    assert at == sorted(at)
    assert cloud.calls() == []
    assert not list(cloud.folder.glob("host?"))
    # What is printed is what would be run: pasted into a shell, gcloud sees the same words.
    assert all(shlex.split(line)[0] in ("gcloud", "git") for line in lines)
    # Nor is anything known: no step of the run, no state of the slice that is not marked as assumed.
    assert not re.search(r"step -1|\?|complete at", result.stderr)
    assert all(" dry run: " in line for line in result.stderr.splitlines())


def test_dry_run_can_be_pasted(cloud: Cloud) -> None:
    override = 'task.train=[it\'s "a b".jsonl, $HOME/`x`]'
    cloud.set_up()
    printed = cloud.run("run", "configs/tiny.yaml", override, "--dry-run").stdout.splitlines()[-1]
    subprocess.run(["bash", "-c", printed], env=cloud.environment, check=True)
    assert cloud.ended() == "exit:0"
    assert cloud.trained("host0") == [["train", "configs/tiny.yaml", f"run_dir={BUCKET_RUN}", override]]


# --- settings


def test_all_missing_settings_are_named_before_any_call(cloud: Cloud) -> None:
    result = cloud.run("supervise", "configs/tiny.yaml", ACCELERATOR_TYPE="", RUNTIME_VERSION="", BUCKET="")
    assert result.returncode == 2
    for part in (
        "--accelerator-type or ACCELERATOR_TYPE",
        "--runtime-version or RUNTIME_VERSION",
        "--bucket or BUCKET",
    ):
        assert part in result.stderr
    assert "--spot, --on-demand or --reserved" in result.stderr
    assert cloud.calls() == []


@pytest.mark.parametrize("verb", ["create", "setup", "run", "logs", "status", "stop", "delete", "supervise"])
def test_every_command_needs_a_place(cloud: Cloud, verb: str) -> None:
    result = cloud.run(verb, TPU_NAME="", ZONE="", PROJECT="")
    assert result.returncode == 2
    for part in ("--name or TPU_NAME", "--zone or ZONE", "--project or PROJECT"):
        assert part in result.stderr
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create"], "--spot, --on-demand or --reserved"),
        (["create", "--spot", "--on-demand"], "one of them"),
        (["run", "configs/tiny.yaml", "steps"], "not an override"),
        (["run", "configs/missing.yaml"], "commit it"),
        (["run"], "which CONFIG"),
        (["setup", "--pol=1"], "no such flag"),
        (["setup", "--retries=x"], "not a number"),
        (["setup", "--zone"], "needs a value"),
        (["stop", "configs/tiny.yaml"], "takes no"),
        (["launch"], "no such command"),
        ([*SUPERVISE, "run_dir=runs/here"], "would be lost"),
        (["delete"], "--yes"),
    ],
)
def test_mistakes_exit_2_before_any_call(cloud: Cloud, words: list[str], message: str) -> None:
    result = cloud.run(*words)
    assert (result.returncode, cloud.calls()) == (2, [])
    assert message in result.stderr


# --- create and delete


@pytest.mark.parametrize(("kind", "flags"), [("spot", ["--spot"]), ("on-demand", []), ("reserved", ["--reserved"])])
def test_create(cloud: Cloud, kind: str, flags: list[str]) -> None:
    assert cloud.run("create", f"--{kind}").returncode == 0
    words = ["--node-id=slice", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--async"]
    expected = [*TPUS, "queued-resources", "create", "slice", *words, *flags, *PLACE]
    assert cloud.calls("create") == [expected]


def test_create_passes_flags_on(cloud: Cloud) -> None:
    result = cloud.run(
        "create",
        "--spot",
        "--valid-until-duration=6h",
        "--create-flag=--internal-ips",
        "--name",
        "b",
        "--zone=us-west4-a",
    )
    assert result.returncode == 0
    call = cloud.calls("create")[0]
    assert call[4] == "b"
    assert {"--valid-until-duration=6h", "--internal-ips", "--node-id=b"} <= set(call)


def test_create_and_delete_are_idempotent(cloud: Cloud) -> None:
    cloud.set(queue="WAITING_FOR_RESOURCES")
    assert cloud.run("create", "--spot").returncode == 0
    assert cloud.calls(" create ") == []
    result = cloud.run("delete", "--yes")
    assert result.returncode == 0
    assert cloud.calls(" delete ") == [[*TPUS, "queued-resources", "delete", "slice", "--force", "--async", *PLACE]]
    assert cloud.get("queue") is None
    assert cloud.run("delete", "--yes").returncode == 0
    assert len(cloud.calls(" delete ")) == 1


def test_a_request_that_was_heard_and_answered_too_late(cloud: Cloud) -> None:
    cloud.set(rules=[{"match": " create ", "times": 1, "heard": True}])
    assert cloud.run("create", "--spot").returncode == 0
    assert len(cloud.calls(" create ")) == 2


def test_create_where_a_dead_one_is(cloud: Cloud) -> None:
    cloud.set(queue="SUSPENDED")
    result = cloud.run("create", "--spot")
    assert (result.returncode, cloud.calls(" create ")) == (1, [])
    assert "delete it first" in result.stderr


@pytest.mark.parametrize(("answer", "status", "left"), [("n", 1, "ACTIVE"), ("y", 0, None)])
def test_delete_asks_on_a_terminal(cloud: Cloud, answer: str, status: int, left: str | None) -> None:
    cloud.set(queue="ACTIVE", node="READY")
    master, slave = pty.openpty()
    os.write(master, f"{answer}\n".encode())
    assert cloud.run("delete", stdin=slave).returncode == status
    assert cloud.get("queue") == left
    os.close(master)
    os.close(slave)


# --- setup


def test_setup_on_all_hosts_once(cloud: Cloud, checkout: Path) -> None:
    (cloud.folder / "bucket" / "box" / "d").mkdir(parents=True)
    (cloud.folder / "bucket" / "box" / "d" / "train.jsonl").write_text("{}")
    cloud.set(queue=["PROVISIONING", "ACTIVE"], node=["CREATING", "READY"])
    assert cloud.run("setup", "--data=gs://box/d", "--connect-flag=--internal-ip").returncode == 0
    for host in (0, 1):
        assert (cloud.home(host) / "checkout" / "configs" / "tiny.yaml").exists()
        assert (cloud.home(host) / "checkout" / "data" / "train.jsonl").read_text() == "{}"
        assert (cloud.home(host).parent / "pip.log").read_text() == "install --quiet .[tpu,gcs]\n"
    assert all({"--worker=all", "--internal-ip"} <= set(call) for call in cloud.calls("tpu-vm s"))

    assert cloud.run("setup", "--data=gs://box/d").returncode == 0
    assert len(cloud.calls("scp")) == 1
    assert cloud.run("setup", "--data=gs://box/d", "--again").returncode == 0
    assert len(cloud.calls("scp")) == 2
    assert (cloud.home().parent / "pip.log").read_text().count(".[tpu,gcs]") == 2


def test_setup_of_another_commit_replaces_the_checkout_and_keeps_the_data(cloud: Cloud, checkout: Path) -> None:
    other = cloud.folder / "other"
    shutil.copytree(checkout, other)
    cloud.set(queue="ACTIVE", node="READY", hosts=1)
    assert cloud.run("setup").returncode == 0
    (cloud.home() / "checkout" / "data" / "mine").touch()
    git(other, "mv", "configs/tiny.yaml", "configs/new.yaml")
    git(other, "commit", "--quiet", "-m", "new")
    (other / "configs" / "uncommitted.yaml").touch()
    cloud.script = other / "launch" / "tpu_vm.sh"
    result = cloud.run("setup")
    assert result.returncode == 0
    assert "uncommitted changes" in result.stderr
    assert [path.name for path in (cloud.home() / "checkout" / "configs").iterdir()] == ["new.yaml"]
    assert (cloud.home() / "checkout" / "data" / "mine").exists()


def test_setup_brings_python_with_uv_where_it_is_old(cloud: Cloud) -> None:
    host_bin = cloud.folder / "host_bin"
    for python in ("python3.13", "python3.12", "python3.11"):
        executable(host_bin / python, "#!/bin/bash\nexit 1\n")
    uv = f"mkdir -p ${{!#}}/bin && cp {cloud.folder}/pip ${{!#}}/bin/pip && echo $* >>$HOME/uv.log"
    install = f"mkdir -p $7/bin && printf '#!/bin/bash\\n%s' '{uv}' >$7/bin/uv && chmod +x $7/bin/uv"
    executable(host_bin / "python3", f"#!/bin/bash\n[ $1 = -m ] || exit 1\n{install}\n")
    cloud.set(queue="ACTIVE", node="READY", hosts=1)
    assert cloud.run("setup").returncode == 0
    assert "--python >=3.11,<3.14 --seed" in (cloud.home().parent / "uv.log").read_text()
    assert (cloud.home() / "venv" / "bin" / "dynamo-jax").exists()


def test_setup_says_what_to_do_where_there_is_no_python(cloud: Cloud) -> None:
    for python in ("python3.13", "python3.12", "python3.11", "python3"):
        executable(cloud.folder / "host_bin" / python, "#!/bin/bash\nexit 1\n")
    cloud.set(queue="ACTIVE", node="READY")
    result = cloud.run("setup")
    assert result.returncode == 1
    assert "access to PyPI" in result.stderr
    assert len(cloud.calls("worker.sh setup")) == 1
    assert cloud.run("run", "configs/tiny.yaml").returncode == 1
    assert cloud.get("trained") == []


# --- run, logs, status, stop


OVERRIDES = ["eval.k=[1, 8]", "task.train=[a  b.jsonl, 'c']", 'run_note="$(touch x)" \\ `id` & ; |*', "x=%s\n-- $'"]


def test_run_starts_all_hosts_with_these_very_words(cloud: Cloud) -> None:
    cloud.set_up()
    assert cloud.run("run", "configs/tiny.yaml", *OVERRIDES).returncode == 0
    for host in (0, 1):
        assert cloud.ended(host) == "exit:0"
        assert cloud.trained(f"host{host}") == [["train", "configs/tiny.yaml", f"run_dir={BUCKET_RUN}", *OVERRIDES]]
    assert {entry["folder"] for entry in cloud.get("trained")} == {str(cloud.home(n) / "checkout") for n in (0, 1)}
    assert "--worker=all" in cloud.calls("worker.sh start")[0]
    assert "attempt 0 on host1" in (cloud.home(1) / "logs" / "tiny.log").read_text()


def test_run_and_stop_before_setup(cloud: Cloud) -> None:
    cloud.set(queue="ACTIVE", node="READY")
    result = cloud.run("run", "configs/tiny.yaml")
    assert result.returncode == 1
    assert "`setup` first" in result.stderr
    assert cloud.run("stop").returncode == 0
    assert len(cloud.calls("worker.sh start")) == 1
    assert len(cloud.calls("worker.sh stop")) == 1


def test_a_run_of_ones_own_folder(cloud: Cloud) -> None:
    cloud.set_up()
    assert cloud.run("run", "configs/tiny.yaml", "run_dir=gs://else/where", "--run=mine", BUCKET="").returncode == 0
    assert cloud.ended() == "exit:0"
    assert cloud.trained("host0") == [["train", "configs/tiny.yaml", "run_dir=gs://else/where"]]
    assert (cloud.home() / "logs" / "mine.log").exists()


def test_run_while_it_runs_then_stop(cloud: Cloud) -> None:
    cloud.set_up(attempts=[HOLD])
    assert cloud.run("run", "configs/tiny.yaml").returncode == 0
    pid = int((cloud.home() / "pid").read_text())
    assert os.getsid(pid) not in (os.getsid(0), pid)  # in a session of its own, which the process waiting for it leads
    again = cloud.run("run", "configs/tiny.yaml")
    assert again.returncode == 0
    assert "on 2 of 2 host(s) already" in again.stderr
    assert cloud.run("run", "configs/tiny.yaml", "--run=other").returncode == 1
    assert cloud.run("setup", "--again").returncode == 1
    status = cloud.run("status", "configs/tiny.yaml").stdout
    assert status.count("tiny running") == 2
    assert "step 1 of 150" in status
    assert len(cloud.calls("worker.sh start")) == 1

    assert cloud.run("stop").returncode == 0
    assert (cloud.ended(0), cloud.ended(1)) == ("stopped:143", "stopped:143")
    assert len(cloud.get("trained")) == 2


def test_a_race_of_two_starts_has_one_winner(cloud: Cloud) -> None:
    cloud.set_up(attempts=[HOLD], hosts=1)
    command = ["bash", "dynamo_jax/worker.sh", "start", "tiny", "configs/tiny.yaml", f"run_dir={BUCKET_RUN}"]
    environment = cloud.environment | {"HOME": str(cloud.home().parent), "FAKE_HOST": "host0"}
    racers = [subprocess.Popen(command, cwd=cloud.home().parent, env=environment) for _ in range(2)]
    assert [racer.wait(timeout=10) for racer in racers] == [0, 0]
    command[3] = "other"
    assert subprocess.run(command, cwd=cloud.home().parent, env=environment).returncode == 10
    cloud.wait(lambda: bool(cloud.get("trained")))
    assert len(cloud.get("trained")) == 1


def test_what_outlives_the_trainer_does_not_keep_the_next_from_starting(cloud: Cloud) -> None:
    cloud.set_up(attempts=[{"orphan": True}], hosts=1)
    cloud.run("run", "configs/tiny.yaml")
    cloud.wait(lambda: "exit status 0" in (cloud.home() / "logs" / "tiny.log").read_text())
    assert cloud.ended() == "exit:0"
    result = cloud.run("run", "configs/tiny.yaml")
    assert "already" not in result.stderr
    cloud.wait(lambda: len(cloud.get("trained")) == 2)


def test_stop_kills_what_does_not_listen(cloud: Cloud) -> None:
    cloud.set_up(attempts=[HOLD | {"deaf": True}], hosts=1)
    assert cloud.run("run", "configs/tiny.yaml").returncode == 0
    cloud.wait(lambda: "attempt" in (cloud.home() / "logs" / "tiny.log").read_text())
    result = cloud.run("stop", "--grace=0")
    assert result.returncode == 0
    assert cloud.ended() == "stopped:137"
    assert cloud.run("stop").returncode == 0


def test_logs(cloud: Cloud) -> None:
    cloud.set_up()
    cloud.run("run", "configs/tiny.yaml")
    cloud.ended(1)
    result = cloud.run("logs", "--worker", "1", "--lines=20", "--no-follow")
    assert "attempt 0 on host1" in result.stdout
    expected = [*TPUS, "tpu-vm", "ssh", "slice", "--worker=1", "--command=bash dynamo_jax/worker.sh log 20", *PLACE]
    assert cloud.calls()[-1] == expected


# --- supervise


def test_a_run_without_a_status_has_no_step(cloud: Cloud) -> None:
    cloud.set_up(attempts=[{"exit": 1}], hosts=1)
    assert f"run {BUCKET_RUN}: has not begun" in cloud.run("status", "configs/tiny.yaml").stdout
    result = cloud.run(*SUPERVISE, "--max-failures=1")
    assert "the run ended at an unknown step (exit:1)" in result.stderr
    assert "step -1" not in result.stderr


def test_supervise_from_nothing_to_complete(cloud: Cloud) -> None:
    cloud.set(attempts=[COMPLETE])
    result = cloud.run(*SUPERVISE, "eval.k=[1, 8]")
    assert result.returncode == 0, result.stderr
    assert cloud.trained("host1") == [["train", "configs/tiny.yaml", f"run_dir={BUCKET_RUN}", "eval.k=[1, 8]"]]
    assert len(cloud.calls(" create ")) == 1
    assert cloud.calls(" delete ") == []
    last = result.stderr.splitlines()[-1]
    assert "COST MONEY" in last
    assert "launch/tpu_vm.sh delete --name=slice --zone=us-west4-a --project=mine" in last
    assert all(line[:4].isdigit() for line in result.stderr.splitlines())  # each with its time


def test_supervise_deletes_when_done(cloud: Cloud) -> None:
    cloud.set_up(attempts=[COMPLETE], hosts=1)
    result = cloud.run(*SUPERVISE, "--delete-when-done")
    assert result.returncode == 0
    assert cloud.get("queue") is None
    assert "COST MONEY" not in result.stderr


def test_supervise_does_nothing_for_a_complete_run(cloud: Cloud) -> None:
    cloud.put_status("complete", 150)
    assert cloud.run(*SUPERVISE).returncode == 0
    assert [call[:4] for call in cloud.calls()] == [
        ["storage", "cat", f"{BUCKET_RUN}/status.json", "--quiet"],
        [*TPUS, "queued-resources", "describe"],
    ]


@pytest.mark.parametrize(
    "states", [["SUSPENDED", "PREEMPTED"], ["ACTIVE", "PREEMPTED"], [["SUSPENDING", "FAILED"], None]]
)
def test_supervise_goes_on_after_a_preemption(cloud: Cloud, states: list[Any]) -> None:
    cloud.set_up(attempts=[{"step": 57, "preempt": states}, COMPLETE])
    result = cloud.run(*SUPERVISE)
    assert result.returncode == 0, result.stderr
    assert (len(cloud.calls(" create ")), len(cloud.calls(" delete "))) == (1, 1)
    assert [len(cloud.trained(host)) for host in ("host0", "host1")] == [2, 2]
    assert len({tuple(words) for words in cloud.trained("host0")}) == 1
    assert "step 57 of 150" in result.stderr


def test_supervise_picks_up_a_run_that_is_going(cloud: Cloud) -> None:
    cloud.set_up(attempts=[HOLD, COMPLETE])
    assert cloud.run("run", "configs/tiny.yaml").returncode == 0
    calls = len(cloud.calls())
    watcher = cloud.start(*SUPERVISE)
    cloud.wait(lambda: len(cloud.calls("worker.sh state")) > 4)
    watcher.terminate()  # the laptop is closed: the run goes on, and the slice is not forgotten
    assert "COST MONEY" in watcher.communicate(timeout=5)[1]
    assert watcher.returncode == 143
    assert not (cloud.home() / "exit").exists()

    watcher = cloud.start(*SUPERVISE)
    cloud.put_status("complete", 150)
    (cloud.folder / "release").touch()
    watcher.communicate(timeout=20)
    assert watcher.returncode == 0
    assert not [call for call in cloud.calls()[calls:] if "create" in call or "start" in " ".join(call)]
    assert len(cloud.get("trained")) == 2


@pytest.mark.parametrize(
    "call", ["storage cat", "queued-resources describe", "queued-resources create", "worker.sh state"]
)
def test_supervise_outlives_transient_failures(cloud: Cloud, call: str) -> None:
    cloud.set(attempts=[COMPLETE], rules=[{"match": call, "times": 2}], hosts=1)
    result = cloud.run(*SUPERVISE)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("UNAVAILABLE: try again") == 2


def test_gcloud_that_hangs_is_ended_and_tried_again(cloud: Cloud) -> None:
    cloud.set_up(attempts=[COMPLETE], hosts=1, rules=[{"match": "tpu-vm describe", "times": 1, "hang": True}])
    result = cloud.run(*SUPERVISE, "--call-timeout=1.5")
    assert result.returncode == 0, result.stderr
    assert "no answer within 1.5 s" in result.stderr


def test_retries_have_a_limit(cloud: Cloud) -> None:
    cloud.set(rules=[{"match": "queued-resources describe"}])
    assert cloud.run(*SUPERVISE, "--retries=2").returncode == 75
    assert len(cloud.calls("queued-resources describe")) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("queued-resources create", "PERMISSION_DENIED: Permission 'tpu.queuedResources.create' denied"),
        ("queued-resources create", "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProject' has been exceeded"),
        ("queued-resources create", "INVALID_ARGUMENT: unknown accelerator type"),
        ("queued-resources describe", "You do not currently have an active account selected."),
        ("storage cat", "gs://bucket not found: 404."),
        ("tpu-vm ssh", "SSH Key is not present in the SSH agent."),
    ],
)
def test_supervise_stops_at_what_only_the_user_can_mend(cloud: Cloud, call: str, message: str) -> None:
    cloud.set(rules=[{"match": call, "stderr": f"ERROR: (gcloud) {message}\n"}])
    result = cloud.run(*SUPERVISE)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(cloud.calls(call)) == 1


def test_a_limit_on_calls_passes(cloud: Cloud) -> None:
    text = "ERROR: RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Read requests' per minute\n"
    cloud.set(rules=[{"match": "queued-resources describe", "times": 1, "stderr": text}], queue="ACTIVE", node="READY")
    assert cloud.run("status").returncode == 0


def test_supervise_does_not_start_a_mistake_again(cloud: Cloud) -> None:
    cloud.set_up(attempts=[{"exits": {"host0": 75, "host1": 2}}])
    result = cloud.run(*SUPERVISE)
    assert result.returncode == 2
    assert "attempt 0 on host1" in result.stderr
    assert "attempt 0 on host0" not in result.stderr
    assert len(cloud.get("trained")) == 2
    # The next call is the user's word that it is mended.
    cloud.set(attempts=[COMPLETE])
    assert cloud.run(*SUPERVISE).returncode == 0


@pytest.mark.parametrize("status", [1, 137])
def test_supervise_gives_up_after_crashes_without_progress(cloud: Cloud, status: int) -> None:
    cloud.set_up(attempts=[{"step": 3, "exits": {"host0": 75, "host1": status}}])
    result = cloud.run(*SUPERVISE, "--max-failures=2")
    assert result.returncode == 1
    assert "gave up after 2 failures" in result.stderr
    assert "COST MONEY" in result.stderr
    assert len(cloud.trained("host0")) == 2


def test_progress_forgives_crashes(cloud: Cloud) -> None:
    steps = [{"step": step, "exit": 139} for step in (1, 1, 2)]
    cloud.set_up(attempts=[*steps, COMPLETE], hosts=1)
    result = cloud.run(*SUPERVISE, "--max-failures=3")
    assert result.returncode == 0, result.stderr
    assert len(cloud.trained("host0")) == 4


def test_temporary_failures_have_more_patience(cloud: Cloud) -> None:
    cloud.set_up(attempts=[{"exit": 75}, {"exit": 143}, {"exit": 129}, COMPLETE], hosts=1)
    assert cloud.run(*SUPERVISE, "--max-failures=1").returncode == 0
    assert len(cloud.trained("host0")) == 4


def test_temporary_failures_have_a_limit(cloud: Cloud) -> None:
    cloud.set_up(attempts=[{"exit": 75}], hosts=1)
    assert cloud.run(*SUPERVISE, "--max-failures=1").returncode == 1
    assert len(cloud.trained("host0")) == 4


def test_supervise_goes_on_after_a_reboot(cloud: Cloud) -> None:
    cloud.set_up(attempts=[HOLD, COMPLETE], hosts=1)
    watcher = cloud.start(*SUPERVISE)
    cloud.wait(lambda: len(cloud.get("trained")) == 1)
    trainer = int((cloud.home() / "pid").read_text())
    for pid in (os.getsid(trainer), trainer):  # with the process that would have noted its exit status
        os.kill(pid, signal.SIGKILL)
    output = watcher.communicate(timeout=20)[1]
    assert watcher.returncode == 0, output
    assert "ended at step 1 (gone)" in output
    assert len(cloud.get("trained")) == 2


def test_supervise_restarts_all_hosts_when_one_has_died(cloud: Cloud) -> None:
    cloud.set_up(attempts=[{"step": 1, "holds": ["host1"], "exit": 134}, COMPLETE])
    result = cloud.run(*SUPERVISE, "--settle=0")
    assert result.returncode == 0, result.stderr
    assert "1 of 2 hosts still run; the others: exit:134" in result.stderr
    assert [len(cloud.trained(host)) for host in ("host0", "host1")] == [2, 2]
    assert "exit status 143" in (cloud.home(1) / "logs" / "tiny.log").read_text()


def test_supervise_does_not_start_again_what_the_user_stopped(cloud: Cloud) -> None:
    cloud.set_up(attempts=[HOLD])
    watcher = cloud.start(*SUPERVISE)
    cloud.wait(lambda: len(cloud.get("trained")) == 2)
    assert cloud.run("stop").returncode == 0
    output = watcher.communicate(timeout=10)[1]
    assert watcher.returncode == 143
    assert "stopped by its user" in output
    assert len(cloud.get("trained")) == 2


def test_supervise_leaves_another_run_alone(cloud: Cloud) -> None:
    cloud.set_up(attempts=[HOLD])
    cloud.run("run", "configs/tiny.yaml", "--run=other")
    assert cloud.run(*SUPERVISE).returncode == 2
    assert not (cloud.home() / "exit").exists()


def test_supervise_makes_a_new_slice_when_a_host_hangs(cloud: Cloud) -> None:
    rule = {"match": "worker.sh state", "skip": 2, "times": 2}
    cloud.set_up(attempts=[HOLD, COMPLETE], rules=[rule], hosts=1)
    result = cloud.run(*SUPERVISE, "--retries=1")
    assert result.returncode == 0, result.stderr
    assert (len(cloud.calls(" delete ")), len(cloud.calls(" create "))) == (1, 1)


def test_supervise_keeps_a_slice_that_it_never_reached(cloud: Cloud) -> None:
    cloud.set(queue="ACTIVE", node="READY", rules=[{"match": "tpu-vm ssh"}])
    assert cloud.run(*SUPERVISE, "--retries=1").returncode == 75
    assert cloud.calls(" delete ") == []


def test_a_request_that_is_not_met_in_time(cloud: Cloud) -> None:
    cloud.set(on_create=["WAITING_FOR_RESOURCES", "FAILED"])
    result = cloud.run(*SUPERVISE, "--valid-until-duration=6h")
    assert result.returncode == 1
    assert "not met within 6h" in result.stderr
    assert "no capacity" in result.stderr
    assert len(cloud.calls(" create ")) == 1


def test_requests_that_fail_have_a_limit(cloud: Cloud) -> None:
    cloud.set(on_create="FAILED")
    assert cloud.run(*SUPERVISE, "--max-failures=3").returncode == 1
    assert len(cloud.calls(" create ")) == 3
