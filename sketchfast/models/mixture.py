"""Mixture density head of sketch decoders: offsets as a mixture of bivariate Gaussians, pens as a softmax.

Graves 2013 (arXiv 1308.0850, eqs. 18 to 26) in the form of sketch-rnn (Ha and Eck 2018).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Simplified QuickDraw repeats offsets exactly, and the likelihood of a repeated value has no upper bound:
# the spreads are kept off zero and the correlation off one.
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


class Gaussian(NamedTuple):
    """One bivariate Gaussian at each position, all [...]."""

    mean_x: Tensor
    mean_y: Tensor
    log_sigma_x: Tensor
    log_sigma_y: Tensor
    correlation: Tensor


def output_size(components: int) -> int:
    """Width of the head that `parse_mixture` reads."""
    return 3 + 6 * components


def parse_mixture(output: Tensor) -> Mixture:
    """Reads [..., 3 + 6 M]: pens, then M each of weight, mean x, mean y, log sigma x, log sigma y, atanh rho.

    log sigma is clamped to [-7, 7] and atanh rho to [-5, 5], where their gradient is 0.
    """
    if output.shape[-1] < output_size(1) or (output.shape[-1] - 3) % 6:
        raise ValueError(f"output must have 3 + 6 M features, got shape {tuple(output.shape)}")
    output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
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


def pick(mixture: Mixture, index: Tensor) -> Gaussian:
    """The component numbered `index` [...] (int64) at each position."""
    return Gaussian(*(part.gather(-1, index[..., None])[..., 0] for part in mixture[2:]))


def likeliest(mixture: Mixture) -> Gaussian:
    """The component of the greatest weight at each position."""
    return pick(mixture, mixture.log_weights.argmax(dim=-1))


def sample_gaussian(gaussian: Gaussian, noise: Tensor) -> Tensor:
    """Reparameterised samples [..., 2]: standard normal `noise` [..., 2] through mean and Cholesky factor."""
    rho = gaussian.correlation
    x = noise[..., 0]
    y = rho * x + torch.sqrt(1 - rho.square()) * noise[..., 1]
    return torch.stack(
        (
            gaussian.mean_x + torch.exp(gaussian.log_sigma_x) * x,
            gaussian.mean_y + torch.exp(gaussian.log_sigma_y) * y,
        ),
        dim=-1,
    )


def sample(
    mixture: Mixture, temperature: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Offsets [..., 2] and pen states [...] (int64: 0 down, 1 lifted, 2 ended) drawn from the mixture.

    `temperature` divides the logits of weights and pens and multiplies the variances (sketch-rnn, eq. 8);
    0 takes the mean of the likeliest component and the likeliest pen.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature!r}")
    if temperature == 0:
        best = likeliest(mixture)
        return torch.stack((best.mean_x, best.mean_y), dim=-1), mixture.pen_logits.argmax(dim=-1)
    chosen = pick(mixture, _sample_index(mixture.log_weights / temperature, generator))
    noise = torch.randn(
        (*chosen.mean_x.shape, 2), generator=generator, dtype=chosen.mean_x.dtype, device=chosen.mean_x.device
    )
    pens = _sample_index(mixture.pen_logits / temperature, generator)
    return sample_gaussian(chosen, noise * math.sqrt(temperature)), pens


def _sample_index(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    probabilities = torch.softmax(logits, dim=-1)
    flat = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
    return flat.view(logits.shape[:-1])
