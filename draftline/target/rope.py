"""Facts of a rotary position embedding beyond its base (torch-free).

Three scalings occur in the supported families; Hugging Face's
``modeling_rope_utils`` is their definition:

- ``linear``: every frequency divided by ``factor`` (Gemma 3).
- ``llama3``: long wavelengths divided by ``factor``, short ones kept, a smooth
  passage between (Llama 3.1).
- ``proportional``: only the first ``partial_rotary_factor`` of the pairs
  rotates, at the frequencies of the whole head (Gemma 4's global layers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("default", "linear", "llama3", "proportional")


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies differ from ``theta ** (-2i / head_dim)``.

    Attributes:
        kind: ``linear``, ``llama3`` or ``proportional``.
        factor: Divisor of scaled frequencies.
        low_freq_factor: Of ``llama3``.
        high_freq_factor: Of ``llama3``.
        original_max_positions: Of ``llama3``: context length before the scaling.
        partial_rotary_factor: Of ``proportional``: share of the head that rotates.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    partial_rotary_factor: float = 1.0

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any]) -> RopeScaling | None:
        """Read ``rope_parameters`` (or the older ``rope_scaling``) of a Hugging Face config.

        Raises:
            KeyError: a field of the scaling is missing.
            ValueError: the kind is unknown; the argument is its name.
        """
        # Older configs say "type".
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        if kind == "linear":
            return cls(kind, factor=float(rope["factor"]))
        if kind == "llama3":
            return cls(
                kind,
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_max_positions=int(rope["original_max_position_embeddings"]),
            )
        if kind == "proportional":
            return cls(
                kind,
                factor=float(rope.get("factor", 1.0)),
                partial_rotary_factor=float(rope.get("partial_rotary_factor", 1.0)),
            )
        raise ValueError(kind)

    def to_hf(self) -> dict[str, Any]:
        """The fields beside ``rope_theta`` in ``rope_parameters``."""
        if self.kind == "linear":
            return {"rope_type": self.kind, "factor": self.factor}
        if self.kind == "llama3":
            return {
                "rope_type": self.kind,
                "factor": self.factor,
                "low_freq_factor": self.low_freq_factor,
                "high_freq_factor": self.high_freq_factor,
                "original_max_position_embeddings": self.original_max_positions,
            }
        document: dict[str, Any] = {"rope_type": self.kind, "partial_rotary_factor": self.partial_rotary_factor}
        return document if self.factor == 1.0 else {**document, "factor": self.factor}
