"""Promote and roll back, as an operator asks for it: the files first, then the gate, then one move."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from components.judging import judge_version, record_judgement
from components.promotion import (
    ABANDONED,
    DONE,
    Entry,
    Move,
    apply,
    history,
    record_refusal,
    settle,
    summarise_verdict,
)
from components.registry import download_version, require_version, version_by_alias
from draftline.errors import InputError, RegistryError
from draftline.gate import Verdict
from draftline.registry_layout import ALIAS_CHAMPION, ALIAS_PREVIOUS, TAG_ROLLED_BACK

if TYPE_CHECKING:
    from mlflow import MlflowClient

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What an operator asks for.

    Attributes:
        model: Registered model.
        who: See :func:`components.promotion.actor`.
        why: Recorded; must be given where the gate is overruled.
        is_forced: Promote although the gate refuses. Files that are not the registered ones are refused all the same.
        is_dry_run: Look and judge, write nothing.
    """

    model: str
    who: str
    why: str = ""
    is_forced: bool = False
    is_dry_run: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        champion: Version that is champion now (on a dry run: would be); ``None`` without one.
        before: Version that was, ``None`` without one.
        is_changed: Whether the champion was (would be) changed.
        entry: Line of the audit trail; ``None`` where nothing was written.
        verdict: The gate's, where it was asked.
        is_refused: A dry run's: the gate would refuse it.
    """

    champion: str | None
    before: str | None
    is_changed: bool
    entry: Entry | None = None
    verdict: Verdict | None = None
    is_refused: bool = False


class GateRefused(RegistryError):
    """The gate refuses the version and nobody overruled it."""


def promote(client: MlflowClient, request: Request, alias_or_version: str, say: Say = lambda line: None) -> Outcome:
    """Make a version champion, when its files and the gate agree.

    The gate's policy is the one in the version's own registered spec; the
    comparison is with the champion of now. An interrupted promotion of the
    same alias is finished, and that is all.

    Raises:
        InputError: forced without a reason.
        GateRefused: a rule does not hold; recorded in the trail.
        FormatError: a file is not the one that was registered, or could be unpickled.
        RegistryError: no such version, another promotion in the same moment, or the registry failed.
    """
    if request.is_forced and not request.why.strip():
        raise InputError("--force overrules the gate, so it needs a reason", remedy="Add --reason 'why'")
    finished = _settle(client, request, say)
    champion = version_by_alias(client, request.model, ALIAS_CHAMPION)
    before = None if champion is None else str(champion.version)
    done = _done(finished, "promote", before)
    if done is not None and not alias_or_version.isdigit():
        return Outcome(before, done.move.source, True, done)  # the alias has moved on with it
    candidate = require_version(client, request.model, alias_or_version)
    version = str(candidate.version)
    # Judged even if it is champion already: its files may have changed since.
    judgement = judge_version(candidate, champion)
    if before == version:
        return Outcome(version, before, False, verdict=judgement.verdict)
    move = Move(
        "promote", request.model, before, version, request.why or "the gate passed it", request.who,
        is_forced=request.is_forced and not judgement.verdict.passed, gate=summarise_verdict(judgement.verdict),
    )  # fmt: skip
    is_refused = not judgement.verdict.passed and not request.is_forced
    if request.is_dry_run:
        champion_then = before if is_refused else version
        return Outcome(champion_then, before, not is_refused, verdict=judgement.verdict, is_refused=is_refused)
    record_judgement(client, judgement)
    if is_refused:
        record_refusal(client, replace(move, why=request.why))
        failed = summarise_verdict(judgement.verdict)["failed"]
        raise GateRefused(
            f"the gate refuses {request.model} version {version}",
            got="; ".join(failed),
            remedy=f"Train a better draft, or overrule {len(failed)} rule(s) with --force --reason 'why'",
        )
    return Outcome(version, before, True, apply(client, move), judgement.verdict)


def roll_back(client: MlflowClient, request: Request, say: Say = lambda line: None) -> Outcome:
    """Make the previous version champion again, and mark the present one as taken back.

    A version that was taken back is promoted again only by force, so that
    neither a pipeline that runs again nor a second rollback returns to it. A
    rollback that was interrupted is finished, and that is all.

    Raises:
        FormatError: a file of the previous version is not the one that was registered.
        RegistryError: there is nothing to go back to, or the registry failed.
    """
    finished = _settle(client, request, say)
    champion = version_by_alias(client, request.model, ALIAS_CHAMPION)
    if champion is None:
        raise RegistryError(f"{request.model} has no champion to roll back", remedy="Run the pipeline, or promote one")
    now = str(champion.version)
    done = _done(finished, "rollback", now)
    if done is not None:
        return Outcome(now, done.move.source, True, done)
    previous = version_by_alias(client, request.model, ALIAS_PREVIOUS)
    if previous is None or str(previous.version) == now:
        raise RegistryError(
            f"{request.model} has no previous version to go back to",
            got=f"champion version {now} and no other that was champion before",
            remedy=f"Promote one by its number: `draftline promote {request.model}@VERSION`",
        )
    to = str(previous.version)
    if taken_back := previous.tags.get(TAG_ROLLED_BACK):
        raise RegistryError(
            f"the previous version of {request.model}, {to}, was itself taken back",
            got=taken_back,
            remedy=f"To return to it anyway: `draftline promote {request.model}@{to} --force --reason 'why'`",
        )
    with tempfile.TemporaryDirectory(prefix="draftline-rollback-") as scratch:
        download_version(previous, Path(scratch))
    if request.is_dry_run:
        return Outcome(to, now, True)
    move = Move("rollback", request.model, now, to, request.why or "no reason given", request.who)
    return Outcome(to, now, True, apply(client, move))


def _done(finished: list[Entry], action: str, champion: str | None) -> Entry | None:
    """The interrupted action that was finished just now and made this version champion."""
    return next((e for e in finished if (e.move.action, e.end, e.move.to) == (action, DONE, champion)), None)


def _settle(client: MlflowClient, request: Request, say: Say) -> list[Entry]:
    if request.is_dry_run:
        for entry in history(client, request.model):
            if not entry.end:
                say(f"An interrupted {entry.move.action} to version {entry.move.to} would be finished or closed first")
        return []
    finished = settle(client, request.model, request.who)
    for entry in finished:
        how = "had not taken effect and is closed" if entry.end == ABANDONED else f"is closed as {entry.end}"
        say(f"An interrupted {entry.move.action} to version {entry.move.to} by {entry.move.who} {how}")
    return finished
