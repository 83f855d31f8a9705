"""What ``make docs`` adds to ``docs/``: the README as the first page, the root's other pages, and result files.

Links stay as they are right on disk and on a forge (``../benchmarks/results/x.json``), and are turned for the site.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files  # pyright: ignore[reportMissingImports]

_ROOT = Path(__file__).parent.parent
_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "STYLE.md": "style.md"}
_PAGES |= {"CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: Any, **_: Any) -> Files:
    for source, name in _PAGES.items():
        text = (_ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, name, content=_turned(text)))
    for path in sorted((_ROOT / "benchmarks" / "results").iterdir()):
        files.append(File.generated(config, f"results/{path.name}", content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _turned(markdown)


def _turned(text: str) -> str:
    """Links that lead out of ``docs/`` lead to their copies in the site."""
    text = text.replace("](../benchmarks/results/", "](results/").replace("](benchmarks/results/", "](results/")
    for source, name in _PAGES.items():
        text = text.replace(f"](../{source}", f"]({name}").replace(f"]({source}", f"]({name}")
    return text
