"""Codecs: what is stored fits its size, comes back within its bound, and depends on the numbers alone.

Relative RMS error on normal numbers, with the reason of each bound:

======================  =====  ==========================================================================
format                  bound  reason
======================  =====  ==========================================================================
fp32                    0      the numbers themselves
bf16                    0.002  8 bits of mantissa: at most 2**-9 of a value, root mean square 0.0017
e4m3                    0.03   4 bits of mantissa: at most 2**-4 of a value, root mean square 0.026
8 bits, rotated         0.007  127.5 steps for the largest of 64 normal numbers, about 2.4 deviations: a
                               step is 0.019 deviations, its error 0.019 / sqrt(12) = 0.0055
4 bits, rotated         0.11   the same with 7.5 steps: 0.093
======================  =====  ==========================================================================
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from draftline.cache.codecs import CODECS, PlainFormat, RotatedFormat, RowFormat, channel_scale, rotate, rotate_back
from draftline.cache.sizes import CODEC_SIZES, GROUP

BOUNDS = {"fp32": (0.0, 0.0), "bf16": (0.002, 0.002), "fp8": (0.03, 0.007), "int4": (0.11, 0.007)}
"""Codec: bound of the taps, bound of the last hidden state."""

WIDTHS = [576, 2560, 96, 64, 33, 1]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def formats(codec: str) -> tuple[RowFormat, RowFormat]:
    return CODECS[codec].taps, CODECS[codec].last_hidden


def round_trip(row_format: RowFormat, rows: Tensor) -> Tensor:
    scale = channel_scale(rows) if row_format.uses_channel_scale else None
    stored = row_format.encode(rows, scale)
    assert stored.dtype == torch.uint8
    assert stored.shape == (*rows.shape[:-1], row_format.row_bytes(rows.shape[-1]))
    back = row_format.decode(stored, rows.shape[-1], scale)
    assert back.dtype == row_format.decoded_dtype and back.shape == rows.shape
    return back.float()


def relative_rms(rows: Tensor, back: Tensor) -> float:
    return float((rows - back).double().pow(2).sum().sqrt() / rows.double().pow(2).sum().sqrt())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("codec", CODECS)
def test_errors_stay_within_the_table(codec: str, width: int) -> None:
    rows = normal(200, 2, width)
    for row_format, bound in zip(formats(codec), BOUNDS[codec], strict=True):
        assert relative_rms(rows, round_trip(row_format, rows)) <= bound


def test_bf16_is_exact_for_a_bf16_target() -> None:
    rows = normal(50, 3, 64).bfloat16()
    assert torch.equal(
        PlainFormat(torch.bfloat16).decode(PlainFormat(torch.bfloat16).encode(rows, None), 64, None), rows
    )


@pytest.mark.parametrize("codec", CODECS)
def test_sizes_known_without_tensors_are_those_of_the_bytes(codec: str) -> None:
    for width in WIDTHS:
        for row_format, size in zip(
            formats(codec), (CODEC_SIZES[codec].tap, CODEC_SIZES[codec].last_hidden), strict=True
        ):
            assert row_format.row_bytes(width) == size(width)
    assert CODECS.keys() == CODEC_SIZES.keys()


def test_fp8_is_half_and_int4_about_a_quarter_of_bf16() -> None:
    taps = {name: CODECS[name].taps.row_bytes(2560) for name in CODECS}
    assert taps["fp8"] / taps["bf16"] == pytest.approx(0.5, abs=0.001)
    assert taps["int4"] / taps["bf16"] == pytest.approx(0.2656, abs=0.001)


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_come_back_as_zeros(codec: str) -> None:
    for row_format in formats(codec):
        assert torch.equal(round_trip(row_format, torch.zeros(3, 2, 96)), torch.zeros(3, 2, 96))
        rows = normal(3, 2, 96)
        rows[1] = 0
        assert not round_trip(row_format, rows)[1].any()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1e4, 9e36])
@pytest.mark.parametrize("codec", CODECS)
def test_small_and_huge_values_keep_the_same_relative_error(codec: str, magnitude: float) -> None:
    rows = normal(100, 1, 128)
    rows = rows / rows.abs().max() * magnitude
    for row_format, bound in zip(formats(codec), BOUNDS[codec], strict=True):
        back = round_trip(row_format, rows)
        assert back.isfinite().all()
        assert relative_rms(rows, back) <= bound


@pytest.mark.parametrize("codec", ["fp8", "int4"])
def test_outlier_channels_do_not_drown_the_others(codec: str) -> None:
    """A few channels a thousand times larger than the rest, as in a residual stream."""
    rows = normal(300, 1, 576)
    rows[..., [3, 200, 431]] *= 1000
    back = round_trip(CODECS[codec].taps, rows)
    ordinary = [channel for channel in range(576) if channel not in (3, 200, 431)]
    assert relative_rms(rows[..., ordinary], back[..., ordinary]) <= 1.1 * BOUNDS[codec][0]
    # The scale per channel is what does it.
    raw = RotatedFormat(4, uses_channel_scale=False)
    assert relative_rms(rows[..., ordinary], round_trip(raw, rows)[..., ordinary]) > 0.5


@pytest.mark.parametrize("codec", ["fp8", "int4"])
def test_a_token_that_towers_over_all_others_harms_only_itself(codec: str) -> None:
    """The token on which attention rests: thousands of times larger in two channels."""
    rows = normal(300, 1, 576)
    rows[0, 0, [7, 90]] = 30000.0
    back = round_trip(CODECS[codec].taps, rows)
    assert relative_rms(rows[1:], back[1:]) <= BOUNDS[codec][0]
    assert relative_rms(rows[:1], back[:1]) <= BOUNDS[codec][0]


def test_every_e4m3_code_is_read_as_torch_reads_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float()
    stored = torch.cat([codes, torch.tensor([1.0]).view(torch.uint8)])[None, None]
    found = CODECS["fp8"].taps.decode(stored, 256, None)[0, 0]
    assert torch.equal(found[~expected.isnan()], expected[~expected.isnan()]) and int(expected.isnan().sum()) == 2


@pytest.mark.parametrize("width", WIDTHS)
def test_the_rotation_is_orthonormal(width: int) -> None:
    rows = normal(20, 2, width)
    rotated = rotate(rows)
    torch.testing.assert_close(rotated.flatten(-2).norm(dim=-1), rows.norm(dim=-1))
    torch.testing.assert_close(rotate_back(rotated, width), rows)


def test_the_rotation_is_the_matrix_it_claims_to_be() -> None:
    sylvester = torch.tensor([[1.0 - 2 * ((i & j).bit_count() % 2) for j in range(GROUP)] for i in range(GROUP)])
    signs = rotate(torch.eye(GROUP)[:, None]).squeeze() / (sylvester / 8)
    # Each row of the identity comes out as its row of the matrix, times the sign of its channel.
    assert torch.equal(signs, signs[:, :1].expand(-1, GROUP)) and set(signs[:, 0].tolist()) == {1.0, -1.0}


@pytest.mark.parametrize("bits", [4, 8])
def test_decoding_is_the_rotation_backwards_to_the_bit(bits: int) -> None:
    """The matrix product and the fast transform agree exactly, because no sum is rounded."""
    row_format = RotatedFormat(bits, uses_channel_scale=False)
    source = torch.Generator().manual_seed(1)
    stored = torch.randint(0, 256, (40, 2, row_format.row_bytes(576)), dtype=torch.uint8, generator=source)
    scales = torch.rand(40, 2, 9, generator=source).bfloat16()
    stored[..., -18:] = scales.view(torch.uint8)
    codes = stored[..., :-18].unflatten(-1, (9, -1)).int()
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    expected = rotate_back((codes - (2 ** (bits - 1) - 0.5)) * scales.float()[..., None], 576)
    assert torch.equal(row_format.decode(stored, 576, None), expected)


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_depend_on_the_row_alone(codec: str) -> None:
    """Not on the rows beside it nor on the number of threads: a shared beginning is the same wherever it is stored."""
    rows = normal(157, 2, 576, seed=3)
    for row_format in formats(codec):
        scale = channel_scale(rows) if row_format.uses_channel_scale else None
        together = row_format.encode(rows, scale)
        apart = torch.cat([row_format.encode(part, scale) for part in rows.split([1, 30, 126])])
        assert torch.equal(together, apart)
        decoded = row_format.decode(together, 576, scale)
        again = torch.cat([row_format.decode(part, 576, scale) for part in together.split([100, 57])])
        assert torch.equal(decoded, again)
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            assert torch.equal(row_format.encode(rows, scale), together)
            assert torch.equal(row_format.decode(together, 576, scale), decoded)
        finally:
            torch.set_num_threads(threads)


GOLDEN = {
    "fp32": "000000bf0000803e0000803f000040c0",
    "bf16": "00bf803e803f40c0",
    # Codes of -74.7 (stored as -72), 37.3 (36), 149.3 (144), -448; then 3 / 448 as fp32.
    "fp8": "e96171feb76ddb3b",
    # One group, of which 60 values are padding; eight columns of the matrix tell four rows apart. Then a bf16 scale.
    "int4": "aaffcc33" * 8 + "cd3c",
}


@pytest.mark.parametrize("codec", CODECS)
def test_golden_bytes(codec: str) -> None:
    """If one differs, caches of that codec can no longer be read: raise FORMAT_VERSION."""
    row = torch.tensor([[[-0.5, 0.25, 1.0, -3.0]]])
    scale = torch.tensor([[1.0, 1.0, 2.0, 4.0]]) if CODECS[codec].taps.uses_channel_scale else None
    assert CODECS[codec].taps.encode(row, scale).numpy().tobytes().hex() == GOLDEN[codec]
