"""The ControlNets and image-prompt adapters that a server, its replicas and runs over files have beside their model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..engine import Engine
from ..methods.asked_pictures import AskedControl, AskedImagePrompt, NetFiles, ReadPicture
from ..methods.control import Control, load_controlnet
from ..methods.image_prompt import ImagePrompt, IPAdapter
from ..models.controlnet import ControlNetModel
from ..models.image_encoder import ImageEncoder


@dataclass(frozen=True, slots=True)
class _Packed:
    """A ``Control`` or ``ImagePrompt`` with the name of its network in the network's place."""

    kind: type
    name: str
    rest: dict[str, Any]


class Nets:
    """Networks by name, loaded when it is made.

    Args:
        sd: whose they are.
        files: of them.

    Raises:
        CheckpointError: one cannot be read, or does not fit the model.
    """

    def __init__(self, sd: Engine, files: NetFiles | None = None) -> None:
        self.files = files or NetFiles()
        self.controls = {name: load_controlnet(path, sd) for name, path in self.files.controls.items()}
        load = adapter_loader(sd)
        self.adapters = {name: load(*paths) for name, paths in self.files.adapters.items()}

    def make(
        self, controls: Sequence[AskedControl], prompts: Sequence[AskedImagePrompt], read: ReadPicture
    ) -> dict[str, Any]:
        """The options of ``generate`` that are asked for by name.

        Raises:
            LookupError: there is no network of that name.
            ValueError: a value cannot be honoured, or a picture not read.
        """
        return made(
            controls, prompts, lambda where, one: _found(f"{where}.net", self.controls, one.net),
            lambda where, one: _found(f"{where}.adapter", self.adapters, one.adapter), read,
        )  # fmt: skip

    def packed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of ``generate`` for a process that has the same networks: names in their place.

        Raises:
            ValueError: a network is none of these.
        """
        return {name: self._packed(value) if name in _OPTIONS else value for name, value in options.items()}

    def unpacked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What another's ``packed`` was given, with the networks of this one."""
        return {name: self._unpacked(value) if name in _OPTIONS else value for name, value in options.items()}

    def _packed(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._packed(one) for one in value]
        if not isinstance(value, Control | ImagePrompt):
            return value
        part = _NETWORK[type(value)]
        network, known = getattr(value, part), self._of(type(value))
        name = next((name for name, one in known.items() if one is network), None)
        if name is None:
            rule = f"{part} must be one that the replicas have ({', '.join(known) or 'they have none'})"
            raise ValueError(f"{rule}, got {network.name!r}")
        rest = {one.name: getattr(value, one.name) for one in fields(value) if one.name != part}
        return _Packed(type(value), name, rest)

    def _unpacked(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._unpacked(one) for one in value]
        if not isinstance(value, _Packed):
            return value
        return value.kind(**{_NETWORK[value.kind]: self._of(value.kind)[value.name]}, **value.rest)

    def _of(self, kind: type) -> Mapping[str, Any]:
        return self.controls if kind is Control else self.adapters


_OPTIONS = ("control", "image_prompts")
_NETWORK: dict[type, str] = {Control: "net", ImagePrompt: "adapter"}


def made(
    controls: Sequence[AskedControl],
    prompts: Sequence[AskedImagePrompt],
    net: Callable[[str, AskedControl], ControlNetModel],
    adapter: Callable[[str, AskedImagePrompt], IPAdapter],
    read: ReadPicture,
) -> dict[str, Any]:
    """The options of ``generate`` that are asked for; those that are not, are not there.

    Args:
        controls, prompts: what is asked for.
        net, adapter: the network of one, given what errors call it.
        read: reads a picture.
    """
    options: dict[str, Any] = {}
    if controls:
        numbered = [(f"control[{i}]", one) for i, one in enumerate(controls)]
        options["control"] = [one.make(where, net(where, one), read) for where, one in numbered]
    if prompts:
        named = [(f"image_prompts[{i}]", one) for i, one in enumerate(prompts)]
        options["image_prompts"] = [one.make(where, adapter(where, one), read) for where, one in named]
    return options


def adapter_loader(sd: Engine) -> Callable[[str, str], IPAdapter]:
    """``IPAdapter.load`` that keeps adapters by file, and encoders, which several of them share, by folder."""
    adapters, encoders = dict[tuple[str, str], IPAdapter](), dict[str, ImageEncoder]()

    def load(file: str, encoder: str) -> IPAdapter:
        if (file, encoder) not in adapters:
            one = IPAdapter.load(file, sd, encoder)
            adapters[file, encoder] = IPAdapter(one.name, one.weights, encoders.setdefault(encoder, one.encoder))
        return adapters[file, encoder]

    return load


def _found(where: str, known: Mapping[str, Any], name: str) -> Any:
    if name not in known:
        rule = f"one of {', '.join(known)}" if known else "one that this server was started with: there is none"
        raise LookupError(f"{where} must be {rule}, got {name!r:.80}")
    return known[name]
