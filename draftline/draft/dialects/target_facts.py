"""What a draft's checkpoint says about its target (torch-free)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from draftline.errors import TargetError


@dataclass(frozen=True)
class TargetFacts:
    """Facts of a target, from its ``config.json``.

    Attributes:
        name: What the user calls it: a directory or a hub id.
        architectures: As its config says, for example ``Qwen3ForCausalLM``.
        num_layers: Decoder layers.
        hidden_size: D.
        vocab_size: V.
        max_positions: Longest sequence; ``None`` where the config does not say.
    """

    name: str
    architectures: tuple[str, ...]
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None


def read_target_facts(folder: Path, name: str) -> TargetFacts:
    """Read a Hugging Face directory; a multimodal target counts by its text part.

    Raises:
        TargetError: there is no usable config.
    """
    path = folder / "config.json"
    try:
        document = json.loads(path.read_bytes())
        text = document.get("text_config") or document
        return TargetFacts(
            name,
            tuple(document.get("architectures") or ()),
            int(text["num_hidden_layers"]),
            int(text["hidden_size"]),
            int(text["vocab_size"]),
            text.get("max_position_embeddings"),
        )
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise TargetError(
            f"{path} is no target's configuration ({type(error).__name__}: {error})",
            remedy="Name a Hugging Face directory or hub id of the draft's target",
        ) from None
