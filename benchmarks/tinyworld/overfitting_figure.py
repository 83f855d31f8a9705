"""Pictures of four methods over their training: ``python -m benchmarks.tinyworld.overfitting_figure``.

Compare Infusion (arXiv:2404.14007), figure 12. Cut from the sheets that the study leaves in ``--sheets``, seed 0 of
each prompt; the base's pictures are drawn. Writes ``docs/overfitting.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import engine
from benchmarks.study_page import DOCS
from benchmarks.tinyworld.bench import DRAWING, study_prompts
from benchmarks.tinyworld.concepts import CONCEPTS, reference_pictures

METHODS = {  # by the sheets' names
    "Infusion": "infusion-text-{infusion}-1000-4parallel",
    "DreamBooth": "dreambooth-{dreambooth}-1000-4",
    "textual inversion": "textual_inversion-{textual_inversion}-1000-4",
    "Custom Diffusion": "custom_diffusion-{custom_diffusion}-1000-4",
}
RATES = {"infusion": "0.03", "dreambooth": "5e-05", "textual_inversion": "0.001", "custom_diffusion": "0.0005"}
CHECKPOINTS = (100, 250, 500, 1000)
PROMPTS = (0, 5, 7)  # a new place, another colour, another style
_SIDE, _GAP, _LEFT, _LINE = 84, 10, 128, 18
_SHEET_SIDE, _FONT_PX, _COLOURS = 128, 13, 160


def figure(concept: str, sheets: Path) -> Image.Image:
    """A row per method, a group of columns per prompt, a column per checkpoint; references and the base above."""
    noun = CONCEPTS[concept].noun
    texts = [study_prompts(noun)[prompt].text.format(noun) for prompt in PROMPTS]
    group = len(CHECKPOINTS) * _SIDE + _GAP
    height = (len(METHODS) + 2) * _SIDE + 4 * _LINE
    page = Image.new("RGB", (_LEFT + len(PROMPTS) * group, height), "white")
    write, font = ImageDraw.Draw(page), ImageFont.load_default(_FONT_PX)

    def place(picture: Image.Image, x: int, y: int) -> None:
        page.paste(picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), (_LEFT + x, y))

    write.text((6, 0.4 * _SIDE), "references", "black", font)
    for i, picture in enumerate(reference_pictures(concept)):
        place(picture, i * _SIDE, 0)
    top = _SIDE + _LINE
    bases = engine.generate(texts, seed=[0] * len(texts), progress=False, **DRAWING).images
    write.text((6, top + _LINE + 0.4 * _SIDE), "the base model", "black", font)
    for k, (text, base) in enumerate(zip(texts, bases, strict=True)):
        write.text((_LEFT + k * group, top), f'"{text}"', "black", font)
        place(base, k * group, top + _LINE)
        for c, steps in enumerate(CHECKPOINTS):
            write.text((_LEFT + k * group + c * _SIDE + 4, top + _LINE + _SIDE), f"{steps} steps", "black", font)
    top += 2 * _LINE + _SIDE
    for r, (name, pattern) in enumerate(METHODS.items()):
        write.text((6, top + (r + 0.4) * _SIDE), name, "black", font)
        for c, steps in enumerate(CHECKPOINTS):
            with Image.open(sheets / f"{concept}-{pattern.format(**RATES)}-{steps}.png") as sheet:
                for k, prompt in enumerate(PROMPTS):
                    x = prompt * _SHEET_SIDE
                    place(sheet.crop((x, 0, x + _SHEET_SIDE, _SHEET_SIDE)), k * group + c * _SIDE, top + r * _SIDE)
    return page.quantize(_COLOURS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concept", default="striped-cat", choices=list(CONCEPTS))
    parser.add_argument("--sheets", type=Path, default=Path("out/study/sheets"), help="folder of the study's sheets")
    arguments = parser.parse_args()
    figure(arguments.concept, arguments.sheets).save(DOCS / "overfitting.png", optimize=True)


if __name__ == "__main__":
    main()
