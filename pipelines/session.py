"""One session of ``draftline run``: platform up, pipeline, closing table, serve, platform down."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from draftline.errors import PlatformError, StepError
from draftline.prompts.source import read_source
from draftline.spec import RunSpec
from draftline.steps import StepResult
from draftline.target.allocator import ALLOCATOR_ENV
from pipelines.embedded.platform import Platform, down, status, up
from pipelines.interrupts import ignore_interrupts, terminate_as_interrupt
from pipelines.preflight import prepare
from pipelines.run_local import LocalRun, new_folder, run_local
from pipelines.summary import render_summary

SERVE_PORT_ENV = "DRAFTLINE_SERVE_PORT"
"""Tells the deploy step which port on 127.0.0.1 is set aside for Ray Serve."""

DEMO_QUESTION = "Customer: Hi, my parcel says delivered, but nothing has arrived. What can I do?\nReply:"
"""In the form of the shipped desk's tickets."""

_HEALTH_INTERVAL_S = 5.0
_ANSWER_TOKENS = 120


@dataclass(frozen=True)
class SessionOptions:
    """What a session does besides running the pipeline.

    Attributes:
        home: Directory of the embedded platform and of the runs' logs.
        exit_at_end: Stop at the end instead of serving until Ctrl-C.
        is_demo: The draft must be deployed, and one answer is streamed from it.
        mlflow_port: Port for MLflow, ``None`` for a free one.
        serve_port: Port for the endpoint, ``None`` for a free one.
    """

    home: Path
    exit_at_end: bool = False
    is_demo: bool = False
    mlflow_port: int | None = None
    serve_port: int | None = None


def run_session(spec: RunSpec, options: SessionOptions, console: Console) -> None:
    """Run a spec from an idle machine to a serving endpoint.

    Whatever happens, a platform that this session started is stopped before
    it returns; one that ran already stays.

    Raises:
        DraftlineError: whatever failed.
        KeyboardInterrupt: Ctrl-C or SIGTERM before the endpoint served.
    """
    with terminate_as_interrupt():
        prepared = prepare(spec, options.home)
        with running_platform(options, console) as platform:
            run = LocalRun(
                spec=prepared.spec,
                spec_uri=prepared.spec_uri,
                workspace=prepared.spec.workspace,
                folder=new_folder(platform.home, prepared.run_id),
                environment=step_environment(platform),
            )
            console.print(
                f"Running {spec.name!r}; results go to {spec.workspace}, the log to {run.log}",
                style="dim",
                highlight=False,
                soft_wrap=True,
            )
            results = run_local(run, console)
            console.print()
            console.print(render_summary(results))
            if options.is_demo:
                require_deployed(results)
                stream_answer(spec, results["deploy"], console)
            print_addresses(platform, results.get("deploy"), console)
            if not options.exit_at_end and not platform.is_reused:
                serve_until_interrupted(platform, console)


@contextmanager
def running_platform(options: SessionOptions, console: Console) -> Iterator[Platform]:
    """The platform of ``options.home``, started when it does not run and then stopped again.

    Raises:
        PlatformError: it cannot be started.
    """
    platform = up(
        options.home,
        mlflow_port=options.mlflow_port,
        serve_port=options.serve_port,
        worker_env=ALLOCATOR_ENV,
        owner_pid=os.getpid(),
        on_event=lambda line: console.print(line, style="dim", highlight=False, soft_wrap=True),
    )
    try:
        yield platform
    finally:
        if not platform.is_reused:
            with ignore_interrupts():
                console.print("Stopping the platform", style="dim")
                down(platform.home)


def step_environment(platform: Platform) -> dict[str, str]:
    """What the steps' processes need to find the platform, and the allocator settings of the lean engine."""
    return {**ALLOCATOR_ENV, **platform.ray_client_env, SERVE_PORT_ENV: str(platform.serve_port)}


def stream_answer(spec: RunSpec, deploy: StepResult, console: Console) -> None:
    """Ask the deployed endpoint one question through the ``openai`` client and print its answer as it comes.

    Raises:
        PlatformError: the endpoint does not answer.
    """
    # A third of a second to import, and only the demo talks to the endpoint.
    import openai

    system_prompt = spec.prompts.system_prompt or read_source(spec.prompts).system_prompt
    messages: list[Any] = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": DEMO_QUESTION})
    endpoint, model = str(deploy.outputs["endpoint"]), str(deploy.outputs["model"])
    console.print(f"\n[bold]You[/bold]  {DEMO_QUESTION}\n[bold]{model}[/bold]  ", end="", highlight=False)
    num_characters = 0
    try:
        with openai.OpenAI(
            base_url=endpoint,
            api_key="not-needed",
            timeout=120.0,
            # The endpoint is on loopback: a proxy from the environment would be in the way.
            http_client=openai.DefaultHttpxClient(trust_env=False),
        ) as client:
            for chunk in client.chat.completions.create(
                model=model, messages=messages, max_tokens=_ANSWER_TOKENS, temperature=0.0, stream=True
            ):
                text = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                num_characters += len(text)
                console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    except openai.OpenAIError as error:
        raise PlatformError(
            f"the endpoint {endpoint} did not answer: {error}", remedy="Read Ray Serve's logs"
        ) from error
    finally:
        console.print()
    if not num_characters:
        raise PlatformError(f"the endpoint {endpoint} gave an empty answer", remedy="Read Ray Serve's logs")


def print_addresses(platform: Platform, deploy: StepResult | None, console: Console) -> None:
    """Say where everything is, with a line to copy."""
    lines = ["", f"MLflow    {platform.mlflow_uri}"]
    if deploy is not None and _is_deployed(deploy):
        endpoint, model = str(deploy.outputs["endpoint"]), str(deploy.outputs["model"])
        lines += [f"Endpoint  {endpoint}  (OpenAI API, model {model})", f"Logs      {platform.logs_dir}"]
        lines += ["", "Try it:", curl_line(endpoint, model)]
    else:
        lines.append(f"Logs      {platform.logs_dir}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def curl_line(endpoint: str, model: str) -> str:
    """A command to copy that streams one answer."""
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "Where is my order?"}]}
    return f"curl -N {endpoint}/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


def serve_until_interrupted(platform: Platform, console: Console) -> None:
    """Wait for Ctrl-C or SIGTERM.

    Raises:
        PlatformError: a service of the platform ended by itself.
    """
    console.print("\nServing until Ctrl-C.", style="bold")
    try:
        while True:
            ended = [service for service in status(platform.home).services if service.pid is None]
            if ended:
                raise PlatformError(
                    f"{ended[0].name} ended by itself",
                    remedy=f"Its log is {ended[0].log}; start the same command again, finished steps are kept",
                )
            time.sleep(_HEALTH_INTERVAL_S)
    except KeyboardInterrupt:
        console.print()


def _is_deployed(deploy: StepResult | None) -> bool:
    return deploy is not None and "endpoint" in deploy.outputs


def require_deployed(results: Mapping[str, StepResult]) -> None:
    """Check that a demo reached its endpoint.

    Raises:
        StepError: the gate refused the draft; carries its reasons.
    """
    if _is_deployed(results.get("deploy")):
        return
    reasons = results["gate"].outputs.get("reasons", []) if "gate" in results else []
    failed = [f"{reason['rule']} is {reason['got']}, needs {reason['needs']}" for reason in reasons if not reason["ok"]]
    raise StepError(
        "the gate refused the draft, so nothing was deployed",
        got="; ".join(failed) or "no verdict",
        remedy="Train longer (--set train.steps=...) or change the policy (--set gate....)",
    )
