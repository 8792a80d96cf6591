"""Probe scenes hold what they say, measures have known answers, pictures show what they are given."""

from __future__ import annotations

import io
import itertools
import sys

import numpy as np
import pytest
from PIL import Image

from sketchfast.data.dataset import StrokeDataset
from sketchfast.data.strokes import Sketch, from_strokes, to_strokes
from sketchfast.evaluate import probes
from sketchfast.evaluate.probes import Components, GridRow, Head, Panel

SHAPES = ("circle", "square")
BOX = [[0, 0], [4, 0], [4, 4], [0, 4], [0, 0]]


def boxes(sketch: Sketch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Centre and sides of each stroke; shapes drawn by rule are one stroke each."""
    strokes = to_strokes(sketch)
    return [((s.min(axis=0) + s.max(axis=0)) / 2, np.ptp(s, axis=0)) for s in strokes]


def dataset(**classes: list[Sketch]) -> StrokeDataset:
    sketches = [sketch for of_class in classes.values() for sketch in of_class]
    labels = np.repeat(np.arange(len(classes)), [len(of_class) for of_class in classes.values()])
    return StrokeDataset.from_sketches(sketches, labels, list(classes))


# --- components and scenes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", probes.RULES)
def test_shapes_by_rule_fill_their_box_and_repeat(shape: str) -> None:
    drawn = [Components().draw(shape, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    for sketch in drawn:
        np.testing.assert_allclose(sketch.points.min(axis=0), -0.5, atol=1e-6)
        np.testing.assert_allclose(sketch.points.max(axis=0), 0.5, atol=1e-6)
        assert len(to_strokes(sketch)) == 1
    assert drawn[0].points.tobytes() == drawn[1].points.tobytes() != drawn[2].points.tobytes()


def test_a_class_of_the_data_comes_before_the_rule() -> None:
    slash = from_strokes([[[0, 0], [2, 2.1], [4, 4]]])
    flat = from_strokes([[[0, 0], [9, 0], [9, 1], [0, 1]]])
    dot = from_strokes([[[1, 1], [1, 1]]])
    components = Components(dataset(square=[slash, from_strokes([BOX]), flat, dot], triangle=[slash]))
    assert components.rows("square").tolist() == [1]  # the others would be no square in a square box
    assert components.rows("circle").tolist() == components.rows("triangle").tolist() == []
    drawn = components.draw("square", np.random.default_rng(0))
    assert drawn.points.tolist() == [[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5]]
    assert components.about("square", "circle") == "square: 1 drawings, circle: drawn by rule"
    components.check("shapes", "square", "triangle")
    with pytest.raises(
        ValueError, match="shapes must name classes of the data or of circle, square, triangle"
    ):
        components.check("shapes", "square", "hexagon")


def test_numerosity_counts_its_components() -> None:
    probe = probes.numerosity(Components(), SHAPES, most=3, examples=5, seed=0)
    assert probe.names == ["1 circle", "2 circles", "3 circles", "1 square", "2 squares", "3 squares"]
    assert [len(to_strokes(sketch)) for sketch in probe.sketches] == np.repeat([1, 2, 3, 1, 2, 3], 5).tolist()
    assert probe.labels.tolist() == np.repeat(np.arange(6), 5).tolist()
    for sketch, label in zip(probe.sketches, probe.labels, strict=True):
        found = boxes(sketch)
        for (below, wide), (above, narrow) in itertools.pairwise(found):
            if label < 3:  # stacked: each above the last one
                assert above[1] + narrow[1] / 2 < below[1]
            else:  # nested: each within the last one
                assert (np.abs(above - below) + narrow / 2 < wide / 2).all()


def test_placement_puts_the_first_where_it_says() -> None:
    probe = probes.placement(Components(), SHAPES, examples=6, seed=1)
    away = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    assert probe.names == [f"circle {side} square" for side in away]
    for sketch, label in zip(probe.sketches, probe.labels, strict=True):
        (first, sides), (second, others) = boxes(sketch)
        axis = np.abs(list(away.values())[label]).argmax()
        assert np.sign((first - second)[axis]) == list(away.values())[label][axis]
        assert abs((first - second)[axis]) > 0.95 * (sides + others)[axis] / 2  # they hardly overlap
        assert abs((first - second)[1 - axis]) < 0.2


def test_containment_holds_one_in_the_other_or_none() -> None:
    probe = probes.containment(Components(), SHAPES, examples=6, seed=2)
    assert probe.names == ["circle in square", "square in circle", "side by side"]
    for sketch, label in zip(probe.sketches, probe.labels, strict=True):
        (outer, wide), (inner, narrow) = boxes(sketch)
        within = bool((np.abs(inner - outer) + narrow / 2 < wide / 2).all())
        apart = abs(inner - outer)[0] > (wide + narrow)[0] / 2
        assert (within, apart) == ((label < 2), (label == 2))


def test_spatial_values_are_those_of_the_scenes() -> None:
    for probe in (probes.distance(Components(), SHAPES, 12, 0), probes.angle(Components(), SHAPES, 12, 0)):
        away = np.array([boxes(s)[1][0] - boxes(s)[0][0] for s in probe.sketches])
        if probe.variable == "distance":
            found, expected = np.hypot(*away.T), np.linspace(1.1, 3.5, 12)
        else:
            found, expected = np.degrees(np.arctan2(-away[:, 1], away[:, 0])), np.linspace(0, 180, 12)
        np.testing.assert_allclose(probe.values, expected)
        np.testing.assert_allclose(found % 360, probe.values, atol=1e-3)
    size = probes.size(Components(), SHAPES, 12, 0)
    ratio = [boxes(sketch)[1][1] / boxes(sketch)[0][1] for sketch in size.sketches]
    np.testing.assert_allclose(ratio, np.repeat(size.values[:, None], 2, axis=1), rtol=1e-4)


def test_scenes_repeat_for_a_seed() -> None:
    for make in (probes.placement, probes.containment, probes.distance, probes.angle, probes.size):
        points = [
            np.concatenate([s.points for s in make(Components(), SHAPES, 4, seed).sketches])
            for seed in (7, 7, 8)
        ]
        assert points[0].tobytes() == points[1].tobytes() != points[2].tobytes()


# --- measures ----------------------------------------------------------------------------------------------


def clusters(seed: int = 0, apart: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat(np.arange(3), 20)
    centres = apart * np.random.default_rng(9).standard_normal((3, 6))
    return centres[labels] + np.random.default_rng(seed).standard_normal((60, 6)), labels


def test_neighbour_accuracy_of_known_sets() -> None:
    vectors, labels = clusters()
    assert probes.neighbour_accuracy(vectors, labels) == 1.0
    mixed = [
        probes.neighbour_accuracy(vectors, np.random.default_rng(seed).permutation(labels))
        for seed in range(20)
    ]
    assert abs(np.mean(mixed) - 1 / 3) < 0.06
    line = np.array([[0.0], [1.0], [2.1], [3.3], [4.6]])
    # leave-one-out with one neighbour: 0 -> 1, 1 -> 0, 2.1 -> 1, 3.3 -> 2.1, 4.6 -> 3.3
    assert probes.neighbour_accuracy(line, np.array([0, 0, 1, 1, 0]), k=1) == 3 / 5
    # two of two tie wherever they differ: the nearest counts
    assert probes.neighbour_accuracy(line, np.array([0, 0, 1, 1, 0]), k=2) == 3 / 5
    with pytest.raises(ValueError, match="vectors must have at least 6 rows, got 5"):
        probes.neighbour_accuracy(line, np.zeros(5, np.int64))


def test_silhouette_of_known_sets() -> None:
    vectors, labels = clusters()
    assert probes.silhouette(vectors, labels) > 0.8
    assert abs(probes.silhouette(vectors, np.random.default_rng(0).permutation(labels))) < 0.1


def test_explained_variance_of_known_variables() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((200, 8))
    values = vectors @ rng.standard_normal(8)
    assert probes.explained_variance(vectors, values) > 0.999
    noisy = values + values.std() * rng.standard_normal(200)
    assert 0.35 < probes.explained_variance(vectors, noisy) < 0.6
    assert probes.explained_variance(vectors, rng.standard_normal(200)) < 0.05
    # held out: more columns than rows explain nothing of noise
    assert probes.explained_variance(rng.standard_normal((50, 200)), rng.standard_normal(50)) < 0.2
    again = [probes.explained_variance(vectors, noisy, seed=seed) for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_axis_correlation_of_known_planes() -> None:
    values = np.linspace(0, 1, 50)
    line = np.stack((3 * values, -2 * values**3), axis=1)
    assert probes.axis_correlation(line, values) == pytest.approx(1)
    assert probes.axis_correlation(-line, values) == pytest.approx(1)
    turned = np.stack((np.abs(values - 0.5) * 9, values), axis=1)  # goes and comes back along the long axis
    assert probes.axis_correlation(turned, values) < 0.2
    assert probes.axis_correlation(np.ones((50, 2)), values) == 0.0


def test_own_nearest_counts_rows_that_find_themselves() -> None:
    own = np.eye(4)
    assert probes.own_nearest(own + 0.1, own) == 1.0
    assert probes.own_nearest(own[[1, 0, 2, 3]], own) == 0.5
    assert probes.own_nearest(np.ones((4, 4)), np.ones((4, 4))) == 0.25  # one code for all


@pytest.mark.parametrize(
    ("vectors", "error", "words"),
    [
        (
            np.zeros((9, 2), np.int64),
            TypeError,
            r"vectors must be floating point \[N, D\], got int64 \[9, 2\]",
        ),
        (np.zeros(9), TypeError, r"vectors must be floating point \[N, D\], got float64 \[9\]"),
        (np.full((9, 2), np.nan), ValueError, "vectors must be finite"),
        (np.zeros((3, 2)), ValueError, "vectors must have at least 5 rows, got 3"),
    ],
)
def test_bad_vectors_are_named(vectors: np.ndarray, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        probes.umap_plane(vectors)


def test_umap_parts_clusters_and_repeats() -> None:
    vectors, labels = clusters()
    plane = probes.umap_plane(vectors, seed=3)
    assert plane.shape == (60, 2)
    assert probes.neighbour_accuracy(plane, labels) == 1.0
    assert plane.tobytes() == probes.umap_plane(vectors, seed=3).tobytes()
    alike = probes.umap_plane(np.ones((12, 6)))  # a network that has collapsed
    assert alike.shape == (12, 2)
    assert np.isfinite(alike).all()


def test_without_umap_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match="pip install umap-learn"):
        probes.umap_plane(clusters()[0])


# --- pictures ----------------------------------------------------------------------------------------------


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def has_colour(image: np.ndarray, colour: str) -> bool:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(image.astype(int) - wanted).max(axis=2) <= 2).any())


def test_arrangement_picture_shows_every_label_and_network() -> None:
    found = [probes.placement(Components(), SHAPES, 5, 0), probes.containment(Components(), SHAPES, 5, 0)]
    examples = [np.full((len(probe.names), 8, 8), 0.5) for probe in found]
    plane = np.random.default_rng(0).random((20, 2))
    panels = {
        name: [Panel(plane, "k-NN 9 %"), Panel(plane[:15], "k-NN 9 %", {"snowman": plane[:3]})]
        for name in ("untrained", "SketchEmbedNet")
    }
    image = pixels(probes.arrangement_picture(found, examples, panels, title="A title"))
    assert all(has_colour(image, colour) for colour in ("#332288", "#CC6677", "#117733", "#DDCC77"))
    wider = pixels(
        probes.arrangement_picture(found, examples, {**panels, "Contrastive": panels["untrained"]}, title="A")
    )
    assert wider.shape[1] > image.shape[1]
    assert wider.shape[0] == image.shape[0]


def test_spatial_picture_shows_the_scale() -> None:
    probe = probes.size(Components(), SHAPES, 20, 0)
    panels = {"untrained": [Panel(np.random.default_rng(0).random((20, 2)), "R2")]}
    image = pixels(probes.spatial_picture([probe], [np.zeros((5, 8, 8))], panels, title="A title"))
    assert has_colour(image, "#440154")  # both ends of viridis
    assert has_colour(image, "#FDE725")


def test_grid_picture_places_ink_and_text() -> None:
    ink, blank = np.ones((8, 8)), np.zeros((8, 8))
    rows = [
        GridRow([ink, "+", blank], "first"),
        GridRow([None, "=", ink], headings=[Head("second group", 3)]),
    ]
    image = pixels(
        probes.grid_picture(rows, title="A title", heads=[Head("left", 2), Head("right")], side=40)
    )
    dark = (image.max(axis=2) < 10).sum()
    assert 2 * 38 * 38 <= dark <= 2 * 38 * 38 + 900  # two cells full of ink, some letters
    plain = pixels(probes.grid_picture([GridRow([ink, "+", blank])], title="A title", side=40))
    assert plain.shape[1] == 16 + 40 + 8 + 20 + 8 + 40 + 16
    wide = pixels(probes.grid_picture([GridRow([ink, "+", blank])], title="A title", side=40, gaps=[2]))
    assert wide.shape[1] == plain.shape[1] + 18


@pytest.mark.parametrize(
    ("rows", "heads", "side", "words"),
    [
        ([], [], 40, "rows must be one or more of equally many cells"),
        ([GridRow([None]), GridRow([None, None])], [], 40, r"equally many cells, got \[1, 2\]"),
        ([GridRow([None, None])], [Head("a")], 40, "heads must span the 2 cells of a row"),
        ([GridRow([None], headings=[Head("a", 2)])], [], 40, "rows' headings must span the 1 cells"),
        ([GridRow([None])], [], 8, "side must be at least 32"),
    ],
)
def test_grid_picture_refuses(rows: list[GridRow], heads: list[Head], side: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        probes.grid_picture(rows, title="A title", heads=heads, side=side)
