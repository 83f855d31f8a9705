"""Servers as processes: they are waited for, asked, and ended."""

import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.serving.load import Asked
from benchmarks.serving.over_http import Client, measure, running

_SERVER = """
import argparse, http.server, json, time
parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
class Handler(http.server.BaseHTTPRequestHandler):
    def _send(self, data):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())
    def do_GET(self):
        self._send("ok")
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send({"images": ["a"] * (1 if asked["steps"] < 1000 else 2)})
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler).serve_forever()
"""


def test_a_server_is_asked_and_ended(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(_SERVER)
    with running([sys.executable, str(tmp_path / "server.py")]) as address:
        records = measure(address, 6, in_flight=[1, 3], rates=[50.0])
        assert [one.get("in_flight", one.get("rate")) for one in records] == [1, 3, 50.0]
        assert all(one["requests"] == 6 for one in records)
        with pytest.raises(AssertionError):
            Client(address).submit(Asked("a cat", 0, 1000)).result(30)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")


def test_a_server_that_ends_is_told(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="exit status 3"), running([sys.executable, str(tmp_path / "server.py")]):
        pass
