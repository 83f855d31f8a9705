"""Whole blocks of small models by one call of ``csrc/blocks.h``.

A step of the embedded model is some 240 operations of a few dozen microseconds, of which a good part is the calls
themselves. Where channels and positions are few, a block is one call, and its weights are packed once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from .packed_weights import PackedWeights

_MAX_CHANNELS = 256  # packed weights are a second copy, which is to stay in a cache
_MAX_POSITIONS = 1024
_FILTERED_POSITIONS = 64  # of a picture, for which reading four times the weights still costs less than the products
_FILTER_POINTS = 36
_SIGNATURES: dict[str, tuple[type, ...]] = {  # the first argument says whether tensors are bfloat16
    "packed_bytes": (c_int, c_int64, c_int64),
    "pack": (c_int, c_void_p, c_void_p, c_int64, c_int64),
    "pack_filtered": (c_void_p, c_void_p, c_int64, c_int64),
    "resnet": (c_int, c_void_p),
    "convolve": (c_int, c_void_p),
    "attend": (c_int, c_void_p),
    "feed_forward": (c_int, c_void_p),
}

Norm = tuple[Tensor, Tensor]  # weight and bias
Map = tuple[Tensor, Tensor | None]


class _Pointers(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


def _fields(pointers: str, norms: str, maps: str, sizes: str) -> list[tuple[str, Any]]:
    return [
        *((name, c_void_p) for name in pointers.split()),
        *((name, _Pointers) for name in f"{norms} {maps}".split()),
        *((name, c_int64) for name in sizes.split()),
        ("eps", c_float),
    ]


class _ResnetBlock(ctypes.Structure):
    _fields_ = _fields(
        "x shift out", "norm1 norm2", "conv1 conv2 shortcut", "B H W C O groups shift_row is_filtered threads"
    )


class _Convolution(ctypes.Structure):
    _fields_ = _fields(
        "x residual out",
        "norm",
        "map",
        "B H W C height width stride O groups is_pointwise with_silu is_filtered threads",
    )


class _AttentionBlock(ctypes.Structure):
    _fields_ = _fields("x keys values out", "norm", "into to_out", "B N S H D threads")


class _FeedForwardBlock(ctypes.Structure):
    _fields_ = _fields("x out", "norm", "into to_out", "M C threads")


class SmallBlocks:
    """The blocks of a native library. Tensors are of one dtype, float32 or bfloat16; pictures are channels-last.

    Args:
        library: whose functions for blocks it declares.
        check: raises ``ValueError`` unless tensors are contiguous and of one dtype, and says whether it is bfloat16.
    """

    def __init__(self, library: ctypes.CDLL, check: Callable[..., bool]) -> None:
        self.library, self.check = library, check
        for name, types in _SIGNATURES.items():
            function = getattr(library, f"twinstream_{name}")
            function.argtypes, function.restype = types, c_int64 if name == "packed_bytes" else None
        self._packed = PackedWeights()

    limits = f"up to {_MAX_CHANNELS} channels and {_MAX_POSITIONS} positions a picture"

    @staticmethod
    def fit(positions: int, *channels: int) -> bool:
        """Whether blocks of so many positions of a picture, and channels in and out, are small; whatever the batch."""
        return positions <= _MAX_POSITIONS and all(n <= _MAX_CHANNELS and n % 2 == 0 for n in channels)

    def resnet(
        self,
        x: Tensor,
        shift: Tensor,
        norm1: Norm,
        conv1: Tensor,
        norm2: Norm,
        conv2: Map,
        shortcut: Map | None,
        groups: int,
        eps: float,
    ) -> Tensor:
        """``layers.ResnetBlock2D`` of ``x`` (B, C, h, w) with its ``shift`` (1 or B, O)."""
        (B, C, height, width), n_out = x.shape, len(conv1)
        if shift.shape not in {(1, n_out), (B, n_out)}:
            raise ValueError(f"shift must be (1 or {B}, {n_out}), got {tuple(shift.shape)}")
        is_bfloat16 = self._check(x.permute(0, 2, 3, 1), *norm1, *norm2, shift[0])
        out = x.new_empty(B, height, width, n_out)
        filtered, held = _is_filtered(x, height * width), list[Tensor]()
        block = _ResnetBlock(
            x.data_ptr(),
            shift.data_ptr(),
            out.data_ptr(),
            _pointers(*norm1),
            _pointers(*norm2),
            self._map(held, conv1, None, filtered),
            self._map(held, *conv2, filtered),
            _Pointers() if shortcut is None else self._map(held, *shortcut),
            *(B, height, width, C, n_out, groups),
            shift.stride(0) if len(shift) > 1 else 0,
            filtered,
            torch.get_num_threads(),
            eps,
        )
        self.library.twinstream_resnet(is_bfloat16, ctypes.addressof(block))
        return out.permute(0, 3, 1, 2)

    def convolution(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stride: int = 1,
        size: tuple[int, int] | None = None,
        norm: Norm | None = None,
        groups: int = 1,
        eps: float = 0.0,
        with_silu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """A convolution (O, C, 3, 3) with padding 1, or (O, C, 1, 1), of ``x`` (B, C, h, w).

        Args:
            x: a picture.
            weight, bias: of the convolution.
            stride: of a 3x3 one.
            size: to which a 3x3 one's picture is enlarged, by nearest neighbours.
            norm: of a GroupNorm before, with ``groups`` and ``eps``, and ``silu`` after it.
            residual: added to the result, whose shape it has.
        """
        (B, C, *own), (n_out, _, side, _) = x.shape, weight.shape
        enlarged = size or own
        out_size = [(n - 1) // stride + 1 for n in enlarged]
        rows = () if bias is None else (bias,)
        is_bfloat16 = self._check(x.permute(0, 2, 3, 1), *rows, *(norm or ()))
        out = x.new_empty(B, *out_size, n_out)
        if residual is not None:
            self.check(x.permute(0, 2, 3, 1), residual.permute(0, 2, 3, 1))
            if residual.shape != (B, n_out, *out_size):
                raise ValueError(f"residual must be {(B, n_out, *out_size)}, got {tuple(residual.shape)}")
        filtered, held = side == 3 and stride == 1 and _is_filtered(x, out_size[0] * out_size[1]), list[Tensor]()
        block = _Convolution(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
            _Pointers() if norm is None else _pointers(*norm),
            self._map(held, weight, bias, filtered),
            *(B, *own, C, *enlarged, stride, n_out, groups, side == 1, with_silu, filtered, torch.get_num_threads()),
            eps,
        )
        self.library.twinstream_convolve(is_bfloat16, ctypes.addressof(block))
        return out.permute(0, 3, 1, 2)

    def self_attention(self, x: Tensor, norm: Norm, eps: float, qkv: Tensor, to_out: Map, n_heads: int) -> Tensor:
        """``transformer.SelfAttention`` of ``x`` (B, N, C)."""
        return self._attend(x, (None, None), x.shape[1], norm, eps, qkv, to_out, n_heads)

    def cross_attention(
        self, x: Tensor, keys: Tensor, values: Tensor, norm: Norm, eps: float, to_q: Tensor, to_out: Map, n_heads: int
    ) -> Tensor:
        """``transformer.CrossAttention`` of ``x`` (B, N, C) to ``keys`` and ``values`` (B, S, C)."""
        self.check(x, keys, values)
        if keys.shape != values.shape or keys.shape[::2] != x.shape[::2]:
            rule = f"keys and values must be {(x.shape[0], 'S', x.shape[2])}"
            raise ValueError(f"{rule}, got {tuple(keys.shape)} and {tuple(values.shape)}")
        return self._attend(x, (keys.data_ptr(), values.data_ptr()), keys.shape[1], norm, eps, to_q, to_out, n_heads)

    def _attend(
        self,
        x: Tensor,
        given: tuple[int | None, int | None],
        n_keys: int,
        norm: Norm,
        eps: float,
        into: Tensor,
        to_out: Map,
        n_heads: int,
    ) -> Tensor:
        is_bfloat16 = self._check(x, *norm)
        (B, N, C), out, held = x.shape, torch.empty_like(x), list[Tensor]()
        sizes = (B, N, n_keys, n_heads, C // n_heads, torch.get_num_threads())
        maps = self._map(held, into, None), self._map(held, *to_out)
        block = _AttentionBlock(x.data_ptr(), *given, out.data_ptr(), _pointers(*norm), *maps, *sizes, eps)
        self.library.twinstream_attend(is_bfloat16, ctypes.addressof(block))
        return out

    def feed_forward(self, x: Tensor, norm: Norm, eps: float, into: Map, to_out: Map) -> Tensor:
        """``transformer.FeedForward`` of ``x`` (B, N, C)."""
        is_bfloat16, out, C = self._check(x, *norm), torch.empty_like(x), x.shape[-1]
        held = list[Tensor]()
        sizes = (x.numel() // C, C, torch.get_num_threads())
        maps = self._map(held, *into), self._map(held, *to_out)
        block = _FeedForwardBlock(x.data_ptr(), out.data_ptr(), _pointers(*norm), *maps, *sizes, eps)
        self.library.twinstream_feed_forward(is_bfloat16, ctypes.addressof(block))
        return out

    def _check(self, x: Tensor, *rows: Tensor) -> bool:
        """``check`` of activations; of weights (C,) what can be asked in no time."""
        for row in rows:
            if row.dtype != x.dtype or row.stride(0) != 1:
                rule = f"norms, biases and shifts must be {x.dtype} like what they act upon, and contiguous"
                raise ValueError(f"{rule}, got {row.dtype}, strides {row.stride()}")
        return self.check(x)

    def _map(self, held: list[Tensor], weight: Tensor, bias: Tensor | None, filtered: bool = False) -> _Pointers:
        """Where a packed weight is, which ``held`` keeps alive."""
        packed = self._packed(weight, lambda: self._pack(weight, filtered), filtered)
        held.append(packed)
        return _Pointers(packed.data_ptr(), None if bias is None else bias.data_ptr())

    def _pack(self, weight: Tensor, filtered: bool) -> Tensor:
        """A linear weight (O, C), or a convolution's (O, C, 3, 3) as (O, 3, 3, C), in panels; or transformed."""
        rows = (weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight).contiguous()
        is_bfloat16, n_out = self.check(rows), len(rows)
        sizes = weight.shape[:2] if filtered else (n_out, rows.numel() // n_out)
        n_bytes = self.library.twinstream_packed_bytes(is_bfloat16, *sizes) * (_FILTER_POINTS if filtered else 1)
        packed = torch.empty(n_bytes, dtype=torch.uint8)
        if filtered:
            self.library.twinstream_pack_filtered(rows.data_ptr(), packed.data_ptr(), *sizes)
        else:
            self.library.twinstream_pack(is_bfloat16, rows.data_ptr(), packed.data_ptr(), *sizes)
        return packed


def _is_filtered(x: Tensor, positions: int) -> bool:
    """Whether 3x3 convolutions of stride 1 go by minimal filtering."""
    return x.dtype == torch.float32 and positions >= _FILTERED_POSITIONS


def _pointers(weight: Tensor, bias: Tensor) -> _Pointers:
    return _Pointers(weight.data_ptr(), bias.data_ptr())
