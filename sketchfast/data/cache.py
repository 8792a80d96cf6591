"""Where packed caches lie, and whether they still fit the files they were made of.

A cache lies with the data under a hidden name, which the readers pass over. It holds a fingerprint of the
names, sizes and times of the files it was made of, and is used only as long as it is the same.
"""

from __future__ import annotations

import hashlib
import warnings
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

from .archive import walk_files
from .images import ImageSet, SketchPhotoSet

Images = TypeVar("Images", ImageSet, SketchPhotoSet)


def image_cache_path(name: str, root: str | Path, size: int) -> Path:
    """The folder that caches the images, `size` pixels wide, of the data set `name` in `root`."""
    root = Path(root)
    if root.is_dir():
        return root / f".sketchfast-{name}-{size}"
    return root.with_name(f".{root.name}.sketchfast-{name}-{size}")


def fingerprint(root: Path) -> str:
    """A digest of name, size and time of every file the readers may look at."""
    digest = hashlib.sha256()
    for name, size, time in file_states(root):
        digest.update(f"{name}\0{size}\0{time}\n".encode())
    return digest.hexdigest()


def file_states(root: Path) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time in nanoseconds of the files in the folder, or of the one file, `root`."""
    entries = sorted(walk_files(root), key=itemgetter(0)) if root.is_dir() else [(".", root)]
    states = ((name, entry.stat()) for name, entry in entries)
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]


def load_image_cache(kind: type[Images], name: str, root: Path, size: int, **made_with: str) -> Images | None:
    """What `prepare` cached; None where it did not, or the files have changed since (with a warning).

    made_with: what the cache's `info` must say, else it is passed over: it is of another rendering.
    """
    path = image_cache_path(name, root, size)
    if not path.is_dir():
        return None
    try:
        images = kind.load(path)
    except ValueError as error:
        warnings.warn(f"cache passed over: {error}", RuntimeWarning, stacklevel=3)
        return None
    if any(images.info.get(key) != value for key, value in made_with.items()):
        return None
    if images.info.get("fingerprint") != fingerprint(root):
        warnings.warn(
            f"cache {path} passed over: its files changed; "
            f"`sketchfast data prepare {name} {root} --size {size}` renews it",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return images
