"""What diffusers' names do here beside drawing, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from engine.compat import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from engine.errors import CheckpointError
from engine.weights.single_file import save_single_file
from tests.loras import write_kohya
from tests.naming import short
from tests.pipelines import save_pipeline

_QUICK = {"num_inference_steps": 2, "output_type": "np"}


@pytest.fixture
def pipe(small_folder: Path) -> StableDiffusionPipeline:
    made = StableDiffusionPipeline.from_pretrained(small_folder, dtype="float32", safety_checker=None)
    assert type(made.scheduler) is DDIMScheduler, "as the folder's index says, whatever its scheduler's file says"
    made.set_progress_bar_config(disable=True)
    made.scheduler = PNDMScheduler.from_config(made.scheduler.config)
    return made


def test_it_draws_what_the_engine_draws(pipe: StableDiffusionPipeline, small: engine.Engine) -> None:
    images, nsfw = pipe(
        "a cat", generator=torch.Generator().manual_seed(3), **_QUICK, return_dict=False, guidance_scale=5.0
    )
    out = small.generate("a cat", seed=3, sampler="pndm", steps=2, guidance_scale=5.0, output="numpy", progress=False)
    assert np.array_equal(images, out.images)
    assert nsfw is None


@pytest.mark.parametrize("clip_skip", [None, 0, 1])
def test_clip_skip_is_counted_as_the_engine_counts(
    pipe: StableDiffusionPipeline, small: engine.Engine, clip_skip: int | None
) -> None:
    images = pipe("a cat", generator=torch.Generator().manual_seed(3), clip_skip=clip_skip, **_QUICK).images
    options = {"steps": 2, "guidance_scale": 7.5, "output": "numpy", "progress": False}
    out = small.generate("a cat", seed=3, sampler="pndm", clip_skip=clip_skip or 0, **options)
    assert np.array_equal(images, out.images)


def test_weights_are_read_when_they_are_needed(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.compat import base

    loaded = []
    monkeypatch.setattr(base, "load", lambda **given: loaded.append(given) or engine.load(**given))
    pipe = StableDiffusionPipeline.from_pretrained(str(small_folder)).to("cpu").to(torch.bfloat16)
    assert not loaded
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert pipe.unet.conv_in.weight.dtype == torch.bfloat16
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.vae is pipe.vae
    assert len(loaded) == 1
    pipe.to("cpu", torch.float32)
    assert pipe.text_encoder.dtype == torch.float32
    assert pipe.tokenizer("a cat").input_ids
    assert len(loaded) == 2
    with pytest.raises(CheckpointError):
        StableDiffusionPipeline.from_pretrained("/nowhere/at/all")


def test_single_files(tmp_path: Path) -> None:
    save_pipeline("sd_like", tmp_path / "folder")
    sd, file = engine.load(tmp_path / "folder"), tmp_path / "small.safetensors"
    save_single_file(file, sd.unet, sd.vae, sd.text_encoder.model, sd.schedule, torch.float32)
    pipe = StableDiffusionPipeline.from_single_file(file)
    assert type(pipe.scheduler) is PNDMScheduler
    assert pipe.scheduler.config.beta_end == 0.012
    assert pipe._sampling.config == sd.schedule
    assert pipe.engine.name == "small"


def test_the_embedded_model() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(None)
    assert pipe.scheduler.config._class_name == type(pipe.scheduler).__name__


def test_a_schedule_is_another_engine_on_the_same_weights(pipe: StableDiffusionPipeline) -> None:
    before = pipe._engine_on_schedule(1.0)
    assert before is pipe.engine
    trailing = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.scheduler = trailing
    other = pipe._engine_on_schedule(1.0)
    assert other is pipe._engine_on_schedule(1.0)
    assert other.unet is before.unet
    assert other.schedule.timestep_spacing == "trailing"
    assert before.schedule.timestep_spacing is None


def test_loras_are_made_once(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    file = write_kohya(pipe.engine, tmp_path / "lace.safetensors")
    pipe.load_lora_weights(file)
    one = pipe._engine_on_schedule(1.0)
    assert one is not pipe.engine
    assert one is pipe._engine_on_schedule(1.0)
    assert pipe._engine_on_schedule(0.0) is pipe.engine
    assert pipe._engine_on_schedule(0.5).loras[0].weight == 0.5
    pipe.fuse_lora(lora_scale=0.25)
    assert pipe._engine_on_schedule(0.5).loras[0].weight == 0.25, "a fused one heeds no scale, and acts once"
    pipe.unload_lora_weights()
    assert pipe._engine_on_schedule(1.0).loras[0].weight == 0.25
    pipe.unfuse_lora()
    pipe.disable_lora()
    assert pipe._engine_on_schedule(1.0) is pipe.engine
    for wrong, message in (
        (lambda: pipe.load_lora_weights({"a": 1}), "load_lora_weights needs a file or a folder, got dict"),
        (lambda: pipe.set_adapters("other"), "adapter names must be of loaded LoRAs (default_0), got 'other'"),
        (lambda: pipe.set_adapters(["default_0"], [1.0, 2.0]), "one number or one per adapter (1), got 2"),
        (lambda: pipe.load_lora_weights(file, adapter_name="default_0"), "adapter_name must be a new one"),
    ):
        with pytest.raises(ValueError) as caught:
            wrong()
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": [1]}, "timesteps must not be given: steps are laid out by the scheduler"),
        ({"sigmas": [1.0]}, "sigmas must not be given"),
        ({"prompt_embeds": torch.zeros(1)}, "prompt_embeds must not be given: pictures are drawn from texts"),
        ({"ip_adapter_image": 1}, "ip_adapter_image must not be given: this pipeline has no IP-Adapter"),
        ({"callback": print}, "callback must not be given: it is deprecated"),
        ({"steps": 3}, "steps is no argument of this pipeline"),
        ({"prompt": None}, "prompt must be a text or a list of texts, got None"),
        ({"output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent, got 'jpeg'"),
        ({"cross_attention_kwargs": {"scale": 1, "gligen": 2}}, "cross_attention_kwargs must hold scale alone"),
        ({"generator": [torch.Generator()] * 2}, "generator must be one torch.Generator, or one per image (1)"),
        ({"generator": 3}, "generator must be one torch.Generator"),
        ({"eta": 0.5}, "eta belongs to ddim and tcd alone"),
        ({"negative_prompt": "dark", "guidance_scale": 0.0}, "negative_prompt needs a guidance_scale above 1"),
        ({"negative_prompt": ["dark", "red"]}, "one per prompt (1), got 2"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "must be ['latents']"),
        ({"callback_on_step_end": lambda *_: None}, "callback_on_step_end must return its tensors in a dict"),
        (
            {"callback_on_step_end": lambda *given: {"latents": given[3]["latents"] * 2}},
            "callback_on_step_end must leave latents as they are",
        ),
        (
            {"callback_on_step_end": lambda *given: {"latents": given[3]["latents"].mul_(2)}},
            "callback_on_step_end must leave latents as they are",
        ),
    ],
    ids=short,
)
def test_refusals(pipe: StableDiffusionPipeline, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        pipe(**{"prompt": "a cat", **_QUICK, **arguments})
    assert message in str(caught.value)
    pipe("a cat", **_QUICK)


def test_no_guidance_below_one(pipe: StableDiffusionPipeline) -> None:
    seeded = [torch.Generator().manual_seed(1) for _ in range(2)]
    one, other = (
        pipe("a cat", guidance_scale=scale, generator=generator, **_QUICK).images
        for scale, generator in zip((0.0, 1.0), seeded, strict=True)
    )
    assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"safety_checker": "x"}, "safety_checker and image_encoder must be None"),
        ({"use_safetensors": False}, "use_safetensors must not be False"),
        ({"variant": "fp16"}, "variant must be 'fp16', with torch_dtype float16, got 'fp16' with float32"),
        ({"torch_dtype": "float32", "dtype": "float32"}, "give dtype or torch_dtype, not both"),
        ({"torch_dtype": "int8"}, "torch_dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"vae": object()}, "vae must not be given: parts are loaded from the folder"),
        ({"custom_pipeline": "x"}, "custom_pipeline must not be given: code of others"),
        ({"torch_type": 1}, "from_pretrained has no argument torch_type"),
        ({"scheduler": object()}, "scheduler must be one of DDIMScheduler"),
    ],
    ids=short,
)
def test_loading_refuses(small_folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        StableDiffusionPipeline.from_pretrained(small_folder, **arguments)
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="local_files_only belongs to paths"):
        StableDiffusionPipeline.from_pretrained("a/b", local_files_only=True)


def test_pictures_are_checked(small_folder: Path) -> None:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(small_folder)
    picture = Image.new("RGB", (16, 16))
    for given, message in (
        ({"image": np.zeros((16, 16, 3))}, "image must be PIL pictures here, got ndarray"),
        ({"image": [picture] * 2, "num_images_per_prompt": 2}, "num_images_per_prompt must be 1 with several"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(["a cat", "a dog"], **_QUICK, **given)


def test_learned_tokens_of_negative_prompts(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"emb_params": torch.zeros(1, 32)}, tmp_path / "bad.safetensors")
    pipe.load_textual_inversion(tmp_path, token="<bad>")
    pipe("a <bad> cat", negative_prompt="<bad>", **_QUICK)
    with pytest.raises(ValueError, match="a learned token of the negative prompt must be in the prompt, too"):
        pipe("a cat", negative_prompt="<bad>", **_QUICK)
    with pytest.raises(ValueError, match="token must be a new one, got '<bad>'"):
        pipe.load_textual_inversion(tmp_path / "bad.safetensors", token="<bad>")


def test_schedulers_are_refused_by_name(pipe: StableDiffusionPipeline, small_folder: Path) -> None:
    class LMSDiscreteScheduler:
        config = {"beta_start": 0.1}  # noqa: RUF012

    config = pipe.scheduler.config
    assert config.beta_start == 0.00085
    with pytest.raises(AttributeError, match="the scheduler's config has no 'gamma'"):
        _ = config.gamma
    for scheduler, message in (
        (LMSDiscreteScheduler(), "got LMSDiscreteScheduler; use EulerDiscreteScheduler or"),
        (DDIMScheduler(), "DDIMScheduler: beta_start is missing"),
        (DDIMScheduler.from_config(config, thresholding=True), "thresholding must be False"),
        (DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver"), "algorithm_type must be one of"),
        (DPMSolverMultistepScheduler.from_config(config, solver_order=3), "solver_order must be 2"),
        (
            EulerDiscreteScheduler.from_config(config, use_karras_sigmas=True, use_beta_sigmas=True),
            "only one of use_karras_sigmas",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            pipe.scheduler = scheduler
        assert message in str(caught.value)
    assert type(pipe.scheduler) is PNDMScheduler
    read = DDIMScheduler.from_pretrained(small_folder, subfolder="scheduler")
    assert read.config.beta_end == config.beta_end
    assert "DDIMScheduler(" in repr(read)
    with pytest.raises(CheckpointError, match="cannot be read as a configuration"):
        DDIMScheduler.from_pretrained(small_folder)


def test_memory_savers(pipe: StableDiffusionPipeline) -> None:
    seeded = [torch.Generator().manual_seed(1) for _ in range(2)]
    plain = pipe("a cat", generator=seeded[0], **_QUICK).images
    pipe.enable_attention_slicing()
    pipe.enable_xformers_memory_efficient_attention()
    pipe.enable_vae_slicing()
    pipe.enable_vae_tiling()
    assert pipe._vae_options == {"vae_slicing": True, "vae_tiling": True}
    saving = pipe("a cat", generator=seeded[1], **_QUICK).images
    assert np.abs(plain - saving).max() < 1e-4
    pipe("a cat", num_inference_steps=1, output_type="latent")
    pipe.disable_vae_slicing()
    pipe.disable_vae_tiling()
    assert pipe._vae_options == {"vae_slicing": False, "vae_tiling": False}
