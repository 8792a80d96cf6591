"""The packed data set and its cache, safe unpickling, and access to folders and zips."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sketch_strategies import assert_same, sketches

from sketchfast.data import safe_pickle
from sketchfast.data.archive import LayoutError, layout_error, open_tree
from sketchfast.data.dataset import LabelledImages, StrokeDataset, write_npz
from sketchfast.data.prepare import cache_path, load_prepared
from sketchfast.data.safe_pickle import UnsafePickleError, load_arrays, load_npy
from sketchfast.data.strokes import make_sketch


def dataset(items, names=("a", "b", "c")) -> StrokeDataset:
    labels = [i % len(names) for i in range(len(items))]
    extra = {"key": np.array([f"k{i}" for i in range(len(items))], np.str_), "number": np.arange(len(items))}
    return StrokeDataset.from_sketches(
        items, labels, names, skipped={"broken": 2}, info={"dataset": "test"}, extra=extra
    )


# ---- packed data set ---------------------------------------------------------------------------------------


@given(st.lists(sketches(max_points=8), max_size=8), st.data())
def test_items_and_subsets(items, data):
    ds = dataset(items)
    assert len(ds) == len(items)
    for i, sketch in enumerate(items):
        assert_same(ds[i][0], sketch)
        assert ds[i][1] == ds[i - len(items)][1] == i % 3
    index = data.draw(st.lists(st.integers(-len(items), len(items) - 1), max_size=6)) if items else []
    part = ds.subset(index)
    assert len(part) == len(index)
    for row, i in enumerate(index):
        assert_same(part[row][0], items[i])
        assert part.extra["number"][row] == i % len(items)


@given(items=st.lists(sketches(max_points=8), max_size=5))
def test_cache_round_trip(tmp_path_factory, items):
    path = tmp_path_factory.mktemp("cache") / "made" / "strokes.npz"
    ds = dataset(items)
    ds.save(path)
    back = StrokeDataset.load(path)
    for name in ("points", "pen_down", "offsets", "labels"):
        assert getattr(back, name).tobytes() == getattr(ds, name).tobytes()
        assert getattr(back, name).dtype == getattr(ds, name).dtype
    assert (back.class_names, back.skipped, back.info) == (ds.class_names, ds.skipped, ds.info)
    np.testing.assert_array_equal(back.extra["key"], ds.extra["key"])
    assert [p.name for p in path.parent.iterdir()] == ["strokes.npz"]  # no temporary file stays


def test_image_cache_round_trip(tmp_path):
    images = LabelledImages(
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        np.array([1, 0]),
        ["a", "b"],
        {"x": 1},
        {},
        {"k": np.ones(2)},
    )
    images.save(tmp_path / "i.npz")
    back = LabelledImages.load(tmp_path / "i.npz").subset([1])
    np.testing.assert_array_equal(back.images, images.images[1:])
    assert (back.class_names, back.skipped, len(back.extra["k"])) == (["a", "b"], {"x": 1}, 1)
    with pytest.raises(ValueError, match="it holds no points"):
        StrokeDataset.load(tmp_path / "i.npz")


def test_failed_save_leaves_the_old_cache(tmp_path, monkeypatch):
    ds = dataset([])
    ds.save(tmp_path / "c.npz")
    before = (tmp_path / "c.npz").read_bytes()

    def fail(file, **_):
        file.write(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        ds.save(tmp_path / "c.npz")
    assert (tmp_path / "c.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_caches_are_refused(tmp_path):
    path = tmp_path / "c.npz"
    dataset([]).save(path)
    whole = path.read_bytes()
    for data in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="no readable cache"):
            StrokeDataset.load(path)
    np.savez(path, points=np.zeros(3))
    with pytest.raises(ValueError, match="no readable cache"):
        StrokeDataset.load(path)
    with pytest.raises(FileNotFoundError):
        StrokeDataset.load(tmp_path / "none.npz")


@pytest.mark.parametrize("field", ["class_names", "skipped", "info"])
@pytest.mark.parametrize("wrong", [{}, 3])
def test_cache_without_a_header_field_is_refused(tmp_path, field, wrong):
    header = {"version": 1, "class_names": ["a"], "skipped": {}, "info": {}}
    if wrong:
        header[field] = wrong
    else:
        del header[field]
    arrays = {"images": np.zeros((1, 2, 2), np.uint8), "labels": np.zeros(1, np.int64)}
    write_npz(tmp_path / "c.npz", header, **arrays)
    with pytest.raises(ValueError, match=rf"c\.npz is no readable cache: its header holds no .* {field}"):
        LabelledImages.load(tmp_path / "c.npz")


def test_inconsistent_or_oversized_caches_are_refused(tmp_path):
    path = tmp_path / "c.npz"
    ds = dataset([make_sketch([[0, 0], [1, 1]], [1, 0])])
    for name, values in [("labels", np.array([7])), ("labels", np.array(0)), ("points", np.zeros((3, 2)))]:
        broken = dataset([make_sketch([[0, 0], [1, 1]], [1, 0])])
        setattr(broken, name, values)
        broken.save(path)
        with pytest.raises(ValueError, match=r"c\.npz is no readable cache"):
            StrokeDataset.load(path)
    ds.save(path)
    with zipfile.ZipFile(path, "a") as archive:
        header = repr({"descr": "<f8", "fortran_order": False, "shape": (10**12, 3)}) + "\n"
        archive.writestr(
            "extra_x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
        )
    with pytest.raises(ValueError, match=r"c\.npz is no readable cache"):
        StrokeDataset.load(path)


def test_damaged_prepared_cache_is_passed_over(tmp_path):
    write_npz(
        cache_path("quickdraw", tmp_path),
        {"version": 1},
        **{name: getattr(dataset([]), name) for name in ("points", "pen_down", "offsets", "labels")},
    )
    with pytest.warns(RuntimeWarning, match="cache passed over: .* is no readable cache"):
        assert load_prepared("quickdraw", tmp_path) is None


def test_select_classes_relabels():
    assert len(dataset([]).select_classes(["b"])) == 0
    items = [make_sketch([[i, i]], [0]) for i in range(6)]
    part = dataset(items).select_classes(["c", "a"])
    assert part.class_names == ["c", "a"]
    np.testing.assert_array_equal(part.labels, [1, 0, 1, 0])
    np.testing.assert_array_equal(part.points[:, 0], [0, 2, 3, 5])


def test_inconsistent_data_sets_are_refused():
    good = {
        "points": np.zeros((2, 2), np.float32),
        "pen_down": np.zeros(2, bool),
        "offsets": np.array([0, 2]),
        "labels": np.array([0]),
        "class_names": ["a"],
    }
    StrokeDataset(**good)
    for name, value, message in [
        ("points", np.zeros((2, 2)), "points must be float32"),
        ("pen_down", np.zeros(3, bool), r"pen_down must be bool \[2\]"),
        ("offsets", np.array([0, 3]), "offsets must have"),
        ("labels", np.array([1]), r"labels must be in \[0, 1\)"),
        ("extra", {"x": np.zeros(2)}, "must have 1 rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            StrokeDataset(**{**good, name: value})
    with pytest.raises(IndexError):
        StrokeDataset(**good)[1]
    with pytest.raises(IndexError, match="indices must be in"):
        StrokeDataset(**good).subset([1])
    with pytest.raises(TypeError, match="indices must be one-dimensional integers"):
        StrokeDataset(**good).subset([0.5])


# ---- pickles -----------------------------------------------------------------------------------------------

ARRAYS = [
    np.arange(6, dtype=np.int16).reshape(2, 3),
    np.arange(6, dtype=">f4").reshape(3, 2),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.zeros((0, 3), np.uint8),
    np.array(2.5),
    np.array([True, False]),
]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_numeric_arrays_of_every_protocol_are_read(protocol):
    outer = np.empty(len(ARRAYS), object)
    for i, array in enumerate(ARRAYS):
        outer[i] = array
    for value in (outer, list(ARRAYS)):
        back = load_arrays(pickle.dumps(value, protocol))
        for got, expected in zip(back, ARRAYS, strict=True):
            np.testing.assert_array_equal(got, expected)
    assert load_arrays(pickle.dumps({"a": np.float32(1.5), "b": [1, "x", None]}, protocol)) == {
        "a": 1.5,
        "b": [1, "x", None],
    }


def test_python2_pickle_is_read_as_latin1():
    # protocol 2 as Python 2 wrote it: the bytes of the array are a str
    array = np.array([1, 255, 128], np.uint8)
    data = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x03\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x03\x01\xff\x80tb."
    )
    np.testing.assert_array_equal(load_arrays(data), array)


class _Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class _Reconstructed:
    """Pickles as an array with the given state, as numpy would write it."""

    def __init__(self, state: tuple):
        self.state = state

    def __reduce__(self):
        return np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state


def _reconstructed(state: tuple) -> bytes:
    return pickle.dumps(_Reconstructed(state), 2)


FLOAT = np.dtype("f8")
HOSTILE = {
    "eval": pickle.dumps(_Call(eval, "1+1")),
    "os.system": b"cposix\nsystem\n(S'true'\ntR.",
    "getattr": pickle.dumps(_Call(getattr, "text", "upper")),
    "numpy function": pickle.dumps(_Call(np.frombuffer, b"12345678")),
    "numpy submodule": b"cnumpy.testing._private.utils\nrunstring\n(S'x=1'\n}tR.",
    "persistent id": b"Pevil\n.",
    "codec": pickle.dumps(_Call(__import__("codecs").encode, "text", "rot13"), 2),
    "class": pickle.dumps(ValueError),
    "shape beyond the data": _reconstructed((1, (10**9,), FLOAT, False, b"\0" * 8)),
    "negative shape": _reconstructed((1, (-1,), FLOAT, False, b"")),
    "object data missing": _reconstructed((1, (3,), np.dtype(object), False, [])),
    "object in object": _reconstructed((1, (1,), np.dtype(object), False, [object()])),
    "structured dtype": pickle.dumps(np.zeros(2, [("a", "i4")]), 2),
    "void dtype": pickle.dumps(np.zeros(2, "V8"), 2),
    "odd state": _reconstructed((1, (1,))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(name):
    with pytest.raises(UnsafePickleError):
        load_arrays(HOSTILE[name])


def _nested(container: type, levels: int):
    """A container of 10 times the same container of 10 ..., which pickles to 25 bytes a level."""
    value = container([0] * 10)
    for _ in range(levels):
        value = container([value] * 10)
    return value


@pytest.mark.parametrize("container", [list, tuple])
def test_shared_objects_are_resolved_once(container):
    """Following every reference takes 10^(levels + 1) steps: for ever, with a few levels more than here."""
    nested = _nested(container, 5)
    rows = np.empty(2, object)
    rows[:] = [{"a": nested}, {"a": nested}]
    for back in (
        load_arrays(pickle.dumps([nested, nested])),
        [row["a"] for row in load_arrays(rows.dumps())],
    ):
        assert back[0] == nested
        assert back[0] is back[1]
        assert back[0][0] is back[1][9]


def test_object_that_holds_itself_is_refused():
    loop: list = []
    loop.append(loop)
    with pytest.raises(pickle.UnpicklingError):
        load_arrays(pickle.dumps(loop))


def test_hostile_states_are_not_shown_in_full():
    """The repr of a nested tuple is as long as the tuple is large, its hash takes as long."""
    nested = _nested(tuple, 6)
    for blob in (
        _reconstructed((1, nested, FLOAT, False, b"")),
        pickle.dumps(_Call(np.dtype, nested), 2),
    ):
        with pytest.raises(UnsafePickleError) as caught:
            load_arrays(blob)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("use", ["setitem", "setitems", "dict", "set", "frozenset"])
def test_a_nested_key_takes_no_time(use):
    """60 tuples, each of the one before twice: its hash takes 2^60 steps."""
    nested = b"K\x01" + b"".join(b"q%ch%c\x86" % (level, level) for level in range(60))
    before, after = {
        "setitem": (b"}", b"K\x01s"),
        "setitems": (b"}(", b"K\x01u"),
        "dict": (b"(", b"K\x01d"),
        "set": (b"\x8f(", b"\x90"),
        "frozenset": (b"(", b"\x91"),
    }[use]
    with pytest.raises(UnsafePickleError, match=r"as key|holds a set"):
        load_arrays(b"\x80\x04" + before + nested + after + b".")


def test_arrays_that_share_their_data_are_no_larger_than_the_pickle():
    shared = b"a" * 1000
    arrays = [_Reconstructed((1, (1000,), np.dtype("u1"), False, shared)) for _ in range(50)]
    with pytest.raises(UnsafePickleError, match="larger than itself"):
        load_arrays(pickle.dumps(arrays, 4))
    objects = [_Reconstructed((1, (1000,), np.dtype(object), False, [0] * 1000)) for _ in range(3)]
    assert len(load_arrays(pickle.dumps(objects, 4))) == 3


@pytest.mark.parametrize("function", ["_codecs encode", "builtins bytes", "numpy.core.multiarray scalar"])
def test_a_pickle_cannot_change_the_stand_ins(function):
    module, name = function.split()
    stand_in = safe_pickle._ADMITTED[module, name]
    inner = getattr(stand_in, "_function", stand_in)
    before = inner.__defaults__, dict(inner.__dict__)
    for state in (b"N}X\x0c\0\0\0__defaults__)s\x86", b"}X\x01\0\0\0aK\x01s"):  # (None, slots), __dict__
        with pytest.raises(UnsafePickleError, match="sets the state of a function"):
            load_arrays(b"\x80\x02c%b\n%b\n%bb." % (module.encode(), name.encode(), state))
    assert (inner.__defaults__, inner.__dict__) == before


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\x7f", b"p2147483647\n"])
def test_a_memo_index_takes_no_memory(put):
    """The unpickler alone would take 32 GB for it."""
    with pytest.raises(UnsafePickleError, match="asks for memo entry 2147483647"):
        load_arrays(b"\x80\x02K\x01" + put + b".")


@given(st.data())
def test_mangled_pickles_raise_unpickling_error_or_give_values(data):
    blob = bytearray(pickle.dumps(ARRAYS[:3], data.draw(st.integers(0, 4))))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(pickle.UnpicklingError):
        load_arrays(bytes(blob[: data.draw(st.integers(0, len(blob)))]))


def test_npy_of_objects_and_numbers():
    outer = np.empty(2, object)
    outer[:] = [np.arange(3), np.arange(4)]
    for array in (outer, np.eye(3)):
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=True)
        back = load_npy(buffer.getvalue())
        for got, expected in zip(back, array, strict=True):
            np.testing.assert_array_equal(got, expected)
        with pytest.raises(ValueError, match=r"."):
            load_npy(buffer.getvalue()[:-5])


# ---- folders and zips --------------------------------------------------------------------------------------


def test_trees_hide_junk_and_read_alike(tmp_path):
    for name in ("a/x.txt", "a/.DS_Store", "__MACOSX/a/._x.txt", "Thumbs.db", "b.txt"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(name)
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for file in (tmp_path / "d").rglob("*"):
            archive.write(file, file.relative_to(tmp_path / "d"))
    for root in (tmp_path / "d", str(tmp_path / "d.zip")):
        with open_tree(root) as tree:
            assert tree.names == ["a/x.txt", "b.txt"]
            assert tree.read("a/x.txt") == b"a/x.txt"


def test_no_zip_and_layout_errors(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"x\.zip is not a readable zip archive"):
        open_tree(tmp_path / "x.zip")
    error = layout_error(tmp_path, "  <root>/cat", [f"f{i}" for i in range(9)])
    assert isinstance(error, LayoutError)
    assert "Expected:\n  <root>/cat\nFound: f0, f1, f2, f3, f4, ..." in str(error)
