"""A process that runs the pipeline as the command line does: ``python -m tests.pipelines.run_driver SPEC HOME``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from rich.console import Console

from draftline.spec import load_spec
from pipelines.interrupts import terminate_as_interrupt
from pipelines.run_local import LocalRun, new_folder, run_local


def main() -> None:
    # The tests may have been started in the background, with these ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    spec_file, home = Path(sys.argv[1]), Path(sys.argv[2])
    spec = load_spec(spec_file)
    run = LocalRun(spec, str(spec_file), spec.workspace, new_folder(home, "test"), {})
    with terminate_as_interrupt():
        run_local(run, Console())


if __name__ == "__main__":
    main()
