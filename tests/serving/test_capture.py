"""Capture: what is kept, what is not, and that no store and no flood can harm a request."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from draftline.errors import ObjectExists, StoreUnreachable
from draftline.prompts.records import parse_line
from draftline.prompts.source import read_source
from draftline.prompts.station import run
from draftline.spec import CaptureSpec, PromptsSpec, RedactionSpec, RunSpec
from draftline.steps import StepContext
from draftline.storage import ObjectStore, open_store
from draftline.traffic.records import Asked
from draftline.traffic.redaction import Redactor
from draftline.traffic.sampling import is_sampled
from serving.capture.capture import start_capture
from serving.capture.writer import DROP_REASONS, BatchWriter, WriterLimits
from serving.metrics import ServingMetrics
from serving.worker import IDLE_LOAD
from tests.servers.faulty_s3 import Fault, running_faulty_s3
from tests.servers.s3 import S3Server, fresh_workspace
from tests.serving.scripted_engine import END_OF_TEXT, ScriptedEngine
from tests.serving.servers import MODEL, Running, serve_scripted, wait_until

KEY = "sk-proj-" + "a1B2c3D4" * 4
LIMITS = WriterLimits(
    max_queue_bytes=4 << 20,
    max_record_bytes=10_000,
    max_batch_bytes=1 << 20,
    max_hour_bytes=1 << 30,
    flush_s=0.05,
    first_pause_s=0.01,
)


def new_metrics() -> ServingMetrics:
    return ServingMetrics(MODEL, lambda: IDLE_LOAD)


def lines_in(store: ObjectStore) -> list[dict[str, Any]]:
    """All records, in the order of their files."""
    return [json.loads(line) for info in store.list() for line in store.get(info.key).splitlines()]


@contextmanager
def capturing(folder: Path, **fields: Any) -> Iterator[Running]:
    """A scripted server that captures into a folder; closed, so flushed, at the end."""
    spec = CaptureSpec(enabled=True, uri=str(folder), **{"sample_rate": 1.0, **fields})
    engine = ScriptedEngine(lambda request: [*b"The answer", END_OF_TEXT])
    with serve_scripted(engine) as server:
        server.service.capture = start_capture(spec, server.service.worker.metrics)
        yield server


def ask(server: Running, *turns: str, **fields: Any) -> httpx.Response:
    messages = [{"role": "system", "content": "be kind"}]
    for turn in turns[:-1]:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "I see"}]
    messages.append({"role": "user", "content": turns[-1]})
    document = {"model": MODEL, "messages": messages, "max_tokens": 20, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=document, timeout=10.0)


def metric(server: Running, name: str) -> float:
    """A metric's value, whatever its label values besides those in ``name``."""
    text = httpx.get(f"{server.url}/metrics").text
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_only_the_users_side_is_kept_and_nothing_that_tells_whose_it_was(tmp_path: Path) -> None:
    with capturing(tmp_path) as server:
        said = f"I am jane@example.com, {KEY}"
        answer = ask(server, said, "and my parcel?", store=True, user="customer-77", stream=False)
        assert answer.status_code == 200
        assert ask(server, "streamed", store=True, stream=True).status_code == 200
    assert lines_in(open_store(str(tmp_path))) == [
        {"domain": "live", "system": "be kind", "turns": ["I am [EMAIL], [KEY]", "and my parcel?"]},
        {"domain": "live", "system": "be kind", "turns": ["streamed"]},
    ]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*.jsonl"))
    for secret in (answer.json()["id"], "customer-77", "The answer", "I see", "jane", KEY):
        assert secret.encode() not in written


@pytest.mark.parametrize(
    ("consent", "kept"),
    [("request", ["yes"]), ("deployment", ["yes", "silent"])],
)
def test_consent_decides(consent: str, kept: list[str], tmp_path: Path) -> None:
    with capturing(tmp_path, consent=consent) as server:
        ask(server, "yes", store=True)
        ask(server, "no", store=False)
        ask(server, "silent")
        assert ask(server, "wrong", store="true").status_code == 400
    assert [record["turns"][0] for record in lines_in(open_store(str(tmp_path)))] == kept


def test_a_server_that_keeps_nothing_refuses_a_wish_to_be_kept() -> None:
    with serve_scripted() as server:
        answer = ask(server, "hello", store=True)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "store")
        assert ask(server, "hello", store=False).status_code == 200
    assert start_capture(CaptureSpec(), new_metrics()) is None


def test_refused_requests_and_raw_completions_are_not_kept(tmp_path: Path) -> None:
    with capturing(tmp_path, consent="deployment") as server:
        assert ask(server, "too long", max_tokens=9999).status_code == 400
        body = {"model": MODEL, "prompt": "raw", "max_tokens": 3}
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        assert ask(server, "x" * 30, max_tokens=2).status_code == 200
    assert [record["turns"] for record in lines_in(open_store(str(tmp_path)))] == [["x" * 30]]


def test_the_sample_is_a_function_of_the_id() -> None:
    ids = [f"chatcmpl-{number:024x}" for number in range(20_000)]
    small = {name for name in ids if is_sampled(name, 0.05)}
    large = {name for name in ids if is_sampled(name, 0.2)}
    assert small < large
    # Binomial with n = 20,000: six standard deviations are 185 and 339, and the ids are fixed anyway.
    assert abs(len(small) - 1000) < 185
    assert abs(len(large) - 4000) < 339
    assert all(is_sampled(name, 1.0) for name in ids)


def test_captured_traffic_becomes_the_next_runs_prompts(tmp_path: Path) -> None:
    with capturing(tmp_path / "traffic", consent="deployment", domain="shop") as server:
        for number in range(60):
            words = " ".join(f"w{(number * 37 + k * 101) % 977}" for k in range(12))
            assert ask(server, f"ticket {words}", f"second {number}").status_code == 200
    spec = RunSpec(prompts=PromptsSpec(source=str(tmp_path / "traffic")))
    context = StepContext("prompts", "0" * 20, spec, open_store(str(tmp_path / "workspace")), {})
    output = run(context)
    assert output.outputs["report"]["kept"] == output.outputs["report"]["read"] == 60
    train = context.store.get(f"{context.prefix}/{output.outputs['files']['train']}").splitlines()
    record = json.loads(train[0])
    assert (record["domain"], record["system"], len(record["turns"])) == ("shop", "be kind", 2)


def test_a_bucket_takes_batches_and_the_run_reads_its_prefix(
    moto_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh_workspace(moto_server, monkeypatch) as store:
        spec = CaptureSpec(
            enabled=True, uri=f"{store.uri}/traffic", consent="deployment", sample_rate=1.0, flush_s=0.01
        )
        capture = start_capture(spec, new_metrics())
        assert capture is not None
        for number in range(20):
            capture.offer(f"id-{number}", [("user", f"question {number}")], store=None)
            time.sleep(0.002)
        capture.close()
        keys = [info.key for info in store.list("traffic/")]
        assert len(keys) > 1
        assert all(key.startswith("traffic/date=20") for key in keys)
        read = read_source(PromptsSpec(source=f"{store.uri}/traffic/"))
        turns = [json.loads(line)["turns"][0] for line in read.lines()]
        assert sorted(turns) == sorted(f"question {number}" for number in range(20))


# -- the writer, and stores that fail ---------------------------------------------------------------------------------


@dataclass
class Made:
    """A writer of its own with what it counts."""

    writer: BatchWriter
    metrics: ServingMetrics

    def count(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(
            f"draftline:capture_{name}_total", {"model_name": MODEL, **labels}
        )
        return value or 0.0

    def dropped(self) -> dict[str, float]:
        return {reason: n for reason in DROP_REASONS if (n := self.count("dropped", reason=reason))}

    def put(self, *turns: str) -> None:
        asked = Asked.of([("user", turn) for turn in turns])
        assert asked is not None
        self.writer.put(asked)


def make(store: ObjectStore, limits: WriterLimits = LIMITS, **options: Any) -> Made:
    metrics = new_metrics()
    writer = BatchWriter(store, Redactor(RedactionSpec()), "live", limits, metrics, **options)
    writer.start()
    return Made(writer, metrics)


@pytest.mark.parametrize("kind", ["status", "reset", "lost_answer"])
def test_a_store_that_fails_for_a_while_gets_every_record_once(
    kind: Any, moto_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_faulty_s3() as s3:
        replace(moto_server, endpoint_url=s3.endpoint_url).use(monkeypatch)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3.faults.extend([Fault(kind, status=503, code="SlowDown")] * 3)
        made = make(open_store("s3://bucket/traffic"))
        for number in range(10):
            made.put(f"question {number}")
        wait_until(lambda: made.count("records") == 10)
        made.writer.close()
        lines = [
            line for path, (body, _) in s3.objects.items() if path.endswith(".jsonl") for line in body.splitlines()
        ]
        assert sorted(json.loads(line)["turns"][0] for line in lines) == sorted(f"question {n}" for n in range(10))
    assert made.count("write_failures") >= 1 or kind != "status"
    assert made.dropped() == {}


class Broken:
    """A store that takes nothing, or waits for ever."""

    def __init__(self) -> None:
        self.num_attempts = 0
        self.gate = threading.Event()
        self.gate.set()
        self.written: list[tuple[str, bytes]] = []
        self.error: Exception | None = StoreUnreachable("no answer")

    def put_if_absent(self, key: str, data: bytes) -> None:
        self.num_attempts += 1
        self.gate.wait()
        self.written.append((key, data))
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [StoreUnreachable("no answer"), ValueError("a bug in an SDK")])
def test_a_store_that_never_answers_costs_the_batch_and_no_more(error: Exception) -> None:
    broken = Broken()
    broken.error = error
    made = make(broken, replace(LIMITS, max_attempts=3))  # type: ignore[arg-type]
    made.put("lost")
    wait_until(lambda: made.dropped() == {"storage": 1})
    assert broken.num_attempts == 3
    assert len({key for key, _ in broken.written}) == 1
    broken.error = None
    made.put("kept")
    wait_until(lambda: made.count("records") == 1)
    made.writer.close()


def test_an_attempt_that_only_seemed_to_fail_is_not_written_again() -> None:
    broken = Broken()
    made = make(broken)  # type: ignore[arg-type]
    made.put("once")
    wait_until(lambda: broken.num_attempts >= 1)
    broken.error = ObjectExists("taken")
    wait_until(lambda: made.count("records") == 1)
    made.writer.close()
    assert made.dropped() == {}


def test_a_flood_is_bounded_and_counted_and_nobody_waits() -> None:
    broken = Broken()
    broken.gate.clear()
    made = make(broken, replace(LIMITS, max_queue_bytes=100_000, max_batch_bytes=2_000))  # type: ignore[arg-type]
    text = "word " * 100
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(20_000):
            made.put(text)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The writer hangs in the store, so the flood ran past it: had it waited, this line would not be reached.
    assert broken.num_attempts == 1
    assert after - before < 1_000_000
    assert made.writer.pending_bytes < 105_000
    assert made.dropped()["queue_full"] > 19_000
    broken.error = None
    broken.gate.set()
    made.writer.close()
    assert made.count("records") + made.dropped()["queue_full"] == 20_000


def test_sizes_are_bounded_per_record_and_per_hour(tmp_path: Path) -> None:
    clock = [1_000_000.0 * 3600]
    made = make(
        open_store(str(tmp_path)), replace(LIMITS, max_record_bytes=200, max_hour_bytes=450), now=lambda: clock[0]
    )
    made.put("x" * 300)
    for _ in range(3):
        made.put("y" * 150)
    wait_until(lambda: made.count("records") == 2)
    assert made.dropped() == {"too_large": 1, "hour_full": 1}
    clock[0] += 3600
    made.put("z" * 150)
    wait_until(lambda: made.count("records") == 3)
    made.writer.close()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.jsonl")) == made.count("bytes")


def test_a_big_batch_does_not_wait_for_the_clock(tmp_path: Path) -> None:
    made = make(open_store(str(tmp_path)), replace(LIMITS, max_batch_bytes=1_000, flush_s=3600))
    for number in range(20):
        made.put(f"{number} " + "x" * 100)
    wait_until(lambda: made.count("records") >= 16)
    made.writer.close()
    assert made.count("records") == 20
    assert all(path.stat().st_size < 1_000 + 200 for path in tmp_path.rglob("*.jsonl"))


def test_what_waits_is_written_at_the_end_and_nothing_after_it(tmp_path: Path) -> None:
    made = make(open_store(str(tmp_path)), replace(LIMITS, flush_s=3600))
    for number in range(50):
        made.put(str(number))
    made.writer.close()
    made.put("late")
    assert [record["turns"] for record in lines_in(open_store(str(tmp_path)))] == [[str(n)] for n in range(50)]
    assert made.dropped() == {"queue_full": 1}


def test_a_hanging_store_does_not_keep_a_replica_from_ending() -> None:
    broken = Broken()
    broken.gate.clear()
    made = make(broken, replace(LIMITS, closing_s=0.1))  # type: ignore[arg-type]
    made.put("never")
    wait_until(lambda: broken.num_attempts == 1)
    started_s = time.monotonic()
    made.writer.close()
    assert time.monotonic() - started_s < 5
    broken.gate.set()


def test_a_capture_that_breaks_leaves_the_request_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with capturing(tmp_path) as server:
        monkeypatch.setattr(BatchWriter, "put", lambda self, asked: 1 / 0)
        assert ask(server, "hello", store=True).status_code == 200
        assert metric(server, 'draftline:capture_dropped_total{model_name="scripted",reason="failed"}') == 1
        monkeypatch.undo()
        monkeypatch.setattr("serving.capture.writer.to_line", lambda *args: 1 / 0)
        assert ask(server, "hello", store=True).status_code == 200
        name = 'draftline:capture_dropped_total{model_name="scripted",reason="failed"}'
        wait_until(lambda: metric(server, name) == 2)
        monkeypatch.undo()
        assert ask(server, "hello", store=True).status_code == 200
    assert [record["turns"] for record in lines_in(open_store(str(tmp_path)))] == [["hello"]]


def test_records_are_lines_that_the_prompts_step_reads() -> None:
    asked = Asked.of([("developer", "s"), ("user", "a\u2028b\nc"), ("assistant", "x"), ("user", " "), ("user", "d")])
    assert asked is not None
    assert asked.turns == ("a\u2028b\nc", "d")
    assert Asked.of([("system", "s"), ("assistant", "x")]) is None
    from draftline.traffic.records import to_line

    line, _ = to_line(replace(asked, turns=("lone \ud800", "4111 1111 1111 1111")), "live", Redactor(RedactionSpec()))
    prompt = parse_line(line, 100)
    assert not isinstance(prompt, str) and prompt is not None
    assert (prompt.system, prompt.turns) == ("s", ("lone ?", "[CARD]"))
