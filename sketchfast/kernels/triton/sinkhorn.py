"""Sinkhorn in Triton (definitions and schemas are in ops/sinkhorn.py, the same mathematics in eager PyTorch
in kernels/reference/sinkhorn.py).

Potentials are scaled, phi = f / epsilon and gamma = g / epsilon, and kept in float64, -inf where a row or
column holds no mass: an exponent phi_i + gamma_j - C_ij / epsilon is formed in float64, and only its exp is
float32. Everything is summed in a fixed order; nothing waits for the host, and no size depends on a value.

`regime` picks how a batch is iterated:

whole. One program a problem, every iteration in one launch. The kernel matrix exp(phi_i + gamma_j - C_ij /
    epsilon) stays in registers; the loop only multiplies it by scales u and v. It runs in bursts: a burst in
    which a scale left [2^-20, 2^20], or a sum fell so low that what exp flushed to 0 could matter, is run
    again in log form from where it began, and the scales are absorbed into the potentials.
strips. One launch an iteration for a middling problem. A program holds all of the short side by a strip of
    the long one, joins what all strips left of the sums over the long side in the launch before, and in one
    read of its strip finds the long side's potentials and the next parts of those sums. Log form: two exp an
    entry are less than the launch itself takes.
sweeps. Two launches an iteration, rows then columns, each an online logsumexp over blocks of the other side;
    a launch that would not fill the GPU also splits that side, and a small launch joins the parts. A
    problem that has converged has its `limit` set on the device, and its programs return at once. The cost is
    read from memory or, for point clouds, formed on the fly, so that memory is O(n + m).

Cost of point clouds. Up to _DIFFERENCES dimensions it is summed from differences, as the reference does, with
nothing to cancel. Beyond, it is |x|^2 + |y|^2 - 2 x.y of points moved to the mean of x: the norms and their
sum are float64, so that only the product rounds in float32, by an error of the size of |x| |y|, which in many
dimensions is not above that of the |x - y|^2 that eager PyTorch rounds. The product is full float32 ("ieee"):
single TF32 is off by 1e-3, and the three-pass form drops bits that the budget counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_WHOLE = 8192  # the most entries, padded to powers of two, that one program carries in registers
_ENTRIES_A_WARP = 2048  # of a whole problem: 64 registers a thread
_REGISTERS = 255  # said outright, or the assembler spills for an occupancy that does not help
_BURST = tl.constexpr(4)  # iterations between two looks at the scales
_SPAN = tl.constexpr(2.0**20)  # what the scales may reach
_ABSORB = tl.constexpr(2.0**10)  # from here on they are absorbed between bursts
# A flushed entry is under 2^-126, times a scale 2^20, times 2^14 columns: under 2^-32 of such a sum.
_LEAST_SUM = tl.constexpr(2.0**-60)
_SHORT, _STRIP = 128, 32  # the most lines of the short side, and how many of the long side a strip has
_PARTS = 64  # parts of a sum that are joined at once
_OWN, _OTHER = 32, 64  # block of a sweep: lines that are summed, and entries of each taken at once
_PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100 or H200: a sweep is split to reach it
_TILE = (32, 64)  # rows and columns of a program of the passes over single entries
_DIFFERENCES = 16
_FLOOR = tl.constexpr(float("-inf"))


def regime(count: int, rows: int, columns: int, stops: bool) -> str:
    """How `count` problems of this size are iterated; `stops`: a tolerance is given.

    "whole" where a problem fits the registers of one program. "strips" where its short side fits one program
    and the strips of the long side are few: each reads what all of them left of the sums, which is more than
    the strip itself. Where rows are the long side the error would be known two launches late, so that one
    with a tolerance goes the last way. "sweeps" else.
    """
    short, long = min(rows, columns), max(rows, columns)
    if triton.next_power_of_2(rows) * triton.next_power_of_2(columns) <= _WHOLE:
        return "whole"
    strips = count * triton.cdiv(long, _STRIP)
    if short <= _SHORT and strips <= _PROGRAMS and not (stops and rows > columns):
        return "strips"
    return "sweeps"


# --- entries ------------------------------------------------------------------------------------------------


@triton.jit
def _wide(index):
    """`index` as int64."""
    return tl.full((), 0, tl.int64) + index


@triton.jit
def _masses(marginal, problem, index, size, uniform, GIVEN: tl.constexpr):
    """float32 masses, 0 beyond the end."""
    inside = index < size
    if GIVEN:
        return tl.load(marginal + problem * size + index, mask=inside, other=0.0)
    return tl.where(inside, uniform, 0.0)


@triton.jit
def _potentials(potential, problem, index, size):
    """float64 potentials, -inf beyond the end."""
    return tl.load(potential + problem * size + index, mask=index < size, other=_FLOOR)


@triton.jit
def _minus_matrix(cost, problem, own, other, owns, others, own_stride, other_stride, inverse):
    """-C / epsilon [own, other] from the matrix, float64; 0 beyond the ends."""
    offset = (own * own_stride)[:, None] + (other * other_stride)[None, :]
    here = tl.load(
        cost + problem * owns * others + offset,
        mask=(own < owns)[:, None] & (other < others)[None, :],
        other=0.0,
    )
    return -(here.to(tl.float64) * inverse)


@triton.jit
def _minus_differences(own_point, other_point, own_in, other_in, inverse, DIMS: tl.constexpr):
    """-|x - y|^2 / epsilon [own, other], float64, summed from differences in float32."""
    total = tl.zeros((own_in.shape[0], other_in.shape[0]), tl.float32)
    for axis in tl.static_range(DIMS):
        x = tl.load(own_point + axis, mask=own_in, other=0.0)
        y = tl.load(other_point + axis, mask=other_in, other=0.0)
        gap = x[:, None] - y[None, :]
        total += gap * gap
    return -(total.to(tl.float64) * inverse)


@triton.jit
def _minus_products(
    own_point, other_point, own_norm, other_norm, own_in, other_in, inverse, dims,
    DIMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """-(|x|^2 + |y|^2 - 2 x.y) / epsilon [own, other], float64; the norms are given in float64."""
    axis = tl.arange(0, DIMS)
    in_x = own_in[:, None] & (axis < dims)[None, :]
    in_y = other_in[None, :] & (axis < dims)[:, None]
    x = tl.load(own_point[:, None] + axis[None, :], mask=in_x, other=0.0)
    y = tl.load(other_point[None, :] + axis[:, None], mask=in_y, other=0.0)
    product = tl.dot(x, y, input_precision=PRECISION).to(tl.float64)
    norm_x = tl.load(own_norm, mask=own_in, other=0.0)
    norm_y = tl.load(other_norm, mask=other_in, other=0.0)
    return (2.0 * product - norm_x[:, None] - norm_y[None, :]) * inverse


@triton.jit
def _minus_cost(
    first, second, first_norm, second_norm, problem, own, other, owns, others, own_stride, other_stride,
    inverse, dims, POINTS: tl.constexpr, DIMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """-C / epsilon [own, other] in float64; something finite beyond the ends.

    POINTS 0: `first` is the matrix. 1: `first` and `second` are points, whose differences are summed. 2: they
    have been moved to a common centre, and their products and squared norms are.
    """
    if POINTS == 0:
        minus = _minus_matrix(first, problem, own, other, owns, others, own_stride, other_stride, inverse)
    else:
        own_point = first + (problem * owns + own) * dims
        other_point = second + (problem * others + other) * dims
        if POINTS == 1:
            minus = _minus_differences(own_point, other_point, own < owns, other < others, inverse, DIMS)
        else:
            minus = _minus_products(
                own_point, other_point, first_norm + problem * owns + own,
                second_norm + problem * others + other, own < owns, other < others, inverse, dims, DIMS,
                PRECISION,
            )  # fmt: skip
    return minus


@triton.jit
def _log_sum(exponent, AXIS: tl.constexpr):
    """(m, s), float32: the sum of exp(exponent) along AXIS is exp(m) * s; m is -inf where it is empty."""
    largest = tl.max(exponent.to(tl.float32), AXIS)
    safe = tl.where(largest == _FLOOR, 0.0, largest).to(tl.float64)
    return largest, tl.sum(tl.exp((exponent - tl.expand_dims(safe, AXIS)).to(tl.float32)), AXIS)


@triton.jit
def _add_log_sum(largest, total, exponent, AXIS: tl.constexpr):
    """(m, s) as of `_log_sum` with one more block of exponents in it."""
    new = tl.maximum(largest, tl.max(exponent.to(tl.float32), AXIS))
    safe = tl.where(new == _FLOOR, 0.0, new)
    here = tl.sum(tl.exp((exponent - tl.expand_dims(safe.to(tl.float64), AXIS)).to(tl.float32)), AXIS)
    return new, total * tl.exp(largest - safe) + here


@triton.jit
def _settle(largest, total, mass):
    """log(mass) - log(sum), float64; -inf where there is no mass or no entry."""
    live = (mass > 0.0) & (largest != _FLOOR)
    log_sum = tl.where(live, largest, 0.0).to(tl.float64) + tl.log(tl.where(live, total, 1.0).to(tl.float64))
    return tl.where(live, tl.log(tl.where(live, mass, 1.0).to(tl.float64)) - log_sum, _FLOOR)


@triton.jit
def _row_error(before, potential, mass):
    """|P1 - a| of rows whose potentials an iteration moved from `before`: the sum of such a row had been
    exp(before + log sum) = mass * exp(before - potential). inf where a row is infeasible."""
    live = potential != _FLOOR
    gap = tl.where(live, before - tl.where(live, potential, 0.0), 0.0)
    off = tl.abs(tl.where(live, mass * tl.exp(gap.to(tl.float32)), 0.0) - mass)
    return tl.where((mass > 0.0) & (live == 0), float("inf"), off)


@triton.jit
def _real(potential, infinity_sign_of):
    """A potential as returned, float32: -inf without mass, +inf with mass that has nowhere to go."""
    dead = tl.where(infinity_sign_of > 0.0, float("inf"), _FLOOR)
    return tl.where(potential == _FLOOR, dead, potential.to(tl.float32))


# --- whole problems -----------------------------------------------------------------------------------------


@triton.jit
def _start(init, problem, index, size, mass, inverse, GIVEN: tl.constexpr):
    """gamma of the start, float64: init / epsilon, 0 where that is not finite, -inf without mass."""
    gamma = tl.zeros(mass.shape, tl.float64)
    if GIVEN:
        first = tl.load(init + problem * size + index, mask=index < size, other=0.0).to(tl.float64)
        first = first * inverse
        gamma = tl.where(tl.abs(first) < float("inf"), first, 0.0)
    return tl.where(mass > 0.0, gamma, _FLOOR)


@triton.jit
def _kernel_matrix(cost, problem, row, column, rows, columns, inverse, phi, gamma):
    """exp(phi_i + gamma_j - C_ij / epsilon), float32."""
    minus = _minus_matrix(cost, problem, row, column, rows, columns, columns, 1, inverse)
    return tl.exp((minus + (phi[:, None] + gamma[None, :])).to(tl.float32))


@triton.jit
def _absorbed(potential, scale):
    return tl.where(potential == _FLOOR, _FLOOR, potential + tl.log(scale.to(tl.float64)))


@triton.jit
def _scale(goal, total):
    """goal / total, NaN where it cannot be trusted; 1 where there is no mass to reach."""
    scale = goal / total
    good = (scale <= _SPAN) & (scale >= 1.0 / _SPAN) & (total >= _LEAST_SUM)
    return tl.where(goal > 0.0, tl.where(good, scale, float("nan")), 1.0)


@triton.jit
def _log_iteration(
    cost, a, phi_out, problem, column, rows, columns, inverse, uniform_a, mass_b, gamma,
    HAS_A: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One iteration in log form, by chunks of rows: phi goes to memory, gamma is returned."""
    for first in range(0, rows, CHUNK):
        row = first + tl.arange(0, CHUNK)
        minus = _minus_matrix(cost, problem, row, column, rows, columns, columns, 1, inverse)
        largest, total = _log_sum(minus + gamma[None, :], 1)
        mass = _masses(a, problem, row, rows, uniform_a, HAS_A)
        tl.store(phi_out + problem * rows + row, _settle(largest, total, mass), mask=row < rows)
    tl.debug_barrier()  # phi is read by other threads than wrote it
    largest = tl.full(mass_b.shape, _FLOOR, tl.float32)
    total = tl.zeros(mass_b.shape, tl.float32)
    for first in range(0, rows, CHUNK):
        row = first + tl.arange(0, CHUNK)
        minus = _minus_matrix(cost, problem, row, column, rows, columns, columns, 1, inverse)
        exponent = minus + _potentials(phi_out, problem, row, rows)[:, None]
        largest, total = _add_log_sum(largest, total, exponent, 0)
    tl.debug_barrier()  # and is overwritten next
    return _settle(largest, total, mass_b)


@triton.jit
def _whole_error(
    cost, a, phi_out, problem, column, rows, columns, inverse, uniform_a, mass_b, gamma,
    HAS_A: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """sum |P1 - a| of the potentials phi_out and gamma, inf where a row or column is infeasible."""
    off = tl.max(tl.where((mass_b > 0.0) & (gamma == _FLOOR), float("inf"), 0.0), 0)
    for first in range(0, rows, CHUNK):
        row = first + tl.arange(0, CHUNK)
        minus = _minus_matrix(cost, problem, row, column, rows, columns, columns, 1, inverse)
        phi = _potentials(phi_out, problem, row, rows)
        row_sum = tl.sum(tl.exp((minus + (phi[:, None] + gamma[None, :])).to(tl.float32)), 1)
        mass = _masses(a, problem, row, rows, uniform_a, HAS_A)
        infeasible = (mass > 0.0) & (phi == _FLOOR)
        off += tl.sum(tl.where(infeasible, float("inf"), tl.abs(row_sum - mass)), 0)
    return off


@triton.jit
def _whole_kernel(
    cost, epsilon, a, b, init, plan, f, g, iterations, error, value, phi_out, gamma_out, rows, columns,
    uniform_a, uniform_b, max_iter, tol,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_INIT: tl.constexpr, HAS_TOL: tl.constexpr,
    PLAN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One problem from start to end; the log form goes through it by CHUNK rows."""
    problem = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_R)  # int32: a problem is small
    column = tl.arange(0, BLOCK_C)
    width = tl.load(epsilon + problem)
    inverse = 1.0 / width
    # The potentials wait in phi_out and gamma_out, so that the loop has the registers.
    phi_place = phi_out + problem * rows + row
    gamma_place = gamma_out + problem * columns + column
    row_in = row < rows
    column_in = column < columns
    mass_b = _masses(b, problem, column, columns, uniform_b, HAS_B)
    gamma = _start(init, problem, column, columns, mass_b, inverse, HAS_INIT)
    tl.store(gamma_place, gamma, mask=column_in)
    tl.debug_barrier()

    matrix = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    u = tl.full((BLOCK_R,), 1.0, tl.float32)
    v = tl.full((BLOCK_C,), 1.0, tl.float32)
    row_sum = tl.zeros((BLOCK_R,), tl.float32)  # of matrix * v
    goal_a = tl.zeros((BLOCK_R,), tl.float32)  # the masses, 0 where nothing is live
    goal_b = tl.zeros((BLOCK_C,), tl.float32)
    feasible = tl.full((), 0, tl.int32)
    running = tl.full((), 1, tl.int32)
    step = tl.full((), 0, tl.int32)
    while (step < max_iter) & (running > 0):
        count = tl.minimum(tl.where(step == 0, 1, _BURST), max_iter - step)
        retry = step == 0  # in log form: there is no matrix yet
        far = retry
        if step > 0:
            next_v = v
            taken = tl.full((), 0, tl.int32)
            going = tl.full((), 1, tl.int32)
            for _ in range(count):
                if going > 0:
                    u = _scale(goal_a, row_sum)
                    column_sum = tl.sum(matrix * u[:, None], 0)
                    next_v = _scale(goal_b, column_sum)
                    row_sum = tl.sum(matrix * next_v[None, :], 1)
                    taken += 1
                    if HAS_TOL:
                        off = tl.sum(tl.abs(tl.where(goal_a > 0.0, u * row_sum - goal_a, 0.0)), 0)
                        going = tl.where((off < tol) & (feasible > 0), 0, going)
            # One NaN among the scales makes all that follow NaN, down to the v of the live columns.
            bad = tl.sum((next_v != next_v).to(tl.int32), 0)
            retry = bad > 0  # from v: the log form begins with phi, and needs no u
            if bad == 0:
                v = next_v
                step += taken
                running = going
            far = retry | (tl.max(tl.maximum(u, 1.0 / u), 0) > _ABSORB)
            far = far | (tl.max(tl.maximum(v, 1.0 / v), 0) > _ABSORB)
        if far:
            gamma = _absorbed(_potentials(gamma_out, problem, column, columns), v)
            mass_b = _masses(b, problem, column, columns, uniform_b, HAS_B)
            if retry:
                for _ in range(count):
                    if running > 0:
                        gamma = _log_iteration(
                            cost, a, phi_out, problem, column, rows, columns, inverse, uniform_a, mass_b,
                            gamma, HAS_A, CHUNK,
                        )  # fmt: skip
                        step += 1
                        if HAS_TOL:
                            off = _whole_error(
                                cost, a, phi_out, problem, column, rows, columns, inverse, uniform_a, mass_b,
                                gamma, HAS_A, CHUNK,
                            )  # fmt: skip
                            running = tl.where(off < tol, 0, running)
                phi = _potentials(phi_out, problem, row, rows)
            else:
                phi = _absorbed(_potentials(phi_out, problem, row, rows), u)
            tl.debug_barrier()  # everything is read before it is written
            tl.store(phi_place, phi, mask=row_in)
            tl.store(gamma_place, gamma, mask=column_in)
            tl.debug_barrier()
            matrix = _kernel_matrix(cost, problem, row, column, rows, columns, inverse, phi, gamma)
            row_sum = tl.sum(matrix, 1)
            u = tl.full((BLOCK_R,), 1.0, tl.float32)
            v = tl.full((BLOCK_C,), 1.0, tl.float32)
            mass_a = _masses(a, problem, row, rows, uniform_a, HAS_A)
            goal_a = tl.where(phi == _FLOOR, 0.0, mass_a)
            goal_b = tl.where(gamma == _FLOOR, 0.0, mass_b)
            idle = tl.max(mass_a - goal_a, 0) + tl.max(mass_b - goal_b, 0)  # what has nowhere to go
            feasible = tl.where(idle > 0.0, 0, 1)

    phi = _absorbed(_potentials(phi_out, problem, row, rows), u)
    gamma = _absorbed(_potentials(gamma_out, problem, column, columns), v)
    mass_a = _masses(a, problem, row, rows, uniform_a, HAS_A)
    mass_b = _masses(b, problem, column, columns, uniform_b, HAS_B)
    tl.debug_barrier()
    matrix = _kernel_matrix(cost, problem, row, column, rows, columns, inverse, phi, gamma)
    off = tl.sum(tl.abs(tl.sum(matrix, 1) - mass_a), 0)
    stuck = tl.sum(((mass_a > 0.0) & (phi == _FLOOR)).to(tl.int32), 0)
    stuck += tl.sum(((mass_b > 0.0) & (gamma == _FLOOR)).to(tl.int32), 0)
    tl.store(error + problem, tl.where(stuck > 0, float("inf"), off))
    tl.store(iterations + problem, step)
    if PLAN:
        entry = plan + problem * rows * columns + (row * columns)[:, None] + column[None, :]
        tl.store(entry, matrix.to(plan.dtype.element_ty), mask=row_in[:, None] & column_in[None, :])
    weight = tl.where(gamma == _FLOOR, 0.0, mass_b).to(tl.float64)
    mass = tl.sum(weight, 0)
    moment = tl.sum(weight * tl.where(gamma == _FLOOR, 0.0, gamma), 0)
    shift = moment / tl.where(mass > 0.0, mass, 1.0)
    real_a = tl.where(phi == _FLOOR, 0.0, mass_a.to(tl.float64) * (phi + shift))
    gain = tl.sum(real_a, 0) + moment - shift * mass - mass
    tl.store(value + problem, tl.where(stuck > 0, float("inf"), width * gain).to(tl.float32))
    tl.store(phi_place, phi, mask=row_in)
    tl.store(gamma_place, gamma, mask=column_in)
    tl.store(f + problem * rows + row, _real(width * (phi + shift), mass_a), mask=row_in)
    tl.store(g + problem * columns + column, _real(width * (gamma - shift), mass_b), mask=column_in)


# --- strips ------------------------------------------------------------------------------------------------


@triton.jit
def _join_parts(parts, problem, count, index, size, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """(m, s) of the sums whose parts [N, count, 2, size] were left by the launch before."""
    largest = tl.full((BLOCK,), _FLOOR, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, PARTS):
        part = first + tl.arange(0, PARTS).to(tl.int64)
        place = parts + ((problem * count + part) * 2 * size)[None, :] + index[:, None]
        inside = (index < size)[:, None] & (part < count)[None, :]
        high = tl.load(place, mask=inside, other=_FLOOR)
        here = tl.load(place + size, mask=inside, other=0.0)
        new = tl.maximum(largest, tl.max(high, 1))
        safe = tl.where(new == _FLOOR, 0.0, new)
        total = total * tl.exp(largest - safe) + tl.sum(here * tl.exp(high - safe[:, None]), 1)
        largest = new
    return largest, total


@triton.jit(do_not_specialize=["step"])
def _strip_kernel(
    cost, epsilon, marginal, long_marginal, before, potential, long_potential, parts_in, parts_out, stuck,
    limit, size, long_size, stride, long_stride, uniform, long_uniform, tol, step, blocks,
    HAS_MARGINAL: tl.constexpr, HAS_LONG: tl.constexpr, HAS_TOL: tl.constexpr, FROM_PARTS: tl.constexpr,
    UPDATE: tl.constexpr, SHORT: tl.constexpr, STRIP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """An iteration. One program a strip: every line of the short side, STRIP of the long one.

    The short side's potentials come from the parts the launch before left (FROM_PARTS; every program of a
    problem joins them, one writes them), the long side's from the strip (UPDATE), and from those, while the
    strip is still on chip, its parts of the sums for the short side. `tol` only where the short side is rows.
    """
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    problem = program // blocks
    short = tl.arange(0, SHORT).to(tl.int64)
    run = step <= tl.load(limit + problem)
    here = tl.full((SHORT,), _FLOOR, tl.float64)
    if FROM_PARTS:
        if run:
            largest, total = _join_parts(parts_in, problem, blocks, short, size, SHORT, PARTS)
            mass = _masses(marginal, problem, short, size, uniform, HAS_MARGINAL)
            here = _settle(largest, total, mass)
            if HAS_TOL:
                old = _potentials(before, problem, short, size)
                off = tl.sum(_row_error(old, here, mass), 0)
                for first in range(0, blocks, 128):
                    strip = first + tl.arange(0, 128)
                    flag = tl.load(stuck + problem * blocks + strip, mask=strip < blocks, other=0.0)
                    off += tl.sum(flag, 0)
                run = (step == 1) | (off >= tol)  # the first step has no iteration before it
                # Every program of the problem finds this; one says so to the launches that follow.
                tl.store(limit + problem, step - 1, mask=(run == 0) & (block == 0))
    elif UPDATE:
        here = _potentials(potential, problem, short, size)
    if run:
        inverse = 1.0 / tl.load(epsilon + problem)
        line = block * STRIP + tl.arange(0, STRIP)
        minus = _minus_matrix(cost, problem, short, line, size, long_size, stride, long_stride, inverse)
        if FROM_PARTS:
            tl.store(potential + problem * size + short, here, mask=short < tl.where(block == 0, size, 0))
        if UPDATE:
            largest, total = _log_sum(minus + here[:, None], 0)
            mass = _masses(long_marginal, problem, line, long_size, long_uniform, HAS_LONG)
            there = _settle(largest, total, mass)
            tl.store(long_potential + problem * long_size + line, there, mask=line < long_size)
            if HAS_TOL:
                off = tl.max(tl.where((mass > 0.0) & (there == _FLOOR), float("inf"), 0.0), 0)
                tl.store(stuck + problem * blocks + block, off, mask=step == 1)
        else:
            there = _potentials(long_potential, problem, line, long_size)
        largest, total = _log_sum(minus + there[None, :], 1)
        place = parts_out + ((problem * blocks + block) * 2) * size + short
        tl.store(place, largest, mask=short < size)
        tl.store(place + size, total, mask=short < size)


# --- sweeps -------------------------------------------------------------------------------------------------


@triton.jit
def _finish_line(
    out, before, errors, marginal, problem, block, index, owns, uniform, largest, total, step,
    slots, slot, HAS_MARGINAL: tl.constexpr, ROWS: tl.constexpr, HAS_TOL: tl.constexpr,
):  # fmt: skip
    """The new potentials of a block. For `tol` also the block's share of the error: that of the rows of the
    iteration before, and inf from infeasible columns, which the first iteration shows."""
    inside = index < owns
    mass = _masses(marginal, problem, index, owns, uniform, HAS_MARGINAL)
    potential = _settle(largest, total, mass)
    tl.store(out + problem * owns + index, potential, mask=inside)
    if HAS_TOL:
        if ROWS:
            off = _row_error(_potentials(before, problem, index, owns), potential, mass)
            tl.store(errors + problem * slots + slot + block, tl.sum(tl.where(inside, off, 0.0), 0))
        else:
            stuck = inside & (mass > 0.0) & (potential == _FLOOR)
            off = tl.max(tl.where(stuck, float("inf"), 0.0), 0)
            tl.store(errors + problem * slots + slot + block, off, mask=step == 1)


@triton.jit
def _converged(errors, problem, slots, tol):
    """Whether the error of the iteration before is below tol."""
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, slots, 256):
        index = first + tl.arange(0, 256)
        total += tl.sum(tl.load(errors + problem * slots + index, mask=index < slots, other=0.0), 0)
    return total < tol


@triton.jit(do_not_specialize=["step"])
def _sweep_kernel(
    first, second, first_norm, second_norm, epsilon, marginal, potential, out, before, errors, limit, parts,
    owns, others, own_stride, other_stride, dims, uniform, tol, step, blocks, splits, span, slots, slot,
    POINTS: tl.constexpr, DIMS: tl.constexpr, PRECISION: tl.constexpr, HAS_MARGINAL: tl.constexpr,
    ROWS: tl.constexpr, HAS_TOL: tl.constexpr, SPLIT: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """A half-step: the potentials `out` of one side from `potential` of the other. One program a block of
    lines and, with SPLIT, a `span` of the other side."""
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    block = (program // splits) % blocks
    problem = program // (splits * blocks)
    run = step <= tl.load(limit + problem)
    if HAS_TOL and not ROWS:
        done = run & (step > 1) & _converged(errors, problem, slots, tol)
        # Every program of the problem finds this; one of them says so to the launches that follow.
        tl.store(limit + problem, step - 1, mask=done & (block == 0) & (split == 0))
        run = run & (done == 0)
    if run:
        inverse = 1.0 / tl.load(epsilon + problem)
        own = block * OWN + tl.arange(0, OWN)
        largest = tl.full((OWN,), _FLOOR, tl.float32)
        total = tl.zeros((OWN,), tl.float32)
        begin = split * span
        end = tl.minimum(begin + span, others)
        for start in range(begin, end, OTHER):
            other = start + tl.arange(0, OTHER).to(tl.int64)
            minus = _minus_cost(
                first, second, first_norm, second_norm, problem, own, other, owns, others, own_stride,
                other_stride, inverse, dims, POINTS, DIMS, PRECISION,
            )  # fmt: skip
            exponent = minus + _potentials(potential, problem, other, others)[None, :]
            largest, total = _add_log_sum(largest, total, exponent, 1)
        if SPLIT:
            part = parts + ((problem * splits + split) * 2) * owns + own
            tl.store(part, largest, mask=own < owns)
            tl.store(part + owns, total, mask=own < owns)
        else:
            _finish_line(
                out, before, errors, marginal, problem, block, own, owns, uniform, largest, total, step,
                slots, slot, HAS_MARGINAL, ROWS, HAS_TOL,
            )  # fmt: skip


@triton.jit(do_not_specialize=["step"])
def _join_kernel(
    parts, marginal, out, before, errors, limit, owns, uniform, step, blocks, splits, slots, slot,
    HAS_MARGINAL: tl.constexpr, ROWS: tl.constexpr, HAS_TOL: tl.constexpr, OWN: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The end of a half-step whose sweep was split."""
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    problem = program // blocks
    if step <= tl.load(limit + problem):
        own = block * OWN + tl.arange(0, OWN)
        largest, total = _join_parts(parts, problem, splits, own, owns, OWN, PARTS)
        _finish_line(
            out, before, errors, marginal, problem, block, own, owns, uniform, largest, total, step, slots,
            slot, HAS_MARGINAL, ROWS, HAS_TOL,
        )  # fmt: skip


@triton.jit
def _plan_kernel(
    first, second, first_norm, second_norm, epsilon, phi, gamma, weight, plan, row_parts, rows, columns, dims,
    blocks, splits, span,
    POINTS: tl.constexpr, DIMS: tl.constexpr, PRECISION: tl.constexpr, WEIGHTED: tl.constexpr,
    STORE: tl.constexpr, SUMS: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """The plan of given potentials, times `weight` of its problem if WEIGHTED, and the sums of its rows over
    each span of columns."""
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    block = (program // splits) % blocks
    problem = program // (splits * blocks)
    inverse = 1.0 / tl.load(epsilon + problem)
    row = block * OWN + tl.arange(0, OWN)
    row_phi = _potentials(phi, problem, row, rows)
    total = tl.zeros((OWN,), tl.float32)
    begin = split * span
    end = tl.minimum(begin + span, columns)
    for start in range(begin, end, OTHER):
        column = start + tl.arange(0, OTHER).to(tl.int64)
        minus = _minus_cost(
            first, second, first_norm, second_norm, problem, row, column, rows, columns, columns, 1, inverse,
            dims, POINTS, DIMS, PRECISION,
        )  # fmt: skip
        exponent = minus + (row_phi[:, None] + _potentials(gamma, problem, column, columns)[None, :])
        here = tl.exp(exponent.to(tl.float32))
        if WEIGHTED:
            here = here * tl.load(weight + problem)
        if SUMS:
            total += tl.sum(here, 1)
        if STORE:
            entry = plan + problem * rows * columns + (row * columns)[:, None] + column[None, :]
            inside = (row < rows)[:, None] & (column < columns)[None, :]
            tl.store(entry, here.to(plan.dtype.element_ty), mask=inside)
    if SUMS:
        tl.store(row_parts + (problem * splits + split) * rows + row, total, mask=row < rows)


@triton.jit
def _finish_kernel(
    epsilon, a, b, phi, gamma, row_parts, f, g, value, error, rows, columns, uniform_a, uniform_b, splits,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """f and g in their gauge, the value, the error. One program a problem."""
    problem = tl.program_id(0).to(tl.int64)
    width = tl.load(epsilon + problem)
    mass = tl.full((), 0.0, tl.float64)
    moment = tl.full((), 0.0, tl.float64)
    gain = tl.full((), 0.0, tl.float64)
    off = tl.full((), 0.0, tl.float64)
    for start in range(0, columns, BLOCK):
        index = start + tl.arange(0, BLOCK).to(tl.int64)
        weight = _masses(b, problem, index, columns, uniform_b, HAS_B)
        potential = _potentials(gamma, problem, index, columns)
        live = potential != _FLOOR
        off += tl.max(tl.where((weight > 0.0) & (live == 0), float("inf"), 0.0), 0)
        weight = tl.where(live, weight, 0.0).to(tl.float64)
        mass += tl.sum(weight, 0)
        moment += tl.sum(weight * tl.where(live, potential, 0.0), 0)
    shift = moment / tl.where(mass > 0.0, mass, 1.0)
    for start in range(0, columns, BLOCK):
        index = start + tl.arange(0, BLOCK).to(tl.int64)
        weight = _masses(b, problem, index, columns, uniform_b, HAS_B)
        potential = _potentials(gamma, problem, index, columns)
        tl.store(
            g + problem * columns + index, _real(width * (potential - shift), weight), mask=index < columns
        )
    for start in range(0, rows, BLOCK):
        index = start + tl.arange(0, BLOCK).to(tl.int64)
        weight = _masses(a, problem, index, rows, uniform_a, HAS_A)
        potential = _potentials(phi, problem, index, rows)
        live = potential != _FLOOR
        tl.store(f + problem * rows + index, _real(width * (potential + shift), weight), mask=index < rows)
        gain += tl.sum(tl.where(live, weight.to(tl.float64) * (potential + shift), 0.0), 0)
        off += tl.max(tl.where((weight > 0.0) & (live == 0), float("inf"), 0.0), 0)
        if HAS_SUMS:
            total = tl.zeros((BLOCK,), tl.float32)
            for split in range(splits):
                part = row_parts + (problem * splits + split) * rows + index
                total += tl.load(part, mask=index < rows, other=0.0)
            off += tl.sum(tl.abs(total - weight).to(tl.float64), 0)
    gain += moment - shift * mass - mass
    infeasible = off == float("inf")
    tl.store(value + problem, tl.where(infeasible, off, width * gain).to(tl.float32))
    tl.store(error + problem, off.to(tl.float32))


# --- gradients ----------------------------------------------------------------------------------------------


@triton.jit
def _place(row_blocks, column_blocks, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(problem, row block, column block, rows, columns) of this program, int64."""
    program = tl.program_id(0).to(tl.int64)
    column_block = program % column_blocks
    row_block = (program // column_blocks) % row_blocks
    problem = program // (column_blocks * row_blocks)
    row = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    column = column_block * BLOCK_C + tl.arange(0, BLOCK_C)
    return problem, row_block, column_block, row, column


@triton.jit
def _adjoint_kernel(
    grad_plan, cost, epsilon, phi, gamma, plan, row_parts, column_parts, rows, columns, row_blocks,
    column_blocks, HAS_GRAD: tl.constexpr, STORE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The plan in float64, and the sums of grad_plan * plan over the rows and columns of each block."""
    problem, row_block, column_block, row, column = _place(row_blocks, column_blocks, BLOCK_R, BLOCK_C)
    inverse = 1.0 / tl.load(epsilon + problem)
    minus = _minus_matrix(cost, problem, row, column, rows, columns, columns, 1, inverse)
    row_phi = _potentials(phi, problem, row, rows)
    column_gamma = _potentials(gamma, problem, column, columns)
    here = tl.exp(minus + (row_phi[:, None] + column_gamma[None, :]))
    row_in, column_in = row < rows, column < columns
    inside = row_in[:, None] & column_in[None, :]
    offset = problem * rows * columns + (row * columns)[:, None] + column[None, :]
    if STORE:
        tl.store(plan + offset, here, mask=inside)
    if HAS_GRAD:
        slope = tl.load(grad_plan + offset, mask=inside, other=0.0).to(tl.float64)
        weighted = tl.where(here > 0.0, slope * here, 0.0)
        row_part = row_parts + (problem * column_blocks + column_block) * rows + row
        tl.store(row_part, tl.sum(weighted, 1), mask=row_in)
        column_part = column_parts + (problem * row_blocks + row_block) * columns + column
        tl.store(column_part, tl.sum(weighted, 0), mask=column_in)


@triton.jit
def _cost_gradient_kernel(
    grad_plan, plan, epsilon, lam, mu, out, rows, columns, row_blocks, column_blocks,
    HAS_GRAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    problem, _, _, row, column = _place(row_blocks, column_blocks, BLOCK_R, BLOCK_C)
    row_in, column_in = row < rows, column < columns
    inside = row_in[:, None] & column_in[None, :]
    offset = problem * rows * columns + (row * columns)[:, None] + column[None, :]
    here = tl.load(plan + offset, mask=inside, other=0.0)
    row_lam = tl.load(lam + problem * rows + row, mask=row_in, other=0.0)
    column_mu = tl.load(mu + problem * columns + column, mask=column_in, other=0.0)
    slope = row_lam[:, None] + column_mu[None, :]
    if HAS_GRAD:
        inverse = 1.0 / tl.load(epsilon + problem)
        slope -= tl.load(grad_plan + offset, mask=inside, other=0.0).to(tl.float64) * inverse
    grad = tl.where(here > 0.0, here * slope, 0.0)
    tl.store(out + offset, grad.to(tl.float32).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["step"])
def _pull_kernel(
    cost, epsilon, own_potential, other_potential, adjoint, marginal, seed, out, limit, owns, others,
    own_stride, other_stride, uniform, step, blocks,
    HAS_MARGINAL: tl.constexpr, SEEDED: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """One half-step backward: out_i = -sum_j exp(own_i + other_j - C_ij / epsilon) adjoint_j / marginal_j,
    plus seed_i in the last iteration that was run. `marginal` is that of the other side."""
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    problem = program // blocks
    last = tl.load(limit + problem)
    if step <= last:
        inverse = 1.0 / tl.load(epsilon + problem)
        own = block * OWN + tl.arange(0, OWN)
        here = _potentials(own_potential, problem, own, owns)
        total = tl.zeros((OWN,), tl.float64)
        for start in range(0, others, OTHER):
            other = start + tl.arange(0, OTHER).to(tl.int64)
            minus = _minus_matrix(cost, problem, own, other, owns, others, own_stride, other_stride, inverse)
            there = _potentials(other_potential, problem, other, others)
            mass = _masses(marginal, problem, other, others, uniform, HAS_MARGINAL).to(tl.float64)
            slope = tl.load(adjoint + problem * others + other, mask=other < others, other=0.0)
            slope = tl.where(there != _FLOOR, slope / tl.where(there != _FLOOR, mass, 1.0), 0.0)
            entry = tl.exp((minus + (here[:, None] + there[None, :])).to(tl.float32))
            total += tl.sum(entry * slope.to(tl.float32)[None, :], 1).to(tl.float64)
        result = -total
        if SEEDED:
            first = tl.load(seed + problem * owns + own, mask=own < owns, other=0.0)
            result += tl.where(step == last, first, 0.0)
        tl.store(out + problem * owns + own, result, mask=own < owns)


@triton.jit
def _unrolled_cost_kernel(
    grad_plan, cost, epsilon, a, b, phi, gamma, adjoint_phi, adjoint_gamma, limit, out, count, rows, columns,
    uniform_a, uniform_b, row_blocks, column_blocks,
    HAS_GRAD: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient to the cost, summed over the half-steps, from the potentials and adjoints of each."""
    problem, _, _, row, column = _place(row_blocks, column_blocks, BLOCK_R, BLOCK_C)
    inverse = 1.0 / tl.load(epsilon + problem)
    last = tl.load(limit + problem)
    row_in, column_in = row < rows, column < columns
    minus = _minus_matrix(cost, problem, row, column, rows, columns, columns, 1, inverse)
    mass_a = _masses(a, problem, row, rows, uniform_a, HAS_A).to(tl.float64)
    mass_b = _masses(b, problem, column, columns, uniform_b, HAS_B).to(tl.float64)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    here = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    row_phi = tl.full((BLOCK_R,), _FLOOR, tl.float64)
    there = _potentials(gamma, problem, column, columns)
    for step in range(1, last + 1):
        record = step * _wide(count) + problem
        row_phi = _potentials(phi, record, row, rows)
        slope = tl.load(adjoint_phi + record * rows + row, mask=row_in, other=0.0)
        slope = tl.where(row_phi != _FLOOR, slope / tl.where(row_phi != _FLOOR, mass_a, 1.0), 0.0)
        here = tl.exp((minus + (row_phi[:, None] + there[None, :])).to(tl.float32))
        total += here * slope.to(tl.float32)[:, None]
        there = _potentials(gamma, record, column, columns)
        slope = tl.load(adjoint_gamma + record * columns + column, mask=column_in, other=0.0)
        slope = tl.where(there != _FLOOR, slope / tl.where(there != _FLOOR, mass_b, 1.0), 0.0)
        here = tl.exp((minus + (row_phi[:, None] + there[None, :])).to(tl.float32))
        total += here * slope.to(tl.float32)[None, :]
    inside = row_in[:, None] & column_in[None, :]
    offset = problem * rows * columns + (row * columns)[:, None] + column[None, :]
    if HAS_GRAD:
        slope = tl.load(grad_plan + offset, mask=inside, other=0.0).to(tl.float32)
        total -= tl.where(here > 0.0, slope * here, 0.0)
    grad = total.to(tl.float64) * inverse
    tl.store(out + offset, grad.to(tl.float32).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _points_gradient_kernel(
    first, second, first_norm, second_norm, epsilon, own_potential, other_potential, grad, out, owns, others,
    dims, count, blocks, splits, span,
    POINTS: tl.constexpr, DIMS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """2 grad sum_j P_ij (x_i - y_j) over a span of the other points; `out` [splits, N, owns, dims]."""
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    block = (program // splits) % blocks
    problem = program // (splits * blocks)
    inverse = 1.0 / tl.load(epsilon + problem)
    own = block * OWN + tl.arange(0, OWN)
    here = _potentials(own_potential, problem, own, owns)
    axis = tl.arange(0, BLOCK_D)
    total = tl.zeros((OWN, BLOCK_D), tl.float32)
    mass = tl.zeros((OWN,), tl.float32)
    own_point = first + (problem * owns + own) * dims
    own_in = own < owns
    begin = split * span
    end = tl.minimum(begin + span, others)
    for start in range(begin, end, OTHER):
        other = start + tl.arange(0, OTHER).to(tl.int64)
        other_in = other < others
        minus = _minus_cost(
            first, second, first_norm, second_norm, problem, own, other, owns, others, 0, 0, inverse, dims,
            POINTS, DIMS, PRECISION,
        )  # fmt: skip
        there = _potentials(other_potential, problem, other, others)
        plan = tl.exp((minus + (here[:, None] + there[None, :])).to(tl.float32))
        other_point = second + (problem * others + other) * dims
        if POINTS == 1:
            for k in tl.static_range(DIMS):
                x = tl.load(own_point + k, mask=own_in, other=0.0)
                y = tl.load(other_point + k, mask=other_in, other=0.0)
                moved = tl.sum(plan * (x[:, None] - y[None, :]), 1)
                total += tl.where(axis[None, :] == k, moved[:, None], 0.0)
        else:
            inside = other_in[:, None] & (axis < dims)[None, :]
            y = tl.load(other_point[:, None] + axis[None, :], mask=inside, other=0.0)
            total -= tl.dot(plan, y, input_precision=PRECISION)
            mass += tl.sum(plan, 1)
    inside = own_in[:, None] & (axis < dims)[None, :]
    if POINTS == 2:
        x = tl.load(own_point[:, None] + axis[None, :], mask=inside, other=0.0)
        total += mass[:, None] * x
    scale = 2.0 * tl.load(grad + problem)
    place = (split * count + problem) * owns * dims
    tl.store(out + place + (own * dims)[:, None] + axis[None, :], scale * total, mask=inside)


# --- launchers ----------------------------------------------------------------------------------------------


class _Cost:
    """Where costs come from, as every sweep takes it: a matrix [N, K, E], or points."""

    def __init__(self, first: Tensor, second: Tensor | None = None) -> None:
        self.count, self.rows = first.shape[:2]
        self.first = first.contiguous()
        self.dims, self.kind, self.padded = 0, 0, 1
        if second is None:
            self.columns = first.shape[2]
            self.second = self.first_norm = self.second_norm = self.first
            return
        self.columns, self.dims = second.shape[1:]
        self.second = second.contiguous()
        self.first_norm, self.second_norm = self.first, self.second  # never read
        self.kind, self.padded = 1, self.dims
        if self.dims > _DIFFERENCES:
            self.kind, self.padded = 2, triton.next_power_of_2(self.dims)
            centre = first.mean(1, keepdim=True)
            self.first, self.second = first - centre, second - centre
            self.first_norm = self.first.double().square().sum(2)
            self.second_norm = self.second.double().square().sum(2)

    def sides(self, of_rows: bool) -> tuple[Any, ...]:
        """first, second and their norms, the side that a sweep sums for coming first."""
        pairs = (self.first, self.second), (self.first_norm, self.second_norm)
        if of_rows or self.kind == 0:
            return *pairs[0], *pairs[1]
        return *pairs[0][::-1], *pairs[1][::-1]

    def extents(self, of_rows: bool) -> tuple[int, int, int, int]:
        """owns, others, own_stride, other_stride."""
        if of_rows:
            return self.rows, self.columns, self.columns, 1
        return self.columns, self.rows, 1, self.columns

    def constants(self) -> dict[str, Any]:
        return {"POINTS": self.kind, "DIMS": self.padded, "PRECISION": "ieee"}


def _splits(programs: int, others: int) -> tuple[int, int]:
    """(parts of the other side, length of each), such that a launch fills the GPU."""
    most = triton.cdiv(others, 2 * _OTHER)
    wanted = max(1, min(triton.cdiv(_PROGRAMS, programs), most))
    span = triton.cdiv(triton.cdiv(others, wanted), _OTHER) * _OTHER
    return triton.cdiv(others, span), span


class _Marginal:
    """A marginal as kernels take it: tensor or something never read, value where uniform, whether given."""

    def __init__(self, given: Tensor | None, like: Tensor, size: int, mass: float = 1.0) -> None:
        self.tensor = like if given is None else given.contiguous()
        self.uniform = mass / size
        self.given = given is not None


class _Iteration:
    """Half-steps by sweeps, over potentials that the caller lays out."""

    def __init__(
        self, cost: _Cost, epsilon: Tensor, a: _Marginal, b: _Marginal, limit: Tensor, tol: float
    ) -> None:
        self.cost, self.epsilon, self.a, self.b, self.limit, self.tol = cost, epsilon, a, b, limit, tol
        self.blocks = {True: triton.cdiv(cost.rows, _OWN), False: triton.cdiv(cost.columns, _OWN)}
        self.splits = {
            rows: _splits(cost.count * self.blocks[rows], cost.extents(rows)[1]) for rows in (True, False)
        }
        self.slots = sum(self.blocks.values())
        self.errors = epsilon.new_empty((cost.count, self.slots), dtype=torch.float32)
        self.parts = {
            rows: epsilon.new_empty(
                (cost.count, parts, 2, cost.extents(rows)[0]) if parts > 1 else 0, dtype=torch.float32
            )
            for rows, (parts, _) in self.splits.items()
        }

    def half_step(self, rows: bool, potential: Tensor, out: Tensor, before: Tensor, step: int) -> None:
        """`out`, the potentials of the rows (or columns), from `potential` of the other side; `before` are
        those of the iteration before, for its error."""
        cost, marginal = self.cost, self.a if rows else self.b
        owns = cost.extents(rows)[0]
        blocks, (splits, span) = self.blocks[rows], self.splits[rows]
        slot = 0 if rows else self.blocks[True]
        constants = {"HAS_MARGINAL": marginal.given, "ROWS": rows, "HAS_TOL": self.tol > 0}
        _sweep_kernel[(cost.count * blocks * splits,)](
            *cost.sides(rows), self.epsilon, marginal.tensor, potential, out, before, self.errors, self.limit,
            self.parts[rows], *cost.extents(rows), cost.dims, marginal.uniform, self.tol, step, blocks,
            splits, span, self.slots, slot, **cost.constants(), **constants, SPLIT=splits > 1, OWN=_OWN,
            OTHER=_OTHER, enable_fp_fusion=True,
        )  # fmt: skip
        if splits > 1:
            _join_kernel[(cost.count * blocks,)](
                self.parts[rows], marginal.tensor, out, before, self.errors, self.limit, owns,
                marginal.uniform, step, blocks, splits, self.slots, slot, **constants, OWN=_OWN, PARTS=_PARTS,
                enable_fp_fusion=True,
            )  # fmt: skip


def _first_gamma(init: Tensor | None, b: Tensor | None, cost: _Cost, epsilon: Tensor) -> Tensor:
    """gamma of the start, float64 [N, E]: 0 where init is not finite, -inf without mass."""
    if init is None:
        gamma = epsilon.new_zeros((cost.count, cost.columns))
    else:
        gamma = init.double() / epsilon[:, None]
        gamma = torch.where(torch.isfinite(gamma), gamma, 0.0)
    return gamma if b is None else torch.where(b > 0, gamma, -torch.inf)


def _sums(
    cost: _Cost,
    epsilon: Tensor,
    phi: Tensor,
    gamma: Tensor,
    plan: Tensor | None,
    weight: Tensor | None = None,
    sums: bool = True,
) -> Tensor:
    """The plan, if wanted, and the sums of its rows, in parts [N, splits, K]."""
    blocks = triton.cdiv(cost.rows, _OWN)
    splits, span = _splits(cost.count * blocks, cost.columns)
    parts = epsilon.new_empty((cost.count, splits, cost.rows) if sums else 0, dtype=torch.float32)
    _plan_kernel[(cost.count * blocks * splits,)](
        *cost.sides(True), epsilon, phi, gamma, epsilon if weight is None else weight,
        parts if plan is None else plan, parts, cost.rows, cost.columns, cost.dims, blocks, splits, span,
        **cost.constants(), WEIGHTED=weight is not None, STORE=plan is not None, SUMS=sums, OWN=_OWN,
        OTHER=_OTHER, enable_fp_fusion=True,
    )  # fmt: skip
    return parts


class _Outputs:
    """What every solver gives."""

    def __init__(self, count: int, rows: int, columns: int, like: Tensor) -> None:
        self.f = like.new_empty((count, rows), dtype=torch.float32)
        self.g = like.new_empty((count, columns), dtype=torch.float32)
        self.iterations = like.new_empty(count, dtype=torch.int32)
        self.error = like.new_empty(count, dtype=torch.float32)
        self.value = like.new_empty(count, dtype=torch.float32)
        self.phi = like.new_empty((count, rows), dtype=torch.float64)
        self.gamma = like.new_empty((count, columns), dtype=torch.float64)


def _solve_whole(
    cost: Tensor,
    epsilon: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    init: Tensor | None,
    max_iter: int,
    tol: float,
    plan: Tensor | None,
) -> _Outputs:
    count, rows, columns = cost.shape
    out = _Outputs(count, rows, columns, cost)
    mass_a, mass_b = _Marginal(a, epsilon, rows), _Marginal(b, epsilon, columns)
    block_r, block_c = triton.next_power_of_2(rows), triton.next_power_of_2(columns)
    warps = max(1, block_r * block_c // _ENTRIES_A_WARP)
    _whole_kernel[(count,)](
        cost, epsilon, mass_a.tensor, mass_b.tensor, epsilon if init is None else init.contiguous(),
        cost if plan is None else plan, out.f, out.g, out.iterations, out.error, out.value, out.phi,
        out.gamma, rows, columns, mass_a.uniform, mass_b.uniform, max_iter, tol,
        HAS_A=mass_a.given, HAS_B=mass_b.given, HAS_INIT=init is not None, HAS_TOL=tol > 0,
        PLAN=plan is not None, BLOCK_R=block_r, BLOCK_C=block_c,
        CHUNK=max(1, min(block_r, 256 * warps // block_c)), num_warps=warps, maxnreg=_REGISTERS,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _iterate_strips(
    cost: _Cost,
    epsilon: Tensor,
    mass_a: _Marginal,
    mass_b: _Marginal,
    gamma: Tensor,
    limit: Tensor,
    max_iter: int,
    tol: float,
) -> Tensor:
    """phi [1 or 2, N, K], the last where iterations run in turn; gamma in place."""
    wide = cost.rows <= cost.columns
    size, long_size, stride, long_stride = cost.extents(wide)
    short, long = (mass_a, mass_b) if wide else (mass_b, mass_a)
    blocks = triton.cdiv(long_size, _STRIP)
    phi = epsilon.new_zeros((2 if tol > 0 else 1, cost.count, cost.rows))
    parts = epsilon.new_empty((2, cost.count, blocks, 2, size), dtype=torch.float32)
    stuck = epsilon.new_empty((cost.count, blocks), dtype=torch.float32)

    def launch(step: int, from_parts: bool, update: bool) -> None:
        new, old = phi[step % len(phi)], phi[(step + 1) % len(phi)]
        _strip_kernel[(cost.count * blocks,)](
            cost.first, epsilon, short.tensor, long.tensor, old, *((new, gamma) if wide else (gamma, new)),
            parts[(step + 1) % 2], parts[step % 2], stuck, limit, size, long_size, stride, long_stride,
            short.uniform, long.uniform, tol, step, blocks, HAS_MARGINAL=short.given, HAS_LONG=long.given,
            HAS_TOL=tol > 0, FROM_PARTS=from_parts, UPDATE=update,
            SHORT=max(16, triton.next_power_of_2(size)), STRIP=_STRIP, PARTS=_PARTS, num_warps=8,
            enable_fp_fusion=True,
        )  # fmt: skip

    if wide:
        launch(0, False, False)
    for step in range(1, max_iter + 1):
        launch(step, wide or step > 1, True)
    if not wide:
        line_blocks = triton.cdiv(size, _OWN)
        _join_kernel[(cost.count * line_blocks,)](
            parts[max_iter % 2], short.tensor, gamma, gamma, stuck, limit, size, short.uniform, max_iter,
            line_blocks, blocks, 0, 0, HAS_MARGINAL=short.given, ROWS=False, HAS_TOL=False, OWN=_OWN,
            PARTS=_PARTS, enable_fp_fusion=True,
        )  # fmt: skip
    return phi


def _iterate_sweeps(
    cost: _Cost,
    epsilon: Tensor,
    mass_a: _Marginal,
    mass_b: _Marginal,
    gamma: Tensor,
    limit: Tensor,
    max_iter: int,
    tol: float,
) -> Tensor:
    """As `_iterate_strips`."""
    run = _Iteration(cost, epsilon, mass_a, mass_b, limit, tol)
    phi = epsilon.new_zeros((2 if tol > 0 else 1, cost.count, cost.rows))
    for step in range(1, max_iter + 1):
        new, old = phi[step % len(phi)], phi[(step + 1) % len(phi)]
        run.half_step(True, gamma, new, old, step)
        run.half_step(False, new, gamma, gamma, step)
    return phi


def _solve_by_launches(
    iterate: Callable[..., Tensor],
    cost: _Cost,
    epsilon: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    init: Tensor | None,
    max_iter: int,
    tol: float,
    plan: Tensor | None,
    need_error: bool,
) -> _Outputs:
    """One of the two ways above, then the plan and what else is asked for."""
    out = _Outputs(cost.count, cost.rows, cost.columns, epsilon)
    mass_a, mass_b = _Marginal(a, epsilon, cost.rows), _Marginal(b, epsilon, cost.columns)
    out.iterations.fill_(max_iter)
    out.gamma = _first_gamma(init, b, cost, epsilon)
    phi = iterate(cost, epsilon, mass_a, mass_b, out.gamma, out.iterations, max_iter, tol)
    # With a tolerance the rows of an iteration are done before it is known that the one before had converged.
    out.phi = phi[0] if len(phi) == 1 else torch.where((out.iterations % 2 == 1)[:, None], phi[1], phi[0])
    parts = epsilon
    if plan is not None or need_error:
        parts = _sums(cost, epsilon, out.phi, out.gamma, plan)
    _finish_kernel[(cost.count,)](
        epsilon, mass_a.tensor, mass_b.tensor, out.phi, out.gamma, parts, out.f, out.g, out.value, out.error,
        cost.rows, cost.columns, mass_a.uniform, mass_b.uniform, parts.shape[1] if parts.dim() == 3 else 0,
        HAS_A=mass_a.given, HAS_B=mass_b.given, HAS_SUMS=parts.dim() == 3, BLOCK=1024, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _solve(
    cost: Tensor,
    epsilon: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    init: Tensor | None,
    max_iter: int,
    tol: float,
    plan: Tensor | None,
) -> _Outputs:
    cost = cost.contiguous()
    if cost.shape[0] == 0:
        return _Outputs(0, cost.shape[1], cost.shape[2], cost)
    with torch.cuda.device_of(cost):
        way = regime(cost.shape[0], cost.shape[1], cost.shape[2], tol > 0)
        if way == "whole":
            return _solve_whole(cost, epsilon, a, b, init, max_iter, tol, plan)
        iterate = _iterate_strips if way == "strips" else _iterate_sweeps
        need_error = plan is not None
        return _solve_by_launches(iterate, _Cost(cost), epsilon, a, b, init, max_iter, tol, plan, need_error)


def sinkhorn_fwd(
    cost: Tensor,
    epsilon: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    init: Tensor | None,
    max_iter: int,
    tol: float,
    grad: str,
) -> tuple[Tensor, ...]:
    """(plan, f, g, iterations, error, phi, gamma); no error is below a negative tol."""
    stored = torch.float32 if cost.dtype == torch.float16 else cost.dtype
    plan = torch.empty_like(cost, dtype=stored, memory_format=torch.contiguous_format)
    out = _solve(cost, epsilon, a, b, init, max_iter, tol, plan)
    return plan, out.f, out.g, out.iterations, out.error, out.phi, out.gamma


def sinkhorn_value_fwd(
    cost: Tensor, epsilon: Tensor, a: Tensor | None, b: Tensor | None, max_iter: int, tol: float
) -> tuple[Tensor, ...]:
    """(value, f, g, phi, gamma)."""
    out = _solve(cost, epsilon, a, b, None, max_iter, tol, None)
    return out.value, out.f, out.g, out.phi, out.gamma


def sinkhorn_value_bwd(grad: Tensor, cost: Tensor, epsilon: Tensor, phi: Tensor, gamma: Tensor) -> Tensor:
    """grad [N] times the plan, in the dtype of cost."""
    out = torch.empty_like(cost, memory_format=torch.contiguous_format)
    if out.numel():
        with torch.cuda.device_of(cost):
            _sums(_Cost(cost), epsilon, phi, gamma, out, grad.contiguous(), sums=False)
    return out


def sinkhorn_points_fwd(
    x: Tensor, y: Tensor, epsilon: Tensor, a: Tensor | None, b: Tensor | None, max_iter: int, tol: float
) -> tuple[Tensor, ...]:
    """(value, f, g, iterations, error, phi, gamma); float32 points."""
    if x.shape[0] == 0:
        out = _Outputs(0, x.shape[1], y.shape[1], x)
    else:
        with torch.cuda.device_of(x):
            out = _solve_by_launches(
                _iterate_sweeps, _Cost(x, y), epsilon, a, b, None, max_iter, tol, None, True
            )
    return out.value, out.f, out.g, out.iterations, out.error, out.phi, out.gamma


def sinkhorn_points_bwd(
    grad: Tensor, x: Tensor, y: Tensor, epsilon: Tensor, phi: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of grad * value to x and y."""
    if x.shape[0] == 0 or x.shape[2] == 0:
        return torch.empty_like(x), torch.empty_like(y)
    cost = _Cost(x, y)
    found = []
    with torch.cuda.device_of(x):
        for rows, own, other in ((True, phi, gamma), (False, gamma, phi)):
            owns, others = cost.extents(rows)[:2]
            blocks = triton.cdiv(owns, _OWN)
            splits, span = _splits(cost.count * blocks, others)
            out = x.new_empty((splits, cost.count, owns, cost.dims))
            _points_gradient_kernel[(cost.count * blocks * splits,)](
                *cost.sides(rows), epsilon, own, other, grad.contiguous(), out, owns, others, cost.dims,
                cost.count, blocks, splits, span, **cost.constants(),
                BLOCK_D=max(16, triton.next_power_of_2(cost.dims)), OWN=_OWN, OTHER=_OTHER,
                num_warps=8 if cost.kind == 2 else 4, enable_fp_fusion=True,
            )  # fmt: skip
            found.append(out[0] if splits == 1 else out.sum(0))
    return found[0], found[1]


def swav_assign(scores: Tensor, epsilon: float, n_iter: int) -> Tensor:
    """[B, K] of the dtype of scores: columns, then rows, n_iter times; at last rows sum to 1."""
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    cost = _Cost(scores[None])
    width = torch.full((1,), -epsilon, dtype=torch.float64, device=scores.device)  # the cost is -scores
    one = _Marginal(None, width, 1)
    limit = torch.full((1,), n_iter, dtype=torch.int32, device=scores.device)
    phi = width.new_zeros((1, cost.rows))
    gamma = width.new_empty((1, cost.columns))
    with torch.cuda.device_of(scores):
        run = _Iteration(cost, width, one, one, limit, -1.0)
        for step in range(1, n_iter + 1):
            run.half_step(False, phi, gamma, gamma, step)
            run.half_step(True, gamma, phi, phi, step)
        _sums(cost, width, phi, gamma, out, sums=False)
    return out


# --- launchers of gradients ---------------------------------------------------------------------------------


def _tiles(shape: torch.Size) -> tuple[int, int, int]:
    """(programs, row blocks, column blocks) of a pass over single entries."""
    rows, columns = (triton.cdiv(size, block) for size, block in zip(shape[1:], _TILE, strict=True))
    return shape[0] * rows * columns, rows, columns


def _adjoint(
    grad_plan: Tensor | None, cost: Tensor, epsilon: Tensor, phi: Tensor, gamma: Tensor, plan: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sums of grad_plan * plan over columns [N, K] and rows [N, E], float64; fills in `plan` if given."""
    count, rows, columns = cost.shape
    programs, row_blocks, column_blocks = _tiles(cost.shape)
    has = grad_plan is not None
    row_parts = phi.new_empty((count, column_blocks if has else 0, rows))
    column_parts = phi.new_empty((count, row_blocks if has else 0, columns))
    if programs:
        with torch.cuda.device_of(cost):
            _adjoint_kernel[(programs,)](
                cost if grad_plan is None else grad_plan.contiguous(), cost.contiguous(), epsilon, phi, gamma,
                phi if plan is None else plan, row_parts, column_parts, rows, columns, row_blocks,
                column_blocks, HAS_GRAD=has, STORE=plan is not None, BLOCK_R=_TILE[0], BLOCK_C=_TILE[1],
                enable_fp_fusion=True,
            )  # fmt: skip
    return row_parts.sum(1), column_parts.sum(1)


def sinkhorn_adjoint(
    grad_plan: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    cost: Tensor,
    epsilon: Tensor,
    phi: Tensor,
    gamma: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(plan, row_rhs, column_rhs), float64: the right-hand sides of the adjoint system."""
    plan = phi.new_empty(cost.shape)
    sides = list(_adjoint(grad_plan, cost, epsilon, phi, gamma, plan))
    for side, (grad, potential) in enumerate(((grad_f, phi), (grad_g, gamma))):
        sides[side] = sides[side] / epsilon[:, None]
        if grad is not None:
            live = potential != -torch.inf
            sides[side] = torch.where(live, grad.double() + sides[side], sides[side])
    return plan, sides[0], sides[1]


def sinkhorn_cost_gradient(
    grad_plan: Tensor | None, plan: Tensor, epsilon: Tensor, lam: Tensor, mu: Tensor, dtype: torch.dtype
) -> Tensor:
    """plan * (lam_i + mu_j - grad_plan / epsilon) in `dtype`, 0 where plan is 0."""
    out = torch.empty_like(plan, dtype=dtype)
    programs, row_blocks, column_blocks = _tiles(plan.shape)
    if programs:
        with torch.cuda.device_of(plan):
            _cost_gradient_kernel[(programs,)](
                plan if grad_plan is None else grad_plan.contiguous(), plan.contiguous(), epsilon,
                lam.contiguous(), mu.contiguous(), out, *plan.shape[1:], row_blocks, column_blocks,
                HAS_GRAD=grad_plan is not None, BLOCK_R=_TILE[0], BLOCK_C=_TILE[1],
                enable_fp_fusion=True,
            )  # fmt: skip
    return out


def sinkhorn_unrolled_bwd(
    grad_plan: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    cost: Tensor,
    epsilon: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    init: Tensor | None,
    iterations: Tensor,
    max_iter: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to cost (its dtype), a and b (float32) through the iterations that were run.

    These are run again, by sweeps, every potential kept. Then, with dx the adjoint of x and A_ij =
    exp(phi_i + gamma_j - C_ij / epsilon) / a_i, whose rows sum to 1, from phi = log a - logsumexp(gamma -
    C / epsilon) follow da_i += dphi_i / a_i, dgamma_j -= sum_i A_ij dphi_i, dC_ij += A_ij dphi_i / epsilon;
    the columns alike. The cost's gradient is summed at the end, over all half-steps at once.
    """
    count, rows, columns = cost.shape
    grad_cost = torch.empty_like(cost, memory_format=torch.contiguous_format)
    if count == 0:
        none = [epsilon.new_empty((0, size), dtype=torch.float32) for size in (rows, columns)]
        return grad_cost, none[0], none[1]
    with torch.cuda.device_of(cost):
        return _unrolled(
            grad_plan, grad_f, grad_g, grad_cost, cost, epsilon, a, b, init, iterations, max_iter
        )


def _unrolled(
    grad_plan: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    grad_cost: Tensor,
    cost: Tensor,
    epsilon: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    init: Tensor | None,
    iterations: Tensor,
    max_iter: int,
) -> tuple[Tensor, Tensor, Tensor]:
    matrix = _Cost(cost)
    count, rows, columns = cost.shape
    mass_a, mass_b = _Marginal(a, epsilon, rows), _Marginal(b, epsilon, columns)
    phi = epsilon.new_zeros((max_iter + 1, count, rows))
    gamma = epsilon.new_zeros((max_iter + 1, count, columns))
    gamma[0] = _first_gamma(init, b, matrix, epsilon)
    run = _Iteration(matrix, epsilon, mass_a, mass_b, iterations, -1.0)
    for step in range(1, max_iter + 1):
        run.half_step(True, gamma[step - 1], phi[step], phi[step], step)
        run.half_step(False, phi[step], gamma[step], gamma[step], step)

    last = iterations.long()[None, :, None]
    end_phi = phi.gather(0, last.expand(1, count, rows))[0]
    end_gamma = gamma.gather(0, last.expand(1, count, columns))[0]
    seed_phi, seed_gamma = _adjoint(grad_plan, cost, epsilon, end_phi, end_gamma, None)
    seed_gamma, gauge_b = _potential_seeds(
        grad_f, grad_g, epsilon, b, end_phi, end_gamma, seed_phi, seed_gamma
    )

    adjoint_phi, adjoint_gamma = torch.zeros_like(phi), torch.zeros_like(gamma)
    adjoint_gamma.scatter_(0, last.expand(1, count, columns), seed_gamma[None])
    for step in range(max_iter, 0, -1):
        for of_rows, own, other, adjoint, mass, out in (
            (True, phi[step], gamma[step], adjoint_gamma[step], mass_b, adjoint_phi[step]),
            (False, gamma[step - 1], phi[step], adjoint_phi[step], mass_a, adjoint_gamma[step - 1]),
        ):
            blocks = run.blocks[of_rows]
            _pull_kernel[(count * blocks,)](
                matrix.first, epsilon, own, other, adjoint, mass.tensor, seed_phi, out, iterations,
                *matrix.extents(of_rows), mass.uniform, step, blocks, HAS_MARGINAL=mass.given,
                SEEDED=of_rows, OWN=_OWN, OTHER=_OTHER,
                enable_fp_fusion=True,
            )  # fmt: skip

    programs, row_blocks, column_blocks = _tiles(cost.shape)
    _unrolled_cost_kernel[(programs,)](
        cost if grad_plan is None else grad_plan.contiguous(), matrix.first, epsilon, mass_a.tensor,
        mass_b.tensor, phi, gamma, adjoint_phi, adjoint_gamma, iterations, grad_cost, count, rows, columns,
        mass_a.uniform, mass_b.uniform, row_blocks, column_blocks, HAS_GRAD=grad_plan is not None,
        HAS_A=mass_a.given, HAS_B=mass_b.given, BLOCK_R=_TILE[0], BLOCK_C=_TILE[1], enable_fp_fusion=True,
    )  # fmt: skip
    grad_a = _over(adjoint_phi.sum(0), mass_a, end_phi)
    grad_b = _over(adjoint_gamma[1:].sum(0), mass_b, end_gamma) + gauge_b
    return grad_cost, grad_a.float(), grad_b.float()


def _over(total: Tensor, mass: _Marginal, potential: Tensor) -> Tensor:
    """total / mass, 0 where the potential is -inf."""
    live = potential != -torch.inf
    if not mass.given:
        return torch.where(live, total / mass.uniform, 0.0)
    return torch.where(live, total / torch.where(live, mass.tensor, 1.0), 0.0)


def _potential_seeds(
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    epsilon: Tensor,
    b: Tensor | None,
    phi: Tensor,
    gamma: Tensor,
    seed_phi: Tensor,
    seed_gamma: Tensor,
) -> tuple[Tensor, Tensor]:
    """What f = epsilon (phi + shift) and g = epsilon (gamma - shift), shift = <b, gamma> / <b, 1>, add to the
    adjoints: seed_phi in place; returns seed_gamma and what the shift gives b."""
    width, row_live, column_live = epsilon[:, None], phi != -torch.inf, gamma != -torch.inf
    pull = torch.zeros_like(width)  # the adjoint of the shift
    if grad_f is not None:
        slope = torch.where(row_live, width * grad_f.double(), 0.0)
        seed_phi += slope
        pull = pull + slope.sum(1, keepdim=True)
    if grad_g is not None:
        slope = torch.where(column_live, width * grad_g.double(), 0.0)
        seed_gamma = seed_gamma + slope
        pull = pull - slope.sum(1, keepdim=True)
    mass = torch.full_like(gamma, 1 / gamma.shape[1]) if b is None else b.double()
    weight, finite = torch.where(column_live, mass, 0.0), torch.where(column_live, gamma, 0.0)
    total = weight.sum(1, keepdim=True)
    pull = pull / torch.where(total > 0, total, 1.0)
    shift = (weight * finite).sum(1, keepdim=True) / torch.where(total > 0, total, 1.0)
    return seed_gamma + pull * weight, torch.where(column_live, pull * (finite - shift), 0.0)
