"""Diffusers' schedulers as names and configurations; what they compute is a sampler's table here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..errors import CheckpointError
from ..models.config import ScheduleConfig

# DEIS' own name means the default to its sibling, in diffusers too
_ALGORITHMS = {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde", "deis": "dpmpp_2m"}
_NAMED = {"use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}  # schedules that are no config's here
_NOT_HERE = {
    "DPMSolverSinglestepScheduler": "DPMSolverMultistepScheduler",
    "KDPM2AncestralDiscreteScheduler": "KDPM2DiscreteScheduler or EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler": "EulerDiscreteScheduler or DPMSolverMultistepScheduler",
    "EDMEulerScheduler": "EulerDiscreteScheduler with use_karras_sigmas=True",
    "UnCLIPScheduler": "DDPMScheduler",
}


class Config(dict[str, Any]):
    """A scheduler's configuration, whose entries are attributes too, as diffusers has it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"the scheduler's config has no {name!r}; it has {', '.join(self)}") from error


class Scheduler:
    """A scheduler's name and configuration, as ``pipe.scheduler`` takes them; it computes nothing by itself.

    Args:
        config: fields of ``scheduler_config.json``. What is left out is the class's default, but for the betas, which
            must be said: the classes' own are neither SD's nor one another's.
    """

    sampler: ClassVar[str]

    def __init__(self, **config: Any) -> None:
        self.config = Config(config | {"_class_name": type(self).__name__})

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> Scheduler:
        """A scheduler of this class on another one's schedule, such as ``pipe.scheduler.config``.

        What the other one did not say, but had by default, is this class's default.
        """
        unsaid = set(config.get("_use_default_values") or ())
        said = {key: value for key, value in config.items() if not key.startswith("_") and key not in unsaid}
        return cls(**said | changes)

    @classmethod
    def from_pretrained(cls, path: str | Path, subfolder: str | None = None) -> Scheduler:
        """From a diffusers folder.

        Raises:
            CheckpointError: there is no configuration.
        """
        folder = Path(path) if subfolder is None else Path(path) / subfolder
        return cls.from_config(read_config(folder / "scheduler_config.json"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self.config)})"


class DDIMScheduler(Scheduler):
    sampler = "ddim"


class DDPMScheduler(Scheduler):
    sampler = "ddpm"


class PNDMScheduler(Scheduler):
    sampler = "pndm"


class EulerDiscreteScheduler(Scheduler):
    sampler = "euler"


class EulerAncestralDiscreteScheduler(Scheduler):
    sampler = "euler_ancestral"


class HeunDiscreteScheduler(Scheduler):
    sampler = "heun"


class KDPM2DiscreteScheduler(Scheduler):
    sampler = "dpm2"


class DPMSolverMultistepScheduler(Scheduler):
    sampler = "dpmpp_2m"


class DPMSolverSDEScheduler(Scheduler):
    sampler = "dpmpp_sde"


class DEISMultistepScheduler(Scheduler):
    sampler = "deis"


class UniPCMultistepScheduler(Scheduler):
    sampler = "unipc"


class LCMScheduler(Scheduler):
    sampler = "lcm"


class TCDScheduler(Scheduler):
    sampler = "tcd"


KNOWN: dict[str, type[Scheduler]] = {one.__name__: one for one in Scheduler.__subclasses__()}


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a scheduler means to an Engine.

    Attributes:
        sampler, schedule: arguments of ``generate``.
        config: the training schedule, and where steps are on it.
    """

    sampler: str
    schedule: str | None
    config: ScheduleConfig


def sampling_of(scheduler: Any) -> Sampling:
    """What a scheduler of this module means, or one of diffusers, by the name of its class.

    Raises:
        ValueError: there is no sampler for it, or its configuration asks for what no sampler here does.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    if name not in KNOWN or not isinstance(config, Mapping):
        instead = f"; use {_NOT_HERE[name]}" if name in _NOT_HERE else ""
        raise ValueError(f"scheduler must be one of {', '.join(KNOWN)}, got {name}{instead}")
    said, sampler = dict(config), KNOWN[name].sampler
    algorithm = said.pop("algorithm_type", "dpmsolver++")  # which other classes carry along and do not read
    if sampler == "dpmpp_2m":
        if algorithm not in _ALGORITHMS:
            raise ValueError(f"algorithm_type must be one of {', '.join(_ALGORITHMS)}, got {algorithm!r}")
        sampler = _ALGORITHMS[algorithm]
    schedules = [schedule for field, schedule in _NAMED.items() if said.pop(field, None)]
    if len(schedules) + bool(said.get("use_karras_sigmas")) > 1:
        raise ValueError(f"only one of use_karras_sigmas, {', '.join(_NAMED)} can be True, got more")
    return Sampling(sampler, schedules[0] if schedules else None, ScheduleConfig.from_dict(said, name))


def read_config(path: Path) -> Config:
    """A JSON object of a diffusers folder."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as a configuration: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return Config(config)


def scheduler_from(config: Mapping[str, Any], name: str | None = None) -> Scheduler:
    """A scheduler of a configuration, and of the class of that name, or the one that it names itself.

    Raises:
        ValueError: there is no sampler for it.
    """
    name = name or config.get("_class_name", "PNDMScheduler")  # as SD v1.5's own
    if name not in KNOWN:
        instead = f"; give scheduler={_NOT_HERE[name]}" if name in _NOT_HERE else ""
        raise ValueError(f"the model's scheduler must be one of {', '.join(KNOWN)}, got {name!r}{instead}")
    return KNOWN[name](**{key: value for key, value in config.items() if not key.startswith("_")})
