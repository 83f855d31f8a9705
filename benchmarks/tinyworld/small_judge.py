"""A judge of looks for a first look at the study: the same network and world, a third of the drawings and steps.

It is right less often than ``look_judge``'s, so that its verdicts do not go with the study's.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import torch

from benchmarks.tinyworld import look_judge
from benchmarks.tinyworld.look_judge import LookJudge
from engine.evaluate.tinyworld import EVALUATOR_PATH, load_evaluator
from engine.loading import load

_DRAWINGS, _STEPS = 8000, 800
_RECONSTRUCTED, _VAE_STEPS = 2000, 200


def train_small_judge(seed: int = 0) -> LookJudge:
    """As ``look_judge.train_look_judge``, in a third of its time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge = LookJudge(load_evaluator())
    rng, vae, rate = random.Random(seed), load().vae, look_judge._RATE
    look_judge._train(judge, [look_judge._scene(rng) for _ in range(_DRAWINGS)], _STEPS, rate, seed, None)
    look_judge._train(judge, [look_judge._scene(rng) for _ in range(_RECONSTRUCTED)], _VAE_STEPS, rate / 4, seed, vae)
    judge.requires_grad_(False)
    judge.accuracy = look_judge._accuracy(judge, vae, random.Random(seed + 1))
    return judge


def small_judge(folder: Path) -> LookJudge:
    """The judge, from ``folder`` if it is there: trained from this very code and evaluator."""
    made_of = b"".join(Path(path).read_bytes() for path in (__file__, look_judge.__file__, EVALUATOR_PATH))
    path = folder / f"small-judge-{hashlib.sha256(made_of).hexdigest()[:12]}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(train_small_judge(), path)
    return torch.load(path, weights_only=False)
