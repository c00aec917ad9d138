"""The report station: gather, draw, write, store."""

from __future__ import annotations

import hashlib
import json

from draftline.registry_layout import CARD_FILE, METRICS_FILE
from draftline.report.card import headline, headline_tiles, render_card
from draftline.report.collect import collect, metrics_document, summary
from draftline.report.page import render_page
from draftline.report.plots import render_plots
from draftline.steps.context import StepContext, StepOutput

PAGE_FILE = "report.html"


def run(context: StepContext) -> StepOutput:
    """Write the card, the figures, ``metrics.json`` and the page.

    Raises:
        FormatError: the training history is damaged.
        StorageError: the workspace failed.
    """
    data = collect(context)
    card = render_card(data)
    plots = render_plots(data)
    metrics = json.dumps(metrics_document(data), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    page = render_page(card, plots, title=f"Draft model {data.spec.name}", tiles=headline_tiles(data.suites))
    files = {
        CARD_FILE: card.encode(),
        METRICS_FILE: (metrics + "\n").encode(),
        **plots,
        PAGE_FILE: page.encode(),
    }
    for name, content in files.items():
        context.store.put(f"{context.prefix}/{name}", content)
    context.report(len(files), len(files), "files", note=headline(data.suites))
    return StepOutput(
        outputs={
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
            "summary": summary(data),
        },
        metrics={
            f"{figure}/{suite}": float(value)
            for suite, figures in summary(data).items()
            for figure, value in figures.items()
            if isinstance(value, int | float)
        },
    )
