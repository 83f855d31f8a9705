"""A client of each test module's ``server``."""

from collections.abc import Iterator

import httpx
import pytest

from tests.serve.http_server import Running


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
