"""Transformer blocks of the UNet: self-attention, cross-attention to the text, GEGLU feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .conditioning import Conditioning, Following, Mixing
from .config import UNetConfig
from .kernels.dbim import dbim_masks_ref
from .layers import GroupNorm, LayerNorm
from .ops import Ops


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
        queries = self.to_q(x)
        mixing = condition.mixing
        if mixing is None or self.layer not in mixing.layers:
            return self.to_out[0](self.ops.attention(queries, keys, values, self.n_heads))
        n_plain = len(x) - len(mixing.lengths)
        attended = [self._mix(queries[n_plain:], keys[n_plain:], values[n_plain:], mixing, condition)]
        if n_plain:
            attended.insert(0, self.ops.attention(queries[:n_plain], keys[:n_plain], values[:n_plain], self.n_heads))
        return self.to_out[0](torch.cat(attended))

    def with_columns(self, x: Tensor, condition: Conditioning, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the map's columns (B, N, T*H) at ``tokens`` (B, T)."""
        keys, values = condition.text[self.layer]
        queries = self.to_q(x)
        attended, columns = self.ops.cross_attention(queries, keys, values, tokens, self.n_heads)
        mixing = condition.mixing
        if mixing is not None and self.layer in mixing.layers:
            n_plain = len(x) - len(mixing.lengths)
            mixed = self._mix(queries[n_plain:], keys[n_plain:], values[n_plain:], mixing, condition)
            attended = torch.cat([attended[:n_plain], mixed])
        out = self.to_out[0](attended)
        if condition.observe is not None:
            condition.observe(self.layer, out, columns)
        return out, columns

    def _mix(self, queries: Tensor, keys: Tensor, values: Tensor, mixing: Mixing, condition: Conditioning) -> Tensor:
        """Attention of M concept rows and their M auxiliary rows, the former mixed with the latter."""
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
        self.norm1 = LayerNorm(channels, ops)
        self.attn1 = SelfAttention(channels, n_heads, ops)
        self.norm2 = LayerNorm(channels, ops)
        self.attn2 = CrossAttention(channels, text_width, n_heads, ops)
        self.norm3 = LayerNorm(channels, ops)
        self.ff = FeedForward(channels, ops)

    def forward(self, x: Tensor, condition: Conditioning) -> Tensor:
        x = condition.to_rows(x + self.attn1(self.norm1(x)))
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
        self.norm = GroupNorm(config.norm_num_groups, channels, 1e-6, ops)
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
        return condition.to_rows(x) + self.proj_out(tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2))
