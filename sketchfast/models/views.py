"""Random views of a whole batch of images at once, on the batch's device: what SwAV asks of its two views.

torchvision transforms one image at a time, half a millisecond each: four worker processes could not keep a
GPU busy, and one laptop core would spend a sixth of a step on it. Here each image has its own random numbers,
from torch's global generator of the device, and the batch goes through three operations: one sampling for
crop and flip, one 3 x 4 matrix an image for all changes of colour, one separable blur.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._contract import check_number, describe

#: Rec. 601 luma of red, green, blue: Pillow's and torchvision's grey
LUMA = (0.299, 0.587, 0.114)
#: RGB to YIQ, in which a turn of the plane (I, Q) changes the hue and leaves grey as it is
_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))


@dataclass(frozen=True)
class ViewSettings:
    """How strongly views differ; the defaults are SwAV's, see `random_view`."""

    crop_scale: tuple[float, float] = (0.14, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 1.0
    grey: float = 0.2
    blur: float = 0.5
    invert: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio"):
            pair = getattr(self, name)
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise TypeError(f"{name} must be a pair of numbers (low, high), got {describe(pair)}")
            low, high = (check_number(name, value, above=0) for value in pair)
            if low > high:
                raise ValueError(f"{name} must be a pair (low, high) with low <= high, got {pair}")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale must lie in (0, 1], got {self.crop_scale}")
        for name in ("flip", "grey", "blur", "invert"):
            if check_number(name, getattr(self, name), at_least=0) > 1:
                raise ValueError(f"{name} must be a probability in [0, 1], got {getattr(self, name)!r}")
        if check_number("jitter", self.jitter, at_least=0) > 1.25:  # 0.8 * 1.25: factors down to 0
            raise ValueError(f"jitter must lie in [0, 1.25], got {self.jitter!r}")


def random_view(images: Tensor, size: int, settings: ViewSettings, colour: Tensor | None = None) -> Tensor:
    """A random view [B, 3, size, size] in [0, 1] of each image of [B, 3, H, W]: uint8, or floats in [0, 1].

    As SwAV's: a crop of a random share of the area (`crop_scale`) and aspect ratio (`crop_ratio`), sampled
    bilinearly, so H and W should not be far above `size`; a flip with probability `flip`; with probability
    0.8 brightness, contrast and saturation by factors in 1 +- 0.8 `jitter` and a turn of the hue by up to
    0.2 `jitter` of the circle, in YIQ; grey with probability `grey`; a Gaussian blur with probability
    `blur`, sigma uniform from 0.1 to 2 pixels of a 224-pixel image; and, which SwAV has not, its negative
    with probability `invert`. `colour [B]` bool says which images colour and grey apply to, None all.
    """
    if images.dtype == torch.uint8:
        images = images.float() / 255
    view = _crop_and_flip(images, size, settings)
    if settings.jitter > 0 or settings.grey > 0:
        view = _recolour(view, settings, colour)
    if settings.blur > 0:
        view = _blur(view, settings.blur)
    if settings.invert > 0:
        view = torch.where(_chance(view, settings.invert)[:, None, None, None], 1 - view, view)
    return view


def to_grey(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] without colour: their luma in all three channels."""
    return (images * images.new_tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True).expand_as(images)


def _uniform(like: Tensor, low: float, high: float) -> Tensor:
    """One number an image of `like` [B, ...]."""
    return low + (high - low) * torch.rand(len(like), device=like.device, dtype=like.dtype)


def _chance(like: Tensor, probability: float) -> Tensor:
    return _uniform(like, 0.0, 1.0) < probability


def _crop_and_flip(images: Tensor, size: int, settings: ViewSettings) -> Tensor:
    area = _uniform(images, *settings.crop_scale)
    ratio = torch.exp(_uniform(images, *(math.log(r) for r in settings.crop_ratio)))
    width, height = ((area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1))
    flip = 1 - 2 * _chance(images, settings.flip).to(images.dtype)
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * flip, height
    theta[:, 0, 2] = _uniform(images, -1.0, 1.0) * (1 - width)
    theta[:, 1, 2] = _uniform(images, -1.0, 1.0) * (1 - height)
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _recolour(view: Tensor, settings: ViewSettings, colour: Tensor | None) -> Tensor:
    """All changes of colour as one affine map an image: grey . hue . saturation . contrast . brightness."""
    strength, count = 0.8 * settings.jitter, len(view)
    luma = view.new_tensor(LUMA)
    to_grey = luma.expand(3, 3)
    jittered = _chance(view, 0.8)
    greyed = _chance(view, settings.grey)
    if colour is not None:
        jittered, greyed = jittered & colour, greyed & colour
    brightness, contrast, saturation = (
        torch.where(jittered, _uniform(view, max(1 - strength, 0), 1 + strength), 1.0) for _ in range(3)
    )
    turn = 2 * math.pi * torch.where(jittered, _uniform(view, -0.2, 0.2) * settings.jitter, 0.0)
    saturation = torch.where(greyed, 0.0, saturation)  # grey is no saturation, whatever the hue
    # a map that leaves grey as it is: what contrast adds to all channels passes through
    yiq = view.new_tensor(_YIQ)
    rotation = torch.eye(3, dtype=view.dtype, device=view.device).repeat(count, 1, 1)
    rotation[:, 1, 1] = rotation[:, 2, 2] = turn.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -turn.sin(), turn.sin()
    hue = torch.linalg.inv(yiq) @ rotation @ yiq
    s = saturation[:, None, None]
    linear = hue @ (s * torch.eye(3, dtype=view.dtype, device=view.device) + (1 - s) * to_grey)
    mean_luma = (view.mean(dim=(2, 3)) * luma).sum(dim=1)
    offset = ((1 - contrast) * brightness * mean_luma)[:, None, None]
    pixels = torch.baddbmm(offset, linear * (contrast * brightness)[:, None, None], view.flatten(2))
    return pixels.clamp_(0, 1).view_as(view)


def _blur(view: Tensor, probability: float) -> Tensor:
    """A Gaussian of each image's own sigma; an image that is not to be blurred has a sigma of next to 0."""
    unit = view.shape[-1] / 224
    radius = max(1, math.ceil(2.5 * 2.0 * unit))
    if view.shape[-1] <= radius:
        return view
    sigma = torch.where(_chance(view, probability), _uniform(view, 0.1, 2.0) * unit, 1e-3)
    steps = torch.arange(-radius, radius + 1, device=view.device, dtype=view.dtype)
    taps = torch.softmax(-(steps**2) / (2 * sigma[:, None] ** 2), dim=1).repeat_interleave(3, dim=0)
    count, _, height, width = view.shape
    rows = F.pad(view, (radius, radius, radius, radius), mode="reflect").flatten(0, 1)[None]
    rows = F.conv2d(rows, taps[:, None, :, None], groups=3 * count)
    return F.conv2d(rows, taps[:, None, None, :], groups=3 * count).view(count, 3, height, width)
