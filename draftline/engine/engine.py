"""The speculative engine: continuous batching of ragged verify steps.

A step drafts for every decoding request, lets the policy choose how much of
each block to verify, flattens all tokens (1 + l_r per request, and chunks of
prompts) into one target forward, and verifies. The draft's context features
come out of the same forward. One thread owns the engine.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftline.calibration.profile import EngineSize, draft_facts, machine_facts, profile_draft, profile_verify
from draftline.calibration.survival import Calibration
from draftline.decoding.verify import SamplingLaw, law_of, num_matching, verify_sampled
from draftline.draft.checkpoint import DraftModel
from draftline.draft.config import DraftConfig
from draftline.draft.proposer import EngineRoom, ProcessedTokens, Proposal, Proposer, ProposerFactory
from draftline.draft.serve import new_proposer
from draftline.engine.requests import (
    EngineLoad,
    EngineRequest,
    FinishReason,
    SamplingParams,
    SpeculationStats,
    StepReport,
    TokenEvent,
)
from draftline.engine.slots import RunningRequest, SlotTable
from draftline.errors import InputError, TargetError
from draftline.scheduling.costs import CostTable
from draftline.scheduling.policies import LengthPolicy, OffPolicy
from draftline.scheduling.scheduler import Scheduler, Segments, StepShape
from draftline.target.batch import Chunk, StepBatch, build_batch
from draftline.target.lean import ModelConfig, TargetOutput
from draftline.target.load import Target

MAX_BLOCK_SIZE = 64
"""Positions beyond the context that a block may be written to."""


@dataclass(frozen=True)
class EngineLimits:
    """Sizes that are fixed for an engine's life.

    Attributes:
        num_slots: Requests decoded together.
        max_context: Prompt plus answer tokens of one request.
        prefill_tokens: Prompt tokens processed in one step at most.
    """

    num_slots: int
    max_context: int
    prefill_tokens: int = 512


@dataclass(frozen=True)
class StepTrace:
    """What one request's verify step showed; for calibration.

    Attributes:
        request_id: Whose.
        confidence_B: Raw confidence logits of the drafted block.
        num_verified: Drafts verified.
        num_accepted: Of those, accepted.
    """

    request_id: str
    confidence_B: tuple[float, ...]
    num_verified: int
    num_accepted: int


class Engine:
    """Decodes many requests together, speculatively when it has a draft.

    Args:
        target: The model whose law the output follows.
        limits: Fixed sizes.
        policy: How much of each block is verified; may be exchanged between steps.
        calibration: Maps confidence logits to survival; raw when ``None``.
        costs: What steps cost here. Measured by :meth:`profile`, at the latest
            when an adaptive policy first needs it.
        keep_traces: Collect a :class:`StepTrace` per request and step.
    """

    def __init__(
        self,
        target: Target,
        limits: EngineLimits,
        policy: LengthPolicy | None = None,
        *,
        calibration: Calibration | None = None,
        costs: CostTable | None = None,
        keep_traces: bool = False,
    ) -> None:
        self._target = target
        self._model = target.model
        self._limits = limits
        self._scheduler = Scheduler(policy or OffPolicy(), limits.num_slots, 1, costs)
        self.calibration = calibration
        self.traces: list[StepTrace] | None = [] if keep_traces else None
        # A block is written past the context, so positions go a little further.
        self._num_positions = limits.max_context + MAX_BLOCK_SIZE
        self._cache = self._model.new_cache(limits.num_slots, self._num_positions)
        self._slots = SlotTable(limits.num_slots)
        self._waiting: deque[EngineRequest] = deque()
        self._cancelled: set[str] = set()
        self._proposer: Proposer | None = None
        self._make_proposer: ProposerFactory | None = None
        self._draft_facts: dict[str, str] = {}
        self._mean_budget = 0.0
        self._report = StepReport()

    # -- scheduling ---------------------------------------------------------------------------------------------

    @property
    def policy(self) -> LengthPolicy:
        """How much of each block is verified."""
        return self._scheduler.policy

    @policy.setter
    def policy(self, policy: LengthPolicy) -> None:
        self._scheduler.policy = policy

    @property
    def calibration(self) -> Calibration | None:
        """Maps confidence logits to survival; exchanged together with the draft."""
        return self._calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        self._calibration = calibration
        self._scheduler.estimate.set_prior(calibration.expected_survival if calibration is not None else None)

    @property
    def scheduler(self) -> Scheduler:
        """What decides, and what it has learned; replaced when the draft is."""
        return self._scheduler

    @property
    def costs(self) -> CostTable | None:
        """What steps cost here, if that was measured or given."""
        return self._scheduler.costs

    def profile(self) -> CostTable:
        """Measure what steps cost here (some seconds) and use it; with the present draft, if there is one.

        Neither the cache nor the draft's state of running requests is touched.
        """
        self._scheduler.costs = profile_verify(self._target, self._size())
        self._profile_draft()
        assert self._scheduler.costs is not None
        return self._scheduler.costs

    def use_costs(self, costs: CostTable) -> list[str]:
        """Take a stored table if it was measured here, for this target, dtype and draft.

        Returns:
            What differs, in words; the table is then not used. A table of
            another draft is used, and the draft's part measured again.
        """
        size = self._size()
        differing = costs.mismatches(machine_facts(self._target))
        if not costs.covers(size.num_requests, size.num_requests * (size.block_size + 1)):
            differing.append(f"it ends at {costs.requests[-1]} requests and {costs.tokens[-1]} tokens")
        if not differing:
            self._scheduler.costs = costs
            if costs.mismatches(self._draft_facts):
                self._profile_draft()
        return differing

    def _profile_draft(self) -> None:
        if self._make_proposer is None or self._scheduler.costs is None:
            return
        # A proposer of its own: the one in use knows the running requests.
        draft_ms = profile_draft(self._make_proposer, self._size())
        self._scheduler.costs = self._scheduler.costs.with_draft(draft_ms, self._draft_facts)

    def _size(self) -> EngineSize:
        return EngineSize(self._limits.num_slots, self._limits.max_context, self._scheduler.block_size)

    def _ensure_costs(self) -> None:
        if self._scheduler.costs is None:
            self.profile()
        elif not self._scheduler.costs.draft_ms:
            self._profile_draft()

    # -- requests -----------------------------------------------------------------------------------------------

    def submit(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            InputError: it is empty, does not fit the context, or asks for an
                impossible law.
        """
        prompt, sampling = request.prompt_ids, request.sampling
        if not prompt:
            raise InputError("the prompt is empty", expected="at least one token")
        if sampling.max_tokens < 1:
            raise InputError("max_tokens is too small", got=sampling.max_tokens, expected="at least 1")
        if len(prompt) + sampling.max_tokens > self._limits.max_context:
            raise InputError(
                "the request does not fit the context",
                got=f"{len(prompt)} prompt + {sampling.max_tokens} new tokens",
                expected=f"at most {self._limits.max_context} together",
                remedy="Shorten the prompt or lower max_tokens",
            )
        bad = [t for t in prompt if not 0 <= t < self._target.vocab_size]
        if bad:
            raise InputError("the prompt has a token outside the vocabulary", got=bad[0])
        _check_law(sampling)
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Stop a request at the next step; unknown ids are ignored."""
        running = (r.request.request_id for r in self._slots.running)
        if request_id in running or any(r.request_id == request_id for r in self._waiting):
            self._cancelled.add(request_id)

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` would do anything."""
        return bool(self._waiting or self._slots.running)

    def load(self) -> EngineLoad:
        """A snapshot of how busy the engine is."""
        used = sum(r.num_processed for r in self._slots.running)
        capacity = self._limits.num_slots * self._limits.max_context
        return EngineLoad(
            len(self._slots.running), len(self._waiting), used / capacity, self._mean_budget, self._report
        )

    def swap_draft(self, draft: DraftModel | None) -> None:
        """Take another trained draft, or none; see :meth:`swap_proposer`.

        Raises:
            TargetError: the draft was made for another target; the old one stays.
        """
        if draft is None:
            self.swap_proposer(None)
            return
        check_fits(draft.config, self._target.config)
        self.swap_proposer(lambda room: new_proposer(draft, self._target, room), facts=draft_facts(draft))

    def swap_proposer(self, make: ProposerFactory | None, *, facts: dict[str, str] | None = None) -> None:
        """Draft by other means from now on, or not at all; call between steps.

        Requests in flight go on without speculation (what the old proposer
        knew of them is lost); the output law does not change.

        Args:
            make: Makes the proposer.
            facts: What a stored cost table of drafting must have been measured
                with; measured anew when ``None``.

        Raises:
            TargetError: it proposes larger blocks than the engine has room for; the old one stays.
        """
        proposer = make(EngineRoom(self._limits.num_slots, self._num_positions)) if make is not None else None
        if proposer is not None and not 1 <= proposer.block_size <= MAX_BLOCK_SIZE:
            raise TargetError(
                "the engine has no room for the blocks", got=proposer.block_size, expected=f"1 to {MAX_BLOCK_SIZE}"
            )
        self._proposer, self._make_proposer = proposer, make
        self._draft_facts = facts or {}
        self._renew_scheduler(proposer.block_size if proposer is not None else 1)
        for request in self._slots.running:
            request.has_draft_context = False
            request.row = self._scheduler.admit()
        self._slots.forget()

    def _renew_scheduler(self, block_size: int) -> None:
        """What was learned speaks of the old draft; what the target costs stays."""
        costs = self._scheduler.costs
        if costs is not None and (not self._draft_facts or costs.mismatches(self._draft_facts)):
            costs = replace(costs, draft_requests=(), draft_ms=())
        prior = self.calibration.expected_survival if self.calibration is not None else None
        self._scheduler = Scheduler(self.policy, self._limits.num_slots, block_size, costs, prior)

    # -- the step -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Advance every running request; returns what happened, finished requests included."""
        started_s = time.perf_counter()
        events = self._drop_cancelled()
        self._admit()
        running = self._slots.running
        if not running:
            return events
        decoding = [r for r in running if not r.is_prefilling]
        took = Segments()
        proposal, drafting = self._propose(running, decoding, took)
        lengths = self._choose_lengths(proposal, drafting, decoding)
        drafted = self._drafted_ids(proposal, drafting, lengths)
        chunks, ready = self._chunks(running, drafted)
        batch = build_batch([c for _, c in chunks], self._num_positions, self._model.dtype, self._model.device)
        taps = self._proposer.tap_ids if self._proposer is not None else ()
        forward_s = time.perf_counter()
        output = self._model.forward(batch, self._cache, taps)
        logits, first_row = self._logits(output, chunks, ready)
        likeliest, log_normaliser = self._model.score(logits)
        best = likeliest.tolist()
        took.verify_ms = 1000 * (time.perf_counter() - forward_s)
        laws = self._laws(logits, chunks, first_row, drafted)
        proposal_row = {r.slot: row for row, r in enumerate(drafting)}
        accepted_M = np.zeros(len(drafting), dtype=np.int64)
        offset = 0
        kept: list[Tensor] = []
        finished: list[tuple[RunningRequest, FinishReason]] = []
        for request, chunk in chunks:
            size = len(chunk.token_ids)
            valid = size
            if request.slot in ready:
                first = first_row[request.slot]
                rows = slice(first, first + len(drafted[request.slot]) + 1)
                row = proposal_row.get(request.slot)
                new_ids, num_accepted = self._verify(
                    request, laws.get(request.slot), best[rows], drafted[request.slot], proposal, row
                )
                if not request.is_prefilling:
                    valid = 1 + num_accepted
                    if row is not None:
                        accepted_M[row] = num_accepted
                emitted, reason = self._until_the_end(request, new_ids)
                if not request.is_prefilling:
                    request.stats.record(len(drafted[request.slot]), num_accepted, len(emitted))
                event = self._event(request, emitted, reason, logits[rows], log_normaliser[rows])
                events.append(event)
                if reason is not None:
                    finished.append((request, reason))
            kept.append(torch.arange(offset, offset + valid))
            self._slots.extend(request.slot, request.num_processed, chunk.token_ids[:valid])
            request.num_processed += valid
            offset += size
        self._append_features(output, batch, torch.cat(kept))
        for request, _ in finished:
            self._release(request)
        took.other_ms = 1000 * (time.perf_counter() - started_s) - took.draft_ms - took.verify_ms
        self._learn(np.array(lengths, dtype=np.int64), accepted_M, took, offset)
        return events

    def _learn(self, lengths_M: NDArray[np.int64], accepted_M: NDArray[np.int64], took: Segments, tokens: int) -> None:
        """Tell the scheduler what came of its step, and keep a report of it."""
        scheduler, budget = self._scheduler, int(lengths_M.sum())
        plan = scheduler.current_plan
        predicted_ms = scheduler.predicted_ms(plan, budget)
        scheduler.observe(lengths_M, accepted_M, took)
        self._report = StepReport(
            predicted_ms=predicted_ms,
            measured_ms=took.total_ms,
            draft_ms=took.draft_ms,
            verify_ms=took.verify_ms,
            num_requests=plan.shape.num_requests,
            num_drafting=len(plan.rows_M),
            num_tokens=tokens,
            num_prefill_tokens=plan.shape.num_prefill_tokens,
            budget=budget,
            num_accepted=int(accepted_M.sum()),
            num_probes=scheduler.num_probes,
            calibration_ece=scheduler.calibration_error.ece,
            calibration_brier=scheduler.calibration_error.brier,
            survival_correction=scheduler.estimate.common_correction,
        )

    def _admit(self) -> None:
        later: list[EngineRequest] = []
        while self._waiting and self._slots.has_room:
            request = self._waiting.popleft()
            source, length = self._slots.best_prefix(request.prompt_ids)
            if self._slots.is_worth_waiting(request.prompt_ids, length):
                later.append(request)
                continue
            slot = len(self._slots.running)
            if length and source != slot:
                self._cache.move(source, slot, length)
                if self._proposer is not None:
                    self._proposer.move(source, slot, length)
            seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(63)
            row = self._scheduler.admit()
            self._slots.admit(RunningRequest(request, slot, length, np.random.default_rng(seed), row=row))
        self._waiting.extendleft(reversed(later))

    def _propose(
        self, running: Sequence[RunningRequest], decoding: Sequence[RunningRequest], took: Segments
    ) -> tuple[Proposal | None, list[RunningRequest]]:
        """Let the scheduler choose who drafts, and draft for them."""
        able: list[RunningRequest] = []
        if self._proposer is not None and self.policy.wants_draft and decoding:
            # The last token needs no draft: the target's own draw ends the request.
            able = [r for r in decoding if r.has_draft_context and r.num_left > 1]
            if self.policy.is_adaptive and able:
                self._ensure_costs()
        plan = self._scheduler.plan(np.array([r.row for r in able], dtype=np.int64), self._shape(running, decoding))
        if self._proposer is None or not len(plan.rows_M):
            return None, []
        started_s = time.perf_counter()
        chosen = set(plan.rows_M.tolist())
        drafting = [r for r in able if r.row in chosen]
        temperatures = [r.request.sampling.temperature for r in drafting]
        uniforms = None
        if any(t > 0 for t in temperatures):
            block = self._proposer.block_size
            uniforms = torch.from_numpy(np.stack([r.random.random(block) for r in drafting]))
        proposal = self._proposer.propose(
            [r.slot for r in drafting],
            [r.output_ids[-1] for r in drafting],
            [r.num_processed for r in drafting],
            temperatures,
            uniforms,
        )
        took.draft_ms = 1000 * (time.perf_counter() - started_s)
        return proposal, drafting

    def _shape(self, running: Sequence[RunningRequest], decoding: Sequence[RunningRequest]) -> StepShape:
        prefilling = len(running) - len(decoding)
        tokens = 0
        if prefilling:
            left = sum(len(r.request.prompt_ids) - r.num_processed for r in running if r.is_prefilling)
            tokens = min(left, self._limits.prefill_tokens)
        context = sum(r.num_processed for r in decoding) / len(decoding) if decoding else None
        return StepShape(len(decoding), tokens, prefilling, context)

    def _choose_lengths(
        self, proposal: Proposal | None, drafting: Sequence[RunningRequest], decoding: Sequence[RunningRequest]
    ) -> list[int]:
        if proposal is None:
            if decoding:
                self._mean_budget *= 0.95
            return []
        block = proposal.token_ids_RB.shape[1]
        survival = None
        if proposal.confidence_RB is not None:
            raw = proposal.confidence_RB.double().cpu().numpy()
            survival = (self.calibration or Calibration.identity(block)).survival(raw)
        # A request never needs more drafts than tokens it may still emit, less the target's own.
        caps = np.minimum([r.num_left - 1 for r in drafting], block)
        if proposal.lengths_R is not None:
            caps = np.minimum(caps, proposal.lengths_R)
        lengths: list[int] = self._scheduler.lengths(survival, caps).tolist()
        self._mean_budget = 0.95 * self._mean_budget + 0.05 * (sum(lengths) / len(decoding))
        return lengths

    @staticmethod
    def _drafted_ids(
        proposal: Proposal | None, drafting: Sequence[RunningRequest], lengths: Sequence[int]
    ) -> dict[int, list[int]]:
        if proposal is None:
            return {}
        ids = proposal.token_ids_RB.tolist()
        return {r.slot: ids[row][: lengths[row]] for row, r in enumerate(drafting)}

    def _chunks(
        self, running: Sequence[RunningRequest], drafted: dict[int, list[int]]
    ) -> tuple[list[tuple[RunningRequest, Chunk]], set[int]]:
        """The step's chunks in slot order, and the slots whose next token comes out of it."""
        budget = self._limits.prefill_tokens
        chunks: list[tuple[RunningRequest, Chunk]] = []
        ready: set[int] = set()
        for request in running:
            start = request.num_processed
            if request.is_prefilling:
                if budget <= 0:
                    continue
                ids: Sequence[int] = request.request.prompt_ids[start : start + budget]
                budget -= len(ids)
                if start + len(ids) == len(request.request.prompt_ids):
                    ready.add(request.slot)
            else:
                ids = [request.output_ids[-1], *drafted.get(request.slot, [])]
                ready.add(request.slot)
            drafted.setdefault(request.slot, [])
            chunks.append((request, Chunk(request.slot, start, ids)))
        return chunks, ready

    def _logits(
        self, output: TargetOutput, chunks: Sequence[tuple[RunningRequest, Chunk]], ready: set[int]
    ) -> tuple[Tensor, dict[int, int]]:
        """Logits of the rows that decide something, and each slot's first row."""
        wanted: list[int] = []
        first_row: dict[int, int] = {}
        offset = 0
        for request, chunk in chunks:
            size = len(chunk.token_ids)
            if request.slot in ready:
                first_row[request.slot] = len(wanted)
                wanted.extend([offset + size - 1] if request.is_prefilling else range(offset, offset + size))
            offset += size
        if not wanted:
            return output.hidden_ND.new_empty(0, self._target.vocab_size), first_row
        hidden = output.hidden_ND if len(wanted) == offset else output.hidden_ND[torch.tensor(wanted)]
        return self._model.logits(hidden), first_row

    @staticmethod
    def _laws(
        logits: Tensor,
        chunks: Sequence[tuple[RunningRequest, Chunk]],
        first_row: dict[int, int],
        drafted: dict[int, list[int]],
    ) -> dict[int, Tensor]:
        """The target's law on the rows of every sampled request, by slot; equal settings are computed together."""
        groups: dict[SamplingLaw, list[int]] = {}
        for request, _ in chunks:
            sampling = request.request.sampling
            if request.slot in first_row and sampling.temperature > 0:
                law = SamplingLaw(sampling.temperature, sampling.top_p, sampling.top_k)
                groups.setdefault(law, []).append(request.slot)
        laws: dict[int, Tensor] = {}
        for law, slots in groups.items():
            sizes = [len(drafted[slot]) + 1 for slot in slots]
            rows = [
                row for slot, n in zip(slots, sizes, strict=True) for row in range(first_row[slot], first_row[slot] + n)
            ]
            laws.update(zip(slots, law_of(logits[torch.tensor(rows)], law).split(sizes), strict=True))
        return laws

    def _verify(
        self,
        request: RunningRequest,
        law: Tensor | None,
        best: list[int],
        drafted: list[int],
        proposal: Proposal | None,
        row: int | None,
    ) -> tuple[list[int], int]:
        """New tokens of one request, and how many drafts were accepted."""
        if law is None:
            accepted = num_matching(best, drafted)
            following = best[accepted]
        else:
            uniforms = torch.from_numpy(request.random.random(len(drafted) + 1))
            if proposal is not None and row is not None and proposal.law_RBW is not None:
                columns, draft_law = proposal.columns_RB[row].tolist(), proposal.law_RBW[row]
            else:
                columns, draft_law = [], law[:0]
            mapping = self._proposer.draft_to_target if self._proposer is not None else None
            accepted, following = verify_sampled(law, draft_law, drafted, columns, mapping, uniforms)
        if self.traces is not None and proposal is not None and row is not None:
            head = proposal.confidence_RB
            confidence = tuple(head[row].tolist()) if head is not None else ()
            self.traces.append(StepTrace(request.request.request_id, confidence, len(drafted), accepted))
        return [*drafted[:accepted], following], accepted

    def _until_the_end(self, request: RunningRequest, new_ids: list[int]) -> tuple[list[int], FinishReason | None]:
        """New tokens up to the one that ends the answer, appended to it, and why it ended, if it did."""
        sampling = request.request.sampling
        stops = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stops.update(self._target.eos_token_ids)
        reason: FinishReason | None = None
        emitted: list[int] = []
        for token in new_ids:
            emitted.append(token)
            count = len(request.output_ids) + len(emitted)
            if token in stops and count > sampling.min_tokens:
                reason = "stop"
                break
            if count >= sampling.max_tokens:
                reason = "length"
                break
        request.output_ids.extend(emitted)
        return emitted, reason

    @staticmethod
    def _event(
        request: RunningRequest,
        emitted: list[int],
        reason: FinishReason | None,
        logits: Tensor,
        log_normaliser: Tensor,
    ) -> TokenEvent:
        chosen = logits[torch.arange(len(emitted)), torch.tensor(emitted)].float() - log_normaliser[: len(emitted)]
        stats = replace(request.stats, accepted_histogram=list(request.stats.accepted_histogram))
        return TokenEvent(request.request.request_id, tuple(emitted), tuple(chosen.tolist()), reason, stats)

    def _append_features(self, output: TargetOutput, batch: StepBatch, kept: Tensor) -> None:
        if self._proposer is None:
            return
        ids, positions, index, taps = batch.token_ids_N, batch.positions_N, batch.cache_index_N, output.taps_NLD
        if len(kept) < len(positions):
            ids, positions, index, taps = ids[kept], positions[kept], index[kept], taps[kept]
        self._proposer.append(ProcessedTokens(ids, positions, index, taps))

    # -- leaving ------------------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> list[TokenEvent]:
        if not self._cancelled:
            return []
        events = []
        for request in [r for r in self._slots.running if r.request.request_id in self._cancelled]:
            self._release(request)
            events.append(TokenEvent(request.request.request_id, (), (), "cancelled", request.stats))
        for waiting in [r for r in self._waiting if r.request_id in self._cancelled]:
            self._waiting.remove(waiting)
            events.append(TokenEvent(waiting.request_id, (), (), "cancelled", SpeculationStats()))
        self._cancelled.clear()
        return events

    def _release(self, request: RunningRequest) -> None:
        self._scheduler.release(request.row)
        moved = self._slots.release(request)
        if moved is not None:
            source, destination, length = moved
            self._cache.move(source, destination, length)
            if self._proposer is not None:
                self._proposer.move(source, destination, length)


def _check_law(sampling: SamplingParams) -> None:
    ranges = {
        "temperature": (0 <= sampling.temperature < float("inf"), "at least 0"),
        "top_p": (0 < sampling.top_p <= 1, "above 0, at most 1"),
        "top_k": (sampling.top_k >= 0, "at least 0"),
        "seed": (sampling.seed is None or sampling.seed >= 0, "at least 0"),
    }
    for name, (is_possible, expected) in ranges.items():
        if not is_possible:
            raise InputError(f"{name} is out of range", got=getattr(sampling, name), expected=expected)


def check_fits(config: DraftConfig, target: ModelConfig) -> None:
    """Refuse a draft that was made for another target, or that this engine cannot run.

    Raises:
        TargetError: hidden size, depth or vocabulary differ, or a tapped layer, the mask token or the block
            is out of range.
    """
    pairs = {
        "hidden size": (config.hidden_size, target.hidden_size),
        "vocabulary": (config.vocab_size, target.vocab_size),
        "target layers": (config.num_target_layers, target.num_layers),
    }
    for what, (got, expected) in pairs.items():
        if got != expected:
            raise TargetError(
                f"the draft does not fit the target: its {what} differs",
                got=got,
                expected=str(expected),
                remedy="Deploy a draft that was trained for this target",
            )
    taps = config.target_layer_ids
    limits: dict[str, tuple[bool, object, str]] = {
        "target_layer_ids": (
            bool(taps) and list(taps) == sorted(set(taps)) and taps[0] >= -1 and taps[-1] < target.num_layers - 1,
            list(taps),
            f"ascending ids from -1 to {target.num_layers - 2}",
        ),
        "mask_token_id": (
            0 <= config.mask_token_id < target.vocab_size,
            config.mask_token_id,
            f"0 to {target.vocab_size - 1}",
        ),
        "block_size": (1 <= config.block_size <= MAX_BLOCK_SIZE, config.block_size, f"1 to {MAX_BLOCK_SIZE}"),
    }
    for name, (is_possible, found, wanted) in limits.items():
        if not is_possible:
            raise TargetError(
                f"the draft cannot be run: {name} is out of range",
                got=found,
                expected=wanted,
                remedy="Deploy a draft that was exported for this target",
            )
