"""LoRA files in kohya's layout, written from its key rules, for any network."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

PREFIXES = {"unet": "lora_unet_", "text": "lora_te_text_model_"}


def kohya_tensors(
    network: torch.nn.Module,
    prefix: str,
    chosen: Callable[[str], bool],
    rank: int = 4,
    alpha: float = 2.0,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Random factors for a network's chosen weights, as kohya names them: dots are underscores behind a prefix."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, weight in network.state_dict().items():
        if weight.ndim < 2 or not name.endswith(".weight") or not chosen(name):
            continue
        key = prefix + name.removesuffix(".weight").removeprefix("text_model.").replace(".", "_")
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator)
        tensors |= {
            f"{key}.lora_down.weight": down / down[0].numel() ** 0.5,
            f"{key}.lora_up.weight": up * 0.3,
            f"{key}.alpha": torch.tensor(alpha),
        }
    assert tensors
    return tensors


def write_kohya(sd, path: Path, unet=lambda name: True, text=lambda name: "layers" in name, **options) -> Path:
    """A file for the chosen weights of an Engine's networks; None for a network leaves it out."""
    tensors = {} if unet is None else kohya_tensors(sd.unet, PREFIXES["unet"], unet, **options)
    if text is not None:
        tensors |= kohya_tensors(sd.text_encoder.model, PREFIXES["text"], text, **options)
    save_file(tensors, path)
    return path
