"""The CUDA kernels of the HyperLSTM, run by the CPU emulator in tests/cuda_emulator: each against the eager
kernels in float64, and the whole loop over them against the reference.

What it proves and what it cannot is as in test_raster_cuda_emulated.py. What a call writes is NaN before, and
so is what lies past a row's end, behind a row and around every tensor.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from emulated import DTYPES, H200_SHARED, SCHEDULES, Guarded, build
from hyperlstm_eager import EagerKernels
from torch import Tensor

from sketchfast.kernels import hyperlstm_loop as loop
from sketchfast.kernels.reference import hyperlstm as reference
from sketchfast.testing import assert_same_bits, assert_within_budget

#: In the order of the structure Call in hyperlstm_emulated.cpp.
ARRAYS = (
    "gates", "x_part", "scales", "cell", "hidden", "shown", "cells", "cell_before", "cell_after", "grad_out",
    "grad_hidden", "grad_cell", "grad_gates", "grad_x_part", "grad_scales",
)  # fmt: skip
POINTERS = ("bias", "ln_weight", "ln_bias", "ln_c_weight", "ln_c_bias", "partials", "lengths", "seed")
INTEGERS = ("batch", "width", "steps", "first", "step_offset", "slots", "shared_limit")
NORM = ("ln_weight", "ln_bias", "ln_c_weight", "ln_c_bias")
STEP = ("lengths", "seed", "step", "step_offset", "forget_bias", "dropout")
#: The arguments of `loop.Kernels`, in order.
ARGUMENTS = {
    "hyper_fwd": ("gates", "x_part", "cell", "hidden", "last", "cells"),
    "main_fwd": ("recurrent", "x_part", "scales", "bias", "cell", "out", "hidden", "cells"),
    "main_bwd": (
        "recurrent", "x_part", "scales", "bias", "cell_before", "cell_after", "grad_out", "grad_hidden",
        "grad_cell", "grad_recurrent", "grad_x_part", "grad_scales", "partials",
    ),
    "hyper_bwd": (
        "gates", "cell_before", "cell_after", "grad_hidden", "grad_cell", "grad_gates", "partials",
    ),
}  # fmt: skip
#: Where the structure has another name.
FIELDS = {"recurrent": "gates", "last": "shown", "out": "shown", "grad_recurrent": "grad_gates"}
FIELDS |= {"step": "first"}
UNALIGNED = 3


class _Array(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("dtype", "part", "step", "row")),
    ]

    @classmethod
    def of(cls, tensor: Tensor, parts: bool) -> _Array:
        """[(parts,) (steps,) rows, units]"""
        assert tensor.shape[-1] == 1 or tensor.stride(-1) == 1
        strides = [
            stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ]
        part = strides.pop(0) if parts else 0
        step, row = [0, *strides][-3:-1]
        return cls(tensor.data_ptr(), DTYPES[tensor.dtype], part, step, row)


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, _Array) for name in ARRAYS),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in INTEGERS),
        *((name, ctypes.c_double) for name in ("forget_bias", "dropout")),
    ]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = build("hyperlstm_emulated.cpp", tmp_path_factory.mktemp("emulator"))
    for name in ARGUMENTS:
        getattr(loaded, f"hyperlstm_{name}").restype = ctypes.c_char_p
    return loaded


@dataclass
class Emulated:
    """`loop.Kernels` by the emulator."""

    library: ctypes.CDLL
    schedule: str = "forward"
    shared_limit: int = H200_SHARED
    most_slots: int = 264
    launches: int = 0

    def slots(self, like: Tensor, batch: int) -> int:
        return min(max(batch, 1), self.most_slots)

    def products(self, like: Tensor) -> loop.Products:
        return loop.Products()

    def call(self, kernel: str, *values: Any) -> None:
        given = dict(zip((*ARGUMENTS[kernel], *NORM, *STEP), values, strict=True))
        gates = given.get("gates", given.get("recurrent"))
        call = _Call(shared_limit=self.shared_limit)
        call.batch, call.width = gates.shape[-2], gates.shape[-1] // 4
        call.steps = gates.shape[0] if gates.dim() == 3 else 1
        for name, value in given.items():
            place = FIELDS.get(name, name)
            if not isinstance(value, Tensor):
                if value is not None:
                    setattr(call, place, value)
            elif place in ARRAYS:
                setattr(call, place, _Array.of(value, parts=place.endswith("scales")))
            else:
                assert value.is_contiguous()
                setattr(call, place, value.data_ptr())
        if given.get("partials") is not None:
            call.slots = len(given["partials"])
        self.library.set_schedule(SCHEDULES[self.schedule], 12345)
        error = getattr(self.library, f"hyperlstm_{kernel}")(ctypes.byref(call))
        if error is not None:
            raise RuntimeError(error.decode())
        self.launches += self.library.launches()

    def hyper_fwd(self, *values: Any) -> None:
        self.call("hyper_fwd", *values)

    def main_fwd(self, *values: Any) -> None:
        self.call("main_fwd", *values)

    def main_bwd(self, *values: Any) -> None:
        self.call("main_bwd", *values)

    def hyper_bwd(self, *values: Any) -> None:
        self.call("hyper_bwd", *values)


# --- one kernel ---------------------------------------------------------------------------------------------


@dataclass
class Case:
    """The arguments of one call."""

    kernel: str
    width: int = 8
    batch: int = 3
    steps: int = 1
    dtype: torch.dtype = torch.float32
    shown_dtype: torch.dtype = torch.float32
    layer_norm: bool = True
    lengths: tuple[int, ...] | None = None
    first: int = 2
    dropout: float = 0.0
    behind: int = 8  # elements behind a row of gates,
    apart: int = 8  # and behind each of the twelve scales
    slots: int = 2
    absent: tuple[str, ...] = ()
    schedule: str = "forward"
    shared_limit: int = H200_SHARED

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        low, wide = self.dtype, torch.float32
        rows, gates = (self.batch, self.width), (self.batch, 4 * self.width)
        steps = (self.steps,) if self.kernel.endswith("fwd") else ()
        norm = {"ln_weight": (4, self.width), "ln_bias": (4, self.width)} if self.layer_norm else {}
        if self.layer_norm or self.kernel.startswith("main"):
            norm |= {"ln_c_weight": rows[1:], "ln_c_bias": rows[1:]}
        shapes = {name: (shape, wide) for name, shape in norm.items()}
        for name in ARGUMENTS[self.kernel]:
            if name in ("gates", "recurrent", "x_part", "grad_recurrent", "grad_x_part", "grad_gates"):
                shapes[name] = ((*steps, *gates), low)
            elif name in ("scales", "grad_scales"):
                shapes[name] = ((12, *steps, *rows), low)
            elif name in ("cell", "cell_before", "cell_after", "grad_cell"):
                shapes[name] = (rows, wide)
            elif name == "cells":
                shapes[name] = ((*steps, *rows), wide)
            elif name == "hidden":
                shapes[name] = (rows if self.kernel == "main_fwd" else (*steps, *rows), low)
            elif name in ("last", "grad_out"):
                shapes[name] = (rows, self.shown_dtype)
            elif name == "out":
                shapes[name] = ((*steps, *rows), self.shown_dtype)
            elif name == "grad_hidden":
                shapes[name] = (rows, low)
            elif name == "bias":
                shapes[name] = ((4, self.width), wide)
            elif name == "partials":
                shapes[name] = ((self.slots, 14 if self.kernel == "main_bwd" else 10, self.width), wide)
        return {name: value for name, value in shapes.items() if name not in self.absent}

    def values(self) -> dict[str, Tensor]:
        """Random; a tensor that is only written is NaN."""
        random = torch.Generator().manual_seed(self.width + self.batch)
        made = {}
        for name, (shape, dtype) in self.shapes().items():
            value = torch.randn(shape, generator=random)
            if name in WRITTEN[self.kernel]:
                value.fill_(torch.nan)
            made[name] = value.to(dtype)
        if "cell_after" in made:
            made["cell_after"] = self.cell_after(made).float()
        return made

    def cell_after(self, values: dict[str, Tensor]) -> Tensor:
        """What the eager kernels make of `cell_before`, in float64."""
        v = {name: value.double() for name, value in values.items()}
        cell, norm = v["cell_before"], [v.get(name) for name in NORM]
        if self.kernel == "hyper_bwd":
            EagerKernels().hyper_fwd(
                v["gates"][None], None, cell, cell.new_empty(1, *cell.shape), None, None, *norm,
                *self.arguments({})[-len(STEP) :],
            )  # fmt: skip
        else:
            EagerKernels().main_fwd(
                v["recurrent"][None], v["x_part"][None], v["scales"][:, None], v["bias"], cell, None, None,
                None, *norm, *self.arguments({})[-len(STEP) :],
            )  # fmt: skip
        return cell

    def arguments(self, values: dict[str, Tensor]) -> list[Any]:
        lengths = None if self.lengths is None else torch.tensor(self.lengths)
        seed = torch.tensor(-(2**61) - 12345) if self.dropout else None
        tail = [lengths, seed, self.first, 7, 0.6, self.dropout]
        return [values.get(name) for name in (*ARGUMENTS[self.kernel], *NORM)] + tail

    def live(self) -> Tensor:
        """[steps, batch]"""
        steps = torch.arange(self.first, self.first + self.steps)[:, None]
        if self.lengths is None:
            return torch.ones(self.steps, self.batch, dtype=torch.bool)
        return steps < torch.tensor(self.lengths)[None]


WRITTEN = {
    "hyper_fwd": ("hidden", "cells"),
    "main_fwd": ("out", "hidden", "cells"),
    "main_bwd": ("grad_recurrent", "grad_x_part", "grad_scales"),
    "hyper_bwd": ("grad_gates",),
}
#: What is read of a row past its end: nothing of these.
NAN_PAST_END = ("gates", "recurrent", "x_part", "scales", "cell_before", "cell_after", "grad_out")
STRIDED = ("gates", "recurrent", "grad_recurrent", "grad_gates")


def run_emulated(library: ctypes.CDLL, case: Case) -> dict[str, Tensor]:
    """Every tensor after the call, of guarded copies; gates are columns of wider rows, scales lie apart."""
    memory, held, whole = Guarded(), {}, {}
    live = case.live()
    for name, value in case.values().items():
        if name in STRIDED:
            whole[name] = memory.empty((*value.shape[:-1], value.shape[-1] + case.behind), value.dtype)
            held[name] = whole[name][..., : value.shape[-1]].copy_(value)
        elif name.endswith("scales"):
            size = value[0].numel()
            whole[name] = memory.empty((12, size + case.apart), value.dtype)
            held[name] = whole[name][:, :size].view(value.shape).copy_(value)
        else:
            held[name] = memory.copy(value)
        if name in NAN_PAST_END:
            rows = live if value.dim() >= 3 and case.kernel.endswith("fwd") else live[0]
            held[name].masked_fill_(~rows[..., None], torch.nan)
    kernels = Emulated(library, case.schedule, case.shared_limit)
    kernels.call(case.kernel, *case.arguments(held))
    assert kernels.launches == 1
    memory.check()
    for name, value in whole.items():
        gap = case.apart if name.endswith("scales") else case.behind
        assert value[..., value.shape[-1] - gap :].isnan().all(), f"{name}: written behind its rows"
    return held


def run_eager(case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The same by the eager kernels, in `dtype` all of it or in the case's."""
    held = {
        name: value.clone() if dtype is None else value.to(dtype) for name, value in case.values().items()
    }
    getattr(EagerKernels(), case.kernel)(*case.arguments(held))
    if "gates" in held and "x_part" in held:  # past the end nobody reads the whole gates
        held["gates"].masked_fill_(~case.live()[..., None], 0.0)
    return held


def check(library: ctypes.CDLL, case: Case) -> dict[str, Tensor]:
    got = run_emulated(library, case)
    eager, exact = run_eager(case), run_eager(case, torch.float64)
    for name, value in got.items():
        if name in NAN_PAST_END and name != "gates":
            continue
        if name == "gates" and "x_part" not in got:
            continue
        ours, others = value, (eager[name], exact[name])
        if name == "partials":
            ours, others = value.sum(0), tuple(other.sum(0) for other in others)
        assert_within_budget(ours, *others, f"{case.kernel}: {name}")
    live = case.live()
    if case.kernel.endswith("bwd"):
        for name in ("grad_hidden", "grad_cell"):  # incoming gradients past the end stay as they are
            assert_same_bits(got[name][~live[0]], case.values()[name][~live[0]], name)
        for name in WRITTEN[case.kernel]:
            assert not got[name][..., ~live[0], :].any(), name
    return got


LENGTHS = (3, 0, 9, 2, -4, 5, 4)  # against steps from 2 on
WIDTHS = (1, 5, 8, 33, 132, 1024)


@pytest.mark.parametrize("kernel", ARGUMENTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(library, kernel, width):
    schedule = list(SCHEDULES)[width % 4]
    check(library, Case(kernel, width=width, schedule=schedule))
    check(library, Case(kernel, width=width, layer_norm=False, dropout=0.4, behind=UNALIGNED))


@pytest.mark.parametrize("kernel", ARGUMENTS)
@pytest.mark.parametrize("gap", ["behind", "apart"])
def test_what_is_not_aligned_is_read_unit_by_unit(library, kernel, gap):
    check(library, replace(Case(kernel, width=12), **{gap: UNALIGNED}))


@pytest.mark.parametrize("kernel", ARGUMENTS)
@pytest.mark.parametrize("width", [2048, 2052, 4096])
def test_large_widths(library, kernel, width):
    """The widest in registers, the first beyond, and what any GPU here must take."""
    check(library, Case(kernel, width=width, batch=1, dropout=0.3, slots=1))


@pytest.mark.parametrize("kernel", ARGUMENTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("width", [7, 20])
def test_everything_at_once(library, kernel, schedule, width):
    """Lengths, dropout, strided gates, more rows than slots; odd widths and such that are aligned."""
    steps = 3 if kernel.endswith("fwd") else 1
    case = Case(
        kernel, width=width, batch=7, steps=steps, lengths=LENGTHS, dropout=0.5, schedule=schedule,
    )  # fmt: skip
    check(library, case)
    check(library, replace(case, layer_norm=False, behind=UNALIGNED, first=0))


@pytest.mark.parametrize("kernel", ARGUMENTS)
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [6, 36])
def test_dtypes(library, kernel, low, width):
    """x and out in the products' dtype, and, as under autocast, in float32."""
    for shown in (low, torch.float32):
        case = Case(kernel, width=width, batch=7, lengths=LENGTHS, dropout=0.2, dtype=low, shown_dtype=shown)
        check(library, case)


@pytest.mark.parametrize("width", [9, 12])
def test_hyper_fwd_goes_on_with_the_rounded_sum(library, width):
    """As backward, which has nothing else, will see it."""
    case = Case("hyper_fwd", width=width, dtype=torch.bfloat16)
    first = run_emulated(library, case)
    values = case.values() | {"gates": first["gates"]}
    values.pop("x_part")
    Emulated(library).hyper_fwd(*case.arguments(values))
    for name in ("cell", "hidden", "last"):
        assert_same_bits(first[name], values[name], name)


@pytest.mark.parametrize("width", [5, 64])
def test_absent_arguments(library, width):
    for absent in (("x_part",), ("last",), ("cells",), ("x_part", "last")):
        check(library, Case("hyper_fwd", width=width, steps=2, absent=absent))
    for absent in (("out",), ("hidden",), ("cells",), ("out", "hidden")):
        check(library, Case("main_fwd", width=width, steps=2, absent=absent))
    check(library, Case("main_bwd", width=width, absent=("grad_out",)))


@pytest.mark.parametrize("kernel", ["hyper_bwd", "main_bwd"])
@pytest.mark.parametrize(("batch", "slots"), [(300, 264), (300, 3), (133, 1)], ids=str)
def test_many_rows(library, kernel, batch, slots):
    """Several rows a CTA at a time, and one after another; the last of them past the batch."""
    lengths = tuple(int(n) for n in torch.randint(0, 6, (batch,), generator=torch.Generator().manual_seed(1)))
    check(library, Case(kernel, width=4, batch=batch, slots=slots, lengths=lengths, schedule="shuffled"))


@pytest.mark.parametrize("kernel", ARGUMENTS)
def test_no_schedule_changes_bits(library, kernel):
    for width in (9, 136):
        case = Case(kernel, width=width, batch=5, steps=2 if kernel.endswith("fwd") else 1, dropout=0.1)
        first, *others = (run_emulated(library, replace(case, schedule=name)) for name in SCHEDULES)
        for other in others:
            for name, value in first.items():
                assert_same_bits(value, other[name], name)


def test_the_rule_of_shared_memory(library):
    """Sums over rows that do not fit stay in memory; a row that does not fit is refused."""
    for kernel in ("main_bwd", "hyper_bwd"):
        check(library, Case(kernel, width=64, shared_limit=4000))
        with pytest.raises(RuntimeError, match="more than the shared memory holds"):
            run_emulated(library, Case(kernel, width=64, shared_limit=1000))
    with pytest.raises(RuntimeError, match="more than the shared memory holds"):
        run_emulated(library, Case("main_fwd", width=63, shared_limit=1000))


@pytest.mark.parametrize("kernel", ARGUMENTS)
def test_nothing_to_do(library, kernel):
    kernels = Emulated(library)
    case = Case(kernel, batch=0)
    kernels.call(kernel, *case.arguments(case.values()))
    assert kernels.launches == 0


# --- the whole op -------------------------------------------------------------------------------------------


@dataclass
class Whole:
    """A sequence, its state and parameters, and what gradients come in."""

    hidden: int = 8
    hyper: int = 4
    steps: int = 9
    batch: int = 3
    layer_norm: bool = True
    lengths: tuple[int, ...] | None = None
    dropout: float = 0.0
    base: bool = False
    inputs: int = 3
    embed: int = 2

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Sequence and state, parameters; float64."""
        random = torch.Generator().manual_seed(self.hidden)
        H, K, E, size = self.hidden, self.hyper, self.embed, self.inputs

        def draw(*shape: int) -> Tensor:
            return 0.6 * torch.randn(shape, generator=random, dtype=torch.float64)

        x = draw(self.steps, self.batch, size)
        if self.lengths is not None:
            x *= (torch.arange(self.steps)[:, None] < torch.tensor(self.lengths))[..., None]
        data = {"x": x, "h": draw(self.batch, H), "c": draw(self.batch, H), "hyper_h": draw(self.batch, K)}
        data["hyper_c"] = draw(self.batch, K)
        if self.base:
            data["base"] = draw(self.batch, 4 * (H + K))
        shapes = {
            "weight_ih": (4 * H, size), "weight_hh": (4 * H, H), "bias": (4 * H,),
            "hyper_weight_ih": (4 * K, size + H), "hyper_weight_hh": (4 * K, K), "z_weight": (8, E, K),
            "z_bias": (8, E), "alpha_weight": (8, H, E), "zb_weight": (4, E, K), "beta_weight": (4, H, E),
            "ln_c_weight": (H,), "ln_c_bias": (H,),
        }  # fmt: skip
        if self.layer_norm:
            shapes |= {"ln_weight": (4, H), "ln_bias": (4, H), "hyper_ln_weight": (4, K)}
            shapes |= {"hyper_ln_bias": (4, K), "hyper_ln_c_weight": (K,), "hyper_ln_c_bias": (K,)}
        return data, {name: draw(*shape) for name, shape in shapes.items()}

    def gradients(self) -> list[Tensor]:
        random = torch.Generator().manual_seed(3)
        shapes = [(self.steps, self.batch, self.hidden), *[(self.batch, self.hidden)] * 2]
        shapes += [(self.batch, self.hyper)] * 2
        return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]

    def settings(self) -> loop.Settings:
        lengths = None if self.lengths is None else torch.tensor(self.lengths)
        seed = torch.tensor(987654321) if self.dropout else None
        return loop.Settings(lengths, seed, 11, 0.8, self.dropout)


def run_reference(whole: Whole, dtype: torch.dtype) -> dict[str, Tensor]:
    data, params = whole.tensors()
    leaves = {name: value.to(dtype).requires_grad_() for name, value in (data | params).items()}
    settings = whole.settings()
    out, last = reference.hyperlstm(
        leaves["x"], tuple(leaves[name] for name in ("h", "c", "hyper_h", "hyper_c")),
        {name: leaves[name] for name in params}, base=leaves.get("base"), lengths=settings.lengths,
        forget_bias=settings.forget_bias, recurrent_dropout=settings.dropout, seed=settings.seed,
        step_offset=settings.step_offset,
    )  # fmt: skip
    results = (out, *last)
    grads = [grad.to(result.dtype) for grad, result in zip(whole.gradients(), results, strict=True)]
    found = torch.autograd.grad(results, list(leaves.values()), grads)
    named = {f"grad of {name}": grad for name, grad in zip(leaves, found, strict=True)}
    values = [result.detach() for result in results]
    return dict(zip(("out", "h", "c", "hyper_h", "hyper_c"), values, strict=True)) | named


def run_loop(
    kernels: loop.Kernels, whole: Whole, low: torch.dtype = torch.float32, shown: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Products in `low`, x and out in `shown`, cells in float32."""
    data, params = whole.tensors()
    wide = {"c", "hyper_c"}
    data = {name: value.float() if name in wide else value.to(shown) for name, value in data.items()}
    params = {name: value.to(shown) for name, value in params.items()}
    base = data["base"].to(low) if whole.base else None
    weights = loop.Weights(**params)
    state = [data[name] for name in ("h", "c", "hyper_h", "hyper_c")]
    out, h, c, hyper_h, hyper_c, *kept = loop.forward(
        kernels, data["x"], base, state, weights, whole.settings(), low
    )
    results = (out, h, c, hyper_h, hyper_c)
    grads = [grad.to(result.dtype) for grad, result in zip(whole.gradients(), results, strict=True)]
    found = loop.backward(
        kernels, grads, data["x"], base, data["h"], weights, whole.settings(), (out, *kept), needs_x=True
    )
    names = ["x", "base", "h", "c", "hyper_h", "hyper_c", *(n for n in weights._fields if n in params)]
    named = {f"grad of {name}": grad for name, grad in zip(names, found, strict=True)}
    if base is None:
        named.pop("grad of base")
    return dict(zip(("out", "h", "c", "hyper_h", "hyper_c"), results, strict=True)) | named


WHOLES = {
    "plain": Whole(),
    "no layer norm": Whole(layer_norm=False, base=True),
    "dropout": Whole(dropout=0.4, hidden=12, hyper=8),
    "lengths": Whole(lengths=(5, 2, 0, 19, -1), batch=5, dropout=0.2, base=True),
    "odd": Whole(hidden=7, hyper=5, lengths=(3, 8, 1), dropout=0.3),
    "one unit": Whole(hidden=1, hyper=1, batch=1),
    "one step": Whole(steps=1, batch=2),
    "larger": Whole(hidden=68, hyper=36, batch=4, steps=5),
}


def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four steps, two of them a span of the big weights' gradients where there are four rows or fewer."""
    monkeypatch.setattr(loop, "CHUNK_ELEMENTS", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(loop, "SPAN_ROWS", 32)


@pytest.mark.parametrize("name", WHOLES)
def test_whole_op(library, name, monkeypatch):
    """Values and every gradient, over several chunks; batches larger than the slots."""
    whole = WHOLES[name]
    short_chunks(monkeypatch)
    got = run_loop(Emulated(library, "shuffled", most_slots=2), whole)
    eager, exact = run_reference(whole, torch.float32), run_reference(whole, torch.float64)
    for key, value in got.items():
        assert_within_budget(value, eager[key], exact[key], key)


@pytest.mark.parametrize("shown", [torch.float32, torch.bfloat16], ids=str)
def test_whole_op_in_bfloat16(library, shown, monkeypatch):
    """Against the same loop of eager kernels: autocast, and parameters that are bfloat16 themselves."""
    whole = replace(WHOLES["lengths"], hidden=12)
    short_chunks(monkeypatch)
    got = run_loop(Emulated(library), whole, torch.bfloat16, shown)
    eager = run_loop(EagerKernels(), whole, torch.bfloat16, shown)
    exact = run_reference(whole, torch.float64)
    for key, value in got.items():
        assert_within_budget(value, eager[key], exact[key], key)


def test_same_bits_twice(library, monkeypatch):
    whole = WHOLES["lengths"]
    short_chunks(monkeypatch)
    first, second = (run_loop(Emulated(library, name), whole) for name in ("greedy", "reverse"))
    for key, value in first.items():
        assert_same_bits(value, second[key], key)
