"""Looks for the drift event that servers leave at the version they serve (:mod:`serving.drift`)."""

from __future__ import annotations

import json
from pathlib import Path

from components.registry import connect, version_by_alias
from components.runtime import Artifact, read_spec
from draftline.errors import FormatError
from draftline.registry_layout import ALIAS_CHAMPION, TAG_DRIFT
from draftline.spec import RunSpec


def look_for_drift(spec_uri: str, force: bool, summary: Artifact) -> bool:
    """Whether a server reported drift of the champion.

    A new champion is another version and begins without an event, so one
    alarm makes one training that succeeds.

    Args:
        spec_uri: Path or object URI of the resolved spec; its name is the registered model's.
        force: Say yes in any case.
        summary: Receives a page.

    Raises:
        PlatformError: no MLflow server answers.
        RegistryError: it refuses.
        FormatError: the event is damaged.
    """
    spec = read_spec(spec_uri)
    champion = version_by_alias(connect(), spec.name, ALIAS_CHAMPION)
    event = None if champion is None else champion.tags.get(TAG_DRIFT)
    if champion is None:
        found = f"{spec.name} has no champion, so nothing can drift."
    elif event is None:
        found = f"No server has reported drift of {spec.name} version {champion.version}."
    else:
        found = _message(event, f"{spec.name} version {champion.version}")
    is_due = force or event is not None
    lines = [f"# {'Training anew' if is_due else 'Nothing to do'}", "", found, "", _source(spec)]
    if force and event is None:
        lines += ["", "Asked to train in any case."]
    Path(summary.path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    summary.metadata.update({"drifted": event is not None, "trains": is_due})
    print("\n".join(lines), flush=True)
    return is_due


def _message(event: str, origin: str) -> str:
    try:
        return str(json.loads(event)["message"])
    except (ValueError, KeyError, TypeError):
        raise FormatError(
            f"the tag {TAG_DRIFT} of {origin} is damaged", got=event[:200], remedy="Remove the tag"
        ) from None


def _source(spec: RunSpec) -> str:
    captured = spec.serving.capture.uri
    source = spec.prompts.source
    if captured and f"{source}/".startswith(f"{captured.rstrip('/')}/"):
        return f"Prompts come from captured traffic, `{source}`."
    return (
        f"Prompts come from `{source}`, not from captured traffic: where they are those of the last training, "
        "every step is found done and the same draft comes out."
    )
