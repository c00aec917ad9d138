"""The application as a RayService declares it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from draftline.errors import SpecError
from pipelines.embedded.platform import Platform
from serving.kubernetes import read_arguments
from tests.charts.helm import Helm, install_helm
from tests.serving.servers import wait_until
from tests.serving.tiny import write_draft


def arguments(**changes: Any) -> dict[str, Any]:
    base = {"target": {"source": "/models/x"}, "serving": {"model_name": "m", "policy": "off"}}
    return {**base, **changes}


def test_arguments_become_a_replica_s_configuration() -> None:
    config = read_arguments(
        arguments(draft_uri="models:/d@champion", tracking_uri="http://m:5000", num_threads=8, api_keys_file="/keys")
    )
    assert (config.spec.target.source, config.spec.serving.model_name) == ("/models/x", "m")
    assert (config.draft_uri, config.tracking_uri, config.num_threads) == ("models:/d@champion", "http://m:5000", 8)
    assert config.api_keys_file == Path("/keys") and config.cache_dir is None and config.poll_s == 20.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft": "x"}, "the Serve config's args are wrong at 'draft'"),
        ({"num_threads": 0}, "greater than 0"),
        ({"serving": {"model": "m"}}, "unknown key 'serving.model'"),
        ({"target": {"dtype": "int3"}}, "target.dtype"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_arguments(arguments(**changes))


@pytest.mark.slow
def test_ray_serve_runs_what_the_chart_declares(
    platform: Platform,
    tiny_target_dir: Path,
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    """The chart's own serveConfigV2, applied as KubeRay applies it, answers a request with a draft."""
    draft = write_draft(tmp_path / "draft", tiny_target_dir, seed=1)
    values = {
        "serving": {
            "target": {"source": str(tiny_target_dir), "dtype": "fp32"},
            "spec": {"model_name": "tiny", "policy": "fixed", "max_requests": 2, "max_context": 512},
            "draft": {"uri": str(draft)},
            "replica": {"cpus": 1, "gpus": 0},
        }
    }
    assert pytestconfig.cache is not None
    helm = Helm(install_helm(pytestconfig.cache.mkdir("helm")), tmp_path)
    config = yaml.safe_load(helm.template(values).one("RayService")["spec"]["serveConfigV2"])
    # The session's Serve listens already, and other tests' application has the root.
    config["http_options"] = {"host": "127.0.0.1", "port": platform.serve_port}
    config["proxy_location"] = "HeadOnly"
    (application,) = config["applications"]
    application |= {"name": "declared", "route_prefix": "/declared"}
    application["args"]["cache_dir"] = str(tmp_path / "cache")
    (tmp_path / "config.json").write_text(json.dumps(config))
    environment = {**os.environ, **platform.ray_client_env}
    command = [sys.executable, "-m", "tests.serving.deploy_declared"]
    done = subprocess.run(
        [*command, str(tmp_path / "config.json")], env=environment, capture_output=True, text=True, timeout=240
    )
    try:
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout.splitlines()[-1])["declared"] == ["engine"]
        root = f"http://127.0.0.1:{platform.serve_port}/declared"
        wait_until(lambda: httpx.get(f"{root}/health").status_code == 200)
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{root}/v1/completions", json=body, timeout=60).json()
        assert answer["usage"]["completion_tokens"] == 8
        assert answer["metrics"]["speculative_decoding"]["num_spec_tokens"] == 3
    finally:
        subprocess.run([*command, "down", "declared"], env=environment, check=True, timeout=240)
