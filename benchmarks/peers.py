"""The peers: diffusers as its users run it, compiled, with xformers, and with the two methods as attention processors.

Infusion is drawn as the paper describes it: four rows, an explicit map, and a processor that hands it from the
foundation's rows to the customised ones; DCI with three rows and a processor that writes both branches' maps and masks
out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from benchmarks.systems import (
    AUXILIARY,
    CONCEPT_SETS,
    GUIDANCE,
    IMAGES,
    NOUN,
    PROMPT,
    STEPS,
    TIMESTEP,
    System,
    case_of,
    concept_sets,
    guide,
    parameter_bytes,
    start_latents,
)
from engine.methods.dci import PRESETS


class Loaded:
    """A pipeline with channels-last weights, and what the cases feed it."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str) -> None:
        load: Any = diffusers.StableDiffusionPipeline.from_pretrained
        self.pipeline = load(folder, torch_dtype=dtype, safety_checker=None).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.unet.to(memory_format=torch.channels_last)
        self.pipeline.vae.to(memory_format=torch.channels_last)
        encoded = self.pipeline.encode_prompt(PROMPT, device, 1, True, negative_prompt="")
        latents = start_latents(self.pipeline.unet.config.sample_size, device)
        self.context = torch.cat([encoded[1], encoded[0]])
        self.rows = torch.cat([latents, latents]).to(dtype)
        self.unscaled = (latents / self.pipeline.vae.config.scaling_factor).to(dtype)

    def steps(self, unet: Callable[..., Any]) -> dict[str, Callable[[], Tensor]]:
        """Guided steps of several pictures: their unconditional rows, then the conditional ones."""
        timestep = torch.tensor(TIMESTEP, device=self.rows.device)

        def step(n: int) -> Callable[[], Tensor]:
            rows, context = (x.repeat_interleave(n, dim=0) for x in (self.rows, self.context))
            rows = rows.contiguous(memory_format=torch.channels_last)
            return lambda: guide(unet(rows, timestep, context).sample)

        return {case_of(n): step(n) for n in IMAGES}

    def generate(self, steps: int, n_images: int, size: int | None) -> Tensor:
        images = self.pipeline(
            PROMPT,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            num_images_per_prompt=n_images,
            height=size,
            width=size,
            generator=[torch.Generator().manual_seed(i) for i in range(n_images)],
            output_type="np",
        ).images
        return torch.from_numpy(np.asarray(images))

    def system(self, name: str, cases: dict[str, Callable[[], Tensor]]) -> System:
        models = (self.pipeline.unet, self.pipeline.vae, self.pipeline.text_encoder)
        return System(name, cases, self.generate, parameter_bytes(*models))


def diffusers_eager(folder: Path, dtype: torch.dtype, device: str = "cpu", loaded: Loaded | None = None) -> System:
    """diffusers as its users run it: SDPA attention, channels-last weights; of ``loaded``, where systems share them."""
    loaded = loaded or Loaded(folder, dtype, device)
    pipeline, rows, context = loaded.pipeline, loaded.rows, loaded.context
    processors = _Processors(pipeline.unet)

    def plain(*inputs: Any) -> Any:
        processors.use(None)
        return pipeline.unet(*inputs)

    def generate(steps: int, n_images: int, size: int | None) -> Tensor:
        processors.use(None)
        return loaded.generate(steps, n_images, size)

    cases = loaded.steps(plain)
    cases["vae_decode"] = lambda: pipeline.vae.decode(loaded.unscaled).sample
    cases[f"generate_{STEPS}"] = lambda: generate(STEPS, 1, None)
    infusion = _MapReplacing(pipeline, processors, torch.cat([rows, rows]), torch.cat([context, context]))
    cases["infusion_parallel_1"] = cases["infusion_shared"] = lambda: infusion.step(0)
    cases[f"infusion_parallel_{CONCEPT_SETS}"] = lambda: torch.cat([infusion.step(i) for i in range(CONCEPT_SETS)])
    cases["dci_mixing_step"] = _TwoBranches(pipeline, processors, rows[:1], context)
    return replace(loaded.system("diffusers_eager", cases), generate=generate)


def diffusers_compile(folder: Path, dtype: torch.dtype, device: str = "cpu", loaded: Loaded | None = None) -> System:
    """diffusers with its UNet and VAE decoder through ``torch.compile``: inductor, on a GPU with max-autotune."""
    loaded = loaded or Loaded(folder, dtype, device)
    mode = None if device == "cpu" else "max-autotune"
    unet, decode = (torch.compile(part, mode=mode) for part in (loaded.pipeline.unet, loaded.pipeline.vae.decode))
    cases = loaded.steps(unet) | {"vae_decode": lambda: decode(loaded.unscaled).sample}
    return loaded.system("diffusers_compile", cases)


def diffusers_xformers(folder: Path, dtype: torch.dtype, device: str) -> System:
    """diffusers with the attention of xformers."""
    loaded = Loaded(folder, dtype, device)
    loaded.pipeline.enable_xformers_memory_efficient_attention()
    return loaded.system("diffusers_xformers", loaded.steps(loaded.pipeline.unet))


class _Processors:
    """The attention processors of a diffusers UNet, set only when others were, since setting them takes long."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.plain = unet, dict(unet.attn_processors)
        self.now: object = None

    def use(self, who: object, processor: Callable[[str], Callable[..., Tensor]] | None = None) -> None:
        """Those of ``who``: what ``processor`` gives for each cross-attention layer; diffusers' own without it."""
        if self.now is who:
            return
        self.now = who
        chosen = dict(self.plain)
        if processor is not None:
            names = [name for name in chosen if "attn2" in name]
            chosen |= {name: processor(name.removesuffix(".processor")) for name in names}
        self.unet.set_attn_processor(chosen)


class _TwoBranches:
    """A diffusers UNet whose second row of three is mixed with the third in every cross-attention layer."""

    def __init__(self, pipeline: Any, processors: _Processors, latents: Tensor, context: Tensor) -> None:
        self.pipeline, self.rows = pipeline, latents.expand(3, -1, -1, -1).contiguous()
        auxiliary = PROMPT.replace(NOUN, AUXILIARY)
        text = pipeline.encode_prompt(auxiliary, latents.device, 1, False)[0]
        self.context = torch.cat([context, text])
        ids = [pipeline.tokenizer(prompt).input_ids for prompt in (PROMPT, auxiliary)]
        nouns = [pipeline.tokenizer(noun).input_ids[1] for noun in (NOUN, AUXILIARY)]
        own = [torch.tensor(prompt[1:-1]) == noun for prompt, noun in zip(ids, nouns, strict=True)]
        self.chosen = [marks.nonzero()[:, 0].to(latents.device) for marks in (own[0], ~own[1])]
        self.lengths = [len(marks) for marks in own]
        self.processors = processors

    def __call__(self) -> Tensor:
        self.processors.use(self, lambda _layer: self._mixed)
        return guide(self.pipeline.unet(self.rows, TIMESTEP, self.context).sample[:2])

    def _mixed(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        queries, keys = heads(attn.to_q(hidden_states)), heads(attn.to_k(encoder_hidden_states))
        weights = (queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(dim=-1)
        out = weights @ heads(attn.to_v(encoder_hidden_states))
        token_scale, space_scale, gain = PRESETS["calibrated"]
        gates = []
        for row, chosen, length in zip((1, 2), self.chosen, self.lengths, strict=True):
            own = (token_scale * weights[row, ..., 1 : 1 + length].float()).softmax(dim=-1)
            gates.append(gain * (space_scale * own[..., chosen].sum(dim=-1)).softmax(dim=-1))
        share = torch.stack(gates).softmax(dim=0)[..., None].to(out.dtype)
        mixed = share[0] * out[1] + share[1] * out[2]
        return attn.to_out[0](torch.stack([out[0], mixed, out[2]]).transpose(1, 2).flatten(2))


class _MapReplacing:
    """A diffusers UNet whose last two rows of four attend with the maps of the first two."""

    def __init__(self, pipeline: Any, processors: _Processors, rows: Tensor, context: Tensor) -> None:
        self.pipeline, self.rows, self.context = pipeline, rows, context
        layers = {name: module for name, module in pipeline.unet.named_modules() if name.endswith("attn2")}
        self.concepts = [
            {name: residual.to(rows) for name, residual in concept.items()}
            for concept in concept_sets({name: layer.to_v.in_features for name, layer in layers.items()})
        ]
        self.concept = self.concepts[0]
        ids = pipeline.tokenizer(PROMPT).input_ids
        self.position = ids.index(pipeline.tokenizer(NOUN).input_ids[1])
        self.processors = processors

    def step(self, i: int) -> Tensor:
        """The customised picture's guided prediction with concept ``i``."""
        self.concept = self.concepts[i]
        self.processors.use(self, self._processor)
        return guide(self.pipeline.unet(self.rows, TIMESTEP, self.context).sample[2:])

    def _processor(self, name: str) -> Callable[..., Tensor]:
        def attend(attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
            def heads(x: Tensor) -> Tensor:
                return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

            queries, keys = heads(attn.to_q(hidden_states[:2])), heads(attn.to_k(encoder_hidden_states[:2]))
            weights = (queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(dim=-1)
            values = attn.to_v(encoder_hidden_states)
            values[3, self.position] += attn.to_v.weight @ self.concept[name]
            mixed = torch.cat([weights, weights]) @ heads(values)
            return attn.to_out[0](mixed.transpose(1, 2).flatten(2))

        return attend
