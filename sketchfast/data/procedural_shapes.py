"""The parametric objects that `procedural` draws: one function a class, each a list of `Part`s.

Coordinates run from 0 to 100, x to the right and y down. A function takes its proportions, counts and angles
from a `Draw` of the instance, always in the same order, so that an instance is the same thing in every
drawing style and in its photo. Parts come in painting order: a later one lies in front.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
LINE = -1  # tone of a part that is only a line


class Part(NamedTuple):
    """One line of an object.

    points [n, 2]; closed joins the last to the first; tone: which of the instance's colours fills it in the
    photo, LINE for none; smooth: a curve, whose points are no corners.
    """

    points: Points
    closed: bool
    tone: int
    smooth: bool = False


class Draw:
    """Uniform numbers of one instance, handed out in order."""

    def __init__(self, values: NDArray[np.float64]) -> None:
        self._values = values.tolist()
        self._next = 0

    def _take(self) -> float:
        value: float = self._values[self._next % len(self._values)]
        self._next += 1
        return value

    def __call__(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self._take()

    def count(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + int((high - low + 1) * self._take())

    def chance(self, probability: float = 0.5) -> bool:
        """True with the given probability."""
        return self._take() < probability


# ---- primitives --------------------------------------------------------------------------------------------


def polygon(*xy: tuple[float, float], tone: int = 0) -> Part:
    return Part(np.array(xy, dtype=np.float64), True, tone)


def polyline(*xy: tuple[float, float]) -> Part:
    return Part(np.array(xy, dtype=np.float64), False, LINE)


def rectangle(x0: float, y0: float, x1: float, y1: float, tone: int = 0) -> Part:
    return polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1), tone=tone)


def _circle_points(
    cx: float, cy: float, rx: float, ry: float, start: float, stop: float, count: int
) -> Points:
    at = np.linspace(np.radians(start), np.radians(stop), count)
    points = np.empty((count, 2))
    points[:, 0] = cx + rx * np.cos(at)
    points[:, 1] = cy + ry * np.sin(at)
    return points


def ellipse(
    cx: float, cy: float, rx: float, ry: float | None = None, tone: int = 0, turn: float = 0.0
) -> Part:
    """A whole ellipse, turned by `turn` degrees."""
    ry = rx if ry is None else ry
    count = 7 if max(rx, ry) < 4 else 11 if max(rx, ry) < 12 else 17
    points = _circle_points(0, 0, rx, ry, -90, 270, count)[:-1]
    if turn:
        points = rotate(points, turn)
    return Part(points + np.array((cx, cy)), True, tone, True)


def arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float, count: int = 0) -> Part:
    """Part of an ellipse, from `start` to `stop` degrees (0 to the right, 90 down)."""
    count = count or max(4, int(abs(stop - start) / 25) + 2)
    return Part(_circle_points(cx, cy, rx, ry, start, stop, count), False, LINE, True)


def sector(cx: float, cy: float, rx: float, ry: float, start: float, stop: float, tone: int = 0) -> Part:
    """An arc closed by its chord."""
    return Part(arc(cx, cy, rx, ry, start, stop).points, True, tone, True)


def rotate(points: Points, degrees: float) -> Points:
    """Turned about (0, 0), clockwise on the screen."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return points @ np.array([[c, s], [-s, c]])


def curve(*xy: tuple[float, float], closed: bool = False, tone: int = LINE, steps: int = 4) -> Part:
    """A smooth (Catmull-Rom) curve through the given points."""
    knots = np.array(xy, dtype=np.float64)
    if closed:
        knots = np.concatenate((knots[-1:], knots, knots[:2]))
    else:
        knots = np.concatenate((2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]))
    before, a, b, after = (knots[i : len(knots) - 3 + i, None] for i in range(4))
    t = (np.arange(steps) / steps)[None, :, None]
    slope_a, slope_b = (b - before) / 2, (after - a) / 2
    points = (
        (2 * t**3 - 3 * t**2 + 1) * a
        + (t**3 - 2 * t**2 + t) * slope_a
        + (3 * t**2 - 2 * t**3) * b
        + (t**3 - t**2) * slope_b
    ).reshape(-1, 2)
    return Part(points if closed else np.concatenate((points, knots[-2:-1])), closed, tone, True)


def radial(cx: float, cy: float, radii: NDArray[np.float64], turn: float = -90.0, tone: int = 0) -> Part:
    """A closed outline at the given radii, at equal angles."""
    at = np.radians(turn) + 2 * np.pi * np.arange(len(radii)) / len(radii)
    return Part(np.column_stack((cx + radii * np.cos(at), cy + radii * np.sin(at))), True, tone)


def bumps(cx: float, cy: float, rx: float, ry: float, count: int, depth: float, tone: int = 0) -> Part:
    """A cloud's outline: `count` bumps around an ellipse."""
    at = np.linspace(0, 2 * np.pi, 4 * count, endpoint=False)
    swell = 1 + depth * np.abs(np.sin(count * at / 2))
    return Part(
        np.column_stack((cx + rx * swell * np.cos(at), cy + ry * swell * np.sin(at))), True, tone, True
    )


# ---- buildings and furniture -------------------------------------------------------------------------------


def house(d: Draw) -> list[Part]:
    left, right, eaves, ground = 50 - d(22, 36), 50 + d(22, 36), d(38, 55), 90.0
    over, peak = d(0, 8), d(8, 24)
    parts = [rectangle(left, eaves, right, ground, tone=0)]
    if d.chance():
        x = right - d(8, 14)
        parts.append(rectangle(x, peak + 4, x + 6, eaves - 4, tone=2))
    parts.append(polygon((left - over, eaves), (50 + d(-6, 6), peak), (right + over, eaves), tone=1))
    door, wide = left + d(4, 20), d(8, 13)
    parts.append(rectangle(door, ground - d(18, 28), door + wide, ground, tone=2))
    side = d(8, 12)
    for i in range(d.count(1, 2)):
        x = right - 4 - side - i * (side + 4)
        parts.append(rectangle(x, eaves + 8, x + side, eaves + 8 + side, tone=3))
    return parts


def castle(d: Draw) -> list[Part]:
    top, tower, high, teeth = d(45, 58), d(14, 20), d(18, 34), d.count(3, 5)
    left, right = d(8, 16), d(84, 92)
    wall = [(left + tower, 90.0), (left + tower, top)]
    step = (right - left - 2 * tower) / (2 * teeth - 1)
    for i in range(teeth):
        x = left + tower + 2 * i * step
        wall += [(x, top - 5), (x + step, top - 5), (x + step, top), (x + 2 * step, top)]
    wall[-1:] = [(right - tower, 90.0)]
    parts = [polygon(*wall, tone=0)]
    for x in (left, right - tower):
        parts.append(rectangle(x, high, x + tower, 90, tone=1))
        parts.append(polygon((x - 2, high), (x + tower / 2, high - d(12, 16)), (x + tower + 2, high), tone=2))
    gate = d(7, 11)
    parts.append(
        Part(
            np.vstack((arc(50, 75, gate, gate, 180, 360).points, [[50 + gate, 90], [50 - gate, 90]])), True, 3
        )
    )
    return parts


def tent(d: Draw) -> list[Part]:
    peak, base, wide = (50 + d(-8, 8), d(15, 30)), d(80, 90), d(34, 44)
    flap = d(5, 12)
    parts = [polygon((50 - wide, base), peak, (50 + wide, base), tone=0)]
    parts.append(polygon((50 - flap, base), peak, (50 + flap, base), tone=1))
    if d.chance():
        parts += [
            polyline((50 - wide, base), (44 - wide, base + 5)),
            polyline((50 + wide, base), (56 + wide, base + 5)),
        ]
    return parts


def bridge(d: Draw) -> list[Part]:
    deck, thick, count, water = d(35, 50), d(6, 10), d.count(2, 4), d(75, 88)
    parts = [rectangle(4, deck, 96, deck + thick, tone=0)]
    span = 92 / count
    for i in range(count):
        x = 4 + span * (i + 0.5)
        parts.append(arc(x, water, span * 0.4, water - deck - thick - 3, 180, 360))
    for i in range(1, count):
        x = 4 + span * i
        parts.append(rectangle(x - span * 0.1, deck + thick, x + span * 0.1, water, tone=1))
    if d.chance():
        parts.append(polyline((4, deck - 10), (96, deck - 10)))
    return parts


def fence(d: Draw) -> list[Part]:
    count, top, base, point = d.count(4, 7), d(22, 38), d(78, 90), d(5, 12)
    step = 88 / count
    wide = step * d(0.5, 0.75)
    parts = [rectangle(4, y, 96, y + 5, tone=1) for y in (top + 16, base - 16)]
    for i in range(count):
        x = 6 + i * step
        parts.append(
            polygon(
                (x, base),
                (x, top + point),
                (x + wide / 2, top),
                (x + wide, top + point),
                (x + wide, base),
                tone=0,
            )
        )
    return parts


def ladder(d: Draw) -> list[Part]:
    count, lean, wide, narrow = d.count(4, 8), d(-16, 16), d(12, 20), d(0.6, 1.0)
    foot, head = (50 - lean, 94.0), (50 + lean, 6.0)
    left = ((foot[0] - wide, foot[1]), (head[0] - wide * narrow, head[1]))
    right = ((foot[0] + wide, foot[1]), (head[0] + wide * narrow, head[1]))
    parts = [polyline(*left), polyline(*right)]
    for i in range(count):
        t = (i + 0.7) / (count + 0.4)
        ends = [tuple(np.add(np.multiply(rail[0], 1 - t), np.multiply(rail[1], t))) for rail in (left, right)]
        parts.append(polyline(*ends))
    return parts


def stairs(d: Draw) -> list[Part]:
    count, x, y = d.count(3, 6), 8.0, 90.0
    run, rise = 84 / count, d(52, 76) / count
    xy = [(x, y)]
    for _ in range(count):
        xy += [(x, y - rise), (x + run, y - rise)]
        x, y = x + run, y - rise
    parts = [polygon(*xy, (x, 90), tone=0)]
    if d.chance(0.6):
        lift = d(14, 22)
        parts.append(polyline((10, 90 - rise - lift), (92, y - lift)))
    return parts


def chair(d: Draw) -> list[Part]:
    seat, deep, tall, thick = d(50, 60), d(26, 38), d(32, 44), d(4, 7)
    x0 = 50 - deep / 2
    x1, legs = x0 + deep, d(84, 94)
    parts = [
        polyline((x1 - 3, seat), (x1 - 3 + d(0, 6), legs)),
        polyline((x0 + 3, seat), (x0 + 3 - d(0, 6), legs)),
    ]
    back = d(-8, 2)
    parts.append(
        polygon(
            (x0, seat), (x0 + back, seat - tall), (x0 + back + thick, seat - tall), (x0 + thick, seat), tone=1
        )
    )
    parts.append(rectangle(x0, seat, x1, seat + thick, tone=0))
    if d.chance(0.4):
        parts.append(polyline((x0 + thick, seat - 14), (x1, seat - 14), (x1, seat)))
    return parts


def table(d: Draw) -> list[Part]:
    top, wide, thick, base = d(35, 52), d(34, 46), d(4, 8), d(82, 94)
    inset, splay = d(2, 10), d(-3, 6)
    parts = [rectangle(50 - wide, top, 50 + wide, top + thick, tone=0)]
    for side in (-1, 1):
        x = 50 + side * (wide - inset)
        parts.append(
            polygon(
                (x - 2, top + thick),
                (x + 2, top + thick),
                (x + 2 + side * splay, base),
                (x - 1 + side * splay, base),
                tone=1,
            )
        )
    if d.chance(0.4):
        parts.append(rectangle(50 - 10, top + thick, 50 + 10, top + thick + d(5, 9), tone=1))
    return parts


def lamp(d: Draw) -> list[Part]:
    top, low, narrow, wide, base = d(8, 18), d(36, 50), d(8, 16), d(20, 30), d(12, 22)
    return [
        rectangle(48, low, 52, 86, tone=2),
        polygon((50 - narrow, top), (50 + narrow, top), (50 + wide, low), (50 - wide, low), tone=0),
        sector(50, 92, base, d(5, 10), 180, 360, tone=1),
        polyline((50 + wide * 0.5, low), (50 + wide * 0.5, low + d(8, 16))),
    ]


def clock(d: Draw) -> list[Part]:
    radius, hour, minute, ticks = d(32, 42), d(0, 360), d(0, 360), (0, 4, 12)[d.count(0, 2)]
    parts = [ellipse(50, 50, radius, tone=0)]
    for i in range(ticks):
        ray = rotate(np.array([[0, -radius * 0.95], [0, -radius * 0.8]]), 360 * i / ticks) + 50
        parts.append(Part(ray, False, LINE))
    for angle, length in ((hour, 0.45), (minute, 0.72)):
        parts.append(Part(rotate(np.array([[0, 0], [0, -radius * length]]), angle) + 50, False, LINE))
    if d.chance(0.4):
        parts += [
            polyline((50 + s * radius * 0.6, 50 + radius * 0.8), (50 + s * radius * 0.8, 50 + radius * 1.12))
            for s in (-1, 1)
        ]
    return parts


# ---- vehicles ----------------------------------------------------------------------------------------------


def car(d: Draw) -> list[Part]:
    floor, belt, roof, wheel = d(68, 74), d(50, 56), d(30, 40), d(7, 11)
    bonnet, boot, front, rear = d(20, 30), d(10, 24), d(6, 14), d(2, 12)
    cabin = [(5 + boot, belt), (5 + boot + rear, roof), (95 - bonnet - front, roof), (95 - bonnet, belt)]
    body = polygon((5, floor), (5, belt + 2), *cabin, (95, belt + 5), (95, floor), tone=0)
    window = polygon(
        (9 + boot, belt),
        (7 + boot + rear, roof + 4),
        (93 - bonnet - front, roof + 4),
        (91 - bonnet, belt),
        tone=2,
    )
    parts = [body, window]
    if d.chance(0.7):
        x = 50 + d(-8, 4)
        parts.append(polyline((x, roof + 4), (x, floor - 3)))
    return parts + [ellipse(x, floor, wheel, tone=1) for x in (d(20, 26), d(72, 78))]


def bus(d: Draw) -> list[Part]:
    top, floor, count, wheel = d(22, 34), d(72, 78), d.count(3, 6), d(6, 9)
    parts = [rectangle(4, top, 96, floor, tone=0)]
    step = 84 / count
    for i in range(count):
        x = 8 + i * step
        parts.append(rectangle(x, top + 7, x + step * 0.75, top + 7 + d(13, 15), tone=2))
    return parts + [ellipse(x, floor, wheel, tone=1) for x in (d(18, 26), d(74, 82))]


def bicycle(d: Draw) -> list[Part]:
    wheel, y, left, right = d(16, 21), d(66, 72), d(22, 26), d(74, 78)
    seat, bar, pedal = (d(36, 42), d(34, 42)), (d(62, 68), d(30, 38)), (d(46, 52), 70.0)
    return [
        ellipse(left, y, wheel, tone=LINE),
        ellipse(right, y, wheel, tone=LINE),
        polyline((left, y), seat, (seat[0] + 28, seat[1] + 6), pedal, (left, y)),
        polyline(seat, pedal),
        polyline((right, y), bar, (bar[0] + d(4, 10), bar[1] - d(2, 6))),
        polyline((seat[0] - 6, seat[1] - 3), (seat[0] + 6, seat[1] - 3)),
    ]


def sailboat(d: Draw) -> list[Part]:
    deck, keel, bow, mast = d(62, 70), d(78, 88), d(6, 14), d(44, 54)
    top = d(6, 14)
    parts = [
        polygon((8, deck), (92, deck), (92 - bow, keel), (8 + bow, keel), tone=0),
        polyline((mast, deck), (mast, top)),
    ]
    parts.append(polygon((mast + 2, top + 2), (mast + d(24, 36), deck - 5), (mast + 2, deck - 5), tone=1))
    if d.chance(0.7):
        parts.append(
            polygon((mast - 2, top + d(4, 14)), (mast - d(18, 30), deck - 5), (mast - 2, deck - 5), tone=2)
        )
    return parts


def airplane(d: Draw) -> list[Part]:
    thick, sweep, span, tail = d(5, 9), d(8, 22), d(26, 38), d(10, 16)
    parts = [ellipse(50, 50, 44, thick, tone=0)]
    for side in (-1, 1):
        y = 50 + side * thick * 0.8
        parts.append(
            polygon((58, y), (58 - sweep, y + side * span), (50 - sweep, y + side * span), (42, y), tone=1)
        )
        parts.append(
            polygon(
                (16, 50 + side * 3), (8, 50 + side * tail), (4, 50 + side * tail), (8, 50 + side * 2), tone=2
            )
        )
    for i in range(d.count(0, 4)):
        parts.append(ellipse(80 - 6 * i, 50, 1.6, tone=3))
    return parts


def rocket(d: Draw) -> list[Part]:
    wide, nose, base, fin = d(10, 15), d(24, 36), d(70, 76), d(8, 16)
    parts = [
        polygon((50 + s * wide, base - 16), (50 + s * (wide + fin), base + 6), (50 + s * wide, base), tone=1)
        for s in (-1, 1)
    ]
    parts.append(
        curve(
            (50 - wide, base),
            (50 - wide, nose + 6),
            (50, 5),
            (50 + wide, nose + 6),
            (50 + wide, base),
            closed=False,
        )
    )
    parts[-1] = parts[-1]._replace(closed=True, tone=0)
    parts += [ellipse(50, nose + 10 + 14 * i, wide * d(0.35, 0.5), tone=2) for i in range(d.count(1, 2))]
    if d.chance(0.7):
        parts.append(
            polygon(
                (50 - wide * 0.6, base),
                (50 - 4, base + 12),
                (50, base + d(16, 22)),
                (50 + 4, base + 12),
                (50 + wide * 0.6, base),
                tone=3,
            )
        )
    return parts


def train(d: Draw) -> list[Part]:
    floor, boiler, cab, count = d(70, 76), d(44, 52), d(22, 32), d.count(3, 4)
    parts = [rectangle(30, boiler, 92, floor, tone=0), rectangle(8, cab, 34, floor, tone=1)]
    parts.append(rectangle(13, cab + 6, 28, cab + 18, tone=2))
    x, flare = d(74, 82), d(1, 4)
    parts.append(
        polygon((x, boiler), (x - flare, boiler - 16), (x + 8 + flare, boiler - 16), (x + 8, boiler), tone=1)
    )
    parts += [ellipse(18 + i * 66 / (count - 1), floor + 4, d(6, 8), tone=3) for i in range(count)]
    return parts


# ---- things ------------------------------------------------------------------------------------------------


def cup(d: Draw) -> list[Part]:
    top, base, wide, taper, mid = d(28, 42), d(78, 90), d(20, 28), d(0, 8), 44.0
    parts = [arc(mid + wide - 2, (top + base) / 2 - 2, d(12, 18), d(11, 16), -80, 80)]
    parts.append(
        polygon(
            (mid - wide, top),
            (mid + wide, top),
            (mid + wide - taper, base),
            (mid - wide + taper, base),
            tone=0,
        )
    )
    for i in range(d.count(0, 3)):
        x = mid - 12 + 11 * i
        parts.append(curve((x, top - 4), (x + 4, top - 10), (x - 2, top - 16), (x + 3, top - 22)))
    if d.chance(0.4):
        y = top + (base - top) * 0.35
        parts.append(polyline((mid - wide + taper * 0.35, y), (mid + wide - taper * 0.35, y)))
    return parts


def bottle(d: Draw) -> list[Part]:
    wide, neck, shoulder, top = d(12, 20), d(4, 7), d(34, 48), d(6, 14)
    right = [(50 + neck, top), (50 + neck, shoulder - 10), (50 + wide, shoulder + 4), (50 + wide, 94.0)]
    parts = [polygon(*[(100 - x, y) for x, y in reversed(right)], *right, tone=0)]
    parts.append(rectangle(50 - neck - 1, top - 5, 50 + neck + 1, top, tone=1))
    y = d(56, 62)
    parts.append(rectangle(50 - wide, y, 50 + wide, y + d(14, 22), tone=2))
    return parts


def wine_glass(d: Draw) -> list[Part]:
    wide, bowl, stem, base = d(16, 24), d(40, 54), d(82, 88), d(14, 20)
    rim, level = d(0.7, 1.0) * wide, d(16, 30)
    parts = [curve((50 - rim, 8), (50 - wide, bowl - 18), (50, bowl), (50 + wide, bowl - 18), (50 + rim, 8))]
    parts[0] = parts[0]._replace(closed=True, tone=0)
    parts += [polyline((50 - wide * 0.9, level), (50 + wide * 0.9, level)), polyline((50, bowl), (50, stem))]
    return [*parts, ellipse(50, stem + 3, base, 4, tone=1)]


def umbrella(d: Draw) -> list[Part]:
    wide, tall, rim, count = d(34, 44), d(26, 36), d(46, 54), d.count(3, 5)
    step = 2 * wide / count
    scallop = [
        arc(50 + wide - step * (i + 0.5), rim, step / 2, d(3, 4), 0, -180, 4).points for i in range(count)
    ]
    dome = arc(50, rim, wide, tall, 180, 360).points
    parts = [Part(np.vstack([dome, *scallop]), True, 0)]
    hook = d(5, 9)
    parts.append(polyline((50, rim - 4), (50, 84)))
    return [*parts, arc(50 - hook, 84, hook, hook, 0, 180)]


def key(d: Draw) -> list[Part]:
    radius, x0, teeth, y = d(11, 17), d(20, 26), d.count(2, 3), 50.0
    parts = [ellipse(x0, y, radius, tone=0), ellipse(x0, y, radius * d(0.35, 0.6), tone=1)]
    parts.append(polyline((x0 + radius, y), (94, y)))
    for i in range(teeth):
        x = 94 - i * d(7, 10)
        parts.append(polyline((x, y), (x, y + d(8, 15))))
    return parts


def hammer(d: Draw) -> list[Part]:
    wide, tall, x = d(18, 28), d(12, 18), 50.0
    handle = d(3, 5)
    parts = [
        rectangle(x - handle, 30, x + handle, 94, tone=1),
        rectangle(x - wide * 0.6, 14, x + wide, 14 + tall, tone=0),
    ]
    return [
        *parts,
        polygon(
            (x - wide * 0.6, 14),
            (x - wide * 0.6 - d(10, 18), 14 + tall * 0.7),
            (x - wide * 0.6, 14 + tall),
            tone=0,
        ),
    ]


def scissors(d: Draw) -> list[Part]:
    spread, ring, cross = d(12, 24), d(8, 12), d(50, 58)
    parts = []
    for side in (-1, 1):
        tip, grip = (50 + side * spread, 6.0), (50 - side * (spread * 0.7 + 3), 82.0)
        parts.append(polyline(tip, (50, cross), (grip[0] + side * ring * 0.4, grip[1] - ring)))
        parts.append(ellipse(grip[0], grip[1], ring, ring * d(1.0, 1.3), tone=0))
    return parts


def eyeglasses(d: Draw) -> list[Part]:
    radius, gap, y = d(13, 18), d(4, 10), d(46, 56)
    square, tall = d.chance(0.4), d(0.7, 1.0)
    parts = []
    for side in (-1, 1):
        x = 50 + side * (gap + radius)
        box = rectangle(x - radius, y - radius * tall, x + radius, y + radius * tall, tone=0)
        parts.append(box if square else ellipse(x, y, radius, radius * tall, tone=0))
        parts.append(polyline((x + side * radius, y - 3), (50 + side * 48, y - d(8, 16))))
    return [*parts, arc(50, y, gap, d(4, 8), 180, 360)]


def hat(d: Draw) -> list[Part]:
    wide, crown, top, rim, taper = d(34, 46), d(18, 28), d(20, 40), d(70, 78), d(-4, 6)
    band = d(6, 12)
    return [
        ellipse(50, rim, wide, d(5, 10), tone=0),
        polygon(
            (50 - crown, rim), (50 - crown + taper, top), (50 + crown - taper, top), (50 + crown, rim), tone=0
        ),
        polyline((50 - crown, rim - band), (50 + crown, rim - band)),
    ]


def envelope(d: Draw) -> list[Part]:
    wide, tall, fold = d(36, 44), d(22, 32), d(0.45, 0.8)
    y0, y1 = 50 - tall, 50 + tall
    parts = [
        rectangle(50 - wide, y0, 50 + wide, y1, tone=0),
        polygon((50 - wide, y0), (50, y0 + 2 * tall * fold), (50 + wide, y0), tone=1),
    ]
    if d.chance():
        parts += [
            polyline((50 - wide, y1), (50 - wide * 0.3, y0 + tall * 1.1)),
            polyline((50 + wide, y1), (50 + wide * 0.3, y0 + tall * 1.1)),
        ]
    return parts


def book(d: Draw) -> list[Part]:
    wide, top, base, sag, lines = d(36, 44), d(24, 34), d(70, 80), d(4, 9), d.count(2, 4)
    parts = []
    for side in (-1, 1):
        middle, outer = 50 + side * wide * 0.5, 50 + side * wide
        upper = [(50.0, top + sag), (middle, top - 2), (outer, top + 1)]
        page = [*upper, (outer, base), (middle, base - 3), (50.0, base + sag)]
        parts.append(polygon(*page, tone=0))
        for i in range(lines):
            y = top + 10 + i * (base - top - 14) / lines
            parts.append(polyline((50 + side * 6, y + sag * 0.6), (50 + side * (wide - 6), y)))
    return parts


def flag(d: Draw) -> list[Part]:
    pole, top, high, length, wave, bands = d(14, 24), d(6, 12), d(28, 40), d(54, 70), d(2, 7), d.count(1, 3)
    x = np.linspace(0, 1, 7)
    ripple = wave * np.sin(2 * np.pi * x)
    upper = np.column_stack((pole + length * x, top + 4 + ripple))
    lower = upper[::-1] + np.array((0, high))
    parts = [polyline((pole, top), (pole, 95)), Part(np.vstack((upper, lower)), True, 0)]
    return parts + [Part(upper + np.array((0, high * i / bands)), False, LINE) for i in range(1, bands)]


def kite(d: Draw) -> list[Part]:
    x, wide, top, mid, low = d(44, 56), d(20, 30), d(4, 10), d(26, 36), d(58, 68)
    parts = [
        polygon((x, top), (x + wide, mid), (x, low), (x - wide, mid), tone=0),
        polyline((x, top), (x, low)),
        polyline((x - wide, mid), (x + wide, mid)),
    ]
    sway = d(6, 14)
    return [*parts, curve((x, low), (x + sway, low + 10), (x - sway, low + 20), (x + sway * 0.5, 96))]


def balloon(d: Draw) -> list[Part]:
    wide, tall, y = d(20, 28), d(25, 33), d(34, 40)
    sway = d(-8, 8)
    return [
        ellipse(50, y, wide, tall, tone=0),
        polygon((50, y + tall), (46, y + tall + 5), (54, y + tall + 5), tone=0),
        curve((50, y + tall + 5), (50 + sway, y + tall + 14), (50 - sway, y + tall + 22), (50, 97)),
        arc(50, y, wide * 0.7, tall * 0.7, 190, 190 + d(30, 70), 4),
    ]


def candle(d: Draw) -> list[Part]:
    wide, top, base, flame = d(7, 14), d(36, 54), d(82, 88), d(5, 8)
    parts = [rectangle(50 - wide, top, 50 + wide, base, tone=0), polyline((50, top), (50, top - 6))]
    parts.append(
        curve(
            (50, top - 26), (50 + flame, top - 12), (50, top - 5), (50 - flame, top - 12), closed=True, tone=1
        )
    )
    parts.append(ellipse(50, base + 3, wide + d(6, 16), 5, tone=2))
    return parts


def gear(d: Draw) -> list[Part]:
    teeth, outer, root = d.count(6, 11), d(36, 44), d(0.7, 0.84)
    radii = np.tile([outer, outer, outer * root, outer * root], teeth)
    return [radial(50, 50, radii, turn=d(0, 90), tone=0), ellipse(50, 50, outer * d(0.2, 0.45), tone=1)]


def guitar(d: Draw) -> list[Part]:
    upper, waist, lower, neck = d(13, 17), d(8, 12), d(19, 25), d(2.5, 4)
    body = [(50.0, 40.0), (50 + upper, 48), (50 + waist, 60), (50 + lower, 76), (50.0, 95.0)]
    mirrored = [(100 - x, y) for x, y in reversed(body[1:-1])]
    parts = [curve(*body, *mirrored, closed=True, tone=0, steps=3), ellipse(50, 64, d(5, 7), tone=1)]
    parts += [
        rectangle(50 - neck, 12, 50 + neck, 44, tone=2),
        rectangle(50 - neck - 2, 4, 50 + neck + 2, 12, tone=2),
    ]
    return [*parts, polyline((43, 82), (57, 82))]


def television(d: Draw) -> list[Part]:
    wide, top, base, border = d(34, 44), d(28, 38), d(76, 86), d(5, 9)
    parts = [rectangle(50 - wide, top, 50 + wide, base, tone=0)]
    parts.append(
        rectangle(50 - wide + border, top + border, 50 + wide - border - d(0, 14), base - border, tone=1)
    )
    spread = d(8, 22)
    parts += [polyline((50, top), (50 + s * spread, top - d(12, 22))) for s in (-1, 1)]
    return parts + [polyline((50 + s * wide * 0.7, base), (50 + s * wide * 0.8, base + 8)) for s in (-1, 1)]


def camera(d: Draw) -> list[Part]:
    wide, top, base, lens = d(34, 43), d(34, 42), d(72, 82), d(12, 17)
    y = (top + base) / 2
    x = 50 + d(-4, 10)
    parts = [
        rectangle(x - 12, top - d(6, 11), x + 12, top, tone=1),
        rectangle(50 - wide, top, 50 + wide, base, tone=0),
    ]
    return [
        *parts,
        ellipse(x, y, lens, tone=2),
        ellipse(x, y, lens * d(0.4, 0.65), tone=3),
        ellipse(54 - wide + 4, top + 6, 3, tone=3),
    ]


# ---- shapes and signs --------------------------------------------------------------------------------------


def arrow(d: Draw) -> list[Part]:
    shaft, head, barb, angle = d(4, 9), d(20, 34), d(14, 26), d(0, 360)
    half = 42.0
    xy = np.array(
        [
            (-half, -shaft),
            (half - head, -shaft),
            (half - head, -barb),
            (half, 0),
            (half - head, barb),
            (half - head, shaft),
            (-half, shaft),
        ]
    )
    return [Part(rotate(xy, angle) + 50, True, 0)]


def star(d: Draw) -> list[Part]:
    count, inner, outer = d.count(5, 8), d(0.35, 0.6), d(36, 44)
    return [radial(50, 50, np.tile([outer, outer * inner], count), turn=-90 + d(-12, 12), tone=0)]


def heart(d: Draw) -> list[Part]:
    wide, dip, lobe, tip = d(30, 42), d(28, 38), d(14, 22), d(84, 94)
    right = [(50 + wide * 0.55, lobe), (50 + wide, lobe + 16), (50 + wide * 0.6, 60)]
    xy = [(50.0, dip), *right, (50.0, tip), *[(100 - x, y) for x, y in reversed(right)]]
    points = curve(*xy, closed=False, steps=3).points
    return [Part(np.vstack((points, [[50, dip]])), True, 0)]


def moon(d: Draw) -> list[Part]:
    radius, open_angle, thick, turn = d(34, 42), d(50, 80), d(0.25, 0.6), d(-30, 30)
    outer = _circle_points(0, 0, radius, radius, open_angle, 360 - open_angle, 14)
    chord = radius * np.cos(np.radians(open_angle))
    inner = outer[::-1].copy()
    inner[:, 0] = chord + (inner[:, 0] - chord) * (1 - thick)
    return [Part(rotate(np.vstack((outer, inner[1:-1])), turn) + np.array((55, 50)), True, 0, True)]


def sun(d: Draw) -> list[Part]:
    radius, count, gap, length = d(14, 22), d.count(7, 12), d(3, 7), d(10, 18)
    parts = [ellipse(50, 50, radius, tone=0)]
    for i in range(count):
        ray = np.array([[radius + gap, 0], [radius + gap + length, 0]])
        parts.append(Part(rotate(ray, 360 * i / count) + 50, False, LINE))
    return parts


def cloud(d: Draw) -> list[Part]:
    wide, tall, count, drops = d(28, 35), d(13, 19), d.count(5, 8), d.count(0, 5)
    parts = [bumps(50, 40, wide, tall, count, d(0.15, 0.35), tone=0)]
    slant = d(-6, 2)
    for i in range(drops):
        x, y = 50 + (i - (drops - 1) / 2) * 11, 66 + 5 * (i % 2)
        parts.append(polyline((x, y), (x + slant, y + 14)))
    return parts


def lightning(d: Draw) -> list[Part]:
    wide, jog, y = d(14, 22), d(8, 16), d(48, 58)
    return [
        polygon(
            (50 + wide * 0.6, 5),
            (50 - wide, y),
            (50 - 2, y),
            (50 - wide * 0.6, 95),
            (50 + wide, y - jog),
            (50 + 4, y - jog),
            (50 + wide * 1.3, 5),
            tone=0,
        )
    ]


def spiral(d: Draw) -> list[Part]:
    turns, start, sense = d(2.0, 4.2), d(0, 360), 1 if d.chance() else -1
    at = np.linspace(0, turns, int(11 * turns))
    radius = 2 + 40 * (at / turns) ** d(0.8, 1.2)
    angle = np.radians(start) + sense * 2 * np.pi * at
    return [
        Part(np.column_stack((50 + radius * np.cos(angle), 50 + radius * np.sin(angle))), False, LINE, True)
    ]


def zigzag(d: Draw) -> list[Part]:
    count, high, slope = d.count(3, 7), d(16, 36), d(-16, 16)
    x = np.linspace(6, 94, 2 * count + 1)
    y = 50 + np.where(np.arange(len(x)) % 2, -high, high) + slope * (x - 50) / 44
    return [Part(np.column_stack((x, y)), False, LINE)]


def grid(d: Draw) -> list[Part]:
    columns, rows, wide, tall = d.count(2, 4), d.count(2, 4), d(30, 42), d(30, 42)
    parts = [rectangle(50 - wide, 50 - tall, 50 + wide, 50 + tall, tone=0)]
    parts += [
        polyline(
            (50 - wide + 2 * wide * i / columns, 50 - tall), (50 - wide + 2 * wide * i / columns, 50 + tall)
        )
        for i in range(1, columns)
    ]
    return parts + [
        polyline((50 - wide, 50 - tall + 2 * tall * i / rows), (50 + wide, 50 - tall + 2 * tall * i / rows))
        for i in range(1, rows)
    ]


def cube(d: Draw) -> list[Part]:
    side, dx, dy = d(36, 48), d(14, 28), d(12, 26)
    x, y = 50 - (side + dx) / 2, 50 - (side - dy) / 2
    return [
        polygon((x, y), (x + dx, y - dy), (x + side + dx, y - dy), (x + side, y), tone=1),
        polygon(
            (x + side, y),
            (x + side + dx, y - dy),
            (x + side + dx, y + side - dy),
            (x + side, y + side),
            tone=2,
        ),
        rectangle(x, y, x + side, y + side, tone=0),
    ]


# ---- plants and food ---------------------------------------------------------------------------------------


def tree(d: Draw) -> list[Part]:
    wide, tall, y, trunk, count = d(24, 34), d(20, 28), d(32, 40), d(4, 8), d.count(6, 10)
    flare = d(0, 6)
    return [
        polygon(
            (50 - trunk, y + tall * 0.7),
            (50 + trunk, y + tall * 0.7),
            (50 + trunk + flare, 95),
            (50 - trunk - flare, 95),
            tone=1,
        ),
        bumps(50, y, wide, tall, count, d(0.1, 0.3), tone=0),
    ]


def pine(d: Draw) -> list[Part]:
    count, wide, grow, trunk = d.count(2, 4), d(16, 22), d(4, 8), d(3, 6)
    step, parts = 66 / count, [rectangle(50 - trunk, 80, 50 + trunk, 96, tone=1)]
    for i in reversed(range(count)):
        half, top = wide + grow * i, 6 + step * i * 0.95
        parts.append(
            polygon((50, top), (50 + half, top + step * 1.25), (50 - half, top + step * 1.25), tone=0)
        )
    return parts


def palm(d: Draw) -> list[Part]:
    lean, count, reach, droop = d(-14, 14), d.count(4, 6), d(22, 32), d(10, 24)
    x, y = 50 + lean, 28.0
    parts = [
        curve((50 - lean * 0.4, 95), (50 + lean * 0.1, 62), (x, y)),
        curve((55 - lean * 0.4, 95), (54 + lean * 0.1, 62), (x + 3, y)),
    ]
    for i in range(count):
        angle = np.radians(180 + 180 * i / (count - 1))
        tip = (x + reach * np.cos(angle), y + reach * 0.6 * np.sin(angle) + droop)
        mid = (x + reach * 0.55 * np.cos(angle), y + reach * 0.8 * np.sin(angle) - 2)
        parts.append(curve((x, y), mid, tip))
    return parts


def flower(d: Draw) -> list[Part]:
    count, core, petal, y, lean = d.count(5, 8), d(5, 9), d(10, 14), d(30, 36), d(-8, 8)
    x = 50 + lean
    parts = [curve((x, y), (50 + lean * 0.6, 64), (50, 96))]
    for i in range(count):
        angle = 360 * i / count
        centre = rotate(np.array([[core + petal * 0.8, 0]]), angle)[0]
        parts.append(ellipse(x + centre[0], y + centre[1], petal, petal * d(0.45, 0.6), tone=0, turn=angle))
    parts.append(ellipse(x, y, core, tone=1))
    if d.chance(0.7):
        parts.append(curve((50, 80), (62, 68), (72, 70), (64, 80), closed=True, tone=2))
    return parts


def leaf(d: Draw) -> list[Part]:
    wide, belly, veins, turn = d(16, 28), d(0.35, 0.65), d.count(2, 4), d(-40, 40)
    y = -40 + 80 * belly
    right = [(wide * 0.75, (y - 40) / 2), (wide, y), (wide * 0.5, (y + 40) / 2 + 4)]
    outline = curve(
        (0, -42), *right, (0, 38), *[(-a, b) for a, b in reversed(right)], closed=True, steps=3
    ).points
    lines = [outline, np.array([[0, -34], [0, 46]])]
    for i in range(veins):
        v = -18 + 40 * i / veins
        lines += [np.array([[0, v + 8], [s * wide * 0.6, v - 2]]) for s in (-1, 1)]
    return [Part(rotate(p, turn) + 50, i == 0, 0 if i == 0 else LINE) for i, p in enumerate(lines)]


def mushroom(d: Draw) -> list[Part]:
    wide, tall, y, stem, bulge = d(28, 40), d(24, 36), d(48, 56), d(7, 13), d(0, 7)
    parts = [
        polygon((50 - stem, y), (50 + stem, y), (50 + stem + bulge, 92), (50 - stem - bulge, 92), tone=1)
    ]
    parts.append(sector(50, y, wide, tall, 180, 360, tone=0))
    for i in range(d.count(0, 3)):
        parts.append(ellipse(50 + (i - 1) * wide * 0.5, y - tall * (0.35 + 0.2 * (i == 1)), d(3, 5), tone=2))
    return parts


def cactus(d: Draw) -> list[Part]:
    wide, top, reach = d(7, 11), d(8, 18), d(12, 18)
    parts = [
        Part(
            np.vstack(
                ([[50 - wide, 80]], arc(50, top + wide, wide, wide, 180, 360, 6).points, [[50 + wide, 80]])
            ),
            True,
            0,
        )
    ]
    for side in (-1, 1):
        y = d(42, 58)
        parts.append(
            polyline(
                (50 + side * wide, y),
                (50 + side * (wide + reach), y),
                (50 + side * (wide + reach), y - d(14, 22)),
            )
        )
    return [*parts, polygon((34, 80), (66, 80), (62, 95), (38, 95), tone=1)]


def apple(d: Draw) -> list[Part]:
    wide, y, dip, lean = d(27, 35), d(54, 60), d(5, 10), d(-6, 8)
    right = [(50 + wide * 0.6, y - 26), (50 + wide, y - 4), (50 + wide * 0.55, y + 30)]
    body = curve(
        (50, y - 24 + dip),
        *right,
        (50, y + 27),
        *[(100 - a, b) for a, b in reversed(right)],
        closed=True,
        tone=0,
        steps=3,
    )
    parts = [body, polyline((50, y - 22 + dip), (50 + lean, y - 40))]
    if d.chance(0.7):
        parts.append(
            curve((52, y - 34), (62, y - 44), (72, y - 40), (62, y - 33), closed=True, tone=1, steps=2)
        )
    return parts


def pear(d: Draw) -> list[Part]:
    neck, wide, turn = d(8, 13), d(22, 30), d(-14, 14)
    right = [(neck, -26), (neck * 1.3, -8), (wide, 16), (wide * 0.6, 37)]
    outline = curve(
        (0, -34), *right, (0, 40), *[(-a, b) for a, b in reversed(right)], closed=True, steps=3
    ).points
    stem = np.array([[0, -34], [d(-4, 6), -46]])
    return [
        Part(rotate(outline, turn) + np.array((50, 54)), True, 0),
        Part(rotate(stem, turn) + np.array((50, 54)), False, LINE),
    ]


def carrot(d: Draw) -> list[Part]:
    wide, count, rings, turn = d(9, 15), d.count(3, 5), d.count(1, 4), d(-35, 35)
    lines = [np.array([[-wide, -18], [-wide * 0.4, -22], [wide * 0.4, -22], [wide, -18], [0, 46]])]
    for i in range(count):
        spread = (i - (count - 1) / 2) * 7
        lines.append(curve((spread * 0.2, -22), (spread * 0.6, -34), (spread * 1.4, -45)).points)
    for i in range(rings):
        y = -10 + 12 * i
        lines.append(np.array([[-wide * 0.8 * (1 - (y + 18) / 70), y], [wide * 0.1, y + 2]]))
    return [Part(rotate(p, turn) + 50, i == 0, 0 if i == 0 else LINE) for i, p in enumerate(lines)]


def ice_cream(d: Draw) -> list[Part]:
    wide, rim, scoops, cross = d(16, 22), d(46, 54), d.count(1, 2), d.chance(0.6)
    parts = [polygon((50 - wide, rim), (50 + wide, rim), (50 + d(-2, 2), 95), tone=0)]
    for i in range(scoops):
        radius = wide * (1.05 - 0.2 * i)
        parts.insert(0, sector(50, rim - i * wide * 0.9, radius, radius * d(1.0, 1.2), 170, 370, tone=1 + i))
    if cross:
        parts += [
            polyline((50 - wide * 0.5, rim), (50 + wide * 0.45, rim + 22)),
            polyline((50 + wide * 0.5, rim), (50 - wide * 0.45, rim + 22)),
        ]
    return parts


def pizza(d: Draw) -> list[Part]:
    wide, crust, count = d(26, 36), d(6, 10), d.count(2, 4)
    top = arc(50, 26, wide, d(6, 12), 180, 360, 8).points
    low = top[::-1] + np.array((0, crust))
    parts = [
        polygon((50 - wide, 26 + crust), (50 + wide, 26 + crust), (50 + d(-4, 4), 94), tone=0),
        Part(np.vstack((top, low)), True, 1),
    ]
    for i in range(count):
        y = 44 + 34 * i / count
        parts.append(ellipse(50 + (-1) ** i * wide * 0.3 * (1 - (y - 26) / 80), y, d(3.5, 5.5), tone=2))
    return parts


# ---- animals and people ------------------------------------------------------------------------------------


def _eyes(x: float, y: float, gap: float, radius: float) -> list[Part]:
    return [ellipse(x + s * gap, y, radius, tone=3) for s in (-1, 1)]


def face(d: Draw) -> list[Part]:
    wide, tall, gap, eye = d(27, 37), d(33, 42), d(10, 15), d(2, 4.5)
    smile, mouth, y = d(-8, 12), d(10, 18), d(64, 72)
    parts = [ellipse(50, 50, wide, tall, tone=0), *_eyes(50, d(38, 46), gap, eye)]
    parts.append(curve((50 - mouth, y), (50, y + smile), (50 + mouth, y)))
    if d.chance(0.7):
        nose = d(3, 6)
        parts.append(polyline((50, 46), (50 - nose, 57), (50 + 1, 58)))
    for side in (-1, 1) if d.chance(0.4) else ():
        parts.append(arc(50 + side * wide, 50, 5, 8, -80 if side > 0 else 260, 80 if side > 0 else 100, 5))
    return parts


def cat(d: Draw) -> list[Part]:
    wide, tall, ear, spread = d(28, 35), d(24, 30), d(18, 26), d(0.5, 0.85)
    parts = [
        polygon(
            (50 + s * wide * 0.3, 54 - tall * 0.85),
            (50 + s * wide * spread, 54 - tall - ear * 0.8),
            (50 + s * wide * 0.92, 54 - tall * 0.3),
            tone=0,
        )
        for s in (-1, 1)
    ]
    parts += [ellipse(50, 54, wide, tall, tone=0), *_eyes(50, d(46, 51), d(11, 15), d(2, 4))]
    parts.append(polygon((47, 57), (53, 57), (50, 61), tone=2))
    whisker, tilt = d(20, 28), d(-4, 4)
    for side in (-1, 1):
        parts += [
            polyline((50 + side * 9, 61 + 3 * i), (50 + side * (9 + whisker), 59 + 6 * i + tilt))
            for i in range(d.count(2, 2))
        ]
    return parts


def rabbit(d: Draw) -> list[Part]:
    wide, tall, ear, thin, lean = d(22, 28), d(20, 26), d(17, 22), d(5, 7), d(4, 18)
    y = 70.0
    parts = [ellipse(50 + s * 11, y - tall - ear + 3, thin, ear, tone=0, turn=s * lean) for s in (-1, 1)]
    parts += [ellipse(50, y, wide, tall, tone=0), *_eyes(50, y - 5, d(8, 11), d(1.8, 3))]
    return [*parts, polyline((50, y + 3), (50, y + 9)), curve((43, y + 10), (50, y + 8), (57, y + 10))]


def dog(d: Draw) -> list[Part]:
    top, belly, front, tail, leg = d(42, 48), d(60, 66), d(66, 72), d(8, 20), d(82, 92)
    parts = [rectangle(x, belly - 2, x + 5, leg, tone=0) for x in (24, 32, front - 12, front - 5)]
    parts.append(
        Part(
            curve(
                (20, top + 4),
                (45, top),
                (front, top - 2),
                (front + 2, belly),
                (45, belly + 2),
                (20, belly),
                closed=True,
            ).points,
            True,
            0,
        )
    )
    parts.append(curve((20, top + 4), (12, top - tail * 0.4), (8, top - tail)))
    x, y, snout = front + 6, top - 8, d(10, 16)
    parts.append(
        curve(
            (x - 9, y - 6),
            (x, y - 11),
            (x + snout, y - 2),
            (x + snout, y + 6),
            (x - 4, y + 9),
            closed=True,
            tone=0,
        )
    )
    parts.append(curve((x - 8, y - 8), (x - 13, y + d(2, 8)), (x - 5, y + 2), closed=True, tone=1, steps=3))
    return [*parts, ellipse(x + 1, y - 3, 1.6, tone=3)]


def bird(d: Draw) -> list[Part]:
    long, tall, head, beak = d(22, 28), d(13, 18), d(9, 12), d(7, 14)
    x, y = 50 + long * 0.85, 44 - tall * 0.5
    parts = [
        polygon((50 - long * 0.9, 50), (50 - long - d(14, 22), 44), (50 - long - 12, 58), tone=1),
        ellipse(50, 52, long, tall, tone=0),
    ]
    parts += [
        ellipse(x, y, head, tone=0),
        polygon((x + head * 0.9, y - 3), (x + head + beak, y + 1), (x + head * 0.9, y + 4), tone=2),
    ]
    parts += [
        ellipse(x + 2, y - 2, 1.7, tone=3),
        curve((50 - 12, 48), (46, 52 + tall * 0.7), (50 + 12, 50), closed=True, tone=1, steps=3),
    ]
    return parts + [polyline((50 + s, 52 + tall), (50 + s, 84), (55 + s, 86)) for s in (-5, 5)]


def owl(d: Draw) -> list[Part]:
    wide, tall, eye, tuft = d(19, 32), d(30, 42), d(5.5, 10), d(4, 14)
    parts = [
        polygon(
            (50 + s * wide * 0.35, 54 - tall * 0.92),
            (50 + s * wide * 0.8, 54 - tall - tuft * 0.5),
            (50 + s * wide * 0.85, 54 - tall * 0.55),
            tone=1,
        )
        for s in (-1, 1)
    ]
    parts.append(ellipse(50, 54, wide, tall, tone=0))
    for s in (-1, 1):
        parts += [
            ellipse(50 + s * eye * 1.1, 36, eye, tone=2),
            ellipse(50 + s * eye * 1.1, 36, eye * 0.35, tone=3),
        ]
        parts.append(
            arc(50 + s * wide, 60, wide * 0.5, tall * 0.6, 100 if s > 0 else 80, 250 if s > 0 else -70, 6)
        )
    return [*parts, polygon((47, 42), (53, 42), (50, 49), tone=1)]


def duck(d: Draw) -> list[Part]:
    head, neck, low = d(9, 12), d(26, 34), d(70, 78)
    body = curve(
        (58, 50),
        (40, 56),
        (16, d(46, 52)),
        (24, low - 6),
        (50, low),
        (78, low - 4),
        (84, 60),
        closed=True,
        tone=0,
    )
    parts = [
        body,
        ellipse(72, neck, head, tone=0),
        polyline((66, neck + head - 2), (60, 52)),
        polyline((79, neck + head - 2), (83, 58)),
    ]
    parts.append(
        polygon((72 + head, neck - 2), (72 + head + d(8, 14), neck + 3), (72 + head - 1, neck + 6), tone=1)
    )
    return [*parts, ellipse(74, neck - 2, 1.7, tone=3), curve((34, 58), (50, low - 6), (64, 58), steps=3)]


def fish(d: Draw) -> list[Part]:
    long, tall, tail, spread = d(27, 35), d(13, 23), d(14, 22), d(10, 20)
    x = 56.0
    parts = [
        polygon(
            (x - long + 3, 50),
            (x - long - tail, 50 - spread),
            (x - long - tail * d(0.5, 0.8), 50),
            (x - long - tail, 50 + spread),
            tone=1,
        )
    ]
    parts.append(polygon((x - 8, 51 - tall), (x + 2, 50 - tall - d(5, 12)), (x + 12, 53 - tall), tone=1))
    parts += [ellipse(x, 50, long, tall, tone=0), ellipse(x + long * 0.6, 46, d(1.6, 3.2), tone=3)]
    if d.chance(0.6):
        parts.append(arc(x + long * 0.25, 50, 5, tall * 0.75, -80, 80, 5))
    return parts


def whale(d: Draw) -> list[Part]:
    tall, tail, spout = d(18, 24), d(8, 14), d(10, 18)
    y = 58.0
    body = curve(
        (12, 40),
        (30, y - 2),
        (52, y - tall),
        (80, y - tall * 0.6),
        (90, y + 4),
        (74, y + tall * 0.85),
        (44, y + tall * 0.8),
        (20, y + 4),
        closed=True,
        tone=0,
        steps=3,
    )
    parts = [
        polygon((12, 42), (12 - tail * 0.6, 42 - tail), (13, 36), (14 + tail, 38 - tail), (18, 44), tone=0),
        body,
        ellipse(80, y - 2, 1.8, tone=3),
    ]
    parts += [
        curve((66, y - tall - 2), (66 + s * 4, y - tall - spout), (66 + s * 12, y - tall - spout * 0.7))
        for s in (-1, 1)
    ]
    return [*parts, curve((66, y + 10), (78, y + 12), (89, y + 7))]


def snail(d: Draw) -> list[Part]:
    radius, turns, x, neck = d(20, 26), d(1.8, 2.8), d(42, 48), d(20, 32)
    at = np.linspace(0, 1, int(9 * turns))
    angle = np.pi / 2 - 2 * np.pi * turns * at
    y = 80 - radius
    shell = np.column_stack(
        (x + radius * (1 - 0.92 * at) * np.cos(angle), y + radius * (1 - 0.92 * at) * np.sin(angle))
    )
    foot = curve(
        (8, 86), (40, 80), (70, 78), (78, 56), (88, 54), (90, 64), (82, 86), closed=True, tone=1, steps=3
    )
    parts = [foot, ellipse(x, y, radius, tone=0), Part(shell, False, LINE, True)]
    return parts + [polyline((84 + s, 55), (86 + 2.5 * s, 55 - neck)) for s in (-3, 3)]


def butterfly(d: Draw) -> list[Part]:
    upper, lower, wide, low = d(26, 36), d(20, 30), d(30, 40), d(20, 32)
    parts = []
    for s in (-1, 1):
        parts.append(
            curve(
                (50, 46),
                (50 + s * wide * 0.6, 46 - upper),
                (50 + s * wide, 50 - upper * 0.6),
                (50 + s * wide * 0.7, 50),
                closed=True,
                tone=0,
                steps=3,
            )
        )
        parts.append(
            curve(
                (50, 52),
                (50 + s * low, 54),
                (50 + s * low * 0.9, 54 + lower),
                (50 + s * 6, 66),
                closed=True,
                tone=1,
                steps=3,
            )
        )
        parts.append(curve((50, 38), (50 + s * 6, 26), (50 + s * d(10, 16), 20), steps=2))
    return [*parts, ellipse(50, 54, 3, 19, tone=2)]


def spider(d: Draw) -> list[Part]:
    body, head, reach, lift = d(11, 16), d(6, 9), d(24, 34), d(8, 18)
    parts = []
    for s in (-1, 1):
        for i in range(4):
            y = 44 + 5 * i
            end = 24 + 19 * i
            parts.append(
                polyline(
                    (50 + s * 6, y),
                    (50 + s * (8 + reach * 0.6), (y + end) / 2 - lift),
                    (50 + s * (10 + reach), end),
                )
            )
    return [
        *parts,
        ellipse(50, 58, body * 0.85, body, tone=0),
        ellipse(50, 58 - body - head * 0.6, head, tone=1),
    ]


def snake(d: Draw) -> list[Part]:
    waves, high, x = d(1.5, 3.0), d(10, 20), np.linspace(8, 84, 22)
    y = 52 + high * np.sin(2 * np.pi * waves * (x - 8) / 76)
    spine = np.column_stack((x, y))
    thick = d(5, 8)
    parts = [
        Part(np.vstack((spine - np.array((0, thick / 2)), spine[::-1] + np.array((0, thick / 2)))), True, 0)
    ]
    parts.append(ellipse(88, y[-1], d(6, 8), d(4, 5.5), tone=0))
    return [*parts, polyline((95, y[-1]), (99, y[-1] - 3)), ellipse(90, y[-1] - 1.5, 1.2, tone=3)]


def turtle(d: Draw) -> list[Part]:
    wide, tall, y, head = d(26, 33), d(22, 30), d(60, 66), d(6, 9)
    parts = [
        rectangle(50 + s * wide * 0.6 - 5, y, 50 + s * wide * 0.6 + 5, y + d(10, 16), tone=1) for s in (-1, 1)
    ]
    parts += [
        ellipse(50 + wide + head * 0.8, y - d(2, 8), head, head * 0.8, tone=1),
        polygon((50 - wide, y - 3), (44 - wide, y + 3), (50 - wide, y + 3), tone=1),
    ]
    parts.append(sector(50, y, wide, tall, 180, 360, tone=0))
    step = d(7, 10)
    return [
        *parts,
        polygon(
            (50 - step, y - tall * 0.35),
            (50, y - tall * 0.75),
            (50 + step, y - tall * 0.35),
            (50, y - 3),
            tone=2,
        ),
        ellipse(52 + wide + head, y - 6, 1.3, tone=3),
    ]


def person(d: Draw) -> list[Part]:
    head, neck, hip, stride, reach = d(7, 11), d(28, 33), d(56, 62), d(6, 16), d(14, 24)
    parts = [ellipse(50, neck - head, head, tone=0), polyline((50, neck), (50, hip))]
    for s in (-1, 1):
        parts.append(
            polyline(
                (50, neck + 5),
                (50 + s * reach * 0.6, neck + 5 + d(2, 12)),
                (50 + s * reach, neck + d(-8, 22)),
            )
        )
        parts.append(polyline((50, hip), (50 + s * stride * 0.7, (hip + 92) / 2), (50 + s * stride, 94)))
    return parts


def snowman(d: Draw) -> list[Part]:
    base, mid, top, buttons = d(21, 26), d(14, 18), d(9, 12), d.count(0, 3)
    y0 = 95 - base
    y1 = y0 - base - mid + 4
    y2 = y1 - mid - top + 3
    parts = [ellipse(50, y0, base, tone=0), ellipse(50, y1, mid, tone=0), ellipse(50, y2, top, tone=0)]
    parts += [ellipse(50, y1 - 6 + 7 * i, 1.5, tone=3) for i in range(buttons)]
    parts += [
        *_eyes(50, y2 - 2, 3.5, 1.2),
        polygon((50, y2 + 1), (50 + d(8, 14), y2 + 3), (50, y2 + 4), tone=2),
    ]
    return parts + [
        polyline((50 + s * mid * 0.9, y1 - 3), (50 + s * (mid + d(12, 20)), y1 - d(6, 16))) for s in (-1, 1)
    ]


def robot(d: Draw) -> list[Part]:
    head, body, top, waist = d(12, 18), d(17, 24), d(38, 44), d(66, 74)
    parts = [
        rectangle(50 - head, 16, 50 + head, top - 4, tone=0),
        rectangle(50 - body, top, 50 + body, waist, tone=1),
    ]
    parts += [
        *_eyes(50, 26, head * 0.45, d(2, 3.5)),
        polyline((50 - head * 0.5, 34), (50 + head * 0.5, 34)),
        polyline((50, 16), (50, 8)),
    ]
    for s in (-1, 1):
        parts.append(
            polyline(
                (50 + s * body, top + 4),
                (50 + s * (body + 10), top + 6),
                (50 + s * (body + 12), waist - d(4, 20)),
            )
        )
        parts.append(rectangle(50 + s * body * 0.55 - 4, waist, 50 + s * body * 0.55 + 4, 94, tone=0))
    return parts


# ---- glyphs ------------------------------------------------------------------------------------------------

GLYPHS = 24


Cell = tuple[int, int]


def _glyph(name: str) -> Callable[[Draw], list[Part]]:
    """A made-up letter, fixed by its name: strokes between neighbouring places of a 3 x 4 lattice, and rings.

    Strokes after the first begin at a place already visited, so that the letter hangs together.
    """
    rng = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
    visited = [(int(rng.integers(3)), int(rng.integers(4)))]
    drawn: set[frozenset[Cell]] = set()
    strokes = [(bool(rng.random() < 0.5), _walk(visited, drawn, rng)) for _ in range(int(rng.integers(3, 5)))]
    ring = visited[int(rng.integers(len(visited)))] if rng.random() < 0.4 else None

    def glyph(d: Draw) -> list[Part]:
        width, height = d(0.75, 1.1), d(0.8, 1.1)

        def place(cell: Cell) -> tuple[float, float]:
            return (34 * cell[0] - 34) * width + 50 + d(-5, 5), (26 * cell[1] - 39) * height + 50 + d(-5, 5)

        parts = []
        for smooth, cells in strokes:
            xy = [place(cell) for cell in cells]
            parts.append(curve(*xy, steps=4) if smooth else polyline(*xy))
        if ring is not None:
            parts.append(ellipse(*place(ring), d(8, 13), tone=LINE))
        return parts

    return glyph


def _walk(visited: list[Cell], drawn: set[frozenset[Cell]], rng: np.random.Generator) -> list[Cell]:
    """A stroke of one to three new edges from a visited place; adds its places and edges to those given."""
    path: list[Cell] = []
    while len(path) < 2:
        path = [visited[int(rng.integers(len(visited)))]]
        for _ in range(int(rng.integers(1, 4))):
            x, y = path[-1]
            near = [
                (i, j) for i in range(3) for j in range(4) if 0 < max(abs(i - x), abs(j - y)) <= 1 + (j == y)
            ]
            free = [c for c in near if c not in path and frozenset((path[-1], c)) not in drawn]
            if not free:
                break
            path.append(free[int(rng.integers(len(free)))])
    visited += path[1:]
    drawn.update(frozenset(edge) for edge in pairwise(path))
    return path


#: Class name -> its drawing function.
SHAPES: dict[str, Callable[[Draw], list[Part]]] = {
    function.__name__: function
    for function in (
        house, castle, tent, bridge, fence, ladder, stairs, chair, table, lamp, clock,
        car, bus, bicycle, sailboat, airplane, rocket, train,
        cup, bottle, wine_glass, umbrella, key, hammer, scissors, eyeglasses, hat, envelope, book, flag, kite,
        balloon, candle, gear, guitar, television, camera,
        arrow, star, heart, moon, sun, cloud, lightning, spiral, zigzag, grid, cube,
        tree, pine, palm, flower, leaf, mushroom, cactus, apple, pear, carrot, ice_cream, pizza,
        face, cat, rabbit, dog, bird, owl, duck, fish, whale, snail, butterfly, spider, snake, turtle,
        person, snowman, robot,
    )
}  # fmt: skip
SHAPES.update({name: _glyph(name) for name in (f"glyph_{i:02}" for i in range(GLYPHS))})
