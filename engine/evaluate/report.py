"""The report of an evaluation: one HTML page with tables, curves and grids that opens from disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..observe.sheet import grid
from ..read_picture import read_picture

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .35rem .6rem; border-bottom: 1px solid #ddd }
th { text-align: left }
.wide table { font-size: 14px } .wide td { white-space: nowrap }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
small { color: #666 } img { max-width: 100%; } .wide { overflow-x: auto }
figure { margin: 1rem 0 }
svg text { font: 12px system-ui, sans-serif; fill: #444 }
"""
_PAPER = {  # arXiv:2404.14007, table 1, on Stable Diffusion v1.5
    "DreamBooth": (0.255, 0.838, 0.721, "3.3 GB"),
    "DreamBooth-LoRA": (0.264, 0.791, 0.615, "3.29 MB"),
    "Textual Inversion": (0.240, 0.780, 0.584, "3 KB"),
    "Custom Diffusion": (0.256, 0.800, 0.643, "57.1 MB"),
    "Perfusion": (0.242, 0.729, 0.505, "100 KB"),
    "Infusion": (0.267, 0.816, 0.697, "11 KB"),
}
_MEANS = ("clip_t", "base_clip_t", "clip_i", "dino", "diversity", "base_diversity")
_SIDE_PX, _ROWS, _COLUMNS = 160, 8, 4  # of grids
_PLOT, _MARGIN = (520, 340), 56


def write_report(result: Mapping[str, Any], out: Path) -> Path:
    """Write ``index.html`` and its grids beside the folder of pictures; returns the page's path."""
    records, settings = result["records"], result["settings"]
    parts = ["<h1>Evaluation</h1>", _settings(settings), "<h2>Measures</h2>", _table(records)]
    parts.append(
        "<p><small>Means with 95 % bootstrap intervals over prompts. CLIP-T: cosine of picture and prompt, the "
        "placeholder left out. CLIP-I, DINO: cosine with the reference pictures, over all pairs. W2: 2-Wasserstein "
        "distance of latents from the base model's under the plain noun; its floor is the base from itself with other "
        "seeds. Fisher: E |eps - eps_base|² on the base's own pictures and the plain noun, summed over a latent; "
        "Infusion's foundation has none, by construction.</small></p>"
    )
    parts += ["<h2>Fidelity and editability</h2>", _curves(records)]
    parts += ["<h2>Published figures, on Stable Diffusion v1.5, beside which the above may stand if its model and "
              "encoders are the same</h2>", _paper_table()]  # fmt: skip
    for record in records:
        name = f"{record['concept']}-{record['method']}-{record['strength']:g}"
        path = f"grid-{name}.png"
        _grid(record, out, settings["images_per_prompt"]).save(out / path)
        title = f"{record['concept']}, {record['method']}, strength {record['strength']:g}"
        parts.append(
            f"<figure><h2>{escape(title)}</h2><div class='wide'><img src='{escape(path)}' alt='{escape(title)}'></div>"
            "<figcaption><small>Top row: references. Then a prompt a row: the base model's pictures on the left, the "
            "concept's of the same seeds on the right.</small></figcaption></figure>"
        )
    page = "\n".join(parts)
    html = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>Evaluation</title><style>{_STYLE}</style><body>{page}</body></html>\n"
    )
    path = out / "index.html"
    path.write_text(html, encoding="utf-8")
    return path


def _settings(settings: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{escape('none' if value is None else str(value))}</td></tr>"
        for name, value in settings.items()
    )
    return f"<table>{rows}</table>"


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    heads = ("concept", "method", "strength", "CLIP-T", "base's", "CLIP-I", "DINO", "diversity", "base's", "W2 (floor)",
             "Fisher", "bytes", "s a picture")  # fmt: skip
    rows = []
    for record in records:
        w2 = record["wasserstein"]
        cells = [
            *(
                _number(record.get(name))
                for name in ("clip_t", "base_clip_t", "clip_i", "dino", "diversity", "base_diversity")
            ),
            f"{w2['w2']:.2f} ({w2['floor_w2']:.2f})",
            f"{record['fisher']['total']['mean']:.4g}",
            f"{record['bytes']:,}",
            "from an earlier run" if record["seconds_per_picture"] is None else f"{record['seconds_per_picture']:.2f}",
        ]
        names = f"<td>{escape(record['concept'])}</td><td>{record['method']}</td><td>{record['strength']:g}</td>"
        rows.append(f"<tr>{names}" + "".join(f"<td class='number'>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _number(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not measured"
    low, high = found["interval"]
    return f"{found['mean']:.3f}<br><small>{low:.3f} to {high:.3f}</small>"


def _paper_table() -> str:
    rows = []
    for name, (*scores, size) in _PAPER.items():
        cells = "".join(f"<td class='number'>{cell}</td>" for cell in (*(f"{score:.3f}" for score in scores), size))
        rows.append(f"<tr><td>{name}</td>{cells}</tr>")
    heads = "".join(f"<th>{head}</th>" for head in ("method", "CLIP-T", "CLIP-I", "DINO", "storage"))
    return f"<table><tr>{heads}</tr>{''.join(rows)}</table>"


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    """CLIP-I over CLIP-T, a line per concept through its strengths, as SVG."""
    points = [(record["clip_t"]["mean"], record["clip_i"]["mean"]) for record in records]
    (width, height), (x_low, x_high), (y_low, y_high) = _PLOT, *(_range([p[k] for p in points]) for k in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        across = _MARGIN + (x - x_low) / (x_high - x_low) * (width - 2 * _MARGIN)
        return round(across, 1), round(height - _MARGIN - (y - y_low) / (y_high - y_low) * (height - 2 * _MARGIN), 1)

    marks = []
    for k, name in enumerate(dict.fromkeys((record["concept"], record["method"]) for record in records)):
        own = [(record, place(*point)) for record, point in zip(records, points, strict=True)
               if (record["concept"], record["method"]) == name]  # fmt: skip
        colour = f"hsl({k * 67 % 360} 60% 42%)"
        line = " ".join(f"{x},{y}" for _, (x, y) in own)
        marks.append(f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='2'/>")
        for record, (x, y) in own:
            label, is_right = f"{record['concept']} {record['strength']:g}", x > 0.7 * width
            across, anchor = (x - 8, "end") if is_right else (x + 8, "start")
            marks.append(f"<circle cx='{x}' cy='{y}' r='5' fill='{colour}'/>")
            marks.append(f"<text x='{across}' y='{y - 6}' text-anchor='{anchor}'>{escape(label)}</text>")
    ends = [(x_low, y_low), (x_high, y_low), (x_low, y_high)]
    (left, bottom), (right, _), (_, top) = (place(*end) for end in ends)
    marks.append(f"<path d='M{left},{top}V{bottom}H{right}' fill='none' stroke='#888'/>")
    for x, y, anchor, text in (
        (right, bottom + 36, "end", "CLIP-T: what the prompt says"),
        (left - 44, top - 14, "start", "CLIP-I: likeness to the references"),
        (left, bottom + 18, "start", f"{x_low:.3f}"),
        (right, bottom + 18, "end", f"{x_high:.3f}"),
        (left - 44, bottom, "start", f"{y_low:.3f}"),
        (left - 44, top + 8, "start", f"{y_high:.3f}"),
    ):
        marks.append(f"<text x='{x}' y='{y}' text-anchor='{anchor}'>{text}</text>")
    return f"<svg viewBox='0 0 {width} {height}' width='{width}' role='img'>{''.join(marks)}</svg>"


def _range(values: Sequence[float]) -> tuple[float, float]:
    margin = 0.1 * (max(values) - min(values)) or 0.01
    return min(values) - margin, max(values) + margin


def _grid(record: Mapping[str, Any], out: Path, n_images: int) -> Image.Image:
    """References, then a row a prompt: the base's pictures and the concept's, side by side."""
    columns = min(n_images, _COLUMNS)
    references = [_square(Path(path)) for path in record["references"][: 2 * columns]]
    rows = [[*references, *[Image.new("RGB", (_SIDE_PX, _SIDE_PX), "white")] * (2 * columns - len(references))]]
    for prompt in range(min(_ROWS, len(record["files"]) // n_images)):
        first = prompt * n_images
        files = [record[kind][first : first + columns] for kind in ("base_files", "files")]
        rows.append([_square(out / "pictures" / name) for kind in files for name in kind])
    return grid([picture for row in rows for picture in row], columns=2 * columns)


def _square(path: Path) -> Image.Image:
    return ImageOps.fit(read_picture(path), (_SIDE_PX, _SIDE_PX))
