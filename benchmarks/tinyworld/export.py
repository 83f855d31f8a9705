"""Write a training run as the embedded model: ``python -m benchmarks.tinyworld.export --runs RUNS``.

The result is a plain diffusers folder in float16: averaged weights, configs, tokenizer, and ``made.json``, which says
how the files were made.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from benchmarks.tinyworld.train_unet import SCHEDULER_CONFIG, TEXT_CONFIG, UNET_CONFIG, LatentStore
from benchmarks.tinyworld.train_vae import VAE_CONFIG
from engine.weights.checkpoint import EMBEDDED_MODEL

_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export(runs: Path, folder: Path) -> None:
    """Write the diffusers folder ``folder`` from the checkpoints in ``runs``."""
    vae_state = torch.load(runs / "vae.pt", weights_only=True)
    unet_state = torch.load(runs / "unet.pt", weights_only=True)
    averaged: dict[str, Tensor] = unet_state["ema"]["shadow"]
    tokenizer = CLIPTokenizer.from_pretrained(runs / "tokenizer")
    text_config = TEXT_CONFIG | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    _write(
        folder / "vae", VAE_CONFIG | {"scaling_factor": round(float(averaged["scale"]), 6)}, vae_state["ema"]["shadow"]
    )
    _write(folder / "unet", UNET_CONFIG, _part(averaged, "unet."))
    _write(folder / "text_encoder", text_config, _part(averaged, "text."), "model.safetensors")
    _write_tokenizer(folder / "tokenizer", tokenizer)
    _json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    _json(folder / "model_index.json", _MODEL_INDEX)
    _json(folder / "made.json", _made(vae_state, unet_state, len(LatentStore(runs / "latents.f16"))))


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _write(
    folder: Path, config: dict[str, Any], state: dict[str, Tensor], name: str = "diffusion_pytorch_model.safetensors"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _json(folder / "config.json", config)
    save_file({key: value.half().contiguous() for key, value in state.items()}, folder / name, {"format": "pt"})


def _write_tokenizer(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """In the files that SD folders have, which every release of transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    _json(folder / "vocab.json", model["vocab"])
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    special = {f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "pad", "unk")}
    _json(folder / "special_tokens_map.json", special)
    _json(
        folder / "tokenizer_config.json",
        special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True},
    )


def _made(vae_state: dict[str, Any], unet_state: dict[str, Any], pictures: int) -> dict[str, Any]:
    parts = {}
    for name, state in (("vae", vae_state), ("unet_and_text_encoder", unet_state)):
        spent = {"steps": state["step"], "samples": state["samples"], "minutes": round(state["seconds"] / 60, 1)}
        parts[name] = spent | state["made"]
    return {"pictures_encoded": pictures} | parts


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder of train_vae and train_unet")
    parser.add_argument("--to", type=Path, default=EMBEDDED_MODEL)
    arguments = parser.parse_args()
    export(arguments.runs, arguments.to)
    total = sum(path.stat().st_size for path in arguments.to.rglob("*.safetensors"))
    print(f"{arguments.to}: {total / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
