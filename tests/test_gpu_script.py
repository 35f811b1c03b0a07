"""The script for a GPU: its parts fit into eight minutes, write rows of JSON, and are cut when they take too long."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("gpu")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_all_parts_together_take_eight_minutes(script):
    assert sum(script.BUDGETS.values()) <= 8 * 60
    assert all((BENCHMARKS / "gpu_parts" / f"{part}.py").is_file() for part in script.BUDGETS)


def test_a_part_writes_rows_as_they_come(script, tmp_path, capfd):
    """The last says how long it took."""
    with (tmp_path / "rows.jsonl").open("w") as out:
        assert script.run_part("attention", True, 300, out)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [json.loads(line) for line in capfd.readouterr().out.splitlines()] == rows
    assert {row["part"] for row in rows} == {"attention"}
    assert {(row["form"], row["pass"]) for row in rows if "form" in row} == {
        (form, which) for form in ("plain XLA", "ours") for which in ("forward", "value and gradient")
    }
    assert "took" in rows[-1]


def test_a_part_that_overruns_is_cut(script, capfd):
    assert not script.run_part("run", True, 0.1, None)
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert rows[-2]["wrong"] == "cut after its 0.1 s"


def test_a_part_that_fails_says_so(script, capfd):
    """Without `small` there is no GPU here."""
    assert not script.run_part("attention", False, 300, None)
    captured = capfd.readouterr()
    assert json.loads(captured.out.splitlines()[0])["wrong"] == "ended with status 1; see its output"
    assert "there is no GPU here but cpu; --small tries the script out" in captured.err
