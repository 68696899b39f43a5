"""Plots as SVG text for the report: one panel per figure, small enough for a phone.

Axes and text take the page's colour (``currentColor``), so one drawing serves light and dark.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""
COLOURS = ("#3d7fd9", "#e07b39", "#2f9e6e", "#b565c9", "#c2a10f", "#d9527a", "#5aa9b8", "#8c8c8c")
"""Contrast of at least 3:1 to the report's white and to its dark background."""
MARKERS = ("o", "D", "s", "^", "v", "P", "X", "*")
WIDTH = 4.0
"""Inches. A panel is 288 SVG units wide, so 9 pt text is still 9 px or more on a phone of 390 px."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vlm4vla",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Point:
    """A rate with its interval, as fractions, or an average; ``rate`` is None where nothing was measured."""

    rate: float | None
    low: float = 0.0
    high: float = 1.0


def dots(title: str, rows: Sequence[str], series: Mapping[str, Sequence[Point]], chance: float | None = None) -> str:
    """Dot-and-whisker: a line per row, a mark per series on it, whiskers for the intervals, chance as a dashed line."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.75 + 0.17 * len(series) * len(rows) + 0.2 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        spread = 0.17 * (len(series) - 1)
        for i, (name, points) in enumerate(series.items()):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            for y, point in enumerate(points):
                if point.rate is None:
                    continue
                at = y + (i - (len(series) - 1) / 2) * (spread / max(1, len(series) - 1) if spread else 0)
                axes.plot([point.low, point.high], [at, at], color=colour, linewidth=1.6, solid_capstyle="round")
                axes.plot([point.rate], [at], marker=marker, markersize=5.5, color=colour, linestyle="none")
            axes.plot([], [], marker=marker, color=colour, linewidth=1.6, markersize=5.5, label=name)
        if chance is not None:
            axes.axvline(chance, color=INK, linewidth=1, linestyle=(0, (3, 3)), alpha=0.7)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlim(-0.02, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(axis="x")
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        _legend(axes, len(series))
        return _svg(figure, title)


def over_steps(
    title: str,
    series: Mapping[str, Sequence[tuple[int, Point]]],
    chance: float | None = None,
    top: float | None = None,
) -> str:
    """Rates, or averages of at most ``top``, over training steps with their intervals as bands, a line per series."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, points) in enumerate(series.items()):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            known = [(step, point) for step, point in points if point.rate is not None]
            steps = [step for step, _ in known]
            rates = [point.rate for _, point in known if point.rate is not None]
            axes.plot(steps, rates, color=colour, marker=marker, markersize=4.5, label=name)
            axes.fill_between(
                steps, [p.low for _, p in known], [p.high for _, p in known], color=colour, alpha=0.15, linewidth=0
            )
        if chance is not None:
            axes.axhline(chance, color=INK, linewidth=1, linestyle=(0, (3, 3)), alpha=0.7)
        axes.set_ylim(-0.02 * (top or 1), 1.02 * (top or 1))
        axes.set_xlim(left=0)
        if top is None:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("training steps")
        axes.grid(axis="y")
        axes.tick_params(length=2)
        _legend(axes, len(series))
        return _svg(figure, title)


def curves(title: str, lines: Sequence[tuple[str, Sequence[float], Sequence[float]]], log: bool = False) -> str:
    """Training curves: ``(series, steps, values)`` for each run; runs of one series share a colour."""
    names = list(dict.fromkeys(name for name, *_ in lines))
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for name, steps, values in lines:
            finite = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v) and (v > 0 or not log)]
            colour = COLOURS[names.index(name) % len(COLOURS)]
            axes.plot([s for s, _ in finite], [v for _, v in finite], color=colour, linewidth=1, alpha=0.85)
        for i, name in enumerate(names):
            axes.plot([], [], color=COLOURS[i % len(COLOURS)], linewidth=1.6, label=name)
        if log:
            axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("training steps")
        axes.grid(axis="y")
        axes.tick_params(length=2, which="both")
        _legend(axes, len(names))
        return _svg(figure, title)


def _legend(axes: Axes, num: int) -> None:
    axes.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=min(num, 3),
        frameon=False,
        fontsize=8,
        handlelength=1.4,
    )


def _svg(figure: Figure, title: str) -> str:
    """The figure as an ``<svg>`` element without fixed size, with ``title`` for readers that do not see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-z]+[a-zA-Z0-9]*_[0-9_]*"', "", text)  # matplotlib numbers them anew in each figure
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)  # the page's font
    text = text.replace(INK, "currentColor")
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img"><title>{escape(title)}</title>{rest}'
