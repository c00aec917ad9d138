"""The loss's peak memory, measured in processes of its own: it does not grow with slots x vocabulary."""

from __future__ import annotations

import subprocess
import sys

VOCAB, SLOTS = 20_000, 2_000
LOGITS_MIB = SLOTS * VOCAB * 4 / 2**20

PROGRAM = """
import pathlib, sys
import torch
from draftline.draft import loss
from draftline.draft.dpace import DPace

slots, vocab, loss.CHUNK_BYTES = (int(x) for x in sys.argv[1:])
torch.set_num_threads(1)
hidden, latent = torch.ones(slots, 32, requires_grad=True), torch.ones(slots, 8, requires_grad=True)
w2, head = torch.zeros(vocab, 8, requires_grad=True), torch.full((vocab, 32), 0.01)
labels, rows = torch.zeros(slots, dtype=torch.long), torch.arange(slots) // 2
targets = loss.DistillationTargets(torch.ones(slots, 32), torch.full((slots,), 12.0), labels, torch.ones(slots), rows)
options = loss.LossOptions(0.1, 0.9, 0.1, DPace(torch.arange(slots) // 7, 0.5))

def step(count):
    part = loss.DistillationTargets(
        targets.hidden_UD, targets.log_normaliser_U, labels[:count], targets.weights_N[:count], rows[:count]
    )
    options = loss.LossOptions(0.1, 0.9, 0.1, DPace(torch.arange(count) // 7, 0.5))
    loss.distillation_loss(hidden[:count], latent[:count], w2, head, part, options).objective.backward()

def peak_kib():
    # Not getrusage's: a child inherits its parent's peak there.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])

step(14)  # what the kernels allocate once is not the step's
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = peak_kib()
step(slots)
print((peak_kib() - before) / 1024)
"""


def peak_mib(chunk_bytes: int) -> float:
    """MiB by which a step of all slots exceeds a step of two blocks."""
    command = [sys.executable, "-c", PROGRAM, str(SLOTS), str(VOCAB), str(chunk_bytes)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_peak_memory_follows_the_chunk_and_not_the_slots() -> None:
    """Two buffers of 4 MiB and what the kernels add, where one matrix of logits would take 153 MiB."""
    assert peak_mib(4 << 20) < LOGITS_MIB / 4


def test_without_chunks_it_would() -> None:
    """The measurement sees whole matrices of logits: this is what the test above would find."""
    assert peak_mib(1 << 30) > LOGITS_MIB
