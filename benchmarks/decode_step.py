"""A decode step of the lean forward against its peers and against reading the weights once.

Usage: ``python -m benchmarks.decode_step [--dtype fp32|bf16] [--context 256] [--llama-python PATH]``
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.llama_peer import LlamaPeer, write_gguf
from benchmarks.timing import alternating_medians_ms, with_allocator_settings
from draftline.spec import TargetSpec
from draftline.target.batch import Chunk, build_batch
from draftline.target.lean import LeanModel
from draftline.target.load import Target, load_target

SHAPES = [
    *((1, tokens) for tokens in (1, 2, 4, 8, 16, 32, 64)),
    *((n, 1) for n in (4, 16)),
    *((n, 8) for n in (2, 4, 8)),
]
"""Sequences, and tokens of each."""
MAX_SEQUENCES = 16
MAX_TOKENS = 64


def main() -> None:
    """Print medians in milliseconds a step, and what the lean forward gains."""
    with_allocator_settings()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python, see benchmarks/llama_peer.py")
    arguments = parser.parse_args()
    target = load_target(TargetSpec(), dtype=arguments.dtype)
    with tempfile.TemporaryDirectory() as folder:
        peer = _llama(target, arguments.llama_python, Path(folder), arguments.context)
        try:
            _print_table(target, peer, arguments.context, arguments.repeats)
        finally:
            if peer is not None:
                peer.close()


def _print_table(target: Target, peer: LlamaPeer | None, context: int, repeats: int) -> None:
    plain = _without_kernels(target)
    hf_model = _transformers(target)
    has_kernels = isinstance(target.model, LeanModel) and target.model.has_packed_layers
    print(
        f"{target.dtype}, kernels {'in use' if has_kernels else 'not in use'}, {torch.get_num_threads()} threads,",
        end="",
    )
    print(f" context {context}; milliseconds a step (median of {repeats})")
    print(f"reading the weights once, in bf16: {_read_weights_ms(target):.1f} ms")
    names = ["lean", "torch", "transformers", *(["llama.cpp"] if peer is not None else [])]
    print(f"{'shape':>7} " + " ".join(f"{name:>13}" for name in names) + "   lean: ms a token, gain over each")
    for sequences, tokens in SHAPES:
        contenders: dict[str, Callable[[], object]] = {
            "lean": _lean_step(target.model, context, sequences, tokens),
            "torch": _lean_step(plain, context, sequences, tokens),
            "transformers": _transformers_step(hf_model, context, sequences, tokens),
        }
        if peer is not None:
            peer.prepare(context, sequences)
            contenders["llama.cpp"] = _llama_step(peer, context, sequences, tokens)
        medians = alternating_medians_ms(contenders, repeats)
        lean = medians["lean"]
        gains = ", ".join(f"{medians[name] / lean:.2f}x" for name in names[1:])
        row = " ".join(f"{medians[name]:13.1f}" for name in names)
        print(f"{sequences:>3} x{tokens:>2} {row}   {lean / (sequences * tokens):.2f}; {gains}", flush=True)


def _lean_step(model: Any, context: int, sequences: int, tokens: int) -> Callable[[], object]:
    cache = model.new_cache(sequences, context + MAX_TOKENS)
    chunks = [Chunk(slot, context, list(range(100, 100 + tokens))) for slot in range(sequences)]

    def step() -> None:
        batch = build_batch(chunks, cache.num_positions, model.dtype)
        model.score(model.logits(model.forward(batch, cache).hidden_ND))

    return step


def _without_kernels(target: Target) -> LeanModel:
    """The same forward by torch's operators: packed MKL or oneDNN products, one call an operation."""
    with (
        mock.patch("draftline.target.linear.native_kernels", lambda: None),
        mock.patch("draftline.target.lean.kernels_for", lambda *_: None),
    ):
        model = load_target(TargetSpec(), dtype="fp32" if target.dtype == torch.float32 else "bf16").model
    assert isinstance(model, LeanModel)
    return model


def _transformers(target: Target) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(target.folder, dtype=target.dtype)


def _transformers_step(model: Any, context: int, sequences: int, tokens: int) -> Callable[[], object]:
    from transformers import DynamicCache

    prefix = torch.arange(100, 100 + context).expand(sequences, -1)
    new = torch.arange(100, 100 + tokens).expand(sequences, -1)
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


def _llama(target: Target, python: str | None, folder: Path, context: int) -> LlamaPeer | None:
    if python is None:
        return None
    path = folder / "target.gguf"
    write_gguf(target, path)
    return LlamaPeer(
        python,
        path,
        context=context + MAX_TOKENS,
        sequences=MAX_SEQUENCES,
        threads=torch.get_num_threads(),
    )


def _llama_step(peer: LlamaPeer, context: int, sequences: int, tokens: int) -> Callable[[], object]:
    return lambda: peer.step(context, sequences, tokens)


def _read_weights_ms(target: Target) -> float:
    config = target.config
    per_layer = config.hidden_size * (
        config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads) + 3 * config.intermediate_size
    )
    count = config.num_layers * per_layer + config.vocab_size * config.hidden_size
    weights = torch.ones(count, dtype=torch.bfloat16).view(torch.int32)
    return alternating_medians_ms({"read": weights.max}, 9)["read"]


if __name__ == "__main__":
    main()
