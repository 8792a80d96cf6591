"""HyperLSTM in eager PyTorch: the oracle of the fused kernels, and what runs until they exist.

Ha, Dai, Le 2017 ("HyperNetworks") in the form of the sketch-rnn decoder: layer norm, and recurrent dropout
without memory loss (Semeniuta et al. 2016). Gate order everywhere: i, j, f, o, where j is the new input.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LN_EPS = 1e-3
MAIN_STREAM, HYPER_STREAM = 0, 1

_WORD = 0xFFFFFFFF

State = tuple[Tensor, Tensor, Tensor, Tensor]


def _multiply_high_low(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    # int64 wraps as uint64 does, so that shift and mask give both halves of the 64-bit product
    product = word * factor
    return (product >> 32) & _WORD, product & _WORD


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011): four random words [..., 4] for each counter, as int64 in [0, 2^32).

    `counter` and `key` hold int64 words in [0, 2^32) that broadcast against each other, lowest word first.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_high_low(c0, 0xD2511F53)
        high1, low1 = _multiply_high_low(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def dropout_masks(
    steps: int,
    batch: int,
    width: int,
    *,
    p: float,
    seed: Tensor,
    stream: int,
    step_offset: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Masks [steps, batch, width] of 0 and 1 / (1 - p), on the device of `seed` (int64 scalar).

    Element b * width + unit of step t is word (element % 4) of counter (t + step_offset, stream,
    element // 4, 0) under key `seed`; it is kept iff word / 2^32 >= p.
    """
    step = torch.arange(step_offset, step_offset + steps, device=seed.device)[:, None] & _WORD
    block = torch.arange((batch * width + 3) // 4, device=seed.device)[None]
    zero = torch.zeros_like(block)
    words = philox4x32((step, zero + stream, block, zero), (seed & _WORD, (seed >> 32) & _WORD))
    # in double: int64 against a number would be compared in float32
    kept = words.flatten(1)[:, : batch * width].double() >= p * 2.0**32
    return (kept.to(dtype) / (1.0 - p)).view(steps, batch, width)


def _normalise(gates: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Layer norm over the last dimension, then the affine map of each gate; the identity without weights."""
    if weight is None or bias is None:
        return gates
    return torch.addcmul(bias, F.layer_norm(gates, gates.shape[-1:], eps=LN_EPS), weight)


def hyperlstm(
    x: Tensor,
    state: State,
    params: Mapping[str, Tensor],
    *,
    base: Tensor | None = None,
    lengths: Tensor | None = None,
    forget_bias: float = 1.0,
    recurrent_dropout: float = 0.0,
    seed: Tensor | None = None,
    step_offset: int = 0,
) -> tuple[Tensor, State]:
    """Runs x [T, B, I] through the HyperLSTM; gives out [T, B, H] and the last state.

    `state` is (h [B, H], c [B, H], hyper_h [B, Hh], hyper_c [B, Hh]); `params` maps the parameter names of
    `sketchfast.nn.HyperLSTM` to tensors, and has layer norm iff it has `ln_weight`. `base` [B, 4H + 4Hh] is
    added to the products of x at every step. x is zero past the end. Dropout is on iff `recurrent_dropout` is
    above 0. Cells, gates and layer norms are float32 (float64 for float64); out, h and hyper_h come in x's
    dtype.
    """
    steps, batch, inputs = x.shape
    hidden, hyper = params["weight_hh"].shape[1], params["hyper_weight_hh"].shape[1]
    embed = params["z_weight"].shape[1]
    main_gates, hyper_gates = 4 * hidden, 4 * hyper
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    p = {name: value.to(accumulate) for name, value in params.items() if "ln_" in name or name == "bias"}
    ln_weight, ln_bias = (p[n][:, None] if n in p else None for n in ("ln_weight", "ln_bias"))
    hyper_ln_weight, hyper_ln_bias = p.get("hyper_ln_weight"), p.get("hyper_ln_bias")
    bias = p["bias"].view(4, 1, hidden)

    # what shares an input is one product: [x -> main and hyper gates], [h -> both], [hyper_h -> every z]
    from_x = torch.cat((params["weight_ih"], params["hyper_weight_ih"][:, :inputs]))
    from_h = torch.cat((params["weight_hh"], params["hyper_weight_ih"][:, inputs:])).t()
    to_z = torch.cat((params["z_weight"], params["zb_weight"])).flatten(0, 1).t()
    z_bias = F.pad(params["z_bias"], (0, 0, 0, 4)).flatten()
    from_z = torch.cat((params["alpha_weight"], params["beta_weight"])).transpose(1, 2)
    hyper_weight_hh = params["hyper_weight_hh"].t()

    if lengths is not None:
        lives = (torch.arange(steps, device=x.device)[:, None, None] < lengths[None, :, None]).unbind(0)
    from_input = F.linear(x, from_x).to(accumulate)
    if base is not None:
        from_input = from_input + base.to(accumulate)
    x_main, x_hyper = from_input.split((main_gates, hyper_gates), dim=-1)
    x_mains = x_main.unflatten(-1, (4, hidden)).transpose(1, 2).contiguous().unbind(0)
    x_hypers = x_hyper.unbind(0)
    if recurrent_dropout > 0:
        if seed is None:
            raise ValueError("seed must be given where recurrent_dropout > 0, got None")
        drop_main, drop_hyper = (
            dropout_masks(
                steps,
                batch,
                width,
                p=recurrent_dropout,
                seed=seed,
                stream=stream,
                step_offset=step_offset,
                dtype=accumulate,
            )
            for width, stream in ((hidden, MAIN_STREAM), (hyper, HYPER_STREAM))
        )

    h, c, hyper_h, hyper_c = (part.to(accumulate) for part in state)
    outputs = []
    for t in range(steps):
        h_main, h_hyper = (h.to(x.dtype) @ from_h).to(accumulate).split((main_gates, hyper_gates), dim=-1)

        gates = x_hypers[t] + h_hyper + (hyper_h.to(x.dtype) @ hyper_weight_hh).to(accumulate)
        i, j, f, o = _normalise(gates.view(batch, 4, hyper), hyper_ln_weight, hyper_ln_bias).unbind(1)
        j = torch.tanh(j)
        if recurrent_dropout > 0:
            j = j * drop_hyper[t]
        new_hyper_c = torch.addcmul(hyper_c * torch.sigmoid(f + forget_bias), torch.sigmoid(i), j)
        normalised_c = new_hyper_c
        if "hyper_ln_c_weight" in p:
            normalised_c = F.layer_norm(
                new_hyper_c, (hyper,), p["hyper_ln_c_weight"], p["hyper_ln_c_bias"], LN_EPS
            )
        new_hyper_h = torch.tanh(normalised_c) * torch.sigmoid(o)

        z = torch.addmm(z_bias, new_hyper_h.to(x.dtype), to_z).view(batch, 12, embed).transpose(0, 1)
        alpha_x, alpha_h, beta = torch.bmm(z, from_z).to(accumulate).split(4)
        gates = torch.addcmul(beta + bias, alpha_x, x_mains[t])
        gates = torch.addcmul(gates, alpha_h, h_main.view(batch, 4, hidden).transpose(0, 1))
        i, j, f, o = _normalise(gates, ln_weight, ln_bias).unbind(0)
        j = torch.tanh(j)
        if recurrent_dropout > 0:
            j = j * drop_main[t]
        new_c = torch.addcmul(c * torch.sigmoid(f + forget_bias), torch.sigmoid(i), j)
        normalised_c = F.layer_norm(new_c, (hidden,), p["ln_c_weight"], p["ln_c_bias"], LN_EPS)
        new_h = torch.tanh(normalised_c) * torch.sigmoid(o)

        if lengths is None:
            h, c, hyper_h, hyper_c = new_h, new_c, new_hyper_h, new_hyper_c
            outputs.append(h)
        else:
            h, c, hyper_h, hyper_c = (
                torch.where(lives[t], new, old)
                for new, old in ((new_h, h), (new_c, c), (new_hyper_h, hyper_h), (new_hyper_c, hyper_c))
            )
            outputs.append(torch.where(lives[t], new_h, new_h.new_zeros(())))
    out = torch.stack(outputs) if outputs else x.new_zeros(0, batch, hidden)
    return out.to(x.dtype), (h.to(x.dtype), c, hyper_h.to(x.dtype), hyper_c)
