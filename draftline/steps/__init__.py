"""Content-addressed steps: the DAG's table, keys, and the ledger of results.

:func:`draftline.steps.execute.execute` runs one; it is not re-exported here
because jobs import this package.
"""

from draftline.steps.context import StepContext, StepOutput
from draftline.steps.ledger import Ledger, StepResult, step_prefix
from draftline.steps.stations import STATIONS, Station, content_key

__all__ = [
    "STATIONS",
    "Ledger",
    "Station",
    "StepContext",
    "StepOutput",
    "StepResult",
    "content_key",
    "step_prefix",
]
