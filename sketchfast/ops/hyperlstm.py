"""HyperLSTM over a whole sequence: validation, schema, autograd, choice of impl.

The fused op is one forward and one backward over all steps (`kernels/hyperlstm_loop.py`); a backend gives it
the kernels between the matrix products. `sketchfast.nn` holds the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import hyperlstm_loop as loop
from ..kernels.reference import hyperlstm as reference
from . import _contract as contract

State = tuple[Tensor, Tensor, Tensor, Tensor]
STATE_NAMES = ("h", "c", "hyper_h", "hyper_c")
#: far from where int64 ends, so that steps can be added
LAST_STEP = 2**62


# --- schemas, fakes, autograd -------------------------------------------------------------------------------
#
# x [T, B, I] of O, contiguous, zero past the end; base [B, 4H + 4Hh] of `dtype`; h, hyper_h of O, cells of A;
# weights as `loop.Weights`. For what O, A and the last four results are, see kernels/hyperlstm_loop.py.

_SETTINGS = "Tensor? lengths, Tensor? seed, SymInt step_offset, float forget_bias, float dropout"


def _kernels(impl: str) -> loop.Kernels:
    """The backend's kernels; imported here, at the first call, as Triton is."""
    if impl == "triton":
        return import_module("sketchfast.kernels.triton.hyperlstm").KERNELS
    return _NATIVE


def _run_forward(impl: str):
    def forward(
        x, base, h, c, hyper_h, hyper_c, weights, lengths, seed, step_offset, forget_bias, dropout, dtype
    ):
        settings = loop.Settings(lengths, seed, step_offset, forget_bias, dropout)
        with contract.full_precision(x.device.type):
            return loop.forward(
                _kernels(impl), x, base, (h, c, hyper_h, hyper_c), loop.Weights(*weights), settings, dtype
            )

    return forward


def _run_backward(impl: str):
    def backward(
        grad_out, grad_h, grad_c, grad_hyper_h, grad_hyper_c, x, base, h, weights,
        lengths, seed, step_offset, forget_bias, dropout,
        out, recurrent, cells, hyper_cells, hyper_hiddens, needs_x,
    ):  # fmt: skip
        settings = loop.Settings(lengths, seed, step_offset, forget_bias, dropout)
        grads = (grad_out, grad_h, grad_c, grad_hyper_h, grad_hyper_c)
        kept = (out, recurrent, cells, hyper_cells, hyper_hiddens)
        with contract.full_precision(x.device.type):
            found = loop.backward(
                _kernels(impl), grads, x, base, h, loop.Weights(*weights), settings, kept, needs_x=needs_x
            )
        return *found[:6], list(found[6:])

    return backward


def _fake_forward(impl: str):
    def forward(
        x, base, h, c, hyper_h, hyper_c, weights, lengths, seed, step_offset, forget_bias, dropout, dtype
    ):
        steps, batch, _ = x.shape
        hidden, hyper = weights[1].shape[1], weights[4].shape[1]
        chunks = loop.chunk_count(steps, batch, hidden, x.device.type)
        return (
            x.new_empty(steps, batch, hidden),
            x.new_empty(batch, hidden),
            c.new_empty(batch, hidden),
            x.new_empty(batch, hyper),
            c.new_empty(batch, hyper),
            x.new_empty(steps, batch, 4 * (hidden + hyper), dtype=dtype),
            c.new_empty(chunks, batch, hidden),
            c.new_empty(chunks, batch, hyper),
            x.new_empty(chunks, batch, hyper, dtype=dtype),
        )

    return forward


def _fake_backward(impl: str):
    def backward(
        grad_out, grad_h, grad_c, grad_hyper_h, grad_hyper_c, x, base, h, weights,
        lengths, seed, step_offset, forget_bias, dropout,
        out, recurrent, cells, hyper_cells, hyper_hiddens, needs_x,
    ):  # fmt: skip
        batch, hyper = x.shape[1], hyper_cells.shape[2]
        return (
            torch.empty_like(x) if needs_x else x.new_empty(0),
            x.new_empty(0, dtype=cells.dtype) if base is None else base.new_empty(base.shape),
            torch.empty_like(h, memory_format=torch.contiguous_format),
            cells.new_empty(batch, cells.shape[2]),
            h.new_empty(batch, hyper),
            cells.new_empty(batch, hyper),
            [weight.new_empty(weight.shape) for weight in weights],
        )

    return backward


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, base, h, _, _, _, weights, lengths, seed, *ctx.numbers, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[5:])
    ctx.weights = len(weights)
    ctx.save_for_backward(x, base, h, *weights, lengths, seed, output[0], *output[5:])


def _backward_formula(impl: str):
    def backward(ctx: Any, *grads: Tensor | None):
        x, base, h, *rest = ctx.saved_tensors
        weights, (lengths, seed, *kept) = rest[: ctx.weights], rest[ctx.weights :]
        none = (None,) * 6
        if all(grad is None for grad in grads[:5]):
            return *none, [None] * ctx.weights, *none
        needs_x = ctx.needs_input_grad[0]
        op = getattr(torch.ops.sketchfast, f"hyperlstm_bwd_{impl}")
        grad_x, grad_base, *state, of_weights = op(
            *grads[:5], x, base, h, weights, lengths, seed, *ctx.numbers, *kept, needs_x
        )
        grad_x, grad_base = grad_x if needs_x else None, None if base is None else grad_base
        return grad_x, grad_base, *state, of_weights, *none

    return backward


contract.define(
    "hyperlstm",
    "hyperlstm_bwd",
    "(Tensor? grad_out, Tensor? grad_h, Tensor? grad_c, Tensor? grad_hyper_h, Tensor? grad_hyper_c,"
    f" Tensor x, Tensor? base, Tensor h, Tensor[] weights, {_SETTINGS}, Tensor out, Tensor recurrent,"
    " Tensor cells, Tensor hyper_cells, Tensor hyper_hiddens, bool needs_x)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _fake_backward,
    composed=_run_backward,
)
contract.define(
    "hyperlstm",
    "hyperlstm_fwd",
    "(Tensor x, Tensor? base, Tensor h, Tensor c, Tensor hyper_h, Tensor hyper_c, Tensor[] weights,"
    f" {_SETTINGS}, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
    setup_context=_setup,
    backward=_backward_formula,
    composed=_run_forward,
)

# The native kernels of one step or chunk; arguments as `loop.Kernels` explains them.
_NORM = "Tensor? ln_weight, Tensor? ln_bias, Tensor? ln_c_weight, Tensor? ln_c_bias"
_STEP = "Tensor? lengths, Tensor? seed, int step, int step_offset, float forget_bias, float dropout"


def _fake_step(impl: str):
    return lambda *args: None


for _name, _signature in {
    "hyperlstm_hyper_fwd": (
        "(Tensor(a!) gates, Tensor? x_part, Tensor(b!) cell, Tensor(c!) hidden, Tensor(d!)? last,"
        " Tensor(e!)? cells"
    ),
    "hyperlstm_main_fwd": (
        "(Tensor recurrent, Tensor x_part, Tensor scales, Tensor bias, Tensor(a!) cell, Tensor(b!)? out,"
        " Tensor(c!)? hidden, Tensor(d!)? cells"
    ),
    "hyperlstm_main_bwd": (
        "(Tensor recurrent, Tensor x_part, Tensor scales, Tensor bias, Tensor cell_before, Tensor cell_after,"
        " Tensor? grad_out, Tensor(a!) grad_hidden, Tensor(b!) grad_cell, Tensor(c!) grad_recurrent,"
        " Tensor(d!) grad_x_part, Tensor(e!) grad_scales, Tensor(f!) partials"
    ),
    "hyperlstm_hyper_bwd": (
        "(Tensor gates, Tensor cell_before, Tensor cell_after, Tensor(a!) grad_hidden, Tensor(b!) grad_cell,"
        " Tensor(c!) grad_gates, Tensor(d!) partials"
    ),
}.items():
    contract.define(
        "hyperlstm", _name, f"{_signature}, {_NORM}, {_STEP}) -> ()", _fake_step, impls=("native",)
    )


# Single-precision products on CPU; see csrc/cpu/hyperlstm_products.cpp.
contract.define(
    "hyperlstm",
    "hyperlstm_pack",
    "(Tensor b) -> Tensor",
    lambda impl: lambda b: b.new_empty(b.numel()),  # the panels' width is the CPU's
    impls=("native",),
)
contract.define(
    "hyperlstm",
    "hyperlstm_product",
    "(Tensor a, Tensor b, Tensor(a!) out, bool packed, bool add) -> ()",
    _fake_step,
    impls=("native",),
)


class _Packed(NamedTuple):
    """A weight as the library's product takes it, packed once for all steps."""

    panels: Tensor


@cache
def _has_wide_products() -> bool:
    """Whether the CPU library's own products run on AVX-512 or AVX2; the baseline is left to torch's."""
    panels = torch.ops.sketchfast.hyperlstm_pack_native(torch.zeros(1, 1, dtype=torch.float32, device="cpu"))
    return panels.shape[-1] >= 24


class _WideProducts(loop.Products):
    """Single precision on a CPU with AVX-512 or AVX2, by the compiled library."""

    def stationary(self, weight: Tensor) -> Any:
        return _Packed(torch.ops.sketchfast.hyperlstm_pack_native(weight))

    def _product(self, a: Tensor, b: Tensor | _Packed, out: Tensor, add: bool) -> None:
        packed = isinstance(b, _Packed)
        held = b.panels if isinstance(b, _Packed) else b
        torch.ops.sketchfast.hyperlstm_product_native(a, held, out, packed, add)

    def mm(self, a: Tensor, b: Any, out: Tensor, *, add: bool = False) -> None:
        self._product(a, b, out, add)

    def affine(self, a: Tensor, b: Any, bias: Tensor, out: Tensor) -> None:
        out.copy_(bias.expand_as(out))
        self._product(a, b, out, True)

    def bmm(self, a: Tensor, b: Any, out: Tensor) -> None:
        self._product(a, b, out, False)

    def accumulate(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        if 4 * b.shape[-1] > a.shape[-2]:
            return self._product(a, b, total, True)
        # a narrow product would use a part of each tile: its transpose uses all of it
        turned = total.new_empty((*total.shape[:-2], total.shape[-1], total.shape[-2]))
        self._product(b.transpose(-1, -2), a.transpose(-1, -2), turned, False)
        total.add_(turned.transpose(-1, -2))
        return None


class _NativeKernels:
    """`loop.Kernels` by the compiled library, on either device."""

    def slots(self, like: Tensor, batch: int) -> int:
        # a slot is a thread's on CPU, a block's on CUDA: enough of them to fill any GPU there is
        return torch.get_num_threads() if like.device.type == "cpu" else min(max(batch, 1), 264)

    def products(self, like: Tensor) -> loop.Products:
        own = like.device.type == "cpu" and like.dtype == torch.float32 and _has_wide_products()
        return _WideProducts() if own else loop.Products()

    def hyper_fwd(self, *args: Any) -> None:
        torch.ops.sketchfast.hyperlstm_hyper_fwd_native(*args)

    def main_fwd(self, *args: Any) -> None:
        torch.ops.sketchfast.hyperlstm_main_fwd_native(*args)

    def main_bwd(self, *args: Any) -> None:
        torch.ops.sketchfast.hyperlstm_main_bwd_native(*args)

    def hyper_bwd(self, *args: Any) -> None:
        torch.ops.sketchfast.hyperlstm_hyper_bwd_native(*args)


_NATIVE = _NativeKernels()


# --- the public function ------------------------------------------------------------------------------------


def draw_seed(device: torch.device) -> Tensor:
    """An int64 scalar from torch's generator on `device`."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def _check_state(state: Any, sizes: tuple[int, ...], batch: int, like: Tensor) -> State:
    if not isinstance(state, (tuple, list)) or len(state) != 4:
        raise TypeError(f"state must be a tuple (h, c, hyper_h, hyper_c), got {type(state).__name__}")
    for name, part, size in zip(STATE_NAMES, state, sizes, strict=True):
        contract.check_tensor(f"state's {name}", part, (batch, size), contract.FLOAT_DTYPES, like=like)
    h, c, hyper_h, hyper_c = state
    return h, c, hyper_h, hyper_c


def _check_seed(seed: Any) -> Tensor | int | None:
    if seed is None:
        return None
    if isinstance(seed, Tensor):
        return contract.check_tensor("seed", seed, (), (torch.int64,))
    return contract.check_integer("seed", seed, -(2**63), 2**63 - 1)


def _seed_on(device: torch.device, seed: Tensor | int | None) -> Tensor:
    if seed is None:
        return draw_seed(device)
    return torch.as_tensor(seed, dtype=torch.int64, device=device)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast has products in on x's device, None where it is off or leaves float64 alone."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def check_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    """TypeError where x has not the parameters' dtype; autocast, which casts all but float64, forgives it."""
    if x.dtype == weight.dtype:
        return
    if _autocast_dtype(x) is None or weight.dtype == torch.float64:
        wanted = str(weight.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be of dtype {wanted} as the parameters are, got {contract.describe(x)}")


def hyperlstm(
    x: Tensor,
    state: State | None,
    params: Mapping[str, Tensor],
    *,
    base: Tensor | None = None,
    lengths: Tensor | None = None,
    forget_bias: float = 1.0,
    recurrent_dropout: float = 0.0,
    seed: Tensor | int | None = None,
    step_offset: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, State]:
    """HyperLSTM; see `sketchfast.nn.HyperLSTM` for the equations, and for what each argument is.

    `params` maps the parameter names of that module to tensors; `recurrent_dropout` is applied where it is
    above 0, whatever the mode of the module. `base` [B, 4H + 4Hh] is added to the products of x with
    `weight_ih` and with the x columns of `hyper_weight_ih` at every step: what an input that is constant over
    time comes to.
    """
    inputs = params["weight_ih"].shape[1]
    hidden, hyper = params["weight_hh"].shape[1], params["hyper_weight_hh"].shape[1]
    contract.check_tensor("x", x, ("T", "B", inputs), contract.FLOAT_DTYPES, like=params["weight_ih"])
    check_dtype("x", x, params["weight_ih"])
    impl = contract.choose_impl("hyperlstm", impl, x.device.type, x.dtype)
    steps, batch, _ = x.shape
    if base is not None:
        contract.check_tensor("base", base, (batch, 4 * (hidden + hyper)), contract.FLOAT_DTYPES, like=x)
    if state is None:
        state = tuple(x.new_zeros(batch, size) for size in (hidden, hidden, hyper, hyper))  # type: ignore[assignment]
    state = _check_state(state, (hidden, hidden, hyper, hyper), batch, x)
    if lengths is not None:
        contract.check_tensor("lengths", lengths, (batch,), contract.INTEGER_DTYPES, like=x)
    contract.check_integer("step_offset", step_offset, 0, LAST_STEP)
    seed = _check_seed(seed)
    seed = _seed_on(x.device, seed) if recurrent_dropout > 0 else None
    if lengths is not None:
        live = torch.arange(steps, device=x.device)[:, None] < lengths[None]
        x = torch.where(
            live[..., None], x, x.new_zeros(())
        )  # what lies past the end may be anything, NaN too
    if impl == "reference":
        out, last = reference.hyperlstm(
            x,
            state,
            params,
            base=base,
            lengths=lengths,
            forget_bias=forget_bias,
            recurrent_dropout=recurrent_dropout,
            seed=seed,
            step_offset=step_offset,
        )
        return contract.once(out), tuple(contract.once(part) for part in last)  # type: ignore[return-value]
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype = _autocast_dtype(x) or x.dtype
    h, c, hyper_h, hyper_c = state
    out, *last = getattr(torch.ops.sketchfast, f"hyperlstm_fwd_{impl}")(
        x.contiguous(),
        None if base is None else base.to(dtype),
        h.to(x.dtype),
        c.to(accumulate),
        hyper_h.to(x.dtype),
        hyper_c.to(accumulate),
        [params[name] for name in loop.Weights._fields if name in params],
        None if lengths is None else lengths.long(),
        seed,
        step_offset,
        forget_bias,
        float(recurrent_dropout),
        dtype,
    )[:5]
    return out, tuple(last)  # type: ignore[return-value]
