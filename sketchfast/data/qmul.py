"""QMUL's sketches of single shoes, chairs and handbags, and the photos they were drawn after.

* `load_qmul_v1`: V1 (Yu et al., 2016; handbags: Song et al., 2017), one sketch a photo, as images.
* `load_qmul_v1_edges`: the same as 256 x 256 arrays in MATLAB files, where the "photos" are edge maps.
* `load_qmul_v2`: V2 (Yu et al., 2017), several sketches a photo, as images, SVG or coordinates.
* `load_qmul_v2_strokes`: V2's drawings alone.

What the layouts have in common: a file's category is in the name of a folder above it ("ShoeV2", "chairs"),
its part, train or test, in its folder's ("trainA", "photo/test") or in a list ("photo_train.txt").
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..ops._contract import check_integer
from .archive import READ_ERRORS, LayoutError, Tree, existing_path, layout_error, open_tree
from .cache import load_image_cache
from .dataset import StrokeDataset, add_counts, track
from .images import (
    DEFAULT_SIZE,
    IMAGE_SUFFIXES,
    ImageFile,
    ImageSet,
    SketchPhotoSet,
    decode_image,
    domain_folder,
    join_domains,
    pair_names,
    read_images,
    write_images,
)
from .render import sketch_images
from .safe_pickle import load_arrays
from .strokes import Sketch, from_absolute, from_svg, svg_size
from .tuberlin import normal_class_name

#: The categories of V1, and how many of its pairs, which are numbered, are to train on and then to test.
V1_COUNTS = {"shoe": (304, 115), "chair": (200, 97), "handbag": (400, 168)}
PARTS = ("train", "test")
#: Side of the canvas of V2's strokes.
CANVAS = 256.0
FORMS = ("strokes", "images")

# ---- V1 as MATLAB files ------------------------------------------------------------------------------------

EXPECTED_EDGES = """  <root>/<category>s_sketch_db_train.mat    `data`, uint8 [N, H, W]; shoe, chair, handbag
  <root>/<category>s_edge_db_train.mat      sketch i was drawn after photo i
  <root>/<category>s_sketch_db_test.mat
  <root>/<category>s_edge_db_test.mat
  <root>/shoes_train_triplets.mat           optional
  or a .zip of these"""
TRIPLETS_FILE = "shoes_train_triplets.mat"
_MOST_MAT_VALUES = 1 << 28  # an array larger than that is none of this data set


class _MatError(ValueError):
    """The MATLAB file does not hold what it should; the message is a reason to count."""


def load_qmul_v1_edges(
    root: str | Path, *, category: str | None = None, size: int = DEFAULT_SIZE
) -> SketchPhotoSet:
    """V1 from MATLAB files: sketches and edge maps of photos, dark on white, uint8 [N, size, size, 3].

    root: the folder or zip with the files. category: "shoe", "chair" or "handbag", None for all, each a
    class. size: side in pixels, reduced from 256 with antialiasing. Names are "shoe/1" and on, through train
    and test, alike for a sketch and its photo. `extra["part"]` of both domains: "train" or "test", as
    published. `info["photos"]` says that they are edge maps, `info["identical photos"]` how many of them
    equal an earlier one. A category with a file that is missing or broken is left out and counted.

    Raises ValueError for a category that is not there, FileNotFoundError, LayoutError (a ValueError) with the
    expected tree.
    """
    path, size = existing_path(root), check_integer("size", size, 1)
    if category is not None and category not in V1_COUNTS:
        raise ValueError(f"category must be None or one of {', '.join(V1_COUNTS)}, got {category!r}")
    skipped: dict[str, int] = {}
    found: dict[str, list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]] = {}
    with open_tree(path, into_archive=True) as tree:
        files = {PurePosixPath(name).name: name for name in tree.names}
        for name in V1_COUNTS if category is None else (category,):
            try:
                found[name] = [_edge_pairs(tree, files, name, part) for part in PARTS]
            except _MatError as reason:
                add_counts(skipped, {str(reason): 1})
        if not found:
            why = ", ".join(f"{reason} ({count})" for reason, count in skipped.items())
            raise LayoutError(f"{layout_error(path, EXPECTED_EDGES, tree.names)}\nLeft out: {why}")
    return _edge_set(path, found, size, skipped)


def _edge_pairs(
    tree: Tree, files: dict[str, str], category: str, part: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Sketches and edge maps [N, H, W] of one part of a category, row by row."""
    arrays = []
    for kind in ("sketch", "edge"):
        name = f"{category}s_{kind}_db_{part}.mat"
        if name not in files:
            raise _MatError("categories: file missing")
        arrays.append(_read_mat_images(_read_file(tree, files[name])))
    if len(arrays[0]) != len(arrays[1]):
        raise _MatError("categories: sketches and photos differ in number")
    return arrays[0], arrays[1]


def _read_file(tree: Tree, name: str) -> bytes:
    try:
        return tree.read(name)
    except READ_ERRORS:
        raise _MatError("categories: broken mat file") from None


def _read_mat(data: bytes, kinds: dict[str, str]) -> dict[str, Any]:
    """The variables named, which must be of these MATLAB kinds; their sizes are looked at before any is read.

    MATLAB files of the versions that scipy reads (not 7.3) hold data only, no code.
    """
    from scipy.io import loadmat, whosmat

    try:
        shapes = {name: shape for name, shape, kind in whosmat(io.BytesIO(data)) if kinds.get(name) == kind}
        values = sum(math.prod(int(n) for n in shape) for shape in shapes.values())
        if set(shapes) == set(kinds) and values <= _MOST_MAT_VALUES:
            return loadmat(io.BytesIO(data), variable_names=list(kinds))
    except Exception as error:  # a broken file may raise anything from scipy's reader
        raise _MatError("categories: broken mat file") from error
    raise _MatError("categories: broken mat file")


def _read_mat_images(data: bytes) -> NDArray[np.uint8]:
    """The file's `data`, uint8 [N, H, W], dark on white."""
    images = np.ascontiguousarray(_read_mat(data, {"data": "uint8"})["data"])
    if images.dtype != np.uint8 or images.ndim != 3 or 0 in images.shape:
        raise _MatError("categories: broken mat file")
    return images if np.median(images) >= 128 else 255 - images


def _edge_set(
    path: Path,
    found: dict[str, list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]],
    size: int,
    skipped: dict[str, int],
) -> SketchPhotoSet:
    """One set of all categories, train before test in each."""
    class_names = list(found)
    counts = [[len(sketches) for sketches, _ in parts] for parts in found.values()]
    names = [f"{name}/{i + 1}" for name, n in zip(class_names, counts, strict=True) for i in range(sum(n))]
    labels = np.repeat(np.arange(len(class_names)), [sum(n) for n in counts])
    part = np.concatenate([np.repeat(PARTS, n) for n in counts])
    domains = []
    for domain in range(2):
        stacks = [pair[domain] for parts in found.values() for pair in parts]
        images = np.concatenate([_resized(stack, size) for stack in stacks])
        domains.append(ImageSet(images, labels.copy(), class_names, list(names), extra={"part": part.copy()}))
    sketches, photos = domains
    originals = [photo.tobytes() for parts in found.values() for _, edges in parts for photo in edges]
    info = {
        "dataset": "qmul_v1_edges",
        "root": str(path),
        "size": size,
        "photos": "edge maps of the photos",
        "identical photos": len(originals) - len(set(originals)),
    }
    result = join_domains(sketches, photos, np.arange(len(names)), info)
    add_counts(result.skipped, skipped)
    return result


def _resized(stack: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Grey images [N, H, W] as RGB [N, size, size, 3]."""
    images = np.empty((len(stack), size, size, 3), np.uint8)
    for row, grey in enumerate(stack):
        image = Image.fromarray(grey)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        images[row] = np.asarray(image)[..., None]
    return images


def load_qmul_v1_triplets(root: str | Path) -> NDArray[np.int64]:
    """The human comparisons of shoes, int64 [419, 3, 45, 2]: rows, annotators, pairs of ten photos, pair.

    root: as in `load_qmul_v1_edges`. The photos are indices into its shoes (0 to 303 are train, the rest
    test), the one found more like the row's sketch first. Mind that which sketch that is the file does not
    say: for rows 304 and on it is the row's own, while the first 304 rows are in an order of their own.

    Raises FileNotFoundError; LayoutError (a ValueError) with the expected tree; ValueError for a broken file.
    """
    path = existing_path(root)
    with open_tree(path, into_archive=True) as tree:
        names = [name for name in tree.names if PurePosixPath(name).name == TRIPLETS_FILE]
        if not names:
            raise layout_error(path, EXPECTED_EDGES, tree.names)
        try:
            cells = _read_mat(_read_file(tree, names[0]), dict.fromkeys(("One", "Two", "Three"), "cell"))
            annotators = [_nested_integers(cells[name]) for name in ("One", "Two", "Three")]
            return np.stack(annotators, axis=1) - 1
        except ValueError as error:
            raise ValueError(f"root: {path} holds a broken {TRIPLETS_FILE} ({error})") from error


def _nested_integers(cells: NDArray[Any]) -> NDArray[np.int64]:
    """MATLAB cells [N] of cells [M] of cells [2] of an integer each, as int64 [N, M, 2]."""
    rows = [[[int(x.item()) for x in pair.ravel()] for pair in row.ravel()] for row in cells.ravel()]
    return np.array(rows, np.int64)


# ---- the folders of V1 and V2 ------------------------------------------------------------------------------

_PAIR_FOLDER = re.compile(r"(train|test)([AB])", re.IGNORECASE)  # A: sketches, B: photos
_DOMAIN_FOLDER = re.compile(
    r"(?:(?P<of>.+)[_-])?(?P<domain>photo|image|sketch)(?:s|es)?(?:_(?:png|svg))?", re.IGNORECASE
)
_LIST_NAME = re.compile(r".*(train|test).*\.txt", re.IGNORECASE)
_LISTED = re.compile(r"(?P<name>\S.*?)(?:\s+\d+)?")  # a line of a list; some have a label after the name
_COORDINATES = re.compile(r"(?P<of>.*?)_?coordinates?(?:\.pkl|\.pickle)?", re.IGNORECASE)
_COORDINATE_KEY = re.compile(r"/?(?:(?P<part>train|test)/)?(?P<stem>[^/]+)")
_V2_SKETCH = re.compile(r"(.+)_[^_/]+")  # <photo>_<number of the sketch>, or the id of who drew it


class _File(NamedTuple):
    """A file in the folder of a domain. part: "" where the folders do not say. base: the folder above."""

    path: str
    category: str
    part: str
    stem: str
    base: str

    @property
    def name(self) -> str:
        return f"{self.category}/{self.stem}"


@dataclass
class _Found:
    """What a tree holds, each in order; the parts that lists give, by name as in `_File`."""

    photos: list[_File] = field(default_factory=list)
    sketches: list[_File] = field(default_factory=list)
    svgs: list[_File] = field(default_factory=list)
    coordinates: list[_File] = field(default_factory=list)
    listed_photos: dict[str, str] = field(default_factory=dict)
    listed_sketches: dict[str, str] = field(default_factory=dict)
    passed_over: dict[str, dict[str, int]] = field(default_factory=lambda: {"photos": {}, "sketches": {}})


def _category(folder: str) -> str:
    """ "shoe", "chair" or "handbag" where the folder's name says so, else the name."""
    name = normal_class_name(folder)
    for word, category in {"shoe": "shoe", "chair": "chair", "bag": "handbag"}.items():
        if word in name:
            return category
    return name or "all"


def _find(tree: Tree) -> _Found:
    """The photos, sketches, coordinates and lists of a tree."""
    found = _Found()
    top = tree.path.stem if tree.path.suffix.lower() == ".zip" else tree.path.name
    lists: list[tuple[str, str]] = []
    for path in tree.names:
        *folders, file_name = (top, *PurePosixPath(path).parts)
        if not folders:
            folders = [""]
        if match := _COORDINATES.fullmatch(file_name):
            category = _category(match["of"] or folders[-1])
            found.coordinates.append(_File(path, category, "", file_name, "/".join(folders)))
        elif _LIST_NAME.fullmatch(file_name):
            lists.append((path, "/".join(folders)))
        else:
            _find_image(found, path, folders, file_name)
    for files in (found.photos, found.sketches, found.svgs):
        files.sort(key=_natural_order)
    _read_lists(tree, lists, found)
    return found


def _find_image(found: _Found, path: str, folders: list[str], file_name: str) -> None:
    """Adds the file to `found` if it lies in the folder of a domain."""
    part, above = "", folders
    if above[-1].lower() in PARTS:  # photo/train/1.jpg
        part, above = above[-1].lower(), above[:-1]
    *above, folder = above or [""]
    domain_match, pair_match = _DOMAIN_FOLDER.fullmatch(folder), _PAIR_FOLDER.fullmatch(folder)
    if pair_match is not None and not part:
        part, is_photo, of = pair_match[1].lower(), pair_match[2].upper() == "B", ""
    elif domain_match is not None:
        is_photo, of = domain_match["domain"].lower() != "sketch", domain_match["of"] or ""
        if above and above[-1].lower() in PARTS and not part:  # train/photo/1.jpg
            part, above = above[-1].lower(), above[:-1]
    else:
        return
    file = PurePosixPath(file_name)
    category = _category(of or (above[-1] if above else ""))
    entry = _File(path, category, part, file.stem, "/".join(above))
    if file.suffix.lower() == ".svg" and not is_photo:
        found.svgs.append(entry)
    elif file.suffix.lower() in IMAGE_SUFFIXES:
        (found.photos if is_photo else found.sketches).append(entry)
    else:
        add_counts(found.passed_over["photos" if is_photo else "sketches"], {"not an image": 1})


def _natural_order(file: _File) -> tuple[str, tuple[int, str], str]:
    """By category and name, numbers by their size."""
    number = int(file.stem) if file.stem.isdecimal() else -1
    return file.category, (number, file.stem), file.path


def _read_lists(tree: Tree, lists: list[tuple[str, str]], found: _Found) -> None:
    """The parts that the lists give: of the category they lie beside, or of the only one."""
    beside: defaultdict[str, set[str]] = defaultdict(set)
    for file in (*found.photos, *found.sketches, *found.svgs, *found.coordinates):
        beside[file.base].add(file.category)
    everything = set().union(*beside.values()) if beside else set()
    for path, folder in lists:
        categories = beside.get(folder, everything)
        name = PurePosixPath(path).stem.lower()
        if ("train" in name) == ("test" in name):
            continue
        if len(categories) != 1:
            add_counts(found.passed_over["photos"], {"list of no single category": 1})
            continue
        part = "train" if "train" in name else "test"
        domains = [
            parts
            for parts, others in (
                (found.listed_photos, ("sketch",)),
                (found.listed_sketches, ("photo", "image", "visible")),
            )
            if not any(word in name for word in others)
        ]
        try:
            lines = tree.read(path).decode(errors="replace").splitlines()
        except READ_ERRORS:
            add_counts(found.passed_over["photos"], {"broken list": 1})
            continue
        for line in lines:
            if match := _LISTED.fullmatch(line.strip()):
                for parts in domains:
                    parts[f"{min(categories)}/{_stem(match['name'])}"] = part


def _stem(listed: str) -> str:
    """The name of a listed file without folders and suffix; other dots are the name's own."""
    file = PurePosixPath(listed.replace("\\", "/"))
    return file.stem if file.suffix.lower() in (*IMAGE_SUFFIXES, ".svg") else file.name


def _check_once(root: Path, files: Iterable[_File]) -> None:
    """ValueError where one name stands for two files: copies of the data set, or a photo in both parts."""
    for file, after in itertools.pairwise(sorted(files, key=lambda file: (file.name, file.path))):
        if file.name == after.name:
            raise ValueError(f"root: {root} holds {file.name} twice: {file.path}, {after.path}")


def decode_sketch(data: bytes, size: int) -> NDArray[np.uint8]:
    """The image of a sketch as dark lines on white, RGB uint8 [size, size, 3].

    V2's files hold the lines in their transparency; what is light on dark is inverted. Otherwise as
    `decode_image`. Raises as it does, and ValueError for an image without any line.
    """
    image = _decode_opacity(data, size)
    if image is None:
        image = decode_image(data, size)
    if np.median(image) < 128:
        image = 255 - image
    if image.min() == image.max():
        raise ValueError("the image must show a sketch, got one colour")
    return image


def _decode_opacity(data: bytes, size: int) -> NDArray[np.uint8] | None:
    """White where a PNG is transparent and dark where it is not; None if it is transparent nowhere."""
    if not data.startswith(b"\x89PNG"):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as file:
            if "A" not in file.getbands():
                return None
            alpha = file.getchannel("A")
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image is too large: {error}") from error
    if alpha.getextrema()[0] == 255:
        return None
    if alpha.size != (size, size):
        alpha = alpha.resize((size, size), Image.Resampling.BILINEAR)
    return np.repeat(255 - np.asarray(alpha)[..., None], 3, axis=2)


def _read_domain(
    tree: Tree,
    files: list[_File],
    class_names: list[str],
    size: int,
    folder: Path | None,
    domain: str,
    progress: bool,
) -> ImageSet:
    """The images of one domain."""
    return read_images(
        tree,
        [ImageFile(file.path, file.category, file.stem) for file in files],
        class_names,
        size,
        folder=domain_folder(folder, domain),
        decode=decode_sketch if domain == "sketches" else decode_image,
        description=f"QMUL {domain}",
        progress=progress,
    )


def _photo_parts(
    photos: Iterable[_File],
    found: _Found,
    sketch_parts: dict[str, str],
    photo_of: Callable[[str], str | None],
) -> dict[str, str]:
    """The part of each photo by name: its folder's, its list's, or its sketches' (train, if any is)."""
    parts = {photo.name: photo.part or found.listed_photos.get(photo.name, "") for photo in photos}
    by_sketches: dict[str, str] = {}
    for sketch, part in sketch_parts.items():
        photo = photo_of(sketch)
        if photo is not None and part:
            by_sketches[photo] = max(part, by_sketches.get(photo, ""))  # "train" > "test"
    return {name: part or by_sketches.get(name, "") for name, part in parts.items()}


def _join(
    sketches: ImageSet,
    photos: ImageSet,
    photo_of: Callable[[str], str | None],
    photo_parts: dict[str, str],
    sketch_parts: dict[str, str],
    info: dict[str, Any],
) -> SketchPhotoSet:
    """Both domains with their pairs and `extra["part"]`; no pair across the parts."""
    pairs = pair_names(sketches, photos, photo_of)
    of_photos = np.array([photo_parts[name] for name in photos.names], "U5")
    of_sketches = np.array([sketch_parts.get(name, "") for name in sketches.names], "U5")
    paired = pairs >= 0
    of_pairs = np.where(paired, of_photos[pairs] if len(photos) else "", "")
    across = paired & (of_sketches != "") & (of_pairs != of_sketches)
    pairs[across] = -1
    photos.extra["part"] = of_photos
    sketches.extra["part"] = np.where(of_sketches == "", of_pairs, of_sketches).astype("U5")
    result = join_domains(sketches, photos, pairs, info)
    if across.any():
        add_counts(result.skipped, {"pair of two parts": int(across.sum())})
    return result


# ---- V1 ----------------------------------------------------------------------------------------------------

EXPECTED_V1 = """  <root>/<category>/photo/1.jpg
  <root>/<category>/sketch/1.png      drawn after photo 1
  <root>/<category>/photo_train_name.txt, photo_test_name.txt     optional
  or train/photo/1.jpg, photo/train/1.jpg and so on; <root> may be <category> itself, or a .zip of these;
  shoe, chair or handbag is in a folder's name"""


def load_qmul_v1(
    root: str | Path, *, size: int = DEFAULT_SIZE, cache: bool = True, progress: bool = False
) -> SketchPhotoSet:
    """V1's sketches and photos, uint8 [N, size, size, 3], one sketch a photo; each category is a class.

    root: the folder or zip with `photo/` and `sketch/`, or what holds it for several categories. size: side
    in pixels. cache: use what `sketchfast data prepare qmul_v1 ROOT --size SIZE` wrote, if it still fits.
    Names are "shoe/1", alike for a sketch and its photo. `extra["part"]` of both domains: "train" or "test"
    by folders, by lists, or, where there are neither and the numbers run from 1 to 419 (shoe), 297 (chair) or
    568 (handbag), train up to 304, 200 or 400, the published counts; else "". `info["parts by number"]` names
    the categories that this was done for. Files that cannot be read are left out and counted.

    Raises FileNotFoundError, LayoutError (a ValueError) with the expected tree.
    """
    path, size = existing_path(root), check_integer("size", size, 1)
    if cache and (cached := load_image_cache(SketchPhotoSet, "qmul_v1", path, size)) is not None:
        return cached
    return read_qmul_v1(path, size=size, progress=progress)


def read_qmul_v1(
    root: str | Path, *, size: int = DEFAULT_SIZE, folder: Path | None = None, progress: bool = False
) -> SketchPhotoSet:
    """`load_qmul_v1` from the files. folder: where the images are written to, see `read_images`."""
    path, size = existing_path(root), check_integer("size", size, 1)
    with open_tree(path, into_archive=True) as tree:
        found = _find(tree)
        if not found.photos or not found.sketches:
            raise layout_error(path, EXPECTED_V1, tree.names)
        _number_by_part(found)
        for files in (found.photos, found.sketches):
            _check_once(path, files)
        class_names = sorted({file.category for file in found.photos + found.sketches})
        photos = _read_domain(tree, found.photos, class_names, size, folder, "photos", progress)
        sketches = _read_domain(tree, found.sketches, class_names, size, folder, "sketches", progress)
    for domain, images in {"photos": photos, "sketches": sketches}.items():
        add_counts(images.skipped, found.passed_over[domain])
    sketch_parts = {s.name: s.part or found.listed_sketches.get(s.name, "") for s in found.sketches}
    photo_parts = _photo_parts(found.photos, found, sketch_parts, str)
    by_number = _parts_by_number(found.photos, photo_parts)
    info = {"dataset": "qmul_v1", "root": str(path), "size": size, "parts by number": by_number}
    result = _join(sketches, photos, str, photo_parts, sketch_parts, info)
    if (result.pairs < 0).all():  # such as V2 in place of V1
        raise layout_error(path, EXPECTED_V1, tree.names)
    return result


def _number_by_part(found: _Found) -> None:
    """Names as "train/1" in the categories where both parts are numbered from 1."""
    parts_of: defaultdict[str, set[str]] = defaultdict(set)
    for photo in found.photos:
        parts_of[photo.name].add(photo.part)
    twice = {name.split("/")[0] for name, parts in parts_of.items() if parts == set(PARTS)}
    for files in (found.photos, found.sketches):
        files[:] = [
            f._replace(stem=f"{f.part}/{f.stem}") if f.category in twice and f.part else f for f in files
        ]


def _parts_by_number(photos: Iterable[_File], parts: dict[str, str]) -> list[str]:
    """Fills in the parts of the categories that have none but hold V1's numbers, and names them."""
    numbers: defaultdict[str, set[str]] = defaultdict(set)
    for photo in photos:
        numbers[photo.category].add(photo.stem)
    filled = []
    for category, (train, test) in V1_COUNTS.items():
        names = [f"{category}/{number}" for number in range(1, train + test + 1)]
        if numbers[category] == {name.split("/")[1] for name in names} and not any(parts[n] for n in names):
            parts.update({name: PARTS[i >= train] for i, name in enumerate(names)})
            filled.append(category)
    return filled


# ---- V2 ----------------------------------------------------------------------------------------------------

EXPECTED_V2 = """  <root>/<category>/trainA/<photo>_<n>.png, testA/...     sketches
  <root>/<category>/trainB/<photo>.png, testB/...         photos
  or <root>/<category>/photo/<photo>.png (or ShoeV2_photo/) and
     <root>/<category>/sketch/<photo>_<n>.png or .svg (or ShoeV2_sketch_png/), with lists
     <root>/<category>/photo_train.txt, photo_test.txt, sketch_train.txt, sketch_test.txt
  <root>/<category>/<category>_Coordinate                 optional; in place of sketches
  <root> may be <category> itself, or a .zip of these; shoe or chair is in a folder's name"""
EXPECTED_V2_STROKES = """  <root>/<category>/<category>_Coordinate    (or .pkl), keys train/<photo>_<n>
  or <root>/<category>/sketch/<photo>_<n>.svg (or trainA/, testA/, ShoeV2_sketch/)
  <root> may be <category> or the file itself, or a .zip of these; shoe or chair is in a name"""


def load_qmul_v2(
    root: str | Path,
    *,
    size: int = DEFAULT_SIZE,
    form: str | None = None,
    cache: bool = True,
    progress: bool = False,
) -> SketchPhotoSet:
    """V2's sketches and photos, uint8 [N, size, size, 3]; each category is a class.

    root: the folder or zip in one of the layouts people have, of one category or several. size: side in
    pixels. form: of the sketches: "strokes", drawn by `sketchfast.rasterize` from the coordinates (or SVG)
    where they lie on their canvas, with lines one pixel wide, as public code does; "images", their files;
    None takes strokes where every category with sketches has them. cache: use what `sketchfast data prepare
    qmul_v2 ROOT --size SIZE` wrote, if it still fits.

    Names are "shoe/<photo>_<n>" and "shoe/<photo>". `extra["part"]` of both domains: "train" or "test" by
    folders, by lists, or by the keys of the coordinates; else "". A sketch whose photo is not there, or in
    the other part, has pair -1, the latter counted. Files that cannot be read are left out and counted.

    Raises FileNotFoundError, LayoutError (a ValueError) with the expected tree, also for coordinates without
    photos (their drawings: `load_qmul_v2_strokes`), ValueError for a photo that is in both parts.
    """
    path, size = existing_path(root), check_integer("size", size, 1)
    of = {} if form is None else {"form": _check_form(form)}
    if cache and (cached := load_image_cache(SketchPhotoSet, "qmul_v2", path, size, **of)) is not None:
        return cached
    return read_qmul_v2(path, size=size, form=form, progress=progress)


def read_qmul_v2(
    root: str | Path,
    *,
    size: int = DEFAULT_SIZE,
    form: str | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> SketchPhotoSet:
    """`load_qmul_v2` from the files. folder: where the images are written to, see `read_images`."""
    path, size = existing_path(root), check_integer("size", size, 1)
    with open_tree(path, into_archive=True) as tree:
        found = _find(tree)
        form = _chosen_form(found, None if form is None else _check_form(form))
        if not found.photos or not (found.sketches if form == "images" else found.coordinates + found.svgs):
            raise _lacking(path, found, tree.names)
        _check_once(path, found.photos)
        if form == "images":
            _check_once(path, found.sketches)
        strokes = _read_strokes(tree, found, 4.0, progress) if form == "strokes" else None
        names = {file.category for file in found.photos}
        names |= {file.category for file in found.sketches} if strokes is None else set(strokes.class_names)
        class_names = sorted(names)
        photos = _read_domain(tree, found.photos, class_names, size, folder, "photos", progress)
        if strokes is None:
            sketches = _read_domain(tree, found.sketches, class_names, size, folder, "sketches", progress)
            add_counts(sketches.skipped, found.passed_over["sketches"])
        else:
            sketches = _drawn(strokes, class_names, size, domain_folder(folder, "sketches"))
    add_counts(photos.skipped, found.passed_over["photos"])
    if strokes is None:
        sketch_parts = {s.name: s.part or found.listed_sketches.get(s.name, "") for s in found.sketches}
    else:
        keys, parts = strokes.extra["key"].tolist(), strokes.extra["part"].tolist()
        sketch_parts = dict(zip(keys, parts, strict=True))
    photo_parts = _photo_parts(found.photos, found, sketch_parts, v2_photo_of_sketch)
    info = {"dataset": "qmul_v2", "root": str(path), "size": size, "form": form}
    result = _join(sketches, photos, v2_photo_of_sketch, photo_parts, sketch_parts, info)
    if (result.pairs < 0).all():  # such as V1 in place of V2
        raise layout_error(path, EXPECTED_V2, tree.names)
    return result


def v2_photo_of_sketch(name: str) -> str | None:
    """The photo that V2's sketch `name` was drawn after, None for a name of another form."""
    match = _V2_SKETCH.fullmatch(name)
    return match[1] if match else None


def load_qmul_v2_strokes(root: str | Path, *, spacing: float = 4.0, progress: bool = False) -> StrokeDataset:
    """V2's drawings as strokes on a canvas of side CANVAS, y down; the photos need not be there.

    root: the folder, zip or `_Coordinate` file. The coordinates are a pickle, of which only arrays are read
    (see `safe_pickle`); a category without them is taken from SVG files, scaled from the size of each
    document. spacing: distance of samples on the curves of SVG, see `from_svg`.
    `extra`: key, "chair/<photo>_<n>", as `ImageSet.names`; part, "train", "test" or "". Drawings that are
    broken or empty are left out and counted.

    Raises FileNotFoundError, LayoutError (a ValueError) with the expected tree.
    """
    path = existing_path(root)
    with open_tree(path, into_archive=True) as tree:
        found = _find(tree)
        if not found.coordinates and not found.svgs:
            raise layout_error(path, EXPECTED_V2_STROKES, tree.names)
        strokes = _read_strokes(tree, found, spacing, progress)
    strokes.info["root"] = str(path)
    return strokes


def _check_form(form: str) -> str:
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)} or None, got {form!r}")
    return form


def _chosen_form(found: _Found, form: str | None) -> str:
    """The form asked for, or strokes where they leave no category without."""
    if form is not None:
        return form
    with_strokes = {file.category for file in found.coordinates + found.svgs}
    drawn = {file.category for file in found.sketches}
    return "strokes" if with_strokes and drawn <= with_strokes else "images"


def _lacking(root: Path, found: _Found, names: list[str]) -> LayoutError:
    """Why the tree holds no pairs."""
    error = layout_error(root, EXPECTED_V2, names)
    if found.photos or not found.coordinates + found.svgs:
        return error
    return LayoutError(
        f"{error}\nThere are drawings, but no photos to pair them with; load_qmul_v2_strokes reads the "
        "drawings alone."
    )


def _read_strokes(tree: Tree, found: _Found, spacing: float, progress: bool) -> StrokeDataset:
    """The drawings of the coordinates, and of SVG in the categories without them."""
    skipped: dict[str, int] = {}
    drawings: dict[str, tuple[str, Sketch]] = {}  # part and drawing by name
    for file in found.coordinates:
        more = _read_coordinates(tree, file, skipped)
        if twice := sorted(drawings.keys() & more.keys()):
            raise ValueError(f"root: {tree.path} holds the drawing {twice[0]} twice, once in {file.path}")
        drawings.update(more)
    with_coordinates = {file.category for file in found.coordinates}
    svgs = [file for file in found.svgs if file.category not in with_coordinates]
    _check_once(tree.path, svgs)
    for file in track(svgs, "QMUL strokes", progress, total=len(svgs)):
        try:
            sketch = _read_svg(tree.read(file.path), spacing)
        except (ValueError, *READ_ERRORS):
            add_counts(skipped, {"broken svg": 1})
            continue
        drawings[file.name] = (file.part or found.listed_sketches.get(file.name, ""), sketch)
    names = sorted(name for name, (_, sketch) in drawings.items() if sketch.pen_down.any())
    if len(names) < len(drawings):
        add_counts(skipped, {"empty drawing": len(drawings) - len(names)})
    class_names = sorted({file.category for file in (*found.coordinates, *svgs)})
    return StrokeDataset.from_sketches(
        [drawings[name][1] for name in names],
        [class_names.index(name.split("/")[0]) for name in names],
        class_names,
        skipped=skipped,
        info={"dataset": "qmul_v2_strokes"},
        extra={
            "key": np.array(names, np.str_),
            "part": np.array([drawings[name][0] for name in names], "U5"),
        },
    )


def _read_coordinates(tree: Tree, file: _File, skipped: dict[str, int]) -> dict[str, tuple[str, Sketch]]:
    """Part and drawing of every usable entry of a `_Coordinate` file by name."""
    try:
        entries = load_arrays(tree.read(file.path))
    except (pickle.UnpicklingError, *READ_ERRORS):
        entries = None
    if not isinstance(entries, dict):
        add_counts(skipped, {"broken coordinates": 1})
        return {}
    drawings: dict[str, tuple[str, Sketch]] = {}
    for key, rows in entries.items():
        match = _COORDINATE_KEY.fullmatch(key) if isinstance(key, str) else None
        try:
            if match is None or not isinstance(rows, np.ndarray):
                raise ValueError("an entry must be an array under the name of a sketch")
            sketch = from_absolute(rows)
        except (TypeError, ValueError):
            add_counts(skipped, {"broken drawing": 1})
            continue
        drawings[f"{file.category}/{_stem(match['stem'])}"] = (match["part"] or "", sketch)
    return drawings


def _read_svg(data: bytes, spacing: float) -> Sketch:
    """The drawing on our canvas, whatever the document's size; ValueError where it has none."""
    size = svg_size(data)
    if size is None:
        raise ValueError("svg must have a size")
    sketch = from_svg(data, spacing=spacing)
    return Sketch((sketch.points * (CANVAS / np.array(size))).astype(np.float32), sketch.pen_down)


def _drawn(strokes: StrokeDataset, class_names: list[str], size: int, folder: Path | None) -> ImageSet:
    """Images of the strokes where they lie on their canvas, dark on white."""
    images = sketch_images([strokes[i][0] for i in range(len(strokes))], size, canvas=CANVAS)
    if folder is not None:
        write_images(folder, images)
    places = np.array([class_names.index(name) for name in strokes.class_names], np.int64)
    return ImageSet(
        images=images,
        labels=places[strokes.labels] if len(strokes) else np.zeros(0, np.int64),
        class_names=list(class_names),
        names=strokes.extra["key"].tolist(),
        skipped=dict(strokes.skipped),
    )
