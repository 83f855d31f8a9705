"""TAESD against diffusers' AutoencoderTiny, as a model's VAE and as the decoder of previews."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import engine
from engine.weights.single_file import save_single_file
from engine.weights.tiny_vae_file import read_tiny_decoder
from tests.pipelines import SD_V1_5_SCHEDULER, relative_error, save_pipeline

_TOLERANCE = 2e-5
_LEVELS = {"encoder": (1, 2), "decoder": (2, 1)}  # of factor 2, as the small model's VAE


def make_tiny(seed: int = 0, channels: int = 16, encoder=_LEVELS["encoder"], decoder=_LEVELS["decoder"], **options):
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(channels,) * len(encoder),
        decoder_block_out_channels=(channels,) * len(decoder),
        num_encoder_blocks=encoder,
        num_decoder_blocks=decoder,
        **options,
    ).eval()
    for parameter in vae.parameters():
        if parameter.ndim == 4:  # so that signs and ranges of latents tell
            parameter.data.normal_(std=1.2 / parameter[0].numel() ** 0.5)
    return vae


def original_decoder(vae: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of ``taesd_decoder``: a clamp comes first there."""
    found = {}
    for name, one in vae.decoder.state_dict().items():
        number, _, rest = name.removeprefix("layers.").partition(".")
        found[f"{int(number) + 1}.{rest}"] = one.contiguous()
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tiny")
    pipeline, tiny = save_pipeline("narrow", folder / "model"), make_tiny()
    tiny.save_pretrained(folder / "tiny")
    pipeline.vae = tiny
    pipeline.register_modules(vae=tiny)
    return pipeline, tiny, engine.load(folder / "model", vae=folder / "tiny"), folder


@torch.no_grad()
def test_both_ways(both, agrees) -> None:
    _, tiny, sd, _ = both
    images, latents = torch.rand(2, 3, 12, 20) * 2 - 1, 4 * torch.randn(2, 4, 5, 7)
    error = relative_error(sd.vae.encode(images), tiny.encode(images).latents)
    agrees("TAESD encoder", "AutoencoderTiny", error, _TOLERANCE)
    expected = tiny.decode(latents).sample
    error = relative_error(sd.vae.decode(latents), expected)
    agrees("TAESD decoder", "AutoencoderTiny", error, _TOLERANCE)
    assert relative_error(sd.vae.decode(latents, slicing=True), expected) <= _TOLERANCE
    assert relative_error(sd.vae.decode(latents, tiling=True), expected) <= _TOLERANCE, "one tile"


@torch.no_grad()
def test_its_own_size(tmp_path: Path) -> None:
    """The levels and widths of the published one."""
    tiny = make_tiny(channels=64, encoder=(1, 3, 3, 3), decoder=(3, 3, 3, 1))
    save_file({name: one.contiguous() for name, one in tiny.state_dict().items()}, tmp_path / "taesd.safetensors")
    save_pipeline("sd_like", tmp_path / "model")  # whose factor is 8
    sd = engine.load(tmp_path / "model", vae=tmp_path / "taesd.safetensors")
    assert sd.vae.config.factor == 8
    assert sd.vae.config.encoder_blocks == (1, 3, 3, 3)
    latents = torch.randn(1, 4, 8, 8)
    assert relative_error(sd.vae.decode(latents), tiny.decode(latents).sample) <= _TOLERANCE
    save_file(original_decoder(tiny), tmp_path / "taesd_decoder.safetensors")
    decoder = read_tiny_decoder(tmp_path / "taesd_decoder.safetensors", sd.vae)
    assert relative_error(decoder(latents), tiny.decode(latents).sample) <= _TOLERANCE


def test_pictures(both, agrees) -> None:
    pipeline, _, sd, _ = both
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(SD_V1_5_SCHEDULER)
    generator = torch.Generator().manual_seed(3)
    options = {"guidance_scale": 7.5, "height": 16, "width": 24}
    expected = pipeline("a cat", num_inference_steps=4, generator=generator, output_type="np", **options).images
    out = sd.generate("a cat", steps=4, seed=3, output="numpy", progress=False, **options)
    error = relative_error(torch.from_numpy(out.images), torch.from_numpy(expected))
    agrees("pictures through TAESD", "StableDiffusionPipeline", error, 2e-4)
    assert sd.generate("a cat", steps=1, progress=False, vae_tiling=True).images[0].size == (16, 16)


def test_from_a_picture(both) -> None:
    """Its latents are not drawn: the first noise of a seed is the start's."""
    pipeline, _, sd, _ = both
    image_pipeline = diffusers.StableDiffusionImg2ImgPipeline(
        **{name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer", "unet")},
        scheduler=diffusers.DDIMScheduler.from_config(SD_V1_5_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    image_pipeline.set_progress_bar_config(disable=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    options = {"image": picture, "strength": 0.6, "guidance_scale": 5.0}
    generator = torch.Generator().manual_seed(3)
    expected = image_pipeline(
        "a cat", num_inference_steps=6, generator=generator, output_type="latent", **options
    ).images
    out = sd.generate("a cat", steps=6, seed=3, output="latent", progress=False, **options)
    assert relative_error(out.latents, expected) <= 2e-4


def test_a_whole_folder(both, tmp_path: Path) -> None:
    pipeline, tiny, _, _ = both
    pipeline.save_pretrained(tmp_path)
    sd = engine.load(tmp_path)
    assert all(torch.equal(one, sd.vae.state_dict()[name]) for name, one in tiny.state_dict().items())


def test_refusals(both, tmp_path: Path) -> None:
    _, tiny, sd, folder = both
    model, path = folder / "model", tmp_path / "x.safetensors"

    def write(tensors: dict[str, torch.Tensor]) -> Path:
        save_file({name: one.contiguous() for name, one in tensors.items()}, path)
        return path

    with pytest.raises(engine.CheckpointError, match=r"no encoder.layers.0.weight \(a decoder alone is for --preview"):
        engine.load(model, vae=write(original_decoder(tiny)))
    state = tiny.state_dict()
    del state["decoder.layers.3.conv.2.bias"]
    with pytest.raises(engine.CheckpointError, match=r"missing decoder.layers.3.conv.2.bias"):
        engine.load(model, vae=write(state))
    with pytest.raises(engine.CheckpointError, match=r"levels alike, got \(1, 2\) and \(1, 1, 1\)"):
        engine.load(model, vae=write(make_tiny(decoder=(1, 1, 1)).state_dict()))
    with pytest.raises(engine.CheckpointError, match=r"a latent's square of pixels must be 2 to fit .* got 4"):
        read_tiny_decoder(write(make_tiny(decoder=(1, 1, 1)).state_dict()), sd.vae)
    with pytest.raises(engine.CheckpointError, match="latent channels must be 4 to fit the model's VAE, got 16"):
        read_tiny_decoder(write(make_tiny(latent_channels=16).state_dict()), sd.vae)
    rule = "in_channels must be 16, or 33 of an inpainting model, to fit the rest, got 4"
    with pytest.raises(engine.CheckpointError, match=rule):
        engine.load(model, vae=write(make_tiny(latent_channels=16).state_dict()))
    with pytest.raises(engine.CheckpointError, match="not a TAESD decoder"):
        read_tiny_decoder(write({"1.weight": torch.ones(2)}), sd.vae)
    with pytest.raises(engine.CheckpointError, match="there is none"):
        read_tiny_decoder(tmp_path / "none.safetensors", sd.vae)
    make_tiny(act_fn="silu").save_pretrained(tmp_path / "silu")
    with pytest.raises(engine.CheckpointError, match="act_fn must be 'relu', got 'silu'"):
        engine.load(model, vae=tmp_path / "silu")
    with pytest.raises(ValueError, match="a single file holds an AutoencoderKL, got AutoencoderTiny"):
        save_single_file(path, sd.unet, sd.vae, sd.text_encoder.model, sd.schedule, torch.float16)
    assert "encoder.layers.0.weight" in load_file(folder / "tiny" / "diffusion_pytorch_model.safetensors")
