"""Start the sequential head from what the target itself says after each token.

With little data a draft spends its steps on learning which token follows
which. The target knows: it is asked once for its logits after every token of
the draft vocabulary (behind one opening token), and the low-rank head starts
as the best approximation of that table. No text is needed for it.

Dimension letters: W draft vocabulary, V target vocabulary, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftline.target.batch import Chunk, build_batch
from draftline.target.load import Target

MAX_TABLE_TOKENS = 16384
"""The table of a larger vocabulary takes more than 1 GiB."""

_BATCH = 256


@torch.inference_mode()
def bigram_logits(target: Target, vocab_W: Tensor, opening_id: int) -> Tensor:
    """``[W, W]``: the target's logits (rows centred) over the vocabulary after each of its tokens."""
    model = target.model
    cache = model.new_cache(_BATCH, 2)
    head = target.lm_head_VD[vocab_W]
    cap = target.config.logit_softcap
    rows = []
    for part in torch.split(vocab_W, _BATCH):
        chunks = [Chunk(slot, 0, (opening_id, token)) for slot, token in enumerate(part.tolist())]
        hidden = model.forward(build_batch(chunks, 2, model.dtype, model.device), cache).hidden_ND[1::2]
        logits = (hidden @ head.t()).float()
        rows.append(logits if cap is None else (logits / cap).tanh_().mul_(cap))
    table = torch.cat(rows)
    return table - table.mean(-1, keepdim=True)


def low_rank(table_WW: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Factors ``[W, r]`` and ``[W, r]`` whose product approximates the table best (randomised SVD)."""
    rank = min(rank, *table_WW.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(table_WW, q=rank, niter=3)
    root = s.sqrt()
    return u * root, v * root
