"""Random numbers from seeds: every use has its own, so that none depends on what was drawn before."""

from __future__ import annotations

import numpy as np
import torch


def make_generator(seed: int, *use: int) -> torch.Generator:
    """Random numbers that depend on nothing but the seed and what they are for, so that a run can stop anywhere."""
    state = int(np.random.SeedSequence([seed, *use]).generate_state(1, np.uint64)[0])
    return torch.Generator("cpu").manual_seed(state)


def auxiliary_seed(seed: int) -> int:
    """The seed of an auxiliary branch's independent noise: mixed, since nearby seeds are those of other images.

    Below 2^32, because torch's CPU generator keeps no more than the low 32 bits of a seed.
    """
    return int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint32)[0])
