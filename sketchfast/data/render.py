"""Images of sketches, through `sketchfast.rasterize`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops._contract import check_integer, check_number
from ..ops.raster import rasterize
from .strokes import Sketch, collate, fit

_SHARPNESS, _OFFSET = 5.0, 2.0  # the defaults of `rasterize`
#: Pixels across the line that `rasterize` draws by default, where its intensity is 1/2 or more.
LINE_WIDTH = 2 * math.sqrt(_OFFSET / _SHARPNESS)
_CHUNK = 1024  # sketches rasterized at once: bounds the padding's memory


def rasterize_sketches(
    sketches: Iterable[Sketch],
    size: int | tuple[int, int],
    *,
    padding: float | None = 2.0,
    sharpness: float = _SHARPNESS,
    offset: float = _OFFSET,
    blur_sigma: float | None = None,
    dtype: torch.dtype = torch.uint8,
    impl: str = "auto",
) -> Tensor:
    """Images [N, H, W] of N sketches, ink high: uint8 in 0..255 (the default), or a float dtype in [0, 1].

    size: (H, W) or int. padding: each sketch is scaled and centred with this margin in pixels (`fit`); None
    draws it where it lies. The rest as in `sketchfast.rasterize`; a line's peak is sigmoid(offset), 0.88 by
    default. No gradient.
    """
    if dtype != torch.uint8 and not dtype.is_floating_point:
        raise TypeError(f"dtype must be torch.uint8 or a floating dtype, got {dtype}")
    height, width = (size, size) if isinstance(size, int) else size
    fitted = [s if padding is None else fit(s, (height, width), padding) for s in sketches]
    images = torch.empty(len(fitted), height, width, dtype=dtype)
    for start in range(0, len(fitted), _CHUNK):
        points, pens, lengths = collate(fitted[start : start + _CHUNK])
        ink = rasterize(
            points,
            pens,
            (height, width),
            lengths=lengths,
            sharpness=sharpness,
            offset=offset,
            blur_sigma=blur_sigma,
            impl=impl,
        )
        if dtype == torch.uint8:
            ink = ink.mul(255).round_().clamp_(0, 255)
        images[start : start + len(ink)] = ink.to(dtype)
    return images


def sketch_images(
    sketches: Sequence[Sketch],
    size: int,
    *,
    canvas: float,
    widths: Sequence[NDArray[np.float64]] | None = None,
    line_width: float = LINE_WIDTH,
    impl: str = "auto",
) -> NDArray[np.uint8]:
    """Images uint8 [N, size, size, 3] of N sketches as they lie on their canvas, dark on white.

    Images as an `ImageSet` holds them. The canvas, a square from (0, 0) to (canvas, canvas), fills the image:
    x becomes x * size / canvas - 1/2, as the centre of the first pixel is 0. What lies outside is not drawn;
    nothing is centred or scaled, so that a part of a drawing lies where it lies in the whole
    (`rasterize_sketches` fits each to its image).

    A line w times as wide keeps the steepness of its edge: it is drawn with sharpness / w and offset * w,
    which puts the intensity 1/2 at w times the distance; thin lines are paler for it. Strokes of one
    width are drawn in one call, and a pixel takes its darkest stroke: without `widths`, exactly what one call
    draws.

    Args:
        sketches: N sketches.
        size: side of the images in pixels.
        canvas: side of the canvas in the sketches' units, > 0.
        widths: of each sketch a factor > 0 for each of its strokes (`to_strokes`), as `deform` gives them;
            None is 1 throughout.
        line_width: pixels across a line of width 1, > 0.
        impl: as for `sketchfast.rasterize`.

    Raises TypeError or ValueError that names the argument.
    """
    size = check_integer("size", size, 1)
    scale = size / check_number("canvas", canvas, above=0)
    factor = check_number("line_width", line_width, above=0) / LINE_WIDTH
    placed = [
        Sketch((s.points.astype(np.float64) * scale - 0.5).astype(np.float32), s.pen_down) for s in sketches
    ]
    of_points = _width_of_points(placed, widths)
    ink = np.zeros((len(placed), size, size), np.uint8)
    for width in np.unique(np.concatenate([np.zeros(0), *of_points])).tolist():
        masks = [s.pen_down & (own == width) for s, own in zip(placed, of_points, strict=True)]
        rows = [row for row, mask in enumerate(masks) if mask.any()]
        if not rows:
            continue
        drawn = rasterize_sketches(
            [Sketch(placed[row].points, masks[row]) for row in rows],
            size,
            padding=None,
            sharpness=_SHARPNESS / (width * factor),
            offset=_OFFSET * (width * factor),
            impl=impl,
        )
        ink[rows] = np.maximum(ink[rows], drawn.numpy())
    return np.repeat(255 - ink[..., None], 3, axis=3)


def _width_of_points(
    sketches: Sequence[Sketch], widths: Sequence[NDArray[np.float64]] | None
) -> list[NDArray[np.float64]]:
    """For each sketch the width of the stroke that each of its points belongs to."""
    if widths is None:
        return [np.ones(len(s.points)) for s in sketches]
    if len(widths) != len(sketches):
        raise ValueError(f"widths must be {len(sketches)}, one array a sketch, got {len(widths)}")
    found = []
    for number, (sketch, given) in enumerate(zip(sketches, widths, strict=True)):
        lifts = np.concatenate(([0], np.cumsum(~sketch.pen_down)))[: len(sketch.points)]  # before each point
        factors = np.asarray(given, np.float64)
        count = int(lifts[-1]) + 1 if len(lifts) else 0
        if factors.shape != (count,):
            raise ValueError(
                f"widths[{number}] must have shape [{count}], one a stroke, got {list(factors.shape)}"
            )
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise ValueError(f"widths[{number}] must be finite and greater than 0, got {factors.tolist()}")
        found.append(factors[lifts])
    return found
