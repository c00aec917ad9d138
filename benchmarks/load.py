"""The endpoint under load: every scheduling policy at 1 to 64 users, and other ways of decoding beside it.

Usage: ``python -m benchmarks.load --workspace .draftline/workspace [--llama-python PYTHON]
[--llama-server PROGRAM] [--output DIR]``

Takes the draft of a run of the recipe (``make demo``) from its workspace, serves it over HTTP in a process of its own,
and keeps N users busy with held-out tickets and HumanEval problems, three to one. All policies are measured on the same
process, in turn, at each number of users; figures are medians over the rounds and ratios are taken within a round.

- ``off`` is plain decoding, ``fixed 1`` a one-token drafter (the paper's MTP-1 baseline), ``fixed`` whole blocks.
- Beside them, at one user: ``transformers`` generate, the same with prompt lookup, and llama.cpp on the same weights in
  bf16 (``--llama-python`` names an interpreter with llama-cpp-python; see benchmarks/llama_peer.py).
- llama.cpp's own server (``--llama-server`` names the program) under the same users and prompts, in turn with the
  policies, up to 16 users.
- llama.cpp decoding N sequences in one batch, without HTTP and without prompts: more than a server of it could reach.

``--quick`` is a short run that shows that everything works; its figures mean little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from rich.console import Console

from benchmarks.load_client import Window, one_after_another, under_load
from benchmarks.load_peers import MAX_USERS, PeerRates, Peers
from benchmarks.load_plots import write_plots
from benchmarks.stations import TRAINING, run_stations
from benchmarks.timing import with_allocator_settings
from draftline.evaluation.prompt import SuitePrompt
from draftline.evaluation.suites import load_suite
from draftline.prompts.spread import even_spread
from draftline.spec import RECIPES, RunSpec, derive, recipe
from draftline.spec.models import HELD_OUT
from draftline.storage import open_store

POLICIES: Mapping[str, Mapping[str, object]] = {
    "off": {"policy": "off"},
    "fixed 1": {"policy": "fixed", "fixed_length": 1},
    "fixed": {"policy": "fixed"},
    "threshold": {"policy": "threshold"},
    "sync": {"policy": "sync"},
    "async": {"policy": "async"},
}
Messages = list[dict[str, str]]
USERS = (1, 2, 4, 8, 16, 32, 64)
PLAIN, OURS = "off", "async"


@dataclass(frozen=True)
class Point:
    """One policy at one load; medians over the rounds.

    Attributes:
        policy: Which.
        users: Concurrent requests.
        tokens_per_s: All users together.
        per_user: Tokens per second after the first token, median over requests.
        per_user_p1: The same, slowest of a hundred.
        ttft_p50_ms: Time to the first token.
        ttft_p99_ms: The same, slowest of a hundred.
        budget: Draft tokens verified per request and step.
        accepted_length: Tokens per request and step.
        step_ms: Of a step.
        draft_share: Of the time in steps that went into drafting.
        over_plain: Throughput over that of ``off``, median of the rounds' ratios.
    """

    policy: str
    users: int
    tokens_per_s: float
    per_user: float
    per_user_p1: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    budget: float
    accepted_length: float
    step_ms: float
    draft_share: float
    over_plain: float


@dataclass(frozen=True)
class Report:
    """Everything that was measured.

    Attributes:
        points: Policies under load.
        peers: Other ways of decoding beside ours, by name.
        about: Machine, dtype and settings, for the heading.
    """

    points: list[Point]
    peers: PeerRates
    about: str

    def to_markdown(self) -> str:
        """Heading, tables and what follows from them."""
        return "\n\n".join([self.about, _points_table(self.points), self.peers.to_markdown(), verdict(self)]) + "\n"


def main() -> None:
    """Serve, load, print, plot."""
    with_allocator_settings()
    arguments = _arguments()
    trained = recipe(arguments.recipe)
    store = open_store(arguments.workspace)
    done = run_stations(trained, store, (*TRAINING, "calibration"))
    spec = derive(trained, {"serving.max_context": arguments.context, "serving.policy": OURS})
    held_out = load_suite(HELD_OUT, spec.evaluation, store, done["prompts"], max_prompts=arguments.prompts)
    tickets = [_messages(prompt) for prompt in held_out]
    problems = [_messages(p) for p in load_suite("humaneval", spec.evaluation, store, done["prompts"])]
    mix = _mixed(tickets, even_spread(problems, max(1, len(tickets) // 3)))
    with tempfile.TemporaryDirectory(prefix="draftline-load-") as scratch:
        request = {
            "spec": spec.model_dump(mode="json"),
            "workspace": arguments.workspace,
            "draft": done["draft"].to_json(),
            "calibration": done["calibration"].to_json(),
            "slots": max(arguments.users),
            "context": arguments.context,
            "threads": arguments.threads,
        }
        contenders = Peers(
            spec.target, Path(scratch), arguments.llama_python, arguments.llama_server, arguments.threads
        )
        with contenders as peers, _server(request, Path(scratch)) as url:
            run = _Run(url, spec, arguments, peers.server_url)
            run.warm_peer(mix)
            rounds = [run.round(number, mix) for number in range(arguments.rounds)]
            rates = _beside_peers(run, peers, even_spread(tickets, arguments.peer_prompts))
    report = Report(summarise(rounds), rates, _about(spec, arguments))
    print(report.to_markdown())
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "load.md").write_text(report.to_markdown(), encoding="utf-8")
        (arguments.output / "load.json").write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
        write_plots(report.points, arguments.output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", default=".draftline/workspace", help="a directory or s3://bucket/prefix")
    parser.add_argument("--recipe", default="smollm2-135m", choices=sorted(RECIPES))
    parser.add_argument("--users", type=int, nargs="+", default=list(USERS), help="concurrent requests")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES), metavar="POLICY")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of one measured window")
    parser.add_argument("--rounds", type=int, default=2, help="times that everything is measured")
    parser.add_argument("--max-tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--prompts", type=int, default=48, help="held-out prompts of the mix")
    parser.add_argument("--peer-prompts", type=int, default=6, help="prompts of the comparison at one user")
    parser.add_argument("--context", type=int, default=1024, help="positions of a slot")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of every engine")
    parser.add_argument("--llama-python", help="interpreter with llama-cpp-python; without it llama.cpp is left out")
    parser.add_argument("--llama-server", help="llama.cpp's llama-server; without it the server is left out")
    parser.add_argument("--output", type=Path, help="folder for load.md, load.json and the plots")
    parser.add_argument("--quick", action="store_true", help="two loads, short windows, one round")
    arguments = parser.parse_args()
    if PLAIN not in arguments.policies:
        parser.error(f"--policies needs {PLAIN}, which all others are compared with")
    if arguments.quick:
        arguments.users, arguments.seconds, arguments.rounds, arguments.peer_prompts = [1, 4], 3.0, 1, 1
    return arguments


def _messages(prompt: SuitePrompt) -> list[dict[str, str]]:
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, {"role": "user", "content": prompt.turns[0]}]


def _mixed(tickets: Sequence[Messages], problems: Sequence[Messages]) -> list[Messages]:
    """Three tickets, one problem, and so on."""
    mix = list(tickets)
    for number, problem in enumerate(problems):
        mix.insert(4 * number + 3, problem)
    return mix


@contextmanager
def _server(request: Mapping[str, object], scratch: Path) -> Iterator[str]:
    """The endpoint in a process of its own; its messages go to this one's."""
    document = scratch / "request.json"
    document.write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.load_server", str(document)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.strip():
            raise SystemExit("the endpoint did not start; its messages are above")
        yield f"http://127.0.0.1:{int(line)}"
    finally:
        process.terminate()
        process.wait(timeout=30)


class _Run:
    def __init__(self, url: str, spec: RunSpec, arguments: argparse.Namespace, peer_url: str | None) -> None:
        self.url, self.model = url, spec.serving.model_name
        self.served: dict[int, list[float]] = {}
        self._peer_url = peer_url
        self.max_tokens: int = arguments.max_tokens
        self._arguments = arguments
        self._console = Console(stderr=True)

    def choose(self, policy: str) -> None:
        httpx.post(f"{self.url}/benchmark/policy", json=dict(POLICIES[policy]), timeout=60).raise_for_status()

    def round(self, number: int, prompts: Sequence[Messages]) -> dict[tuple[str, int], Window]:
        """Every policy at every load once; each round begins with another policy."""
        found = {}
        policies: list[str] = self._arguments.policies
        turned = policies[number % len(policies) :] + policies[: number % len(policies)]
        for users in self._arguments.users:
            for policy in turned:
                self.choose(policy)
                # Every window asks the same prompts from the first on: prefixes are warm for all but the first.
                found[policy, users] = self._window(self.url, prompts, users)
                self._say(number, users, policy, found[policy, users])
            if self._peer_url is not None and users <= MAX_USERS:
                window = self._window(self._peer_url, prompts, users)
                self.served.setdefault(users, []).append(_rate(window))
                self._say(number, users, "llama.cpp's server", window)
        return found

    def warm_peer(self, prompts: Sequence[Messages]) -> None:
        """Fill the prompt cache of llama.cpp's server, if it takes part: ours is warm after its first windows."""
        if self._peer_url is not None:
            asyncio.run(one_after_another(self._peer_url, self.model, prompts, max_tokens=1))

    def _window(self, url: str, prompts: Sequence[Messages], users: int) -> Window:
        return asyncio.run(
            under_load(
                url,
                self.model,
                prompts,
                users=users,
                seconds=self._arguments.seconds,
                max_tokens=self.max_tokens,
                has_totals=url == self.url,
            )
        )

    def _say(self, number: int, users: int, name: str, window: Window) -> None:
        self._console.print(f"round {number + 1}, {users} users, {name}: {_rate(window):.1f} tokens/s", style="dim")


def _beside_peers(run: _Run, peers: Peers, prompts: Sequence[Messages]) -> PeerRates:
    """One user, prompt by prompt: ours first, then each peer for as many tokens."""
    rates = PeerRates()
    for messages in prompts:
        for policy in (PLAIN, OURS):
            run.choose(policy)
            asked = one_after_another(run.url, run.model, [messages], max_tokens=run.max_tokens)
            answer = asyncio.run(asked)[0]
            rates.add(f"Draftline, {policy}", answer.tokens_per_s)
        if answer.num_tokens > 1:
            peers.measure(messages, answer.num_tokens, rates)
    rates.batched = peers.batched([users for users in USERS if users <= MAX_USERS])
    rates.served = run.served
    return rates


def summarise(rounds: Sequence[Mapping[tuple[str, int], Window]]) -> list[Point]:
    """Medians over rounds, and ratios to plain decoding taken within each."""
    points = []
    for policy, users in rounds[0]:
        windows = [found[policy, users] for found in rounds]
        rates = [_rate(window) for window in windows]
        plain = [_rate(found[PLAIN, users]) for found in rounds]
        answers = [answer for window in windows for answer in window.answers]
        speeds = sorted(answer.tokens_per_s for answer in answers if answer.num_tokens > 1)
        firsts = sorted(1000 * answer.ttft_s for answer in answers)
        sums = {name: sum(window.totals[name] for window in windows) for name in windows[0].totals}
        per_request = max(sums["request_steps"], 1)
        points.append(
            Point(
                policy,
                users,
                tokens_per_s=statistics.median(rates),
                per_user=_at(speeds, 0.5),
                per_user_p1=_at(speeds, 0.01),
                ttft_p50_ms=_at(firsts, 0.5),
                ttft_p99_ms=_at(firsts, 0.99),
                budget=sums["budget"] / per_request,
                accepted_length=1 + sums["accepted"] / per_request,
                step_ms=sums["busy_ms"] / max(sums["steps"], 1),
                draft_share=sums["draft_ms"] / max(sums["busy_ms"], 1e-9),
                over_plain=statistics.median(ours / theirs for ours, theirs in zip(rates, plain, strict=True)),
            )
        )
    return points


def _rate(window: Window) -> float:
    return window.totals["emitted"] / window.seconds


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def _points_table(points: Sequence[Point]) -> str:
    lines = [
        "| users | policy | tokens/s | over plain | a user, p50 | p1 | TTFT p50 | p99 | budget | accepted length "
        "| step | drafting |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for point in sorted(points, key=lambda point: point.users):
        cells = (
            str(point.users),
            point.policy,
            f"{point.tokens_per_s:.1f}",
            f"{point.over_plain:.2f}x",
            f"{point.per_user:.1f}",
            f"{point.per_user_p1:.1f}",
            f"{point.ttft_p50_ms:.0f} ms",
            f"{point.ttft_p99_ms:.0f} ms",
            f"{point.budget:.2f}",
            f"{point.accepted_length:.2f}",
            f"{point.step_ms:.0f} ms",
            f"{point.draft_share:.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(report: Report) -> str:
    """What the claims come to: never slower than plain or fixed, and a budget that falls with load."""
    by_load: dict[int, dict[str, Point]] = {}
    for point in report.points:
        by_load.setdefault(point.users, {})[point.policy] = point
    lines = []
    for other in (name for name in by_load[min(by_load)] if name != OURS):
        ratios = {
            users: found[OURS].tokens_per_s / found[other].tokens_per_s
            for users, found in by_load.items()
            if OURS in found and other in found
        }
        if ratios:
            worst = min(ratios, key=lambda users: ratios[users])
            lines.append(
                f"- {OURS} over {other}: {ratios[worst]:.2f}x to {max(ratios.values()):.2f}x, least at {worst}"
            )
    budgets = [f"{found[OURS].budget:.2f}" for _, found in sorted(by_load.items()) if OURS in found]
    lines.append(f"- budget of {OURS} by load: {', '.join(budgets)}")
    for users, rate in report.peers.batched.items():
        if OURS in by_load.get(users, {}):
            ours = by_load[users][OURS].tokens_per_s
            lines.append(
                f"- {OURS} over llama.cpp's batched decoding at {users}: {ours / rate:.2f}x ({rate:.0f} tokens/s)"
            )
    for users, served in report.peers.served.items():
        if OURS in by_load.get(users, {}):
            ours, theirs = by_load[users][OURS].tokens_per_s, statistics.median(served)
            lines.append(f"- {OURS} over llama.cpp's server at {users}: {ours / theirs:.2f}x ({theirs:.0f} tokens/s)")
    return "\n".join(lines)


def _about(spec: RunSpec, arguments: argparse.Namespace) -> str:
    return (
        f"{arguments.recipe}, dtype {spec.target.dtype}, {arguments.threads} threads, answers of at most "
        f"{arguments.max_tokens} tokens, greedy, {arguments.rounds} rounds of {arguments.seconds:.0f} s windows."
    )


if __name__ == "__main__":
    # One Ray for each job, on loopback alone.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    main()
