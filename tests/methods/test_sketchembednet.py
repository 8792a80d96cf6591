"""SketchEmbedNet: data, losses, schedules, sampling and protocol, at sizes that run in seconds."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sketchfast.data.dataset import StrokeDataset
from sketchfast.data.procedural import procedural
from sketchfast.data.strokes import Sketch, from_strokes
from sketchfast.methods import get_method
from sketchfast.methods import sketchembednet as module
from sketchfast.methods.base import DataSpec
from sketchfast.methods.sketchembednet import (
    SketchEmbedNet,
    SketchEmbedNetConfig,
    StrokeBatch,
    StrokeBatches,
    split_classes,
    stroke5,
    usable_drawings,
)
from sketchfast.models import mixture
from sketchfast.ops.raster import raster_bce, rasterize
from sketchfast.runs import read_checkpoint
from sketchfast.testing import available_impls
from sketchfast.train import RunOptions, train

DATA = Path(os.environ.get("SKETCHFAST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
TINY = replace(SketchEmbedNet.preset("tiny"), impl="reference")


@pytest.fixture(scope="module")
def drawings() -> StrokeDataset:
    return procedural(classes=8, instances=6, styles=2)


@pytest.fixture(autouse=True)
def _small_procedural(monkeypatch, drawings) -> None:
    monkeypatch.setattr(module, "read_drawings", lambda data, per_class=None: drawings)


def make(seed: int = 0, **fields) -> SketchEmbedNet:
    torch.manual_seed(seed)
    return SketchEmbedNet(replace(TINY, **fields))


def make_batch(method: SketchEmbedNet, count: int = 4) -> StrokeBatch:
    return method.train_data(DataSpec()).__getitems__(list(range(count)))


# --- config -----------------------------------------------------------------------------------------------


def test_default_is_the_paper() -> None:
    config = SketchEmbedNet.preset("paper")
    assert config == SketchEmbedNetConfig()
    got = (config.steps, config.batch_size, config.learning_rate, config.clip_value, config.latent_size)
    assert got == (300_000, 256, 1e-3, 1.0, 256)
    sizes = (config.hidden_size, config.hyper_size, config.embed_size, config.mixture_components)
    assert sizes == (1024, 512, 64, 30)
    assert (config.image_size, config.max_length, config.alpha_max) == (28, 64, 0.5)
    assert get_method("sketchembednet") is SketchEmbedNet


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("batch_size", 2.5, "batch_size must be an integer, got 2.5"),
        ("learning_rate", 0.0, "learning_rate must be greater than 0, got 0.0"),
        ("clip_value", -1.0, "clip_value must be at least 0, got -1.0"),
        ("clip_norm", -1.0, "clip_norm must be at least 0, got -1.0"),
        ("hidden_size", 0, "hidden_size must be at least 1, got 0"),
        ("lr_decay", -1.0, r"lr_decay must lie in \(0, 1\], got -1.0"),
        ("lr_decay", 0.0, r"lr_decay must lie in \(0, 1\], got 0.0"),
        ("lr_decay", float("nan"), "lr_decay must be finite, got nan"),
        ("recurrent_dropout", 1.0, r"recurrent_dropout must lie in \[0, 1\), got 1.0"),
        ("alpha_step", -0.1, r"alpha_step must lie in \[0, 1\], got -0.1"),
        ("alpha_max", 1.5, r"alpha_max must lie in \[0, 1\], got 1.5"),
        ("pixel_loss_above", 2.0, r"pixel_loss_above must lie in \[0, 1\], got 2.0"),
        ("split_seed", -1, "split_seed must be at least 0, got -1"),
    ],
)
def test_bad_fields_are_named(field: str, value: float, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        replace(TINY, **{field: value})


@pytest.mark.parametrize("preset", ["small", "tiny"])
def test_presets_keep_the_encoder(preset: str) -> None:
    small, paper = SketchEmbedNet.preset(preset), SketchEmbedNetConfig()
    assert (small.encoder, small.latent_size, small.image_size) == (
        paper.encoder,
        paper.latent_size,
        paper.image_size,
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"encoder": "vgg"}, "encoder must be one of conv4, resnet12, got 'vgg'"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"alpha_max": 1.5}, "alpha_max must lie in"),
        ({"held_out_classes": -0.1}, "held_out_classes must lie in"),
        ({"lr_decay_steps": -1}, "lr_decay_steps must be at least 0"),
    ],
)
def test_config_is_checked(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SketchEmbedNetConfig(**fields)
    with pytest.raises(ValueError, match="preset must be one of"):
        SketchEmbedNet.preset("large")


def test_alpha_grows_by_steps_to_its_cap() -> None:
    alpha = make(alpha_interval=10_000).alpha
    steps = [0, 9_998, 9_999, 19_999, 99_999, 299_999]
    assert [alpha(step) for step in steps] == pytest.approx([0, 0, 0.05, 0.1, 0.5, 0.5])
    shortened = make(steps=300, alpha_interval=0).alpha  # 0: a 30th of the steps
    assert [shortened(step) for step in (8, 9, 99)] == pytest.approx([0, 0.05, 0.5])


def test_learning_rate_decays_continuously() -> None:
    for fields in ({"lr_decay_steps": 20}, {"lr_decay_steps": 0, "steps": 400}):
        optimizer, schedule = make(**fields).optimizer()
        for _ in range(30):
            optimizer.step()
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.85**1.5)


# --- data -------------------------------------------------------------------------------------------------


def test_stroke5_of_a_known_drawing() -> None:
    sketch = from_strokes([[[0, 0], [4, 0]], [[4, 2], [0, 2], [0, 0]]])
    dataset = StrokeDataset.from_sketches([sketch], [0], ["a"])
    batch = StrokeBatches(dataset, max_points=7).__getitems__([0])
    assert batch.lengths.tolist() == [5]
    assert batch.points[0, :5].tolist() == [
        [-0.5, -0.25],
        [0.5, -0.25],
        [0.5, 0.25],
        [-0.5, 0.25],
        [-0.5, -0.25],
    ]
    assert batch.pen_down[0].tolist() == [True, False, True, True, False, False, False]
    assert stroke5(batch, torch.tensor(0.5))[0].tolist() == [
        [0, 0, 1, 0, 0],
        [2, 0, 0, 1, 0],
        [0, 1, 1, 0, 0],
        [-2, 0, 1, 0, 0],
        [0, -1, 0, 1, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1],
    ]


def test_what_cannot_be_drawn_is_left_out_and_counted() -> None:
    line = from_strokes([[[0, 0], [9, 1], [3, 5]]])
    dot = from_strokes([[[2, 2], [2, 2]]])
    long = from_strokes([np.random.default_rng(0).uniform(0, 100, (40, 2))])
    empty = Sketch(np.zeros((0, 2), np.float32), np.zeros(0, bool))
    dataset = StrokeDataset.from_sketches([line, dot, long, empty, line], [0, 0, 0, 0, 1], ["a", "b"])
    config = replace(TINY, max_length=24, simplify_tolerance=0.0)
    kept = usable_drawings(dataset, ["a"], config)
    assert len(kept) == 1
    assert kept.skipped == {"without extent": 2, "longer than 24 offsets": 1}
    known = replace(dataset, skipped={"broken file": 3})
    assert usable_drawings(known, ["b"], config).skipped == {"broken file": 3}
    simplified = usable_drawings(known, ["b"], replace(config, simplify_tolerance=0.02))
    assert simplified.skipped == {"broken file": 3}
    with pytest.raises(ValueError, match="data must hold drawings of 2 to 2 points, got none among 5"):
        usable_drawings(dataset, ["a"], replace(config, max_length=1))


def test_simplifying_keeps_the_picture_and_drops_points() -> None:
    corner = np.concatenate((np.linspace((0, 0), (50, 0), 20), np.linspace((50, 0), (50, 50), 20)))
    dataset = StrokeDataset.from_sketches([from_strokes([corner])], [0], ["a"])
    kept = usable_drawings(dataset, ["a"], replace(TINY, simplify_tolerance=0.02))
    assert kept.points.tolist() == [[0, 0], [50, 0], [50, 50]]


def test_split_depends_on_names_and_seed() -> None:
    names = [f"class {i}" for i in range(345)]
    train, held_out = split_classes(names, 45 / 345, 0)
    assert (len(train), len(held_out)) == (300, 45)
    assert set(train) | set(held_out) == set(names)
    assert split_classes(names[::-1], 45 / 345, 0) == (train, held_out)
    assert split_classes(names, 45 / 345, 1)[1] != held_out
    assert [len(part) for part in split_classes(["a", "b"], 0.01, 0)] == [1, 1]
    assert split_classes(["a", "b"], 0.0, 0) == (["a", "b"], [])


def test_training_data_has_no_held_out_class_and_offsets_of_unit_deviation(drawings) -> None:
    method = make(max_length=60)
    batches = method.train_data(DataSpec())
    train, held_out = split_classes(drawings.class_names, TINY.held_out_classes, 0)
    assert held_out
    assert int(method.training_classes) == len(train)
    assert int(method.training_drawings) == len(batches)
    batch = batches.__getitems__(list(range(len(batches))))
    y = stroke5(batch, method.offset_scale)
    inside = torch.arange(61)[None] < batch.lengths[:, None]
    inside[:, 0] = False
    assert y[..., :2][inside].std().item() == pytest.approx(1, rel=1e-3)
    assert "offset_scale" in method.state_dict()
    low, high = batch.points.amin(1), batch.points.amax(1)
    torch.testing.assert_close((high - low).amax(1), torch.ones(len(batches)))
    torch.testing.assert_close(low + high, torch.zeros(len(batches), 2), atol=1e-5, rtol=0)


def test_one_sample_is_a_row_of_the_batch() -> None:
    batches = make().train_data(DataSpec())
    for one, all_ in zip(batches[3], batches.__getitems__([2, 3]), strict=True):
        assert torch.equal(one, all_[1])


def test_omniglots_skipped_files_are_counted(monkeypatch) -> None:
    from sketchfast.data import omniglot, prepare

    sketch = from_strokes([[[0, 0], [9, 1], [30, 50]]])
    read = StrokeDataset.from_sketches(
        [sketch], [0], ["a"], skipped={"broken stroke file": 2}, extra={"drawer": np.array([7])}
    )
    monkeypatch.undo()
    monkeypatch.setattr(prepare, "load_prepared", lambda name, root: None)
    monkeypatch.setattr(omniglot, "load_omniglot_strokes", lambda root: read)
    drawings = module.read_drawings(DataSpec("omniglot", Path()))
    assert drawings.skipped == {"broken stroke file": 2}
    assert drawings.extra["drawer"].tolist() == [7]


def test_fingerprint_tells_data_sets_apart(drawings) -> None:
    def of(data: StrokeDataset) -> str:
        return StrokeBatches(data, 60).fingerprint

    moved = drawings.points.copy()
    moved[-1] += 1
    assert of(drawings) == of(drawings.subset(np.arange(len(drawings))))
    assert of(replace(drawings, points=moved)) != of(drawings)
    assert of(replace(drawings, class_names=drawings.class_names[::-1])) != of(drawings)
    assert of(drawings.subset(np.arange(len(drawings))[::-1])) != of(drawings)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DataSpec("mnist"), "data must be procedural, quickdraw, omniglot or sketchy"),
        (DataSpec("quickdraw"), "root must be"),
    ],
)
def test_unknown_data(monkeypatch, data: DataSpec, words: str) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match=words):
        make().train_data(data)


# --- loss -------------------------------------------------------------------------------------------------


def test_pen_and_stroke_loss_are_the_papers(monkeypatch) -> None:
    method = make(alpha_interval=10).double()
    batch = make_batch(method)
    batch = StrokeBatch(batch.points.double(), batch.pen_down, batch.lengths)
    seen = {}
    decode = method.decode
    monkeypatch.setattr(method, "decode", lambda y, z: seen.setdefault("p", decode(y, z)))
    losses = method.loss(batch, 0)
    y = stroke5(batch, method.offset_scale)[:, 1:]
    steps, count = y.shape[1], len(y)
    pen = stroke = 0.0
    for b in range(count):
        for t in range(steps):
            at = mixture.parse_mixture(seen["p"][t, b])
            pen -= torch.log_softmax(at.pen_logits, -1)[int(y[b, t, 2:].argmax())].item()
            stroke -= mixture.log_likelihood(at, y[b, t, :2]).item() * (1 - y[b, t, 4].item())
    assert losses["pen"].item() == pytest.approx(pen / (steps * count))
    assert losses["stroke"].item() == pytest.approx(stroke / (steps * count))
    assert losses["loss"].item() == pytest.approx((pen + stroke) / (steps * count))
    assert "pixel" not in losses


@pytest.mark.parametrize(
    ("alpha", "above", "present"), [(0.1, 0.1, False), (0.1, 0.0, True), (0.5, 0.1, True)]
)
def test_pixel_loss_joins_above_its_threshold(alpha: float, above: float, present: bool) -> None:
    method = make(alpha_interval=1, alpha_step=alpha, alpha_max=alpha, pixel_loss_above=above)
    losses = method.loss(make_batch(method), 5)
    assert ("pixel" in losses) is present
    want = losses["pen"] + (1 - alpha) * losses["stroke"]
    if present:
        want = want + alpha * losses["pixel"]
    torch.testing.assert_close(losses["loss"], want)
    losses["loss"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_pixel_loss_of_the_drawing_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn", torch.zeros)  # the mean of the likeliest component
    method = make()
    batch = make_batch(method)
    y = stroke5(batch, method.offset_scale)[:, 1:].transpose(0, 1)
    nothing = torch.zeros_like(y[..., :1])
    likely, other = nothing + 1, nothing
    perfect = torch.cat(  # the second of two components
        (y[..., 2:] * 20, other, likely, nothing, y[..., :1], nothing, y[..., 1:2], *[nothing] * 6), dim=-1
    )
    points = method.to_pixels(batch.points)
    image = rasterize(points, batch.pen_down, 28, lengths=batch.lengths, blur_sigma=2.0, impl="reference")
    want = raster_bce(points, batch.pen_down, image, lengths=batch.lengths, blur_sigma=2.0, impl="reference")
    torch.testing.assert_close(method.pixel_loss(perfect, batch), want.mean(), rtol=1e-4, atol=1e-5)
    shifted = perfect.clone()
    shifted[..., 6] += 0.5
    assert method.pixel_loss(shifted, batch) > want.mean() * 1.05


@pytest.mark.skipif("native" not in available_impls("cpu"), reason="the CPU library was not built")
@pytest.mark.parametrize("alpha", [0.05, 0.5])
def test_losses_and_gradients_are_the_same_on_every_impl(alpha: float) -> None:
    """The mixture's loss in one pass against the eager formula, with the pixel loss and without."""
    found = []
    for impl in ("reference", "native"):
        method = make(impl=impl, alpha_interval=1, alpha_step=alpha, alpha_max=alpha)
        torch.manual_seed(3)
        losses = method.loss(make_batch(method), 5)
        losses["loss"].backward()
        gradients = {name: p.grad for name, p in method.named_parameters()}
        found.append(({name: torch.as_tensor(x).detach() for name, x in losses.items()}, gradients))
    assert ("pixel" in found[0][0]) == (alpha > 0.1)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


def test_rendered_drawings_keep_the_padding() -> None:
    method = make()
    images = method.render(make_batch(method, 8))
    assert images.shape == (8, 1, 28, 28)
    ink = images[:, 0] > 0.5
    for picture in ink:
        rows, columns = picture.nonzero().unbind(1)
        assert min(rows.min(), columns.min()) >= 2
        assert max(rows.max(), columns.max()) <= 25
        assert max(rows.max() - rows.min(), columns.max() - columns.min()) >= 20


def test_training_lowers_the_loss_and_repeats_under_a_seed() -> None:
    def run() -> list[float]:
        method = make(seed=3, learning_rate=5e-3, lr_decay_steps=1000)
        batch = make_batch(method, 8)
        optimizer, _ = method.optimizer()
        values = []
        for step in range(25):
            loss = method.loss(batch, step)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        assert int(method.steps_trained) == 25
        return values

    first = run()
    assert first[-1] < first[0] - 0.3
    assert run() == first


# --- use --------------------------------------------------------------------------------------------------


def test_embedding_is_the_mean_and_takes_any_size() -> None:
    method = make().eval()
    images = method.render(make_batch(method))
    vectors = method.embed(images)
    assert vectors.shape == (4, 256)
    assert torch.equal(vectors, method.encode(images)[0])
    torch.testing.assert_close(method.embed(images.expand(-1, 3, -1, -1)), vectors)
    doubled = torch.nn.functional.interpolate(images, (56, 56), mode="nearest")
    near = torch.nn.functional.cosine_similarity(method.embed(doubled), vectors)
    assert near.min() > 0.95
    with pytest.raises(TypeError, match="images must be floating point"):
        method.embed((images * 255).byte())
    with pytest.raises(ValueError, match=r"images must have shape \[B, C, H, W\]"):
        method.embed(images[0])


def test_drawing_follows_the_decoder() -> None:
    """With teacher forcing on its own drawing, the decoder's likeliest outputs are that drawing."""
    method = make(seed=1, max_length=6).eval()
    with torch.no_grad():
        method.head.bias[2] = -20  # never ends
        images = method.render(make_batch(make()))
        z = method.encode(images)[0]
        y = [torch.tensor([0.0, 0, 1, 0, 0]).expand(4, 1, 5)]
        for _ in range(6):
            at = mixture.parse_mixture(method.decode(torch.cat(y, 1), z)[-1])
            offset, pen = mixture.sample(at, 0.0)
            y.append(torch.cat((offset, torch.nn.functional.one_hot(pen, 3)), -1)[:, None])
    path = torch.cumsum(torch.cat(y, 1)[..., :2], 1)
    low, high = path.amin(1, keepdim=True), path.amax(1, keepdim=True)
    want = (path - (low + high) / 2) / (high - low).amax(2, keepdim=True) * 22 + 13.5
    for sketch, points in zip(method.draw(images), want, strict=True):
        np.testing.assert_allclose(sketch.points, points.numpy(), atol=1e-3)


def test_generated_pictures_are_those_of_what_is_drawn() -> None:
    method = make(seed=1).eval()
    images = method.render(make_batch(method))
    for how in ({}, {"temperature": 0.7, "seed": 4}):
        points, pens, lengths = method.draw_strokes(images, **how)
        want = rasterize(points, pens, 28, lengths=lengths, impl="reference")
        pictures = method.generate(method.embed(images), **how)
        assert pictures.shape == (4, 28, 28)
        assert not pictures.requires_grad
        torch.testing.assert_close(pictures, want.detach())
    assert method.generate(torch.randn(2, 256) * 5).max() <= 1
    with pytest.raises(ValueError, match=r"z must have shape \[B, 256\], got \(2, 255\)"):
        method.generate(torch.zeros(2, 255))
    with pytest.raises(TypeError, match="z must be floating point"):
        method.generate(torch.zeros(2, 256, dtype=torch.int64))


def test_a_run_of_before_a_field_of_the_config_goes_on(tmp_path) -> None:
    """Older checkpoints do not know the newer fields, which had no other value then than the default."""
    options = RunOptions(tmp_path / "run", accelerator="cpu", picture_every=0)
    train("sketchembednet", replace(TINY, steps=2), DataSpec(), options, preset="tiny")
    path = tmp_path / "run" / "checkpoints" / "step-000000002.pt"
    state = read_checkpoint(path)
    for name in ("image_channels", "keep_overlap"):
        del state["config"][name]
    torch.save(state, path)
    summary = train("sketchembednet", TINY, DataSpec(), replace(options, resume=True), preset="tiny")
    assert summary.step == TINY.steps == 3
    state["config"]["latent_size"] = 128
    torch.save(state, path)
    (tmp_path / "run" / "checkpoints" / "step-000000003.pt").unlink()
    with pytest.raises(ValueError, match=r"is of another run: latent_size was 128, is 256$"):
        train("sketchembednet", TINY, DataSpec(), replace(options, resume=True), preset="tiny")


def test_draw_gives_sketches_within_the_canvas() -> None:
    method = make(seed=1).eval()
    images = method.render(make_batch(method))
    sketches = method.draw(images, temperature=0.7, seed=4)
    again = method.draw(images, temperature=0.7, seed=4)
    other = method.draw(images, temperature=0.7, seed=5)
    for sketch in sketches:
        assert isinstance(sketch, Sketch)
        assert sketch.points.dtype == np.float32
        assert 1 <= len(sketch.points) == len(sketch.pen_down) <= TINY.max_length + 1
        assert sketch.points.min() >= 2.4
        assert sketch.points.max() <= 24.6
    assert all(np.array_equal(a.points, b.points) for a, b in zip(sketches, again, strict=True))
    assert not all(np.array_equal(a.points, b.points) for a, b in zip(sketches, other, strict=True))


def test_a_drawing_that_ends_at_once_is_a_point() -> None:
    method = make().eval()
    with torch.no_grad():
        method.head.bias[2] = 50
    (sketch,) = method.draw(torch.zeros(1, 1, 28, 28))
    assert sketch.points.tolist() == [[13.5, 13.5]]
    assert sketch.pen_down.tolist() == [False]


def test_pictures_belong_together_and_leave_the_mode_alone() -> None:
    method = make()
    batch = make_batch(method, 6)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    pictures = method.pictures(batch, count=5)
    assert {name: tuple(images.shape) for name, images in pictures.items()} == dict.fromkeys(
        ("input", "target", "drawn"), (5, 28, 28)
    )
    assert all(images.min() >= 0 and images.max() <= 1 for images in pictures.values())
    torch.testing.assert_close(pictures["input"], method.render(batch)[:5, 0])
    assert method.training
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


@pytest.mark.skipif(not (DATA / "quickdraw").is_dir(), reason=f"no QuickDraw in {DATA}")
def test_training_on_quickdraw(monkeypatch) -> None:
    monkeypatch.undo()
    method = make()
    batches = method.train_data(DataSpec("quickdraw", DATA / "quickdraw"))
    assert 200 < int(method.training_classes) <= 300  # some have no short drawing among the few taken
    assert 300 < len(batches) <= 300 * TINY.drawings_per_class
    assert torch.isfinite(method.loss(batches.__getitems__(list(range(16))), 0)["loss"])
