"""Draw a labelled overview of tinyworld: ``python -m benchmarks.tinyworld.preview OUT.png [--seed S]``."""

import argparse
import random
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.tinyworld.backgrounds import BACKGROUNDS
from benchmarks.tinyworld.captions import caption
from benchmarks.tinyworld.concepts import CONCEPTS, draw_concept, reference_pictures
from benchmarks.tinyworld.objects import OBJECTS
from benchmarks.tinyworld.palette import COLOURS
from benchmarks.tinyworld.scene import POSITIONS, SIZES, STYLES, Scene, Thing, draw, sample_scene

_N_COLUMNS = 12
_CELL_PX = 136
_LABEL_PX = 56

Cell = tuple[Image.Image, str]


def _object_cells() -> list[Cell]:
    """Every object in every colour, one colour a row."""
    cells = []
    for row, colour in enumerate(COLOURS):
        for column, noun in enumerate(OBJECTS):
            seed = row * len(OBJECTS) + column
            thing = Thing(noun, colour, facing="left" if row % 2 else "right", seed=seed)
            background = "yellow" if colour != "yellow" else "blue"
            cells.append((draw(Scene((thing,), "plain", background, seed=seed)), f"{colour} {noun}"))
    return cells


def _background_cells(rng: random.Random) -> list[Cell]:
    """Every background in every style, with an object of a random kind."""
    cells = []
    for style in STYLES:
        for background in BACKGROUNDS:
            noun, colour = rng.choice(list(OBJECTS)), rng.choice([c for c in COLOURS if c != "green"])
            thing = Thing(noun, colour, rng.choice(SIZES), "right", rng.choice(POSITIONS), seed=rng.getrandbits(32))
            plain_colour = "green" if background == "plain" else ""
            scene = Scene((thing,), background, plain_colour, style, rng.getrandbits(32))
            cells.append((draw(scene), f"{background}, {style}"))
    return cells


def _random_cells(rng: random.Random, n_cells: int) -> list[Cell]:
    """Random scenes under their captions."""
    scenes = [sample_scene(rng) for _ in range(n_cells)]
    return [(draw(scene), caption(scene, rng)) for scene in scenes]


def _concept_cells() -> list[Cell]:
    """The references of every concept and a few held-out contexts."""
    cells = []
    for name in CONCEPTS:
        cells += [(picture, f"{name}, reference") for picture in reference_pictures(name)]
        contexts = BACKGROUNDS[: _N_COLUMNS - 5]
        cells += [(draw_concept(name, context, seed=9), f"{name}, {context}") for context in contexts]
    return cells


def draw_sheet(cells: list[Cell]) -> Image.Image:
    """Lay labelled pictures out in rows of twelve."""
    n_rows = -(-len(cells) // _N_COLUMNS)
    sheet = Image.new("RGB", (_N_COLUMNS * _CELL_PX, n_rows * (_CELL_PX + _LABEL_PX)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, (picture, label) in enumerate(cells):
        x, y = i % _N_COLUMNS * _CELL_PX + 4, i // _N_COLUMNS * (_CELL_PX + _LABEL_PX) + 4
        sheet.paste(picture, (x, y))
        lines = textwrap.wrap(label, 26)[:4]
        pen.multiline_text((x, y + picture.height + 1), "\n".join(lines), fill=(40, 40, 50), font=font, spacing=1)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    cells = _object_cells() + _background_cells(rng) + _random_cells(rng, 42) + _concept_cells()
    draw_sheet(cells).save(args.out)


if __name__ == "__main__":
    main()
