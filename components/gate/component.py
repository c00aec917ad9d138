"""KFP component of the station ``gate``: decide whether the draft may be promoted."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Model, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def gate(
    spec_uri: str,
    workspace: str,
    report: Input[Artifact],
    register: Input[Model],
    result: Output[Artifact],
) -> bool:
    """Apply the gate's written policy and set the alias.

    Args:
        spec_uri: Path or object URI of the resolved run spec (YAML).
        workspace: URI of the workspace.
        report: Result of the station report.
        register: Result of the station register.
        result: Receives the step's result (JSON) and a summary as metadata.

    Returns:
        Whether the draft passed.
    """
    from components.runtime import run_station

    outcome = run_station("gate", spec_uri, workspace, {"report": report, "register": register}, result=result)
    return bool(outcome.outputs["passed"])
