"""A device beside the CPU, made of CPU memory, that refuses what an accelerator refuses or would wait for.

Tensors on it say that they are elsewhere. Every operation is carried out on
the CPU tensors behind them, after a look at where its arguments are: tensors
of both devices in one operation are an error, as they are (or a hidden
transfer) on CUDA. Whatever brings values to the host is counted, since an
accelerator's queue is drained for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
_READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}


class Elsewhere(torch.Tensor):
    """A tensor on the second device; ``raw`` holds its values."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Elsewhere:
        # A view of a tensor that is no inference tensor must be none either; so none is.
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                raw.shape,
                strides=raw.stride(),
                storage_offset=raw.storage_offset(),
                dtype=raw.dtype,
                device=f"{NAME}:0",
            )
        made.raw = raw
        return made

    def __repr__(self, **kwargs: object) -> str:
        return f"Elsewhere({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the second device's mode")


class SecondDevice(TorchDispatchMode):
    """Carries operations out; while it is active, ``torch.device(NAME)`` works.

    Attributes:
        reads: Transfers to the host, by operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, Elsewhere)]
        device = kwargs.get("device")
        goes_there = device is not None and torch.device(device).type == NAME
        comes_back = bool(there) and device is not None and torch.device(device).type == "cpu"
        name = func._schema.name
        is_transfer = name == "aten::copy_" or (name == "aten::_to_copy" and device is not None)
        if there and not is_transfer:
            here = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim() > 0]
            assert not here, f"{name} mixes devices"
        if there and (comes_back or name in _READS or (name == "aten::copy_" and not isinstance(args[0], Elsewhere))):
            self.reads[name] += 1
        if name in ("aten::index", "aten::index_put_", "aten::index_put") and there:
            # A mask says how many elements there are only when it is read.
            self.reads[name] += any(x is not None and x.dtype == torch.bool for x in args[1])
        if goes_there or comes_back:
            kwargs["device"] = torch.device("cpu")
        plain_args, plain_kwargs = tree_map(_raw, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        if comes_back or not (there or goes_there) or name == "aten::_local_scalar_dense":
            return result
        if func._schema.is_mutable and isinstance(args[0] if args else None, torch.Tensor) and result is plain_args[0]:
            return args[0]
        return tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) else x, result)


class _Constructor(TorchFunctionMode):
    """What reaches no operation: ``torch.tensor`` makes its tensor unseen, ``tolist`` is closed to subclasses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].cpu().tolist()
        if func is torch.tensor and "device" in kwargs:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, Elsewhere) else value


@contextmanager
def second_device() -> Iterator[SecondDevice]:
    """The device, for as long as the block runs. Registration is for the life of the process."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME)
    with _Constructor(), SecondDevice() as mode:
        yield mode
