"""Which calls of operations a model makes: its networks built and run without weights, on the meta device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..backends.calibration.calls import Call, Key, recording
from .conditioning import Batch, Conditioning, Following, Mixing, Shared
from .config import UNetConfig, VAEConfig
from .layers import replace_convolutions
from .tiny_vae import TinyVAEConfig, make_vae
from .unet import UNet2DConditionModel

_GATES = 4  # of a mixing pair


@torch.no_grad()
def calls_of(
    unet: UNetConfig,
    vae: VAEConfig | TinyVAEConfig,
    dtype: torch.dtype,
    text_length: int,
    size: tuple[int, int] | None = None,
    images: Sequence[int] = (1, 4),
) -> list[Call]:
    """Calls of a plain guided step, an Infusion step and a mixing step of DCI, and of the VAE's decoder.

    Args:
        unet, vae: the model's.
        dtype: of its weights.
        text_length: how many keys a text has.
        size: height and width of latents; the model's own unless given.
        images: how many plain pictures a step draws; the other steps draw one.

    Returns:
        Each distinct call once, with how often it is made, the most work first.
    """
    found: dict[tuple[Key, int], Call] = {}
    ops, (height, width) = recording(found), size or (unet.sample_size, unet.sample_size)
    with torch.device("meta"):
        network, decoder = UNet2DConditionModel(unet, ops).to(dtype), make_vae(vae, ops).to(dtype)
        for one in (network, decoder):
            replace_convolutions(one, _Shape)
        network.compose()
        for n in images:
            _step(network, _plain(network, n, text_length), n, height, width)
        _step(network, _infusion(network, text_length), 2, height, width)
        _step(network, _dci(network, text_length), 2, height, width)
        decoder.decode(torch.empty(1, vae.latent_channels, height, width))
    return sorted(found.values(), key=lambda call: -call.times * call.nbytes)


class _Shape(nn.Module):
    """A convolution's result, as cuDNN lays it out."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.stride, self.padding = conv.weight, conv.bias, conv.stride, conv.padding

    def forward(self, x: Tensor) -> Tensor:
        size = [
            (n + 2 * int(pad) - kernel) // stride + 1
            for n, pad, kernel, stride in zip(
                x.shape[2:], self.padding, self.weight.shape[2:], self.stride, strict=True
            )
        ]
        shape = (len(x), len(self.weight), *size)
        return torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)


def _step(unet: UNet2DConditionModel, batch: Batch, latents: int, height: int, width: int) -> None:
    assert batch.shared is not None
    like, channels = unet.conv_in.weight, sum(len(resnet.conv1.bias) for resnet in unet.resnets)
    shifts = like.new_empty(len(batch.shared.rows), channels)
    unet.denoise(like.new_empty(latents, unet.config.in_channels, height, width), Conditioning(batch, shifts))


def _text(unet: UNet2DConditionModel, rows: int, length: int) -> tuple[tuple[Tensor, Tensor], ...]:
    layers, like = unet.cross_attentions.values(), unet.conv_in.weight
    shapes = [(rows, length, attn2.to_k.out_features) for attn2 in layers]
    return tuple((like.new_empty(shape), like.new_empty(shape)) for shape in shapes)


def _index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="meta")


def _plain(unet: UNet2DConditionModel, n: int, length: int) -> Batch:
    """Two rows a picture, which see the same latents."""
    return Batch(_text(unet, 2 * n, length), shared=Shared(_index(*(i // 2 for i in range(2 * n))), _index(*range(n))))


def _infusion(unet: UNet2DConditionModel, length: int) -> Batch:
    """A picture's two rows under the maps of its foundation's two, with one token's residuals."""
    layers, like = unet.cross_attentions.values(), unet.conv_in.weight
    residuals = [like.new_empty(2, attn2.n_heads, attn2.to_k.out_features) for attn2 in layers]
    following = Following(_index(0, 0)[:, None], _index(0, 1), tuple(residuals))
    return Batch(_text(unet, 2, length), following=following, shared=Shared(_index(0, 0, 1, 1), _index(0, 2)))


def _dci(unet: UNet2DConditionModel, length: int) -> Batch:
    """An unconditional row, and a concept row and its auxiliary row, which mix by masks in every layer."""
    layers = frozenset(range(len(unet.cross_attentions)))
    chosen, gates = torch.empty(2, length, dtype=torch.bool), torch.empty(1, _GATES)
    mixing = Mixing(chosen, _index(1, 1), gates, logits=False, masked=True, layers=layers)
    return Batch(_text(unet, 3, length), mixing=mixing, shared=Shared(_index(0, 0, 1), _index(0, 2)))
