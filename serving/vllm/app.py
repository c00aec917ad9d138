"""The Serve application with vLLM inside: Ray Serve LLM's OpenAI surface instead of ours.

The draft is taken once, when the application is deployed: vLLM cannot exchange
a draft while it runs. Deploying again after a promotion replaces the replicas,
new ones first where GPUs are free.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftline.cache_dir import default_cache_dir
from draftline.errors import PlatformError, SpecError
from draftline.target.fingerprint import locate_target
from draftline.target.load import prepare_target
from serving.replica import ReplicaConfig, open_draft_source
from serving.vllm.export import export_draft
from serving.vllm.settings import VLLM_VERSION, ExportedDraft, engine_arguments


@dataclass(frozen=True)
class VllmApp:
    """What Ray Serve LLM is told.

    Attributes:
        llm_config: Keyword arguments of ``ray.serve.llm.LLMConfig``.
        draft: Name of the draft in it, ``None`` without one.
    """

    llm_config: dict[str, Any]
    draft: str | None


def plan_app(config: ReplicaConfig) -> VllmApp:
    """Fetch and export the draft, and translate the spec; needs neither vLLM nor a GPU.

    Raises:
        DraftlineError: the draft cannot be had, does not fit, or vLLM cannot do what the spec asks for.
    """
    serving = config.spec.serving
    if config.api_keys_file is not None:
        raise SpecError(
            "with vLLM nobody asks for API keys",
            got=f"the keys in {config.api_keys_file}",
            remedy="Clear DRAFTLINE_API_KEYS_FILE (api_keys_file) and ask for keys in front of the endpoint, or serve "
            "with serving.engine: draftline",
        )
    folder = prepare_target(config.spec.target, cache_dir=config.cache_dir)
    draft: ExportedDraft | None = None
    name: str | None = None
    if config.has_draft and serving.policy != "off":
        source = open_draft_source(config)
        files = source.fetch(name := source.current())
        parent = (config.cache_dir or default_cache_dir()) / "vllm"
        parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own: replicas of an earlier deployment may still be reading theirs.
        destination = Path(tempfile.mkdtemp(dir=parent, prefix=f"{name.replace('/', '-')}-")) / "draft"
        draft = export_draft(files.draft_dir, str(folder), destination)
    document: dict[str, Any] = {
        # A hub id stays one, so that replicas on other machines find the target too.
        "model_loading_config": {
            "model_id": serving.model_name,
            "model_source": locate_target(config.spec.target).hub_id or str(folder),
        },
        "engine_kwargs": engine_arguments(config.spec, draft),
        "deployment_config": {
            "autoscaling_config": {
                "min_replicas": serving.min_replicas,
                "max_replicas": serving.max_replicas,
                "target_ongoing_requests": serving.max_requests,
                "upscale_delay_s": serving.upscale_delay_s,
                "downscale_delay_s": serving.downscale_delay_s,
            },
            # Ray Serve LLM's own default is a thousand million: one replica takes all, and none is added. What is
            # beyond this waits in Serve; nobody is refused.
            "max_ongoing_requests": serving.max_requests + serving.max_waiting,
        },
        "log_engine_metrics": True,
    }
    if serving.vllm.accelerator_type is not None:
        document["accelerator_type"] = serving.vllm.accelerator_type
    return VllmApp(document, name)


def build_vllm_app(plan: VllmApp) -> Any:
    """The application, ready for ``serve.run``.

    Raises:
        PlatformError: vLLM is not installed here, or refuses the settings.
    """
    require_vllm()
    from ray.serve.llm import LLMConfig, build_openai_app

    try:
        return build_openai_app({"llm_configs": [LLMConfig(**plan.llm_config)]})
    except ValueError as error:
        raise PlatformError("Ray Serve LLM refuses the settings", got=str(error).splitlines()[0]) from error


def require_vllm() -> None:
    """Fail with words where vLLM is missing.

    Raises:
        PlatformError: it is.
    """
    if importlib.util.find_spec("vllm") is None:
        raise PlatformError(
            "serving.engine is vllm, but vLLM is not installed here",
            expected=f"vllm {VLLM_VERSION} where the endpoint runs (it pins its own torch and transformers)",
            remedy="Deploy from an image with vLLM, or set serving.engine: draftline",
        )
