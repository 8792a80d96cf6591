"""The HyperLSTM's kernels between its matrix products in Triton (contract: kernels/hyperlstm_loop.py; the
same mathematics a unit at a time: csrc/hyperlstm_math.h).

Main and hyper LSTM share a kernel forward and one backward: they differ in how the gates before their layer
norm come about and in where gradients of them go. Arithmetic is float32.

Forward. A program takes a row and walks its steps, the cell in registers. Backward. A program takes every
n-th row in turn and carries the sums over rows, which are the gradients of layer norms and bias; at the end
it adds them to its own row of `partials`. Every sum has one order, and there are no atomics.

A row of up to _WIDEST units is one block, in registers throughout. Four gates are one tensor [BLOCK, 2, 2], a
thread holding all four of its units, so that their layer norms sum together: once for the mean, once about
it. Wider rows are walked once for every sum, block by block, their gates formed again each time.

What backward takes twice, for the gates and for their gradients, it loads twice: the second time from L1, as
registers would not hold it. Widths are constants of a kernel: offsets are then part of the instructions.

Dropout. A counter gives the words of four elements; where rows are a multiple of four wide these are units of
one row, and are generated once. Elsewhere each unit generates its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import hyperlstm_loop as loop

_MULTIPROCESSORS = 132  # of an H100 or H200
_WIDEST = 1024  # units of a row that a block holds
_LN_EPS = tl.constexpr(1e-3)


# --- elements -----------------------------------------------------------------------------------------------


@triton.jit
def _wide(index):
    """`index` as int64."""
    return tl.full((), 0, tl.int64) + index


@triton.jit
def _number(count):
    """`count`, which may be a constant, as float32."""
    return tl.full((), 0, tl.float32) + count


@triton.jit
def _inside(unit, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Which units there are; where blocks have no end in them, a constant that costs nothing."""
    inside = tl.full((BLOCK,), True, tl.int1)
    if WIDTH % BLOCK != 0:
        inside = unit < WIDTH
    return inside


@triton.jit
def _logistic(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    """Near 0, where e^2x - 1 would lose digits, by its series."""
    size = tl.abs(x)
    decay = tl.exp(-2.0 * size)
    far = (1.0 - decay) / (1.0 + decay)
    x2 = x * x
    series = x2 * (
        x2 * (x2 * (x2 * (x2 * (-1382.0 / 155925) + 62.0 / 2835) - 17.0 / 315) + 2.0 / 15) - 1.0 / 3
    )
    return tl.where(size < 0.25, x + x * series, tl.where(x < 0, -far, far))


@triton.jit
def _dropout_factor(
    seed, counter, row, first, WIDTH, limit, scale, MAIN: tl.constexpr, SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What a unit's tanh(j) is multiplied by, 0 or `scale`, for the units of a row from `first` on.

    `limit`, as int32, is one below the least word that keeps a unit. SHARED: `WIDTH` is a multiple of four.
    """
    if SHARED:
        quad = (row * (WIDTH // 4) + first // 4).to(tl.int32) + tl.arange(0, BLOCK // 4)
    else:
        element = row * WIDTH + first + tl.arange(0, BLOCK)
        quad = (element >> 2).to(tl.int32)
    zero = quad * 0
    stream = zero
    if not MAIN:
        stream = zero + 1
    w0, w1, w2, w3 = tl.philox(tl.load(seed), zero + counter, stream, quad, zero)
    if SHARED:
        word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    else:
        place = element & 3
        word = tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))
    return tl.where(word > limit.to(tl.uint32, bitcast=True), scale, 0.0)


# --- four gates as one [BLOCK, 2, 2] ------------------------------------------------------------------------


@triton.jit
def _join_gates(i, j, f, o):
    return tl.join(tl.join(i, f), tl.join(j, o))


@triton.jit
def _split_gates(gates):
    """(i, j, f, o)"""
    inputs, others = tl.split(gates)
    i, f = tl.split(inputs)
    j, o = tl.split(others)
    return i, j, f, o


@triton.jit
def _load_gates(place, stride, inside, KEEP: tl.constexpr = ""):
    """What lies at `place` and at one, two and three strides behind it, in float32."""
    i = tl.load(place, mask=inside, other=0.0, eviction_policy=KEEP).to(tl.float32)
    j = tl.load(place + stride, mask=inside, other=0.0, eviction_policy=KEEP).to(tl.float32)
    f = tl.load(place + 2 * stride, mask=inside, other=0.0, eviction_policy=KEEP).to(tl.float32)
    o = tl.load(place + 3 * stride, mask=inside, other=0.0, eviction_policy=KEEP).to(tl.float32)
    return _join_gates(i, j, f, o)


@triton.jit
def _store_gates(place, stride, inside, gates):
    i, j, f, o = _split_gates(gates.to(place.dtype.element_ty))
    tl.store(place, i, mask=inside)
    tl.store(place + stride, j, mask=inside)
    tl.store(place + 2 * stride, f, mask=inside)
    tl.store(place + 3 * stride, o, mask=inside)


@triton.jit
def _add_gates(place, stride, inside, gates):
    """Adds to float32 in memory."""
    _store_gates(place, stride, inside, _load_gates(place, stride, inside) + gates)


@triton.jit
def _add(place, inside, value):
    tl.store(place, tl.load(place, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def _gates(
    recurrent, x_part, scales, bias, unit, inside, WIDTH, scale_stride,
    MAIN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The gates before their layer norm. The hyper LSTM's are whole in memory, but for x's part if ADD."""
    if MAIN:
        # Each term is done with before the next is loaded
        gates = _load_gates(scales + 8 * scale_stride + unit, scale_stride, inside)
        gates += _load_gates(bias + unit, WIDTH, inside)
        alpha_x = _load_gates(scales + unit, scale_stride, inside)
        gates += alpha_x * _load_gates(x_part + unit, WIDTH, inside)
        alpha_h = _load_gates(scales + 4 * scale_stride + unit, scale_stride, inside)
        gates += alpha_h * _load_gates(recurrent + unit, WIDTH, inside)
    elif ADD:
        # As it is kept for backward, rounded
        kept = _load_gates(recurrent + unit, WIDTH, inside) + _load_gates(x_part + unit, WIDTH, inside)
        kept = kept.to(recurrent.dtype.element_ty)
        _store_gates(recurrent + unit, WIDTH, inside, kept)
        gates = kept.to(tl.float32)
    else:
        gates = _load_gates(recurrent + unit, WIDTH, inside)
    return gates


@triton.jit
def _activate(gates, forget_bias):
    """(s(i), tanh(j), s(f + forget_bias), s(o))"""
    i, j, f, o = _split_gates(gates)
    return _logistic(i), _tanh(j), _logistic(f + forget_bias), _logistic(o)


# --- sums over the units ------------------------------------------------------------------------------------


@triton.jit
def _moments(x, inside, count):
    """Mean and sum of squared distances from it over the `count` units inside; x is 0 outside."""
    mean = tl.sum(x, 0) / count
    gap = tl.where(inside, x - mean, 0.0)
    return mean, tl.sum(gap * gap, 0)


@triton.jit
def _merge(mean, squares, other_mean, other_squares, before, count):
    """The moments of `before` units and `count` others (Chan, Golub, LeVeque 1979)."""
    gap = other_mean - mean
    share = count / (before + count)
    return mean + gap * share, squares + other_squares + gap * gap * (before * share)


@triton.jit
def _inverse_deviation(squares, size):
    return tl.rsqrt(squares / size + _LN_EPS)


@triton.jit
def _two_means(grad, normed, size):
    """What a block's `grad` and grad * normed come to in the means over all units."""
    grad_sum, product_sum = tl.split(tl.sum(tl.join(grad, grad * normed), 0))
    return grad_sum / size, product_sum / size


@triton.jit
def _layer_norm_gradient(grad, normed, mean_grad, mean_product, inverse):
    """The gradient through a layer norm, from that of what is normed and its `_two_means`."""
    return inverse * (grad - mean_grad - normed * mean_product)


@triton.jit
def _add_sums(
    partials, unit, inside, WIDTH, weight, after, before, cell_weight, cell_bias,
    MAIN: tl.constexpr, NORM: tl.constexpr, CELL_PART: tl.constexpr,
):  # fmt: skip
    """Adds to a program's own partial sums."""
    if NORM:
        _add_gates(partials + unit, WIDTH, inside, weight)
        _add_gates(partials + 4 * WIDTH + unit, WIDTH, inside, after)
    if MAIN:
        _add_gates(partials + 8 * WIDTH + unit, WIDTH, inside, before)
    if MAIN or NORM:
        _add(partials + CELL_PART * WIDTH + unit, inside, cell_weight)
        _add(partials + (CELL_PART + 1) * WIDTH + unit, inside, cell_bias)


# --- forward ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first", "counter", "limit"])
def _forward_kernel(
    recurrent, x_part, scales, bias, cell, out, last, cells, ln_weight, ln_bias, ln_c_weight, ln_c_bias,
    lengths, seed, steps, first, counter, forget_bias, limit, dropout_scale,
    recurrent_step, recurrent_row, x_step, x_row, scale_stride, scale_step, scale_row, cell_row, out_step,
    out_row, last_row, cells_step, cells_row,
    MAIN: tl.constexpr, HAS_X: tl.constexpr, HAS_OUT: tl.constexpr, HAS_LAST: tl.constexpr,
    HAS_CELLS: tl.constexpr, NORM: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr,
    SHARED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A row's steps. `last` is, of the main LSTM, h after the last step, else that of the last live one."""
    CELL_NORM: tl.constexpr = MAIN or NORM
    row = _wide(tl.program_id(0))
    recurrent += row * recurrent_row
    x_part += row * x_row
    scales += row * scale_row
    cell += row * cell_row
    out += row * out_row
    last += row * last_row
    cells += row * cells_row
    scale_stride = _wide(scale_stride)
    size = _number(WIDTH)
    live = _wide(steps).to(tl.int32)
    if HAS_LENGTHS:
        live = tl.minimum(tl.maximum(tl.load(lengths + row) - first, 0), live.to(tl.int64)).to(tl.int32)
    if BLOCKS == 1:
        unit = tl.arange(0, BLOCK)
        inside = _inside(unit, WIDTH, BLOCK)
        before = tl.load(cell + unit, mask=inside, other=0.0)
    for step in range(live):
        here = _wide(step)
        recurrent_here = recurrent + here * recurrent_step
        x_here = x_part + here * x_step
        scales_here = scales + here * scale_step
        # 1. gates and their moments
        for block in tl.static_range(BLOCKS):
            unit = block * BLOCK + tl.arange(0, BLOCK)
            inside = _inside(unit, WIDTH, BLOCK)
            gates = _gates(
                recurrent_here, x_here, scales_here, bias, unit, inside, WIDTH, scale_stride, MAIN, HAS_X
            )
            if NORM:
                count = _number(tl.minimum(WIDTH - block * BLOCK, BLOCK))
                block_mean, block_squares = _moments(gates, inside[:, None, None], count)
                if block == 0:
                    mean = block_mean
                    squares = block_squares
                else:
                    mean, squares = _merge(mean, squares, block_mean, block_squares, block * BLOCK, count)
        if NORM:
            inverse = _inverse_deviation(squares, size)
        if BLOCKS > 1:
            tl.debug_barrier()  # what one thread wrote may be another's to read
        # 2. the cell and its moments
        for block in tl.static_range(BLOCKS):
            unit = block * BLOCK + tl.arange(0, BLOCK)
            inside = _inside(unit, WIDTH, BLOCK)
            if BLOCKS > 1:
                gates = _gates(
                    recurrent_here, x_here, scales_here, bias, unit, inside, WIDTH, scale_stride, MAIN, False
                )
                before = tl.load(cell + unit, mask=inside, other=0.0)
            if NORM:
                gates = (gates - mean) * inverse
                gates = gates * _load_gates(ln_weight + unit, WIDTH, inside)
                gates += _load_gates(ln_bias + unit, WIDTH, inside)
            i, j, f, o = _activate(gates, forget_bias)
            if DROPOUT:
                j *= _dropout_factor(
                    seed, counter + step, row, block * BLOCK, WIDTH, limit, dropout_scale, MAIN, SHARED, BLOCK
                )
            after = before * f + i * j
            if BLOCKS > 1:
                tl.store(cell + unit, after, mask=inside)
            if HAS_CELLS:
                tl.store(cells + here * cells_step + unit, after, mask=inside)
            if CELL_NORM:
                count = _number(tl.minimum(WIDTH - block * BLOCK, BLOCK))
                block_mean, block_squares = _moments(after, inside, count)
                if block == 0:
                    cell_mean = block_mean
                    cell_squares = block_squares
                else:
                    cell_mean, cell_squares = _merge(
                        cell_mean, cell_squares, block_mean, block_squares, block * BLOCK, count
                    )
        if CELL_NORM:
            cell_inverse = _inverse_deviation(cell_squares, size)
        if BLOCKS > 1:
            tl.debug_barrier()
        # 3. h
        for block in tl.static_range(BLOCKS):
            unit = block * BLOCK + tl.arange(0, BLOCK)
            inside = _inside(unit, WIDTH, BLOCK)
            if BLOCKS > 1:
                gates = _gates(
                    recurrent_here, x_here, scales_here, bias, unit, inside, WIDTH, scale_stride, MAIN, False
                )
                if NORM:
                    gates = (gates - mean) * inverse
                    gates = gates * _load_gates(ln_weight + unit, WIDTH, inside)
                    gates += _load_gates(ln_bias + unit, WIDTH, inside)
                i, j, f, o = _activate(gates, forget_bias)
                after = tl.load(cell + unit, mask=inside, other=0.0)
            shown = after
            if CELL_NORM:
                shown = (after - cell_mean) * cell_inverse
                shown *= tl.load(ln_c_weight + unit, mask=inside, other=0.0)
                shown += tl.load(ln_c_bias + unit, mask=inside, other=0.0)
            h = _tanh(shown) * o
            if HAS_OUT:
                tl.store(out + here * out_step + unit, h.to(out.dtype.element_ty), mask=inside)
            if HAS_LAST:
                tl.store(last + unit, h.to(last.dtype.element_ty), mask=inside)
        if BLOCKS == 1:
            before = after
    if BLOCKS == 1:
        tl.store(cell + unit, before, mask=inside)
    if HAS_LENGTHS:
        for step in range(live, steps):
            here = _wide(step)
            for block in tl.static_range(BLOCKS):
                unit = block * BLOCK + tl.arange(0, BLOCK)
                inside = _inside(unit, WIDTH, BLOCK)
                zero = tl.zeros((BLOCK,), tl.float32)
                if HAS_X and not MAIN:
                    _gates(
                        recurrent + here * recurrent_step, x_part + here * x_step, scales, bias, unit, inside,
                        WIDTH, scale_stride, MAIN, HAS_X,
                    )  # fmt: skip
                if HAS_OUT:
                    tl.store(out + here * out_step + unit, zero.to(out.dtype.element_ty), mask=inside)
                if HAS_CELLS:
                    tl.store(cells + here * cells_step + unit, zero, mask=inside)
                if MAIN and HAS_LAST:
                    tl.store(last + unit, zero.to(last.dtype.element_ty), mask=inside)


# --- backward -----------------------------------------------------------------------------------------------


@triton.jit
def _block_gradients(
    recurrent, x_part, scales, bias, cell_before, cell_after, grad_out, grad_hidden, grad_cell, ln_weight,
    ln_bias, ln_c_weight, ln_c_bias, seed, counter, row, block, unit, inside, WIDTH, scale_stride,
    forget_bias, limit, dropout_scale, mean, inverse, cell_mean, cell_inverse, cell_grad_mean,
    cell_product_mean,
    MAIN: tl.constexpr, HAS_OUT: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr,
    SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of units back to the gates after their layer norm.

    (normed gates, gradient of the gates, gradient of the cell before; normed cell, gradient of the normed
    cell, gradient of what tanh takes of it). The first line needs the means over the latter's layer norm;
    the second does not, and is what they are made from.
    """
    normed = _gates(recurrent, x_part, scales, bias, unit, inside, WIDTH, scale_stride, MAIN, False)
    gates = normed
    if NORM:
        normed = (normed - mean) * inverse
        gates = normed * _load_gates(ln_weight + unit, WIDTH, inside)
        gates += _load_gates(ln_bias + unit, WIDTH, inside)
    i, j, f, o = _activate(gates, forget_bias)

    grad_h = tl.load(grad_hidden + unit, mask=inside, other=0.0).to(tl.float32)
    if HAS_OUT:
        grad_h += tl.load(grad_out + unit, mask=inside, other=0.0).to(tl.float32)
    normed_cell = tl.load(cell_after + unit, mask=inside, other=0.0)
    shown = normed_cell
    if MAIN or NORM:
        normed_cell = (normed_cell - cell_mean) * cell_inverse
        weight = tl.load(ln_c_weight + unit, mask=inside, other=0.0)
        shown = normed_cell * weight + tl.load(ln_c_bias + unit, mask=inside, other=0.0)
    shown = _tanh(shown)
    grad_shown = grad_h * o * (1.0 - shown * shown)
    grad_normed_cell = grad_shown
    grad_after = grad_shown
    if MAIN or NORM:
        grad_normed_cell = grad_shown * weight
        grad_after = _layer_norm_gradient(
            grad_normed_cell, normed_cell, cell_grad_mean, cell_product_mean, cell_inverse
        )
    grad_after += tl.load(grad_cell + unit, mask=inside, other=0.0)
    grad_after = tl.where(inside, grad_after, 0.0)

    before = tl.load(cell_before + unit, mask=inside, other=0.0)
    kept = j
    slope = 1.0 - j * j
    if DROPOUT:
        factor = _dropout_factor(
            seed, counter, row, block * BLOCK, WIDTH, limit, dropout_scale, MAIN, SHARED, BLOCK
        )
        kept *= factor
        slope *= factor
    grad_gates = _join_gates(
        grad_after * kept * i * (1.0 - i),
        grad_after * i * slope,
        grad_after * before * f * (1.0 - f),
        grad_h * shown * o * (1.0 - o),
    )
    return normed, grad_gates, grad_after * f, normed_cell, grad_normed_cell, grad_shown


@triton.jit(do_not_specialize=["batch", "step", "counter", "limit", "programs"])
def _backward_kernel(
    recurrent, x_part, scales, bias, cell_before, cell_after, grad_out, grad_hidden, grad_cell,
    grad_recurrent, grad_x_part, grad_scales, partials, ln_weight, ln_bias, ln_c_weight, ln_c_bias, lengths,
    seed, batch, step, counter, forget_bias, limit, dropout_scale, programs,
    recurrent_row, x_row, scale_stride, scale_row, before_row, after_row, grad_out_row, grad_hidden_row,
    grad_cell_row, grad_recurrent_row, grad_x_row, grad_scale_stride, grad_scale_row,
    MAIN: tl.constexpr, HAS_OUT: tl.constexpr, NORM: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    DROPOUT: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """One step of every `programs`-th row.

    Where there is one block, what the passes have in common is done once: the compiler sees that nothing is
    written between them.
    """
    CELL_NORM: tl.constexpr = MAIN or NORM
    CELL_PART: tl.constexpr = 12 if MAIN else 8  # ln_c_weight's among the partial sums; ln_c_bias's is next
    partials += _wide(tl.program_id(0)) * (CELL_PART + 2) * WIDTH
    scale_stride = _wide(scale_stride)
    grad_scale_stride = _wide(grad_scale_stride)
    size = _number(WIDTH)
    # The sums over rows, if they fit registers: after and before the gates' layer norm, and the cell's
    if BLOCKS == 1:
        sum_weight = tl.zeros((BLOCK, 2, 2), tl.float32)
        sum_after = tl.zeros((BLOCK, 2, 2), tl.float32)
        sum_before = tl.zeros((BLOCK, 2, 2), tl.float32)
        sum_cell_weight = tl.zeros((BLOCK,), tl.float32)
        sum_cell_bias = tl.zeros((BLOCK,), tl.float32)
    for number in range(tl.program_id(0), batch, programs):
        row = _wide(number)
        to_recurrent = grad_recurrent + row * grad_recurrent_row
        to_x = grad_x_part + row * grad_x_row
        to_scales = grad_scales + row * grad_scale_row
        live = 1
        if HAS_LENGTHS:
            live = (tl.load(lengths + row) > step).to(tl.int32)
        if live == 0:
            for block in range(BLOCKS):
                unit = block * BLOCK + tl.arange(0, BLOCK)
                inside = _inside(unit, WIDTH, BLOCK)
                nothing = tl.zeros((BLOCK, 2, 2), tl.float32)
                _store_gates(to_recurrent + unit, WIDTH, inside, nothing)
                if MAIN:
                    _store_gates(to_x + unit, WIDTH, inside, nothing)
                    for group in tl.static_range(3):
                        place = to_scales + 4 * group * grad_scale_stride + unit
                        _store_gates(place, grad_scale_stride, inside, nothing)
        else:
            from_h = recurrent + row * recurrent_row
            from_x = x_part + row * x_row
            from_scales = scales + row * scale_row
            before_here = cell_before + row * before_row
            after_here = cell_after + row * after_row
            out_here = grad_out + row * grad_out_row
            hidden_here = grad_hidden + row * grad_hidden_row
            cell_here = grad_cell + row * grad_cell_row
            mean = tl.zeros((2, 2), tl.float32)
            squares = mean
            grad_mean = mean
            product_mean = mean
            cell_mean = 0.0
            cell_squares = 0.0
            cell_grad_mean = 0.0
            cell_product_mean = 0.0
            # 1. moments of gates and cell
            for block in range(BLOCKS):
                unit = block * BLOCK + tl.arange(0, BLOCK)
                inside = _inside(unit, WIDTH, BLOCK)
                count = _number(tl.minimum(WIDTH - block * BLOCK, BLOCK))
                if NORM:
                    gates = _gates(
                        from_h, from_x, from_scales, bias, unit, inside, WIDTH, scale_stride, MAIN, False
                    )
                    block_mean, block_squares = _moments(gates, inside[:, None, None], count)
                    mean, squares = _merge(mean, squares, block_mean, block_squares, block * BLOCK, count)
                if CELL_NORM:
                    after = tl.load(after_here + unit, mask=inside, other=0.0)
                    block_mean, block_squares = _moments(after, inside, count)
                    cell_mean, cell_squares = _merge(
                        cell_mean, cell_squares, block_mean, block_squares, block * BLOCK, count
                    )
            inverse = _inverse_deviation(squares, size)
            cell_inverse = _inverse_deviation(cell_squares, size)
            if BLOCKS > 1:
                tl.debug_barrier()  # forget what was loaded: registers would not hold all blocks
            # 2. the means in the gradient of the cell's layer norm
            if CELL_NORM:
                for block in range(BLOCKS):
                    unit = block * BLOCK + tl.arange(0, BLOCK)
                    inside = _inside(unit, WIDTH, BLOCK)
                    _, _, _, normed_cell, grad_normed_cell, _ = _block_gradients(
                        from_h, from_x, from_scales, bias, before_here, after_here, out_here, hidden_here,
                        cell_here, ln_weight, ln_bias, ln_c_weight, ln_c_bias, seed, counter, row, block,
                        unit, inside, WIDTH, scale_stride, forget_bias, limit, dropout_scale, mean, inverse,
                        cell_mean, cell_inverse, 0.0, 0.0, MAIN, HAS_OUT, NORM, DROPOUT, SHARED, BLOCK,
                    )  # fmt: skip
                    block_grad, block_product = _two_means(grad_normed_cell, normed_cell, size)
                    cell_grad_mean += block_grad
                    cell_product_mean += block_product
            if BLOCKS > 1:
                tl.debug_barrier()
            # 3. those of the gates' layer norms
            if NORM:
                for block in range(BLOCKS):
                    unit = block * BLOCK + tl.arange(0, BLOCK)
                    inside = _inside(unit, WIDTH, BLOCK)
                    normed, grad_gates, _, _, _, _ = _block_gradients(
                        from_h, from_x, from_scales, bias, before_here, after_here, out_here, hidden_here,
                        cell_here, ln_weight, ln_bias, ln_c_weight, ln_c_bias, seed, counter, row, block,
                        unit, inside, WIDTH, scale_stride, forget_bias, limit, dropout_scale, mean, inverse,
                        cell_mean, cell_inverse, cell_grad_mean, cell_product_mean, MAIN, HAS_OUT, NORM,
                        DROPOUT, SHARED, BLOCK,
                    )  # fmt: skip
                    weight = _load_gates(ln_weight + unit, WIDTH, inside)
                    block_grad, block_product = _two_means(grad_gates * weight, normed, size)
                    grad_mean += block_grad
                    product_mean += block_product
            if BLOCKS > 1:
                tl.debug_barrier()
            # 4. the gradients
            for block in range(BLOCKS):
                unit = block * BLOCK + tl.arange(0, BLOCK)
                inside = _inside(unit, WIDTH, BLOCK)
                normed, grad_gates, grad_before, normed_cell, _, grad_shown = _block_gradients(
                    from_h, from_x, from_scales, bias, before_here, after_here, out_here, hidden_here,
                    cell_here, ln_weight, ln_bias, ln_c_weight, ln_c_bias, seed, counter, row, block, unit,
                    inside, WIDTH, scale_stride, forget_bias, limit, dropout_scale, mean, inverse, cell_mean,
                    cell_inverse, cell_grad_mean, cell_product_mean, MAIN, HAS_OUT, NORM, DROPOUT, SHARED,
                    BLOCK,
                )  # fmt: skip
                after = grad_gates
                if NORM:
                    weight = _load_gates(ln_weight + unit, WIDTH, inside)
                    grad_gates = _layer_norm_gradient(
                        after * weight, normed, grad_mean, product_mean, inverse
                    )
                    grad_gates = tl.where(inside[:, None, None], grad_gates, 0.0)
                if BLOCKS > 1 or not CELL_NORM:
                    tl.debug_barrier()  # all threads have read what is overwritten; elsewhere a sum saw to it
                tl.store(cell_here + unit, grad_before, mask=inside)
                zero = tl.zeros((BLOCK,), tl.float32).to(grad_hidden.dtype.element_ty)
                tl.store(hidden_here + unit, zero, mask=inside)
                if MAIN:
                    alpha_x = _load_gates(from_scales + unit, scale_stride, inside, "evict_first")
                    _store_gates(to_x + unit, WIDTH, inside, grad_gates * alpha_x)
                    of_x = _load_gates(from_x + unit, WIDTH, inside, "evict_first")
                    _store_gates(to_scales + unit, grad_scale_stride, inside, grad_gates * of_x)
                    place = from_scales + 4 * scale_stride + unit
                    alpha_h = _load_gates(place, scale_stride, inside, "evict_first")
                    _store_gates(to_recurrent + unit, WIDTH, inside, grad_gates * alpha_h)
                    of_h = _load_gates(from_h + unit, WIDTH, inside, "evict_first")
                    place = to_scales + 4 * grad_scale_stride + unit
                    _store_gates(place, grad_scale_stride, inside, grad_gates * of_h)
                    place = to_scales + 8 * grad_scale_stride + unit
                    _store_gates(place, grad_scale_stride, inside, grad_gates)
                else:
                    _store_gates(to_recurrent + unit, WIDTH, inside, grad_gates)
                if BLOCKS == 1:
                    sum_weight += after * normed
                    sum_after += after
                    sum_before += grad_gates
                    sum_cell_weight += grad_shown * normed_cell
                    sum_cell_bias += grad_shown
                else:
                    _add_sums(
                        partials, unit, inside, WIDTH, after * normed, after, grad_gates,
                        grad_shown * normed_cell, grad_shown, MAIN, NORM, CELL_PART,
                    )  # fmt: skip
            if BLOCKS > 1:
                tl.debug_barrier()  # the next row adds to the same sums
    if BLOCKS == 1:
        unit = tl.arange(0, BLOCK)
        _add_sums(
            partials, unit, _inside(unit, WIDTH, BLOCK), WIDTH, sum_weight, sum_after, sum_before,
            sum_cell_weight, sum_cell_bias, MAIN, NORM, CELL_PART,
        )  # fmt: skip


# --- launches -----------------------------------------------------------------------------------------------


def _blocks(width: int, registers: int) -> dict[str, Any]:
    """How the units of a row are cut into blocks, four a thread, and what registers a thread may take: of one
    block, `registers`."""
    size = max(32, triton.next_power_of_2(width))
    if size > _WIDEST:
        size, registers = _WIDEST, 255
    return {
        "WIDTH": width,
        "BLOCK": size,
        "BLOCKS": triton.cdiv(width, size),
        "SHARED": width % 4 == 0,
        "num_warps": max(1, size // 128),
        "maxnreg": registers,  # said outright, or the assembler spills for an occupancy that does not help
        "enable_fp_fusion": True,
    }


def _as_int32(number: int) -> int:
    """The number's low 32 bits, read as an int32: the type of an argument must not follow its value."""
    return (number + 2**31) % 2**32 - 2**31


def _dropout(p: float) -> tuple[int, float]:
    """(one below the least word that keeps a unit, what a kept one is multiplied by)"""
    if p <= 0:
        return 0, 1.0
    return _as_int32(math.ceil(p * 2**32) - 1), 1.0 / (1.0 - p)


def _whole(norm: tuple[Tensor | None, ...], instead: Tensor) -> tuple[Tensor, ...]:
    """The layer norms' parameters, or something that is never read in their place."""
    return tuple(instead if part is None else part.contiguous() for part in norm)


class _TritonKernels:
    """`loop.Kernels`; products are torch's."""

    def slots(self, like: Tensor, batch: int) -> int:
        return max(1, min(batch, 2 * _MULTIPROCESSORS))

    def products(self, like: Tensor) -> loop.Products:
        return loop.Products()

    def hyper_fwd(
        self, gates, x_part, cell, hidden, last, cells, ln_weight, ln_bias, ln_c_weight, ln_c_bias, lengths,
        seed, first, step_offset, forget_bias, dropout,
    ) -> None:  # fmt: skip
        norm = (ln_weight, ln_bias, ln_c_weight, ln_c_bias)
        _forward(
            gates, x_part, None, None, cell, hidden, last, cells, norm, lengths, seed, first, step_offset,
            forget_bias, dropout,
        )  # fmt: skip

    def main_fwd(
        self, recurrent, x_part, scales, bias, cell, out, hidden, cells, ln_weight, ln_bias, ln_c_weight,
        ln_c_bias, lengths, seed, first, step_offset, forget_bias, dropout,
    ) -> None:  # fmt: skip
        norm = (ln_weight, ln_bias, ln_c_weight, ln_c_bias)
        _forward(
            recurrent, x_part, scales, bias, cell, out, hidden, cells, norm, lengths, seed, first,
            step_offset, forget_bias, dropout,
        )  # fmt: skip

    def main_bwd(
        self, recurrent, x_part, scales, bias, cell_before, cell_after, grad_out, grad_hidden, grad_cell,
        grad_recurrent, grad_x_part, grad_scales, partials, ln_weight, ln_bias, ln_c_weight, ln_c_bias,
        lengths, seed, step, step_offset, forget_bias, dropout,
    ) -> None:  # fmt: skip
        norm = (ln_weight, ln_bias, ln_c_weight, ln_c_bias)
        _backward(
            recurrent, x_part, scales, bias, cell_before, cell_after, grad_out, grad_hidden, grad_cell,
            grad_recurrent, grad_x_part, grad_scales, partials, norm, lengths, seed, step, step_offset,
            forget_bias, dropout,
        )  # fmt: skip

    def hyper_bwd(
        self, gates, cell_before, cell_after, grad_hidden, grad_cell, grad_gates, partials, ln_weight,
        ln_bias, ln_c_weight, ln_c_bias, lengths, seed, step, step_offset, forget_bias, dropout,
    ) -> None:  # fmt: skip
        norm = (ln_weight, ln_bias, ln_c_weight, ln_c_bias)
        _backward(
            gates, None, None, None, cell_before, cell_after, None, grad_hidden, grad_cell, grad_gates, None,
            None, partials, norm, lengths, seed, step, step_offset, forget_bias, dropout,
        )  # fmt: skip


KERNELS: loop.Kernels = _TritonKernels()


def _forward(
    recurrent: Tensor,
    x_part: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    cell: Tensor,
    out: Tensor | None,
    last: Tensor | None,
    cells: Tensor | None,
    norm: tuple[Tensor | None, ...],
    lengths: Tensor | None,
    seed: Tensor | None,
    first: int,
    step_offset: int,
    forget_bias: float,
    dropout: float,
) -> None:
    """Either LSTM's forward; without scales it is the hyper one's."""
    batch, width = cell.shape
    steps = recurrent.shape[0]
    if not batch or not steps:
        return
    limit, dropout_scale = _dropout(dropout)
    has_scales = scales is not None
    with torch.cuda.device_of(cell):
        _forward_kernel[(batch,)](
            recurrent,
            recurrent if x_part is None else x_part,
            recurrent if scales is None else scales,
            cell if bias is None else bias.contiguous(),
            cell,
            cell if out is None else out,
            cell if last is None else last,
            cell if cells is None else cells,
            *_whole(norm, cell),
            cell if lengths is None else lengths.contiguous(),
            cell if seed is None else seed,
            steps,
            first,
            _as_int32(first + step_offset),
            forget_bias,
            limit,
            dropout_scale,
            *recurrent.stride()[:2],
            *((0, 0) if x_part is None else x_part.stride()[:2]),
            *((0, 0, 0) if scales is None else scales.stride()[:3]),
            cell.stride(0),
            *((0, 0) if out is None else out.stride()[:2]),
            0 if last is None else last.stride(0),
            *((0, 0) if cells is None else cells.stride()[:2]),
            MAIN=has_scales,
            HAS_X=x_part is not None,
            HAS_OUT=out is not None,
            HAS_LAST=last is not None,
            HAS_CELLS=cells is not None,
            NORM=norm[0] is not None,
            HAS_LENGTHS=lengths is not None,
            DROPOUT=seed is not None and dropout > 0,
            **_blocks(width, 128),
        )


def _backward(
    recurrent: Tensor,
    x_part: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    cell_before: Tensor,
    cell_after: Tensor,
    grad_out: Tensor | None,
    grad_hidden: Tensor,
    grad_cell: Tensor,
    grad_recurrent: Tensor,
    grad_x_part: Tensor | None,
    grad_scales: Tensor | None,
    partials: Tensor,
    norm: tuple[Tensor | None, ...],
    lengths: Tensor | None,
    seed: Tensor | None,
    step: int,
    step_offset: int,
    forget_bias: float,
    dropout: float,
) -> None:
    """Either LSTM's backward; without scales it is the hyper one's."""
    batch, width = grad_cell.shape
    if not batch:
        return
    limit, dropout_scale = _dropout(dropout)
    main = scales is not None
    programs = _programs(batch, partials.shape[0], main)
    with torch.cuda.device_of(grad_cell):
        _backward_kernel[(programs,)](
            recurrent,
            recurrent if x_part is None else x_part,
            recurrent if scales is None else scales,
            grad_cell if bias is None else bias.contiguous(),
            cell_before,
            cell_after,
            grad_cell if grad_out is None else grad_out,
            grad_hidden,
            grad_cell,
            grad_recurrent,
            grad_recurrent if grad_x_part is None else grad_x_part,
            grad_recurrent if grad_scales is None else grad_scales,
            partials,
            *_whole(norm, grad_cell),
            grad_cell if lengths is None else lengths.contiguous(),
            grad_cell if seed is None else seed,
            batch,
            step,
            _as_int32(step + step_offset),
            forget_bias,
            limit,
            dropout_scale,
            programs,
            recurrent.stride(0),
            0 if x_part is None else x_part.stride(0),
            *((0, 0) if scales is None else scales.stride()[:2]),
            cell_before.stride(0),
            cell_after.stride(0),
            0 if grad_out is None else grad_out.stride(0),
            grad_hidden.stride(0),
            grad_cell.stride(0),
            grad_recurrent.stride(0),
            0 if grad_x_part is None else grad_x_part.stride(0),
            *((0, 0) if grad_scales is None else grad_scales.stride()[:2]),
            MAIN=main,
            HAS_OUT=grad_out is not None,
            NORM=norm[0] is not None,
            HAS_LENGTHS=lengths is not None,
            DROPOUT=seed is not None and dropout > 0,
            **_blocks(width, 255),
        )


def _programs(batch: int, slots: int, main: bool) -> int:
    """How many programs share the rows; no more than leave each as many as the busiest has.

    One a multiprocessor for the main LSTM, whose partial sums are as much memory as a row's gradients.
    """
    most = min(slots, _MULTIPROCESSORS) if main else slots
    return triton.cdiv(batch, triton.cdiv(batch, most))
