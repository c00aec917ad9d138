"""KFP component of the station ``deploy``: serve target and draft."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Model, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def deploy(
    spec_uri: str,
    workspace: str,
    register: Input[Model],
    gate: Input[Artifact],
    result: Output[Artifact],
) -> None:
    """Serve the target with the promoted draft.

    Args:
        spec_uri: Path or object URI of the resolved run spec (YAML).
        workspace: URI of the workspace.
        register: Result of the station register.
        gate: Result of the station gate.
        result: Receives the step's result (JSON) and a summary as metadata.
    """
    from components.runtime import run_station

    run_station("deploy", spec_uri, workspace, {"register": register, "gate": gate}, result=result)
