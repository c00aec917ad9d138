"""Read a trained draft out of the workspace, digests checked."""

from __future__ import annotations

from draftline.digests import digest_of, require_digest
from draftline.draft.checkpoint import CONFIG_FILE, WEIGHTS_FILE, DraftModel, from_files
from draftline.steps.ledger import StepResult
from draftline.storage.base import ObjectStore


def stored_draft(store: ObjectStore, draft: StepResult) -> DraftModel:
    """The draft that a draft step committed.

    Raises:
        FormatError: a file is not what was recorded.
        StorageError: it cannot be read.
    """
    data = {}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        key = f"{draft.prefix}/draft/{name}"
        data[name] = store.get(key)
        remedy = "Delete the draft step's folder and run again"
        require_digest(digest_of(data[name]), draft.outputs["files"][name], f"{key} is not what was trained", remedy)
    return from_files(data[CONFIG_FILE], data[WEIGHTS_FILE], origin=draft.prefix)
