"""Figures with a line or a row of cells for each suite: acceptance by position, the threshold sweep.

Few suites are lines, told apart by colour and marker. Many are a table of
shaded cells: ten lines over one another tell nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from draftline.report.collect import headline_sweep
from draftline.report.style import MARKERS, SERIES, nothing, number, short

MAX_LINES = len(SERIES)

Outputs = Mapping[str, Mapping[str, Any]]


def acceptance_figure(suites: Outputs) -> Figure:
    """Conditional acceptance and survival by position, side by side."""
    panels = (
        ("acceptance_by_position", "Accepted, if reached"),
        ("survival_by_position", "All up to here accepted"),
    )
    columns = {
        name: {suite: values for suite, o in suites.items() if (values := _numbers(o.get(name)))} for name, _ in panels
    }
    width = max((len(values) for lines in columns.values() for values in lines.values()), default=1)
    ticks = [str(k + 1) for k in range(width)]
    if len(suites) > MAX_LINES:
        return _cells([(title, columns[name]) for name, title in panels], ticks, "position in the drafted block")
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, (name, title) in zip(both, panels, strict=True):
        _draw_lines(axes, title, list(range(1, width + 1)), columns[name])
        _label_ends(axes, columns[name])
        axes.set_xlim(0.7, width + 0.3)
        axes.set_xticks(range(1, width + 1))
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("position in the drafted block")
    both[0].set_ylabel("probability")
    if both[1].lines:
        # Survival falls, so this corner is free.
        both[1].legend(loc="upper right")
    return figure


def sweep_figure(suites: Outputs) -> Figure:
    """What stopping at a survival threshold does: acceptance rate up, verified and accepted lengths down."""
    swept = {suite: points for suite, outputs in suites.items() if (points := headline_sweep(outputs))}
    if not swept:
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title("Stopping at a threshold")
        return nothing(figure, axes, "no confidences")
    panels = (
        ("acceptance_rate", "Accepted of what is verified"),
        ("verified_length", "Drafts verified per step"),
        ("accepted_length", "Tokens per step"),
    )
    columns = {
        name: {suite: [number(point.get(name)) for point in points] for suite, points in swept.items()}
        for name, _ in panels
    }
    thresholds = [number(point.get("threshold")) for point in next(iter(swept.values()))]
    if len(swept) > MAX_LINES:
        chosen = [0, *range(2, len(thresholds), 2)]
        parts = [
            (title, {suite: [values[k] for k in chosen] for suite, values in columns[name].items()})
            for name, title in (panels[0], panels[2])
        ]
        return _cells(parts, [f"{thresholds[k]:g}" for k in chosen], "threshold on predicted survival")
    figure = Figure(figsize=(10.4, 3.7), layout="constrained")
    three = figure.subplots(1, 3)
    for axes, (name, title) in zip(three, panels, strict=True):
        _draw_lines(axes, title, thresholds, columns[name])
        axes.set_xlabel("threshold on predicted survival")
        axes.set_xticks([t for t in thresholds if round(10 * t) % 2 == 0])
    three[0].set_ylim(0, 1.02)
    three[1].set_ylim(bottom=0)
    three[2].set_ylim(bottom=0.9)
    three[0].legend(loc="lower right")
    return figure


def _draw_lines(axes: Axes, title: str, x: Sequence[float], lines: Mapping[str, Sequence[float]]) -> None:
    axes.set_title(title)
    for place, (suite, values) in enumerate(lines.items()):
        axes.plot(
            x[: len(values)],
            values,
            color=SERIES[place % len(SERIES)],
            marker=MARKERS[place % len(MARKERS)],
            linewidth=2,
            markersize=6,
            label=short(suite),
        )
    axes.grid(axis="y")


def _cells(parts: Sequence[tuple[str, Mapping[str, Sequence[float]]]], ticks: Sequence[str], unit: str) -> Figure:
    """Two tables of shaded cells side by side, a row a suite."""
    rows = list(dict.fromkeys(suite for _, lines in parts for suite in lines))
    figure = Figure(figsize=(1.4 + 0.62 * len(ticks) * len(parts), 1.3 + 0.34 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(parts), sharey=True)
    for axes, (title, lines) in zip(panels, parts, strict=True):
        values = [[*lines.get(suite, ()), *[math.nan] * len(ticks)][: len(ticks)] for suite in rows]
        known = [value for row in values for value in row if not math.isnan(value)]
        axes.imshow(values, cmap="Blues", vmin=0, vmax=max([*known, 1e-9]) * 1.15, aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    dark = value > 0.7 * max(known)
                    axes.text(
                        x, y, f"{value:.2f}", ha="center", va="center", size=8, color="white" if dark else "#22262d"
                    )
        axes.set_title(title)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_yticks(range(len(rows)), [short(suite) for suite in rows])
        axes.set_xlabel(unit)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def _label_ends(axes: Axes, lines: Mapping[str, Sequence[float]]) -> None:
    """Write the first point's value beside each line; below it where lines would collide."""
    firsts = sorted(
        ((values[0], place) for place, values in enumerate(lines.values()) if not math.isnan(values[0])), reverse=True
    )
    if len(firsts) > 2:
        return
    for rank, (value, place) in enumerate(firsts):
        offset = (4, 8) if rank == 0 else (4, -15)
        axes.annotate(f"{value:.2f}", (1, value), offset, textcoords="offset points", color=SERIES[place % len(SERIES)])


def _numbers(values: Any) -> list[float]:
    return [number(value) for value in values or ()]
