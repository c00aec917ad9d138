"""What every objective takes from its target and its corpus: frozen matrices, the draft's vocabulary, tap scales.

Dimension letters: V target vocabulary, W draft vocabulary, N slots, D hidden, L taps, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftline.cache.source import SampleSource
from draftline.draft.config import DraftConfig
from draftline.draft.layers import norm_scale
from draftline.draft.loss import DistillationTargets
from draftline.draft.vocab import choose_vocab
from draftline.errors import TrainingDiverged
from draftline.spec import RunSpec
from draftline.target.load import Target

_FEATURE_SAMPLES = 32
_FEATURE_FLOOR = 1e-3


class FrozenEnds:
    """The target's embeddings, its LM head in the precision of training, and the vocabulary that the draft may propose.

    Args:
        spec: The run spec.
        target: The frozen target.
        counts: Token counts for the draft vocabulary, likeliest first.

    Attributes:
        vocab_W: Ascending target ids, ``None`` for the whole vocabulary.
        columns_V: Draft column of every target id, -1 outside.
        embedding_VD: Input embeddings.
        head_WD: LM head rows of the draft vocabulary.
        norm_scale_D: What the target's final norm multiplies by.
    """

    def __init__(self, spec: RunSpec, target: Target, counts: Sequence[tuple[int, int]]) -> None:
        self._target = target
        self.vocab_W = choose_vocab(counts, spec.draft.vocab_size, target.vocab_size, target.eos_token_ids)
        self.columns_V = _columns(self.vocab_W, target.vocab_size)
        self.embedding_VD = target.embedding_VD.float()
        # The loss multiplies in the head's dtype.
        head = target.lm_head_VD.to(torch.bfloat16 if spec.train.precision == "bf16" else torch.float32)
        self.head_WD = head if self.vocab_W is None else head[self.vocab_W].contiguous()
        self.norm_scale_D = norm_scale(target.weights["model.norm.weight"].float(), target.config.family_facts)

    def can_propose_best(self, targets: DistillationTargets) -> Tensor:
        """``[N]``: slots whose likeliest target token the draft can propose; the loss sees only its vocabulary."""
        if self.vocab_W is None:
            return torch.ones(len(targets.labels_N), dtype=torch.bool)
        head = self._target.lm_head_VD
        best = torch.cat([(part.to(head.dtype) @ head.t()).argmax(-1) for part in targets.hidden_UD.split(256)])
        within = self.columns_V[best] >= 0
        return within if targets.row_N is None else within[targets.row_N]


def measure_features(config: DraftConfig, source: SampleSource) -> Tensor:
    """``[L * D]``: 1 / root-mean-square of every tap channel, over the first samples of the stream.

    Raises:
        TrainingDiverged: a tap is not finite; named here, or every later step would be NaN and blame its own samples.
    """
    count = min(_FEATURE_SAMPLES, source.num_samples)
    source.announce(range(count))
    total = torch.zeros(len(config.target_layer_ids) * config.hidden_size, dtype=torch.float64)
    tokens = 0
    for position in range(count):
        sample = source.at(position)
        taps = sample.taps_TLD
        squares = taps.reshape(taps.shape[0], -1).double().pow(2).sum(0)
        if not bool(squares.isfinite().all()):
            raise TrainingDiverged(
                "the cached taps hold NaN or infinity",
                got=f"sample {sample.sample_id}",
                expected="finite values",
                remedy="Take the sample out, or capture it again",
            )
        total += squares
        tokens += taps.shape[0]
    return (total / max(tokens, 1)).sqrt().clamp(min=_FEATURE_FLOOR).reciprocal().float()


def _columns(vocab: Tensor | None, vocab_size: int) -> Tensor:
    if vocab is None:
        return torch.arange(vocab_size)
    columns = torch.full((vocab_size,), -1, dtype=torch.long)
    columns[vocab] = torch.arange(len(vocab))
    return columns
