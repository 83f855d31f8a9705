"""Image prompts against diffusers' pipeline with IP-Adapters loaded: same pictures, same latents."""

from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import engine
from tests.ip_adapters import KINDS, adapter_tensors, picture, write_image_encoder
from tests.pipelines import SCHEDULERS, SD_V1_5_SCHEDULER, relative_error, save_pipeline

_TOLERANCE = 2e-5
_SHAPES = ("narrow", "deep_heads_per_block")  # the second's layers are two to a transformer, of unlike widths


class Both:
    """A diffusers pipeline with adapters, and an Engine with the same."""

    def __init__(self, folder: Path, shape: str, kinds: tuple[str, ...]) -> None:
        self.pipeline, self.sd = save_pipeline(shape, folder / "model"), engine.load(folder / "model")
        self.plain = save_pipeline(shape, folder / "model")  # whose UNet has no adapter
        write_image_encoder(folder / "image_encoder")
        processors = self.pipeline.unet.attn_processors
        layers = {
            name.removesuffix(".processor"): tuple(
                self.pipeline.unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
            )
            for name in processors
            if ".attn2." in name
        }
        self.adapters = []
        for i, kind in enumerate(kinds):
            save_file(adapter_tensors(layers, kind, seed=i), folder / f"{i}.safetensors")
            one = engine.IPAdapter.load(folder / f"{i}.safetensors", self.sd, folder / "image_encoder")
            self.adapters.append(one)
        names = [f"{i}.safetensors" for i in range(len(kinds))]
        self.pipeline.load_ip_adapter(str(folder), subfolder="", weight_name=names)
        self.pipeline.set_progress_bar_config(disable=True)

    def draw(self, sampler: str, pictures: list, scales: list[float], **options) -> tuple[torch.Tensor, torch.Tensor]:
        scheduler, own = SCHEDULERS[sampler]
        self.pipeline.scheduler = scheduler.from_config(SD_V1_5_SCHEDULER, **own)
        self.pipeline.set_ip_adapter_scale(scales)
        shared = {"guidance_scale": 7.5, "negative_prompt": "blurry"} | options
        if shared["guidance_scale"] == 1:
            shared.pop("negative_prompt")
        expected = self.pipeline(
            "a red cat",
            ip_adapter_image=pictures,
            num_images_per_prompt=2,
            height=16,
            width=24,
            num_inference_steps=6,
            generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
            output_type="latent",
            **shared,
        ).images
        prompts = [
            engine.ImagePrompt(adapter, image, scale)
            for adapter, image, scale in zip(self.adapters, pictures, scales, strict=True)
        ]
        out = self.sd.generate(
            "a red cat",
            image_prompts=prompts,
            images_per_prompt=2,
            height=16,
            width=24,
            steps=6,
            seed=5,
            sampler=sampler,
            output="latent",
            progress=False,
            **shared,
        )
        return out.latents, expected


@pytest.fixture(scope="module", params=[(shape, kind) for shape in _SHAPES for kind in KINDS], ids="-".join)
def both(request, tmp_path_factory) -> Both:
    shape, kind = request.param
    return Both(tmp_path_factory.mktemp("ip"), shape, (kind,))


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_pictures(both: Both, sampler: str, agrees) -> None:
    actual, expected = both.draw(sampler, [picture()], [0.8])
    agrees(
        "IP-Adapter, plain and Plus",
        "StableDiffusionPipeline.load_ip_adapter",
        relative_error(actual, expected),
        _TOLERANCE,
    )
    other, _ = both.draw(sampler, [picture(1)], [0.8])
    assert relative_error(other, expected) > 1e-3, "a picture tells"


def test_without_guidance(both: Both) -> None:
    actual, expected = both.draw("ddim", [picture()], [1.5], guidance_scale=1.0)
    assert relative_error(actual, expected) <= _TOLERANCE


def test_several_pictures_are_attended_to_together(both: Both, agrees) -> None:
    actual, expected = both.draw("ddim", [[picture(1), picture(2, (28, 60))]], [0.7])
    error = relative_error(actual, expected)
    agrees("IP-Adapter, several pictures", "StableDiffusionPipeline.load_ip_adapter", error, _TOLERANCE)


def test_several_adapters(tmp_path: Path, agrees) -> None:
    """Of 4 and of 6 tokens, which rows hold in one shape."""
    both = Both(tmp_path, "narrow", KINDS)
    actual, expected = both.draw("euler", [picture(1), picture(2)], [0.6, -0.4])
    error = relative_error(actual, expected)
    agrees("IP-Adapter, several adapters", "StableDiffusionPipeline.load_ip_adapter", error, _TOLERANCE)


def test_names_of_diffusers(both: Both, tmp_path: Path) -> None:
    """As the UNet with the adapter has them in its state dict."""
    state = both.pipeline.unet.state_dict()
    tensors = {name: one.contiguous() for name, one in state.items() if "_ip." in name or "encoder_hid_proj" in name}
    save_file(tensors, tmp_path / "theirs.safetensors")
    folder = Path(both.sd.name)
    theirs = engine.IPAdapter.load(tmp_path / "theirs.safetensors", both.sd, write_image_encoder(tmp_path / "encoder"))
    own = both.adapters[0]
    assert folder
    assert theirs.weights.layers.keys() == own.weights.layers.keys()
    for name, pair in own.weights.layers.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, theirs.weights.layers[name], strict=True))
    assert torch.equal(own.tokens([picture()]), theirs.tokens([picture()]))


def test_the_unet_is_left_alone(both: Both) -> None:
    before = {name: one.clone() for name, one in both.sd.unet.state_dict().items()}
    options = {"seed": 1, "steps": 2, "output": "latent", "progress": False}
    plain = both.sd.generate("a cat", **options).latents
    both.sd.generate("a cat", image_prompts=engine.ImagePrompt(both.adapters[0], picture()), **options)
    assert torch.equal(both.sd.generate("a cat", **options).latents, plain)
    assert all(torch.equal(one, before[name]) for name, one in both.sd.unet.state_dict().items())
    both.plain.set_progress_bar_config(disable=True)
    both.plain.scheduler = diffusers.DDIMScheduler.from_config(SD_V1_5_SCHEDULER)
    generator = torch.Generator().manual_seed(1)
    theirs = both.plain("a cat", num_inference_steps=2, guidance_scale=8.0, generator=generator, output_type="latent")
    assert relative_error(plain, theirs.images) <= _TOLERANCE
