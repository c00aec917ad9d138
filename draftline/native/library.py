"""The kernels as Python sees them: packed weights, products, the layers of a step, scores of logits.

Everything is fp32 on the CPU; weights whose every number is a bf16 number are
kept as bf16, which changes no result and halves what a step reads.

Dimension letters: N rows, I inputs, O outputs, V vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from dataclasses import dataclass

import numpy as np

# torch first: the kernels then share its OpenMP threads instead of starting others beside them.
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftline.native.build import build_kernels
from draftline.native.prebuilt import prebuilt_kernels

logger = logging.getLogger(__name__)

_Pointer, _Int = ctypes.c_void_p, ctypes.c_int64
_WEIGHTS = ("qkv", "output", "gate_up", "down")
_NORMS = ("attention_norm", "mlp_norm", "q_norm", "k_norm")
_SIZES = (
    *("tokens", "hidden", "intermediate", "heads", "kv_heads", "head_dim"),
    *("num_layers", "num_taps", "num_threads", "num_positions"),
)
_BUFFERS = (
    *("layers", "caches", "tap_of", "positions", "slots", "num_keys", "cosines", "sines"),
    *("x", "taps", "normed", "qkv", "attended", "gated", "scores"),
)


class WeightFields(ctypes.Structure):
    """``Weight`` in ``products.h``."""

    _fields_ = (("packed", _Pointer), ("is_bf16", _Int))


class LayerFields(ctypes.Structure):
    """``Layer`` in ``kernels.cpp``."""

    _fields_ = (*((name, WeightFields) for name in _WEIGHTS), *((name, _Pointer) for name in _NORMS))


class StepFields(ctypes.Structure):
    """``Step`` in ``kernels.cpp``."""

    _fields_ = (
        *((name, _Int) for name in _SIZES),
        *((name, _Pointer) for name in _BUFFERS),
        ("scores_stride", _Int),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the kernels' layout.

    Attributes:
        packed: Its numbers, bf16 where that loses nothing.
        out_features: O.
        in_features: I.
    """

    packed: Tensor
    out_features: int
    in_features: int

    def fields(self) -> WeightFields:
        """As the kernels take it; valid while this object lives."""
        return WeightFields(self.packed.data_ptr(), int(self.packed.dtype == torch.bfloat16))


class Kernels:
    """The compiled kernels; see :func:`native_kernels`.

    Args:
        path: Of the shared library.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        library.pack.argtypes = [_Pointer, _Int, _Int, _Int, _Pointer]
        library.multiply.argtypes = [_Pointer, _Int, _Int, _Pointer, _Int, _Int, _Int, _Pointer, _Int]
        library.run_layers.argtypes = [ctypes.POINTER(StepFields)]
        library.score.argtypes = [_Pointer, _Int, _Int, _Pointer, _Pointer, _Int]
        library.decode_e4m3.argtypes = [_Pointer, _Int, _Int, _Pointer]
        library.decode_rotated.argtypes = [_Pointer, _Int, _Int, _Int, _Int, _Pointer, _Int, _Pointer]
        library.panel_outputs.restype = _Int
        for name in ("pack", "multiply", "run_layers", "score", "decode_e4m3", "decode_rotated"):
            getattr(library, name).restype = None
        self._library = library
        self.panel_outputs = int(library.panel_outputs())

    @property
    def lanes(self) -> int:
        """Numbers in a vector."""
        return self.panel_outputs // 2

    def pack(self, weight_OI: Tensor) -> PackedWeight:
        """Lay out a weight; a copy."""
        weight = weight_OI.detach().to("cpu", torch.float32).contiguous()
        out_features, in_features = weight.shape
        is_bf16 = bool((weight.bfloat16().float() == weight).all())
        panels = -(-out_features // self.panel_outputs)
        packed = torch.empty(
            panels * in_features * self.panel_outputs, dtype=torch.bfloat16 if is_bf16 else torch.float32
        )
        self._library.pack(weight.data_ptr(), out_features, in_features, int(is_bf16), packed.data_ptr())
        return PackedWeight(packed, out_features, in_features)

    def pack_gated(self, gate_OI: Tensor, up_OI: Tensor) -> PackedWeight:
        """Lay out a gated feed-forward: a panel holds the gate and the up of the same outputs."""
        size, inputs = gate_OI.shape
        blocks = -(-size // self.lanes)
        padded = torch.zeros(2, blocks * self.lanes, inputs)
        padded[0, :size], padded[1, :size] = gate_OI, up_OI
        mixed = padded.view(2, blocks, self.lanes, inputs).transpose(0, 1)
        return self.pack(mixed.reshape(-1, inputs))

    def multiply(self, x_NI: Tensor, weight: PackedWeight) -> Tensor:
        """``x W^T``, ``[N, O]`` fp32."""
        if x_NI.dtype != torch.float32 or x_NI.dim() != 2 or x_NI.shape[1] != weight.in_features:
            raise ValueError(f"expected [N, {weight.in_features}] float32, got {list(x_NI.shape)} {x_NI.dtype}")
        if x_NI.stride(1) != 1:
            x_NI = x_NI.contiguous()
        rows = x_NI.shape[0]
        y = torch.empty(rows, weight.out_features)
        if rows:
            fields = weight.fields()
            self._library.multiply(
                x_NI.data_ptr(),
                x_NI.stride(0),
                rows,
                fields.packed,
                fields.is_bf16,
                weight.out_features,
                weight.in_features,
                y.data_ptr(),
                torch.get_num_threads(),
            )
        return y

    def run_layers(self, step: StepFields) -> None:
        """Run a step; the caller keeps alive what its pointers point to."""
        self._library.run_layers(ctypes.byref(step))

    def score(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Argmax (the first of equals) and log-sum-exp of every row, ``[N]`` each."""
        logits = logits_NV.contiguous()
        if logits.dtype != torch.float32 or logits.dim() != 2 or not logits.shape[1]:
            raise ValueError(f"expected [N, V] float32, got {list(logits.shape)} {logits.dtype}")
        rows, size = logits.shape
        best, log_normaliser = torch.empty(rows, dtype=torch.long), torch.empty(rows)
        self._library.score(
            logits.data_ptr(), rows, size, best.data_ptr(), log_normaliser.data_ptr(), torch.get_num_threads()
        )
        return best, log_normaliser

    def decode_e4m3(self, stored_NWB: NDArray[np.uint8], values_NWD: Tensor) -> None:
        """Rows of :class:`~draftline.cache.codecs.E4M3Format` into fp32, which lies together; on this thread alone."""
        rows, count = np.ascontiguousarray(stored_NWB), math.prod(stored_NWB.shape[:-1])
        self._library.decode_e4m3(rows.ctypes.data, count, values_NWD.shape[-1], values_NWD.data_ptr())

    def decode_rotated(self, stored_NWB: NDArray[np.uint8], bits: int, factors_WD: Tensor, values_NWD: Tensor) -> None:
        """Rows of :class:`~draftline.cache.codecs.RotatedFormat` into fp32, which lies together; on this thread alone.

        Args:
            stored_NWB: Encoded rows.
            bits: Of a code, 4 or 8.
            factors_WD: fp32 signs times channel scales, of each of the W vectors or one for all.
            values_NWD: Is overwritten.
        """
        rows, factors, width = np.ascontiguousarray(stored_NWB), factors_WD.contiguous(), values_NWD.shape[-1]
        self._library.decode_rotated(
            *(rows.ctypes.data, math.prod(rows.shape[:-1]), rows.shape[-1], width, bits),
            *(factors.data_ptr(), factors.numel() // width, values_NWD.data_ptr()),
        )


@functools.cache
def native_kernels() -> Kernels | None:
    """The kernels of this process, compiled ahead or at need; ``None`` where they cannot be had."""
    path = prebuilt_kernels() or build_kernels()
    if path is None:
        return None
    try:
        return Kernels(str(path))
    except OSError as error:
        logger.warning(
            "CPU kernels are not used, steps are slower: %s. Install libgomp1, or set XDG_CACHE_HOME to a folder that "
            "programs may be loaded from.",
            error,
        )
        return None
