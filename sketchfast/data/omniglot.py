"""Omniglot (Lake et al., 2015): images, pen strokes, and the splits few-shot papers use.

Splits of the 1,623 characters
* "background" (964) and "evaluation" (659): the two archives as published.
* "vinyals-train" (1,200) and "vinyals-test" (423): the split of Vinyals et al. (2016) as handed on by its
  users. The published lists name single characters; they are the background alphabets in order of name,
  then the evaluation alphabets in order of name, cut after 1,200 characters (so Gurmukhi 42 to 45 are the
  first of the test part), and are made by that rule here. "vinyals-val" (172) is the part of the 1,200 that
  the lists keep for validation: the alphabets of VINYALS_VALIDATION; "vinyals-fit" (1,028) is the rest.
* "random-train" and "random-test": 1,200 and 423 characters picked at random by `seed`. Nobody's published
  split.
* a path: a text file with one `Alphabet/characterNN` or `Alphabet/characterNN/rot090` a line.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..ops._contract import check_integer
from .archive import READ_ERRORS, Tree, ZipTree, existing_path, layout_error, open_tree
from .dataset import LabelledImages, StrokeDataset, add_counts, track
from .strokes import Sketch, from_strokes

IMAGE_SIZE = 105
VINYALS_TRAIN = 1200
VINYALS_VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
SPLITS = (
    "background",
    "evaluation",
    "all",
    "vinyals-train",
    "vinyals-test",
    "vinyals-val",
    "vinyals-fit",
    "random-train",
    "random-test",
)
STROKE_SETS = ("strokes_background_small1", "strokes_background_small2")
ROTATIONS = (0, 90, 180, 270)

EXPECTED = """  <root>/images_background.zip         or the extracted folder images_background/
  <root>/images_evaluation.zip         or images_evaluation/
      images_background/<Alphabet>/characterNN/<id>_<drawer>.png"""
EXPECTED_STROKES = """  <root>/strokes_background_small1.zip   or the extracted folder
  <root>/strokes_background_small2.zip   or the extracted folder
      strokes_background_small1/<Alphabet>/characterNN/<id>_<drawer>.txt
  <root>/images_background.zip           with their images (or images_background_small1/2)"""


class _File(NamedTuple):
    tree: Tree
    name: str
    character: str  # "Alphabet/characterNN"
    stem: str  # "<id>_<drawer>"

    @property
    def key(self) -> str:
        return f"{self.character}/{self.stem}"

    @property
    def drawer(self) -> int:
        return int(self.stem.split("_")[1])


def _find_files(stack: ExitStack, root: Path, set_name: str, suffix: str) -> list[_File]:
    """The files of the set `set_name` ("images_background", ...), from a folder or a zip.

    `root` may be what holds the set (or its zip) or the set itself; empty where it is not there.
    """
    inner = root / f"{set_name}.zip"
    if root.is_dir() and not (root / set_name).is_dir() and root.name != set_name and inner.is_file():
        tree: Tree = stack.enter_context(ZipTree(inner))
    elif root.is_dir() and (root / set_name).is_dir():
        tree = stack.enter_context(open_tree(root / set_name))
    else:
        tree = stack.enter_context(open_tree(root))
    files = []
    for name in tree.names:
        parts = PurePosixPath(name).parts
        if not name.endswith(suffix) or len(parts) < 3 or not parts[-2].startswith("character"):
            continue
        if set_name not in (tree.path.name, *parts[:-3]):
            continue
        stem = PurePosixPath(name).stem
        identity = stem.split("_")
        if len(identity) == 2 and all(i.isdigit() for i in identity):
            files.append(_File(tree, name, f"{parts[-3]}/{parts[-2]}", stem))
    return sorted(files, key=lambda f: f.key)


def _split_characters(split: str, background: list[str], evaluation: list[str], seed: int) -> list[str]:
    """The characters of a split, of those there are."""
    everything = background + evaluation  # each in order of name: the order of Vinyals' lists
    if split == "background":
        return background
    if split == "evaluation":
        return evaluation
    if split == "all":
        return everything
    if split.startswith("random-"):
        order = np.random.default_rng(seed).permutation(len(everything))
        picked = set(order[:VINYALS_TRAIN].tolist())
        return [c for i, c in enumerate(everything) if (i in picked) == (split == "random-train")]
    if split == "vinyals-test":
        return everything[VINYALS_TRAIN:]
    train = everything[:VINYALS_TRAIN]
    if split == "vinyals-train":
        return train
    return [c for c in train if (c.split("/")[0] in VINYALS_VALIDATION) == (split == "vinyals-val")]


def _listed_classes(path: Path) -> dict[str, list[int]]:
    """The characters of a list file, in its order, each with the rotations it names (degrees)."""
    wanted: dict[str, list[int]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        parts = line.strip().split("/")
        if parts == [""]:
            continue
        rotation = parts[2] if len(parts) == 3 else "rot000"
        if len(parts) not in (2, 3) or rotation not in [f"rot{r:03}" for r in ROTATIONS]:
            raise ValueError(
                f"split: line {number} of {path} must be Alphabet/characterNN[/rot090], got {line!r}"
            )
        wanted.setdefault("/".join(parts[:2]), []).append(int(rotation[3:]))
    return wanted


def _check_size(size: int | None) -> int | None:
    return None if size is None else check_integer("size", size, 1)


def load_omniglot(
    root: str | Path,
    *,
    split: str | Path = "evaluation",
    rotations: bool = False,
    size: int | None = 28,
    seed: int = 0,
    progress: bool = False,
) -> LabelledImages:
    """Omniglot's images: uint8 [N, size, size], ink = 255 on 0.

    root: the folder with the archives `images_background.zip`, `images_evaluation.zip` or their extracted
    folders, or one of these itself if the split needs no more. split: see this module's head, or the path of
    a list file. rotations: every character turned by 0, 90, 180 and 270 degrees counter-clockwise makes four
    classes, "Alphabet/characterNN/rot000" ... (a list file that names rotations brings its own). size: side
    in pixels, reduced from 105 with antialiasing; None keeps 105. seed: of the random splits.

    Classes are in the split's order. `extra`: drawer (1 to 20) and key ("Alphabet/characterNN/0001_01").

    Raises FileNotFoundError, LayoutError (a ValueError) with the expected tree, ValueError for an unknown
    split.
    """
    path = existing_path(root)
    size = _check_size(size)
    seed = check_integer("seed", seed, 0)
    if not isinstance(split, (str, Path)):
        raise TypeError(f"split must be a str or Path, got the {type(split).__name__} {split!r}")
    listed = None
    if split not in SPLITS:
        if not Path(split).is_file():
            raise ValueError(f"split must be one of {', '.join(SPLITS)} or the path of a list, got {split!r}")
        listed = _listed_classes(Path(split))
    with ExitStack() as stack:
        found = {s: _find_files(stack, path, f"images_{s}", ".png") for s in ("background", "evaluation")}
        needed = (split,) if split in found else tuple(found)
        if missing := [s for s in needed if not found[s]]:
            raise layout_error(path, EXPECTED, [f"no images_{s}" for s in missing])
        names = {s: list(dict.fromkeys(f.character for f in files)) for s, files in found.items()}
        if listed is not None:
            characters = list(listed)
        else:
            characters = _split_characters(str(split), names["background"], names["evaluation"], seed)
        by_character: dict[str, list[_File]] = {c: [] for c in characters}
        for file in found["background"] + found["evaluation"]:
            if file.character in by_character:
                by_character[file.character].append(file)
        if absent := [c for c in characters if not by_character[c]]:
            raise ValueError(f"split names characters that {path} does not hold: {absent[:3]}")
        files = [f for c in characters for f in by_character[c]]
        skipped: dict[str, int] = {}
        images, files = _read_images(files, size, skipped, progress)
    info = {
        "dataset": "omniglot",
        "root": str(path),
        "split": str(split),
        "rotations": rotations,
        "seed": seed,
    }
    labels = _labels(files, characters)
    result = LabelledImages(images, labels, characters, skipped, info, _extra(files))
    if listed is not None and any(turns != [0] for turns in listed.values()):
        return _rotate(result, [listed[c] for c in characters])
    return _rotate(result, [list(ROTATIONS)] * len(characters)) if rotations else result


def _labels(files: Sequence[_File], characters: Sequence[str]) -> NDArray[np.int64]:
    index = {c: i for i, c in enumerate(characters)}
    return np.array([index[f.character] for f in files], np.int64)


def _extra(files: Sequence[_File]) -> dict[str, NDArray[Any]]:
    return {
        "drawer": np.array([f.drawer for f in files], np.int64),
        "key": np.array([f.key for f in files], np.str_),
    }


def _read_images(
    files: list[_File], size: int | None, skipped: dict[str, int], progress: bool
) -> tuple[NDArray[np.uint8], list[_File]]:
    """The images [N, s, s] of the files that can be read, and these files."""
    side = size or IMAGE_SIZE
    images = np.zeros((len(files), side, side), np.uint8)
    kept: list[_File] = []
    for file in track(files, "Omniglot images", progress, total=len(files)):
        try:
            image = _decode(file.tree.read(file.name), side)
        except (ValueError, SyntaxError, Image.DecompressionBombError, *READ_ERRORS):
            add_counts(skipped, {"broken image": 1})
            continue
        images[len(kept)] = image
        kept.append(file)
    return images[: len(kept)], kept


def _decode(data: bytes, side: int) -> NDArray[np.uint8]:
    """One PNG (ink is 0) as uint8 [side, side], ink = 255."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as file:
        if file.size != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"an Omniglot image is {IMAGE_SIZE} x {IMAGE_SIZE}, this one {file.size}")
        image = file.convert("L")
    if side != IMAGE_SIZE:
        image = image.resize((side, side), Image.Resampling.BILINEAR)  # antialiased when it reduces
    return 255 - np.asarray(image)


def _rotate(images: LabelledImages, turns: list[list[int]]) -> LabelledImages:
    """Every class c once for each angle of turns[c], as classes of their own, in the order of `turns`."""
    first = np.cumsum([0] + [len(t) for t in turns])
    parts: list[tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]] = []
    for position in range(max((len(t) for t in turns), default=0)):
        for angle in ROTATIONS:
            has = np.array([len(t) > position and t[position] == angle for t in turns], bool)
            rows = np.flatnonzero(has[images.labels])
            turned = np.rot90(images.images[rows], angle // 90, axes=(1, 2))
            parts.append((rows, turned, first[images.labels[rows]] + position))
    source, labels = np.concatenate([p[0] for p in parts]), np.concatenate([p[2] for p in parts])
    order = np.lexsort((source, labels))
    return LabelledImages(
        np.concatenate([p[1] for p in parts])[order],
        labels[order],
        [f"{name}/rot{r:03}" for name, turn in zip(images.class_names, turns, strict=True) for r in turn],
        images.skipped,
        images.info,
        {name: values[source[order]] for name, values in images.extra.items()},
    )


# ---- strokes -----------------------------------------------------------------------------------------------


def parse_strokes(text: str) -> Sketch:
    """One stroke file: lines START, `x,y,t`, BREAK (the pen leaves). y is negated to grow downwards.

    The result is in the image's pixels (105 x 105, pixel centres on integers), the times are dropped.
    Raises ValueError for what is no such file or draws nothing.
    """
    lines = text.split()
    if not lines or lines[0] != "START":
        raise ValueError("a stroke file must begin with START")
    strokes: list[list[tuple[float, float]]] = [[]]
    for line in lines[1:]:
        if line in ("START", "BREAK"):
            strokes.append([])
            continue
        x, y, _time = map(float, line.split(","))
        strokes[-1].append((x, -y))
    sketch = from_strokes(strokes)
    if not len(sketch.points):
        raise ValueError("a stroke file must hold points")
    return sketch


def load_omniglot_strokes(root: str | Path, *, progress: bool = False) -> StrokeDataset:
    """Omniglot's pen strokes of the background characters for which they are given out (242 of 964).

    Coordinates are pixels of the 105 x 105 image. `extra`: drawer and key, as in `load_omniglot`.
    Raises as `load_omniglot`.
    """
    path = existing_path(root)
    skipped: dict[str, int] = {}
    with ExitStack() as stack:
        # Two alphabets are in both sets, with the same drawings.
        by_key = {f.key: f for s in STROKE_SETS for f in _find_files(stack, path, s, ".txt")}
        if not by_key:
            raise layout_error(path, EXPECTED_STROKES)
        files = [by_key[key] for key in sorted(by_key)]
        sketches: list[Sketch] = []
        kept: list[_File] = []
        for file in track(files, "Omniglot strokes", progress, total=len(files)):
            try:
                sketches.append(parse_strokes(file.tree.read(file.name).decode("ascii")))
            except (ValueError, *READ_ERRORS):
                add_counts(skipped, {"broken stroke file": 1})
                continue
            kept.append(file)
    characters = list(dict.fromkeys(f.character for f in files))
    return StrokeDataset.from_sketches(
        sketches,
        _labels(kept, characters),
        characters,
        skipped=skipped,
        info={"dataset": "omniglot-strokes", "root": str(path)},
        extra=_extra(kept),
    )


class OmniglotPairs(NamedTuple):
    """Strokes and images of the same drawings: row i of one belongs to row i of the other."""

    strokes: StrokeDataset
    images: LabelledImages


def load_omniglot_pairs(root: str | Path, *, size: int | None = 28, progress: bool = False) -> OmniglotPairs:
    """The drawings of which both strokes and image are there, labelled alike. Raises as `load_omniglot`.

    Images come from `images_background`, or the two `images_background_small` sets. The strokes' coordinates
    stay pixels of the full 105 x 105 image, whatever `size`.
    """
    path = existing_path(root)
    size = _check_size(size)
    strokes = load_omniglot_strokes(path, progress=progress)
    skipped: dict[str, int] = {}
    with ExitStack() as stack:
        available = {
            f.key: f
            for s in ("images_background_small1", "images_background_small2", "images_background")
            for f in _find_files(stack, path, s, ".png")
        }
        keys: list[Any] = strokes.extra["key"].tolist()
        paired = [available[k] for k in keys if k in available]
        if not paired:
            raise layout_error(path, EXPECTED_STROKES, ["strokes, but no images of the same names"])
        if len(paired) < len(keys):
            add_counts(skipped, {"strokes without image": len(keys) - len(paired)})
        images, files = _read_images(paired, size, skipped, progress)
    row = {k: i for i, k in enumerate(keys)}
    strokes = strokes.subset([row[f.key] for f in files])
    info = {"dataset": "omniglot-pairs", "root": str(path)}
    labelled = LabelledImages(images, strokes.labels, strokes.class_names, skipped, info, strokes.extra)
    return OmniglotPairs(strokes, labelled)
