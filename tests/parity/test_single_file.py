"""Single files in the original layout, as diffusers understands them."""

from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file

import engine
from engine.weights.single_file import save_single_file
from tests.pipelines import save_pipeline


def test_diffusers_reads_what_we_write(tmp_path: Path) -> None:
    """By its own tables of names, tensor by tensor."""
    pipeline = save_pipeline("sd_like", tmp_path / "folder")
    sd, path = engine.load(tmp_path / "folder"), tmp_path / "model.safetensors"
    save_single_file(path, sd.unet, sd.vae, sd.text_encoder.model, sd.schedule, torch.float32)
    tensors = load_file(path)
    assert (
        tensors["first_stage_model.encoder.mid.attn_1.q.weight"].ndim == 4
    )  # a convolution there, linear in diffusers
    unet = convert_ldm_unet_checkpoint(dict(tensors), dict(pipeline.unet.config))
    vae = convert_ldm_vae_checkpoint(dict(tensors), dict(pipeline.vae.config))
    text = convert_ldm_clip_checkpoint(dict(tensors))
    text = {name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    for theirs, ours in ((unet, sd.unet), (vae, sd.vae), (text, sd.text_encoder.model)):
        state = ours.state_dict()
        assert theirs.keys() == state.keys()
        assert all(torch.equal(theirs[name].reshape(one.shape), one) for name, one in state.items())
