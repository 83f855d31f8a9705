"""Train the tinyworld evaluator: ``python -m benchmarks.tinyworld.train_evaluator --out RUNS --minutes 8``.

Cross-entropy on every attribute, and the symmetric contrastive loss of CLIP (Radford et al. 2021, arXiv:2103.00020)
between pictures and captions. Pictures are drawn as training goes, and softened so that the judge of imperfect
pictures has seen some. The averaged weights are written to ``evaluator.safetensors``.
"""

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tinyworld.captions import FACING_NOUNS, caption, full_prompt
from benchmarks.tinyworld.data import HELD_OUT_SEED, pictures_at, scene_at
from benchmarks.tinyworld.evaluate import machine, score
from benchmarks.tinyworld.scene import Scene
from benchmarks.tinyworld.training import EMA, Run
from engine.evaluate.tinyworld import (
    NOUNS,
    PICTURE_CHOICES,
    SIDE_PX,
    THING_CHOICES,
    Evaluator,
    Logits,
    load_evaluator,
    save_evaluator,
    tokenize,
)

_IGNORED = -100
_CONTRASTIVE_WEIGHT = 0.5
_MAX_LOG_SCALE = 4.6  # similarities are multiplied by at most 100
_CANDIDATES = 50


def losses(logits: Logits, scenes: list[Scene]) -> dict[str, Tensor]:
    """The classification loss of every attribute; a thing's attributes count at its own noun alone."""
    places = [(row, thing) for row, scene in enumerate(scenes) for thing in scene.things]
    rows = torch.tensor([row for row, _ in places])
    nouns = torch.tensor([NOUNS.index(thing.object) for _, thing in places])
    present = torch.zeros_like(logits.objects)
    present[rows, nouns] = 1
    loss = {"object": 6 * F.binary_cross_entropy_with_logits(logits.objects, present)}
    for name, choices in THING_CHOICES.items():
        targets = [choices.index(getattr(thing, name)) for _, thing in places]
        if name == "facing":
            pairs = zip(targets, places, strict=True)
            targets = [target if thing.object in FACING_NOUNS else _IGNORED for target, (_, thing) in pairs]
        loss[name] = F.cross_entropy(logits.things[name][rows, nouns], torch.tensor(targets), ignore_index=_IGNORED)
    for name, choices in PICTURE_CHOICES.items():
        targets = torch.tensor([choices.index(getattr(scene, name)) for scene in scenes])
        loss[name] = F.cross_entropy(logits.picture[name], targets)
    return loss


def contrastive_loss(pictures: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss: each picture finds its caption among the batch's, and each caption its picture."""
    similarities = scale * pictures @ texts.T
    targets = torch.arange(len(pictures))
    return (F.cross_entropy(similarities, targets) + F.cross_entropy(similarities.T, targets)) / 2


def soften(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Average drawings down to the evaluator's side and make them as imperfect as generations.

    Three quarters are blurred by scaling them down and up; all are shifted in tone, and get some noise.
    """
    pictures = F.adaptive_avg_pool2d(pictures, SIDE_PX)
    quarters = list(pictures.tensor_split(4))
    for i, quarter in enumerate(quarters[:3]):
        small = int(torch.randint(32, 60, (), generator=generator))
        softened = F.interpolate(quarter, size=small, mode="bilinear", antialias=i > 0)
        quarters[i] = F.interpolate(softened, size=SIDE_PX, mode="bicubic" if i == 2 else "bilinear")
    pictures = torch.cat(quarters)
    B = len(pictures)
    gain = 1 + 0.06 * torch.randn((B, 1, 1, 1), generator=generator)
    shift = 0.03 * torch.randn((B, 3, 1, 1), generator=generator)
    strength = 0.1 * torch.rand((B, 1, 1, 1), generator=generator).square()
    noise = strength * torch.randn(pictures.shape, generator=generator)
    return (pictures * gain + shift + noise).clamp(-1, 1)


def check(evaluator: Evaluator, pictures: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Share right per attribute, and how often a picture finds its own prompt among 50."""
    verdicts = score(pictures, scenes, evaluator)
    embedded = evaluator.embed_pictures(pictures).split(_CANDIDATES)
    prompts = evaluator.embed_texts([full_prompt(scene) for scene in scenes]).split(_CANDIDATES)
    nearest = [(rows @ texts.T).argmax(dim=1) for rows, texts in zip(embedded, prompts, strict=True)]
    hits = torch.cat([found == torch.arange(len(found)) for found in nearest])
    return {name: sum(rights) / len(rights) for name, rights in verdicts.items()} | {
        "prompt_of_50": float(hits.float().mean())
    }


def train(folder: Path, minutes: float, batch: int, peak_rate: float) -> None:
    torch.manual_seed(0)
    model = Evaluator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = EMA(model, 0.995)
    run = Run(folder, "evaluator", minutes, {"model": model, "optimizer": optimizer, "ema": ema})
    check_pictures = pictures_at(range(500), HELD_OUT_SEED)
    check_scenes = [scene_at(index, HELD_OUT_SEED) for index in range(500)]
    while not run.finished:
        rng, generator = random.Random(run.step), torch.Generator().manual_seed(run.step)
        indices = range(run.samples, run.samples + batch)
        scenes = [scene_at(index) for index in indices]
        pictures = soften(pictures_at(indices), generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pictures)
        texts = model.captions(tokenize([caption(scene, rng) for scene in scenes]))
        parts = losses(logits, scenes)
        parts["contrastive"] = _CONTRASTIVE_WEIGHT * contrastive_loss(logits.embedding, texts, model.log_scale.exp())
        for group in optimizer.param_groups:
            group["lr"] = run.rate(peak_rate)
        torch.stack(list(parts.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.log_scale.clamp_(max=_MAX_LOG_SCALE)
        ema.update(model)
        if run.advance(batch):
            with ema.applied(model):
                run.log(loss=float(sum(parts.values())), **check(model, check_pictures, check_scenes))
    with ema.applied(model):
        export(model, folder / "evaluator.safetensors", run)


def export(model: Evaluator, path: Path, run: Run) -> None:
    """Write the weights, read them back and print their accuracy on 2000 held-out drawings."""
    origin = machine() | {"samples": str(run.samples), "minutes": f"{run.seconds / 60:.1f}"}
    save_evaluator(model, path, origin)
    scenes = [scene_at(index, HELD_OUT_SEED) for index in range(2000)]
    accuracies = check(load_evaluator(path), pictures_at(range(2000), HELD_OUT_SEED), scenes)
    path.with_suffix(".json").write_text(json.dumps(origin | accuracies, indent=1) + "\n")
    print(json.dumps(origin | accuracies, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and weights")
    parser.add_argument("--minutes", type=float, default=8.0, help="length of the whole run, earlier parts included")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.out, arguments.minutes, arguments.batch, arguments.rate)


if __name__ == "__main__":
    main()
