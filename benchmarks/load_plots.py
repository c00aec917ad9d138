"""Figures of the load benchmark, after figures 7 and 8 of the DSpark paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from draftline.report.style import BLUE, DPI, GREEN, GREY, MARKERS, ORANGE, PURPLE, STYLE, VERMILION

if TYPE_CHECKING:
    from benchmarks.load import Point

COLOURS = {"off": GREY, "fixed 1": ORANGE, "fixed": VERMILION, "threshold": PURPLE, "sync": GREEN, "async": BLUE}


def write_plots(points: Sequence[Point], folder: Path) -> None:
    """``load-pareto.png``: a user's speed against all users' throughput. ``load-budget.png``: budget against load."""
    with matplotlib.rc_context(STYLE):
        _pareto(points).savefig(folder / "load-pareto.png", dpi=DPI, bbox_inches="tight")
        _budget(points).savefig(folder / "load-budget.png", dpi=DPI, bbox_inches="tight")


def _pareto(points: Sequence[Point]) -> Figure:
    figure = Figure(figsize=(7.5, 4.5))
    axes = figure.subplots()
    for number, (policy, line) in enumerate(_lines(points).items()):
        axes.plot(
            [point.tokens_per_s for point in line],
            [point.per_user for point in line],
            label=policy,
            color=COLOURS.get(policy, GREY),
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
        )
    for point in _lines(points).get("async", []):
        axes.annotate(
            str(point.users),
            (point.tokens_per_s, point.per_user),
            textcoords="offset points",
            xytext=(6, 6),
            fontsize=8,
        )
    axes.set(
        title="A user's speed against throughput, by policy",
        xlabel="tokens per second, all users (numbers at the points: concurrent users)",
        ylabel="tokens per second, median user",
    )
    axes.set_ylim(bottom=0)
    axes.grid(True)
    axes.legend()
    return figure


def _budget(points: Sequence[Point]) -> Figure:
    figure = Figure(figsize=(7.5, 4.5))
    axes = figure.subplots()
    for policy in ("fixed", "async"):
        line = _lines(points).get(policy, [])
        _against_load(axes, line, [point.budget for point in line], f"{policy}: drafts verified", policy, "-")
        _against_load(axes, line, [point.accepted_length for point in line], f"{policy}: accepted length", policy, "--")
    axes.set(
        title="Verification budget and accepted length against load",
        xlabel="concurrent users",
        ylabel="tokens per request and step",
        xscale="log",
    )
    axes.set_ylim(bottom=0)
    users = sorted({point.users for point in points})
    axes.set_xticks(users, [str(count) for count in users])
    axes.minorticks_off()
    axes.grid(True)
    axes.legend()
    return figure


def _against_load(
    axes: Axes, line: Sequence[Point], values: Sequence[float], label: str, policy: str, style: str
) -> None:
    if line:
        axes.plot([point.users for point in line], values, style, label=label, color=COLOURS[policy], marker="o")


def _lines(points: Sequence[Point]) -> dict[str, list[Point]]:
    lines: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.users):
        lines.setdefault(point.policy, []).append(point)
    return lines
