"""SD v1.5 at its full size, with random weights: loading, one guided step, a decode and a short trajectory."""

import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
import pytest
import torch

import engine
from benchmarks.systems import full_size_folder
from tests.pipelines import relative_error

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> Path:
    return full_size_folder(Path(tempfile.gettempdir()) / "sd15-random")


def test_peak_memory(folder: Path) -> None:
    """In a process of its own: the peak that loading adds is at most 1.15 times the weights."""
    code = f"""
import resource, torch, engine, transformers
from engine.loading import load
transformers.CLIPTextModel, transformers.CLIPTokenizer
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sd = load({str(folder)!r})
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(grown / sum(p.numel() * 4 for m in (sd.unet, sd.vae, sd.text_encoder.model) for p in m.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1.15


@torch.no_grad()
def test_against_diffusers(folder: Path) -> None:
    sd = engine.load(folder)
    assert sum(p.numel() for p in sd.unet.parameters()) == 859_520_964

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["", "a photo of a cat"]
    context = sd.encode_prompt(prompts)
    assert relative_error(context, pipeline.encode_prompt(prompts, "cpu", 1, False)[0]) <= 2e-5

    sample = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([801, 1])
    expected = pipeline.unet(sample, timesteps, context).sample
    assert relative_error(sd.unet(sample, timesteps, context), expected) <= 2e-5

    expected = pipeline.vae.decode(sample[:1]).sample
    assert relative_error(sd.vae.decode(sample[:1]), expected) <= 2e-5
    posterior = pipeline.vae.encode(expected.clamp(-1, 1)).latent_dist
    assert relative_error(sd.vae.encode(expected.clamp(-1, 1)), posterior.mean) <= 2e-5

    expected = pipeline(
        "a photo of a cat",
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    out = sd.generate("a photo of a cat", steps=3, guidance_scale=7.5, seed=0, output="latent", progress=False)
    assert relative_error(out.latents, expected) <= 2e-4
