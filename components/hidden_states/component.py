"""KFP component of the station ``hidden-states``: capture the target's hidden states."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def hidden_states(
    spec_uri: str,
    workspace: str,
    tokens: Input[Dataset],
    result: Output[Dataset],
) -> None:
    """Capture the frozen target's hidden states into the cache.

    Args:
        spec_uri: Path or object URI of the resolved run spec (YAML).
        workspace: URI of the workspace.
        tokens: Result of the station tokens.
        result: Receives the step's result (JSON) and a summary as metadata.
    """
    from components.runtime import run_station

    run_station("hidden-states", spec_uri, workspace, {"tokens": tokens}, result=result)
