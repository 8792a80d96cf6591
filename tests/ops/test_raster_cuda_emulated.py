"""The CUDA kernels of rasterization, run by the CPU emulator in tests/cuda_emulator, against float64.

What it proves: the kernels' source and the launch code's choices of tiles, sizes and scratch memory compute
the definition, forward and backward, at odd sizes and in every dtype; every output element is written
(outputs, scratch and shared memory start as NaN); nothing outside a buffer is written, and nothing read there
reaches a result; barriers are where they are needed, as far as three schedules of the threads show it; bits
do not depend on the order of CTAs and threads.

What it cannot: the memory model of a GPU, alignment, nvcc's rounding (fused multiply-adds), occupancy, speed,
and the torch glue in csrc/cuda/raster.cu. Those take a GPU: benchmarks/gpu.sh.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from emulated import DTYPES, H200_SHARED, SCHEDULES, Guarded, build
from torch import Tensor

from sketchfast.kernels.reference import raster as reference

TILED = 28 * 1024  # too little for whole images: the tile kernels serve

_POINTERS = (
    "points",
    "pen_down",
    "lengths",
    "target_points",
    "target_pen_down",
    "target_lengths",
)
_INTEGERS = (
    "batch",
    "steps",
    "target_steps",
    "height",
    "width",
    "taps",
    "points_dtype",
    "image_dtype",
    "wide_winner",
    "shared_limit",
)


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in ("sharpness", "offset", "sigma")),
    ]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = build("raster_emulated.cpp", tmp_path_factory.mktemp("emulator"))
    for name in ("forward", "backward", "bce"):
        getattr(loaded, f"raster_{name}").restype = ctypes.c_char_p
    for name in ("forward", "backward"):
        getattr(loaded, f"distance_{name}").restype = ctypes.c_char_p
    return loaded


@dataclass
class Strokes:
    points: Tensor
    pen_down: Tensor
    lengths: Tensor | None = None


@dataclass
class Emulated:
    """The kernels behind a Python call, on a canvas, with the given shared memory."""

    library: ctypes.CDLL
    size: tuple[int, int]
    sigma: float = 0.0
    taps: int = 5
    sharpness: float = 5.0
    offset: float = 2.0
    shared_limit: int = H200_SHARED
    schedule: str = "forward"
    launches: int = field(default=0, init=False)

    @property
    def scalars(self) -> tuple[float, float, float, int]:
        return self.sharpness, self.offset, self.sigma, self.taps

    def _call(self, name: str, strokes: Strokes, memory: Guarded, *buffers: Tensor | None, **extra) -> None:
        points = memory.copy(strokes.points)
        pens = memory.copy(strokes.pen_down.to(torch.uint8))
        kept = [points, pens]
        call = _Call(points=points.data_ptr(), pen_down=pens.data_ptr())
        if strokes.lengths is not None:
            kept.append(memory.copy(strokes.lengths))
            call.lengths = kept[-1].data_ptr()
        call.batch, call.steps = points.shape[:2]
        call.height, call.width = self.size
        call.taps, call.sigma = self.taps, self.sigma
        call.sharpness, call.offset = self.sharpness, self.offset
        call.points_dtype = DTYPES[points.dtype]
        call.shared_limit = self.shared_limit
        for key, value in extra.items():
            setattr(call, key, value)
        self.library.set_schedule(SCHEDULES[self.schedule], 12345)
        pointers = [None if b is None else ctypes.c_void_p(b.data_ptr()) for b in buffers]
        error = getattr(self.library, name)(ctypes.byref(call), *pointers)
        assert error is None, error.decode()
        self.launches = self.library.launches()
        memory.check()

    def _image_shape(self, strokes: Strokes) -> tuple[int, int, int]:
        return (strokes.points.shape[0], *self.size)

    def forward(
        self, strokes: Strokes, dtype: torch.dtype, save: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        memory, wide = Guarded(), strokes.points.shape[1] > 2**15
        image = memory.empty(self._image_shape(strokes), dtype)
        index = torch.int32 if wide else torch.int16
        winner = memory.empty(self._image_shape(strokes), index) if save else None
        extra = {"image_dtype": DTYPES[dtype], "wide_winner": wide}
        self._call("raster_forward", strokes, memory, image, winner, **extra)
        return image, winner

    def backward(self, strokes: Strokes, grad: Tensor, winner: Tensor) -> Tensor:
        memory = Guarded()
        out = memory.empty(tuple(strokes.points.shape), strokes.points.dtype)
        extra = {"image_dtype": DTYPES[grad.dtype], "wide_winner": winner.dtype == torch.int32}
        grad, winner = memory.copy(grad), memory.copy(winner)
        self._call("raster_backward", strokes, memory, grad, winner, out, **extra)
        return out

    def bce(self, strokes: Strokes, target: Tensor | Strokes, need_grad: bool = True):
        memory = Guarded()
        batch = strokes.points.shape[0]
        loss = memory.empty((batch,), torch.float32)
        grad = memory.empty(tuple(strokes.points.shape), torch.float32) if need_grad else None
        image, extra, kept = None, {}, []
        if isinstance(target, Strokes):
            kept = [memory.copy(target.points.float()), memory.copy(target.pen_down.to(torch.uint8))]
            extra = {"target_points": kept[0].data_ptr(), "target_pen_down": kept[1].data_ptr()}
            extra["target_steps"] = target.points.shape[1]
            if target.lengths is not None:
                kept.append(memory.copy(target.lengths))
                extra["target_lengths"] = kept[-1].data_ptr()
        else:
            image = memory.copy(target.float())
        self._call("raster_bce", strokes, memory, image, loss, grad, **extra)
        return loss, grad

    def distance(self, strokes: Strokes) -> tuple[Tensor, Tensor]:
        memory = Guarded()
        distance2 = memory.empty(self._image_shape(strokes), torch.float32)
        segment = memory.empty(self._image_shape(strokes), torch.int32)
        self._call("distance_forward", strokes, memory, distance2, segment)
        return distance2, segment

    def distance_backward(self, strokes: Strokes, grad: Tensor, segment: Tensor) -> Tensor:
        memory = Guarded()
        out = memory.empty(tuple(strokes.points.shape), strokes.points.dtype)
        inputs = memory.copy(grad), memory.copy(segment)
        self._call("distance_backward", strokes, memory, *inputs, out)
        return out


# --- cases and comparison ----------------------------------------------------------------------------------


def drawing(batch: int, steps: int, size: tuple[int, int], seed: int = 0, spread: float = 1.2) -> Strokes:
    """Random walks of the pen across and a little beyond the canvas, a quarter of the pens up."""
    random = torch.Generator().manual_seed(seed)
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
    start = torch.rand(batch, 1, 2, generator=random) * extent
    moves = torch.randn(batch, steps, 2, generator=random) * extent * spread / 8
    points = start + moves.cumsum(1) - moves[:, :1]
    return Strokes(points, torch.rand(batch, steps, generator=random) > 0.25)


def exact_image(
    strokes: Strokes, emulated: Emulated, dtype: torch.dtype, points: Tensor | None = None
) -> Tensor:
    points = strokes.points.to(dtype) if points is None else points
    return reference.intensity_image(
        points, strokes.pen_down, strokes.lengths, *emulated.size, *emulated.scalars
    )


def within_budget(
    ours: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype, what: str, allowed: float = 0.0
) -> float:
    """max|err| <= 2 max|err of eager at that dtype| + 4 eps max|exact| + allowed, and no NaN; max|err|."""
    assert not ours.isnan().any(), f"{what}: NaN at {ours.isnan().nonzero()[0].tolist()}"
    if ours.numel() == 0:
        return 0.0
    error = (ours.double() - exact).abs().max().item()
    eager_error = (eager.to(dtype).double() - exact).abs().max().item()
    budget = 2 * eager_error + 4 * torch.finfo(dtype).eps * exact.abs().max().item() + allowed
    assert error <= budget, f"{what}: error {error:.3g} over the budget {budget:.3g}"
    return error


def without_faint_ink(strokes: Strokes, emulated: Emulated, points: Tensor) -> Tensor:
    """The image in float64 with the intensities that may be left out, those under 2^-24, left out."""
    distance2, _ = reference.stroke_distance(points, strokes.pen_down, strokes.lengths, *emulated.size)
    drawn = distance2.isfinite()
    ink = torch.sigmoid(emulated.offset - emulated.sharpness * torch.where(drawn, distance2, 0.0))
    ink = torch.where(drawn & (ink >= 2**-24), ink, 0.0)
    return reference.blur(ink, emulated.sigma, emulated.taps) if emulated.sigma > 0 else ink


def check_raster(
    emulated: Emulated, strokes: Strokes, dtype: torch.dtype = torch.float32, seed: int = 1
) -> None:
    """Image, winners and gradient of a scene against float64."""
    points_dtype = strokes.points.dtype
    image, winner = emulated.forward(strokes, dtype)
    exact_points = strokes.points.double().requires_grad_()
    exact = exact_image(strokes, emulated, torch.float64, exact_points)
    eager_points = strokes.points.float().requires_grad_()
    eager = exact_image(strokes, emulated, torch.float32, eager_points)
    within_budget(image, eager.detach(), exact.detach(), dtype, "image", 2**-24)

    unsaved, _ = emulated.forward(strokes, dtype, save=False)
    assert torch.equal(unsaved, image)

    random = torch.Generator().manual_seed(seed)
    grad = torch.randn(image.shape, generator=random).to(dtype)
    ours = emulated.backward(strokes, grad, winner)
    (exact_grad,) = torch.autograd.grad(exact, exact_points, grad.double())
    (eager_grad,) = torch.autograd.grad(eager, eager_points, grad.float())
    faint = without_faint_ink(strokes, emulated, exact_points)
    (faint_grad,) = torch.autograd.grad(faint, exact_points, grad.double())
    dropped = (exact_grad - faint_grad).abs().max().item() if faint_grad.numel() else 0.0
    within_budget(ours, eager_grad, exact_grad, points_dtype, "gradient", 2 * dropped)


@pytest.fixture(params=list(SCHEDULES))
def schedule(request: pytest.FixtureRequest) -> Iterator[str]:
    return request.param


# --- rasterize ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, 2.0])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 65), (28, 28), (63, 31)])
@pytest.mark.parametrize("limit", [H200_SHARED, TILED], ids=["whole", "tiled"])
def test_raster(library, size, sigma, limit, schedule):
    limit = limit if limit == H200_SHARED else 20 * 1024
    emulated = Emulated(library, size, sigma, shared_limit=limit, schedule=schedule)
    check_raster(emulated, drawing(2, 20, size))


def test_tiles_of_a_large_image(library, schedule):
    check_raster(Emulated(library, (70, 100), 1.5, taps=7, schedule=schedule), drawing(1, 40, (70, 100)))


def test_large_backward(library, schedule):
    """Past the size that one CTA takes: the blurred gradient, then the gather, in launches of their own."""
    emulated = Emulated(library, (65, 200), 2.0, schedule=schedule)
    check_raster(emulated, drawing(2, 33, (65, 200)))
    assert emulated.launches == 2


@pytest.mark.parametrize("taps", [1, 3, 33, 35, 101])
def test_blur_widths(library, taps):
    """Up to 33 taps the blur is fused; past it there are kernels of its own."""
    check_raster(Emulated(library, (40, 37), 6.0, taps=taps), drawing(2, 12, (40, 37)))


@pytest.mark.parametrize("points_dtype", list(DTYPES))
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("limit", [H200_SHARED, 20 * 1024], ids=["whole", "tiled"])
def test_dtypes(library, points_dtype, dtype, limit):
    strokes = drawing(2, 16, (33, 20))
    strokes.points = strokes.points.to(points_dtype)
    check_raster(Emulated(library, (33, 20), 2.0, shared_limit=limit), strokes, dtype)


def test_lengths_and_blank_sketches(library):
    strokes = drawing(6, 12, (20, 20))
    strokes.lengths = torch.tensor([12, 5, 1, 0, -3, 99])
    strokes.pen_down[1, 2] = False
    emulated = Emulated(library, (20, 20), 2.0)
    check_raster(emulated, strokes)
    image, winner = emulated.forward(strokes, torch.float32)
    assert (image[2:5] == 0).all()
    assert (winner[2:5] == -1).all()


def test_all_pens_up(library):
    strokes = drawing(2, 9, (20, 20))
    strokes.pen_down[:] = False
    check_raster(Emulated(library, (20, 20), 2.0), strokes)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_few_points(library, batch, steps):
    strokes = (
        drawing(batch, steps, (9, 9))
        if batch * steps
        else Strokes(torch.zeros(batch, steps, 2), torch.ones(batch, steps, dtype=torch.bool))
    )
    emulated = Emulated(library, (9, 9), 2.0)
    image, winner = emulated.forward(strokes, torch.float32)
    grad = emulated.backward(strokes, torch.ones_like(image), winner)
    assert not image.isnan().any()
    assert not grad.isnan().any()
    if steps < 2:
        assert (image == 0).all()
        assert (grad == 0).all()


def test_dots_and_ties(library):
    """Zero-length strokes are dots; of segments drawn twice the first takes all of the gradient."""
    points = torch.tensor([[[4.0, 4.0], [4.0, 4.0], [10.25, 3.0], [4.0, 4.0], [10.25, 3.0], [4.0, 4.0]]])
    strokes = Strokes(points, torch.tensor([[True, True, False, True, False, True]]))
    emulated = Emulated(library, (16, 16))
    image, winner = emulated.forward(strokes, torch.float32)
    exact = exact_image(strokes, emulated, torch.float64)
    assert (image.double() - exact).abs().max() < 1e-6
    assert set(winner.unique().tolist()) <= {-1, 0, 1}
    dot = Strokes(points[:, :2], strokes.pen_down[:, :2])
    assert emulated.forward(dot, torch.float32)[0][0, 4, 4].item() == pytest.approx(0.8807970)


def test_huge_and_nonfinite_coordinates(library, schedule):
    points = torch.tensor(
        [
            [[-1e6, -1e6], [1e6, 1e6], [1e6, 12.5], [-1e6, 12.25], [5.0, 5.0], [5.0, 1e6]],
            [[-3e38, 9.0], [3e38, 9.5], [3e38, 3e38], [1e20, -1e20], [8.0, 8.0], [3e38, -3e38]],
            [[3.0, 3.0], [float("nan"), 3.0], [9.0, 9.0], [float("inf"), 9.0], [2.0, 14.0], [15.0, 2.0]],
        ]
    )
    strokes = Strokes(points, torch.ones(3, 6, dtype=torch.bool))
    emulated = Emulated(library, (17, 33), 2.0, schedule=schedule)
    image, winner = emulated.forward(strokes, torch.float32)
    grad = emulated.backward(strokes, torch.ones_like(image), winner)
    exact = exact_image(strokes, emulated, torch.float64)
    assert (image.double() - exact)[[0, 2]].abs().max() < 2e-6
    assert not image.isnan().any()
    assert not grad.isnan().any()
    assert winner[2].max() == 4


@pytest.mark.parametrize(("sharpness", "offset"), [(0.02, 1.0), (5.0, -40.0), (400.0, 8.0), (5.0, 60.0)])
def test_sharpness_and_offset(library, sharpness, offset):
    """From ink that covers the canvas to none at all."""
    for limit in (H200_SHARED, 20 * 1024):
        emulated = Emulated(library, (35, 40), 1.0, sharpness=sharpness, offset=offset, shared_limit=limit)
        check_raster(emulated, drawing(1, 9, (35, 40)))


@pytest.mark.parametrize("limit", [H200_SHARED, 20 * 1024], ids=["whole", "tiled"])
def test_more_segments_than_fit_in_shared_memory(library, limit):
    size = (12, 40)
    strokes = drawing(1, 1500, size, spread=0.2)
    strokes.pen_down[:, ::7] = False
    check_raster(Emulated(library, size, 2.0, shared_limit=max(limit, 48 * 1024)), strokes)


def test_indices_past_int16(library):
    size = (6, 5)
    strokes = drawing(1, 2**15 + 40, size)
    strokes.pen_down[:] = False
    strokes.pen_down[:, -30:] = True
    check_raster(Emulated(library, size), strokes)


# --- raster_bce --------------------------------------------------------------------------------------------


def exact_loss(strokes: Strokes, target: Tensor | Strokes, emulated: Emulated, dtype: torch.dtype):
    points = strokes.points.to(dtype).requires_grad_()
    image = exact_image(strokes, emulated, dtype, points)
    if isinstance(target, Strokes):
        target = exact_image(target, emulated, dtype)
    loss = reference.binary_cross_entropy(image, target.to(dtype))
    (grad,) = torch.autograd.grad(loss.sum(), points)
    return loss.detach(), grad


def check_bce(emulated: Emulated, strokes: Strokes, target: Tensor | Strokes) -> None:
    loss, grad = emulated.bce(strokes, target)
    without, _ = emulated.bce(strokes, target, need_grad=False)
    exact, exact_grad = exact_loss(strokes, target, emulated, torch.float64)
    eager, eager_grad = exact_loss(strokes, target, emulated, torch.float32)
    assert (loss.double() - exact).abs().max() <= 1e-6 * max(1.0, exact.abs().max().item())
    within_budget(loss, eager, exact, torch.float32, "loss", 2e-7)
    within_budget(without, eager, exact, torch.float32, "loss without gradient", 2e-7)
    within_budget(grad, eager_grad, exact_grad, torch.float32, "gradient")


@pytest.mark.parametrize("sigma", [0.0, 2.0])
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (28, 28), (40, 70)])
@pytest.mark.parametrize("limit", [H200_SHARED, TILED], ids=["whole", "tiled"])
def test_bce_of_strokes(library, size, sigma, limit, schedule):
    strokes, target = drawing(2, 14, size), drawing(2, 19, size, seed=3)
    target.lengths = torch.tensor([19, 8])
    emulated = Emulated(library, size, sigma, shared_limit=limit, schedule=schedule)
    check_bce(emulated, strokes, target)


@pytest.mark.parametrize("limit", [H200_SHARED, TILED], ids=["whole", "tiled"])
def test_bce_of_an_image(library, limit, schedule):
    size = (66, 45)
    target = torch.rand(2, *size, generator=torch.Generator().manual_seed(5)).round(decimals=1)
    emulated = Emulated(library, size, 2.0, shared_limit=limit, schedule=schedule)
    check_bce(emulated, drawing(2, 21, size), target)
    emulated.bce(drawing(2, 21, size), target)
    assert emulated.launches == (1 if limit == H200_SHARED else 2)


def test_bce_beyond_one_cta(library, schedule):
    size = (100, 130)
    emulated = Emulated(library, size, 2.0, schedule=schedule)
    check_bce(emulated, drawing(1, 21, size, spread=0.3), drawing(1, 15, size, seed=4, spread=0.3))


def test_bce_with_a_wide_blur(library):
    size = (20, 23)
    emulated = Emulated(library, size, 9.0, taps=41)
    check_bce(emulated, drawing(2, 9, size), drawing(2, 9, size, seed=8))
    check_bce(emulated, drawing(2, 9, size), torch.rand(2, *size))


@pytest.mark.parametrize("limit", [H200_SHARED, TILED], ids=["whole", "tiled"])
def test_bce_blank(library, limit):
    size = (40, 33)
    blank = drawing(2, 5, size)
    blank.pen_down[:] = False
    emulated = Emulated(library, size, 2.0, shared_limit=limit)
    check_bce(emulated, blank, drawing(2, 5, size, seed=2))
    check_bce(emulated, drawing(2, 5, size), blank)
    none = Strokes(torch.zeros(2, 0, 2), torch.zeros(2, 0, dtype=torch.bool))
    loss, grad = emulated.bce(none, torch.rand(2, *size))
    assert grad.numel() == 0
    assert loss.isfinite().all()


# --- stroke_distance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (17, 65), (40, 33)])
@pytest.mark.parametrize("points_dtype", list(DTYPES))
def test_stroke_distance(library, size, points_dtype, schedule):
    strokes = drawing(3, 40, size)
    strokes.points = strokes.points.to(points_dtype)
    strokes.lengths = torch.tensor([40, 17, 1])
    emulated = Emulated(library, size, schedule=schedule)
    distance2, segment = emulated.distance(strokes)
    exact_points = strokes.points.double().requires_grad_()
    rest = (strokes.pen_down, strokes.lengths, *size)
    exact, _ = reference.stroke_distance(exact_points, *rest)
    eager_points = strokes.points.float().requires_grad_()
    eager, _ = reference.stroke_distance(eager_points, *rest)
    drawn = exact.isfinite()
    assert torch.equal(distance2.isinf(), ~drawn)
    assert torch.equal(segment == -1, ~drawn)
    within_budget(distance2[drawn], eager.detach()[drawn], exact.detach()[drawn], torch.float32, "distance")

    grad = torch.randn(distance2.shape, generator=torch.Generator().manual_seed(2)) * drawn
    ours = emulated.distance_backward(strokes, grad, segment)
    masked = [torch.where(drawn, d2, 0.0) for d2 in (exact, eager)]
    (exact_grad,) = torch.autograd.grad(masked[0], exact_points, grad.double())
    (eager_grad,) = torch.autograd.grad(masked[1], eager_points, grad)
    within_budget(ours, eager_grad, exact_grad, points_dtype, "gradient")


def test_stroke_distance_far_off(library):
    points = torch.tensor([[[1e6, 1e6], [1e6, 1.1e6], [-1e6, 2e6], [2e6, -1e6 + 3]]])
    strokes = Strokes(points, torch.ones(1, 4, dtype=torch.bool))
    emulated = Emulated(library, (20, 18))
    for count in (2, 3, 4):
        strokes.lengths = torch.tensor([count])
        distance2, _ = emulated.distance(strokes)
        exact, _ = reference.stroke_distance(points.double(), strokes.pen_down, strokes.lengths, 20, 18)
        torch.testing.assert_close(distance2.double(), exact, rtol=1e-6, atol=1e-9)


# --- determinism -------------------------------------------------------------------------------------------


def test_bits_do_not_depend_on_the_schedule(library):
    size = (40, 50)
    strokes, target = drawing(2, 30, size), drawing(2, 25, size, seed=7)
    results = []
    for schedule in SCHEDULES:
        emulated = Emulated(library, size, 2.0, shared_limit=TILED, schedule=schedule)
        image, winner = emulated.forward(strokes, torch.float32)
        distance2, segment = emulated.distance(strokes)
        results.append(
            [
                image,
                winner,
                emulated.backward(strokes, image, winner),
                *emulated.bce(strokes, target),
                distance2,
                segment,
                emulated.distance_backward(strokes, distance2, segment),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
