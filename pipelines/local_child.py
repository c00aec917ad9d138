"""The process in which ``kfp.local`` runs the pipeline: ``python -m pipelines.local_child REQUEST.json``.

A process of its own because kfp.local leaves ``builtins.print`` and the root
logger altered, and tells how a run went only in coloured text. Its output
goes to the run's log; its exit code says whether the run succeeded.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from pipelines.embedded.processes import end

GRACE_S = 10.0
_POLL_S = 0.5


def main() -> int:
    """Run the requested pipeline; returns the exit code."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # A parent that is killed outright cannot stop this run: the run notices and stops itself.
    threading.Thread(target=_end_with_parent, args=(request["parent_pid"], request["scratch"]), daemon=True).start()
    try:
        run_pipeline(request["arguments"], Path(request["artifacts"]))
    finally:
        if os.getppid() != request["parent_pid"]:
            # Ending the steps made the pipeline fail: this thread may be faster than the one that ended them.
            shutil.rmtree(request["scratch"], ignore_errors=True)
    return 0


def run_pipeline(arguments: Mapping[str, Any], artifacts: Path) -> None:
    """Run the training DAG through ``kfp.local``, every step as a child process.

    Args:
        arguments: Of the pipeline.
        artifacts: Folder for the steps' artifacts.

    Raises:
        RuntimeError: a step failed (kfp's own message; the step left a better one).
    """
    from kfp import local

    from pipelines.train_draft import train_draft

    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(artifacts),
        raise_on_error=True,
        enable_caching=False,
    )
    # What only a cluster uses (image, resources) is no news in a local log, once a step.
    warnings.filterwarnings("ignore", message=".*have no effect in the current local runner", category=UserWarning)
    warnings.filterwarnings("ignore", message="You may be attemping to run a task", category=RuntimeWarning)
    train_draft(**arguments)


def _end_with_parent(parent_pid: int, scratch: str) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_POLL_S)
    grace_s = GRACE_S
    # kfp may start a next step when one has ended, hence the loop.
    while steps := psutil.Process().children(recursive=True):
        end(steps, grace_s)
        grace_s = 0.0
    shutil.rmtree(scratch, ignore_errors=True)
    # Not sys.exit: it would end this thread alone.
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
