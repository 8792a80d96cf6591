"""Category-level retrieval: scores against oracles and libraries, exact ties, chunks, memory, pictures."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from sketchfast.evaluate import retrieval
from sketchfast.evaluate.retrieval import nearest, retrieval_picture, retrieval_scores, tsne_picture
from sketchfast.testing import assert_same_bits, devices

CLASSES = 6


def problem(queries=23, gallery=120, width=8, seed=0, repeats=1):
    """Clustered vectors with labels, a third of the gallery's at random: query, gallery, and labels of each.

    Each gallery row stands `repeats` times, not always with the same label.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(CLASSES, width))
    query_labels, labels = rng.integers(0, CLASSES, queries), rng.integers(0, CLASSES, gallery // repeats)
    query = centres[query_labels] + rng.normal(size=(queries, width))
    rows = centres[labels] + rng.normal(size=(len(labels), width))
    order = rng.permutation(np.tile(np.arange(len(labels)), repeats))
    relabelled = rng.random(len(order)) < 1 / 3
    labels = np.where(relabelled, rng.integers(0, CLASSES, len(order)), labels[order])
    return query, rows[order], query_labels, labels


def exact_similarity(query, gallery):
    """Float64 cosines, each pair summed alike, so that equal rows tie."""
    products = (np.asarray(query)[:, None] * np.asarray(gallery)[None]).sum(-1)
    lengths = np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(gallery, axis=1)[None]
    return products / np.where(lengths > 0, lengths, 1)


def exact_order(query, gallery):
    similarity = exact_similarity(query, gallery)
    gaps = np.diff(np.sort(similarity, axis=1), axis=1)
    assert gaps[gaps > 1e-15].min() > 1e-6, "the float64 order must be plain in float32"
    return np.argsort(-np.round(similarity, 12), axis=1, kind="stable")


def oracle(query, gallery, query_labels, labels, top):
    """The definitions, a loop a query."""
    scores = []
    for order, wanted in zip(exact_order(query, gallery), query_labels, strict=True):
        relevant = labels[order] == wanted
        precision = [relevant[: r + 1].mean() for r in range(len(order))]
        hits = [r for r in range(len(order)) if relevant[r]]
        first = [r for r in hits if r < top]
        scores.append(
            (
                relevant[:top].mean(),
                np.mean([precision[r] for r in first]) if first else 0.0,
                np.mean([precision[r] for r in hits]) if hits else 0.0,
            )
        )
    return np.mean(scores, axis=0)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("top", [1, 10, 119, 200])
def test_scores_match_the_definitions(device: str, repeats: int, top: int) -> None:
    data = problem(repeats=repeats)
    got = retrieval_scores(*data, top=top, device=device)
    assert got[:3] == pytest.approx(oracle(*data, top), abs=1e-12)
    assert got[3:] == (min(top, 120), 23, 120)
    assert got.map_all > 1.5 / CLASSES  # far from chance: a mix-up of rows would show


def test_average_precision_is_that_of_scikit_learn() -> None:
    query, gallery, query_labels, labels = problem()
    got = retrieval_scores(query, gallery, query_labels, labels, top=30)
    whole, first = [], []
    for similarity, wanted in zip(exact_similarity(query, gallery), query_labels, strict=True):
        relevant = labels == wanted
        whole.append(average_precision_score(relevant, similarity))
        best = np.argsort(-similarity)[:30]
        first.append(average_precision_score(relevant[best], similarity[best]) if relevant[best].any() else 0)
    assert got.map_all == pytest.approx(np.mean(whole), abs=1e-12)
    assert got.map_at == pytest.approx(np.mean(first), abs=1e-12)


def test_scores_are_those_of_torchmetrics() -> None:
    from torchmetrics.retrieval import RetrievalMAP, RetrievalPrecision

    query, gallery, query_labels, labels = problem(seed=3)
    query_labels[:3] = CLASSES + 1  # not in the gallery
    got = retrieval_scores(query, gallery, query_labels, labels, top=15)
    # torchmetrics takes scores of 0 and less for irrelevant items: the cosine is moved above 0
    similarity = torch.from_numpy(exact_similarity(query, gallery)).flatten() + 2
    relevant = torch.from_numpy(labels[None] == query_labels[:, None]).flatten()
    rows = torch.arange(len(query)).repeat_interleave(len(gallery))
    for metric, ours in (
        (RetrievalPrecision(empty_target_action="neg", top_k=15), got.precision_at),
        (RetrievalMAP(empty_target_action="neg", top_k=15), got.map_at),
        (RetrievalMAP(empty_target_action="neg"), got.map_all),
    ):
        assert float(metric(similarity, relevant, indexes=rows)) == pytest.approx(ours, abs=1e-6)


def test_a_worked_example() -> None:
    gallery = np.array([[1, 0.3], [1, 0.1], [1, 0.0], [1, 0.2], [-1, 0.0]])  # ranked 2, 1, 3, 0, 4
    labels = np.array([7, 7, 5, 5, 7])
    got = retrieval_scores(np.array([[2.0, 0.0]]), gallery, np.array([7]), labels, top=3)
    assert got == pytest.approx((1 / 3, 1 / 2, (1 / 2 + 2 / 4 + 3 / 5) / 3, 3, 1, 5), abs=1e-15)


def test_none_relevant_among_the_first_counts_zero() -> None:
    gallery = np.array([[1, 0.0], [0.0, 1.0]])
    got = retrieval_scores(np.array([[1.0, 0.1]]), gallery, np.array([1]), np.array([0, 1]), top=1)
    assert got[:3] == (0.0, 0.0, 0.5)


def test_a_class_missing_from_the_gallery_counts_zero() -> None:
    query, gallery, query_labels, labels = problem()
    whole = retrieval_scores(query, gallery, query_labels, labels)
    query, query_labels = np.concatenate((query, query[:1])), np.append(query_labels, 99)
    got = retrieval_scores(query, gallery, query_labels, labels)
    assert got[:3] == pytest.approx(np.array(whole[:3]) * 23 / 24, abs=1e-12)
    assert retrieval_scores(query[-1:], gallery, [99], labels)[:3] == (0.0, 0.0, 0.0)


def test_perfect_vectors_score_one_and_a_gallery_of_one_works() -> None:
    labels = np.repeat(np.arange(4), 5)
    vectors = np.eye(4)[labels]
    assert retrieval_scores(vectors, vectors, labels, labels, top=5)[:3] == (1.0, 1.0, 1.0)
    one = retrieval_scores(vectors[:2], vectors[:1], labels[[0, 7]], labels[:1])
    assert one == (0.5, 0.5, 0.5, 1, 2, 1)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("k", [1, 9, 120])
def test_nearest_is_the_float64_order(device: str, repeats: int, k: int) -> None:
    query, gallery, *_ = problem(repeats=repeats)
    similarity, index = nearest(query, gallery, k, device=device)
    assert similarity.dtype == torch.float32
    assert index.dtype == torch.int64
    order = exact_order(query, gallery)[:, :k]
    assert (index.numpy() == order).all()
    exact = np.take_along_axis(exact_similarity(query, gallery), order, axis=1)
    assert np.abs(similarity.numpy() - exact).max() < 1e-7


@pytest.mark.parametrize("device", devices())
def test_bits_depend_on_neither_chunks_nor_threads_nor_device(device: str) -> None:
    """Widths and sizes at which a float32 product rounds by the shape of its blocks."""
    query, gallery, query_labels, labels = problem(queries=61, gallery=5003, width=131, seed=5)
    expected = retrieval_scores(query, gallery, query_labels, labels, chunk=61)
    similarity, index = nearest(query, gallery, 300, chunk=61)
    for chunk in (1, 7, 60, None, 1000):
        assert retrieval_scores(query, gallery, query_labels, labels, chunk=chunk, device=device) == expected
        got = nearest(query, gallery, 300, chunk=chunk, device=device)
        assert_same_bits(got[0], similarity)
        assert_same_bits(got[1], index)
    torch.set_num_threads(3)
    try:
        assert retrieval_scores(query, gallery, query_labels, labels) == expected
        assert_same_bits(nearest(query, gallery, 300, chunk=7)[0], similarity)
        assert_same_bits(nearest(query[:2], gallery, 300)[0], similarity[:2])  # fewer queries than threads
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_a_query_alone_has_the_bits_it_has_among_others() -> None:
    query, gallery, *_ = problem(queries=40, gallery=1001, width=77, seed=6)
    similarity, index = nearest(query, gallery, 1001)
    for row in (0, 17, 39):
        alone = nearest(query[row : row + 1], gallery, 1001)
        assert_same_bits(alone[0], similarity[row : row + 1])
        assert_same_bits(alone[1], index[row : row + 1])


@pytest.mark.parametrize("device", devices())
def test_equal_gallery_rows_tie_exactly_and_keep_their_order(device: str) -> None:
    rng = np.random.default_rng(7)
    distinct = rng.normal(size=(5, 67)).astype(np.float32)
    kinds = rng.integers(0, 5, 777)
    similarity, index = nearest(rng.normal(size=(33, 67)), distinct[kinds], 777, device=device)
    for values, order in zip(similarity.numpy(), index.numpy(), strict=True):
        assert len(np.unique(values)) == 5
        for kind in range(5):
            assert (order[kinds[order] == kind] == np.flatnonzero(kinds == kind)).all()


@pytest.mark.parametrize("device", devices())
def test_zero_vectors_have_similarity_zero(device: str) -> None:
    gallery = np.array([[-0.0, -1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    similarity, index = nearest(np.array([[0.0, 0.0], [1.0, 0.0]]), gallery, 5, device=device)
    assert index.tolist() == [[0, 1, 2, 3, 4], [3, 0, 1, 2, 4]]  # a negative zero ties with a positive one
    assert similarity.tolist() == [[0.0] * 5, [1.0, 0.0, 0.0, 0.0, -1.0]]
    assert not torch.signbit(similarity[:, :4]).any()


def test_keys_order_floats_and_give_them_back() -> None:
    values = torch.tensor([[1.0, 1e-30, 0.0, -0.0, -1e-30, -0.5, -1.0]])
    keys = torch.empty(values.shape, dtype=torch.int64)
    retrieval._pack(values, torch.arange(7) << 1, keys)
    assert (keys.diff(dim=1) > 0).all()
    assert len(torch.unique(keys >> 32)) == 6  # zeros of both signs tie
    similarity, index = retrieval._unpack(keys | 1)
    assert torch.equal(similarity, values)
    assert index.tolist() == [list(range(7))]


def test_vectors_of_one_direction_alone_still_rank() -> None:
    """A collapsed encoder: everything ties, the index decides."""
    labels = np.arange(50) % 2
    got = retrieval_scores(np.ones((3, 4)), np.full((50, 4), 2.0), np.zeros(3, int), labels, top=10)
    every_other = [(r // 2 + 1) / (r + 1) for r in range(0, 50, 2)]
    assert got[:3] == pytest.approx((0.5, np.mean(every_other[:5]), np.mean(every_other)), abs=1e-12)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(np.float32, 1e-38), (np.float32, 1e37), (np.float64, 1e-300), (np.float64, 1e300)],
)
def test_length_does_not_count(dtype: type, scale: float) -> None:
    query, gallery, *_ = problem()
    expected = nearest(query, gallery, 20)[1]
    scaled = nearest((query * scale).astype(dtype), (gallery * scale).astype(dtype), 20)[1]
    assert scaled.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_and_arrays_of_any_floating_dtype(dtype: torch.dtype) -> None:
    query, gallery, query_labels, labels = problem()
    tensors = [torch.from_numpy(a).to(dtype).requires_grad_() for a in (query, gallery)]
    rounded = [t.detach().double().numpy() for t in tensors]
    expected = retrieval_scores(*rounded, query_labels, labels)
    got = retrieval_scores(*tensors, torch.from_numpy(query_labels), torch.from_numpy(labels))
    assert got == expected
    strided = np.asfortranarray(rounded[1])
    strided.flags.writeable = False
    assert retrieval_scores(rounded[0], strided, query_labels, labels) == expected


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", ">i4"]
)
def test_labels_of_any_integer_dtype(dtype: str) -> None:
    query, gallery, query_labels, labels = problem()
    expected = retrieval_scores(query, gallery, query_labels, labels)
    got = retrieval_scores(query, gallery, query_labels.astype(dtype), labels.tolist())
    assert got == expected
    if dtype[0] != ">":
        tensor = torch.from_numpy(labels.astype(dtype))
        assert retrieval_scores(query, gallery, query_labels - 0, tensor) == expected


def test_labels_may_be_any_numbers() -> None:
    query, gallery, query_labels, labels = problem()
    expected = retrieval_scores(query, gallery, query_labels, labels)
    apart = np.array([-(2**62), -1, 0, 2**32, 2**32 + 1, 2**62])
    assert retrieval_scores(query, gallery, apart[query_labels], apart[labels]) == expected


QUERY, GALLERY, QUERY_LABELS, LABELS = problem(4, 9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": QUERY.astype(int)}, TypeError, "query must have a floating dtype, got int64"),
        (
            {"gallery": torch.ones(9, 8).bool()},
            TypeError,
            "gallery must have a floating dtype, got torch.bool",
        ),
        ({"query": QUERY[0]}, ValueError, r"query must have shape \[N, D\], .*, got \(8,\)"),
        ({"gallery": GALLERY[:0]}, ValueError, r"gallery must have shape \[N, D\], .*, got \(0, 8\)"),
        ({"query": QUERY[:, :0]}, ValueError, r"query must have shape"),
        ({"gallery": GALLERY[:, :5]}, ValueError, r"gallery must have the 8 columns of query, .* \(9, 5\)"),
        ({"query": np.where(np.eye(4, 8), np.nan, QUERY)}, ValueError, "query must be finite"),
        ({"gallery": torch.full((9, 8), torch.inf)}, ValueError, "gallery must be finite"),
        ({"query_labels": QUERY_LABELS * 1.0}, TypeError, "query_labels must have an integer dtype"),
        ({"gallery_labels": LABELS > 2}, TypeError, "gallery_labels must have an integer dtype, got bool"),
        ({"query_labels": LABELS}, ValueError, r"query_labels must have shape \[4\], .*, got \(9,\)"),
        ({"gallery_labels": LABELS[:, None]}, ValueError, r"gallery_labels must have shape \[9\]"),
        ({"gallery_labels": np.full(9, 2**63, np.uint64)}, ValueError, "gallery_labels must fit int64"),
        ({"top": 0}, ValueError, "top must be at least 1, got 0"),
        ({"top": 2.0}, TypeError, "top must be an integer, got 2.0"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"chunk": True}, TypeError, "chunk must be an integer"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict, error: type, message: str) -> None:
    arguments = {
        "query": QUERY,
        "gallery": GALLERY,
        "query_labels": QUERY_LABELS,
        "gallery_labels": LABELS,
        **change,
    }
    with pytest.raises(error, match=message):
        retrieval_scores(**arguments)


def test_k_is_checked() -> None:
    with pytest.raises(ValueError, match="k must be at most the 9 gallery vectors, got 10"):
        nearest(QUERY, GALLERY, 10)
    with pytest.raises(ValueError, match="k must be at least 1"):
        nearest(QUERY, GALLERY, 0)


def run_python(code: str) -> str:
    root = str(Path(retrieval.__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {root!r})\n{code}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_stays_within_the_budget() -> None:
    """The whole matrix of keys would take 320 MB; ru_maxrss would count the parent's memory."""
    code = """
import re, numpy as np, torch
from sketchfast.evaluate.retrieval import retrieval_scores
torch.set_num_threads(1)
def megabytes(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
rng = np.random.default_rng(0)
data = [rng.normal(size=(n, 16)).astype("f4") for n in (2000, 20000)]
labels = [rng.integers(0, 50, n) for n in (2000, 20000)]
retrieval_scores(data[0][:2], data[1][:50], labels[0][:2], labels[1][:50])
for chunk in (50, None, 2000):
    before = megabytes("VmRSS")
    retrieval_scores(*data, *labels, chunk=chunk)
    print(megabytes("VmHWM") - before)
"""
    small, default, whole = map(float, run_python(code).split())
    assert small < 50
    assert default < 270
    assert whole > 300  # the measure sees what it should


def test_import_is_light() -> None:
    code = """
import sketchfast.evaluate.retrieval
print([name for name in ("sklearn", "matplotlib", "PIL", "torchmetrics") if name in sys.modules])
"""
    assert run_python(code).strip() == "[]"


# --------------------------------------------------------------------------------------------------
# Pictures


def decoded(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


SKETCHES = np.full((3, 40, 40, 3), 255, np.uint8)
PHOTOS = np.random.default_rng(0).integers(90, 110, (6, 40, 60, 3), dtype=np.uint8)
INDEX = np.array([[0, 1, 2, 3], [5, 4, 3, 2], [1, 1, 1, 1]])
RIGHT = np.array([[True, False, True, False], [False] * 4, [True] * 4])


def test_retrieval_picture_frames_and_marks_each_photo() -> None:
    side = 64
    picture = decoded(retrieval_picture(SKETCHES, PHOTOS, INDEX, RIGHT, side=side))
    assert picture.shape == (
        16 + 24 + 3 * (side + 10) - 10 + 16,
        16 + side + 30 + 4 * (side + 10) - 10 + 16,
        3,
    )
    badges = {}
    for row in range(3):
        for rank in range(4):
            y, x = 40 + row * (side + 10), 16 + side + 30 + rank * (side + 10)
            cell = picture[y : y + side, x : x + side]
            colour = retrieval.GREEN if RIGHT[row, rank] else retrieval.RED
            frame = np.concatenate((cell[0], cell[:-16, -1], cell[:, 0]))
            assert (frame == colour).all()
            assert (picture[y - 1, x : x + side] == 255).all()
            badges.setdefault(bool(RIGHT[row, rank]), []).append((cell[-12:, -12:] > 200).all(-1))
    for same in badges.values():
        assert all((badge == same[0]).all() for badge in same)
        assert same[0].any()
    assert (badges[True][0] != badges[False][0]).any()  # told apart without colour


def test_retrieval_picture_grows_with_title_and_names() -> None:
    plain = decoded(retrieval_picture(SKETCHES, PHOTOS, INDEX, RIGHT))
    titled = decoded(retrieval_picture(SKETCHES, PHOTOS, INDEX, RIGHT, title="Nearest photos"))
    assert (titled.shape[0] - plain.shape[0], titled.shape[1]) == (33, plain.shape[1])
    wrapped = decoded(retrieval_picture(SKETCHES, PHOTOS, INDEX, RIGHT, title="Nearest photos " * 9))
    assert wrapped.shape[0] > titled.shape[0]
    assert wrapped.shape[1] == plain.shape[1]
    assert (wrapped[:, -8:] == 255).all()  # nothing runs out of the picture
    named = decoded(
        retrieval_picture(
            torch.from_numpy(SKETCHES),
            PHOTOS,
            torch.from_numpy(INDEX),
            torch.from_numpy(RIGHT),
            query_names=["dog", "horse", "a name much too long for the width of its photo"],
            gallery_names=["dog"] * 6,
        )
    )
    assert named.shape[0] - plain.shape[0] == 3 * 18
    below_first_sketch = named[40 + 112 : 40 + 112 + 18, 16 : 16 + 112]
    assert (below_first_sketch < 128).any()


def test_retrieval_picture_shows_the_photo_that_was_drawn() -> None:
    side = 64
    plain = decoded(retrieval_picture(SKETCHES, PHOTOS, INDEX, RIGHT, side=side))
    with_it = decoded(retrieval_picture(SKETCHES, PHOTOS, INDEX, RIGHT, side=side, match=INDEX[:, 2]))
    added = side + 10
    assert with_it.shape == (plain.shape[0], plain.shape[1] + added, 3)
    assert (with_it[40:, 16 + side + added :] == plain[40:, 16 + side :]).all()  # the rest moves over
    inner = slice(4, side - 20)  # within frames and badges
    for row in range(3):
        y, third = 40 + row * (side + 10), 16 + side + 30 + 2 * (side + 10)
        own = with_it[y : y + side, 16 + added : 16 + added + side][inner, inner]
        assert (own == plain[y : y + side, third : third + side][inner, inner]).all()
    with pytest.raises(ValueError, match="match must be 3 integers"):
        retrieval_picture(SKETCHES, PHOTOS, INDEX, RIGHT, match=[0])
    with pytest.raises(ValueError, match=r"match must lie in 0..5, got 0..6"):
        retrieval_picture(SKETCHES, PHOTOS, INDEX, RIGHT, match=[0, 1, 6])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query_images": SKETCHES / 255}, TypeError, "query_images must have dtype uint8, got float64"),
        ({"gallery_images": PHOTOS[..., 0]}, ValueError, r"gallery_images must have shape \[N, H, W, 3\]"),
        ({"index": INDEX[:2]}, ValueError, "index must have a row for each of the 3 query_images"),
        ({"index": INDEX + 1}, ValueError, r"index must lie in 0\.\.5, got 1\.\.6"),
        ({"index": INDEX * 1.0}, TypeError, "index must have an integer dtype"),
        ({"right": RIGHT[:, :3]}, ValueError, "right must have the shape of index"),
        ({"right": INDEX}, TypeError, "right must have dtype bool"),
        ({"gallery_names": ["dog"]}, ValueError, "gallery_names must hold 6 names, one an image, got 1"),
        ({"side": 10}, ValueError, "side must be at least 32"),
    ],
)
def test_retrieval_picture_refuses_bad_input(change: dict, error: type, message: str) -> None:
    arguments = {
        "query_images": SKETCHES,
        "gallery_images": PHOTOS,
        "index": INDEX,
        "right": RIGHT,
        **change,
    }
    with pytest.raises(error, match=message):
        retrieval_picture(**arguments)


NAMES = [f"class {number}" for number in range(CLASSES)]


def test_tsne_picture_is_seeded_and_sized() -> None:
    sketches, photos, sketch_labels, photo_labels = problem(30, 40)
    draw = lambda seed: tsne_picture(sketches, photos, sketch_labels, photo_labels, NAMES, seed=seed, most=25)  # noqa: E731
    first = draw(0)
    assert decoded(first).shape == (750, 1665, 3)
    assert first == draw(0)
    assert first != draw(1)
    ink = (decoded(first) < 250).any(-1)
    assert all(ink[100:700, left : left + 500].any() for left in (100, 850))  # points in both panels


def test_tsne_keeps_neighbours() -> None:
    vectors = np.repeat(np.eye(3, 16), 20, axis=0) + np.random.default_rng(0).normal(size=(60, 16)) * 0.02
    places = retrieval._tsne(vectors.astype(np.float32), 0)
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1)
    same = np.equal.outer(np.arange(60) // 20, np.arange(60) // 20)
    assert distance[same].max() < distance[~same].min()


def test_collapsed_vectors_can_be_drawn() -> None:
    labels = np.arange(12) % 3
    assert decoded(tsne_picture(np.ones((12, 4)), np.ones((12, 4)), labels, labels, NAMES)).ndim == 3


def test_points_are_chosen_evenly_by_class() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 5], [100, 40, 3, 20]))
    chosen = retrieval._evenly_by_class(labels, 43, seed=0)
    assert np.unique(labels[chosen], return_counts=True)[1].tolist() in (
        [14, 13, 3, 13],
        [13, 14, 3, 13],
        [13, 13, 3, 14],
    )
    assert (np.diff(chosen) > 0).all()
    assert chosen.tolist() != retrieval._evenly_by_class(labels, 43, seed=1).tolist()
    assert retrieval._evenly_by_class(labels, 1000, seed=0).tolist() == list(range(163))


def test_no_two_classes_look_the_same() -> None:
    looks = {tuple(retrieval._look(label).values()) for label in range(63)}
    assert len(looks) == 63


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"photo_labels": np.full(9, CLASSES)}, ValueError, r"photo_labels must lie in 0\.\.5, got 6\.\.6"),
        ({"sketch_labels": LABELS}, ValueError, r"sketch_labels must have shape \[4\]"),
        ({"photo_vectors": GALLERY[:, :3]}, ValueError, "photo_vectors must have the columns"),
        ({"sketch_vectors": QUERY * np.nan}, ValueError, "sketch_vectors must be finite"),
        ({"most": 1}, ValueError, "must be 4 or more together"),
        ({"most": 0}, ValueError, "most must be at least 1"),
    ],
)
def test_tsne_picture_refuses_bad_input(change: dict, error: type, message: str) -> None:
    arguments = {
        "sketch_vectors": QUERY,
        "photo_vectors": GALLERY,
        "sketch_labels": QUERY_LABELS,
        "photo_labels": LABELS,
        "class_names": NAMES,
        **change,
    }
    with pytest.raises(error, match=message):
        tsne_picture(**arguments)
