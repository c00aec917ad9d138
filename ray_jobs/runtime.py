"""What every Ray job does: read the request, join Ray, run, write the result."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from draftline.errors import DraftlineError, StepError
from draftline.jobs import read_request, report_result
from draftline.steps import StepContext, StepOutput
from draftline.target.allocator import ALLOCATOR_ENV

_PASSED_PREFIXES = ("AWS_", "HF_")


def main(run: Callable[[StepContext], StepOutput]) -> None:
    """Run a job from the command line; exits non-zero when it failed.

    Expected errors travel in the result and come out of the launcher as
    the same exception.
    """
    if len(sys.argv) != 3:
        sys.exit("usage: python -m ray_jobs.NAME REQUEST RESULT (paths, or URIs of objects)")
    request, result = sys.argv[1:]
    try:
        with ray_session():
            outcome: StepOutput | DraftlineError = run(read_request(request))
    except DraftlineError as error:
        outcome = error
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, DraftlineError):
            raise
        outcome = cause
    sys.exit(report_result(result, outcome))


@contextmanager
def ray_session() -> Iterator[None]:
    """Join the Ray at ``RAY_ADDRESS``, or run one for this job where that is unset (a single pod)."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        # A shared Ray was started by someone else: the job's workers need the job's own credentials.
        passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_PREFIXES)}
        ray.init(
            address=address,
            logging_level=logging.WARNING,
            log_to_driver=True,
            runtime_env={"env_vars": passed} if passed else None,
        )
    else:
        # Workers inherit the environment of the process that starts Ray.
        os.environ.update(ALLOCATOR_ENV)
        ray.init(include_dashboard=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def reserved_cpus(threads: int, workers: int = 1) -> float:
    """Logical CPUs to reserve for each of some workers, see :func:`cpu_share`.

    An endpoint on the same Ray holds a CPU for as long as it serves; a worker
    that asked for all of them would wait for ever, in silence.
    """
    return cpu_share(threads, float(ray.available_resources().get("CPU", 0.0)), workers)


def cpu_share(threads: int, free_cpus: float, workers: int) -> float:
    """A worker's threads, or its equal share of the free CPUs where that is less.

    Ray takes whole numbers above 1 and fractions below; 0 runs anywhere.
    """
    share = min(float(threads), free_cpus / workers)
    return float(math.floor(share)) if share >= 1 else math.floor(share * 100) / 100


def cluster_cpus() -> int:
    """Logical CPUs of the cluster.

    Raises:
        StepError: it has none.
    """
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if cpus < 1:
        raise StepError("the Ray cluster has no CPUs", remedy="Start it with --num-cpus of at least 1")
    return cpus
