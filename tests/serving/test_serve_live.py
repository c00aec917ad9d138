"""The deploy step for real: MLflow, Ray, Ray Serve, the real engine, the real client."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from mlflow import MlflowClient
from prometheus_client.parser import text_string_to_metric_families

from components.deploy.step import run
from draftline.errors import FormatError, PlatformError, TargetError
from draftline.registry_layout import digest_tag, file_digest
from draftline.spec import derive
from draftline.steps import StepContext, StepOutput, StepResult
from draftline.storage import open_store
from pipelines.embedded.platform import Platform
from tests.serving.servers import wait_until
from tests.serving.test_real_engine import MODEL, tiny_spec
from tests.serving.tiny import write_draft

pytestmark = pytest.mark.slow

REGISTERED = "tiny-desk"
REPLICAS = 2
TRAFFIC = "traffic"


def register(platform: Platform, folder: Path, *, has_right_digests: bool = True) -> None:
    """Register a draft folder as the next version and promote it."""
    client = MlflowClient(tracking_uri=platform.mlflow_uri, registry_uri=platform.mlflow_uri)
    run_info = client.create_run("0").info
    client.log_artifacts(run_info.run_id, str(folder))
    version = client.create_model_version(REGISTERED, run_info.artifact_uri, run_id=run_info.run_id).version
    for file in ("draft/config.json", "draft/model.safetensors"):
        digest = file_digest(folder / file) if has_right_digests else "0" * 64
        client.set_model_version_tag(REGISTERED, version, digest_tag(file), digest)
    client.set_registered_model_alias(REGISTERED, "champion", version)


def deploy_step(platform: Platform, target: Path, workspace: Path, max_requests: int = 8) -> StepOutput:
    """The station, as the pipeline runs it after a passed gate."""
    replicas = {"serving.min_replicas": REPLICAS, "serving.max_replicas": REPLICAS}
    capture = {"enabled": True, "uri": str(workspace / TRAFFIC), "sample_rate": 1.0, "flush_s": 0.1}
    spec = derive(tiny_spec(target), {"serving.max_requests": max_requests, "serving.capture": capture, **replicas})
    inputs = {
        "gate": StepResult("gate", "k", outputs={"passed": True, "reasons": []}),
        "register": StepResult("register", "k", outputs={"model_name": REGISTERED, "version": "1"}),
    }
    return run(StepContext("deploy", "k", spec, open_store(str(workspace)), inputs))


@dataclass(frozen=True)
class Deployed:
    """A live endpoint, and what is needed to deploy again."""

    output: StepOutput
    platform: Platform
    target: Path
    workspace: Path

    def client(self) -> openai.OpenAI:
        """The real client."""
        return openai.OpenAI(base_url=self.output.outputs["endpoint"], api_key="none", max_retries=0, timeout=60)

    def draft(self) -> str | None:
        """The draft that the endpoint says it uses."""
        name: str | None = self.client().models.retrieve(MODEL).model_dump()["draft"]
        return name

    def drafts(self) -> list[str]:
        """The draft of every replica, as one scrape tells."""
        root = str(self.output.outputs["endpoint"]).removesuffix("/v1")
        return [
            sample.labels["draft"]
            for family in text_string_to_metric_families(httpx.get(f"{root}/metrics").text)
            for sample in family.samples
            if sample.name == "draftline:draft_info"
        ]


@pytest.fixture(scope="module")
def deployed(platform: Platform, tiny_target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    workspace = tmp_path_factory.mktemp("deploy")
    environment = {
        **platform.ray_client_env,
        "DRAFTLINE_SERVE_PORT": str(platform.serve_port),
        "XDG_CACHE_HOME": str(workspace / "cache"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        MlflowClient(tracking_uri=platform.mlflow_uri).create_registered_model(REGISTERED)
        register(platform, write_draft(workspace / "one", tiny_target_dir, seed=1))
        yield Deployed(deploy_step(platform, tiny_target_dir, workspace), platform, tiny_target_dir, workspace)


def test_the_endpoint_streams_to_the_openai_client(deployed: Deployed) -> None:
    outputs = deployed.output.outputs
    assert outputs["deployed"] is True and outputs["draft"] == f"{REGISTERED}/1"
    assert outputs["endpoint"] == f"http://127.0.0.1:{deployed.platform.serve_port}/v1"
    chunks = list(
        deployed.client().chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Where is my parcel?"}],
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert len(chunks) > 10, "the answer came in one piece"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 40
    assert chunks[-1].model_dump()["metrics"]["speculative_decoding"]["num_spec_tokens"] == 3


def test_errors_pass_through_serve_in_openai_shape(deployed: Deployed) -> None:
    with pytest.raises(openai.BadRequestError, match="'tools' is not supported"):
        deployed.client().completions.create(model=MODEL, prompt="x", extra_body={"tools": [1]})
    with pytest.raises(openai.NotFoundError):
        deployed.client().completions.create(model="other", prompt="x")


def test_the_page_comes_through_serve(deployed: Deployed) -> None:
    root = str(deployed.output.outputs["endpoint"]).removesuffix("/v1")
    page = httpx.get(f"{root}/ui", follow_redirects=True)
    assert (page.status_code, page.headers["content-security-policy"].split(";")[0]) == (200, "default-src 'none'")
    for part in re.findall(r'(?:src|href)="([\w.]+)"', page.text):
        assert httpx.get(f"{page.url}{part}").status_code == 200, part
    assert httpx.get(f"{root}/ui/load").json()["model"] == MODEL


def test_a_chat_that_may_be_kept_is_captured_by_its_replica(deployed: Deployed) -> None:
    for store, said in ((True, "Keep me, kim@example.com"), (False, "Leave me"), (None, "Nobody asked me")):
        deployed.client().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": said}], max_tokens=2, extra_body={"store": store}
        )
    traffic = deployed.workspace / TRAFFIC
    wait_until(lambda: list(traffic.rglob("*.jsonl")), 10)
    lines = [line for path in traffic.rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert lines == ['{"domain":"live","turns":["Keep me, [EMAIL]"]}']


def test_a_client_that_leaves_frees_its_slot_through_serve(deployed: Deployed) -> None:
    root = str(deployed.output.outputs["endpoint"]).removesuffix("/v1")
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{root}/v1/completions", json=body) as response:
        next(response.iter_lines())
    cancelled = re.compile(
        r'vllm:request_success_total{finished_reason="cancelled",model_name="tiny",replica="\w+"} 1\.0'
    )
    wait_until(lambda: cancelled.search(httpx.get(f"{root}/metrics").text) is not None, 10)


def ask(deployed: Deployed, number: int) -> int:
    """Tokens of an answer that should have 100."""
    answer = deployed.client().completions.create(
        model=MODEL, prompt=f"ticket {number}", max_tokens=100, extra_body={"ignore_eos": True}
    )
    return answer.usage.completion_tokens if answer.usage else 0


def test_a_promotion_under_load_swaps_the_draft_and_loses_nothing(deployed: Deployed) -> None:
    with ThreadPoolExecutor(4) as clients:
        register(deployed.platform, write_draft(deployed.workspace / "two", deployed.target, seed=2))
        promoted_s = time.monotonic()
        counts: list[int] = []
        while (drafts := deployed.drafts()) != [f"{REGISTERED}/2"] * REPLICAS:
            # A minute is promised, and kept where the cores are not shared: there it takes half of one.
            assert len(drafts) == REPLICAS and time.monotonic() < promoted_s + 150, f"not swapped: {drafts}"
            counts += clients.map(partial(ask, deployed), range(8))
        counts += clients.map(partial(ask, deployed), range(8))
    assert deployed.draft() == f"{REGISTERED}/2"
    assert len(counts) > 8 and set(counts) == {100}


def replica_pids(deployed: Deployed) -> set[int]:
    tops = [psutil.Process(pid) for pid in deployed.platform.pids.values()]
    family = [process for top in tops for process in top.children(recursive=True)]
    return {process.pid for process in family if "ServeReplica" in " ".join(process.cmdline())}


def test_deploying_again_keeps_the_replica_and_its_streams(deployed: Deployed) -> None:
    before = replica_pids(deployed)
    assert before
    stream = iter(
        deployed.client().completions.create(
            model=MODEL, prompt="x", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
    )
    next(stream)
    again = deploy_step(deployed.platform, deployed.target, deployed.workspace)
    assert again.outputs == {**deployed.output.outputs, "draft": deployed.draft()}
    assert replica_pids(deployed) == before
    assert sum(len(chunk.choices) > 0 for chunk in stream) > 0


def test_a_rolling_update_under_load_loses_nothing(deployed: Deployed) -> None:
    """Other settings, so every replica is replaced, each by a new process with a real engine."""
    before = replica_pids(deployed)
    with ThreadPoolExecutor(5) as clients:
        updating = clients.submit(deploy_step, deployed.platform, deployed.target, deployed.workspace, max_requests=6)
        counts: list[int] = []
        while not updating.done() or replica_pids(deployed) & before:
            counts += clients.map(partial(ask, deployed), range(8))
        counts += clients.map(partial(ask, deployed), range(8))
    assert updating.result().outputs["deployed"] is True
    assert len(replica_pids(deployed)) == REPLICAS
    assert len(counts) > 8 and set(counts) == {100}


def test_deploying_a_draft_of_another_target_fails_and_the_old_one_keeps_serving(deployed: Deployed) -> None:
    before, champion = deployed.draft(), replica_pids(deployed)
    misfit = write_draft(deployed.workspace / "misfit", deployed.target, seed=9, is_misfit=True)
    register(deployed.platform, misfit)
    with pytest.raises(TargetError, match="hidden size"):
        deploy_step(deployed.platform, deployed.target, deployed.workspace)
    assert deployed.draft() == before and replica_pids(deployed) == champion


def test_deploying_a_tampered_draft_fails_and_the_old_one_keeps_serving(deployed: Deployed) -> None:
    before = deployed.draft()
    register(
        deployed.platform, write_draft(deployed.workspace / "bad", deployed.target, seed=9), has_right_digests=False
    )
    with pytest.raises(FormatError, match="not the file that was registered"):
        deploy_step(deployed.platform, deployed.target, deployed.workspace)
    assert deployed.draft() == before
    answer = deployed.client().completions.create(model=MODEL, prompt="x", max_tokens=3)
    assert answer.usage is not None and answer.usage.completion_tokens > 0


def test_a_taken_port_is_one_clear_error(deployed: Deployed, monkeypatch: pytest.MonkeyPatch) -> None:
    MlflowClient(tracking_uri=deployed.platform.mlflow_uri).set_registered_model_alias(REGISTERED, "champion", "1")
    mlflow_port = httpx.URL(deployed.platform.mlflow_uri).port
    monkeypatch.setenv("DRAFTLINE_SERVE_PORT", str(mlflow_port))
    with pytest.raises(PlatformError, match=f"not on port {mlflow_port}"):
        deploy_step(deployed.platform, deployed.target, deployed.workspace)


def _is_loopback(address: str) -> bool:
    parsed = ip_address(address)
    return ((parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None) or parsed).is_loopback


def test_nothing_listens_beyond_loopback(deployed: Deployed) -> None:
    supervisors = [psutil.Process(pid) for pid in deployed.platform.pids.values()]
    family = [process for top in supervisors for process in (top, *top.children(recursive=True))]
    outside = [
        (process.name(), connection.laddr)
        for process in family
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and not _is_loopback(connection.laddr.ip)
    ]
    assert any("Serve" in " ".join(process.cmdline()) for process in family), "the replica was not looked at"
    assert outside == []
