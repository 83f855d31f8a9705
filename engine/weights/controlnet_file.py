"""A ControlNet's files: a diffusers folder, or a file in diffusers' or the original layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError
from ..models.config import UNetConfig
from ..models.controlnet import ControlNetConfig
from . import ldm
from .checkpoint import find_network, read_config
from .tensors import TensorFile, WeightSource

_FIRST_HINT = "controlnet_cond_embedding.conv_in.weight"
_HINT_BLOCKS = "controlnet_cond_embedding.blocks"
_FIRST_HINT_ORIGINAL = "input_hint_block.0.weight"
_OTHERS = {  # a name that begins so tells another kind of file
    "lora_controlnet": "a Control-LoRA of SDXL",
    "difference": "a difference of two models' weights, to be added to a UNet's",
    "add_embedding.": "a ControlNet of SDXL",
    f"{ldm.CONTROL_PREFIX}label_emb.": "a ControlNet of SDXL",
    "adapter.": "a T2I-Adapter",
    "body.": "a T2I-Adapter",
    "lllite_": "a ControlNet-LLLite of SDXL",
    "task_embedding": "a ControlNet Union of SDXL",
}


def open_controlnet(
    path: Path, own: UNetConfig, config: Path | None, prefer_fp16: bool
) -> tuple[ControlNetConfig, WeightSource, str]:
    """A ControlNet's config, where its weights are, and its name; no weights are read yet.

    Args:
        path: a folder of diffusers, or a ``.safetensors`` file.
        own: of the model's UNet, whose sizes a file's are taken to be where no config says.
        config: for a file, a folder with the ``config.json`` to use; the file's own folder where it has one.
        prefer_fp16: read the fp16 variant where a folder holds both.

    Raises:
        CheckpointError: files are missing, or hold something else.
    """
    if path.is_dir():
        if config is not None:
            raise CheckpointError(f"config belongs to single files; {path} is a folder")
        return _config_of(path), WeightSource(find_network(path, prefer_fp16)), path.name
    if not path.is_file():
        fetched = "on a machine that is online `hf download <id> --local-dir <folder>` makes one"
        raise CheckpointError(f"{path}: a ControlNet must be a diffusers folder or a .safetensors file; {fetched}")
    file = TensorFile(path)
    prefix = _prefix(file)
    if config is None and (path.parent / "config.json").is_file():
        config = path.parent
    if config is not None:
        sizes = _config_of(config)
    else:
        shapes = {name.removeprefix(prefix or ""): entry.shape for name, entry in file.entries.items()}
        sizes = ControlNetConfig(_with_widths(own, shapes), _hint_channels(shapes, is_original=prefix is not None))
    if prefix is None:
        return sizes, WeightSource([file]), path.stem
    n_hint_blocks = 2 * (len(sizes.hint_channels) - 1)

    def original(key: str) -> tuple[str]:
        return (prefix + ldm.controlnet_name(sizes.unet, n_hint_blocks, key).removeprefix(ldm.CONTROL_PREFIX),)

    return sizes, WeightSource([file], original, prefix=prefix), path.stem


def _config_of(folder: Path) -> ControlNetConfig:
    return ControlNetConfig.from_dict(*read_config(folder))


def _prefix(file: TensorFile) -> str | None:
    """What stands before the original layout's names; None for diffusers' own."""
    for start, kind in _OTHERS.items():
        if any(name.startswith(start) for name in file.entries):
            raise CheckpointError(f"{file.path}: it is {kind}, which is not read")
    if _FIRST_HINT in file.entries:
        return None
    for prefix in (ldm.CONTROL_PREFIX, ""):
        if prefix + _FIRST_HINT_ORIGINAL in file.entries:
            return prefix
    wanted = f"{_FIRST_HINT} or {ldm.CONTROL_PREFIX}{_FIRST_HINT_ORIGINAL}"
    raise CheckpointError(f"{file.path}: not a ControlNet in diffusers' or the original layout: no {wanted}")


def _with_widths(own: UNetConfig, shapes: Mapping[str, tuple[int, ...]]) -> UNetConfig:
    """The model's sizes, with the first and the text's width of a file: by them nets of other models are told."""
    first = next((shapes[name] for name in ("conv_in.weight", "input_blocks.0.0.weight") if name in shapes), None)
    text = next((shape for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight")), None)
    widths = own.block_out_channels
    return replace(
        own,
        in_channels=own.out_channels,  # latents alone, also beside an inpainting UNet
        block_out_channels=widths if first is None else (first[0], *widths[1:]),
        cross_attention_dim=own.cross_attention_dim if text is None else text[1],
    )


def _hint_channels(shapes: Mapping[str, tuple[int, ...]], is_original: bool) -> tuple[int, ...]:
    """The widths of the hint's embedding, from the shapes of its convolutions."""
    names = [_FIRST_HINT_ORIGINAL if is_original else _FIRST_HINT]
    while True:
        i = len(names) - 1
        name = f"input_hint_block.{2 * i + 2}.weight" if is_original else f"{_HINT_BLOCKS}.{i}.weight"
        if name not in shapes:
            break
        names.append(name)
    return tuple(shapes[name][0] for name in names[::2])  # of the original layout's the last, left out, is the output's
