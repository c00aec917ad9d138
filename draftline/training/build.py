"""The one place that knows which objective trains which algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from draftline.spec import RunSpec
from draftline.target.load import Target
from draftline.training.block_objective import BlockObjective
from draftline.training.eagle3_objective import Eagle3Objective
from draftline.training.objective import Objective


def new_objective(spec: RunSpec, target: Target, counts: Sequence[tuple[int, int]]) -> Objective[Any]:
    """The objective of a spec's draft.

    Args:
        spec: The run spec.
        target: The frozen target.
        counts: Token counts of the corpus, likeliest first.

    Raises:
        SpecError: the draft does not fit the target.
    """
    if spec.draft.algorithm == "eagle3":
        return Eagle3Objective(spec, target, counts)
    return BlockObjective(spec, target, counts)
