"""Runs engines here and on the second device, and prints what came of it; the child process of ``test_device``.

A process of its own, since a device once registered cannot be taken back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from draftline.draft.prompt_lookup import PromptLookup
from draftline.engine.engine import Engine
from draftline.engine.requests import EngineRequest, SamplingParams
from draftline.scheduling.policies import FixedPolicy, ThresholdPolicy
from draftline.target.load import Target
from tests.engine.runs import finish, make_engine
from tests.engine.second_device import NAME, second_device
from tests.servers.tiny_target import random_draft, tiny_draft_config, tiny_eagle3_config, toy_target

VOCAB = 40


KINDS = ("none", "dspark", "rnn", "eagle3", "lookup")


def toy(device: str) -> Target:
    target = toy_target(vocab_size=VOCAB)
    target.weights = {name: weight.to(device) for name, weight in target.weights.items()}
    return target


def requests() -> list[EngineRequest]:
    """All laws side by side, greedy ones among them."""
    laws = [
        SamplingParams(12, 0.0, has_logprobs=True, num_top_logprobs=2),
        SamplingParams(9, 1.0, seed=1),
        SamplingParams(15, 0.7, top_k=7, seed=2, has_logprobs=True),
        SamplingParams(11, 1.0, top_p=0.8, seed=3),
        SamplingParams(8, 0.0),
    ]
    return [EngineRequest(str(n), tuple(range(1 + n, 25 + 3 * n)), law) for n, law in enumerate(laws)]


def drafting(target: Target, draft_kind: str) -> Callable[[Engine], None]:
    config = {
        "dspark": tiny_draft_config(target.config),
        "rnn": replace(tiny_draft_config(target.config), markov_head="rnn"),
        "eagle3": tiny_eagle3_config(target.config),
    }
    if draft_kind == "none":
        return lambda engine: None
    if draft_kind == "lookup":
        return lambda engine: engine.swap_proposer(lambda room: PromptLookup(room, 3))
    return lambda engine: engine.swap_draft(random_draft(config[draft_kind], 1))


def tokens(
    target: Target, prepare: Callable[[Engine], None], policy: FixedPolicy | ThresholdPolicy
) -> dict[str, list[int]]:
    engine = make_engine(target, policy=policy, slots=4, context=80, prefill_tokens=20)
    prepare(engine)
    for request in requests():
        engine.submit(request)
    return {name: one.token_ids for name, one in finish(engine).items()}


def compare(kind: str) -> dict[str, object]:
    """Answers here and there, and how often steps there read something back, by the number of requests."""
    policies = (FixedPolicy(), ThresholdPolicy(0.2))
    here = [tokens(target := toy("cpu"), drafting(target, kind), policy) for policy in policies]
    with second_device() as device:
        there = [tokens(target := toy(NAME), drafting(target, kind), policy) for policy in policies]
        reads: dict[int, list[int]] = {}
        for number in (1, 4):
            engine = make_engine(target := toy(NAME), policy=FixedPolicy(), slots=4, context=80)
            drafting(target, kind)(engine)
            for request in requests()[1 : 1 + number]:
                engine.submit(request)
            engine.step()
            for _ in range(3):
                device.reads.clear()
                engine.step()
                reads.setdefault(number, []).append(device.reads.total())
    return {"here": here, "there": there, "reads": sorted({count for counts in reads.values() for count in counts})}


if __name__ == "__main__":
    print(json.dumps({kind: compare(kind) for kind in KINDS}))
