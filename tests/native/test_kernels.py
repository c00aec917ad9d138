"""The CPU kernels equal torch, for odd shapes too, and a row's result is its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from draftline.native.build import find_compiler
from draftline.native.library import Kernels, native_kernels

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

# Outputs and inputs below, at and beyond whole panels and vectors.
SHAPES = [(1, 1), (7, 33), (32, 16), (33, 5), (96, 64), (257, 130)]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = native_kernels()
    assert found is not None
    return found


def rows_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_bf16", [True, False], ids=["bf16", "fp32"])
def test_products_equal_torch(kernels: Kernels, shape: tuple[int, int], is_bf16: bool) -> None:
    weight = rows_of(*shape)
    if is_bf16:
        weight = weight.bfloat16().float()
    else:
        weight[0, 0] = 1.0 + 2**-20  # No bf16 number, however small the weight.
    packed = kernels.pack(weight)
    assert packed.packed.dtype == (torch.bfloat16 if is_bf16 else torch.float32)
    inputs = rows_of(20, shape[1], seed=1)
    expected = functional.linear(inputs.double(), weight.double())
    for rows in (0, 1, 2, 7, 8, 9, 20):
        # One accumulator over all inputs: at most in_features roundings of 2^-24, in practice their root.
        torch.testing.assert_close(
            kernels.multiply(inputs[:rows], packed).double(), expected[:rows], atol=3e-5, rtol=1e-5
        )


def test_weights_in_bf16_give_the_bits_of_the_same_weights_in_fp32(kernels: Kernels) -> None:
    weight = rows_of(80, 96).bfloat16().float()
    # A further output that is no bf16 number makes the whole weight fp32.
    wide = torch.cat([weight, torch.full((1, 96), 1.0 + 2**-20)])
    inputs = rows_of(11, 96, seed=1)
    narrow_packed, wide_packed = kernels.pack(weight), kernels.pack(wide)
    assert narrow_packed.packed.dtype != wide_packed.packed.dtype
    assert torch.equal(kernels.multiply(inputs, narrow_packed), kernels.multiply(inputs, wide_packed)[:, :80])


def test_a_row_does_not_depend_on_the_rows_beside_it(kernels: Kernels) -> None:
    packed = kernels.pack(rows_of(100, 75))
    inputs = rows_of(70, 75, seed=1)
    together = kernels.multiply(inputs, packed)
    for first, last in [(0, 1), (3, 5), (1, 10), (5, 70)]:
        assert torch.equal(kernels.multiply(inputs[first:last], packed), together[first:last])


def test_inputs_may_be_views_but_not_of_another_type_or_width(kernels: Kernels) -> None:
    weight, wide = rows_of(24, 16), rows_of(10, 40, seed=1)
    packed = kernels.pack(weight)
    for inputs in (wide[:, 3:19], wide[::2, :16], wide.t()[:16, :].t(), wide[:, ::2][:, :16]):
        torch.testing.assert_close(
            kernels.multiply(inputs, packed), functional.linear(inputs, weight), atol=1e-5, rtol=1e-5
        )
    for wrong in (wide, wide[:, :16].double(), wide[0, :16]):
        with pytest.raises(ValueError, match="expected"):
            kernels.multiply(wrong, packed)


@pytest.mark.parametrize("size", [1, 15, 16, 49, 1000])
def test_scores_equal_torch(kernels: Kernels, size: int) -> None:
    logits = rows_of(5, size) * 10
    logits[1] -= 1000
    logits[2] = 3.0  # All equal: the first is taken.
    best, log_normaliser = kernels.score(logits)
    assert best.tolist() == [*logits[:2].argmax(-1).tolist(), 0, *logits[3:].argmax(-1).tolist()]
    torch.testing.assert_close(log_normaliser, logits.logsumexp(-1), atol=1e-5, rtol=1e-6)


def test_scores_of_no_rows_and_of_what_is_no_number(kernels: Kernels) -> None:
    assert [len(each) for each in kernels.score(torch.empty(0, 9))] == [0, 0]
    best, _ = kernels.score(torch.full((1, 40), float("nan")))
    assert 0 <= int(best) < 40
