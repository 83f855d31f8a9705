"""The load generator itself: latencies are of the request, not of the wait for it."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from benchmarks.serving import load, table
from benchmarks.serving.load import Asked, Seen, closed_loop, open_loop, requests

ASKED = [Asked("a cat", i, 8) for i in range(12)]


def test_a_closed_loop_keeps_so_many_in_flight() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1

    with ThreadPoolExecutor(12) as pool:
        seen = closed_loop(lambda _: pool.submit(work), ASKED, 3)
    assert most == 3
    assert len(seen.latencies) == 12
    assert seen.seconds >= 4 * 0.02


def test_latencies_of_an_open_loop_leave_out_the_wait_for_the_request() -> None:
    def at_once(_: Asked) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(None)
        return future

    seen = open_loop(at_once, ASKED, rate=40.0)
    assert seen.seconds > 0.1
    assert max(seen.latencies) < 0.02


def test_requests_are_the_same_for_all_and_mixed_as_asked() -> None:
    plain, mixed = requests(50, "plain"), requests(50, "mixed")
    assert [one.options() for one in plain] == [one.options() for one in requests(50, "plain")]
    assert all(one.customization is None for one in plain)
    share = np.mean([one.customization is not None for one in mixed])
    assert 0.2 < share < 0.6
    assert {one.steps for one in mixed} == set(load.STEPS)


def test_a_record_and_its_table(tmp_path: Any) -> None:
    record = Seen([1.0, 2.0, 3.0], seconds=2.0).record()
    assert (record["per_second"], record["p50"]) == (1.5, 2.0)
    machine = {"cpu": "a CPU", "threads": 2, "versions": {"torch": "2"}, "commit": "0" * 40, "date": "today"}
    outcomes = {"drawn": 8, "cancelled": 1, "bad": 1, "refused": 0, "wrong": 0}
    result = {
        "machine": machine,
        "settings": {"requests": 3, "in_flight": 16, "steps": [8, 20, 30]},
        "serving": [{"loop": "open, load 0.8", "kinds": "plain", "system": "scheduler"} | record],
        "short_behind_long": [{"system": "scheduler", "alone": 0.5, "behind": 0.75, "ratio": 1.5, "worst": 1.0}],
        "soak": {"minutes": 1, "submitted": 10, "outcomes": outcomes, "memory_growth_last_half": 0.01},
    }
    path = tmp_path / "serving.json"
    text = table.show(path, result)
    assert "| plain | Poisson, load 0.8 | scheduler | 1.50 | 2.00 |" in text
    assert "| scheduler | 0.50 | 0.75 | 1.50 | 1.00 |" in text
    text = table.show_soak(path, result)
    assert "of 10 requests 8 were drawn" in text
    assert "+1.0 %" in text
    result["http"] = [{"system": "diffusers", "in_flight": 4} | record, {"system": "twinstream", "rate": 0.5} | record]
    text = table.show_http(path, result)
    assert "| diffusers | 4 in flight | 1.50 | 2.00 | 2.90 | 2.98 |" in text
    assert "| twinstream | Poisson, 0.50 a second | 1.50 |" in text
    full = {"dtype": "bfloat16", "steps": 4, "step_seconds": {"2": 3.3, "4": 6.25}}
    result["serving_full_size"] = full | {"serving": [{"system": "scheduler", "in_flight": 4} | record]}
    text = table.show_full_size(path, result)
    assert "by its rows: 3.30 for 2, 6.25 for 4" in text
    assert "| scheduler | 3 | 90.00 | 2.0 | 2.9 |" in text


def test_who_breaks_in_a_short_request_s_way_is_told() -> None:
    def fails(one: Asked) -> Future[Any]:
        future: Future[Any] = Future()
        if one.steps == 50:
            future.set_exception(RuntimeError("no"))
        else:
            future.set_result(None)
        return future

    with pytest.raises(AssertionError):
        load.short_behind_long(fails, rate=200.0, n=3)
