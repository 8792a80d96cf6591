"""The HyperLSTM's Triton kernels against the eager ones, the op they make up, their compilation.

As test_triplet_triton.py, this module runs in two ways: the plain one starts a process with
TRITON_INTERPRET=1 over this module, and compiles ahead of time; there, and on a GPU, the rest runs.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sketchfast.kernels import hyperlstm_loop as loop
from sketchfast.kernels.reference.hyperlstm import HYPER_STREAM, MAIN_STREAM, dropout_masks
from sketchfast.nn import HyperLSTM
from sketchfast.ops.hyperlstm import hyperlstm
from sketchfast.testing import assert_same_bits, assert_within_budget, available_impls, devices

triton = pytest.importorskip("triton")

from hyperlstm_eager import EagerKernels  # noqa: E402

from sketchfast.kernels.triton import hyperlstm as kernels  # noqa: E402

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [device for device in devices() if "triton" in available_impls(device)]
KERNELS, EAGER = kernels.KERNELS, EagerKernels()

runs = pytest.mark.skipif(not DEVICES, reason="Triton runs on a GPU or in its interpreter")
on_devices = pytest.mark.parametrize("device", DEVICES)
outside = pytest.mark.skipif(INTERPRETED, reason="needs a process without the interpreter")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900
    )


@outside
def test_in_the_interpreter():
    module = "tests/ops/test_hyperlstm_triton.py"
    done = run("-m", "pytest", module, "-p", "no:cacheprovider", "-W", "ignore", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "100%" in done.stdout  # some were selected


@outside
def test_compiles_ahead_of_time():
    """The paper's size for sm_90; benchmarks/aot_triton.py without --quick takes all."""
    pytest.importorskip("triton.backends.nvidia")
    done = run(
        "benchmarks/aot_triton.py", "--quick", "--op", "hyperlstm", "--jobs", "1", TRITON_INTERPRET="0"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_forward_kernel" in done.stdout
    assert "_backward_kernel" in done.stdout
    assert "sm_90" in done.stdout


# --- a kernel alone -----------------------------------------------------------------------------------------


class Case(NamedTuple):
    batch: int = 5
    width: int = 12
    steps: int = 1
    norm: bool = True
    lengths: bool = False
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32  # D
    out_dtype: torch.dtype | None = None  # O, D if None
    slots: int = 2
    with_out: bool = True

    @property
    def step(self) -> int:
        """The first of the steps; with lengths there are rows before, at and past their end."""
        return 3

    def row_lengths(self) -> Tensor | None:
        if not self.lengths:
            return None
        return torch.arange(self.batch) % (self.steps + 2) + self.step - 1

    def live(self) -> Tensor:
        """[S, B]: which rows are not past their end."""
        lengths = self.row_lengths()
        if lengths is None:
            return torch.ones(self.steps, self.batch, dtype=torch.bool)
        return torch.arange(self.step, self.step + self.steps)[:, None] < lengths


class Precision(NamedTuple):
    product: torch.dtype  # D
    accumulate: torch.dtype  # A
    out: torch.dtype  # O


EXACT = Precision(torch.float64, torch.float64, torch.float64)


def precision(case: Case) -> Precision:
    return Precision(case.dtype, torch.float32, case.out_dtype or case.dtype)


class Values:
    """Random numbers that every dtype in question can hold, so that all kernels are given the same.

    `past_end` [S, B, 1] or None: where poisoned kernels find NaN.
    """

    def __init__(self, case: Case, kind: Precision, device: str, poison: bool) -> None:
        self.generator = torch.Generator().manual_seed(case.width)
        self.case, self.kind, self.device, self.poison = case, kind, device, poison

    def normal(self, *shape: int, dtype: torch.dtype, rows: str = "", scale: float = 1.0) -> Tensor:
        """Rows of a matrix lie apart in memory. rows: "SB" or "B", the dimensions before the last two or one
        that poison of what lies past the end goes by."""
        value = (torch.randn(shape, generator=self.generator) * scale).to(self.case.dtype).double()
        if rows and self.poison:
            live = self.case.live() if rows == "SB" else self.case.live()[0]
            value = torch.where(live[..., None], value, math.nan)
        value = value.to(dtype).to(self.device)
        if len(shape) == 1 or not rows:
            return value
        wide = torch.full((*shape[:-1], shape[-1] + 4), math.nan, dtype=dtype, device=self.device)
        wide[..., : shape[-1]] = value
        return wide[..., : shape[-1]]

    def written(self, *shape: int, dtype: torch.dtype) -> Tensor:
        wide = torch.full((*shape[:-1], shape[-1] + 8), math.nan, dtype=dtype, device=self.device)
        return wide[..., : shape[-1]]

    def norm(self, gates: bool, cell: bool) -> tuple[Tensor | None, ...]:
        width, dtype = self.case.width, self.kind.accumulate
        shapes = [(4, width) if gates else None] * 2 + [(width,) if cell else None] * 2
        return tuple(None if shape is None else self.normal(*shape, dtype=dtype) for shape in shapes)

    def settings(self) -> tuple:
        case = self.case
        lengths = case.row_lengths()
        seed = torch.tensor(-(2**62) + 99, device=self.device) if case.dropout else None
        return (None if lengths is None else lengths.to(self.device), seed, case.step, 41, 0.7, case.dropout)


def hyper_fwd(implementation, case: Case, kind: Precision, device: str, poison: bool) -> dict[str, Tensor]:
    make = Values(case, kind, device, poison)
    shape = (case.steps, case.batch, case.width)
    gates = make.normal(*shape[:2], 4 * case.width, dtype=kind.product, rows="SB")
    x_part = make.normal(*shape[:2], 4 * case.width, dtype=kind.product, rows="SB")
    if not case.with_out:
        x_part = None
    cell = make.normal(*shape[1:], dtype=kind.accumulate)
    last = make.normal(*shape[1:], dtype=kind.out) if case.with_out else None
    hidden = make.written(*shape, dtype=kind.product)
    cells = None if case.with_out else make.written(*shape, dtype=kind.accumulate)
    norm = make.norm(case.norm, case.norm)
    implementation.hyper_fwd(gates, x_part, cell, hidden, last, cells, *norm, *make.settings())
    gates = torch.where(case.live().to(device)[..., None], gates, 0.0)
    return {"gates": gates, "cell": cell, "hidden": hidden, "last": last, "cells": cells}


def main_inputs(make: Values, steps: tuple[int, ...], rows: str) -> tuple[Tensor, ...]:
    case, kind = make.case, make.kind
    gates = (*steps, case.batch, 4 * case.width)
    return (
        make.normal(*gates, dtype=kind.product, rows=rows),
        make.normal(*gates, dtype=kind.product, rows=rows),
        make.normal(12, *steps, case.batch, case.width, dtype=kind.product, rows=rows, scale=0.7),
        make.normal(4, case.width, dtype=kind.accumulate),
    )


def main_fwd(implementation, case: Case, kind: Precision, device: str, poison: bool) -> dict[str, Tensor]:
    make = Values(case, kind, device, poison)
    shape = (case.steps, case.batch, case.width)
    inputs = main_inputs(make, shape[:1], "SB")
    cell = make.normal(*shape[1:], dtype=kind.accumulate)
    out = make.written(*shape, dtype=kind.out) if case.with_out else None
    hidden = make.written(*shape[1:], dtype=kind.product) if case.with_out else None
    cells = None if case.with_out else make.written(*shape, dtype=kind.accumulate)
    norm = make.norm(case.norm, True)
    implementation.main_fwd(*inputs, cell, out, hidden, cells, *norm, *make.settings())
    return {"cell": cell, "out": out, "hidden": hidden, "cells": cells}


def cells_and_gradients(make: Values) -> tuple[Tensor, ...]:
    """(cell before, cell after, gradient of h, gradient of the cell)"""
    shape = (make.case.batch, make.case.width)
    return (
        make.normal(*shape, dtype=make.kind.accumulate, rows="B"),
        make.normal(*shape, dtype=make.kind.accumulate, rows="B"),
        make.normal(*shape, dtype=make.kind.product),
        make.normal(*shape, dtype=make.kind.accumulate),
    )


def hyper_bwd(implementation, case: Case, kind: Precision, device: str, poison: bool) -> dict[str, Tensor]:
    make = Values(case, kind, device, poison)
    gates = make.normal(case.batch, 4 * case.width, dtype=kind.product, rows="B")
    before, after, grad_hidden, grad_cell = cells_and_gradients(make)
    norm = make.norm(case.norm, case.norm)
    if implementation is KERNELS:
        after.copy_(before)
        hidden = torch.empty((1, case.batch, case.width), dtype=kind.product, device=device)
        implementation.hyper_fwd(gates[None], None, after, hidden, None, None, *norm, *make.settings())
    grad_gates = make.written(*gates.shape, dtype=kind.product)
    partials = torch.full((case.slots, 10, case.width), 0.5, dtype=kind.accumulate, device=device)
    implementation.hyper_bwd(
        gates, before, after, grad_hidden, grad_cell, grad_gates, partials, *norm, *make.settings()
    )
    return {
        "grad_hidden": grad_hidden,
        "grad_cell": grad_cell,
        "grad_gates": grad_gates,
        "sums": (partials - 0.5).sum(0),
    }


def main_bwd(implementation, case: Case, kind: Precision, device: str, poison: bool) -> dict[str, Tensor]:
    make = Values(case, kind, device, poison)
    inputs = main_inputs(make, (), "B")
    before, after, grad_hidden, grad_cell = cells_and_gradients(make)
    grad_out = make.normal(*before.shape, dtype=kind.out, rows="B") if case.with_out else None
    norm = make.norm(case.norm, True)
    if implementation is KERNELS:
        after.copy_(before)
        recurrent, x_part, scales, bias = inputs
        implementation.main_fwd(
            recurrent[None], x_part[None], scales[:, None], bias, after, None, None, None, *norm,
            *make.settings(),
        )  # fmt: skip
    of_inputs = [make.written(*x.shape, dtype=kind.product) for x in inputs[:3]]
    partials = torch.full((case.slots, 14, case.width), 0.5, dtype=kind.accumulate, device=device)
    implementation.main_bwd(
        *inputs, before, after, grad_out, grad_hidden, grad_cell, *of_inputs, partials, *norm,
        *make.settings(),
    )  # fmt: skip
    names = ("grad_recurrent", "grad_x_part", "grad_scales")
    found = dict(zip(names, of_inputs, strict=True))
    sums = (partials - 0.5).sum(0)
    return found | {"grad_hidden": grad_hidden, "grad_cell": grad_cell, "sums": sums}


def assert_kernel(kernel, case: Case, device: str) -> None:
    """Within budget of the eager one in float64, the same bits twice; NaN where nothing may be read."""
    got = kernel(KERNELS, case, precision(case), device, True)
    again = kernel(KERNELS, case, precision(case), device, True)
    near = kernel(EAGER, case, precision(case), device, False)
    exact = kernel(EAGER, case, EXACT, device, False)
    for name, mine in got.items():
        if mine is None:
            assert exact[name] is None
            continue
        assert mine.dtype == near[name].dtype
        assert_same_bits(mine.contiguous(), again[name].contiguous(), name)
        # The interpreter truncates to bfloat16 where a GPU rounds.
        units = 4 * torch.finfo(case.dtype).eps if INTERPRETED and case.dtype == torch.bfloat16 else 0.0
        floor = 5e-7 + units * float(exact[name].abs().max())
        assert_within_budget(mine, near[name], exact[name], name, floor=floor)
        past = (exact[name] == 0).flatten() & (near[name] == 0).flatten()
        assert (mine.flatten()[past] == 0).all(), name


ALL_KERNELS = pytest.mark.parametrize("kernel", [hyper_fwd, main_fwd, hyper_bwd, main_bwd])
CASES = {
    "plain": Case(),
    "without norm": Case(norm=False),
    "lengths": Case(lengths=True),
    "lengths without norm": Case(lengths=True, norm=False, width=7),
    "dropout": Case(dropout=0.3),
    "dropout of an odd width": Case(dropout=0.6, width=7, norm=False),
    "everything": Case(dropout=0.1, lengths=True, width=40, batch=7, slots=3),
    "without out": Case(with_out=False, lengths=True),
    "steps": Case(steps=4, lengths=True, dropout=0.2),
    "replayed steps": Case(steps=4, lengths=True, with_out=False, width=9),
    "bfloat16": Case(dtype=torch.bfloat16, lengths=True),
    "float16": Case(dtype=torch.float16, lengths=True),
    "autocast": Case(dtype=torch.bfloat16, out_dtype=torch.float32, lengths=True, steps=2),
    "one unit": Case(width=1, batch=1, slots=1, norm=False),
    "one unit with norm": Case(width=1, batch=2, slots=2),
    "more slots than rows": Case(slots=9, batch=3, width=33),
}


@runs
@on_devices
@ALL_KERNELS
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel(device, kernel, case):
    if kernel in (hyper_bwd, main_bwd) and case.steps > 1:
        case = case._replace(steps=1)
    assert_kernel(kernel, case, device)


@runs
@on_devices
@ALL_KERNELS
@pytest.mark.parametrize(
    "case",
    [
        Case(width=70, lengths=True, dropout=0.3, steps=2, batch=3),
        Case(width=33, dropout=0.3, batch=2, dtype=torch.bfloat16),
        Case(width=33, norm=False, lengths=True, with_out=False, batch=3),
    ],
    ids=str,
)
def test_rows_of_several_blocks(device, kernel, case, monkeypatch):
    monkeypatch.setattr(kernels, "_WIDEST", 32)
    if kernel in (hyper_bwd, main_bwd):
        case = case._replace(steps=1)
    assert_kernel(kernel, case, device)


@runs
@on_devices
@ALL_KERNELS
@pytest.mark.parametrize("width", [513, 1024, 4096])
def test_wide_rows(device, kernel, width):
    assert_kernel(kernel, Case(width=width, batch=2, dropout=0.1, lengths=True), device)


@runs
@on_devices
def test_moments_of_a_large_mean(device):
    """Two passes: gates far from 0 keep the digits of their differences."""
    width = 64
    gates = 1000 + torch.randn(1, 1, 4 * width, generator=torch.Generator().manual_seed(0))
    norm = (torch.ones(4, width), torch.zeros(4, width), torch.ones(width), torch.zeros(width))

    def cell_of(implementation, dtype):
        cell = torch.zeros(1, width, dtype=dtype, device=device)
        hidden = torch.empty(1, 1, width, dtype=dtype, device=device)
        implementation.hyper_fwd(
            gates.to(device, dtype), None, cell, hidden, None, None, *(x.to(device, dtype) for x in norm),
            None, None, 0, 0, 1.0, 0.0,
        )  # fmt: skip
        return cell

    exact, near = cell_of(EAGER, torch.float64), cell_of(EAGER, torch.float32)
    assert_within_budget(cell_of(KERNELS, torch.float32), near, exact, "cell")


# --- dropout ------------------------------------------------------------------------------------------------


@runs
@on_devices
@pytest.mark.parametrize(
    ("p", "seed", "step_offset"),
    [(0.1, 0, 0), (0.5, -1, 2**31 - 2), (0.9, 2**63 - 1, 2**32 - 3), (2**-33, 5, 7), (1 - 2**-34, 5, 7)],
)
@pytest.mark.parametrize(("batch", "width"), [(3, 8), (5, 7)])
def test_masks_are_those_of_the_reference(device, batch, width, p, seed, step_offset):
    """With s(i) = 1, tanh(j) = 1 and s(f) = 0 the cell is what dropout leaves; of both kernels, both ways."""
    steps, first = 2, 5
    key = torch.tensor(seed, device=device)
    gates = torch.tensor([200.0, 200.0, -200.0, 0.0], device=device).repeat_interleave(width)
    gates = gates.expand(steps, batch, 4 * width).contiguous()
    at_zero = torch.tensor([200.0, 0.0, -200.0, 0.0], device=device).repeat_interleave(width)
    at_zero = at_zero.expand(batch, 4 * width).contiguous()
    scales = torch.zeros(12, steps, batch, width, device=device)
    scales[:4] = 1.0
    ones, zeros = torch.ones(width, device=device), torch.zeros(width, device=device)
    bias, none = torch.zeros(4, width, device=device), (None,) * 4
    settings = (None, key, first, step_offset, 0.0, p)

    def empty(*shape):
        return torch.empty(*shape, width, device=device)

    for stream in (MAIN_STREAM, HYPER_STREAM):
        want = dropout_masks(
            steps, batch, width, p=p, seed=key, stream=stream, step_offset=first + step_offset
        )
        cell, cells, nothing = zeros.repeat(batch, 1), empty(steps, batch), torch.zeros_like(gates)
        if stream == MAIN_STREAM:
            KERNELS.main_fwd(
                nothing, gates, scales, bias, cell, None, None, cells, None, None, ones, zeros, *settings
            )
        else:
            hidden = empty(steps, batch)
            KERNELS.hyper_fwd(gates.clone(), None, cell, hidden, None, cells, *none, *settings)
        assert torch.equal(cells != 0, want != 0)
        torch.testing.assert_close(cells, want, rtol=1e-6, atol=0)

        grad_hidden, grad_cell = zeros.repeat(batch, 1), zeros.repeat(batch, 1) + 1
        grad_gates, one_step = torch.empty_like(at_zero), scales[:, 0]
        before, partials = zeros.repeat(batch, 1), torch.zeros(2, 14, width, device=device)
        if stream == MAIN_STREAM:
            KERNELS.main_bwd(
                nothing[0], at_zero, one_step, bias, before, before, None, grad_hidden, grad_cell,
                torch.empty_like(at_zero), grad_gates, torch.empty_like(one_step), partials, None, None, ones,
                zeros, *settings,
            )  # fmt: skip
        else:
            KERNELS.hyper_bwd(
                at_zero, before, before, grad_hidden, grad_cell, grad_gates, partials, *none, *settings
            )
        through_j = grad_gates[:, width : 2 * width]
        torch.testing.assert_close(through_j, want[0], rtol=1e-6, atol=0)


# --- the whole op -------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    steps: int
    batch: int
    inputs: int
    hidden: int
    hyper: int
    embed: int


def module(sizes: Sizes, layer_norm: bool, device: str) -> HyperLSTM:
    """A float64 module all of whose parameters are random: zeros and ones would hide mistakes."""
    torch.manual_seed(1)
    built = HyperLSTM(*sizes[2:], layer_norm=layer_norm).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.4).float())
    return built.to(device)


def results(
    sizes: Sizes, dtype: torch.dtype, impl: str, device: str, *, layer_norm, lengths, backward=True, **options
):
    """Outputs, last state and every gradient by name, of a weighted sum of all outputs."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    parameters = dict(module(sizes, layer_norm, device).to(dtype).named_parameters())
    x = normal(sizes.steps, sizes.batch, sizes.inputs).requires_grad_()
    widths = (sizes.hidden, sizes.hidden, sizes.hyper, sizes.hyper)
    state = tuple(normal(sizes.batch, width).requires_grad_() for width in widths)
    base = normal(sizes.batch, 4 * (sizes.hidden + sizes.hyper)).requires_grad_()
    given = None
    if lengths:
        given = (torch.arange(sizes.batch, device=device) * 2 + 1) % (sizes.steps + 1)
    out, last = hyperlstm(
        x, state, parameters, base=base, lengths=given, seed=12345, step_offset=3, impl=impl, **options
    )
    found = {"out": out, **{f"last {i}": part for i, part in enumerate(last)}}
    if not backward:
        return {name: value.detach() for name, value in found.items()}
    weights = [normal(*part.shape).to(part.dtype) for part in (out, *last)]
    if given is not None:  # what comes back for a step past the end is nobody's
        past = torch.arange(sizes.steps, device=device)[:, None] >= given
        weights[0] = torch.where(past[..., None], torch.nan if impl == "triton" else 0.0, weights[0])
    leaves = {"x": x, "base": base, **{f"state {i}": part for i, part in enumerate(state)}, **parameters}
    grads = torch.autograd.grad((out, *last), tuple(leaves.values()), weights)
    found |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def assert_op(
    sizes: Sizes, device: str, dtype: torch.dtype = torch.float32, autocast: bool = False, **options
):
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        got = results(sizes, dtype, "triton", device, **options)
        again = results(sizes, dtype, "triton", device, **options)
        near = results(sizes, dtype, "reference", device, **options)
    exact = results(sizes, torch.float64, "reference", device, **options)
    floor = 64 * torch.finfo(torch.bfloat16).eps if autocast else 0.0
    for name, mine in got.items():
        assert_same_bits(mine.contiguous(), again[name].contiguous(), name)
        spread = floor * float(exact[name].abs().max()) if floor else 1e-6
        assert_within_budget(mine, near[name], exact[name], name, floor=spread)


@runs
@on_devices
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize(
    ("sizes", "chunk"),
    [(Sizes(3, 3, 4, 12, 8, 3), 2), (Sizes(3, 2, 3, 7, 5, 2), 9), (Sizes(1, 1, 1, 1, 1, 1), 9)],
    ids=str,
)
def test_op(device, sizes, chunk, layer_norm, dropout, monkeypatch):
    """Against the reference in float64: a chunk of two steps and one of one, one chunk, one of everything."""
    monkeypatch.setattr(loop, "chunk_steps", lambda steps, *rest: min(steps, chunk))
    monkeypatch.setattr(loop, "SPAN_ROWS", 1)
    options = {"layer_norm": layer_norm, "recurrent_dropout": dropout}
    assert_op(sizes, device, lengths=sizes.batch > 1, **options)


@runs
@on_devices
def test_op_without_lengths_under_autocast(device):
    assert_op(Sizes(2, 3, 4, 16, 8, 4), device, layer_norm=True, lengths=False, autocast=True)


@runs
@on_devices
def test_no_rows_and_no_steps(device):
    for steps, batch in ((0, 2), (2, 0)):
        options = {"layer_norm": True, "lengths": False, "backward": steps > 0}
        sizes = Sizes(steps, batch, 3, 4, 4, 2)
        found = results(sizes, torch.float32, "triton", device, **options)
        want = results(sizes, torch.float32, "reference", device, **options)
        for name, value in found.items():
            torch.testing.assert_close(value, want[name], rtol=0, atol=0)


def test_programs_share_the_rows():
    assert kernels._programs(256, 256, True) == 128  # two rows each, and not 132 of which four do three
    assert kernels._programs(256, 256, False) == 256
    assert kernels._programs(5, 9, True) == 5
    assert kernels._programs(700, 264, False) == 234
    assert KERNELS.slots(torch.empty(0), 0) == 1
