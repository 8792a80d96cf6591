"""Formats round-trip, transforms keep what they promise, bad input is named."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sketch_strategies import assert_same, sketches

from sketchfast.data import strokes as S

TRIANGLE = S.make_sketch([[10, 20], [30, 20], [30, 60], [50, 70], [60, 70]], [1, 1, 0, 1, 1])


# ---- formats -----------------------------------------------------------------------------------------------


@given(sketches(integers=True))
def test_stroke3_round_trip_is_exact_on_integers(sketch):
    assert_same(S.from_stroke3(S.to_stroke3(sketch)), sketch)


@given(sketches())
def test_stroke3_round_trip_is_close_on_floats(sketch):
    back = S.from_stroke3(S.to_stroke3(sketch))
    np.testing.assert_array_equal(back.pen_down, sketch.pen_down)
    np.testing.assert_allclose(back.points, sketch.points, atol=0.2)  # 40 offsets, each rounded to float32


def test_stroke3_by_hand():
    expected = [[10, 20, 0], [20, 0, 0], [0, 40, 1], [20, 10, 0], [10, 0, 1]]
    np.testing.assert_array_equal(S.to_stroke3(TRIANGLE), expected)


def test_stroke5_by_hand():
    expected = [
        [0, 0, 1, 0, 0],
        [10, 20, 1, 0, 0],
        [20, 0, 1, 0, 0],
        [0, 40, 0, 1, 0],
        [20, 10, 1, 0, 0],
        [10, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(S.to_stroke5(TRIANGLE, 7), expected)


@given(sketches(integers=True), st.integers(0, 5))
def test_stroke5_round_trip(sketch, spare):
    rows = S.to_stroke5(sketch, len(sketch.points) + spare)
    assert rows.shape == (len(sketch.points) + spare + 1, 5)
    assert (rows[:, 2:].sum(axis=1) == 1).all()
    assert_same(S.from_stroke5(rows), sketch)


@given(sketches(integers=True, min_points=1))
def test_stroke5_without_position_starts_at_the_origin(sketch):
    back = S.from_stroke5(S.to_stroke5(sketch, len(sketch.points) + 1, keep_position=False))
    np.testing.assert_array_equal(back.points, sketch.points - sketch.points[0])
    np.testing.assert_array_equal(back.pen_down, sketch.pen_down)


@given(sketches())
def test_absolute_round_trip(sketch):
    assert_same(S.from_absolute(S.to_absolute(sketch)), sketch)


@given(sketches())
def test_quickdraw_lists_round_trip(sketch):
    assert_same(S.from_quickdraw(S.to_quickdraw(sketch)), sketch)


@given(sketches())
def test_strokes_round_trip(sketch):
    parts = S.to_strokes(sketch)
    assert sum(map(len, parts)) == len(sketch.points)
    assert_same(S.from_strokes(parts), sketch)


def test_raw_quickdraw_times_are_dropped():
    sketch = S.from_quickdraw([[[0, 1], [2, 3], [0, 17]], [[5], [6], [40]]])
    assert_same(sketch, S.make_sketch([[0, 2], [1, 3], [5, 6]], [1, 0, 0]))


def test_mark_dots_doubles_lone_points_only():
    sketch = S.make_sketch([[1, 1], [2, 2], [3, 3], [4, 4]], [0, 1, 0, 0])
    expected = S.make_sketch([[1, 1], [1, 1], [2, 2], [3, 3], [4, 4], [4, 4]], [1, 0, 1, 0, 1, 0])
    assert_same(S.mark_dots(sketch), expected)


@given(sketches(max_points=15))
def test_svg_round_trip(sketch):
    # A path says nothing of repeated points, and a point by itself becomes a dot.
    distinct = [s[np.r_[True, (np.diff(s, axis=0) != 0).any(axis=1)]] for s in S.to_strokes(sketch)]
    assert_same(S.from_svg(S.to_svg(sketch)), S.mark_dots(S.from_strokes(distinct)))


def test_svg_nested_transforms_and_curves():
    svg = """<?xml version="1.0" encoding="utf-8"?>
    <svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 800"><g fill="none">
    <g transform="translate(10,20) scale(2) translate(-1,-2)"><path d="M1 2 L11 2"/>
    <path d="M1 2 C1 12 11 12 11 2"/></g></g><path d="M0 0 L5 0 M7 7 L9 9"/></svg>"""
    strokes = sorted(S.to_strokes(S.from_svg(svg, spacing=1.0)), key=lambda s: (s[0, 0], len(s)))
    first, second, line, cubic = strokes
    np.testing.assert_allclose(line, [[10, 20], [30, 20]])
    np.testing.assert_allclose(cubic[[0, -1]], [[10, 20], [30, 20]])
    assert cubic[:, 1].max() == pytest.approx(35, abs=0.1)  # 3/4 of the control points' height
    assert np.hypot(*np.diff(cubic, axis=0).T).max() < 1.1
    np.testing.assert_allclose(np.vstack((first, second)), [[0, 0], [5, 0], [7, 7], [9, 9]])


@pytest.mark.parametrize("svg", ["", "no svg", "<svg><path d='M 0 0 L'/>", b"\xff\xfe<svg"])
def test_broken_svg_is_refused(svg):
    with pytest.raises(ValueError, match="svg must be"):
        S.from_svg(svg)


def test_tuberlin_svg(real_data):
    with zipfile.ZipFile(real_data / "tuberlin" / "svg_15.zip") as archive:
        read = [S.from_svg(archive.read(n)) for n in archive.namelist() if n.endswith(".svg")]
    assert len(read) == 15
    for sketch in read:  # the canvas is 800 x 800, and drawn on in full
        x0, y0, x1, y1 = S.bounding_box(sketch)
        assert min(x0, y0) > 0
        assert max(x1, y1) < 800
        assert max(x1 - x0, y1 - y0) > 400


# ---- transforms --------------------------------------------------------------------------------------------


def _distance_to_polyline(point: np.ndarray, line: np.ndarray) -> float:
    a, b = line[:-1], line[1:]
    chord = b - a
    square = np.maximum((chord**2).sum(axis=1), 1e-30)
    t = np.clip(((point - a) * chord).sum(axis=1) / square, 0, 1)
    return float(np.hypot(*(point - a - t[:, None] * chord).T).min())


@given(sketches(min_points=2), st.floats(0, 5000))
def test_simplify_stays_within_epsilon(sketch, epsilon):
    simple = S.simplify(sketch, epsilon)
    for before, after in zip(S.to_strokes(sketch), S.to_strokes(simple), strict=True):
        np.testing.assert_array_equal(after[[0, -1]], before[[0, -1]])
        if len(after) > 1:
            line = after.astype(np.float64)
            assert max(_distance_to_polyline(p, line) for p in before.astype(np.float64)) <= epsilon + 1e-6


def test_simplify_leaves_out_what_lies_on_the_line():
    sketch = S.make_sketch([[0, 0], [1, 0], [2, 0], [2, 1], [2, 5]], np.ones(5))
    np.testing.assert_array_equal(S.simplify(sketch, 0.0).points, [[0, 0], [2, 0], [2, 5]])


def test_simplify_keeps_the_turn_of_a_stroke_that_runs_back():
    sketch = S.make_sketch([[0, 0], [10, 0], [1, 0]], [1, 1, 0])
    assert len(S.simplify(sketch, 1.0).points) == 3


def test_simplify_has_no_recursion_limit():
    x = np.arange(5_000, dtype=np.float32)
    sketch = S.make_sketch(np.column_stack((x, np.where(x % 2, x, 0))), np.ones(len(x)))
    assert len(S.simplify(sketch, 0.1).points) > 4_900


@given(sketches(min_points=1), st.floats(50, 5000))
def test_resample_spacing(sketch, spacing):
    resampled = S.to_strokes(S.resample_spacing(sketch, spacing))
    for before, after in zip(S.to_strokes(sketch), resampled, strict=True):
        np.testing.assert_array_equal(after[[0, -1]], before[[0, -1]])
        assert (np.hypot(*np.diff(after.astype(np.float64), axis=0).T) <= spacing * 1.001).all()


@given(sketches(min_points=1), st.integers(0, 60))
def test_resample_count_gives_that_many(sketch, extra):
    strokes = S.to_strokes(sketch)
    least = sum(min(len(s), 2) for s in strokes)
    extra = extra if any(len(s) > 1 for s in strokes) else 0
    result = S.resample_count(sketch, least + extra)
    assert len(result.points) == least + extra
    for before, after in zip(strokes, S.to_strokes(result), strict=True):
        np.testing.assert_array_equal(after[[0, -1]], before[[0, -1]])


def test_resample_count_is_even_along_the_line():
    sketch = S.make_sketch([[0, 0], [1, 0], [10, 0]], np.ones(3))
    np.testing.assert_allclose(S.resample_count(sketch, 5).points[:, 0], [0, 2.5, 5, 7.5, 10])


@given(sketches(min_points=1), st.integers(16, 200), st.integers(16, 200), st.floats(0, 7))
def test_fit_fills_the_canvas_and_keeps_the_aspect(sketch, height, width, padding):
    fitted = S.fit(sketch, (height, width), padding)
    x0, y0, x1, y1 = S.bounding_box(fitted)
    assert (x0 + x1) / 2 == pytest.approx((width - 1) / 2, abs=1e-2)
    assert (y0 + y1) / 2 == pytest.approx((height - 1) / 2, abs=1e-2)
    bx0, by0, bx1, by1 = S.bounding_box(sketch)
    if max(bx1 - bx0, by1 - by0) > 1e-3:
        slack = [width - 1 - 2 * padding - (x1 - x0), height - 1 - 2 * padding - (y1 - y0)]
        assert min(slack) == pytest.approx(0, abs=1e-2)  # one direction is full, the other has room
        scale = max(x1 - x0, y1 - y0) / max(bx1 - bx0, by1 - by0)
        np.testing.assert_allclose([x1 - x0, y1 - y0], [scale * (bx1 - bx0), scale * (by1 - by0)], atol=2e-2)


@given(sketches(max_points=20), st.integers(0, 2**32 - 1))
def test_augment_is_seeded_and_valid(sketch, seed):
    amounts = {"scale": 0.2, "rotate": 30, "shear": 0.2, "translate": 3}
    losses = {"stroke_dropout": 0.3, "point_dropout": 0.3}
    one, two = (S.augment(sketch, np.random.default_rng(seed), **amounts, **losses) for _ in range(2))
    assert_same(one, two)
    if len(sketch.points):
        assert 0 < len(one.points) <= len(sketch.points)
        assert not one.pen_down[-1]


def test_augment_without_amounts_changes_nothing():
    result = S.augment(TRIANGLE, np.random.default_rng(0), scale=0)
    np.testing.assert_allclose(result.points, TRIANGLE.points, rtol=1e-6)


def test_augment_rotates_about_the_middle():
    result = S.augment(TRIANGLE, np.random.default_rng(1), scale=0, rotate=180)
    distances = [np.hypot(*(s.points - (35, 45)).T) for s in (TRIANGLE, result)]
    np.testing.assert_allclose(*distances, rtol=1e-5)
    assert np.abs(result.points - TRIANGLE.points).max() > 1


def test_dropping_a_point_joins_its_neighbours():
    sketch = S.make_sketch(np.arange(400).reshape(200, 2), np.ones(200))
    result = S.augment(sketch, np.random.default_rng(0), scale=0, point_dropout=0.5)
    assert 70 < len(result.points) < 130
    assert result.pen_down[:-1].all()


def test_truncate_lifts_the_pen_at_the_end():
    assert_same(S.truncate(TRIANGLE, 2), S.make_sketch([[10, 20], [30, 20]], [1, 0]))
    assert_same(S.truncate(TRIANGLE, 9), TRIANGLE)
    assert len(S.truncate(TRIANGLE, 0).points) == 0


@given(st.lists(sketches(max_points=12), max_size=5), st.integers(0, 4))
def test_collate_holds_every_sketch_and_zeros(batch, spare):
    longest = max((len(s.points) for s in batch), default=0)
    points, pens, lengths = S.collate(batch, longest + spare)
    assert points.shape == (len(batch), longest + spare, 2)
    assert (points.dtype, pens.dtype, lengths.dtype) == (torch.float32, torch.bool, torch.int64)
    for i, sketch in enumerate(batch):
        length = int(lengths[i])
        assert_same(S.Sketch(points[i, :length].numpy(), pens[i, :length].numpy()), sketch)
        assert not points[i, length:].any()
        assert not pens[i, length:].any()


BAD_CALLS = {
    "points shape": (lambda: S.make_sketch([[1, 2, 3]], [1]), ValueError, r"points must have shape \[T, 2\]"),
    "pens shape": (lambda: S.make_sketch([[1, 2]], [1, 0]), ValueError, r"pen_down must have shape \[1\]"),
    "points text": (lambda: S.make_sketch([["a", "b"]], [1]), TypeError, "points must be numeric"),
    "points nan": (lambda: S.make_sketch([[np.nan, 0]], [1]), ValueError, "points must be finite"),
    "stroke3 width": (lambda: S.from_stroke3(np.zeros((4, 5))), ValueError, r"rows must have shape \[T, 3\]"),
    "stroke5 width": (lambda: S.from_stroke5(np.zeros((4, 3))), ValueError, r"rows must have shape \[T, 5\]"),
    "stroke5 too long": (
        lambda: S.to_stroke5(TRIANGLE, 4),
        ValueError,
        "max_len must be at least .* 5 points",
    ),
    "quickdraw lists": (lambda: S.from_quickdraw([[[1, 2], [3]]]), ValueError, r"drawing\[0\]"),
    "svg spacing": (lambda: S.from_svg("<svg/>", spacing=0), ValueError, "spacing must be > 0"),
    "empty box": (lambda: S.bounding_box(S.from_strokes([])), ValueError, "at least one point"),
    "fit size": (lambda: S.fit(TRIANGLE, 0), ValueError, "size must be at least 1 x 1"),
    "fit padding": (lambda: S.fit(TRIANGLE, 10, padding=5), ValueError, "padding must be in"),
    "simplify": (lambda: S.simplify(TRIANGLE, -1), ValueError, "epsilon must be >= 0"),
    "spacing": (lambda: S.resample_spacing(TRIANGLE, 0), ValueError, "spacing must be > 0"),
    "count": (lambda: S.resample_count(TRIANGLE, 3), ValueError, "count must be at least 4"),
    "truncate": (lambda: S.truncate(TRIANGLE, -1), ValueError, "max_len must be >= 0"),
    "collate": (lambda: S.collate([TRIANGLE], 3), ValueError, "max_len must be at least"),
    "augment": (
        lambda: S.augment(TRIANGLE, np.random.default_rng(0), stroke_dropout=1),
        ValueError,
        r"stroke_dropout must be in \[0, 1\)",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_named(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
