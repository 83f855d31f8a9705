"""ControlNets and image prompts as clients of the server ask for them: our own interface's, webuiapi's."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import webuiapi
from PIL import Image

import engine
from engine.cli import main
from engine.methods.asked_pictures import NetFiles
from engine.sampling.mask import crop_box
from engine.serve.http import run
from engine.serve.http.hints import CROP, FILL, STRETCH, fitted
from engine.serve.http.service import Limits
from engine.serve.nets import Nets
from tests.controlnets import hint, listen, random_controlnet
from tests.ip_adapters import load_adapter, picture
from tests.serve.http_server import Running, pixels_of, running

PROMPT, QUICK = "a photo of a cat", {"steps": 3, "seed": 1}
SIDE = 16


@pytest.fixture(scope="module")
def files(small: engine.Engine, small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> NetFiles:
    folder = tmp_path_factory.mktemp("nets")
    for i, name in enumerate(("edges", "depth")):
        random_controlnet(small, folder / f"control_{name}", small_folder, seed=i)
        listen(folder / f"control_{name}")
    adapters = {}
    for kind in ("plain", "plus"):
        load_adapter(small, folder, kind)
        adapters[kind] = str(folder / f"{kind}-0.safetensors"), str(folder / "image_encoder")
    return NetFiles({name: str(folder / f"control_{name}") for name in ("edges", "depth")}, adapters)


@pytest.fixture(scope="module")
def nets(small: engine.Engine, files: NetFiles) -> Nets:
    return Nets(small, files)


@pytest.fixture(scope="module")
def server(small: engine.Engine, nets: Nets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(small, tmp_path_factory.mktemp("server"), nets=nets) as one:
        yield one


@pytest.fixture
def webui(server: Running) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1", steps=3)


def _sent(one: Image.Image | np.ndarray) -> str:
    """A PNG in base64."""
    buffer = io.BytesIO()
    (one if isinstance(one, Image.Image) else Image.fromarray(one)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _differ(one: Any, other: Any) -> int:
    return int(abs(np.asarray(one).astype(int) - np.asarray(other)).max())


# -- our own interface


def test_controls(small: engine.Engine, nets: Nets, http: httpx.Client) -> None:
    first, second = {"weight": 0.8, "start": 0.3, "end": 0.9}, {"weight": -0.7, "guess_mode": True}
    given = [
        {"net": "edges", "image": [_sent(hint(1)), f"data:image/png;base64,{_sent(hint(2))}"], **first},
        {"net": "depth", "image": _sent(hint(3)), **second},
    ]
    answer = http.post("/v1/generate", json={"prompt": PROMPT, "images_per_prompt": 2, "control": given, **QUICK})
    controls = [
        engine.Control(nets.controls["edges"], [hint(1), hint(2)], **first),
        engine.Control(nets.controls["depth"], hint(3), **second),
    ]
    out = small.generate(PROMPT, images_per_prompt=2, control=controls, progress=False, **QUICK)
    plain = small.generate(PROMPT, images_per_prompt=2, progress=False, **QUICK)
    for text, ours, without in zip(answer.json()["images"], out.images, plain.images, strict=True):
        assert _differ(pixels_of(text), ours) <= 1
        assert _differ(ours, without) > 4
    assert answer.json()["settings"]["control"] == [one.settings() for one in controls]


def test_image_prompts(small: engine.Engine, nets: Nets, http: httpx.Client) -> None:
    given = [
        {"adapter": "plain", "image": [_sent(picture(1)), _sent(picture(2))], "scale": 0.7},
        {"adapter": "plus", "image": _sent(picture(3))},
    ]
    answer = http.post("/v1/generate", json={"prompt": PROMPT, "image_prompts": given, **QUICK}).json()
    prompts = [
        engine.ImagePrompt(nets.adapters["plain"], [picture(1), picture(2)], 0.7),
        engine.ImagePrompt(nets.adapters["plus"], picture(3)),
    ]
    out = small.generate(PROMPT, image_prompts=prompts, progress=False, **QUICK)
    assert _differ(pixels_of(answer["images"][0]), out.images[0]) <= 1
    assert _differ(small.generate(PROMPT, progress=False, **QUICK).images[0], out.images[0]) > 4
    assert answer["settings"]["image_prompts"] == [[one.settings() for one in prompts]]


def test_both_with_a_mask(small: engine.Engine, nets: Nets, http: httpx.Client) -> None:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[3:11, 6:15] = 255
    body = {"image": _sent(hint(5)), "mask": _sent(mask), "strength": 0.7}
    body |= {"control": [{"net": "edges", "image": _sent(hint(1))}]}
    body |= {"image_prompts": [{"adapter": "plain", "image": _sent(picture(1))}]}
    answer = http.post("/v1/generate", json={"prompt": PROMPT, **body, **QUICK}).json()
    out = small.generate(
        PROMPT, image=hint(5), mask=mask, strength=0.7, control=engine.Control(nets.controls["edges"], hint(1)),
        image_prompts=engine.ImagePrompt(nets.adapters["plain"], picture(1)), progress=False, **QUICK,
    )  # fmt: skip
    assert _differ(pixels_of(answer["images"][0]), out.images[0]) <= 1


def test_names_are_told(http: httpx.Client) -> None:
    about = http.get("/v1/about").json()
    assert (about["controls"], about["image_prompt_adapters"]) == (["edges", "depth"], ["plain", "plus"])
    assert (about["limits"]["controls"], about["limits"]["prompt_pictures"]) == (4, 8)


def test_a_request_id_holds_for_its_pictures_too(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "request_id": "controlled", **QUICK}
    one, other = ({"control": [{"net": "edges", "image": _sent(hint(i))}]} for i in (1, 2))
    first = http.post("/v1/generate", json=body | one).json()
    assert http.post("/v1/generate", json=body | one).json() == first
    assert "request_id must be another" in http.post("/v1/generate", json=body | other).json()["detail"]


_HINT = {"net": "edges", "image": _sent(hint())}
_LIKE = {"adapter": "plain", "image": _sent(picture())}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"control": [{**_HINT, "net": "pose"}]}, 404, "control[0].net must be one of edges, depth, got 'pose'"),
        ({"control": [_HINT, {**_HINT, "net": "/etc"}]}, 404, "control[1].net must be one of edges, depth"),
        ({"control": [{**_HINT, "weight": 101}]}, 400, "control[0]: weight must be a finite number from -100 to 100"),
        ({"control": [{**_HINT, "start": 0.5, "end": 0.2}]}, 400, "control[0]: start must be below end"),
        ({"control": [{**_HINT, "strength": 1}]}, 400, "control.0.strength: Extra inputs are not permitted"),
        ({"control": [{"net": "edges"}]}, 400, "control.0.image: Field required"),
        ({"control": [{**_HINT, "image": "hint.png"}]}, 400, "control[0].image must be a picture in base64"),
        ({"control": [{**_HINT, "image": [_sent(hint())] * 2}]}, 400, "pictures of a control must be at most 1 here"),
        ({"control": [_HINT] * 5}, 400, "networks of control must be at most 4 here, got 5"),
        ({"control": [_HINT] * 65}, 400, "control: List should have at most 64 items"),
        ({"control": [{**_HINT, "image": ""}]}, 400, "control[0].image must be one text or several, got ''"),
        ({"image_prompts": [{**_LIKE, "adapter": "face"}]}, 404, "image_prompts[0].adapter must be one of plain, plus"),
        ({"image_prompts": [{**_LIKE, "scale": -101}]}, 400, "image_prompts[0]: scale must be a finite number"),
        ({"image_prompts": [{**_LIKE, "image": "AAAA"}]}, 400, "image_prompts[0].image must be a PNG, JPEG"),
        ({"image_prompts": [{**_LIKE, "image_encoder": "/etc"}]}, 400, "image_encoder: Extra inputs"),
        ({"image_prompts": [_LIKE] * 9}, 400, "pictures of image_prompts must be at most 8 here, got 9"),
        ({"image_prompts": _LIKE}, 400, "image_prompts: Input should be a valid list"),
    ],
)
def test_what_cannot_be_honoured_is_told(http: httpx.Client, body: dict[str, Any], status: int, message: str) -> None:
    answer = http.post("/v1/generate", json={"prompt": PROMPT, **QUICK, **body})
    assert (answer.status_code, message in answer.json()["detail"]) == (status, True), answer.text


def test_their_pictures_have_limits(small: engine.Engine, nets: Nets, tmp_path: Path) -> None:
    limits = Limits(pixels=SIDE * SIDE, request_pixels=SIDE * SIDE)
    with running(small, tmp_path, limits=limits, nets=nets) as server:
        url = f"{server.url}/v1/generate"

        def answer(**body: Any) -> httpx.Response:
            return httpx.post(url, json={"prompt": PROMPT, "height": SIDE, "width": SIDE, **QUICK, **body}, timeout=60)

        large = _sent(hint(0, SIDE, 17 * SIDE))
        assert "control[0].image must have at most 4096 pixels" in answer(control=[{**_HINT, "image": large}]).text
        most = {**_HINT, "image": _sent(hint(0, 4 * SIDE, 4 * SIDE))}  # alone as much as all may have
        assert answer(control=[most]).status_code == 200
        more = answer(control=[most], image_prompts=[_LIKE]).text
        rule = "pixels of all pictures of control and image_prompts must be at most 4096 on this server"
        assert f"{rule}, got more with image_prompts[0].image" in more


def test_a_server_without_networks_says_so(small: engine.Engine, tmp_path: Path) -> None:
    with running(small, tmp_path) as server:
        answer = httpx.post(f"{server.url}/v1/generate", json={"prompt": PROMPT, "control": [_HINT], **QUICK})
        rule = "control[0].net must be one that this server was started with: there is none, got 'edges'"
        assert (answer.status_code, rule in answer.text) == (404, True)
        webui = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1", steps=3)
        assert (webui.controlnet_model_list(), webui.get_scripts()["txt2img"]) == ([], [])


# -- A1111's extension


def test_a1111_units(small: engine.Engine, nets: Nets, webui: webuiapi.WebUIApi) -> None:
    units = [
        webuiapi.ControlNetUnit(hint(1), model="edges", weight=0.8, guidance_start=0.3, guidance_end=0.9),
        webuiapi.ControlNetUnit(hint(2), model="depth [a1B2]", control_mode=2, resize_mode="Just Resize"),
        webuiapi.ControlNetUnit(hint(3), model="edges", enabled=False),
    ]
    options = {"prompt": PROMPT, "seed": 1, "width": SIDE, "height": SIDE, "sampler_name": "DDIM", "eta": 0.0}
    theirs = webui.txt2img(
        controlnet_units=units, alwayson_scripts={}, **options
    )  # its default keeps what it was given
    controls = [
        engine.Control(nets.controls["edges"], hint(1), 0.8, 0.3, 0.9),
        engine.Control(nets.controls["depth"], hint(2), guess_mode=True),
    ]
    sizes = {"width": SIDE, "height": SIDE, "guidance_scale": 7.0}
    ours = small.generate(PROMPT, control=controls, progress=False, **QUICK, **sizes)
    assert _differ(theirs.image, ours.images[0]) <= 1
    assert "Control Mode: ControlNet is more important" in theirs.info["infotexts"][0]
    without = small.generate(PROMPT, control=controls[:1], progress=False, **QUICK, **sizes)
    assert _differ(without.images[0], ours.images[0]) > 4
    none = webui.txt2img(**options, alwayson_scripts={})
    assert _differ(none.image, ours.images[0]) > 4


def test_a1111_lists(webui: webuiapi.WebUIApi, http: httpx.Client) -> None:
    assert webui.controlnet_version() == 3
    assert webui.controlnet_model_list() == ["edges", "depth"]
    assert webui.controlnet_module_list() == ["none"]
    assert http.get("/controlnet/settings").json() == {"control_net_unit_count": 4}
    assert webui.get_scripts() == {"txt2img": ["controlnet"], "img2img": ["controlnet"]}


@pytest.mark.parametrize(("theirs", "mode"), [(0, STRETCH), ("Crop and Resize", CROP), ("Envelope (Outer Fit)", FILL)])
def test_a1111_hints_are_brought_to_size(
    small: engine.Engine, nets: Nets, webui: webuiapi.WebUIApi, theirs: str | int, mode: str
) -> None:
    unit = webuiapi.ControlNetUnit(hint(1, 10, 30), model="edges", resize_mode=theirs)  # type: ignore[arg-type]
    sizes = {"width": 20, "height": SIDE}
    drawn = webui.txt2img(
        controlnet_units=[unit], prompt=PROMPT, seed=1, sampler_name="DDIM", eta=0.0, cfg_scale=8.0,
        alwayson_scripts={}, **sizes,
    )  # fmt: skip
    others = {}
    for one in (STRETCH, CROP, FILL):
        control = engine.Control(nets.controls["edges"], fitted(hint(1, 10, 30), one, (20, SIDE)))
        ours = small.generate(PROMPT, control=control, progress=False, **QUICK, **sizes)
        others[one] = _differ(drawn.image, ours.images[0])
    assert others.pop(mode) <= 1
    assert min(others.values()) > 4


def test_a1111_units_without_a_picture_take_the_one_that_is_redrawn(
    small: engine.Engine, nets: Nets, webui: webuiapi.WebUIApi
) -> None:
    drawn = webui.img2img(
        images=[hint(4)], controlnet_units=[webuiapi.ControlNetUnit(model="edges")], prompt=PROMPT, seed=1,
        denoising_strength=0.7, sampler_name="DDIM", eta=0.0, width=SIDE, height=SIDE, alwayson_scripts={},
    )  # fmt: skip
    control = engine.Control(nets.controls["edges"], hint(4))
    ours = small.generate(
        PROMPT, image=hint(4), strength=0.7, control=control, guidance_scale=7.0, progress=False, **QUICK
    )
    assert _differ(drawn.image, ours.images[0]) <= 1


def test_a1111_hints_are_cropped_as_the_picture_is(small: engine.Engine, nets: Nets, webui: webuiapi.WebUIApi) -> None:
    """Where the surroundings of a mask alone are drawn; the hint is brought to the picture's size first."""
    mask = np.zeros((24, 40), np.uint8)
    mask[5:9, 22:26] = 255
    image, sizes = hint(4, 24, 40), {"width": SIDE, "height": SIDE}
    drawn = webui.img2img(
        images=[image], mask_image=Image.fromarray(mask), mask_blur=0, inpainting_fill=1, inpaint_full_res=True,
        inpaint_full_res_padding=2, prompt=PROMPT, seed=1, denoising_strength=0.8, sampler_name="DDIM", eta=0.0,
        controlnet_units=[webuiapi.ControlNetUnit(hint(1, 48, 20), model="edges", resize_mode="Crop and Resize")],
        alwayson_scripts={}, **sizes,
    )  # fmt: skip
    box = crop_box(Image.fromarray(mask), SIDE, SIDE, 2)
    assert box == (20, 3, 28, 11)
    own = fitted(hint(1, 48, 20), CROP, (40, 24)).crop(box).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    ours = small.generate(
        PROMPT, image=image, mask=mask, mask_padding=2, guidance_scale=7.0, progress=False,
        control=engine.Control(nets.controls["edges"], own), **QUICK, **sizes,
    )  # fmt: skip
    assert _differ(drawn.image, ours.images[0]) <= 1
    whole = small.generate(
        PROMPT, image=image, mask=mask, mask_padding=2, guidance_scale=7.0, progress=False,
        control=engine.Control(nets.controls["edges"], hint(1, 48, 20)), **QUICK, **sizes,
    )  # fmt: skip
    assert _differ(whole.images[0], ours.images[0]) > 4


_UNIT = {"image": _sent(hint()), "model": "edges"}
_AT = "alwayson_scripts.ControlNet.args[0]"


@pytest.mark.parametrize(
    ("unit", "status", "message"),
    [
        ({"module": "canny"}, 400, f"{_AT}.module must be 'none' on this server, got 'canny'"),
        ({"model": "None"}, 404, f"{_AT}.model must be one of edges, depth, got 'None'"),
        ({"control_mode": 1}, 400, f"{_AT}.control_mode must be 'Balanced' or 'ControlNet is more important'"),
        ({"control_mode": True}, 400, f"{_AT}.control_mode must be one of Balanced, My prompt"),
        ({"resize_mode": 3}, 400, f"{_AT}.resize_mode must be one of Just Resize, Crop and Resize, Resize and Fill"),
        ({"mask": _sent(hint())}, 400, f"{_AT}.mask must be None on this server"),
        ({"hr_option": "High res only"}, 400, f"{_AT}.hr_option must be 'Both'"),
        ({"weight": "much"}, 400, f"{_AT}.weight must be a finite number"),
        ({"guidance_end": 1.5}, 400, f"{_AT}.guidance_end must be a finite number from 0 to 1, got 1.5"),
        ({"image": ""}, 400, f"{_AT}.image must be a picture in base64"),
        ({"image": {"image": "x"}}, 400, f"{_AT}.image must be one picture in base64"),
        ({"enabled": 1}, 400, f"{_AT}.enabled must be True or False, got 1"),
        ({"colour": 1}, 400, f"{_AT} has no 'colour' on this server, got 1"),
    ],
)
def test_a1111_units_that_cannot_be_honoured(
    http: httpx.Client, unit: dict[str, Any], status: int, message: str
) -> None:
    body = {"prompt": PROMPT, "steps": 3, "alwayson_scripts": {"ControlNet": {"args": [_UNIT | unit]}}}
    answer = http.post("/sdapi/v1/txt2img", json=body)
    assert (answer.status_code, message in answer.json()["detail"]) == (status, True), answer.text


def test_a1111_scripts_that_are_no_units(http: httpx.Client) -> None:
    for scripts, message in (
        ({"controlnet": {"args": "edges"}}, "alwayson_scripts.controlnet.args must be a list of units, got 'edges'"),
        ({"controlnet": {"args": [False]}}, "alwayson_scripts.controlnet.args[0] must be a unit, an object, got False"),
        ({"ADetailer": {"args": [True]}}, "alwayson_scripts must be controlnet alone on this server, got ADetailer"),
    ):
        answer = http.post("/sdapi/v1/txt2img", json={"prompt": PROMPT, "steps": 3, "alwayson_scripts": scripts})
        assert (answer.status_code, message in answer.json()["detail"]) == (400, True), answer.text
    for empty in ([], {"args": []}, {"args": [{"enabled": False, "module": "canny"}]}):
        body = {"prompt": PROMPT, "steps": 1, "alwayson_scripts": {"controlnet": empty}}
        assert http.post("/sdapi/v1/txt2img", json=body).status_code == 200


# -- the command


def test_the_command_loads_networks(
    small_folder: Path, files: NetFiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[Nets] = []
    monkeypatch.setattr(run, "serve", lambda _sd, _options, _tokens, _fleet, nets: served.append(nets))
    command = ["serve", "--model", str(small_folder), "--control", f"mine={files.controls['edges']}"]
    command += ["--image-prompt-adapter", f"style={files.adapters['plus'][0]}"]
    assert main(command) == 0
    assert (list(served[0].controls), list(served[0].adapters)) == (["mine"], ["style"])
    assert served[0].files.adapters["style"] == files.adapters["plus"], "the encoder beside it"
    assert main([*command, "--control", "other=/nowhere"]) == 1
    assert "/nowhere" in capsys.readouterr().err
    assert len(served) == 1


# -- hints


def test_a_hint_is_stretched_cropped_or_filled() -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4], pixels[:, 4:] = (10, 20, 30), (90, 80, 70)
    pixels[1:3, 1:7] = 255  # within the edges
    one = Image.fromarray(pixels)
    for mode in (STRETCH, CROP, FILL):
        assert np.array_equal(fitted(one, mode, (8, 4)), pixels), "it is there already"
        assert fitted(one, mode, (5, 7)).size == (5, 7)
    assert np.array_equal(fitted(one, STRETCH, (3, 4)), one.resize((3, 4), Image.Resampling.LANCZOS))
    assert np.array_equal(fitted(one, CROP, (3, 4)), pixels[:, 2:5])
    larger = hint(1, 12, 30).resize((48, 19), Image.Resampling.LANCZOS)  # 1.6 times as large
    assert _differ(fitted(hint(1, 12, 30), CROP, (21, 19)), larger.crop((13, 0, 34, 19))) <= 1
    assert fitted(Image.new("RGB", (1, 1_000_000)), CROP, (512, 512)).size == (512, 512), "half a billion pixels in all"
    wide = np.asarray(fitted(one, FILL, (8, 7)))
    assert np.array_equal(wide[1:5], pixels)
    assert (wide[[0, 5, 6]] == np.median([(10, 20, 30), (90, 80, 70)], axis=0)).all()
    tall = np.asarray(fitted(one, FILL, (13, 4)))
    assert np.array_equal(tall[:, 2:10], pixels)
