"""The draft once more, written slowly from the paper's equations in float64: loops over blocks, slots and heads.

It shares no code with the implementation; it reads an exported state dict.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from draftline.draft.config import DraftConfig

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PlainBlock:
    """One block's outcome: ``[B, W]`` logits and ``[B]`` confidence logits."""

    logits: Array
    confidence: Array | None


def sigmoid(x: Array) -> Array:
    out: Array = 1 / (1 + np.exp(-x))
    return out


def norm(x: Array, weight: Array, eps: float) -> Array:
    out: Array = x / np.sqrt(np.mean(x * x) + eps) * weight
    return out


def rotated(x: Array, position: int, theta: float) -> Array:
    """Rotary embedding of one head: pairs (i, i + half) turn by position * theta^(-2i / size)."""
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return out


class PlainDraft:
    """A draft that proposes one block at a time.

    Args:
        config: Architecture.
        state: Exported weights.
        embedding: The target's embeddings ``[V, D]``.
        lm_head: The target's LM head ``[V, D]``.
    """

    def __init__(self, config: DraftConfig, state: dict[str, Array], embedding: Array, lm_head: Array) -> None:
        self.config, self.state, self.embedding = config, state, embedding
        self.targets = np.arange(config.vocab_size)
        if config.is_pruned:
            self.targets = state["d2t"].astype(int) + np.arange(config.draft_vocab_size)
        self.head = lm_head[self.targets]

    def block(self, taps: Array, anchor: int, anchor_id: int, previous_ids: list[int]) -> PlainBlock:
        """One block.

        Args:
            taps: ``[T, L * D]`` tapped hidden states of the sequence.
            anchor: Position of the anchor; features before it are seen.
            anchor_id: Its token.
            previous_ids: Token before each predicted one; the first is the anchor.
        """
        config, state = self.config, self.state
        hidden = self._backbone(taps, anchor, anchor_id)
        rank_state = np.zeros(config.markov_rank)
        logits, confidence = [], []
        for k in range(config.block_size):
            h = hidden[k]
            row = self.head @ h
            before: Array = np.zeros(0)
            if config.markov_rank:
                before = state["markov_head.markov_w1.weight"][previous_ids[k]]
                latent = before
                if config.markov_head == "gated":
                    joined = np.concatenate([h, before])
                    gate = state["markov_head.gate_proj.weight"] @ joined + state["markov_head.gate_proj.bias"]
                    latent = before * sigmoid(gate)
                elif config.markov_head == "rnn":
                    joined = np.concatenate([rank_state, before, h])
                    z = state["markov_head.joint_proj.weight"] @ joined + state["markov_head.joint_proj.bias"]
                    gate, candidate, output = np.split(z, 3)
                    rank_state = sigmoid(gate) * rank_state + (1 - sigmoid(gate)) * np.tanh(candidate)
                    latent = np.tanh(output)
                row = row + state["markov_head.markov_w2.weight"] @ latent
            logits.append(row)
            if config.enable_confidence_head:
                features = np.concatenate([h, before]) if config.confidence_with_markov else h
                weight, bias = state["confidence_head.proj.weight"][0], state["confidence_head.proj.bias"][0]
                confidence.append(weight @ features + bias)
        return PlainBlock(np.array(logits), np.array(confidence) if confidence else None)

    def _backbone(self, taps: Array, anchor: int, anchor_id: int) -> list[Array]:
        config, state, eps = self.config, self.state, self.config.rms_norm_eps
        context = [norm(state["fc.weight"] @ taps[t], state["hidden_norm.weight"], eps) for t in range(anchor)]
        x = [self.embedding[anchor_id if k == 0 else config.mask_token_id] for k in range(config.block_size)]
        for index in range(config.num_layers):
            x = self._layer(index, x, context, anchor)
        return [norm(each, state["norm.weight"], eps) for each in x]

    def _layer(self, index: int, x: list[Array], context: list[Array], anchor: int) -> list[Array]:
        config, eps = self.config, self.config.rms_norm_eps

        def weight(name: str) -> Array:
            return self.state[f"layers.{index}.{name}.weight"]

        normed = [norm(each, weight("input_layernorm"), eps) for each in x]
        # Context features are keys as they are; block slots are keys after the layer's input norm.
        sources = [*context, *normed]
        size, group = config.head_dim, config.num_heads // config.num_kv_heads
        attended = [np.zeros(config.num_heads * size) for _ in x]
        for head in range(config.num_heads):
            queries = slice(head * size, (head + 1) * size)
            shared = slice(head // group * size, (head // group + 1) * size)
            keys = [
                rotated(
                    norm(weight("self_attn.k_proj")[shared] @ s, weight("self_attn.k_norm"), eps), p, config.rope_theta
                )
                for p, s in enumerate(sources)
            ]
            values = [weight("self_attn.v_proj")[shared] @ s for s in sources]
            for k, each in enumerate(normed):
                query = norm(weight("self_attn.q_proj")[queries] @ each, weight("self_attn.q_norm"), eps)
                query = rotated(query, anchor + k, config.rope_theta)
                scores = np.array([query @ key for key in keys]) / np.sqrt(size)
                shares = np.exp(scores - scores.max())
                shares /= shares.sum()
                attended[k][queries] = sum(share * value for share, value in zip(shares, values, strict=True))
        out = []
        for k, each in enumerate(x):
            each = each + weight("self_attn.o_proj") @ attended[k]
            inner = norm(each, weight("post_attention_layernorm"), eps)
            gate, up = weight("mlp.gate_proj") @ inner, weight("mlp.up_proj") @ inner
            out.append(each + weight("mlp.down_proj") @ (gate * sigmoid(gate) * up))
        return out
