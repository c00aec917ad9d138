"""Packed products equal plain ones for every row count."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from draftline.target.linear import PackedLinear


@pytest.mark.parametrize(("out_features", "in_features"), [(96, 64), (7, 33), (257, 16)])
def test_every_row_count_equals_the_plain_product(out_features: int, in_features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    inputs = torch.randn(130, in_features, generator=generator)
    packed = PackedLinear(weight.clone())
    for rows in range(1, 131):
        torch.testing.assert_close(
            packed(inputs[:rows]), functional.linear(inputs[:rows], weight), atol=1e-4, rtol=1e-5
        )


def test_bf16_equals_the_plain_product_to_its_rounding() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 48, generator=generator).bfloat16()
    packed = PackedLinear(weight)
    for rows in (1, 2, 7, 33, 130):
        inputs = torch.randn(rows, 48, generator=generator).bfloat16()
        exact = functional.linear(inputs.double(), weight.double())
        # One rounding of the result to 8 bits: 2^-8 relative, plus what order of summation may add.
        torch.testing.assert_close(packed(inputs).double(), exact, atol=0.05, rtol=2**-7)


def test_rows_that_are_views_are_fine() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(24, 16, generator=generator)
    wide = torch.randn(10, 40, generator=generator)
    view, strided = wide[:, 3:19], wide[::2, :16]
    packed = PackedLinear(weight)
    for inputs in (view, strided):
        torch.testing.assert_close(packed(inputs), functional.linear(inputs, weight), atol=1e-4, rtol=1e-5)
