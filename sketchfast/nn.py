"""Modules over the ops: they hold parameters, the ops do the work."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops._contract import FLOAT_DTYPES, IMPLS, check_integer, check_number, check_tensor, describe
from .ops.hyperlstm import State, check_dtype, hyperlstm

__all__ = ["Context", "HyperLSTM", "HyperLSTMCell"]


class Context(NamedTuple):
    """What an input that is constant over time comes to; see `HyperLSTM.project`."""

    products: Tensor
    """[B, 4 hidden_size + 4 hyper_size]"""
    size: int
    """features of that input"""


def _blockwise_orthogonal_(weight: Tensor, rows: int) -> None:
    for block in weight.split(rows):
        nn.init.orthogonal_(block)


class _HyperLSTMBase(nn.Module):
    """Parameters and initialisation shared by the sequence module and the cell."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        hyper_size: int,
        embed_size: int,
        *,
        layer_norm: bool = True,
        recurrent_dropout: float = 0.0,
        forget_bias: float = 1.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.input_size = check_integer("input_size", input_size, 1)
        self.hidden_size = check_integer("hidden_size", hidden_size, 1)
        self.hyper_size = check_integer("hyper_size", hyper_size, 1)
        self.embed_size = check_integer("embed_size", embed_size, 1)
        self.layer_norm = bool(layer_norm)
        self.recurrent_dropout = check_number("recurrent_dropout", recurrent_dropout, at_least=0)
        if self.recurrent_dropout >= 1:
            raise ValueError(f"recurrent_dropout must be below 1, got {recurrent_dropout!r}")
        self.forget_bias = check_number("forget_bias", forget_bias)
        if impl not in IMPLS:
            raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
        self.impl = impl

        hidden_size, hyper_size, embed_size = self.hidden_size, self.hyper_size, self.embed_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (4 * hidden_size, self.input_size),
            "weight_hh": (4 * hidden_size, hidden_size),
            "bias": (4 * hidden_size,),
            "hyper_weight_ih": (4 * hyper_size, self.input_size + hidden_size),
            "hyper_weight_hh": (4 * hyper_size, hyper_size),
            "z_weight": (8, embed_size, hyper_size),
            "z_bias": (8, embed_size),
            "alpha_weight": (8, hidden_size, embed_size),
            "zb_weight": (4, embed_size, hyper_size),
            "beta_weight": (4, hidden_size, embed_size),
            "ln_c_weight": (hidden_size,),
            "ln_c_bias": (hidden_size,),
        }
        if self.layer_norm:
            shapes |= {
                "ln_weight": (4, hidden_size),
                "ln_bias": (4, hidden_size),
                "hyper_ln_weight": (4, hyper_size),
                "hyper_ln_bias": (4, hyper_size),
                "hyper_ln_c_weight": (hyper_size,),
                "hyper_ln_c_bias": (hyper_size,),
            }
        #: read by name, not from the registry: pruned, parametrised or replicated weights are no parameters
        self._names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def _weights(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._names}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the parameters anew, as sketch-rnn does."""
        p = self._weights()
        for name, value in p.items():
            if name.endswith("bias"):
                value.zero_()
            elif "ln_" in name:
                value.fill_(1.0)
        nn.init.xavier_uniform_(p["weight_ih"])
        nn.init.xavier_uniform_(p["hyper_weight_ih"])
        _blockwise_orthogonal_(p["weight_hh"], self.hidden_size)
        _blockwise_orthogonal_(p["hyper_weight_ih"][:, self.input_size :], self.hyper_size)
        _blockwise_orthogonal_(p["hyper_weight_hh"], self.hyper_size)
        p["z_weight"].zero_()
        p["z_bias"].fill_(1.0)
        p["alpha_weight"].fill_(0.1 / self.embed_size)
        p["zb_weight"].normal_(std=0.01)
        p["beta_weight"].zero_()

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, hyper_size={self.hyper_size}, "
            f"embed_size={self.embed_size}, layer_norm={self.layer_norm}, "
            f"recurrent_dropout={self.recurrent_dropout}, forget_bias={self.forget_bias}, impl={self.impl!r}"
        )

    def project(self, context: Tensor) -> Context:
        """The products of `context` [B, C] with the weights of the last C <= input_size of the inputs.

        Computed once and given as `context=`, it stands for that input at every step.
        """
        weights = self._weights()
        check_tensor("context", context, ("B", "C"), FLOAT_DTYPES, like=weights["weight_ih"])
        check_dtype("context", context, weights["weight_ih"])
        size = context.shape[1]
        if size > self.input_size:
            raise ValueError(f"context must have at most input_size={self.input_size} features, got {size}")
        columns = slice(self.input_size - size, self.input_size)
        weight = torch.cat((weights["weight_ih"][:, columns], weights["hyper_weight_ih"][:, columns]))
        return Context(F.linear(context, weight), size)

    def _as_context(self, context: Tensor | Context) -> Context:
        if isinstance(context, Context):
            return context
        if isinstance(context, Tensor):
            return self.project(context)
        raise TypeError(f"context must be a tensor or what `project` returns, got {describe(context)}")

    def _run(
        self,
        x: Tensor,
        state: State | None,
        *,
        context: Tensor | Context | None = None,
        lengths: Tensor | None = None,
        seed: Tensor | int | None = None,
        step_offset: int = 0,
    ) -> tuple[Tensor, State]:
        weights = self._weights()
        if context is not None:
            context = self._as_context(context)
            own = self.input_size - context.size
            check_tensor("x", x, ("T", "B", own), FLOAT_DTYPES, like=weights["weight_ih"])
            if len(context.products) != x.shape[1]:
                raise ValueError(f"context must have x's {x.shape[1]} rows, got {len(context.products)}")
            weights["weight_ih"] = weights["weight_ih"][:, :own]
            both = weights["hyper_weight_ih"]
            weights["hyper_weight_ih"] = torch.cat((both[:, :own], both[:, self.input_size :]), dim=1)
        return hyperlstm(
            x,
            state,
            weights,
            base=None if context is None else context.products,
            lengths=lengths,
            forget_bias=self.forget_bias,
            recurrent_dropout=self.recurrent_dropout if self.training else 0.0,
            seed=seed,
            step_offset=step_offset,
            impl=self.impl,
        )


class HyperLSTM(_HyperLSTMBase):
    """An LSTM whose gates are rescaled at every step by a smaller LSTM, over whole sequences.

    Ha, Dai, Le 2017 ("HyperNetworks") in the form of the sketch-rnn decoder. Gates are i, j, f, o (j is the
    new input), s the logistic function, LN a layer norm over the units of one gate with eps 1e-3:

        p              = [x_t, h] hyper_weight_ih' + hyper_h hyper_weight_hh'
        pi, pj, pf, po = LN(p) per gate
        hyper_c'       = hyper_c * s(pf + forget_bias) + s(pi) * drop(tanh(pj))
        hyper_h'       = tanh(LN(hyper_c')) * s(po)
        z_s            = hyper_h' z_weight[s]' + z_bias[s]        for the 4 gates of x, then the 4 of h
        alpha_s        = z_s alpha_weight[s]'
        beta_g         = (hyper_h' zb_weight[g]') beta_weight[g]'
        a_g            = alpha_gx * (x_t weight_ih[g]') + alpha_gh * (h weight_hh[g]') + beta_g + bias[g]
        i, j, f, o     = LN(a) per gate
        c'             = c * s(f + forget_bias) + s(i) * drop(tanh(j))
        h'             = tanh(LN(c')) * s(o)

    Args:
        input_size, hidden_size, hyper_size, embed_size: the sizes of x, h, hyper_h and z, each at least 1.
        layer_norm: False removes every layer norm but the one on c', with its parameters.
        recurrent_dropout: probability in [0, 1) that an element of tanh(j) or tanh(pj) is dropped at a step,
            in training mode only.
        forget_bias: added to the forget gates.
        impl: "auto", "native" (C++ on CPU, CUDA on GPU), "triton" or "reference". An explicit one that cannot
            run raises RuntimeError at the call.

    `forward` returns `(out [T, B, H], (h, c, hyper_h, hyper_c))`; gradients go to x, to state and to every
    parameter. Its arguments:
        x: [T, B, input_size], on the device and dtype of the parameters (any but float64 under autocast).
        state: (h [B, H], c [B, H], hyper_h [B, Hh], hyper_c [B, Hh]); None is zeros.
        context: [B, C], an input that is the same at every step, or what `project` made of it once: then x
            is [T, B, input_size - C], and stands before it. Its products are taken once and not T times.
        lengths: [B] integer, clamped to [0, T]; past a sequence's length its state holds and out is 0.
        seed: int64 scalar tensor (or int in [-2**63, 2**63)) that decides the dropout masks; None draws one
            from torch's generator on x's device.
        step_offset: number of steps run before, where a sequence is run in pieces under one seed.
    Cells, gates and layer norms are computed in float32 (float64 for float64), products in x's or autocast's
    dtype; out, h and hyper_h come in x's dtype, c and hyper_c in that of the arithmetic. Once differentiable.
    A wrong argument raises TypeError or ValueError that names it.
    """

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        context: Tensor | Context | None = None,
        lengths: Tensor | None = None,
        seed: Tensor | int | None = None,
        step_offset: int = 0,
    ) -> tuple[Tensor, State]:
        return self._run(x, state, context=context, lengths=lengths, seed=seed, step_offset=step_offset)


class HyperLSTMCell(_HyperLSTMBase):
    """One step of `HyperLSTM`: same arguments, same parameter names, same equations.

    `forward(x [B, input_size], state=None, *, step=0, seed=None, context=None)` returns the next state
    `(h, c, hyper_h, hyper_c)`; h is the output. `step` counts the steps run before and, with `seed`, decides
    the dropout mask, so that cells stepped under one seed equal the sequence. In a loop of steps give
    `context=cell.project(constant_input)`, made once: each step then multiplies only what changes.
    """

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        step: int = 0,
        seed: Tensor | int | None = None,
        context: Tensor | Context | None = None,
    ) -> State:
        if context is not None:
            context = self._as_context(context)
        own = self.input_size - (0 if context is None else context.size)
        check_tensor("x", x, ("B", own), FLOAT_DTYPES)
        check_integer("step", step, 0)
        return self._run(x[None], state, seed=seed, step_offset=step, context=context)[1]
