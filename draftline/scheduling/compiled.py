"""Loops over requests and positions, compiled by Numba when they are first called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function; kept on disk, for processes to come, where Numba finds a folder that it may write to."""
    compiler: Callable[..., Any] = numba.njit
    try:
        found: Function = compiler(cache=True)(function)
    except RuntimeError:  # No such folder.
        found = compiler(function)
    return found
