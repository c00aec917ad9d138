"""By what, and from what, a registered draft was made."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import draftline
from draftline.steps import Ledger, StepContext
from draftline.steps.ledger import step_prefix
from draftline.storage.base import ObjectStore

COMMIT_ENV = "DRAFTLINE_COMMIT"
"""Set in an image when it is built; a checkout is asked by git."""
UNKNOWN = "unknown"
_GIT_TIMEOUT_S = 10.0


def provenance_tags(context: StepContext) -> dict[str, str]:
    """Package version, git commit, and the sha256 of every prompt file, as version tags."""
    return {
        "draftline.version": draftline.__version__,
        "draftline.commit": git_commit(),
        **{f"draftline.prompts.sha256.{split}": digest for split, digest in _prompt_digests(context).items()},
    }


def provenance_section(tags: Mapping[str, str]) -> str:
    """The same as a section of the card."""
    rows = "\n".join(f"| {name.removeprefix('draftline.')} | `{value}` |" for name, value in sorted(tags.items()))
    return f"\n## Made by\n\n| what | which |\n| --- | --- |\n{rows}\n"


def git_commit(environ: Mapping[str, str] = os.environ, folder: Path | None = None) -> str:
    """Commit of the code that runs, with ``-dirty`` where files differ from it; ``unknown`` outside a checkout.

    Args:
        environ: Looked at for ``DRAFTLINE_COMMIT`` first.
        folder: Of the checkout; the package's own when absent.
    """
    if given := environ.get(COMMIT_ENV, "").strip():
        return given[:100]
    root = folder or Path(draftline.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return UNKNOWN
    head = _git(root, "rev-parse", "HEAD")
    if not re.fullmatch(r"[0-9a-f]{40,64}", head):
        return UNKNOWN
    return head + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _prompt_digests(context: StepContext) -> dict[str, str]:
    """Empty where the prompts step is no longer in the workspace."""
    ledger = Ledger(context.store)
    key = context.inputs["calibration"].inputs.get("prompts")
    prompts = ledger.find("prompts", key) if key else None
    if prompts is None:
        return {}
    prefix = step_prefix("prompts", prompts.key)
    return {
        split: _digest(context.store, f"{prefix}/{file}")
        for split, file in sorted(prompts.outputs.get("files", {}).items())
        if context.store.head(f"{prefix}/{file}") is not None
    }


def _digest(store: ObjectStore, key: str) -> str:
    return hashlib.sha256(store.get(key)).hexdigest()
