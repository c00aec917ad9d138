"""Training checkpoints in the workspace: atomic, exact, the last few kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from draftline.storage.base import ObjectStore

_NAME = re.compile(r"step-(\d{8})\.safetensors$")


@dataclass(frozen=True)
class TrainingCheckpoint:
    """Everything to go on as if nothing had happened.

    Attributes:
        step: Finished optimiser steps.
        tensors: Parameters (``model.*``) and optimiser state.
        history: What was logged so far.
    """

    step: int
    tensors: dict[str, Tensor]
    history: list[dict[str, Any]]


class CheckpointStore:
    """Checkpoints of one training run, under one prefix.

    Args:
        store: The workspace.
        prefix: Folder.
        keep: How many of the newest stay.
    """

    def __init__(self, store: ObjectStore, prefix: str, keep: int = 2) -> None:
        self._store = store
        self._prefix = prefix
        self._keep = keep

    def save(self, checkpoint: TrainingCheckpoint) -> None:
        """Write one (the store's put is atomic), then drop the oldest."""
        tensors = {k: v.detach().contiguous() for k, v in checkpoint.tensors.items()}
        document = {"step": checkpoint.step, "history": checkpoint.history, "sha256": _digest(tensors)}
        data = save_safetensors(tensors, {"draftline": json.dumps(document, sort_keys=True)})
        self._store.put(f"{self._prefix}/step-{checkpoint.step:08d}.safetensors", data)
        for key in self._keys()[: -self._keep]:
            self._store.delete(key)

    def latest(self) -> TrainingCheckpoint | None:
        """The newest readable checkpoint; a damaged one is passed over."""
        for key in reversed(self._keys()):
            data = self._store.get(key)
            try:
                tensors = load_safetensors(data)
                length = int.from_bytes(data[:8], "little")
                document = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["draftline"])
                found = TrainingCheckpoint(document["step"], tensors, document["history"])
                is_whole = document["sha256"] == _digest(tensors)
            except (SafetensorError, ValueError, KeyError):
                continue
            if is_whole:
                return found
        return None

    def _keys(self) -> list[str]:
        return [info.key for info in self._store.list(f"{self._prefix}/") if _NAME.search(info.key)]


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
