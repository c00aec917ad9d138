"""What the card says of speed beyond one request alone: many together, and the cost of a step."""

from __future__ import annotations

from draftline.report.collect import ReportData
from draftline.report.markdown import count, figure, table


def loads_text(data: ReportData) -> str:
    """Many requests together, where that was measured; begins a paragraph, or is empty."""
    rows = [
        (
            suite,
            count(load.get("concurrency")),
            *(figure((load.get("tokens_per_s") or {}).get(kind), digits=1) for kind in ("speculative", "plain")),
            figure(load.get("speedup_over_plain"), suffix="x"),
        )
        for suite, outputs in data.suites.items()
        for load in outputs.get("by_concurrency") or ()
    ]
    header = ("tokens/s of all", "requests together", "speculative", "plain", "vs plain")
    return f"\n\nMany requests that begin together, prefill included:\n\n{table(header, rows)}" if rows else ""


def step_cost_text(data: ReportData) -> str:
    """Cost of a step of one request, from the calibration's table; begins a paragraph, or is empty."""
    costs = data.calibration.outputs.get("cost_table") or {}
    tokens, verify, draft = costs.get("tokens") or (), costs.get("verify_ms") or (), costs.get("draft_ms") or ()
    if not tokens or not verify or not draft:
        return ""
    rows = [(count(number), figure(ms)) for number, ms in zip(tokens, verify[0], strict=False)]
    number = (costs.get("requests") or (1,))[0]
    return (
        f"\n\nCost of a step with {count(number)} request(s) on the machine that calibrated: drafting "
        f"{figure(draft[0])} ms, verifying\n\n" + table(("tokens verified", "ms"), rows)
    )
