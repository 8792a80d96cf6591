"""QuickDraw (Jongejan et al., 2016): every format it is given out in.

One file a class, named by the class: `.ndjson` (simplified or raw), `.bin` (simplified, binary), `.npz`
(sketch-rnn's stroke-3, train/valid/test) for strokes, `.npy` for 28 x 28 bitmaps. The long text and binary
formats are parsed by the compiled `sketchfast._host` where it is built, else in Python to the same bits.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from ..ops._contract import check_integer
from .archive import READ_ERRORS, Tree, ZipTree, existing_path, layout_error, open_tree
from .dataset import LabelledImages, StrokeDataset, add_counts, class_index, ranges, track
from .safe_pickle import UnsafePickleError, load_npy

EXPECTED = """  <root>/cat.ndjson            simplified or raw drawings, one JSON object a line
  <root>/cat.bin               or the binary simplified drawings
  <root>/cat.npz               or sketch-rnn's train/valid/test arrays
  <root>/dog.ndjson ...        one file a class; also inside a .zip, or a .zip in <root>"""
EXPECTED_BITMAPS = """  <root>/cat.npy               uint8 [N, 784] bitmaps
  <root>/dog.npy ...           one file a class; also inside a .zip, or a .zip in <root>"""
FORMATS = ("ndjson", "bin", "npz")
NPZ_SPLITS = ("train", "valid", "test")
CLASS_SPLITS = ("seen", "unseen")

# Reasons in `skipped`, the same whichever parser ran.
BROKEN_LINE = "broken JSON line"
MALFORMED = "malformed drawing"
NOT_FINITE = "coordinate not finite"
EMPTY = "empty drawing"
TRUNCATED = "truncated record"
TOO_LONG = "more than max_points points"
BROKEN_FILE = "broken file"


class Parsed(NamedTuple):
    """Drawings of one file, packed as in `StrokeDataset`.

    key_ids: uint64 [n], 0 where unknown. recognized: int8 [n], 1, 0, or -1 where unknown. skipped: counts
    of the drawings left out, by reason.
    """

    points: NDArray[np.float32]
    pen_down: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    key_ids: NDArray[np.uint64]
    recognized: NDArray[np.int8]
    skipped: dict[str, int]

    def take(self, index: NDArray[np.int64]) -> Parsed:
        """The drawings at `index`, in that order."""
        lengths = np.diff(self.offsets)[index]
        rows = ranges(self.offsets[index], lengths)
        return self._replace(
            points=self.points[rows],
            pen_down=self.pen_down[rows],
            offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
            key_ids=self.key_ids[index],
            recognized=self.recognized[index],
        )


class _Packer:
    """Collects drawings one by one."""

    def __init__(self) -> None:
        self.points: list[NDArray[np.float32]] = []
        self.pens: list[NDArray[np.bool_]] = []
        self.key_ids: list[int] = []
        self.recognized: list[int] = []
        self.skipped: Counter[str] = Counter()

    def add(
        self, points: NDArray[Any], pens: NDArray[np.bool_], key_id: int = 0, recognized: int = -1
    ) -> None:
        if not len(points):
            self.skipped[EMPTY] += 1
            return
        with np.errstate(over="ignore"):
            xy = points.astype(np.float32)
        if not np.isfinite(xy).all():
            self.skipped[NOT_FINITE] += 1
            return
        pens[-1] = False
        self.points.append(xy)
        self.pens.append(pens)
        self.key_ids.append(key_id)
        self.recognized.append(recognized)

    def result(self) -> Parsed:
        lengths = [len(p) for p in self.points]
        return Parsed(
            np.concatenate(self.points) if lengths else np.zeros((0, 2), np.float32),
            np.concatenate(self.pens) if lengths else np.zeros(0, bool),
            np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
            np.array(self.key_ids, np.uint64),
            np.array(self.recognized, np.int8),
            dict(self.skipped),
        )


def _host() -> Any | None:
    """The compiled parsers, or None where they are not built."""
    try:
        return import_module("sketchfast._host")
    except ImportError:
        return None


# ---- ndjson ------------------------------------------------------------------------------------------------


def parse_ndjson(data: bytes, *, impl: str = "auto") -> Parsed:
    """The drawings of an `.ndjson` file's bytes, simplified ([xs, ys]) or raw ([xs, ys, ts]).

    Times are dropped. Blank lines are ignored; a line that is no JSON object with a well-formed `drawing` is
    counted in `skipped`. Other fields may be absent. impl: "auto", "native" (sketchfast._host) or "python".
    """
    module = _choose(impl)
    if module is None:
        return _parse_ndjson_python(data)
    points, pens, offsets, key_ids, recognized, before, spans = module.parse_ndjson(data)
    fast = Parsed(points, pens.view(bool), offsets, key_ids, recognized, {})
    if not len(spans):
        return fast
    return _merge_deferred(data, fast, before, spans)


def _merge_deferred(data: bytes, fast: Parsed, before: NDArray[np.int64], spans: NDArray[np.int64]) -> Parsed:
    """Puts the lines the compiled parser left to Python where they belong among those it parsed.

    before[i]: how many drawings were parsed ahead of deferred line i; spans [n, 2]: its bytes' start and end.
    """
    packer = _Packer()
    position = []
    for ahead, (start, end) in zip(before.tolist(), spans.tolist(), strict=True):
        count = len(packer.points)
        _parse_line(data[start:end], packer)
        position += [ahead] * (len(packer.points) - count)
    slow = packer.result()
    order = np.argsort(
        np.concatenate((np.arange(len(fast.key_ids)), np.array(position) - 0.5)), kind="stable"
    ).astype(np.int64)
    both = Parsed(
        np.concatenate((fast.points, slow.points)),
        np.concatenate((fast.pen_down, slow.pen_down)),
        np.concatenate((fast.offsets, fast.offsets[-1] + slow.offsets[1:])),
        np.concatenate((fast.key_ids, slow.key_ids)),
        np.concatenate((fast.recognized, slow.recognized)),
        slow.skipped,
    )
    return both.take(order) if len(slow.key_ids) else both


def _parse_ndjson_python(data: bytes) -> Parsed:
    packer = _Packer()
    for line in data.split(b"\n"):
        _parse_line(line, packer)
    return packer.result()


def _parse_line(line: bytes, packer: _Packer) -> None:
    line = line.strip(b" \t\r")
    if not line:
        return
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        packer.skipped[BROKEN_LINE] += 1
        return
    arrays = _drawing_arrays(record.get("drawing") if isinstance(record, dict) else None)
    if arrays is None:
        packer.skipped[MALFORMED] += 1
        return
    recognized = record.get("recognized")
    flag = int(recognized) if isinstance(recognized, bool) else -1
    packer.add(*arrays, _key_id(record.get("key_id")), flag)


def _drawing_arrays(drawing: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_]] | None:
    """Points and pens of a drawing's lists, or None if they are not well formed."""
    if not isinstance(drawing, list):
        return None
    xs: list[float] = []
    ys: list[float] = []
    pens: list[bool] = []
    for stroke in drawing:
        if not (isinstance(stroke, list) and len(stroke) in (2, 3)):
            return None
        if not all(isinstance(values, list) for values in stroke):
            return None
        count = len(stroke[0])
        if any(len(values) != count or not _all_numbers(values) for values in stroke):
            return None
        if count:
            xs += stroke[0]
            ys += stroke[1]
            pens += [True] * (count - 1) + [False]
    try:
        points = np.array([xs, ys], dtype=np.float64).T
    except OverflowError:  # an integer beyond float64
        points = np.full((1, 2), np.inf)
    return points, np.array(pens, bool)


def _all_numbers(values: list[Any]) -> bool:
    return all(type(v) is int or type(v) is float for v in values)


def _key_id(value: Any) -> int:
    """The key, digits or an integer, as a number below 2^64; 0 for what is none."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        value = int(value)
    return value if type(value) is int and 0 <= value < 1 << 64 else 0


# ---- bin ---------------------------------------------------------------------------------------------------

_BIN_HEADER = struct.Struct("<Q2sbIH")


def parse_bin(data: bytes, *, impl: str = "auto") -> Parsed:
    """The drawings of a simplified `.bin` file's bytes.

    A record (little-endian): uint64 key, char[2] country, int8 recognised, uint32 time, uint16 strokes; a
    stroke: uint16 n, n bytes x, n bytes y. A record that runs past the end is counted as truncated and is
    the last. impl: "auto", "native" (sketchfast._host) or "python".
    """
    module = _choose(impl)
    if module is None:
        return _parse_bin_python(data)
    points, pens, offsets, key_ids, recognized, empty, truncated = module.parse_bin(data)
    skipped = {reason: count for reason, count in ((EMPTY, empty), (TRUNCATED, truncated)) if count}
    return Parsed(points, pens.view(bool), offsets, key_ids, recognized, skipped)


def _parse_bin_python(data: bytes) -> Parsed:
    packer = _Packer()
    at = 0
    while at < len(data):
        if at + _BIN_HEADER.size > len(data):
            packer.skipped[TRUNCATED] += 1
            break
        key, _country, recognized, _time, strokes = _BIN_HEADER.unpack_from(data, at)
        at += _BIN_HEADER.size
        parts = []
        for _ in range(strokes):
            if at + 2 > len(data):
                break
            count = data[at] | data[at + 1] << 8
            at += 2
            if at + 2 * count > len(data):
                break
            parts.append(np.frombuffer(data, np.uint8, 2 * count, at).reshape(2, count).T)
            at += 2 * count
        if len(parts) < strokes:
            packer.skipped[TRUNCATED] += 1
            break
        pens = np.ones(sum(map(len, parts)), bool)
        pens[np.cumsum([len(p) for p in parts if len(p)], dtype=np.int64) - 1] = False
        packer.add(
            np.concatenate(parts) if parts else np.zeros((0, 2), np.uint8), pens, key, int(recognized != 0)
        )
    return packer.result()


def _choose(impl: str) -> Any | None:
    """The compiled module if `impl` asks for it or it is there for "auto", else None for the Python path."""
    if impl not in ("auto", "native", "python"):
        raise ValueError(f"impl must be auto, native or python, got {impl!r}")
    module = None if impl == "python" else _host()
    if impl == "native" and module is None:
        raise RuntimeError("impl='native' needs the compiled module sketchfast._host, not built here")
    return module


# ---- npz ---------------------------------------------------------------------------------------------------


def parse_npz(data: bytes, split: str | None = None) -> Parsed:
    """The drawings of a sketch-rnn `.npz` file's bytes: its `split` ("train", "valid", "test"), None for all.

    Each drawing is stroke-3. Raises UnsafePickleError where the file's pickles hold more than numeric arrays,
    ValueError where it is broken or has no such split.
    """
    packer = _Packer()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            present = [s for s in NPZ_SPLITS if f"{s}.npy" in archive.namelist()]
            wanted = present if split is None else [split]
            if not present or any(s not in present for s in wanted):
                wish = split or " or ".join(NPZ_SPLITS)
                raise ValueError(f"npz must hold {wish}, got {archive.namelist()[:5]}")
            rows = [row for s in wanted for row in load_npy(archive.read(f"{s}.npy"))]
    except UnsafePickleError:
        raise
    except (*READ_ERRORS, TypeError) as error:
        raise ValueError(f"npz is broken: {error}") from error
    for row in rows:
        if not (isinstance(row, np.ndarray) and row.dtype.kind in "iuf" and row.shape[1:] == (3,)):
            packer.skipped[MALFORMED] += 1
            continue
        packer.add(np.cumsum(row[:, :2], axis=0, dtype=np.float64), row[:, 2] <= 0.5)
    return packer.result()


# ---- a folder or zip of classes ----------------------------------------------------------------------------


def class_split(names: Sequence[str], train: int = 300, seed: int = 0) -> tuple[list[str], list[str]]:
    """Classes seen in training and unseen ones, picked at random (SketchEmbedNet: 300 of QuickDraw's 345).

    Depends on the set of names and the seed only, not on their order; both lists are sorted. Which 300 the
    paper picked is not published.
    """
    train, seed = check_integer("train", train, 0), check_integer("seed", seed, 0)
    ordered = sorted(set(_names("names", names)))
    if train > len(ordered):
        raise ValueError(f"train must be in [0, {len(ordered)}] for {len(ordered)} classes, got {train}")
    picked = np.random.default_rng(seed).permutation(len(ordered))[:train]
    seen = {ordered[i] for i in picked}
    return [n for n in ordered if n in seen], [n for n in ordered if n not in seen]


def class_of_file(name: str) -> str:
    """The class a file is named by: `full_simplified_cat.ndjson`, `sketchrnn_cat.full.npz`, ... -> `cat`."""
    stem = unquote(PurePosixPath(name).name).rsplit("/", 1)[-1].rsplit(".", 1)[0]
    stem = re.sub(r"^(full_(simplified|raw|binary|numpy_bitmap)_|sketchrnn_)", "", stem)
    return stem.removesuffix(".full")


class _ClassFile(NamedTuple):
    tree: Tree
    name: str
    format: str
    class_name: str


def _class_files(
    stack: ExitStack, root: Path, formats: Sequence[str], expected: str, skipped: dict[str, int]
) -> list[_ClassFile]:
    """The class files under root; where there are none, those in the zips under root.

    Of these, broken ones are counted in `skipped`, unless none can be opened.
    """
    top = stack.enter_context(open_tree(root))
    trees = [top]
    if not any(PurePosixPath(n).suffix[1:] in formats for n in top.names) and not isinstance(top, ZipTree):
        trees = _open_zips(stack, [root / n for n in top.names if n.lower().endswith(".zip")], skipped)
    files = [
        _ClassFile(tree, name, PurePosixPath(name).suffix[1:], class_of_file(name))
        for tree in trees
        for name in tree.names
        if PurePosixPath(name).suffix[1:] in formats
    ]
    if not files:
        raise layout_error(root, expected, top.names)
    return files


def _open_zips(stack: ExitStack, paths: list[Path], skipped: dict[str, int]) -> list[Tree]:
    """The zips that can be opened, the others counted; if all are broken, the last one's error."""
    trees: list[Tree] = []
    for path in paths:
        try:
            trees.append(stack.enter_context(ZipTree(path)))
        except ValueError:
            if path == paths[-1] and not trees:
                raise
            add_counts(skipped, {BROKEN_FILE: 1})
    return trees


def _pick_format(files: list[_ClassFile], wanted: str | None, root: Path) -> tuple[str, list[_ClassFile]]:
    """The one format to read, and its files; ValueError where the choice is the caller's to make."""
    present = sorted({f.format for f in files})
    if wanted is None and len(present) > 1:
        raise ValueError(f"file_format must say which of {', '.join(present)} under {root} to read")
    chosen = wanted or present[0]
    files = [f for f in files if f.format == chosen]
    if not files:
        raise layout_error(root, EXPECTED, (f"files of format {p}" for p in present))
    _refuse_duplicates(files, root)
    return chosen, files


def _refuse_duplicates(files: list[_ClassFile], root: Path) -> None:
    double = [name for name, count in Counter(f.class_name for f in files).items() if count > 1]
    if double:
        raise ValueError(f"root: {root} holds several files of class {double[0]!r} (raw and simplified?)")


def _wanted_files(files: list[_ClassFile], classes: Sequence[str] | None) -> list[_ClassFile]:
    """The files of `classes`, in that order; all, sorted by class, for None."""
    ordered = sorted(files, key=lambda f: f.class_name)
    if classes is None:
        return ordered
    names = [f.class_name for f in ordered]
    return [ordered[class_index(names, c)] for c in dict.fromkeys(classes)]


def _names(name: str, value: Any) -> list[str]:
    """`value` as a list of str, or TypeError."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of names, got the {type(value).__name__} {value!r}")
    names = list(value)
    if wrong := [item for item in names if not isinstance(item, str)]:
        raise TypeError(f"{name} must be names, got the {type(wrong[0]).__name__} {wrong[0]!r} among them")
    return names


def _check_limit(name: str, value: int | None) -> int | None:
    return None if value is None else check_integer(name, value, 1)


def load_quickdraw(
    root: str | Path,
    *,
    classes: Sequence[str] | None = None,
    per_class: int | None = None,
    max_points: int | None = None,
    split: str | None = None,
    seed: int = 0,
    file_format: str | None = None,
    impl: str = "auto",
    progress: bool = False,
) -> StrokeDataset:
    """QuickDraw strokes from a folder of class files, a `.zip` of them, a folder with such zips, or one file.

    classes: names to load, labelled in this order (default: all, sorted). per_class: at most so many drawings
    a class, picked at random by `seed` (those kept stay in file order). max_points: drawings with more points
    are left out and counted, as the paper does at 64. split: "seen" or "unseen" classes of `class_split` with
    `seed` (the paper's 300 against the rest; with fewer than 345 classes 300/345 of them), or "train",
    "valid", "test", which only `.npz` files have. file_format: "ndjson", "bin" or "npz" where several lie
    side by side. impl: parser, as in `parse_ndjson`.

    Coordinates are the file's own (simplified: 0..255, raw: pixels of the device, npz: summed offsets).
    `extra` holds key_id and recognized. Broken files and lines are counted in `skipped`.

    Raises FileNotFoundError, LayoutError (a ValueError) showing the expected tree, ValueError for unknown
    classes or splits, UnsafePickleError for an `.npz` that pickles anything but numbers.
    """
    path = existing_path(root)
    classes = None if classes is None else _names("classes", classes)
    per_class, max_points = _check_limit("per_class", per_class), _check_limit("max_points", max_points)
    seed = check_integer("seed", seed, 0)
    if split not in (None, *CLASS_SPLITS, *NPZ_SPLITS):
        known = ", ".join(CLASS_SPLITS + NPZ_SPLITS)
        raise ValueError(f"split must be one of {known} or None, got {split!r}")
    if file_format not in (None, *FORMATS):
        raise ValueError(f"file_format must be one of {', '.join(FORMATS)} or None, got {file_format!r}")
    _choose(impl)  # an impl that cannot run is the caller's error, not the files'
    with ExitStack() as stack:
        skipped: dict[str, int] = {}
        found = _class_files(stack, path, FORMATS, EXPECTED, skipped)
        chosen, files = _pick_format(found, file_format, path)
        if split in NPZ_SPLITS and chosen != "npz":
            raise ValueError(f"split {split!r} exists in .npz files only, {path} holds .{chosen}")
        if split in CLASS_SPLITS:
            names = [f.class_name for f in files]
            parts = class_split(names, 300 if len(names) >= 345 else len(names) * 300 // 345, seed)
            inside = set(parts[CLASS_SPLITS.index(split)])
            files = [f for f in files if f.class_name in inside]
        files = _wanted_files(files, classes)
        parse = _parser(chosen, split if split in NPZ_SPLITS else None, impl)
        chunks = [
            _pick(_parse_file(file, parse, skipped), max_points, per_class, seed, file.class_name, skipped)
            for file in track(files, "QuickDraw", progress)
        ]
    info = {"dataset": "quickdraw", "root": str(path), "format": chosen, "split": split, "seed": seed}
    return _join(chunks, [f.class_name for f in files], skipped, info)


def _parser(file_format: str, split: str | None, impl: str) -> Callable[[bytes], Parsed]:
    if file_format == "npz":
        return lambda data: parse_npz(data, split)
    function = parse_ndjson if file_format == "ndjson" else parse_bin
    return lambda data: function(data, impl=impl)


def _parse_file(file: _ClassFile, parse: Callable[[bytes], Parsed], skipped: dict[str, int]) -> Parsed:
    """The file's drawings, none if it cannot be read; adds to `skipped`."""
    try:
        parsed = parse(file.tree.read(file.name))
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{file.name}: {error}") from error
    except (ValueError, *READ_ERRORS):
        add_counts(skipped, {BROKEN_FILE: 1})
        return _Packer().result()
    add_counts(skipped, parsed.skipped)
    return parsed


def _pick(
    parsed: Parsed,
    max_points: int | None,
    per_class: int | None,
    seed: int,
    class_name: str,
    skipped: dict[str, int],
) -> Parsed:
    """Leaves out long drawings, then keeps a random `per_class` of them."""
    lengths = np.diff(parsed.offsets)
    index = np.arange(len(lengths))
    if max_points is not None:
        index = np.flatnonzero(lengths <= max_points)
        if len(index) < len(lengths):
            add_counts(skipped, {TOO_LONG: len(lengths) - len(index)})
    if per_class is not None and len(index) > per_class:
        # Seeded by the class's name, so that a class keeps its drawings whichever others are loaded.
        rng = np.random.default_rng([seed, *class_name.encode()])
        index = np.sort(rng.choice(index, per_class, replace=False))
    return parsed if len(index) == len(lengths) else parsed.take(index)


def _join(
    chunks: list[Parsed], names: list[str], skipped: dict[str, int], info: dict[str, Any]
) -> StrokeDataset:
    counts = [len(c.key_ids) for c in chunks]
    ends = np.cumsum([0] + [int(c.offsets[-1]) for c in chunks])
    starts = [c.offsets[:-1] + start for c, start in zip(chunks, ends[:-1], strict=True)]
    return StrokeDataset(
        points=np.concatenate([np.zeros((0, 2), np.float32), *(c.points for c in chunks)]),
        pen_down=np.concatenate([np.zeros(0, bool), *(c.pen_down for c in chunks)]),
        offsets=np.concatenate([*starts, ends[-1:]]).astype(np.int64),
        labels=np.repeat(np.arange(len(chunks)), counts).astype(np.int64),
        class_names=names,
        skipped=skipped,
        info=info,
        extra={
            "key_id": np.concatenate([np.zeros(0, np.uint64), *(c.key_ids for c in chunks)]),
            "recognized": np.concatenate([np.zeros(0, np.int8), *(c.recognized for c in chunks)]),
        },
    )


def load_quickdraw_bitmaps(
    root: str | Path,
    *,
    classes: Sequence[str] | None = None,
    per_class: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> LabelledImages:
    """QuickDraw's 28 x 28 bitmaps (`<class>.npy`, uint8 [N, 784]), ink = 255.

    Arguments and errors as in `load_quickdraw`; a broken file is counted in `skipped`.
    """
    path = existing_path(root)
    classes = None if classes is None else _names("classes", classes)
    per_class, seed = _check_limit("per_class", per_class), check_integer("seed", seed, 0)
    with ExitStack() as stack:
        skipped: dict[str, int] = {}
        found = _class_files(stack, path, ("npy",), EXPECTED_BITMAPS, skipped)
        _refuse_duplicates(found, path)
        files = _wanted_files(found, classes)
        chunks = list(_bitmaps(track(files, "QuickDraw", progress), per_class, seed, skipped))
    return LabelledImages(
        images=np.concatenate([np.zeros((0, 28, 28), np.uint8), *chunks]),
        labels=np.repeat(np.arange(len(chunks)), [len(c) for c in chunks]).astype(np.int64),
        class_names=[f.class_name for f in files],
        skipped=skipped,
        info={"dataset": "quickdraw", "root": str(path), "format": "npy", "seed": seed},
    )


def _bitmaps(
    files: Any, per_class: int | None, seed: int, skipped: dict[str, int]
) -> Iterator[NDArray[np.uint8]]:
    """The bitmaps of each class, none for a broken file."""
    for file in files:
        try:
            images = load_npy(file.tree.read(file.name))
            if images.ndim != 2 or images.shape[1] != 784 or images.dtype != np.uint8:
                raise ValueError(f"{file.name} must be uint8 [N, 784]")
        except (ValueError, *READ_ERRORS):
            add_counts(skipped, {BROKEN_FILE: 1})
            images = np.zeros((0, 784), np.uint8)
        if per_class is not None and len(images) > per_class:
            rng = np.random.default_rng([seed, *file.class_name.encode()])
            images = images[np.sort(rng.choice(len(images), per_class, replace=False))]
        yield images.reshape(-1, 28, 28)
