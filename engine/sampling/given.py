"""Arguments that hold one thing, one per prompt, or one per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def listed(given: Any, own_axes: int | None = 3) -> list[Any]:
    """What was given as a list: a sequence, or an array with an axis before the ``own_axes`` of one thing; else one.

    Where ``own_axes`` is None, an array is one thing.
    """
    is_array_of_many = own_axes is not None and getattr(given, "ndim", 0) == own_axes + 1
    return list(given) if isinstance(given, list | tuple) or is_array_of_many else [given]


def as_given(name: str, kind: str, given: Any, n_prompts: int, n_images: int, own_axes: int | None = 3) -> list[Any]:
    """``listed``; raises ``ValueError``, which calls the argument ``name``, where they are too few or too many."""
    found = listed(given, own_axes)
    if len(found) not in (1, n_prompts, n_images):
        rule = f"{name} must be one {kind}, one per prompt or one per image ({n_images})"
        raise ValueError(f"{rule}, got {len(found)}")
    return found


def one_per_image(things: Sequence[T], n_images: int) -> list[T]:
    """Each for as many images in a row."""
    return [thing for thing in things for _ in range(n_images // len(things))]
