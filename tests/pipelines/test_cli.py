"""The command line: what it prints, and one clear line with an exit code for whatever is wrong."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from draftline import __version__, errors
from draftline.spec import RunSpec, dump_spec, parse_spec, recipe
from pipelines.cli import ErrorBoundary, app
from tests.servers.faulty_s3 import Fault, running_faulty_s3

RECIPE = "smollm2-135m"


def invoke(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def refused(*arguments: str) -> tuple[int, str]:
    """Exit code and the one line on stderr of a command that must fail."""
    code, _, stderr = invoke(*arguments)
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    return code, lines[0]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be written where the tests are started, and no endpoint may come from outside."""
    monkeypatch.chdir(tmp_path)
    for name in ("DRAFTLINE_DEBUG", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def test_version_and_help() -> None:
    assert invoke("--version") == (0, f"draftline {__version__}\n", "")
    code, out, _ = invoke("--help")
    assert code == 0
    for command in ("run", "demo", "up", "status", "down", "recipes", "compile", "validate", "plan"):
        assert f" {command} " in out
        assert invoke(command, "--help")[0] == 0


def test_recipes_lists_and_prints_a_spec_that_loads_equal() -> None:
    code, out, _ = invoke("recipes")
    assert code == 0 and RECIPE in out and "support desk" in out
    code, out, _ = invoke("recipes", RECIPE)
    assert code == 0 and parse_spec(out) == recipe(RECIPE)
    code, line = refused("recipes", "smollm2-135")
    assert code == errors.SpecError.exit_code and f"Did you mean '{RECIPE}'?" in line


@pytest.mark.slow
def test_compile_writes_both_documents(tmp_path: Path) -> None:
    code, out, _ = invoke("compile", "-o", "out/pipeline.yaml")
    assert (code, out) == (0, "Wrote out/pipeline.yaml\n")
    pipeline, platform = yaml.safe_load_all((tmp_path / "out/pipeline.yaml").read_text())
    assert pipeline["pipelineInfo"]["name"] == "draftline-train-draft" and "platforms" in platform
    assert refused("compile", "-o", "pipeline.json")[0] == errors.InputError.exit_code


def test_validate(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(dump_spec(RunSpec(name="tickets")))
    code, out, _ = invoke("validate", "spec.yaml")
    assert code == 0 and "spec.yaml is valid: run 'tickets'" in out
    assert refused("validate", "missing.yaml")[0] == errors.SpecError.exit_code
    path.write_text("draft: {num_layer: 2}")
    code, line = refused("validate", "spec.yaml")
    assert code == errors.SpecError.exit_code
    assert "unknown key 'draft.num_layer'" in line and "Did you mean 'draft.num_layers'?" in line
    path.write_text("draft: {algorithm: dflash}")
    assert "set draft.markov_rank=0, draft.enable_confidence_head=false" in refused("validate", "spec.yaml")[1]
    path.write_text("")
    assert "no key 'train.step'" in refused("validate", "spec.yaml", "--set", "train.step=3")[1]


@pytest.mark.parametrize(
    "workspace", ["s3://ab/x", "s3://bucket-/x", "s3://a..b/x", "file://data", "http://minio:9000"]
)
def test_validate_looks_at_the_workspace(tmp_path: Path, workspace: str) -> None:
    (tmp_path / "spec.yaml").write_text(f"workspace: {workspace}")
    code, line = refused("validate", "spec.yaml")
    assert code == errors.SpecError.exit_code
    assert "workspace: not usable: " in line and line.count(workspace) == (2 if workspace.startswith("http") else 1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ([], errors.InputError, "neither a spec file nor --recipe"),
        (["s.yaml", "--recipe", RECIPE], errors.InputError, "both a spec file and --recipe"),
        (["missing.yaml"], errors.SpecError, "no spec at missing.yaml"),
        (["--recipe", RECIPE, "--set", "draft.num_layer=2"], errors.SpecError, "Did you mean 'draft.num_layers'"),
        (["--recipe", RECIPE, "--set", "draft"], errors.SpecError, "expected KEY=VALUE"),
        (["--recipe", RECIPE, "--workspace", "ftp://host/x"], errors.SpecError, "s3://bucket/prefix"),
        (["--recipe", RECIPE, "--prompts", "none.jsonl"], errors.InputError, "no prompts file"),
        (["--recipe", RECIPE, "--set", "target.source=./none"], errors.TargetError, "does not exist"),
        (["--recipe", RECIPE, "--set", "target.source=package:no-such"], errors.TargetError, "pip install no-such"),
    ],
)
def test_run_refuses_in_one_line(arguments: list[str], error: type[errors.DraftlineError], words: str) -> None:
    code, line = refused("run", *arguments)
    assert code == error.exit_code
    assert words in line


def test_run_refuses_an_unreachable_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for name, value in {
        "AWS_ENDPOINT_URL_S3": endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_MAX_ATTEMPTS": "1", "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    code, line = refused("run", "--recipe", RECIPE, "--workspace", "s3://bucket/prefix")
    assert code == errors.StoreUnreachable.exit_code
    assert endpoint.removeprefix("http://") in line


def test_run_refuses_wrong_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_faulty_s3() as server:
        server.always = Fault("status", 403, "InvalidAccessKeyId")
        for name, value in {"AWS_ENDPOINT_URL_S3": server.endpoint_url, "AWS_ACCESS_KEY_ID": "a",
                            "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        code, line = refused("run", "--recipe", RECIPE, "--workspace", "s3://bucket/prefix")
    assert code == errors.AccessDenied.exit_code
    assert "InvalidAccessKeyId" in line or "AWS_ACCESS_KEY_ID" in line


def test_run_refuses_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipelines.preflight.MIN_FREE_BYTES", 2**60)
    code, line = refused("run", "--recipe", RECIPE, "--workspace", "w", "--home", "h")
    assert code == errors.NoSpace.exit_code and "too little free space" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--mlflow-port", "--serve-port"])
def test_run_and_up_refuse_a_taken_port(option: str, taken_port: int) -> None:
    for command in (["run", "--recipe", RECIPE, "--workspace", "w"], ["up"]):
        code, _, stderr = invoke(*command, "--home", "h", option, str(taken_port))
        assert code == errors.PlatformError.exit_code
        assert stderr.startswith("error: ") and f"127.0.0.1:{taken_port}, the port is taken" in stderr
    assert invoke("status", "--home", "h")[0] == 1


def test_status_and_down_of_nothing() -> None:
    code, out, _ = invoke("status", "--home", "h")
    assert code == 1 and "stopped" in out
    assert invoke("down", "--home", "h") == (0, "Nothing was running.\n", "")


def boundary(error: BaseException) -> typer.Typer:
    """An application whose command fails."""
    failing = typer.Typer(cls=ErrorBoundary, pretty_exceptions_enable=False)

    @failing.callback()
    def root() -> None:
        """Make the application a group."""

    @failing.command()
    def fail(ctx: typer.Context) -> None:
        ctx.meta["home"] = Path("home")
        raise error

    return failing


def test_a_bug_is_one_line_and_its_traceback_a_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(boundary(ZeroDivisionError("division by zero")), ["fail"])
    assert result.exit_code == 1
    assert result.stderr == (
        "error: unexpected ZeroDivisionError: division by zero. The traceback is in home/logs/crash.log.\n"
    )
    assert "raise error" in (tmp_path / "home/logs/crash.log").read_text()


def test_an_interrupt_says_how_to_go_on() -> None:
    result = CliRunner().invoke(boundary(KeyboardInterrupt()), ["fail"])
    assert result.exit_code == 130
    assert "start the same command again" in result.stderr


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTLINE_DEBUG", "1")
    error = errors.SpecError("wrong")
    assert CliRunner().invoke(boundary(error), ["fail"]).exception is error


def test_a_wrong_option_is_a_usage_error() -> None:
    code, _, stderr = invoke("run", "--sett", "a=b")
    assert code == 2 and "--sett" in stderr and "Usage" in stderr
