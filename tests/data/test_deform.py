"""Drawings cut to a share of their length, deformed drawings, and their images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sketch_strategies import assert_same, sketches

import sketchfast
from sketchfast.data.deform import WIDTH_LEVELS, Deformation, cut_to_share, deform, drawn_length
from sketchfast.data.procedural import CANVAS, draw_instance
from sketchfast.data.render import LINE_WIDTH, rasterize_sketches, sketch_images
from sketchfast.data.strokes import Sketch, collate, from_strokes, make_sketch, to_strokes

SHARES = st.floats(0, 1)
NONE = Deformation(rotate=0, scale=0, translate=0, width=1, clip=0)
# two strokes of length 30 and 10, and a move of 100 between them that costs nothing
TWO = from_strokes([[(0, 0), (10, 0), (10, 20)], [(110, 20), (120, 20)]])


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng((0, *key))


# ---- cut_to_share ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "strokes"),
    [
        (0.125, [[(0, 0), (5, 0)]]),
        (0.25, [[(0, 0), (10, 0)]]),  # ends on a point: no point twice
        (0.5, [[(0, 0), (10, 0), (10, 10)]]),
        (0.75, [[(0, 0), (10, 0), (10, 20)]]),  # the end of a stroke: the move is not made
        (0.875, [[(0, 0), (10, 0), (10, 20)], [(110, 20), (115, 20)]]),
    ],
)
def test_cuts_by_hand(share, strokes):
    assert_same(cut_to_share(TWO, share), from_strokes(strokes))


@given(sketches())
def test_share_one_is_the_sketch_and_share_zero_is_empty(sketch):
    assert_same(cut_to_share(sketch, 1), sketch)
    assert_same(cut_to_share(sketch, 0), Sketch(np.zeros((0, 2), np.float32), np.zeros(0, bool)))


@given(sketches(), SHARES, SHARES)
def test_length_is_the_share_and_monotone(sketch, a, b):
    whole = drawn_length(sketch)
    less, more = (cut_to_share(sketch, share) for share in sorted((a, b)))
    rounding = 1e-3  # of the last point, float32 of up to 1e4
    assert drawn_length(less) <= drawn_length(more) + rounding
    if whole > 0:
        assert drawn_length(less) == pytest.approx(min(a, b) * whole, abs=rounding)


@given(sketches(), SHARES)
def test_a_cut_is_the_beginning(sketch, share):
    cut = cut_to_share(sketch, share)
    kept = len(cut.points) - 1
    assert_same(cut, make_sketch(cut.points, cut.pen_down))  # canonical: float32, bool, last pen up
    assert np.isfinite(cut.points).all()
    if len(cut.points):
        np.testing.assert_array_equal(cut.points[:kept], sketch.points[:kept])
        np.testing.assert_array_equal(cut.pen_down[:kept], sketch.pen_down[:kept])


def test_dots_come_with_what_was_drawn_before_them():
    sketch = from_strokes([[(0, 0), (0, 0)], [(0, 0), (8, 0)], [(3, 3)], [(4, 4), (4, 4)]])
    half = cut_to_share(sketch, 0.5)
    assert_same(half, from_strokes([[(0, 0), (0, 0)], [(0, 0), (4, 0)]]))
    dots = from_strokes([[(1, 1), (1, 1)], [(2, 2)]])
    assert_same(cut_to_share(dots, 0.01), dots)  # no length: the whole
    assert not len(cut_to_share(dots, 0).points)


def test_the_least_share_there_is():
    assert drawn_length(cut_to_share(TWO, 5e-324)) == 0
    assert len(cut_to_share(TWO, 5e-324).points) == 2


@pytest.mark.parametrize(
    ("share", "error", "message"),
    [
        (1.1, ValueError, r"share must be in \[0, 1\], got 1.1"),
        (-0.1, ValueError, "share must be in"),
        (float("nan"), ValueError, "share must be finite"),
        ("1", TypeError, "share must be a number"),
    ],
)
def test_shares_are_checked(share, error, message):
    with pytest.raises(error, match=message):
        cut_to_share(TWO, share)


# ---- deform ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["stroke", "sketch"])
@given(sketch=sketches())
def test_zero_strengths_change_no_bit(level, sketch):
    none = Deformation(rotate=0, scale=0, translate=0, width=1, clip=0, level=level)
    deformed = deform(sketch, none, rng(1), 256)
    assert_same(deformed.sketch, sketch)
    assert deformed.widths.tolist() == [1.0] * len(to_strokes(sketch))


@given(
    sketches(),
    st.builds(
        Deformation,
        rotate=st.floats(0, 360),
        scale=st.floats(0, 0.99),
        translate=st.floats(0, 2),
        width=st.floats(1, 10),
        clip=st.floats(0, 0.49),
        level=st.sampled_from(["stroke", "sketch"]),
    ),
    st.integers(0, 99),
)
def test_strokes_stay_strokes(sketch, deformation, seed):
    deformed = deform(sketch, deformation, rng(seed), 256)
    strokes = to_strokes(deformed.sketch)
    assert_same(deformed.sketch, make_sketch(*deformed.sketch))  # canonical, and finite
    assert len(strokes) == len(to_strokes(sketch)) == len(deformed.widths)
    for before, after in zip(to_strokes(sketch), strokes, strict=True):
        assert len(after) == len(before) if deformation.clip == 0 else min(len(before), 2) <= len(after)
    bounds = (1 / deformation.width - 1e-9, deformation.width + 1e-9)
    assert all(bounds[0] <= width <= bounds[1] for width in deformed.widths)


def test_clipping_shortens_each_stroke_along_itself():
    deformation = Deformation(rotate=0, scale=0, translate=0, width=1, clip=0.3)
    drawing = draw_instance("house", 3, style=2)
    clipped = deform(drawing, deformation, rng(2), CANVAS).sketch
    kept = []
    for before, after in zip(to_strokes(drawing), to_strokes(clipped), strict=True):
        whole, rest = (drawn_length(from_strokes([s])) for s in (before, after))
        kept.append(rest / whole)
        inner = [tuple(p) for p in after[1:-1].tolist()]
        assert set(inner) <= {tuple(p) for p in before.tolist()}
    assert 0.4 - 1e-6 <= min(kept) <= max(kept) <= 1
    assert len(set(np.round(kept, 6))) == len(kept)  # each stroke by its own numbers
    assert np.mean(kept) == pytest.approx(1 - 0.3, abs=0.12)  # two ends, each U(0, 0.3)


def test_a_clip_by_hand():
    class Fixed:
        def random(self, shape):
            return np.tile([0.9, 0.5, 0.25], (shape[0], 1))  # of the width, the start, the end

    line = from_strokes([[(0, 0), (6, 0), (10, 0)], [(3, 3), (3, 3)]])
    deformation = Deformation(rotate=0, scale=0, translate=0, width=4, clip=0.4)
    deformed = deform(line, deformation, Fixed(), 256)  # type: ignore[arg-type]
    assert_same(deformed.sketch, from_strokes([[(2, 0), (6, 0), (9, 0)], [(3, 3), (3, 3)]]))
    assert deformed.widths.tolist() == [4.0, 4.0]  # the widest level


@pytest.mark.parametrize("level", ["stroke", "sketch"])
def test_what_moves_as_one(level):
    """Turns alone keep the distances within what turns, and the centre of its box about as far."""
    drawing = from_strokes([[(10, 10), (50, 10), (50, 90)], [(70, 70), (90, 70), (90, 90)]])
    deformation = Deformation(rotate=80, scale=0, translate=0, width=1, clip=0, level=level)
    turned = deform(drawing, deformation, rng(3), 100).sketch
    across = lambda s: np.linalg.norm(s.points[:, None] - s.points[None], axis=-1)  # noqa: E731
    within, whole = slice(0, 3), slice(None)
    np.testing.assert_allclose(across(turned)[within, within], across(drawing)[within, within], atol=1e-4)
    kept = np.allclose(across(turned)[whole, whole], across(drawing)[whole, whole], atol=1e-4)
    assert kept == (level == "sketch")
    assert not np.allclose(turned.points, drawing.points, atol=1)


def test_strengths_bound_what_happens():
    line = from_strokes([[(0, 0), (100, 0)]])
    moved, angles, lengths = [], [], []
    for seed in range(200):
        deformation = Deformation(rotate=10, scale=0.2, translate=0.05, width=1, clip=0)
        a, b = deform(line, deformation, rng(seed), 200).sketch.points.astype(float)
        moved.append(np.abs((a + b) / 2 - (50, 0)).max())
        angles.append(abs(np.rad2deg(np.arctan2(*(b - a)[::-1]))))
        lengths.append(np.linalg.norm(b - a))
    assert 9 < max(moved) <= 10 + 1e-4  # a twentieth of a canvas of 200
    assert 9 < max(angles) <= 10 + 1e-4
    assert 80 - 1e-3 <= min(lengths) < 83
    assert 117 < max(lengths) <= 120 + 1e-3


def test_a_strength_changes_nothing_else():
    drawing = draw_instance("castle", 1)
    base = Deformation()
    usual = deform(drawing, base, rng(4), CANVAS)
    wider = deform(drawing, Deformation(width=3), rng(4), CANVAS)
    assert_same(wider.sketch, usual.sketch)
    assert (wider.widths != usual.widths).any()
    still = deform(drawing, Deformation(rotate=0, scale=0, translate=0), rng(4), CANVAS)
    np.testing.assert_array_equal(still.widths, usual.widths)
    assert len(still.sketch.points) == len(usual.sketch.points)  # clipped at the same places


def test_same_seed_same_drawing():
    drawing = draw_instance("house", 1)
    once, again, other = (deform(drawing, Deformation(), rng(seed), CANVAS) for seed in (5, 5, 6))
    assert_same(once.sketch, again.sketch)
    np.testing.assert_array_equal(once.widths, again.widths)
    assert not np.array_equal(once.sketch.points, other.sketch.points)


def test_widths_are_few_and_all_occur():
    drawing = from_strokes([[(i, 0), (i, 9)] for i in range(200)])
    widths = np.unique(deform(drawing, Deformation(width=1.6), rng(7), 256).widths)
    np.testing.assert_allclose(widths, 1.6 ** np.linspace(-1, 1, WIDTH_LEVELS))


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("rotate", -1, ValueError),
        ("rotate", 361, ValueError),
        ("scale", 1, ValueError),
        ("scale", "big", TypeError),
        ("translate", -0.1, ValueError),
        ("translate", float("inf"), ValueError),
        ("width", 0.5, ValueError),
        ("width", True, TypeError),
        ("clip", 0.5, ValueError),
        ("clip", float("nan"), ValueError),
        ("level", "point", ValueError),
    ],
)
def test_deformations_are_checked(field, value, error):
    with pytest.raises(error, match=field):
        Deformation(**{field: value})


def test_arguments_of_deform_are_checked():
    with pytest.raises(TypeError, match="deformation must be a Deformation, got 3"):
        deform(TWO, 3, rng(), 256)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="canvas must be greater than 0, got 0"):
        deform(TWO, Deformation(), rng(), 0)


# ---- sketch_images -----------------------------------------------------------------------------------------


def test_images_are_what_rasterize_draws():
    drawings = [draw_instance("house", 1), draw_instance("castle", 2, style=3)]
    images = sketch_images(drawings, 64, canvas=CANVAS)
    points, pens, lengths = collate(drawings)
    ink = sketchfast.rasterize(points * (64 / CANVAS) - 0.5, pens, 64, lengths=lengths)
    expected = 255 - (ink * 255).round().to(torch.uint8).numpy()
    assert images.shape == (2, 64, 64, 3)
    assert images.dtype == np.uint8
    assert np.abs(images.astype(int) - expected[..., None]).max() <= 1
    assert images.min() < 60 < 255 == images.max()


def test_the_canvas_fills_the_image():
    """A line along the border of the canvas runs along the outer edge of the border pixels."""
    frame = from_strokes([[(0, 0), (100, 0), (100, 100), (0, 100), (0, 0)]])
    image = sketch_images([frame], 25, canvas=100)[0, :, :, 0]
    np.testing.assert_array_equal(image, image[::-1, ::-1])
    np.testing.assert_array_equal(image, image.T)
    assert (image[0] < 140).all()
    assert (image[1:-1, 1:-1] > 250).all()


def test_a_part_lies_where_it_lies_in_the_whole():
    drawing = draw_instance("castle", 1)
    whole, part = sketch_images([drawing, cut_to_share(drawing, 0.4)], 96, canvas=CANVAS)
    assert (part >= whole).all()
    assert (part > whole).any()


def test_share_zero_is_blank():
    assert (sketch_images([cut_to_share(TWO, 0)], 16, canvas=128) == 255).all()
    assert sketch_images([], 16, canvas=128).shape == (0, 16, 16, 3)


def line_across(factor: float, line_width: float = LINE_WIDTH) -> np.ndarray:
    """Ink down the middle column of a horizontal line, drawn 20 pixels a unit."""
    line = from_strokes([[(0.5, 1), (1.5, 1)]])
    image = sketch_images([line], 40, canvas=2, widths=[np.array([factor])], line_width=line_width)
    return 255 - image[0, :, 20, 0].astype(float)


@pytest.mark.parametrize("width", [4.0, 7.0, 10.0])
def test_lines_are_as_wide_as_asked(width):
    for ink in (line_across(width / LINE_WIDTH), line_across(1.0, width)):
        assert ink.sum() / 255 == pytest.approx(width, abs=0.35)  # pixels of ink across
        half = np.flatnonzero(ink >= 127.5)
        assert half[-1] - half[0] + 1 == pytest.approx(width, abs=1)


def test_widths_of_several_strokes_are_each_stroke_drawn_alone():
    drawing = draw_instance("house", 5, style=1)
    strokes = to_strokes(drawing)
    widths = np.random.default_rng(0).uniform(0.5, 3, len(strokes))
    together = sketch_images([drawing], 48, canvas=CANVAS, widths=[widths])[0]
    alone = [
        sketch_images([from_strokes([s])], 48, canvas=CANVAS, widths=[np.array([w])])[0]
        for s, w in zip(strokes, widths, strict=True)
    ]
    np.testing.assert_array_equal(together, np.min(alone, axis=0))


def test_width_one_changes_no_bit():
    drawings = [draw_instance("house", i) for i in range(3)]
    ones = [np.ones(len(to_strokes(d))) for d in drawings]
    plain = sketch_images(drawings, 32, canvas=CANVAS)
    np.testing.assert_array_equal(sketch_images(drawings, 32, canvas=CANVAS, widths=ones), plain)
    scaled = [Sketch((d.points.astype(float) / 8 - 0.5).astype(np.float32), d.pen_down) for d in drawings]
    np.testing.assert_array_equal(255 - plain[..., 0], rasterize_sketches(scaled, 32, padding=None).numpy())


def test_a_group_of_widths_draws_no_other_sketch():
    a, b = from_strokes([[(2, 2), (14, 2)]]), from_strokes([[(2, 12), (14, 12)]])
    images = sketch_images([a, b], 16, canvas=16, widths=[np.array([1.0]), np.array([2.0])])
    single = sketch_images([b], 16, canvas=16, widths=[np.array([2.0])])
    np.testing.assert_array_equal(images[1], single[0])
    assert (images[0, 8:] == 255).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be at least 1"),
        ({"canvas": -1}, ValueError, "canvas must be greater than 0"),
        ({"line_width": 0}, ValueError, "line_width must be greater than 0"),
        ({"widths": []}, ValueError, "widths must be 1, one array a sketch, got 0"),
        ({"widths": [np.ones(3)]}, ValueError, r"widths\[0\] must have shape \[2\], one a stroke, got \[3\]"),
        ({"widths": [np.array([1, 0])]}, ValueError, r"widths\[0\] must be finite and greater than 0"),
        ({"widths": [np.array([1, np.nan])]}, ValueError, r"widths\[0\] must be finite"),
    ],
)
def test_arguments_of_sketch_images_are_checked(change, error, message):
    with pytest.raises(error, match=message):
        sketch_images([TWO], **{"size": 8, "canvas": 128, **change})


def test_real_drawings(real_data):
    from sketchfast.data.quickdraw import load_quickdraw

    data = load_quickdraw(real_data / "quickdraw", classes=["chair", "cat"], per_class=40)
    drawings = [sketch for sketch, _ in data]
    for number, drawing in enumerate(drawings):
        assert drawn_length(cut_to_share(drawing, 0.3)) == pytest.approx(
            0.3 * drawn_length(drawing), rel=1e-5
        )
        deformed = deform(drawing, Deformation(), rng(number), 256)
        assert len(deformed.widths) == len(to_strokes(drawing))
        moved = np.abs(np.array(deformed.sketch.points).mean(axis=0) - drawing.points.mean(axis=0))
        assert moved.max() < 40
    ink = [
        (255 - sketch_images([cut_to_share(d, share) for d in drawings], 64, canvas=256).astype(float)).mean()
        for share in (0.2, 0.5, 1.0)
    ]
    assert 0 < ink[0] < ink[1] < ink[2]
