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

from draftline.calibration.profile import EngineSize, draft_facts, machine_facts, profile_draft, profile_verify
from draftline.calibration.survival import Calibration
from draftline.draft.checkpoint import DraftModel
from draftline.draft.proposer import EngineRoom, ProcessedTokens, Proposal, Proposer, ProposerFactory
from draftline.draft.serve import new_proposer
from draftline.engine.checks import MAX_BLOCK_SIZE, check_fits, check_request
from draftline.engine.drafts import StepDrafts, step_drafts
from draftline.engine.requests import (
    NO_STEP,
    DraftedBlocks,
    EngineLoad,
    EngineRequest,
    SpeculationStats,
    StepReport,
    TokenEvent,
)
from draftline.engine.slots import RunningRequest, SlotTable, WaitingRequest
from draftline.engine.verification import Deciding, Verdict, verify_step
from draftline.errors import TargetError
from draftline.scheduling.costs import CostTable
from draftline.scheduling.policies import LengthPolicy, OffPolicy
from draftline.scheduling.scheduler import Scheduler, Segments, StepShape, compile_loops
from draftline.target.batch import Chunk, StepBatch, build_batch
from draftline.target.lean import TargetOutput
from draftline.target.load import Target

READ_AGAIN_TOKENS = 4
"""Tokens that are worth processing again for each token that may still be generated, when the draft is exchanged."""


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
        compile_loops()
        self._scheduler = Scheduler(policy or OffPolicy(), limits.num_slots, 1, costs)
        self.calibration = calibration
        self.traces: list[StepTrace] | None = [] if keep_traces else None
        # A block is written past the context, so positions go a little further.
        self._num_positions = limits.max_context + MAX_BLOCK_SIZE
        self._cache = self._model.new_cache(limits.num_slots, self._num_positions)
        self._slots = SlotTable(limits.num_slots)
        self._waiting: deque[WaitingRequest] = deque()
        self._cancelled: set[str] = set()
        self._proposer: Proposer | None = None
        self._make_proposer: ProposerFactory | None = None
        self._draft_facts: dict[str, str] = {}
        self._mean_budget = 0.0
        self._report = NO_STEP
        self._survival_MB: NDArray[np.float64] | None = None
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0

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
        elif self._scheduler.costs.is_measured and not self._scheduler.costs.draft_ms:
            self._profile_draft()

    # -- requests -----------------------------------------------------------------------------------------------

    def submit(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            InputError: it is empty, does not fit the context, or asks for an
                impossible law.
        """
        check_request(request, self._limits.max_context, self._target.vocab_size)
        self._waiting.append(WaitingRequest.of(request))

    def cancel(self, request_id: str) -> None:
        """Stop a request at the next step; unknown ids are ignored."""
        requests = [r.request for r in self._slots.running] + [r.request for r in self._waiting]
        if any(request.request_id == request_id for request in requests):
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
            len(self._slots.running),
            len(self._waiting),
            used / capacity,
            self._mean_budget,
            self._report,
            self._num_prompt_tokens,
            self._num_cached_tokens,
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

        The output law does not change. Requests in flight regain speculation:
        a proposer that reads only text learns theirs at once; for one that
        reads taps, prompts being processed start again, and the text of
        decoding requests is processed again where enough is still to come.

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
        if proposer is None:
            return
        if not proposer.tap_ids:
            self._tell_texts(proposer)
            return
        self._slots.forget()
        for request in self._slots.running:
            if request.is_prefilling:
                request.process_again()

    def _tell_texts(self, proposer: Proposer) -> None:
        """Let a proposer without taps learn all that the slots hold."""
        texts = [self._slots.content(slot) for slot in range(self._limits.num_slots)]
        for request in self._slots.running:
            texts[request.slot] = request.text(0, request.num_processed)
            request.has_draft_context = True
        for slot, text in enumerate(texts):
            if text:
                positions = torch.arange(len(text), device=self._model.device)
                taps = torch.empty(len(text), 0, self._target.config.hidden_size, device=self._model.device)
                ids = torch.tensor(text, device=self._model.device)
                proposer.append(ProcessedTokens(ids, positions, slot * self._num_positions + positions, taps))

    def _process_again(self) -> None:
        """Choose a request to be read again for a new draft: one at a time, and only while no prompt is waiting.

        It gives up a few decode steps for that, as others do for its prompt; so it must have enough to come.
        """
        running = self._slots.running
        if self._proposer is None or not self.policy.wants_draft or any(r.is_prefilling for r in running):
            return
        for request in running:
            enough = request.num_left * READ_AGAIN_TOKENS >= request.num_processed
            if not request.has_draft_context and enough and request.num_left > self._proposer.block_size:
                self._slots.forget_slot(request.slot)
                request.process_again()
                return

    def _renew_scheduler(self, block_size: int) -> None:
        """What was learned speaks of the old draft; what the target costs stays."""
        costs = self._scheduler.costs
        is_other = not self._draft_facts or (costs is not None and costs.mismatches(self._draft_facts))
        if costs is not None and costs.is_measured and is_other:
            costs = replace(costs, draft_requests=(), draft_ms=())
        prior = self.calibration.expected_survival if self.calibration is not None else None
        self._scheduler = Scheduler(self.policy, self._limits.num_slots, block_size, costs, prior)

    # -- the step -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Advance every running request; returns what happened, finished requests included."""
        if self._proposer is not None and self.policy.is_adaptive:
            # Before the clock starts: the scheduler would take these seconds for the cost of a step.
            self._ensure_costs()
        started_s = time.perf_counter()
        events = self._drop_cancelled()
        self._admit()
        self._process_again()
        running = self._slots.running
        if not running:
            return events
        decoding = [r for r in running if not r.is_prefilling]
        took = Segments()
        proposal, drafting = self._propose(running, decoding, took)
        lengths = self._choose_lengths(proposal, drafting, decoding)
        drafts = step_drafts(proposal, drafting, lengths)
        chunks, ready = self._chunks(running, drafts)
        batch = build_batch([c for _, c in chunks], self._num_positions, self._model.dtype, self._model.device)
        taps = self._proposer.tap_ids if self._proposer is not None else ()
        forward_s = time.perf_counter()
        output = self._model.forward(batch, self._cache, taps)
        verdicts = self._verify(output, chunks, ready, drafts)
        took.verify_ms = 1000 * (time.perf_counter() - forward_s)
        accepted_M = np.zeros(len(drafting), dtype=np.int64)
        for slot, row in drafts.row_by_slot.items():
            accepted_M[row] = verdicts[slot].num_accepted
        offset = 0
        kept: list[int] = []
        finished: list[RunningRequest] = []
        for request, chunk in chunks:
            valid = len(chunk.token_ids)
            verdict = verdicts.get(request.slot)
            if verdict is not None:
                event, valid = self._take(request, verdict, drafts, valid)
                events.append(event)
                if event.finish_reason is not None:
                    finished.append(request)
            kept.extend(range(offset, offset + valid))
            self._slots.extend(request.slot, request.num_processed, chunk.token_ids[:valid])
            request.num_processed += valid
            offset += len(chunk.token_ids)
        self._append_features(output, batch, kept)
        for request in finished:
            self._release(request)
        took.other_ms = 1000 * (time.perf_counter() - started_s) - took.draft_ms - took.verify_ms
        lengths_M = np.array(lengths, dtype=np.int64)
        blocks = self._blocks(drafting, lengths_M, accepted_M)
        self._learn(lengths_M, accepted_M, took, offset, blocks)
        return events

    def _blocks(
        self, drafting: Sequence[RunningRequest], lengths_M: NDArray[np.int64], accepted_M: NDArray[np.int64]
    ) -> DraftedBlocks | None:
        if not drafting:
            return None
        ids = [r.request.request_id for r in drafting]
        return DraftedBlocks(ids, self._scheduler.block_size, self._survival_MB, lengths_M, accepted_M)

    def _learn(
        self,
        lengths_M: NDArray[np.int64],
        accepted_M: NDArray[np.int64],
        took: Segments,
        tokens: int,
        blocks: DraftedBlocks | None,
    ) -> None:
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
            blocks=blocks,
        )

    def _admit(self) -> None:
        later: list[WaitingRequest] = []
        slots = self._slots
        while self._waiting and slots.has_room:
            waiting = self._waiting.popleft()
            if slots.is_held(waiting):
                later.append(waiting)
                continue
            source, length = slots.best_prefix(waiting)
            if slots.is_worth_waiting(waiting, length):
                later.append(waiting)
                continue
            slot, request = len(slots.running), waiting.request
            self._num_prompt_tokens += len(request.prompt_ids)
            self._num_cached_tokens += length
            if length and source != slot:
                self._cache.move(source, slot, length)
                if self._proposer is not None:
                    self._proposer.move(source, slot, length)
            seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(63)
            row = self._scheduler.admit()
            random = np.random.default_rng(seed)
            slots.admit(RunningRequest(request, slot, length, random, row=row, blocks=waiting.blocks))
        self._waiting.extendleft(reversed(later))

    def _propose(
        self, running: Sequence[RunningRequest], decoding: Sequence[RunningRequest], took: Segments
    ) -> tuple[Proposal | None, list[RunningRequest]]:
        """Let the scheduler choose who drafts, and draft for them."""
        able: list[RunningRequest] = []
        if self._proposer is not None and self.policy.wants_draft and decoding:
            # The last token needs no draft: the target's own draw ends the request.
            able = [r for r in decoding if r.has_draft_context and r.num_left > 1]
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
        # As the chunks will be: prompts in order, until the step's share of prompt tokens is used up.
        left, prefilling = self._limits.prefill_tokens, 0
        for request in running:
            if request.is_prefilling and left > 0:
                left -= min(left, request.num_known - request.num_processed)
                prefilling += 1
        context = sum(r.num_processed for r in decoding) / len(decoding) if decoding else None
        return StepShape(len(decoding), self._limits.prefill_tokens - left, prefilling, context)

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
        self._survival_MB = survival
        # A request never needs more drafts than tokens it may still emit, less the target's own.
        caps = np.minimum([r.num_left - 1 for r in drafting], block)
        if proposal.lengths_R is not None:
            caps = np.minimum(caps, proposal.lengths_R)
        lengths: list[int] = self._scheduler.lengths(survival, caps).tolist()
        self._mean_budget = 0.95 * self._mean_budget + 0.05 * (sum(lengths) / len(decoding))
        return lengths

    def _chunks(
        self, running: Sequence[RunningRequest], drafts: StepDrafts
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
                ids = request.text(start, min(start + budget, request.num_known))
                budget -= len(ids)
                # Text that is processed again has its next token already.
                if start + len(ids) == request.num_known and not request.output_ids:
                    ready.add(request.slot)
            else:
                ids = [request.output_ids[-1], *drafts.ids(request.slot)]
                ready.add(request.slot)
            chunks.append((request, Chunk(request.slot, start, ids)))
        return chunks, ready

    def _verify(
        self,
        output: TargetOutput,
        chunks: Sequence[tuple[RunningRequest, Chunk]],
        ready: set[int],
        drafts: StepDrafts,
    ) -> dict[int, Verdict]:
        """What the step decides, by slot."""
        wanted: list[int] = []
        deciding: dict[int, Deciding] = {}
        offset = 0
        for request, chunk in chunks:
            offset += len(chunk.token_ids)
            if request.slot in ready:
                ids = drafts.ids(request.slot)
                wanted.extend(range(offset - len(ids) - 1, offset))
                row = drafts.row_by_slot.get(request.slot)
                deciding[request.slot] = Deciding(request.request.sampling, request.random, ids, row)
        if not wanted:
            return {}
        hidden = output.hidden_ND
        if len(wanted) < offset:
            hidden = hidden[torch.tensor(wanted, device=hidden.device)]
        mapping = self._proposer.draft_to_target if self._proposer is not None else None
        logits, requests = self._model.logits(hidden), list(deciding.values())
        found = verify_step(logits, requests, drafts.proposal, mapping, self._model.score)
        verdicts = dict(zip(deciding, found, strict=True))
        if self.traces is not None and drafts.proposal is not None:
            self._trace(self.traces, drafts, verdicts)
        return verdicts

    def _trace(self, traces: list[StepTrace], drafts: StepDrafts, verdicts: dict[int, Verdict]) -> None:
        assert drafts.proposal is not None
        head = drafts.proposal.confidence_RB
        confidences = head.tolist() if head is not None else [()] * len(drafts.row_by_slot)
        for slot, row in drafts.row_by_slot.items():
            request_id = self._slots.running[slot].request.request_id
            accepted = verdicts[slot].num_accepted
            traces.append(StepTrace(request_id, tuple(confidences[row]), len(drafts.ids(slot)), accepted))

    def _take(
        self, request: RunningRequest, verdict: Verdict, drafts: StepDrafts, num_tokens: int
    ) -> tuple[TokenEvent, int]:
        """Give a request its new tokens; returns its event and how many of the step's tokens stay."""
        is_first = request.is_prefilling
        emitted, reason = request.grow(verdict.token_ids, self._target.eos_token_ids)
        if not is_first:
            num_tokens = 1 + verdict.num_accepted
            request.stats.record(len(drafts.ids(request.slot)), verdict.num_accepted, len(emitted))
        count = len(emitted)
        event = TokenEvent(
            request.request.request_id,
            tuple(emitted),
            tuple(verdict.logprobs[:count]),
            reason,
            replace(request.stats, accepted_histogram=list(request.stats.accepted_histogram)),
            tuple(verdict.top_logprobs[:count]),
        )
        return event, num_tokens

    def _append_features(self, output: TargetOutput, batch: StepBatch, kept: Sequence[int]) -> None:
        if self._proposer is None:
            return
        ids, positions, index, taps = batch.token_ids_N, batch.positions_N, batch.cache_index_N, output.taps_NLD
        if len(kept) < len(positions):
            rows = torch.tensor(kept, device=positions.device)
            ids, positions, index, taps = ids[rows], positions[rows], index[rows], taps[rows]
        self._proposer.append(ProcessedTokens(ids, positions, index, taps))

    # -- leaving ------------------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> list[TokenEvent]:
        if not self._cancelled:
            return []
        events = []
        for request in [r for r in self._slots.running if r.request.request_id in self._cancelled]:
            self._release(request)
            events.append(TokenEvent(request.request.request_id, (), (), "cancelled", request.stats))
        kept = deque(r for r in self._waiting if r.request.request_id not in self._cancelled)
        for waiting in self._waiting if len(kept) < len(self._waiting) else ():
            if waiting.request.request_id in self._cancelled:
                events.append(TokenEvent(waiting.request.request_id, (), (), "cancelled", SpeculationStats()))
        self._waiting = kept
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
