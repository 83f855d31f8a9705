"""Networks by name: loaded once, found or told, and on their way to other processes."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine
from engine.methods.asked_pictures import AskedControl, AskedImagePrompt, NetFiles
from engine.serve.nets import Nets
from tests.controlnets import hint, listen, random_controlnet
from tests.ip_adapters import load_adapter, picture


@pytest.fixture(scope="module")
def files(small: engine.Engine, small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> NetFiles:
    folder = tmp_path_factory.mktemp("nets")
    random_controlnet(small, folder / "edges", small_folder)
    listen(folder / "edges")
    for kind in ("plain", "plus"):
        load_adapter(small, folder, kind)
    adapters = {
        kind: (str(folder / f"{kind}-0.safetensors"), str(folder / "image_encoder")) for kind in ("plain", "plus")
    }
    return NetFiles({"mine": str(folder / "edges")}, adapters)


@pytest.fixture(scope="module")
def nets(small: engine.Engine, files: NetFiles) -> Nets:
    return Nets(small, files)


def test_adapters_share_their_encoder(nets: Nets) -> None:
    assert nets.adapters["plain"].encoder is nets.adapters["plus"].encoder
    assert nets.adapters["plain"].weights is not nets.adapters["plus"].weights


def test_what_is_asked_for_is_made(nets: Nets) -> None:
    def read(name: str, text: str) -> Any:
        read_names.append((name, text))
        return hint(len(read_names))

    read_names: list[tuple[str, str]] = []
    asked = AskedControl(net="mine", image=["a", "b"], weight=0.5, start=0.1, end=0.9, guess_mode=True)
    prompt = AskedImagePrompt(adapter="plus", image="c", scale=0.3)
    made = nets.make([asked], [prompt], read)
    (control,), (like,) = made["control"], made["image_prompts"]
    assert (control.net, control.weight, control.start) == (nets.controls["mine"], 0.5, 0.1)
    assert (control.end, control.guess_mode) == (0.9, True)
    assert [one.tobytes() for one in control.image] == [hint(1).tobytes(), hint(2).tobytes()]
    assert (like.adapter, like.scale, like.image[0].tobytes()) == (nets.adapters["plus"], 0.3, hint(3).tobytes())
    assert read_names == [("control[0].image", "a"), ("control[0].image", "b"), ("image_prompts[0].image", "c")]
    assert nets.make([], [], read) == {}


def test_options_travel_without_networks(small: engine.Engine, files: NetFiles, nets: Nets) -> None:
    control = engine.Control(nets.controls["mine"], [hint(1), hint(2)], 0.7, 0.2, 0.8, guess_mode=True)
    likes = [engine.ImagePrompt(nets.adapters[kind], [picture(3), picture(4)], 0.4) for kind in ("plain", "plus")]
    options = {"control": control, "image_prompts": [likes[:1], None, likes], "steps": 3}
    data = pickle.dumps(nets.packed(options))
    weights = sum(p.numel() for p in nets.controls["mine"].parameters()) * 4
    assert len(data) < weights / 4
    other = Nets(small, files)
    found = other.unpacked(pickle.loads(data))
    assert found["control"].net is other.controls["mine"]
    assert found["control"].settings() == control.settings()
    assert [one.tobytes() for one in found["control"].image] == [hint(1).tobytes(), hint(2).tobytes()]
    assert [None if one is None else [like.adapter for like in one] for one in found["image_prompts"]] == [
        [other.adapters["plain"]], None, [other.adapters["plain"], other.adapters["plus"]]
    ]  # fmt: skip
    assert found["image_prompts"][2][1].settings() == likes[1].settings()
    assert found["steps"] == 3
    assert other.unpacked(other.packed({"control": (), "image_prompts": None})) == {
        "control": [],
        "image_prompts": None,
    }


def test_a_network_of_somebody_else_is_told(small: engine.Engine, files: NetFiles, nets: Nets) -> None:
    control = engine.Control(Nets(small, files).controls["mine"], hint())
    with pytest.raises(ValueError, match=r"net must be one that the replicas have \(mine\), got 'edges'"):
        nets.packed({"control": [control]})
    with pytest.raises(ValueError, match=r"net must be one that the replicas have \(they have none\), got 'edges'"):
        Nets(small).packed({"control": [control]})


def test_what_travelled_draws_the_same(small: engine.Engine, files: NetFiles, nets: Nets) -> None:
    options = {
        "control": [engine.Control(nets.controls["mine"], hint(1), 0.8)],
        "image_prompts": engine.ImagePrompt(nets.adapters["plain"], picture(1), 0.5),
    }
    other = Nets(small, files)
    travelled = other.unpacked(pickle.loads(pickle.dumps(nets.packed(options))))
    here, there = (
        small.generate("a cat", steps=2, seed=1, progress=False, **given).images[0] for given in (options, travelled)
    )
    assert np.array_equal(here, there)
