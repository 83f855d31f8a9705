"""The Engine: a loaded model, and ``generate``, the map of the program."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .backends.graphs import Graphs, Run, Warmup, empty_cache, run_eagerly
from .backends.ops import Ops, told
from .errors import OutOfMemoryError
from .methods.concept_cache import ConceptCache, Texts
from .methods.lora import LoRA, apply_loras
from .models.config import ScheduleConfig
from .models.tiny_vae import VAE
from .models.unet import UNet2DConditionModel
from .observe.masks import MaskRecorder
from .observe.progress import StageClock, Steps
from .observe.word_maps import Recorder
from .options import make_options, takes
from .result import Result
from .sampling.arguments import Options
from .sampling.join import Size, exactly
from .sampling.loop import Denoising, Stepper, denoise, start_denoising
from .sampling.out_of_memory import check_memory, out_of_memory, with_retry
from .sampling.pictures import finished_pictures, foundation_pictures
from .sampling.plan import make_plans
from .sampling.request import ModelLimits, Request, make_request
from .sampling.start import start
from .sampling.timetable import Timetables
from .sampling.vae_runner import VAERunner
from .text.encoder import TextEncoder
from .upscale import drawer_of

MAX_PIXELS = 4096 * 4096


class Engine:
    """A model ready to draw. It holds weights and nothing of any request, so threads may share it.

    Attributes:
        unet, vae: our models; call them with tensors on ``device``.
        text_encoder: tokenizer and CLIP text transformer.
        device, dtype: where the weights are, and their type.
        concepts, timetables: what concepts and schedules become on this model.
        limits: what requests it accepts.
        graphs: the CUDA graphs of what ``generate`` has run; None where it runs without.
        name: what the model was loaded from.
        loras: the LoRAs in its weights.
    """

    def __init__(
        self,
        name: str,
        unet: UNet2DConditionModel,
        vae: VAE,
        text_encoder: TextEncoder,
        schedule: ScheduleConfig,
        backend: Ops,
        graphs: Graphs | None = None,
        max_pixels: int = MAX_PIXELS,
        loras: Sequence[LoRA] = (),
    ) -> None:
        self.name, self.unet, self.vae, self.text_encoder, self.loras = name, unet, vae, text_encoder, tuple(loras)
        self.schedule, self.backend, self.graphs = schedule, backend, graphs
        self.device, self.dtype = unet.conv_in.weight.device, unet.conv_in.weight.dtype
        self.concepts, self.timetables = ConceptCache(unet), Timetables(unet, schedule)
        self._vae = VAERunner(vae, graphs, self._free)
        self.limits = ModelLimits(
            factor=vae.config.factor,
            sample_size=unet.config.sample_size,
            latent_channels=vae.config.latent_channels,
            num_train_timesteps=schedule.num_train_timesteps,
            takes_masks=unet.config.in_channels != vae.config.latent_channels,
            max_pixels=max_pixels,
            check_memory=partial(check_memory, unet, vae),
        )

    @takes(Options)
    @torch.no_grad()
    def generate(self, prompt: str | Sequence[str], **options: Any) -> Result:
        """Draw pictures.

        Args:
            prompt: text or list of texts, in which ``(word:1.2)`` weights a word; see ``weighting``.
            {options}

        Raises:
            ValueError: an argument cannot be honoured; the message gives the rule and the value.
            NonFiniteError: the text encoder, the UNet or the VAE produced NaN or infinity.
            OutOfMemoryError: the memory does not hold so many rows of this size; the message says what would fit.
        """
        asked = make_options(Options, "generate", options)
        if (drawer := drawer_of(asked)) is not None:
            return drawer.draw(self, prompt, options)
        request = make_request(self.limits, prompt, asked)
        clock = StageClock(self.device)
        denoising = self.begin(request, clock)
        with clock("denoise"), tqdm(total=len(denoising), disable=not asked.progress, unit="step") as bar:
            steps = Steps(asked.callback, len(denoising), bar)
            self._denoise(request, denoising, steps)
        return self.finish(request, denoising, clock, steps.cancelled)

    def begin(self, request: Request, clock: StageClock) -> Denoising:
        """The stages of ``generate`` before the loop: texts, rows and starts."""
        asked = request.options
        timetable = self.timetables.of(request)
        with clock("text"):
            texts = Texts(self.text_encoder, asked.long_prompts, asked.clip_skip)
            plans = make_plans(request, len(timetable), texts, self.concepts, self.device)
        with clock("encode"):
            x, noise, inpainting = start(request, timetable.table, self._vae, self.device)
        shows_clean = asked.callback_latents == "clean"
        return start_denoising(plans, timetable, x, noise, *self._recorders(request), inpainting, shows_clean)

    def finish(self, request: Request, denoising: Denoising, clock: StageClock, cancelled: bool = False) -> Result:
        """The stages of ``generate`` after the loop."""
        denoising.check_finite()
        recorder, mask_recorder = denoising.recorder, denoising.mask_recorder
        with clock("decode"):
            images = [] if cancelled else finished_pictures(self._vae, request, denoising)
            foundation_images = [] if cancelled else foundation_pictures(self._vae, request, denoising)
        return Result(
            images=images,
            foundation_images=foundation_images,
            latents=denoising.pictures,
            attention=None if recorder is None else recorder.result(),
            masks=None if mask_recorder is None else mask_recorder.result(len(request.seeds)),
            seeds=list(request.seeds),
            settings=request.settings() | self._about(request),
            timings=clock.seconds(),
            cancelled=cancelled,
        )

    def stepper(self, size: Size = exactly) -> Stepper:
        """What takes steps of this model, through graphs where it has them, with a second chance if memory runs out."""

        def retrying(run: Run) -> Run:
            return lambda *call: with_retry(lambda: run(*call), self._free)

        once = run_eagerly if self.graphs is None else self.graphs
        return Stepper(self.unet, retrying(once), retrying(run_eagerly), size)

    def warmup(self, prompt: str | Sequence[str] = "", **arguments: Any) -> Warmup:
        """Run ``generate`` with these arguments once, so that a later run of the same sizes waits for nothing.

        Kernels are compiled and graphs captured for the UNet's rows and the VAE's pictures; prompts, seeds, concepts of
        the same kind and length, guidance scales and steps may then differ. On a CPU weights are packed.
        """
        start, before = time.perf_counter(), 0 if self.graphs is None else len(self.graphs.captured)
        self.generate(prompt, **({"progress": False} | arguments))
        captured = () if self.graphs is None else tuple(self.graphs.captured[before:])
        memory = torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else None
        return Warmup(captured, time.perf_counter() - start, memory)

    def encode_prompt(
        self, prompts: str | Sequence[str], weighting: str = "a1111", clip_skip: int = 0, long_prompts: str = "chunk"
    ) -> Tensor:
        """Encode prompts to (B, n * 77, E) for n chunks of the longest, as ``generate`` does with these arguments."""
        return self.text_encoder(prompts, weighting, clip_skip, long_prompts)

    def with_loras(self, loras: Sequence[LoRA]) -> Engine:
        """Another Engine with LoRAs in its weights, on top of this one's; see ``methods.lora.apply_loras``."""
        unet, text_encoder = apply_loras(loras, self.unet, self.text_encoder)
        graphs, own = None if self.graphs is None else Graphs(self.graphs.make_capture), (*self.loras, *loras)
        most = self.limits.max_pixels
        return Engine(self.name, unet, self.vae, text_encoder, self.schedule, self.backend, graphs, most, own)

    @property
    def fingerprint(self) -> tuple[float, ...]:
        """Tells base models apart; see ``methods.fingerprint``."""
        return self.concepts.fingerprint

    def _about(self, request: Request) -> dict[str, Any]:
        """What of the model a result's settings name."""
        return {
            "model": self.name,
            "loras": [lora.settings() for lora in self.loras],
            "embeddings": self.text_encoder.embeddings_in(*request.prompts, *request.negative_prompts),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "backend": self.backend.name,
        } | told(self.backend, self.graphs)

    def _denoise(self, request: Request, denoising: Denoising, steps: Steps) -> None:
        try:
            return denoise(self.stepper(), denoising, steps)
        except torch.OutOfMemoryError as error:
            shortage = error.with_traceback(None)  # which would keep the attempt's tensors
        raise self.out_of_memory(request, denoising) from shortage

    def out_of_memory(self, request: Request, denoising: Denoising) -> OutOfMemoryError:
        """The error where a step does not fit, which says what would; gives back all that can be first."""
        self._free()
        n_rows, n_net_rows = max(plan.rows.n_rows for plan in denoising.plans)
        return out_of_memory(self.unet, self.limits.factor, len(request.seeds), n_rows, request.size, n_net_rows)

    def _free(self) -> None:
        """Give back what can be rebuilt."""
        if self.graphs is not None:
            self.graphs.clear()
        empty_cache()

    def _recorders(self, request: Request) -> tuple[Recorder | None, MaskRecorder | None]:
        options, (height, width) = request.options, request.size
        size = height // self.limits.factor, width // self.limits.factor
        n_heads = {name: attn2.n_heads for name, attn2 in self.unet.cross_attentions.items()}
        recorder = Recorder(options.attention_words, n_heads, size) if options.attention_words else None
        return recorder, MaskRecorder(list(n_heads), size) if options.record_masks else None
