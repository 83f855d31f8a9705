"""What the README and docs/ show: their snippets run, their commands parse, their links and pictures are there."""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import engine
from engine import cli
from tests.controlnets import hint, random_controlnet
from tests.loras import write_kohya

_ROOT = Path(__file__).parent.parent
_PAGES = sorted([*_ROOT.glob("*.md"), *(_ROOT / "docs").glob("*.md")])
_RUN = (_ROOT / "README.md", _ROOT / "docs" / "guide.md", _ROOT / "docs" / "serving.md")
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")
_NOT_RUN = "# not run: "
_MOST_NOT_RUN = 4


def _blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in _FENCE.findall(page.read_text()) if name == language]


@pytest.fixture
def desk(small: engine.Engine, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with what the snippets name: a model, here a tiny one, a LoRA, a ControlNet, and pictures."""
    monkeypatch.chdir(tmp_path)
    Path("path/to").mkdir(parents=True)
    Path("path/to/stable-diffusion-v1-5").symlink_to(small_folder)
    write_kohya(small, Path("path/to/lace.safetensors"))
    Image.new("L", (16, 16), 255).save("path/to/mask.png")
    random_controlnet(small, Path("path/to/control_v11p_sd15_canny"), small_folder)
    hint().save("path/to/edges.png")
    for name in ("my-cat", "my-toy"):
        folder = Path("path/to") / name
        folder.mkdir()
        for i in range(2):
            Image.new("RGB", (32, 32), (90 * i, 60, 160)).save(folder / f"{i}.png")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine threads that wait for one another cost more than they save
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", _RUN, ids=lambda page: page.name)
@pytest.mark.usefixtures("desk")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_snippets_run(page: Path) -> None:
    """One after the other in one namespace, as a reader would; two steps instead of many."""
    names: dict[str, Any] = {}
    blocks = _blocks(page, "python")
    left_out = [block for block in blocks if block.startswith(_NOT_RUN)]
    assert len(left_out) <= _MOST_NOT_RUN
    assert len(blocks) > len(left_out)
    for block in blocks:
        if block not in left_out:
            quick = re.sub(r"\bsteps=\d+", "steps=2", block)
            assert "generate(" not in quick or "steps=2" in quick, block
            exec(compile(quick, f"{page.name}: {block[:40]!r}", "exec"), names)


def test_snippets_that_are_not_run_compile() -> None:
    for page in _PAGES:
        for block in _blocks(page, "python"):
            compile(block, page.name, "exec")


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    for block in _blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["twinstream"]:
                cli._parser().parse_args(words[1:])
            if words[:1] == ["make"]:
                assert f"\n{words[1]}: " in (_ROOT / "Makefile").read_text(), line
            if words[:2] == ["python", "-m"]:
                assert (_ROOT / f"{words[2].replace('.', '/')}.py").is_file(), line


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else Path(os.path.normpath(page.parent / path))
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            words = (re.sub(r"[^\w\- ]", "", title).strip().lower() for title in titles)
            assert anchor in {one.replace(" ", "-") for one in words}, link


def test_every_page_is_in_the_site() -> None:
    config = (_ROOT / "mkdocs.yml").read_text()
    for page in (_ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in config


def test_every_file_that_the_architecture_names_is_there() -> None:
    text = (_ROOT / "docs" / "architecture.md").read_text()
    rooms = re.findall(r"`((?:text|models|methods|sampling|observe|backends|weights|train)/\w+\.py)`", text)
    assert len(rooms) > 10
    for name in rooms:
        assert (Path(engine.__file__).parent / name).is_file(), name
