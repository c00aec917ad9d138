"""Run requests through an engine and gather what came out."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from draftline.draft.checkpoint import DraftModel
from draftline.engine.engine import Engine, EngineLimits
from draftline.engine.requests import EngineRequest, SamplingParams, SpeculationStats, TokenEvent
from draftline.engine.verification import Verdict
from draftline.scheduling.costs import CostTable
from draftline.scheduling.policies import FixedPolicy, LengthPolicy
from draftline.target.load import Target
from tests.servers.tiny_target import grammar_pair

COSTS = CostTable.from_points(
    {(r, r * q): 10.0 + 0.3 * r * q + 0.2 * r for r in (1, 4, 100) for q in (1, 2, 4, 8)}, {1: 0.2, 100: 1.0}
)
"""Drafting is cheap and verifying is not free, so an adaptive policy has something to choose."""


@dataclass
class Answer:
    """Everything that events said of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    def take(self, event: TokenEvent) -> None:
        """Add an event."""
        assert not self.reasons, "an event after the last"
        assert len(event.logprobs) in (0, len(event.token_ids))
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.stats = event.stats
        if event.finish_reason is not None:
            self.reasons.append(event.finish_reason)


def gather(events: Iterable[TokenEvent], answers: dict[str, Answer] | None = None) -> dict[str, Answer]:
    """Answers by request."""
    answers = {} if answers is None else answers
    for event in events:
        answers.setdefault(event.request_id, Answer()).take(event)
    return answers


def check_dense(engine: Engine) -> None:
    """Running requests hold the first slots, in order, and what is recorded of a slot is how its text begins."""
    table = engine._slots
    assert [request.slot for request in table.running] == list(range(len(table.running)))
    for request in table.running:
        text = [*request.request.prompt_ids, *request.output_ids][: request.num_processed]
        history = table._history[request.slot]
        assert history == text[: len(history)]


def finish(engine: Engine, answers: dict[str, Answer] | None = None) -> dict[str, Answer]:
    """Step until nothing is left."""
    answers = {} if answers is None else answers
    while engine.has_work:
        gather(engine.step(), answers)
        check_dense(engine)
    return answers


def make_engine(
    target: Target,
    draft: DraftModel | None = None,
    policy: LengthPolicy | None = None,
    *,
    slots: int = 1,
    context: int = 160,
    prefill_tokens: int = 512,
    costs: CostTable = COSTS,
) -> Engine:
    """A fresh engine; verifies whole blocks when there is a draft and no policy.

    Its costs are told, not measured: a tiny target is no dearer than its draft, so nothing would be drafted.
    """
    policy = policy or (FixedPolicy() if draft is not None else None)
    engine = Engine(target, EngineLimits(slots, context, prefill_tokens), policy, costs=costs)
    if draft is not None:
        engine.swap_draft(draft)
    return engine


def answer(engine: Engine, requests: Sequence[EngineRequest]) -> dict[str, Answer]:
    """Submit all at once and finish."""
    for request in requests:
        engine.submit(request)
    return finish(engine)


def questions(target: Target, count: int, *, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of very different lengths: bare words, questions, conversations."""
    source = random.Random(seed)
    prompts = []
    for number in range(count):
        messages = []
        for _ in range(number % 3):
            asked, said = grammar_pair(source)
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        messages.append({"role": "user", "content": grammar_pair(source)[0]})
        ids = target.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        prompts.append(tuple(ids[-5:] if number % 4 == 3 else ids))
    return prompts


def greedy(prompts: Sequence[tuple[int, ...]], max_tokens: int = 30, **sampling: object) -> list[EngineRequest]:
    """Greedy requests that run to their length."""
    params = SamplingParams(max_tokens, temperature=0.0, ignore_eos=True, has_logprobs=True)
    return [
        EngineRequest(f"r{number}", prompt, SamplingParams(**{**vars(params), **sampling}))  # type: ignore[arg-type]
        for number, prompt in enumerate(prompts)
    ]


def one_too_many(verdict: Verdict, drafted: list[int]) -> Verdict:
    """What a verification says that accepts the first wrong draft too."""
    count = verdict.num_accepted + 1
    if count > len(drafted):
        return verdict
    return replace(verdict, num_accepted=count, token_ids=[*drafted[:count], verdict.token_ids[-1]])
