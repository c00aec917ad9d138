"""How a run's progress looks: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipelines.events import RunProgress, StationProgress

LINE_INTERVAL_S = 5.0
_MARKS = {
    "pending": ("·", "dim"),
    "running": ("▶", "cyan"),
    "finished": ("✔", "green"),
    "skipped": ("✔", "dim green"),
    "failed": ("✘", "bold red"),
    "omitted": ("-", "dim"),
}


def format_duration(seconds: float) -> str:
    """``0:07``, ``12:40``, ``1:02:03``."""
    whole = int(max(seconds, 0.0) + 0.5)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_count(value: float) -> str:
    """A count with thousands separators, with one decimal only where it has one."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:,.1f}"


def describe(line: StationProgress, now_s: float) -> str:
    """What one station is doing, in words."""
    if line.state == "pending":
        return "waiting"
    if line.state == "omitted":
        return "not run, the gate refused the draft"
    if line.state == "skipped":
        return "already done"
    if line.state == "finished":
        done = f"finished in {format_duration(line.elapsed_s(now_s))}"
        return f"{done}  {line.note}" if line.note else done
    if line.state == "failed":
        return f"failed after {format_duration(line.elapsed_s(now_s))}"
    parts = [] if line.total > 0 or line.done > 0 else ["running"]
    if line.total > 0:
        parts.append(f"{format_count(line.done)}/{format_count(line.total)} {line.unit}".rstrip())
    elif line.done > 0:
        parts.append(f"{format_count(line.done)} {line.unit}".rstrip())
    parts.append(format_duration(line.elapsed_s(now_s)))
    eta_s = line.eta_s(now_s)
    if eta_s is not None:
        parts.append(f"{format_duration(eta_s)} left")
    elif line.total > 0:
        parts.append("estimating")
    if line.note:
        parts.append(line.note)
    return "  ".join(parts)


def describe_run(progress: RunProgress, now_s: float) -> str:
    """The last line: how many stations are done, how long it took, how long it may take."""
    lines = list(progress.stations.values())
    done = sum(line.state in ("finished", "skipped") for line in lines)
    text = f"{done} of {len(lines)} steps done, {format_duration(now_s - progress.started_s)} so far"
    if all(line.is_settled for line in lines) or any(line.state == "failed" for line in lines):
        return text
    eta_s = progress.eta_s(now_s)
    if eta_s is None:
        return f"{text}, time left not known yet"
    return f"{text}, about {max(round(eta_s / 60), 1)} min left" if eta_s >= 45 else f"{text}, less than a minute left"


def render(progress: RunProgress, now_s: float) -> RenderableType:
    """The live table."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(no_wrap=True)
    table.add_column(width=24)
    table.add_column(width=5, justify="right")
    table.add_column(overflow="ellipsis", no_wrap=True)
    for line in progress.stations.values():
        mark, style = _MARKS.get(line.state, ("?", ""))
        share = line.share
        bar: RenderableType = ""
        if line.state == "running":
            bar = ProgressBar(total=1.0, completed=share or 0.0, width=24, pulse=share is None, animation_time=now_s)
        percent = f"{100 * share:.0f} %" if share is not None and line.state == "running" else ""
        table.add_row(
            Text(mark, style), Text(line.label, style), bar, percent, Text(describe(line, now_s), _text_style(line))
        )
    return Group(table, Text(describe_run(progress, now_s), "bold"))


class LiveView:
    """Draws the table in place on a terminal."""

    def __init__(self, console: Console, progress: RunProgress) -> None:
        self._progress = progress
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, now_s: float) -> None:
        """Draw the present state."""
        self._live.update(render(self._progress, now_s), refresh=True)


class LineView:
    """Prints a line when a station changes state, and every few seconds while one runs."""

    def __init__(self, console: Console, progress: RunProgress) -> None:
        self._console = console
        self._progress = progress
        self._states = {label: line.state for label, line in progress.stations.items()}
        self._printed_s = 0.0

    def __enter__(self) -> LineView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, now_s: float) -> None:
        """Print what is new."""
        is_due = now_s - self._printed_s >= LINE_INTERVAL_S
        for label, line in self._progress.stations.items():
            is_changed = self._states.get(label, "pending") != line.state
            self._states[label] = line.state
            if is_changed or (is_due and line.state == "running"):
                share = f"{100 * line.share:.0f} %  " if line.state == "running" and line.share is not None else ""
                self._print(f"[{label}] {share}{describe(line, now_s)}")
                self._printed_s = now_s
                if is_changed and line.is_settled:
                    self._print(describe_run(self._progress, now_s))

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def open_view(console: Console, progress: RunProgress) -> LiveView | LineView:
    """The view that suits the console."""
    return LiveView(console, progress) if console.is_terminal else LineView(console, progress)


def _text_style(line: StationProgress) -> str:
    return {"pending": "dim", "skipped": "dim", "omitted": "dim", "failed": "red"}.get(line.state, "")
