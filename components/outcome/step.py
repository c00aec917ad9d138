"""What became of a run: a page for Kubeflow, a line in the log, and an object in the workspace."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from components.runtime import Artifact, read_spec
from draftline.errors import DraftlineError
from draftline.storage import open_store

OUTCOMES = "outcomes"
"""Folder of the workspace; one object a run."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_TITLES = {"SUCCEEDED": "succeeded", "FAILED": "failed", "CANCELLED": "was cancelled"}


class FinalStatus(Protocol):
    """What is used of ``kfp.dsl.PipelineTaskFinalStatus``."""

    state: str
    pipeline_job_resource_name: str
    error_message: str | None


def report_outcome(status: FinalStatus, spec_uri: str, workspace: str, card: Artifact) -> None:
    """Write the run's page and its object in the workspace.

    Never fails for what made the run fail: a spec that cannot be read or a
    store that is away is said on the page.

    Args:
        status: Of the run, as KFP gives it to an exit handler.
        spec_uri: Path or object URI of the resolved spec.
        workspace: URI of the workspace.
        card: Receives the page.
    """
    notes: list[str] = []
    name = "run"
    try:
        name = read_spec(spec_uri).name
    except DraftlineError as error:
        notes.append(f"The spec could not be read: {error}")
    job = status.pipeline_job_resource_name
    document = {
        "run": name,
        "state": status.state,
        "error": _COLOURS.sub("", status.error_message or ""),
        "job": job,
        "time_s": time.time(),
    }
    key = f"{OUTCOMES}/{re.sub(r'[^A-Za-z0-9._-]+', '-', job).strip('-.') or 'run'}.json"
    try:
        open_store(workspace).put(key, json.dumps(document, indent=1).encode())
        card.metadata["object"] = key
    except DraftlineError as error:
        notes.append(f"The workspace could not be written: {error}")
    card.metadata.update({"state": status.state, "run": name})
    page = _page(document, workspace, notes)
    Path(card.path).write_text(page, encoding="utf-8")
    print(page, flush=True)


def _page(document: Mapping[str, object], workspace: str, notes: list[str]) -> str:
    state = str(document["state"])
    lines = [f"# Run {document['run']} {_TITLES.get(state, state)}", ""]
    if document["error"]:
        lines += ["```text", str(document["error"]), "```", ""]
    if state != "SUCCEEDED":
        lines += ["Finished steps are kept: start the same run again and it continues where it stopped.", ""]
    lines += [f"- job: `{document['job']}`", f"- workspace: `{workspace}`"]
    return "\n".join([*lines, *(f"- {note}" for note in notes)]) + "\n"
