"""Image sets: what they refuse, splits, the cache on disk."""

from __future__ import annotations

import io
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_trees import broken_files, picture, write_tree
from PIL import Image

from sketchfast.data.archive import open_tree
from sketchfast.data.cache import file_states
from sketchfast.data.images import (
    ImageSet,
    RetrievalSplit,
    SketchPhotoSet,
    decode_image,
    find_images,
    join_domains,
    read_images,
)


def image_set(per_class: list[int], side: int = 4, first: int = 0) -> ImageSet:
    """per_class[c] images of class c; image i is filled with first + i."""
    count, labels = sum(per_class), np.repeat(np.arange(len(per_class)), per_class)
    return ImageSet(
        images=np.broadcast_to(
            np.arange(first, first + count, dtype=np.uint8)[:, None, None, None], (count, side, side, 3)
        ).copy(),
        labels=labels,
        class_names=[f"class {c}" for c in range(len(per_class))],
        names=[f"{label}/{first + i}" for i, label in enumerate(labels.tolist())],
        extra={"row": np.arange(count)},
        skipped={"broken image": 1},
        info={"dataset": "made here"},
    )


def sketch_photo_set() -> SketchPhotoSet:
    """Class 0: 5 sketches, 2 photos; class 1: 4 and 3; class 2: 3 and 1; class 3: photos only."""
    sketches, photos = image_set([5, 4, 3, 0]), image_set([2, 3, 1, 2], first=100)
    pairs = np.array([0, 1, 0, -1, 1, 2, 3, 4, 2, 5, -1, 5])
    return join_domains(sketches, photos, pairs, {"dataset": "made here"})


def same_images(a: ImageSet, b: ImageSet) -> bool:
    return (
        np.array_equal(a.images, b.images)
        and np.array_equal(a.labels, b.labels)
        and (a.class_names, a.names, a.skipped, a.info) == (b.class_names, b.names, b.skipped, b.info)
        and a.extra.keys() == b.extra.keys()
        and all(np.array_equal(a.extra[name], b.extra[name]) for name in a.extra)
    )


# ---- contents ----------------------------------------------------------------------------------------------


def test_items_are_copies_with_their_label():
    images = image_set([2, 1])
    pixels, label = images[-1]
    assert (pixels.shape, pixels.dtype, int(pixels[0, 0, 0]), label) == ((4, 4, 3), np.uint8, 2, 1)
    pixels[:] = 77
    assert int(images.images[2].max()) == 2
    np.testing.assert_array_equal(images.class_counts, [2, 1])
    for outside in (3, -4):
        with pytest.raises(IndexError, match=r"index must be in \[-3, 3\)"):
            images[outside]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("images", np.zeros((3, 4, 4), np.uint8), r"images must be uint8 \[3, H, W, 3\]"),
        ("images", np.zeros((3, 4, 4, 3), np.float32), r"images must be uint8 .* got float32"),
        ("images", np.zeros((2, 4, 4, 3), np.uint8), r"images must be uint8 \[3, H, W, 3\]"),
        ("images", np.zeros((3, 0, 4, 3), np.uint8), r"images must be uint8 \[3, H, W, 3\]"),
        ("images", [[0]], "images must be a numpy array, got list"),
        ("labels", np.array([0, 0, 1], np.int32), r"labels must be int64 \[N\], got int32"),
        ("labels", np.array([0, 0, 2]), r"labels must be in \[0, 2\)"),
        ("labels", np.array([-1, 0, 1]), r"labels must be in \[0, 2\)"),
        ("class_names", ("a", "b"), "class_names must be a list of str, got tuple"),
        ("class_names", ["a", "a"], "class_names must be different from each other, got 'a' twice"),
        ("names", ["a", "b"], "names must be 3, one an image, got 2"),
        ("names", ["a", "b", "a"], "names must be different from each other, got 'a' twice"),
        ("names", [1, 2, 3], "names must be a list of str"),
        ("extra", {"x": np.zeros(2)}, r"extra\['x'\] must have 3 rows, got 2"),
    ],
)
def test_an_inconsistent_image_set_is_refused(field, value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        replace(image_set([2, 1]), **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sketches", "none", "sketches must be an ImageSet, got str"),
        ("photos", image_set([2, 3]), "photos.class_names must be this set's 4"),
        ("pairs", [0] * 12, "pairs must be a numpy array, got list"),
        ("pairs", np.zeros(12), r"pairs must be int64 \[12\], got float64"),
        ("pairs", np.zeros(11, np.int64), r"pairs must be int64 \[12\]"),
        ("pairs", np.full(12, 8), r"pairs must be in \[-1, 8\)"),
        ("pairs", np.full(12, -2), r"pairs must be in \[-1, 8\)"),
        ("pairs", np.full(12, 0), "pairs must join a sketch and a photo of one class"),
    ],
)
def test_an_inconsistent_sketch_photo_set_is_refused(field, value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        replace(sketch_photo_set(), **{field: value})


def test_subsets_and_classes():
    images = image_set([2, 3, 1])
    assert images.subset([4, 0]).names == ["1/4", "0/0"]
    assert images.subset(images.labels == 1).extra["row"].tolist() == [2, 3, 4]
    assert np.shares_memory(images.subset([1, 2, 3]).images, images.images)
    assert not np.shares_memory(images.subset([1, 3]).images, images.images)
    assert len(images.subset([])) == 0
    chosen = images.select_classes(["class 2", "class 0"])
    assert (chosen.class_names, chosen.labels.tolist()) == (["class 2", "class 0"], [1, 1, 0])
    assert chosen.images[:, 0, 0, 0].tolist() == [0, 1, 5]
    with pytest.raises(ValueError, match="classes must be among the 3 found"):
        images.select_classes(["class 9"])
    with pytest.raises(ValueError, match="got 'class 0' twice"):
        images.select_classes(["class 0", "class 0"])
    with pytest.raises(TypeError, match="sequence of names, got the str"):
        images.select_classes("class 0")


def test_selecting_classes_keeps_the_pairs():
    chosen = sketch_photo_set().select_classes(["class 2", "class 1"])
    assert chosen.sketches.labels.tolist() == [1, 1, 1, 1, 0, 0, 0]
    named = [(s, chosen.photos.names[p] if p >= 0 else None)
             for s, p in zip(chosen.sketches.names, chosen.pairs, strict=True)]  # fmt: skip
    assert named == [
        ("1/5", "1/102"), ("1/6", "1/103"), ("1/7", "1/104"), ("1/8", "1/102"),
        ("2/9", "2/105"), ("2/10", None), ("2/11", "2/105"),
    ]  # fmt: skip


def test_counts_and_classes_that_lack_a_domain_are_told():
    data = sketch_photo_set()
    assert data.skipped == {"sketches: broken image": 1, "photos: broken image": 1}
    assert data.info["classes without sketches"] == ["class 3"]
    assert data.info["classes without photos"] == []


# ---- splits ------------------------------------------------------------------------------------------------


def test_unsupervised_split_is_disjoint_complete_and_seeded():
    data = sketch_photo_set()
    split = data.split_unsupervised(2, seed=3)
    assert split.query.class_counts.tolist() == [2, 2, 2, 0]
    assert not set(split.query.names) & set(split.train.sketches.names)
    assert set(split.query.names) | set(split.train.sketches.names) == set(data.sketches.names)
    assert split.gallery is data.photos
    assert split.train.photos is data.photos
    assert split.name == "unsupervised-2-seed3"
    for name, pair in zip(split.train.sketches.names, split.train.pairs, strict=True):
        assert pair == data.pairs[data.sketches.names.index(name)]
    assert data.split_unsupervised(2, seed=3).query.names == split.query.names
    assert any(data.split_unsupervised(2, seed=s).query.names != split.query.names for s in range(5))


def test_unsupervised_split_of_a_class_does_not_depend_on_the_others():
    data = sketch_photo_set()
    alone = data.select_classes(["class 1"]).split_unsupervised(2).query.names
    assert alone == [n for n in data.split_unsupervised(2).query.names if n.startswith("1/")]


def test_unsupervised_split_draws_each_class_for_itself():
    sketches, photos = image_set([10] * 8), image_set([1] * 8)
    data = join_domains(sketches, photos, np.full(80, -1), {})
    places = data.split_unsupervised(3).query.extra["row"].reshape(8, 3) % 10
    assert len({tuple(sorted(row)) for row in places.tolist()}) > 1


def test_unsupervised_split_leaves_something_to_train_on():
    with pytest.raises(
        ValueError, match=r"queries_per_class must leave class 'class 2' a sketch .* has 3, got 3"
    ):
        sketch_photo_set().split_unsupervised(3)
    with pytest.raises(ValueError, match="queries_per_class"):
        sketch_photo_set().split_unsupervised(0)


def test_zero_shot_split_is_disjoint_and_complete():
    data = sketch_photo_set()
    split = data.split_zero_shot(["class 2", "class 0"])
    assert split.train.class_names == ["class 1", "class 3"]
    assert split.query.class_names == split.gallery.class_names == ["class 2", "class 0"]
    for part, train, whole in [
        (split.query, split.train.sketches, data.sketches),
        (split.gallery, split.train.photos, data.photos),
    ]:
        assert not set(part.names) & set(train.names)
        assert set(part.names) | set(train.names) == set(whole.names)
        for name, label in zip(part.names, part.labels, strict=True):
            assert part.class_names[label] == f"class {name[0]}"
    assert split.name == "zero-shot-2-2"
    assert data.split_zero_shot(["class 1"], name="sketchy-21").name == "sketchy-21"
    for classes in ([], data.class_names):
        with pytest.raises(ValueError, match="test_classes must be some, not all, of the 4 classes"):
            data.split_zero_shot(classes)


def test_query_and_gallery_have_the_same_classes():
    data = sketch_photo_set()
    with pytest.raises(ValueError, match="query and gallery must have the same class_names"):
        RetrievalSplit(data, data.sketches, image_set([1]), "odd")


# ---- the cache on disk -------------------------------------------------------------------------------------


def test_a_saved_set_is_read_as_a_read_only_map(tmp_path):
    images = image_set([2, 3])
    images.save(tmp_path / "set")
    read = ImageSet.load(tmp_path / "set")
    assert same_images(read, images)
    assert isinstance(read.images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        read.images[0] = 1
    read[0][0][:] = 9  # an item is the caller's own
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_saved_pair_of_domains_is_read_back(tmp_path):
    data = sketch_photo_set()
    data.save(tmp_path / "set")
    read = SketchPhotoSet.load(tmp_path / "set")
    assert same_images(read.sketches, data.sketches)
    assert same_images(read.photos, data.photos)
    np.testing.assert_array_equal(read.pairs, data.pairs)
    assert (read.class_names, read.skipped, read.info) == (data.class_names, data.skipped, data.info)


def test_saving_over_a_set_replaces_it_and_spares_anything_else(tmp_path):
    image_set([5]).save(tmp_path / "set")
    before = ImageSet.load(tmp_path / "set")
    image_set([2]).save(tmp_path / "set")
    assert len(ImageSet.load(tmp_path / "set")) == 2
    assert before.images[4].max() == 4  # whoever mapped the old one keeps it
    write_tree(tmp_path / "mine", {"notes.txt": b"precious"})
    with pytest.raises(ValueError, match="path must be new or a saved image set"):
        image_set([2]).save(tmp_path / "mine")
    bad = replace(image_set([1]), extra={"x": np.array([object()])})
    with pytest.raises(TypeError, match="extra must hold no object arrays"):
        bad.save(tmp_path / "set")
    assert len(ImageSet.load(tmp_path / "set")) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "set"]


def test_an_empty_set_is_saved(tmp_path):
    image_set([2]).subset([]).save(tmp_path / "set")
    assert ImageSet.load(tmp_path / "set").images.shape == (0, 4, 4, 3)


@pytest.mark.parametrize("file", ["fields.npz", "images.npy"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "gone"])
def test_a_damaged_cache_is_refused(tmp_path, file, damage):
    image_set([200]).save(tmp_path / "set")
    path = tmp_path / "set" / file
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(broken_files(data)[damage])
    with pytest.raises(ValueError, match="is no readable cache"):
        ImageSet.load(tmp_path / "set")


def test_caches_that_are_not_there_or_of_another_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ImageSet.load(tmp_path / "set")
    image_set([2]).save(tmp_path / "set")
    with pytest.raises(ValueError, match="no readable cache: it holds no pairs"):
        SketchPhotoSet.load(tmp_path / "set")


def test_a_mapped_set_is_pickled_as_its_place(tmp_path):
    images = image_set([200], side=32)
    images.save(tmp_path / "set")
    for part in (ImageSet.load(tmp_path / "set"), ImageSet.load(tmp_path / "set").subset(np.arange(7, 90))):
        sent = pickle.dumps(part)
        assert len(sent) < 20_000 < part.images.nbytes
        assert same_images(pickle.loads(sent), part)
    assert same_images(pickle.loads(pickle.dumps(images)), images)


# ---- reading files -----------------------------------------------------------------------------------------


def test_images_are_reduced_with_antialiasing_and_transparency_is_white():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    for form, tolerance in [("PNG", 1), ("JPEG", 6)]:
        buffer = io.BytesIO()
        Image.fromarray(stripes).save(buffer, form)
        small = decode_image(buffer.getvalue(), 16)
        assert (small.shape, small.dtype) == ((16, 16, 3), np.uint8)
        assert np.abs(small[:, 2:-2].astype(int) - 127.5).max() <= tolerance
    for mode in ("RGBA", "LA"):
        buffer = io.BytesIO()
        Image.new(mode, (8, 8), 0).save(buffer, "PNG")
        assert (decode_image(buffer.getvalue(), 4) == 255).all()
    for mode in ("L", "1", "P", "CMYK"):
        buffer = io.BytesIO()
        Image.new(mode, (8, 12)).save(buffer, "JPEG" if mode == "CMYK" else "PNG")
        assert decode_image(buffer.getvalue(), 4).shape == (4, 4, 3)


@pytest.mark.parametrize("in_folder", [False, True])
def test_broken_files_are_left_out_and_counted(tmp_path, in_folder):
    good = picture(10)
    files = {f"set/cat/{i}.png": picture(i) for i in range(1, 30)}
    files |= {f"set/cat/{i}-{kind}.png": data for i, (kind, data) in enumerate(broken_files(good).items())}
    files |= {"set/dog/last.jpg": picture(200, "JPEG"), "set/dog/readme.txt": b"text"}
    with open_tree(write_tree(tmp_path, files)) as tree:
        found, passed_over = find_images(tree, "set")
        images = read_images(
            tree, found, ["cat", "dog"], 8, folder=_new(tmp_path / "out") if in_folder else None
        )
    assert passed_over == {"not an image": 1}
    assert images.skipped == {"broken image": 3}
    assert len(images) == 30
    assert isinstance(images.images, np.memmap) == in_folder
    for name, (pixels, label) in zip(images.names, images, strict=True):
        value = 200 if name == "dog/last" else int(name.split("/")[1])
        assert abs(int(pixels[4, 0, 0]) - value) <= 2, name
        assert images.class_names[label] == name.split("/")[0]


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_reading_runs_only_a_little_ahead():
    """Files are not decoded all at once before the first is stored."""
    started, lock = [], threading.Lock()

    class Slow:
        path = Path("x")

        def read(self, name: str) -> bytes:
            with lock:
                started.append(name)
            return b""

    from sketchfast.data.images import _ahead

    results = _ahead(Slow().read, [str(i) for i in range(5000)])
    next(results)
    with lock:
        assert len(started) < 1000
    assert sum(1 for _ in results) == 4999


def test_files_of_one_stem_stay_apart_and_copies_are_refused(tmp_path):
    files = {"set/cat/a.png": picture(1), "set/cat/a.jpg": picture(2, "JPEG")}
    with open_tree(write_tree(tmp_path / "one", files)) as tree:
        found, _ = find_images(tree, "set")
        assert [file.name for file in found] == ["cat/a", "cat/a.png"]
    twice = {f"{copy}/{name}": data for copy in "xy" for name, data in files.items()}
    message = r"holds cat/a.jpg twice: x/set/cat/a.jpg, y/set/cat/a.jpg"
    with open_tree(write_tree(tmp_path / "two", twice)) as tree, pytest.raises(ValueError, match=message):
        find_images(tree, "set")


def test_a_folder_is_walked_without_junk_and_without_following_links(tmp_path):
    root = write_tree(
        tmp_path / "root",
        {"a/1.png": b"", "a/.hidden": b"", ".cache/2.png": b"", "a/__MACOSX/3.png": b"", "a/.b/4.png": b""},
    )
    outside = write_tree(tmp_path / "outside", {"5.png": b"55"})
    (root / "loop").symlink_to(root)
    (root / "a" / "link.png").symlink_to(outside / "5.png")
    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    with open_tree(root) as tree:
        assert tree.names == ["a/1.png", "a/link.png"]
        assert tree.read("a/link.png") == b"55"
    assert [state[:2] for state in file_states(root)] == [("a/1.png", 0), ("a/link.png", 2)]
