"""Run the frozen target over one token shard and encode what the draft learns from.

A pure function of the shard: the same bytes whoever runs it and however often
it was interrupted. Samples that begin alike (a desk's fixed system prompt)
share the computation of the beginning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftline.cache.shards import CODEC_DTYPES, Shard, encode_shard
from draftline.engine.slots import common_prefix
from draftline.target.batch import Chunk, build_batch
from draftline.target.kv_cache import SlotKVCache
from draftline.target.lean import LeanModel, TargetOutput
from draftline.target.load import Target


def capture_shard(target: Target, tokens: Shard, tap_ids: Sequence[int], codec: str) -> bytes:
    """Hidden-state shard bytes for a token shard.

    Args:
        target: The frozen target.
        tokens: Decoded token shard.
        tap_ids: Layers to keep, ascending.
        codec: Storage dtype, see :data:`draftline.cache.shards.CODEC_DTYPES`.
    """
    dtype = CODEC_DTYPES[codec]
    cu = tokens.tensors["cu_seqlens"]
    longest = int((cu[1:] - cu[:-1]).max())
    cache = target.model.new_cache(1, longest)
    taps, hidden, normalisers = [], [], []
    previous: tuple[list[int], TargetOutput, Tensor] | None = None
    for index in range(len(tokens.ids)):
        start, end = tokens.bounds(index)
        ids = tokens.tensors["input_ids"][start:end].tolist()
        output, normaliser = _forward(target.model, cache, ids, tap_ids, previous)
        previous = (ids, output, normaliser)
        taps.append(output.taps_NLD.to(dtype))
        hidden.append(output.hidden_ND.to(dtype))
        normalisers.append(normaliser)
    return encode_shard(
        {
            "input_ids": tokens.tensors["input_ids"],
            "loss_mask": tokens.tensors["loss_mask"],
            "cu_seqlens": cu,
            "taps": torch.cat(taps),
            "last_hidden": torch.cat(hidden),
            "log_normaliser": torch.cat(normalisers),
        },
        {
            "kind": "hidden-states",
            "ids": list(tokens.ids),
            "target": target.fingerprint,
            "tap_ids": list(tap_ids),
            "codec": codec,
        },
    )


def _forward(
    model: LeanModel,
    cache: SlotKVCache,
    ids: list[int],
    tap_ids: Sequence[int],
    previous: tuple[list[int], TargetOutput, Tensor] | None,
) -> tuple[TargetOutput, Tensor]:
    """Outputs and log-normalisers of a whole sample; slot 0 still holds the one before."""
    shared = 0
    if previous is not None:
        shared = min(common_prefix(previous[0], ids), len(ids) - 1)
    batch = build_batch([Chunk(0, shared, ids[shared:])], cache.num_positions, model.dtype, model.device)
    output = model.forward(batch, cache, tap_ids)
    normaliser = _log_normaliser(model, output.hidden_ND)
    if previous is None or shared == 0:
        return output, normaliser
    _, before, before_normaliser = previous
    whole = TargetOutput(
        torch.cat([before.hidden_ND[:shared], output.hidden_ND]),
        torch.cat([before.taps_NLD[:shared], output.taps_NLD]),
    )
    return whole, torch.cat([before_normaliser[:shared], normaliser])


def _log_normaliser(model: LeanModel, hidden_ND: Tensor, rows: int = 256) -> Tensor:
    parts = [model.logits(part).float().logsumexp(-1) for part in torch.split(hidden_ND, rows)]
    return torch.cat(parts)
