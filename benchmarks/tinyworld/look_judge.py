"""What a picture's object looks like: its noun, colour, pattern and silhouette, for whatever pattern it carries.

The evaluator saw plain objects alone in its training: a white teapot with blue checks is anything but a teapot to it.
Its picture encoder is trained on here for minutes, trunk and all. Nouns, colours and patterns are drawn independently,
so that none tells another: a custom concept is "seen" only where colour, pattern and the pattern's colour are its own,
and whether its noun is right is a question apart.
"""

import copy
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tinyworld.backgrounds import BACKGROUNDS
from benchmarks.tinyworld.concepts import CONCEPTS
from benchmarks.tinyworld.data import to_tensor
from benchmarks.tinyworld.evaluate import reconstruct
from benchmarks.tinyworld.objects import ANIMALS
from benchmarks.tinyworld.palette import COLOURS, PLAIN_COLOURS
from benchmarks.tinyworld.patterns import PATTERNS
from benchmarks.tinyworld.scene import EXTRAS, FACINGS, POSITIONS, SIZES, STYLES, Scene, Thing, draw, silhouettes
from benchmarks.tinyworld.train_evaluator import soften
from engine.evaluate.tinyworld import EVALUATOR_PATH, NOUNS, SIDE_PX, Evaluator, load_evaluator
from engine.loading import load
from engine.models.tiny_vae import VAE

CELLS = 16  # side of the grid of a silhouette
_DRAWINGS, _HELD_OUT, _RECONSTRUCTED = 24_000, 1200, 6000
_STEPS, _VAE_STEPS, _BATCH, _RATE, _WEIGHT_DECAY = 2500, 600, 64, 2e-3, 1e-2
_CHOICES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "pattern": ("", *PATTERNS),
    "pattern_colour": ("", *COLOURS),
}
_TWO, _EXTRA = 0.15, 0.2  # shares of scenes
_HATS = tuple(ANIMALS)


@dataclass(frozen=True, slots=True)
class Look:
    """What is seen of one picture.

    Attributes:
        noun: the likeliest.
        looks: per noun, (colour, pattern, colour of the pattern) as if it were in the picture.
        chances: per noun, the probability of each colour, pattern and colour of the pattern.
        silhouette: (CELLS, CELLS) in [0, 1], how much of each cell the objects cover.
    """

    noun: str
    looks: dict[str, tuple[str, ...]]
    chances: dict[str, tuple[dict[str, float], ...]]
    silhouette: Tensor

    def shows(self, concept: str) -> bool:
        """Whether its object wears the concept's look: on the concept's noun, or on what took its place."""
        one = CONCEPTS[concept]
        return (one.colour, one.pattern, one.pattern_colour) in {self.looks[one.noun], self.looks[self.noun]}

    def likeness(self, concept: str) -> float:
        """In [0, 1]: the mean probability of the concept's colour, pattern and colour of the pattern."""
        one = CONCEPTS[concept]
        own = (one.colour, one.pattern, one.pattern_colour)
        return max(
            sum(chance[word] for chance, word in zip(self.chances[noun], own, strict=True)) / len(own)
            for noun in (one.noun, self.noun)
        )


class LookJudge(nn.Module):
    """The evaluator's trunk with heads for nouns, looks and silhouettes.

    Attributes:
        accuracy: share right on held-out drawings of one object after the VAE, by question.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__()
        self.trunk, self.nouns = copy.deepcopy(evaluator.pictures.trunk), copy.deepcopy(evaluator.pictures.nouns)
        self.requires_grad_(True)
        width = self.nouns.in_channels
        self.heads = nn.Conv2d(width, sum(map(len, _CHOICES.values())), 1)
        self.cover = nn.Sequential(nn.Conv2d(width, 4, 1), nn.PixelShuffle(2))
        self.accuracy: dict[str, float] = {}

    def forward(self, pictures: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Logits of nouns (B, nouns), of each choice (B, nouns, choices), and of silhouettes (B, CELLS, CELLS)."""
        pictures = F.adaptive_avg_pool2d(pictures, SIDE_PX)
        x = self.trunk(F.pad(pictures, (0, 0, 0, 0, 0, 1)))  # without the evaluator's channel of fine detail
        places = self.nouns(x).flatten(2)
        said = places.softmax(dim=-1) @ self.heads(x).flatten(2).transpose(1, 2)
        choices = said.split([len(names) for names in _CHOICES.values()], dim=-1)
        return places.logsumexp(dim=-1), choices, self.cover(x)[:, 0]

    @torch.no_grad()
    def see(self, pictures: Tensor) -> list[Look]:
        """What is seen of each of the pictures (B, 3, 128, 128) in [-1, 1]."""
        return [look for batch in pictures.split(100) for look in _looks(*self(batch))]


def _looks(nouns: Tensor, choices: tuple[Tensor, ...], cover: Tensor) -> list[Look]:
    shares = [one.softmax(dim=-1).tolist() for one in choices]
    found = []
    for i, noun in enumerate(nouns.argmax(dim=-1).tolist()):
        chances = {
            name: tuple(
                dict(zip(words, rows[i][k], strict=True)) for words, rows in zip(_CHOICES.values(), shares, strict=True)
            )
            for k, name in enumerate(NOUNS)
        }
        looks = {name: tuple(max(one, key=one.__getitem__) for one in chance) for name, chance in chances.items()}
        found.append(Look(NOUNS[noun], looks, chances, cover[i].sigmoid()))
    return found


def train_look_judge(seed: int = 0) -> LookJudge:
    """Minutes on a CPU."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge = LookJudge(load_evaluator())
    rng = random.Random(seed)
    _train(judge, [_scene(rng) for _ in range(_DRAWINGS)], _STEPS, _RATE, seed, None)
    return through_vae(judge, load().vae, seed)


def through_vae(judge: LookJudge, vae: VAE, seed: int = 0) -> LookJudge:
    """Go on with pictures as a VAE gives them back, which is how generated ones look: it blurs stripes and spots."""
    rng = random.Random(f"vae:{seed}")
    _train(judge, [_scene(rng) for _ in range(_RECONSTRUCTED)], _VAE_STEPS, _RATE / 4, seed, vae)
    judge.requires_grad_(False)
    judge.accuracy = _accuracy(judge, vae, random.Random(seed + 1))
    return judge


def _train(judge: LookJudge, scenes: Sequence[Scene], steps: int, rate: float, seed: int, vae: VAE | None) -> None:
    """Some steps on drawings of scenes, half of them through a VAE where one is given."""
    judge.requires_grad_(True)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=rate, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    parts = []
    for first in range(0, len(scenes), 500):
        drawn = to_tensor([draw(scene) for scene in scenes[first : first + 500]])
        if vae is not None and first >= len(scenes) / 2:
            drawn = reconstruct(vae, drawn).clamp(-1, 1)
        parts.append((127.5 * F.adaptive_avg_pool2d(drawn, SIDE_PX)).round().to(torch.int8))
    small, covers = torch.cat(parts), torch.stack([_cover(scene) for scene in scenes])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(scenes), (_BATCH,), generator=generator).tolist()
        pictures = small[rows].float() / 127.5
        seen = judge(soften(pictures, generator) if vae is None else pictures)
        _loss(seen, [scenes[i] for i in rows], covers[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def look_judge(folder: Path) -> LookJudge:
    """The judge, from ``folder`` if it is there: trained from this very code and evaluator."""
    made_of = Path(__file__).read_bytes() + EVALUATOR_PATH.read_bytes()
    path = folder / f"look-judge-{hashlib.sha256(made_of).hexdigest()[:12]}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(train_look_judge(), path)
    return torch.load(path, weights_only=False)


def overlap(one: Tensor, other: Tensor) -> float:
    """Of two silhouettes, what both cover over what either covers (intersection over union)."""
    return float(torch.minimum(one, other).sum() / torch.maximum(one, other).sum().clamp(min=1e-6))


def _loss(seen: tuple[Tensor, tuple[Tensor, ...], Tensor], scenes: Sequence[Scene], covers: Tensor) -> Tensor:
    nouns, choices, cover = seen
    places = [(row, thing) for row, scene in enumerate(scenes) for thing in scene.things]
    rows = torch.tensor([row for row, _ in places])
    things = torch.tensor([NOUNS.index(thing.object) for _, thing in places])
    loss = F.cross_entropy(nouns[rows], things) + F.binary_cross_entropy_with_logits(cover, covers)
    for (name, words), logits in zip(_CHOICES.items(), choices, strict=True):
        targets = torch.tensor([words.index(getattr(thing, name)) for _, thing in places])
        loss = loss + F.cross_entropy(logits[rows, things], targets)
    return loss


def _scene(rng: random.Random) -> Scene:
    """One object, or two small ones side by side, of any looks in any style."""
    background, style, seed = rng.choice(BACKGROUNDS), rng.choices(STYLES, (70, 15, 15))[0], rng.getrandbits(32)
    nouns = rng.sample(NOUNS, 2)
    if rng.random() < _TWO:
        places = [(nouns[0], "small", "left", ""), (nouns[1], "small", "right", "")]
    else:
        extra = rng.choice(EXTRAS) if rng.random() < _EXTRA else ""
        places = [(nouns[0], rng.choice(SIZES), rng.choice(POSITIONS), extra)]
    things = []
    for noun, size, position, extra in places:
        colour, pattern, pattern_colour = _look(rng)
        worn = "" if extra == "hat" and noun not in _HATS else extra
        look = {"pattern": pattern, "pattern_colour": pattern_colour}
        things.append(Thing(noun, colour, size, rng.choice(FACINGS), position, worn, rng.getrandbits(32), **look))
    plain = rng.choice([c for c in PLAIN_COLOURS if c != things[0].colour]) if background == "plain" else ""
    return Scene(tuple(things), background, plain, style, seed)


def _look(rng: random.Random) -> tuple[str, str, str]:
    """A quarter plain; else a pattern at random, in colours at random or, half of the time, in some concept's.

    Patterns never depend on colours: a judge that took a concept's colours for its pattern would be wrong.
    """
    colour, pattern_colour = rng.sample(list(COLOURS), 2)
    if rng.random() < 0.5:
        one = rng.choice(list(CONCEPTS.values()))
        colour = one.colour
        pattern_colour = one.pattern_colour or rng.choice([name for name in COLOURS if name != colour])
        if rng.random() < 0.5:  # one of the two is another concept's colour, or any
            pattern_colour = rng.choice([name for name in COLOURS if name != colour])
    if rng.random() < 0.25:
        return colour, "", ""
    pattern = rng.choice(list(PATTERNS))
    return colour, pattern, "" if pattern == "rainbow" else pattern_colour


def _cover(scene: Scene) -> Tensor:
    """(CELLS, CELLS) in [0, 1]: the union of its things."""
    return torch.from_numpy(silhouettes(scene, CELLS).max(axis=0)).float() / 255


def _accuracy(judge: LookJudge, vae: VAE, rng: random.Random) -> dict[str, float]:
    scenes = [_scene(rng) for _ in range(_HELD_OUT)]
    scenes = [scene for scene in scenes if len(scene.things) == 1]
    pictures = reconstruct(vae, to_tensor([draw(scene) for scene in scenes]))
    seen, things = judge.see(pictures), [scene.things[0] for scene in scenes]
    share = {"noun": [look.noun == thing.object for look, thing in zip(seen, things, strict=True)]}
    for i, name in enumerate(_CHOICES):
        share[name] = [
            look.looks[thing.object][i] == getattr(thing, name) for look, thing in zip(seen, things, strict=True)
        ]
    found = {name: sum(right) / len(right) for name, right in share.items()}
    overlaps = [overlap(look.silhouette, _cover(scene)) for look, scene in zip(seen, scenes, strict=True)]
    return found | {"silhouette_overlap": sum(overlaps) / len(overlaps)}
