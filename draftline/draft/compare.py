"""Run two drafts on the same random inputs and say how far apart they are.

Dimension letters: V target vocabulary, W draft vocabulary, D hidden, L taps,
T tokens, R requests, B block size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draftline.draft.dialects.model import DraftModel, draft_columns
from draftline.draft.proposer import EngineRoom, ProcessedTokens
from draftline.draft.serve import proposer_between
from draftline.draft.serving_vocabulary import TargetEnds

NUM_REQUESTS, NUM_TOKENS, MAX_COLUMNS = 2, 24, 2048


@dataclass(frozen=True)
class DraftDifference:
    """How two drafts differ.

    Attributes:
        tensors: Names of tensors that are missing on one side, or differ in type, shape or any bit.
        logits: Greatest absolute difference of log-probabilities; infinite if the two draft different blocks.
        confidence: The same of confidence logits; ``None`` without the head.
    """

    tensors: tuple[str, ...]
    logits: float
    confidence: float | None

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs at all."""
        return not self.tensors and self.logits == 0 and not self.confidence


@torch.inference_mode()
def compare_drafts(one: DraftModel, other: DraftModel, *, seed: int = 0) -> DraftDifference:
    """Compare all tensors bit by bit, then what the two propose after random features.

    The forward runs in fp32 through the serving runner, each draft by its own
    config. Of a large vocabulary the first 2,048 draft columns take part: the
    others' tensors have been compared already.
    """
    tensors = _differing_tensors(one, other)
    first, second = _propose(one, seed), _propose(other, seed)
    if first[0].shape != second[0].shape:
        return DraftDifference(tensors, float("inf"), None if first[1] is None else float("inf"))
    logits = float((first[0] - second[0]).abs().max())
    if first[1] is None or second[1] is None:
        return DraftDifference(tensors, logits, None if first[1] is second[1] else float("inf"))
    return DraftDifference(tensors, logits, float((first[1] - second[1]).abs().max()))


def _differing_tensors(one: DraftModel, other: DraftModel) -> tuple[str, ...]:
    left, right = {**one.weights, **one.frozen}, {**other.weights, **other.frozen}
    names = left.keys() | right.keys()
    return tuple(sorted(name for name in names if not _is_same(left.get(name), right.get(name))))


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    # As bytes: NaN equals itself, and 0.0 is not -0.0.
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))


def _propose(model: DraftModel, seed: int) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities ``[R, B, W]`` and confidence logits ``[R, B]``."""
    small = _with_few_columns(model)
    config = small.config
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
    lm_head = torch.randn(config.vocab_size, config.hidden_size, generator=generator) * config.hidden_size**-0.5
    num_positions = NUM_TOKENS + config.block_size
    room = EngineRoom(NUM_REQUESTS, num_positions)
    runner = proposer_between(small, TargetEnds(embedding, lm_head), torch.float32, room)
    lengths = [NUM_TOKENS - 5, NUM_TOKENS]
    for slot, length in enumerate(lengths):
        positions = torch.arange(length)
        taps = torch.randn(length, len(config.target_layer_ids), config.hidden_size, generator=generator)
        ids = torch.randint(0, config.vocab_size, (length,), generator=generator)
        runner.append(ProcessedTokens(ids, positions, slot * num_positions + positions, taps))
    uniforms = torch.rand(NUM_REQUESTS, config.block_size, generator=generator, dtype=torch.float64)
    anchors = torch.randint(0, config.vocab_size, (NUM_REQUESTS,), generator=generator).tolist()
    proposal = runner.propose(range(NUM_REQUESTS), anchors, lengths, [1.0] * NUM_REQUESTS, uniforms)
    assert proposal.law_RBW is not None
    return proposal.law_RBW.log(), proposal.confidence_RB


def _with_few_columns(model: DraftModel) -> DraftModel:
    """The draft of a target whose whole vocabulary is the first draft columns, in fp32."""
    config = model.config
    weights = {name: value.float() for name, value in model.weights.items() if name not in ("d2t", "t2d")}
    columns = draft_columns(config, model.weights)
    kept = (torch.arange(config.vocab_size) if columns is None else columns)[:MAX_COLUMNS]
    for name in ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight"):
        if name in weights:
            weights[name] = weights[name][kept if name.endswith("w1.weight") else slice(len(kept))]
    size = len(kept)
    mask_id = min(config.mask_token_id, size - 1)
    return DraftModel(replace(config, vocab_size=size, draft_vocab_size=size, mask_token_id=mask_id), weights)
