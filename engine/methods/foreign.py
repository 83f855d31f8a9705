"""Concepts from other programs' files: textual inversion, Custom Diffusion and some LoRAs, as data on the text side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ConceptFileError
from .concept import Change, Concept
from .lora import LoRA, read_changes

if TYPE_CHECKING:
    from ..engine import Engine

_MAX_BYTES = 256_000_000
_A1111_NAME = "emb_params"
_A1111_PICKLED = "string_to_param"  # the key above the tensor in its older files, and in what others made of them
_XL = {"clip_g", "clip_l"}
_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL's larger encoder"}
_MARKS = set("()[]:|\\")
_TUNED = re.compile(r"^(?:unet\.)?(.+\.attn2)\.processor\.(to_[kv])_custom_diffusion\.weight$")


def import_textual_inversion(path: str | Path, noun: str = "", placeholder: str | None = None) -> Concept:
    """Read a textual-inversion embedding (Gal et al. 2022, arXiv:2208.01618) as a concept.

    Args:
        path: a .safetensors file; see ``read_vectors``.
        noun: class noun that prompts write behind the placeholder, if any.
        placeholder: what prompts will write; the token in the file, or the file's stem, where not given.

    Raises:
        ConceptFileError: the file is a pickle, or holds something else.
    """
    path = Path(path)
    token, vectors = read_vectors(path)
    if placeholder is None:
        placeholder = token or path.stem
    try:
        return Concept(noun, tokens=vectors, placeholder=placeholder, name=path.stem)
    except ValueError as error:
        raise ConceptFileError(f"{path}: {error}") from error


def read_vectors(path: Path) -> tuple[str, Tensor]:
    """The token that an embedding's file names, "" where it names none, and its vectors (S, E), float32.

    Args:
        path: a .safetensors file of diffusers (one tensor, named by its token) or of A1111 ("emb_params", or
            "string_to_param" as its pickles have, flattened).

    Raises:
        ConceptFileError: it is for SDXL, or is no embedding.
    """
    tensors = _read(path)
    if tensors.keys() >= _XL:
        raise ConceptFileError(f"{path}: this embedding is for SDXL, whose two text encoders it has vectors for")
    nested = {name: tensor for name, tensor in tensors.items() if name.split(".")[0] == _A1111_PICKLED}
    tensors = nested or tensors
    if len(tensors) != 1:
        raise ConceptFileError(f"{path}: an embedding must be one tensor, found {sorted(tensors)[:5]}")
    ((token, vectors),) = tensors.items()
    vectors = torch.atleast_2d(vectors)
    if vectors.ndim != 2 or not vectors.is_floating_point() or not vectors.numel() or not vectors.isfinite().all():
        found = f"{tuple(vectors.shape)} of {vectors.dtype}"
        raise ConceptFileError(f"{path}: an embedding must be finite numbers (S, E), found {found}")
    return "" if nested or token in (_A1111_NAME, "*") else token, vectors.float()


def read_embeddings(embeddings: Mapping[str, str | Path], width: int) -> dict[str, Tensor]:
    """The vectors (S, ``width``) that words of prompts stand for, by the words in lower case.

    Args:
        embeddings: files by what prompts write for them; see ``read_vectors``.
        width: of the text encoder's tokens.

    Raises:
        ValueError: a name is not one that a prompt could hold, or is given twice.
        ConceptFileError: a file is no embedding, or one for another text encoder.
    """
    if not isinstance(embeddings, Mapping):
        raise ValueError(f"embeddings must map names to files, got {embeddings!r}")
    found = dict[str, Tensor]()
    for name, path in embeddings.items():
        if _check_name(name).lower() in found:
            raise ValueError(f"embeddings must have names that differ in more than case, got {name!r} twice")
        _, vectors = read_vectors(Path(path))
        if vectors.shape[1] != width:
            known = _WIDTHS.get(vectors.shape[1], "another model")
            rule = f"{path}: vectors must be {width} wide for this model's text encoder"
            raise ConceptFileError(f"{rule}, found {vectors.shape[1]}, as of {known}")
        found[name.lower()] = vectors
    return found


def _check_name(name: Any) -> str:
    if not isinstance(name, str) or not name or any(map(str.isspace, name)) or _MARKS & set(name):
        raise ValueError(f"names of embeddings must be texts without spaces and ()[]:|\\, got {name!r}")
    return name


def import_custom_diffusion(
    sd: Engine, path: str | Path, noun: str, embedding: str | Path | None = None, placeholder: str | None = None
) -> Concept:
    """Read Custom Diffusion weights (Kumari et al. 2023, arXiv:2212.04488) as changes of keys and values.

    Args:
        sd: the model they were tuned from: the file holds whole weights, and a concept the difference.
        path: diffusers' ``pytorch_custom_diffusion_weights.safetensors``.
        noun: the class noun.
        embedding: the file of its modifier token, if it has one; see ``import_textual_inversion``.
        placeholder: what prompts will write for that token; the token itself where not given.

    Raises:
        ConceptFileError: the file is a pickle, belongs to another model, or tunes more than keys and values.
    """
    path = Path(path)
    changes = dict[str, Change]()
    for name, weight in _read(path).items():
        found = _TUNED.match(name)
        if found is None:
            rule = "only keys and values of cross-attention are text-side data, which a concept can hold"
            raise ConceptFileError(f"{path}: {rule}; found {name}")
        layer, projection = found.groups()
        if layer not in sd.unet.cross_attentions:
            raise ConceptFileError(f"{path}: this model has no cross-attention layer {layer}")
        own = sd.unet.text_projections[f"{layer}.{projection}"].weight
        if own.shape != weight.shape:
            shapes = f"{tuple(own.shape)} here, found {tuple(weight.shape)}"
            raise ConceptFileError(f"{path}: {layer}.{projection} is {shapes}")
        changes[f"{layer}.{projection}"] = Change(weight.float() - own.detach().cpu().float())
    if not changes:
        raise ConceptFileError(f"{path}: must hold keys and values of Custom Diffusion, found no tensor")
    token = None if embedding is None else import_textual_inversion(embedding, noun, placeholder)
    try:
        return Concept(
            noun,
            base=sd.fingerprint,
            name=path.stem,
            tokens=None if token is None else token.tokens,
            placeholder="V*" if token is None else token.placeholder,
            changes=changes,
        )
    except ValueError as error:
        raise ConceptFileError(f"{path}: {error}") from error


def import_lora(sd: Engine, lora: LoRA, noun: str) -> Concept:
    """Read a LoRA of cross-attention's keys and values alone as changes of them, for ``engine.ICO`` and ``engine.DCI``.

    It draws what ``sd.with_loras([lora])`` draws, without another Engine, and images of one request may differ in it.

    Args:
        sd: the model it will be used with.
        lora: the file and its weight.
        noun: the class noun.

    Raises:
        CheckpointError: the file is no LoRA for this model.
        ConceptFileError: it changes more than keys and values.
    """
    of_unet, of_text = read_changes([lora], sd.unet.config, sd.unet, sd.text_encoder.model)
    names = [name.removesuffix(".weight") for name in of_unet.layers]
    if others := [*(name for name in names if name not in sd.unet.text_projections), *of_text.layers]:
        rule = "only keys and values of cross-attention are text-side data, which a concept can hold; use with_loras"
        raise ConceptFileError(f"{lora.path}: {rule}; found {others[0]}")
    changes = dict[str, Change]()
    for name in names:
        own = sd.unet.text_projections[name].weight.detach().float()
        changes[name] = Change((of_unet(f"{name}.weight", own) - own).cpu())
    return Concept(noun, base=sd.fingerprint, name=lora.settings()["name"], changes=changes)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        rule = "pickle files can run code when read, and are refused; convert it to .safetensors where you trust it"
        raise ConceptFileError(f"{path}: {rule}")
    if not path.is_file():
        raise ConceptFileError(f"{path}: no such file")
    if path.stat().st_size > _MAX_BYTES:
        raise ConceptFileError(f"{path}: must be at most {_MAX_BYTES} bytes, has {path.stat().st_size}")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except SafetensorError as error:
        raise ConceptFileError(f"{path}: not a safetensors file: {error}") from error
