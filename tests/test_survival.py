"""Runs whose storage fails them: damaged checkpoints, a full disk. What they leave equals an undisturbed run's."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import compiled_once, write_config  # noqa: F401 - a fixture of this module

from dynamo_jax import cli
from dynamo_jax import trainer as loop
from dynamo_jax.metrics import read_metrics

STEPS = 3


def train(folder: Path, *overrides: str, steps: int = STEPS) -> int:
    folder.mkdir(exist_ok=True)
    return cli.main(["train", str(write_config(folder)), f"trainer.steps={steps}", *overrides])


def result(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Everything that does not measure time."""
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    rollouts = [path.read_text() for path in sorted((folder / "run" / "rollouts").iterdir())]
    timeless = [{k: v for k, v in x.items() if not k.startswith("time/") and "per_second" not in k} for x in lines]
    return timeless, rollouts


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the runs of a test warn of."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(lambda record: "devices" not in record.getMessage())  # the tests have eight, a run uses one
    logger = logging.getLogger("dynamo_jax")
    monkeypatch.setattr(loop, "setup_logging", lambda _: logger)
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[str]]:
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder) == 0
    return result(folder)


def test_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(
    whole: Any, tmp_path: Path, warnings: list[str]
) -> None:
    assert train(tmp_path, "checkpoint.keep=3", steps=2) == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    host = checkpoints / "2" / "host" / "metadata"
    host.write_bytes(host.read_bytes()[:-3])
    assert train(tmp_path) == 0
    assert result(tmp_path) == whole
    assert [("2: is damaged" in line, "goes on from step 1" in line) for line in warnings] == [(True, True)]
    assert [path.name for path in (tmp_path / "run" / "checkpoints_damaged").iterdir()] == ["2"]


def test_without_any_sound_checkpoint_the_run_starts_anew(whole: Any, tmp_path: Path, warnings: list[str]) -> None:
    assert train(tmp_path, steps=2) == 0
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / "files.json").write_text("not JSON")
    assert train(tmp_path) == 0
    assert result(tmp_path) == whole
    assert ["STARTS ANEW" in line for line in warnings] == [True]
