"""A draft's architecture, from a run spec and the target that it is made for."""

from __future__ import annotations

from draftline.draft.config import NUM_ANCHORS, DraftConfig, resolve_taps
from draftline.draft.families import FAMILIES, default_family
from draftline.errors import SpecError
from draftline.spec import DraftSpec, RunSpec
from draftline.target.load import Target


def draft_config(spec: RunSpec, target: Target) -> DraftConfig:
    """The draft's architecture for a target.

    Raises:
        SpecError: the taps, the mask token or the draft vocabulary do not fit the target.
    """
    draft, config = spec.draft, target.config
    is_eagle3 = draft.algorithm == "eagle3"
    family = draft.family or default_family(config.family)
    facts = FAMILIES[family]
    size = draft.vocab_size
    if draft.mask_token_id is not None and not 0 <= draft.mask_token_id < config.vocab_size:
        raise SpecError(
            f"draft.mask_token_id={draft.mask_token_id} is no token of the target",
            expected=f"0 to {config.vocab_size - 1}",
            remedy="Leave it out to take a special token that text never holds",
        )
    if 0 < size < len(target.eos_token_ids) + 1:
        raise SpecError(
            f"draft.vocab_size={size} has no room beside the target's end tokens",
            expected=f"at least {len(target.eos_token_ids) + 1}, or 0 for the whole vocabulary",
            remedy="Set draft.vocab_size to 0, or to a few thousand",
        )
    return DraftConfig(
        vocab_size=config.vocab_size,
        draft_vocab_size=config.vocab_size if size == 0 or size >= config.vocab_size else size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=draft.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        block_size=draft.block_size,
        target_layer_ids=resolve_taps(draft.target_layer_ids, draft.num_taps, config.num_layers),
        num_target_layers=config.num_layers,
        mask_token_id=0 if is_eagle3 else _mask_token(draft, target),
        markov_rank=draft.markov_rank,
        markov_head=draft.markov_head,
        enable_confidence_head=draft.enable_confidence_head,
        confidence_with_markov=draft.confidence_with_markov and draft.enable_confidence_head,
        family=family,
        rope_scaling=config.rope_scaling,
        has_shared_kv=config.has_shared_kv and facts.has_global_heads,
        # Gemma's scale goes with its layer, not with another family's.
        query_pre_attn_scalar=config.query_pre_attn_scalar if facts.name == config.family_facts.name else None,
        logit_softcap=config.logit_softcap,
        num_anchors=NUM_ANCHORS if is_eagle3 else spec.train.anchors_per_sample,
        ttt_length=draft.ttt_length if is_eagle3 else 0,
        ttt_decay=draft.ttt_decay if is_eagle3 else 0.0,
    )


def _mask_token(draft: DraftSpec, target: Target) -> int:
    return draft.mask_token_id if draft.mask_token_id is not None else default_mask_token(target)


def default_mask_token(target: Target) -> int:
    """A token that text never holds: an id that the tokenizer leaves unused, else the last special one but the ends.

    The reference's choice for Qwen3, 151669, is the first unused id.
    """
    tokenizer, taken = target.tokenizer, set(target.eos_token_ids)
    if len(tokenizer) < target.vocab_size:
        return len(tokenizer)
    added = [t for t in tokenizer.added_tokens_decoder if t < target.vocab_size and t not in taken]
    special = [t for t in tokenizer.all_special_ids if t not in taken]
    return int(max(added or special or [0]))
