"""QuickDraw's formats, written here by their definition, read by both parsers; broken files are counted."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sketchfast.data import quickdraw as Q
from sketchfast.data.archive import LayoutError
from sketchfast.data.safe_pickle import UnsafePickleError, load_npy

IMPLS = ["python", "native"]
CAT = [[[0, 10, 255], [5, 5, 0]], [[7], [8]]]
DOG = [[[1, 2], [3, 4]]]
CAT_POINTS = [[0, 5], [10, 5], [255, 0], [7, 8]]
CAT_PENS = [True, True, False, False]

needs_host = pytest.mark.skipif(Q._host() is None, reason="sketchfast._host is not built")
both = pytest.mark.parametrize("impl", ["python", pytest.param("native", marks=needs_host)])


def ndjson(*drawings, **fields) -> bytes:
    return b"".join(json.dumps({"word": "cat", **fields, "drawing": d}).encode() + b"\n" for d in drawings)


def bin_record(drawing, key=7, recognized=1) -> bytes:
    data = struct.pack("<Q2sbIH", key, b"DE", recognized, 1488000000, len(drawing))
    for xs, ys in drawing:
        data += struct.pack("<H", len(xs)) + bytes(xs) + bytes(ys)
    return data


def npz(**splits) -> bytes:
    buffer = io.BytesIO()
    objects = {}
    for name, rows in splits.items():
        objects[name] = np.empty(len(rows), object)
        for i, row in enumerate(rows):
            objects[name][i] = np.array(row, np.int16)
    np.savez(buffer, **objects)
    return buffer.getvalue()


def assert_parsed_equal(a: Q.Parsed, b: Q.Parsed) -> None:
    assert a.skipped == b.skipped
    for name in ("points", "pen_down", "offsets", "key_ids", "recognized"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype, name
        assert x.shape == y.shape, name
        assert x.tobytes() == y.tobytes(), name  # to the bit: -0.0 is not 0.0


# ---- formats -----------------------------------------------------------------------------------------------


@both
def test_ndjson_simplified(impl):
    parsed = Q.parse_ndjson(
        ndjson(CAT, key_id="5891796615823360", recognized=True, countrycode="VE", timestamp="2017-03-02")
        + ndjson(DOG),
        impl=impl,
    )
    np.testing.assert_array_equal(parsed.points, [*CAT_POINTS, [1, 3], [2, 4]])
    np.testing.assert_array_equal(parsed.pen_down, [*CAT_PENS, True, False])
    np.testing.assert_array_equal(parsed.offsets, [0, 4, 6])
    np.testing.assert_array_equal(parsed.key_ids, [5891796615823360, 0])
    np.testing.assert_array_equal(parsed.recognized, [1, -1])
    assert parsed.skipped == {}


@both
def test_ndjson_raw_has_times_and_fractions(impl):
    parsed = Q.parse_ndjson(ndjson([[[1.5, 123.36000061035156], [-0.25, 1e2], [0, 17]]]), impl=impl)
    np.testing.assert_array_equal(
        parsed.points, np.array([[1.5, -0.25], [123.36000061035156, 100]], np.float32)
    )


BROKEN_LINES = {
    b'{"drawing": [[[1,2],[3,4]]': Q.BROKEN_LINE,
    b"not json": Q.BROKEN_LINE,
    b'{"drawing": [[[1],[\xff]]]}': Q.BROKEN_LINE,
    b"[" * 100_000: Q.BROKEN_LINE,
    b'{"word": "cat"}': Q.MALFORMED,
    b"[1, 2]": Q.MALFORMED,
    b'{"drawing": "none"}': Q.MALFORMED,
    b'{"drawing": [[[1,2],[3]]]}': Q.MALFORMED,
    b'{"drawing": [[[1,2],[3,4],[0]]]}': Q.MALFORMED,
    b'{"drawing": [[[1,true],[3,4]]]}': Q.MALFORMED,
    b'{"drawing": [[["1"],[3]]]}': Q.MALFORMED,
    b'{"drawing": [[[1]]]}': Q.MALFORMED,
    b'{"drawing": []}': Q.EMPTY,
    b'{"drawing": [[[],[]]]}': Q.EMPTY,
    b'{"drawing": [[[NaN],[1]]]}': Q.NOT_FINITE,
    b'{"drawing": [[[1e60],[1]]]}': Q.NOT_FINITE,
    b'{"drawing": [[[1' + b"0" * 400 + b"],[1]]]}": Q.NOT_FINITE,
}


@both
@pytest.mark.parametrize("line", BROKEN_LINES, ids=lambda line: repr(line[:32]))
def test_ndjson_broken_line_is_counted_and_the_rest_read(impl, line):
    parsed = Q.parse_ndjson(ndjson(CAT) + line + b"\n\r\n \t\n" + ndjson(DOG).strip(), impl=impl)
    assert parsed.skipped == {BROKEN_LINES[line]: 1}
    np.testing.assert_array_equal(parsed.offsets, [0, 4, 6])


@both
def test_bin(impl):
    data = (
        bin_record(CAT, key=2**64 - 1)
        + bin_record(DOG, recognized=0)
        + bin_record([])
        + bin_record([([], [])])
    )
    parsed = Q.parse_bin(data, impl=impl)
    np.testing.assert_array_equal(parsed.points, [*CAT_POINTS, [1, 3], [2, 4]])
    np.testing.assert_array_equal(parsed.pen_down, [*CAT_PENS, True, False])
    np.testing.assert_array_equal(parsed.key_ids, np.array([2**64 - 1, 7], np.uint64))
    np.testing.assert_array_equal(parsed.recognized, [1, 0])
    assert parsed.skipped == {Q.EMPTY: 2}


@both
def test_bin_truncated_anywhere_keeps_what_is_whole(impl):
    first, second = bin_record(CAT), bin_record(DOG)
    for cut in range(1, len(second)):
        parsed = Q.parse_bin(first + second[:cut], impl=impl)
        assert parsed.skipped == {Q.TRUNCATED: 1}
        np.testing.assert_array_equal(parsed.points, CAT_POINTS)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_npz(dtype):
    rows = np.array([[0, 5, 0], [10, 0, 0], [245, -5, 1], [-248, 8, 1]], dtype)
    data = npz(train=[rows, rows[:2]], valid=[rows[:3]], test=[])
    parsed = Q.parse_npz(data, "train")
    np.testing.assert_array_equal(parsed.points[:4], CAT_POINTS)
    np.testing.assert_array_equal(parsed.pen_down[:4], CAT_PENS)
    np.testing.assert_array_equal(np.diff(parsed.offsets), [4, 2])
    assert len(Q.parse_npz(data).key_ids) == 3
    with pytest.raises(ValueError, match="npz must hold"):
        Q.parse_npz(npz(train=[]), "valid")


# ---- both parsers agree ------------------------------------------------------------------------------------

stroke_lists = st.integers(0, 4).flatmap(
    lambda n: st.lists(
        st.lists(
            st.one_of(st.integers(-300, 300), st.floats(allow_nan=True), st.integers(-(10**18), 10**18)),
            min_size=n,
            max_size=n,
        ),
        min_size=2,
        max_size=3,
    )
)
records = st.fixed_dictionaries(
    {"drawing": st.lists(stroke_lists, max_size=3)},
    optional={
        "word": st.text(max_size=5),
        "key_id": st.one_of(st.integers(-1, 2**65), st.integers(0, 2**65).map(str), st.text(max_size=3)),
        "recognized": st.one_of(st.booleans(), st.none(), st.integers(0, 1)),
        "extra": st.one_of(st.none(), st.floats(), st.lists(st.integers(), max_size=2)),
    },
)


@needs_host
@given(st.lists(st.one_of(records.map(json.dumps), st.text(max_size=20)), max_size=6), st.data())
def test_ndjson_parsers_agree_on_valid_and_mangled_lines(lines, data):
    text = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    for _ in range(data.draw(st.integers(0, 3))):
        if text:
            text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    data = bytes(text[: data.draw(st.integers(0, len(text)))])
    assert_parsed_equal(Q.parse_ndjson(data, impl="native"), Q.parse_ndjson(data, impl="python"))


ODD_NUMBERS = "-0 -0.0 0.1 00 01 1. .5 +1 1e3 1E-2 0.000000000000001 999999999999999 9999999999999999"
ODD_NUMBERS += " - -. 1.2.3 0x1 1_0 123456789.123456 -123456789.1234567"


@needs_host
@pytest.mark.parametrize("number", ODD_NUMBERS.split())
def test_ndjson_parsers_agree_on_odd_numbers(number):
    data = b'{"drawing":[[[%b , 1],[2,3]]]}' % number.encode()
    assert_parsed_equal(Q.parse_ndjson(data, impl="native"), Q.parse_ndjson(data, impl="python"))


@needs_host
@pytest.mark.parametrize(
    "line",
    [
        '{"drawing":[[[1],[2]]],"drawing":[[[3],[4]]]}',
        '{"drawing":[[[1],[2]]],"key_id":"12","key_id":"13"}',
        '{"drawing":[[[1],[2]]],"key_id":12}',
        '{"drawing":[[[1],[2]]],"key_id":""}',
        '{"drawing":[[[1],[2]]],"word":"caf\\u00e9"}',
        '{"drawing":[[[1],[2]]],"word":"café"}',
        '{"drawing":[[[1],[2]]],"word":"a\tb"}',
        '{"drawing":[[[1],[2]]],"recognized":truely}',
        '{"drawing":[[[1],[2]],]}',
        '{"drawing":[[[1,],[2]]]}',
        '{"drawing":[[[1],[2]]]} x',
        '{"drawing":[[[1],[2]]],}',
        ' { "drawing" : [ [ [ 1 ] , [ 2 ] ] ] } ',
        '{"drawing":[[[1],[2],[3],[4]]]}',
    ],
)
def test_ndjson_parsers_agree_on_odd_lines(line):
    data = (line + "\n" + line).encode()
    assert_parsed_equal(Q.parse_ndjson(data, impl="native"), Q.parse_ndjson(data, impl="python"))


@needs_host
@pytest.mark.parametrize("pattern", ["fsf", "sff", "ffs", "fsbsf", "bfbsbf", "ssff"])
def test_ndjson_lines_left_to_python_keep_their_place(pattern):
    """f: read by the compiled parser; s: valid, but left to Python; b: broken."""
    lines = {"f": '{"drawing":[[[%d],[1]]]}', "s": '{"drawing":[[[%de0],[1]]]}', "b": "broken %d"}
    data = "\n".join(lines[kind] % i for i, kind in enumerate(pattern)).encode()
    native = Q.parse_ndjson(data, impl="native")
    np.testing.assert_array_equal(native.points[:, 0], [i for i, kind in enumerate(pattern) if kind != "b"])
    assert_parsed_equal(native, Q.parse_ndjson(data, impl="python"))


@needs_host
@pytest.mark.parametrize(
    "key", ["0", "18446744073709551615", "18446744073709551616", "9" * 19, "9" * 20, "1" * 25, "-1"]
)
def test_ndjson_parsers_agree_on_long_keys(key):
    data = b'{"drawing":[[[1],[2]]],"key_id":"%b"}' % key.encode()
    native = Q.parse_ndjson(data, impl="native")
    assert native.key_ids[0] == (int(key) if 0 <= int(key) < 2**64 else 0)
    assert_parsed_equal(native, Q.parse_ndjson(data, impl="python"))


@needs_host
@given(st.binary(max_size=200))
@example(bin_record(CAT) + bin_record(DOG)[:-1])
@example(struct.pack("<Q2sbIH", 1, b"DE", 1, 0, 65535) + struct.pack("<H", 65535))
def test_bin_parsers_agree_on_garbage(data):
    assert_parsed_equal(Q.parse_bin(data, impl="native"), Q.parse_bin(data, impl="python"))


@needs_host
@given(
    st.lists(st.lists(st.lists(st.integers(0, 255), max_size=5).map(lambda v: (v, v[::-1])), max_size=4)),
    st.data(),
)
def test_bin_parsers_agree_on_truncated_records(drawings, data):
    blob = b"".join(bin_record(d, recognized=-1) for d in drawings)
    blob = blob[: data.draw(st.integers(0, len(blob)))]
    assert_parsed_equal(Q.parse_bin(blob, impl="native"), Q.parse_bin(blob, impl="python"))


@needs_host
def test_host_tells_what_it_was_built_with():
    info = Q._host().build_info()
    assert info["cxx_standard"] >= 201703
    assert info["compiler"]


# ---- folders and zips --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "full_simplified_cat.ndjson").write_bytes(ndjson(CAT, DOG, CAT))
    (tmp_path / "full%2Fsimplified%2Fdog.ndjson").write_bytes(ndjson(DOG))
    (tmp_path / "The Eiffel Tower.ndjson").write_bytes(ndjson(DOG, DOG))
    (tmp_path / ".DS_Store").write_bytes(b"junk")
    (tmp_path / "readme.txt").write_text("not a class")
    return tmp_path


def zipped(folder: Path, target: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, prefix + file.name)
        archive.writestr("__MACOSX/._cat.ndjson", b"junk")
    return target


def test_folder_zip_and_folder_with_zip_load_alike(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("zip")
    archive = zipped(folder, other / "simplified.zip", "quickdraw/")
    datasets = [Q.load_quickdraw(root) for root in (folder, str(archive), other)]
    for ds in datasets:
        assert ds.class_names == ["The Eiffel Tower", "cat", "dog"]
        np.testing.assert_array_equal(ds.labels, [0, 0, 1, 1, 1, 2])
        np.testing.assert_array_equal(ds.points, datasets[0].points)
        sketch, label = ds[2]
        np.testing.assert_array_equal(sketch.points, CAT_POINTS)
        assert label == 1
    single = Q.load_quickdraw(folder / "full_simplified_cat.ndjson")
    assert single.class_names == ["cat"]
    assert len(single) == 3


def test_options(folder):
    ds = Q.load_quickdraw(folder, classes=["dog", "cat"], max_points=3)
    assert ds.class_names == ["dog", "cat"]
    np.testing.assert_array_equal(ds.labels, [0, 1])
    assert ds.skipped == {Q.TOO_LONG: 2}
    some = Q.load_quickdraw(folder, per_class=1, seed=3)
    assert len(some) == 3
    np.testing.assert_array_equal(some.points, Q.load_quickdraw(folder, per_class=1, seed=3).points)
    firsts = {Q.load_quickdraw(folder, classes=["cat"], per_class=1, seed=s).lengths[0] for s in range(20)}
    assert firsts == {2, 4}  # picked at random, not the first


def test_per_class_pick_does_not_depend_on_the_other_classes(folder):
    alone = Q.load_quickdraw(folder, classes=["cat"], per_class=2, seed=1)
    among = Q.load_quickdraw(folder, per_class=2, seed=1).select_classes(["cat"])
    np.testing.assert_array_equal(alone.points, among.points)


def test_broken_files_are_counted(folder):
    (folder / "broken.npz").write_bytes(b"PK\x03\x04 no zip")
    (folder / "fine.npz").write_bytes(npz(train=[[[0, 0, 0], [1, 1, 1]], [[1, 2]]], valid=[], test=[]))
    ds = Q.load_quickdraw(folder, file_format="npz")
    assert ds.class_names == ["broken", "fine"]
    assert len(ds) == 1
    assert ds.skipped == {Q.BROKEN_FILE: 1, Q.MALFORMED: 1}


def npy(header: str, data: bytes = b"") -> bytes:
    """An `.npy` file with this text for a header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def npy_header(descr: str, shape: tuple[int, ...]) -> str:
    return repr({"descr": descr, "fortran_order": False, "shape": shape}) + "\n"


def npz_of(member: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("train.npy", member)
    return buffer.getvalue()


BROKEN_NPY = {
    "memory": npy(npy_header("<i2", (10**12, 3))),
    "overflow": npy(npy_header("<f8", (10**30,))),
    "unterminated": npy("{'descr':'<f8"),
    "indented": npy("  1\n 2L"),
    "no dtype": npy(npy_header("spam", (3,))),
    "no size": npy(npy_header("|V0", (10**9,))),
    "negative": npy(npy_header("|u1", (-1, 784))),
    "short": npy(npy_header("|u1", (3, 784)), bytes(3 * 784 - 1)),
    "an npz": npz_of(b""),
}


@pytest.mark.parametrize("name", BROKEN_NPY)
def test_broken_npy_is_counted_beside_a_good_one(tmp_path, name):
    (tmp_path / "cat.npz").write_bytes(npz(train=[[[0, 0, 0], [1, 1, 1]]]))
    (tmp_path / "dog.npz").write_bytes(npz_of(BROKEN_NPY[name]))
    ds = Q.load_quickdraw(tmp_path)
    np.testing.assert_array_equal(ds.labels, [0])
    assert ds.skipped == {Q.BROKEN_FILE: 1}
    np.save(tmp_path / "cat.npy", np.zeros((2, 784), np.uint8))
    (tmp_path / "dog.npy").write_bytes(BROKEN_NPY[name])
    images = Q.load_quickdraw_bitmaps(tmp_path)
    np.testing.assert_array_equal(images.labels, [0, 0])
    assert images.skipped == {Q.BROKEN_FILE: 1}


def test_npy_is_measured_before_numpy_reads_it(monkeypatch):
    """numpy takes 5 s for 10^9 elements without size, and may get the memory for some that are not there."""
    monkeypatch.setattr(np.lib.format, "read_array", None)
    for name in ("memory", "no size"):
        with pytest.raises(ValueError, match="its header calls for"):
            load_npy(BROKEN_NPY[name])


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@given(data=st.data())
def test_mangled_npz_is_read_or_refused(compression, data):
    whole = npz(train=[[[0, 0, 0], [1, 1, 1]]] * 3)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        blob = bytearray(npz_of(archive.read("train.npy"), compression))
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        Q.parse_npz(bytes(blob))


def test_damaged_lzma_member_is_counted(tmp_path):
    blob = bytearray(npz_of(bytes(1000), zipfile.ZIP_LZMA))
    start = 30 + len("train.npy")
    blob[start : start + 9] = b"\x09\x04\x05\x00" + b"\xff" * 5  # filter properties no LZMA has
    (tmp_path / "dog.npz").write_bytes(blob)
    (tmp_path / "cat.npz").write_bytes(npz(train=[[[0, 0, 0], [1, 1, 1]]]))
    ds = Q.load_quickdraw(tmp_path)
    assert (len(ds), ds.skipped) == (1, {Q.BROKEN_FILE: 1})


@pytest.mark.parametrize("broken", ["a.zip", "z.zip"])
def test_broken_zip_is_counted_beside_a_good_one(folder, tmp_path_factory, broken):
    other = tmp_path_factory.mktemp("zips")
    (other / broken).write_bytes(b"no zip")
    with pytest.raises(ValueError, match="is not a readable zip archive"):
        Q.load_quickdraw(other)
    zipped(folder, other / "good.zip")
    ds = Q.load_quickdraw(other)
    assert (len(ds), ds.skipped) == (6, {Q.BROKEN_FILE: 1})


class _Exploit:
    def __reduce__(self):
        return eval, ("__import__('pathlib').Path('/tmp/sketchfast_was_owned').touch()",)


def test_malicious_pickle_is_refused_and_not_run(tmp_path):
    rows = np.empty(1, object)
    rows[0] = _Exploit()
    np.savez(tmp_path / "cat.npz", train=rows)
    with pytest.raises(UnsafePickleError, match=r"cat\.npz: pickle asks for builtins\.eval"):
        Q.load_quickdraw(tmp_path)
    assert issubclass(UnsafePickleError, pickle.UnpicklingError)
    assert not Path("/tmp/sketchfast_was_owned").exists()


def test_bitmaps(tmp_path):
    cats = np.arange(3 * 784, dtype=np.uint64).reshape(3, 784).astype(np.uint8)
    np.save(tmp_path / "cat.npy", cats)
    np.save(tmp_path / "wrong.npy", cats.astype(np.float32))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    ds = Q.load_quickdraw_bitmaps(tmp_path)
    np.testing.assert_array_equal(ds.images, cats.reshape(3, 28, 28))
    assert ds.class_names == ["broken", "cat", "wrong"]
    np.testing.assert_array_equal(ds.labels, [1, 1, 1])
    assert ds.skipped == {Q.BROKEN_FILE: 2}
    assert len(Q.load_quickdraw_bitmaps(tmp_path, per_class=2)) == 2


def _bad(folder: Path, case: str):
    if case == "other layout":
        other = folder / "other"
        other.mkdir()
        (other / "a.png").write_bytes(b"")
        return Q.load_quickdraw(other)
    if case == "two formats":
        (folder / "cat.bin").write_bytes(bin_record(CAT))
    if case == "twice":
        (folder / "cat.ndjson").write_bytes(ndjson(CAT))
    calls = {
        "missing": lambda: Q.load_quickdraw(folder / "nowhere"),
        "type": lambda: Q.load_quickdraw(3),
        "two formats": lambda: Q.load_quickdraw(folder),
        "twice": lambda: Q.load_quickdraw(folder),
        "class": lambda: Q.load_quickdraw(folder, classes=["cta"]),
        "class str": lambda: Q.load_quickdraw(folder, classes="cat"),
        "per_class": lambda: Q.load_quickdraw(folder, per_class=0),
        "max_points": lambda: Q.load_quickdraw(folder, max_points=64.0),
        "split": lambda: Q.load_quickdraw(folder, split="all"),
        "npz split": lambda: Q.load_quickdraw(folder, split="train"),
        "format": lambda: Q.load_quickdraw(folder, file_format="csv"),
        "impl": lambda: Q.load_quickdraw(folder, impl="rust"),
        "bitmaps": lambda: Q.load_quickdraw_bitmaps(folder),
    }
    return calls[case]()


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("missing", FileNotFoundError, "nowhere does not exist"),
        ("type", TypeError, "root must be a str or Path, got int"),
        ("other layout", LayoutError, r"Expected:\n  <root>/cat\.ndjson(.|\n)*Found: a\.png"),
        ("two formats", ValueError, "file_format must say which of bin, ndjson"),
        ("twice", ValueError, "several files of class 'cat'"),
        ("class", ValueError, "classes must be among the 3 found .cat.*got 'cta'"),
        ("class str", TypeError, "classes must be a sequence"),
        ("per_class", ValueError, "per_class must be at least 1"),
        ("max_points", TypeError, "max_points must be an integer, got 64.0"),
        ("split", ValueError, "split must be one of seen, unseen"),
        ("npz split", ValueError, r"split 'train' exists in \.npz files only"),
        ("format", ValueError, "file_format must be one of"),
        ("impl", ValueError, "impl must be auto, native or python, got 'rust'"),
        ("bitmaps", LayoutError, r"cat\.npy"),
    ],
)
def test_bad_calls(folder, case, error, message):
    with pytest.raises(error, match=message):
        _bad(folder, case)


@pytest.mark.parametrize("load", [Q.load_quickdraw, Q.load_quickdraw_bitmaps])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"per_class": 1.5}, TypeError, "per_class must be an integer, got 1.5"),
        ({"per_class": True}, TypeError, "per_class must be an integer, got True"),
        ({"per_class": "3"}, TypeError, "per_class must be an integer, got '3'"),
        ({"seed": "3"}, TypeError, "seed must be an integer, got '3'"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"classes": 3}, TypeError, "classes must be a sequence of names, got the int 3"),
        ({"classes": ["cat", 3]}, TypeError, "classes must be names, got the int 3 among them"),
    ],
)
def test_arguments_are_checked_before_any_file_is_read(tmp_path, load, arguments, error, message):
    with pytest.raises(error, match=message):  # not the LayoutError of an empty folder
        load(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"train": 1.5}, TypeError, "train must be an integer, got 1.5"),
        ({"train": -1}, ValueError, "train must be at least 0"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        ({"names": "cat"}, TypeError, "names must be a sequence of names, got the str 'cat'"),
    ],
)
def test_bad_class_splits(arguments, error, message):
    with pytest.raises(error, match=message):
        Q.class_split(**{"names": ["a", "b"], "train": 1, **arguments})


def test_classes_may_come_from_any_iterable(folder):
    assert Q.load_quickdraw(folder, classes=(name for name in ("dog", "cat"))).class_names == ["dog", "cat"]


def test_numpy_integers_are_integers(folder):
    assert len(Q.load_quickdraw(folder, per_class=np.int64(1), seed=np.uint8(3))) == 3


def test_class_split():
    names = [f"class{i}" for i in range(345)]
    seen, unseen = Q.class_split(names)
    assert (len(seen), len(unseen)) == (300, 45)
    assert sorted(seen + unseen) == sorted(names)
    assert Q.class_split(names[::-1]) == (seen, unseen)
    assert Q.class_split(names, seed=1) != (seen, unseen)
    with pytest.raises(ValueError, match=r"train must be in \[0, 345\]"):
        Q.class_split(names, train=346)


def test_real_quickdraw(real_data):
    root = real_data / "quickdraw"
    ds = Q.load_quickdraw(root)
    assert len(ds) == 46_290
    assert len(ds.class_names) == 345
    assert ds.skipped == {}
    assert (ds.points.min(), ds.points.max()) == (0, 255)
    if Q._host() is not None:
        python = Q.load_quickdraw(root, impl="python")
        assert ds.points.tobytes() == python.points.tobytes()
        np.testing.assert_array_equal(ds.pen_down, python.pen_down)
        np.testing.assert_array_equal(ds.offsets, python.offsets)
    seen, unseen = (Q.load_quickdraw(root, split=s, per_class=1) for s in ("seen", "unseen"))
    assert (len(seen), len(unseen)) == (300, 45)
    assert not set(seen.class_names) & set(unseen.class_names)
