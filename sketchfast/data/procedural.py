"""Drawings made by rule: the data set that needs no download.

classes x instances x drawing styles. An instance is one particular thing (this house, with its proportions);
a drawing style is a hand (shaky, sloppy, in a hurry) that draws every instance in its own manner.
`procedural` gives the strokes, `photo` a rendered colour picture of the same instance, `rasterize_sketches`
(in `render`) images of the strokes, and `procedural_sketch_photo` pairs of both. Every number is drawn from
(seed, class, instance, style) alone, so a drawing is the same whichever others are made with it.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from ..ops._contract import check_integer
from .dataset import StrokeDataset, class_index, track
from .images import DEFAULT_SIZE, ImageSet, SketchPhotoSet, join_domains
from .procedural_shapes import LINE, SHAPES, Draw, Part, Points
from .render import rasterize_sketches
from .strokes import Sketch, fit

#: The class names, in a fixed order.
CLASSES: tuple[str, ...] = tuple(SHAPES)
CANVAS = 256
_SCALE = CANVAS / 100
_QUANTUM = 64  # coordinates are multiples of 1/64, so that last-bit differences between machines vanish
_NUMBERS = 96  # uniform numbers an instance may use before they repeat
_STREAM_INSTANCE, _STREAM_STYLE, _STREAM_DRAWING, _STREAM_PHOTO = range(4)


def _rng(seed: int, stream: int, class_name: str, instance: int = 0, style: int = 0) -> np.random.Generator:
    """A generator of its own for each (seed, stream, class, instance, style)."""
    key = np.array([seed, stream << 32 | zlib.crc32(class_name.encode())], np.uint64)
    return np.random.Generator(
        np.random.Philox(key=key, counter=np.array([0, instance, style, 0], np.uint64))
    )


@dataclass(frozen=True)
class DrawingStyle:
    """How a hand draws. Lengths are in units of 1/100 of the canvas.

    jitter: standard deviation of each point. wobble: amplitude of a smooth warp of the page. tilt: degrees.
    slant: shear. stretch: ratio of the axes. overshoot: by how much a closed line runs past its start
    (negative: stays short). spacing: points on straight lines lie at most this far apart. thin: share of a
    curve's points left out. reverse, shuffle: chances that a stroke is drawn backwards, changes place with
    the next. missing: the chance that a small part is left out.
    """

    jitter: float = 0.0
    wobble: float = 0.0
    tilt: float = 0.0
    slant: float = 0.0
    stretch: float = 1.0
    overshoot: float = 0.0
    spacing: float = 1000.0
    thin: float = 0.0
    reverse: float = 0.0
    shuffle: float = 0.0
    missing: float = 0.0


def drawing_style(style: int, seed: int = 0) -> DrawingStyle:
    """The drawing style numbered `style`; number 0 is the exact one, which draws the object as it is."""
    style, seed = check_integer("style", style, 0), _check_seed(seed)
    if style == 0:
        return DrawingStyle()
    u = _rng(seed, _STREAM_STYLE, "", 0, style).random(11).tolist()
    return DrawingStyle(
        jitter=0.2 + 1.3 * u[0] ** 2,
        wobble=3.0 * u[1],
        tilt=20 * (u[2] - 0.5),
        slant=0.4 * (u[3] - 0.5),
        stretch=0.8 + 0.45 * u[4],
        overshoot=10 * (u[5] - 0.4),
        spacing=14 + 30 * u[6] if u[6] < 0.5 else 1000.0,
        thin=0.5 * u[7],
        reverse=0.6 * u[8] ** 2,
        shuffle=0.6 * u[9],
        missing=0.25 * u[10] ** 2,
    )


def _parts(class_name: str, instance: int, seed: int) -> list[Part]:
    return SHAPES[class_name](Draw(_rng(seed, _STREAM_INSTANCE, class_name, instance).random(_NUMBERS)))


def draw_instance(class_name: str, instance: int, style: int = 0, seed: int = 0) -> Sketch:
    """One drawing: instance `instance` of a class in drawing style `style`; coordinates in 0..256, y down."""
    _check_class(class_name)
    instance, style, seed = (
        check_integer("instance", instance, 0),
        check_integer("style", style, 0),
        _check_seed(seed),
    )
    return _draw(class_name, instance, style, drawing_style(style, seed), seed)


def _draw(class_name: str, instance: int, style: int, hand: DrawingStyle, seed: int) -> Sketch:
    parts = _parts(class_name, instance, seed)
    if style == 0:
        lines = [_closed_line(part, 0.0) for part in parts]
        points, pens = _join(lines)
        return Sketch(_to_canvas(points), pens)
    return draw_parts(parts, hand, _rng(seed, _STREAM_DRAWING, class_name, instance, style))


def draw_parts(parts: Sequence[Part], hand: DrawingStyle, rng: np.random.Generator) -> Sketch:
    """The parts of one object as a hand draws them; from 0..100, as parts are, to coordinates in 0..256."""
    order = _stroke_order(parts, hand, rng)
    chances = rng.random((len(parts), 3))
    lines = []
    for i in order:
        past, backwards, phase = chances[i].tolist()
        line = _closed_line(parts[i], hand.overshoot * past, phase)
        line = _respace(line, parts[i].smooth, hand)
        lines.append(line[::-1] if backwards < hand.reverse else line)
    points, pens = _join(lines)
    return Sketch(_to_canvas(_warp(points, hand, rng)), pens)


def _stroke_order(parts: Sequence[Part], hand: DrawingStyle, rng: np.random.Generator) -> list[int]:
    """The parts to draw, in order; only small ones may be missing, or the object would be another."""
    count = len(parts)
    chances = rng.random((2, count)).tolist()
    order = [i for i in range(count) if chances[0][i] >= hand.missing or not _is_small(parts[i])] or [0]
    for place in range(len(order) - 1):
        if chances[1][place] < hand.shuffle:
            order[place], order[place + 1] = order[place + 1], order[place]
    return order


def _is_small(part: Part) -> bool:
    return bool(np.ptp(part.points, axis=0).max() < 20)


def _closed_line(part: Part, overshoot: float, phase: float = 0.0) -> Points:
    """The part's line; a closed one starts at a point by `phase` and runs `overshoot` past its start."""
    if not part.closed:
        return part.points
    points = part.points
    if phase > 0.7:  # most people begin where the shape begins
        points = np.roll(points, -int((phase - 0.7) / 0.3 * len(points)), axis=0)
    first = points[0]
    direction = (points[1] - first) if overshoot >= 0 else (points[-1] - first)
    length = float(np.hypot(direction[0], direction[1]))
    step = min(abs(overshoot), 0.4 * length) / length if length > 0 else 0.0
    return np.concatenate((points, (first + step * direction)[None]))


def _respace(line: Points, smooth: bool, hand: DrawingStyle) -> Points:
    """Leaves out points of curves, or puts points on long straight lines, as the hand does."""
    count = len(line)
    if smooth and count > 8 and hand.thin > 0:
        keep = max(6, round(count * (1 - hand.thin)))
        line = line[np.rint(np.linspace(0, count - 1, keep)).astype(np.int64)]
    steps = line[1:] - line[:-1]
    lengths = np.hypot(steps[:, 0], steps[:, 1])
    if lengths.max() <= hand.spacing:
        return line
    pieces = np.ceil(lengths / hand.spacing).astype(np.int64).clip(1)
    start = np.repeat(np.arange(len(steps)), pieces)
    within = np.arange(len(start)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return np.concatenate((line[start] + steps[start] * (within / pieces[start])[:, None], line[-1:]))


def _warp(points: Points, hand: DrawingStyle, rng: np.random.Generator) -> Points:
    """Jitter, a smooth warp and an affine map of the whole page about its middle."""
    phases = rng.random(4) * 2 * np.pi
    centred = points - 50
    bend = (
        hand.wobble
        * np.sin(centred[:, ::-1] * (0.05, 0.06) + phases[:2])
        * np.cos(centred * 0.04 + phases[2:])
    )
    jittered = centred + bend + hand.jitter * rng.standard_normal(points.shape)
    angle = np.radians(hand.tilt)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    root = np.sqrt(hand.stretch)
    return jittered @ (turn @ np.array([[root, hand.slant], [0, 1 / root]])).T * 0.9 + 50


def _join(lines: Sequence[Points]) -> tuple[Points, NDArray[np.bool_]]:
    points = np.concatenate(lines)
    pens = np.ones(len(points), bool)
    pens[np.cumsum([len(line) for line in lines]) - 1] = False
    return points, pens


def _to_canvas(points: Points) -> NDArray[np.float32]:
    return (np.rint(points * (_SCALE * _QUANTUM)) / _QUANTUM).astype(np.float32)


def procedural(
    classes: int | Sequence[str] | None = None,
    instances: int | Sequence[int] = 20,
    styles: int | Sequence[int] = 5,
    seed: int = 0,
) -> StrokeDataset:
    """Drawings of every instance of every class in every style, in that order.

    classes: names out of CLASSES, or how many of them from the front; None for all. instances, styles: how
    many, counted from 0, or their numbers (so that a held-out set can be drawn apart: the numbers given say
    all). Style 0 is exact, see `drawing_style`. `extra`: instance and style, int64 [N]. Coordinates lie
    around 0..256, y down.

    To hold out classes use `class_split(CLASSES, train=...)`. Raises ValueError for unknown classes or
    negative numbers.
    """
    names = _class_names(classes)
    instance_ids = _numbers("instances", instances)
    style_ids = _numbers("styles", styles)
    seed = _check_seed(seed)
    hands = [drawing_style(style, seed) for style in style_ids]
    sketches = [
        _draw(name, instance, style, hand, seed)
        for name in names
        for instance in instance_ids
        for style, hand in zip(style_ids, hands, strict=True)
    ]
    each = len(instance_ids) * len(style_ids)
    return StrokeDataset.from_sketches(
        sketches,
        np.repeat(np.arange(len(names)), each),
        names,
        info={"dataset": "procedural", "seed": seed},
        extra={
            "instance": np.tile(np.repeat(np.array(instance_ids, np.int64), len(style_ids)), len(names)),
            "style": np.tile(np.array(style_ids, np.int64), len(names) * len(instance_ids)),
        },
    )


def _class_names(classes: int | Sequence[str] | None) -> list[str]:
    if classes is None:
        return list(CLASSES)
    if isinstance(classes, str):
        raise TypeError(f"classes must be a number or a sequence of names, got the str {classes!r}")
    if not isinstance(classes, Iterable):
        return list(CLASSES[: check_integer("classes", classes, 1, len(CLASSES))])
    return [CLASSES[class_index(CLASSES, name)] for name in classes]


def _numbers(name: str, given: int | Sequence[int]) -> list[int]:
    if not isinstance(given, Iterable):
        return list(range(check_integer(name, given, 1)))
    return [check_integer(name, number, 0) for number in given]


def _check_seed(seed: int) -> int:
    return check_integer("seed", seed, 0, (1 << 64) - 1)


def _check_class(class_name: str) -> None:
    class_index(CLASSES, class_name)


# ---- photos ------------------------------------------------------------------------------------------------


def photo(class_name: str, instance: int, size: int = 224, seed: int = 0) -> NDArray[np.uint8]:
    """A rendered colour picture of an instance, uint8 [3, size, size].

    Filled, shaded shapes on a textured ground. The same (class, instance, seed) is the same thing as in
    `procedural`, with the proportions of style 0. Colours, light and ground belong to the instance and say
    nothing of its class. Raises ValueError for an unknown class or size < 8.
    """
    _check_class(class_name)
    instance, seed = check_integer("instance", instance, 0), _check_seed(seed)
    size = check_integer("size", size, 8)
    parts = _parts(class_name, instance, seed)
    rng = _rng(seed, _STREAM_PHOTO, class_name, instance)
    large = 2 * size  # drawn at twice the size, for smooth edges
    ground = _ground(large, rng)
    object_, mask = _paint(parts, large, rng)
    shadow = mask.transform(mask.size, Image.Transform.AFFINE, (1, 0, -0.03 * large, 0, 1, -0.04 * large))
    soft = np.asarray(shadow.filter(ImageFilter.GaussianBlur(0.02 * large)), np.float32)[..., None] / 255
    shaded = ground * (1 - 0.45 * soft)
    lit = np.asarray(object_, np.float32) * _light(large, rng)
    cover = np.asarray(mask, np.float32)[..., None] / 255
    picture = np.clip(shaded * (1 - cover) + lit * cover, 0, 255).astype(np.uint8)
    small = Image.fromarray(picture).resize((size, size), Image.Resampling.BOX)
    return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))


def procedural_sketch_photo(
    instances_per_class: int | Sequence[int] = 20,
    size: int = DEFAULT_SIZE,
    seed: int = 0,
    classes: int | Sequence[str] | None = None,
    *,
    sketches_per_instance: int = 1,
    styles: int = 16,
    progress: bool = False,
) -> SketchPhotoSet:
    """Rendered photos, and drawings of the same instances by different hands: every sketch has its pair.

    instances_per_class, classes: how many from the front, or which, as in `procedural`. size: side of both in
    pixels; a drawing fills its image but for a margin of 4 %, wherever the object lies in its photo. styles:
    the sketches are in the drawing styles 1 to `styles`, in turn along instances and sketches; more
    `sketches_per_instance` (at most `styles`) are of different styles. Of sketches, `extra` has instance and
    style, of photos instance. A picture depends on (seed, class, instance, style, size) alone; which style a
    sketch has, on instance, `sketches_per_instance` and `styles`.

    The sketches want the native raster: without it they take far longer than the photos. Raises as
    `procedural`. With the strokes: `procedural_pairs`.
    """
    return procedural_pairs(
        instances_per_class,
        size,
        seed,
        classes,
        sketches_per_instance=sketches_per_instance,
        styles=styles,
        progress=progress,
    )[0]


def procedural_pairs(
    instances_per_class: int | Sequence[int] = 20,
    size: int = DEFAULT_SIZE,
    seed: int = 0,
    classes: int | Sequence[str] | None = None,
    *,
    sketches_per_instance: int = 1,
    styles: int = 16,
    progress: bool = False,
) -> tuple[SketchPhotoSet, StrokeDataset]:
    """`procedural_sketch_photo`, and its sketches as strokes: drawing i is sketch i.

    The strokes lie as in the images, on a canvas of side CANVAS: a point at x is at pixel
    x * size / CANVAS - 0.5.
    """
    names = _class_names(classes)
    instances = np.array(_numbers("instances_per_class", instances_per_class), np.int64)
    size, seed = check_integer("size", size, 8), _check_seed(seed)
    styles = check_integer("styles", styles, 1)
    each = check_integer("sketches_per_instance", sketches_per_instance, 1, styles)
    turn = (instances[:, None] * each + np.arange(each)) % styles + 1  # [instances, each]
    hands = {style: drawing_style(style, seed) for style in np.unique(turn).tolist()}
    things = [(name, i) for name in names for i in range(len(instances))]

    drawings = [
        fit(_draw(name, int(instances[i]), style, hands[style], seed), size, 0.04 * size)
        for name, i in things
        for style in turn[i].tolist()
    ]
    ink = rasterize_sketches(drawings, size, padding=None).numpy()
    photo_images = np.empty((len(things), size, size, 3), np.uint8)
    for row, (name, i) in enumerate(track(things, "procedural photos", progress, total=len(things))):
        photo_images[row] = photo(name, int(instances[i]), size, seed).transpose(1, 2, 0)
    photos = ImageSet(
        images=photo_images,
        labels=np.repeat(np.arange(len(names)), len(instances)),
        class_names=names,
        names=[f"{name}/{instances[i]}" for name, i in things],
        extra={"instance": np.tile(instances, len(names))},
    )
    sketches = ImageSet(
        images=np.repeat(255 - ink[..., None], 3, axis=3),
        labels=np.repeat(photos.labels, each),
        class_names=list(names),
        names=[f"{name}-{number}" for name in photos.names for number in range(1, each + 1)],
        extra={
            "instance": np.repeat(photos.extra["instance"], each),
            "style": np.tile(turn.reshape(-1), len(names)),
        },
    )
    info = {"dataset": "procedural", "seed": seed, "size": size}
    pairs = np.repeat(np.arange(len(photos)), each)
    strokes = StrokeDataset.from_sketches(
        [Sketch(((d.points + 0.5) * (CANVAS / size)).astype(np.float32), d.pen_down) for d in drawings],
        sketches.labels,
        names,
        info=info,
        extra={"key": np.array(sketches.names, np.str_)},
    )
    return join_domains(sketches, photos, pairs, info), strokes


def _color(rng: np.random.Generator, low: float, high: float) -> tuple[int, int, int]:
    """A random hue, its lightness in [low, high]."""
    hue, saturation, value = rng.random(), rng.uniform(0.25, 0.9), rng.uniform(low, high)
    red, green, blue = colorsys.hls_to_rgb(hue, value, saturation)
    return round(255 * red), round(255 * green), round(255 * blue)


def _paint(parts: Sequence[Part], side: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """The object in flat colours, and its mask."""
    colors = [_color(rng, 0.35, 0.75) for _ in range(3)] + [_color(rng, 0.05, 0.2)]
    dark = _color(rng, 0.05, 0.25)
    image, mask = Image.new("RGB", (side, side)), Image.new("L", (side, side))
    brush, stencil = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    line_width, edge_width = max(2, round(0.028 * side)), max(1, round(0.006 * side))
    for part in parts:
        xy = [(x, y) for x, y in (part.points * (side / 100)).tolist()]
        if part.tone == LINE:
            xy = xy + xy[:1] if part.closed else xy
            for surface, ink in ((brush, dark), (stencil, 255)):
                surface.line(xy, fill=ink, width=line_width, joint="curve")
            continue
        fill = colors[part.tone % len(colors)]
        brush.polygon(xy, fill=fill)
        brush.line(
            xy + xy[:1], fill=(fill[0] * 6 // 10, fill[1] * 6 // 10, fill[2] * 6 // 10), width=edge_width
        )
        stencil.polygon(xy, fill=255)
    return image, mask


def _light(side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Brightness falling off across the object, float32 [side, side, 1], with a grain."""
    angle = rng.uniform(-np.pi, 0)  # from somewhere above
    at = np.linspace(-1, 1, side, dtype=np.float32)
    slope = np.float32(0.25 * np.cos(angle)) * at[None, :] + np.float32(0.25 * np.sin(angle)) * at[:, None]
    grain = rng.standard_normal((side // 2, side // 2), dtype=np.float32).repeat(2, 0).repeat(2, 1)
    light = np.ones((side, side), np.float32) + slope
    light[: grain.shape[0], : grain.shape[1]] += 0.03 * grain
    return light[..., None]


def _ground(side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A textured background, float32 [side, side, 3]: two colours and noise at three scales."""
    top, bottom = (np.array(_color(rng, 0.55, 0.9), np.float32) for _ in range(2))
    fade = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
    ground = np.repeat(top * (1 - fade) + bottom * fade, side, axis=1)
    for cells, amplitude in ((5, 22.0), (23, 10.0), (97, 6.0)):
        noise = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        smooth = noise.resize((side, side), Image.Resampling.BICUBIC)
        ground += amplitude * np.asarray(smooth)[..., None]
    return ground
