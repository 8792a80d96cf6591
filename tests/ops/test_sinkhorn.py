"""sinkhorn, sinkhorn_cost, swav_assign and sinkhorn_points on every impl, against the float64 reference.

In a process of its own (test_sinkhorn_triton.py starts one) TRITON_INTERPRET=1 adds Triton to the table.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sketchfast as sf
from sketchfast.kernels.reference import sinkhorn as reference
from sketchfast.ops import sinkhorn as ops_sinkhorn
from sketchfast.testing import (
    assert_same_bits,
    assert_within_budget,
    available_impls,
    devices,
    opcheck,
)

CASES = [(device, impl) for device in devices() for impl in available_impls(device)]
KERNELS = [case for case in CASES if case[1] != "reference"]
impls = pytest.mark.parametrize(("device", "impl"), CASES)
kernels = pytest.mark.parametrize(("device", "impl"), KERNELS)
native_cpu = pytest.mark.parametrize(("device", "impl"), [c for c in KERNELS if c == ("cpu", "native")])

SHAPES = [  # problems, rows, columns
    (3, 5, 7),
    (2, 1, 1),
    (2, 1, 9),
    (2, 9, 1),
    (2, 33, 65),
    (2, 64, 64),
    (1, 130, 257),
    (1, 70, 20),
    (0, 4, 5),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
#: cost / epsilon up to 1, 20, 1e4
EPSILONS = [1.0, 0.05, 1e-4]
INFINITY = math.inf


def skip_float64_on_gpu_impls(device, impl, dtype):
    if dtype == torch.float64 and (impl == "triton" or (impl == "native" and device == "cuda")):
        pytest.skip("float64 is for the reference and native on CPU")


def problem(count, rows, columns, dtype=torch.float32, device="cpu", seed=0, marginals=True):
    """(cost, a, b) with cost in [0, 1); a and b, if asked for, float and without zeros."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(count, rows, columns, generator=generator, dtype=torch.float64).to(dtype)
    if not marginals:
        return cost.to(device), None, None
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    sides = [torch.rand(count, n, generator=generator, dtype=torch.float64) + 0.1 for n in (rows, columns)]
    a, b = ((side / side.sum(1, keepdim=True)).to(kept).to(device) for side in sides)
    return cost.to(device), a, b


def spoil(cost, a, b):
    """Forbids pairs and empties a row and a column of the first problem; every row and column keeps a way."""
    cost, a, b = cost.clone(), a.clone(), b.clone()
    if len(cost) and min(cost.shape[1:]) >= 4:
        cost[0, 1, 2] = cost[0, 3, 0] = INFINITY
        a[0, 2], b[0, 3] = 0, 0
        a[0] /= a[0].sum()
        b[0] /= b[0].sum()
    return cost, a, b


def double(x):
    return None if x is None else x.double()


def weights(x, phase=0.5):
    steps = torch.arange(x.numel(), dtype=torch.float64, device=x.device)
    return (steps * 0.7 + phase).sin().view(x.shape)


def finite(x):
    return torch.where(torch.isfinite(x), x, 0.0)


def weighted(out):
    """A number that depends on plan, f and g, with weights of both signs."""
    parts = (out.plan, finite(out.f), finite(out.g))
    return sum((part.double() * weights(part, phase)).sum() for phase, part in enumerate(parts))


def gradients(function, *inputs):
    """(function of the inputs, its gradients to them, None for an input that is None)."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    found = iter(torch.autograd.grad(value, [x for x in leaves if x is not None]))
    return value.detach(), [None if x is None else next(found) for x in leaves]


def rounding(dtype, epsilon):
    """What two float64 computations may differ by, relative: exponents up to 1 / epsilon, each rounded."""
    return 8 * torch.finfo(torch.float64).eps / epsilon if dtype == torch.float64 else 0.0


def assert_potentials_match(got, eager, exact, what):
    """Within the budget where finite; the same infinities elsewhere."""
    same = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(got), same), f"{what}: finite where the reference is not, or not"
    assert torch.equal(got[~same].double(), exact[~same]), f"{what}: infinities differ"
    if same.any():
        assert_within_budget(got[same], eager[same], exact[same], what)


def assert_output_matches(got, eager, exact, dtype, epsilon=1.0):
    stored = torch.float32 if dtype == torch.float16 else dtype
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.plan.dtype == stored
    assert got.f.dtype == got.g.dtype == got.error.dtype == kept
    assert got.iterations.dtype == torch.int32
    assert_within_budget(got.plan, eager.plan, exact.plan, "plan", floor=rounding(dtype, epsilon))
    assert_potentials_match(got.f, eager.f, exact.f, "f")
    assert_potentials_match(got.g, eager.g, exact.g, "g")
    assert torch.equal(torch.isinf(got.error), torch.isinf(exact.error))
    # A sum of what is nearly nothing: known as well as a row sum of size 1.
    gap = (finite(got.error.double()) - finite(exact.error)).abs()
    allowed = 2 * (finite(eager.error.double()) - finite(exact.error)).abs().amax() if len(gap) else 0
    allowed = allowed + 64 * torch.finfo(kept).eps + rounding(dtype, epsilon)
    assert (gap <= allowed).all(), f"error: off by {gap.max():g}"


# --- values -------------------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(device, impl, dtype, epsilon, shape):
    skip_float64_on_gpu_impls(device, impl, dtype)
    cost, a, b = spoil(*problem(*shape, dtype=dtype, device=device))
    got, eager = (sf.sinkhorn(cost, epsilon, a=a, b=b, max_iter=12, impl=i) for i in (impl, "reference"))
    exact = sf.sinkhorn(cost.double(), epsilon, a=double(a), b=double(b), max_iter=12, impl="reference")
    assert_output_matches(got, eager, exact, dtype, epsilon)
    assert (got.iterations == 12).all()


@kernels
def test_uniform_marginals_and_one_epsilon_a_problem(device, impl):
    cost, _, _ = problem(4, 17, 30, device=device, marginals=False)
    cost = cost.view(2, 2, 17, 30)
    epsilon = torch.tensor([[1.0, 0.1], [0.02, 0.5]], device=device)
    got, eager = (sf.sinkhorn(cost, epsilon, max_iter=9, impl=i) for i in (impl, "reference"))
    exact = sf.sinkhorn(cost.double(), epsilon.double(), max_iter=9, impl="reference")
    assert got.plan.shape == cost.shape
    assert got.f.shape == (2, 2, 17)
    assert got.g.shape == (2, 2, 30)
    assert got.error.shape == (2, 2)
    assert_output_matches(got, eager, exact, torch.float32)
    scalar = sf.sinkhorn(cost[0, 0], 0.1, max_iter=9, impl=impl)
    assert scalar.plan.shape == (17, 30)
    assert scalar.error.shape == ()


@kernels
def test_many_iterations_at_a_small_epsilon_keep_their_mass(device, impl):
    """cost in [1, 2], epsilon 1e-4: the plain scaling form underflows everywhere."""
    cost, a, b = problem(2, 20, 31, device=device)
    out = sf.sinkhorn(cost + 1, 1e-4, a=a, b=b, max_iter=60, impl=impl)
    assert torch.isfinite(out.plan).all()
    torch.testing.assert_close(out.plan.sum(1), b, rtol=1e-4, atol=1e-7)
    exact = sf.sinkhorn(cost.double() + 1, 1e-4, a=a.double(), b=b.double(), max_iter=60, impl="reference")
    eager = sf.sinkhorn(cost + 1, 1e-4, a=a, b=b, max_iter=60, impl="reference")
    assert_output_matches(out, eager, exact, torch.float32)


@impls
def test_masses_of_very_different_size(device, impl):
    cost, a, b = problem(1, 6, 8, device=device)
    a[0, 0], b[0, 1], b[0, 2] = 1e-30, 1e-12, 1e-6
    a, b = a / a.sum(), b / b.sum()
    out = sf.sinkhorn(cost, 0.02, a=a, b=b, max_iter=100, impl=impl)
    torch.testing.assert_close(out.plan.sum(1), b, rtol=1e-5, atol=0)
    assert out.f.isfinite().all()
    assert out.g.isfinite().all()


@impls
@pytest.mark.parametrize("shape", [(4, 20, 30), (2, 40, 300)], ids=str)
def test_marginals_of_a_converged_plan(device, impl, shape):
    cost, a, b = problem(*shape, device=device)
    out = sf.sinkhorn(cost, 0.2, a=a, b=b, max_iter=500, tol=1e-6, impl=impl)
    assert (out.error < 1e-6).all()
    assert (out.iterations < 500).all()
    torch.testing.assert_close(out.plan.sum(2), a, rtol=0, atol=1e-6)
    torch.testing.assert_close(out.plan.sum(1), b, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close((b * out.g).sum(1), torch.zeros(shape[0], device=device), rtol=0, atol=1e-6)


@impls
@pytest.mark.parametrize("epsilon", [1.0, 0.05])
def test_against_pot(device, impl, epsilon):
    ot = pytest.importorskip("ot")
    cost, a, b = problem(3, 12, 19, dtype=torch.float64)
    dtype = torch.float64 if (device, impl) in (("cpu", "native"), (device, "reference")) else torch.float32
    cost, a, b = (x.to(device, dtype) for x in (cost, a, b))
    tol = 1e-13 if dtype == torch.float64 else 1e-7
    out = sf.sinkhorn(cost, epsilon, a=a, b=b, max_iter=1000, tol=tol, impl=impl)
    for n in range(3):
        args = [x[n].double().cpu().numpy() for x in (a, b, cost)]
        plan = ot.sinkhorn(*args, epsilon, method="sinkhorn_log", stopThr=1e-14, numItermax=20000)
        atol = 1e-12 if dtype == torch.float64 else 1e-7
        torch.testing.assert_close(out.plan[n].cpu().double(), torch.from_numpy(plan), rtol=0, atol=atol)


# --- stopping, starting -------------------------------------------------------------------------------------


@kernels
def test_each_problem_stops_by_itself(device, impl):
    cost, a, b = problem(5, 16, 24, device=device)
    epsilon = torch.tensor([5.0, 1.0, 0.3, 0.1, 0.05], device=device)
    options = {"max_iter": 40, "tol": 1e-3}
    got = sf.sinkhorn(cost, epsilon, a=a, b=b, impl=impl, **options)
    exact = sf.sinkhorn(
        cost.double(), epsilon.double(), a=a.double(), b=b.double(), impl="reference", **options
    )
    assert got.iterations.tolist() == exact.iterations.tolist()
    assert len(set(got.iterations.tolist())) >= 3
    converged = got.iterations < 40
    assert converged.any()
    assert (got.error[converged] < 1e-3).all()
    for n in range(5):
        alone = sf.sinkhorn(cost[n], float(epsilon[n]), a=a[n], b=b[n], impl=impl, **options)
        assert_same_bits(got.plan[n], alone.plan)
        fixed = sf.sinkhorn(
            cost[n], float(epsilon[n]), a=a[n], b=b[n], max_iter=int(got.iterations[n]), impl=impl
        )
        torch.testing.assert_close(fixed.plan, alone.plan)
        if int(got.iterations[n]) > 1:  # the first iteration that is below, not a later one
            before = sf.sinkhorn(
                cost[n], float(epsilon[n]), a=a[n], b=b[n], max_iter=int(got.iterations[n]) - 1, impl=impl
            )
            assert before.error >= 1e-3


@impls
def test_error_is_that_of_the_plan(device, impl):
    cost, a, b = problem(3, 9, 14, device=device)
    for n in (1, 2, 5):
        out = sf.sinkhorn(cost, 0.05, a=a, b=b, max_iter=n, impl=impl)
        by_hand = (out.plan.double().sum(2) - a.double()).abs().sum(1)
        torch.testing.assert_close(out.error.double(), by_hand, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(out.plan.sum(1), b, rtol=1e-5, atol=1e-8)


@impls
def test_a_tolerance_of_zero_never_stops(device, impl):
    cost, _, _ = problem(1, 3, 3, device=device, marginals=False)
    assert int(sf.sinkhorn(cost, 10.0, tol=0.0, max_iter=50, impl=impl).iterations) == 50


@impls
def test_warm_start(device, impl):
    cost, a, b = spoil(*problem(2, 10, 15, device=device))
    long = sf.sinkhorn(cost, 0.05, a=a, b=b, max_iter=30, impl=impl)
    first = sf.sinkhorn(cost, 0.05, a=a, b=b, max_iter=18, impl=impl)
    then = sf.sinkhorn(cost, 0.05, a=a, b=b, max_iter=12, init=first.g, impl=impl)
    torch.testing.assert_close(then.plan, long.plan, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(finite(then.g), finite(long.g), rtol=1e-4, atol=1e-6)
    again = sf.sinkhorn(cost, 0.05, a=a, b=b, max_iter=100, tol=1e-3, init=long.g, impl=impl)
    assert (again.iterations <= 2).all()
    # What an earlier g had for another problem's empty columns is no start.
    wild = torch.full_like(b, INFINITY)
    wild[:, ::2] = -INFINITY
    cold, spoiled = (sf.sinkhorn(cost, 0.05, a=a, b=b, max_iter=5, init=i, impl=impl) for i in (None, wild))
    assert_same_bits(cold.plan, spoiled.plan)


# --- rows, columns and pairs that are not there -------------------------------------------------------------


@impls
def test_infeasible_rows_and_columns(device, impl):
    cost, a, b = problem(5, 4, 6, device=device)
    cost[1, 2] = INFINITY  # a row with no pair
    cost[2, :, 3] = INFINITY  # a column with none
    cost[3, 1, 1:] = INFINITY  # a row whose only pair is an empty column
    b[3, 0] = 0
    cost[4, 2] = INFINITY  # no mass, so nothing is asked of it
    a[4, 2] = 0
    out = sf.sinkhorn(cost, 0.1, a=a, b=b, max_iter=20, tol=1e-9, impl=impl)
    assert torch.isinf(out.error).tolist() == [False, True, True, True, False]
    assert not torch.isnan(out.plan).any()
    assert (out.plan[1, 2] == 0).all()
    assert (out.plan[2, :, 3] == 0).all()
    assert (out.plan[3, 1] == 0).all()
    assert out.f[1, 2] == INFINITY
    assert out.g[2, 3] == INFINITY
    assert out.f[3, 1] == INFINITY
    assert out.g[3, 0] == -INFINITY
    assert out.f[4, 2] == -INFINITY
    assert (out.iterations[1:4] == 20).all()
    assert torch.isfinite(out.plan[0]).all()
    assert out.plan[1].sum() > 0
    value = sf.sinkhorn_cost(cost, 0.1, a=a, b=b, max_iter=20, impl=impl)
    assert torch.isinf(value).tolist() == [False, True, True, True, False]


@impls
def test_everything_forbidden(device, impl):
    cost = torch.full((1, 3, 4), INFINITY, device=device)
    out = sf.sinkhorn(cost, 0.1, impl=impl)
    assert (out.plan == 0).all()
    assert torch.isinf(out.error).all()
    assert (out.f == INFINITY).all()
    assert (out.g == INFINITY).all()
    none = sf.sinkhorn(cost, 0.1, a=torch.zeros(1, 3, device=device), impl=impl)
    assert (none.f == -INFINITY).all()
    assert (none.plan == 0).all()


@impls
def test_ragged_batches_equal_their_problems_alone(device, impl):
    sizes = [(3, 5), (7, 2), (1, 1), (6, 6)]
    cost = torch.full((4, 7, 6), 0.5, device=device)
    a, b = torch.zeros(4, 7, device=device), torch.zeros(4, 6, device=device)
    singles = []
    for n, (rows, columns) in enumerate(sizes):
        one, row, column = problem(1, rows, columns, device=device, seed=n)
        cost[n, :rows, :columns], a[n, :rows], b[n, :columns] = one[0], row[0], column[0]
        singles.append(sf.sinkhorn(one[0], 0.1, a=row[0], b=column[0], tol=1e-5, impl=impl))
    cost[1, :, 2:] = INFINITY  # either way of leaving out will do
    out = sf.sinkhorn(cost, 0.1, a=a, b=b, tol=1e-5, impl=impl)
    for n, (rows, columns) in enumerate(sizes):
        torch.testing.assert_close(out.plan[n, :rows, :columns], singles[n].plan, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(out.f[n, :rows], singles[n].f, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.g[n, :columns], singles[n].g, rtol=1e-5, atol=1e-6)
        assert int(out.iterations[n]) == int(singles[n].iterations)
        assert float(out.plan[n, rows:].sum() + out.plan[n, :, columns:].sum()) == 0


@impls
def test_unbalanced_masses_end_with_the_columns(device, impl):
    """Of a, only the ratios count then: the last half-step is that of the columns."""
    cost, a, b = problem(2, 5, 6, device=device)
    out, scaled = (sf.sinkhorn(cost, 0.2, a=a * s, b=b, max_iter=200, impl=impl) for s in (1.0, 3.0))
    torch.testing.assert_close(scaled.plan, out.plan, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(scaled.f, out.f, rtol=1e-4, atol=1e-5)


# --- gradients ----------------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", ["implicit", "unrolled"])
@pytest.mark.parametrize(
    "shape", [(3, 5, 7), (2, 9, 4), (1, 1, 6), (1, 6, 1), (1, 40, 70), (0, 3, 3)], ids=str
)
def test_gradients_match_reference(device, impl, dtype, grad, shape):
    skip_float64_on_gpu_impls(device, impl, dtype)
    inputs = spoil(*problem(*shape, dtype=dtype, device=device))
    steps = 3 if grad == "unrolled" else 60

    def run(impl):
        return lambda c, a, b: weighted(sf.sinkhorn(c, 0.2, a=a, b=b, max_iter=steps, grad=grad, impl=impl))

    got, eager = (gradients(run(i), *inputs)[1] for i in (impl, "reference"))
    exact = gradients(run("reference"), *(x.double() for x in inputs))[1]
    for name, *three in zip(("cost", "a", "b"), got, eager, exact, strict=True):
        assert three[0].dtype == inputs[("cost", "a", "b").index(name)].dtype
        # Terms of size 1 cancel: to nothing, where one row or column leaves no choice.
        floor = 16 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert_within_budget(*three, f"gradient to {name}", floor=floor)


@impls
def test_unrolled_gradient_stops_where_each_problem_did(device, impl):
    cost, a, b = problem(3, 6, 8, device=device)
    epsilon = torch.tensor([2.0, 0.3, 0.1], device=device)
    options = {"max_iter": 9, "tol": 2e-2, "grad": "unrolled", "impl": impl}
    counts = sf.sinkhorn(cost, epsilon, a=a, b=b, **options).iterations
    assert len(set(counts.tolist())) > 1
    start = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)).to(device)

    def whole(c, a, b):
        return weighted(sf.sinkhorn(c, epsilon, a=a, b=b, init=start, **options))

    _, together = gradients(whole, cost, a, b)
    exact_options = options | {"impl": "reference"}
    exact = gradients(
        lambda c, a, b: weighted(
            sf.sinkhorn(c, epsilon.double(), a=a, b=b, init=start.double(), **exact_options)
        ),
        *(x.double() for x in (cost, a, b)),
    )[1]
    for got, want in zip(together, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5), (1, 4), (4, 1)], ids=str)
def test_implicit_gradient_is_the_limit_of_the_unrolled_one(shape):
    inputs = problem(2, *shape, dtype=torch.float64)

    def run(grad):
        return lambda c, a, b: weighted(
            sf.sinkhorn(c, 0.2, a=a, b=b, max_iter=1500, grad=grad, impl="reference")
        )

    for implicit, unrolled in zip(
        gradients(run("implicit"), *inputs)[1], gradients(run("unrolled"), *inputs)[1], strict=True
    ):
        torch.testing.assert_close(implicit, unrolled, rtol=1e-8, atol=1e-8)


def test_implicit_gradient_is_that_of_a_dense_solve():
    """The whole (K + E) system by its pseudo-inverse, nothing eliminated."""
    cost, a, b = problem(1, 4, 6, dtype=torch.float64)
    epsilon = 0.3
    plan = sf.sinkhorn(cost, epsilon, a=a, b=b, max_iter=3000, impl="reference").plan
    upstream = weights(plan)
    _, (to_cost, to_a, to_b) = gradients(
        lambda c, a, b: (sf.sinkhorn(c, epsilon, a=a, b=b, max_iter=3000).plan * upstream).sum(), cost, a, b
    )
    p, w = plan[0], (plan * upstream)[0] / epsilon
    system = torch.cat((torch.cat((a[0].diag(), p), 1), torch.cat((p.T, b[0].diag()), 1)))
    solved = torch.linalg.pinv(system) @ torch.cat((w.sum(1), w.sum(0)))
    lam, mu = solved[:4], solved[4:]
    torch.testing.assert_close(to_cost[0], p * (lam[:, None] + mu[None]) - w, rtol=1e-8, atol=1e-9)
    shift = (a[0] * lam).sum()
    torch.testing.assert_close(to_a[0], epsilon * (lam - shift), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(to_b[0], epsilon * (mu + shift), rtol=1e-8, atol=1e-9)


@impls
def test_implicit_gradient_of_a_plan_in_components(device, impl):
    """Two blocks that share no pair: their systems do not mix, and each has its own null space."""
    cost, a, b = problem(1, 5, 7, device=device)
    cost[0, :2, 3:] = cost[0, 2:, :3] = INFINITY
    a[0, :2] *= 0.4 / a[0, :2].sum()
    a[0, 2:] *= 0.6 / a[0, 2:].sum()
    b[0, :3] *= 0.4 / b[0, :3].sum()
    b[0, 3:] *= 0.6 / b[0, 3:].sum()
    upstream = weights(cost)

    def whole(c, a, b):
        return (sf.sinkhorn(c, 0.2, a=a, b=b, max_iter=400, impl=impl).plan * upstream).sum()

    _, (to_cost, to_a, to_b) = gradients(whole, cost, a, b)
    for rows, columns in ((slice(0, 2), slice(0, 3)), (slice(2, 5), slice(3, 7))):

        def block(c, a, b, rows=rows, columns=columns):
            plan = sf.sinkhorn(c, 0.2, a=a, b=b, max_iter=400, impl="reference").plan
            return (plan * upstream[:, rows, columns].double()).sum()

        parts = cost[:, rows, columns].double(), a[:, rows].double(), b[:, columns].double()
        _, alone = gradients(block, *parts)
        torch.testing.assert_close(to_cost[:, rows, columns].double(), alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(to_a[:, rows].double(), alone[1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(to_b[:, columns].double(), alone[2], rtol=1e-3, atol=1e-4)
    assert (to_cost[0, :2, 3:] == 0).all()
    assert (to_cost[0, 2:, :3] == 0).all()


def adjoint_system(count, rows, columns, holes, components):
    """(plan, row_rhs, column_rhs, gamma, epsilon); a share `holes` of the pairs at 0, an empty line."""
    generator = torch.Generator().manual_seed(rows + columns)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    plan = torch.where(draw(count, rows, columns) < holes, 0.0, draw(count, rows, columns) + 0.01)
    apart = torch.arange(rows)[:, None] % components != torch.arange(columns) % components
    plan = plan.masked_fill(apart, 0.0)
    if min(rows, columns) > 2:
        plan[:, 1] = plan[:, :, 2] = 0
    gamma = torch.where(plan.sum(1) > 0, draw(count, columns) - 0.5, -INFINITY)
    return plan, draw(count, rows) - 0.5, draw(count, columns) - 0.5, gamma, draw(count) + 0.1


@native_cpu
@pytest.mark.parametrize(("holes", "components"), [(0, 1), (0.3, 1), (0, 3), (0.97, 1)])
@pytest.mark.parametrize(
    "shape", [(3, 5, 7), (1, 1, 1), (2, 1, 9), (2, 17, 150), (2, 64, 64), (1, 70, 515), (0, 4, 5)], ids=str
)
def test_adjoint_solve_matches_reference(device, impl, shape, holes, components):
    count, small, large = shape
    for rows, columns in ((small, large), (large, small)):
        system = adjoint_system(count, rows, columns, holes, components)
        got = torch.ops.sketchfast.sinkhorn_schur_native(*system)
        for mine, theirs in zip(got, reference.implicit_solve(*system), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@native_cpu
def test_adjoint_solve_of_nan_and_of_nothing(device, impl):
    plan, *rest = adjoint_system(4, 6, 9, 0.5, 1)
    plan[0, 3, 4] = math.nan
    plan[1], plan[2, :, 3:] = 0, 0
    got = torch.ops.sketchfast.sinkhorn_schur_native(plan, *rest)
    assert torch.isnan(got[0][0]).any()
    assert all((x[1] == 0).all() for x in got)
    assert all(torch.isfinite(x[1:]).all() for x in got)


def test_adjoint_solve_of_a_very_large_plan_is_left_to_the_library():
    most = ops_sinkhorn.NATIVE_SCHUR_SIZE
    library, own = (torch.zeros(()).expand(1, most + 9, n) for n in (most + 1, most))
    assert ops_sinkhorn._schur_op("native", library) is torch.ops.sketchfast.sinkhorn_schur
    assert ops_sinkhorn._schur_op("native", own) is torch.ops.sketchfast.sinkhorn_schur_native
    assert ops_sinkhorn._schur_op("reference", own) is torch.ops.sketchfast.sinkhorn_schur


@impls
def test_gradients_at_a_small_epsilon_are_finite(device, impl):
    """Most entries underflow: the plan falls apart into components, and nothing divides by zero."""
    inputs = spoil(*problem(2, 12, 18, device=device))
    _, found = gradients(
        lambda c, a, b: weighted(sf.sinkhorn(c, 1e-3, a=a, b=b, max_iter=300, impl=impl)), *inputs
    )
    assert all(torch.isfinite(x).all() for x in found)
    assert (found[0][0, 1, 2] == 0).all()
    assert found[1][0, 2] == 0
    assert found[2][0, 3] == 0


@impls
def test_infinite_upstream_on_forbidden_pairs_is_no_gradient(device, impl):
    """<P, C> with C = inf somewhere: 0 * inf counts as 0."""
    cost, a, b = spoil(*problem(1, 6, 7, device=device))
    _, (to_cost, _, _) = gradients(
        lambda c, a, b: torch.where(
            torch.isfinite(c), sf.sinkhorn(c, 0.2, a=a, b=b, impl=impl).plan * c, 0.0
        ).sum(),
        *(cost, a, b),
    )
    assert torch.isfinite(to_cost).all()


@impls
def test_grad_none(device, impl):
    cost, a, b = problem(2, 4, 5, device=device)
    out = sf.sinkhorn(cost.requires_grad_(), 0.2, a=a.requires_grad_(), b=b, grad="none", impl=impl)
    assert not any(x.requires_grad for x in out)
    with_grad = sf.sinkhorn(cost, 0.2, a=a, b=b, impl=impl)
    assert with_grad.plan.requires_grad
    assert with_grad.f.requires_grad
    assert with_grad.g.requires_grad
    assert not with_grad.error.requires_grad
    assert not with_grad.iterations.requires_grad


@impls
@pytest.mark.parametrize("grad", ["implicit", "unrolled"])
def test_one_output_alone(device, impl, grad):
    cost, a, b = problem(2, 4, 5, device=device)
    for name in ("plan", "f", "g"):

        def run(c, impl=impl, name=name):
            out = sf.sinkhorn(c, 0.3, a=a.to(c.dtype), b=b.to(c.dtype), grad=grad, impl=impl)
            return (getattr(out, name) * weights(getattr(out, name))).sum()

        (got,) = gradients(run, cost)[1]
        (exact,) = gradients(lambda c: run(c, "reference"), cost.double())[1]
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)


@impls
def test_gradcheck_in_float64(device, impl):
    skip_float64_on_gpu_impls(device, impl, torch.float64)
    cost, _, _ = problem(1, 3, 4, dtype=torch.float64, device=device, marginals=False)
    cost = cost.requires_grad_()
    for grad, steps in (("implicit", 400), ("unrolled", 2)):
        torch.autograd.gradcheck(
            lambda c, steps=steps, grad=grad: sf.sinkhorn(c, 0.5, max_iter=steps, grad=grad, impl=impl)[:3],
            cost,
        )
    torch.autograd.gradcheck(lambda c: sf.sinkhorn_cost(c, 0.5, max_iter=400, impl=impl), cost)
    x, y = (torch.randn(1, n, 2, dtype=torch.float64, device=device).requires_grad_() for n in (3, 4))
    torch.autograd.gradcheck(
        lambda x, y: sf.sinkhorn_points(x, y, 2.0, max_iter=400, impl=impl).value, (x, y)
    )


@impls
def test_second_backward_raises(device, impl):
    cost, _, _ = problem(1, 3, 4, device=device, marginals=False)
    x = torch.rand(1, 3, 2, device=device).requires_grad_()
    cost = cost.requires_grad_()
    for function, leaf in (
        (lambda: weighted(sf.sinkhorn(cost, 0.5, impl=impl)), cost),
        (lambda: weighted(sf.sinkhorn(cost, 0.5, max_iter=2, grad="unrolled", impl=impl)), cost),
        (lambda: sf.sinkhorn_cost(cost, 0.5, impl=impl).sum(), cost),
        (lambda: sf.sinkhorn_points(x, x.detach(), 0.5, impl=impl).value.sum(), x),
    ):
        (grad,) = torch.autograd.grad(function(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once differentiable"):
            grad.square().sum().backward()


# --- the value ----------------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_cost_matches_reference(device, impl, dtype, epsilon):
    skip_float64_on_gpu_impls(device, impl, dtype)
    inputs = spoil(*problem(3, 13, 21, dtype=dtype, device=device))

    def run(impl):
        return lambda c, a, b: sf.sinkhorn_cost(c, epsilon, a=a, b=b, max_iter=15, impl=impl).double().sum()

    got, eager = (gradients(run(i), *inputs) for i in (impl, "reference"))
    exact = gradients(run("reference"), *(x.double() for x in inputs))
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert_within_budget(got[0].to(kept), eager[0].to(kept), exact[0], "value")
    for name, *three in zip(("cost", "a", "b"), got[1], eager[1], exact[1], strict=True):
        assert_within_budget(*three, f"gradient to {name}", floor=rounding(dtype, epsilon))


@impls
def test_cost_is_that_of_its_parts(device, impl):
    cost, a, b = spoil(*problem(2, 6, 9, device=device))
    out = sf.sinkhorn(cost, 0.1, a=a, b=b, max_iter=200, impl=impl)
    value = sf.sinkhorn_cost(cost, 0.1, a=a, b=b, max_iter=200, impl=impl)
    entropy = torch.where(out.plan > 0, out.plan * (out.plan.clamp(min=1e-38).log() - 1), 0.0).sum((1, 2))
    primal = (out.plan * finite(cost)).sum((1, 2)) + 0.1 * entropy
    torch.testing.assert_close(value, primal, rtol=1e-5, atol=1e-5)
    dual = (a * finite(out.f)).sum(1) + (b * finite(out.g)).sum(1) - 0.1 * out.plan.sum((1, 2))
    torch.testing.assert_close(value, dual, rtol=1e-5, atol=1e-5)
    _, (to_cost,) = gradients(
        lambda c: sf.sinkhorn_cost(c, 0.1, a=a, b=b, max_iter=200, impl=impl).sum(), cost
    )
    torch.testing.assert_close(to_cost, out.plan, rtol=1e-5, atol=1e-7)


# --- SwAV ---------------------------------------------------------------------------------------------------


def plain_swav(scores, epsilon, n_iter):
    """As SwAV's public code has it, in float64 and shifted so that it does not overflow at once."""
    q = ((scores.double() - scores.double().max()) / epsilon).exp().T
    prototypes, samples = q.shape
    q = q / q.sum()
    for _ in range(n_iter):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / samples
    return (q * samples).T


@impls
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (3, 7), (64, 125), (130, 33), (1, 5), (5, 1)], ids=str)
def test_swav_assign(device, impl, dtype, shape):
    skip_float64_on_gpu_impls(device, impl, dtype)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for n_iter in (1, 3):
        got = sf.swav_assign(scores, 0.05, n_iter, impl=impl)
        eager = sf.swav_assign(scores, 0.05, n_iter, impl="reference")
        assert got.dtype == dtype
        assert_within_budget(got, eager, plain_swav(scores, 0.05, n_iter), "assignment")


@impls
@pytest.mark.parametrize("scale", [5.0, 1e3, 1e6])
def test_swav_assign_where_the_plain_form_is_nan(device, impl, scale):
    scores = (torch.randn(40, 12, generator=torch.Generator().manual_seed(0)) * scale).to(device)
    plain = (scores / 0.05).exp()
    assert torch.isinf(plain).any()  # and inf / inf is NaN
    got = sf.swav_assign(scores, impl=impl)
    exact = sf.swav_assign(scores.double(), impl="reference")
    assert_within_budget(got, sf.swav_assign(scores, impl="reference"), exact, "assignment")
    torch.testing.assert_close(got.sum(1), torch.ones(40, device=device))


@impls
def test_swav_assign_of_nothing_and_without_gradient(device, impl):
    assert sf.swav_assign(torch.zeros(0, 4, device=device), impl=impl).shape == (0, 4)
    scores = torch.rand(4, 3, device=device, requires_grad=True)
    assert not sf.swav_assign(scores, impl=impl).requires_grad
    even = sf.swav_assign(torch.zeros(6, 3, device=device), impl=impl)
    torch.testing.assert_close(even, torch.full((6, 3), 1 / 3, device=device))


# --- point clouds -------------------------------------------------------------------------------------------


def clouds(count, n, m, d, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(n + m + d)
    x, y = (torch.randn(count, size, d, generator=generator, dtype=torch.float64) for size in (n, m))
    return (x * 0.7).to(device, dtype), (y * 0.7 + 0.2).to(device, dtype)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(2, 5, 7, 3), (1, 1, 1, 1), (1, 40, 33, 2), (1, 70, 130, 17), (0, 3, 4, 2), (2, 6, 5, 0)],
    ids=str,
)
def test_points_match_reference(device, impl, dtype, shape):
    skip_float64_on_gpu_impls(device, impl, dtype)
    x, y = clouds(*shape, dtype=dtype, device=device)
    _, a, b = problem(shape[0], shape[1], shape[2], dtype=dtype, device=device)
    if len(a) and shape[1] > 3 and shape[2] > 3:
        a[0, 1], b[0, 2] = 0, 0

    def run(impl):
        def value(x, y, a, b):
            out = sf.sinkhorn_points(x, y, 0.8, a=a, b=b, max_iter=10, impl=impl)
            return (out.value.double() * weights(out.value)).sum()

        return value

    got, eager = (gradients(run(i), x, y, a, b) for i in (impl, "reference"))
    exact = gradients(run("reference"), *(t.double() for t in (x, y, a, b)))
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert_within_budget(got[0].to(kept), eager[0].to(kept), exact[0], "value")
    for name, *three in zip("xyab", got[1], eager[1], exact[1], strict=True):
        assert_within_budget(*three, f"gradient to {name}")
    outs = [
        sf.sinkhorn_points(*args, 0.8, a=ma, b=mb, max_iter=10, impl=i)
        for args, ma, mb, i in (
            ((x, y), a, b, impl),
            ((x, y), a, b, "reference"),
            ((x.double(), y.double()), a.double(), b.double(), "reference"),
        )
    ]
    assert_potentials_match(outs[0].f, outs[1].f, outs[2].f, "f")
    assert_potentials_match(outs[0].g, outs[1].g, outs[2].g, "g")


@impls
def test_points_equal_the_cost_matrix(device, impl):
    x, y = clouds(2, 20, 31, 3, device=device)
    cost = ((x[:, :, None] - y[:, None]) ** 2).sum(-1)
    for epsilon in (1.0, 0.01):
        out = sf.sinkhorn_points(x, y, epsilon, max_iter=50, tol=1e-4, impl=impl)
        matrix = sf.sinkhorn(cost, epsilon, max_iter=50, tol=1e-4, impl=impl)
        assert out.iterations.tolist() == matrix.iterations.tolist()
        torch.testing.assert_close(out.f, matrix.f, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.g, matrix.g, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.error, matrix.error, rtol=1e-3, atol=1e-5)
        value = sf.sinkhorn_cost(cost, epsilon, max_iter=50, tol=1e-4, impl=impl)
        torch.testing.assert_close(out.value, value, rtol=1e-5, atol=1e-5)


@impls
def test_points_far_from_the_origin(device, impl):
    """What counts is the difference: an offset of 100 costs no more than its own rounding."""
    x, y = clouds(1, 24, 30, 3, device=device)
    near = sf.sinkhorn_points(x, y, 0.5, max_iter=30, impl=impl)
    far = sf.sinkhorn_points(x + 100, y + 100, 0.5, max_iter=30, impl=impl)
    torch.testing.assert_close(far.value, near.value, rtol=1e-3, atol=1e-4)


# --- the contract -------------------------------------------------------------------------------------------


@kernels
def test_bits_repeat(device, impl):
    inputs = spoil(*problem(3, 20, 70, device=device))
    x, y = clouds(2, 30, 25, 4, device=device)

    def everything():
        out = sf.sinkhorn(inputs[0], 0.03, a=inputs[1], b=inputs[2], max_iter=20, impl=impl)
        _, implicit = gradients(
            lambda c, a, b: weighted(sf.sinkhorn(c, 0.1, a=a, b=b, max_iter=20, impl=impl)), *inputs
        )
        _, unrolled = gradients(
            lambda c, a, b: weighted(sf.sinkhorn(c, 0.1, a=a, b=b, max_iter=3, grad="unrolled", impl=impl)),
            *inputs,
        )
        _, points = gradients(
            lambda x, y: sf.sinkhorn_points(x, y, 0.5, max_iter=5, impl=impl).value.sum(), x, y
        )
        return [*out, *implicit, *unrolled, *points, sf.swav_assign(inputs[0][1], impl=impl)]

    for first, second in zip(everything(), everything(), strict=True):
        assert_same_bits(first, second)


@pytest.mark.skipif("native" not in available_impls("cpu"), reason="the CPU library was not built")
def test_bits_repeat_with_threads_that_share_a_problem():
    cost, a, b = problem(2, 125, 600)

    def everything():
        out = sf.sinkhorn(cost, 0.02, a=a, b=b, max_iter=40, impl="native")
        wide, tall = (
            torch.ops.sketchfast.sinkhorn_schur_native(*adjoint_system(1, *shape, 0.3, 1))
            for shape in ((125, 600), (600, 125))
        )
        return [out.plan, out.g, *wide, *tall]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        runs = [everything() for _ in range(3)]
        torch.set_num_threads(1)
        alone = everything()
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for first, again in zip(runs[0], run, strict=True):
            assert_same_bits(first, again)
    torch.testing.assert_close(alone[0], runs[0][0], rtol=1e-4, atol=1e-8)
    for mine, shared in zip(alone[2:], runs[0][2:], strict=True):
        torch.testing.assert_close(mine, shared, rtol=1e-10, atol=1e-12)


@impls
def test_a_problem_does_not_depend_on_its_batch(device, impl):
    cost, a, b = problem(6, 11, 40, device=device)
    together = sf.sinkhorn(cost, 0.05, a=a, b=b, max_iter=15, impl=impl)
    for n in (0, 3, 5):
        alone = sf.sinkhorn(cost[n], 0.05, a=a[n], b=b[n], max_iter=15, impl=impl)
        torch.testing.assert_close(together.plan[n], alone.plan, rtol=1e-5, atol=1e-8)


@impls
def test_autocast_changes_nothing(device, impl):
    cost, a, b = problem(1, 6, 7, device=device)
    plain = sf.sinkhorn(cost, 0.1, a=a, b=b, impl=impl)
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = sf.sinkhorn(cost, 0.1, a=a, b=b, impl=impl)
    assert_same_bits(plain.plan, cast.plan)


@impls
def test_non_contiguous_arguments(device, impl):
    cost, a, b = problem(2, 6, 9, device=device)
    strided = cost.mT.contiguous().mT
    plain, other = (sf.sinkhorn(c, 0.1, a=a, b=b, impl=impl) for c in (cost, strided))
    assert_same_bits(plain.plan, other.plan)
    expanded = cost[:1].expand(3, -1, -1)
    assert_same_bits(sf.sinkhorn(expanded, 0.1, impl=impl).plan[2], sf.sinkhorn(cost[0], 0.1, impl=impl).plan)


@impls
def test_nan_in_the_cost_shows(device, impl):
    cost, _, _ = problem(2, 4, 5, device=device, marginals=False)
    cost[0, 1, 2] = math.nan
    out = sf.sinkhorn(cost, 0.1, max_iter=3, impl=impl)
    assert torch.isnan(out.plan[0]).any()
    assert torch.isfinite(out.plan[1]).all()


@kernels
def test_opcheck(device, impl):
    cost, a, b = problem(2, 4, 5, device=device)
    epsilon = torch.full((2,), 0.2, dtype=torch.float64, device=device)
    ops = torch.ops.sketchfast
    for x, p, q in ((cost.clone().requires_grad_(), a, b), (cost, None, None)):
        for grad in ("implicit", "unrolled"):
            opcheck(getattr(ops, f"sinkhorn_fwd_{impl}"), (x, epsilon, p, q, None, 3, -1.0, grad))
        opcheck(getattr(ops, f"sinkhorn_value_fwd_{impl}"), (x, epsilon, p, q, 3, -1.0))
    opcheck(getattr(ops, f"swav_assign_{impl}"), (cost[0].contiguous(), 0.05, 3))
    x, y = clouds(2, 4, 5, 3, device=device)
    opcheck(getattr(ops, f"sinkhorn_points_fwd_{impl}"), (x.requires_grad_(), y, epsilon, a, b, 3, -1.0))
    out = getattr(ops, f"sinkhorn_fwd_{impl}")(cost, epsilon, a, b, None, 3, -1.0, "none")
    plan, _, _, iterations, _, phi, gamma = out
    opcheck(getattr(ops, f"sinkhorn_adjoint_{impl}"), (plan, None, None, cost, epsilon, phi, gamma))
    opcheck(
        getattr(ops, f"sinkhorn_cost_gradient_{impl}"),
        (plan, plan.double(), epsilon, phi, gamma, torch.float32),
    )
    opcheck(
        getattr(ops, f"sinkhorn_unrolled_bwd_{impl}"),
        (plan, None, None, cost, epsilon, a, b, None, iterations, 3),
    )
    grad = torch.ones(2, device=device)
    opcheck(getattr(ops, f"sinkhorn_value_bwd_{impl}"), (grad, cost, epsilon, phi, gamma))
    opcheck(getattr(ops, f"sinkhorn_points_bwd_{impl}"), (grad, x.detach(), y, epsilon, phi, gamma))
    opcheck(ops.sinkhorn_schur, (plan.double(), phi, gamma, gamma, epsilon))
    if (device, impl) == ("cpu", "native"):
        opcheck(ops.sinkhorn_schur_native, (plan.double(), phi, gamma, gamma, epsilon))


@impls
def test_compiles_without_a_graph_break(device, impl):
    cost, a, b = problem(2, 4, 5, device=device)
    x, y = clouds(2, 4, 5, 3, device=device)

    def loss(cost, a, b, x, y):
        out = sf.sinkhorn(cost, 0.2, a=a, b=b, max_iter=20, impl=impl)
        few = sf.sinkhorn(cost, 0.2, a=a, b=b, max_iter=3, grad="unrolled", impl=impl)
        value = sf.sinkhorn_cost(cost, 0.2, a=a, b=b, max_iter=5, impl=impl).sum()
        points = sf.sinkhorn_points(x, y, 0.5, a=a, b=b, max_iter=5, impl=impl).value.sum()
        swav = sf.swav_assign(cost[0], impl=impl).square().sum()
        return weighted(out) + weighted(few) + value + points + swav

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain = gradients(loss, cost, a, b, x, y)
    traced = gradients(compiled, cost, a, b, x, y)
    torch.testing.assert_close(traced[0], plain[0], rtol=1e-5, atol=1e-6)
    for got, want in zip(traced[1], plain[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@kernels
def test_compiles_with_numbers_that_vary(device, impl):
    """torch.compile makes a number that changes between calls symbolic; so do dynamic shapes."""
    cost = problem(2, 4, 5, device=device)[0]

    def plan(cost, epsilon, tol):
        swav = sf.swav_assign(cost[0], epsilon, n_iter=1, impl=impl)
        return sf.sinkhorn(cost, epsilon, max_iter=2, tol=tol, impl=impl).plan, swav

    torch.compiler.reset()
    compiled = torch.compile(plan, fullgraph=True, backend="aot_eager", dynamic=True)
    for epsilon, tol in ((0.1, 1e-2), (0.2, 1e-3), (0.3, 1e-1)):
        for got, want in zip(compiled(cost, epsilon, tol), plan(cost, epsilon, tol), strict=True):
            torch.testing.assert_close(got, want)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="epsilon must be"):
            torch.compile(plan, backend="aot_eager", dynamic=True)(cost, bad, 0.1)


@pytest.mark.skipif("native" not in available_impls("cpu"), reason="the CPU library was not built")
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    columns=st.integers(1, 90),
    log_epsilon=st.floats(-4, 1),
    iterations=st.integers(1, 8),
    empty=st.floats(0, 0.6),
    forbidden=st.floats(0, 0.6),
    offset=st.sampled_from([-3.0, 0.0, 1.0, 100.0]),
)
def test_native_is_the_reference_anywhere(
    seed, rows, columns, log_epsilon, iterations, empty, forbidden, offset
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    cost = torch.where(draw(2, rows, columns) < forbidden, INFINITY, draw(2, rows, columns) + offset)
    a, b = (torch.where(draw(2, n) < empty, 0.0, draw(2, n) + 0.01) for n in (rows, columns))
    options = {"a": a, "b": b, "max_iter": iterations}
    got = sf.sinkhorn(cost, 10**log_epsilon, impl="native", **options)
    exact = sf.sinkhorn(cost, 10**log_epsilon, impl="reference", **options)
    # A potential of size f is known to eps * f, the plan to that over epsilon.
    scale = max(1.0, float(finite(exact.f).abs().max()) / 10**log_epsilon)
    assert not torch.isnan(got.plan).any()
    torch.testing.assert_close(got.plan, exact.plan, rtol=1e-12 * scale, atol=1e-13)
    for mine, theirs in ((got.f, exact.f), (got.g, exact.g)):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12 * (1 + abs(offset)))
    assert torch.equal(torch.isinf(got.error), torch.isinf(exact.error))


# --- bad input ----------------------------------------------------------------------------------------------

COST = torch.rand(2, 3, 4)
BAD_CALLS = [
    ({"cost": [1.0]}, TypeError, r"cost must be a tensor, got \[1.0\] of type list"),
    (
        {"cost": torch.ones(2, 3, dtype=torch.int64)},
        TypeError,
        "cost must be a tensor of dtype float16.*int64",
    ),
    ({"cost": torch.ones(3)}, ValueError, r"cost must have shape \[..., K, E\], got a float32 tensor of"),
    ({"cost": torch.ones(2, 0, 4)}, ValueError, "cost must have at least one row and one column"),
    ({"epsilon": 0.0}, ValueError, "epsilon must be greater than 0, got 0.0"),
    ({"epsilon": -1}, ValueError, "epsilon must be greater than 0, got -1"),
    ({"epsilon": math.nan}, ValueError, "epsilon must be finite, got nan"),
    ({"epsilon": "a"}, TypeError, "epsilon must be a number, got 'a' of type str"),
    (
        {"epsilon": torch.ones(3)},
        ValueError,
        r"epsilon must have shape \[2\], got a float32 tensor of shape \(3,\)",
    ),
    ({"a": torch.ones(2, 4)}, ValueError, r"a must have shape \[2, 3\], got .*\(2, 4\)"),
    ({"a": torch.ones(3)}, ValueError, r"a must have shape \[2, 3\], got .*\(3,\)"),
    ({"b": torch.ones(2, 4, dtype=torch.int32)}, TypeError, "b must be a tensor of dtype .*int32"),
    ({"b": torch.ones(2, 4, device="meta")}, ValueError, "b must be on cpu"),
    ({"init": torch.ones(2, 3)}, ValueError, r"init must have shape \[2, 4\]"),
    ({"max_iter": 0}, ValueError, "max_iter must be at least 1, got 0"),
    ({"max_iter": 1.5}, TypeError, "max_iter must be an integer, got 1.5 of type float"),
    ({"tol": -1e-3}, ValueError, "tol must be at least 0, got -0.001"),
    ({"tol": "x"}, TypeError, "tol must be a number"),
    ({"grad": "exact"}, ValueError, "grad must be one of 'implicit', 'unrolled', 'none', got 'exact'"),
    ({"impl": "fast"}, ValueError, "impl must be one of .* got 'fast'"),
]
BAD_VALUES = [
    (
        {"cost": torch.full((2, 3, 4), math.nan)},
        r"cost must be finite or \+inf, got nan at index \(0, 0, 0\)",
    ),
    ({"cost": torch.full((2, 3, 4), -INFINITY)}, r"cost must be finite or \+inf, got -inf"),
    ({"a": torch.tensor([[-0.5, 1.0, 0.5]] * 2)}, "a must be at least 0, got -0.5"),
    ({"b": torch.full((2, 4), math.nan)}, "b must be finite, got nan at index"),
    ({"epsilon": torch.tensor([1.0, -2.0])}, "epsilon must be finite and greater than 0, got -2"),
    ({"a": torch.ones(2, 3)}, "a and b must hold the same mass in every problem, they differ by 2"),
    (
        {"a": torch.full((2, 3), 1e-5), "b": torch.full((2, 4), 1e-5)},
        "a and b must hold the same mass in every problem, they differ by 1e-05",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_CALLS, ids=lambda x: str(x)[:60])
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=message):
        sf.sinkhorn(**{"cost": COST, "epsilon": 0.1} | changed)


@pytest.mark.parametrize(("changed", "message"), BAD_VALUES, ids=lambda x: str(x)[:60])
def test_bad_values_are_found_on_request(changed, message):
    arguments = {"cost": COST, "epsilon": 0.1} | changed
    with pytest.raises(ValueError, match=message):
        sf.sinkhorn(**arguments, check_values=True)
    with pytest.raises(ValueError, match=message):
        sf.sinkhorn_cost(**arguments, check_values=True)


@impls
def test_good_values_pass_the_check(device, impl):
    cost, a, b = spoil(*problem(2, 5, 6, device=device))
    out = sf.sinkhorn(cost, 0.1, a=a, b=b, check_values=True, impl=impl)
    assert_same_bits(out.plan, sf.sinkhorn(cost, 0.1, a=a, b=b, impl=impl).plan)


def test_masses_that_only_rounding_tells_apart_pass_the_check():
    cost = torch.rand(2, 300, 4)
    sf.sinkhorn(cost, 0.1, a=torch.full((2, 300), 1 / 300, dtype=torch.bfloat16), check_values=True)
    large = 1e6 + 0.1  # as float32
    sf.sinkhorn(COST, 0.1, a=torch.full((2, 3), large / 3), b=torch.full((2, 4), 1e6 / 4), check_values=True)
    sf.sinkhorn(COST, 0.1, a=torch.zeros(2, 3), b=torch.zeros(2, 4), check_values=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sf.swav_assign(torch.ones(3)), ValueError, r"scores must have shape \[B, K\]"),
        (lambda: sf.swav_assign(torch.ones(3, 0)), ValueError, "scores must have at least one column"),
        (lambda: sf.swav_assign(torch.ones(3, 2, dtype=torch.int8)), TypeError, "scores must be .* int8"),
        (lambda: sf.swav_assign(torch.ones(3, 2), 0), ValueError, "epsilon must be greater than 0"),
        (lambda: sf.swav_assign(torch.ones(3, 2), n_iter=0), ValueError, "n_iter must be at least 1"),
        (
            lambda: sf.swav_assign(torch.full((3, 2), INFINITY), check_values=True),
            ValueError,
            "scores must be finite, got inf",
        ),
        (
            lambda: sf.sinkhorn_points(torch.ones(3), torch.ones(3), 1.0),
            ValueError,
            r"x must have shape \[..., n",
        ),
        (
            lambda: sf.sinkhorn_points(torch.ones(3, 2), torch.ones(3, 4), 1.0),
            ValueError,
            r"y must have shape \[m, 2\]",
        ),
        (
            lambda: sf.sinkhorn_points(torch.ones(3, 2), torch.ones(3, 2).double(), 1.0),
            TypeError,
            "y must be of the dtype of x",
        ),
        (
            lambda: sf.sinkhorn_points(torch.ones(0, 2), torch.ones(3, 2), 1.0),
            ValueError,
            "x and y must hold at least one point",
        ),
        (
            lambda: sf.sinkhorn_points(
                torch.ones(3, 2), torch.full((3, 2), INFINITY), 1.0, check_values=True
            ),
            ValueError,
            "y must be finite",
        ),
    ],
)
def test_bad_calls_of_the_others(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_schur_complement_on_either_side_is_the_same():
    """The wide and the tall system of one plan give one gradient."""
    cost, a, b = problem(2, 5, 9, dtype=torch.float64)
    out = reference.solve(cost, torch.full((2,), 0.2, dtype=torch.float64), a, b, None, 500, None)[1]
    epsilon = torch.full((2,), 0.2, dtype=torch.float64)
    upstream = weights(cost)
    wide = ops_sinkhorn._implicit_backward(
        "reference", upstream, None, None, cost, epsilon, out.phi, out.gamma
    )
    tall = ops_sinkhorn._implicit_backward(
        "reference", upstream.mT, None, None, cost.mT, epsilon, out.gamma, out.phi
    )
    torch.testing.assert_close(wide[0], tall[0].mT, rtol=1e-8, atol=1e-10)
