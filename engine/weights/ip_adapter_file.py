"""IP-Adapter files: the original layout, and diffusers' names as a UNet with an adapter saves them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.image_projection import ImageProjection, IPAdapterPlusImageProjection, make_projection
from .tensors import TensorFile, place

_PROJECTION, _ATTENTION = "image_proj.", "ip_adapter."
_ORIGINAL = re.compile(r"ip_adapter\.(\d+)\.(to_[kv])_ip\.weight")
_DIFFUSERS = re.compile(r"(?:unet\.)?(.+\.attn2)\.processor\.(to_[kv])_ip\.0\.weight")
_DIFFUSERS_PROJECTION = re.compile(r"(?:unet\.)?encoder_hid_proj\.image_projection_layers\.0\.(.+)")
_PLAIN = {"proj": "image_embeds", "norm": "norm"}
_BLOCK = {  # what stands behind "layers.<i>." in the original's resampler
    "0.norm1": "ln0",
    "0.norm2": "ln1",
    "0.to_q": "attn.to_q",
    "0.to_out": "attn.to_out.0",
    "1.0": "ff.0",
    "1.1": "ff.1.net.0.proj",
    "1.3": "ff.1.net.2",
}
_OTHERS = (  # by a part of a name that nothing else has
    ("_lora.", "an IP-Adapter FaceID, which needs a face recogniser's embeddings"),
    ("perceiver_resampler.", "an IP-Adapter FaceID Plus, which needs a face recogniser's embeddings"),
    ("image_proj.proj.3.", "an IP-Adapter Full Face; IP-Adapter Plus Face is read"),
    ("image_proj.proj.2.", "an IP-Adapter FaceID, which needs a face recogniser's embeddings"),
    ("lora_unet_", "a LoRA; use engine.LoRA"),
    ("control_model.", "a ControlNet"),
    ("controlnet_cond_embedding.", "a ControlNet"),
)
_ADVICE = """pickle files can run code when read; convert it first:
    import torch
    from safetensors.torch import save_file
    state = torch.load("{name}", map_location="cpu", weights_only=True)
    save_file({{f"{{part}}.{{k}}": v.contiguous() for part in state for k, v in state[part].items()}}, "{target}")"""

Projection = ImageProjection | IPAdapterPlusImageProjection


@dataclass(frozen=True, slots=True)
class IPAdapterWeights:
    """What an adapter adds to a UNet.

    Attributes:
        projection: a picture's features to tokens.
        layers: by cross-attention layer, in the order that was asked for, its projections of these tokens to keys and
            values, each (C, E).
    """

    projection: Projection
    layers: dict[str, tuple[Tensor, Tensor]]


def read_ip_adapter(
    path: Path, layers: Mapping[str, tuple[int, int]], device: torch.device, dtype: torch.dtype
) -> IPAdapterWeights:
    """Read an adapter; every key is used, every shape and value checked.

    Args:
        path: a ``.safetensors`` file.
        layers: the UNet's cross-attention layers in forward order, and the shape (C, E) of their projections.
        device, dtype: where the weights go, and their type.

    Raises:
        CheckpointError: it is no adapter, one of a kind that is not read, damaged, or of another model.
    """
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        advice = _ADVICE.format(name=path.name, target=f"{path.stem}.safetensors")
        raise CheckpointError(f"{path}: {advice}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    file = TensorFile(path)
    projection, attention = _sorted(file, list(layers))
    state = {name: place(f"{path}: {name}", _finite(file, name, read()), device, dtype) for name, read in projection}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, expected in layers.items():
        pair = [_weight(file, attention, f"{layer}.{part}", expected, device, dtype) for part in ("to_k", "to_v")]
        found[layer] = (pair[0], pair[1])
    if extra := sorted(attention.keys() - {f"{layer}.{part}" for layer in layers for part in ("to_k", "to_v")}):
        raise CheckpointError(f"{path}: this model has no cross-attention projection {extra[0]}")
    tokens_to_text = _filled(path, state)
    for layer, (_, width) in layers.items():
        if width != tokens_to_text.out_features:
            rule = f"the projection's tokens must be as wide as {layer} takes them, {width}"
            raise CheckpointError(f"{path}: {rule}, got {tokens_to_text.out_features}")
    return IPAdapterWeights(tokens_to_text, found)


_Read = Callable[[], Tensor]


def _sorted(file: TensorFile, layers: Sequence[str]) -> tuple[list[tuple[str, _Read]], dict[str, str]]:
    """The projection's tensors by diffusers' names, and the file's names of keys and values by the UNet's."""
    for name in file.entries:
        for part, what in _OTHERS:
            if part in name:
                raise CheckpointError(f"{file.path}: {name}: this is {what}; plain and Plus IP-Adapters are read")
    projection: list[tuple[str, _Read]] = []
    attention: dict[str, str] = {}
    numbers = [f"{2 * i + 1}" for i in range(len(layers))]
    by_number = dict(zip(numbers, _diffusers_order(layers), strict=True))
    for name in file.entries:
        if found := _ORIGINAL.fullmatch(name):
            if found.group(1) not in by_number:
                rule = f"this model's {len(layers)} layers are numbered 1, 3 ... {numbers[-1]}"
                raise CheckpointError(f"{file.path}: {name}: {rule}")
            attention[f"{by_number[found.group(1)]}.{found.group(2)}"] = name
        elif found := _DIFFUSERS.fullmatch(name):
            attention[f"{found.group(1)}.{found.group(2)}"] = name
        elif found := _DIFFUSERS_PROJECTION.fullmatch(name):
            projection.append((found.group(1), _reader(file, name)))
        elif name.startswith(_PROJECTION):
            projection += _renamed(file, name)
        else:
            raise CheckpointError(f"{file.path}: not an IP-Adapter: unexpected {name}")
    return projection, attention


def _diffusers_order(layers: Sequence[str]) -> list[str]:
    """Layers as files number them, in the order of diffusers' modules: the middle comes last."""
    return [*(name for name in layers if "mid_block" not in name), *(name for name in layers if "mid_block" in name)]


def _reader(file: TensorFile, name: str, half: int | None = None) -> _Read:
    """Reads a tensor, or one of its two halves."""
    return lambda: file.read(name) if half is None else file.read(name).chunk(2)[half]


def _renamed(file: TensorFile, name: str) -> list[tuple[str, _Read]]:
    """A tensor of the original's projection by diffusers' name; keys and values of a resampler are one there."""
    own = name.removeprefix(_PROJECTION)
    module, _, parameter = own.rpartition(".")
    if module in _PLAIN:
        return [(f"{_PLAIN[module]}.{parameter}", _reader(file, name))]
    if found := re.fullmatch(r"layers\.(\d+)\.(.+)", module):
        i, place_in_block = found.groups()
        if place_in_block == "0.to_kv":
            return [
                (f"layers.{i}.attn.{part}.weight", _reader(file, name, k)) for k, part in enumerate(("to_k", "to_v"))
            ]
        if place_in_block in _BLOCK:
            return [(f"layers.{i}.{_BLOCK[place_in_block]}.{parameter}", _reader(file, name))]
    return [(own, _reader(file, name))]


def _filled(path: Path, state: Mapping[str, Tensor]) -> Projection:
    try:
        with torch.device("meta"):
            projection = make_projection({name: tuple(tensor.shape) for name, tensor in state.items()})
    except (KeyError, ValueError) as error:
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path}: not the projection of an IP-Adapter: {reason}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in projection.state_dict().items()}
    for name in sorted(expected.keys() | state.keys()):
        shapes = expected.get(name), tuple(state[name].shape) if name in state else None
        if shapes[0] != shapes[1]:
            raise CheckpointError(f"{path}: projection: {name}: expected shape {shapes[0]}, found {shapes[1]}")
    projection.load_state_dict(dict(state), strict=True, assign=True)
    nn.Module.requires_grad_(projection.eval(), False)
    return projection


def _weight(
    file: TensorFile,
    names: Mapping[str, str],
    wanted: str,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    if wanted not in names:
        raise CheckpointError(f"{file.path}: {wanted}_ip is missing, which this model's cross-attention needs")
    name = names[wanted]
    found = file.entries[name].shape
    if found != shape:
        kind = "; it is for SDXL" if found[1:] == (2048,) else ""
        raise CheckpointError(f"{file.path}: {name}: this model's is {shape}, found {found}{kind}")
    return place(f"{file.path}: {name}", _finite(file, name, file.read(name)), device, dtype)


def _finite(file: TensorFile, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
        raise CheckpointError(f"{file.path}: {name}: expected finite numbers, found NaN, infinity or {tensor.dtype}")
    return tensor
