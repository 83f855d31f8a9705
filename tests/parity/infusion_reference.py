"""Infusion inside diffusers' modules, literally: every map is an explicit softmax, borrowed row by row.

Written from the equations of arXiv:2404.14007 and shared with no line of the engine, so that the two can disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.pipelines import encode


@dataclass
class Residual:
    """One concept in a prompt: its residual per layer, in "text" or "value" space, at one token."""

    position: int
    residuals: dict[str, Tensor]
    space: str


class _MapProcessor:
    """Diffusers attention processor: attends with its own map and keeps it, or with a kept one and residual values."""

    def __init__(self, name: str, maps: dict[str, Tensor]) -> None:
        self.name, self.maps = name, maps
        self.borrow, self.residuals = False, ()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        assert attention_mask is None
        keys = attn.to_k(encoder_hidden_states)
        values = attn.to_v(encoder_hidden_states)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        if self.borrow:
            weights = self.maps[self.name]
            values = values.clone()
            for residual in self.residuals:
                vector = residual.residuals[self.name]
                values[:, residual.position] += attn.to_v.weight @ vector if residual.space == "text" else vector
        else:
            queries = heads(attn.to_q(hidden_states))
            scores = queries @ heads(keys).transpose(-1, -2) / queries.shape[-1] ** 0.5
            weights = self.maps[self.name] = scores.softmax(dim=-1)
        return attn.to_out[0]((weights @ heads(values)).transpose(1, 2).flatten(2))


class LiteralInfusion:
    """A diffusers pipeline whose UNet runs as foundation F or customised C, one row at a time."""

    def __init__(self, pipeline) -> None:
        self.pipeline = pipeline
        self.maps: dict[str, Tensor] = {}
        processors = pipeline.unet.attn_processors
        self.processors = {}
        for name in processors:
            layer = name.removesuffix(".processor")
            if layer.endswith("attn2"):
                processors[name] = self.processors[layer] = _MapProcessor(layer, self.maps)
        pipeline.unet.set_attn_processor(processors)

    def predict(self, x: Tensor, t, text: Tensor, borrow: bool = False, residuals: Sequence[Residual] = ()) -> Tensor:
        for processor in self.processors.values():
            processor.borrow, processor.residuals = borrow, residuals
        return self.pipeline.unet(x, t, encoder_hidden_states=text).sample

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        residuals: Sequence[Residual],
        noise: Tensor,
        steps: int,
        guidance_scale: float,
        foundation: str,
        unconditional_maps: str,
    ) -> tuple[Tensor, Tensor | None]:
        """Final latents of C, and of F where it has a trajectory of its own."""
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(steps)
        text, empty = encode(self.pipeline, prompt), encode(self.pipeline, "")
        x_f = x_c = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            seen = x_f if foundation == "parallel" else x_c
            eps_f_u = self.predict(seen, t, empty)
            eps_c_u = self.predict(x_c, t, empty, borrow=unconditional_maps == "foundation")
            eps_f_c = self.predict(seen, t, text)
            eps_c_c = self.predict(x_c, t, text, borrow=True, residuals=residuals)
            x_f = scheduler.step(eps_f_u + guidance_scale * (eps_f_c - eps_f_u), t, x_f).prev_sample
            x_c = scheduler.step(eps_c_u + guidance_scale * (eps_c_c - eps_c_u), t, x_c).prev_sample
        return x_c, x_f if foundation == "parallel" else None
