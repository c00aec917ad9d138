"""The Eagle3 draft at serving time: a chain of single-token steps over its own KV cache.

Row t (see :mod:`draftline.draft.eagle3`) needs the token at t + 1, so the rows
of appended tokens are those before them; the row of the last one waits for the
anchor. The projected feature of *every* position is kept: a slot may take over
any number of another one's tokens and go on with a token of its own.

Dimension letters: N tokens, R requests, B block size, D hidden, S slots,
P positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftline.draft.config import DraftConfig
from draftline.draft.proposer import EngineRoom, ProcessedTokens, Proposal
from draftline.draft.runner import block_segment
from draftline.draft.serving_layer import ServingLayer, ServingNorm
from draftline.draft.serving_vocabulary import Picker, ServingVocabulary, TargetEnds
from draftline.target.batch import Segment
from draftline.target.kv_cache import SlotKVCache
from draftline.target.lean import RotaryTable, attend
from draftline.target.linear import PackedLinear


class Eagle3Runner:
    """Proposes chains; see :class:`draftline.draft.proposer.Proposer`.

    Args:
        config: Architecture.
        weights: Exported weights (``feature_scale`` folded).
        ends: The target's embeddings and LM head.
        dtype: Arithmetic.
        room: Sizes of the engine.
    """

    def __init__(
        self,
        config: DraftConfig,
        weights: dict[str, Tensor],
        ends: TargetEnds,
        dtype: torch.dtype,
        room: EngineRoom,
    ) -> None:
        self.config = config
        self._dtype, self._device = dtype, ends.embedding_VD.device
        state = {name: value.to(self._device) for name, value in weights.items()}
        cast = {name: value.to(dtype) for name, value in state.items() if value.is_floating_point()}
        self._vocabulary = ServingVocabulary(config, state, ends, dtype)
        self._fc = PackedLinear(cast["fc.weight"])
        self._layer = ServingLayer(config, cast, "layers.0.")
        self._hidden_norm = ServingNorm(config, cast["layers.0.hidden_norm.weight"])
        self._norm = ServingNorm(config, cast["norm.weight"])
        self._rotary = RotaryTable(config.head_dim, config.rope_theta, room.num_positions, dtype, config.rope_scaling)
        self._cache = SlotKVCache(
            1, room.num_slots, room.num_positions, config.num_kv_heads, config.head_dim, dtype, self._device
        )
        self._features_SPD = torch.zeros(
            room.num_slots, room.num_positions, config.hidden_size, dtype=dtype, device=self._device
        )

    @property
    def block_size(self) -> int:
        """See :class:`~draftline.draft.proposer.Proposer`."""
        return self.config.block_size

    @property
    def tap_ids(self) -> tuple[int, ...]:
        """See :class:`~draftline.draft.proposer.Proposer`."""
        return self.config.target_layer_ids

    @property
    def draft_to_target(self) -> Tensor | None:
        """See :class:`~draftline.draft.proposer.Proposer`."""
        return self._vocabulary.draft_to_target

    @torch.inference_mode()
    def append(self, tokens: ProcessedTokens) -> None:
        """Keep the tokens' features, and the keys and values of the rows that they complete."""
        features = self._fc(tokens.taps_NLD.reshape(tokens.taps_NLD.shape[0], -1))
        kept = self._features_SPD.view(-1, features.shape[1])
        kept.index_copy_(0, tokens.cache_index_N, features)
        # A request's first token completes nothing: what is made of it goes to the slot's last position, which no
        # draft reaches. Leaving it out would wait for the device to count the others.
        rows = tokens.cache_index_N - 1
        rows = torch.where(tokens.positions_N > 0, rows, rows + self._cache.num_positions)
        x = self._inputs(tokens.token_ids_N, kept[rows])
        rotary = self._rotary.at((tokens.positions_N - 1).clamp_(min=0))
        self._cache.append(0, rows, self._layer.keys_values(x, rotary))

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy what a slot knows of its first ``length`` tokens over another slot's."""
        self._cache.move(source, destination, length)
        self._features_SPD[destination, :length] = self._features_SPD[source, :length]

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
        picker = Picker(temperatures, uniforms_RB, self._device)
        ids = torch.tensor(anchor_ids, device=self._device)
        slot = torch.tensor(slots, device=self._device)
        positions = torch.tensor(starts, device=self._device) - 1
        hidden = self._features_SPD[slot, positions]
        columns, drafted = [], []
        for step in range(self.config.block_size):
            segment = block_segment(slots, positions + step, max(starts) + step, 1, self._dtype)
            hidden = self._advance(segment, slot * self._cache.num_positions, positions + step, ids, hidden)
            columns.append(picker.pick(self._vocabulary.logits(self._norm(hidden)), step))
            ids = self._vocabulary.ids_of(columns[-1])
            drafted.append(ids)
        return Proposal(torch.stack(drafted, 1), torch.stack(columns, 1), None, picker.laws())

    def _advance(
        self, segment: Segment, first_R: Tensor, positions_R: Tensor, ids_R: Tensor, hidden_RD: Tensor
    ) -> Tensor:
        """One row of every request: its keys and values are kept, its output is returned."""
        queries, keys_values = self._layer.queries_keys_values(
            self._inputs(ids_R, hidden_RD), self._rotary.at(positions_R)
        )
        self._cache.append(0, first_R + positions_R, keys_values)
        return self._layer.finish(hidden_RD, attend(queries, self._cache, 0, (segment,)))

    def _inputs(self, ids_N: Tensor, hidden_ND: Tensor) -> Tensor:
        return torch.cat([self._layer.input_norm(self._vocabulary.embed(ids_N)), self._hidden_norm(hidden_ND)], -1)
