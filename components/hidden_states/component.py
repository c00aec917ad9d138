"""KFP component of the station ``hidden-states``: capture the target's hidden states."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def hidden_states(
    spec_uri: str,
    workspace: str,
    cpu: str,
    memory: str,
    gpu_type: str,
    gpu_count: str,
    num_workers: str,
    ray_job: dict,
    tokens: Input[Dataset],
    result: Output[Dataset],
) -> None:
    """Capture the frozen target's hidden states into the cache.

    Args:
        spec_uri: Path or object URI of the resolved run spec (YAML).
        workspace: URI of the workspace.
        cpu: CPUs of each worker of the step's RayJob.
        memory: Memory of each.
        gpu_type: Resource name of its accelerator.
        gpu_count: Accelerators of each.
        num_workers: Workers.
        ray_job: Further settings of the RayJob (components/cluster/settings.py); empty computes in the step's pod.
        tokens: Result of the station tokens.
        result: Receives the step's result (JSON) and a summary as metadata.
    """
    from components.runtime import run_station

    run_station(
        "hidden-states",
        spec_uri,
        workspace,
        {"tokens": tokens},
        result=result,
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
