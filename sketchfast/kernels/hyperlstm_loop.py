"""The fused HyperLSTM over a whole sequence: big matrix products, between them the kernels of one backend.

Forward, a step: two products into the gates' recurrent part, `hyper_fwd`, two products from hyper_h to the
twelve scales, `main_fwd`. The products of x are taken over many steps at once. Kept for backward: the gates'
recurrent part (the hyper LSTM's with x's part in it), the output, and the states every `chunk` steps.

Backward goes from chunk to chunk, last one first. What does not depend on a gradient is made again over all
steps of the chunk at once: the same forward kernels run on the recurrent parts that were kept. Then, a step:
`main_bwd`, the twelve small products back to hyper_h, `hyper_bwd`, and the products back to h and hyper_h.
Gradients of weights are products over all rows of the chunk.

D is the dtype of the products, A that of the arithmetic between them (float32, or float64 for float64), O
that of x and out. A gradient that runs from step to step between two products is of D, cells are of A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

#: rows (steps x batch) of a chunk: enough for the weights' gradients to be efficient products
CHUNK_ROWS = 2048


class Kernels(Protocol):
    """What a backend brings. S steps, B rows; `first` is the number of the first of the steps.

    A row whose length is <= the step is past its end: its cells, `last` and incoming gradients stay as they
    are, and everything else that is written of it is 0. Gates lie i, j, f, o. Matrices' last dimension is
    contiguous, others may be strided. ln_* are None without layer norm, lengths ([B] int64) where every row
    is S steps long, seed (int64 scalar) without dropout. Sums over rows are added to `partials`: which row of
    it takes which part is the backend's to choose.
    """

    def slots(self, like: Tensor, batch: int) -> int:
        """How many rows of partial sums the backward kernels take, on the device of `like`."""

    def products(self, like: Tensor) -> Products:
        """The matrix products for tensors of this dtype and device."""

    def hyper_fwd(
        self,
        gates: Tensor,  # [S, B, 4 Hh] D; the recurrent part, to which x_part is added
        x_part: Tensor | None,  # [S, B, 4 Hh] D; None: gates are whole, and only read
        cell: Tensor,  # [B, Hh] A, in place
        hidden: Tensor,  # [S, B, Hh] D, written: hyper_h
        last: Tensor | None,  # [B, Hh] O, written: hyper_h of each row's last step
        cells: Tensor | None,  # [S, B, Hh] A, written: cell after each step
        ln_weight: Tensor | None,  # [4, Hh] A
        ln_bias: Tensor | None,
        ln_c_weight: Tensor | None,  # [Hh] A
        ln_c_bias: Tensor | None,
        lengths: Tensor | None,
        seed: Tensor | None,
        first: int,
        step_offset: int,
        forget_bias: float,
        dropout: float,
    ) -> None: ...

    def main_fwd(
        self,
        recurrent: Tensor,  # [S, B, 4 H] D
        x_part: Tensor,  # [S, B, 4 H] D
        scales: Tensor,  # [12, S, B, H] D: alpha of x, alpha of h, beta
        bias: Tensor,  # [4, H] A
        cell: Tensor,  # [B, H] A, in place
        out: Tensor | None,  # [S, B, H] O, written: h
        hidden: Tensor | None,  # [B, H] D, written: h after the last of the steps
        cells: Tensor | None,  # [S, B, H] A, written: cell after each step
        ln_weight: Tensor | None,  # [4, H] A
        ln_bias: Tensor | None,
        ln_c_weight: Tensor,  # [H] A
        ln_c_bias: Tensor,
        lengths: Tensor | None,
        seed: Tensor | None,
        first: int,
        step_offset: int,
        forget_bias: float,
        dropout: float,
    ) -> None: ...

    def main_bwd(
        self,
        recurrent: Tensor,  # [B, 4 H] D
        x_part: Tensor,  # [B, 4 H] D
        scales: Tensor,  # [12, B, H] D
        bias: Tensor,  # [4, H] A
        cell_before: Tensor,  # [B, H] A
        cell_after: Tensor,  # [B, H] A
        grad_out: Tensor | None,  # [B, H] O
        grad_hidden: Tensor,  # [B, H] D: what comes from later steps; 0 afterwards
        grad_cell: Tensor,  # [B, H] A: of cell_after, then of cell_before
        grad_recurrent: Tensor,  # [B, 4 H] D, written
        grad_x_part: Tensor,  # [B, 4 H] D, written
        grad_scales: Tensor,  # [12, B, H] D, written
        partials: Tensor,  # [slots, 14, H] A: ln_weight 4, ln_bias 4, bias 4, ln_c_weight, ln_c_bias
        ln_weight: Tensor | None,
        ln_bias: Tensor | None,
        ln_c_weight: Tensor,
        ln_c_bias: Tensor,
        lengths: Tensor | None,
        seed: Tensor | None,
        step: int,
        step_offset: int,
        forget_bias: float,
        dropout: float,
    ) -> None: ...

    def hyper_bwd(
        self,
        gates: Tensor,  # [B, 4 Hh] D, whole
        cell_before: Tensor,  # [B, Hh] A
        cell_after: Tensor,  # [B, Hh] A
        grad_hidden: Tensor,  # [B, Hh] D; 0 afterwards
        grad_cell: Tensor,  # [B, Hh] A, in place
        grad_gates: Tensor,  # [B, 4 Hh] D, written
        partials: Tensor,  # [slots, 10, Hh] A: ln_weight 4, ln_bias 4, ln_c_weight, ln_c_bias
        ln_weight: Tensor | None,
        ln_bias: Tensor | None,
        ln_c_weight: Tensor | None,
        ln_c_bias: Tensor | None,
        lengths: Tensor | None,
        seed: Tensor | None,
        step: int,
        step_offset: int,
        forget_bias: float,
        dropout: float,
    ) -> None: ...


class Products:
    """Matrix products by torch: a backend with faster ones for some dtype and device overrides them."""

    def stationary(self, weight: Tensor) -> Any:
        """`weight` [K, N] in the form that `mm` takes fastest, for one that is used at every step."""
        return weight

    def mm(self, a: Tensor, b: Any, out: Tensor, *, add: bool = False) -> None:
        """out [M, N] = a [M, K] b [K, N], or added to what is there; rows of each may be strided."""
        if add:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)

    def bmm(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out [G, M, N] = a [G, M, K] b [G, K, N]."""
        torch.bmm(a, b, out=out)

    def accumulate(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total [M, N] or [G, M, N] of A += a b."""
        if total.dtype != a.dtype:
            total.add_(torch.matmul(a, b))
        elif total.dim() == 3:
            total.baddbmm_(a, b)
        else:
            total.addmm_(a, b)


class Weights(NamedTuple):
    """The parameters in the order of the op's list; layer norm's last, absent without it."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor
    hyper_weight_ih: Tensor
    hyper_weight_hh: Tensor
    z_weight: Tensor
    z_bias: Tensor
    alpha_weight: Tensor
    zb_weight: Tensor
    beta_weight: Tensor
    ln_c_weight: Tensor
    ln_c_bias: Tensor
    ln_weight: Tensor | None = None
    ln_bias: Tensor | None = None
    hyper_ln_weight: Tensor | None = None
    hyper_ln_bias: Tensor | None = None
    hyper_ln_c_weight: Tensor | None = None
    hyper_ln_c_bias: Tensor | None = None


class Settings(NamedTuple):
    """What forward and backward are given alike beside tensors."""

    lengths: Tensor | None
    seed: Tensor | None
    step_offset: int
    forget_bias: float
    dropout: float


class _Operands:
    """The weights as the products and kernels take them: in D, or A where no product is involved."""

    def __init__(self, weights: Weights, inputs: int, dtype: torch.dtype, accumulate: torch.dtype) -> None:
        self.hidden, self.hyper = weights.weight_hh.shape[1], weights.hyper_weight_hh.shape[1]
        self.embed, self.inputs = weights.z_weight.shape[1], inputs
        self.main_gates, self.hyper_gates = 4 * self.hidden, 4 * self.hyper
        self.gates = self.main_gates + self.hyper_gates
        low = {name: value.to(dtype) for name, value in weights._asdict().items() if value is not None}
        full = {
            name: value.detach().to(accumulate).contiguous()
            for name, value in weights._asdict().items()
            if value is not None and ("ln_" in name or name == "bias")
        }
        self.weight_ih = low["weight_ih"]  # [4H, I]
        self.weight_hh = low["weight_hh"]  # [4H, H]
        self.hyper_weight_x = low["hyper_weight_ih"][:, :inputs]  # [4Hh, I]
        self.hyper_weight_h = low["hyper_weight_ih"][:, inputs:]  # [4Hh, H]
        self.hyper_weight_hh = low["hyper_weight_hh"]  # [4Hh, Hh]
        self.to_z = torch.cat((low["z_weight"], low["zb_weight"])).flatten(0, 1)  # [12E, Hh]
        self.z_bias = torch.nn.functional.pad(low["z_bias"].flatten(), (0, 4 * self.embed))  # [12E]
        self.from_z = torch.cat((low["alpha_weight"], low["beta_weight"]))  # [12, H, E]
        self.bias = full["bias"].view(4, self.hidden)
        self.main_norm = tuple(
            full.get(name) for name in ("ln_weight", "ln_bias", "ln_c_weight", "ln_c_bias")
        )
        self.hyper_norm = tuple(
            full.get(f"hyper_{name}") for name in ("ln_weight", "ln_bias", "ln_c_weight", "ln_c_bias")
        )

    def split(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """[..., 4H + 4Hh] into the main LSTM's part and the hyper LSTM's."""
        return gates[..., : self.main_gates], gates[..., self.main_gates :]


def chunk_steps(steps: int, batch: int) -> int:
    """Steps of a chunk."""
    return max(1, min(steps, CHUNK_ROWS // max(batch, 1)))


def chunk_count(steps: int, batch: int) -> int:
    return -(-steps // chunk_steps(steps, batch))


def _x_products(
    products: Products, w: _Operands, x: Tensor, base: Tensor | None, main: Tensor, hyper: Any
) -> None:
    """x [S, B, I] times its weights, plus `base`, into main [S, B, 4H] and hyper [S, B, 4Hh] or None."""
    rows = x.reshape(-1, w.inputs)
    parts = [(w.weight_ih, main, slice(0, w.main_gates))]
    if hyper is not None:
        parts.append((w.hyper_weight_x, hyper, slice(w.main_gates, w.gates)))
    for weight, target, columns in parts:
        if base is not None:
            target.copy_(base[:, columns].expand_as(target))
        products.mm(rows, weight.t(), target.view(-1, target.shape[-1]), add=base is not None)


def forward(
    kernels: Kernels,
    x: Tensor,
    base: Tensor | None,
    state: Sequence[Tensor],
    weights: Weights,
    settings: Settings,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """(out, h, c, hyper_h, hyper_c), and for backward (recurrent, cells, hyper_cells, hyper_hiddens).

    x [T, B, I] of O, zero past the end. base [B, 4H + 4Hh] of D or None: what is added to x's products at
    every step. state: h and hyper_h of O, cells of A. recurrent [T, B, 4H + 4Hh] of D; the last three hold
    the states before each chunk, hyper_h in D.
    """
    steps, batch, inputs = x.shape
    h, c, hyper_h, hyper_c = state
    w = _Operands(weights, inputs, dtype, c.dtype)
    products = kernels.products(x.new_empty((), dtype=dtype))
    chunk = chunk_steps(steps, batch)
    chunks = chunk_count(steps, batch)
    out = x.new_empty(steps, batch, w.hidden)
    recurrent = x.new_empty(steps, batch, w.gates, dtype=dtype)
    cells, hyper_cells = c.new_empty(chunks, batch, w.hidden), c.new_empty(chunks, batch, w.hyper)
    hyper_hiddens = x.new_empty(chunks, batch, w.hyper, dtype=dtype)

    cell, hyper_cell, hyper_last = (
        part.clone(memory_format=torch.contiguous_format) for part in (c, hyper_c, hyper_h)
    )
    hidden, hyper_hidden = h.to(dtype, copy=True), hyper_h.to(dtype, copy=True).contiguous()[None]
    low_hidden = None if out.dtype == dtype else hidden
    x_main = x.new_empty(chunk, batch, w.main_gates, dtype=dtype)
    x_hyper = x.new_empty(chunk, batch, w.hyper_gates, dtype=dtype)
    z = x.new_empty(batch, 12 * w.embed, dtype=dtype)
    z_by_scale = z.view(batch, 12, w.embed).transpose(0, 1)
    scales = x.new_empty(12, batch, w.hidden, dtype=dtype)
    scales_of_step = scales.view(12, 1, batch, w.hidden)
    from_z = w.from_z.transpose(1, 2)
    hidden_to_main = products.stationary(w.weight_hh.t())
    hidden_to_hyper = products.stationary(w.hyper_weight_h.t())
    hyper_to_hyper = products.stationary(w.hyper_weight_hh.t())
    hyper_to_z = products.stationary(w.to_z.t())
    mains, hypers = w.split(recurrent)

    for index, start in enumerate(range(0, steps, chunk)):
        count = min(chunk, steps - start)
        cells[index], hyper_cells[index], hyper_hiddens[index] = cell, hyper_cell, hyper_hidden[0]
        _x_products(products, w, x[start : start + count].to(dtype), base, x_main[:count], x_hyper[:count])
        for step in range(start, start + count):
            main, hyper = mains[step : step + 1], hypers[step : step + 1]
            this = step - start
            products.mm(hidden, hidden_to_main, main[0])
            products.mm(hidden, hidden_to_hyper, hyper[0])
            products.mm(hyper_hidden[0], hyper_to_hyper, hyper[0], add=True)
            kernels.hyper_fwd(
                hyper, x_hyper[this : this + 1], hyper_cell, hyper_hidden, hyper_last, None, *w.hyper_norm,
                settings.lengths, settings.seed, step, *settings[2:],
            )  # fmt: skip
            z.copy_(w.z_bias.expand_as(z))
            products.mm(hyper_hidden[0], hyper_to_z, z, add=True)
            products.bmm(z_by_scale, from_z, scales)
            kernels.main_fwd(
                main, x_main[this : this + 1], scales_of_step, w.bias, cell, out[step : step + 1], low_hidden,
                None, *w.main_norm, settings.lengths, settings.seed, step, *settings[2:],
            )  # fmt: skip
            if low_hidden is None:
                hidden = out[step]
    last = _last_hidden(out, h, settings.lengths)
    return out, last, cell, hyper_last, hyper_cell, recurrent, cells, hyper_cells, hyper_hiddens


def _last_hidden(out: Tensor, h: Tensor, lengths: Tensor | None) -> Tensor:
    """h after each row's last step."""
    steps = out.shape[0]
    if steps == 0:
        return h.clone()
    if lengths is None:
        return out[-1].clone()
    index = (lengths - 1).clamp(0, steps - 1)[None, :, None].expand(1, *h.shape)
    return torch.where((lengths > 0)[:, None], out.gather(0, index)[0], h)


def backward(
    kernels: Kernels,
    grads: Sequence[Tensor | None],
    x: Tensor,
    base: Tensor | None,
    h: Tensor,
    weights: Weights,
    settings: Settings,
    kept: Sequence[Tensor],
    *,
    needs_x: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x (empty unless `needs_x`), base (empty for None), h, c, hyper_h, hyper_c, then weights.

    grads: of out, h, c, hyper_h, hyper_c, each may be None. kept: out and the last four of `forward`.
    """
    out, recurrent, cells, hyper_cells, hyper_hiddens = kept
    steps, batch, inputs = x.shape
    dtype, accumulate = recurrent.dtype, cells.dtype
    w = _Operands(weights, inputs, dtype, accumulate)
    products = kernels.products(recurrent)
    chunk = chunk_steps(steps, batch)
    slots = kernels.slots(recurrent, batch)

    def low(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    def carried(grad: Tensor | None, width: int, to: torch.dtype) -> Tensor:
        """A gradient that runs from step to step, in memory of its own."""
        if grad is None:
            return x.new_zeros(batch, width, dtype=to)
        return grad.to(to, copy=True).contiguous()

    grad_out = None if grads[0] is None else grads[0].contiguous()
    grad_hidden, grad_cell = carried(grads[1], w.hidden, dtype), carried(grads[2], w.hidden, accumulate)
    grad_hyper, grad_hyper_cell = carried(grads[3], w.hyper, dtype), carried(grads[4], w.hyper, accumulate)
    grad_x = torch.empty_like(x) if needs_x else x.new_empty(0)
    total = {
        name: torch.zeros_like(value, dtype=accumulate, memory_format=torch.contiguous_format)
        for name, value in (
            ("weight_ih", w.weight_ih), ("weight_hh", w.weight_hh), ("hyper_weight_hh", w.hyper_weight_hh),
            ("to_z", w.to_z), ("from_z", w.from_z),
        )
    }  # fmt: skip
    total["hyper_weight_ih"] = x.new_zeros(w.hyper_gates, inputs + w.hidden, dtype=accumulate)
    total["z_bias"] = x.new_zeros(12 * w.embed, dtype=accumulate)
    total["base"] = x.new_zeros((0,) if base is None else (batch, w.gates), dtype=accumulate)
    partials = x.new_zeros(slots, 14, w.hidden, dtype=accumulate)
    hyper_partials = x.new_zeros(slots, 10, w.hyper, dtype=accumulate)

    grad_recurrent = low(chunk, batch, w.gates)
    x_main, grad_x_main = low(chunk, batch, w.main_gates), low(chunk, batch, w.main_gates)
    hypers, z, grad_z = (
        low(chunk, batch, w.hyper),
        low(chunk, batch, 12 * w.embed),
        low(chunk, batch, 12 * w.embed),
    )
    scales, grad_scales = low(12, chunk, batch, w.hidden), low(12, chunk, batch, w.hidden)
    cells_after = x.new_empty(chunk, batch, w.hidden, dtype=accumulate)
    hyper_cells_after = x.new_empty(chunk, batch, w.hyper, dtype=accumulate)
    main_to_hidden = products.stationary(w.weight_hh)
    hyper_to_hidden = products.stationary(w.hyper_weight_h)
    hyper_to_hyper = products.stationary(w.hyper_weight_hh)
    z_to_hyper = products.stationary(w.to_z)
    mains, hyper_gates = w.split(recurrent)

    for index in reversed(range(len(cells))):
        start = index * chunk
        count = min(chunk, steps - start)
        span = slice(start, start + count)
        x_chunk = x[span].to(dtype)
        # what the forward made, again, over the whole chunk
        kernels.hyper_fwd(
            hyper_gates[span], None, hyper_cells[index].clone(), hypers[:count], None,
            hyper_cells_after[:count], *w.hyper_norm, settings.lengths, settings.seed, start, *settings[2:],
        )  # fmt: skip
        z_rows, hyper_rows = z[:count].view(-1, 12 * w.embed), hypers[:count].view(-1, w.hyper)
        z_rows.copy_(w.z_bias.expand_as(z_rows))
        products.mm(hyper_rows, w.to_z.t(), z_rows, add=True)
        z_by_scale = z_rows.view(-1, 12, w.embed).transpose(0, 1)
        products.bmm(z_by_scale, w.from_z.transpose(1, 2), scales[:, :count].view(12, -1, w.hidden))
        _x_products(products, w, x_chunk, base, x_main[:count], None)
        kernels.main_fwd(
            mains[span], x_main[:count], scales[:, :count], w.bias, cells[index].clone(), None, None,
            cells_after[:count], *w.main_norm, settings.lengths, settings.seed, start, *settings[2:],
        )  # fmt: skip

        grad_mains, grad_gates = w.split(grad_recurrent)
        for step in reversed(range(start, start + count)):
            this = step - start
            kernels.main_bwd(
                mains[step], x_main[this], scales[:, this], w.bias,
                cells_after[this - 1] if this else cells[index], cells_after[this],
                None if grad_out is None else grad_out[step], grad_hidden, grad_cell, grad_mains[this],
                grad_x_main[this], grad_scales[:, this], partials, *w.main_norm,
                settings.lengths, settings.seed, step, *settings[2:],
            )  # fmt: skip
            products.bmm(
                grad_scales[:, this], w.from_z, grad_z[this].view(batch, 12, w.embed).transpose(0, 1)
            )
            products.mm(grad_z[this], z_to_hyper, grad_hyper, add=True)
            kernels.hyper_bwd(
                hyper_gates[step], hyper_cells_after[this - 1] if this else hyper_cells[index],
                hyper_cells_after[this], grad_hyper, grad_hyper_cell, grad_gates[this], hyper_partials,
                *w.hyper_norm, settings.lengths, settings.seed, step, *settings[2:],
            )  # fmt: skip
            products.mm(grad_mains[this], main_to_hidden, grad_hidden, add=True)
            products.mm(grad_gates[this], hyper_to_hidden, grad_hidden, add=True)
            products.mm(grad_gates[this], hyper_to_hyper, grad_hyper, add=True)

        hidden_before = _shifted(out[span], out[start - 1] if start else h, dtype)
        hyper_before = _shifted(hypers[:count], hyper_hiddens[index], dtype)
        rows = slice(0, count)
        main_rows, gate_rows = grad_mains[rows].flatten(0, 1), grad_gates[rows].flatten(0, 1)
        x_rows, x_main_rows = x_chunk.reshape(-1, inputs), grad_x_main[rows].flatten(0, 1)
        by_scale = grad_scales[:, :count].flatten(1, 2)
        products.accumulate(total["weight_hh"], main_rows.t(), hidden_before)
        products.accumulate(total["hyper_weight_ih"][:, inputs:], gate_rows.t(), hidden_before)
        products.accumulate(total["hyper_weight_hh"], gate_rows.t(), hyper_before)
        products.accumulate(total["weight_ih"], x_main_rows.t(), x_rows)
        products.accumulate(total["hyper_weight_ih"][:, :inputs], gate_rows.t(), x_rows)
        products.accumulate(total["to_z"], grad_z[rows].flatten(0, 1).t(), hyper_rows)
        products.accumulate(total["from_z"], by_scale.transpose(1, 2), z_by_scale)
        total["z_bias"] += grad_z[rows].sum((0, 1), dtype=accumulate)
        if base is not None:
            main_base, hyper_base = w.split(total["base"])
            main_base += grad_x_main[rows].sum(0, dtype=accumulate)
            hyper_base += grad_gates[rows].sum(0, dtype=accumulate)
        if needs_x:
            low_x = grad_x[span].view(-1, inputs) if grad_x.dtype == dtype else low(count * batch, inputs)
            products.mm(x_main_rows, w.weight_ih, low_x)
            products.mm(gate_rows, w.hyper_weight_x, low_x, add=True)
            if grad_x.dtype != dtype:
                grad_x[span] = low_x.view(count, batch, inputs)

    sums, hyper_sums = partials.sum(0), hyper_partials.sum(0)
    z_weight, zb_weight = total["to_z"].view(12, w.embed, w.hyper).split((8, 4))
    alpha_weight, beta_weight = total["from_z"].split((8, 4))
    found = {
        "weight_ih": total["weight_ih"], "weight_hh": total["weight_hh"], "bias": sums[8:12].flatten(),
        "hyper_weight_ih": total["hyper_weight_ih"], "hyper_weight_hh": total["hyper_weight_hh"],
        "z_weight": z_weight, "z_bias": total["z_bias"][: 8 * w.embed].view(8, w.embed),
        "alpha_weight": alpha_weight, "zb_weight": zb_weight, "beta_weight": beta_weight,
        "ln_c_weight": sums[12], "ln_c_bias": sums[13], "ln_weight": sums[:4], "ln_bias": sums[4:8],
        "hyper_ln_weight": hyper_sums[:4], "hyper_ln_bias": hyper_sums[4:8],
        "hyper_ln_c_weight": hyper_sums[8], "hyper_ln_c_bias": hyper_sums[9],
    }  # fmt: skip
    grad_base = total["base"] if base is None else total["base"].to(base.dtype)
    state = grad_hidden.to(h.dtype), grad_cell, grad_hyper.to(h.dtype), grad_hyper_cell
    of_weights = [
        _own(found[name], value.dtype) for name, value in weights._asdict().items() if value is not None
    ]
    return grad_x, grad_base, *state, *of_weights


def _own(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in memory of its own: an op's results must not share any."""
    whole = value._base is None and value.is_contiguous()
    return value.to(dtype, copy=not whole, memory_format=torch.contiguous_format)


def _shifted(rows: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
    """[S * B, W]: the rows a step earlier, the first of them `first`."""
    before = rows.new_empty(rows.shape, dtype=dtype)
    before[0] = first
    before[1:] = rows[:-1]
    return before.flatten(0, 1)
