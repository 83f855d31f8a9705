"""Attention maps of words: against maps taken from diffusers' modules, and as pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from engine.text.words import find_noun
from tests.parity.infusion_reference import LiteralInfusion
from tests.pipelines import encode, relative_error, save_pipeline

_PROMPTS = ["a photo of a cat on a xylophone", "a xylophone beside a cat"]


def _draw(sd: engine.Engine, **options) -> engine.Result:
    settings = {
        "steps": 2,
        "guidance_scale": 3.0,
        "seed": 5,
        "progress": False,
        "attention_words": ["cat", "xylophone"],
    }
    return sd.generate(_PROMPTS, **(settings | options))


def test_maps_are_those_of_the_modules(tmp_path: Path) -> None:
    literal = LiteralInfusion(save_pipeline("deep_heads_per_block", tmp_path, seed=5))
    sd = engine.load(tmp_path)
    out = _draw(sd, height=36, width=24, steps=1, output="latent")  # the factor is 4: latents of 9 x 6
    assert out.attention is not None
    assert list(out.attention.layers) == list(sd.unet.cross_attentions)
    scheduler = literal.pipeline.scheduler
    scheduler.set_timesteps(1)
    for i, prompt in enumerate(_PROMPTS):
        noise = torch.randn(1, 4, 9, 6, generator=torch.Generator().manual_seed(5 + i))
        with torch.no_grad():
            literal.predict(noise, scheduler.timesteps[0], encode(literal.pipeline, prompt))
        tokens = sd.text_encoder.tokenize(prompt)
        for name, maps in out.attention.layers.items():
            for w, word in enumerate(("cat", "xylophone")):
                columns = literal.maps[name][0][:, :, find_noun(tokens, word)].sum(dim=-1)  # (H, N)
                actual = torch.from_numpy(maps[i, 0, w].astype(np.float32)).flatten(1)
                assert relative_error(actual, columns) <= 2e-3  # float16


def test_watching_changes_nothing(small: engine.Engine) -> None:
    watched, plain = (_draw(small, attention_words=words, output="latent") for words in (["cat"], ()))
    assert plain.attention is None
    assert relative_error(watched.latents, plain.latents) <= 1e-5


def test_customised_pictures_show_the_followed_maps(small: engine.Engine) -> None:
    residuals = {name: torch.ones(attn2.to_v.in_features) for name, attn2 in small.unet.cross_attentions.items()}
    custom = engine.Infusion([engine.Concept("cat", residuals)])
    base, followed = (_draw(small, customization=one).attention for one in (None, custom))
    for name, maps in base.layers.items():
        assert maps.shape == followed.layers[name].shape
        assert relative_error(torch.tensor(followed.layers[name]), torch.tensor(maps)) <= 2e-3


def test_heat_maps(small: engine.Engine) -> None:
    out = _draw(small)
    heat = out.attention.heat_map("cat", image=1, steps=slice(1, 2))
    assert heat.shape == (8, 8)
    assert heat.dtype == np.float32
    assert (heat.min(), heat.max()) == (0, 1)
    sheet = out.attention.overlay(out.images[0], "xylophone", opacity=0.5)
    assert isinstance(sheet, Image.Image)
    assert sheet.size == out.images[0].size
    assert sheet.tobytes() != out.images[0].tobytes()


def test_bad_requests_are_refused(small: engine.Engine) -> None:
    attention = _draw(small).attention
    for call, message in (
        (lambda: attention.heat_map("dog"), "word must be one of cat, xylophone, got 'dog'"),
        (lambda: attention.heat_map("cat", image=2), "image must be an integer <= 1, got 2"),
        (lambda: attention.heat_map("cat", layers=["up"]), "layer must be one of"),
        (lambda: attention.heat_map("cat", steps=slice(5, 6)), "steps must choose at least one"),
        (lambda: _draw(small, attention_words=["dog"]), "the prompt must contain 'dog', got 'a photo of a cat"),
        (lambda: _draw(small, attention_words=[3]), "attention_words must be a text or a non-empty list of texts"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
