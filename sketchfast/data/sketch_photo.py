"""A folder of sketches and photos by class, with a list of the pairs: the `sketch_photo` development set.

Any data set in this layout can be read. `sketchy_pairs.json`, a list of {"class", "photo", "sketch"} with the
files' paths in the set, says which sketch was drawn after which photo; without it no pair is known.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ..ops._contract import check_integer
from .archive import READ_ERRORS, Tree, existing_path, layout_error, open_tree
from .cache import load_image_cache
from .dataset import add_counts
from .images import (
    DEFAULT_SIZE,
    ImageSet,
    SketchPhotoSet,
    domain_folder,
    find_images,
    join_domains,
    pair_names,
    read_images,
)

PAIRS_FILE = "sketchy_pairs.json"
EXPECTED = f"""  <root>/sketch/<class>/<name>.png
  <root>/photo/<class>/<name>.jpg
  <root>/{PAIRS_FILE}                  optional
  or a .zip of these, or a folder that holds that zip alone"""
_DOMAINS = {"sketches": "sketch", "photos": "photo"}


def load_sketch_photo(
    root: str | Path, *, size: int = DEFAULT_SIZE, cache: bool = True, progress: bool = False
) -> SketchPhotoSet:
    """The sketches and photos of the folder or zip `root`, each uint8 [N, size, size, 3].

    root: what holds `sketch/` and `photo/`, or the folder above it. size: side in pixels, reduced with
    antialiasing. cache: use what `sketchfast data prepare sketch_photo ROOT --size SIZE` wrote, if it still
    fits. A class is whatever has an image in either domain, in order of name. Files that cannot be read are
    left out and counted.

    Raises FileNotFoundError, LayoutError (a ValueError) with the expected tree.
    """
    path, size = existing_path(root), check_integer("size", size, 1)
    if cache and (cached := load_image_cache(SketchPhotoSet, "sketch_photo", path, size)) is not None:
        return cached
    return read_sketch_photo(path, size=size, progress=progress)


def read_sketch_photo(
    root: str | Path, *, size: int = DEFAULT_SIZE, folder: Path | None = None, progress: bool = False
) -> SketchPhotoSet:
    """`load_sketch_photo` from the files. folder: where the images are written to, see `read_images`."""
    path, size = existing_path(root), check_integer("size", size, 1)
    with open_tree(path, into_archive=True) as tree:
        found = {domain: find_images(tree, name) for domain, name in _DOMAINS.items()}
        if not all(files for files, _ in found.values()):
            raise layout_error(path, EXPECTED, tree.names)
        class_names = sorted({file.class_name for files, _ in found.values() for file in files})
        domains: dict[str, ImageSet] = {}
        for domain, (files, passed_over) in found.items():
            domains[domain] = read_images(
                tree,
                files,
                class_names,
                size,
                folder=domain_folder(folder, domain),
                description=domain,
                progress=progress,
            )
            add_counts(domains[domain].skipped, passed_over)
        pairs, unusable = _read_pairs(tree, domains["sketches"], domains["photos"])
    info = {"dataset": "sketch_photo", "root": str(path), "size": size}
    result = join_domains(domains["sketches"], domains["photos"], pairs, info)
    add_counts(result.skipped, unusable)
    return result


def _read_pairs(tree: Tree, sketches: ImageSet, photos: ImageSet) -> tuple[NDArray[np.int64], dict[str, int]]:
    """The pairs that PAIRS_FILE lists, and how much of it cannot be used, by reason."""
    listed = [name for name in tree.names if PurePosixPath(name).name == PAIRS_FILE]
    if not listed:
        return np.full(len(sketches), -1, np.int64), {}
    try:
        entries = json.loads(tree.read(listed[0]))
        if not isinstance(entries, list):
            raise ValueError("it holds no list")
    except (ValueError, *READ_ERRORS):
        return np.full(len(sketches), -1, np.int64), {"broken list of pairs": 1}
    photo_of: dict[str, str] = {}
    for entry in entries:
        try:
            photo_of[_image_name(entry["sketch"])] = _image_name(entry["photo"])
        except (KeyError, TypeError):
            continue  # counted below, as a pair not there
    pairs = pair_names(sketches, photos, photo_of.get)
    paired = np.flatnonzero(pairs >= 0)
    apart = paired[sketches.labels[paired] != photos.labels[pairs[paired]]]
    pairs[apart] = -1
    unusable = {
        "pair without its files": len(entries) - len(paired),
        "pair of two classes": len(apart),
    }
    return pairs, {reason: count for reason, count in unusable.items() if count}


def _image_name(path: str) -> str:
    """`sketch/dog/a-1.png` as "dog/a-1"."""
    parts = PurePosixPath(path)
    return f"{parts.parent.name}/{parts.stem}"
