"""Replicas that die, and replicas that are replaced, behind a live Ray Serve, seen by clients that stream."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from pipelines.embedded.platform import Platform
from tests.serving.scripted_replica import LOADED, LOADING
from tests.serving.servers import MODEL, wait_until

pytestmark = pytest.mark.slow

NUM_TOKENS = 1800
"""Of one answer: about three seconds."""


DEPLOY = (sys.executable, "-m", "tests.serving.deploy_scripted")


@dataclass(frozen=True)
class Live:
    """A deployed endpoint."""

    platform: Platform

    @property
    def root(self) -> str:
        """Of the server."""
        return f"http://127.0.0.1:{self.platform.serve_port}"

    def deploy(self, num_replicas: int = 2, *, max_waiting: int = 64, folder: Path | None = None) -> None:
        """Deploy, and wait until it answers; with a folder, replicas load until they are told there."""
        serving = {
            "model_name": MODEL,
            "max_requests": 16,
            "max_waiting": max_waiting,
            "min_replicas": num_replicas,
            "max_replicas": num_replicas,
        }
        overrides = json.dumps({f"serving.{name}": value for name, value in serving.items()})
        self._run(str(self.platform.serve_port), overrides, *([str(folder)] if folder else []))

    def take_down(self) -> None:
        """Remove the application."""
        self._run("down")

    def _run(self, *arguments: str) -> None:
        environment = {**os.environ, **self.platform.ray_client_env}
        done = subprocess.run([*DEPLOY, *arguments], env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]

    def replicas(self) -> set[int]:
        """Process ids of all replicas."""
        tops = [psutil.Process(pid) for pid in self.platform.pids.values()]
        family = [process for top in tops for process in top.children(recursive=True)]
        return {p.pid for p in family if p.is_running() and "ServeReplica" in " ".join(p.cmdline())}

    def version(self) -> str:
        """What the replica that answers was told."""
        return str(httpx.get(f"{self.root}/version", timeout=10).json()["deployment"])


@pytest.fixture(scope="module")
def live(platform: Platform) -> Iterator[Live]:
    live = Live(platform)
    live.deploy()
    yield live
    live.take_down()


def ask(live: Live, *, is_stream: bool) -> str:
    """One request; in a word how it ended."""
    client = openai.OpenAI(base_url=f"{live.root}/v1", api_key="none", max_retries=0, timeout=60)
    with client:
        try:
            if is_stream:
                stream = client.completions.create(model=MODEL, prompt="x", max_tokens=NUM_TOKENS, stream=True)
                return "whole" if sum(len(c.choices[0].text) for c in stream) == NUM_TOKENS else "short"
            answer = client.completions.create(model=MODEL, prompt="x", max_tokens=NUM_TOKENS)
            return "whole" if len(answer.choices[0].text) == NUM_TOKENS else "short"
        except openai.InternalServerError as error:
            return f"{error.status_code} {error.code}"
        except openai.APIError as error:
            return f"event {error.code}" if type(error) is openai.APIError else type(error).__name__
        except httpx.HTTPError as error:
            return type(error).__name__


def test_a_replica_that_dies_ends_its_answers_cleanly_and_returns(live: Live) -> None:
    before = live.replicas()
    assert len(before) == 2
    with ThreadPoolExecutor(24) as clients:
        streams = [clients.submit(ask, live, is_stream=True) for _ in range(16)]
        plain = [clients.submit(ask, live, is_stream=False) for _ in range(8)]
        time.sleep(1.0)
        os.kill(min(before), signal.SIGKILL)
        streamed = Counter(task.result(90) for task in streams)
        answered = Counter(task.result(90) for task in plain)
    assert streamed["whole"] > 0 and streamed["event replica_lost"] > 0, streamed
    assert set(streamed) <= {"whole", "event replica_lost"}, "a stream broke off without a word"
    assert set(answered) <= {"whole", "503 replica_lost"}, answered
    wait_until(lambda: len(live.replicas() - {min(before)}) == 2, 60)
    assert ask(live, is_stream=True) == "whole"


def under_load(live: Live, change: Callable[[], None]) -> Counter[str]:
    """How requests ended that were sent all the time from before ``change`` until after it."""
    is_over = threading.Event()

    def keep_asking(number: int) -> list[str]:
        ends = []
        while not is_over.is_set():
            ends.append(ask(live, is_stream=number % 2 == 0))
        return ends

    with ThreadPoolExecutor(4) as clients:
        asking = [clients.submit(keep_asking, number) for number in range(4)]
        try:
            time.sleep(1.0)
            change()
        finally:
            is_over.set()
        return Counter(end for task in asking for end in task.result(120))


def test_rolling_updates_lose_no_request_and_leave_no_gap(live: Live, tmp_path: Path) -> None:
    """From two replicas to one with other settings, and that one alone to others again."""
    old = live.replicas()
    ends_while_loading = []

    def update() -> None:
        live.deploy(num_replicas=1, max_waiting=100)
        before = live.version()
        with ThreadPoolExecutor(1) as deployer:
            deploying = deployer.submit(live.deploy, 1, max_waiting=200, folder=tmp_path)
            try:
                wait_until((tmp_path / LOADING).exists, 120)
                ends_while_loading.append(ask(live, is_stream=True))
            finally:
                (tmp_path / LOADED).touch()
            deploying.result(240)
        wait_until(lambda: live.version() != before, 60)

    ends = under_load(live, update)
    assert ends_while_loading == ["whole"], "the replica in use was stopped before its successor could answer"
    assert set(ends) == {"whole"} and ends["whole"] >= 8, ends
    wait_until(lambda: len(live.replicas()) == 1 and not live.replicas() & old, 60)
