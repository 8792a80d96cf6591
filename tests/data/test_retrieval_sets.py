"""The readers of sketch-photo data sets, on trees written here and on the real files."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from image_trees import SVG, broken_files, picture, write_tree, zip_tree

from sketchfast.data import images as images_module
from sketchfast.data.archive import LayoutError
from sketchfast.data.cache import image_cache_path
from sketchfast.data.images import ImageSet, SketchPhotoSet
from sketchfast.data.mini_imagenet import load_mini_imagenet
from sketchfast.data.prepare import IMAGE_READERS, load_prepared, prepare
from sketchfast.data.procedural import CLASSES, photo, procedural_sketch_photo
from sketchfast.data.qmul import load_qmul_v1, load_qmul_v2
from sketchfast.data.sketch_photo import load_sketch_photo
from sketchfast.data.sketchy import load_sketchy, load_sketchy_strokes, photo_of_sketch
from sketchfast.data.tuberlin import (
    load_tuberlin,
    load_tuberlin_extended,
    load_tuberlin_strokes,
    normal_class_name,
)

TX = "tx_000000000000"


def sketch_photo_files() -> dict[str, bytes]:
    pairs = [
        {"class": "cat", "sketch": "sketch/cat/a-1.png", "photo": "photo/cat/a.jpg"},
        {"class": "cat", "sketch": "sketch/cat/a-2.png", "photo": "photo/cat/a.jpg"},
        {"class": "cat", "sketch": "sketch/cat/lost-1.png", "photo": "photo/cat/lost.jpg"},
        {"class": "cat"},
    ]
    return {
        "sketch/cat/a-1.png": picture(1),
        "sketch/cat/a-2.png": picture(2),
        "sketch/dog/7.png": picture(3),
        "photo/cat/a.jpg": picture(50, "JPEG"),
        "photo/cat/b.jpg": picture(60, "JPEG"),
        "photo/fox/f.jpg": picture(70, "JPEG"),
        "sketchy_pairs.json": json.dumps(pairs).encode(),
    }


def sketchy_files(top: str = "256x256/") -> dict[str, bytes]:
    """Two classes; `bat` has a photo without sketches and a sketch without its photo."""
    return {
        f"{top}sketch/{TX}/ant/n01_5-1.png": picture(1),
        f"{top}sketch/{TX}/ant/n01_5-2.png": picture(2),
        f"{top}sketch/{TX}/ant/n01_50-1.png": picture(3),
        f"{top}sketch/{TX}/bat/n02_9-1.png": picture(4),
        f"{top}photo/{TX}/ant/n01_5.jpg": picture(105, "JPEG"),
        f"{top}photo/{TX}/ant/n01_50.jpg": picture(150, "JPEG"),
        f"{top}photo/{TX}/bat/n02_8.jpg": picture(108, "JPEG"),
        f"{top}sketch/tx_000100000000/ant/n01_5-1.png": picture(11),
        f"{top}photo/tx_000100000000/ant/n01_5.jpg": picture(115, "JPEG"),
    }


EXTENSION = {
    "EXTEND_image_sketchy/ant/ext_1.jpg": picture(201, "JPEG"),
    "EXTEND_image_sketchy/ant/n01_5.jpg": picture(202, "JPEG"),  # Sketchy's own photo once more
    "EXTEND_image_sketchy/bat/ext_1.jpg": picture(203, "JPEG"),
}


def tuberlin_files(form: str = "png", top: str | None = None) -> dict[str, bytes]:
    data = {n: picture(n, size=(64, 64)) if form == "png" else SVG.encode() for n in (1, 2, 81)}
    top = f"{form}/" if top is None else top
    return {
        f"{top}airplane/1.{form}": data[1],
        f"{top}airplane/2.{form}": data[2],
        f"{top}mouse (animal)/81.{form}": data[81],
        f"{top}filelist.txt": b"airplane/1",
    }


TUBERLIN_PHOTOS = {
    "ImageResized/Airplane/x y.jpg": picture(120, "JPEG", (40, 30)),
    "ImageResized/mouse_(animal)/n1.JPEG": picture(130, "JPEG"),
    "ImageResized/mouse_(animal)/n1.png": picture(140),
}


def left(images: ImageSet) -> dict[str, int]:
    """Brightness of each image's left half, by name."""
    return {name: int(pixels[4, 1, 0]) for name, pixels in zip(images.names, images.images, strict=True)}


def roots(tmp_path: Path, files: dict[str, bytes], above: str) -> list[Path]:
    """The data set as a folder, from the folder above, as a zip, and as a zip of a folder `above`."""
    folder = write_tree(tmp_path / "tree" / above, files)
    deep = {f"{above}/{name}": data for name, data in files.items()}
    return [folder, folder.parent, zip_tree(tmp_path / "a.zip", files), zip_tree(tmp_path / "b.zip", deep)]


# ---- sketch_photo ------------------------------------------------------------------------------------------


def test_sketch_photo_from_folders_and_zips(tmp_path):
    for root in roots(tmp_path, sketch_photo_files(), "set"):
        data = load_sketch_photo(root, size=8)
        assert data.class_names == ["cat", "dog", "fox"]
        assert left(data.sketches) == {"cat/a-1": 1, "cat/a-2": 2, "dog/7": 3}
        assert data.photos.names == ["cat/a", "cat/b", "fox/f"]
        assert data.pairs.tolist() == [0, 0, -1]
        assert data.skipped == {"pair without its files": 2}
        assert data.info["classes without sketches"] == ["fox"]
        assert data.info["classes without photos"] == ["dog"]
        assert data.sketches.images.shape == (3, 8, 8, 3)


@pytest.mark.parametrize("listed", [b"{broken", b'{"not": "a list"}', b"\xff\xfe"])
def test_a_broken_list_of_pairs_is_counted(tmp_path, listed):
    data = load_sketch_photo(
        write_tree(tmp_path, sketch_photo_files() | {"sketchy_pairs.json": listed}), size=8
    )
    assert data.pairs.tolist() == [-1, -1, -1]
    assert data.skipped == {"broken list of pairs": 1}


def test_a_pair_of_two_classes_is_counted(tmp_path):
    files = {
        "sketch/dog/a-1.png": picture(10),
        "photo/dog/a.jpg": picture(20, "JPEG"),
        "photo/cat/a.jpg": picture(30, "JPEG"),
        "sketchy_pairs.json": b'[{"sketch": "sketch/dog/a-1.png", "photo": "photo/cat/a.jpg"}]',
    }
    data = load_sketch_photo(write_tree(tmp_path, files), size=8)
    assert data.pairs.tolist() == [-1]
    assert data.skipped == {"pair of two classes": 1}


def test_broken_files_of_either_domain_are_counted(tmp_path):
    broken = broken_files(picture(9))
    files = sketch_photo_files()
    files |= {f"sketch/cat/{kind}.png": data for kind, data in broken.items()}
    files |= {f"photo/cat/{kind}.jpg": data for kind, data in broken.items()}
    files |= {"photo/cat/notes.txt": b"x"}
    for root in (write_tree(tmp_path / "set", files), zip_tree(tmp_path / "set.zip", files)):
        data = load_sketch_photo(root, size=8)
        assert (len(data.sketches), len(data.photos)) == (3, 3)
        assert data.pairs.tolist() == [0, 0, -1]
        assert data.skipped == {
            "sketches: broken image": 3,
            "photos: broken image": 3,
            "photos: not an image": 1,
            "pair without its files": 2,
        }


def test_a_zip_with_a_damaged_member_loses_that_file_only(tmp_path):
    files = sketch_photo_files()
    path = zip_tree(tmp_path / "set.zip", files)
    data = bytearray(path.read_bytes())
    at = data.index(b"sketch/cat/a-2.png") + len(b"sketch/cat/a-2.png") + 20
    data[at : at + 20] = b"\0" * 20
    path.write_bytes(bytes(data))
    loaded = load_sketch_photo(path, size=8)
    assert loaded.sketches.names == ["cat/a-1", "dog/7"]
    assert loaded.skipped["sketches: broken image"] == 1


def test_the_real_sketch_photo(real_data):
    path = real_data / "sketch_photo" / "sketch_photo_160.zip"
    if not path.is_file():
        pytest.skip(f"no {path}")
    data = load_sketch_photo(path, size=16)
    assert data.class_names == ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
    assert (len(data.sketches), len(data.photos)) == (3929, 1670)
    paired = data.pairs[data.pairs >= 0]
    assert (len(paired), len(np.unique(paired))) == (2864, 434)
    assert data.skipped == {}
    for sketch, pair in zip(data.sketches.names, data.pairs, strict=True):
        assert pair < 0 or photo_of_sketch(sketch) == data.photos.names[pair]
    assert data.sketches.images.mean() > 200  # dark on white
    split = data.split_unsupervised(10)
    assert (len(split.train.sketches), len(split.query), len(split.gallery)) == (3859, 70, 1670)


# ---- Sketchy -----------------------------------------------------------------------------------------------


def test_sketchy_from_folders_and_zips(tmp_path):
    expected = {"ant/n01_5-1": 1, "ant/n01_5-2": 2, "ant/n01_50-1": 3, "bat/n02_9-1": 4}
    places = roots(tmp_path, sketchy_files(), "rendered_256x256")
    for root in [*places, places[0] / "256x256", zip_tree(tmp_path / "256x256.zip", sketchy_files(""))]:
        data = load_sketchy(root, size=8)
        assert data.class_names == ["ant", "bat"]
        assert left(data.sketches) == expected
        assert data.photos.names == ["ant/n01_5", "ant/n01_50", "bat/n02_8"]
        assert data.pairs.tolist() == [0, 0, 1, -1]
        assert data.skipped == {}


def test_sketchy_in_another_rendering(tmp_path):
    root = write_tree(tmp_path, sketchy_files())
    data = load_sketchy(root, size=8, transform="tx_000100000000")
    assert left(data.sketches) == {"ant/n01_5-1": 11}
    assert data.pairs.tolist() == [0]
    with pytest.raises(LayoutError, match="tx_000000000110/<class>"):
        load_sketchy(root, transform="tx_000000000110")
    with pytest.raises(ValueError, match=r"transform must be the name of a folder tx_..., got 'centred'"):
        load_sketchy(root, transform="centred")


def test_sketchy_extended_takes_every_photo_once(tmp_path):
    inside = {f"256x256/{name}": data for name, data in EXTENSION.items()}
    for root in [
        *roots(tmp_path, sketchy_files() | EXTENSION, "Sketchy"),
        write_tree(tmp_path / "in", sketchy_files() | inside) / "256x256",
    ]:
        data = load_sketchy(root, size=8, extended=True)
        assert data.photos.names == ["ant/ext_1", "ant/n01_5", "ant/n01_50", "bat/ext_1", "bat/n02_8"]
        np.testing.assert_allclose(list(left(data.photos).values()), [201, 105, 150, 203, 108], atol=2)
        assert [data.photos.names[p] if p >= 0 else None for p in data.pairs] == [
            "ant/n01_5", "ant/n01_5", "ant/n01_50", None,
        ]  # fmt: skip
        assert len(load_sketchy(root, size=8).photos) == 3


def test_sketchy_strokes(tmp_path):
    files = {
        "sketches/ant/n01_5-1.svg": SVG.encode(),
        "sketches/ant/n01_5-2.svg": SVG.removesuffix("</svg>").encode(),
        "sketches/ant/n01_5-3.svg": b"nothing",
        "sketches/ant/invalid.txt": b"n01_5-2\n",
        "sketches/bat/n02_9-1.svg": SVG.encode(),
    }
    for root in [*roots(tmp_path, files, "sketches-06-04"), tmp_path / "tree/sketches-06-04/sketches"]:
        data = load_sketchy_strokes(root)
        assert data.class_names == ["ant", "bat"]
        assert data.extra["key"].tolist() == ["ant/n01_5-1", "ant/n01_5-2", "bat/n02_9-1"]
        assert data.extra["valid"].tolist() == [True, False, True]
        assert data.skipped == {"broken svg": 1}
        np.testing.assert_array_equal(data[1][0].points, [[100, 100], [500, 100]])
        valid = load_sketchy_strokes(root, valid_only=True)
        assert valid.labels.tolist() == [0, 1]
        assert valid.skipped == {"broken svg": 1, "marked invalid": 1}


def test_a_damaged_list_of_invalid_strokes_is_counted(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sketches/ape/n1_1-1.svg", SVG)
        archive.writestr("sketches/ape/invalid.txt", "n1_1-1 to be damaged")
    path.write_bytes(path.read_bytes().replace(b"to be damaged", b"was damaged..", 1))
    data = load_sketchy_strokes(path)
    assert len(data) == 1
    assert data.skipped == {"broken invalid.txt": 1}


# ---- TU-Berlin ---------------------------------------------------------------------------------------------


def test_class_names_are_joined_by_one_rule():
    spelled = ["mouse (animal)", "mouse_(animal)", "Mouse-Animal", " mouse animal "]
    assert {normal_class_name(name) for name in spelled} == {"mouse_animal"}
    assert normal_class_name("t-shirt") == "t_shirt"


def test_tuberlin_from_folders_and_zips(tmp_path):
    places = roots(tmp_path, tuberlin_files(), "sketches")
    for root in [*places, places[0] / "png"]:
        images = load_tuberlin(root, size=8)
        assert images.class_names == ["airplane", "mouse_animal"]
        assert left(images) == {"airplane/1": 1, "airplane/2": 2, "mouse_animal/81": 81}
        assert images.info["form"] == "png"
        assert images.skipped == {}


@pytest.mark.parametrize("twin", ["copy/png/airplane/1.png", "png/Airplane/1.png"])
def test_tuberlin_files_of_one_name_are_refused_before_any_is_decoded(tmp_path, twin):
    root = write_tree(tmp_path, tuberlin_files() | {twin: b"never decoded"})
    with pytest.raises(ValueError, match=r"root must hold airplane/1 once, got .*1\.png and .*1\.png"):
        load_tuberlin(root, size=8)


def test_tuberlin_drawn_from_svg(tmp_path):
    files = tuberlin_files("svg") | {"svg/airplane/3.svg": b"no svg", "svg/airplane/4.svg": b"<svg/>"}
    places = roots(tmp_path, files, "sketches")
    for root in [*places, places[0] / "svg"]:
        images = load_tuberlin(root, size=40)
        assert images.info["form"] == "svg"
        assert images.skipped == {"broken image": 2}
        assert images.names == ["airplane/1", "airplane/2", "mouse_animal/81"]
        dark = images.images[0, :, :, 0] < 128  # the path runs from (100, 100) to (500, 100) of 800
        assert set(np.flatnonzero(dark.any(axis=1))) <= {4, 5}
        assert dark[:, 5:25].any(axis=0).all()
        assert not dark[:, 27:].any()
        assert (images.images[0, 20:] == 255).all()


def test_tuberlin_prefers_png_and_takes_what_is_asked_for(tmp_path):
    root = write_tree(tmp_path, tuberlin_files() | tuberlin_files("svg"))
    assert load_tuberlin(root, size=8).info["form"] == "png"
    assert load_tuberlin(root, size=8, form="svg").info["form"] == "svg"
    with pytest.raises(ValueError, match="form must be one of png, svg or None, got 'gif'"):
        load_tuberlin(root, form="gif")


def test_tuberlin_strokes(tmp_path):
    root = write_tree(tmp_path, tuberlin_files("svg") | {"svg/airplane/3.svg": b"no svg"})
    data = load_tuberlin_strokes(root)
    assert data.class_names == ["airplane", "mouse_animal"]
    assert data.extra["key"].tolist() == ["airplane/1", "airplane/2", "mouse_animal/81"]
    assert data.skipped == {"broken svg": 1}
    np.testing.assert_array_equal(data[2][0].points, [[100, 100], [500, 100]])


def test_tuberlin_extended_joins_the_spellings(tmp_path):
    for root in roots(tmp_path, tuberlin_files() | TUBERLIN_PHOTOS, "TUBerlin"):
        data = load_tuberlin_extended(root, size=8)
        assert data.class_names == ["airplane", "mouse_animal"]
        assert data.photos.labels.tolist() == [0, 1, 1]
        assert data.photos.names == ["airplane/x y", "mouse_animal/n1", "mouse_animal/n1.png"]
        assert data.pairs.tolist() == [-1, -1, -1]
        assert data.info["classes without photos"] == []


def test_the_real_tuberlin_drawings(real_data):
    path = real_data / "tuberlin" / "svg_15.zip"
    if not path.is_file():
        pytest.skip(f"no {path}")
    strokes = load_tuberlin_strokes(path)
    assert strokes.class_names == ["airplane", "alarm_clock", "angel"]
    assert len(strokes) == 15
    assert strokes.points.min() > 0
    assert strokes.points.max() < 800
    images = load_tuberlin(path, size=32)
    assert images.skipped == {}
    share = (images.images[..., 0] < 200).mean(axis=(1, 2))
    assert (share > 0.02).all()
    assert (share < 0.5).all()


# ---- wrong layouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "tree"),
    [
        (load_sketch_photo, "<root>/sketch/<class>/<name>.png"),
        (load_sketchy, f"<root>/256x256/sketch/{TX}/<class>/n02691156_58-1.png"),
        (lambda root: load_sketchy(root, extended=True), "<root>/EXTEND_image_sketchy/<class>/ext_1.jpg"),
        (load_sketchy_strokes, "<root>/sketches-06-04/sketches/<class>/n02691156_58-1.svg"),
        (load_tuberlin, "<root>/png/<class>/<id>.png"),
        (load_tuberlin_strokes, "<root>/svg/<class>/<id>.svg"),
        (load_tuberlin_extended, "<root>/ImageResized/<class>/<any name>.jpg"),
    ],
)
def test_a_wrong_layout_is_refused_with_the_expected_tree(tmp_path, load, tree):
    root = write_tree(tmp_path / "other", {"cat/1.png": picture(1), "256x256/x.txt": b""})
    for wrong in (root, zip_tree(tmp_path / "other.zip", {"cat/1.png": picture(1)})):
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


def test_one_domain_alone_is_a_wrong_layout(tmp_path):
    only = {n: d for n, d in sketchy_files().items() if "/sketch/" in n}
    with pytest.raises(LayoutError, match=f"photo/{TX}"):
        load_sketchy(write_tree(tmp_path, only))


@pytest.mark.parametrize("size", [0, -3, 2.5, "8"])
def test_a_wrong_size_is_refused(tmp_path, size):
    root = write_tree(tmp_path, sketch_photo_files())
    with pytest.raises((TypeError, ValueError), match="size"):
        load_sketch_photo(root, size=size)


# ---- prepared caches ---------------------------------------------------------------------------------------

LOADERS = {
    "mini_imagenet": lambda root, **k: load_mini_imagenet(root, split=None, **k),
    "qmul_v1": load_qmul_v1,
    "qmul_v2": load_qmul_v2,
    "sketch_photo": load_sketch_photo,
    "sketchy": load_sketchy,
    "sketchy_extended": lambda root, **k: load_sketchy(root, extended=True, **k),
    "tuberlin": load_tuberlin,
    "tuberlin_extended": load_tuberlin_extended,
}


def everything() -> dict[str, bytes]:
    qmul = {
        "ShoeV1/photo/1.jpg": picture(1, "JPEG"),
        "ShoeV1/sketch/1.png": picture(2),
        "ChairV2/trainB/c.png": picture(3),
        "ChairV2/trainA/c_1.png": picture(4),
    }
    mini = {"train/n01/1.jpg": picture(5, "JPEG"), "test/n02/2.jpg": picture(6, "JPEG")}
    sketchy = sketchy_files() | EXTENSION
    return mini | sketch_photo_files() | sketchy | tuberlin_files() | TUBERLIN_PHOTOS | qmul


def arrays(data: ImageSet | SketchPhotoSet) -> list[np.ndarray]:
    if isinstance(data, ImageSet):
        return [data.images, data.labels, np.array(data.names)]
    return [*arrays(data.sketches), *arrays(data.photos), data.pairs]


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_prepared_set_is_mapped_until_its_files_change(tmp_path, monkeypatch, name, zipped):
    files = everything() | {"photo/cat/z.jpg": b"broken", "ImageResized/airplane/z.jpg": b""}
    root = zip_tree(tmp_path / "set.zip", files) if zipped else write_tree(tmp_path / "set", files)
    assert set(LOADERS) == set(IMAGE_READERS)
    load = LOADERS[name]
    plain = load(root, size=8)
    path, prepared = prepare(name, root, size=8)
    assert path == image_cache_path(name, root, 8)
    with monkeypatch.context() as patch:
        patch.setattr(images_module, "read_images", None)  # no file is looked at
        cached = load(root, size=8)
    for one in (prepared, cached):
        for a, b in zip(arrays(one), arrays(plain), strict=True):
            np.testing.assert_array_equal(a, b)
        assert (one.class_names, one.skipped) == (plain.class_names, plain.skipped)
        mapped = one if isinstance(one, ImageSet) else one.photos
        assert isinstance(mapped.images, np.memmap)
        assert not mapped.images.flags.writeable
    uncached = load(root, size=8, cache=False)
    photos = uncached if isinstance(uncached, ImageSet) else uncached.photos
    assert not isinstance(photos.images, np.memmap)
    assert not isinstance(arrays(load(root, size=9))[0], np.memmap)

    if zipped:
        zip_tree(root, everything() | {"x.txt": b"new"})
    else:
        write_tree(root, {"x.txt": b"new"})
    with pytest.warns(
        RuntimeWarning, match=rf"its files changed; `sketchfast data prepare {name} .* --size 8`"
    ):
        load(root, size=8)
    prepare(name, root, size=8)
    assert isinstance(arrays(load(root, size=8))[0], np.memmap)
    (path / "fields.npz").write_bytes(b"damaged")
    with pytest.warns(RuntimeWarning, match="cache passed over: .* is no readable cache"):
        load(root, size=8)


def test_a_cache_of_another_rendering_is_passed_over(tmp_path):
    root = write_tree(tmp_path, sketchy_files() | tuberlin_files() | tuberlin_files("svg"))
    prepare("sketchy", root, size=8)
    assert left(load_sketchy(root, size=8, transform="tx_000100000000").sketches) == {"ant/n01_5-1": 11}
    prepare("tuberlin", root, size=8)
    assert load_tuberlin(root, size=8, form="svg").info["form"] == "svg"
    assert isinstance(load_tuberlin(root, size=8, form="png").images, np.memmap)


def test_a_failed_preparation_leaves_nothing_behind(tmp_path):
    root = write_tree(tmp_path / "set", {"cat/1.png": picture(1)})
    before = sorted(tmp_path.rglob("*"))
    for name in IMAGE_READERS:
        with pytest.raises(LayoutError):
            prepare(name, root, size=8)
    assert sorted(tmp_path.rglob("*")) == before


def test_image_caches_and_stroke_caches_do_not_disturb_each_other(tmp_path):
    root = write_tree(tmp_path, tuberlin_files("svg"))
    prepare("tuberlin_strokes", root)
    prepare("tuberlin", root, size=8)
    assert len(load_prepared("tuberlin_strokes", root)) == 3
    assert isinstance(load_tuberlin(root, size=8).images, np.memmap)
    with pytest.raises(ValueError, match="size must be None for strokes such as tuberlin_strokes"):
        prepare("tuberlin_strokes", root, size=8)


# ---- procedural --------------------------------------------------------------------------------------------


def test_procedural_pairs_are_seeded_and_of_the_same_instance():
    data = procedural_sketch_photo(3, 16, seed=5, classes=["house", "cat"], sketches_per_instance=2, styles=4)
    assert data.class_names == ["house", "cat"]
    assert (len(data.sketches), len(data.photos)) == (12, 6)
    assert data.pairs.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert data.photos.names[:2] == ["house/0", "house/1"]
    assert data.sketches.names[:3] == ["house/0-1", "house/0-2", "house/1-1"]
    assert [photo_of_sketch(n) for n in data.sketches.names] == [data.photos.names[p] for p in data.pairs]
    np.testing.assert_array_equal(data.sketches.extra["instance"], data.photos.extra["instance"][data.pairs])
    assert data.sketches.extra["style"].tolist() == [1, 2, 3, 4, 1, 2] * 2
    np.testing.assert_array_equal(data.photos.images[4], photo("cat", 1, 16, 5).transpose(1, 2, 0))
    again = procedural_sketch_photo([2], 16, seed=5, classes=["cat"], sketches_per_instance=2, styles=4)
    np.testing.assert_array_equal(again.sketches.images, data.sketches.images[10:])
    np.testing.assert_array_equal(again.photos.images, data.photos.images[5:])
    other = procedural_sketch_photo(
        3, 16, seed=6, classes=["house", "cat"], sketches_per_instance=2, styles=4
    )
    assert (other.sketches.images != data.sketches.images).any()
    dark = (data.sketches.images < 128).mean(axis=(1, 2, 3))
    assert ((dark > 0.02) & (dark < 0.6)).all()


def test_procedural_pairs_refuse_what_cannot_be():
    for keywords in [
        {"sketches_per_instance": 5, "styles": 4},
        {"styles": 0},
        {"classes": ["hut"]},
        {"size": 4},
    ]:
        with pytest.raises(ValueError, match=next(iter(keywords))):
            procedural_sketch_photo(1, **{"classes": CLASSES[:1], "size": 8, **keywords})


def test_a_folder_that_holds_one_zip_stands_for_it(tmp_path):
    from zipfile import ZipFile

    from PIL import Image

    for domain in ("sketch", "photo"):
        folder = tmp_path / "files" / domain / "dog"
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), (250, 10, 10)).save(folder / "a.png")
    archive = tmp_path / "archive" / "images.zip"
    archive.parent.mkdir()
    with ZipFile(archive, "w") as file:
        for path in sorted((tmp_path / "files").rglob("*.png")):
            file.write(path, path.relative_to(tmp_path / "files"))
    for root in (archive, archive.parent):
        found = load_sketch_photo(root, size=8)
        assert (len(found.sketches), len(found.photos)) == (1, 1)
    (archive.parent / "other.txt").write_text("no longer alone")
    with pytest.raises(ValueError, match="Expected"):
        load_sketch_photo(archive.parent, size=8)
