"""The systems that benchmarks compare: guided steps, Infusion's and DCI's, a VAE decode and whole pictures of each.

This engine, and the models they all load; ``peers.py`` has the others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import engine
from engine.backends.graphs import run_eagerly
from engine.methods.concept_cache import Texts
from engine.sampling.arguments import Options
from engine.sampling.join import make_phase
from engine.sampling.plan import make_plans
from engine.sampling.request import Request, make_request
from engine.sampling.step import Phase, State, guided_step
from engine.sampling.table import Coefficients

STEPS, GUIDANCE = 20, 7.5
FULL_SIZE = Path(tempfile.gettempdir()) / "sd15-random"
CONCEPT_SETS = 8
IMAGES = (1, 4, 8)  # drawn at once, of guided steps
PROMPT, NOUN, AUXILIARY = "a photo of a red cat on a beach", "cat", "dog"
TIMESTEP = 481


@dataclass(frozen=True, slots=True)
class System:
    """One implementation with a loaded model; every case returns its result, for the error beside the time.

    Attributes:
        name: as records call it.
        cases: by name. "guided_step_4" is a step of four pictures; "infusion_parallel_8" one of eight concept sets at
            one prompt and seed, which the peer draws one by one.
        generate: draws pictures (B, H, W, 3) on the host, given steps, how many, and their size in pixels (None for the
            model's own).
        parameter_bytes: of all weights.
        forget: drops what was prepared, so that the next run takes all the memory that a first one takes.
    """

    name: str
    cases: dict[str, Callable[[], Tensor]]
    generate: Callable[[int, int, int | None], Tensor]
    parameter_bytes: int
    forget: Callable[[], None] = lambda: None


def twinstream(folder: Path, dtype: torch.dtype, device: str = "cpu") -> System:
    """This engine, as ``generate`` drives it; on a GPU with Triton kernels and graphs."""
    return _twinstream("twinstream", folder, dtype, device, "auto" if device == "cpu" else "triton")


def twinstream_auto(folder: Path, dtype: torch.dtype, device: str = "cpu") -> System:
    """The same with what calibration chose on a GPU, which is there before; all by default."""
    return _twinstream("twinstream_auto", folder, dtype, device, "auto")


def _twinstream(name: str, folder: Path, dtype: torch.dtype, device: str, backend: str) -> System:
    sd = engine.load(folder, dtype=dtype, device=device, backend=backend, calibrate=False)  # nothing but what is known
    latents = start_latents(sd.unet.config.sample_size, device)
    unscaled = (latents / sd.vae.config.scaling_factor).to(dtype)
    cases = {case_of(n): planned_step(sd, [None] * n, latents) for n in IMAGES}
    cases["vae_decode"] = lambda: sd._vae.pixels(sd.vae, unscaled, slicing=False, tiling=False)
    sets = [engine.Concept(NOUN, residuals) for residuals in concept_sets(_text_widths(sd))]
    for case, concepts, foundation in (
        ("infusion_parallel_1", sets[:1], "parallel"),
        ("infusion_shared", sets[:1], "shared"),
        (f"infusion_parallel_{CONCEPT_SETS}", sets, "parallel"),
    ):
        customizations = [engine.Infusion([concept], foundation=foundation) for concept in concepts]
        cases[case] = planned_step(sd, customizations, latents)
    cases["dci_mixing_step"] = planned_step(sd, [engine.DCI(NOUN, AUXILIARY, fraction=1.0)], latents)
    cases["concept_switch"] = _switching_step(sd, latents)

    def generate(steps: int, n_images: int, size: int | None) -> Tensor:
        options: dict[str, Any] = {"steps": steps, "images_per_prompt": n_images, "height": size, "width": size}
        out = sd.generate(PROMPT, guidance_scale=GUIDANCE, seed=0, output="numpy", progress=False, **options)
        return torch.from_numpy(out.images)

    cases[f"generate_{STEPS}"] = lambda: generate(STEPS, 1, None)
    models = (sd.unet, sd.vae, sd.text_encoder.model)
    return System(name, cases, generate, parameter_bytes(*models), sd._free)


def planned_step(sd: engine.Engine, customizations: Sequence[Any], latents: Tensor) -> Callable[[], Tensor]:
    """A step of every customisation's picture, all from one latent; its result is the guided predictions."""
    phase, state, pictures = _plan(sd, customizations, latents)
    return lambda: run_step(sd, phase, state)[pictures]


def _switching_step(sd: engine.Engine, latents: Tensor) -> Callable[[], Tensor]:
    """An Infusion step with another concept than the one before, which is projected and planned each time."""
    sets = concept_sets(_text_widths(sd))
    turn = iter(range(1 << 30))

    def step() -> Tensor:
        concept = engine.Concept(NOUN, sets[next(turn) % CONCEPT_SETS])
        phase, state, pictures = _plan(sd, [engine.Infusion([concept])], latents)
        return run_step(sd, phase, state)[pictures]

    return step


@torch.no_grad()
def _plan(sd: engine.Engine, customizations: Sequence[Any], latents: Tensor) -> tuple[Phase, State, Tensor]:
    """What a step needs, on a schedule whose next latents are the prediction itself."""
    n = len(customizations)
    options = {"images_per_prompt": n, "seed": [0] * n, "guidance_scale": GUIDANCE}
    request = default_request(sd, PROMPT, customization=list(customizations), **options)
    (plan,) = make_plans(request, 1, Texts(sd.text_encoder), sd.concepts, sd.device)
    zero, one = torch.zeros(1, 1, device=sd.device), torch.ones(1, 1, device=sd.device)
    coefficients = Coefficients(one[0], zero[None], model=one, noise=zero, keep_scale=one[0], keep_noise=zero[0])
    phase = make_phase(plan.rows, coefficients, sd.unet.time_shifts(torch.tensor([TIMESTEP], device=sd.device)))
    x = latents.expand(len(plan.starts), -1, -1, -1).contiguous()
    return phase, State(x, x.new_zeros(0, *x.shape), torch.zeros_like(plan.starts), None), plan.pictures


@torch.no_grad()
def run_step(sd: engine.Engine, phase: Phase, state: State) -> Tensor:
    """The next latents of all trajectories, through a graph where the Engine has them."""
    run = run_eagerly if sd.graphs is None else sd.graphs
    name = f"step of {len(phase.rows.trajectories)} rows"
    return run(name, lambda one, now: guided_step(sd.unet, one, now), phase, state)[0]


def case_of(n_images: int) -> str:
    """The name of a guided step of so many pictures."""
    return "guided_step" if n_images == 1 else f"guided_step_{n_images}"


def parameter_bytes(*models: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def default_request(sd: engine.Engine, prompt: str, **changes: Any) -> Request:
    """The request that ``sd.generate(prompt, **changes)`` makes."""
    return make_request(sd.limits, prompt, Options(**changes))


def _text_widths(sd: engine.Engine) -> dict[str, int]:
    return {name: attn2.to_v.in_features for name, attn2 in sd.unet.cross_attentions.items()}


def concept_sets(widths: dict[str, int]) -> list[dict[str, Tensor]]:
    """Random text-space residuals of eight concepts, by layer."""
    generator = torch.Generator().manual_seed(0)
    return [
        {name: torch.randn(widths[name], generator=generator) for name in sorted(widths)} for _ in range(CONCEPT_SETS)
    ]


def start_latents(size: int, device: str) -> Tensor:
    return torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0)).to(device)


def guide(noise_pred: Tensor) -> Tensor:
    """Guidance over unconditional rows and then as many conditional ones."""
    unconditional, conditional = noise_pred.float().chunk(2)
    return unconditional + GUIDANCE * (conditional - unconditional)


def full_size_folder(folder: Path) -> Path:
    """A diffusers folder of SD v1.5's sizes with random weights, written once; about 4.3 GB in float32."""
    if (folder / "model_index.json").exists():
        return folder
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from engine.weights.checkpoint import ASSETS

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
