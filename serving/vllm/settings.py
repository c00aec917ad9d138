"""Our settings in vLLM's words; nothing of vLLM or Ray is imported.

Names are those of ``vllm.engine.arg_utils.AsyncEngineArgs`` and
``vllm.config.SpeculativeConfig`` in vLLM 0.29. What vLLM has no counterpart
for is refused, never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftline.draft.config import DraftConfig
from draftline.errors import SpecError
from draftline.spec import RunSpec

VLLM_VERSION = "0.29.0"
"""The one that Ray 2.60 pins for Ray Serve LLM; these settings were checked against its configuration classes."""

_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}
_ADAPTIVE = ("sync", "async")


@dataclass(frozen=True)
class ExportedDraft:
    """A draft that vLLM can read.

    Attributes:
        folder: Its checkpoint, see :mod:`serving.vllm.export`.
        config: What kind of draft it is.
    """

    folder: Path
    config: DraftConfig


def engine_arguments(spec: RunSpec, draft: ExportedDraft | None) -> dict[str, Any]:
    """What ``AsyncEngineArgs`` takes, model and served name apart (Ray Serve LLM sets these).

    Args:
        spec: ``target`` and ``serving`` are read.
        draft: ``None`` decodes plainly.

    Raises:
        SpecError: vLLM cannot do what the spec asks for.
    """
    serving, vllm = spec.serving, spec.serving.vllm
    if serving.capture.enabled:
        raise SpecError(
            "with vLLM there is no traffic capture",
            got="serving.capture.enabled: true",
            remedy="Switch it off, or serve with serving.engine: draftline",
        )
    arguments: dict[str, Any] = {
        "dtype": _DTYPES[spec.target.dtype],
        "max_model_len": serving.max_context,
        "max_num_seqs": serving.max_requests,
        "tensor_parallel_size": vllm.tensor_parallel_size,
        "gpu_memory_utilization": vllm.gpu_memory_utilization,
        "enable_prefix_caching": True,
        "trust_remote_code": False,
        # Written out for targets that can think, as the training conversations were.
        "default_chat_template_kwargs": {"enable_thinking": spec.target.enable_thinking},
    }
    if spec.target.revision is not None:
        arguments["revision"] = spec.target.revision
    speculative = speculative_config(spec, draft)
    if speculative is not None:
        arguments["speculative_config"] = speculative
    return _with_extra(arguments, vllm.extra_args)


def speculative_config(spec: RunSpec, draft: ExportedDraft | None) -> dict[str, Any] | None:
    """What ``SpeculativeConfig`` takes, or ``None`` without speculation.

    Tokens are drawn from the draft's law (``probabilistic``), since with
    vLLM's default, the draft's likeliest token, sampled requests accept less.

    Raises:
        SpecError: the policy has no counterpart in vLLM.
    """
    policy = spec.serving.policy
    if spec.serving.proposer == "prompt_lookup":
        return _prompt_lookup(spec)
    if draft is None or policy == "off":
        return None
    if policy == "threshold":
        raise SpecError(
            "vLLM has no policy `threshold`",
            expected="off, fixed, or async (vLLM's adaptive verification)",
            remedy="Set serving.policy, or serve with serving.engine: draftline",
        )
    document: dict[str, Any] = {
        "method": method_of(draft.config),
        "model": str(draft.folder),
        "num_speculative_tokens": _num_tokens(spec, draft.config),
        "draft_sample_method": "probabilistic",
    }
    if policy in _ADAPTIVE:
        if not draft.config.enable_confidence_head:
            raise SpecError(
                "vLLM sizes the verification of drafts with a confidence head only",
                got=f"a {document['method']} draft without one, and serving.policy: {policy}",
                remedy="Set serving.policy: fixed",
            )
        document["enable_adaptive_verification"] = True
    return document


def _prompt_lookup(spec: RunSpec) -> dict[str, Any] | None:
    """The same suffixes and blocks as :class:`draftline.draft.prompt_lookup.PromptLookup` tries."""
    from draftline.draft.prompt_lookup import LOOKUP_BLOCK, LOOKUP_NGRAM

    policy = spec.serving.policy
    if policy == "off":
        return None
    if policy != "fixed":
        raise SpecError(
            "vLLM verifies whole blocks of prompt lookup",
            got=f"serving.policy: {policy}",
            expected="off or fixed",
            remedy="Set serving.policy: fixed, or serve with serving.engine: draftline",
        )
    return {
        "method": "ngram",
        "num_speculative_tokens": spec.serving.fixed_length or LOOKUP_BLOCK,
        "prompt_lookup_max": LOOKUP_NGRAM,
        "prompt_lookup_min": 1,
    }


def _num_tokens(spec: RunSpec, config: DraftConfig) -> int:
    length = spec.serving.fixed_length if spec.serving.policy == "fixed" else None
    return config.block_size if length is None else min(length, config.block_size)


def method_of(config: DraftConfig) -> str:
    """The drafting method by the name that vLLM gives it.

    A DFlash draft of ours uses the anchor's slot, which vLLM's ``dflash`` does
    not: it is a ``dspark`` of rank 0 there.
    """
    return "eagle3" if config.is_eagle3 else "dspark"


def _with_extra(arguments: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    taken = sorted(set(extra) & (set(arguments) | {"model", "served_model_name", "speculative_config"}))
    if taken:
        raise SpecError(
            "serving.vllm.extra_args sets what other fields of the spec decide",
            got=", ".join(taken),
            remedy="Set the field instead: docs/vllm.md has the table",
        )
    return {**arguments, **extra}
