"""OpenVINO as a peer: the same results as diffusers', converted once, in the precision that is asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import openvino_peer
from benchmarks.peers import diffusers_eager
from tests.pipelines import relative_error


@pytest.mark.slow
@torch.no_grad()
def test_it_agrees_with_diffusers(small_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_peer, "_FOLDER", tmp_path)
    exact = diffusers_eager(small_folder, torch.float32).cases
    bounds = {torch.float32: (1e-7, 2e-5), torch.bfloat16: (1e-4, 1e-1)}  # not better than the precision, nor worse
    for dtype, (low, high) in bounds.items():
        cases = openvino_peer.openvino(small_folder, dtype).cases
        converted = {path: path.stat().st_mtime for path in tmp_path.iterdir()}
        for name in ("guided_step", "vae_decode"):
            assert low < relative_error(cases[name](), exact[name]()) < high, (name, dtype)
            assert torch.equal(cases[name](), cases[name]())
        if dtype == torch.float32:
            first = converted
            assert len(first) == 4
    assert converted == first
    (small_folder / "unet" / "diffusion_pytorch_model.safetensors").touch()
    assert not openvino_peer._Model(small_folder, "unet").is_converted
