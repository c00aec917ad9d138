"""What the engine asks of anything that drafts: a trained draft, another model, a look into the prompt.

Dimension letters: N tokens, R requests, B block size, L taps, D hidden size,
W draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Proposal:
    """Drafted blocks of some requests.

    Attributes:
        token_ids_RB: Drafted target ids.
        columns_RB: The same as draft-vocabulary columns.
        confidence_RB: Confidence logits (raw), or ``None`` without a head.
        law_RBW: The laws they were drawn from; ``None`` when all are greedy or certain.
        lengths_R: How many of each block are drafts at all, ``None`` for whole
            blocks; what follows is padding and is never verified.
        is_certain: Every draft's law is 1 at the draft, at any temperature: nothing was drawn.
    """

    token_ids_RB: Tensor
    columns_RB: Tensor
    confidence_RB: Tensor | None
    law_RBW: Tensor | None
    lengths_R: tuple[int, ...] | None = None
    is_certain: bool = False


@dataclass(frozen=True)
class ProcessedTokens:
    """Tokens of many requests that the target has processed and that stay.

    A request's tokens arrive in order and without gaps. Tokens that it took
    over from another request's slot arrive by :meth:`Proposer.move` instead.

    Attributes:
        token_ids_N: The tokens.
        positions_N: Position of each in its request.
        cache_index_N: ``slot * num_positions + position``.
        taps_NLD: Outputs of the tapped target layers.
    """

    token_ids_N: Tensor
    positions_N: Tensor
    cache_index_N: Tensor
    taps_NLD: Tensor


@dataclass(frozen=True)
class EngineRoom:
    """Sizes of the engine that a proposer keeps its own state for.

    Attributes:
        num_slots: Requests decoded together.
        num_positions: Positions of a slot, those of a drafted block included.
    """

    num_slots: int
    num_positions: int


class Proposer(Protocol):
    """Proposes blocks; owns whatever state of each slot it needs for that.

    Drafts may depend on everything before the anchor and on the anchor, and on
    the randomness it is given. The output law does not depend on the proposer.
    """

    @property
    def block_size(self) -> int:
        """B, the most tokens of one proposal."""
        ...

    @property
    def tap_ids(self) -> tuple[int, ...]:
        """Target layers whose outputs it wants, ascending; empty for none."""
        ...

    @property
    def draft_to_target(self) -> Tensor | None:
        """Target id of every draft column, ``[W]``; ``None`` when they are equal."""
        ...

    def append(self, tokens: ProcessedTokens) -> None:
        """Learn of tokens that the target has processed."""
        ...

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy the state of a slot's first ``length`` tokens over another slot's."""
        ...

    def propose(
        self,
        slots: Sequence[int],
        anchor_ids: Sequence[int],
        starts: Sequence[int],
        temperatures: Sequence[float],
        uniforms_RB: Tensor | None,
    ) -> Proposal:
        """Draft one block per request.

        Args:
            slots: Slot of each request, ascending.
            anchor_ids: Last token of each, not yet seen by the target.
            starts: Its position, which is the number of tokens appended.
            temperatures: 0 drafts greedily.
            uniforms_RB: Randomness of the requests with a temperature.
        """
        ...


ProposerFactory = Callable[[EngineRoom], Proposer]
"""Makes a proposer for an engine of some size."""
