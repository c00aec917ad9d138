"""Finds Draftline's modules and asks fresh interpreters what importing some of them loads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]

HEAVY = frozenset(
    {"torch", "transformers", "ray", "kfp", "mlflow", "kubernetes", "vllm", "fastapi", "matplotlib", "boto3", "openai"}
)
"""What takes long to import or ties a module to a framework."""

_PROBE = """
import importlib, json, sys
for name in json.load(sys.stdin):
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""


def modules_of(package: str) -> list[str]:
    """All modules of a package, by their files."""
    names = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    assert names, f"no package {package} in {ROOT}"
    return names


def heavy_after_importing(names: Iterable[str]) -> set[str]:
    """Top-level names of :data:`HEAVY` that a fresh interpreter has loaded after importing these modules."""
    done = subprocess.run(
        [sys.executable, "-c", _PROBE],
        input=json.dumps(list(names)),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])} & HEAVY
