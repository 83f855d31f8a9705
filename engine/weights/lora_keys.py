"""The keys of LoRA files: which layer of which network each tensor belongs to, and what it is there.

Trainers write the same layers under many names. Here a name is flattened ("." to "_") and looked up among all that a
layer of this model may be called, so a key is understood exactly or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import CheckpointError
from ..models.config import UNetConfig
from .ldm import UNET_PREFIX, unet_name

UNET, TEXT = "unet", "text encoder"
PEFT_PREFIX = "base_model.model."

Shapes = Mapping[str, tuple[int, ...]]
Layers = dict[tuple[str, str], dict[str, str]]  # (network, parameter) -> part -> key

_PREFIXES = {  # whose layers a key may name; the longest that fits
    "lora_unet_": (UNET,),  # kohya
    "lora_te_": (TEXT,),
    "lycoris_": (UNET, TEXT),
    "unet.": (UNET,),  # diffusers
    "text_encoder.": (TEXT,),
    PEFT_PREFIX: (UNET, TEXT),
    "": (UNET, TEXT),
}
_PARTS = {
    ".lora_up.weight": "up",  # kohya, LyCORIS
    ".lora_down.weight": "down",
    ".lora_mid.weight": "mid",
    ".lora_B.weight": "up",  # peft
    ".lora_A.weight": "down",
    ".lora.up.weight": "up",  # diffusers, in three generations
    ".lora.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    "_lora.up.weight": "up",
    "_lora.down.weight": "down",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".dora_scale": "dora_scale",
    ".alpha": "alpha",
    **{f".hada_{part}": part for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": f"kron_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".diff": "diff",
    ".w_norm": "diff",
    ".diff_b": "bias",
    ".b_norm": "bias",
}
_NOT_READ = {  # by what a key holds, in words; the first that fits
    "lora_te1_": "SDXL, which has two text encoders",
    "lora_te2_": "SDXL, which has two text encoders",
    "text_encoder_2.": "SDXL, which has two text encoders",
    "double_blocks": "FLUX",
    "single_transformer_blocks": "FLUX",
    "joint_blocks": "Stable Diffusion 3",
    "transformer.transformer_blocks": "Stable Diffusion 3 or another diffusion transformer",
    "lora_prior_": "Stable Cascade",
    "lllite_": "a ControlNet-LLLite",
    "control_model.": "a ControlNet",
    "controlnet_cond_embedding": "a ControlNet",
    "ip_adapter": "an IP-Adapter",
    "first_stage_model.": "a whole checkpoint, which engine.load reads",
    "emb_params": "an embedding, which engine.import_textual_inversion reads",
    "_custom_diffusion.": "Custom Diffusion, which engine.import_custom_diffusion reads",
    ".oft_": "OFT or BOFT, a form that is not read",
    ".on_input": "IA3, a form that is not read",
    ".a1.weight": "GLoRA, a form that is not read",
    "lora_embedding_": "a LoRA of token embeddings, a form that is not read",
}
_TEXT_WIDTHS = {1024: "Stable Diffusion 2", 2048: "SDXL"}


def find_layers(path: Path, shapes: Shapes, config: UNetConfig, unet: Iterable[str], text: Iterable[str]) -> Layers:
    """Where every tensor of a LoRA file belongs.

    Args:
        path: for messages.
        shapes: of the file's tensors.
        config: the UNet's.
        unet, text: the two networks' parameter names.

    Raises:
        CheckpointError: a key belongs nowhere, two are one, or the file is for another kind of model.
    """
    names = {UNET: _unet_names(config, unet), TEXT: _text_names(text)}
    layers, unknown = Layers(), list[str]()
    for key in shapes:
        found = _find(key, names)
        if found is None:
            unknown.append(key)
            continue
        network, parameter, part = found
        parts = layers.setdefault((network, parameter), {})
        if part in parts:
            raise CheckpointError(f"{path}: {key} and {parts[part]} both are the {part} of {parameter}")
        parts[part] = key
    _check_width(path, shapes, config.cross_attention_dim)
    if unknown or not layers:
        raise CheckpointError(f"{path}: {_complaint(shapes, sorted(unknown))}")
    return layers


def _find(key: str, names: Mapping[str, Mapping[str, str]]) -> tuple[str, str, str] | None:
    """The network, the parameter and the part that a key names."""
    ending = next((end for end in sorted(_PARTS, key=len, reverse=True) if key.endswith(end)), None)
    if ending is None:
        return None
    prefix = next(start for start in sorted(_PREFIXES, key=len, reverse=True) if key.startswith(start))
    name, part = key[len(prefix) : -len(ending)].replace(".", "_"), _PARTS[ending]
    for network in _PREFIXES[prefix]:
        if name in names[network]:
            of_bias = part == "bias"
            return network, f"{names[network][name]}.{'bias' if of_bias else 'weight'}", "diff" if of_bias else part
    return None


def _unet_names(config: UNetConfig, parameters: Iterable[str]) -> dict[str, str]:
    """All flattened names of the UNet's modules: diffusers', the original layout's, and of old attention processors."""
    names = {}
    for parameter in parameters:
        module, _, kind = parameter.rpartition(".")
        if kind == "weight":
            original = unet_name(config, parameter).removeprefix(UNET_PREFIX).removesuffix(".weight")
            processor = module.replace(".to_", ".processor.to_").removesuffix(".0") if ".attn" in module else module
            names |= {name.replace(".", "_"): module for name in (module, original, processor)}
    return names


def _text_names(parameters: Iterable[str]) -> dict[str, str]:
    """All flattened names of the text encoder's modules, with and without the prefix that transformers 5 dropped."""
    names = {}
    for parameter in parameters:
        module, _, kind = parameter.rpartition(".")
        if kind == "weight":
            name = module.removeprefix("text_model.").replace(".", "_")
            old = name.replace("attn_out_proj", "attn_to_out") if name.endswith("out_proj") else name
            for one in "qkv":
                old = old.replace(f"attn_{one}_proj", f"attn_to_{one}")
            names |= {f"{start}{one}": module for start in ("", "text_model_") for one in (name, old)}
    return names


def _check_width(path: Path, shapes: Shapes, expected: int) -> None:
    """Tell by the text that cross-attention reads which model a file is for; the layers' names are the same in some."""
    for key, shape in shapes.items():
        if "attn2" in key and "to_k" in key and key.endswith(("down.weight", "lora_A.weight")) and len(shape) > 1:
            if shape[1] != expected:
                what = _TEXT_WIDTHS.get(shape[1], "another model")
                rule = f"it is for {what}: {key} reads text of width {shape[1]}, and this model's is {expected}"
                raise CheckpointError(f"{path}: {rule}")
            return


def _complaint(shapes: Shapes, unknown: list[str]) -> str:
    """What is wrong with a file whose keys do not all belong to the model."""
    for mark, what in _NOT_READ.items():
        if key := next((key for key in shapes if mark in key), None):
            return f"not a LoRA for Stable Diffusion 1: it looks like {what} (it holds {key})"
    if not unknown:
        return "not a LoRA: it holds no tensors"
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    return f"these belong to no layer of this model, or are no part of a LoRA: {', '.join(unknown[:3])}{more}"
