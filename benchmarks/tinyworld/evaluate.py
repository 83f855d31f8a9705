"""Measure how well a model draws what its prompts say: ``python -m benchmarks.tinyworld.evaluate``.

Fresh held-out scenes become prompts, the model draws them, and the evaluator names what it sees. The evaluator's own
accuracy stands beside: on drawings of the very same scenes, on these drawings after the model's VAE, and on 2000
held-out drawings. Intervals are 95 % bootstrap intervals over prompts.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from benchmarks.machine import RESULTS, machine, write_result
from benchmarks.tinyworld.captions import FACING_NOUNS, full_prompt
from benchmarks.tinyworld.data import HELD_OUT_SEED, pictures_at, scene_at, to_tensor
from benchmarks.tinyworld.scene import Scene
from engine.evaluate.tinyworld import EVALUATOR_PATH, Attributes, Evaluator, load_evaluator
from engine.observe.sheet import grid

if TYPE_CHECKING:
    from engine import Engine
    from engine.models.tiny_vae import VAE

FIRST_PROMPT = 20_000  # held-out scenes below are looked at while models are trained
PROMPTED: tuple[str, ...] = ("object", "only_object", "colour", "background", "style", "all")

_DRAWINGS = 2000
_PSNR_PICTURES = 200
_RESAMPLES = 10_000
_SHEET_PICTURES = 100


def judge(seen: Attributes, scene: Scene) -> dict[str, bool]:
    """What of a scene the evaluator found in its picture.

    - object: the noun seen most certainly is the scene's; of two, both are seen.
    - only_object: the nouns seen are exactly the scene's.
    - colour, size, facing, position: right for every noun of the scene; facing only where captions may say it.
    - background, style: right for the picture.
    - all: object, colour, background and style together.
    """
    nouns = [thing.object for thing in scene.things]
    found = set(nouns) <= set(seen.objects) if len(nouns) == 2 else next(iter(seen.confidence)) == nouns[0]
    right = {
        "object": found,
        "only_object": set(nouns) == set(seen.objects),
        "colour": all(seen.colour[thing.object] == thing.colour for thing in scene.things),
        "size": all(seen.size[thing.object] == thing.size for thing in scene.things),
        "position": all(seen.position[thing.object] == thing.position for thing in scene.things),
        "background": seen.background == scene.background,
        "style": seen.style == scene.style,
    }
    if set(nouns) <= set(FACING_NOUNS):
        right["facing"] = all(seen.facing[thing.object] == thing.facing for thing in scene.things)
    return right | {"all": all(right[name] for name in ("object", "colour", "background", "style"))}


def score(pictures: Tensor, scenes: Sequence[Scene], evaluator: Evaluator) -> dict[str, list[bool]]:
    """Judge pictures (B, 3, 128, 128) in [-1, 1], each by its scene; "facing" may have fewer verdicts than others."""
    verdicts: dict[str, list[bool]] = {}
    for seen, scene in zip(evaluator.classify(pictures), scenes, strict=True):
        for name, right in judge(seen, scene).items():
            verdicts.setdefault(name, []).append(right)
    return verdicts


def interval(verdicts: Sequence[bool], resamples: int = _RESAMPLES) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the share of true verdicts."""
    n_verdicts, n_right = len(verdicts), sum(verdicts)
    draws = np.random.default_rng(0).binomial(n_verdicts, n_right / n_verdicts, resamples)  # resampling of booleans
    low, high = np.quantile(draws / n_verdicts, (0.025, 0.975))
    return float(low), float(high)


def summary(verdicts: Mapping[str, Sequence[bool]], names: Sequence[str] = PROMPTED) -> dict[str, dict[str, Any]]:
    """Share right, its interval and the number of pictures, per attribute."""
    return {
        name: {
            "accuracy": sum(verdicts[name]) / len(verdicts[name]),
            "interval": interval(verdicts[name]),
            "n": len(verdicts[name]),
        }
        for name in names
    }


def psnr_db(reconstructed: Tensor, pictures: Tensor) -> float:
    """Mean over pictures of the PSNR in dB, for a signal range of 2."""
    error = (reconstructed.clamp(-1, 1) - pictures).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())


@torch.no_grad()
def reconstruct(vae: "VAE", pictures: Tensor) -> Tensor:
    """decode(encode(x)) as float32 on the CPU."""
    device = next(vae.parameters()).device
    rows = [vae.decode(vae.encode(rows.to(device))) for rows in pictures.split(16)]
    return torch.cat(rows).float().cpu()


def draw_prompts(
    engine: "Engine", prompts: Sequence[str], settings: dict[str, Any], batch: int = 20
) -> list[Image.Image]:
    """Generate one picture per prompt; prompt i has seed ``settings["seed"] + i``."""
    images = []
    start = time.perf_counter()
    for i in range(0, len(prompts), batch):
        result = engine.generate(
            prompts[i : i + batch],
            steps=settings["steps"],
            sampler=settings["sampler"],
            guidance_scale=settings["guidance_scale"],
            seed=settings["seed"] + i,
            progress=False,
        )
        images += result.images
        print(f"{len(images)} of {len(prompts)} pictures, {time.perf_counter() - start:.0f} s", flush=True)
    return images


def evaluate(
    engine: "Engine", evaluator: Evaluator, settings: dict[str, Any]
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Measure a model.

    Args:
        engine: what draws.
        evaluator: what judges.
        settings: "prompts" (how many), "steps", "sampler", "guidance_scale" and "seed".

    Returns:
        Results as JSON holds them, and the generated pictures framed green where all is right and red elsewhere.
    """
    indices = range(FIRST_PROMPT, FIRST_PROMPT + settings["prompts"])
    scenes = [scene_at(index, HELD_OUT_SEED) for index in indices]
    start = time.perf_counter()
    images = draw_prompts(engine, [full_prompt(scene) for scene in scenes], settings)
    seconds = time.perf_counter() - start
    drawn = pictures_at(indices, HELD_OUT_SEED)
    held_out = range(_DRAWINGS)
    generated = score(to_tensor(images), scenes, evaluator)
    results = {
        "generated": summary(generated),
        "drawn": summary(score(drawn, scenes, evaluator)),
        "reconstructed": summary(score(reconstruct(engine.vae, drawn), scenes, evaluator)),
        "held_out": summary(
            score(pictures_at(held_out, HELD_OUT_SEED), [scene_at(i, HELD_OUT_SEED) for i in held_out], evaluator)
        ),
        "caption_similarity": _similarities(evaluator, to_tensor(images), drawn, scenes),
        "seconds_per_picture": seconds / len(images),
    }
    pictures = pictures_at(range(_PSNR_PICTURES), HELD_OUT_SEED)
    results["vae_psnr_db"] = psnr_db(reconstruct(engine.vae, pictures), pictures)
    frames = zip(images, generated["all"], strict=True)
    return results, [ImageOps.expand(image, 4, "green" if right else "red") for image, right in frames]


def table(results: Mapping[str, Any]) -> str:
    """The accuracies as text, in per cent."""
    columns = ("generated", "drawn", "reconstructed", "held_out")
    lines = [f"{'right, %':12}" + "".join(f"{column.replace('_', ' '):>26}" for column in columns)]
    for name in PROMPTED:
        cells = [_cell(results[column][name]) for column in columns]
        lines.append(f"{name.replace('_', ' '):12}" + "".join(f"{cell:>26}" for cell in cells))
    similarity = results["caption_similarity"]
    lines.append(f"VAE reconstruction: {results['vae_psnr_db']:.2f} dB PSNR")
    lines.append(f"similarity to the prompt: {similarity['generated']:.3f} generated, {similarity['drawn']:.3f} drawn")
    return "\n".join(lines)


def _similarities(evaluator: Evaluator, generated: Tensor, drawn: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Mean cosine similarity of pictures and their prompts."""
    texts = evaluator.embed_texts([full_prompt(scene) for scene in scenes])
    kinds = {"generated": generated, "drawn": drawn}
    return {name: float((evaluator.embed_pictures(x) * texts).sum(dim=1).mean()) for name, x in kinds.items()}


def _cell(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="diffusers folder; the embedded model where not given")
    parser.add_argument("--evaluator", type=Path, default=EVALUATOR_PATH, help="weights of the evaluator")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--guidance-scale", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture")
    parser.add_argument("--out", type=Path, default=RESULTS / "tinyworld.json", help="JSON file for the results")
    parser.add_argument("--sheet", type=Path, help="PNG file for the first hundred pictures, framed by right and wrong")
    arguments = parser.parse_args()

    import engine

    model = engine.load(arguments.model)
    names = ("prompts", "guidance_scale", "steps", "sampler", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    settings |= {"model": model.name, "device": str(model.device), "dtype": str(model.dtype)}
    results, frames = evaluate(model, load_evaluator(arguments.evaluator), settings)
    print(table(results))
    write_result(arguments.out, machine(str(model.device)), {"settings": settings, "results": results})
    if arguments.sheet:
        grid(frames[:_SHEET_PICTURES], columns=10).save(arguments.sheet)


if __name__ == "__main__":
    main()
