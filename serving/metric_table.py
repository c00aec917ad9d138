"""Every metric of the endpoint, as data: ``docs/metrics.md`` is made from it and a replica exports exactly these.

vLLM's names where vLLM has the metric, so that its dashboards and load tools
work; ours begin with ``draftline:``. Counters are exported with ``_total``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_STEP_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.5, 1.0, 2.5)
_TOKENS = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 256.0, 512.0, 1024.0, 2048.0)
_BUDGET = (0.0, *_TOKENS)

MODEL_LABEL = "model_name"
REPLICA_LABEL = "replica"


@dataclass(frozen=True)
class MetricRow:
    """One metric.

    Attributes:
        name: Without the suffixes of its kind.
        kind: Prometheus type.
        text: What it counts or shows, in one sentence.
        labels: Besides the model's name and the replica.
        buckets: Upper bounds of a histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """Names of the samples that a scrape shows."""
        if self.kind == "counter":
            return (f"{self.name}_total",)
        if self.kind == "histogram":
            return (f"{self.name}_bucket", f"{self.name}_count", f"{self.name}_sum")
        return (self.name,)


def _counter(name: str, text: str, *labels: str) -> MetricRow:
    return MetricRow(name, "counter", text, labels)


def _gauge(name: str, text: str, *labels: str) -> MetricRow:
    return MetricRow(name, "gauge", text, labels)


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> MetricRow:
    return MetricRow(name, "histogram", text, (), buckets)


LOAD = (
    _gauge("vllm:num_requests_running", "Sequences in a decoding slot."),
    _gauge("vllm:num_requests_waiting", "Sequences queued for a slot."),
    _gauge("vllm:kv_cache_usage_perc", "Share of cache positions in use, 0 to 1."),
    _counter("vllm:prompt_tokens", "Prompt tokens of admitted requests."),
    _counter("vllm:prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache."),
    _counter("vllm:prefix_cache_hits", "Of those, taken over instead of computed."),
    _counter("vllm:generation_tokens", "Tokens generated."),
    _counter("vllm:request_success", "Finished sequences, by reason.", "finished_reason"),
    _counter("draftline:requests_refused", "Requests answered 429."),
    _gauge("draftline:slo_requests", "Most sequences that this replica decodes within the latency target."),
    _gauge("draftline:slo_ratio", "Measured time per output token over the target; 0 while nothing is decoded."),
)

LATENCY = (
    _histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _LATENCY_S),
    _histogram("vllm:inter_token_latency_seconds", "Time per token after the first.", _STEP_S),
    _histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", _LATENCY_S),
    _histogram("vllm:request_queue_time_seconds", "Arrival to a decoding slot.", _LATENCY_S),
)

SPECULATION = (
    _counter("vllm:spec_decode_num_drafts", "Verify steps with at least one draft token."),
    _counter("vllm:spec_decode_num_draft_tokens", "Draft tokens verified."),
    _counter("vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted."),
    _counter(
        "vllm:spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted, by position in the block.", "position"
    ),
    _gauge("draftline:accepted_length", "Tokens per target step since the start, steps without a draft included."),
    _gauge("draftline:mean_budget", "Recent mean of verified draft tokens per sequence and step."),
)

SCHEDULER = (
    _histogram("draftline:step_seconds", "One engine step.", _STEP_S),
    _histogram("draftline:step_tokens", "Tokens of one target forward: anchors, drafts, prompt chunks.", _TOKENS),
    _histogram("draftline:verify_budget", "Draft tokens verified in one step over all sequences.", _BUDGET),
    _counter("draftline:draft_seconds", "Time spent drafting."),
    _counter("draftline:verify_seconds", "Time spent in the target's forward."),
    _counter("draftline:predicted_step_seconds", "Predicted durations of the steps that had a prediction."),
    _counter("draftline:measured_step_seconds", "Durations of the same steps."),
    _gauge("draftline:step_time_ratio", "Measured over predicted step time, recent mean; NaN without predictions."),
    _gauge("draftline:calibration_error", "Running expected calibration error of the predicted survival."),
    _gauge("draftline:calibration_brier", "Running Brier score of the same."),
    _gauge("draftline:survival_correction", "Accepted over predicted draft tokens lately."),
    _counter("draftline:draft_probes", "Blocks drafted only to find out whether drafting pays."),
)

DRAFT = (
    _gauge("draftline:draft_info", "1 for the draft in use.", "draft"),
    _counter("draftline:draft_swaps", "Drafts exchanged while serving."),
    _counter("draftline:draft_swaps_refused", "Promoted drafts that were refused; the one in use stayed."),
    _gauge("draftline:block_survival", "Live share of blocks whose drafts up to a position are accepted.", "position"),
    _gauge("draftline:evaluated_survival", "The same in the draft's registered evaluation.", "position"),
    _gauge("draftline:whole_block_length", "Live accepted length of whole blocks, whatever was verified."),
    _gauge("draftline:evaluated_length", "The same in the draft's registered evaluation."),
    _gauge("draftline:acceptance_drift", "Share by which the live length is below the evaluated one."),
    _gauge("draftline:is_drifted", "1 while that is significantly more than allowed."),
    _counter("draftline:drift_events", "Drift events raised."),
)

CAPTURE = (
    _counter("draftline:capture_records", "Chats written as prompts."),
    _counter("draftline:capture_bytes", "Bytes of them, redacted."),
    _counter("draftline:capture_dropped", "Sampled chats that were left out.", "reason"),
    _counter("draftline:capture_write_failures", "Attempts to write a batch that failed."),
    _counter("draftline:capture_redactions", "Places redacted, by rule.", "rule"),
    _gauge("draftline:capture_pending_bytes", "Captured and not yet written."),
)

SECTIONS: dict[str, Sequence[MetricRow]] = {
    "Load": LOAD,
    "Latency": LATENCY,
    "Speculation": SPECULATION,
    "Scheduler": SCHEDULER,
    "Draft": DRAFT,
    "Traffic capture": CAPTURE,
}
"""All metrics by heading of the documentation."""


def all_rows() -> list[MetricRow]:
    """The whole table."""
    return [row for rows in SECTIONS.values() for row in rows]


def table_markdown() -> str:
    """The tables of ``docs/metrics.md``."""
    lines: list[str] = []
    for heading, rows in SECTIONS.items():
        lines += [f"### {heading}", "", "| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
        for row in rows:
            shown = row.series[0] if row.kind == "counter" else row.name
            labels = ", ".join(f"`{label}`" for label in row.labels)
            lines.append(f"| `{shown}` | {row.kind} | {labels} | {row.text} |")
        lines.append("")
    return "\n".join(lines)
