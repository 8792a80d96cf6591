"""Stroke rasterization: pen strokes to pixels through a distance field, blur and loss fused.

Definitions (points [B, T, 2] in pixels, (x, y); the centre of row i, column j is (x=j, y=i)): segment t joins
points t and t+1 and exists where t+1 < lengths, pen_down[t], and both ends are finite. d2 of a pixel is the
least squared Euclidean distance to an existing segment, the projection clamped to the segment; a segment of
length zero is a dot. intensity = sigmoid(offset - sharpness * d2), 0 where nothing is drawn.

Source: the pixel loss of SketchEmbedNet (Wang, Ren, Zemel 2021), section 3.4, Eq. 5 and 6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import raster as reference
from . import _contract as contract

PEN_DTYPES = (torch.bool, *contract.FLOAT_DTYPES)
MOST_TAPS = 2**15 - 1

# --- schemas, fakes, autograd ------------------------------------------------------------------------------


def _segment_dtype(points: Tensor) -> torch.dtype:
    """The saved index of the nearest segment: two bytes where they hold it."""
    return torch.int16 if points.shape[1] <= 2**15 else torch.int32


def _fake_raster_fwd(impl: str):
    def fake(points, pen_down, lengths, height, width, *rest):
        dtype, save = rest[-2:]
        keeps_segment = save and not (impl == "native" and points.device.type == "cpu")
        return (
            points.new_empty((points.shape[0], height, width), dtype=dtype),
            points.new_empty(
                (points.shape[0] if keeps_segment else 0, height, width), dtype=_segment_dtype(points)
            ),
        )

    return fake


def _setup_raster(ctx: Any, inputs: tuple, output: tuple) -> None:
    points, pen_down, lengths, _, _, *scalars, _, save = inputs
    if not save:
        raise RuntimeError("raster_fwd was called with save=False on points that require a gradient")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(points, pen_down, lengths, output[1])
    ctx.scalars = scalars


def _backward_raster(impl: str):
    def backward(ctx: Any, grad: Tensor | None, _segment: None):
        if grad is None:
            return (None,) * 11
        op = getattr(torch.ops.sketchfast, f"raster_bwd_{impl}")
        return op(grad.contiguous(), *ctx.saved_tensors, *ctx.scalars), *(None,) * 10

    return backward


# Beside the image, for backward: the nearest segment of each pixel. Native on CPU keeps none: finding it
# again in cache costs less than the memory traffic.
contract.define(
    "raster",
    "raster_fwd",
    "(Tensor points, Tensor pen_down, Tensor? lengths, SymInt height, SymInt width, float sharpness,"
    " float offset, float blur_sigma, SymInt blur_taps, ScalarType dtype, bool save)"
    " -> (Tensor image, Tensor segment)",
    _fake_raster_fwd,
    setup_context=_setup_raster,
    backward=_backward_raster,
)
contract.define(
    "raster",
    "raster_bwd",
    "(Tensor grad, Tensor points, Tensor pen_down, Tensor? lengths, Tensor segment, float sharpness,"
    " float offset, float blur_sigma, SymInt blur_taps) -> Tensor",
    lambda impl: lambda grad, points, *_: torch.empty_like(points),
)


def _fake_stroke_distance_fwd(impl: str):
    def fake(points, pen_down, lengths, height, width):
        shape = (points.shape[0], height, width)
        return (
            points.new_empty(shape, dtype=reference.compute_dtype(points.dtype)),
            points.new_empty(shape, dtype=torch.int32),
        )

    return fake


def _setup_stroke_distance(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], output[1])


def _backward_stroke_distance(impl: str):
    def backward(ctx: Any, grad: Tensor | None, _segment: None):
        if grad is None:
            return (None,) * 5
        points, segment = ctx.saved_tensors
        op = getattr(torch.ops.sketchfast, f"stroke_distance_bwd_{impl}")
        return op(grad.contiguous(), points, segment), *(None,) * 4

    return backward


contract.define(
    "raster",
    "stroke_distance_fwd",
    "(Tensor points, Tensor pen_down, Tensor? lengths, SymInt height, SymInt width) -> (Tensor, Tensor)",
    _fake_stroke_distance_fwd,
    setup_context=_setup_stroke_distance,
    backward=_backward_stroke_distance,
)
contract.define(
    "raster",
    "stroke_distance_bwd",
    "(Tensor grad, Tensor points, Tensor segment) -> Tensor",
    lambda impl: lambda grad, points, segment: torch.empty_like(points),
)


def _fake_raster_bce(impl: str):
    def fake(points, *rest):
        need_grad = rest[-1]
        dtype = reference.compute_dtype(points.dtype)
        return (
            points.new_empty(points.shape[0], dtype=dtype),
            points.new_empty(points.shape if need_grad else (0, *points.shape[1:]), dtype=dtype),
        )

    return fake


def _setup_raster_bce(ctx: Any, inputs: tuple, output: tuple) -> None:
    if not inputs[-1]:
        raise RuntimeError("raster_bce was called with need_grad=False on points that require a gradient")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _backward_raster_bce(impl: str):
    def backward(ctx: Any, grad: Tensor | None, _grad_points: None):
        if grad is None:
            return (None,) * 14
        (grad_points,) = ctx.saved_tensors
        return (grad[:, None, None] * grad_points).to(ctx.dtype), *(None,) * 13

    return backward


# The loss and its gradient to the points come from one pass: the image never leaves the chip, and the
# backward is a scaling.
contract.define(
    "raster",
    "raster_bce",
    "(Tensor points, Tensor pen_down, Tensor? lengths, Tensor? target, Tensor? target_points,"
    " Tensor? target_pen_down, Tensor? target_lengths, SymInt height, SymInt width, float sharpness,"
    " float offset, float blur_sigma, SymInt blur_taps, bool need_grad) -> (Tensor, Tensor)",
    _fake_raster_bce,
    setup_context=_setup_raster_bce,
    backward=_backward_raster_bce,
)


# --- validation -------------------------------------------------------------------------------------------


def _check_size(size: Any) -> tuple[int, int]:
    if isinstance(size, (tuple, list, torch.Size)):
        if len(size) != 2:
            raise ValueError(f"size must be an integer or a pair (height, width), got {size!r}")
        return contract.check_integer("size[0]", size[0], 1), contract.check_integer("size[1]", size[1], 1)
    side = contract.check_integer("size", size, 1)
    return side, side


def _check_strokes(
    prefix: str, points: Any, pen_down: Any, lengths: Any, check_values: bool, like: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Points, pens as bool and lengths as int64, contiguous; the names in messages begin with `prefix`."""
    batch: int | str = "B" if like is None else like.shape[0]
    points = contract.check_tensor(f"{prefix}points", points, (batch, "T", 2), contract.FLOAT_DTYPES, like)
    batch, steps = points.shape[:2]
    pen_down = contract.check_tensor(f"{prefix}pen_down", pen_down, (batch, steps), PEN_DTYPES, points)
    if lengths is not None:
        lengths = contract.check_tensor(
            f"{prefix}lengths", lengths, (batch,), contract.INTEGER_DTYPES, points
        )
    if check_values:
        contract.check_finite(f"{prefix}points", points.detach())
        _check_lengths(f"{prefix}lengths", lengths, steps)
    pen_down = pen_down if pen_down.dtype == torch.bool else pen_down > 0.5
    lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
    return points.contiguous(), pen_down.contiguous(), lengths


def _check_lengths(name: str, lengths: Tensor | None, steps: int) -> None:
    if lengths is None:
        return
    outside = (lengths < 0) | (lengths > steps)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(f"{name} must lie in [0, {steps}], got {int(lengths[row])} at index {row}")


def _check_intensity(sharpness: Any, offset: Any, blur_sigma: Any, blur_taps: Any) -> tuple[Any, ...]:
    """(sharpness, offset, blur_sigma, blur_taps) with blur_sigma 0 where there is no blur."""
    taps = contract.check_integer("blur_taps", blur_taps, 1, at_most=MOST_TAPS)
    if taps % 2 == 0:
        raise ValueError(f"blur_taps must be odd, got {taps}")
    sigma = 0.0 if blur_sigma is None else contract.check_number("blur_sigma", blur_sigma, above=0)
    return (
        contract.check_number("sharpness", sharpness, above=0),
        contract.check_number("offset", offset),
        sigma,
        taps,
    )


def _needs_grad(points: Tensor) -> bool:
    return points.requires_grad and torch.is_grad_enabled()


# --- public functions -------------------------------------------------------------------------------------


def rasterize(
    points: Tensor,
    pen_down: Tensor,
    size: int | tuple[int, int],
    *,
    lengths: Tensor | None = None,
    sharpness: float = 5.0,
    offset: float = 2.0,
    blur_sigma: float | None = None,
    blur_taps: int = 5,
    dtype: torch.dtype | None = None,
    check_values: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Draws pen strokes as images: sigmoid(offset - sharpness * d2), d2 the squared distance to a stroke.

    Args:
        points: [B, T, 2] float16, bfloat16, float32 or float64; (x, y) in pixels, the centre of row i,
            column j being (x=j, y=i). Differentiable, once. Coordinates off the canvas are legal; a segment
            with a non-finite end does not exist.
        pen_down: [B, T] bool, or float (> 0.5 is down): whether the segment from point t to t+1 is drawn.
            The last is ignored.
        size: (H, W) in pixels, or one number for a square.
        lengths: [B] integer: how many of the T points each sketch has (clamped to [0, T]); None is all.
        sharpness: fall-off of ink with squared distance, per square pixel, > 0.
        offset: logit on the stroke itself.
        blur_sigma: standard deviation in pixels of a separable Gaussian blur, zero-padded; None is no blur.
        blur_taps: width of that Gaussian in pixels, odd; its weights sum to 1.
        dtype: of the image; None is that of `points`. Arithmetic is float32 (float64 for float64 points).
        check_values: also check that `points` are finite and `lengths` in [0, T]; waits for a GPU.
        impl: "auto", "native", "triton" or "reference".

    Returns:
        [B, H, W] intensities in [0, 1]; those under 2^-24 may be 0. Of equally near segments the lowest index
        takes the gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; the message names it.
        RuntimeError: an explicit `impl` that cannot run here; a second backward.

    Source: SketchEmbedNet (Wang, Ren, Zemel 2021), Eq. 5: f_raster and g_blur.
    """
    points, pen_down, lengths = _check_strokes("", points, pen_down, lengths, check_values)
    height, width = _check_size(size)
    scalars = _check_intensity(sharpness, offset, blur_sigma, blur_taps)
    dtype = points.dtype if dtype is None else dtype
    if dtype not in contract.FLOAT_DTYPES:
        raise TypeError(f"dtype must be a floating dtype of {contract.FLOAT_DTYPES}, got {dtype!r}")
    chosen = contract.choose_impl("rasterize", impl, points.device.type, points.dtype)
    if chosen == "reference":
        with contract.full_precision(points.device.type):
            strokes = (contract.once(points), pen_down, lengths)
            return reference.intensity_image(*strokes, height, width, *scalars).to(dtype)
    op = getattr(torch.ops.sketchfast, f"raster_fwd_{chosen}")
    # The kernels write what they compute, or less; a float64 image of float32 arithmetic is a conversion.
    stored = reference.compute_dtype(points.dtype) if dtype == torch.float64 else dtype
    image = op(points, pen_down, lengths, height, width, *scalars, stored, _needs_grad(points))[0]
    return image.to(dtype)


def stroke_distance(
    points: Tensor,
    pen_down: Tensor,
    size: int | tuple[int, int],
    *,
    lengths: Tensor | None = None,
    check_values: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The squared distance of every pixel to the nearest stroke segment, and which segment that is.

    Args:
        points, pen_down, size, lengths, check_values, impl: as for `rasterize`.

    Returns:
        d2: [B, H, W] in square pixels, float32 (float64 for float64 points), exact everywhere, +inf where a
            sketch has no segment. Differentiable in `points`, once.
        segment: [B, H, W] int32, the lowest index of a nearest segment, -1 where there is none.

    Raises:
        As `rasterize`.

    Source: the distance field of SketchEmbedNet's rasterization (Wang, Ren, Zemel 2021, section 3.4).
    """
    points, pen_down, lengths = _check_strokes("", points, pen_down, lengths, check_values)
    height, width = _check_size(size)
    chosen = contract.choose_impl("stroke_distance", impl, points.device.type, points.dtype)
    if chosen == "reference":
        return reference.stroke_distance(contract.once(points), pen_down, lengths, height, width)
    op = getattr(torch.ops.sketchfast, f"stroke_distance_fwd_{chosen}")
    return op(points, pen_down, lengths, height, width)


def raster_bce(
    points: Tensor,
    pen_down: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    *,
    size: int | tuple[int, int] | None = None,
    lengths: Tensor | None = None,
    target_lengths: Tensor | None = None,
    sharpness: float = 5.0,
    offset: float = 2.0,
    blur_sigma: float | None = None,
    blur_taps: int = 5,
    check_values: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Binary cross-entropy between rasterized strokes and a target, the image never leaving the chip.

    loss_b = -mean over pixels of (target * log p + (1 - target) * log(1 - p)), p the rasterized (and blurred)
    strokes, clamped to [1e-7, 1 - 1e-7]; its gradient is 0 where the clamp holds.

    Args:
        points, pen_down, lengths, sharpness, offset, blur_sigma, blur_taps, impl: as for `rasterize`.
        target: [B, H, W] float in [0, 1], used as given; or a pair (points [B, T', 2], pen_down [B, T']),
            rasterized and blurred the same way. No gradient goes to it.
        size: (H, W) or one number; required with a pair, else that of `target`.
        target_lengths: [B] integer, with a pair: how many points each target sketch has.
        check_values: also check that points are finite, lengths in range and `target` within [0, 1].

    Returns:
        [B] float32 (float64 for float64 points). Differentiable in `points`, once.

    Raises:
        As `rasterize`.

    Source: SketchEmbedNet (Wang, Ren, Zemel 2021), Eq. 5 and 6, two-sided as in the authors' code.
    """
    points, pen_down, lengths = _check_strokes("", points, pen_down, lengths, check_values)
    image, target_strokes = _check_target(target, target_lengths, size, points, check_values)
    height, width = _check_size(image.shape[1:] if image is not None and size is None else size)
    scalars = _check_intensity(sharpness, offset, blur_sigma, blur_taps)
    chosen = contract.choose_impl("raster_bce", impl, points.device.type, points.dtype)
    if chosen == "reference":
        with contract.full_precision(points.device.type):
            if image is None:
                image = reference.intensity_image(*target_strokes, height, width, *scalars)
            drawn = reference.intensity_image(
                contract.once(points), pen_down, lengths, height, width, *scalars
            )
            return reference.binary_cross_entropy(drawn, image)
    op = getattr(torch.ops.sketchfast, f"raster_bce_{chosen}")
    need_grad = _needs_grad(points)
    return op(points, pen_down, lengths, image, *target_strokes, height, width, *scalars, need_grad)[0]


def _check_target(
    target: Any, target_lengths: Any, size: Any, points: Tensor, check_values: bool
) -> tuple[Tensor | None, tuple[Any, Any, Any]]:
    """(image, (points, pen_down, lengths)): the one that was given, in the dtype of the arithmetic."""
    dtype = reference.compute_dtype(points.dtype)
    if isinstance(target, (tuple, list)):
        if len(target) != 2:
            raise ValueError(f"target must be a tensor or a pair of tensors, got {len(target)} values")
        if size is None:
            raise ValueError("size must be given where target is a pair (points, pen_down), got None")
        drawn, pens, pen_lengths = _check_strokes(
            "target_", target[0], target[1], target_lengths, check_values, like=points
        )
        return None, (drawn.detach().to(dtype), pens, pen_lengths)
    if target_lengths is not None:
        raise ValueError("target_lengths must be None where target is an image, got a value")
    shape: tuple[int | str, int | str] = ("H", "W") if size is None else _check_size(size)
    image = contract.check_tensor("target", target, (points.shape[0], *shape), contract.FLOAT_DTYPES, points)
    if check_values:
        low, high = (float(bound) for bound in image.detach().aminmax()) if image.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):
            raise ValueError(f"target must lie in [0, 1], got values from {low:g} to {high:g}")
    return image.detach().to(dtype).contiguous(), (None, None, None)
