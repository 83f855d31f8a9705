"""ControlNets among rows: who gets what, at which steps, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import engine
from benchmarks.systems import default_request
from engine.methods.concept_cache import Texts
from engine.models.conditioning import Batch, Conditioning, Residuals
from engine.models.config import UNetConfig
from engine.models.controlnet import ControlNetConfig, ControlNetModel
from engine.models.unet import UNet2DConditionModel
from engine.sampling import out_of_memory
from engine.sampling.control import cost_in_rows, net_residuals
from engine.sampling.hints import make_hints
from engine.sampling.plan import lay_out, make_plans
from tests.controlnets import hint, random_controlnet
from tests.naming import short
from tests.parity.test_ico import _concept as ico_concept
from tests.pipelines import SD_V1_5_UNET, random_concept

_PROMPT = "a photo of a cat"
_QUICK: dict[str, Any] = {"steps": 3, "seed": 3, "output": "latent", "progress": False}


@pytest.fixture(scope="module")
def nets(small: engine.Engine, small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[ControlNetModel]:
    folder = tmp_path_factory.mktemp("nets")
    return [random_controlnet(small, folder / str(seed), small_folder, seed) for seed in range(2)]


def _draw(sd: engine.Engine, *controls: engine.Control, prompt: str = _PROMPT, **options: Any) -> torch.Tensor:
    return sd.generate(prompt, control=list(controls), **_QUICK | options).latents


def _error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _infusion(sd: engine.Engine, **options: Any) -> engine.Infusion:
    return engine.Infusion([random_concept(sd, seed=1)], **options)


def test_plain_pictures_are_what_they_were_to_the_bit(small: engine.Engine, nets: list[ControlNetModel]) -> None:
    before = small.generate(_PROMPT, **_QUICK).latents
    controlled = _draw(small, engine.Control(nets[0], hint()))
    assert _error(controlled, before) > 1e-2
    assert torch.equal(small.generate(_PROMPT, **_QUICK).latents, before)
    assert torch.equal(_draw(small, engine.Control(nets[0], hint(), weight=0.0)), before)
    assert torch.equal(_draw(small, engine.Control(nets[0], hint())), controlled)


# for each kind, in each phase: the trajectories of the rows that a net acts upon, and of those in guess mode
_LAYOUTS: dict[str, tuple[dict[str, Any], list[list[int]], list[list[int]]]] = {
    "plain": ({}, [[0, 0]], [[0]]),
    "without guidance": ({"guidance_scale": 1.0}, [[0]], [[0]]),
    "two": ({"images_per_prompt": 2, "seed": [1, 2]}, [[0, 0, 1, 1]], [[0, 1]]),
    "parallel": ({"custom": {}}, [[0, 0, 1, 1]], [[0, 1]]),
    "parallel, own maps": ({"custom": {"unconditional_maps": "own"}}, [[0, 0, 1, 1]], [[0, 1]]),
    "shared": ({"custom": {"foundation": "shared"}}, [[0, 0, 0]], [[0, 0]]),
    "dci": ({"dci": {}}, [[0, 0, 1], [0, 0]], [[0, 1], [0]]),
    "dci, own guidance": ({"dci": {"guidance": "own"}}, [[0, 1, 0, 1], [0, 0]], [[0, 1], [0]]),
}


@pytest.mark.parametrize("guess_mode", [False, True])
@pytest.mark.parametrize("kind", _LAYOUTS)
@torch.no_grad()
def test_every_row_gets_what_the_net_says_of_it_alone(
    small: engine.Engine, nets: list[ControlNetModel], kind: str, guess_mode: bool
) -> None:
    """A follower by its leader's text; shared latents are computed once and come out as if they were not."""
    options, *expected = _LAYOUTS[kind]
    options = dict(options)
    if (custom := options.pop("custom", None)) is not None:
        options["customization"] = _infusion(small, **custom)
    if (custom := options.pop("dci", None)) is not None:
        options["customization"] = engine.DCI("cat", "boat", fraction=0.5, noise="independent", **custom)
    control = engine.Control(nets[0], hint(), weight=0.7, guess_mode=guess_mode)
    request = default_request(small, _PROMPT, negative_prompt="" if "guidance_scale" in options else "blurry",
                              control=control, **options)  # fmt: skip
    texts, steps = Texts(small.text_encoder), 4
    plans = make_plans(request, steps, texts, small.concepts, small.device)
    phases = lay_out(request, steps, texts)
    timesteps = torch.tensor([900.0, 300.0])
    for plan, (_, layout), trajectories in zip(plans, phases, expected[guess_mode], strict=True):
        (net,) = plan.rows.nets
        assert net.trajectories.tolist() == trajectories
        assert plan.rows.trajectories[net.rows].tolist() == trajectories
        assert cost_in_rows(layout) == layout.n_rows + (len(trajectories) + 1) // 2
        n = len(plan.starts)
        latents, positions = torch.randn(n, 4, 8, 8), torch.arange(n) % 2
        (found,) = net_residuals([net], [nets[0].time_shifts(timesteps)], latents, positions)
        owners = layout.all_owners
        for number, (row, trajectory) in enumerate(zip(net.rows.tolist(), trajectories, strict=True)):
            follower = layout.followers[row - len(owners)] if row >= len(owners) else None
            text = owners[row if follower is None else layout.number(follower.leader)].text
            context = small.encode_prompt(text.prompt.text)
            pictures = request.hints[0]
            alone = nets[0](latents[[trajectory]], timesteps[positions[[trajectory]]], context, pictures)
            for mine, other in zip([*found.skips, found.middle], [*alone.skips, alone.middle], strict=True):
                assert _error(mine[[number]], other) < 1e-5
            scales = torch.logspace(-1, 0, len(found.skips) + 1) if guess_mode else torch.ones(len(found.skips) + 1)
            torch.testing.assert_close(found.scales[number], 0.7 * scales)


def test_a_row_of_a_net_costs_half_a_row_of_the_unet() -> None:
    """At SD v1.5's size and 512x512, in FLOPs; less where two rows share what no text reaches."""
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel(UNetConfig.from_dict(SD_V1_5_UNET))
        net = ControlNetModel(ControlNetConfig(unet.config))
        sample, features = torch.empty(1, 4, 64, 64), torch.empty(1, 320, 64, 64)
        counts = []
        for model in (unet, net):
            text, shifts = model.text_kv(torch.empty(1, 77, 768)), model.time_shifts(torch.empty(1))
            condition = Conditioning(Batch(text), shifts)
            with FlopCounterMode(display=False) as counter:
                if model is net:
                    net.residuals(sample, features, condition, torch.empty(1, dtype=torch.int64), torch.empty(1, 13))
                else:
                    unet.denoise(sample, condition)
            counts.append(counter.get_total_flops())
    assert 0.3 <= counts[1] / counts[0] <= 0.5


@torch.no_grad()
def test_what_is_added_goes_to_its_rows_alone(small: engine.Engine, nets: list[ControlNetModel]) -> None:
    """Also where another row's is not finite."""
    context, sample = small.encode_prompt(["a cat", "a dog", ""]), torch.randn(3, 4, 8, 8)
    batch, shifts = Batch(small.unet.text_kv(context)), small.unet.time_shifts(torch.tensor([5, 500, 900]))
    plain = small.unet.denoise(sample, Conditioning(batch, shifts))
    net = nets[0](sample[[2, 0]], torch.tensor([900, 5]), context[[2, 0]], torch.rand(2, 3, 16, 16))
    added = Residuals(torch.tensor([2, 0]), net.scales, net.skips, net.middle)
    both = small.unet.denoise(sample, Conditioning(batch, shifts, residuals=(added,)))
    assert _error(both[1], plain[1]) < 1e-6
    assert min(_error(both[row], plain[row]) for row in (0, 2)) > 1e-3
    twice = small.unet.denoise(sample, Conditioning(batch, shifts, residuals=(added, added)))
    doubled = small.unet.denoise(
        sample, Conditioning(batch, shifts, residuals=(replace(added, scales=2 * net.scales),))
    )
    assert _error(twice, doubled) < 1e-5
    broken = replace(added, skips=[x.index_fill(0, torch.tensor([1]), torch.nan) for x in added.skips])
    found = small.unet.denoise(sample, Conditioning(batch, shifts, residuals=(broken,)))
    assert torch.isfinite(found[1:]).all()
    assert not torch.isfinite(found[0]).any()


def test_customisations_that_change_nothing(small: engine.Engine, nets: list[ControlNetModel]) -> None:
    """An Infusion of strength 0 and a DCI of strength 0 draw the controlled picture, and so does the foundation."""
    control = engine.Control(nets[0], hint(), weight=0.8, end=0.7)
    plain = _draw(small, control)
    for custom in (
        _infusion(small, strength=0.0),
        _infusion(small, strength=0.0, foundation="shared"),
        _infusion(small, strength=0.0, unconditional_maps="own"),
    ):
        assert _error(_draw(small, control, customization=custom), plain) < 1e-5, custom
    mixed = _draw(small, control, customization=engine.DCI("cat", "boat", fraction=1.0, strength=0.0))
    assert _error(mixed, plain) < 1e-4  # the attention of rows that mix rounds otherwise
    custom = small.generate(_PROMPT, control=control, customization=_infusion(small), **_QUICK)
    assert _error(custom.foundation_images[0], plain[0]) < 1e-5
    assert _error(custom.latents, plain) > 1e-3


@pytest.mark.parametrize("kind", ["infusion", "dci", "ico"])
def test_a_customisation_counts_beside_a_net(small: engine.Engine, nets: list[ControlNetModel], kind: str) -> None:
    learned = ico_concept(small)
    prompt = f"a photo of a {learned.placeholder}" if kind == "ico" else _PROMPT
    kinds = {"infusion": _infusion(small), "dci": engine.DCI("cat", "boat", fraction=1.0), "ico": engine.ICO([learned])}
    options = {"prompt": prompt, "customization": kinds[kind]}
    custom, control = _draw(small, **options), engine.Control(nets[0], hint())
    both = _draw(small, control, **options)
    assert _error(both, custom) > 1e-2
    if kind != "ico":
        assert _error(both, _draw(small, control)) > 1e-3


def test_hints_are_embedded_and_texts_projected_once(
    small: engine.Engine, nets: list[ControlNetModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("hint", "text_kv", "time_shifts"):
        own = getattr(nets[0], name)
        monkeypatch.setattr(nets[0], name, lambda *given, name=name, own=own: calls.append(name) or own(*given))
    options: dict[str, Any] = {"sampler": "unipc", "steps": 7}  # on which nothing was drawn before
    control = engine.Control(nets[0], hint(), start=0.2, end=0.8)
    _draw(small, control, customization=engine.DCI("cat", "boat", fraction=0.5), **options)
    assert sorted(calls) == ["hint", "text_kv", "time_shifts"]
    _draw(small, control, **options)
    assert sorted(calls) == ["hint", "hint", "text_kv", "text_kv", "time_shifts"]


def test_phases(small: engine.Engine, nets: list[ControlNetModel]) -> None:
    """diffusers' rule: i / n >= start and (i + 1) / n <= end."""
    one, other = engine.Control(nets[0], hint(), start=0.2, end=0.8), engine.Control(nets[1], hint(), end=0.5)
    request = default_request(small, _PROMPT, control=[one, other], customization=engine.DCI("cat", fraction=0.4))
    phases = lay_out(request, 10, Texts(small.text_encoder))
    assert [(n, layout.controls, len(layout.pairs)) for n, layout in phases] == [
        (2, (1,), 1), (2, (0, 1), 1), (1, (0, 1), 0), (3, (0,), 0), (2, (), 0)
    ]  # fmt: skip


def test_pictures_of_one_request_with_hints_of_their_own(small: engine.Engine, nets: list[ControlNetModel]) -> None:
    """One per prompt and one per image; equal texts and seeds share a trajectory only where hints are the same."""
    pictures = [hint(1), hint(2)]
    alone = [_draw(small, engine.Control(nets[0], picture)) for picture in pictures]
    options = {"images_per_prompt": 2, "seed": [3, 3]}
    both = _draw(small, engine.Control(nets[0], pictures), **options)
    for i in range(2):
        assert _error(both[[i]], alone[i]) < 1e-5
    customs = [None, _infusion(small)]
    mixed = small.generate(
        _PROMPT, control=engine.Control(nets[0], pictures), **_QUICK | options, customization=customs
    )
    assert _error(mixed.latents[[0]], alone[0]) < 1e-5
    assert _error(mixed.foundation_images[1], alone[1][0]) < 1e-5
    request = default_request(
        small, _PROMPT, control=engine.Control(nets[0], pictures[0]), customization=customs, **options
    )
    ((_, layout),) = lay_out(request, 3, Texts(small.text_encoder))
    assert len(layout.trajectories) == 2, "the plain picture is the foundation"


def test_a_scheduler_draws_with_nets(small: engine.Engine, nets: list[ControlNetModel]) -> None:
    controls = [
        engine.Control(nets[0], hint(1), end=0.7),
        engine.Control(nets[0], hint(2)),
        engine.Control(nets[1], hint(3)),
    ]
    options = {"steps": 4, "output": "latent"}
    with engine.Scheduler(small, max_rows=32) as scheduler:
        jobs = [scheduler.submit(_PROMPT, seed=i, control=one, **options) for i, one in enumerate(controls)]
        jobs.append(scheduler.submit(_PROMPT, seed=3, **options))
        together = [job.result(timeout=120).latents for job in jobs]
    for i, one in enumerate([*controls, ()]):
        alone = small.generate(_PROMPT, seed=i, control=one, progress=False, **options).latents
        assert _error(together[i], alone) < 1e-5


def test_memory_counts_what_nets_add(
    small: engine.Engine, nets: list[ControlNetModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    positions, skips = 8 * 8, 24 + 24 + 48 // 4  # of the small model, in channels at full size
    step = positions * skips * 4
    pictures = 16 * 16 * 24
    for free, controls in ((step, 0), (2 * step, 1), (3 * step, 2)):
        given = [engine.Control(net, hint()) for net in nets[:controls]]
        monkeypatch.setattr(out_of_memory, "available_bytes", lambda _device, free=free: free + pictures)
        _draw(small, *given)
        monkeypatch.setattr(out_of_memory, "available_bytes", lambda _device, free=free: free + pictures - 1)
        named = {0: "", 1: " with 1 ControlNet", 2: " with 2 ControlNets"}[controls]
        with pytest.raises(engine.OutOfMemoryError, match=f"got 1 of 16x16{named}: at least"):
            _draw(small, *given)
    monkeypatch.setattr(out_of_memory, "available_bytes", lambda _device: 2 * step + pictures)
    _draw(
        small, *(engine.Control(net, hint(), start=0.5 * i, end=0.5 + 0.5 * i) for i, net in enumerate(nets)), steps=4
    )
    monkeypatch.setattr(out_of_memory, "available_bytes", lambda _device: step + pictures)
    _draw(small, engine.Control(nets[0], hint(), 0.0))


def test_what_does_not_fit_names_the_nets(
    small: engine.Engine, nets: list[ControlNetModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nets[0], "residuals", fail)
    monkeypatch.setattr(out_of_memory, "rows_that_fit", lambda *_: 5)
    message = "got 2 of 16x16 in 4 UNet rows and 4 ControlNet rows; about 1 of that size would fit"
    with pytest.raises(engine.OutOfMemoryError, match=message):
        _draw(small, engine.Control(nets[0], hint()), images_per_prompt=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": float("nan")}, "weight must be a finite number from -100 to 100, got nan"),
        ({"start": -0.1}, "start must be a finite number from 0 to 1, got -0.1"),
        ({"end": 1.5}, "end must be a finite number from 0 to 1, got 1.5"),
        ({"start": 0.5, "end": 0.5}, "start must be below end, got start=0.5 and end=0.5"),
        ({"guess_mode": 1}, "guess_mode must be True or False, got 1"),
        ({"net": "canny"}, "net must be what engine.load_controlnet gives, got 'canny'"),
        ({"image": "edges.png"}, "the image of a control must hold PIL pictures or arrays"),
        ({"image": np.zeros((16, 16, 4))}, "got (16, 16, 4)"),
        ({"image": np.full((16, 16), 2.0)}, "got float64 from 2.0 to 2.0"),
        ({"image": [hint()] * 3}, "one per prompt or one per image (2), got 3"),
        ({"start": 0.4, "end": 0.6}, "leave it one of the steps at least, got start=0.4 and end=0.6 with 3 steps"),
    ],
    ids=short,
)
def test_refusals(small: engine.Engine, nets: list[ControlNetModel], options: dict[str, Any], message: str) -> None:
    given = {"net": nets[0], "image": hint()} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        _draw(small, engine.Control(**given), images_per_prompt=2)


def test_what_is_not_a_control_is_refused(small: engine.Engine) -> None:
    with pytest.raises(ValueError, match=re.escape("control must be an engine.Control or a list of these, got ['x']")):
        small.generate(_PROMPT, control=["x"])


def test_a_net_goes_with_models_of_its_sizes(
    small: engine.Engine, small_folder: Path, nets: list[ControlNetModel], tmp_path: Path
) -> None:
    from tests.loras import write_kohya
    from tests.pipelines import save_pipeline

    control = engine.Control(nets[0], hint())
    other = small.with_loras([engine.LoRA(write_kohya(small, tmp_path / "lace.safetensors"))])
    assert _error(_draw(other, control), _draw(other)) > 1e-3
    with pytest.raises(
        ValueError, match=r"must be on cpu in torch.bfloat16 as the model is, got cpu and torch.float32"
    ):
        _draw(engine.load(small_folder, dtype="bfloat16"), control)
    save_pipeline("sd_like", tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"belongs to a model whose latents are 2 times smaller.*this model's are 8 times"
    ):
        _draw(engine.load(tmp_path / "other"), control)


def test_results_tell_of_nets(small: engine.Engine, nets: list[ControlNetModel], tmp_path: Path) -> None:
    controls = [engine.Control(nets[0], hint(), 0.7, end=0.5), engine.Control(nets[1], hint(), guess_mode=True)]
    out = small.generate(_PROMPT, control=controls, steps=2, progress=False)
    assert out.settings["control"] == [
        {"name": "0", "weight": 0.7, "start": 0.0, "end": 0.5, "guess_mode": False},
        {"name": "1", "weight": 1.0, "start": 0.0, "end": 1.0, "guess_mode": True},
    ]
    (path,) = out.save(tmp_path)
    text = Image.open(path).text["parameters"]
    assert (
        'ControlNet 0: "Model: 0, Weight: 0.7, Guidance Start: 0, Guidance End: 0.5, Control Mode: Balanced", '
        'ControlNet 1: "Model: 1, Weight: 1, Guidance Start: 0, Guidance End: 1, Control Mode: ControlNet is more '
        'important", Version'
    ) in text


def test_command_line(small_folder: Path, tmp_path: Path, capsys: Any) -> None:
    import diffusers

    from engine.cli import main
    from tests.controlnets import HINT_CHANNELS, make_controlnet

    unet = diffusers.UNet2DConditionModel.from_pretrained(small_folder / "unet")
    make_controlnet(unet, HINT_CHANNELS["narrow"]).save_pretrained(tmp_path / "canny")
    hint().save(tmp_path / "edges.png")
    net, picture = tmp_path / "canny", tmp_path / "edges.png"
    draw = [
        "generate",
        "a cat",
        "--model",
        str(small_folder),
        "--steps",
        "2",
        "--quiet",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*draw, "--control", f"{net}={picture}:0.5", "--control", f"{net}={picture}:0.3:0:0.5"]) == 0
    text = Image.open(next((tmp_path / "out").iterdir())).text["parameters"]
    assert "Model: canny, Weight: 0.5, Guidance Start: 0, Guidance End: 1" in text
    assert "Model: canny, Weight: 0.3, Guidance Start: 0, Guidance End: 0.5" in text
    for wrong in (f"{net}", f"{net}=", f"{net}={picture}:x", f"{net}={picture}:1:2"):
        assert main([*draw, "--control", wrong]) == 1
        assert "control must be NET=IMAGE, NET=IMAGE:WEIGHT" in capsys.readouterr().err
    assert main([*draw, "--control", f"{net}={tmp_path / 'none.png'}"]) == 1
    assert "cannot be read as a picture" in capsys.readouterr().err


def test_arrays_of_floats_are_resized_as_pictures_are(nets: list[ControlNetModel]) -> None:
    """But for the rounding to 8 bits, also between Pillow's two passes; and Lanczos' overshoot is cut off."""
    pixels = np.zeros((40, 30, 3), np.float32)
    pixels[10:, :12, 0] = pixels[20:, :, 1] = 1.0
    controls = [engine.Control(nets[0], picture) for picture in (pixels, (pixels * 255).astype(np.uint8))]
    floats, bytes_ = make_hints(controls, 1, 1, (16, 24), 2)
    assert floats.shape == (1, 3, 16, 24)
    assert (float(floats.min()), float(floats.max())) == (0.0, 1.0)
    assert (floats - bytes_).abs().max() < 0.02
    assert floats[0, 2].max() == 0
