"""A target whose forwards are counted."""

from __future__ import annotations

import pytest

from draftline.target.load import Target


def count_rows(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every forward of the target from here on."""
    rows: list[int] = []
    forward = target.model.forward

    def counted(batch, cache, taps=()):  # type: ignore[no-untyped-def]
        rows.append(len(batch.token_ids_N))
        return forward(batch, cache, taps)

    monkeypatch.setattr(target.model, "forward", counted)
    return rows
