"""Loss of a mixture density head in eager PyTorch: the oracle, at float32 or float64.

Graves 2013 (arXiv 1308.0850, eqs. 18 to 26) in the form of sketch-rnn (Ha and Eck 2018).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Simplified QuickDraw repeats offsets exactly, and the likelihood of a repeated value has no upper bound:
# the spreads are kept off zero and the correlation off one. The same in csrc/mixture_math.h.
LOG_SIGMA_RANGE = (-7.0, 7.0)
CORRELATION_LIMIT = 5.0


class Mixture(NamedTuple):
    """Parameters of M bivariate Gaussians and three pen states at each of any leading positions."""

    pen_logits: Tensor
    """[..., 3]: pen down, pen lifted, sketch ended"""
    log_weights: Tensor
    """[..., M], normalised: logsumexp is 0"""
    mean_x: Tensor
    """[..., M]"""
    mean_y: Tensor
    """[..., M]"""
    log_sigma_x: Tensor
    """[..., M]"""
    log_sigma_y: Tensor
    """[..., M]"""
    correlation: Tensor
    """[..., M], in (-1, 1)"""


def output_size(components: int) -> int:
    """Width of the head that `parse_mixture` reads."""
    return 3 + 6 * components


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype the arithmetic is done in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def parse_mixture(output: Tensor) -> Mixture:
    """Reads [..., 3 + 6 M]: pens, then M each of weight, mean x, mean y, log sigma x, log sigma y, atanh rho.

    log sigma is clamped to [-7, 7] and atanh rho to [-5, 5], where their gradient is 0.
    """
    if output.shape[-1] < output_size(1) or (output.shape[-1] - 3) % 6:
        raise ValueError(f"output must have 3 + 6 M features, got shape {tuple(output.shape)}")
    output = output.to(compute_dtype(output.dtype))
    weights, mean_x, mean_y, log_sigma_x, log_sigma_y, raw_correlation = output[..., 3:].chunk(6, dim=-1)
    return Mixture(
        output[..., :3],
        F.log_softmax(weights, dim=-1),
        mean_x,
        mean_y,
        log_sigma_x.clamp(*LOG_SIGMA_RANGE),
        log_sigma_y.clamp(*LOG_SIGMA_RANGE),
        torch.tanh(raw_correlation.clamp(-CORRELATION_LIMIT, CORRELATION_LIMIT)),
    )


def log_likelihood(mixture: Mixture, offsets: Tensor) -> Tensor:
    """log p(offsets) [...] of offsets [..., 2] under the mixture, summed in the log domain.

    Each Gaussian is factored as p(x) p(y | x): y given x has mean rho x and variance 1 - rho^2 in units of
    the two spreads, so that no difference of large squares is taken.
    """
    x, y = offsets[..., :1], offsets[..., 1:]
    x = (x - mixture.mean_x) * torch.exp(-mixture.log_sigma_x)
    y = (y - mixture.mean_y) * torch.exp(-mixture.log_sigma_y)
    rest = 1 - mixture.correlation.square()
    exponent = x.square() + (y - mixture.correlation * x).square() / rest
    log_norm = mixture.log_sigma_x + mixture.log_sigma_y + 0.5 * torch.log(rest) + math.log(2 * math.pi)
    return torch.logsumexp(mixture.log_weights - 0.5 * exponent - log_norm, dim=-1)


def mixture_loss(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(pen, stroke) of output [N, 3 + 6 M] and target [N, 5], means over the N positions; 0 without one."""
    mixture = parse_mixture(output)
    positions = max(1, output.shape[0])
    states = target[:, 2:].argmax(dim=-1)
    pen = F.cross_entropy(mixture.pen_logits, states, reduction="sum") / positions
    stroke = -(log_likelihood(mixture, target[:, :2]) * (1 - target[:, 4])).sum() / positions
    return pen, stroke
