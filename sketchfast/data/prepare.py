"""A packed cache of a downloaded data set: parsed once, read in a moment ever after.

The cache lies with the data as a hidden `.npz`, which the readers pass over. It holds the sizes and times of
the files it was made of, and is used only as long as they are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .dataset import StrokeDataset
from .omniglot import load_omniglot_strokes
from .quickdraw import load_quickdraw

READERS: dict[str, Callable[..., StrokeDataset]] = {
    "quickdraw": load_quickdraw,
    "omniglot": load_omniglot_strokes,
}


def cache_path(name: str, root: str | Path) -> Path:
    """Where the cache of the data set `name` in the folder or archive `root` lies."""
    root = Path(root)
    if root.is_dir():
        return root / f".sketchfast-{name}.npz"
    return root.with_name(f".{root.name}.sketchfast-{name}.npz")


def _fingerprint(root: Path) -> list[list[str | int]]:
    """Name, size and time of every file the readers may look at."""
    if root.is_dir():
        files = [p for p in sorted(root.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    else:
        files = [root]
    return [[str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def prepare(name: str, root: str | Path, *, progress: bool = False) -> tuple[Path, StrokeDataset]:
    """Read all strokes of the data set `name` in `root` and write the cache; its path and what it holds.

    Raises ValueError for an unknown name, and what the reader raises (a wrong layout among it); OSError where
    the folder cannot be written.
    """
    if name not in READERS:
        raise ValueError(f"name must be one of {', '.join(sorted(READERS))}, got {name!r}")
    drawings = READERS[name](root, progress=progress)
    path = cache_path(name, root)
    replace(drawings, info={**drawings.info, "files": _fingerprint(Path(root))}).save(path)
    return path, drawings


def load_prepared(name: str, root: str | Path) -> StrokeDataset | None:
    """What `prepare` cached; None where it did not, or the files have changed since (with a warning)."""
    path = cache_path(name, root)
    if not path.is_file():
        return None
    try:
        drawings = StrokeDataset.load(path)
    except ValueError as error:
        warnings.warn(f"cache passed over: {error}", RuntimeWarning, stacklevel=2)
        return None
    if drawings.info.get("files") != _fingerprint(Path(root)):
        warnings.warn(
            f"cache {path} passed over: its files changed; `sketchfast data prepare {name} {root}` renews it",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return drawings
