"""Where a kernel of ours beats torch's own: the committed table that chooses between the two.

Products and self-attention have well-tuned competitors (cuBLAS, SDPA), so ours serve only where ``make bench-gpu``
found them faster; ``python -m benchmarks.choose`` turns its result file into this table.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Op, compute capability (90 is Hopper), and the sizes that win: the head dim of attention, input and output channels of
# products (and the second input's). Not measured yet, so torch's own serves everywhere.
FASTER: dict[tuple[str, int], frozenset[tuple[int, ...]]] = {}


CHOSEN = ("attention", "layer_norm_linear", "layer_norm_geglu", "linear_add")  # the ops that the table decides on


def faster_sizes(op: str, device: torch.device) -> frozenset[tuple[int, ...]]:
    """The sizes at which our kernel of an op serves on a device."""
    return FASTER.get((op, _capability(device)), frozenset()) if device.type == "cuda" else frozenset()


def is_faster(op: str, x: Tensor, *sizes: int) -> bool:
    """Whether our kernel is the faster one on the device of ``x``; on a CPU it never is."""
    return x.is_cuda and sizes in faster_sizes(op, x.device)


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
