"""The real engine on a tiny target behind the real HTTP surface, drafts from a real registry."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from draftline.errors import TargetError
from draftline.spec import RunSpec, derive, recipe
from serving.api import create_api
from serving.registry import DraftFiles, FolderSource
from serving.replica import Replica, ReplicaConfig, start_replica
from tests.servers.tiny_target import CHAT_TEMPLATE, make_tokenizer
from tests.serving.servers import wait_until
from tests.serving.tiny import BLOCK_SIZE, write_draft
from tests.target.test_general import family_config
from tests.target.test_lean import save_model

pytestmark = pytest.mark.slow

MODEL = "tiny"
LONG = 600


def tiny_spec(target: Path, policy: str = "fixed") -> RunSpec:
    """A spec that serves the tiny target in fp32."""
    return derive(
        recipe("smollm2-135m"),
        {
            "target.source": str(target),
            "target.dtype": "fp32",
            "serving.model_name": MODEL,
            "serving.max_requests": 3,
            "serving.max_context": 1024,
            "serving.policy": policy,
        },
    )


@contextmanager
def serve_replica(replica: Replica) -> Iterator[str]:
    """The replica under uvicorn; yields its root URL."""
    server = uvicorn.Server(
        uvicorn.Config(create_api(replica.service), host="127.0.0.1", port=0, log_level="critical", ws="none")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        replica.close()
        thread.join(10)


def answer(url: str, prompt: str, max_tokens: int = LONG) -> list[float]:
    """The log-probabilities of a greedy answer: they tell two answers apart better than text."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    stream = client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        logprobs=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    values: list[float] = []
    for chunk in stream:
        if chunk.choices and chunk.choices[0].logprobs is not None:
            values += chunk.choices[0].logprobs.token_logprobs or []
    return values


PROMPTS = [f"ticket {number}: where is my parcel?" for number in range(6)]


@pytest.fixture(scope="module")
def plain_answers(tiny_target_dir: Path) -> list[list[float]]:
    """What the target answers without any draft, one prompt at a time."""
    with serve_replica(start_replica(ReplicaConfig(tiny_spec(tiny_target_dir, "off"), num_threads=1))) as url:
        return [answer(url, prompt) for prompt in PROMPTS]


class Promotable:
    """A draft source whose champion is a folder name that a test sets."""

    def __init__(self, root: Path, champion: str) -> None:
        self.root = root
        self.champion = champion
        self.reported: list[tuple[str, str]] = []

    def current(self) -> str:
        """See DraftSource."""
        return self.champion

    def fetch(self, name: str) -> DraftFiles:
        """See DraftSource."""
        return FolderSource(self.root / name).fetch(name)

    def report_drift(self, name: str, event: str) -> None:
        """See DraftSource."""
        self.reported.append((name, event))


def test_answers_are_the_targets_own_while_drafts_come_and_go(
    tiny_target_dir: Path, plain_answers: list[list[float]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_draft(tmp_path / "one", tiny_target_dir, seed=1)
    write_draft(tmp_path / "two", tiny_target_dir, seed=2)
    write_draft(tmp_path / "misfit", tiny_target_dir, seed=3, is_misfit=True)
    write_draft(tmp_path / "miscalibrated", tiny_target_dir, seed=4, num_temperatures=BLOCK_SIZE - 1)
    weights = write_draft(tmp_path / "truncated", tiny_target_dir, seed=5) / "draft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    weights = write_draft(tmp_path / "pickled", tiny_target_dir, seed=5) / "draft" / "model.safetensors"
    weights.write_bytes(pickle.dumps({"weights": [1.0]}))
    weights = write_draft(tmp_path / "unsafe", tiny_target_dir, seed=5) / "draft" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    refused = ("misfit", "miscalibrated", "truncated", "pickled", "unsafe")
    source = Promotable(tmp_path, "one")
    config = ReplicaConfig(tiny_spec(tiny_target_dir), num_threads=1, poll_s=0.02)
    replica = start_replica(config, source)
    with serve_replica(replica) as url, ThreadPoolExecutor(6) as clients:
        asked = [clients.submit(answer, url, prompt) for prompt in PROMPTS]
        wait_until(lambda: replica.service.worker.load().num_running == 3)
        source.champion = "two"
        wait_until(lambda: replica.service.info.draft == "two")
        for name in refused:
            source.champion = name
            wait_until(lambda line=f"{name} is refused, keeping two": line in caplog.text)
        source.champion = "one"
        wait_until(lambda: replica.service.info.draft == "one")
        assert not all(task.done() for task in asked), "the swaps came too late to test anything"
        answers = [task.result(60) for task in asked]
        metrics = httpx.get(f"{url}/metrics").text
    assert [len(values) for values in answers] == [LONG] * 6, "a request was lost or cut"
    for values, plain in zip(answers, plain_answers, strict=True):
        assert values == pytest.approx(plain, abs=1e-4)
    assert 'draftline:draft_swaps_total{model_name="tiny"} 2.0' in metrics
    assert f'draftline:draft_swaps_refused_total{{model_name="tiny"}} {len(refused)}.0' in metrics
    assert 'draftline:draft_info{draft="one",model_name="tiny"} 1.0' in metrics
    assert 'vllm:spec_decode_num_draft_tokens_total{model_name="tiny"} 0.0' not in metrics, "nothing was speculated"


def test_a_draft_that_is_worse_than_evaluated_is_reported_and_one_that_is_as_good_is_not(
    tiny_target_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_draft(tmp_path / "one", tiny_target_dir, seed=1)
    source = Promotable(tmp_path, "one")
    spec = derive(
        tiny_spec(tiny_target_dir),
        {"serving.drift.window_blocks": 400, "serving.drift.min_blocks": 200, "serving.drift.min_requests": 10},
    )
    config = ReplicaConfig(spec, num_threads=1, poll_s=0.02)

    def serve(survival: list[float] | None) -> dict[str, float]:
        """Serve a good many requests; the draft's live survival by position."""
        if survival is not None:
            evaluation = {"suites": {"held-out": {"survival_by_position": survival}}}
            (folder / "metrics.json").write_text(json.dumps(evaluation))
        with serve_replica(start_replica(config, source)) as url, ThreadPoolExecutor(3) as clients:
            list(clients.map(lambda number: answer(url, f"ticket {number}", 30), range(21)))
            page = httpx.get(f"{url}/metrics").text
            time.sleep(5 * config.poll_s)
        return {
            sample.labels.get("position", sample.name): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name in ("draftline:block_survival", "draftline:is_drifted", "draftline:drift_events_total")
        }

    live = serve(None)
    positions = [live[str(position)] for position in range(BLOCK_SIZE)]
    assert 0 < positions[0] < 1 and source.reported == []
    assert serve(positions)["draftline:is_drifted"] == 0 and source.reported == []
    worse = serve([1.0, 1.0, 1.0])
    assert (worse["draftline:is_drifted"], worse["draftline:drift_events_total"]) == (1, 1)
    ((name, event),) = source.reported
    assert name == "one" and json.loads(event)["reason"] == "DraftAcceptanceDrift" and event in caplog.text


def test_a_draft_for_another_target_does_not_start(tiny_target_dir: Path, tmp_path: Path) -> None:
    misfit = write_draft(tmp_path / "misfit", tiny_target_dir, seed=3, is_misfit=True)
    with pytest.raises(TargetError, match="hidden size"):
        start_replica(ReplicaConfig(tiny_spec(tiny_target_dir), draft_uri=str(misfit), num_threads=1))


def test_a_chat_uses_the_targets_template_and_reports_speculation(tiny_target_dir: Path, tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft-a", tiny_target_dir, seed=1)
    replica = start_replica(ReplicaConfig(tiny_spec(tiny_target_dir), draft_uri=str(draft), num_threads=1))
    with serve_replica(replica) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answered = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi é"}],
            max_tokens=20,
            temperature=0.8,
            top_p=0.9,
            seed=-5,
            n=2,
            extra_body={"top_k": 50, "ignore_eos": True},
        )
    assert answered.usage is not None
    rendered = "<|im_start|>user\nhi é<|im_end|>\n<|im_start|>assistant\n"
    assert answered.usage.prompt_tokens == len(make_tokenizer().encode(rendered, add_special_tokens=False))
    assert answered.usage.completion_tokens == 40 and len(answered.choices) == 2
    speculation = answered.model_dump()["metrics"]["speculative_decoding"]
    assert speculation["num_spec_tokens"] == BLOCK_SIZE
    assert len(speculation["acceptance_histogram"]) == BLOCK_SIZE + 1
    assert speculation["num_draft_tokens"] > 0 and speculation["num_spec_steps"] == sum(
        speculation["acceptance_histogram"]
    )


def test_conversations_are_written_as_the_spec_says(tiny_target_dir: Path, tmp_path: Path) -> None:
    """A target whose template opens an answer with an empty thought unless it may think."""
    folder = tmp_path / "target"
    shutil.copytree(tiny_target_dir, folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE + "{% if not enable_thinking %}xxxx{% endif %}"
    tokenizer.save_pretrained(folder)
    used = []
    for enable_thinking in (True, False):
        spec = derive(tiny_spec(folder), {"target.enable_thinking": enable_thinking})
        with serve_replica(start_replica(ReplicaConfig(spec, num_threads=1))) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
            reply = client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=1
            )
            assert reply.usage is not None
            used.append(reply.usage.prompt_tokens)
    assert used[1] == used[0] + 4


def test_another_family_is_served_by_prompt_lookup_with_no_draft_at_all(tmp_path: Path) -> None:
    """A target that transformers runs, sampled and greedy, with alternatives; no registry, no training."""
    folder = tmp_path / "qwen2"
    save_model(family_config("qwen2", max_position_embeddings=1024), folder)
    spec = derive(
        tiny_spec(folder), {"serving.proposer": "prompt_lookup", "serving.max_context": 400, "serving.policy": "fixed"}
    )
    # A draft that is configured all the same is not looked for.
    replica = start_replica(ReplicaConfig(spec, draft_uri=str(tmp_path / "nowhere"), num_threads=1))
    assert replica.follower is None
    with serve_replica(replica) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        options: dict[str, Any] = {"model": MODEL, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
        text = "where is my parcel 3? " * 4
        answers = [client.completions.create(prompt=text, temperature=t, seed=1, logprobs=2, **options) for t in (0, 1)]
    drafted = [answer.model_dump()["metrics"]["speculative_decoding"]["num_draft_tokens"] for answer in answers]
    assert min(drafted) > 0
    for answer in answers:
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.top_logprobs is not None and len(logprobs.top_logprobs) == 60
    likeliest = [max(top.values()) for top in answers[0].choices[0].logprobs.top_logprobs]  # type: ignore[union-attr]
    assert answers[0].choices[0].logprobs.token_logprobs == pytest.approx(likeliest)  # type: ignore[union-attr]
