"""Floating-point operations of answering, capture and training, counted from shapes.

A matrix of ``n`` weights costs ``2 n`` operations a token; gradients with
respect to inputs and to weights cost ``2 n`` each again. Attention costs
``4 H E`` a pair of query and key (scores and their sum). Norms, activations
and softmaxes are left out: they cost bandwidth, not products.
"""

from __future__ import annotations

from dataclasses import dataclass

from draftline.planner.targets import TargetFacts


@dataclass(frozen=True)
class DraftFacts:
    """What training costs depend on.

    Attributes:
        num_layers: Depth of the draft.
        num_taps: L.
        block_size: gamma.
        vocab_size: Rows of the draft's vocabulary.
        markov_rank: 0 for none.
        anchors_per_sample: Blocks drawn from a sample each time it is seen.
        ttt_length: Steps that Eagle3 is trained ahead at *every* position; 0 for block drafts.
    """

    num_layers: int
    num_taps: int
    block_size: int
    vocab_size: int
    markov_rank: int
    anchors_per_sample: int
    ttt_length: int = 0


def target_forward(target: TargetFacts, tokens: float, sample_tokens: float, *, head_share: float) -> float:
    """Operations of the target's forward over ``tokens`` tokens in samples of ``sample_tokens``.

    Args:
        target: Its shape.
        tokens: How many in all.
        sample_tokens: Causal attention sees half of a sample on average, or a window.
        head_share: Share of the tokens that go through the LM head too (those that
            were answered: the cache holds their log-normalisers).
    """
    head = head_share * target.vocab_size * target.hidden_size
    attention = 0.0
    for kind in target.attention:
        seen = sample_tokens / 2
        if kind.window is not None and kind.window < sample_tokens:
            # The first ``window`` queries see half a window on average, the others a whole one.
            seen = kind.window - kind.window**2 / (2 * sample_tokens)
        attention += 4 * kind.num_layers * target.num_heads * kind.head_dim * seen
    return tokens * (2 * (target.num_layer_weights + head) + attention)


def training_step(target: TargetFacts, draft: DraftFacts, sample_tokens: float) -> float:
    """Operations of one sample in one optimiser step: forward, backward, and the target's own logits.

    The draft's layers have the shape of the target's layers with full attention.
    Eagle3 has no blocks: each of its steps runs over the whole sample, and its
    layer reads twice the width. The frozen LM head is multiplied three times: the draft's logits, the
    target's logits, and the gradient back through the head.
    """
    hidden, kind = target.hidden_size, target.attention[-1]
    is_eagle3 = draft.ttt_length > 0
    slots = draft.ttt_length * sample_tokens if is_eagle3 else draft.anchors_per_sample * draft.block_size
    width = 2 * hidden if is_eagle3 else hidden
    keys_values = (2 if kind.has_values else 1) * width * kind.num_kv_heads * kind.head_dim
    queries_and_output = (width + hidden) * target.num_heads * kind.head_dim
    slot_weights = draft.num_layers * (queries_and_output + keys_values + 3 * hidden * target.intermediate_size)
    # A block draft makes keys and values of the context too; Eagle3's context is its own slots.
    context_weights = draft.num_taps * hidden * hidden + (0 if is_eagle3 else draft.num_layers * keys_values)
    own = draft.ttt_length if is_eagle3 else draft.block_size
    attention = 4 * draft.num_layers * target.num_heads * kind.head_dim * (sample_tokens / 2 + own)
    trained = 2 * (slots * slot_weights + sample_tokens * context_weights) + slots * attention
    head = 3 * 2 * slots * draft.vocab_size * hidden
    markov = 3 * 2 * slots * draft.vocab_size * draft.markov_rank
    return 3 * trained + head + markov
