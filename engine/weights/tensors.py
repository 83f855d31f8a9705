"""Weights from safetensors files into modules: checked, and without a second copy.

Files are read with plain ``read`` calls. A memory map would kill the process with SIGBUS if the file shrank while it
was being read; here that is an error like any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_PICKLE_ADVICE = """pickle files can run code when read; convert it first:
    import torch
    from safetensors.torch import save_file
    state = torch.load("{name}", map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    save_file({{k: v.contiguous() for k, v in state.items() if torch.is_tensor(v)}}, "{target}")"""
_PICKLES = {
    "diffusion_pytorch_model.bin": "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin": "model.safetensors",
}


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """One safetensors file: its header, and its tensors on request.

    Attributes:
        entries: where each tensor is, by its name.
        metadata: the header's texts, if it has any.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix in (".ckpt", ".bin", ".pt", ".pth"):
            target = _PICKLES.get(path.name, f"{path.stem}.safetensors")
            raise CheckpointError(f"{path}: {_PICKLE_ADVICE.format(name=path.name, target=target)}")
        self.metadata: dict[str, str] = {}
        self.entries = self._read_header()

    def _read_header(self) -> dict[str, _Entry]:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                kind = "a git-lfs pointer; fetch the file itself" if prefix.startswith(b"version ") else "truncated"
                kind = "a zip or pickle" if prefix[:2] in (b"PK", b"\x80\x02") else kind
                raise CheckpointError(f"{self.path}: not a whole safetensors file ({size} bytes; it looks like {kind})")
            raw = file.read(length)
        try:
            header = json.loads(raw)
            self.metadata = dict(header.pop("__metadata__", None) or {})
            entries = {
                name: _Entry(item["dtype"], tuple(item["shape"]), *(8 + length + at for at in item["data_offsets"]))
                for name, item in header.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{self.path}: the safetensors header cannot be read: {error!r}") from error
        for name, entry in entries.items():
            self._check_entry(name, entry, 8 + length, size)
        return entries

    def _check_entry(self, name: str, entry: _Entry, first: int, size: int) -> None:
        numbers = (*entry.shape, entry.start - first, entry.end - first)
        if any(not isinstance(number, int) or number < 0 for number in numbers):
            raise CheckpointError(f"{self.path}: {name}: shape and offsets must be integers >= 0, found {numbers}")
        if not isinstance(entry.dtype, str) or entry.dtype not in _DTYPES:
            raise CheckpointError(f"{self.path}: {name} has dtype {entry.dtype}, expected one of {', '.join(_DTYPES)}")
        expected = math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize
        if entry.end - entry.start != expected:
            found = entry.end - entry.start
            raise CheckpointError(f"{self.path}: {name} {entry.shape} must hold {expected} bytes, found {found}")
        if entry.end > size:
            raise CheckpointError(f"{self.path}: truncated: {name} ends at byte {entry.end} of {size}")

    def read(self, name: str) -> Tensor:
        """Read one tensor, in the file's dtype, on the CPU."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype], device="cpu")
        view = tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{self.path}: truncated while reading {name}")
                done += count
        return tensor


@dataclass(frozen=True, slots=True)
class WeightSource:
    """The tensors of one model component.

    Attributes:
        files: the safetensors files that hold it.
        rename: from a module's parameter name to the names the files may use for it.
        prefix: only tensors under this prefix belong to the component.
        ignored: whether a tensor may be left unread.
    """

    files: Sequence[TensorFile]
    rename: Callable[[str], Iterable[str]] = lambda name: (name,)
    prefix: str = ""
    ignored: Callable[[str], bool] = lambda name: False

    def find(self) -> dict[str, TensorFile]:
        found: dict[str, TensorFile] = {}
        for file in self.files:
            for name in file.entries:
                if not name.startswith(self.prefix) or self.ignored(name):
                    continue
                if name in found:
                    raise CheckpointError(f"{file.path}: {name} is also in {found[name].path}")
                found[name] = file
        return found


def load_module(
    module: nn.Module,
    source: WeightSource,
    device: torch.device,
    dtype: torch.dtype,
    change: Callable[[str, Tensor], Tensor] = lambda name, weight: weight,
) -> None:
    """Fill a module built on the ``meta`` device; every key, shape, dtype and value is checked.

    One tensor at a time is in flight, so the peak is the weights themselves and their largest tensor. Convolution
    weights are laid out channels-last. ``change`` makes of a weight, by its name, as the file has it, what is loaded.
    """
    available = source.find()
    expected: Mapping[str, Tensor] = module.state_dict()
    where = ", ".join(str(file.path) for file in source.files)
    names = {key: next((name for name in source.rename(key) if name in available), None) for key in expected}
    missing = [next(iter(source.rename(key))) for key, name in names.items() if name is None]
    extra = sorted(set(available) - set(names.values()))
    if missing or extra:
        raise CheckpointError(f"{where}: the tensors must match the config: {_differences(missing, extra)}")
    state: dict[str, Tensor] = {}
    for key, name in names.items():
        assert name is not None
        weight = change(key, _read_checked(available[name], name, expected[key].shape))
        state[key] = place(f"{available[name].path}: {name}", weight, device, dtype)
    module.load_state_dict(state, strict=True, assign=True)
    module.eval().requires_grad_(False)


def _read_checked(file: TensorFile, name: str, shape: torch.Size) -> Tensor:
    entry = file.entries[name]
    if entry.dtype not in _FLOATS:
        raise CheckpointError(f"{file.path}: {name}: expected a floating dtype, found {entry.dtype}")
    squeezed = entry.shape[:2] if entry.shape[2:] == (1, 1) and len(shape) == 2 else entry.shape  # LDM's 1x1 convs
    if len(squeezed) == 2 and shape[2:] == (1, 1):  # SD 2 has linear layers for them
        squeezed = (*squeezed, 1, 1)
    if tuple(shape) != squeezed:
        raise CheckpointError(f"{file.path}: {name}: expected shape {tuple(shape)}, found {entry.shape}")
    tensor = file.read(name)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{file.path}: {name}: expected finite values, found NaN or infinity")
    return tensor.reshape(shape)


def place(where: str, weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A weight as the model holds it; ``where`` it is from is for the message where ``dtype`` does not hold it."""
    weight = weight.to(device=device, dtype=dtype)
    if not torch.isfinite(weight).all():
        raise CheckpointError(f"{where}: values overflow {dtype}; load with dtype='float32' or 'bfloat16'")
    return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight


def _differences(missing: Sequence[str], extra: Sequence[str]) -> str:
    parts = []
    for label, names in (("missing", missing), ("unexpected", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{label} {', '.join(names[:3])}{more}")
    return "; ".join(parts)


def fill_positions(model: nn.Module, device: torch.device) -> None:
    """Set the positions (1, n) of one of transformers' models that was built on ``meta``; no file holds them."""
    for module in model.modules():
        if (positions := module._buffers.get("position_ids")) is not None:
            module._buffers["position_ids"] = torch.arange(positions.shape[-1], device=device)[None]
