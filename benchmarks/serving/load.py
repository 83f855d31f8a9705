"""How many requests a second, and how long each takes, by who draws them: ``python -m benchmarks.serving.load``.

The embedded model; every system gets the same requests in the same order. A closed loop keeps so many in flight; an
open loop lets them come as a Poisson process, at a share of what the system that draws one by one can do. Writes
``benchmarks/results/serving-<date>.json``.
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import engine
from benchmarks.machine import RESULTS, machine, write_result
from benchmarks.systems import FULL_SIZE, full_size_folder
from engine.errors import QueueFullError
from engine.serve.pace import Pace, step_seconds
from engine.weights.checkpoint import ASSETS, EMBEDDED_MODEL

PROMPTS = ("a photo of a cat on a beach", "a photo of a cat in the snow", "a sketch of a cat in a city")
STEPS = (8, 20, 30)
_PARTS = ("loops", "short", "soak", "full-size")
Submit = Callable[["Asked"], "Future[Any]"]
System = tuple[AbstractContextManager[Any], Submit]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: a picture."""

    prompt: str
    seed: int
    steps: int
    customization: Any = None

    def options(self) -> dict[str, Any]:
        return {"seed": self.seed, "steps": self.steps, "customization": self.customization, "progress": False}


def requests(n: int, kinds: str, seed: int = 0) -> list[Asked]:
    """``kinds``: "plain", or "mixed" with Infusion on both foundations and DCI, two in five of them."""
    generator = np.random.default_rng(seed)
    cat = engine.Concept.load(ASSETS / "concepts" / "striped-cat.safetensors")
    customs = [None] * 6 + [engine.Infusion([cat]), engine.Infusion([cat], foundation="shared", strength=0.5)]
    customs += [engine.DCI("cat", fraction=0.3), engine.Infusion([cat], strength=0.7)]
    return [
        Asked(
            str(generator.choice(PROMPTS)),
            i,
            int(generator.choice(STEPS)),
            customs[generator.integers(10)] if kinds == "mixed" else None,
        )
        for i in range(n)
    ]


class RequestBatches:
    """Requests of the same steps that wait when the last batch ends are drawn in one call."""

    def __init__(self, sd: engine.Engine, most: int = 8) -> None:
        self.sd, self.most = sd, most
        self._waiting: queue.Queue[tuple[Asked, Future[Any]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, asked: Asked) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.put((asked, future))
        return future

    def __enter__(self) -> RequestBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        held: list[tuple[Asked, Future[Any]]] = []
        ended = False
        while held or not ended:
            while not ended and (not held or not self._waiting.empty()):
                item = self._waiting.get()
                if item is None:
                    ended = True
                else:
                    held.append(item)
            if not held:
                return
            batch = [one for one in held if one[0].steps == held[0][0].steps][: self.most]
            held = [one for one in held if one not in batch]
            out = self.sd.generate(
                [one.prompt for one, _ in batch],
                seed=[one.seed for one, _ in batch],
                steps=batch[0][0].steps,
                customization=[one.customization for one, _ in batch],
                progress=False,
            )
            for (_, future), picture in zip(batch, out.images, strict=True):
                future.set_result(picture)


def systems(sd: engine.Engine, kinds: str, max_rows: int | None) -> dict[str, System]:
    """Who draws, by name; each is entered while it is measured."""
    found: dict[str, System] = {}
    scheduler = engine.Scheduler(sd, max_rows, max_waiting=10_000)
    found["scheduler"] = scheduler, lambda one: scheduler.submit(one.prompt, **one.options())
    for name, threads in (("one by one", 1), ("four threads", 4)):
        pool = ThreadPoolExecutor(threads)
        found[name] = pool, lambda one, pool=pool: pool.submit(sd.generate, one.prompt, **one.options())
    batches = RequestBatches(sd)
    found["request batches"] = batches, batches.submit
    if kinds == "plain":
        pipeline, lock = diffusers_pipeline(), ThreadPoolExecutor(1)

        def draw(one: Asked) -> Any:
            generator = torch.Generator("cpu").manual_seed(one.seed)
            return pipeline(one.prompt, num_inference_steps=one.steps, guidance_scale=8.0, generator=generator).images

        found["diffusers behind a lock"] = lock, lambda one: lock.submit(draw, one)
    return found


def diffusers_pipeline() -> Any:
    """The embedded model in diffusers, float32, with the same sampler."""
    import diffusers

    pipeline: Any = diffusers.DiffusionPipeline
    made = pipeline.from_pretrained(EMBEDDED_MODEL, safety_checker=None, torch_dtype=torch.float32)
    made.scheduler = diffusers.DDIMScheduler.from_config(made.scheduler.config)
    made.set_progress_bar_config(disable=True)
    return made


@dataclass(slots=True)
class Seen:
    """Latencies in seconds, and how long the whole took."""

    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        p50, p95, p99 = np.percentile(self.latencies, [50, 95, 99])
        return {
            "requests": len(self.latencies),
            "seconds": round(self.seconds, 2),
            "per_second": round(len(self.latencies) / self.seconds, 3),
            **{name: round(float(value), 3) for name, value in (("p50", p50), ("p95", p95), ("p99", p99))},
        }


def closed_loop(
    submit: Submit, asked: Sequence[Asked], in_flight: int, wait: Callable[[], None] = lambda: None
) -> Seen:
    """Another request comes when one is done, and ``wait`` has returned; latencies begin then."""
    seen, room, lock = Seen(), threading.Semaphore(in_flight), threading.Lock()
    start, futures = time.perf_counter(), []

    def ended(begin: float) -> Callable[[Future[Any]], None]:
        def note(_: Future[Any]) -> None:
            with lock:
                seen.latencies.append(time.perf_counter() - begin)
            room.release()

        return note

    for one in asked:
        room.acquire()
        wait()
        begin = time.perf_counter()
        future = submit(one)
        future.add_done_callback(ended(begin))
        futures.append(future)
    for future in futures:
        future.result()
    seen.seconds = time.perf_counter() - start
    return seen


def open_loop(submit: Submit, asked: Sequence[Asked], rate: float, seed: int = 1) -> Seen:
    """Requests come as a Poisson process of ``rate`` a second, however many are in flight."""
    times = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, len(asked)))
    start, left = time.perf_counter(), iter(times)

    def wait() -> None:
        time.sleep(max(0.0, start + float(next(left)) - time.perf_counter()))

    return closed_loop(submit, asked, len(asked), wait)


def short_behind_long(submit: Submit, rate: float, n: int) -> list[float]:
    """Latencies of requests of 8 steps that come while ones of 50 come at ``rate`` a second."""
    stop, errors = threading.Event(), list[BaseException]()
    generator = np.random.default_rng(2)

    def flood() -> None:
        i = 0
        while not stop.wait(float(generator.exponential(1 / rate))):
            submit(Asked(PROMPTS[0], 1000 + i, 50)).add_done_callback(
                lambda f: errors.append(e) if not f.cancelled() and (e := f.exception()) else None
            )
            i += 1

    thread = threading.Thread(target=flood)
    thread.start()
    time.sleep(3 / rate)
    latencies = []
    for i in range(n):
        begin = time.perf_counter()
        submit(Asked(PROMPTS[1], i, 8)).result()
        latencies.append(time.perf_counter() - begin)
    stop.set()
    thread.join()
    assert not errors, errors
    return latencies


def soak(sd: engine.Engine, minutes: float, rate: float, max_rows: int | None) -> dict[str, Any]:
    """Mixed requests at ``rate`` a second, a tenth cancelled at some time and a twentieth bad; what became of each."""
    generator, process = np.random.default_rng(3), psutil.Process()
    outcomes = {"drawn": 0, "cancelled": 0, "refused": 0, "bad": 0, "wrong": 0}
    memory: list[int] = []
    jobs: list[tuple[Any, bool]] = []
    with engine.Scheduler(sd, max_rows) as scheduler:
        end, next_look = time.monotonic() + 60 * minutes, 0.0
        asked = requests(4000, "mixed", seed=4)
        i = 0
        while time.monotonic() < end:
            time.sleep(float(generator.exponential(1 / rate)))
            one, dice = asked[i % len(asked)], generator.random()
            i += 1
            if dice < 0.05:
                try:
                    scheduler.submit(one.prompt, **replace(one, steps=0).options())
                    outcomes["wrong"] += 1
                except ValueError:
                    outcomes["bad"] += 1
                continue
            try:
                job = scheduler.submit(one.prompt, **one.options())
            except QueueFullError:
                outcomes["refused"] += 1
                continue
            cancels = dice < 0.15
            if cancels:
                threading.Timer(float(generator.random()), job.cancel).start()
            jobs.append((job, cancels))
            for done, cancels in [entry for entry in jobs if entry[0].done()]:
                outcomes[_outcome(done, cancels)] += 1
                jobs.remove((done, cancels))
            if time.monotonic() > next_look:
                memory.append(process.memory_info().rss)
                next_look = time.monotonic() + 5
        for job, cancels in jobs:
            with suppress(CancelledError):
                job.result(120)
            outcomes[_outcome(job, cancels)] += 1
    half = len(memory) // 2
    growth = float(np.mean(memory[-half // 2 :]) / np.mean(memory[half : half + half // 2]) - 1)
    return {"minutes": minutes, "submitted": i, "outcomes": outcomes, "memory_growth_last_half": round(growth, 4)}


def _outcome(job: Any, cancels: bool) -> str:
    if job.cancelled():
        return "cancelled" if cancels else "wrong"
    return "drawn" if job.exception() is None and len(job.result().images) == 1 else "wrong"


def full_size(sd: engine.Engine, n: int, steps: int) -> dict[str, Any]:
    """At SD v1.5's size: seconds of a step by its rows, and how many pictures a second when all are asked for at once.

    Few steps and requests, since a picture takes minutes there; text encoder and VAE weigh more than they would.
    """
    by_rows = {rows: step_seconds(sd, rows, (64, 64), Pace()) for rows in (2, 4, 8)}
    print(by_rows, flush=True)
    asked = [Asked(PROMPTS[i % len(PROMPTS)], i, steps) for i in range(n)]
    scheduler, pool = engine.Scheduler(sd, max(by_rows)), ThreadPoolExecutor(1)
    found: dict[str, System] = {
        "scheduler": (scheduler, lambda one: scheduler.submit(one.prompt, **one.options())),
        "one by one": (pool, lambda one: pool.submit(sd.generate, one.prompt, **one.options())),
    }
    records = []
    for name, (context, submit) in found.items():
        with context:
            closed_loop(submit, [replace(asked[0], steps=1)], 1)  # warm
            records.append({"system": name, "in_flight": n} | closed_loop(submit, asked, n).record())
        print(records[-1], flush=True)
    step = {str(rows): round(seconds, 3) for rows, seconds in by_rows.items()}
    return {"dtype": str(sd.dtype).removeprefix("torch."), "steps": steps, "step_seconds": step, "serving": records}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64, help="of each measurement (default: 64)")
    parser.add_argument("--in-flight", type=int, default=16, help="(default: 16)")
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[0.5, 0.8], help="of the open loop (default: 0.5 0.8)"
    )
    parser.add_argument("--max-rows", type=int, help="of the scheduler (default: profiled)")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS[:2], help="(default: loops short)")
    parser.add_argument("--soak-minutes", type=float, default=60.0, help="(default: 60)")
    parser.add_argument("--result", type=Path, default=RESULTS / f"serving-{date.today().isoformat()}.json")
    arguments = parser.parse_args(argv)
    result: dict[str, Any] = {}
    if "full-size" in arguments.parts:
        folder = full_size_folder(FULL_SIZE)
        result["serving_full_size"] = full_size(engine.load(folder, dtype="bfloat16"), n=4, steps=4)
    sd = engine.load()
    kinds = ("plain", "mixed") if {"loops", "short"} & {*arguments.parts} else ("mixed",)
    rates = {kind: _one_by_one(sd, requests(arguments.requests, kind)) for kind in kinds}
    if "loops" in arguments.parts:
        result["serving"] = _loops(sd, arguments, rates)
    if "short" in arguments.parts:
        result["short_behind_long"] = _short(sd, rates["plain"], arguments.max_rows)
    if "soak" in arguments.parts:
        result["soak"] = soak(sd, arguments.soak_minutes, 0.8 * rates["mixed"], arguments.max_rows)
        print(result["soak"])
    settings = {"requests": arguments.requests, "in_flight": arguments.in_flight, "steps": STEPS, "rates": rates}
    write_result(arguments.result, machine(), {"settings": settings} | result)


def _one_by_one(sd: engine.Engine, asked: Sequence[Asked]) -> float:
    """Pictures a second, one after the other."""
    sd.generate(asked[0].prompt, **asked[0].options())
    start = time.perf_counter()
    for one in asked:
        sd.generate(one.prompt, **one.options())
    return round(len(asked) / (time.perf_counter() - start), 3)


def _loops(sd: engine.Engine, arguments: argparse.Namespace, rates: dict[str, float]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for kinds, load in ((kinds, load) for load in (None, *arguments.loads) for kinds in rates):
        asked = requests(arguments.requests, kinds, seed=0 if load is None else 5)
        for name, (context, submit) in systems(sd, kinds, arguments.max_rows).items():
            with context:
                closed_loop(submit, asked[:4], 4)  # warm
                if load is None:
                    seen = closed_loop(submit, asked, arguments.in_flight)
                else:
                    seen = open_loop(submit, asked, load * rates[kinds])
            loop = "closed" if load is None else f"open, load {load}"
            records.append({"loop": loop, "kinds": kinds, "system": name} | seen.record())
            print(records[-1], flush=True)
    return records


def _short(sd: engine.Engine, rate: float, max_rows: int | None) -> list[dict[str, Any]]:
    """A short request's latency alone and behind long ones at half the load of who draws one by one."""
    long_rate = 0.5 * rate * float(np.mean(STEPS)) / 50
    found = []
    for name, (context, submit) in systems(sd, "mixed", max_rows).items():
        with context:
            alone = [closed_loop(submit, [Asked(PROMPTS[1], i, 8)], 1).seconds for i in range(8)]
            behind = short_behind_long(submit, long_rate, 16)
            medians = float(np.median(alone)), float(np.median(behind))
        found.append({"system": name, "alone": round(medians[0], 3), "behind": round(medians[1], 3)})
        found[-1] |= {"ratio": round(medians[1] / medians[0], 2), "worst": round(max(behind), 3)}
        print(found[-1], flush=True)
    return found


if __name__ == "__main__":
    main()
