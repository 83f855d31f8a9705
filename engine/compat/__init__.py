"""Diffusers' pipelines and schedulers by their names, for scripts that were written for them: engines underneath."""

from .pipelines import PipelineOutput, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from .schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "PipelineOutput",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionPipeline",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]
