"""mini-ImageNet in its three layouts, on trees written here: no copy of it is at hand."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from image_trees import broken_files, picture, write_tree, zip_tree

from sketchfast.data.archive import LayoutError
from sketchfast.data.mini_imagenet import TEST_CLASSES, load_mini_imagenet, read_mini_imagenet
from sketchfast.data.prepare import prepare

#: split -> class -> the dark value of each of its photos
PHOTOS = {
    "train": {"n02": [10, 20], "n01": [30]},
    "val": {"n05": [40]},
    "test": {"n09": [50, 60], "n03": [70]},
}


def lists() -> dict[str, bytes]:
    files = {}
    for split, classes in PHOTOS.items():
        lines = ["filename,label"]
        for name, values in classes.items():
            for value in values:
                files[f"images/{name}{value:08}.jpg"] = picture(value, "JPEG", (84, 84))
                lines.append(f"{name}{value:08}.jpg,{name}")
        files[f"{split}.csv"] = "\n".join(lines).encode()
    return files


def folders(top: str = "") -> dict[str, bytes]:
    return {
        f"{top}{split}/{name}/{name}_{value}.JPEG": picture(value, "JPEG", (84, 84))
        for split, classes in PHOTOS.items()
        for name, values in classes.items()
        for value in values
    }


def pickled(split: str, protocol: int = 4, **other) -> bytes:
    images, rows = [], {}
    for name, values in PHOTOS[split].items():
        rows[name] = list(range(len(images), len(images) + len(values)))
        for value in values:
            image = np.full((84, 84, 3), 255, np.uint8)
            image[:, :42] = value
            images.append(image)
    content = {"image_data": np.stack(images), "class_dict": rows, **other}
    return pickle.dumps(content, protocol)


def pickles(protocol: int = 4) -> dict[str, bytes]:
    return {f"mini-imagenet-cache-{split}.pkl": pickled(split, protocol) for split in PHOTOS}


LAYOUTS = {
    "lists": lists(),
    "lists by class": {
        n.replace("images/n0", f"top/images/{n[7:10]}/n0") if n.startswith("images") else f"top/{n}": d
        for n, d in lists().items()
    },
    "folders": folders(),
    "folders below": folders("mini-imagenet/"),
    "pickles": pickles(),
    "pickles of protocol 2": pickles(2),
}


def content(images) -> dict[str, list[int]]:
    """class -> the dark value of its images."""
    found: dict[str, list[int]] = {}
    for i in range(len(images)):
        dark = int(np.median(images.images[i][:, : images.images.shape[2] // 4]))
        found.setdefault(images.class_names[images.labels[i]], []).append(round(dark, -1))
    return {name: sorted(values) for name, values in found.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_layout_gives_the_same_photos(tmp_path, layout, zipped) -> None:
    files = LAYOUTS[layout]
    root = zip_tree(tmp_path / "mini.zip", files) if zipped else write_tree(tmp_path / "mini", files)
    for split, classes in PHOTOS.items():
        images = load_mini_imagenet(root, split=split)
        assert images.images.shape == (sum(map(len, classes.values())), 84, 84, 3)
        assert images.images.dtype == np.uint8
        assert images.class_names == sorted(classes)
        assert content(images) == classes
        assert images.extra["split"].tolist() == [split] * len(images)
        assert images.info["layout"] == layout.split()[0]
        assert images.skipped == {}
    whole = load_mini_imagenet(root, split=None, size=20)
    assert whole.images.shape == (7, 20, 20, 3)
    assert whole.class_names == ["n01", "n02", "n05", "n03", "n09"]
    assert content(whole) == {name: v for classes in PHOTOS.values() for name, v in classes.items()}
    assert whole.extra["split"].tolist() == ["train"] * 3 + ["val"] + ["test"] * 3


@pytest.mark.parametrize("layout", ["lists", "folders", "pickles"])
def test_a_prepared_copy_is_used(tmp_path, layout) -> None:
    root = write_tree(tmp_path, LAYOUTS[layout])
    plain = load_mini_imagenet(root)
    path, prepared = prepare("mini_imagenet", root)
    assert path.name == ".sketchfast-mini_imagenet-84"
    assert len(prepared) == 7
    cached = load_mini_imagenet(root)
    assert isinstance(cached.images, np.memmap)
    assert not cached.images.flags.writeable
    np.testing.assert_array_equal(cached.images, plain.images)
    np.testing.assert_array_equal(cached.labels, plain.labels)
    assert (cached.names, cached.class_names) == (plain.names, plain.class_names)
    assert not isinstance(load_mini_imagenet(root, cache=False).images, np.memmap)
    assert prepare("mini_imagenet", root, size=12)[1].images.shape == (7, 12, 12, 3)


def test_one_part_is_enough_and_another_is_missed(tmp_path) -> None:
    parts = {name: data for files in (pickles(), folders()) for name, data in files.items() if "test" in name}
    for number, suffix in enumerate((".pkl", ".JPEG")):
        files = {name: data for name, data in parts.items() if name.endswith(suffix)}
        root = write_tree(tmp_path / str(number), files)
        assert content(load_mini_imagenet(root)) == PHOTOS["test"]
        with pytest.raises(LayoutError, match=r"mini-imagenet-cache-\{train,val,test\}.pkl"):
            load_mini_imagenet(root, split="val")


def test_broken_files_are_left_out_and_counted(tmp_path) -> None:
    broken = {
        f"test/n03/{name}.jpg": data for name, data in broken_files(picture(9, "JPEG", (84, 84))).items()
    }
    root = write_tree(tmp_path / "folders", folders() | broken | {"test/n03/list.txt": b""})
    images = load_mini_imagenet(root)
    assert content(images) == PHOTOS["test"]
    assert images.skipped == {"broken image": 3, "not an image": 1}

    files = lists()
    files["test.csv"] += b"\nlost.jpg,n09\nalone\n\nn0900000050.jpg,"
    files["images/n0900000060.jpg"] = b"broken"
    files["val.csv"] = b"\xff\xfe\x00"
    files["images/readme.txt"] = b""
    images = load_mini_imagenet(write_tree(tmp_path / "lists", files))
    assert content(images) == {"n09": [50], "n03": [70]}
    assert images.skipped == {
        "broken image": 1,
        "not an image": 1,
        "image named by a list, not there": 1,
        "broken line of a list": 2,
    }
    assert read_mini_imagenet(tmp_path / "lists").skipped["broken list"] == 1


@pytest.mark.parametrize(
    "data",
    [
        b"no pickle",
        pickled("test")[:-100],
        pickle.dumps({"image_data": np.zeros((2, 84, 84), np.uint8), "class_dict": {}}),
        pickle.dumps({"image_data": np.zeros((2, 84, 84, 3), np.float32), "class_dict": {}}),
        pickled("test", class_dict={"n09": [0, 3]}),
        pickled("test", class_dict={"n09": [0, 1], "n03": [1]}),
        pickled("test", class_dict={"n09": "rows"}),
        pickled("test", class_dict=[0, 1]),
        pickle.dumps({"image_data": Path("x"), "class_dict": {}}),
    ],
    ids=["text", "cut", "grey", "float", "outside", "twice", "words", "list", "code"],
)
def test_a_broken_pickle_is_counted(tmp_path, data) -> None:
    root = write_tree(tmp_path, pickles() | {"mini-imagenet-cache-test.pkl": data})
    whole = load_mini_imagenet(root, split=None)
    assert (len(whole), whole.skipped) == (4, {"broken pickle": 1})
    with pytest.raises(LayoutError, match="no images of test"):
        load_mini_imagenet(root)


def test_images_without_a_class_are_counted(tmp_path) -> None:
    root = write_tree(tmp_path, {"mini-imagenet-cache-test.pkl": pickled("test", class_dict={"n09": [0]})})
    images = load_mini_imagenet(root)
    assert (content(images), images.skipped) == ({"n09": [50]}, {"image without a class": 2})


def test_wrong_arguments_and_trees_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_mini_imagenet(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="split must be one of train, val, test or None, got 'all'"):
        load_mini_imagenet(tmp_path, split="all")
    write_tree(tmp_path, {"photos/a.jpg": picture(1, "JPEG")})
    with pytest.raises(LayoutError, match="csv of lines filename,label"):
        load_mini_imagenet(tmp_path)
    write_tree(tmp_path, {f"{split}/n01/{split}.jpg": picture(1, "JPEG") for split in ("train", "test")})
    with pytest.raises(ValueError, match="class n01 must be in one split, got it in train and test"):
        load_mini_imagenet(tmp_path, split=None)
    twice = {"images/a/x.jpg": b"", "images/b/x.jpg": b"", "test.csv": b""}
    with pytest.raises(ValueError, match=r"holds x\.jpg twice"):
        load_mini_imagenet(write_tree(tmp_path / "twice", twice))


def test_the_test_classes() -> None:
    assert len(set(TEST_CLASSES)) == 20
