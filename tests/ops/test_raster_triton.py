"""What is special to the Triton kernels of raster: their interpreter, their tilings, their compilation.

Triton's interpreter must be chosen before Triton is imported, and cannot compile. So this module runs in two
ways: the plain one starts a process with TRITON_INTERPRET=1 over the common table and this module, and
compiles ahead of time; there, and on a GPU, the tests of the tilings run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sketchfast as sf
from sketchfast.testing import (
    assert_same_bits,
    assert_within_budget,
    available_impls,
    devices,
    gradient,
    random_strokes,
)

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [device for device in devices() if "triton" in available_impls(device)]

runs = pytest.mark.skipif(not DEVICES, reason="Triton runs on a GPU or in its interpreter")
on_devices = pytest.mark.parametrize("device", DEVICES)
outside = pytest.mark.skipif(INTERPRETED, reason="needs a process without the interpreter")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900
    )


@outside
@pytest.mark.parametrize(
    ("module", "chosen"),
    [
        # Slow in the interpreter, and of the same kind as tests of this module: those of bits and of tiles.
        ("test_raster.py", "triton and not bits_repeat and not 2-33-size3"),
        ("test_raster_triton.py", "test_"),
    ],
)
def test_in_the_interpreter(module, chosen):
    done = run(
        *("-m", "pytest", f"tests/ops/{module}", "-k", chosen, "-p", "no:cacheprovider", "-W", "ignore"),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "100%" in done.stdout  # some were selected


@outside
def test_compiles_ahead_of_time():
    """One size and dtype for sm_90; benchmarks/aot_triton.py without --quick takes all."""
    pytest.importorskip("triton.backends.nvidia")
    done = run("benchmarks/aot_triton.py", "--quick", "--op", "raster", "--jobs", "1", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_bce_kernel" in done.stdout
    assert "sm_90" in done.stdout


def results(points, pen_down, size, sigma, taps=5, target=None):
    """[(value, gradient)] of rasterize, raster_bce, stroke_distance."""
    blur = {"blur_sigma": sigma, "blur_taps": taps}
    if target is None:
        target = torch.rand(points.shape[0], *size, generator=torch.Generator().manual_seed(2))
    target = target.to(points.device)

    def functions(impl):
        return (
            lambda p: sf.rasterize(p, pen_down, size, impl=impl, **blur),
            lambda p: sf.raster_bce(p, pen_down, target, impl=impl, **blur),
            lambda p: sf.stroke_distance(p, pen_down, size, impl=impl)[0],
        )

    return functions


def weighted(function, points):
    """`gradient` under weights none of which is 0: for one loss a sketch, that of the first would be."""
    count = function(points).numel()
    return gradient(function, points, torch.arange(count, dtype=torch.float64, device=points.device).cos())


@runs
@on_devices
@pytest.mark.parametrize(
    ("size", "sigma", "taps"),
    [
        ((70, 66), 2.0, 5),  # halos of 2 and 4
        ((70, 66), 2.5, 11),  # 64 x 64 blocks
        ((66, 20), 6.0, 27),  # too wide for raster_bce's block only
        ((66, 20), 9.0, 41),  # too wide for any block
        ((500, 12), 2.0, 5),
    ],
)
def test_tiled_canvas(device, size, sigma, taps):
    points, pen_down = random_strokes(2, 9, size, device=device)
    functions = results(points, pen_down, size, sigma, taps)
    for name, got, eager in zip(
        ("rasterize", "raster_bce"), functions("triton")[:2], functions("reference")[:2], strict=True
    ):
        mine = weighted(got, points)
        theirs = weighted(eager, points)
        exact = weighted(eager, points.double())
        assert exact[1].abs().max() > 0
        # An image may lose what is under 2^-24; nothing of the loss's gradient is that large a share.
        floor = 2.0**-24 if name == "rasterize" else 0.0
        assert_within_budget(mine[0], theirs[0], exact[0], name, floor=2.0**-24)
        assert_within_budget(mine[1], theirs[1], exact[1], f"gradient of {name}", floor=floor)


def distance_to(points, segment):
    """d2 [B, H, W] of every pixel to the segment that `segment` names, in the dtype of `points`."""
    height, width = segment.shape[1:]
    index = segment.long().flatten(1)[..., None].expand(-1, -1, 2)
    start, end = points.gather(1, index), points.gather(1, index + 1)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixel = torch.stack((x, y), -1).view(1, -1, 2).to(points)
    along = end - start
    fraction = (((pixel - start) * along).sum(-1) / (along * along).sum(-1)).clamp(0, 1)
    return (pixel - start - fraction[..., None] * along).square().sum(-1).view(segment.shape)


@runs
@on_devices
@pytest.mark.parametrize(
    ("size", "dtype"), [((70, 66), torch.float32), ((70, 66), torch.bfloat16), ((500, 12), torch.float32)]
)
def test_distance_on_a_tiled_canvas(device, size, dtype):
    """Of segments within rounding of the least any may win; the gradient is that of the winner."""
    points, pen_down = random_strokes(2, 9, size, dtype=dtype, device=device)
    pen_down[:, :3] = True
    assert (points[:, 1:] != points[:, :-1]).any(-1).all()  # `distance_to` divides by the length
    wide = points.double()
    _, segment = sf.stroke_distance(points, pen_down, size, impl="triton")
    least, _ = sf.stroke_distance(wide, pen_down, size, impl="reference")
    torch.testing.assert_close(distance_to(wide, segment), least, rtol=1e-6, atol=1e-6)

    mine = weighted(lambda p: sf.stroke_distance(p, pen_down, size, impl="triton")[0], points)
    theirs = weighted(lambda p: distance_to(p.float(), segment).to(torch.float32), points)
    exact = weighted(lambda p: distance_to(p, segment), wide)
    assert_within_budget(mine[0], theirs[0], exact[0], "distance")
    assert_within_budget(mine[1], theirs[1], exact[1], "gradient of distance")


@runs
@on_devices
@pytest.mark.parametrize(
    ("name", "value"), [("_MAX_PROGRAMS", 2), ("_CHUNK", 4), ("_FUSED_STEPS", 0), ("_GROUP", 4)]
)
def test_launch_sizes_do_not_change_the_result(device, name, value, monkeypatch):
    """Programs that stride over tiles, lists filled more than once, the gradient in launches of its own."""
    from sketchfast.kernels.triton import raster

    points, pen_down = random_strokes(3, 9, 20, device=device)
    functions = results(points, pen_down, (20, 20), 2.0)("triton")
    before = [weighted(f, points) for f in functions]
    monkeypatch.setattr(raster, name, value)
    for function, (out, grad) in zip(functions, before, strict=True):
        out2, grad2 = weighted(function, points)
        assert_same_bits(out, out2)
        torch.testing.assert_close(grad, grad2, rtol=1e-5, atol=1e-6 * float(grad.abs().max()))


@runs
@on_devices
def test_bits_repeat(device):
    points, pen_down = random_strokes(2, 12, (20, 33), device=device)
    for function in results(points, pen_down, (20, 33), 2.0)("triton"):
        first, again = weighted(function, points), weighted(function, points)
        assert_same_bits(first[0], again[0])
        assert_same_bits(first[1], again[1])


@runs
@on_devices
def test_long_sketch_saves_wide_indices(device):
    points = torch.zeros(1, 2**15 + 1, 2, device=device)
    points[0, :3] = torch.tensor([[1.0, 1.0], [4.0, 1.0], [4.0, 3.0]])
    pen_down = torch.ones(1, 2**15 + 1, dtype=torch.bool, device=device)
    lengths = torch.tensor([3], device=device)
    forward = torch.ops.sketchfast.raster_fwd_triton
    image, segment = forward(points, pen_down, lengths, 5, 6, 5.0, 2.0, 0.0, 5, torch.float32, True)
    assert segment.dtype == torch.int32
    assert segment.unique().tolist() == [-1, 0, 1]
    short, narrow = forward(
        points[:, :3].contiguous(),
        pen_down[:, :3].contiguous(),
        None,
        5,
        6,
        5.0,
        2.0,
        0.0,
        5,
        torch.float32,
        True,
    )
    assert narrow.dtype == torch.int16
    assert_same_bits(image, short)


@runs
@on_devices
@pytest.mark.parametrize("offset", [2.0, 20.0])
@pytest.mark.parametrize("sigma", [None, 1.0])
def test_loss_near_full_ink_does_not_cancel(device, offset, sigma):
    """offset 20: ink within 1e-8 of 1, where 1 - p must be formed from its own side."""
    points, pen_down = random_strokes(2, 15, 20, device=device)
    target = torch.zeros(2, 20, 20, device=device)
    kwargs = {"offset": offset, "blur_sigma": sigma}
    loss = sf.raster_bce(points, pen_down, target, impl="triton", **kwargs)
    exact = sf.raster_bce(points.double(), pen_down, target, impl="reference", **kwargs)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=1e-6)


@runs
@on_devices
def test_line_across_from_a_million_pixels_off(device):
    """Exact to float32 although the ends lie 1e6 away: eager float32 is off by tenths of a pixel."""
    points = torch.tensor([[[-1e6, -3e5], [1e6, 3.1e5]], [[-1e6, 20.0], [1e6, 20.0]]], device=device)
    pen_down = torch.ones(2, 2, dtype=torch.bool, device=device)
    points[0, 1, 1] = 300020.0
    points[0, 0, 1] = -300000.0
    ours = sf.rasterize(points, pen_down, (40, 70), blur_sigma=2.0, impl="triton")
    exact = sf.rasterize(points.double(), pen_down, (40, 70), blur_sigma=2.0, impl="reference")
    assert exact.flatten(1).amax(1).min() > 0.1
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-6)
