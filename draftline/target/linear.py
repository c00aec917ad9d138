"""Linear layers whose weights are packed once for the CPU kernel at hand.

fp32 on a CPU: our own kernels (:mod:`draftline.native`), whose rows do not
depend on each other and whose weights stay in bf16 where the checkpoint was;
without a compiler, MKL's packed SGEMM. bf16 on a CPU: oneDNN's reordered
weight. Elsewhere (CUDA, other CPUs): the plain product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from draftline.native.library import PackedWeight, native_kernels

_PACK_ROWS = 64
"""Row hint given to the packers; 64 was best or within 2 % from 1 to 256 rows."""


class PackedLinear:
    """``y = x W^T`` for a frozen weight.

    Args:
        weight_OI: ``[out_features, in_features]``, fp32 or bf16.

    Packing copies the weight; the original may be freed by the caller.
    Not differentiable.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        self.out_features, self.in_features = weight_OI.shape
        self._mode = _choose_mode(weight_OI)
        weight = weight_OI.detach()
        self._kernels = native_kernels() if self._mode == "native" else None
        self._native: PackedWeight | None = None
        if self._kernels is not None:
            self._native = self._kernels.pack(weight)
        elif self._mode == "mkl":
            # Only the shape of the "original" weight is read, so a zero-stride view stands in for 4 bytes a weight.
            self._shape_only = torch.empty(1).expand(self.out_features, self.in_features)
            self._packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
        elif self._mode == "onednn":
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
        else:
            self._packed = weight.contiguous()

    def __call__(self, x_NI: Tensor) -> Tensor:
        """Multiply ``[N, in_features]``; returns ``[N, out_features]`` in the same dtype."""
        if self._kernels is not None and self._native is not None:
            return self._kernels.multiply(x_NI, self._native)
        if self._mode == "mkl":
            # The kernel only takes the packed path when told that the row count is the packed one; packing of the
            # right-hand matrix does not depend on it (checked against the plain product in the tests).
            rows = x_NI.shape[0]
            product: Tensor = torch.ops.mkl._mkl_linear(x_NI, self._packed, self._shape_only, None, rows)
            return product
        if self._mode == "onednn":
            product = torch.ops.mkldnn._linear_pointwise(x_NI, self._packed, None, "none", [], "")
            return product
        return functional.linear(x_NI, self._packed)


def _choose_mode(weight: Tensor) -> str:
    if weight.device.type != "cpu":
        return "plain"
    if weight.dtype == torch.float32 and native_kernels() is not None:
        return "native"
    if weight.dtype == torch.float32 and torch._C.has_mkl and hasattr(torch.ops.mkl, "_mkl_linear"):
        return "mkl"
    if weight.dtype == torch.bfloat16 and torch._C._has_mkldnn:
        return "onednn"
    return "plain"
