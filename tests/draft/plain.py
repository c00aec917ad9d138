"""Drafts once more, written slowly from the papers' equations in float64: loops over blocks, slots and heads.

Nothing of ``draftline`` is imported. A draft is what its checkpoint says:
``config.json`` as a plain dict in DeepSpec's words, tensors by DeepSpec's names.
Covers the decoder layers of Qwen3 (queries and keys normalised per head) and
Llama (not normalised).

Equation numbers are those of the DSpark report (arXiv 2607.05147); Eagle3 is
"EAGLE-3: Scaling up Inference Acceleration of Large Language Models via
Training-Time Test" (arXiv 2503.01840), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
State = Mapping[str, Array]


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
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


@dataclass(frozen=True)
class Source:
    """What one key and value is made of: a vector that the projections read, and its position."""

    vector: Array
    position: int


class PlainLayer:
    """One decoder layer's parts.

    Args:
        document: ``config.json``.
        state: All tensors.
        index: Of the layer.
    """

    def __init__(self, document: Mapping[str, Any], state: State, index: int) -> None:
        self.state, self.prefix = state, f"layers.{index}."
        self.heads, self.key_heads = document["num_attention_heads"], document["num_key_value_heads"]
        self.size, self.eps = document["head_dim"], document["rms_norm_eps"]
        self.theta = document["rope_parameters"]["rope_theta"]

    def weight(self, name: str) -> Array:
        return self.state[f"{self.prefix}{name}.weight"]

    def normed(self, name: str, x: Array) -> Array:
        return norm(x, self.weight(name), self.eps)

    def head(self, kind: str, number: int, x: Array) -> Array:
        """One head's query, key or value before its position is put in."""
        rows = slice(number * self.size, (number + 1) * self.size)
        out: Array = self.weight(f"self_attn.{kind}_proj")[rows] @ x
        name = f"self_attn.{kind}_norm"
        return self.normed(name, out) if f"{self.prefix}{name}.weight" in self.state else out

    def attended(self, query: Source, sources: list[Source]) -> Array:
        """All heads' weighted values, through the output projection."""
        parts = []
        for number in range(self.heads):
            shared = number // (self.heads // self.key_heads)
            q = rotated(self.head("q", number, query.vector), query.position, self.theta)
            scores = []
            for source in sources:
                k = rotated(self.head("k", shared, source.vector), source.position, self.theta)
                scores.append(float(q @ k) / math.sqrt(self.size))
            shares = [math.exp(score - max(scores)) for score in scores]
            part = np.zeros(self.size)
            for share, source in zip(shares, sources, strict=True):
                part += share / sum(shares) * self.head("v", shared, source.vector)
            parts.append(part)
        out: Array = self.weight("self_attn.o_proj") @ np.concatenate(parts)
        return out

    def fed_forward(self, x: Array) -> Array:
        """The second half of the layer, residual included."""
        inner = self.normed("post_attention_layernorm", x)
        gate, up = self.weight("mlp.gate_proj") @ inner, self.weight("mlp.up_proj") @ inner
        out: Array = x + self.weight("mlp.down_proj") @ (gate * sigmoid(gate) * up)
        return out


class PlainVocabulary:
    """Columns of a draft's logits.

    Args:
        document: ``config.json``.
        state: All tensors.
        lm_head: The target's LM head ``[V, D]``.
    """

    def __init__(self, document: Mapping[str, Any], state: State, lm_head: Array) -> None:
        size = document.get("draft_vocab_size", document["vocab_size"])
        self.targets = np.arange(document["vocab_size"])
        if size < document["vocab_size"]:
            self.targets = np.array([column + int(state["d2t"][column]) for column in range(size)])
        self.head = lm_head[self.targets]


class PlainDraft:
    """A DSpark or DFlash draft that proposes one block at a time.

    Args:
        document: ``config.json``.
        state: Exported weights.
        embedding: The target's embeddings ``[V, D]``.
        lm_head: The target's LM head ``[V, D]``.
    """

    def __init__(self, document: Mapping[str, Any], state: State, embedding: Array, lm_head: Array) -> None:
        self.document, self.state, self.embedding = document, state, embedding
        self.vocabulary = PlainVocabulary(document, state, lm_head)
        self.targets = self.vocabulary.targets

    def block(self, taps: Array, anchor: int, anchor_id: int, previous_ids: list[int]) -> PlainBlock:
        """One block.

        Args:
            taps: ``[T, L * D]`` tapped hidden states of the sequence.
            anchor: Position of the anchor; features before it are seen.
            anchor_id: Its token.
            previous_ids: Token before each predicted one; the first is the anchor.
        """
        hidden = self._backbone(taps, anchor, anchor_id)
        recurrent = np.zeros(self.document["markov_rank"])
        logits, confidence = [], []
        for h, previous_id in zip(hidden, previous_ids, strict=True):
            row = self.vocabulary.head @ h
            before: Array = np.zeros(0)
            if self.document["markov_rank"] > 0:
                before = self.state["markov_head.markov_w1.weight"][previous_id]
                latent, recurrent = self._latent(h, before, recurrent)
                # Equation 4: U_k + B_k.
                row = row + self.state["markov_head.markov_w2.weight"] @ latent
            logits.append(row)
            if self.document["enable_confidence_head"]:
                confidence.append(self._confidence(h, before))
        return PlainBlock(np.array(logits), np.array(confidence) if confidence else None)

    def _latent(self, h: Array, before: Array, recurrent: Array) -> tuple[Array, Array]:
        """Equations 5 and 6: what ``markov_w2`` reads, and the next recurrent state."""
        state, kind = self.state, self.document["markov_head_type"]
        if kind == "vanilla":
            return before, recurrent
        if kind == "gated":
            gate = state["markov_head.gate_proj.weight"] @ np.concatenate([h, before])
            return before * sigmoid(gate + state["markov_head.gate_proj.bias"]), recurrent
        assert kind == "rnn"
        z = state["markov_head.joint_proj.weight"] @ np.concatenate([recurrent, before, h])
        z = z + state["markov_head.joint_proj.bias"]
        rank = len(before)
        gate, candidate, output = sigmoid(z[:rank]), np.tanh(z[rank : 2 * rank]), np.tanh(z[2 * rank :])
        return output, gate * recurrent + (1 - gate) * candidate

    def _confidence(self, h: Array, before: Array) -> float:
        """Equation 7, before the sigmoid."""
        features = np.concatenate([h, before]) if self.document["confidence_head_with_markov"] else h
        weight, bias = self.state["confidence_head.proj.weight"][0], self.state["confidence_head.proj.bias"][0]
        return float(weight @ features + bias)

    def _backbone(self, taps: Array, anchor: int, anchor_id: int) -> list[Array]:
        document, state, eps = self.document, self.state, self.document["rms_norm_eps"]
        # Equation 2: context features of every position before the anchor.
        context = [
            Source(norm(state["fc.weight"] @ taps[t], state["hidden_norm.weight"], eps), t) for t in range(anchor)
        ]
        mask_id = document["mask_token_id"]
        x = [self.embedding[anchor_id if k == 0 else mask_id] for k in range(document["block_size"])]
        for index in range(document["num_hidden_layers"]):
            layer = PlainLayer(document, state, index)
            # Equation 3: context features are keys as they are, the block's own slots after the layer's input norm.
            own = [Source(layer.normed("input_layernorm", each), anchor + k) for k, each in enumerate(x)]
            sources = [*context, *own]
            x = [layer.fed_forward(each + layer.attended(query, sources)) for each, query in zip(x, own, strict=True)]
        return [norm(each, state["norm.weight"], eps) for each in x]


class PlainEagle3:
    """An Eagle3 draft of one layer that proposes one chain at a time.

    Args: as of :class:`PlainDraft`.
    """

    def __init__(self, document: Mapping[str, Any], state: State, embedding: Array, lm_head: Array) -> None:
        assert document["num_hidden_layers"] == 1
        self.document, self.state, self.embedding = document, state, embedding
        self.vocabulary = PlainVocabulary(document, state, lm_head)
        self.targets = self.vocabulary.targets

    def chain(self, taps: Array, ids: list[int], anchor: int, drafted_ids: list[int]) -> Array:
        """Logits ``[1 + len(drafted_ids), W]`` of the tokens after the anchor.

        Args:
            taps: ``[T, L * D]`` tapped hidden states of the sequence.
            ids: Its tokens, up to the anchor at least.
            anchor: Position of the anchor, at least 1; features before it are seen.
            drafted_ids: Tokens that are fed back, the first being the one after the anchor.
        """
        state, eps = self.state, self.document["rms_norm_eps"]
        layer = PlainLayer(self.document, state, 0)
        # The feature of position t goes with the token at t + 1 and keeps position t.
        inputs = [(state["fc.weight"] @ taps[t], ids[t + 1]) for t in range(anchor)]
        seen = [self._source(layer, hidden, token, t) for t, (hidden, token) in enumerate(inputs)]
        hidden, rows = inputs[-1][0], []
        for step in range(1 + len(drafted_ids)):
            if step > 0:
                # The draft's own output takes the place of the target's feature.
                seen.append(self._source(layer, hidden, drafted_ids[step - 1], anchor - 1 + step))
            hidden = layer.fed_forward(hidden + layer.attended(seen[-1], seen))
            rows.append(self.vocabulary.head @ norm(hidden, state["norm.weight"], eps))
        return np.array(rows)

    def _source(self, layer: PlainLayer, hidden: Array, token: int, position: int) -> Source:
        embedded = layer.normed("input_layernorm", self.embedding[token])
        return Source(np.concatenate([embedded, layer.normed("hidden_norm", hidden)]), position)
