"""``silu(group_norm(x))`` (Wu and He 2018, arXiv:1803.08494; Elfwing et al. 2017, arXiv:1702.03118)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def group_norm_silu_ref(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Eager form for ``x`` (B, C, h, w); ``weight`` and ``bias`` are (C,)."""
    return F.silu(F.group_norm(x, groups, weight, bias, eps))
