"""Sketchy (Sangkloy et al., 2016) and Sketchy-Extended (Liu et al., 2017): sketches and photos, 125 classes.

Every sketch was drawn after one of Sketchy's 12,500 photos: `n02691156_58-1.png` after `n02691156_58.jpg`.
The extension adds photos of the same classes and no pairs; some copies of it hold Sketchy's photos once more,
which are taken once, from Sketchy's folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ..ops._contract import check_integer
from .archive import READ_ERRORS, existing_path, layout_error, open_tree
from .cache import load_image_cache
from .dataset import StrokeDataset, add_counts, track
from .images import (
    DEFAULT_SIZE,
    ImageSet,
    SketchPhotoSet,
    domain_folder,
    find_images,
    inside,
    join_domains,
    pair_names,
    read_images,
)
from .mini_imagenet import TEST_CLASSES
from .strokes import Sketch, from_svg, svg_size

#: The rendering that is centred and scaled by nothing; the archive holds others, such as tx_000100000000.
TRANSFORM = "tx_000000000000"
EXTENSION = "EXTEND_image_sketchy"
EXPECTED = f"""  <root>/256x256/sketch/{TRANSFORM}/<class>/n02691156_58-1.png
  <root>/256x256/photo/{TRANSFORM}/<class>/n02691156_58.jpg
  or root=256x256 itself, or a .zip of these"""
EXPECTED_EXTENDED = f"""{EXPECTED}
  <root>/{EXTENSION}/<class>/ext_1.jpg      beside or in 256x256; root holds both"""
EXPECTED_STROKES = """  <root>/sketches-06-04/sketches/<class>/n02691156_58-1.svg
  <root>/sketches-06-04/sketches/<class>/invalid.txt       optional
  or root=sketches-06-04 or sketches, or a .zip of these"""
#: Lists the photos to test on, a line each: airplane/n02691156_1512.jpg.
TEST_PHOTOS_FILE = "testset.txt"
_SKETCH_NAME = re.compile(r"(.+)-\d+")  # <photo>-<number of the sketch>
_WORDNET_NAME = re.compile(r"(?:.*/)?(n\d{8})_\d+(?:-\d+)?")  # <class>/<WordNet id>_<number of the photo>
#: What stands above a test class of mini-ImageNet in WordNet and has photos in Sketchy: working dog (malamute
#: is one), guitar (electric guitar is one). None of Sketchy's ids stands below one.
_ABOVE_MINI_IMAGENET_TEST = frozenset({"n02103406", "n03467517"})


def load_sketchy(
    root: str | Path,
    *,
    size: int = DEFAULT_SIZE,
    extended: bool = False,
    transform: str = TRANSFORM,
    cache: bool = True,
    progress: bool = False,
) -> SketchPhotoSet:
    """Sketchy's 75,471 sketches and 12,500 photos (73,002 if `extended`), each uint8 [N, size, size, 3].

    root: the folder or zip that holds `256x256/` or what is in it. size: side in pixels, reduced from 256
    with antialiasing. transform: which rendering of sketches and photos, a folder "tx_...". cache: use what
    `sketchfast data prepare sketchy ROOT --size SIZE` (`sketchy_extended`) wrote, if it still fits. Files
    that cannot be read are left out and counted; a sketch whose photo is not there has pair -1.

    Raises FileNotFoundError, LayoutError (a ValueError) with the expected tree.
    """
    path, size = existing_path(root), check_integer("size", size, 1)
    name = "sketchy_extended" if extended else "sketchy"
    cached = load_image_cache(SketchPhotoSet, name, path, size, transform=transform) if cache else None
    if cached is not None:
        return cached
    return read_sketchy(path, size=size, extended=extended, transform=transform, progress=progress)


def load_sketchy_photos(
    root: str | Path,
    *,
    size: int = DEFAULT_SIZE,
    transform: str = TRANSFORM,
    cache: bool = True,
    progress: bool = False,
) -> ImageSet:
    """Sketchy's 12,500 photos alone, as `load_sketchy` gives them; its sketches may be absent.

    cache: use the photos of what `sketchfast data prepare sketchy ROOT --size SIZE` wrote, if it still fits.
    """
    path, size = existing_path(root), check_integer("size", size, 1)
    cached = load_image_cache(SketchPhotoSet, "sketchy", path, size, transform=transform) if cache else None
    if cached is not None:
        return cached.photos
    with open_tree(path, into_archive=True) as tree:
        files, passed_over = find_images(tree, "photo", transform)
        if not files:
            raise layout_error(path, EXPECTED.replace(TRANSFORM, transform), tree.names)
        names = sorted({file.class_name for file in files})
        photos = read_images(tree, files, names, size, description="Sketchy photos", progress=progress)
    add_counts(photos.skipped, passed_over)
    return photos


def overlaps_mini_imagenet(name: str) -> bool:
    """Whether the photo, or the photo of the sketch, `name` shows a test class of mini-ImageNet.

    Decided by the WordNet id in the name ("ant/n02219486_58"), photo by photo, since most classes of Sketchy
    are made of several: it does if the id is one of the 20 test classes, or stands above one in WordNet, so
    that the photo may show it. A name without an id does not.
    """
    match = _WORDNET_NAME.fullmatch(name)
    return match is not None and (match[1] in TEST_CLASSES or match[1] in _ABOVE_MINI_IMAGENET_TEST)


def read_sketchy(
    root: str | Path,
    *,
    size: int = DEFAULT_SIZE,
    extended: bool = False,
    transform: str = TRANSFORM,
    folder: Path | None = None,
    progress: bool = False,
) -> SketchPhotoSet:
    """`load_sketchy` from the files. folder: where the images are written to, see `read_images`."""
    path, size = existing_path(root), check_integer("size", size, 1)
    if not isinstance(transform, str) or not transform.startswith("tx_"):
        raise ValueError(f"transform must be the name of a folder tx_..., got {transform!r}")
    expected = (EXPECTED_EXTENDED if extended else EXPECTED).replace(TRANSFORM, transform)
    with open_tree(path, into_archive=True) as tree:
        sketches, sketch_junk = find_images(tree, "sketch", transform)
        photos, photo_junk = find_images(tree, "photo", transform)
        more, more_junk = find_images(tree, EXTENSION) if extended else ([], {})
        if not sketches or not photos or (extended and not more):
            raise layout_error(path, expected, tree.names)
        own = {photo.name for photo in photos}
        photos = sorted(photos + [photo for photo in more if photo.name not in own], key=lambda f: f.name)
        class_names = sorted({file.class_name for file in sketches + photos})
        domains = {
            domain: read_images(
                tree,
                files,
                class_names,
                size,
                folder=domain_folder(folder, domain),
                description=f"Sketchy {domain}",
                progress=progress,
            )
            for domain, files in {"sketches": sketches, "photos": photos}.items()
        }
    for domain, passed_over in (("sketches", sketch_junk), ("photos", photo_junk), ("photos", more_junk)):
        add_counts(domains[domain].skipped, passed_over)
    pairs = pair_names(domains["sketches"], domains["photos"], photo_of_sketch)
    info = {
        "dataset": "sketchy_extended" if extended else "sketchy",
        "root": str(path),
        "size": size,
        "transform": transform,
    }
    return join_domains(domains["sketches"], domains["photos"], pairs, info)


def photo_of_sketch(name: str) -> str | None:
    """The photo that the sketch `name` was drawn after, None for a name of another form."""
    match = _SKETCH_NAME.fullmatch(name)
    return match[1] if match else None


def load_sketchy_strokes(
    root: str | Path,
    *,
    spacing: float = 4.0,
    valid_only: bool = False,
    classes: Sequence[str] | None = None,
    progress: bool = False,
) -> StrokeDataset:
    """Sketchy's drawings as strokes, from the SVG files of `sketches-06-04`.

    Coordinates are the documents' own units, those of the photo the sketch was drawn after. spacing: distance
    of samples on curves, see `from_svg`. valid_only: leave out what the class's `invalid.txt` names (wrong
    pose, ambiguous, ...), counted; without, `extra["valid"]` (bool) says it. `extra["key"]`:
    "<class>/n02691156_58-1", as `ImageSet.names`. `extra["size"]`: width and height of each document, float32
    [N, 2], NaN where it has none. classes: those to read, None for all, which takes many minutes. An SVG
    without its closing tag is read; other broken ones are left out and counted.

    Raises FileNotFoundError, LayoutError (a ValueError) with the expected tree, also if none of the classes
    is there.
    """
    path = existing_path(root)
    with open_tree(path, into_archive=True) as tree:
        there = [file for file in inside(tree, "sketches") if classes is None or file[1] in classes]
        files = [(path, f"{name}/{file[:-4]}") for path, name, file in there if file.endswith(".svg")]
        if not files:
            raise layout_error(path, EXPECTED_STROKES, tree.names)
        skipped: dict[str, int] = {}
        invalid: set[str] = set()
        for path_in_tree, name, file in there:
            if file != "invalid.txt":
                continue
            try:
                lines = tree.read(path_in_tree).decode(errors="replace").splitlines()
            except READ_ERRORS:
                add_counts(skipped, {"broken invalid.txt": 1})
                continue
            invalid |= {f"{name}/{line.strip()}" for line in lines}
        sketches: list[Sketch] = []
        keys: list[str] = []
        sizes: list[tuple[float, float]] = []
        for file, key in track(files, "Sketchy strokes", progress, total=len(files)):
            if valid_only and key in invalid:
                add_counts(skipped, {"marked invalid": 1})
                continue
            try:
                svg = _closed_svg(tree.read(file))
                sketches.append(from_svg(svg, spacing=spacing))
            except (ValueError, *READ_ERRORS):
                add_counts(skipped, {"broken svg": 1})
                continue
            keys.append(key)
            sizes.append(svg_size(svg) or (np.nan, np.nan))
    class_names = sorted({key.split("/")[0] for _, key in files})
    index = {name: label for label, name in enumerate(class_names)}
    return StrokeDataset.from_sketches(
        sketches,
        [index[key.split("/")[0]] for key in keys],
        class_names,
        skipped=skipped,
        info={"dataset": "sketchy_strokes", "root": str(path), "spacing": spacing},
        extra={
            "key": np.array(keys, np.str_),
            "valid": np.array([key not in invalid for key in keys], bool),
            "size": np.array(sizes, np.float32).reshape(-1, 2),
        },
    )


def read_test_photos(root: str | Path) -> set[str]:
    """The photos held out by the publishers, as `ImageSet.names`: those `info/testset.txt` lists, if it is in
    the folder or zip `root`; else none."""
    with open_tree(existing_path(root), into_archive=True) as tree:
        lists = [name for name in tree.names if PurePosixPath(name).name == TEST_PHOTOS_FILE]
        try:
            lines = tree.read(lists[0]).decode(errors="replace").splitlines() if lists else []
        except READ_ERRORS:
            return set()
    photos = [PurePosixPath(line.strip()) for line in lines]
    return {f"{photo.parent.name}/{photo.stem}" for photo in photos}


def _closed_svg(data: bytes) -> bytes:
    """The document with its closing tag, which some of Sketchy's files lack."""
    return data if b"</svg>" in data[-64:] else data + b"</svg>"
