"""Images of sketches, through `sketchfast.rasterize`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..ops.raster import rasterize
from .strokes import Sketch, collate, fit

_CHUNK = 1024  # sketches rasterized at once: bounds the padding's memory


def rasterize_sketches(
    sketches: Iterable[Sketch],
    size: int | tuple[int, int],
    *,
    padding: float | None = 2.0,
    sharpness: float = 5.0,
    offset: float = 2.0,
    blur_sigma: float | None = None,
    dtype: torch.dtype = torch.uint8,
    impl: str = "auto",
) -> Tensor:
    """Images [N, H, W] of N sketches, ink high: uint8 in 0..255 (the default), or a float dtype in [0, 1].

    size: (H, W) or int. padding: each sketch is scaled and centred with this margin in pixels (`fit`); None
    draws it where it lies. The rest as in `sketchfast.rasterize`; a line's peak is sigmoid(offset), 0.88 by
    default. No gradient.
    """
    if dtype != torch.uint8 and not dtype.is_floating_point:
        raise TypeError(f"dtype must be torch.uint8 or a floating dtype, got {dtype}")
    height, width = (size, size) if isinstance(size, int) else size
    fitted = [s if padding is None else fit(s, (height, width), padding) for s in sketches]
    images = torch.empty(len(fitted), height, width, dtype=dtype)
    for start in range(0, len(fitted), _CHUNK):
        points, pens, lengths = collate(fitted[start : start + _CHUNK])
        ink = rasterize(
            points,
            pens,
            (height, width),
            lengths=lengths,
            sharpness=sharpness,
            offset=offset,
            blur_sigma=blur_sigma,
            impl=impl,
        )
        if dtype == torch.uint8:
            ink = ink.mul(255).round_().clamp_(0, 255)
        images[start : start + len(ink)] = ink.to(dtype)
    return images
