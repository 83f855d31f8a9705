"""IP-Adapter files: every tensor is used, or named in an error."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import engine
from tests.ip_adapters import adapter_tensors, layers_of, load_adapter

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def encoder(small: engine.Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    load_adapter(small, folder, "plain")
    return folder / "image_encoder"


def _load(sd: engine.Engine, tensors: Tensors, encoder: Path, path: Path) -> engine.IPAdapter:
    save_file({name: one.contiguous() for name, one in tensors.items()}, path)
    return engine.IPAdapter.load(path, sd, encoder)


def test_layers_are_numbered_as_diffusers_has_them(small: engine.Engine, encoder: Path, tmp_path: Path) -> None:
    tensors = adapter_tensors(layers_of(small), "plain")
    layers = _load(small, tensors, encoder, tmp_path / "x.safetensors").weights.layers
    names = list(small.unet.cross_attentions)
    assert list(layers) == names, "in the UNet's forward order"
    assert [name.split(".")[0] for name in names] == ["down_blocks", "mid_block", "up_blocks", "up_blocks"]
    for number, name in zip((1, 7, 3, 5), names, strict=True):
        assert torch.equal(layers[name][0], tensors[f"ip_adapter.{number}.to_k_ip.weight"])
        assert torch.equal(layers[name][1], tensors[f"ip_adapter.{number}.to_v_ip.weight"])


def _without(name: str):
    return lambda tensors: tensors.pop(name)


def _with(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("plain", _without("ip_adapter.3.to_v_ip.weight"), r"up_blocks.1.attentions.0.*attn2.to_v_ip is missing"),
        ("plain", _with("ip_adapter.9.to_k_ip.weight", torch.ones(2)), r"4 layers are numbered 1, 3 \.\.\. 7"),
        ("plain", _with("ip_adapter.2.to_k_ip.weight", torch.ones(2)), r"ip_adapter.2.to_k_ip.weight: this model's 4"),
        ("plain", _with("ip_adapter.1.to_k_ip.weight", torch.ones(24, 2048)), r"is \(24, 32\), found .*it is for SDXL"),
        ("plain", _with("ip_adapter.1.to_k_ip.weight", torch.full((24, 32), torch.nan)), "expected finite numbers"),
        ("plain", _with("ip_adapter.1.to_k_ip.weight", torch.ones(24, 32, dtype=torch.int32)), "found .* torch.int32"),
        ("plain", _with("ip_adapter.0.to_q_lora.down.weight", torch.ones(2)), "IP-Adapter FaceID, which needs"),
        ("plain", _with("image_proj.perceiver_resampler.proj_in.weight", torch.ones(2)), "FaceID Plus"),
        ("plain", _with("image_proj.proj.3.weight", torch.ones(2)), "Full Face"),
        ("plain", _with("lora_unet_x.lora_down.weight", torch.ones(2)), "this is a LoRA; use engine.LoRA"),
        ("plain", _with("controlnet_cond_embedding.conv_in.bias", torch.ones(2)), "a ControlNet"),
        ("plain", _with("conv_in.weight", torch.ones(2)), "not an IP-Adapter: unexpected conv_in.weight"),
        ("plain", _without("image_proj.norm.bias"), r"norm.bias: expected shape \(32,\), found None"),
        ("plain", _without("image_proj.proj.weight"), "not the projection of an IP-Adapter: no latents"),
        ("plain", _with("image_proj.norm.weight", torch.ones(30)), "a multiple of 30 rows, got 128"),
        ("plain", _with("image_proj.norm.weight", torch.ones(64)), r"norm.bias: expected shape \(64,\)"),
        (
            "plus",
            lambda tensors: tensors.update(
                {
                    "image_proj.proj_out.weight": torch.ones(40, 48),
                    **{
                        f"image_proj.{name}": torch.ones(40)
                        for name in ("proj_out.bias", "norm_out.weight", "norm_out.bias")
                    },
                }
            ),
            r"tokens must be as wide as down_blocks.*attn2 takes them, 32, got 40",
        ),
        ("plain", _with("image_proj.extra", torch.ones(3)), r"extra: expected shape None, found \(3,\)"),
        ("plus", _without("image_proj.layers.2.0.to_kv.weight"), r"layers.2.attn.to_k.weight: .*found None"),
        ("plus", _without("image_proj.layers.0.1.1.weight"), "no layers.0.ff.1.net.0.proj.weight"),
        ("plus", _with("image_proj.layers.0.0.to_q.weight", torch.ones(100, 48)), "heads of 64, got 100 rows"),
        ("plus", _with("image_proj.layers.1.1.3.weight", torch.ones(48, 7)), r"\(48, 192\), found \(48, 7\)"),
    ],
)
def test_what_does_not_fit_is_named(
    small: engine.Engine, encoder: Path, tmp_path: Path, kind: str, change, message: str
) -> None:
    tensors = adapter_tensors(layers_of(small), kind)
    change(tensors)
    with pytest.raises(engine.CheckpointError, match=message):
        _load(small, tensors, encoder, tmp_path / "x.safetensors")


def test_a_layer_that_is_not_there(small: engine.Engine, encoder: Path, tmp_path: Path) -> None:
    tensors = adapter_tensors(layers_of(small), "plain")
    tensors["up_blocks.7.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.0.weight"] = torch.ones(2, 2)
    with pytest.raises(engine.CheckpointError, match=r"no cross-attention projection up_blocks.7.*to_k"):
        _load(small, tensors, encoder, tmp_path / "x.safetensors")


def test_pickles_and_missing_files(small: engine.Engine, encoder: Path, tmp_path: Path) -> None:
    """The advice makes a file that loads."""
    tensors = adapter_tensors(layers_of(small), "plus")
    nested = {part: {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(part)}
              for part in ("image_proj", "ip_adapter")}  # fmt: skip
    torch.save(nested, tmp_path / "ip.bin")
    with pytest.raises(engine.CheckpointError, match="pickle files can run code") as error:
        engine.IPAdapter.load(tmp_path / "ip.bin", small, encoder)
    code = "\n".join(line.strip() for line in str(error.value).splitlines()[1:])
    for name in ("ip.bin", "ip.safetensors"):
        code = code.replace(name, str(tmp_path / name))
    exec(code, {})
    assert engine.IPAdapter.load(tmp_path / "ip.safetensors", small, encoder).name == "ip"
    with pytest.raises(engine.CheckpointError, match="no such file"):
        engine.IPAdapter.load(tmp_path / "none.safetensors", small, encoder)
