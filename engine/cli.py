"""The command line: ``twinstream``, a command for each thing to do (``twinstream --help``)."""

from __future__ import annotations

import argparse
import math
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks import check_choice, check_integer
from .cli_pictures import add_sources, draw_folder, read_request
from .cli_runs import (
    add_batch,
    add_calibrate,
    add_convert,
    add_evaluate,
    add_image_encoder,
    add_serve,
    add_toy,
    loading_arguments,
)
from .completion import add_completion
from .loading import BACKENDS
from .methods.asked import Asked
from .methods.asked_pictures import asked_image_prompts
from .methods.control import asked_controls
from .options import on_command_line
from .sampling.arguments import Options
from .train.ico import ICOOptions
from .train.infusion import InfusionOptions
from .version import __version__

if TYPE_CHECKING:
    from .engine import Engine
    from .result import Result

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "pillow")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"twinstream: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="twinstream", description="Draw pictures with Stable Diffusion v1.5 models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", help="diffusers folder, .safetensors file or hub id (default: the embedded model)")
    model.add_argument("--config", help="for a .safetensors file: a diffusers folder with its configs and tokenizer")
    model.add_argument("--vae", help="another VAE: a diffusers folder or a .safetensors file (default: the model's)")
    model.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    model.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float16 on a GPU, float32 on a CPU)")
    model.add_argument("--backend", default="auto", help=f"{', '.join(BACKENDS)} (default: auto)")
    help = "leave out what is not known of the card; see twinstream calibrate"
    model.add_argument("--no-calibrate", dest="calibrate", action="store_false", help=help)
    help = "merge this LoRA into the weights, with a factor (default: 1); may be repeated"
    model.add_argument("--lora", dest="loras", action="append", default=[], metavar="FILE[:F]", help=help)

    help = "what prompts write for a textual inversion, and its file; may be repeated"
    model.add_argument("--embedding", dest="embeddings", action="append", default=[], metavar="NAME=FILE", help=help)

    generate = commands.add_parser("generate", parents=[model], help="draw pictures from prompts")
    add_sources(generate)
    generate.add_argument("--size", type=_size, metavar="WxH", help="for example 512x768 (default: the model's)")
    _add_options(generate, Options)
    generate.add_argument(
        "--concept", type=Path, action="append", metavar="FILE", help="draw with this concept; may be repeated"
    )
    generate.add_argument(
        "--foundation", default="parallel", help="with concepts: parallel (also draws the base picture) or shared"
    )
    generate.add_argument(
        "--concept-strength",
        type=float,
        action="append",
        metavar="F",
        help="factor on what Infusion concepts add, one for all or repeated, one per --concept (default: 1)",
    )
    generate.add_argument(
        "--dci",
        metavar="NAME",
        help="draw with two branches: the prompt, and another noun in place of this name",
    )
    generate.add_argument("--auxiliary-noun", metavar="NOUN", help="for --dci (default: another of its category)")
    generate.add_argument(
        "--dci-strength", type=float, default=1.0, help="how much the other branch takes over, -2 to 2"
    )
    generate.add_argument(
        "--dci-fraction", type=float, default=0.15, help="share of the steps that mix, from the first"
    )
    help = "draw with this ControlNet and hint picture, weight 1 from 0 to 1 unless given; may be repeated"
    form = "NET=IMAGE[:WEIGHT[:START:END]]"
    generate.add_argument("--control", action="append", default=[], metavar=form, help=help)
    help = "draw like this picture too, by an IP-Adapter's file, scale 1 unless given; may be repeated"
    form = "ADAPTER=PICTURE[:SCALE]"
    generate.add_argument("--image-prompt", dest="image_prompts", action="append", default=[], metavar=form, help=help)
    add_image_encoder(generate)
    generate.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    generate.add_argument("--grid", action="store_true", help="also write all pictures as one sheet, grid.png")
    generate.add_argument("--quiet", action="store_true", help="no progress bar")
    generate.set_defaults(run=_generate)

    _add_train(commands.add_parser("train", help="learn a concept from a few pictures"), model)

    add_batch(commands.add_parser("batch", parents=[model], help="draw a file of requests into a folder, resumably"))

    add_evaluate(commands.add_parser("evaluate", parents=[model], help="measure concepts on a data set's prompts"))
    add_serve(commands.add_parser("serve", parents=[model], help="answer OpenAI, A1111 and own clients over HTTP"))
    add_toy(commands.add_parser("toy", help="the paper's two studies of overfitting, in two dimensions"))

    add_convert(
        commands.add_parser("convert", parents=[model], help="write a model, LoRAs and VAE merged, as one file")
    )

    help = "find out which operations serve fastest on this card"
    add_calibrate(commands.add_parser("calibrate", parents=[model], help=help))

    info = commands.add_parser("info", parents=[model], help="show device, versions and what each op runs on")
    info.set_defaults(run=_info)
    add_completion(
        commands.add_parser("completion", help="print a script by which a shell completes commands"), _parser
    )
    return parser


def _add_train(parser: argparse.ArgumentParser, model: argparse.ArgumentParser) -> None:
    methods = parser.add_subparsers(required=True, metavar="method")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("images", type=Path, help="folder with the pictures (jpg, png, webp)")
    shared.add_argument("--noun", required=True, help="class noun, as prompts will spell it")
    shared.add_argument("--out", type=Path, required=True, metavar="FILE", help="concept file to write")
    shared.add_argument("--quiet", action="store_true", help="no progress bar")

    title = "residuals under the foundation's attention maps"
    infusion = methods.add_parser("infusion", parents=[model, shared], help=title)
    _add_options(infusion, InfusionOptions)
    infusion.add_argument("--file-dtype", default="float16", help="float16 or int8 (half the size)")
    infusion.set_defaults(run=_train_infusion)

    title = "tokens, keys and values, with a context per picture"
    ico = methods.add_parser("ico", parents=[model, shared], help=title)
    _add_options(ico, ICOOptions)
    ico.add_argument("--rank", type=int, help="write the changes as factors of this rank (default: whole)")
    ico.set_defaults(run=_train_ico)


def _add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """The options that an options class has on the command line; what is not given there is not in the namespace."""
    for one in on_command_line(kind):
        name = one.name.replace("_", "-")
        spellings, help = [f"--{name}", *one.metadata["flags"]], one.metadata["help"].replace("%", "%%")
        if isinstance(one.default, bool):
            action = argparse.BooleanOptionalAction if one.default else "store_true"
            parser.add_argument(*spellings, action=action, default=argparse.SUPPRESS, help=help)
            continue
        if one.default not in (None, ""):
            help = f"{help} (default: {one.default})"
        kind_of = _TYPES.get(one.name) or (Path if one.default is None else type(one.default))
        parser.add_argument(
            *spellings, type=kind_of, default=argparse.SUPPRESS, metavar=one.metadata["metavar"], help=help
        )


def _given(arguments: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The options of a class that were given, and whether progress is shown."""
    names = [one.name for one in on_command_line(kind) if one.name in arguments]
    return {name: getattr(arguments, name) for name in names} | {"progress": not arguments.quiet}


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"size must be WIDTHxHEIGHT in pixels, got {text!r}")
    return int(width), int(height)


def _seeds(text: str) -> int | list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"seed must be integers >= 0, separated by commas, got {text!r}")
    numbers = [int(part) for part in parts]
    return numbers[0] if len(numbers) == 1 else numbers


_TYPES: dict[str, Any] = {
    "seed": _seeds,
    "variation_seed": _seeds,
    "upscale_steps": int,
    "size": int,
    "initial_tokens": str,
    "schedule": str,
    "mask_padding": int,
}  # by option, where it is not the default's


def _load(arguments: argparse.Namespace) -> Engine:
    import engine

    return engine.load(**loading_arguments(arguments))


def _train_infusion(arguments: argparse.Namespace) -> int:
    check_choice("file-dtype", arguments.file_dtype, ("float16", "int8"))  # before the training, not after
    return _train(arguments, "train_infusion", InfusionOptions, {"dtype": arguments.file_dtype})


def _train_ico(arguments: argparse.Namespace) -> int:
    if arguments.rank is not None:
        check_integer("rank", arguments.rank, 1)
        if "train_kv" in arguments and not arguments.train_kv:
            raise ValueError(f"rank belongs to keys and values, which no-train-kv leaves alone, got {arguments.rank}")
    return _train(arguments, "train_ico", ICOOptions, {"rank": arguments.rank})


def _train(arguments: argparse.Namespace, method: str, kind: type, file: dict[str, Any]) -> int:
    import engine

    if not arguments.out.parent.is_dir():
        raise ValueError(f"out must be a file in an existing folder, got {str(arguments.out)!r}")
    options = _given(arguments, kind)
    concept = getattr(engine, method)(_load(arguments), arguments.images, arguments.noun, **options)
    concept.save(arguments.out, **file)
    print(f"{arguments.out}  {arguments.out.stat().st_size} bytes")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from PIL import Image

    prompts, options = read_request(arguments, _given(arguments, Options), _customization(arguments))
    sd = _load(arguments)
    options["control"] = asked_controls(arguments.control, sd)
    options["image_prompts"] = asked_image_prompts(arguments.image_prompts, arguments.image_encoder, sd)
    if "mask" in options:
        options["mask"] = Image.open(options["mask"])
    if "image" in options and options["image"].is_dir():
        if arguments.grid:
            raise ValueError(f"grid must not be given where image is a folder, got {str(options['image'])!r}")
        return draw_folder(sd, prompts, options, arguments.out)
    if "image" in options:
        options["image"] = Image.open(options["image"])
    out = sd.generate(prompts, **options)
    for path, prompt in zip(out.save(arguments.out), out.settings["prompts"], strict=True):
        print(f"{path}  {prompt}")
    if arguments.grid:
        print(_save_grid(out, arguments.out / "grid.png"))
    print("  ".join(f"{stage} {seconds:.2f} s" for stage, seconds in out.timings.items()))
    return 0


def _customization(arguments: argparse.Namespace) -> Any:
    """What the concepts and the options of the two methods ask for."""
    strengths = arguments.concept_strength or [1.0]
    return Asked(
        concepts=arguments.concept or (),
        foundation=arguments.foundation,
        concept_strength=strengths[0] if len(strengths) == 1 else strengths,
        dci=arguments.dci,
        auxiliary_noun=arguments.auxiliary_noun,
        dci_strength=arguments.dci_strength,
        dci_fraction=arguments.dci_fraction,
    ).make()


def _save_grid(out: Result, path: Path) -> Path:
    """All pictures in rows; those that have a foundation stand to the right of its picture."""
    from .observe.sheet import grid

    bases = out.foundation_images or [None] * len(out.images)
    pairs = [(image,) if base is None else (base, image) for base, image in zip(bases, out.images, strict=True)]
    per_row = len(pairs[0]) * math.ceil(math.sqrt(len(pairs) / len(pairs[0])))
    pictures = [picture for pair in pairs for picture in pair]
    grid(pictures, columns=min(per_row, len(pictures))).save(path)
    return path


def _info(arguments: argparse.Namespace) -> int:
    import torch

    from .backends.native import levels
    from .backends.ops import serving

    rows = [("twinstream", __version__), ("python", platform.python_version())]
    rows += [(name, _version(name)) for name in _PACKAGES]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows += [("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")]
    rows += [("gpu", ", ".join(gpus) or "none that torch can use")]
    rows += [("native kernels", ", ".join(levels()) or "not built: that needs a C++20 compiler, and pip install again")]
    _print_rows(rows)  # before the model, which may not load
    sd = _load(arguments)
    sizes = {"unet": sd.unet, "vae": sd.vae, "text encoder": sd.text_encoder.model}
    rows = [("model", sd.name), ("device, dtype", f"{sd.device}, {str(sd.dtype).removeprefix('torch.')}")]
    rows += [(part, f"{sum(p.numel() for p in m.parameters()) / 1e6:.2f} M parameters") for part, m in sizes.items()]
    rows += [(op, what) for op, what in serving(sd.backend).items()]
    rows += [] if sd.graphs is None else [("graphs", sd.graphs.failed or "each is proven when it is captured")]
    _print_rows(rows)
    return 0


def _print_rows(rows: list[tuple[str, str]]) -> None:
    for name, value in rows:
        print(f"{name:<18}{value}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
