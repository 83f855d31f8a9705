"""A record of operations that serves each call by what a card's table says."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops import CALIBRATED, TORCH, Ops
from .calls import ROW_ARGUMENTS, Key, key_of, reference
from .contenders import TORCHS_OWN, implementation
from .table import Table


class Served:
    """An operation by its fastest implementation, where that is known, and torch's own elsewhere.

    What was found for so many rows serves more, up to the next number that was tried, and fewer where nothing was tried
    below: rows are alike, and an implementation that is right for one is right for all. Where a gradient is wanted,
    torch's own serves.
    """

    def __init__(self, op: str, table: Table) -> None:
        self.op, self.default = op, reference(op)
        self.choices: dict[Key, list[tuple[int, Callable[..., Any]]]] = defaultdict(list)
        self.counts: Counter[str] = Counter()
        for key, rows, choice in table:
            if key[0] == op:
                self.choices[key].append((rows, implementation(op, choice.serves)))
                self.counts[choice.serves] += 1

    def __call__(self, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return self.default(*arguments)
        found = self.choices.get(key_of(self.op, arguments))
        if found is None:
            return self.default(*arguments)
        chosen = found[0][1]
        for rows, function in found[1:]:
            if rows <= len(arguments[0]):
                chosen = function
        return chosen(*arguments)

    def __str__(self) -> str:
        found = [f"{name} at {n} of {self.counts.total()} calls" for name, n in self.counts.most_common()]
        if set(self.counts) == {TORCHS_OWN}:
            found = [f"torch, which nothing beats at {self.counts.total()} calls"]
        return f"{', '.join(found)}; torch elsewhere" if found else "torch, not calibrated"


def calibrated_ops(table: Table) -> Ops:
    """All operations by a card's table, but for convolutions, of which there is one implementation."""
    return replace(TORCH, name=CALIBRATED, **{op: Served(op, table) for op in ROW_ARGUMENTS})
