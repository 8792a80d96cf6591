"""Stroke rasterization in Triton (DESIGN 4.1's definitions; schemas and fakes are in ops/raster.py).

Tiling. A canvas of at most 64 x 64 is one tile, padded to powers of two: blur, loss and the gradient to the
points then stay in one program, one launch each way. A larger canvas is cut into blocks of 32 x 32 (64 x 64
where the blur is wide) that overlap on every side by the blur's radius (twice that where its transpose is
formed as well); a program computes its whole block and keeps the inner part. Programs are persistent: at most
`_MAX_PROGRAMS`, each striding over the tiles.

Forward. A program tests the sketch's segments against its block, `CHUNK` at a time, one a thread, and writes
what the pixel loop needs of those within reach to its own small list in global memory (it stays in L1). All
threads then walk that list, every pixel keeping the least squared distance and its segment. A block that
no segment reaches costs neither that walk nor a blur. The blur moves whole blocks within the program
(`tl.gather`), two axes in turn.

Backward. The gradient of the image, blurred, is a plane (for raster_bce that of d2, from the pass that drew).
Each segment sums over the pixels of its own band (its major axis extended by the reach, times the reach to
either side) where the saved plane names it the winner. No atomics; every sum has one fixed order.

Coordinates. A segment is held by its start or, where that is far off, by the point of it nearest to the
block's centre (found in float64, kept as integer + fraction), its direction, and the range [low, high] along
it. Far ends only enter that range, so that float32 serves the pixels however far off the ends lie, and
nothing finite becomes NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_PROGRAMS = 2112  # 16 for each of the 132 multiprocessors of an H100 or H200
_SINGLE_TILE = 64  # the largest side of a canvas that one program holds
_CHUNK = 128  # segments tested at once: one for each thread of four warps
_GROUP = 16  # segments a gather step handles, the first of them for its end point only
_LANES = 16  # pixels of each of those segments looked at together
_FUSED_STEPS = 512  # up to so many points one program also gathers the gradient of a one-tile sketch
# An image may lose all ink under 2^-24, but the slopes of a long segment's many dim pixels add up.
_IMAGE_CUTOFF = 2e-10
_REST_OFFSET = 3.0  # above, ink is so near 1 that 1 - blur(ink) cancels: 1 - ink is blurred as well
_LOSS_CUTOFF = 1e-13  # what the loss may lose: 1e-6 of the least probability, 1e-7
_FAR = tl.constexpr(1e30)
_NEAR_END = tl.constexpr(1024.0)  # pixels; a start within it of the block's centre serves as the anchor
_FIELDS = tl.constexpr(11)  # of a listed segment: the ten of `_anchor` and its index


# --- segments ---------------------------------------------------------------------------------------------


@triton.jit
def _wide(index):
    """`index`, a loop variable, as int64."""
    return tl.full((), 0, tl.int64) + index


@triton.jit
def _segment_count(lengths, sketch, steps, HAS_LENGTHS: tl.constexpr):
    """How many segments the sketch may have: its length, clamped to [0, steps], less one."""
    count = _wide(steps)
    if HAS_LENGTHS:
        count = tl.minimum(tl.maximum(tl.load(lengths + sketch), 0), count)
    return tl.maximum(count - 1, 0).to(tl.int32)


@triton.jit
def _load_segments(points, pens, index, count, HAS_PENS: tl.constexpr):
    """Ends (ax, ay, bx, by) of the segments `index`, 0 where there is none, and which of them exist."""
    inside = (index >= 0) & (index < count)
    start = points + index * 2
    ax = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    ay = tl.load(start + 1, mask=inside, other=0.0).to(tl.float32)
    bx = tl.load(start + 2, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(start + 3, mask=inside, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.maximum(tl.abs(ax), tl.abs(ay)), tl.maximum(tl.abs(bx), tl.abs(by)))
    total = (ax - ax) + (ay - ay) + (bx - bx) + (by - by)  # NaN where an end is not finite
    exists = inside & (largest < float("inf")) & (total == 0.0)
    if HAS_PENS:
        exists = exists & (tl.load(pens + index, mask=inside, other=0) != 0)
    return (
        tl.where(exists, ax, 0.0),
        tl.where(exists, ay, 0.0),
        tl.where(exists, bx, 0.0),
        tl.where(exists, by, 0.0),
        exists,
    )


@triton.jit
def _bounded(x):
    """A float64 as float32, held below what its square needs infinity for twice over."""
    return tl.minimum(tl.maximum(x, -_FAR), _FAR).to(tl.float32)


@triton.jit
def _anchor(ax, ay, bx, by, centre_x, centre_y):
    """Segments seen from a centre: (origin xy, anchor xy, step xy, dual xy, low, high, range2), all float32.

    origin + anchor is the start of the segment or, where that is far off, the point of the segment nearest to
    the centre; origin is a whole pixel. The segment is anchor + s * step for s in [low, high],
    low <= 0 <= high; step is b - a over a power of two, so that it is exact wherever b - a is, and
    dual = step / |step|^2. A segment of length zero has step 0. range2 is the squared distance of the centre
    to the segment.
    """
    start_x = ax.to(tl.float64)
    start_y = ay.to(tl.float64)
    along_x = bx.to(tl.float64) - start_x
    along_y = by.to(tl.float64) - start_y
    largest = tl.maximum(tl.abs(along_x), tl.abs(along_y))
    dot = largest <= 0.0
    exponent = tl.where(dot, 1.0, largest).to(tl.int64, bitcast=True) & 0x7FF0000000000000
    power = exponent.to(tl.float64, bitcast=True)  # of two: `largest` lies in [power, 2 * power)
    shrink = (0x7FE0000000000000 - exponent).to(tl.float64, bitcast=True)  # 1 / power
    step_x = along_x * shrink
    step_y = along_y * shrink
    square = tl.where(dot, 1.0, step_x * step_x + step_y * step_y)  # in [1, 8)
    inverse = (1.0 / square.to(tl.float32)).to(tl.float64)
    for _ in tl.static_range(2):  # Newton: float64's division is a slow call
        inverse = inverse * (2.0 - square * inverse)
    inverse = tl.where(dot, 0.0, inverse)
    end = tl.where(dot, 0.0, power)
    dual_x = step_x * inverse
    dual_y = step_y * inverse
    before = (centre_x - start_x) * dual_x + (centre_y - start_y) * dual_y
    before = tl.minimum(tl.maximum(before, 0.0), end)
    off_x = start_x - centre_x
    off_y = start_y - centre_y
    range_x = off_x + before * step_x
    range_y = off_y + before * step_y
    before = tl.where(tl.maximum(tl.abs(off_x), tl.abs(off_y)) < _NEAR_END, 0.0, before)
    near_x = start_x + before * step_x
    near_y = start_y + before * step_y
    origin_x = tl.floor(near_x + 0.5)
    origin_y = tl.floor(near_y + 0.5)
    return (
        _bounded(origin_x),
        _bounded(origin_y),
        _bounded(near_x - origin_x),
        _bounded(near_y - origin_y),
        step_x.to(tl.float32),
        step_y.to(tl.float32),
        dual_x.to(tl.float32),
        dual_y.to(tl.float32),
        _bounded(-before),
        _bounded(end - before),
        _bounded(range_x * range_x + range_y * range_y),
    )


@triton.jit
def _gap(x, y, origin_x, origin_y, anchor_x, anchor_y, step_x, step_y, dual_x, dual_y, low, high):
    """From the nearest point of a segment to pixel (x, y): (gap x, gap y, position s of that point)."""
    from_x = (x - origin_x) - anchor_x
    from_y = (y - origin_y) - anchor_y
    position = tl.minimum(tl.maximum(from_x * dual_x + from_y * dual_y, low), high)
    return from_x - position * step_x, from_y - position * step_y, position


@triton.jit
def _refined(gap_x, gap_y, position, step_x, step_y, dual_x, dual_y, low, high):
    """The gap less its part along the segment, which only rounding left there.

    The squared length does not feel that part, but the gradient does, to first order.
    """
    along = gap_x * dual_x + gap_y * dual_y
    along = tl.where((position > low) & (position < high), along, 0.0)
    return gap_x - along * step_x, gap_y - along * step_y


# --- the pixels of a block --------------------------------------------------------------------------------


@triton.jit
def _list_segments(
    near, listed, index, ax, ay, bx, by, centre_x, centre_y, range2, CULL: tl.constexpr, CHUNK: tl.constexpr
):
    """Writes the segments `near` whose distance from the centre is in range, in order; returns how many."""
    ox, oy, px, py, ux, uy, vx, vy, low, high, off2 = _anchor(ax, ay, bx, by, centre_x, centre_y)
    if CULL:
        near = near & (off2 <= range2)
    slot = listed + tl.cumsum(near.to(tl.int32), 0) - 1
    tl.store(slot, ox, mask=near)
    tl.store(slot + CHUNK, oy, mask=near)
    tl.store(slot + 2 * CHUNK, px, mask=near)
    tl.store(slot + 3 * CHUNK, py, mask=near)
    tl.store(slot + 4 * CHUNK, ux, mask=near)
    tl.store(slot + 5 * CHUNK, uy, mask=near)
    tl.store(slot + 6 * CHUNK, vx, mask=near)
    tl.store(slot + 7 * CHUNK, vy, mask=near)
    tl.store(slot + 8 * CHUNK, low, mask=near)
    tl.store(slot + 9 * CHUNK, high, mask=near)
    tl.store(slot + 10 * CHUNK, index.to(tl.float32, bitcast=True), mask=near)
    return tl.sum(near.to(tl.int32), 0)


@triton.jit
def _nearest(
    points, pens, count, listed, x0, y0, reach, CULL: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """(d2, segment, seen) of the block whose first pixel is (x0, y0): the least squared distance, whose it
    is, and how many segments were looked at.

    +inf and -1 where no segment was looked at. With CULL, segments further than `reach` from every pixel of
    the block are passed over. `listed` is this program's list.
    """
    x = (x0 + tl.arange(0, BLOCK_W)).to(tl.float32)[None, :]
    y = (y0 + tl.arange(0, BLOCK_H)).to(tl.float32)[:, None]
    centre_x = (x0 + BLOCK_W // 2).to(tl.float32)
    centre_y = (y0 + BLOCK_H // 2).to(tl.float32)
    half_x = BLOCK_W // 2 + reach
    half_y = BLOCK_H // 2 + reach
    range2 = 1.01 * (half_x * half_x + half_y * half_y)

    seen = tl.full((), 0, tl.int32)
    best = tl.full((BLOCK_H, BLOCK_W), float("inf"), tl.float32)
    winner = tl.full((BLOCK_H, BLOCK_W), -1, tl.int32)
    for first in range(0, count, CHUNK):
        index = first + tl.arange(0, CHUNK)
        ax, ay, bx, by, near = _load_segments(points, pens, index, count, True)
        if CULL:
            near = near & (tl.maximum(ax, bx) >= centre_x - half_x)
            near = near & (tl.minimum(ax, bx) <= centre_x + half_x)
            near = near & (tl.maximum(ay, by) >= centre_y - half_y)
            near = near & (tl.minimum(ay, by) <= centre_y + half_y)
        if tl.sum(near.to(tl.int32), 0) > 0:
            found = _list_segments(
                near, listed, index, ax, ay, bx, by, centre_x, centre_y, range2, CULL, CHUNK
            )
            seen += found
            tl.debug_barrier()  # the list is read by other threads than wrote it
            for k in range(found):
                entry = listed + k
                gap_x, gap_y, _ = _gap(
                    x,
                    y,
                    tl.load(entry),
                    tl.load(entry + CHUNK),
                    tl.load(entry + 2 * CHUNK),
                    tl.load(entry + 3 * CHUNK),
                    tl.load(entry + 4 * CHUNK),
                    tl.load(entry + 5 * CHUNK),
                    tl.load(entry + 6 * CHUNK),
                    tl.load(entry + 7 * CHUNK),
                    tl.load(entry + 8 * CHUNK),
                    tl.load(entry + 9 * CHUNK),
                )
                d2 = gap_x * gap_x + gap_y * gap_y
                closer = d2 < best  # strictly: of equals the lowest index stays
                best = tl.where(closer, d2, best)
                winner = tl.where(closer, tl.load(entry + 10 * CHUNK).to(tl.int32, bitcast=True), winner)
            tl.debug_barrier()  # and is overwritten next
    return best, winner, seen


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _draw(
    points, pens, count, listed, x0, y0, height, width, sharpness, offset, reach, reach2,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """(ink, rest, segment, seen) of a block before the blur; rest = 1 - ink, formed without cancellation.

    Where `seen` is 0 the block is blank and stays so under the blur. 0, 1 and -1 where the nearest segment is
    out of reach, and off the canvas: there the blur pads.
    """
    d2, winner, seen = _nearest(points, pens, count, listed, x0, y0, reach, True, BLOCK_H, BLOCK_W, CHUNK)
    row = (y0 + tl.arange(0, BLOCK_H))[:, None]
    column = (x0 + tl.arange(0, BLOCK_W))[None, :]
    canvas = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    drawn = canvas & (winner >= 0) & (d2 <= reach2)
    logit = offset - sharpness * d2
    ink = tl.where(drawn, _sigmoid(logit), 0.0)
    rest = tl.where(drawn, _sigmoid(-logit), 1.0)
    return ink, rest, tl.where(drawn, winner, -1), seen


@triton.jit
def _blur_axis(
    image, outside, centre, falloff, AXIS: tl.constexpr, RADIUS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One axis of `_blur`."""
    side: tl.constexpr = BLOCK_H if AXIS == 0 else BLOCK_W
    if AXIS == 0:
        position = tl.broadcast_to(tl.arange(0, BLOCK_H)[:, None], (BLOCK_H, BLOCK_W))
    else:
        position = tl.broadcast_to(tl.arange(0, BLOCK_W)[None, :], (BLOCK_H, BLOCK_W))
    blurred = image * centre
    # Taps further off than the block is wide meet nothing but what is outside.
    taps: tl.constexpr = min(RADIUS, side - 1)
    for k in range(1, taps + 1):
        weight = centre * tl.exp(-falloff * (k * k))
        below = tl.gather(image, tl.maximum(position - k, 0), AXIS)
        above = tl.gather(image, tl.minimum(position + k, side - 1), AXIS)
        below = tl.where(position >= k, below, outside)
        above = tl.where(position + k < side, above, outside)
        blurred += weight * (below + above)
    for k in range(taps + 1, RADIUS + 1):
        blurred += 2.0 * outside * centre * tl.exp(-falloff * (k * k))
    return blurred


@triton.jit
def _blur(
    image, outside, centre, falloff, RADIUS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Separable Gaussian of a block, weights centre * exp(-falloff * k^2); `outside` surrounds the block."""
    if RADIUS > 0:
        image = _blur_axis(image, outside, centre, falloff, 0, RADIUS, BLOCK_H, BLOCK_W)
        image = _blur_axis(image, outside, centre, falloff, 1, RADIUS, BLOCK_H, BLOCK_W)
    return image


@triton.jit
def _place(tile, tiles_y, tiles_x, halo, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """(sketch as int64, first row, first column) of the block of tile number `tile`."""
    sketch = _wide(tile // (tiles_y * tiles_x))  # divided as int32 where that holds the tiles
    within = (tile - sketch * (tiles_y * tiles_x)).to(tl.int32)
    tile_y = within // tiles_x
    tile_x = within - tile_y * tiles_x
    return sketch, tile_y * (BLOCK_H - 2 * halo) - halo, tile_x * (BLOCK_W - 2 * halo) - halo


@triton.jit
def _pixels(x0, y0, height, width, halo, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """(offset in the sketch's plane, on the canvas, and also inside the halo: the pixels this tile owns)."""
    i = tl.arange(0, BLOCK_H)[:, None]
    j = tl.arange(0, BLOCK_W)[None, :]
    canvas = (y0 + i >= 0) & (y0 + i < height) & (x0 + j >= 0) & (x0 + j < width)
    inner = (i >= halo) & (i < BLOCK_H - halo) & (j >= halo) & (j < BLOCK_W - halo)
    return (y0 + i) * width + (x0 + j), canvas, canvas & inner


# --- the gradient of a group of segments ------------------------------------------------------------------


@triton.jit
def _segment_band(size, anchor, unit, low, high, reach):
    """First and last pixel coordinate, along one axis, within `reach` of segments on a canvas of `size`."""
    one_end = anchor + low * unit
    other_end = anchor + high * unit
    first = tl.maximum(tl.minimum(one_end, other_end) - reach - 0.5, 0.0)
    last = tl.minimum(tl.maximum(one_end, other_end) + reach + 0.5, size - 1.0)
    first = tl.minimum(first, size * 1.0)
    last = tl.maximum(last, -1.0)
    return tl.ceil(first).to(tl.int32), tl.floor(last).to(tl.int32)


@triton.jit
def _gather_group(
    gradient, winners, points, pens, grad_points, first, count, steps, height, width, sharpness, offset,
    reach, band, EVERYWHERE: tl.constexpr, OF_INK: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Writes grad_points[first + 1 : first + GROUP] from the segments first : first + GROUP.

    `gradient` and `winners` are planes of one sketch. Each segment visits the pixels of its band: `band`
    pixels across for every pixel along its major axis. OF_INK: the plane is the gradient of the ink, else
    of d2. EVERYWHERE: the planes are those of stroke_distance: winners alone say which segments exist, and a
    segment may have won any pixel of the canvas, so many that they are summed in float64.
    """
    index = first + tl.arange(0, GROUP)
    ax, ay, bx, by, exists = _load_segments(points, pens, index, count, not EVERYWHERE)
    ox, oy, px, py, ux, uy, vx, vy, low, high, _ = _anchor(ax, ay, bx, by, width // 2, height // 2)
    upright = tl.abs(uy) > tl.abs(ux)  # the major axis is y
    major_size = tl.where(upright, height, width)
    minor_size = tl.where(upright, width, height)
    major_anchor = tl.where(upright, oy + py, ox + px)
    minor_anchor = tl.where(upright, ox + px, oy + py)
    major_unit = tl.where(upright, uy, ux)
    slope = tl.where(upright, ux, uy) / tl.where(major_unit == 0.0, 1.0, major_unit)
    across = tl.minimum(band, minor_size)
    begin, end = _segment_band(major_size, major_anchor, major_unit, low, high, reach)
    visits = tl.where(exists, tl.maximum(end - begin + 1, 0) * across, 0)

    SUM: tl.constexpr = tl.float64 if EVERYWHERE else tl.float32
    start_x = tl.zeros((GROUP, LANES), SUM)
    start_y = tl.zeros((GROUP, LANES), SUM)
    end_x = tl.zeros((GROUP, LANES), SUM)
    end_y = tl.zeros((GROUP, LANES), SUM)
    length = high - low
    inverse = tl.where(length > 1e-30, 1.0 / tl.where(length > 1e-30, length, 1.0), 0.0)
    for lane in range(0, tl.max(visits, 0), LANES):
        visit = lane + tl.arange(0, LANES)[None, :]
        along = visit // across[:, None]
        major = begin[:, None] + along
        middle = minor_anchor[:, None] + (major.to(tl.float32) - major_anchor[:, None]) * slope[:, None]
        middle = tl.minimum(tl.maximum(middle, 0.0), minor_size[:, None] - 1.0)
        minor = tl.floor(middle + 0.5).to(tl.int32) - across[:, None] // 2
        minor = tl.maximum(tl.minimum(minor, (minor_size - across)[:, None]), 0)
        minor += visit - along * across[:, None]
        x = tl.where(upright[:, None], minor, major)
        y = tl.where(upright[:, None], major, minor)
        valid = visit < visits[:, None]
        pixel = y * width + x
        won = tl.load(winners + pixel, mask=valid, other=-1).to(tl.int32) == index[:, None]
        won = won & valid
        weight = tl.load(gradient + pixel, mask=won, other=0.0).to(tl.float32)
        gap_x, gap_y, position = _gap(
            x.to(tl.float32),
            y.to(tl.float32),
            ox[:, None],
            oy[:, None],
            px[:, None],
            py[:, None],
            ux[:, None],
            uy[:, None],
            vx[:, None],
            vy[:, None],
            low[:, None],
            high[:, None],
        )
        if OF_INK:
            logit = offset - sharpness * (gap_x * gap_x + gap_y * gap_y)
            weight = weight * (-sharpness * _sigmoid(logit) * _sigmoid(-logit))
        gap_x, gap_y = _refined(
            gap_x,
            gap_y,
            position,
            ux[:, None],
            uy[:, None],
            vx[:, None],
            vy[:, None],
            low[:, None],
            high[:, None],
        )
        # d d2 / d(end points) = -2 * gap, shared by the position of the nearest point between them
        weight = tl.where(won, -2.0 * weight, 0.0)
        fraction = (position - low[:, None]) * inverse[:, None]
        pull_x = tl.where(won, weight * gap_x, 0.0)
        pull_y = tl.where(won, weight * gap_y, 0.0)
        end_x += (pull_x * fraction).to(SUM)
        end_y += (pull_y * fraction).to(SUM)
        start_x += (pull_x * (1.0 - fraction)).to(SUM)
        start_y += (pull_y * (1.0 - fraction)).to(SUM)

    # Point t starts segment t and ends segment t - 1: the slot before.
    before = tl.maximum(tl.arange(0, GROUP) - 1, 0)
    grad_x = tl.sum(start_x, 1) + tl.gather(tl.sum(end_x, 1), before, 0)
    grad_y = tl.sum(start_y, 1) + tl.gather(tl.sum(end_y, 1), before, 0)
    owned = (tl.arange(0, GROUP) > 0) & (index < steps)
    # By way of float32: Triton's cast from float64 to bfloat16 gives NaN.
    tl.store(grad_points + index * 2, grad_x.to(tl.float32), mask=owned)
    tl.store(grad_points + index * 2 + 1, grad_y.to(tl.float32), mask=owned)


@triton.jit
def _gather_sketch(
    gradient, winners, points, pens, grad_points, count, steps, height, width, sharpness, offset, reach, band,
    OF_INK: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The gradient of every point of one sketch, group after group."""
    for first in range(-1, steps - 1, GROUP - 1):
        _gather_group(
            gradient, winners, points, pens, grad_points, first, count, steps, height, width, sharpness,
            offset, reach, band, False, OF_INK, GROUP, LANES,
        )  # fmt: skip


# --- kernels ----------------------------------------------------------------------------------------------


@triton.jit
def _draw_kernel(
    points, pens, lengths, image, winners, lists, steps, height, width, tiles_y, tiles_x, tiles, sharpness,
    offset, reach, reach2, centre, falloff, HAS_LENGTHS: tl.constexpr, SAVE: tl.constexpr,
    RADIUS: tl.constexpr, HALO: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """image [B, H, W] and, with SAVE, winners [B, H, W] (-1: none in reach). One tile at a time."""
    listed = lists + _wide(tl.program_id(0)) * (_FIELDS * CHUNK)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        sketch, y0, x0 = _place(tile, tiles_y, tiles_x, HALO, BLOCK_H, BLOCK_W)
        count = _segment_count(lengths, sketch, steps, HAS_LENGTHS)
        ink, _, winner, seen = _draw(
            points + sketch * steps * 2, pens + sketch * steps, count, listed, x0, y0, height, width,
            sharpness, offset, reach, reach2, BLOCK_H, BLOCK_W, CHUNK,
        )  # fmt: skip
        if seen > 0:
            ink = _blur(ink, 0.0, centre, falloff, RADIUS, BLOCK_H, BLOCK_W)
        pixel, _, owned = _pixels(x0, y0, height, width, HALO, BLOCK_H, BLOCK_W)
        plane = sketch * height * width
        tl.store(image + plane + pixel, ink, mask=owned)
        if SAVE:
            tl.store(winners + plane + pixel, winner, mask=owned)


@triton.jit
def _distance_kernel(
    points, pens, lengths, distance2, winners, lists, steps, height, width, tiles_y, tiles_x, tiles,
    HAS_LENGTHS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """distance2 and winners [B, H, W], exact everywhere: every pixel meets every segment."""
    listed = lists + _wide(tl.program_id(0)) * (_FIELDS * CHUNK)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        sketch, y0, x0 = _place(tile, tiles_y, tiles_x, 0, BLOCK_H, BLOCK_W)
        count = _segment_count(lengths, sketch, steps, HAS_LENGTHS)
        d2, winner, _ = _nearest(
            points + sketch * steps * 2, pens + sketch * steps, count, listed, x0, y0, 0.0, False,
            BLOCK_H, BLOCK_W, CHUNK,
        )  # fmt: skip
        pixel, _, owned = _pixels(x0, y0, height, width, 0, BLOCK_H, BLOCK_W)
        plane = sketch * height * width
        tl.store(distance2 + plane + pixel, d2, mask=owned)
        tl.store(winners + plane + pixel, winner, mask=owned)


@triton.jit
def _blur_kernel(
    image, blurred, height, width, tiles_y, tiles_x, tiles, centre, falloff, RADIUS: tl.constexpr,
    HALO: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """blurred [B, H, W], both axes, tile by tile; the blur is its own transpose."""
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        sketch, y0, x0 = _place(tile, tiles_y, tiles_x, HALO, BLOCK_H, BLOCK_W)
        pixel, canvas, owned = _pixels(x0, y0, height, width, HALO, BLOCK_H, BLOCK_W)
        plane = sketch * height * width
        block = tl.load(image + plane + pixel, mask=canvas, other=0.0).to(tl.float32)
        block = _blur(block, 0.0, centre, falloff, RADIUS, BLOCK_H, BLOCK_W)
        tl.store(blurred + plane + pixel, block, mask=owned)


@triton.jit
def _wide_blur_kernel(image, blurred, extent, stride, total, radius, centre, falloff, BLOCK: tl.constexpr):
    """One axis (of `extent` pixels, `stride` apart) of a blur too wide for a block's halo."""
    pixel = _wide(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < total
    position = ((pixel // stride) % extent).to(tl.int32)
    block = centre * tl.load(image + pixel, mask=inside, other=0.0).to(tl.float32)
    for k in range(1, radius + 1):
        below = tl.load(image + pixel - _wide(k) * stride, mask=inside & (position >= k), other=0.0)
        above = tl.load(image + pixel + _wide(k) * stride, mask=inside & (position + k < extent), other=0.0)
        block += centre * tl.exp(-falloff * (k * k)) * (below.to(tl.float32) + above.to(tl.float32))
    tl.store(blurred + pixel, block, mask=inside)


@triton.jit
def _gather_kernel(
    gradient, winners, points, pens, lengths, grad_points, steps, height, width, groups, sharpness, offset,
    reach, band, HAS_LENGTHS: tl.constexpr, EVERYWHERE: tl.constexpr, OF_INK: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """grad_points [B, T, 2] from the planes `gradient` and `winners`; one program a group of points."""
    sketch = _wide(tl.program_id(0) // groups)
    group = (tl.program_id(0) - sketch * groups).to(tl.int32)
    count = _segment_count(lengths, sketch, steps, HAS_LENGTHS)
    plane = sketch * height * width
    _gather_group(
        gradient + plane, winners + plane, points + sketch * steps * 2, pens + sketch * steps,
        grad_points + sketch * steps * 2, group * (GROUP - 1) - 1, count, steps, height, width, sharpness,
        offset, reach, band, EVERYWHERE, OF_INK, GROUP, LANES,
    )  # fmt: skip


@triton.jit
def _blur_gather_kernel(
    grad, winners, points, pens, lengths, grad_points, scratch, batch, steps, height, width, sharpness,
    offset, reach, band, centre, falloff, HAS_LENGTHS: tl.constexpr, RADIUS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """grad_points [B, T, 2] where the canvas is one tile: the blur and the gather in one program a sketch."""
    blurred = scratch + _wide(tl.program_id(0)) * height * width
    pixel, canvas, _ = _pixels(0, 0, height, width, 0, BLOCK_H, BLOCK_W)
    for turn in range(tl.program_id(0), batch, tl.num_programs(0)):
        sketch = _wide(turn)
        plane = sketch * height * width
        block = tl.load(grad + plane + pixel, mask=canvas, other=0.0).to(tl.float32)
        block = _blur(block, 0.0, centre, falloff, RADIUS, BLOCK_H, BLOCK_W)
        tl.store(blurred + pixel, block, mask=canvas)
        tl.debug_barrier()
        count = _segment_count(lengths, sketch, steps, HAS_LENGTHS)
        _gather_sketch(
            blurred, winners + plane, points + sketch * steps * 2, pens + sketch * steps,
            grad_points + sketch * steps * 2, count, steps, height, width, sharpness, offset, reach, band,
            True, GROUP, LANES,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _log1p(x):
    """log(1 + x), accurate for small x (Kahan)."""
    sum1 = 1.0 + x
    small = sum1 == 1.0
    quotient = x / tl.where(small, 1.0, sum1 - 1.0)
    return tl.where(small, x, tl.log(sum1) * quotient)


@triton.jit
def _cross_entropy(p, q, target, weight):
    """(loss, d loss / d p) of probabilities p and q = 1 - p, clamped to [1e-7, 1 - 1e-7], times `weight`."""
    free = (p >= 1e-7) & (q >= 1e-7)
    p = tl.maximum(p, 1e-7)
    q = tl.maximum(q, 1e-7)
    log_p = tl.where(p > 0.5, _log1p(-q), tl.log(p))
    log_q = tl.where(p > 0.5, tl.log(q), _log1p(-p))
    loss = -(target * log_p + (1.0 - target) * log_q)
    slope = (1.0 - target) / q - target / p
    return loss * weight, tl.where(free, slope * weight, 0.0)


@triton.jit
def _bce_kernel(
    points, pens, lengths, target, target_points, target_pens, target_lengths, losses, gradient, winners,
    grad_points, lists, steps, target_steps, height, width, tiles_y, tiles_x, tiles, sharpness, offset, reach,
    reach2, band, centre, falloff, HAS_LENGTHS: tl.constexpr, TARGET_STROKES: tl.constexpr,
    HAS_TARGET_LENGTHS: tl.constexpr, BLUR_REST: tl.constexpr, NEED_GRAD: tl.constexpr,
    FUSED: tl.constexpr, RADIUS: tl.constexpr, HALO: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """losses [B, tiles of a sketch], each tile's share of the mean over pixels; then one of

    NEED_GRAD and FUSED (one tile a sketch): grad_points [B, T, 2]; gradient and winners are scratch of one
    plane a program.
    NEED_GRAD: gradient [B, H, W], of d2, and winners [B, H, W].
    """
    listed = lists + _wide(tl.program_id(0)) * (_FIELDS * CHUNK)
    share = 1.0 / (height * width)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        sketch, y0, x0 = _place(tile, tiles_y, tiles_x, HALO, BLOCK_H, BLOCK_W)
        pixel, canvas, owned = _pixels(x0, y0, height, width, HALO, BLOCK_H, BLOCK_W)
        plane = sketch * height * width
        if TARGET_STROKES:
            target_count = _segment_count(target_lengths, sketch, target_steps, HAS_TARGET_LENGTHS)
            wanted, _, _, wanted_seen = _draw(
                target_points + sketch * target_steps * 2, target_pens + sketch * target_steps, target_count,
                listed, x0, y0, height, width, sharpness, offset, reach, reach2, BLOCK_H, BLOCK_W, CHUNK,
            )  # fmt: skip
            if wanted_seen > 0:
                wanted = _blur(wanted, 0.0, centre, falloff, RADIUS, BLOCK_H, BLOCK_W)
        else:
            wanted = tl.load(target + plane + pixel, mask=canvas, other=0.0)
        count = _segment_count(lengths, sketch, steps, HAS_LENGTHS)
        ink, rest, winner, seen = _draw(
            points + sketch * steps * 2, pens + sketch * steps, count, listed, x0, y0, height, width,
            sharpness, offset, reach, reach2, BLOCK_H, BLOCK_W, CHUNK,
        )  # fmt: skip
        ink_slope = -sharpness * ink * rest  # d ink / d d2
        if RADIUS > 0 and seen > 0:
            ink = _blur(ink, 0.0, centre, falloff, RADIUS, BLOCK_H, BLOCK_W)
            if BLUR_REST:
                rest = _blur(rest, 1.0, centre, falloff, RADIUS, BLOCK_H, BLOCK_W)
            else:
                rest = 1.0 - ink
        loss, slope = _cross_entropy(ink, rest, wanted, share)
        tl.store(losses + _wide(tile), tl.sum(tl.sum(tl.where(owned, loss, 0.0), 1), 0))
        if NEED_GRAD:
            # The halo is twice the blur's radius: the blur's transpose is right on the owned pixels.
            slope = tl.where(canvas, slope, 0.0)
            if seen > 0:
                slope = _blur(slope, 0.0, centre, falloff, RADIUS, BLOCK_H, BLOCK_W)
            slope *= ink_slope
            if FUSED:
                plane = _wide(tl.program_id(0)) * height * width
            tl.store(gradient + plane + pixel, slope, mask=owned)
            tl.store(winners + plane + pixel, winner, mask=owned)
            if FUSED:
                tl.debug_barrier()
                _gather_sketch(
                    gradient + plane, winners + plane, points + sketch * steps * 2, pens + sketch * steps,
                    grad_points + sketch * steps * 2, count, steps, height, width, sharpness, offset, reach,
                    band, False, GROUP, LANES,
                )  # fmt: skip
                tl.debug_barrier()


# --- launchers: plain launches, everything chosen from shapes and scalars ---------------------------------


def _reach(sharpness: float, offset: float, cutoff: float) -> tuple[float, float]:
    """(reach in pixels, its square): beyond it intensities are under `cutoff`. Square -1: they all are."""
    square = (offset - math.log(cutoff) + math.log1p(-cutoff)) / sharpness
    return (min(math.sqrt(square), 1e9), min(square, 1e38)) if square >= 0 else (0.0, -1.0)


def _band(reach: float, height: int, width: int) -> int:
    """Pixels across a segment's band: at up to 45 degrees, `reach` is sqrt(2) reach along an axis."""
    return min(2 * math.ceil(math.sqrt(2) * min(reach, 1e6) + 1) + 1, max(height, width))


def _gaussian(blur_sigma: float, blur_taps: int) -> tuple[int, float, float]:
    """(radius, centre, falloff): weights centre * exp(-falloff * k^2) sum to 1; radius 0 is no blur."""
    radius = blur_taps // 2
    if blur_sigma <= 0 or radius == 0:
        return 0, 1.0, 0.0
    falloff = min(0.5 / blur_sigma**2 if blur_sigma > 1e-18 else 1e36, 1e36)
    return radius, 1.0 / math.fsum(math.exp(-falloff * k * k) for k in range(-radius, radius + 1)), falloff


def _tiling(height: int, width: int, halo: int) -> dict[str, Any] | None:
    """BLOCK_H, BLOCK_W, HALO, and tiles each way; None where no block has room for the halo."""
    if max(height, width) <= _SINGLE_TILE:
        block_h, block_w = (max(16, triton.next_power_of_2(side)) for side in (height, width))
        halo = 0
    elif halo <= 16:
        block_h = block_w = 32 if halo <= 4 else 64
    else:
        return None
    return {
        "BLOCK_H": block_h,
        "BLOCK_W": block_w,
        "HALO": halo,
        "tiles_y": triton.cdiv(height, block_h - 2 * halo),
        "tiles_x": triton.cdiv(width, block_w - 2 * halo),
    }


def _options(tiling: dict[str, Any]) -> dict[str, Any]:
    """Launch options: eight pixels a thread; four where one program has a whole sketch to get through."""
    pixels = tiling["BLOCK_H"] * tiling["BLOCK_W"]
    single = tiling["tiles_y"] * tiling["tiles_x"] == 1
    return {"num_warps": min(16, max(2, pixels // (128 if single else 256))), "enable_fp_fusion": True}


def _chunk(steps: int) -> int:
    return min(_CHUNK, max(16, triton.next_power_of_2(steps)))


def _lists(like: Tensor, programs: int, chunk: int) -> Tensor:
    return like.new_empty((programs, _FIELDS.value, chunk), dtype=torch.float32)


def _segment_dtype(steps: int) -> torch.dtype:
    return torch.int16 if steps <= 2**15 else torch.int32


def _bytes(pen_down: Tensor) -> Tensor:
    return pen_down.contiguous().view(torch.uint8)


def _lengths(lengths: Tensor | None, points: Tensor) -> Tensor:
    """`lengths`, or something that is never read in its place."""
    return points if lengths is None else lengths.contiguous()


def _wide_blur(image: Tensor, blur: tuple[int, float, float], dtype: torch.dtype) -> Tensor:
    """Both axes through memory; for radii that no block has room for."""
    _, height, width = image.shape
    across = torch.empty_like(image, dtype=torch.float32)
    blurred = torch.empty_like(image, dtype=dtype)
    grid = (triton.cdiv(image.numel(), 1024),)
    with torch.cuda.device_of(image):
        _wide_blur_kernel[grid](
            image, across, width, 1, image.numel(), *blur, BLOCK=1024, enable_fp_fusion=True
        )
        _wide_blur_kernel[grid](
            across, blurred, height, width, image.numel(), *blur, BLOCK=1024, enable_fp_fusion=True
        )
    return blurred


def _blur_plane(image: Tensor, blur: tuple[int, float, float]) -> Tensor:
    """The blurred plane in float32."""
    batch, height, width = image.shape
    tiling = _tiling(height, width, blur[0])
    if tiling is None:
        return _wide_blur(image, blur, torch.float32)
    blurred = torch.empty_like(image, dtype=torch.float32)
    tiles = batch * tiling["tiles_y"] * tiling["tiles_x"]
    with torch.cuda.device_of(image):
        _blur_kernel[(min(tiles, _MAX_PROGRAMS),)](
            image,
            blurred,
            height,
            width,
            tiles=tiles,
            centre=blur[1],
            falloff=blur[2],
            RADIUS=blur[0],
            **_options(tiling),
            **tiling,
        )
    return blurred


def _draw_images(
    points: Tensor,
    pen_down: Tensor,
    lengths: Tensor | None,
    height: int,
    width: int,
    sharpness: float,
    offset: float,
    blur: tuple[int, float, float],
    dtype: torch.dtype,
    save: bool,
    cutoff: float,
) -> tuple[Tensor, Tensor]:
    """(image, winners), intensities under `cutoff` dropped."""
    batch, steps = points.shape[:2]
    tiling = _tiling(height, width, blur[0])
    if tiling is None:
        plain = (0, 1.0, 0.0)
        image, winners = _draw_images(
            points, pen_down, lengths, height, width, sharpness, offset, plain, torch.float32, save, cutoff
        )
        return _wide_blur(image, blur, dtype) if image.numel() else image.to(dtype), winners
    image = points.new_empty((batch, height, width), dtype=dtype)
    winners = points.new_empty((batch if save else 0, height, width), dtype=_segment_dtype(steps))
    if image.numel() == 0:
        return image, winners
    tiles = batch * tiling["tiles_y"] * tiling["tiles_x"]
    programs, chunk = min(tiles, _MAX_PROGRAMS), _chunk(steps)
    reach, reach2 = _reach(sharpness, offset, cutoff)
    with torch.cuda.device_of(points):
        _draw_kernel[(programs,)](
            points.contiguous(),
            _bytes(pen_down),
            _lengths(lengths, points),
            image,
            winners,
            _lists(points, programs, chunk),
            steps,
            height,
            width,
            tiles=tiles,
            sharpness=sharpness,
            offset=offset,
            reach=reach,
            reach2=reach2,
            centre=blur[1],
            falloff=blur[2],
            HAS_LENGTHS=lengths is not None,
            SAVE=save,
            RADIUS=blur[0],
            CHUNK=chunk,
            **_options(tiling),
            **tiling,
        )
    return image, winners


def raster_fwd(
    points: Tensor,
    pen_down: Tensor,
    lengths: Tensor | None,
    height: int,
    width: int,
    sharpness: float,
    offset: float,
    blur_sigma: float,
    blur_taps: int,
    dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """(image [B, H, W] of `dtype`, winners [B, H, W] or, without `save`, [0, H, W])."""
    blur = _gaussian(blur_sigma, blur_taps)
    return _draw_images(
        points, pen_down, lengths, height, width, sharpness, offset, blur, dtype, save, _IMAGE_CUTOFF
    )


def _gather(
    gradient: Tensor,
    winners: Tensor,
    points: Tensor,
    pen_down: Tensor | None,
    lengths: Tensor | None,
    sharpness: float,
    offset: float,
    reach: float,
    of_ink: bool,
    dtype: torch.dtype,
) -> Tensor:
    """grad_points [B, T, 2] from the plane of the gradient of the ink (`of_ink`) or of d2."""
    batch, steps = points.shape[:2]
    height, width = winners.shape[1:]
    grad_points = torch.empty_like(points, dtype=dtype)
    groups = triton.cdiv(steps, _GROUP - 1)
    with torch.cuda.device_of(points):
        _gather_kernel[(batch * groups,)](
            gradient.contiguous(),
            winners.contiguous(),
            points.contiguous(),
            winners if pen_down is None else _bytes(pen_down),
            _lengths(lengths, points),
            grad_points,
            steps,
            height,
            width,
            groups,
            sharpness,
            offset,
            reach,
            _band(reach, height, width),
            HAS_LENGTHS=lengths is not None,
            EVERYWHERE=pen_down is None,
            OF_INK=of_ink,
            GROUP=_GROUP,
            LANES=_LANES,
            enable_fp_fusion=True,
        )
    return grad_points


def raster_bwd(
    grad: Tensor,
    points: Tensor,
    pen_down: Tensor,
    lengths: Tensor | None,
    segment: Tensor,
    sharpness: float,
    offset: float,
    blur_sigma: float,
    blur_taps: int,
) -> Tensor:
    """The gradient to the points [B, T, 2], in their dtype."""
    if points.numel() == 0:
        return torch.empty_like(points)
    reach, _ = _reach(sharpness, offset, _IMAGE_CUTOFF)
    return _points_gradient(
        grad.contiguous(), segment, points, pen_down, lengths, sharpness, offset, reach,
        _gaussian(blur_sigma, blur_taps), points.dtype,
    )  # fmt: skip


def _points_gradient(
    grad: Tensor,
    winners: Tensor,
    points: Tensor,
    pen_down: Tensor,
    lengths: Tensor | None,
    sharpness: float,
    offset: float,
    reach: float,
    blur: tuple[int, float, float],
    dtype: torch.dtype,
) -> Tensor:
    """grad_points [B, T, 2] from the gradient of the blurred image."""
    batch, steps = points.shape[:2]
    height, width = winners.shape[1:]
    if blur[0] == 0 or max(height, width) > _SINGLE_TILE or steps > _FUSED_STEPS:
        plane = _blur_plane(grad, blur) if blur[0] else grad
        return _gather(plane, winners, points, pen_down, lengths, sharpness, offset, reach, True, dtype)
    tiling = _tiling(height, width, blur[0])
    assert tiling is not None  # one tile has room for any blur
    grad_points = torch.empty_like(points, dtype=dtype)
    programs = min(batch, _MAX_PROGRAMS)
    with torch.cuda.device_of(points):
        _blur_gather_kernel[(programs,)](
            grad,
            winners.contiguous(),
            points.contiguous(),
            _bytes(pen_down),
            _lengths(lengths, points),
            grad_points,
            grad.new_empty((programs, height, width), dtype=torch.float32),
            batch,
            steps,
            height,
            width,
            sharpness,
            offset,
            reach,
            _band(reach, height, width),
            centre=blur[1],
            falloff=blur[2],
            HAS_LENGTHS=lengths is not None,
            RADIUS=blur[0],
            BLOCK_H=tiling["BLOCK_H"],
            BLOCK_W=tiling["BLOCK_W"],
            GROUP=_GROUP,
            LANES=_LANES,
            **_options(tiling),
        )
    return grad_points


def stroke_distance_fwd(
    points: Tensor, pen_down: Tensor, lengths: Tensor | None, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """(d2 [B, H, W] float32, segment [B, H, W] int32)."""
    batch, steps = points.shape[:2]
    distance2 = points.new_empty((batch, height, width), dtype=torch.float32)
    winners = points.new_empty((batch, height, width), dtype=torch.int32)
    if distance2.numel() == 0:
        return distance2, winners
    tiling = _tiling(height, width, 0)
    assert tiling is not None  # there is no blur
    tiles = batch * tiling["tiles_y"] * tiling["tiles_x"]
    programs, chunk = min(tiles, _MAX_PROGRAMS), _chunk(steps)
    with torch.cuda.device_of(points):
        _distance_kernel[(programs,)](
            points.contiguous(),
            _bytes(pen_down),
            _lengths(lengths, points),
            distance2,
            winners,
            _lists(points, programs, chunk),
            steps,
            height,
            width,
            tiling["tiles_y"],
            tiling["tiles_x"],
            tiles,
            HAS_LENGTHS=lengths is not None,
            BLOCK_H=tiling["BLOCK_H"],
            BLOCK_W=tiling["BLOCK_W"],
            CHUNK=chunk,
            **_options(tiling),
        )
    return distance2, winners


def stroke_distance_bwd(grad: Tensor, points: Tensor, segment: Tensor) -> Tensor:
    """The gradient to the points [B, T, 2], in their dtype. `segment` alone says which segments exist."""
    if points.numel() == 0:
        return torch.empty_like(points)
    return _gather(grad, segment, points, None, None, 1.0, 0.0, 1e9, False, points.dtype)


def raster_bce(
    points: Tensor,
    pen_down: Tensor,
    lengths: Tensor | None,
    target: Tensor | None,
    target_points: Tensor | None,
    target_pen_down: Tensor | None,
    target_lengths: Tensor | None,
    height: int,
    width: int,
    sharpness: float,
    offset: float,
    blur_sigma: float,
    blur_taps: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(loss [B], its gradient to the points [B, T, 2] or, without `need_grad`, [0, T, 2]), float32."""
    batch, steps = points.shape[:2]
    blur = _gaussian(blur_sigma, blur_taps)
    tiling = _tiling(height, width, blur[0] * (2 if need_grad else 1))
    if tiling is None and batch:
        return _bce_of_images(
            points, pen_down, lengths, target, target_points, target_pen_down, target_lengths, height, width,
            sharpness, offset, blur, need_grad,
        )  # fmt: skip
    if tiling is None or batch == 0:
        return (
            points.new_empty(batch, dtype=torch.float32),
            points.new_empty((0, steps, 2), dtype=torch.float32),
        )
    single = max(height, width) <= _SINGLE_TILE
    fused = need_grad and single and steps <= _FUSED_STEPS
    tiles_a_sketch = tiling["tiles_y"] * tiling["tiles_x"]
    tiles = batch * tiles_a_sketch
    programs = min(tiles, _MAX_PROGRAMS)
    chunk = _chunk(max(steps, 0 if target_points is None else target_points.shape[1]))
    reach, reach2 = _reach(sharpness, offset, _LOSS_CUTOFF)

    losses = points.new_empty((batch, tiles_a_sketch), dtype=torch.float32)
    planes = (programs if fused else batch if need_grad else 0, height, width)
    gradient = points.new_empty(planes, dtype=torch.float32)
    winners = points.new_empty(planes, dtype=_segment_dtype(steps))
    grad_points = points.new_empty((batch if need_grad else 0, steps, 2), dtype=torch.float32)
    with torch.cuda.device_of(points):
        _bce_kernel[(programs,)](
            points.contiguous(),
            _bytes(pen_down),
            _lengths(lengths, points),
            points if target is None else target.contiguous(),
            points if target_points is None else target_points.contiguous(),
            points if target_pen_down is None else _bytes(target_pen_down),
            _lengths(target_lengths, points),
            losses,
            gradient,
            winners,
            grad_points,
            _lists(points, programs, chunk),
            steps,
            0 if target_points is None else target_points.shape[1],
            height,
            width,
            tiles=tiles,
            sharpness=sharpness,
            offset=offset,
            reach=reach,
            reach2=reach2,
            band=_band(reach, height, width),
            centre=blur[1],
            falloff=blur[2],
            HAS_LENGTHS=lengths is not None,
            TARGET_STROKES=target is None,
            HAS_TARGET_LENGTHS=target_lengths is not None,
            BLUR_REST=offset > _REST_OFFSET,
            NEED_GRAD=need_grad,
            FUSED=fused,
            RADIUS=blur[0],
            CHUNK=chunk,
            GROUP=_GROUP,
            LANES=_LANES,
            **_options(tiling),
            **tiling,
        )
    loss = losses[:, 0] if tiles_a_sketch == 1 else losses.sum(1)
    if need_grad and not fused and steps:
        grad_points = _gather(
            gradient, winners, points, pen_down, lengths, sharpness, offset, reach, False, torch.float32
        )
    return loss, grad_points


def _bce_of_images(
    points: Tensor,
    pen_down: Tensor,
    lengths: Tensor | None,
    target: Tensor | None,
    target_points: Tensor | None,
    target_pen_down: Tensor | None,
    target_lengths: Tensor | None,
    height: int,
    width: int,
    sharpness: float,
    offset: float,
    blur: tuple[int, float, float],
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """raster_bce where the blur is too wide for a block: over whole images in memory."""

    scalars = (height, width, sharpness, offset, blur, torch.float32)
    image, winners = _draw_images(points, pen_down, lengths, *scalars, need_grad, _LOSS_CUTOFF)
    if target is None:
        assert target_points is not None  # one of the two is given
        assert target_pen_down is not None
        target, _ = _draw_images(
            target_points, target_pen_down, target_lengths, *scalars, False, _LOSS_CUTOFF
        )
    ink = image.clamp(1e-7, 1 - 1e-7)
    loss = -(target * ink.log() + (1 - target) * torch.log1p(-ink)).mean((1, 2))
    if not need_grad or points.numel() == 0:
        return loss, points.new_empty(
            (points.shape[0] if need_grad else 0, *points.shape[1:]), dtype=loss.dtype
        )
    slope = torch.where(image == ink, (1 - target) / (1 - ink) - target / ink, 0.0) / (height * width)
    reach, _ = _reach(sharpness, offset, _LOSS_CUTOFF)
    return loss, _points_gradient(
        slope, winners, points, pen_down, lengths, sharpness, offset, reach, blur, torch.float32
    )
