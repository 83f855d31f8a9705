"""The scheduler: pictures as alone, failures and cancellation that stay with their request, bounded and fair queues."""

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from typing import Any

import pytest
import torch
from PIL import Image

import engine
from engine.errors import DeadlineError, NonFiniteError, QueueFullError
from engine.serve.job import Job
from engine.serve.pace import Pace, profile
from engine.serve.scheduler import Scheduler
from tests.pipelines import random_concept

PROMPT, QUICK = "a photo of a cat", {"steps": 4, "progress": False}


@pytest.fixture
def scheduler(small: engine.Engine) -> Iterator[Scheduler]:
    with Scheduler(small, max_rows=16) as one:
        yield one


class Gate:
    """A callback that holds the scheduler's steps until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.reached.set()
        assert self.open.wait(30)


def _held(scheduler: Scheduler, **options: Any) -> tuple[Job, Gate]:
    """A job whose first step is taken, and whose second waits for the gate."""
    gate = Gate()
    job = scheduler.submit(PROMPT, **(QUICK | {"seed": 0, "callback": gate} | options))
    assert gate.reached.wait(30)
    return job, gate


def test_results_are_those_of_generate(small: engine.Engine, scheduler: Scheduler) -> None:
    mask = Image.new("1", (20, 16))
    mask.paste(1, (3, 4, 9, 12))
    requests: list[dict[str, Any]] = [
        {"seed": 1},
        {"seed": [2, 3], "images_per_prompt": 2, "sampler": "euler_ancestral", "steps": 7},
        {"seed": 4, "customization": engine.Infusion([random_concept(small)]), "output": "numpy"},
        {"seed": 5, "customization": engine.DCI("cat", fraction=0.5)},
        {"seed": 6, "height": 24, "width": 8, "output": "latent"},
        {"seed": 9, "image": Image.new("RGB", (20, 16), "blue"), "mask": mask, "mask_padding": 2},
        {"seed": 7, "attention_words": ["cat"], "guidance_scale": 1.0},
        {"seed": 8, "customization": engine.DCI("cat", fraction=0.5), "record_masks": True},
        {"seed": 9, "prompt": PROMPT + " in the snow" * 30},
        {"seed": 10, "prompt": PROMPT + " in the snow" * 60, "attention_words": ["cat"]},
        {"seed": 11, "prompt": f"[{PROMPT}:a dog{' in the snow' * 30}:0.5]", "clip_skip": 1},
    ]
    requests = [QUICK | {"prompt": PROMPT} | one for one in requests]
    jobs = [scheduler.submit(**one) for one in requests]
    for job, one in zip(jobs, requests, strict=True):
        ours, theirs = job.result(60), small.generate(**one)
        assert (ours.latents - theirs.latents).norm() <= 1e-5 * theirs.latents.norm()
        assert ours.settings == theirs.settings
        assert ours.seeds == theirs.seeds
        assert len(ours.images) == len(theirs.images)
        assert (ours.foundation_images is None) == (theirs.foundation_images is None)
        assert {*theirs.timings, "queue"} == set(ours.timings)
        for what in ("attention", "masks"):
            assert (getattr(ours, what) is None) == (getattr(theirs, what) is None)
        if theirs.attention is not None and ours.attention is not None:
            assert abs(ours.attention.heat_map("cat") - theirs.attention.heat_map("cat")).max() < 1e-3
    assert scheduler.counts["done"] == len(requests)


def test_what_cannot_be_encoded_is_refused_at_once(scheduler: Scheduler) -> None:
    for options, message in (
        ({"clip_skip": 2}, "clip_skip must leave one"),
        ({"long_prompts": "error", "prompt": "red " * 80}, "must fit into one chunk"),
        ({"prompt": "a [dog:cat:2]", "customization": engine.DCI("cat")}, "must contain 'cat'"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.submit(**(QUICK | {"prompt": PROMPT} | options))


def test_prompts_of_few_chunks_share_steps(scheduler: Scheduler) -> None:
    first, gate = _held(scheduler)
    jobs = [scheduler.submit(PROMPT + " in the snow" * n, seed=n, **QUICK) for n in (30, 60)]
    before = scheduler.counts["steps"]
    gate.open.set()
    for job in (first, *jobs):
        job.result(60)
    assert scheduler.counts["steps"] - before == 4 + 4, "two chunks with one, three alone"


def test_requests_share_steps(scheduler: Scheduler) -> None:
    held, gate = _held(scheduler)
    jobs = [scheduler.submit(PROMPT, seed=i, **QUICK) for i in range(7)]
    gate.open.set()
    wait([held, *jobs])
    assert scheduler.counts["steps"] == 1 + 4, "the first alone, then all: three of its own, and one more of theirs"
    assert scheduler.counts["rows"] == 8 * 4 * 2


def test_a_batch_has_at_most_so_many_rows(small: engine.Engine) -> None:
    with Scheduler(small, max_rows=4) as scheduler:
        held, gate = _held(scheduler)
        jobs = [scheduler.submit(PROMPT, seed=i, **QUICK) for i in range(4)]
        gate.open.set()
        wait([held, *jobs])
        assert scheduler.counts["rows"] / scheduler.counts["steps"] <= 4
        large = scheduler.submit(PROMPT, seed=0, images_per_prompt=5, **QUICK)
        assert len(large.result(60).images) == 5, "one that is larger is drawn alone"


def test_generate_through_a_scheduler(small: engine.Engine, scheduler: Scheduler) -> None:
    ours, theirs = (small.generate(PROMPT, seed=1, scheduler=one, **QUICK) for one in (scheduler, None))
    assert (ours.latents - theirs.latents).norm() <= 1e-5 * theirs.latents.norm()
    assert scheduler.counts["done"] == 1
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
        small.generate(PROMPT, steps=0, scheduler=scheduler)
    with pytest.raises(ValueError, match="scheduler must be one of this Engine, got one of"):
        engine.load().generate(PROMPT, scheduler=scheduler)
    with pytest.raises(ValueError, match="it takes none beside"):
        scheduler.submit(PROMPT, scheduler=scheduler)


def test_what_cannot_be_drawn_is_refused_at_once(scheduler: Scheduler) -> None:
    for options, message in (
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"sampler": "eular"}, "sampler must be one of"),
        ({"stepz": 3}, "submit has no keyword 'stepz'; did you mean 'steps'"),
        ({"customization": engine.DCI("dog")}, "dog"),
        ({"client": 3}, "client must be a text, got 3"),
        ({"deadline": -1.0}, "deadline must be a finite number >= 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.submit(PROMPT, **options)
    assert scheduler.waiting == scheduler.drawing == 0


def test_a_failure_stays_with_its_request(
    small: engine.Engine, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = small.generate(PROMPT, seed=3, **QUICK).latents
    bad_text, begin = small.text_encoder.encode, small.begin

    def boom(step: int, _total: int, _latents: torch.Tensor) -> None:
        if step == 1:
            raise KeyError("a caller's own")

    def begin_some(request: Any, clock: Any) -> Any:
        if request.seeds == (13,):
            raise NonFiniteError("the text encoder produced NaN")
        started = begin(request, clock)
        if request.seeds == (14,):
            started.x.fill_(torch.nan)
        return started

    monkeypatch.setattr(small, "begin", begin_some)
    held, gate = _held(scheduler)
    jobs = {
        "fine": scheduler.submit(PROMPT, seed=3, **QUICK),
        "callback": scheduler.submit(PROMPT, seed=4, callback=boom, **QUICK),
        "text": scheduler.submit(PROMPT, seed=13, **QUICK),
        "nan": scheduler.submit(PROMPT, seed=14, **QUICK),
    }
    gate.open.set()
    with pytest.raises(KeyError, match="a caller's own"):
        jobs["callback"].result(60)
    with pytest.raises(NonFiniteError, match="the text encoder"):
        jobs["text"].result(60)
    with pytest.raises(NonFiniteError, match="the UNet produced NaN or infinity at step 0 of 4"):
        jobs["nan"].result(60)
    assert (jobs["fine"].result(60).latents - good).norm() <= 1e-5 * good.norm()
    held.result(60)
    assert scheduler.counts["failed"] == 3
    assert bad_text == small.text_encoder.encode


def test_whoever_breaks_a_batch_is_found(
    small: engine.Engine, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where memory does not hold the batch, which is then made smaller."""
    denoise = small.unet.denoise

    def limited(x: torch.Tensor, condition: Any) -> torch.Tensor:
        if len(condition.shifts) > 8:
            raise torch.OutOfMemoryError("no room")
        return denoise(x, condition)

    monkeypatch.setattr(small.unet, "denoise", limited)
    monkeypatch.setattr(small, "out_of_memory", lambda *_: engine.OutOfMemoryError("4 would fit"))
    held, gate = _held(scheduler)
    jobs = [scheduler.submit(PROMPT, seed=i, **QUICK) for i in range(5)]
    huge = scheduler.submit(PROMPT, seed=9, images_per_prompt=8, **QUICK)
    gate.open.set()
    for i, job in enumerate(jobs):
        alone = small.generate(PROMPT, seed=i, **QUICK).latents
        assert (job.result(60).latents - alone).norm() <= 1e-5 * alone.norm()
    with pytest.raises(engine.OutOfMemoryError, match="4 would fit"):
        huge.result(60)
    held.result(60)
    side = small.limits.sample_size * small.limits.factor
    assert scheduler._budgets.rows[side, side] <= 8


def test_cancelling_frees_rows_within_a_step(scheduler: Scheduler) -> None:
    held, gate = _held(scheduler, steps=50)
    waiting = scheduler.submit(PROMPT, seed=1, **QUICK)
    assert (held.position, waiting.position) == (0, 1)
    assert held.running()
    assert not waiting.running()
    assert held.cancel()
    assert held.cancelled()
    gate.open.set()
    assert waiting.result(60).images
    assert (held.position, waiting.position) == (None, None)
    assert scheduler.counts["steps"] == 1 + 4, "none was taken for the cancelled one"
    assert scheduler.counts["cancelled"] == 1
    assert not waiting.cancel(), "it is done"
    with pytest.raises(CancelledError):
        held.result()
    assert wait([held, waiting], timeout=10).not_done == set()


def test_cancelling_one_that_waits(scheduler: Scheduler) -> None:
    held, gate = _held(scheduler)
    waiting = [scheduler.submit(PROMPT, seed=i, **QUICK) for i in range(3)]
    assert [job.position for job in waiting] == [1, 2, 3]
    assert waiting[0].cancel()
    assert [job.position for job in waiting] == [None, 1, 2]
    gate.open.set()
    wait([held, *waiting])
    assert scheduler.counts["rows"] == 3 * 4 * 2


def test_a_callback_cancels_as_in_generate(scheduler: Scheduler) -> None:
    out = scheduler.submit(PROMPT, seed=0, callback=lambda step, *_: step < 1, **QUICK).result(60)
    assert out.cancelled
    assert out.images == []


def test_a_full_queue_refuses_at_once(small: engine.Engine) -> None:
    with Scheduler(small, max_rows=2, max_waiting=3) as scheduler:
        held, gate = _held(scheduler)
        jobs = [scheduler.submit(PROMPT, seed=i, **QUICK) for i in range(3)]
        start = time.perf_counter()
        with pytest.raises(QueueFullError, match="at most 3 requests may wait") as caught:
            scheduler.submit(PROMPT, seed=9, **QUICK)
        assert time.perf_counter() - start < 0.01
        assert caught.value.retry_after > 0
        jobs[1].cancel()
        gate.open.set()
        wait([held, *jobs])
        assert scheduler.submit(PROMPT, seed=9, **QUICK).result(60).images
        assert scheduler.counts["refused"] == 1


def test_deadlines(small: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with Scheduler(small, max_rows=2) as scheduler:
        side = small.limits.sample_size * small.limits.factor
        held, gate = _held(scheduler, steps=10)
        pace = scheduler._budgets.pace((side, side))
        monkeypatch.setattr(pace, "seconds", lambda rows: rows * 0.5)
        with pytest.raises(DeadlineError, match="got 3 s; it would take 10 s more"):
            scheduler.submit(PROMPT, seed=1, deadline=3.0, **QUICK)  # 9 steps of the other, and 4
        soon = scheduler.submit(PROMPT, seed=1, deadline=30.0, **QUICK)
        soon.due = time.monotonic() + 3.0
        gate.open.set()
        with pytest.raises(DeadlineError, match="4 steps are left, and"):
            soon.result(60)
        held.result(60)


def test_clients_share(small: engine.Engine) -> None:
    with Scheduler(small, max_rows=2) as scheduler:
        held, gate = _held(scheduler, client="many")
        ended: list[str] = []
        jobs = [scheduler.submit(PROMPT, seed=i, client="many", **QUICK) for i in range(6)]
        jobs.append(scheduler.submit(PROMPT, seed=9, client="one", **QUICK))
        for job in jobs:
            job.add_done_callback(lambda job: ended.append(job.client))
        gate.open.set()
        wait([held, *jobs])
        assert "one" in ended[:2], "not behind the six that came before"


def test_closing_finishes_or_cancels(small: engine.Engine) -> None:
    scheduler = Scheduler(small, max_rows=4)
    jobs = [scheduler.submit(PROMPT, seed=i, **QUICK) for i in range(5)]
    scheduler.close()
    assert all(job.result(0).images for job in jobs)
    with pytest.raises(RuntimeError, match="the scheduler has been closed"):
        scheduler.submit(PROMPT, seed=1, **QUICK)

    scheduler = Scheduler(small, max_rows=4)
    held, gate = _held(scheduler, steps=50)
    threading.Timer(0.2, gate.open.set).start()
    scheduler.close(cancel=True)
    assert held.cancelled()


def test_a_defect_of_the_scheduler_ends_every_job(small: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(small, max_rows=4)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(scheduler, "_choose", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scheduler.submit(PROMPT, seed=0, **QUICK).result(60)
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.submit(PROMPT, seed=0, **QUICK)


def test_nothing_is_held_when_all_is_done(scheduler: Scheduler) -> None:
    """Neither a request's keys and values nor the batch's, nor clients that are gone."""
    held, gate = _held(scheduler, client="a")
    denoising, phase = held.denoising, scheduler._stepper._joined
    assert denoising is not None
    assert phase is not None
    text = (*denoising.plan.rows.batch.text[0], *phase[0].rows.batch.text[0])
    kept = [weakref.ref(one) for one in text]
    others = [scheduler.submit(PROMPT, seed=i, client=str(i), **QUICK) for i in range(5)]
    gate.open.set()
    wait([held, *others])
    del denoising, phase, text
    for _ in range(200):
        gc.collect()
        if not any(one() is not None for one in kept) and scheduler._stepper._joined is None:
            break
        time.sleep(0.05)
    assert [one() for one in kept] == [None] * 4
    assert scheduler._stepper._joined is None
    assert len(scheduler._served) <= 1


def test_a_size_is_prepared_once_when_it_comes(small: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.serve import pace

    prepared: list[tuple[int, int]] = []
    monkeypatch.setattr(pace, "profile", lambda _sd, *size: (prepared.append(size) or 4, Pace()))
    side = small.limits.sample_size * small.limits.factor
    with Scheduler(small) as scheduler:
        assert scheduler._budgets.rows == {(side, side): 4}
        for _ in range(2):
            scheduler.submit(PROMPT, seed=0, height=24, width=8, **QUICK).result(60)
        assert scheduler._budgets.rows == {(side, side): 4, (24, 8): 4}
    assert prepared == [(side, side), (24, 8)]


def test_pace_is_a_line_through_what_was_seen() -> None:
    pace = Pace()
    assert pace.seconds(4) == 0.0
    pace.observe(4, 2.0)
    assert pace.seconds(2) == pytest.approx(1.0)
    for rows in (2, 8, 16, 4):
        pace.observe(rows, 0.5 + 0.1 * rows)
    pace = Pace()
    for rows in (2, 8, 16, 4):
        pace.observe(rows, 0.5 + 0.1 * rows)
    assert pace.seconds(12) == pytest.approx(1.7)
    for _ in range(200):
        pace.observe(2, 1.4)
        pace.observe(4, 1.8)
    assert pace.seconds(3) == pytest.approx(1.6, rel=0.01), "the latest weighs most"


def test_rows_are_profiled_until_more_cost_as_much(small: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.serve import pace

    seconds = {2: 1.0, 4: 1.2, 8: 2.0, 16: 3.95, 32: 7.0}
    monkeypatch.setattr(pace, "_LONGEST_STEP", 100.0)
    monkeypatch.setattr(pace, "step_seconds", lambda _sd, rows, _size, _pace: seconds[rows])
    monkeypatch.setattr(pace, "batch_rows", lambda *_: 1000)
    assert profile(small, 16, 16)[0] == 8, "16 rows cost nearly twice as much as 8"
    monkeypatch.setattr(pace, "batch_rows", lambda *_: 7)
    assert profile(small, 16, 16)[0] == 4
    monkeypatch.setattr(pace, "_LONGEST_STEP", 1.1)
    monkeypatch.setattr(pace, "batch_rows", lambda *_: None)
    assert profile(small, 16, 16)[0] == 4
    monkeypatch.undo()
    rows, seen = profile(small, 16, 16)
    assert rows in (2, 4, 8, 16, 32, 64)
    assert seen.seconds(rows) > 0
