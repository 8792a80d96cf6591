"""Pen strokes: the canonical `Sketch`, the formats people keep sketches in, and transforms of them.

A sketch is a polyline with gaps: `points[t]` joins `points[t + 1]` iff `pen_down[t]`, the convention of
`sketchfast.rasterize`. x grows to the right and y down. Nothing here changes its input.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Float32Array = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


class Sketch(NamedTuple):
    """One drawing of T points.

    points: float32 [T, 2], absolute (x, y), x to the right and y down.
    pen_down: bool [T]; pen_down[t] says that the segment from point t to t + 1 is drawn; the last is False.
    """

    points: Float32Array
    pen_down: BoolArray


def make_sketch(points: ArrayLike, pen_down: ArrayLike) -> Sketch:
    """A `Sketch` of points [T, 2] and pen states [T] (bool, or numbers, > 0.5 is down).

    The last pen state is set False. Raises TypeError for what is not numeric,
    ValueError for a wrong shape or non-finite coordinates.
    """
    xy = _numeric(points, "points")
    pens = _numeric(pen_down, "pen_down")
    if xy.size == 0:
        xy = xy.reshape(0, 2)
    if xy.ndim != 2 or xy.shape[1] != 2:
        raise ValueError(f"points must have shape [T, 2], got {list(xy.shape)}")
    if pens.shape != (len(xy),):
        raise ValueError(f"pen_down must have shape [{len(xy)}], as points, got {list(pens.shape)}")
    if not np.isfinite(xy).all():
        raise ValueError("points must be finite, got NaN or infinity")
    down = np.array(pens > 0.5, dtype=bool)
    if len(down):
        down[-1] = False
    return Sketch(np.array(xy, dtype=np.float32), down)


def _numeric(values: ArrayLike, name: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be numeric, got dtype {array.dtype}")
    return array


def _table(values: ArrayLike, columns: int, name: str) -> NDArray[Any]:
    array = _numeric(values, name)
    if array.size == 0 and array.ndim <= 2:
        return np.zeros((0, columns), np.float32)
    if array.ndim != 2 or array.shape[1] != columns:
        raise ValueError(f"{name} must have shape [T, {columns}], got {list(array.shape)}")
    return array


# ---- formats -----------------------------------------------------------------------------------------------


def from_strokes(strokes: Iterable[ArrayLike]) -> Sketch:
    """A sketch of separate strokes, each [n, 2]; empty ones vanish.

    A stroke of one point keeps its point but draws nothing; `mark_dots` makes it visible.
    """
    parts = [_table(s, 2, "strokes") for s in strokes]
    parts = [p for p in parts if len(p)]
    if not parts:
        return Sketch(np.zeros((0, 2), np.float32), np.zeros(0, bool))
    pens = np.ones(sum(map(len, parts)), bool)
    pens[np.cumsum([len(p) for p in parts]) - 1] = False
    return make_sketch(np.concatenate(parts), pens)


def to_strokes(sketch: Sketch) -> list[Float32Array]:
    """The strokes of a sketch, each float32 [n, 2], n >= 1."""
    if not len(sketch.points):
        return []
    return np.split(sketch.points, np.flatnonzero(~sketch.pen_down[:-1]) + 1)


def mark_dots(sketch: Sketch) -> Sketch:
    """Doubles the point of every one-point stroke: a zero-length segment, drawn as a dot."""
    if not len(sketch.points):
        return sketch
    starts = np.concatenate(([True], ~sketch.pen_down[:-1]))
    lone = starts & ~sketch.pen_down
    if not lone.any():
        return sketch
    index = np.repeat(np.arange(len(lone)), 1 + lone)
    pens = sketch.pen_down[index]
    pens[np.flatnonzero(lone) + np.arange(lone.sum())] = True
    return make_sketch(sketch.points[index], pens)


def from_stroke3(rows: ArrayLike) -> Sketch:
    """From stroke-3, [T, 3] of (dx, dy, lift): see `to_stroke3`. The first offset counts from (0, 0)."""
    table = _table(rows, 3, "rows")
    return make_sketch(np.cumsum(table[:, :2], axis=0, dtype=np.float64), table[:, 2] <= 0.5)


def to_stroke3(sketch: Sketch) -> Float32Array:
    """To stroke-3, float32 [T, 3] of (dx, dy, lift), sketch-rnn's convention (Ha & Eck, 2018).

    (dx, dy) leads from the point before to this point; lift = 1 where the pen is lifted after this point (so
    also in the last row). Row 0 leads from (0, 0) to the first point: the absolute position is kept there.
    """
    offsets = np.diff(sketch.points.astype(np.float64), axis=0, prepend=np.zeros((1, 2)))
    return np.column_stack((offsets, ~sketch.pen_down)).astype(np.float32)


def from_stroke5(rows: ArrayLike) -> Sketch:
    """From stroke-5, [N, 5]: see `to_stroke5`. A first row (0, 0, 1, 0, 0) is taken for the start token y_0
    and dropped; the sketch ends before the first row with s3 = 1. Of the pen states the largest counts."""
    table = _table(rows, 5, "rows")
    if len(table) and np.array_equal(table[0], (0, 0, 1, 0, 0)):
        table = table[1:]
    state = table[:, 2:].argmax(axis=1)
    ends = np.flatnonzero(state == 2)
    length = int(ends[0]) if len(ends) else len(table)
    return from_stroke3(np.column_stack((table[:length, :2], state[:length])))


def to_stroke5(sketch: Sketch, max_len: int, *, keep_position: bool = True) -> Float32Array:
    """To stroke-5, float32 [max_len + 1, 5] of (dx, dy, s1, s2, s3) (SketchEmbedNet section 3.1).

    Row 0 is y_0 = (0, 0, 1, 0, 0), the start token: it is no point of the sketch. Row t + 1 is point t: its
    offset from point t - 1, with s1 = 1 if the segment from it to point t + 1 is drawn, s2 = 1 if the pen is
    lifted after it (so also at the last point). Rows after the last point are (0, 0, 0, 0, 1): s3, the end. A
    sketch of exactly max_len points fills all rows and has no end row.

    Row 1, the first point, counts from (0, 0): with `keep_position` (the default) it holds the absolute
    position of the first point and `from_stroke5` is the exact inverse; without, its offset is (0, 0), the
    sketch starts at the origin, and the absolute position is lost.

    Raises ValueError if the sketch has more than max_len points (see `truncate`).
    """
    length = len(sketch.points)
    if max_len < length:
        raise ValueError(f"max_len must be at least the sketch's {length} points, got {max_len}")
    rows = np.zeros((max_len + 1, 5), np.float32)
    rows[0, 2] = 1
    rows[1 : length + 1, :2] = to_stroke3(sketch)[:, :2]
    if length and not keep_position:
        rows[1, :2] = 0
    rows[1 : length + 1, 2] = sketch.pen_down
    rows[1 : length + 1, 3] = ~sketch.pen_down
    rows[length + 1 :, 4] = 1
    return rows


def from_absolute(rows: ArrayLike) -> Sketch:
    """From [T, 3] of absolute (x, y, lift), as in the QMUL V2 coordinate files; lift as in stroke-3."""
    table = _table(rows, 3, "rows")
    return make_sketch(table[:, :2], table[:, 2] <= 0.5)


def to_absolute(sketch: Sketch) -> Float32Array:
    """To float32 [T, 3] of absolute (x, y, lift); lift is 1 in the last row."""
    return np.column_stack((sketch.points, ~sketch.pen_down)).astype(np.float32)


def from_quickdraw(drawing: Sequence[Sequence[Sequence[float]]]) -> Sketch:
    """From QuickDraw's lists: a stroke is [xs, ys] or, raw, [xs, ys, ts]; the times are not kept."""
    strokes = []
    for index, stroke in enumerate(drawing):
        if len(stroke) not in (2, 3) or len({len(values) for values in stroke}) != 1:
            raise ValueError(f"drawing[{index}] must be 2 or 3 lists of one length")
        strokes.append(np.column_stack((_numeric(stroke[0], "drawing"), _numeric(stroke[1], "drawing"))))
    return from_strokes(strokes)


def to_quickdraw(sketch: Sketch) -> list[list[list[float]]]:
    """To QuickDraw's lists: a stroke is [xs, ys] of Python floats."""
    return [[s[:, 0].tolist(), s[:, 1].tolist()] for s in to_strokes(sketch)]


def from_svg(svg: str | bytes, *, spacing: float = 4.0) -> Sketch:
    """The paths of an SVG document, nested transforms applied, sampled to points.

    svg: the document's text (not its file name). spacing: greatest distance between samples on a curve, in
    the document's user units; straight segments keep their two ends only. Every subpath is a stroke, in
    document order, and coincident joints are kept once. Fill, colour and viewBox are ignored.

    Raises ValueError for what is no SVG or bears a broken path.
    """
    from svgpathtools import Document  # not needed to import sketchfast

    if spacing <= 0:
        raise ValueError(f"spacing must be > 0, got {spacing}")
    try:
        document = Document(io.BytesIO(svg.encode() if isinstance(svg, str) else svg))
        subpaths = [subpath for path in document.paths() for subpath in path.continuous_subpaths()]
        strokes = [_sample_path(subpath, spacing) for subpath in subpaths]
    except (SyntaxError, ValueError, IndexError, KeyError, AttributeError, AssertionError) as error:
        raise ValueError(f"svg must be an SVG document with readable paths: {error}") from error
    return from_strokes(strokes)


def svg_size(svg: str | bytes) -> tuple[float, float] | None:
    """Width and height of an SVG document in its user units: the viewBox's, else its own; None without any.

    Reads the outermost element only, so what follows may be broken. Also None where the viewBox does not
    start at (0, 0): coordinates and size then do not go together.
    """
    from xml.etree import ElementTree

    data = io.BytesIO(svg.encode() if isinstance(svg, str) else svg)
    try:
        _, root = next(iter(ElementTree.iterparse(data, events=("start",))))
        if (box := root.get("viewBox")) is not None:
            left, top, width, height = (float(word) for word in box.replace(",", " ").split())
        else:
            width, height = (float(root.get(name, "").removesuffix("px")) for name in ("width", "height"))
            left = top = 0.0
    except (SyntaxError, StopIteration, ValueError):
        return None
    usable = left == top == 0 and 0 < width < np.inf and 0 < height < np.inf
    return (width, height) if usable else None


def _sample_path(path: Any, spacing: float) -> NDArray[np.float64]:
    """The points [n, 2] along one continuous svgpathtools path."""
    from svgpathtools import Arc, Line

    pieces: list[NDArray[np.complex128]] = [np.array([path[0].start])]
    for segment in path:
        if isinstance(segment, Line):
            pieces.append(np.array([segment.end]))
            continue
        length = segment.length(error=1e-3) if isinstance(segment, Arc) else _control_length(segment)
        count = max(1, int(np.ceil(length / spacing)))
        at = np.arange(1, count + 1) / count
        pieces.append(
            np.array([segment.point(t) for t in at]) if isinstance(segment, Arc) else segment.poly()(at)
        )
        pieces[-1][-1] = segment.end  # the joint exactly, not to within rounding
    points = np.concatenate(pieces)
    keep = np.concatenate(([True], points[1:] != points[:-1]))
    if len(points) > 1 and not keep[1:].any():
        keep[-1] = True  # a path without extent is a dot: two coincident points
    return np.column_stack((points.real, points.imag))[keep]


def _control_length(segment: Any) -> float:
    """Length of a Bezier segment's control polygon, an upper bound of its own."""
    return float(np.abs(np.diff(np.array(segment.bpoints()))).sum())


def to_svg(
    sketch: Sketch,
    *,
    size: tuple[int, int] | None = None,
    stroke_width: float = 1.0,
    title: str | None = None,
) -> str:
    """The sketch as an SVG document, one path a stroke; coordinates are written to full float32 precision.

    size: (H, W) of the canvas in pixels, by default the bounding box with a margin. A one-point stroke is
    written as a dot, and so is read back as two coincident points.
    """
    if size is None:
        x0, y0, x1, y1 = bounding_box(sketch) if len(sketch.points) else (0.0, 0.0, 1.0, 1.0)
        margin = stroke_width + 0.05 * max(x1 - x0, y1 - y0)
        box = (x0 - margin, y0 - margin, x1 - x0 + 2 * margin, y1 - y0 + 2 * margin)
    else:
        height, width = size
        box = (-0.5, -0.5, width, height)  # the centre of the first pixel is (0, 0)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{" ".join(f"{v:.9g}" for v in box)}">',
        f'<g fill="none" stroke="black" stroke-linecap="round" stroke-linejoin="round" '
        f'stroke-width="{stroke_width:g}">',
    ]
    if title is not None:
        lines.insert(1, f"<title>{escape(title)}</title>")
    for stroke in to_strokes(sketch):
        points = np.repeat(stroke, 2, axis=0) if len(stroke) == 1 else stroke
        lines.append(f'<path d="M{" L".join(f"{x:.9g},{y:.9g}" for x, y in points.tolist())}"/>')
    return "\n".join([*lines, "</g>", "</svg>", ""])


# ---- transforms --------------------------------------------------------------------------------------------


def bounding_box(sketch: Sketch) -> tuple[float, float, float, float]:
    """(x_min, y_min, x_max, y_max) of all points; ValueError for a sketch without any."""
    if not len(sketch.points):
        raise ValueError("sketch must have at least one point to have a bounding box")
    low, high = sketch.points.min(axis=0), sketch.points.max(axis=0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def fit(sketch: Sketch, size: int | tuple[int, int], padding: float = 2.0) -> Sketch:
    """Scales and centres the sketch in a canvas of `size` (H, W) or int, in pixels, aspect ratio kept.

    The box of the points is centred on ((W - 1) / 2, (H - 1) / 2), the canvas's middle where pixel centres
    lie on integers, and grown until one direction spans [padding, W - 1 - padding] or [padding, H - 1 -
    padding]. A sketch without extent is only centred; one without points is returned as it is.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size must be at least 1 x 1, got {(height, width)}")
    room = np.array([width - 1 - 2 * padding, height - 1 - 2 * padding])
    if padding < 0 or (room < 0).any():
        most = (min(height, width) - 1) / 2
        raise ValueError(f"padding must be in [0, {most}] for size {size}, got {padding}")
    if not len(sketch.points):
        return sketch
    points = sketch.points.astype(np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    with np.errstate(divide="ignore", over="ignore"):
        scale = float(np.min(np.where(high > low, room / (high - low), np.inf)))
    if not np.isfinite(scale):
        scale = 1.0
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    return Sketch(((points - (low + high) / 2) * scale + centre).astype(np.float32), sketch.pen_down)


def simplify(sketch: Sketch, epsilon: float) -> Sketch:
    """Ramer-Douglas-Peucker on every stroke: points left out lie within `epsilon` of the simplified line.

    epsilon: in the sketch's units, >= 0 (0 removes only points that lie on the line). Distances are to the
    segment, not the infinite line, so a stroke that runs back on itself keeps its turn. Strokes keep both
    ends.
    """
    if epsilon < 0:
        raise ValueError(f"epsilon must be >= 0, got {epsilon}")
    points = sketch.points.astype(np.float64)
    keep = np.zeros(len(points), bool)
    stack = []
    last = 0
    for end in np.flatnonzero(~sketch.pen_down).tolist():
        keep[last] = keep[end] = True
        stack.append((last, end))
        last = end + 1
    while stack:  # an explicit stack: strokes of any length
        first, end = stack.pop()
        if end - first < 2:
            continue
        inner = points[first + 1 : end] - points[first]
        chord = points[end] - points[first]
        square = float(chord @ chord)
        along = np.clip(inner @ chord / square, 0, 1) if square > 0 else np.zeros(len(inner))
        gap = inner - along[:, None] * chord
        distance = np.einsum("ij,ij->i", gap, gap)
        worst = int(distance.argmax())
        if distance[worst] > epsilon * epsilon:
            split = first + 1 + worst
            keep[split] = True
            stack += [(first, split), (split, end)]
    return Sketch(sketch.points[keep], sketch.pen_down[keep])


def resample_spacing(sketch: Sketch, spacing: float) -> Sketch:
    """Points at equal arc length along every stroke, at most `spacing` apart (> 0); both ends are kept."""
    if spacing <= 0:
        raise ValueError(f"spacing must be > 0, got {spacing}")
    strokes = to_strokes(sketch)
    counts = [
        1 if len(s) == 1 else max(1, int(np.ceil(_arc_length(s)[-1] / spacing - 1e-9))) + 1 for s in strokes
    ]
    return from_strokes([_resample_stroke(s, n) for s, n in zip(strokes, counts, strict=True)])


def resample_count(sketch: Sketch, count: int) -> Sketch:
    """Exactly `count` points, shared among the strokes by arc length, at equal arc length within each.

    Every stroke keeps both its ends, so `count` must be at least two a stroke (one for a one-point stroke)
    and, where all strokes are single points, exactly their number; else ValueError.
    """
    strokes = to_strokes(sketch)
    least = np.array([min(len(s), 2) for s in strokes], dtype=np.int64)
    grows = least == 2
    if count < least.sum() or (count > least.sum() and not grows.any()):
        raise ValueError(f"count must be at least {least.sum()} for this sketch's strokes, got {count}")
    lengths = np.array([_arc_length(s)[-1] for s in strokes]) * grows
    share = lengths if lengths.sum() > 0 else grows.astype(float)
    exact = (count - least.sum()) * share / max(share.sum(), 1e-300)
    extra = np.floor(exact).astype(np.int64)
    rest = int(count - least.sum() - extra.sum())
    extra[np.argsort(-(exact - extra) - grows, kind="stable")[:rest]] += 1
    return from_strokes([_resample_stroke(s, int(n)) for s, n in zip(strokes, least + extra, strict=True)])


def _arc_length(stroke: NDArray[Any]) -> NDArray[np.float64]:
    """Distance along the stroke at each of its points [n], from 0."""
    steps = np.diff(stroke.astype(np.float64), axis=0)
    return np.concatenate(([0.0], np.cumsum(np.hypot(steps[:, 0], steps[:, 1]))))


def _resample_stroke(stroke: Float32Array, count: int) -> NDArray[np.float64]:
    if len(stroke) == 1:
        return stroke.astype(np.float64)
    along = _arc_length(stroke)
    at = np.linspace(0.0, along[-1], count)
    result = np.column_stack((np.interp(at, along, stroke[:, 0]), np.interp(at, along, stroke[:, 1])))
    result[0], result[-1] = stroke[0], stroke[-1]
    return result


def truncate(sketch: Sketch, max_len: int) -> Sketch:
    """The first `max_len` points (>= 0)."""
    if max_len < 0:
        raise ValueError(f"max_len must be >= 0, got {max_len}")
    if len(sketch.points) <= max_len:
        return sketch
    return make_sketch(sketch.points[:max_len], sketch.pen_down[:max_len])


def augment(
    sketch: Sketch,
    rng: np.random.Generator,
    *,
    scale: float = 0.1,
    rotate: float = 0.0,
    shear: float = 0.0,
    translate: float = 0.0,
    stroke_dropout: float = 0.0,
    point_dropout: float = 0.0,
) -> Sketch:
    """A random affine map about the centre of the box, and random loss of strokes and points.

    scale: each axis is multiplied by 1 + U(-scale, scale), in [0, 1). rotate: angle U(-rotate, rotate) in
    degrees. shear: x += U(-shear, shear) * y. translate: each axis moves by U(-translate, translate), in the
    sketch's units. stroke_dropout: the chance that a stroke is left out (one always stays). point_dropout:
    the chance that a point inside a stroke is left out (its ends stay), both in [0, 1).
    """
    fractions = {"scale": scale, "stroke_dropout": stroke_dropout, "point_dropout": point_dropout}
    for name, value in fractions.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
    if not len(sketch.points):
        return sketch
    sketch = _drop(sketch, rng, stroke_dropout, point_dropout)
    factors = 1 + rng.uniform(-scale, scale, 2)
    angle = np.deg2rad(rng.uniform(-rotate, rotate))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1.0, rng.uniform(-shear, shear)], [0.0, 1.0]]) @ np.diag(factors)
    points = sketch.points.astype(np.float64)
    centre = (points.min(axis=0) + points.max(axis=0)) / 2
    moved = (points - centre) @ matrix.T + centre + rng.uniform(-translate, translate, 2)
    return Sketch(moved.astype(np.float32), sketch.pen_down)


def _drop(sketch: Sketch, rng: np.random.Generator, strokes: float, points: float) -> Sketch:
    """Leaves out strokes and inner points at random; without either nothing is drawn from rng."""
    if strokes > 0:
        stroke_of = np.concatenate(([0], np.cumsum(~sketch.pen_down[:-1])))
        count = int(stroke_of[-1]) + 1
        kept = rng.random(count) >= strokes
        if not kept.any():
            kept[rng.integers(count)] = True
        sketch = Sketch(sketch.points[kept[stroke_of]], sketch.pen_down[kept[stroke_of]])
    if points > 0:
        ends = ~sketch.pen_down | np.concatenate(([True], ~sketch.pen_down[:-1]))
        keep = ends | (rng.random(len(ends)) >= points)
        sketch = Sketch(sketch.points[keep], sketch.pen_down[keep])
    return sketch


def collate(sketches: Sequence[Sketch], max_len: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A batch: points float32 [B, T, 2], pen_down bool [B, T], lengths int64 [B].

    Past a sketch's end stand zeros and False. T is `max_len`, by default the longest sketch's length.
    ValueError if a sketch is longer (see `truncate`).
    """
    lengths = np.array([len(s.points) for s in sketches], dtype=np.int64)
    longest = int(lengths.max(initial=0))
    if max_len is not None and longest > max_len:
        raise ValueError(f"max_len must be at least the longest sketch's {longest} points, got {max_len}")
    steps = longest if max_len is None else max_len
    points = np.zeros((len(lengths), steps, 2), np.float32)
    pens = np.zeros((len(lengths), steps), bool)
    filled = np.arange(steps) < lengths[:, None]
    if lengths.sum():
        points[filled] = np.concatenate([s.points for s in sketches])
        pens[filled] = np.concatenate([s.pen_down for s in sketches])
    return torch.from_numpy(points), torch.from_numpy(pens), torch.from_numpy(lengths)
