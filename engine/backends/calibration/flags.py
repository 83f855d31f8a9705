"""The process-wide flags of torch that decide how products are computed."""

from __future__ import annotations

from typing import Any

import torch

_MATMUL = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)
_TF32 = "matmul.allow_tf32"


def get_flags() -> dict[str, bool]:
    """The flags as they are."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    flags = {f"matmul.{name}": getattr(matmul, name) for name in _MATMUL}
    return flags | {
        _TF32: matmul.fp32_precision == "tf32",  # which may be read whichever of torch's two ways it was set by
        "cudnn.enabled": cudnn.enabled,
        "deterministic": bool(cudnn.deterministic or torch.are_deterministic_algorithms_enabled()),
    }


def set_flags(flags: dict[str, bool]) -> None:
    """Have this process compute as one with these flags does."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    for name in _MATMUL:
        setattr(matmul, name, flags[f"matmul.{name}"])
    matmul.allow_tf32 = flags[_TF32]
    cudnn.enabled, cudnn.deterministic = flags["cudnn.enabled"], flags["deterministic"]
