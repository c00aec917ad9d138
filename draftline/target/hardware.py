"""What this machine multiplies fast; torch-free."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Literal


def preferred_dtype() -> Literal["bf16", "fp32"]:
    """The faster dtype of this machine's CPU: bf16 with AMX, else fp32.

    A CPU without AMX emulates bf16 products: eight rows then cost nearly four
    times one row and verifying a block cannot pay, while fp32 stays at 1.5.
    """
    try:
        return "bf16" if "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace") else "fp32"
    except OSError:
        return "fp32"


def machine_name() -> str:
    """The processor and how many of its threads this process may use; equal where timings can be compared."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    model = ", ".join(sorted(models)) or platform.machine()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{model} x {threads}"
