"""Lean forward against ``transformers`` and against reading the weights once.

Usage: ``python -m benchmarks.decode_step [--dtype fp32|bf16] [--context 256]``
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.timing import alternating_medians_ms, with_allocator_settings
from draftline.spec import TargetSpec
from draftline.target.batch import Chunk, build_batch
from draftline.target.load import Target, load_target


def main() -> None:
    """Print a table of medians and ratios."""
    with_allocator_settings()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    target = load_target(TargetSpec(), dtype=arguments.dtype)
    print(f"{target.dtype}, {torch.get_num_threads()} threads, context {arguments.context}")
    bound = _read_weights_ms(target)
    print(f"reading the weights once: {bound:.1f} ms")
    for tokens in (1, 4, 8):
        contenders = {
            "lean": _lean_step(target, arguments.context, tokens),
            "transformers": _transformers_step(target, arguments.context, tokens),
        }
        medians = alternating_medians_ms(contenders, arguments.repeats)
        lean, peer = medians["lean"], medians["transformers"]
        print(
            f"{tokens} tokens: lean {lean:6.1f} ms, transformers {peer:6.1f} ms, "
            f"{peer / lean:.2f}x faster, {lean / bound:.2f}x the bound"
        )


def _lean_step(target: Target, context: int, tokens: int) -> Any:
    cache = target.model.new_cache(1, context + 64)
    chunk = Chunk(0, context, list(range(100, 100 + tokens)))

    def step() -> None:
        batch = build_batch([chunk], cache.num_positions, target.model.dtype)
        target.model.logits(target.model.forward(batch, cache).hidden_ND).argmax(-1)

    return step


def _transformers_step(target: Target, context: int, tokens: int) -> Any:
    from transformers import AutoModelForCausalLM, DynamicCache

    model: Any = AutoModelForCausalLM.from_pretrained(target.folder, dtype=target.dtype)
    prefix = torch.arange(100, 100 + context)[None]
    new = torch.arange(100, 100 + tokens)[None]
    with torch.inference_mode():
        filled = model(prefix, past_key_values=DynamicCache(config=model.config), use_cache=True).past_key_values
    layers = [(layer.keys, layer.values) for layer in filled.layers]

    @torch.inference_mode()
    def step() -> None:
        # Steps append: start each from the prefix. Views cost nothing against the forward.
        for layer, (keys, values) in zip(filled.layers, layers, strict=True):
            layer.keys, layer.values = keys, values
        model(new, past_key_values=filled, use_cache=True).logits.argmax(-1)

    return step


def _read_weights_ms(target: Target) -> float:
    config = target.config
    per_layer = config.hidden_size * (
        config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads) + 3 * config.intermediate_size
    )
    count = config.num_layers * per_layer + config.vocab_size * config.hidden_size
    weights = torch.ones(count, dtype=target.dtype).view(torch.int32)
    return alternating_medians_ms({"read": weights.max}, 9)["read"]


if __name__ == "__main__":
    main()
