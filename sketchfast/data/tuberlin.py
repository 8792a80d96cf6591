"""TU-Berlin (Eitz et al., 2012): 20,000 sketches of 250 classes; with photos, TUBerlin-Extended.

The two parts spell class names differently ("mouse (animal)", "mouse_(animal)", "hot-dog"). One rule joins
them, `normal_class_name`: lower case, and every run of other signs than letters and digits is one underscore
("mouse_animal", "hot_dog"). The class names of every set read here are in that form.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..ops._contract import check_integer
from .archive import READ_ERRORS, Tree, existing_path, layout_error, open_tree
from .cache import load_image_cache
from .dataset import StrokeDataset, add_counts, track
from .images import (
    DEFAULT_SIZE,
    ImageFile,
    ImageSet,
    SketchPhotoSet,
    decode_image,
    domain_folder,
    find_images,
    inside,
    join_domains,
    read_images,
)
from .render import rasterize_sketches
from .strokes import Sketch, from_svg

FORMS = ("png", "svg")
CANVAS = 800  # side of the SVG documents' view box
PHOTOS = "ImageResized"
EXPECTED_SVG = """  <root>/svg/<class>/<id>.svg
  or root=svg itself, or a .zip of these"""
EXPECTED = """  <root>/png/<class>/<id>.png
  or <root>/svg/<class>/<id>.svg, drawn here
  or root=png or root=svg itself, or a .zip of these"""
EXPECTED_EXTENDED = f"""  <root>/png/<class>/<id>.png             or svg/<class>/<id>.svg
  <root>/{PHOTOS}/<class>/<any name>.jpg
  or a .zip of these"""


def normal_class_name(name: str) -> str:
    """The class name in the form in which both parts agree: "mouse (animal)" is "mouse_animal"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def load_tuberlin(
    root: str | Path,
    *,
    size: int = DEFAULT_SIZE,
    form: str | None = None,
    cache: bool = True,
    progress: bool = False,
) -> ImageSet:
    """TU-Berlin's sketches, dark on white, uint8 [N, size, size, 3].

    root: the folder or zip that holds `png/` or `svg/`, or that folder itself. size: side in pixels. form:
    "png", reduced from 1111 with antialiasing; "svg", drawn where it lies on its canvas by
    `sketchfast.rasterize` with lines one pixel wide; None takes png where it is there. cache: use what
    `sketchfast data prepare tuberlin ROOT --size SIZE` wrote, if it still fits. Files that cannot be read are
    left out and counted.

    Raises FileNotFoundError, LayoutError (a ValueError) with the expected tree.
    """
    path, size = existing_path(root), check_integer("size", size, 1)
    of = {} if form is None else {"form": form}
    if cache and (cached := load_image_cache(ImageSet, "tuberlin", path, size, **of)) is not None:
        return cached
    return read_tuberlin(path, size=size, form=form, progress=progress)


def read_tuberlin(
    root: str | Path,
    *,
    size: int = DEFAULT_SIZE,
    form: str | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> ImageSet:
    """`load_tuberlin` from the files. folder: where the images are written to, see `read_images`."""
    path, size = existing_path(root), check_integer("size", size, 1)
    with open_tree(path, into_archive=True) as tree:
        found = _find_sketches(tree, form)
        if not found.files:
            raise layout_error(path, EXPECTED, tree.names)
        class_names = sorted({file.class_name for file in found.files})
        images = _read_sketches(tree, found, class_names, size, folder, progress)
    images.info.update({"dataset": "tuberlin", "root": str(path), "size": size, "form": found.form})
    return images


def load_tuberlin_extended(
    root: str | Path,
    *,
    size: int = DEFAULT_SIZE,
    form: str | None = None,
    cache: bool = True,
    progress: bool = False,
) -> SketchPhotoSet:
    """TUBerlin-Extended: TU-Berlin's sketches and photos of its classes, each uint8 [N, size, size, 3].

    root: the folder or zip that holds `png/` (or `svg/`) and `ImageResized/`. No pair is known. The rest as
    in `load_tuberlin`; the cache's name is `tuberlin_extended`.
    """
    path, size = existing_path(root), check_integer("size", size, 1)
    of = {} if form is None else {"form": form}
    cached = load_image_cache(SketchPhotoSet, "tuberlin_extended", path, size, **of) if cache else None
    if cached is not None:
        return cached
    return read_tuberlin_extended(path, size=size, form=form, progress=progress)


def read_tuberlin_extended(
    root: str | Path,
    *,
    size: int = DEFAULT_SIZE,
    form: str | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> SketchPhotoSet:
    """`load_tuberlin_extended` from the files. folder: where images are written to, see `read_images`."""
    path, size = existing_path(root), check_integer("size", size, 1)
    with open_tree(path, into_archive=True) as tree:
        found = _find_sketches(tree, form)
        photo_files, photo_junk = find_images(tree, PHOTOS)
        photo_files = _normal(photo_files)
        if not found.files or not photo_files:
            raise layout_error(path, EXPECTED_EXTENDED, tree.names)
        class_names = sorted({file.class_name for file in found.files + photo_files})
        sketches = _read_sketches(tree, found, class_names, size, domain_folder(folder, "sketches"), progress)
        photos = read_images(
            tree,
            photo_files,
            class_names,
            size,
            folder=domain_folder(folder, "photos"),
            description="TU-Berlin photos",
            progress=progress,
        )
    add_counts(photos.skipped, photo_junk)
    info = {"dataset": "tuberlin_extended", "root": str(path), "size": size, "form": found.form}
    return join_domains(sketches, photos, np.full(len(sketches), -1, np.int64), info)


class _Found(NamedTuple):
    form: str
    files: list[ImageFile]
    passed_over: dict[str, int]


def _find_sketches(tree: Tree, form: str | None) -> _Found:
    """The sketches of the form asked for, or of the first that is there."""
    if form is not None and form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)} or None, got {form!r}")
    found = _Found(form or FORMS[0], [], {})
    for wanted in FORMS if form is None else (form,):
        found = _Found(wanted, [], {})
        for path, class_name, file_name in inside(tree, wanted):
            stem, suffix = PurePosixPath(file_name).stem, PurePosixPath(file_name).suffix
            if suffix.lower() == f".{wanted}":
                found.files.append(ImageFile(path, class_name, stem))
            else:
                add_counts(found.passed_over, {"not an image": 1})
        if found.files:
            break
    return found._replace(files=_normal(found.files))


def _normal(files: list[ImageFile]) -> list[ImageFile]:
    """The files in order of their classes' normal names; ValueError where one name stands for two files."""
    ordered = sorted(
        (file._replace(class_name=normal_class_name(file.class_name)) for file in files),
        key=lambda file: (file.class_name, file.stem),
    )
    for file, after in itertools.pairwise(ordered):
        if file.name == after.name:
            raise ValueError(f"root must hold {file.name} once, got {file.path} and {after.path}")
    return ordered


def _read_sketches(
    tree: Tree, found: _Found, class_names: list[str], size: int, folder: Path | None, progress: bool
) -> ImageSet:
    images = read_images(
        tree,
        found.files,
        class_names,
        size,
        folder=folder,
        decode=draw_svg if found.form == "svg" else decode_image,
        description="TU-Berlin sketches",
        progress=progress,
    )
    add_counts(images.skipped, found.passed_over)
    return images


def draw_svg(data: bytes, size: int) -> NDArray[np.uint8]:
    """A TU-Berlin SVG, its whole canvas, as dark lines on white: uint8 [size, size, 3].

    Raises ValueError for what is no SVG or draws nothing.
    """
    sketch = from_svg(data)
    if not len(sketch.points):
        raise ValueError("svg must hold a path")
    placed = Sketch((sketch.points * (size / CANVAS) - 0.5).astype(np.float32), sketch.pen_down)
    ink = rasterize_sketches([placed], size, padding=None)[0].numpy()
    return np.repeat(255 - ink[..., None], 3, axis=2)


def load_tuberlin_strokes(root: str | Path, *, spacing: float = 4.0, progress: bool = False) -> StrokeDataset:
    """TU-Berlin's drawings as strokes, in units of its canvas (0 to 800), y down.

    root: the folder or zip that holds `svg/`, or that folder itself. spacing: distance of samples on curves,
    see `from_svg`. `extra["key"]`: "<class>/<id>". Files that cannot be read are left out and counted.

    Raises FileNotFoundError, LayoutError (a ValueError) with the expected tree.
    """
    path = existing_path(root)
    with open_tree(path, into_archive=True) as tree:
        files = _find_sketches(tree, "svg").files
        if not files:
            raise layout_error(path, EXPECTED_SVG, tree.names)
        skipped: dict[str, int] = {}
        sketches: list[Sketch] = []
        kept: list[ImageFile] = []
        for file in track(files, "TU-Berlin strokes", progress, total=len(files)):
            try:
                sketches.append(from_svg(tree.read(file.path), spacing=spacing))
            except (ValueError, *READ_ERRORS):
                add_counts(skipped, {"broken svg": 1})
                continue
            kept.append(file)
    class_names = sorted({file.class_name for file in files})
    index = {name: label for label, name in enumerate(class_names)}
    return StrokeDataset.from_sketches(
        sketches,
        [index[file.class_name] for file in kept],
        class_names,
        skipped=skipped,
        info={"dataset": "tuberlin_strokes", "root": str(path), "spacing": spacing},
        extra={"key": np.array([file.name for file in kept], np.str_)},
    )
