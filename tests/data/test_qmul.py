"""The readers of QMUL's data sets, on trees written here and on the real files."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from image_trees import SVG, broken_files, picture, write_tree, zip_tree
from PIL import Image
from scipy.io import savemat

from sketchfast.data.archive import LayoutError
from sketchfast.data.images import ImageSet, SketchPhotoSet
from sketchfast.data.prepare import load_prepared, prepare
from sketchfast.data.qmul import (
    CANVAS,
    V1_COUNTS,
    decode_sketch,
    load_qmul_v1,
    load_qmul_v1_edges,
    load_qmul_v1_triplets,
    load_qmul_v2,
    load_qmul_v2_strokes,
    v2_photo_of_sketch,
)
from sketchfast.data.strokes import svg_size


def left(images: ImageSet) -> dict[str, int]:
    """Brightness of each image's left half, by name."""
    return {name: int(pixels[4, 1, 0]) for name, pixels in zip(images.names, images.images, strict=True)}


def paired(data: SketchPhotoSet) -> dict[str, str | None]:
    """The name of each sketch's photo."""
    photos = [None if pair < 0 else data.photos.names[pair] for pair in data.pairs.tolist()]
    return dict(zip(data.sketches.names, photos, strict=True))


def parts(images: ImageSet) -> dict[str, str]:
    return dict(zip(images.names, images.extra["part"].tolist(), strict=True))


def both(tmp_path: Path, files: dict[str, bytes], name: str = "set") -> list[Path]:
    """The data set as a folder, as a zip, and as a folder that holds only that zip."""
    folder = write_tree(tmp_path / "tree" / name, files)
    archive = zip_tree(tmp_path / f"{name}.zip", files)
    (tmp_path / "alone").mkdir()
    os.link(archive, tmp_path / "alone" / archive.name)
    return [folder, archive, tmp_path / "alone"]


# ---- V1 as MATLAB files ------------------------------------------------------------------------------------


def mat(**variables: object) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, variables, do_compression=True)
    return buffer.getvalue()


def grey(values: list[int], background: int = 255) -> np.ndarray:
    """Images [N, 32, 32] with a block of each value, the rest background."""
    images = np.full((len(values), 32, 32), background, np.uint8)
    images[:, :12, :12] = np.array(values, np.uint8)[:, None, None]
    return images


def edge_files(category: str = "shoe", train: int = 3, test: int = 2) -> dict[str, bytes]:
    """Sketches of brightness 1, 2, ... and photos of 101, 102, ... in the order of the numbers."""
    counts = {"train": range(1, train + 1), "test": range(train + 1, train + test + 1)}
    return {
        f"{category}s_{kind}_db_{part}.mat": mat(data=grey([base + n for n in numbers]))
        for kind, base in (("sketch", 0), ("edge", 100))
        for part, numbers in counts.items()
    }


def test_edges_from_folders_and_zips(tmp_path):
    files = edge_files("shoe") | edge_files("chair", 1, 1)
    for root in both(tmp_path, files):
        data = load_qmul_v1_edges(root, size=32)
        assert data.class_names == ["shoe", "chair"]
        assert data.photos.names == [*(f"shoe/{n}" for n in range(1, 6)), "chair/1", "chair/2"]
        assert paired(data) == {name: name for name in data.photos.names}
        assert list(left(data.sketches).values()) == [1, 2, 3, 4, 5, 1, 2]
        assert list(left(data.photos).values()) == [101, 102, 103, 104, 105, 101, 102]
        assert list(parts(data.photos).values()) == ["train"] * 3 + ["test"] * 2 + ["train", "test"]
        assert data.skipped == {"categories: file missing": 1}  # no handbags
        assert "edge maps" in data.info["photos"]
        assert data.info["identical photos"] == 2  # the chairs' are like the first shoes'
        chairs = load_qmul_v1_edges(root, size=8, category="chair")
        assert (chairs.class_names, chairs.skipped) == (["chair"], {})
        assert chairs.sketches.images.shape == (2, 8, 8, 3)


def test_light_on_dark_edges_are_inverted(tmp_path):
    files = edge_files("shoe") | {"shoes_sketch_db_train.mat": mat(data=grey([255, 250, 245], 0))}
    data = load_qmul_v1_edges(write_tree(tmp_path, files), size=32, category="shoe")
    assert list(left(data.sketches).values()) == [0, 5, 10, 4, 5]
    assert data.sketches.images[0, -1, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"", "broken mat file"),
        (b"no mat file at all" * 20, "broken mat file"),
        (edge_files()["shoes_edge_db_train.mat"][:-30], "broken mat file"),
        (mat(other=grey([1])), "broken mat file"),
        (mat(data=grey([1, 2, 3]).astype(float)), "broken mat file"),
        (mat(data=grey([1])[0]), "broken mat file"),
        (mat(data=np.zeros((0, 4, 4), np.uint8)), "broken mat file"),
        (mat(data=np.array([pickle.dumps(1)], object)), "broken mat file"),
        (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\0" * 500, "broken mat file"),
        (mat(data=grey([1, 2])), "sketches and photos differ in number"),
    ],
)
def test_a_category_with_a_broken_mat_file_is_left_out_and_counted(tmp_path, broken, reason):
    files = edge_files("shoe") | edge_files("chair", 2, 1) | {"shoes_edge_db_train.mat": broken}
    data = load_qmul_v1_edges(write_tree(tmp_path, files), size=8)
    assert data.class_names == ["chair"]
    assert data.skipped == {f"categories: {reason}": 1, "categories: file missing": 1}
    with pytest.raises(LayoutError, match=rf"Left out: categories: {reason} \(1\)"):
        load_qmul_v1_edges(tmp_path, size=8, category="shoe")


def test_a_mat_file_is_not_read_if_it_says_that_it_is_huge(tmp_path, monkeypatch):
    import scipy.io

    def read(*_args, **_keywords):
        raise AssertionError("read")

    monkeypatch.setattr("scipy.io.whosmat", lambda _file: [("data", (1 << 20, 1 << 10, 1 << 10), "uint8")])
    monkeypatch.setattr(scipy.io, "loadmat", read)
    with pytest.raises(LayoutError, match="broken mat file"):
        load_qmul_v1_edges(write_tree(tmp_path, edge_files()), category="shoe")


def test_bytes_changed_at_random_never_stop_the_reader(tmp_path):
    good = edge_files("shoe")["shoes_sketch_db_train.mat"]
    rng = np.random.default_rng(0)
    write_tree(tmp_path, edge_files("shoe") | edge_files("chair", 1, 1))
    for _ in range(40):
        damaged = bytearray(good)
        for place in rng.integers(0, len(good), 3).tolist():
            damaged[place] = int(rng.integers(256))
        (tmp_path / "shoes_sketch_db_train.mat").write_bytes(bytes(damaged))
        assert "chair" in load_qmul_v1_edges(tmp_path, size=4).class_names


def triplet_cells(row: int) -> np.ndarray:
    cells = np.empty((1, 2), object)
    for i in range(2):
        pair = np.empty((1, 2), object)
        pair[0, 0], pair[0, 1] = np.array([[row + 1]], np.uint16), np.array([[row + i + 2]], np.uint8)
        cells[0, i] = pair
    return cells


def test_triplets(tmp_path):
    rows = np.empty((3, 1), object)
    for i in range(3):
        rows[i, 0] = triplet_cells(10 * i)
    path = write_tree(tmp_path, {"shoes_train_triplets.mat": mat(One=rows, Two=rows, Three=rows[::-1])})
    found = load_qmul_v1_triplets(path)
    assert (found.shape, found.dtype) == ((3, 3, 2, 2), np.int64)
    assert found[1, 0].tolist() == [[10, 11], [10, 12]]
    assert found[0, 2].tolist() == [[20, 21], [20, 22]]
    for broken in (b"", mat(One=rows), mat(One=rows, Two=rows, Three=np.ones(3))):
        (tmp_path / "shoes_train_triplets.mat").write_bytes(broken)
        with pytest.raises(ValueError, match=r"holds a broken shoes_train_triplets\.mat"):
            load_qmul_v1_triplets(tmp_path)


def real_edges(real_data: Path) -> Path:
    if not (real_data / "qmul_v1_edges").is_dir():
        pytest.skip(f"no {real_data / 'qmul_v1_edges'}")
    return real_data / "qmul_v1_edges"


def test_the_real_edges(real_data):
    data = load_qmul_v1_edges(real_edges(real_data), size=32)
    assert data.class_names == ["shoe", "chair", "handbag"]
    assert data.skipped == {}
    assert data.info["identical photos"] == 4  # of the handbags to train on
    for label, name in enumerate(data.class_names):
        of_class = data.photos.extra["part"][data.photos.labels == label]
        assert tuple((of_class == part).sum() for part in ("train", "test")) == V1_COUNTS[name]
    assert data.pairs.tolist() == list(range(len(data.photos)))
    for images in (data.sketches, data.photos):
        assert images.images.mean() > 200  # dark on white
        assert (images.images.min(axis=(1, 2, 3)) < 240).all()


def test_in_the_real_edges_a_sketch_is_more_like_its_own_photo_than_like_others(real_data):
    data = load_qmul_v1_edges(real_edges(real_data), size=32)
    blur = torch.nn.AvgPool2d(5, 1, 2)
    for label in range(3):
        rows = np.flatnonzero(data.photos.labels == label)
        drawn, edges = (
            torch.nn.functional.normalize(x - x.mean(0))
            for images in (data.sketches, data.photos)
            for x in [blur(255 - torch.from_numpy(images.images[rows, :, :, :1]).float().mean(3)).flatten(1)]
        )
        similar = drawn @ edges.T
        better = (similar > similar.diag()[:, None]).float().mean()
        assert better < 0.25  # 0.5 if the pairs were drawn by lot


def test_the_real_triplets_are_of_the_same_numbering(real_data):
    root = real_edges(real_data)
    triplets = load_qmul_v1_triplets(root)
    assert triplets.shape == (419, 3, 45, 2)
    assert (triplets[:304].min(), triplets[:304].max()) == (0, 303)
    assert (triplets[304:].min(), triplets[304:].max()) == (304, 418)
    own = triplets[304:, :, :, 0] == np.arange(304, 419)[:, None, None]
    second = triplets[304:, :, :, 1] == np.arange(304, 419)[:, None, None]
    assert own.sum() > 10 * second.sum()  # the sketch's own photo is found more like it


# ---- V1 as folders -----------------------------------------------------------------------------------------


def v1_files(top: str, count: int = 3, base: int = 0) -> dict[str, bytes]:
    """Sketches of brightness base + 1, ... and photos of base + 101, ..."""
    numbers = range(1, count + 1)
    photos = {f"{top}photo/{n}.jpg": picture((base + 100 + n) % 251, "JPEG") for n in numbers}
    return photos | {f"{top}sketch/{n}.png": picture((base + n) % 251) for n in numbers}


def test_v1_from_folders_and_zips(tmp_path):
    files = v1_files("ShoeV1/", 11) | v1_files("my chairs/", 2, 50)
    for root in both(tmp_path, files):
        data = load_qmul_v1(root, size=8)
        assert data.class_names == ["chair", "shoe"]
        assert data.photos.names[:4] == ["chair/1", "chair/2", "shoe/1", "shoe/2"]
        assert data.photos.names[-2:] == ["shoe/10", "shoe/11"]  # in the order of numbers
        assert paired(data) == {name: name for name in data.photos.names}
        assert list(left(data.sketches).values()) == [51, 52, *range(1, 12)]
        np.testing.assert_allclose(list(left(data.photos).values()), [151, 152, *range(101, 112)], atol=2)
        assert set(parts(data.photos).values()) == {""}
        assert data.skipped == {}
    alone = load_qmul_v1(tmp_path / "tree/set/ShoeV1", size=8)
    assert alone.class_names == ["shoe"]


@pytest.mark.parametrize("form", ["{part}/{domain}/", "{domain}/{part}/", "{domain}s/{part}/"])
@pytest.mark.parametrize("restart", [False, True])
def test_v1_with_the_parts_in_folders(tmp_path, form, restart):
    files = {}
    for part, first in (("train", 1), ("test", 1 if restart else 4)):
        for n in range(first, first + 3):
            value = n + 20 * (part == "test")
            files[f"Shoes/{form.format(part=part, domain='sketch')}{n}.png"] = picture(value)
            files[f"Shoes/{form.format(part=part, domain='photo')}{n}.jpg"] = picture(100 + value, "JPEG")
    data = load_qmul_v1(write_tree(tmp_path / "Shoes", files), size=8)
    assert data.class_names == ["shoe"]
    assert len(data.photos) == 6
    assert sorted(parts(data.photos).values()) == ["test"] * 3 + ["train"] * 3
    assert parts(data.photos) == parts(data.sketches)
    sketches, photos = left(data.sketches), left(data.photos)
    for sketch, photo in paired(data).items():
        assert abs(photos[photo] - sketches[sketch] - 100) <= 2
        assert (sketches[sketch] > 20) == (parts(data.photos)[photo] == "test")
    assert ("shoe/train/1" in photos) == restart


def test_v1_with_the_parts_in_lists(tmp_path):
    lists = {
        "Shoe/photo_train_name.txt": b"1.jpg\n3.jpg\r\n\n",
        "Shoe/photo_test_name.txt": b"2.jpg\nlost.jpg",
        "Shoe/sketch_train_name.txt": b"1.png\n3.png",
    }
    for root in both(tmp_path, v1_files("Shoe/") | lists):
        data = load_qmul_v1(root, size=8)
        assert parts(data.photos) == {"shoe/1": "train", "shoe/2": "test", "shoe/3": "train"}
        assert parts(data.sketches) == parts(data.photos)
        assert (data.skipped, data.info["parts by number"]) == ({}, [])


def test_v1_with_the_published_counts_is_split_by_number(tmp_path):
    train, test = V1_COUNTS["chair"]
    data = load_qmul_v1(write_tree(tmp_path / "chairs", v1_files("", train + test)), size=4)
    assert data.info["parts by number"] == ["chair"]
    assert list(parts(data.photos).values()) == ["train"] * train + ["test"] * test
    (tmp_path / "chairs/photo/7.jpg").unlink()
    data = load_qmul_v1(tmp_path / "chairs", size=4)
    assert data.info["parts by number"] == []
    assert (data.pairs < 0).sum() == 1


def test_broken_files_and_unpaired_sketches_of_v1(tmp_path):
    broken = broken_files(picture(9))
    files = v1_files("Shoe/") | {"Shoe/sketch/9.png": picture(9), "Shoe/photo/notes.txt": b""}
    files |= {f"Shoe/sketch/{10 + i}.png": data for i, data in enumerate(broken.values())}
    files |= {f"Shoe/photo/{20 + i}.jpg": data for i, data in enumerate(broken.values())}
    files |= {"Shoe/sketch/14.png": picture(255)}  # all white: no sketch
    for root in both(tmp_path, files):
        data = load_qmul_v1(root, size=8)
        expected = {"shoe/1": "shoe/1", "shoe/2": "shoe/2", "shoe/3": "shoe/3", "shoe/9": None}
        assert paired(data) == expected
        assert data.skipped == {
            "sketches: broken image": 4,
            "photos: broken image": 3,
            "photos: not an image": 1,
        }


# ---- images of sketches ------------------------------------------------------------------------------------


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("ink", [0, 255])
@pytest.mark.parametrize("size", [16, 8])
def test_lines_in_the_transparency_are_dark_on_white(ink, size):
    pixels = np.full((16, 16, 4), ink, np.uint8)
    pixels[..., 3] = 0
    pixels[:4, :, 3] = 255
    image = decode_sketch(png(pixels), size)
    assert image.shape == (size, size, 3)
    assert (image[0].max(), image[-1].min()) == (0, 255)


def test_other_sketches_are_as_they_are_or_inverted():
    pixels = grey([30])[0]
    for form in (pixels, np.repeat(pixels[..., None], 3, 2), np.dstack([pixels] * 3 + [pixels * 0 + 255])):
        image = decode_sketch(png(form), 32)
        assert (image[2, 2, 0], image[-1, -1, 0]) == (30, 255)
    assert decode_sketch(png(255 - pixels), 32)[2, 2].tolist() == [30] * 3
    with pytest.raises(ValueError, match="the image must show a sketch"):
        decode_sketch(png(pixels * 0), 32)


# ---- V2 ----------------------------------------------------------------------------------------------------


def v2_files(top: str = "ShoeV2/") -> dict[str, bytes]:
    """Photos a_v1, b (train), c (test); a has two sketches, one sketch lacks its photo."""
    return {
        f"{top}trainA/a_v1_1.png": picture(1),
        f"{top}trainA/a_v1_2.png": picture(2),
        f"{top}trainA/b_1.png": picture(3),
        f"{top}trainA/lost_1.png": picture(4),
        f"{top}testA/c_7.png": picture(5),
        f"{top}trainB/a_v1.png": picture(101),
        f"{top}trainB/b.png": picture(102),
        f"{top}testB/c.png": picture(103),
        f"{top}train_noise/a_v1_1_mask1.png": picture(200),
    }


V2_PAIRS = {
    "shoe/a_v1_1": "shoe/a_v1",
    "shoe/a_v1_2": "shoe/a_v1",
    "shoe/b_1": "shoe/b",
    "shoe/lost_1": None,
    "shoe/c_7": "shoe/c",
}
V2_PARTS = {"shoe/a_v1": "train", "shoe/b": "train", "shoe/c": "test"}


def listed_v2_files(top: str = "", photo: str = "ShoeV2_photo", sketch: str = "ShoeV2_sketch_png"):
    """The same in folders by domain, with lists."""
    files = {}
    for name, data in v2_files("").items():
        folder, file = name.split("/")
        domain = {"A": sketch, "B": photo}.get(folder[-1])
        if domain:
            files[f"{top}{domain}/{file}"] = data
    return files | {
        f"{top}photo_train.txt": b"a_v1.png\nb.png\n",
        f"{top}photo_test.txt": b"c.png\n",
        f"{top}sketch_train.txt": b"a_v1_1.svg\na_v1_2.svg\nb_1.svg\nlost_1.svg",
        f"{top}sketch_test.txt": b"c_7.svg",
    }


def test_v2_in_trainA_and_trainB(tmp_path):  # noqa: N802  (the folders' names)
    for root in [*both(tmp_path, v2_files()), tmp_path / "tree/set/ShoeV2"]:
        data = load_qmul_v2(root, size=8)
        assert data.class_names == ["shoe"]
        assert paired(data) == V2_PAIRS
        assert parts(data.photos) == V2_PARTS
        assert left(data.sketches)["shoe/a_v1_2"] == 2
        assert left(data.photos)["shoe/c"] == 103
        assert parts(data.sketches)["shoe/c_7"] == "test"
        assert (data.skipped, data.info["form"]) == ({}, "images")


@pytest.mark.parametrize("names", [("ShoeV2_photo", "ShoeV2_sketch_png"), ("photo", "sketch")])
def test_v2_with_lists(tmp_path, names):
    top = "" if names[0].startswith("Shoe") else "ShoeV2/"
    for root in both(tmp_path, listed_v2_files(top, *names)):
        data = load_qmul_v2(root, size=8)
        assert data.class_names == ["shoe"]
        assert paired(data) == V2_PAIRS
        assert parts(data.photos) == V2_PARTS


@pytest.mark.parametrize(
    "lists",
    [
        {"train.txt": b"a_v1_1.png 0\na_v1_2.png 0\nb_1.png 1\n", "test.txt": b"c_7.png 2"},
        {"train_visible.txt": b"photo/a_v1.png 0\nphoto\\b.png 1", "test_visible.txt": b"x/c.png 2"},
        {"sketch_train.txt": b"a_v1_1\na_v1_2\nb_1", "sketch_test.txt": b"c_7"},
        {"trainset.txt": b"a_v1\nb", "testset.txt": b"c"},
    ],
)
def test_v2_with_other_lists(tmp_path, lists):
    files = {n: d for n, d in listed_v2_files("ShoeV2/", "photo", "sketch").items() if ".txt" not in n}
    root = write_tree(tmp_path, files | {f"ShoeV2/{name}": data for name, data in lists.items()})
    data = load_qmul_v2(root, size=8)
    assert paired(data) == V2_PAIRS
    assert parts(data.photos) == V2_PARTS


def test_v2_lists_of_two_categories_stay_apart(tmp_path):
    chairs = listed_v2_files("ChairV2/", "photo", "sketch")
    chairs |= {"ChairV2/photo_train.txt": b"c.png", "ChairV2/photo_test.txt": b"a_v1.png\nb.png"}
    chairs |= {"ChairV2/sketch_train.txt": b"", "ChairV2/sketch_test.txt": b"", "train.txt": b"c.png"}
    data = load_qmul_v2(write_tree(tmp_path, v2_files() | chairs), size=8)
    assert parts(data.photos) == V2_PARTS | {"chair/a_v1": "test", "chair/b": "test", "chair/c": "train"}
    assert data.skipped == {"photos: list of no single category": 1}


def test_v2_pairs_nothing_across_the_parts(tmp_path):
    files = v2_files() | {"ShoeV2/testA/a_v1_3.png": picture(6)}
    data = load_qmul_v2(write_tree(tmp_path, files), size=8)
    assert paired(data) == V2_PAIRS | {"shoe/a_v1_3": None}
    assert data.skipped == {"pair of two parts": 1}


@pytest.mark.parametrize("first", ["train", "test"])
def test_a_photo_whose_sketches_are_in_both_parts_is_to_train_on(tmp_path, first):
    other = {"train": "test", "test": "train"}[first]
    files = {n: d for n, d in listed_v2_files("ShoeV2/", "photo", "sketch").items() if ".txt" not in n}
    files |= {f"ShoeV2/sketch_{first}.txt": b"a_v1_1\nb_1", f"ShoeV2/sketch_{other}.txt": b"a_v1_2\nc_7"}
    data = load_qmul_v2(write_tree(tmp_path, files), size=8)
    assert parts(data.photos)["shoe/a_v1"] == "train"
    left_out = "shoe/a_v1_2" if first == "train" else "shoe/a_v1_1"
    assert paired(data) == V2_PAIRS | {left_out: None}
    assert data.skipped == {"pair of two parts": 1}


@pytest.mark.parametrize("twin", ["ShoeV2/testB/b.png", "copy/ShoeV2/trainB/b.png", "ShoeV2/trainB/b.jpg"])
def test_a_photo_that_is_there_twice_is_refused(tmp_path, twin):
    root = write_tree(tmp_path, v2_files() | {twin: picture(102)})
    with pytest.raises(ValueError, match=r"holds shoe/b twice: .*b\.(png|jpg), .*b\.(png|jpg)"):
        load_qmul_v2(root, size=8)


def test_broken_files_of_v2_are_counted(tmp_path):
    files = v2_files()
    for i, data in enumerate(broken_files(picture(9)).values()):
        files |= {f"ShoeV2/trainA/b_{i + 2}.png": data, f"ShoeV2/trainB/x{i}.png": data}
    files |= {"ShoeV2/trainA/desktop.ini": b""}
    for root in both(tmp_path, files):
        data = load_qmul_v2(root, size=8)
        assert paired(data) == V2_PAIRS
        assert data.skipped == {
            "sketches: broken image": 3,
            "photos: broken image": 3,
            "sketches: not an image": 1,
        }


# ---- V2's strokes ------------------------------------------------------------------------------------------


def line(y: float) -> np.ndarray:
    """A line from (64, y) to (192, y), and a point the pen is lifted to."""
    return np.array([[64, y, 0], [192, y, 1], [10, 10, 1]], float)


def coordinates(prefix: str = "/") -> dict[str, object]:
    keys = {"train": ("a_v1_1", "a_v1_2", "b_1", "lost_1"), "test": ("c_7",)}
    return {f"{prefix}{part}/{key}": line(40 + 20 * i) for part in keys for i, key in enumerate(keys[part])}


def photos_only(top: str) -> dict[str, bytes]:
    return {f"{top}photo/{name}.png": picture(101 + i) for i, name in enumerate(("a_v1", "b", "c"))}


@pytest.mark.parametrize("name", ["ShoeV2_Coordinate", "ShoeV2_Coordinate.pkl", "Coordinate.pickle"])
@pytest.mark.parametrize("prefix", ["/", ""])
def test_v2_drawn_from_coordinates(tmp_path, name, prefix):
    files = photos_only("ShoeV2/") | {f"ShoeV2/{name}": pickle.dumps(coordinates(prefix))}
    for root in both(tmp_path, files):
        data = load_qmul_v2(root, size=64)
        assert data.info["form"] == "strokes"
        assert paired(data) == V2_PAIRS
        assert parts(data.photos) == V2_PARTS
        strokes = load_qmul_v2_strokes(root)
        assert strokes.extra["key"].tolist() == data.sketches.names
        assert strokes.extra["part"].tolist() == data.sketches.extra["part"].tolist()
        np.testing.assert_array_equal(strokes[0][0].points, line(40)[:, :2])
        assert strokes[0][0].pen_down.tolist() == [True, False, False]
        dark = data.sketches.images[0, :, :, 0] < 128  # y 40 of 256 is between rows 9 and 10 of 64
        assert set(np.flatnonzero(dark.any(axis=1)).tolist()) <= {9, 10}
        assert np.flatnonzero(dark.any(axis=0))[[0, -1]].tolist() in ([16, 47], [15, 48])


def test_v2_form(tmp_path):
    files = v2_files() | {"ShoeV2/ShoeV2_Coordinate": pickle.dumps(coordinates())}
    root = write_tree(tmp_path, files)
    assert load_qmul_v2(root, size=8).info["form"] == "strokes"
    images = load_qmul_v2(root, size=8, form="images")
    assert left(images.sketches)["shoe/b_1"] == 3
    assert paired(images) == paired(load_qmul_v2(root, size=8)) == V2_PAIRS
    with pytest.raises(ValueError, match="form must be one of strokes, images or None, got 'png'"):
        load_qmul_v2(root, form="png")
    prepare("qmul_v2", root, size=8)
    assert isinstance(load_qmul_v2(root, size=8).sketches.images, np.memmap)
    assert not isinstance(load_qmul_v2(root, size=8, form="images").sketches.images, np.memmap)
    with_chairs = write_tree(tmp_path, v2_files("ChairV2/"))  # which have no coordinates
    with pytest.warns(RuntimeWarning, match="cache .* passed over"):
        assert load_qmul_v2(with_chairs, size=8).info["form"] == "images"


def test_v2_from_svg(tmp_path):
    files = {f"ShoeV2_photo/{name}.png": picture(100) for name in ("a", "b")}
    files |= {f"ShoeV2_sketch/{name}.svg": SVG.encode() for name in ("a_1", "b_1")}
    files |= {"ShoeV2_sketch/b_2.svg": b"no svg", "ShoeV2_sketch/b_3.svg": b"<svg/>"}
    files |= {"sketch_train.txt": b"a_1.svg", "sketch_test.txt": b"b_1.svg"}
    for root in both(tmp_path, files):
        data = load_qmul_v2(root, size=40)
        assert paired(data) == {"shoe/a_1": "shoe/a", "shoe/b_1": "shoe/b"}
        assert parts(data.photos) == {"shoe/a": "train", "shoe/b": "test"}
        assert data.skipped == {"sketches: broken svg": 2}
        strokes = load_qmul_v2_strokes(root)
        np.testing.assert_allclose(strokes[0][0].points, np.array([[100, 100], [500, 100]]) * CANVAS / 800)


def test_coordinates_without_photos_are_refused_for_pairs_but_read_as_strokes(tmp_path):
    file = write_tree(tmp_path, {"ChairV2_Coordinate": pickle.dumps(coordinates())}) / "ChairV2_Coordinate"
    for root in (tmp_path, file):
        with pytest.raises(LayoutError, match=r"no photos .* load_qmul_v2_strokes reads the drawings"):
            load_qmul_v2(root)
        strokes = load_qmul_v2_strokes(root)
        assert strokes.class_names == ["chair"]
        assert strokes.extra["key"][0] == "chair/a_v1_1"


class _Command:
    def __reduce__(self):
        return os.system, ("echo unpickled > unpickled",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps(coordinates())[:200],
        pickle.dumps([1, 2]),
        pickle.dumps({"train/a_1": _Command()}),
        pickle.dumps({"train/a_1": _Command(), "train/b_1": line(1)}),
        pickle.dumps({"train/a_1": np.array([_Command()], object)}),
    ],
)
def test_hostile_or_broken_coordinates_are_counted_and_run_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    root = write_tree(tmp_path / "set", {"ShoeV2_Coordinate": content})
    strokes = load_qmul_v2_strokes(root)
    assert (len(strokes), strokes.skipped) == (0, {"broken coordinates": 1})
    assert not (tmp_path / "unpickled").exists()


def test_broken_drawings_are_counted(tmp_path):
    entries = coordinates() | {
        "/train/d_1": np.array([[np.nan, 0, 1.0]]),
        "/train/d_2": np.zeros((4, 2)),
        "/train/d_3": np.zeros((0, 3)),
        "/train/d_4": np.array([[1, 2, 1.0]]),
        "/train/d_5": "text",
        "/train/x/d_6": line(3),
        7: line(3),
    }
    strokes = load_qmul_v2_strokes(write_tree(tmp_path, {"ShoeV2_Coordinate": pickle.dumps(entries)}))
    assert len(strokes) == 5
    assert strokes.skipped == {"broken drawing": 5, "empty drawing": 2}


def test_strokes_are_prepared_and_saved(tmp_path):
    root = write_tree(tmp_path / "set", {"ShoeV2_Coordinate": pickle.dumps(coordinates())})
    prepare("qmul_v2_strokes", root)
    loaded, plain = load_prepared("qmul_v2_strokes", root), load_qmul_v2_strokes(root)
    np.testing.assert_array_equal(loaded.points, plain.points)
    assert loaded.extra["key"].tolist() == plain.extra["key"].tolist()


def test_the_real_coordinates(real_data):
    path = real_data / "qmul_v2_vectors"
    if not path.is_dir():
        pytest.skip(f"no {path}")
    strokes = load_qmul_v2_strokes(path)
    assert strokes.class_names == ["chair"]
    assert strokes.skipped == {}
    part = strokes.extra["part"]
    assert ((part == "train").sum(), (part == "test").sum()) == (952, 323)
    assert 0 <= strokes.points.min() <= strokes.points.max() <= CANVAS
    photos = {p: {v2_photo_of_sketch(k) for k in strokes.extra["key"][part == p]} for p in ("train", "test")}
    assert (len(photos["train"]), len(photos["test"])) == (300, 100)
    assert not photos["train"] & photos["test"]
    assert v2_photo_of_sketch("chair/sdich070-laque-rouge_A1YX741QQSMKPS") == "chair/sdich070-laque-rouge"
    with pytest.raises(LayoutError, match="no photos to pair them with"):
        load_qmul_v2(path)


# ---- wrong layouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "tree"),
    [
        (load_qmul_v1, "<root>/<category>/photo/1.jpg"),
        (load_qmul_v1_edges, "<root>/<category>s_sketch_db_train.mat"),
        (load_qmul_v1_triplets, "<root>/shoes_train_triplets.mat"),
        (load_qmul_v2, "<root>/<category>/trainA/<photo>_<n>.png"),
        (load_qmul_v2_strokes, "<root>/<category>/<category>_Coordinate"),
    ],
)
def test_a_wrong_layout_is_refused_with_the_expected_tree(tmp_path, load, tree):
    files = {"cat/1.png": picture(1), "256x256/x.txt": b""}
    for wrong in (write_tree(tmp_path / "other", files), zip_tree(tmp_path / "other.zip", files)):
        with pytest.raises(LayoutError) as refusal:
            load(wrong)
        assert tree in str(refusal.value)
        assert "cat/1.png" in str(refusal.value)
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="is not a readable zip archive"):
        load(tmp_path / "bad.zip")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="root must be a str or Path"):
        load(3)


def test_one_version_is_not_taken_for_the_other(tmp_path):
    with pytest.raises(LayoutError, match="drawn after photo 1"):
        load_qmul_v1(write_tree(tmp_path / "v2", v2_files()))
    with pytest.raises(LayoutError, match="trainA/<photo>_<n>"):
        load_qmul_v2(write_tree(tmp_path / "v1", v1_files("Shoe/")))


@pytest.mark.parametrize("load", [load_qmul_v1, load_qmul_v1_edges, load_qmul_v2])
def test_wrong_arguments_are_refused(tmp_path, load):
    root = write_tree(tmp_path, v1_files("Shoe/") | v2_files("Shoe/") | edge_files())
    for size in (0, -3, 2.5, "8"):
        with pytest.raises((TypeError, ValueError), match="size"):
            load(root, size=size)
    with pytest.raises(ValueError, match="category must be None or one of shoe, chair, handbag, got 'hat'"):
        load_qmul_v1_edges(root, category="hat")


def test_svg_size():
    assert svg_size('<svg viewBox="0 0 640,480" width="1"><path') == (640, 480)
    assert svg_size(b'<?xml version="1.0"?><svg width="64px" height="48"/>') == (64, 48)
    boxes = ("0 0 0 5", "5 0 10 10", "0 0 nan 1", "0 0 inf 1", "0 0 1")
    sizeless = ("", "text", "<svg/>", '<svg width="100%" height="1"/>')
    for none in (*sizeless, *(f'<svg viewBox="{box}" width="1" height="1"/>' for box in boxes)):
        assert svg_size(none) is None
