"""Hypothesis strategies and comparisons shared by the tests of formats and readers."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from sketchfast.data.strokes import Sketch, make_sketch


def sketches(max_points: int = 40, integers: bool = False, min_points: int = 0) -> st.SearchStrategy[Sketch]:
    """Sketches of float32 or integer coordinates with arbitrary pen states."""
    number = st.integers(-1000, 1000).map(float) if integers else st.floats(-1e4, 1e4, width=32)
    rows = st.lists(st.tuples(number, number, st.booleans()), min_size=min_points, max_size=max_points)
    return rows.map(lambda r: make_sketch([p[:2] for p in r], np.array([p[2] for p in r], bool)))


def assert_same(a: Sketch, b: Sketch) -> None:
    """Equal to the bit, dtypes too."""
    assert a.points.dtype == b.points.dtype == np.float32
    assert a.pen_down.dtype == b.pen_down.dtype == bool
    np.testing.assert_array_equal(a.points, b.points)
    np.testing.assert_array_equal(a.pen_down, b.pen_down)
