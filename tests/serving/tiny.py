"""A target and drafts of a few thousand weights, made in code: real files for the real engine."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from draftline.draft.checkpoint import DraftModel, export_state, to_files
from draftline.draft.config import DraftConfig
from draftline.draft.model import DSparkDraft

HIDDEN, LAYERS, HEADS, MAX_CONTEXT = 32, 3, 2, 1024
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_target(folder: Path) -> Path:
    """A random Llama over bytes, in Hugging Face layout."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{token: index for index, token in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_draft(folder: Path, *, seed: int, hidden_size: int = HIDDEN) -> Path:
    """A random draft for that target, laid out like a registered model; another hidden size does not fit it."""
    config = DraftConfig(
        vocab_size=257,
        draft_vocab_size=257,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=1,
        head_dim=hidden_size // HEADS,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        block_size=3,
        target_layer_ids=(0, 1),
        num_target_layers=LAYERS,
        mask_token_id=0,
        markov_rank=8,
        markov_head="vanilla",
        enable_confidence_head=True,
        confidence_with_markov=True,
    )
    draft = DSparkDraft(config, MAX_CONTEXT)
    draft.initialise(torch.Generator().manual_seed(seed))
    (folder / "draft").mkdir(parents=True)
    for name, data in to_files(DraftModel(config, export_state(draft, None))).items():
        (folder / "draft" / name).write_bytes(data)
    return folder
