"""The loss of a training step, forward and backward, against its peers: same inputs, same machine, one run.

Usage: ``python -m benchmarks.train_step [--quick] [--dtype bf16] [--speculators-python PATH]``

Peers: the same loss in plain PyTorch; the DSpark loss of the package ``speculators`` 0.9, run by the Python given,
which must have it (never this project's own environment: the two pin different versions); and the matrix products of
the plain version alone, which bound it from below. Each runs in a process of its own; times are medians, taken in
turn, with the allocator settings of the product for all; peaks of memory are taken in fresh processes with the
ordinary allocator. Anchors are as dense as the reference's: 512 in 4,096 tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.loss_worker import BLOCK, DECAY
from draftline.target.allocator import ALLOCATOR_ENV

TOKENS_PER_ANCHOR = 8
WORKER = Path(__file__).with_name("loss_worker.py")


class Worker:
    """A contender's process.

    Args:
        name: Contender.
        python: Interpreter.
        inputs: File of tensors.
        environment: Added to this process's.
    """

    def __init__(self, name: str, python: str, inputs: Path, environment: dict[str, str]) -> None:
        root = {} if name == "speculators" else {"PYTHONPATH": str(WORKER.parent.parent)}
        self._process = subprocess.Popen(
            [python, str(WORKER), name, str(inputs)],
            env={**os.environ, **root, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, command: str) -> float:
        """Send a command and wait for its number."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"a contender ended early with code {self._process.wait()}; its message is above")
        return float(answer)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Print milliseconds and peak memory of all, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--anchors", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=256, help="of the Markov head")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the LM head and its products")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--speculators-python", metavar="PATH", help="a Python that has speculators 0.9")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.vocab, arguments.anchors, arguments.hidden, arguments.repeats = 20_000, 16, 128, 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inputs.safetensors"
        save_file(_inputs(arguments), path)
        pythons = {"draftline": sys.executable, "plain": sys.executable, "products": sys.executable}
        if arguments.speculators_python:
            pythons["speculators"] = arguments.speculators_python
        else:
            print("speculators: skipped, give --speculators-python PATH to a Python that has it")
        _report(_measure(pythons, path, arguments.repeats), arguments)


def _inputs(arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    vocab, size, rank = arguments.vocab, arguments.hidden, arguments.rank
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    anchors = torch.randint(0, TOKENS_PER_ANCHOR * arguments.anchors, (arguments.anchors,), generator=generator)
    slots = (anchors.sort().values[:, None] + torch.arange(BLOCK)).flatten()
    positions, rows = torch.unique(slots, return_inverse=True)
    head = normal(vocab, size).mul_(2 * size**-0.5)
    target_hidden = normal(len(positions), size)
    hidden = target_hidden[rows] + normal(len(slots), size)
    normaliser = torch.cat([(part @ head.t()).logsumexp(-1) for part in target_hidden.split(64)])
    return {
        "head": head.to(torch.bfloat16 if arguments.dtype == "bf16" else torch.float32),
        "w2": normal(vocab, rank).mul_(0.02),
        "hidden": hidden,
        "latent": normal(len(slots), rank),
        "confidence": normal(len(slots)),
        "target_hidden": target_hidden,
        "log_normaliser": normaliser,
        "rows": rows,
        "labels": torch.randint(0, vocab, (len(slots),), generator=generator),
        "weights": torch.exp(-torch.arange(BLOCK) / DECAY).repeat(arguments.anchors),
    }


def _measure(pythons: dict[str, str], path: Path, repeats: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds and peak MiB of each."""
    memory = {}
    for name, python in pythons.items():
        worker = Worker(name, python, path, {})
        memory[name] = worker.ask("memory")
        worker.close()
    workers = {name: Worker(name, python, path, dict(ALLOCATOR_ENV)) for name, python in pythons.items()}
    times: dict[str, list[float]] = {name: [] for name in workers}
    for round_number in range(repeats + 1):
        for name, worker in workers.items():
            milliseconds = worker.ask("time")
            if round_number:
                times[name].append(milliseconds)
    for worker in workers.values():
        worker.close()
    return {name: (statistics.median(times[name]), memory[name]) for name in pythons}


def _report(figures: dict[str, tuple[float, float]], arguments: argparse.Namespace) -> None:
    slots = arguments.anchors * BLOCK
    operations = 2 * slots * arguments.vocab * (3 * arguments.hidden + 3 * arguments.rank)
    print(
        f"V = {arguments.vocab:,}, {arguments.anchors} anchors x {BLOCK} = {slots} slots, hidden {arguments.hidden}, "
        f"rank {arguments.rank}, {arguments.dtype}, {torch.get_num_threads()} threads"
    )
    own_ms, own_mib = figures["draftline"]
    for name, (milliseconds, mib) in figures.items():
        ratios = f"{milliseconds / own_ms:5.2f} x ours   {mib / own_mib:5.2f} x ours" if name != "draftline" else ""
        print(f"{name:12} {milliseconds:8.0f} ms {mib:7.0f} MiB above the inputs   {ratios}")
    products_ms = figures["products"][0]
    print(
        f"The plain version's matrix products alone: {operations / 1e9:.0f} Gflop at "
        f"{operations / 1e6 / products_ms:.0f} Gflop/s; without any other cost it would take "
        f"{products_ms / own_ms:.2f} of our time."
    )


if __name__ == "__main__":
    main()
