"""Suites from the hub: through the real client, against a server on loopback that answers as the hub does."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from draftline.errors import FormatError, InputError
from draftline.evaluation.prompt import SuitePrompt
from draftline.evaluation.public import HUB, check_hub, hub_identity, load_hub

REPEATED = {
    "question": "What is 6 x 7?",
    "problem": "Solve $x$.",
    "prompt": "Write it.",
    "instruction": "Translate.",
    "input": "good morning",
    "question_content": "Sort.",
    "starter_code": "",
}


class Hub:
    """Files by ``dataset/file``; counts what is asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []

    def put(self, name: str, rows: list[dict[str, object]], file: int = 0) -> None:
        suite = HUB[name]
        path = suite.files[file]
        if path.endswith(".parquet"):
            buffer = io.BytesIO()
            parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
            data = buffer.getvalue()
        else:
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        self.files[f"/datasets/{suite.dataset}/resolve/{suite.revision}/{path}"] = data


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.asked.append((self.command, self.path))
            data = state.files.get(self.path)
            body = data if data is not None else b""
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", self.path.split("/resolve/")[1].split("/")[0])
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {"ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"), "HUGGINGFACE_CO_URL_TEMPLATE": template}
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_each_suite_is_read_in_the_published_wording(hub: Hub) -> None:
    step_by_step = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    wanted = {
        "gsm8k": ("math", "What is 6 x 7?" + step_by_step),
        "math500": ("math", "Solve $x$." + step_by_step),
        "aime25": ("math", "Solve $x$." + step_by_step),
        "mbpp": ("code", "Write it."),
        "alpaca": ("chat", "Translate.\n\nInput:\ngood morning"),
        "arena-hard": ("creative", "Write it."),
    }
    for name, (domain, turn) in wanted.items():
        hub.put(name, [{**REPEATED, "category": "creative"}])
        assert load_hub(name) == [SuitePrompt(f"{name}/0", domain, None, (turn,))], name


def test_several_files_make_one_suite_and_starter_code_is_shown(hub: Hub) -> None:
    for number in range(6):
        hub.put("livecodebench", [{**REPEATED, "starter_code": "class Solution:" if number else ""}], number)
    suite = load_hub("livecodebench")
    assert [prompt.id for prompt in suite] == [f"livecodebench/{n}" for n in range(6)]
    assert "### Question:\nSort.\n\n### Format: Write your code in the following format:" in suite[0].turns[0]
    assert "Use the following code structure:\n```python\nclass Solution:\n```" in suite[1].turns[0]


def test_all_turns_of_mt_bench_and_its_categories(hub: Hub) -> None:
    hub.put("mt-bench", [{"prompt": ["Draft it.", "Criticise it."], "category": "writing"}])
    assert load_hub("mt-bench") == [SuitePrompt("mt-bench/0", "writing", None, ("Draft it.", "Criticise it."))]


def test_a_check_downloads_nothing_and_a_second_reading_neither(hub: Hub) -> None:
    hub.put("gsm8k", [REPEATED])
    check_hub("gsm8k")
    assert {method for method, _ in hub.asked} == {"HEAD"}
    load_hub("gsm8k")
    hub.asked.clear()
    load_hub("gsm8k")
    check_hub("gsm8k")
    assert [method for method, _ in hub.asked if method == "GET"] == []


def test_what_the_hub_lacks_is_told_with_the_way_out(hub: Hub) -> None:
    for refuse in (check_hub, load_hub):
        with pytest.raises(InputError, match=r"cannot be had from the hub \(openai/gsm8k") as raised:
            refuse("gsm8k")
        assert "evaluation.suite_files={gsm8k: PATH or s3://...}" in str(raised.value)


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for refuse in (check_hub, load_hub):
        with pytest.raises(InputError, match="cannot be had from the hub"):
            refuse("math500")


def test_another_shape_is_a_format_error(hub: Hub) -> None:
    hub.put("math500", [{"text": "?"}])
    with pytest.raises(FormatError, match=r"test\.jsonl of the data set HuggingFaceH4/MATH-500 is not as expected"):
        load_hub("math500")


def test_every_revision_is_a_commit_and_every_suite_has_an_identity() -> None:
    assert all(len(suite.revision) == 40 and int(suite.revision, 16) for suite in HUB.values())
    assert len({hub_identity(name) for name in HUB}) == len(HUB) == 8
