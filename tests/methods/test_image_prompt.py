"""Image prompts beside every other customisation, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from engine.models.conditioning import Batch, Conditioning, Mixing
from engine.sampling.layout import Layout
from tests.ip_adapters import N_PLAIN, N_PLUS, load_adapter, picture, write_image_encoder
from tests.pipelines import random_concept, relative_error, save_pipeline

_OPTIONS: dict[str, Any] = {"steps": 4, "seed": 3, "output": "latent", "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def plain(small: engine.Engine, folder: Path) -> engine.IPAdapter:
    return load_adapter(small, folder, "plain")


@pytest.fixture(scope="module")
def plus(small: engine.Engine, folder: Path) -> engine.IPAdapter:
    return load_adapter(small, folder, "plus")


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_heads: int) -> torch.Tensor:
    q, k, v = (x.double().unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_both_branches_of_a_mix_add_their_own_after_it(small: engine.Engine, masked: bool) -> None:
    """One layer, whose mix of the text alone is known: what is added is attention to the picture, in float64."""
    attn2 = next(iter(small.unet.cross_attentions.values()))
    torch.manual_seed(0)
    C = attn2.to_q.out_features
    x, norm = torch.randn(3, 16, C), torch.nn.LayerNorm(C)
    text, images = tuple(torch.randn(2, 3, 77, C)), tuple(torch.randn(2, 2, 3, 5, C))
    chosen = torch.zeros(2, 77, dtype=torch.bool)
    chosen[:, 2] = True
    gates, lengths = torch.tensor([[1.0, 10.0, 10.0, 500.0]]), torch.tensor([4, 5])
    mixing = Mixing(chosen, lengths, gates, logits=False, masked=masked, layers=frozenset({attn2.layer}))
    by_layer = [text] * (attn2.layer + 1), [images] * (attn2.layer + 1)
    shifts = torch.empty(3, 0)
    mixed = attn2(x, norm, Conditioning(Batch(tuple(by_layer[0]), mixing=mixing), shifts))
    actual = attn2(x, norm, Conditioning(Batch(tuple(by_layer[0]), mixing=mixing, images=tuple(by_layer[1])), shifts))
    queries = torch.nn.functional.linear(norm(x), attn2.to_q.weight)
    own = sum(_attention(queries, images[0][k], images[1][k], attn2.n_heads) for k in range(2))
    expected = mixed.double() + own @ attn2.to_out[0].weight.double().T
    assert relative_error(actual, expected) <= 1e-6
    tokens = torch.tensor([[1, 2]] * 3)
    condition = Conditioning(Batch(tuple(by_layer[0]), mixing=mixing, images=tuple(by_layer[1])), shifts)
    assert relative_error(x + attn2.with_columns(x, norm, condition, tokens)[0], expected) <= 1e-6


def test_followers_inherit_the_leaders_picture(small: engine.Engine, plus: engine.IPAdapter) -> None:
    """Residuals of strength 0 leave the foundation, which is drawn like the picture, too."""
    prompts = engine.ImagePrompt(plus, picture())
    alone = small.generate("a cat", image_prompts=prompts, **_OPTIONS).latents
    for foundation in ("parallel", "shared"):
        infusion = engine.Infusion([random_concept(small)], foundation=foundation, strength=0.0)
        out = small.generate("a cat", image_prompts=prompts, customization=infusion, **_OPTIONS)
        assert relative_error(out.latents, alone) <= 1e-5
    infusion = engine.Infusion([random_concept(small)])
    out = small.generate("a cat", image_prompts=prompts, customization=infusion, **_OPTIONS)
    assert relative_error(out.foundation_images[0], alone[0]) <= 1e-5
    assert relative_error(out.latents, alone) > 1e-3
    own = engine.Infusion([random_concept(small)], unconditional_maps="own", strength=0.0)
    out = small.generate("a cat", image_prompts=prompts, customization=own, **_OPTIONS)
    assert relative_error(out.latents, alone) <= 1e-5, "its own unconditional row sees no picture, as the leader's"


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_both_branches_of_dci_see_the_picture(
    small: engine.Engine, plain: engine.IPAdapter, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.sampling import image_rows

    seen = []
    real = image_rows.seen_by_rows
    monkeypatch.setattr(image_rows, "seen_by_rows", lambda layout: seen.append((layout, real(layout))) or seen[-1][1])
    first, second = engine.ImagePrompt(plain, picture(0)), engine.ImagePrompt(plain, picture(1))
    dci = engine.DCI("cat", fraction=1.0, noise=noise, guidance="own")
    small.generate(
        "a cat", customization=dci, images_per_prompt=2, image_prompts=[[first], [second]], **_OPTIONS | {"steps": 1}
    )
    layout: Layout
    ((layout, rows),) = seen
    # plain rows are unconditional: image 0's two branches, then image 1's; then concept rows, then auxiliary ones
    assert rows == [
        *[((first,), False)] * 2, *[((second,), False)] * 2, ((first,), True), ((second,), True),
        ((first,), True), ((second,), True),
    ]  # fmt: skip
    assert len(rows) == layout.n_rows


def test_images_of_one_request_may_differ(
    small: engine.Engine, plain: engine.IPAdapter, plus: engine.IPAdapter
) -> None:
    one, other = engine.ImagePrompt(plain, picture(1)), engine.ImagePrompt(plus, picture(2), scale=0.5)
    given = [None, [one], [one, other], (other,)]
    together = small.generate("a cat", images_per_prompt=4, image_prompts=given, **_OPTIONS)
    for i, own in enumerate(given):
        alone = small.generate("a cat", image_prompts=[[*(own or ())]], **_OPTIONS | {"seed": 3 + i})
        assert relative_error(together.latents[i], alone.latents[0]) <= 1e-5
        assert together.settings["image_prompts"][i] == [prompt.settings() for prompt in own or ()]
    assert together.settings["image_prompts"][3] == [{"adapter": "plus-0", "pictures": 1, "scale": 0.5}]


def test_images_of_one_seed_and_unlike_pictures_share_no_trajectory(
    small: engine.Engine, plain: engine.IPAdapter
) -> None:
    given = [[engine.ImagePrompt(plain, picture(i))] for i in (0, 1)]
    out = small.generate("a cat", images_per_prompt=2, image_prompts=given, **_OPTIONS | {"seed": [3, 3]})
    assert relative_error(out.latents[0], out.latents[1]) > 1e-3


def test_a_scale_of_zero_is_the_text_alone(small: engine.Engine, plus: engine.IPAdapter) -> None:
    plain = small.generate("a cat", **_OPTIONS).latents
    out = small.generate("a cat", image_prompts=engine.ImagePrompt(plus, picture(), scale=0), **_OPTIONS)
    assert torch.equal(out.latents, plain)


def test_several_pictures_are_one_prompt(small: engine.Engine, plus: engine.IPAdapter) -> None:
    """The same picture twice is the picture: the attention's weights are halved, and there are two of each."""
    once = small.generate("a cat", image_prompts=engine.ImagePrompt(plus, picture()), **_OPTIONS).latents
    prompt = engine.ImagePrompt(plus, [picture(), np.asarray(picture())])
    assert prompt.tokens.shape == (2 * N_PLUS, 32)
    assert relative_error(small.generate("a cat", image_prompts=prompt, **_OPTIONS).latents, once) <= 1e-5


def test_words_are_watched_beside_pictures(small: engine.Engine, plain: engine.IPAdapter) -> None:
    prompt = engine.ImagePrompt(plain, picture())
    watched = small.generate("a cat", image_prompts=prompt, attention_words=["cat"], **_OPTIONS)
    assert watched.attention is not None
    assert relative_error(watched.latents, small.generate("a cat", image_prompts=prompt, **_OPTIONS).latents) <= 1e-5


def test_with_loras_takes_the_adapter(small: engine.Engine, plain: engine.IPAdapter) -> None:
    prompt = engine.ImagePrompt(plain, picture())
    expected = small.generate("a cat", image_prompts=prompt, **_OPTIONS).latents
    assert torch.equal(small.with_loras([]).generate("a cat", image_prompts=prompt, **_OPTIONS).latents, expected)


def test_from_a_file(plain: engine.IPAdapter, tmp_path: Path) -> None:
    picture().save(tmp_path / "x.png")
    one, other = engine.ImagePrompt(plain, tmp_path / "x.png"), engine.ImagePrompt(plain, picture())
    assert torch.equal(one.tokens, other.tokens)
    assert one.tokens.shape == (N_PLAIN, 32)


def test_bad_prompts_are_refused(small: engine.Engine, plain: engine.IPAdapter, tmp_path: Path) -> None:
    prompt = engine.ImagePrompt(plain, picture())
    for given, message in (
        ("x.png", "image_prompts must be an engine.ImagePrompt, a list of them for all images, or .* got 'x.png'"),
        ([prompt, None], r"a list with a list per image, got ImagePrompt\(.*for one of several images"),
        ([[prompt]], r"a list with a list per image \(2\), got 1"),
        ([[prompt], [picture()]], "for one of several images"),
    ):
        with pytest.raises(ValueError, match=message):
            small.generate("a cat", images_per_prompt=2, image_prompts=given, **_OPTIONS)
    for options, message in (
        ({"adapter": "x"}, "adapter must be an engine.IPAdapter, got 'x'"),
        ({"image": []}, "image must be a picture, or a list of at least one, got an empty list"),
        ({"image": tmp_path / "none.png"}, "cannot be read as a picture"),
        ({"scale": float("nan")}, "scale must be a finite number from -100 to 100, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.ImagePrompt(**{"adapter": plain, "image": picture(), **options})


def test_an_adapter_of_another_model_is_refused(small_folder: Path, plain: engine.IPAdapter, tmp_path: Path) -> None:
    prompt = engine.ImagePrompt(plain, picture())
    save_pipeline("sd_like", tmp_path)
    with pytest.raises(ValueError, match="this model's 16 cross-attention layers and their widths, got 'plain-0'"):
        engine.load(tmp_path).generate("a cat", image_prompts=prompt, **_OPTIONS)
    half = engine.load(small_folder, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"in torch.bfloat16 on cpu, as this model is, got 'plain-0' in torch.float32"):
        half.generate("a cat", image_prompts=prompt, **_OPTIONS)


def test_in_bfloat16(small: engine.Engine, small_folder: Path, plus: engine.IPAdapter, tmp_path: Path) -> None:
    half = engine.load(small_folder, dtype="bfloat16")
    prompt = engine.ImagePrompt(load_adapter(half, tmp_path, "plus"), picture())
    out = half.generate("a cat", image_prompts=prompt, **_OPTIONS).latents
    expected = small.generate("a cat", image_prompts=engine.ImagePrompt(plus, picture()), **_OPTIONS).latents
    without = small.generate("a cat", **_OPTIONS).latents
    assert relative_error(out.float(), expected) < 0.3 * relative_error(without, expected)


def test_an_encoder_that_does_not_fit_is_refused(small: engine.Engine, folder: Path, tmp_path: Path) -> None:
    load_adapter(small, folder, "plain"), load_adapter(small, folder, "plus")
    other = write_image_encoder(tmp_path / "other", projection_dim=16, hidden_size=64)
    for kind, message in (
        ("plain", "projection_dim must be 24 to fit plain-0.safetensors, got 16"),
        ("plus", "hidden_size must be 32 to fit plus-0.safetensors, got 64"),
    ):
        with pytest.raises(engine.CheckpointError, match=message):
            engine.IPAdapter.load(folder / f"{kind}-0.safetensors", small, other)
    with pytest.raises(engine.CheckpointError, match=r"config.json: missing"):
        engine.IPAdapter.load(folder / "plain-0.safetensors", small, tmp_path)
    (other / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(engine.CheckpointError, match="model_type must be 'clip_vision_model', got 'clip'"):
        engine.IPAdapter.load(folder / "plain-0.safetensors", small, other)


def test_the_encoders_own_preprocessing(small: engine.Engine, folder: Path, tmp_path: Path) -> None:
    """A folder that says how pictures are prepared is heeded."""
    from transformers import CLIPImageProcessor

    encoder = write_image_encoder(tmp_path / "encoder")
    default = engine.IPAdapter.load(folder / "plain-0.safetensors", small, encoder)
    size = {"height": 28, "width": 28}
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size, image_mean=[0.0] * 3).save_pretrained(encoder)
    own = engine.IPAdapter.load(folder / "plain-0.safetensors", small, encoder)
    white = Image.new("RGB", (32, 32), "white")
    assert not torch.equal(own.tokens([white]), default.tokens([white]))
    assert default.encoder.pixels([white]).shape == (1, 3, 28, 28)
