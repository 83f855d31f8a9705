"""Features of pictures to tokens (IP-Adapter, Ye et al. 2023, arXiv:2308.06721), with diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.attention import attention_ref

_HEAD_DIM = 64  # of every resampler; a file does not tell it


class ImageProjection(nn.Module):
    """One linear map from a picture's embedding to S tokens, each normalised (section 3.2.1)."""

    def __init__(self, embed_dim: int, text_width: int, n_tokens: int) -> None:
        super().__init__()
        self.n_tokens, self.in_features, self.out_features = n_tokens, embed_dim, text_width
        self.image_embeds = nn.Linear(embed_dim, n_tokens * text_width)
        self.norm = nn.LayerNorm(text_width)

    def forward(self, embedding: Tensor) -> Tensor:
        """(B, embed_dim) to (B, S, E)."""
        return self.norm(self.image_embeds(embedding).unflatten(1, (self.n_tokens, -1)))


class ResamplerAttention(nn.Module):
    """Attention of the queries to the picture's features and to themselves."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.n_heads = inner // _HEAD_DIM
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels, bias=False)])

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """(B, S, C) queries and (B, n, C) features to (B, S, C)."""
        seen = torch.cat([features, queries], dim=1)
        attended = attention_ref(self.to_q(queries), self.to_k(seen), self.to_v(seen), self.n_heads)
        return self.to_out[0](attended)


class GELU(nn.Module):
    """A linear map and the exact GELU."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class ResamplerFeedForward(nn.Module):
    """``net.1`` is diffusers' dropout, kept for its place in the names."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GELU(channels, inner), nn.Identity(), nn.Linear(inner, channels, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ResamplerBlock(nn.Module):
    def __init__(self, channels: int, inner: int, ff_inner: int) -> None:
        super().__init__()
        self.ln0, self.ln1 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = ResamplerAttention(channels, inner)
        self.ff = nn.Sequential(nn.LayerNorm(channels), ResamplerFeedForward(channels, ff_inner))

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        queries = queries + self.attn(self.ln1(queries), self.ln0(features))
        return queries + self.ff(queries)


class IPAdapterPlusImageProjection(nn.Module):
    """S learned queries that read all features of a picture (the perceiver resampler of IP-Adapter Plus)."""

    def __init__(
        self, n_tokens: int, channels: int, embed_dim: int, text_width: int, inner: int, ff_inner: int, depth: int
    ) -> None:
        super().__init__()
        self.n_tokens, self.in_features, self.out_features = n_tokens, embed_dim, text_width
        self.latents = nn.Parameter(torch.empty(1, n_tokens, channels))
        self.proj_in = nn.Linear(embed_dim, channels)
        self.proj_out = nn.Linear(channels, text_width)
        self.norm_out = nn.LayerNorm(text_width)
        self.layers = nn.ModuleList([ResamplerBlock(channels, inner, ff_inner) for _ in range(depth)])

    def forward(self, features: Tensor) -> Tensor:
        """(B, n, embed_dim) to (B, S, E)."""
        features = self.proj_in(features)
        queries = self.latents.expand(len(features), -1, -1)
        for block in self.layers:
            queries = block(queries, features)
        return self.norm_out(self.proj_out(queries))


def make_projection(shapes: Mapping[str, tuple[int, ...]]) -> ImageProjection | IPAdapterPlusImageProjection:
    """The projection whose parameters, by diffusers' names, have these shapes; without weights where on ``meta``.

    Raises:
        ValueError: there is none; the message names what does not fit.
        KeyError: a parameter that tells a size is missing.
    """
    if "image_embeds.weight" in shapes:
        (rows, embed_dim), (text_width,) = shapes["image_embeds.weight"], shapes["norm.weight"]
        if rows % text_width:
            raise ValueError(f"image_embeds.weight must have a multiple of {text_width} rows, got {rows}")
        return ImageProjection(embed_dim, text_width, rows // text_width)
    (_, n_tokens, channels), (text_width, _) = shapes["latents"], shapes["proj_out.weight"]
    inner = shapes["layers.0.attn.to_q.weight"][0]
    if inner % _HEAD_DIM:
        raise ValueError(f"layers.0.attn.to_q.weight must have heads of {_HEAD_DIM}, got {inner} rows")
    return IPAdapterPlusImageProjection(
        n_tokens=n_tokens,
        channels=channels,
        embed_dim=shapes["proj_in.weight"][1],
        text_width=text_width,
        inner=inner,
        ff_inner=shapes["layers.0.ff.1.net.0.proj.weight"][0],
        depth=len({name.split(".")[1] for name in shapes if name.startswith("layers.")}),
    )
