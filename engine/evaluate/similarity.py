"""How well pictures match prompts and reference pictures, by encoders of both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def text_alignment(pictures: Tensor, texts: Tensor) -> Tensor:
    """CLIP-T (n,): the cosine of each picture's embedding (n, E) with its own prompt's (n, E), unscaled."""
    return torch.cosine_similarity(pictures.double(), texts.double(), dim=1).float()


def image_alignment(pictures: Tensor, references: Tensor) -> Tensor:
    """CLIP-I or DINO (n,): each picture's (n, E) mean cosine with all reference pictures (m, E).

    Their mean is the mean over all pairs of a generated and a reference picture.
    """
    return (_unit(pictures) @ _unit(references).T).mean(dim=1).float()


def pairwise_distance(pictures: Tensor, groups: Sequence[object]) -> list[float]:
    """Diversity: for each group of pictures (n, E), such as a prompt's, the mean of ``1 - cosine`` over its pairs."""
    unit, found = _unit(pictures), []
    for label in dict.fromkeys(groups):
        rows = unit[[i for i, one in enumerate(groups) if one == label]]
        if len(rows) < 2:
            raise ValueError(f"groups must have at least 2 pictures each, got 1 of {label!r}")
        n_pairs = len(rows) * (len(rows) - 1)
        found.append(float(1 - ((rows @ rows.T).sum() - len(rows)) / n_pairs))
    return found


def modes(labels: Sequence[object]) -> tuple[int, float]:
    """How many different labels pictures have, and how many they have in effect: ``exp`` of the labels' entropy."""
    counts = torch.tensor([list(labels).count(label) for label in dict.fromkeys(labels)], dtype=torch.float64)
    share = counts / counts.sum()
    return len(counts), float(torch.exp(-(share * share.log()).sum()))


def _unit(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings.double(), dim=1)
