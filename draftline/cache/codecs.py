"""How rows of hidden states become bytes and come back; pure functions of tensors.

A *codec* names two row formats: one for the taps, which a draft reads, and one
for the last hidden state, which defines the law that the draft is trained
towards and so is kept finer (measured: docs/adr/0020-cache-codecs.md). A row format turns ``[N, W, D]`` floats into
``[N, W, row_bytes(D)]`` bytes: the codes of a row and, behind them, its scales.

Dimension letters: N rows (tokens), W vectors a row (the taps, or 1), D hidden
size, P = D rounded up to whole groups, G groups of a vector, B bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftline.cache.sizes import GROUP, NORMALISER_BYTES, e4m3_bytes, plain_bytes, rotated_bytes
from draftline.native.library import native_kernels

MAX_MAGNITUDE = 1e37
"""Values beyond this would overflow inside a rotation; no healthy target comes near."""

_E4M3_MAX = 448.0
_CHANNEL_FLOOR = 1e-4
_NORM = 1 / math.sqrt(GROUP)
"""Makes the rotation orthonormal; a power of two, so that multiplying by it is exact."""


class RowFormat(Protocol):
    """Vectors to bytes and back."""

    @property
    def uses_channel_scale(self) -> bool:
        """Whether vectors are divided by a scale per channel first, see :func:`channel_scale`."""
        ...

    @property
    def decoded_dtype(self) -> torch.dtype:
        """Of what :meth:`decode` returns."""
        ...

    def row_bytes(self, hidden_size: int) -> int:
        """Bytes of one vector."""
        ...

    def encode(self, rows_NWD: Tensor, scale_WD: Tensor | None) -> Tensor:
        """``uint8 [N, W, B]`` of finite floats of magnitude below :data:`MAX_MAGNITUDE`."""
        ...

    def decode(self, bytes_NWB: Tensor, hidden_size: int, scale_WD: Tensor | None) -> Tensor:
        """``[N, W, D]`` floats; inverse of :meth:`encode` up to rounding."""
        ...

    def decode_into(self, stored_NWB: NDArray[np.uint8], scale_WD: Tensor | None, values_NWD: Tensor) -> None:
        """The same numbers into CPU memory that lies together, of :attr:`decoded_dtype`.

        For readers, of which several work at a time beside whatever else the
        machine does: it takes this thread alone, where torch's operators would
        each wait for a team of threads.
        """
        ...


@dataclass(frozen=True)
class PlainFormat:
    """The numbers themselves."""

    dtype: torch.dtype
    uses_channel_scale: bool = False

    @property
    def decoded_dtype(self) -> torch.dtype:
        """See :class:`RowFormat`."""
        return self.dtype

    def row_bytes(self, hidden_size: int) -> int:
        """See :class:`RowFormat`."""
        return plain_bytes(self.dtype.itemsize)(hidden_size)

    def encode(self, rows_NWD: Tensor, scale_WD: Tensor | None) -> Tensor:
        """See :class:`RowFormat`."""
        return rows_NWD.to(self.dtype).contiguous().view(torch.uint8)

    def decode(self, bytes_NWB: Tensor, hidden_size: int, scale_WD: Tensor | None) -> Tensor:
        """See :class:`RowFormat`; comes back in the stored dtype."""
        return bytes_NWB.contiguous().view(self.dtype)

    def decode_into(self, stored_NWB: NDArray[np.uint8], scale_WD: Tensor | None, values_NWD: Tensor) -> None:
        """See :class:`RowFormat`."""
        np.copyto(values_NWD.view(torch.uint8).numpy(), stored_NWB)


@dataclass(frozen=True)
class E4M3Format:
    """8-bit floats (4 exponent bits, 3 of mantissa) with one fp32 scale a vector.

    The scale takes the largest value to 448. A value has at most 1/16 relative
    error down to 1/28,672 of the largest one, so a channel of outliers does
    not drown the others. ``B = D + 4``.
    """

    uses_channel_scale: bool = False

    @property
    def decoded_dtype(self) -> torch.dtype:
        """See :class:`RowFormat`."""
        return torch.float32

    def row_bytes(self, hidden_size: int) -> int:
        """See :class:`RowFormat`."""
        return e4m3_bytes(hidden_size)

    def encode(self, rows_NWD: Tensor, scale_WD: Tensor | None) -> Tensor:
        """See :class:`RowFormat`."""
        rows = rows_NWD.float()
        scale = rows.abs().amax(-1, keepdim=True) / _E4M3_MAX
        # Out of range becomes NaN in torch's conversion, which does not saturate: clamp what rounding pushed out.
        scaled = (rows / _nonzero(scale)).clamp_(-_E4M3_MAX, _E4M3_MAX)
        codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        return torch.cat([codes, scale.view(torch.uint8)], -1)

    def decode(self, bytes_NWB: Tensor, hidden_size: int, scale_WD: Tensor | None) -> Tensor:
        """See :class:`RowFormat`; fp32."""
        codes = bytes_NWB[..., :hidden_size].int()
        values = torch.index_select(_e4m3_values().to(codes.device), 0, codes.flatten())
        scale = bytes_NWB[..., hidden_size:].contiguous().view(torch.float32)
        return values.view(codes.shape).mul_(scale)

    def decode_into(self, stored_NWB: NDArray[np.uint8], scale_WD: Tensor | None, values_NWD: Tensor) -> None:
        """See :class:`RowFormat`."""
        kernels = native_kernels()
        if kernels is None:
            values_NWD.copy_(self.decode(torch.from_numpy(stored_NWB.copy()), values_NWD.shape[-1], None))
        else:
            kernels.decode_e4m3(stored_NWB, values_NWD)


@dataclass(frozen=True)
class RotatedFormat:
    """4- or 8-bit integers after a randomised Hadamard rotation, a bf16 scale for every 64 values.

    A vector is divided by its channels' scales, padded to whole groups, its
    signs are flipped by a fixed pattern and each group is multiplied by the
    64 x 64 Hadamard matrix over 8. That spreads what single values of a group
    stand out by over all of it, and the result is close to a normal law, which
    few levels describe well. Levels lie at odd multiples of half a step, so
    all 2**bits are used. ``B = P * bits / 8 + 2 * G``.

    Rotation before rounding: QuIP# (Tseng et al. 2024), QuaRot (Ashkboos et al. 2024).

    Attributes:
        bits: 4 (two codes a byte: value i of a group in the low half of byte i, value i + 32 in the high one) or 8.
        uses_channel_scale: For taps, whose channels differ by orders of magnitude. The final norm has evened them out
            in the last hidden state, and there the scale costs accuracy of the law.
    """

    bits: int
    uses_channel_scale: bool

    @property
    def decoded_dtype(self) -> torch.dtype:
        """See :class:`RowFormat`."""
        return torch.float32

    def row_bytes(self, hidden_size: int) -> int:
        """See :class:`RowFormat`."""
        return rotated_bytes(self.bits)(hidden_size)

    def encode(self, rows_NWD: Tensor, scale_WD: Tensor | None) -> Tensor:
        """See :class:`RowFormat`."""
        rows = rows_NWD.float()
        rotated = rotate(rows if scale_WD is None else rows / scale_WD)
        half = 2 ** (self.bits - 1)
        scale = (rotated.abs().amax(-1, keepdim=True) / (half - 0.5)).bfloat16()
        codes = (rotated / _nonzero(scale.float()) + (half - 0.5)).round_().clamp_(0, 2 * half - 1).to(torch.uint8)
        if self.bits == 4:
            codes = codes[..., : GROUP // 2] | codes[..., GROUP // 2 :] << 4
        return torch.cat([codes.flatten(-2), scale.flatten(-2).contiguous().view(torch.uint8)], -1)

    def decode(self, bytes_NWB: Tensor, hidden_size: int, scale_WD: Tensor | None) -> Tensor:
        """See :class:`RowFormat`; fp32."""
        groups, half = _groups(hidden_size), 2 ** (self.bits - 1)
        num_code_bytes = groups * GROUP * self.bits // 8
        packed = bytes_NWB[..., :num_code_bytes].reshape(-1, GROUP * self.bits // 8)
        codes = torch.empty(len(packed), GROUP, device=packed.device)
        if self.bits == 4:
            codes[:, : GROUP // 2] = packed & 15
            codes[:, GROUP // 2 :] = packed >> 4
        else:
            codes.copy_(packed)
        # Sums of 64 half-integers are exact in fp32, so that here the order of a matrix product does not matter.
        values = codes.sub_(half - 0.5) @ _sylvester().to(codes.device)
        scale = bytes_NWB[..., num_code_bytes:].contiguous().view(torch.bfloat16).flatten().float()
        rows = values.mul_((scale * _NORM)[:, None]).view(*bytes_NWB.shape[:-1], groups * GROUP)[..., :hidden_size]
        return rows.mul_(_factors(hidden_size, scale_WD).to(rows.device))

    def decode_into(self, stored_NWB: NDArray[np.uint8], scale_WD: Tensor | None, values_NWD: Tensor) -> None:
        """See :class:`RowFormat`."""
        kernels = native_kernels()
        if kernels is None:
            values_NWD.copy_(self.decode(torch.from_numpy(stored_NWB.copy()), values_NWD.shape[-1], scale_WD))
        else:
            kernels.decode_rotated(stored_NWB, self.bits, _factors(values_NWD.shape[-1], scale_WD), values_NWD)


@dataclass(frozen=True)
class Codec:
    """How a cache stores hidden states.

    Attributes:
        taps: Format of the taps.
        last_hidden: Format of the last hidden state.
    """

    taps: RowFormat
    last_hidden: RowFormat

    def token_bytes(self, num_taps: int, hidden_size: int) -> int:
        """Taps of one token."""
        return num_taps * self.taps.row_bytes(hidden_size)

    def law_bytes(self, hidden_size: int) -> int:
        """Last hidden state and log-normaliser (fp32) of one token that has a law to learn."""
        return self.last_hidden.row_bytes(hidden_size) + NORMALISER_BYTES


CODECS: Mapping[str, Codec] = {
    "fp32": Codec(PlainFormat(torch.float32), PlainFormat(torch.float32)),
    "bf16": Codec(PlainFormat(torch.bfloat16), PlainFormat(torch.bfloat16)),
    "fp8": Codec(E4M3Format(), RotatedFormat(8, uses_channel_scale=False)),
    "int4": Codec(RotatedFormat(4, uses_channel_scale=True), RotatedFormat(8, uses_channel_scale=False)),
}


def channel_scale(rows_NWD: Tensor) -> Tensor:
    """``fp32 [W, D]``: the median magnitude of every channel, at least 1e-4 of the middle channel's.

    Channels of a residual stream differ by orders of magnitude; a rotation of
    raw values would drown the small ones in the rounding of the large. The
    median, because the few tokens on which attention rests are thousands of
    times larger in single channels, and would set a mean or a maximum.

    Scaled so that the smallest is 1: then dividing by it never overflows.
    """
    medians = rows_NWD.abs().float().median(0).values
    middle = medians.median(-1, keepdim=True).values
    floored = torch.maximum(medians, _CHANNEL_FLOOR * middle)
    smallest = floored.amin(-1, keepdim=True)
    return torch.where(smallest > 0, floored / _nonzero(smallest), torch.ones_like(floored))


def rotate(rows_NWD: Tensor) -> Tensor:
    """``[N, W, G, 64]``: sign flips, then an orthonormal Hadamard rotation of every group."""
    hidden_size = rows_NWD.shape[-1]
    padding = _groups(hidden_size) * GROUP - hidden_size
    flipped = torch.nn.functional.pad(rows_NWD * _signs(hidden_size).to(rows_NWD.device), (0, padding))
    return _hadamard(flipped.unflatten(-1, (-1, GROUP)))


def rotate_back(rotated_NWGH: Tensor, hidden_size: int) -> Tensor:
    """Inverse of :func:`rotate`; a Hadamard matrix is its own inverse."""
    flat = _hadamard(rotated_NWGH).flatten(-2)[..., :hidden_size]
    return flat * _signs(hidden_size).to(flat.device)


def _hadamard(groups: Tensor) -> Tensor:
    """Every group times Sylvester's matrix of order 64 over 8, by the fast transform.

    Not by a matrix product: its order of summation, and so the last bit and
    now and then a code, would depend on the number of rows and of threads.
    """
    old = (groups * _NORM).reshape(-1, GROUP).t().contiguous()
    new = torch.empty_like(old)
    width = 1
    while width < GROUP:
        pairs, results = old.view(-1, 2, width, old.shape[1]), new.view(-1, 2, width, old.shape[1])
        torch.add(pairs[:, 0], pairs[:, 1], out=results[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=results[:, 1])
        old, new, width = new, old, 2 * width
    return old.t().reshape(groups.shape)


def _groups(hidden_size: int) -> int:
    return math.ceil(hidden_size / GROUP)


def _nonzero(scale: Tensor) -> Tensor:
    """A zero scale belongs to zeros only: divide those by 1."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


@lru_cache(maxsize=1)
def _sylvester() -> Tensor:
    """Sylvester's matrix of order 64: ones and minus ones."""
    matrix = torch.ones(1, 1)
    while len(matrix) < GROUP:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@lru_cache(maxsize=1)
def _e4m3_values() -> Tensor:
    """The number of each code; looking up is several times faster than converting on a CPU."""
    codes = torch.arange(256, dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn).float()


def _factors(hidden_size: int, scale_WD: Tensor | None) -> Tensor:
    """What a rotated back row is multiplied by: signs, and the scales that it was divided by."""
    signs = _signs(hidden_size)
    return signs if scale_WD is None else signs.to(scale_WD.device) * scale_WD


@lru_cache(maxsize=8)
def _signs(hidden_size: int) -> Tensor:
    """Signs of the channels: the bits of sha256 in counter mode, the same in every version of every library."""
    count = math.ceil(hidden_size / 256)
    digest = b"".join(hashlib.sha256(f"draftline rotation {block}".encode()).digest() for block in range(count))
    bits = torch.tensor([byte >> bit & 1 for byte in digest for bit in range(8)], dtype=torch.float32)
    return 1 - 2 * bits[:hidden_size]
