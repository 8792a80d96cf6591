"""Probes of what an embedding of drawings knows of their components, and pictures that show it.

SketchEmbedNet section 4.4 and Figures 4 to 8: scenes of simple shapes in known arrangements or with one
continuous variable are drawn as strokes, embedded, projected to two dimensions and measured. The paper shows
pictures alone; the numbers beside them here are ours.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.dataset import StrokeDataset
from ..data.procedural import draw_parts, drawing_style
from ..data.procedural_shapes import Part, ellipse, polygon, rectangle
from ..data.strokes import Sketch
from ..ops._contract import check_integer
from . import retrieval as common

Vectors = NDArray[np.floating[Any]]
Projection = Callable[[Vectors], NDArray[np.float64]]

#: shapes that are drawn by rule where the data has no class of that name
RULES: dict[str, Part] = {
    "circle": ellipse(50, 50, 40),
    "square": rectangle(10, 10, 90, 90),
    "triangle": polygon((50, 10), (90, 90), (10, 90)),
}
_HANDS = 16
"""drawing styles that shapes drawn by rule are drawn in: the procedural data's, from 1 on"""
_LEAST_ASPECT = 0.5
"""drawings flatter than this are no components: filling a square box would distort them"""
_LEAST_FILL = 0.4
"""nor are those whose convex hull takes less of their box, where a triangle's takes half: slashes"""


# --------------------------------------------------------------------------------------------------
# Scenes


class Components:
    """Drawings of shapes by name: of a data set's class of that name, else by rule (`RULES`), hand-drawn.

    Args:
        drawings: the data set, or None for shapes drawn by rule alone.
    """

    def __init__(self, drawings: StrokeDataset | None = None) -> None:
        self.drawings = drawings
        self._rows: dict[str, NDArray[np.int64]] = {}

    def rows(self, name: str) -> NDArray[np.int64]:
        """The data's drawings of the class `name` that fill a square box; empty where it has none."""
        if self.drawings is None or name not in self.drawings.class_names:
            return np.zeros(0, np.int64)
        if name not in self._rows:
            of_class = np.flatnonzero(self.drawings.labels == self.drawings.class_names.index(name))
            fills = [_fills_box(self.drawings[int(row)][0]) for row in of_class]
            self._rows[name] = of_class[np.array(fills, bool)]
        return self._rows[name]

    def check(self, argument: str, *names: str) -> None:
        """ValueError that names `argument` where there is nothing to draw a shape from."""
        for name in names:
            if not len(self.rows(name)) and name not in RULES:
                raise ValueError(
                    f"{argument} must name classes of the data or of {', '.join(RULES)}, got {name!r}"
                )

    def about(self, *names: str) -> str:
        """Where the shapes come from, in words."""
        told = [f"{name}: {len(rows)} drawings" for name in names if len(rows := self.rows(name))]
        ruled = [name for name in names if not len(self.rows(name))]
        return ", ".join(told + ([f"{' and '.join(ruled)}: drawn by rule"] if ruled else []))

    def draw(self, name: str, rng: np.random.Generator) -> Sketch:
        """A drawing of the shape, float32, filling the box from -1/2 to 1/2 in both directions."""
        if len(rows := self.rows(name)):
            assert self.drawings is not None
            sketch = self.drawings[int(rng.choice(rows))][0]
        else:
            sketch = draw_parts([RULES[name]], drawing_style(int(rng.integers(1, _HANDS + 1))), rng)
        low, high = sketch.points.min(axis=0), sketch.points.max(axis=0)
        return Sketch((sketch.points - (low + high) / 2) / (high - low), sketch.pen_down)


def _fills_box(sketch: Sketch) -> bool:
    """Whether the drawing may be fitted to a square box as a component."""
    from scipy.spatial import ConvexHull, QhullError

    sides = np.ptp(sketch.points, axis=0) if len(sketch.points) > 2 else np.zeros(2)
    if sides.min() <= 0 or sides.min() < _LEAST_ASPECT * sides.max():
        return False
    try:
        area = ConvexHull(sketch.points).volume  # in the plane the "volume" is the area
    except QhullError:  # all on one line
        return False
    return bool(area >= _LEAST_FILL * sides.prod())


class Place(NamedTuple):
    """A component of a scene: the shape that fills a box of these sides about (x, y), y downwards."""

    shape: str
    x: float
    y: float
    width: float
    height: float


def draw_scene(places: Sequence[Place], components: Components, rng: np.random.Generator) -> Sketch:
    """The components drawn at their places one after the other, the pen lifted between them."""
    parts = [(components.draw(place.shape, rng), place) for place in places]
    points = [
        sketch.points * np.array((place.width, place.height)) + np.array((place.x, place.y))
        for sketch, place in parts
    ]
    return Sketch(
        np.concatenate(points).astype(np.float32), np.concatenate([sketch.pen_down for sketch, _ in parts])
    )


class ArrangementProbe(NamedTuple):
    """Scenes of one relation, each in one of several arrangements."""

    relation: str
    sketches: list[Sketch]
    labels: NDArray[np.int64]
    names: list[str]
    """what each label stands for"""


class SpatialProbe(NamedTuple):
    """Scenes in which one variable changes."""

    variable: str
    sketches: list[Sketch]
    values: NDArray[np.float64]
    unit: str


def _varied(rng: np.random.Generator, value: float, share: float = 0.1) -> float:
    return value * float(rng.uniform(1 - share, 1 + share))


def _boxed(shape: str, x: float, y: float, side: float, rng: np.random.Generator) -> Place:
    """A box about `side` wide and high: hands draw no two alike."""
    return Place(shape, x, y, _varied(rng, side), _varied(rng, side))


def _stacked(shape: str, count: int, rng: np.random.Generator) -> list[Place]:
    """`count` components one on the other, each smaller than the one below, as a snowman's."""
    places, top, side = [], 0.0, 1.0
    for _ in range(count):
        place = _boxed(shape, float(rng.uniform(-0.05, 0.05)), 0.0, side, rng)
        places.append(place._replace(y=top - place.height / 2))
        top -= place.height * 0.97
        side *= _varied(rng, 0.8, 0.05)
    return places


def _nested(shape: str, count: int, rng: np.random.Generator) -> list[Place]:
    """`count` components one in the other, as a television's frame and screen."""
    places: list[Place] = []
    side = 1.0
    for _ in range(count):
        shift = rng.uniform(-0.04, 0.04, 2) * side if places else np.zeros(2)
        places.append(_boxed(shape, float(shift[0]), float(shift[1]), side, rng))
        side *= _varied(rng, 0.62, 0.06)
    return places


def numerosity(
    components: Components, shapes: tuple[str, str], most: int, examples: int, seed: int
) -> ArrangementProbe:
    """1 to `most` of the first shape stacked, as in a snowman, and of the second nested, as in a television.

    `examples` scenes of each shape and number.
    """
    rng = np.random.default_rng([seed, 0])
    sketches, names = [], []
    for shape, arrange in zip(shapes, (_stacked, _nested), strict=True):
        for count in range(1, most + 1):
            names.append(f"{count} {shape}{'s' if count > 1 else ''}")
            sketches += [draw_scene(arrange(shape, count, rng), components, rng) for _ in range(examples)]
    return ArrangementProbe("numerosity", sketches, np.repeat(np.arange(len(names)), examples), names)


def placement(components: Components, shapes: tuple[str, str], examples: int, seed: int) -> ArrangementProbe:
    """The first shape to the left or right of the second, above or below it."""
    rng = np.random.default_rng([seed, 1])
    first, second = shapes
    sides = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    sketches = []
    for x, y in sides.values():
        for _ in range(examples):
            apart, across = _varied(rng, 1.35), float(rng.uniform(-0.15, 0.15))
            centre = (x * apart + abs(y) * across, y * apart + abs(x) * across)
            places = [_boxed(first, *centre, 1.0, rng), _boxed(second, 0.0, 0.0, 1.0, rng)]
            sketches.append(draw_scene(places, components, rng))
    names = [f"{first} {side} {second}" for side in sides]
    return ArrangementProbe("placement", sketches, np.repeat(np.arange(len(names)), examples), names)


def containment(
    components: Components, shapes: tuple[str, str], examples: int, seed: int
) -> ArrangementProbe:
    """The first shape in the second, the second in the first, and the two side by side in either order."""
    rng = np.random.default_rng([seed, 2])
    first, second = shapes
    sketches = []
    for inner, outer in ((first, second), (second, first)):
        for _ in range(examples):
            x, y = rng.uniform(-0.08, 0.08, 2).tolist()
            places = [_boxed(outer, 0.0, 0.0, 1.0, rng), _boxed(inner, x, y, _varied(rng, 0.45, 0.2), rng)]
            sketches.append(draw_scene(places, components, rng))
    for _ in range(examples):
        side = 1 if rng.random() < 0.5 else -1
        sizes = (1.0, _varied(rng, 0.7, 0.4))
        places = [
            _boxed(first, 0.0, 0.0, sizes[0], rng),
            _boxed(second, side * 0.65 * sum(sizes), 0.0, sizes[1], rng),
        ]
        sketches.append(draw_scene(places, components, rng))
    names = [f"{first} in {second}", f"{second} in {first}", "side by side"]
    return ArrangementProbe("containment", sketches, np.repeat(np.arange(len(names)), examples), names)


def distance(components: Components, shapes: tuple[str, str], examples: int, seed: int) -> SpatialProbe:
    """The two shapes beside each other, their centres 1.1 to 3.5 shape sides apart."""

    def places(value: float, rng: np.random.Generator) -> list[Place]:
        return [_boxed(shapes[0], 0.0, 0.0, 1.0, rng), _boxed(shapes[1], value, 0.0, 1.0, rng)]

    return _spatial("distance", "shape sides", (1.1, 3.5), 3, components, examples, seed, places)


def angle(components: Components, shapes: tuple[str, str], examples: int, seed: int) -> SpatialProbe:
    """The second shape about the first, 1.5 sides away: from its right, 0 degrees, over its top to 180."""

    def places(value: float, rng: np.random.Generator) -> list[Place]:
        x, y = 1.5 * np.cos(np.radians(value)), -1.5 * np.sin(np.radians(value))
        return [_boxed(shapes[0], 0.0, 0.0, 1.0, rng), _boxed(shapes[1], float(x), float(y), 1.0, rng)]

    return _spatial("angle", "degrees", (0.0, 180.0), 4, components, examples, seed, places)


def size(components: Components, shapes: tuple[str, str], examples: int, seed: int) -> SpatialProbe:
    """The first shape in the middle of the second, 0.15 to 0.85 of its size."""

    def places(value: float, rng: np.random.Generator) -> list[Place]:
        return [Place(shapes[1], 0.0, 0.0, 1.0, 1.0), Place(shapes[0], 0.0, 0.0, value, value)]

    return _spatial("size", "share of the outer shape", (0.15, 0.85), 5, components, examples, seed, places)


def _spatial(
    variable: str,
    unit: str,
    limits: tuple[float, float],
    stream: int,
    components: Components,
    examples: int,
    seed: int,
    places: Callable[[float, np.random.Generator], list[Place]],
) -> SpatialProbe:
    """`examples` scenes at evenly spaced values of the variable."""
    rng = np.random.default_rng([seed, stream])
    values = np.linspace(*limits, examples)
    sketches = [draw_scene(places(float(value), rng), components, rng) for value in values]
    return SpatialProbe(variable, sketches, values, unit)


# --------------------------------------------------------------------------------------------------
# Projection and measures


def umap_plane(vectors: Vectors, *, neighbours: int = 15, seed: int = 0) -> NDArray[np.float64]:
    """UMAP (McInnes et al., 2018) of vectors [N, D] to the plane [N, 2]; ImportError without umap-learn.

    N is at least 5. One thread, a fixed seed: the same vectors give the same plane on one machine. The first
    call compiles for some 10 s.
    """
    vectors = _rows("vectors", vectors, least=5)
    check_integer("neighbours", neighbours, 2)
    check_integer("seed", seed, 0)
    try:
        from umap import UMAP
    except ImportError as error:
        raise ImportError("umap_plane needs the package umap-learn: pip install umap-learn") from error
    from threadpoolctl import threadpool_limits

    # a network that gives all images one code has no spectrum to start from; small sets have too little
    start = "spectral" if len(np.unique(vectors, axis=0)) > max(neighbours, 10) else "random"
    model = UMAP(
        n_neighbors=min(neighbours, len(vectors) - 1),
        init=start,
        random_state=seed,
        n_jobs=1,
        transform_seed=seed,
    )
    with threadpool_limits(1):
        return np.asarray(model.fit_transform(vectors), np.float64)


def neighbour_accuracy(vectors: Vectors, labels: NDArray[np.int64], k: int = 5) -> float:
    """Share of vectors [N, D] whose label most of their k nearest others bear (leave-one-out k-NN).

    Euclidean distance; of labels with equally many neighbours the one with the nearest counts. A share in
    [0, 1]; ValueError for fewer than k + 1 vectors.
    """
    from sklearn.neighbors import NearestNeighbors

    check_integer("k", k, 1)
    vectors = _rows("vectors", vectors, least=k + 1)
    near = NearestNeighbors(n_neighbors=k).fit(vectors).kneighbors(return_distance=False)
    found = labels[near]
    votes = (found[:, :, None] == found[:, None, :]).sum(axis=2)
    winners = found[np.arange(len(found)), votes.argmax(axis=1)]  # the first of the most, so the nearest
    return float((winners == labels).mean())


def silhouette(vectors: Vectors, labels: NDArray[np.int64]) -> float:
    """Mean silhouette of the labels (Rousseeuw, 1987), Euclidean: -1 mixed up, 1 far apart."""
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(_rows("vectors", vectors, least=3), labels))


def explained_variance(
    vectors: Vectors, values: NDArray[np.float64], *, seed: int = 0, folds: int = 5
) -> float:
    """R^2 of the values [N] as a linear function of the vectors [N, D], cross-validated; at most 1.

    Ridge regression on standardised vectors, its weight picked within each training fold; R^2 over all
    held-out predictions together. 0 is what the mean explains; below 0 the regression misleads.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import r2_score
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    vectors = _rows("vectors", vectors, least=folds)
    model = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-2, 4, 13)))
    order = KFold(folds, shuffle=True, random_state=seed)
    return float(r2_score(values, cross_val_predict(model, vectors, values, cv=order)))


def axis_correlation(plane: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """|Spearman's rho| of the values [N] with the first principal axis of a plane [N, 2].

    1 where the variable runs along the projection's long axis without turning back; 0 where the plane has no
    extent.
    """
    from scipy.stats import spearmanr

    centred = plane - plane.mean(axis=0)
    along = centred @ np.linalg.svd(centred, full_matrices=False)[2][0]
    if not np.ptp(along) > 0:
        return 0.0
    return abs(float(spearmanr(along, values).statistic))


def own_nearest(drawn: Vectors, own: Vectors) -> float:
    """Share of rows of drawn [N, D] to which, of all rows of own [N, D], that of the same index is nearest.

    Euclidean distance; of equally near ones the first counts, so a network that gives one code to all scores
    1 / N.
    """
    from scipy.spatial.distance import cdist

    drawn, own = _rows("drawn", drawn, least=1), _rows("own", own, least=1)
    return float((cdist(drawn, own).argmin(axis=1) == np.arange(len(drawn))).mean())


def _rows(name: str, vectors: Vectors, least: int) -> Vectors:
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise TypeError(f"{name} must be floating point [N, D], got {vectors.dtype} {list(vectors.shape)}")
    if len(vectors) < least:
        raise ValueError(f"{name} must have at least {least} rows, got {len(vectors)}")
    if not np.isfinite(vectors).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return vectors


# --------------------------------------------------------------------------------------------------
# Pictures of the plane


class Panel(NamedTuple):
    """One network's plane of one probe, and a line that says what was measured on it."""

    plane: NDArray[np.float64]
    caption: str
    landmarks: Mapping[str, NDArray[np.float64]] = {}
    """further points [n, 2] of the plane, by name: drawings shown beside the scenes"""


_PANEL = 2.35
"""inches a panel"""
_KEY = 3.3
"""inches of the column of examples"""


def arrangement_picture(
    probes: Sequence[ArrangementProbe],
    examples: Sequence[NDArray[np.floating[Any]]],
    panels: Mapping[str, Sequence[Panel]],
    *,
    title: str,
) -> bytes:
    """A PNG: a row a relation, with an example of each arrangement in its colour, then a panel a network.

    Args:
        probes: the relations.
        examples: for each probe, images [labels, S, S] in [0, 1], ink = 1, one of each arrangement.
        panels: network name -> a panel for each probe.
        title: a line above.
    """
    colours = [_label_colours(probe) for probe in probes]
    figure, keys, cells = _sheet(len(probes), list(panels), title)
    for row, probe in enumerate(probes):
        marks = _landmark_marks([list(of)[row] for of in panels.values()])
        _example_key(figure, keys[row], probe.relation, examples[row], probe.names, colours[row], marks)
        for column, of_network in enumerate(panels.values()):
            panel, axes = of_network[row], cells[row][column]
            for label, colour in enumerate(colours[row]):
                points = panel.plane[probe.labels == label]
                axes.scatter(*points.T, s=11, color=colour, alpha=0.85, linewidths=0)
            for name, points in panel.landmarks.items():
                axes.scatter(*points.T, s=16, color="#111111", marker=marks[name], linewidths=0.8)
            axes.set_xlabel(panel.caption, fontsize=9)
    return _figure_png(figure)


def spatial_picture(
    probes: Sequence[SpatialProbe],
    examples: Sequence[NDArray[np.floating[Any]]],
    panels: Mapping[str, Sequence[Panel]],
    *,
    title: str,
) -> bytes:
    """A PNG: a row a variable, with examples along its colour scale, then a panel a network.

    Args:
        probes: the variables.
        examples: for each probe, images [n, S, S] in [0, 1], ink = 1, at n evenly spaced values.
        panels: network name -> a panel for each probe.
        title: a line above.
    """
    figure, keys, cells = _sheet(len(probes), list(panels), title)
    for row, probe in enumerate(probes):
        _scale_key(figure, keys[row], probe, examples[row])
        for column, of_network in enumerate(panels.values()):
            panel, axes = of_network[row], cells[row][column]
            axes.scatter(*panel.plane.T, s=11, c=probe.values, cmap="viridis", linewidths=0)
            axes.set_xlabel(panel.caption, fontsize=9)
    return _figure_png(figure)


def _sheet(rows: int, networks: Sequence[str], title: str) -> tuple[Any, list[Any], list[list[Any]]]:
    """A figure with a key column and a column of empty, square panels a network, headed by its name."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(_KEY + (_PANEL + 0.15) * len(networks), (_PANEL + 0.45) * rows + 0.8),
        dpi=120,
        layout="constrained",
    )
    figure.suptitle("\n".join(textwrap.wrap(title, 45 + 22 * len(networks))), fontsize=12)
    grid = figure.add_gridspec(rows, 1 + len(networks), width_ratios=[_KEY] + [_PANEL] * len(networks))
    cells = []
    for row in range(rows):
        cells.append([figure.add_subplot(grid[row, 1 + column]) for column in range(len(networks))])
        for axes, network in zip(cells[-1], networks, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.set_box_aspect(1)
            axes.margins(0.07)
            if row == 0:
                axes.set_title(network, fontsize=11, fontweight="bold")
    return figure, [grid[row, 0] for row in range(rows)], cells


def _label_colours(probe: ArrangementProbe) -> list[Any]:
    """A shade of one colour for each number of a shape; else colours told apart by the colour-blind."""
    if probe.relation != "numerosity":
        return list(common._COLOURS[: len(probe.names)])
    from matplotlib import colormaps

    each = len(probe.names) // 2
    return [
        colormaps[name](shade)
        for name in ("Blues", "Reds")
        for shade in np.linspace(0.35, 1.0, each).tolist()
    ]


def _landmark_marks(panels: Sequence[Panel]) -> dict[str, str]:
    names = dict.fromkeys(name for panel in panels for name in panel.landmarks)
    return dict(zip(names, ("x", "+", "1", "2"), strict=False))


def _example_key(
    figure: Any,
    place: Any,
    heading: str,
    images: NDArray[np.floating[Any]],
    names: Sequence[str],
    colours: Sequence[Any],
    marks: Mapping[str, str],
) -> None:
    """Examples framed in their arrangement's colour and named, under the relation's name."""
    columns = 4 if len(names) > 4 else 2
    rows = -(-len(names) // columns)
    ratios = [0.28] + [1.0] * rows + ([0.3] if marks else [])
    inner = place.subgridspec(len(ratios), columns, height_ratios=ratios)
    _text_cell(figure, inner[0, :], heading.capitalize(), fontsize=12, fontweight="bold")
    for number, (image, name, colour) in enumerate(zip(images, names, colours, strict=True)):
        axes = figure.add_subplot(inner[1 + number // columns, number % columns])
        _thumbnail(axes, image, colour)
        axes.set_xlabel("\n".join(textwrap.wrap(name, 9 if columns == 4 else 20)), fontsize=7.5, labelpad=2)
    if marks:
        axes = figure.add_subplot(inner[-1, :])
        for name, mark in marks.items():
            axes.scatter([], [], s=24, color="#111111", marker=mark, label=f"class {name}")
        axes.legend(loc="center", ncols=2, fontsize=8, frameon=False, handletextpad=0.1, columnspacing=1)
        axes.axis("off")


def _scale_key(figure: Any, place: Any, probe: SpatialProbe, images: NDArray[np.floating[Any]]) -> None:
    """Examples over a bar of the colours of their values, under the variable's name."""
    inner = place.subgridspec(4, len(images), height_ratios=[0.4, 1.0, 0.16, 0.6])
    _text_cell(figure, inner[0, :], probe.variable.capitalize(), fontsize=12, fontweight="bold")
    from matplotlib import colormaps

    for number, image in enumerate(images):
        colour = colormaps["viridis"](number / max(len(images) - 1, 1))
        _thumbnail(figure.add_subplot(inner[1, number]), image, colour)
    bar = figure.add_subplot(inner[2, :])
    low, high = float(probe.values.min()), float(probe.values.max())
    bar.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap="viridis", extent=(low, high, 0, 1))
    bar.set(yticks=[], xticks=np.linspace(low, high, 3))
    bar.tick_params(labelsize=8)
    bar.set_xlabel(f"{probe.variable} ({probe.unit})", fontsize=8.5)


def _text_cell(figure: Any, place: Any, text: str, **style: Any) -> None:
    axes = figure.add_subplot(place)
    axes.axis("off")
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, **style)


def _thumbnail(axes: Any, image: NDArray[np.floating[Any]], colour: Any) -> None:
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=1, interpolation="bilinear")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.2)


def _figure_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------
# Pictures in rows


class Head(NamedTuple):
    """A line over `span` cells."""

    text: str
    span: int = 1


class GridRow(NamedTuple):
    """A row of images in [0, 1], ink [S, S] or RGB [S, S, 3]; a str is a sign, such as "+"; None is empty."""

    cells: Sequence[NDArray[np.floating[Any]] | str | None]
    label: str = ""
    """what the row shows, to its left"""
    headings: Sequence[Head] = ()
    """a line above the row, where another group begins; the spans add up to its cells"""


def grid_picture(
    rows: Sequence[GridRow],
    *,
    title: str,
    heads: Sequence[Head] = (),
    side: int = 84,
    gaps: Sequence[int] = (),
) -> bytes:
    """A PNG of rows of small images, ink dark on white.

    Args:
        rows: with as many cells each, signs in the same columns.
        title: a line above, wrapped where it is too long.
        heads: over the columns, from the left; their spans add up to the cells of a row.
        side: pixels of an image, at least 32.
        gaps: columns before which a wider gap parts what belongs apart.

    Raises ValueError that names the argument.
    """
    from PIL import Image, ImageDraw

    side = check_integer("side", side, 32)
    columns = _columns_of(rows, heads)
    gap, margin = 8, 16
    heading_font, label_font = common._font(15), common._font(13)
    labels = [part for row in rows for part in row.label.split("\n")]
    label_width = max(int(np.ceil(label_font.getlength(part))) for part in labels)
    signs = [any(isinstance(row.cells[column], str) for row in rows) for column in range(columns)]
    widths = [20 if sign else side for sign in signs]
    lefts, x = [], margin + (label_width + 12 if label_width else 0)
    for column, width in enumerate(widths):
        x += 18 if column in gaps else 0
        lefts.append(x)
        x += width + gap
    width = x - gap + margin
    title_lines = common._wrapped(title, common._font(18), width - 2 * margin)
    spans = _spans(heads, lefts, widths)
    head_lines = [common._wrapped(head.text, label_font, right - left + 6) for head, left, right in spans]
    heads_top = margin + 25 * len(title_lines) + 4
    rows_top = heads_top + (17 * max(map(len, head_lines)) + 10 if heads else 4)
    height = rows_top + sum(side + gap + (30 if row.headings else 0) for row in rows) - gap + margin
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(title_lines):
        draw.text((margin, margin + 25 * number), line, fill=common.INK, font=common._font(18))
    for (head, left, right), lines in zip(spans, head_lines, strict=True):
        for number, line in enumerate(reversed(lines)):
            place = ((left + right) / 2, rows_top - 12 - 17 * number)
            draw.text(place, line, fill=common.MUTED, font=label_font, anchor="ms")
        if head.span > 1 and head.text:
            draw.line((left, rows_top - 8, right, rows_top - 8), fill=(190, 190, 190), width=1)
    y = rows_top
    for row in rows:
        for head, left, right in _spans(row.headings, lefts, widths):
            text = common._shortened(head.text, heading_font, right - left)
            start = margin if left == lefts[0] else left
            draw.text((start, y + 21), text, fill=common.INK, font=heading_font, anchor="ls")
        y += 30 if row.headings else 0
        draw.multiline_text(
            (margin, y + side / 2), row.label, fill=common.MUTED, font=label_font, anchor="lm", spacing=3
        )
        for cell, left, cell_width in zip(row.cells, lefts, widths, strict=True):
            if isinstance(cell, str):
                middle = (left + cell_width / 2, y + side / 2)
                draw.text(middle, cell, fill=common.INK, font=common._font(24), anchor="mm")
            elif cell is not None:
                picture.paste(_image_cell(cell, side), (left, y))
        y += side + gap
    return common._png(picture)


def _columns_of(rows: Sequence[GridRow], heads: Sequence[Head]) -> int:
    """Cells a row; ValueError where rows or heads do not agree on them."""
    columns = len(rows[0].cells) if rows else 0
    if not columns or any(len(row.cells) != columns for row in rows):
        raise ValueError(
            f"rows must be one or more of equally many cells, got {[len(r.cells) for r in rows]}"
        )
    for name, line in (("heads", heads), *(("rows' headings", row.headings) for row in rows)):
        if line and sum(head.span for head in line) != columns:
            raise ValueError(f"{name} must span the {columns} cells of a row, got {list(line)}")
    return columns


def _spans(heads: Sequence[Head], lefts: Sequence[int], widths: Sequence[int]) -> list[tuple[Head, int, int]]:
    """Each head with its left and right end in pixels."""
    found, first = [], 0
    for head in heads:
        last = first + head.span - 1
        found.append((head, lefts[first], lefts[last] + widths[last]))
        first += head.span
    return found


def _image_cell(image: NDArray[np.floating[Any]], side: int) -> Any:
    """An image scaled smoothly to the cell, ink as dark on white, in a thin frame."""
    from PIL import Image, ImageDraw

    shown = image if image.ndim == 3 else 1 - image
    pixels = (np.nan_to_num(shown).clip(0, 1) * 255).round().astype(np.uint8)
    cell = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).convert("RGB")
    ImageDraw.Draw(cell).rectangle((0, 0, side - 1, side - 1), outline=(205, 205, 205))
    return cell
