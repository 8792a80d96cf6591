"""Fine-grained retrieval: which photo was this sketch drawn after.

`load_pairs` reads a data set whose sketches are known to belong to single photos and holds photos out, as its
publishers did where they did, by `split_instances` elsewhere.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..ops._contract import check_integer, check_number
from .archive import LayoutError, existing_path
from .dataset import StrokeDataset, add_counts
from .images import DEFAULT_SIZE, ImageSet, SketchPhotoSet


@dataclass
class InstanceSplit:
    """Photos to learn from and photos held out, each with the sketches drawn after them.

    name: which data set and which split. train: every sketch has its photo (pairs >= 0). test: its sketches
    are the queries, its photos the gallery, `test.pairs` the truth; no photo of it is in train. Both have the
    same class_names; what either counts as skipped is of the whole data set.

    train_strokes, test_strokes: drawing i is sketch i of train.sketches (test.sketches), in coordinates of a
    square canvas that is `canvas` wide, y down; None where only the images are known. A point at x is at
    pixel x * size / canvas - 0.5 of an image `size` wide (the centre of the first pixel is 0). canvas is None
    iff both are.

    Raises TypeError or ValueError, naming the field, for anything else.
    """

    name: str
    train: SketchPhotoSet
    test: SketchPhotoSet
    train_strokes: StrokeDataset | None = None
    test_strokes: StrokeDataset | None = None
    canvas: float | None = None

    def __post_init__(self) -> None:
        for field_name, part in {"train": self.train, "test": self.test}.items():
            if not isinstance(part, SketchPhotoSet):
                raise TypeError(f"{field_name} must be a SketchPhotoSet, got {type(part).__name__}")
            if (part.pairs < 0).any():
                lost = part.sketches.names[int(np.argmax(part.pairs < 0))]
                raise ValueError(f"{field_name}.pairs must all be known (>= 0), got -1 for sketch {lost!r}")
        if self.train.class_names != self.test.class_names:
            raise ValueError(
                f"test.class_names must be train's {len(self.train.class_names)}, got "
                f"{len(self.test.class_names)} others"
            )
        if shared := set(self.train.photos.names).intersection(self.test.photos.names):
            raise ValueError(f"test.photos must share none with train, got {min(shared)!r} in both")
        for field_name, strokes, part in (
            ("train_strokes", self.train_strokes, self.train),
            ("test_strokes", self.test_strokes, self.test),
        ):
            if strokes is not None:
                _check_strokes(field_name, strokes, part.sketches)
        if (self.canvas is None) != (self.train_strokes is None and self.test_strokes is None):
            raise ValueError(f"canvas must be given iff strokes are, got {self.canvas}")
        if self.canvas is not None:
            self.canvas = check_number("canvas", self.canvas, above=0)


def _check_strokes(name: str, strokes: StrokeDataset, sketches: ImageSet) -> None:
    """TypeError or ValueError unless there is a drawing for each of the sketches."""
    if not isinstance(strokes, StrokeDataset):
        raise TypeError(f"{name} must be a StrokeDataset or None, got {type(strokes).__name__}")
    if len(strokes) != len(sketches):
        raise ValueError(f"{name} must be {len(sketches)} drawings, one a sketch, got {len(strokes)}")


#: The share of the sketches that may be left out for want of strokes (a few of Sketchy's SVG are broken).
STROKES_MAY_LACK = 0.01

# ---- splits ------------------------------------------------------------------------------------------------


def split_instances(
    data: SketchPhotoSet,
    *,
    test_share: float = 0.2,
    seed: int = 0,
    strokes: StrokeDataset | None = None,
    canvas: float | None = None,
) -> InstanceSplit:
    """Holds out whole photos with all their sketches, the same share of every class.

    test_share: of each class's photos, rounded, but at least one is held out and one is left; a class with a
    single photo stays in train. Above 0, below 1. The draw depends on seed and the names of a class's photos
    alone, not on their order. strokes: drawing i is sketch i of data.sketches, on a canvas `canvas` wide.

    Sketches whose photo is not known, photos that no sketch was drawn after, and classes of only these are
    left out; the former two are counted in `skipped`.

    Raises TypeError or ValueError, naming the argument; ValueError where no photo can be held out.
    """
    if not isinstance(data, SketchPhotoSet):
        raise TypeError(f"data must be a SketchPhotoSet, got {type(data).__name__}")
    share, seed = _check_share(test_share), check_integer("seed", seed, 0)
    if strokes is not None:
        _check_strokes("strokes", strokes, data.sketches)
    drawn = _drawn_photos(data)
    is_test = np.zeros(len(data.photos), bool)
    for label, class_name in enumerate(data.class_names):
        rows = np.flatnonzero(drawn & (data.photos.labels == label))
        if len(rows) < 2:
            continue
        rows = rows[np.argsort(np.array([data.photos.names[row] for row in rows.tolist()]))]
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        rng = np.random.default_rng([seed, zlib.crc32(class_name.encode())])
        is_test[rng.choice(rows, count, replace=False)] = True
    if not is_test.any():
        raise ValueError(
            "data must hold a class with two photos that sketches were drawn after, got "
            f"{int(drawn.sum())} such photos in {len(data.class_names)} classes"
        )
    name = f"{_title(data)}, {share:g} of the photos held out, seed {seed}"
    return split_by_photo(data, is_test, name, strokes=strokes, canvas=canvas)


def split_by_photo(
    data: SketchPhotoSet,
    is_test: NDArray[np.bool_],
    name: str,
    *,
    strokes: StrokeDataset | None = None,
    canvas: float | None = None,
) -> InstanceSplit:
    """The split with the photos where is_test (bool [len(data.photos)]) held out; the rest as in
    `split_instances`."""
    drawn = _drawn_photos(data)
    if is_test.shape != drawn.shape or is_test.dtype != bool:
        raise ValueError(f"is_test must be bool [{len(drawn)}], got {is_test.dtype} {list(is_test.shape)}")
    left_out = {
        "sketches: photo not known": int((data.pairs < 0).sum()),
        "photos: no sketch drawn after": int((~drawn).sum()),
    }
    skipped = dict(data.skipped)
    add_counts(skipped, {reason: count for reason, count in left_out.items() if count})
    class_names = [data.class_names[label] for label in np.unique(data.photos.labels[drawn]).tolist()]
    parts: list[SketchPhotoSet] = []
    drawings: list[StrokeDataset | None] = []
    for photos in (drawn & ~is_test, drawn & is_test):
        sketches = (data.pairs >= 0) & photos[data.pairs]
        part = take_photos(data, sketches, photos).select_classes(class_names)
        parts.append(replace(part, skipped=dict(skipped)))
        drawings.append(None if strokes is None else _labelled(strokes.subset(sketches), part.sketches))
    return InstanceSplit(name, parts[0], parts[1], drawings[0], drawings[1], canvas)


def _labelled(strokes: StrokeDataset, sketches: ImageSet) -> StrokeDataset:
    """The drawings under the labels of the sketches they are."""
    return replace(strokes, labels=sketches.labels.copy(), class_names=list(sketches.class_names))


def split_as_marked(
    data: SketchPhotoSet,
    name: str,
    *,
    test_share: float = 0.2,
    seed: int = 0,
    strokes: StrokeDataset | None = None,
    canvas: float | None = None,
) -> InstanceSplit:
    """The split that photos.extra["part"] marks as "train" and "test"; `split_instances` where it does not.

    name: of the marked split. Photos that are not marked, while others are, are left out and counted.
    """
    parts, drawn = data.photos.extra["part"], _drawn_photos(data)
    if not all((parts[drawn] == part).any() for part in ("train", "test")):
        return split_instances(data, test_share=test_share, seed=seed, strokes=strokes, canvas=canvas)
    marked = parts != ""
    if not marked.all():
        kept = (data.pairs < 0) | marked[data.pairs]
        strokes = None if strokes is None else strokes.subset(kept)
        data = take_photos(data, kept, marked)
        add_counts(data.skipped, {"photos: in neither part": int((~marked).sum())})
    return split_by_photo(data, data.photos.extra["part"] == "test", name, strokes=strokes, canvas=canvas)


def match_strokes(
    data: SketchPhotoSet, strokes: StrokeDataset | None
) -> tuple[SketchPhotoSet, StrokeDataset | None]:
    """The set, and the drawings in the order of its sketches, found by `extra["key"]`.

    Up to STROKES_MAY_LACK of the sketches may have no drawing: they are left out and counted. If more have
    none, the set stays whole, without drawings, and `info["sketches without strokes"]` counts them.
    """
    place = {} if strokes is None else {key: row for row, key in enumerate(strokes.extra["key"].tolist())}
    rows = np.array([place.get(name, -1) for name in data.sketches.names], np.int64)
    lacking = int((rows < 0).sum())
    if strokes is None or lacking > STROKES_MAY_LACK * len(rows):
        return replace(data, info={**data.info, "sketches without strokes": lacking}), None
    if lacking:
        data = take_photos(data, rows >= 0, np.ones(len(data.photos), bool))
        add_counts(data.skipped, {"sketches: no strokes": lacking})
    return data, _labelled(strokes.subset(rows[rows >= 0]), data.sketches)


def take_photos(
    data: SketchPhotoSet, sketches: NDArray[np.bool_], photos: NDArray[np.bool_]
) -> SketchPhotoSet:
    """The sketches and photos of the two masks; a sketch whose photo is not among them has pair -1."""
    place = np.full(len(data.photos) + 1, -1, np.int64)  # the last one for the sketches without a photo
    place[:-1][photos] = np.arange(int(photos.sum()))
    return replace(
        data,
        sketches=data.sketches.subset(sketches),
        photos=data.photos.subset(photos),
        pairs=place[data.pairs[sketches]],
        class_names=list(data.class_names),
        skipped=dict(data.skipped),
        info=dict(data.info),
    )


def _drawn_photos(data: SketchPhotoSet) -> NDArray[np.bool_]:
    """bool [len(data.photos)]: which photos a sketch was drawn after."""
    drawn = np.zeros(len(data.photos), bool)
    drawn[data.pairs[data.pairs >= 0]] = True
    return drawn


def _check_share(test_share: float) -> float:
    share = check_number("test_share", test_share, above=0)
    if share >= 1:
        raise ValueError(f"test_share must be below 1, got {test_share}")
    return share


# ---- data sets ---------------------------------------------------------------------------------------------


class _Request(NamedTuple):
    """What `load_pairs` was asked for."""

    root: Path
    category: str | None
    size: int
    seed: int
    test_share: float
    progress: bool


#: Procedural photos drawn in all, of PROCEDURAL_CLASSES classes or of the one asked for, and sketches of
#: each: a second or two at 96 pixels.
PROCEDURAL_PHOTOS = 320
PROCEDURAL_CLASSES = 8
PROCEDURAL_SKETCHES = 3
_SKETCHY_CANVAS = 256.0


def load_pairs(
    name: str,
    root: str | Path | None,
    *,
    category: str | None = None,
    size: int = DEFAULT_SIZE,
    seed: int = 0,
    test_share: float = 0.2,
    progress: bool = False,
) -> InstanceSplit:
    """The data set `name` in the folder or zip `root`, with photos held out.

    name: one of PAIR_SETS. root: see the reader's own documentation; None for procedural. category: one class
    of it, such as "shoe"; None takes all, and then the gallery is of all classes (published figures of QMUL
    are of one category at a time). size: side of the images in pixels. The official split is taken where
    there is one, else test_share and seed say what is held out, as in `split_instances`; the split's name
    says which. seed also draws what is procedural. Caches of `sketchfast data prepare` are used where they
    are: of images, and of strokes (sketchy_strokes, qmul_v2_strokes).

    Raises TypeError or ValueError, naming the argument; FileNotFoundError; LayoutError (a ValueError) with
    the expected tree.
    """
    if name not in PAIR_SETS:
        raise ValueError(f"name must be one of {', '.join(PAIR_SETS)}, got {name!r}")
    if category is not None and not isinstance(category, str):
        raise TypeError(f"category must be a str or None, got {type(category).__name__}")
    if (root is None) != (name == "procedural"):
        wanted = "None for procedural" if name == "procedural" else f"the folder or zip of {name}"
        raise ValueError(f"root must be {wanted}, got {root}")
    request = _Request(
        Path() if root is None else existing_path(root),
        category,
        check_integer("size", size, 1),
        check_integer("seed", seed, 0),
        _check_share(test_share),
        progress,
    )
    return PAIR_SETS[name](request)


def _chosen(data: SketchPhotoSet, request: _Request) -> SketchPhotoSet:
    """The one class asked for, or all."""
    if request.category is None:
        return data
    check_category(request.category, data.class_names)
    return data.select_classes([request.category])


def _title(data: SketchPhotoSet) -> str:
    """Data set and the classes with pairs, such as "qmul_v2 chair+shoe"."""
    names = [data.class_names[i] for i in np.unique(data.photos.labels[_drawn_photos(data)]).tolist()]
    few = "+".join(names) if len(names) <= 4 else f"of {len(names)} classes"
    return f"{data.info.get('dataset', 'pairs')} {few}"


def check_category(category: str, there: list[str]) -> None:
    """ValueError that names what there is, unless `category` is among it."""
    if category not in there:
        raise ValueError(f"category must be None or one of {', '.join(there)}, got {category!r}")


def _qmul_v1_edges(request: _Request) -> InstanceSplit:
    from .qmul import load_qmul_v1_edges

    data = load_qmul_v1_edges(request.root, size=request.size, category=request.category)
    return split_as_marked(data, f"{_title(data)}, official split")


def _qmul_v1(request: _Request) -> InstanceSplit:
    from .qmul import load_qmul_v1

    data = _chosen(load_qmul_v1(request.root, size=request.size, progress=request.progress), request)
    by_number = set(data.info["parts by number"]).intersection(data.class_names)
    which = "published counts in the order of numbers" if by_number else "split as published"
    return split_as_marked(data, f"{_title(data)}, {which}", test_share=request.test_share, seed=request.seed)


def _qmul_v2(request: _Request) -> InstanceSplit:
    from .prepare import load_prepared
    from .qmul import CANVAS, load_qmul_v2, load_qmul_v2_strokes

    data = _chosen(load_qmul_v2(request.root, size=request.size, progress=request.progress), request)
    strokes = None
    if data.info["form"] == "strokes":  # else the images are not of these strokes
        strokes = load_prepared("qmul_v2_strokes", request.root) or load_qmul_v2_strokes(request.root)
        data, strokes = match_strokes(data, strokes)
    return split_as_marked(
        data,
        f"{_title(data)}, split as published",
        test_share=request.test_share,
        seed=request.seed,
        strokes=strokes,
        canvas=None if strokes is None else CANVAS,
    )


def _sketchy(request: _Request) -> InstanceSplit:
    from .sketchy import load_sketchy, read_test_photos

    data = _chosen(load_sketchy(request.root, size=request.size, progress=request.progress), request)
    data, strokes = match_strokes(data, _sketchy_strokes(request))
    canvas = None if strokes is None else _SKETCHY_CANVAS
    held_out = read_test_photos(request.root)
    parts = ["test" if name in held_out else "train" for name in data.photos.names]
    data.photos.extra["part"] = np.array(parts, "U5")
    return split_as_marked(
        data,
        f"{_title(data)}, the publishers' test photos",
        test_share=request.test_share,
        seed=request.seed,
        strokes=strokes,
        canvas=canvas,
    )


def _sketchy_strokes(request: _Request) -> StrokeDataset | None:
    """Sketchy's drawings scaled as its images are, from any document to one square; None without any."""
    from .prepare import load_prepared
    from .sketchy import load_sketchy_strokes

    strokes = load_prepared("sketchy_strokes", request.root)
    if strokes is None or "size" not in strokes.extra:  # older caches have no sizes
        classes = None if request.category is None else [request.category]
        try:
            strokes = load_sketchy_strokes(request.root, classes=classes, progress=request.progress)
        except LayoutError:
            return None
    strokes = strokes.subset(np.isfinite(strokes.extra["size"]).all(axis=1))
    scale = np.repeat(_SKETCHY_CANVAS / strokes.extra["size"], strokes.lengths, axis=0)
    return replace(strokes, points=(strokes.points * scale).astype(np.float32))


def _sketch_photo(request: _Request) -> InstanceSplit:
    from .sketch_photo import load_sketch_photo

    data = _chosen(load_sketch_photo(request.root, size=request.size, progress=request.progress), request)
    return split_instances(data, test_share=request.test_share, seed=request.seed)


def _procedural(request: _Request) -> InstanceSplit:
    from .procedural import CANVAS, CLASSES, procedural_pairs

    if request.category is not None:
        check_category(request.category, list(CLASSES))
    classes = list(CLASSES[:PROCEDURAL_CLASSES]) if request.category is None else [request.category]
    data, strokes = procedural_pairs(
        PROCEDURAL_PHOTOS // len(classes),
        request.size,
        request.seed,
        classes,
        sketches_per_instance=PROCEDURAL_SKETCHES,
        progress=request.progress,
    )
    return split_instances(
        data, test_share=request.test_share, seed=request.seed, strokes=strokes, canvas=CANVAS
    )


#: What `load_pairs` reads.
PAIR_SETS: dict[str, Callable[[_Request], InstanceSplit]] = {
    "procedural": _procedural,
    "qmul_v1": _qmul_v1,
    "qmul_v1_edges": _qmul_v1_edges,
    "qmul_v2": _qmul_v2,
    "sketch_photo": _sketch_photo,
    "sketchy": _sketchy,
}
