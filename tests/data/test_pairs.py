"""Splits for fine-grained retrieval, and the data sets they are made of."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_trees import SVG, picture, write_tree, zip_tree

from sketchfast.data.archive import LayoutError
from sketchfast.data.dataset import StrokeDataset
from sketchfast.data.images import ImageSet, SketchPhotoSet
from sketchfast.data.pairs import (
    PAIR_SETS,
    PROCEDURAL_PHOTOS,
    PROCEDURAL_SKETCHES,
    STROKES_MAY_LACK,
    InstanceSplit,
    load_pairs,
    match_strokes,
    split_by_photo,
    split_instances,
)
from sketchfast.data.prepare import prepare
from sketchfast.data.procedural import CANVAS, procedural_pairs, procedural_sketch_photo
from sketchfast.data.qmul import v2_photo_of_sketch
from sketchfast.data.render import rasterize_sketches, sketch_images
from sketchfast.data.sketchy import load_sketchy_strokes, photo_of_sketch
from sketchfast.data.strokes import Sketch, make_sketch

TX = "tx_000000000000"


def make_set(
    photos: list[list[int]], unpaired: int = 0, seed: int = 0
) -> tuple[SketchPhotoSet, StrokeDataset]:
    """Classes of photos, each with that many sketches, all in an order by `seed`; and sketches of none.

    Photo "c0/p1" has sketches "c0/p1-0", ...; the brightness of an image and the start of a sketch's strokes
    are its number.
    """
    class_names = [f"c{label}" for label in range(len(photos))]
    photo_list = [(label, f"c{label}/p{i}", n) for label, row in enumerate(photos) for i, n in enumerate(row)]
    sketch_list = [(label, f"{name}-{k}", name) for label, name, n in photo_list for k in range(n)]
    sketch_list += [(0, f"c0/stray-{k}", None) for k in range(unpaired)]
    rng = np.random.default_rng(seed)
    photo_list = [photo_list[i] for i in rng.permutation(len(photo_list))]
    sketch_list = [sketch_list[i] for i in rng.permutation(len(sketch_list))]
    place = {name: i for i, (_, name, _) in enumerate(photo_list)}

    def images(rows: list[tuple[int, str, Any]]) -> ImageSet:
        values = np.array([_number(name) for _, name, _ in rows], np.uint8)
        pixels = np.broadcast_to(values[:, None, None, None], (len(rows), 2, 2, 3)).copy()
        labels = np.array([label for label, _, _ in rows], np.int64)
        return ImageSet(pixels, labels, class_names, [name for _, name, _ in rows])

    pairs = np.array([-1 if photo is None else place[photo] for _, _, photo in sketch_list], np.int64)
    data = SketchPhotoSet(images(sketch_list), images(photo_list), class_names, pairs)
    return data, strokes_of(data.sketches)


def _number(name: str) -> int:
    return sum(name.encode()) % 251


def strokes_of(sketches: ImageSet) -> StrokeDataset:
    """A line a sketch that starts at its number."""
    lines = [make_sketch([[_number(name), 0], [5, 5]], [True, False]) for name in sketches.names]
    return StrokeDataset.from_sketches(
        lines, sketches.labels, sketches.class_names, extra={"key": np.array(sketches.names, np.str_)}
    )


def check_split(split: InstanceSplit, photo_of: Any) -> None:
    """The parts share no photo, and every sketch is with its own."""
    assert not set(split.train.photos.names) & set(split.test.photos.names)
    assert not set(split.train.sketches.names) & set(split.test.sketches.names)
    for part, strokes in ((split.train, split.train_strokes), (split.test, split.test_strokes)):
        assert [photo_of(name) for name in part.sketches.names] == [part.photos.names[p] for p in part.pairs]
        assert set(part.pairs.tolist()) == set(range(len(part.photos)))  # no photo is without a sketch
        np.testing.assert_array_equal(part.sketches.labels, part.photos.labels[part.pairs])
        assert part.class_names == split.train.class_names
        if strokes is not None:
            np.testing.assert_array_equal(strokes.labels, part.sketches.labels)
            assert strokes.class_names == part.class_names
            if "key" in strokes.extra:
                assert strokes.extra["key"].tolist() == part.sketches.names


# ---- split_instances ---------------------------------------------------------------------------------------

CLASSES_OF_PHOTOS = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=4
).filter(lambda classes: any(sum(n > 0 for n in row) > 1 for row in classes))


@given(
    photos=CLASSES_OF_PHOTOS,
    unpaired=st.integers(0, 3),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 1 << 40),
    order=st.integers(0, 1000),
)
def test_whole_photos_are_held_out_evenly_by_class(photos, unpaired, share, seed, order):
    data, strokes = make_set(photos, unpaired, order)
    split = split_instances(data, test_share=share, seed=seed, strokes=strokes, canvas=9)
    check_split(split, lambda name: name.rpartition("-")[0])
    drawn = [[n for n in row if n] for row in photos]
    assert split.train.class_names == [f"c{label}" for label, row in enumerate(drawn) if row]
    assert len(split.train.sketches) + len(split.test.sketches) == sum(map(sum, drawn))
    for name, row in zip(split.train.class_names, filter(None, drawn), strict=True):
        label = split.train.class_names.index(name)
        held_out = int((split.test.photos.labels == label).sum())
        assert held_out + int((split.train.photos.labels == label).sum()) == len(row)
        assert abs(held_out - share * len(row)) <= 1
        assert (0 < held_out < len(row)) or len(row) == 1
    for part, drawings in ((split.train, split.train_strokes), (split.test, split.test_strokes)):
        for images in (part.sketches, part.photos):
            assert images.images[:, 0, 0, 0].tolist() == [_number(name) for name in images.names]
        starts = [drawings[i][0].points[0, 0] for i in range(len(drawings))]
        assert starts == [_number(name) for name in part.sketches.names]
        left_out = {
            "sketches: photo not known": unpaired,
            "photos: no sketch drawn after": sum(n == 0 for row in photos for n in row),
        }
        assert part.skipped == {reason: count for reason, count in left_out.items() if count}


@given(photos=CLASSES_OF_PHOTOS, seed=st.integers(0, 100), order=st.integers(1, 1000))
def test_the_split_does_not_depend_on_the_order_of_files(photos, seed, order):
    one = split_instances(make_set(photos, 0, 0)[0], test_share=0.4, seed=seed)
    other = split_instances(make_set(photos, 0, order)[0], test_share=0.4, seed=seed)
    assert set(one.test.photos.names) == set(other.test.photos.names)
    assert set(one.test.sketches.names) == set(other.test.sketches.names)


def test_the_split_of_a_class_depends_on_the_seed_and_that_class_alone():
    data = make_set([[1] * 30, [1] * 30])[0]
    names = [set(split_instances(data, seed=seed).test.photos.names) for seed in range(6)]
    assert len({frozenset(n) for n in names}) == 6
    assert names[0] == set(split_instances(data, seed=0).test.photos.names)
    numbers = [{n.split("/")[1] for n in names[0] if n.startswith(c)} for c in ("c0", "c1")]
    assert numbers[0] != numbers[1]  # not the same draw in every class
    alone = split_instances(data.select_classes(["c1"]), seed=0)
    assert set(alone.test.photos.names) == {n for n in names[0] if n.startswith("c1")}


def test_split_instances_refuses_what_cannot_be():
    data, strokes = make_set([[1, 2, 1]])
    with pytest.raises(TypeError, match="data must be a SketchPhotoSet, got int"):
        split_instances(3)
    for share, kind in (
        (0, ValueError),
        (1, ValueError),
        (-0.1, ValueError),
        ("a", TypeError),
        (True, TypeError),
    ):
        with pytest.raises(kind, match="test_share must be"):
            split_instances(data, test_share=share)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        split_instances(data, seed=-1)
    with pytest.raises(ValueError, match="strokes must be 4 drawings, one a sketch, got 3"):
        split_instances(data, strokes=strokes.subset([0, 1, 2]), canvas=9)
    with pytest.raises(TypeError, match="strokes must be a StrokeDataset or None, got list"):
        split_instances(data, strokes=[1], canvas=9)
    for without_pairs in (make_set([[1], [2], [0, 0]])[0], replace(data, pairs=np.full(4, -1, np.int64))):
        with pytest.raises(ValueError, match="data must hold a class with two photos that sketches"):
            split_instances(without_pairs)


def test_split_by_photo_takes_the_mask_at_its_word():
    data, strokes = make_set([[1, 2, 0, 1]], unpaired=1)
    mask = np.array([name in ("c0/p1", "c0/p2") for name in data.photos.names])
    split = split_by_photo(data, mask, "by hand", strokes=strokes, canvas=256)
    assert (split.name, split.canvas) == ("by hand", 256.0)
    assert split.test.photos.names == ["c0/p1"]
    assert sorted(split.test.sketches.names) == ["c0/p1-0", "c0/p1-1"]
    check_split(split, lambda name: name.rpartition("-")[0])
    with pytest.raises(ValueError, match=r"is_test must be bool \[4\], got int64 \[4\]"):
        split_by_photo(data, mask.astype(np.int64), "")


# ---- InstanceSplit -----------------------------------------------------------------------------------------


def test_an_instance_split_is_checked():
    data, strokes = make_set([[1, 2, 1, 1]])
    split = split_instances(data, test_share=0.5, strokes=strokes, canvas=9)
    fields = {"train": split.train, "test": split.test}
    InstanceSplit("fine", **fields)
    for wrong, kind, message in [
        ({"train": 3}, TypeError, "train must be a SketchPhotoSet, got int"),
        ({"test": split.train}, ValueError, r"test.photos must share none with train, got 'c0/p\d' in both"),
        ({"test": make_set([[1], [1]])[0]}, ValueError, "test.class_names must be train's 1, got 2 others"),
        ({"train": make_set([[1]], 1)[0]}, ValueError, r"train.pairs must all be known .* 'c0/stray-0'"),
        ({"train_strokes": [], "canvas": 1}, TypeError, "train_strokes must be a StrokeDataset or None"),
        (
            {"test_strokes": strokes, "canvas": 1},
            ValueError,
            r"test_strokes must be \d drawings, one a sketch",
        ),
        ({"test_strokes": split.test_strokes}, ValueError, "canvas must be given iff strokes are, got None"),
        ({"canvas": 256}, ValueError, "canvas must be given iff strokes are, got 256"),
        ({"test_strokes": split.test_strokes, "canvas": 0}, ValueError, "canvas must be"),
        ({"test_strokes": split.test_strokes, "canvas": "1"}, TypeError, "canvas must be a number"),
    ]:
        with pytest.raises(kind, match=message):
            InstanceSplit("wrong", **{**fields, **wrong})
    only_test = InstanceSplit("test alone", **fields, test_strokes=split.test_strokes, canvas=9)
    assert only_test.train_strokes is None


def test_the_parts_are_saved_and_loaded(tmp_path):
    split = load_pairs("procedural", None, category="house", size=16)
    split.test.save(tmp_path / "test")
    split.test_strokes.save(tmp_path / "test.npz")
    test, strokes = SketchPhotoSet.load(tmp_path / "test"), StrokeDataset.load(tmp_path / "test.npz")
    again = InstanceSplit(split.name, split.train, test, None, strokes, split.canvas)
    check_split(again, photo_of_sketch)
    np.testing.assert_array_equal(test.sketches.images, split.test.sketches.images)
    np.testing.assert_array_equal(strokes.points, split.test_strokes.points)
    assert (test.info, test.skipped) == (split.test.info, split.test.skipped)


def test_strokes_are_matched_by_name():
    data, strokes = make_set([[50, 50, 100]])
    mixed = strokes.subset(np.random.default_rng(0).permutation(200))
    same, matched = match_strokes(data, mixed)
    assert same is data
    np.testing.assert_array_equal(matched.points, strokes.points)

    few = int(200 * STROKES_MAY_LACK)
    less, matched = match_strokes(data, mixed.subset(range(few, 200)))
    assert less.skipped == {"sketches: no strokes": few}
    assert matched.extra["key"].tolist() == less.sketches.names
    assert len(less.sketches) == 200 - few
    assert [less.photos.names[p] for p in less.pairs] == [n.rpartition("-")[0] for n in less.sketches.names]
    assert len(data.sketches) == 200

    whole, matched = match_strokes(data, mixed.subset(range(few + 1, 200)))
    assert (len(whole.sketches), matched) == (200, None)
    assert whole.info["sketches without strokes"] == few + 1
    assert match_strokes(data, None)[1] is None


# ---- load_pairs --------------------------------------------------------------------------------------------


def test_load_pairs_refuses_what_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"name must be one of procedural, qmul_v1, .*, got 'qmul'"):
        load_pairs("qmul", tmp_path)
    for keywords, kind, message in [
        ({"size": 0}, ValueError, "size must be at least 1"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
        ({"test_share": 1.0}, ValueError, "test_share must be below 1"),
        ({"category": 3}, TypeError, "category must be a str or None, got int"),
    ]:
        with pytest.raises(kind, match=message):
            load_pairs("sketchy", tmp_path, **keywords)
    with pytest.raises(ValueError, match="root must be None for procedural, got"):
        load_pairs("procedural", tmp_path)
    with pytest.raises(ValueError, match=r"category must be None or one of .*, got 'hut'"):
        load_pairs("procedural", None, category="hut")
    for name in PAIR_SETS:
        if name == "procedural":
            continue
        with pytest.raises(ValueError, match=f"root must be the folder or zip of {name}, got None"):
            load_pairs(name, None)
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_pairs(name, tmp_path / "nowhere")
        with pytest.raises(LayoutError, match="Expected:"):
            load_pairs(name, tmp_path)


def test_procedural_pairs_with_strokes():
    split = load_pairs("procedural", None, size=24, test_share=0.25, seed=3)
    check_split(split, photo_of_sketch)
    assert len(split.test.photos) == PROCEDURAL_PHOTOS // 4
    assert len(split.train.sketches) == PROCEDURAL_SKETCHES * len(split.train.photos)
    assert split.canvas == CANVAS
    assert split.test.info["seed"] == 3
    again = load_pairs("procedural", None, size=24, test_share=0.25, seed=3)
    np.testing.assert_array_equal(split.test.sketches.images, again.test.sketches.images)
    np.testing.assert_array_equal(split.test_strokes.points, again.test_strokes.points)
    other = load_pairs("procedural", None, size=24, test_share=0.25, seed=4)
    assert set(other.test.photos.names) != set(split.test.photos.names)
    cats = load_pairs("procedural", None, size=8, category="cat")
    assert (cats.train.class_names, len(cats.train.photos) + len(cats.test.photos)) == (
        ["cat"],
        PROCEDURAL_PHOTOS,
    )


@pytest.mark.parametrize("size", [20, 33])
def test_procedural_strokes_lie_as_in_the_images(size):
    data, strokes = procedural_pairs(2, size, classes=["house", "cat"], sketches_per_instance=2)
    placed = [
        Sketch(sketch.points * np.float32(size / CANVAS) - np.float32(0.5), sketch.pen_down)
        for sketch, _ in (strokes[i] for i in range(len(strokes)))
    ]
    ink = rasterize_sketches(placed, size, padding=None).numpy()
    drawn = 255 - data.sketches.images[..., 0]
    assert np.abs(ink.astype(int) - drawn).max() <= 1  # rounding
    assert drawn.max() > 200
    alone = procedural_sketch_photo(2, size, classes=["house", "cat"], sketches_per_instance=2)
    np.testing.assert_array_equal(alone.sketches.images, data.sketches.images)


def sketch_photo_files() -> dict[str, bytes]:
    files = {f"photo/{c}/p{i}.jpg": picture(10 * i, "JPEG") for c in ("cat", "dog") for i in range(6)}
    files |= {
        f"sketch/{c}/p{i}-{k}.png": picture(k) for c in ("cat", "dog") for i in range(5) for k in (1, 2)
    }
    files |= {"sketch/owl/x.png": picture(3), "photo/owl/x.jpg": picture(4, "JPEG")}
    pairs = [
        {"sketch": name, "photo": f"photo/{name.split('/')[1]}/{name.split('/')[2].split('-')[0]}.jpg"}
        for name in files
        if name.startswith("sketch/") and "owl" not in name
    ]
    return files | {"sketchy_pairs.json": json.dumps(pairs).encode()}


def test_pairs_of_sketch_photo(tmp_path):
    files = sketch_photo_files()
    for root in (write_tree(tmp_path / "set", files), zip_tree(tmp_path / "set.zip", files)):
        split = load_pairs("sketch_photo", root, size=8)
        check_split(split, photo_of_sketch)
        assert split.train.class_names == ["cat", "dog"]
        assert (len(split.train.photos), len(split.test.photos)) == (8, 2)
        assert split.train.skipped == {"sketches: photo not known": 1, "photos: no sketch drawn after": 3}
        assert split.train_strokes is split.test_strokes is split.canvas is None
        assert split.name == "sketch_photo cat+dog, 0.2 of the photos held out, seed 0"
        dogs = load_pairs("sketch_photo", root, size=8, category="dog")
        assert dogs.train.class_names == ["dog"]
        assert set(dogs.test.photos.names) < set(split.test.photos.names)
    with pytest.raises(ValueError, match="category must be None or one of cat, dog, owl, got 'fox'"):
        load_pairs("sketch_photo", root, category="fox")
    with pytest.raises(ValueError, match="data must hold a class with two photos"):
        load_pairs("sketch_photo", root, category="owl")


def test_the_real_sketch_photo(real_data):
    path = real_data / "sketch_photo" / "sketch_photo_160.zip"
    if not path.is_file():
        pytest.skip(f"no {path}")
    split = load_pairs("sketch_photo", path, size=16)
    check_split(split, photo_of_sketch)
    assert split.train.class_names == ["dog", "elephant", "giraffe", "guitar", "horse"]
    assert len(split.train.photos) + len(split.test.photos) == 434
    assert len(split.train.sketches) + len(split.test.sketches) == 2864
    assert abs(len(split.test.photos) - 0.2 * 434) <= 2.5  # half a photo a class


# ---- Sketchy -----------------------------------------------------------------------------------------------


def sketchy_files(photos: int = 5) -> dict[str, bytes]:
    names = [f"{c}/n0_{i}" for c in ("ant", "bat") for i in range(photos)]
    files = {f"256x256/photo/{TX}/{name}.jpg": picture(9, "JPEG") for name in names}
    files |= {f"256x256/sketch/{TX}/{name}-{k}.png": picture(k) for name in names for k in (1, 2)}
    return files


def sketchy_svgs(photos: int = 5) -> dict[str, bytes]:
    wide = SVG.replace("0 0 800 800", "0 0 800 400").encode()
    return {
        name.replace(f"256x256/sketch/{TX}", "sketches-06-04/sketches").replace(".png", ".svg"): wide
        for name in sketchy_files(photos)
        if "/sketch/" in name
    }


def test_pairs_of_sketchy(tmp_path):
    files = sketchy_files()
    for root in (write_tree(tmp_path / "set", files), zip_tree(tmp_path / "set.zip", files)):
        split = load_pairs("sketchy", root, size=8)
        check_split(split, photo_of_sketch)
        assert (len(split.train.photos), len(split.test.photos)) == (8, 2)
        assert split.canvas is None
        assert split.name == "sketchy ant+bat, 0.2 of the photos held out, seed 0"


def test_pairs_of_sketchy_with_strokes_on_a_square_canvas(tmp_path):
    files = sketchy_files() | sketchy_svgs()
    for root in (write_tree(tmp_path / "set", files), zip_tree(tmp_path / "set.zip", files)):
        for category in (None, "bat"):
            split = load_pairs("sketchy", root, size=8, category=category)
            check_split(split, photo_of_sketch)
            assert split.canvas == 256
            expected = np.array([[100, 100], [500, 100]]) * [256 / 800, 256 / 400]
            np.testing.assert_allclose(split.test_strokes[0][0].points, expected, rtol=1e-6)
    strokes = load_sketchy_strokes(root, classes=["ant"])
    assert strokes.class_names == ["ant"]
    assert strokes.extra["size"].tolist() == [[800, 400]] * 10
    prepare("sketchy_strokes", root)
    cached = load_pairs("sketchy", root, size=8)
    np.testing.assert_allclose(cached.test_strokes[0][0].points, expected, rtol=1e-6)


def test_sketchy_drawings_without_a_size_or_whole_are_lacking(tmp_path):
    svgs = sketchy_svgs(60)
    first, second, *_ = sorted(svgs)
    svgs |= {first: b"no svg", second: SVG.replace(' viewBox="0 0 800 800"', "").encode()}
    split = load_pairs("sketchy", write_tree(tmp_path, sketchy_files(60) | svgs), size=4)
    check_split(split, photo_of_sketch)
    assert split.train.skipped["sketches: no strokes"] == 2
    for name in sorted(svgs)[2:5]:
        (tmp_path / name).unlink()
    split = load_pairs("sketchy", tmp_path, size=4)
    assert split.canvas is None
    assert split.train.info["sketches without strokes"] == 5
    assert len(split.train.sketches) + len(split.test.sketches) == 240


def test_sketchy_is_split_as_its_publishers_did(tmp_path):
    listed = b"ant/n0_3.jpg\nbat/n0_0.jpg\r\nbat/n0_1.jpg\nowl/n0_1.jpg\n\n.\n"
    root = write_tree(tmp_path, sketchy_files() | {"info-06-04/info/testset.txt": listed})
    split = load_pairs("sketchy", root, size=8)
    check_split(split, photo_of_sketch)
    assert split.test.photos.names == ["ant/n0_3", "bat/n0_0", "bat/n0_1"]
    assert "publishers' test photos" in split.name


# ---- QMUL --------------------------------------------------------------------------------------------------


def test_pairs_of_qmul_v1(tmp_path):
    files = {f"Shoes/photo/{n}.jpg": picture(100 + n, "JPEG") for n in range(1, 11)}
    files |= {f"Shoes/sketch/{n}.png": picture(n) for n in range(1, 11)}
    for root in (write_tree(tmp_path / "set", files), zip_tree(tmp_path / "set.zip", files)):
        split = load_pairs("qmul_v1", root, size=8)
        check_split(split, str)
        assert (len(split.train.photos), len(split.test.photos)) == (8, 2)
        assert "held out" in split.name
    lists = {"Shoes/photo_train.txt": b"".join(b"%d.jpg\n" % n for n in range(1, 8))}
    lists |= {"Shoes/photo_test.txt": b"8.jpg\n9.jpg\n"}
    split = load_pairs("qmul_v1", write_tree(tmp_path / "set", lists), size=8)
    check_split(split, str)
    assert split.test.photos.names == ["shoe/8", "shoe/9"]
    assert split.train.skipped == {"photos: in neither part": 1}  # 10 is in no list
    assert split.name == "qmul_v1 shoe, split as published"
    with pytest.raises(ValueError, match="category must be None or one of shoe, got 'chair'"):
        load_pairs("qmul_v1", root, category="chair")


def test_pairs_of_qmul_v1_by_the_published_counts(tmp_path):
    files = {f"chairs/photo/{n}.png": picture(100) for n in range(1, 298)}
    files |= {f"chairs/sketch/{n}.png": picture(1) for n in range(1, 298)}
    split = load_pairs("qmul_v1", write_tree(tmp_path, files), size=4, category="chair")
    check_split(split, str)
    assert (len(split.train.photos), len(split.test.photos)) == (200, 97)
    assert split.name == "qmul_v1 chair, published counts in the order of numbers"


def v2_files(category: str = "ShoeV2") -> dict[str, bytes]:
    photos = {"train": ("a", "b_v1"), "test": ("c",)}
    files = {f"{category}/{p}B/{n}.png": picture(100) for p in photos for n in photos[p]}
    return files | {
        f"{category}/{p}A/{n}_{k}.png": picture(k) for p in photos for n in photos[p] for k in (1, 2)
    }


def test_pairs_of_qmul_v2(tmp_path):
    files = v2_files() | v2_files("ChairV2")
    for root in (write_tree(tmp_path / "set", files), zip_tree(tmp_path / "set.zip", files)):
        split = load_pairs("qmul_v2", root, size=8)
        check_split(split, v2_photo_of_sketch)
        assert split.name == "qmul_v2 chair+shoe, split as published"
        assert split.test.photos.names == ["chair/c", "shoe/c"]
        assert split.canvas is None
        shoes = load_pairs("qmul_v2", root, size=8, category="shoe")
        assert sorted(shoes.train.photos.names) == ["shoe/a", "shoe/b_v1"]
        prepare("qmul_v2", root, size=8)
        cached = load_pairs("qmul_v2", root, size=8, category="shoe")
        np.testing.assert_array_equal(cached.test.sketches.images, shoes.test.sketches.images)
        assert cached.test.sketches.names == shoes.test.sketches.names


@pytest.mark.parametrize("prepared", [False, True])
def test_pairs_of_qmul_v2_with_strokes(tmp_path, prepared):
    line = np.array([[64, 40, 0], [192, 40, 1]], float)
    keys = ("/train/a_1", "/train/b_v1_2", "/train/b_v1_1", "/test/c_1", "/train/lost_1")
    drawings = {key: line + np.array([0, 10 * i, 0]) for i, key in enumerate(keys)}
    files = {f"ShoeV2/photo/{name}.png": picture(100) for name in ("a", "b_v1", "c", "undrawn")}
    root = write_tree(tmp_path, files | {"ShoeV2/ShoeV2_Coordinate": pickle.dumps(drawings)})
    if prepared:
        prepare("qmul_v2_strokes", root)
        prepare("qmul_v2", root, size=64)
    split = load_pairs("qmul_v2", root, size=64)
    check_split(split, v2_photo_of_sketch)
    assert split.train.sketches.names == ["shoe/a_1", "shoe/b_v1_1", "shoe/b_v1_2"]
    assert split.test.sketches.names == ["shoe/c_1"]
    assert split.canvas == 256
    np.testing.assert_array_equal(split.test_strokes[0][0].points, [[64, 70], [192, 70]])
    assert split.train.skipped == {"sketches: photo not known": 1, "photos: in neither part": 1}
    dark = split.test.sketches.images[0, :, :, 0] < 128
    assert set(np.flatnonzero(dark.any(axis=1)).tolist()) == {17}  # 70 of 256 is at 17.0 of 64
    for sketches, strokes in (
        (split.train.sketches, split.train_strokes),
        (split.test.sketches, split.test_strokes),
    ):
        drawn = sketch_images([strokes[i][0] for i in range(len(strokes))], 64, canvas=split.canvas)
        np.testing.assert_array_equal(sketches.images, drawn)


def test_pairs_of_the_real_edges(real_data):
    path: Path = real_data / "qmul_v1_edges"
    if not path.is_dir():
        pytest.skip(f"no {path}")
    for category, counts in {"shoe": (304, 115), "chair": (200, 97), "handbag": (400, 168)}.items():
        split = load_pairs("qmul_v1_edges", path, category=category, size=16)
        check_split(split, str)
        for part, count in zip((split.train, split.test), counts, strict=True):
            assert (len(part.sketches), len(part.photos)) == (count, count)
        assert split.name == f"qmul_v1_edges {category}, official split"
        assert "edge maps" in split.test.info["photos"]
        seen = {image.tobytes() for image in split.train.photos.images}
        assert not any(image.tobytes() in seen for image in split.test.photos.images)
