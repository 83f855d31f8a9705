"""Pictures that come in are upright, whole and of a size that can be meant."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import read_picture as module
from engine.read_picture import read_picture

_TURN = 0x0112  # EXIF's orientation; 6: the first row is the right side


@pytest.fixture
def turned(tmp_path: Path) -> Path:
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[_TURN] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    return tmp_path / "turned.png"


def test_a_picture_is_turned_as_its_file_says(turned: Path) -> None:
    for given in (turned, str(turned), Image.open(turned)):
        found = np.asarray(read_picture(given))
        assert found.shape == (3, 2, 3)
        assert found[0, 1].tolist() == [255, 255, 255]
    assert read_picture(turned, "L").mode == "L"
    assert read_picture(np.full((2, 2), 7, np.uint8)).getpixel((0, 0)) == (7, 7, 7)


def test_what_is_no_picture_is_refused(turned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (turned.parent / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text.png: cannot be read"):
        read_picture(turned.parent / "text.png")
    with pytest.raises(ValueError, match="uint8"):
        read_picture(np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="must be files"):
        read_picture(3)
    monkeypatch.setattr(module, "_MAX_PIXELS", 5)
    for given in (turned, Image.open(turned)):
        with pytest.raises(ValueError, match="at most 5 pixels, got 3x2"):
            read_picture(given)
