"""Prompts longer than the text encoder's window: chunks that are encoded apart and put side by side, as A1111 does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

LONG_PROMPTS = ("chunk", "truncate", "error")

_BREAK = re.compile(r"\bBREAK\b")
_BACKTRACK = 20  # tokens behind a comma that move to the next chunk with what follows them


class Piece(NamedTuple):
    """One token: its id, where in the text it is, and its vector where that is not the vocabulary's."""

    id: int
    span: tuple[int, int]
    vector: Tensor | None


def segments(text: str) -> list[tuple[int, int]]:
    """The parts of a text between the words BREAK, each of which ends a chunk."""
    breaks = [word.span() for word in _BREAK.finditer(text)]
    starts, ends = [0, *(end for _, end in breaks)], [*(start for start, _ in breaks), len(text)]
    return list(zip(starts, ends, strict=True))


def split(parts: Sequence[Sequence[Piece]], room: int, comma: int | None) -> list[list[Piece]]:
    """The chunks of a prompt, at least one.

    A chunk that is full ends behind its last comma, where that is among its last tokens. All vectors of a learned word
    are in one chunk, and so is nothing but what stands between two BREAKs.

    Args:
        parts: the tokens between BREAKs.
        room: tokens of a chunk.
        comma: the id of a comma that is a word; None where the vocabulary has none.
    """
    chunks: list[list[Piece]] = []
    for part in parts:
        chunks.append([])
        last_comma = None  # its place in the chunk
        for word in _words(part):
            now = chunks[-1]
            if word[0].id == comma and word[0].vector is None:
                last_comma = len(now)
            elif len(now) == room and last_comma is not None and room - last_comma <= _BACKTRACK:
                chunks.append(now[last_comma + 1 :])
                del now[last_comma + 1 :]
                last_comma = None
            if len(chunks[-1]) + len(word) > room:
                chunks.append([])
                last_comma = None
            chunks[-1] += word
    return chunks[:-1] if len(chunks) > 1 and not chunks[-1] else chunks


def _words(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Single tokens, and learned words whole."""
    for (_, is_learned), group in groupby(pieces, lambda piece: (piece.span, piece.vector is not None)):
        if is_learned:
            yield list(group)
        else:
            yield from ([piece] for piece in group)
