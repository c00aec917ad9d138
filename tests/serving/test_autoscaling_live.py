"""Scale-out, scale-in and recovery on a live Ray Serve; engines are scripted, the policy is the real one."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipelines.embedded.platform import Platform
from tests.serving.servers import wait_until

pytestmark = pytest.mark.slow

MODEL = "scripted"
DEPLOY = (sys.executable, "-m", "tests.serving.deploy_scripted")
SLOTS = 2
PATIENCE_S = 180.0
"""A replica starts in seconds; this machine may be busy."""


@dataclass
class Load:
    """Clients that ask again as soon as they are answered, and what became of their requests.

    Attributes:
        url: Of the server.
        running: Replicas that take requests, at present.
        answers: Status codes.
        history: Replicas by time.
    """

    url: str
    running: int = 0
    answers: list[int] = field(default_factory=list)
    history: list[tuple[float, int]] = field(default_factory=list)

    @contextmanager
    def clients(self, count: int) -> Iterator[None]:
        """Keep ``count`` requests under way."""
        stopping = threading.Event()
        threads = [threading.Thread(target=self._ask, args=(stopping,)) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stopping.set()
            for thread in threads:
                thread.join(30)

    def _ask(self, stopping: threading.Event) -> None:
        body = {"model": MODEL, "prompt": "x", "max_tokens": 400, "ignore_eos": True}
        with httpx.Client(timeout=60) as client:
            while not stopping.is_set():
                self.answers.append(client.post(f"{self.url}/v1/completions", json=body).status_code)

    def watch(self, until: int, then_s: float) -> list[int]:
        """Replica counts until there are ``until``, and for ``then_s`` after that."""
        counts: list[int] = []
        deadline, reached = time.monotonic() + PATIENCE_S, None
        while time.monotonic() < (deadline if reached is None else reached + then_s):
            counts.append(self.running)
            self.history.append((time.monotonic(), counts[-1]))
            if counts[-1] == until and reached is None:
                reached = time.monotonic()
            time.sleep(0.2)
        return counts


@pytest.fixture(scope="module")
def load(platform: Platform) -> Iterator[Load]:
    serving = {
        "model_name": MODEL,
        "policy": "off",
        "max_requests": SLOTS,
        "max_waiting": 16,
        "min_replicas": 1,
        "max_replicas": 4,
        "upscale_delay_s": 1.0,
        "downscale_delay_s": 3.0,
    }
    overrides = json.dumps({f"serving.{name}": value for name, value in serving.items()})
    environment = {**os.environ, **platform.ray_client_env}
    for arguments in (["down"], [str(platform.serve_port), overrides]):
        done = subprocess.run([*DEPLOY, *arguments], env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
    load = Load(f"http://127.0.0.1:{platform.serve_port}")
    with subprocess.Popen([*DEPLOY, "watch"], env=environment, stdout=subprocess.PIPE, text=True) as watcher:

        def follow(lines: IO[str]) -> None:
            for line in lines:
                load.running = int(line)

        assert watcher.stdout is not None
        following = threading.Thread(target=follow, args=(watcher.stdout,))
        following.start()
        try:
            wait_until(lambda: load.running == 1, PATIENCE_S)
            yield load
        finally:
            watcher.terminate()
            following.join(30)
    subprocess.run([*DEPLOY, "down"], env=environment, check=True, timeout=240)


def test_replicas_follow_the_work_up_and_down_without_flapping(load: Load) -> None:
    with load.clients(1):
        alone = load.watch(until=1, then_s=2.0)
    with load.clients(3 * SLOTS):
        busy = load.watch(until=3, then_s=6.0)
        page = httpx.get(f"{load.url}/metrics").text
    with load.clients(1):
        after = load.watch(until=1, then_s=4.0)
    assert set(alone) == {1}
    # On a busy machine reports of replicas are of different moments: a request that moves on may be counted twice.
    assert busy[-1] in (3, 4) and busy == sorted(busy), f"the way up had a step down, or went too far: {busy}"
    assert after[-1] == 1 and after == sorted(after, reverse=True), f"the way down had a step up: {after}"
    assert len(load.answers) > 50 and set(load.answers) == {200}, "scaling dropped a request"
    changes = [(a, b) for (_, a), (_, b) in itertools.pairwise(load.history) if a != b]
    assert len(changes) <= 2 * (busy[-1] - 1), "each replica comes once and goes once"
    running = {
        sample.labels["replica"]: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "vllm:num_requests_running"
    }
    assert len(running) == busy[-1] and sum(running.values()) > SLOTS, "one scrape shows all replicas"


def test_a_replica_whose_engine_died_is_replaced(load: Load) -> None:
    def replicas() -> set[str]:
        page = httpx.get(f"{load.url}/metrics", timeout=10)
        return {
            sample.labels["replica"]
            for family in text_string_to_metric_families(page.text)
            for sample in family.samples
            if sample.name == "vllm:num_requests_running"
        }

    wait_until(lambda: load.running == 1, PATIENCE_S)
    before = replicas()
    poison = {"model": MODEL, "prompt": "crash the engine", "max_tokens": 5}
    assert httpx.post(f"{load.url}/v1/completions", json=poison, timeout=30).status_code == 500
    assert httpx.get(f"{load.url}/health", timeout=10).status_code == 503
    wait_until(lambda: httpx.get(f"{load.url}/health", timeout=10).status_code == 200, PATIENCE_S)
    assert not replicas() & before
    body = {"model": MODEL, "prompt": "x", "max_tokens": 5}
    assert httpx.post(f"{load.url}/v1/completions", json=body, timeout=30).status_code == 200
