"""A server for tests, in a thread of this process."""

import base64
import io
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

import engine
from engine.serve.http.app import make_app
from engine.serve.http.service import Limits, Service
from engine.serve.http.shelf import Shelf
from engine.serve.nets import Nets
from engine.serve.scheduler import Scheduler


@dataclass
class Running:
    url: str
    service: Service
    server: uvicorn.Server


def pixels_of(text: str) -> np.ndarray:
    """A picture (H, W, 3) uint8 that came in base64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


@contextmanager
def running(
    sd: engine.Engine,
    folder: Path,
    tokens: Sequence[str] = (),
    limits: Limits | None = None,
    max_waiting: int = 64,
    nets: Nets | None = None,
    **options: Any,
) -> Iterator[Running]:
    """Concepts put there go to ``folder/put``; those that came with it are in ``folder/shipped``."""
    (folder / "shipped").mkdir(exist_ok=True)
    scheduler = Scheduler(sd, max_rows=8, max_waiting=max_waiting)
    service = Service(scheduler, Shelf(sd, folder / "put", folder / "shipped"), limits or Limits(), nets=nets)
    app = make_app(service, tokens, **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", service, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
