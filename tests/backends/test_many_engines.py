"""Several Engines in one process, on two devices and streams of their own: each has its graphs, pools and memory."""

import gc
import threading
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import engine
from tests.fake_cuda import Card
from tests.pipelines import relative_error

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there"),
    pytest.mark.usefixtures("card"),
]

_DEVICES = ("cuda:0", "cuda:1", "cuda:0")  # two Engines on one of them


def _draw(sd: engine.Engine, seed: int, images: int = 1) -> Tensor:
    options: dict[str, Any] = {"steps": 2, "output": "latent", "progress": False, "images_per_prompt": images}
    return sd.generate("a cat", seed=seed, **options).latents.cpu()


def _engines(folder: Path) -> list[engine.Engine]:
    return [engine.load(folder, device=device, dtype="float32", backend="triton") for device in _DEVICES]


def _live(card: Card) -> dict[int, int]:
    """Graphs that are there, by device."""
    found = [graph.device for graph in card.graphs]
    return {device: found.count(device) for device in set(found)}


def test_graphs_and_pools_are_an_engines_own(small_folder: Path, card: Card) -> None:
    """Whatever device is the current one."""
    plain = engine.load(small_folder, device="cpu", backend="torch")
    engines = _engines(small_folder)
    for other in (1, 0):
        for seed, sd in enumerate(engines):
            with torch.cuda.device(other):
                assert relative_error(_draw(sd, seed), _draw(plain, seed)) < 1e-4
    pools = [{graph.capture.pool for graph in sd.graphs._graphs.values()} for sd in engines]
    assert all(len(own) == 1 for own in pools)
    assert len(set.union(*pools)) == len(engines)
    assert _live(card) == {0: 2, 1: 1}
    assert {pool: n for pool, n in card.live_graphs.items() if n} == dict.fromkeys(set.union(*pools), 1)
    for sd, device in zip(engines, _DEVICES, strict=True):
        (graph,) = sd.graphs._graphs.values()
        assert sd.graphs.failed is None
        assert graph.inputs.x.device == graph.constants.shifts.device == torch.device(device)
    captured = [len(sd.graphs.captured) for sd in engines]
    replayed = {(one.device, one.queue) for one in card.launches if one.replayed}
    assert {device for device, _ in replayed} == {0, 1}
    for sd in engines:
        _draw(sd, 5)
    assert [len(sd.graphs.captured) for sd in engines] == captured


def test_threads_on_streams_of_their_own_draw_at_once(small_folder: Path, card: Card) -> None:
    plain = engine.load(small_folder, device="cpu", backend="torch")
    exact = [_draw(plain, seed) for seed in range(3)]
    engines, wrong = _engines(small_folder), []

    def run(sd: engine.Engine, own_stream: bool) -> None:
        stream = torch.cuda.Stream(sd.device)
        stream.wait_stream(torch.cuda.default_stream(sd.device))
        with torch.cuda.stream(stream) if own_stream else nullcontext():
            for seed, expected in enumerate(exact):
                error = relative_error(_draw(sd, seed), expected)
                if not error < 1e-4:
                    wrong.append((sd.device, seed, error))

    threads = [threading.Thread(target=run, args=(sd, i % 2 == 0)) for i, sd in enumerate([*engines, engines[1]])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [len(sd.graphs) for sd in engines] == [1, 1, 1]
    assert {one.device for one in card.launches if one.replayed} == {0, 1}


def test_an_engine_that_is_dropped_gives_its_memory_back(small_folder: Path, card: Card) -> None:
    """Graphs, pool and buffers go with it, and the others' stay and serve."""
    engines = _engines(small_folder)
    for sd in engines:
        _draw(sd, 0)
        _draw(sd, 0, images=2)
    assert _live(card) == {0: 4, 1: 2}
    dropped, *kept = engines
    watched: list[Any] = []
    for graph in dropped.graphs._graphs.values():
        watched += [weakref.ref(x) for x in (graph.inputs.x, graph.constants.shifts, *graph.results)]
    watched += [weakref.ref(dropped.unet), weakref.ref(next(dropped.vae.parameters()))]
    captured = [len(sd.graphs.captured) for sd in kept]
    del dropped, engines, graph, sd
    gc.collect()
    assert not [one() for one in watched if one() is not None]
    assert _live(card) == {0: 2, 1: 2}
    for sd in kept:
        _draw(sd, 1)
    assert [len(sd.graphs.captured) for sd in kept] == captured


def test_engines_with_loras_or_emptied_keep_apart(small_folder: Path, card: Card) -> None:
    """What is given back by one Engine is its own, on the device that it is on."""
    first, second, _ = engines = _engines(small_folder)
    for sd in engines:
        _draw(sd, 0)
    first._free()
    assert _live(card) == {0: 1, 1: 1}
    assert [len(sd.graphs) for sd in engines] == [0, 1, 1]
    other = second.with_loras([])
    _draw(other, 0)
    assert _live(card) == {0: 1, 1: 2}
    assert other.graphs is not second.graphs
    del other
    gc.collect()
    assert _live(card) == {0: 1, 1: 1}
