"""The kernels of the HyperLSTM's loop in eager PyTorch, gradients by autograd: the model of every backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sketchfast.kernels import hyperlstm_loop as loop
from sketchfast.kernels.reference.hyperlstm import HYPER_STREAM, LN_EPS, MAIN_STREAM, dropout_masks


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return x
    return F.layer_norm(x, x.shape[-1:], eps=LN_EPS) * weight + bias


def _live(lengths: Tensor | None, step: int, batch: int, like: Tensor) -> Tensor:
    if lengths is None:
        return torch.ones(batch, 1, dtype=torch.bool, device=like.device)
    return (step < lengths)[:, None]


def _mask(seed, dropout, stream, step, step_offset, like: Tensor) -> Tensor | float:
    if not dropout:
        return 1.0
    batch, width = like.shape
    offset = step + step_offset
    return dropout_masks(
        1, batch, width, p=dropout, seed=seed, stream=stream, step_offset=offset, dtype=like.dtype
    )[0]


def _hyper_cell(gates, cell, norm, mask, forget_bias):
    """gates [B, 4 Hh] and cell [B, Hh] to (cell, hidden)."""
    ln_weight, ln_bias, ln_c_weight, ln_c_bias = norm
    i, j, f, o = _norm(gates.unflatten(-1, (4, -1)), ln_weight, ln_bias).unbind(1)
    after = cell * torch.sigmoid(f + forget_bias) + torch.sigmoid(i) * torch.tanh(j) * mask
    return after, torch.tanh(_norm(after, ln_c_weight, ln_c_bias)) * torch.sigmoid(o)


def _main_cell(recurrent, x_part, scales, bias, cell, norm, mask, forget_bias):
    ln_weight, ln_bias, ln_c_weight, ln_c_bias = norm
    of_x, of_h, beta = scales.transpose(0, 1).split(4, dim=1)
    gates = of_x * x_part.unflatten(-1, (4, -1)) + of_h * recurrent.unflatten(-1, (4, -1)) + beta + bias
    i, j, f, o = _norm(gates, ln_weight, ln_bias).unbind(1)
    after = cell * torch.sigmoid(f + forget_bias) + torch.sigmoid(i) * torch.tanh(j) * mask
    return after, torch.tanh(_norm(after, ln_c_weight, ln_c_bias)) * torch.sigmoid(o)


def _gradients(function: Callable, inputs: list[Tensor | None], grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Gradients of <outputs, grads> to the inputs, zeros where there is none."""
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
        there = [x for x in leaves if x is not None]
        found = iter(torch.autograd.grad(function(*leaves), there, grads, allow_unused=True))
    return [None if x is None else next(found) for x in leaves]


class EagerKernels:
    """`loop.Kernels`, one torch operation after another."""

    def slots(self, like: Tensor, batch: int) -> int:
        return 1

    def products(self, like: Tensor) -> loop.Products:
        return loop.Products()

    def hyper_fwd(
        self, gates, x_part, cell, hidden, last, cells, ln_weight, ln_bias, ln_c_weight, ln_c_bias,
        lengths, seed, first, step_offset, forget_bias, dropout,
    ):  # fmt: skip
        norm = (ln_weight, ln_bias, ln_c_weight, ln_c_bias)
        for s in range(len(gates)):
            live = _live(lengths, first + s, cell.shape[0], cell)
            if x_part is not None:
                gates[s] = (gates[s].to(cell.dtype) + x_part[s].to(cell.dtype)).to(gates.dtype)
            mask = _mask(seed, dropout, HYPER_STREAM, first + s, step_offset, cell)
            after, h = _hyper_cell(gates[s].to(cell.dtype), cell, norm, mask, forget_bias)
            cell.copy_(torch.where(live, after, cell))
            hidden[s] = torch.where(live, h, 0.0)
            if last is not None:
                last.copy_(torch.where(live, h.to(last.dtype), last))
            if cells is not None:
                cells[s] = torch.where(live, after, 0.0)

    def main_fwd(
        self, recurrent, x_part, scales, bias, cell, out, hidden, cells, ln_weight, ln_bias, ln_c_weight,
        ln_c_bias, lengths, seed, first, step_offset, forget_bias, dropout,
    ):  # fmt: skip
        norm, wide = (ln_weight, ln_bias, ln_c_weight, ln_c_bias), cell.dtype
        for s in range(len(recurrent)):
            live = _live(lengths, first + s, cell.shape[0], cell)
            mask = _mask(seed, dropout, MAIN_STREAM, first + s, step_offset, cell)
            after, h = _main_cell(
                recurrent[s].to(wide), x_part[s].to(wide), scales[:, s].to(wide), bias, cell, norm, mask,
                forget_bias,
            )  # fmt: skip
            cell.copy_(torch.where(live, after, cell))
            h = torch.where(live, h, 0.0)
            if out is not None:
                out[s] = h
            if hidden is not None:
                hidden.copy_(h)
            if cells is not None:
                cells[s] = torch.where(live, after, 0.0)

    def main_bwd(
        self, recurrent, x_part, scales, bias, cell_before, cell_after, grad_out, grad_hidden, grad_cell,
        grad_recurrent, grad_x_part, grad_scales, partials, ln_weight, ln_bias, ln_c_weight, ln_c_bias,
        lengths, seed, step, step_offset, forget_bias, dropout,
    ):  # fmt: skip
        wide = cell_before.dtype
        live = _live(lengths, step, cell_before.shape[0], cell_before)
        mask = _mask(seed, dropout, MAIN_STREAM, step, step_offset, cell_before)
        total = grad_hidden.to(wide) + (0.0 if grad_out is None else grad_out.to(wide))
        grads = (torch.where(live, grad_cell, 0.0), torch.where(live, total, 0.0))

        def run(recurrent, x_part, scales, bias, cell, *norm):
            return _main_cell(recurrent, x_part, scales, bias, cell, norm, mask, forget_bias)

        inputs = [
            recurrent.to(wide), x_part.to(wide), scales.to(wide), bias, cell_before, ln_weight, ln_bias,
            ln_c_weight, ln_c_bias,
        ]  # fmt: skip
        r, x, s, b, c, w, wb, cw, cb = _gradients(run, inputs, grads)
        for target, value in ((grad_recurrent, r), (grad_x_part, x)):
            target.copy_(torch.where(live, value, 0.0))
        grad_scales.copy_(torch.where(live, s, 0.0))
        grad_hidden.copy_(torch.where(live, 0.0, grad_hidden))
        grad_cell.copy_(torch.where(live, c, grad_cell))
        if w is not None:
            partials[0, :4] += w
            partials[0, 4:8] += wb
        partials[0, 8:12] += b
        partials[0, 12] += cw
        partials[0, 13] += cb

    def hyper_bwd(
        self, gates, cell_before, cell_after, grad_hidden, grad_cell, grad_gates, partials, ln_weight,
        ln_bias, ln_c_weight, ln_c_bias, lengths, seed, step, step_offset, forget_bias, dropout,
    ):  # fmt: skip
        wide = cell_before.dtype
        live = _live(lengths, step, cell_before.shape[0], cell_before)
        mask = _mask(seed, dropout, HYPER_STREAM, step, step_offset, cell_before)
        grads = (torch.where(live, grad_cell, 0.0), torch.where(live, grad_hidden.to(wide), 0.0))

        def run(gates, cell, *norm):
            return _hyper_cell(gates, cell, norm, mask, forget_bias)

        inputs = [gates.to(wide), cell_before, ln_weight, ln_bias, ln_c_weight, ln_c_bias]
        g, c, w, wb, cw, cb = _gradients(run, inputs, grads)
        grad_gates.copy_(torch.where(live, g, 0.0))
        grad_hidden.copy_(torch.where(live, 0.0, grad_hidden))
        grad_cell.copy_(torch.where(live, c, grad_cell))
        if w is not None:
            for row, value in ((slice(0, 4), w), (slice(4, 8), wb), (8, cw), (9, cb)):
                partials[0, row] += value
