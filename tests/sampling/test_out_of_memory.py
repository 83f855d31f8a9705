"""A GPU whose memory runs out, played by models that raise what torch would."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import engine
from engine.engine import Engine
from engine.sampling import out_of_memory
from engine.sampling.out_of_memory import with_retry


@pytest.fixture
def sd(small_folder: Any) -> Engine:
    return engine.load(small_folder)


def _failing(function: Callable[..., Any], fails: Callable[[int, torch.Tensor], bool]) -> Callable[..., Any]:
    """The function, which runs out of memory at the calls that ``fails(call, first argument)`` tells."""
    calls = iter(range(1000))

    def run(x: torch.Tensor, *rest: Any) -> Any:
        if fails(next(calls), x):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return function(x, *rest)

    return run


def _draw(sd: Engine, **options: Any) -> Any:
    return sd.generate("a cat", **({"steps": 3, "seed": 0, "output": "numpy", "progress": False} | options))


def test_a_step_is_tried_again_where_it_stopped(sd: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, steps, freed = _draw(sd), [], []
    monkeypatch.setattr(sd.unet, "denoise", _failing(sd.unet.denoise, lambda call, _: call == 1))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(1))
    out = _draw(sd, callback=lambda step, _total, _x: steps.append(step))
    assert (out.images == expected.images).all()
    assert (steps, freed) == ([0, 1, 2], [1])


def test_steps_that_record_are_tried_again_too(sd: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the attempt that failed had recorded, up to its middle, is forgotten."""
    options = {
        "customization": engine.DCI("cat", fraction=0.7),
        "attention_words": ["cat"],
        "record_masks": True,
        "callback": lambda *_: None,
    }
    expected = _draw(sd, **options)
    last = sd.unet.mid_block.resnets[1]
    monkeypatch.setattr(last, "forward", _failing(last.forward, lambda call, _: call == 1))
    out = _draw(sd, **options)
    assert (out.images == expected.images).all()
    for name, maps in expected.attention.layers.items():
        assert np.array_equal(out.attention.layers[name], maps)
    for name, masks in expected.masks[0].layers.items():
        assert len(masks) == 2
        assert np.array_equal(out.masks[0].layers[name], masks)


def test_what_does_not_fit_is_told(sd: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _draw(sd)
    with monkeypatch.context() as patch:
        patch.setattr(sd.unet, "denoise", _failing(sd.unet.denoise, lambda _call, x: len(x) > 1))
        for room, advice in ((5, "about 2 of that size would fit"), (1, "not even one of that size fits")):
            patch.setattr(out_of_memory, "rows_that_fit", lambda *_, room=room: room)
            with pytest.raises(engine.OutOfMemoryError, match=f"got 4 of 16x16 in 8 UNet rows; {advice}"):
                _draw(sd, images_per_prompt=4, height=16, width=16)
    assert (_draw(sd).images == expected.images).all()


def test_the_decoder_is_tried_picture_by_picture(sd: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _draw(sd, images_per_prompt=2, vae_slicing=True)
    with monkeypatch.context() as patch:
        patch.setattr(sd.vae, "_pixels", _failing(sd.vae._pixels, lambda _call, x: len(x) > 1))
        with pytest.warns(RuntimeWarning, match="the VAE decoder ran out of memory; trying picture by picture"):
            out = _draw(sd, images_per_prompt=2)
        assert (out.images == expected.images).all()
        patch.setattr(sd.vae, "_pixels", _failing(sd.vae._pixels, lambda _call, _x: True))
        with (
            pytest.warns(RuntimeWarning, match="picture by picture"),
            pytest.raises(engine.OutOfMemoryError, match=r"the VAE decoder's work on one picture.*vae_tiling=True"),
        ):
            _draw(sd)
    assert (_draw(sd, images_per_prompt=2, vae_slicing=True).images == expected.images).all()


def test_the_encoder_too(sd: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(2, 16, 16, 3).numpy()
    options = {"image": list(images), "images_per_prompt": 2, "height": 16, "width": 16}
    expected = _draw(sd, vae_slicing=True, **options)
    monkeypatch.setattr(sd.vae, "_moments", _failing(sd.vae._moments, lambda _call, x: len(x) > 1))
    with pytest.warns(RuntimeWarning, match="the VAE encoder ran out of memory"):
        out = _draw(sd, **options)
    assert abs(out.images - expected.images).max() < 1e-4


def test_other_errors_pass() -> None:
    def fail() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        with_retry(fail, lambda: pytest.fail("nothing to free"))


def test_rows_that_fit_are_counted_by_what_one_takes(sd: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with 1,000 bytes left, of which a row takes 300."""
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 1300)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 5000))
    rows = []
    denoise = sd.unet.denoise
    monkeypatch.setattr(sd.unet, "denoise", lambda x, condition: rows.append(x.shape) or denoise(x, condition))
    assert out_of_memory.rows_that_fit(sd.unet, 8, 6) == 3
    assert rows == [(1, 4, 8, 6)]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 1000)
    assert out_of_memory.rows_that_fit(sd.unet, 8, 6) == 1000  # a step that seems to take nothing divides by 1
    monkeypatch.setattr(sd.unet, "denoise", _failing(denoise, lambda _call, _x: True))
    assert out_of_memory.rows_that_fit(sd.unet, 8, 6) == 0
