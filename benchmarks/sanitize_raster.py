"""One small case of every CUDA kernel of rasterization, for compute-sanitizer (see gpu.sh).

Both ways through each op: the whole image in one CTA, tiles, and a blur wider than a tile's halo.
"""

from __future__ import annotations

import torch

import sketchfast


def strokes(batch: int, steps: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    points = torch.rand(batch, steps, 2, device="cuda") * (size + 4) - 2
    return points.requires_grad_(), torch.rand(batch, steps, device="cuda") > 0.2


def main() -> None:
    torch.manual_seed(0)
    for size, taps in ((28, 5), (105, 5), (40, 41)):
        points, pens = strokes(2, 20, size)
        blur = {"blur_sigma": 2.0, "blur_taps": taps}
        sketchfast.rasterize(points, pens, size, impl="native", **blur).sum().backward()
        other, other_pens = strokes(2, 13, size)
        target = (other.detach(), other_pens)
        loss = sketchfast.raster_bce(points, pens, target, size=size, impl="native", **blur)
        loss.sum().backward()
        with torch.no_grad():
            sketchfast.raster_bce(points, pens, target, size=size, impl="native", **blur)
        distance2, _ = sketchfast.stroke_distance(points, pens, size, impl="native")
        distance2.nan_to_num(posinf=0.0).sum().backward()
        assert points.grad is not None
        assert points.grad.isfinite().all()
    torch.cuda.synchronize()
    print("every kernel of raster ran")


if __name__ == "__main__":
    main()
