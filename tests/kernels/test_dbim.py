"""DBIM: the kernels in the interpreter (or on a GPU), extreme strengths and gains, the operator."""

from typing import Any

import pytest
import torch

from engine.kernels.cross_attention import cross_attention_ref
from engine.kernels.dbim import dbim, dbim_masks_ref, dbim_ref, dbim_triton
from tests.kernels.accuracy import assert_as_accurate

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_PRESETS = {"calibrated": ((10.0, 10.0, 500.0), False), "paper": ((1.0, 1.0, 1.0), True)}
_SHAPES = [  # pairs, N, heads, head dim
    (1, 64, 2, 40),
    (2, 256, 1, 16),
    (1, 70, 1, 80),
    (1, 33, 1, 160),
    (2, 4, 3, 16),
]


def _inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    preset: str | tuple = "calibrated",
    strength: float = 1.0,
    size: float = 1.0,
) -> dict[str, Any]:
    n_pairs, N, n_heads, D = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(2 * n_pairs, n, n_heads * D, device=_DEVICE).to(dtype) for n in (N, 77, 77))
    lengths = torch.randint(4, 20, (2 * n_pairs,), device=_DEVICE)
    chosen = torch.zeros(2 * n_pairs, 77, dtype=torch.bool, device=_DEVICE)
    for row, length in enumerate(lengths.tolist()):
        chosen[row, 1 + row % 2 : 1 + length // 2] = True
    scales, logits = _PRESETS[preset] if isinstance(preset, str) else preset
    gates = torch.tensor([(strength + i, *scales) for i in range(n_pairs)], device=_DEVICE)
    inputs = {"q": size * q, "k": k, "v": v, "chosen": chosen, "lengths": lengths, "gates": gates}
    return inputs | {"n_heads": n_heads, "logits": logits}


def test_more_keys_than_fit_into_a_tile() -> None:
    inputs = _inputs((1, 9, 2, 16), torch.float32)
    more = {name: torch.cat([inputs[name], torch.randn(2, 231, 32, device=_DEVICE)], dim=1) for name in ("k", "v")}
    inputs |= more | {"chosen": torch.nn.functional.pad(inputs["chosen"], (0, 231))}
    assert torch.equal(dbim_triton(**inputs), dbim_ref(**inputs))


def _exact(inputs: dict[str, Any]) -> torch.Tensor:
    return dbim_ref(**(inputs | {name: inputs[name].double() for name in ("q", "k", "v", "gates")}))


@pytest.mark.parametrize("preset", _PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_kernel(shape: tuple[int, ...], dtype: torch.dtype, preset: str) -> None:
    inputs = _inputs(shape, dtype, preset)
    assert_as_accurate(dbim_triton(**inputs), dbim_ref(**inputs), _exact(inputs))


@pytest.mark.parametrize("strength", [-1e4, -2.0, 0.0, 2.0, 1e4])
def test_extreme_strengths_and_saturated_masks(strength: float) -> None:
    inputs = _inputs((1, 40, 2, 16), torch.float32, ((10.0, 1000.0, 500.0), False), strength, size=20.0)
    actual = dbim_triton(**inputs)
    assert torch.isfinite(actual).all()
    assert_as_accurate(actual, dbim_ref(**inputs), _exact(inputs))


def test_the_auxiliary_row_keeps_its_output() -> None:
    inputs = _inputs((2, 9, 2, 8), torch.float64)
    out = dbim_ref(**inputs)
    plain, _ = cross_attention_ref(inputs["q"], inputs["k"], inputs["v"], inputs["lengths"][:, None][:, :0], 2)
    torch.testing.assert_close(out[2:], plain[2:])
    assert not torch.allclose(out[:2], plain[:2])


def test_equal_branches_mix_to_themselves() -> None:
    inputs = _inputs((1, 9, 2, 8), torch.float64)
    for name in ("q", "k", "v", "chosen"):
        inputs[name][1] = inputs[name][0]
    out = dbim_ref(**inputs)
    torch.testing.assert_close(out[0], out[1])


def test_masks_are_shares_of_the_prompts_own_tokens() -> None:
    inputs = _inputs((1, 9, 2, 8), torch.float64)
    every = torch.zeros_like(inputs["chosen"])
    for row, length in enumerate(inputs["lengths"].tolist()):
        every[row, 1 : 1 + length] = True
    masks = dbim_masks_ref(inputs["q"], inputs["k"], every, inputs["lengths"], inputs["gates"], 2, logits=False)
    torch.testing.assert_close(masks, torch.ones_like(masks))


def test_layout_is_checked() -> None:
    inputs = _inputs((1, 9, 2, 8), torch.float32)
    with pytest.raises(ValueError, match="chosen must be contiguous bool"):
        dbim_triton(**(inputs | {"chosen": inputs["chosen"].int()}))
    with pytest.raises(ValueError, match=r"gates must be contiguous float32 \(1, 4\)"):
        dbim_triton(**(inputs | {"gates": inputs["gates"].double()}))


def test_operator() -> None:
    inputs = _inputs((1, 6, 2, 8), torch.float32)
    arguments = tuple(inputs.values())
    torch.library.opcheck(torch.ops.twinstream.dbim.default, arguments)
    torch.testing.assert_close(dbim(*arguments), dbim_ref(*arguments))


def test_sharp_scales_do_not_overflow() -> None:
    inputs = _inputs((1, 16, 2, 40), torch.float32, preset=((2000.0, 10.0, 500.0), False), size=20.0)
    gates = inputs.pop("gates")
    inputs.pop("v")
    masks = dbim_masks_ref(*(inputs[name] for name in ("q", "k", "chosen", "lengths")), gates, 2, False)
    assert torch.isfinite(masks).all()
    assert float(masks.max()) > 0.5
