"""Entropic optimal transport in eager PyTorch: the oracle, at float32 or float64 (DESIGN 4.2's definitions).

Everything is in the log domain and in scaled potentials phi = f / epsilon, gamma = g / epsilon, so that
P = exp(phi_i + gamma_j - C_ij / epsilon). An entry is live where C_ij is not +inf, a_i > 0 and b_j > 0; a row
with a_i > 0 and no live entry is infeasible, as is such a column.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

RIDGE = 1e-12  # on the scaled Schur complement, whose eigenvalues lie in [0, 1]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype the arithmetic is done in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def plan_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a plan for a cost of `dtype`: float16 would underflow, so it gives float32."""
    return torch.float32 if dtype == torch.float16 else dtype


class Solution(NamedTuple):
    """Scaled potentials phi [N, K] and gamma [N, E], -inf where a row or column holds no mass; the potentials
    f, g in the gauge <b, g> = 0; iterations int32 [N]; error [N]."""

    phi: Tensor
    gamma: Tensor
    f: Tensor
    g: Tensor
    iterations: Tensor
    error: Tensor


class _Problem(NamedTuple):
    scaled: Tensor  # C / epsilon, 0 where dead
    live: Tensor
    a: Tensor
    b: Tensor
    infeasible: Tensor


def _problem(cost: Tensor, epsilon: Tensor, a: Tensor | None, b: Tensor | None) -> _Problem:
    rows, columns = cost.shape[1:]
    a = cost.new_full(cost.shape[:2], 1 / rows) if a is None else a
    b = cost.new_full(cost[:, 0].shape, 1 / columns) if b is None else b
    live = (cost != torch.inf) & (a > 0)[:, :, None] & (b > 0)[:, None, :]
    no_row = (a > 0) & ~live.any(2)
    no_column = (b > 0) & ~live.any(1)
    scaled = cost.masked_fill(~live, 0.0) / epsilon[:, None, None]
    return _Problem(scaled, live, a, b, no_row.any(1) | no_column.any(1))


def _log_sum(x: Tensor, live: Tensor, dim: int) -> Tensor:
    """log of the sum of exp(x) over the live entries, 0 where there are none."""
    x = x.masked_fill(~live, -torch.inf)
    largest = x.detach().amax(dim, keepdim=True)
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    some = live.any(dim)
    total = torch.where(some, (x - largest).exp().sum(dim), 1.0)
    return torch.where(some, total.log() + largest.squeeze(dim), 0.0)


def _half_step(marginal: Tensor, other: Tensor, problem: _Problem, dim: int) -> Tensor:
    """The scaled potential of the side that is left when `dim` is summed over; 0 where nothing is live."""
    log_marginal = torch.where(marginal > 0, marginal, 1.0).log()
    spread = other[:, None, :] if dim == 2 else other[:, :, None]
    potential = log_marginal - _log_sum(spread - problem.scaled, problem.live, dim)
    return torch.where(problem.live.any(dim), potential, 0.0)


def _plan(phi: Tensor, gamma: Tensor, problem: _Problem) -> Tensor:
    exponent = phi[:, :, None] + gamma[:, None, :] - problem.scaled
    return exponent.masked_fill(~problem.live, -torch.inf).exp()


def _row_error(phi: Tensor, gamma: Tensor, problem: _Problem) -> Tensor:
    with torch.no_grad():
        error = (_plan(phi, gamma, problem).sum(2) - problem.a).abs().sum(1)
        return torch.where(problem.infeasible, torch.inf, error)


def _gauge(gamma: Tensor, problem: _Problem) -> Tensor:
    """<b, gamma> / <b, 1> over the live columns, [N, 1]."""
    weight = torch.where(problem.live.any(1), problem.b, 0.0)
    total = weight.sum(1, keepdim=True)
    return (weight * gamma).sum(1, keepdim=True) / torch.where(total > 0, total, 1.0)


def _with_infinities(potential: Tensor, marginal: Tensor, live: Tensor) -> Tensor:
    """-inf where the marginal is 0, +inf where it is not but nothing is live."""
    dead = torch.where(marginal > 0, torch.inf, -torch.inf).to(potential.dtype)
    return torch.where(live, potential, dead)


def solve(
    cost: Tensor,
    epsilon: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    init: Tensor | None,
    max_iter: int,
    tol: float | None,
) -> tuple[Tensor, Solution]:
    """The plan [N, K, E] and the potentials after the iterations, all of the dtype of cost [N, K, E].

    Differentiable by autograd through the iterations run. epsilon [N], a [N, K], b [N, E], init [N, E].
    """
    problem = _problem(cost, epsilon, a, b)
    row_live, column_live = problem.live.any(2), problem.live.any(1)
    gamma = torch.zeros_like(problem.b) if init is None else init / epsilon[:, None]
    gamma = torch.where(column_live & torch.isfinite(gamma), gamma, 0.0)
    phi = torch.zeros_like(problem.a)
    active = torch.ones_like(problem.infeasible)
    iterations = torch.zeros_like(active, dtype=torch.int32)
    for _ in range(max_iter):
        next_phi = _half_step(problem.a, gamma, problem, 2)
        next_gamma = _half_step(problem.b, next_phi, problem, 1)
        if tol is None:
            phi, gamma, iterations = next_phi, next_gamma, iterations + 1
            continue
        phi = torch.where(active[:, None], next_phi, phi)
        gamma = torch.where(active[:, None], next_gamma, gamma)
        iterations = iterations + active
        active = active & ~(_row_error(phi, gamma, problem) < tol)
        if cost.device.type == "cpu" and not torch.compiler.is_compiling() and not active.any():
            break
    plan = _plan(phi, gamma, problem)
    shift, width = _gauge(gamma, problem), epsilon[:, None]
    solution = Solution(
        phi=torch.where(row_live, phi, -torch.inf),
        gamma=torch.where(column_live, gamma, -torch.inf),
        f=_with_infinities(width * (phi + shift), problem.a, row_live),
        g=_with_infinities(width * (gamma - shift), problem.b, column_live),
        iterations=iterations,
        error=_row_error(phi, gamma, problem),
    )
    return plan, solution


def transport_value(solution: Solution, a: Tensor | None, b: Tensor | None, epsilon: Tensor) -> Tensor:
    """<a, f> + <b, g> - epsilon * sum P, [N] float64 rounded to the dtype of f; 0 * inf = 0.

    After the g half-step the columns of P sum to b wherever one is live, so that P itself is not needed.
    """
    f, g = solution.f, solution.g
    a = torch.full_like(f, 1 / f.shape[1]) if a is None else a
    b = torch.full_like(g, 1 / g.shape[1]) if b is None else b
    rows = torch.where(a > 0, a.double() * f.double(), 0.0).sum(1)
    columns = torch.where(b > 0, b.double() * g.double(), 0.0).sum(1)
    mass = torch.where(torch.isfinite(g), b.double(), 0.0).sum(1)
    return (rows + columns - epsilon.double() * mass).to(f.dtype)


def plan_from_potentials(cost: Tensor, epsilon: Tensor, phi: Tensor, gamma: Tensor) -> Tensor:
    """The plan in float64, from scaled potentials that are -inf where nothing is live."""
    scaled = cost.double() / epsilon.double()[:, None, None]
    exponent = phi.double()[:, :, None] + gamma.double()[:, None, :] - scaled
    return exponent.masked_fill(scaled == torch.inf, -torch.inf).exp()


# --- gradients ----------------------------------------------------------------------------------------------


class ImplicitGradient(NamedTuple):
    """lam [N, K] and mu [N, E], which solve the adjoint system; the gradients to a and b. All float64."""

    lam: Tensor
    mu: Tensor
    grad_a: Tensor
    grad_b: Tensor


def _reciprocal(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1 / torch.where(x > 0, x, 1.0), 0.0)


def _components(plan: Tensor) -> Tensor:
    """[N, S, S] bool: rows of plan [N, S, L] joined through entries > 0, by squaring the adjacency."""
    # Sums of ones: inexact from 256 on in bfloat16, but never 0.
    dtype = torch.bfloat16 if plan.is_cuda else torch.float32
    positive = (plan > 0).to(dtype)
    reach = (positive @ positive.mT > 0) | torch.eye(plan.shape[1], dtype=torch.bool, device=plan.device)
    for _ in range(max(0, math.ceil(math.log2(max(1, plan.shape[1]))))):
        ones = reach.to(dtype)
        further = ones @ ones > 0
        if not plan.is_cuda and torch.equal(further, reach):
            break
        reach = further
    return reach


def implicit_solve(
    plan: Tensor, row_rhs: Tensor, column_rhs: Tensor, gamma: Tensor, epsilon: Tensor
) -> ImplicitGradient:
    """Solves [[diag(P1), P], [P', diag(P'1)]] [lam; mu] = [row_rhs; column_rhs] for a batch of plans.

    plan [N, K, E], row_rhs [N, K], column_rhs [N, E], gamma [N, E] (scaled potentials), epsilon [N], all
    float64. The system is reduced to the smaller side by a Schur complement, scaled to a unit diagonal, and
    factorised by Cholesky. Its null space, one direction a connected component of the plan, is filled in; the
    right-hand side is made orthogonal to it by holding the mean of g over each component fixed.

    grad_a and grad_b are the gradients of the limit of the iterations: a counts only up to its sum.
    """
    wide = plan.shape[1] <= plan.shape[2]
    p = plan if wide else plan.mT  # [N, S, L], the small side first
    small_rhs, large_rhs = (row_rhs, column_rhs) if wide else (column_rhs, row_rhs)
    small, large = p.sum(2), p.sum(1)
    per_small, per_large = _reciprocal(small), _reciprocal(large)
    finite_gamma = torch.where(torch.isfinite(gamma), gamma, 0.0)
    together = _components(p).double()
    per_mass = _reciprocal((together @ small[:, :, None]).squeeze(2))

    def component_mean(mass_times_value: Tensor) -> Tensor:
        return (together @ mass_times_value[:, :, None]).squeeze(2) * per_mass

    # Two vectors of the large side, seen from the small one, in one read of the plan.
    of_rhs, of_gamma = (p @ torch.stack((per_large * large_rhs, finite_gamma if wide else large), 2)).unbind(
        2
    )
    root, per_root = small.sqrt(), per_small.sqrt()
    scaled = p * (per_root[:, :, None] * per_large.sqrt()[:, None, :])
    schur = together * (root[:, :, None] * (root * per_mass)[:, None, :]) - scaled @ scaled.mT
    schur.diagonal(dim1=1, dim2=2).add_(1 + RIDGE)
    excess = component_mean(small_rhs - of_rhs)  # of the small side over the large one, a unit of mass
    rhs = per_root * (small_rhs - of_rhs) - root * excess
    factor, _ = torch.linalg.cholesky_ex(schur)
    of_small = per_root * torch.cholesky_solve(rhs[:, :, None], factor).squeeze(2)

    # What a component shares: the mean of lam over its rows, of gamma over its columns.
    mean_lam = component_mean(small * of_small if wide else of_rhs - small * of_small)
    mean_gamma = component_mean(of_gamma if wide else small * finite_gamma)
    excess = excess if wide else -excess  # of rows over columns
    shared = torch.stack((mean_lam, mean_gamma, excess), 2)
    seen = per_large[:, :, None] * (p.mT @ torch.cat((of_small[:, :, None], shared), 2))
    of_large = per_large * large_rhs - seen[:, :, 0]
    if wide:
        lam, mu, columns = of_small, of_large + seen[:, :, 3], large
        grad_a = lam - mean_lam
        mean_lam, mean_gamma, excess = seen[:, :, 1:].unbind(2)
    else:
        lam, mu, columns = of_large, of_small, small
        grad_a = lam - seen[:, :, 1]

    # What the gauge <b, g> = 0 adds: through the mean of each component, and of the whole.
    whole = _reciprocal(columns.sum(1, keepdim=True))
    shift = (columns * finite_gamma).sum(1, keepdim=True) * whole
    through_whole = (columns * excess).sum(1, keepdim=True) * whole * (mean_gamma - shift)
    grad_b = mu + mean_lam + excess * (finite_gamma - mean_gamma) + through_whole
    rows = small if wide else large
    epsilon = epsilon[:, None]
    return ImplicitGradient(
        lam,
        mu,
        torch.where(rows > 0, epsilon * grad_a, 0.0),
        torch.where(columns > 0, epsilon * grad_b, 0.0),
    )


def adjoint_sums(
    plan: Tensor, epsilon: Tensor, grad_plan: Tensor | None, grad_f: Tensor | None, grad_g: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The right-hand sides of the adjoint system: grad_f + rows of (grad_plan * P) / epsilon, and columns."""
    rows, columns = plan.sum(2) > 0, plan.sum(1) > 0
    row_rhs, column_rhs = torch.zeros_like(plan[:, :, 0]), torch.zeros_like(plan[:, 0])
    if grad_plan is not None:
        weighted = torch.where(plan > 0, grad_plan.double() * plan, 0.0) / epsilon[:, None, None]
        row_rhs, column_rhs = weighted.sum(2), weighted.sum(1)
    if grad_f is not None:
        row_rhs = row_rhs + torch.where(rows, grad_f.double(), 0.0)
    if grad_g is not None:
        column_rhs = column_rhs + torch.where(columns, grad_g.double(), 0.0)
    return row_rhs, column_rhs


def cost_gradient(plan: Tensor, epsilon: Tensor, grad_plan: Tensor | None, lam: Tensor, mu: Tensor) -> Tensor:
    """P * (lam_i + mu_j - grad_plan / epsilon), 0 where P is 0."""
    slope = lam[:, :, None] + mu[:, None, :]
    if grad_plan is not None:
        slope = slope - grad_plan.double() / epsilon[:, None, None]
    return torch.where(plan > 0, plan * slope, 0.0)


# --- SwAV, point clouds -------------------------------------------------------------------------------------


def swav_assign(scores: Tensor, epsilon: float, n_iter: int) -> Tensor:
    """[B, K]: columns to 1/K, rows to 1/B, n_iter times; at last rows sum to 1. In the log domain."""
    log_plan = scores / epsilon
    for _ in range(n_iter):
        log_plan = log_plan - _safe_log_sum(log_plan, 0)
        log_plan = log_plan - _safe_log_sum(log_plan, 1)
    return log_plan.exp()


def _safe_log_sum(x: Tensor, dim: int) -> Tensor:
    """logsumexp that is 0 where every entry is -inf, so that such a line stays empty and no NaN arises."""
    total = torch.logsumexp(x, dim, keepdim=True)
    return torch.where(total == -torch.inf, 0.0, total)


def swav_assign_group(scores: Tensor, epsilon: float, n_iter: int, group: dist.ProcessGroup) -> Tensor:
    """`swav_assign` over the rows of every rank of `group`: only the column sums are shared."""
    log_plan = scores / epsilon
    for _ in range(n_iter):
        log_plan = log_plan - _shared_column_log_sum(log_plan, group)
        log_plan = log_plan - _safe_log_sum(log_plan, 1)
    return log_plan.exp()


def _shared_column_log_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    largest = x.amax(0) if len(x) else x.new_full(x.shape[1:], -torch.inf)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    finite = torch.where(largest == -torch.inf, 0.0, largest)
    total = (x - finite).exp().sum(0)
    dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
    return torch.where(total > 0, total.log() + finite, 0.0)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """||x_i - y_j||^2 [N, n, m] of x [N, n, d], y [N, m, d], summed from differences: nothing cancels."""
    total = x.new_zeros(x.shape[0], x.shape[1], y.shape[1])
    for axis in range(x.shape[2]):
        gap = x[:, :, None, axis] - y[:, None, :, axis]
        total = total + gap * gap
    return total


def points_backward(
    grad: Tensor, x: Tensor, y: Tensor, epsilon: Tensor, phi: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of grad * value to x and y by the envelope theorem: 2 sum_j P_ij (x_i - y_j)."""
    plan = plan_from_potentials(squared_distances(x, y), epsilon, phi, gamma) * grad[:, None, None]
    x, y = x.double(), y.double()
    grad_x = 2 * (plan.sum(2, keepdim=True) * x - plan @ y)
    grad_y = 2 * (plan.sum(1)[:, :, None] * y - plan.mT @ x)
    return grad_x, grad_y
