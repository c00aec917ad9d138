"""``draftline plan``: what a run will cost, printed before anything runs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table

from draftline.errors import InputError
from draftline.planner import (
    PROFILES,
    Assumptions,
    Corpus,
    HardwareProfile,
    Plan,
    Prices,
    Serving,
    Throughput,
    hardware_profile,
    make_plan,
    target_facts,
)
from draftline.planner.cache import REFERENCE
from draftline.prompts.source import read_source
from draftline.spec import RunSpec
from draftline.spec.recipes import spec_for_target
from pipelines.helm_values import helm_values
from pipelines.preflight import resolve_spec

REFERENCE_CORPUS = Corpus(1_300_000, 950)
"""Open-PerfectBlend as the reference trains on it: 1.3 million prompts, 1.24e9 tokens with their answers."""

_BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def plan(
    spec: Annotated[Path | None, typer.Argument(metavar="[SPEC.yaml]", help="The run spec.")] = None,
    recipe_name: Annotated[
        str | None, typer.Option("--recipe", metavar="NAME", help="A shipped spec; see `draftline recipes`.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="ID", help="A hub id or model directory, with its recipe or the reference's settings."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Conversations; those of the prompts file, else the reference's 1.3 million.")
    ] = None,
    tokens_per_sample: Annotated[
        float, typer.Option(help="Prompt and answer, on average; the default is the reference's.")
    ] = REFERENCE_CORPUS.tokens_per_sample,
    answer_share: Annotated[
        float, typer.Option(help="Share of those tokens that the target answers; the default counts all.")
    ] = REFERENCE_CORPUS.answer_share,
    gpu: Annotated[str, typer.Option(metavar="NAME", help=f"One of {', '.join(PROFILES)}.")] = "h100",
    peak_tflops: Annotated[float | None, typer.Option(help="Of another GPU: dense bf16.")] = None,
    utilisation: Annotated[
        str | None,
        typer.Option(metavar="A,C,T", help="Shares of the peak: answering, capture, training, as 0.08,0.4,0.3."),
    ] = None,
    measured: Annotated[
        str | None,
        typer.Option(
            metavar="A,C,T", help="Tokens/s of one GPU measured in an earlier run, in that order; 0 keeps the estimate."
        ),
    ] = None,
    gpu_hour_price: Annotated[float, typer.Option(help="Of one GPU-hour.")] = Prices().gpu_hour,
    storage_price: Annotated[float, typer.Option(help="Of one GB for a month.")] = Prices().storage_gb_month,
    storage_months: Annotated[float, typer.Option(help="How long the cache is kept.")] = Prices().storage_months,
    serving_gpus: Annotated[float, typer.Option(help="GPUs that serve the target today.")] = Serving().num_gpus,
    speedup: Annotated[float, typer.Option(help="Expected of the draft, in work per GPU-hour.")] = Serving().speedup,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the spec; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    as_helm_values: Annotated[
        bool, typer.Option("--helm-values", help="Print target and volume sizes as values of the chart.")
    ] = False,
) -> None:
    """Count a run's bytes, GPU-hours and money, before anything runs."""
    resolved = _resolve(spec, recipe_name, target, assignments or [])
    assumptions = Assumptions(
        _corpus(resolved, samples, tokens_per_sample, answer_share),
        _hardware(gpu, peak_tflops, utilisation),
        Prices(gpu_hour_price, storage_price, storage_months),
        Serving(serving_gpus, speedup),
        Throughput(*(value or None for value in _three(measured or "0,0,0", "--measured"))),
    )
    made = make_plan(resolved, target_facts(resolved.target), assumptions)
    if as_helm_values:
        typer.echo(helm_values(made, resolved), nl=False)
    elif as_json:
        typer.echo(json.dumps({**asdict(made), "gpu_hours": made.gpu_hours}, indent=2))
    else:
        Console().print(render_plan(made))


def render_plan(made: Plan) -> RenderableType:
    """The plan as tables that read from top to bottom: what is stored, what is computed, what it costs."""
    assumed = made.assumptions
    corpus = assumed.corpus
    head = (
        f"[bold]{made.target}[/bold]: {made.num_parameters / 1e9:.3g} B parameters, {made.num_taps} taps; "
        f"{corpus.num_samples:,} samples x {corpus.tokens_per_sample:g} tokens = {corpus.num_tokens:.3g} tokens, "
        f"{made.epochs:.3g} epochs"
    )
    return Group(head, "", _cache_table(made), "", _work_table(made), "", _money_table(made), "", _assumptions(made))


def _cache_table(made: Plan) -> Table:
    months = made.assumptions.prices.storage_months
    kept = "1 month" if months == 1 else f"{months:g} months"
    table = Table(title="Hidden-state cache", title_justify="left")
    table.add_column("codec", no_wrap=True)
    for name in ("bytes a token", "in all", "share", f"cost of {kept}"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in made.cache:
        name = "DeepSpec's layout" if line.codec == REFERENCE else line.codec
        chosen = line.codec == made.codec
        table.add_row(
            f"{name} (this spec)" if chosen else name,
            f"{line.token_bytes:,.0f}",
            format_bytes(line.total_bytes),
            f"{line.share:.0%}",
            format_money(line.cost),
            style="bold" if chosen else "dim" if line.codec == REFERENCE else "",
        )
    return table


def _work_table(made: Plan) -> Table:
    table = Table(title=f"Work, in hours of one {made.assumptions.hardware.name}", title_justify="left")
    table.add_column("step", no_wrap=True)
    table.add_column("GPU-hours", justify="right", no_wrap=True)
    table.add_column("cost", justify="right", no_wrap=True)
    table.add_column("counted from")
    for line in made.work:
        table.add_row(line.step, _hours(line.gpu_hours), format_money(line.cost), line.basis)
    table.add_section()
    table.add_row("together", _hours(made.gpu_hours), format_money(sum(line.cost for line in made.work)), style="bold")
    return table


def _money_table(made: Plan) -> Table:
    serving = made.assumptions.serving
    table = Table(title="Pay-back", title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    stored = "no cache" if made.codec is None else f"a cache in {made.codec}"
    table.add_row(f"work and {stored}", format_money(made.total_cost))
    table.add_row(
        f"saved per day on {serving.num_gpus:g} GPUs at {serving.speedup:g} x", format_money(made.saving_per_day)
    )
    days = "never: nothing is saved" if made.payback_days is None else f"{made.payback_days:,.1f} days"
    table.add_row("paid back after", days, style="bold")
    return table


def _assumptions(made: Plan) -> str:
    assumed = made.assumptions
    hardware, prices, serving = assumed.hardware, assumed.prices, assumed.serving
    lines = (
        f"one {hardware.name} has {hardware.peak_tflops:g} TFLOPS (dense bf16), of which answering reaches "
        f"{hardware.decode_utilisation:.0%}, capture {hardware.capture_utilisation:.0%} and training "
        f"{hardware.train_utilisation:.0%} (--gpu, --peak-tflops, --utilisation, --measured)",
        f"a GPU-hour costs {prices.gpu_hour:g}, a GB-month {prices.storage_gb_month:g} "
        "(--gpu-hour-price, --storage-price)",
        f"the draft makes a GPU do {serving.speedup:g} times the work (--speedup); whoever measures it can trust it",
        f"the target answers {assumed.corpus.answer_share:.0%} of the tokens (--answer-share); samples are equally "
        "long, and none begin alike; shard headers are left out",
        "calibration, evaluation and idle GPUs are left out",
    )
    return "[dim]Assumed:\n" + "\n".join(f"- {line}" for line in lines) + "[/dim]"


def format_bytes(size: float) -> str:
    """Decimal units, two digits at least."""
    for unit, name in _BYTE_UNITS:
        if size >= unit:
            return f"{size / unit:.{0 if size >= 10 * unit else 1}f} {name}"
    return f"{size:.0f} B"


def format_money(amount: float) -> str:
    """Whole units, or hundredths of small sums."""
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:.2f}"


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _resolve(spec: Path | None, recipe_name: str | None, target: str | None, assignments: list[str]) -> RunSpec:
    if target is None:
        return resolve_spec(spec, recipe_name, assignments)
    if spec is not None or recipe_name is not None:
        raise InputError(
            "cannot tell which run you mean",
            got="--target beside a spec",
            expected="one of a spec file, --recipe and --target",
            remedy="A spec names its target itself; override it with --set target.source=ID",
        )
    return spec_for_target(target, assignments)


def _corpus(spec: RunSpec, samples: int | None, tokens_per_sample: float, answer_share: float) -> Corpus:
    if samples is None:
        samples = _count_prompts(spec) or REFERENCE_CORPUS.num_samples
    # Longer samples are cut.
    return Corpus(samples, min(tokens_per_sample, spec.tokens.max_length), answer_share)


def _count_prompts(spec: RunSpec) -> int | None:
    """Training conversations of the spec's prompts file, before deduplication; ``None`` if it is not here."""
    if "://" in spec.prompts.source:
        return None
    try:
        lines = sum(1 for line in read_source(spec.prompts).lines() if line.strip())
    except InputError:
        return None
    prompts = min(lines, spec.prompts.limit or lines)
    held = spec.prompts.holdout_fraction + spec.prompts.validation_fraction + spec.prompts.calibration_fraction
    return max(1, round(prompts * (1 - held))) * spec.responses.samples_per_prompt


def _hardware(name: str, peak_tflops: float | None, utilisation: str | None) -> HardwareProfile:
    # A GPU of another kind is described by its peak; its name is then free.
    profile = hardware_profile(name) if peak_tflops is None or name in PROFILES else HardwareProfile(name, peak_tflops)
    if peak_tflops is not None:
        profile = replace(profile, peak_tflops=peak_tflops)
    if utilisation is None:
        return profile
    decode, capture, train = _three(utilisation, "--utilisation")
    return replace(profile, decode_utilisation=decode, capture_utilisation=capture, train_utilisation=train)


def _three(text: str, option: str) -> tuple[float, float, float]:
    try:
        first, second, third = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"cannot read {option} {text!r}",
            expected="three numbers: answering, capture, training",
            remedy=f"For example {option} 0.08,0.4,0.3",
        ) from None
    return first, second, third
