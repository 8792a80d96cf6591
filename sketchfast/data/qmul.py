"""QMUL's sketches of single shoes, chairs and handbags, and the photos they were drawn after.

* `load_qmul_v1_edges`: V1 (Yu et al., 2016) as 256 x 256 arrays in MATLAB files. The "photos" are edge maps.
"""

from __future__ import annotations

import io
import math
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..ops._contract import check_integer
from .archive import READ_ERRORS, Tree, existing_path, layout_error, open_tree
from .dataset import add_counts
from .images import DEFAULT_SIZE, ImageSet, SketchPhotoSet, join_domains

#: The categories of V1, and how many of its pairs, which are numbered, are to train on and then to test.
V1_COUNTS = {"shoe": (304, 115), "chair": (200, 97), "handbag": (400, 168)}
PARTS = ("train", "test")

# ---- V1 as MATLAB files ------------------------------------------------------------------------------------

EXPECTED_EDGES = """  <root>/<category>s_sketch_db_train.mat    `data`, uint8 [N, H, W]; shoe, chair, handbag
  <root>/<category>s_edge_db_train.mat      sketch i was drawn after photo i
  <root>/<category>s_sketch_db_test.mat
  <root>/<category>s_edge_db_test.mat
  <root>/shoes_train_triplets.mat           optional
  or a .zip of these"""
TRIPLETS_FILE = "shoes_train_triplets.mat"
_MOST_MAT_VALUES = 1 << 28  # an array larger than that is none of this data set


class _MatError(ValueError):
    """The MATLAB file does not hold what it should; the message is a reason to count."""


def load_qmul_v1_edges(
    root: str | Path, *, category: str | None = None, size: int = DEFAULT_SIZE
) -> SketchPhotoSet:
    """V1 from MATLAB files: sketches and edge maps of photos, dark on white, uint8 [N, size, size, 3].

    root: the folder or zip with the files. category: "shoe", "chair" or "handbag", None for all, each a
    class. size: side in pixels, reduced from 256 with antialiasing. Names are "shoe/1" and on, through train
    and test, alike for a sketch and its photo. `extra["part"]` of both domains: "train" or "test", as
    published. `info["photos"]` says that they are edge maps, `info["identical photos"]` how many of them
    equal an earlier one. A category with a file that is missing or broken is left out and counted.

    Raises ValueError for a category that is not there, FileNotFoundError, LayoutError (a ValueError) with the
    expected tree.
    """
    path, size = existing_path(root), check_integer("size", size, 1)
    if category is not None and category not in V1_COUNTS:
        raise ValueError(f"category must be None or one of {', '.join(V1_COUNTS)}, got {category!r}")
    skipped: dict[str, int] = {}
    found: dict[str, list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]] = {}
    with open_tree(path, into_archive=True) as tree:
        files = {PurePosixPath(name).name: name for name in tree.names}
        for name in V1_COUNTS if category is None else (category,):
            try:
                found[name] = [_edge_pairs(tree, files, name, part) for part in PARTS]
            except _MatError as reason:
                add_counts(skipped, {str(reason): 1})
        if not found:
            error = layout_error(path, EXPECTED_EDGES, tree.names)
            raise type(error)(f"{error}\nLeft out: {skipped}") if skipped else error
    return _edge_set(path, found, size, skipped)


def _edge_pairs(
    tree: Tree, files: dict[str, str], category: str, part: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Sketches and edge maps [N, H, W] of one part of a category, row by row."""
    arrays = []
    for kind in ("sketch", "edge"):
        name = f"{category}s_{kind}_db_{part}.mat"
        if name not in files:
            raise _MatError("categories: file missing")
        arrays.append(_read_mat_images(_read_file(tree, files[name])))
    if len(arrays[0]) != len(arrays[1]):
        raise _MatError("categories: sketches and photos differ in number")
    return arrays[0], arrays[1]


def _read_file(tree: Tree, name: str) -> bytes:
    try:
        return tree.read(name)
    except READ_ERRORS:
        raise _MatError("categories: broken mat file") from None


def _read_mat(data: bytes, kinds: dict[str, str]) -> dict[str, Any]:
    """The variables named, which must be of these MATLAB kinds; their sizes are looked at before any is read.

    MATLAB files of the versions that scipy reads (not 7.3) hold data only, no code.
    """
    from scipy.io import loadmat, whosmat

    try:
        shapes = {name: shape for name, shape, kind in whosmat(io.BytesIO(data)) if kinds.get(name) == kind}
        values = sum(math.prod(int(n) for n in shape) for shape in shapes.values())
        if set(shapes) == set(kinds) and values <= _MOST_MAT_VALUES:
            return loadmat(io.BytesIO(data), variable_names=list(kinds))
    except Exception as error:  # a broken file may raise anything from scipy's reader
        raise _MatError("categories: broken mat file") from error
    raise _MatError("categories: broken mat file")


def _read_mat_images(data: bytes) -> NDArray[np.uint8]:
    """The file's `data`, uint8 [N, H, W], dark on white."""
    images = np.ascontiguousarray(_read_mat(data, {"data": "uint8"})["data"])
    if images.dtype != np.uint8 or images.ndim != 3 or 0 in images.shape:
        raise _MatError("categories: broken mat file")
    return images if np.median(images) >= 128 else 255 - images


def _edge_set(
    path: Path,
    found: dict[str, list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]],
    size: int,
    skipped: dict[str, int],
) -> SketchPhotoSet:
    """One set of all categories, train before test in each."""
    class_names = list(found)
    counts = [[len(sketches) for sketches, _ in parts] for parts in found.values()]
    names = [f"{name}/{i + 1}" for name, n in zip(class_names, counts, strict=True) for i in range(sum(n))]
    labels = np.repeat(np.arange(len(class_names)), [sum(n) for n in counts])
    part = np.concatenate([np.repeat(PARTS, n) for n in counts])
    domains = []
    for domain in range(2):
        stacks = [pair[domain] for parts in found.values() for pair in parts]
        images = np.concatenate([_resized(stack, size) for stack in stacks])
        domains.append(ImageSet(images, labels.copy(), class_names, list(names), extra={"part": part.copy()}))
    sketches, photos = domains
    originals = [photo.tobytes() for parts in found.values() for _, edges in parts for photo in edges]
    info = {
        "dataset": "qmul_v1_edges",
        "root": str(path),
        "size": size,
        "photos": "edge maps of the photos",
        "identical photos": len(originals) - len(set(originals)),
    }
    result = join_domains(sketches, photos, np.arange(len(names)), info)
    add_counts(result.skipped, skipped)
    return result


def _resized(stack: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Grey images [N, H, W] as RGB [N, size, size, 3]."""
    images = np.empty((len(stack), size, size, 3), np.uint8)
    for row, grey in enumerate(stack):
        image = Image.fromarray(grey)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        images[row] = np.asarray(image)[..., None]
    return images
