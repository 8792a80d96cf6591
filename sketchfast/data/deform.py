"""Unfinished and deformed drawings: what fine-grained retrieval is tested with besides the drawing itself.

`cut_to_share` is a drawing as it stood when a share of it was made (early retrieval), `deform` one drawn by a
less steady hand (robustness). Photo topology (Li, Pang, Song 2023), sections 3 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..ops._contract import check_number
from .strokes import Float32Array, Sketch, _arc_length, augment, from_strokes, make_sketch, to_strokes

#: Distinct line widths that `deform` draws: a renderer draws all strokes of one width in one call.
WIDTH_LEVELS = 5
LEVELS = ("stroke", "sketch")


def cut_to_share(sketch: Sketch, share: float) -> Sketch:
    """The first `share` of a drawing, measured in drawn length: the sum of its pen-down segments.

    Strokes come in the order they were drawn; the last point is interpolated so that the length is the share
    of the whole. Moves with the pen up cost nothing, and neither do dots (segments without length): those
    before the cut stay, those after it go. Share 1 is the sketch as it is, share 0 one without points. Of a
    sketch that has no drawn length at all, any share above 0 is the whole.

    share: in [0, 1], else ValueError.
    """
    share = _check_in("share", share, 0, 1)
    if share == 0:
        return Sketch(np.zeros((0, 2), np.float32), np.zeros(0, bool))
    drawn = _drawn_length(sketch)
    if share == 1 or not len(drawn) or drawn[-1] == 0:
        return sketch
    wanted = share * drawn[-1]
    segment = int(np.searchsorted(drawn, wanted))  # the first at whose end the length is reached
    start, end = sketch.points[segment : segment + 2].astype(np.float64)
    before = drawn[segment - 1] if segment else 0.0
    # a share too small for float64 leaves no length to reach: the pen is set down, no more
    along = (wanted - before) / (drawn[segment] - before) if drawn[segment] > before else 0.0
    points = np.vstack((sketch.points[: segment + 1], start + along * (end - start)))
    return make_sketch(points, np.append(sketch.pen_down[:segment], (True, False)))


def drawn_length(sketch: Sketch) -> float:
    """The sum of the lengths of the pen-down segments, in the sketch's units."""
    drawn = _drawn_length(sketch)
    return float(drawn[-1]) if len(drawn) else 0.0


def _drawn_length(sketch: Sketch) -> NDArray[np.float64]:
    """Drawn length at the end of each segment, float64 [T - 1]."""
    steps = np.diff(sketch.points.astype(np.float64), axis=0)
    return np.cumsum(np.hypot(steps[:, 0], steps[:, 1]) * sketch.pen_down[:-1])


@dataclass(frozen=True)
class Deformation:
    """How far drawings are deformed at most; every default can be set to its zero to leave that kind out.

    The paper applies global (rotate, scale, translate) and local (width, clipping) deformations "to each
    stroke" and names no strengths. These are ours, of the order of those in the public repository of Zhong et
    al. (3DV 2020), whose tool the paper uses: 2.5 degrees, 0.9 to 1.1, a pen of 2.5 +- 1.5. That tool moves
    every stroke about its own centre, and so does `level="stroke"`.

    Raises TypeError or ValueError that names the field.
    """

    rotate: float = 5.0
    """greatest angle in degrees, either way; 0 is none"""
    scale: float = 0.1
    """each axis is multiplied by 1 + U(-scale, scale), in [0, 1); 0 is none"""
    translate: float = 0.02
    """each axis moves by U(-translate, translate) times the side of the canvas; 0 is none"""
    width: float = 1.6
    """a stroke's line is up to this factor wider or thinner, at least 1; 1 is none"""
    clip: float = 0.1
    """each end of a stroke loses U(0, clip) of the stroke's length, in [0, 0.5); 0 is none"""
    level: str = "stroke"
    """what rotates, scales and moves as one, about the centre of its box: "stroke" or "sketch" """

    def __post_init__(self) -> None:
        _check_in("rotate", self.rotate, 0, 360)
        _check_in("scale", self.scale, 0, 1, below=True)
        check_number("translate", self.translate, at_least=0)
        check_number("width", self.width, at_least=1)
        _check_in("clip", self.clip, 0, 0.5, below=True)
        if self.level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(map(repr, LEVELS))}, got {self.level!r}")

    @property
    def moves(self) -> bool:
        """Whether it rotates, scales or translates."""
        return bool(self.rotate or self.scale or self.translate)


class Deformed(NamedTuple):
    """A drawing and the widths of its strokes."""

    sketch: Sketch
    widths: NDArray[np.float64]
    """[S], one a stroke of `to_strokes(sketch)`: factors of the line's usual width"""


def deform(sketch: Sketch, deformation: Deformation, rng: np.random.Generator, canvas: float) -> Deformed:
    """The sketch with its stroke ends clipped, then moved, and a line width for each stroke.

    Strokes keep their number and order; strokes without length are clipped of nothing. A width is one of
    WIDTH_LEVELS factors, equally spaced in their logarithm from 1/width to width. With every strength at its
    zero the points come back to the bit. What leaves the canvas is lost when it is drawn.

    How many numbers are drawn from `rng` depends on the number of strokes and on `level`, the numbers for
    clipping and widths come first, and each kind has its own: a kind's strength does not change what
    the others do.

    Args:
        canvas: side of the canvas in the sketch's units, > 0.

    Raises TypeError or ValueError that names the argument.
    """
    if not isinstance(deformation, Deformation):
        raise TypeError(f"deformation must be a Deformation, got {deformation!r}")
    canvas = check_number("canvas", canvas, above=0)
    strokes = to_strokes(sketch)
    chances = rng.random((len(strokes), 3))
    levels = deformation.width ** np.linspace(-1, 1, WIDTH_LEVELS)
    widths = levels[(chances[:, 0] * WIDTH_LEVELS).astype(np.int64)]
    if deformation.clip:
        cuts = deformation.clip * chances[:, 1:]
        clipped = [_clipped(stroke, *cut) for stroke, cut in zip(strokes, cuts.tolist(), strict=True)]
        sketch = from_strokes(clipped)
    if deformation.moves and deformation.level == "stroke":
        moved = [_moved(from_strokes([stroke]), deformation, rng, canvas) for stroke in to_strokes(sketch)]
        sketch = from_strokes([stroke.points for stroke in moved])
    elif deformation.moves:
        sketch = _moved(sketch, deformation, rng, canvas)
    return Deformed(sketch, widths)


def _moved(sketch: Sketch, deformation: Deformation, rng: np.random.Generator, canvas: float) -> Sketch:
    """Rotated, scaled and translated at random, about the centre of its box."""
    return augment(
        sketch,
        rng,
        scale=deformation.scale,
        rotate=deformation.rotate,
        translate=deformation.translate * canvas,
    )


def _clipped(stroke: Float32Array, first: float, last: float) -> NDArray[np.float64]:
    """The stroke [n, 2] without the first and the last share of its length."""
    points = stroke.astype(np.float64)
    along = _arc_length(stroke)
    length = along[-1]
    if length == 0:
        return points
    ends = np.array([first * length, (1 - last) * length])
    inner = points[(along > ends[0]) & (along < ends[1])]
    start, end = (np.array([np.interp(at, along, points[:, axis]) for axis in (0, 1)]) for at in ends)
    return np.vstack((start, inner, end))


def _check_in(name: str, value: float, low: float, high: float, *, below: bool = False) -> float:
    number = check_number(name, value)
    if not low <= number <= high or (below and number == high):
        raise ValueError(f"{name} must be in [{low:g}, {high:g}{')' if below else ']'}, got {value!r}")
    return number
