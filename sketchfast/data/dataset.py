"""In-memory data sets of drawings: strokes packed end to end, and labelled images."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from .archive import READ_ERRORS
from .strokes import Sketch

CACHE_VERSION = 1
HEADER_FIELDS = {"class_names": list, "skipped": dict, "info": dict}  # of the cache's JSON header


def _row_index(indices: ArrayLike, count: int) -> NDArray[np.int64]:
    """`indices` (integers, negative from the end, or a bool mask) as int64 rows of `count`."""
    index = np.asarray(indices)
    if index.dtype == bool:
        if index.shape != (count,):
            raise ValueError(f"indices as a mask must have shape [{count}], got {list(index.shape)}")
        index = np.flatnonzero(index)
    if index.size == 0:
        return np.zeros(0, np.int64)
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise TypeError(f"indices must be one-dimensional integers, got {index.dtype} {list(index.shape)}")
    if index.min() < -count or index.max() >= count:
        raise IndexError(f"indices must be in [{-count}, {count}), got {index.min()} to {index.max()}")
    return np.where(index < 0, index + count, index).astype(np.int64)


def ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The concatenation of the integer ranges start .. start + length - 1."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


@dataclass
class StrokeDataset(Dataset[tuple[Sketch, int]]):
    """N drawings in memory, map-style: `ds[i] -> (Sketch, label)`.

    points: float32 [sum T, 2], all drawings end to end. pen_down: bool [sum T]. offsets: int64 [N + 1],
    drawing i is rows offsets[i]:offsets[i + 1]. labels: int64 [N], indices into class_names. skipped: how
    many drawings (or files) were left out, by reason. info: where it came from. extra: further values a
    drawing, arrays of N rows (key ids, instances, drawers, ...).
    """

    points: NDArray[np.float32]
    pen_down: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    class_names: list[str]
    skipped: dict[str, int] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        total, count = len(self.points), len(self.labels)
        if self.points.shape != (total, 2) or self.points.dtype != np.float32:
            raise ValueError(
                f"points must be float32 [N, 2], got {self.points.dtype} {list(self.points.shape)}"
            )
        if self.pen_down.shape != (total,) or self.pen_down.dtype != bool:
            raise ValueError(f"pen_down must be bool [{total}], got {self.pen_down.dtype}")
        if self.offsets.shape != (count + 1,) or self.offsets[0] != 0 or self.offsets[-1] != total:
            raise ValueError(
                f"offsets must have shape [{count + 1}], from 0 to {total}, got {list(self.offsets.shape)}"
            )
        if (np.diff(self.offsets) < 0).any():
            raise ValueError("offsets must not decrease")
        if count and not (self.labels.min() >= 0 and self.labels.max() < len(self.class_names)):
            raise ValueError(f"labels must be in [0, {len(self.class_names)})")
        for name, values in self.extra.items():
            if len(values) != count:
                raise ValueError(f"extra[{name!r}] must have {count} rows, got {len(values)}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Sketch, int]:
        count = len(self.labels)
        if not -count <= index < count:
            raise IndexError(f"index must be in [{-count}, {count}), got {index}")
        index = index % count
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Sketch(self.points[rows], self.pen_down[rows]), int(self.labels[index])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Points a drawing, int64 [N]."""
        return np.diff(self.offsets)

    def subset(self, indices: ArrayLike) -> StrokeDataset:
        """The drawings at `indices` (integers or a bool mask), copied; names and labels stay as they are."""
        index = _row_index(indices, len(self))
        lengths = self.lengths[index]
        rows = ranges(self.offsets[index], lengths)
        return replace(
            self,
            points=self.points[rows],
            pen_down=self.pen_down[rows],
            offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
            labels=self.labels[index],
            class_names=list(self.class_names),
            extra={name: values[index] for name, values in self.extra.items()},
            skipped=dict(self.skipped),
            info=dict(self.info),
        )

    def select_classes(self, names: Sequence[str]) -> StrokeDataset:
        """The drawings of the classes `names`, relabelled 0 .. len(names) - 1 in that order."""
        wanted = [class_index(self.class_names, name) for name in names]
        relabel = np.full(len(self.class_names), -1, np.int64)
        relabel[wanted] = np.arange(len(wanted))
        kept = self.subset(np.flatnonzero(relabel[self.labels] >= 0))
        return replace(kept, labels=relabel[kept.labels], class_names=list(names))

    @classmethod
    def from_sketches(
        cls,
        sketches: Sequence[Sketch],
        labels: ArrayLike,
        class_names: Sequence[str],
        *,
        skipped: dict[str, int] | None = None,
        info: dict[str, Any] | None = None,
        extra: dict[str, NDArray[Any]] | None = None,
    ) -> StrokeDataset:
        """Packs a list of sketches with their labels."""
        lengths = [len(s.points) for s in sketches]
        return cls(
            points=np.concatenate([np.zeros((0, 2), np.float32), *(s.points for s in sketches)]),
            pen_down=np.concatenate([np.zeros(0, bool), *(s.pen_down for s in sketches)]),
            offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
            labels=np.asarray(labels, dtype=np.int64).reshape(-1),
            class_names=list(class_names),
            skipped=skipped or {},
            info=info or {},
            extra=extra or {},
        )

    def save(self, path: str | Path) -> None:
        """Writes the packed cache, an `.npz` without pickles: to a temporary name first, then renamed."""
        _save(self, path, ("points", "pen_down", "offsets", "labels"))

    @classmethod
    def load(cls, path: str | Path) -> StrokeDataset:
        """Reads what `save` wrote; ValueError for any other or a damaged file."""
        fields = _load(path, ("points", "pen_down", "offsets", "labels"))
        try:
            return cls(**fields)
        except (ValueError, TypeError) as error:  # whole, but inconsistent
            raise ValueError(f"path: {path} is no readable cache: {error}") from error


@dataclass
class LabelledImages:
    """N labelled images.

    images: uint8 [N, H, W], ink = 255 on 0, or RGB [N, H, W, 3]. labels: int64 [N], indices into class_names.
    skipped, info and extra as in `StrokeDataset`.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: list[str]
    skipped: dict[str, int] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.images[index], int(self.labels[index])

    def subset(self, indices: ArrayLike) -> LabelledImages:
        """The images at `indices` (integers or a bool mask); class names and labels stay as they are."""
        index = _row_index(indices, len(self))
        return replace(
            self,
            images=self.images[index],
            labels=self.labels[index],
            extra={name: values[index] for name, values in self.extra.items()},
        )

    def save(self, path: str | Path) -> None:
        """Writes the packed cache, as `StrokeDataset.save`."""
        _save(self, path, ("images", "labels"))

    @classmethod
    def load(cls, path: str | Path) -> LabelledImages:
        """Reads what `save` wrote; ValueError for any other or a damaged file."""
        return cls(**_load(path, ("images", "labels")))


def _save(data: StrokeDataset | LabelledImages, path: str | Path, arrays: Sequence[str]) -> None:
    """Writes the arrays named, `extra`, and the rest as a JSON header."""
    extra = {f"extra_{name}": values for name, values in data.extra.items()}
    if any(values.dtype.hasobject for values in extra.values()):
        raise TypeError("extra must hold no object arrays: they cannot be saved without pickle")
    header = {
        "version": CACHE_VERSION,
        "class_names": data.class_names,
        "skipped": data.skipped,
        "info": data.info,
    }
    write_npz(Path(path), header, **{name: getattr(data, name) for name in arrays}, **extra)


def _load(path: str | Path, required: Sequence[str]) -> dict[str, Any]:
    """The fields that `_save` wrote."""
    header, arrays = read_npz(Path(path), required)
    extra = {k.removeprefix("extra_"): v for k, v in arrays.items() if k.startswith("extra_")}
    fields = {name: arrays[name] for name in required}
    return {**fields, **{k: header[k] for k in HEADER_FIELDS}, "extra": extra}


def class_index(names: Sequence[str], name: str) -> int:
    """Where `name` stands in `names`; ValueError with the nearest names if it does not."""
    if name in names:
        return names.index(name)
    from difflib import get_close_matches

    near = get_close_matches(name, names, n=3) or list(names[:3])
    raise ValueError(f"classes must be among the {len(names)} found ({', '.join(near)}, ...), got {name!r}")


def add_counts(total: dict[str, int], more: dict[str, int]) -> None:
    """Adds the counts of `more` to `total` in place."""
    for reason, count in more.items():
        total[reason] = total.get(reason, 0) + count


def track(items: Iterable[Any], description: str, progress: bool, total: int | None = None) -> Iterable[Any]:
    """`items`, with a progress bar if asked for."""
    if not progress:
        return items
    from rich.progress import track as rich_track

    return rich_track(items, description=description, total=total)


def write_npz(path: Path, header: dict[str, Any], **arrays: NDArray[Any]) -> None:
    """Writes arrays and a JSON header to `path`, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, header=np.array(json.dumps(header)), **arrays)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_npz(path: Path, required: Sequence[str]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The header and arrays that `write_npz` wrote; ValueError for another or a damaged file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop("header")))
        if header["version"] != CACHE_VERSION:
            raise ValueError(f"its version is {header['version']}, this is version {CACHE_VERSION}")
        if missing := [name for name in required if name not in arrays]:
            raise ValueError(f"it holds no {missing[0]}")
        for name, kind in HEADER_FIELDS.items():
            if not isinstance(header.get(name), kind):
                raise ValueError(f"its header holds no {kind.__name__} {name}")
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError, *READ_ERRORS) as error:
        raise ValueError(f"path: {path} is no readable cache: {error}") from error
    return header, arrays
