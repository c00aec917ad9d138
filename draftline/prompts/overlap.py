"""Which prompts the configured evaluation suites remove, as part of the prompts station's key."""

from __future__ import annotations

import hashlib

from draftline.evaluation.suites import configured_texts
from draftline.prompts.clean import overlapping_lines
from draftline.prompts.source import read_source
from draftline.spec import RunSpec


def overlap_digest(spec: RunSpec) -> str | None:
    """Digest of the line numbers that overlap a configured suite; ``None`` when none does.

    Not a digest of the suites: measuring on one more suite must not train the
    draft again unless prompts have to go for it. HumanEval's package is left
    out, because its problems are removed from every run's prompts.

    Raises:
        InputError: the prompts or a suite cannot be read.
        FormatError: a suite's file is damaged.
        StorageError: an object that cannot be read.
    """
    suites = list(configured_texts(spec.evaluation))
    lines = overlapping_lines(read_source(spec.prompts).lines(), spec.prompts, suites) if suites else ()
    return hashlib.sha256(repr(lines).encode()).hexdigest() if lines else None
