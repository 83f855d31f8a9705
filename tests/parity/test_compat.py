"""One script against diffusers and against ``engine.compat``: same pictures."""

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import engine.compat
from engine.compat.schedulers import KNOWN
from tests.loras import write_kohya
from tests.pipelines import save_pipeline

_PIXELS = 2e-4  # of a range of one
_PROMPTS = ["a (red) cat [on] a beach", "a blue car"]
Script = Callable[[ModuleType, Any], np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compat")
    save_pipeline("narrow", path)
    return path


def _fresh(library: ModuleType, folder: Any, kind: str = "StableDiffusionPipeline") -> Any:
    pipe = getattr(library, kind).from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cpu")


@lru_cache(maxsize=8)
def _kept(library: ModuleType, folder: Any, kind: str) -> tuple[Any, Any]:
    pipe = _fresh(library, folder, kind)
    return pipe, pipe.scheduler


def _pipeline(library: ModuleType, folder: Any, kind: str = "StableDiffusionPipeline") -> Any:
    """One that is loaded once, with the folder's scheduler."""
    pipe, own = _kept(library, folder, kind)
    pipe.scheduler = own
    return pipe


def _same(folder: Any, script: Script) -> float:
    """The largest difference of what a script draws with both."""
    expected, drawn = (np.asarray(script(library, folder)) for library in (diffusers, engine.compat))
    assert drawn.shape == expected.shape
    assert drawn.dtype == expected.dtype
    assert expected.std() > 0
    return float(np.abs(drawn.astype(np.float64) - expected).max())


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [(None, {})]
    + [(name, {}) for name in KNOWN if name != "DPMSolverSDEScheduler"]  # whose noise diffusers draws by torchsde
    + [
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
        ("HeunDiscreteScheduler", {"use_beta_sigmas": True}),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    ],
)
def test_schedulers(folder, scheduler: str | None, options: dict, agrees) -> None:
    """Of the folder's own, and of every class made of its config; one generator draws for both images."""

    def script(library, folder):
        pipe = _pipeline(library, folder)
        if scheduler is not None:
            pipe.scheduler = getattr(library, scheduler).from_config(pipe.scheduler.config, **options)
        generator = torch.Generator("cpu").manual_seed(3)
        return pipe(_PROMPTS, num_inference_steps=5, guidance_scale=5.0, generator=generator, output_type="np").images

    agrees("`engine.compat`, every scheduler, pixels", "StableDiffusionPipeline", _same(folder, script), _PIXELS)


def test_a_schedulers_config_goes_from_class_to_class(folder) -> None:
    def script(library, folder):
        pipe = _pipeline(library, folder)
        for name, options in (
            ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
            ("UniPCMultistepScheduler", {}),
            ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ):
            pipe.scheduler = getattr(library, name).from_config(pipe.scheduler.config, **options)
        generator = torch.Generator().manual_seed(3)
        return pipe("a cat", num_inference_steps=5, generator=generator, output_type="np").images

    assert _same(folder, script) <= _PIXELS


def test_diffusers_own_schedulers_are_taken(folder) -> None:
    pipe = _pipeline(engine.compat, folder)
    theirs = _pipeline(diffusers, folder)
    for scheduler in (diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler):
        pipe.scheduler = theirs.scheduler = scheduler.from_config(theirs.scheduler.config, use_karras_sigmas=True)
        drawn, expected = (
            one("a cat", num_inference_steps=5, generator=torch.Generator().manual_seed(1), output_type="np").images
            for one in (pipe, theirs)
        )
        assert np.abs(drawn - expected).max() <= _PIXELS


def test_every_argument(folder, agrees) -> None:
    def script(library, folder):
        pipe = _pipeline(library, folder)
        pipe.scheduler = library.DDIMScheduler.from_config(pipe.scheduler.config)
        steps: list[tuple[int, float]] = []

        def on_step(*given):
            _, i, t, tensors = given
            steps.append((i, float(t)))
            assert tensors["latents"].shape == (4, 4, 8, 12)
            return tensors

        out = pipe(
            prompt=_PROMPTS,
            negative_prompt=["blurry", "(dark)"],
            height=16,
            width=24,
            num_inference_steps=7,
            guidance_scale=6.0,
            guidance_rescale=0.6,
            num_images_per_prompt=2,
            eta=0.7,
            generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 7, 8)],
            output_type="pt",
            callback_on_step_end=on_step,
            callback_on_step_end_tensor_inputs=["latents"],
        )
        assert out.nsfw_content_detected is None
        times.append(steps)
        return out.images.numpy()

    times: list[list] = []
    agrees("`engine.compat`, every argument, pixels", "StableDiffusionPipeline", _same(folder, script), _PIXELS)
    assert times[0] == times[1]
    assert len(times[0]) == 7


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_generator_goes_on_from_call_to_call(folder, scheduler: str) -> None:
    """And so does torch's default one, where none is given."""

    def script(library, folder):
        pipe = _pipeline(library, folder)
        pipe.scheduler = getattr(library, scheduler).from_config(pipe.scheduler.config)
        options = {"num_inference_steps": 4, "output_type": "np"}
        generator = torch.Generator().manual_seed(9)
        drawn = [pipe("a cat", generator=generator, **options).images for _ in range(2)]
        torch.manual_seed(4)
        drawn += [pipe("a cat", **options).images for _ in range(2)]
        assert np.abs(drawn[0] - drawn[1]).max() > 1e-2
        return np.concatenate(drawn)

    assert _same(folder, script) <= _PIXELS


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_given_latents(folder, scheduler: str) -> None:
    def script(library, folder):
        pipe = _pipeline(library, folder)
        pipe.scheduler = getattr(library, scheduler).from_config(pipe.scheduler.config)
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 4, "generator": generator, "output_type": "latent"}
        return pipe(_PROMPTS, latents=latents, **options).images

    assert _same(folder, script) <= 1e-3


def _pictures() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]


@pytest.mark.parametrize("lone", [True, False])
@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("many", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers, of one picture for several images
def test_image_to_image(folder, scheduler: str, lone: bool, many: bool, agrees) -> None:
    """One picture for two prompts, or one each, from one generator or from one each."""

    def script(library, folder):
        pipe = _pipeline(library, folder, "StableDiffusionImg2ImgPipeline")
        pipe.scheduler = getattr(library, scheduler).from_config(pipe.scheduler.config)
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        return pipe(
            _PROMPTS,
            image=_pictures() if many else _pictures()[0],
            strength=0.6,
            num_inference_steps=8,
            guidance_scale=5.0,
            generator=generators[0] if lone else generators,
            output_type="np",
        ).images

    agrees("`engine.compat`, image to image, pixels", "StableDiffusionImg2ImgPipeline", _same(folder, script), _PIXELS)


def test_an_interrupted_run_gives_what_there_is(folder) -> None:
    def script(library, folder):
        pipe = _pipeline(library, folder)
        pipe.scheduler = library.EulerDiscreteScheduler.from_config(pipe.scheduler.config)

        def stop(*given):
            given[0]._interrupt = given[1] == 2
            return given[3]

        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 6, "generator": generator, "output_type": "np"}
        return pipe("a cat", callback_on_step_end=stop, **options).images

    assert _same(folder, script) <= _PIXELS


@pytest.fixture(scope="module")
def loras(folder, tmp_path_factory):
    sd, path = engine.load(folder), tmp_path_factory.mktemp("loras")
    wanted = {"unet": lambda name: "attn" in name and "to_" in name, "text": lambda name: "self_attn" in name}
    return [write_kohya(sd, path / f"{seed}.safetensors", seed=seed, **wanted) for seed in (1, 2)]


@pytest.mark.parametrize("way", ["scaled", "last", "both", "fused", "unfused", "unloaded", "disabled"])
def test_loras(folder, loras, way: str, agrees) -> None:
    def script(library, folder):
        pipe = _fresh(library, folder)
        scale = {"cross_attention_kwargs": {"scale": 0.5}} if way == "scaled" else {}
        pipe.load_lora_weights(loras[0].parent, weight_name=loras[0].name, adapter_name="one")
        if way in ("last", "both"):
            pipe.load_lora_weights(str(loras[1]), adapter_name="two")
        if way == "both":
            pipe.set_adapters(["one", "two"], adapter_weights=[0.7, -0.4])
        if way in ("fused", "unfused"):
            pipe.fuse_lora(lora_scale=0.6)
        if way == "unfused":
            pipe.unfuse_lora()
        if way == "unloaded":
            pipe.unload_lora_weights()
        if way == "disabled":
            pipe.disable_lora()
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 4, "generator": generator, "output_type": "np"}
        return pipe("a cat", **options, **scale).images

    def plain(library, folder):
        generator = torch.Generator().manual_seed(0)
        return _pipeline(library, folder)("a cat", num_inference_steps=4, generator=generator, output_type="np").images

    agrees("`engine.compat`, LoRAs, pixels", "StableDiffusionPipeline", _same(folder, script), _PIXELS)
    changed = np.abs(script(engine.compat, folder) - plain(engine.compat, folder)).max()
    assert (changed > 1e-2) == (way not in ("unloaded", "disabled"))


def test_learned_tokens(folder, tmp_path, agrees) -> None:
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 0.02
    save_file({"<toy>": vectors}, tmp_path / "toy.safetensors")

    def script(library, folder):
        pipe = _fresh(library, folder)
        pipe.load_textual_inversion(str(tmp_path / "toy.safetensors"))
        generator = torch.Generator().manual_seed(0)
        prompts = ["a <toy> on a beach", "a car"]
        return pipe(prompts, num_inference_steps=4, generator=generator, output_type="np").images

    agrees("`engine.compat`, learned tokens, pixels", "StableDiffusionPipeline", _same(folder, script), _PIXELS)


def test_pil_pictures(folder) -> None:
    def script(library, folder):
        generator = torch.Generator().manual_seed(0)
        (picture,) = _pipeline(library, folder)("a cat", num_inference_steps=3, generator=generator)[0]
        assert isinstance(picture, Image.Image)
        return np.asarray(picture).astype(np.float32)

    assert _same(folder, script) <= 1
