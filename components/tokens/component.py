"""KFP component of the station ``tokens``: conversations become token sequences."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def tokens(
    spec_uri: str,
    workspace: str,
    responses: Input[Dataset],
    result: Output[Dataset],
) -> None:
    """Turn conversations into token sequences with a loss mask.

    Args:
        spec_uri: Path or object URI of the resolved run spec (YAML).
        workspace: URI of the workspace.
        responses: Result of the station responses.
        result: Receives the step's result (JSON) and a summary as metadata.
    """
    from components.runtime import run_station

    run_station("tokens", spec_uri, workspace, {"responses": responses}, result=result)
