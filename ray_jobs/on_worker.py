"""Run one function on a Ray worker that has all free CPUs of a machine to itself."""

from __future__ import annotations

import os
from collections.abc import Callable

import ray
import torch

from draftline.steps import StepContext, StepOutput
from ray_jobs.runtime import cluster_cpus, reserved_cpus


@ray.remote
def _call(function: Callable[[StepContext], StepOutput], context: StepContext, threads: int) -> StepOutput:
    # Logical CPUs may outnumber the real ones, and threads that share a core wait for each other.
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    return function(context)


def run_on_worker(function: Callable[[StepContext], StepOutput], context: StepContext) -> StepOutput:
    """Call ``function(context)`` with every free CPU reserved, so that timings are its own.

    What an idle endpoint on the same Ray holds is not waited for.

    Raises:
        ray.exceptions.RayTaskError: with the function's error as its cause.
    """
    threads = _node_cpus()
    output: StepOutput = ray.get(_call.options(num_cpus=reserved_cpus(threads)).remote(function, context, threads))
    return output


def _node_cpus() -> int:
    """CPUs of the largest node; a task cannot span nodes."""
    nodes = ray.nodes()
    largest = max((node["Resources"].get("CPU", 0) for node in nodes if node["Alive"]), default=0)
    return max(1, min(int(largest), cluster_cpus()))
