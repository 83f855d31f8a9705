"""Loading: from files to an Engine."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .backends.calibration.calibrate import Calibrated
from .backends.calibration.serve import calibrated_ops
from .backends.calibration.table import open_table
from .backends.cudnn import convolve
from .backends.graphs import CudaCapture, Graphs
from .backends.native import DTYPES, levels, native_ops
from .backends.ops import TORCH, TRITON, Ops
from .calibrating import calibrate_model
from .checks import check_choice, check_flag, check_integer
from .engine import MAX_PIXELS, Engine
from .errors import CheckpointError
from .kernels.jit import load_kernels
from .methods.foreign import read_embeddings
from .methods.lora import Changes, LoRA, read_changes
from .models.layers import place_convolutions
from .models.tiny_vae import make_vae
from .models.unet import UNet2DConditionModel
from .result import Result
from .text.encoder import TextEncoder
from .warn import warn
from .weights.checkpoint import Checkpoint, open_checkpoint
from .weights.tensors import fill_positions, load_module
from .weights.vae_file import with_vae

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = ("auto", "torch", "native", "triton")


def load(
    model: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    graphs: bool | None = None,
    config: str | Path | None = None,
    vae: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
    loras: Sequence[LoRA] = (),
    embeddings: Mapping[str, str | Path] | None = None,
    calibrate: bool = True,
) -> Engine:
    """Load a model.

    Args:
        model: a diffusers folder, a single ``.safetensors`` file in the original SD layout, a hub id, or None for the
            embedded model.
        device: "cuda" where there is one, else "cpu", unless given.
        dtype: "float32", "bfloat16" or "float16"; unless given, float16 on a GPU and float32 on a CPU.
        backend: "torch", "native" (a CPU, float32 or bfloat16), "triton" (a GPU; all of our kernels), or "auto": on a
            CPU native where it is built and fits, else torch; on a GPU by operation what was found to be right and
            fastest on this card, torch's own where nothing was.
        graphs: replay steps and decoding as CUDA graphs, captured when first met (``Engine.warmup`` meets them ahead);
            unless given, with backends "triton" and, on a GPU, "auto".
        config: for a single file, a diffusers folder whose configs and tokenizer to use; the file's own folder where it
            is one. Without any, sizes are read from the tensors' shapes and the rest is SD v1.5's.
        vae: another VAE than the model's: a diffusers folder, or a ``.safetensors`` file in either layout; an
            AutoencoderTiny (TAESD) too, as a diffusers folder or file.
        max_pixels: the largest height x width that ``generate`` takes.
        loras: merged in float32 into the weights as the files have them, then cast; ``Engine.with_loras`` adds later.
        embeddings: textual inversions by the names that prompts and negative prompts write, in any case, for their
            vectors: ``{"<toy>": "toy.safetensors"}``, in diffusers' layout or A1111's.
        calibrate: with "auto" on a GPU, find out now what is not known yet, which takes up to 40 seconds on a new card.

    Raises:
        CheckpointError: files are missing, damaged or do not match their config.
        ValueError: another argument cannot be honoured.
        RuntimeError: the backend is not built, or not for this device and dtype.
    """
    check_choice("backend", backend, BACKENDS)
    check_integer("max_pixels", max_pixels, 1)
    check_flag("calibrate", calibrate)
    where = _device(device)
    kind = _dtype(dtype, where)
    if graphs and where.type != "cuda":
        raise RuntimeError(f"graphs need a CUDA device, got {where}; leave graphs out")
    ops = _ops(backend, where, kind)
    has_graphs = graphs if graphs is not None else where.type == "cuda" and backend != "torch"
    checkpoint = _open(model, config, vae, kind)
    _check_fit(checkpoint)
    if where.type == "cuda":
        if backend == "auto":
            ops = calibrated_ops(calibrate_model(checkpoint, where, kind).table if calibrate else open_table(where))
        ops = replace(ops, conv3x3=partial(convolve, benchmark=has_graphs))
    with torch.device("meta"):
        unet = UNet2DConditionModel(checkpoint.unet_config, ops)
        autoencoder = make_vae(checkpoint.vae_config, ops)
        text = _text_model(checkpoint)
    of_unet, of_text = read_changes(loras, checkpoint.unet_config, unet, text)
    words = read_embeddings(embeddings or {}, text.config.hidden_size)
    text_encoder = _load_text_encoder(checkpoint, text, where, kind, of_text, words)
    load_module(unet, checkpoint.unet, where, kind, of_unet)
    load_module(autoencoder, checkpoint.vae, where, kind)
    unet.place(ops.name, where, has_graphs)
    place_convolutions(autoencoder, ops.name, where, has_graphs)
    captured = Graphs(lambda: CudaCapture(where)) if has_graphs else None
    return Engine(
        checkpoint.name, unet, autoencoder, text_encoder, checkpoint.schedule, ops, captured, max_pixels, loras
    )


def checkpoint_of(loading: Mapping[str, Any]) -> Checkpoint:
    """Where the files are that ``load(**loading)`` reads."""
    kind = _dtype(loading.get("dtype"), _device(loading.get("device")))
    return _open(loading.get("model"), loading.get("config"), loading.get("vae"), kind)


def calibrate_card(loading: Mapping[str, Any], **options: Any) -> Calibrated:
    """Calibrate the card that ``load(**loading)`` loads onto, for the model that it loads; see ``calibrate_model``."""
    where = _device(loading.get("device"))
    if where.type != "cuda":
        raise RuntimeError(f"calibration needs a CUDA device, got {where}")
    return calibrate_model(checkpoint_of(loading), where, _dtype(loading.get("dtype"), where), **options)


def _open(
    model: str | Path | None, config: str | Path | None, vae: str | Path | None, dtype: torch.dtype
) -> Checkpoint:
    prefer_fp16 = dtype == torch.float16
    checkpoint = open_checkpoint(model, config, prefer_fp16=prefer_fp16, needs_vae=vae is None)
    return checkpoint if vae is None else with_vae(checkpoint, Path(vae), prefer_fp16=prefer_fp16)


def model_digest(loading: Mapping[str, Any]) -> str:
    """What of ``load``'s arguments decides pictures, beyond rounding: content of model and all it loads, and dtype."""
    dtype, words = _dtype(loading.get("dtype"), _device(loading.get("device"))), loading.get("embeddings") or {}
    return "-".join(
        [
            checkpoint_of(loading).digest(),
            str(dtype),
            *(lora.digest() for lora in loading.get("loras", ())),
            *(f"{name.lower()}:{hashlib.sha256(Path(path).read_bytes()).hexdigest()}" for name, path in words.items()),
        ]
    )


def _check_fit(checkpoint: Checkpoint) -> None:
    """Refuse components that do not belong together."""
    unet, vae = checkpoint.unet_config, checkpoint.vae_config
    inpainting = 2 * vae.latent_channels + 1  # latents, mask and the masked picture's latents
    if unet.in_channels not in (vae.latent_channels, inpainting):
        rule = f"the UNet's in_channels must be {vae.latent_channels}, or {inpainting} of an inpainting model"
        raise CheckpointError(f"{checkpoint.name}: {rule}, to fit the rest, got {unet.in_channels}")
    for name, found, expected in (
        ("the UNet's out_channels", unet.out_channels, vae.latent_channels),
        ("the VAE's in_channels", vae.in_channels, 3),
        ("the VAE's out_channels", vae.out_channels, 3),
        ("the text encoder's hidden_size", checkpoint.text_config.get("hidden_size"), unet.cross_attention_dim),
    ):
        if found != expected:
            raise CheckpointError(f"{checkpoint.name}: {name} must be {expected} to fit the rest, got {found}")


def _text_model(checkpoint: Checkpoint) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**checkpoint.text_config))


def _load_text_encoder(
    checkpoint: Checkpoint,
    model: Any,
    device: torch.device,
    dtype: torch.dtype,
    change: Changes,
    embeddings: Mapping[str, torch.Tensor],
) -> TextEncoder:
    from transformers import CLIPTokenizer

    load_module(model, checkpoint.text, device, dtype, change)
    fill_positions(model, device)
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint.tokenizer, local_files_only=True)
    return TextEncoder(tokenizer, model, embeddings)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch device such as 'cpu' or 'cuda:0', got {device!r}") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device {device!r} asked for, but torch {torch.__version__} sees no GPU; use device='cpu'")
    if where.type == "cuda" and where.index is None:  # a thread may be on another device than this one
        where = torch.device("cuda", torch.cuda.current_device())
    return where


def _ops(backend: str, device: torch.device, dtype: torch.dtype) -> Ops:
    fits = device.type == "cpu" and dtype in DTYPES
    if backend == "auto":
        backend = "native" if fits and levels() else "torch"
    if backend == "triton":
        load_kernels()
    if backend == "triton" and device.type != "cuda":
        raise RuntimeError(f"backend 'triton' needs a CUDA device, got {device}; use backend='torch'")
    if backend == "native" and not fits:
        raise RuntimeError(f"backend 'native' needs float32 or bfloat16 on a CPU, got {dtype} on {device}")
    if backend == "native":
        return native_ops()
    return TRITON if backend == "triton" else TORCH


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    kind = _DTYPES[check_choice("dtype", name, tuple(_DTYPES))]
    if kind == torch.float16 and device.type == "cpu":
        warn("float16 is about 1000 times slower than bfloat16 on a CPU", RuntimeWarning)
    return kind


class _Embedded:
    """The embedded model, loaded when first asked for."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.lock = threading.Lock()

    def get(self) -> Engine:
        with self.lock:
            if self.engine is None:
                self.engine = load()
            return self.engine


_EMBEDDED = _Embedded()


def generate(prompt: str | Sequence[str], **arguments: Any) -> Result:
    """Draw with the embedded model, which is loaded once: ``Engine.generate``."""
    return _EMBEDDED.get().generate(prompt, **arguments)
