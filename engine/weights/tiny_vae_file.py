"""TAESD's files: diffusers' ``AutoencoderTiny``, and the decoder alone in the original layout."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..models.tiny_vae import VAE, DecoderTiny, TinyVAEConfig
from .tensors import TensorFile, WeightSource, load_module

_ENCODER, _DECODER = "encoder.layers.", "decoder.layers."
_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
    "scaling_factor": (1, 1.0),
    "shift_factor": (0, 0.0),
}
# what of a config the shapes tell, or what acts on quantised latents alone, or in float16 of SDXL
_TOLD = {
    *("in_channels", "out_channels", "latent_channels", "block_out_channels", "encoder_block_out_channels"),
    *("decoder_block_out_channels", "num_encoder_blocks", "num_decoder_blocks"),
    *("latent_magnitude", "latent_shift", "force_upcast"),
}
_ORIGINAL_BLOCK = re.compile(r"\d+\.conv\.0\.weight")


def is_tiny(file: TensorFile) -> bool:
    """Whether a file is of a TAESD, in either layout."""
    return any(name.startswith(_DECODER) or _ORIGINAL_BLOCK.fullmatch(name) for name in file.entries)


def open_tiny_vae(
    files: Sequence[TensorFile], config: Mapping[str, Any] | None = None, where: str = ""
) -> tuple[TinyVAEConfig, WeightSource]:
    """Sizes and weights of both halves.

    Args:
        files: in diffusers' layout.
        config: of a diffusers folder, and ``where`` it is from; sizes are read from the tensors' shapes.

    Raises:
        CheckpointError: a half is missing, as in the original's files, or it computes otherwise.
    """
    for key, value in (config or {}).items():
        if key in _FIXED and value not in _FIXED[key]:
            raise CheckpointError(f"{where}: {key} must be {_FIXED[key][0]!r}, got {value!r}")
        if key not in _FIXED and key not in _TOLD and not key.startswith("_") and value not in (None, False):
            raise CheckpointError(f"{where}: {key} = {value!r} is not part of an AutoencoderTiny")
    shapes = {name: entry.shape for file in files for name, entry in file.entries.items()}
    path = files[0].path
    for half in (_ENCODER, _DECODER):
        if f"{half}0.weight" not in shapes:
            rule = "a VAE must have encoder and decoder, in diffusers' layout"
            raise CheckpointError(f"{path}: {rule}; found no {half}0.weight (a decoder alone is for --preview-vae)")
    encoder, decoder = _blocks(shapes, _ENCODER), _blocks(shapes, _DECODER)
    if len(encoder) != len(decoder):
        raise CheckpointError(f"{path}: encoder and decoder must have levels alike, got {encoder} and {decoder}")
    return _config(shapes, _DECODER, decoder, encoder), WeightSource(files)


def read_tiny_decoder(path: Path, vae: VAE) -> DecoderTiny:
    """The decoder for the latents of ``vae``, on its device and in its dtype.

    Args:
        path: a ``.safetensors`` file: diffusers' of a whole ``AutoencoderTiny``, or the original ``taesd_decoder``.
        vae: the model's.

    Raises:
        CheckpointError: it is none, or one for latents of another kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: a TAESD must be a .safetensors file; there is none")
    file = TensorFile(path)
    prefix, ahead = (_DECODER, 0) if f"{_DECODER}0.weight" in file.entries else ("", 1)  # the original's layer 0 clamps
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    if f"{prefix}{ahead}.weight" not in shapes or not is_tiny(file):
        raise CheckpointError(f"{path}: not a TAESD decoder: no {_DECODER}0.weight, and no 1.weight beside blocks")
    config = _config(shapes, prefix, _blocks(shapes, prefix), ())
    for name, found, expected in (
        ("latent channels", config.latent_channels, vae.config.latent_channels),
        ("the size of a latent's square of pixels", config.factor, vae.config.factor),
    ):
        if found != expected:
            raise CheckpointError(f"{path}: {name} must be {expected} to fit the model's VAE, got {found}")

    def names(key: str) -> tuple[str, ...]:
        number, _, rest = key.removeprefix("layers.").partition(".")
        return (f"{prefix}{int(number) + ahead}.{rest}",)

    with torch.device("meta"):
        decoder = DecoderTiny(config)
    source = WeightSource([file], names, prefix=prefix, ignored=lambda name: name.startswith(_ENCODER))
    load_module(decoder, source, vae.weight.device, vae.weight.dtype)
    return decoder


def _blocks(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> tuple[int, ...]:
    """How many residual blocks stand between one plain convolution and the next."""
    convolutions = _numbers(shapes, prefix, r"\.weight")
    blocks = _numbers(shapes, prefix, r"\.conv\.0\.weight")
    return tuple(sum(first < block < last for block in blocks) for first, last in pairwise(convolutions))


def _numbers(shapes: Mapping[str, tuple[int, ...]], prefix: str, rest: str) -> list[int]:
    found = (re.fullmatch(rf"{re.escape(prefix)}(\d+){rest}", name) for name in shapes)
    return sorted(int(one.group(1)) for one in found if one)


def _config(
    shapes: Mapping[str, tuple[int, ...]], prefix: str, decoder: tuple[int, ...], encoder: tuple[int, ...]
) -> TinyVAEConfig:
    first, *_, last = (shapes[f"{prefix}{number}.weight"] for number in _numbers(shapes, prefix, r"\.weight"))
    return TinyVAEConfig(first[1], first[0], encoder, decoder, out_channels=last[0])
