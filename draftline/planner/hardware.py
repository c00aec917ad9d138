"""What a GPU does an hour, assumed; every figure can be replaced on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from draftline.errors import SpecError


@dataclass(frozen=True)
class HardwareProfile:
    """One GPU.

    Attributes:
        name: What it is called in the plan.
        peak_tflops: Dense bf16 products with fp32 sums, from the maker's data sheet (no sparsity).
        capture_utilisation: Share of the peak that the capture's forwards reach: long
            prompts, no gradients.
        train_utilisation: Share that training reaches: many small blocks, a wide head.
        decode_utilisation: Share that answering reaches with large batches: decoding is
            bound by memory, not by products.
    """

    name: str
    peak_tflops: float
    capture_utilisation: float = 0.40
    train_utilisation: float = 0.30
    decode_utilisation: float = 0.08

    def __post_init__(self) -> None:
        if self.peak_tflops <= 0:
            raise SpecError(f"peak_tflops={self.peak_tflops:g} is impossible", expected="a number above 0")
        for field in ("capture_utilisation", "train_utilisation", "decode_utilisation"):
            share = getattr(self, field)
            if not 0 < share <= 1:
                raise SpecError(f"{field}={share:g} is impossible", expected="a share above 0 and at most 1")

    def hours(self, operations: float, utilisation: float) -> float:
        """GPU-hours of so many floating-point operations."""
        return operations / (self.peak_tflops * 1e12 * utilisation * 3600)


PROFILES: Mapping[str, HardwareProfile] = {
    profile.name: profile
    for profile in (
        HardwareProfile("a100", 312.0),
        HardwareProfile("l40s", 362.0),
        HardwareProfile("h100", 989.0),
        HardwareProfile("h200", 989.0),
        HardwareProfile("b200", 2250.0),
    )
}
"""Peaks are NVIDIA's for dense bf16 (SXM boards); the shares are assumptions, not measurements of Draftline."""


def hardware_profile(name: str) -> HardwareProfile:
    """A profile by name.

    Raises:
        SpecError: no such profile.
    """
    if name not in PROFILES:
        close = difflib.get_close_matches(name, PROFILES, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise SpecError(
            f"no hardware profile {name!r}",
            expected=f"one of {sorted(PROFILES)}",
            remedy=f"{hint}Any GPU can be described with --peak-tflops",
        )
    return PROFILES[name]
