"""Tiny drafts, laid out like registered models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from draftline.calibration.survival import Calibration
from draftline.registry_layout import CALIBRATION_FILE
from draftline.target.lean import ModelConfig
from tests.servers.tiny_target import tiny_draft_config, write_tiny_draft

BLOCK_SIZE = 3


def write_draft(
    folder: Path, target: Path, *, seed: int, is_misfit: bool = False, num_temperatures: int | None = None
) -> Path:
    """A random draft for the target in that directory, or one that no engine may take for it."""
    config = tiny_draft_config(ModelConfig.from_hf(json.loads((target / "config.json").read_text())))
    if is_misfit:
        config = replace(config, hidden_size=2 * config.hidden_size, head_dim=2 * config.head_dim)
    write_tiny_draft(folder / "draft", config, seed=seed)
    if num_temperatures is not None:
        (folder / CALIBRATION_FILE).write_text(Calibration.identity(num_temperatures).to_json())
    return folder
