"""Mixture density head of sketch decoders: offsets as a mixture of bivariate Gaussians, pens as a softmax.

Graves 2013 (arXiv 1308.0850, eqs. 18 to 26) in the form of sketch-rnn (Ha and Eck 2018).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.reference.mixture import (
    CORRELATION_LIMIT,
    LOG_SIGMA_RANGE,
    Mixture,
    compute_dtype,
    log_likelihood,
    output_size,
    parse_mixture,
)

__all__ = [
    "Gaussian",
    "Mixture",
    "likeliest",
    "likeliest_of",
    "log_likelihood",
    "output_size",
    "parse_mixture",
    "pick",
    "sample",
    "sample_gaussian",
]


class Gaussian(NamedTuple):
    """One bivariate Gaussian at each position, all [...]."""

    mean_x: Tensor
    mean_y: Tensor
    log_sigma_x: Tensor
    log_sigma_y: Tensor
    correlation: Tensor


def pick(mixture: Mixture, index: Tensor) -> Gaussian:
    """The component numbered `index` [...] (int64) at each position."""
    return Gaussian(*(part.gather(-1, index[..., None])[..., 0] for part in mixture[2:]))


def likeliest(mixture: Mixture) -> Gaussian:
    """The component of the greatest weight at each position."""
    return pick(mixture, mixture.log_weights.argmax(dim=-1))


def likeliest_of(output: Tensor) -> Gaussian:
    """`likeliest` of a head's output [..., 3 + 6 M], of which it parses no other component."""
    parts = output[..., 3:].unflatten(-1, (6, -1))
    index = parts[..., 0, :].argmax(dim=-1)
    chosen = parts.gather(-1, index[..., None, None].expand(*index.shape, 6, 1))[..., 0]
    _, mean_x, mean_y, log_sigma_x, log_sigma_y, raw = chosen.to(compute_dtype(output.dtype)).unbind(dim=-1)
    return Gaussian(
        mean_x,
        mean_y,
        log_sigma_x.clamp(*LOG_SIGMA_RANGE),
        log_sigma_y.clamp(*LOG_SIGMA_RANGE),
        torch.tanh(raw.clamp(-CORRELATION_LIMIT, CORRELATION_LIMIT)),
    )


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
