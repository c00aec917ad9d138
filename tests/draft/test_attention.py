"""Packed block attention: SDPA in buckets and flex_attention against a loop over slots, forward and backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module

from draftline.draft import attention as attention_module
from draftline.draft.attention import BlockLayout, block_attention, flex_blocks, sdpa_blocks

CPU = torch.device("cpu")
LAYOUTS = {
    "one block": BlockLayout.of_anchors(3, [[5]]),
    "no context": BlockLayout.of_anchors(3, [[0, 0]]),
    "repeated anchors": BlockLayout.of_anchors(2, [[4, 4, 4, 9]]),
    "unequal samples": BlockLayout.of_anchors(4, [[1, 7, 30, 31, 32], [], [0, 2], [12]]),
    "block of one": BlockLayout.of_anchors(1, [[3, 8], [2, 5, 6]]),
}


def slot_by_slot(layout: BlockLayout, tensors: list[Tensor]) -> Tensor:
    """Softmax attention of every slot and head over what it may see, by the definition."""
    q, context_k, context_v, own_k, own_v = tensors
    group = q.shape[1] // own_k.shape[1]
    outputs, block, first = [], 0, 0
    for length, anchors in zip(layout.context_lengths_S, layout.anchors_S, strict=True):
        for anchor in anchors:
            own = slice(block * layout.block_size, (block + 1) * layout.block_size)
            keys = torch.cat([context_k[first : first + anchor], own_k[own]])
            values = torch.cat([context_v[first : first + anchor], own_v[own]])
            for slot in range(own.start, own.stop):
                heads = []
                for head in range(q.shape[1]):
                    scores = keys[:, head // group] @ q[slot, head] * q.shape[2] ** -0.5
                    heads.append(scores.softmax(0) @ values[:, head // group])
                outputs.append(torch.stack(heads))
            block += 1
        first += length
    return torch.stack(outputs)


def make_tensors(layout: BlockLayout, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries of six heads, keys and values of two."""
    generator = torch.Generator().manual_seed(0)
    slots = layout.num_blocks * layout.block_size
    shapes = [(slots, 6), (layout.num_context, 2), (layout.num_context, 2), (slots, 2), (slots, 2)]
    return [torch.randn(*shape, 16, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def check(layout: BlockLayout, attend: Callable[..., Tensor], dtype: torch.dtype, bound: float) -> None:
    """Outputs and all gradients."""
    tensors = make_tensors(layout, dtype)
    found, expected = attend(*tensors), slot_by_slot(layout, tensors)
    torch.testing.assert_close(found, expected, atol=bound, rtol=bound)
    factors = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    pairs = [torch.autograd.grad((out * factors).sum(), tensors, allow_unused=True) for out in (found, expected)]
    for one, other in zip(*pairs, strict=True):
        if one is None or other is None or one.numel() == 0:
            assert other is None or other.numel() == 0 or not other.any()
            continue
        torch.testing.assert_close(one, other, atol=bound, rtol=bound)


@pytest.fixture
def uncompiled_flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """flex_attention in eager mode, with its backward, which it declares to be for GPUs alone."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)
    with warnings.catch_warnings():
        # It says that it is not compiled; tracing it, PyTorch warns about itself.
        warnings.simplefilter("ignore")
        yield flex_module.flex_attention


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("overhead", [0, 2048])
def test_sdpa_equals_the_definition(name: str, overhead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With costless calls every bucket is small, with the real cost these small samples are one."""
    monkeypatch.setattr(attention_module, "BUCKET_OVERHEAD_PAIRS", overhead)
    layout = LAYOUTS[name]
    check(layout, sdpa_blocks(layout, 3, CPU), torch.float32, 2e-5)
    check(layout, sdpa_blocks(layout, 3, CPU), torch.float64, 1e-10)


@pytest.mark.parametrize("name", LAYOUTS)
def test_flex_attention_equals_the_definition(name: str, uncompiled_flex: Callable[..., Any]) -> None:
    layout = LAYOUTS[name]
    check(layout, flex_blocks(layout, CPU, uncompiled_flex), torch.float32, 2e-5)


def test_flex_attention_equals_sdpa(uncompiled_flex: Callable[..., Any]) -> None:
    layout = LAYOUTS["unequal samples"]
    tensors = make_tensors(layout)
    one, other = sdpa_blocks(layout, 3, CPU)(*tensors), flex_blocks(layout, CPU, uncompiled_flex)(*tensors)
    torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-6)


def test_the_cpu_takes_sdpa_and_gives_the_same_bits_twice() -> None:
    layout = LAYOUTS["unequal samples"]
    tensors = make_tensors(layout)
    one, other = (block_attention(layout, 3, CPU)(*tensors) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(one, sdpa_blocks(layout, 3, CPU)(*tensors))


@pytest.mark.parametrize("seed", range(5))
def test_buckets_part_the_blocks_and_stay_near_what_exists(seed: int) -> None:
    """Over long contexts: no more than 1.25 of the pairs that exist, where one rectangle a sample takes twice them."""
    random = np.random.default_rng(seed)
    anchors = [sorted(random.integers(0, 4096, 64).tolist()) for _ in range(3)]
    layout = BlockLayout.of_anchors(7, anchors)
    blocks: list[int] = []
    computed = whole = 0
    for buckets, places in zip(layout.buckets_S, anchors, strict=True):
        first = len(blocks)
        for bucket in buckets:
            mine = places[bucket.first_block - first :][: bucket.num_blocks]
            assert bucket.num_keys == max(mine)
            blocks += range(bucket.first_block, bucket.first_block + bucket.num_blocks)
            computed += 7 * bucket.num_blocks * (bucket.num_keys + 7 * bucket.num_blocks)
        whole += 7 * len(places) * (4096 + 7 * len(places))
    assert blocks == list(range(3 * 64))
    assert computed < 1.25 * layout.num_pairs
    assert whole > 2 * layout.num_pairs
