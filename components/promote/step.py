"""Promotes a registered version, and waits for the endpoint where one follows the champion."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from components.champion import Request, promote
from components.deploy.step import ENDPOINT_ENV, wait_for_champion
from components.promotion import actor
from components.registry import connect
from components.runtime import Artifact
from draftline.gate import describe_verdict


def promote_registered(
    model: str, version: str, reason: str, force: bool, summary: Artifact, environ: Mapping[str, str] = os.environ
) -> None:
    """Make a version the champion, by the rules of :func:`components.champion.promote`.

    Args:
        model: Registered model.
        version: A version or an alias.
        reason: Kept in the audit trail.
        force: Overrule the gate; needs a reason.
        summary: Receives a page.
        environ: Of this process; may name an endpoint.

    Raises:
        DraftlineError: the gate or the registry refuses, or the endpoint does not take the draft.
    """
    outcome = promote(connect(environ), Request(model, actor(environ), reason, is_forced=force), version, print)
    was = "no version was" if outcome.before is None else f"version {outcome.before} was"
    change = was if outcome.is_changed else "it was so before"
    lines = [f"# {model} version {outcome.champion} is champion", "", f"{change[0].upper()}{change[1:]}."]
    if outcome.verdict is not None:
        lines += ["", describe_verdict(outcome.verdict)]
    if endpoint := environ.get(ENDPOINT_ENV, "").rstrip("/"):
        wait_for_champion(endpoint, f"{model}/{outcome.champion}", print)
        lines += ["", f"{endpoint} uses it."]
    Path(summary.path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    summary.metadata.update({"model": model, "champion": str(outcome.champion)})
