"""The draft's forward over padded samples and dense masks: the plain layout that the packed one must equal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from draftline.draft.model import DraftHidden, DraftInputs, DSparkDraft


def padded_forward(draft: DSparkDraft, inputs: DraftInputs, embedding_VD: Tensor) -> DraftHidden:
    """As the module, but every sample padded to the longest context, and every slot masked over all of it.

    Takes samples with equal numbers of anchors.
    """
    layout, config = inputs.layout, draft.config
    samples = len(layout.anchors_S)
    slots = len(layout.anchors_S[0]) * config.block_size
    length = max(layout.context_lengths_S)
    taps = inputs.taps_CX.new_zeros(samples, length, inputs.taps_CX.shape[1])
    for row, part in enumerate(inputs.taps_CX.split(list(layout.context_lengths_S))):
        taps[row, : len(part)] = part
    mask = torch.full((samples, 1, slots, length + slots), float("-inf"), dtype=taps.dtype)
    for row, anchors in enumerate(layout.anchors_S):
        for slot in range(slots):
            own = length + slot // config.block_size * config.block_size
            mask[row, 0, slot, : anchors[slot // config.block_size]] = 0
            mask[row, 0, slot, own : own + config.block_size] = 0
    context = draft.hidden_norm(functional.linear(taps, draft.fc.weight * draft.feature_scale))
    positions = inputs.positions_M.view(samples, slots)
    x = embedding_VD[inputs.block_ids_M.view(samples, slots)] * config.embedding_scale
    table = draft._rotary.cos_PE.to(taps.dtype), draft._rotary.sin_PE.to(taps.dtype)
    of_slots = tuple(t[positions][:, :, None] for t in table)
    of_keys = tuple(torch.cat([t[:length].expand(samples, -1, -1), t[positions]], 1)[:, :, None] for t in table)
    for layer in draft.layers:
        attention = layer.self_attn
        normed = layer.input_layernorm(x)
        q = attention.queries(normed, of_slots).transpose(1, 2)
        k, v = attention.keys_values(torch.cat([context, normed], 1), of_keys)
        out = functional.scaled_dot_product_attention(
            q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
        )
        x = layer.finish(x, attention.o_proj(out.transpose(1, 2).flatten(2)))
    hidden = draft.norm(x).flatten(0, 1)
    latent = confidence = previous = None
    if draft.markov_head is not None:
        previous = draft.markov_head.markov_w1(inputs.previous_ids_M)
        latent = draft.markov_head(hidden, previous, config.block_size)
    if draft.confidence_head is not None:
        confidence = draft.confidence_head(hidden, previous)
    return DraftHidden(hidden, latent, confidence)
