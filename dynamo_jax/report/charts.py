"""Which charts a report has, what each shows and what to look for in it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from dynamo_jax.report.plots import Line, Svg, bars, draw_lines, draw_stack, smooth
from dynamo_jax.report.runs import FloatArray, Run

PASS_AT_K = re.compile(r"eval/(.+)/pass@(\d+)")
PHASES = ("sample", "grade", "score", "update", "eval", "checkpoint")
MAX_PHASES = 7  # beyond these, the smallest join "other"


@dataclasses.dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    label: str
    color: str
    dash: str = "solid"
    patch: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    title: str  # "" where a chart has one panel
    alt: str
    svg: Svg | None  # None: no data


@dataclasses.dataclass(frozen=True)
class Chart:
    title: str
    caption: str
    legend: list[Key]
    panels: list[Panel]


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    charts: list[Chart]


@dataclasses.dataclass(frozen=True)
class Spec:
    """A chart of per-step metrics, one colour a run. The first metric is smoothed, with the raw values behind it."""

    title: str
    unit: str
    caption: str
    metrics: dict[str, str]  # metric -> what the legend calls it
    log: bool = False


_REWARD = Spec(
    "Training reward", "mean reward",
    "Mean over the prompts of a step of what their rollouts got: every prompt counts the same, wherever the allocation "
    "moves rollouts.",
    {"reward/prompt_mean": "reward"},
)  # fmt: skip
# What runs that began before there was such a metric have in its place.
OLDER = {"reward/prompt_mean": "reward/mean"}
_ALLOCATION = (
    Spec("Smallest and largest group", "rollouts a prompt",
         "Rollouts of the best and the least served prompt of a step. Lines resting on the configured bounds mean "
         "that the bounds decide, not the rule.",
         {"allocation/max": "largest", "allocation/min": "smallest"}),
    Spec("Entropy of the allocation", "nats",
         "Entropy of the shares that prompts get of a step's rollouts: flat at its maximum is uniform, lower is more "
         "selective.",
         {"allocation/entropy": "entropy"}),
)  # fmt: skip
_OBJECTIVE = (
    Spec("Policy entropy", "nats a token",
         "Mean entropy of the next-token distribution. A fall to zero is collapse: exploration has ended.",
         {"objective/entropy": "entropy"}),
    Spec("Compensation factor", "factor",
         "Multiplies positive advantages: 1 is off, larger means that low-entropy tokens are lifted.",
         {"modulation/comp_mean": "mean", "modulation/comp_max": "largest"}),
    Spec("Stabilisation factor", "factor",
         "Multiplies advantages of tokens that would change the entropy most: 1 is off, the minimum shows how hard "
         "the worst token is held back.",
         {"modulation/stab_mean": "mean", "modulation/stab_min": "smallest"}),
    Spec("Clipped tokens", "share of tokens",
         "Tokens whose gradient the trust region cuts. Zero with one update a step; above a few percent the "
         "learning rate or the number of updates is high.",
         {"objective/clip_fraction": "clip", "objective/dual_clip_fraction": "dual clip"}),
    Spec("Divergence within a step", "nats a token",
         "KL from the policy that sampled to the policy after the update's earlier mini-batches. Spikes announce "
         "instability.",
         {"objective/kl_old_new": "KL"}),
    Spec("Gradient norm", "norm before clipping",
         "A steady level is healthy; growth over many steps, or spikes that coincide with a fall in reward, is not.",
         {"objective/grad_norm": "norm"}, log=True),
)  # fmt: skip
_ROLLOUTS = (
    Spec("Completion length", "tokens",
         "Length of the rollouts. A mean that climbs towards the limit calls for a look at truncation.",
         {"rollout/length_mean": "mean", "rollout/length_max": "longest"}),
    Spec("Truncated rollouts", "share of rollouts",
         "Rollouts that reached the token limit without ending. They count as wrong: a high share hides what "
         "the policy can do.",
         {"rollout/truncated_fraction": "truncated"}),
    Spec("Log-probability drift", "nats, largest difference",
         "Between the sampler's log-probabilities and a teacher-forced recompute. Above 1e-4 in float32 the two "
         "disagree about the policy, which is a bug.",
         {"rollout/logp_drift": "drift"}, log=True),
    Spec("Sampling speed", "tokens a second",
         "Useful tokens the sampler makes. A dip at the start is compilation.",
         {"rollout/tokens_per_second": "speed"}),
)  # fmt: skip

USED = {key for spec in (_REWARD, *_ALLOCATION, *_OBJECTIVE, *_ROLLOUTS) for key in spec.metrics} | {
    f"allocation/{kind}_{level}" for kind in ("mean", "prompts") for level in ("easy", "middle", "hard")
}


def run_color(index: int) -> str:
    return f"run{index % 7}"


def sections(runs: Sequence[Run]) -> list[Section]:
    def lines(specs: Sequence[Spec]) -> list[Chart]:
        return [_lines_chart(spec, runs) for spec in specs]

    return [
        Section("Learning", [*_held_out(runs), _lines_chart(_REWARD, runs), *_over_time(runs)]),
        Section("Allocation", [_group_sizes(runs), _shares(runs), *lines(_ALLOCATION)]),
        Section("Objective and modulation", lines(_OBJECTIVE)),
        Section("Rollouts", lines(_ROLLOUTS)),
        Section("Time", [_phases(runs)]),
    ]


def logged(run: Run, metric: str) -> str:
    """`metric`, or what the run has in its place: one for the whole run, also if it got the newer one on the way."""
    older = OLDER.get(metric, metric)
    steps, older_steps = len(run.series(metric)[0]), len(run.series(older)[0])
    return metric if steps >= max(older_steps, 1) else older


def held_out_metrics(runs: Sequence[Run]) -> list[tuple[str, int]]:
    """(benchmark, k) of every held-out score, in order."""
    found = {match.groups() for run in runs for key in run.keys() if (match := PASS_AT_K.fullmatch(key))}  # noqa: SIM118
    return sorted((benchmark, int(k)) for benchmark, k in found)


def interval(run: Run, key: str, steps: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Lower and upper end of the 95% interval of `key` at `steps`; NaN where it was not logged."""
    low, high = ([run.at(step, key + side) for step in steps] for side in ("_low", "_high"))
    return np.array(low, dtype=np.float64), np.array(high, dtype=np.float64)


def _held_out(runs: Sequence[Run]) -> list[Chart]:
    caption = (
        "Held-out prompts, with a 95% interval; step 0 is the policy before training. Look for a gain that clears "
        "the bands, and for Pass@{k} that does not fall while Pass@1 rises."
    )
    charts: list[Chart] = []
    for benchmark, k in held_out_metrics(runs):
        key = f"eval/{benchmark}/pass@{k}"
        lines, alts = [], []
        for i, run in enumerate(runs):
            x, y = run.series(key)
            if len(x):
                lines.append(Line(x, y, run_color(i), "solid", "main", *interval(run, key, x), mark_up_to=60))
                alts.append(_in_words(run.name, x, y))
        title = f"Held-out Pass@{k}: {benchmark}"
        panel = Panel("", "; ".join(alts), draw_lines(f"held-out-{len(charts)}", lines, f"Pass@{k}"))
        # Pass@1 has no larger k to be compared with when it is the only score.
        text = caption.format(k=k) if k > 1 else caption.partition(", and for")[0] + "."
        charts.append(Chart(title, text, _run_keys(runs, [key]), [panel]))
    if not charts:
        charts.append(
            Chart("Held-out Pass@k", "Scores on held-out prompts.", [], [_no_data("eval/<benchmark>/pass@1")])
        )
    return charts


def _over_time(runs: Sequence[Run]) -> list[Chart]:
    """The first held-out score once more, over the time it took: what a cheaper or a dearer step is worth."""
    if not (metrics := held_out_metrics(runs)):
        return []
    benchmark, k = metrics[0]
    key = f"eval/{benchmark}/pass@{k}"
    lines: list[Line] = []
    alts = []
    for i, run in enumerate(runs):
        x, y = run.series(key)
        steps, seconds = run.seconds()
        if not len(x) or not seconds.any():
            continue
        minutes = np.interp(x, steps, np.cumsum(seconds)) / 60
        lines.append(Line(minutes, y, run_color(i), "solid", "main", *interval(run, key, x), mark_up_to=60))
        alts.append(f"{run.name}: {y[-1]:.3g} after {minutes[-1]:.3g} minutes")
    if not lines:
        return []
    caption = "The same scores over the time spent, compilation and evaluation included. Compare heights, not lengths."
    svg = draw_lines("over-time", lines, f"Pass@{k}", along="minutes")
    panel = Panel("", "; ".join(alts), svg)
    return [Chart(f"Held-out Pass@{k} over time: {benchmark}", caption, _run_keys(runs, [key]), [panel])]


def _lines_chart(spec: Spec, runs: Sequence[Run]) -> Chart:
    lines: list[Line] = []
    alts, smoothed, notes = [], 0, ""
    for i, run in enumerate(runs):
        for j, (metric, label) in enumerate(spec.metrics.items()):
            x, y = run.series(key := logged(run, metric))
            if not len(x):
                continue
            if key != metric:
                notes += f" {run.name} shows {key}, for want of {metric} at every step."
            name = f"{run.name}, {label}" if len(spec.metrics) > 1 else run.name
            alts.append(_in_words(name, x, y))
            dash = "solid" if j == 0 else "dashed"
            window = _window(len(x)) if j == 0 else 1
            if window > 1:
                smoothed = max(smoothed, window)
                lines.insert(0, Line(x, y, run_color(i), style="raw"))
                y = smooth(y, window)
            lines.append(Line(x, y, run_color(i), dash, "second" if j else "main"))
    caption = spec.caption + notes
    caption += f" Thick: moving average over {smoothed} steps; thin: every step." if smoothed else ""
    legend = _run_keys(runs, spec.metrics)
    if len(spec.metrics) > 1:
        labels = list(spec.metrics.values())
        color = "muted" if len(runs) > 1 else run_color(0)
        legend += [Key(label, color, "dashed" if j else "solid") for j, label in enumerate(labels)]
    if not lines:
        missing = [OLDER.get(metric, metric) for metric in spec.metrics]
        return Chart(spec.title, spec.caption, [], [_no_data(*missing)])
    svg = draw_lines(next(iter(spec.metrics)), lines, spec.unit, spec.log)
    return Chart(spec.title, caption, legend, [Panel("", "; ".join(alts), svg)])


LEVELS = {"easy": "dotted", "middle": "dashed", "hard": "solid"}
_LEVEL_NOTE = "Easy: posterior mean success above 2/3; hard: below 1/3; middle: between."


def _group_sizes(runs: Sequence[Run]) -> Chart:
    caption = (
        f"Mean number of rollouts given to a prompt (moving average). {_LEVEL_NOTE} A working rule gives most to "
        "the middle; three equal lines are uniform allocation."
    )
    lines: list[list[Line]] = []
    for run in runs:
        series = [(level, *run.series(f"allocation/mean_{level}")) for level in reversed(LEVELS)]  # solid below dotted
        lines.append([Line(x, smooth(y, _window(len(y))), level, LEVELS[level]) for level, x, y in series if len(x)])
    highest = max((float(line.y.max()) for of_run in lines for line in of_run), default=1.0)
    panels = []
    for i, (run, of_run) in enumerate(zip(runs, lines, strict=True)):
        if not of_run:
            panels.append(_no_data("allocation/mean_easy", title=_title(run, runs)))
            continue
        # The same axes in every panel: comparing runs is what the panels are for.
        svg = draw_lines(f"group-sizes-{i}", of_run, "rollouts a prompt", span=_span(runs), top=1.05 * highest)
        words = "; ".join(_in_words(line.color, line.x, line.y) for line in of_run)
        panels.append(Panel(_title(run, runs), words, svg))
    legend = [Key(level, level, dash) for level, dash in LEVELS.items()]
    return Chart("Rollouts per prompt, by difficulty", caption, legend, panels)


def _shares(runs: Sequence[Run]) -> Chart:
    caption = (
        f"Where the rollouts of a step went. {_LEVEL_NOTE} The easy band widens as prompts are learned; a rule that "
        "saves rollouts keeps it narrower than uniform allocation does."
    )
    keys = [f"allocation/{kind}_{level}" for kind in ("prompts", "mean") for level in LEVELS]
    panels = []
    for i, run in enumerate(runs):
        steps, values = run.columns(keys)
        given = values[:3] * values[3:]
        # A step that lacks the mean of a level which had prompts would show a share that is not true.
        some = (given.sum(axis=0) > 0) & ((values[:3] == 0) == (given == 0)).all(axis=0)
        if not some.any():
            panels.append(_no_data("allocation/prompts_easy", "allocation/mean_easy", title=_title(run, runs)))
            continue
        shares = 100 * given[:, some] / given[:, some].sum(axis=0)
        words = [_in_words(level, steps[some], y, "%") for level, y in zip(LEVELS, shares, strict=True)]
        svg = draw_stack(
            f"shares-{i}", *bars(steps[some], shares), list(LEVELS), "% of rollouts", _span(runs), top=100.0
        )  # fmt: skip
        panels.append(Panel(_title(run, runs), "; ".join(words), svg))
    legend = [Key(level, level, patch=True) for level in reversed(LEVELS)]
    return Chart("Share of rollouts, by difficulty", caption, legend, panels)


def _phases(runs: Sequence[Run]) -> Chart:
    caption = (
        "Seconds a step by phase, averaged over each bar; bars far above the rest (compilation, evaluation) are cut "
        "off. Step 0 is left out. Look for the phase that is worth speeding up, and for one that grows."
    )
    totals: dict[str, float] = {}
    for key in sorted({key for run in runs for key in run.keys() if key.startswith("time/")} - {"time/step"}):  # noqa: SIM118
        totals[key] = sum(float(run.series(key)[1].sum()) for run in runs)
    shown = sorted(totals, key=lambda key: -totals[key])[:MAX_PHASES]
    shown.sort(key=lambda key: (_phase_order(key), key))
    colors = [f"phase{i}" for i in range(len(shown))] + ["phase7"]

    stacks = []
    for run in runs:
        steps, values = run.columns([*totals, "time/step"])
        steps, values = steps[steps > 0], values[:, steps > 0]
        layers = [values[list(totals).index(key)] for key in shown]
        # What the phases leave of the step, and the phases that are too many to show.
        rest = np.maximum(values[-1], values[:-1].sum(axis=0)) - sum(layers, np.zeros(len(steps)))
        stacks.append(bars(steps, np.stack([*layers, rest])) if len(steps) else None)
    heights = np.concatenate([stack[1].sum(axis=0) for stack in stacks if stack] or [np.ones(1)])
    top = 1.05 * min(float(heights.max()), 1.6 * float(np.quantile(heights, 0.9)))

    panels = []
    names = [key.removeprefix("time/") for key in shown] + ["other"]
    for i, (run, stack) in enumerate(zip(runs, stacks, strict=True)):
        if stack is None:
            panels.append(_no_data("time/step", title=_title(run, runs)))
            continue
        edges, layers_of_bars = stack
        svg = draw_stack(f"time-{i}", edges, layers_of_bars, colors, "seconds a step", _span(runs), top)
        share = 100 * layers_of_bars.sum(axis=1) / max(float(layers_of_bars.sum()), 1e-9)
        words = ", ".join(f"{name} {part:.0f}%" for name, part in zip(names, share, strict=True))
        panels.append(Panel(_title(run, runs), f"Share of the time: {words}", svg))
    legend = [Key(name, color, patch=True) for name, color in zip(names, colors, strict=True)]
    return Chart("Time per phase", caption, legend, panels)


def _phase_order(key: str) -> int:
    name = key.removeprefix("time/")
    return PHASES.index(name) if name in PHASES else len(PHASES)


def _run_keys(runs: Sequence[Run], metrics: Iterable[str]) -> list[Key]:
    """The runs that have a line in the chart; one run alone needs no name."""
    if len(runs) == 1:
        return []
    has_line = [any(len(run.series(logged(run, metric))[0]) for metric in metrics) for run in runs]
    return [Key(run.name, run_color(i)) for i, run in enumerate(runs) if has_line[i]]


def _title(run: Run, runs: Sequence[Run]) -> str:
    return run.name if len(runs) > 1 else ""


def _no_data(*metrics: str, title: str = "") -> Panel:
    return Panel(title, f"No data: no finite value of {' or '.join(metrics)} was logged.", None)


def _span(runs: Sequence[Run]) -> tuple[float, float]:
    return 0.0, float(max(1, *(run.steps for run in runs)))


def _window(points: int) -> int:
    """A twentieth of the run, from 20 points on: enough to see the trend, too little to bend it."""
    return max(5, points // 20) if points >= 20 else 1


def _in_words(name: str, x: FloatArray, y: FloatArray, unit: str = "") -> str:
    first, last = f"{y[0]:.3g}{unit} at step {x[0]:.0f}", f"{y[-1]:.3g}{unit} at step {x[-1]:.0f}"
    return f"{name}: {first}" + (f", {last}" if len(x) > 1 else "")
