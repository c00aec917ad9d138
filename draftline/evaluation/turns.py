"""Answer prompts turn by turn on one engine, the earlier answers being the target's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from draftline.engine.engine import Engine
from draftline.engine.requests import EngineRequest, SamplingParams, SpeculationStats
from draftline.evaluation.prompt import SuitePrompt
from draftline.responses.generate import prompt_ids
from draftline.target.load import Target

_TEMPLATE_TOKENS = 16
"""Room for what a chat template puts around one answer."""
_TURN_SEEDS = 1_000_003
"""Apart from each other, so that turns of different prompts do not share a seed."""

Message = tuple[str, str]
"""Role and content."""


@dataclass(frozen=True)
class EvaluationPrompt:
    """A tokenised prompt.

    Attributes:
        id: Unique among those measured together.
        domain: Label for the report.
        ids: The first turn through the chat template, ready for the answer.
        opening: Its messages; only needed where turns follow.
        follow_ups: Later user turns.
    """

    id: str
    domain: str
    ids: tuple[int, ...]
    opening: tuple[Message, ...] = ()
    follow_ups: tuple[str, ...] = ()

    @property
    def num_turns(self) -> int:
        """User turns, the first included."""
        return 1 + len(self.follow_ups)


@dataclass(frozen=True)
class Decoding:
    """How prompts are decoded.

    Attributes:
        max_new_tokens: Per turn.
        temperature: 0 is greedy.
        seed: Of the first prompt; each derives its own.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0

    def request(self, request_id: str, ids: tuple[int, ...], number: int, turn: int = 0) -> EngineRequest:
        """The request of one turn of the prompt at place ``number``."""
        seed = self.seed + number + _TURN_SEEDS * turn
        return EngineRequest(request_id, ids, SamplingParams(self.max_new_tokens, self.temperature, seed=seed))


@dataclass(frozen=True)
class AnsweredTurn:
    """One turn as it was answered.

    Attributes:
        prompt: Whose.
        number: Place of the prompt among those decoded together.
        turn: 0-based.
        request_id: Names its steps in the engine's traces.
        ids: What was asked, earlier turns and answers included.
        answer: Tokens of the answer.
        stats: Counters of its decoding.
    """

    prompt: EvaluationPrompt
    number: int
    turn: int
    request_id: str
    ids: tuple[int, ...]
    answer: tuple[int, ...]
    stats: SpeculationStats

    @property
    def label(self) -> str:
        """For people: the prompt's id, and the turn where it is not the first."""
        return self.prompt.id if self.turn == 0 else f"{self.prompt.id}, turn {self.turn + 1}"

    def as_prompt(self) -> EvaluationPrompt:
        """The turn as a prompt of its own, its past fixed."""
        return EvaluationPrompt(self.label, self.prompt.domain, self.ids)


def tokenised(target: Target, prompt: SuitePrompt) -> EvaluationPrompt:
    """A suite's prompt through the target's chat template."""
    opening: list[Message] = [("system", prompt.system)] if prompt.system else []
    opening.append(("user", prompt.turns[0]))
    return EvaluationPrompt(
        prompt.id, prompt.domain, prompt_ids(target, _messages(opening)), tuple(opening), prompt.turns[1:]
    )


def context_for(target: Target, prompts: Sequence[EvaluationPrompt], max_new_tokens: int, limit: int) -> int:
    """Context that holds every prompt with all its turns and answers, at most ``limit``."""
    longest = 0
    for prompt in prompts:
        asked = [len(prompt_ids(target, _messages([("user", turn)]))) for turn in prompt.follow_ups]
        room = sum(asked) + len(asked) * (max_new_tokens + _TEMPLATE_TOKENS)
        longest = max(longest, len(prompt.ids) + max_new_tokens + room)
    return min(longest, limit)


def answer_turns(
    engine: Engine, target: Target, prompts: Sequence[EvaluationPrompt], decoding: Decoding, context: int
) -> Iterator[AnsweredTurn]:
    """Decode all turns of all prompts together, yielding each when it is answered.

    A later turn is asked as soon as the one before is answered. One that does
    not fit the context is left out, and so are those after it.

    Args:
        engine: Idle.
        target: Its tokenizer writes answers into the next turn's prompt.
        prompts: With distinct ids.
        decoding: Law and lengths.
        context: The engine's.
    """
    asked: dict[str, tuple[int, int, tuple[int, ...], tuple[Message, ...]]] = {}
    answers: dict[str, list[int]] = {}

    def ask(number: int, turn: int, ids: tuple[int, ...], messages: tuple[Message, ...]) -> None:
        # No id of a file holds a line feed, so a later turn cannot be taken for another prompt.
        request_id = prompts[number].id if turn == 0 else f"{prompts[number].id}\n{turn}"
        asked[request_id], answers[request_id] = (number, turn, ids, messages), []
        engine.submit(decoding.request(request_id, ids, number, turn))

    for number, prompt in enumerate(prompts):
        ask(number, 0, prompt.ids, prompt.opening)
    while engine.has_work:
        for event in engine.step():
            answers[event.request_id].extend(event.token_ids)
            if event.finish_reason is None:
                continue
            number, turn, ids, messages = asked.pop(event.request_id)
            prompt, answer = prompts[number], tuple(answers.pop(event.request_id))
            yield AnsweredTurn(prompt, number, turn, event.request_id, ids, answer, event.stats)
            if turn < len(prompt.follow_ups):
                said = ("assistant", answer_text(target, answer))
                messages = (*messages, said, ("user", prompt.follow_ups[turn]))
                ids = prompt_ids(target, _messages(messages))
                if len(ids) + decoding.max_new_tokens <= context:
                    ask(number, turn + 1, ids, messages)


def answer_text(target: Target, ids: Sequence[int]) -> str:
    """Text of an answer without special tokens and without a character cut in two at its end."""
    return str(target.tokenizer.decode(list(ids), skip_special_tokens=True)).rstrip("\ufffd")


def _messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]
