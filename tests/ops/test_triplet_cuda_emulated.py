"""The CUDA kernels of the triplet losses, run by the CPU emulator in tests/cuda_emulator, against float64.

What it proves and what it cannot is as in test_raster_cuda_emulated.py. Which triplets are active is compared
exactly; diagonals hold NaN, so that reading one shows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from emulated import DTYPES, H200_SHARED, SCHEDULES, Guarded, build
from torch import Tensor

from sketchfast.kernels.reference import triplet as reference

#: In the order of the structure Call in triplet_emulated.cpp.
INPUTS = (
    "query",
    "gallery",
    "dist",
    "teacher",
    "indices",
    "labels",
    "seed",
    "scale",
    "weights_in",
    "active_in",
)
OUTPUTS = ("loss", "weights", "active", "considered", "grad_query", "grad_gallery")
INTEGERS = (
    "batch",
    "dimensions",
    "squared",
    "teacher_dtype",
    "teacher_rows",
    "row_stride",
    "column_stride",
    "samples",
    "mining",
    "tree_from",
    "shared_limit",
)
TEACHER_DTYPES = DTYPES | {torch.float64: 3}
MINING = {"all": 0, "hardest": 1, "semihard": 2, "random": 3}
FUNCTIONS = ("forward", "pairs", "embedding_backward", "sampled_backward", "chosen_backward")
PAIRS, TREE = 1 << 40, 0  # tree_from


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in INPUTS + OUTPUTS),
        *((name, ctypes.c_int64) for name in INTEGERS),
        ("margin", ctypes.c_double),
    ]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = build("triplet_emulated.cpp", tmp_path_factory.mktemp("emulator"))
    for name in FUNCTIONS:
        getattr(loaded, f"triplet_{name}").restype = ctypes.c_char_p
    return loaded


@dataclass
class Emulated:
    """The kernels behind a Python call."""

    library: ctypes.CDLL
    schedule: str = "forward"
    shared_limit: int = H200_SHARED
    launches: int = 0

    def call(
        self,
        name: str,
        given: dict[str, Tensor | None],
        out: dict[str, tuple[tuple[int, ...], torch.dtype]],
        *,
        view: Callable[[Tensor], Tensor] = lambda teacher: teacher,
        **numbers: float,
    ) -> dict[str, Tensor]:
        """Of guarded copies of the tensors given; `view` makes the strided teacher from its copy."""
        memory = Guarded()
        kept = {key: None if x is None else memory.copy(x) for key, x in given.items()}
        made = {key: memory.empty(*shape) for key, shape in out.items()}
        call = _Call(shared_limit=self.shared_limit, **numbers)
        if kept.get("teacher") is not None:
            kept["teacher"] = teacher = view(kept["teacher"])
            call.teacher_dtype = TEACHER_DTYPES[teacher.dtype]
            call.teacher_rows = len(teacher)
            call.row_stride, call.column_stride = teacher.stride()
        for key, tensor in (kept | made).items():
            setattr(call, key, None if tensor is None else tensor.data_ptr())
        self.library.set_schedule(SCHEDULES[self.schedule], 12345)
        error = getattr(self.library, f"triplet_{name}")(ctypes.byref(call))
        assert error is None, error.decode()
        self.launches = self.library.launches()
        memory.check()
        return made

    def matrix(self, dist: Tensor, teacher: Tensor, margin: float = 0.1, tree_from: int = PAIRS, **more):
        batch = len(dist)
        out = {"loss": ((), torch.float32), "weights": ((batch, batch), torch.int32)}
        given = {"dist": dist, "teacher": teacher} | {
            k: more.pop(k) for k in ("indices", "seed") if k in more
        }
        return self.call("forward", given, out, batch=batch, margin=margin, tree_from=tree_from, **more)

    def embeddings(self, query: Tensor, gallery: Tensor, teacher: Tensor, margin: float = 0.1, **more):
        batch, dimensions = query.shape
        samples = more.get("samples", 0)
        state = ("active", ((batch, samples), torch.int8))
        if samples == 0:
            state = ("weights", ((batch, batch), torch.int32))
        given = {"query": query, "gallery": gallery, "teacher": teacher, "seed": more.pop("seed", None)}
        more = {"tree_from": PAIRS} | more
        out = dict([("loss", ((), torch.float32)), state])
        return self.call("forward", given, out, batch=batch, dimensions=dimensions, margin=margin, **more)

    def pairs(self, query: Tensor, gallery: Tensor, mining: str, margin: float = 0.2, **more):
        batch, dimensions = query.shape
        given = {"query": query, "gallery": gallery}
        given |= {name: more.pop(name, None) for name in ("labels", "seed")}
        out = {
            "loss": ((), torch.float32),
            "weights": ((batch, batch) if mining == "all" else (batch,), torch.int32),
            "considered": ((), torch.int64),
        }
        numbers = {"batch": batch, "dimensions": dimensions, "margin": margin, "mining": MINING[mining]}
        return self.call("pairs", given, out, **numbers, **more)

    def backward(self, name: str, query: Tensor, gallery: Tensor, scale: Tensor, **more):
        batch, dimensions = query.shape
        given = {"query": query, "gallery": gallery, "scale": scale}
        given |= {name: more.pop(name, None) for name in ("weights_in", "active_in", "seed")}
        out = dict.fromkeys(("grad_query", "grad_gallery"), ((batch, dimensions), torch.float32))
        made = self.call(f"{name}_backward", given, out, batch=batch, dimensions=dimensions, **more)
        return made["grad_query"], made["grad_gallery"]


# --- cases and comparison ----------------------------------------------------------------------------------


def poisoned(matrix: Tensor) -> Tensor:
    """With NaN on the diagonal."""
    return matrix.clone().fill_diagonal_(torch.nan)


def random_matrices(batch: int, seed: int = 0, levels: int | None = None) -> tuple[Tensor, Tensor]:
    """dist and teacher [B, B], not symmetric; of few values each where `levels` says so: ties."""
    random = torch.Generator().manual_seed(seed)
    shape = (2, batch, batch)
    if levels is None:
        dist, teacher = torch.rand(shape, generator=random)
    else:
        dist, teacher = torch.randint(levels, shape, generator=random).float() / 8
    return poisoned(dist), poisoned(teacher)


def random_embeddings(batch: int, dimensions: int, seed: int = 0, whole: bool = False):
    """query, gallery: normal, or of small whole numbers, whose squared distances are exact."""
    random = torch.Generator().manual_seed(seed)
    shape = (2, batch, dimensions)
    if whole:
        return torch.randint(-4, 5, shape, generator=random).float()
    return torch.randn(shape, generator=random)


def exact_distances(query: Tensor, gallery: Tensor, squared: bool) -> Tensor:
    """Of small whole numbers, in float32; the reference squares a root, which would round."""
    square = (query[:, None] - gallery).square().sum(2)
    return square if squared else square.double().sqrt().float()  # torch's float32 root may be an ulp off


def within_budget(ours: Tensor, eager: Tensor, exact: Tensor, what: str) -> None:
    """max|err| <= 2 max|err of eager at float32| + 4 eps max|exact|."""
    if not exact.numel():
        return
    assert not ours.isnan().any(), f"{what}: NaN"
    error = (ours.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    budget = 2 * eager_error + 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert error <= budget, f"{what}: error {error:.3g} over the budget {budget:.3g}"


def check_matrix(out: dict[str, Tensor], dist: Tensor, teacher: Tensor, margin: float) -> None:
    expected = reference.ranking_weights(dist, teacher, margin).weights
    wrong = (out["weights"] != expected).nonzero()
    assert not len(wrong), f"{len(wrong)} weights differ, the first at {wrong[0].tolist()}"
    eager = reference.ranking_loss(dist, teacher, margin)
    torch.testing.assert_close(out["loss"], eager, rtol=2e-7, atol=0, equal_nan=True)


def by_autograd(loss: Callable[[Tensor], Tensor], query: Tensor, gallery: Tensor, squared: bool, dtype):
    """The loss of the distances and its gradients to query and gallery."""
    x, y = (t.to(dtype).requires_grad_() for t in (query, gallery))
    value = loss(reference.distances(x, y, squared))
    value.backward()
    return value.detach(), x.grad, y.grad


# --- all ranking triplets: the integers --------------------------------------------------------------------

SIZES = [0, 1, 2, 3, 4, 5, 31, 32, 33, 34, 63, 64, 65, 66, 129, 300]
COUNTED = {"pairs": (PAIRS, H200_SHARED), "tree": (TREE, H200_SHARED), "columns": (PAIRS, 600)}


@pytest.fixture(params=COUNTED)
def way(request: pytest.FixtureRequest) -> tuple[int, int]:
    """tree_from and the shared memory of each way to count."""
    return COUNTED[request.param]


@pytest.mark.parametrize("levels", [None, 5], ids=["distinct", "ties"])
@pytest.mark.parametrize("batch", SIZES)
def test_weights(library, way, batch, levels):
    tree_from, shared = way
    if batch == 300 and shared < H200_SHARED:
        batch = 280  # more than a CTA of columns, in a test's time
    dist, teacher = random_matrices(batch, levels=levels)
    if levels:  # a row with a NaN is counted column by column: with these a diagonal that is read shows too
        dist.fill_diagonal_(0.25)
        teacher.fill_diagonal_(0.25)
    out = Emulated(library, shared_limit=shared).matrix(dist, teacher, 0.125, tree_from)
    check_matrix(out, dist, teacher, 0.125)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_schedules(library, way, schedule, dtype):
    dist, teacher = random_matrices(70, levels=9)
    emulated = Emulated(library, schedule, way[1])
    check_matrix(emulated.matrix(dist, teacher.to(dtype), 0.125, way[0]), dist, teacher, 0.125)
    assert emulated.launches == 2  # one for the ticket, one for all else


@pytest.mark.parametrize("tree_from", [PAIRS, TREE], ids=["pairs", "tree"])
def test_several_columns_a_lane(library, tree_from):
    dist, teacher = random_matrices(515, levels=60)
    emulated = Emulated(library)
    out = emulated.matrix(dist, teacher, 0.5, tree_from)
    check_matrix(out, dist, teacher, 0.5)


@pytest.mark.parametrize("margin", [0.0, 1e-8, 0.125, 3.0])
@pytest.mark.parametrize("levels", [None, 1, 3], ids=str)
def test_margins(library, way, margin, levels):
    dist, teacher = random_matrices(37, levels=levels)
    check_matrix(
        Emulated(library, shared_limit=way[1]).matrix(dist, teacher, margin, way[0]), dist, teacher, margin
    )


def test_rounding_decides(library, way):
    """Active iff fl(d + m) > d_k: neighbours in float32 about the kink."""
    random = torch.Generator().manual_seed(1)
    steps = torch.randint(-3, 4, (40, 40), generator=random).int()
    dist = poisoned(
        ((torch.rand(40, 1, generator=random) + 0.3).view(torch.int32) + steps).view(torch.float32)
    )
    dist[:, ::2] += 0.1
    teacher = random_matrices(40, levels=4)[1]
    check_matrix(
        Emulated(library, shared_limit=way[1]).matrix(dist, teacher, 0.1, way[0]), dist, teacher, 0.1
    )


def test_a_margin_that_rounding_swallows(library, way):
    """Equal distances, so large for the margin that none is active, a column's own among them."""
    dist, teacher = torch.full((9, 9), 0.5), random_matrices(9, levels=2)[1]
    out = Emulated(library, shared_limit=way[1]).matrix(dist, teacher, 1e-8, way[0])
    assert out["loss"] == 0
    assert not out["weights"].any()


def test_infinite_and_signed_zero(library, way):
    dist, teacher = random_matrices(40, levels=3)
    dist[3, 5], dist[4, 6:9], dist[5] = torch.inf, torch.inf, torch.inf
    dist[6, ::2] *= -1.0
    teacher[7, 3:9], teacher[8, 4] = torch.inf, -torch.inf
    teacher[9, ::2], teacher[9, 1::2] = 0.0, -0.0
    dist[10, 20:] = 3e38  # with such a margin infinite
    for margin in (0.0, 0.25, 3e38):
        out = Emulated(library, shared_limit=way[1]).matrix(dist, teacher, margin, way[0])
        check_matrix(out, dist, teacher, margin)


def test_an_infinite_distance_that_no_triplet_holds_counts_nothing(library, way):
    """Photos infinitely far, and farther than all others for the teacher: no triplet is active."""
    dist = torch.arange(6.0).expand(6, 6).clone()
    teacher = dist.clone()
    dist[:, 5] = torch.inf
    out = Emulated(library, shared_limit=way[1]).matrix(poisoned(dist), poisoned(teacher), 0.0, way[0])
    check_matrix(out, poisoned(dist), poisoned(teacher), 0.0)
    assert out["loss"].isfinite()


def test_nan_shows(library, way):
    """Of a distance: in the loss. Of a teacher: as the definition's comparisons say, once in each order."""
    dist, teacher = random_matrices(40, levels=6)
    teacher[2, 7] = torch.nan
    check_matrix(
        Emulated(library, shared_limit=way[1]).matrix(dist, teacher, 0.25, way[0]), dist, teacher, 0.25
    )
    dist[3, 5] = torch.nan
    out = Emulated(library, shared_limit=way[1]).matrix(dist, teacher, 0.25, way[0])
    check_matrix(out, dist, teacher, 0.25)
    assert out["loss"].isnan()


# --- the teacher: read in place ----------------------------------------------------------------------------

VIEWS = {
    "transposed": (lambda n: (n, n), lambda x: x.t()),
    "sliced": (lambda n: (2 * n, 3 * n), lambda x: x[1::2, ::3]),
    "expanded": (lambda n: (1, n), lambda x: x.expand(x.shape[1], -1)),
}


@pytest.mark.parametrize("dtype", TEACHER_DTYPES, ids=str)
def test_teacher_dtypes(library, way, dtype):
    """Compared in their own precision: what differs in float64 alone is equal in all others."""
    dist, steps = random_matrices(40, levels=5)
    teacher = poisoned(0.5 + steps.double() * 2**-47).to(dtype)
    emulated = Emulated(library, shared_limit=way[1])
    check_matrix(emulated.matrix(dist, teacher, 0.25, way[0]), dist, teacher, 0.25)
    distinct = teacher[0, 1:].unique().numel()
    assert distinct == (5 if dtype == torch.float64 else 1)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", TEACHER_DTYPES, ids=str)
def test_strided_teacher_with_indices(library, way, name, dtype):
    shape, view = VIEWS[name]
    random = torch.Generator().manual_seed(2)
    base = torch.randint(9, shape(50), generator=random).to(dtype)
    indices = torch.randint(50, (34,), generator=random)
    indices[5] = indices[6]
    indices[7], indices[8] = -3, 50  # clamped
    rows = indices.clamp(0, 49)
    dist, _ = random_matrices(34, levels=20)
    out = Emulated(library, shared_limit=way[1]).matrix(dist, base, 0.25, way[0], indices=indices, view=view)
    check_matrix(out, dist, view(base)[rows][:, rows], 0.25)


def test_the_rule_of_shared_memory(library):
    """Where a row does not fit, the columns are counted from global memory."""
    dist, teacher = random_matrices(120, levels=9)
    for limit, dtype in ((3100, torch.float32), (3100, torch.float64), (4100, torch.float64)):
        emulated = Emulated(library, shared_limit=limit)
        check_matrix(emulated.matrix(dist, teacher.to(dtype), 0.25, TREE), dist, teacher, 0.25)


# --- embeddings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("squared", [False, True], ids=["euclidean", "squared"])
@pytest.mark.parametrize(
    ("batch", "dimensions"), [(0, 3), (1, 1), (2, 5), (3, 33), (17, 64), (65, 7), (300, 40)], ids=str
)
def test_ranking_of_embeddings(library, batch, dimensions, squared):
    """Whole numbers, whose distances are exact: the very integers of the reference, duplicates at 0."""
    query, gallery = random_embeddings(batch, dimensions, whole=True)
    if batch > 4:
        query[4] = gallery[2]
        gallery[3] = gallery[2]
    teacher = random_matrices(batch, levels=12)[1]
    dist = exact_distances(query, gallery, squared)
    emulated = Emulated(library)
    out = emulated.embeddings(query, gallery, teacher, 0.5, squared=squared)
    check_matrix(out, dist, teacher, 0.5)
    assert emulated.launches == (2 if batch else 1)


def _check_gradients(ours, loss, query, gallery, squared) -> None:
    _, *exact = by_autograd(loss, query, gallery, squared, torch.float64)
    _, *eager = by_autograd(loss, query, gallery, squared, torch.float32)
    for which, *three in zip(("grad_query", "grad_gallery"), ours, eager, exact, strict=True):
        within_budget(*three, which)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("squared", [False, True], ids=["euclidean", "squared"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 40), (65, 33)], ids=str)
def test_embedding_backward(library, shape, squared, schedule):
    query, gallery = random_embeddings(*shape)
    random = torch.Generator().manual_seed(5)
    weights = torch.randint(-9, 9, (shape[0], shape[0]), generator=random).int()
    query[-1] = gallery[-1]  # a distance of 0: no pull
    scale = torch.tensor(0.37)
    ours = Emulated(library, schedule).backward(
        "embedding", query, gallery, scale, weights_in=weights, squared=squared
    )
    _check_gradients(ours, lambda d: scale.to(d) * (weights * d).sum(), query, gallery, squared)


@pytest.mark.parametrize("shape", [(481, 3), (961, 2), (65, 2100)], ids=str)
def test_larger_tiles(library, shape):
    """The tiles of large batches and of many dimensions."""
    query, gallery = random_embeddings(*shape)
    weights = torch.ones(shape[0], shape[0], dtype=torch.int32)
    weights[:, ::3] = -2
    ours = Emulated(library).backward("embedding", query, gallery, torch.tensor(1.0), weights_in=weights)
    _check_gradients(ours, lambda d: (weights * d).sum(), query, gallery, False)


def test_offset_embeddings(library):
    """Differences, not products: a large common offset costs no more than it does eager PyTorch."""
    query, gallery = random_embeddings(40, 24) + 1000.0
    teacher = random_matrices(40)[1]
    out = Emulated(library).embeddings(query, gallery, teacher, 0.1)
    exact, *_ = by_autograd(
        lambda d: reference.ranking_loss(d, teacher, 0.1), query, gallery, False, torch.float64
    )
    eager = reference.ranking_loss(reference.distances(query, gallery, False), teacher, 0.1)
    within_budget(out["loss"], eager, exact, "loss")
    ours = Emulated(library).backward(
        "embedding", query, gallery, torch.tensor(1.0), weights_in=out["weights"]
    )
    _check_gradients(ours, lambda d: (out["weights"] * d).sum(), query, gallery, False)


# --- sampled triplets --------------------------------------------------------------------------------------


def expected_samples(dist: Tensor, teacher: Tensor, margin: float, samples: int, seed: Tensor):
    """active [B, samples] int8 and the weights of the sampled triplets."""
    batch = len(dist)
    j, k = reference.sampled_pairs(seed, batch, samples)
    nearer = teacher.gather(1, j) <= teacher.gather(1, k)
    drawn, pushed = torch.where(nearer, j, k), torch.where(nearer, k, j)
    active = dist.gather(1, drawn) + margin > dist.gather(1, pushed)
    weights = torch.zeros(batch, batch, dtype=torch.int32)
    weights.scatter_add_(1, drawn, active.int()).scatter_add_(1, pushed, -active.int())
    return torch.where(active, torch.where(nearer, 1, -1), 0).to(torch.int8), weights


SEEDS = (0, -1, 2**63 - 1, -(2**62) + 12345)


@pytest.mark.parametrize(("batch", "samples"), [(3, 1), (3, 7), (40, 10), (33, 70)], ids=str)
def test_sampled(library, batch, samples):
    query, gallery = random_embeddings(batch, 21, whole=True)
    teacher = random_matrices(batch, levels=12)[1]
    dist = exact_distances(query, gallery, False)
    for seed, schedule in zip(SEEDS, SCHEDULES, strict=True):
        key = torch.tensor(seed)
        active, weights = expected_samples(dist, teacher, 0.5, samples, key)
        loss = reference.sampled_loss(dist, teacher, 0.5, samples, key)
        emulated = Emulated(library, schedule)
        out = emulated.embeddings(query, gallery, teacher, 0.5, samples=samples, seed=key)
        assert torch.equal(out["active"], active)
        torch.testing.assert_close(out["loss"], loss, rtol=2e-7, atol=0)
        out = emulated.matrix(poisoned(dist), teacher, 0.5, samples=samples, seed=key)
        assert torch.equal(out["weights"], weights)
        torch.testing.assert_close(out["loss"], loss, rtol=2e-7, atol=0)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_no_samples_of_fewer_than_three(library, batch):
    query, gallery = random_embeddings(batch, 4)
    teacher, seed = torch.full((batch, batch), torch.nan), torch.tensor(1)
    out = Emulated(library).embeddings(query, gallery, teacher, samples=5, seed=seed)
    assert out["loss"] == 0
    assert not out["active"].any()
    out = Emulated(library).matrix(teacher, teacher, samples=5, seed=seed)
    assert out["loss"] == 0
    assert not out["weights"].any()


def test_fewer_than_three_rows_are_not_looked_at(library):
    for batch in (1, 2):
        nan = torch.full((batch, batch), torch.nan)
        out = Emulated(library).matrix(nan, nan)
        assert float(out["loss"]) == 0
        assert not out["weights"].any()


def test_sampled_nan_shows(library):
    query, gallery = random_embeddings(20, 4)
    teacher = random_matrices(20)[1]
    query[3, 2] = torch.nan
    out = Emulated(library).embeddings(query, gallery, teacher, samples=5, seed=torch.tensor(1))
    assert out["loss"].isnan()
    assert not out["active"][3].any()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("squared", [False, True], ids=["euclidean", "squared"])
@pytest.mark.parametrize(
    ("shape", "samples"), [((3, 1), 4), ((40, 33), 10), ((20, 300), 20), ((530, 5), 2)], ids=str
)
def test_sampled_backward(library, shape, samples, squared, schedule):
    if shape[0] > 500 and schedule != "shuffled":
        pytest.skip("large: one schedule")
    query, gallery = random_embeddings(*shape)
    gallery[1] = query[0]
    random = torch.Generator().manual_seed(3)
    seed, scale = torch.tensor(99), torch.tensor(0.37)
    active = torch.randint(-1, 2, (shape[0], samples), generator=random).to(torch.int8)
    ours = Emulated(library, schedule).backward(
        "sampled", query, gallery, scale, active_in=active, seed=seed, samples=samples, squared=squared
    )
    j, k = reference.sampled_pairs(seed, shape[0], samples)
    sign = scale * active
    _check_gradients(
        ours, lambda d: (sign.to(d) * (d.gather(1, j) - d.gather(1, k))).sum(), query, gallery, squared
    )


def test_a_full_queue(library):
    """More triplets on the rows of one CTA than its queue holds, and bits that no schedule changes."""
    query, gallery = random_embeddings(4, 9)
    seed, scale, samples = torch.tensor(7), torch.tensor(1.0), 400
    active = torch.ones(4, samples, dtype=torch.int8)
    j, k = reference.sampled_pairs(seed, 4, samples)
    results = [
        Emulated(library, schedule).backward(
            "sampled", query, gallery, scale, active_in=active, seed=seed, samples=samples
        )
        for schedule in SCHEDULES
    ]
    _check_gradients(results[0], lambda d: (d.gather(1, j) - d.gather(1, k)).sum(), query, gallery, False)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_many_samples_of_one_pair(library):
    """Added up in float64: the same term thousands of times."""
    query, gallery = random_embeddings(3, 9)
    seed, scale, samples = torch.tensor(7), torch.tensor(0.1), 4000
    j, k = reference.sampled_pairs(seed, 3, samples)
    active = torch.where(j < k, 1, -1).to(torch.int8)
    ours = Emulated(library).backward(
        "sampled", query, gallery, scale, active_in=active, seed=seed, samples=samples, squared=True
    )
    sign = scale * active
    _check_gradients(
        ours, lambda d: (sign.to(d) * (d.gather(1, j) - d.gather(1, k))).sum(), query, gallery, True
    )


# --- pairs -------------------------------------------------------------------------------------------------


def labels_of(batch: int, kind: str) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "one":
        return torch.full((batch,), -5)
    return torch.randint(6, (batch,), generator=torch.Generator().manual_seed(4)) * 2**40


PAIR_CASES = ((0, 0.5), (1, 0.5), (2, 0.5), (3, 0.5), (40, 0.0), (40, 2.0), (40, 1.0), (65, 1.0))


@pytest.mark.parametrize("kind", ["none", "some", "one"])
@pytest.mark.parametrize("mining", MINING)
def test_pairs(library, mining, kind):
    for (batch, margin), schedule in zip(PAIR_CASES, 2 * list(SCHEDULES), strict=True):
        query, gallery = random_embeddings(batch, 6, whole=True)
        labels, seed = labels_of(batch, kind), torch.tensor(-7)
        dist = exact_distances(query, gallery, True)
        out = Emulated(library, schedule).pairs(
            query, gallery, mining, margin, labels=labels, seed=seed, squared=True
        )
        own, allowed = dist.diagonal()[:, None], reference.negatives(batch, labels, dist.device)
        if mining == "all":
            pushed = (allowed & (own + margin > dist)).int()
            assert torch.equal(out["weights"], torch.diag(pushed.sum(1)).int() - pushed)
            assert out["considered"] == allowed.sum()
        else:
            chosen = reference.chosen_negatives(dist, labels, margin, mining, seed)
            far = dist.gather(1, chosen.clamp(min=0)[:, None]) if batch else dist[:, :0].sum(1, keepdim=True)
            active = (chosen >= 0) & (own + margin > far)[:, 0]
            assert torch.equal(out["weights"], torch.where(active, chosen, -1).int())
            assert out["considered"] == (chosen >= 0).sum()
        loss = reference.pair_loss(dist, labels, margin, mining, seed)
        torch.testing.assert_close(out["loss"], loss, rtol=2e-7, atol=0)


@pytest.mark.parametrize("mining", ["hardest", "semihard"])
def test_mining_among_infinite_and_nan(library, mining):
    """Of 300 columns, more than a CTA's threads; the lowest of equal ones; NaN never where others are."""
    query, gallery = random_embeddings(300, 2, whole=True)
    gallery[3], gallery[4], gallery[290] = torch.inf, torch.nan, gallery[10]
    dist = exact_distances(query, gallery, True)
    out = Emulated(library).pairs(query, gallery, mining, 4.0, squared=True)
    chosen = reference.chosen_negatives(dist, None, 4.0, mining, None)
    far, own = dist.gather(1, chosen.clamp(min=0)[:, None])[:, 0], dist.diagonal()
    active = (chosen >= 0) & (own + 4.0 > far)
    assert torch.equal(out["weights"], torch.where(active, chosen, -1).int())
    loss = reference.pair_loss(dist, None, 4.0, mining, None)
    torch.testing.assert_close(out["loss"], loss, rtol=2e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("squared", [False, True], ids=["euclidean", "squared"])
def test_chosen_backward(library, squared):
    query, gallery = random_embeddings(70, 19)
    random = torch.Generator().manual_seed(6)
    chosen = torch.randint(-1, 70, (70,), generator=random).int()
    chosen[chosen == torch.arange(70)] = -1
    gallery[9] = query[9]  # an own photo at distance 0
    scale = torch.tensor(-0.7)
    ours = Emulated(library, "shuffled").backward(
        "chosen", query, gallery, scale, weights_in=chosen, squared=squared, samples=1
    )

    def loss(dist: Tensor) -> Tensor:
        gap = dist.diagonal() - dist.gather(1, chosen.clamp(min=0).long()[:, None])[:, 0]
        return scale.to(dist) * torch.where(chosen >= 0, gap, 0.0).sum()

    _check_gradients(ours, loss, query, gallery, squared)
