"""Stroke rasterization in eager PyTorch: the oracle, at float32 or float64 (DESIGN 4.1's definitions).

The nearest segment of each pixel is found without autograd in slices of segments; its distance is then formed
again, differentiably, from the two end points gathered for each pixel. Memory is O(B H W), not O(B T H W).
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

_SLICE_ELEMENTS = 1 << 24


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype the arithmetic is done in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def segment_exists(points: Tensor, pen_down: Tensor, lengths: Tensor | None) -> Tensor:
    """[B, T-1] bool: pen down at t, t+1 < lengths, both ends finite."""
    finite = torch.isfinite(points).all(-1)
    exists = pen_down[:, :-1] & finite[:, :-1] & finite[:, 1:]
    if lengths is not None:
        following = torch.arange(1, points.shape[1], device=points.device)
        exists = exists & (following < lengths[:, None])
    return exists


def _squared_distance(pixel: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Squared distance of `pixel` [..., 2] to segments start..end [..., 2], broadcast; +inf on overflow."""
    along = end - start
    length2 = (along * along).sum(-1)
    proper = length2 > 0
    fraction = ((pixel - start) * along).sum(-1) / torch.where(proper, length2, 1.0)
    fraction = torch.where(proper, fraction, 0.0).clamp(0.0, 1.0)
    gap = pixel - start - fraction[..., None] * along
    distance2 = (gap * gap).sum(-1)
    return torch.where(torch.isnan(distance2), torch.inf, distance2)


def _pixels(height: int, width: int, points: Tensor) -> Tensor:
    y = torch.arange(height, device=points.device, dtype=points.dtype)
    x = torch.arange(width, device=points.device, dtype=points.dtype)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


@torch.no_grad()
def nearest_segment(points: Tensor, exists: Tensor, pixels: Tensor) -> Tensor:
    """[B, H, W] int64: the lowest index of the nearest existing segment, -1 where there is none."""
    batch, (height, width) = points.shape[0], pixels.shape[:2]
    best = points.new_full((batch, height, width), torch.inf)
    segment = torch.full((batch, height, width), -1, dtype=torch.int64, device=points.device)
    step = max(1, _SLICE_ELEMENTS // max(1, batch * height * width))
    for first in range(0, exists.shape[1], step):
        last = min(first + step, exists.shape[1])
        start = points[:, first:last, None, None]
        end = points[:, first + 1 : last + 1, None, None]
        distance2 = _squared_distance(pixels, start, end)
        distance2 = torch.where(exists[:, first:last, None, None], distance2, torch.inf)
        least = distance2.amin(1)
        index = torch.arange(first, last, device=points.device)[:, None, None]
        lowest = torch.where(distance2 == least[:, None], index, last).amin(1)
        better = least < best
        best = torch.where(better, least, best)
        segment = torch.where(better, lowest, segment)
    return segment


def stroke_distance(
    points: Tensor, pen_down: Tensor, lengths: Tensor | None, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """(d2 [B, H, W] in the compute dtype, segment [B, H, W] int32); +inf and -1 where nothing is drawn."""
    points = points.to(compute_dtype(points.dtype))
    if points.shape[1] < 2:
        blank = points.sum() * 0 if points.requires_grad else 0
        shape = (points.shape[0], height, width)
        return points.new_full(shape, torch.inf) + blank, points.new_full(shape, -1, dtype=torch.int32)
    exists = segment_exists(points.detach(), pen_down, lengths)
    pixels = _pixels(height, width, points)
    segment = nearest_segment(points.detach(), exists, pixels)
    drawn = segment >= 0
    flat = segment.clamp(min=0).flatten(1)[..., None].expand(-1, -1, 2)
    shape = (*segment.shape, 2)
    start = torch.where(drawn[..., None], points.gather(1, flat).view(shape), 0.0)
    end = torch.where(drawn[..., None], points.gather(1, flat + 1).view(shape), 0.0)
    distance2 = torch.where(drawn, _squared_distance(pixels, start, end), torch.inf)
    return distance2, segment.to(torch.int32)


def blur_weights(sigma: float, taps: int, like: Tensor) -> Tensor:
    """[taps] Gaussian weights that sum to 1, centred."""
    position = torch.arange(taps, dtype=torch.float64, device=like.device) - taps // 2
    weights = torch.exp(-0.5 * (position / sigma) ** 2)  # sigma**2 could underflow
    return (weights / weights.sum()).to(like.dtype)


def blur(image: Tensor, sigma: float, taps: int) -> Tensor:
    """Separable Gaussian of [B, H, W], zero-padded."""
    weights = blur_weights(sigma, taps, image)
    image = functional.conv2d(image[:, None], weights.view(1, 1, taps, 1), padding=(taps // 2, 0))
    return functional.conv2d(image, weights.view(1, 1, 1, taps), padding=(0, taps // 2))[:, 0]


def intensity_image(
    points: Tensor,
    pen_down: Tensor,
    lengths: Tensor | None,
    height: int,
    width: int,
    sharpness: float,
    offset: float,
    blur_sigma: float,
    blur_taps: int,
) -> Tensor:
    """[B, H, W] in the compute dtype; `blur_sigma` 0 is no blur."""
    distance2, _ = stroke_distance(points, pen_down, lengths, height, width)
    drawn = torch.isfinite(distance2)
    image = torch.sigmoid(offset - sharpness * torch.where(drawn, distance2, 0.0))
    image = torch.where(drawn, image, 0.0)
    return blur(image, blur_sigma, blur_taps) if blur_sigma > 0 else image


def binary_cross_entropy(image: Tensor, target: Tensor) -> Tensor:
    """[B]: mean over pixels of the two-sided cross-entropy, probabilities clamped to [1e-7, 1 - 1e-7]."""
    ink = image.clamp(1e-7, 1 - 1e-7)
    return -(target * torch.log(ink) + (1 - target) * torch.log1p(-ink)).mean((1, 2))
