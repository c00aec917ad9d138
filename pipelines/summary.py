"""The closing table: what a run proved, from the steps' own results and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from draftline.prompts.clean import describe_report
from draftline.steps import StepResult

MISSING = "-"
"""Shown where a number was not measured."""

MAX_SUITE_COLUMNS = 4
"""With more suites the table is turned."""

_VERDICT_STYLES = {"lossless": "green", "diverged": "bold red", "not-checked": "yellow"}


def render_summary(results: Mapping[str, StepResult]) -> RenderableType:
    """Lay out what a run proved.

    Args:
        results: By ``station`` or ``station:item``; stations that did not run may be missing.

    Returns:
        Tables and lines for a rich console; empty when nothing was evaluated.
    """
    suites = {name.partition(":")[2]: result for name, result in results.items() if name.startswith("evaluation:")}
    parts: list[RenderableType] = []
    if (prompts := results.get("prompts")) is not None and "report" in prompts.outputs:
        parts.append(Text(describe_report(prompts.outputs["report"], prompts.outputs.get("examples"))))
    if suites:
        parts += [_proof_table(suites), _position_table(suites)]
    parts += [line for line in (_draft_line(results.get("draft")), _version_line(results)) if line is not None]
    if (gate := results.get("gate")) is not None:
        parts += _gate_lines(gate)
    return Group(*parts)


def _proof_table(suites: Mapping[str, StepResult]) -> Table:
    table = Table(title="What this run proved", title_justify="left", title_style="bold")
    table.add_column("suite")
    results = list(suites.values())
    if len(suites) > MAX_SUITE_COLUMNS:
        return _table_by_suite(table, suites)
    for suite in suites:
        table.add_column(suite, justify="right")
    sampled: list[tuple[str, list[RenderableType]]] = [
        (f"accepted length at temperature {temperature:g}", [_length_at(r, temperature) for r in results])
        for temperature in _further_temperatures(suites)
    ]
    rows: list[tuple[str, list[RenderableType]]] = [
        ("prompts / new tokens", [_sizes(r) for r in results]),
        ("accepted length (tokens per target step)", [_bold(_number(r, "accepted_length")) for r in results]),
        *sampled,
        ("bytes of text per target step", [_number(r, "bytes_per_call", digits=1) for r in results]),
        ("tokens/s with the draft", [_speed(r, "speculative") for r in results]),
        ("tokens/s plain, same engine and dtype", [_speed(r, "plain") for r in results]),
        ("tokens/s transformers generate", [_speed(r, "transformers") for r in results]),
        ("speed-up over plain decoding", [_bold(_factor(r, "speedup_over_plain")) for r in results]),
        ("speed-up over transformers generate", [_factor(r, "speedup_over_transformers") for r in results]),
        ("output equals plain decoding (fp32)", [_lossless(r) for r in results]),
        ("calibration error (ECE)", [_number(r, "ece", digits=3) for r in results]),
    ]
    for label, cells in rows:
        table.add_row(label, *cells)
    return table


def _table_by_suite(table: Table, suites: Mapping[str, StepResult]) -> Table:
    """A row a suite: as columns they would not fit a terminal. Accepted length and bytes are per target step."""
    further = _further_temperatures(suites)
    for label in ("prompts", "accepted", *(f"at T={t:g}" for t in further), "bytes", "over plain", "ECE"):
        table.add_column(label, justify="right")
    table.add_column("output equal")
    for suite, result in suites.items():
        table.add_row(
            suite,
            _shown(result.outputs.get("num_prompts")),
            _bold(_number(result, "accepted_length")),
            *(_length_at(result, temperature) for temperature in further),
            _number(result, "bytes_per_call", digits=1),
            _bold(_factor(result, "speedup_over_plain")),
            _number(result, "ece", digits=3),
            _lossless(result),
        )
    return table


def _further_temperatures(suites: Mapping[str, StepResult]) -> list[float]:
    """Temperatures beyond the headline's, of any suite."""
    found = [one["temperature"] for r in suites.values() for one in (r.outputs.get("by_temperature") or ())[1:]]
    return list(dict.fromkeys(found))


def _length_at(result: StepResult, temperature: float) -> str:
    for one in result.outputs.get("by_temperature") or ():
        if one["temperature"] == temperature and _is_number(one.get("accepted_length")):
            return f"{one['accepted_length']:.2f}"
    return MISSING


def _position_table(suites: Mapping[str, StepResult]) -> Table:
    by_suite = {suite: _floats(result.outputs.get("acceptance_by_position")) for suite, result in suites.items()}
    table = Table(
        title="Acceptance by position (share accepted of those reached)", title_justify="left", title_style="bold"
    )
    table.add_column("suite")
    for position in range(max((len(values) for values in by_suite.values()), default=0)):
        table.add_column(str(position + 1), justify="right")
    for suite, values in by_suite.items():
        table.add_row(suite, *(MISSING if value is None else f"{100 * value:.0f} %" for value in values))
    return table


def _draft_line(draft: StepResult | None) -> Text | None:
    if draft is None:
        return None
    facts = []
    if _is_number(draft.outputs.get("num_parameters")):
        facts.append(f"{draft.outputs['num_parameters'] / 1e6:.1f} M parameters")
    if _is_number(draft.outputs.get("draft_vocab_size")):
        facts.append(f"{draft.outputs['draft_vocab_size']:,} words of vocabulary")
    if _is_number(draft.metrics.get("train_seconds")):
        facts.append(f"trained in {draft.metrics['train_seconds'] / 60:.1f} min")
    return Text(f"Draft: {', '.join(facts)}") if facts else None


def _version_line(results: Mapping[str, StepResult]) -> Text | None:
    register = results.get("register")
    if register is None:
        return None
    gate = results.get("gate")
    alias = f", alias {gate.outputs['alias']}" if gate is not None and gate.outputs.get("alias") else ""
    return Text(f"Registered: {register.outputs.get('model_name')} version {register.outputs.get('version')}{alias}")


def _gate_lines(gate: StepResult) -> list[Text]:
    passed = bool(gate.outputs.get("passed"))
    lines = [Text("Gate: passed" if passed else "Gate: refused, not deployed", "bold green" if passed else "bold red")]
    for reason in gate.outputs.get("reasons", []):
        mark, style = ("✔", "green") if reason.get("ok") else ("✘", "red")
        line = Text(f"  {mark} ", style)
        line.append(
            f"{reason.get('rule')}: {_shown(reason.get('got'))} (needs {_shown(reason.get('needs'))})", "default"
        )
        lines.append(line)
    return lines


def _lossless(result: StepResult) -> Text:
    found = result.outputs.get("lossless") or {}
    verdict = str(found.get("verdict", "not-checked"))
    count = f" {found['num_equal']}/{found['num_prompts']}" if found.get("num_prompts") else ""
    return Text(f"{verdict}{count}", _VERDICT_STYLES.get(verdict, ""))


def _sizes(result: StepResult) -> str:
    prompts, tokens = result.outputs.get("num_prompts"), result.outputs.get("num_tokens")
    return f"{_shown(prompts)} / {_shown(tokens)}"


def _speed(result: StepResult, kind: str) -> str:
    value = (result.outputs.get("tokens_per_s") or {}).get(kind)
    return f"{value:.1f}" if _is_number(value) else MISSING


def _factor(result: StepResult, name: str) -> str:
    value = result.outputs.get(name)
    return f"{value:.2f}x" if _is_number(value) else MISSING


def _number(result: StepResult, name: str, digits: int = 2) -> str:
    value = result.outputs.get(name)
    return f"{value:.{digits}f}" if _is_number(value) else MISSING


def _bold(text: str) -> Text:
    return Text(text, "bold")


def _shown(value: object) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _floats(values: Any) -> Sequence[float | None]:
    return [value if _is_number(value) else None for value in values or []]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
