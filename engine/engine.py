"""The Engine: a loaded model, and ``generate``, the map of the program."""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .backends.graphs import CAPTURING, Graphs, Warmup, run_eagerly
from .backends.ops import Ops
from .errors import NonFiniteError
from .methods.concept import Concept
from .methods.dci import DCI
from .methods.ico import Changes, TextKV, encode_texts, fit_changes
from .methods.infusion import fingerprint, project
from .models.config import ScheduleConfig
from .models.unet import UNet2DConditionModel
from .models.vae import AutoencoderKL
from .observe.masks import MaskRecorder
from .observe.progress import StageClock, Steps
from .observe.word_maps import Recorder
from .result import Result
from .sampling.loop import denoise
from .sampling.out_of_memory import out_of_memory, with_retry
from .sampling.plan import RowPlan, make_plans
from .sampling.request import Callback, Customization, ModelLimits, Picture, Request, make_request
from .sampling.samplers import SamplerTable, make_table
from .sampling.vae_runner import PictureCoder
from .text.encoder import Text, TextEncoder

_AUXILIARY_SEED = 2**63  # added to an image's seed for the independent noise of its auxiliary branch


class UnknownArgumentError(ValueError, TypeError):
    """A keyword that ``generate`` does not have."""


class Engine:
    """A model ready to draw. It holds weights and nothing of any request, so threads may share it.

    Attributes:
        unet, vae: our models; call them with tensors on ``device``.
        text_encoder: tokenizer and CLIP text transformer.
        device, dtype: where the weights are, and their type.
        graphs: the CUDA graphs of what ``generate`` has run; None where it runs without.
        name: what the model was loaded from.
    """

    def __init__(
        self,
        name: str,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: TextEncoder,
        schedule: ScheduleConfig,
        backend: Ops,
        graphs: Graphs | None = None,
    ) -> None:
        self.name, self.unet, self.vae, self.text_encoder = name, unet, vae, text_encoder
        self.schedule, self.backend, self.graphs = schedule, backend, graphs
        self.device, self.dtype = unet.conv_in.weight.device, unet.conv_in.weight.dtype
        self._projected: WeakKeyDictionary[Concept, tuple[Tensor, ...]] = WeakKeyDictionary()
        self._fitted: WeakKeyDictionary[Concept, Changes] = WeakKeyDictionary()
        self._coder = PictureCoder(vae, graphs, self._free)
        self._limits = ModelLimits(
            factor=vae.config.factor,
            sample_size=unet.config.sample_size,
            latent_channels=unet.config.in_channels,
            num_train_timesteps=schedule.num_train_timesteps,
        )

    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        steps: int = 50,
        guidance_scale: float = 8.0,
        sampler: str = "ddim",
        eta: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] | None = None,
        images_per_prompt: int = 1,
        image: Picture | Sequence[Picture] | None = None,
        strength: float = 0.8,
        latents: Tensor | None = None,
        customization: Customization | Sequence[Customization | None] | None = None,
        attention_words: Sequence[str] = (),
        record_masks: bool = False,
        output: str = "pil",
        callback: Callback | None = None,
        progress: bool = True,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        **unknown: Any,
    ) -> Result:
        """Draw pictures.

        Args:
            prompt: text or list of texts, in which ``(word:1.2)`` weights a word as in A1111.
            negative_prompt: what to keep away from; one text, or one per prompt.
            steps: sampling steps of the whole schedule.
            guidance_scale: classifier-free guidance; 1 turns it off, and its UNet rows with it.
            sampler: a key of ``engine.SAMPLERS``.
            eta: DDIM's share of fresh noise, 0 to 1.
            height, width: in pixels, multiples of the VAE's factor (8); the model's own size where not given.
            seed: one integer, counted up over the images, or one per image; drawn and reported where not given. A
                seed is float32 noise of ``torch.Generator("cpu")``, so a picture depends neither on its batch nor on
                the device, beyond rounding.
            images_per_prompt: images in a row for each prompt.
            image: picture(s) to start from, PIL or (H, W, 3) arrays.
            strength: share of the schedule that redraws ``image``; above 0, at most 1.
            latents: unit-variance start noise (B, 4, h, w), in place of the seeds' own.
            customization: an ``Infusion``, ``ICO`` or ``DCI`` for all images, or a list with one per image; None draws
                with the model as it is. Images with the same texts, seed and start share one foundation.
            attention_words: words of every prompt whose attention maps to record, at the cost of copying them to the
                host at every step; see ``Result.attention``.
            record_masks: record the masks of ``DCI`` images; see ``Result.masks``.
            output: "pil", "numpy" or "latent".
            callback: ``callback(step, total, latents)`` after every step, counted from 0; returning False cancels, and
                the result then has no images.
            progress: show a progress bar.
            vae_slicing, vae_tiling: run the VAE image by image, or tile by tile; see ``AutoencoderKL.decode``.

        Raises:
            ValueError: an argument cannot be honoured; the message gives the rule and the value.
            NonFiniteError: the UNet or the VAE produced NaN or infinity.
            OutOfMemoryError: the GPU does not hold so many rows of this size; the message says how many it would.
        """
        if unknown:
            raise UnknownArgumentError(_unknown_keyword(next(iter(unknown))))
        request = make_request(
            self._limits,
            prompt=prompt,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            eta=eta,
            height=height,
            width=width,
            seed=seed,
            images_per_prompt=images_per_prompt,
            image=image,
            strength=strength,
            latents=latents,
            customization=customization,
            attention_words=attention_words,
            record_masks=record_masks,
            output=output,
            callback=callback,
            progress=progress,
            vae_slicing=vae_slicing,
            vae_tiling=vae_tiling,
        )
        table = make_table(request.sampler, self.schedule, request.steps, request.eta, request.begin).to(self.device)
        clock = StageClock(self.device)
        with clock("text"):
            plans = make_plans(request, len(table), self.text_encoder, self._encode, self._project, self.device)
        with clock("encode"):
            start, noise = self._start(request, table)
        with clock("denoise"), tqdm(total=len(table), disable=not request.progress, unit="step") as bar:
            steps_taken = Steps(request.callback, len(table), bar)
            recorder, mask_recorder = self._recorders(request)
            x, plan, finite = self._denoise(request, table, plans, start, noise, steps_taken, recorder, mask_recorder)
        _check_finite(finite, table)
        with clock("decode"):
            images = [] if steps_taken.cancelled else self._pictures(request, x[plan.pictures])
            foundation_images = [] if steps_taken.cancelled else self._foundation_pictures(request, plan, x)
        return Result(
            images=images,
            foundation_images=foundation_images,
            latents=x[plan.pictures],
            attention=None if recorder is None else recorder.result(),
            masks=None if mask_recorder is None else mask_recorder.result(len(request.seeds)),
            seeds=list(request.seeds),
            settings=self._settings(request),
            timings=clock.seconds(),
            cancelled=steps_taken.cancelled,
        )

    def warmup(self, prompt: str | Sequence[str] = "", **arguments: Any) -> Warmup:
        """Run ``generate`` with these arguments once, so that a later run of the same sizes waits for nothing.

        Kernels are compiled and graphs captured for the UNet's rows and the VAE's pictures; prompts, seeds, concepts of
        the same kind and length, guidance scales and steps may then differ. On a CPU weights are packed.
        """
        start, before = time.perf_counter(), 0 if self.graphs is None else len(self.graphs.captured)
        options: dict[str, Any] = {"progress": False} | arguments
        self.generate(prompt, **options)
        captured = () if self.graphs is None else tuple(self.graphs.captured[before:])
        memory = torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else None
        return Warmup(captured, time.perf_counter() - start, memory)

    def encode_prompt(self, prompts: str | Sequence[str]) -> Tensor:
        """Encode prompts to (B, 77, E), with their token weights applied."""
        given = [prompts] if isinstance(prompts, str) else prompts
        return self.text_encoder.encode([self.text_encoder.tokenize(prompt) for prompt in given])

    @cached_property
    def fingerprint(self) -> tuple[float, ...]:
        """Tells base models apart; see ``infusion.fingerprint``."""
        return fingerprint(self.unet)

    def _encode(self, texts: Sequence[Text]) -> TextKV:
        return encode_texts(texts, self.text_encoder, self.unet, self._changes)

    def _changes(self, concept: Concept) -> Changes:
        """A concept's changes of keys and values on this device, for as long as the concept lives."""
        if concept not in self._fitted:
            self._fitted[concept] = fit_changes(concept, self.unet, self.fingerprint)
        return self._fitted[concept]

    def _project(self, concept: Concept) -> tuple[Tensor, ...]:
        """A concept's projected residuals, computed once for as long as the concept lives."""
        if concept not in self._projected:
            self._projected[concept] = project(concept, self.unet, self.fingerprint)
        return self._projected[concept]

    def _denoise(
        self, request: Request, table: SamplerTable, plans: Sequence[RowPlan], *arguments: Any
    ) -> tuple[Tensor, RowPlan, Tensor]:
        """``denoise``, each of whose steps gets a second chance if memory runs out."""
        run = run_eagerly if self.graphs is None else self.graphs

        def step(*call: Any) -> Any:
            return with_retry(lambda: run(*call), self._free)

        try:
            return denoise(self.unet, table, plans, *arguments, run=step)
        except torch.OutOfMemoryError as error:
            shortage = error.with_traceback(None)  # which would keep the attempt's tensors
        self._free()
        n_rows, size = max(len(plan.trajectories) for plan in plans), (request.height, request.width)
        raise out_of_memory(self.unet, self._limits.factor, len(request.seeds), n_rows, size) from shortage

    def _free(self) -> None:
        """Give back what can be rebuilt."""
        if self.graphs is not None:
            self.graphs.clear()
        with CAPTURING:
            torch.cuda.empty_cache()

    def _start(self, request: Request, table: SamplerTable) -> tuple[Tensor, list[Tensor]]:
        """The first ``x``, and the noise of every step that draws some, in the order diffusers would draw it.

        Where an auxiliary branch has noise of its own, the images' starts are followed by as many auxiliary ones.
        """
        shape = (self._limits.latent_channels, *(n // self._limits.factor for n in (request.height, request.width)))
        n_images, seeds = len(request.seeds), request.seeds
        if any(isinstance(one, DCI) and one.noise == "independent" for one in request.customizations):
            seeds = (*seeds, *((seed + _AUXILIARY_SEED) % 2**64 for seed in seeds))
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

        def draw() -> Tensor:
            noise = [torch.randn(shape, generator=g, dtype=torch.float32, device="cpu") for g in generators]
            return torch.stack(noise).to(self.device)

        image = request.image
        if image is not None:
            mean, std = self._coder.posterior(image.to(self.device), request.vae_slicing, request.vae_tiling)
            clean = (mean.float() + std.float() * draw()[:n_images]) * self.vae.config.scaling_factor
            x = table.image_scale * clean.repeat(len(seeds) // n_images, 1, 1, 1) + table.image_noise * draw()
        elif request.latents is not None:
            given = request.latents.to(self.device)
            x = table.start_noise * (given if len(seeds) == n_images else torch.cat([given, draw()[n_images:]]))
        else:
            x = table.start_noise * draw()
        return x, [draw() for _ in range(table.noise_draws)]

    def _pictures(self, request: Request, x: Tensor) -> Any:
        if request.output == "latent":
            return x
        latents = x / self.vae.config.scaling_factor
        decoded = self._coder.decode(latents, request.vae_slicing, request.vae_tiling)
        pixels = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
        if request.output == "numpy":
            return pixels
        return [Image.fromarray((picture * 255).round().astype(np.uint8)) for picture in pixels]

    def _foundation_pictures(self, request: Request, plan: RowPlan, x: Tensor) -> list[Any] | None:
        """The picture of each image's foundation, None where it has none; each trajectory is decoded once."""
        distinct = [trajectory for trajectory in dict.fromkeys(plan.foundations) if trajectory is not None]
        if not distinct:
            return None
        pictures = dict(zip(distinct, self._pictures(request, x[distinct]), strict=True))
        return [None if trajectory is None else pictures[trajectory] for trajectory in plan.foundations]

    def _recorders(self, request: Request) -> tuple[Recorder | None, MaskRecorder | None]:
        size = (request.height // self._limits.factor, request.width // self._limits.factor)
        n_heads = {name: attn2.n_heads for name, attn2 in self.unet.cross_attentions.items()}
        recorder = Recorder(request.attention_words, n_heads, size) if request.attention_words else None
        return recorder, MaskRecorder(list(n_heads), size) if request.record_masks else None

    def _settings(self, request: Request) -> dict[str, Any]:
        return {
            "prompts": list(request.prompts),
            "negative_prompts": list(request.negative_prompts),
            "seeds": list(request.seeds),
            "steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "sampler": request.sampler,
            "eta": request.eta,
            "height": request.height,
            "width": request.width,
            "strength": None if request.image is None else request.strength,
            "given_latents": request.latents is not None,
            "customizations": [None if one is None else one.settings() for one in request.customizations],
            "vae_slicing": request.vae_slicing,
            "vae_tiling": request.vae_tiling,
            "model": self.name,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "backend": self.backend.name,
        }


def _check_finite(finite: Tensor, table: SamplerTable) -> None:
    if not finite.all():
        i = int((~finite).nonzero()[0])
        timestep = float(table.timesteps[i])
        raise NonFiniteError(f"the UNet produced NaN or infinity at step {i} of {len(table)} (timestep {timestep:g})")


def _unknown_keyword(name: str) -> str:
    known = Engine.generate.__wrapped__.__kwdefaults__  # no_grad wraps the method
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"
    return f"generate has no keyword {name!r}{hint}"
