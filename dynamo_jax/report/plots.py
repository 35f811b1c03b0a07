"""Drawing: arrays in, small deterministic SVG out. Knows nothing of runs and takes no text from outside.

Colours are CSS variables, so that a chart follows the page from light to dark; names of runs are written by the
page, which escapes them.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dynamo_jax.report.runs import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 400  # a line is at most about 600 pixels wide
MAX_BARS = 40

# (light, dark) of every colour. Runs: Okabe and Ito. Difficulty: ordered in lightness. Phases: Tol's "muted".
COLORS = {
    "ink": ("#2b3036", "#d5dae1"),
    "muted": ("#6b727b", "#9aa3ad"),
    "grid": ("#e4e7eb", "#343b44"),
    "card": ("#fefefe", "#1b2027"),
    "run0": ("#0072b2", "#4fa9e0"),
    "run1": ("#d55e00", "#f58b4c"),
    "run2": ("#009e73", "#2fc79b"),
    "run3": ("#cc79a7", "#e39dc5"),
    "run4": ("#e69f00", "#f2bd45"),
    "run5": ("#56b4e9", "#97d3f5"),
    "run6": ("#4b4f55", "#c3c8cf"),
    "easy": ("#e3ad32", "#f2c45a"),
    "middle": ("#2a9d8f", "#3fbfae"),
    "hard": ("#5b3a8c", "#a385de"),
    "phase0": ("#88ccee", "#88ccef"),
    "phase1": ("#ddcc77", "#ddcc78"),
    "phase2": ("#44aa99", "#45ab9a"),
    "phase3": ("#332288", "#7468cf"),
    "phase4": ("#cc6677", "#cf6d7e"),
    "phase5": ("#117733", "#3f9d5d"),
    "phase6": ("#882255", "#b8487f"),
    "phase7": ("#b9bec5", "#59616b"),
}
DASHES = {"solid": "", "dashed": "5 2.5", "dotted": "1.2 2"}  # stroke-dasharray, in line widths of about 1.5
_STYLES = {"main": (1.6, 1.0), "second": (1.1, 0.85), "raw": (0.6, 0.35)}  # width in points, opacity


@dataclasses.dataclass(frozen=True)
class Svg:
    """The inside of an `<svg>` element and its `viewBox`."""

    view_box: str
    body: str


@dataclasses.dataclass(frozen=True)
class Line:
    x: FloatArray
    y: FloatArray
    color: str
    dash: str = "solid"
    style: str = "main"
    low: FloatArray | None = None  # with `high`: an interval around y at the same x
    high: FloatArray | None = None
    mark_up_to: int = 1  # points get a dot if there are no more than this


def thin(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """At most about MAX_POINTS points: the smallest and the largest of each stretch, so that no spike is lost."""
    if len(x) <= MAX_POINTS:
        return x, y
    keep = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), MAX_POINTS // 2):
        keep |= {int(stretch[np.argmin(y[stretch])]), int(stretch[np.argmax(y[stretch])])}
    index = np.array(sorted(keep))
    return x[index], y[index]


def smooth(y: FloatArray, window: int) -> FloatArray:
    """Centred moving average over `window` points, fewer at the ends."""
    kernel = np.ones(min(window, len(y)))
    return np.convolve(y, kernel, "same") / np.convolve(np.ones(len(y)), kernel, "same")


def draw_lines(
    name: str, lines: Sequence[Line], unit: str, log: bool = False, span: tuple[float, float] | None = None,
    top: float | None = None, along: str = "training step",
) -> Svg:  # fmt: skip
    """Lines over steps, or over what `along` says.

    `log` asks for a logarithmic axis, given if the values span more than a factor of 30.
    """
    values = np.concatenate([line.y for line in lines])
    positive = values[values > 0]
    log = log and len(positive) > 1 and bool(positive.max() > 30 * positive.min())

    def draw(axes: Axes) -> None:
        for line in lines:
            shown = line.y > 0 if log else np.full(len(line.y), True)
            x, y = thin(line.x[shown], line.y[shown])
            color = COLORS[line.color][0]
            width, alpha = _STYLES[line.style]
            if line.low is not None and line.high is not None:
                some = slice(None, None, 1 + len(line.x) // MAX_POINTS)
                axes.fill_between(line.x[some], line.low[some], line.high[some], color=color, alpha=0.16, linewidth=0)
            dash = tuple(float(part) for part in DASHES[line.dash].split())
            axes.plot(
                x, y, color=color, linewidth=width, alpha=alpha,
                linestyle=(0, dash) if dash else "-",
                marker="o" if len(x) <= line.mark_up_to else "", markersize=3.2,
            )  # fmt: skip
        if span is not None:
            axes.set_xlim(span)
        if top is not None:
            axes.set_ylim(0, top)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(_ticker().NullLocator())

    return _render(name, draw, unit, along)


def bars(x: FloatArray, layers: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Edges [n + 1] and heights [L, n] of at most MAX_BARS bars, each the mean of a stretch of layers [L, S]."""
    groups = np.array_split(np.arange(len(x)), min(len(x), MAX_BARS))
    heights = np.stack([layers[:, group].mean(axis=1) for group in groups], axis=1)
    edges = np.array([x[group[0]] - 0.5 for group in groups] + [x[-1] + 0.5])
    return edges, heights


def draw_stack(
    name: str, edges: FloatArray, heights: FloatArray, colors: Sequence[str], unit: str, span: tuple[float, float],
    top: float,
) -> Svg:  # fmt: skip
    """What `bars` returned, layers on top of each other, up to the height `top`."""

    def draw(axes: Axes) -> None:
        # Steps as one path a layer: a tenth of the size of bars.
        axes.stackplot(
            edges, np.concatenate([heights, heights[:, -1:]], axis=1), step="post",
            colors=[COLORS[color][0] for color in colors], edgecolor=COLORS["card"][0], linewidth=0.5,
        )  # fmt: skip
        axes.set_xlim(span[0], span[1] + 0.5)
        axes.set_ylim(0, top)
        axes.grid(False)

    return _render(name, draw, unit)


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker


def _render(name: str, draw: Callable[[Axes], None], unit: str, along: str = "training step") -> Svg:
    # Imported here: a report is made once, and every other command would pay for the import.
    import matplotlib.style
    from matplotlib.figure import Figure

    ink, muted, grid = (COLORS[color][0] for color in ("ink", "muted", "grid"))
    look = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8.5, "text.color": ink, "axes.labelcolor": muted,
        "axes.edgecolor": muted, "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
        "xtick.color": muted, "ytick.color": muted, "xtick.labelcolor": ink, "ytick.labelcolor": ink,
        "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
        "axes.grid": True, "grid.color": grid, "grid.linewidth": 0.6, "axes.axisbelow": True,
        "axes.formatter.useoffset": False, "axes.xmargin": 0.02, "lines.solid_joinstyle": "round",
        "lines.scale_dashes": True, "axes.formatter.limits": (-3, 6),
    }  # fmt: skip
    with matplotlib.style.context(["default", look]):
        figure = Figure(figsize=(6.0, 2.75))
        # Fixed margins: axes of charts above each other line up, in half the time of an automatic layout.
        axes = figure.add_axes((0.12, 0.165, 0.865, 0.76))
        axes.yaxis.set_label_coords(-0.1, 0.5)
        draw(axes)
        axes.set_xlabel(along)
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(_ticker().MaxNLocator(nbins=8, integer=along == "training step"))
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _shrink(out.getvalue())


def _shrink(svg: str) -> Svg:
    """What a page needs of matplotlib's file: no prolog, no namespaces, ids only where used, 1/100 point."""
    head, body = re.search(r"<svg([^>]*)>(.*)</svg>", svg, re.DOTALL).groups()  # type: ignore[union-attr]
    box = re.search(r'viewBox="([^"]*)"', head).group(1)  # type: ignore[union-attr]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", body, flags=re.DOTALL).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: m.group(0) if m.group(1) in used else "", body)
    body = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda m: re.sub(r"-?\d+\.\d+", _two_decimals, m.group(0)), body)
    for color, (light, _) in COLORS.items():
        body = body.replace(light, f"var(--{color})")
    return Svg(box, re.sub(r"\s*\n\s*", "\n", body))


def _two_decimals(match: re.Match[str]) -> str:
    return f"{float(match.group(0)):.2f}".rstrip("0").rstrip(".")
