"""What goes into the engine and what comes out; bookkeeping, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

TopLogprobs = tuple[tuple[int, float], ...]
"""Token ids and their log-probabilities, likeliest first."""

MAX_TOP_LOGPROBS = 20
"""Alternatives that may be asked for, as at OpenAI."""

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded.

    Attributes:
        max_tokens: Most tokens to generate (at least 1).
        temperature: 0 is greedy.
        top_p: Nucleus mass in (0, 1].
        top_k: Keep the k likeliest, 0 for all.
        seed: Makes a sampled request repeatable; ``None`` draws one.
        stop_token_ids: Ending tokens besides the target's own.
        ignore_eos: Do not stop at the target's end tokens.
        min_tokens: End tokens before this many tokens do not end the request.
        has_logprobs: Report the target's log-probability of each token.
        num_top_logprobs: Likeliest tokens to report beside each chosen one, with ``has_logprobs``.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    has_logprobs: bool = False
    num_top_logprobs: int = 0


@dataclass(frozen=True)
class EngineRequest:
    """One sequence to continue."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass
class SpeculationStats:
    """Counters of one request or of many (they add).

    Attributes:
        num_spec_steps: Verify steps that carried at least one draft token.
        num_draft_tokens: Draft tokens verified.
        num_accepted_tokens: Of those, accepted.
        accepted_histogram: Entry n counts steps with n accepted drafts.
        num_steps: All decode steps, speculative or not.
        num_output_tokens: Tokens emitted after the prompt's first. Fewer than the accepted ones and a bonus
            for every step when the answer ended inside a block.
    """

    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_histogram: list[int] = field(default_factory=list)
    num_steps: int = 0
    num_output_tokens: int = 0

    def record(self, num_drafted: int, num_accepted: int, num_emitted: int) -> None:
        """Count one decode step.

        Args:
            num_drafted: Draft tokens verified.
            num_accepted: Of those, accepted, also those behind a token that ended the answer: they tell how good
                the draft is.
            num_emitted: Tokens that the answer grew by.
        """
        self.num_steps += 1
        self.num_output_tokens += num_emitted
        if num_drafted == 0:
            return
        self.num_spec_steps += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        while len(self.accepted_histogram) <= num_drafted:
            self.accepted_histogram.append(0)
        self.accepted_histogram[num_accepted] += 1

    def add(self, other: SpeculationStats) -> None:
        """Add another's counters."""
        self.num_spec_steps += other.num_spec_steps
        self.num_draft_tokens += other.num_draft_tokens
        self.num_accepted_tokens += other.num_accepted_tokens
        self.num_steps += other.num_steps
        self.num_output_tokens += other.num_output_tokens
        while len(self.accepted_histogram) < len(other.accepted_histogram):
            self.accepted_histogram.append(0)
        for index, count in enumerate(other.accepted_histogram):
            self.accepted_histogram[index] += count

    @property
    def tokens_per_step(self) -> float:
        """Tokens that the answer grew by per target step, all decode steps counted; 0 before the first."""
        return self.num_output_tokens / self.num_steps if self.num_steps else 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per step that verified something, bonus included (as in vLLM); 0 before the first."""
        return 1 + self.num_accepted_tokens / self.num_spec_steps if self.num_spec_steps else 0.0


@dataclass(frozen=True)
class TokenEvent:
    """What one engine step did to one request.

    Attributes:
        request_id: Whose.
        token_ids: New tokens, in order; may be empty in a finishing event. An
            end token is included as the last.
        logprobs: The target's log-probability of each (temperature 1, no truncation); empty where not asked for.
        finish_reason: Set on the last event of a request.
        stats: The request's counters so far (a copy).
        top_logprobs: Per token the likeliest token ids at its place with their log-probabilities, likeliest first;
            empty where the request asked for none.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None
    stats: SpeculationStats
    top_logprobs: tuple[TopLogprobs, ...] = ()


@dataclass(frozen=True)
class DraftedBlocks:
    """The drafted blocks of one step and what became of them; R blocks of B positions.

    Attributes:
        request_ids: Whose, R.
        block_size: B.
        survival_RB: Calibrated P(first k drafts accepted), ``None`` without a confidence head.
        num_verified_R: Drafts that were verified, 0 to B.
        num_accepted_R: Of those, accepted.
    """

    request_ids: Sequence[str]
    block_size: int
    survival_RB: NDArray[np.float64] | None
    num_verified_R: NDArray[np.int64]
    num_accepted_R: NDArray[np.int64]


@dataclass(frozen=True)
class StepReport:
    """What the last step did and what the scheduler knew of it; zeros before the first.

    Attributes:
        predicted_ms: Milliseconds the step was expected to take; 0 where costs were not profiled.
        measured_ms: Milliseconds it took, ``draft_ms`` and ``verify_ms`` among them.
        draft_ms: Of proposing blocks.
        verify_ms: Of the target's forward.
        num_requests: Decoding requests.
        num_drafting: Of those, with a drafted block.
        num_tokens: Tokens of the forward: one for each decoding request, drafts, prompt chunks.
        num_prefill_tokens: Prompt tokens planned for it.
        budget: Draft tokens verified.
        num_accepted: Of those, accepted.
        num_probes: Blocks drafted since the start (or the last draft swap) only to find out whether drafting pays.
        calibration_ece: Running expected calibration error of predicted survival against acceptance.
        calibration_brier: Running Brier score of the same.
        survival_correction: Accepted over predicted drafts lately; 1 where confidences are right on average.
        blocks: What was drafted, ``None`` when nothing was.
    """

    predicted_ms: float = 0.0
    measured_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    num_requests: int = 0
    num_drafting: int = 0
    num_tokens: int = 0
    num_prefill_tokens: int = 0
    budget: int = 0
    num_accepted: int = 0
    num_probes: int = 0
    calibration_ece: float = 0.0
    calibration_brier: float = 0.0
    survival_correction: float = 1.0
    blocks: DraftedBlocks | None = None


NO_STEP = StepReport()
"""Before the first step."""


@dataclass(frozen=True)
class EngineLoad:
    """A snapshot for admission, metrics and autoscaling.

    Attributes:
        num_running: Requests holding a slot.
        num_waiting: Requests queued for one.
        kv_cache_usage: Share of cache positions in use, 0 to 1.
        mean_budget: Recent mean of verified draft tokens per request and step.
        step: The last step.
        num_prompt_tokens: Prompt tokens of all requests that got a slot since the start.
        num_cached_tokens: Of those, taken over from the cache instead of computed.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    mean_budget: float
    step: StepReport = NO_STEP
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
