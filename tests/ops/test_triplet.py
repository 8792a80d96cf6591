"""The triplet losses on every impl, against the B x B x B loop and the float64 reference.

In a process of its own (test_triplet_triton.py starts one) TRITON_INTERPRET=1 adds Triton to the table.
"""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sketchfast as sf
from sketchfast.kernels.reference import triplet as reference
from sketchfast.ops import triplet as ops_triplet
from sketchfast.testing import (
    assert_same_bits,
    assert_within_budget,
    available_impls,
    devices,
    opcheck,
)

CASES = [(device, impl) for device in devices() for impl in available_impls(device)]
KERNELS = [case for case in CASES if case[1] != "reference"]
impls = pytest.mark.parametrize(("device", "impl"), CASES)
kernels = pytest.mark.parametrize(("device", "impl"), KERNELS)

SHAPES = [(0, 4), (1, 3), (2, 3), (3, 5), (5, 1), (17, 7), (65, 33), (130, 20)]  # batch, dimensions
SMALL = [(0, 4), (1, 3), (2, 3), (3, 5), (5, 1), (17, 7)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MARGINS = [0.0, 0.01, 0.3]
NAN, INFINITY = math.nan, math.inf
FACTOR = {"euclidean": 1.0, "sqeuclidean": 2.0, "cosine": 0.1}  # what margins suit the metric


def skip_float64_on_gpu_impls(device, impl, dtype):
    if dtype == torch.float64 and (impl == "triton" or (impl == "native" and device == "cuda")):
        pytest.skip("float64 is for the reference and native on CPU")


@pytest.fixture(params=["pairs", "tree"])
def counting(request, monkeypatch):
    """All triplets counted pair by pair, and by the tree, whatever the batch."""
    start = 0 if request.param == "tree" else 2**31
    for key in ops_triplet.TREE_FROM:
        monkeypatch.setitem(ops_triplet.TREE_FROM, key, start)
    return request.param


def batch_of(batch, dimensions, dtype=torch.float32, device="cpu", seed=0, duplicates=False):
    """(query, gallery, teacher); the teacher has ties, and with duplicates some distances are 0."""
    generator = torch.Generator().manual_seed(seed)
    query, gallery = (torch.randn(batch, dimensions, generator=generator) for _ in range(2))
    teacher = torch.rand(batch, batch, generator=generator)
    teacher[::2] = (teacher[::2] * 6).floor()  # ties in every other row
    if duplicates and batch >= 3:
        query[1] = gallery[2]
        query[2] = gallery[2]
        gallery[batch - 1] = gallery[0]
    return query.to(device, dtype), gallery.to(device, dtype), teacher.to(device)


def gradients(function, *inputs):
    """(function of the inputs, its gradients to them)."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value * 3.0, leaves)


def compare(run, impl, *inputs, what="", floor=0.0):
    """Value and gradients of run(impl, *inputs) within the budget of eager PyTorch at that dtype; of the
    value `floor` more, where it is a difference of far larger numbers."""
    got, eager = (gradients(lambda *x, i=i: run(i, *x), *inputs) for i in (impl, "reference"))
    exact = gradients(lambda *x: run("reference", *x), *(x.double() for x in inputs))
    assert got[0].dtype == (torch.float64 if inputs[0].dtype == torch.float64 else torch.float32)
    assert_within_budget(got[0], eager[0], exact[0], f"{what} loss", floor=floor)
    for name, *three in zip(("first", "second"), got[1], eager[1], exact[1], strict=False):
        assert three[0].dtype == inputs[0].dtype
        assert_within_budget(*three, f"{what} gradient to the {name} argument")


# --- literal definitions ------------------------------------------------------------------------------------


def cube_loop(dist, teacher, margin):
    """(mean over all triplets, its gradient to dist, written as the definition is)."""
    batch = len(dist)
    grad = torch.zeros(batch, batch, dtype=torch.float64)
    total, count = 0.0, 0
    for i, j, k in itertools.product(range(batch), repeat=3):
        if len({i, j, k}) < 3:
            continue
        order = 1 if teacher[i][j] <= teacher[i][k] else -1
        term = margin + order * (float(dist[i][j]) - float(dist[i][k]))
        count += 1
        if term > 0:
            total += term
            grad[i, j] += order
            grad[i, k] -= order
    return total / max(count, 1), grad / max(count, 1)


@impls
@pytest.mark.parametrize("margin", [0.0, 0.25, 2.0])
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4, 9])
def test_all_triplets_match_the_loop(device, impl, batch, margin, counting):
    """Distances in eighths are exact in float32: every kink and every tie is one."""
    generator = torch.Generator().manual_seed(batch)
    dist = torch.randint(0, 24, (batch, batch), generator=generator) / 8
    for teacher in (
        torch.randint(0, 3, (batch, batch), generator=generator).float(),
        torch.rand(batch, batch, generator=generator),
        torch.zeros(batch, batch),
    ):
        value, grad = cube_loop(dist.tolist(), teacher.tolist(), margin)
        got, (to_dist,) = gradients(
            lambda d, t=teacher: sf.ranking_triplet_loss_from_distances(
                d, t.to(device), margin=margin, impl=impl
            ),
            dist.to(device),
        )
        assert float(got) == pytest.approx(value, rel=1e-6, abs=1e-12)
        torch.testing.assert_close(to_dist.double().cpu(), 3 * grad, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("device", "impl"), [c for c in CASES if c[1] != "triton"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_small_matrix_matches_the_loop(device, impl, data):
    batch = data.draw(st.integers(3, 6))
    numbers = st.lists(st.integers(0, 5), min_size=batch**2, max_size=batch**2)
    dist, teacher = (torch.tensor(data.draw(numbers)).view(batch, batch) / 4 for _ in range(2))
    margin = data.draw(st.sampled_from([0.0, 0.25, 0.5]))
    value, grad = cube_loop(dist.tolist(), teacher.tolist(), margin)
    for start in (0, 2**31):
        before = dict(ops_triplet.TREE_FROM)
        try:
            ops_triplet.TREE_FROM.update(dict.fromkeys(before, start))
            got, (to_dist,) = gradients(
                lambda d: sf.ranking_triplet_loss_from_distances(
                    d, teacher.to(device), margin=margin, impl=impl
                ),
                dist.to(device),
            )
        finally:
            ops_triplet.TREE_FROM.update(before)
        assert float(got) == pytest.approx(value, rel=1e-6, abs=1e-12)
        torch.testing.assert_close(to_dist.double().cpu(), 3 * grad, rtol=1e-6, atol=1e-12)


def pairs_loop(dist, labels, margin, mining):
    """(mean, the negatives considered, anchor by anchor); all minings but the random one."""
    batch = len(dist)
    total, considered = 0.0, []
    for i in range(batch):
        own = float(dist[i][i])
        columns = [k for k in range(batch) if (k != i if labels is None else labels[k] != labels[i])]
        if mining == "semihard":
            columns = [k for k in columns if own < float(dist[i][k]) < own + margin]
        if mining != "all" and columns:
            columns = [min(columns, key=lambda k: (float(dist[i][k]), k))]
        considered.append(columns)
        total += sum(max(margin + own - float(dist[i][k]), 0.0) for k in columns)
    return total / max(sum(map(len, considered)), 1), considered


@impls
@pytest.mark.parametrize("mining", ["all", "hardest", "semihard"])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_pairs_match_the_loop(device, impl, shape, mining):
    for margin, labelled, duplicates in itertools.product([0.0, 0.5, 4.0], [False, True], [False, True]):
        query, gallery, _ = batch_of(*shape, device=device, duplicates=duplicates)
        labels = torch.arange(shape[0], device=device) // 3 * 5 - 7 if labelled else None
        dist = torch.cdist(query.double(), gallery.double()).tolist()
        value, _ = pairs_loop(dist, None if labels is None else labels.tolist(), margin, mining)
        got = sf.triplet_loss(query, gallery, labels=labels, margin=margin, mining=mining, impl=impl)
        assert float(got) == pytest.approx(value, rel=1e-5, abs=1e-6)


# --- the kernels against the reference ----------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("metric", ops_triplet.METRICS)
def test_ranking_loss_matches_reference(device, impl, dtype, shape, metric, counting):
    skip_float64_on_gpu_impls(device, impl, dtype)
    query, gallery, teacher = batch_of(*shape, dtype, device, duplicates=True)
    margin = 0.3 * FACTOR[metric]

    def run(impl, q, g):
        return sf.ranking_triplet_loss(q, g, teacher, margin=margin, metric=metric, impl=impl)

    compare(run, impl, query, gallery)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ranking_loss_of_distances_matches_reference(device, impl, dtype, shape, counting):
    skip_float64_on_gpu_impls(device, impl, dtype)
    _, _, teacher = batch_of(*shape, device=device)
    dist = torch.rand(teacher.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    for margin in MARGINS:

        def run(impl, d, margin=margin):
            return sf.ranking_triplet_loss_from_distances(d, teacher, margin=margin, impl=impl)

        compare(run, impl, dist)


@kernels
@pytest.mark.parametrize("tied", ["no ties", "some ties", "all tied"])
@pytest.mark.parametrize("batch", [3, 31, 64, 129])
def test_weights_match_the_reference_exactly(device, impl, batch, tied, counting):
    """In float32 there is one right answer, whatever the order of the sums."""
    generator = torch.Generator().manual_seed(batch)
    dist = torch.rand(batch, batch, generator=generator)
    teacher = torch.rand(batch, batch, generator=generator)
    if tied != "no ties":
        teacher = (teacher * (7 if tied == "some ties" else 1)).floor()
        dist = (dist * 16).floor() / 16
    for margin in (0.0, 0.0625, 0.01):
        want = reference.ranking_weights(dist, teacher, margin).weights
        op = getattr(torch.ops.sketchfast, f"triplet_matrix_fwd_{impl}")
        start = 0 if counting == "tree" else 2**31
        _, got = op(dist.to(device), teacher.to(device), None, margin, 0, None, start)
        assert torch.equal(got.cpu(), want)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("metric", ops_triplet.METRICS)
def test_sampled_loss_matches_reference(device, impl, dtype, shape, metric):
    skip_float64_on_gpu_impls(device, impl, dtype)
    query, gallery, teacher = batch_of(*shape, dtype, device, duplicates=True)

    def run(impl, q, g):
        return sf.ranking_triplet_loss(
            q, g, teacher, margin=0.3 * FACTOR[metric], samples=11, seed=-3, metric=metric, impl=impl
        )

    compare(run, impl, query, gallery)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mining", ops_triplet.MININGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pair_loss_matches_reference(device, impl, dtype, shape, mining):
    skip_float64_on_gpu_impls(device, impl, dtype)
    query, gallery, _ = batch_of(*shape, dtype, device)  # float16 duplicates would tie differently
    labels = torch.arange(shape[0], device=device) % 4
    for metric, classes in itertools.product(ops_triplet.METRICS, (None, labels)):

        def run(impl, q, g, metric=metric, classes=classes):
            margin = 0.7 * FACTOR[metric]
            return sf.triplet_loss(
                q, g, labels=classes, margin=margin, mining=mining, seed=5, metric=metric, impl=impl
            )

        # Few semi-hard terms, each a small difference of distances: half a unit in the last place of those.
        few = mining == "semihard" and metric == "sqeuclidean" and shape[0] > 0
        floor = 2.0**-24 * float(torch.cdist(query.float(), gallery.float()).max()) ** 2 if few else 0.0
        compare(run, impl, query, gallery, what=metric, floor=floor)


@impls
def test_gradcheck_in_float64(device, impl):
    skip_float64_on_gpu_impls(device, impl, torch.float64)
    query, gallery, teacher = batch_of(6, 3, torch.float64, device)
    query, gallery = query.requires_grad_(), gallery.requires_grad_()
    for metric in ops_triplet.METRICS:
        for samples in (None, 4):
            torch.autograd.gradcheck(
                lambda q, g, metric=metric, samples=samples: sf.ranking_triplet_loss(
                    q, g, teacher, margin=0.2, samples=samples, seed=1, metric=metric, impl=impl
                ),
                (query, gallery),
            )
        for mining in ops_triplet.MININGS:
            torch.autograd.gradcheck(
                lambda q, g, metric=metric, mining=mining: sf.triplet_loss(
                    q, g, mining=mining, seed=1, metric=metric, impl=impl
                ),
                (query, gallery),
            )


# --- sampling -----------------------------------------------------------------------------------------------


def test_philox_gives_the_published_numbers():
    """Random123's known answers for philox4x32-10: all zeros, and all ones."""
    zero, ones = torch.tensor(0), torch.tensor(2**32 - 1)
    assert [int(x) for x in reference.philox(zero, zero, zero)] == [0x6627E8D5, 0xE169C58D]
    # The published case of all ones has counter words 2 and 3 set too, which no triplet has: by hand then.
    assert [int(x) for x in reference.philox(torch.tensor(-1), ones, ones)] == philox_by_hand(
        2**64 - 1, 2**32 - 1, 2**32 - 1
    )


def philox_by_hand(seed, first, second):
    counter, key = [first, second, 0, 0], [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [b >> 32 ^ counter[1] ^ key[0], b % 2**32, a >> 32 ^ counter[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter[:2]


@impls
def test_samples_are_those_of_the_definition(device, impl):
    """The weights tell which triplets were drawn: an infinite margin makes every one active."""
    batch, samples, seed = 7, 5, 12345678901234567890
    teacher = torch.rand(batch, batch, generator=torch.Generator().manual_seed(0))
    want = torch.zeros(batch, batch)
    for i, s in itertools.product(range(batch), range(samples)):
        r0, r1 = philox_by_hand(seed, i, s)
        j = (r0 * (batch - 1)) >> 32
        j = [n for n in range(batch) if n != i][j]
        k = [n for n in range(batch) if n not in (i, j)][(r1 * (batch - 2)) >> 32]
        order = 1 if teacher[i, j] <= teacher[i, k] else -1
        want[i, j] += order
        want[i, k] -= order
    dist = torch.rand(batch, batch, generator=torch.Generator().manual_seed(1)).to(device)
    _, (grad,) = gradients(
        lambda d: sf.ranking_triplet_loss_from_distances(
            d, teacher.to(device), margin=100.0, samples=samples, seed=seed, impl=impl
        ),
        dist,
    )
    torch.testing.assert_close(grad.cpu(), want * 3 / (batch * samples))


@impls
def test_random_negatives_are_those_of_the_definition(device, impl):
    batch, seed = 9, 77
    query, gallery, _ = batch_of(batch, 3, device=device)
    labels = [0, 1, 0, 2, 2, 1, 0, 3, 3]
    dist = torch.cdist(query.double(), gallery.double())
    for classes in (None, labels):
        terms = []
        for i in range(batch):
            columns = [k for k in range(batch) if (k != i if classes is None else classes[k] != classes[i])]
            k = columns[(philox_by_hand(seed, i, 0)[0] * len(columns)) >> 32]
            terms.append(max(1.0 + float(dist[i, i] - dist[i, k]), 0.0))
        got = sf.triplet_loss(
            query,
            gallery,
            labels=None if classes is None else torch.tensor(classes, device=device),
            margin=1.0,
            mining="random",
            seed=seed,
            impl=impl,
        )
        assert float(got) == pytest.approx(sum(terms) / batch, rel=1e-5)


@impls
def test_seeds(device, impl):
    """An int, a tensor, the same number modulo 2^64 draw alike; None draws from torch's generator."""
    query, gallery, teacher = batch_of(40, 3, device=device)

    def loss(seed):
        return sf.ranking_triplet_loss(query, gallery, teacher, samples=2, seed=seed, impl=impl)

    assert_same_bits(loss(-5), loss(torch.tensor(-5, device=device)))
    assert_same_bits(loss(-5), loss(torch.tensor([-5], device=device)))
    assert_same_bits(loss(-5), loss(2**64 - 5))
    assert not torch.equal(loss(1), loss(2))
    torch.manual_seed(0)
    first, second = loss(None), loss(None)
    torch.manual_seed(0)
    assert_same_bits(loss(None), first)
    assert not torch.equal(first, second)


# --- the teacher --------------------------------------------------------------------------------------------


@impls
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [None, 6])
def test_teacher_of_the_whole_data_set(device, impl, dtype, samples, counting):
    """Rows by index of a large teacher, of any dtype and strides, with a row that comes twice."""
    batch, rows = 12, 40
    query, gallery, _ = batch_of(batch, 3, device=device)
    whole = torch.rand(rows, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = (whole * 8).floor().to(device, dtype)
    wide = torch.full((rows, 2 * rows), NAN, dtype=dtype, device=device)
    wide[:, ::2] = whole
    generator = torch.Generator().manual_seed(2)
    indices = torch.randint(0, rows, (batch,), generator=generator).to(device)
    indices[3] = indices[5]
    want = sf.ranking_triplet_loss(
        query, gallery, whole[indices][:, indices], samples=samples, seed=1, impl=impl
    )
    for teacher in (whole, wide[:, ::2], whole.T.contiguous().T):
        for kind in (torch.int64, torch.int32):
            got = sf.ranking_triplet_loss(
                query, gallery, teacher, indices=indices.to(kind), samples=samples, seed=1, impl=impl
            )
            assert_same_bits(got, want)


@impls
def test_teacher_in_float64_is_compared_in_float64(device, impl, counting):
    """What float32 would hold for a tie is none, and the other way round."""
    query, gallery, _ = batch_of(9, 3, device=device)
    ranks = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i)) for i in range(9)])
    close = 1 + ranks.to(device).double() * 1e-12
    got = sf.ranking_triplet_loss(query, gallery, close, margin=0.1, impl=impl)
    assert_same_bits(
        got, sf.ranking_triplet_loss(query, gallery, ranks.to(device).float(), margin=0.1, impl=impl)
    )
    tied = sf.ranking_triplet_loss(query, gallery, close.float(), margin=0.1, impl=impl)
    assert abs(float(got - tied)) > 1e-3


# --- edges --------------------------------------------------------------------------------------------------


@impls
def test_equal_embeddings_have_finite_gradients(device, impl, counting):
    """A distance of 0 has gradient 0; with all of them equal every triplet is active and nothing moves."""
    query = torch.ones(5, 3, device=device)
    for metric in ops_triplet.METRICS:
        value, grads = gradients(
            lambda q, g, metric=metric: sf.ranking_triplet_loss(
                q, g, torch.rand(5, 5, device=device), margin=0.25, metric=metric, impl=impl
            ),
            query,
            query,
        )
        assert float(value) == pytest.approx(0.25)
        assert all(float(grad.abs().max()) < 1e-6 for grad in grads)
    value, grads = gradients(lambda q, g: sf.triplet_loss(q, g, margin=0.25, impl=impl), query, query)
    assert float(value) == pytest.approx(0.25)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@impls
def test_zero_vectors_under_the_cosine(device, impl):
    """The cosine to a zero vector counts as 0, its gradient too."""
    query, gallery, teacher = batch_of(6, 4, device=device)
    query[1], gallery[4] = 0, 0
    dist = 1 - torch.nn.functional.cosine_similarity(query[:, None], gallery[None], dim=-1)
    want = sf.ranking_triplet_loss_from_distances(dist, teacher, margin=0.1, impl=impl)
    got, grads = gradients(
        lambda q, g: sf.ranking_triplet_loss(q, g, teacher, margin=0.1, metric="cosine", impl=impl),
        query,
        gallery,
    )
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    assert torch.equal(grads[0][1], torch.zeros(4, device=device))
    assert torch.equal(grads[1][4], torch.zeros(4, device=device))


@impls
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_strange_lengths_under_the_cosine(device, impl, scale):
    query, gallery, teacher = batch_of(6, 4, device=device)
    want = sf.ranking_triplet_loss(query, gallery, teacher, metric="cosine", impl=impl)
    got = sf.ranking_triplet_loss(query * scale, gallery / scale, teacher, metric="cosine", impl=impl)
    torch.testing.assert_close(got, want)


@impls
def test_strange_distances(device, impl, counting):
    """Diagonals are not looked at, idle infinities count nothing, NaN is not swallowed."""
    generator = torch.Generator().manual_seed(0)
    dist, teacher = (torch.rand(7, 7, generator=generator).to(device) for _ in range(2))

    def loss(dist, teacher, **more):
        return gradients(
            lambda d: sf.ranking_triplet_loss_from_distances(d, teacher, impl=impl, **more), dist
        )

    def with_diagonal(matrix, value):
        return matrix.clone().fill_diagonal_(value)

    for more in ({}, {"samples": 4, "seed": 0}):
        want = loss(dist, teacher, **more)
        for value in (NAN, INFINITY, -INFINITY, 1e30):
            got = loss(with_diagonal(dist, value), with_diagonal(teacher, value), **more)
            assert_same_bits(got[0], want[0])
            assert_same_bits(got[1][0], want[1][0])
    broken = dist.clone()
    broken[2, 3] = NAN
    assert torch.isnan(loss(broken, teacher)[0])
    got, (grad,) = loss(torch.full((2, 2), NAN, device=device), teacher[:2, :2])
    assert float(got) == 0  # no triplets, nothing looked at
    assert torch.equal(grad, torch.zeros_like(grad))
    far, order = torch.ones(3, 3, device=device), torch.zeros(3, 3, device=device)
    far[0, 2], order[0, 2] = INFINITY, 1.0  # 2 is to be the further: it is, by any margin
    got, (grad,) = loss(far, order)
    assert float(got) == pytest.approx(0.01 * 4 / 6)
    assert torch.isfinite(grad).all()


@impls
@pytest.mark.parametrize("dtype", DTYPES)
def test_strange_teachers_match_the_loop(device, impl, dtype, counting):
    """-0 ties with 0, infinite ones with their like; R is -1 for NaN, either way round."""
    generator = torch.Generator().manual_seed(0)
    dist = torch.randint(0, 24, (9, 9), generator=generator) / 8
    choices = torch.tensor([0.0, -0.0, 1.0, -1.0, INFINITY, -INFINITY, NAN], dtype=dtype)
    teacher = choices[torch.randint(0, 7, (9, 9), generator=generator)]
    teacher[::2] = choices[torch.randint(0, 6, (5, 9), generator=generator)]  # rows without NaN
    teacher[1] = NAN
    value, grad = cube_loop(dist.tolist(), teacher.tolist(), 0.25)
    got, (to_dist,) = gradients(
        lambda d: sf.ranking_triplet_loss_from_distances(d, teacher.to(device), margin=0.25, impl=impl),
        dist.to(device),
    )
    assert float(got) == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(to_dist.double().cpu(), 3 * grad, rtol=1e-6, atol=1e-12)


@impls
def test_kinks_of_squared_distances(device, impl, counting):
    """Whole numbers have exact squares, and no root of 2 or 3 must have been in between: at a kink nothing
    is active."""
    generator = torch.Generator().manual_seed(0)
    query, gallery, teacher = (
        torch.randint(0, 3, shape, generator=generator).float() for shape in ((9, 3), (9, 3), (9, 9))
    )
    dist = (query[:, None] - gallery).square().sum(-1)
    value, weights = cube_loop(dist.tolist(), teacher.tolist(), 1.0)
    pulls = 2 * weights[:, :, None] * (query[:, None] - gallery).double()
    got, grads = gradients(
        lambda q, g: sf.ranking_triplet_loss(
            q, g, teacher.to(device), margin=1.0, metric="sqeuclidean", impl=impl
        ),
        query.to(device),
        gallery.to(device),
    )
    assert float(got) == pytest.approx(value, rel=1e-6)
    for grad, want in zip(grads, (pulls.sum(1), -pulls.sum(0)), strict=True):
        torch.testing.assert_close(grad.double().cpu(), 3 * want, rtol=1e-5, atol=1e-6)


@impls
def test_far_off_the_origin(device, impl):
    """Differences, not products: at 1e4 from the origin an expanded form would have no digit right."""
    query, gallery, teacher = batch_of(20, 16, device=device)
    query, gallery = query * 0.01 + 1e4, gallery * 0.01 + 1e4
    compare(lambda i, q, g: sf.ranking_triplet_loss(q, g, teacher, impl=i), impl, query, gallery)
    compare(lambda i, q, g: sf.triplet_loss(q, g, impl=i), impl, query, gallery)


# --- contract -----------------------------------------------------------------------------------------------


def calls(teacher, impl):
    """Every public function on (query, gallery)."""
    return {
        "all": lambda q, g: sf.ranking_triplet_loss(q, g, teacher, impl=impl),
        "sampled": lambda q, g: sf.ranking_triplet_loss(q, g, teacher, samples=5, seed=1, impl=impl),
        "distances": lambda q, g: sf.ranking_triplet_loss_from_distances(
            (q.contiguous()[:, None] - g).norm(dim=2), teacher, impl=impl
        ),
        **{
            mining: lambda q, g, mining=mining: sf.triplet_loss(q, g, mining=mining, seed=1, impl=impl)
            for mining in ops_triplet.MININGS
        },
    }


@impls
def test_same_bits_again_and_with_strides(device, impl, counting):
    query, gallery, teacher = batch_of(65, 33, device=device)
    wide = torch.full((65, 66), NAN, device=device)
    wide[:, ::2] = query
    for name, call in calls(teacher, impl).items():
        first = gradients(call, query, gallery)
        for again in (
            gradients(call, query, gallery),
            gradients(lambda q, g, call=call: call(q[:, ::2], g), wide, gallery),
            gradients(lambda q, g, call=call: call(q.T, g), query.T.contiguous(), gallery),
        ):
            assert_same_bits(again[0], first[0], name)
            assert_same_bits(again[1][1], first[1][1], name)


@pytest.mark.parametrize(("device", "impl"), [c for c in KERNELS if c == ("cpu", "native")])
def test_threads_do_not_change_what_is_counted(device, impl):
    """The loss is the same bits on any number of threads; gradients are for each number of them."""
    query, gallery, teacher = batch_of(300, 40)
    found = {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for name, call in calls(teacher, impl).items():
                runs = [gradients(call, query, gallery) for _ in range(3)]
                for run in runs[1:]:
                    for x, y in zip((run[0], *run[1]), (runs[0][0], *runs[0][1]), strict=True):
                        assert_same_bits(x, y, name)
                found.setdefault(name, []).append(runs[0])
    finally:
        torch.set_num_threads(1)
    for name, runs in found.items():
        for run in runs[1:]:
            assert_same_bits(run[0], runs[0][0], name)
            torch.testing.assert_close(run[1], runs[0][1])


@impls
def test_second_backward_raises(device, impl):
    query, gallery, teacher = batch_of(6, 3, device=device)
    query.requires_grad_()
    for call in calls(teacher, impl).values():
        (grad,) = torch.autograd.grad(call(query, gallery), query, create_graph=True)
        with pytest.raises(RuntimeError, match="once differentiable"):
            grad.square().sum().backward()


@impls
def test_gradient_of_one_argument_alone(device, impl):
    query, gallery, teacher = batch_of(6, 3, device=device)
    for call in calls(teacher, impl).values():
        _, both = gradients(call, query, gallery)
        _, (alone,) = gradients(lambda g, call=call: call(query, g), gallery)
        assert_same_bits(alone, both[1])
        assert not call(query, gallery).requires_grad


@impls
def test_no_gradient_to_the_teacher(device, impl):
    query, gallery, teacher = batch_of(6, 3, device=device)
    teacher.requires_grad_()
    assert not sf.ranking_triplet_loss(query, gallery, teacher, impl=impl).requires_grad


@impls
def test_autocast_computes_in_float32(device, impl):
    query, gallery, teacher = batch_of(17, 7, device=device)
    for name, call in calls(teacher, impl).items():
        if name == "distances":
            continue  # its distances are torch's
        with torch.autocast(device, dtype=torch.bfloat16):
            got = call(query, gallery)
        assert_same_bits(got, call(query, gallery), name)


@kernels
def test_opcheck(device, impl):
    query, gallery, teacher = batch_of(9, 5, device=device)
    query, gallery = query.requires_grad_(), gallery.requires_grad_()
    indices, seed = torch.arange(9, device=device), torch.tensor(3, device=device)
    labels, dist = indices % 3, torch.rand(9, 9, device=device, requires_grad=True)

    def check(name, *args):
        opcheck(getattr(torch.ops.sketchfast, f"{name}_{impl}"), args)

    for start in (0, 100):
        check("triplet_ranking_fwd", query, gallery, teacher, indices, 0.1, False, start)
        check("triplet_matrix_fwd", dist, teacher, None, 0.1, 0, None, start)
    check("triplet_matrix_fwd", dist, teacher, indices, 0.1, 4, seed, 100)
    check("triplet_sampled_fwd", query, gallery, teacher, None, 0.1, True, 4, seed)
    for mining in ops_triplet.MININGS:
        check("triplet_pairs_fwd", query, gallery, labels, 0.1, False, mining, seed)
    query, gallery, scale = query.detach(), gallery.detach(), torch.ones((), device=device)
    weights = torch.ones(9, 9, dtype=torch.int32, device=device)
    check("triplet_embedding_bwd", scale, weights, query, gallery, False)
    check("triplet_chosen_bwd", scale, weights[0].contiguous(), query, gallery, False)
    active = torch.ones(9, 4, dtype=torch.int8, device=device)
    check("triplet_sampled_bwd", scale, active, seed, query, gallery, False)


@pytest.mark.parametrize(("device", "impl"), [c for c in CASES if c[1] != "triton"])
def test_compiles_whole(device, impl):
    """fullgraph, of several batches: forward and backward as without the compiler."""
    for name in calls(None, impl):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda q, g, t, name=name: calls(t, impl)[name](q, g), fullgraph=True, backend="aot_eager"
        )
        for batch in (5, 9, 12):
            query, gallery, teacher = batch_of(batch, 4, device=device)
            got = gradients(lambda q, g, t=teacher, c=compiled: c(q, g, t), query, gallery)
            want = gradients(calls(teacher, impl)[name], query, gallery)
            torch.testing.assert_close(got, want)


@impls
def test_compiles_with_indices_and_without_a_seed(device, impl):
    if impl == "triton":
        pytest.skip("the interpreter does not compile")
    torch._dynamo.reset()
    query, gallery, teacher = batch_of(8, 4, device=device)
    indices = torch.randperm(8, device=device)
    call = torch.compile(
        lambda q, g, i: sf.ranking_triplet_loss(q, g, teacher, indices=i, samples=3, impl=impl),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.isfinite(call(query, gallery, indices))


GROWTH = """
import sys
from pathlib import Path
import torch, sketchfast as sf

def megabytes(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) // 1024

torch.set_num_threads(1)
batch, rows, samples = (int(x) for x in sys.argv[1:])
torch.manual_seed(0)
query, gallery = (torch.randn(batch, 32, requires_grad=True) for _ in range(2))
teacher = torch.rand(rows, rows)
indices = torch.randperm(rows)[:batch]
def run(n):
    loss = sf.ranking_triplet_loss(query[:n], gallery[:n], teacher, indices=indices[:n],
                                   samples=samples or None, seed=0, impl="native")
    loss.backward()
run(4)
Path("/proc/self/clear_refs").write_text("5")
before = megabytes("VmRSS")
run(batch)
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.skipif("native" not in available_impls("cpu"), reason="the CPU library was not built")
@pytest.mark.parametrize(
    ("batch", "rows", "samples", "most"),
    [
        (4096, 4096, 0, 100),  # the weights are 64 MB; the cube of bool would be 64 GB
        (2048, 9000, 0, 60),  # the teacher is 309 MB, and is not copied
        (4096, 4096, 10, 25),  # samples keep nothing of B x B
    ],
)
def test_memory(tmp_path, batch, rows, samples, most):
    """What forward and backward add to a process at their peak, in MB."""
    command = [sys.executable, "-c", GROWTH, str(batch), str(rows), str(samples)]
    # From a folder that holds no sketchfast: the installed one is tested.
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < most


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("impl", [impl for device, impl in KERNELS if device == "cuda"])
def test_memory_on_a_gpu(impl):
    """At B = 8192 under 2 GiB, forward and backward."""
    query, gallery = (torch.randn(8192, 128, device="cuda", requires_grad=True) for _ in range(2))
    teacher = torch.rand(8192, 8192, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sf.ranking_triplet_loss(query, gallery, teacher, impl=impl).backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * 2**30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("impl", [impl for device, impl in KERNELS if device == "cuda"])
def test_cuda_graph_draws_anew(impl):
    """A captured loss replays; with seed None each replay draws other triplets."""
    query, gallery, teacher = batch_of(64, 16, device="cuda")

    def call():
        return sf.ranking_triplet_loss(query, gallery, teacher, samples=3, impl=impl)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = call()
    seen = set()
    for _ in range(4):
        graph.replay()
        seen.add(float(loss))
    assert len(seen) > 1


# --- errors -------------------------------------------------------------------------------------------------

Q, T = torch.ones(4, 3), torch.ones(4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sf.ranking_triplet_loss([1.0], Q, T), TypeError, "query must be a tensor, got"),
        (lambda: sf.ranking_triplet_loss(Q.long(), Q, T), TypeError, "query must be .* got a int64"),
        (lambda: sf.ranking_triplet_loss(Q[0], Q, T), ValueError, r"query must have shape \[B, D\]"),
        (lambda: sf.ranking_triplet_loss(Q[:, :0], Q[:, :0], T), ValueError, "query must have at least one"),
        (lambda: sf.ranking_triplet_loss(Q, Q[:3], T), ValueError, r"gallery must have shape \[4, 3\]"),
        (
            lambda: sf.ranking_triplet_loss(Q, Q.double(), T),
            TypeError,
            "gallery must be of the dtype of query",
        ),
        (lambda: sf.ranking_triplet_loss(Q, Q, T[:3]), ValueError, r"teacher must have shape \[4, 4\]"),
        (lambda: sf.ranking_triplet_loss(Q, Q, T.long()), TypeError, "teacher must be a tensor of dtype"),
        (
            lambda: sf.ranking_triplet_loss(Q, Q, torch.ones(5, 6), indices=torch.arange(4)),
            ValueError,
            "teacher must be square",
        ),
        (
            lambda: sf.ranking_triplet_loss(Q, Q, T, indices=torch.arange(3)),
            ValueError,
            r"indices must have shape \[4\]",
        ),
        (
            lambda: sf.ranking_triplet_loss(Q, Q, T, indices=torch.ones(4)),
            TypeError,
            "indices must be a tensor of dtype",
        ),
        (
            lambda: sf.ranking_triplet_loss(Q, Q, T, indices=torch.tensor([0, 1, 4, 2])),
            ValueError,
            r"indices must be in \[0, 4\), got 4 at index \(2,\)",
        ),
        (
            lambda: sf.ranking_triplet_loss(Q, Q, T, indices=torch.tensor([0, -1, 3, 2]), check_values=True),
            ValueError,
            r"indices must be in \[0, 4\), got -1 at index \(1,\)",
        ),
        (lambda: sf.ranking_triplet_loss(Q, Q, T, margin=-0.1), ValueError, "margin must be at least 0"),
        (lambda: sf.ranking_triplet_loss(Q, Q, T, margin=NAN), ValueError, "margin must be finite"),
        (lambda: sf.ranking_triplet_loss(Q, Q, T, margin="1"), TypeError, "margin must be a number"),
        (
            lambda: sf.ranking_triplet_loss(Q, Q, T, samples=0),
            ValueError,
            "samples must be at least 1, got 0",
        ),
        (lambda: sf.ranking_triplet_loss(Q, Q, T, samples=1.5), TypeError, "samples must be an integer"),
        (
            lambda: sf.ranking_triplet_loss(Q, Q, T, samples=1, seed=2**64),
            ValueError,
            "seed must be at most",
        ),
        (lambda: sf.ranking_triplet_loss(Q, Q, T, samples=1, seed=0.5), TypeError, "seed must be an integer"),
        (
            lambda: sf.ranking_triplet_loss(Q, Q, T, samples=1, seed=torch.ones(2).long()),
            ValueError,
            "seed must hold one number",
        ),
        (
            lambda: sf.ranking_triplet_loss(Q, Q, T, samples=1, seed=torch.ones(())),
            TypeError,
            "seed must be a tensor of dtype int64",
        ),
        (
            lambda: sf.ranking_triplet_loss(Q, Q, T, metric="l1"),
            ValueError,
            "metric must be one of .* got 'l1'",
        ),
        (lambda: sf.ranking_triplet_loss(Q, Q, T, impl="fast"), ValueError, "impl must be one of"),
        (
            lambda: sf.ranking_triplet_loss(Q * NAN, Q, T, check_values=True),
            ValueError,
            r"query must be finite, got nan at index \(0, 0\)",
        ),
        (
            lambda: sf.ranking_triplet_loss(Q, Q * INFINITY, T, check_values=True),
            ValueError,
            "gallery must be finite",
        ),
        (
            lambda: sf.ranking_triplet_loss(Q, Q, T * NAN, check_values=True),
            ValueError,
            r"teacher must be finite, got nan at index \(0, 1\)",
        ),
        (
            lambda: sf.ranking_triplet_loss_from_distances(T[:3], T),
            ValueError,
            "dist must be square, got",
        ),
        (
            lambda: sf.ranking_triplet_loss_from_distances(T.int(), T),
            TypeError,
            "dist must be a tensor of dtype",
        ),
        (
            lambda: sf.ranking_triplet_loss_from_distances(T * NAN, T, check_values=True),
            ValueError,
            "dist must be finite",
        ),
        (lambda: sf.triplet_loss(Q, Q, mining="hard"), ValueError, "mining must be one of .* got 'hard'"),
        (lambda: sf.triplet_loss(Q, Q, labels=Q[:, 0]), TypeError, "labels must be a tensor of dtype"),
        (
            lambda: sf.triplet_loss(Q, Q, labels=torch.ones(3).long()),
            ValueError,
            r"labels must have shape \[4\]",
        ),
        (lambda: sf.triplet_loss(Q, Q, margin=-1), ValueError, "margin must be at least 0"),
        (lambda: sf.triplet_loss(Q, Q * NAN, check_values=True), ValueError, "gallery must be finite"),
    ],
)
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_legal_values_pass_the_checks():
    """A diagonal of infinities is nobody's distance."""
    diagonal = torch.eye(4) * INFINITY
    diagonal = torch.where(torch.eye(4, dtype=torch.bool), INFINITY, 1.0)
    sf.ranking_triplet_loss(Q, Q, diagonal, indices=torch.arange(4), samples=2, check_values=True)
    sf.ranking_triplet_loss_from_distances(diagonal, diagonal, check_values=True)
    sf.triplet_loss(Q, Q, labels=torch.arange(4).int(), mining="random", check_values=True)


@pytest.mark.skipif("native" not in available_impls("cpu"), reason="the CPU library was not built")
def test_the_library_checks_what_guards_memory():
    """Called beneath the public function, wrong shapes are refused before any memory is touched."""
    ops, seed = torch.ops.sketchfast, torch.tensor(0)
    with pytest.raises(RuntimeError, match=r"gallery must have shape \[4, 3\], got \[3, 3\]"):
        ops.triplet_ranking_fwd_native(Q, Q[:3].contiguous(), T, None, 0.1, False, 0)
    with pytest.raises(RuntimeError, match=r"teacher must have shape \[4, 4\], got \[3, 3\]"):
        ops.triplet_ranking_fwd_native(Q, Q, T[:3, :3], None, 0.1, False, 0)
    with pytest.raises(RuntimeError, match="query must be contiguous"):
        ops.triplet_sampled_fwd_native(torch.ones(3, 4).T, Q, T, None, 0.1, False, 2, seed)
    with pytest.raises(RuntimeError, match=r"indices must have shape \[4\], got \[3\]"):
        ops.triplet_matrix_fwd_native(T, T, torch.arange(3), 0.1, 0, None, 0)
    with pytest.raises(RuntimeError, match="seed must be given"):
        ops.triplet_matrix_fwd_native(T, T, None, 0.1, 2, None, 0)
    with pytest.raises(RuntimeError, match="mining must be all, hardest, semihard or random, got most"):
        ops.triplet_pairs_fwd_native(Q, Q, None, 0.1, False, "most", None)
    weights = torch.ones(4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"weights must have shape \[4, 4\], got \[4\]"):
        ops.triplet_embedding_bwd_native(torch.ones(()), weights, Q, Q, False)
    outside = torch.tensor([0, 9, -3, 1])  # beneath the public function indices are clamped
    loss, _ = ops.triplet_matrix_fwd_native(T, torch.rand(5, 5), outside, 0.1, 0, None, 0)
    assert torch.isfinite(loss)
