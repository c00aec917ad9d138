"""Which requests are looked at."""

from __future__ import annotations

import hashlib

_SCALE = float(2**64)


def is_sampled(request_id: str, rate: float) -> bool:
    """Whether a request belongs to the sample; the same answer for the same id, everywhere.

    Args:
        request_id: As the client sees it.
        rate: Share of all ids, 0 to 1. A larger rate keeps what a smaller one keeps.
    """
    drawn = int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big") / _SCALE
    return drawn < rate
