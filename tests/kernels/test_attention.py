"""Self-attention: the kernel in the interpreter (or on a GPU), the operator's registration."""

import pytest
import torch

from engine.kernels.attention import attention, attention_ref, attention_triton, launch_of, tile
from tests.kernels.accuracy import assert_as_accurate

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _inputs(B: int, N: int, S: int, C: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, n, C, device=_DEVICE).to(dtype) for n in (N, S, S)]


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    # blocks of 64 keys, of 32 from 160 channels on: with a rest, without, and nothing but a rest
    [
        *((2, 70, 70, 2, 40), (1, 130, 200, 1, 80), (1, 33, 65, 2, 160), (1, 20, 64, 3, 16), (1, 9, 5, 1, 33)),
        *((1, 40, 128, 1, 40), (1, 17, 128, 1, 160), (1, 16, 300, 1, 160)),
    ],
    ids=str,
)
def test_kernel(shape: tuple[int, ...], dtype: torch.dtype, is_split: bool) -> None:
    B, N, S, H, D = shape
    q, k, v = _inputs(B, N, S, H * D, dtype)
    q = 2 * q
    exact = attention_ref(q.double(), k.double(), v.double(), H)
    assert_as_accurate(attention_triton(q, k, v, H, is_split), attention_ref(q, k, v, H), exact)


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_peaked_logits(dtype: torch.dtype, is_split: bool) -> None:
    """Every block's logits are larger than those before it, or all but the first are far below."""
    q, k, v = _inputs(1, 20, 300, 2 * 160, dtype)
    for growth in (torch.linspace(0.1, 4.0, 300), torch.linspace(4.0, 0.1, 300)):
        scaled = (k * growth.to(k)[None, :, None]).to(dtype)
        exact = attention_ref(4 * q.double(), scaled.double(), v.double(), 2)
        eager = attention_ref(4 * q, scaled, v, 2)
        assert_as_accurate(attention_triton(4 * q, scaled, v, 2, is_split), eager, exact)


def test_keys_are_split_where_programs_are_few() -> None:
    def parts(B: int, N: int, S: int, D: int, is_split: bool = True) -> tuple[int, int, int]:
        q, k = (torch.empty(B, n, 8 * D, dtype=torch.float16, device="meta") for n in (N, S))
        constants, *both = launch_of(q, k, 8, is_split)
        return constants["BLOCK_N"], *both

    assert parts(2, 4096, 4096, 40) == (128, 1, 4096)
    assert parts(2, 256, 256, 160) == (64, 4, 64)
    assert parts(2, 256, 256, 160, is_split=False) == (64, 1, 256)
    assert parts(2, 64, 64, 160) == (64, 2, 32)
    assert parts(1, 64, 300, 160) == (64, 5, 64)  # of ten blocks in at most eight parts, two each
    assert parts(16, 256, 256, 160) == (128, 1, 256)


def test_parts_of_one_projection() -> None:
    (qkv, *_) = _inputs(2, 40, 40, 3 * 80, torch.float32)
    parts = qkv.chunk(3, dim=-1)
    expected = attention_triton(*(x.contiguous() for x in parts), 2)
    assert torch.equal(attention_triton(*parts, 2), expected)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = _inputs(1, 20, 100, 40, torch.float16)
    assert torch.isfinite(attention_triton(100 * q, 100 * k, v, 1)).all()


@pytest.mark.parametrize(("head_dim", "parts"), [(16, (16, 0)), (40, (32, 16)), (80, (64, 16)), (160, (128, 32))])
def test_head_dims_are_padded_little(head_dim: int, parts: tuple[int, int]) -> None:
    constants = tile(head_dim, torch.float16)
    assert (constants["D_LOW"], constants["D_HIGH"]) == parts


def test_bad_inputs_are_refused() -> None:
    q, k, v = _inputs(2, 4, 4, 8, torch.float32)
    with pytest.raises(ValueError, match="channels must be 3 heads of at most 256, got 8"):
        attention_triton(q, k, v, 3)
    with pytest.raises(ValueError, match=r"k must be \(B, N, C\) with rows evenly apart"):
        attention_triton(q, k.transpose(1, 2), v, 1)
    assert attention_triton(q[:0], k[:0], v[:0], 1).shape == (0, 4, 8)


def test_operator() -> None:
    q, k, v = _inputs(2, 6, 5, 8, torch.float32)
    torch.library.opcheck(torch.ops.twinstream.attention.default, (q, k, v, 2))


def test_wide_heads_are_torchs() -> None:
    q, k, v = _inputs(1, 6, 6, 512, torch.float32)
    assert torch.equal(attention(q, k, v, 1), attention_ref(q, k, v, 1))
    torch.testing.assert_close(attention(q, k, v, 2), attention_ref(q, k, v, 2))
