"""A card that is not there: torch's CUDA surface and Triton's launches on the CPU, with streams, graphs and faults.

    with FakeCuda() as card:
        sd = engine.load(folder, device="cuda", backend="triton")

Tensors say that they are on ``cuda:0`` and are computed on the CPU. What is given to a stream that captures is recorded
instead, and computed anew at every replay, from the memory that it read when it was captured. All accesses are held
against the order that streams, events and waits make (``card.races``), and time is counted, not measured.
"""

from tests.fake_cuda.card import Card, Launch
from tests.fake_cuda.surface import FakeCuda

__all__ = ["Card", "FakeCuda", "Launch"]
