"""Schemathesis on the server's own description: every answer is one that the description has, and none is a 500."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import engine
from tests.serve.http_server import running

_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
_HOOKS = """
import schemathesis

@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict) and "steps" in body:  # what is asked for costs time; its size is not what is tested
        body["steps"] = min(body["steps"], 2) if isinstance(body["steps"], int) else body["steps"]
    return body
"""


@pytest.mark.parametrize(
    ("examples", "phases"), [(3, "fuzzing"), pytest.param(50, "examples,coverage,fuzzing", marks=pytest.mark.slow)]
)
def test_answers_are_as_described(small: engine.Engine, tmp_path: Path, examples: int, phases: str) -> None:
    (tmp_path / "hooks.py").write_text(_HOOKS)
    with running(small, tmp_path) as server:
        command = [
            str(Path(sys.executable).parent / "st"), "run", f"{server.url}/openapi.json",
            "--checks", _CHECKS,
            "--max-examples", str(examples), "--phases", phases,
            "--seed", "1", "--generation-deterministic", "--request-timeout", "30", "--workers", "1", "--no-color",
        ]  # fmt: skip
        environment = os.environ | {"SCHEMATHESIS_HOOKS": str(tmp_path / "hooks.py"), "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=900, check=False
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
