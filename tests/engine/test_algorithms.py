"""DFlash and Eagle3 in the engine: no token changes at temperature 0, and the target's law holds at 1."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from draftline.draft.checkpoint import DraftModel, export_state
from draftline.engine.requests import EngineRequest
from draftline.scheduling.policies import FixedPolicy, ThresholdPolicy
from draftline.target.load import Target
from tests.engine.runs import Answer, answer, greedy, make_engine, questions
from tests.engine.test_law import ALARM, VOCAB, expected, p_value, target
from tests.servers.tiny_target import random_draft, randomised, tiny_draft_config, tiny_eagle3_config

__all__ = ["expected", "target"]  # the law's fixtures


def draft_of(target: Target, algorithm: str) -> DraftModel:
    """A random draft over half the vocabulary that the answers use."""
    config = tiny_eagle3_config(target.config)
    if algorithm == "dflash":
        config = replace(config, ttt_length=0, ttt_decay=0.0)
    assert config.algorithm == algorithm
    return random_draft(config, 4, vocab=torch.arange(1, target.vocab_size, 2))


@pytest.fixture(scope="module")
def requests(loaded_target: Target) -> list[EngineRequest]:
    """Some twice, so that slots are taken over with their prefix."""
    prompts = questions(loaded_target, 6)
    return greedy([*prompts, *prompts[:3]])


@pytest.fixture(scope="module")
def plain(loaded_target: Target, requests: list[EngineRequest]) -> dict[str, Answer]:
    return {r.request_id: answer(make_engine(loaded_target), [r])[r.request_id] for r in requests}


@pytest.mark.parametrize("algorithm", ["dflash", "eagle3"])
@pytest.mark.parametrize(("slots", "prefill_tokens"), [(1, 512), (3, 9), (8, 20)])
@pytest.mark.parametrize("policy", [FixedPolicy(), FixedPolicy(2)])
def test_speculation_changes_no_token(
    loaded_target: Target,
    requests: list[EngineRequest],
    plain: dict[str, Answer],
    algorithm: str,
    slots: int,
    prefill_tokens: int,
    policy: FixedPolicy,
) -> None:
    engine = make_engine(
        loaded_target, draft_of(loaded_target, algorithm), policy, slots=slots, prefill_tokens=prefill_tokens
    )
    found = answer(engine, requests)
    for name, one in found.items():
        assert one.token_ids == plain[name].token_ids
        assert one.logprobs == pytest.approx(plain[name].logprobs, abs=2e-4)
    assert sum(one.stats.num_draft_tokens for one in found.values()) > 0


@pytest.mark.parametrize("algorithm", ["dflash", "eagle3"])
def test_output_follows_the_targets_law(target: Target, expected: NDArray[np.float64], algorithm: str) -> None:
    """A right engine raises the alarm for one choice of seeds in 1,000; the seeds are fixed, so never by chance."""
    config = replace(tiny_eagle3_config(target.config), block_size=2, draft_vocab_size=4)
    if algorithm == "dflash":
        config = replace(config, ttt_length=0, ttt_decay=0.0)
    assert target.vocab_size == VOCAB
    module = randomised(config, 3)
    draft = DraftModel(config, export_state(module, torch.tensor([0, 2, 3, 5])))
    value, verified = p_value(target, draft, FixedPolicy(), expected)
    assert value > ALARM
    assert verified > 1


def test_a_threshold_reads_past_acceptance_where_nothing_predicts_survival(
    loaded_target: Target, requests: list[EngineRequest]
) -> None:
    draft = draft_of(loaded_target, "eagle3")
    by_policy = [
        answer(make_engine(loaded_target, draft, policy, slots=1), requests[:1])["r0"].stats.num_draft_tokens
        for policy in (FixedPolicy(), ThresholdPolicy(0.5))
    ]
    assert by_policy[0] > 0
    assert 0 < by_policy[1] <= by_policy[0]


def test_swapping_to_another_algorithm_keeps_the_output(
    loaded_target: Target, requests: list[EngineRequest], plain: dict[str, Answer]
) -> None:
    engine = make_engine(loaded_target, draft_of(loaded_target, "eagle3"), slots=3)
    answers = answer(engine, requests[:4])
    engine.swap_draft(random_draft(tiny_draft_config(loaded_target.config), 1))
    answers |= answer(engine, requests[4:6])
    engine.swap_draft(draft_of(loaded_target, "eagle3"))
    answers |= answer(engine, requests[6:])
    assert {name: one.token_ids for name, one in answers.items()} == {
        name: one.token_ids for name, one in plain.items()
    }
