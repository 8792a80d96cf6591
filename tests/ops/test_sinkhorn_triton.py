"""What is special to the Triton kernels of Sinkhorn: their interpreter, their regimes, their compilation.

As test_raster_triton.py, this module runs in two ways: the plain one starts a process with TRITON_INTERPRET=1
over the common table and this module, and compiles ahead of time; there, and on a GPU, the rest runs.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_sinkhorn import assert_output_matches, gradients, problem, spoil, weighted

import sketchfast as sf
from sketchfast.testing import assert_same_bits, assert_within_budget, available_impls, devices

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [device for device in devices() if "triton" in available_impls(device)]
WAYS = ["whole", "strips", "sweeps"]

runs = pytest.mark.skipif(not DEVICES, reason="Triton runs on a GPU or in its interpreter")
on_devices = pytest.mark.parametrize("device", DEVICES)
outside = pytest.mark.skipif(INTERPRETED, reason="needs a process without the interpreter")
ways = pytest.mark.parametrize("way", WAYS)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900
    )


@outside
@pytest.mark.parametrize(
    ("module", "chosen"),
    [
        # Left out: what is slow in the interpreter and of the same kind as something of this module.
        (
            "test_sinkhorn.py",
            "triton and not 257 and not one_output_alone and not bits_repeat and not against_pot",
        ),
        ("test_sinkhorn_triton.py", "test_"),
    ],
)
def test_in_the_interpreter(module, chosen):
    done = run(
        *("-m", "pytest", f"tests/ops/{module}", "-k", chosen, "-p", "no:cacheprovider", "-W", "ignore"),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "100%" in done.stdout  # some were selected


@outside
def test_compiles_ahead_of_time():
    """One size and dtype for sm_90; benchmarks/aot_triton.py without --quick takes all."""
    pytest.importorskip("triton.backends.nvidia")
    done = run("benchmarks/aot_triton.py", "--quick", "--op", "sinkhorn", "--jobs", "1", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("_whole_kernel", "_strip_kernel", "_sweep_kernel", "_points_gradient_kernel"):
        assert kernel in done.stdout
    assert "sm_90" in done.stdout


@pytest.fixture
def kernels():
    from sketchfast.kernels.triton import sinkhorn

    return sinkhorn


def force(monkeypatch, kernels, way):
    monkeypatch.setattr(kernels, "regime", lambda *_: way)


def on_all(cost, epsilon, device, **options):
    """(triton, eager, float64) outputs of `sinkhorn`."""

    def moved(value, dtype=None):
        return value.to(device=device, dtype=dtype or value.dtype) if torch.is_tensor(value) else value

    got, eager = (
        sf.sinkhorn(moved(cost), moved(epsilon), **{name: moved(x) for name, x in options.items()}, impl=impl)
        for impl in ("triton", "reference")
    )
    wide = {name: moved(x, torch.float64) for name, x in options.items()}
    exact = sf.sinkhorn(moved(cost, torch.float64), moved(epsilon), **wide, impl="reference")
    return got, eager, exact


# --- the rule -----------------------------------------------------------------------------------------------


def test_the_rule():
    from sketchfast.kernels.triton.sinkhorn import regime

    assert regime(1024, 64, 64, True) == "whole"
    assert regime(1, 1, 8192, False) == "whole"
    assert regime(1, 1, 8193, False) == "strips"
    assert regime(1, 125, 3840, True) == "strips"
    assert regime(1, 3840, 125, False) == "strips"
    assert regime(1, 3840, 125, True) == "sweeps"
    assert regime(64, 125, 3840, False) == "sweeps"
    assert regime(1, 2048, 2048, False) == "sweeps"


@runs
@on_devices
@pytest.mark.parametrize(
    ("shape", "tol", "kernel"),
    [
        ((1, 64, 64), 1e-3, "_whole_kernel"),
        ((1, 65, 130), 1e-3, "_strip_kernel"),
        ((1, 130, 129), None, "_sweep_kernel"),
    ],
)
def test_the_rule_is_followed(device, shape, tol, kernel, kernels, monkeypatch):
    launched = set()

    def spy(name, original):
        class Spy:
            def __getitem__(self, grid):
                launched.add(name)
                return original[grid]

        return Spy()

    for name in ("_whole_kernel", "_strip_kernel", "_sweep_kernel"):
        monkeypatch.setattr(kernels, name, spy(name, getattr(kernels, name)))
    cost, a, b = problem(*shape)
    assert_output_matches(*on_all(cost, 0.2, device, a=a, b=b, max_iter=2, tol=tol), torch.float32)
    assert launched == {kernel}


# --- every regime -------------------------------------------------------------------------------------------


@runs
@on_devices
@ways
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 1, 9), (2, 9, 1), (1, 40, 67), (1, 67, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regime_matches_reference(device, way, shape, dtype, kernels, monkeypatch):
    force(monkeypatch, kernels, way)
    cost, a, b = spoil(*problem(*shape, dtype=dtype))
    init = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(3)) * 0.1
    init[0, 0] = math.nan
    assert_output_matches(*on_all(cost, 0.05, device, a=a, b=b, init=init, max_iter=6), dtype)
    assert_output_matches(*on_all(cost, 0.05, device, max_iter=6), dtype)


@runs
@on_devices
@ways
def test_regime_at_small_epsilon(device, way, kernels, monkeypatch):
    """cost / epsilon 1e4, where eager float32 is off by 1e-4 and a plain scaling form has no mass at all."""
    force(monkeypatch, kernels, way)
    cost, a, b = spoil(*problem(2, 12, 17))
    got, _, exact = on_all(cost, 1e-4, device, a=a, b=b, max_iter=40)
    torch.testing.assert_close(got.plan.double(), exact.plan, rtol=0, atol=1e-6 * float(exact.plan.max()))
    assert_output_matches(*on_all(cost, 1e-4, device, a=a, b=b, max_iter=40), torch.float32, 1e-4)


@runs
@on_devices
@ways
def test_regime_stops_each_problem_by_itself(device, way, kernels, monkeypatch):
    if way == "strips":
        shape = (4, 16, 24)  # wide: the only shape it serves with a tolerance
    else:
        shape = (4, 24, 16)
    force(monkeypatch, kernels, way)
    cost, a, b = problem(*shape)
    epsilon = torch.tensor([5.0, 0.3, 0.1, 0.05])
    got, eager, exact = on_all(cost, epsilon, device, a=a, b=b, max_iter=25, tol=2e-3)
    assert got.iterations.tolist() == exact.iterations.tolist()
    assert len(set(exact.iterations.tolist())) > 1
    assert exact.iterations.max() < 25 or exact.error.max() >= 2e-3
    assert_output_matches(got, eager, exact, torch.float32)


@runs
@on_devices
@ways
@pytest.mark.parametrize("tol", [None, 0.5])
def test_regime_with_infeasible_lines(device, way, tol, kernels, monkeypatch):
    """Also at a tolerance that the feasible lines alone would meet."""
    force(monkeypatch, kernels, way)
    cost, a, b = problem(3, 6, 9)
    cost[0, 2], cost[1, :, 4], a[2, 1], cost[2, 0, 1] = math.inf, math.inf, 0.0, math.inf
    got, eager, exact = on_all(cost, 0.3, device, a=a, b=b, max_iter=5, tol=tol)
    assert exact.error[:2].tolist() == [math.inf, math.inf]
    assert got.iterations.tolist() == exact.iterations.tolist()
    assert_output_matches(got, eager, exact, torch.float32)


@runs
@on_devices
@ways
def test_regime_repeats_its_bits_and_writes_everything(device, way, kernels, monkeypatch):
    force(monkeypatch, kernels, way)
    cost, a, b = (x.to(device) for x in spoil(*problem(2, 9, 14)))

    def solve():
        return sf.sinkhorn(cost, 0.1, a=a, b=b, max_iter=4, tol=None, impl="triton")

    torch.use_deterministic_algorithms(True)  # fills what is not written with NaN
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        first, again = solve(), solve()
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two in zip(first, again, strict=True):
        assert not torch.isnan(one.float()).any()
        assert_same_bits(one, two)


# --- what a regime rests on ---------------------------------------------------------------------------------


def log_iterations(kernels, monkeypatch):
    """A list that grows by one with every iteration of a whole problem in log form; in the interpreter."""
    calls, original = [], kernels._log_iteration

    def counted(*arguments):
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(kernels, "_log_iteration", counted)
    return calls


@pytest.mark.skipif(not INTERPRETED, reason="counts calls that only the interpreter makes in Python")
def test_iterations_take_the_scaling_form(kernels, monkeypatch):
    """But the first, which has no potentials to form a matrix from."""
    force(monkeypatch, kernels, "whole")
    calls = log_iterations(kernels, monkeypatch)
    cost, a, b = problem(1, 6, 8)
    assert_output_matches(*on_all(cost, 0.1, "cpu", a=a, b=b, max_iter=21), torch.float32)
    assert len(calls) == 1


@runs
@on_devices
@pytest.mark.parametrize("epsilon", [1.0, 0.01, 3e-4])
def test_scales_that_leave_their_range(device, epsilon, kernels, monkeypatch):
    """A start that is far off, masses over thirty decades: bursts are run again, potentials absorbed."""
    force(monkeypatch, kernels, "whole")
    calls = log_iterations(kernels, monkeypatch) if INTERPRETED else [1, 1]
    cost, _, b = problem(2, 6, 8)
    a = torch.tensor([1e-9, 1e-3, 1e-30, 0.3, 0.3, 0.399])[None].repeat(2, 1)
    init = torch.linspace(-30, 30, 8)[None].repeat(2, 1)
    outputs = on_all(cost, epsilon, device, a=a, b=b, init=init, max_iter=30)
    assert_output_matches(*outputs, torch.float32)
    assert len(calls) > 1


@runs
@on_devices
def test_split_sweeps(device, kernels, monkeypatch):
    """One problem whose sweeps are split both ways, against the same unsplit."""
    cost, a, b = problem(1, 130, 260)
    assert kernels._splits(5, 260)[0] > 1
    force(monkeypatch, kernels, "sweeps")
    got, eager, exact = on_all(cost, 0.2, device, a=a, b=b, max_iter=2, tol=1e-9)
    assert_output_matches(got, eager, exact, torch.float32)
    monkeypatch.setattr(kernels, "_PROGRAMS", 1)
    whole, _, _ = on_all(cost, 0.2, device, a=a, b=b, max_iter=2, tol=1e-9)
    torch.testing.assert_close(got.plan, whole.plan, rtol=1e-5, atol=1e-9)


# --- gradients, points, SwAV --------------------------------------------------------------------------------


@runs
@on_devices
@ways
@pytest.mark.parametrize("grad", ["unrolled", "implicit"])
def test_gradients_of_each_regime(device, way, grad, kernels, monkeypatch):
    force(monkeypatch, kernels, way)
    cost, a, b = (x.to(device) for x in spoil(*problem(2, 5, 7)))
    steps = 3 if grad == "unrolled" else 40

    def loss(impl):
        return lambda c, p, q: weighted(sf.sinkhorn(c, 0.3, a=p, b=q, max_iter=steps, grad=grad, impl=impl))

    _, mine = gradients(loss("triton"), cost, a, b)
    _, exact = gradients(loss("reference"), cost.double(), a.double(), b.double())
    for name, got, want in zip(("cost", "a", "b"), mine, exact, strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()), msg=name
        )


@runs
@on_devices
def test_unrolled_gradient_of_different_iteration_counts(device):
    cost, a, b = (x.to(device) for x in spoil(*problem(3, 6, 9)))
    epsilon = torch.tensor([3.0, 0.5, 0.2], device=device)
    init = torch.linspace(-0.2, 0.3, 27, device=device).view(3, 9)
    options = {"max_iter": 6, "tol": 2e-3, "grad": "unrolled"}

    def loss(impl):
        def of(c, p, q):
            start = init.to(c.dtype)
            return weighted(sf.sinkhorn(c, epsilon, a=p, b=q, init=start, impl=impl, **options))

        return of

    counts = sf.sinkhorn(cost, epsilon, a=a, b=b, init=init, impl="triton", **options).iterations
    assert len(set(counts.tolist())) > 1
    _, mine = gradients(loss("triton"), cost, a, b)
    _, eager = gradients(loss("reference"), cost, a, b)
    _, exact = gradients(loss("reference"), cost.double(), a.double(), b.double())
    for name, got, near, want in zip(("cost", "a", "b"), mine, eager, exact, strict=True):
        assert_within_budget(got, near, want, f"gradient to {name}")


@runs
@on_devices
@pytest.mark.parametrize("dims", [0, 1, 16, 17, 70])
def test_points_from_differences_and_from_products(device, dims):
    """Far from the origin: products are taken of centred points."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 34, dims, generator=generator).to(device) + 100
    y = torch.rand(2, 69, dims, generator=generator).to(device) + 100.25

    def value(impl):
        return lambda p, q: sf.sinkhorn_points(p, q, 0.1 * max(dims, 1), max_iter=4, impl=impl).value.sum()

    mine, (to_x, to_y) = gradients(value("triton"), x, y)
    eager, near = gradients(value("reference"), x, y)
    exact, want = gradients(value("reference"), x.double(), y.double())
    assert_within_budget(mine, eager, exact, "value")
    for got, close, true in zip((to_x, to_y), near, want, strict=True):
        assert_within_budget(got, close, true, "gradient to points")


@runs
@on_devices
def test_points_split(device):
    """Few points against many, so that sweeps and gradients are split."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(1, n, 3, generator=generator).to(device) for n in (4, 300))

    def value(impl):
        return lambda p, q: sf.sinkhorn_points(p, q, 0.2, max_iter=3, impl=impl).value.sum()

    mine, (to_x, to_y) = gradients(value("triton"), x, y)
    eager, near = gradients(value("reference"), x, y)
    exact, want = gradients(value("reference"), x.double(), y.double())
    assert_within_budget(mine, eager, exact, "value")
    for got, close, true in zip((to_x, to_y), near, want, strict=True):
        assert_within_budget(got, close, true, "gradient to points")


@runs
@on_devices
def test_assignment_split_and_with_empty_columns(device):
    scores = torch.randn(300, 9, generator=torch.Generator().manual_seed(0)).to(device) * 5
    scores[:, 4] = -math.inf
    got, eager = (sf.swav_assign(scores, impl=impl) for impl in ("triton", "reference"))
    exact = sf.swav_assign(scores.double(), impl="reference")
    assert_within_budget(got, eager, exact, "assignment")
    assert (got[:, 4] == 0).all()
