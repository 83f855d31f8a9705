"""Weights are checked completely; damaged, partial and foreign files are refused by name."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine
from engine.errors import CheckpointError
from engine.weights.checkpoint import _choose_weights
from engine.weights.tensors import TensorFile, WeightSource, load_module
from tests.pipelines import make_pipeline, relative_error, save_pipeline

_UNET_FILE = Path("unet/diffusion_pytorch_model.safetensors")
_CPU = torch.device("cpu")


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_folder, tmp_path / "model"))


def _edit(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("conv_in.weight"), "missing conv_in.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda t: t.update({"conv_in.weight": torch.zeros(24, 4, 1, 1)}),
            r"conv_in.weight: expected shape .*24, 4, 3",
        ),
        (
            lambda t: t.update({"conv_in.weight": torch.zeros(24, 4, 3, 3).int()}),
            "expected a floating dtype, found I32",
        ),
        (lambda t: t["conv_in.weight"].view(-1)[5:6].fill_(torch.nan), "conv_in.weight: expected finite values"),
    ],
)
def test_mismatches_name_the_tensor(folder: Path, change, message: str) -> None:
    _edit(folder / _UNET_FILE, change)
    with pytest.raises(CheckpointError, match=message) as error:
        engine.load(folder)
    assert str(folder / _UNET_FILE) in str(error.value)


def test_overflow_in_the_asked_dtype(folder: Path) -> None:
    _edit(folder / _UNET_FILE, lambda t: t["conv_in.weight"].view(-1)[0:1].fill_(1e6))
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointError, match=r"conv_in.weight: values overflow"):
        engine.load(folder, dtype="float16")


def test_every_truncation_is_an_error(folder: Path) -> None:
    path = folder / _UNET_FILE
    whole = path.read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"truncated|not a whole"):
            engine.load(folder)


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    path = folder / _UNET_FILE
    file = TensorFile(path)
    with path.open("r+b") as handle:
        handle.truncate(path.stat().st_size // 2)
    last = max(file.entries, key=lambda name: file.entries[name].start)
    with pytest.raises(CheckpointError, match=f"truncated while reading {last}"):
        file.read(last)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"PK\x03\x04" + b"\x00" * 100, "zip or pickle"),
        (b"\x80\x02}q\x00." + b"\x00" * 100, "zip or pickle"),
        (b"<!DOCTYPE html><html></html>", "not a whole safetensors file"),
        (struct.pack("<Q", 20) + b"this is not json at ", "header cannot be read"),
        (struct.pack("<Q", 2) + b"[]", "header cannot be read"),
    ],
)
def test_other_files_renamed(folder: Path, content: bytes, message: str) -> None:
    (folder / _UNET_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        engine.load(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "dtype F8_E4M3"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}, "must hold 16 bytes, found 8"),
        ({"dtype": "F32", "shape": [4]}, "header cannot be read"),
        ({"dtype": "F32", "shape": [400], "data_offsets": [0, 1600]}, "truncated"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}, "must be integers >= 0"),
        ({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}, "must be integers >= 0"),
        ({"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}, "must be integers >= 0"),
        ({"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}, "dtype"),
    ],
)
def test_headers_are_checked(tmp_path: Path, entry: dict, message: str) -> None:
    header = json.dumps({"x": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\x00" * 16)
    with pytest.raises(CheckpointError, match=message):
        TensorFile(path)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_pickles_are_refused_with_advice(folder: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match=r"(?s)convert it first.*torch.load\(.*save_file"):
        engine.load(path)
    (folder / _UNET_FILE).rename(folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="convert it first"):
        engine.load(folder)


@pytest.mark.parametrize(
    "missing", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer", str(_UNET_FILE)]
)
def test_what_is_missing_is_named(folder: Path, missing: str) -> None:
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match=missing.split(".", maxsplit=1)[0]):
        engine.load(folder)


def test_variants_and_shards(tmp_path: Path, small: engine.Engine) -> None:
    half, sharded = tmp_path / "half", tmp_path / "sharded"
    pipeline = make_pipeline("narrow").to(dtype=torch.float16)
    pipeline.save_pretrained(half, variant="fp16")
    assert (half / "unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    pipeline = save_pipeline("narrow", sharded, max_shard_size="100KB")
    assert (sharded / "unet/diffusion_pytorch_model.safetensors.index.json").is_file()
    sample, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    expected = small.unet(sample, 10, context)
    assert torch.equal(engine.load(sharded).unet(sample, 10, context), expected)
    assert relative_error(engine.load(half).unet(sample, 10, context), expected) <= 5e-3

    shard = next(sharded.glob("unet/*-00002-*"))
    shard.rename(shard.with_suffix(".gone"))
    with pytest.raises(CheckpointError, match=f"shard {shard.name} is missing"):
        engine.load(sharded)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    files = [TensorFile(tmp_path / f"{name}.safetensors") for name in ("a", "b")]
    with torch.device("meta"):
        linear = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="is also in"):
        load_module(linear, WeightSource(files), _CPU, torch.float32)


def test_names_of_older_libraries(folder: Path, small: engine.Engine) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename_vae(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "attentions.0.to_" in name]:
            new = name
            for ours, theirs in old.items():
                new = new.replace(f".{ours}.", f".{theirs}.")
            tensors[new] = tensors.pop(name)

    def rename_text(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors["text_model." + name.removeprefix("text_model.")] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    _edit(folder / "vae/diffusion_pytorch_model.safetensors", rename_vae)
    _edit(folder / "text_encoder/model.safetensors", rename_text)
    sd = engine.load(folder)
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(sd.vae.decode(latents), small.vae.decode(latents))
    assert torch.equal(sd.encode_prompt(["a cat"]), small.encode_prompt(["a cat"]))


def test_text_width_must_fit_the_unet(folder: Path) -> None:
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"cross_attention_dim": 48}))
    with pytest.raises(ValueError, match="text encoder's hidden_size must be 48 to fit the rest, got 32"):
        engine.load(folder)


def test_neither_path_nor_hub_id() -> None:
    with pytest.raises(CheckpointError, match="no such path"):
        engine.load("/nowhere/at/all")


def _hub(snapshot: Path) -> dict[str, str]:
    """Lay a cached snapshot out as the hub does, and return the environment that serves it, offline."""
    root = snapshot.parent.parent
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs/main").write_text(snapshot.name)
    cache = str(root.parent)
    return {"HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": "."}


def _load_each(environment: dict[str, str], *models: str) -> list[str]:
    code = (
        "import sys, engine\n"
        "for model in sys.argv[1:]:\n"
        "    try:\n        print(engine.load(model).name)\n"
        "    except engine.CheckpointError as error:\n        print(error)\n"
    )
    command = [sys.executable, "-c", code, *models]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_hub_id_from_the_local_cache(small_folder: Path, tmp_path: Path) -> None:
    """A hub id is served from the cache, offline, even if variants it has no need of were never downloaded."""
    snapshot = tmp_path / "models--team--tiny/snapshots/0123456789012345678901234567890123456789"
    shutil.copytree(small_folder, snapshot)
    (snapshot / "safety_checker").mkdir()
    partial = tmp_path / "models--team--partial/snapshots/0123456789012345678901234567890123456789"
    shutil.copytree(small_folder, partial)
    (partial / "vae/diffusion_pytorch_model.safetensors").unlink()
    _hub(partial)
    lines = _load_each(_hub(snapshot), "team/tiny", "team/other", "team/partial")
    assert lines[0] == "team/tiny"
    assert "hf download team/other" in lines[1]
    assert "hf download team/partial" in lines[2]


@pytest.mark.parametrize(
    ("prefer_fp16", "names", "chosen"),
    [
        (False, ["m.safetensors", "m.fp16.safetensors", "m.non_ema.safetensors"], ["m.safetensors"]),
        (True, ["m.safetensors", "m.fp16.safetensors"], ["m.fp16.safetensors"]),
        (True, ["m.safetensors"], ["m.safetensors"]),
        (False, ["m.fp16.safetensors"], ["m.fp16.safetensors"]),
        (
            False,
            ["m.safetensors.index.json", "m-00001-of-2.safetensors", "m-00001-of-2.fp16.safetensors"],
            ["m.safetensors.index.json", "m-00001-of-2.safetensors"],
        ),
        (False, ["m.bin"], []),
    ],
)
def test_one_variant_is_chosen(prefer_fp16: bool, names: list[str], chosen: list[str]) -> None:
    def full(short: list[str]) -> list[str]:
        return [f"unet/diffusion_pytorch_model{name[1:]}" for name in short]

    assert _choose_weights(full(names), "unet", prefer_fp16) == full(chosen)


def test_components_must_fit(folder: Path) -> None:
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"in_channels": 8}))
    rule = "the UNet's in_channels must be 4, or 9 of an inpainting model, to fit the rest, got 8"
    with pytest.raises(CheckpointError, match=rule):
        engine.load(folder)


def test_a_tokenizer_without_vocabulary_is_refused(folder: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"vocab.json: missing; a tokenizer is"):
        engine.load(folder)


def test_peak_memory_is_the_weights(tmp_path: Path) -> None:
    """Loading 256 MiB of weights raises the peak resident memory by at most 1.15 times as much."""
    layers = {f"{i}.weight": torch.rand(2048, 2048) for i in range(16)}
    save_file(layers, tmp_path / "big.safetensors")
    code = f"""
import resource, torch
from pathlib import Path
from engine.weights.tensors import TensorFile, WeightSource, load_module
with torch.device("meta"):
    model = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048, bias=False) for _ in range(16)])
torch.isfinite(torch.rand(2048, 2048)).all()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = WeightSource([TensorFile(Path({str(tmp_path / "big.safetensors")!r}))])
load_module(model, source, torch.device("cpu"), torch.float32)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1.15 * 256
