"""vLLM as the engine: our settings in its words, and our draft in a layout that it reads. No vLLM is needed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from draftline.draft.checkpoint import load_folder
from draftline.errors import PlatformError, SpecError
from draftline.spec import RunSpec, derive
from serving.deploy import deploy
from serving.replica import ReplicaConfig
from serving.vllm.app import plan_app, require_vllm
from serving.vllm.export import export_draft
from serving.vllm.settings import ExportedDraft, engine_arguments, speculative_config
from tests.draft.dialects.cases import CONFIGS, deepspec_folder, draft


def spec_with(**fields: Any) -> RunSpec:
    return derive(RunSpec(), {f"serving.{name}": value for name, value in {"engine": "vllm", **fields}.items()})


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real, tiny Qwen3 that the drafts of the cases fit."""
    folder = tmp_path_factory.mktemp("target") / "qwen3"
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def exported(name: str, folder: Path, target: Path) -> ExportedDraft:
    return export_draft(deepspec_folder(folder / "source", draft(name)), str(target), folder / "exported")


@pytest.mark.parametrize("name", ["vanilla", "rnn, pruned", "dflash"])
def test_the_export_is_the_same_draft_in_a_layout_of_vllm(name: str, tmp_path: Path, target: Path) -> None:
    found = exported(name, tmp_path, target)
    document = json.loads((found.folder / "config.json").read_text())
    assert document["architectures"] == ["DSparkDraftModel"]
    assert document["transformer_layer_config"]["model_type"] == "qwen3"
    assert load_folder(found.folder).config == CONFIGS[name] == found.config
    again = export_draft(tmp_path / "source", str(target), found.folder)
    assert again == found


def test_settings_go_over_in_vllms_words(tmp_path: Path, target: Path) -> None:
    found = exported("vanilla", tmp_path, target)
    spec = spec_with(
        policy="fixed",
        max_requests=96,
        max_context=3000,
        vllm={"tensor_parallel_size": 4, "extra_args": {"kv_cache_dtype": "fp8"}},
    )
    spec = derive(spec, {"target.dtype": "bf16", "target.revision": "abc", "target.enable_thinking": True})
    assert engine_arguments(spec, found) == {
        "dtype": "bfloat16",
        "max_model_len": 3000,
        "max_num_seqs": 96,
        "tensor_parallel_size": 4,
        "gpu_memory_utilization": 0.9,
        "enable_prefix_caching": True,
        "trust_remote_code": False,
        "default_chat_template_kwargs": {"enable_thinking": True},
        "revision": "abc",
        "speculative_config": {
            "method": "dspark",
            "model": str(found.folder),
            "num_speculative_tokens": CONFIGS["vanilla"].block_size,
            "draft_sample_method": "probabilistic",
        },
        "kv_cache_dtype": "fp8",
    }


def test_no_speculation_without_a_draft_or_with_policy_off(tmp_path: Path, target: Path) -> None:
    assert "speculative_config" not in engine_arguments(spec_with(policy="fixed"), None)
    found = exported("vanilla", tmp_path, target)
    assert speculative_config(spec_with(policy="off"), found) is None


def test_policies_go_over(tmp_path: Path, target: Path) -> None:
    found = exported("vanilla", tmp_path, target)
    adaptive = speculative_config(spec_with(policy="async"), found)
    assert adaptive is not None and adaptive["enable_adaptive_verification"] is True
    one = speculative_config(spec_with(policy="fixed", fixed_length=1), found)
    assert one is not None and one["num_speculative_tokens"] == 1 and "enable_adaptive_verification" not in one
    with pytest.raises(SpecError, match="with a confidence head only"):
        speculative_config(spec_with(policy="sync"), exported("dflash", tmp_path / "dflash", target))


def test_prompt_lookup_needs_no_draft() -> None:
    spec = spec_with(policy="fixed", proposer="prompt_lookup")
    found = speculative_config(spec, None)
    assert found is not None and (found["method"], found["num_speculative_tokens"]) == ("ngram", 7)
    assert speculative_config(spec_with(policy="off", proposer="prompt_lookup"), None) is None
    with pytest.raises(SpecError, match="whole blocks"):
        speculative_config(spec_with(policy="async", proposer="prompt_lookup"), None)


def test_a_policy_that_vllm_lacks_is_refused(tmp_path: Path, target: Path) -> None:
    found = exported("vanilla", tmp_path, target)
    with pytest.raises(SpecError, match="vLLM has no policy `threshold`"):
        speculative_config(spec_with(policy="threshold"), found)


def test_capture_is_refused_rather_than_left_out() -> None:
    spec = derive(RunSpec(), {"serving.capture": {"enabled": True, "uri": "s3://traffic/live"}})
    with pytest.raises(SpecError, match="no traffic capture"):
        engine_arguments(spec, None)


@pytest.mark.parametrize("name", ["model", "max_num_seqs", "speculative_config", "dtype"])
def test_extra_arguments_cannot_contradict_the_spec(name: str) -> None:
    with pytest.raises(SpecError, match=f"got {name}"):
        engine_arguments(spec_with(vllm={"extra_args": {name: "x"}}), None)


def test_the_plan_names_everything_that_ray_serve_llm_needs(tmp_path: Path, target: Path) -> None:
    spec = spec_with(policy="fixed", model_name="tiny", max_requests=5, max_waiting=7, max_replicas=3)
    spec = derive(spec, {"target.source": str(target), "serving.vllm.accelerator_type": "H100"})
    source = deepspec_folder(tmp_path / "my-draft", draft("vanilla"))
    plan = plan_app(ReplicaConfig(spec, draft_uri=str(source), cache_dir=tmp_path / "cache"))
    assert plan.draft == "my-draft"
    assert plan.llm_config["model_loading_config"] == {"model_id": "tiny", "model_source": str(target)}
    assert plan.llm_config["accelerator_type"] == "H100"
    assert plan.llm_config["deployment_config"] == {
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": 3,
            "target_ongoing_requests": 5,
            "upscale_delay_s": spec.serving.upscale_delay_s,
            "downscale_delay_s": spec.serving.downscale_delay_s,
        },
        "max_ongoing_requests": 12,
    }
    folder = Path(plan.llm_config["engine_kwargs"]["speculative_config"]["model"])
    assert folder.is_relative_to(tmp_path / "cache" / "vllm")
    # A second deployment leaves the folder of the first alone, whose replicas may still load.
    other = plan_app(ReplicaConfig(spec, draft_uri=str(source), cache_dir=tmp_path / "cache"))
    assert other.llm_config["engine_kwargs"]["speculative_config"]["model"] != str(folder)


def test_a_draft_of_another_target_is_refused_before_anything_runs(tmp_path: Path, loaded_target: Any) -> None:
    spec = derive(spec_with(policy="fixed"), {"target.source": str(loaded_target.folder)})
    source = deepspec_folder(tmp_path / "my-draft", draft("vanilla"))
    with pytest.raises(Exception, match="made for another target"):
        plan_app(ReplicaConfig(spec, draft_uri=str(source), cache_dir=tmp_path / "cache"))


def test_keys_that_nobody_would_ask_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nobody asks for API keys"):
        plan_app(ReplicaConfig(spec_with(policy="fixed"), api_keys_file=tmp_path / "keys"))


def test_without_vllm_the_error_says_what_to_do() -> None:
    with pytest.raises(PlatformError, match=r"set serving\.engine"):
        require_vllm()
    with pytest.raises(PlatformError, match="vLLM is not installed here"):
        deploy(ReplicaConfig(spec_with(policy="fixed")))
