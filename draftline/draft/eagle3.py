"""The Eagle3 draft as a trainable module: one layer that drafts token after token from its own hidden state.

Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language
Models via Training-Time Test", arXiv 2503.01840; layout and names are
DeepSpec's (``modeling/eagle3``).

A *row* t pairs the target's feature of position t with the token at t + 1 and
stands at position t; it predicts the token at t + 2. A chain starts at an
anchor a, the last known token, with row a - 1, whose causal context are the
rows before it. Step k >= 1 feeds the layer's output back in place of a feature
the target has not made yet, together with the token at a + k, at position
a - 1 + k; besides the context it sees its own chain. Training does the same
with the true tokens (training-time test), so steps are trained on the hidden
states that they will meet.

DeepSpec runs every position of a sequence as an anchor. As the layer is alone,
keys and values of a row depend on nothing but its inputs, so the chain of an
anchor is the same whether or not others are computed: anchors can be drawn.

Dimension letters: S samples of a step, C context rows (padded), A anchors a
sample, B steps of a chain, J own rows so far, D hidden, H query heads, K key
heads, G = H / K, E head size, L taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from draftline.draft.config import DraftConfig
from draftline.draft.layers import AttentionParts, LayerParts, RMSNorm, Rotary
from draftline.target.lean import RotaryTable


@dataclass(frozen=True)
class ChainInputs:
    """One training step's inputs (teacher forced).

    Attributes:
        taps_SCX: Features ``[S, C, L * D]``, zero where padded.
        next_ids_SC: The token after every one of them.
        anchors_SA: Positions of the anchors, from 1 to C.
        chain_ids_SAB: Input token of every step: the anchor, then the true tokens after it.
    """

    taps_SCX: Tensor
    next_ids_SC: Tensor
    anchors_SA: Tensor
    chain_ids_SAB: Tensor


class Eagle3Draft(nn.Module):
    """Projection of the taps, one decoder layer, final norm.

    ``embed_tokens`` and ``lm_head`` belong to the target and are given, not
    learned. ``feature_scale`` standardises the taps during training; it is
    folded into ``fc`` on export.

    Args:
        config: Architecture.
        max_positions: Longest sequence and chain, for the rotary table.
    """

    feature_scale: Tensor

    def __init__(self, config: DraftConfig, max_positions: int) -> None:
        super().__init__()
        self.config = config
        num_features = len(config.target_layer_ids) * config.hidden_size
        self.fc = nn.Linear(num_features, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([ChainLayer(config)])
        self.norm = RMSNorm(config.hidden_size, config)
        self.register_buffer("feature_scale", torch.ones(num_features))
        self._rotary = RotaryTable(
            config.head_dim, config.rope_theta, max_positions, torch.float32, config.rope_scaling
        )

    def initialise(self, generator: torch.Generator, target_norm_D: Tensor) -> None:
        """Draw the weights: normal with the fan-in's scale; the final norm starts as the target's.

        Args:
            generator: Of all randomness.
            target_norm_D: What the target's final norm multiplies by.
        """
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        self.norm.start_from(target_norm_D)

    def forward(self, inputs: ChainInputs, embedding_VD: Tensor) -> Tensor:
        """``[S, A, B, D]``: every step's hidden state after the final norm; ``lm_head`` makes logits of it.

        Args:
            inputs: The step.
            embedding_VD: The target's frozen input embeddings.
        """
        features = functional.linear(inputs.taps_SCX, self.fc.weight * self.feature_scale)
        first = inputs.anchors_SA - 1
        hidden = features.gather(1, first[:, :, None].expand(-1, -1, features.shape[-1]))
        positions = first[:, :, None] + torch.arange(inputs.chain_ids_SAB.shape[2], device=first.device)
        is_visible = torch.arange(features.shape[1], device=first.device) <= first[:, :, None]
        cos_PE, sin_PE = self._rotary.cos_PE, self._rotary.sin_PE
        chain = Chain(
            self._embed(embedding_VD, inputs.chain_ids_SAB),
            hidden,
            (cos_PE[positions][..., None, :], sin_PE[positions][..., None, :]),
        )
        length = features.shape[1]
        context = Context(
            self._embed(embedding_VD, inputs.next_ids_SC),
            features,
            (cos_PE[:length, None], sin_PE[:length, None]),
            is_visible,
        )
        out: Tensor = self.norm(self.layers[0](chain, context))
        return out

    def _embed(self, embedding_VD: Tensor, ids: Tensor) -> Tensor:
        scale = self.config.embedding_scale
        return embedding_VD[ids] if scale == 1.0 else embedding_VD[ids] * scale


@dataclass(frozen=True)
class Context:
    """The rows that the target has made.

    Attributes:
        embedded_SCD: Embeddings of the tokens after.
        features_SCD: Projected taps.
        rotary: Of their positions, ``[C, 1, E]``.
        is_visible_SAC: Which of them a chain sees.
    """

    embedded_SCD: Tensor
    features_SCD: Tensor
    rotary: Rotary
    is_visible_SAC: Tensor


@dataclass(frozen=True)
class Chain:
    """The chains of all anchors.

    Attributes:
        embedded_SABD: Embeddings of every step's input token.
        hidden_SAD: Feature that the first step reads.
        rotary: Of every step's position, ``[S, A, B, 1, E]``.
    """

    embedded_SABD: Tensor
    hidden_SAD: Tensor
    rotary: Rotary


class ChainLayer(LayerParts):
    """The decoder layer; its attention reads ``[embedding, hidden]``, both normalised."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config, ChainAttention(config))
        self.hidden_norm = RMSNorm(config.hidden_size, config)

    def forward(self, chain: Chain, context: Context) -> Tensor:
        """``[S, A, B, D]`` hidden states of all steps, before the final norm.

        All steps in one call: whoever shards the layer gathers its weights once.
        """
        attention = self.self_attn
        assert isinstance(attention, ChainAttention)
        known = attention.keys_values(self._inputs(context.embedded_SCD, context.features_SCD), context.rotary)
        # A masked score is -inf, added to every head's.
        mask = torch.zeros(context.is_visible_SAC.shape, device=known[0].device)
        mask = mask.masked_fill_(~context.is_visible_SAC, float("-inf"))[:, None, None]
        hidden, own, outputs = chain.hidden_SAD, [], []
        for step in range(chain.embedded_SABD.shape[2]):
            x = self._inputs(chain.embedded_SABD[:, :, step], hidden)
            rotary = (chain.rotary[0][:, :, step], chain.rotary[1][:, :, step])
            if step > 0:
                # The first step's own row is the last of its context.
                own.append(attention.keys_values(x, rotary))
            attended = attention(attention.queries(x, rotary), known, own, mask)
            hidden = self.finish(hidden, attended)
            outputs.append(hidden)
        return torch.stack(outputs, 2)

    def _inputs(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        return torch.cat([self.input_layernorm(embedded), self.hidden_norm(hidden)], -1)


class ChainAttention(AttentionParts):
    """Attention of one step of every chain over its context and its own earlier rows."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config, 2 * config.hidden_size)

    def forward(
        self, q_SAHE: Tensor, known: tuple[Tensor, Tensor], own: list[tuple[Tensor, Tensor]], mask: Tensor
    ) -> Tensor:
        """``[S, A, D]``.

        Args:
            q_SAHE: Queries.
            known: Keys and values of the context, ``[S, C, K, E]``.
            own: Of the chain's rows since, ``[S, A, K, E]`` each.
            mask: Additive, ``[S, 1, 1, A, C]``.
        """
        q = q_SAHE.unflatten(2, (self.num_kv_heads, -1)) * self.head_dim**-0.5
        scores = torch.einsum("sakge,scke->skgac", q, known[0]).float() + mask
        if own:
            keys, values = (torch.stack(part, 2) for part in zip(*own, strict=True))
            scores = torch.cat([scores, torch.einsum("sakge,sajke->skgaj", q, keys).float()], -1)
        shares = scores.softmax(-1).to(q.dtype)
        length = known[0].shape[1]
        out = torch.einsum("skgac,scke->sakge", shares[..., :length], known[1])
        if own:
            out = out + torch.einsum("skgaj,sajke->sakge", shares[..., length:], values)
        projected: Tensor = self.o_proj(out.flatten(2))
        return projected
