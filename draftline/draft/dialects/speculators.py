"""The layout of ``vllm-project/speculators`` 0.9, which vLLM serves.

Tensors have DeepSpec's names. What differs is ``config.json``:

- The decoder layer's facts are nested in ``transformer_layer_config``.
- A tapped layer's id is DeepSpec's plus one: it is an index of ``hidden_states``, whose first entry is the embeddings.
- ``sample_from_anchor`` says whether slot k predicts anchor + k + 1, as in DeepSpec (true), or anchor + k (false).
  Absent means true to speculators' own DSpark class and false to readers of older checkpoints: it is always written.
- ``layer_types`` is always written, since speculators trains with a sliding window unless told otherwise.
- A pruned vocabulary has its rows of the LM head in the checkpoint, Eagle3 the head and the embeddings too. Without
  them speculators 0.9 runs on uninitialised memory; other drafts take both from the target.
- A DFlash draft of DeepSpec's layout is a ``dspark`` of rank 0; speculators' ``dflash`` leaves the anchor's slot
  unused.
- Of an Eagle3 draft, ``norm_before_residual`` is always written: absent means false here and true to vLLM.

What this layout has no field for is kept under the key ``draftline``, which
speculators and vLLM pass over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from draftline.draft.config import DraftConfig
from draftline.draft.dialects.files import CheckpointFiles
from draftline.draft.dialects.model import EMBEDDING, LM_HEAD, DraftModel, WrittenDraft, checked_model
from draftline.draft.dialects.target_facts import TargetFacts
from draftline.draft.families import FAMILIES
from draftline.errors import FormatError, SpecError

NAME = "speculators"
VERSION = "0.9.0"
"""Of speculators, whose layout is written."""

_TYPE = "speculators_model_type"
_OURS = "draftline"

_ARCHITECTURES = {"dspark": "DSparkDraftModel", "eagle3": "Eagle3DraftModel"}

_LAYER_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "layer_types",
    "tie_word_embeddings",
)

_EAGLE3_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
"""Variants of Eagle3 that DeepSpec's is not."""

_KEPT = ("num_target_layers", "num_anchors", "ttt_length", "step_loss_decay")


def recognises(files: CheckpointFiles) -> bool:
    """Whether ``config.json`` says that speculators wrote it."""
    return _TYPE in files.document


def required_frozen(config: DraftConfig) -> tuple[str, ...]:
    """Tensors of the target that readers of this layout need in the checkpoint; others they take from the target."""
    if config.is_eagle3:
        return (EMBEDDING, LM_HEAD)
    return (LM_HEAD,) if config.is_pruned else ()


def read(files: CheckpointFiles, target: TargetFacts | None = None) -> DraftModel:
    """Read a checkpoint.

    Args:
        files: Its contents.
        target: Its target, where known: a checkpoint that Draftline did not
            write does not say how many layers it has.

    Raises:
        FormatError: a field is missing or says what no draft here can do.
    """
    document = files.document
    kind = document[_TYPE]
    if kind not in ("dspark", "dflash", "eagle3"):
        raise FormatError(
            f"{files.origin}: speculators of type {kind!r} are not supported",
            expected="dspark, dflash with sample_from_anchor, or eagle3",
        )
    try:
        layer = document["transformer_layer_config"]
        _refuse_variants(files, layer)
        translated = {
            **{name: value for name, value in layer.items() if name != "architectures"},
            **_ours(document, target, files.origin),
            "draft_vocab_size": document.get("draft_vocab_size") or layer["vocab_size"],
            **(_read_eagle3(files, layer) if kind == "eagle3" else _read_block(files, layer)),
        }
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{files.origin}: config.json lacks {error}", remedy="Save the model again with speculators 0.9"
        ) from None
    config = DraftConfig.from_json(translated, origin=files.origin)
    positions = layer.get("max_position_embeddings")
    return checked_model(config, files.tensors, origin=files.origin, max_positions=positions)


def write(model: DraftModel, target: TargetFacts | None = None) -> WrittenDraft:
    """The model in this dialect; nothing is cast or reordered.

    Args:
        model: The draft.
        target: Named as the ``verifier``, when given.

    Raises:
        SpecError: speculators has no such decoder layer, or tensors of the target are missing that readers need.
    """
    _require_writable(model)
    config = model.config
    kind = "eagle3" if config.is_eagle3 else "dspark"
    document: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
        _TYPE: kind,
        "speculators_version": VERSION,
        "speculators_config": _algorithm_document(config, kind, target),
        "transformer_layer_config": _layer_document(model),
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": None,  # speculators: only if it differs from the draft's
        "tie_word_embeddings": False,
        "dtype": str(model.weights["fc.weight"].dtype).removeprefix("torch."),
        _OURS: {name: value for name, value in config.to_json().items() if name in _KEPT},
        **(_eagle3_document(config) if config.is_eagle3 else _block_document(config)),
    }
    return WrittenDraft(document, {**model.weights, **model.frozen}, tuple(_warnings(model, target)))


def _refuse_variants(files: CheckpointFiles, layer: Mapping[str, Any]) -> None:
    if layer.get("use_sliding_window") and not layer.get("layer_types"):
        raise FormatError(f"{files.origin}: the draft has a sliding window", expected="layers of full attention")
    if files.document.get("target_hidden_size") not in (None, layer["hidden_size"]):
        raise FormatError(
            f"{files.origin}: the draft is of another width than its target",
            got=layer["hidden_size"],
            expected=str(files.document["target_hidden_size"]),
        )


def _read_block(files: CheckpointFiles, layer: Mapping[str, Any]) -> dict[str, Any]:
    document = files.document
    if layer.get("model_type", "qwen3") != "qwen3":
        raise FormatError(
            f"{files.origin}: block drafts of speculators are of family qwen3", got=layer.get("model_type")
        )
    # Checkpoints from before the field existed have an untrained anchor slot: absent is no.
    if document.get("sample_from_anchor") is not True:
        raise FormatError(
            f"{files.origin}: the draft leaves the anchor's slot unused (slot k predicts anchor + k)",
            got=f"sample_from_anchor {document.get('sample_from_anchor', 'absent')}",
            expected="true: slot k predicts anchor + k + 1",
            remedy="Train with sample_from_anchor; add it to config.json only if that was done",
        )
    rank = document.get("markov_rank", 0)
    has_confidence = bool(document.get("enable_confidence_head", False))
    return {
        "architectures": [FAMILIES["qwen3"].block_architecture],
        "block_size": document["block_size"],
        "target_layer_ids": [i - 1 for i in document["aux_hidden_state_layer_ids"]],
        "mask_token_id": document["mask_token_id"],
        "markov_rank": rank,
        "markov_head_type": document.get("markov_head_type", "vanilla"),
        "enable_confidence_head": has_confidence,
        "confidence_head_with_markov": has_confidence and bool(document.get("confidence_head_with_markov", False)),
    }


def _read_eagle3(files: CheckpointFiles, layer: Mapping[str, Any]) -> dict[str, Any]:
    document = files.document
    flags = [name for name in _EAGLE3_FLAGS if document.get(name)]
    if flags:
        raise FormatError(
            f"{files.origin}: this variant of Eagle3 is not supported", got=", ".join(flags), expected="none of them"
        )
    family = next((f for f in FAMILIES.values() if f.model_type == layer["model_type"]), None)
    if family is None:
        raise FormatError(f"{files.origin}: Eagle3 of family {layer['model_type']!r} is not supported")
    ours = document.get(_OURS) or {}
    tokens = document["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    return {
        "architectures": [family.eagle3_architecture],
        "block_size": tokens,
        # Of the training only. speculators drafts as many tokens as it trained ahead, all with equal weight.
        "ttt_length": ours.get("ttt_length", tokens),
        "step_loss_decay": ours.get("step_loss_decay", 1.0),
        "target_layer_ids": [i - 1 for i in document["eagle_aux_hidden_state_layer_ids"]],
    }


def _ours(document: Mapping[str, Any], target: TargetFacts | None, origin: str) -> dict[str, Any]:
    kept = {name: value for name, value in (document.get(_OURS) or {}).items() if name in _KEPT}
    if target is not None:
        kept["num_target_layers"] = target.num_layers
    if "num_target_layers" not in kept:
        raise FormatError(
            f"{origin} does not say how many layers its target has, as checkpoints of speculators do not",
            remedy="Convert it once: draftline convert SRC DST --to deepspec --target TARGET",
        )
    return kept


def _require_writable(model: DraftModel) -> None:
    config = model.config
    facts = config.family_facts
    families = ("qwen3", "llama") if config.is_eagle3 else ("qwen3",)
    reasons = [
        (config.family not in families, f"family {facts.name!r}, speculators has {' and '.join(families)}"),
        (config.has_shared_kv, "values shared with keys"),
        (config.query_pre_attn_scalar is not None, "its own attention scale"),
        (config.logit_softcap is not None, "a logit soft cap"),
        (-1 in config.target_layer_ids and config.is_eagle3, "the embeddings as a tap"),
    ]
    found = [reason for is_so, reason in reasons if is_so]
    if found:
        raise SpecError(
            "the draft cannot be written as speculators'",
            got=found[0],
            remedy="Keep it in DeepSpec's dialect (--to deepspec)",
        )
    missing = [name for name in required_frozen(config) if name not in model.frozen]
    if missing:
        # vLLM refuses a block draft without the head's rows; speculators 0.9 leaves them as uninitialised memory.
        kind = "an Eagle3 draft" if config.is_eagle3 else "a pruned vocabulary"
        raise SpecError(
            f"{kind} needs copies of the target's tensors in a checkpoint of speculators",
            got=f"no {' and no '.join(missing)}",
            remedy="Name the target (--target TARGET), whose tensors are then written",
        )


def _algorithm_document(config: DraftConfig, kind: str, target: TargetFacts | None) -> dict[str, Any]:
    return {
        "algorithm": kind,
        "proposal_methods": [
            {
                "proposal_type": "greedy",
                # With the anchor's slot in use a block gives as many tokens as it has slots.
                "speculative_tokens": config.block_size,
                "verifier_accept_k": 1,
                "accept_tolerance": 0.0,
            }
        ],
        "default_proposal_method": "greedy",
        "verifier": {
            "name_or_path": target.name if target is not None else None,
            "architectures": list(target.architectures) if target is not None else [],
        },
    }


def _layer_document(model: DraftModel) -> dict[str, Any]:
    document = {name: value for name, value in model.config.to_json().items() if name in _LAYER_FIELDS}
    document |= {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
    }
    if model.max_positions is not None:
        document["max_position_embeddings"] = model.max_positions
    return document


def _block_document(config: DraftConfig) -> dict[str, Any]:
    return {
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": True,
        "sliding_window_non_causal": False,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head,
        "enable_confidence_head": config.enable_confidence_head,
        "confidence_head_with_markov": config.confidence_with_markov,
    }


def _eagle3_document(config: DraftConfig) -> dict[str, Any]:
    return {
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        **dict.fromkeys(_EAGLE3_FLAGS, False),
        "embed_requires_grad": False,
    }


def _warnings(model: DraftModel, target: TargetFacts | None) -> Iterator[str]:
    config = model.config
    if config.markov_rank and config.markov_head != "vanilla":
        yield f"vLLM serves only vanilla Markov heads, not {config.markov_head!r}"
    if config.algorithm == "dflash":
        yield "written as dspark with markov_rank 0, which speculators loads; vLLM was not tried with rank 0"
    if config.is_eagle3 and config.family == "qwen3":
        yield "a vLLM without Eagle3Qwen3ForCausalLM would read this as a Llama layer, which lacks q_norm and k_norm"
    if target is None:
        yield (
            "the target is not named, so speculators cannot load its weights and vLLM must be told the target "
            "(--target TARGET names it)"
        )
