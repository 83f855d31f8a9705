"""The ten backgrounds: large smooth areas on a 256 x 256 canvas, jittered by a seeded generator."""

import random
from collections.abc import Callable

from PIL import Image, ImageDraw

from benchmarks.tinyworld.palette import PAPER, PLAIN_COLOURS, RGB, mix

CANVAS = 256


def _jitter(rng: random.Random, colour: RGB, amount: int = 9) -> RGB:
    red, green, blue = (min(255, max(0, value + rng.randint(-amount, amount))) for value in colour)
    return red, green, blue


class _Painter:
    """Paints one background; all positions are canvas pixels."""

    def __init__(self, rng: random.Random) -> None:
        self.image = Image.new("RGB", (CANVAS, CANVAS))
        self.draw = ImageDraw.Draw(self.image)
        self.rng = rng

    def band(self, top: int, bottom: int, upper: RGB, lower: RGB) -> None:
        """Fill the rows from ``top`` to ``bottom`` with a gradient whose outer quarters are flat."""
        ends = Image.new("RGB", (1, 2), upper)
        ends.putpixel((0, 1), lower)
        column = ends.resize((1, bottom - top), Image.Resampling.BILINEAR)
        self.image.paste(column.resize((CANVAS, bottom - top), Image.Resampling.NEAREST), (0, top))

    def disc(self, x: float, y: float, rx: float, ry: float, colour: RGB) -> None:
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)

    def cloud(self, y: int, colour: RGB) -> None:
        """A three-disc cloud somewhere along height ``y``."""
        x = self.rng.randint(30, CANVAS - 30)
        self.disc(x, y, 30, 11, colour)
        self.disc(x - 8, y - 8, 14, 13, colour)
        self.disc(x + 10, y - 6, 11, 10, colour)

    def sun(self, y: int, colour: RGB) -> None:
        self.disc(self.rng.choice((self.rng.randint(28, 70), self.rng.randint(186, 228))), y, 20, 20, colour)

    def hills(self, y: int, colour: RGB) -> None:
        """Two broad hills whose crests reach about ``y``."""
        self.disc(self.rng.randint(10, 90), y + 70, 130, 70, colour)
        self.disc(self.rng.randint(166, 246), y + 84, 140, 70, colour)


def _beach(painter: _Painter) -> None:
    rng = painter.rng
    horizon = rng.randint(84, 108)
    shore = horizon + rng.randint(44, 58)
    painter.band(0, horizon, (132, 206, 246), (206, 238, 252))
    painter.sun(rng.randint(28, 48), (255, 236, 140))
    painter.band(horizon, shore + 12, (34, 152, 190), (84, 208, 214))
    painter.band(shore + 8, CANVAS, _jitter(rng, (250, 226, 164)), _jitter(rng, (240, 208, 140)))
    painter.disc(rng.randint(60, 196), shore + 6, 190, 10, (238, 250, 246))
    painter.draw.rectangle((0, shore + 12, CANVAS, shore + 24), fill=(250, 226, 164))
    if rng.random() < 0.6:
        _palm(painter, rng.choice((22, 234)), shore + 30)


def _palm(painter: _Painter, x: int, foot: int) -> None:
    lean = 12 if x < CANVAS // 2 else -12
    crown = foot - 110
    painter.draw.polygon(
        [(x - 6, foot), (x + 6, foot), (x + lean + 4, crown), (x + lean - 4, crown)], fill=(160, 112, 66)
    )
    for dx, dy in ((-40, 14), (-30, -12), (0, -24), (30, -12), (40, 14)):
        tip = (x + lean + dx, crown + dy)
        side = (x + lean + dx * 0.4, crown + dy * 0.4 - 16)
        painter.draw.polygon([(x + lean, crown + 5), side, tip], fill=(58, 160, 92))


def _forest(painter: _Painter) -> None:
    rng = painter.rng
    ground = rng.randint(142, 162)
    painter.band(0, ground, (52, 112, 84), (116, 168, 116))
    for x in range(rng.randint(-20, 10), CANVAS + 20, 56):
        width = rng.randint(9, 12)
        tint = _jitter(rng, (86, 72, 56), 6)
        painter.draw.rectangle((x - width, 0, x + width, ground + rng.randint(2, 12)), fill=tint)
    for x in range(rng.randint(-10, 20), CANVAS + 40, 52):
        painter.disc(x, rng.randint(-4, 12), 44, 38, _jitter(rng, (34, 92, 62), 8))
    painter.band(ground, CANVAS, _jitter(rng, (92, 142, 74)), _jitter(rng, (66, 112, 58)))


def _snow(painter: _Painter) -> None:
    rng = painter.rng
    ground = rng.randint(112, 136)
    painter.band(0, CANVAS, _jitter(rng, (160, 192, 222)), (220, 232, 244))
    peak = rng.randint(60, 196)
    painter.draw.polygon([(peak - 110, ground + 30), (peak, 36), (peak + 110, ground + 30)], fill=(180, 198, 222))
    painter.draw.polygon([(peak - 33, 62), (peak, 36), (peak + 33, 62), (peak, 74)], fill=(246, 250, 255))
    for x in (rng.randint(10, 50), rng.randint(206, 246)):
        for k in range(3):
            top, half = ground - 66 + 26 * k, 18 + 7 * k
            for size, colour in ((1.0, (92, 142, 140)), (0.5, (244, 249, 255))):
                foot, side = top + 36 * size, half * size
                painter.draw.polygon([(x - side, foot), (x, top), (x + side, foot)], fill=colour)
    painter.hills(ground, (236, 242, 250))
    painter.band(ground + 30, CANVAS, (238, 243, 251), (226, 234, 246))


def _night(painter: _Painter) -> None:
    rng = painter.rng
    ground = rng.randint(164, 184)
    top, low = _jitter(rng, (18, 20, 58), 6), _jitter(rng, (58, 58, 122), 8)
    painter.band(0, CANVAS, top, low)
    x, y = rng.choice((rng.randint(34, 70), rng.randint(186, 222))), rng.randint(34, 54)
    painter.disc(x, y, 24, 24, (252, 244, 200))
    painter.disc(x + 11, y - 5, 20, 20, top)
    for k in range(9):
        star_x, star_y, r = 14 + 28 * k + rng.randint(-8, 8), rng.randint(10, 120), rng.choice((4, 6))
        thin = r * 0.35
        star = [(0, -r), (thin, -thin), (r, 0), (thin, thin), (0, r), (-thin, thin), (-r, 0), (-thin, -thin)]
        if abs(star_x - x) > 36 or abs(star_y - y) > 36:
            painter.draw.polygon([(star_x + dx, star_y + dy) for dx, dy in star], fill=(250, 244, 190))
    painter.hills(ground, (38, 48, 84))
    painter.band(ground + 34, CANVAS, (40, 52, 88), (34, 44, 76))


def _city(painter: _Painter) -> None:
    rng = painter.rng
    ground = rng.randint(158, 172)
    painter.band(0, ground, _jitter(rng, (192, 214, 236)), (246, 224, 208))
    x = -rng.randint(0, 24)
    while x < CANVAS:
        width, height = rng.randint(46, 62), rng.randint(64, 136)
        wall = _jitter(rng, rng.choice(((136, 148, 172), (164, 160, 180), (176, 150, 150))), 6)
        painter.draw.rectangle((x, ground - height, x + width, ground), fill=wall)
        for wx in (x + 8, x + width - 21):
            for wy in range(ground - height + 14, ground - 16, 34):
                painter.draw.rectangle((wx, wy, wx + 13, wy + 17), fill=(250, 232, 180))
        x += width + rng.randint(2, 8)
    painter.draw.rectangle((0, ground, CANVAS, ground + 16), fill=(206, 204, 204))
    painter.band(ground + 16, CANVAS, (124, 126, 136), (104, 106, 118))
    for x in range(rng.randint(-30, 10), CANVAS, 76):
        painter.draw.rectangle((x, 236, x + 38, 243), fill=(240, 236, 222))


def _desert(painter: _Painter) -> None:
    rng = painter.rng
    ground = rng.randint(118, 138)
    painter.band(0, CANVAS, _jitter(rng, (250, 196, 128)), (254, 232, 180))
    painter.sun(rng.randint(34, 60), (255, 248, 214))
    mesa = rng.randint(40, 180)
    cliff = [(mesa - 8, ground + 20), (mesa + 6, 74), (mesa + 62, 74), (mesa + 78, ground + 20)]
    painter.draw.polygon(cliff, fill=(206, 112, 74))
    painter.hills(ground, _jitter(rng, (230, 160, 88)))
    painter.band(ground + 34, CANVAS, _jitter(rng, (234, 166, 92), 5), (214, 140, 74))
    x, foot, green = rng.choice((26, 230)), ground + 46, (96, 146, 84)
    painter.draw.rounded_rectangle((x - 8, foot - 78, x + 8, foot), 8, fill=green)
    painter.draw.rounded_rectangle((x - 24, foot - 58, x - 13, foot - 30), 5, fill=green)
    painter.draw.rectangle((x - 22, foot - 38, x, foot - 29), fill=green)
    painter.draw.rounded_rectangle((x + 13, foot - 66, x + 24, foot - 40), 5, fill=green)
    painter.draw.rectangle((x, foot - 48, x + 22, foot - 39), fill=green)


def _room(painter: _Painter) -> None:
    rng = painter.rng
    floor = rng.randint(164, 178)
    wall = _jitter(rng, rng.choice(((240, 214, 190), (226, 206, 214), (214, 220, 200))), 6)
    painter.band(0, floor, wall, mix(wall, (255, 255, 255), 0.2))
    painter.draw.rectangle((0, floor - 9, CANVAS, floor), fill=(250, 246, 240))
    painter.band(floor, CANVAS, (196, 142, 98), (176, 122, 82))
    x = rng.choice((rng.randint(14, 40), rng.randint(134, 160)))
    painter.draw.rectangle((x, 24, x + 84, 112), fill=(252, 250, 246))
    painter.draw.rectangle((x + 7, 31, x + 77, 105), fill=(164, 212, 242))
    painter.draw.rectangle((x + 39, 31, x + 45, 105), fill=(252, 250, 246))
    painter.draw.rectangle((x + 7, 65, x + 77, 71), fill=(252, 250, 246))
    frame = 186 if x < 100 else 22
    painter.draw.rectangle((frame, 40, frame + 48, 88), fill=(150, 98, 62))
    painter.draw.rectangle((frame + 7, 47, frame + 41, 81), fill=_jitter(rng, (226, 158, 140), 20))
    painter.disc(CANVAS / 2, 228, 112, 22, _jitter(rng, (198, 92, 92), 14))


def _river(painter: _Painter) -> None:
    rng = painter.rng
    horizon = rng.randint(92, 110)
    painter.band(0, horizon + 20, _jitter(rng, (150, 208, 240)), (222, 240, 248))
    for x in (rng.randint(20, 100), rng.randint(150, 230)):
        height = rng.randint(48, 70)
        painter.draw.polygon(
            [(x - 84, horizon + 8), (x, horizon - height), (x + 84, horizon + 8)], fill=(138, 158, 190)
        )
    painter.band(horizon, CANVAS, (118, 184, 104), (98, 168, 88))
    shift = rng.randint(-24, 24)
    flow = [(118, 0), (146, 0), (154, 24), (224, 52), (290, 74), (290, 122), (180, 90), (-20, 108), (-40, 60), (96, 36)]
    water = [(x + shift, y + horizon) for x, y in flow]
    painter.draw.polygon(water, fill=_jitter(rng, (56, 142, 218)))
    painter.draw.line([(10, horizon + 82), (70, horizon + 74)], fill=(166, 214, 244), width=5)
    painter.draw.line([(170, horizon + 66), (236, horizon + 76)], fill=(166, 214, 244), width=5)


def _meadow(painter: _Painter) -> None:
    rng = painter.rng
    ground = rng.randint(106, 130)
    painter.band(0, CANVAS, _jitter(rng, (122, 196, 248)), (226, 244, 254))
    painter.cloud(rng.randint(26, 44), (252, 254, 255))
    painter.cloud(rng.randint(52, 74), (252, 254, 255))
    painter.hills(ground, _jitter(rng, (150, 212, 96)))
    painter.band(ground + 32, CANVAS, _jitter(rng, (158, 218, 100), 5), _jitter(rng, (120, 192, 76), 5))
    for k in range(9):
        x, y = 14 + 28 * k + rng.randint(-8, 8), rng.randint(ground + 52, 244)
        petal = rng.choice(((255, 255, 255), (255, 220, 90), (250, 150, 186)))
        for dx, dy in ((-5, 0), (5, 0), (0, -5), (0, 5)):
            painter.disc(x + dx, y + dy, 4, 4, petal)
        painter.disc(x, y, 3.5, 3.5, (246, 170, 50))


_BACKGROUNDS: dict[str, Callable[[_Painter], None]] = {
    "beach": _beach,
    "forest": _forest,
    "snow": _snow,
    "night sky": _night,
    "city": _city,
    "desert": _desert,
    "room": _room,
    "river": _river,
    "meadow": _meadow,
}
BACKGROUNDS: tuple[str, ...] = (*_BACKGROUNDS, "plain")


def draw_background(name: str, plain_colour: str, rng: random.Random, wash: float = 0.0) -> Image.Image:
    """Draw a background on the canvas.

    Args:
        name: one of ``BACKGROUNDS``.
        plain_colour: the colour of the plain background, one of ``PLAIN_COLOURS``; unused by the others.
        rng: the source of the jitter.
        wash: how far the picture is thinned towards paper, in [0, 1].
    """
    if name == "plain":
        colour = _jitter(rng, PLAIN_COLOURS[plain_colour], 4)
        image = Image.new("RGB", (CANVAS, CANVAS), colour)
    else:
        painter = _Painter(rng)
        _BACKGROUNDS[name](painter)
        image = painter.image
    if wash:
        image = Image.blend(image, Image.new("RGB", image.size, PAPER), wash)
    return image
