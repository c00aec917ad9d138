"""The engine's own scheduler on machines that are not here: throughput, speed a user sees and budget, by load.

Usage: ``python -m benchmarks.simulate [--machine qwen3-8b-h100 ...] [--concurrency 1 8 64 512 1000] [--out FOLDER]``

Runs :mod:`draftline.simulation` for every policy at every concurrency, prints a table a machine and a load and, with
``--out``, writes ``NAME.png`` (in the manner of the DSpark paper's figures 7 and 8) and ``NAME.json``. Nothing is
measured here: steps take what the cost table says, drafts are accepted as the traffic draws them; both are described,
with sources, in ``draftline/simulation/machines.py`` and ``traffic.py``. The decisions are the product's own code.

Machines: ``qwen3-8b-h100``, ``qwen3-14b-h100``, ``llama3.1-8b-h100``, ``llama3.1-70b-4xh100`` (roofline) and
``deepseek-v4-mi350`` (from published throughputs, whose adaptive figures are printed beside ours).

Examples:
  python -m benchmarks.simulate                                    a minute or two: Qwen3-8B on one H100, mixed traffic
  python -m benchmarks.simulate --traffic chat --out docs/img      where a fixed block falls below plain decoding
  python -m benchmarks.simulate --machine deepseek-v4-mi350        against vLLM's published figures
  python -m benchmarks.simulate --requests-per-second 5 20 40      Poisson arrivals instead of a fixed number of users
  python -m benchmarks.simulate --confidence-offset 1              confidences that promise too much
  python -m benchmarks.simulate --costs calibration.json           your own profile of the calibration step
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from draftline.report.style import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE, VERMILION
from draftline.scheduling.costs import CostTable
from draftline.simulation.machines import (
    MACHINES,
    PUBLISHED_CONCURRENCIES,
    PUBLISHED_TOKENS_PER_S,
    machine_costs,
)
from draftline.simulation.simulate import POLICIES, Load, Outcome, simulate
from draftline.simulation.traffic import TRAFFIC, Traffic

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
LOOKS = {
    "off": (GREY, "o"),
    "fixed 1": (ORANGE, "v"),
    "fixed 7": (VERMILION, "s"),
    "threshold": (PURPLE, "D"),
    "sync": (GREEN, "^"),
    "async": (BLUE, "o"),
}


def main() -> None:
    """Simulate, print, draw."""
    arguments = _arguments()
    for name in ["costs"] if arguments.costs else arguments.machine:
        costs = _file_costs(arguments.costs) if arguments.costs else machine_costs(name)
        chosen = arguments.traffic or ("sharegpt" if name == "deepseek-v4-mi350" else "mix")
        traffic = replace(
            TRAFFIC[chosen],
            seed=arguments.seed,
            confidence_offset=arguments.confidence_offset,
            confidence_noise=arguments.confidence_noise,
        )
        if arguments.requests_per_second:
            rates = [Load(requests_per_s=rate, num_steps=arguments.steps) for rate in arguments.requests_per_second]
            rows = [(f"{load.requests_per_s:g}/s", _compare(costs, traffic, load, arguments.policy)) for load in rates]
        else:
            users = arguments.concurrency or (PUBLISHED_CONCURRENCIES if name == "deepseek-v4-mi350" else CONCURRENCIES)
            rows = [(str(n), _compare(costs, traffic, _closed(n, arguments.steps), arguments.policy)) for n in users]
        print(f"\n## {name}, {chosen} traffic\n\n{table(rows)}", flush=True)
        if name == "deepseek-v4-mi350" and not arguments.requests_per_second:
            print(f"\n{_beside_published(dict(rows))}", flush=True)
        if arguments.out:
            _write(arguments.out, f"simulated-{name}-{chosen}", f"{name}, {chosen} traffic", rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", nargs="+", choices=list(MACHINES), default=["qwen3-8b-h100"])
    parser.add_argument("--costs", type=Path, help="a calibration.json or a step-cost table, in place of a machine")
    parser.add_argument("--traffic", choices=list(TRAFFIC), help="default: mix; sharegpt for deepseek-v4-mi350")
    parser.add_argument("--policy", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--concurrency", nargs="+", type=int, help="users of a closed loop, 1 to 1024")
    parser.add_argument("--requests-per-second", nargs="+", type=float, help="Poisson arrivals in place of users")
    parser.add_argument("--steps", type=int, default=300, help="measured steps at high load; more at low (default 300)")
    parser.add_argument("--confidence-offset", type=float, default=0.0, help="added to the reported confidence logits")
    parser.add_argument("--confidence-noise", type=float, default=0.0, help="standard deviation of noise on them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for NAME.png and NAME.json")
    arguments = parser.parse_args()
    if any(not 1 <= n <= Load().max_requests for n in arguments.concurrency or ()):
        parser.error(f"--concurrency: got {arguments.concurrency}, expected 1 to {Load().max_requests}")
    if any(not rate > 0 for rate in arguments.requests_per_second or ()):
        parser.error(f"--requests-per-second: got {arguments.requests_per_second}, expected numbers above 0")
    if arguments.steps < 1:
        parser.error(f"--steps: got {arguments.steps}, expected 1 or more")
    return arguments


def _file_costs(path: Path) -> CostTable:
    document = json.loads(path.read_text())
    found = document.get("draftline", {}).get("cost_table", document) if isinstance(document, dict) else document
    return CostTable.from_json(found)


def _closed(users: int, steps: int) -> Load:
    """Few users need more steps for as many tokens."""
    return Load(num_users=users, num_steps=max(steps, min(20 * steps, 40 * steps // users)))


def _compare(costs: CostTable, traffic: Traffic, load: Load, policies: Sequence[str]) -> list[Outcome]:
    return [simulate(policy, costs, traffic, load) for policy in policies]


def table(rows: Sequence[tuple[str, Sequence[Outcome]]]) -> str:
    """Markdown, a row a load and policy; throughput also as a ratio to ``off``."""
    lines = [
        "| load | policy | tokens/s | against off | tokens/s per user | drafts verified | tokens per step | step ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label, outcomes in rows:
        plain = next((o.tokens_per_s for o in outcomes if o.policy == "off"), math.nan)
        for o in outcomes:
            lines.append(
                f"| {label} | {o.policy} | {o.tokens_per_s:,.0f} | {o.tokens_per_s / plain:.2f} | "
                f"{o.tokens_per_s_per_user:.1f} | {o.mean_budget:.2f} | {o.accepted_length:.2f} | {o.step_ms:.1f} |"
            )
    return "\n".join(lines)


def _beside_published(rows: Mapping[str, Sequence[Outcome]]) -> str:
    """Ours beside vLLM's; ``off`` and ``fixed 7`` agree by construction, ``async`` is a prediction."""
    lines = ["| users | off | published | fixed 7 | published | async | published |", "| --- " * 7 + "|"]
    for place, users in enumerate(PUBLISHED_CONCURRENCIES):
        found = {o.policy: o.tokens_per_s for o in rows.get(str(users), ())}
        if found:
            cells = [
                f"{found.get(ours, math.nan):,.0f} | {PUBLISHED_TOKENS_PER_S[theirs][place]:,.0f}"
                for ours, theirs in (("off", "off"), ("fixed 7", "fixed 7"), ("async", "adaptive"))
            ]
            lines.append(f"| {users} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _write(folder: Path, name: str, title: str, rows: Sequence[tuple[str, Sequence[Outcome]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = [{"load": label, **asdict(outcome)} for label, outcomes in rows for outcome in outcomes]
    for row in document:
        row["first_token_ms"] = None if math.isnan(row["first_token_ms"]) else row["first_token_ms"]
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    style: Any = {**{k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}, **STYLE}
    with matplotlib.rc_context(style):
        figure = draw(title, rows)
        FigureCanvasAgg(figure)
        figure.savefig(folder / f"{name}.png", format="png", dpi=100, metadata={"Software": None})
    print(f"\nwrote {folder / name}.png and .json", flush=True)


def draw(title: str, rows: Sequence[tuple[str, Sequence[Outcome]]]) -> Figure:
    """Pareto of per-user speed and throughput; throughput against ``off``, budget and accepted length by load."""
    figure = Figure(figsize=(11.5, 8.2), layout="constrained")
    figure.suptitle(f"Simulated: {title}", x=0.01, ha="left", weight="bold", size=13)
    (pareto, ratio), (budget, accepted) = figure.subplots(2, 2)
    policies = [o.policy for o in rows[0][1]]
    by_policy = {policy: [outcomes[k] for _, outcomes in rows] for k, policy in enumerate(policies)}
    for policy, outcomes in by_policy.items():
        _line(pareto, policy, [o.tokens_per_s_per_user for o in outcomes], [o.tokens_per_s for o in outcomes])
        loads = [max(o.concurrency, 0.1) for o in outcomes]
        if plain := by_policy.get("off"):
            against = [o.tokens_per_s / p.tokens_per_s for o, p in zip(outcomes, plain, strict=True)]
            _line(ratio, policy, loads, against)
        _line(budget, policy, loads, [o.mean_budget for o in outcomes])
        _line(accepted, policy, loads, [o.accepted_length for o in outcomes])
    for outcome, (label, _) in zip(by_policy.get("async", ()), rows, strict=False):
        at = (outcome.tokens_per_s_per_user, outcome.tokens_per_s)
        pareto.annotate(label, at, (5, 4), textcoords="offset points", size=7.5, color=BLUE)
    pareto.set(title="Throughput against speed a user sees", xlabel="tokens/s per user", ylabel="tokens/s, all users")
    pareto.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ratio.set(title="Throughput against plain decoding", ylabel="ratio to off")
    budget.set(title="Drafts verified per request and step", ylabel="drafts")
    accepted.set(title="Tokens per request and step", ylabel="tokens")
    for axes in (ratio, budget, accepted):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("requests decoding at a time")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axes in (pareto, ratio, budget, accepted):
        axes.grid()
    handles, labels = pareto.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _line(axes: Axes, policy: str, x: Sequence[float], y: Sequence[float]) -> None:
    color, marker = LOOKS[policy]
    width = 2.4 if policy == "async" else 1.4
    axes.plot(x, y, color=color, marker=marker, markersize=4, linewidth=width, label=policy)


if __name__ == "__main__":
    main()
