"""Reading run folders: the config, the metrics of every step, a few sample rollouts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder. `config` is flat (`allocation.rule`); `rows` has one entry a step, in order of steps."""

    name: str
    config: dict[str, Any]
    rows: list[Row]
    samples: list[list[Row]]  # sample rollouts of the first and of the last saved step (one list if they are the same)

    @property
    def steps(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    def keys(self) -> set[str]:
        return {key for row in self.rows for key in row}

    def series(self, key: str) -> tuple[FloatArray, FloatArray]:
        """Steps and values of `key` where it has a finite value."""
        points = [(row["step"], value) for row in self.rows if (value := number(row.get(key))) is not None]
        table = np.array(points, dtype=np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def at(self, step: float, key: str) -> float | None:
        return next((number(row.get(key)) for row in self.rows if row["step"] == step), None)

    def columns(self, keys: Sequence[str]) -> tuple[FloatArray, FloatArray]:
        """Steps [S] and values [len(keys), S] of the steps in which any of `keys` is present; absent ones are 0."""
        rows = [row for row in self.rows if any(number(row.get(key)) is not None for key in keys)]
        steps = np.array([row["step"] for row in rows], dtype=np.float64)
        values = [[number(row.get(key)) or 0.0 for row in rows] for key in keys]
        return steps, np.array(values, dtype=np.float64).reshape(len(keys), len(rows))

    def seconds(self) -> tuple[FloatArray, FloatArray]:
        """Steps, and the seconds each took: its own clock, or its phases where those are longer or all there is."""
        phases = sorted(key for key in self.keys() if key.startswith("time/") and key != "time/step")
        steps, values = self.columns([*phases, "time/step"])
        return steps, np.maximum(values[-1], values[:-1].sum(axis=0))


def number(value: Any) -> float | None:
    """`value` as a float if it is a finite number, else None: a null, a NaN and an absent metric are the same here."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read every run folder. Raises `ValueError` naming the file, the line and the remedy."""
    if not folders:
        raise ValueError("report: no run folder is given. Name at least one: dynamo-jax report RUN --out FILE.html")
    return [_load(Path(folder), name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell equal ones apart."""
    parts = [Path(folder).resolve().parts for folder in folders]

    def name(i: int) -> str:
        others = parts[:i] + parts[i + 1 :]
        for depth in range(1, len(parts[i]) + 1):
            if all(other[-depth:] != parts[i][-depth:] for other in others):
                return "/".join(parts[i][-depth:])
        return f"{parts[i][-1]} ({i + 1})"  # the same folder twice

    return [name(i) for i in range(len(parts))]


def _load(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder. Give the `run_dir` of a run that was started.")
    by_step: dict[int, Row] = {}
    for where, row in _read_jsonl(folder / "metrics.jsonl", "Give a run folder that `dynamo-jax train` has written."):
        step = row.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"{where}: `step` is {step!r}, not a step number. Correct or remove that line.")
        # Held-out scores may come on a line of their own.
        by_step.setdefault(step, {}).update(row)
    return Run(name, _read_config(folder / "config.yaml"), [by_step[s] for s in sorted(by_step)], _samples(folder))


def _read_config(path: Path) -> dict[str, Any]:
    remedy = "Copy back the config.yaml that `dynamo-jax train` wrote when the run started."
    try:
        tree = yaml.safe_load(_read_bytes(path, remedy))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}. {remedy}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: is not a mapping of keys. {remedy}")
    return dict(_flat(tree, ""))


def _flat(tree: dict[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _samples(folder: Path) -> list[list[Row]]:
    files = sorted((folder / "rollouts").glob("step_*.jsonl"), key=lambda file: (len(file.name), file.name))
    remedy = "Remove that file to make a report without it."
    ends = [files[0], files[-1]] if len(files) > 1 else files
    return [rows for file in ends if (rows := [row for _, row in _read_jsonl(file, remedy)])]


def _read_bytes(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file. {remedy}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}. {remedy}") from None


def _read_jsonl(path: Path, remedy: str) -> list[tuple[str, Row]]:
    """(`file:line`, object) of each line. A broken last line is what a killed run leaves, and is skipped."""
    lines = [(n, line) for n, line in enumerate(_read_bytes(path, remedy).split(b"\n"), start=1) if line.strip()]
    rows = []
    for n, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            if n == lines[-1][0]:
                break
            raise ValueError(f"{path}:{n}: broken JSON: {error}. Correct or remove that line.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{n}: is not a JSON object. Correct or remove that line.")
        rows.append((f"{path}:{n}", row))
    return rows
