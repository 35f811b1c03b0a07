"""launch/README.md: its commands are accepted, and the files that it names exist."""

import re
import shlex

import pytest
from recorder import ROOT, install, load, status_of

TEXT = (ROOT / "launch" / "README.md").read_text()
COMMANDS = [
    shlex.split(command)
    for block in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL)
    for command in block.replace("\\\n", " ").splitlines()
    if "submit.py" in command
]
# What a reader fills in; the bucket's and the namespace's names are lower case.
NAMES = {
    "PROJECT": "my-project",
    "BUCKET": "my-bucket",
    "REPOSITORY": "images",
    "CONTEXT": "c",
    "NAMESPACE": "training",
}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[2])
def test_commands_are_accepted(command, tmp_path, monkeypatch, capsys):
    recorder = install(tmp_path, monkeypatch, "gcloud", "kubectl")
    words = [re.sub("|".join(NAMES), lambda match: NAMES[match[0]], word) for word in command]
    assert words[0] == "python"
    assert status_of(load(words[1]), [*words[2:], "--dry-run"]) == 0, capsys.readouterr().err
    assert recorder.calls() == []


def test_there_is_a_command_for_each_service():
    assert {command[1] for command in COMMANDS} == {"launch/gcloud_batch/submit.py", "launch/gke/submit.py"}


def test_files_exist():
    named = set(re.findall(r"launch/[\w./]+\.(?:py|json|yaml)\b|launch/Dockerfile", TEXT))
    assert len(named) >= 3
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_tables_numbers_are_the_slices_of_the_script():
    script = load("launch/gke/submit.py")
    rows = re.findall(r"\| (`v\S+?`(?:, `\S+`)?) \| (\d+) \| (\d+) \| (\d+) \|", TEXT)
    assert len(rows) == 5
    for slices, chips, per_host, pods in rows:
        for topology in re.findall(r"`(.*?)`", slices):
            _, _, hosts, on_each = script.slice_of(topology, None)
            assert (hosts * on_each, on_each, hosts) == (int(chips), int(per_host), int(pods))
