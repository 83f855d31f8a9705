"""What diffusers' pipelines are beside their calls: loading, devices, schedulers, LoRAs and learned tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..checks import check_choice
from ..engine import Engine
from ..loading import load
from ..models.config import ScheduleConfig
from ..sampling.timetable import Timetables
from ..weights.checkpoint import open_checkpoint
from .adapters import LearnedTokens, LoRAs
from .schedulers import PNDMScheduler, read_config, sampling_of, scheduler_from

P = TypeVar("P", bound="Pipeline")

_DTYPES = ("float32", "bfloat16", "float16")
_SD_V1_5 = {  # the schedule of single files, as in SD v1.5's repository
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
_LOADING_REFUSED = {
    "unet": "parts are loaded from the folder",
    "text_encoder": "parts are loaded from the folder",
    "tokenizer": "parts are loaded from the folder",
    "vae": "parts are loaded from the folder; for another VAE use engine.load(vae=)",
    "custom_pipeline": "code of others is not run",
    "device_map": "give a device with .to()",
    "quantization_config": "there is no quantisation here",
    "revision": "load the revision's folder",
    "cache_dir": "set HF_HOME",
}


class Pipeline:
    """What both pipelines share: loading, schedulers, LoRAs, learned tokens, and how a call becomes a ``generate``.

    Pictures are diffusers' own for the same arguments and generators, in float32 and beyond rounding. Where no
    generator is given, noise is drawn from torch's default one, which ``torch.manual_seed`` sets.
    """

    def __init__(self, loading: Mapping[str, Any], scheduler: Any) -> None:
        self._loading = dict(loading)
        self._loaded: Engine | None = None
        self._scheduled: tuple[Engine, ScheduleConfig, Engine] | None = None
        self._vae_options: dict[str, Any] = {"vae_slicing": False, "vae_tiling": False}
        self._progress, self._interrupt = True, False
        self._loras, self._tokens = LoRAs(), LearnedTokens()
        self.scheduler = scheduler

    @classmethod
    def from_pretrained(
        cls: type[P],
        pretrained_model_name_or_path: str | Path | None,
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        scheduler: Any = None,
        safety_checker: None = None,
        image_encoder: None = None,
        requires_safety_checker: bool = False,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        local_files_only: bool = False,
        backend: str = "auto",
        **others: Any,
    ) -> P:
        """A pipeline of a diffusers folder or hub id; None is the embedded model. Weights are read when first needed.

        Args:
            pretrained_model_name_or_path: what ``engine.load`` takes.
            torch_dtype, dtype: two names of one thing; float32 where not given.
            scheduler: in place of the folder's.
            safety_checker, image_encoder, requires_safety_checker: none runs here.
            variant: "fp16" with torch_dtype float16, which prefers those files anyway.
            use_safetensors: not False: pickles are not read.
            local_files_only: True for what is a path; for hub ids set HF_HUB_OFFLINE=1.
            backend: ``engine.load``'s.
            others: feature_extractor and low_cpu_mem_usage, which change nothing here; more is refused.

        Raises:
            ValueError: an argument cannot be honoured; CheckpointError: the files.
        """
        for name in ("feature_extractor", "low_cpu_mem_usage"):
            others.pop(name, None)
        for name, reason in _LOADING_REFUSED.items():
            if others.pop(name, None) is not None:
                raise ValueError(f"{name} must not be given: {reason}")
        if others:
            raise ValueError(f"from_pretrained has no argument {', '.join(others)} here")
        if safety_checker is not None or requires_safety_checker or image_encoder is not None:
            raise ValueError("safety_checker and image_encoder must be None: they do not run here")
        model = pretrained_model_name_or_path
        if local_files_only and model is not None and not Path(model).exists():
            raise ValueError(f"local_files_only belongs to paths; for hub ids set HF_HUB_OFFLINE=1, got {str(model)!r}")
        if use_safetensors is False:
            raise ValueError("use_safetensors must not be False: pickles are refused, because reading one can run code")
        if dtype is not None and torch_dtype is not None:
            raise ValueError(f"give dtype or torch_dtype, not both, got {dtype} and {torch_dtype}")
        kind = _kind(torch_dtype if dtype is None else dtype)
        if variant is not None and (variant, kind) != ("fp16", "float16"):
            raise ValueError(f"variant must be 'fp16', with torch_dtype float16, got {variant!r} with {kind}")
        loading = {"model": model, "dtype": kind, "device": "cpu", "backend": backend}
        return cls(loading, _own_scheduler(loading) if scheduler is None else scheduler)

    @classmethod
    def from_single_file(
        cls: type[P],
        path: str | Path,
        *,
        torch_dtype: torch.dtype | str | None = None,
        config: str | Path | None = None,
        scheduler: Any = None,
        backend: str = "auto",
    ) -> P:
        """A pipeline of a ``.safetensors`` file in the original layout, with SD v1.5's scheduler unless given."""
        loading = {"model": path, "dtype": _kind(torch_dtype), "device": "cpu", "backend": backend, "config": config}
        return cls(loading, _own_scheduler(loading) if scheduler is None else scheduler)

    @classmethod
    def from_pipe(cls: type[P], pipeline: Pipeline) -> P:
        """Another kind of pipeline on the same weights, LoRAs and learned tokens."""
        other = cls(pipeline._loading, pipeline.scheduler)
        other._loaded, other._loras, other._tokens = pipeline.engine, pipeline._loras, pipeline._tokens
        return other

    @property
    def scheduler(self) -> Any:
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        """One of ``engine.compat``, or of diffusers; refused here if there is no sampler for it."""
        self._sampling, self._scheduler = sampling_of(scheduler), scheduler

    @property
    def engine(self) -> Engine:
        """The Engine, without LoRAs."""
        if self._loaded is None:
            self._loaded = load(**self._loading)
        return self._loaded

    @property
    def device(self) -> torch.device:
        return torch.device(self._loading["device"])

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self._loading["dtype"])

    @property
    def unet(self) -> Any:
        return self.engine.unet

    @property
    def vae(self) -> Any:
        return self.engine.vae

    @property
    def text_encoder(self) -> Any:
        return self.engine.text_encoder.model

    @property
    def tokenizer(self) -> Any:
        return self.engine.text_encoder.tokenizer

    def to(self: P, *where: Any, device: Any = None, dtype: torch.dtype | None = None) -> P:
        """Move to a device, to a dtype, or both: weights are read anew where they were read already."""
        for one in where:
            if isinstance(one, torch.dtype):
                dtype = one
            else:
                device = one
        wanted = dict(self._loading)
        if device is not None:
            wanted["device"] = str(device)
        if dtype is not None:
            wanted["dtype"] = _kind(dtype)
        if wanted != self._loading:
            self._loading, self._loaded, self._scheduled = wanted, None, None
            self._loras = replace(self._loras, _made=None)
        return self

    def set_progress_bar_config(self, *, disable: bool = False) -> None:
        self._progress = not disable

    def enable_vae_slicing(self) -> None:
        self._vae_options["vae_slicing"] = True

    def disable_vae_slicing(self) -> None:
        self._vae_options["vae_slicing"] = False

    def enable_vae_tiling(self) -> None:
        """Large pictures tile by tile; tiles and their blending are this engine's, not diffusers'."""
        self._vae_options["vae_tiling"] = True

    def disable_vae_tiling(self) -> None:
        self._vae_options["vae_tiling"] = False

    def enable_attention_slicing(self, slice_size: Any = "auto") -> None:
        """Nothing to do: attention maps are never held whole, whatever the size."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Nothing to do, as ``enable_attention_slicing``."""

    def load_lora_weights(
        self, path: str | Path, weight_name: str | None = None, adapter_name: str | None = None
    ) -> None:
        """Load a LoRA file, which then acts alone; see ``set_adapters``. State dicts are not taken."""
        if not isinstance(path, str | Path):
            raise ValueError(f"load_lora_weights needs a file or a folder, got {type(path).__name__}")
        self._loras.load(path, weight_name, adapter_name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float | None] | None = None
    ) -> None:
        self._loras.choose(adapter_names, adapter_weights)

    def fuse_lora(self, *, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """The active LoRAs act from now on, at this scale, whatever a call asks for."""
        self._loras.fuse(lora_scale, adapter_names)

    def unfuse_lora(self) -> None:
        self._loras.fused = {}

    def unload_lora_weights(self) -> None:
        self._loras.unload()

    def enable_lora(self) -> None:
        self._loras.enabled = True

    def disable_lora(self) -> None:
        self._loras.enabled = False

    def load_textual_inversion(
        self, path: str | Path, token: str | None = None, *, weight_name: str | None = None
    ) -> None:
        """A learned token, for prompts that hold it; a negative prompt may hold it where its prompt does."""
        self._tokens.load(path, token, weight_name)

    def _engine_on_schedule(self, scale: float) -> Engine:
        """The Engine with what acts of the LoRAs, on the scheduler's schedule; weights are shared."""
        sd, config = self._loras.engine(self.engine, scale), self._sampling.config
        if config == sd.schedule:
            return sd
        if self._scheduled is None or self._scheduled[0] is not sd or self._scheduled[1] != config:
            other = copy.copy(sd)
            other.schedule, other.timetables = config, Timetables(sd.unet, config)
            other.limits = replace(sd.limits, num_train_timesteps=config.num_train_timesteps)
            self._scheduled = sd, config, other
        return self._scheduled[2]


def _kind(dtype: Any) -> str:
    return check_choice("torch_dtype", str(dtype or torch.float32).removeprefix("torch."), _DTYPES)


def _own_scheduler(loading: Mapping[str, Any]) -> Any:
    """The scheduler of a model's folder, of the class that its index names; of a file without one, SD v1.5's."""
    checkpoint = open_checkpoint(loading["model"], loading.get("config"), prefer_fp16=loading["dtype"] == "float16")
    folder = checkpoint.tokenizer.parent
    if not (folder / "scheduler").is_dir():
        return PNDMScheduler(**_SD_V1_5)
    config, index = read_config(folder / "scheduler" / "scheduler_config.json"), folder / "model_index.json"
    named = read_config(index).get("scheduler") if index.is_file() else None
    return scheduler_from(config, named[1] if isinstance(named, list) and len(named) == 2 else None)
