"""The ten named colours, and the paint an object is drawn with in each style."""

from dataclasses import dataclass

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (222, 44, 48),
    "orange": (250, 138, 24),
    "yellow": (253, 216, 42),
    "green": (52, 168, 76),
    "blue": (44, 104, 226),
    "purple": (138, 62, 192),
    "pink": (250, 138, 182),
    "brown": (128, 78, 42),
    "black": (40, 40, 46),
    "white": (250, 250, 250),
}
PLAIN_COLOURS: dict[str, RGB] = {
    "blue": (158, 202, 242),
    "green": (170, 222, 172),
    "yellow": (250, 234, 158),
    "pink": (250, 198, 216),
    "purple": (208, 186, 238),
    "orange": (252, 206, 160),
    "white": (244, 244, 244),
}
PAPER: RGB = (250, 248, 242)


def mix(a: RGB, b: RGB, amount: float) -> RGB:
    """Go from ``a`` to ``b`` by ``amount`` in [0, 1]."""
    red, green, blue = (round(x + (y - x) * amount) for x, y in zip(a, b, strict=True))
    return red, green, blue


@dataclass(frozen=True, slots=True)
class Paint:
    """An object's colours; ``wash`` is how far fills are thinned towards paper (0 outside sketches)."""

    base: RGB
    shade: RGB
    light: RGB
    outline: RGB
    wash: float

    def ink(self, colour: RGB) -> RGB:
        """A fixed colour (a wheel, a beak) as this style shows it."""
        return mix(colour, PAPER, self.wash)


def make_paint(colour: str, style: str, on_dark: bool) -> Paint:
    """Build the paint of a named colour.

    Args:
        colour: one of ``COLOURS``.
        style: ``photo``, ``sketch`` or ``pixel``.
        on_dark: whether the background is dark, where a black object needs a pale outline.
    """
    base = COLOURS[colour]
    wash = 0.42 if style == "sketch" else 0.0
    if colour == "black":
        shade, light = (24, 24, 28), (96, 96, 104)
        outline = (20, 20, 22) if wash else (178, 180, 190) if on_dark else (124, 124, 132)
    elif colour == "white":
        shade, light, outline = (204, 208, 218), (229, 233, 241), (104, 108, 120)
    else:
        shade, light = mix(base, (20, 10, 30), 0.26), mix(base, (255, 255, 255), 0.55)
        outline = mix(base, (20, 14, 30), 0.45 if wash else 0.68)
    return Paint(mix(base, PAPER, wash), mix(shade, PAPER, wash), mix(light, PAPER, wash), outline, wash)
