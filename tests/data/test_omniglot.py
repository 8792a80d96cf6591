"""Omniglot's readers on a small tree written here, and on the real archives."""

from __future__ import annotations

import io
import zipfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sketchfast.data import omniglot as O
from sketchfast.data.archive import LayoutError
from sketchfast.data.render import rasterize_sketches

STROKES = "START\n10.0,-20.0,0\n30.5,-20.0,16\nBREAK\n30.0,-40.0,100\n30.0,-60.0,116\nBREAK\n"


def png(column: int) -> bytes:
    """A 1-bit image with ink (0) in one column."""
    pixels = np.full((105, 105), True)
    pixels[:, column : column + 3] = False
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two background characters and one evaluation character, two drawers each; strokes of the first."""
    files: dict[str, bytes] = {}
    for set_name, characters in {
        "images_background": ["Greek/character01", "Greek/character02"],
        "images_evaluation": ["Atlantean/character01"],
    }.items():
        for number, character in enumerate(characters):
            for drawer in (1, 2):
                files[f"{set_name}/{character}/{number + 394:04}_{drawer:02}.png"] = png(20 * drawer + number)
    for drawer in (1, 2):
        name = f"Greek/character01/0394_{drawer:02}.txt"
        files[f"strokes_background_small1/{name}"] = STROKES.encode()
        files[f"strokes_background_small2/{name}"] = STROKES.encode()  # some alphabets are in both
    files["images_background/Greek/.DS_Store"] = b"junk"
    files["strokes_background_small1/.DS_Store"] = b"junk"
    for name, data in files.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    return tmp_path / "set"


def zipped(folder: Path, target: Path) -> Path:
    target.mkdir()
    for top in folder.iterdir():
        with zipfile.ZipFile(target / f"{top.name}.zip", "w") as archive:
            for file in top.rglob("*"):
                archive.write(file, file.relative_to(folder))
            archive.writestr(f"__MACOSX/{top.name}/Greek/character01/._0394_01.png", b"junk")
    return target


def test_folder_zip_and_set_itself_load_alike(folder, tmp_path):
    zips = zipped(folder, tmp_path / "zips")
    roots = [folder, zips, folder / "images_background", zips / "images_background.zip"]
    loaded = [O.load_omniglot(root, split="background", size=None) for root in roots]
    for images in loaded:
        assert images.class_names == ["Greek/character01", "Greek/character02"]
        assert images.images.shape == (4, 105, 105)
        assert images.images.dtype == np.uint8
        np.testing.assert_array_equal(images.labels, [0, 0, 1, 1])
        np.testing.assert_array_equal(images.extra["drawer"], [1, 2, 1, 2])
        np.testing.assert_array_equal(np.flatnonzero(images.images[0].any(axis=0)), [20, 21, 22])
        assert set(np.unique(images.images)) == {0, 255}
        assert images.skipped == {}


def test_size_is_antialiased(folder):
    images = O.load_omniglot(folder, split="evaluation", size=28)
    assert images.images.shape == (2, 28, 28)
    assert len(np.unique(images.images)) > 2
    assert images.images.mean() == pytest.approx(255 * 3 / 105, rel=0.1)  # ink is kept in the mean


def test_rotations_are_classes(folder):
    plain = O.load_omniglot(folder, split="background", size=None)
    turned = O.load_omniglot(folder, split="background", size=None, rotations=True)
    assert turned.class_names[:5] == [
        *(f"Greek/character01/rot{r}" for r in ("000", "090", "180", "270")),
        "Greek/character02/rot000",
    ]
    assert len(turned) == 4 * len(plain)
    for i in range(len(turned)):
        character, quarter = divmod(int(turned.labels[i]), 4)
        source = np.flatnonzero(
            (plain.labels == character) & (plain.extra["drawer"] == turned.extra["drawer"][i])
        )[0]
        np.testing.assert_array_equal(turned.images[i], np.rot90(plain.images[source], quarter))


def test_list_file_gives_the_split(folder, tmp_path):
    listing = tmp_path / "test.txt"
    listing.write_text("Atlantean/character01/rot090\nGreek/character02/rot000\nGreek/character02/rot270\n\n")
    images = O.load_omniglot(folder, split=listing, size=None)
    assert images.class_names == [
        "Atlantean/character01/rot090",
        "Greek/character02/rot000",
        "Greek/character02/rot270",
    ]
    np.testing.assert_array_equal(images.labels, [0, 0, 1, 1, 2, 2])
    assert images.images[0].any(axis=1).sum() == 3  # the column lies down
    listing.write_text("Greek/character02\nAtlantean/character01\n")
    assert O.load_omniglot(folder, split=str(listing)).class_names == [
        "Greek/character02",
        "Atlantean/character01",
    ]


def test_strokes_and_pairs(folder):
    strokes = O.load_omniglot_strokes(folder)
    assert len(strokes) == 2
    np.testing.assert_array_equal(strokes[0][0].points, [[10, 20], [30.5, 20], [30, 40], [30, 60]])
    np.testing.assert_array_equal(strokes[0][0].pen_down, [True, False, True, False])
    pairs = O.load_omniglot_pairs(folder, size=None)
    np.testing.assert_array_equal(
        pairs.strokes.extra["key"], ["Greek/character01/0394_01", "Greek/character01/0394_02"]
    )
    np.testing.assert_array_equal(pairs.images.images[:, 50, :].argmax(axis=1), [20, 40])


def test_broken_files_are_counted(folder):
    (folder / "images_background/Greek/character01/0394_01.png").write_bytes(b"no image")
    (folder / "images_background/Greek/character02/0395_01.png").write_bytes(png(4)[:60])
    (folder / "strokes_background_small1/Greek/character01/0394_02.txt").write_text("no strokes")
    (folder / "strokes_background_small2/Greek/character01/0394_02.txt").write_text("START\n1,2\n")
    images = O.load_omniglot(folder, split="background")
    assert images.skipped == {"broken image": 2}
    np.testing.assert_array_equal(images.labels, [0, 1])
    strokes = O.load_omniglot_strokes(folder)
    assert strokes.skipped == {"broken stroke file": 1}
    (folder / "images_background/Greek/character01/0394_02.png").unlink()
    pairs = O.load_omniglot_pairs(folder)
    assert len(pairs.strokes) == len(pairs.images) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": "train"}, ValueError, "split must be one of background"),
        ({"split": 3}, TypeError, "split must be a str or Path, got the int 3"),
        ({"size": 0}, ValueError, "size must be at least 1"),
        ({"size": True}, TypeError, "size must be an integer, got True"),
        ({"size": "28"}, TypeError, "size must be an integer, got '28'"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"root": "nowhere"}, FileNotFoundError, "nowhere does not exist"),
        ({"root": "empty"}, LayoutError, r"Expected:\n  <root>/images_background\.zip"),
    ],
)
def test_bad_calls(folder, tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "set" / "images_evaluation").rename(tmp_path / "set" / "moved")
    with pytest.raises(error, match=message):
        O.load_omniglot(**{"root": folder, "split": "background", **arguments})
    if error is LayoutError:
        with pytest.raises(LayoutError, match="no images_evaluation"):
            O.load_omniglot(folder, split="vinyals-test")
        with pytest.raises(LayoutError, match="strokes_background_small1"):
            O.load_omniglot_strokes(folder / "moved")


@pytest.mark.parametrize(("size", "error"), [(28.0, TypeError), (-1, ValueError)])
def test_bad_size_of_pairs(folder, size, error):
    with pytest.raises(error, match="size must be"):
        O.load_omniglot_pairs(folder, size=size)


def test_list_file_errors(folder, tmp_path):
    listing = tmp_path / "l.txt"
    for text, message in [
        ("Greek/character77\n", "characters that .* does not hold"),
        ("Greek\n", "line 1 of"),
    ]:
        listing.write_text(text)
        with pytest.raises(ValueError, match=message):
            O.load_omniglot(folder, split=listing)


def test_real_images(real_data):
    root = real_data / "omniglot"
    images = O.load_omniglot(root, split="all", size=None)
    assert images.images.shape == (32_460, 105, 105)
    assert len(images.class_names) == 1623
    assert images.skipped == {}
    assert (images.images > 0).mean() == pytest.approx(0.08, abs=0.01)  # ink, not paper
    counts = np.bincount(images.labels)
    assert counts.min() == counts.max() == 20


def test_real_vinyals_split(real_data):
    with ExitStack() as stack:
        names = [
            list(
                dict.fromkeys(
                    f.character for f in O._find_files(stack, real_data / "omniglot", f"images_{s}", ".png")
                )
            )
            for s in ("background", "evaluation")
        ]
    characters = {split: O._split_characters(split, *names, 0) for split in O.SPLITS if split != "all"}
    sizes = {split: len(c) for split, c in characters.items()}
    assert sizes == {
        "background": 964,
        "evaluation": 659,
        "vinyals-train": 1200,
        "vinyals-test": 423,
        "vinyals-val": 172,
        "vinyals-fit": 1028,
        "random-train": 1200,
        "random-test": 423,
    }
    test = characters["vinyals-test"]
    # As the published list: the last four of Gurmukhi and twelve whole alphabets.
    assert [c for c in test if c.startswith("Gurmukhi")] == [f"Gurmukhi/character{i}" for i in range(42, 46)]
    assert len({c.split("/")[0] for c in test}) == 13
    assert not set(test) & set(characters["vinyals-train"])
    assert set(characters["vinyals-val"]) | set(characters["vinyals-fit"]) == set(characters["vinyals-train"])


def test_real_strokes_lie_on_the_images(real_data):
    pairs = O.load_omniglot_pairs(real_data / "omniglot", size=None)
    assert len(pairs.strokes) == len(pairs.images) == 4840
    assert len(pairs.strokes.class_names) == 242
    rows = range(0, 4840, 968)
    drawn = rasterize_sketches([pairs.strokes[i][0] for i in rows], 105, padding=None).numpy() > 100
    inked = pairs.images.images[list(rows)] > 0
    assert (drawn & inked).sum() > 0.98 * drawn.sum()  # the thin line lies within the thick one
    shifted = np.roll(inked, 8, axis=2)
    assert (drawn & shifted).sum() < 0.7 * drawn.sum()  # and would not elsewhere
