"""LoRA files of kohya, diffusers, peft and LyCORIS, told apart by their keys, as changes of a model's weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CheckpointError
from ..models.config import UNetConfig
from .lora_keys import PEFT_PREFIX, TEXT, UNET, find_layers
from .lora_layer import LoRALayer, rank_of
from .tensors import TensorFile

_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # in a folder: diffusers', peft's
PEFT_CONFIG = "adapter_config.json"
_MAX_CONFIG_BYTES = 1_000_000
_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's configurations
_METADATA_PREFIXES = {UNET: "unet.", TEXT: "text_encoder."}
_KINDS = ("LORA", "LOHA", "LOKR")
_CHANGES_ARITHMETIC = ("fan_in_fan_out", "use_qalora", "use_bdlora", "layer_replication", "lora_bias")


def find_lora(path: Path) -> Path:
    """The file itself, or the one that diffusers or peft wrote into a folder."""
    found = path if not path.is_dir() else next((path / name for name in _NAMES if (path / name).is_file()), None)
    if found is None or not found.is_file():
        rule = f"must be a .safetensors file, or a folder with {' or '.join(_NAMES)}"
        raise CheckpointError(f"{path}: a LoRA {rule}; there is none")
    return found


def read_lora(
    path: Path, weights: Mapping[str, float], config: UNetConfig, unet: nn.Module, text: nn.Module
) -> list[tuple[str, LoRALayer]]:
    """The layers of a LoRA file, each with its network; every key is used, and every shape checked.

    Args:
        path: the file; see ``find_lora``.
        weights: factor by network, ``UNET`` and ``TEXT``. What has the factor 0 is checked too, and left out.
        config: the UNet's.
        unet, text: the two networks; only names and shapes are read.

    Raises:
        CheckpointError: the file is damaged, no LoRA, or for another model; the message says what it is.
    """
    file = TensorFile(path)
    shapes = {UNET: _shapes(unet), TEXT: _shapes(text)}
    found = find_layers(path, {key: one.shape for key, one in file.entries.items()}, config, *shapes.values())
    configs, layers = _peft_configs(file), []
    for (network, parameter), keys in found.items():
        scale = _scale(file, keys, parameter, configs.get(network))
        layer = LoRALayer(file, keys, parameter, scale, weights[network])
        layer.check(shapes[network][parameter])
        if layer.weight:
            layers.append((network, layer))
    return layers


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in network.state_dict().items()}


def _scale(file: TensorFile, keys: Mapping[str, str], parameter: str, config: Mapping[str, Any] | None) -> float:
    """``alpha / rank``; where a file is silent, or says 0, kohya and diffusers take the rank for alpha."""
    rank = rank_of(file, keys)
    if config is not None:
        rank = rank or _by_pattern(config, "rank_pattern", parameter) or config.get("r")
        alpha = _by_pattern(config, "alpha_pattern", parameter) or config.get("lora_alpha", config.get("alpha"))
        rank, alpha = _positive(file.path, "r", rank), _positive(file.path, "alpha", alpha)
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if "alpha" not in keys or not rank:
        return 1.0
    tensor = file.read(keys["alpha"])
    alpha = float(tensor) if tensor.numel() == 1 else math.nan
    if not math.isfinite(alpha) or alpha < 0:
        raise CheckpointError(f"{file.path}: {keys['alpha']} must be one number >= 0, found {tensor.tolist()}"[:300])
    return alpha / rank if alpha else 1.0


def _positive(path: Path, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"{path}: {name} must be a positive number, found {value!r}")
    return float(value)


def _peft_configs(file: TensorFile) -> dict[str, Mapping[str, Any]]:
    """peft's configuration of each network: beside its own files, or within diffusers'."""
    if any(key.startswith(PEFT_PREFIX) for key in file.entries):
        path = file.path.parent / PEFT_CONFIG
        if not path.is_file() or path.stat().st_size > _MAX_CONFIG_BYTES:
            raise CheckpointError(f"{file.path}: peft keeps alpha in {PEFT_CONFIG}, which must lie beside it")
        config = _json(path, path.read_text(encoding="utf-8", errors="replace"))
        return {UNET: _checked(path, config), TEXT: _checked(path, config)}
    if _METADATA not in file.metadata:
        return {}
    config = _json(file.path, file.metadata[_METADATA])
    if "r" in config:  # of a network that was saved by itself
        return {UNET: _checked(file.path, config), TEXT: _checked(file.path, config)}
    networks = {
        network: {key[len(prefix) :]: value for key, value in config.items() if key.startswith(prefix)}
        for network, prefix in _METADATA_PREFIXES.items()
    }
    return {network: _checked(file.path, one) for network, one in networks.items() if one}


def _json(path: Path, text: Any) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: peft's configuration is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: peft's configuration must be a JSON object, found {type(value).__name__}")
    return value


def _checked(path: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = config.get("peft_type", _KINDS[0])
    if kind not in _KINDS:
        raise CheckpointError(f"{path}: peft_type must be one of {', '.join(_KINDS)}, found {kind!r}")
    for name in _CHANGES_ARITHMETIC:
        if config.get(name):
            raise CheckpointError(f"{path}: {name} must be off, found {config[name]!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise CheckpointError(f"{path}: {name} must be a JSON object, found {config[name]!r}")
    return config


def _by_pattern(config: Mapping[str, Any], name: str, parameter: str) -> Any:
    """What a table of module names, or of their ends, says of a parameter; None where it says nothing.

    To peft a name is a regular expression. Only plain names are read: an expression from a stranger may run for ever.
    """
    module = parameter.rpartition(".")[0]
    for pattern, value in (config.get(name) or {}).items():
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            raise CheckpointError(f"{name} must hold names of modules, found {pattern!r}")
        if module == plain or (module.endswith(f".{plain}") and not pattern.startswith("^")):
            return value
    return None
