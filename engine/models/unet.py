"""UNet2DConditionModel of the SD-v1 family (Rombach et al. 2022, arXiv:2112.10752).

``forward`` is ``denoise(sample, Conditioning(...))``. What depends on the timestep alone or on the text alone is
projected for all layers ahead of the loop: ``time_shifts`` once a schedule, ``text_kv`` once a prompt. Layers pick
their own entry by index, so the rows of one batch may differ in timestep, prompt and customisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.ops import TORCH, Ops
from .conditioning import Batch, Conditioning, TextKV
from .config import UNetConfig
from .layers import Downsample2D, GroupNormSiLU, ResnetBlock2D, Upsample2D, place_convolutions, timestep_embedding
from .sharing import with_weights
from .transformer import CrossAttention, Transformer2DModel


class UNetResnet(ResnetBlock2D):
    """A resnet that takes its shift, time embedding and first bias in one, from the conditioning."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig, ops: Ops) -> None:
        super().__init__(in_channels, out_channels, config.norm_num_groups, config.norm_eps, ops)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], out_channels)
        self.channels = slice(0)  # its part of the UNet's shifts

    def forward(self, x: Tensor, condition: Conditioning) -> Tensor:
        return super().forward(x, condition.shift(self.channels, x))


class UNetStage(nn.Module):
    """Resnets of one resolution, each followed by a transformer where the stage has attention."""

    def __init__(self, channels: list[int], out: int, n_heads: int, attention: bool, config: UNetConfig, ops: Ops):
        super().__init__()
        self.resnets = nn.ModuleList([UNetResnet(channel, out, config, ops) for channel in channels])
        if attention:
            self.attentions = nn.ModuleList([Transformer2DModel(out, n_heads, config, ops) for _ in channels])
        else:
            self.attentions = [_no_attention] * len(channels)


class DownBlock2D(UNetStage):
    def __init__(self, channels: list[int], out: int, n_heads: int, attention: bool, last: bool, config, ops):
        super().__init__(channels, out, n_heads, attention, config, ops)
        self.downsamplers = None if last else nn.ModuleList([Downsample2D(out, padding=1, ops=ops)])

    def forward(self, x: Tensor, condition: Conditioning) -> list[Tensor]:
        """Returns the output of every layer; the last is the block's own."""
        outputs = []
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, condition), condition)
            outputs.append(x)
        if self.downsamplers is not None:
            outputs.append(self.downsamplers[0](x))
        return outputs


class UpBlock2D(UNetStage):
    def __init__(self, channels: list[int], out: int, n_heads: int, attention: bool, last: bool, config, ops):
        super().__init__(channels, out, n_heads, attention, config, ops)
        self.upsamplers = None if last else nn.ModuleList([Upsample2D(out, ops)])

    def forward(self, x: Tensor, skips: list[Tensor], condition: Conditioning) -> Tensor:
        """Consumes its skip connections from the end of ``skips``; the one left on top gives the size to grow to."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(torch.cat([x, skips.pop()], dim=1), condition), condition)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x, size=skips[-1].shape[-2:])
        return x


class UNetMidBlock2DCrossAttn(nn.Module):
    def __init__(self, channels: int, n_heads: int, config: UNetConfig, ops: Ops) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([UNetResnet(channels, channels, config, ops) for _ in range(2)])
        self.attentions = nn.ModuleList([Transformer2DModel(channels, n_heads, config, ops)])

    def forward(self, x: Tensor, condition: Conditioning) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, condition), condition)
        return self.resnets[1](x, condition)


class TimestepEmbedding(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class UNetEncoder(nn.Module):
    """A UNet's way down to its middle, which a ControlNet is a copy of, and what of a model is projected ahead."""

    def __init__(self, config: UNetConfig, ops: Ops) -> None:
        super().__init__()
        self.config = config
        widths, heads, attention = config.block_out_channels, config.n_heads, config.down_has_attention
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])
        self.skip_channels, x = [widths[0]], widths[0]  # of the skip connections, and of the running feature map
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            channels = [x] + [width] * (config.layers_per_block - 1)
            self.down_blocks.append(DownBlock2D(channels, width, heads[i], attention[i], last, config, ops))
            x = width
            self.skip_channels += [x] * (config.layers_per_block + (not last))
        self.mid_block = UNetMidBlock2DCrossAttn(x, heads[-1], config, ops)

    def _number_layers(self, stages: Iterable[nn.Module]) -> None:
        """Give the layers of ``stages``, in forward order, their places in shifts and texts."""
        layers = [module for stage in stages for module in stage.modules()]
        names = {module: name for name, module in self.named_modules()}
        self.resnets = [module for module in layers if isinstance(module, UNetResnet)]
        # by the names that concepts use ("...attn2")
        self.cross_attentions = {names[m]: m for m in layers if isinstance(m, CrossAttention)}
        self.text_projections = {  # "...attn2.to_k", "...attn2.to_v", in the order of ``text_kv``
            f"{name}.{part}": getattr(m, part) for name, m in self.cross_attentions.items() for part in ("to_k", "to_v")
        }
        first = 0
        for resnet in self.resnets:
            resnet.channels = slice(first, first := first + len(resnet.conv1.bias))
        for i, attn2 in enumerate(self.cross_attentions.values()):
            attn2.layer = i

    def place(self, backend: str, device: torch.device, benchmark: bool) -> None:
        """Make of loaded weights what a backend on a device runs best; see ``layers.place_convolutions``."""
        place_convolutions(self, backend, device, benchmark)
        if device.type == "cuda" and backend != "torch":
            self.compose()

    def compose(self) -> None:
        """Make products of projections that follow one another; weights must not change after."""
        for module in self.modules():
            if isinstance(module, Transformer2DModel):
                module.compose()

    def time_shifts(self, timesteps: Tensor) -> Tensor:
        """All resnets' shifts (T, sum of C) at timesteps (T,), time embedding and first bias, in the weights' dtype."""
        embedding = timestep_embedding(timesteps, self.config.block_out_channels[0])
        hidden = F.silu(self.time_embedding(embedding.to(self.conv_in.weight.dtype)))
        return torch.cat([resnet.time_emb_proj(hidden) + resnet.conv1.bias for resnet in self.resnets], dim=1)

    def text_kv(self, context: Tensor) -> TextKV:
        """Per cross-attention layer, keys and values (B, S, C) of the encoded text ``context`` (B, S, E)."""
        context = context.to(self.conv_in.weight.dtype)
        return tuple((attn2.to_k(context), attn2.to_v(context)) for attn2 in self.cross_attentions.values())

    def encode(self, x: Tensor, condition: Conditioning) -> tuple[list[Tensor], Tensor]:
        """The skip connections from what ``conv_in`` gave, and the middle's output; rows of latents may come once."""
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], condition)
        skips = [condition.to_rows(skip) for skip in skips]
        return skips, self.mid_block(skips[-1], condition)


class UNet2DConditionModel(UNetEncoder):
    """Predicts the noise in latents, given timesteps and text. Weights are immutable; see ``Conditioning``."""

    def __init__(self, config: UNetConfig, ops: Ops = TORCH) -> None:
        super().__init__(config, ops)
        widths, heads, attention = config.block_out_channels, config.n_heads, config.down_has_attention
        skips, x = list(self.skip_channels), widths[-1]
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):
            channels = []
            for _ in range(config.layers_per_block + 1):
                channels.append(x + skips.pop())
                x = widths[i]
            self.up_blocks.append(UpBlock2D(channels, x, heads[i], attention[i], i == 0, config, ops))
        self.conv_norm_out = GroupNormSiLU(config.norm_num_groups, widths[0], config.norm_eps, ops)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self._number_layers([*self.down_blocks, self.mid_block, *self.up_blocks])

    def with_weights(self, weights: Mapping[str, Tensor]) -> UNet2DConditionModel:
        """Another UNet with other values of some parameters; see ``sharing.with_weights``."""
        other, own = cast(UNet2DConditionModel, with_weights(self, weights)), set(self.modules())
        for module in other.modules():
            if isinstance(module, Transformer2DModel) and module not in own and module.composed:
                module.compose()
        return other

    def denoise(self, sample: Tensor, condition: Conditioning) -> Tensor:
        """Noise prediction (B, 4, h, w) for latents ``sample`` (B, 4, h, w), or (P, 4, h, w) where rows share them."""
        skips, x = self.encode(self.conv_in(sample), condition)
        for one in condition.residuals:
            x = one.add_to(skips, x)
        for block in self.up_blocks:
            x = block(x, skips, condition)
        return self.conv_out(self.conv_norm_out(x))

    def forward(self, sample: Tensor, timestep: int | Tensor, context: Tensor) -> Tensor:
        """Predict the noise of each row.

        Args:
            sample: (B, 4, h, w) noisy latents.
            timestep: one for all rows, or (B,).
            context: (B, S, E) encoded text.

        Returns:
            (B, 4, h, w), in the weights' dtype.
        """
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        condition = Conditioning(Batch(self.text_kv(context)), self.time_shifts(timesteps))
        return self.denoise(sample.to(self.conv_in.weight.dtype), condition)


def _no_attention(x: Tensor, _condition: Conditioning) -> Tensor:
    return x
