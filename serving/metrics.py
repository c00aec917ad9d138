"""Prometheus metrics: vLLM's names, so that dashboards and load tools work, and our own beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from draftline.engine.requests import EngineLoad, SpeculationStats, TokenEvent

_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_STEP_BUCKETS_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.5, 1.0, 2.5)


class ServingMetrics:
    """All metrics of one replica, in a registry of its own.

    Args:
        model_name: Value of the ``model_name`` label, as in vLLM.
        load: Reads the current load when a scrape asks for it.
    """

    def __init__(self, model_name: str, load: Callable[[], EngineLoad]) -> None:
        self.registry = CollectorRegistry()
        self._label = {"model_name": model_name}
        self._previous: dict[str, SpeculationStats] = {}
        self._drafts = self._counter("vllm:spec_decode_num_drafts", "Verify steps with at least one draft token.")
        self._drafted = self._counter("vllm:spec_decode_num_draft_tokens", "Draft tokens verified.")
        self._accepted = self._counter("vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted.")
        self._accepted_at = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted, by position in the block.",
            ["model_name", "position"],
            registry=self.registry,
        )
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of admitted requests.")
        self._generated = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._finished = Counter(
            "vllm:request_success",
            "Finished sequences, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._refused = self._counter("draftline:requests_refused", "Requests answered 429.")
        self._swaps = self._counter("draftline:draft_swaps", "Drafts exchanged while serving.")
        latency = {"buckets": _LATENCY_BUCKETS_S}
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", **latency)
        self._gap = self._histogram(
            "vllm:inter_token_latency_seconds", "Time per token after the first.", buckets=_STEP_BUCKETS_S
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", **latency)
        self._queued = self._histogram("vllm:request_queue_time_seconds", "Arrival to a decoding slot.", **latency)
        self._step = self._histogram("draftline:step_seconds", "One engine step.", buckets=_STEP_BUCKETS_S)
        self._gauge("vllm:num_requests_running", "Sequences in a slot.", lambda: load().num_running)
        self._gauge("vllm:num_requests_waiting", "Sequences queued for a slot.", lambda: load().num_waiting)
        self._gauge("vllm:kv_cache_usage_perc", "Share of cache positions in use.", lambda: load().kv_cache_usage)
        self._gauge(
            "draftline:mean_budget",
            "Recent mean of verified draft tokens per sequence and step.",
            lambda: load().mean_budget,
        )
        self._totals = SpeculationStats()
        self._gauge(
            "draftline:accepted_length",
            "Tokens per target step since the start, steps without a draft included; 0 before the first.",
            lambda: self._totals.tokens_per_step,
        )

    @property
    def totals(self) -> SpeculationStats:
        """Counters of all requests together since the start, without the histogram; a copy."""
        return replace(self._totals, accepted_histogram=[])

    def render(self) -> bytes:
        """The Prometheus text exposition."""
        return generate_latest(self.registry)

    def record_admitted(self, num_prompt_tokens: int) -> None:
        """Count an admitted prompt."""
        self._prompt_tokens.labels(**self._label).inc(num_prompt_tokens)

    def record_refused(self) -> None:
        """Count a 429."""
        self._refused.labels(**self._label).inc()

    def record_swap(self) -> None:
        """Count a draft swap."""
        self._swaps.labels(**self._label).inc()

    def record_queued(self, seconds: float) -> None:
        """Time from arrival to the slot."""
        self._queued.labels(**self._label).observe(seconds)

    def record_first_token(self, seconds: float) -> None:
        """Time from arrival to the first token."""
        self._ttft.labels(**self._label).observe(seconds)

    def record_gap(self, seconds: float, num_tokens: int) -> None:
        """``num_tokens`` arrived together ``seconds`` after the ones before."""
        child = self._gap.labels(**self._label)
        for _ in range(num_tokens):
            child.observe(seconds / num_tokens)

    def record_finished(self, reason: str, seconds: float) -> None:
        """A sequence ended."""
        self._finished.labels(**self._label, finished_reason=reason).inc()
        self._e2e.labels(**self._label).observe(seconds)

    def record_step(self, events: Sequence[TokenEvent], seconds: float) -> None:
        """Count one engine step; called by the engine thread only."""
        self._step.labels(**self._label).observe(seconds)
        for event in events:
            self._generated.labels(**self._label).inc(len(event.token_ids))
            self._count_speculation(event)

    def _count_speculation(self, event: TokenEvent) -> None:
        now, before = event.stats, self._previous.pop(event.request_id, SpeculationStats())
        if event.finish_reason is None:
            self._previous[event.request_id] = now
        self._drafts.labels(**self._label).inc(now.num_spec_steps - before.num_spec_steps)
        self._drafted.labels(**self._label).inc(now.num_draft_tokens - before.num_draft_tokens)
        self._accepted.labels(**self._label).inc(now.num_accepted_tokens - before.num_accepted_tokens)
        self._totals.num_spec_steps += now.num_spec_steps - before.num_spec_steps
        self._totals.num_draft_tokens += now.num_draft_tokens - before.num_draft_tokens
        self._totals.num_accepted_tokens += now.num_accepted_tokens - before.num_accepted_tokens
        self._totals.num_steps += now.num_steps - before.num_steps
        self._totals.num_output_tokens += now.num_output_tokens - before.num_output_tokens
        old = before.accepted_histogram + [0] * (len(now.accepted_histogram) - len(before.accepted_histogram))
        # A step that accepted n drafts accepted positions 0 to n - 1, so position p counts all entries above p.
        above = 0
        for num_accepted in range(len(now.accepted_histogram) - 1, 0, -1):
            above += now.accepted_histogram[num_accepted] - old[num_accepted]
            if above:
                self._accepted_at.labels(**self._label, position=str(num_accepted - 1)).inc(above)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(name, text, ["model_name"], registry=self.registry)
        counter.labels(**self._label)
        return counter

    def _histogram(self, name: str, text: str, *, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(name, text, ["model_name"], registry=self.registry).labels(**self._label).set_function(read)
