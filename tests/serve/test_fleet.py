"""Many Engines behind one queue: what dies is drawn elsewhere, what is refused is told, nothing is there twice."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

import engine
from engine.errors import DeadlineError, QueueFullError, SchedulerClosedError
from engine.methods.asked_pictures import NetFiles
from engine.serve.fleet import Fleet, FleetOptions, Replica
from engine.serve.nets import Nets
from tests.controlnets import hint, random_controlnet
from tests.ip_adapters import load_adapter, picture

PROMPT, QUICK = "a photo of a cat", {"steps": 2}
Draw = Callable[[str, str, float | None, dict[str, Any]], Iterator[Any]]


class _Answers:
    """As Ray's generator of answers."""

    def __init__(self, answers: Iterator[Any]) -> None:
        self.answers, self.was_cancelled = answers, False

    def __iter__(self) -> Iterator[Any]:
        return self.answers

    def cancel(self) -> None:
        self.was_cancelled = True


@pytest.fixture
def make_fleet(small: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Fleet]]:
    """A fleet whose one replica is a function, without Ray's machinery."""
    made: list[Fleet] = []

    def make(draw: Draw, **options: Any) -> Fleet:
        class Handle:
            def options(self, stream: bool) -> Any:
                assert stream
                return self

            @property
            def draw(self) -> Any:
                return self

            def remote(self, *given: Any) -> _Answers:
                return _Answers(draw(*given))

        def change_model(fleet: Fleet, _loading: Any) -> None:
            fleet._handle = Handle()  # type: ignore[assignment]

        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(Fleet, "change_model", change_model)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        fleet = Fleet(small, {}, FleetOptions(), **options)
        fleet._serve = type("Serve", (), {"delete": lambda _self, _name: None})()
        made.append(fleet)
        return fleet

    yield make
    for fleet in made:
        fleet.close(cancel=True)


def _drawing(sd: engine.Engine) -> Draw:
    def draw(prompt: str, _client: str, _due: float | None, options: dict[str, Any]) -> Iterator[Any]:
        out = sd.generate(prompt, **options)
        yield from ((i, 2, torch.zeros(1, 4, 2, 2)) for i in range(2))
        yield out

    return draw


def test_networks_are_the_replicas_own(
    small: engine.Engine, small_folder: Path, tmp_path: Path, make_fleet: Callable[..., Fleet]
) -> None:
    random_controlnet(small, tmp_path / "edges", small_folder)
    files = NetFiles({"mine": str(tmp_path / "edges")})
    here, there, given = Nets(small, files), Nets(small, files), list[dict[str, Any]]()

    def draw(prompt: str, client: str, due: float | None, options: dict[str, Any]) -> Iterator[Any]:
        given.append(there.unpacked(options))
        yield from _drawing(small)(prompt, client, due, given[0])

    fleet = make_fleet(draw, nets=here)
    control = engine.Control(here.controls["mine"], hint(), weight=0.5)
    out = fleet.submit(PROMPT, seed=3, control=[control], **QUICK).result(60)
    assert given[0]["control"][0].net is there.controls["mine"]
    alone = small.generate(PROMPT, seed=3, control=[control], progress=False, **QUICK)
    assert torch.equal(out.latents, alone.latents)
    other = engine.Control(there.controls["mine"], hint())
    with pytest.raises(ValueError, match=r"net must be one that the replicas have \(mine\), got 'edges'"):
        fleet.submit(PROMPT, control=[other], **QUICK)
    assert not fleet._jobs


def test_what_dies_is_drawn_again_as_it_would_have_been(small: engine.Engine, make_fleet: Callable[..., Fleet]) -> None:
    tries: list[list[int]] = []

    def dies_twice(prompt: str, client: str, due: float | None, options: dict[str, Any]) -> Iterator[Any]:
        tries.append(options["seed"])
        if len(tries) < 3:
            yield 0, 2, torch.zeros(1, 4, 2, 2)
            raise RayActorError
        yield from _drawing(small)(prompt, client, due, options)

    steps: list[int] = []
    fleet = make_fleet(dies_twice)
    job = fleet.submit(PROMPT, callback=lambda step, *_: steps.append(step), **QUICK)
    out = job.result(60)
    assert len(tries) == 3
    assert tries[0] == tries[1] == tries[2] == out.seeds, "the seed is drawn once, by the fleet"
    assert steps == [0, 0, 0, 1]
    assert fleet.counts == {"done": 1}


def test_only_so_many_replicas_are_tried(make_fleet: Callable[..., Fleet]) -> None:
    tries: list[int] = []

    def dies(*_: Any) -> Iterator[Any]:
        tries.append(1)
        raise RayActorError
        yield

    fleet = make_fleet(dies)
    with pytest.raises(RayActorError):
        fleet.submit(PROMPT, **QUICK).result(60)
    assert len(tries) == 5
    assert fleet.counts == {"failed": 1}


def test_errors_of_the_replica_are_the_callers_own(make_fleet: Callable[..., Fleet]) -> None:
    def fails(*_: Any) -> Iterator[Any]:
        raise RayTaskError("draw", "", ValueError("noun 'dog' is not in the prompt"))
        yield

    fleet = make_fleet(fails)
    with pytest.raises(ValueError, match="noun 'dog'"):
        fleet.submit(PROMPT, **QUICK).result(60)
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
        fleet.submit(PROMPT, steps=0)
    with pytest.raises(ValueError, match="deadline must be a finite number >= 0, got -1"):
        fleet.submit(PROMPT, deadline=-1.0)
    assert fleet.waiting == fleet.drawing == 0


def test_a_deadline_goes_with_its_request_and_counts_the_way(
    small: engine.Engine, make_fleet: Callable[..., Fleet]
) -> None:
    sent: list[float | None] = []

    def notes(prompt: str, client: str, due: float | None, options: dict[str, Any]) -> Iterator[Any]:
        sent.append(due)
        yield from _drawing(small)(prompt, client, due, options)

    fleet = make_fleet(notes)
    fleet.submit(PROMPT, **QUICK).result(60)
    before = time.time()
    fleet.submit(PROMPT, deadline=30.0, **QUICK).result(60)
    assert sent[0] is None
    assert before + 30.0 <= float(sent[1] or 0) <= time.time() + 30.0

    replica = Replica.__new__(Replica)  # without loading a model of its own
    replica.nets = Nets(small)
    with engine.Scheduler(small, max_rows=8) as replica.scheduler:

        async def draw(due: float | None) -> list[Any]:
            return [answer async for answer in replica.draw(PROMPT, "", due, {"seed": [0]} | QUICK)]

        assert asyncio.run(draw(time.time() + 300.0))[-1].images
        with pytest.raises(DeadlineError, match="deadline must leave the time that is needed, got 0 s"):
            asyncio.run(draw(time.time() - 1.0))


def test_cancelling_positions_full_queues_and_closing(small: engine.Engine, make_fleet: Callable[..., Fleet]) -> None:
    gate = threading.Event()

    def held(prompt: str, client: str, due: float | None, options: dict[str, Any]) -> Iterator[Any]:
        assert gate.wait(30)
        yield from _drawing(small)(prompt, client, due, options)

    fleet = make_fleet(held, max_waiting=2)
    jobs = [fleet.submit(PROMPT, seed=i, **QUICK) for i in range(2)]
    assert [job.position for job in jobs] == [1, 2]
    with pytest.raises(QueueFullError, match="at most 2 requests may wait"):
        fleet.submit(PROMPT, **QUICK)
    assert jobs[0].cancel()
    assert [job.position for job in jobs] == [None, 1]
    gate.set()
    assert jobs[1].result(60).images
    with pytest.raises(CancelledError):
        jobs[0].result(60)
    fleet.close()
    assert fleet.counts == {"refused": 1, "cancelled": 1, "done": 1}
    with pytest.raises(SchedulerClosedError, match="the fleet has been closed"):
        fleet.submit(PROMPT, **QUICK)


@pytest.mark.parametrize("options", [{"replicas": 0}, {"ongoing": 0}, {"replicas": 3, "most_replicas": 2}])
def test_bad_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be an integer"):
        FleetOptions(**options)


@pytest.mark.slow
def test_a_killed_replica_costs_no_request() -> None:
    """On Ray Serve itself, under load; then another model takes over while requests go on."""
    sd = engine.load()
    fleet = Fleet(sd, {}, FleetOptions(replicas=2, max_rows=8))
    jobs = [fleet.submit(f"a photo of a cat {i}", seed=i, steps=20) for i in range(12)]
    while not any(job.running() for job in jobs):
        time.sleep(0.1)
    replicas = [
        one for one in psutil.process_iter(["cmdline"]) if "ServeReplica" in " ".join(one.info["cmdline"] or [])
    ]
    os.kill(replicas[0].pid, signal.SIGKILL)
    wait(jobs, timeout=300)
    assert [job.result(0).seeds for job in jobs] == [[i] for i in range(12)]
    assert fleet.counts["done"] == 12

    stop, asked = threading.Event(), list[Any]()

    def keep_asking() -> None:
        while not stop.is_set():
            asked.append(fleet.submit(PROMPT, seed=0, steps=4))
            asked[-1].result(300)

    thread = threading.Thread(target=keep_asking)
    thread.start()
    fleet.change_model({"dtype": "bfloat16"})
    stop.set()
    thread.join()
    assert asked
    assert fleet.submit(PROMPT, seed=0, steps=4).result(300).settings["dtype"] == "bfloat16"
    fleet.close()
    ray.shutdown()


@pytest.mark.slow
def test_replicas_load_networks(small: engine.Engine, small_folder: Path, tmp_path: Path) -> None:
    """On Ray Serve itself."""
    random_controlnet(small, tmp_path / "edges", small_folder)
    load_adapter(small, tmp_path, "plain")
    adapter = str(tmp_path / "plain-0.safetensors"), str(tmp_path / "image_encoder")
    nets = Nets(small, NetFiles({"mine": str(tmp_path / "edges")}, {"style": adapter}))
    fleet = Fleet(small, {"model": str(small_folder)}, FleetOptions(max_rows=8), nets=nets)
    options: dict[str, Any] = {
        "control": engine.Control(nets.controls["mine"], hint(), weight=0.5),
        "image_prompts": engine.ImagePrompt(nets.adapters["style"], picture(), 0.5),
    }
    out = fleet.submit(PROMPT, seed=3, **options, **QUICK).result(120)
    alone = small.generate(PROMPT, seed=3, progress=False, **options, **QUICK)
    torch.testing.assert_close(out.latents, alone.latents, rtol=1e-5, atol=1e-5)
    assert out.settings["control"] == alone.settings["control"]
    fleet.close()
    ray.shutdown()
