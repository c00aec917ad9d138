"""The figures, as PNG bytes; equal input gives equal bytes (one matplotlib version).

No pyplot and no global state: figures are built as objects on the Agg canvas,
with the font that matplotlib ships and no date or version in the file.
Colours are those of Okabe and Ito, told apart by colour-blind readers; where
two series share an axis they also differ in marker or line.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from draftline.report.collect import ReportData

BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#8A8F98"
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE)
MARKERS = ("o", "s", "^", "D", "v")
DPI = 144

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.parse_math": False,  # a label from a user's file may hold a $
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5B616B",
    "axes.labelcolor": "#30343B",
    "axes.axisbelow": True,
    "xtick.color": "#5B616B",
    "ytick.color": "#5B616B",
    "grid.color": "#E3E6EA",
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def render_plots(data: ReportData) -> dict[str, bytes]:
    """All figures by file name."""
    return {
        "accepted_length.png": _render(lambda: accepted_length_figure(data.suites)),
        "acceptance_by_position.png": _render(lambda: acceptance_figure(data.suites)),
        "reliability.png": _render(lambda: reliability_figure(data.calibration.outputs)),
        "loss.png": _render(lambda: training_figure(data.history)),
    }


def accepted_length_figure(suites: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Bars of accepted length, a suite each, its domains below it."""
    bars: list[tuple[str, float, bool]] = []
    for suite, outputs in suites.items():
        bars.append((suite, _number(outputs.get("accepted_length")), True))
        domains = sorted((outputs.get("domains") or {}).items())
        if len(domains) > 1:
            bars += [(domain, _number(value), False) for domain, value in domains]
    figure = Figure(figsize=(7.2, 1.5 + 0.36 * max(len(bars), 2)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title("Accepted length: tokens per verification step")
    if not bars:
        return _nothing(figure, axes, "no suite was evaluated")
    for place, (_, value, is_suite) in enumerate(bars):
        shown = 0.0 if math.isnan(value) else value
        axes.barh(place, shown, height=0.72, color=BLUE if is_suite else "#8FC1DF")
        label = "n/a" if math.isnan(value) else f"{value:.2f}"
        axes.annotate(
            label, (shown, place), (5, 0), textcoords="offset points", va="center", weight="bold" if is_suite else None
        )
    axes.set_yticks(range(len(bars)), [_short(name) if top else f"· {_short(name)}" for name, _, top in bars])
    for tick, (_, _, is_suite) in zip(axes.get_yticklabels(), bars, strict=True):
        tick.set_fontweight("bold" if is_suite else "normal")
    axes.invert_yaxis()
    longest = max((value for _, value, _ in bars if not math.isnan(value)), default=1.0)
    axes.set_xlim(0, max(longest * 1.12, 1.3))
    axes.axvline(1.0, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, zorder=3)
    axes.set_xlabel("tokens per step, the target's own included (dashed: 1.0, plain decoding)")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    return figure


def acceptance_figure(suites: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Conditional acceptance and survival by position, side by side, a line a suite."""
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, title in (
        (panels[0], "acceptance_by_position", "Accepted, if reached"),
        (panels[1], "survival_by_position", "All up to here accepted"),
    ):
        axes.set_title(title)
        lines = {suite: [_number(v) for v in outputs.get(name) or ()] for suite, outputs in suites.items()}
        lines = {suite: values for suite, values in lines.items() if values}
        for place, (suite, values) in enumerate(lines.items()):
            axes.plot(
                range(1, len(values) + 1),
                values,
                color=SERIES[place % len(SERIES)],
                marker=MARKERS[place % len(MARKERS)],
                linewidth=2,
                markersize=6,
                label=suite,
            )
        _label_ends(axes, lines)
        width = max((len(values) for values in lines.values()), default=1)
        axes.set_xlim(0.7, width + 0.3)
        axes.set_xticks(range(1, width + 1))
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("position in the drafted block")
        axes.grid(axis="y")
    panels[0].set_ylabel("probability")
    if panels[0].lines:
        panels[0].legend(loc="lower left")
    return figure


def reliability_figure(calibration: Mapping[str, Any]) -> Figure:
    """Predicted against observed survival, a panel a position; ECE before and after in the titles."""
    after: Sequence[Any] = calibration.get("reliability") or ()
    before: Sequence[Any] = calibration.get("reliability_before") or ()
    if not after:
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title("Reliability of the confidence head")
        return _nothing(figure, axes, "no calibrated confidences")
    columns = min(4, len(after))
    rows = math.ceil(len(after) / columns)
    figure = Figure(figsize=(0.6 + 2.5 * columns, 0.8 + 2.6 * rows), layout="constrained")
    figure.suptitle("Does the draft know when it will be accepted?", x=0.01, ha="left", weight="bold", size=12)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for place, axes in enumerate(panels.flat):
        if place >= len(after):
            axes.set_visible(False)
            continue
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=(0, (4, 3)), linewidth=1.2)
        if place < len(before):
            _reliability_line(axes, before[place], ORANGE, "s", (0, (2, 2)), "before scaling")
        _reliability_line(axes, after[place], BLUE, "o", "-", "after scaling")
        axes.set_title(_ece_title(calibration, place), size=9.5, pad=6)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axes.grid()
        if place % columns == 0:
            axes.set_ylabel("observed")
        if place + columns >= len(after):
            axes.set_xlabel("predicted survival")
            axes.tick_params(labelbottom=True)
    panels[0, 0].legend(loc="upper left", fontsize=8, handlelength=1.6, borderaxespad=0.1)
    return figure


def training_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    """Loss and offline accepted length over optimiser steps; validation as marked points."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name, title, unit in (
        (panels[0], "loss", "Training loss", "loss"),
        (panels[1], "accepted_length", "Accepted length, offline", "tokens per step"),
    ):
        axes.set_title(title)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(unit)
        axes.grid(axis="y")
        steps, values = _column(history, name)
        if not steps:
            _nothing(figure, axes, "not logged")
            continue
        axes.plot(steps, values, color="#B8D4E8", linewidth=1)
        axes.plot(steps, _smooth(values), color=BLUE, linewidth=2, label="training, smoothed")
        marked = _column(history, f"validation_{name}")
        if marked[0]:
            axes.plot(*marked, color=VERMILION, marker="o", linewidth=1.4, markersize=5, label="validation")
            axes.annotate(
                f"{marked[1][-1]:.2f}", (marked[0][-1], marked[1][-1]), (6, 0), textcoords="offset points", va="center",
                color=VERMILION, weight="bold",
            )  # fmt: skip
        axes.margins(x=0.08)
        axes.legend()
    return figure


def _render(build: Callable[[], Figure]) -> bytes:
    # From the defaults, not from a user's matplotlibrc: the bytes must not depend on the machine's taste.
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")}
    style: Any = {**defaults, **_STYLE}
    with matplotlib.rc_context(style):
        figure = build()
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _reliability_line(
    axes: Axes, bins: Sequence[Mapping[str, float]], color: str, marker: str, line: Any, label: str
) -> None:
    filled = [b for b in bins if b.get("count", 0) > 0 and not math.isnan(_number(b.get("observed")))]
    if not filled:
        return
    x, y = [_number(b["predicted"]) for b in filled], [_number(b["observed"]) for b in filled]
    most = max(b["count"] for b in filled)
    axes.plot(x, y, color=color, linestyle=line, linewidth=1.4, marker=marker, markersize=3, label=label)
    # Area by count: a far-off point with few tokens behind it should look small.
    axes.scatter(x, y, s=[10 + 60 * b["count"] / most for b in filled], color=color, marker=marker, alpha=0.55, lw=0)


def _ece_title(calibration: Mapping[str, Any], place: int) -> str:
    def at(name: str) -> str:
        values = calibration.get(name) or ()
        value = _number(values[place]) if place < len(values) else math.nan
        return "n/a" if math.isnan(value) else f"{value:.3f}"

    return f"position {place + 1}\nECE {at('ece_before')} → {at('ece_after')}"


def _label_ends(axes: Axes, lines: Mapping[str, Sequence[float]]) -> None:
    """Write the first point's value beside each line; below it where lines would collide."""
    firsts = sorted(
        ((values[0], place) for place, values in enumerate(lines.values()) if not math.isnan(values[0])), reverse=True
    )
    for rank, (value, place) in enumerate(firsts):
        offset = (4, 8) if rank == 0 else (4, -15)
        axes.annotate(f"{value:.2f}", (1, value), offset, textcoords="offset points", color=SERIES[place % len(SERIES)])


def _nothing(figure: Figure, axes: Axes, why: str) -> Figure:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set(xticks=(), yticks=())
    return figure


def _column(history: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    rows = [(row["step"], _number(row.get(name))) for row in history if "step" in row]
    rows = [row for row in rows if not math.isnan(row[1])]
    return [step for step, _ in rows], [value for _, value in rows]


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over about a twentieth of the run; narrower at the ends, so it does not lag."""
    reach = len(values) // 40
    smoothed = []
    for place in range(len(values)):
        half = min(reach, place, len(values) - 1 - place)
        window = values[place - half : place + half + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"
