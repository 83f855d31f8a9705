"""Random numbers from seeds: every use has its own, so that none depends on what was drawn before."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_integer
from .given import listed

if TYPE_CHECKING:
    from .arguments import Options
    from .request import Request

_MAX_SEED = 2**64 - 1
_PARALLEL = 1e-6  # sine below which two columns have no arc between them
Generators = tuple[torch.Generator, ...]


def make_generator(seed: int, *use: int) -> torch.Generator:
    """Random numbers that depend on nothing but the seed and what they are for, so that a run can stop anywhere."""
    state = int(np.random.SeedSequence([seed, *use]).generate_state(1, np.uint64)[0])
    return torch.Generator("cpu").manual_seed(state)


def auxiliary_seed(seed: int) -> int:
    """The seed of an auxiliary branch's independent noise: mixed, since nearby seeds are those of other images.

    Below 2^32, because torch's CPU generator keeps no more than the low 32 bits of a seed.
    """
    return int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint32)[0])


def read_seeds(options: Options, n_images: int) -> tuple[tuple[int, ...], tuple[int, ...], Generators]:
    """The seeds of all images, those of their variations, and what is drawn from in place of the seeds' own generators.

    Of generators the seeds are what they began with. One integer seed is counted up over the images; where starts vary
    it stays, and the variations' is counted up, as A1111 does.

    Raises:
        ValueError: there are not as many as images, or they do not go with the other options.
    """
    generators = _generators(options, n_images)
    if not options.variation_strength:
        if options.variation_seed is not None:
            rule = "variation_seed needs a variation_strength above 0"
            raise ValueError(f"{rule}, got variation_seed={options.variation_seed}")
        if generators:
            own = [generator.initial_seed() for generator in generators]
            return tuple(own * n_images if len(own) == 1 else own), (), generators
        return _one_per_image("seed", options.seed, n_images), (), ()
    for name, given in (("latents", options.latents), ("generator", options.generator)):
        if given is not None:
            rule = "variation_strength moves the noise of integer seeds"
            raise ValueError(f"{rule}; it does not go with {name}, got {options.variation_strength}")
    seeds = options.seed
    if not isinstance(seeds, list | tuple | range):
        seeds = _one_per_image("seed", seeds, 1) * n_images
    variations = _one_per_image("variation_seed", options.variation_seed, n_images)
    return _one_per_image("seed", seeds, n_images), variations, ()


def _one_per_image(name: str, seed: Any, n_images: int) -> tuple[int, ...]:
    """One seed per image: as given, counted up from one number, or drawn (and reported) where none is given."""
    if seed is None:
        return tuple(secrets.randbits(32) for _ in range(n_images))
    if isinstance(seed, list | tuple | range):
        if len(seed) != n_images:
            raise ValueError(f"{name} must be one integer or one per image ({n_images}), got {len(seed)}")
        return tuple(check_integer(name, value, 0, _MAX_SEED) for value in seed)
    first = check_integer(name, seed, 0, _MAX_SEED - (n_images - 1))
    return tuple(range(first, first + n_images))


def _generators(options: Options, n_images: int) -> Generators:
    """The generators that were given in place of seeds, if any."""
    given = options.generator
    if given is None:
        return ()
    found: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    n_given = n_images if isinstance(given, list | tuple) else 1
    if not all(isinstance(one, torch.Generator) for one in found) or len(found) != n_given:
        rule = f"generator must be one torch.Generator, or one per image ({n_images})"
        raise ValueError(f"{rule}, got {given!r}")
    if options.seed is not None:
        raise ValueError(f"give seed or generator, not both: each says what noise is drawn, got seed={options.seed}")
    return tuple(found)


class Noise:
    """Unit noise of a request's starts (n, *shape), float32, in the order in which diffusers draws it.

    Each image has a generator of its own, so that it depends on no other; one that the caller gave for several images
    draws them at once, on its own device.

    Args:
        request: whose seeds, or generators.
        auxiliary_seeds: of the starts that follow the images'.
        shape: of one start.
        device: where noise goes.
    """

    def __init__(
        self, request: Request, auxiliary_seeds: Sequence[int], shape: tuple[int, ...], device: torch.device
    ) -> None:
        self.request, self.shape, self.device = request, shape, device
        self.own = list(request.generators) or _seeded(request.seeds)
        self.auxiliary = _seeded(auxiliary_seeds)

    def __call__(self) -> Tensor:
        """Of all starts."""
        return torch.cat([self._draw(len(self.request.seeds)), *self._of_auxiliaries()])

    def start(self) -> Tensor:
        """That of all starts which pictures begin with: the images' has its variation."""
        noise, seeds = self._draw(len(self.request.seeds)), self.request.variation_seeds
        if seeds:
            others = torch.stack([self._one(one) for one in _seeded(seeds)])
            noise = between(noise, others, self.request.options.variation_strength)
        return torch.cat([noise, *self._of_auxiliaries()])

    def of_pictures(self) -> Tensor:
        """Of the images alone, with which the pictures they start from are drawn from the VAE's posterior.

        A lone generator draws one for each picture that was given, which images share.
        """
        self._of_auxiliaries()
        given, n_images = self.request.options.image, len(self.request.seeds)
        n_drawn = len(listed(given)) if len(self.own) == 1 else n_images
        return self._draw(n_drawn).repeat_interleave(n_images // n_drawn, dim=0)

    def _draw(self, n: int) -> Tensor:
        if len(self.own) == 1:
            (one,) = self.own
            noise = torch.randn((n, *self.shape), generator=one, dtype=torch.float32, device=one.device)
        else:
            noise = torch.stack([self._one(generator) for generator in self.own])
        return noise.to(self.device)

    def _of_auxiliaries(self) -> list[Tensor]:
        return [self._one(generator)[None] for generator in self.auxiliary]

    def _one(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.shape, generator=generator, dtype=torch.float32, device=generator.device).to(
            self.device
        )


def _seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def between(noise: Tensor, other: Tensor, share: float) -> Tensor:
    """Noise on the way to another, which stays about as strong: spherical interpolation, ``(..., h, w)``.

    ``(sin((1 - s) a) x + sin(s a) y) / sin a`` with the angle ``a`` between x and y (Shoemake 1985), which A1111 takes
    column by column: a vector is one column of one channel. Columns without an arc are interpolated straight.

    Args:
        noise, other: of one shape.
        share: s, 0 for ``noise`` and 1 for ``other``.
    """
    first, second = (x.double() / x.double().norm(dim=-2, keepdim=True) for x in (noise, other))
    angle = torch.acos((first * second).sum(dim=-2, keepdim=True).clamp(-1, 1))
    sine = torch.sin(angle)
    arc = (torch.sin((1 - share) * angle) * noise + torch.sin(share * angle) * other) / sine
    return torch.where(sine < _PARALLEL, noise + share * (other - noise), arc).to(noise.dtype)
