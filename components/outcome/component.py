"""KFP component ``outcome``: the exit handler, which says how a run ended, whatever happened."""

from kfp import dsl
from kfp.dsl import Markdown, Output, PipelineTaskFinalStatus

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def outcome(
    status: PipelineTaskFinalStatus,
    spec_uri: str,
    workspace: str,
    summary: Output[Markdown],
) -> None:
    """Say how the run ended, on its page and in the workspace.

    Args:
        status: Given by KFP.
        spec_uri: Path or object URI of the resolved run spec (YAML).
        workspace: URI of the workspace.
        summary: Receives the same for the KFP page.
    """
    from components.outcome.step import report_outcome

    report_outcome(status, spec_uri, workspace, summary)
