"""Twinstream: a Stable Diffusion v1.5 engine for customised generation.

Names are imported when first used, so that ``import engine`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .engine import Engine
    from .errors import (
        CheckpointError,
        ConceptFileError,
        DeadlineError,
        NonFiniteError,
        OutOfMemoryError,
        QueueFullError,
        SchedulerClosedError,
        UnknownArgumentError,
    )
    from .loading import generate, load
    from .methods.concept import Concept
    from .methods.control import Control, load_controlnet
    from .methods.dci import DCI
    from .methods.foreign import import_custom_diffusion, import_lora, import_textual_inversion
    from .methods.ico import ICO
    from .methods.image_prompt import ImagePrompt, IPAdapter
    from .methods.infusion import Infusion
    from .methods.lora import LoRA
    from .result import Result
    from .sampling.samplers import SAMPLERS
    from .saved_settings import read_settings
    from .serve.scheduler import Scheduler
    from .train.ico import train_ico
    from .train.infusion import train_infusion

_HOMES = {
    "SAMPLERS": "sampling.samplers",
    "CheckpointError": "errors",
    "Concept": "methods.concept",
    "ConceptFileError": "errors",
    "Control": "methods.control",
    "DCI": "methods.dci",
    "DeadlineError": "errors",
    "Engine": "engine",
    "ICO": "methods.ico",
    "IPAdapter": "methods.image_prompt",
    "ImagePrompt": "methods.image_prompt",
    "Infusion": "methods.infusion",
    "LoRA": "methods.lora",
    "NonFiniteError": "errors",
    "OutOfMemoryError": "errors",
    "QueueFullError": "errors",
    "Result": "result",
    "Scheduler": "serve.scheduler",
    "SchedulerClosedError": "errors",
    "UnknownArgumentError": "errors",
    "generate": "loading",
    "import_custom_diffusion": "methods.foreign",
    "import_lora": "methods.foreign",
    "import_textual_inversion": "methods.foreign",
    "load": "loading",
    "load_controlnet": "methods.control",
    "read_settings": "saved_settings",
    "train_ico": "train.ico",
    "train_infusion": "train.infusion",
}
__all__ = [
    "DCI",
    "ICO",
    "SAMPLERS",
    "CheckpointError",
    "Concept",
    "ConceptFileError",
    "Control",
    "DeadlineError",
    "Engine",
    "IPAdapter",
    "ImagePrompt",
    "Infusion",
    "LoRA",
    "NonFiniteError",
    "OutOfMemoryError",
    "QueueFullError",
    "Result",
    "Scheduler",
    "SchedulerClosedError",
    "UnknownArgumentError",
    "__version__",
    "generate",
    "import_custom_diffusion",
    "import_lora",
    "import_textual_inversion",
    "load",
    "load_controlnet",
    "read_settings",
    "train_ico",
    "train_infusion",
]


def __getattr__(name: str) -> Any:
    if name == "compat":
        return import_module(".compat", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
