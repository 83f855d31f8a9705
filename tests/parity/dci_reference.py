"""DCI inside diffusers' modules, literally: both branches' maps and masks written out, mixed in every layer.

Written from the equations of DCI (ECCV 2024) and shared with no line of the engine, so that the two can disagree.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.pipelines import encode


@dataclass
class Side:
    """What one branch's mask is made of: positions of the chosen tokens, and the prompt's length in tokens."""

    chosen: list[int]
    length: int


class _Recorder:
    """Keeps the queries, keys and values of a pass over the auxiliary branch."""

    def __init__(self, name: str, owner: "LiteralDCI") -> None:
        self.name, self.owner = name, owner

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        assert attention_mask is None

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = (
            heads(x)
            for x in (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        weights = logits.softmax(dim=-1)
        out = weights @ v
        if self.owner.recording:
            self.owner.auxiliary[self.name] = (logits, weights, out)
        elif self.owner.mixing and self.name in self.owner.layers:
            out = self.owner.mix(logits, weights, out, *self.owner.auxiliary[self.name])
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class LiteralDCI:
    """A diffusers pipeline whose UNet runs as the concept branch or the auxiliary one, one row at a time."""

    def __init__(self, pipeline) -> None:
        self.pipeline = pipeline
        self.auxiliary: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.recording = self.mixing = False
        processors, self.all_layers = pipeline.unet.attn_processors, []
        for name in processors:
            layer = name.removesuffix(".processor")
            if layer.endswith("attn2"):
                processors[name] = _Recorder(layer, self)
                self.all_layers.append(layer)
        pipeline.unet.set_attn_processor(processors)

    def mask(self, logits: Tensor, weights: Tensor, side: Side) -> Tensor:
        """One side's gate, (1, H, N)."""
        if self.preset == "paper":
            total = sum(logits[..., position] for position in side.chosen)
            return total.softmax(dim=-1)
        own = (10.0 * weights[..., 1 : side.length + 1]).softmax(dim=-1)
        total = sum(own[..., position - 1] for position in side.chosen)
        return 500.0 * (10.0 * total).softmax(dim=-1)

    def mix(self, logits_c, weights_c, out_c, logits_a, weights_a, out_a) -> Tensor:
        if not self.masked:
            return out_c + out_a
        gates = torch.stack(
            [self.mask(logits_c, weights_c, self.concept), self.strength * self.mask(logits_a, weights_a, self.other)]
        ).softmax(dim=0)
        return gates[0][..., None] * out_c + gates[1][..., None] * out_a

    def predict(self, x: Tensor, t, text: Tensor, recording: bool = False, mixing: bool = False) -> Tensor:
        self.recording, self.mixing = recording, mixing
        return self.pipeline.unet(x, t, encoder_hidden_states=text).sample

    @torch.no_grad()
    def __call__(
        self,
        prompts: tuple[str, str],
        sides: tuple[Side, Side],
        noise: tuple[Tensor, Tensor],
        *,
        steps: int,
        mixing_steps: int,
        guidance_scale: float,
        strength: float,
        preset: str,
        guidance: str,
        masked: bool = True,
        layers: list[str] | None = None,
    ) -> Tensor:
        """Final latents of the concept branch."""
        self.concept, self.other = sides
        self.strength, self.preset, self.masked = strength, preset, masked
        self.layers = layers or self.all_layers
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(steps)
        empty, text_c, text_a = (encode(self.pipeline, text) for text in ("", *prompts))
        x_c, x_a = noise
        for i, t in enumerate(scheduler.timesteps):
            mixing = i < mixing_steps
            if mixing:
                eps_a = self.predict(x_a, t, text_a, recording=True)
            eps_u = self.predict(x_c, t, empty)
            eps_c = self.predict(x_c, t, text_c, mixing=mixing)
            if mixing:
                eps_a_u = eps_u if guidance == "shared" else self.predict(x_a, t, empty)
                x_a = scheduler.step(eps_a_u + guidance_scale * (eps_a - eps_a_u), t, x_a).prev_sample
            x_c = scheduler.step(eps_u + guidance_scale * (eps_c - eps_u), t, x_c).prev_sample
        return x_c
