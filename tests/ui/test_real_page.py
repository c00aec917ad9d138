"""The page against the real engine: the colours must agree with what the engine counted."""

from __future__ import annotations

import random
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from draftline.draft.checkpoint import to_files
from draftline.target.load import Target
from serving.replica import ReplicaConfig, start_replica
from tests.servers.tiny_target import bigram_draft, grammar_pair
from tests.serving.test_real_engine import MODEL, serve_replica, tiny_spec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def draft_dir(loaded_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft whose guesses are often accepted and often not."""
    folder = tmp_path_factory.mktemp("bigram-draft")
    (folder / "draft").mkdir()
    for name, data in to_files(bigram_draft(loaded_target)).items():
        (folder / "draft" / name).write_bytes(data)
    return folder


def test_colours_agree_with_what_the_engine_counted(page: Page, tiny_target: Path, draft_dir: Path) -> None:
    config = ReplicaConfig(tiny_spec(tiny_target), draft_uri=str(draft_dir), num_threads=1)
    with serve_replica(start_replica(config)) as url:
        page.goto(f"{url}/ui")
        expect(page.locator("#fact-policy")).to_have_text("fixed")
        source = random.Random(3)
        questions = [grammar_pair(source)[0] for _ in range(3)]
        for number, question in enumerate(questions, start=1):
            page.locator("#message").fill(question)
            page.locator("#message").press("Enter")
            expect(page.locator(".figures")).to_have_count(number)
        totals = httpx.get(f"{url}/ui/load").json()["totals"]
        # Every step ends in the target's own token, unless the answer ended before; the prompt's step has one, too.
        drafted = page.locator("#turns .token.draft").count()
        own = page.locator("#turns .token.target").count()
        assert drafted + own == totals["num_output_tokens"] + len(questions)
        assert totals["num_accepted_tokens"] - len(questions) * config.spec.draft.block_size <= drafted
        assert 0 < drafted <= totals["num_accepted_tokens"] < totals["num_draft_tokens"]
        assert totals["num_steps"] <= own <= totals["num_steps"] + len(questions)
        shown = page.locator(".answer .words").all_text_contents()
        # The same conversation in one piece: the page shows the text that any client gets.
        messages = []
        for question, said in zip(questions, shown, strict=True):
            messages.append({"role": "user", "content": question})
            body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 256}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()
            assert answer["choices"][0]["message"]["content"] == said
            messages.append({"role": "assistant", "content": said})
