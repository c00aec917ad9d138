"""KFP component of the station ``register``: register the draft in MLflow."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Model, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def register(
    spec_uri: str,
    workspace: str,
    draft: Input[Model],
    calibration: Input[Artifact],
    report: Input[Artifact],
    result: Output[Model],
) -> None:
    """Register the draft as a new model version.

    Args:
        spec_uri: Path or object URI of the resolved run spec (YAML).
        workspace: URI of the workspace.
        draft: Result of the station draft.
        calibration: Result of the station calibration.
        report: Result of the station report.
        result: Receives the step's result (JSON) and a summary as metadata.
    """
    from components.runtime import run_station

    run_station(
        "register", spec_uri, workspace, {"draft": draft, "calibration": calibration, "report": report}, result=result
    )
