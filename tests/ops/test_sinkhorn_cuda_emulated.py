"""The CUDA kernels of Sinkhorn, run by the CPU emulator in tests/cuda_emulator, against float64.

What it proves and what it cannot is as in test_raster_cuda_emulated.py; beyond it, clusters of CTAs are run
with their barriers and with writes to each other's shared memory, not their memory model.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

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

    def _call(self, name: str, memory: Guarded, tensors: dict[str, Tensor | None], **extra: float) -> None:
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
        error = getattr(self.library, name)(ctypes.byref(call))
        assert error is None, error.decode()
        self.launches = self.library.launches()
        memory.check()

    def solve(self, problem: Problem) -> dict[str, Tensor]:
        memory = Guarded()
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
        out = {name: memory.empty(*shape) for name, shape in shapes.items()}
        given = {name: getattr(problem, name) for name in INPUTS}
        kept = {name: None if x is None else memory.copy(x) for name, x in given.items()}
        self._call(
            "sinkhorn_solve",
            memory,
            kept | out,
            count=count,
            rows=rows,
            columns=columns,
            max_iter=problem.max_iter,
            cost_dtype=DTYPES[problem.cost.dtype],
            plan_dtype=DTYPES[plan_dtype],
            tol=-1.0 if problem.tol is None else problem.tol,
        )
        return out


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
    ours: Tensor, eager: Tensor, exact: Tensor, what: str, dtype: torch.dtype = torch.float32
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
    budget = 2 * eager_error + 4 * torch.finfo(dtype).eps * exact.abs().max().item()
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
