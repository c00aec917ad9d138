"""KFP component of the station ``responses``: the target answers the prompts."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def responses(
    spec_uri: str,
    workspace: str,
    prompts: Input[Dataset],
    result: Output[Dataset],
) -> None:
    """Let the target answer every prompt.

    Args:
        spec_uri: Path or object URI of the resolved run spec (YAML).
        workspace: URI of the workspace.
        prompts: Result of the station prompts.
        result: Receives the step's result (JSON) and a summary as metadata.
    """
    from components.runtime import run_station

    run_station("responses", spec_uri, workspace, {"prompts": prompts}, result=result)
