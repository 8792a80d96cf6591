"""SketchEmbedNet and its baselines on natural images: procedural photos, and a made-up tree of Sketchy."""

from __future__ import annotations

import inspect
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sketchfast.cli import main
from sketchfast.data.archive import LayoutError
from sketchfast.data.dataset import StrokeDataset
from sketchfast.data.prepare import prepare
from sketchfast.data.procedural import photo, procedural
from sketchfast.data.sketchy import load_sketchy, load_sketchy_photos, overlaps_mini_imagenet
from sketchfast.methods import get_method
from sketchfast.methods import sketchembednet as module
from sketchfast.methods.base import DataSpec
from sketchfast.methods.sketchembednet import (
    SKETCHY_RUN,
    PhotoStrokeBatch,
    SketchEmbedNet,
    SketchEncoder,
    StrokeBatch,
    embed_images,
    read_drawings,
    read_photos,
    training_facts,
)
from sketchfast.methods.sketchembednet_protocols import fewshot
from sketchfast.runs import load_method, read_checkpoint

METHODS = ("sketchembednet", "conv_vae", "contrastive")
TX = "tx_000000000000"
PHOTO_FIELDS = {"image_channels": 3, "impl": "reference"}


@pytest.fixture(scope="module")
def drawings() -> StrokeDataset:
    return procedural(classes=6, instances=5, styles=3)


@pytest.fixture
def small(monkeypatch, drawings) -> None:
    monkeypatch.setattr(module, "read_drawings", lambda data, per_class=None: drawings)


def make(name: str = "sketchembednet", seed: int = 0, **fields) -> SketchEncoder:
    torch.manual_seed(seed)
    kind = get_method(name)
    return kind(replace(kind.preset("tiny"), **{**PHOTO_FIELDS, **fields}))  # type: ignore[return-value]


# --- mini-ImageNet ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overlaps"),
    [
        ("ant/n02219486_58", True),
        ("ant/n02219486_58-3", True),  # a sketch of it
        ("lion/n02129165_1", True),
        ("hourglass/n03544143_20", True),
        ("armor/n03146219_4", True),  # cuirass
        ("armor/n03000247_4", False),  # chain mail
        ("crab/n01981276_9", True),  # king crab
        ("crab/n01978287_9", False),  # Dungeness crab
        ("guitar/n03272010_2", True),  # electric guitar
        ("guitar/n03467517_2", True),  # guitar, above it
        ("guitar/n02676566_2", False),  # acoustic guitar, beside it
        ("dog/n02103406_7", True),  # working dog, above malamute
        ("dog/n02106662_7", False),  # German shepherd
        ("airplane/n02691156_58", False),
        ("ant/3-1", False),
        ("n02219486_58", True),
        ("ant/n0221948_58", False),
    ],
)
def test_overlap_goes_by_the_wordnet_id(name: str, overlaps: bool) -> None:
    assert overlaps_mini_imagenet(name) is overlaps


# --- procedural photos ------------------------------------------------------------------------------------


def test_procedural_photos_show_what_is_drawn(drawings) -> None:
    with_photos, photos = read_photos(DataSpec(), drawings, 24)
    assert photos.shape == (30, 3, 24, 24)
    assert photos.dtype == np.uint8
    rows = with_photos.extra["photo"]
    for index in (0, 1, 2, 16, 44, 89):
        name = drawings.class_names[drawings.labels[index]]
        instance = int(drawings.extra["instance"][index])
        np.testing.assert_array_equal(photos[rows[index]], photo(name, instance, 24))
    assert np.unique(rows, return_counts=True)[1].tolist() == [3] * 30  # a photo for three hands
    np.testing.assert_array_equal(with_photos.points, drawings.points)


def test_a_batch_is_strokes_with_their_photos(small, drawings) -> None:
    method = make()
    data = method.train_data(DataSpec())
    batch = data.__getitems__([3, 0, 3])
    assert isinstance(batch, PhotoStrokeBatch)
    assert batch.photos.dtype == torch.uint8
    assert batch.photos.shape == (3, 3, 28, 28)
    assert torch.equal(batch.photos[0], batch.photos[2])
    images = method.inputs(batch)
    torch.testing.assert_close(images, batch.photos.float() / 255)
    assert images.max() <= 1
    plain = make_plain().train_data(DataSpec())
    for part, same in zip(batch[:3], plain.__getitems__([3, 0, 3]), strict=True):
        assert torch.equal(part, same)
    for one, row in zip(data[3], data.__getitems__([3]), strict=True):
        assert torch.equal(one, row[0])
    assert data.fingerprint != plain.fingerprint
    assert make(image_size=32).train_data(DataSpec()).fingerprint != data.fingerprint


def make_plain() -> SketchEmbedNet:
    return SketchEmbedNet(replace(SketchEmbedNet.preset("tiny"), impl="reference"))


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_every_parameter(small, name: str) -> None:
    method = make(name, alpha_interval=1) if name == "sketchembednet" else make(name)
    losses = method.loss(method.train_data(DataSpec()).__getitems__([0, 15, 30, 45]), 30)
    losses["loss"].backward()
    assert method.encoder.channels == 3
    for key, parameter in method.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


def test_training_on_photos_lowers_the_loss(small) -> None:
    method = make(learning_rate=5e-3, lr_decay_steps=1000)
    batch = method.train_data(DataSpec()).__getitems__(list(range(0, 48, 6)))
    optimizer, _ = method.optimizer()
    values = []
    for step in range(25):
        loss = method.loss(batch, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0] - 0.3


@pytest.mark.parametrize("name", METHODS)
def test_pictures_show_the_photo(small, name: str) -> None:
    method = make(name)
    batch = method.train_data(DataSpec()).__getitems__(list(range(6)))
    pictures = method.pictures(batch, count=4)
    torch.testing.assert_close(pictures["input"], batch.photos[:4].float() / 255)
    colour = {"input", "reconstruction"}
    for key, images in pictures.items():
        assert images.shape == ((4, 3, 28, 28) if key in colour else (4, 28, 28)), key


def test_embedding_takes_rgb_of_any_size_and_ink_as_dark_on_white(small) -> None:
    method = make().eval()
    assert method.takes_colour
    assert not make_plain().takes_colour
    images = torch.rand(2, 3, 50, 40)
    assert method.embed(images).shape == (2, 256)
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, H, W\], got \(2, 1, 28, 28\)"):
        method.embed(torch.rand(2, 1, 28, 28))
    rgb = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), np.uint8)
    want = method.embed(torch.from_numpy(rgb).permute(0, 3, 1, 2).float() / 255)
    np.testing.assert_allclose(embed_images(method, rgb), want.numpy(), rtol=1e-5, atol=1e-6)
    ink = rgb[..., 0]
    as_rgb = np.repeat(255 - ink[..., None], 3, axis=3)
    np.testing.assert_allclose(embed_images(method, ink), embed_images(method, as_rgb), atol=1e-5)


def test_fewshot_of_a_photo_network_is_on_photos(small) -> None:
    method, untrained = make(held_out_classes=0.5), make(seed=1, held_out_classes=0.5)
    method.train_data(DataSpec())
    (table,) = fewshot(method, untrained, DataSpec(), episodes=4, ways=(3,), shots=(1,))
    assert table.title == "Few-shot classification: photos of held-out classes of procedural"
    assert "15 images of 3 classes" in table.note
    assert "paper: Sketchy" in table.note
    assert "image_channels" not in table.note


# --- Sketchy ----------------------------------------------------------------------------------------------


def jpeg(left: int, right: int, side: int = 32) -> bytes:
    pixels = np.full((side, side, 3), right, np.uint8)
    pixels[:, : side // 2] = left
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def svg(width: int, height: int, shift: int = 0) -> bytes:
    path = f"M{10 + shift} 10 L{90 + shift} 20 L40 {70 + shift} L20 15"
    return (
        f'<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">'
        f'<g><path d="{path}"/></g></svg>'
    ).encode()


@pytest.fixture(scope="module")
def sketchy(tmp_path_factory) -> Path:
    """Photos twice as wide as high (bat) and the reverse (cat), of ants, and of guitars of two kinds."""
    sizes = {"bat/n02139199": (400, 200), "cat/n02121620": (200, 400), "ant/n02219486": (300, 300)}
    sizes |= {"guitar/n02676566": (300, 300), "guitar/n03272010": (300, 300)}
    files: dict[str, bytes] = {}
    for kind, (width, height) in sizes.items():
        for number in range(3):
            files[f"256x256/photo/{TX}/{kind}_{number}.jpg"] = jpeg(200, 100 + 10 * number)
            for sketch in (1, 2):
                path = f"sketches-06-04/sketches/{kind}_{number}-{sketch}.svg"
                files[path] = svg(width, height, 3 * sketch + number)
    files["sketches-06-04/sketches/bat/invalid.txt"] = b"n02139199_0-2\n"
    files["sketches-06-04/sketches/bat/n02139199_9-1.svg"] = svg(400, 200)  # no such photo
    no_size = svg(400, 200).replace(b' viewBox="0 0 400 200"', b"")
    files["sketches-06-04/sketches/cat/n02121620_0-3.svg"] = no_size
    root = tmp_path_factory.mktemp("sketchy")
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_sketchy_keeps_proportions_pairs_and_counts(sketchy) -> None:
    data = DataSpec("sketchy", sketchy)
    drawings = read_drawings(data)
    assert drawings.skipped == {"marked invalid": 1}
    paired, photos = read_photos(data, drawings, 32)
    assert paired.skipped == {"marked invalid": 1, "no photo or no size": 2}
    assert len(paired) == 29
    assert photos.shape == (15, 3, 32, 32)
    shown = dict(zip(paired.extra["key"].tolist(), paired.extra["photo"].tolist(), strict=True))
    assert shown["bat/n02139199_1-1"] == shown["bat/n02139199_1-2"] != shown["bat/n02139199_2-1"]
    wide, high = photos[shown["bat/n02139199_1-1"]], photos[shown["cat/n02121620_2-1"]]
    assert (wide[:, :8] == 0).all()
    assert (wide[:, 24:] == 0).all()
    assert wide[:, 9:23].min() > 90
    assert abs(int(wide[0, 16, 4]) - 200) < 8
    assert abs(int(wide[0, 16, 28]) - 110) < 8
    assert (high[:, :, :8] == 0).all()
    assert (high[:, :, 24:] == 0).all()
    assert abs(int(high[0, 16, 22]) - 120) < 8


@pytest.mark.parametrize("channels", [1, 3])
def test_what_overlaps_with_mini_imagenet_is_left_out_of_training(sketchy, channels: int) -> None:
    data = DataSpec("sketchy", sketchy)
    fields = {"image_channels": channels, "held_out_classes": 0.0, "drawings_per_class": 0}
    method = make(**fields) if channels == 3 else SketchEmbedNet(replace(make_plain().config, **fields))
    batches = method.train_data(data)
    assert batches.skipped["overlap with mini-ImageNet's test classes"] == 12  # ants and electric guitars
    assert int(method.training_classes) == 3  # of guitars, the acoustic ones remain
    kept = type(method)(replace(method.config, keep_overlap=True)).train_data(data)
    assert len(kept) == len(batches) + 12
    assert "overlap with mini-ImageNet's test classes" not in kept.skipped
    few = type(method)(replace(method.config, drawings_per_class=2)).train_data(data)
    assert len(few) <= 6


def test_sketchys_photos_are_read_alone_or_from_the_cache(sketchy, tmp_path) -> None:
    photos = load_sketchy_photos(sketchy, size=16)
    assert len(photos) == 15
    assert photos.names[0] == "ant/n02219486_0"
    with pytest.raises(LayoutError, match="256x256/sketch"):
        load_sketchy(sketchy)  # it has no sketches
    with pytest.raises(LayoutError, match=r"256x256/photo/tx_000000000000/<class>"):
        load_sketchy_photos(tmp_path)
    for path in sketchy.rglob("*.jpg"):
        for domain, suffix in (("photo", ".jpg"), ("sketch", "-1.png")):
            copy = tmp_path / f"256x256/{domain}/{TX}/{path.parent.name}/{path.stem}{suffix}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).save(copy, quality=95)
    fresh = load_sketchy_photos(tmp_path, size=16)
    prepare("sketchy", tmp_path, size=16)
    cached = load_sketchy_photos(tmp_path, size=16)
    assert isinstance(cached.images, np.memmap)
    assert cached.names == fresh.names
    np.testing.assert_array_equal(cached.images, fresh.images)


def test_sketchy_strokes_without_their_photos_are_refused(sketchy, tmp_path) -> None:
    drawings = read_drawings(DataSpec("sketchy", sketchy))
    path = tmp_path / f"256x256/photo/{TX}/bat/n02139199_77.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(jpeg(1, 2))
    with pytest.raises(ValueError, match="data must hold photos of its drawings, got none for 31"):
        read_photos(DataSpec("sketchy", tmp_path), drawings, 16)


def test_data_without_photos_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data must be one with photos \(procedural, sketchy\).* 'quickdraw'"
    ):
        make().train_data(DataSpec("quickdraw", Path()))
    with pytest.raises(ValueError, match="image_channels must be 1 or 3, got 4"):
        replace(make().config, image_channels=4)
    with pytest.raises(TypeError, match="keep_overlap must be a bool, got 1"):
        replace(make().config, keep_overlap=1)
    with pytest.raises(ValueError, match="root must be the folder that holds sketchy, got None"):
        make().train_data(DataSpec("sketchy"))


def test_the_papers_run_on_sketchy_is_the_documented_one() -> None:
    flags = dict(re.findall(r"--([a-z-]+) (\S+)", inspect.getdoc(SketchEmbedNet) or ""))
    flags = {name.replace("-", "_"): value for name, value in flags.items() if name not in ("data", "root")}
    assert flags == {name: str(value) for name, value in SKETCHY_RUN.items()}
    config = replace(SketchEmbedNet.preset("paper"), **SKETCHY_RUN)
    assert (config.steps, config.learning_rate, config.latent_size) == (300_000, 1e-3, 256)
    small = replace(config, hidden_size=8, hyper_size=4, embed_size=2)
    facts = training_facts(SketchEmbedNet(small))
    assert facts.endswith(
        "Other sizes: hidden_size 8 (paper 1024), hyper_size 4 (paper 512), embed_size 2 (paper 64)."
    )
    overlapping = replace(small, keep_overlap=True, latent_size=8)
    assert training_facts(SketchEmbedNet(overlapping)).endswith(
        "latent_size 8 (paper 256), keep_overlap True (paper False)."
    )


# --- command line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_whole_run_bit_for_bit(tmp_path, sketchy, name: str) -> None:
    words = ["train", name, "--preset", "tiny", "--image-channels", "3", "--accelerator", "cpu"]
    words += ["--data", "sketchy", "--root", str(sketchy), "--held-out-classes", "0.3", "--batch-size", "4"]
    states = []
    for folder, stops in (("whole", (4,)), ("parts", (2, 4))):
        out = tmp_path / folder
        for stop in stops:
            more = ["--resume"] if stop != stops[0] else []
            assert main([*words, "--log-every", "1", "--out", str(out), "--steps", str(stop), *more]) == 0
        states.append(read_checkpoint(out / "checkpoints" / "step-000000004.pt"))
    for key, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][key]), key
    assert (tmp_path / "whole/metrics.csv").read_bytes() == (tmp_path / "parts/metrics.csv").read_bytes()
    assert load_method(tmp_path / "whole")[0].takes_colour


def test_embed_and_draw_read_the_photo_in_colour(tmp_path, sketchy, monkeypatch, capsys) -> None:
    out = tmp_path / "run"
    words = ["--preset", "tiny", "--image-channels", "3", "--steps", "1", "--accelerator", "cpu"]
    assert main(["train", "sketchembednet", *words, "--out", str(out)]) == 0
    image = sketchy / f"256x256/photo/{TX}/bat/n02139199_1.jpg"
    assert main(["embed", str(out), str(image), "--out", str(tmp_path / "e.npz")]) == 0
    method = load_method(out)[0]
    with Image.open(image) as picture:
        pixels = np.asarray(picture.convert("RGB").resize((28, 28), Image.Resampling.BILINEAR), np.float32)
    want = method.embed(torch.from_numpy(pixels / 255).permute(2, 0, 1)[None])
    np.testing.assert_allclose(np.load(tmp_path / "e.npz")["embeddings"], want.numpy(), rtol=1e-4, atol=1e-5)
    assert main(["draw", str(out), str(image), "--out", str(tmp_path / "d.png")]) == 0
    assert (tmp_path / "d.svg").exists()


def test_a_drawing_network_still_has_plain_batches(small) -> None:
    assert isinstance(make_plain().train_data(DataSpec()).__getitems__([0]), StrokeBatch)
