"""The draft at serving time: lean, batched, with a KV cache of context features.

Dimension letters: N tokens, R requests, B block size, D hidden, W draft
vocabulary, r Markov rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from draftline.decoding.verify import draw
from draftline.draft.config import DraftConfig
from draftline.draft.model import ConfidenceHead, MarkovHead
from draftline.draft.proposer import ProcessedTokens, Proposal
from draftline.target.batch import Segment
from draftline.target.kv_cache import SlotKVCache
from draftline.target.lean import RotaryTable, attend, rms_norm
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
        self._embedding = embedding_VD
        self.draft_to_target: Tensor | None = None
        head = lm_head_VD
        if config.is_pruned:
            self.draft_to_target = state["d2t"] + torch.arange(config.draft_vocab_size, device=device)
            head = lm_head_VD[self.draft_to_target]
        self._head = PackedLinear(head.to(dtype))
        self._fc = PackedLinear(cast["fc.weight"])
        self._hidden_norm, self._norm = cast["hidden_norm.weight"], cast["norm.weight"]
        self._layers = [_RunnerLayer(config, cast, f"layers.{i}.") for i in range(config.num_layers)]
        self._markov, self._w2, self._confidence = _heads(config, cast, dtype, device)
        self._rotary = RotaryTable(config.head_dim, config.rope_theta, num_positions, dtype, config.rope_scaling)
        self._cache = SlotKVCache(
            config.num_layers, num_slots, num_positions, config.num_kv_heads, config.head_dim, dtype, device
        )
        self._mask_embedding = embedding_VD[config.mask_token_id]

    @property
    def block_size(self) -> int:
        """See :class:`~draftline.draft.proposer.Proposer`."""
        return self.config.block_size

    @property
    def tap_ids(self) -> tuple[int, ...]:
        """See :class:`~draftline.draft.proposer.Proposer`."""
        return self.config.target_layer_ids

    @torch.inference_mode()
    def append(self, tokens: ProcessedTokens) -> None:
        """Add the context features of tokens that the target has processed."""
        config = self.config
        features = self._fc(tokens.taps_NLD.reshape(tokens.taps_NLD.shape[0], -1))
        context = rms_norm(features, self._hidden_norm, config.rms_norm_eps)
        cos, sin = self._rotary.at(tokens.positions_N)
        for i, layer in enumerate(self._layers):
            k, v = layer.keys_values(context, self._rotary, cos, sin)
            self._cache.append(i, tokens.cache_index_N, torch.cat([k, v], 1))

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
        base = self._head(hidden.reshape(rows * block, -1)).view(rows, block, -1)
        is_sampled = any(t > 0 for t in temperatures)
        temperature = torch.tensor(temperatures, device=hidden.device)
        previous_ids = torch.tensor(anchor_ids, device=hidden.device)
        state: Tensor | None = None
        columns, ids, confidences, laws = [], [], [], []
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
            column = logits.argmax(-1)
            if is_sampled and uniforms_RB is not None:
                law = (logits.float() / temperature.clamp(min=1e-6)[:, None]).softmax(-1)
                column = torch.where(temperature > 0, draw(law, uniforms_RB[:, k]), column)
                laws.append(law)
            previous_ids = column if self.draft_to_target is None else self.draft_to_target[column]
            columns.append(column)
            ids.append(previous_ids)
        return Proposal(
            torch.stack(ids, 1),
            torch.stack(columns, 1),
            torch.stack(confidences, 1).float() if confidences else None,
            torch.stack(laws, 1) if laws else None,
        )

    def _backbone(self, slots: Sequence[int], anchor_ids: Sequence[int], starts: Sequence[int]) -> Tensor:
        block, device = self.config.block_size, self._embedding.device
        start = torch.tensor(starts, device=device)
        positions = (start[:, None] + torch.arange(block, device=device)).flatten()
        slot = torch.tensor(slots, device=device)
        index = slot.repeat_interleave(block) * self._cache.num_positions + positions
        x = self._mask_embedding.expand(len(slots), block, -1).clone()
        x[:, 0] = self._embedding[torch.tensor(anchor_ids, device=device)]
        x = x.view(len(slots) * block, -1)
        segment = _block_segment(slots, start, block, self.dtype)
        cos, sin = self._rotary.at(positions)
        for i, layer in enumerate(self._layers):
            x = layer.forward(x, i, self._cache, index, segment, self._rotary, cos, sin)
        return rms_norm(x, self._norm, self.config.rms_norm_eps).view(len(slots), block, -1)


def _block_segment(slots: Sequence[int], start_R: Tensor, block: int, dtype: torch.dtype) -> Segment:
    """Every query of a block sees its context and its whole block: positions below start + block."""
    first = slots[0]
    num_slots = slots[-1] + 1 - first
    length = int(start_R.max()) + block
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


class _RunnerLayer:
    def __init__(self, config: DraftConfig, weights: dict[str, Tensor], prefix: str) -> None:
        self._config = config
        q, k, v = (weights[f"{prefix}self_attn.{kind}_proj.weight"] for kind in "qkv")
        self._qkv = PackedLinear(torch.cat([q, k, v]))
        self._kv = PackedLinear(torch.cat([k, v]))
        self._output = PackedLinear(weights[f"{prefix}self_attn.o_proj.weight"])
        self._gate_up = PackedLinear(
            torch.cat([weights[f"{prefix}mlp.gate_proj.weight"], weights[f"{prefix}mlp.up_proj.weight"]])
        )
        self._down = PackedLinear(weights[f"{prefix}mlp.down_proj.weight"])
        self._q_norm, self._k_norm = (
            weights[f"{prefix}self_attn.q_norm.weight"],
            weights[f"{prefix}self_attn.k_norm.weight"],
        )
        self._attention_norm = weights[f"{prefix}input_layernorm.weight"]
        self._mlp_norm = weights[f"{prefix}post_attention_layernorm.weight"]

    def keys_values(self, context: Tensor, rotary: RotaryTable, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        config = self._config
        kv = self._kv(context).view(context.shape[0], 2 * config.num_kv_heads, config.head_dim)
        k = rms_norm(kv[:, : config.num_kv_heads], self._k_norm, config.rms_norm_eps)
        return rotary.rotate(k, cos, sin), kv[:, config.num_kv_heads :]

    def forward(
        self,
        x: Tensor,
        index: int,
        cache: SlotKVCache,
        cache_index: Tensor,
        segment: Segment,
        rotary: RotaryTable,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        config = self._config
        heads, kv_heads, eps = config.num_heads, config.num_kv_heads, config.rms_norm_eps
        qkv = self._qkv(rms_norm(x, self._attention_norm, eps))
        qkv = qkv.view(x.shape[0], heads + 2 * kv_heads, config.head_dim)
        q = rotary.rotate(rms_norm(qkv[:, :heads], self._q_norm, eps), cos, sin)
        k = rotary.rotate(rms_norm(qkv[:, heads : heads + kv_heads], self._k_norm, eps), cos, sin)
        cache.append(index, cache_index, torch.cat([k, qkv[:, heads + kv_heads :]], 1))
        x = x + self._output(attend(q, cache, index, (segment,)))
        gate_up = self._gate_up(rms_norm(x, self._mlp_norm, eps))
        half = config.intermediate_size
        return x + self._down(functional.silu(gate_up[:, :half]) * gate_up[:, half:])


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
