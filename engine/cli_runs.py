"""The commands beside drawing and training: ``twinstream batch | calibrate | convert | evaluate | serve | toy``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .checks import check_choice, check_integer, check_number
from .methods.asked_pictures import NetFiles, read_net_files
from .methods.lora import asked_lora


def add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "rows",
        type=Path,
        metavar="FILE",
        help="JSONL, one picture a line: prompt and seed, and what else generate takes (steps, sampler, height ...), "
        "concepts and their options (concepts, foundation, concept_strength, dci ...), control, image_prompts, id, "
        "latents",
    )
    _add_nets(parser)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at a time (default: 8)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_ray(parser)
    parser.set_defaults(run=_batch)


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--concept", type=Path, action="append", required=True, metavar="FILE", help="may be repeated")
    parser.add_argument("--dataset", type=Path, required=True, help="folder in DreamBench's layout")
    parser.add_argument(
        "--subject", action="append", metavar="NAME", help="of each concept, if it is not its file's stem"
    )
    parser.add_argument("--clip", metavar="MODEL", help="CLIP of transformers (default: the embedded model's encoder)")
    parser.add_argument("--dino", metavar="MODEL", help="ViT or DINOv2 of transformers (default: not measured)")
    parser.add_argument("--protocol", default="infusion", help="infusion: 20 prompts x 50 pictures; dci: 25 x 4")
    parser.add_argument("--images-per-prompt", type=int, metavar="N", help="other than the protocol's")
    parser.add_argument(
        "--prompts", type=int, metavar="N", help="other than the protocol's, the first of the subject's"
    )
    parser.add_argument("--steps", type=int, help="other than the protocol's 50")
    parser.add_argument("--strength", type=float, action="append", help="of the concept; repeatable (default: 1)")
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="folder for pictures and page (default: report)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="pictures at a time (default: 8)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_ray(parser)
    parser.set_defaults(run=_evaluate)


def add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="others than 127.0.0.1 need a token")
    parser.add_argument("--port", type=int, default=7860, help="(default: 7860)")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="with bearer tokens; or TWINSTREAM_TOKEN")
    parser.add_argument("--concepts", type=Path, metavar="FOLDER", help="where concepts that clients put are kept")
    _add_nets(parser)
    parser.add_argument("--max-rows", type=int, metavar="N", help="of a UNet batch (default: profiled)")
    parser.add_argument("--max-waiting", type=int, default=64, metavar="N", help="requests (default: 64)")
    parser.add_argument("--preview-vae", type=Path, metavar="FILE", help="TAESD for previews (default: a linear map)")
    parser.add_argument("--log-prompts", action="store_true", help="write what is asked for into the log")
    parser.add_argument(
        "--grace-seconds", type=float, default=30.0, help="for what runs when it is told to stop (default: 30)"
    )
    parser.add_argument("--ray", action="store_true", help="draw on replicas through Ray Serve")
    parser.add_argument("--replicas", type=int, metavar="N", help="with --ray: at least (default: 1)")
    parser.add_argument("--most-replicas", type=int, metavar="N", help="with --ray: by how many requests wait")
    parser.add_argument("--cpus", type=float, help="with --ray: of each replica (default: 1)")
    parser.add_argument("--gpus", type=float, help="with --ray: of each replica (default: 0)")
    _add_address(parser)
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    try:
        from .serve.http.run import ServeOptions, read_tokens, serve
    except ImportError as error:
        raise RuntimeError(f"{error.name} is not installed; pip install 'twinstream[serve]'") from error

    from .loading import load
    from .serve.nets import Nets

    names = ("host", "port", "concepts", "max_rows", "max_waiting", "log_prompts", "grace_seconds", "preview_vae")
    options = ServeOptions(**{name: getattr(arguments, name) for name in names})
    tokens, loading, files = read_tokens(arguments.token_file), loading_arguments(arguments), _net_files(arguments)
    names = ("replicas", "most_replicas", "cpus", "gpus", "address")
    ray = _given_to_ray(arguments, dict(zip(names, names, strict=True)))
    sd, fleet = load(**loading), None
    nets = Nets(sd, files)
    if ray is not None:
        from .serve.fleet import Fleet, FleetOptions

        fleet = Fleet(sd, loading, FleetOptions(max_rows=options.max_rows, **ray), options.max_waiting, nets)
    print(f"http://{options.host}:{options.port}", flush=True)
    serve(sd, options, tokens, fleet, nets)
    return 0


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".safetensors, in the original layout")
    parser.add_argument("--file-dtype", default="float16", help="float16, bfloat16 or float32 (default: float16)")
    parser.set_defaults(run=_convert)


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--latents", type=int, nargs=2, metavar=("H", "W"), help="of pictures of H/8 x W/8 (default: the model's)"
    )
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4], metavar="N", help="at a time (default: 1 4)")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which the rest is left (default: 600)")
    parser.add_argument("--again", action="store_true", help="what is known already, too")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> int:
    from .backends.calibration.calls import words_of
    from .loading import calibrate_card

    images = [check_integer("images", n, 1) for n in arguments.images]
    size = tuple(check_integer("latents", n, 1) for n in arguments.latents) if arguments.latents else None
    seconds = check_number("seconds", arguments.seconds, 0.0, math.inf)
    options = {"size": size, "images": images, "seconds": seconds, "again": arguments.again}
    done = calibrate_card(loading_arguments(arguments), progress=not arguments.quiet, **options)
    for key, rows, choice in done.table:
        print(f"{choice.serves:<10}{words_of(key)}, {rows} rows: {choice.why}")
        for name, why in choice.wrong.items():
            print(f"{'':<10}{name}: {why}")
    left = f", {done.left} left for another time" if done.left else ""
    print(f"{done.table.path}  {done.asked} calls in {done.seconds:.1f} s{left}")
    return 0


def add_toy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", help="agnostic: of four concepts one is tuned; specific: of 25 modes of one, five are")
    parser.add_argument("--steps", type=int, default=3000, help="of the base's training (default: 3000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for figure and measures (default: out)")
    parser.set_defaults(run=_toy)


def _add_ray(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ray", action="store_true", help="work in actors of Ray, on this machine or a cluster")
    _add_address(parser)
    parser.add_argument("--actors", type=int, help="with --ray: Engines (default: 1)")
    parser.add_argument("--actor-threads", type=int, metavar="N", help="with --ray: torch's in each (default: 1)")
    parser.add_argument("--actor-gpus", type=float, metavar="N", help="with --ray: for each (default: 0)")


def _add_nets(parser: argparse.ArgumentParser) -> None:
    help = "a ControlNet, folder or file, and how requests name it; may be repeated"
    parser.add_argument("--control", action="append", default=[], metavar="NAME=PATH", help=help)
    help = "an IP-Adapter's file, and how requests name it; may be repeated"
    parser.add_argument("--image-prompt-adapter", action="append", default=[], metavar="NAME=FILE", help=help)
    add_image_encoder(parser)


def add_image_encoder(parser: argparse.ArgumentParser) -> None:
    help = "of the IP-Adapters (default: the folder image_encoder beside each)"
    parser.add_argument("--image-encoder", type=Path, metavar="FOLDER", help=help)


def _net_files(arguments: argparse.Namespace) -> NetFiles:
    return read_net_files(arguments.control, arguments.image_prompt_adapter, arguments.image_encoder)


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="with --ray: of a cluster, or auto (default: one is started here)")


def loading_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``engine.load``."""
    names = ("model", "device", "dtype", "backend", "config", "vae", "calibrate")
    loading = {name: getattr(arguments, name) for name in names}
    return loading | {"loras": [*map(asked_lora, arguments.loras)], "embeddings": _embeddings(arguments.embeddings)}


def _embeddings(given: Sequence[str]) -> dict[str, str]:
    """Files by names, each from ``NAME=FILE``."""
    found = dict[str, str]()
    for text in given:
        name, sign, path = text.partition("=")
        if not (name and sign and path):
            raise ValueError(f"embedding must be NAME=FILE, got {text!r}")
        if name in found:
            raise ValueError(f"embedding must have a name of its own, got {name!r} twice")
        found[name] = path
    return found


def _convert(arguments: argparse.Namespace) -> int:
    import torch

    from .loading import load
    from .weights.single_file import save_single_file

    dtype = getattr(torch, check_choice("file-dtype", arguments.file_dtype, ("float16", "bfloat16", "float32")))
    if arguments.out.suffix != ".safetensors" or not arguments.out.parent.is_dir():
        raise ValueError(f"out must be a .safetensors file in an existing folder, got {str(arguments.out)!r}")
    if arguments.embeddings:
        raise ValueError(f"embedding belongs to prompts, which no file of weights has, got {arguments.embeddings}")
    sd = load(**loading_arguments(arguments))
    save_single_file(arguments.out, sd.unet, sd.vae, sd.text_encoder.model, sd.schedule, dtype)
    print(f"{arguments.out}  {arguments.out.stat().st_size} bytes")
    return 0


def _batch(arguments: argparse.Namespace) -> int:
    from .loading import model_digest
    from .serve.bulk import read_rows, run_bulk, write_status

    loading, how = loading_arguments(arguments), _bulk(arguments)
    rows, statuses = read_rows(arguments.rows, model_digest(loading), _net_files(arguments))
    for one in run_bulk(rows, arguments.out, loading, **how):
        statuses.append(one)
        if one.status == "error":
            print(f"{one.key}  {one.error}", file=sys.stderr)
    counts = {status: sum(one.status == status for one in statuses) for status in ("drawn", "there", "error")}
    print(f"{write_status(arguments.out, statuses)}  " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    return 1 if counts["error"] else 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from .evaluate.dreambench import read_dataset
    from .evaluate.encoders import CLIP, DINO, Tinyworld
    from .evaluate.evaluation import PROTOCOLS, evaluate, match, write_record
    from .evaluate.report import write_report

    protocol = PROTOCOLS[check_choice("protocol", arguments.protocol, tuple(PROTOCOLS))]
    for name, field in (("prompts", "n_prompts"), ("images_per_prompt", "n_images")):
        if (value := getattr(arguments, name)) is not None:
            protocol = replace(protocol, **{field: check_integer(name, value, 1)})
    if arguments.steps is not None:
        protocol = replace(protocol, drawing={**protocol.drawing, "steps": check_integer("steps", arguments.steps, 1)})
    concepts = match(arguments.concept, read_dataset(arguments.dataset), arguments.subject or ())
    clip = Tinyworld() if arguments.clip is None else CLIP(arguments.clip)
    dino = None if arguments.dino is None else DINO(arguments.dino)
    strengths = tuple(arguments.strength or [1.0])
    more, ray = _bulk(arguments), _ray(arguments)
    if ray is not None:
        from .evaluate.ray_sums import compute

        more["compute"] = partial(compute, **ray)
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = evaluate(concepts, loading_arguments(arguments), arguments.out, protocol, clip, dino, strengths, **more)
    print(write_record(result, arguments.out))
    print(write_report(result, arguments.out))
    return 0


def _toy(arguments: argparse.Namespace) -> int:
    from .evaluate.toy import table, write_study

    check_integer("seed", arguments.seed, 0)
    result, path = write_study(arguments.kind, arguments.out, steps=arguments.steps, seed=arguments.seed)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(path)
    return 0


def _bulk(arguments: argparse.Namespace) -> dict[str, Any]:
    """How rows are drawn: how many at a time, with what progress bar, and where."""
    from tqdm import tqdm

    paint, ray = None, _ray(arguments)
    if ray is not None:
        from .serve.ray_bulk import paint as paint_on_ray

        paint = partial(paint_on_ray, **ray)
    return {
        "batch_size": arguments.batch_size,
        "paint": paint,
        "progress": lambda batches, n: tqdm(batches, total=n, disable=arguments.quiet, unit="batch"),
    }


def _ray(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """How Ray is used; None where it is not."""
    names = {"address": "address", "actors": "actors", "actor_threads": "threads", "actor_gpus": "gpus"}
    ray = _given_to_ray(arguments, names)
    for name in ("actors", "threads"):
        check_integer(name, (ray or {}).get(name, 1), 1)
    return ray


def _given_to_ray(arguments: argparse.Namespace, names: dict[str, str]) -> dict[str, Any] | None:
    """What was given of some options, by the name that they go on under; None without --ray, which they belong to."""
    ray = {ours: value for name, ours in names.items() if (value := getattr(arguments, name)) is not None}
    if ray and not arguments.ray:
        raise ValueError(f"{', '.join(ray)} belongs to Ray: give --ray too, got {list(ray.values())}")
    return ray if arguments.ray else None
