"""The engine's fake transport: deterministic, without torch, with the methods of the real one.

Its "model" answers token t + 1 after token t (modulo the vocabulary) unless a
script says otherwise, several tokens per step like a verify step does, so
that every expected text can be written down by hand.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from draftline.engine.requests import EngineLoad, EngineRequest, FinishReason, SpeculationStats, TokenEvent
from draftline.errors import InputError
from serving.capacity import StepCosts

Script = Callable[[EngineRequest], Sequence[int]]

END_OF_TEXT = 256
VOCAB_SIZE = 257


@dataclass
class _Running:
    request: EngineRequest
    pending: deque[int]
    num_sent: int = 0
    stats: SpeculationStats = field(default_factory=SpeculationStats)


def count_up(request: EngineRequest) -> Sequence[int]:
    """The default script: letters of the alphabet, from ``a``, for ever long enough."""
    return [ord("a") + i % 26 for i in range(request.sampling.max_tokens)]


class ScriptedEngine:
    """Plays scripts; every attribute may be changed between steps by a test.

    Args:
        script: Token ids of a request's answer; it ends by ``END_OF_TEXT`` or at ``max_tokens``.
        tokens_per_step: Tokens of one verify step.
        max_running: Slots.
        max_context: Prompt plus answer tokens.
        step_s: Duration of a step.
    """

    def __init__(
        self,
        script: Script = count_up,
        *,
        tokens_per_step: int = 3,
        max_running: int = 4,
        max_context: int = 512,
        step_s: float = 0.0,
    ) -> None:
        self.script = script
        self.tokens_per_step = tokens_per_step
        self.max_running = max_running
        self.max_context = max_context
        self.step_s = step_s
        self.calibration: object = None
        self.costs: StepCosts | None = None
        self.crash: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.num_steps = 0
        self.num_polls = 0
        self.drafts: list[object] = []
        self.threads: set[int] = set()
        self.cancelled_ids: list[str] = []
        self.seen: list[EngineRequest] = []
        self._running: dict[str, _Running] = {}
        self._cancelled: list[str] = []

    def submit(self, request: EngineRequest) -> None:
        """See the real engine."""
        total = len(request.prompt_ids) + request.sampling.max_tokens
        if total > self.max_context:
            raise InputError("the request does not fit the context", got=total, expected=f"at most {self.max_context}")
        assert len(self._running) < self.max_running, "the loop must keep the queue"
        self.seen.append(request)
        self._running[request.request_id] = _Running(request, deque(self.script(request)))

    def cancel(self, request_id: str) -> None:
        """See the real engine."""
        self._cancelled.append(request_id)

    def use_costs(self, costs: object) -> list[str]:
        """See the real engine."""
        return ["scripted"]

    def swap_draft(self, draft: object) -> None:
        """See the real engine."""
        self.drafts.append(draft)

    @property
    def has_work(self) -> bool:
        """See the real engine."""
        self.num_polls += 1
        return bool(self._running or self._cancelled)

    def load(self) -> EngineLoad:
        """See the real engine."""
        used = sum(len(r.request.prompt_ids) + r.num_sent for r in self._running.values())
        return EngineLoad(len(self._running), 0, used / (self.max_running * self.max_context), self.tokens_per_step - 1)

    def step(self) -> list[TokenEvent]:
        """See the real engine."""
        self.gate.wait()
        if self.step_s:
            time.sleep(self.step_s)
        self.num_steps += 1
        self.threads.add(threading.get_ident())
        if self.crash is not None:
            raise self.crash
        events = [self._end_cancelled(request_id) for request_id in self._cancelled if request_id in self._running]
        self._cancelled.clear()
        return events + [self._advance(running) for running in list(self._running.values())]

    def _end_cancelled(self, request_id: str) -> TokenEvent:
        self.cancelled_ids.append(request_id)
        stats = self._running.pop(request_id).stats
        return TokenEvent(request_id, (), (), "cancelled", replace(stats))

    def _advance(self, running: _Running) -> TokenEvent:
        sampling = running.request.sampling
        tokens: list[int] = []
        reason: FinishReason | None = None
        while reason is None and len(tokens) < self.tokens_per_step:
            token = running.pending.popleft() if running.pending else END_OF_TEXT
            tokens.append(token)
            running.num_sent += 1
            if token == END_OF_TEXT and not sampling.ignore_eos and running.num_sent > sampling.min_tokens:
                reason = "stop"
            elif running.num_sent >= sampling.max_tokens:
                reason = "length"
        running.stats.record(self.tokens_per_step - 1, len(tokens) - 1, len(tokens))
        if reason is not None:
            del self._running[running.request.request_id]
        stats = replace(running.stats, accepted_histogram=list(running.stats.accepted_histogram))
        # The chosen token, and then the first of the vocabulary.
        others = tuple((other, -1.0 - other) for other in range(sampling.num_top_logprobs - 1))
        top = tuple(((token, -0.5), *others) for token in tokens) if sampling.num_top_logprobs else ()
        return TokenEvent(running.request.request_id, tuple(tokens), tuple(-0.5 for _ in tokens), reason, stats, top)


class ByteText:
    """A tokenizer whose tokens are single bytes and an end token; nothing could split characters worse."""

    vocab_size = VOCAB_SIZE
    max_token_chars = 1

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes."""
        return list(text.encode())

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """``role:content`` lines."""
        return list("".join(f"{m['role']}:{m['content']}\n" for m in messages).encode())

    def decode(self, ids: Sequence[int], /) -> str:
        """Bytes as text; invalid ones as replacement characters."""
        return bytes(i for i in ids if i < END_OF_TEXT).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        """One token, the end token spelled out."""
        return "<end>" if token_id == END_OF_TEXT else self.decode([token_id])
