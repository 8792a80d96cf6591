"""mini-ImageNet (Vinyals et al., 2016) with the split of Ravi and Larochelle (2017): 64 + 16 + 20 classes.

600 photos of each of 100 classes of ImageNet, 84 x 84. It is handed on in three layouts, all of which name
the split they hold: a list for each part beside one folder of images, a folder for each, or pickled arrays.
"""

from __future__ import annotations

import csv
import io
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..ops._contract import check_integer
from .archive import READ_ERRORS, Tree, existing_path, layout_error, open_tree
from .cache import load_image_cache
from .dataset import add_counts, track
from .images import IMAGE_SUFFIXES, ImageFile, ImageSet, create_images, find_images, read_images
from .safe_pickle import load_arrays
from .splits import _words

#: Side of the images in pixels.
SIZE = 84
SPLITS = ("train", "val", "test")
#: The test classes of Ravi and Larochelle's split, as ImageNet numbers them.
TEST_CLASSES = _words(
    """
    n01930112 n01981276 n02099601 n02110063 n02110341 n02116738 n02129165 n02219486 n02443484 n02871525
    n03127925 n03146219 n03272010 n03544143 n03775546 n04146614 n04149813 n04418357 n04522168 n07613480
    """
)
EXPECTED = """  <root>/images/<file>.jpg with <root>/{train,val,test}.csv of lines filename,label
  or <root>/{train,val,test}/<class>/<file>.jpg
  or <root>/mini-imagenet-cache-{train,val,test}.pkl
  or a .zip of one of these"""


class _Found(NamedTuple):
    """What a tree holds: files to decode, or pickles, and what was passed over."""

    layout: str
    files: dict[str, list[ImageFile]]
    pickles: dict[str, str]
    passed_over: dict[str, int]


def load_mini_imagenet(
    root: str | Path,
    *,
    split: str | None = "test",
    size: int = SIZE,
    cache: bool = True,
    progress: bool = False,
) -> ImageSet:
    """The photos of one part of mini-ImageNet, uint8 RGB [N, size, size, 3], labelled by its own classes.

    root: the folder or zip that holds it, in one of three layouts. split: train (64 classes), val (16) or
    test (20); None takes all, and `extra["split"]` tells them apart. size: side in pixels, scaled to it.
    cache: use what `sketchfast data prepare mini_imagenet ROOT --size SIZE` wrote, if it still fits. Files
    that cannot be read, or that a list names and nobody finds, are left out and counted.

    Raises FileNotFoundError, LayoutError (a ValueError) with the expected trees, also where the split is not
    there; ValueError for an unknown split or a class that is in two of them.
    """
    path, size = existing_path(root), check_integer("size", size, 1)
    if split is not None and split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)} or None, got {split!r}")
    images = load_image_cache(ImageSet, "mini_imagenet", path, size) if cache else None
    if images is None:
        splits = SPLITS if split is None else (split,)
        images = read_mini_imagenet(path, size=size, splits=splits, progress=progress)
    if split is None:
        return images
    labels = np.unique(images.labels[images.extra["split"] == split])
    if not len(labels):
        raise layout_error(path, EXPECTED, [f"no images of {split}"])
    return images.select_classes([images.class_names[label] for label in labels])


def read_mini_imagenet(
    root: str | Path,
    *,
    size: int = SIZE,
    splits: Sequence[str] = SPLITS,
    folder: Path | None = None,
    progress: bool = False,
) -> ImageSet:
    """`load_mini_imagenet` from the files: those of `splits` that are there, one after the other.

    folder: where the images are written to, see `read_images`.
    """
    path, size = existing_path(root), check_integer("size", size, 1)
    with open_tree(path, into_archive=True) as tree:
        found = _find(tree, splits)
        if found is None:
            raise layout_error(path, EXPECTED, tree.names)
        if found.pickles:
            images, split_of = _read_pickles(tree, found.pickles, size, folder, progress)
        else:
            split_of = _split_of_class({s: [file.class_name for file in fs] for s, fs in found.files.items()})
            images = read_images(
                tree,
                [file for files in found.files.values() for file in files],
                list(split_of),
                size,
                folder=folder,
                description="mini-ImageNet",
                progress=progress,
            )
    add_counts(images.skipped, found.passed_over)
    images.info = {"dataset": "mini_imagenet", "root": str(path), "size": size, "layout": found.layout}
    part = np.array([split_of[name] for name in images.class_names], np.str_)
    images.extra["split"] = part[images.labels]
    return images


def _find(tree: Tree, splits: Sequence[str]) -> _Found | None:
    """The first layout of which the tree holds a part; None where it holds none."""
    by_name = {PurePosixPath(name).name: name for name in tree.names}
    lists = {split: by_name[f"{split}.csv"] for split in splits if f"{split}.csv" in by_name}
    pictures, not_images = _pictures(tree)
    if lists and pictures:
        passed_over = {"not an image": not_images} if not_images else {}
        files = {s: _listed_files(tree, name, pictures, passed_over) for s, name in lists.items()}
        return _Found("lists", files, {}, passed_over)
    folders = {split: find_images(tree, split) for split in splits}
    if any(files for files, _ in folders.values()):
        passed_over = {}
        for _, counts in folders.values():
            add_counts(passed_over, counts)
        return _Found("folders", {s: files for s, (files, _) in folders.items()}, {}, passed_over)
    cached = {split: f"mini-imagenet-cache-{split}.pkl" for split in splits}
    pickles = {split: by_name[name] for split, name in cached.items() if name in by_name}
    return _Found("pickles", {}, pickles, {}) if pickles else None


def _pictures(tree: Tree) -> tuple[dict[str, str], int]:
    """File name -> path of every file under a folder `images`, and how many others lie there."""
    pictures: dict[str, str] = {}
    others = 0
    for path in tree.names:
        name = PurePosixPath(path)
        if "images" not in (tree.path.name, *name.parts[:-1]):
            continue
        if name.suffix.lower() not in IMAGE_SUFFIXES:
            others += 1
        elif (twin := pictures.setdefault(name.name, path)) != path:
            raise ValueError(f"root: {tree.path} holds {name.name} twice: {twin}, {path}")
    return pictures, others


def _listed_files(
    tree: Tree, path: str, pictures: dict[str, str], passed_over: dict[str, int]
) -> list[ImageFile]:
    """The images that a list of `filename,label` names, by class and name; others are counted."""
    try:
        rows = list(csv.reader(io.StringIO(tree.read(path).decode())))
    except (ValueError, csv.Error, *READ_ERRORS):
        add_counts(passed_over, {"broken list": 1})
        return []
    files: dict[tuple[str, str], ImageFile] = {}
    for number, row in enumerate(rows):
        if not row or (number == 0 and row[0] == "filename"):
            continue
        if len(row) != 2 or not row[1]:
            add_counts(passed_over, {"broken line of a list": 1})
        elif row[0] not in pictures:
            add_counts(passed_over, {"image named by a list, not there": 1})
        else:
            files[row[1], row[0]] = ImageFile(pictures[row[0]], row[1], PurePosixPath(row[0]).stem)
    return [files[key] for key in sorted(files)]


def _split_of_class(classes: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The split each class belongs to, in order of split and name; ValueError for a class in two of them."""
    split_of: dict[str, str] = {}
    for split, names in classes.items():
        for name in sorted(set(names)):
            if name in split_of:
                raise ValueError(
                    f"root: class {name} must be in one split, got it in {split_of[name]} and {split}: "
                    "few-shot classification is of unseen classes"
                )
            split_of[name] = split
    return split_of


def _read_pickles(
    tree: Tree, pickles: dict[str, str], size: int, folder: Path | None, progress: bool
) -> tuple[ImageSet, dict[str, str]]:
    """The images of `mini-imagenet-cache-*.pkl`, a pickle after the other, and the split of each class."""
    skipped: dict[str, int] = {}
    images: NDArray[np.uint8] | None = None
    if folder is not None:  # a pickle holds its images as they are, so its size bounds how many
        most = sum(len(_read_or_none(tree, name) or b"") for name in pickles.values()) // (SIZE * SIZE * 3)
        images = create_images(folder, most, size)
    parts: list[NDArray[np.uint8]] = []
    names: list[str] = []
    classes: dict[str, list[str]] = {}
    for split, path in track(pickles.items(), "mini-ImageNet", progress, total=len(pickles)):
        data = _read_or_none(tree, path)
        content = None if data is None else _unpickle(data)
        if content is None:
            add_counts(skipped, {"broken pickle": 1})
            continue
        pixels, rows_of = content
        order = [(name, row) for name in sorted(rows_of) for row in rows_of[name].tolist()]
        if len(order) < len(pixels):
            add_counts(skipped, {"image without a class": len(pixels) - len(order)})
        part = _resized(pixels[[row for _, row in order]], size)
        if images is None:
            parts.append(part)
        else:
            images[len(names) : len(names) + len(part)] = part
        names += [f"{name}/{row}" for name, row in order]
        classes[split] = list(rows_of)
    if images is None:
        images = np.concatenate([np.zeros((0, size, size, 3), np.uint8), *parts])
    elif isinstance(images, np.memmap):
        images.flush()
    split_of = _split_of_class(classes)
    label = {name: index for index, name in enumerate(split_of)}
    labels = np.array([label[name.split("/")[0]] for name in names], np.int64)
    return ImageSet(images[: len(names)], labels, list(split_of), names, skipped), split_of


def _read_or_none(tree: Tree, path: str) -> bytes | None:
    try:
        return tree.read(path)
    except READ_ERRORS:
        return None


def _unpickle(data: bytes) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.int64]]] | None:
    """image_data [N, 84, 84, 3] and the rows of each class; None for what holds nothing of the kind."""
    try:
        content = load_arrays(data)
    except (pickle.UnpicklingError, *READ_ERRORS):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("class_dict"), dict):
        return None
    images, classes = content.get("image_data"), content["class_dict"]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
        return None
    rows: dict[str, NDArray[np.int64]] = {}
    for name, value in classes.items():
        of_class = _rows(value, len(images))
        if of_class is None:
            return None
        rows[str(name)] = of_class
    listed = np.concatenate([np.zeros(0, np.int64), *rows.values()])
    return (images, rows) if len(np.unique(listed)) == len(listed) else None


def _rows(value: Any, count: int) -> NDArray[np.int64] | None:
    """Row numbers below `count`; None for anything else."""
    try:
        rows = np.asarray(value, dtype=np.int64)
    except (ValueError, TypeError, OverflowError):
        return None
    return rows if rows.ndim == 1 and ((rows >= 0) & (rows < count)).all() else None


def _resized(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    if size == SIZE:
        return images
    scaled = [
        np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in images
    ]
    return np.stack(scaled) if scaled else np.zeros((0, size, size, 3), np.uint8)
