"""Batched entropic optimal transport (Sinkhorn), its gradients, SwAV's assignment, and point clouds.

Definitions: min over P of <P, C> + epsilon * sum P (log P - 1) with P1 = a, P'1 = b; P = exp((f_i + g_j -
C_ij) / epsilon). One iteration is f from g, then g from f. C_ij = +inf forbids a pair, a_i = 0 empties a row.
A row (column) with mass but no pair left is infeasible: its entries are 0 and the error is inf.

Between the kernels travel scaled potentials in float64, phi = f / epsilon and gamma = g / epsilon in any
gauge, -inf where a row or column holds no mass: what float32 potentials lose at small epsilon stays.

Source: Cuturi 2013, "Sinkhorn distances"; the plans of PM-JDOT (Hu et al. 2022, Eq. 5) and the assignment of
SwAV (Caron et al. 2020, Eq. 3 and 5).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.reference import sinkhorn as reference
from . import _contract as contract

GRADS = ("implicit", "unrolled", "none")
NO_TOLERANCE = -1.0  # no error is below it
NATIVE_SCHUR_SIZE = 2048  # small side up to which the CPU solves the adjoint system itself: 32 MiB a thread
MASS_TOLERANCE = 2**-7  # between two masses, relative: what rounding to bfloat16 can do to one


class SinkhornOutput(NamedTuple):
    """What `sinkhorn` returns; see there."""

    plan: Tensor
    f: Tensor
    g: Tensor
    iterations: Tensor
    error: Tensor


class PointsOutput(NamedTuple):
    """What `sinkhorn_points` returns; see there."""

    value: Tensor
    f: Tensor
    g: Tensor
    iterations: Tensor
    error: Tensor


def _op(name: str, impl: str) -> Any:
    return getattr(torch.ops.sketchfast, f"{name}_{impl}")


# --- the plan and its gradient ------------------------------------------------------------------------------


def _fake_potentials(like: Tensor, rows: Any, columns: Any) -> tuple[Tensor, ...]:
    """f, g, iterations, error, phi, gamma."""
    count, dtype = like.shape[0], reference.compute_dtype(like.dtype)
    return (
        like.new_empty((count, rows), dtype=dtype),
        like.new_empty((count, columns), dtype=dtype),
        like.new_empty(count, dtype=torch.int32),
        like.new_empty(count, dtype=dtype),
        like.new_empty((count, rows), dtype=torch.float64),
        like.new_empty((count, columns), dtype=torch.float64),
    )


def _fake_sinkhorn_fwd(impl: str):
    def fake(cost, epsilon, a, b, init, max_iter, tol, grad):
        plan = cost.new_empty(cost.shape, dtype=reference.plan_dtype(cost.dtype))
        return plan, *_fake_potentials(cost, cost.shape[1], cost.shape[2])

    return fake


def _setup_sinkhorn(ctx: Any, inputs: tuple, output: tuple) -> None:
    cost, epsilon, a, b, init, max_iter, _, ctx.grad = inputs
    _, _, _, iterations, _, phi, gamma = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    if ctx.grad == "implicit":
        ctx.save_for_backward(cost, epsilon, phi, gamma)
    else:
        ctx.save_for_backward(cost, epsilon, a, b, init, iterations)
        ctx.max_iter = max_iter
    ctx.dtypes = [None if x is None else x.dtype for x in (cost, a, b)]


def _backward_sinkhorn(impl: str):
    def backward(ctx: Any, grad_plan: Any, grad_f: Any, grad_g: Any, *_rest: None):
        if grad_plan is None and grad_f is None and grad_g is None:
            return (None,) * 8
        grads: Any = [None if grad is None else grad.contiguous() for grad in (grad_plan, grad_f, grad_g)]
        if ctx.grad == "implicit":
            found = _implicit_backward(impl, *grads, *ctx.saved_tensors)
        else:
            found = _op("sinkhorn_unrolled_bwd", impl)(*grads, *ctx.saved_tensors, ctx.max_iter)
        # A gradient is computed for all three; the ones not asked for are dropped by autograd.
        to_cost, to_a, to_b = (
            None if dtype is None else grad.to(dtype) for grad, dtype in zip(found, ctx.dtypes, strict=True)
        )
        return to_cost, None, to_a, to_b, None, None, None, None

    return backward


def _schur_op(impl: str, plan: Tensor) -> Any:
    # The one rule: our own factorises on one thread, and each thread holds a square of the small side.
    if impl == "native" and plan.device.type == "cpu" and min(plan.shape[1:]) <= NATIVE_SCHUR_SIZE:
        return torch.ops.sketchfast.sinkhorn_schur_native
    return torch.ops.sketchfast.sinkhorn_schur


def _implicit_backward(
    impl: str,
    grad_plan: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    cost: Tensor,
    epsilon: Tensor,
    phi: Tensor,
    gamma: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to cost, a and b, exact where the iterations have converged: implicit function theorem.

    One read of the cost for the plan and the right-hand sides, the adjoint system on the smaller side, and
    one read of the plan for the gradient.
    """
    if impl == "reference":
        epsilon, phi, gamma = epsilon.double(), phi.double(), gamma.double()
        plan = reference.plan_from_potentials(cost, epsilon, phi, gamma)
        right = reference.adjoint_sums(plan, epsilon, grad_plan, grad_f, grad_g)
    else:
        plan, *right = _op("sinkhorn_adjoint", impl)(grad_plan, grad_f, grad_g, cost, epsilon, phi, gamma)
    lam, mu, grad_a, grad_b = _schur_op(impl, plan)(plan, *right, gamma, epsilon)
    if impl == "reference":
        return reference.cost_gradient(plan, epsilon, grad_plan, lam, mu), grad_a, grad_b
    grad_cost = _op("sinkhorn_cost_gradient", impl)(grad_plan, plan, epsilon, lam, mu, cost.dtype)
    return grad_cost, grad_a, grad_b


contract.define(
    "sinkhorn",
    "sinkhorn_fwd",
    "(Tensor cost, Tensor epsilon, Tensor? a, Tensor? b, Tensor? init, SymInt max_iter, float tol, str grad)"
    " -> (Tensor plan, Tensor f, Tensor g, Tensor iterations, Tensor error, Tensor phi, Tensor gamma)",
    _fake_sinkhorn_fwd,
    setup_context=_setup_sinkhorn,
    backward=_backward_sinkhorn,
)


def _fake_adjoint(impl: str):
    def fake(grad_plan, grad_f, grad_g, cost, epsilon, phi, gamma):
        return phi.new_empty(cost.shape), torch.empty_like(phi), torch.empty_like(gamma)

    return fake


# plan float64 [N, K, E]; grad_f + sum over j of (grad_plan * plan) / epsilon, [N, K], 0 where the row holds
# no mass; the same for columns with grad_g, [N, E].
contract.define(
    "sinkhorn",
    "sinkhorn_adjoint",
    "(Tensor? grad_plan, Tensor? grad_f, Tensor? grad_g, Tensor cost, Tensor epsilon, Tensor phi,"
    " Tensor gamma) -> (Tensor plan, Tensor row_rhs, Tensor column_rhs)",
    _fake_adjoint,
)
# plan * (lam_i + mu_j - grad_plan / epsilon), 0 where plan is 0.
contract.define(
    "sinkhorn",
    "sinkhorn_cost_gradient",
    "(Tensor? grad_plan, Tensor plan, Tensor epsilon, Tensor lam, Tensor mu, ScalarType dtype) -> Tensor",
    lambda impl: lambda grad_plan, plan, epsilon, lam, mu, dtype: plan.new_empty(plan.shape, dtype=dtype),
)
# The gradients through every half-step that was run: to cost (its dtype), a and b (dtype of the arithmetic).
contract.define(
    "sinkhorn",
    "sinkhorn_unrolled_bwd",
    "(Tensor? grad_plan, Tensor? grad_f, Tensor? grad_g, Tensor cost, Tensor epsilon, Tensor? a, Tensor? b,"
    " Tensor? init, Tensor iterations, SymInt max_iter) -> (Tensor, Tensor, Tensor)",
    lambda impl: (
        lambda grad_plan, grad_f, grad_g, cost, *_: (
            torch.empty_like(cost),
            cost.new_empty(cost.shape[:2], dtype=reference.compute_dtype(cost.dtype)),
            cost.new_empty((cost.shape[0], cost.shape[2]), dtype=reference.compute_dtype(cost.dtype)),
        )
    ),
)


def _solve_schur(
    plan: Tensor, row_rhs: Tensor, column_rhs: Tensor, gamma: Tensor, epsilon: Tensor
) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in reference.implicit_solve(plan, row_rhs, column_rhs, gamma, epsilon))


_SCHUR_SIGNATURE = (
    "(Tensor plan, Tensor row_rhs, Tensor column_rhs, Tensor gamma, Tensor epsilon)"
    " -> (Tensor lam, Tensor mu, Tensor grad_a, Tensor grad_b)"
)


def _fake_schur(plan, row_rhs, column_rhs, gamma, epsilon):
    return tuple(torch.empty_like(x) for x in (row_rhs, column_rhs, row_rhs, column_rhs))


# The library's batched products and Cholesky factorisation, for every impl; one of our own for the CPU.
contract.define_shared("sinkhorn_schur", _SCHUR_SIGNATURE, _solve_schur, _fake_schur)
contract.define("sinkhorn", "sinkhorn_schur", _SCHUR_SIGNATURE, lambda impl: _fake_schur, impls=("native",))


# --- the value ----------------------------------------------------------------------------------------------


def _fake_value_fwd(impl: str):
    def fake(cost, epsilon, a, b, max_iter, tol):
        f, g, _, error, phi, gamma = _fake_potentials(cost, cost.shape[1], cost.shape[2])
        return error, f, g, phi, gamma

    return fake


def _setup_value(ctx: Any, inputs: tuple, output: tuple) -> None:
    cost, epsilon, a, b, _, _ = inputs
    _, f, g, phi, gamma = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(cost, epsilon, phi, gamma, f, g)
    ctx.dtypes = [None if x is None else x.dtype for x in (a, b)]


def _envelope_marginals(grad: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of grad * value to a and b: the potentials, 0 where there is none."""
    return tuple(grad[:, None] * torch.where(torch.isfinite(x), x, 0.0) for x in (f, g))  # type: ignore


def _backward_value(impl: str):
    def backward(ctx: Any, grad: Tensor | None, *_rest: None):
        if grad is None:
            return (None,) * 6
        cost, epsilon, phi, gamma, f, g = ctx.saved_tensors
        grad_cost = _op("sinkhorn_value_bwd", impl)(grad.contiguous(), cost, epsilon, phi, gamma)
        marginals = _envelope_marginals(grad, f, g)
        to_a, to_b = (
            None if dtype is None else x.to(dtype) for x, dtype in zip(marginals, ctx.dtypes, strict=True)
        )
        return grad_cost, None, to_a, to_b, None, None

    return backward


contract.define(
    "sinkhorn",
    "sinkhorn_value_fwd",
    "(Tensor cost, Tensor epsilon, Tensor? a, Tensor? b, SymInt max_iter, float tol)"
    " -> (Tensor value, Tensor f, Tensor g, Tensor phi, Tensor gamma)",
    _fake_value_fwd,
    setup_context=_setup_value,
    backward=_backward_value,
)
# grad [N] times the plan, in the dtype of cost.
contract.define(
    "sinkhorn",
    "sinkhorn_value_bwd",
    "(Tensor grad, Tensor cost, Tensor epsilon, Tensor phi, Tensor gamma) -> Tensor",
    lambda impl: lambda grad, cost, *_: torch.empty_like(cost),
)


# --- SwAV, point clouds -------------------------------------------------------------------------------------

contract.define(
    "sinkhorn",
    "swav_assign",
    "(Tensor scores, float epsilon, SymInt n_iter) -> Tensor",
    lambda impl: lambda scores, *_: torch.empty_like(scores),
)


def _fake_points_fwd(impl: str):
    def fake(x, y, epsilon, a, b, max_iter, tol):
        f, g, iterations, error, phi, gamma = _fake_potentials(x, x.shape[1], y.shape[1])
        return torch.empty_like(error), f, g, iterations, error, phi, gamma

    return fake


def _setup_points(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, y, epsilon, a, b, _, _ = inputs
    _, f, g, _, _, phi, gamma = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, y, epsilon, phi, gamma, f, g)
    ctx.dtypes = [None if x is None else x.dtype for x in (a, b)]


def _backward_points(impl: str):
    def backward(ctx: Any, grad: Tensor | None, *_rest: None):
        if grad is None:
            return (None,) * 7
        x, y, epsilon, phi, gamma, f, g = ctx.saved_tensors
        grad_x, grad_y = _op("sinkhorn_points_bwd", impl)(grad.contiguous(), x, y, epsilon, phi, gamma)
        marginals = _envelope_marginals(grad, f, g)
        to_a, to_b = (
            None if dtype is None else x.to(dtype) for x, dtype in zip(marginals, ctx.dtypes, strict=True)
        )
        return grad_x, grad_y, None, to_a, to_b, None, None

    return backward


# x [N, n, d] and y [N, m, d] in the dtype of the arithmetic; the cost is ||x_i - y_j||^2.
contract.define(
    "sinkhorn",
    "sinkhorn_points_fwd",
    "(Tensor x, Tensor y, Tensor epsilon, Tensor? a, Tensor? b, SymInt max_iter, float tol)"
    " -> (Tensor value, Tensor f, Tensor g, Tensor iterations, Tensor error, Tensor phi, Tensor gamma)",
    _fake_points_fwd,
    setup_context=_setup_points,
    backward=_backward_points,
)
contract.define(
    "sinkhorn",
    "sinkhorn_points_bwd",
    "(Tensor grad, Tensor x, Tensor y, Tensor epsilon, Tensor phi, Tensor gamma) -> (Tensor, Tensor)",
    lambda impl: lambda grad, x, y, *_: (torch.empty_like(x), torch.empty_like(y)),
)


# --- the reference with the gradients of the ops ------------------------------------------------------------


class _ImplicitReference(torch.autograd.Function):
    """reference.solve, whose backward is the implicit gradient."""

    @staticmethod
    def forward(cost, epsilon, a, b, init, max_iter, tol):
        plan, solution = reference.solve(cost, epsilon, a, b, init, max_iter, tol)
        return plan, solution.f, solution.g, *solution[4:], solution.phi, solution.gamma

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        cost, epsilon, a, b, *_ = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(cost, epsilon, *output[5:])
        ctx.dtypes = [None if x is None else x.dtype for x in (cost, a, b)]

    @staticmethod
    def backward(ctx: Any, grad_plan, grad_f, grad_g, *_rest):
        found = _implicit_backward("reference", grad_plan, grad_f, grad_g, *ctx.saved_tensors)
        to_cost, to_a, to_b = (
            None if dtype is None else grad.to(dtype) for grad, dtype in zip(found, ctx.dtypes, strict=True)
        )
        return to_cost, None, to_a, to_b, None, None, None


class _EnvelopeReference(torch.autograd.Function):
    """The value of reference.solve, whose gradient to cost is the plan."""

    @staticmethod
    def forward(cost, epsilon, a, b, max_iter, tol):
        plan, solution = reference.solve(cost, epsilon, a, b, None, max_iter, tol)
        value = reference.transport_value(solution, a, b, epsilon)
        return value, plan, solution.f, solution.g

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        ctx.given = [x is not None for x in inputs[2:4]]

    @staticmethod
    def backward(ctx: Any, grad, *_rest):
        if grad is None:
            return (None,) * 6
        plan, f, g = ctx.saved_tensors
        marginals = _envelope_marginals(grad, f, g)
        to_a, to_b = (x if given else None for x, given in zip(marginals, ctx.given, strict=True))
        return grad[:, None, None] * plan, None, to_a, to_b, None, None


class _PointsReference(torch.autograd.Function):
    """reference.solve on squared distances, with the envelope gradient to the points."""

    @staticmethod
    def forward(x, y, epsilon, a, b, max_iter, tol):
        cost = reference.squared_distances(x, y)
        _, solution = reference.solve(cost, epsilon, a, b, None, max_iter, tol)
        value = reference.transport_value(solution, a, b, epsilon)
        return value, solution.f, solution.g, *solution[4:], solution.phi, solution.gamma

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, y, epsilon, a, b, _, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, y, epsilon, *output[5:], *output[1:3])
        ctx.given = [marginal is not None for marginal in (a, b)]

    @staticmethod
    def backward(ctx: Any, grad, *_rest):
        if grad is None:
            return (None,) * 7
        x, y, epsilon, phi, gamma, f, g = ctx.saved_tensors
        grad_x, grad_y = reference.points_backward(grad, x, y, epsilon, phi, gamma)
        marginals = _envelope_marginals(grad, f, g)
        to_a, to_b = (m if given else None for m, given in zip(marginals, ctx.given, strict=True))
        return grad_x.to(x.dtype), grad_y.to(y.dtype), None, to_a, to_b, None, None


# --- validation ---------------------------------------------------------------------------------------------


def _check_batched(name: str, value: Any, last: tuple[int | str, int | str], like: Tensor | None) -> Tensor:
    """`value` with any leading dimensions (those of `like`, if given) before the two of `last`."""
    batch: tuple[int | str, ...] = ("...",)
    if like is not None:
        batch = tuple(like.shape[:-2])
    elif isinstance(value, Tensor) and value.dim() >= 2:
        batch = tuple(value.shape[:-2])
    return contract.check_tensor(name, value, (*batch, *last), contract.FLOAT_DTYPES, like)


def _flat(x: Tensor, batch: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """x with its leading dimensions in one, in `dtype`."""
    return x.to(dtype).reshape(math.prod(batch), *x.shape[len(batch) :]).contiguous()


def _check_epsilon(epsilon: Any, like: Tensor, check_values: bool) -> Tensor:
    """epsilon as float64 [N]."""
    batch = tuple(like.shape[:-2])
    if not isinstance(epsilon, Tensor):
        width = contract.check_number("epsilon", epsilon, above=0)
        return torch.full((math.prod(batch),), width, dtype=torch.float64, device=like.device)
    shape = batch if epsilon.dim() else ()
    epsilon = contract.check_tensor("epsilon", epsilon, shape, contract.FLOAT_DTYPES, like).detach()
    if check_values and not bool((torch.isfinite(epsilon) & (epsilon > 0)).all()):
        raise ValueError(f"epsilon must be finite and greater than 0, got {float(epsilon.min()):g} the least")
    return epsilon.to(torch.float64).expand(batch).reshape(math.prod(batch)).contiguous()


def _check_marginal(
    name: str, marginal: Any, size: int, like: Tensor, dtype: torch.dtype, check_values: bool
) -> Tensor | None:
    """A marginal as `dtype` [N, size]; None where it is uniform."""
    if marginal is None:
        return None
    batch = tuple(like.shape[:-2])
    marginal = contract.check_tensor(name, marginal, (*batch, size), contract.FLOAT_DTYPES, like)
    if check_values:
        contract.check_finite(name, marginal.detach())
        if bool((marginal < 0).any()):
            raise ValueError(f"{name} must be at least 0, got {float(marginal.min()):g}")
    return _flat(marginal, batch, dtype)


def _check_masses(a: Tensor | None, b: Tensor | None) -> None:
    """ValueError where a and b do not hold the same mass: no plan has both marginals then."""
    if a is None and b is None:
        return
    mass_a, mass_b = (1.0 if x is None else x.detach().double().sum(1) for x in (a, b))
    gap = torch.as_tensor(mass_a - mass_b).abs().flatten()
    larger = torch.maximum(*torch.broadcast_tensors(*(torch.as_tensor(x).to(gap) for x in (mass_a, mass_b))))
    apart = gap[gap > MASS_TOLERANCE * larger]
    if apart.numel():
        raise ValueError(
            f"a and b must hold the same mass in every problem, they differ by {float(apart.max()):g}"
        )


def _check_cost_values(cost: Tensor) -> None:
    bad = torch.isnan(cost) | (cost == -torch.inf)
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"cost must be finite or +inf, got {cost[where].item()} at index {where}")


def _check_tol(tol: Any) -> float | None:
    return None if tol is None else contract.check_number("tol", tol, at_least=0)


class _Flat(NamedTuple):
    """The arguments of a problem, checked, with one batch dimension."""

    cost: Tensor
    epsilon: Tensor
    a: Tensor | None
    b: Tensor | None
    batch: tuple[int, ...]
    dtype: torch.dtype


def _check_problem(cost: Any, epsilon: Any, a: Any, b: Any, check_values: bool) -> _Flat:
    cost = _check_batched("cost", cost, ("K", "E"), None)
    rows, columns = cost.shape[-2:]
    if rows < 1 or columns < 1:
        raise ValueError(f"cost must have at least one row and one column, got {contract.describe(cost)}")
    if check_values:
        _check_cost_values(cost.detach())
    dtype = reference.compute_dtype(cost.dtype)
    batch = tuple(cost.shape[:-2])
    width = _check_epsilon(epsilon, cost, check_values)
    a = _check_marginal("a", a, rows, cost, dtype, check_values)
    b = _check_marginal("b", b, columns, cost, dtype, check_values)
    if check_values:
        _check_masses(a, b)
    return _Flat(_flat(cost, batch, cost.dtype), width, a, b, batch, dtype)


def _once_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else contract.once(x)


# --- public functions ---------------------------------------------------------------------------------------


def sinkhorn(
    cost: Tensor,
    epsilon: float | Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    max_iter: int = 100,
    tol: float | None = None,
    init: Tensor | None = None,
    grad: str = "implicit",
    check_values: bool = False,
    impl: str = "auto",
) -> SinkhornOutput:
    """Entropic optimal transport plans of a batch of problems, each iterated until it has converged.

    min over P of <P, C> + epsilon * sum P (log P - 1), P1 = a, P'1 = b. Log-stable at any epsilon that
    float32 can express: no NaN and no plan of zero mass.

    Args:
        cost: [..., K, E] float16, bfloat16, float32 or float64; any leading batch. +inf forbids a pair.
        epsilon: > 0, in the unit of cost; a number, or a tensor of one per problem [...].
        a: [..., K] mass of the rows, 0 for a row left out; None is 1/K each.
        b: [..., E] mass of the columns; None is 1/E each. Problems of different sizes make one batch through
            zeros in a and b.
        max_iter: iterations at most, >= 1; one is f from g, then g from f.
        tol: stop a problem at the first iteration whose `error` is below this; None runs max_iter. Decided a
            problem at a time on the device, without waiting for it.
        init: [..., E] an earlier g to start from (entries that are not finite start at 0); None starts at 0.
        grad: "implicit": exact where the iterations have converged, through a linear system on the smaller
            side; "unrolled": exact for the iterations that were run, of any number, best for a few; "none".
            plan, f and g carry gradients to cost, a and b, once. The gradient to `a` is that of the limit,
            which depends on a only up to its sum: <a, grad> = 0.
        check_values: also check cost, epsilon and the marginals, and that a and b hold the same mass; waits
            for a GPU.
        impl: "auto", "native", "triton" or "reference".

    Returns:
        plan: [..., K, E] in the dtype of cost (float32 for float16, which would underflow).
        f: [..., K], g: [..., E]: potentials in the unit of cost, float32 (float64 for float64), in the gauge
            <b, g> = 0 over finite entries; -inf where there is no mass, +inf where a row or column is
            infeasible.
        iterations: [...] int32, how many were run.
        error: [...] sum over rows of |P1 - a| of the returned plan; inf where the problem is infeasible.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; the message names it.
        RuntimeError: an explicit `impl` that cannot run here; a second backward.

    Source: Cuturi 2013; the plans of PM-JDOT (Hu et al. 2022), Eq. 5.
    """
    problem = _check_problem(cost, epsilon, a, b, check_values)
    max_iter = contract.check_integer("max_iter", max_iter, 1, at_most=2**31 - 1)
    tol = _check_tol(tol)
    if grad not in GRADS:
        raise ValueError(f"grad must be one of {', '.join(map(repr, GRADS))}, got {grad!r}")
    batch, (rows, columns) = problem.batch, cost.shape[-2:]
    if init is not None:
        init = contract.check_tensor("init", init, (*batch, columns), contract.FLOAT_DTYPES, cost)
        init = _flat(init.detach(), batch, problem.dtype)
    chosen = contract.choose_impl("sinkhorn", impl, cost.device.type, cost.dtype)
    flat, width, a, b = problem.cost, problem.epsilon, problem.a, problem.b
    if grad == "none":
        flat, a, b = flat.detach(), *(None if x is None else x.detach() for x in (a, b))
    if chosen == "reference":
        with contract.full_precision(cost.device.type):
            found = _reference_sinkhorn(problem.dtype, flat, width, a, b, init, max_iter, tol, grad)
    else:
        limit = NO_TOLERANCE if tol is None else tol
        found = _op("sinkhorn_fwd", chosen)(flat, width, a, b, init, max_iter, limit, grad)
    plan, f, g, iterations, error = found[:5]
    return SinkhornOutput(
        plan.view(*batch, rows, columns),
        f.view(*batch, rows),
        g.view(*batch, columns),
        iterations.view(batch),
        error.view(batch),
    )


def _reference_sinkhorn(
    dtype: torch.dtype,
    cost: Tensor,
    epsilon: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    init: Tensor | None,
    max_iter: int,
    tol: float | None,
    grad: str,
) -> tuple[Tensor, ...]:
    stored = reference.plan_dtype(cost.dtype)
    cost, a, b = contract.once(cost).to(dtype), _once_or_none(a), _once_or_none(b)
    width = epsilon.to(dtype)
    if grad == "implicit":
        plan, *rest = _ImplicitReference.apply(cost, width, a, b, init, max_iter, tol)
    else:
        plan, solution = reference.solve(cost, width, a, b, init, max_iter, tol)
        rest = [solution.f, solution.g, solution.iterations, solution.error]
    return plan.to(stored), *rest


def sinkhorn_cost(
    cost: Tensor,
    epsilon: float | Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    max_iter: int = 100,
    tol: float | None = None,
    check_values: bool = False,
    impl: str = "auto",
) -> Tensor:
    """The value of entropic optimal transport: <a, f> + <b, g> - epsilon * sum P, 0 * inf counting as 0.

    Args:
        cost, epsilon, a, b, max_iter, tol, check_values, impl: as for `sinkhorn`.

    Returns:
        [...] float32 (float64 for float64 cost), +inf where a problem is infeasible. By the envelope theorem
        its gradient to cost is the plan, to a and b the potentials f and g (0 where they are not finite);
        once. No plan is held.

    Raises:
        As `sinkhorn`.

    Source: Cuturi 2013; the envelope theorem as in Feydy et al. 2019, section 2.
    """
    problem = _check_problem(cost, epsilon, a, b, check_values)
    max_iter = contract.check_integer("max_iter", max_iter, 1, at_most=2**31 - 1)
    tol = _check_tol(tol)
    chosen = contract.choose_impl("sinkhorn_cost", impl, cost.device.type, cost.dtype)
    flat, width, a, b = problem.cost, problem.epsilon, problem.a, problem.b
    if chosen == "reference":
        with contract.full_precision(cost.device.type):
            flat, a, b = contract.once(flat).to(problem.dtype), _once_or_none(a), _once_or_none(b)
            width = width.to(problem.dtype)
            value = _EnvelopeReference.apply(flat, width, a, b, max_iter, tol)[0]
    else:
        limit = NO_TOLERANCE if tol is None else tol
        value = _op("sinkhorn_value_fwd", chosen)(flat, width, a, b, max_iter, limit)[0]
    return value.view(problem.batch)


def swav_assign(
    scores: Tensor,
    epsilon: float = 0.05,
    n_iter: int = 3,
    *,
    group: dist.ProcessGroup | None = None,
    check_values: bool = False,
    impl: str = "auto",
) -> Tensor:
    """SwAV's soft assignment of samples to prototypes, balanced over the prototypes.

    Q = exp(scores / epsilon); then n_iter times: prototypes (columns) to 1/K, samples (rows) to 1/B. At last
    rows sum to 1. Computed without overflow, whatever the scores.

    Args:
        scores: [B, K] float16, bfloat16, float32 or float64; similarity of sample and prototype.
        epsilon: > 0, in the unit of scores.
        n_iter: >= 1.
        group: a torch.distributed process group whose ranks hold the rows of one batch: B is the sum over
            ranks (some may hold none), and column sums are reduced over the group. This path is eager PyTorch
            around `all_reduce`, whatever the impl.
        check_values: also check that scores are finite; waits for a GPU.
        impl: "auto", "native", "triton" or "reference".

    Returns:
        [B, K] in the dtype of scores; rows sum to 1. No gradient.

    Raises:
        As `sinkhorn`.

    Source: SwAV (Caron et al. 2020), Eq. 3 to 5 and its Algorithm 1; PM-JDOT, Eq. 3 and 4.
    """
    scores = contract.check_tensor("scores", scores, ("B", "K"), contract.FLOAT_DTYPES).detach()
    if scores.shape[1] < 1:
        raise ValueError(f"scores must have at least one column, got {contract.describe(scores)}")
    width = contract.check_number("epsilon", epsilon, above=0)
    n_iter = contract.check_integer("n_iter", n_iter, 1, at_most=2**31 - 1)
    if check_values:
        contract.check_finite("scores", scores)
    chosen = contract.choose_impl("swav_assign", impl, scores.device.type, scores.dtype)
    if group is None and chosen != "reference":
        return _op("swav_assign", chosen)(scores.contiguous(), width, n_iter)
    with contract.full_precision(scores.device.type), torch.no_grad():
        rows = scores.to(reference.compute_dtype(scores.dtype))
        if group is not None:
            return reference.swav_assign_group(rows, width, n_iter, group).to(scores.dtype)
        return reference.swav_assign(rows, width, n_iter).to(scores.dtype)


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    max_iter: int = 100,
    tol: float | None = None,
    check_values: bool = False,
    impl: str = "auto",
) -> PointsOutput:
    """Entropic optimal transport between point clouds, cost ||x_i - y_j||^2 (not halved), formed on the fly.

    Args:
        x: [..., n, d] float16, bfloat16, float32 or float64; any leading batch.
        y: [..., m, d], of the same dtype.
        epsilon: > 0, in squared units of x; a number, or a tensor of one per problem [...].
        a: [..., n], b: [..., m]: mass of the points; None is uniform of total 1.
        max_iter, tol, impl: as for `sinkhorn`.
        check_values: also check that points are finite, and epsilon and the marginals as `sinkhorn` does.

    Returns:
        value: [...] as of `sinkhorn_cost`, float32 (float64 for float64). Its gradient to x is
            2 sum_j P_ij (x_i - y_j), to y alike, to a and b the potentials; once.
        f: [..., n], g: [..., m], iterations, error: as of `sinkhorn`, without gradients.
        Memory is O(n + m) with the compiled impls; the reference holds the cost.

    Raises:
        As `sinkhorn`.

    Source: Cuturi 2013; the envelope theorem as in Feydy et al. 2019, section 2.
    """
    x = _check_batched("x", x, ("n", "d"), None)
    y = _check_batched("y", y, ("m", x.shape[-1]), x)
    if y.dtype != x.dtype:
        raise TypeError(f"y must be of the dtype of x, {x.dtype}, got {contract.describe(y)}")
    if x.shape[-2] < 1 or y.shape[-2] < 1:
        raise ValueError(f"x and y must hold at least one point, got {contract.describe(x)} and {y.shape}")
    if check_values:
        contract.check_finite("x", x.detach())
        contract.check_finite("y", y.detach())
    batch, dtype = tuple(x.shape[:-2]), reference.compute_dtype(x.dtype)
    width = _check_epsilon(epsilon, x, check_values)
    a = _check_marginal("a", a, x.shape[-2], x, dtype, check_values)
    b = _check_marginal("b", b, y.shape[-2], x, dtype, check_values)
    if check_values:
        _check_masses(a, b)
    max_iter = contract.check_integer("max_iter", max_iter, 1, at_most=2**31 - 1)
    tol = _check_tol(tol)
    chosen = contract.choose_impl("sinkhorn_points", impl, x.device.type, x.dtype)
    flat_x, flat_y = _flat(x, batch, dtype), _flat(y, batch, dtype)
    if chosen == "reference":
        with contract.full_precision(x.device.type):
            flat_x, flat_y = contract.once(flat_x), contract.once(flat_y)
            a, b = _once_or_none(a), _once_or_none(b)
            found = _PointsReference.apply(flat_x, flat_y, width.to(dtype), a, b, max_iter, tol)
    else:
        limit = NO_TOLERANCE if tol is None else tol
        found = _op("sinkhorn_points_fwd", chosen)(flat_x, flat_y, width, a, b, max_iter, limit)
    value, f, g, iterations, error = found[:5]
    return PointsOutput(
        value.view(batch),
        f.view(*batch, x.shape[-2]),
        g.view(*batch, y.shape[-2]),
        iterations.view(batch),
        error.view(batch),
    )
