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
from draftline.target.lean import RotaryTable, rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return rms_norm(x, self.weight, self.eps)


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
        eps = config.rms_norm_eps
        num_features = len(config.target_layer_ids) * config.hidden_size
        self.fc = nn.Linear(num_features, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, eps)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps)
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
        with torch.no_grad():
            self.norm.weight.copy_(target_norm_D)

    def forward(self, inputs: DraftInputs, embedding_VD: Tensor) -> DraftHidden:
        """Hidden states of every slot.

        Args:
            inputs: The step.
            embedding_VD: The target's frozen input embeddings.
        """
        # Scaling the weight instead of the features saves a pass over the step's largest tensor.
        context = self.hidden_norm(functional.linear(inputs.taps_SCX, self.fc.weight * self.feature_scale))
        x = embedding_VD[inputs.block_ids_SM]
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


class DraftLayer(nn.Module):
    """One decoder layer whose keys and values also come from the context (eq. 2, 3)."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.self_attn = InjectedAttention(config)
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        rotary_queries: tuple[Tensor, Tensor],
        rotary_keys: tuple[Tensor, Tensor],
        mask: Tensor,
    ) -> Tensor:
        """``[S, M, D]`` to ``[S, M, D]``."""
        x = x + self.self_attn(self.input_layernorm(x), context, rotary_queries, rotary_keys, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class InjectedAttention(nn.Module):
    """Attention of block slots over context features and their own block."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        rotary_queries: tuple[Tensor, Tensor],
        rotary_keys: tuple[Tensor, Tensor],
        mask: Tensor,
    ) -> Tensor:
        """``[S, M, D]`` to ``[S, M, D]``."""
        samples, slots = x.shape[:2]
        group = self.num_heads // self.num_kv_heads
        keyed = torch.cat([context, x], 1)
        q = self.q_norm(self.q_proj(x).view(samples, slots, self.num_heads, self.head_dim))
        k = self.k_norm(self.k_proj(keyed).view(samples, -1, self.num_kv_heads, self.head_dim))
        v = self.v_proj(keyed).view(samples, -1, self.num_kv_heads, self.head_dim)
        q, k = _rotate(q, *rotary_queries), _rotate(k, *rotary_keys)
        # Query heads that share a key head become further query rows, as in the engine.
        q = q.view(samples, slots, self.num_kv_heads, group * self.head_dim).transpose(1, 2)
        q = q.reshape(samples, self.num_kv_heads, slots * group, self.head_dim)
        mask = mask.repeat_interleave(group, dim=2)
        out = functional.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        out = out.view(samples, self.num_kv_heads, slots, group * self.head_dim).transpose(1, 2)
        projected: Tensor = self.o_proj(out.reshape(samples, slots, self.num_heads * self.head_dim))
        return projected


class GatedMLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class MarkovHead(nn.Module):
    """The sequential head (eq. 4-6): a low-rank bias that depends on the token before.

    ``forward`` returns the latent; ``markov_w2`` maps it to vocabulary logits
    (done by the chunked loss and by the runner).
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        rank = config.markov_rank
        self.kind = config.markov_head
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.draft_vocab_size, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(config.hidden_size + rank, rank)
        elif self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + config.hidden_size, 3 * rank)

    def step(self, hidden: Tensor, previous: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Latent ``[..., r]`` of one slot and the next state.

        Args:
            hidden: ``[..., D]``.
            previous: ``markov_w1`` of the token before, ``[..., r]``.
            state: Of the rnn head; ``None`` is zero.
        """
        if self.kind == "vanilla":
            return previous, None
        if self.kind == "gated":
            return previous * torch.sigmoid(self.gate_proj(torch.cat([hidden, previous], -1))), None
        state = torch.zeros_like(previous) if state is None else state
        joint = self.joint_proj(torch.cat([state, previous, hidden], -1))
        gate, candidate, output = joint.chunk(3, -1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)

    def forward(self, hidden_SMD: Tensor, previous_SMr: Tensor, block_size: int) -> Tensor:
        """Latents ``[S, M, r]`` of whole blocks."""
        if self.kind != "rnn":
            return self.step(hidden_SMD, previous_SMr, None)[0]
        samples, slots = hidden_SMD.shape[:2]
        hidden = hidden_SMD.view(samples, slots // block_size, block_size, -1)
        previous = previous_SMr.view(samples, slots // block_size, block_size, -1)
        state: Tensor | None = None
        latents = []
        for k in range(block_size):
            latent, state = self.step(hidden[:, :, k], previous[:, :, k], state)
            latents.append(latent)
        return torch.stack(latents, 2).view(samples, slots, -1)


class ConfidenceHead(nn.Module):
    """Logit of the probability that a drafted token survives, given the ones before did (eq. 7)."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.with_markov = config.confidence_with_markov
        self.proj = nn.Linear(config.confidence_features, 1)

    def forward(self, hidden: Tensor, previous: Tensor | None) -> Tensor:
        """``[...]`` logits from hidden states and the token before's Markov embedding."""
        features = torch.cat([hidden, previous], -1) if self.with_markov and previous is not None else hidden
        logits: Tensor = self.proj(features).squeeze(-1)
        return logits


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
