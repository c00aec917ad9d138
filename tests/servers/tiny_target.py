"""A tiny target and drafts for it, made in code; fixtures are in ``tests.plugins.targets``.

The target is a real Hugging Face directory (Llama, ChatML, byte-level BPE that
knows the words of a small grammar) that was trained on the grammar for a
moment: its laws are peaked where the grammar is certain and spread where it
chooses, as a real target's are.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from draftline.draft.build import DraftModule, new_draft
from draftline.draft.checkpoint import DraftModel, export_state, to_files
from draftline.draft.config import DraftConfig
from draftline.draft.model import DSparkDraft
from draftline.target.lean import ModelConfig
from draftline.target.load import Target

HIDDEN, LAYERS, HEADS, KV_HEADS, MAX_CONTEXT = 64, 4, 4, 2, 1024
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CITIES = ("oslo", "lima", "cairo", "quito")
_THINGS = ("parcel", "refund", "letter", "ticket")
_WORDS = (
    *("user", "assistant", "where", "your", " is", " my", " in"),
    *(f" {word}" for word in (*_CITIES, *_THINGS, *range(10))),
)
_STEPS, _ROWS, _COLUMNS = 100, 8, 50


def grammar_pair(source: random.Random) -> tuple[str, str]:
    """A question and its answer."""
    thing, city, number = source.choice(_THINGS), source.choice(_CITIES), source.randrange(10)
    return f"where is my {thing} {number}?", f"your {thing} {number} is in {city}."


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the grammar and for each byte, four specials, ChatML."""
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: dict[tuple[str, str], None] = {}
    for word in _WORDS:
        symbols = word.replace(" ", "\u0120")
        # A word grows from its first symbol, so the merges of different words do not meet.
        for end in range(1, len(symbols)):
            merges.setdefault((symbols[:end], symbols[end]))
            vocabulary.setdefault(symbols[: end + 1], len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_target(folder: Path, *, steps: int = _STEPS) -> Path:
    """Write a target; equal arguments write equal weights.

    Args:
        folder: Is filled.
        steps: Training steps; 0 leaves random weights.
    """
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(), _one_thread():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=HIDDEN,
                intermediate_size=2 * HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=KV_HEADS,
                max_position_embeddings=MAX_CONTEXT,
                tie_word_embeddings=True,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
                initializer_range=0.1,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        _train(model, tokenizer, steps)
    model.save_pretrained(folder)
    return folder


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are ordered by thread: one makes the weights equal on every machine of a kind."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    source = random.Random(0)
    rows = []
    for _ in range(steps * _ROWS):
        ids: list[int] = []
        while len(ids) < _COLUMNS:
            question, answer = grammar_pair(source)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            ids += tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        rows.append(ids[:_COLUMNS])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 8) * (1 - step / steps)
        batch = torch.tensor(rows[step * _ROWS : (step + 1) * _ROWS])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def toy_target(*, vocab_size: int = 16, num_layers: int = 3, seed: int = 0, spread: float = 1.5) -> Target:
    """A random target in memory, small enough to compute its joint laws exactly; it has no tokenizer and no end.

    Args:
        vocab_size: Tokens.
        num_layers: Depth.
        seed: Of the weights.
        spread: About the standard deviation of its logits.
    """
    config = ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_layers=num_layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_positions=256,
        has_qk_norm=False,
        tie_embeddings=False,
    )
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * scale * columns**-0.5

    size, inner = config.hidden_size, config.num_heads * config.head_dim
    weights = {
        "model.embed_tokens.weight": matrix(vocab_size, size, size**0.5),
        "model.norm.weight": torch.ones(size),
        "lm_head.weight": matrix(vocab_size, size, spread),
    }
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "self_attn.q_proj.weight": matrix(inner, size, 2.0),
            prefix + "self_attn.k_proj.weight": matrix(config.head_dim, size, 2.0),
            prefix + "self_attn.v_proj.weight": matrix(config.head_dim, size, 2.0),
            prefix + "self_attn.o_proj.weight": matrix(size, inner, 2.0),
            prefix + "mlp.gate_proj.weight": matrix(config.intermediate_size, size),
            prefix + "mlp.up_proj.weight": matrix(config.intermediate_size, size),
            prefix + "mlp.down_proj.weight": matrix(size, config.intermediate_size),
            prefix + "input_layernorm.weight": torch.ones(size),
            prefix + "post_attention_layernorm.weight": torch.ones(size),
        }
    return Target(
        folder=Path("toy"),
        fingerprint=f"toy-{seed}",
        config=config,
        tokenizer=make_tokenizer(),
        eos_token_ids=(),
        dtype=torch.float32,
        weights=weights,
    )


def tiny_draft_config(target: ModelConfig, mask_token_id: int = 0) -> DraftConfig:
    """A small draft that fits a target; vary it with :func:`dataclasses.replace`."""
    return DraftConfig(
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=2 * target.hidden_size,
        num_layers=1,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        rms_norm_eps=target.rms_norm_eps,
        rope_theta=target.rope_theta,
        block_size=3,
        target_layer_ids=(0, min(1, target.num_layers - 2)) if target.num_layers > 2 else (0,),
        num_target_layers=target.num_layers,
        mask_token_id=mask_token_id,
        markov_rank=8,
        markov_head="vanilla",
        enable_confidence_head=True,
        confidence_with_markov=True,
    )


def tiny_eagle3_config(target: ModelConfig) -> DraftConfig:
    """The same as an Eagle3 draft."""
    return replace(
        tiny_draft_config(target),
        markov_rank=0,
        enable_confidence_head=False,
        confidence_with_markov=False,
        ttt_length=3,
        ttt_decay=0.8,
    )


def random_module(
    config: DraftConfig, seed: int, *, max_positions: int = MAX_CONTEXT, scale: float = 1.0
) -> DSparkDraft:
    """A block draft whose every weight is random, biases, norms and the Markov map included."""
    draft = randomised(config, seed, max_positions=max_positions, scale=scale)
    assert isinstance(draft, DSparkDraft)
    return draft


def randomised(config: DraftConfig, seed: int, *, max_positions: int = MAX_CONTEXT, scale: float = 1.0) -> DraftModule:
    """The same, of any algorithm."""
    draft = new_draft(config, max_positions)
    generator = torch.Generator().manual_seed(seed)
    draft.initialise(generator, torch.ones(config.hidden_size))
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
            elif name == "markov_head.markov_w2.weight":
                parameter.normal_(std=scale * parameter.shape[1] ** -0.5, generator=generator)
    return draft


def random_draft(
    config: DraftConfig, seed: int, *, vocab: torch.Tensor | None = None, scale: float = 1.0
) -> DraftModel:
    """The same, exported; ``vocab`` are the target ids of a pruned vocabulary."""
    if vocab is not None:
        config = replace(config, draft_vocab_size=len(vocab))
    return DraftModel(config, export_state(randomised(config, seed, scale=scale), vocab))


def bigram_draft(target: Target, seed: int = 0, *, block_size: int = 4) -> DraftModel:
    """A draft that knows which word follows which in the grammar: often accepted, often not.

    Its sequential head is a bigram table (rank = vocabulary); the rest is random.
    """
    config = replace(tiny_draft_config(target.config), block_size=block_size, markov_rank=target.vocab_size)
    draft = random_module(config, seed)
    table = torch.zeros(target.vocab_size, target.vocab_size)
    source = random.Random(1)
    for _ in range(200):
        question, answer = grammar_pair(source)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = target.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        for before, after in itertools.pairwise(ids):
            table[after, before] += 1
    assert draft.markov_head is not None
    with torch.no_grad():
        draft.markov_head.markov_w1.weight.copy_(torch.eye(target.vocab_size))
        draft.markov_head.markov_w2.weight.copy_(2 * (1 + table).log())
        draft.norm.weight.mul_(0.2)
    return DraftModel(config, export_state(draft, None))


def write_tiny_draft(folder: Path, config: DraftConfig, *, seed: int) -> Path:
    """A random draft's files."""
    folder.mkdir(parents=True)
    for name, data in to_files(random_draft(config, seed)).items():
        (folder / name).write_bytes(data)
    return folder
