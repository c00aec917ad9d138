"""When held-out accepted length stops growing: a pure function of the history, so exact under resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ACCEPTED_LENGTH = "accepted_length"


def best_record(history: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    """The first validation of the greatest accepted length; ``None`` before any."""
    validations = [record for record in history if ACCEPTED_LENGTH in record]
    return max(validations, key=lambda record: record[ACCEPTED_LENGTH], default=None)


def is_exhausted(history: Sequence[Mapping[str, float]], patience: int) -> bool:
    """Whether the last ``patience`` validations brought no improvement; never with a patience of 0."""
    validations = [record for record in history if ACCEPTED_LENGTH in record]
    best = best_record(validations)
    if patience == 0 or best is None:
        return False
    return sum(record["step"] > best["step"] for record in validations) >= patience
