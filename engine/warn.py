"""Warnings that point at the caller's own line, however deep in this package or in torch they arise."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_ROOTS = tuple(str(Path(file).parent) for file in (__file__, torch.__file__))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """``warnings.warn``, at the innermost frame that is neither ours nor torch's."""
    frame, level = sys._getframe(1), 2  # the caller, as ``warnings`` counts from here
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_ROOTS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
