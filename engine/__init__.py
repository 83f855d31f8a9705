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
    from .errors import CheckpointError, ConceptFileError, NonFiniteError, OutOfMemoryError
    from .ico import ICO
    from .imports import import_custom_diffusion, import_textual_inversion
    from .infusion import Infusion
    from .loading import generate, load
    from .result import Result
    from .samplers import SAMPLERS
    from .train.ico import train_ico
    from .train.infusion import train_infusion

_HOMES = {
    "SAMPLERS": "samplers",
    "CheckpointError": "errors",
    "Concept": "concept",
    "ConceptFileError": "errors",
    "DCI": "dci",
    "Engine": "engine",
    "ICO": "ico",
    "Infusion": "infusion",
    "NonFiniteError": "errors",
    "OutOfMemoryError": "errors",
    "Result": "result",
    "UnknownArgumentError": "engine",
    "generate": "loading",
    "import_custom_diffusion": "imports",
    "import_textual_inversion": "imports",
    "load": "loading",
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
    "Engine",
    "Infusion",
    "NonFiniteError",
    "OutOfMemoryError",
    "Result",
    "UnknownArgumentError",
    "__version__",
    "generate",
    "import_custom_diffusion",
    "import_textual_inversion",
    "load",
    "train_ico",
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
