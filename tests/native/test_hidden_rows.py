"""Decoding the cache's rows in kernels gives torch's numbers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from draftline.cache import codecs
from draftline.cache.codecs import E4M3Format, RotatedFormat, RowFormat
from draftline.native.build import find_compiler
from draftline.native.library import native_kernels

FORMATS = {
    "e4m3": E4M3Format(),
    "4 bits": RotatedFormat(4, uses_channel_scale=True),
    "8 bits": RotatedFormat(8, uses_channel_scale=False),
}
# Below, at and beyond whole vectors and whole groups.
WIDTHS = [1, 15, 16, 33, 64, 65, 96, 576]


def both(row_format: RowFormat, stored: Tensor, width: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """What readers (by kernels, where there is a compiler) and what torch make of it."""
    assert (native_kernels() is None) == (find_compiler() is None)
    native = torch.full((*stored.shape[:-1], width), 7.0)
    row_format.decode_into(stored.numpy(), scale, native)
    return native, row_format.decode(stored, width, scale)


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_those_of_torch(name: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(37, 3, width, generator=generator) * torch.logspace(-3, 3, width)
    row_format = FORMATS[name]
    scale = 1 + torch.rand(3, width, generator=generator) if row_format.uses_channel_scale else None
    native, plain = both(row_format, row_format.encode(rows, scale), width, scale)
    assert native.shape == rows.shape and native.dtype == torch.float32
    assert torch.equal(bits(native), bits(plain))


def test_every_code_of_an_8_bit_float_is_read() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    scale = torch.tensor([0.37]).view(torch.uint8)
    native, plain = both(FORMATS["e4m3"], torch.cat([codes, scale])[None, None], 256, None)
    assert torch.equal(native.isnan(), plain.isnan()) and int(native.isnan().sum()) == 2
    assert torch.equal(bits(native.nan_to_num()), bits(plain.nan_to_num()))


@pytest.mark.parametrize("name", ["4 bits", "8 bits"])
def test_every_code_of_an_integer_is_read(name: str) -> None:
    row_format = FORMATS[name]
    assert isinstance(row_format, RotatedFormat)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (50, 1, 2 * 64 * row_format.bits // 8), dtype=torch.uint8, generator=generator)
    scales = torch.rand(50, 1, 2, generator=generator).bfloat16().view(torch.uint8)
    native, plain = both(row_format, torch.cat([codes, scales], -1), 100, None)
    assert torch.equal(bits(native), bits(plain))


@pytest.mark.parametrize("name", FORMATS)
def test_no_rows_give_no_rows(name: str) -> None:
    stored = torch.empty(0, 2, FORMATS[name].row_bytes(64), dtype=torch.uint8)
    native, plain = both(FORMATS[name], stored, 64, None)
    assert native.shape == plain.shape == (0, 2, 64)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_that_do_not_lie_together_are_read(name: str) -> None:
    rows = torch.randn(10, 2, 64, generator=torch.Generator().manual_seed(0))
    stored = FORMATS[name].encode(rows, None)
    native, plain = both(FORMATS[name], stored[::2], 64, None)
    assert torch.equal(bits(native), bits(plain))


@pytest.mark.parametrize("name", FORMATS)
def test_without_kernels_torch_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = FORMATS[name].encode(torch.randn(5, 2, 96, generator=torch.Generator().manual_seed(0)), None)
    native, _ = both(FORMATS[name], stored, 96, None)
    monkeypatch.setattr(codecs, "native_kernels", lambda: None)
    fallen_back = torch.full((5, 2, 96), 7.0)
    FORMATS[name].decode_into(stored.numpy(), None, fallen_back)
    assert torch.equal(bits(native), bits(fallen_back))
