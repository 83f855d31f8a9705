"""``twinstream serve``: the application under uvicorn."""

from __future__ import annotations

import ipaddress
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from ...engine import Engine
from ...weights.checkpoint import ASSETS
from ...weights.tiny_vae_file import read_tiny_decoder
from ..fleet import Fleet
from ..nets import Nets
from ..scheduler import Scheduler
from .app import make_app
from .guard import LOG
from .service import Limits, Service
from .shelf import Shelf

TOKEN_VARIABLE = "TWINSTREAM_TOKEN"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How a server runs.

    Attributes:
        host, port: where it listens.
        concepts: folder of the concepts that clients put there; one that ends with the server where not given.
        max_rows, max_waiting: see ``Scheduler``.
        log_prompts: whether the log holds what is asked for.
        grace_seconds: for which what runs goes on when it is told to stop.
        preview_vae: file of a TAESD, which then makes the previews; see ``read_tiny_decoder``.
        limits: of clients.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    concepts: Path | None = None
    max_rows: int | None = None
    max_waiting: int = 64
    log_prompts: bool = False
    grace_seconds: float = 30.0
    preview_vae: Path | None = None
    limits: Limits = field(default_factory=Limits)


def read_tokens(file: Path | None) -> list[str]:
    """Of the environment, and of a file with one a line; they are not taken from a command line, which others see.

    Raises:
        ValueError: the file cannot be read, or a token is shorter than 16 characters.
    """
    tokens = os.environ.get(TOKEN_VARIABLE, "").split()
    if file is not None:
        try:
            tokens += file.read_text(encoding="ascii").split()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the token file must be readable ASCII: {error}") from error
    if any(len(token) < 16 for token in tokens):
        raise ValueError("a token must have at least 16 characters")
    return tokens


def check_address(host: str, tokens: Sequence[str]) -> None:
    """Refuse to be reached from other machines by whoever likes."""
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not is_local and not tokens:
        rule = f"a host that others reach needs a token ({TOKEN_VARIABLE}, or --token-file)"
        raise ValueError(f"{rule}, got {host!r} without")


def serve(
    sd: Engine, options: ServeOptions, tokens: Sequence[str], fleet: Fleet | None = None, nets: Nets | None = None
) -> None:
    """Serve until SIGINT or SIGTERM: what runs is then finished, within its time, and nothing new is taken.

    Args:
        sd: the Engine, which checks what clients send, and draws it unless there is a fleet.
        options: how.
        tokens: see ``make_app``.
        fleet: who draws.
        nets: that clients may name; those that a fleet has.

    Raises:
        ValueError: it would be open to other machines without a token.
        CheckpointError: the previews' decoder cannot be read, or does not fit the model.
    """
    check_address(options.host, tokens)
    decoder = None if options.preview_vae is None else read_tiny_decoder(options.preview_vae, sd.vae)
    LOG.setLevel(logging.INFO)
    LOG.addHandler(handler := logging.StreamHandler())
    handler.setFormatter(logging.Formatter("%(message)s"))
    with tempfile.TemporaryDirectory(prefix="twinstream-") as temporary:
        shelf = Shelf(sd, options.concepts or Path(temporary), ASSETS / "concepts")
        scheduler = Scheduler(sd, options.max_rows, options.max_waiting) if fleet is None else fleet
        service = Service(scheduler, shelf, options.limits, decoder, nets)
        app = make_app(service, tokens, options.log_prompts, options.grace_seconds)
        config = uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=round(options.grace_seconds),
            server_header=False,
        )
        uvicorn.Server(config).run()
