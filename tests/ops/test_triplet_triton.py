"""What is special to the Triton kernels of the triplet losses: interpreter, ways of counting, compilation.

As test_sinkhorn_triton.py, this module runs in two ways: the plain one starts a process with
TRITON_INTERPRET=1 over the common table and this module, and compiles ahead of time; there, and on a GPU, the
rest runs.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sketchfast as sf
from sketchfast.kernels.reference import triplet as reference
from sketchfast.testing import assert_same_bits, assert_within_budget, available_impls, devices

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from sketchfast.kernels.triton.triplet import _count_below, _running, _sort  # noqa: E402

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests/ops/test_triplet.py"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [device for device in devices() if "triton" in available_impls(device)]
NEVER = 2**31 - 1  # a tree_from that no batch reaches
WAYS = pytest.mark.parametrize("tree_from", [1, NEVER], ids=["tree", "pairs"])
MININGS = ("all", "hardest", "semihard", "random")

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
        # Left out: what is slow in the interpreter and of the same kind as something of this module.
        (
            "test_triplet.py",
            "triton and not tree and not 65 and not 64 and not 130 and not 129 and not dtype0 and not dtype1"
            " and not dtype3 and not seeds and not strides and not opcheck and not compiles"
            " and not (match_the_loop and 17)",
        ),
        ("test_triplet_triton.py", "test_"),
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
    """Two sizes for sm_90; benchmarks/aot_triton.py without --quick takes all."""
    pytest.importorskip("triton.backends.nvidia")
    done = run("benchmarks/aot_triton.py", "--quick", "--op", "triplet", "--jobs", "1", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("_tree_kernel", "_count_kernel", "_gradient_kernel", "_entry_gradient_kernel"):
        assert kernel in done.stdout
    assert "sm_90" in done.stdout


def test_the_rule():
    from sketchfast.kernels.triton.triplet import counting

    assert counting(1023, 1024) == "pairs"
    assert counting(1024, 1024) == "tree"
    assert counting(8192, 1024) == "tree"
    assert counting(8193, 1024) == "pairs"  # more than one program holds
    assert counting(3, 1) == "tree"


# --- counts -------------------------------------------------------------------------------------------------


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def whole_numbers(*shape, below, seed=0):
    """Few values, so that many are equal, and their sums are exact."""
    return torch.randint(0, below, shape, generator=generator(seed)).float()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def assert_counts(dist, teacher, margin, device, tree_from, indices=None):
    """Weights the reference's own integers, and the loss; the diagonals hold NaN."""
    dist, teacher = dist.to(device), teacher.to(device)
    of_batch = teacher if indices is None else teacher[indices][:, indices]
    if indices is not None:
        indices = indices.to(device)
    want = reference.ranking_weights(dist, of_batch, margin).weights
    exact = reference.ranking_loss(dist.double(), of_batch, margin)
    near = reference.ranking_loss(dist, of_batch, margin)
    op = torch.ops.sketchfast.triplet_matrix_fwd_triton
    loss, weights = op(dist, teacher, indices, margin, 0, None, tree_from)
    assert weights.dtype == torch.int32
    assert torch.equal(weights, want)
    if not math.isfinite(float(near)):
        assert str(float(loss)) == str(float(near))
    else:
        assert_within_budget(loss, near, exact, "loss")


@runs
@on_devices
@WAYS
@pytest.mark.parametrize("margin", [0.0, 1.0])
@pytest.mark.parametrize("batch", [3, 9])
def test_counts_with_ties(device, batch, tree_from, margin):
    """Equal distances, equal teacher distances, and distances equal but for the margin."""
    dist = whole_numbers(batch, batch, below=4).fill_diagonal_(math.nan)
    teacher = whole_numbers(batch, batch, below=5, seed=1).fill_diagonal_(math.nan)
    assert_counts(dist, teacher, margin, device, tree_from)
    assert_counts(dist, torch.zeros(batch, batch), margin, device, tree_from)
    assert_counts(torch.ones(batch, batch), teacher, margin, device, tree_from)


@runs
@on_devices
@WAYS
def test_counts_of_distinct_distances(device, tree_from):
    """Negative ones and both zeros among them: the core takes any metric."""
    dist = normal(19, 19)
    dist[2, 5], dist[2, 7] = -0.0, 0.0
    assert_counts(dist, normal(19, 19, seed=1), 0.3, device, tree_from)


@runs
@on_devices
@pytest.mark.parametrize(("batch", "tree_from"), [(33, 1), (65, NEVER)], ids=["tree", "pairs"])
def test_counts_past_one_block(device, batch, tree_from):
    """A row padded from 33 to 64; two blocks of columns j, three of k."""
    dist = whole_numbers(batch, batch, below=9)
    assert_counts(dist, normal(batch, batch, seed=1), 1.0, device, tree_from)


@runs
@pytest.mark.skipif(INTERPRETED, reason="a row of several lines takes the interpreter minutes")
@on_devices
@pytest.mark.parametrize("batch", [300, 1024, 2100, 8192])
def test_counts_of_long_rows(device, batch):
    """The tree against the pairs, which other tests hold to the reference."""
    dist, teacher = normal(batch, batch).abs().to(device), normal(batch, batch, seed=1).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        op = torch.ops.sketchfast.triplet_matrix_fwd_triton
        tree = op(dist, teacher.to(dtype), None, 0.1, 0, None, 1)
        pairs = op(dist, teacher.to(dtype), None, 0.1, 0, None, NEVER)
        assert torch.equal(tree[1], pairs[1])
        torch.testing.assert_close(tree[0], pairs[0])


@triton.jit
def running_kernel(x, out, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(out + place, _running(tl.load(x + place)))


@triton.jit
def questions_kernel(sequence, prefix, thresholds, scratch, out, N: tl.constexpr):
    place = tl.arange(0, N)
    found = _count_below(
        tl.load(sequence + place), tl.load(prefix + place), tl.load(thresholds + place), scratch, N
    )
    tl.store(out + place, found)


@triton.jit
def sort_kernel(key, valid, keys, values, N: tl.constexpr):
    place = tl.arange(0, N)
    _sort(tl.load(key + place), place, tl.load(valid + place) != 0, keys, values)


@runs
@on_devices
@pytest.mark.parametrize("size", [16, 128, 1024, 8192])
def test_what_the_tree_rests_on(device, size):
    """Each step alone at rows as long as they come, which the interpreter has no time to count whole."""
    order = generator(size)
    x = torch.randint(0, 2, (size,), generator=order, dtype=torch.int32).to(device)
    out = torch.full_like(x, -1)
    running_kernel[(1,)](x, out, N=size)
    assert torch.equal(out, x.cumsum(0).int())

    infinity = 0x7F800000  # as bits: no key is beyond
    key = torch.randint(-infinity, infinity, (size,), generator=order).int().to(device)
    key[::7], key[3], key[4] = 5, infinity, -infinity - 1
    valid = (torch.rand(size, generator=order) < 0.9).int().to(device)
    valid[3] = valid[4] = 1
    keys, values = torch.full_like(x, -1), torch.full_like(x, -1)
    sort_kernel[(1,)](key, valid, keys, values, N=size)
    first = torch.where(valid != 0, key.long(), 2**40).sort(stable=True)
    assert torch.equal(values, first.indices.int())

    sequence = torch.randperm(size, generator=order).int()
    prefix = torch.randint(0, size + 1, (size,), generator=order).int()
    low, high = (torch.randint(0, size, (size,), generator=order).int() for _ in range(2))
    found = [x.to(device) for x in (sequence, prefix, low + (high << 16))]
    questions_kernel[(1,)](*found, values, out, N=size)
    for i in (0, 1, size // 2, size - 1):
        head = sequence[: prefix[i]]
        assert int(out[i]) & 0xFFFF == int((head < low[i]).sum())
        assert int(out[i]) >> 16 == int((head < high[i]).sum())


@runs
@on_devices
@WAYS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_counts_by_a_teacher_of_any_dtype(device, dtype, tree_from):
    teacher = normal(11, 11, seed=1).double()
    teacher[:, 4] = teacher[:, 3] * (1 + 1e-14)  # apart in float64 alone
    teacher[0, 7], teacher[0, 8] = 0.0, -0.0
    assert_counts(normal(11, 11).abs(), teacher.to(dtype), 0.2, device, tree_from)


@runs
@on_devices
@WAYS
def test_counts_by_rows_of_a_strided_teacher(device, tree_from):
    """Rows that come twice, and a teacher that is neither contiguous nor of positive order."""
    teacher = normal(46, 69, seed=1)[::2, ::3].t()
    indices = torch.tensor([3, 22, 0, 3, 9, 9, 17, 1, 4])
    assert_counts(normal(9, 9).abs(), teacher, 0.1, device, tree_from, indices)


@runs
@on_devices
@WAYS
def test_indices_are_clamped(device, tree_from):
    dist, teacher = normal(5, 5).abs().to(device), normal(6, 6, seed=1).to(device)
    op = torch.ops.sketchfast.triplet_matrix_fwd_triton
    wrong = torch.tensor([2, -7, 4, 99, 1], device=device)
    got = op(dist, teacher, wrong, 0.1, 0, None, tree_from)
    want = op(dist, teacher, wrong.clamp(0, 5), 0.1, 0, None, tree_from)
    assert float(got[0]) == float(want[0])
    assert torch.equal(got[1], want[1])


@runs
@on_devices
@WAYS
def test_distances_that_are_not_finite(device, tree_from):
    """Infinite ones take part, and only count in the loss where a weight is on them; NaN makes it NaN."""
    dist = normal(8, 8).abs()
    dist[0, 3] = dist[1, 2] = dist[1, 4] = math.inf
    dist[2, 5] = -math.inf
    assert_counts(dist, normal(8, 8, seed=1), 0.1, device, tree_from)
    teacher = normal(8, 8, seed=1)
    teacher[0, 3] = math.inf
    lone = normal(8, 8).abs()
    lone[4, 6] = math.nan
    assert_counts(lone, teacher, 0.1, device, tree_from)
    lone[4] = math.nan
    assert_counts(lone, teacher, 0.1, device, tree_from)


@runs
@on_devices
@WAYS
def test_a_teacher_with_nan(device, tree_from):
    """R is -1 for it, as the definition has it."""
    teacher = whole_numbers(9, 9, below=5, seed=1)
    teacher[0, 2] = teacher[3, 4] = teacher[3, 7] = math.nan
    teacher[5] = math.nan
    assert_counts(whole_numbers(9, 9, below=6), teacher, 1.0, device, tree_from)


# --- samples ------------------------------------------------------------------------------------------------


@runs
@on_devices
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**62) + 12345])
def test_samples_are_those_of_the_reference(device, seed):
    batch, samples = 7, 45
    key = torch.tensor(seed, device=device)
    # Distances that all differ and a margin above them all: every triplet is active.
    dist = torch.arange(batch * batch, dtype=torch.float32, device=device).view(batch, batch)
    teacher = normal(batch, batch).to(device)
    j, k = reference.sampled_pairs(key, batch, samples)
    sign = torch.where(teacher.gather(1, j) <= teacher.gather(1, k), 1, -1).int()
    want = torch.zeros((batch, batch), dtype=torch.int32, device=device)
    want.scatter_add_(1, j, sign).scatter_add_(1, k, -sign)
    op = torch.ops.sketchfast.triplet_matrix_fwd_triton
    _, weights = op(dist, teacher, None, 100.0, samples, key, 1)
    assert torch.equal(weights, want)
    query = normal(batch, 3).to(device)
    op = torch.ops.sketchfast.triplet_sampled_fwd_triton
    _, active = op(query, query, teacher, None, 1e4, False, samples, key)
    assert torch.equal(active.int(), sign)


# --- losses and gradients -----------------------------------------------------------------------------------


def values_and_gradients(loss, query, gallery):
    query, gallery = query.clone().requires_grad_(), gallery.clone().requires_grad_()
    value = loss(query, gallery)
    return [value.detach(), *torch.autograd.grad(value, (query, gallery))]


def assert_loss(loss, query, gallery):
    """`loss(query, gallery, impl)` and its gradients."""
    got = values_and_gradients(lambda x, y: loss(x, y, "triton"), query, gallery)
    eager = values_and_gradients(lambda x, y: loss(x, y, "reference"), query, gallery)
    exact = values_and_gradients(lambda x, y: loss(x, y, "reference"), query.double(), gallery.double())
    for name, mine, near, want in zip(("loss", "to query", "to gallery"), got, eager, exact, strict=True):
        assert_within_budget(mine, near, want, name, floor=1e-7)


def embeddings(batch, dims, device):
    """With rows of the gallery that are a query's own, so that distances of 0 occur."""
    query, gallery = normal(batch, dims), normal(batch, dims, seed=1)
    gallery[0], gallery[batch - 1] = query[0], query[1]
    return query.to(device), gallery.to(device)


@runs
@on_devices
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize(("batch", "dims"), [(3, 1), (17, 19)])
def test_ranking_loss(device, batch, dims, metric):
    teacher = normal(batch, batch, seed=2).to(device)
    options = {"margin": 0.1, "metric": metric}
    query, gallery = embeddings(batch, dims, device)
    assert_loss(
        lambda x, y, impl: sf.ranking_triplet_loss(x, y, teacher, impl=impl, **options), query, gallery
    )
    options |= {"samples": 33, "seed": 5}
    assert_loss(
        lambda x, y, impl: sf.ranking_triplet_loss(x, y, teacher, impl=impl, **options), query, gallery
    )


@runs
@on_devices
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("mining", MININGS)
def test_pair_loss(device, mining, labelled):
    labels = torch.tensor([0, 1, 2, 0, 1, 3, 3, 3, 0], device=device) if labelled else None
    options = {"labels": labels, "margin": 0.7, "mining": mining, "seed": 11}
    query, gallery = embeddings(9, 5, device)
    assert_loss(lambda x, y, impl: sf.triplet_loss(x, y, impl=impl, **options), query, gallery)
    options["labels"] = torch.zeros(9, dtype=torch.int64, device=device)  # nobody has a negative
    assert_loss(lambda x, y, impl: sf.triplet_loss(x, y, impl=impl, **options), query, gallery)


@runs
@on_devices
@pytest.mark.parametrize("mining", MININGS[1:])
def test_mined_negatives_are_those_of_the_reference(device, mining):
    """Of equal distances the lowest column; infinite ones where there is nothing else."""
    query, gallery = (whole_numbers(12, 1, below=4, seed=seed).to(device) for seed in (0, 1))
    query[3] = gallery[5] = math.inf
    labels = whole_numbers(12, below=3, seed=2).long().to(device)
    seed = torch.tensor(7, device=device)
    dist = reference.distances(query, gallery, False)
    chosen = reference.chosen_negatives(dist, labels, 2.0, mining, seed)
    own, other = dist.diagonal(), dist.gather(1, chosen.clamp(min=0)[:, None])[:, 0]
    want = torch.where((chosen >= 0) & (own + 2.0 > other), chosen, -1)
    op = torch.ops.sketchfast.triplet_pairs_fwd_triton
    _, state, considered = op(query, gallery, labels, 2.0, False, mining, seed)
    assert state.tolist() == want.tolist()
    assert int(considered) == int((chosen >= 0).sum())


@runs
@on_devices
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_too_few_rows(device, batch):
    query, gallery = normal(batch, 4).to(device), normal(batch, 4, seed=1).to(device)
    teacher = torch.zeros(batch, batch, device=device)
    for options in ({}, {"samples": 3, "seed": 1}):
        results = values_and_gradients(
            lambda x, y, o=options: sf.ranking_triplet_loss(x, y, teacher, impl="triton", **o), query, gallery
        )
        for result in results:
            assert (result == 0).all()
    for mining in MININGS:
        assert_loss(
            lambda x, y, impl, m=mining: sf.triplet_loss(x, y, mining=m, seed=1, impl=impl), query, gallery
        )


# --- determinism, memory ------------------------------------------------------------------------------------


@runs
@on_devices
@WAYS
def test_repeats_its_bits_and_writes_everything(device, tree_from, monkeypatch):
    query, gallery = embeddings(11, 6, device)
    teacher = whole_numbers(11, 11, below=5).to(device)
    scale, seed = torch.tensor(0.5, device=device), torch.tensor(3, device=device)
    op = torch.ops.sketchfast

    def everything():
        loss, weights = op.triplet_ranking_fwd_triton(query, gallery, teacher, None, 0.1, False, tree_from)
        results = [loss, weights, *op.triplet_embedding_bwd_triton(scale, weights, query, gallery, False)]
        loss, active = op.triplet_sampled_fwd_triton(query, gallery, teacher, None, 0.1, False, 20, seed)
        results += [loss, active]
        results += op.triplet_sampled_bwd_triton(scale, active, seed, query, gallery, False)
        results += op.triplet_matrix_fwd_triton(query @ gallery.t(), teacher, None, 0.1, 9, seed, tree_from)
        for mining in MININGS:
            results += op.triplet_pairs_fwd_triton(query, gallery, None, 0.1, False, mining, seed)
        results += op.triplet_chosen_bwd_triton(scale, results[-2], query, gallery, False)
        return results

    torch.use_deterministic_algorithms(True)  # fills what is not written with NaN or the largest integer
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        first, again = everything(), everything()
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two in zip(first, again, strict=True):
        assert_same_bits(one.reshape(-1), two.reshape(-1))
        assert not torch.isnan(one.double()).any()
        if not one.is_floating_point():
            assert (one != torch.iinfo(one.dtype).max).all()
