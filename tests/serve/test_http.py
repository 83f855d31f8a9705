"""The server as its clients see it: the openai package, webuiapi, plain HTTP."""

import base64
import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
import webuiapi
from PIL import Image

import engine
from engine.serve.http.guard import LOG
from engine.serve.http.run import check_address, read_tokens
from engine.serve.http.service import Limits
from tests.parity.test_ico import _concept as ico_concept
from tests.pipelines import random_concept
from tests.serve.http_server import Running, pixels_of, running

TOKEN = "a-token-of-thirty-two-characters"
PROMPT, QUICK = "a photo of a cat", {"steps": 3, "seed": 1}


@pytest.fixture(scope="module")
def server(small: engine.Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "shipped").mkdir()
    random_concept(small).save(folder / "shipped" / "kitty.safetensors")
    with running(small, folder) as one:
        yield one


def _events(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block.split("\n") for block in response.text.split("\n\n") if block]
    return [(block[0].removeprefix("event: "), json.loads(block[1].removeprefix("data: "))) for block in blocks]


def _wait(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- our own interface


def test_generate_draws_what_the_engine_draws(small: engine.Engine, http: httpx.Client, server: Running) -> None:
    body = {"prompt": PROMPT, "concepts": ["kitty"], "concept_strength": 0.5, "images_per_prompt": 2, **QUICK}
    answer = http.post("/v1/generate", json=body).json()
    concept = server.service.shelf.load("kitty")
    out = small.generate(
        PROMPT,
        customization=engine.Infusion([concept], strength=0.5),
        images_per_prompt=2,
        progress=False,
        **QUICK,
    )
    assert out.foundation_images is not None
    for i in range(2):
        assert abs(pixels_of(answer["images"][i]).astype(int) - np.asarray(out.images[i])).max() <= 1
        assert (
            abs(pixels_of(answer["foundation_images"][i]).astype(int) - np.asarray(out.foundation_images[i])).max() <= 1
        )
    assert answer["seeds"] == [1, 2]
    assert answer["settings"] == json.loads(json.dumps(out.settings))
    assert "queue" in answer["timings"]
    with Image.open(io.BytesIO(base64.b64decode(answer["images"][1]))) as picture:
        assert json.loads(picture.info["twinstream"])["seed"] == 2  # type: ignore[attr-defined]


def test_starting_from_a_picture(small: engine.Engine, http: httpx.Client) -> None:
    side = small.limits.sample_size * small.limits.factor
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    expected = small.generate(PROMPT, image=pixels, strength=0.7, progress=False, **QUICK).images[0]
    for image in (text, f"data:image/png;base64,{text}", [text]):
        answer = http.post("/v1/generate", json={"prompt": PROMPT, "image": image, "strength": 0.7, **QUICK})
        assert abs(pixels_of(answer.json()["images"][0]).astype(int) - np.asarray(expected)).max() <= 1


def test_a_stream_tells_how_far_it_is(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "mode": "stream", "previews": 2, "steps": 6, "seed": 0, "format": "webp"}
    answer = http.post("/v1/generate", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = _events(answer)
    assert {name for name, _ in events[:-1]} == {"progress"}
    steps = [data["step"] for _, data in events[:-1]]
    assert steps == sorted(steps)
    previews = [data["preview"] for _, data in events[:-1] if "preview" in data]
    assert 1 <= len(previews) <= 2
    name, result = events[-1]
    assert name == "result"
    assert Image.open(io.BytesIO(base64.b64decode(result["images"][0]))).format == "WEBP"


def test_jobs(http: httpx.Client) -> None:
    answer = http.post("/v1/generate", json={"prompt": PROMPT, "mode": "job", "request_id": "mine", **QUICK})
    assert answer.status_code == 202
    assert answer.headers["location"] == "/v1/jobs/mine"
    _wait(lambda: http.get("/v1/jobs/mine").json()["status"] == "done")
    found = http.get("/v1/jobs/mine").json()
    assert (found["step"], found["total"], found["position"]) == (3, 3, None)
    assert len(found["result"]["images"]) == 1
    assert [name for name, _ in _events(http.get("/v1/jobs/mine/events"))] == ["progress", "result"]
    assert http.get("/v1/jobs/other").status_code == 404

    slow = {"prompt": PROMPT, "mode": "job", "request_id": "slow", "steps": 200, "seed": 1}
    http.post("/v1/generate", json=slow)
    assert http.get("/v1/jobs/slow").json()["status"] in ("waiting", "drawing")
    assert http.delete("/v1/jobs/slow").json()["status"] == "cancelled"
    assert http.get("/v1/jobs/slow").json()["error"]["code"] == "cancelled"
    assert http.delete("/v1/jobs/mine").json()["status"] == "done", "what is done stays as it is"


def test_the_same_request_id_draws_once(http: httpx.Client, server: Running) -> None:
    body = {"prompt": PROMPT, "request_id": "twice", **QUICK}
    before = server.service.scheduler.counts["done"]
    first, second = (http.post("/v1/generate", json=body).json() for _ in range(2))
    assert first == second
    assert server.service.scheduler.counts["done"] == before + 1
    other = http.post("/v1/generate", json=body | {"steps": 2})
    assert other.status_code == 400
    assert "request_id must be another" in other.json()["detail"]


@pytest.mark.parametrize("mode", ["wait", "stream"])
def test_a_client_that_goes_away_cancels(server: Running, mode: str) -> None:
    counts = server.service.scheduler.counts
    before = counts["cancelled"]
    body = {"prompt": PROMPT, "mode": mode, "steps": 200, "images_per_prompt": 4}
    with httpx.Client(base_url=server.url, timeout=0.4) as client:
        if mode == "stream":
            with client.stream("POST", "/v1/generate", json=body) as answer:
                next(answer.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/generate", json=body)
    _wait(lambda: counts["cancelled"] == before + 1)
    assert server.service.scheduler.drawing == 0


def test_concepts_are_put_listed_used_and_deleted(small: engine.Engine, http: httpx.Client, tmp_path: Path) -> None:
    ico_concept(small).save(tmp_path / "one.safetensors")
    data = (tmp_path / "one.safetensors").read_bytes()
    made = http.put("/v1/concepts/my-cat", content=data)
    assert made.status_code == 201
    facts = {"name": "my-cat", "noun": "cat", "method": "ico", "placeholder": "V*", "bytes": len(data)}
    assert made.json() == facts | {"can_be_deleted": True}
    assert [one["name"] for one in http.get("/v1/concepts").json()["concepts"]] == ["kitty", "my-cat"]
    assert http.get("/v1/concepts/my-cat").content == data
    drawn = http.post("/v1/generate", json={"prompt": "a V* cat", "concepts": ["my-cat"], **QUICK})
    assert drawn.json()["settings"]["customizations"][0]["method"] == "ico"
    assert http.delete("/v1/concepts/my-cat").status_code == 204
    assert http.get("/v1/concepts/my-cat").status_code == 404
    for name, content, message in (
        ("kitty", data, "must not be that of a concept that came with the server"),
        ("a.b", data, "must be 1 to 64 letters"),
        ("x", b"PK\x03\x04" + bytes(100), "zip or pickle"),
        ("x", bytes(1_000_001), "at most 1000000 bytes"),
        ("x", data[:500], ""),
    ):
        answer = http.put(f"/v1/concepts/{name}", content=content)
        assert answer.status_code == 400
        assert message in answer.json()["detail"]
    assert http.delete("/v1/concepts/kitty").status_code == 400
    assert http.get("/v1/concepts/..%2f..%2fetc").status_code in (400, 404)
    wide = engine.Concept("cat", {name: torch.randn(7) for name in small.unet.cross_attentions})
    wide.save(tmp_path / "wide.safetensors")
    assert http.put("/v1/concepts/x", content=(tmp_path / "wide.safetensors").read_bytes()).status_code == 400
    assert [one["name"] for one in http.get("/v1/concepts").json()["concepts"]] == ["kitty"], "nothing was left"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": PROMPT, "steps": 0}, 400, "steps must be an integer >= 1, got 0"),
        ({"prompt": PROMPT, "steps": 201}, 400, "steps must be at most 200 on this server, got 201"),
        ({"prompt": PROMPT, "images_per_prompt": 11}, 400, "images of a request must be at most 10"),
        ({"prompt": [PROMPT] * 11}, 400, "images of a request must be at most 10"),
        ({"prompt": PROMPT, "height": 2048, "width": 2048}, 400, "pixels of a picture must be at most"),
        ({"prompt": PROMPT, "stepz": 3}, 400, "stepz: Extra inputs are not permitted"),
        ({"prompt": PROMPT, "concepts": ["nobody"]}, 404, "concept must be one of kitty, got 'nobody'"),
        ({"prompt": PROMPT, "concepts": ["../kitty"]}, 400, "letters, digits"),
        ({"prompt": PROMPT, "image": "http://example.com/a.png"}, 400, "image must be a picture in base64"),
        ({"prompt": PROMPT, "image": base64.b64encode(b"no picture").decode()}, 400, "image must be a PNG, JPEG"),
        ({"prompt": PROMPT, "dci": "dog"}, 400, "dog"),
        ({"prompt": PROMPT, "deadline": 0.0}, 503, "deadline must leave the time"),
        ({"steps": 3}, 400, "prompt: Field required"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(
    http: httpx.Client, body: dict[str, Any], status: int, message: str
) -> None:
    answer = http.post("/v1/generate", json=body)
    assert (answer.status_code, answer.json()["error"]["message"].count(message)) == (status, 1)


def test_a_bomb_of_a_picture_is_not_unpacked(http: httpx.Client) -> None:
    buffer = io.BytesIO()
    Image.new("L", (5000, 5000)).save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    answer = http.post("/v1/generate", json={"prompt": PROMPT, "image": text, **QUICK})
    assert answer.status_code == 400
    assert "image must have at most 16777216 pixels" in answer.json()["detail"]


# -- OpenAI's


@pytest.fixture
def openai_client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openai_pictures(small: engine.Engine, openai_client: openai.OpenAI) -> None:
    answer = openai_client.images.generate(
        prompt=PROMPT, n=2, size="24x16", response_format="b64_json", extra_body=QUICK | {"sampler": "euler"}
    )
    out = small.generate(PROMPT, images_per_prompt=2, width=24, height=16, sampler="euler", progress=False, **QUICK)
    assert answer.data is not None
    for one, theirs in zip(answer.data, out.images, strict=True):
        assert abs(pixels_of(one.b64_json or "").astype(int) - np.asarray(theirs)).max() <= 1
    linked = openai_client.images.generate(prompt=PROMPT, response_format="url", extra_body=QUICK)
    assert linked.data is not None
    assert Image.open(io.BytesIO(httpx.get(linked.data[0].url or "").content)).format == "PNG"


def test_openai_streams_partial_pictures(openai_client: openai.OpenAI) -> None:
    stream = openai_client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"steps": 30})
    events = list(stream)
    assert [one.type for one in events][-1] == "image_generation.completed"
    partial = [one for one in events if one.type == "image_generation.partial_image"]
    assert [one.partial_image_index for one in partial] == list(range(len(partial)))
    assert 1 <= len(partial) <= 2


def test_openai_edits_and_models(openai_client: openai.OpenAI) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "blue").save(buffer, "PNG")
    picture = ("a.png", buffer.getvalue(), "image/png")
    answer = openai_client.images.edit(image=picture, prompt=PROMPT, n=2, extra_body=QUICK | {"strength": 0.7})
    assert answer.data is not None
    assert len(answer.data) == 2
    with pytest.raises(openai.BadRequestError, match="mask must have transparent pixels"):
        openai_client.images.edit(image=picture, mask=picture, prompt=PROMPT)
    (model,) = openai_client.models.list().data
    assert openai_client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError, match="model must be"):
        openai_client.images.generate(prompt=PROMPT, model="dall-e-3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": "hd"}, "quality must be None or 'auto' or 'standard' on this model, got 'hd'"),
        ({"size": "big"}, 'size must be "auto" or width x height'),
        ({"extra_body": {"stepz": 3}}, "there is no field 'stepz'"),
        ({"n": 2, "stream": True}, "n must be 1 where stream is true, got 2"),
        ({"n": 11}, "images of a request must be at most 10"),
    ],
)
def test_openai_errors(openai_client: openai.OpenAI, options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        openai_client.images.generate(prompt=PROMPT, **options)
    assert caught.value.type == "invalid_request_error"


# -- A1111's


@pytest.fixture
def webui(server: Running) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1", steps=3)


def test_a1111_pictures(small: engine.Engine, webui: webuiapi.WebUIApi) -> None:
    sizes = {"width": 16, "height": 16}
    ours = webui.txt2img(prompt=PROMPT, negative_prompt="blue", seed=1, batch_size=2, n_iter=2, cfg_scale=5.0, **sizes)
    theirs = small.generate(
        PROMPT, negative_prompt="blue", images_per_prompt=4, guidance_scale=5.0, sampler="euler_ancestral",
        progress=False, **QUICK, **sizes,
    )  # fmt: skip
    assert len(ours.images) == 4
    for one, other in zip(ours.images, theirs.images, strict=True):
        assert abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
    assert ours.info["all_seeds"] == [1, 2, 3, 4]
    again = webui.img2img(
        images=[ours.images[0]], prompt=PROMPT, seed=1, denoising_strength=0.7, sampler_name="DDIM", eta=0.0, **sizes
    )
    expected = small.generate(
        PROMPT, image=ours.images[0], strength=0.7, guidance_scale=7.0, progress=False, **QUICK, **sizes
    )
    assert abs(np.asarray(again.image).astype(int) - np.asarray(expected.images[0])).max() <= 1


def test_a1111_clip_skip(small: engine.Engine, webui: webuiapi.WebUIApi) -> None:
    options = {"prompt": PROMPT, "seed": 1, "cfg_scale": 5.0, "width": 16, "height": 16}
    ours = webui.txt2img(**options, override_settings={"CLIP_stop_at_last_layers": 2})
    expected = small.generate(
        PROMPT,
        seed=1,
        guidance_scale=5.0,
        width=16,
        height=16,
        steps=3,
        sampler="euler_ancestral",
        clip_skip=1,
        progress=False,
    )
    assert abs(np.asarray(ours.image).astype(int) - np.asarray(expected.images[0])).max() <= 1
    assert "Clip skip: 2" in ours.info["infotexts"][0]


def test_a1111_lists_and_options(webui: webuiapi.WebUIApi) -> None:
    assert "DPM++ 2M Karras" in [one["name"] for one in webui.get_samplers()]
    (model,) = webui.get_sd_models()
    assert webui.util_get_current_model() == model["title"]
    assert webui.get_loras() == []
    assert webui.get_progress()["progress"] == 0.0
    assert webui.set_options({"sd_model_checkpoint": model["title"]}) == {}
    assert "sd_model_checkpoint must be" in webui.set_options({"sd_model_checkpoint": "other"})["detail"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_hr": True}, "enable_hr must be False on this server, got True"),
        ({"subseed_strength": 1.5}, "variation_strength must be a finite number from 0 to 1, got 1.5"),
        ({"styles": ["anime"]}, "styles must be"),
        ({"sampler_name": "DPM fast"}, "sampler_name must be one of DDIM, PLMS"),
        ({"scheduler": "Turbo"}, "scheduler must be one of Automatic, Karras"),
        ({"eta": 0.5}, "eta must be 1 for Euler a"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 0}}, "CLIP_stop_at_last_layers must be an integer >= 1"),
        (
            {"override_settings": {"CLIP_stop_at_last_layers": 3}},
            r"clip_skip must leave one of the text encoder.*s 2 layers, got 2",
        ),
        (
            {"alwayson_scripts": {"ADetailer": {"args": [{"enabled": True}]}}},
            "must be controlnet alone .*got ADetailer",
        ),
    ],
)
def test_a1111_refuses_what_it_cannot_do(webui: webuiapi.WebUIApi, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        webui.txt2img(prompt=PROMPT, width=16, height=16, **options)


def test_a1111_interrupt(server: Running, webui: webuiapi.WebUIApi) -> None:
    errors: list[BaseException] = []

    def draw() -> None:
        try:
            webui.txt2img(prompt=PROMPT, steps=200, width=16, height=16)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    _wait(lambda: httpx.get(f"{server.url}/sdapi/v1/progress").json()["progress"] > 0)
    seen = httpx.get(f"{server.url}/sdapi/v1/progress").json()
    assert seen["current_image"]
    webui.interrupt()
    thread.join(20)
    assert "cancelled" in str(errors[0])


# -- what every request passes


def test_tokens(small: engine.Engine, tmp_path: Path) -> None:
    with running(small, tmp_path, tokens=[TOKEN, TOKEN[::-1]]) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/health").status_code == client.get("/").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            for path in ("/v1/about", "/metrics", "/openapi.json", "/sdapi/v1/options", "/nowhere"):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
        for token in (TOKEN, TOKEN[::-1]):
            assert client.get("/v1/about", headers={"Authorization": f"Bearer {token}"}).status_code == 200
        ours = openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0)
        linked = ours.images.generate(prompt=PROMPT, response_format="url", extra_body=QUICK).data
        assert linked is not None
        assert client.get(linked[0].url or "").status_code == 200, "an address that nobody can guess needs none"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0).models.list()


def test_large_bodies_full_queues_and_old_results(small: engine.Engine, tmp_path: Path) -> None:
    limits = Limits(body_bytes=10_000, keep_seconds=0.2)
    with running(small, tmp_path, limits=limits, max_waiting=1) as server, httpx.Client(base_url=server.url) as client:
        assert client.post("/v1/generate", content=bytes(10_001)).status_code == 413
        chunks = (bytes(1000) for _ in range(11))
        assert client.post("/v1/generate", content=chunks).status_code == 413, "without a length in its head"

        def job(name: str, steps: int = 200) -> httpx.Response:
            body = {"prompt": PROMPT, "mode": "job", "images_per_prompt": 4, "request_id": name, "steps": steps}
            return client.post("/v1/generate", json=body)

        assert job("a").status_code == 202
        _wait(lambda: server.service.scheduler.waiting == 0)
        assert job("b").status_code == 202
        full = job("c")
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "queue_full"
        for name in "ab":
            client.delete(f"/v1/jobs/{name}")
        assert client.get("/v1/jobs/a").status_code == 200
        time.sleep(0.3)
        assert client.get("/v1/jobs/a").status_code == 404


def test_stopping_finishes_what_runs_and_takes_nothing_new(small: engine.Engine, tmp_path: Path) -> None:
    with running(small, tmp_path) as server:
        body = {"prompt": PROMPT, "mode": "job", "request_id": "last", "steps": 40, "seed": 0}
        httpx.post(f"{server.url}/v1/generate", json=body)
        entry = server.service.book.find("last")
    assert entry.status == "done"
    assert not server.service.scheduler.is_open
    with running(small, tmp_path, grace_seconds=0.1) as server:
        httpx.post(f"{server.url}/v1/generate", json=body | {"steps": 200, "images_per_prompt": 8})
        entry = server.service.book.find("last")
    assert entry.status == "cancelled"


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_has_prompts_only_if_asked_for(
    small: engine.Engine, tmp_path: Path, log_prompts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with running(small, tmp_path, log_prompts=log_prompts) as server, caplog.at_level(logging.INFO, LOG.name):
        httpx.post(f"{server.url}/v1/generate", json={"prompt": "a secret cat", **QUICK}, timeout=60)
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == LOG.name]
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/generate", 200)
    assert line["ms"] > 0
    assert ("a secret cat" in json.dumps(line)) == log_prompts


def test_measures(http: httpx.Client) -> None:
    http.post("/v1/generate", json={"prompt": PROMPT, **QUICK})
    text = http.get("/metrics").text
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}
    assert values['twinstream_requests_total{outcome="done"}'] >= 1
    assert values["twinstream_rows_total"] >= 2 * 3
    assert values["twinstream_step_seconds_total"] > 0
    assert values["twinstream_waiting"] == values["twinstream_drawing"] == 0
    assert values['twinstream_http_total{path="/v1/generate",status="200"}'] >= 1


def test_headers_that_browsers_heed(http: httpx.Client) -> None:
    headers = http.get("/").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


def test_addresses_and_tokens_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        check_address(host, [])
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.com"):
        check_address(host, [TOKEN])
        with pytest.raises(ValueError, match=f"needs a token .*, got '{host}' without"):
            check_address(host, [])
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    monkeypatch.setenv("TWINSTREAM_TOKEN", TOKEN[::-1])
    assert read_tokens(tmp_path / "tokens") == [TOKEN[::-1], TOKEN]
    monkeypatch.setenv("TWINSTREAM_TOKEN", "short")
    with pytest.raises(ValueError, match="at least 16 characters"):
        read_tokens(None)
    with pytest.raises(ValueError, match="token file must be readable"):
        read_tokens(tmp_path / "none")
