"""Triplet losses in Triton (definitions and schemas are in ops/triplet.py, the same mathematics in eager
PyTorch in kernels/reference/triplet.py).

Distances. A program sums a tile of D from differences in float32, one coordinate after the other, from
coordinates laid out [D, B]; nothing cancels, and equal rows give equal bits. Forward keeps D [B, B] while it
counts; backward forms it again.

All triplets. `counting` picks how the integers W are found:

pairs. A program takes an anchor and a block of columns j and walks all k: some twelve instructions each.
tree. One program an anchor at a time, its row in registers, O(B log B) an anchor:
    1. sort the columns by distance; by binary search, how many each has in reach of its own distance plus
       margin, and how many do not reach it: both are thresholds of the rank, as rounding is monotone.
    2. sort the ranks by the teacher. What is to be counted is then "among the first x of this sequence, how
       many ranks are below t", for two t a column and x the end of the lower teacher distances and of the
       equal ones (where no two are equal the second follows from the first).
    3. answer these for all columns at once down a wavelet tree of the sequence. Ranks are a permutation of
       0..N-1, so that a node of any level is as long as its values span and starts where they do; a level is
       one running count, one look-up a question and one stable split.
    With s = sign(teacher_k - teacher_j) an active pair counts 1 + s times: 2 if strict, 1 for a tie. The
    anchor, columns past the end and NaN distances sort last and are out of every count.

Estimated for an H200 from the instructions of the cubins, without distances, not measured: pairs 2, 7, 55,
440 us at B = 128, 256, 512, 1024; tree 70, 450, 1200, 4500 us at B = 1024, 2048, 4096, 8192 (its last step
twice where teacher distances are equal). Above _TREE_MOST columns, which no program can hold, pairs again.

Sampled and chosen triplets leave two entries each, (anchor, column, coefficient). Gradients are sums over the
entries of a row, the gallery's after a stable sort by column: a fixed order and no atomics.

Nothing waits for the host, and no size depends on a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_MULTIPROCESSORS = 132  # of an H100 or H200
_TREE_MOST = 8192  # the most columns one program holds
_TREE_ENTRIES = 8  # of a row, for each thread of the tree
_SCRATCH = tl.constexpr(5)  # rows of N integers a program of the tree keeps in memory
_COUNT_TILE = (64, 32)  # columns j and k
_UNROLL = {16: 16, 32: 8, 64: 4}  # by tile: coordinates, or rows, between two looks at a loop's end
_ENTRIES, _WIDTH = 32, 128  # entries and coordinates a program looks at together
_LINE = 1024  # of a row that is only walked
_SPARE_BITS = {torch.float16: 13, torch.bfloat16: 16}  # of a float32, that hold nothing of such a number


def counting(batch: int, tree_from: int) -> str:
    """How all triplets of a batch are counted: "tree" from `tree_from` on where a program holds a row, else
    "pairs"."""
    return "tree" if tree_from <= batch <= _TREE_MOST else "pairs"


# --- elements -----------------------------------------------------------------------------------------------


@triton.jit
def _wide(index):
    """`index` as int64."""
    return tl.full((), 0, tl.int64) + index


@triton.jit
def _teacher_line(teacher, indices, anchor, rows, row_stride, HAS_INDICES: tl.constexpr):
    """Where the anchor's row of the teacher begins."""
    line = _wide(anchor)
    if HAS_INDICES:
        line = tl.minimum(tl.maximum(tl.load(indices + line), 0), _wide(rows) - 1)
    return teacher + line * row_stride


@triton.jit
def _teacher_at(line, indices, column, inside, rows, column_stride, HAS_INDICES: tl.constexpr):
    """The teacher's distances to these columns, in the dtype they are compared in; 0 where not `inside`."""
    place = _wide(column)
    if HAS_INDICES:
        place = tl.load(indices + place, mask=inside, other=0)
        place = tl.minimum(tl.maximum(place, 0), _wide(rows) - 1)
    value = tl.load(line + place * column_stride, mask=inside, other=0.0)
    if line.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    return value


@triton.jit
def _hinge(drawn, pushed, active, margin):
    """margin + drawn - pushed in float64 where active or NaN, else 0."""
    gap = drawn.to(tl.float64) - pushed.to(tl.float64) + margin
    return tl.where(active | (gap != gap), gap, 0.0)


@triton.jit
def _sampled_pair(seed, anchor, sample, batch):
    """j and k, int32, of an anchor's samples: csrc/triplet_math.h."""
    zero = sample * 0
    first, second, _, _ = tl.philox(seed, zero + anchor, sample, zero, zero)
    j = tl.umulhi(first, (zero + (batch - 1)).to(tl.uint32)).to(tl.int32)
    j += (j >= anchor).to(tl.int32)
    k = tl.umulhi(second, (zero + (batch - 2)).to(tl.uint32)).to(tl.int32)
    k += (k >= tl.minimum(anchor, j)).to(tl.int32)
    k += (k >= tl.maximum(anchor, j)).to(tl.int32)
    return j, k


# --- distances and gradients of whole matrices --------------------------------------------------------------


@triton.jit
def _distance_tile(
    query, gallery, out, row, column, stride, dims, SQUARED: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """D [rows, columns] from coordinates laid out [D, B], both padded: see `by_coordinate`."""
    # Zeros from a load that never happens: sums take the layout of loads, which gives a thread several rows
    # and columns, so that what it reads of either serves many sums.
    total = tl.load(out, mask=tl.zeros(out.shape, tl.int32) + dims < 0, other=0.0)
    x_place = query + row
    y_place = gallery + column
    for _ in range(0, dims, UNROLL):
        for step in tl.static_range(UNROLL):
            gap = tl.load(x_place + step * stride)[:, None] - tl.load(y_place + step * stride)[None, :]
            total += gap * gap
        x_place += UNROLL * stride
        y_place += UNROLL * stride
    if not SQUARED:
        total = tl.sqrt_rn(total)
    return total


@triton.jit
def _distance_kernel(
    query, gallery, dist, batch, stride, dims, blocks,
    SQUARED: tl.constexpr, UNROLL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """D [B, B]. One program a tile."""
    program = tl.program_id(0).to(tl.int64)
    row = (program // blocks) * TILE + tl.arange(0, TILE)
    column = (program % blocks) * TILE + tl.arange(0, TILE)
    out = dist + (row * batch)[:, None] + column[None, :]
    here = _distance_tile(query, gallery, out, row, column, _wide(stride), dims, SQUARED, UNROLL)
    tl.store(out, here, mask=(row < batch)[:, None] & (column < batch)[None, :])


@triton.jit
def _coefficient_kernel(
    scale, weights, query, gallery, coefficients, batch, stride, dims, blocks,
    SQUARED: tl.constexpr, UNROLL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """scale * W / D, what (query_i - gallery_j) counts for in the gradients, [stride, stride]; 0 where D is
    and in the padding."""
    program = tl.program_id(0).to(tl.int64)
    row = (program // blocks) * TILE + tl.arange(0, TILE)
    column = (program % blocks) * TILE + tl.arange(0, TILE)
    inside = (row < batch)[:, None] & (column < batch)[None, :]
    weight = tl.load(weights + (row * batch)[:, None] + column[None, :], mask=inside, other=0)
    out = coefficients + (row * stride)[:, None] + column[None, :]
    here = weight.to(tl.float32) * tl.load(scale)
    if SQUARED:
        here = here * 2.0
    else:
        dist = _distance_tile(query, gallery, out, row, column, _wide(stride), dims, SQUARED, UNROLL)
        live = (weight != 0) & (dist != 0.0)
        here = tl.where(live, here / tl.where(live, dist, 1.0), 0.0)
    tl.store(out, here)


@triton.jit
def _gradient_rows(
    coefficients, own, other, out, block, axis, batch, dims, own_stride, other_stride,
    UNROLL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The sum of coefficient * (own - other) over all of the other side, of a block of rows."""
    row = block * TILE + tl.arange(0, TILE)
    inside = (row < batch)[:, None] & (axis < dims)[None, :]
    place = (row * dims)[:, None] + axis[None, :]
    x = tl.load(own + place, mask=inside, other=0.0)
    total = tl.zeros(x.shape, tl.float32)
    factors = coefficients + row * own_stride
    for first in range(0, batch, UNROLL):
        part = tl.zeros(x.shape, tl.float32)  # sums of sums: less rounding than in one long sum
        for step in tl.static_range(UNROLL):
            factor = tl.load(factors + step * other_stride)
            line = _wide(tl.minimum(first + step, batch - 1))  # past the end the coefficients are 0
            y = tl.load(other + line * dims + axis, mask=axis < dims, other=0.0)
            part += factor[:, None] * (x - y[None, :])
        total += part
        factors += UNROLL * other_stride
    tl.store(out + place, total, mask=inside)


@triton.jit
def _gradient_kernel(
    coefficients, query, gallery, query_grad, gallery_grad, batch, stride, dims, blocks, axis_blocks,
    UNROLL: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Both gradients. One program a block of rows and coordinates, the query's first."""
    program = tl.program_id(0).to(tl.int64)
    axis = (program % axis_blocks) * WIDTH + tl.arange(0, WIDTH)
    block = program // axis_blocks
    line = _wide(stride)
    if block < blocks:
        _gradient_rows(
            coefficients, query, gallery, query_grad, block, axis, batch, dims, line, 1, UNROLL, TILE
        )
    else:
        _gradient_rows(
            coefficients, gallery, query, gallery_grad, block - blocks, axis, batch, dims, 1, line, UNROLL,
            TILE,
        )  # fmt: skip


# --- all triplets -------------------------------------------------------------------------------------------


@triton.jit
def _count_kernel(
    dist, teacher, indices, weights, parts, batch, rows, row_stride, column_stride, margin, blocks,
    HAS_INDICES: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W of an anchor and a block of columns, against all columns; and their share of the loss."""
    program = tl.program_id(0).to(tl.int64)
    anchor = program // blocks
    j = (program % blocks) * BLOCK_J + tl.arange(0, BLOCK_J)
    j_in = (j < batch) & (j != anchor)
    line = _teacher_line(teacher, indices, anchor, rows, row_stride, HAS_INDICES)
    dist_j = tl.load(dist + anchor * batch + j, mask=j_in, other=float("nan"))
    teacher_j = _teacher_at(line, indices, j, j_in, rows, column_stride, HAS_INDICES)
    reach_j = dist_j + margin
    drawn = tl.zeros((BLOCK_J, BLOCK_K), tl.int32)
    pushed = tl.zeros((BLOCK_J, BLOCK_K), tl.int32)
    for first in range(0, batch, BLOCK_K):
        k = _wide(first) + tl.arange(0, BLOCK_K)
        k_in = (k < batch) & (k != anchor)
        # A NaN is active with nothing.
        dist_k = tl.load(dist + anchor * batch + k, mask=k_in, other=float("nan"))
        teacher_k = _teacher_at(line, indices, k, k_in, rows, column_stride, HAS_INDICES)
        below = teacher_j[:, None] < teacher_k[None, :]
        above = teacher_j[:, None] > teacher_k[None, :]
        times = tl.where(below, 2, tl.where(above, 0, 1))
        drawn += tl.where(reach_j[:, None] > dist_k[None, :], times, 0)
        pushed += tl.where((dist_k + margin)[None, :] > dist_j[:, None], 2 - times, 0)
    # j against itself, a tie, is in both sums where a distance is below itself plus margin.
    itself = (reach_j > dist_j).to(tl.int32)
    out = tl.sum(drawn, 1) - itself
    weight = out - tl.sum(pushed, 1) + itself
    tl.store(weights + anchor * batch + j, weight, mask=j < batch)
    idle = (j_in == 0) | ((weight == 0) & (tl.abs(dist_j) == float("inf")))
    terms = weight.to(tl.float64) * tl.where(idle, 0.0, dist_j).to(tl.float64)
    active = tl.sum(out.to(tl.int64), 0).to(tl.float64)
    tl.store(parts + program, tl.sum(terms, 0) + active * margin)


@triton.jit
def _ordered(value):
    """Integers in the order of the values, of as few bits as these differ in: int32, for float64 int64."""
    value = tl.where(value == 0.0, 0.0, value)  # -0 is 0
    if value.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    else:
        bits = value.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return key


@triton.jit
def _running(x):
    """The running sum of a power of two of integers. By lines of 128 first, which are a warp's: one scan over
    them all would pass every warp's total through every thread."""
    LINES: tl.constexpr = max(1, x.shape[0] // 128)
    lines = tl.reshape(x, (LINES, x.shape[0] // LINES))
    totals = tl.sum(lines, 1)
    line = tl.arange(0, LINES)
    before = tl.sum(tl.where(line[None, :] < line[:, None], totals[None, :], 0), 1)
    return tl.reshape(tl.cumsum(lines, 1) + before[:, None], x.shape)


@triton.jit
def _sort(key, value, valid, keys, values):
    """(key, value) in the order of the keys, stable, those not valid behind the rest and of one key.

    Radix of two bits a pass, from the least: four running counts in the fields of one int64. Passes go as far
    as the keys, less the least of them, reach. The keys are left in memory too.
    """
    place = tl.arange(0, key.shape[0])
    if key.dtype == tl.int64:
        least = tl.min(tl.where(valid, key, 0x7FFFFFFFFFFFFFFF), 0)
        largest = tl.max(tl.where(valid, key, -0x8000000000000000), 0)
    else:
        least = tl.min(tl.where(valid, key, 0x7FFFFFFF), 0)
        largest = tl.max(tl.where(valid, key, -0x80000000), 0)
    # Unsigned differences; no NaN is valid, so that they stay below the last integer. Where nothing is valid
    # all keys are the same, and the one pass keeps the order.
    span = largest - least + 1
    key = tl.where(valid, key - least, span)
    if key.dtype == tl.int64:
        left = span.to(tl.uint64)
    else:
        left = span.to(tl.uint32)
    shift = 0
    more = True
    while more:
        field = (((key >> shift) & 3) * 16).to(tl.int64)
        one = tl.full((), 1, tl.int64) << field
        count = _running(one)
        total = tl.sum(one, 0)
        before = (total << 16) + (total << 32) + (total << 48)
        target = (((count + before) >> field) & 0xFFFF).to(tl.int32) - 1
        tl.store(keys + target, key)
        tl.store(values + target, value)
        tl.debug_barrier()  # entries are read by other threads than wrote them
        key = tl.load(keys + place)
        value = tl.load(values + place)
        tl.debug_barrier()  # and are overwritten next
        shift += 2
        left = left >> 2
        more = left > 0
    return key, value


@triton.jit
def _thresholds(dist, margin, real, N: tl.constexpr):
    """Of distances in rising order, infinite from `real` on: how many each has in reach, dist_k < dist_j +
    margin, and how many do not reach it, dist_j + margin <= dist_k."""
    reach = dist + margin
    below = tl.zeros((N,), tl.int32)
    short = tl.zeros((N,), tl.int32)
    step = N // 2
    while step > 0:
        below += tl.where(tl.gather(dist, below + (step - 1), 0) < reach, step, 0)
        short += tl.where(tl.gather(reach, short + (step - 1), 0) <= dist, step, 0)
        step = step // 2
    return below, tl.minimum(short, real)


@triton.jit
def _equal_runs(key, keys, starts, N: tl.constexpr):
    """First and one past the last place of the run of equal keys that a place of the sorted keys is in."""
    place = tl.arange(0, N)
    before = tl.load(keys + place - 1, mask=place > 0, other=0)
    begins = (place == 0) | (key != before)
    run = _running(begins.to(tl.int32)) - 1
    runs = tl.sum(begins.to(tl.int32), 0)
    tl.store(starts + run, place, mask=begins)
    tl.debug_barrier()
    first = tl.load(starts + run)
    last = tl.load(starts + run + 1, mask=run + 1 < runs, other=N)
    tl.debug_barrier()
    return first, last


@triton.jit
def _descend(zeros, half, state, threshold):
    """One level down to the node that the threshold leads to. `state`: how much of the prefix is in the node,
    and, above 16 bits, how much of it was found to be below the threshold. Half of any node are zeros."""
    prefix = state & 0xFFFF
    start = threshold & -(2 * half)
    here = tl.gather(zeros, tl.maximum(start + prefix - 1, 0), 0) - start // 2
    here = tl.where(prefix > 0, here, 0)
    return state + tl.where((threshold & half) != 0, (here << 16) - here, here - prefix)


@triton.jit
def _count_below(sequence, prefix, thresholds, values, N: tl.constexpr):
    """How many of the first `prefix` of the sequence, a permutation of 0..N-1, are below either of two
    thresholds < N; thresholds and counts have 16 bits each of an int32, which saves registers."""
    place = tl.arange(0, N)
    first = prefix
    second = prefix
    half = N // 2
    while half > 0:
        zero = (sequence & half) == 0
        zeros = _running(zero.to(tl.int32))
        first = _descend(zeros, half, first, thresholds & 0xFFFF)
        second = _descend(zeros, half, second, thresholds >> 16)
        start = place & -(2 * half)
        rank = zeros - start // 2  # of the zeros of its node, this place included
        target = tl.where(zero, start + rank - 1, half + place - rank)
        tl.store(values + target, sequence)
        tl.debug_barrier()
        sequence = tl.load(values + place)
        tl.debug_barrier()
        half = half // 2
    return (first >> 16) + (second & 0x7FFF0000)


@triton.jit
def _tree_kernel(
    dist, teacher, indices, weights, parts, key_scratch, scratch, batch, rows, row_stride, column_stride,
    margin, programs, HAS_INDICES: tl.constexpr, SHIFT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """W of whole anchors and their share of the loss. SHIFT: bits of a float32 the teacher's dtype lacks.

    What waits is kept in `scratch`, so that sorts and counts have the registers.
    """
    program = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, N)
    keys = key_scratch + program * N
    values = scratch + program * (_SCRATCH * N)
    starts = values + N
    columns = values + 2 * N
    ranks = values + 3 * N
    running = values + 4 * N
    for anchor in range(tl.program_id(0), batch, programs):
        line = _wide(anchor) * batch
        # 1. columns in the order of their distance
        own = tl.load(dist + line + place, mask=place < batch, other=0.0)
        exists = (place < batch) & (place != anchor) & (own == own)
        real = tl.sum(exists.to(tl.int32), 0)
        _, column = _sort(_ordered(own), place, exists, starts, values)
        tl.store(columns + place, column)
        # 2. their ranks in the order of the teacher
        from_teacher = _teacher_line(teacher, indices, anchor, rows, row_stride, HAS_INDICES)
        far = _teacher_at(from_teacher, indices, column, place < real, rows, column_stride, HAS_INDICES)
        ordered = (place < real) & (far == far)
        count = tl.sum(ordered.to(tl.int32), 0)
        tl.store(running + place, _running(ordered.to(tl.int32)))
        key, rank = _sort(_ordered(far) >> SHIFT, place, ordered, keys, values)
        tl.store(ranks + place, rank)
        lower, upper = _equal_runs(key, keys, starts, N)
        ties = tl.max(tl.where(place < count, upper - lower, 0), 0) > 1
        # 3. counts below the thresholds, up to `lower` and up to `upper` together
        column = tl.load(columns + place)
        near = tl.load(dist + line + column, mask=place < real, other=float("inf"))
        first, second = _thresholds(near, margin, real, N)
        thresholds = tl.gather(first + (second << 16), rank, 0)
        counts = _count_below(rank, lower, thresholds, values, N)
        rank = tl.load(ranks + place)
        first = thresholds & 0xFFFF
        second = thresholds >> 16
        if ties:
            lower, upper = _equal_runs(tl.load(keys + place), keys, starts, N)
            counts += _count_below(rank, upper, thresholds, values, N)
            rank = tl.load(ranks + place)
        else:  # between them is only the column itself
            counts += counts + (rank < first).to(tl.int32) + ((rank < second).to(tl.int32) << 16)
        first_count = counts & 0xFFFF
        second_count = counts >> 16
        # what the whole sequence has below each threshold
        first_all = tl.load(running + first - 1, mask=first > 0, other=0)
        second_all = tl.load(running + second - 1, mask=second > 0, other=0)
        lower, upper = _equal_runs(tl.load(keys + place), keys, starts, N)
        # drawn near: those in reach, once; those with a greater teacher distance once more, with a lower less
        ordered = place < count
        drawn = first + tl.where(ordered, first_all - first_count, 0)
        pushed = (real - second) + tl.where(ordered, lower + upper - count + second_all - second_count, 0)
        exists = rank < real
        drawn = tl.where(exists, drawn - (rank < first).to(tl.int32), 0)
        pushed = tl.where(exists, pushed - (rank >= second).to(tl.int32), 0)
        weight = drawn - pushed
        column = tl.load(columns + rank)
        tl.store(weights + line + column, weight, mask=column < batch)
        here = tl.load(dist + line + column, mask=exists & (weight != 0), other=0.0)
        terms = weight.to(tl.float64) * here.to(tl.float64)
        active = tl.sum(drawn.to(tl.int64), 0).to(tl.float64)
        part = tl.sum(terms, 0) + active * margin
        tl.store(parts + anchor, tl.where(real == batch - 1, part, float("nan")))
        tl.debug_barrier()  # the next anchor takes the scratch


# --- sampled triplets ---------------------------------------------------------------------------------------


@triton.jit
def _line_distances(
    query, gallery, anchor, column, inside, dims, SQUARED: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """D of one anchor and the columns, float32; rows as they are, [B, D]."""
    total = tl.zeros((column.shape[0], WIDTH), tl.float32)
    for first in range(0, dims, WIDTH):
        axis = first + tl.arange(0, WIDTH)
        x = tl.load(query + _wide(anchor) * dims + axis, mask=axis < dims, other=0.0)
        place = (_wide(column) * dims)[:, None] + axis[None, :]
        y = tl.load(gallery + place, mask=inside[:, None] & (axis < dims)[None, :], other=0.0)
        gap = x[None, :] - y
        total += gap * gap
    here = tl.sum(total, 1)
    if not SQUARED:
        here = tl.sqrt_rn(here)
    return here


@triton.jit
def _drawn_and_pushed(
    teacher, indices, anchor, j, k, inside, rows, row_stride, column_stride, HAS_INDICES: tl.constexpr
):  # fmt: skip
    """Whether the teacher has j as near as k: then j is drawn near and k pushed off."""
    line = _teacher_line(teacher, indices, anchor, rows, row_stride, HAS_INDICES)
    teacher_j = _teacher_at(line, indices, j, inside, rows, column_stride, HAS_INDICES)
    teacher_k = _teacher_at(line, indices, k, inside, rows, column_stride, HAS_INDICES)
    return teacher_j <= teacher_k


@triton.jit
def _sampled_kernel(
    query, gallery, teacher, indices, seed, active, parts, batch, dims, rows, row_stride, column_stride,
    margin, samples, blocks,
    HAS_INDICES: tl.constexpr, SQUARED: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """R of the active triplets of an anchor and a block of samples, and their share of the loss."""
    program = tl.program_id(0).to(tl.int64)
    anchor = (program // blocks).to(tl.int32)
    sample = (program % blocks).to(tl.int32) * ENTRIES + tl.arange(0, ENTRIES)
    inside = sample < samples
    j, k = _sampled_pair(tl.load(seed), anchor, sample, batch)
    nearer = _drawn_and_pushed(
        teacher, indices, anchor, j, k, inside, rows, row_stride, column_stride, HAS_INDICES
    )
    dist_j = _line_distances(query, gallery, anchor, j, inside, dims, SQUARED, WIDTH)
    dist_k = _line_distances(query, gallery, anchor, k, inside, dims, SQUARED, WIDTH)
    drawn = tl.where(nearer, dist_j, dist_k)
    pushed = tl.where(nearer, dist_k, dist_j)
    is_active = inside & (drawn + margin > pushed)
    sign = tl.where(is_active, tl.where(nearer, 1, -1), 0)
    tl.store(active + _wide(anchor) * samples + sample, sign.to(tl.int8), mask=inside)
    terms = tl.where(inside, _hinge(drawn, pushed, is_active, margin), 0.0)
    tl.store(parts + program, tl.sum(terms, 0))


@triton.jit
def _sampled_matrix_kernel(
    dist, teacher, indices, seed, weights, parts, batch, rows, row_stride, column_stride, margin, samples,
    HAS_INDICES: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Adds an anchor's sampled triplets to W, by atomics on integers, and sums their share of the loss."""
    anchor = tl.program_id(0)
    line = _wide(anchor) * batch
    key = tl.load(seed)
    total = tl.zeros((ENTRIES,), tl.float64)
    for first in range(0, samples, ENTRIES):
        sample = first + tl.arange(0, ENTRIES)
        inside = sample < samples
        j, k = _sampled_pair(key, anchor, sample, batch)
        nearer = _drawn_and_pushed(
            teacher, indices, anchor, j, k, inside, rows, row_stride, column_stride, HAS_INDICES
        )
        near = tl.where(nearer, j, k)
        far = tl.where(nearer, k, j)
        drawn = tl.load(dist + line + near, mask=inside, other=0.0)
        pushed = tl.load(dist + line + far, mask=inside, other=0.0)
        is_active = inside & (drawn + margin > pushed)
        one = is_active.to(tl.int32)
        tl.atomic_add(weights + line + near, one, mask=is_active, sem="relaxed")
        tl.atomic_add(weights + line + far, -one, mask=is_active, sem="relaxed")
        total += tl.where(inside, _hinge(drawn, pushed, is_active, margin), 0.0)
    tl.store(parts + anchor, tl.sum(total, 0))


# --- pairs --------------------------------------------------------------------------------------------------


@triton.jit
def _negatives(labels, anchor, column, batch, HAS_LABELS: tl.constexpr):
    """Which of the columns are negatives of the anchor."""
    inside = column < batch
    if HAS_LABELS:
        other = tl.load(labels + column, mask=inside, other=0) != tl.load(labels + anchor)
    else:
        other = column != anchor
    return inside & other


@triton.jit
def _all_pairs_kernel(
    dist, labels, weights, parts, counts, batch, margin, HAS_LABELS: tl.constexpr, LINE: tl.constexpr
):  # fmt: skip
    """W of an anchor against all its negatives, how many these are, and their share of the loss."""
    anchor = tl.program_id(0).to(tl.int64)
    line = anchor * batch
    own = tl.load(dist + line + anchor)
    total = tl.zeros((LINE,), tl.float64)
    active_count = tl.zeros((LINE,), tl.int32)
    count = tl.zeros((LINE,), tl.int32)
    for first in range(0, batch, LINE):
        column = _wide(first) + tl.arange(0, LINE)
        allowed = _negatives(labels, anchor, column, batch, HAS_LABELS)
        here = tl.load(dist + line + column, mask=allowed, other=0.0)
        active = allowed & (own + margin > here)
        total += tl.where(allowed, _hinge(own, here, active, margin), 0.0)
        active_count += active.to(tl.int32)
        count += allowed.to(tl.int32)
        here_weight = -active.to(tl.int32)
        tl.store(weights + line + column, here_weight, mask=(column < batch) & (column != anchor))
    tl.store(weights + line + anchor, tl.sum(active_count, 0))
    tl.store(parts + anchor, tl.sum(total, 0))
    tl.store(counts + anchor, tl.sum(count, 0))


@triton.jit
def _finish_pair(own, other, chosen, margin, state, parts, counts, anchor):
    """Writes what an anchor's one triplet leaves; `chosen` -1: it has none."""
    exists = chosen >= 0
    active = exists & (own + margin > other)
    tl.store(state + anchor, tl.where(active, chosen, -1).to(tl.int32))
    tl.store(parts + anchor, tl.where(exists, _hinge(own, other, active, margin), 0.0))
    tl.store(counts + anchor, exists.to(tl.int32))


@triton.jit
def _nearest_pair_kernel(
    dist, labels, state, parts, counts, batch, margin,
    HAS_LABELS: tl.constexpr, SEMIHARD: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """The negative of least distance, the lowest of equal ones; the first where none is below infinity."""
    anchor = tl.program_id(0).to(tl.int64)
    line = anchor * batch
    own = tl.load(dist + line + anchor)
    least = tl.full((LINE,), float("inf"), tl.float32)
    nearest = tl.full((LINE,), 0, tl.int64) + batch
    lowest = nearest
    for first in range(0, batch, LINE):
        column = _wide(first) + tl.arange(0, LINE)
        allowed = _negatives(labels, anchor, column, batch, HAS_LABELS)
        here = tl.load(dist + line + column, mask=allowed, other=float("inf"))
        if SEMIHARD:
            allowed = allowed & (here > own) & (own + margin > here)
        better = allowed & (here < least)
        least = tl.where(better, here, least)
        nearest = tl.where(better, column, nearest)
        lowest = tl.where(allowed, tl.minimum(lowest, column), lowest)
    best = tl.min(least, 0)
    chosen = tl.min(tl.where(least == best, nearest, batch), 0)
    chosen = tl.where(best < float("inf"), chosen, tl.min(lowest, 0))
    chosen = tl.where(chosen < batch, chosen, -1)
    other = tl.load(dist + line + tl.maximum(chosen, 0))
    _finish_pair(own, other, chosen, margin, state, parts, counts, anchor)


@triton.jit
def _random_pair_kernel(
    query, gallery, labels, seed, state, parts, counts, batch, dims, margin,
    HAS_LABELS: tl.constexpr, SQUARED: tl.constexpr, LINE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One of the anchor's negatives by the generator; only its distance and the anchor's own are formed."""
    anchor = tl.program_id(0).to(tl.int64)
    count = tl.zeros((LINE,), tl.int32)
    for first in range(0, batch, LINE):
        column = _wide(first) + tl.arange(0, LINE)
        count += _negatives(labels, anchor, column, batch, HAS_LABELS).to(tl.int32)
    negatives = tl.sum(count, 0)
    zero = anchor.to(tl.int32) * 0
    word, _, _, _ = tl.philox(tl.load(seed), anchor.to(tl.int32), zero, zero, zero)
    goal = tl.umulhi(word, negatives.to(tl.uint32)).to(tl.int32)
    passed = zero
    chosen = _wide(0) - 1
    for first in range(0, batch, LINE):
        column = _wide(first) + tl.arange(0, LINE)
        allowed = _negatives(labels, anchor, column, batch, HAS_LABELS).to(tl.int32)
        rank = passed + tl.cumsum(allowed, 0) - 1
        found = (allowed != 0) & (rank == goal)
        chosen = tl.maximum(chosen, tl.max(tl.where(found, column, -1), 0))
        passed += tl.sum(allowed, 0)
    pair = tl.arange(0, 2)
    column = tl.where(pair == 0, anchor, tl.maximum(chosen, 0))
    here = _line_distances(query, gallery, anchor, column, pair >= 0, dims, SQUARED, WIDTH)
    own = tl.sum(tl.where(pair == 0, here, 0.0), 0)
    other = tl.sum(tl.where(pair == 1, here, 0.0), 0)
    _finish_pair(own, other, chosen, margin, state, parts, counts, anchor)


# --- loss, and gradients of entries -------------------------------------------------------------------------


@triton.jit
def _finish_kernel(parts, counts, loss, considered, size, divisor, COUNTED: tl.constexpr, LINE: tl.constexpr):
    """The sum of the parts, in one order, over the divisor or (COUNTED) the sum of the counts."""
    total = tl.zeros((LINE,), tl.float64)
    count = tl.zeros((LINE,), tl.int64)
    for first in range(0, size, LINE):
        place = _wide(first) + tl.arange(0, LINE)
        total += tl.load(parts + place, mask=place < size, other=0.0)
        if COUNTED:
            count += tl.load(counts + place, mask=place < size, other=0).to(tl.int64)
    below = _wide(divisor)
    if COUNTED:
        below = tl.sum(count, 0)
        tl.store(considered, below)
        below = tl.maximum(below, 1)
    tl.store(loss, (tl.sum(total, 0) / below.to(tl.float64)).to(tl.float32))


@triton.jit
def _entry_coefficients(
    scale, sign, query, gallery, anchor, column, inside, dims, SQUARED: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """What (query - gallery) of an entry counts for in the gradients; 0 where its distance is."""
    factor = tl.load(scale) * sign.to(tl.float32)
    if SQUARED:
        factor = factor * 2.0
    else:
        here = _line_distances(query, gallery, anchor, column, inside, dims, SQUARED, WIDTH)
        live = here != 0.0
        factor = tl.where(live, factor / tl.where(live, here, 1.0), 0.0)
    return factor


@triton.jit
def _entry_kernel(
    scale, active, seed, query, gallery, columns, coefficients, batch, dims, samples, blocks,
    CHOSEN: tl.constexpr, SQUARED: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The entries [B, 2, samples] of an anchor and a block of samples; column `batch` where not active.

    CHOSEN: `active` is the anchor's one negative, or -1. Else R of its sampled triplets.
    """
    program = tl.program_id(0).to(tl.int64)
    anchor = (program // blocks).to(tl.int32)
    sample = (program % blocks).to(tl.int32) * ENTRIES + tl.arange(0, ENTRIES)
    inside = sample < samples
    state = tl.load(active + _wide(anchor) * samples + sample, mask=inside, other=0).to(tl.int32)
    if CHOSEN:
        j = sample * 0 + anchor
        k = state
        sign = (inside & (state >= 0)).to(tl.int32)
    else:
        j, k = _sampled_pair(tl.load(seed), anchor, sample, batch)
        sign = state
    live = inside & (sign != 0)
    to_j = _entry_coefficients(scale, sign, query, gallery, anchor, j, live, dims, SQUARED, WIDTH)
    to_k = _entry_coefficients(scale, -sign, query, gallery, anchor, k, live, dims, SQUARED, WIDTH)
    entry = _wide(anchor) * 2 * samples + sample
    tl.store(columns + entry, tl.where(live, j, batch), mask=inside)
    tl.store(columns + entry + samples, tl.where(live, k, batch), mask=inside)
    tl.store(coefficients + entry, tl.where(live, to_j, 0.0), mask=inside)
    tl.store(coefficients + entry + samples, tl.where(live, to_k, 0.0), mask=inside)


@triton.jit
def _entry_gradient_kernel(
    columns, coefficients, order, offsets, own, other, out, batch, dims, entries, blocks,
    GALLERY: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of a row, a block of its coordinates: the sum of coefficient * (own - other) over its
    entries. Of `entries` an anchor, they are the query's in turn; the gallery's in `order` by `offsets`."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    axis = (program % blocks) * WIDTH + tl.arange(0, WIDTH)
    axis_in = axis < dims
    if GALLERY:
        begin = tl.load(offsets + row)
        end = tl.load(offsets + row + 1)
    else:
        begin = row * entries
        end = begin + entries
    x = tl.load(own + row * dims + axis, mask=axis_in, other=0.0)
    total = tl.zeros((ENTRIES, WIDTH), tl.float32)
    for first in range(begin, end, ENTRIES):
        place = first + tl.arange(0, ENTRIES)
        inside = place < end
        if GALLERY:
            entry = tl.load(order + place, mask=inside, other=0)
            partner = entry // entries
        else:
            entry = place
            partner = tl.load(columns + entry, mask=inside, other=0).to(tl.int64)
            inside = inside & (partner < batch)
        factor = tl.load(coefficients + entry, mask=inside, other=0.0)
        place = (partner * dims)[:, None] + axis[None, :]
        y = tl.load(other + place, mask=inside[:, None] & axis_in[None, :], other=0.0)
        total += factor[:, None] * (x[None, :] - y)
    tl.store(out + row * dims + axis, tl.sum(total, 0), mask=axis_in)


# --- launchers ----------------------------------------------------------------------------------------------


class _Teacher:
    """The teacher as kernels take it: rows of the batch, read in place."""

    def __init__(self, teacher: Tensor, indices: Tensor | None) -> None:
        self.matrix = teacher
        self.pointers = teacher, teacher if indices is None else indices
        self.extents = teacher.shape[0], *teacher.stride()
        self.has_indices = indices is not None


def _tile(programs: Callable[[int], int]) -> int:
    """The largest side of a tile that keeps every multiprocessor busy."""
    return next((tile for tile in (64, 32) if programs(tile) >= _MULTIPROCESSORS), 16)


class _Tiling:
    """How [B, B] is cut into the tiles of D: one program each."""

    def __init__(self, batch: int) -> None:
        self.tile = _tile(lambda side: triton.cdiv(batch, side) ** 2)
        self.blocks = triton.cdiv(batch, self.tile)
        self.padded = self.blocks * self.tile
        self.constants = {
            "UNROLL": _UNROLL[self.tile],
            "TILE": self.tile,
            "num_warps": 2 if self.tile == 16 else 4,
            "enable_fp_fusion": True,
        }

    def by_coordinate(self, x: Tensor) -> Tensor:
        """x [B, D] as [D, B], both padded by zeros so that no tile and no unrolled loop has an end in it."""
        batch, dims = x.shape
        rows, columns = self.padded - batch, -dims % _UNROLL[self.tile]
        return torch.nn.functional.pad(x.t(), (0, rows, 0, columns)).contiguous()


def _distances(query: Tensor, gallery: Tensor, squared: bool) -> Tensor:
    batch, dims = query.shape
    dist = query.new_empty((batch, batch))
    tiling = _Tiling(batch)
    _distance_kernel[(tiling.blocks**2,)](
        tiling.by_coordinate(query), tiling.by_coordinate(gallery), dist, batch, tiling.padded, dims,
        tiling.blocks, SQUARED=squared, **tiling.constants,
    )  # fmt: skip
    return dist


def _loss(parts: Tensor, divisor: int) -> Tensor:
    loss = parts.new_empty((), dtype=torch.float32)
    _finish_kernel[(1,)](
        parts, parts, loss, loss, parts.numel(), divisor, COUNTED=False, LINE=_LINE, enable_fp_fusion=True
    )
    return loss


def _mean(parts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(the parts over the counts, the sum of the counts)."""
    loss = parts.new_empty((), dtype=torch.float32)
    considered = parts.new_empty((), dtype=torch.int64)
    _finish_kernel[(1,)](
        parts, counts, loss, considered, parts.numel(), 1, COUNTED=True, LINE=_LINE, enable_fp_fusion=True
    )
    return loss, considered


def _no_triplets(like: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and W of fewer than three rows."""
    batch = like.shape[0]
    return like.new_zeros(()), like.new_zeros((batch, batch), dtype=torch.int32)


def _count(dist: Tensor, teacher: _Teacher, margin: float, tree_from: int) -> tuple[Tensor, Tensor]:
    """Loss and W of all triplets; at least three rows."""
    batch = dist.shape[0]
    weights = torch.empty_like(dist, dtype=torch.int32)
    common = (batch, *teacher.extents, margin)
    if counting(batch, tree_from) == "tree":
        size = max(32, triton.next_power_of_2(batch))
        warps = max(1, min(32, size // (32 * _TREE_ENTRIES)))
        programs = min(batch, _MULTIPROCESSORS * max(1, 32 // warps))
        wide = teacher.matrix.dtype == torch.float64
        parts = dist.new_empty(batch, dtype=torch.float64)
        keys = dist.new_empty((programs, size), dtype=torch.int64 if wide else torch.int32)
        scratch = dist.new_empty((programs, _SCRATCH.value, size), dtype=torch.int32)
        _tree_kernel[(programs,)](
            dist, *teacher.pointers, weights, parts, keys, scratch, *common, programs,
            HAS_INDICES=teacher.has_indices, SHIFT=_SPARE_BITS.get(teacher.matrix.dtype, 0), N=size,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        blocks = triton.cdiv(batch, _COUNT_TILE[0])
        parts = dist.new_empty(batch * blocks, dtype=torch.float64)
        _count_kernel[(batch * blocks,)](
            dist, *teacher.pointers, weights, parts, *common, blocks, HAS_INDICES=teacher.has_indices,
            BLOCK_J=_COUNT_TILE[0], BLOCK_K=_COUNT_TILE[1], enable_fp_fusion=True,
        )  # fmt: skip
    return _loss(parts, batch * (batch - 1) * (batch - 2)), weights


def triplet_ranking_fwd(
    query: Tensor,
    gallery: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    margin: float,
    squared: bool,
    tree_from: int,
) -> tuple[Tensor, Tensor]:
    if query.shape[0] < 3:
        return _no_triplets(query)
    return _count(_distances(query, gallery, squared), _Teacher(teacher, indices), margin, tree_from)


def triplet_matrix_fwd(
    dist: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    margin: float,
    samples: int,
    seed: Tensor | None,
    tree_from: int,
) -> tuple[Tensor, Tensor]:
    batch = dist.shape[0]
    if batch < 3:
        return _no_triplets(dist)
    found = _Teacher(teacher, indices)
    if not samples:
        return _count(dist, found, margin, tree_from)
    weights = torch.zeros_like(dist, dtype=torch.int32)
    parts = dist.new_empty(batch, dtype=torch.float64)
    _sampled_matrix_kernel[(batch,)](
        dist, *found.pointers, seed, weights, parts, batch, *found.extents, margin, samples,
        HAS_INDICES=found.has_indices, ENTRIES=128, enable_fp_fusion=True,
    )  # fmt: skip
    return _loss(parts, batch * samples), weights


def triplet_embedding_bwd(
    scale: Tensor, weights: Tensor, query: Tensor, gallery: Tensor, squared: bool
) -> tuple[Tensor, Tensor]:
    batch, dims = query.shape
    grads = torch.empty_like(query), torch.empty_like(gallery)
    if not query.numel():
        return grads
    tiling = _Tiling(batch)
    sides = (query, gallery) if squared else (tiling.by_coordinate(query), tiling.by_coordinate(gallery))
    coefficients = query.new_empty((tiling.padded, tiling.padded))
    _coefficient_kernel[(tiling.blocks**2,)](
        scale, weights, *sides, coefficients, batch, tiling.padded, dims, tiling.blocks, SQUARED=squared,
        **tiling.constants,
    )  # fmt: skip

    def programs(side: int) -> int:
        return 2 * triton.cdiv(batch, side) * triton.cdiv(dims, min(64, 2 * side))

    tile = min(_tile(programs), tiling.tile)  # within the padding of the coefficients
    width = min(64, 2 * tile)
    _gradient_kernel[(programs(tile),)](
        coefficients, query, gallery, *grads, batch, tiling.padded, dims, triton.cdiv(batch, tile),
        triton.cdiv(dims, width), UNROLL=_UNROLL[tile], TILE=tile, WIDTH=width, enable_fp_fusion=True,
    )  # fmt: skip
    return grads


def _width(dims: int) -> int:
    return min(_WIDTH, max(16, triton.next_power_of_2(dims)))


def triplet_sampled_fwd(
    query: Tensor,
    gallery: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    margin: float,
    squared: bool,
    samples: int,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    batch, dims = query.shape
    active = query.new_empty((batch, samples), dtype=torch.int8)
    if batch < 3:
        return query.new_zeros(()), active.zero_()
    found = _Teacher(teacher, indices)
    blocks = triton.cdiv(samples, _ENTRIES)
    parts = query.new_empty(batch * blocks, dtype=torch.float64)
    _sampled_kernel[(batch * blocks,)](
        query, gallery, *found.pointers, seed, active, parts, batch, dims, *found.extents, margin, samples,
        blocks, HAS_INDICES=found.has_indices, SQUARED=squared, ENTRIES=_ENTRIES, WIDTH=_width(dims),
        enable_fp_fusion=True,
    )  # fmt: skip
    return _loss(parts, batch * samples), active


def _entries_bwd(
    scale: Tensor, active: Tensor, seed: Tensor | None, query: Tensor, gallery: Tensor, squared: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of triplets that are drawn again from `seed` or, where that is None, chosen."""
    batch, dims = query.shape
    grads = torch.empty_like(query), torch.empty_like(gallery)
    samples = active.numel() // max(1, batch)
    width = _width(dims)
    columns = query.new_empty((batch, 2, samples), dtype=torch.int32)
    coefficients = query.new_empty((batch, 2, samples))
    blocks = triton.cdiv(samples, _ENTRIES)
    _entry_kernel[(batch * blocks,)](
        scale, active, active if seed is None else seed, query, gallery, columns, coefficients, batch, dims,
        samples, blocks, CHOSEN=seed is None, SQUARED=squared, ENTRIES=_ENTRIES, WIDTH=width,
        enable_fp_fusion=True,
    )  # fmt: skip
    ordered, order = torch.sort(columns.view(-1), stable=True)
    rows = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    offsets = torch.searchsorted(ordered, rows)
    axis_blocks = triton.cdiv(dims, width)
    for of_gallery, own, other, out in ((False, query, gallery, grads[0]), (True, gallery, query, grads[1])):
        _entry_gradient_kernel[(batch * axis_blocks,)](
            columns, coefficients, order, offsets, own, other, out, batch, dims, 2 * samples, axis_blocks,
            GALLERY=of_gallery, ENTRIES=_ENTRIES, WIDTH=width, enable_fp_fusion=True,
        )  # fmt: skip
    return grads


def triplet_sampled_bwd(
    scale: Tensor, active: Tensor, seed: Tensor, query: Tensor, gallery: Tensor, squared: bool
) -> tuple[Tensor, Tensor]:
    if query.shape[0] < 3:  # no triplets, and the generator has no pairs
        return torch.zeros_like(query), torch.zeros_like(gallery)
    return _entries_bwd(scale, active, seed, query, gallery, squared)


def triplet_chosen_bwd(
    scale: Tensor, chosen: Tensor, query: Tensor, gallery: Tensor, squared: bool
) -> tuple[Tensor, Tensor]:
    if not query.numel():
        return torch.zeros_like(query), torch.zeros_like(gallery)
    return _entries_bwd(scale, chosen, None, query, gallery, squared)


def triplet_pairs_fwd(
    query: Tensor,
    gallery: Tensor,
    labels: Tensor | None,
    margin: float,
    squared: bool,
    mining: str,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dims = query.shape
    shape = (batch, batch) if mining == "all" else (batch,)
    state = query.new_empty(shape, dtype=torch.int32)
    if not batch:
        return query.new_zeros(()), state, query.new_zeros((), dtype=torch.int64)
    parts = query.new_empty(batch, dtype=torch.float64)
    counts = query.new_empty(batch, dtype=torch.int32)
    results = (state, parts, counts, batch)
    classes = query if labels is None else labels
    options: dict[str, Any] = {"HAS_LABELS": labels is not None, "enable_fp_fusion": True}
    options["LINE"] = min(_LINE, max(32, triton.next_power_of_2(batch)))
    if mining == "random":
        _random_pair_kernel[(batch,)](
            query, gallery, classes, seed, *results, dims, margin, SQUARED=squared, WIDTH=_width(dims),
            **options,
        )  # fmt: skip
    else:
        dist = _distances(query, gallery, squared)
        if mining == "all":
            _all_pairs_kernel[(batch,)](dist, classes, *results, margin, **options)
        else:
            _nearest_pair_kernel[(batch,)](
                dist, classes, *results, margin, SEMIHARD=mining == "semihard", **options
            )
    loss, considered = _mean(parts, counts)
    return loss, state, considered
