"""``draftline promote``, ``rollback`` and ``history``: which registered draft is served, and who said so."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from draftline.errors import InputError, RegistryError
from draftline.gate import describe_verdict

if TYPE_CHECKING:
    from components.champion import Outcome
    from components.promotion import Entry

DEFAULT_HOME = Path(".draftline")
_URI_ENV = "MLFLOW_TRACKING_URI"
_PIPE_COLUMNS = 200
_MODEL = re.compile(r"(?:models:/)?(?P<name>[^@/:]+)(?:[@/](?P<what>[A-Za-z0-9_.-]+))?")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Name of the registered model.")]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        "--host",
        metavar="URI",
        help=f"The MLflow server; by default {_URI_ENV}, else the platform of --home.",
    ),
]
Home = Annotated[Path, typer.Option(help="Directory of the embedded platform, where no server is named.")]
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; kept in the history.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check files and gate, say what would be done, write nothing.")]


def promote(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL[@VERSION]", help="A version or an alias; the challenger when left out.")
    ],
    tracking_uri: TrackingUri = None,
    reason: Reason = "",
    force: Annotated[
        bool, typer.Option("--force", help="Overrule the gate; needs --reason. Changed files are refused all the same.")
    ] = False,
    dry_run: DryRun = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Make a registered draft the champion, if the gate lets it through."""
    from components.champion import Request
    from components.champion import promote as promote_version
    from components.promotion import actor
    from components.registry import connect

    ctx.meta["home"] = home
    name, what = parse_model(model)
    if force and not reason.strip():
        raise InputError("--force overrules the gate, so it needs a reason", remedy="Add --reason 'why'")
    client = connect(_server(tracking_uri, home))
    request = Request(name, actor(), reason, is_forced=force, is_dry_run=dry_run)
    outcome = promote_version(client, request, what or "challenger", typer.echo)
    if outcome.verdict is not None:
        typer.echo(describe_verdict(outcome.verdict))
    typer.echo(_said(name, outcome, dry_run))
    if outcome.is_refused:  # on a dry run; else the refusal is an error
        raise typer.Exit(RegistryError.exit_code)


def rollback(
    ctx: typer.Context,
    model: Model,
    tracking_uri: TrackingUri = None,
    reason: Reason = "",
    dry_run: DryRun = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Make the previous champion the champion again."""
    from components.champion import Request, roll_back
    from components.promotion import actor
    from components.registry import connect

    ctx.meta["home"] = home
    name = _bare(model)
    outcome = roll_back(
        connect(_server(tracking_uri, home)), Request(name, actor(), reason, is_dry_run=dry_run), typer.echo
    )
    typer.echo(_said(name, outcome, dry_run))


def show_history(
    ctx: typer.Context,
    model: Model,
    tracking_uri: TrackingUri = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Who made which version champion, when, why, and what the gate said."""
    from components.promotion import history
    from components.registry import connect

    ctx.meta["home"] = home
    name = _bare(model)
    entries = history(connect(_server(tracking_uri, home)), name)
    if as_json:
        typer.echo(json.dumps({"model": name, "history": [asdict(entry) for entry in entries]}, ensure_ascii=False))
        return
    if not entries:
        typer.echo(f"Nothing was ever promoted in {name}.")
        return
    Console(width=None if Console().is_terminal else _PIPE_COLUMNS).print(_table(entries))


def parse_model(text: str) -> tuple[str, str | None]:
    """Name, and version or alias, of ``NAME``, ``NAME@3``, ``NAME@challenger``, ``NAME/3`` or ``models:/...``.

    Raises:
        InputError: it is none of these.
    """
    match = _MODEL.fullmatch(text)
    if match is None:
        raise InputError(f"cannot read the model {text!r}", expected="NAME, NAME@VERSION or NAME@ALIAS")
    return match["name"], match["what"]


def _bare(text: str) -> str:
    name, what = parse_model(text)
    if what is not None:
        raise InputError(f"{text!r} names a version", expected=f"the model alone, {name}")
    return name


def _server(tracking_uri: str | None, home: Path) -> dict[str, str]:
    """The MLflow server that is meant, as the variable that names one."""
    return {_URI_ENV: tracking_uri or os.environ.get(_URI_ENV, "").strip() or _embedded(home)}


def _embedded(home: Path) -> str:
    """Address of the embedded platform's MLflow, empty where none runs."""
    from pipelines.embedded.state import Layout, load_state

    state = load_state(Layout(home.expanduser().resolve()))
    return "" if state is None else state.mlflow_uri


def _said(name: str, outcome: Outcome, dry_run: bool) -> str:
    before = "no champion" if outcome.before is None else f"version {outcome.before}"
    if not outcome.is_changed:
        return f"{name}: {before} stays champion." if outcome.before else f"{name} stays without a champion."
    if dry_run:
        return f"{name}: version {outcome.champion} would become champion, after {before}. Nothing was written."
    forced = ", by force" if outcome.entry is not None and outcome.entry.move.is_forced else ""
    return f"{name}: version {outcome.champion} is champion, after {before}{forced}."


def _table(entries: list[Entry]) -> Table:
    table = Table(box=box.SIMPLE)
    for column in ("when (UTC)", "what", "from", "to", "result", "who", "why", "gate"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        move = entry.move
        gate = "" if not move.gate else "passed" if move.gate.get("passed") else "; ".join(move.gate.get("failed", ()))
        table.add_row(
            *(
                Text(cell)
                for cell in (
                    entry.when.removesuffix("+00:00"),
                    f"{move.action}, forced" if move.is_forced else move.action,
                    move.source or "-",
                    move.to,
                    entry.end or "under way or interrupted",
                    move.who,
                    move.why,
                    gate,
                )
            )
        )
    return table
