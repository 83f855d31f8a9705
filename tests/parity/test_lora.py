"""LoRAs against diffusers and peft, fused: their own files, and kohya's layout as diffusers reads it."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import engine
from engine.weights.ldm import UNET_PREFIX, unet_name
from tests.loras import write_kohya
from tests.pipelines import encode, relative_error, save_pipeline

_TOLERANCE = 2e-5
_FUSED = "load_lora_weights and fuse_lora"
_PROMPT = "a cat on a beach"
_UNET_LAYERS = ["to_q", "to_k", "to_out.0", "conv1", "proj_in", "time_emb_proj", "ff.net.0.proj"]
_TEXT_LAYERS = ["q_proj", "out_proj", "fc1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    save_pipeline("narrow", folder)
    return folder


@pytest.fixture(scope="module")
def sd(folder: Path) -> engine.Engine:
    return engine.load(folder)


@pytest.fixture
def pipeline(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers 5.24 asks for a peft that is not out yet; what diffusers needs of it works with this one."""
    from diffusers import StableDiffusionPipeline

    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def _randomize(network: torch.nn.Module, seed: int = 0) -> None:
    """Numbers for an adapter's parameters, whose change would otherwise be none."""
    torch.manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        elif any(mark in name for mark in ("lora_", "hada_", "lokr_")):
            parameter.data = 0.2 * torch.randn_like(parameter)


@torch.no_grad()
def _errors(actual: engine.Engine, unet, text, base: engine.Engine) -> list[float]:
    """Of the UNet and of the encoded text; both must have changed."""
    sample, context = torch.randn(2, 4, 9, 11), torch.randn(2, 77, 32)
    expected = unet(sample, 481, context).sample, text
    found = actual.unet(sample, 481, context), actual.encode_prompt(_PROMPT)
    before = base.unet(sample, 481, context), base.encode_prompt(_PROMPT)
    for one, other in zip(before, expected, strict=True):
        assert relative_error(one, other) > 0.02
    return [relative_error(one, other) for one, other in zip(found, expected, strict=True)]


def _fused(pipeline, files: dict[Path, float]) -> tuple:
    for i, path in enumerate(files):
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=f"lora{i}")
    names = [f"lora{i}" for i in range(len(files))]
    pipeline.set_adapters(names, list(files.values()))
    pipeline.fuse_lora(adapter_names=names)
    return pipeline.unet, encode(pipeline, _PROMPT)


def test_kohya_several_at_once(sd: engine.Engine, pipeline, tmp_path: Path, agrees) -> None:
    first = write_kohya(sd, tmp_path / "first.safetensors")
    second = write_kohya(sd, tmp_path / "second.safetensors", lambda name: "attn" in name, rank=2, alpha=5.0, seed=1)
    loras = [engine.LoRA(first, 0.7), engine.LoRA(second, -0.4)]
    errors = _errors(sd.with_loras(loras), *_fused(pipeline, {first: 0.7, second: -0.4}), sd)
    agrees("LoRA, kohya's layout, two at once", _FUSED, max(errors), _TOLERANCE)


def test_loading_with_loras(folder: Path, sd: engine.Engine, pipeline, tmp_path: Path) -> None:
    path = write_kohya(sd, tmp_path / "style.safetensors")
    actual = engine.load(folder, loras=[engine.LoRA(path, 0.7)])
    assert max(_errors(actual, *_fused(pipeline, {path: 0.7}), sd)) <= _TOLERANCE


def _adapters(pipeline, layers: list[str] = _UNET_LAYERS, **options) -> None:
    pipeline.unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=layers, **options))
    peft.inject_adapter_in_model(LoraConfig(r=3, lora_alpha=1, target_modules=_TEXT_LAYERS), pipeline.text_encoder)
    _randomize(pipeline.unet)
    _randomize(pipeline.text_encoder, 1)


def _save(pipeline, folder: Path, convert=lambda state: state, **metadata) -> Path:
    layers = [convert(get_peft_model_state_dict(one)) for one in (pipeline.unet, pipeline.text_encoder)]
    pipeline.save_lora_weights(folder, unet_lora_layers=layers[0], text_encoder_lora_layers=layers[1], **metadata)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    ("convert", "layers"),
    [(lambda state: state, _UNET_LAYERS), (convert_state_dict_to_diffusers, ["to_q", "to_k", "to_out.0"])],
    ids=["now", "before"],
)
def test_diffusers_own_files(sd: engine.Engine, pipeline, tmp_path: Path, convert, layers: list[str], agrees) -> None:
    """Without metadata alpha is the rank. diffusers itself reads of its old layout the attention layers alone."""
    other = copy.deepcopy(pipeline)
    _adapters(other, layers)
    path = _save(other, tmp_path, convert)
    errors = _errors(sd.with_loras([engine.LoRA(path, 0.8)]), *_fused(pipeline, {path: 0.8}), sd)
    agrees("LoRA, diffusers' layouts", _FUSED, max(errors), _TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "use_rslora": True,
            "rank_pattern": {"conv1": 2},
            "alpha_pattern": {"mid_block.resnets.0.conv1": 3, "to_q": 9},
        },
        {"use_dora": True},
    ],
    ids=["plain", "patterns", "dora"],
)
def test_diffusers_files_with_metadata(sd: engine.Engine, pipeline, tmp_path: Path, options: dict, agrees) -> None:
    other = copy.deepcopy(pipeline)
    _adapters(other, **options)
    unet = other.unet.peft_config["default"].to_dict()
    text = LoraConfig(r=3, lora_alpha=1, target_modules=_TEXT_LAYERS).to_dict()
    path = _save(other, tmp_path, unet_lora_adapter_metadata=unet, text_encoder_lora_adapter_metadata=text)
    # a folder is as good as its file
    errors = _errors(sd.with_loras([engine.LoRA(tmp_path, 0.8)]), *_fused(pipeline, {path: 0.8}), sd)
    what = "DoRA" if options.get("use_dora") else "LoRA"
    agrees(f"{what}, diffusers' layout with metadata", _FUSED, max(errors), _TOLERANCE)


def test_two_doras_at_once(sd: engine.Engine, pipeline, tmp_path: Path, agrees) -> None:
    """Norms are those of the weight without the other, and the second one scales what the first one left."""
    files = {}
    for seed, weight in ((0, 0.8), (1, -0.5)):
        other = copy.deepcopy(pipeline)
        _adapters(other, use_dora=True)
        _randomize(other.unet, seed)
        unet = other.unet.peft_config["default"].to_dict()
        text = LoraConfig(r=3, lora_alpha=1, target_modules=_TEXT_LAYERS).to_dict()
        metadata = {"unet_lora_adapter_metadata": unet, "text_encoder_lora_adapter_metadata": text}
        files[_save(other, tmp_path / str(seed), **metadata)] = weight
    actual = sd.with_loras([engine.LoRA(path, weight) for path, weight in files.items()])
    agrees("DoRA, two at once", _FUSED, max(_errors(actual, *_fused(pipeline, files), sd)), _TOLERANCE)


def test_a_unet_saved_by_itself(sd: engine.Engine, pipeline, tmp_path: Path) -> None:
    other = copy.deepcopy(pipeline.unet)
    other.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=_UNET_LAYERS))
    _randomize(other)
    other.save_lora_adapter(tmp_path)
    other.fuse_lora()
    actual = sd.with_loras([engine.LoRA(tmp_path)])
    sample, context = torch.randn(2, 4, 9, 11), torch.randn(2, 77, 32)
    with torch.no_grad():
        assert relative_error(actual.unet(sample, 3, context), other(sample, 3, context).sample) <= _TOLERANCE
    assert actual.text_encoder is sd.text_encoder


def test_old_attention_processors(sd: engine.Engine, pipeline, tmp_path: Path, agrees) -> None:
    """diffusers' first layout, of keys "<attention>.processor.to_q_lora.down.weight"."""
    kohya = load_file(write_kohya(sd, tmp_path / "kohya.safetensors", lambda name: ".to_" in name, None))
    names = [
        name.removesuffix(".weight") for name in sd.unet.state_dict() if ".to_" in name and name.endswith("weight")
    ]
    tensors = {}
    for name in names:
        attention, _, layer = name.partition(".to_")
        key = f"unet.{attention}.processor.to_{layer.removesuffix('.0')}_lora"
        for part in ("up", "down"):
            tensors[f"{key}.{part}.weight"] = kohya[f"lora_unet_{name.replace('.', '_')}.lora_{part}.weight"]
    text = load_file(write_kohya(sd, tmp_path / "text.safetensors", None, lambda name: "attn" in name))
    for key, tensor in text.items():
        if not key.endswith("alpha"):
            name = key.removeprefix("lora_te_text_model_encoder_layers_").replace("_self_attn_", ".self_attn.")
            name = name.replace("out_proj", "to_out").replace("_proj", "").replace("self_attn.", "self_attn.to_")
            name = name.replace("to_to_", "to_").replace(".lora_", "_lora.")
            tensors[f"text_encoder.text_model.encoder.layers.{name}"] = tensor
    save_file(tensors, tmp_path / "old.safetensors")
    path = tmp_path / "old.safetensors"
    errors = _errors(sd.with_loras([engine.LoRA(path)]), *_fused(pipeline, {path: 1.0}), sd)
    agrees("LoRA, diffusers' attention processors", _FUSED, max(errors), _TOLERANCE)


def test_names_of_the_original_layout(sd: engine.Engine, tmp_path: Path) -> None:
    path = write_kohya(sd, tmp_path / "kohya.safetensors", text=None)
    by_diffusers = {}
    for name in sd.unet.state_dict():
        if name.endswith(".weight"):
            original = unet_name(sd.unet.config, name).removeprefix(UNET_PREFIX)
            by_diffusers[name[:-7].replace(".", "_")] = original[:-7].replace(".", "_")
    tensors = {}
    for key, tensor in load_file(path).items():
        name, _, part = key.removeprefix("lora_unet_").partition(".")
        tensors[f"lora_unet_{by_diffusers[name]}.{part}"] = tensor
    save_file(tensors, tmp_path / "original.safetensors")
    one, other = (sd.with_loras([engine.LoRA(tmp_path / f"{name}.safetensors")]) for name in ("kohya", "original"))
    for name, weight in one.unet.state_dict().items():
        assert torch.equal(weight, other.unet.state_dict()[name]), name


@pytest.mark.parametrize("network", ["unet", "text_encoder"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=6),
        LoraConfig(r=4, lora_alpha=6, use_rslora=True, use_dora=True, alpha_pattern={"to_q": 2, "q_proj": 3}),
        LoHaConfig(r=2, alpha=3, use_effective_conv2d=True),
        LoKrConfig(r=2, alpha=3, decompose_both=True, decompose_factor=4, use_effective_conv2d=True),
        LoKrConfig(r=99, alpha=30, rank_pattern={"conv1": 60}),
    ],
    ids=["lora", "dora", "loha", "lokr", "lokr whole"],
)
def test_peft_own_files(sd: engine.Engine, pipeline, tmp_path: Path, config, network: str, agrees) -> None:
    config = copy.deepcopy(config)
    config.target_modules = _UNET_LAYERS if network == "unet" else _TEXT_LAYERS
    model = get_peft_model(getattr(pipeline, network), config)
    _randomize(model)
    model.save_pretrained(tmp_path)
    expected = model.merge_and_unload().state_dict()
    actual = sd.with_loras([engine.LoRA(tmp_path)])
    networks = (sd.unet, actual.unet) if network == "unet" else (sd.text_encoder.model, actual.text_encoder.model)
    before, after = (one.state_dict() for one in networks)
    changed = [name for name in after if not torch.equal(before[name], after[name])]
    assert len(changed) >= 6
    error = max(relative_error(after[name], expected[name]) for name in changed)
    agrees(f"peft's {type(config).__name__.removesuffix('Config')}, weights", "merge_and_unload", error, 1e-6)
    assert all(torch.equal(after[name], expected[name]) for name in after.keys() - set(changed))
