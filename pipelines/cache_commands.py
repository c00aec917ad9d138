"""``draftline cache``: what lies in a workspace's hidden-state caches, whether it is whole, and what may go."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from draftline.cache.catalogue import CacheSummary, find_caches, open_workspace, summarise
from draftline.cache.garbage import GarbagePlan, GarbageRules, plan_garbage, remove_garbage
from draftline.cache.verification import REPAIRABLE, Finding, plan_checks, repair, run_checks
from draftline.errors import FormatError, InputError, SpecError

_PIPE_COLUMNS = 160
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNIT_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}

cache_app = typer.Typer(
    help="List, check and clean up the hidden-state caches of a workspace.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Uri = Annotated[
    str, typer.Argument(metavar="URI", help="A workspace (a directory or s3://bucket/prefix), or one cache's folder.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


@cache_app.command(
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "draftline cache ls .draftline/workspace\n\n"
        "draftline cache ls s3://drafts/tickets --json"
    )
)
def ls(uri: Uri, as_json: AsJson = False) -> None:
    """List caches: key, state, mode, codec, target, samples, tokens, bytes, age."""
    store, only_key = open_workspace(uri)
    summaries = [summarise(store, cache) for cache in find_caches(store, only_key)]
    if as_json:
        _print_json({"caches": [asdict(summary) for summary in summaries]})
        return
    if not summaries:
        typer.echo(f"No hidden-state caches in {uri}")
        return
    # A narrow terminal shortens the fingerprint; a pipe has no width and gets whole lines.
    Console(width=None if Console().is_terminal else _PIPE_COLUMNS).print(_table(summaries, time.time()))


@cache_app.command(
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "draftline cache verify s3://drafts/tickets\n\n"
        "draftline cache verify .draftline/workspace --repair  [dim]# then run the pipeline again[/dim]\n\n"
        "Exit code 0 when every cache is whole, 6 otherwise."
    )
)
def verify(
    uri: Uri,
    as_json: AsJson = False,
    enable_repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Remove truncated and flipped shards and their manifests, so that the next run captures them anew.",
        ),
    ] = False,
) -> None:
    """Read every shard and name those that are truncated, flipped, missing, foreign, newer or left over."""
    store, only_key = open_workspace(uri)
    caches = list(find_caches(store, only_key))
    if only_key and not caches:
        raise InputError(f"there is no cache at {uri}", remedy="`draftline cache ls` lists those of a workspace")
    checks, findings = plan_checks(store, caches)
    total_bytes = sum(check.found_bytes or 0 for check in checks)
    with _byte_bar("verifying", total_bytes) as advance:
        findings += run_checks(store, checks, advance)
    removed = repair(store, findings) if enable_repair else []
    if as_json:
        _print_json(
            {
                "num_caches": len(caches),
                "num_shards": len(checks),
                "size_bytes": total_bytes,
                "findings": [asdict(finding) for finding in findings],
                "removed": removed,
            }
        )
    else:
        _print_findings(findings, removed)
        typer.echo(f"{len(caches)} caches, {len(checks)} shards, {_bytes(total_bytes)}: {_verdict(findings)}")
    if any(not (enable_repair and finding.kind in REPAIRABLE) for finding in findings):
        raise typer.Exit(FormatError.exit_code)


@cache_app.command(
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "draftline cache gc s3://drafts/tickets  [dim]# says what would go[/dim]\n\n"
        "draftline cache gc s3://drafts/tickets --older-than 30d --delete\n\n"
        "A cache that was written to more recently is left alone: a capture may be running."
    )
)
def gc(
    uri: Uri,
    enable_delete: Annotated[bool, typer.Option("--delete", help="Remove it; without this, only say what.")] = False,
    older_than: Annotated[
        str, typer.Option(metavar="DURATION", help="Leave alone what was written to since: 12h, 7d, 4w.")
    ] = "7d",
    enable_unreferenced: Annotated[
        bool, typer.Option("--unreferenced", help="Also finished caches from which no draft was trained.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove captures that did not end and objects that no manifest names; a dry run by default."""
    rules = GarbageRules(parse_duration(older_than), time.time(), enable_unreferenced)
    store, only_key = open_workspace(uri)
    plan = plan_garbage(store, rules, only_key)
    if enable_delete:
        with _byte_bar("removing", plan.size_bytes) as advance:
            plan = remove_garbage(store, plan, rules, lambda item: advance(item.size_bytes))
    if as_json:
        _print_json(
            {
                "is_dry_run": not enable_delete,
                "size_bytes": plan.size_bytes,
                "garbage": [asdict(item) for item in plan.garbage],
                "kept": [asdict(item) for item in plan.kept],
            }
        )
        return
    _print_plan(plan, is_dry_run=not enable_delete)


def parse_duration(text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``12h``, ``7d`` or ``4w``.

    Raises:
        SpecError: something else.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise SpecError(
            "--older-than is no duration", got=repr(text), expected="a number and a unit: 90s, 30m, 12h, 7d"
        )
    return float(match[1]) * _UNIT_S[match[2]]


def _table(summaries: list[CacheSummary], now_s: float) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in ("cache", "state", "mode", "codec"):
        table.add_column(column, no_wrap=True)
    table.add_column("target", no_wrap=True, min_width=6, max_width=12)
    for column in ("shards", "samples", "tokens", "size", "age"):
        table.add_column(column, justify="right", no_wrap=True)
    for s in summaries:
        table.add_row(
            *(s.key, s.state, s.mode, s.codec or "?", s.target or "?", str(s.num_shards), f"{s.num_samples:,}"),
            *(f"{s.num_tokens:,}", _bytes(s.size_bytes), _age(now_s - s.modified_s)),
        )
    return table


def _print_findings(findings: list[Finding], removed: list[str]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for finding in findings:
        console.print(Text.assemble((finding.kind, "red"), f"  {finding.object}: {finding.detail}"))
    for remedy in dict.fromkeys(finding.remedy for finding in findings):
        kinds = ", ".join(dict.fromkeys(f.kind for f in findings if f.remedy == remedy))
        console.print(Text(f"{kinds}: {remedy}."))
    for key in removed:
        console.print(Text(f"removed  {key}"))


def _verdict(findings: list[Finding]) -> str:
    return f"{len(findings)} objects are not as they should be" if findings else "all as recorded"


def _print_plan(plan: GarbagePlan, *, is_dry_run: bool) -> None:
    console = Console(soft_wrap=True, highlight=False)
    word = "would remove" if is_dry_run else "removed"
    for item in plan.garbage:
        console.print(Text(f"{word}  {item.object}  {_bytes(item.size_bytes)}  ({item.reason})"))
    for kept in plan.kept:
        console.print(Text(f"keeps  {kept.object}  {_bytes(kept.size_bytes)}  ({kept.why})", "dim"))
    console.print(Text(f"{word} {len(plan.garbage)} objects, {_bytes(plan.size_bytes)}"))
    if is_dry_run and plan.garbage:
        console.print(Text("Nothing was removed; add --delete to do so.", "dim"))


@contextmanager
def _byte_bar(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where it does not mix with the answer; gone when the work is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=max(total_bytes, 1))
        yield lambda num_bytes: progress.advance(task, num_bytes)


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=1, sort_keys=True))


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def _age(seconds: float) -> str:
    for name in ("w", "d", "h", "m"):
        if seconds >= _UNIT_S[name]:
            return f"{seconds / _UNIT_S[name]:.0f}{name}"
    return f"{max(seconds, 0):.0f}s"
