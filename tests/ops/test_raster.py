"""rasterize, stroke_distance and raster_bce on every impl, against the float64 reference.

In a process of its own (test_raster_triton.py starts one) TRITON_INTERPRET=1 adds Triton to the table.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sketchfast as sf
from sketchfast.testing import (
    assert_same_bits,
    assert_within_budget,
    available_impls,
    devices,
    gradient,
    opcheck,
    random_strokes,
)

CASES = [(device, impl) for device in devices() for impl in available_impls(device)]
KERNELS = [case for case in CASES if case[1] != "reference"]
impls = pytest.mark.parametrize(("device", "impl"), CASES)
kernels = pytest.mark.parametrize(("device", "impl"), KERNELS)

SHAPES = [  # batch, steps, (height, width)
    (3, 20, (28, 28)),
    (1, 2, (1, 1)),
    (2, 2, (2, 3)),
    (2, 33, (63, 65)),
    (2, 9, (1, 17)),
    (2, 9, (40, 2)),
    (3, 1, (5, 6)),
    (2, 0, (5, 6)),
    (0, 5, (4, 4)),
]
INTENSITIES = [
    {},
    {"blur_sigma": 2.0},
    {"blur_sigma": 0.7, "blur_taps": 3},
    {"blur_sigma": 6.0, "blur_taps": 37},
    {"blur_sigma": 1.0, "blur_taps": 1},
    {"sharpness": 0.02, "offset": 1.0},
    {"sharpness": 40.0, "offset": 6.0, "blur_sigma": 1.5},
    {"offset": -30.0},
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def skip_float64_on_gpu_impls(device, impl, dtype):
    if dtype == torch.float64 and (impl == "triton" or (impl == "native" and device == "cuda")):
        pytest.skip("float64 is for the reference and native on CPU")


def targets(points, pen_down, size):
    """A target image and target strokes of another length than the strokes themselves."""
    other, pens = random_strokes(points.shape[0], 7, size, seed=5)
    image = torch.rand(points.shape[0], *size, generator=torch.Generator().manual_seed(2))
    return {"image": image.to(points.device), "strokes": (other.to(points), pens.to(points.device))}


def functions(pen_down, size, lengths, intensity, target):
    """name -> function(points, impl), one result each; target strokes take the dtype of the points."""

    def bce(points, impl, aim):
        if isinstance(aim, tuple):
            aim = (aim[0].to(points.dtype), aim[1])
        size_of = size if isinstance(aim, tuple) else None
        return sf.raster_bce(points, pen_down, aim, size=size_of, lengths=lengths, impl=impl, **intensity)

    def distance(points, impl):
        d2, _ = sf.stroke_distance(points, pen_down, size, lengths=lengths, impl=impl)
        return torch.where(torch.isfinite(d2), d2, 0.0)

    return {
        "rasterize": lambda p, i: sf.rasterize(p, pen_down, size, lengths=lengths, impl=i, **intensity),
        "bce to an image": lambda p, i: bce(p, i, target["image"]),
        "bce to strokes": lambda p, i: bce(p, i, target["strokes"]),
        "distance": distance,
    }


def compare_with_reference(points, pen_down, size, lengths, intensity, impl):
    """Values and gradients of all functions, within the error budget."""
    target = targets(points, pen_down, size)
    for name, function in functions(pen_down, size, lengths, intensity, target).items():
        got = gradient(lambda p, f=function: f(p, impl), points)
        eager = gradient(lambda p, f=function: f(p, "reference"), points)
        exact = gradient(lambda p, f=function: f(p, "reference"), points.double())
        # An image may lose intensities under 2^-24, the loss is within 1e-6 of the exact one, and what
        # ink cut off there would have added to the gradient is of that order too.
        floor = 0.0 if name == "distance" else 2.0**-24
        assert_within_budget(got[0], eager[0], exact[0], name, floor=floor)
        assert_within_budget(got[1], eager[1], exact[1], f"gradient of {name}", floor=floor)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "steps", "size"), SHAPES)
def test_matches_reference(device, impl, dtype, batch, steps, size):
    skip_float64_on_gpu_impls(device, impl, dtype)
    points, pen_down = random_strokes(batch, steps, size, dtype=dtype, device=device)
    lengths = torch.arange(batch, device=device) * 7 + max(steps - 6, 0)
    compare_with_reference(points, pen_down, size, lengths, {"blur_sigma": 2.0}, impl)


@kernels
@pytest.mark.parametrize("intensity", INTENSITIES, ids=str)
def test_intensities(device, impl, intensity):
    points, pen_down = random_strokes(2, 12, (19, 23), device=device)
    compare_with_reference(points, pen_down, (19, 23), None, intensity, impl)


@kernels
def test_large_canvas(device, impl):
    if impl == "triton" and device == "cpu":
        pytest.skip("minutes in the interpreter; test_raster_triton.py runs a smaller tiled case")
    points, pen_down = random_strokes(1, 64, (500, 130), device=device)
    compare_with_reference(points, pen_down, (500, 130), None, {"blur_sigma": 2.0}, impl)


def strange_strokes(kind, dtype):
    points, pen_down = random_strokes(2, 8, (16, 20), dtype=torch.float64, seed=3)
    if kind == "dots":
        points[:, 3:6] = points[:, 3:4]
    elif kind == "one dot":
        points[:] = torch.tensor([4.0, 9.0])
    elif kind == "all pen up":
        pen_down[:] = False
    elif kind == "off the canvas":
        points += 1000
    elif kind == "far":
        points[:, ::2] *= 1e4
    elif kind == "very far":
        points = (points - 8) * 1e5
    elif kind == "the same twice":
        points[:, 4:] = points[:, :4]
    elif kind == "not finite":
        points[0, 3, 0] = float("nan")
        points[1, 5, 1] = float("inf")
    return points.to(dtype), pen_down


STRANGE = [
    "dots",
    "one dot",
    "all pen up",
    "off the canvas",
    "far",
    "very far",
    "the same twice",
    "not finite",
]


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", STRANGE)
def test_strange_strokes(device, impl, dtype, kind):
    skip_float64_on_gpu_impls(device, impl, dtype)
    points, pen_down = strange_strokes(kind, dtype)
    points, pen_down = points.to(device), pen_down.to(device)
    for name, function in functions(
        pen_down, (16, 20), None, {"blur_sigma": 2.0}, targets(points, pen_down, (16, 20))
    ).items():
        got = gradient(lambda p, f=function: f(p, impl), points)
        eager = gradient(lambda p, f=function: f(p, "reference"), points)
        exact = gradient(lambda p, f=function: f(p, "reference"), points.double())
        assert torch.isfinite(got[0]).all(), name
        assert torch.isfinite(got[1]).all(), f"gradient of {name}"
        assert_within_budget(got[0], eager[0], exact[0], name, floor=2.0**-24)
        if kind not in ("far", "very far", "the same twice"):  # there the nearest of two may differ
            assert_within_budget(got[1], eager[1], exact[1], f"gradient of {name}", floor=2.0**-24)


@impls
@pytest.mark.parametrize("scale", [1e7, 1e15, 1e30, 3e38])
def test_finite_points_never_give_nan(device, impl, scale):
    points, pen_down = random_strokes(2, 6, 16, device=device)
    points = ((points - 8) / 8 * scale).requires_grad_()
    image = sf.rasterize(points, pen_down, 16, blur_sigma=2.0, impl=impl)
    loss = sf.raster_bce(points, pen_down, torch.zeros_like(image), impl=impl)
    (image.sum() + loss.sum()).backward()
    assert torch.isfinite(image).all()
    assert torch.isfinite(loss).all()
    assert not torch.isnan(points.grad).any()
    d2, _ = sf.stroke_distance(points.detach(), pen_down, 16, impl=impl)
    assert not torch.isnan(d2).any()


@impls
def test_known_distances(device, impl):
    """A 3-4-5 triangle by hand: ends, middle, and beyond the ends of a segment."""
    points = torch.tensor([[[1.0, 1.0], [5.0, 4.0], [20.0, 20.0]]], device=device)
    pen_down = torch.tensor([[True, False, True]], device=device)
    d2, segment = sf.stroke_distance(points, pen_down, (8, 9), impl=impl)
    assert d2.dtype == torch.float32
    assert segment.dtype == torch.int32
    assert (segment == 0).all()
    assert d2[0, 1, 1].item() == 0
    assert d2[0, 0, 0].item() == pytest.approx(2)  # past the start: to the end point
    assert d2[0, 7, 5].item() == pytest.approx(9)  # past the end
    assert d2[0, 5, 0].item() == pytest.approx(((0 - 1) * 3 / 5 - (5 - 1) * 4 / 5) ** 2, rel=1e-5)


@impls
def test_segments_that_do_not_exist(device, impl):
    points, _ = random_strokes(1, 5, 12, device=device)
    lift = torch.tensor([[False, True, False, True, True]], device=device)
    _, segment = sf.stroke_distance(points, lift, 12, impl=impl)
    assert set(segment.unique().tolist()) == {1, 3}  # the last pen is ignored
    _, segment = sf.stroke_distance(points, lift, 12, lengths=torch.tensor([4], device=device), impl=impl)
    assert set(segment.unique().tolist()) == {1}  # segment 3 joins points 3 and 4: one too many
    d2, segment = sf.stroke_distance(points, lift, 12, lengths=torch.tensor([1], device=device), impl=impl)
    assert torch.isinf(d2).all()
    assert (segment == -1).all()


@impls
def test_lengths_are_clamped(device, impl):
    points, pen_down = random_strokes(2, 6, 12, device=device)
    past = sf.rasterize(points, pen_down, 12, lengths=torch.tensor([99, -3], device=device), impl=impl)
    held = sf.rasterize(points, pen_down, 12, lengths=torch.tensor([6, 0], device=device), impl=impl)
    assert_same_bits(past, held)
    assert (held[1] == 0).all()


@impls
def test_points_past_the_length_are_not_read(device, impl):
    points, pen_down = random_strokes(2, 9, 12, device=device)
    spoiled = points.clone()
    spoiled[:, 5:] = float("nan")
    lengths = torch.tensor([5, 3], device=device)
    for function in (sf.rasterize, lambda *a, **k: sf.stroke_distance(*a, **k)[0]):
        clean = gradient(lambda p, f=function: f(p, pen_down, 12, lengths=lengths, impl=impl), points)
        other = gradient(lambda p, f=function: f(p, pen_down, 12, lengths=lengths, impl=impl), spoiled)
        assert_same_bits(clean[0], other[0])
        assert_same_bits(clean[1], other[1])


@impls
def test_pen_as_float(device, impl):
    points, pen_down = random_strokes(2, 6, 12, device=device)
    floats = torch.where(pen_down, 0.51, 0.5)
    assert_same_bits(
        sf.rasterize(points, floats, 12, impl=impl), sf.rasterize(points, pen_down, 12, impl=impl)
    )


@impls
def test_of_equal_distances_the_lowest_segment_wins(device, impl):
    points = torch.tensor([[[2.0, 3.0], [9.0, 3.5], [2.0, 3.0], [9.0, 3.5]]], device=device)
    pen_down = torch.tensor([[True, False, True, False]], device=device)  # the same segment twice
    _, segment = sf.stroke_distance(points, pen_down, 12, impl=impl)
    assert (segment == 0).all()
    _, grad = gradient(lambda p: sf.rasterize(p, pen_down, 12, impl=impl), points)
    assert (grad[0, 2:] == 0).all()
    assert (grad[0, :2] != 0).any()


@impls
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_image(device, impl, dtype):
    points, pen_down = random_strokes(1, 6, 12, device=device)
    points.requires_grad_()
    image = sf.rasterize(points, pen_down, 12, dtype=dtype, impl=impl)
    assert image.dtype == dtype
    image.float().sum().backward()
    assert points.grad.dtype == torch.float32
    if dtype == torch.float64:
        return
    half = points.detach().to(dtype)
    assert sf.rasterize(half, pen_down, 12, impl=impl).dtype == dtype
    assert sf.raster_bce(half, pen_down, image.detach().float(), impl=impl).dtype == torch.float32


@impls
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded(device, impl, dtype):
    """Reading and writing the short dtypes is torch's own conversion, denormals and all, to the bit."""
    points, pen_down = random_strokes(2, 12, 33, dtype=dtype, device=device)
    exact = sf.rasterize(points.float(), pen_down, 33, impl=impl)
    assert_same_bits(sf.rasterize(points, pen_down, 33, dtype=torch.float32, impl=impl), exact)
    stored = sf.rasterize(points.float(), pen_down, 33, dtype=dtype, impl=impl)
    if impl == "triton" and device == "cpu":  # the interpreter truncates to bfloat16 where a GPU rounds
        torch.testing.assert_close(stored, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=2.0**-24)
    else:
        assert_same_bits(stored, exact.to(dtype))


@impls
def test_peak_and_background(device, impl):
    points = torch.tensor([[[4.0, 6.0], [8.0, 6.0]]], device=device)
    image = sf.rasterize(points, torch.ones(1, 2, device=device), (13, 13), impl=impl)
    assert image[0, 6, 6].item() == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item(), rel=1e-6)
    assert image[0, 0].abs().max() < 2**-24


@kernels
def test_bits_repeat(device, impl):
    points, pen_down = random_strokes(4, 30, 28, device=device)
    for function in functions(
        pen_down, (28, 28), None, {"blur_sigma": 2.0}, targets(points, pen_down, (28, 28))
    ).values():
        first = gradient(lambda p, f=function: f(p, impl), points)
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            again = gradient(lambda p, f=function: f(p, impl), points)
            torch.set_num_threads(before)
            assert_same_bits(first[0], again[0])
            assert_same_bits(first[1], again[1])


@kernels
def test_a_sketch_does_not_depend_on_its_batch(device, impl):
    points, pen_down = random_strokes(3, 20, (21, 34), device=device)
    whole = sf.rasterize(points, pen_down, (21, 34), blur_sigma=2.0, impl=impl)
    for row in range(3):
        one = sf.rasterize(
            points[row : row + 1], pen_down[row : row + 1], (21, 34), blur_sigma=2.0, impl=impl
        )
        assert_same_bits(whole[row], one[0])


@impls
def test_gradcheck_in_float64(device, impl):
    skip_float64_on_gpu_impls(device, impl, torch.float64)
    points, pen_down = random_strokes(2, 5, (7, 8), dtype=torch.float64, device=device)
    points.requires_grad_()
    target = targets(points.detach(), pen_down, (7, 8))
    for function in functions(pen_down, (7, 8), None, {"blur_sigma": 1.5}, target).values():
        assert torch.autograd.gradcheck(lambda p, f=function: f(p, impl), points, atol=1e-6)


@impls
def test_gradient_is_that_of_finite_differences(device, impl):
    """float32 too, along a random direction."""
    points, pen_down = random_strokes(2, 12, 20, device=device)
    direction = torch.randn(points.shape, generator=torch.Generator().manual_seed(1)).to(device)

    def function(p, i):
        return sf.rasterize(p, pen_down, 20, blur_sigma=2.0, impl=i).sum()

    _, grad = gradient(lambda p: function(p, impl), points, weight=torch.ones(()))
    step = 1e-4
    up, down = (function(points.double() + s * step * direction, "reference") for s in (1, -1))
    assert (grad * direction).sum().item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-3)


@impls
@pytest.mark.parametrize("reduce", [torch.sum, lambda x: x.square().sum()], ids=["sum", "square"])
def test_second_backward_raises(device, impl, reduce):
    """Also where the incoming gradient is a constant, as that of a sum is."""
    points, pen_down = random_strokes(1, 6, 12, device=device)
    points.requires_grad_()
    for result in (
        sf.rasterize(points, pen_down, 12, impl=impl),
        sf.raster_bce(points, pen_down, torch.zeros(1, 12, 12, device=device), impl=impl),
        sf.stroke_distance(points, pen_down, 12, impl=impl)[0],
    ):
        (grad,) = torch.autograd.grad(reduce(result), points, create_graph=True)
        with pytest.raises(RuntimeError, match="once differentiable"):
            grad.square().sum().backward()


@impls
def test_numpy_scalars_and_meta_tensors(device, impl):
    points, pen_down = random_strokes(1, 6, 12, device=device)
    plain = sf.rasterize(points, pen_down, (12, 9), sharpness=4.0, offset=1.0, impl=impl)
    numbers = {"sharpness": np.float32(4), "offset": np.int64(1)}
    assert_same_bits(sf.rasterize(points, pen_down, (np.int64(12), np.int32(9)), impl=impl, **numbers), plain)
    meta = sf.rasterize(points.to("meta"), pen_down.to("meta"), (12, 9), impl="reference")
    assert meta.shape == plain.shape


@impls
def test_no_gradient_to_the_target(device, impl):
    points, pen_down = random_strokes(1, 6, 12, device=device)
    other = (points + 1).requires_grad_()
    image = torch.rand(1, 12, 12, device=device, requires_grad=True)
    points.requires_grad_()
    loss = sf.raster_bce(points, pen_down, (other, pen_down), size=12, impl=impl)
    (loss + sf.raster_bce(points, pen_down, image, impl=impl)).sum().backward()
    assert points.grad is not None
    assert other.grad is None
    assert image.grad is None


@impls
def test_loss_is_that_of_its_parts(device, impl):
    """raster_bce against rasterize and torch's own cross-entropy, in float64 where the impl has it."""
    points, pen_down = random_strokes(3, 20, 28, device=device)
    drawn = sf.rasterize(points.double(), pen_down, 28, blur_sigma=2.0, impl="reference")
    target = sf.rasterize(points.double() + 0.5, pen_down, 28, blur_sigma=2.0, impl="reference")
    clamped = drawn.clamp(1e-7, 1 - 1e-7)
    exact = torch.nn.functional.binary_cross_entropy(clamped, target, reduction="none").mean((1, 2))
    loss = sf.raster_bce(points, pen_down, (points + 0.5, pen_down), size=28, blur_sigma=2.0, impl=impl)
    torch.testing.assert_close(loss.double(), exact, rtol=0, atol=1e-6)


@impls
def test_autocast_changes_nothing(device, impl):
    points, pen_down = random_strokes(2, 6, 12, device=device)
    plain = gradient(lambda p: sf.rasterize(p, pen_down, 12, blur_sigma=2.0, impl=impl), points)
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = gradient(lambda p: sf.rasterize(p, pen_down, 12, blur_sigma=2.0, impl=impl), points)
    assert_same_bits(plain[0], cast[0])
    assert_same_bits(plain[1], cast[1])


@impls
def test_non_contiguous_arguments(device, impl):
    points, pen_down = random_strokes(4, 6, 12, device=device)
    strided, pens = points.transpose(0, 1).contiguous().transpose(0, 1), pen_down.t().contiguous().t()
    assert not strided.is_contiguous()
    assert_same_bits(
        sf.rasterize(strided, pens, 12, impl=impl), sf.rasterize(points, pen_down, 12, impl=impl)
    )
    lengths = torch.tensor([6, 0, 5, 0, 4, 0, 3, 0], device=device)[::2]
    image = sf.rasterize(points, pen_down, 12, lengths=lengths, impl=impl)
    assert_same_bits(image, sf.rasterize(points, pen_down, 12, lengths=lengths.clone(), impl=impl))


@kernels
def test_opcheck(device, impl):
    points, pen_down = random_strokes(2, 6, (7, 9), device=device)
    points.requires_grad_()
    lengths = torch.tensor([6, 3], device=device)
    scalars = (5.0, 2.0, 2.0, 5)
    ops = torch.ops.sketchfast
    forward = (points, pen_down, lengths, 7, 9, *scalars, torch.float32, True)
    opcheck(getattr(ops, f"raster_fwd_{impl}"), forward)
    _, segment = getattr(ops, f"raster_fwd_{impl}")(*forward)
    grad, still = torch.rand(2, 7, 9, device=device), points.detach()
    opcheck(getattr(ops, f"raster_bwd_{impl}"), (grad, still, pen_down, lengths, segment, *scalars))
    opcheck(getattr(ops, f"stroke_distance_fwd_{impl}"), (points, pen_down, lengths, 7, 9))
    _, nearest = getattr(ops, f"stroke_distance_fwd_{impl}")(still, pen_down, lengths, 7, 9)
    opcheck(getattr(ops, f"stroke_distance_bwd_{impl}"), (grad, still, nearest))
    strokes = (points, pen_down, lengths)
    opcheck(getattr(ops, f"raster_bce_{impl}"), (*strokes, grad, None, None, None, 7, 9, *scalars, True))
    opcheck(
        getattr(ops, f"raster_bce_{impl}"),
        (*strokes, None, still + 1, pen_down, lengths, 7, 9, *scalars, True),
    )


@impls
def test_compiles_without_a_graph_break(device, impl):
    points, pen_down = random_strokes(2, 6, (9, 8), device=device)
    lengths = torch.tensor([6, 4], device=device)

    def step(points):
        image = sf.rasterize(points, pen_down, (9, 8), lengths=lengths, blur_sigma=2.0, impl=impl)
        loss = sf.raster_bce(points, pen_down, (points.detach() + 1, pen_down), size=(9, 8), impl=impl)
        d2, _ = sf.stroke_distance(points, pen_down, (9, 8), impl=impl)
        return image.square().mean() + loss.mean() + d2.mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, expected_grad = gradient(step, points, weight=torch.ones(()))
    got, got_grad = gradient(compiled, points, weight=torch.ones(()))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_grad, expected_grad)


@pytest.mark.skipif("native" not in available_impls("cpu"), reason="the CPU library was not built")
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    steps=st.integers(0, 12),
    height=st.integers(1, 40),
    width=st.integers(1, 70),
    sharpness=st.floats(0.05, 20),
    offset=st.floats(-4, 6),
    sigma=st.one_of(st.none(), st.floats(0.3, 5)),
    taps=st.sampled_from([1, 3, 5, 11]),
    scale=st.floats(0, 30),
)
def test_native_is_the_reference_anywhere(seed, steps, height, width, sharpness, offset, sigma, taps, scale):
    """In float64, where there is no rounding to hide behind."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(2, steps, 2, generator=generator, dtype=torch.float64) * scale + 8
    pen_down = torch.rand(2, steps, generator=generator) > 0.3
    lengths = torch.randint(-1, steps + 2, (2,), generator=generator)
    kwargs = {"lengths": lengths, "sharpness": sharpness, "offset": offset}
    kwargs |= {"blur_sigma": sigma, "blur_taps": taps}
    ours = sf.rasterize(points, pen_down, (height, width), impl="native", **kwargs)
    theirs = sf.rasterize(points, pen_down, (height, width), impl="reference", **kwargs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    loss = sf.raster_bce(points, pen_down, theirs, impl="native", **kwargs)
    torch.testing.assert_close(
        loss, sf.raster_bce(points, pen_down, theirs, impl="reference", **kwargs), rtol=1e-9, atol=1e-9
    )


@impls
def test_ink_only_grows_with_more_strokes(device, impl):
    points, pen_down = random_strokes(1, 10, 20, device=device)
    fewer = sf.rasterize(points, pen_down, 20, lengths=torch.tensor([5], device=device), impl=impl)
    assert (sf.rasterize(points, pen_down, 20, impl=impl) >= fewer).all()


BAD_CALLS = [  # (changed arguments, exception, what the message must hold)
    ({"points": [[0.0, 0.0]]}, TypeError, "points must be a tensor"),
    (
        {"points": torch.zeros(2, 4, 2, dtype=torch.int64)},
        TypeError,
        "points must be.*float.*got a int64 tensor",
    ),
    ({"points": torch.zeros(2, 4, 3)}, ValueError, r"points must have shape \[B, T, 2\], got.*\(2, 4, 3\)"),
    ({"points": torch.zeros(4, 2)}, ValueError, r"points must have shape.*\(4, 2\)"),
    ({"pen_down": torch.ones(2, 5)}, ValueError, r"pen_down must have shape \[2, 4\], got.*\(2, 5\)"),
    ({"pen_down": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "pen_down must be.*bool.*int64"),
    ({"pen_down": None}, TypeError, "pen_down must be a tensor, got None"),
    ({"size": 0}, ValueError, "size must be at least 1, got 0"),
    ({"size": (5, -1)}, ValueError, r"size\[1\] must be at least 1, got -1"),
    ({"size": (5, 5, 5)}, ValueError, r"size must be.*pair.*\(5, 5, 5\)"),
    ({"size": 5.0}, TypeError, "size must be an integer, got 5.0"),
    ({"size": "28"}, TypeError, "size must be an integer, got '28'"),
    (
        {"lengths": torch.ones(3, dtype=torch.int64)},
        ValueError,
        r"lengths must have shape \[2\], got.*\(3,\)",
    ),
    ({"lengths": torch.ones(2)}, TypeError, "lengths must be.*int64.*float32"),
    ({"lengths": [4, 4]}, TypeError, "lengths must be a tensor"),
    ({"sharpness": 0.0}, ValueError, "sharpness must be greater than 0, got 0.0"),
    ({"sharpness": -1}, ValueError, "sharpness must be greater than 0, got -1"),
    ({"sharpness": float("nan")}, ValueError, "sharpness must be finite, got nan"),
    ({"sharpness": "5"}, TypeError, "sharpness must be a number, got '5'"),
    ({"offset": float("inf")}, ValueError, "offset must be finite, got inf"),
    ({"blur_sigma": 0.0}, ValueError, "blur_sigma must be greater than 0, got 0.0"),
    ({"blur_sigma": 1.0, "blur_taps": 4}, ValueError, "blur_taps must be odd, got 4"),
    ({"blur_taps": -1}, ValueError, "blur_taps must be at least 1, got -1"),
    ({"blur_taps": 2**40 + 1}, ValueError, "blur_taps must be at most 32767, got 1099511627777"),
    ({"sharpness": 10**400}, ValueError, "sharpness must be finite, got 1000"),
    ({"size": torch.tensor(28.0)}, TypeError, "size must be an integer, got a float32 tensor"),
    ({"size": np.array([5, 5])}, TypeError, "size must be an integer, got array"),
    ({"points": torch.zeros(2, 4, 2).to_sparse()}, TypeError, "points must be a dense tensor"),
    ({"dtype": torch.int32}, TypeError, "dtype must be.*int32"),
    ({"impl": "fast"}, ValueError, "impl must be one of.*got 'fast'"),
    (
        {"check_values": True, "lengths": torch.tensor([4, 9])},
        ValueError,
        r"lengths must lie in \[0, 4\], got 9",
    ),
    (
        {"check_values": True, "lengths": torch.tensor([-1, 4])},
        ValueError,
        r"lengths must lie in \[0, 4\], got -1",
    ),
    (
        {"check_values": True, "points": torch.full((2, 4, 2), float("nan"))},
        ValueError,
        r"points must be finite, got nan at index \(0, 0, 0\)",
    ),
]


@impls
@pytest.mark.parametrize(("changed", "error", "message"), BAD_CALLS, ids=lambda x: str(x)[:60])
def test_bad_input(device, impl, changed, error, message):
    points, pen_down = random_strokes(2, 4, 5)
    arguments = {"points": points, "pen_down": pen_down, "size": 5, "impl": impl} | changed
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error, match=message):
        sf.rasterize(**arguments)


BAD_TARGETS = [
    (
        {"target": torch.rand(2, 5, 6), "size": 5},
        ValueError,
        r"target must have shape \[2, 5, 5\], got.*\(2, 5, 6\)",
    ),
    ({"target": torch.rand(3, 5, 5)}, ValueError, r"target must have shape \[2, H, W\]"),
    ({"target": torch.zeros(2, 5, 5, dtype=torch.int64)}, TypeError, "target must be.*int64"),
    ({"target": None}, TypeError, "target must be a tensor, got None"),
    ({"target": (torch.rand(2, 3, 2), torch.ones(2, 3))}, ValueError, "size must be given"),
    (
        {"target": (torch.rand(1, 3, 2), torch.ones(1, 3)), "size": 5},
        ValueError,
        "target_points must have shape",
    ),
    (
        {"target": (torch.rand(2, 3, 2), torch.ones(2, 4)), "size": 5},
        ValueError,
        "target_pen_down must have shape",
    ),
    ({"target": (torch.rand(2, 3, 2),), "size": 5}, ValueError, "target must be a tensor or a pair"),
    (
        {"target": torch.rand(2, 5, 5), "target_lengths": torch.ones(2)},
        ValueError,
        "target_lengths must be None",
    ),
    (
        {"target": torch.full((2, 5, 5), 1.5), "check_values": True},
        ValueError,
        r"target must lie in \[0, 1\]",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_TARGETS, ids=lambda x: str(x)[:60])
def test_bad_target(changed, error, message):
    points, pen_down = random_strokes(2, 4, 5)
    with pytest.raises(error, match=message):
        sf.raster_bce(points, pen_down, **changed)


def test_an_impl_that_cannot_run_says_why(monkeypatch):
    points, pen_down = random_strokes(1, 4, 5)
    if "triton" not in available_impls("cpu"):
        with pytest.raises(
            RuntimeError, match=r"impl='triton' of rasterize cannot run on cpu: .*(triton|Triton)"
        ):
            sf.rasterize(points, pen_down, 5, impl="triton")
    meta = points.to("meta")
    with pytest.raises(RuntimeError, match="impl='native' of rasterize cannot run on meta"):
        sf.rasterize(meta, pen_down.to("meta"), 5, impl="native")
