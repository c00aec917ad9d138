"""KFP component of the station ``evaluation``: measure one suite.

``cpu``, ``memory``, ``gpu_type`` and ``gpu_count`` look unused and are: kfp
2.17.3 compiles resources given as pipeline parameters inside a ParallelFor to
references that the loop's sub-DAG does not declare; taking them as inputs too
makes the compiler declare them.
"""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def evaluation(
    spec_uri: str,
    workspace: str,
    suite: str,
    prompts: Input[Dataset],
    draft: Input[Model],
    calibration: Input[Artifact],
    result: Output[Artifact],
    metrics: Output[Metrics],
    cpu: str = "",
    memory: str = "",
    gpu_type: str = "",
    gpu_count: str = "",
) -> None:
    """Measure acceptance, speed-up and losslessness on one suite.

    Args:
        spec_uri: Path or object URI of the resolved run spec (YAML).
        workspace: URI of the workspace.
        suite: Name of the suite to measure.
        prompts: Result of the station prompts.
        draft: Result of the station draft.
        calibration: Result of the station calibration.
        result: Receives the step's result (JSON) and a summary as metadata.
        metrics: Receives the step's numbers for the KFP page.
        cpu: Unused; see the module's docstring.
        memory: Unused, likewise.
        gpu_type: Unused, likewise.
        gpu_count: Unused, likewise.
    """
    from components.runtime import run_station

    run_station(
        "evaluation",
        spec_uri,
        workspace,
        {"prompts": prompts, "draft": draft, "calibration": calibration},
        result=result,
        item=suite,
        metrics=metrics,
    )
