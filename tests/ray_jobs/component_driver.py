"""A component's body in a process of its own: ``SPEC WORKSPACE INPUT RESULT``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from components.runtime import run_station


@dataclass
class FileArtifact:
    """What a component needs of a kfp artifact."""

    path: str
    metadata: dict[str, Any] = field(default_factory=dict)


if __name__ == "__main__":
    spec, workspace, hidden, result = sys.argv[1:]
    run_station("draft", spec, workspace, {"hidden-states": FileArtifact(hidden)}, result=FileArtifact(result))
