"""Another VAE for a model: a diffusers folder, or a file in diffusers' or the original layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError
from ..models.config import VAEConfig
from ..models.tiny_vae import TinyVAEConfig
from . import ldm
from .checkpoint import Checkpoint, open_vae_folder
from .tensors import TensorFile, WeightSource
from .tiny_vae_file import is_tiny, open_tiny_vae

_NOT_WEIGHTS = ("loss.", "model_ema.")  # of training, which the original layout's files may still hold


def with_vae(checkpoint: Checkpoint, path: Path, prefer_fp16: bool) -> Checkpoint:
    """A checkpoint whose VAE is another.

    Args:
        checkpoint: the model's own; a file's scaling factor and group count are this one's, for files tell neither.
        path: a folder with the VAE's config, or with a folder ``vae``; or a ``.safetensors`` file.
        prefer_fp16: see ``open_checkpoint``.

    Raises:
        CheckpointError: there is no VAE.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        config, source = open_vae_folder(folder, prefer_fp16)
    elif path.is_file():
        config, source = _open_file(TensorFile(path), checkpoint.vae_config)
    else:
        raise CheckpointError(f"{path}: a VAE must be a diffusers folder or a .safetensors file; there is none")
    return replace(checkpoint, name=f"{checkpoint.name} + {path.stem}", vae_config=config, vae=source)


def _open_file(file: TensorFile, own: VAEConfig | TinyVAEConfig) -> tuple[VAEConfig | TinyVAEConfig, WeightSource]:
    if is_tiny(file):
        return open_tiny_vae([file])
    if isinstance(own, TinyVAEConfig):
        raise CheckpointError(f"{file.path}: give a diffusers folder: the model's own VAE tells nothing of this one's")
    if any(name.startswith("decoder.up_blocks.") for name in file.entries):
        return own, WeightSource([file])
    prefix = ldm.VAE_PREFIX if any(name.startswith(ldm.VAE_PREFIX) for name in file.entries) else ""
    shapes = {ldm.VAE_PREFIX + name.removeprefix(prefix): one.shape for name, one in file.entries.items()}
    try:
        sizes = ldm.infer_vae(shapes)
    except KeyError as error:
        raise CheckpointError(
            f"{file.path}: not a VAE in diffusers' or the original layout: no {error.args[0]}"
        ) from error
    same = {"norm_num_groups": own.norm_num_groups, "scaling_factor": own.scaling_factor}
    config = VAEConfig.from_dict(sizes | same, str(file.path))
    return config, WeightSource(
        [file],
        lambda key: (prefix + ldm.vae_name(config, key).removeprefix(ldm.VAE_PREFIX),),
        prefix=prefix,
        ignored=lambda name: name.startswith(_NOT_WEIGHTS),
    )
