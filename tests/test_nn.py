"""nn.HyperLSTM: the eager implementation against the definition, and the contract of the modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize, prune

from sketchfast.kernels.reference.hyperlstm import dropout_masks, philox4x32
from sketchfast.nn import HyperLSTM, HyperLSTMCell

SIZES = (3, 6, 5, 2)  # input, hidden, hyper, embed
LAYER_NORM_PARAMETERS = {
    "ln_weight",
    "ln_bias",
    "hyper_ln_weight",
    "hyper_ln_bias",
    "hyper_ln_c_weight",
    "hyper_ln_c_bias",
}


def make(module: type = HyperLSTM, seed: int = 0, **options) -> HyperLSTM:
    """A float64 module all of whose parameters are random: zeros and ones would hide mistakes."""
    torch.manual_seed(seed)
    built = module(*SIZES, **options).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return built


def inputs(steps: int = 4, batch: int = 3) -> tuple[Tensor, tuple[Tensor, ...]]:
    torch.manual_seed(7)
    x = torch.randn(steps, batch, SIZES[0], dtype=torch.float64)
    state = tuple(torch.randn(batch, n, dtype=torch.float64) for n in (6, 6, 5, 5))
    return x, state


def layer_norm(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = v.mean(-1, keepdim=True)
    variance = ((v - mean) ** 2).mean(-1, keepdim=True)
    return (v - mean) / torch.sqrt(variance + 1e-3) * weight + bias


def naive(m: HyperLSTM, x: Tensor, state, lengths=None, masks=None):
    """The definition, a gate and a row of the equations at a time."""
    h, c, hh, hc = (part.clone() for part in state)
    H, Hh = m.hidden_size, m.hyper_size
    outputs = []
    for t in range(len(x)):
        u = torch.cat([x[t], h], -1)
        p = u @ m.hyper_weight_ih.T + hh @ m.hyper_weight_hh.T
        p = [p[:, g * Hh : (g + 1) * Hh] for g in range(4)]
        if m.layer_norm:
            p = [layer_norm(p[g], m.hyper_ln_weight[g], m.hyper_ln_bias[g]) for g in range(4)]
        new = torch.tanh(p[1]) * (1 if masks is None else masks[1][t])
        hc2 = hc * torch.sigmoid(p[2] + m.forget_bias) + torch.sigmoid(p[0]) * new
        shown = layer_norm(hc2, m.hyper_ln_c_weight, m.hyper_ln_c_bias) if m.layer_norm else hc2
        hh2 = torch.tanh(shown) * torch.sigmoid(p[3])
        alpha = [(hh2 @ m.z_weight[s].T + m.z_bias[s]) @ m.alpha_weight[s].T for s in range(8)]
        a = []
        for g in range(4):
            rows = slice(g * H, (g + 1) * H)
            beta = (hh2 @ m.zb_weight[g].T) @ m.beta_weight[g].T
            from_x = alpha[g] * (x[t] @ m.weight_ih[rows].T)
            from_h = alpha[4 + g] * (h @ m.weight_hh[rows].T)
            gate = from_x + from_h + beta + m.bias[rows]
            a.append(layer_norm(gate, m.ln_weight[g], m.ln_bias[g]) if m.layer_norm else gate)
        new = torch.tanh(a[1]) * (1 if masks is None else masks[0][t])
        c2 = c * torch.sigmoid(a[2] + m.forget_bias) + torch.sigmoid(a[0]) * new
        h2 = torch.tanh(layer_norm(c2, m.ln_c_weight, m.ln_c_bias)) * torch.sigmoid(a[3])
        live = torch.ones(len(h), 1, dtype=torch.bool) if lengths is None else (t < lengths)[:, None]
        outputs.append(torch.where(live, h2, torch.zeros_like(h2)))
        h, c, hh, hc = (
            torch.where(live, after, before) for after, before in ((h2, h), (c2, c), (hh2, hh), (hc2, hc))
        )
    return torch.stack(outputs), (h, c, hh, hc)


def assert_same(got, want, **tolerance) -> None:
    tolerance = tolerance or {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(got[0], want[0], **tolerance)
    for a, b in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# --- the definition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_norm_on", [True, False])
@pytest.mark.parametrize("lengths", [None, [4, 0, 2], [9, -3, 1]])
def test_follows_the_definition(layer_norm_on: bool, lengths: list[int] | None) -> None:
    m = make(layer_norm=layer_norm_on, forget_bias=0.7)
    x, state = inputs()
    lengths = None if lengths is None else torch.tensor(lengths)
    assert_same(m(x, state, lengths=lengths), naive(m, x, state, lengths))


def test_no_state_is_zeros() -> None:
    m = make()
    x, state = inputs()
    assert_same(m(x), m(x, tuple(torch.zeros_like(part) for part in state)), rtol=0, atol=0)


def test_dropout_follows_the_definition() -> None:
    m = make(recurrent_dropout=0.4)
    x, state = inputs()
    seed = torch.tensor(-(2**62) + 12345)
    masks = [
        dropout_masks(4, 3, width, p=0.4, seed=seed, stream=stream, step_offset=0, dtype=torch.float64)
        for stream, width in ((0, 6), (1, 5))
    ]
    assert_same(m(x, state, seed=seed), naive(m, x, state, masks=masks))


@pytest.mark.parametrize("layer_norm_on", [True, False])
def test_gradients(layer_norm_on: bool) -> None:
    m = make(layer_norm=layer_norm_on, recurrent_dropout=0.3)
    x, state = inputs(steps=3, batch=2)
    names = [name for name, _ in m.named_parameters()]
    lengths = torch.tensor([3, 2])

    def run(x, h, c, hh, hc, *values):
        call = torch.func.functional_call
        kwargs = {"lengths": lengths, "seed": 5}
        out, last = call(m, dict(zip(names, values, strict=True)), (x, (h, c, hh, hc)), kwargs)
        return out, *last

    arguments = [v.detach().requires_grad_() for v in (x, *state, *m.parameters())]
    assert torch.autograd.gradcheck(run, arguments, fast_mode=True)


def test_what_lies_past_the_end_is_not_read() -> None:
    m = make()
    x, state = inputs()
    lengths = torch.tensor([4, 0, 2])
    spoilt = x.clone()
    spoilt[2:, 2] = torch.nan
    spoilt[:, 1] = torch.nan
    assert_same(m(spoilt, state, lengths=lengths), m(x, state, lengths=lengths), rtol=0, atol=0)
    m(spoilt, state, lengths=lengths)[0].sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in m.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_two_halves_are_the_whole(dropout: float) -> None:
    m = make(recurrent_dropout=dropout)
    x, state = inputs(steps=5)
    whole = m(x, state, seed=3)
    first, middle = m(x[:2], state, seed=3)
    second, last = m(x[2:], middle, seed=3, step_offset=2)
    assert_same((torch.cat((first, second)), last), whole)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_cell_stepped_is_the_sequence(dropout: float) -> None:
    m = make(recurrent_dropout=dropout)
    cell = HyperLSTMCell(*SIZES, recurrent_dropout=dropout).double()
    cell.load_state_dict(m.state_dict())
    x, state = inputs()
    want = m(x, state, seed=11)
    outputs = []
    for step, row in enumerate(x):
        state = cell(row, state, step=step, seed=11)
        outputs.append(state[0])
    assert_same((torch.stack(outputs), state), want)


def test_empty_sequence_and_batch() -> None:
    m = make()
    x, state = inputs()
    out, last = m(x[:0], state)
    assert out.shape == (0, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(last, state, strict=True))
    out, last = m(x[:, :0])
    assert out.shape == (4, 0, 6)
    assert [part.shape for part in last] == [(0, 6), (0, 6), (0, 5), (0, 5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_keeps_cells_in_float32(dtype: torch.dtype) -> None:
    m = make()
    x, state = inputs()
    want, _ = m(x, state)
    low = make().to(dtype)
    out, (h, c, hyper_h, hyper_c) = low(x.to(dtype), tuple(part.to(dtype) for part in state))
    assert (out.dtype, h.dtype, hyper_h.dtype) == (dtype,) * 3
    assert (c.dtype, hyper_c.dtype) == (torch.float32,) * 2
    torch.testing.assert_close(out.double(), want, rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_autocast_computes_products_low_and_cells_in_float32() -> None:
    m = make().float()
    x, state = inputs()
    x, state = x.float(), tuple(part.float() for part in state)
    want, _ = m(x, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, (_, c, _, _) = m(x, state)
    assert out.dtype == c.dtype == torch.float32
    assert not torch.equal(out, want)
    torch.testing.assert_close(out, want, rtol=0, atol=0.1)


# --- parameters -------------------------------------------------------------------------------------------


def test_parameters_and_their_shapes() -> None:
    inputs, H, Hh, E = SIZES
    shapes = {name: tuple(p.shape) for name, p in HyperLSTM(*SIZES).named_parameters()}
    assert shapes == {
        "weight_ih": (4 * H, inputs),
        "weight_hh": (4 * H, H),
        "bias": (4 * H,),
        "hyper_weight_ih": (4 * Hh, inputs + H),
        "hyper_weight_hh": (4 * Hh, Hh),
        "z_weight": (8, E, Hh),
        "z_bias": (8, E),
        "alpha_weight": (8, H, E),
        "zb_weight": (4, E, Hh),
        "beta_weight": (4, H, E),
        "ln_weight": (4, H),
        "ln_bias": (4, H),
        "ln_c_weight": (H,),
        "ln_c_bias": (H,),
        "hyper_ln_weight": (4, Hh),
        "hyper_ln_bias": (4, Hh),
        "hyper_ln_c_weight": (Hh,),
        "hyper_ln_c_bias": (Hh,),
    }
    without = {name for name, _ in HyperLSTM(*SIZES, layer_norm=False).named_parameters()}
    assert shapes.keys() - without == LAYER_NORM_PARAMETERS
    assert {name for name, _ in HyperLSTMCell(*SIZES).named_parameters()} == shapes.keys()


def test_paper_size() -> None:
    m = HyperLSTM(261, 1024, 512, 64)
    assert sum(p.numel() for p in m.parameters()) == pytest.approx(10.1e6, rel=0.01)


def test_initialisation() -> None:
    torch.manual_seed(0)
    m = HyperLSTM(7, 16, 8, 4)
    for block in (*m.weight_hh.split(16), *m.hyper_weight_hh.split(8), *m.hyper_weight_ih[:, 7:].split(8)):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)), atol=1e-5, rtol=0)
    assert m.weight_ih.abs().max() <= (6 / (7 + 64)) ** 0.5
    assert m.weight_ih.std().item() == pytest.approx((2 / (7 + 64)) ** 0.5, rel=0.15)
    assert m.zb_weight.std().item() == pytest.approx(0.01, rel=0.3)
    for name, value in {
        "z_weight": 0,
        "z_bias": 1,
        "alpha_weight": 0.1 / 4,
        "beta_weight": 0,
        "bias": 0,
    }.items():
        assert torch.equal(getattr(m, name), torch.full_like(getattr(m, name), value)), name
    for name, parameter in m.named_parameters():
        if "ln_" in name:
            assert torch.equal(parameter, torch.full_like(parameter, name.endswith("weight"))), name


# --- dropout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of Random123 (Salmon et al. 2011), philox4x32 with 10 rounds
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words) -> None:
    got = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert got.tolist() == list(words)


def test_dropout_mask_counts_steps_streams_and_elements() -> None:
    seed = torch.tensor(0x1234_5678_9ABC_DEF0)
    got = dropout_masks(3, 2, 5, p=0.25, seed=seed, stream=1, step_offset=10)
    for t in range(3):
        for b in range(2):
            for unit in range(5):
                element = b * 5 + unit
                counter = tuple(map(torch.tensor, (t + 10, 1, element // 4, 0)))
                word = philox4x32(counter, (torch.tensor(0x9ABC_DEF0), torch.tensor(0x1234_5678)))[
                    element % 4
                ]
                assert got[t, b, unit] == (1 / 0.75 if word / 2**32 >= 0.25 else 0)


def test_dropout_keeps_the_mean() -> None:
    mask = dropout_masks(20, 10, 100, p=0.3, seed=torch.tensor(1), stream=0, step_offset=0)
    assert mask.mean() == pytest.approx(1.0, abs=0.03)


def test_dropout_is_decided_by_the_seed_and_off_in_evaluation() -> None:
    m = make(recurrent_dropout=0.5)
    x, _ = inputs()
    assert torch.equal(m(x, seed=1)[0], m(x, seed=torch.tensor(1))[0])
    assert not torch.equal(m(x, seed=1)[0], m(x, seed=2)[0])
    torch.manual_seed(0)
    first, second = m(x)[0], m(x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(m(x)[0], first)
    m.eval()
    assert torch.equal(m(x, seed=1)[0], make()(x)[0])


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((0, 6, 5, 2), {}, ValueError, "input_size must be at least 1"),
        ((3, 6.0, 5, 2), {}, TypeError, "hidden_size must be an integer"),
        ((3, 6, -1, 2), {}, ValueError, "hyper_size"),
        ((3, 6, 5, 0), {}, ValueError, "embed_size"),
        (SIZES, {"recurrent_dropout": 1.0}, ValueError, "recurrent_dropout must be below 1"),
        (SIZES, {"recurrent_dropout": -0.1}, ValueError, "recurrent_dropout"),
        (SIZES, {"forget_bias": "1"}, TypeError, "forget_bias"),
        (SIZES, {"impl": "fast"}, ValueError, "impl must be one of"),
    ],
)
@pytest.mark.parametrize("module", [HyperLSTM, HyperLSTMCell])
def test_constructor_errors_name_the_argument(module, arguments, options, error, words) -> None:
    with pytest.raises(error, match=words):
        module(*arguments, **options)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(4, 3, 3, dtype=torch.int64)}, TypeError, "x must be a tensor of dtype"),
        ({"x": torch.zeros(4, 3, 2, dtype=torch.float64)}, ValueError, r"x must have shape \[T, B, 3\]"),
        ({"x": torch.zeros(3, 3, dtype=torch.float64)}, ValueError, "x must have shape"),
        ({"state": torch.zeros(3, 6)}, TypeError, "state must be a tuple"),
        ({"state": (torch.zeros(3, 6),) * 4}, ValueError, r"state's hyper_h must have shape \[3, 5\]"),
        ({"lengths": torch.tensor([1, 2])}, ValueError, "lengths must have shape"),
        ({"lengths": torch.tensor([1.0, 2.0, 3.0])}, TypeError, "lengths"),
        ({"seed": torch.tensor([1])}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"seed": True}, TypeError, "seed must be an integer"),
        ({"seed": 2**63}, ValueError, "seed must be at most 9223372036854775807, got 9223372036854775808"),
        ({"x": torch.zeros(4, 3, 3)}, TypeError, "x must be of dtype float64 as the parameters are"),
        ({"x": torch.zeros(4, 3, 3).half()}, TypeError, "x must be of dtype float64 as the parameters are"),
        ({"step_offset": -1}, ValueError, "step_offset must be at least 0"),
        ({"step_offset": 2**63}, ValueError, "step_offset must be at most"),
        ({"context": [1.0]}, TypeError, "context must be a tensor or what `project` returns"),
        ({"context": torch.zeros(3, 4, dtype=torch.float64)}, ValueError, "context must have at most"),
        ({"context": torch.zeros(3, 1)}, TypeError, "context must be of dtype float64 as the parameters are"),
    ],
)
def test_call_errors_name_the_argument(change, error, words) -> None:
    m = make(recurrent_dropout=0.5)
    x, state = inputs()
    arguments = {"x": x, "state": state, **change}
    with pytest.raises(error, match=words):
        m(**arguments)


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float64, False), (torch.float16, False), (torch.float64, True)]
)
def test_x_must_have_the_parameters_dtype(dtype: torch.dtype, autocast: bool) -> None:
    m = make().float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(TypeError, match="x must be"):
        m(torch.zeros(4, 3, 3, dtype=dtype))


def test_autocast_takes_low_precision_x() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = make().float()(torch.zeros(4, 3, 3, dtype=torch.bfloat16))[0]
    assert torch.isfinite(out).all()


def test_numpy_integers_are_integers() -> None:
    m = HyperLSTM(*map(np.int64, SIZES), recurrent_dropout=0.5)
    assert all(type(size) is int for size in (m.input_size, m.hidden_size, m.hyper_size, m.embed_size))
    x = torch.randn(4, 3, 3)
    assert torch.equal(m(x, seed=np.int64(3))[0], m(x, seed=3)[0])
    assert torch.equal(m(x, seed=3, step_offset=np.int64(2))[0], m(x, seed=3, step_offset=2)[0])


# --- weights that are no parameters -----------------------------------------------------------------------


def test_pruned_weights_are_used() -> None:
    m = make()
    x, state = inputs()
    mask = (torch.arange(m.weight_hh.numel()) % 3 > 0).double().view_as(m.weight_hh)
    want = make()
    with torch.no_grad():
        want.weight_hh.mul_(mask)
    prune.custom_from_mask(m, "weight_hh", mask)
    assert_same(m(x, state), want(x, state), rtol=0, atol=0)


def test_parametrised_weights_are_used() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    m, want = make(), make()
    x, state = inputs()
    with torch.no_grad():
        want.weight_hh.mul_(2)
    parametrize.register_parametrization(m, "weight_hh", Doubled())
    assert_same(m(x, state), want(x, state), rtol=0, atol=0)


def test_replicas_of_data_parallel_run() -> None:
    """What nn.DataParallel makes of a module: plain tensors in place of its parameters."""
    m = make()
    x, state = inputs()
    replica = m._replicate_for_data_parallel()
    for name, parameter in m.named_parameters():
        setattr(replica, name, parameter * 1)
    assert_same(replica(x, state), m(x, state), rtol=0, atol=0)


def test_context_has_the_rows_of_x() -> None:
    with pytest.raises(ValueError, match="context must have x's 3 rows, got 4"):
        make()(inputs()[0][..., :2], context=torch.zeros(4, 1, dtype=torch.float64))


def test_seed_is_checked_without_dropout() -> None:
    with pytest.raises(TypeError, match="seed must be an integer"):
        make()(inputs()[0], seed="one")


def test_cell_errors_name_the_argument() -> None:
    cell = make(HyperLSTMCell)
    with pytest.raises(TypeError, match="context must be a tensor or what `project` returns"):
        cell(torch.zeros(2, 3, dtype=torch.float64), context=[1.0])
    with pytest.raises(ValueError, match=r"x must have shape \[B, 3\]"):
        cell(torch.zeros(2, 4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="step must be at least 0"):
        cell(torch.zeros(2, 3, dtype=torch.float64), step=-1)
