"""A draft's calibration and its file; numpy only."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from draftline.calibration.maps import Array, SurvivalMap, Temperatures, map_from_json
from draftline.errors import FormatError

FORMAT_VERSION = 2
"""1 knew temperatures alone; 2 names the method and holds its map."""

Method = Literal["raw", "sts", "bias", "isotonic"]
"""The kinds of map: confidences as they are, and :mod:`draftline.calibration.maps`."""


@dataclass(frozen=True)
class Calibration:
    """What turns a draft's confidence logits into survival.

    Attributes:
        temperatures: T_k divides the confidence logit at position k (sequential
            temperature scaling, paper 3.2.1). Always there, because the file is
            SGLang's; used by :meth:`survival` when ``method`` is ``sts``.
        dataset: What it was fitted on.
        num_samples: Verify steps it was fitted on.
        ece_before: Expected calibration error of the cumulative survival per
            position, raw.
        ece_after: The same after the chosen map.
        extra: Further facts (candidates, AUC, reliability bins, cost table).
        method: The chosen kind of map.
        chosen: Its map, where it is neither raw nor the temperatures.

    Raises:
        ValueError: temperatures or map are impossible, or do not belong to each other.
    """

    temperatures: tuple[float, ...]
    dataset: str = ""
    num_samples: int = 0
    ece_before: tuple[float, ...] = ()
    ece_after: tuple[float, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    method: Method = "sts"
    chosen: SurvivalMap | None = None

    def __post_init__(self) -> None:
        """See the class."""
        if self.method not in get_args(Method):
            raise ValueError(f"unknown method {self.method!r}")
        if (self.chosen is None) != (self.method in ("raw", "sts")):
            raise ValueError(f"method {self.method} and a map of the kind {type(self.chosen).__name__}")
        if self.map.num_positions != len(self.temperatures):
            raise ValueError(f"{len(self.temperatures)} temperatures, a map of {self.map.num_positions} positions")

    @property
    def expected_survival(self) -> tuple[float, ...] | None:
        """Share of the calibration blocks whose first k drafts were all accepted, by k; ``None`` in older files."""
        found = self.extra.get("survival")
        return tuple(float(value) for value in found) if found else None

    @classmethod
    def identity(cls, block_size: int) -> Calibration:
        """Leaves confidences as they are."""
        return cls((1.0,) * block_size, method="raw")

    @cached_property
    def map(self) -> SurvivalMap:
        """The map in use."""
        if self.chosen is not None:
            return self.chosen
        return Temperatures(self.temperatures if self.method == "sts" else (1.0,) * len(self.temperatures))

    def survival(self, logits_RB: Array) -> Array:
        """Cumulative survival a_k ``[R, B]``: the probability that the first k drafts are all accepted.

        Rises with every logit, never rises over k, and a_k depends on the logits
        of positions up to k alone. A logit that is not a number counts as certain
        rejection.

        Args:
            logits_RB: Raw confidence logits, of as many positions as the map
                knows or fewer.
        """
        return self.map.survival(logits_RB)

    def to_json(self) -> str:
        """SGLang's STS document (means over positions), with our details added."""
        own: dict[str, Any] = {
            **self.extra,
            "version": FORMAT_VERSION,
            "ece_before": list(self.ece_before),
            "ece_after": list(self.ece_after),
            "method": self.method,
        }
        if self.chosen is not None:
            own["map"] = self.chosen.to_json()
        document = {
            "temperatures": list(self.temperatures),
            "dataset": self.dataset,
            "num_samples": self.num_samples,
            "ece_before": float(np.mean(self.ece_before)) if self.ece_before else None,
            "ece_after": float(np.mean(self.ece_after)) if self.ece_after else None,
            "draftline": own,
        }
        return json.dumps(document, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read :meth:`to_json`, a file of an older version, or a plain STS file.

        Raises:
            FormatError: not such a document, a newer one, or one of an unknown method.
        """
        try:
            document = json.loads(text)
            own = dict(document.get("draftline", {"version": FORMAT_VERSION}))
            version = int(own.pop("version"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(error) from None
        if version > FORMAT_VERSION:
            raise FormatError(
                "the calibration file is newer than this Draftline",
                got=f"version {version}",
                expected=f"at most {FORMAT_VERSION}",
                remedy="Update Draftline, or run the calibration step again",
            )
        try:
            temperatures = tuple(float(t) for t in document["temperatures"])
            before, after = tuple(own.pop("ece_before", ())), tuple(own.pop("ece_after", ()))
            method = own.pop("method", "sts")
            parameters = own.pop("map", None)
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(error) from None
        if method not in get_args(Method):
            raise FormatError(
                "the calibration file's method is unknown",
                got=method,
                expected=", ".join(get_args(Method)),
                remedy="Run the calibration step again",
            )
        if not temperatures or not all(0 < t < np.inf for t in temperatures):
            raise FormatError(
                "the calibration file has impossible temperatures", got=temperatures, expected="all above 0"
            )
        try:
            chosen = None if parameters is None else map_from_json(method, parameters)
            return cls(
                temperatures,
                document.get("dataset", ""),
                document.get("num_samples", 0),
                before,
                after,
                own,
                method,
                chosen,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(error) from None


def _damaged(error: Exception) -> FormatError:
    return FormatError(f"the calibration file is damaged ({error})", remedy="Run the calibration step again")
