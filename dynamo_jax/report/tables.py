"""The tables of a report: what each run was and reached, how configs differ, sample rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dynamo_jax.report.charts import OLDER, PASS_AT_K, USED, held_out_metrics, logged
from dynamo_jax.report.runs import Row, Run, number

NONE = "–"  # noqa: RUF001 - a dash in a table
SAMPLES = 3  # right and wrong ones each, of one step
MAX_CHARACTERS = 2000
_SUMMARISED = {"objective/skipped_updates", "verifier/killed", "policy/parameters"}


@dataclasses.dataclass(frozen=True)
class Score:
    """Held-out score of one run: before training, last, best; `ahead`: the best of the runs."""

    run: str
    color: int
    first: str
    last: str
    best: str
    change: str
    ahead: bool


@dataclasses.dataclass(frozen=True)
class Setting:
    key: str
    values: list[str]
    differs: bool


@dataclasses.dataclass(frozen=True)
class Samples:
    run: str
    step: str
    right: list[Row]
    wrong: list[Row]
    counts: str


def summary(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(quantity, its value for each run)."""
    rows = {
        "Steps done": [_steps(run) for run in runs],
        "Allocation": [_allocation(run) for run in runs],
        "Modulation": [_modulation(run) for run in runs],
        "Policy": [_policy(run) for run in runs],
        "Mesh": [_mesh(run) for run in runs],
        "Seed": [_show(run.config.get("seed")) for run in runs],
        "Time, sum of all steps": [_duration(float(run.seconds()[1].sum())) for run in runs],
        "Sampling speed, median": [_speed(run) for run in runs],
        "Updates skipped (not finite)": [_total(run, "objective/skipped_updates") for run in runs],
        "Answers killed by the verifier": [_total(run, "verifier/killed") for run in runs],
    }
    return [(name, values) for name, values in rows.items() if any(value != NONE for value in values)]


def scores(runs: Sequence[Run]) -> list[tuple[str, list[Score]]]:
    """(`benchmark, Pass@k`, the score of each run that has it)."""
    tables = []
    for benchmark, k in held_out_metrics(runs):
        key = f"eval/{benchmark}/pass@{k}"
        measured = [(i, run, *run.series(key)) for i, run in enumerate(runs)]
        measured = [entry for entry in measured if len(entry[2])]
        if not measured:
            continue
        top = max(float(y.max()) for *_, y in measured)
        entries = []
        for i, run, x, y in measured:
            best = int(np.argmax(y))
            entries.append(
                Score(
                    run.name, i, _with_interval(run, key, x[0], y[0]), _with_interval(run, key, x[-1], y[-1]),
                    _with_interval(run, key, x[best], y[best]), f"{y[-1] - y[0]:+.3f}" if len(y) > 1 else NONE,
                    ahead=len(measured) > 1 and float(y.max()) == top,
                )
            )  # fmt: skip
        tables.append((f"{benchmark}, Pass@{k}", entries))
    return tables


def settings(runs: Sequence[Run]) -> list[Setting]:
    """Every key of the configs, those that differ first; a key that a config lacks is shown as a dash."""
    # Where a run was written says nothing about it, and a report is passed on: no path of the machine.
    keys = {key: None for run in runs for key in run.config if key != "run_dir"}
    table = []
    for key in keys:
        values = [_show(run.config[key]) if key in run.config else NONE for run in runs]
        table.append(Setting(key, values, len(set(values)) > 1))
    return sorted(table, key=lambda setting: not setting.differs)


def leftovers(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(metric, last value in each run) of the metrics that no chart and no other table shows."""
    keys = {key for run in runs for key in run.keys()} - USED - _SUMMARISED - {"step"}  # noqa: SIM118
    keys -= {logged(run, key) for run in runs for key in OLDER}
    keys = {key for key in keys if not PASS_AT_K.fullmatch(key.removesuffix("_low").removesuffix("_high"))}
    return [(key, [_last(run, key) for run in runs]) for key in sorted(keys) if not key.startswith("time/")]


def samples(runs: Sequence[Run]) -> list[Samples]:
    found = []
    for run in runs:
        for rows in run.samples:
            right, wrong = [row for row in rows if _right(row)], [row for row in rows if not _right(row)]
            counts = f"{len(right)} right, {len(wrong)} wrong of {len(rows)} saved"
            if any(_verdict(row) is None for row in rows):
                counts += "; without a saved verdict, a reward above 0.5 counts as right"
            found.append(Samples(run.name, _show(rows[0].get("step")), _pick(right), _pick(wrong), counts))
    return found


def _right(row: Row) -> bool:
    """The verdict: rewards may hold a bonus or a penalty. Older runs saved none, and their rewards are all there is."""
    verdict = _verdict(row)
    return (number(row.get("reward")) or 0.0) > 0.5 if verdict is None else verdict


def _verdict(row: Row) -> bool | None:
    return right if isinstance(right := row.get("right"), bool) else None


def _pick(rows: list[Row]) -> list[Row]:
    """The first few, of different prompts, with everything shown made text of a bounded length."""
    different = list({str(row.get("prompt_id")): row for row in reversed(rows)}.values())[::-1][:SAMPLES]
    fields = ("prompt_id", "prompt", "text", "answer", "reward", "length", "ended")
    return [{field: _show(row.get(field), MAX_CHARACTERS) for field in fields} for row in different]


def _show(value: Any, limit: int = 200) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if value == "":
        return '""'
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text) - limit} more characters)"


def _with_interval(run: Run, key: str, step: float, value: float) -> str:
    low, high = run.at(step, key + "_low"), run.at(step, key + "_high")
    span = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    return f"{value:.3f}{span} at step {step:.0f}"


def _steps(run: Run) -> str:
    planned = number(run.config.get("trainer.steps"))
    return f"{run.steps} of {planned:.0f}" if planned is not None else str(run.steps)


def _allocation(run: Run) -> str:
    rule = run.config.get("allocation.rule")
    prompts, each = run.config.get("rollout.prompts"), run.config.get("rollout.per_prompt")
    budget = f"{prompts} prompts x {each}" if prompts is not None and each is not None else ""
    low, high = run.config.get("allocation.low"), run.config.get("allocation.high")
    bounds = f"n in [{low}, {high}]" if rule not in (None, "uniform") and low is not None and high is not None else ""
    return ", ".join(part for part in (str(rule or ""), budget, bounds) if part) or NONE


def _modulation(run: Run) -> str:
    enabled = run.config.get("modulation.enabled")
    if enabled is None:
        return NONE
    parts = [part for part in ("compensation", "stabilisation") if run.config.get(f"modulation.{part}") is not False]
    return f"on: {' and '.join(parts) or 'neither factor'}" if enabled else "off"


def _policy(run: Run) -> str:
    if (logged := run.series("policy/parameters")[1]).size:
        count = f"{_metric_prefix(float(logged[-1]))} parameters"
    else:
        count = _count_parameters(run.config)
    folder = run.config.get("policy.load")
    # The last part only: the name of the model, not of somebody's disk.
    origin = str(folder).rstrip("/").rpartition("/")[2] if folder else "random initial weights"
    return ", ".join(part for part in (origin, count) if part) if count or folder else NONE


def _count_parameters(config: dict[str, Any]) -> str:
    """Parameters of `policy.architecture`, a Qwen2-shaped decoder; without embeddings if the vocabulary is unknown."""
    shape = {key: number(config.get(f"policy.architecture.{key}")) for key in _SHAPE}
    width, layers, heads, kv_heads, ff = (shape[key] for key in _SHAPE[:5])
    if width is None or layers is None or heads is None or kv_heads is None or ff is None:
        return ""
    head = shape["head_dim"] or width / heads
    bias = (heads + 2 * kv_heads) * head if config.get("policy.architecture.qkv_bias") else 0.0
    layer = 2 * width * head * (heads + kv_heads) + bias + 3 * width * ff + 2 * width
    total = layers * layer + width
    vocab = shape["vocab_size"]
    if vocab is None:
        return f"{_metric_prefix(total)} parameters besides embeddings"
    tables = 1 if config.get("policy.architecture.tie_word_embeddings") else 2
    return f"{_metric_prefix(total + tables * vocab * width)} parameters"


_SHAPE = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "head_dim", "vocab_size")


def _metric_prefix(count: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"


def _mesh(run: Run) -> str:
    axes = [(axis, run.config.get(f"mesh.{axis}")) for axis in ("data", "fsdp", "tensor")]
    return ", ".join(f"{axis} {size}" for axis, size in axes if size is not None) or NONE


def _duration(seconds: float) -> str:
    if seconds <= 0:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _speed(run: Run) -> str:
    _, speed = run.series("rollout/tokens_per_second")
    return f"{np.median(speed):,.0f} tokens/s" if speed.size else NONE


def _last(run: Run, key: str) -> str:
    return next((_show(row[key]) for row in reversed(run.rows) if row.get(key) is not None), NONE)


def _total(run: Run, key: str) -> str:
    _, values = run.series(key)
    return f"{values.sum():.0f}" if values.size else NONE
