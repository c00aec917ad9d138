"""Run the frozen target over one token shard and encode what the draft learns from.

A pure function of the shard: the same bytes whoever runs it and however often
it was interrupted. Samples are computed in lexicographic order, so that every
distinct beginning (a desk's fixed system prompt, a prompt with several
answers) is computed once; and what was computed once is stored once.

Dimension letters: T tokens of a sample, N those of them not computed before,
L taps, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftline.cache.hidden import (
    SegmentRows,
    as_stored,
    encode_hidden_states,
    law_positions,
    segment_laws,
    split_samples,
)
from draftline.cache.prefixes import PrefixPlan, plan_prefixes, shared_needs
from draftline.cache.shards import Shard
from draftline.target.batch import Chunk, build_batch
from draftline.target.load import Target

_VOCAB_SLICE = 16384


@torch.inference_mode()
def capture_shard(target: Target, tokens: Shard, tap_ids: Sequence[int], codec: str, *, dedupe: bool = True) -> bytes:
    """Hidden-state shard bytes for a token shard.

    Args:
        target: The frozen target.
        tokens: Decoded token shard.
        tap_ids: Layers to keep, ascending.
        codec: How they are stored, see :data:`draftline.cache.codecs.CODECS`.
        dedupe: Store beginnings that samples share once.

    Returns:
        The shard. The normalisers in it are those of the last hidden states as
        stored: then the law that a reader makes of both sums to one.

    Raises:
        TargetError: the target's numbers are not finite; names the sample.
    """
    ids, masks = split_samples(tokens)
    plan = plan_prefixes(ids, dedupe=dedupe)
    laws = segment_laws(plan, masks)
    owned: dict[int, list[int]] = {}
    for number, segment in enumerate(plan.segments):
        owned.setdefault(segment.sample, []).append(number)
    rows: list[SegmentRows | None] = [None] * len(plan.segments)
    for sample, states in _captured(target, codec, ids, masks, plan, tap_ids):
        for number in owned.get(sample, ()):
            start, end = plan.segments[number].start, plan.segments[number].end
            law = torch.from_numpy(laws[number]).to(states.taps_TLD.device)
            # Copies: a view would keep the whole sample, shared beginning included, in memory.
            rows[number] = SegmentRows(
                states.taps_TLD[start:end].clone(),
                states.hidden_TD[start:end][law],
                states.normaliser_T[start:end][law],
            )
    return encode_hidden_states(tokens, plan, [part for part in rows if part is not None], tap_ids, codec)


@dataclass(frozen=True)
class _States:
    """What the target says of a whole sample; normalisers only where somebody needs them, else 0."""

    hidden_TD: Tensor
    taps_TLD: Tensor
    normaliser_T: Tensor

    def upto(self, end: int) -> _States:
        return _States(self.hidden_TD[:end], self.taps_TLD[:end], self.normaliser_T[:end])

    def followed_by(self, other: _States) -> _States:
        return _States(
            torch.cat([self.hidden_TD, other.hidden_TD]),
            torch.cat([self.taps_TLD, other.taps_TLD]),
            torch.cat([self.normaliser_T, other.normaliser_T]),
        )


def _captured(
    target: Target,
    codec: str,
    ids: Sequence[NDArray[np.int32]],
    masks: Sequence[NDArray[np.bool_]],
    plan: PrefixPlan,
    tap_ids: Sequence[int],
) -> Iterator[tuple[int, _States]]:
    """Every sample with its states, in the plan's order; slot 0 always holds the sample before."""
    model = target.model
    needs = shared_needs(plan, [law_positions(mask) for mask in masks])
    cache = model.new_cache(1, max(len(sample) for sample in ids))
    states: _States | None = None
    for sample, shared, needed in zip(plan.order, plan.shared, needs, strict=True):
        known = None if states is None else states.upto(shared)
        if known is None or shared < len(ids[sample]):
            chunk = Chunk(0, shared, ids[sample][shared:].tolist())
            output = model.forward(build_batch([chunk], cache.num_positions, model.dtype, model.device), cache, tap_ids)
            at = torch.from_numpy(np.flatnonzero(needed[shared:])).to(model.device)
            normaliser_N = torch.zeros(len(output.hidden_ND), device=model.device)
            normaliser_N[at] = _log_normaliser(target, as_stored(output.hidden_ND[at], codec))
            new = _States(output.hidden_ND, output.taps_NLD, normaliser_N)
            known = new if known is None else known.followed_by(new)
        states = known
        yield sample, states


def _log_normaliser(target: Target, hidden_ND: Tensor) -> Tensor:
    """Log-sum-exp of the logits, in fp32 whatever the target's own arithmetic; a slice of the vocabulary at a time."""
    cap = target.config.logit_softcap
    total_N = hidden_ND.new_full((len(hidden_ND),), float("-inf"))
    for part in torch.split(target.lm_head_VD, _VOCAB_SLICE):
        logits = hidden_ND @ part.float().t()
        if cap is not None:
            logits = (logits / cap).tanh() * cap
        total_N = torch.logaddexp(total_N, logits.logsumexp(-1))
    return total_N
