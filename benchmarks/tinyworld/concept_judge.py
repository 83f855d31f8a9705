"""Tell a custom concept from every other object of its noun: a small head on the frozen evaluator.

It is trained when it is needed, in seconds, on drawings of the concept in random contexts against drawings of the same
noun in every colour, a quarter of them in the concept's own, so that a colour alone never passes for the pattern.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tinyworld.backgrounds import BACKGROUNDS
from benchmarks.tinyworld.concepts import CONCEPTS, draw_concept
from benchmarks.tinyworld.data import to_tensor
from benchmarks.tinyworld.palette import COLOURS
from benchmarks.tinyworld.scene import FACINGS, POSITIONS, SIZES, Scene, Thing, draw
from benchmarks.tinyworld.train_evaluator import soften
from engine.evaluate.tinyworld import NOUNS, SIDE_PX, Evaluator

_DRAWINGS, _HELD_OUT = 1200, 400
_STEPS, _RATE, _WEIGHT_DECAY = 400, 2e-3, 1e-3


class ConceptJudge:
    """Says of pictures whether they show one concept.

    Attributes:
        accuracy: share right on held-out drawings, half of them of the concept.
    """

    def __init__(self, name: str, evaluator: Evaluator, seed: int = 0) -> None:
        self.noun = NOUNS.index(CONCEPTS[name].noun)
        self.evaluator = evaluator
        features, labels = self._examples(name, _DRAWINGS, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = nn.Sequential(nn.Linear(features.shape[1], 64), nn.ReLU(), nn.Linear(64, 1))
        self.mean, self.std = features.mean(dim=0), features.std(dim=0) + 1e-6
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=_RATE, weight_decay=_WEIGHT_DECAY)
        for _ in range(_STEPS):
            loss = F.binary_cross_entropy_with_logits(self._logits(features), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        held_out, truth = self._examples(name, _HELD_OUT, seed + 1)
        with torch.no_grad():
            self.accuracy = float(((self._logits(held_out) > 0) == (truth > 0.5)).float().mean())

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> list[bool]:
        """Whether each of the pictures (B, 3, 128, 128) in [-1, 1] shows the concept."""
        return (self._logits(self._features(pictures)) > 0).tolist()

    def _logits(self, features: Tensor) -> Tensor:
        return self.head((features - self.mean) / self.std)[:, 0]

    @torch.no_grad()
    def _features(self, pictures: Tensor) -> Tensor:
        """What the evaluator's trunk holds where it sees the noun, and its strongest response anywhere."""
        encoder, rows = self.evaluator.pictures, []
        for batch in F.adaptive_avg_pool2d(pictures, SIDE_PX).split(100):
            detail = pictures.new_zeros(len(batch), 1, SIDE_PX, SIDE_PX)
            x = encoder.trunk(torch.cat([batch, detail], dim=1))
            weights = encoder.nouns(x)[:, self.noun].flatten(1).softmax(dim=-1)
            x = x.flatten(2)
            rows.append(torch.cat([(x * weights[:, None]).sum(dim=-1), x.amax(dim=-1)], dim=1))
        return torch.cat(rows)

    def _examples(self, name: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
        rng, drawings = random.Random(f"{name}:{seed}"), []
        for i in range(count):
            context = {
                "size": rng.choice(SIZES),
                "facing": rng.choice(FACINGS),
                "position": rng.choice(POSITIONS),
                "seed": rng.getrandbits(32),
            }
            background = rng.choice(BACKGROUNDS)
            if i % 2 == 0:
                drawings.append(draw_concept(name, background, **context))
            else:
                concept = CONCEPTS[name]
                colour = concept.colour if rng.random() < 0.25 else rng.choice(list(COLOURS))
                plain = "blue" if background == "plain" else ""
                thing = Thing(concept.noun, colour, **context)
                drawings.append(draw(Scene((thing,), background, plain, "photo", context["seed"])))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))  # soften treats quarters unlike
        pictures = soften(to_tensor(drawings)[order], torch.Generator().manual_seed(seed))
        return self._features(pictures), (order % 2 == 0).float()
