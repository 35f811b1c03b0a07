""".ci/run with stand-ins for every Python: which one runs what."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A Python 3.{minor} whose venvs hold a pip and a pytest that say how they were called.
PYTHON = """#!/bin/bash
case "$1 $2" in
  -c*sys.executable*) echo "3 {minor} $0" ;;
  -c*) echo {minor} ;;
  --version*) echo "Python 3.{minor}" ;;
  "-m venv")
    bin=${{!#}}/bin && mkdir -p "$bin"
    echo "PATH=$bin:\\$PATH" >"$bin/activate"
    printf '#!/bin/bash\\necho pip of {minor} "$@"\\n[[ {minor} == {minor_} ]] || exit 0\\n{pip}\\n' >"$bin/pip"
    printf '#!/bin/bash\\necho pytest of {minor} "$@"\\n' >"$bin/pytest"
    for name in ruff mypy; do cp /bin/true "$bin/$name"; done
    chmod +x "$bin"/* ;;
esac
"""
NO_WHEELS = "ERROR: No matching distribution found for grain>=0.2.15"


def run(tmp_path: Path, pythons: dict[str, int], failing: int = 0, message: str = "") -> tuple[int, list[str]]:
    """Status and output of .ci/run where these are the Pythons. pip fails with `message` on the minor `failing`."""
    checkout, bin = tmp_path / "checkout", tmp_path / "bin"
    shutil.copytree(ROOT / ".ci", checkout / ".ci")
    shutil.copy(ROOT / "README.md", checkout)
    for name, minor in pythons.items():
        program = (tmp_path / "home/.pyenv/versions" / name / "bin/python3") if name[0].isdigit() else bin / name
        program.parent.mkdir(parents=True, exist_ok=True)
        pip = f'echo "{message}" >&2; exit 1'
        program.write_text(PYTHON.format(minor=minor, minor_=failing, pip=pip))
        program.chmod(0o755)
    for tool in ("bash", "sed", "grep", "sort", "awk", "cat", "cp", "rm", "mktemp", "mkdir", "chmod", "dirname", "env"):
        (bin / tool).symlink_to(shutil.which(tool) or tool)
    environment = {"PATH": str(bin), "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    done = subprocess.run([checkout / ".ci/run"], env=environment, capture_output=True, text=True)
    assert not list(tmp_path.glob("tmp.*"))
    return done.returncode, (done.stdout + done.stderr).splitlines()


def core(lines: list[str]) -> list[str]:
    """Which Pythons ran a part of the suite. The README's command runs all of it, with no words."""
    calls = [line.split() for line in lines if line.startswith("pytest of ")]
    assert [words for words in calls if len(words) == 3] == [["pytest", "of", "11"]]
    for words in calls[1:]:
        assert all((ROOT / path).exists() for path in words[3:])
        assert {"tests/kernels", "tests/test_trainer.py"} <= set(words)
    return [words[2] for words in calls[1:]]


def test_shellcheck() -> None:
    binary = Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([binary, ".ci/run"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_core_runs_on_the_newest_python(tmp_path: Path) -> None:
    pythons = {"python3": 11, "python3.11": 11, "python3.12": 12, "3.9.18": 9, "3.13.0": 13}
    status, lines = run(tmp_path, pythons)
    assert (status, core(lines)) == (0, ["13"])


def test_a_python_without_wheels_is_passed_over_and_named(tmp_path: Path) -> None:
    status, lines = run(tmp_path, {"python3": 11, "python3.12": 12, "python3.14": 14}, 14, NO_WHEELS)
    assert (status, core(lines)) == (0, ["12"])
    assert "skipped: a dependency has no wheels for Python 3.14" in lines


@pytest.mark.parametrize("pythons", [{"python3": 11}, {"python3": 11, "python3.11": 11, "3.9.18": 9}])
def test_without_a_newer_python_that_is_said(tmp_path: Path, pythons: dict[str, int]) -> None:
    status, lines = run(tmp_path, pythons)
    assert (status, core(lines)) == (0, [])
    assert lines[-1] == "skipped: the core on a newer Python, for none can be used here beside Python 3.11"


def test_another_failure_of_pip_fails(tmp_path: Path) -> None:
    status, lines = run(tmp_path, {"python3": 11, "python3.14": 14}, 14, "ERROR: the index does not answer")
    assert (status, core(lines)) == (1, [])
    assert "ERROR: the index does not answer" in lines
