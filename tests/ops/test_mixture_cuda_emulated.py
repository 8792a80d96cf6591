"""The CUDA kernels of the mixture loss, run by the CPU emulator in tests/cuda_emulator, against float64.

What it proves and what it cannot is as in test_raster_cuda_emulated.py.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import pytest
import torch
from emulated import DTYPES, H200_SHARED, SCHEDULES, Guarded, build
from torch import Tensor

from sketchfast.kernels.reference import mixture as reference
from sketchfast.testing import assert_same_bits, assert_within_budget

#: In the order of the structure Call in mixture_emulated.cpp.
INPUTS = ("output", "target", "rows_in", "grad_pen", "grad_stroke")
OUTPUTS = ("pen", "stroke", "rows", "grad")
INTEGERS = ("positions", "components", "dtype", "shared_limit")
WEIGHTS = (3.0, -0.7)


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in INPUTS + OUTPUTS),
        *((name, ctypes.c_int64) for name in INTEGERS),
    ]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = build("mixture_emulated.cpp", tmp_path_factory.mktemp("emulator"))
    for name in ("forward", "backward"):
        getattr(loaded, f"mixture_{name}").restype = ctypes.c_char_p
    return loaded


@dataclass
class Emulated:
    """The kernels behind a Python call."""

    library: ctypes.CDLL
    schedule: str = "forward"
    launches: int = 0

    def call(
        self,
        name: str,
        given: dict[str, Tensor],
        out: dict[str, tuple[tuple[int, ...], torch.dtype]],
        dtype: torch.dtype,
        width: int,
    ) -> dict[str, Tensor]:
        """Of guarded copies of the tensors given."""
        memory = Guarded()
        kept = {key: memory.copy(x) for key, x in given.items()}
        made = {key: memory.empty(*shape) for key, shape in out.items()}
        call = _Call(shared_limit=H200_SHARED, dtype=DTYPES[dtype], components=(width - 3) // 6)
        call.positions = len(given.get("output", given.get("rows_in")))
        for key, tensor in (kept | made).items():
            setattr(call, key, tensor.data_ptr())
        self.library.set_schedule(SCHEDULES[self.schedule], 12345)
        error = getattr(self.library, f"mixture_{name}")(ctypes.byref(call))
        assert error is None, error.decode()
        self.launches = self.library.launches()
        memory.check()
        return made

    def losses(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(pen, stroke, gradient of their sum by WEIGHTS); the losses are the same without gradient rows."""
        shape = tuple(output.shape)
        scalars = dict.fromkeys(("pen", "stroke"), ((), torch.float32))
        given = {"output": output, "target": target}
        out = scalars | {"rows": (shape, torch.float32)}
        made = self.call("forward", given, out, output.dtype, shape[1])
        if shape[0] < 1000:  # the emulator takes seconds for more
            alone = self.call("forward", given, scalars, output.dtype, shape[1])
            assert_same_bits(alone["pen"], made["pen"])
            assert_same_bits(alone["stroke"], made["stroke"])
        pen, stroke = (torch.tensor(weight) for weight in WEIGHTS)
        given = {"rows_in": made["rows"], "grad_pen": pen, "grad_stroke": stroke}
        grad = self.call("backward", given, {"grad": (shape, output.dtype)}, output.dtype, shape[1])
        return made["pen"], made["stroke"], grad["grad"]


def head(positions: int, components: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    """(output, target): a third of the positions are padding."""
    random = torch.Generator().manual_seed(seed)
    output = torch.randn(positions, 3 + 6 * components, generator=random).to(dtype)
    states = torch.randint(3, (positions,), generator=random)
    offsets = torch.randn(positions, 2, generator=random) * (states < 2)[:, None]
    return output, torch.cat((offsets, torch.nn.functional.one_hot(states, 3)), 1)


def by_autograd(output: Tensor, target: Tensor, dtype: torch.dtype):
    leaf = output.detach().clone().to(dtype).requires_grad_()
    pen, stroke = reference.mixture_loss(leaf, target.to(dtype if dtype == torch.float64 else torch.float32))
    (WEIGHTS[0] * pen + WEIGHTS[1] * stroke).backward()
    return pen.detach(), stroke.detach(), leaf.grad


def compare(got: tuple[Tensor, ...], output: Tensor, target: Tensor) -> None:
    eager, exact = (by_autograd(output, target, dtype) for dtype in (output.dtype, torch.float64))
    for name, *three in zip(("pen", "stroke", "gradient"), got, eager, exact, strict=True):
        assert_within_budget(*three, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("components", [1, 2, 20, 30, 31, 32, 33, 40, 64, 65, 130])
def test_components(library, components, dtype):
    output, target = head(5, components, dtype=dtype)
    compare(Emulated(library).losses(output, target), output, target)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("positions", [0, 1, 3, 4, 63, 130])
def test_positions(library, positions, schedule):
    output, target = head(positions, 3)
    emulated = Emulated(library, schedule)
    got = emulated.losses(output, target)
    compare(got, output, target)
    for ours, first in zip(got, Emulated(library).losses(output, target), strict=True):
        assert_same_bits(ours, first)
    assert emulated.launches == (1 if positions else 0)  # of backward


def test_several_positions_a_warp(library):
    """More than the CTAs of a full GPU have warps."""
    output, target = head(132 * 16 * 4 + 5, 1)
    compare(Emulated(library).losses(output, target), output, target)


@pytest.mark.parametrize("scale", [0.0, 4.0, 30.0])
@pytest.mark.parametrize("components", [6, 70])
def test_scales(library, components, scale):
    output, target = head(9, components)
    compare(Emulated(library).losses(output * scale, target), output * scale, target)


@pytest.mark.parametrize("components", [2, 65])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(library, components, value):
    """In the loss as in the reference's, and in no other position's gradient."""
    for column in (0, *range(3, 3 + 6 * components, components)):
        output, target = head(5, components)
        clean = Emulated(library).losses(output, target)
        output[2, column] = value
        got, want = Emulated(library).losses(output, target), by_autograd(output, target, torch.float32)
        for ours, eager in zip(got[:2], want[:2], strict=True):
            torch.testing.assert_close(ours, eager, equal_nan=True)
        finite = torch.isfinite(got[0] + got[1]) or torch.isfinite(want[2]).all()
        assert torch.isfinite(got[2]).all() == finite
        assert_same_bits(got[2][[0, 1, 3, 4]], clean[2][[0, 1, 3, 4]])


def test_far_components(library):
    """One infinitely far has no gradient; where all are, the loss is infinite."""
    output, target = head(3, 2)
    target[:] = torch.tensor([0.5, 0.5, 1, 0, 0])
    output[1, 5] = 1e30
    _, stroke, grad = Emulated(library).losses(output, target)
    assert torch.isfinite(stroke)
    assert torch.isfinite(grad).all()
    assert not grad[1, 5::2].any()
    output[1, 6] = 1e30
    _, stroke, grad = Emulated(library).losses(output, target)
    assert stroke == math.inf
    assert torch.isfinite(grad[[0, 2]]).all()
