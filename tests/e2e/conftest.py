"""What every end-to-end test starts from."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.servers.tiny_target import grammar_pair


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    """Questions of the grammar, some lines spoilt."""
    source = random.Random(1)
    lines = [json.dumps({"turns": [f"{grammar_pair(source)[0]} ({number})"]}).encode() for number in range(120)]
    lines += [b"{not json", b'{"turns": []}', b'{"turns": ["\xff\xfe"]}', lines[0]]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path
