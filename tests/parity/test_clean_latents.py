"""Clean latents on the way against what diffusers' schedulers call ``pred_original_sample``."""

import functools
import json

import pytest
import torch

import engine
from tests.pipelines import SCHEDULERS, SD_V1_5_SCHEDULER, relative_error, save_pipeline

_TOLERANCE = 1e-3  # they are read off the step, which in some was small


def _watched(sd: engine.Engine, sampler: str) -> list[torch.Tensor]:
    seen = []
    sd.generate(
        "a cat",
        sampler=sampler,
        steps=5,
        seed=3,
        guidance_scale=8.0,
        output="latent",
        progress=False,
        callback=lambda _i, _n, latents: seen.append(latents.clone()),
        callback_latents="clean",
    )
    return seen


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral", "ddpm"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_as_diffusers_schedulers_have_it(tmp_path, sampler: str, prediction_type: str, agrees) -> None:
    pipeline = save_pipeline("narrow", tmp_path)
    config = SD_V1_5_SCHEDULER | {"prediction_type": prediction_type}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    scheduler, own = SCHEDULERS[sampler]
    pipeline.scheduler = scheduler.from_config(config, **own)
    expected, real = [], pipeline.scheduler.step

    @functools.wraps(real)  # the pipeline looks at its signature
    def noting(*arguments, **options):
        out = real(*arguments, **options | {"return_dict": True})
        expected.append(out.pred_original_sample.clone())
        return (out.prev_sample,)

    pipeline.scheduler.step = noting
    generator = torch.Generator().manual_seed(3)
    pipeline("a cat", num_inference_steps=5, guidance_scale=8.0, generator=generator, output_type="latent")
    seen = _watched(engine.load(tmp_path), sampler)
    for latents, theirs in zip(seen, expected, strict=True):
        error = relative_error(latents, theirs)
        agrees("clean latents on the way", "pred_original_sample of its schedulers", error, _TOLERANCE)
