"""The command line: ``draftline``."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from draftline import __version__
from draftline.errors import DraftlineError, InputError
from draftline.spec import RECIPES, derive, dump_spec, load_spec, parse_overrides, parse_spec, recipe
from pipelines.cache_commands import cache_app
from pipelines.compile import DEFAULT_PIPELINE, compile_pipeline
from pipelines.convert_command import convert
from pipelines.plan import plan
from pipelines.preflight import resolve_spec
from pipelines.promotion_commands import promote, rollback, show_history
from pipelines.submit_command import EPILOG as SUBMIT_EPILOG
from pipelines.submit_command import submit_command

DEFAULT_HOME = Path(".draftline")
DEBUG_ENV = "DRAFTLINE_DEBUG"
DEMO_RECIPE = "smollm2-135m"
EXIT_INTERRUPTED = 130


class ErrorBoundary(TyperGroup):
    """Turns every exception of a command into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command; see the class."""
        try:
            return super().invoke(ctx)
        except DraftlineError as error:
            _reraise_if_debugging(error)
            _say_error(str(error))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            _say_error("interrupted; start the same command again and it continues where it stopped.")
            raise typer.Exit(EXIT_INTERRUPTED) from error
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            # Usage errors belong to typer, which shows them with the command's usage.
            if hasattr(error, "exit_code") and hasattr(error, "format_message"):
                raise
            _reraise_if_debugging(error)
            where = _write_crash_log(ctx.meta.get("home", DEFAULT_HOME))
            _say_error(f"unexpected {type(error).__name__}: {error}. The traceback is in {where}.")
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=ErrorBoundary,
    name="draftline",
    help="Train, prove, register and serve a draft model that makes an LLM answer faster without changing its output.",
    epilog=(
        "[bold]Start here[/bold]\n\n"
        "draftline demo  [dim]# the whole road on this machine, about 20 minutes[/dim]\n\n"
        "draftline recipes smollm2-135m > spec.yaml  [dim]# a complete spec to edit[/dim]\n\n"
        "draftline run spec.yaml --prompts mine.jsonl  [dim]# your own traffic[/dim]"
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(cache_app, name="cache")

Home = Annotated[Path, typer.Option(help="Directory of the embedded platform: databases, logs, runs.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the spec; repeatable.")
]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.jsonl", help='Your prompts, one {"turns": ["..."]} object a line: a file, a folder, or s3://...'
    ),
]
Workspace = Annotated[
    str | None, typer.Option(metavar="URI", help="Where every artefact lives: a directory or s3://bucket/prefix.")
]
ExitAtEnd = Annotated[bool, typer.Option("--exit", help="Stop at the end instead of serving until Ctrl-C.")]
MlflowPort = Annotated[int | None, typer.Option(help="Port for MLflow on 127.0.0.1; a free one by default.")]
ServePort = Annotated[int | None, typer.Option(help="Port for the endpoint on 127.0.0.1; a free one by default.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Entry of all commands."""
    if version:
        typer.echo(f"draftline {__version__}")
        raise typer.Exit


@app.command(
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "draftline run spec.yaml\n\n"
        "draftline run --recipe smollm2-135m --set draft.num_layers=2 --set train.steps=600\n\n"
        "draftline run --recipe smollm2-135m --prompts tickets.jsonl --workspace s3://drafts/tickets --exit\n\n"
        "Interrupt it whenever you like: the same command continues, finished steps are skipped."
    )
)
def run(
    ctx: typer.Context,
    spec: Annotated[Path | None, typer.Argument(metavar="[SPEC.yaml]", help="The run spec.")] = None,
    recipe_name: Annotated[
        str | None, typer.Option("--recipe", metavar="NAME", help="A shipped spec; see `draftline recipes`.")
    ] = None,
    assignments: Set = None,
    prompts: Prompts = None,
    workspace: Workspace = None,
    home: Home = DEFAULT_HOME,
    exit_at_end: ExitAtEnd = False,
    mlflow_port: MlflowPort = None,
    serve_port: ServePort = None,
) -> None:
    """Run the whole pipeline on this machine: train, prove, register, and serve when the gate passes."""
    from pipelines.session import SessionOptions, run_session

    ctx.meta["home"] = home
    resolved = resolve_spec(spec, recipe_name, assignments or [], prompts=prompts, workspace=workspace)
    options = SessionOptions(home, exit_at_end, mlflow_port=mlflow_port, serve_port=serve_port)
    run_session(resolved, options, Console())


@app.command(
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "draftline demo\n\n"
        "draftline demo --exit  [dim]# stop at the end[/dim]\n\n"
        "draftline demo --workspace s3://drafts/demo  [dim]# AWS_* variables give access[/dim]"
    )
)
def demo(
    ctx: typer.Context,
    assignments: Set = None,
    prompts: Prompts = None,
    workspace: Workspace = None,
    home: Home = DEFAULT_HOME,
    exit_at_end: ExitAtEnd = False,
    mlflow_port: MlflowPort = None,
    serve_port: ServePort = None,
) -> None:
    """The shipped support desk from raw tickets to a served draft, and an answer streamed from it."""
    from pipelines.session import SessionOptions, run_session

    ctx.meta["home"] = home
    resolved = resolve_spec(None, DEMO_RECIPE, assignments or [], prompts=prompts, workspace=workspace)
    options = SessionOptions(home, exit_at_end, is_demo=True, mlflow_port=mlflow_port, serve_port=serve_port)
    run_session(resolved, options, Console())


@app.command(epilog="Runs until `draftline down`; `draftline run` with the same --home uses it.")
def up(
    ctx: typer.Context,
    home: Home = DEFAULT_HOME,
    mlflow_port: MlflowPort = None,
    serve_port: ServePort = None,
) -> None:
    """Start the embedded platform: MLflow and Ray on 127.0.0.1."""
    from draftline.target.allocator import ALLOCATOR_ENV
    from pipelines.embedded import platform
    from pipelines.interrupts import terminate_as_interrupt

    ctx.meta["home"] = home
    console = Console()
    with terminate_as_interrupt():
        platform.up(
            home,
            mlflow_port=mlflow_port,
            serve_port=serve_port,
            worker_env=ALLOCATOR_ENV,
            on_event=lambda line: console.print(line, style="dim", highlight=False, soft_wrap=True),
        )
    console.print(platform.render_status(platform.status(home)))


@app.command(epilog="Exit code 0 when every service runs, 1 otherwise.")
def status(ctx: typer.Context, home: Home = DEFAULT_HOME) -> None:
    """Show the embedded platform's services, addresses and logs."""
    from pipelines.embedded import platform

    ctx.meta["home"] = home
    found = platform.status(home)
    Console().print(platform.render_status(found))
    if not found.is_running:
        raise typer.Exit(1)


@app.command(epilog="Data and logs stay; only processes are stopped.")
def down(ctx: typer.Context, home: Home = DEFAULT_HOME) -> None:
    """Stop the embedded platform and everything it started."""
    from pipelines.embedded import platform

    ctx.meta["home"] = home
    stopped = platform.down(home)
    typer.echo("\n".join(stopped) if stopped else "Nothing was running.")


@app.command(
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "draftline recipes\n\n"
        "draftline recipes smollm2-135m > spec.yaml  [dim]# a complete spec to edit[/dim]"
    )
)
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe as YAML.")] = None) -> None:
    """List the shipped specs, or print one."""
    if name is not None:
        typer.echo(dump_spec(recipe(name)), nl=False)
        return
    table = Table()
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it is for")
    for known, build in RECIPES.items():
        table.add_row(known, (build.__doc__ or "").strip().splitlines()[0])
    Console().print(table)


@app.command("compile", epilog="Upload the file to Kubeflow Pipelines, or let `draftline submit` do all of it.")
def compile_command(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.yaml", help="File to write.")],
    pipeline: Annotated[str, typer.Option(metavar="NAME", help="Which pipeline.")] = DEFAULT_PIPELINE,
) -> None:
    """Compile a pipeline for a Kubeflow Pipelines cluster."""
    compile_pipeline(output, pipeline)
    typer.echo(f"Wrote {output}")


app.command("submit", epilog=SUBMIT_EPILOG)(submit_command)


app.command(
    "plan",
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "draftline plan --target Qwen/Qwen3-4B --samples 1300000 --tokens-per-sample 950\n\n"
        "draftline plan --recipe qwen3-8b --gpu h200 --gpu-hour-price 3.2 --set cache.codec=bf16\n\n"
        "draftline plan spec.yaml --json"
    ),
)(plan)


@app.command(
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "draftline validate spec.yaml --set draft.num_layers=2\n\n"
        "draftline recipes qwen3-4b | draftline validate"
    )
)
def validate(
    spec: Annotated[
        Path | None, typer.Argument(metavar="[SPEC.yaml]", help="The run spec; standard input when left out.")
    ] = None,
    assignments: Set = None,
) -> None:
    """Check a spec without running anything."""
    if spec is None:
        if sys.stdin.isatty():
            raise InputError(
                "there is no spec to check",
                expected="a file, or a spec on standard input",
                remedy="For example `draftline validate spec.yaml`",
            )
        resolved = derive(parse_spec(sys.stdin.read(), origin="standard input"), parse_overrides(assignments or []))
    else:
        resolved = resolve_spec(spec, None, assignments) if assignments else load_spec(spec)
    origin = "standard input" if spec is None else spec
    typer.echo(f"{origin} is valid: run {resolved.name!r} of target {resolved.target.source}")


app.command(
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "draftline convert draft/ draft-vllm/ --to speculators --target Qwen/Qwen3-4B  [dim]# for vLLM[/dim]\n\n"
        "draftline convert draft/ draft-vllm/ --to speculators --target ./target --with-frozen"
        "  [dim]# a pruned vocabulary[/dim]\n\n"
        "draftline convert theirs/ draft/ --to deepspec --target ./target  [dim]# for SGLang and Draftline[/dim]\n\n"
        "SRC may be of DeepSpec, speculators, SpecForge or Model-Optimizer; which is found out. Weights are copied bit "
        "by bit, and DST is compared with SRC before it takes its place."
    )
)(convert)

_EXAMPLES = "[bold]Examples[/bold]\n\n"

app.command(
    epilog=_EXAMPLES
    + (
        "draftline promote support-desk  [dim]# the challenger, if the gate lets it through now[/dim]\n\n"
        "draftline promote support-desk@7 --dry-run  [dim]# what the gate says; nothing is written[/dim]\n\n"
        "draftline promote support-desk@7 --force --reason 'incident 12: champion too slow on H200'\n\n"
        "draftline promote support-desk@challenger --host http://mlflow.draftline:5000\n\n"
        "Endpoints follow the champion within their poll interval, without dropping a request. Exit code 9: refused."
    )
)(promote)

app.command(
    epilog=_EXAMPLES
    + (
        "draftline rollback support-desk --reason 'answers slower since Tuesday'\n\n"
        "draftline rollback support-desk --dry-run\n\n"
        "The version that is left is promoted again only by force, also by a pipeline that runs again."
    )
)(rollback)

app.command(
    "history",
    epilog=_EXAMPLES + "draftline history support-desk\n\ndraftline history support-desk --json",
)(show_history)


def main() -> None:
    """Entry point of the ``draftline`` command."""
    app(prog_name="draftline")


def _say_error(text: str) -> None:
    Console(stderr=True).print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)


def _reraise_if_debugging(error: BaseException) -> None:
    if os.environ.get(DEBUG_ENV):
        raise error


def _write_crash_log(home: Path) -> str:
    path = home / "logs" / "crash.log"
    text = traceback.format_exc()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError:
        # Nowhere to write: the traceback must not be lost, so it goes where the line goes.
        sys.stderr.write(text)
        return "the lines above"
    return str(path)


if __name__ == "__main__":
    main()
