"""The DSpark draft as a trainable module (paper section 3.1, equations 2 to 8).

Dimension letters: C context tokens of all samples of a step, G blocks of all
samples, B block size (gamma), M = G * B slots, D hidden, H query heads, K key
heads, E head size, L taps, V target vocabulary, W draft vocabulary, r Markov
rank.

Parameter names are DeepSpec's, so a state dict is a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from draftline.draft.attention import Attend, BlockLayout, block_attention
from draftline.draft.config import DraftConfig
from draftline.draft.heads import ConfidenceHead, MarkovHead
from draftline.draft.layers import AttentionParts, LayerParts, RMSNorm, Rotary
from draftline.target.lean import RotaryTable


@dataclass(frozen=True)
class DraftInputs:
    """One training step's inputs (teacher forced): the blocks of many samples, packed without padding.

    Attributes:
        taps_CX: Context features ``[C, L * D]`` of all samples, one after the
            other, each up to its last anchor.
        block_ids_M: Input token of every slot: anchor, then masks.
        previous_ids_M: True token before the one that the slot predicts.
        positions_M: Position of every slot in its sample.
        layout: Which slots see which context.
    """

    taps_CX: Tensor
    block_ids_M: Tensor
    previous_ids_M: Tensor
    positions_M: Tensor
    layout: BlockLayout


@dataclass(frozen=True)
class DraftHidden:
    """What the backbone gives for every slot.

    Attributes:
        hidden_MD: After the final norm; ``lm_head`` makes logits of it.
        latent_Mr: Latent of the Markov bias, which ``markov_w2`` maps to the
            vocabulary; ``None`` without a sequential head.
        confidence_M: Confidence logits, or ``None``.
    """

    hidden_MD: Tensor
    latent_Mr: Tensor | None
    confidence_M: Tensor | None


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
        context = self.hidden_norm(functional.linear(inputs.taps_CX, self.fc.weight * self.feature_scale))
        x = embedding_VD[inputs.block_ids_M]
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        positions = torch.cat([inputs.layout.context_positions().to(x.device), inputs.positions_M])
        rotary_keys = (self._rotary.cos_PE[positions][:, None], self._rotary.sin_PE[positions][:, None])
        num_groups = self.config.num_heads // self.config.num_kv_heads
        attend = block_attention(inputs.layout, num_groups, x.device)
        for layer in self.layers:
            x = layer(x, context, rotary_keys, attend)
        hidden = self.norm(x)
        latent = confidence = None
        if self.markov_head is not None:
            previous = self.markov_head.markov_w1(inputs.previous_ids_M)
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

    def forward(self, x: Tensor, context: Tensor, rotary_keys: Rotary, attend: Attend) -> Tensor:
        """``[M, D]`` to ``[M, D]``."""
        return self.finish(x, self.self_attn(self.input_layernorm(x), context, rotary_keys, attend))


class InjectedAttention(AttentionParts):
    """Attention of block slots over context features and their own block."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config, config.hidden_size)

    def forward(self, x: Tensor, context: Tensor, rotary_keys: Rotary, attend: Attend) -> Tensor:
        """``[M, D]`` to ``[M, D]``; ``rotary_keys`` is of the context, then of the slots."""
        num_context = len(context)
        q = self.queries(x, (rotary_keys[0][num_context:], rotary_keys[1][num_context:]))
        k, v = self.keys_values(torch.cat([context, x]), rotary_keys)
        sizes = [num_context, len(x)]
        (context_k, own_k), (context_v, own_v) = k.split(sizes), v.split(sizes)
        out = attend(q, context_k, context_v, own_k, own_v)
        projected: Tensor = self.o_proj(out.flatten(1))
        return projected
