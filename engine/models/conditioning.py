"""What the rows of a UNet batch are conditioned on: times, texts, and one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

TextKV = tuple[tuple[Tensor, Tensor], ...]  # per cross-attention layer, keys and values (B, S, C)
Observe = Callable[[int, Tensor, Tensor], None]
ObserveMasks = Callable[[int, Tensor], None]


@dataclass(frozen=True, slots=True)
class Following:
    """The last F of a batch's B rows take their attention maps from others (Infusion, arXiv:2404.14007, eq. 9).

    ``attn2`` of a following row is its leader's, plus the leader's map columns times projected residual values.

    Attributes:
        tokens: (B - F, T) int64, per map-owning row the tokens whose columns are followed.
        leaders: (F,) int64, the map-owning row that each follower follows.
        residuals: per cross-attention layer (F, T*H, C), heads last; see ``infusion.project``.
        foundation: per layer, output and columns of the rows followed, where they are not in this batch (B = F).
    """

    tokens: Tensor
    leaders: Tensor
    residuals: tuple[Tensor, ...]
    foundation: tuple[tuple[Tensor, Tensor], ...] = ()


@dataclass(frozen=True, slots=True)
class Mixing:
    """The last 2M of the map-owning rows are M concept rows and then their M auxiliary rows (DCI, ECCV 2024).

    Attributes:
        chosen: (2M, S) bool, the tokens whose attention makes up a row's mask.
        lengths: (2M,) int64, how many tokens each prompt has of its own.
        gates: (M, 4) float32: strength, tau_t, tau_s and gain of each pair; see ``kernels/dbim.py``.
        logits: whether masks are sums of logits.
        masked: whether positions are gated; if not, the auxiliary output is added to the concept's.
        layers: the cross-attention layers that mix, by position.
    """

    chosen: Tensor
    lengths: Tensor
    gates: Tensor
    logits: bool
    masked: bool
    layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class Shared:
    """Rows that see the same latents, computed once until a text tells them apart at the first cross-attention.

    Attributes:
        rows: (B,) int64, the entry of the P < B latents that each row sees.
        firsts: (P,) int64, one row of each entry.
    """

    rows: Tensor
    firsts: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """What the B rows of a batch attend to, the same at every step.

    Attributes:
        text: per cross-attention layer, keys and values (B - F, S, C) of the rows that own their map.
        following: how the other F rows follow these; None if there are none.
        mixing: how the last of the map-owning rows mix; None if none does.
        shared: which of the rows share latents, which then come once; None if each has its own.
        images: per cross-attention layer, keys and values (K, B - F, S, C) of K image prompts of the map-owning rows,
            the values times their scales; None if no row has any.
    """

    text: TextKV
    following: Following | None = None
    mixing: Mixing | None = None
    shared: Shared | None = None
    images: TextKV | None = None


@dataclass(frozen=True, slots=True)
class Residuals:
    """What a ControlNet adds to the skip connections, and to the middle's output, of N rows (arXiv:2302.05543, eq. 2).

    Attributes:
        rows: (N,) int64, the rows of the UNet's batch that get something.
        scales: (N, L), each row's factor on each.
        skips: one for each skip connection, (N, C, h, w), or (N, C, 1, 1) for all positions alike.
        middle: likewise for the middle's output; the last of the L.
    """

    rows: Tensor
    scales: Tensor
    skips: Sequence[Tensor]
    middle: Tensor

    def add_to(self, skips: list[Tensor], middle: Tensor) -> Tensor:
        """Replace the UNet's ``skips`` by their sums, one after the other, and return the middle's; see ``_sum``."""
        for level, own in enumerate(self.skips):
            skips[level] = self._sum(skips[level], own, level)
        return self._sum(middle, self.middle, -1)

    def _sum(self, x: Tensor, own: Tensor, level: int) -> Tensor:
        """Rows that get nothing stay as they are, to the bit, whatever is in those of others."""
        scaled = self.scales[:, level, None, None, None] * own
        scaled = scaled.to(x.dtype).expand(-1, -1, *x.shape[2:])
        return x.clone().index_add_(0, self.rows, scaled)  # clone keeps channels last


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the rows of a batch are conditioned on at one step, projected for every layer.

    Attributes:
        batch: what they attend to.
        shifts: (B, sum of C), what ``UNet2DConditionModel.time_shifts`` gives for each row's timestep.
        observe: called with layer, attention output (B - F, N, C) and map columns (B - F, N, T*H) where tokens are
            followed.
        observe_masks: called with layer and masks (2M, H, N) float32, the softmax over space, where rows mix by masks.
        residuals: what ControlNets add, one after the other.
    """

    batch: Batch
    shifts: Tensor
    observe: Observe | None = None
    observe_masks: ObserveMasks | None = None
    residuals: tuple[Residuals, ...] = ()

    def to_rows(self, x: Tensor) -> Tensor:
        """Activations of all rows, from those of all rows or of shared latents."""
        shared = self.batch.shared
        return x if shared is None or len(x) == len(shared.rows) else x[shared.rows]

    def shift(self, channels: slice, x: Tensor) -> Tensor:
        """One resnet's part of the shifts, of the entries of ``x``, which are all rows or shared latents."""
        shift, shared = self.shifts[:, channels], self.batch.shared
        return shift if shared is None or len(x) == len(shift) else shift[shared.firsts]
