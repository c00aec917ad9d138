"""KFP component of the station ``draft``: train the draft model."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Metrics, Model, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def draft(
    spec_uri: str,
    workspace: str,
    cpu: str,
    memory: str,
    gpu_type: str,
    gpu_count: str,
    num_workers: str,
    ray_job: dict,
    hidden_states: Input[Dataset],
    result: Output[Model],
    metrics: Output[Metrics],
    page: Output[HTML],
) -> None:
    """Train the draft model on the cache.

    Args:
        spec_uri: Path or object URI of the resolved run spec (YAML).
        workspace: URI of the workspace.
        cpu: CPUs of each worker of the step's RayJob.
        memory: Memory of each.
        gpu_type: Resource name of its accelerator.
        gpu_count: Accelerators of each.
        num_workers: Workers.
        ray_job: Further settings of the RayJob (components/cluster/settings.py); empty computes in the step's pod.
        hidden_states: Result of the station hidden-states.
        result: Receives the step's result (JSON) and a summary as metadata.
        metrics: Receives the step's numbers for the KFP page.
        page: Receives the training curve for the KFP page.
    """
    from components.runtime import run_station

    run_station(
        "draft",
        spec_uri,
        workspace,
        {"hidden-states": hidden_states},
        result=result,
        metrics=metrics,
        page=page,
        job=ray_job
        and {
            **ray_job,
            "cpu": cpu,
            "memory": memory,
            "gpu_type": gpu_type,
            "gpu_count": gpu_count,
            "num_workers": num_workers,
        },
    )
