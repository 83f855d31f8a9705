"""ControlNets and image prompts as text asks for them, on a command line, in a file of requests or over HTTP.

Networks and pictures are names here; whoever reads them knows what they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from ..models.controlnet import ControlNetModel
from .control import Control
from .image_prompt import ImagePrompt, IPAdapter

if TYPE_CHECKING:
    from ..engine import Engine

T = TypeVar("T")

ReadPicture = Callable[[str, str], Image.Image]  # of what it is called, and of its name


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedControl:
    """A ``Control`` without tensors.

    Attributes:
        net: a name, or files.
        image: the hint, or one per prompt or per image.
        weight, start, end, guess_mode: see ``Control``.
    """

    net: str
    image: str | Sequence[str]
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess_mode: bool = False

    def make(self, where: str, net: ControlNetModel, read: ReadPicture) -> Control:
        """The control; ``where`` is what an error calls it."""
        image = _read_all(f"{where}.image", self.image, read)
        with _told(where):
            return Control(net, image, self.weight, self.start, self.end, self.guess_mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedImagePrompt:
    """An ``ImagePrompt`` without tensors.

    Attributes:
        adapter: a name, or a file.
        image: a picture, or several that are attended to together.
        scale: see ``ImagePrompt``.
        image_encoder: the adapter's, where ``adapter`` is a file; see ``encoder_of``.
    """

    adapter: str
    image: str | Sequence[str]
    scale: float = 1.0
    image_encoder: str | None = None

    def make(self, where: str, adapter: IPAdapter, read: ReadPicture) -> ImagePrompt:
        """The image prompt; ``where`` is what an error calls it."""
        image = _read_all(f"{where}.image", self.image, read)
        with _told(where):
            return ImagePrompt(adapter, image, self.scale)


@dataclass(frozen=True, slots=True)
class NetFiles:
    """Networks by name.

    Attributes:
        controls: folders or files of ControlNets.
        adapters: file and image encoder of IP-Adapters.
    """

    controls: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def read_asked(name: str, kind: type[T], given: Any) -> tuple[T, ...]:
    """Some ``AskedControl`` or ``AskedImagePrompt`` from a list of JSON objects; None is none.

    Raises:
        ValueError: it is no such list; the message begins with ``name`` and the entry's number.
    """
    if given is None:
        return ()
    if not isinstance(given, list | tuple):
        raise ValueError(f"{name} must be a list of objects, got {given!r:.80}")
    return tuple(_entry(f"{name}[{i}]", kind, one) for i, one in enumerate(given))


def read_net_files(controls: Sequence[str], adapters: Sequence[str], encoder: Path | None) -> NetFiles:
    """Networks as a command line names them, each ``NAME=FILE``; ``encoder`` as in ``encoder_of``."""
    if encoder is not None and not adapters:
        raise ValueError(f"image-encoder belongs to image-prompt-adapter: give one too, got {str(encoder)!r}")
    files = _named_files("image-prompt-adapter", adapters)
    return NetFiles(
        _named_files("control", controls), {name: (path, encoder_of(path, encoder)) for name, path in files.items()}
    )


def encoder_of(adapter: str, given: str | Path | None) -> str:
    """The image encoder of an adapter's file: the folder given, else ``image_encoder`` beside the file."""
    return str(Path(adapter).parent / "image_encoder" if given is None else given)


def asked_image_prompts(texts: Sequence[str], encoder: Path | None, sd: Engine) -> list[ImagePrompt]:
    """Image prompts as a command line asks for them, ``ADAPTER=PICTURE[:SCALE]``; an adapter is loaded once.

    Raises:
        ValueError: a text is not of that form, or its adapter or picture cannot be read.
    """
    if encoder is not None and not texts:
        raise ValueError(f"image-encoder belongs to image-prompt: give one too, got {str(encoder)!r}")
    adapters, prompts = dict[str, IPAdapter](), []
    for text in texts:
        path, _, rest = text.partition("=")
        picture, sign, number = rest.partition(":")
        try:
            scale = float(number) if sign else 1.0
        except ValueError:
            path = ""
        if not path or not picture:
            raise ValueError(f"image-prompt must be ADAPTER=PICTURE or ADAPTER=PICTURE:SCALE, got {text!r}")
        if path not in adapters:
            adapters[path] = IPAdapter.load(path, sd, encoder_of(path, encoder))
        prompts.append(ImagePrompt(adapters[path], picture, scale))
    return prompts


def _named_files(what: str, texts: Sequence[str]) -> dict[str, str]:
    found = dict[str, str]()
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ValueError(f"{what} must be NAME=FILE, got {text!r}")
        if name in found:
            raise ValueError(f"{what} must have a name of its own, got {name!r} twice")
        found[name] = path
    return found


def _entry(where: str, kind: type[T], given: Any) -> T:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be an object, got {given!r:.80}")
    known = {one.name: one for one in fields(kind)}  # pyright: ignore[reportArgumentType]
    for name in given:
        if name not in known:
            raise ValueError(f"{where} has no {name!r}; it has {', '.join(known)}")
    for name, one in known.items():
        value = given.get(name, one.default)
        is_text = isinstance(value, str) and bool(value)
        if name == "image" and isinstance(value, list | tuple):
            is_text = bool(value) and all(isinstance(text, str) and text for text in value)
        if one.default is MISSING and not is_text:
            got = "nothing" if value is MISSING else f"{value!r:.80}"
            raise ValueError(
                f"{where}.{name} must be {'one text or several' if name == 'image' else 'a text'}, got {got}"
            )
    return kind(**given)


def _read_all(where: str, names: str | Sequence[str], read: ReadPicture) -> Image.Image | list[Image.Image]:
    return read(where, names) if isinstance(names, str) else [read(where, name) for name in names]


@contextmanager
def _told(where: str) -> Iterator[None]:
    """What is wrong is told with where it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
