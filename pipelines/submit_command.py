"""``draftline submit`` on the command line; the work is :mod:`pipelines.submit`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftline.errors import SpecError
from pipelines.compile import DEFAULT_PIPELINE
from pipelines.preflight import resolve_spec

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "draftline submit spec.yaml --host http://127.0.0.1:8888 --workspace s3://drafts/tickets --watch\n\n"
    "draftline submit spec.yaml --host https://kubeflow.example --namespace team --param gpu_count=8 "
    '--param \'ray_job={"queue": "team", "spot": true}\'\n\n'
    "draftline submit spec.yaml --pipeline retrain-on-drift --host http://127.0.0.1:8888 --every 6h\n\n"
    "The pipeline is created, or gets a new version when it changed. The spec goes into the workspace."
)


def submit_command(
    host: Annotated[str, typer.Option(metavar="URL", help="The Kubeflow Pipelines server.", envvar="KFP_HOST")],
    spec: Annotated[Path | None, typer.Argument(metavar="[SPEC.yaml]", help="The run spec.")] = None,
    recipe_name: Annotated[str | None, typer.Option("--recipe", metavar="NAME", help="A shipped spec.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the spec; repeatable.")
    ] = None,
    workspace: Annotated[str | None, typer.Option(metavar="URI", help="s3://bucket/prefix, as pods reach it.")] = None,
    pipeline: Annotated[str, typer.Option(metavar="NAME", help="Which pipeline.")] = DEFAULT_PIPELINE,
    param: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A parameter of the pipeline; repeatable.")
    ] = None,
    experiment: Annotated[str, typer.Option(help="Experiment; created when missing.")] = "draftline",
    name: Annotated[str | None, typer.Option(help="Name of the run; the spec's by default.")] = None,
    namespace: Annotated[str, typer.Option(help="The profile's, with multi-user Kubeflow.")] = "",
    token: Annotated[str, typer.Option(help="Bearer token.", envvar="KFP_TOKEN")] = "",
    service_account: Annotated[str, typer.Option(help="Of the run's pods.")] = "",
    every: Annotated[str | None, typer.Option(metavar="DURATION", help="Run again and again: 6h, 1d, 1w.")] = None,
    cron: Annotated[str | None, typer.Option(metavar="EXPR", help="Likewise, at times; six fields.")] = None,
    enable_watch: Annotated[bool, typer.Option("--watch", help="Show progress until the run ends.")] = False,
) -> None:
    """Put a pipeline on a Kubeflow Pipelines server and start it, once or on a schedule."""
    from pipelines.submit import (
        Server,
        Submission,
        check_cron,
        parse_every,
        parse_parameters,
        store_spec,
        submit,
        takes_spec,
        watch,
    )

    is_recurring = every is not None or cron is not None
    if every is not None and cron is not None:
        raise SpecError("--every and --cron exclude each other", remedy="Give one of them")
    if is_recurring and enable_watch:
        raise SpecError("--watch follows one run, and a schedule makes many", remedy="Leave one of them out")
    every_s = None if every is None else parse_every(every)
    cron = None if cron is None else check_cron(cron)
    given = parse_parameters(pipeline, param or [])
    server = Server(host.rstrip("/"), token, namespace)
    parameters = given
    if takes_spec(pipeline):
        resolved = resolve_spec(spec, recipe_name, assignments or [], prompts=None, workspace=workspace)
        name = name or resolved.name
        parameters = {
            "spec_uri": store_spec(resolved, resolved.workspace),
            "workspace": resolved.workspace,
            "suites": list(resolved.evaluation.suites),
            **given,
        }
    made = submit(
        server,
        Submission(pipeline, parameters, experiment, name or pipeline, service_account, every_s, cron),
    )
    if made.is_recurring:
        typer.echo(f"Recurring run {made.run_id}: {server.host}/#/recurringrun/details/{made.run_id}")
        return
    typer.echo(f"Run {made.run_id}: {server.host}/#/runs/details/{made.run_id}")
    if enable_watch:
        watch(server, made.run_id, typer.echo)
