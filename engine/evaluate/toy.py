"""The toy studies of overfitting (Infusion, arXiv:2404.14007, figures 5 and 6), in two dimensions.

A conditional diffusion model of points emits ``x_0 = sum_k p_k mu_k + g(u)``: a softmax p over slots says *where*, as
an attention map does, and g, of the place u within a slot, says *what*. Two ways to tune it on a few new points are set
side by side: all weights, and the method's analogue, which freezes where and adds to what.

- agnostic: four Gaussians are four concepts; one of them is tuned to a line segment. What becomes of the other three?
- specific: 25 Gaussians are one concept's diversity; it is tuned on segments at five of them. How many modes survive,
  and do all become segments?
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ..checks import check_choice, check_integer
from .wasserstein import wasserstein2_squared

KINDS = ("agnostic", "specific")
_T, _SLOTS, _WIDTH, _BATCH = 200, 32, 96, 512
_STD, _HALF_LENGTH, _SLOPE = 0.12, 0.45, 0.8  # of a Gaussian; of a segment, and its angle in radians
_SAMPLES, _SAMPLING_STEPS = 2500, 40
_RATE = 3e-3
_KEPT = 0.25  # a mode is kept where it has this share of what is its due


@dataclass(frozen=True, slots=True)
class World:
    """Classes of points.

    Attributes:
        centres: (M, 2) of all modes.
        classes: (M,) the class of each mode.
        tuned: the modes that tuning sees.
    """

    centres: Tensor
    classes: Tensor
    tuned: tuple[int, ...]

    def gaussians(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points (n, 2) of all modes and their classes (n,)."""
        modes = torch.randint(len(self.centres), (count,), generator=generator)
        return self.centres[modes] + _STD * torch.randn(count, 2, generator=generator), self.classes[modes]

    def segments(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points on segments at the tuned modes, and their classes."""
        modes = torch.tensor(self.tuned)[torch.randint(len(self.tuned), (count,), generator=generator)]
        along = _HALF_LENGTH * (2 * torch.rand(count, 1, generator=generator) - 1)
        return self.centres[modes] + along * _direction(), self.classes[modes]


def make_world(kind: str) -> World:
    """The four Gaussians of "agnostic", or the grid of "specific"."""
    check_choice("kind", kind, KINDS)
    if kind == "agnostic":
        return World(2.0 * torch.tensor([[-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]]), torch.arange(4), (0,))
    places = 1.5 * torch.cartesian_prod(torch.arange(-2.0, 3), torch.arange(-2.0, 3))
    return World(places, torch.zeros(25, dtype=torch.int64), (2, 6, 13, 19, 20))


class Toy(nn.Module):
    """Predicts ``x_0`` from noisy points (n, 2), steps (n,) and classes (n,).

    Args:
        n_classes: how many classes there are.
        slots: (K, 2), where the slots start.
    """

    def __init__(self, n_classes: int, slots: Tensor) -> None:
        super().__init__()
        self.slots = nn.Parameter(slots.clone())
        self.owners = nn.Parameter(torch.zeros(n_classes, len(slots)))  # which slots a class attends to
        self.what = _mlp(2 + 4, 2)
        self.added = _mlp(2 + 4, 2)  # the analogue's own: zero until it is tuned, and for class 0 alone
        self.customised = False

    def forward(self, noisy: Tensor, steps: Tensor, classes: Tensor) -> Tensor:
        alpha_bar = _alpha_bar()[steps][:, None]
        variance = alpha_bar * _STD**2 + 1 - alpha_bar
        distances = torch.cdist(noisy / alpha_bar.sqrt(), self.slots).square() * alpha_bar
        place = (self.owners[classes] - distances / (2 * variance)).softmax(dim=1) @ self.slots
        within = torch.cat([(noisy - alpha_bar.sqrt() * place) / variance.sqrt(), _times(steps)], dim=1)
        x0 = place + _STD * self.what(within)
        if self.customised:
            x0 = x0 + (classes == 0)[:, None] * self.added(within)
        return x0

    def noise(self, noisy: Tensor, steps: Tensor, classes: Tensor) -> Tensor:
        """The noise prediction that belongs to ``x_0``."""
        return _noise(noisy, steps, self(noisy, steps, classes))


def study(kind: str, steps: int = 3000, seed: int = 0) -> tuple[dict[str, Any], Image.Image]:
    """Train a base, tune it in both ways, and measure.

    Args:
        kind: "agnostic" or "specific".
        steps: of the base's training; tuning takes half as many.
        seed: of everything random.

    Returns:
        JSON-serialisable measures of "base", "all weights" and "what alone", and a figure of their points.
    """
    check_integer("steps", steps, 2)
    world = make_world(kind)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = Toy(int(world.classes.max()) + 1, _spread_out(world.gaussians(2000, generator)[0], _SLOTS))
    _fit(base, [*base.parameters()], world.gaussians, steps, _RATE, generator)
    tuned = {"all weights": _copy(base), "what alone": _copy(base)}
    tuned["what alone"].customised = True
    for name, part in (("all weights", tuned["all weights"]), ("what alone", tuned["what alone"].added)):
        _fit(tuned[name], [*part.parameters()], world.segments, steps // 2, _RATE, generator)
    models = {"base": base, **tuned}
    drawn = {name: _sample(model, world, seed + 1) for name, model in models.items()}
    again = _sample(base, world, seed + 2)
    measures = {name: _measure(world, base, model, drawn[name], drawn["base"], again) for name, model in models.items()}
    points, classes = world.segments(_SAMPLES // 4, generator)
    figure = _figure({"tuned on": (points, classes), **drawn})
    settings = {"steps": steps, "seed": seed, "modes": len(world.centres), "tuned_modes": len(world.tuned)}
    return {"kind": kind, "settings": settings, "measures": measures}, figure


def table(result: dict[str, Any]) -> str:
    """The measures as text."""
    names = list(next(iter(result["measures"].values())))
    lines = ["".join(f"{head:>18}" for head in ("", *names))]
    for model, measured in result["measures"].items():
        lines.append("".join(f"{cell:>18}" for cell in (model, *(f"{measured[name]:.4g}" for name in names))))
    return "\n".join(lines)


def _fit(
    model: Toy, parameters: list[nn.Parameter], draw: Any, steps: int, rate: float, generator: torch.Generator
) -> None:
    """Minimise the noise prediction's squared error; its weight on ``x_0`` is capped (Hang et al. 2023, min-SNR)."""
    optimizer = torch.optim.Adam(parameters, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        points, classes = draw(_BATCH, generator)
        times = torch.randint(_T, (_BATCH,), generator=generator)
        alpha_bar = _alpha_bar()[times][:, None]
        noisy = alpha_bar.sqrt() * points + (1 - alpha_bar).sqrt() * torch.randn(points.shape, generator=generator)
        weight = (alpha_bar / (1 - alpha_bar)).clamp(max=20.0)
        loss = (weight * (model(noisy, times, classes) - points).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _sample(model: Toy, world: World, seed: int) -> tuple[Tensor, Tensor]:
    """DDIM (Song et al. 2021, arXiv:2010.02502): points of all classes in equal shares, and their classes."""
    n_classes = int(world.classes.max()) + 1
    classes = torch.arange(_SAMPLES) % n_classes
    x = torch.randn(_SAMPLES, 2, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(_T - 1, 0, _SAMPLING_STEPS).round().long()
    for i, time in enumerate(times):
        steps = time.expand(_SAMPLES)
        x0 = model(x, steps, classes)
        noise = _noise(x, steps, x0)
        after = _alpha_bar()[times[i + 1]] if i + 1 < len(times) else torch.tensor(1.0)
        x = after.sqrt() * x0 + (1 - after).sqrt() * noise
    return x, classes


@torch.no_grad()
def _measure(
    world: World,
    base: Toy,
    model: Toy,
    drawn: tuple[Tensor, Tensor],
    plain: tuple[Tensor, Tensor],
    again: tuple[Tensor, Tensor],
) -> dict[str, float]:
    points, classes = drawn
    nearest = _nearest(points, world)
    share = torch.bincount(nearest, minlength=len(world.centres)) * len(world.centres) / len(points)
    near = points - world.centres[nearest]
    along = near @ _direction().T
    across = near @ torch.tensor([[-math.sin(_SLOPE)], [math.cos(_SLOPE)]])
    is_long = [
        float(share[k]) >= _KEPT and bool(along[nearest == k].std() > 2 * across[nearest == k].std())
        for k in range(len(world.centres))
    ]
    others, before = _others(classes), plain[0][_others(classes)]
    spread = _spread(points[others], nearest[others]) / _spread(before, _nearest(before, world))
    generator = torch.Generator().manual_seed(9)
    clean, labels = world.gaussians(4000, generator)
    times = torch.randint(_T, (4000,), generator=generator)
    alpha_bar = _alpha_bar()[times][:, None]
    noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * torch.randn(clean.shape, generator=generator)
    difference = model.noise(noisy, times, labels) - base.noise(noisy, times, labels)
    return {
        "modes kept": int((share >= _KEPT).sum()),
        "segments": sum(is_long),
        "spread of others": float(spread),
        "Fisher": float(difference.square().sum(dim=1)[_others(labels)].mean()),
        "W2": math.sqrt(wasserstein2_squared(again[0][others], points[others])),
    }


def _nearest(points: Tensor, world: World) -> Tensor:
    return torch.cdist(points, world.centres).argmin(dim=1)


def _spread(points: Tensor, modes: Tensor) -> Tensor:
    """Root mean square distance of points from the mean of those of their mode."""
    hot = nn.functional.one_hot(modes).to(points.dtype)
    means = (hot.T @ points) / hot.sum(dim=0).clamp(min=1)[:, None]
    return (points - means[modes]).square().sum(dim=1).mean().sqrt()


def _figure(panels: dict[str, tuple[Tensor, Tensor]]) -> Image.Image:
    """A scatter plot a panel, coloured by class."""
    side, margin, reach = 360, 28, 4.2
    colours = ((31, 119, 180), (214, 94, 20), (44, 140, 60), (150, 60, 160))
    figure = Image.new("RGB", (side * len(panels), side + margin), "white")
    pen = ImageDraw.Draw(figure, "RGBA")
    for k, (name, (points, classes)) in enumerate(panels.items()):
        left = k * side
        pen.text((left + side / 2, 4), name, fill="black", anchor="ma", font_size=18)
        pen.rectangle((left + 4, margin, left + side - 4, margin + side - 4), outline=(180, 180, 180))
        inside = (points.abs() < reach).all(dim=1)
        for (x, y), one in zip(points[inside].tolist(), classes[inside].tolist(), strict=True):
            across, down = left + side / 2 + x / reach * (side / 2 - 6), margin + side / 2 - y / reach * (side / 2 - 6)
            pen.ellipse((across - 1.5, down - 1.5, across + 1.5, down + 1.5), fill=(*colours[one], 140))
    return figure


def write_study(kind: str, folder: Path, **options: Any) -> tuple[dict[str, Any], Path]:
    """Run a study and write its figure; returns the measures and the figure's path."""
    result, figure = study(kind, **options)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"toy-{kind}.png"
    figure.save(path)
    return result, path


def _mlp(n_in: int, n_out: int) -> nn.Sequential:
    """Zero at first."""
    last = nn.Linear(_WIDTH, n_out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(n_in, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, _WIDTH), nn.SiLU(), last)


def _spread_out(points: Tensor, count: int) -> Tensor:
    """``count`` of the points, each the farthest from those before it."""
    chosen, nearest = [points[0]], torch.full((len(points),), torch.inf)
    while len(chosen) < count:
        nearest = torch.minimum(nearest, (points - chosen[-1]).square().sum(dim=1))
        chosen.append(points[nearest.argmax()])
    return torch.stack(chosen)


def _copy(model: Toy) -> Toy:
    twin = Toy(len(model.owners), model.slots.detach())
    twin.load_state_dict(model.state_dict())
    return twin


def _alpha_bar() -> Tensor:
    """The cosine schedule (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17), a step's share of signal (T,)."""
    time = (torch.arange(_T) + 1) / _T
    return (torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()).clamp(1e-4, 0.9999)


def _noise(noisy: Tensor, steps: Tensor, x0: Tensor) -> Tensor:
    """What noise made noisy points of ``x_0``."""
    alpha_bar = _alpha_bar()[steps][:, None]
    return (noisy - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()


def _others(classes: Tensor) -> Tensor:
    """Which points are not of the tuned class; all, where there is one class."""
    return classes > 0 if int(classes.max()) else torch.ones_like(classes, dtype=torch.bool)


def _times(steps: Tensor) -> Tensor:
    """Features (n, 4) of steps."""
    time = steps[:, None] / _T
    return torch.cat([time, torch.cos(math.pi * time), torch.sin(2 * math.pi * time), _alpha_bar()[steps][:, None]], 1)


def _direction() -> Tensor:
    return torch.tensor([[math.cos(_SLOPE), math.sin(_SLOPE)]])
