"""The draft at serving time: lean, batched, with a KV cache of context features.

Dimension letters: N tokens, R requests, B block size, D hidden, W draft
vocabulary, r Markov rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftline.draft.config import DraftConfig
from draftline.draft.heads import ConfidenceHead, MarkovHead
from draftline.draft.proposer import ProcessedTokens, Proposal
from draftline.draft.serving_layer import ServingLayer, ServingNorm
from draftline.draft.serving_vocabulary import Picker, ServingVocabulary, TargetEnds
from draftline.target.batch import Segment
from draftline.target.kv_cache import SlotKVCache
from draftline.target.lean import RotaryTable, attend
from draftline.target.linear import PackedLinear


class DraftRunner:
    """Proposes blocks; owns the context features of every slot.

    Args:
        config: Architecture.
        weights: Exported state dict (``feature_scale`` folded), fp32 or bf16,
            including ``d2t`` offsets when the vocabulary is pruned.
        embedding_VD: The target's input embeddings.
        lm_head_VD: The target's LM head.
        dtype: Arithmetic.
        num_slots: Slots of the engine.
        num_positions: Positions of a slot, block included.
    """

    def __init__(
        self,
        config: DraftConfig,
        weights: dict[str, Tensor],
        embedding_VD: Tensor,
        lm_head_VD: Tensor,
        dtype: torch.dtype,
        num_slots: int,
        num_positions: int,
    ) -> None:
        self.config = config
        self.dtype = dtype
        device = embedding_VD.device
        state = {name: value.to(device) for name, value in weights.items()}
        cast = {name: value.to(dtype) for name, value in state.items() if value.is_floating_point()}
        self._vocabulary = ServingVocabulary(config, state, TargetEnds(embedding_VD, lm_head_VD), dtype)
        self._device = device
        self._fc = PackedLinear(cast["fc.weight"])
        self._hidden_norm = ServingNorm(config, cast["hidden_norm.weight"])
        self._norm = ServingNorm(config, cast["norm.weight"])
        self._layers = [ServingLayer(config, cast, f"layers.{i}.") for i in range(config.num_layers)]
        self._markov, self._w2, self._confidence = _heads(config, cast, dtype, device)
        self._rotary = RotaryTable(config.head_dim, config.rope_theta, num_positions, dtype, config.rope_scaling)
        self._cache = SlotKVCache(
            config.num_layers, num_slots, num_positions, config.num_kv_heads, config.head_dim, dtype, device
        )
        self._mask_embedding = self._vocabulary.embed(torch.tensor(config.mask_token_id, device=device))

    @property
    def block_size(self) -> int:
        """See :class:`~draftline.draft.proposer.Proposer`."""
        return self.config.block_size

    @property
    def tap_ids(self) -> tuple[int, ...]:
        """See :class:`~draftline.draft.proposer.Proposer`."""
        return self.config.target_layer_ids

    @property
    def draft_to_target(self) -> Tensor | None:
        """See :class:`~draftline.draft.proposer.Proposer`."""
        return self._vocabulary.draft_to_target

    @torch.inference_mode()
    def append(self, tokens: ProcessedTokens) -> None:
        """Add the context features of tokens that the target has processed."""
        context = self._hidden_norm(self._fc(tokens.taps_NLD.reshape(tokens.taps_NLD.shape[0], -1)))
        rotary = self._rotary.at(tokens.positions_N)
        for i, layer in enumerate(self._layers):
            self._cache.append(i, tokens.cache_index_N, layer.keys_values(context, rotary))

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy a slot's first ``length`` features over another slot's."""
        self._cache.move(source, destination, length)

    @torch.inference_mode()
    def propose(
        self,
        slots: Sequence[int],
        anchor_ids: Sequence[int],
        starts: Sequence[int],
        temperatures: Sequence[float],
        uniforms_RB: Tensor | None,
    ) -> Proposal:
        """See :meth:`draftline.draft.proposer.Proposer.propose`."""
        hidden = self._backbone(slots, anchor_ids, starts)
        rows, block = len(slots), self.config.block_size
        base = self._vocabulary.logits(hidden.reshape(rows * block, -1)).view(rows, block, -1)
        picker = Picker(temperatures, uniforms_RB, hidden.device)
        previous_ids = torch.tensor(anchor_ids, device=hidden.device)
        state: Tensor | None = None
        columns, ids, confidences = [], [], []
        for k in range(block):
            logits = base[:, k]
            if self._markov is not None and self._w2 is not None:
                previous = self._markov.markov_w1(previous_ids)
                latent, state = self._markov.step(hidden[:, k], previous, state)
                logits = logits + self._w2(latent)
                if self._confidence is not None:
                    confidences.append(self._confidence(hidden[:, k], previous))
            elif self._confidence is not None:
                confidences.append(self._confidence(hidden[:, k], None))
            columns.append(picker.pick(logits, k))
            previous_ids = self._vocabulary.ids_of(columns[-1])
            ids.append(previous_ids)
        return Proposal(
            torch.stack(ids, 1),
            torch.stack(columns, 1),
            torch.stack(confidences, 1).float() if confidences else None,
            picker.laws(),
        )

    def _backbone(self, slots: Sequence[int], anchor_ids: Sequence[int], starts: Sequence[int]) -> Tensor:
        block, device = self.config.block_size, self._device
        start = torch.tensor(starts, device=device)
        positions = (start[:, None] + torch.arange(block, device=device)).flatten()
        slot = torch.tensor(slots, device=device)
        index = slot.repeat_interleave(block) * self._cache.num_positions + positions
        x = self._mask_embedding.expand(len(slots), block, -1).clone()
        x[:, 0] = self._vocabulary.embed(torch.tensor(anchor_ids, device=device))
        x = x.view(len(slots) * block, -1)
        segment = block_segment(slots, start, max(starts) + block, block, self.dtype)
        rotary = self._rotary.at(positions)
        for i, layer in enumerate(self._layers):
            queries, keys_values = layer.queries_keys_values(layer.input_norm(x), rotary)
            self._cache.append(i, index, keys_values)
            x = layer.finish(x, attend(queries, self._cache, i, (segment,)))
        return self._norm(x).view(len(slots), block, -1)


def block_segment(slots: Sequence[int], start_R: Tensor, length: int, block: int, dtype: torch.dtype) -> Segment:
    """Every query of a block sees its context and its whole block: positions below start + block.

    Args:
        slots: Of the requests, ascending.
        start_R: First position of each block.
        length: The largest of them and a block; given, because reading it from the tensor would wait for the device.
        block: Queries of a request.
        dtype: Of the mask.
    """
    first = slots[0]
    num_slots = slots[-1] + 1 - first
    row = torch.tensor(slots, device=start_R.device) - first
    visible = torch.ones(num_slots, dtype=torch.long, device=start_R.device)
    visible[row] = start_R + block
    gather = torch.zeros(num_slots, block, dtype=torch.long, device=start_R.device)
    tokens = torch.arange(len(slots) * block, device=start_R.device)
    gather[row] = tokens.view(len(slots), block)
    scatter = (row[:, None] * block + torch.arange(block, device=start_R.device)).flatten()
    hidden = torch.arange(length, device=start_R.device)[None, :] >= visible[:, None]
    mask = torch.zeros(num_slots, length, dtype=dtype, device=start_R.device).masked_fill_(hidden, float("-inf"))
    return Segment(first, num_slots, length, gather, scatter, tokens, mask[:, None, None].expand(-1, 1, block, -1))


def _heads(
    config: DraftConfig, weights: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[MarkovHead | None, PackedLinear | None, ConfidenceHead | None]:
    markov: MarkovHead | None = None
    w2: PackedLinear | None = None
    confidence: ConfidenceHead | None = None
    if config.markov_rank:
        markov = MarkovHead(config).to(device, dtype).eval()
        markov.load_state_dict(_below(weights, "markov_head."))
        w2 = PackedLinear(weights["markov_head.markov_w2.weight"])
    if config.enable_confidence_head:
        confidence = ConfidenceHead(config).to(device, dtype).eval()
        confidence.load_state_dict(_below(weights, "confidence_head."))
    return markov, w2, confidence


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
