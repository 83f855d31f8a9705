"""Every kernel that a step launches on ``backend="triton"``, of any model, without weights and without a GPU.

The networks run on the meta device with the operations' Triton launchers, whose kernels are replaced by ones that note
their grid and arguments; what torch computes itself is noted by a dispatch mode, and convolutions by the layer. A
tensor's shape, strides and dtype are those of a card's, so a launch says all that Triton specialises a kernel on.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.ops import KERNELS, operation_flops
from engine.backends.ops import Ops
from engine.kernels import product
from engine.kernels.attention import MAX_HEAD_DIM, attention_ref
from engine.kernels.product_tiles import CARDS
from engine.models import calls
from engine.models.conditioning import Batch
from engine.models.config import UNetConfig, VAEConfig
from engine.models.layers import replace_convolutions
from engine.models.unet import UNet2DConditionModel
from engine.models.vae import AutoencoderKL
from engine.sampling.plan import GuidedBatch
from engine.sampling.step import Phase, State, guided_step
from engine.sampling.table import Coefficients
from engine.weights.checkpoint import EMBEDDED_MODEL

KINDS = ("GroupNorm", "LayerNorm", "products", "attention", "convolutions", "adds", "copies", "others")
_KINDS = {  # by what a name has in it, the first that fits
    "group_norm": "GroupNorm",
    "layer_norm_stats": "LayerNorm",
    "product": "products",
    "linear": "products",
    "geglu": "products",
    "mm": "products",
    "attention": "attention",
    "dbim": "attention",
    "sdpa": "attention",
    "bias": "adds",
    "convolution": "convolutions",
    "add": "adds",
    "residual": "adds",
    **dict.fromkeys(("cat", "copy", "index", "clone", "upsample", "constant_pad"), "copies"),
}
SD_V1_5 = UNetConfig(
    in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, transformer_layers=1,
    n_heads=(8,) * 4, cross_attention_dim=768, down_has_attention=(True, True, True, False), norm_num_groups=32,
    norm_eps=1e-5, sample_size=64,
)  # fmt: skip
SD_V1_5_VAE = VAEConfig(
    in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
    norm_num_groups=32, scaling_factor=0.18215,
)  # fmt: skip
EMBEDDED = UNetConfig.from_dict(json.loads((EMBEDDED_MODEL / "unet/config.json").read_text()))
_SUMS = re.compile("_sum_kernel|_combine_kernel")
_NO_KERNELS = ("_unsafe_view", "detach", "lift_fresh")


@dataclass(frozen=True)
class Launch:
    """One kernel of a step.

    Attributes:
        kernel: its name, a function's of ``engine/kernels`` or torch's operation.
        op: of ``Ops``, whose kernel it is; torch's operation else.
        arguments: by name, tensors on the meta device and numbers; none for torch's own.
        options: constants and what Triton takes beside them.
        grid: how many programs there are, by axis; none for torch's own.
        n_bytes: of its tensors, each once, results among them.
        flops: of the operation's products, without what tiles add at their edges; 0 where the kernel has none.
    """

    kernel: str
    op: str
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]
    n_bytes: int
    flops: float

    @property
    def is_ours(self) -> bool:
        return bool(self.grid)

    @property
    def n_programs(self) -> int:
        count = 1
        for n in self.grid:
            count *= n
        return count


def kind_of(name: str) -> str:
    """One of ``KINDS`` of a kernel or an ATen operation."""
    return next((kind for part, kind in _KINDS.items() if part in name), "others")


def count_kinds(names: Iterable[str]) -> dict[str, int]:
    """How many of each of ``KINDS``."""
    found = Counter(map(kind_of, names))
    return {kind: found[kind] for kind in KINDS}


class Recorder:
    """What notes launches; ``launches`` has them in order.

    Args:
        architecture: of the card, which some launches depend on.
    """

    def __init__(self, architecture: int = 90) -> None:
        self.architecture, self.launches = architecture, list[Launch]()
        self.op, self.flops = "", 0.0
        self.ops: Ops = replace(KERNELS, **{name: self._noting(name, f) for name, f in _operations()}, name="recorder")

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While launches are noted, by this one alone."""
        modules = [module for name, module in sys.modules.items() if name.startswith("engine.kernels.")]
        card = CARDS[self.architecture]
        patches = [patch.object(product, "card_of", lambda _device: card)] + [
            patch.object(module, name, _Kernel(self, name, kernel))
            for module in modules
            for name, kernel in vars(module).items()
            if name.endswith("_kernel") and name.startswith("_")
        ]
        for one in patches:
            one.start()
        try:
            with _Watch(self):
                yield
        finally:
            for one in patches:
                one.stop()

    def note(self, name: str, tensors: Iterable[Tensor], flops: float = 0.0) -> None:
        """One of torch's own."""
        n_bytes = sum({id(x): x.nbytes for x in tensors}.values())
        self.launches.append(Launch(name, self.op or name, {}, {}, (), n_bytes, flops))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, size: Iterable[int] | None = None) -> Tensor:
        """A convolution as cuDNN lays its result out; it adds a bias in a pass of its own."""
        shape = (len(x), len(weight), *(x.shape[2:] if size is None else size))
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        self.note("convolution", (x, weight, y), 2.0 * y.numel() * weight[0].numel())
        if bias is not None:
            self.note("bias of a convolution", (y, bias, torch.empty_like(y)))
        return y

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            tensors = [x for x in arguments if isinstance(x, Tensor) and x.ndim]
            self.op, first = name, len(self.launches)
            result = function(*arguments)
            self.op = ""
            out = [x for x in (result if isinstance(result, tuple) else [result]) if isinstance(x, Tensor)]
            self._give_flops(first, operation_flops(name, tensors, out))
            return result

        return call

    def _give_flops(self, first: int, flops: float) -> None:
        """An operation's products are its last kernel's but for sums of parts; DCI's maps are made by two, by each."""
        own = [i for i in range(first, len(self.launches)) if not _SUMS.search(self.launches[i].kernel)]
        if flops and own:
            self.launches[own[-1]] = replace(self.launches[own[-1]], flops=flops)


def _operations() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The launchers of ``KERNELS``; what no tile holds is torch's, as ``attention`` has it."""
    for name in Ops.__dataclass_fields__:
        if name not in ("name", "small", "conv3x3", "attention"):
            yield name, getattr(KERNELS, name)

    def attention(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
        return (KERNELS.attention if q.shape[-1] // n_heads <= MAX_HEAD_DIM else attention_ref)(q, k, v, n_heads)

    yield "attention", attention


class _Kernel:
    """In a kernel's place."""

    def __init__(self, recorder: Recorder, name: str, kernel: Any) -> None:
        self.recorder, self.name, self.kernel = recorder, name, kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *given, **named: self._note(grid, given, named)

    def _note(self, grid: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        names = parameters(self.kernel)
        arguments = dict(zip(names, given, strict=False)) | named
        if callable(grid):
            grid = grid(arguments)
        options = {name: arguments.pop(name) for name in list(arguments) if name not in names or names[name]}
        found = [getattr(x, "base", x) for x in arguments.values()]  # of a descriptor, too
        tensors = {id(x): x.nbytes for x in found if isinstance(x, Tensor)}
        recorder = self.recorder
        launch = Launch(self.name, recorder.op, arguments, options, tuple(grid), sum(tensors.values()), 0.0)
        recorder.launches.append(launch)


def parameters(kernel: Any) -> dict[str, bool]:
    """A kernel's arguments, and which of them are constants, whether or not Triton has seen the kernel."""
    function = getattr(kernel, "function", None) or kernel.fn
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return {name: "constexpr" in str(function.__annotations__.get(name, "")) for name in names}


class _Watch(TorchDispatchMode):
    """Notes what torch computes itself."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        is_view = any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns)
        if not is_view and "empty" not in name and name not in _NO_KERNELS:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            flops = 2.0 * tensors[-1].numel() * tensors[-2].shape[0] if name in ("mm", "addmm") else 0.0
            self.recorder.note(name, tensors, flops)
        return result


class _Convolution(nn.Module):
    """In the place of a convolution that is no operation of ``Ops``."""

    def __init__(self, conv: nn.Conv2d, recorder: Recorder) -> None:
        super().__init__()
        self.weight, self.bias, self.recorder = conv.weight, conv.bias, recorder
        self.stride, self.padding = conv.stride[0], int(conv.padding[0])

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[2]
        size = [(n + 2 * self.padding - kernel) // self.stride + 1 for n in x.shape[2:]]
        return self.recorder.convolve(x, self.weight, self.bias, size)


def _build(make: Callable[[Ops], Any], dtype: torch.dtype, recorder: Recorder) -> Any:
    ops = replace(recorder.ops, conv3x3=recorder.convolve)
    with torch.device("meta"):
        network = make(ops).to(dtype)
    replace_convolutions(network, lambda conv: _Convolution(conv, recorder))
    return network


@torch.no_grad()
def step_launches(
    config: UNetConfig,
    dtype: torch.dtype,
    case: str = "plain",
    n: int = 1,
    size: tuple[int, int] | None = None,
    text_length: int = 77,
    architecture: int = 90,
) -> list[Launch]:
    """What one step launches, in order, but for what the first alone does (weights that LayerNorms are folded into).

    Args:
        config: the UNet's.
        dtype: of its weights.
        case: "plain" for a guided step, "infusion" or "dci" for one of these.
        n: how many pictures a plain step draws; the others draw one.
        size: height and width of latents; the model's own unless given.
        text_length: how many keys a text has.
        architecture: of the card.
    """
    recorder = Recorder(architecture)
    unet = _build(lambda ops: UNet2DConditionModel(config, ops), dtype, recorder)
    with torch.device("meta"):
        unet.compose()
        batch = _BATCHES[case](unet, n, text_length)
        phase, state = _phase(unet, batch, size or (config.sample_size, config.sample_size))
        with recorder.recording():
            guided_step(unet, phase, state)
            recorder.launches.clear()
            guided_step(unet, phase, state)
    return recorder.launches


_BATCHES: dict[str, Callable[[UNet2DConditionModel, int, int], Batch]] = {
    "plain": calls._plain,
    "infusion": lambda unet, _, length: calls._infusion(unet, length),
    "dci": lambda unet, _, length: calls._dci(unet, length),
}


def _phase(unet: UNet2DConditionModel, batch: Batch, size: tuple[int, int]) -> tuple[Phase, State]:
    """As ``benchmarks.systems`` makes them: the next latents are the prediction itself."""
    assert batch.shared is not None
    P, like = len(batch.shared.firsts), torch.empty(1, 1)
    pairs = torch.zeros(P, dtype=torch.int64)
    rows = GuidedBatch(batch, batch.shared.rows, pairs, pairs, torch.empty(P, 1, 1, 1))
    coefficients = Coefficients(like[0], like[None], model=like, noise=like, keep_scale=like[0], keep_noise=like[0])
    channels = sum(len(resnet.conv1.bias) for resnet in unet.resnets)
    x = torch.empty(P, 4, *size)
    shifts = unet.conv_in.weight.new_empty(1, channels)
    return Phase(rows, coefficients, shifts), State(x, x.new_zeros(0, *x.shape), pairs, None)


@torch.no_grad()
def decode_launches(
    config: VAEConfig, dtype: torch.dtype, size: tuple[int, int], architecture: int = 90
) -> list[Launch]:
    """What decoding one picture launches, of latents (1, 4, height, width)."""
    recorder = Recorder(architecture)
    vae = _build(lambda ops: AutoencoderKL(config, ops), dtype, recorder)
    with recorder.recording():
        vae.decode(torch.empty(1, config.latent_channels, *size, dtype=dtype, device="meta"))
    return recorder.launches
