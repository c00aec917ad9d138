"""A whole small language model as the draft: the classical way (Leviathan et al. 2023, Chen et al. 2023).

It reads no features of the target, so it must process every token itself and
drafts one token a forward. Kept to compare against; any model of a supported
family with the target's vocabulary will do.

Dimension letters: R requests, B block size, D hidden size, V vocabulary,
W draft vocabulary, S slots, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from draftline.decoding.verify import draw
from draftline.draft.proposer import EngineRoom, ProcessedTokens, Proposal
from draftline.errors import TargetError
from draftline.target.batch import Chunk, build_batch
from draftline.target.linear import PackedLinear
from draftline.target.load import Target


class StandaloneDraft:
    """Proposes what a small model would say; see :class:`~draftline.draft.proposer.Proposer`.

    Tokens that it drafted and the target accepted are not processed again.

    Args:
        model: The small model, loaded as a target of its own.
        target: The model it drafts for.
        room: Sizes of the engine.
        block_size: Tokens of one proposal.
        vocab_W: Ascending target ids that it may propose, ``None`` for all. A
            pruned head costs a draft less, as it does for the other drafts.

    Raises:
        TargetError: the two do not share a vocabulary.
    """

    tap_ids: tuple[int, ...] = ()

    def __init__(
        self, model: Target, target: Target, room: EngineRoom, block_size: int = 7, vocab_W: Tensor | None = None
    ) -> None:
        if model.vocab_size != target.vocab_size or model.tokenizer.get_vocab() != target.tokenizer.get_vocab():
            raise TargetError(
                "the stand-alone draft has another vocabulary than the target",
                got=f"{model.vocab_size} rows",
                expected=f"the target's {target.vocab_size} tokens, each with the same id",
                remedy="Take a smaller model of the target's own family",
            )
        self.block_size = block_size
        self.draft_to_target = vocab_W
        self._head = PackedLinear(model.lm_head_VD[vocab_W]) if vocab_W is not None else None
        self._model = model.model
        self._cache = self._model.new_cache(room.num_slots, room.num_positions)
        self._ids_SP = np.zeros((room.num_slots, room.num_positions), dtype=np.int64)
        # Keys and values of a slot's first tokens, as far as here, are those of the ids above, drafted ones included.
        self._num_cached_S = np.zeros(room.num_slots, dtype=np.int64)

    def append(self, tokens: ProcessedTokens) -> None:
        """Take note of tokens; they are processed together with the next anchor."""
        ids, positions = tokens.token_ids_N.cpu().numpy(), tokens.positions_N.cpu().numpy()
        slots = tokens.cache_index_N.cpu().numpy() // self._cache.num_positions
        for token, position, slot in zip(ids, positions, slots, strict=True):
            # A rejected draft, or another request's token: what was made of it and of all behind it is void.
            if self._ids_SP[slot, position] != token:
                self._num_cached_S[slot] = min(self._num_cached_S[slot], position)
                self._ids_SP[slot, position] = token

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy a slot's first ``length`` tokens over another slot's."""
        self._cache.move(source, destination, length)
        self._ids_SP[destination, :length] = self._ids_SP[source, :length]
        self._num_cached_S[destination] = min(length, self._num_cached_S[source])

    @torch.inference_mode()
    def propose(
        self,
        slots: Sequence[int],
        anchor_ids: Sequence[int],
        starts: Sequence[int],
        temperatures: Sequence[float],
        uniforms_RB: Tensor | None,
    ) -> Proposal:
        """See :meth:`draftline.draft.proposer.Proposer.propose`."""
        temperature = torch.tensor(temperatures, device=self._model.device)
        is_sampled = any(t > 0 for t in temperatures)
        uniforms_RB = uniforms_RB.to(self._model.device) if uniforms_RB is not None else None
        columns, ids, laws = [], [], []
        chunks = []
        for slot, anchor, start in zip(slots, anchor_ids, starts, strict=True):
            first = min(int(self._num_cached_S[slot]), start)
            chunks.append(Chunk(slot, first, [*self._ids_SP[slot, first:start].tolist(), anchor]))
        for k in range(self.block_size):
            logits = self._last_logits(chunks)
            column = logits.argmax(-1)
            if is_sampled and uniforms_RB is not None:
                law = (logits.float() / temperature.clamp(min=1e-6)[:, None]).softmax(-1)
                column = torch.where(temperature > 0, draw(law, uniforms_RB[:, k]), column)
                laws.append(law)
            columns.append(column)
            ids.append(column if self.draft_to_target is None else self.draft_to_target[column])
            chunks = [
                Chunk(slot, start + 1 + k, [token])
                for slot, start, token in zip(slots, starts, ids[-1].tolist(), strict=True)
            ]
        ids_RB = torch.stack(ids, 1)
        self._note_drafted(slots, anchor_ids, starts, ids_RB)
        return Proposal(ids_RB, torch.stack(columns, 1), None, torch.stack(laws, 1) if laws else None)

    def _last_logits(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits after each chunk's last token, ``[R, W]``; the chunks' keys and values are kept."""
        batch = build_batch(chunks, self._cache.num_positions, self._model.dtype, self._model.device)
        hidden = self._model.forward(batch, self._cache).hidden_ND
        last = torch.tensor([len(c.token_ids) for c in chunks], device=hidden.device).cumsum(0) - 1
        return self._model.logits(hidden[last]) if self._head is None else self._head(hidden[last])

    def _note_drafted(
        self, slots: Sequence[int], anchor_ids: Sequence[int], starts: Sequence[int], ids_RB: Tensor
    ) -> None:
        """The anchor and all drafts but the last are in the cache now; accepted ones need not be processed again."""
        for slot, anchor, start, drafted in zip(slots, anchor_ids, starts, ids_RB.tolist(), strict=True):
            self._ids_SP[slot, start : start + self.block_size] = [anchor, *drafted[:-1]]
            self._num_cached_S[slot] = start + self.block_size
