"""Rasterization against what a user would pick instead: eager PyTorch, torch.compile, OpenCV, Pillow.

    pytest benchmarks/bench_raster.py --benchmark-json raster.json

Strokes are procedural and seeded. Forward and backward with blur against the PyTorch rivals; forward without
blur against the drawing libraries too, which have no gradient. The rival's inputs are prepared beforehand.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from harness import SMOKE

import sketchfast as sf
from sketchfast.testing import available_impls, devices, random_strokes

#: name -> (batch, steps, side, batch at which the eager form fits in memory)
SIZES = {
    "28^2": (256, 64, 28, 256),
    "84^2": (64, 100, 84, 64),
    "256^2": (64, 256, 256, 4),
}
if SMOKE:
    SIZES = {"28^2": (4, 16, 28, 4), "256^2": (2, 16, 64, 2)}
SIGMA, TAPS, SHARPNESS, OFFSET = 2.0, 5, 5.0, 2.0
#: (rival, pass, size) -> the ratio DESIGN.md's section 6 asks for on CPU
CPU_TARGETS = {
    ("eager", "backward", "28^2"): 150,
    ("eager", "backward", "84^2"): 400,
    ("eager", "backward", "256^2"): 5000,
    **{("compile", "backward", size): 80 for size in SIZES},
    **{("compile", "forward", size): 1 for size in SIZES},
    **{("OpenCV anti-aliased", "forward", size): 2 for size in SIZES},
}
GPU_TARGETS = {
    **{("eager", "backward", size): 100 for size in SIZES},
    **{("compile", "backward", size): 20 for size in SIZES},
}
CASES = [(d, i) for d in devices() for i in available_impls(d) if i in ("native", "triton")]
CASES = [case for case in CASES if case != ("cpu", "triton")]  # the interpreter is no rival of anything
cases = pytest.mark.parametrize(("device", "impl"), CASES)
sizes = pytest.mark.parametrize("size", SIZES)


def eager_rasterize(points, pen_down, side: int, blur: bool):
    """The dense form as published code writes it: every pixel against every segment, autograd behind it."""
    start, end = points[:, :-1], points[:, 1:]
    along = end - start
    axis = torch.arange(side, device=points.device, dtype=points.dtype)
    x, y = axis[None, None, None, :], axis[None, None, :, None]
    from_x, from_y = x - start[..., 0, None, None], y - start[..., 1, None, None]
    along_x, along_y = along[..., 0, None, None], along[..., 1, None, None]
    length2 = (along_x**2 + along_y**2).clamp(min=1e-12)
    fraction = ((from_x * along_x + from_y * along_y) / length2).clamp(0, 1)
    d2 = (from_x - fraction * along_x) ** 2 + (from_y - fraction * along_y) ** 2
    d2 = torch.where(pen_down[:, :-1, None, None], d2, torch.inf)
    image = torch.sigmoid(OFFSET - SHARPNESS * d2.min(1).values)
    if not blur:
        return image
    position = torch.arange(TAPS, device=points.device, dtype=points.dtype) - TAPS // 2
    weights = torch.exp(-(position**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    kernel = (weights[:, None] * weights[None, :])[None, None]
    return functional.conv2d(image[:, None], kernel, padding=TAPS // 2)[:, 0]


def strokes_of(size: str, device: str, whole_batch: bool):
    batch, steps, side, eager_batch = SIZES[size]
    points, pen_down = random_strokes(batch if whole_batch else eager_batch, steps, side, device=device)
    return points, pen_down, side


def work_of(points, pen_down, side: int, backward: bool) -> tuple[float, float]:
    """(bytes, flops) that any culled method needs: each pixel within reach of a segment meets it once."""
    reach = math.sqrt((OFFSET + 24 * math.log(2)) / SHARPNESS)
    length = (points[:, 1:] - points[:, :-1]).norm(dim=-1)[pen_down[:, :-1]]
    visits = float((2 * reach * length + math.pi * reach**2).sum())
    pixels = points.shape[0] * side * side
    inked = min(visits, pixels)
    flops = 12 * visits + inked * (4 * TAPS + 10)
    if backward:
        flops += 26 * visits + inked * (4 * TAPS + 6)
    return (2 if backward else 1) * 4 * pixels + 8 * points.numel(), flops


def floor_of(rates, device, points, pen_down, side, backward):
    return rates[device].floor(*work_of(points, pen_down, side, backward))


def forward_and_backward(function, points, weight):
    leaf = points.clone().requires_grad_()

    def run():
        leaf.grad = None
        (function(leaf) * weight).sum().backward()

    return run


def versus_torch(versus, rates, rival_of, name, device, impl, size, whole_batch, backward, rounds):
    points, pen_down, side = strokes_of(size, device, whole_batch)
    weight = torch.rand(points.shape[0], side, side, device=device)

    def ours(p):
        return sf.rasterize(p, pen_down, side, blur_sigma=SIGMA if backward else None, impl=impl)

    def rival(p):
        return rival_of(p, pen_down, side, backward)

    if backward:
        pair = [forward_and_backward(f, points, weight) for f in (rival, ours)]
    else:
        pair = [lambda f=f: f(points) for f in (rival, ours)]
    targets = CPU_TARGETS if device == "cpu" else GPU_TARGETS
    direction = "backward" if backward else "forward"
    label = "fwd+bwd, blur" if backward else "fwd, no blur"
    versus(
        *pair,
        group=f"raster {size} B{points.shape[0]} T{points.shape[1]} {label}, {impl}",
        name=name,
        device=device,
        rounds=rounds,
        target=targets.get((name, direction, size)),
        floor=floor_of(rates, device, points, pen_down, side, backward),
    )


@cases
@sizes
def test_eager(versus, rates, device, impl, size):
    versus_torch(versus, rates, eager_rasterize, "eager", device, impl, size, False, True, rounds=4)


@cases
@sizes
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_compile(versus, rates, device, impl, size, backward):
    torch._dynamo.reset()
    compiled = torch.compile(eager_rasterize, dynamic=False)
    # Its backward at 256^2 fits in memory at the eager form's batch only.
    whole = not (backward and size == "256^2")
    versus_torch(versus, rates, compiled, "compile", device, impl, size, whole, backward, rounds=5)


def integer_polylines(points, pen_down, shift: int):
    """Per sketch, the runs of pen-down points as integers with `shift` fractional bits."""
    sketches = []
    for sketch, pens in zip(points.numpy(), pen_down.numpy(), strict=True):
        scaled = np.round(sketch * (1 << shift)).astype(np.int32)
        cuts = np.flatnonzero(~pens[:-1]) + 1
        sketches.append([run for run in np.split(scaled, cuts) if len(run) > 1])
    return sketches


def versus_library(versus, rates, draw, name, size):
    points, pen_down, side = strokes_of(size, "cpu", True)
    versus(
        draw(points, pen_down, side),
        lambda: sf.rasterize(points, pen_down, side, impl="native"),
        group=f"raster {size} B{points.shape[0]} T{points.shape[1]} fwd, no blur, native",
        name=name,
        rounds=9,
        target=CPU_TARGETS.get((name, "forward", size)),
        floor=floor_of(rates, "cpu", points, pen_down, side, False),
    )


needs_native = pytest.mark.skipif(("cpu", "native") not in CASES, reason="the CPU library was not built")


@needs_native
@sizes
@pytest.mark.parametrize("antialias", [True, False], ids=["antialiased", "plain"])
def test_opencv(versus, rates, size, antialias):
    cv2 = pytest.importorskip("cv2")

    def draw(points, pen_down, side):
        shift = 4 if antialias else 0
        sketches = integer_polylines(points, pen_down, shift)
        line = cv2.LINE_AA if antialias else cv2.LINE_8

        def run():
            images = np.zeros((len(sketches), side, side), np.uint8)
            for image, runs in zip(images, sketches, strict=True):
                cv2.polylines(image, runs, False, 255, 1, line, shift)
            return images

        return run

    versus_library(versus, rates, draw, "OpenCV anti-aliased" if antialias else "OpenCV", size)


@needs_native
@sizes
def test_pillow(versus, rates, size):
    image_module = pytest.importorskip("PIL.Image")
    image_draw = pytest.importorskip("PIL.ImageDraw")

    def draw(points, pen_down, side):
        sketches = [[run.ravel().tolist() for run in runs] for runs in integer_polylines(points, pen_down, 0)]

        def run():
            images = np.empty((len(sketches), side, side), np.uint8)
            for i, runs in enumerate(sketches):
                image = image_module.new("L", (side, side))
                pen = image_draw.Draw(image)
                for line in runs:
                    pen.line(line, fill=255)
                images[i] = np.asarray(image)
            return images

        return run

    versus_library(versus, rates, draw, "Pillow", size)


@cases
@sizes
def test_fused_loss(versus, rates, device, impl, size):
    """raster_bce against rasterize, rasterize, cross-entropy of the same impl: what fusing the loss saves."""
    points, pen_down, side = strokes_of(size, device, True)
    target = points + 0.5
    leaf = points.clone().requires_grad_()

    def parts():
        leaf.grad = None
        drawn = sf.rasterize(leaf, pen_down, side, blur_sigma=SIGMA, impl=impl).clamp(1e-7, 1 - 1e-7)
        with torch.no_grad():
            aim = sf.rasterize(target, pen_down, side, blur_sigma=SIGMA, impl=impl)
        functional.binary_cross_entropy(drawn, aim).backward()

    def fused():
        leaf.grad = None
        sf.raster_bce(
            leaf, pen_down, (target, pen_down), size=side, blur_sigma=SIGMA, impl=impl
        ).mean().backward()

    group = f"raster_bce {size} B{points.shape[0]} T{points.shape[1]} fwd+bwd, {impl}"
    versus(parts, fused, group=group, name="unfused parts", device=device, rounds=9)
