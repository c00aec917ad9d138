"""What one replica counts; names and meanings are in :mod:`serving.metric_table`."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from draftline.engine.requests import EngineLoad, SpeculationStats, StepReport, TokenEvent
from serving.capacity import DecayingMean
from serving.metric_table import MODEL_LABEL, MetricRow, all_rows

_HALF_LIFE_S = 5.0
"""Of the figures that speak of now; Serve averages them once more."""


class ServingMetrics:
    """All metrics of one replica, in a registry of its own.

    Args:
        model_name: Value of the ``model_name`` label, as in vLLM.
        load: Reads the current load when a scrape asks for it.
    """

    def __init__(self, model_name: str, load: Callable[[], EngineLoad]) -> None:
        self.registry = CollectorRegistry()
        self.model_name = model_name
        self._load = load
        self._families = {row.name: _family(row, self.registry) for row in all_rows()}
        self._previous: dict[str, SpeculationStats] = {}
        self._totals = SpeculationStats()
        self._tpot = DecayingMean(_HALF_LIFE_S)
        self._step_ratio = DecayingMean(_HALF_LIFE_S)
        self._num_probes = self._num_prompt_tokens = self._num_cached_tokens = 0
        self._draft_lock = threading.Lock()
        for row in all_rows():
            if row.kind != "histogram" and not row.labels:
                # Shown as 0 from the start: an alert on a rate needs the series before the first event.
                self._families[row.name].labels(model_name)
        self._show("vllm:num_requests_running", lambda: load().num_running)
        self._show("vllm:num_requests_waiting", lambda: load().num_waiting)
        self._show("vllm:kv_cache_usage_perc", lambda: load().kv_cache_usage)
        self._show("draftline:mean_budget", lambda: load().mean_budget)
        self._show("draftline:accepted_length", lambda: self._totals.tokens_per_step)
        self._show("draftline:step_time_ratio", lambda: self._step_ratio.mean)
        self._show("draftline:calibration_error", lambda: load().step.calibration_ece)
        self._show("draftline:calibration_brier", lambda: load().step.calibration_brier)
        self._show("draftline:survival_correction", lambda: load().step.survival_correction)

    @property
    def totals(self) -> SpeculationStats:
        """Counters of all requests together since the start, without the histogram; a copy."""
        return replace(self._totals, accepted_histogram=[])

    @property
    def tpot_s(self) -> float:
        """Time per output token of the last seconds; NaN before the first, and while nothing is decoded."""
        return self._tpot.mean if self._load().num_running else math.nan

    def render(self) -> bytes:
        """The Prometheus text exposition."""
        return generate_latest(self.registry)

    # -- requests -----------------------------------------------------------------------------------------------

    def record_admitted(self, num_prompt_tokens: int) -> None:
        """Count an admitted prompt."""
        self._count("vllm:prompt_tokens", num_prompt_tokens)

    def record_refused(self) -> None:
        """Count a 429."""
        self._count("draftline:requests_refused")

    def record_queued(self, seconds: float) -> None:
        """Time from arrival to the slot."""
        self._observe("vllm:request_queue_time_seconds", seconds)

    def record_first_token(self, seconds: float) -> None:
        """Time from arrival to the first token."""
        self._observe("vllm:time_to_first_token_seconds", seconds)

    def record_gap(self, seconds: float, num_tokens: int) -> None:
        """``num_tokens`` arrived together ``seconds`` after the ones before."""
        for _ in range(num_tokens):
            self._observe("vllm:inter_token_latency_seconds", seconds / num_tokens)
        self._tpot.add(seconds / num_tokens, num_tokens)

    def record_finished(self, reason: str, seconds: float) -> None:
        """A sequence ended."""
        self._count("vllm:request_success", 1, reason)
        self._observe("vllm:e2e_request_latency_seconds", seconds)

    # -- steps; called by the engine thread only ----------------------------------------------------------------

    def record_step(self, events: Sequence[TokenEvent], seconds: float) -> None:
        """Count one engine step."""
        self._observe("draftline:step_seconds", seconds)
        for event in events:
            self._count("vllm:generation_tokens", len(event.token_ids))
            self._count_speculation(event)

    def record_prefixes(self, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """Count from the engine's totals since its start."""
        self._count("vllm:prefix_cache_queries", num_prompt_tokens - self._num_prompt_tokens)
        self._count("vllm:prefix_cache_hits", num_cached_tokens - self._num_cached_tokens)
        self._num_prompt_tokens, self._num_cached_tokens = num_prompt_tokens, num_cached_tokens

    def record_report(self, report: StepReport) -> None:
        """Count what the scheduler says of a step."""
        self._observe("draftline:step_tokens", report.num_tokens)
        self._observe("draftline:verify_budget", report.budget)
        self._count("draftline:draft_seconds", report.draft_ms / 1000)
        self._count("draftline:verify_seconds", report.verify_ms / 1000)
        # The number starts again with another draft.
        self._count("draftline:draft_probes", max(report.num_probes - self._num_probes, 0))
        self._num_probes = report.num_probes
        if report.predicted_ms > 0:
            self._count("draftline:predicted_step_seconds", report.predicted_ms / 1000)
            self._count("draftline:measured_step_seconds", report.measured_ms / 1000)
            self._step_ratio.add(report.measured_ms / report.predicted_ms)

    def _count_speculation(self, event: TokenEvent) -> None:
        now, before = event.stats, self._previous.pop(event.request_id, SpeculationStats())
        if event.finish_reason is None:
            self._previous[event.request_id] = now
        steps = now.num_spec_steps - before.num_spec_steps
        drafted = now.num_draft_tokens - before.num_draft_tokens
        accepted = now.num_accepted_tokens - before.num_accepted_tokens
        self._count("vllm:spec_decode_num_drafts", steps)
        self._count("vllm:spec_decode_num_draft_tokens", drafted)
        self._count("vllm:spec_decode_num_accepted_tokens", accepted)
        self._totals.num_spec_steps += steps
        self._totals.num_draft_tokens += drafted
        self._totals.num_accepted_tokens += accepted
        self._totals.num_steps += now.num_steps - before.num_steps
        self._totals.num_output_tokens += now.num_output_tokens - before.num_output_tokens
        old = before.accepted_histogram + [0] * (len(now.accepted_histogram) - len(before.accepted_histogram))
        # A step that accepted n drafts accepted positions 0 to n - 1, so position p counts all entries above p.
        above = 0
        for num_accepted in range(len(now.accepted_histogram) - 1, 0, -1):
            above += now.accepted_histogram[num_accepted] - old[num_accepted]
            if above:
                self._count("vllm:spec_decode_num_accepted_tokens_per_pos", above, str(num_accepted - 1))

    # -- the draft ----------------------------------------------------------------------------------------------

    def show_draft(self, draft: str | None, evaluated_B: Sequence[float] | None) -> None:
        """Say which draft is in use, and how it was evaluated."""
        with self._draft_lock:
            for name in ("draftline:draft_info", "draftline:evaluated_survival", "draftline:block_survival"):
                self._gauge(name).clear()
            if draft is not None:
                self._gauge("draftline:draft_info").labels(self.model_name, draft).set(1)
            for position, share in enumerate(evaluated_B or ()):
                self._gauge("draftline:evaluated_survival").labels(self.model_name, str(position)).set(share)

    def show_acceptance(self, survival_B: Sequence[float]) -> None:
        """Live survival by position."""
        with self._draft_lock:
            for position, share in enumerate(survival_B):
                self._gauge("draftline:block_survival").labels(self.model_name, str(position)).set(share)

    def show(self, name: str, read: Callable[[], float]) -> None:
        """Let a gauge without labels of its own read its value when it is scraped."""
        self._show(name, read)

    def record_swap(self) -> None:
        """Count a draft swap."""
        self._count("draftline:draft_swaps")

    def record_swap_refused(self) -> None:
        """Count a promoted draft that was refused."""
        self._count("draftline:draft_swaps_refused")

    def record_drift(self) -> None:
        """Count a drift event."""
        self._count("draftline:drift_events")

    # -- traffic capture ----------------------------------------------------------------------------------------

    def record_captured(self, num_records: int, num_bytes: int) -> None:
        """A batch of captured chats lies in the store."""
        self._count("draftline:capture_records", num_records)
        self._count("draftline:capture_bytes", num_bytes)

    def record_capture_failure(self) -> None:
        """The store did not take a batch; it is tried again, or dropped."""
        self._count("draftline:capture_write_failures")

    def record_capture_dropped(self, reason: str, num_records: int = 1) -> None:
        """Sampled chats were left out."""
        self._count("draftline:capture_dropped", num_records, reason)

    def record_redactions(self, rule: str, num_places: int) -> None:
        """A redaction rule was applied to a chat."""
        self._count("draftline:capture_redactions", num_places, rule)

    # -- families -----------------------------------------------------------------------------------------------

    def _count(self, name: str, amount: float = 1, *labels: str) -> None:
        family = self._families[name]
        assert isinstance(family, Counter)
        family.labels(self.model_name, *labels).inc(amount)

    def _observe(self, name: str, value: float) -> None:
        family = self._families[name]
        assert isinstance(family, Histogram)
        family.labels(self.model_name).observe(value)

    def _gauge(self, name: str) -> Gauge:
        family = self._families[name]
        assert isinstance(family, Gauge)
        return family

    def _show(self, name: str, read: Callable[[], float]) -> None:
        self._gauge(name).labels(self.model_name).set_function(read)


def _family(row: MetricRow, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    labels = [MODEL_LABEL, *row.labels]
    if row.kind == "counter":
        return Counter(row.name, row.text, labels, registry=registry)
    if row.kind == "gauge":
        return Gauge(row.name, row.text, labels, registry=registry)
    return Histogram(row.name, row.text, labels, registry=registry, buckets=row.buckets)
