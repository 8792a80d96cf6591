"""The contract of an op, written once: choice of impl, registration, and the checks every op shares.

An op module defines its schemas with `define`, its public function with the `check_*` functions and
`choose_impl`, and then calls `torch.ops.sketchfast.<name>_<impl>`; the rest is here.
"""

from __future__ import annotations

import importlib.util
import math
import numbers
import operator
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..kernels import native

IMPLS = ("auto", "native", "triton", "reference")

#: What impl="auto" tries, in order. CPU is native wherever it was built. The CUDA order stands for every op
#: that `PREFERENCE_OF_OP` does not name; an entry there is set from what the GPU benchmark showed.
PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}
PREFERENCE_OF_OP: dict[tuple[str, str], tuple[str, ...]] = {}

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

_library = torch.library.Library("sketchfast", "FRAGMENT")


# --- choice of impl ---------------------------------------------------------------------------------------


@cache
def _triton_unavailable_reason(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device_type == "cuda":
        return None
    if device_type != "cpu":
        return f"no Triton kernels exist for device type {device_type!r}"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "on CPU tensors Triton runs only in its interpreter (set TRITON_INTERPRET=1 before the start)"
    return None


def unavailable_reason(impl: str, device_type: str) -> str | None:
    """None where `impl` can run on this device type, else why it cannot."""
    if impl == "reference":
        return None
    if impl == "triton":
        return _triton_unavailable_reason(device_type)
    return native.unavailable_reason(device_type)


def preference(op: str, device_type: str) -> tuple[str, ...]:
    """The impls that impl="auto" tries for this op on this device type, in order."""
    return PREFERENCE_OF_OP.get((op, device_type), PREFERENCE.get(device_type, ("reference",)))


@cache
def _warn_of_slow_path(op: str, device_type: str, reason: str) -> None:
    warnings.warn(
        f"sketchfast: {op} takes the slow reference implementation on {device_type}: {reason}", stacklevel=5
    )


def choose_impl(op: str, impl: str, device_type: str, dtype: torch.dtype) -> str:
    """The impl that serves this call: "native", "triton" or "reference".

    "auto" takes the first of the device's preferences that can run. An explicit impl that cannot run raises
    RuntimeError with the reason; it never falls back.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl != "auto":
        reason = unavailable_reason(impl, device_type) or _dtype_reason(impl, device_type, dtype)
        if reason is not None:
            raise RuntimeError(f"impl={impl!r} of {op} cannot run on {device_type}: {reason}")
        return impl
    missing: list[str] = []
    for candidate in preference(op, device_type):
        reason = unavailable_reason(candidate, device_type)
        if reason is None and _dtype_reason(candidate, device_type, dtype) is None:
            if candidate == "reference" and missing:
                _warn_of_slow_path(op, device_type, "; ".join(missing))
            return candidate
        if reason is not None:
            missing.append(f"{candidate}: {reason}")
    raise AssertionError("reference always runs")


# What torch.compiler.assume_constant_result sets; that function would import torch._dynamo, which takes as
# long as the rest of torch. The arguments are constants of the trace, so the choice is one too.
choose_impl._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _dtype_reason(impl: str, device_type: str, dtype: torch.dtype) -> str | None:
    if dtype is not torch.float64 or impl == "reference" or (impl, device_type) == ("native", "cpu"):
        return None
    return "float64 is computed by impl='reference' and, on CPU, impl='native' only"


# --- registration -----------------------------------------------------------------------------------------


def define(
    module: str,
    name: str,
    signature: str,
    fake: Callable[[str], Callable[..., Any]],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[[str], Callable[..., Any]] | None = None,
    impls: tuple[str, ...] = ("native", "triton"),
    composed: Callable[[str], Callable[..., Any]] | None = None,
) -> None:
    """Registers the ops `sketchfast::<name>_native` and `sketchfast::<name>_triton`, or one of them.

    Native kernels attach themselves when their library is loaded; the Triton one is `<name>` of
    `sketchfast.kernels.triton.<module>`, imported at its first call. `fake(impl)` and `backward(impl)` give
    the fake and the backward formula of that impl; the formula is once differentiable. Without one, the op is
    an end of differentiation. `composed(impl)` is the op's own body, where it is made of smaller kernels.
    """
    for impl in impls:
        qualified = f"sketchfast::{name}_{impl}"
        _library.define(f"{name}_{impl}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualified, fake(impl), lib=_library)
        if backward is not None:
            torch.library.register_autograd(
                qualified, _once_differentiable(backward(impl)), setup_context=setup_context, lib=_library
            )
        body = composed(impl) if composed is not None else _lazy_triton(module, name)
        if impl == "triton" or composed is not None:
            for key in ("CPU", "CUDA"):
                _library.impl(f"{name}_{impl}", body, key)


def define_shared(name: str, signature: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers `sketchfast::<name>`, one op in PyTorch's own terms that every impl and device shares.

    An op rather than a function where tracing must not look inside. An end of differentiation.
    """
    _library.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"sketchfast::{name}", fake, lib=_library)
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)


def _lazy_triton(module: str, name: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        return getattr(import_module(f"sketchfast.kernels.triton.{module}"), name)(*args)

    return launch


class _EndOfDifferentiation(torch.autograd.Function):
    """The identity on a gradient, whose own backward raises. `anchor` requires a gradient, so that it is in
    the graph even where the gradient that came in is a constant."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("the ops of sketchfast are once differentiable: a second backward has no formula")


def _end_of_differentiation(grads: Any) -> Any:
    """The gradients as they are, or, where a graph of them is being made, such that its backward raises."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grads
    if grads is None or isinstance(grads, Tensor):
        return (
            grads
            if grads is None
            else _EndOfDifferentiation.apply(grads, torch.zeros((), requires_grad=True))
        )
    return type(grads)(_end_of_differentiation(g) for g in grads)


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of that name lets a second backward pass in silence where the incoming gradient is a
    constant; this one raises there too."""

    def run(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        return _end_of_differentiation(results)

    return run


class _OnceDifferentiable(torch.autograd.Function):
    """The identity, whose backward cannot be differentiated again."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _end_of_differentiation(grad.detach() if torch.is_grad_enabled() else grad)


def once(x: Tensor) -> Tensor:
    """x, through which one backward passes but not a second: gives the reference the contract of the ops."""
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _OnceDifferentiable.apply(x)
    return x


def full_precision(device_type: str) -> AbstractContextManager:
    """Autocast turned off; the meta device does not know it."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


# --- checks -----------------------------------------------------------------------------------------------


def describe(value: Any) -> str:
    """A value as error messages show it: a tensor by dtype, shape and device, anything else cut short."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def check_tensor(
    name: str,
    value: Any,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...],
    like: Tensor | None = None,
) -> Tensor:
    """`value`, or TypeError (no tensor, wrong dtype) or ValueError (shape, device) that names the argument.

    A string in `shape` stands for any size and is what the message calls it. `like` gives the device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(value)} of type {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {value.layout}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be a tensor of dtype {allowed}, got {describe(value)}")
    fits = value.dim() == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {describe(value)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the first argument is, got {describe(value)}")
    return value


def check_number(
    name: str, value: Any, *, above: float | None = None, at_least: float | None = None
) -> float:
    """`value` as a float, or TypeError (no real number) or ValueError (not finite, out of range)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {describe(value)} of type {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not -math.inf < number < math.inf:  # torch.compile does not trace math.isfinite of a symbolic number
        raise ValueError(f"{name} must be finite, got {describe(value)}")
    if above is not None and not number > above:
        raise ValueError(f"{name} must be greater than {above:g}, got {describe(value)}")
    if at_least is not None and not number >= at_least:
        raise ValueError(f"{name} must be at least {at_least:g}, got {describe(value)}")
    return number


def check_integer(name: str, value: Any, at_least: int, at_most: int | None = None) -> int:
    """`value` as an int, or TypeError (no integer) or ValueError (out of range)."""
    # operator.index would make a constant of a number that torch.compile keeps open
    if type(value) is not int and not isinstance(value, torch.SymInt):
        try:
            if isinstance(value, (bool, Tensor)):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            kind = type(value).__name__
            raise TypeError(f"{name} must be an integer, got {describe(value)} of type {kind}") from None
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value!r}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name} must be at most {at_most}, got {value!r}")
    return value


def check_finite(name: str, value: Tensor) -> None:
    """ValueError that names the first non-finite element; reads the values, so it waits for a GPU."""
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name} must be finite, got {value[where].item()} at index {where}")
