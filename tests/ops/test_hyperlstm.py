"""The fused HyperLSTM of every impl that runs here, against the reference in float64."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import pytest
import torch
from hyperlstm_eager import EagerKernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sketchfast.kernels import hyperlstm_loop as loop
from sketchfast.nn import HyperLSTM, HyperLSTMCell
from sketchfast.ops import hyperlstm as op
from sketchfast.testing import (
    assert_same_bits,
    assert_within_budget,
    available_impls,
    devices,
    opcheck,
)

FUSED = [
    pytest.param(device, impl, id=f"{device}-{impl}")
    for device in devices()
    for impl in available_impls(device)
    if impl != "reference"
    # the interpreter takes minutes; it has a process of its own in test_hyperlstm_triton.py
    and (device, impl) != ("cpu", "triton")
] or [pytest.param("cpu", "native", marks=pytest.mark.skip(reason="no fused impl was built"))]
fused = pytest.mark.parametrize(("device", "impl"), FUSED)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody has written holds NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before[0]
    torch.use_deterministic_algorithms(before[1])


@dataclass(frozen=True)
class Case:
    steps: int = 5
    batch: int = 3
    inputs: int = 7
    hidden: int = 17
    hyper: int = 9
    embed: int = 5
    layer_norm: bool = True
    dropout: float = 0.0
    lengths: bool = False
    context: int = 0

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.inputs, self.hidden, self.hyper, self.embed


CASES = {
    "odd": Case(),
    "plain": Case(layer_norm=False),
    "dropout": Case(dropout=0.3),
    "lengths": Case(lengths=True, steps=9, batch=6),
    "everything": Case(lengths=True, dropout=0.4, context=2, steps=6, batch=5),
    "plain everything": Case(layer_norm=False, lengths=True, dropout=0.4, context=3, steps=6, batch=5),
    "one of all": Case(1, 1, 1, 1, 1, 1),
    "one step": Case(steps=1, batch=4, hidden=8, hyper=8),
    "lanes": Case(steps=4, batch=8, inputs=5, hidden=64, hyper=32, embed=16),
    "long": Case(steps=100, batch=2, inputs=3, hidden=12, hyper=6, embed=4),
    "wide batch": Case(steps=3, batch=256, inputs=4, hidden=20, hyper=10, embed=3),
    "wide": Case(steps=2, batch=2, inputs=3, hidden=515, hyper=130, embed=7),
    "all context": Case(inputs=4, context=4),
}


def make(case: Case, dtype: torch.dtype, device: str, impl: str, seed: int = 0) -> HyperLSTM:
    """A module none of whose parameters is constant, the same for every dtype, device and impl."""
    torch.manual_seed(seed)
    m = HyperLSTM(*case.sizes, layer_norm=case.layer_norm, recurrent_dropout=case.dropout, impl=impl)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(torch.randn_like(p) * (0.2 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.1))
            p.copy_(p.to(dtype))
    return m.to(device=device, dtype=dtype)


def run(case: Case, dtype: torch.dtype, device: str, impl: str, data: torch.dtype) -> dict[str, Tensor]:
    """Values and every gradient, of inputs that are exact in `data`."""
    m = make(case, data, "cpu", impl).to(device=device, dtype=dtype)
    torch.manual_seed(1)
    made = [torch.randn(case.steps, case.batch, case.inputs - case.context)]
    made += [torch.randn(case.batch, n) for n in (case.hidden, case.hidden, case.hyper, case.hyper)]
    made += [torch.randn(case.batch, case.context)]
    lengths = torch.randint(-1, case.steps + 3, (case.batch,)) if case.lengths else None
    if lengths is not None:
        made[0][torch.arange(case.steps)[:, None] >= lengths[None]] = torch.nan
    x, *state, context = (v.to(data).to(device=device, dtype=dtype).requires_grad_() for v in made)
    out, last = m(
        x,
        tuple(state),
        context=context if case.context else None,
        lengths=None if lengths is None else lengths.to(device),
        seed=2**40 + 11,
        step_offset=3,
    )
    values = dict(zip(("out", "h", "c", "hyper_h", "hyper_c"), (out, *last), strict=True))
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(v.shape, generator=generator).to(v) for v in values.values()]
    names = ["x", "h0", "c0", "hyper_h0", "hyper_c0", *(name for name, _ in m.named_parameters())]
    leaves = [x, *state, *m.parameters()]
    if case.context:
        names, leaves = [*names, "context"], [*leaves, context]
    # without a step the reference's out depends on nothing
    pairs = [(v, g) for v, g in zip(values.values(), grads, strict=True) if v.requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    for name, leaf, grad in zip(names, leaves, found, strict=True):
        values[f"grad {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: value.detach().cpu() for name, value in values.items()}


#: rounding errors of a recurrent net are drawn, not bounded: the largest of one draw may be twice another's
SPREAD = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def check(case: Case, dtype: torch.dtype, device: str, impl: str) -> None:
    got, eager, exact = (
        run(case, kind, device, which, dtype)
        for kind, which in ((dtype, impl), (dtype, "reference"), (torch.float64, "reference"))
    )
    for name, want in exact.items():
        floor = SPREAD[dtype] * float(want.abs().max()) if want.numel() else 0.0
        assert_within_budget(got[name], eager[name], want, name, floor=floor + SPREAD[dtype] * 0.1)
    assert all(torch.isfinite(value).all() for value in got.values())


@fused
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(device: str, impl: str, name: str) -> None:
    check(CASES[name], torch.float32, device, impl)


@fused
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["odd", "everything", "plain everything", "one of all"])
def test_dtypes_match(device: str, impl: str, dtype: torch.dtype, name: str) -> None:
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 on a GPU is the reference's alone")
    check(CASES[name], dtype, device, impl)


@fused
@settings(max_examples=15, deadline=None)
@given(
    st.builds(
        Case,
        steps=st.integers(0, 7),
        batch=st.integers(0, 5),
        inputs=st.integers(2, 5),
        hidden=st.integers(1, 40),
        hyper=st.integers(1, 20),
        embed=st.integers(1, 9),
        layer_norm=st.booleans(),
        dropout=st.sampled_from([0.0, 0.5]),
        lengths=st.booleans(),
        context=st.integers(0, 2),
    )
)
def test_any_sizes_match(device: str, impl: str, case: Case) -> None:
    dtype = torch.float64 if device == "cpu" else torch.float32
    check(case, dtype, device, impl)


@fused
def test_chunks_and_spans_do_not_show(device: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any cut of the sequence into chunks, and of those into spans, gives the same values."""
    case = Case(steps=11, batch=3, dropout=0.3, lengths=True)
    dtype = torch.float64 if device == "cpu" else torch.float32
    whole = run(case, dtype, device, impl, dtype)
    for span in (1, 3 * 4, 3 * 8):
        monkeypatch.setitem(loop.CHUNK_ELEMENTS, device, 1)
        monkeypatch.setattr(loop, "SPAN_ROWS", span)
        cut = run(case, dtype, device, impl, dtype)
        for name, value in whole.items():
            torch.testing.assert_close(cut[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_the_loop_with_eager_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests of the other backends compare with: torch's own operations in the fused loop."""
    monkeypatch.setattr(op, "_NATIVE", EagerKernels())
    monkeypatch.setattr("sketchfast.ops._contract.unavailable_reason", lambda impl, device: None)
    for name in ("everything", "plain everything"):
        check(CASES[name], torch.float64, "cpu", "native")


@fused
def test_same_bits_twice(device: str, impl: str) -> None:
    case = Case(steps=7, batch=33, hidden=48, hyper=24, dropout=0.2, lengths=True)
    first, second = (run(case, torch.float32, device, impl, torch.float32) for _ in range(2))
    for name, value in first.items():
        assert_same_bits(second[name], value, name)


@fused
@pytest.mark.parametrize("cell", [False, True], ids=["module", "cell"])
def test_two_halves_are_the_whole(device: str, impl: str, cell: bool) -> None:
    case = Case(steps=6, batch=4, dropout=0.3, context=2)
    m = make(case, torch.float32, device, impl)
    x = torch.randn(6, 4, 5, device=device)
    context = m.project(torch.randn(4, 2, device=device))
    whole, last = m(x, context=context, seed=5)
    if cell:
        stepper = HyperLSTMCell(*case.sizes, recurrent_dropout=0.3, impl=impl).to(device)
        stepper.load_state_dict(m.state_dict())
        state, parts = None, []
        for step, row in enumerate(x):
            state = stepper(row, state, step=step, seed=5, context=context)
            parts.append(state[0])
        joined = torch.stack(parts)
    else:
        first, middle = m(x[:2], context=context, seed=5)
        second, state = m(x[2:], middle, context=context, seed=5, step_offset=2)
        joined = torch.cat((first, second))
    torch.testing.assert_close(joined, whole, rtol=0, atol=0)
    for got, want in zip(state, last, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@fused
def test_halves_carry_the_gradient(device: str, impl: str) -> None:
    case = Case(steps=6, batch=4, dropout=0.3)
    m = make(case, torch.float32, device, impl)
    x = torch.randn(6, 4, 7, device=device)

    def gradients(out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out.square().sum(), list(m.parameters())))

    whole = gradients(m(x, seed=5)[0])
    first, middle = m(x[:2], seed=5)
    second = m(x[2:], middle, seed=5, step_offset=2)[0]
    for got, want in zip(gradients(torch.cat((first, second))), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@fused
def test_context_is_a_constant_input(device: str, impl: str) -> None:
    case = Case(context=3)
    m = make(case, torch.float32, device, impl)
    x, context = torch.randn(5, 3, 4, device=device), torch.randn(3, 3, device=device)
    joined = torch.cat((x, context.expand(5, 3, 3)), dim=-1)
    for given_context in (context, m.project(context)):
        out = m(x, context=given_context)[0]
        torch.testing.assert_close(out, m(joined)[0], rtol=1e-5, atol=1e-6)


@fused
def test_dropout_masks_are_the_references(device: str, impl: str) -> None:
    """With c = 0 and open gates h is 0 exactly where the mask is."""
    case = Case(steps=4, batch=5, hidden=18, hyper=7, dropout=0.5, layer_norm=False)
    zeros = {}
    for which in (impl, "reference"):
        m = make(case, torch.float32, device, which)
        with torch.no_grad():
            m.ln_c_weight.fill_(1.0)
            m.ln_c_bias.zero_()
            m.bias.view(4, -1)[2].fill_(-100.0)  # the cell forgets at once: c = s(i) drop(tanh(j))
        x = torch.ones(4, 5, 7, device=device)
        _, (_, c, _, _) = m(x, seed=9)
        zeros[which] = c == 0
    assert torch.equal(zeros[impl], zeros["reference"])
    assert 0.3 < zeros[impl].float().mean() < 0.7


@fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device: str, impl: str, dtype: torch.dtype) -> None:
    """Products in the autocast dtype, cells in float32, x's dtype out; gradients of the parameters' dtype."""
    case = Case(steps=4, batch=6, hidden=32, hyper=16, embed=8, lengths=True)
    found = {}
    for which in (impl, "reference", "exact"):
        m = make(case, torch.float32, device, "reference" if which == "exact" else which)
        x = torch.randn(4, 6, 7, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
        lengths = torch.tensor([4, 1, 0, 3, 4, 2], device=device)
        if which == "exact":
            m, x = m.double(), x.detach().double().requires_grad_()
        with torch.autocast(device, dtype=dtype, enabled=which != "exact"):
            out, (h, c, hyper_h, hyper_c) = m(x, lengths=lengths)
        if which != "exact":
            assert {v.dtype for v in (out, h, c, hyper_h, hyper_c)} == {torch.float32}
        grads = torch.autograd.grad(out.square().sum() + c.sum(), [x, *m.parameters()])
        found[which] = [out.detach(), c.detach(), *grads]
    for got, eager, want in zip(*(found[w] for w in (impl, "reference", "exact")), strict=True):
        floor = SPREAD[dtype] * float(want.abs().max())
        assert got.dtype == torch.float32
        assert_within_budget(got, eager, want, floor=floor)


@fused
def test_low_precision_x_under_autocast(device: str, impl: str) -> None:
    m = make(Case(), torch.float32, device, impl)
    with torch.autocast(device, torch.bfloat16):
        out, (_, c, _, _) = m(torch.zeros(5, 3, 7, dtype=torch.bfloat16, device=device))
    assert out.dtype == torch.bfloat16
    assert c.dtype == torch.float32
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in m.parameters())


@fused
def test_nan_in_the_gradient_past_the_end(device: str, impl: str) -> None:
    m = make(Case(), torch.float32, device, impl)
    lengths = torch.tensor([5, 0, 2], device=device)
    x = torch.randn(5, 3, 7, device=device, requires_grad=True)
    out, _ = m(x, lengths=lengths)
    grad = torch.ones_like(out)
    grad[2:, 2] = torch.nan
    grad[:, 1] = torch.nan
    found = torch.autograd.grad(out, [x, *m.parameters()], grad)
    assert all(torch.isfinite(g).all() for g in found)
    assert not found[0][:, 1].any()
    assert not found[0][2:, 2].any()


@fused
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("where", ["x", "h", "c", "hyper_h", "hyper_c", "bias", "ln_c_bias"])
def test_nan_stays_nan(device: str, impl: str, where: str, layer_norm: bool) -> None:
    """Where the reference shows that training went wrong, so does the fused op."""
    finite = {}
    for which in (impl, "reference"):
        m = make(Case(layer_norm=layer_norm), torch.float32, device, which)
        made = {"x": torch.ones(5, 3, 7, device=device)}
        made |= {
            n: torch.ones(3, w, device=device) for n, w in zip(op.STATE_NAMES, (17, 17, 9, 9), strict=True)
        }
        with torch.no_grad():
            spoilt = made[where] if where in made else getattr(m, where)
            spoilt.view(-1)[3] = torch.nan
            x, *state = made.values()
            out, last = m(x, tuple(state))
        finite[which] = [v.isfinite().cpu() for v in (out, *last)]
    assert not finite["reference"][0].all()
    assert all(torch.equal(got, want) for got, want in zip(*finite.values(), strict=True))


@fused
def test_only_some_outputs_have_a_gradient(device: str, impl: str) -> None:
    case = Case()
    parts = {}
    for which in (impl, "reference"):
        m = make(case, torch.float32, device, which)
        torch.manual_seed(0)
        x = torch.randn(5, 3, 7, device=device)
        out, (h, c, hyper_h, hyper_c) = m(x)
        parts[which] = [
            torch.autograd.grad(v.sum(), m.weight_hh, retain_graph=True)[0]
            for v in (out, h, c, hyper_h, hyper_c)
        ]
    for got, want in zip(parts[impl], parts["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@fused
@pytest.mark.parametrize("steps", [0, 1])
def test_nothing_is_aliased(device: str, impl: str, steps: int) -> None:
    m = make(Case(), torch.float32, device, impl)
    state = tuple(torch.randn(3, n, device=device) for n in (17, 17, 9, 9))
    before = [part.clone() for part in state]
    out, last = m(torch.randn(steps, 3, 7, device=device), state)
    for part in (out, *last):
        part.detach().fill_(7.0)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


@fused
def test_strided_inputs(device: str, impl: str) -> None:
    m = make(Case(), torch.float32, device, impl)
    x, state = torch.randn(5, 3, 7, device=device), torch.randn(4, 17, 3, device=device)
    parts = (state[0].t(), state[1].t(), state[2, :9].t(), state[3, :9].t())
    want = m(x, tuple(part.contiguous() for part in parts))[0]
    assert_same_bits(m(x.transpose(0, 1).contiguous().transpose(0, 1), parts)[0], want)
    grad = torch.randn(3, 17, 5, device=device).permute(2, 0, 1)
    first = torch.autograd.grad(m(x, parts)[0], m.bias, grad)[0]
    assert_same_bits(first, torch.autograd.grad(m(x, parts)[0], m.bias, grad.contiguous())[0])


@fused
@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
def test_strides_of_state_and_weights(device: str, impl: str, low: bool) -> None:
    """A weight that is no parameter has any strides: here none of them is 1."""
    m = make(Case(), torch.float32, device, impl)
    x, state = torch.randn(5, 3, 7, device=device), torch.randn(2, 17, 3, device=device)
    parts = (state[0].t(), state[1].t(), state[0, :9].t(), state[1, :9].t())
    weights = {name: torch.stack((p.detach(), p.detach()), -1)[..., 0] for name, p in m.named_parameters()}
    leaves = [w.requires_grad_() for w in weights.values()]
    with torch.autocast(device, torch.bfloat16, enabled=low):
        want = m(x, tuple(part.contiguous() for part in parts))[0]
        got = torch.func.functional_call(m, weights, (x, parts))[0]
    assert_same_bits(got, want)
    of_want = torch.autograd.grad(want.square().sum(), list(m.parameters()))
    for a, b in zip(torch.autograd.grad(got.square().sum(), leaves), of_want, strict=True):
        assert_same_bits(a, b)


@fused
def test_once_differentiable(device: str, impl: str) -> None:
    for which in (impl, "reference"):
        m = make(Case(), torch.float32, device, which)
        x = torch.randn(5, 3, 7, device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(m(x)[0].sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once differentiable"):
            grad.sum().backward()


@fused
def test_opcheck(device: str, impl: str) -> None:
    m = make(Case(dropout=0.3), torch.float32, device, impl)
    x = torch.randn(5, 3, 7, device=device, requires_grad=True)
    state = [torch.randn(3, n, device=device) for n in (17, 17, 9, 9)]
    weights = [dict(m.named_parameters())[name] for name in loop.Weights._fields]
    lengths, seed = torch.tensor([5, 1, 3], device=device), torch.tensor(4, device=device)
    base = torch.randn(3, 4 * 26, device=device, requires_grad=True)
    forward = getattr(torch.ops.sketchfast, f"hyperlstm_fwd_{impl}")
    for kind in (torch.float32, torch.bfloat16):
        for with_base in (None, base.to(kind)):
            opcheck(forward, (x, with_base, *state, weights, lengths, seed, 0, 1.0, 0.3, kind))


@fused
def test_compiles_whole(device: str, impl: str) -> None:
    m = make(Case(dropout=0.2), torch.float32, device, impl)
    x = torch.randn(5, 3, 7, device=device)
    lengths = torch.tensor([5, 1, 3], device=device)

    def loss(x: Tensor) -> Tensor:
        out, (_, c, _, _) = m(x, lengths=lengths, seed=3)
        return out.square().sum() + c.sum()

    want = torch.autograd.grad(loss(x), list(m.parameters()))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), list(m.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@fused
def test_a_compiled_cell_is_not_compiled_for_every_step(device: str, impl: str) -> None:
    torch._dynamo.reset()
    cell = HyperLSTMCell(*Case().sizes, recurrent_dropout=0.2, impl=impl).to(device)
    x, graphs = torch.randn(3, 7, device=device), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled, seed = torch.compile(cell, backend=backend, fullgraph=True), torch.tensor(3, device=device)
    state = expected = tuple(torch.zeros(3, n, device=device) for n in (17, 17, 9, 9))
    with torch.no_grad():
        for step in range(6):
            state = compiled(x, state, step=step, seed=seed)
            expected = cell(x, expected, step=step, seed=seed)
    assert_same_bits(state[0], expected[0])
    assert len(graphs) <= 3  # step 0, step 1 (torch keeps both constant), any other


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("impl", [i for i in available_impls("cuda") if i != "reference"])
def test_in_a_cuda_graph(impl: str) -> None:
    m = make(Case(steps=9, batch=16, hidden=64, hyper=32), torch.float32, "cuda", impl)
    x = torch.randn(9, 16, 7, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(m(x)[0].sum(), [x, *m.parameters()])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(m(x)[0].sum(), [x, *m.parameters()])
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for got, want in zip(captured, torch.autograd.grad(m(x)[0].sum(), [x, *m.parameters()]), strict=True):
        assert_same_bits(got, want)


@fused
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 600e6), (torch.bfloat16, 300e6)], ids=str)
def test_memory_kept_for_backward(device: str, impl: str, dtype: torch.dtype, most: float) -> None:
    """At T 64, B 256, H 1024 under 600 MB in float32, half of it under autocast to bfloat16: by sizes, which
    scale with T, B and the widths as they are."""
    shrink = 8  # of the batch; what is kept is proportional to it
    with torch.device("meta"):
        kept = torch.ops.sketchfast.__getattr__(f"hyperlstm_fwd_{impl}")(
            torch.empty(64, 256, 261),
            None,
            *(torch.empty(256, n) for n in (1024, 1024, 512, 512)),
            [p for _, p in sorted_weights(HyperLSTM(261, 1024, 512, 64))],
            None,
            None,
            0,
            1.0,
            0.0,
            dtype,
        )
    assert sum(v.numel() * v.element_size() for v in (kept[0], *kept[5:])) < most
    # and that is what autograd really holds
    case = Case(steps=64, batch=256 // shrink, inputs=261, hidden=128, hyper=64, embed=8)
    m = make(case, torch.float32, device, impl)
    x = torch.randn(64, case.batch, 261, device=device)
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        out, _ = m(x)
    for own in (x, *m.parameters()):
        seen.pop(own.untyped_storage().data_ptr(), None)
    rows, width = 64 * case.batch, torch.finfo(dtype).bits // 8
    chunks = loop.chunk_count(64, case.batch, 128, device)
    states = chunks * case.batch * ((128 + 64) * 4 + 64 * width)
    initial = case.batch * 128 * 4  # h, the state before the first step
    assert sum(seen.values()) <= rows * (128 * 4 + 4 * (128 + 64) * width) + states + initial
    assert out.requires_grad


def sorted_weights(m: HyperLSTM) -> list[tuple[str, Tensor]]:
    named = dict(m.named_parameters())
    return [(name, named[name]) for name in loop.Weights._fields]


@fused
def test_memory_is_given_back(device: str, impl: str) -> None:
    m = make(Case(), torch.float32, device, impl)
    x = torch.randn(5, 3, 7, device=device)
    m(x)[0].sum().backward()
    gc.collect()
    before = len([o for o in gc.get_objects() if type(o) is torch.Tensor])
    for _ in range(3):
        m(x)[0].sum().backward()
    gc.collect()
    assert len([o for o in gc.get_objects() if type(o) is torch.Tensor]) <= before + 2


# --- products on CPU ----------------------------------------------------------------------------------------

needs_native = pytest.mark.skipif(
    "native" not in available_impls("cpu"), reason="the CPU library was not built"
)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 40) | st.integers(505, 530),
    n=st.integers(0, 150),
    k=st.integers(0, 20) | st.integers(185, 400),
    groups=st.integers(0, 3),
    transposed=st.tuples(st.booleans(), st.booleans()),
    packed=st.booleans(),
    add=st.booleans(),
)
def test_products_match(m, n, k, groups, transposed, packed, add) -> None:
    generator = torch.Generator().manual_seed(m * 1000 + n)
    lead = (groups,) if groups else ()

    def matrix(rows: int, columns: int, turned: bool) -> Tensor:
        shape = (*lead, columns, rows) if turned else (*lead, rows, columns)
        made = torch.randn(shape, generator=generator)
        return made.transpose(-1, -2) if turned else made

    a, b = matrix(m, k, transposed[0]), matrix(k, n, transposed[1])
    wide = torch.randn(*lead, m, n + 3, generator=generator)
    out, products = wide[..., 1 : n + 1], op._WideProducts()
    want = a.double() @ b.double() + (out.double() if add else 0)
    around = wide[..., 0].clone(), wide[..., n + 1 :].clone()
    products._product(a, products.stationary(b) if packed else b, out, add)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-4)
    assert torch.equal(wide[..., 0], around[0])
    assert torch.equal(wide[..., n + 1 :], around[1])


@needs_native
def test_the_default_dtype_does_not_matter() -> None:
    want = op._has_wide_products()
    op._has_wide_products.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert op._has_wide_products() == want
    finally:
        torch.set_default_dtype(before)


@needs_native
def test_a_single_step_packs_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    if not op._has_wide_products():
        pytest.skip("packing is for CPUs with AVX-512")
    m = make(Case(), torch.float32, "cpu", "native")

    def refuse(self, weight: Tensor) -> Tensor:
        raise AssertionError("packed for one use")

    monkeypatch.setattr(op._WideProducts, "stationary", refuse)
    m(torch.randn(1, 3, 7))
    with pytest.raises(AssertionError, match="packed for one use"):
        m(torch.randn(2, 3, 7))


@needs_native
def test_products_do_not_depend_on_threads() -> None:
    a, b = torch.randn(700, 300), torch.randn(300, 200)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = torch.empty(700, 200)
            op._WideProducts().mm(a, b, out)
            results.append(out)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


@needs_native
def test_the_library_checks_what_guards_memory() -> None:
    ops = torch.ops.sketchfast
    rest = (None, None, 0, 0, 1.0, 0.0)
    gates, cell, hidden = torch.zeros(2, 3, 16), torch.zeros(3, 4), torch.zeros(2, 3, 4)
    norm = (None,) * 4
    with pytest.raises(RuntimeError, match=r"gates must have 3 rows of 16, got shape \[2, 3, 15\]"):
        ops.hyperlstm_hyper_fwd_native(gates[..., 1:], None, cell, hidden, None, None, *norm, *rest)
    with pytest.raises(RuntimeError, match="hidden must have 3 rows of 4"):
        ops.hyperlstm_hyper_fwd_native(gates, None, cell, hidden[:, :2], None, None, *norm, *rest)
    with pytest.raises(RuntimeError, match="cell must be float32 or float64"):
        ops.hyperlstm_hyper_fwd_native(gates, None, cell.half(), hidden, None, None, *norm, *rest)
    with pytest.raises(RuntimeError, match=r"ln_weight must have shape \[4, 4\], got \[4, 3\]"):
        ops.hyperlstm_hyper_fwd_native(
            gates, None, cell, hidden, None, None, torch.zeros(4, 3), torch.zeros(4, 4), None, None, *rest
        )
    with pytest.raises(RuntimeError, match="layer norm must have both weight and bias"):
        ops.hyperlstm_hyper_fwd_native(
            gates, None, cell, hidden, None, None, torch.zeros(4, 4), None, None, None, *rest
        )
    with pytest.raises(RuntimeError, match="seed must be given where dropout is above 0"):
        ops.hyperlstm_hyper_fwd_native(
            gates, None, cell, hidden, None, None, *norm, None, None, 0, 0, 1.0, 0.5
        )
    with pytest.raises(RuntimeError, match=r"partials must have shape \[1, 10, 4\], got \[1, 9, 4\]"):
        ops.hyperlstm_hyper_bwd_native(
            gates[0], cell, cell, hidden[0], cell, gates[0], torch.zeros(1, 9, 4), *norm, *rest
        )
    a, b, out = torch.zeros(3, 4), torch.zeros(4, 5), torch.zeros(3, 5)
    with pytest.raises(RuntimeError, match="a must have as many rows as out"):
        ops.hyperlstm_product_native(a[:2], b, out, False, False)
    with pytest.raises(RuntimeError, match=r"b must have shape \[.., 4, 5\], got \[4, 4\]"):
        ops.hyperlstm_product_native(a, b[:, :4], out, False, False)
    with pytest.raises(RuntimeError, match="a must be float32"):
        ops.hyperlstm_product_native(a.double(), b, out, False, False)
    with pytest.raises(RuntimeError, match="must be contiguous in one dimension"):
        ops.hyperlstm_product_native(torch.zeros(6, 8)[::2, ::2], b, out, False, False)
