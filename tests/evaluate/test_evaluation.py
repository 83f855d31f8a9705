"""An evaluation from end to end: a random model, a data set in DreamBench's layout, tiny CLIP and ViT models."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from engine.cli import main
from engine.evaluate import evaluation, ray_sums, report, sums
from engine.evaluate.dreambench import fill, read_dataset
from engine.evaluate.encoders import CLIP, DINO, Tinyworld
from engine.evaluate.evaluation import PROTOCOLS, match
from engine.methods.concept import Change
from engine.methods.infusion import residual_widths
from engine.serve import ray_bulk

_TEXT = """Classes

subject_name,class
my_cat,cat
red-boat,boat
nothing,mug

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on the beach'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a {0} {1} wearing a hat'.format(unique_token, class_token),
'a wet {0} {1}'.format(unique_token, class_token)
]
"""


def _picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dreambench")
    (folder / "prompts_and_classes.txt").write_text(_TEXT)
    for name in ("my_cat", "red-boat"):
        (folder / name).mkdir()
        for i in range(3):
            _picture(i).save(folder / name / f"{i:02d}.jpg")
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=12)
    CLIPModel(config).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "clip"
    )
    for file in (Path(engine.__file__).parent / "assets" / "clip").iterdir():
        shutil.copy(file, folder / "clip")
    ViTModel(ViTConfig(**sizes, image_size=28, patch_size=14)).save_pretrained(folder / "dino")
    return folder / "clip", folder / "dino"


@pytest.fixture(scope="module")
def concepts(small: engine.Engine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("concepts")
    generator = torch.Generator().manual_seed(0)
    residuals = {name: torch.randn(n, generator=generator) for name, n in residual_widths(small.unet, "text").items()}
    engine.Concept("cat", residuals, base=small.fingerprint).save(folder / "my_cat.safetensors")
    name, weight = next((n, p.weight) for n, p in small.unet.text_projections.items())
    change = Change(0.1 * torch.randn(weight.shape, generator=generator))
    tokens = torch.randn(2, small.text_encoder.width, generator=generator)
    boat = engine.Concept("boat", base=small.fingerprint, tokens=tokens, changes={name: change})
    boat.save(folder / "boat.safetensors")
    return folder / "my_cat.safetensors", folder / "boat.safetensors"


def _run(small_folder: Path, dataset: Path, concept: Path, out: Path, *more: str) -> int:
    shared = ["--model", str(small_folder), "--dataset", str(dataset), "--concept", str(concept), "--out", str(out)]
    return main(["evaluate", *shared, "--steps", "2", "--images-per-prompt", "2", "--prompts", "2", "--quiet", *more])


def test_infusion_from_files_to_a_page(
    small_folder: Path, dataset: Path, encoders: tuple[Path, Path], concepts: tuple[Path, Path], tmp_path: Path
) -> None:
    clip, dino = map(str, encoders)
    options = ("--clip", clip, "--dino", dino, "--strength", "0", "--strength", "1")
    assert _run(small_folder, dataset, concepts[0], tmp_path, *options) == 0
    result = json.loads((tmp_path / "report.json").read_text())
    off, on = result["records"]
    assert result["settings"]["clip"] == "clip"
    assert result["settings"]["loras"] == []
    assert (off["strength"], on["strength"], on["noun"], on["method"]) == (0, 1, "cat", "infusion")
    assert off["clip_t"] == off["base_clip_t"] != on["clip_t"]  # strength 0 is the base to the pixel
    assert off["wasserstein"]["w2"] == pytest.approx(off["wasserstein"]["floor_w2"], rel=1e-3)
    assert on["fisher"]["total"]["mean"] > 0 == on["fisher"]["foundation"]
    assert on["bytes"] == concepts[0].stat().st_size
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img src='grid-my_cat-infusion-") == 2
    with Image.open(tmp_path / "grid-my_cat-infusion-1.png") as grid:
        assert grid.width > grid.height > 0
    if (chromium := shutil.which("chromium")) is not None:
        shot = tmp_path / "shot.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={shot}", "--window-size=1100,3000"]
        subprocess.run([chromium, *flags, (tmp_path / "index.html").as_uri()], check=True, capture_output=True)
        with Image.open(shot) as rendered:  # text, curves and both grids, none of them broken or empty
            assert len(rendered.convert("RGB").getcolors(2**24)) > 10_000
    drawn = {path.stat().st_mtime_ns for path in (tmp_path / "pictures").glob("*.png")}
    assert len(drawn) == 4 * 4
    assert _run(small_folder, dataset, concepts[0], tmp_path, *options) == 0
    assert {path.stat().st_mtime_ns for path in (tmp_path / "pictures").glob("*.png")} == drawn


def test_each_concept_has_its_own_divergence(
    small_folder: Path, dataset: Path, concepts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strong = tmp_path / "strong.safetensors"
    concept = engine.Concept.load(concepts[0])
    replace(concept, residuals={name: 3 * one for name, one in concept.residuals.items()}).save(strong)
    loads, names = [], ("--concept", str(strong), "--subject", "my_cat", "--subject", "my_cat")
    monkeypatch.setattr(sums, "load", lambda **more: loads.append(more) or engine.load(**more))
    assert _run(small_folder, dataset, concepts[0], tmp_path / "both", *names) == 0
    weak, both = (record["fisher"] for record in json.loads((tmp_path / "both" / "report.json").read_text())["records"])
    assert both["total"]["mean"] > 2 * weak["total"]["mean"] > 0
    assert len(loads) == 1
    assert _run(small_folder, dataset, concepts[0], tmp_path / "one") == 0
    assert json.loads((tmp_path / "one" / "report.json").read_text())["records"][0]["fisher"] == weak


def test_on_ray_actors_draw_and_take_the_sums(
    small_folder: Path, dataset: Path, concepts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **more: seen.update(more) or {})
    monkeypatch.setattr(evaluation, "write_record", lambda *_: tmp_path)
    monkeypatch.setattr(report, "write_report", lambda *_: tmp_path)
    assert _run(small_folder, dataset, concepts[0], tmp_path, "--ray", "--actors", "3", "--actor-threads", "2") == 0
    for name, function in (("paint", ray_bulk.paint), ("compute", ray_sums.compute)):
        assert seen[name].func is function
        assert seen[name].keywords == {"actors": 3, "threads": 2}
    assert _run(small_folder, dataset, concepts[0], tmp_path) == 0
    assert seen["paint"] is None


def test_prompts_name_the_concept_and_measures_leave_its_name_out(
    small_folder: Path, dataset: Path, concepts: tuple[Path, Path], tmp_path: Path
) -> None:
    options = ("--subject", "red-boat", "--protocol", "dci")
    assert _run(small_folder, dataset, concepts[1], tmp_path, *options) == 0
    (record,) = json.loads((tmp_path / "report.json").read_text())["records"]
    assert (record["method"], record["fisher"]["of"]) == ("dci", "keys and values")
    settings = [json.loads(Image.open(path).text["twinstream"]) for path in (tmp_path / "pictures").glob("*.png")]
    prompts = {one["prompt"] for one in settings if one["customization"]}
    assert prompts == {"a V* boat on the beach", "a red V* boat"}
    assert {one["prompt"] for one in settings} - prompts == {"a boat on the beach", "a red boat"}


def test_what_cannot_be_evaluated_is_refused(
    small_folder: Path, dataset: Path, concepts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, words in (
        (("--protocol", "mine"), "protocol must be one of"),
        (("--subject", "dog"), "must be one of the data set's (my_cat, red-boat)"),
        (("--prompts", "4"), "at most the 3 of 'my_cat'"),
        (("--clip", str(dataset)), "must be a model of transformers"),
        (("--actors", "2"), "give --ray too"),
    ):
        assert _run(small_folder, dataset, concepts[0], tmp_path, *options) == 1
        assert words in capsys.readouterr().err
    assert _run(small_folder, tmp_path, concepts[0], tmp_path / "out") == 1
    assert "DreamBench's layout" in capsys.readouterr().err


def test_dataset(dataset: Path) -> None:
    subjects = read_dataset(dataset)
    assert list(subjects) == ["my_cat", "red-boat"]  # a subject without pictures is not there
    assert subjects["my_cat"].noun == "cat"
    assert [path.name for path in subjects["my_cat"].pictures] == ["00.jpg", "01.jpg", "02.jpg"]
    assert subjects["my_cat"].prompts[0] == "a {0} {1} in the snow"  # a live subject's
    assert len(subjects["red-boat"].prompts) == 2
    assert fill("a {0} {1} on the beach", "", "cat") == "a cat on the beach"
    assert fill("a {0} {1}", "V*", "cat") == "a V* cat"


def test_files_and_names_go_together(dataset: Path, concepts: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="one per concept"):
        match(concepts, read_dataset(dataset), ["my_cat"])
    assert [one.word for one in match(concepts, read_dataset(dataset), ["my_cat", "red-boat"])] == ["", "V*"]


def test_clip_embeds_as_transformers_whole_model_does(encoders: tuple[Path, Path]) -> None:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    clip = CLIP(encoders[0])
    images, texts = [_picture(7), _picture(8)], ["a red cat", "a boat on the beach with a tree"]
    model = CLIPModel.from_pretrained(encoders[0])
    tokens = CLIPTokenizer.from_pretrained(encoders[0])(texts, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(encoders[0])(images, return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens, **pixels).logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(clip.pictures(images) @ clip.texts(texts).T, expected, rtol=1e-4, atol=1e-5)
    many = clip.pictures([_picture(i) for i in range(20)])
    torch.testing.assert_close(many[17], clip.pictures([_picture(17)])[0])
    with pytest.raises(ValueError, match="at least one"):
        clip.pictures([])


def test_dino_sees_the_middle_after_resizing(encoders: tuple[Path, Path]) -> None:
    dino = DINO(encoders[1])
    assert dino.side == 28
    wide = _picture(3, (64, 32))  # its shorter side becomes 32, and the middle 28 x 28 is seen
    wide.putpixel((0, 0), (255, 0, 0))
    other = wide.copy()
    other.paste((0, 255, 0), (0, 0, 14, 32))
    assert torch.equal(dino.pictures([wide]), dino.pictures([other]))
    assert not torch.equal(dino.pictures([wide]), dino.pictures([wide.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]))
    pixels = dino._pixels(Image.new("RGB", (50, 40), (255, 0, 128)))
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225]
    assert pixels[:, 0, 0].tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="dino must be a ViT"):
        DINO(encoders[0])
    with pytest.raises(ValueError, match="clip must be a CLIP"):
        CLIP(encoders[1])


def test_the_embedded_encoder_finds_a_pictures_own_prompt(small: engine.Engine) -> None:  # noqa: ARG001
    prompts = ["a photo of a red cat on a beach", "a photo of a blue car in the snow"]
    images = engine.generate(prompts, seed=[0, 1], steps=12, progress=False).images
    encoder = Tinyworld()
    similarity = encoder.pictures(images) @ encoder.texts(prompts).T
    assert (similarity.diagonal() > similarity.flip(0).diagonal()).all()


def test_protocols_are_the_papers() -> None:
    infusion, dci = PROTOCOLS["infusion"], PROTOCOLS["dci"]
    assert (infusion.n_prompts, infusion.n_images, infusion.dci) == (20, 50, False)
    assert (dci.n_prompts, dci.n_images, dci.dci) == (25, 4, True)
    assert infusion.drawing == dci.drawing == {"sampler": "ddim", "steps": 50, "guidance_scale": 8.0}
