"""The twelve objects, each drawn on a 100 x 100 grid, standing on y = 97 and facing right."""

from collections.abc import Callable

from benchmarks.tinyworld.palette import RGB, mix
from benchmarks.tinyworld.pen import Pen, curve, ellipse, polygon, rounded, sector, tube

DARK: RGB = (44, 44, 52)
GLASS: RGB = (196, 232, 250)
BEAK: RGB = (246, 146, 30)
WOOD: RGB = (134, 90, 54)
CREAM: RGB = (250, 244, 226)


def _cat(pen: Pen) -> None:
    paint = pen.paint
    pen.shape(tube(9, (34, 90), (14, 88), (7, 70), (15, 56), (9, 42)))
    pen.body(
        curve((30, 95), (28, 78), (38, 58), (56, 48), (70, 60), (74, 80), (74, 96), (52, 97)),
        ellipse(60, 36, 26, 21),
        curve((37, 34), (38, 8), (41, 6), (58, 20)),
        curve((62, 20), (79, 6), (82, 8), (84, 34)),
    )
    pen.shape(polygon((42, 26), (43, 14), (52, 21)), fill=paint.shade, outline=False)
    pen.shape(polygon((68, 21), (77, 14), (79, 26)), fill=paint.shade, outline=False)
    pen.shape(ellipse(60, 92, 8, 5), ellipse(76, 92, 8, 5), fill=paint.light)
    pen.shape(ellipse(66, 45, 12, 8), fill=paint.light, outline=False)
    pen.eye(54, 33, 5.5)
    pen.eye(75, 33, 5.5)
    pen.shape(polygon((62, 40), (70, 40), (66, 46)), fill=paint.ink((240, 110, 130)), outline=False)
    for y, tilt in ((42, -3), (48, 3)):
        pen.line((80, y), (97, y + tilt), width=0.4)
        pen.line((50, y), (29, y + tilt), width=0.4)


def _dog(pen: Pen) -> None:
    paint = pen.paint
    pen.shape(rounded(28, 66, 38, 95, 4), rounded(64, 66, 74, 95, 4), fill=paint.shade)
    pen.shape(tube(8, (16, 56), (6, 46), (5, 30), taper=0.6))
    pen.body(
        curve((10, 60), (18, 49), (40, 49), (58, 44), (74, 50), (72, 68), (50, 73), (20, 74)),
        rounded(14, 60, 25, 97, 4),
        rounded(54, 60, 65, 97, 4),
        ellipse(68, 30, 19, 18),
        rounded(66, 28, 97, 47, 9),
    )
    pen.shape(tube(6, (60, 48), (68, 51), (76, 49)), fill=paint.ink((216, 50, 54)), outline=False)
    pen.shape(curve((52, 14), (62, 16), (63, 32), (57, 50), (47, 48), (46, 30)), fill=paint.shade)
    pen.shape(tube(7, (88, 46), (89, 54)), fill=paint.ink((244, 120, 140)))
    pen.line((76, 43), (84, 46), (93, 44), width=0.5)
    pen.shape(ellipse(94, 31, 6, 5), fill=DARK, outline=False)
    pen.eye(75, 24, 5)


def _duck(pen: Pen) -> None:
    paint, beak = pen.paint, pen.paint.ink(BEAK)
    pen.shape(tube(5, (42, 84), (42, 94), (52, 95)), tube(5, (58, 84), (58, 94), (68, 95)), fill=beak)
    pen.shape(curve((84, 24), (98, 28), (100, 33), (96, 38), (82, 40)), fill=beak)
    pen.body(
        curve((3, 46), (16, 52), (34, 54), (54, 50), (76, 48), (84, 64), (72, 82), (46, 88), (20, 78), (6, 62)),
        ellipse(69, 28, 19, 18),
        polygon((54, 32), (84, 32), (82, 60), (54, 60)),
    )
    pen.shape(curve((22, 60), (38, 58), (58, 60), (54, 72), (40, 77), (26, 72)), fill=paint.shade)
    pen.line((84, 33), (97, 34), width=0.4)
    pen.eye(75, 24, 5.5)


def _bear(pen: Pen) -> None:
    paint = pen.paint
    pen.shape(ellipse(34, 12, 10, 10), ellipse(72, 12, 10, 10), ellipse(14, 78, 7, 7))
    pen.dot(34, 13, 5, paint.light)
    pen.dot(72, 13, 5, paint.light)
    pen.shape(ellipse(20, 60, 9, 17, 28), ellipse(86, 58, 9, 17, -32))
    pen.body(ellipse(52, 68, 35, 28), ellipse(53, 30, 27, 23))
    pen.shape(ellipse(56, 71, 21, 18), fill=paint.light, outline=False)
    pen.shape(ellipse(32, 92, 15, 7), ellipse(72, 92, 15, 7))
    pen.shape(ellipse(62, 38, 15, 11), fill=paint.light, outline=False)
    pen.eye(49, 24, 4.6)
    pen.eye(71, 24, 4.6)
    pen.shape(ellipse(64, 33, 6.5, 4.5), fill=DARK, outline=False)
    pen.line((64, 36), (64, 43), (70, 44), width=0.4)


def _teapot(pen: Pen) -> None:
    paint = pen.paint
    pen.shape(tube(8, (20, 48), (5, 46), (4, 66), (22, 78)))
    pen.shape(curve((66, 82), (68, 58), (78, 52), (84, 38), (90, 32), (99, 35), (94, 46), (88, 66), (76, 82)))
    pen.shape(rounded(28, 86, 66, 97, 4), fill=paint.shade)
    pen.body(ellipse(46, 66, 33, 27))
    pen.shape(ellipse(46, 30, 7, 7))
    pen.shape(curve((24, 47), (28, 38), (46, 34), (64, 38), (68, 47), (46, 50)), fill=paint.shade)
    pen.shape(ellipse(31, 60, 5, 10, 24), fill=paint.light, outline=False)


def _mug(pen: Pen) -> None:
    paint = pen.paint
    pen.shape(tube(9, (68, 40), (90, 38), (93, 58), (86, 74), (68, 76)))
    pen.body(curve((12, 22), (13, 50), (15, 84), (20, 95), (43, 97), (66, 95), (71, 84), (73, 50), (74, 22)))
    pen.shape(ellipse(43, 22, 31, 9), fill=paint.light)
    pen.shape(ellipse(43, 23, 24, 5.5), fill=paint.ink((104, 62, 36)), outline=False)
    heart = curve((43, 78), (30, 65), (28, 56), (36, 51), (43, 57), (50, 51), (58, 56), (56, 65))
    pen.shape(heart, fill=paint.light, outline=False)


def _car(pen: Pen) -> None:
    paint = pen.paint
    pen.body(
        polygon((4, 62), (12, 55), (88, 56), (97, 64), (98, 80), (92, 84), (6, 84), (3, 78)),
        polygon((20, 58), (30, 36), (36, 32), (60, 32), (66, 36), (80, 58)),
    )
    glass = paint.ink(GLASS)
    pen.shape(polygon((28, 55), (35, 38), (46, 38), (46, 55)), fill=glass, outline=False)
    pen.shape(polygon((51, 55), (51, 38), (60, 38), (71, 55)), fill=glass, outline=False)
    pen.shape(ellipse(94, 67, 4, 5), fill=paint.ink((255, 240, 150)), outline=False)
    pen.shape(rounded(2, 64, 7, 72, 2), fill=paint.ink((200, 40, 40)), outline=False)
    for x in (25, 76):
        pen.shape(ellipse(x, 83, 13.5, 13.5), fill=paint.ink(DARK))
        pen.dot(x, 83, 6, paint.ink((214, 216, 222)))


def _boat(pen: Pen) -> None:
    paint = pen.paint
    pen.shape(rounded(47, 4, 51, 76, 1.5), fill=paint.ink(WOOD))
    pen.shape(polygon((44, 12), (44, 66), (10, 66)), fill=paint.light)
    pen.shape(polygon((54, 8), (88, 66), (54, 66)))
    pen.body(curve((3, 71), (30, 74), (60, 74), (99, 67), (92, 84), (78, 96), (50, 97), (22, 96), (9, 84)))
    for x in (32, 50, 68):
        pen.dot(x, 84, 4.5, paint.light)


def _house(pen: Pen) -> None:
    paint = pen.paint
    roof = mix(paint.shade, paint.outline, 0.35)
    pen.shape(polygon((66, 14), (78, 14), (78, 44), (66, 44)), fill=paint.shade)
    pen.body(polygon((14, 46), (86, 46), (86, 97), (14, 97)))
    pen.shape(polygon((50, 8), (97, 50), (3, 50)), fill=roof)
    pen.shape(rounded(55, 64, 74, 97, 3), fill=paint.ink(WOOD))
    pen.dot(70, 82, 2.2, paint.ink((250, 214, 90)))
    pen.shape(rounded(24, 60, 44, 80, 2), fill=paint.ink(GLASS))
    pen.line((34, 60), (34, 80), width=0.4)
    pen.line((24, 70), (44, 70), width=0.4)
    pen.shape(ellipse(50, 33, 7, 7), fill=paint.ink(GLASS))


def _tree(pen: Pen) -> None:
    paint = pen.paint
    trunk = paint.ink((92, 60, 38) if paint.wash else (104, 68, 42))
    pen.shape(
        polygon((43, 60), (57, 60), (58, 86), (66, 97), (34, 97), (42, 86)), tube(6, (50, 80), (70, 62)), fill=trunk
    )
    pen.body(ellipse(28, 48, 22, 19), ellipse(72, 46, 25, 21), ellipse(48, 26, 26, 23), ellipse(50, 52, 22, 18))
    for x, y, rx in ((36, 22, 9), (68, 38, 8), (26, 44, 7)):
        pen.shape(ellipse(x, y, rx, rx * 0.7, -20), fill=paint.light, outline=False)
    for x, y in ((48, 48), (80, 52), (54, 22)):
        pen.shape(ellipse(x, y, 8, 5, 15), fill=paint.shade, outline=False)


def _shoe(pen: Pen) -> None:
    paint = pen.paint
    heel_to_ankle = ((4, 66), (6, 44), (8, 36), (22, 42), (38, 40), (46, 36))
    pen.body(curve(*heel_to_ankle, (52, 48), (62, 60), (84, 66), (96, 76), (97, 88), (50, 90), (6, 88)))
    pen.shape(curve((12, 39), (26, 36), (43, 36), (34, 45), (20, 46)), fill=paint.ink(DARK))
    pen.shape(curve((76, 66), (90, 70), (97, 80), (96, 87), (76, 87), (72, 76)), fill=paint.light)
    pen.shape(rounded(3, 84, 98, 97, 5), fill=paint.ink(CREAM))
    for x, y in ((44, 52), (51, 60), (59, 67)):
        pen.shape(tube(5, (x, y), (x + 10, y - 8)), fill=paint.ink((255, 255, 255)))
    pen.shape(tube(5, (12, 74), (26, 76), (46, 62)), fill=paint.shade, outline=False)


def _backpack(pen: Pen) -> None:
    paint = pen.paint
    pen.shape(tube(6, (40, 16), (42, 4), (60, 4), (62, 16)), fill=paint.shade)
    pen.shape(tube(9, (28, 30), (10, 42), (8, 66), (26, 84)), fill=paint.shade)
    pen.shape(rounded(72, 54, 94, 90, 8), fill=paint.shade)
    pen.body(curve((22, 40), (26, 20), (40, 12), (62, 12), (76, 20), (80, 40), (81, 88), (74, 97), (28, 97), (21, 88)))
    pen.shape(curve((22, 40), (26, 20), (40, 12), (62, 12), (76, 20), (80, 40), (72, 48), (30, 48)), fill=paint.light)
    pen.shape(rounded(31, 58, 71, 90, 7), fill=paint.shade)
    pen.shape(tube(3.5, (38, 66), (64, 66)), fill=paint.ink(CREAM), outline=False)
    pen.shape(rounded(46, 40, 56, 54, 2), fill=paint.ink((250, 206, 84)))


OBJECTS: dict[str, Callable[[Pen], None]] = {
    "cat": _cat,
    "dog": _dog,
    "duck": _duck,
    "bear": _bear,
    "teapot": _teapot,
    "mug": _mug,
    "car": _car,
    "boat": _boat,
    "house": _house,
    "tree": _tree,
    "shoe": _shoe,
    "backpack": _backpack,
}
_HAT_SEATS: dict[str, tuple[float, float, float]] = {
    "cat": (60, 19, 19),
    "dog": (68, 16, 17),
    "duck": (68, 14, 16),
    "bear": (53, 11, 20),
}
ANIMALS: tuple[str, ...] = tuple(_HAT_SEATS)


def draw_hat(pen: Pen, noun: str) -> None:
    """Put a top hat on an animal's head."""
    x, y, half = _HAT_SEATS[noun]
    hat = pen.paint.ink((52, 50, 92))
    crown = polygon(
        (x - 0.66 * half, y), (x - 0.74 * half, y - 1.2 * half), (x + 0.74 * half, y - 1.2 * half), (x + 0.66 * half, y)
    )
    pen.shape(crown, ellipse(x, y, 1.15 * half, 0.26 * half), fill=hat)
    band = rounded(x - 0.66 * half, y - 0.52 * half, x + 0.66 * half, y - 0.16 * half, 1)
    pen.shape(band, fill=pen.paint.ink((232, 62, 66)), outline=False)


def draw_ball(pen: Pen) -> None:
    """A beach ball that fills the pen's grid."""
    paint = pen.paint
    pen.shape(ellipse(50, 50, 48, 48), fill=paint.ink((255, 255, 255)))
    for colour, start in (((232, 62, 66), 20), ((64, 132, 232), 140), ((250, 206, 60), 260)):
        pen.shape(sector(50, 50, 46, start, start + 60), fill=paint.ink(colour), outline=False)
