"""Cleaning and splitting: pure functions from lines to four disjoint lists."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from draftline.errors import InputError
from draftline.prompts.records import Prompt, parse_line
from draftline.prompts.similarity import (
    ContainmentIndex,
    NearDuplicateIndex,
    RarityOrder,
    Shingler,
    normalise,
    without_boilerplate,
)
from draftline.spec.models import PromptsSpec

SPLITS = ("train", "validation", "calibration", "test")
LINE_EXAMPLES = 5

_REASONS: Mapping[str, str] = {
    "malformed": "not a JSON object of a known shape",
    "not_utf8": "not UTF-8",
    "empty": "no turns, or a blank turn",
    "too_long": "a turn above prompts.max_turn_chars",
    "duplicate": "same text as an earlier prompt",
    "near_duplicate": "nearly the same as an earlier prompt",
    "overlaps_evaluation": "contains a problem of an evaluation suite",
    "over_limit": "beyond prompts.limit",
}
_SHAPE_REMEDY = 'Write one JSON object a line, such as {"turns": ["How do I return a parcel?"]}'
_REMEDIES: Mapping[str, str] = {
    "not_utf8": "Save the file as UTF-8",
    "too_long": "Raise prompts.max_turn_chars",
    "overlaps_evaluation": "Give prompts of your own traffic; a draft must not learn from what it is measured on",
}
REPORT_KEYS = ("read", *_REASONS, "kept")

Tick = Callable[[int], None]


@dataclass(frozen=True)
class CleanedPrompts:
    """What is left, and what became of the rest.

    Attributes:
        splits: Prompts by split name, each in file order.
        report: Counts by :data:`REPORT_KEYS`; ``read`` is the sum of all others.
        examples: First line numbers (1-based) of each reason that occurred.
    """

    splits: Mapping[str, tuple[Prompt, ...]]
    report: Mapping[str, int]
    examples: Mapping[str, tuple[int, ...]]


class _Tally:
    def __init__(self) -> None:
        self.counts = dict.fromkeys(REPORT_KEYS, 0)
        self.examples: dict[str, list[int]] = {}

    def reject(self, reason: str, line_number: int) -> None:
        self.counts[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < LINE_EXAMPLES:
            shown.append(line_number)


@dataclass(frozen=True)
class _Row:
    line_number: int
    prompt: Prompt
    identity: str
    shingles: array[int]


def clean_prompts(
    lines: Iterable[bytes],
    spec: PromptsSpec,
    *,
    system_prompt: str | None = None,
    protected: Iterable[Sequence[str]] = (),
    tick: Tick = lambda done: None,
) -> CleanedPrompts:
    """Clean, deduplicate and split.

    Args:
        lines: Raw lines of the file.
        spec: Thresholds, fractions, limit.
        system_prompt: Replaces nothing, fills in where a line has none.
        protected: Texts of the evaluation suites, one list a suite.
        tick: Called now and then with the number of prompts compared.

    Returns:
        The splits; the same lines give the same result, and a prompt's split
        depends on its first turn alone.

    Raises:
        InputError: nothing is left to train on.
    """
    tally = _Tally()
    shingler = Shingler()
    guard = _guard(spec, shingler, protected)
    rows = _parse(lines, spec, shingler, tally)
    rows = _compare(rows, spec, guard, tally, tick)
    if spec.limit and len(rows) > spec.limit:
        chosen = {row.identity for row in sorted(rows, key=lambda row: _hash("limit", row.identity))[: spec.limit]}
        for row in rows:
            if row.identity not in chosen:
                tally.reject("over_limit", row.line_number)
        rows = [row for row in rows if row.identity in chosen]
    tally.counts["kept"] = len(rows)
    splits: dict[str, list[Prompt]] = {name: [] for name in SPLITS}
    for prompt in _with_ids(rows):
        fixed = spec.system_prompt or prompt.system or system_prompt
        splits[_split(prompt, spec)].append(replace(prompt, system=fixed))
    cleaned = CleanedPrompts(
        {name: tuple(prompts) for name, prompts in splits.items()},
        tally.counts,
        {reason: tuple(numbers) for reason, numbers in tally.examples.items()},
    )
    _require_training_prompts(cleaned, spec)
    return cleaned


def overlapping_lines(lines: Iterable[bytes], spec: PromptsSpec, protected: Iterable[Sequence[str]]) -> tuple[int, ...]:
    """Numbers (1-based) of the lines that :func:`clean_prompts` would drop for these protected texts."""
    shingler = Shingler()
    guard = _guard(spec, shingler, protected)
    rows = _parse(lines, spec, shingler, _Tally())
    return tuple(row.line_number for row in rows if guard.contains_any(row.shingles))


def describe_report(report: Mapping[str, int], examples: Mapping[str, Sequence[int]] | None = None) -> str:
    """A short text for people: what was read, what was dropped and why.

    Args:
        report: Counts as in :attr:`CleanedPrompts.report`.
        examples: Line numbers as in :attr:`CleanedPrompts.examples`.
    """
    lines = [f"{report['kept']:,} of {report['read']:,} prompts kept"]
    for reason, meaning in _REASONS.items():
        if count := report.get(reason, 0):
            numbers = list((examples or {}).get(reason, ()))
            more = ", ..." if count > len(numbers) else ""
            where = f" (line{'s' if count > 1 else ''} {', '.join(map(str, numbers))}{more})" if numbers else ""
            lines.append(f"  {count:,} dropped: {meaning}{where}")
    return "\n".join(lines)


def _guard(spec: PromptsSpec, shingler: Shingler, protected: Iterable[Sequence[str]]) -> ContainmentIndex:
    suites = [without_boilerplate([shingler.shingle([text]) for text in suite]) for suite in protected]
    return ContainmentIndex(spec.near_duplicate_threshold, [shingles for suite in suites for shingles in suite])


def _parse(lines: Iterable[bytes], spec: PromptsSpec, shingler: Shingler, tally: _Tally) -> list[_Row]:
    rows: list[_Row] = []
    seen: set[str] = set()
    for line_number, line in enumerate(lines, start=1):
        parsed = parse_line(line, spec.max_turn_chars)
        if parsed is None:
            continue
        tally.counts["read"] += 1
        if isinstance(parsed, str):
            tally.reject(parsed, line_number)
            continue
        identity = json.dumps([normalise(turn) for turn in parsed.turns], ensure_ascii=False)
        if identity in seen:
            tally.reject("duplicate", line_number)
            continue
        seen.add(identity)
        rows.append(_Row(line_number, parsed, identity, shingler.shingle(parsed.turns)))
    return rows


def _compare(rows: Sequence[_Row], spec: PromptsSpec, guard: ContainmentIndex, tally: _Tally, tick: Tick) -> list[_Row]:
    index = NearDuplicateIndex(spec.near_duplicate_threshold, RarityOrder(row.shingles for row in rows))
    kept = []
    for done, row in enumerate(rows, start=1):
        if guard.contains_any(row.shingles):
            tally.reject("overlaps_evaluation", row.line_number)
        elif spec.near_duplicate_threshold < 1.0 and not index.add_if_new(row.shingles):
            tally.reject("near_duplicate", row.line_number)
        else:
            kept.append(row)
        if done % 1000 == 0:
            tick(done)
    return kept


def _with_ids(rows: Sequence[_Row]) -> list[Prompt]:
    """Given ids where unique, else a hash of the text."""
    taken: set[str] = set()
    prompts = []
    for row in rows:
        candidate = row.prompt.id or "p-" + _hash("id", row.identity)[:16]
        while candidate in taken:
            candidate = "p-" + _hash("id", f"{row.identity}/{candidate}")[:16]
        taken.add(candidate)
        prompts.append(replace(row.prompt, id=candidate))
    return prompts


def _split(prompt: Prompt, spec: PromptsSpec) -> str:
    # Neither the seed nor the other prompts take part: a held-out prompt is held out for ever.
    place = int(_hash("split", normalise(prompt.turns[0]))[:13], 16) / 16**13
    for name, fraction in (
        ("test", spec.holdout_fraction),
        ("validation", spec.validation_fraction),
        ("calibration", spec.calibration_fraction),
    ):
        if place < fraction:
            return name
        place -= fraction
    return "train"


def _require_training_prompts(cleaned: CleanedPrompts, spec: PromptsSpec) -> None:
    if cleaned.splits["train"]:
        return
    report = cleaned.report
    if report["kept"]:
        remedy = "Give more prompts, or lower prompts.holdout_fraction"
        what = f"all {report['kept']} usable prompts of {spec.source} fall into the held-out splits"
    else:
        commonest = max(_REASONS, key=lambda reason: report[reason])
        remedy = _REMEDIES.get(commonest, _SHAPE_REMEDY)
        what = f"no prompt of {spec.source} can be used"
    summary = describe_report(report, cleaned.examples).replace("\n ", ";")
    raise InputError(what, got=summary, remedy=remedy)


def _hash(purpose: str, text: str) -> str:
    return hashlib.sha256(f"draftline/{purpose}\0{text}".encode()).hexdigest()
