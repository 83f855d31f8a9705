"""Transformer blocks of the UNet: self-attention, cross-attention to the text, GEGLU feed-forward."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..backends.ops import Ops
from ..kernels.dbim import dbim_masks_ref
from .conditioning import Conditioning, Following
from .config import UNetConfig
from .layers import GroupNorm, PointwiseConv2d


class SelfAttention(nn.Module):
    """Multi-head attention of the picture's positions to one another (diffusers' ``attn1``).

    ``to_q``, ``to_k`` and ``to_v`` are one weight; state dicts have the three.
    """

    def __init__(self, channels: int, n_heads: int, ops: Ops) -> None:
        super().__init__()
        self.n_heads, self.ops = n_heads, ops
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.register_load_state_dict_pre_hook(_pack_qkv)
        self.register_state_dict_post_hook(_unpack_qkv)

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """``x`` (B, N, C) plus the attention of ``norm(x)``."""
        if (small := self.ops.small_for(*x.shape[1:])) is not None:
            of_norm, to_out = (norm.weight, norm.bias), _map(self.to_out[0])
            return small.self_attention(x, of_norm, norm.eps, self.to_qkv.weight, to_out, self.n_heads)
        qkv = self.ops.layer_norm_linear(x, norm.weight, norm.bias, norm.eps, self.to_qkv.weight)
        q, k, v = qkv.chunk(3, dim=-1)
        attended = self.ops.attention(q, k, v, self.n_heads)
        return self.ops.linear_add(attended, self.to_out[0].weight, self.to_out[0].bias, x)


def _map(linear: nn.Module) -> tuple[Tensor, Tensor]:
    """A linear layer's weight and bias."""
    layer = cast(nn.Linear, linear)
    return layer.weight, layer.bias


def _pack_qkv(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    parts = [f"{prefix}to_{name}.weight" for name in "qkv"]
    if all(part in state for part in parts):
        state[f"{prefix}to_qkv.weight"] = torch.cat([state.pop(part) for part in parts])


def _unpack_qkv(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    packed = state.pop(f"{prefix}to_qkv.weight").chunk(3)
    state.update({f"{prefix}to_{name}.weight": part for name, part in zip("qkv", packed, strict=True)})


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

    def forward(self, x: Tensor, norm: nn.LayerNorm, condition: Conditioning) -> Tensor:
        """``x`` (B, N, C) plus the attention of ``norm(x)``."""
        keys, values = condition.batch.text[self.layer]
        n_plain, small = self._n_plain(len(x), condition), self.ops.small_for(*x.shape[1:])
        is_plain = n_plain == len(x) and condition.batch.images is None
        if is_plain and small is not None:
            of_norm, to_out = (norm.weight, norm.bias), _map(self.to_out[0])
            return small.cross_attention(x, keys, values, of_norm, norm.eps, self.to_q.weight, to_out, self.n_heads)
        queries = self._queries(x, norm)
        parts = []
        if n_plain:
            parts.append(self.ops.attention(queries[:n_plain], keys[:n_plain], values[:n_plain], self.n_heads))
        if n_plain < len(x):
            parts.append(self._mix(queries[n_plain:], keys[n_plain:], values[n_plain:], condition))
        attended = self._with_images(parts[0] if len(parts) == 1 else torch.cat(parts), queries, condition)
        return self.ops.linear_add(attended, self.to_out[0].weight, self.to_out[0].bias, x)

    def _queries(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return self.ops.layer_norm_linear(x, norm.weight, norm.bias, norm.eps, self.to_q.weight)

    def with_columns(
        self, x: Tensor, norm: nn.LayerNorm, condition: Conditioning, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The attention of ``norm(x)`` alone, and the map's columns (B, N, T*H) at ``tokens`` (B, T)."""
        keys, values = condition.batch.text[self.layer]
        queries = self._queries(x, norm)
        attended, columns = self.ops.cross_attention(queries, keys, values, tokens, self.n_heads)
        n_plain = self._n_plain(len(x), condition)
        if n_plain < len(x):
            mixed = self._mix(queries[n_plain:], keys[n_plain:], values[n_plain:], condition)
            attended = torch.cat([attended[:n_plain], mixed])
        out = self.to_out[0](self._with_images(attended, queries, condition))
        if condition.observe is not None:
            condition.observe(self.layer, out, columns)
        return out, columns

    def _with_images(self, attended: Tensor, queries: Tensor, condition: Conditioning) -> Tensor:
        """Attention to the text (O, N, C), plus that to image prompts (arXiv:2308.06721, section 3.2.2).

        Where rows mix, each adds its own after the mix: masks say where words act, and both branches see one picture.
        """
        images = condition.batch.images
        for keys, values in () if images is None else zip(*images[self.layer], strict=True):
            attended = attended + self.ops.attention(queries, keys, values, self.n_heads)
        return attended

    def _n_plain(self, n_rows: int, condition: Conditioning) -> int:
        """How many of the map-owning rows, the first ones, do not mix in this layer."""
        mixing = condition.batch.mixing
        return n_rows if mixing is None or self.layer not in mixing.layers else n_rows - len(mixing.lengths)

    def _mix(self, queries: Tensor, keys: Tensor, values: Tensor, condition: Conditioning) -> Tensor:
        """Attention of M concept rows and their M auxiliary rows, the former mixed with the latter."""
        mixing = condition.batch.mixing
        assert mixing is not None
        if mixing.masked:
            if condition.observe_masks is not None:
                masks = dbim_masks_ref(
                    queries, keys, mixing.chosen, mixing.lengths, mixing.gates, self.n_heads, mixing.logits
                )
                space_scale = mixing.gates[:, 2].repeat(2)[:, None, None]
                condition.observe_masks(self.layer, (space_scale * masks.float()).softmax(dim=-1))
            return self.ops.dbim(
                queries, keys, values, mixing.chosen, mixing.lengths, mixing.gates, self.n_heads, mixing.logits
            )
        concept, auxiliary = self.ops.attention(queries, keys, values, self.n_heads).chunk(2)
        return torch.cat([concept + auxiliary, auxiliary])


class GEGLU(nn.Module):
    """Holds the projection's weights; ``FeedForward`` applies them."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)


class FeedForward(nn.Module):
    """``net.1`` is diffusers' dropout, kept for its place in the names."""

    def __init__(self, channels: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def hidden(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """The gated hidden rows (B, N, 4C) of ``norm(x)``."""
        proj = cast(GEGLU, self.net[0]).proj
        return self.ops.layer_norm_geglu(x, norm.weight, norm.bias, norm.eps, proj.weight, proj.bias)

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """``x`` (B, N, C) plus the feed-forward of ``norm(x)``."""
        if (small := self.ops.small_for(*x.shape[1:])) is not None:
            maps = _map(cast(GEGLU, self.net[0]).proj), _map(self.net[2])
            return small.feed_forward(x, (norm.weight, norm.bias), norm.eps, *maps)
        return self.ops.linear_add(self.hidden(x, norm), self.net[2].weight, self.net[2].bias, x)


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
        return self.ff(self.attend(x, condition), self.norm3)

    def attend(self, x: Tensor, condition: Conditioning) -> Tensor:
        """Both attentions, without the feed-forward."""
        x = condition.to_rows(self.attn1(x, self.norm1))
        if condition.batch.following is None:
            return self.attn2(x, self.norm2, condition)
        return self._follow(x, condition, condition.batch.following)

    def _follow(self, x: Tensor, condition: Conditioning, following: Following) -> Tensor:
        n_followers = len(following.leaders)
        own, followers = x.split([len(x) - n_followers, n_followers])
        if len(own):
            out, columns = self.attn2.with_columns(own, self.norm2, condition, following.tokens)
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
        self.ops = ops
        self.norm = GroupNorm(config.norm_num_groups, channels, 1e-6, ops)
        self.proj_in = PointwiseConv2d(channels, channels)
        blocks = [
            BasicTransformerBlock(channels, config.cross_attention_dim, n_heads, ops)
            for _ in range(config.transformer_layers)
        ]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = PointwiseConv2d(channels, channels)
        self._composed: tuple[Tensor, Tensor] | None = None

    @property
    def _blocks(self) -> list[BasicTransformerBlock]:
        return cast(list[BasicTransformerBlock], list(self.transformer_blocks))

    @property
    def composed(self) -> bool:
        return self._composed is not None

    def compose(self) -> None:
        """Make the last feed-forward's output projection and ``proj_out`` one product, from their weights as they are.

        With hidden rows g and the stream t: ``W_po (t + W_2 g + b_2) + b_po = [W_po W_2 | W_po] [g ; t] + b``.
        """
        second, out = cast(nn.Linear, self._blocks[-1].ff.net[2]), self.proj_out
        projection, inner, bias = (x.float() for x in (out.weight[:, :, 0, 0], second.weight, second.bias))
        composed = (projection @ inner, projection @ bias + out.bias.float())
        self._composed = (composed[0].to(out.weight.dtype), composed[1].to(out.bias.dtype))

    def forward(self, x: Tensor, condition: Conditioning) -> Tensor:
        B, C, height, width = x.shape
        small = self.ops.small_for(height * width, C)
        if small is None:
            projected = self.proj_in(self.norm(x).permute(0, 2, 3, 1))
        else:
            norm, groups, eps = (self.norm.weight, self.norm.bias), self.norm.num_groups, self.norm.eps
            picture = small.convolution(x, self.proj_in.weight, self.proj_in.bias, norm=norm, groups=groups, eps=eps)
            projected = picture.permute(0, 2, 3, 1)
        tokens = projected.reshape(B, height * width, C)
        *blocks, last = self._blocks
        for block in blocks:
            tokens = block(tokens, condition)
        tokens = last.attend(tokens, condition)
        if small is not None:
            picture = last.ff(tokens, last.norm3).unflatten(1, (height, width)).permute(0, 3, 1, 2)
            return small.convolution(picture, self.proj_out.weight, self.proj_out.bias, residual=condition.to_rows(x))
        residual = condition.to_rows(x).permute(0, 2, 3, 1).reshape(tokens.shape)
        if self._composed is None:
            out = residual + self.proj_out(last.ff(tokens, last.norm3))
        else:
            (inner, bias), outer = self._composed, self.proj_out.weight[:, :, 0, 0]
            out = self.ops.linear_add(last.ff.hidden(tokens, last.norm3), inner, bias, residual, tokens, outer)
        return out.unflatten(1, (height, width)).permute(0, 3, 1, 2)
