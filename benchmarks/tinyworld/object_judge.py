"""Name the object of a picture whatever pattern it carries: the evaluator's picture encoder, trained on for minutes.

The evaluator saw plain objects alone in its training, and takes a white teapot with blue checks for anything but a
teapot. Its trunk has lost the shape by then, so that no head on the frozen trunk is right either (50 to 80 %); here
the trunk learns too. Half of the drawings are plain, half carry a pattern, a quarter the very look of a custom concept;
looks and nouns are drawn independently, so that a pattern never tells the noun.
"""

import copy
import hashlib
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.tinyworld.backgrounds import BACKGROUNDS
from benchmarks.tinyworld.concepts import CONCEPTS
from benchmarks.tinyworld.data import to_tensor
from benchmarks.tinyworld.palette import COLOURS, PLAIN_COLOURS
from benchmarks.tinyworld.patterns import PATTERNS
from benchmarks.tinyworld.scene import FACINGS, POSITIONS, SIZES, Scene, Thing, draw
from benchmarks.tinyworld.train_evaluator import soften
from engine.evaluate.tinyworld import EVALUATOR_PATH, NOUNS, SIDE_PX, Evaluator, load_evaluator

_DRAWINGS, _HELD_OUT = 10_000, 600
_STEPS, _BATCH, _RATE, _WEIGHT_DECAY = 480, 64, 2e-3, 1e-2
Look = tuple[str, str, str]  # colour, pattern, colour of the pattern
CONCEPT_LOOKS: tuple[Look, ...] = tuple((one.colour, one.pattern, one.pattern_colour) for one in CONCEPTS.values())


class ObjectJudge:
    """Says which of the twelve nouns a picture of one object shows.

    Attributes:
        accuracy: share right on held-out plain drawings of all nouns.
    """

    def __init__(self, evaluator: Evaluator, seed: int = 0) -> None:
        self.encoder = copy.deepcopy(evaluator.pictures)
        parameters = [*self.encoder.trunk.parameters(), *self.encoder.nouns.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, _STEPS)
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        pictures, nouns = _examples([_look(rng) for _ in range(_DRAWINGS)], rng)
        for _ in range(_STEPS):
            rows = torch.randint(_DRAWINGS, (_BATCH,), generator=generator)
            loss = F.cross_entropy(self._logits(soften(pictures[rows], generator)), nouns[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        self.encoder.requires_grad_(False)
        rng = random.Random(seed + 1)
        pictures, nouns = _examples([(rng.choice(list(COLOURS)), "", "") for _ in range(_HELD_OUT)], rng)
        self.accuracy = self.share_right(pictures, [NOUNS[i] for i in nouns])

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> list[str]:
        """The noun of each of the pictures (B, 3, 128, 128) in [-1, 1]."""
        return [NOUNS[i] for batch in pictures.split(100) for i in self._logits(batch).argmax(dim=-1)]

    def share_right(self, pictures: Tensor, nouns: list[str]) -> float:
        """How many of such pictures it calls by their noun."""
        return sum(seen == noun for seen, noun in zip(self(pictures), nouns, strict=True)) / len(nouns)

    def _logits(self, pictures: Tensor) -> Tensor:
        pictures = F.adaptive_avg_pool2d(pictures, SIDE_PX)
        detail = pictures.new_zeros(len(pictures), 1, SIDE_PX, SIDE_PX)
        return self.encoder.nouns(self.encoder.trunk(torch.cat([pictures, detail], dim=1))).flatten(2).logsumexp(dim=-1)


def object_judge(folder: Path) -> ObjectJudge:
    """The judge, from ``folder`` if it is there: trained from this very code and evaluator."""
    made_of = Path(__file__).read_bytes() + EVALUATOR_PATH.read_bytes()
    path = folder / f"object-judge-{hashlib.sha256(made_of).hexdigest()[:12]}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(ObjectJudge(load_evaluator()), path)
    return torch.load(path, weights_only=False)


def other_objects(name: str, seed: int = 2) -> tuple[Tensor, list[str]]:
    """Drawings of the eleven other nouns in the look of one concept, six of each, and their nouns."""
    one = CONCEPTS[name]
    nouns = [noun for noun in NOUNS if noun != one.noun for _ in range(6)]
    rng = random.Random(f"{name}:{seed}")
    return to_tensor([_drawing(noun, (one.colour, one.pattern, one.pattern_colour), rng) for noun in nouns]), nouns


def _look(rng: random.Random) -> Look:
    if rng.random() < 0.5:
        return rng.choice(list(COLOURS)), "", ""
    if rng.random() < 0.5:
        return rng.choice(CONCEPT_LOOKS)
    colour, pattern_colour = rng.sample(list(COLOURS), 2)
    pattern = rng.choice(list(PATTERNS))
    return colour, pattern, "" if pattern == "rainbow" else pattern_colour


def _examples(looks: list[Look], rng: random.Random) -> tuple[Tensor, Tensor]:
    """One drawing per look, the nouns in turn; pictures (B, 3, 128, 128), and indices of their nouns."""
    drawings = [_drawing(NOUNS[i % len(NOUNS)], look, rng) for i, look in enumerate(looks)]
    return to_tensor(drawings), torch.arange(len(looks)) % len(NOUNS)


def _drawing(noun: str, look: Look, rng: random.Random) -> Image.Image:
    colour, pattern, pattern_colour = look
    background = rng.choice(BACKGROUNDS)
    plain = rng.choice([name for name in PLAIN_COLOURS if name != colour]) if background == "plain" else ""
    where = {"size": rng.choice(SIZES), "facing": rng.choice(FACINGS), "position": rng.choice(POSITIONS)}
    seed = rng.getrandbits(32)
    thing = Thing(noun, colour, **where, seed=seed, pattern=pattern, pattern_colour=pattern_colour)
    return draw(Scene((thing,), background, plain, "photo", seed))
