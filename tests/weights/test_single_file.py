"""A model that was written as one file is the same when it is read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine
from engine.cli import main
from engine.models.config import ScheduleConfig
from engine.weights.single_file import save_single_file
from tests.loras import write_kohya
from tests.pipelines import save_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("like")
    save_pipeline("sd_like", folder)
    return folder


def test_the_command_merges_and_writes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora, out = write_kohya(engine.load(folder), tmp_path / "lace.safetensors"), tmp_path / "merged.safetensors"
    options = ["--model", str(folder), "--lora", f"{lora}:0.5", "--vae", str(folder)]
    assert main(["convert", *options, "--out", str(out), "--file-dtype", "float32"]) == 0
    assert f"{out}  {out.stat().st_size} bytes" in capsys.readouterr().out
    actual, expected = engine.load(out), engine.load(folder, loras=[engine.LoRA(lora, 0.5)])
    for part in ("unet", "vae"):
        state = getattr(actual, part).state_dict()
        assert all(torch.equal(weight, state[name]) for name, weight in getattr(expected, part).state_dict().items())
    state = actual.text_encoder.model.state_dict()
    assert all(torch.equal(one, state[name]) for name, one in expected.text_encoder.model.state_dict().items())
    assert main(["convert", *options, "--out", str(out)]) == 0
    assert all(weight.dtype == torch.float16 for weight in load_file(out).values())
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_an_inpainting_model(tmp_path: Path) -> None:
    """Its nine channels are read off the file's own shapes."""
    save_pipeline("sd_like", tmp_path / "folder", in_channels=9)
    sd, path = engine.load(tmp_path / "folder"), tmp_path / "inpainting.safetensors"
    save_single_file(path, sd.unet, sd.vae, sd.text_encoder.model, sd.schedule, torch.float32)
    again = engine.load(path)
    assert again.unet.config.in_channels == 9
    assert again.limits.takes_masks
    assert torch.equal(again.unet.conv_in.weight, sd.unet.conv_in.weight)


def test_what_a_file_cannot_tell_is_refused(folder: Path, small: engine.Engine, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="a single file does not tell heads, so that must be SD v1's, 8, got 3"):
        save_single_file(path, small.unet, small.vae, small.text_encoder.model, small.schedule, torch.float16)
    sd = engine.load(folder)
    parts = path, sd.unet, sd.vae, sd.text_encoder.model
    with pytest.raises(ValueError, match="does not tell the schedule"):
        save_single_file(*parts, ScheduleConfig(prediction_type="v_prediction"), torch.float16)
    sd.vae.decoder.conv_in.weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"decoder.conv_in.weight: values overflow torch.float16"):
        save_single_file(*parts, sd.schedule, torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_command_refusals(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert = ["convert", "--model", str(folder), "--out"]
    for options, message in (
        ([str(tmp_path / "x.ckpt")], "out must be a .safetensors file in an existing folder"),
        ([str(tmp_path / "none" / "x.safetensors")], "out must be a .safetensors file in an existing folder"),
        ([str(tmp_path / "x.safetensors"), "--file-dtype", "int8"], "file-dtype must be one of float16, bfloat16"),
    ):
        assert main([*convert, *options]) == 1
        assert message in capsys.readouterr().err
