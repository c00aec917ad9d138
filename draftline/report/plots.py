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
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from draftline.report.collect import ReportData
from draftline.report.lines import acceptance_figure, sweep_figure
from draftline.report.style import BLUE, DPI, GREEN, GREY, ORANGE, STYLE, VERMILION, nothing, number, short

_BAR_COLORS = ((BLUE, "#8FC1DF"), (ORANGE, "#F3D38F"), (GREEN, "#8FCFBA"))
"""Of a suite and of a domain, a pair a temperature."""


@dataclass(frozen=True)
class Reliability:
    """Points of reliability diagrams, a list a position.

    Attributes:
        where: Measured on.
        before: Raw.
        after: After the chosen map.
        ece_before: Calibration error by position.
        ece_after: The same after.
    """

    where: str
    before: Sequence[Any]
    after: Sequence[Any]
    ece_before: Sequence[Any]
    ece_after: Sequence[Any]

    @classmethod
    def of_fit(cls, calibration: Mapping[str, Any]) -> Reliability:
        """On the calibration split, by fits that had not seen the request where there were folds."""
        names = ("reliability_before", "reliability", "ece_before", "ece_after")
        where = f"calibration split, {calibration.get('method', 'sts')}"
        return cls(where, *(calibration.get(name) or () for name in names))

    @classmethod
    def of_suites(cls, suites: Mapping[str, Mapping[str, Any]]) -> Reliability:
        """On the first suite, whose prompts the fit has not seen, at its first temperature."""
        for suite, outputs in list(suites.items())[:1]:
            for one in (outputs.get("by_temperature") or ())[:1]:
                if found := one.get("confidence"):
                    before, after = found["before"], found["after"]
                    where = f"{short(suite)}, temperature {one['temperature']:g}"
                    return cls(where, before["reliability"], after["reliability"], before["ece"], after["ece"])
        return cls("not measured", (), (), (), ())


def render_plots(data: ReportData, mentioned_in: str | None = None) -> dict[str, bytes]:
    """The figures by file name: all, or those whose name a text mentions."""
    figures: dict[str, Callable[[], Figure]] = {
        "accepted_length.png": lambda: accepted_length_figure(data.suites),
        "acceptance_by_position.png": lambda: acceptance_figure(data.suites),
        "threshold_sweep.png": lambda: sweep_figure(data.suites),
        "reliability.png": lambda: reliability_figure(Reliability.of_fit(data.calibration.outputs)),
        "reliability_held_out.png": lambda: reliability_figure(Reliability.of_suites(data.suites)),
        "loss.png": lambda: training_figure(data.history),
    }
    return {name: _render(build) for name, build in figures.items() if mentioned_in is None or name in mentioned_in}


def accepted_length_figure(suites: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Bars of accepted length, a suite each, its domains below it; a thinner bar for each further temperature."""
    rows = _accepted_rows(suites)
    temperatures = _temperatures(suites)
    count = max(1, len(temperatures))
    height = 0.36 if count == 1 else 0.25 + 0.13 * count
    figure = Figure(figsize=(7.6, 1.5 + height * max(len(rows), 2)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title("Accepted length: tokens per verification step")
    if not rows:
        return nothing(figure, axes, "no suite was evaluated")
    thick = 0.8 / count
    for place, (_, values, is_suite) in enumerate(rows):
        for which, value in enumerate(values):
            shown = 0.0 if math.isnan(value) else value
            y = place + (which - (len(values) - 1) / 2) * thick
            dark, light = _BAR_COLORS[which % len(_BAR_COLORS)]
            axes.barh(y, shown, height=0.9 * thick, color=dark if is_suite else light)
            label = "n/a" if math.isnan(value) else f"{value:.2f}"
            weight = "bold" if is_suite and which == 0 else None
            axes.annotate(label, (shown, y), (5, 0), textcoords="offset points", va="center", weight=weight, size=9)
    axes.set_yticks(range(len(rows)), [short(name) if top else f"· {short(name)}" for name, _, top in rows])
    for tick, (_, _, is_suite) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if is_suite else "normal")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    longest = max((value for _, values, _ in rows for value in values if not math.isnan(value)), default=1.0)
    axes.set_xlim(0, max(longest * 1.12, 1.3))
    axes.axvline(1.0, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, zorder=3)
    axes.set_xlabel("tokens per step, the target's own included (dashed: 1.0, plain decoding)")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    if count > 1:
        handles = [Patch(color=_BAR_COLORS[k % len(_BAR_COLORS)][0], label=f"temperature {t:g}") for k, t in
                   enumerate(temperatures)]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower right", ncols=count)
    return figure


def _accepted_rows(suites: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[float], bool]]:
    """Label, accepted length by temperature, and whether it is a suite: each suite, then its domains."""
    rows: list[tuple[str, list[float], bool]] = []
    for suite, outputs in suites.items():
        further: Sequence[Mapping[str, Any]] = (outputs.get("by_temperature") or ())[1:]
        lengths = [outputs.get("accepted_length"), *(one.get("accepted_length") for one in further)]
        rows.append((suite, [number(value) for value in lengths], True))
        domains = sorted((outputs.get("domains") or {}).items())
        for domain, value in domains if len(domains) > 1 else ():
            others = [((one.get("domains") or {}).get(domain) or {}).get("accepted_length") for one in further]
            rows.append((domain, [number(value), *(number(other) for other in others)], False))
    return rows


def _temperatures(suites: Mapping[str, Mapping[str, Any]]) -> list[float]:
    found: list[float] = []
    for outputs in suites.values():
        for one in outputs.get("by_temperature") or ():
            if one.get("temperature") not in found:
                found.append(one["temperature"])
    return found


def reliability_figure(measures: Reliability) -> Figure:
    """Predicted against observed survival, a panel a position; ECE before and after in the titles."""
    before, after = measures.before, measures.after
    if not after:
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title("Reliability of the confidence head")
        return nothing(figure, axes, "no calibrated confidences")
    columns = min(4, len(after))
    rows = math.ceil(len(after) / columns)
    figure = Figure(figsize=(0.6 + 2.5 * columns, 0.8 + 2.6 * rows), layout="constrained")
    title = f"Does the draft know when it will be accepted? ({measures.where})"
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=12)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for place, axes in enumerate(panels.flat):
        if place >= len(after):
            axes.set_visible(False)
            continue
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=(0, (4, 3)), linewidth=1.2)
        if place < len(before):
            _reliability_line(axes, before[place], ORANGE, "s", (0, (2, 2)), "before")
        _reliability_line(axes, after[place], BLUE, "o", "-", "after")
        axes.set_title(_ece_title(measures, place), size=9.5, pad=6)
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
            nothing(figure, axes, "not logged")
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
    style: Any = {**defaults, **STYLE}
    with matplotlib.rc_context(style):
        figure = build()
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _reliability_line(
    axes: Axes, bins: Sequence[Mapping[str, float]], color: str, marker: str, line: Any, label: str
) -> None:
    filled = [b for b in bins if b.get("count", 0) > 0 and not math.isnan(number(b.get("observed")))]
    if not filled:
        return
    x, y = [number(b["predicted"]) for b in filled], [number(b["observed"]) for b in filled]
    most = max(b["count"] for b in filled)
    axes.plot(x, y, color=color, linestyle=line, linewidth=1.4, marker=marker, markersize=3, label=label)
    # Area by count: a far-off point with few tokens behind it should look small.
    axes.scatter(x, y, s=[10 + 60 * b["count"] / most for b in filled], color=color, marker=marker, alpha=0.55, lw=0)


def _ece_title(measures: Reliability, place: int) -> str:
    def at(values: Sequence[Any]) -> str:
        value = number(values[place]) if place < len(values) else math.nan
        return "n/a" if math.isnan(value) else f"{value:.3f}"

    return f"position {place + 1}\nECE {at(measures.ece_before)} → {at(measures.ece_after)}"


def _column(history: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    rows = [(row["step"], number(row.get(name))) for row in history if "step" in row]
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
