"""What is special to the Triton kernels of the mixture loss: the interpreter, and compilation ahead of time.

As test_triplet_triton.py, this module runs in two ways: the plain one starts a process with
TRITON_INTERPRET=1 over the common table and this module, and compiles ahead of time; there, and on a GPU, the
rest runs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sketchfast.kernels.reference import mixture as reference
from sketchfast.ops import mixture as ops_mixture
from sketchfast.testing import available_impls, devices

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [device for device in devices() if "triton" in available_impls(device)]

runs = pytest.mark.skipif(not DEVICES, reason="Triton runs on a GPU or in its interpreter")
outside = pytest.mark.skipif(INTERPRETED, reason="needs a process without the interpreter")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900
    )


@outside
@pytest.mark.parametrize(
    ("module", "chosen"),
    [
        # Left out: what is slow in the interpreter and of the same kind as what is left.
        (
            "test_mixture.py",
            "triton and not dtype0 and not dtype3 and not opcheck and not same_bits"
            " and not (components_match and (dtype1 or 15 or 17 or 31))",
        ),
        ("test_mixture_triton.py", "test_"),
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
    """Two sizes for sm_90; benchmarks/aot_triton.py without --quick takes all."""
    pytest.importorskip("triton.backends.nvidia")
    done = run("benchmarks/aot_triton.py", "--quick", "--op", "mixture", "--jobs", "1", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("_forward_kernel", "_mean_kernel", "_backward_kernel"):
        assert kernel in done.stdout
    assert "sm_90" in done.stdout


@runs
@pytest.mark.parametrize("device", DEVICES)
def test_more_partial_sums_than_a_line(device, monkeypatch):
    """Sums over 11 programs, a position each, four at a look."""
    from sketchfast.kernels.triton import mixture

    monkeypatch.setattr(mixture, "_LINE", 4)
    generator = torch.Generator().manual_seed(0)
    positions, components = 11, 200
    output = torch.randn(positions, 3 + 6 * components, generator=generator).to(device)
    target = torch.zeros(positions, 5, device=device)
    target[:, 2] = 1
    pen, stroke = ops_mixture.mixture_loss(output, target, impl="triton")
    want = reference.mixture_loss(output.double(), target.double())
    torch.testing.assert_close((pen.double(), stroke.double()), want, rtol=1e-6, atol=0)


@runs
def test_the_limits_are_those_of_the_reference():
    from sketchfast.kernels.triton.mixture import _CORRELATION, _LOG_SIGMA

    assert (_LOG_SIGMA.value, _CORRELATION.value) == (
        reference.LOG_SIGMA_RANGE[1],
        reference.CORRELATION_LIMIT,
    )
