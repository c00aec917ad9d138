"""Answer one shard of prompts with the target itself, turn by turn.

A pure function of the shard: all its conversations are decoded together from
a fresh engine, so neither other shards nor an interruption can change a
token. Token ids are kept as they came, never re-tokenised.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from draftline.engine.build import run_to_completion
from draftline.engine.engine import Engine, EngineLimits
from draftline.engine.requests import EngineRequest, SamplingParams
from draftline.responses.plan import Conversation
from draftline.spec import ResponsesSpec
from draftline.target.chat import chat_ids
from draftline.target.load import Target

_TEMPLATE_TOKENS = 16
"""Room for what a chat template puts around one answer."""


@dataclass
class _Progressing:
    conversation: Conversation
    messages: list[dict[str, str]]
    turns: list[dict[str, Any]] = field(default_factory=list)


def prompt_ids(target: Target, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
    """Messages as the target reads them; see :func:`draftline.target.chat.chat_ids`."""
    return chat_ids(target.tokenizer, messages, enable_thinking=target.enable_thinking)


def answer_shard(
    target: Target,
    spec: ResponsesSpec,
    seed: int,
    conversations: Sequence[Conversation],
    max_context: int,
    on_progress: Callable[[float], None] = lambda turns: None,
) -> bytes:
    """JSON lines with every conversation's answers.

    Args:
        target: The model that answers.
        spec: Sampling and lengths.
        seed: Of the run; each request derives its own from it and its id.
        conversations: The shard.
        max_context: Turns whose prompt leaves no room for an answer are dropped,
            and so are those after them.
        on_progress: Called with the number of finished turns (fractions count
            tokens).
    """
    states = [_Progressing(c, _opening(c)) for c in conversations]
    needed = max(_longest(target, spec, conversation) for conversation in conversations)
    engine = Engine(target, EngineLimits(len(states), min(max_context, needed)))
    finished_turns = 0
    for turn in range(max(len(c.turns) for c in conversations)):
        requests: dict[str, tuple[_Progressing, EngineRequest]] = {}
        for state in states:
            conversation = state.conversation
            if turn >= len(conversation.turns) or len(state.turns) < turn:
                finished_turns += turn < len(conversation.turns)
                continue
            state.messages.append({"role": "user", "content": conversation.turns[turn]})
            ids = prompt_ids(target, state.messages)
            if len(ids) + spec.max_new_tokens > max_context:
                state.messages.pop()  # a question that nobody answers is no part of the conversation
                finished_turns += 1
                continue
            request_id = f"{conversation.sample_id}#{turn}"
            sampling = _sampling(spec, seed, request_id, conversation)
            requests[request_id] = (state, EngineRequest(request_id, ids, sampling))
        _answer_turn(engine, requests, spec, partial(_shifted, on_progress, finished_turns))
        finished_turns += len(requests)
        for state, _ in requests.values():
            answer = state.turns[-1]["response_ids"]
            text = str(target.tokenizer.decode(answer, skip_special_tokens=True))
            state.messages.append({"role": "assistant", "content": text})
    return "".join(json.dumps(_record(s), sort_keys=True, ensure_ascii=False) + "\n" for s in states).encode()


def _answer_turn(
    engine: Engine,
    requests: dict[str, tuple[_Progressing, EngineRequest]],
    spec: ResponsesSpec,
    on_progress: Callable[[float], None],
) -> None:
    answers: dict[str, list[int]] = {name: [] for name in requests}
    done = 0.0
    for event in run_to_completion(engine, [request for _, request in requests.values()]):
        answer = answers[event.request_id]
        done += len(event.token_ids) / spec.max_new_tokens
        answer.extend(event.token_ids)
        if event.finish_reason is not None:
            done += 1 - len(answer) / spec.max_new_tokens
            state, request = requests[event.request_id]
            state.turns.append(
                {
                    "prompt_ids": list(request.prompt_ids),
                    "response_ids": answer,
                    "finish_reason": event.finish_reason,
                }
            )
        on_progress(done)


def _longest(target: Target, spec: ResponsesSpec, conversation: Conversation) -> int:
    """About the tokens that a conversation will have at most; the cache is sized by it, not by the model's limit."""
    opening = _opening(conversation)
    asked = [len(prompt_ids(target, [*opening, {"role": "user", "content": turn}])) for turn in conversation.turns]
    return sum(asked) + len(asked) * (spec.max_new_tokens + _TEMPLATE_TOKENS)


def _shifted(report: Callable[[float], None], before: float, done: float) -> None:
    report(before + done)


def _opening(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": "system", "content": conversation.system}] if conversation.system else []


def _sampling(spec: ResponsesSpec, seed: int, request_id: str, conversation: Conversation) -> SamplingParams:
    own_seed = zlib.crc32(request_id.encode(), seed)
    if conversation.is_greedy:
        return SamplingParams(spec.max_new_tokens, temperature=0.0, seed=own_seed)
    law = spec.sampling
    return SamplingParams(spec.max_new_tokens, law.temperature, law.top_p, law.top_k, seed=own_seed)


def _record(state: _Progressing) -> dict[str, Any]:
    conversation = state.conversation
    return {
        "id": conversation.sample_id,
        "domain": conversation.domain,
        "split": conversation.split,
        "messages": state.messages,
        "turns": state.turns,
    }
