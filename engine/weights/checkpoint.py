"""Where a model's files are: a diffusers folder, a single file in the original layout, a hub id, or embedded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..models.config import ScheduleConfig, UNetConfig, VAEConfig
from ..models.tiny_vae import TinyVAEConfig
from . import ldm
from .stray import is_unused, open_single_file, schedule_of
from .tensors import TensorFile, WeightSource
from .tiny_vae_file import open_tiny_vae

ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED_MODEL = ASSETS / "tinyworld"
_CLIP_TOKENIZER = ASSETS / "clip"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHT_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_HUB_CONFIGS = ["scheduler/scheduler_config.json", "tokenizer/*", *(f"{part}/config.json" for part in _WEIGHT_STEMS)]
_OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_TEXT_BUFFER = "embeddings.position_ids"  # saved by old transformers; not a weight


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's configurations and where each component's weights are."""

    name: str
    unet_config: UNetConfig
    vae_config: VAEConfig | TinyVAEConfig
    text_config: Mapping[str, Any]
    schedule: ScheduleConfig
    unet: WeightSource
    vae: WeightSource
    text: WeightSource
    tokenizer: Path

    def digest(self) -> str:
        """SHA-256 of configurations and of the content of weights and tokenizer, wherever the files lie."""
        configs = (self.unet_config, self.vae_config, sorted(self.text_config.items()), self.schedule)
        found = hashlib.sha256(repr(configs).encode())
        weights = dict.fromkeys(file.path for part in (self.unet, self.vae, self.text) for file in part.files)
        for path in (*weights, *sorted(path for path in self.tokenizer.iterdir() if path.is_file())):
            own = hashlib.sha256()  # hashlib.file_digest came with Python 3.11
            with path.open("rb") as file:
                while part := file.read(1 << 20):
                    own.update(part)
            found.update(own.digest())
        return found.hexdigest()


def open_checkpoint(
    model: str | Path | None, config: str | Path | None, prefer_fp16: bool, needs_vae: bool = True
) -> Checkpoint:
    """Find a model's files and read its configurations; no weights are read yet.

    Args:
        model: folder, ``.safetensors`` file, hub id, or None for the embedded model.
        config: for a single file, a diffusers folder whose configs and tokenizer to use; the file's own folder where it
            is one, as in SD v1.5's repository.
        prefer_fp16: read the fp16 variant where a folder holds both.
        needs_vae: whether a single file must hold one.
    """
    if model is None:
        model = EMBEDDED_MODEL
    path = Path(model)
    if path.is_file():
        if config is None and (path.parent / "unet" / "config.json").is_file():
            config = path.parent
        return _open_single_file(path, None if config is None else Path(config), needs_vae)
    if config is not None:
        raise CheckpointError(f"config belongs to single-file checkpoints; {model} is not a file")
    if not path.is_dir():
        path = _open_hub(str(model), prefer_fp16)
    return _open_folder(path, str(model) if not Path(model).is_dir() else path.name, prefer_fp16)


def open_vae_folder(folder: Path, prefer_fp16: bool) -> tuple[VAEConfig | TinyVAEConfig, WeightSource]:
    """A VAE's config, and where its weights are, in its folder."""
    given, where = _read_json(folder / "config.json")
    if given.get("_class_name") == "AutoencoderTiny":
        return open_tiny_vae(_find_weights(folder, "vae", prefer_fp16), given, where)
    config = VAEConfig.from_dict(given, where)
    return config, WeightSource(_find_weights(folder, "vae", prefer_fp16), _vae_names)


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """A diffusers network's ``config.json``, and where it is."""
    return _read_json(folder / "config.json")


def find_network(folder: Path, prefer_fp16: bool) -> list[TensorFile]:
    """The files of a diffusers network's weights, in its folder."""
    return _find_weights(folder, "unet", prefer_fp16)


def open_image_encoder(folder: Path, prefer_fp16: bool) -> tuple[dict[str, Any], WeightSource]:
    """The config of a ``CLIPVisionModelWithProjection``, and where its weights are."""
    config, where = _read_json(folder / "config.json")
    if config.get("model_type") != "clip_vision_model":
        raise CheckpointError(f"{where}: model_type must be 'clip_vision_model', got {config.get('model_type')!r}")
    files = _find_weights(folder, "text_encoder", prefer_fp16)  # of transformers, whose stem is one
    return config, WeightSource(files, ignored=lambda name: name.endswith(_TEXT_BUFFER))


def _open_folder(folder: Path, name: str, prefer_fp16: bool) -> Checkpoint:
    unet_config = UNetConfig.from_dict(*_read_json(folder / "unet" / "config.json"))
    vae_config, vae = open_vae_folder(folder / "vae", prefer_fp16)
    return Checkpoint(
        name=name,
        unet_config=unet_config,
        vae_config=vae_config,
        text_config=_read_json(folder / "text_encoder" / "config.json")[0],
        schedule=ScheduleConfig.from_dict(*_read_json(folder / "scheduler" / "scheduler_config.json")),
        unet=WeightSource(_find_weights(folder / "unet", "unet", prefer_fp16)),
        vae=vae,
        text=WeightSource(
            _find_weights(folder / "text_encoder", "text_encoder", prefer_fp16), _text_names, ignored=_is_text_buffer
        ),
        tokenizer=_find_tokenizer(folder / "tokenizer"),
    )


def _open_single_file(path: Path, config: Path | None, needs_vae: bool) -> Checkpoint:
    file = open_single_file(TensorFile(path))
    has_vae = any(name.startswith(ldm.VAE_PREFIX) for name in file.entries)
    text_prefix = next(
        (one for one in ldm.TEXT_PREFIXES if any(n.startswith(one) for n in file.entries)), ldm.TEXT_PREFIXES[0]
    )
    if config is None:
        configs = ldm.infer_configs({name: entry.shape for name, entry in file.entries.items()}, text_prefix, has_vae)
        schedule, tokenizer = schedule_of(file), _CLIP_TOKENIZER
    else:
        configs = {part: _read_json(config / part / "config.json")[0] for part in ("unet", "vae", "text_encoder")}
        schedule = ScheduleConfig.from_dict(*_read_json(config / "scheduler" / "scheduler_config.json"))
        tokenizer = _find_tokenizer(config / "tokenizer")
    if needs_vae and not has_vae:
        raise CheckpointError(f"{path}: it holds no VAE; give one beside it: engine.load(..., vae=...)")
    unet_config = UNetConfig.from_dict(configs["unet"], f"{path} (unet)")
    vae_config = VAEConfig.from_dict(configs["vae"], f"{path} (vae)")
    return Checkpoint(
        name=path.stem,
        unet_config=unet_config,
        vae_config=vae_config,
        text_config=configs["text_encoder"],
        schedule=schedule,
        unet=WeightSource([file], lambda key: (ldm.unet_name(unet_config, key),), prefix=ldm.UNET_PREFIX),
        vae=WeightSource(
            [file], lambda key: (ldm.vae_name(vae_config, key),), prefix=ldm.VAE_PREFIX, ignored=is_unused
        ),
        text=WeightSource(
            [file],
            lambda key: (text_prefix + key.removeprefix("text_model."),),
            prefix="cond_stage_model.",
            ignored=lambda name: _is_text_buffer(name) or is_unused(name),
        ),
        tokenizer=tokenizer,
    )


def _open_hub(model: str, prefer_fp16: bool) -> Path:
    """The local snapshot of a hub id; downloaded, in one variant, where it is not whole and the hub can be reached."""
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"model must be a folder, a .safetensors file or a hub id, got {model!r}: no such path")
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        snapshot = Path(snapshot_download(model, allow_patterns=_HUB_CONFIGS, local_files_only=True))
        if all(_choose_weights(_names(snapshot), part, prefer_fp16) for part in _WEIGHT_STEMS):
            return snapshot
    except LocalEntryNotFoundError:
        pass  # not cached, or not whole: ask the hub
    try:
        names = list_repo_files(model)
        weights = [name for part in _WEIGHT_STEMS for name in _choose_weights(names, part, prefer_fp16)]
        return Path(snapshot_download(model, allow_patterns=[*_HUB_CONFIGS, *weights]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"{model!r} is neither a path nor whole in the local hub cache, and it could not be downloaded ({error}); "
            f"on a machine that is online run `hf download {model}`"
        ) from error


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]


def _choose_weights(names: Sequence[str], part: str, prefer_fp16: bool) -> list[str]:
    """Of a repository's files, the ones that hold a component: plain or fp16 variant, whole or sharded; [] if none."""
    stem = f"{part}/{_WEIGHT_STEMS[part]}"
    plain = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    half = (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16.safetensors.index.json")
    for name in (*half, *plain) if prefer_fp16 else (*plain, *half):
        if name in names and not name.endswith(".json"):
            return [name]
        if name in names:
            is_half = ".fp16" in name
            return [name, *(n for n in names if n.startswith(stem) and "-of-" in n and (".fp16" in n) == is_half)]
    return []


def _find_weights(folder: Path, part: str, prefer_fp16: bool) -> list[TensorFile]:
    """The safetensors files of a component, in its folder."""
    chosen = _choose_weights([f"{part}/{name}" for name in _names(folder)], part, prefer_fp16)
    if chosen:
        path = folder / chosen[0].removeprefix(f"{part}/")
        return _open_shards(path) if path.suffix == ".json" else [TensorFile(path)]
    for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.ckpt")):
        TensorFile(path)  # raises, with the way to convert it
    stem = folder / _WEIGHT_STEMS[part]
    raise CheckpointError(f"{stem}.safetensors: missing, and so is its fp16 variant")


def _find_tokenizer(folder: Path) -> Path:
    """Check for the vocabulary: from a folder without one, transformers makes a tokenizer that knows no word."""
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name}: missing; a tokenizer is vocab.json and merges.txt")
    return folder


def _open_shards(index: Path) -> list[TensorFile]:
    weight_map = _read_json(index)[0].get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a non-empty weight_map")
    files = {}
    for name in sorted(set(weight_map.values())):
        path = index.parent / name
        if path.parent != index.parent or not path.is_file():
            raise CheckpointError(f"{index}: shard {name} is missing")
        files[name] = TensorFile(path)
    for tensor, name in weight_map.items():
        if tensor not in files[name].entries:
            raise CheckpointError(f"{files[name].path}: {tensor} is missing; {index.name} says it is here")
    return list(files.values())


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    """A JSON object and where it came from."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; a diffusers folder of SD v1 holds it")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value, str(path)


def _vae_names(key: str) -> tuple[str, ...]:
    """A VAE parameter's name, and the one that diffusers before 0.18 saved."""
    for new, old in _OLD_VAE_NAMES.items():
        if f"attentions.0.{new}." in key:
            return key, key.replace(f".{new}.", f".{old}.")
    return (key,)


def _text_names(key: str) -> tuple[str, ...]:
    """A CLIP parameter's name with and without the prefix that transformers 5 dropped."""
    bare = key.removeprefix("text_model.")
    return f"text_model.{bare}", bare


def _is_text_buffer(name: str) -> bool:
    return name.endswith(_TEXT_BUFFER)
