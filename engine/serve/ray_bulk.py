"""Bulk runs on Ray Data: rows through a pool of actors, each with an Engine; only statuses come back."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .bulk import Painter, Row, Status


class _Actor:
    """A ``Painter`` that takes and gives columns."""

    def __init__(self, folder: str, loading: Mapping[str, Any], threads: int | None) -> None:
        self.paint = Painter(folder, loading, threads)

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        rows = [row for batch in block["batch"] for row in pickle.loads(batch)]  # our own, from ``paint``
        statuses = self.paint(rows)
        return {"statuses": [json.dumps([s.key, s.status, s.sha256, s.error, s.seconds]) for s in statuses]}


def paint(
    batches: Sequence[Sequence[Row]],
    folder: Path,
    loading: Mapping[str, Any],
    *,
    address: str | None = None,
    actors: int = 1,
    threads: int | None = 1,
    gpus: float = 0.0,
) -> Iterator[list[Status]]:
    """Statuses batch by batch, in the order in which they are done.

    An actor that dies is started again, and its batch is drawn again: files are written whole or not at all, and
    named by their rows, so nothing is lost or there twice.

    Args:
        batches: rows, drawn a batch at a time.
        folder: on a file system that all of the cluster's machines have.
        loading: arguments of ``engine.load``.
        address: of a cluster ("auto" for this machine's); a local one is started where not given.
        actors: how many Engines.
        threads: torch's in each actor; None leaves them alone.
        gpus: that each actor takes.

    Raises:
        RuntimeError: Ray is not installed.
    """
    ray = start_ray(address)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    blobs = [{"batch": pickle.dumps(list(batch))} for batch in batches]
    done = ray.data.from_items(blobs, override_num_blocks=len(blobs)).map_batches(
        _Actor,
        fn_constructor_args=(str(folder.absolute()), dict(loading), threads),
        batch_size=1,
        concurrency=min(actors, len(blobs)),
        num_cpus=threads or 1,
        num_gpus=gpus or None,
    )
    for found in done.iter_batches(batch_size=None, batch_format="pandas"):
        yield [Status(*json.loads(line)) for line in found["statuses"]]


def start_ray(address: str | None) -> Any:
    """The module, connected to a cluster: the one of ``address``, or one that is started here.

    Raises:
        RuntimeError: Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise RuntimeError("ray is not installed; pip install 'twinstream[ray]', or leave --ray out") from error
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    return ray
