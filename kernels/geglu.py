"""GEGLU: ``y = v * gelu(g)`` with ``[v | g] = x`` (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def geglu_ref(x: Tensor) -> Tensor:
    """Eager GEGLU of ``x`` (..., 2C) into (..., C), with the exact (erf) gelu."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)
