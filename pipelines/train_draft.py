"""The training DAG: one pipeline object, compiled for a cluster and run by ``kfp.local`` alike.

Shapes that look odd and why (kfp 2.17.3; each is held by a test):

* Results travel as artifacts: inside a ParallelFor the local runner replaces
  parameter outputs of outer tasks by the loop item.
* The gate's verdict is its only parameter output and unnamed: the local
  runner cannot resolve a condition on a named one.
* Suites run one at a time (``parallelism=1``): they are timed.
* Resources given as parameters are registered by hand: inside a condition or a
  ParallelFor the compiler otherwise refers to inputs that the sub-DAG lacks.
* KFP's cache is off: the workspace's ledger knows what is done, and stations
  with effects (register, gate, deploy) must always run.
"""

from collections.abc import Iterable, Mapping

from kfp import dsl, kubernetes
from kfp.dsl import PipelineTask

from components.calibration.component import calibration
from components.deploy.component import deploy
from components.draft.component import draft
from components.evaluation.component import evaluation
from components.gate.component import gate
from components.hidden_states.component import hidden_states
from components.image import DEFAULT_IMAGE
from components.prompts.component import prompts
from components.register.component import register
from components.report.component import report
from components.responses.component import responses
from components.tokens.component import tokens

CONFIG_ENV = {
    "mlflow-tracking-uri": "MLFLOW_TRACKING_URI",
    "s3-endpoint-url": "AWS_ENDPOINT_URL_S3",
    "s3-region": "AWS_DEFAULT_REGION",
}
"""Keys of the config map and the variables that every step reads."""

RAY_ENV = {"ray-address": "RAY_ADDRESS"}
"""The config map's key for the deploy step alone: a heavy step computes in its own pod, with what it asked for."""

S3_SECRET_ENV = {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}
"""Keys of the secret (as KFP's own object-store secret names them) and the variables that boto3 reads."""

MLFLOW_SECRET_ENV = {
    "username": "MLFLOW_TRACKING_USERNAME",
    "password": "MLFLOW_TRACKING_PASSWORD",
    "token": "MLFLOW_TRACKING_TOKEN",
}
"""Keys of the secret and the variables that MLflow's client reads; a user with a password, or a token."""

HF_SECRET_ENV = {"token": "HF_TOKEN"}
"""Key of the secret and the variable that the Hugging Face hub's client reads."""


def _read_config_map(tasks: Iterable[PipelineTask], name: str, key_to_env: Mapping[str, str]) -> None:
    """Give steps the cluster's addresses, as far as the config map exists and has them."""
    for task in tasks:
        kubernetes.use_config_map_as_env(
            task, config_map_name=name, config_map_key_to_env=dict(key_to_env), optional=True
        )


def _read_secret(tasks: Iterable[PipelineTask], name: str, key_to_env: Mapping[str, str]) -> None:
    """Give steps credentials, as far as the secret exists and has them."""
    for task in tasks:
        kubernetes.use_secret_as_env(task, secret_name=name, secret_key_to_env=dict(key_to_env), optional=True)


def _request(tasks: Iterable[PipelineTask], cpu: str, memory: str) -> None:
    """Ask for CPUs and memory and be held to them."""
    for task in tasks:
        task.set_cpu_request(cpu).set_cpu_limit(cpu).set_memory_request(memory).set_memory_limit(memory)
        task.register_pipeline_channels([cpu, memory])


def _accelerate(tasks: Iterable[PipelineTask], gpu_type: str, gpu_count: str) -> None:
    """Ask for a heavy step's accelerators and room for Ray's shared-memory object store."""
    for task in tasks:
        task.set_accelerator_type(gpu_type).set_accelerator_limit(gpu_count)
        task.register_pipeline_channels([gpu_type, gpu_count])
        kubernetes.empty_dir_mount(task, volume_name="shm", mount_path="/dev/shm", medium="Memory")


@dsl.pipeline(
    name="draftline-train-draft",
    description="Train, prove, register and serve a draft model for a target LLM.",
)
def train_draft(
    spec_uri: str,
    workspace: str,
    suites: list[str],
    image: str = DEFAULT_IMAGE,
    config_map: str = "draftline",
    s3_secret: str = "draftline-s3",
    mlflow_secret: str = "draftline-mlflow",
    hf_secret: str = "draftline-hf",
    light_cpu: str = "1",
    light_memory: str = "4Gi",
    target_cpu: str = "8",
    target_memory: str = "32Gi",
    train_cpu: str = "8",
    train_memory: str = "64Gi",
    gpu_type: str = "nvidia.com/gpu",
    gpu_count: str = "1",
) -> None:
    """Train, prove, register and serve a draft model.

    Args:
        spec_uri: Object URI of the resolved run spec (YAML).
        workspace: URI of the workspace, ``s3://bucket/prefix``.
        suites: Evaluation suites, those of the spec.
        image: Image of every step.
        config_map: ConfigMap with mlflow-tracking-uri, s3-endpoint-url, s3-region and ray-address.
        s3_secret: Secret with accesskey and secretkey; may be missing where pods have an identity.
        mlflow_secret: Secret with username and password, or token; may be missing where MLflow asks for none.
        hf_secret: Secret with token, for a target that the Hugging Face hub guards; may be missing.
        light_cpu: CPUs of each step that neither runs the target nor trains.
        light_memory: Memory of each such step.
        target_cpu: CPUs of each step that runs the target.
        target_memory: Memory of each step that runs the target.
        train_cpu: CPUs of the training step.
        train_memory: Memory of the training step.
        gpu_type: Resource name of the accelerator.
        gpu_count: Accelerators of each step that runs the target or trains.
    """
    where = {"spec_uri": spec_uri, "workspace": workspace}
    prompts_task = prompts(**where)
    responses_task = responses(**where, prompts=prompts_task.outputs["result"])
    tokens_task = tokens(**where, responses=responses_task.outputs["result"])
    hidden_states_task = hidden_states(**where, tokens=tokens_task.outputs["result"])
    draft_task = draft(**where, hidden_states=hidden_states_task.outputs["result"])
    proof = {"prompts": prompts_task.outputs["result"], "draft": draft_task.outputs["result"]}
    calibration_task = calibration(**where, **proof)
    with dsl.ParallelFor(suites, name="suites", parallelism=1) as suite:
        evaluation_task = evaluation(
            **where,
            **proof,
            suite=suite,
            calibration=calibration_task.outputs["result"],
            cpu=target_cpu,
            memory=target_memory,
            gpu_type=gpu_type,
            gpu_count=gpu_count,
        )
    version = {"draft": draft_task.outputs["result"], "calibration": calibration_task.outputs["result"]}
    report_task = report(**where, **version, evaluation=dsl.Collected(evaluation_task.outputs["result"]))
    register_task = register(**where, **version, report=report_task.outputs["result"])
    gate_task = gate(**where, report=report_task.outputs["result"], register=register_task.outputs["result"])
    with dsl.If(gate_task.outputs["Output"] == True, name="passed"):  # noqa: E712 - builds a KFP condition
        deploy_task = deploy(**where, register=register_task.outputs["result"], gate=gate_task.outputs["result"])

    on_target = [responses_task, hidden_states_task, calibration_task, evaluation_task]
    light = [prompts_task, tokens_task, report_task, register_task, gate_task, deploy_task]
    every = [*on_target, draft_task, *light]
    for task in every:
        task.set_caching_options(False)
        task.set_container_image(image)
    _read_config_map(every, config_map, CONFIG_ENV)
    _read_config_map([deploy_task], config_map, RAY_ENV)
    _read_secret(every, s3_secret, S3_SECRET_ENV)
    _read_secret(every, mlflow_secret, MLFLOW_SECRET_ENV)
    _read_secret(every, hf_secret, HF_SECRET_ENV)
    _request(on_target, target_cpu, target_memory)
    _request([draft_task], train_cpu, train_memory)
    _request(light, light_cpu, light_memory)
    _accelerate([*on_target, draft_task], gpu_type, gpu_count)
