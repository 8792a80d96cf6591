"""Loss of a sketch decoder's mixture density head in one pass.

A head gives at each position three pen logits and M bivariate Gaussians; the loss is the cross-entropy of the
pen states and the negative log likelihood of the offsets. Forward reads each position's 3 + 6 M numbers once
and leaves its gradient row beside the loss: the pen loss reaches the first three columns only and the stroke
loss the others only, so that backward is one scaling by the two gradients that come in.

Source: Graves 2013 (arXiv 1308.0850, eqs. 18 to 26) in the form of sketch-rnn (Ha and Eck 2018).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import mixture as reference
from . import _contract as contract


def _op(name: str, impl: str) -> Any:
    return getattr(torch.ops.sketchfast, f"{name}_{impl}")


# --- schemas, fakes, autograd -------------------------------------------------------------------------------
#
# output [N, 3 + 6 M] of any float dtype and target [N, 5] in the dtype of the arithmetic arrive contiguous.
# pen and stroke are scalars of the dtype of the arithmetic, rows [N, 3 + 6 M] of it too: the gradient of N
# times pen in the first three columns and of N times stroke in the others; [0, 3 + 6 M] without with_rows.

contract.define(
    "mixture",
    "mixture_bwd",
    "(Tensor grad_pen, Tensor grad_stroke, Tensor rows, ScalarType dtype) -> Tensor",
    lambda impl: lambda grad_pen, grad_stroke, rows, dtype: rows.new_empty(rows.shape, dtype=dtype),
)


def _fake_fwd(impl: str):
    def fake(output: Tensor, target: Tensor, with_rows: bool):
        positions, width = output.shape
        rows = target.new_empty((positions if with_rows else 0, width))
        return target.new_empty(()), target.new_empty(()), rows

    return fake


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[2])
    ctx.dtype = inputs[0].dtype


def _backward(impl: str):
    def backward(ctx: Any, grad_pen: Tensor | None, grad_stroke: Tensor | None, _rows: None):
        if grad_pen is None and grad_stroke is None:
            return None, None, None
        (rows,) = ctx.saved_tensors
        grads = (rows.new_zeros(()) if grad is None else grad for grad in (grad_pen, grad_stroke))
        return _op("mixture_bwd", impl)(*grads, rows, ctx.dtype), None, None

    return backward


contract.define(
    "mixture",
    "mixture_fwd",
    "(Tensor output, Tensor target, bool with_rows) -> (Tensor pen, Tensor stroke, Tensor rows)",
    _fake_fwd,
    setup_context=_setup,
    backward=_backward,
)

# --- function -----------------------------------------------------------------------------------------------


def _check(output: Any, target: Any) -> None:
    leading = max(1, output.dim() if isinstance(output, Tensor) else 1) - 1
    contract.check_tensor("output", output, ("any",) * leading + ("3 + 6 M",), contract.FLOAT_DTYPES)
    width = output.shape[-1]
    if width < reference.output_size(1) or (width - 3) % 6:
        raise ValueError(f"output must have 3 + 6 M features, got {contract.describe(output)}")
    contract.check_tensor("target", target, (*output.shape[:-1], 5), contract.FLOAT_DTYPES, output)


def mixture_loss(output: Tensor, target: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Cross-entropy of the pen states and negative log likelihood of the offsets under a Gaussian mixture.

    pen = mean over positions of -log softmax(output[..., :3]) at the greatest of target[..., 2:];
    stroke = mean over positions, those past the end counted too, of -(1 - target[..., 4]) log p(dx, dy),
    where p = sum_k softmax(w)_k N(dx, dy; mean_k, sigma_k, rho_k). log sigma is clamped to [-7, 7] and
    atanh rho to [-5, 5], where their gradient is 0.

    Args:
        output: [..., 3 + 6 M] float16, bfloat16, float32 or float64: three pen logits, then M each of weight
            logit, mean x, mean y, log sigma x, log sigma y, atanh rho. Means and spreads are in the unit of
            the target's offsets.
        target: [..., 5] of any float dtype: (dx, dy), then pen down, lifted, ended, one of them 1.
        impl: "auto", "native", "triton" or "reference".

    Returns:
        (pen, stroke), both [] float32 (float64 for a float64 output), 0 where there is no position. Gradient
        to output, once; none to target. Where a position's likelihood is not finite, neither is the loss.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device; the message names it.
        RuntimeError: an explicit `impl` that cannot run here; a second backward.

    Source: Graves 2013 (arXiv 1308.0850, eqs. 18 to 26); Ha and Eck 2018 (arXiv 1704.03477, eqs. 3 and 9).
    """
    _check(output, target)
    width = output.shape[-1]
    rows = output.reshape(-1, width).contiguous()
    wanted = target.detach().reshape(-1, 5).to(reference.compute_dtype(output.dtype)).contiguous()
    device = output.device.type
    chosen = contract.choose_impl("mixture_loss", impl, device, output.dtype)
    if chosen == "reference":
        with contract.full_precision(device):
            return reference.mixture_loss(contract.once(rows), wanted)
    with_rows = torch.is_grad_enabled() and output.requires_grad
    pen, stroke, _ = _op("mixture_fwd", chosen)(rows, wanted, with_rows)
    return pen, stroke
