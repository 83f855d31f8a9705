"""UNet2DConditionModel of the SD-v1 family (Rombach et al. 2022, arXiv:2112.10752).

``forward`` is ``denoise(sample, Conditioning(...))``. What depends on the timestep alone or on the text alone is
projected for all layers ahead of the loop: ``time_shifts`` once a schedule, ``text_kv`` once a prompt. Layers pick
their own entry by index, so the rows of one batch may differ in timestep, prompt and customisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UNetConfig
from .layers import Downsample2D, GroupNorm, GroupNormSiLU, ResnetBlock2D, Upsample2D, timestep_embedding
from .ops import TORCH, Ops

Observe = Callable[[int, Tensor, Tensor], None]


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
class Conditioning:
    """What the rows of a batch are conditioned on, projected for every layer.

    Attributes:
        shifts: per resnet (B, C), the projected time embedding.
        text: per cross-attention layer, keys and values (B - F, S, C) of the rows that own their map.
        following: how the other F rows follow these; None if there are none.
        observe: called with layer, attention output (B - F, N, C) and map columns (B - F, N, T*H) where tokens are
            followed.
    """

    shifts: tuple[Tensor, ...]
    text: tuple[tuple[Tensor, Tensor], ...]
    following: Following | None = None
    observe: Observe | None = None


class SelfAttention(nn.Module):
    """Multi-head attention of the picture's positions to one another (diffusers' ``attn1``)."""

    def __init__(self, channels: int, n_heads: int, ops: Ops) -> None:
        super().__init__()
        self.n_heads, self.ops = n_heads, ops
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](self.ops.attention(self.to_q(x), self.to_k(x), self.to_v(x), self.n_heads))


class CrossAttention(nn.Module):
    """Multi-head attention of the picture to the text (``attn2``), over keys and values projected once a prompt."""

    def __init__(self, channels: int, text_width: int, n_heads: int, ops: Ops) -> None:
        super().__init__()
        self.n_heads, self.ops = n_heads, ops
        self.layer = -1  # position among the UNet's cross-attention layers in forward order
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(text_width, channels, bias=False)
        self.to_v = nn.Linear(text_width, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, condition: Conditioning) -> Tensor:
        keys, values = condition.text[self.layer]
        return self.to_out[0](self.ops.attention(self.to_q(x), keys, values, self.n_heads))

    def with_columns(self, x: Tensor, condition: Conditioning, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the map's columns (B, N, T*H) at ``tokens`` (B, T)."""
        keys, values = condition.text[self.layer]
        attended, columns = self.ops.cross_attention(self.to_q(x), keys, values, tokens, self.n_heads)
        out = self.to_out[0](attended)
        if condition.observe is not None:
            condition.observe(self.layer, out, columns)
        return out, columns


class GEGLU(nn.Module):
    def __init__(self, channels: int, inner: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.geglu(self.proj(x))


class FeedForward(nn.Module):
    """``net.1`` is diffusers' dropout, kept for its place in the names."""

    def __init__(self, channels: int, ops: Ops) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels, ops), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    def __init__(self, channels: int, text_width: int, n_heads: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = SelfAttention(channels, n_heads, ops)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = CrossAttention(channels, text_width, n_heads, ops)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels, ops)

    def forward(self, x: Tensor, condition: Conditioning) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        if condition.following is None:
            x = x + self.attn2(self.norm2(x), condition)
        else:
            x = self._follow(x, condition, condition.following)
        return x + self.ff(self.norm3(x))

    def _follow(self, x: Tensor, condition: Conditioning, following: Following) -> Tensor:
        n_followers = len(following.leaders)
        own, followers = x.split([len(x) - n_followers, n_followers])
        if len(own):
            out, columns = self.attn2.with_columns(self.norm2(own), condition, following.tokens)
            own = own + out
        else:
            out, columns = following.foundation[self.attn2.layer]
        if not n_followers:
            return own
        residuals = following.residuals[self.attn2.layer]
        followers = self.ops.residual_apply(followers, out, columns, following.leaders, residuals)
        return torch.cat([own, followers])


class Transformer2DModel(nn.Module):
    """Transformer blocks over the positions of a feature map, between two 1x1 convolutions."""

    def __init__(self, channels: int, n_heads: int, config: UNetConfig, ops: Ops) -> None:
        super().__init__()
        self.norm = GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        blocks = [
            BasicTransformerBlock(channels, config.cross_attention_dim, n_heads, ops)
            for _ in range(config.transformer_layers)
        ]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, condition: Conditioning) -> Tensor:
        B, C, height, width = x.shape
        tokens = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).reshape(B, height * width, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, condition)
        return x + self.proj_out(tokens.reshape(B, height, width, C).permute(0, 3, 1, 2))


class UNetResnet(ResnetBlock2D):
    """A resnet that takes its shift from the conditioning."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig, ops: Ops) -> None:
        super().__init__(in_channels, out_channels, config.norm_num_groups, config.norm_eps, ops)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], out_channels)
        self.layer = -1  # position among the UNet's resnets in forward order

    def forward(self, x: Tensor, condition: Conditioning) -> Tensor:
        return super().forward(x, condition.shifts[self.layer])


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
        self.downsamplers = None if last else nn.ModuleList([Downsample2D(out, padding=1)])

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
        self.upsamplers = None if last else nn.ModuleList([Upsample2D(out)])

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


class UNet2DConditionModel(nn.Module):
    """Predicts the noise in latents, given timesteps and text. Weights are immutable; see ``Conditioning``."""

    def __init__(self, config: UNetConfig, ops: Ops = TORCH) -> None:
        super().__init__()
        self.config = config
        widths, heads, attention = config.block_out_channels, config.n_heads, config.down_has_attention
        n = len(widths)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])

        skips, x = [widths[0]], widths[0]  # channels of the skip connections, and of the running feature map
        self.down_blocks = nn.ModuleList()
        for i in range(n):
            last = i == n - 1
            channels = [x] + [widths[i]] * (config.layers_per_block - 1)
            self.down_blocks.append(DownBlock2D(channels, widths[i], heads[i], attention[i], last, config, ops))
            x = widths[i]
            skips += [x] * (config.layers_per_block + (not last))
        self.mid_block = UNetMidBlock2DCrossAttn(x, heads[-1], config, ops)
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(n)):
            channels = []
            for _ in range(config.layers_per_block + 1):
                channels.append(x + skips.pop())
                x = widths[i]
            self.up_blocks.append(UpBlock2D(channels, x, heads[i], attention[i], i == 0, config, ops))

        self.conv_norm_out = GroupNormSiLU(config.norm_num_groups, widths[0], config.norm_eps, ops)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        for i, resnet in enumerate(self.resnets):
            resnet.layer = i
        for i, attn2 in enumerate(self.cross_attentions.values()):
            attn2.layer = i

    @property
    def _stages(self) -> list[nn.Module]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    @property
    def resnets(self) -> list[UNetResnet]:
        """The resnets in forward order."""
        return [module for stage in self._stages for module in stage.modules() if isinstance(module, UNetResnet)]

    @property
    def cross_attentions(self) -> dict[str, CrossAttention]:
        """The cross-attention layers in forward order, by the names that concepts use ("...attn2")."""
        names = {module: name for name, module in self.named_modules() if isinstance(module, CrossAttention)}
        ordered = [m for stage in self._stages for m in stage.modules() if isinstance(m, CrossAttention)]
        return {names[module]: module for module in ordered}

    def time_shifts(self, timesteps: Tensor) -> tuple[Tensor, ...]:
        """Per resnet, the time embedding's shift (T, C) for timesteps (T,), in the weights' dtype."""
        embedding = timestep_embedding(timesteps, self.config.block_out_channels[0])
        hidden = F.silu(self.time_embedding(embedding.to(self.conv_in.weight.dtype)))
        return tuple(resnet.time_emb_proj(hidden) for resnet in self.resnets)

    def text_kv(self, context: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Per cross-attention layer, keys and values (B, S, C) of the encoded text ``context`` (B, S, E)."""
        context = context.to(self.conv_in.weight.dtype)
        return tuple((attn2.to_k(context), attn2.to_v(context)) for attn2 in self.cross_attentions.values())

    def denoise(self, sample: Tensor, condition: Conditioning) -> Tensor:
        """Noise prediction (B, 4, h, w) for latents ``sample`` of the weights' dtype."""
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], condition)
        x = self.mid_block(skips[-1], condition)
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
        condition = Conditioning(self.time_shifts(timesteps), self.text_kv(context))
        return self.denoise(sample.to(self.conv_in.weight.dtype), condition)


def _no_attention(x: Tensor, _condition: Conditioning) -> Tensor:
    return x
