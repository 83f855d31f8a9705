"""diffusers behind FastAPI and a lock: ``python -m benchmarks.serving.diffusers_server --port N``."""

from __future__ import annotations

import argparse
import base64
import io
import threading

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.serving.load import diffusers_pipeline


class Asked(BaseModel):
    prompt: str
    seed: int
    steps: int
    guidance_scale: float = 8.0


def make_app() -> FastAPI:
    """``POST /generate`` draws one picture at a time, in a thread of the server's pool; PNG in base64."""
    app, pipeline, lock = FastAPI(), diffusers_pipeline(), threading.Lock()

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/v1/generate")
    def generate(asked: Asked) -> dict[str, list[str]]:
        generator = torch.Generator("cpu").manual_seed(asked.seed)
        options = {"num_inference_steps": asked.steps, "guidance_scale": asked.guidance_scale, "generator": generator}
        with lock:
            (picture,) = pipeline(asked.prompt, **options).images
        picture.save(data := io.BytesIO(), "PNG")
        return {"images": [base64.b64encode(data.getvalue()).decode()]}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    uvicorn.run(make_app(), port=parser.parse_args().port, log_level="warning")
