"""Native CPU kernels (``csrc/``) for float32 and bfloat16, one library per instruction set.

Those that look into a map hold a row of it at once, of 384 keys with AVX-512, 192 with AVX2, 96 without; texts of more
chunks than that have their columns from torch's attention, and DCI's mix from the eager reference.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.cross_attention import cross_attention_sdpa
from ..kernels.dbim import dbim_ref
from .ops import Ops
from .packed_weights import PackedConvolution, PackedLinear
from .small_blocks import SmallBlocks

LEVELS = ("baseline", "avx2", "avx512", "amx")
DTYPES = (torch.float32, torch.bfloat16)

_FOLDER = Path(__file__).parent
_ABI = 5
_MAX_HEAD_DIM = 512
_GATED_ROWS = 1024
_SIGNATURES: dict[str, tuple[type, ...]] = {  # the first argument says whether tensors are bfloat16
    "attention": (c_int, *[c_void_p] * 8, c_int64),
    "dbim": (c_int, *[c_void_p] * 10, c_int),
    "residual_apply": (c_int, *[c_void_p] * 6, *[c_int64] * 4),
    "residual_add": (c_int, *[c_void_p] * 4, *[c_int64] * 2),
    "group_norm": (c_int, *[c_void_p] * 5, *[c_int64] * 5, c_float, c_int),
    "layer_norm": (c_int, *[c_void_p] * 4, *[c_int64] * 2, c_float),
    "geglu": (c_int, *[c_void_p] * 2, *[c_int64] * 2),
}


class _AttentionSizes(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("B", "N", "S", "H", "D", "q_row", "k_row", "v_row"))


class _ConvolutionSizes(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("B", "H", "W", "C", "O"))


@cache
def levels() -> tuple[str, ...]:
    """Those of ``LEVELS`` that are built and that this processor runs, the best one last; none without a build."""
    built = [level for level in LEVELS if _path(level).exists()]
    if "baseline" not in built:
        return ()
    runs = LEVELS[: _open("baseline").twinstream_level() + 1]
    return tuple(level for level in built if level in runs)


def native_ops(level: str | None = None) -> Ops:
    """The ops on ``native_kernels(level)``; they have no gradients."""
    kernels = native_kernels(level)
    return Ops(
        name="native",
        attention=kernels.attention,
        cross_attention=kernels.cross_attention,
        residual_apply=kernels.residual_apply,
        dbim=kernels.dbim,
        group_norm=kernels.group_norm,
        group_norm_silu=kernels.group_norm_silu,
        conv3x3=kernels.conv3x3,
        residual_add=kernels.residual_add,
        layer_norm_linear=kernels.layer_norm_linear,
        layer_norm_geglu=kernels.layer_norm_geglu,
        linear_add=kernels.linear_add,
        small=kernels.small,
    )


@cache
def native_kernels(level: str | None = None) -> Kernels:
    """The kernels of one of ``levels()``, the best unless given.

    Raises:
        RuntimeError: native kernels are not built, or this processor does not run them.
    """
    if not levels():
        raise RuntimeError("native kernels are not built; with a C++20 compiler there, run: pip install -e .")
    if level is not None and level not in levels():
        raise RuntimeError(f"native kernels are {', '.join(levels())} here, got {level!r}")
    return Kernels(_open(level or levels()[-1]))


def _path(level: str) -> Path:
    return _FOLDER / f"_native_{level}.so"


@cache
def _open(level: str) -> ctypes.CDLL:
    """A library, on the OpenMP runtime of torch, so that both share one pool of threads."""
    openmp = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    ctypes.CDLL(str(openmp) if openmp.exists() else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(_path(level)))
    if library.twinstream_abi() != _ABI:
        raise RuntimeError(f"{_path(level)} is of another version; build it again with: pip install -e .")
    library.twinstream_attention_scratch.argtypes = (c_int, c_void_p)
    library.twinstream_attention_scratch.restype = library.twinstream_attention_block.restype = c_int64
    library.twinstream_conv3x3.argtypes, library.twinstream_conv3x3.restype = (*[c_void_p] * 5, c_int64), None
    for name, types in _SIGNATURES.items():
        function = getattr(library, f"twinstream_{name}")
        function.argtypes, function.restype = types, None
    return library


class Kernels:
    """Launchers with the signatures of the eager references in ``kernels/``; tensors must be contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.max_keys = library.twinstream_attention_block()  # of a map's row
        self.linear, self.convolution = PackedLinear(), PackedConvolution()
        self.small = SmallBlocks(library, _check)
        self.no_tokens = torch.empty(0, 0, dtype=torch.int64)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
        return self._attend(q, k, v, self.no_tokens, n_heads)[0]

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
        if k.shape[1] > self.max_keys:
            return cross_attention_sdpa(q, k, v, tokens, n_heads)
        return self._attend(q, k, v, _typed(tokens, torch.int64), n_heads)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
        is_bfloat16, rows = _check_rows(q, k, v)
        sizes, scratch = self._prepare(q, k, n_heads, rows, is_bfloat16)
        n_tokens = tokens.shape[1]
        out, columns = q.new_empty(q.shape), q.new_empty(*q.shape[:2], n_tokens * n_heads)
        pointers = (tensor.data_ptr() for tensor in (q, k, v, tokens, out, columns, scratch))
        self.library.twinstream_attention(is_bfloat16, *pointers, ctypes.addressof(sizes), n_tokens)
        return out, columns

    def dbim(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chosen: Tensor,
        lengths: Tensor,
        gates: Tensor,
        n_heads: int,
        logits: bool,
    ) -> Tensor:
        if k.shape[1] > self.max_keys:
            return dbim_ref(q, k, v, chosen, lengths, gates, n_heads, logits)
        is_bfloat16, rows = _check_rows(q, k, v)
        sizes, scratch = self._prepare(q, k, n_heads, rows, is_bfloat16)
        out, masks = q.new_empty(q.shape), q.new_empty(q.shape[0], n_heads, q.shape[1], dtype=torch.float32)
        small = (_typed(chosen, torch.bool), _typed(lengths, torch.int64), _typed(gates, torch.float32))
        tensors = (q, k, v, *small, out, masks, scratch)
        pointers = (tensor.data_ptr() for tensor in tensors)
        self.library.twinstream_dbim(is_bfloat16, *pointers, ctypes.addressof(sizes), logits)
        return out

    def residual_apply(self, x: Tensor, out: Tensor, columns: Tensor, leaders: Tensor, residuals: Tensor) -> Tensor:
        is_bfloat16 = _check(x, out, columns, residuals)
        y, (F, N, C), K = torch.empty_like(x), x.shape, columns.shape[2]
        tensors = (x, out, columns, _typed(leaders, torch.int64), residuals, y)  # alive until the kernel is done
        pointers = (tensor.data_ptr() for tensor in tensors)
        self.library.twinstream_residual_apply(is_bfloat16, *pointers, F, N, K, C)
        return y

    def conv3x3(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """By minimal filtering in float32, where that is faster."""
        if x.dtype == torch.float32 and is_filtering_faster(*x.shape[1:], len(weight)):
            return self.filtered_conv3x3(x, weight, bias)
        return self.convolution(x, weight, bias, (1, 1), (1, 1))

    def filtered_conv3x3(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """In float32; ``weight`` must be channels-last, and so is the result."""
        (B, C, height, width), n_out = x.shape, len(weight)
        x = x.contiguous(memory_format=torch.channels_last)
        if _check(x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1), *([] if bias is None else [bias])):
            raise ValueError(f"minimal filtering takes float32, got {x.dtype}")
        if weight.shape != (n_out, C, 3, 3):
            raise ValueError(f"weight must be (O, {C}, 3, 3), got {tuple(weight.shape)}")
        y = x.new_empty(B, height, width, n_out)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in (x, weight, bias, y))
        sizes = _ConvolutionSizes(B, height, width, C, n_out)
        self.library.twinstream_conv3x3(*pointers, ctypes.addressof(sizes), torch.get_num_threads())
        return y.permute(0, 3, 1, 2)

    def residual_add(self, x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
        """Into ``x``; both pictures are channels-last."""
        is_bfloat16 = _check(x.permute(0, 2, 3, 1), residual.permute(0, 2, 3, 1), bias)
        pointers = (tensor.data_ptr() for tensor in (x, residual, bias, x))
        C = x.shape[1]
        self.library.twinstream_residual_add(is_bfloat16, *pointers, x.numel() // C, C)
        return x

    def group_norm(self, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        return self._group_norm(x, None, weight, bias, groups, eps, with_silu=False)

    def group_norm_silu(
        self, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        return self._group_norm(x, shift, weight, bias, groups, eps, with_silu=True)

    def _group_norm(
        self, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, *, with_silu: bool
    ) -> Tensor:
        """The result is channels-last, and so must ``x`` be."""
        B, C, height, width = x.shape
        if not x.is_contiguous(memory_format=torch.channels_last) or C % groups:
            rule = f"x must be channels-last with channels in {groups} groups"
            raise ValueError(f"{rule}, got {tuple(x.shape)}, strides {x.stride()}")
        if shift is not None and (shift.shape not in {(1, C), (B, C)} or shift.stride(1) != 1):
            rule = f"shift must be (1 or {B}, {C}), its channels side by side"
            raise ValueError(f"{rule}, got {tuple(shift.shape)}, strides {shift.stride()}")
        is_bfloat16 = _check(x.permute(0, 2, 3, 1), weight, bias, *([] if shift is None else [shift[0]]))
        y = torch.empty_like(x, memory_format=torch.channels_last)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in (x, shift, weight, bias, y))
        shift_row = shift.stride(0) if shift is not None and len(shift) > 1 else 0
        sizes = (B, height * width, C, groups, shift_row)
        self.library.twinstream_group_norm(is_bfloat16, *pointers, *sizes, eps, with_silu)
        return y

    def layer_norm_linear(
        self, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor
    ) -> Tensor:
        return self.linear(self.layer_norm(x, norm_weight, norm_bias, eps), weight)

    def layer_norm_geglu(
        self, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor
    ) -> Tensor:
        """Some rows at a time: the projection is then read from a cache, and never is so large that it is unmapped."""
        C = x.shape[-1]
        rows = self.layer_norm(x, norm_weight, norm_bias, eps).view(-1, C)
        y = x.new_empty(len(rows), len(weight) // 2)
        for some, out in zip(rows.split(_GATED_ROWS), y.split(_GATED_ROWS), strict=True):
            self.geglu(self.linear(some, weight, bias), out)
        return y.view(*x.shape[:-1], -1)

    def linear_add(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor,
        z: Tensor | None = None,
        z_weight: Tensor | None = None,
    ) -> Tensor:
        y = self.linear(x, weight, bias).add_(residual)
        return y if z is None or z_weight is None else y.add_(self.linear(z, z_weight))

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        is_bfloat16 = _check(x, weight, bias)
        y, C = torch.empty_like(x), x.shape[-1]
        pointers = (tensor.data_ptr() for tensor in (x, weight, bias, y))
        self.library.twinstream_layer_norm(is_bfloat16, *pointers, x.numel() // C, C, eps)
        return y

    def geglu(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Into ``y`` (..., C), where it is given."""
        C = x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], C) if y is None else y
        is_bfloat16 = _check(x, y)
        self.library.twinstream_geglu(is_bfloat16, x.data_ptr(), y.data_ptr(), y.numel() // C, C)
        return y

    def _prepare(
        self, q: Tensor, k: Tensor, n_heads: int, rows: tuple[int, ...], is_bfloat16: bool
    ) -> tuple[_AttentionSizes, Tensor]:
        (B, N, C), S = q.shape, k.shape[1]
        if C // n_heads > _MAX_HEAD_DIM:
            raise ValueError(f"head dims must be at most {_MAX_HEAD_DIM} in native attention, got {C // n_heads}")
        sizes = _AttentionSizes(B, N, S, n_heads, C // n_heads, *rows)
        n_bytes = self.library.twinstream_attention_scratch(is_bfloat16, ctypes.addressof(sizes))
        return sizes, torch.empty(n_bytes, dtype=torch.uint8)


@cache
def is_filtering_faster(C: int, height: int, width: int, n_out: int) -> bool:
    """Whether minimal filtering of rows (C, height, width) takes less time than 9 products a position.

    For two rows, a guided picture's, whatever the batch: then what a row gives does not depend on what else is in it.
    Counted in products for a pair of channels; tiles are worked on by the eight, in strips of 96. Measured (AVX-512):
    a pair's weights are transformed once a strip in the time of 800 products, a tile's channel in that of 1,000.
    """
    tiles = 2 * -(-height // 4) * -(-width // 4)
    products = 36 * 8 * -(-tiles // 8) + 800 * -(-tiles // 96)
    return products + 1000 * tiles * (1 / C + 1 / n_out) < 9 * 2 * height * width


def _check(*tensors: Tensor) -> bool:
    """Whether the tensors are bfloat16; all must be what the kernels take."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(f"native kernels take contiguous tensors, got strides {tensor.stride()}")
    return _is_bfloat16(*tensors)


def _check_rows(*tensors: Tensor) -> tuple[bool, tuple[int, ...]]:
    """The same for tensors (B, N, C) whose rows may be apart, as parts of a wider projection are; and how far."""
    for tensor in tensors:
        if tensor.stride(2) != 1 or (len(tensor) > 1 and tensor.stride(0) != tensor.shape[1] * tensor.stride(1)):
            raise ValueError(f"native attention takes rows that are evenly apart, got strides {tensor.stride()}")
    return _is_bfloat16(*tensors), tuple(tensor.stride(1) for tensor in tensors)


def _is_bfloat16(*tensors: Tensor) -> bool:
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype != dtype or dtype not in DTYPES or tensor.device.type != "cpu":
            rule = "native kernels take float32 or bfloat16 CPU tensors of one dtype"
            raise ValueError(f"{rule}, got {tensor.dtype} on {tensor.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("native kernels have no gradients; load the model with backend='torch'")
    return dtype == torch.bfloat16


def _typed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A small contiguous tensor of this dtype on the CPU."""
    if tensor.dtype != dtype or tensor.device.type != "cpu":
        raise ValueError(f"native kernels take {dtype} on the CPU here, got {tensor.dtype} on {tensor.device}")
    return tensor.contiguous()
