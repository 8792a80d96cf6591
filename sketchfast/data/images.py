"""Image sets: one domain (`ImageSet`), sketches with photos (`SketchPhotoSet`), and their retrieval splits.

Images are uint8 RGB [N, H, W, 3] as on disk: photos, and sketches dark on white. `save` writes a folder whose
`images.npy` is read back as a read-only memory map, so a set need not fit into memory.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch.utils.data import Dataset

from ..ops._contract import check_integer
from .archive import READ_ERRORS, Tree
from .dataset import CACHE_VERSION, _row_index, add_counts, class_index, read_npz, track, write_npz

#: Side of the images the readers give, in pixels: what PM-JDOT trains on (section 4.2.1).
DEFAULT_SIZE = 96
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
_IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF")  # what is in the file; its name may lie
_IMAGES_FILE, _FIELDS_FILE = "images.npy", "fields.npz"
_COPY_ROWS = 4096  # images copied at once from one file to another: bounds the memory


@dataclass
class ImageSet(Dataset[tuple[NDArray[np.uint8], int]]):
    """N labelled images of one domain, map-style: `images[i] -> (uint8 [H, W, 3], label)`.

    images: uint8 [N, H, W, 3], RGB, an array or a read-only memory map. labels: int64 [N], indices into
    class_names; a class may have no image (see `class_counts`). names: N names, each once, such as
    "airplane/n02691156_58-1". skipped: how many files were left out, by reason. info: where it came from.
    extra: further values an image, arrays of N rows.

    Raises TypeError or ValueError, naming the field, for anything else.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: list[str]
    names: list[str]
    skipped: dict[str, int] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, array in {"images": self.images, "labels": self.labels}.items():
            if not isinstance(array, np.ndarray):
                raise TypeError(f"{name} must be a numpy array, got {type(array).__name__}")
        if self.labels.ndim != 1 or self.labels.dtype != np.int64:
            raise ValueError(f"labels must be int64 [N], got {self.labels.dtype} {list(self.labels.shape)}")
        count, shape = len(self.labels), self.images.shape
        wanted = len(shape) == 4 and shape[0] == count and min(shape[1:3]) > 0 and shape[3] == 3
        if self.images.dtype != np.uint8 or not wanted:
            raise ValueError(
                f"images must be uint8 [{count}, H, W, 3], got {self.images.dtype} {list(shape)}"
            )
        _check_names("class_names", self.class_names)
        _check_names("names", self.names)
        if len(self.names) != count:
            raise ValueError(f"names must be {count}, one an image, got {len(self.names)}")
        if count and not (self.labels.min() >= 0 and self.labels.max() < len(self.class_names)):
            raise ValueError(
                f"labels must be in [0, {len(self.class_names)}), got {self.labels.min()} to"
                f" {self.labels.max()}"
            )
        for name, values in self.extra.items():
            if len(values) != count:
                raise ValueError(f"extra[{name!r}] must have {count} rows, got {len(values)}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        count = len(self.labels)
        if not -count <= index < count:
            raise IndexError(f"index must be in [{-count}, {count}), got {index}")
        return np.array(self.images[index]), int(self.labels[index])  # a copy: a map may not be written to

    @property
    def class_counts(self) -> NDArray[np.int64]:
        """Images of each class, int64 [len(class_names)]."""
        return np.bincount(self.labels, minlength=len(self.class_names)).astype(np.int64)

    def subset(self, index: ArrayLike) -> ImageSet:
        """The images at `index` (integers or a bool mask); class names and labels stay as they are.

        A run of rows without a gap is a view of the images, anything else copies them into memory.
        """
        rows = _row_index(index, len(self))
        return replace(
            self,
            images=_take(self.images, rows),
            labels=self.labels[rows],
            class_names=list(self.class_names),
            names=[self.names[row] for row in rows.tolist()],
            skipped=dict(self.skipped),
            info=dict(self.info),
            extra={name: values[rows] for name, values in self.extra.items()},
        )

    def select_classes(self, names: Sequence[str]) -> ImageSet:
        """The images of the classes `names`, relabelled 0 .. len(names) - 1 in that order."""
        relabel = _relabelling(self.class_names, names)
        return self._relabelled(relabel, names, np.flatnonzero(relabel[self.labels] >= 0))

    def _relabelled(
        self, relabel: NDArray[np.int64], names: Sequence[str], rows: NDArray[np.int64]
    ) -> ImageSet:
        """`rows` with their labels under the class names `names`."""
        kept = self.subset(rows)
        return replace(kept, labels=relabel[kept.labels], class_names=list(names))

    def save(self, path: str | Path) -> None:
        """Writes the set as the folder `path`, under a temporary name first, then renamed."""
        with new_folder(Path(path)) as folder:
            write_images(folder, self.images)
            self.save_fields(folder)

    def save_fields(self, folder: Path) -> None:
        """Writes all but the images into `folder`, beside the `images.npy` that is there."""
        if any(values.dtype.hasobject for values in self.extra.values()):
            raise TypeError("extra must hold no object arrays: they cannot be saved without pickle")
        extra = {f"extra_{name}": values for name, values in self.extra.items()}
        write_npz(folder / _FIELDS_FILE, _header(self, names=self.names), labels=self.labels, **extra)

    @classmethod
    def load(cls, path: str | Path) -> ImageSet:
        """Reads what `save` wrote, the images as a read-only memory map; ValueError for anything else.

        Raises FileNotFoundError if nothing is there.
        """
        folder = _existing_folder(path)
        header, arrays = read_npz(folder / _FIELDS_FILE, ("labels",))
        try:
            return cls(
                images=_map_images(folder / _IMAGES_FILE, len(arrays["labels"])),
                labels=arrays["labels"],
                names=header["names"],
                extra={k.removeprefix("extra_"): v for k, v in arrays.items() if k.startswith("extra_")},
                **_common(header),
            )
        except (ValueError, TypeError, KeyError, *READ_ERRORS) as error:
            raise ValueError(f"path: {path} is no readable cache: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """A memory map goes to a worker process as its file's name, not as its bytes."""
        state = dict(self.__dict__)
        if (place := _map_place(self.images)) is not None:
            state["images"] = place
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["images"], _MapPlace):
            path, offset, shape = state["images"]
            state = {**state, "images": np.memmap(path, np.uint8, "r", offset, shape)}
        self.__dict__.update(state)


@dataclass
class SketchPhotoSet:
    """Sketches and photos of the same classes, and which sketch was drawn after which photo.

    sketches, photos: both with this set's class_names, though a class may be empty in either (see
    `info["classes without sketches"]` and `info["classes without photos"]` of the readers). pairs: int64
    [len(sketches)], the photo each sketch was drawn after as an index into photos, -1 where unknown. skipped:
    files left out of either domain, by reason.

    Raises TypeError or ValueError, naming the field, for anything else.
    """

    sketches: ImageSet
    photos: ImageSet
    class_names: list[str]
    pairs: NDArray[np.int64]
    skipped: dict[str, int] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, images in {"sketches": self.sketches, "photos": self.photos}.items():
            if not isinstance(images, ImageSet):
                raise TypeError(f"{name} must be an ImageSet, got {type(images).__name__}")
            if images.class_names != self.class_names:
                raise ValueError(
                    f"{name}.class_names must be this set's {len(self.class_names)} class_names, got "
                    f"{len(images.class_names)} others"
                )
        if not isinstance(self.pairs, np.ndarray):
            raise TypeError(f"pairs must be a numpy array, got {type(self.pairs).__name__}")
        count, most = len(self.sketches), len(self.photos)
        if self.pairs.dtype != np.int64 or self.pairs.shape != (count,):
            raise ValueError(
                f"pairs must be int64 [{count}], got {self.pairs.dtype} {list(self.pairs.shape)}"
            )
        if count and not (self.pairs.min() >= -1 and self.pairs.max() < most):
            raise ValueError(f"pairs must be in [-1, {most}), got {self.pairs.min()} to {self.pairs.max()}")
        paired = self.pairs >= 0
        if (self.sketches.labels[paired] != self.photos.labels[self.pairs[paired]]).any():
            raise ValueError("pairs must join a sketch and a photo of one class")

    def select_classes(self, names: Sequence[str]) -> SketchPhotoSet:
        """Both domains of the classes `names`, relabelled 0 .. len(names) - 1 in that order."""
        relabel = _relabelling(self.class_names, names)
        sketch_rows = np.flatnonzero(relabel[self.sketches.labels] >= 0)
        photo_rows = np.flatnonzero(relabel[self.photos.labels] >= 0)
        place = np.full(len(self.photos) + 1, -1, np.int64)  # the last one for the sketches without a photo
        place[photo_rows] = np.arange(len(photo_rows))
        return replace(
            self,
            sketches=self.sketches._relabelled(relabel, names, sketch_rows),
            photos=self.photos._relabelled(relabel, names, photo_rows),
            class_names=list(names),
            pairs=place[self.pairs[sketch_rows]],
            skipped=dict(self.skipped),
            info=dict(self.info),
        )

    def split_unsupervised(self, queries_per_class: int, seed: int = 0) -> RetrievalSplit:
        """The unsupervised protocol of Liu et al. (2017) that PM-JDOT follows (section 4.2.1).

        query: `queries_per_class` sketches of each class, drawn by (seed, class name) alone; train: all other
        sketches and all photos; gallery: all photos. The paper takes 50 (Sketchy-Extended), 10
        (TUBerlin-Extended).

        Raises ValueError where a class has sketches, but no more than `queries_per_class`.
        """
        wanted = check_integer("queries_per_class", queries_per_class, 1)
        seed = check_integer("seed", seed, 0)
        is_query = np.zeros(len(self.sketches), bool)
        for label, class_name in enumerate(self.class_names):
            rows = np.flatnonzero(self.sketches.labels == label)
            if not len(rows):
                continue
            if len(rows) <= wanted:
                raise ValueError(
                    f"queries_per_class must leave class {class_name!r} a sketch to train on: it has "
                    f"{len(rows)}, got {wanted}"
                )
            rng = np.random.default_rng([seed, zlib.crc32(class_name.encode())])
            is_query[rng.choice(rows, wanted, replace=False)] = True
        train = replace(self, sketches=self.sketches.subset(~is_query), pairs=self.pairs[~is_query])
        return RetrievalSplit(
            train, self.sketches.subset(is_query), self.photos, f"unsupervised-{wanted}-seed{seed}"
        )

    def split_zero_shot(self, test_classes: Sequence[str], name: str | None = None) -> RetrievalSplit:
        """The zero-shot protocol: train on both domains of the classes not in `test_classes`, and retrieve
        the photos of `test_classes` by their sketches.

        The class names of `train` are the other classes in this set's order, of query and gallery
        `test_classes` in the order given: labels of the two do not compare. Lists: `data/splits.py`. name: of
        the split, by default "zero-shot-<train classes>-<test classes>".

        Raises ValueError for a class that is not there, is named twice, or if none is left to train on.
        """
        relabel = _relabelling(self.class_names, test_classes)
        others = [name for name, to in zip(self.class_names, relabel.tolist(), strict=True) if to < 0]
        if not test_classes or not others:
            raise ValueError(
                f"test_classes must be some, not all, of the {len(self.class_names)} classes, got "
                f"{len(test_classes)}"
            )
        return RetrievalSplit(
            self.select_classes(others),
            self.sketches.select_classes(test_classes),
            self.photos.select_classes(test_classes),
            name or f"zero-shot-{len(others)}-{len(test_classes)}",
        )

    def fingerprint(self) -> str:
        """A digest of both domains' names and of a MiB of pixels at either end: more would take long."""
        digest = hashlib.blake2b(digest_size=16)
        for domain in (self.sketches, self.photos):
            rows = max(1, (1 << 20) // domain.images[0].size)
            digest.update("\n".join(domain.names).encode())
            for part in (domain.images[:rows], domain.images[-rows:]):
                digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes the set as the folder `path`, under a temporary name first, then renamed."""
        with new_folder(Path(path)) as folder:
            for name, images in {"sketches": self.sketches, "photos": self.photos}.items():
                (folder / name).mkdir()
                write_images(folder / name, images.images)
            self.save_fields(folder)

    def save_fields(self, folder: Path) -> None:
        """Writes all but the images into `folder` and its `sketches` and `photos`."""
        self.sketches.save_fields(folder / "sketches")
        self.photos.save_fields(folder / "photos")
        write_npz(folder / _FIELDS_FILE, _header(self), pairs=self.pairs)

    @classmethod
    def load(cls, path: str | Path) -> SketchPhotoSet:
        """Reads what `save` wrote, as `ImageSet.load`."""
        folder = _existing_folder(path)
        header, arrays = read_npz(folder / _FIELDS_FILE, ("pairs",))
        try:
            sketches, photos = ImageSet.load(folder / "sketches"), ImageSet.load(folder / "photos")
            return cls(sketches=sketches, photos=photos, pairs=arrays["pairs"], **_common(header))
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise ValueError(f"path: {path} is no readable cache: {error}") from error


@dataclass
class RetrievalSplit:
    """train: what may be learned from. query: sketches, gallery: photos, with the same class_names."""

    train: SketchPhotoSet
    query: ImageSet
    gallery: ImageSet
    name: str

    def __post_init__(self) -> None:
        if self.query.class_names != self.gallery.class_names:
            raise ValueError("query and gallery must have the same class_names")


def _check_names(field_name: str, names: Any) -> None:
    """TypeError or ValueError unless `names` is a list of different strings."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{field_name} must be a list of str, got {type(names).__name__}")
    if len(set(names)) != len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"{field_name} must be different from each other, got {twice!r} twice")


def _relabelling(class_names: Sequence[str], wanted: Sequence[str]) -> NDArray[np.int64]:
    """For each label of `class_names` its place in `wanted`, -1 where it is not there."""
    if isinstance(wanted, str):
        raise TypeError(f"classes must be a sequence of names, got the str {wanted!r}")
    wanted = list(wanted)
    old = [class_index(class_names, name) for name in wanted]
    _check_names("classes", wanted)
    relabel = np.full(len(class_names), -1, np.int64)
    relabel[old] = np.arange(len(old))
    return relabel


def _take(images: NDArray[np.uint8], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """images[rows], without a copy if the rows are a run."""
    if len(rows) and (np.diff(rows) == 1).all():
        return images[int(rows[0]) : int(rows[-1]) + 1]
    return np.asarray(images)[rows]


# ---- the cache on disk -------------------------------------------------------------------------------------


class _MapPlace(NamedTuple):
    path: str
    offset: int
    shape: tuple[int, ...]


def _map_place(images: NDArray[np.uint8]) -> _MapPlace | None:
    """File, offset in bytes and shape of a memory map's rows; None for an array in memory."""
    if not isinstance(images, np.memmap) or not images.flags.c_contiguous or not images.size:
        return None
    root = images
    while isinstance(root.base, np.memmap):
        root = root.base
    if root.filename is None or not Path(root.filename).is_file():
        return None
    start = images.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    return _MapPlace(str(root.filename), root.offset + start, images.shape)


def _header(data: ImageSet | SketchPhotoSet, **more: Any) -> dict[str, Any]:
    return {
        "version": CACHE_VERSION,
        "class_names": data.class_names,
        "skipped": data.skipped,
        "info": data.info,
        **more,
    }


def _common(header: dict[str, Any]) -> dict[str, Any]:
    return {name: header[name] for name in ("class_names", "skipped", "info")}


def _existing_folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"path: {path} does not exist")
    if not (folder / _FIELDS_FILE).is_file():
        raise ValueError(f"path: {path} is no readable cache: it holds no {_FIELDS_FILE}")
    return folder


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, under a temporary name beside `path`; at the end it takes the place of `path`.

    Nothing is left of it if filling it fails. Raises ValueError where `path` is something else than a folder
    this module wrote.
    """
    if path.exists() and not (path / _FIELDS_FILE).is_file():
        raise ValueError(f"path must be new or a saved image set, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name.lstrip('.')}.", suffix=".tmp"))
    try:
        folder = work / "new"
        folder.mkdir()  # with the rights of a common folder; the temporary one is ours alone
        yield folder
        if path.exists():
            os.rename(path, work / "old")
        os.rename(folder, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def create_images(folder: Path, count: int, size: int) -> NDArray[np.uint8]:
    """A writable memory map [max(count, 1), size, size, 3] of a new `images.npy` in `folder`."""
    shape = (max(count, 1), size, size, 3)  # an empty file cannot be mapped
    return np.lib.format.open_memmap(folder / _IMAGES_FILE, "w+", np.uint8, shape)


def write_images(folder: Path, images: NDArray[np.uint8]) -> None:
    """Writes `images` as the `images.npy` of `folder`, a part at a time."""
    shape = (max(len(images), 1), *images.shape[1:])  # an empty file cannot be mapped
    target = np.lib.format.open_memmap(folder / _IMAGES_FILE, "w+", np.uint8, shape)
    for start in range(0, len(images), _COPY_ROWS):
        target[start : start + _COPY_ROWS] = images[start : start + _COPY_ROWS]
    target.flush()


def _map_images(path: Path, count: int) -> NDArray[np.uint8]:
    """The first `count` images of the file, which has room for those that turned out broken."""
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    if len(images) < count:
        raise ValueError(f"{path.name} holds {len(images)} images, {count} are needed")
    return images[:count]


# ---- reading files -----------------------------------------------------------------------------------------


class ImageFile(NamedTuple):
    """The file `path` of a `Tree`, the class it belongs to and its name in it."""

    path: str
    class_name: str
    stem: str

    @property
    def name(self) -> str:
        return f"{self.class_name}/{self.stem}"


def inside(tree: Tree, folder: str) -> Iterator[tuple[str, str, str]]:
    """Path, class and file name of every `[...]/<folder>/<class>/<file>`; the tree may be `folder` itself."""
    above = (folder,) if tree.path.name == folder else ()
    for path in tree.names:
        parts = (*above, *PurePosixPath(path).parts)
        if len(parts) >= 3 and parts[-3] == folder:
            yield path, parts[-2], parts[-1]


def find_images(tree: Tree, *folders: str) -> tuple[list[ImageFile], dict[str, int]]:
    """The images `[...]/<folders>/<class>/<file>` of a tree, in order, and what else lies there, by reason.

    Raises ValueError where the same file of a class is there twice: in two copies of the data set.
    """
    found: dict[tuple[str, str], str] = {}
    passed_over: dict[str, int] = {}
    for path in tree.names:
        parts = PurePosixPath(path).parts
        if len(parts) < len(folders) + 2:
            continue
        *above, class_name, file_name = parts[-len(folders) - 2 :]
        if tuple(above) != folders:
            continue
        if PurePosixPath(file_name).suffix.lower() not in IMAGE_SUFFIXES:
            add_counts(passed_over, {"not an image": 1})
            continue
        if (twin := found.setdefault((class_name, file_name), path)) != path:
            raise ValueError(f"root: {tree.path} holds {class_name}/{file_name} twice: {twin}, {path}")
    files: dict[tuple[str, str], ImageFile] = {}
    for (class_name, file_name), path in sorted(found.items()):
        stem = PurePosixPath(file_name).stem
        name = file_name if (class_name, stem) in files else stem  # a.jpg and a.png stay apart
        files[class_name, name] = ImageFile(path, class_name, name)
    return list(files.values()), passed_over


def decode_image(data: bytes, size: int) -> NDArray[np.uint8]:
    """The image file `data` as RGB, uint8 [size, size, 3].

    Reduced with antialiasing (a JPEG already while it is decoded) and, if it is no square, stretched to one,
    as the published code does. What is transparent becomes white.

    Raises ValueError, SyntaxError or one of READ_ERRORS for what is no whole image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as file:
            if file.format in ("JPEG", "MPO"):
                file.draft("RGB", (size, size))
            if "A" in file.getbands() or "transparency" in file.info:
                over = file.convert("RGBA")
                image = Image.new("RGBA", over.size, "white")
                image.alpha_composite(over)
                image = image.convert("RGB")
            else:
                image = file.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image is too large: {error}") from error
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def read_images(
    tree: Tree,
    files: Sequence[ImageFile],
    class_names: Sequence[str],
    size: int,
    *,
    folder: Path | None = None,
    decode: Callable[[bytes, int], NDArray[np.uint8]] = decode_image,
    description: str = "images",
    progress: bool = False,
) -> ImageSet:
    """The images of `files`, in their order; those that cannot be read are left out and counted.

    folder: where given, the images are written to its `images.npy` as they come and the set maps it; else
    they are in memory. Files are read and decoded by as many threads as there are cores, a few ahead of the
    one that is stored: no more than the result is held.
    """
    images = (
        np.empty((len(files), size, size, 3), np.uint8)
        if folder is None
        else create_images(folder, len(files), size)
    )
    index = {name: label for label, name in enumerate(class_names)}
    kept: list[ImageFile] = []
    skipped: dict[str, int] = {}

    def read(file: ImageFile) -> NDArray[np.uint8] | None:
        try:
            return decode(tree.read(file.path), size)
        except (ValueError, SyntaxError, *READ_ERRORS):
            return None

    results = track(_ahead(read, files), description, progress, total=len(files))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # of odd, but readable files
        for file, image in zip(files, results, strict=True):
            if image is None:
                add_counts(skipped, {"broken image": 1})
                continue
            images[len(kept)] = image
            kept.append(file)
    if isinstance(images, np.memmap):
        images.flush()
        images = _map_images(Path(str(images.filename)), len(kept))
    return ImageSet(
        images=images[: len(kept)],
        labels=np.array([index[file.class_name] for file in kept], np.int64),
        class_names=list(class_names),
        names=[file.name for file in kept],
        skipped=skipped,
    )


def _ahead(call: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`call` of each item in order, by a pool of threads that runs a bounded number ahead."""
    workers = min(
        16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Any]] = deque()
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) > 8 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def join_domains(
    sketches: ImageSet, photos: ImageSet, pairs: NDArray[np.int64], info: dict[str, Any]
) -> SketchPhotoSet:
    """The two domains as one set: counts of both, and the classes that lack one of them, in `info`."""
    class_names = list(sketches.class_names)
    skipped = {
        f"{domain}: {reason}": count
        for domain, images in {"sketches": sketches, "photos": photos}.items()
        for reason, count in images.skipped.items()
    }
    lacking = {
        f"classes without {domain}": [class_names[i] for i in np.flatnonzero(images.class_counts == 0)]
        for domain, images in {"sketches": sketches, "photos": photos}.items()
    }
    return SketchPhotoSet(sketches, photos, class_names, pairs, skipped, {**info, **lacking})


def pair_names(
    sketches: ImageSet, photos: ImageSet, photo_name: Callable[[str], str | None]
) -> NDArray[np.int64]:
    """int64 [len(sketches)]: where the photo named `photo_name(name of the sketch)` is, -1 if nowhere."""
    place = {name: index for index, name in enumerate(photos.names)}
    wanted = (photo_name(name) for name in sketches.names)
    return np.array([-1 if name is None else place.get(name, -1) for name in wanted], np.int64)


def domain_folder(folder: Path | None, domain: str) -> Path | None:
    """The new folder of one domain in a set's `folder`, None if there is none."""
    if folder is None:
        return None
    (folder / domain).mkdir()
    return folder / domain
