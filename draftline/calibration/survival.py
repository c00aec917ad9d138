"""From confidence logits to the probability that a prefix survives; numpy only."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftline.errors import FormatError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """One temperature per position (sequential temperature scaling, paper 3.2.1).

    Attributes:
        temperatures: T_k divides the confidence logit at position k.
        dataset: What it was fitted on.
        num_samples: Verify steps it was fitted on.
        ece_before: Expected calibration error of the cumulative survival per
            position, raw.
        ece_after: The same after scaling.
        extra: Further facts (AUC, reliability bins, cost table).
    """

    temperatures: tuple[float, ...]
    dataset: str = ""
    num_samples: int = 0
    ece_before: tuple[float, ...] = ()
    ece_after: tuple[float, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def expected_survival(self) -> tuple[float, ...] | None:
        """Share of the calibration blocks whose first k drafts were all accepted, by k; ``None`` in older files."""
        found = self.extra.get("survival")
        return tuple(float(value) for value in found) if found else None

    @classmethod
    def identity(cls, block_size: int) -> Calibration:
        """Leaves confidences as they are."""
        return cls((1.0,) * block_size)

    def survival(self, logits_RB: NDArray[np.float64]) -> NDArray[np.float64]:
        """Cumulative survival a_k = prod_{i<=k} sigmoid(logit_i / T_i), ``[R, B]``."""
        temperatures = np.asarray(self.temperatures)[: logits_RB.shape[1]]
        scaled = np.clip(logits_RB / temperatures, -60, 60)
        survival: NDArray[np.float64] = np.cumprod(1 / (1 + np.exp(-scaled)), axis=1)
        return survival

    def to_json(self) -> str:
        """SGLang's STS document (means over positions), with our details added."""
        document = {
            "temperatures": list(self.temperatures),
            "dataset": self.dataset,
            "num_samples": self.num_samples,
            "ece_before": float(np.mean(self.ece_before)) if self.ece_before else None,
            "ece_after": float(np.mean(self.ece_after)) if self.ece_after else None,
            "draftline": {
                "version": FORMAT_VERSION,
                "ece_before": list(self.ece_before),
                "ece_after": list(self.ece_after),
                **self.extra,
            },
        }
        return json.dumps(document, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read :meth:`to_json`, or a plain STS file.

        Raises:
            FormatError: not such a document, or a newer one.
        """
        try:
            document = json.loads(text)
            own = dict(document.get("draftline", {"version": FORMAT_VERSION}))
            version = own.pop("version")
            temperatures = tuple(float(t) for t in document["temperatures"])
            before, after = tuple(own.pop("ece_before", ())), tuple(own.pop("ece_after", ()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                f"the calibration file is damaged ({error})", remedy="Run the calibration step again"
            ) from None
        if version != FORMAT_VERSION:
            raise FormatError("the calibration file is newer", got=version, expected=str(FORMAT_VERSION))
        if not temperatures or any(not t > 0 for t in temperatures):
            raise FormatError(
                "the calibration file has impossible temperatures", got=temperatures, expected="all above 0"
            )
        return cls(temperatures, document.get("dataset", ""), document.get("num_samples", 0), before, after, own)
