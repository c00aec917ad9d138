"""Move the aliases of a registered draft: one visible write, a journal, and an audit trail.

.. code-block:: text

    champion      what is served
    previous      what was served before; where a rollback goes
    challenger    registered, not promoted

A move is written down before it is done (a tag of the registered model, never
changed), takes effect with the single write of ``champion``, and is closed by
a second tag. A process that dies in between leaves a champion that is valid;
whoever moves next finds the open entry and, if the champion was written,
writes the rest, else closes it as abandoned. The tags of the closed entries
are the audit trail.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from components.lease import STALE_S, hold_lease
from components.registry import registry_errors, version_by_alias
from draftline.errors import RegistryError
from draftline.gate import Verdict
from draftline.registry_layout import ALIAS_CHALLENGER, ALIAS_CHAMPION, ALIAS_PREVIOUS, TAG_ROLLED_BACK

if TYPE_CHECKING:
    from mlflow import MlflowClient

ACTOR_ENV = "DRAFTLINE_ACTOR"
TAG_AUDIT = "draftline.audit."
_TAG_END = ".end"
_MAX_REASON_CHARS = 2000

DONE, ABANDONED, SUPERSEDED, REFUSED = "done", "abandoned", "superseded", "refused"


class ChampionChanged(RegistryError):
    """Somebody else moved the champion between the decision and the deed."""


@dataclass(frozen=True)
class Move:
    """What somebody wants done with a model's champion.

    Attributes:
        action: ``promote``, ``rollback``, or ``gate`` for a pipeline's own promotion.
        model: Registered model.
        source: Version that is champion, ``None`` without one: what the decision was taken about.
        to: Version that shall be.
        why: For people.
        who: See :func:`actor`.
        is_forced: Whether the gate was overruled.
        gate: Its verdict in short, empty where none was asked.
    """

    action: str
    model: str
    source: str | None
    to: str
    why: str
    who: str
    is_forced: bool = False
    gate: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A line of the audit trail.

    Attributes:
        id: UTC time and a nonce; sorts by time.
        when: ISO 8601, UTC, by the clock of whoever wrote it.
        move: What was asked.
        end: ``done``, ``abandoned`` (died before the champion was written), ``superseded`` (somebody wrote aliases
            by hand meanwhile), ``refused`` (by the gate), or empty while it is under way or interrupted.
    """

    id: str
    when: str
    move: Move
    end: str


def actor(environ: Mapping[str, str] = os.environ) -> str:
    """Who does this: ``DRAFTLINE_ACTOR``, else ``user@host``. A claim, not a proof: see docs/security.md."""
    if named := environ.get(ACTOR_ENV, "").strip():
        return named[:200]
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user id without a name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def summarise_verdict(verdict: Verdict) -> dict[str, Any]:
    """The verdict as the audit trail keeps it: passed, and the rules that do not hold with what was found."""
    failed = [f"{reason.rule}: {reason.got} (needs {reason.needs})" for reason in verdict.reasons if not reason.ok]
    return {"passed": verdict.passed, "failed": failed}


def apply(client: MlflowClient, move: Move, *, stale_s: float = STALE_S) -> Entry | None:
    """Make ``move.to`` the champion, if the champion is still the one that the decision was about.

    Done again, it ends in the same state and adds nothing to the trail.

    Returns:
        The entry, or ``None`` where that version is champion already.

    Raises:
        ChampionChanged: the champion is another by now.
        RegistryError: others hold the lease, or the registry failed.
    """
    with hold_lease(client, move.model, f"{move.who} ({move.action})", stale_s=stale_s) as lease:
        _settle(client, move.model)
        champion = _alias(client, move.model, ALIAS_CHAMPION)
        if champion == move.to:
            return None
        if champion != move.source:
            raise ChampionChanged(
                f"the champion of {move.model} changed while version {move.to} was looked at",
                got=_version_text(champion),
                expected=_version_text(move.source),
                remedy="Run the command again; it looks at the new champion",
            )
        entry = _write(client, move)
        lease.require()
        with registry_errors(f"make version {move.to} the champion of {move.model}"):
            client.set_registered_model_alias(move.model, ALIAS_CHAMPION, move.to)
            _finish(client, entry)
    return Entry(entry.id, entry.when, move, DONE)


def settle(client: MlflowClient, model: str, who: str, *, stale_s: float = STALE_S) -> list[Entry]:
    """Close what an interrupted process left open; cheap where there is nothing.

    Returns:
        The entries that were open, with their new end.
    """
    if not any(entry.end == "" for entry in history(client, model)):
        return []
    with hold_lease(client, model, f"{who} (settle)", stale_s=stale_s):
        return _settle(client, model)


def make_challenger(client: MlflowClient, model: str, version: str) -> None:
    """Mark a version that was not promoted, unless it is the champion by now."""
    with registry_errors(f"make version {version} the challenger of {model}"):
        if _alias(client, model, ALIAS_CHAMPION) != version:
            client.set_registered_model_alias(model, ALIAS_CHALLENGER, version)


def record_refusal(client: MlflowClient, move: Move) -> Entry:
    """Write down that the gate refused what somebody asked for."""
    return _write(client, move, end=REFUSED)


def history(client: MlflowClient, model: str) -> list[Entry]:
    """The audit trail, oldest first.

    Raises:
        RegistryError: no such model, or the registry failed.
    """
    with registry_errors(f"read the history of {model}"):
        tags = client.get_registered_model(model).tags
    entries = []
    for name, text in sorted(tags.items()):
        if name.startswith(TAG_AUDIT) and not name.endswith(_TAG_END):
            entries.append(_parse(name.removeprefix(TAG_AUDIT), text, tags.get(name + _TAG_END, "")))
    return entries


def _settle(client: MlflowClient, model: str) -> list[Entry]:
    settled = []
    for entry in history(client, model):
        if entry.end:
            continue
        champion = _alias(client, model, ALIAS_CHAMPION)
        with registry_errors(f"finish the interrupted {entry.move.action} of {model}"):
            if champion == entry.move.to:
                _finish(client, entry)
                end = DONE
            else:
                end = ABANDONED if champion == entry.move.source else SUPERSEDED
                client.set_registered_model_tag(model, TAG_AUDIT + entry.id + _TAG_END, end)
        settled.append(Entry(entry.id, entry.when, entry.move, end))
    return settled


def _finish(client: MlflowClient, entry: Entry) -> None:
    """All that follows from the new champion; done twice, it ends alike."""
    move = entry.move
    if move.source is not None:
        client.set_registered_model_alias(move.model, ALIAS_PREVIOUS, move.source)
    if _alias(client, move.model, ALIAS_CHALLENGER) == move.to:
        client.delete_registered_model_alias(move.model, ALIAS_CHALLENGER)
    if move.action == "rollback" and move.source is not None:
        why = f"{entry.when} by {move.who}: {move.why}"
        client.set_model_version_tag(move.model, move.source, TAG_ROLLED_BACK, why)
    elif move.is_forced and TAG_ROLLED_BACK in client.get_model_version(move.model, move.to).tags:
        client.delete_model_version_tag(move.model, move.to, TAG_ROLLED_BACK)
    client.set_registered_model_tag(move.model, TAG_AUDIT + entry.id + _TAG_END, DONE)


def _write(client: MlflowClient, move: Move, *, end: str = "") -> Entry:
    now = datetime.now(UTC)
    entry = Entry(f"{now:%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex[:6]}", now.isoformat(timespec="seconds"), move, end)
    document = {**asdict(move), "why": move.why[:_MAX_REASON_CHARS], "when": entry.when, "end": end}
    with registry_errors(f"write to the history of {move.model}"):
        client.set_registered_model_tag(move.model, TAG_AUDIT + entry.id, json.dumps(document, ensure_ascii=False))
    return entry


def _parse(entry_id: str, text: str, end: str) -> Entry:
    try:
        document = json.loads(text)
        when, own_end = str(document.pop("when")), str(document.pop("end"))
        return Entry(entry_id, when, Move(**document), end or own_end)
    except (ValueError, KeyError, TypeError, AttributeError):
        # Somebody edited it by hand. It is shown as it is, and never acted on.
        return Entry(entry_id, "", Move("unreadable", "", None, "", text[:200], ""), end or "unreadable")


def _alias(client: MlflowClient, model: str, alias: str) -> str | None:
    found = version_by_alias(client, model, alias)
    return None if found is None else str(found.version)


def _version_text(version: str | None) -> str:
    return "no champion" if version is None else f"version {version}"
