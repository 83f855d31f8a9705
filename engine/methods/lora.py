"""LoRAs: changes of a model's weights from files, which make another model of it and leave it as it is."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checks import check_number
from ..models.config import UNetConfig
from ..models.unet import UNet2DConditionModel
from ..text.encoder import TextEncoder
from ..weights.lora_file import PEFT_CONFIG, find_lora, read_lora
from ..weights.lora_keys import TEXT, UNET
from ..weights.lora_layer import LoRALayer
from ..weights.tensors import place

_LARGEST = 100.0


@dataclass(frozen=True, slots=True)
class LoRA:
    """A LoRA file and how much of it to use.

    Kohya's, diffusers', peft's and LyCORIS' files (LoRA, LoCon, LoHa, LoKr, differences, with or without DoRA) are told
    apart by their keys. Changes of several add up; among those of peft's DoRA the order counts.

    Attributes:
        path: a .safetensors file, or a folder that diffusers or peft wrote.
        weight: factor on its change of the UNet, -100 to 100; 0 leaves the UNet alone.
        text_weight: likewise of the text encoder; ``weight`` where not given.

    Raises:
        CheckpointError: there is no such file.
        ValueError: a weight is not a number in that range.
    """

    path: str | Path
    weight: float = 1.0
    text_weight: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", find_lora(Path(self.path)))
        for name in ("weight", "text_weight"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_number(name, getattr(self, name), -_LARGEST, _LARGEST))

    @property
    def weights(self) -> dict[str, float]:
        """The factor on each network."""
        return {UNET: self.weight, TEXT: self.weight if self.text_weight is None else self.text_weight}

    def digest(self) -> str:
        """SHA-256 of what it does, wherever the file lies."""
        found = hashlib.sha256(repr(self.weights).encode())
        for path in (Path(self.path), Path(self.path).parent / PEFT_CONFIG):
            found.update(path.read_bytes() if path.is_file() else b"")
        return found.hexdigest()

    def settings(self) -> dict[str, Any]:
        """How a result describes it."""
        path = Path(self.path)
        name = path.stem if path.stem not in _FILE_NAMES else path.parent.name
        return {"name": name, "weight": self.weights[UNET], "text_weight": self.weights[TEXT]}


_FILE_NAMES = ("pytorch_lora_weights", "adapter_model")  # of every such file; its folder tells more


def asked_lora(text: str) -> LoRA:
    """A LoRA as a command line asks for it, ``FILE`` or ``FILE:WEIGHT``."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return LoRA(text)
    try:
        factor = float(weight)
    except ValueError as error:
        raise ValueError(f"lora must be FILE or FILE:WEIGHT with a number, got {text!r}") from error
    return LoRA(path, factor)


class Changes:
    """What LoRAs change of one network: by parameter, their layers in order."""

    def __init__(self, layers: Sequence[LoRALayer]) -> None:
        self.layers = defaultdict[str, list[LoRALayer]](list)
        for layer in layers:
            self.layers[layer.parameter].append(layer)

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """A weight with all changes, formed in float32; as it is where there are none."""
        if name not in self.layers:
            return weight
        base = merged = weight.detach().float()
        for layer in self.layers[name]:
            merged = layer.apply(merged, base)
        return merged

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """The network's parameters that change, as they become, in its device and dtype."""
        state = network.state_dict()
        return {
            name: place(str(layers[-1].file.path), self(name, state[name]), state[name].device, state[name].dtype)
            for name, layers in self.layers.items()
        }


def read_changes(
    loras: Sequence[LoRA], config: UNetConfig, unet: nn.Module, text: nn.Module
) -> tuple[Changes, Changes]:
    """What LoRAs change of the UNet and of the text encoder, of which only names and shapes are read.

    Raises:
        CheckpointError: a file does not fit the model; see ``lora_file.read_lora``.
        ValueError: they are not a list of LoRAs.
    """
    if not isinstance(loras, list | tuple) or not all(isinstance(lora, LoRA) for lora in loras):
        raise ValueError(f"loras must be a list of engine.LoRA, got {loras!r}")
    found = [one for lora in loras for one in read_lora(Path(lora.path), lora.weights, config, unet, text)]
    of_unet, of_text = ([layer for network, layer in found if network == one] for one in (UNET, TEXT))
    return Changes(of_unet), Changes(of_text)


def apply_loras(
    loras: Sequence[LoRA], unet: UNet2DConditionModel, text_encoder: TextEncoder
) -> tuple[UNet2DConditionModel, TextEncoder]:
    """Both networks with LoRAs; what no LoRA touches is shared with the ones given, down to the tensor."""
    of_unet, of_text = read_changes(loras, unet.config, unet, text_encoder.model)
    return (
        unet.with_weights(of_unet.weights(unet)) if of_unet.layers else unet,
        text_encoder.with_weights(of_text.weights(text_encoder.model)) if of_text.layers else text_encoder,
    )
