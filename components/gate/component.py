"""KFP component of the station ``gate``: decide whether the draft may be promoted."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Input, Model, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def gate(
    spec_uri: str,
    workspace: str,
    report: Input[Artifact],
    register: Input[Model],
    result: Output[Artifact],
    page: Output[HTML],
) -> bool:
    """Apply the gate's written policy and set the alias.

    Args:
        spec_uri: Path or object URI of the resolved run spec (YAML).
        workspace: URI of the workspace.
        report: Result of the station report.
        register: Result of the station register.
        result: Receives the step's result (JSON) and a summary as metadata.
        page: Receives the verdict, rule by rule, for the KFP page.

    Returns:
        Whether the draft passed.
    """
    from components.runtime import run_station

    outcome = run_station(
        "gate", spec_uri, workspace, {"report": report, "register": register}, result=result, page=page
    )
    return bool(outcome.outputs["passed"])
