"""Stand-ins for gcloud and kubectl on the PATH: they write down what they were given and answer as told."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

_PROGRAM = """#!{python} -IS
import json, sys
home = {home!r}
name = {name!r}
read = "-" in sys.argv
with open(home + "/calls", "a") as calls:
    calls.write(json.dumps([[name, *sys.argv[1:]], sys.stdin.read() if read else ""]) + "\\n")
answers = json.load(open(home + "/answers"))
for words, text, status in answers:
    if sys.argv[1 : 1 + len(words)] == words:
        sys.stdout.write(text)
        sys.exit(status)
"""


@dataclass
class Recorder:
    """`answers`: first words of a command, what it prints, its status. Unlisted commands print nothing and succeed."""

    home: Path
    answers: list[tuple[list[str], str, int]] = field(default_factory=list)

    def answer(self, words: str, text: str = "", status: int = 0) -> None:
        self.answers.append((words.split(), text, status))
        (self.home / "answers").write_text(json.dumps(self.answers))

    def calls(self) -> list[tuple[list[str], str]]:
        """Every call so far: its words, and what it read."""
        record = self.home / "calls"
        lines = record.read_text().splitlines() if record.exists() else []
        return [(words, text) for words, text in map(json.loads, lines)]


def install(home: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> Recorder:
    """Only these programs are on the PATH from now on, and no setting is in the environment."""
    for name in names:
        program = home / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(_PROGRAM.format(python=sys.executable, home=str(home), name=name))
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(home / "bin"))
    for variable in [name for name in os.environ if name.startswith("DYNAMO_JAX_")]:
        monkeypatch.delenv(variable)
    (home / "answers").write_text("[]")
    return Recorder(home)


def load(path: str) -> ModuleType:
    """A script of this checkout, as a module."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def status_of(script: ModuleType, argv: Sequence[str]) -> int:
    """Exit status of a submit script called with these words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])  # which the script changes
        try:
            return int(script.submitting.main(script.submit, argv))
        except SystemExit as stop:
            return int(stop.code or 0)


def without(argv: Sequence[str], flag: str, values: int = 1) -> list[str]:
    """`argv` without a flag and its values."""
    at = list(argv).index(flag)
    return [*argv[:at], *argv[at + 1 + values :]]
