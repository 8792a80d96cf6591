"""Procedural drawings: reproducible by number, varied, and the same thing in strokes and photo."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from sketchfast.data import procedural as P
from sketchfast.data.quickdraw import class_split
from sketchfast.data.render import rasterize_sketches
from sketchfast.data.strokes import bounding_box, fit, make_sketch


def test_order_labels_and_numbers():
    ds = P.procedural(classes=["house", "cat"], instances=3, styles=[0, 4])
    assert len(ds) == 12
    assert ds.class_names == ["house", "cat"]
    np.testing.assert_array_equal(ds.labels, np.repeat([0, 1], 6))
    np.testing.assert_array_equal(ds.extra["instance"], np.tile([0, 0, 1, 1, 2, 2], 2))
    np.testing.assert_array_equal(ds.extra["style"], np.tile([0, 4], 6))
    sketch, label = ds[9]
    alone = P.draw_instance("cat", 1, 4)
    assert label == 1
    np.testing.assert_array_equal(sketch.points, alone.points)
    np.testing.assert_array_equal(sketch.pen_down, alone.pen_down)


def test_reproducible_by_seed():
    def digest(seed: int) -> str:
        ds = P.procedural(classes=30, instances=2, styles=3, seed=seed)
        return hashlib.sha256(ds.points.tobytes() + ds.pen_down.tobytes()).hexdigest()

    assert digest(5) == digest(5)
    assert digest(5) != digest(6)
    np.testing.assert_array_equal(P.photo("owl", 3, 32, seed=1), P.photo("owl", 3, 32, seed=1))


def test_a_drawing_is_the_same_whichever_others_are_made():
    few = P.procedural(classes=["tree"], instances=[7], styles=[2])
    many = P.procedural(instances=8, styles=3)
    row = np.flatnonzero(
        (many.labels == P.CLASSES.index("tree")) & (many.extra["instance"] == 7) & (many.extra["style"] == 2)
    )[0]
    np.testing.assert_array_equal(few[0][0].points, many[row][0].points)


@pytest.mark.parametrize("name", P.CLASSES)
def test_every_class_draws_within_bounds(name):
    ds = P.procedural(classes=[name], instances=6, styles=6)
    assert np.isfinite(ds.points).all()
    assert ds.points.min() > -80
    assert ds.points.max() < 256 + 80
    assert ds.lengths.min() >= 5
    assert ds.lengths.max() <= 256
    for i in range(len(ds)):
        sketch, _ = ds[i]
        x0, y0, x1, y1 = bounding_box(sketch)
        assert max(x1 - x0, y1 - y0) > 80  # fills a good part of the canvas
        assert sketch.pen_down.any()
        assert not sketch.pen_down[-1]


def test_instances_and_styles_differ():
    ds = P.procedural(instances=2, styles=2)
    images = (
        rasterize_sketches([ds[i][0] for i in range(len(ds))], 20).reshape(len(P.CLASSES), 2, 2, -1).float()
    )
    between_instances = (images[:, 0, 0] - images[:, 1, 0]).abs().mean(dim=1)
    between_styles = (images[:, :, 0] - images[:, :, 1]).abs().mean(dim=(1, 2))
    assert (between_instances > 1).all()  # two may be alike by chance, but are never the same
    assert between_instances.median() > 15
    assert (between_styles > 3).all()


def test_classes_can_be_told_apart_without_training():
    """Nearest class mean on small blurred images: far above chance, so the classes are real ones, and below
    100%, so there is something to learn."""
    ds = P.procedural(instances=8, styles=[1, 2])
    images = rasterize_sketches([ds[i][0] for i in range(len(ds))], 16, padding=1.0, dtype=torch.float32)
    features = torch.nn.functional.normalize(images.flatten(1), dim=1).reshape(len(P.CLASSES), 16, -1)
    means = features[:, :8].mean(dim=1)
    guess = (features[:, 8:].flatten(0, 1) @ means.T).argmax(dim=1)
    accuracy = (guess == torch.arange(len(P.CLASSES)).repeat_interleave(8)).float().mean()
    assert 0.4 < accuracy < 0.97


def test_enough_classes_to_hold_some_out():
    assert len(P.CLASSES) == len(set(P.CLASSES)) >= 40
    seen, unseen = class_split(P.CLASSES, train=80)
    assert len(P.procedural(classes=unseen, instances=1, styles=1)) == len(P.CLASSES) - 80
    assert seen


@pytest.mark.parametrize("name", ["house", "bicycle", "fish", "spiral", "glyph_00"])
def test_photo_shows_the_same_instance(name):
    size = 100
    picture = P.photo(name, 2, size)
    assert picture.shape == (3, size, size)
    assert picture.dtype == np.uint8
    # Lines of the exact drawing lie on edges of the picture, more than those of another instance do.
    gray = picture.astype(np.float32).mean(axis=0)
    edges = np.hypot(*np.gradient(gray))

    def on_edges(instance: int) -> float:
        sketch = P.draw_instance(name, instance)
        moved = make_sketch(sketch.points * size / 256, sketch.pen_down)
        ink = rasterize_sketches([moved], size, padding=None, dtype=torch.float32, blur_sigma=1.0)[0].numpy()
        return float((ink * edges).sum() / ink.sum())

    assert on_edges(2) > 1.2 * np.mean([on_edges(i) for i in range(3, 8)])


def test_photos_of_instances_differ_and_small_sizes_work():
    pictures = [P.photo("car", i, 8) for i in range(3)]
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[1], pictures[2])


def test_rasterize_sketches():
    sketch = make_sketch([[2, 3], [12, 3]], [1, 0])
    image = rasterize_sketches([sketch], (8, 16), padding=None)[0]
    assert image.dtype == torch.uint8
    assert (image[3, 2:13] == round(255 * torch.sigmoid(torch.tensor(2.0)).item())).all()
    assert not image[6:].any()
    fitted = rasterize_sketches([sketch], 16, dtype=torch.float32)
    expected = rasterize_sketches([fit(sketch, 16, 2.0)], 16, padding=None, dtype=torch.float32)
    assert torch.equal(fitted, expected)
    assert rasterize_sketches([], 5).shape == (0, 5, 5)
    assert not rasterize_sketches([make_sketch([], [])], 5).any()
    with pytest.raises(TypeError, match=r"dtype must be torch\.uint8 or a floating dtype"):
        rasterize_sketches([sketch], 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: P.procedural(classes=["hose"]), ValueError, "classes must be among .*house"),
        (lambda: P.procedural(classes="house"), TypeError, "classes must be a number or a sequence"),
        (lambda: P.procedural(classes=0), ValueError, "classes must be at least 1"),
        (lambda: P.procedural(classes=10**6), ValueError, "classes must be at most"),
        (lambda: P.procedural(classes=True), TypeError, "classes must be an integer, got True"),
        (lambda: P.procedural(instances=1.5), TypeError, "instances must be an integer, got 1.5"),
        (lambda: P.procedural(instances=True), TypeError, "instances must be an integer, got True"),
        (lambda: P.procedural(styles="3"), TypeError, "styles must be an integer, got '3'"),
        (lambda: P.procedural(seed="3"), TypeError, "seed must be an integer, got '3'"),
        (lambda: P.drawing_style(1, seed=-1), ValueError, "seed must be at least 0"),
        (lambda: P.draw_instance("house", 0, seed=2**64), ValueError, "seed must be at most"),
        (lambda: P.photo("house", 0, 64.0), TypeError, "size must be an integer, got 64.0"),
        (lambda: P.procedural(instances=0), ValueError, "instances must be at least 1"),
        (lambda: P.procedural(styles=[-1]), ValueError, "styles must be at least 0"),
        (lambda: P.procedural(seed=-1), ValueError, "seed must be at least 0"),
        (lambda: P.photo("house", 0, 4), ValueError, "size must be at least 8"),
        (lambda: P.photo("hose", 0), ValueError, "got 'hose'"),
        (lambda: P.draw_instance("house", -1), ValueError, "instance must be at least 0"),
    ],
)
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
