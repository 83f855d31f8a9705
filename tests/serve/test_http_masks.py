"""Masks as clients of the server send them: our own interface's, the openai package's, webuiapi's."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import webuiapi
from PIL import Image, ImageFilter

import engine
from engine.serve.http.service import Limits
from tests.serve.http_server import Running, pixels_of, running

PROMPT, QUICK = "a photo of a cat", {"steps": 3, "seed": 1}


@pytest.fixture(scope="module")
def server(small: engine.Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(small, tmp_path_factory.mktemp("server")) as one:
        yield one


def _sent(pixels: np.ndarray) -> str:
    """A PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _inpainted() -> tuple[np.ndarray, np.ndarray]:
    """A picture (16, 20, 3) and what of it to redraw (16, 20)."""
    mask = np.zeros((16, 20), np.uint8)
    mask[3:11, 6:15] = 255
    return np.random.default_rng(0).integers(0, 255, (16, 20, 3)).astype(np.uint8), mask


def test_inpainting(small: engine.Engine, http: httpx.Client) -> None:
    pixels, mask = _inpainted()
    more = {"strength": 0.7, "mask_blur": 1.0, "mask_padding": 1}
    expected = small.generate(PROMPT, image=pixels, mask=mask, progress=False, **QUICK, **more).images[0]
    body = {"prompt": PROMPT, "image": _sent(pixels), "mask": _sent(mask), **QUICK, **more}
    for given in (body, body | {"mask": [_sent(mask)]}):
        answer = http.post("/v1/generate", json=given).json()
        assert abs(pixels_of(answer["images"][0]).astype(int) - np.asarray(expected)).max() <= 1
        assert answer["settings"]["mask_padding"] == 1
    assert not np.array_equal(np.asarray(expected), pixels)


@pytest.mark.parametrize("other", ["image", "mask", "strength"])
def test_a_request_id_holds_for_picture_mask_and_options(http: httpx.Client, other: str) -> None:
    pixels, mask = _inpainted()
    body = {
        "prompt": PROMPT,
        "image": _sent(pixels),
        "mask": _sent(mask),
        "strength": 0.5,
        "request_id": other,
        **QUICK,
    }
    first = http.post("/v1/generate", json=body).json()
    assert http.post("/v1/generate", json=body).json() == first
    changed = {"image": _sent(255 - pixels), "mask": _sent(255 - mask), "strength": 0.6}[other]
    assert "request_id must be another" in http.post("/v1/generate", json=body | {other: changed}).json()["detail"]


def test_pictures_that_are_pasted_into_have_a_limit(small: engine.Engine, tmp_path: Path) -> None:
    pixels, mask = _inpainted()
    body = {"prompt": PROMPT, "image": _sent(pixels), "mask": _sent(mask), "height": 16, "width": 16, **QUICK}
    with running(small, tmp_path, limits=Limits(pixels=16 * 20, request_pixels=16 * 20)) as server:
        url = f"{server.url}/v1/generate"
        large = np.zeros((40, 40), np.uint8)
        large[3:11, 6:15] = 255
        sizes = {"image": _sent(np.zeros((40, 40, 3), np.uint8)), "mask": _sent(large), "mask_padding": 1}
        answer = httpx.post(url, json=body | sizes, timeout=60)
        assert "pixels of all pictures pasted into must be at most 1280 on this server, got 1600" in answer.text


def _laid_over(drawn: Image.Image, pixels: np.ndarray, mask: Image.Image) -> Image.Image:
    """What was drawn where the mask is, and the picture elsewhere."""
    return Image.composite(drawn, Image.fromarray(pixels).resize(drawn.size, Image.Resampling.LANCZOS), mask)


def test_openai_masks(small: engine.Engine, server: Running) -> None:
    """Transparent pixels are redrawn: of the mask, or of the picture where there is none."""
    openai_client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    pixels, mask = _inpainted()
    clear = np.dstack([pixels, 255 - mask])
    files = [("a.png", base64.b64decode(_sent(one)), "image/png") for one in (pixels, clear)]
    drawn = small.generate(PROMPT, image=pixels, mask=mask, strength=1.0, progress=False, **QUICK).images[0]
    expected = _laid_over(drawn, pixels, Image.fromarray(mask))
    more = {"prompt": PROMPT, "extra_body": QUICK | {"strength": 1.0}}
    for answer in (
        openai_client.images.edit(image=files[0], mask=files[1], **more),
        openai_client.images.edit(image=files[1], **more),
    ):
        assert answer.data is not None
        found = pixels_of(answer.data[0].b64_json or "")
        assert abs(found.astype(int) - np.asarray(expected)).max() <= 1
        assert np.array_equal(found[mask == 0], pixels[mask == 0])
    assert not np.array_equal(np.asarray(drawn)[mask == 0], pixels[mask == 0]), "the VAE changes what it sees"


def test_openai_masks_blend_where_they_are_soft(small: engine.Engine, http: httpx.Client) -> None:
    pixels, mask = _inpainted()
    drawn = small.generate(PROMPT, image=pixels, mask=mask, mask_blur=1.0, progress=False, **QUICK).images[0]
    soft = Image.fromarray(mask).filter(ImageFilter.GaussianBlur(1.0))
    clear = _sent(np.dstack([pixels, 255 - mask]))
    files = {"image": ("a.png", base64.b64decode(_sent(pixels))), "mask": ("b.png", base64.b64decode(clear))}
    answer = http.post("/v1/images/edits", data={"prompt": PROMPT, "mask_blur": "1"} | QUICK, files=files).json()
    found = pixels_of(answer["data"][0]["b64_json"]).astype(int)
    assert abs(found - np.asarray(_laid_over(drawn, pixels, soft))).max() <= 1
    assert np.array_equal(found[np.asarray(soft) == 0], pixels[np.asarray(soft) == 0])


@pytest.mark.parametrize("inverted", [0, 1])
@pytest.mark.parametrize("only_masked", [True, False])
def test_a1111_masks(small: engine.Engine, server: Running, inverted: int, only_masked: bool) -> None:
    webui = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1", steps=3)
    pixels, mask = _inpainted()
    sizes = {"width": 20, "height": 16}
    theirs = webui.img2img(
        images=[Image.fromarray(pixels)], mask_image=Image.fromarray(mask // 2 + 20), mask_blur=1, inpainting_fill=1,
        inpaint_full_res=only_masked, inpaint_full_res_padding=3, inpainting_mask_invert=inverted, prompt=PROMPT,
        seed=1, denoising_strength=0.8, sampler_name="DDIM", eta=0.0, **sizes,
    )  # fmt: skip
    mask = 255 - mask if inverted else mask
    ours = small.generate(
        PROMPT, image=pixels, mask=mask, mask_blur=1, mask_padding=3 if only_masked else None, guidance_scale=7.0,
        progress=False, **QUICK, **sizes,
    )  # fmt: skip
    found, expected = np.asarray(theirs.image).astype(int), ours.images[0]
    soft = np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(1)))
    if not only_masked:  # where the whole picture is drawn, A1111 doubles the blurred mask
        expected = _laid_over(expected, pixels, Image.fromarray(np.minimum(2 * soft.astype(int), 255).astype(np.uint8)))
    assert abs(found - np.asarray(expected)).max() <= 1
    assert (soft == 0).any()
    assert np.array_equal(found[soft == 0], pixels[soft == 0])


def test_a_picture_of_another_size_is_brought_to_what_is_drawn(small: engine.Engine, http: httpx.Client) -> None:
    """As ``generate`` does before it draws; three pictures of a request are laid over the same."""
    pixels, mask = _inpainted()
    sizes = {"width": 12, "height": 24}
    body = {"prompt": PROMPT, "init_images": [_sent(pixels)], "mask": _sent(mask), "mask_blur": 0, **QUICK}
    body |= {"sampler_name": "DDIM", "inpaint_full_res": False, "batch_size": 2, **sizes}
    answer = http.post("/sdapi/v1/img2img", json=body).json()
    ours = small.generate(
        PROMPT, image=pixels, mask=mask, strength=0.75, guidance_scale=7.0, images_per_prompt=2, progress=False,
        **QUICK, **sizes,
    )  # fmt: skip
    over = Image.fromarray(mask).resize((12, 24), Image.Resampling.LANCZOS)
    for text, drawn in zip(answer["images"], ours.images, strict=True):
        assert abs(pixels_of(text).astype(int) - np.asarray(_laid_over(drawn, pixels, over))).max() <= 1


def test_our_own_interface_leaves_what_was_drawn(small: engine.Engine, http: httpx.Client) -> None:
    pixels, mask = _inpainted()
    body = {"prompt": PROMPT, "image": _sent(pixels), "mask": _sent(mask), **QUICK}
    drawn = small.generate(PROMPT, image=pixels, mask=mask, progress=False, **QUICK).images[0]
    answer = http.post("/v1/generate", json=body).json()
    assert abs(pixels_of(answer["images"][0]).astype(int) - np.asarray(drawn)).max() <= 1


def test_a1111_masks_have_its_defaults(small: engine.Engine, http: httpx.Client) -> None:
    """Four pixels of blur, the masked surroundings alone, no padding; opacity where there is some."""
    pixels, mask = _inpainted()
    body = {"prompt": PROMPT, "init_images": [_sent(pixels)], "steps": 3, "seed": 1, "sampler_name": "DDIM"}
    clear = np.dstack([pixels, mask])
    answer = http.post("/sdapi/v1/img2img", json=body | {"mask": _sent(clear)}).json()
    ours = small.generate(
        PROMPT, image=pixels, mask=mask, mask_blur=4, mask_padding=0, strength=0.75, guidance_scale=7.0,
        progress=False, **QUICK,
    )  # fmt: skip
    assert abs(pixels_of(answer["images"][0]).astype(int) - np.asarray(ours.images[0])).max() <= 1
    for options, message in (
        ({"inpainting_fill": 0}, "inpainting_fill must be 1 with a mask on this server, got 0"),
        ({"mask_round": True}, "mask_round must be False with a mask on this server, got True"),
        ({"mask_blur_x": 2}, "mask_blur_x and mask_blur_y must be alike on this server, got 2.0 and 4"),
    ):
        answer = http.post("/sdapi/v1/img2img", json=body | {"mask": _sent(mask)} | options)
        assert (answer.status_code, message in answer.json()["detail"]) == (400, True)
    assert http.post("/sdapi/v1/img2img", json=body | {"inpainting_fill": 0, "mask": ""}).status_code == 200
