"""What the tests of every op share: which impls run here, inputs, and how far off a result may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ops import _contract as contract


def available_impls(device_type: str = "cpu") -> list[str]:
    """The impls other than "auto" that run on this device type here, in this process."""
    return [impl for impl in contract.IMPLS[1:] if contract.unavailable_reason(impl, device_type) is None]


def devices() -> list[str]:
    """The device types to test on: "cpu", and "cuda" where there is one."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def random_strokes(
    batch: int,
    steps: int,
    size: int | tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    pen_up: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Pen-like random walks that fill most of the canvas.

    Returns (points [batch, steps, 2] in pixels, pen_down [batch, steps] bool), the same for a seed on every
    device.
    """
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    turn = torch.randn(batch, steps, generator=generator, dtype=torch.float64).cumsum(1) * 0.5
    stride = torch.rand(batch, steps, generator=generator, dtype=torch.float64) + 0.2
    path = torch.stack((turn.cos() * stride, turn.sin() * stride), -1).cumsum(1)
    pen_down = torch.rand(batch, steps, generator=generator) >= pen_up
    if steps and batch:
        low, high = path.amin(1, keepdim=True), path.amax(1, keepdim=True)
        scale = torch.tensor([width - 1.0, height - 1.0], dtype=torch.float64) * 0.9
        path = (path - low) / (high - low).clamp(min=1e-6) * scale + scale / 18
    return path.to(device=device, dtype=dtype), pen_down.to(device)


def gradient(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(function(x), the gradient of its weighted sum to x); the weights are fixed and of both signs."""
    x = x.detach().clone().requires_grad_()
    out = function(x)
    if weight is None:
        weight = torch.arange(out.numel(), dtype=torch.float64, device=out.device).mul(0.7).add(0.5).sin()
    (grad,) = torch.autograd.grad(out, x, weight.view(out.shape).to(out.dtype))
    return out.detach(), grad


def assert_within_budget(
    got: Tensor, eager: Tensor, exact: Tensor, what: str = "result", *, floor: float = 0.0
) -> None:
    """Holds max|got - exact| to 2 max|eager - exact| + 4 eps(dtype) max|exact| + floor.

    `eager` is eager PyTorch at the dtype of `got`, `exact` the float64 reference. NaN never passes. Where
    `got` is float64 too, `exact` rounds as much as it does and 64 eps are allowed.
    """
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if got.numel() == 0:
        return
    exact = exact.double().to(got.device)
    error = _largest(got.double() - exact)
    budget = 2 * _largest(eager.double() - exact)
    units = 64 if got.dtype == torch.float64 else 4
    budget += units * torch.finfo(got.dtype).eps * _largest(exact) + floor
    assert error <= budget, f"{what}: error {error:.3g} is over the budget {budget:.3g}"


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def assert_same_bits(first: Tensor, second: Tensor, what: str = "result") -> None:
    """Holds two results to the same bits, NaN included."""
    assert first.dtype == second.dtype, f"{what}: {first.dtype} against {second.dtype}"
    assert first.shape == second.shape, f"{what}: {tuple(first.shape)} against {tuple(second.shape)}"
    same = first.flatten().view(torch.uint8) if first.numel() else first
    other = second.flatten().view(torch.uint8) if second.numel() else second
    assert torch.equal(same, other), f"{what}: bits differ"


def opcheck(op: Any, args: tuple[Any, ...]) -> None:
    """torch.library.opcheck: schema, fake, autograd registration and AOT dispatch of one op."""
    torch.library.opcheck(op, args)
