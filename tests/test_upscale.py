"""Pictures in two passes."""

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from tests.pipelines import random_concept

_QUICK = {"steps": 4, "progress": False}


def _by_hand(sd: engine.Engine, prompt, size: tuple[int, int], second: dict, **given):
    first = sd.generate(prompt, **given)
    height, width = size
    again = {**given, "seed": first.seeds, "image": first.images, "height": height, "width": width} | second
    return first, sd.generate(prompt, **again)


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "heun"])
def test_it_is_image_to_image_on_the_enlarged_picture(small: engine.Engine, sampler: str) -> None:
    given = {"sampler": sampler, "seed": [3, 8], "negative_prompt": "dark", **_QUICK}
    prompts = ["a cat", "a dog"]
    out = small.generate(prompts, upscale=1.5, upscale_strength=0.75, upscale_steps=6, **given)
    assert [picture.size for picture in out.images] == [(24, 24), (24, 24)]
    first, expected = _by_hand(small, prompts, (24, 24), {"strength": 0.75, "steps": 6}, **given)
    assert torch.equal(out.latents, expected.latents)
    assert out.seeds == [3, 8]
    assert first.images[0].size == (16, 16)
    known = {"upscale": 1.5, "upscale_strength": 0.75, "upscale_steps": 6}
    assert out.settings == first.settings | known
    assert out.timings.keys() == first.timings.keys()
    assert out.timings["total"] > expected.timings["total"]


def test_the_picture_is_resampled_with_lanczos(small: engine.Engine) -> None:
    first = small.generate("a cat", seed=3, **_QUICK)
    larger = first.images[0].resize((32, 32), Image.Resampling.LANCZOS)
    expected = small.generate("a cat", seed=3, image=larger, strength=0.5, **_QUICK)
    out = small.generate("a cat", seed=3, upscale=2, **_QUICK)
    assert torch.equal(out.latents, expected.latents)


def test_sizes_are_rounded_to_the_vaes_factor(small: engine.Engine) -> None:
    out = small.generate("a cat", seed=3, upscale=1.2, height=12, width=20, output="numpy", **_QUICK)
    assert out.images.shape == (1, 14, 24, 3)
    assert (out.settings["height"], out.settings["width"]) == (12, 20)


def test_seeds_are_drawn_once(small: engine.Engine) -> None:
    out = small.generate("a cat", upscale=2, images_per_prompt=2, variation_strength=0.3, **_QUICK)
    given = {"seed": out.seeds, "variation_seed": out.settings["variation_seeds"], "variation_strength": 0.3}
    again = small.generate("a cat", upscale=2, images_per_prompt=2, **given, **_QUICK)
    assert torch.equal(again.latents, out.latents)


def test_a_generator_goes_on_into_the_second_pass(small: engine.Engine) -> None:
    out = small.generate("a cat", upscale=2, generator=torch.Generator().manual_seed(3), **_QUICK)
    generator = torch.Generator().manual_seed(3)
    first = small.generate("a cat", generator=generator, **_QUICK)
    given = {"image": first.images[0], "height": 32, "width": 32, "strength": 0.5, "generator": generator}
    assert torch.equal(out.latents, small.generate("a cat", **given, **_QUICK).latents)


def test_customisations_are_in_both_passes(small: engine.Engine) -> None:
    for custom in (engine.Infusion([random_concept(small)]), engine.DCI("cat", fraction=1.0)):
        given = {"customization": custom, "seed": 3, **_QUICK}
        second = {"strength": 0.5, "attention_words": ["cat"], "record_masks": isinstance(custom, engine.DCI)}
        _, expected = _by_hand(small, "a cat", (32, 32), second, **given)
        asked = {name: second[name] for name in ("attention_words", "record_masks")}
        out = small.generate("a cat", upscale=2, **given, **asked)
        assert torch.equal(out.latents, expected.latents)
        assert (out.foundation_images is None) == (expected.foundation_images is None)
        assert out.attention is not None
        assert (out.masks is None) == isinstance(custom, engine.Infusion)


def test_from_a_picture_or_latents(small: engine.Engine) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for start in ({"image": picture, "strength": 0.5}, {"latents": torch.randn(1, 4, 8, 8)}):
        first = small.generate("a cat", seed=3, **start, **_QUICK)
        given = {"image": first.images[0], "height": 32, "width": 32, "strength": 0.5}
        expected = small.generate("a cat", seed=3, **given, **_QUICK)
        out = small.generate("a cat", seed=3, upscale=2, **start, **_QUICK)
        assert torch.equal(out.latents, expected.latents)
        assert out.settings["given_latents"] == ("latents" in start)
        assert out.settings["strength"] == start.get("strength")


def test_steps_count_over_both_passes(small: engine.Engine) -> None:
    seen: list[tuple[int, int, tuple[int, ...]]] = []

    def watch(step: int, total: int, latents: torch.Tensor) -> bool:
        seen.append((step, total, tuple(latents.shape[2:])))
        return step != stop

    stop = -1
    small.generate("a cat", upscale=2, seed=1, sampler="heun", callback=watch, **_QUICK)
    assert [step for step, _, _ in seen] == list(range(len(seen)))
    assert {total for _, total, _ in seen} == {len(seen)}
    first = sum(size == (8, 8) for _, _, size in seen)
    assert [size for _, _, size in seen] == [(8, 8)] * first + [(16, 16)] * (len(seen) - first)
    assert first == 7
    for stop, n_seen in ((2, 3), (8, 9)):  # noqa: B007 (watch reads it)
        seen.clear()
        out = small.generate("a cat", upscale=2, seed=1, sampler="heun", callback=watch, **_QUICK)
        assert len(seen) == n_seen
        assert out.cancelled
        assert out.images == []
        assert out.settings["upscale"] == 2


def test_through_a_scheduler(small: engine.Engine) -> None:
    expected = small.generate("a cat", upscale=2, seed=1, **_QUICK)
    with engine.Scheduler(small, max_rows=8) as scheduler:
        out = small.generate("a cat", upscale=2, seed=1, scheduler=scheduler, **_QUICK)
        with pytest.raises(ValueError, match="a request is one pass, got upscale=2"):
            scheduler.submit("a cat", upscale=2)
    torch.testing.assert_close(out.latents, expected.latents, rtol=1e-4, atol=1e-4)
    assert "queue" in out.timings


def test_latents_come_out(small: engine.Engine) -> None:
    out = small.generate("a cat", upscale=2, seed=1, output="latent", vae_slicing=True, **_QUICK)
    assert out.images.shape == (1, 4, 16, 16)


def test_pictures_carry_it_in_a1111s_words(small: engine.Engine) -> None:
    out = small.generate("a cat", upscale=2, upscale_strength=0.5, upscale_steps=7, seed=1, **_QUICK)
    expected = (
        "Size: 16x16, Model: {}, Denoising strength: 0.5, Hires upscale: 2, Hires steps: 3, Hires upscaler: Lanczos"
    )
    assert expected.format(small.name) in out.parameters(0)
    picture = Image.new("RGB", (16, 16))
    both = small.generate("a cat", image=picture, strength=0.75, upscale=2, seed=1, **_QUICK).parameters(0)
    assert "Denoising strength: 0.75, Hires denoising strength: 0.5, Hires upscale: 2, " in both
    assert "Hires" not in small.generate("a cat", seed=1, **_QUICK).parameters(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"upscale": 0.5}, "upscale must be a finite number from 1 to 8, got 0.5"),
        ({"upscale_strength": 0.4}, "upscale_strength and upscale_steps belong to a second pass: give upscale too"),
        ({"upscale_steps": 4}, "belong to a second pass: give upscale too, got 0.5 and 4"),
        ({"upscale": 2, "upscale_strength": 0.1}, "int(steps * strength) must be at least 1"),
        ({"upscale": 2, "upscale_strength": 1.5}, "upscale_strength must be a finite number from 0 to 1, got 1.5"),
        ({"upscale": 2, "upscale_steps": 1001}, "steps must be an integer <= 1000, got 1001"),
        ({"upscale": 2, "height": 4096, "width": 4096}, "pixels"),
        ({"upscale": 2, "seed": -1}, "seed must be an integer >= 0"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_wrong_with_either_pass_is_told_before_the_first(
    small: engine.Engine, arguments: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.Engine, "begin", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError) as caught:
        small.generate("a cat", **_QUICK, **arguments)
    assert message in str(caught.value)


def test_what_a_mask_marks_alone_is_drawn_larger_and_pasted(small: engine.Engine) -> None:
    picture, mask = Image.effect_noise((40, 32), 80).convert("RGB"), Image.new("L", (40, 32))
    mask.paste(255, (8, 6, 20, 18))
    given = {"mask": mask, "mask_padding": 2, "strength": 0.75, "seed": 3, **_QUICK}
    out = small.generate("a cat", image=picture, upscale=1.5, upscale_strength=0.5, **given)
    first = small.generate("a cat", image=picture, **given)
    again = {**given, "strength": 0.5, "height": 24, "width": 24}
    expected = small.generate("a cat", image=first.images[0], **again)
    assert torch.equal(out.latents, expected.latents)
    assert out.latents.shape[2:] == (12, 12)
    assert out.images[0].size == picture.size
