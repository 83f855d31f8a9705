"""Every argument that cannot be honoured is refused, with the rule and the value."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import engine

_PICTURE = Image.new("RGB", (16, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 3}, "prompt must be a text or a non-empty list of texts, got 3"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": ["a", None]}, "prompt must be"),
        ({"negative_prompt": ["x", "y"]}, "one per prompt (1), got 2"),
        ({"negative_prompt": None}, "negative_prompt must be"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"steps": -1}, "steps must be an integer >= 1, got -1"),
        ({"steps": 20.0}, "steps must be an integer >= 1, got 20.0"),
        ({"steps": True}, "steps must be an integer >= 1, got True"),
        ({"steps": "20"}, "steps must be an integer"),
        ({"steps": 1001}, "steps must be an integer <= 1000, got 1001"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number >= 1, got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number >= 1, got inf"),
        ({"guidance_scale": 0.5}, "guidance_scale must be a finite number >= 1, got 0.5"),
        ({"guidance_scale": "7"}, "guidance_scale must be a finite number"),
        ({"guidance_scale": 1, "negative_prompt": "dark"}, "negative_prompt needs a guidance_scale above 1"),
        ({"vae_tiling": True, "output": "latent"}, "which output='latent' does not run"),
        ({"sampler": "dpm_fast"}, "sampler must be one of ddim, pndm, euler"),
        ({"guidance_rescale": 1.5}, "guidance_rescale must be a finite number from 0 to 1, got 1.5"),
        ({"guidance_rescale": 0.5, "guidance_scale": 1}, "guidance_rescale needs a guidance_scale above 1"),
        ({"sampler": None}, "sampler must be one of"),
        ({"schedule": "simple"}, "schedule must be one of karras, exponential, beta, ays, sgm_uniform, got 'simple'"),
        (
            {"schedule": "karras"},
            "schedule must be one that the sampler takes, got 'karras' with sampler='ddim'",
        ),
        ({"eta": 1.5}, "eta must be a finite number from 0 to 1, got 1.5"),
        ({"eta": 0.5, "sampler": "euler"}, "eta belongs to ddim and tcd alone, got eta=0.5 with sampler='euler'"),
        ({"height": 20}, "height must be a multiple of 2"),
        ({"width": 500.0}, "width must be an integer >= 1, got 500.0"),
        ({"width": 0}, "width must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"seed": 2**64}, "seed must be an integer <= 18446744073709551615"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"seed": [1, 2]}, "one per image (1), got 2"),
        ({"images_per_prompt": 0}, "images_per_prompt must be an integer >= 1, got 0"),
        ({"strength": 0.5}, "strength belongs to image-to-image"),
        ({"image": _PICTURE, "strength": 1.2}, "strength must be a finite number from 0 to 1, got 1.2"),
        ({"image": _PICTURE, "strength": 0.1, "steps": 5}, "int(steps * strength) must be at least 1"),
        ({"image": _PICTURE, "latents": torch.zeros(1, 4, 8, 8)}, "not both"),
        ({"image": "cat.png"}, "image must hold PIL pictures"),
        ({"image": [_PICTURE, _PICTURE]}, "one per image (1), got 2"),
        ({"image": np.full((16, 16, 3), 2.0)}, "from 2.0 to 2.0"),
        ({"image": np.linspace(-0.5, 1, 16 * 16 * 3).reshape(16, 16, 3)}, "from -0.5 to 1.0"),
        ({"image": np.ones((16, 16, 3), dtype=np.int64)}, "got int64 from 1 to 1"),
        ({"prompt": ["a", "b"], "images_per_prompt": 3, "image": [_PICTURE] * 3}, "one per image (6), got 3"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "latents must have shape (1, 4, 8, 8), got (2, 4, 8, 8)"),
        ({"latents": torch.zeros(1, 4, 8, 8, dtype=torch.int64)}, "floating-point"),
        ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, "latents must be finite"),
        ({"latents": torch.zeros(1, 4, 8, 8), "height": 32}, "latents must have shape (1, 4, 16, 8)"),
        ({"customization": "cat"}, "customization must be an engine.Infusion"),
        ({"customization": engine.DCI("cat", fraction=0.0), "record_masks": True}, "masked=True, fraction > 0"),
        ({"customization": engine.DCI("cat", masked=False), "record_masks": True}, "masked=True, fraction > 0"),
        ({"output": "jpeg"}, "output must be one of pil, numpy, latent, got 'jpeg'"),
        ({"callback": 3}, "callback must be callable"),
        ({"progress": 1}, "progress must be True or False, got 1"),
        ({"guidance": 3.0}, "no keyword 'guidance'; did you mean 'guidance_scale'?"),
        ({"num_inference_steps": 3}, "no keyword 'num_inference_steps'"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_refusals(small: engine.Engine, arguments: dict, message: str) -> None:
    arguments = {"prompt": "a cat", "progress": False, **arguments}
    if arguments.get("height") == 20:  # the small model's factor is 2; an odd number is what does not fit
        arguments["height"] = 21
    with pytest.raises(ValueError, match=re.escape(message)):
        small.generate(arguments.pop("prompt"), **arguments)


def test_an_unknown_keyword_is_a_type_error_too(small: engine.Engine) -> None:
    with pytest.raises(TypeError):
        small.generate("a cat", nope=1)
