"""What ``twinstream generate`` draws from: settings in a picture, prompts that vary, a folder of pictures."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .read_picture import read_picture
from .sampling.arguments import Options
from .sampling.seeds import read_seeds
from .saved_settings import read_settings
from .wildcards import expand, has_choices

if TYPE_CHECKING:
    from .engine import Engine

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_DEPENDENT = {  # what of a picture's settings goes where another one of them is given anew
    "sampler": ("schedule", "eta"),
    "upscale": ("upscale_strength", "upscale_steps"),
    "variation_strength": ("variation_seed",),
}


def add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="prompt", help="may hold {a|b}: one of them, chosen by the seed")
    parser.add_argument(
        "--from",
        dest="from_picture",
        type=Path,
        metavar="PNG",
        help="with the settings that this picture carries, ours or A1111's; what else is given here goes before them",
    )
    parser.add_argument(
        "--wildcards",
        type=Path,
        metavar="FOLDER",
        help="where __name__ in a prompt is a line of name.txt, chosen by the seed",
    )


def read_request(
    arguments: argparse.Namespace, given: dict[str, Any], customization: Any
) -> tuple[list[str], dict[str, Any]]:
    """Prompts and options of ``generate``, with every choice in the prompts made.

    Args:
        arguments: of the command.
        given: the options that it names.
        customization: what its options of concepts and DCI ask for, if anything.
    """
    options: dict[str, Any] = {}
    if arguments.from_picture is not None:
        options = read_settings(arguments.from_picture)
    own = options.pop("prompt", None)
    prompts = arguments.prompts or ([own] if own else [])
    if not prompts:
        raise ValueError("prompt must be given, or --from a picture that has one, got none")
    for name in [dependent for head, names in _DEPENDENT.items() if head in given for dependent in names]:
        options.pop(name, None)
    options |= given
    if customization is not None:
        options["customization"] = customization
    if arguments.size is not None:
        options["width"], options["height"] = arguments.size
    if arguments.wildcards is not None and not arguments.wildcards.is_dir():
        raise ValueError(f"wildcards must be a folder, got {str(arguments.wildcards)!r}")
    if any(map(has_choices, [*prompts, options.get("negative_prompt", "")])):
        return _chosen(prompts, options, arguments.wildcards)
    return prompts, options


def _chosen(prompts: list[str], options: dict[str, Any], folder: Path | None) -> tuple[list[str], dict[str, Any]]:
    """A prompt and a negative prompt for each image, by its seed."""
    per_prompt = options.get("images_per_prompt", 1)
    of_seeds = ("seed", "variation_seed", "variation_strength")
    asked = Options(**{name: options[name] for name in (*of_seeds, "images_per_prompt") if name in options})
    texts = [text for text in prompts for _ in range(per_prompt)]
    seeds, variations, _ = read_seeds(asked, len(texts))
    negative = options.get("negative_prompt", "")
    one_each: dict[str, Any] = {"seed": list(seeds), "images_per_prompt": 1}
    if variations:
        one_each["variation_seed"] = list(variations)
    if negative:
        one_each["negative_prompt"] = [expand(negative, seed, folder, "negative") for seed in seeds]
    return [expand(text, seed, folder) for text, seed in zip(texts, seeds, strict=True)], options | one_each


def draw_folder(sd: Engine, prompts: list[str], options: dict[str, Any], out: Path) -> int:
    """Draw from each picture of the folder ``options["image"]`` and keep its name; returns the exit status.

    A picture of several images has ``-<number>`` behind its name. One that fails is told and costs the others nothing.
    """
    folder: Path = options["image"]
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise ValueError(f"image must be a folder with pictures ({', '.join(_SUFFIXES)}), got {str(folder)!r}")
    twice = [stem for stem, count in Counter(path.stem for path in paths).items() if count > 1]
    if twice:
        raise ValueError(f"image must be a folder of pictures with names of their own, got {twice[0]!r} twice")
    n_images = len(prompts) * options.get("images_per_prompt", 1)
    ends = [""] if n_images == 1 else [f"-{i}" for i in range(n_images)]
    there = [
        out / f"{path.stem}{end}.png" for path in paths for end in ends if (out / f"{path.stem}{end}.png").exists()
    ]
    if there:
        raise ValueError(f"out must not hold the pictures already, of which nothing is overwritten, got {there[0]}")
    failed = False
    for path in paths:
        try:
            drawn = sd.generate(prompts, **options | {"image": read_picture(path)})
            saved = drawn.save(out, [f"{path.stem}{end}" for end in ends])
        except (ValueError, RuntimeError) as error:
            print(f"{path}  {error}", file=sys.stderr)
            failed = True
            continue
        for picture, prompt in zip(saved, drawn.settings["prompts"], strict=True):
            print(f"{picture}  {prompt}")
    return int(failed)
