"""ControlNets (arXiv:2302.05543): other networks beside the model's, told by a picture where things are to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..checks import check_flag, check_number
from ..errors import CheckpointError
from ..models.config import UNetConfig
from ..models.controlnet import ControlNetModel
from ..read_picture import read_picture
from ..weights.controlnet_file import open_controlnet
from ..weights.tensors import load_module

if TYPE_CHECKING:
    from ..engine import Engine

_LARGEST = 100.0
HintPicture = Image.Image | np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Control:
    """A ControlNet and the picture that tells it where things are.

    Several act at once, and what they add adds up. Rows of followers (Infusion) get the net's answer to their leader's
    text, without a concept's residuals; a text's own changes of keys and values (ICO) are the UNet's alone.

    Attributes:
        net: what ``engine.load_controlnet`` gave.
        image: the hint as the net was trained on it (edges, depth, a pose ...), PIL or an array (H, W) or (H, W, 3),
            uint8 or float in [0, 1]; or several, one per prompt or one per image. It is resized to the size drawn.
        weight: factor on what the net adds, -100 to 100; 0 leaves the net out.
        start, end: shares of the steps, 0 to 1. Step i of n, from 0, has the net unless ``i / n < start`` or
            ``(i + 1) / n > end``; image-to-image counts the steps that it takes.
        guess_mode: whether the conditional rows alone have it, less in fine skip connections (0.1) than in the middle
            (1), so that the net's hint rather than the prompt tells what is drawn. A guidance_scale of 3 to 5 is usual.

    Raises:
        ValueError: a value is out of its range.
    """

    net: ControlNetModel
    image: HintPicture | Sequence[HintPicture]
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess_mode: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.net, ControlNetModel):
            raise ValueError(f"net must be what engine.load_controlnet gives, got {self.net!r:.60}")
        for name, low, high in (("weight", -_LARGEST, _LARGEST), ("start", 0.0, 1.0), ("end", 0.0, 1.0)):
            object.__setattr__(self, name, check_number(name, getattr(self, name), low, high))
        if self.start >= self.end:
            raise ValueError(f"start must be below end, got start={self.start} and end={self.end}")
        check_flag("guess_mode", self.guess_mode)

    @property
    def conditional_only(self) -> bool:
        """Whether unconditional rows go without."""
        return self.guess_mode or self.net.control.is_pooled

    def acts(self, step: int, steps: int) -> bool:
        """Whether step ``step`` of ``steps``, from 0, has the net; diffusers' rule, in its arithmetic."""
        return bool(self.weight) and not (step / steps < self.start or (step + 1) / steps > self.end)

    def settings(self) -> dict[str, Any]:
        """How a result describes it."""
        shared = {name: getattr(self, name) for name in ("weight", "start", "end", "guess_mode")}
        return {"name": self.net.name, **shared}


def check_controls(name: str, value: Any) -> tuple[Control, ...]:
    """Some controls as they are kept, from one or a list."""
    controls = (value,) if isinstance(value, Control) else value
    if not isinstance(controls, list | tuple) or not all(isinstance(one, Control) for one in controls):
        raise ValueError(f"{name} must be an engine.Control or a list of these, got {value!r:.80}")
    return tuple(controls)


def load_controlnet(path: str | Path, sd: Engine, config: str | Path | None = None) -> ControlNetModel:
    """Load a ControlNet for a model: on its device, in its dtype, with its backend. The model stays as it is.

    Args:
        path: a diffusers folder, or a ``.safetensors`` file in diffusers' or the original layout (``control_model.*``,
            with or without that prefix; what else a whole checkpoint holds is left unread).
        sd: the model it is to be used with, or with ``with_loras`` of it.
        config: for a file, a folder whose ``config.json`` to use; the file's own folder where it has one. Without any,
            sizes are the model's. A "shuffle" net needs one: that it pools over the picture is not in its weights.

    Raises:
        CheckpointError: files are missing or damaged, or the net belongs to a model of other sizes.
        ValueError: a config is not one of a ControlNet of the SD-v1 family; the message names the field.
    """
    prefer_fp16 = sd.dtype == torch.float16
    folder = None if config is None else Path(config)
    sizes, source, name = open_controlnet(Path(path), sd.unet.config, folder, prefer_fp16)
    check_fit(str(path), sizes.unet, sd.unet.config)
    if sizes.factor != sd.vae.config.factor:
        rule = f"the embedding of hints must make them {sd.vae.config.factor} times smaller, as this model's VAE does"
        raise CheckpointError(f"{path}: {rule}, got {sizes.factor} times ({len(sizes.hint_channels)} widths)")
    with torch.device("meta"):
        net = ControlNetModel(sizes, sd.backend, name)
    load_module(net, source, sd.device, sd.dtype)
    net.place(sd.backend.name, sd.device, sd.graphs is not None)
    return net


def asked_controls(texts: Sequence[str], sd: Engine) -> list[Control]:
    """Controls as a command line asks for them, ``NET=IMAGE[:WEIGHT[:START:END]]``; a net is loaded once.

    Raises:
        ValueError: a text is not of that form, or its net or picture cannot be read.
    """
    nets: dict[str, ControlNetModel] = {}
    controls = []
    for text in texts:
        path, _, rest = text.partition("=")
        image, *numbers = rest.split(":")
        try:
            values = [float(one) for one in numbers]
        except ValueError:
            values = []
        if not path or not image or len(values) != len(numbers) or len(values) not in (0, 1, 3):
            raise ValueError(f"control must be NET=IMAGE, NET=IMAGE:WEIGHT or NET=IMAGE:WEIGHT:START:END, got {text!r}")
        if path not in nets:
            nets[path] = load_controlnet(path, sd)
        given = dict(zip(("weight", "start", "end"), values, strict=False))
        controls.append(replace(Control(nets[path], read_picture(image)), **given))
    return controls


def check_fit(where: str, net: UNetConfig, unet: UNetConfig) -> None:
    """Raise ``CheckpointError`` unless a net's residuals and texts have the sizes of a UNet's."""
    for name, expected in (
        ("cross_attention_dim", unet.cross_attention_dim),
        ("block_out_channels", unet.block_out_channels),
        ("layers_per_block", unet.layers_per_block),
        ("in_channels", unet.out_channels),  # latents alone, also beside an inpainting UNet
    ):
        if (found := getattr(net, name)) != expected:
            other = {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}.get(net.cross_attention_dim)
            hint = f" (a net of {other}?)" if other and name == "cross_attention_dim" else ""
            raise CheckpointError(f"{where}: {name} must be {expected} to fit the model, got {found}{hint}")
