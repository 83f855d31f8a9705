"""Prompts that change over the steps, in A1111's notation: ``[from:to:when]`` and ``[a|b]``.

``[from:to:when]`` is ``from`` in the first ``when`` steps and ``to`` in those after; ``[to:when]`` begins with nothing,
and ``[from::when]`` ends with it. ``when`` with a decimal point is a share of the steps, rounded down; without one it
counts them. ``[a|b|c]`` takes its texts in turn, one a step. Both nest, and may hold weights; a bracket that is neither
stays what it is to ``weighting.parse_weights``, and a backslash makes a mark literal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_TOKEN = re.compile(r"\\.|[()\[\]:|]|[^\\()\[\]:|]+|\\", re.DOTALL)
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*")


@dataclass(frozen=True, slots=True)
class _Edit:
    """Texts of which each step has one: in turn where ``when`` is None, else the first until then and the second after.

    Attributes:
        texts: each a sequence of pieces.
        when: as the prompt writes it.
    """

    texts: tuple[tuple[str | _Edit, ...], ...]
    when: str | None = None

    def at(self, step: int, total: int) -> str:
        """The text of a step, which is counted from 1."""
        if self.when is None:
            return _at(self.texts[(step - 1) % len(self.texts)], step, total)
        last = float(self.when) * total if "." in self.when else float(self.when)
        return _at(self.texts[step > int(last)], step, total)


@dataclass(slots=True)
class _Bracket:
    """An open bracket: what it holds, in parts between the marks that stand directly in it."""

    opened: str
    parts: list[list[str | _Edit]] = field(default_factory=lambda: [[]])
    marks: list[str] = field(default_factory=list)

    def literal(self, closed: str = "") -> list[str | _Edit]:
        """All of it as it is written."""
        written: list[str | _Edit] = [self.opened, *self.parts[0]]
        for mark, part in zip(self.marks, self.parts[1:], strict=True):
            written += [mark, *part]
        return [*written, closed]

    def closed(self) -> list[str | _Edit]:
        """What it is when its end is met."""
        kinds, texts = set(self.marks), tuple(map(tuple, self.parts))
        if kinds == {"|"}:
            return [_Edit(texts)]
        *before, last = self.parts
        number = _NUMBER.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
        if kinds == {":"} and len(before) <= 2 and number:
            return [_Edit((texts[0] if len(before) == 2 else (), texts[-2]), number.group(1))]
        return self.literal("]")


def texts_over_steps(prompt: str, total: int, taken: int) -> tuple[tuple[int, str], ...]:
    """The texts that a prompt becomes, each with the step at which it begins, counted from 0.

    A1111 writes step numbers from 1 as here, but its denoiser counts from 0 where it looks them up, and so makes every
    change one step later than it says; that is not followed.

    Args:
        prompt: with editing marks or none.
        total: the steps that shares are of.
        taken: the steps that there are, which may be fewer.
    """
    pieces = _parse(prompt) if "[" in prompt else []
    if not any(isinstance(piece, _Edit) for piece in pieces):
        return ((0, prompt),)
    texts = [_at(pieces, step, total) for step in range(1, taken + 1)]
    return tuple((i, text) for i, text in enumerate(texts) if i == 0 or text != texts[i - 1])


def unedited(prompt: str) -> str:
    """The one text of a prompt; raises ``ValueError`` where it would change over steps that there are none of."""
    (_, text), *others = texts_over_steps(prompt, 1000, 1000)
    if others:
        raise ValueError(f"a prompt that changes over the steps has no encoding of its own, got {prompt!r}")
    return text


def _at(pieces: Sequence[str | _Edit], step: int, total: int) -> str:
    return "".join(piece if isinstance(piece, str) else piece.at(step, total) for piece in pieces)


def _parse(prompt: str) -> list[str | _Edit]:
    stack = [_Bracket("")]
    for match in _TOKEN.finditer(prompt):
        piece, top = match.group(), stack[-1]
        if piece in ("(", "["):
            stack.append(_Bracket(piece))
        elif piece in (":", "|") and top.opened == "[":
            top.marks.append(piece)
            top.parts.append([])
        elif piece == "]" and top.opened == "[":
            stack.pop()
            stack[-1].parts[-1] += top.closed()
        elif piece == ")" and top.opened == "(":
            stack.pop()
            stack[-1].parts[-1] += top.literal(")")
        else:
            top.parts[-1].append(piece)
    while len(stack) > 1:  # never closed
        top = stack.pop()
        stack[-1].parts[-1] += top.literal()
    return stack[0].parts[0]
