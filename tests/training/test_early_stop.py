"""Early stop as a pure function of the history."""

from __future__ import annotations

from draftline.training.early_stop import best_record, is_exhausted


def history(*lengths: float) -> list[dict[str, float]]:
    """A validation at every tenth step, a plain record between."""
    records: list[dict[str, float]] = []
    for number, length in enumerate(lengths):
        records += [{"step": 10 * number + 5, "loss": 1.0}, {"step": 10 * number + 10, "accepted_length": length}]
    return records


def test_the_best_is_the_first_of_the_longest() -> None:
    assert best_record([]) is None and best_record([{"step": 3, "loss": 1.0}]) is None
    best = best_record(history(1.2, 1.9, 1.9, 1.4))
    assert best is not None and best["step"] == 20


def test_it_stops_after_so_many_validations_without_a_longer_one() -> None:
    assert not is_exhausted(history(1.2, 1.9, 1.4), 2)
    assert is_exhausted(history(1.2, 1.9, 1.4, 1.9), 2), "an equal length is no improvement"
    assert not is_exhausted(history(1.2, 1.9, 1.4, 2.0), 2)
    assert not is_exhausted(history(1.9, 1.0, 1.0, 1.0), 0), "0 never stops"
    assert not is_exhausted([], 1)
