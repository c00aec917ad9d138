"""``config.json`` of a draft in DeepSpec's dialect: both directions (torch-free).

The document is the target's text config overwritten with the draft's fields.
Only what a draft's forward reads is written; a family's further fields that
would otherwise take a wrong default in Hugging Face's config class are
written too. Ours are ``draft_vocab_size``, ``draftline_format`` and, for
Eagle3, ``block_size``; DeepSpec ignores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from draftline.draft.families import ARCHITECTURES, Family
from draftline.errors import FormatError
from draftline.target.rope import KINDS, RopeScaling

if TYPE_CHECKING:
    from draftline.draft.config import DraftConfig

FORMAT_VERSION = 2
"""Raised from 1 when families, rotary scaling and Eagle3 came; 1 is a subset of 2."""

READABLE_VERSIONS = (1, FORMAT_VERSION)

_GLOBAL = "full_attention"


def to_document(config: DraftConfig) -> dict[str, Any]:
    """See :meth:`draftline.draft.config.DraftConfig.to_json`."""
    return {
        **_architecture_fields(config),
        **_family_fields(config),
        **(_eagle3_fields(config) if config.is_eagle3 else _block_fields(config)),
        "draft_vocab_size": config.draft_vocab_size,
        "draftline_format": FORMAT_VERSION,
    }


def _architecture_fields(config: DraftConfig) -> dict[str, Any]:
    facts = config.family_facts
    return {
        "architectures": [facts.eagle3_architecture if config.is_eagle3 else facts.block_architecture],
        "model_type": facts.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": _rope_document(config),
        facts.activation_key: facts.activation,
        "tie_word_embeddings": False,
        "layer_types": [_GLOBAL] * config.num_layers,
        "target_layer_ids": list(config.target_layer_ids),
        "num_target_layers": config.num_target_layers,
    }


def _rope_document(config: DraftConfig) -> dict[str, Any]:
    scaling = config.rope_scaling.to_hf() if config.rope_scaling is not None else {"rope_type": "default"}
    rope = {"rope_theta": config.rope_theta, **scaling}
    return {_GLOBAL: rope} if config.family_facts.has_nested_rope else rope


def _family_fields(config: DraftConfig) -> dict[str, Any]:
    facts = config.family_facts
    document: dict[str, Any] = {}
    if facts.has_global_heads:
        document |= {
            "attention_k_eq_v": config.has_shared_kv,
            "global_head_dim": config.head_dim,
            "num_global_key_value_heads": config.num_kv_heads,
            # These default to layers that no draft has.
            "enable_moe_block": False,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
        }
    if config.query_pre_attn_scalar is not None:
        document["query_pre_attn_scalar"] = config.query_pre_attn_scalar
    if config.logit_softcap is not None:
        document["final_logit_softcapping"] = config.logit_softcap
    return document


def _block_fields(config: DraftConfig) -> dict[str, Any]:
    document: dict[str, Any] = {
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "num_anchors": config.num_anchors,
        "markov_rank": config.markov_rank,
        "enable_confidence_head": config.enable_confidence_head,
    }
    if config.markov_rank:
        document["markov_head_type"] = config.markov_head
    if config.enable_confidence_head:
        document["confidence_head_with_markov"] = config.confidence_with_markov
    return document


def _eagle3_fields(config: DraftConfig) -> dict[str, Any]:
    return {
        "ttt_length": config.ttt_length,
        "step_loss_decay": config.ttt_decay,
        "draft_num_hidden_layers": config.num_layers,
        "block_size": config.block_size,
    }


def read_fields(document: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The fields of a :class:`draftline.draft.config.DraftConfig` that a document holds.

    Raises:
        FormatError: a field is missing, or the format is newer, foreign or of a variant that no draft here has.
    """
    version = document.get("draftline_format", FORMAT_VERSION)
    if version not in READABLE_VERSIONS:
        raise FormatError(
            f"{origin} has an unknown format",
            got=version,
            expected=" or ".join(map(str, READABLE_VERSIONS)),
            remedy="Upgrade Draftline",
        )
    facts, is_eagle3 = _architecture_of(document, origin)
    _refuse_variants(document, facts, origin)
    try:
        fields = {
            "family": facts.name,
            "vocab_size": document["vocab_size"],
            "draft_vocab_size": document.get("draft_vocab_size", document["vocab_size"]),
            "hidden_size": document["hidden_size"],
            "intermediate_size": document["intermediate_size"],
            "num_layers": document["num_hidden_layers"],
            "num_heads": document["num_attention_heads"],
            "rms_norm_eps": document["rms_norm_eps"],
            "target_layer_ids": tuple(document["target_layer_ids"]),
            "num_target_layers": document["num_target_layers"],
            "logit_softcap": document.get("final_logit_softcapping"),
            "query_pre_attn_scalar": document.get("query_pre_attn_scalar"),
            **_heads(document, facts),
            **_rope(document, facts, origin),
        }
        return fields | (_eagle3(document, origin) if is_eagle3 else _block(document))
    except (KeyError, TypeError) as error:
        raise FormatError(f"{origin} lacks {error}", remedy="Export the draft again") from None


def _architecture_of(document: Mapping[str, Any], origin: str) -> tuple[Family, bool]:
    names = document.get("architectures")
    if isinstance(names, list) and len(names) == 1 and names[0] in ARCHITECTURES:
        return ARCHITECTURES[names[0]]
    raise FormatError(
        f"{origin} is not a draft that Draftline knows",
        got=names,
        expected=f"one of {', '.join(ARCHITECTURES)}",
        remedy="Point to a draft checkpoint; `draftline convert` imports other layouts",
    )


def _refuse_variants(document: Mapping[str, Any], facts: Family, origin: str) -> None:
    """A field that changes the forward must not be passed over in silence."""
    expected: dict[str, tuple[Any, ...]] = {
        facts.activation_key: (facts.activation, None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "attn_logit_softcapping": (None,),
        "enable_moe_block": (False, None),
        "hidden_size_per_layer_input": (0, None),
        "use_bidirectional_attention": (None, False),
    }
    for name, allowed in expected.items():
        if document.get(name) not in allowed:
            raise FormatError(f"{origin}: {name} is not supported", got=document[name], expected=str(allowed[0]))
    layer_types = document.get("layer_types") or []
    if any(kind != _GLOBAL for kind in layer_types):
        raise FormatError(
            f"{origin}: a layer does not attend to its whole context",
            got=layer_types,
            expected=f"layer_types of {_GLOBAL!r} only",
        )


def _heads(document: Mapping[str, Any], facts: Family) -> dict[str, Any]:
    if not facts.has_global_heads:
        return {"num_kv_heads": document["num_key_value_heads"], "head_dim": document["head_dim"]}
    is_shared = bool(document["attention_k_eq_v"])
    # transformers 5.20 and later keep the overrides of global layers by layer number.
    override = (document.get("per_layer_config") or {}).get("0", {})
    head_dim = document["global_head_dim"] if "global_head_dim" in document else override["head_dim"]
    num_kv_heads = document["num_key_value_heads"]
    if is_shared:
        num_kv_heads = document.get("num_global_key_value_heads") or override.get("num_key_value_heads", num_kv_heads)
    return {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "has_shared_kv": is_shared}


def _rope(document: Mapping[str, Any], facts: Family, origin: str) -> dict[str, Any]:
    rope = document["rope_parameters"]
    if facts.has_nested_rope:
        rope = rope[_GLOBAL]
    theta = rope["rope_theta"]
    try:
        scaling = RopeScaling.from_hf(rope)
    except ValueError as error:
        raise FormatError(
            f"{origin}: rotary scaling {error} is not supported", expected=f"one of {', '.join(KINDS)}"
        ) from None
    return {"rope_theta": theta, "rope_scaling": scaling}


def _block(document: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "block_size": document["block_size"],
        "mask_token_id": document["mask_token_id"],
        # Of the training only; drafts of format 1 were written without it.
        **({"num_anchors": document["num_anchors"]} if "num_anchors" in document else {}),
        "markov_rank": document["markov_rank"],
        "markov_head": document.get("markov_head_type", "vanilla"),
        "enable_confidence_head": document["enable_confidence_head"],
        "confidence_with_markov": document.get("confidence_head_with_markov", False),
    }


def _eagle3(document: Mapping[str, Any], origin: str) -> dict[str, Any]:
    horizon = document["ttt_length"]
    if not isinstance(horizon, int) or horizon < 1:
        raise FormatError(f"{origin}: ttt_length is impossible", got=horizon, expected="1 or more")
    if document["num_hidden_layers"] != 1:
        raise FormatError(
            f"{origin}: an Eagle3 draft with several layers is not supported",
            got=document["num_hidden_layers"],
            expected="num_hidden_layers 1",
        )
    return {
        # DeepSpec drafts as many tokens as it trained ahead.
        "block_size": document.get("block_size", horizon),
        "ttt_length": horizon,
        "ttt_decay": document["step_loss_decay"],
        "mask_token_id": 0,
        "markov_rank": 0,
        "markov_head": "vanilla",
        "enable_confidence_head": False,
        "confidence_with_markov": False,
    }
