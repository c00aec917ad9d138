"""What a step costs: a table by tokens and requests; numpy only.

Reading keys and values makes the cost of a verify step depend on the number of
requests as well as on the number of tokens, so the paper's SPS(B) becomes a
table of two dimensions. Drafting is a curve by requests.

Dimension letters: S numbers of requests, T numbers of tokens, K draft tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftline.errors import FormatError

FORMAT = "draftline.step-costs"
FORMAT_VERSION = 1
_LEAST_CONTEXT_SHARE = 0.5
"""A step at a short context costs at least this share of the same step at the context measured at."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CostTable:
    """Milliseconds of a verify step and of drafting; both never fall as the step grows.

    Attributes:
        requests: Numbers of requests measured at, ascending.
        tokens: Numbers of tokens of all requests together, ascending.
        verify_ms: ``[S][T]``, not falling along either axis. Cells with fewer
            tokens than requests cannot occur; they are there for interpolation.
        draft_requests: Numbers of requests drafting was measured at, ascending.
        draft_ms: Of drafting one block for so many; empty without a draft.
        context_tokens: Context of every request while measuring.
        context_ms: Further milliseconds for each request and token of context.
        overhead_ms: Of a step whatever its size, outside target and draft.
        facts: Where and of what it was measured; see :meth:`mismatches`. A
            table without any was told, and is taken as it is: neither scaled to
            the time that steps take nor measured anew for another draft.
    """

    requests: tuple[int, ...]
    tokens: tuple[int, ...]
    verify_ms: tuple[tuple[float, ...], ...]
    draft_requests: tuple[int, ...] = ()
    draft_ms: tuple[float, ...] = ()
    context_tokens: int = 0
    context_ms: float = 0.0
    overhead_ms: float = 0.0
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        grid = np.asarray(self.verify_ms, dtype=np.float64)
        draft = np.asarray(self.draft_ms, dtype=np.float64)
        flaw = None
        if not _ascends(self.requests) or not _ascends(self.tokens):
            flaw = "requests and tokens must ascend from 1 or more"
        elif grid.shape != (len(self.requests), len(self.tokens)):
            flaw = f"verify_ms must be {len(self.requests)} by {len(self.tokens)}"
        elif not np.isfinite(grid).all() or grid.min() <= 0:
            flaw = "verify_ms must be above 0"
        elif (np.diff(grid, axis=0) < 0).any() or (np.diff(grid, axis=1) < 0).any():
            flaw = "verify_ms must not fall with more requests or more tokens"
        elif len(self.draft_requests) != len(draft) or (len(draft) and not _ascends(self.draft_requests)):
            flaw = "draft_requests must ascend, with one of draft_ms each"
        elif len(draft) and (not np.isfinite(draft).all() or draft.min() < 0 or (np.diff(draft) < 0).any()):
            flaw = "draft_ms must be 0 or more and not fall"
        elif not (0 <= self.context_ms < np.inf and 0 <= self.overhead_ms < np.inf and self.context_tokens >= 0):
            flaw = "context_tokens, context_ms and overhead_ms must be 0 or more"
        if flaw is not None:
            raise FormatError(f"the step-cost table is impossible: {flaw}", remedy="Profile the machine again")
        object.__setattr__(self, "_grid_ST", grid)
        object.__setattr__(self, "_curves", {})
        object.__setattr__(self, "_drafts", [])

    @classmethod
    def from_points(
        cls,
        verify: Mapping[tuple[int, int], float],
        draft: Mapping[int, float] | None = None,
        **rest: Any,
    ) -> CostTable:
        """From single measurements, made monotone: where a larger step was quicker, both are noise.

        Args:
            verify: ``(requests, tokens) -> ms``. What lies between is completed
                as if requests and tokens added up.
            draft: ``requests -> ms``.
            **rest: Further attributes.
        """
        requests = tuple(sorted({r for r, _ in verify}))
        tokens = tuple(sorted({t for _, t in verify}))
        draft = draft or {}
        draft_requests = tuple(sorted(draft))
        return cls(
            requests,
            tokens,
            _rows(_monotone(_completed(verify, requests, tokens))),
            draft_requests,
            tuple(_monotone(np.array([[draft[r] for r in draft_requests]]))[0].tolist()) if draft else (),
            **rest,
        )

    def with_draft(self, draft: Mapping[int, float], facts: Mapping[str, str] | None = None) -> CostTable:
        """The same machine and target with another draft."""
        measured = CostTable.from_points({(1, 1): 1.0}, draft)
        return replace(
            self,
            draft_requests=measured.draft_requests,
            draft_ms=measured.draft_ms,
            facts={**self.facts, **(facts or {})},
        )

    @property
    def is_measured(self) -> bool:
        """Whether it speaks of some machine."""
        return bool(self.facts)

    def covers(self, num_requests: int, num_tokens: int) -> bool:
        """Whether it was measured up to a size, so that nothing in between is guessed."""
        return self.requests[-1] >= num_requests and self.tokens[-1] >= num_tokens

    # -- reading ------------------------------------------------------------------------------------------------

    def draft_cost(self, num_requests: int) -> float:
        """Milliseconds of drafting a block for so many requests; 0 for none or without a draft."""
        if num_requests <= 0 or not self.draft_ms:
            return 0.0
        curve: list[float] = self.__dict__["_drafts"]
        if num_requests >= len(curve):
            curve[:] = self._draft_curve(max(2 * num_requests, self.draft_requests[-1]))
        return curve[num_requests]

    def _draft_curve(self, most: int) -> list[float]:
        measured = np.array([self.draft_ms])
        at = np.arange(1, most + 1)
        slope = _slope(self.draft_requests, measured)
        return [0.0, *_extended(at, self.draft_requests, measured[0], slope).tolist()]

    def verify_cost(self, num_tokens: int, num_requests: int, context: float | None = None) -> float:
        """Milliseconds of one target step over so many tokens of so many requests.

        Args:
            num_tokens: Of all requests together.
            num_requests: That have tokens in it.
            context: Their mean context; the one measured at when ``None``.
        """
        if num_tokens <= 0 or num_requests <= 0:
            return 0.0
        curve = self.verify_curve(num_requests, num_tokens)
        return float(curve[num_tokens]) + self.context_extra(num_requests, context, float(curve[num_tokens]))

    def context_extra(self, num_requests: int, context: float | None, base_ms: float) -> float:
        """What another context than the measured one adds to a step of ``base_ms`` (below 0 for a shorter one)."""
        if context is None:
            return 0.0
        extra = self.context_ms * num_requests * (context - self.context_tokens)
        return max(extra, (_LEAST_CONTEXT_SHARE - 1) * base_ms)

    def verify_curve(self, num_requests: int, most_tokens: int) -> Array:
        """Milliseconds by tokens, 0 to at least ``most_tokens``, at a number of requests; read-only."""
        curves: dict[int, Array] = self.__dict__["_curves"]
        curve = curves.get(num_requests)
        if curve is None or len(curve) <= most_tokens:
            grid: Array = self.__dict__["_grid_ST"]
            at = np.arange(max(most_tokens, 2 * self.tokens[-1]) + 1)
            # One slope for all rows: rows of their own slopes could cross beyond the table.
            curve = _extended(at, self.tokens, self._row(num_requests), _slope(self.tokens, grid))
            curve.setflags(write=False)
            curves[num_requests] = curve
        return curve

    def _row(self, num_requests: int) -> Array:
        grid: Array = self.__dict__["_grid_ST"]
        slope = _slope(self.requests, grid.T) if len(self.requests) > 1 else 0.0
        at = np.array([float(num_requests)])
        return np.array([_extended(at, self.requests, column, slope)[0] for column in grid.T])

    # -- documents ----------------------------------------------------------------------------------------------

    def mismatches(self, facts: Mapping[str, str]) -> list[str]:
        """What differs between where this was measured and ``facts``, in words; empty where it may be used."""
        return [
            f"{name}: {self.facts.get(name, 'unknown')} there, {value} here"
            for name, value in facts.items()
            if self.facts.get(name) != value
        ]

    def to_json(self) -> dict[str, Any]:
        """The document that :meth:`from_json` reads."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "facts": dict(self.facts),
            "requests": list(self.requests),
            "tokens": list(self.tokens),
            "verify_ms": [list(row) for row in self.verify_ms],
            "draft_requests": list(self.draft_requests),
            "draft_ms": list(self.draft_ms),
            "context_tokens": self.context_tokens,
            "context_ms": self.context_ms,
            "overhead_ms": self.overhead_ms,
        }

    @classmethod
    def from_json(cls, document: object) -> CostTable:
        """Read :meth:`to_json`.

        Raises:
            FormatError: not such a document, damaged, or newer.
        """
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise FormatError("this is no step-cost table", expected=f"a document of format {FORMAT!r}")
        if document.get("version") != FORMAT_VERSION:
            raise FormatError(
                "the step-cost table is of another version",
                got=document.get("version"),
                expected=str(FORMAT_VERSION),
                remedy="Profile the machine again",
            )
        try:
            return cls(
                tuple(int(n) for n in document["requests"]),
                tuple(int(n) for n in document["tokens"]),
                tuple(tuple(float(ms) for ms in row) for row in document["verify_ms"]),
                tuple(int(n) for n in document["draft_requests"]),
                tuple(float(ms) for ms in document["draft_ms"]),
                int(document["context_tokens"]),
                float(document["context_ms"]),
                float(document["overhead_ms"]),
                {str(name): str(value) for name, value in document["facts"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                f"the step-cost table is damaged ({error!r})", remedy="Profile the machine again"
            ) from None

    def dumps(self) -> str:
        """:meth:`to_json` as text."""
        return json.dumps(self.to_json(), indent=1, sort_keys=True)

    def sps_table(self) -> dict[str, Any]:
        """SGLang's one-dimensional table: steps per second by tokens, at the fewest requests measured that carry them.

        It is read by ``--speculative-dspark-sps-table-path``. Drafting is left
        out, as in the profiler that SGLang ships.
        """
        most = self._most_per_request()
        samples: dict[int, float] = {}
        for tokens in self.tokens:
            requests = next((r for r in self.requests if r <= tokens <= r * most), None)
            if requests is not None:
                samples[tokens] = 1000 / self.verify_cost(tokens, requests)
        return {
            "sample_batch_tokens": list(samples),
            "sample_steps_per_sec": list(samples.values()),
            "max_batch_tokens": max(samples),
        }

    def additive_table(self) -> dict[str, Any]:
        """SGLang's other form, T(R, B) = bias + alpha(R) + theta(B) in seconds; drafting is part of alpha."""
        grid: Array = self.__dict__["_grid_ST"] / 1000
        theta = np.maximum.accumulate(np.mean(grid - grid[:, :1], axis=0))
        alpha = np.mean(grid - grid[:1, :], axis=1)
        draft = np.array([self.draft_cost(r) for r in self.requests]) / 1000
        bias = float(grid[0, 0] + draft[0])
        return {
            "bias_seconds": bias,
            "bs_probes": list(self.requests),
            "alpha_seconds": np.maximum.accumulate(alpha + draft - draft[0]).tolist(),
            "m_probes": list(self.tokens),
            "theta_seconds": theta.tolist(),
        }

    def _most_per_request(self) -> int:
        return max(1, self.tokens[-1] // self.requests[-1])


def _ascends(numbers: Sequence[int]) -> bool:
    return bool(numbers) and numbers[0] >= 1 and all(a < b for a, b in pairwise(numbers))


def _completed(verify: Mapping[tuple[int, int], float], requests: Sequence[int], tokens: Sequence[int]) -> Array:
    """Fill a grid of which a band is known: a step of another size differs as it does in the neighbouring row."""
    grid = np.full((len(requests), len(tokens)), np.nan)
    for (r, t), ms in verify.items():
        grid[requests.index(r), tokens.index(t)] = ms
    at = np.asarray(tokens, dtype=np.float64)
    for row in grid:
        known = np.flatnonzero(~np.isnan(row))
        inside = np.arange(known[0], known[-1] + 1)
        row[inside] = np.interp(at[inside], at[known], row[known])
    for i in range(len(requests) - 2, -1, -1):
        _lengthen(grid[i], grid[i + 1], at)
    for i in range(1, len(requests)):
        _lengthen(grid[i], grid[i - 1], at)
    for row in grid:
        known = np.flatnonzero(~np.isnan(row))
        points = [int(t) for t in at[known]]
        row[:] = np.where(np.isnan(row), _extended(at, points, row[known], _slope(points, row[None, known])), row)
    filled: Array = np.maximum(grid, 1e-6)
    return filled


def _lengthen(row: Array, neighbour: Array, at: Array) -> None:
    """Continue a row beyond both ends by the neighbour's differences, where those are known."""
    known = np.flatnonzero(~np.isnan(row))
    for end, missing in ((known[-1], range(known[-1] + 1, len(at))), (known[0], range(known[0]))):
        for j in missing:
            if not np.isnan(neighbour[j]) and not np.isnan(neighbour[end]):
                row[j] = row[end] + neighbour[j] - neighbour[end]


def _monotone(grid: Array) -> Array:
    """The mean of the least monotone grid above and the greatest below: monotone, and a lone outlier counts half."""
    above = np.maximum.accumulate(np.maximum.accumulate(grid, axis=0), axis=1)
    flipped = np.minimum.accumulate(np.minimum.accumulate(grid[::-1, ::-1], axis=0), axis=1)
    mean: Array = (above + flipped[::-1, ::-1]) / 2
    return mean


def _extended(at: NDArray[Any], points: Sequence[int], values: Array, slope: float) -> Array:
    """Linear between points, beyond the last by a slope, below the first as there."""
    extended: Array = np.interp(at, points, values) + np.maximum(0.0, at - points[-1]) * slope
    return extended


def _slope(points: Sequence[int], rows: Array) -> float:
    """How fast to go on beyond the last point: the steeper of the last and the mean slope, so that no cost is left out.

    The mean over rows; of a single point the slope from nothing.
    """
    if len(points) == 1:
        return float(rows.mean() / points[0])
    last = (rows[:, -1] - rows[:, -2]) / (points[-1] - points[-2])
    mean = (rows[:, -1] - rows[:, 0]) / (points[-1] - points[0])
    return max(0.0, float(np.maximum(last, mean).mean()))


def _rows(grid: Array) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in grid.tolist())
