"""The systems that benchmarks compare: a guided UNet step, Infusion's and DCI's, a VAE decode and a whole picture each.

The peer draws Infusion as the paper describes it: four rows, an explicit map, and an attention processor that hands it
from the foundation's rows to the customised ones; and DCI with three rows and a processor that writes both branches'
maps and masks out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

import engine
from engine.conditioning import Conditioning, Shared
from engine.dci import PRESETS
from engine.request import Request, make_request
from engine.rows import make_plans

STEPS, GUIDANCE = 20, 7.5
FULL_SIZE = Path(tempfile.gettempdir()) / "sd15-random"
CONCEPT_SETS = 8
_PROMPT = "a photo of a red cat on a beach"
_NOUN, _AUXILIARY = "cat", "dog"
_TIMESTEP = 481


@dataclass(frozen=True, slots=True)
class System:
    """One implementation with a loaded model; every case returns its result, for the error beside the time.

    "infusion_parallel_8" is one step of eight concept sets at one prompt and seed, which the peer draws one by one.
    """

    name: str
    cases: dict[str, Callable[[], Tensor]]


def twinstream(folder: Path, dtype: torch.dtype) -> System:
    """This engine, as ``generate`` drives it: text keys and values and time embeddings are projected ahead."""
    sd = engine.load(folder, dtype=dtype, device="cpu")
    latents, context = _inputs(sd.encode_prompt(["", _PROMPT]), sd.unet.config.sample_size)
    with torch.no_grad():
        shifts = sd.unet.time_shifts(torch.tensor([_TIMESTEP])).expand(2, -1)
        shared = Shared(torch.tensor([0, 0]), torch.tensor([0]))
        condition = Conditioning(shifts, sd.unet.text_kv(context), shared=shared)
    sample, unscaled = latents.to(dtype), (latents / sd.vae.config.scaling_factor).to(dtype)

    def guided_step() -> Tensor:
        return _guide(sd.unet.denoise(sample, condition))

    def generate() -> Tensor:
        out = sd.generate(_PROMPT, steps=STEPS, guidance_scale=GUIDANCE, seed=0, output="numpy", progress=False)
        return torch.from_numpy(out.images)

    cases = {"guided_step": guided_step, "vae_decode": lambda: sd.vae.decode(unscaled), f"generate_{STEPS}": generate}
    sets = [engine.Concept(_NOUN, residuals) for residuals in concept_sets(_text_widths(sd))]
    for name, concepts, foundation in (
        ("infusion_parallel_1", sets[:1], "parallel"),
        ("infusion_shared", sets[:1], "shared"),
        (f"infusion_parallel_{CONCEPT_SETS}", sets, "parallel"),
    ):
        customizations = [engine.Infusion([concept], foundation=foundation) for concept in concepts]
        cases[name] = _planned_step(sd, customizations, latents)
    cases["dci_mixing_step"] = _planned_step(sd, [engine.DCI(_NOUN, _AUXILIARY, fraction=1.0)], latents)
    return System("twinstream", cases)


def _planned_step(sd: engine.Engine, customizations: list[Any], latents: Tensor) -> Callable[[], Tensor]:
    """The guided predictions of every customisation's picture, one after the other."""
    n = len(customizations)
    request = default_request(sd, _PROMPT, customization=customizations, images_per_prompt=n, seed=[0] * n)
    with torch.no_grad():
        (plan,) = make_plans(request, 1, sd.text_encoder, sd._encode, sd._project, sd.device)
        shifts = sd.unet.time_shifts(torch.tensor([_TIMESTEP]))
        text = tuple((keys[plan.texts], values[plan.texts]) for keys, values in plan.text_kv)
    n_entries = len(plan.trajectories if plan.shared is None else plan.starts)
    sample = latents.to(sd.dtype).expand(n_entries, -1, -1, -1).contiguous()
    shifts = shifts.expand(len(plan.trajectories), -1)
    condition = Conditioning(shifts, text, plan.following, plan.mixing, plan.shared)

    def step() -> Tensor:
        noise_pred = sd.unet.denoise(sample, condition).float()
        unconditional, conditional = noise_pred[plan.unconditional], noise_pred[plan.conditional]
        return (unconditional + GUIDANCE * (conditional - unconditional))[plan.pictures]

    return step


def default_request(sd: engine.Engine, prompt: str, **changes: Any) -> Request:
    """The request that ``sd.generate(prompt, **changes)`` makes."""
    defaults = engine.Engine.generate.__wrapped__.__kwdefaults__  # no_grad wraps the method
    return make_request(sd._limits, prompt=prompt, **(defaults | changes))


def _text_widths(sd: engine.Engine) -> dict[str, int]:
    return {name: attn2.to_v.in_features for name, attn2 in sd.unet.cross_attentions.items()}


def concept_sets(widths: dict[str, int]) -> list[dict[str, Tensor]]:
    """Random text-space residuals of eight concepts, by layer."""
    generator = torch.Generator().manual_seed(0)
    return [
        {name: torch.randn(widths[name], generator=generator) for name in sorted(widths)} for _ in range(CONCEPT_SETS)
    ]


def _pipeline(folder: Path, dtype: torch.dtype) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A pipeline with channels-last weights; the two rows of a guided step, their context, and latents to decode."""
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    encoded = pipeline.encode_prompt(_PROMPT, "cpu", 1, True, negative_prompt="")
    latents, context = _inputs(torch.cat([encoded[1], encoded[0]]), pipeline.unet.config.sample_size)
    rows, unscaled = torch.cat([latents, latents]).to(dtype), (latents / pipeline.vae.config.scaling_factor).to(dtype)
    return pipeline, rows, context, unscaled


def diffusers_compile(folder: Path, dtype: torch.dtype) -> System:
    """diffusers with its UNet and VAE decoder through ``torch.compile`` (inductor), channels-last."""
    pipeline, rows, context, unscaled = _pipeline(folder, dtype)
    unet, decode = torch.compile(pipeline.unet), torch.compile(pipeline.vae.decode)
    timestep = torch.tensor(_TIMESTEP)
    cases = {
        "guided_step": lambda: _guide(unet(rows, timestep, context).sample),
        "vae_decode": lambda: decode(unscaled).sample,
    }
    return System("diffusers_compile", cases)


def diffusers_eager(folder: Path, dtype: torch.dtype) -> System:
    """diffusers as its users run it on a CPU: SDPA attention, channels-last weights."""
    pipeline, rows, context, unscaled = _pipeline(folder, dtype)

    def guided_step() -> Tensor:
        return _guide(pipeline.unet(rows, _TIMESTEP, context).sample)

    def generate() -> Tensor:
        images = pipeline(
            _PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        return torch.from_numpy(np.asarray(images))

    cases = {
        "guided_step": guided_step,
        "vae_decode": lambda: pipeline.vae.decode(unscaled).sample,
        f"generate_{STEPS}": generate,
    }
    infusion = _MapReplacing(pipeline, torch.cat([rows, rows]), torch.cat([context, context]))
    cases["infusion_parallel_1"] = cases["infusion_shared"] = lambda: infusion.step(0)
    cases[f"infusion_parallel_{CONCEPT_SETS}"] = lambda: torch.cat([infusion.step(i) for i in range(CONCEPT_SETS)])
    cases["dci_mixing_step"] = _TwoBranches(pipeline, rows[:1], context)
    return System("diffusers_eager", cases)


class _TwoBranches:
    """A diffusers UNet whose second row of three is mixed with the third in every cross-attention layer."""

    def __init__(self, pipeline: Any, latents: Tensor, context: Tensor) -> None:
        self.pipeline, self.rows = pipeline, latents.expand(3, -1, -1, -1).contiguous()
        auxiliary = _PROMPT.replace(_NOUN, _AUXILIARY)
        text = pipeline.encode_prompt(auxiliary, "cpu", 1, False)[0]
        self.context = torch.cat([context, text])
        ids = [pipeline.tokenizer(prompt).input_ids for prompt in (_PROMPT, auxiliary)]
        nouns = [pipeline.tokenizer(noun).input_ids[1] for noun in (_NOUN, _AUXILIARY)]
        own = [torch.tensor(prompt[1:-1]) == noun for prompt, noun in zip(ids, nouns, strict=True)]
        self.chosen = (own[0], ~own[1])
        self.plain = pipeline.unet.attn_processors
        self.processors = {
            name: self._mixed if "attn2" in name else processor for name, processor in self.plain.items()
        }

    def __call__(self) -> Tensor:
        self.pipeline.unet.set_attn_processor(dict(self.processors))
        noise_pred = self.pipeline.unet(self.rows, _TIMESTEP, self.context).sample
        self.pipeline.unet.set_attn_processor(dict(self.plain))
        return _guide(noise_pred[:2])

    def _mixed(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        queries, keys = heads(attn.to_q(hidden_states)), heads(attn.to_k(encoder_hidden_states))
        weights = (queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(dim=-1)
        out = weights @ heads(attn.to_v(encoder_hidden_states))
        token_scale, space_scale, gain = PRESETS["calibrated"]
        gates = []
        for row, chosen in ((1, self.chosen[0]), (2, self.chosen[1])):
            own = (token_scale * weights[row, ..., 1 : 1 + len(chosen)].float()).softmax(dim=-1)
            gates.append(gain * (space_scale * own[..., chosen].sum(dim=-1)).softmax(dim=-1))
        share = torch.stack(gates).softmax(dim=0)[..., None].to(out.dtype)
        mixed = share[0] * out[1] + share[1] * out[2]
        return attn.to_out[0](torch.stack([out[0], mixed, out[2]]).transpose(1, 2).flatten(2))


class _MapReplacing:
    """A diffusers UNet whose last two rows of four attend with the maps of the first two."""

    def __init__(self, pipeline: Any, rows: Tensor, context: Tensor) -> None:
        self.pipeline, self.rows, self.context = pipeline, rows, context
        layers = {name: module for name, module in pipeline.unet.named_modules() if name.endswith("attn2")}
        self.concepts = [
            {name: residual.to(rows.dtype) for name, residual in concept.items()}
            for concept in concept_sets({name: layer.to_v.in_features for name, layer in layers.items()})
        ]
        self.concept = self.concepts[0]
        ids = pipeline.tokenizer(_PROMPT).input_ids
        self.position = ids.index(pipeline.tokenizer(_NOUN).input_ids[1])
        self.plain = pipeline.unet.attn_processors
        self.processors = {
            name: self._processor(name.removesuffix(".processor")) if "attn2" in name else processor
            for name, processor in self.plain.items()
        }

    def step(self, i: int) -> Tensor:
        """The customised picture's guided prediction with concept ``i``."""
        self.concept = self.concepts[i]
        self.pipeline.unet.set_attn_processor(dict(self.processors))
        noise_pred = self.pipeline.unet(self.rows, _TIMESTEP, self.context).sample
        self.pipeline.unet.set_attn_processor(dict(self.plain))
        return _guide(noise_pred[2:])

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


def _inputs(context: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0)), context


def _guide(noise_pred: Tensor) -> Tensor:
    unconditional, conditional = noise_pred.float().chunk(2)
    return unconditional + GUIDANCE * (conditional - unconditional)


def full_size_folder(folder: Path) -> Path:
    """A diffusers folder of SD v1.5's sizes with random weights, written once; about 4.3 GB in float32."""
    if (folder / "model_index.json").exists():
        return folder
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from engine.checkpoint import ASSETS

    torch.manual_seed(0)
    attention_down, attention_up = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
    unet = diffusers.UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=(*attention_down, "DownBlock2D"),
        up_block_types=("UpBlock2D", *attention_up),
    )
    sizes: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    vae = diffusers.AutoencoderKL(**sizes)
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline: Any = diffusers.StableDiffusionPipeline
    pipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(ASSETS / "clip"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
