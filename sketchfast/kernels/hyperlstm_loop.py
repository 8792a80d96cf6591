"""The fused HyperLSTM over a whole sequence: big matrix products, between them the kernels of one backend.

Forward, a step: two products into the gates' recurrent part, `hyper_fwd`, two products from hyper_h to the
twelve scales, `main_fwd`. The products of x are taken over many steps at once. Kept for backward: the gates'
recurrent part (the hyper LSTM's with x's part in it), the output, and the states every `chunk` steps.

Backward goes from chunk to chunk, last one first. What does not depend on a gradient is made again over all
steps of the chunk at once: the same forward kernels run on the recurrent parts that were kept. Then, a step:
`main_bwd`, the twelve small products back to hyper_h, `hyper_bwd`, and the products back to h and hyper_h.
Gradients of the big weights are products over the rows of several chunks.

D is the dtype of the products, A that of the arithmetic between them (float32, or float64 for float64), O
that of x and out. A gradient that runs from step to step between two products is of D, cells are of A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

#: Elements of the twelve scales over a chunk (12 x steps x batch x H), by device: on CPU few enough for a
#: cache to hold, on a GPU enough to fill it.
CHUNK_ELEMENTS = {"cpu": 3 << 20, "cuda": 24 << 20}
#: Rows (steps x batch) of the big weights' gradients taken at once: enough for efficient products.
SPAN_ROWS = 2048


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

    def affine(self, a: Tensor, b: Any, bias: Tensor, out: Tensor) -> None:
        """out [M, N] = a [M, K] b [K, N] + bias [N]."""
        torch.addmm(bias, a, b, out=out)

    def bmm(self, a: Tensor, b: Any, out: Tensor) -> None:
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
        # contiguous: a weight that is no parameter may have any strides, products want one that is 1
        low = {
            name: value.to(dtype).contiguous()
            for name, value in weights._asdict().items()
            if value is not None
        }
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
        self.main_norm = (
            full.get("ln_weight"), full.get("ln_bias"), full["ln_c_weight"], full["ln_c_bias"],
        )  # fmt: skip
        self.hyper_norm = (
            full.get("hyper_ln_weight"), full.get("hyper_ln_bias"),
            full.get("hyper_ln_c_weight"), full.get("hyper_ln_c_bias"),
        )  # fmt: skip

    def split(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """[..., 4H + 4Hh] into the main LSTM's part and the hyper LSTM's."""
        return gates[..., : self.main_gates], gates[..., self.main_gates :]


def chunk_steps(steps: int, batch: int, hidden: int, device_type: str) -> int:
    """Steps of a chunk: at least 4, for the states between chunks are kept."""
    elements = CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cuda"])
    return max(1, min(steps, max(elements // max(12 * batch * hidden, 1), 4)))


def chunk_count(steps: int, batch: int, hidden: int, device_type: str) -> int:
    return -(-steps // chunk_steps(steps, batch, hidden, device_type))


def _x_products(
    products: Products, w: _Operands, x: Tensor, base: Tensor | None, main: Tensor, hyper: Any
) -> None:
    """x [S, B, I] times its weights, plus `base`, into main [S, B, 4H] and hyper [S, B, 4Hh] or None."""
    rows = x.reshape(x.shape[0] * x.shape[1], w.inputs)
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
    chunk = chunk_steps(steps, batch, w.hidden, x.device.type)
    chunks = chunk_count(steps, batch, w.hidden, x.device.type)
    out = x.new_empty(steps, batch, w.hidden)
    recurrent = x.new_empty(steps, batch, w.gates, dtype=dtype)
    cells, hyper_cells = c.new_empty(chunks, batch, w.hidden), c.new_empty(chunks, batch, w.hyper)
    hyper_hiddens = x.new_empty(chunks, batch, w.hyper, dtype=dtype)

    cell, hyper_cell, hyper_last = (
        part.clone(memory_format=torch.contiguous_format) for part in (c, hyper_c, hyper_h)
    )
    hidden, hyper_hidden = (
        part.to(dtype, copy=True, memory_format=torch.contiguous_format) for part in (h, hyper_h[None])
    )
    low_hidden = None if out.dtype == dtype else hidden
    x_main = x.new_empty(chunk, batch, w.main_gates, dtype=dtype)
    x_hyper = x.new_empty(chunk, batch, w.hyper_gates, dtype=dtype)
    z = x.new_empty(batch, 12 * w.embed, dtype=dtype)
    z_by_scale = z.view(batch, 12, w.embed).transpose(0, 1)
    scales = x.new_empty(12, batch, w.hidden, dtype=dtype)
    scales_of_step = scales.view(12, 1, batch, w.hidden)
    z_to_scales, hidden_to_main, hidden_to_hyper, hyper_to_hyper, hyper_to_z = (
        products.stationary(weight) if steps > 1 else weight  # a single step is too few to pay for it
        for weight in (
            w.from_z.transpose(1, 2),
            w.weight_hh.t(),
            w.hyper_weight_h.t(),
            w.hyper_weight_hh.t(),
            w.to_z.t(),
        )
    )
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
            products.affine(hyper_hidden[0], hyper_to_z, w.z_bias, z)
            products.bmm(z_by_scale, z_to_scales, scales)
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
    return _Backward(kernels, grads, x, base, h, weights, settings, kept, needs_x).run()


class _Backward:
    """One backward pass: what it is given, its buffers, and the sums it gathers.

    Chunks make spans of up to SPAN_ROWS rows; buffers hold a chunk or, where the big weights' gradients need
    them, a span. `at` is where a chunk begins in its span.
    """

    def __init__(self, kernels, grads, x, base, h, weights, settings, kept, needs_x: bool) -> None:
        self.kernels, self.weights, self.settings = kernels, weights, settings
        self.x, self.base, self.h, self.needs_x = x, base, h, needs_x
        self.out, self.recurrent, self.cells, self.hyper_cells, self.hyper_hiddens = kept
        self.steps, self.batch, self.inputs = x.shape
        self.dtype, self.accumulate = self.recurrent.dtype, self.cells.dtype
        w = self.w = _Operands(weights, self.inputs, self.dtype, self.accumulate)
        self.products = kernels.products(self.recurrent)
        self.chunk = chunk_steps(self.steps, self.batch, w.hidden, x.device.type)
        chunks = max(1, SPAN_ROWS // (self.chunk * max(self.batch, 1)))
        self.span = min(chunks * self.chunk, max(self.steps, 1))
        self._take_gradients(grads)
        self._make_sums()
        self._make_buffers()
        pack = self.products.stationary
        self.main_to_hidden, self.hyper_to_hidden = pack(w.weight_hh), pack(w.hyper_weight_h)
        self.hyper_to_hyper, self.z_to_hyper, self.scales_to_z = (
            pack(w.hyper_weight_hh),
            pack(w.to_z),
            pack(w.from_z),
        )
        self.hyper_to_z, self.z_to_scales = pack(w.to_z.t()), pack(w.from_z.transpose(1, 2))

    def _take_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Of out, and those that run from step to step, in memory of their own."""

        def carried(grad: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
            if grad is None:
                return self.x.new_zeros(self.batch, width, dtype=dtype)
            return grad.to(dtype, copy=True).contiguous()

        w = self.w
        self.grad_out = None if grads[0] is None else grads[0].contiguous()
        self.grad_hidden = carried(grads[1], w.hidden, self.dtype)
        self.grad_cell = carried(grads[2], w.hidden, self.accumulate)
        self.grad_hyper = carried(grads[3], w.hyper, self.dtype)
        self.grad_hyper_cell = carried(grads[4], w.hyper, self.accumulate)
        self.grad_x = torch.empty_like(self.x) if self.needs_x else self.x.new_empty(0)

    def _make_sums(self) -> None:
        """Gradients that are gathered over the steps, of A."""
        w, inputs = self.w, self.inputs

        def zeros(*shape: int) -> Tensor:
            return self.x.new_zeros(shape, dtype=self.accumulate)

        slots = self.kernels.slots(self.recurrent, self.batch)
        self.sum_weight_ih, self.sum_weight_hh = zeros(w.main_gates, inputs), zeros(w.main_gates, w.hidden)
        self.sum_hyper_weight_ih = zeros(w.hyper_gates, inputs + w.hidden)
        self.sum_hyper_weight_hh = zeros(w.hyper_gates, w.hyper)
        self.sum_to_z, self.sum_z_bias = zeros(12 * w.embed, w.hyper), zeros(12 * w.embed)
        self.sum_z_to_scales = zeros(12, w.embed, w.hidden)
        self.sum_base = zeros(0) if self.base is None else zeros(self.batch, w.gates)
        self.partials, self.hyper_partials = zeros(slots, 14, w.hidden), zeros(slots, 10, w.hyper)

    def _make_buffers(self) -> None:
        w, batch, chunk, span = self.w, self.batch, self.chunk, self.span

        def low(*shape: int) -> Tensor:
            return self.x.new_empty(shape, dtype=self.dtype)

        self.grad_recurrent, self.grad_x_main = low(span, batch, w.gates), low(span, batch, w.main_gates)
        self.hypers, self.grad_z = low(span, batch, w.hyper), low(span, batch, 12 * w.embed)
        self.grad_mains, self.grad_gates = w.split(self.grad_recurrent)
        self.mains, self.gates = w.split(self.recurrent)
        self.x_main, self.z = low(chunk, batch, w.main_gates), low(chunk, batch, 12 * w.embed)
        self.scales, self.grad_scales = (low(12, chunk, batch, w.hidden) for _ in range(2))
        self.cells_after = self.cells.new_empty(chunk, batch, w.hidden)
        self.hyper_cells_after = self.cells.new_empty(chunk, batch, w.hyper)

    def run(self) -> tuple[Tensor, ...]:
        for index in reversed(range(len(self.cells))):
            start = index * self.chunk
            count = min(self.chunk, self.steps - start)
            at = start % self.span
            self._replay(index, start, count, at)
            for step in reversed(range(start, start + count)):
                self._step(index, step, step - start, step % self.span)
            self._gather_scales(count, at)
            if at == 0:
                self._gather_weights(start, min(self.span, self.steps - start))
        return self._result()

    def _replay(self, index: int, start: int, count: int, at: int) -> None:
        """What the forward made, again, over the whole chunk."""
        w, s = self.w, self.settings
        steps, place = slice(start, start + count), slice(at, at + count)
        self.kernels.hyper_fwd(
            self.gates[steps], None, self.hyper_cells[index].clone(), self.hypers[place], None,
            self.hyper_cells_after[:count], *w.hyper_norm, s.lengths, s.seed, start, *s[2:],
        )  # fmt: skip
        z_rows = self.z[:count].view(-1, 12 * w.embed)
        self.products.affine(self.hypers[place].view(-1, w.hyper), self.hyper_to_z, w.z_bias, z_rows)
        scales = self.scales[:, :count]
        self.products.bmm(self._by_scale(z_rows), self.z_to_scales, scales.view(12, -1, w.hidden))
        _x_products(self.products, w, self.x[steps].to(self.dtype), self.base, self.x_main[:count], None)
        self.kernels.main_fwd(
            self.mains[steps], self.x_main[:count], scales, w.bias, self.cells[index].clone(), None, None,
            self.cells_after[:count], *w.main_norm, s.lengths, s.seed, start, *s[2:],
        )  # fmt: skip

    def _by_scale(self, z: Tensor) -> Tensor:
        """[rows, 12 E] as [12, rows, E]."""
        return z.view(-1, 12, self.w.embed).transpose(0, 1)

    def _step(self, index: int, step: int, this: int, at: int) -> None:
        """Step number `step`, the chunk's `this`, the span's `at`."""
        w, s, mm = self.w, self.settings, self.products.mm
        cell_before = self.cells_after[this - 1] if this else self.cells[index]
        hyper_before = self.hyper_cells_after[this - 1] if this else self.hyper_cells[index]
        self.kernels.main_bwd(
            self.mains[step], self.x_main[this], self.scales[:, this], w.bias, cell_before,
            self.cells_after[this], None if self.grad_out is None else self.grad_out[step],
            self.grad_hidden, self.grad_cell, self.grad_mains[at], self.grad_x_main[at],
            self.grad_scales[:, this], self.partials, *w.main_norm, s.lengths, s.seed, step, *s[2:],
        )  # fmt: skip
        self.products.bmm(self.grad_scales[:, this], self.scales_to_z, self._by_scale(self.grad_z[at]))
        mm(self.grad_z[at], self.z_to_hyper, self.grad_hyper, add=True)
        self.kernels.hyper_bwd(
            self.gates[step], hyper_before, self.hyper_cells_after[this], self.grad_hyper,
            self.grad_hyper_cell, self.grad_gates[at], self.hyper_partials, *w.hyper_norm, s.lengths, s.seed,
            step, *s[2:],
        )  # fmt: skip
        mm(self.grad_mains[at], self.main_to_hidden, self.grad_hidden, add=True)
        mm(self.grad_gates[at], self.hyper_to_hidden, self.grad_hidden, add=True)
        mm(self.grad_gates[at], self.hyper_to_hyper, self.grad_hyper, add=True)

    def _gather_scales(self, count: int, at: int) -> None:
        """The chunk's part of the gradients of alpha_weight and beta_weight."""
        z = self._by_scale(self.z[:count].view(-1, 12 * self.w.embed))
        grad_scales = self.grad_scales[:, :count].flatten(1, 2)
        self.products.accumulate(self.sum_z_to_scales, z.transpose(1, 2), grad_scales)

    def _gather_weights(self, start: int, count: int) -> None:
        """The span's part of the other weights' gradients, and those of x."""
        w, inputs, add = self.w, self.inputs, self.products.accumulate
        x = self.x[start : start + count].to(self.dtype).reshape(count * self.batch, inputs)
        before = self.out[start - 1] if start else self.h
        hidden_before = _shifted(self.out[start : start + count], before, self.dtype)
        hyper_before = _shifted(self.hypers[:count], self.hyper_hiddens[start // self.chunk], self.dtype)
        hypers = self.hypers[:count].flatten(0, 1)
        mains, gates, x_mains, z = (
            part[:count].flatten(0, 1)
            for part in (self.grad_mains, self.grad_gates, self.grad_x_main, self.grad_z)
        )
        add(self.sum_weight_hh, mains.t(), hidden_before)
        add(self.sum_hyper_weight_ih[:, inputs:], gates.t(), hidden_before)
        add(self.sum_hyper_weight_hh, gates.t(), hyper_before)
        add(self.sum_weight_ih, x_mains.t(), x)
        add(self.sum_hyper_weight_ih[:, :inputs], gates.t(), x)
        add(self.sum_to_z, z.t(), hypers)
        self.sum_z_bias += z.sum(0, dtype=self.accumulate)
        if self.base is not None:
            main_base, hyper_base = w.split(self.sum_base)
            main_base += self.grad_x_main[:count].sum(0, dtype=self.accumulate)
            hyper_base += self.grad_gates[:count].sum(0, dtype=self.accumulate)
        if self.needs_x:
            grad_x = self.grad_x[start : start + count].view(count * self.batch, inputs)
            found = grad_x if grad_x.dtype == self.dtype else torch.empty_like(x)
            self.products.mm(x_mains, w.weight_ih, found)
            self.products.mm(gates, w.hyper_weight_x, found, add=True)
            if found is not grad_x:
                grad_x.copy_(found)

    def _result(self) -> tuple[Tensor, ...]:
        w, h = self.w, self.h
        sums, hyper_sums = self.partials.sum(0), self.hyper_partials.sum(0)
        z_weight, zb_weight = self.sum_to_z.view(12, w.embed, w.hyper).split((8, 4))
        alpha_weight, beta_weight = self.sum_z_to_scales.transpose(1, 2).split((8, 4))
        found = Weights(
            weight_ih=self.sum_weight_ih, weight_hh=self.sum_weight_hh, bias=sums[8:12].flatten(),
            hyper_weight_ih=self.sum_hyper_weight_ih, hyper_weight_hh=self.sum_hyper_weight_hh,
            z_weight=z_weight, z_bias=self.sum_z_bias[: 8 * w.embed].view(8, w.embed),
            alpha_weight=alpha_weight, zb_weight=zb_weight, beta_weight=beta_weight,
            ln_c_weight=sums[12], ln_c_bias=sums[13], ln_weight=sums[:4], ln_bias=sums[4:8],
            hyper_ln_weight=hyper_sums[:4], hyper_ln_bias=hyper_sums[4:8],
            hyper_ln_c_weight=hyper_sums[8], hyper_ln_c_bias=hyper_sums[9],
        )  # fmt: skip
        of_weights = [
            _own(grad, weight.dtype)
            for grad, weight in zip(found, self.weights, strict=True)
            if weight is not None and grad is not None
        ]
        grad_base = self.sum_base if self.base is None else self.sum_base.to(self.base.dtype)
        state = (
            self.grad_hidden.to(h.dtype),
            self.grad_cell,
            self.grad_hyper.to(h.dtype),
            self.grad_hyper_cell,
        )
        return self.grad_x, grad_base, *state, *of_weights


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
