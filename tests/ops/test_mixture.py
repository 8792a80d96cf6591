"""The loss of a mixture density head on every impl, against torch.distributions and the float64 reference.

In a process of its own (test_mixture_triton.py starts one) TRITON_INTERPRET=1 adds Triton to the table.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions as D

from sketchfast.kernels.reference import mixture as reference
from sketchfast.ops.mixture import mixture_loss
from sketchfast.testing import assert_same_bits, assert_within_budget, available_impls, devices, opcheck

CASES = [(device, impl) for device in devices() for impl in available_impls(device)]
KERNELS = [case for case in CASES if case[1] != "reference"]
impls = pytest.mark.parametrize(("device", "impl"), CASES)
kernels = pytest.mark.parametrize(("device", "impl"), KERNELS)

SHAPES = [(0,), (1,), (2, 3), (63,), (5, 13), (130,), (4, 0, 2)]
COMPONENTS = [1, 2, 3, 7, 8, 15, 16, 17, 20, 30, 31, 32, 33, 40]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NAN, INFINITY = math.nan, math.inf


def skip_float64_on_gpu_impls(device, impl, dtype):
    if dtype == torch.float64 and (impl == "triton" or (impl == "native" and device == "cuda")):
        pytest.skip("float64 is for the reference and native on CPU")


def head(*shape, components=5, scale=1.0, dtype=torch.float32, device="cpu", seed=0, padding=0.4):
    """(output, target): normal outputs, and drawings whose last positions are padding."""
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(*shape, 3 + 6 * components, generator=generator, dtype=torch.float64) * scale
    offsets = torch.randn(*shape, 2, generator=generator, dtype=torch.float64)
    states = torch.randint(0, 2, shape, generator=generator)
    states = torch.where(torch.rand(shape, generator=generator) < padding, 2, states)
    pens = torch.nn.functional.one_hot(states, 3)
    target = torch.cat((offsets * (states < 2)[..., None], pens), -1)
    return output.to(device, dtype), target.float().to(device)


def losses(output, target, impl, weights=(3.0, 0.7)):
    """(pen, stroke, gradient of their weighted sum to the output)."""
    leaf = output.detach().clone().requires_grad_()
    pen, stroke = mixture_loss(leaf, target, impl=impl)
    (grad,) = torch.autograd.grad(weights[0] * pen + weights[1] * stroke, leaf)
    return pen.detach(), stroke.detach(), grad


def compare(output, target, impl):
    got, eager = losses(output, target, impl), losses(output, target, "reference")
    exact = losses(output.double(), target.double(), "reference")
    arithmetic = torch.float64 if output.dtype == torch.float64 else torch.float32
    assert got[0].dtype == got[1].dtype == arithmetic
    assert got[2].dtype == output.dtype
    for name, *three in zip(("pen", "stroke", "gradient"), got, eager, exact, strict=True):
        # The float64 reference's 1 - rho^2 cancels, by e^10 / 4 at most.
        floor = 1e-12 * float(three[2].abs().sum()) if output.dtype == torch.float64 else 0.0
        assert_within_budget(*three, name, floor=floor)


# --- the definition -----------------------------------------------------------------------------------------


def as_distribution(output):
    """The mixture of one position as torch writes it."""
    weights, mean_x, mean_y, log_x, log_y, raw = output[3:].view(6, -1)
    sigma_x, sigma_y, rho = log_x.clamp(-7, 7).exp(), log_y.clamp(-7, 7).exp(), raw.clamp(-5, 5).tanh()
    cross = rho * sigma_x * sigma_y
    covariance = torch.stack((sigma_x**2, cross, cross, sigma_y**2), -1).view(-1, 2, 2)
    means = torch.stack((mean_x, mean_y), -1)
    return D.MixtureSameFamily(D.Categorical(logits=weights), D.MultivariateNormal(means, covariance))


@impls
@pytest.mark.parametrize("components", [1, 3, 20])
def test_is_that_of_torch_distributions(device, impl, components):
    output, target = head(9, components=components, device=device)
    wide, wanted = output.double().cpu(), target.double().cpu()
    pen = stroke = 0.0
    for row, y in zip(wide, wanted, strict=True):
        pen -= torch.log_softmax(row[:3], 0)[y[2:].argmax()].item() / 9
        if not y[4]:
            stroke -= as_distribution(row).log_prob(y[:2]).item() / 9
    got = mixture_loss(output, target, impl=impl)
    assert got[0].item() == pytest.approx(pen, rel=1e-5)
    assert got[1].item() == pytest.approx(stroke, rel=1e-5)


# --- the kernels against the reference ----------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("components", COMPONENTS)
def test_components_match_reference(device, impl, dtype, components):
    skip_float64_on_gpu_impls(device, impl, dtype)
    compare(*head(5, 13, components=components, dtype=dtype, device=device), impl)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_match_reference(device, impl, dtype, shape):
    skip_float64_on_gpu_impls(device, impl, dtype)
    output, target = head(*shape, dtype=dtype, device=device)
    compare(output, target, impl)
    if not output.numel():
        pen, stroke, grad = losses(output, target, impl)
        assert pen == 0
        assert stroke == 0
        assert grad.shape == output.shape


@kernels
@pytest.mark.parametrize("scale", [0.0, 1e-3, 4.0, 30.0])
def test_scales_match_reference(device, impl, scale):
    """At 30 most spreads and correlations are clamped, and one component has nearly all the weight."""
    compare(*head(65, components=6, scale=scale, device=device), impl)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edge", [-1.0, 1.0])
def test_clamps_match_reference(device, impl, dtype, edge):
    """Just inside and just beyond the clamps, and far beyond: what is beyond has no gradient. At a limit
    itself releases of torch differ."""
    skip_float64_on_gpu_impls(device, impl, dtype)
    for column, limit in ((3, 7.0), (4, 7.0), (5, 5.0)):
        output, target = head(6, components=3, dtype=dtype, device=device, padding=0.0)
        parameters = output[:, 3:].view(6, 6, 3)
        parameters[:, column] = (
            edge * limit * torch.tensor([1 - 1e-6, 1 + 1e-6, 1.5], dtype=dtype, device=device)
        )
        compare(output, target, impl)
        grad = losses(output, target, impl)[2][:, 3:].view(6, 6, 3)[:, column]
        assert (grad[:, 1:] == 0).all()
        assert (grad[:, 0] != 0).any()


@kernels
@pytest.mark.parametrize("padding", [0.0, 1.0])
def test_padding_matches_reference(device, impl, padding):
    output, target = head(70, device=device, padding=padding)
    compare(output, target, impl)
    if padding:
        _, stroke, grad = losses(output, target, impl)
        assert stroke == 0
        assert not grad[:, 3:].any()
        assert grad[:, :3].any()


@kernels
def test_weights_far_apart_match_reference(device, impl):
    """Logits of 1e4: what is subtracted is large, what is left is not."""
    output, target = head(33, components=4, device=device)
    output[:, :7] *= 1e4
    compare(output, target, impl)


@kernels
def test_far_components_have_no_gradient(device, impl):
    """A component so far that its density is 0, its square infinite: the others count alone."""
    output, target = head(9, components=3, device=device, padding=0.0)
    output[:, 3 + 3] = torch.tensor([1e15, 1e25, -1e30] * 3, device=device)
    got, want = losses(output, target, impl), losses(output, target, "reference")
    for ours, eager in zip(got, want, strict=True):  # eager's correlations get 0 times infinity
        torch.testing.assert_close(ours, eager.nan_to_num(0.0))
    assert (got[2][:, [6, 9, 12, 15, 18]] == 0).all()


@impls
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("padding", [0.0, 1.0])
@pytest.mark.parametrize("column", range(3 + 6 * 2))
def test_what_is_not_finite_shows(device, impl, value, padding, column):
    """In the loss as in the reference's, and in no other position's gradient. Where the loss is finite the
    gradient is, be the reference's or not: of a mean infinitely far."""
    output, target = head(5, components=2, device=device, padding=padding)
    clean = losses(output, target, impl)
    output[2, column] = value
    got, want = losses(output, target, impl), losses(output, target, "reference")
    for ours, eager in zip(got[:2], want[:2], strict=True):
        assert torch.isfinite(ours) == torch.isfinite(eager)
        torch.testing.assert_close(ours.nan_to_num(1e9), eager.nan_to_num(1e9))
    if impl != "reference":
        finite = torch.isfinite(got[0] + got[1]) or torch.isfinite(want[2]).all()
        assert torch.isfinite(got[2]).all() == finite
    others = [0, 1, 3, 4]
    assert_same_bits(got[2][others], clean[2][others])


@impls
def test_all_components_infinitely_far(device, impl):
    output, target = head(4, components=2, device=device, padding=0.0)
    output[1, 5:7] = 1e30
    pen, stroke, grad = losses(output, target, impl)
    assert stroke == INFINITY
    assert torch.isfinite(pen)
    assert torch.isfinite(grad[[0, 2, 3]]).all()


@impls
def test_the_greatest_pen_number_is_the_state(device, impl):
    """Soft states too; of equal ones the first."""
    output, target = head(4, components=1, device=device)
    target[:, 2:] = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0, 0, 0], [0.1, 0.45, 0.45]])
    states = torch.tensor([1, 0, 0, 1], device=device)
    want = torch.nn.functional.cross_entropy(output[:, :3], states)
    torch.testing.assert_close(mixture_loss(output, target, impl=impl)[0], want)


@pytest.mark.parametrize(("device", "impl"), [c for c in KERNELS if c[1] != "triton"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_head_matches_the_reference(device, impl, data):
    positions, components = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 5))
    width = 3 + 6 * components
    numbers = st.floats(-12, 12, width=16).filter(lambda x: abs(x) not in (5, 7))  # the limits themselves
    count = positions * width
    output = torch.tensor(data.draw(st.lists(numbers, min_size=count, max_size=count)))
    offsets = torch.tensor(data.draw(st.lists(numbers, min_size=2 * positions, max_size=2 * positions)))
    states = torch.tensor(
        data.draw(st.lists(st.integers(0, 2), min_size=positions, max_size=positions)), dtype=torch.int64
    )
    pens = torch.nn.functional.one_hot(states, 3).float()
    target = torch.cat((offsets.float().view(positions, 2), pens), -1).to(device)
    compare(output.float().view(positions, width).to(device), target, impl)


@impls
def test_gradcheck_in_float64(device, impl):
    skip_float64_on_gpu_impls(device, impl, torch.float64)
    output, target = head(3, components=3, dtype=torch.float64, device=device)
    torch.autograd.gradcheck(lambda x: mixture_loss(x, target, impl=impl), (output.requires_grad_(),))


# --- contract -----------------------------------------------------------------------------------------------


@impls
def test_same_bits_again_and_with_strides(device, impl):
    output, target = head(65, 3, components=7, device=device)
    first = losses(output, target, impl)
    turned = output.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((65, 3, 10), NAN, device=device)
    wide[..., ::2] = target
    for again in (losses(output, target, impl), losses(turned, wide[..., ::2], impl)):
        for x, y in zip(again, first, strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize(("device", "impl"), [c for c in KERNELS if c == ("cpu", "native")])
def test_threads_do_not_change_bits(device, impl):
    output, target = head(2000, components=9)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(losses(output, target, impl))
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        for x, y in zip(other, found[0], strict=True):
            assert_same_bits(x, y)


@impls
def test_without_gradient_the_losses_are_the_same(device, impl):
    output, target = head(70, device=device)
    plain = mixture_loss(output, target, impl=impl)
    assert not plain[0].requires_grad
    with torch.no_grad():
        again = mixture_loss(output.requires_grad_(), target, impl=impl)
    for value, other, want in zip(plain, again, losses(output, target, impl), strict=False):
        assert_same_bits(value, want)
        assert_same_bits(other, want)


@impls
@pytest.mark.parametrize("which", [0, 1])
def test_one_loss_alone(device, impl, which):
    """Each reaches its own columns only."""
    output, target = head(7, device=device, padding=0.0)
    leaf = output.clone().requires_grad_()
    (grad,) = torch.autograd.grad(mixture_loss(leaf, target, impl=impl)[which], leaf)
    want = losses(output, target, impl, weights=(1.0 - which, float(which)))[2]
    torch.testing.assert_close(grad, want)
    empty, full = (grad[:, 3:], grad[:, :3]) if which == 0 else (grad[:, :3], grad[:, 3:])
    assert not empty.any()
    assert full.any()


@impls
def test_second_backward_raises(device, impl):
    output, target = head(6, device=device)
    output.requires_grad_()
    (grad,) = torch.autograd.grad(sum(mixture_loss(output, target, impl=impl)), output, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.square().sum().backward()


@impls
def test_no_gradient_to_the_target(device, impl):
    output, target = head(6, device=device)
    assert not mixture_loss(output, target.requires_grad_(), impl=impl)[1].requires_grad


@impls
def test_autocast_computes_in_float32(device, impl):
    output, target = head(17, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = mixture_loss(output, target, impl=impl)
    for ours, want in zip(got, mixture_loss(output, target, impl=impl), strict=True):
        assert_same_bits(ours, want)


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(device, impl, dtype):
    output, target = head(9, dtype=dtype, device=device)
    op = getattr(torch.ops.sketchfast, f"mixture_fwd_{impl}")
    opcheck(op, (output.requires_grad_(), target, True))
    opcheck(op, (output.detach(), target, False))
    one = torch.ones((), device=device)
    opcheck(
        getattr(torch.ops.sketchfast, f"mixture_bwd_{impl}"),
        (one, one, torch.randn(9, 33, device=device), dtype),
    )


@pytest.mark.parametrize(("device", "impl"), [c for c in CASES if c[1] != "triton"])
def test_compiles_whole(device, impl):
    """fullgraph, of several batches: forward and backward as without the compiler."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: mixture_loss(x, y, impl=impl), fullgraph=True, backend="aot_eager")
    for positions in (5, 9, 12):
        output, target = head(positions, 2, device=device)
        leaf = output.clone().requires_grad_()
        pen, stroke = compiled(leaf, target)
        (grad,) = torch.autograd.grad(3.0 * pen + 0.7 * stroke, leaf)
        for got, want in zip((pen, stroke, grad), losses(output, target, impl), strict=True):
            torch.testing.assert_close(got.detach(), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("impl", [impl for device, impl in KERNELS if device == "cuda"])
def test_cuda_graph(impl):
    output, target = head(64, 16, components=20, device="cuda")
    leaf = output.clone().requires_grad_()

    def step():
        pen, stroke = mixture_loss(leaf, target, impl=impl)
        return pen, stroke, torch.autograd.grad(3.0 * pen + 0.7 * stroke, leaf)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    other, _ = head(64, 16, components=20, device="cuda", seed=1)
    for values in (output, other):
        with torch.no_grad():
            leaf.copy_(values)
        graph.replay()
        for got, want in zip(kept, losses(values, target, impl), strict=True):
            assert_same_bits(got.detach(), want)


GOOD = torch.zeros(4, 9), torch.zeros(4, 5)
BAD_CALLS = [
    (lambda: mixture_loss(1.0, GOOD[1]), TypeError, "output must be a tensor, got 1.0"),
    (lambda: mixture_loss(GOOD[0].int(), GOOD[1]), TypeError, "output must be a tensor of dtype float16"),
    (lambda: mixture_loss(torch.zeros(()), GOOD[1]), ValueError, "output must have shape"),
    (lambda: mixture_loss(torch.zeros(4, 10), GOOD[1]), ValueError, r"output must have 3 \+ 6 M features"),
    (lambda: mixture_loss(torch.zeros(4, 3), GOOD[1]), ValueError, r"output must have 3 \+ 6 M features"),
    (lambda: mixture_loss(GOOD[0], None), TypeError, "target must be a tensor, got None"),
    (lambda: mixture_loss(GOOD[0], GOOD[1].long()), TypeError, "target must be a tensor of dtype"),
    (lambda: mixture_loss(GOOD[0], torch.zeros(3, 5)), ValueError, r"target must have shape \[4, 5\]"),
    (lambda: mixture_loss(GOOD[0], torch.zeros(4, 4)), ValueError, r"target must have shape \[4, 5\]"),
    (lambda: mixture_loss(GOOD[0], GOOD[1].to("meta")), ValueError, "target must be on cpu"),
    (lambda: mixture_loss(*GOOD, impl="fast"), ValueError, "impl must be one of"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS)
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif("native" not in available_impls("cpu"), reason="the CPU library was not built")
def test_the_library_checks_what_guards_memory():
    forward, backward = torch.ops.sketchfast.mixture_fwd_native, torch.ops.sketchfast.mixture_bwd_native
    output, target = GOOD
    with pytest.raises(RuntimeError, match=r"output must have shape \[N, 3 \+ 6 M\], got \[4, 8\]"):
        forward(output[:, :8].contiguous(), target, True)
    with pytest.raises(RuntimeError, match=r"target must have shape \[4, 5\], got \[3, 5\]"):
        forward(output, target[:3], True)
    with pytest.raises(RuntimeError, match="output must be contiguous"):
        forward(torch.zeros(9, 4).t(), target, True)
    with pytest.raises(RuntimeError, match=r"grad_pen must have shape \[\], got \[1\]"):
        backward(torch.ones(1), torch.ones(()), output, torch.float32)


def test_the_reference_alone_knows_what_the_limits_are():
    """The C++ header repeats them."""
    from pathlib import Path

    header = Path(__file__).resolve().parents[2] / "csrc/mixture_math.h"
    assert f"kLogSigmaLimit = {reference.LOG_SIGMA_RANGE[1]:g}, " in header.read_text()
    assert f"kCorrelationLimit = {reference.CORRELATION_LIMIT:g};" in header.read_text()
