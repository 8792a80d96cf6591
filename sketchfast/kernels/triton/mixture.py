"""Loss of a mixture density head in Triton (definition and schemas are in ops/mixture.py, the same
mathematics in csrc/mixture_math.h and, in eager PyTorch, in kernels/reference/mixture.py).

A program takes a few positions, all components of each in registers: it reads their numbers once, writes the
gradient rows, and leaves the sums of both losses in float64. One program more adds those up in a fixed order.
Backward scales the rows. Nothing waits for the host, and no size depends on a value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG_SIGMA, _CORRELATION = tl.constexpr(7.0), tl.constexpr(5.0)  # limits, as in csrc/mixture_math.h
_LOG_FOUR_PI = tl.constexpr(2.5310242469692907)
_TILE = 256  # components a program looks at together, of one position or several
_LINE = 1024  # partial sums, or elements of rows, a program looks at together


@triton.jit
def _clamped(x, limit):
    """NaN stays."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def _inside(x, limit):
    """Where `_clamped` passes a gradient."""
    return (x > -limit) & (x < limit)


@triton.jit
def _share(x):
    """e^x of x <= 0; 0 where it would be next to nothing. NaN stays."""
    return tl.where(x < -87.0, 0.0, tl.exp(x))


@triton.jit
def _is_greater(a, b):
    """a > b, NaN above all."""
    return (a > b) | ((a != a) & (b == b))


@triton.jit
def _weighted(factor, grad):
    """None where the factor is 0, be the gradient infinite."""
    return tl.where(factor == 0.0, 0.0, factor * grad)


@triton.jit
def _pens(output, rows, target, position, inside, width, WITH_ROWS: tl.constexpr):
    """Cross-entropy of each position's pen state; writes its gradient."""
    line, wanted = output + position * width, target + position * 5 + 2
    down = tl.load(line, mask=inside, other=0.0).to(tl.float32)
    lifted = tl.load(line + 1, mask=inside, other=0.0).to(tl.float32)
    ended = tl.load(line + 2, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(wanted, mask=inside, other=0.0)
    second = tl.load(wanted + 1, mask=inside, other=0.0)
    third = tl.load(wanted + 2, mask=inside, other=0.0)
    is_second = _is_greater(second, first)
    is_third = _is_greater(third, tl.where(is_second, second, first))
    is_second = is_second & (is_third == 0)
    most = tl.maximum(tl.maximum(down, lifted), ended)
    down, lifted, ended = down - most, lifted - most, ended - most
    sum_ = tl.exp(down) + tl.exp(lifted) + tl.exp(ended)
    if WITH_ROWS:
        to, is_first = rows + position * width, (is_second == 0) & (is_third == 0)
        tl.store(to, tl.exp(down) / sum_ - is_first.to(tl.float32), mask=inside)
        tl.store(to + 1, tl.exp(lifted) / sum_ - is_second.to(tl.float32), mask=inside)
        tl.store(to + 2, tl.exp(ended) / sum_ - is_third.to(tl.float32), mask=inside)
    return tl.log(sum_) - tl.where(is_third, ended, tl.where(is_second, lifted, down))


@triton.jit
def _forward_kernel(
    output, target, rows, parts, positions, components,
    WITH_ROWS: tl.constexpr, POSITIONS: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    """parts [programs, 2]: sums of the pen and stroke losses of each program's positions."""
    width = 3 + 6 * components
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    inside = position < positions
    pen = tl.where(inside, _pens(output, rows, target, position, inside, width, WITH_ROWS), 0.0)

    offset_x = tl.load(target + position * 5, mask=inside, other=0.0)[:, None]
    offset_y = tl.load(target + position * 5 + 1, mask=inside, other=0.0)[:, None]
    live = 1.0 - tl.load(target + position * 5 + 4, mask=inside, other=1.0)
    k = tl.arange(0, COMPONENTS)[None, :]
    real = inside[:, None] & (k < components)
    place = position[:, None] * width + 3 + k
    line = output + place
    weight = tl.load(line, mask=real, other=float("-inf")).to(tl.float32)
    weight = tl.where(inside[:, None], weight, 0.0)  # past the end no NaN
    mean_x = tl.load(line + components, mask=real, other=0.0).to(tl.float32)
    mean_y = tl.load(line + 2 * components, mask=real, other=0.0).to(tl.float32)
    raw_x = tl.load(line + 3 * components, mask=real, other=0.0).to(tl.float32)
    raw_y = tl.load(line + 4 * components, mask=real, other=0.0).to(tl.float32)
    raw = tl.load(line + 5 * components, mask=real, other=0.0).to(tl.float32)

    log_x, log_y, u = _clamped(raw_x, _LOG_SIGMA), _clamped(raw_y, _LOG_SIGMA), _clamped(raw, _CORRELATION)
    scale_x, scale_y = tl.exp(-log_x), tl.exp(-log_y)
    magnitude = tl.abs(u)
    decay = tl.exp(-2.0 * magnitude)
    one = 1.0 + decay
    rho = (1.0 - decay) / one
    rho = tl.where(u < 0.0, -rho, rho)
    x, y = (offset_x - mean_x) * scale_x, (offset_y - mean_y) * scale_y
    apart = y - rho * x
    pull_y = apart * (one * one / (4.0 * decay))
    pull_x = x - rho * pull_y
    density = magnitude + tl.log(one) - log_x - log_y - (x * x + apart * pull_y) * 0.5

    weight -= tl.max(weight, 1)[:, None]
    prior = _share(weight)
    log = tl.where(k < components, weight + density, float("-inf"))
    broken = tl.max((log != log).to(tl.int32), 1) > 0
    most = tl.max(tl.where(log != log, float("-inf"), log), 1)
    far = most == float("-inf")  # from every component
    posterior = _share(log - tl.where(far, 0.0, most)[:, None])
    total, total_prior = tl.sum(posterior, 1), tl.sum(prior, 1)
    log_likelihood = most + tl.log(total / total_prior) - _LOG_FOUR_PI
    log_likelihood = tl.where(far, float("-inf"), log_likelihood)
    log_likelihood = tl.where(broken, float("nan"), log_likelihood)
    stroke = tl.where(inside, -(log_likelihood * live), 0.0)

    if WITH_ROWS:
        nothing = (broken | far)[:, None]
        factor = tl.where(nothing, float("nan"), posterior * (-live / total)[:, None])
        to = rows + place
        tl.store(to, factor + prior * (live / total_prior)[:, None], mask=real)
        tl.store(to + components, _weighted(factor, pull_x * scale_x), mask=real)
        tl.store(to + 2 * components, _weighted(factor, pull_y * scale_y), mask=real)
        grad = tl.where(_inside(raw_x, _LOG_SIGMA), pull_x * x - 1.0, 0.0)
        tl.store(to + 3 * components, _weighted(factor, grad), mask=real)
        grad = tl.where(_inside(raw_y, _LOG_SIGMA), pull_y * y - 1.0, 0.0)
        tl.store(to + 4 * components, _weighted(factor, grad), mask=real)
        grad = tl.where(_inside(raw, _CORRELATION), apart * pull_x + rho, 0.0)
        tl.store(to + 5 * components, _weighted(factor, grad), mask=real)

    part = parts + 2 * tl.program_id(0).to(tl.int64)
    tl.store(part, tl.sum(pen.to(tl.float64), 0))
    tl.store(part + 1, tl.sum(stroke.to(tl.float64), 0))


@triton.jit
def _mean_kernel(parts, pen, stroke, programs, count, LINE: tl.constexpr):
    """The means of both losses over `count` positions."""
    pens, strokes = tl.zeros((LINE,), tl.float64), tl.zeros((LINE,), tl.float64)
    for first in range(0, programs, LINE):
        program = first + tl.arange(0, LINE)
        inside = program < programs
        pens += tl.load(parts + 2 * program, mask=inside, other=0.0)
        strokes += tl.load(parts + 2 * program + 1, mask=inside, other=0.0)
    divisor = tl.full((), 0, tl.float64) + count
    tl.store(pen, (tl.sum(pens, 0) / divisor).to(tl.float32))
    tl.store(stroke, (tl.sum(strokes, 0) / divisor).to(tl.float32))


@triton.jit
def _backward_kernel(grad_pen, grad_stroke, rows, out, size, width, positions, LINE: tl.constexpr):
    """rows times the gradient of their column's loss, over the positions."""
    first = tl.program_id(0).to(tl.int64) * LINE
    place = first + tl.arange(0, LINE)
    column = ((first % width).to(tl.int32) + tl.arange(0, LINE)) % width  # the long division once
    inside = place < size
    divisor = tl.full((), 0, tl.float32) + positions
    pen, stroke = tl.load(grad_pen) / divisor, tl.load(grad_stroke) / divisor
    row = tl.load(rows + place, mask=inside, other=0.0)
    scaled = row * tl.where(column < 3, pen, stroke)
    tl.store(out + place, scaled.to(out.dtype.element_ty), mask=inside)


# --- ops ----------------------------------------------------------------------------------------------------


def mixture_fwd(output: Tensor, target: Tensor, with_rows: bool) -> tuple[Tensor, Tensor, Tensor]:
    positions, width = output.shape
    components = (width - 3) // 6
    rows = target.new_empty((positions if with_rows else 0, width))
    if positions == 0:
        return target.new_zeros(()), target.new_zeros(()), rows
    pen, stroke = target.new_empty(()), target.new_empty(())
    padded = max(2, triton.next_power_of_2(components))
    together = max(1, _TILE // padded)
    programs = triton.cdiv(positions, together)
    parts = target.new_empty((programs, 2), dtype=torch.float64)
    _forward_kernel[(programs,)](
        output, target, rows, parts, positions, components,
        WITH_ROWS=with_rows, POSITIONS=together, COMPONENTS=padded,
        num_warps=4 if padded <= 1024 else 16,
    )  # fmt: skip
    _mean_kernel[(1,)](parts, pen, stroke, programs, positions, LINE=_LINE)
    return pen, stroke, rows


def mixture_bwd(grad_pen: Tensor, grad_stroke: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    positions, width = rows.shape
    grad = torch.empty_like(rows, dtype=dtype)
    if positions:
        size = positions * width
        _backward_kernel[(triton.cdiv(size, _LINE),)](
            grad_pen, grad_stroke, rows, grad, size, width, positions, LINE=_LINE
        )
    return grad
