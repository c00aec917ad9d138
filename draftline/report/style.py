"""Colours, type and small helpers of the figures."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#8A8F98"
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE)
MARKERS = ("o", "s", "^", "D", "v")
DPI = 144

STYLE: dict[str, Any] = {
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


def nothing(figure: Figure, axes: Axes, why: str) -> Figure:
    """Say in an empty figure why it is empty."""
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set(xticks=(), yticks=())
    return figure


def number(value: Any) -> float:
    """The value, or NaN for anything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)


def short(name: str) -> str:
    """A label that fits beside an axis."""
    return name if len(name) <= 28 else name[:27] + "…"
