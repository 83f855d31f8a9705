"""Whole servers, asked over HTTP: ``python -m benchmarks.serving.over_http``.

``twinstream serve`` in one process and on replicas through Ray, beside diffusers behind FastAPI with a lock. Every
server is a process of its own, with all of the machine's processors; answers are PNGs in base64. A closed loop keeps 1,
4, 16 ... requests in flight; an open one is a Poisson process at a share of what diffusers' server can do.
Writes ``benchmarks/results/http-<date>.json``.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import RESULTS, machine, write_result
from benchmarks.serving.load import STEPS, Asked, closed_loop, open_loop, requests

_START_SECONDS = 180.0
_MOST_IN_FLIGHT = 256


def servers(replicas: Sequence[int]) -> dict[str, list[str]]:
    """Commands by the name of a server; a port comes behind."""
    python, serve = sys.executable, [sys.executable, "-m", "engine.cli", "serve", "--max-waiting", "1000"]
    found = {"diffusers": [python, "-m", "benchmarks.serving.diffusers_server"], "twinstream": serve}
    return found | {f"twinstream, {n} replicas": [*serve, "--ray", "--replicas", str(n)] for n in replicas}


@contextmanager
def running(command: Sequence[str]) -> Iterator[str]:
    """A server until the block ends; its address.

    Raises:
        RuntimeError: it does not answer in three minutes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + _START_SECONDS
    try:
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no server: {' '.join(command)}, exit status {process.returncode}")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").is_success
    except httpx.HTTPError:
        return False


class Client:
    """Asks a server for pictures, each in a thread that waits for it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.http = httpx.Client(timeout=None, limits=httpx.Limits(max_connections=_MOST_IN_FLIGHT))
        self.pool = ThreadPoolExecutor(_MOST_IN_FLIGHT)

    def submit(self, asked: Asked) -> Future[Any]:
        return self.pool.submit(self._post, asked)

    def _post(self, asked: Asked) -> None:
        body = {"prompt": asked.prompt, "seed": asked.seed, "steps": asked.steps, "guidance_scale": 8.0}
        answer = self.http.post(f"{self.address}/v1/generate", json=body)
        answer.raise_for_status()
        assert len(answer.json()["images"]) == 1


def measure(address: str, n: int, in_flight: Sequence[int], rates: Sequence[float]) -> list[dict[str, Any]]:
    """Closed loops with so many in flight, then open ones of so many requests a second."""
    client, asked = Client(address), requests(n, "plain")
    closed_loop(client.submit, asked[:4], 4)  # warm
    records = [{"in_flight": k} | closed_loop(client.submit, asked, k).record() for k in in_flight]
    return records + [{"rate": round(rate, 3)} | open_loop(client.submit, asked, rate).record() for rate in rates]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=48, help="of each measurement (default: 48)")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 4, 16], help="(default: 1 4 16)")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8], help="(default: 0.5 0.8)")
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, 2], help="of further servers (default: 1 2)")
    parser.add_argument("--result", type=Path, default=RESULTS / f"http-{date.today().isoformat()}.json")
    arguments = parser.parse_args(argv)
    records: list[dict[str, Any]] = []
    rates: list[float] = []
    for name, command in servers(arguments.replicas).items():
        with running(command) as address:
            for record in measure(address, arguments.requests, arguments.in_flight, rates):
                records.append({"system": name} | record)
                print(records[-1], flush=True)
            if not rates:  # the first server's own rate, one request at a time
                rates = [load * records[0]["per_second"] for load in arguments.loads]
                for record in measure(address, arguments.requests, [], rates):
                    records.append({"system": name} | record)
                    print(records[-1], flush=True)
        settings = {"requests": arguments.requests, "steps": STEPS, "loads": arguments.loads}
        write_result(arguments.result, machine(), {"settings": settings, "http": records})  # what is there so far


if __name__ == "__main__":
    main()
