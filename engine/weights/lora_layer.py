"""What a LoRA file's tensors make of one weight: low-rank products and their kin, with or without DoRA.

LoRA (Hu et al. 2022, arXiv:2106.09685), and of LyCORIS (Yeh et al. 2024, arXiv:2309.14859) LoCon with or without a
Tucker core, LoHa and LoKr; DoRA (Liu et al. 2024, arXiv:2402.09353) as LyCORIS and as peft write it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from .tensors import TensorFile

_FORMS = (  # what must be there, and what may
    ({"up", "down"}, {"mid"}),
    ({"w1_a", "w1_b", "w2_a", "w2_b"}, set()),
    ({"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}, set()),
    ({"kron_w1", "kron_w2"}, set()),
    ({"kron_w1_a", "kron_w1_b", "kron_w2"}, set()),
    ({"kron_w1", "kron_w2_a", "kron_w2_b"}, {"kron_t2"}),
    ({"kron_w1_a", "kron_w1_b", "kron_w2_a", "kron_w2_b"}, {"kron_t2"}),
    ({"diff"}, set()),
)
_EXTRAS = {"alpha", "dora_scale", "magnitude"}
_INNER = ("down", "w1_b", "kron_w1_b", "kron_w2_b")  # factors whose first axis is the rank


@dataclass(frozen=True, slots=True)
class LoRALayer:
    """One layer of a LoRA file, at a weight; its tensors are read when they are applied.

    Attributes:
        file, keys: where each part is; see ``lora_keys``.
        parameter: the weight it changes.
        scale: ``alpha / rank``.
        weight: the caller's factor.
    """

    file: TensorFile
    keys: Mapping[str, str]
    parameter: str
    scale: float
    weight: float

    def check(self, shape: Sequence[int]) -> None:
        """Raise ``CheckpointError`` unless the parts make a change of this shape; no number is read."""
        parts = {part: torch.empty(self._shape(part), device="meta") for part in self.keys}
        if not any(need <= parts.keys() <= need | may | _EXTRAS for need, may in _FORMS):
            raise CheckpointError(f"{self._where}: the parts of a layer are incomplete or mixed: {self._shapes()}")
        try:
            made = difference(parts, shape)
            _magnitude(parts, made)
        except (RuntimeError, ValueError, IndexError) as error:
            rule = f"must make a change of {tuple(shape)}"
            raise CheckpointError(f"{self._where}: {rule}, found {self._shapes()}") from error

    def apply(self, merged: Tensor, base: Tensor) -> Tensor:
        """``merged`` with this layer's change.

        Args:
            merged: the weight with the changes of layers before this one, float32.
            base: the weight without any, float32.
        """
        parts = {part: self._read(part).to(base.device) for part in self.keys if part != "alpha"}
        change = self.scale * difference(parts, base.shape)
        magnitude = _magnitude(parts, base)
        if magnitude is None:
            return merged + self.weight * change
        if "magnitude" in parts:  # peft: what stands there is scaled too; the norm is that without other layers
            return magnitude / _norm_like(magnitude, base + self.weight * change) * (merged + self.weight * change)
        changed = base + change  # LyCORIS: the weight blends the ratio, and layers add up
        ratio = magnitude / _norm_like(magnitude, changed)
        return merged + changed * (self.weight * (ratio - 1) + 1) - base

    def _read(self, part: str) -> Tensor:
        tensor = self.file.read(self.keys[part]).float()
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{self.file.path}: {self.keys[part]}: expected finite values, found NaN or infinity")
        return tensor

    def _shape(self, part: str) -> tuple[int, ...]:
        return self.file.entries[self.keys[part]].shape

    @property
    def _where(self) -> str:
        return f"{self.file.path}: {self.parameter}"

    def _shapes(self) -> str:
        return ", ".join(f"{key} {self._shape(part)}" for part, key in self.keys.items())


def rank_of(file: TensorFile, keys: Mapping[str, str]) -> int | None:
    """The rank of a layer's factors; None where nothing is a product."""
    inner = next((file.entries[keys[part]].shape for part in _INNER if part in keys), None)
    return inner[0] if inner else None


def difference(parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The change of a weight (O, I, ...) that a layer's parts make, unscaled.

    Raises:
        RuntimeError: their shapes do not fit one another or ``shape``.
    """
    if "up" in parts:
        made = _product(parts["up"], parts["down"], parts.get("mid"))
    elif "w1_a" in parts:
        first, second = (_hadamard_half(parts, i) for i in ("1", "2"))
        made = first * second
    elif "diff" in parts:
        made = parts["diff"]
    else:
        made = torch.kron(_kron_half(parts, "1").flatten(1), _kron_half(parts, "2").flatten(1))
    if made.shape[0] != shape[0]:
        raise RuntimeError(f"outputs must be {shape[0]}, got {made.shape[0]}")
    return made.reshape(tuple(shape))


def _product(up: Tensor, down: Tensor, core: Tensor | None) -> Tensor:
    """``up @ down`` (O, I...), or with a Tucker core (r, s, ...) between them."""
    return up.flatten(1) @ down.flatten(1) if core is None else _tucker(core, up.flatten(1).T, down.flatten(1))


def _tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(O, I, ...) of a core (r, s, ...), ``up`` (r, O) and ``down`` (s, I)."""
    return torch.einsum("rs...,ro,si->oi...", core, up, down)


def _hadamard_half(parts: Mapping[str, Tensor], i: str) -> Tensor:
    """One of the two matrices whose elementwise product is LoHa's change."""
    a, b, core = parts[f"w{i}_a"], parts[f"w{i}_b"], parts.get(f"t{i}")
    return a @ b if core is None else _tucker(core, a, b)


def _kron_half(parts: Mapping[str, Tensor], i: str) -> Tensor:
    """One of the two matrices whose Kronecker product is LoKr's change."""
    if f"kron_w{i}" in parts:
        return parts[f"kron_w{i}"]
    a, b, core = parts[f"kron_w{i}_a"], parts[f"kron_w{i}_b"], parts.get(f"kron_t{i}")
    return a @ b.flatten(1) if core is None else _tucker(core, a, b)


def _magnitude(parts: Mapping[str, Tensor], weight: Tensor) -> Tensor | None:
    """DoRA's magnitude, spread over a weight: peft's (O, 1, ...), or LyCORIS' as it is, which may be (1, I, ...)."""
    ones = [1] * (weight.ndim - 2)
    if "magnitude" in parts:
        return parts["magnitude"].reshape(weight.shape[0], 1, *ones)
    magnitude = parts.get("dora_scale")
    if magnitude is not None and list(magnitude.shape) not in (
        [weight.shape[0], 1, *ones],
        [1, weight.shape[1], *ones],
    ):
        raise RuntimeError(f"dora_scale must be one number an output or an input, got {tuple(magnitude.shape)}")
    return magnitude


def _norm_like(magnitude: Tensor, weight: Tensor) -> Tensor:
    """The norms of a weight, one for each number of a magnitude."""
    kept = 0 if magnitude.shape[0] == weight.shape[0] else 1
    axes = [axis for axis in range(weight.ndim) if axis != kept]
    return torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
