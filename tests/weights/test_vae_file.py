"""Other VAEs: in diffusers' folders and files, and in the original layout, bare or within a checkpoint."""

import re
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import engine
from engine.cli import main
from engine.models.config import VAEConfig
from engine.weights import ldm
from tests.pipelines import make_vae, save_pipeline
from tests.weights.test_ldm import write_single_file


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a VAE alone, with other weights than the small model's."""
    folder = tmp_path_factory.mktemp("other") / "sharp"
    make_vae("narrow", seed=7).save_pretrained(folder)
    return folder


def _original(folder: Path, prefix: str, config: VAEConfig | None = None) -> dict[str, torch.Tensor]:
    """The VAE's tensors in the original layout, its attention as 1x1 convolutions, with what training left."""
    config, tensors = config or VAEConfig.from_dict(make_vae("narrow").config), {}
    for key, value in load_file(folder / "diffusion_pytorch_model.safetensors").items():
        name = ldm.vae_name(config, key).removeprefix(ldm.VAE_PREFIX)
        tensors[prefix + name] = value[:, :, None, None] if ".attn_1." in name and value.ndim == 2 else value
    return {name: value.contiguous() for name, value in tensors.items()}


def _same(sd: engine.Engine, folder: Path) -> bool:
    state, expected = sd.vae.state_dict(), load_file(folder / "diffusion_pytorch_model.safetensors")
    return all(torch.equal(state[name].reshape(weight.shape), weight) for name, weight in expected.items())


def test_folders(small: engine.Engine, small_folder: Path, other: Path, tmp_path: Path) -> None:
    sd = engine.load(small_folder, vae=other)
    assert _same(sd, other)
    assert not _same(small, other)
    assert sd.name == f"{small.name} + sharp"
    assert torch.equal(sd.unet.conv_in.weight, small.unet.conv_in.weight)
    save_pipeline("narrow", tmp_path / "whole", seed=6)  # whose VAE has seed 7
    assert _same(engine.load(small_folder, vae=tmp_path / "whole"), other)


@pytest.mark.parametrize("prefix", ["", ldm.VAE_PREFIX])
def test_files_in_the_original_layout(small_folder: Path, other: Path, tmp_path: Path, prefix: str) -> None:
    tensors = _original(other, prefix)
    tensors |= {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    save_file(tensors, tmp_path / "mse.safetensors")
    sd = engine.load(small_folder, vae=tmp_path / "mse.safetensors")
    assert _same(sd, other)
    assert sd.vae.config == engine.load(small_folder).vae.config


def test_a_vae_of_other_sizes(small_folder: Path, tmp_path: Path) -> None:
    """A folder's come from its config, a file's from the shapes."""
    sizes = {"block_out_channels": (12, 20), "layers_per_block": 2, "norm_num_groups": 4}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    theirs = diffusers.AutoencoderKL(**sizes, **kinds, scaling_factor=0.5)
    theirs.save_pretrained(tmp_path / "wide")
    sd = engine.load(small_folder, vae=tmp_path / "wide")
    assert _same(sd, tmp_path / "wide")
    assert sd.vae.config.scaling_factor == 0.5
    save_file(_original(tmp_path / "wide", "", VAEConfig.from_dict(theirs.config)), tmp_path / "wide.safetensors")
    of_file = engine.load(small_folder, vae=tmp_path / "wide.safetensors")
    assert _same(of_file, tmp_path / "wide")
    assert of_file.vae.config.scaling_factor == 0.18215
    assert of_file.generate("a cat", steps=1, progress=False).images[0].size == (16, 16)


def test_a_file_in_diffusers_layout(small_folder: Path, other: Path) -> None:
    assert _same(engine.load(small_folder, vae=other / "diffusion_pytorch_model.safetensors"), other)


def test_the_vae_of_a_whole_checkpoint(small_folder: Path, other: Path, tmp_path: Path) -> None:
    save_pipeline("narrow", tmp_path / "whole", seed=6)
    write_single_file(tmp_path / "whole", tmp_path / "model.safetensors")
    assert _same(engine.load(small_folder, vae=tmp_path / "model.safetensors"), other)


def test_refusals(small_folder: Path, other: Path, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(engine.CheckpointError, match=r"not a VAE in diffusers' or the original layout: no first_stage"):
        engine.load(small_folder, vae=tmp_path / "x.safetensors")
    with pytest.raises(engine.CheckpointError, match=r"none: a VAE must be a diffusers folder or a .safetensors file"):
        engine.load(small_folder, vae=tmp_path / "none")
    (tmp_path / "vae.pt").write_bytes(b"x")
    with pytest.raises(engine.CheckpointError, match=r"vae.pt: pickle files can run code"):
        engine.load(small_folder, vae=tmp_path / "vae.pt")
    tensors = _original(other, "")
    tensors["decoder.conv_out.bias"] = torch.zeros(5)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(
        engine.CheckpointError, match=re.escape("decoder.conv_out.bias: expected shape (3,), found (5,)")
    ):
        engine.load(small_folder, vae=tmp_path / "bad.safetensors")


def test_command_line(small_folder: Path, other: Path, tmp_path: Path) -> None:
    draw = ["generate", "a cat", "--model", str(small_folder), "--steps", "1", "--quiet", "--out", str(tmp_path)]
    assert main([*draw, "--vae", str(other)]) == 0
    (path,) = tmp_path.iterdir()
    assert f"Model: {small_folder.name} + sharp" in Image.open(path).text["parameters"]
