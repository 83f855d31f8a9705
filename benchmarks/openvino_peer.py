"""OpenVINO, what many use on CPUs, as a peer: diffusers' UNet and VAE decoder, converted and compiled for one shape.

Static shapes, the LATENCY hint, as many threads as torch has, and the precision that is compared: OpenVINO at its best.
Models are converted once and kept under ``out/openvino``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from benchmarks.peers import Loaded
from benchmarks.systems import STEPS, System, case_of

_FOLDER = Path("out") / "openvino"
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def openvino(folder: Path, dtype: torch.dtype) -> System:
    """diffusers on the CPU with its UNet and VAE decoder in OpenVINO; they take one picture, with guidance."""
    unet, vae = (_Model(folder, part) for part in ("unet", "vae"))
    if not (unet.is_converted and vae.is_converted):
        exact = Loaded(folder, torch.float32, "cpu")
        unet.convert(_Predicts(exact.pipeline.unet), (exact.rows, torch.tensor(0), exact.context))
        vae.convert(_Decodes(exact.pipeline.vae), (exact.unscaled,))
        del exact
    loaded = Loaded(folder, dtype, "cpu")
    system = loaded.system("openvino", {})
    pipeline, predict, decode = loaded.pipeline, unet.compile(dtype), vae.compile(dtype)
    for part in (pipeline.unet, pipeline.vae.decoder):
        for parameter in part.parameters():
            parameter.data = parameter.data.new_empty(0)  # OpenVINO has its own

    def forward(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> UNet2DConditionOutput:
        return UNet2DConditionOutput(predict(sample, timestep, encoder_hidden_states))

    pipeline.unet.forward = forward
    pipeline.vae.decode = lambda latents, **_: DecoderOutput(decode(latents))
    cases = {case_of(1): loaded.steps(forward)[case_of(1)], "vae_decode": lambda: decode(loaded.unscaled)}
    cases[f"generate_{STEPS}"] = lambda: loaded.generate(STEPS, 1, None)
    return replace(system, cases=cases)


class _Predicts(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self.unet(sample, timestep, context).sample


class _Decodes(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample


class _Model:
    """One component, converted from its weights in float32, with shapes that do not change."""

    def __init__(self, folder: Path, part: str) -> None:
        self.weights = max((folder / part).glob("*.safetensors"))
        self.path = _FOLDER / f"{folder.name}-{part}.xml"

    @property
    def is_converted(self) -> bool:
        return self.path.exists() and self.path.stat().st_mtime > self.weights.stat().st_mtime

    @torch.no_grad()
    def convert(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        converted = ov.convert_model(model, example_input=inputs, input=[tuple(x.shape) for x in inputs])
        ov.save_model(converted, self.path, compress_to_fp16=False)

    def compile(self, dtype: torch.dtype) -> Callable[..., Tensor]:
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
        }
        compiled = ov.Core().compile_model(self.path, "CPU", options)

        def run(*inputs: Tensor) -> Tensor:
            arrays = [np.asarray(x.detach().float() if x.is_floating_point() else x) for x in inputs]
            return torch.from_numpy(compiled(arrays)[0]).to(dtype)

        return run
