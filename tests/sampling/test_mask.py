"""Masks: what may be one, what blur and sizes make of it, and what of a picture is cut out and pasted."""

import re

import numpy as np
import pytest
from PIL import Image, ImageFilter

import engine
from engine.sampling.arguments import Options
from engine.sampling.mask import crop_box, cut, read_masks
from tests.pipelines import random_concept

_PICTURE = Image.new("RGB", (24, 16), (10, 90, 200))


def _hard(size: tuple[int, int] = (24, 16), box: tuple[int, int, int, int] = (6, 4, 15, 11)) -> np.ndarray:
    """(H, W) bool."""
    mask = np.zeros(size[::-1], bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def _fit(mask: object, size: tuple[int, int] = (16, 24), **options: object) -> np.ndarray:
    """(I, H, W), of one image."""
    asked = Options(image=_PICTURE, mask=mask, **options)  # type: ignore[arg-type]
    return cut(asked, [_PICTURE], read_masks(asked, 1), size)[1][:, 0].numpy()


@pytest.mark.parametrize(
    "mask",
    [
        _hard(),
        _hard().astype(np.float32),
        _hard().astype(np.float64),
        _hard().astype(np.uint8) * 255,
        Image.fromarray(_hard()),
        Image.fromarray(_hard().astype(np.uint8) * 255),
        Image.fromarray(_hard().astype(np.uint8) * 255).convert("RGB"),
        Image.fromarray(_hard().astype(np.uint8) * 255).convert("RGBA"),
        Image.fromarray(_hard().astype(np.uint8) * 255).convert("P"),
    ],
    ids=["bool", "float32", "float64", "uint8", "1", "L", "RGB", "RGBA", "P"],
)
def test_every_form_of_a_mask_means_the_same(mask: object) -> None:
    assert np.array_equal(_fit(mask)[0], _hard())


def test_greys_are_kept_and_black_and_white_stays_so() -> None:
    grey = _hard().astype(np.float32) * 0.3
    assert np.allclose(_fit(grey)[0], grey, atol=0.5 / 255)
    assert set(np.unique(_fit(_hard((37, 23), (7, 3, 30, 19))))) == {0.0, 1.0}
    scaled = _fit(_hard((37, 23), (7, 3, 30, 19)).astype(np.float32) * 0.9)
    assert len(np.unique(scaled)) > 2


def test_blur_is_gaussian_in_pixels_of_the_mask() -> None:
    picture = Image.fromarray(_hard().astype(np.uint8) * 255)
    expected = np.asarray(picture.filter(ImageFilter.GaussianBlur(2.5))).astype(np.float32) / 255
    assert np.allclose(_fit(_hard(), mask_blur=2.5)[0], expected)
    step = np.zeros((60, 60), bool)
    step[:, 30:] = True
    edge = _fit(step, size=(60, 60), mask_blur=5.0)[0][30]
    assert abs(float((edge[30:] * 0 + edge[30:]).sum() - 30 + edge[:30].sum())) < 0.1, "as much comes in as goes out"
    slope = np.diff(edge).max()
    assert slope == pytest.approx(1 / (5.0 * np.sqrt(2 * np.pi)), rel=0.1), "of a standard deviation of 5 pixels"


def test_a_mask_is_turned_as_its_orientation_says() -> None:
    turned, exif = Image.fromarray(_hard()).convert("L").transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    turned.info["exif"] = exif.tobytes()
    assert np.array_equal(_fit(turned)[0], _hard())


def test_crops_take_the_shape_that_is_drawn() -> None:
    mask = Image.fromarray(_hard((100, 80), (40, 30, 60, 40)))
    assert crop_box(mask, 64, 64, 0) == (40, 25, 60, 45)
    assert crop_box(mask, 64, 64, 5) == (35, 20, 65, 50)
    assert crop_box(mask, 64, 32, 0) == (40, 30, 60, 40)
    assert crop_box(mask, 128, 32, 0) == (30, 30, 70, 40)
    corner = Image.fromarray(_hard((100, 80), (90, 70, 100, 80)))
    assert crop_box(corner, 64, 32, 0) == (80, 70, 100, 80), "moved into the picture"
    assert crop_box(Image.fromarray(_hard((100, 80), (0, 5, 100, 9))), 64, 64, 0) == (0, 0, 100, 80), "it ends there"


def test_cropped_pictures_keep_their_size(small: engine.Engine) -> None:
    """Each of its own, with all that is not masked as it was; drawn at the model's size."""
    sizes, rng = [(30, 20), (17, 25)], np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    masks = [_hard((30, 20), (5, 5, 15, 15)), _hard((17, 25), (0, 10, 9, 25))]
    out = small.generate(
        ["a cat", "a dog"], image=pictures, mask=masks, mask_padding=2, seed=1, steps=3, progress=False
    )
    assert (out.settings["height"], out.settings["width"]) == (16, 16)
    assert (out.settings["mask_blur"], out.settings["mask_padding"]) == (0.0, 2)
    assert "Inpaint area: Only masked, Masked area padding: 2" in out.parameters(0)
    for drawn, picture, mask in zip(out.images, pictures, masks, strict=True):
        assert drawn.size == picture.size
        same = (np.asarray(drawn) == np.asarray(picture)).all(axis=-1)
        assert same[~mask].all()
        assert same[mask].mean() < 0.2


def test_foundations_are_pasted_too(small: engine.Engine) -> None:
    """An image without one has none still."""
    custom = [engine.Infusion([random_concept(small)]), None]
    out = small.generate(
        ["a cat", "a dog"], image=_PICTURE, mask=_hard(), mask_padding=2, customization=custom, seed=1, steps=3,
        progress=False,
    )  # fmt: skip
    assert out.foundation_images is not None
    foundation, none = out.foundation_images
    assert none is None
    assert foundation.size == _PICTURE.size
    kept = ~_hard()
    assert np.array_equal(np.asarray(foundation)[kept], np.asarray(_PICTURE)[kept])
    assert not np.array_equal(np.asarray(foundation), np.asarray(out.images[0]))


def test_one_mask_serves_all_pictures(small: engine.Engine) -> None:
    options = {"seed": 1, "steps": 3, "output": "latent", "progress": False, "image": _PICTURE}
    one = small.generate(["a cat", "a dog"], mask=_hard(), images_per_prompt=2, **options)
    each = small.generate(["a cat", "a dog"], mask=[_hard(), _hard()], images_per_prompt=2, **options)
    other = small.generate(["a cat", "a dog"], mask=[_hard(), ~_hard()], images_per_prompt=2, **options)
    assert one.latents.equal(each.latents)
    assert one.latents[:2].equal(other.latents[:2])
    assert not one.latents[2:].equal(other.latents[2:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": None}, "mask says what of a picture to redraw: give image too"),
        ({"mask": None, "mask_blur": 2}, "mask_blur belongs to a mask: give one too, got mask_blur=2.0"),
        ({"mask": None, "mask_padding": 0}, "mask_padding belongs to a mask: give one too, got mask_padding=0"),
        ({"mask_blur": -1}, "mask_blur must be a finite number from 0 to 1000, got -1"),
        ({"mask_padding": 1.5}, "mask_padding must be an integer >= 0, got 1.5"),
        ({"mask_padding": 2, "output": "latent"}, "output must be 'pil', got 'latent'"),
        ({"mask_padding": 2, "mask": _hard((12, 8))}, "must be as large as its picture where mask_padding"),
        ({"mask": "mask.png"}, "mask must hold PIL pictures or arrays (H, W)"),
        ({"mask": np.ones((16, 24, 1))}, "got (16, 24, 1)"),
        ({"mask": np.full((16, 24), 2.0)}, "got float64 from 2.0 to 2.0"),
        ({"mask": np.full((16, 24), np.nan)}, "got float64 from nan to nan"),
        ({"mask": np.ones((16, 24), np.int64)}, "got int64 from 1 to 1"),
        ({"mask": Image.new("I;16", (24, 16), 5)}, "got a picture of mode 'I;16'"),
        ({"mask": Image.new("RGBA", (24, 16), (255, 255, 255, 254))}, "mask must be opaque"),
        ({"mask": np.zeros((16, 24), bool)}, "mask must mark something to redraw"),
        ({"mask": [_hard(), _hard()]}, "mask must be one mask, one per prompt or one per image (1), got 2"),
        ({"mask": []}, "got 0"),
        ({"strength": 0.01}, "int(steps * strength) must be at least 1"),
    ],
    ids=lambda value: str(value)[:40].replace("\n", " "),
)
def test_refusals(small: engine.Engine, arguments: dict, message: str) -> None:
    given = {"image": _PICTURE, "mask": _hard(), "steps": 3, "progress": False} | arguments
    with pytest.raises(ValueError, match=re.escape(message)):
        small.generate("a cat", **given)


def test_inpainting_models_want_a_mask(inpainting: engine.Engine) -> None:
    for options in ({}, {"image": _PICTURE}):
        with pytest.raises(ValueError, match=r"this is an inpainting model, .* give image and mask"):
            inpainting.generate("a cat", progress=False, **options)
    with pytest.raises(ValueError, match="concepts are learned on a model of four input channels"):
        engine.train_infusion(inpainting, [_PICTURE], "cat", steps=1)
    with pytest.raises(ValueError, match="concepts are learned on a model of four input channels"):
        engine.train_ico(inpainting, [_PICTURE], "cat", steps=1)
