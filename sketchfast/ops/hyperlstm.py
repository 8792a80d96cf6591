"""HyperLSTM over a whole sequence: validation, choice of impl, call. `sketchfast.nn` holds the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import hyperlstm as reference
from ._contract import FLOAT_DTYPES, IMPLS, INTEGER_DTYPES, check_integer, check_tensor, describe

State = tuple[Tensor, Tensor, Tensor, Tensor]
STATE_NAMES = ("h", "c", "hyper_h", "hyper_c")


def check_impl(impl: str) -> None:
    """ValueError where `impl` is unknown, or names a fused kernel: none is written for this op so far."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl in ("native", "triton"):
        raise ValueError(
            f"impl must be 'auto' or 'reference': the fused HyperLSTM kernel does not exist yet, got {impl!r}"
        )


def draw_seed(device: torch.device) -> Tensor:
    """An int64 scalar from torch's generator on `device`."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def _check_state(state: Any, sizes: tuple[int, ...], batch: int, like: Tensor) -> State:
    if not isinstance(state, (tuple, list)) or len(state) != 4:
        raise TypeError(f"state must be a tuple (h, c, hyper_h, hyper_c), got {type(state).__name__}")
    for name, part, size in zip(STATE_NAMES, state, sizes, strict=True):
        check_tensor(f"state's {name}", part, (batch, size), FLOAT_DTYPES, like=like)
    h, c, hyper_h, hyper_c = state
    return h, c, hyper_h, hyper_c


def _check_seed(seed: Any, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        return check_tensor("seed", seed, (), (torch.int64,)).to(device)
    number = check_integer("seed", seed, -(2**63), 2**63 - 1)
    return torch.tensor(number, dtype=torch.int64, device=device)


def _check_dtype(x: Tensor, weight: Tensor) -> None:
    """TypeError where x has not the parameters' dtype; autocast, which casts all but float64, forgives it."""
    if x.dtype == weight.dtype:
        return
    forgiving = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    if not forgiving or torch.float64 in (x.dtype, weight.dtype):
        wanted = str(weight.dtype).removeprefix("torch.")
        raise TypeError(f"x must be of dtype {wanted} as the parameters are, got {describe(x)}")


def hyperlstm(
    x: Tensor,
    state: State | None,
    params: Mapping[str, Tensor],
    *,
    lengths: Tensor | None = None,
    forget_bias: float = 1.0,
    recurrent_dropout: float = 0.0,
    seed: Tensor | int | None = None,
    step_offset: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, State]:
    """HyperLSTM; see `sketchfast.nn.HyperLSTM` for the equations, and for what each argument is.

    `params` maps the parameter names of that module to tensors; `recurrent_dropout` is applied where it is
    above 0, whatever the mode of the module.
    """
    check_impl(impl)
    inputs = params["weight_ih"].shape[1]
    hidden, hyper = params["weight_hh"].shape[1], params["hyper_weight_hh"].shape[1]
    check_tensor("x", x, ("T", "B", inputs), FLOAT_DTYPES, like=params["weight_ih"])
    _check_dtype(x, params["weight_ih"])
    batch = x.shape[1]
    if state is None:
        state = tuple(x.new_zeros(batch, size) for size in (hidden, hidden, hyper, hyper))  # type: ignore[assignment]
    state = _check_state(state, (hidden, hidden, hyper, hyper), batch, x)
    if lengths is not None:
        check_tensor("lengths", lengths, (batch,), INTEGER_DTYPES, like=x)
    check_integer("step_offset", step_offset, 0)
    if recurrent_dropout > 0:
        seed = draw_seed(x.device) if seed is None else _check_seed(seed, x.device)
    else:
        seed = None
    return reference.hyperlstm(
        x,
        state,
        params,
        lengths=lengths,
        forget_bias=forget_bias,
        recurrent_dropout=recurrent_dropout,
        seed=seed,
        step_offset=step_offset,
    )
