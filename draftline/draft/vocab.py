"""Choose a pruned draft vocabulary from corpus counts.

A draft that can only propose the likely few thousand tokens has a head that
costs a fraction; what it cannot propose is simply rejected and drawn by the
target, so the output law is untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def choose_vocab(
    counts: Sequence[tuple[int, int]], size: int, vocab_size: int, always: Iterable[int] = ()
) -> Tensor | None:
    """Ascending target ids of the draft vocabulary; ``None`` for the whole.

    Args:
        counts: ``(token id, count)``, likeliest first.
        size: Wanted size, 0 for the whole vocabulary.
        vocab_size: Of the target.
        always: Ids kept whatever their count (end tokens).

    Ids that never occurred fill up the rest in ascending order: in byte-pair
    vocabularies low ids are the frequent merges.
    """
    if size == 0 or size >= vocab_size:
        return None
    kept = dict.fromkeys(always)
    for token, _ in counts:
        if len(kept) >= size:
            break
        kept[token] = None
    for token in range(vocab_size):
        if len(kept) >= size:
            break
        kept.setdefault(token)
    return torch.tensor(sorted(kept), dtype=torch.long)
