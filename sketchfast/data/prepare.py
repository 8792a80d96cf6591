"""A packed cache of a downloaded data set: parsed once, read in a moment ever after.

The cache lies with the data under a hidden name, which the readers pass over: an `.npz` of strokes, or a
folder with images, one for each size. It holds what the files it was made of looked like, and is used only as
long as they look the same (see `cache`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..ops._contract import check_integer
from .archive import existing_path
from .cache import file_states, fingerprint, image_cache_path
from .dataset import StrokeDataset
from .images import DEFAULT_SIZE, ImageSet, SketchPhotoSet, new_folder
from .mini_imagenet import SIZE as MINI_IMAGENET_SIZE
from .mini_imagenet import read_mini_imagenet
from .omniglot import load_omniglot_strokes
from .qmul import load_qmul_v2_strokes, read_qmul_v1, read_qmul_v2
from .quickdraw import load_quickdraw
from .sketch_photo import read_sketch_photo
from .sketchy import load_sketchy_strokes, read_sketchy
from .tuberlin import load_tuberlin_strokes, read_tuberlin, read_tuberlin_extended

READERS: dict[str, Callable[..., StrokeDataset]] = {
    "quickdraw": load_quickdraw,
    "omniglot": load_omniglot_strokes,
    "qmul_v2_strokes": load_qmul_v2_strokes,
    "sketchy_strokes": load_sketchy_strokes,
    "tuberlin_strokes": load_tuberlin_strokes,
}
IMAGE_READERS: dict[str, Callable[..., ImageSet | SketchPhotoSet]] = {
    "mini_imagenet": read_mini_imagenet,
    "qmul_v1": read_qmul_v1,
    "qmul_v2": read_qmul_v2,
    "sketch_photo": read_sketch_photo,
    "sketchy": read_sketchy,
    "sketchy_extended": partial(read_sketchy, extended=True),
    "tuberlin": read_tuberlin,
    "tuberlin_extended": read_tuberlin_extended,
}
#: Side in pixels where it is not DEFAULT_SIZE.
IMAGE_SIZES = {"mini_imagenet": MINI_IMAGENET_SIZE}


def cache_path(name: str, root: str | Path) -> Path:
    """Where the cache of the strokes `name` in the folder or archive `root` lies."""
    root = Path(root)
    if root.is_dir():
        return root / f".sketchfast-{name}.npz"
    return root.with_name(f".{root.name}.sketchfast-{name}.npz")


def _files(root: Path) -> list[list[str | int]]:
    """Name, size and time of every file the readers may look at, as JSON gives them back."""
    return [list(state) for state in file_states(root)]


def prepare(
    name: str, root: str | Path, *, size: int | None = None, progress: bool = False
) -> tuple[Path, StrokeDataset | ImageSet | SketchPhotoSet]:
    """Read all of the data set `name` in `root` and write the cache; its path and what it holds.

    size: side of the images in pixels, `DEFAULT_SIZE` (84 for mini_imagenet) where None; strokes have none.
    Images are written as they are decoded, so memory does not grow with the data set.

    Raises ValueError for an unknown name or a size with strokes, and what the reader raises (a wrong layout
    among it); OSError where the folder cannot be written.
    """
    if name in IMAGE_READERS:
        return _prepare_images(name, existing_path(root), size, progress)
    if name not in READERS:
        names = ", ".join(sorted([*READERS, *IMAGE_READERS]))
        raise ValueError(f"name must be one of {names}, got {name!r}")
    if size is not None:
        raise ValueError(f"size must be None for strokes such as {name}, got {size}")
    drawings = READERS[name](root, progress=progress)
    path = cache_path(name, root)
    replace(drawings, info={**drawings.info, "files": _files(Path(root))}).save(path)
    return path, drawings


def _prepare_images(
    name: str, root: Path, size: int | None, progress: bool
) -> tuple[Path, ImageSet | SketchPhotoSet]:
    """The cache of an image data set, read back from the disk."""
    size = check_integer("size", IMAGE_SIZES.get(name, DEFAULT_SIZE) if size is None else size, 1)
    path, before = image_cache_path(name, root, size), fingerprint(root)
    with new_folder(path) as folder:
        images = IMAGE_READERS[name](root, size=size, folder=folder, progress=progress)
        images.info["fingerprint"] = before
        images.save_fields(folder)
    return path, type(images).load(path)


def load_prepared(name: str, root: str | Path) -> StrokeDataset | None:
    """The strokes `prepare` cached; None where it did not, or the files changed since (with a warning).

    Image data sets have no need of it: their `load_...` functions look for the cache themselves.
    """
    path = cache_path(name, root)
    if not path.is_file():
        return None
    try:
        drawings = StrokeDataset.load(path)
    except ValueError as error:
        warnings.warn(f"cache passed over: {error}", RuntimeWarning, stacklevel=2)
        return None
    if drawings.info.get("files") != _files(Path(root)):
        warnings.warn(
            f"cache {path} passed over: its files changed; `sketchfast data prepare {name} {root}` renews it",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return drawings
