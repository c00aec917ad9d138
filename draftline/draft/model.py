"""The DSpark draft as a trainable module (paper section 3.1, equations 2 to 8).

Dimension letters: S samples of a step, C context positions (padded),
A anchors a sample, B block size (gamma), M = A * B slots a sample, D hidden,
H query heads, K key heads, E head size, L taps, V target vocabulary,
W draft vocabulary, r Markov rank.

Parameter names are DeepSpec's, so a state dict is a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from draftline.draft.config import DraftConfig
from draftline.draft.heads import ConfidenceHead, MarkovHead
from draftline.draft.layers import AttentionParts, LayerParts, RMSNorm, Rotary
from draftline.target.lean import RotaryTable


@dataclass(frozen=True)
class DraftInputs:
    """One training step's inputs (teacher forced).

    Attributes:
        taps_SCX: Context features ``[S, C, L * D]``, zero where padded.
        block_ids_SM: Input token of every slot: anchor, then masks.
        previous_ids_SM: True token before the one that the slot predicts.
        positions_SM: Position of every slot.
        mask_SMT: Additive attention mask ``[S, 1, M, C + M]``: context before
            the anchor, and the slot's own block.
    """

    taps_SCX: Tensor
    block_ids_SM: Tensor
    previous_ids_SM: Tensor
    positions_SM: Tensor
    mask_SMT: Tensor


@dataclass(frozen=True)
class DraftHidden:
    """What the backbone gives for every slot.

    Attributes:
        hidden_SMD: After the final norm; ``lm_head`` makes logits of it.
        latent_SMr: Latent of the Markov bias, which ``markov_w2`` maps to the
            vocabulary; ``None`` without a sequential head.
        confidence_SM: Confidence logits, or ``None``.
    """

    hidden_SMD: Tensor
    latent_SMr: Tensor | None
    confidence_SM: Tensor | None


class DSparkDraft(nn.Module):
    """Parallel backbone, sequential head, confidence head.

    ``embed_tokens`` and ``lm_head`` belong to the target and are given, not
    learned. ``feature_scale`` standardises the taps during training; it is
    folded into ``fc`` on export (:func:`draftline.draft.checkpoint.export_state`).

    Args:
        config: Architecture.
        max_positions: Longest sequence, for the rotary table.
    """

    feature_scale: Tensor

    def __init__(self, config: DraftConfig, max_positions: int) -> None:
        super().__init__()
        self.config = config
        num_features = len(config.target_layer_ids) * config.hidden_size
        self.fc = nn.Linear(num_features, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        self.markov_head = MarkovHead(config) if config.markov_rank else None
        self.confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None
        self.register_buffer("feature_scale", torch.ones(num_features))
        self._rotary = RotaryTable(
            config.head_dim, config.rope_theta, max_positions, torch.float32, config.rope_scaling
        )

    def initialise(self, generator: torch.Generator, target_norm_D: Tensor) -> None:
        """Draw the weights: normal with the fan-in's scale; biases, the Markov one too, start at zero.

        The final norm starts as the target's, whose LM head reads it: otherwise
        the first hundred steps go into finding the logits' scale.

        Args:
            generator: Of all randomness.
            target_norm_D: What the target's final norm multiplies by.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                # Linear layers draw theirs from the global generator, which differs between workers and runs.
                nn.init.zeros_(parameter)
            if parameter.ndim < 2:
                continue
            if name == "markov_head.markov_w2.weight":
                nn.init.zeros_(parameter)
            else:
                scale = 1.0 if name == "markov_head.markov_w1.weight" else parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=scale, generator=generator)
        self.norm.start_from(target_norm_D)

    def forward(self, inputs: DraftInputs, embedding_VD: Tensor) -> DraftHidden:
        """Hidden states of every slot.

        Args:
            inputs: The step.
            embedding_VD: The target's frozen input embeddings.
        """
        # Scaling the weight instead of the features saves a pass over the step's largest tensor.
        context = self.hidden_norm(functional.linear(inputs.taps_SCX, self.fc.weight * self.feature_scale))
        x = embedding_VD[inputs.block_ids_SM]
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        cos_c, sin_c = self._rotary.cos_PE[: context.shape[1]], self._rotary.sin_PE[: context.shape[1]]
        cos, sin = self._rotary.cos_PE[inputs.positions_SM], self._rotary.sin_PE[inputs.positions_SM]
        cos_keys = torch.cat([cos_c.expand(len(x), -1, -1), cos], 1)[:, :, None]
        sin_keys = torch.cat([sin_c.expand(len(x), -1, -1), sin], 1)[:, :, None]
        for layer in self.layers:
            x = layer(x, context, (cos[:, :, None], sin[:, :, None]), (cos_keys, sin_keys), inputs.mask_SMT)
        hidden = self.norm(x)
        latent = confidence = None
        if self.markov_head is not None:
            previous = self.markov_head.markov_w1(inputs.previous_ids_SM)
            latent = self.markov_head(hidden, previous, self.config.block_size)
            if self.confidence_head is not None:
                confidence = self.confidence_head(hidden, previous)
        elif self.confidence_head is not None:
            confidence = self.confidence_head(hidden, None)
        return DraftHidden(hidden, latent, confidence)


class DraftLayer(LayerParts):
    """One decoder layer whose keys and values also come from the context (eq. 2, 3)."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config, InjectedAttention(config))

    def forward(self, x: Tensor, context: Tensor, rotary_queries: Rotary, rotary_keys: Rotary, mask: Tensor) -> Tensor:
        """``[S, M, D]`` to ``[S, M, D]``."""
        return self.finish(x, self.self_attn(self.input_layernorm(x), context, rotary_queries, rotary_keys, mask))


class InjectedAttention(AttentionParts):
    """Attention of block slots over context features and their own block."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config, config.hidden_size)

    def forward(self, x: Tensor, context: Tensor, rotary_queries: Rotary, rotary_keys: Rotary, mask: Tensor) -> Tensor:
        """``[S, M, D]`` to ``[S, M, D]``."""
        samples, slots = x.shape[:2]
        group = self.num_heads // self.num_kv_heads
        q = self.queries(x, rotary_queries)
        k, v = self.keys_values(torch.cat([context, x], 1), rotary_keys)
        # Query heads that share a key head become further query rows, as in the engine.
        q = q.reshape(samples, slots, self.num_kv_heads, group * self.head_dim).transpose(1, 2)
        q = q.reshape(samples, self.num_kv_heads, slots * group, self.head_dim)
        mask = mask.repeat_interleave(group, dim=2)
        out = functional.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        out = out.view(samples, self.num_kv_heads, slots, group * self.head_dim).transpose(1, 2)
        projected: Tensor = self.o_proj(out.reshape(samples, slots, self.num_heads * self.head_dim))
        return projected
