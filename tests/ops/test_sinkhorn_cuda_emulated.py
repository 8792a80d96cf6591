"""The CUDA kernels of Sinkhorn, run by the CPU emulator in tests/cuda_emulator, against float64.

What it proves and what it cannot is as in test_raster_cuda_emulated.py; beyond it, clusters of CTAs are run
with their barriers and with writes to each other's shared memory, not their memory model.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace

import pytest
import torch
from emulated import DTYPES, H200_SHARED, SCHEDULES, Guarded, build
from torch import Tensor

from sketchfast.kernels.reference import sinkhorn as reference

INPUTS = ("cost", "epsilon", "a", "b", "init")
OUTPUTS = ("plan", "f", "g", "error", "value", "iterations", "phi", "gamma")
#: In the order of the structure Call in sinkhorn_emulated.cpp.
POINTERS = (
    *INPUTS,
    *("x", "y", "grad_plan", "grad_f", "grad_g", "grad", "lam", "mu"),
    *OUTPUTS,
    *("wide_plan", "row_rhs", "column_rhs", "grad_cost", "grad_a", "grad_b", "grad_x", "grad_y"),
)
INTEGERS = (
    "count",
    "rows",
    "columns",
    "max_iter",
    "cost_dtype",
    "plan_dtype",
    "shared_limit",
    "resident",
    "most_warps",
    "most_cluster",
    "dimensions",
)


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in INTEGERS),
        ("tol", ctypes.c_double),
    ]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = build("sinkhorn_emulated.cpp", tmp_path_factory.mktemp("emulator"))
    for name in ("solve", "adjoint", "cost_gradient", "unrolled", "value_backward", "swav", "points"):
        getattr(loaded, f"sinkhorn_{name}").restype = ctypes.c_char_p
    loaded.sinkhorn_points_backward.restype = ctypes.c_char_p
    return loaded


@dataclass
class Problem:
    """Transport problems and what the reference makes of them."""

    cost: Tensor
    epsilon: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    init: Tensor | None = None
    max_iter: int = 10
    tol: float | None = None

    def solve(self, dtype: torch.dtype) -> tuple[Tensor, reference.Solution]:
        def to(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype)

        return reference.solve(
            self.cost.to(dtype),
            self.epsilon.to(dtype),
            to(self.a),
            to(self.b),
            to(self.init),
            self.max_iter,
            self.tol,
        )


@dataclass
class Emulated:
    """The kernels behind a Python call; which regime they take is a choice."""

    library: ctypes.CDLL
    resident: bool = True
    most_warps: int = 16
    most_cluster: int = 16
    shared_limit: int = H200_SHARED
    schedule: str = "forward"
    launches: int = field(default=0, init=False)

    def _call(
        self,
        name: str,
        memory: Guarded,
        tensors: dict[str, Tensor | None],
        *more: ctypes.c_double,
        **extra: float,
    ) -> None:
        call = _Call(
            shared_limit=self.shared_limit,
            resident=self.resident,
            most_warps=self.most_warps,
            most_cluster=self.most_cluster,
            **extra,
        )
        for key, tensor in tensors.items():
            setattr(call, key, None if tensor is None else tensor.data_ptr())
        self.library.set_schedule(SCHEDULES[self.schedule], 12345)
        error = getattr(self.library, name)(ctypes.byref(call), *more)
        assert error is None, error.decode()
        self.launches = self.library.launches()
        memory.check()

    def run(
        self,
        name: str,
        problem: Problem,
        out: dict[str, tuple[tuple[int, ...], torch.dtype]],
        **given: Tensor | None,
    ) -> dict[str, Tensor]:
        """The outputs, of these shapes and types, of a function on the problem and the tensors given."""
        memory = Guarded()
        count, rows, columns = problem.cost.shape
        made = {key: memory.empty(*shape) for key, shape in out.items()}
        given = {key: getattr(problem, key) for key in INPUTS} | given
        kept = {key: None if x is None else memory.copy(x) for key, x in given.items()}
        self._call(
            name,
            memory,
            kept | made,
            count=count,
            rows=rows,
            columns=columns,
            max_iter=problem.max_iter,
            cost_dtype=DTYPES[problem.cost.dtype],
            plan_dtype=DTYPES[reference.plan_dtype(problem.cost.dtype)],
            dimensions=given["x"].shape[2] if "x" in given else 0,
            tol=-1.0 if problem.tol is None else problem.tol,
        )
        return made

    def swav(self, scores: Tensor, epsilon: float, iterations: int) -> Tensor:
        memory = Guarded()
        out, scores = memory.empty(tuple(scores.shape), scores.dtype), memory.copy(scores)
        self._call(
            "sinkhorn_swav",
            memory,
            {"cost": scores, "plan": out},
            ctypes.c_double(epsilon),
            count=1,
            rows=scores.shape[0],
            columns=scores.shape[1],
            max_iter=iterations,
            cost_dtype=DTYPES[scores.dtype],
            plan_dtype=DTYPES[scores.dtype],
        )
        return out

    def solve(self, problem: Problem) -> dict[str, Tensor]:
        count, rows, columns = problem.cost.shape
        plan_dtype = reference.plan_dtype(problem.cost.dtype)
        shapes = {
            "plan": ((count, rows, columns), plan_dtype),
            "f": ((count, rows), torch.float32),
            "g": ((count, columns), torch.float32),
            "error": ((count,), torch.float32),
            "value": ((count,), torch.float32),
            "iterations": ((count,), torch.int32),
            "phi": ((count, rows), torch.float64),
            "gamma": ((count, columns), torch.float64),
        }
        return self.run("sinkhorn_solve", problem, shapes)


# --- cases and comparison ----------------------------------------------------------------------------------


def random_problem(
    count: int, rows: int, columns: int, seed: int = 0, *, ratio: float = 20.0, marginals: bool = True, **more
) -> Problem:
    """Costs in [0, 1), epsilon so that cost / epsilon reaches `ratio`, uneven marginals with some zeros."""
    random = torch.Generator().manual_seed(seed)
    cost = torch.rand(count, rows, columns, generator=random)
    epsilon = torch.full((count,), 1 / ratio, dtype=torch.float64)
    a = b = None
    if marginals:
        a, b = (torch.rand(count, size, generator=random) + 0.1 for size in (rows, columns))
        if rows > 2:
            a[:, 1] = 0
        if columns > 2:
            b[:, 2] = 0
        a, b = (x / x.sum(1, keepdim=True) for x in (a, b))
    return Problem(cost, epsilon, a, b, **more)


def within_budget(
    ours: Tensor,
    eager: Tensor,
    exact: Tensor,
    what: str,
    dtype: torch.dtype = torch.float32,
    floor: float = 1e-13,
) -> None:
    """The same infinities; elsewhere max|err| <= 2 max|err of eager at that dtype| + 4 eps max|exact|."""
    finite = exact.isfinite()
    assert not ours.isnan().any(), f"{what}: NaN at {ours.isnan().nonzero()[0].tolist()}"
    assert torch.equal(ours.double()[~finite], exact[~finite]), f"{what}: infinities"
    if not finite.any():
        return
    exact = exact[finite]
    error = (ours.double()[finite] - exact).abs().max().item()
    eager_error = (eager.to(dtype).double()[finite] - exact).abs().max().item()
    budget = 2 * eager_error + 4 * torch.finfo(dtype).eps * exact.abs().max().item() + floor
    assert error <= budget, f"{what}: error {error:.3g} over the budget {budget:.3g}"


def check_solution(emulated: Emulated, problem: Problem) -> dict[str, Tensor]:
    out = emulated.solve(problem)
    plan, solution = problem.solve(torch.float64)
    eager_plan, eager = problem.solve(torch.float32)
    assert torch.equal(out["iterations"], solution.iterations), (out["iterations"], solution.iterations)
    within_budget(out["plan"], eager_plan, plan, "plan", out["plan"].dtype)
    for name in ("f", "g"):
        within_budget(out[name], getattr(eager, name), getattr(solution, name), name)
    # Scaled potentials may be in any gauge: f - epsilon phi and epsilon gamma - g are one number a problem.
    width = problem.epsilon[:, None]
    shifts = torch.cat([solution.f - width * out["phi"], width * out["gamma"] - solution.g], 1)
    assert torch.equal(out["phi"] == -torch.inf, solution.phi == -torch.inf)
    assert torch.equal(out["gamma"] == -torch.inf, solution.gamma == -torch.inf)
    spread = torch.where(shifts.isfinite(), shifts, torch.nan)
    middle = spread.nanmean(1, keepdim=True)
    off = (spread - middle).nan_to_num(0.0).abs().max() if shifts.numel() else 0.0
    scale = torch.where(solution.f.isfinite(), solution.f, 0.0).abs().max()
    assert off <= 1e-6 * max(1.0, float(scale)), off
    value = reference.transport_value(solution, problem.a, problem.b, problem.epsilon)
    eager_value = reference.transport_value(eager, problem.a, problem.b, problem.epsilon)
    within_budget(out["value"], eager_value, value, "value")
    finite = solution.error.isfinite()
    assert torch.equal(out["error"].isfinite(), finite)
    gap = (out["error"].double() - solution.error)[finite].abs()
    assert (gap <= 1e-6 + 1e-4 * solution.error[finite]).all(), (out["error"], solution.error)
    return out


SHAPES = [(1, 1), (1, 7), (7, 1), (5, 7), (17, 16), (33, 65), (64, 64)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_resident(library, shape, schedule):
    check_solution(Emulated(library, schedule=schedule), random_problem(2, *shape))


#: Every regime: a CTA; clusters of as many as the cost needs; the cost streamed.
REGIMES = {
    "resident": {},
    "cluster": {"most_warps": 1},
    "streamed": {"resident": False},
}


@pytest.fixture(params=REGIMES)
def emulated(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Emulated:
    return Emulated(library, **REGIMES[request.param])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_clusters(library, schedule):
    for shape, warps, launched in (((12, 50), 1, 1), ((40, 70), 2, 1), ((130, 40), 1, 1)):
        emulated = Emulated(library, most_warps=warps, schedule=schedule)
        check_solution(emulated, random_problem(2, *shape, max_iter=6))
        assert emulated.launches == launched


def test_the_rule_of_regimes(library):
    """One launch where registers hold the problem, streaming where rows, CTAs or shared memory run out."""
    rows_out = random_problem(1, 321, 5, max_iter=2)
    columns_out = random_problem(1, 12, 70, max_iter=2)
    for emulated, problem, resident in (
        (Emulated(library), columns_out, True),
        (Emulated(library, most_warps=1, most_cluster=4), columns_out, True),
        (Emulated(library, most_warps=1, most_cluster=1), columns_out, False),  # a device without clusters
        (Emulated(library, shared_limit=4096), columns_out, False),
        (Emulated(library), rows_out, False),
    ):
        check_solution(emulated, problem)
        assert (emulated.launches == 1) == resident


@pytest.mark.parametrize("shape", [(130, 515), (300, 40), (125, 300)], ids=str)
def test_tall_and_wide(library, shape):
    check_solution(Emulated(library), random_problem(1, *shape, max_iter=4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(emulated, dtype):
    problem = random_problem(2, 9, 40)
    problem.cost = problem.cost.to(dtype)
    check_solution(emulated, problem)


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("marginals", [False, True])
def test_small_epsilon(emulated, ratio, marginals):
    problem = random_problem(2, 21, 33, ratio=ratio, marginals=marginals, max_iter=40)
    problem.cost[1] += 1
    out = check_solution(emulated, problem)
    assert (out["plan"].sum((1, 2)) > 0.999).all()


def test_forbidden_pairs(emulated):
    problem = random_problem(3, 20, 36, max_iter=15)
    random = torch.Generator().manual_seed(3)
    problem.cost[torch.rand(problem.cost.shape, generator=random) < 0.3] = torch.inf
    problem.cost[1, 1] = torch.inf  # no mass there
    problem.cost[2, 4] = torch.inf  # mass, so infeasible
    problem.cost[1, :, 2] = torch.inf
    out = check_solution(emulated, problem)
    assert out["error"].isinf().tolist() == [False, False, True]
    problem.cost[0, :, 7] = torch.inf
    out = check_solution(emulated, problem)
    assert out["error"].isinf().tolist() == [True, False, True]


def test_tolerance(emulated):
    problem = random_problem(4, 12, 40, max_iter=30, tol=1e-3)
    problem.epsilon = torch.tensor([1.0, 0.1, 0.03, 0.004], dtype=torch.float64)
    out = check_solution(emulated, problem)
    assert len(out["iterations"].unique()) >= 3
    problem.cost[1, 0] = torch.inf  # infeasible: never converges
    out = check_solution(emulated, problem)
    assert out["iterations"][1] == 30


def test_warm_start(emulated):
    problem = random_problem(2, 12, 40, max_iter=3)
    problem.init = torch.randn(2, 40, generator=torch.Generator().manual_seed(1))
    problem.init[0, 3], problem.init[1, 0] = torch.inf, torch.nan
    check_solution(emulated, problem)


def test_masses_out_of_all_proportion(emulated):
    problem = random_problem(2, 12, 40, max_iter=6)
    problem.a[:, 3] *= 1e-25
    problem.b[:, 5] *= 1e-30
    problem.b[:, 6] *= 1e-12
    check_solution(emulated, problem)


@pytest.mark.parametrize("shape", [(0, 5, 7)], ids=str)
def test_empty_batch(emulated, shape):
    emulated.solve(random_problem(*shape))
    assert emulated.launches == 0


def test_bits_do_not_depend_on_the_schedule(library):
    for choice in REGIMES.values():
        outs = [
            Emulated(library, schedule=s, **choice).solve(random_problem(2, 20, 50, ratio=300, tol=1e-6))
            for s in SCHEDULES
        ]
        for other in outs[1:]:
            assert all(torch.equal(outs[0][name], other[name]) for name in OUTPUTS)


# --- gradients ---------------------------------------------------------------------------------------------


def gradients(problem: Problem, which: tuple[str, ...]) -> dict[str, Tensor | None]:
    """Random gradients to what `which` names of plan, f and g, 0 where f and g are infinite."""
    random = torch.Generator().manual_seed(7)
    count, rows, columns = problem.cost.shape
    shapes = {"plan": (count, rows, columns), "f": (count, rows), "g": (count, columns)}
    dtypes = {"plan": reference.plan_dtype(problem.cost.dtype), "f": torch.float32, "g": torch.float32}
    return {
        f"grad_{name}": torch.randn(shapes[name], generator=random).to(dtypes[name])
        if name in which
        else None
        for name in shapes
    }


GIVEN = [("plan",), ("f", "g"), ("plan", "f", "g")]


def hard_problem(shape: tuple[int, int], **more) -> Problem:
    """Zero masses, forbidden pairs and an infeasible row, where the shape has room for them."""
    problem = random_problem(3, *shape, ratio=15, **more)
    if shape[0] > 3 and shape[1] > 3:
        problem.cost[0, 2, 1] = torch.inf
        problem.cost[1, 1] = torch.inf
        problem.cost[2, 3] = torch.inf
        problem.cost[2, :, 0] = torch.inf
    return problem


@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (7, 1100), (300, 33)], ids=str)
def test_adjoint_and_cost_gradient(library, shape, given):
    emulated, problem = Emulated(library), hard_problem(shape, max_iter=20)
    _, solution = problem.solve(torch.float64)
    grads = gradients(problem, given)
    size = tuple(problem.cost.shape)
    out = emulated.run(
        "sinkhorn_adjoint",
        problem,
        {
            "wide_plan": (size, torch.float64),
            "row_rhs": (size[:2], torch.float64),
            "column_rhs": (size[::2], torch.float64),
        },
        phi=solution.phi,
        gamma=solution.gamma,
        **grads,
    )
    plan = reference.plan_from_potentials(problem.cost, problem.epsilon, solution.phi, solution.gamma)
    right = reference.adjoint_sums(plan, problem.epsilon, *grads.values())
    torch.testing.assert_close(out["wide_plan"], plan, rtol=1e-9, atol=1e-14)
    for name, exact in zip(("row_rhs", "column_rhs"), right, strict=True):
        torch.testing.assert_close(out[name], exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max()))

    lam, mu = (torch.randn(x.shape, dtype=torch.float64) for x in right)
    for dtype in DTYPES:
        problem.cost = problem.cost.to(dtype)
        grad_plan = grads["grad_plan"]
        if grad_plan is not None:
            grad_plan = grad_plan.to(reference.plan_dtype(dtype))
        found = emulated.run(
            "sinkhorn_cost_gradient",
            problem,
            {"grad_cost": (size, dtype)},
            wide_plan=plan,
            lam=lam,
            mu=mu,
            grad_plan=grad_plan,
        )
        exact = reference.cost_gradient(plan, problem.epsilon, grad_plan, lam, mu)
        torch.testing.assert_close(found["grad_cost"], exact.to(dtype))


def unrolled_gradients(problem: Problem, grads: dict[str, Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """Autograd through the reference's iterations."""
    leaves = [x.to(dtype).requires_grad_() for x in (problem.cost, problem.a, problem.b)]
    copy = Problem(*leaves[:1], problem.epsilon, *leaves[1:], problem.init, problem.max_iter, problem.tol)
    plan, solution = copy.solve(dtype)
    outputs = {"grad_plan": plan, "grad_f": solution.f, "grad_g": solution.g}
    wanted = {name: grad for name, grad in grads.items() if grad is not None}
    total = sum(
        (torch.where(outputs[n].isfinite(), outputs[n], 0.0) * g.to(dtype)).sum() for n, g in wanted.items()
    )
    return list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 7), (40, 33)], ids=str)
@pytest.mark.parametrize("iterations", [1, 3])
def test_unrolled_gradient(library, shape, given, iterations):
    problem = hard_problem(shape, max_iter=iterations)
    problem.init = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(2)) * 0.1
    check_unrolled(Emulated(library), problem, given)


def check_unrolled(emulated: Emulated, problem: Problem, given: tuple[str, ...]) -> None:
    grads = gradients(problem, given)
    _, solution = problem.solve(torch.float64)
    size = tuple(problem.cost.shape)
    out = emulated.run(
        "sinkhorn_unrolled",
        problem,
        {
            "grad_cost": (size, problem.cost.dtype),
            "grad_a": (size[:2], torch.float32),
            "grad_b": (size[::2], torch.float32),
        },
        iterations=solution.iterations,
        **grads,
    )
    exact = unrolled_gradients(problem, grads, torch.float64)
    eager = unrolled_gradients(problem, grads, torch.float32)
    for name, ours, float32, float64 in zip(out, out.values(), eager, exact, strict=True):
        # Terms of size 1 cancel: to nothing, where one column leaves no choice.
        within_budget(ours, float32, float64, name, ours.dtype, floor=16 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_unrolled_gradient_of_what_was_run(library, schedule):
    problem = random_problem(4, 9, 12, max_iter=12, tol=3e-3)
    problem.epsilon = torch.tensor([1.0, 0.2, 0.1, 0.02], dtype=torch.float64)
    assert len(problem.solve(torch.float64)[1].iterations.unique()) >= 3
    check_unrolled(Emulated(library, schedule=schedule), problem, ("plan", "f", "g"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_backward(library, dtype):
    problem = hard_problem((6, 700))
    problem.cost = problem.cost.to(dtype)
    plan, solution = problem.solve(torch.float64)
    grad = torch.tensor([1.0, -2.5, 0.0])
    out = Emulated(library).run(
        "sinkhorn_value_backward",
        problem,
        {"grad_cost": (tuple(problem.cost.shape), dtype)},
        phi=solution.phi,
        gamma=solution.gamma,
        grad=grad,
    )
    exact = grad[:, None, None].double() * plan
    eager = (grad[:, None, None] * problem.solve(torch.float32)[0]).to(dtype)
    within_budget(out["grad_cost"], eager, exact, "gradient", dtype)


# --- SwAV --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (40, 12), (130, 70)], ids=str)
def test_swav(emulated, shape, dtype):
    scores = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    for epsilon, iterations in ((0.05, 3), (0.5, 1)):
        ours = emulated.swav(scores, epsilon, iterations)
        exact = reference.swav_assign(scores.double(), epsilon, iterations)
        within_budget(ours, reference.swav_assign(scores.float(), epsilon, iterations), exact, "swav", dtype)


def test_swav_of_minus_infinity(emulated):
    scores = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    scores[3], scores[:, 2], scores[5, 4] = -torch.inf, -torch.inf, -torch.inf
    ours = emulated.swav(scores, 0.1, 3)
    exact = reference.swav_assign(scores.double(), 0.1, 3)
    within_budget(ours, reference.swav_assign(scores, 0.1, 3), exact, "swav")
    assert emulated.swav(scores[:0], 0.1, 3).numel() == 0


# --- point clouds ------------------------------------------------------------------------------------------


def clouds(count: int, n: int, m: int, dimensions: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(4)
    x = torch.randn(count, n, dimensions, generator=random)
    y = torch.randn(count, m, dimensions, generator=random) * spread + 0.2
    return x + 3, y + 3  # not about the origin


POINTS = [
    *[(2, 1, 1, 3), (2, 5, 7, 2), (1, 130, 40, 9), (1, 40, 300, 64), (1, 129, 257, 33)],
    (2, 20, 30, 1),
    (1, 9, 700, 70),
]


@pytest.mark.parametrize("case", POINTS, ids=str)
@pytest.mark.parametrize("tol", [None, 1e-2])
def test_points(library, case, tol):
    x, y = clouds(*case)
    mean_cost = 2.0 * case[3]
    problem = random_problem(*case[:3], max_iter=5, tol=tol)
    problem.epsilon = torch.full((case[0],), 0.1 * mean_cost, dtype=torch.float64)
    check_points(Emulated(library), x, y, problem)


def check_points(emulated: Emulated, x: Tensor, y: Tensor, problem: Problem) -> None:
    count, n, m = x.shape[0], x.shape[1], y.shape[1]
    out = emulated.run(
        "sinkhorn_points",
        problem,
        {
            "f": ((count, n), torch.float32),
            "g": ((count, m), torch.float32),
            "error": ((count,), torch.float32),
            "value": ((count,), torch.float32),
            "iterations": ((count,), torch.int32),
            "phi": ((count, n), torch.float64),
            "gamma": ((count, m), torch.float64),
        },
        x=x,
        y=y,
    )
    found = []
    for dtype in (torch.float32, torch.float64):
        cost = reference.squared_distances(x.to(dtype), y.to(dtype))
        _, solution = replace(problem, cost=cost).solve(dtype)
        value = reference.transport_value(solution, problem.a, problem.b, problem.epsilon)
        found.append((solution, value))
    (eager, eager_value), (exact, value) = found
    assert torch.equal(out["iterations"], exact.iterations)
    within_budget(out["value"], eager_value, value, "value")
    within_budget(out["f"], eager.f, exact.f, "f")
    within_budget(out["g"], eager.g, exact.g, "g")
    assert ((out["error"] - exact.error).abs() <= 1e-5 + 1e-4 * exact.error).all()

    grad = torch.randn(count, generator=torch.Generator().manual_seed(5))
    back = emulated.run(
        "sinkhorn_points_backward",
        problem,
        {"grad_x": (tuple(x.shape), torch.float32), "grad_y": (tuple(y.shape), torch.float32)},
        x=x,
        y=y,
        phi=exact.phi,
        gamma=exact.gamma,
        grad=grad,
    )
    exact_back = reference.points_backward(
        grad.double(), x.double(), y.double(), problem.epsilon, exact.phi, exact.gamma
    )
    eager_back = reference.points_backward(grad, x, y, problem.epsilon, exact.phi, exact.gamma)
    for name, ours, float32, float64 in zip(back, back.values(), eager_back, exact_back, strict=True):
        within_budget(ours, float32, float64, name)


def test_points_that_lie_close(library):
    """In the plane differences are squared: pairs a thousandth of the spread apart keep their distance."""
    x, _ = clouds(1, 60, 1, 2)
    y = x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    problem = random_problem(1, 60, 60, max_iter=8, marginals=False)
    problem.epsilon = torch.tensor([1e-5], dtype=torch.float64)
    check_points(Emulated(library), x, y, problem)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_points_under_schedules(library, schedule):
    x, y = clouds(2, 130, 140, 5)
    check_points(Emulated(library, schedule=schedule), x, y, random_problem(2, 130, 140, max_iter=3))
