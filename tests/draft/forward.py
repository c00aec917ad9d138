"""The training module and the serving runner on given sequences, for tests that compare them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftline.draft.attention import BlockLayout
from draftline.draft.config import DraftConfig
from draftline.draft.model import DraftInputs, DSparkDraft
from draftline.draft.proposer import ProcessedTokens
from draftline.draft.runner import DraftRunner


@dataclass(frozen=True)
class Sequences:
    """Sequences of equal length and the frozen tensors of their target.

    Attributes:
        taps_STX: Tapped hidden states, ``[S, T, L * D]``.
        ids_SN: Tokens; there may be more of them than features.
        embedding_VD: Input embeddings.
        lm_head_VD: LM head.
    """

    taps_STX: Tensor
    ids_SN: Tensor
    embedding_VD: Tensor
    lm_head_VD: Tensor


def true_previous(config: DraftConfig, ids_SN: Tensor, anchors: Sequence[int]) -> Tensor:
    """The true token before each predicted one, ``[S, A * B]``."""
    return torch.stack([ids_SN[:, anchor + k] for anchor in anchors for k in range(config.block_size)], 1)


def block_inputs(config: DraftConfig, given: Sequences, anchors: Sequence[int], previous_SM: Tensor) -> DraftInputs:
    """Blocks of every sequence at the same ascending anchors."""
    samples, block = len(given.taps_STX), config.block_size
    layout = BlockLayout.of_anchors(block, [anchors] * samples)
    block_ids = torch.full((samples, block * len(anchors)), config.mask_token_id)
    block_ids[:, ::block] = given.ids_SN[:, list(anchors)]
    positions = torch.tensor([anchor + k for anchor in anchors for k in range(block)]).repeat(samples)
    taps = given.taps_STX[:, : anchors[-1]].flatten(0, 1)
    return DraftInputs(taps, block_ids.flatten(), previous_SM.flatten(), positions, layout)


@torch.no_grad()
def module_outputs(
    draft: DSparkDraft, given: Sequences, anchors: Sequence[int], vocab_W: Tensor | None, previous_SM: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Logits ``[S, A * B, W]`` and confidence logits ``[S, A * B]`` of the training module."""
    out = draft(block_inputs(draft.config, given, anchors, previous_SM), given.embedding_VD)
    head = given.lm_head_VD if vocab_W is None else given.lm_head_VD[vocab_W]
    logits = out.hidden_MD @ head.T
    if draft.markov_head is not None:
        logits = logits + draft.markov_head.markov_w2(out.latent_Mr)
    samples = len(given.taps_STX)
    confidence = None if out.confidence_M is None else out.confidence_M.view(samples, -1)
    return logits.view(samples, -1, logits.shape[-1]), confidence


def fill_slot(runner: DraftRunner, taps_TX: Tensor, slot: int, length: int, num_positions: int) -> None:
    """Give a slot its first features in three ragged parts, as an engine would."""
    config = runner.config
    for start, end in ((0, 2), (2, length - 1), (length - 1, length)):
        positions = torch.arange(start, end)
        ids = torch.zeros_like(positions)  # a block draft reads features alone
        taps = taps_TX[start:end].view(-1, len(config.target_layer_ids), config.hidden_size)
        runner.append(ProcessedTokens(ids, positions, slot * num_positions + positions, taps))
