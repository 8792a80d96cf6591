"""Fine-grained retrieval: ranks against oracles, ties, and the measures of the photo topology paper."""

from __future__ import annotations

import io
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import sketchfast
from sketchfast.data.deform import Deformation, cut_to_share, deform
from sketchfast.data.procedural import CANVAS, draw_instance
from sketchfast.data.render import sketch_images
from sketchfast.evaluate import fine_grained
from sketchfast.evaluate.fine_grained import (
    PROBLEM_OF,
    SCENARIOS,
    EarlyRow,
    Thresholds,
    accuracy_at,
    area_under_curve,
    attribution_picture,
    early_retrieval,
    early_retrieval_picture,
    error_attribution,
    fidelity,
    match_ranks,
    nearest_photos,
    rank_percentile,
    robustness,
    smoothness,
)
from sketchfast.evaluate.retrieval import GREEN, RED, nearest
from sketchfast.testing import devices

METRICS = ["euclidean", "cosine"]


def problem(queries=40, gallery=30, width=6, seed=0):
    """Queries near their photos: query, gallery, match; several queries a photo, some photos without any."""
    rng = np.random.default_rng(seed)
    photos = rng.normal(size=(gallery, width)).astype(np.float32)
    match = rng.integers(0, gallery, queries)
    return (photos[match] + rng.normal(size=(queries, width))).astype(np.float32), photos, match


def exact_distances(query, gallery, metric):
    """Float64, each pair summed alike."""
    query, gallery = (np.asarray(side, np.float64) for side in (query, gallery))
    if metric == "euclidean":
        return np.sqrt(((query[:, None] - gallery[None]) ** 2).sum(-1))
    lengths = np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(gallery, axis=1)[None]
    return -(query[:, None] * gallery[None]).sum(-1) / np.where(lengths > 0, lengths, 1)


def exact_ranks(query, gallery, match, metric):
    distances = exact_distances(query, gallery, metric)
    gaps = np.diff(np.sort(distances, axis=1), axis=1)
    assert gaps[gaps > 1e-14].min() > 1e-6, "the float64 order must be plain in float32"
    own = distances[np.arange(len(match)), match]
    return [sum(d <= o + 1e-14 for d in row) - 1 for row, o in zip(distances, own, strict=True)]


# --------------------------------------------------------------------------------------------------
# Ranks and accuracies


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("chunk", [None, 1, 7, 1000])
def test_ranks_are_those_of_a_sort_in_float64(device, metric, chunk):
    query, gallery, match = problem()
    ranks = match_ranks(query, gallery, match, metric=metric, chunk=chunk, device=device)
    expected = exact_ranks(query, gallery, match, metric)
    assert ranks.dtype == torch.int64
    assert ranks.device.type == "cpu"
    assert ranks.tolist() == expected
    assert 0 in expected
    assert max(expected) > 5


@pytest.mark.parametrize("metric", METRICS)
def test_order_is_that_of_a_sort_in_float64(metric):
    query, gallery, match = problem()
    order = np.argsort(exact_distances(query, gallery, metric), axis=1)
    for k, chunk in ((1, None), (7, 3), (30, None)):
        got = nearest_photos(query, gallery, k, metric=metric, chunk=chunk)
        np.testing.assert_array_equal(got.numpy(), order[:, :k])
    ranks = match_ranks(query, gallery, match, metric=metric).numpy()
    assert (order[np.arange(len(match)), ranks] == match).all()


def test_cosine_agrees_with_the_category_level():
    query, gallery, _ = problem(seed=1)
    gallery[10:20] = gallery[:10] * 2  # ties
    expected = nearest(query, gallery, 30)[1]
    assert torch.equal(nearest_photos(query, gallery, 30, metric="cosine"), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_a_constant_embedding_finds_nothing(metric):
    """Every photo ties with the true one, and a tie counts against it."""
    query, gallery = np.ones((6, 5), np.float32), np.ones((12, 5), np.float32)
    ranks = match_ranks(query, gallery, np.arange(6), metric=metric)
    assert ranks.tolist() == [11] * 6
    assert accuracy_at(ranks) == {1: 0.0, 5: 0.0, 10: 0.0}
    assert nearest_photos(query, gallery, 3, metric=metric).tolist() == [[0, 1, 2]] * 6


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_photos_tie_in_every_dtype_and_chunk(metric, dtype):
    generator = torch.Generator().manual_seed(2)
    gallery = torch.randn(9, 33, generator=generator, dtype=torch.float64).to(dtype).repeat(3, 1)
    query = torch.randn(20, 33, generator=generator, dtype=torch.float64).to(dtype)
    match = torch.arange(20)
    ranks = match_ranks(query, gallery, match, metric=metric)
    for twin in (match + 9) % 27, (match + 18) % 27:
        assert torch.equal(match_ranks(query, gallery, twin, metric=metric, chunk=3), ranks)
    assert (ranks % 3 == 2).all()  # its two twins count against it, and the others come in threes


def test_near_copies_far_from_the_origin_keep_their_order():
    """The expansion |q|^2 - 2 q g + |g|^2 in float32 gives 0 for all of these."""
    gallery = 1000 + np.arange(8)[:, None] * np.full((1, 16), 2**-10)
    query = gallery + 2.0**-13
    assert match_ranks(query.astype("f4"), gallery.astype("f4"), np.arange(8)).tolist() == [0] * 8
    expanded = torch.cdist(
        torch.tensor(query.astype("f4")),
        torch.tensor(gallery.astype("f4")),
        compute_mode="use_mm_for_euclid_dist",
    )
    assert (expanded.argmin(dim=1) != torch.arange(8)).any()  # the case tells them apart


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1.0, 1e25, 1e37])
@pytest.mark.parametrize("metric", METRICS)
def test_no_scale_changes_a_rank(metric, scale):
    query, gallery, match = problem()
    expected = match_ranks(query, gallery, match, metric=metric)
    scaled = (np.asarray(side, np.float64) * scale for side in (query, gallery))
    assert torch.equal(match_ranks(*scaled, match, metric=metric), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_ranks_of_small_integers_are_exact(queries, photos, width, seed):
    """Many ties, all of them exact."""
    rng = np.random.default_rng(seed)
    query, gallery = (rng.integers(-2, 3, (n, width)) for n in (queries, photos))
    match = rng.integers(0, photos, queries)
    squared = ((query[:, None] - gallery[None]) ** 2).sum(-1)
    expected = (squared <= squared[np.arange(queries), match][:, None]).sum(1) - 1
    got = match_ranks(query.astype("f8"), gallery.astype("f4"), match)
    assert got.tolist() == expected.tolist()


def test_a_gallery_of_one_and_a_zero_vector():
    one = np.ones((1, 3), np.float32)
    assert match_ranks(-one, one, [0]).tolist() == [0]
    assert match_ranks(0 * one, np.eye(3, dtype=np.float32), [2], metric="cosine").tolist() == [2]


def test_accuracies_by_hand():
    ranks = torch.tensor([0, 0, 3, 4, 5, 9, 10, 99])
    assert accuracy_at(ranks) == {1: 0.25, 5: 0.5, 10: 0.75}
    assert accuracy_at(ranks.numpy(), (100, 2)) == {100: 1.0, 2: 0.25}
    assert rank_percentile([0, 4, 8], 9) == pytest.approx(0.5)
    assert rank_percentile([0], 1) == 1.0
    assert rank_percentile([98, 98], 99) == 0.0


def test_a_random_order_has_percentile_one_half():
    rng = np.random.default_rng(3)
    query, gallery = rng.normal(size=(4000, 4)), rng.normal(size=(50, 4))
    ranks = match_ranks(query, gallery, rng.integers(0, 50, 4000))
    assert rank_percentile(ranks, 50) == pytest.approx(0.5, abs=0.02)
    assert accuracy_at(ranks)[1] == pytest.approx(1 / 50, abs=0.01)


QUERY, GALLERY, MATCH = problem(5, 9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": QUERY.astype(int)}, TypeError, "query must have a floating dtype, got int64"),
        ({"query": QUERY[0]}, ValueError, r"query must have shape \[N, D\]"),
        ({"query": np.full_like(QUERY, np.nan)}, ValueError, "query must be finite, got NaN or infinity"),
        ({"gallery": GALLERY * np.inf}, ValueError, "gallery must be finite, got NaN or infinity"),
        ({"gallery": GALLERY[:, :3]}, ValueError, "gallery must have the 6 columns of query"),
        ({"gallery": GALLERY[:0]}, ValueError, r"gallery must have shape \[N, D\]"),
        ({"match": MATCH.astype(float)}, TypeError, "match must have an integer dtype"),
        ({"match": MATCH[:3]}, ValueError, r"match must have shape \[5\]"),
        ({"match": MATCH - 20}, ValueError, r"match must lie in 0..8, got -"),
        ({"match": np.full(5, 9)}, ValueError, r"match must lie in 0..8, got 9..9"),
        ({"metric": "dot"}, ValueError, "metric must be one of 'euclidean', 'cosine', got 'dot'"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("metric", METRICS)
def test_bad_input_of_match_ranks_is_refused_by_name(change, error, message, metric):
    with pytest.raises(error, match=message):
        match_ranks(**{"query": QUERY, "gallery": GALLERY, "match": MATCH, "metric": metric, **change})


def test_bad_input_of_the_small_ones_is_refused_by_name():
    with pytest.raises(ValueError, match="k must be at most 9, got 10"):
        nearest_photos(QUERY, GALLERY, 10)
    with pytest.raises(TypeError, match="ranks must have an integer dtype, got float64"):
        accuracy_at([0.5])
    with pytest.raises(ValueError, match="ranks must have shape"):
        accuracy_at(np.zeros(0, int))
    with pytest.raises(ValueError, match="ranks must be 0 or more, got -1"):
        accuracy_at([-1])
    with pytest.raises(ValueError, match=r"tops\[1\] must be at least 1, got 0"):
        accuracy_at([1], (1, 0))
    with pytest.raises(ValueError, match="tops must hold"):
        accuracy_at([1], ())
    with pytest.raises(ValueError, match="ranks must be below gallery, 9, got 9"):
        rank_percentile([9], 9)


def run_python(code: str) -> str:
    root = str(Path(sketchfast.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {root!r})\n{code}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any op gives while it is entered."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("metric", METRICS)
def test_no_tensor_grows_with_queries_times_gallery(metric):
    rng = np.random.default_rng(0)
    query, gallery = (rng.normal(size=(n, 2)).astype("f4") for n in (200, 40_000))
    with LargestTensor() as default:
        match_ranks(query, gallery, np.arange(200), metric=metric)
        nearest_photos(query, gallery, 3, metric=metric)
    assert default.elements <= 2**20
    with LargestTensor() as whole:
        match_ranks(query, gallery, np.arange(200), metric=metric, chunk=200)
    assert whole.elements == 200 * 40_000  # the measure sees what it should


def test_import_is_light():
    code = """
import sketchfast.evaluate.fine_grained
print([name for name in ("sklearn", "matplotlib", "PIL", "torchmetrics") if name in sys.modules])
"""
    assert run_python(code).strip() == "[]"


# --------------------------------------------------------------------------------------------------
# Smoothness and fidelity


def test_smoothness_and_fidelity_by_hand():
    features = np.array([[2.0, 0], [0, 5], [-1, 0], [3, 0]])  # of length 1: east, north, west, east
    assert smoothness(features, [[0, 3]]) == pytest.approx([0], abs=1e-15)
    assert smoothness(features, [[0, 1], [0, 2]]) == pytest.approx([2, 4])
    assert smoothness(features, [[0, 1, 2]]) == pytest.approx([(2 + 4 + 2) / 3])
    assert fidelity(features, [[0, 1, 2]], [3]) == pytest.approx([(0 + math.sqrt(2) + 2) / 3])
    assert fidelity(features, [[1], [3]], [1, 2]) == pytest.approx([0, 2])


@pytest.mark.parametrize("width", [3, 70_000])  # of the second, each block holds a row or two
def test_smoothness_and_fidelity_are_the_loops(width):
    rng = np.random.default_rng(4)
    features = rng.normal(size=(12, width)).astype(np.float32)
    index = np.array([rng.permutation(12)[:10] for _ in range(7)])
    match = rng.integers(0, 12, 7)
    unit = features.astype(float) / np.linalg.norm(features.astype(float), axis=1, keepdims=True)
    smooth = [
        np.mean([((unit[a] - unit[b]) ** 2).sum() for a, b in itertools.combinations(row, 2)])
        for row in index
    ]
    near = [
        np.mean([np.linalg.norm(unit[a] - unit[m]) for a in row]) for row, m in zip(index, match, strict=True)
    ]
    np.testing.assert_allclose(smoothness(features, index), smooth, rtol=1e-12)
    np.testing.assert_allclose(fidelity(torch.tensor(features), index, match), near, rtol=1e-6)


def test_near_copies_keep_their_distance():
    """In float32, or by 2 - 2 cos, nothing would be left of 1e-10."""
    features = np.array([[1.0, 0], [1.0, 1e-10]])
    assert smoothness(features, [[0, 1]]) == pytest.approx([1e-20], rel=1e-6)
    assert fidelity(features, [[0]], [1]) == pytest.approx([1e-10], rel=1e-6)


def test_length_of_features_and_order_do_not_count():
    rng = np.random.default_rng(5)
    features, index = rng.normal(size=(9, 4)), np.array([[1, 5, 7], [0, 2, 8]])
    stretched = features * rng.uniform(1e-200, 1e200, (9, 1))
    np.testing.assert_allclose(smoothness(stretched, index), smoothness(features, index))
    np.testing.assert_allclose(smoothness(features, index[:, ::-1]), smoothness(features, index))
    assert np.isfinite(smoothness(np.zeros((9, 4)), index)).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": np.ones((4, 2), int)}, TypeError, "features must have a floating dtype"),
        ({"features": np.full((4, 2), np.nan)}, ValueError, "features must be finite"),
        ({"index": [[0, 4]]}, ValueError, r"index must lie in 0..3, got 0..4"),
        ({"index": [[-1, 0]]}, ValueError, r"index must lie in 0..3, got -1..0"),
        ({"index": [[0]]}, ValueError, r"index must have shape \[Q, k\], k at least 2, got \(1, 1\)"),
        ({"index": [0, 1]}, ValueError, r"index must have shape \[Q, k\]"),
        ({"index": [[0.0, 1.0]]}, TypeError, "index must have an integer dtype"),
    ],
)
def test_bad_input_of_smoothness_is_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        smoothness(**{"features": np.ones((4, 2)), "index": [[0, 1]], **change})


# --------------------------------------------------------------------------------------------------
# Early retrieval and robustness

DRAWINGS = [draw_instance(name, i) for name in ("house", "castle") for i in range(12)]
OWN = np.arange(len(DRAWINGS))
DRAWN = {"canvas": CANVAS, "size": 48}


def coarse_ink(images: np.ndarray) -> np.ndarray:
    """A stand-in for a model: the ink of each cell of 4 x 4 pixels."""
    assert images.dtype == np.uint8
    assert images.shape[1:] == (48, 48, 3)
    return (
        (255.0 - images[..., 0]).reshape(len(images), 12, 4, 12, 4).mean(axis=(2, 4)).reshape(len(images), -1)
    )


PHOTOS = coarse_ink(sketch_images(DRAWINGS, 48, canvas=CANVAS))  # "photos" that are the finished drawings


def test_early_retrieval_is_the_ranking_of_the_parts():
    rows = early_retrieval(coarse_ink, DRAWINGS, PHOTOS, OWN, shares=(0.25, 0.6, 1), tops=(1, 3), **DRAWN)
    assert [row.share for row in rows] == [0.25, 0.6, 1]
    for row in rows:
        parts = [cut_to_share(drawing, row.share) for drawing in DRAWINGS]
        ranks = match_ranks(coarse_ink(sketch_images(parts, 48, canvas=CANVAS)), PHOTOS, OWN)
        assert row.accuracy == accuracy_at(ranks, (1, 3))
        assert row.percentile == rank_percentile(ranks, len(DRAWINGS))
    assert rows[-1] == EarlyRow(1.0, {1: 1.0, 3: 1.0}, 1.0)
    assert rows[0].accuracy[1] < 0.5 < rows[1].percentile
    assert rows[0].percentile < rows[1].percentile


def test_batches_change_nothing_and_hold_what_they_should():
    sizes = []

    def embed(images):
        sizes.append(len(images))
        return torch.from_numpy(coarse_ink(images)).float()

    rows = early_retrieval(embed, DRAWINGS, PHOTOS, OWN, shares=(0.5,), batch=10, **DRAWN)
    assert sizes == [10, 10, 4]
    assert rows == early_retrieval(embed, DRAWINGS, PHOTOS, OWN, shares=(0.5,), **DRAWN)


def test_blank_sketches_find_nothing():
    """At share 0 all queries are one blank image, whose nearest photo is that of one query at most."""
    (row,) = early_retrieval(coarse_ink, DRAWINGS, PHOTOS, OWN, shares=(0.0,), **DRAWN)
    assert row.accuracy[1] <= 1 / len(DRAWINGS)
    assert row.percentile == pytest.approx(0.5, abs=1e-9)  # every rank once


def test_area_under_the_curve_by_hand():
    rows = [EarlyRow(0.0, {1: 0.0}, 0.5), EarlyRow(0.5, {1: 0.4}, 0.5), EarlyRow(1.0, {1: 0.6}, 0.9)]
    assert area_under_curve(rows, 1) == pytest.approx(0.5 * 0.2 + 0.5 * 0.5)
    assert area_under_curve(rows) == pytest.approx(0.5 * 0.5 + 0.5 * 0.7)
    assert area_under_curve(rows[1:], 1) == pytest.approx(0.5)  # over the shares there are
    assert area_under_curve(rows[1:2], 1) == 0.4
    with pytest.raises(ValueError, match=r"top must be one of \[1\], got 5"):
        area_under_curve(rows, 5)
    with pytest.raises(ValueError, match="rows must hold at least one"):
        area_under_curve([])
    with pytest.raises(ValueError, match="shares must increase"):
        area_under_curve(rows[::-1])


def test_robustness_is_the_drop_of_each_version():
    deformation = Deformation(rotate=15, translate=0.05, width=2)
    got = robustness(
        coarse_ink, DRAWINGS, PHOTOS, OWN, versions=3, deformation=deformation, seed=5, batch=7, **DRAWN
    )
    expected = []
    for version in range(3):
        drawn = [
            deform(drawing, deformation, np.random.default_rng((5, version, i)), CANVAS)
            for i, drawing in enumerate(DRAWINGS)
        ]
        images = sketch_images([d.sketch for d in drawn], 48, canvas=CANVAS, widths=[d.widths for d in drawn])
        expected.append(accuracy_at(match_ranks(coarse_ink(images), PHOTOS, OWN))[1])
    assert got.accuracy == 1
    assert got.deformed == tuple(expected)
    assert len(set(expected)) > 1
    assert got.drops == pytest.approx([100 * (1 - accuracy) for accuracy in expected])
    assert 5 < got.mean < 95
    assert got.mean == pytest.approx(np.mean(got.drops))
    assert got.deviation == pytest.approx(np.std(got.drops, ddof=1))


def test_robustness_is_relative_to_the_undeformed():
    """Half of the photos are wrong: what is lost of the rest counts against the rest alone."""
    photos = PHOTOS.copy()
    photos[::2] = 1e3
    half = robustness(coarse_ink, DRAWINGS, photos, OWN, versions=2, **DRAWN)
    assert half.accuracy == 0.5
    assert half.drops == pytest.approx([100 * (0.5 - a) / 0.5 for a in half.deformed])


def test_no_deformation_costs_nothing_and_width_alone_something():
    none = {"rotate": 0, "scale": 0, "translate": 0, "clip": 0}
    still = robustness(
        coarse_ink, DRAWINGS, PHOTOS, OWN, versions=2, deformation=Deformation(width=1, **none), **DRAWN
    )
    assert still == (1.0, (1.0, 1.0), (0.0, 0.0), 0.0, 0.0)
    seen = []

    def embed(images):
        seen.append(images)
        return coarse_ink(images)

    robustness(embed, DRAWINGS, PHOTOS, OWN, versions=1, deformation=Deformation(width=3, **none), **DRAWN)
    assert (seen[0] != seen[1]).any(axis=(1, 2, 3)).sum() > len(DRAWINGS) / 2  # widths reach the images


def test_every_model_gets_the_same_sketches():
    seen = []

    def keeps(images):
        seen.append(images.copy())
        return coarse_ink(images)

    for seed in (0, 0, 1):
        robustness(keeps, DRAWINGS, PHOTOS, OWN, versions=2, seed=seed, **DRAWN)
    runs = [seen[i : i + 3] for i in (0, 3, 6)]
    for first, again in zip(runs[0], runs[1], strict=True):
        np.testing.assert_array_equal(first, again)
    assert (runs[0][1] != runs[0][2]).any()  # versions differ
    assert (runs[0][1] != runs[2][1]).any()  # seeds differ
    fewer = len(seen)
    robustness(keeps, DRAWINGS[:3], PHOTOS, OWN[:3], versions=1, **DRAWN)
    np.testing.assert_array_equal(seen[fewer + 1], runs[0][1][:3])  # whichever others there are


def test_nothing_to_lose():
    lost = robustness(coarse_ink, DRAWINGS, np.ones_like(PHOTOS), OWN, versions=2, **DRAWN)
    assert lost.accuracy == 0
    assert all(map(math.isnan, (*lost.drops, lost.mean, lost.deviation)))
    assert math.isnan(robustness(coarse_ink, DRAWINGS, PHOTOS, OWN, versions=1, **DRAWN).deviation)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embed": 3}, TypeError, "embed must be callable, got 3"),
        ({"strokes": [(DRAWINGS[0], 1)]}, TypeError, r"strokes\[0\] must be a Sketch, got tuple"),
        ({"strokes": []}, ValueError, "strokes must hold at least one sketch"),
        ({"match": OWN[:-1]}, ValueError, r"match must have shape \[24\]"),
        ({"match": OWN + 1}, ValueError, r"match must lie in 0..23, got 1..24"),
        ({"gallery": PHOTOS * np.nan}, ValueError, "gallery must be finite"),
        ({"canvas": 0}, ValueError, "canvas must be greater than 0"),
        ({"size": 0}, ValueError, "size must be at least 1"),
        ({"metric": "dot"}, ValueError, "metric must be one of"),
        ({"line_width": -1}, ValueError, "line_width must be greater than 0"),
        ({"batch": 0}, ValueError, "batch must be at least 1"),
    ],
)
@pytest.mark.parametrize("function", [early_retrieval, robustness])
def test_bad_input_is_refused_before_anything_is_embedded(function, change, error, message):
    def never(images):
        raise AssertionError("embedded")

    arguments = {"embed": never, "strokes": DRAWINGS, "gallery": PHOTOS, "match": OWN, **DRAWN}
    with pytest.raises(error, match=message):
        function(**{**arguments, **change})


def test_shares_versions_and_embeddings_are_checked():
    common = (DRAWINGS, PHOTOS, OWN)
    for shares, message in (((), "shares must hold"), ((0.5, 0.5), "increase"), ((0.5, 1.1), "within")):
        with pytest.raises(ValueError, match=message):
            early_retrieval(coarse_ink, *common, shares=shares, **DRAWN)
    with pytest.raises(ValueError, match=r"shares\[0\] must be at least 0, got -1"):
        early_retrieval(coarse_ink, *common, shares=(-1, 1), **DRAWN)
    with pytest.raises(ValueError, match=r"tops\[0\] must be at least 1"):
        early_retrieval(coarse_ink, *common, tops=(0,), **DRAWN)
    with pytest.raises(ValueError, match="versions must be at least 1, got 0"):
        robustness(coarse_ink, *common, versions=0, **DRAWN)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        robustness(coarse_ink, *common, seed=-1, **DRAWN)
    with pytest.raises(TypeError, match="deformation must be a Deformation, got 'strong'"):
        robustness(coarse_ink, *common, deformation="strong", **DRAWN)
    with pytest.raises(ValueError, match=r"embed must give vectors \[24, 144\].*got shape \(24, 143\)"):
        robustness(lambda images: coarse_ink(images)[:, 1:], *common, **DRAWN)
    with pytest.raises(ValueError, match="the vectors of embed must be finite"):
        robustness(lambda images: coarse_ink(images) * np.nan, *common, **DRAWN)


# --------------------------------------------------------------------------------------------------
# Error attribution

# photos on a circle, by their angle in degrees; those of a list 0 to 5 apart are alike
ANGLES = np.array([0, 1, 2, 3, 4, 5, 90, 91, 92, 93, 94, 95, 60, 150, 240, 330])
ON_CIRCLE = np.stack([np.cos(np.deg2rad(ANGLES)), np.sin(np.deg2rad(ANGLES))], axis=1)
ALIKE, SCATTERED = [1, 2, 3, 4, 5], [6, 12, 13, 14, 15]
LIMITS = Thresholds(smoothness_ours=0.5, smoothness_base=0.5, fidelity_ours=0.8)


@pytest.mark.parametrize(
    ("ours", "base", "truth", "scenario", "problem"),
    [
        (SCATTERED, ALIKE, 0, 1, "user"),
        (SCATTERED, SCATTERED, 0, 1, "user"),
        (ALIKE, ALIKE, 0, 2, "model"),
        (ALIKE, SCATTERED, 0, 2, "model"),
        (ALIKE, SCATTERED, 6, 3, "model"),
        (ALIKE, ALIKE, 6, 4, "user"),
    ],
)
def test_each_scenario(ours, base, truth, scenario, problem):
    found = error_attribution([1], [truth], [ours], [base], ON_CIRCLE, thresholds=LIMITS)
    assert found.wrong.tolist() == [0]
    assert found.scenario.tolist() == [scenario]
    assert found.problem == [problem]
    assert found.counts == {s: int(s == scenario) for s in SCENARIOS}
    assert found.problem_counts == {p: int(p == problem) for p in ("user", "model", "unattributed")}
    assert found.thresholds == LIMITS


def test_large_smoothness_with_small_fidelity_is_left_unattributed():
    """The paper names no scenario; here the lists differ, but on both sides of the true photo."""
    limits = LIMITS._replace(fidelity_ours=2.0)
    found = error_attribution([1], [0], [SCATTERED], [ALIKE], ON_CIRCLE, thresholds=limits)
    assert found.scenario.tolist() == [0]
    assert found.problem == ["unattributed"]
    assert found.counts[0] == found.problem_counts["unattributed"] == 1


def random_lists(queries=60, seed=6):
    rng = np.random.default_rng(seed)
    lists = [np.array([rng.permutation(40)[:8] for _ in range(queries)]) for _ in range(2)]
    return rng.integers(0, 4, queries), rng.integers(0, 40, queries), *lists, rng.normal(size=(40, 3))


def test_thresholds_are_the_medians_over_all_queries_and_scores_those_of_the_top():
    ranks, match, ours, base, features = random_lists()
    found = error_attribution(ranks, match, ours, base, features)
    np.testing.assert_allclose(found.smoothness_ours, smoothness(features, ours[:, :5]), rtol=1e-12)
    np.testing.assert_allclose(found.smoothness_base, smoothness(features, base[:, :5]), rtol=1e-12)
    np.testing.assert_allclose(found.fidelity_ours, fidelity(features, ours[:, :5], match), rtol=1e-12)
    scores = (found.smoothness_ours, found.smoothness_base, found.fidelity_ours)
    assert found.thresholds == tuple(np.median(score) for score in scores)
    assert found.wrong.tolist() == np.flatnonzero(ranks).tolist()
    assert sum(found.counts.values()) == sum(found.problem_counts.values()) == len(found.wrong) < len(ranks)
    assert min(found.counts.values()) > 0
    for query, scenario, problem in zip(found.wrong, found.scenario, found.problem, strict=True):
        s, b, f = (score[query] > limit for score, limit in zip(scores, found.thresholds, strict=True))
        expected = {(1, 1): 1, (0, 0): 2, (1, 0): 0}.get((s, f), 3 if b else 4)
        assert scenario == expected
        assert problem == PROBLEM_OF[expected]


def test_found_thresholds_can_be_passed_on():
    ranks, match, ours, base, features = random_lists()
    found = error_attribution(ranks, match, ours, base, features)
    half = slice(0, 30)
    again = error_attribution(
        ranks[half], match[half], ours[half], base[half], features, thresholds=found.thresholds
    )
    np.testing.assert_array_equal(again.scenario, found.scenario[found.wrong < 30])


def test_without_errors_there_is_nothing_to_attribute():
    _, match, ours, base, features = random_lists(5)
    found = error_attribution(np.zeros(5, int), match, ours, base, features)
    assert len(found.wrong) == len(found.scenario) == len(found.problem) == 0
    assert set(found.counts.values()) == {0}


def test_a_score_equal_to_its_threshold_is_small():
    """With one query every score is its own median."""
    found = error_attribution([3], [0], [SCATTERED], [SCATTERED], ON_CIRCLE)
    assert found.scenario.tolist() == [2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ranks": [0.5]}, TypeError, "ranks must have an integer dtype"),
        ({"match": [16]}, ValueError, r"match must lie in 0..15, got 16..16"),
        ({"ours": [ALIKE[:4]]}, ValueError, r"ours must have shape \[Q, k\], k at least 5"),
        ({"base": [ALIKE, ALIKE]}, ValueError, "base must have a row for each of the 1 ranks"),
        ({"base": [[99] * 5]}, ValueError, r"base must lie in 0..15"),
        ({"features": ON_CIRCLE * np.nan}, ValueError, "features must be finite"),
        ({"top": 1}, ValueError, "top must be at least 2, got 1"),
        (
            {"thresholds": Thresholds(0.1, float("nan"), 0.1)},
            ValueError,
            "thresholds.smoothness_base must be finite",
        ),
    ],
)
def test_bad_input_of_error_attribution_is_refused_by_name(change, error, message):
    arguments = {"ranks": [1], "match": [0], "ours": [ALIKE], "base": [ALIKE], "features": ON_CIRCLE}
    with pytest.raises(error, match=message):
        error_attribution(**{**arguments, **change})


# --------------------------------------------------------------------------------------------------
# Pictures


def decoded(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def curve(height: float, tops=(1, 5)) -> list[EarlyRow]:
    return [EarlyRow(s, dict.fromkeys(tops, height * s), 0.5 + height * s / 2) for s in (0.2, 0.6, 1.0)]


def test_early_retrieval_picture_shows_each_curve():
    one = decoded(early_retrieval_picture({"ours": curve(0.8)}))
    two = decoded(early_retrieval_picture({"ours": curve(0.8), "base": curve(0.5)}))
    colour = np.array([0xCC, 0x66, 0x77])  # of the second curve
    close = lambda picture: (np.abs(picture.astype(int) - colour).max(axis=2) < 8).sum()  # noqa: E731
    assert close(one) == 0
    assert close(two) > 300
    titled = decoded(early_retrieval_picture({"ours": curve(0.8)}, title="Shoes"))
    assert titled.shape[0] > one.shape[0]
    wide = decoded(early_retrieval_picture({"ours": curve(0.8, tops=(1, 5, 10))}))
    assert wide.shape[1] > one.shape[1]
    nothing_found = decoded(early_retrieval_picture({"ours": curve(0.0)}))
    assert nothing_found.shape == one.shape


def test_curves_of_the_picture_are_checked():
    with pytest.raises(ValueError, match="curves must be 1 to 9, got 0"):
        early_retrieval_picture({})
    with pytest.raises(ValueError, match="curves must have rows, all with the same k"):
        early_retrieval_picture({"a": curve(1.0), "b": curve(1.0, tops=(1,))})
    with pytest.raises(ValueError, match="curves must have rows"):
        early_retrieval_picture({"a": curve(1.0), "b": []})


def test_attribution_picture_groups_by_scenario():
    ranks, match, ours, base, features = random_lists()
    found = error_attribution(ranks, match, ours, base, features)
    queries = np.full((60, 20, 20, 3), 255, np.uint8)
    photos = np.full((40, 20, 30, 3), 100, np.uint8)
    side = 48
    heights = []
    for rows in (1, 2):
        picture = decoded(attribution_picture(queries, photos, ours, match, found, rows=rows, side=side))
        heights.append(len(picture))
        shown = sum(min(rows, count) for count in found.counts.values())
        groups = sum(count > 0 for count in found.counts.values())
        assert picture.shape == (36 + shown * (side + 10) + groups * 40, 32 + 7 * side + 10 + 30 + 40, 3)
        first = found.wrong[found.scenario == 1][0]
        for rank in range(5):  # the first row: a photo is framed as right only if it is the true one
            x = 16 + 2 * side + 10 + 30 + rank * (side + 10)
            colour = GREEN if ours[first, rank] == match[first] else RED
            assert (picture[36 + 30, x : x + side] == colour).all()
        assert (picture[36 + 30, 16 + side + 10 : 16 + 2 * side + 10] == GREEN).all()  # its photo
    assert heights[0] < heights[1]


def test_attribution_picture_is_checked():
    ranks, match, ours, base, features = random_lists(5)
    found = error_attribution(ranks + 1, match, ours, base, features)
    queries, photos = np.zeros((5, 8, 8, 3), np.uint8), np.zeros((40, 8, 8, 3), np.uint8)
    assert decoded(attribution_picture(queries, photos, ours, match, found)).ndim == 3
    with pytest.raises(ValueError, match="ours must have a row for each of the 5 query_images"):
        attribution_picture(queries, photos, ours[:4], match, found)
    with pytest.raises(ValueError, match=r"ours must lie in 0..2"):
        attribution_picture(queries, photos[:3], ours, match, found)
    with pytest.raises(TypeError, match="query_images must have dtype uint8"):
        attribution_picture(queries / 2, photos, ours, match, found)
    with pytest.raises(ValueError, match="side must be at least 32, got 8"):
        attribution_picture(queries, photos, ours, match, found, side=8)
    none = error_attribution(ranks * 0, match, ours, base, features)
    with pytest.raises(ValueError, match="attribution must be of these 5 queries, one or more of them wrong"):
        attribution_picture(queries, photos, ours, match, none)


def test_scenarios_and_problems_name_the_same():
    assert set(SCENARIOS) == set(PROBLEM_OF) == {0, 1, 2, 3, 4}
    assert fine_grained._scenario_heading(4, 2, 9).startswith(
        "Scenario 4 (2 of 9 errors, the user's problem)"
    )
