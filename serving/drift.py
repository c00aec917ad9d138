"""Is the draft still as good as it was evaluated? Acceptance while serving, and an alarm when it fell.

What can be compared. The scheduler verifies less when load is high, so neither
the accepted length of a step nor the accepted share of verified tokens says
how good the draft is. Nor does the conditional acceptance at verified
positions alone: positions are verified *because* the confidence head expects
them to be accepted, so theirs is higher than that of whole blocks, by the more
the less is verified. It would hide a draft that has become bad and knows it.

What is compared is the accepted length that **whole blocks** would have, the
figure of the registered evaluation. Of a block whose first *l* drafts were
verified and *n* of them accepted, most is known: the first *k* drafts are all
accepted for k <= n, and not for k > n when n < l. Only where all that was
verified was accepted (n = l < k) is the rest unknown, censored in the sense of
survival analysis, and informatively so, which a product-limit estimate does
not allow. There the calibrated confidences stand in: a_k / a_l is the expected
outcome given what the draft saw. A calibrated head makes the estimate unbiased
whatever was verified; how calibrated it is, the scheduler measures beside it,
over verified positions (choosing by a prediction does not bias the error given
the prediction). A draft without confidences is verified in whole blocks, cut only at the end of an answer;
there the evaluation's own conditional acceptance stands in.

Two things remain and both err towards silence: requests that pause drafting
because it brings nothing are seen less often, and a head that became
overconfident lends its optimism to the unverified part.

Dimension letters: R requests of one step, B positions of a block.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftline.engine.requests import DraftedBlocks
from draftline.spec import DriftSpec
from draftline.spec.models import HELD_OUT

Array = NDArray[np.float64]

_LOOKS_PER_WINDOW = 10


@dataclass(frozen=True)
class DriftEvent:
    """Live acceptance is significantly lower than allowed.

    Attributes:
        model: Served model.
        draft: The draft, for example ``support-desk/3``.
        evaluated_length: Accepted length of whole blocks in the registered evaluation.
        live_length: The same while serving.
        drop: Share by which it is lower.
        max_drop: The share that is allowed.
        p_value: Probability of data like these where the drop is the one allowed.
        num_blocks: DraftedBlocks that were looked at.
        num_requests: Requests that they came from.
    """

    model: str
    draft: str
    evaluated_length: float
    live_length: float
    drop: float
    max_drop: float
    p_value: float
    num_blocks: int
    num_requests: int

    def to_json(self) -> str:
        """One line in the words of a Kubernetes event, with the figures beside them."""
        message = (
            f"draft {self.draft}: accepted length {self.live_length:.3f} while serving, {self.evaluated_length:.3f} "
            f"in its evaluation ({self.drop:.1%} lower, {self.max_drop:.1%} allowed, p = {self.p_value:.2g})"
        )
        head = {"type": "Warning", "reason": "DraftAcceptanceDrift", "message": message}
        return json.dumps({**head, **asdict(self)}, ensure_ascii=False)


class AcceptanceMonitor:
    """Estimates whole-block acceptance from whatever was verified, and tests it against the evaluation.

    The test is one-sided: is the mean accepted length below
    ``(1 - max_drop) * evaluated``? Blocks of one answer resemble one another,
    so its variance is that of sums by request (cluster-robust). It looks again
    after every tenth of the window.

    Args:
        spec: Limits.
        block_size: B.
        evaluated_B: Survival by position in the registered evaluation, ``None`` when there is none: then
            nothing is tested.
        names: Model and draft, for the event.
    """

    def __init__(
        self,
        spec: DriftSpec,
        block_size: int,
        evaluated_B: Sequence[float] | None,
        names: tuple[str, str] = ("", ""),
    ) -> None:
        self._spec = spec
        self._names = names
        self.block_size = block_size
        usable = evaluated_B is not None and len(evaluated_B) == block_size
        self.evaluated_B: Array | None = np.asarray(evaluated_B, dtype=np.float64) if usable else None
        self._stand_in_B = self.evaluated_B if self.evaluated_B is not None else np.ones(block_size)
        self._window: deque[tuple[str, Array]] = deque()
        self._sum_B = np.zeros(block_size)
        self._num_unseen = 0
        self._is_raised = False
        self.is_drifted = False

    def record(self, blocks: DraftedBlocks) -> DriftEvent | None:
        """Take the blocks of a step in; the event when an alarm is due, once until acceptance recovers."""
        outcomes_RB = whole_block_outcomes(blocks, self._stand_in_B)
        for request_id, outcome_B in zip(blocks.request_ids, outcomes_RB, strict=True):
            self._window.append((request_id, outcome_B))
            self._sum_B += outcome_B
        while len(self._window) > self._spec.window_blocks:
            self._sum_B -= self._window.popleft()[1]
        self._num_unseen += len(outcomes_RB)
        if self._num_unseen < max(self._spec.window_blocks // _LOOKS_PER_WINDOW, 1):
            return None
        self._num_unseen = 0
        # Sums of what came and went lose digits over days.
        self._sum_B = np.sum([outcome_B for _, outcome_B in self._window], axis=0)
        return self._judge()

    @property
    def num_blocks(self) -> int:
        """Blocks in the window."""
        return len(self._window)

    @property
    def survival_B(self) -> Array | None:
        """Live P(first k drafts accepted) of whole blocks, ``None`` before the first."""
        return self._sum_B / len(self._window) if self._window else None

    @property
    def live_length(self) -> float:
        """Live accepted length of whole blocks, bonus included; NaN before the first."""
        survival_B = self.survival_B
        return 1.0 + float(survival_B.sum()) if survival_B is not None else math.nan

    @property
    def evaluated_length(self) -> float:
        """The evaluation's accepted length of whole blocks, bonus included; NaN without one."""
        return 1.0 + float(self.evaluated_B.sum()) if self.evaluated_B is not None else math.nan

    @property
    def drop(self) -> float:
        """Share by which live is lower than evaluated; negative when it is higher, NaN when unknown."""
        return 1.0 - self.live_length / self.evaluated_length

    def _judge(self) -> DriftEvent | None:
        if self.evaluated_B is None or len(self._window) < self._spec.min_blocks:
            return None
        allowed = (1.0 - self._spec.max_drop) * self.evaluated_length
        # Numbered and summed at once: this runs between two steps, over tens of thousands of blocks.
        number: dict[str, int] = {}
        request_N = [number.setdefault(request_id, len(number)) for request_id, _ in self._window]
        if len(number) < self._spec.min_requests:
            return None
        shortfall_N = allowed - 1.0 - np.array([outcome_B for _, outcome_B in self._window]).sum(axis=1)
        p_value = cluster_p_value(np.column_stack([np.bincount(request_N, shortfall_N), np.bincount(request_N)]))
        self.is_drifted = p_value < self._spec.significance
        if not self.is_drifted:
            # Wavering about the limit must not raise one alarm after another.
            self._is_raised = self._is_raised and self.drop > self._spec.max_drop / 2
            return None
        if self._is_raised:
            return None
        self._is_raised = True
        model, draft = self._names
        return DriftEvent(
            model,
            draft,
            evaluated_length=self.evaluated_length,
            live_length=self.live_length,
            drop=self.drop,
            max_drop=self._spec.max_drop,
            p_value=p_value,
            num_blocks=len(self._window),
            num_requests=len(number),
        )


def whole_block_outcomes(blocks: DraftedBlocks, stand_in_B: Array) -> Array:
    """Whether the first k drafts are all accepted, ``[R, B]``: 0 or 1 where known, else its expectation.

    Args:
        blocks: Of one step.
        stand_in_B: Survival to complete a block with that has no confidences.
    """
    positions = np.arange(1, len(stand_in_B) + 1)
    outcomes_RB = (positions[None] <= blocks.num_accepted_R[:, None]).astype(np.float64)
    is_unknown = (blocks.num_accepted_R == blocks.num_verified_R)[:, None] & (
        positions[None] > blocks.num_verified_R[:, None]
    )
    if not is_unknown.any():
        return outcomes_RB
    survival_RB = blocks.survival_RB if blocks.survival_RB is not None else stand_in_B[None]
    survival_RB = np.broadcast_to(survival_RB, outcomes_RB.shape)
    before = np.maximum(blocks.num_verified_R - 1, 0)[:, None]
    reached = np.where(blocks.num_verified_R[:, None] > 0, np.take_along_axis(survival_RB, before, axis=1), 1.0)
    expected_RB = survival_RB / np.maximum(reached, 1e-12)
    return np.where(is_unknown, np.minimum(expected_RB, 1.0), outcomes_RB)


def cluster_p_value(sums: Array) -> float:
    """One-sided p-value of "the mean is not above 0" from clusters, by the normal law of their sums.

    Args:
        sums: ``[clusters, 2]``: sum of the values and their number.
    """
    totals, counts = sums[:, 0], sums[:, 1]
    num = len(sums)
    mean = totals.sum() / counts.sum()
    squares = float(np.square(totals - counts * mean).sum()) * num / max(num - 1, 1)
    error = math.sqrt(squares) / float(counts.sum())
    if error == 0.0:
        return 0.0 if mean > 0 else 1.0
    return 1.0 - NormalDist().cdf(float(mean) / error)


def evaluated_survival(metrics_file: Path) -> tuple[float, ...] | None:
    """Survival by position in a registered ``metrics.json``, ``None`` when it holds none.

    Of the held-out suite, which is the team's own traffic (else of the first);
    of its temperatures the one with the lowest: nobody knows the mix that
    clients will ask for, and an alarm must not come from the mix alone.
    """
    try:
        suites = json.loads(metrics_file.read_text(encoding="utf-8"))["suites"]
        suite: Mapping[str, Any] = suites.get(HELD_OUT) or next(iter(suites.values()))
        found = [suite, *(suite.get("by_temperature") or ())]
        curves = [
            tuple(float(p) for p in one["survival_by_position"]) for one in found if "survival_by_position" in one
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None
    curves = [curve for curve in curves if curve and all(0.0 <= p <= 1.0 for p in curve)]
    return min(curves, key=sum, default=None)
