"""ControlNet of the SD-v1 family (Zhang et al. 2023, arXiv:2302.05543): a copy of the UNet's way down, and a picture.

``y = F(x) + Z2(F_c(x + Z1(c)))`` (eq. 2): what the copy ``F_c`` makes of latents and hint ``c`` is added to the UNet's
skip connections and to its middle, through 1x1 convolutions Z that training begins at zero. As with the UNet, what
depends on the timestep, the text or the hint alone is projected ahead of the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.ops import TORCH, Ops
from .conditioning import Batch, Conditioning, Residuals
from .config import UNetConfig
from .layers import PointwiseConv2d
from .unet import UNetEncoder

_FIRST_GUESS_EXPONENT = -1.0  # guess mode's factors grow from 0.1 at the finest skip to 1 in the middle
_SD_V1_HINT_CHANNELS = (16, 32, 96, 256)


@dataclass(frozen=True, slots=True)
class ControlNetConfig:
    """Sizes of a ``ControlNetModel``.

    Attributes:
        unet: of the UNet that it is a copy of.
        hint_channels: of the hint's embedding, which halves the size after each but the last.
        is_bgr: whether hints have blue first.
        is_pooled: whether residuals are averaged over the picture, as the "shuffle" net's are, which then act on the
            conditional rows alone.
    """

    unet: UNetConfig
    hint_channels: tuple[int, ...] = _SD_V1_HINT_CHANNELS
    is_bgr: bool = False
    is_pooled: bool = False

    @property
    def factor(self) -> int:
        """The picture's size over the latents'."""
        return 2 ** (len(self.hint_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str = "config.json") -> ControlNetConfig:
        """Read a diffusers ControlNet's ``config.json``; raises ``ValueError`` naming the field that does not fit."""
        rest = dict(config)
        if (kind := rest.pop("_class_name", "ControlNetModel")) != "ControlNetModel":
            raise ValueError(f"{source}: _class_name must be 'ControlNetModel', got {kind!r}")
        if (hint_inputs := rest.pop("conditioning_channels", 3)) != 3:
            raise ValueError(f"{source}: conditioning_channels must be 3, got {hint_inputs!r}")
        if (order := rest.pop("controlnet_conditioning_channel_order", "rgb")) not in ("rgb", "bgr"):
            raise ValueError(f"{source}: controlnet_conditioning_channel_order must be rgb or bgr, got {order!r}")
        widths = rest.pop("conditioning_embedding_out_channels", None) or _SD_V1_HINT_CHANNELS
        if not isinstance(widths, list | tuple) or not all(isinstance(one, int) and one > 0 for one in widths):
            raise ValueError(f"{source}: conditioning_embedding_out_channels must be positive integers, got {widths!r}")
        is_pooled = rest.pop("global_pool_conditions", False)
        down = rest.get("down_block_types") or ()
        rest["up_block_types"] = [str(name).replace("Down", "Up") for name in reversed(down)]
        rest["out_channels"] = rest.get("in_channels", 4)
        unet = UNetConfig.from_dict(rest, source)
        return cls(unet, tuple(widths), order == "bgr", bool(is_pooled))


class ControlNetConditioningEmbedding(nn.Module):
    """A hint picture's features, at the latents' size: the paper's tiny network E, and Z1."""

    def __init__(self, channels: int, hint_channels: tuple[int, ...]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, hint_channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in pairwise(hint_channels):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, wider, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(hint_channels[-1], channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv_in(x))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNetModel(UNetEncoder):
    """Predicts what to add to a UNet's skip connections and middle. It holds weights alone, so threads may share it.

    Attributes:
        config: sizes of the UNet that it is a copy of.
        control: all of its sizes.
        name: of its file or folder.
    """

    def __init__(self, config: ControlNetConfig, ops: Ops = TORCH, name: str = "controlnet") -> None:
        super().__init__(config.unet, ops)
        self.control, self.name = config, name
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(self.skip_channels[0], config.hint_channels)
        self.controlnet_down_blocks = nn.ModuleList([PointwiseConv2d(width, width) for width in self.skip_channels])
        middle = config.unet.block_out_channels[-1]
        self.controlnet_mid_block = PointwiseConv2d(middle, middle)
        self._number_layers([*self.down_blocks, self.mid_block])

    @property
    def n_residuals(self) -> int:
        """How many it gives: one for each skip connection and, last, the middle's."""
        return len(self.skip_channels) + 1

    def hint(self, pictures: Tensor) -> Tensor:
        """Features (B, C, h, w) of hint pictures (B, 3, H, W) in [0, 1], red first, in the weights' dtype."""
        weight = self.conv_in.weight
        pictures = pictures.to(weight.device, weight.dtype)
        return self.controlnet_cond_embedding(pictures.flip(1) if self.control.is_bgr else pictures)

    def guess_scales(self) -> Tensor:
        """Guess mode's factors (L,) on the residuals, from 0.1 to 1 in equal ratios, float32; 1 where it pools."""
        if self.control.is_pooled:
            return torch.ones(self.n_residuals)
        return torch.logspace(_FIRST_GUESS_EXPONENT, 0.0, self.n_residuals)

    def residuals(
        self, sample: Tensor, hints: Tensor, condition: Conditioning, rows: Tensor, scales: Tensor
    ) -> Residuals:
        """What to add, for N rows.

        Args:
            sample: (N, 4, h, w) latents, or (E, 4, h, w) where ``condition`` says which of the rows share some.
            hints: what ``hint`` gave, (N, C, h, w) or (E, C, h, w).
            condition: the rows' texts and times, projected by this net's ``text_kv`` and ``time_shifts``.
            rows, scales: see ``Residuals``.

        Returns:
            ``Residuals``.
        """
        skips, middle = self.encode(self.conv_in(sample) + hints, condition)
        outputs = [self._zero_convolved(conv, x) for conv, x in zip(self.controlnet_down_blocks, skips, strict=True)]
        return Residuals(rows, scales, outputs, self._zero_convolved(self.controlnet_mid_block, middle))

    def forward(
        self, sample: Tensor, timestep: int | Tensor, context: Tensor, pictures: Tensor, scale: float = 1.0
    ) -> Residuals:
        """Predict each row's residuals.

        Args:
            sample: (B, 4, h, w) noisy latents.
            timestep: one for all rows, or (B,).
            context: (B, S, E) encoded text.
            pictures: (B, 3, H, W) hints in [0, 1].
            scale: factor on all residuals.

        Returns:
            ``Residuals`` of rows 0 to B - 1, in the weights' dtype.
        """
        B, dtype = len(sample), self.conv_in.weight.dtype
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(B)
        condition = Conditioning(Batch(self.text_kv(context)), self.time_shifts(timesteps))
        rows = torch.arange(B, device=sample.device)
        scales = torch.full((B, self.n_residuals), scale, dtype=dtype, device=sample.device)
        return self.residuals(sample.to(dtype), self.hint(pictures), condition, rows, scales)

    def _zero_convolved(self, conv: nn.Module, x: Tensor) -> Tensor:
        x = conv(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x.mean(dim=(2, 3), keepdim=True) if self.control.is_pooled else x
