"""KFP component of the station ``report``: card and plots."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Input, Markdown, Model, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def report(
    spec_uri: str,
    workspace: str,
    draft: Input[Model],
    calibration: Input[Artifact],
    evaluation: Input[list[Artifact]],
    result: Output[Artifact],
    card: Output[Markdown],
    page: Output[HTML],
) -> None:
    """Write the model card, the metrics and the plots.

    Args:
        spec_uri: Path or object URI of the resolved run spec (YAML).
        workspace: URI of the workspace.
        draft: Result of the station draft.
        calibration: Result of the station calibration.
        evaluation: Results of the station evaluation, one per suite.
        result: Receives the step's result (JSON) and a summary as metadata.
        card: Receives the model card for the KFP page.
        page: Receives the plots for the KFP page.
    """
    from components.runtime import run_station

    run_station(
        "report",
        spec_uri,
        workspace,
        {"draft": draft, "calibration": calibration, "evaluation": evaluation},
        result=result,
        card=card,
        page=page,
    )
