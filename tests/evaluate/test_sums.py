"""Distances as sums over parts: those of the whole, wherever the parts are taken."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import engine
from engine.evaluate import sums
from engine.evaluate.divergence import Divergence, fisher_divergence, noise_predictor
from engine.evaluate.sums import Summer, compute_here, distances, divide_pairs, read_latents
from engine.evaluate.wasserstein import wasserstein2_squared
from engine.methods.concept import Change
from engine.methods.infusion import residual_widths


@pytest.fixture
def ray_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's actors would starve beside the other tests."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")


def _save(folder: Path, name: str, samples: Tensor) -> list[Path]:
    paths = [folder / f"{name}-{i}.npy" for i in range(len(samples))]
    for path, sample in zip(paths, samples, strict=True):
        np.save(path, sample.numpy())
    return paths


@pytest.fixture
def kinds(tmp_path: Path) -> dict[str, list[Path]]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"base": 7, "other": 8, "custom": 9}
    return {
        name: _save(tmp_path, name, n / 9 * torch.randn(n, 4, 1, 2, generator=generator) + n)
        for name, n in sizes.items()
    }


def _concepts(sd: engine.Engine, folder: Path) -> list[Path]:
    """One of each method."""
    generator = torch.Generator().manual_seed(0)
    residuals = {name: torch.randn(n, generator=generator) for name, n in residual_widths(sd.unet, "text").items()}
    engine.Concept("cat", residuals, base=sd.fingerprint).save(folder / "cat.safetensors")
    name, weight = next((n, p.weight) for n, p in sd.unet.text_projections.items())
    changes = {name: Change(torch.randn(weight.shape, generator=generator))}
    tokens = torch.randn(2, sd.text_encoder.width, generator=generator)
    engine.Concept("cat", base=sd.fingerprint, tokens=tokens, changes=changes).save(folder / "ico.safetensors")
    return [folder / "cat.safetensors", folder / "ico.safetensors"]


@pytest.mark.parametrize("size", [3, 100])
def test_distances_in_parts_are_those_of_the_whole(
    kinds: dict[str, list[Path]], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "_SAMPLES", size)
    whole = {name: read_latents(files) for name, files in kinds.items()}
    pairs = [("other", "custom", "base"), ("base", "other", "custom")]
    for found, (reference, far, near) in zip(
        distances(kinds, pairs, lambda parts: compute_here(parts, {})), pairs, strict=True
    ):
        assert found["w2_squared"] == pytest.approx(wasserstein2_squared(whole[reference], whole[far]), rel=1e-5)
        assert found["floor_w2_squared"] == pytest.approx(wasserstein2_squared(whole[reference], whole[near]), rel=1e-5)
        assert found["n"] == len(kinds[far])


def test_one_picture_has_no_distance(kinds: dict[str, list[Path]]) -> None:
    with pytest.raises(ValueError, match="got 1 of 'base'"):
        distances({**kinds, "base": kinds["base"][:1]}, [], lambda parts: compute_here(parts, {}))


def test_divergence_in_parts_is_that_of_the_whole(
    small: engine.Engine, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "_PAIRS", 2)
    latents = torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    prompts = [f"a cat {i}" for i in range(5)]
    files = _save(tmp_path, "cat", latents)
    customs = engine.Infusion, lambda one: engine.ICO([engine.Concept("cat", changes=one[0].changes)])
    for path, make in zip(_concepts(small, tmp_path), customs, strict=True):
        parts = divide_pairs(path, files, prompts)
        assert [part.numbers for part in parts] == [(0, 1), (2, 3), (4,)]
        found = torch.cat(compute_here(parts, {"model": small_folder}), dim=1)
        custom = noise_predictor(small, make([engine.Concept.load(path)]))
        whole = fisher_divergence(small, noise_predictor(small), custom, latents, prompts, batch_size=2)
        assert Divergence.of(found, latents[0].numel()) == whole
        assert whole.total > 0


@pytest.mark.usefixtures("ray_alone")
def test_ray_takes_the_same_sums(
    small: engine.Engine, small_folder: Path, kinds: dict[str, list[Path]], tmp_path: Path
) -> None:
    from engine.evaluate.ray_sums import compute

    torch.set_num_threads(1)
    latents = torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    parts = divide_pairs(_concepts(small, tmp_path)[0], _save(tmp_path, "cat", latents), ["a cat"] * 5)
    loading = {"model": str(small_folder)}
    for one, here in zip(compute(parts, loading), compute_here(parts, loading), strict=True):
        assert torch.equal(one, here)
    on_ray = distances(kinds, [("other", "custom", "base")], lambda parts: compute(parts, loading))
    assert on_ray == distances(kinds, [("other", "custom", "base")], lambda parts: compute_here(parts, loading))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_alone")
def test_a_part_whose_actor_dies_is_taken_again(tmp_path: Path) -> None:
    from engine.evaluate.ray_sums import compute

    died = tmp_path / "died"

    def dies_once(_summer: Summer) -> str:
        if not died.exists():
            died.touch()
            os._exit(1)
        return "went on"

    assert compute([dies_once, lambda _summer: "another"], {}, actors=2) == ["went on", "another"]
