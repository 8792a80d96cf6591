"""The contract every op shares: the choice of impl, and each instruction set of the CPU library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sketchfast.kernels import native
from sketchfast.ops import _contract as contract
from sketchfast.testing import available_impls

REPOSITORY = Path(__file__).resolve().parents[2]
needs_native = pytest.mark.skipif(
    "native" not in available_impls("cpu"), reason="the CPU library was not built"
)


def test_auto_takes_the_first_that_runs(monkeypatch):
    missing = {"native": "not built", "triton": "not installed"}
    monkeypatch.setattr(contract, "unavailable_reason", lambda impl, device: missing.get(impl))
    with pytest.warns(UserWarning, match="some_op takes the slow reference.*native: not built"):
        assert contract.choose_impl("some_op", "auto", "cpu", torch.float32) == "reference"
    missing.pop("native")
    assert contract.choose_impl("some_op", "auto", "cpu", torch.float32) == "native"
    assert contract.choose_impl("some_op", "auto", "cuda", torch.float32) == "native"


def test_an_op_may_have_its_own_preference(monkeypatch):
    monkeypatch.setattr(contract, "unavailable_reason", lambda impl, device: None)
    monkeypatch.setitem(contract.PREFERENCE_OF_OP, ("some_op", "cuda"), ("triton", "native"))
    assert contract.choose_impl("some_op", "auto", "cuda", torch.float32) == "triton"


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_an_explicit_impl_never_falls_back(monkeypatch, impl):
    monkeypatch.setattr(contract, "unavailable_reason", lambda impl, device: "it is broken")
    with pytest.raises(RuntimeError, match=f"impl='{impl}' of op cannot run on cpu: it is broken"):
        contract.choose_impl("op", impl, "cpu", torch.float32)


def test_native_says_why_it_does_not_load(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    native.unavailable_reason.cache_clear()
    try:
        assert "was not built" in native.unavailable_reason("cpu")
        (tmp_path / "_C.so").write_bytes(b"no library")
        native.unavailable_reason.cache_clear()
        assert "does not load under torch" in native.unavailable_reason("cpu")
        assert "no compiled kernels exist" in native.unavailable_reason("mps")
    finally:
        monkeypatch.undo()
        native.unavailable_reason.cache_clear()


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
@pytest.mark.parametrize("op", ["raster", "sinkhorn", "triplet", "hyperlstm", "mixture"])
def test_narrower_instruction_sets(op, isa, tmp_path):
    """The op's own table, in a process whose kernels take the narrower path."""
    table = REPOSITORY / f"tests/ops/test_{op}.py"
    command = [sys.executable, "-m", "pytest", "-vv", "-x", "-p", "no:cacheprovider", str(table)]
    command += ["-k", "cpu-native and (match or test_strange or infeasible)"]
    result = subprocess.run(  # from a directory that holds no sketchfast: the installed one is tested
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"SKETCHFAST_ISA": isa}
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "cpu-native] PASSED" in result.stdout


@needs_native
def test_the_library_checks_what_guards_memory():
    """Called beneath the public function, wrong shapes are refused before any memory is touched."""
    op = torch.ops.sketchfast.raster_fwd_native
    points, pens = torch.rand(2, 4, 2), torch.ones(2, 4, dtype=torch.bool)
    rest = (5.0, 2.0, 0.0, 5, torch.float32, False)
    with pytest.raises(RuntimeError, match=r"pen_down must have shape \[2, 4\], got \[2, 3\]"):
        op(points, pens[:, :3].contiguous(), None, 5, 5, *rest)
    with pytest.raises(RuntimeError, match="pen_down must be contiguous"):
        op(points, torch.ones(4, 2, dtype=torch.bool).t(), None, 5, 5, *rest)
    with pytest.raises(RuntimeError, match="size must be at least 1 by 1, got 0 by 5"):
        op(points, pens, None, 0, 5, *rest)
    with pytest.raises(RuntimeError, match=r"lengths must have shape \[2\], got \[3\]"):
        op(points, pens, torch.ones(3, dtype=torch.int64), 5, 5, *rest)


@needs_native
def test_sinkhorn_checks_what_guards_memory():
    op = torch.ops.sketchfast.sinkhorn_fwd_native
    cost, epsilon = torch.rand(2, 3, 4), torch.ones(2, dtype=torch.float64)
    rest = (5, -1.0, "none")
    with pytest.raises(RuntimeError, match=r"epsilon must have shape \[2\], got \[3\]"):
        op(cost, torch.ones(3, dtype=torch.float64), None, None, None, *rest)
    with pytest.raises(RuntimeError, match=r"a must have shape \[2, 3\], got \[2, 4\]"):
        op(cost, epsilon, torch.rand(2, 4), None, None, *rest)
    with pytest.raises(RuntimeError, match="cost must be contiguous"):
        op(cost.mT, epsilon, None, None, None, *rest)
    with pytest.raises(RuntimeError, match=r"cost must have shape \[N, K >= 1, E >= 1\], got \[2, 0, 4\]"):
        op(cost[:, :0].contiguous(), epsilon, None, None, None, *rest)
    with pytest.raises(RuntimeError, match="max_iter must be at least 1, got 0"):
        op(cost, epsilon, None, None, None, 0, -1.0, "none")
    with pytest.raises(RuntimeError, match=r"y must have shape \[2, 4, 3\], got \[2, 4, 2\]"):
        torch.ops.sketchfast.sinkhorn_points_fwd_native(
            torch.rand(2, 3, 3), torch.rand(2, 4, 2), epsilon, None, None, 5, -1.0
        )
    rows, columns = (torch.rand(2, n, dtype=torch.float64) for n in (3, 4))
    with pytest.raises(RuntimeError, match=r"gamma must have shape \[2, 4\], got \[2, 3\]"):
        torch.ops.sketchfast.sinkhorn_schur_native(cost.double(), rows, columns, rows, epsilon)
