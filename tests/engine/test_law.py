"""At temperature 1 the engine's output follows the target's law exactly; a peeking policy is caught.

The target has six tokens, so the joint law of two of them is computed exactly.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare

from draftline.draft.checkpoint import DraftModel, export_state
from draftline.engine.requests import EngineRequest, SamplingParams
from draftline.scheduling.costs import CostTable
from draftline.scheduling.policies import AsyncPolicy, FixedPolicy, LengthPolicy, StepView, SyncPolicy, ThresholdPolicy
from draftline.target.batch import Chunk, build_batch
from draftline.target.load import Target
from tests.engine.runs import answer, make_engine
from tests.servers.tiny_target import random_module, tiny_draft_config, toy_target

VOCAB = 6
PROMPT = (1, 4, 2)
NUM_REQUESTS = 1200
ALARM = 1e-3
DEAR = CostTable.from_points({(r, r * q): 40.0 + 0.3 * r * q for r in (1, 100) for q in (1, 2, 3)}, {1: 0.2, 100: 0.4})
"""A draft token costs so much that a scheduler has to choose among them."""


@pytest.fixture(scope="module")
def target() -> Target:
    return toy_target(vocab_size=VOCAB, spread=0.7, seed=2)


@pytest.fixture(scope="module")
def draft(target: Target) -> DraftModel:
    """Random, pruned to four of the six tokens, and sure of itself in a way that gives its second draft away."""
    config = replace(tiny_draft_config(target.config), block_size=2, draft_vocab_size=4)
    module = random_module(config, 3)
    assert module.confidence_head is not None
    with torch.no_grad():
        module.confidence_head.proj.weight.mul_(4.0)
    return DraftModel(config, export_state(module, torch.tensor([0, 2, 3, 5])))


@pytest.fixture(scope="module")
def expected(target: Target) -> NDArray[np.float64]:
    """P(second, third output token), exactly: the first is drawn plainly and summed over."""
    model = target.model
    prompts = [(*PROMPT, a, b) for a in range(VOCAB) for b in range(VOCAB)]
    cache = model.new_cache(len(prompts), 8)
    batch = build_batch([Chunk(i, 0, p) for i, p in enumerate(prompts)], 8, torch.float32)
    laws = model.logits(model.forward(batch, cache).hidden_ND).double().softmax(-1).view(VOCAB, VOCAB, 5, VOCAB)
    first, second, third = laws[0, 0, 2], laws[:, 0, 3], laws[:, :, 4]
    joint: NDArray[np.float64] = torch.einsum("a,ab,abc->bc", first, second, third).numpy()
    return joint


def p_value(
    target: Target, draft: DraftModel, policy: LengthPolicy, expected: NDArray[np.float64]
) -> tuple[float, float]:
    """Chi-square over 36 cells, and the mean number of verified drafts a step."""
    assert expected.min() * NUM_REQUESTS > 5, "the chi-square approximation needs fuller cells"
    engine = make_engine(target, draft, policy, slots=100, context=16, costs=DEAR)
    # Five tokens, so that the block of two is whole at the second and at the third.
    requests = [EngineRequest(str(i), PROMPT, SamplingParams(5, 1.0, seed=i)) for i in range(NUM_REQUESTS)]
    answers = answer(engine, requests)
    counts = np.zeros((VOCAB, VOCAB))
    for one in answers.values():
        counts[one.token_ids[1], one.token_ids[2]] += 1
    verified = sum(one.stats.num_draft_tokens for one in answers.values())
    steps = sum(one.stats.num_steps for one in answers.values())
    return float(chisquare(counts.ravel(), expected.ravel() * NUM_REQUESTS).pvalue), verified / steps


@pytest.mark.parametrize("policy", [FixedPolicy(), FixedPolicy(1), ThresholdPolicy(0.4), SyncPolicy(), AsyncPolicy()])
def test_output_follows_the_targets_law(
    target: Target, draft: DraftModel, policy: LengthPolicy, expected: NDArray[np.float64]
) -> None:
    """A right engine raises each alarm for one choice of seeds in 1,000; the seeds are fixed, so never by chance."""
    value, verified = p_value(target, draft, policy, expected)
    assert value > ALARM
    if not isinstance(policy, FixedPolicy):
        assert 0.3 < verified < 1.6, "the policy chose nothing"


class PeekingPolicy:
    """Verifies the first draft only when the confidence *after* it looks good, which has seen that very draft."""

    wants_draft = True
    is_adaptive = False

    def lengths(self, view: StepView) -> NDArray[np.int64]:
        after = view.predicted_MB[:, 1] / view.predicted_MB[:, 0]
        return np.where(after > 0.5, view.caps_M, 0)


def test_a_policy_that_peeks_is_noticed(target: Target, draft: DraftModel, expected: NDArray[np.float64]) -> None:
    """The control: a retrospective choice of length biases the output, and this test sees it."""
    value, verified = p_value(target, draft, PeekingPolicy(), expected)
    assert 0.2 < verified < 1.7
    assert value < 1e-9


class RetrospectivePolicy:
    """The biased scheduler of the paper's appendix A: the best length by what a request's *own* draws show."""

    wants_draft = True
    is_adaptive = False

    def lengths(self, view: StepView) -> NDArray[np.int64]:
        gain_MB = np.concatenate((np.ones((len(view.caps_M), 1)), view.predicted_MB), axis=1).cumsum(axis=1)
        # One draft never pays, two do if the second looks good.
        best: NDArray[np.int64] = (gain_MB[:, :3] * np.array([1.0, 0.4, 0.55])).argmax(axis=1)
        return best


def test_the_retrospective_scheduler_is_noticed(
    target: Target, draft: DraftModel, expected: NDArray[np.float64]
) -> None:
    """The control that the paper gives, in the engine itself."""
    value, verified = p_value(target, draft, RetrospectivePolicy(), expected)
    assert 0.1 < verified < 1.9
    assert value < ALARM
