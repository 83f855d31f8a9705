"""Twinstream: a Stable Diffusion v1.5 engine for customised generation.

Names are imported when first used, so that ``import engine`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .concept import Concept
    from .dci import DCI
    from .engine import Engine, UnknownArgumentError
    from .errors import CheckpointError, ConceptFileError, NonFiniteError
    from .infusion import Infusion
    from .loading import generate, load
    from .result import Result
    from .samplers import SAMPLERS
    from .train.infusion import train_infusion

_HOMES = {
    "SAMPLERS": "samplers",
    "CheckpointError": "errors",
    "Concept": "concept",
    "ConceptFileError": "errors",
    "DCI": "dci",
    "Engine": "engine",
    "Infusion": "infusion",
    "NonFiniteError": "errors",
    "Result": "result",
    "UnknownArgumentError": "engine",
    "generate": "loading",
    "load": "loading",
    "train_infusion": "train.infusion",
}
__all__ = [
    "DCI",
    "SAMPLERS",
    "CheckpointError",
    "Concept",
    "ConceptFileError",
    "Engine",
    "Infusion",
    "NonFiniteError",
    "Result",
    "UnknownArgumentError",
    "__version__",
    "generate",
    "load",
    "train_infusion",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
