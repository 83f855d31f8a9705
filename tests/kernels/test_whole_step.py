"""A whole step and a decoded picture on the Triton kernels, all of them, in the interpreter (or on a GPU)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import engine
from benchmarks.ops import KERNELS
from engine.backends.ops import TORCH
from tests.controlnets import hint, random_controlnet
from tests.pipelines import random_concept

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_every_method_in_one_batch(small_folder: Any, tmp_path: Path) -> None:
    """Beside a ControlNet."""
    eager, kernels = (engine.load(small_folder, device=_DEVICE, dtype="float32", backend="torch") for _ in range(2))
    nets = [random_controlnet(sd, tmp_path / str(i), small_folder) for i, sd in enumerate((eager, kernels))]
    vae_attention = kernels.vae.decoder.mid_block.attentions[0]
    for module in [*kernels.unet.modules(), *kernels.vae.modules(), *nets[1].modules()]:
        if hasattr(module, "ops"):
            module.ops = replace(KERNELS, attention=TORCH.attention) if module is vae_attention else KERNELS
    kernels.unet.compose()
    nets[1].compose()
    customization = [None, engine.Infusion([random_concept(eager)]), engine.DCI("cat", "dog", fraction=1.0)]
    options = {"steps": 1, "seed": 0, "output": "numpy", "progress": False, "images_per_prompt": 3}
    expected, actual = (
        sd.generate("a cat", customization=customization, control=[engine.Control(net, hint())], **options)
        for sd, net in zip((eager, kernels), nets, strict=True)
    )
    assert float((actual.latents - expected.latents).norm() / expected.latents.norm()) < 2e-5
    assert abs(actual.images - expected.images).max() < 1e-3
