"""``triton.jit``, applied when a kernel is first launched: Triton is there on Linux only, and slow to import."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

_LOCK = threading.Lock()
_NEEDED = "the Triton kernels need the package triton, which is there for Linux only; use another backend"


class PendingKernel:
    """A kernel before its first launch."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __getitem__(self, grid: Any) -> Any:
        """What launches it on a grid, as Triton's own kernels have it."""
        load_kernels()
        return getattr(sys.modules[self.function.__module__], self.function.__name__)[grid]


def jit(function: Callable[..., Any]) -> Any:
    """Mark a kernel, or a function that kernels call."""
    return PendingKernel(function)


def load_kernels() -> None:
    """Import Triton and turn every pending kernel of this package into one of its own.

    Kernels know ``tl`` and one another by the names that they have in their modules.

    Raises:
        RuntimeError: Triton is not installed.
    """
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        raise RuntimeError(_NEEDED) from error
    package = __name__.rpartition(".")[0]
    with _LOCK:
        modules = [module for name, module in sys.modules.items() if name.startswith(f"{package}.")]
        found = [(module, name, kernel) for module in modules for name, kernel in vars(module).items()]
        compiled: dict[PendingKernel, Any] = {}
        for module, name, kernel in found:
            if isinstance(kernel, PendingKernel):
                if kernel not in compiled:
                    kernel.function.__globals__["tl"] = tl
                    compiled[kernel] = triton.jit(kernel.function)
                setattr(module, name, compiled[kernel])


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()
