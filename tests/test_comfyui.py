"""The nodes of ComfyUI, called as ComfyUI calls them: by their mappings, with what their inputs say."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import engine
from tests.parity.test_ico import _concept as ico_concept
from tests.pipelines import random_concept

_FILE = Path(__file__).parent.parent / "docs" / "comfyui" / "twinstream_nodes.py"
_QUICK = {"steps": 2, "seed": 5}


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("twinstream_nodes", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    return _load()


def _run(nodes: ModuleType, name: str, **given: Any) -> tuple[Any, ...]:
    """Fill in the defaults of required inputs, check the linked ones' presence, call, and check the outputs' number."""
    node = nodes.NODE_CLASS_MAPPINGS[name]
    inputs = node.INPUT_TYPES()
    known = inputs["required"] | inputs.get("optional", {})
    assert given.keys() <= known.keys()
    for one, (kind, *facts) in inputs["required"].items():
        if one not in given:
            given[one] = kind[0] if isinstance(kind, list) else facts[0]["default"]
    out = getattr(node(), node.FUNCTION)(**given)
    assert len(out) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    return out


def test_every_node_is_complete(nodes: ModuleType) -> None:
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    assert len(nodes.NODE_CLASS_MAPPINGS) == 6
    made = {kind for node in nodes.NODE_CLASS_MAPPINGS.values() for kind in node.RETURN_TYPES}
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        assert node.CATEGORY == "Twinstream"
        assert callable(getattr(node, node.FUNCTION))
        assert all(isinstance(kind, str) for kind in node.RETURN_TYPES)
        inputs = node.INPUT_TYPES()
        for kind, *facts in (inputs["required"] | inputs.get("optional", {})).values():
            assert isinstance(kind, list) or kind in made | {"STRING", "INT", "FLOAT"}
            assert not facts or isinstance(facts[0], dict)


def test_generate(nodes: ModuleType, small_folder: Path, small: engine.Engine) -> None:
    (sd,) = _run(nodes, "TwinstreamLoadEngine", model=str(small_folder), dtype="float32")
    images, foundations = _run(nodes, "TwinstreamGenerate", engine=sd, prompt="a cat", images=2, width=24, **_QUICK)
    assert images.shape == (2, 16, 24, 3)
    assert images.dtype == torch.float32
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert torch.equal(images, foundations)
    out = small.generate("a cat", images_per_prompt=2, width=24, output="numpy", progress=False, **_QUICK)
    assert np.array_equal(images, out.images)
    start = {"image": images[:1], "strength": 0.6}
    redrawn, _ = _run(nodes, "TwinstreamGenerate", engine=sd, prompt="a dog", schedule="model's own", **_QUICK, **start)
    picture = out.images[0]
    again = small.generate("a dog", image=picture, strength=0.6, output="numpy", progress=False, **_QUICK)
    assert np.array_equal(redrawn, again.images)
    larger, _ = _run(
        nodes, "TwinstreamGenerate", engine=sd, prompt="a dog", upscale=1.5, upscale_strength=1.0, **_QUICK
    )
    assert larger.shape == (1, 24, 24, 3)


def test_customizations(nodes: ModuleType, small: engine.Engine, tmp_path: Path) -> None:
    for name, concept in (("cat", random_concept(small)), ("toy", ico_concept(small))):
        concept.save(tmp_path / f"{name}.safetensors")
    (cats,) = _run(nodes, "TwinstreamLoadConcept", file=str(tmp_path / "cat.safetensors"))
    (two,) = _run(nodes, "TwinstreamLoadConcept", file=str(tmp_path / "cat.safetensors"), concepts=cats)
    assert [concept.name for concept in two] == ["cat", "cat"]
    (toys,) = _run(nodes, "TwinstreamLoadConcept", file=str(tmp_path / "toy.safetensors"))
    placeholder = toys[0].placeholder
    (infusion,) = _run(nodes, "TwinstreamInfusion", concepts=cats, strength=0.5)
    (ico,) = _run(nodes, "TwinstreamICO", concepts=toys)
    (dci,) = _run(nodes, "TwinstreamDCI", noun="cat", auxiliary_noun="owl", fraction=0.5)
    (learned,) = _run(nodes, "TwinstreamDCI", concepts=toys, auxiliary_noun="owl", fraction=0.5)
    for custom, prompt in (
        (infusion, "a cat"),
        (ico, f"a {placeholder}"),
        (dci, "a cat"),
        (learned, f"a {placeholder}"),
    ):
        given = {"engine": small, "prompt": prompt, "customization": custom, **_QUICK}
        images, foundations = _run(nodes, "TwinstreamGenerate", **given)
        out = small.generate(prompt, customization=custom, output="numpy", progress=False, **_QUICK)
        assert np.array_equal(images, out.images)
        assert torch.equal(images, foundations) == (custom is not infusion)
    changed = nodes.LoadConcept.IS_CHANGED(str(tmp_path / "cat.safetensors"))
    assert changed != nodes.LoadConcept.IS_CHANGED(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="give a noun or ICO concepts, one of the two"):
        _run(nodes, "TwinstreamDCI", noun="cat", concepts=toys)


def test_loras(nodes: ModuleType, small_folder: Path, small: engine.Engine, tmp_path: Path) -> None:
    from tests.loras import write_kohya

    file = write_kohya(small, tmp_path / "lace.safetensors")
    (sd,) = _run(nodes, "TwinstreamLoadEngine", model=str(small_folder), loras=f"{file}\n\n{file}:-0.5\n")
    assert [lora.weight for lora in sd.loras] == [1.0, -0.5]


def test_progress_and_interruption(small: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, int]] = []
    interrupted: list[bool] = []

    class Interrupted(Exception):  # noqa: N818 (ComfyUI's has such a name)
        pass

    bar = SimpleNamespace(update_absolute=lambda value, total: moved.append((value, total)))
    management = {"InterruptProcessingException": Interrupted, "processing_interrupted": lambda: bool(interrupted)}
    for name, contents in (
        ("comfy", {}),
        ("comfy.utils", {"ProgressBar": lambda _total: bar}),
        ("comfy.model_management", management),
    ):
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    nodes = _load()
    _run(nodes, "TwinstreamGenerate", engine=small, prompt="a cat", **_QUICK)
    assert moved == [(1, 2), (2, 2)]
    interrupted.append(True)
    with pytest.raises(Interrupted):
        _run(nodes, "TwinstreamGenerate", engine=small, prompt="a cat", **_QUICK)
