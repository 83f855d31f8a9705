"""What ``generate`` promises: the same picture in any batch and thread, cancellation, and errors that name a stage."""

import inspect
import threading
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from engine.sampling.arguments import Options
from tests.pipelines import random_concept, relative_error

_FAST = {"steps": 4, "progress": False}


def test_outputs(small: engine.Engine) -> None:
    pil = small.generate("a cat", seed=1, **_FAST)
    array = small.generate("a cat", seed=1, output="numpy", **_FAST)
    latent = small.generate("a cat", seed=1, output="latent", **_FAST)
    assert pil.images[0].size == (16, 16)
    assert array.images.shape == (1, 16, 16, 3)
    assert array.images.dtype == np.float32
    assert np.array_equal(np.asarray(pil.images[0]), (array.images[0] * 255).round().astype(np.uint8))
    assert torch.equal(latent.images, pil.latents)
    assert pil.seeds == [1]
    assert pil.foundation_images is None
    assert set(pil.timings) == {"text", "encode", "denoise", "decode", "total"}
    assert pil.settings["sampler"] == "ddim"


def test_a_picture_does_not_depend_on_its_batch(small: engine.Engine) -> None:
    prompts = ["a cat", "a dog on a beach", "a red car"]
    together = small.generate(
        prompts, negative_prompt=["", "x", ""], seed=[7, 8, 9], sampler="euler_ancestral", **_FAST
    )
    for i, (prompt, negative) in enumerate(zip(prompts, ["", "x", ""], strict=True)):
        alone = small.generate(prompt, negative_prompt=negative, seed=7 + i, sampler="euler_ancestral", **_FAST)
        assert relative_error(together.latents[i : i + 1], alone.latents) <= 1e-5


def test_images_of_a_prompt_stand_in_a_row(small: engine.Engine) -> None:
    together = small.generate(["a cat", "a dog"], negative_prompt=["x", "y"], images_per_prompt=2, seed=3, **_FAST)
    assert together.settings["prompts"] == ["a cat", "a cat", "a dog", "a dog"]
    assert together.settings["negative_prompts"] == ["x", "x", "y", "y"]
    for i, (prompt, negative) in enumerate((("a cat", "x"), ("a cat", "x"), ("a dog", "y"), ("a dog", "y"))):
        alone = small.generate(prompt, negative_prompt=negative, seed=3 + i, **_FAST)
        assert relative_error(together.latents[i : i + 1], alone.latents) <= 1e-5


def test_pictures_that_start_alike_but_for_their_start_are_two(small: engine.Engine) -> None:
    """Same prompt and seed, other pictures or latents to start from: no trajectory is shared."""
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("black", "white")]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for starts in ({"image": pictures, "strength": 0.5}, {"latents": noise}):
        out = small.generate("a cat", images_per_prompt=2, seed=[5, 5], **starts, **_FAST)
        for i in (0, 1):
            one = {name: value[i : i + 1] if name != "strength" else value for name, value in starts.items()}
            alone = small.generate("a cat", seed=5, **one, **_FAST)
            assert relative_error(out.latents[i : i + 1], alone.latents) <= 1e-5
        assert relative_error(out.latents[:1], out.latents[1:]) > 1e-2


def test_a_callback_sees_the_pictures_latents_alone(small: engine.Engine) -> None:
    """Not those of foundations or auxiliary branches; the last call sees the result."""
    seen: list[torch.Tensor] = []
    customizations = [engine.Infusion([random_concept(small)]), engine.DCI("cat", fraction=1.0), None]
    out = small.generate(
        "a cat",
        images_per_prompt=3,
        seed=[1, 2, 3],
        customization=customizations,
        callback=lambda _step, _total, latents: seen.append(latents.clone()),
        **_FAST,
    )
    assert [len(latents) for latents in seen] == [3] * 4
    assert torch.equal(seen[-1], out.latents)


def test_a_text_encoder_that_fails_is_named(small_folder: Path) -> None:
    sd = engine.load(small_folder)
    with torch.no_grad():
        sd.text_encoder.model.final_layer_norm.weight.fill_(torch.nan)
    with pytest.raises(engine.NonFiniteError, match="the text encoder produced NaN or infinity"):
        sd.generate("a cat", **_FAST)


def test_help_signature_and_settings_follow_the_options(small: engine.Engine) -> None:
    parameters = inspect.signature(small.generate).parameters
    assert list(parameters)[:3] == ["prompt", "negative_prompt", "steps"]
    assert [name for name, one in parameters.items() if one.kind is one.VAR_KEYWORD] == []
    declared = {one.name: one for one in fields(Options)}
    assert parameters.keys() - {"prompt"} == declared.keys()
    settings = small.generate("a cat", **_FAST).settings
    for name, one in declared.items():
        assert f"{name}: {one.metadata['help'].split()[0]}" in engine.Engine.generate.__doc__
        assert not one.metadata["setting"] or name in settings


def test_seeds(small: engine.Engine) -> None:
    counted = small.generate("a cat", images_per_prompt=3, seed=5, **_FAST)
    assert counted.seeds == [5, 6, 7]
    given = small.generate("a cat", images_per_prompt=3, seed=[7, 5, 5], **_FAST)
    assert torch.allclose(given.latents[0], counted.latents[2], atol=1e-5)
    assert torch.equal(given.latents[1], given.latents[2])
    drawn = small.generate("a cat", **_FAST)
    assert torch.equal(small.generate("a cat", seed=drawn.seeds, **_FAST).latents, drawn.latents)
    largest = small.generate("a cat", seed=2**64 - 1, **_FAST)
    assert largest.seeds == [2**64 - 1]


def test_given_latents_are_start_noise(small: engine.Engine) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(3))
    for sampler in ("ddim", "euler"):
        seeded = small.generate("a cat", seed=3, sampler=sampler, **_FAST)
        given = small.generate("a cat", latents=noise, sampler=sampler, **_FAST)
        assert torch.equal(given.latents, seeded.latents)
    assert small.generate("a cat", latents=torch.randn(1, 4, 4, 6), **_FAST).images[0].size == (12, 8)


def test_guidance_one_skips_the_unconditional_row(small: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    original = type(small.unet).denoise
    monkeypatch.setattr(
        type(small.unet), "denoise", lambda self, sample, c: rows.append(len(c.shifts)) or original(self, sample, c)
    )
    small.generate("a cat", guidance_scale=1, **_FAST)
    small.generate("a cat", guidance_scale=2, **_FAST)
    assert rows == [1] * 4 + [2] * 4


def test_callback_sees_every_step_and_cancels(small: engine.Engine) -> None:
    seen = []
    out = small.generate("a cat", seed=0, callback=lambda *a: seen.append((a[0], a[1], a[2].shape)), **_FAST)
    assert seen == [(i, 4, (1, 4, 8, 8)) for i in range(4)]
    assert not out.cancelled
    for last in range(4):
        steps = []

        def stop(step: int, *_: object, steps: list[int] = steps, last: int = last) -> bool:
            steps.append(step)
            return step < last

        cancelled = small.generate("a cat", seed=0, callback=stop, **_FAST)
        assert steps == list(range(last + 1))
        assert cancelled.cancelled
        assert cancelled.images == []
    assert torch.equal(small.generate("a cat", seed=0, **_FAST).latents, out.latents)


def test_a_cancelled_request_has_no_foundation_pictures_either(small: engine.Engine) -> None:
    infusion = engine.Infusion([random_concept(small)])
    out = small.generate("a cat", seed=0, customization=infusion, callback=lambda *_: False, **_FAST)
    assert (out.images, out.foundation_images) == ([], [])


def test_pictures_may_be_one_array(small: engine.Engine) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    options = {"seed": 0, "images_per_prompt": 2, "strength": 0.5, **_FAST}
    array, pictures = (small.generate("a cat", image=image, **options) for image in (pixels, list(pixels)))
    assert torch.equal(array.latents, pictures.latents)


def test_a_callback_that_raises_leaves_the_engine_usable(small: engine.Engine) -> None:
    def fail(*_: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        small.generate("a cat", callback=fail, **_FAST)
    assert small.generate("a cat", **_FAST).images


def test_threads_get_their_own_results(small: engine.Engine) -> None:
    jobs = [{"prompt": f"a {noun}", "seed": i, "steps": 3 + i} for i, noun in enumerate(["cat", "dog", "car", "boat"])]
    expected = [small.generate(job.pop("prompt"), progress=False, **job) for job in [dict(job) for job in jobs]]
    results: dict[int, engine.Result] = {}

    def work(i: int) -> None:
        job = dict(jobs[i])
        results[i] = small.generate(job.pop("prompt"), progress=False, **job)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, reference in enumerate(expected):
        assert relative_error(results[i].latents, reference.latents) <= 1e-6


def test_image_to_image_forms(small: engine.Engine) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    forms = [Image.fromarray(pixels), pixels, pixels.astype(np.float32) / 255, [Image.fromarray(pixels)]]
    outs = [small.generate("a cat", image=form, seed=0, **_FAST).latents for form in forms]
    for out in outs[1:]:
        assert torch.equal(out, outs[0])
    assert small.generate("a cat", image=Image.new("RGB", (33, 19)), **_FAST).images[0].size == (32, 18)
    assert small.generate("a cat", image=Image.new("RGB", (33, 19)), width=8, height=8, **_FAST).images[0].size == (
        8,
        8,
    )


def _spoil(layer: torch.nn.Conv2d, value: float) -> None:
    layer.bias = torch.nn.Parameter(torch.full_like(layer.bias, value), requires_grad=False)


def test_nan_from_the_unet_names_the_step(small_folder) -> None:
    sd = engine.load(small_folder)
    _spoil(sd.unet.conv_out, torch.nan)
    with pytest.raises(engine.NonFiniteError, match=r"UNet .* step 0 of 4 \(timestep 751\)"):
        sd.generate("a cat", **_FAST)


def test_nan_from_the_vae_is_an_error_not_a_black_picture(small_folder) -> None:
    sd = engine.load(small_folder)
    _spoil(sd.vae.decoder.conv_out, torch.inf)
    with pytest.raises(engine.NonFiniteError, match="VAE decoder"):
        sd.generate("a cat", **_FAST)


def test_nan_from_the_vae_encoder_is_not_blamed_on_the_unet(small_folder) -> None:
    sd = engine.load(small_folder)
    _spoil(sd.vae.encoder.conv_in, torch.nan)
    with pytest.raises(engine.NonFiniteError, match="VAE encoder"):
        sd.generate("a cat", image=Image.new("RGB", (16, 16)), **_FAST)


@pytest.mark.parametrize("answer", [False, np.False_, torch.tensor(False), 0])
def test_any_false_answer_cancels(small: engine.Engine, answer) -> None:
    assert small.generate("a cat", callback=lambda *_: answer, **_FAST).cancelled


def test_global_torch_defaults_do_not_change_a_picture(small: engine.Engine) -> None:
    expected = small.generate("a cat", seed=0, sampler="euler_ancestral", **_FAST)
    torch.set_default_dtype(torch.float64)
    try:
        actual = small.generate("a cat", seed=0, sampler="euler_ancestral", **_FAST)
    finally:
        torch.set_default_dtype(torch.float32)
    assert relative_error(actual.latents, expected.latents) <= 1e-6


def test_float16_vae_that_overflows_is_decoded_again_in_float32(small_folder) -> None:
    with pytest.warns(RuntimeWarning, match="float16 is about 1000 times slower"):
        sd = engine.load(small_folder, dtype="float16")
    exact = engine.load(small_folder)
    for vae in (sd.vae, exact.vae):
        weight = vae.decoder.conv_in.weight  # far beyond float16 after the first convolution; normalised away later
        vae.decoder.conv_in.weight = torch.nn.Parameter(weight * 3e4, requires_grad=False)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(RuntimeWarning, match="the VAE decoder overflowed in float16"):
        out = sd.generate("a cat", latents=latents, steps=1, output="numpy", progress=False)
    scale = exact.vae.config.scaling_factor
    expected = (exact.vae.decode(out.latents / scale) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    assert np.abs(out.images[0] - expected).max() < 2e-2


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_bfloat16(small_folder, small: engine.Engine, dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = engine.load(small_folder, dtype=dtype).generate("a cat", seed=0, **_FAST)
    assert relative_error(out.latents, small.generate("a cat", seed=0, **_FAST).latents) <= 5e-2
    assert out.latents.dtype == torch.float32


def test_models_may_be_called_directly(small: engine.Engine) -> None:
    context = small.encode_prompt(["a cat", "a dog"])
    noise = small.unet(torch.randn(2, 4, 8, 8), 10, context)
    assert noise.shape == (2, 4, 8, 8)
    images = small.vae.decode(torch.randn(1, 4, 4, 4))
    assert small.vae.encode(images).shape == (1, 4, 4, 4)
    with pytest.raises(ValueError, match=r"multiples of 2, got \(1, 3, 9, 8\)"):
        small.vae.encode(torch.zeros(1, 3, 9, 8))
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, h, w\), got \(1, 3, 8, 8\)"):
        small.vae.decode(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"device": "gpu"}, "device must be a torch device"),
        ({"backend": "cuda"}, "backend must be one of auto, torch, native, triton, got 'cuda'"),
        ({"config": "x"}, "config belongs to single-file checkpoints"),
    ],
    ids=str,
)
def test_load_refusals(small_folder, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.load(small_folder, **arguments)


def test_triton_needs_a_gpu(small_folder) -> None:
    with pytest.raises(RuntimeError, match="backend 'triton' needs a CUDA device, got cpu"):
        engine.load(small_folder, device="cpu", backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu(small_folder) -> None:
    with pytest.raises(RuntimeError, match="sees no GPU; use device='cpu'"):
        engine.load(small_folder, device="cuda")
