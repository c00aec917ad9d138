"""KFP component of the station ``prompts``: read and clean the prompts."""

from kfp import dsl
from kfp.dsl import Dataset, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def prompts(
    spec_uri: str,
    workspace: str,
    result: Output[Dataset],
) -> None:
    """Read, clean, deduplicate and split the prompts.

    Args:
        spec_uri: Path or object URI of the resolved run spec (YAML).
        workspace: URI of the workspace.
        result: Receives the step's result (JSON) and a summary as metadata.
    """
    from components.runtime import run_station

    run_station("prompts", spec_uri, workspace, {}, result=result)
