"""Both ends of a draft at serving time: the target's embeddings in, its LM head out, and a draw.

Dimension letters: N tokens, R requests, D hidden, V target vocabulary, W
draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftline.decoding.verify import draw
from draftline.draft.config import DraftConfig
from draftline.target.linear import PackedLinear


@dataclass(frozen=True)
class TargetEnds:
    """The target's vocabulary matrices, which drafts use frozen.

    Attributes:
        embedding_VD: Input embeddings, unscaled.
        lm_head_VD: LM head.
    """

    embedding_VD: Tensor
    lm_head_VD: Tensor


class ServingVocabulary:
    """Embeds target ids, scores draft columns, and maps columns back to ids.

    Args:
        config: Architecture of the draft.
        weights: Exported weights; ``d2t`` is read when the vocabulary is pruned.
        ends: Of the target.
        dtype: Arithmetic.
    """

    def __init__(self, config: DraftConfig, weights: dict[str, Tensor], ends: TargetEnds, dtype: torch.dtype) -> None:
        self._embedding = ends.embedding_VD
        self._softcap = config.logit_softcap
        # Rounded to the arithmetic's type, as Hugging Face's scaled embedding does it.
        scale = torch.tensor(config.embedding_scale, dtype=dtype, device=ends.embedding_VD.device)
        self._scale = None if config.embedding_scale == 1.0 else scale
        self.draft_to_target: Tensor | None = None
        head = ends.lm_head_VD
        if config.is_pruned:
            device = head.device
            self.draft_to_target = weights["d2t"].to(device) + torch.arange(config.draft_vocab_size, device=device)
            head = head[self.draft_to_target]
        self._head = PackedLinear(head.to(dtype))

    def embed(self, ids_N: Tensor) -> Tensor:
        """``[N, D]`` input embeddings."""
        x = self._embedding[ids_N]
        return x if self._scale is None else x * self._scale

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """``[N, W]`` logits of hidden states after the final norm."""
        logits = self._head(hidden_ND)
        return logits if self._softcap is None else (logits / self._softcap).tanh() * self._softcap

    def ids_of(self, columns_N: Tensor) -> Tensor:
        """Target ids of draft columns."""
        return columns_N if self.draft_to_target is None else self.draft_to_target[columns_N]


class Picker:
    """Chooses a draft column per request: the likeliest at temperature 0, else drawn.

    Args:
        temperatures: Of every request.
        uniforms_RB: Randomness, when any temperature is above 0.
        device: Of the logits.
    """

    def __init__(self, temperatures: Sequence[float], uniforms_RB: Tensor | None, device: torch.device | str) -> None:
        self._temperature_R = torch.tensor(temperatures, device=device)
        self._uniforms_RB: Tensor | None = None
        if uniforms_RB is not None and any(t > 0 for t in temperatures):
            self._uniforms_RB = uniforms_RB.to(device)
        self._laws: list[Tensor] = []

    def pick(self, logits_RW: Tensor, step: int) -> Tensor:
        """``[R]`` columns of a block's slot."""
        column = logits_RW.argmax(-1)
        if self._uniforms_RB is None:
            return column
        law = (logits_RW.float() / self._temperature_R.clamp(min=1e-6)[:, None]).softmax(-1)
        self._laws.append(law)
        return torch.where(self._temperature_R > 0, draw(law, self._uniforms_RB[:, step]), column)

    def laws(self) -> Tensor | None:
        """``[R, B, W]``: what the picked columns were drawn from; ``None`` when all are greedy."""
        return torch.stack(self._laws, 1) if self._laws else None
