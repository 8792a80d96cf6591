"""The picture protocols on a fake network whose codes are its pixels, so that their answers are known."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sketchfast.data.dataset import StrokeDataset
from sketchfast.data.procedural import procedural
from sketchfast.evaluate import probes
from sketchfast.methods import sketchembednet as networks_module
from sketchfast.methods import sketchembednet_figures as module
from sketchfast.methods.base import DataSpec, Table
from sketchfast.methods.sketchembednet import (
    StrokeBatch,
    compared_networks,
    split_classes,
    usable_drawings,
)
from sketchfast.methods.sketchembednet_figures import (
    FIGURE_PROTOCOLS,
    Triple,
    parse_triple,
)
from sketchfast.ops.raster import rasterize

CLASSES = ["snowman", "television", "envelope", "house", "star", "tree"]


@dataclass(frozen=True)
class Config:
    latent_size: int = 14 * 14
    image_size: int = 28
    max_length: int = 200
    simplify_tolerance: float = 0.0
    held_out_classes: float = 0.34
    split_seed: int = 0
    drawings_per_class: int = 0


class Fake(nn.Module):
    """The code is the image at half its size, the picture a code at twice its own; noise where asked for."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.config, self.takes_colour, self.trained_on = Config(), False, "procedural"
        self.gain = nn.Parameter(torch.tensor(gain))
        for name in ("steps_trained", "training_drawings", "training_classes"):
            self.register_buffer(name, torch.tensor(7))

    def render(self, batch: StrokeBatch) -> Tensor:
        points = batch.points * 22 + 13.5
        return rasterize(points, batch.pen_down, 28, lengths=batch.lengths, impl="reference")[:, None]

    def fit_images(self, images: Tensor) -> Tensor:
        return F.interpolate(images, (28, 28))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.gain * F.avg_pool2d(images.mean(dim=1), 2).flatten(1)
        return mean, torch.full_like(mean, -6.0)

    def generate(self, z: Tensor, *, temperature: float = 0.0, seed: int = 0) -> Tensor:
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
        codes = z / self.gain + 0.1 * temperature * noise
        return F.interpolate(codes.view(-1, 1, 14, 14), (28, 28))[:, 0].clamp(0, 1)


class SketchEmbedNet(Fake):
    pass


class ConvVAE(Fake):
    pass


class Contrastive(Fake):
    def generate(self, z: Tensor, *, temperature: float = 0.0, seed: int = 0) -> Tensor:
        raise NotImplementedError("no decoder")


@pytest.fixture(scope="module")
def drawings() -> StrokeDataset:
    return procedural(classes=CLASSES, instances=4, styles=2)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, drawings: StrokeDataset) -> None:
    monkeypatch.setattr(module, "read_drawings", lambda data, per_class=None: drawings)
    monkeypatch.setattr(
        networks_module, "training_facts", lambda network: f"Trained {int(network.steps_trained)} steps."
    )
    monkeypatch.setattr(module, "_UNSEEN_INSTANCES", range(1000, 1001))
    monkeypatch.setattr(
        probes, "umap_plane", lambda vectors, *, neighbours, seed: vectors[:, 90:92].astype(np.float64) + seed
    )


@pytest.fixture
def omniglot(tmp_path: Path) -> Path:
    """Twelve evaluation characters of one drawer: a bar each at a place of its own."""
    for number in range(12):
        pixels = np.full((105, 105), True)
        pixels[8 * number : 8 * number + 6, 10:95] = False
        folder = tmp_path / "images_evaluation" / "Bars" / f"character{number + 1:02}"
        folder.mkdir(parents=True)
        Image.fromarray(pixels).save(folder / f"{number + 1:04}_01.png")
    return tmp_path


def run(name: str, **flags: object) -> Table:
    (table,) = FIGURE_PROTOCOLS[name](SketchEmbedNet(), SketchEmbedNet(0.5), DataSpec(), **flags)
    return table


def pixels(table: Table) -> np.ndarray:
    (png,) = table.pictures.values()
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


SMALL = {
    "arrangement": {"examples": 6, "most": 2},
    "spatial": {"examples": 20},
    "composition": {"examples": 4, "shown": 2},
    "drawings": {"images": 6, "shown": 3},
    "one_shot": {"characters": 6, "shown": 3, "samples": 2},
}


def test_every_figure_has_its_protocol() -> None:
    assert list(FIGURE_PROTOCOLS) == ["drawings", "composition", "arrangement", "spatial", "one_shot"]


@pytest.mark.parametrize("name", FIGURE_PROTOCOLS)
def test_protocols_repeat_for_a_seed_and_say_what_was_trained(name: str, omniglot: Path) -> None:
    flags = SMALL[name] | ({"omniglot": omniglot} if name in ("one_shot", "drawings") else {})
    first, again, other = (run(name, **flags, seed=seed) for seed in (0, 0, 1))
    assert (first.rows, first.pictures) == (again.rows, again.pictures)
    assert first.pictures != other.pictures
    assert "SketchEmbedNet (procedural): Trained 7 steps." in first.note
    assert all(isinstance(value, int | float | str | None) for row in first.rows for value in row.values())
    assert pixels(first).shape[1] > 200


# --- networks ----------------------------------------------------------------------------------------------


def test_networks_stand_in_the_papers_order() -> None:
    method, untrained, vae, contrastive = SketchEmbedNet(), SketchEmbedNet(), ConvVAE(), Contrastive()
    found = compared_networks(method, untrained, contrastive=contrastive, conv_vae=vae)
    assert list(found.items()) == [
        ("untrained", untrained),
        ("Conv-VAE", vae),
        ("Contrastive", contrastive),
        ("SketchEmbedNet", method),
    ]
    assert list(compared_networks(vae, None, sketchembednet=method)) == ["Conv-VAE", "SketchEmbedNet"]
    assert list(compared_networks(method, untrained)) == ["untrained", "SketchEmbedNet"]


@pytest.mark.parametrize(
    ("method", "flags", "words"),
    [
        (
            SketchEmbedNet,
            {"conv_vae": Contrastive},
            "conv_vae must be a run of ConvVAE, got one of Contrastive",
        ),
        (ConvVAE, {"conv_vae": ConvVAE}, "conv_vae must be left out: the run evaluated is one itself"),
        (Fake, {}, "method must be one of ConvVAE, Contrastive, SketchEmbedNet, got Fake"),
    ],
)
def test_other_networks_are_refused(method: type, flags: dict[str, type], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compared_networks(method(), None, **{name: kind() for name, kind in flags.items()})


def test_a_network_of_photos_sees_sketches_dark_on_white() -> None:
    ink_network, photo_network = Fake(), Fake()
    photo_network.takes_colour = True
    ink = np.zeros((1, 28, 28), np.uint8)
    ink[0, :14] = 255
    codes = {
        (name, kind): module.encode_images(network, images)[0].detach().view(14, 14)  # type: ignore[arg-type]
        for name, network in (("ink", ink_network), ("photo", photo_network))
        for kind, images in (("ink", ink), ("photo", np.repeat(255 - ink[..., None], 3, axis=3)))
    }
    for (name, _), code in codes.items():
        top = 1.0 if name == "ink" else 0.0
        torch.testing.assert_close(code[:7], torch.full((7, 14), top))
        torch.testing.assert_close(code[7:], torch.full((7, 14), 1 - top))


def test_decoded_photos_are_shown_in_colour() -> None:
    class Photos(ConvVAE):
        def generate(self, z: Tensor, *, temperature: float = 0.0, seed: int = 0) -> Tensor:
            ink = super().generate(z, temperature=temperature, seed=seed)
            return torch.stack((torch.ones_like(ink), 1 - ink, 1 - ink), dim=1)  # red ink

    drawn = module.generate_images(Photos(), torch.ones(2, 196), temperature=0.0, seed=0)  # type: ignore[arg-type]
    assert drawn.shape == (2, 28, 28, 3)
    assert drawn[0, 5, 5].tolist() == [255, 0, 0]
    Photos.__name__ = "ConvVAE"
    table = run("composition", examples=2, shown=1, conv_vae=Photos())
    red = (pixels(table).astype(int) - [255, 0, 0]).__abs__().max(axis=2) < 60
    assert red.sum() > 50


# --- arrangement and space ---------------------------------------------------------------------------------


def test_arrangement_has_a_row_a_relation_and_network() -> None:
    table = run("arrangement", **SMALL["arrangement"], conv_vae=ConvVAE(), contrastive=Contrastive())
    assert [(row["relation"], row["network"]) for row in table.rows] == [
        (relation, network)
        for relation in ("numerosity", "placement", "containment")
        for network in ("untrained", "Conv-VAE", "Contrastive", "SketchEmbedNet")
    ]
    assert [row["chance"] for row in table.rows[::4]] == [25.0, 25.0, 33.33]
    # one code, scaled: all networks have the same neighbours, and pixels tell placements apart
    assert len({row["k-NN accuracy"] for row in table.rows[4:8]}) == 1
    assert table.rows[4]["k-NN accuracy"] > 60
    assert "circle and square: drawn by rule" in table.note
    assert (
        "Conv-VAE (procedural), Contrastive (procedural), SketchEmbedNet (procedural): Trained 7 steps."
        in table.note
    )


def test_drawings_of_the_data_are_landmarks_of_numerosity(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def picture(found, examples, panels, *, title):
        seen.extend([list(panel.landmarks) for panel in of_network] for of_network in panels.values())
        shapes = [
            panel.landmarks["snowman"].shape for of_network in panels.values() for panel in of_network[:1]
        ]
        assert shapes == [(5, 2)] * 2
        return b""

    monkeypatch.setattr(probes, "arrangement_picture", picture)
    run("arrangement", examples=5, most=2)
    assert seen == [[["snowman", "television"], [], []]] * 2


def test_spatial_measures_what_pixels_know() -> None:
    table = run("spatial", examples=120)
    assert [row["variable"] for row in table.rows[::2]] == ["distance", "angle", "size"]
    assert all(0.8 < row["R2"] <= 1 for row in table.rows)
    assert all(0 <= row["UMAP axis rho"] <= 1 for row in table.rows)


# --- composition -------------------------------------------------------------------------------------------


def test_triples_are_parsed() -> None:
    assert parse_triple("t-shirt - circle + ice cream") == Triple("t-shirt", "circle", "ice cream")
    assert parse_triple("a - b + c").text() == "a - b + c"
    for text in ("snowman", "snowman-circle+square", "a + b - c", " - a + b"):
        with pytest.raises(ValueError, match='triples must be of the form "snowman - circle'):
            parse_triple(text)


def test_composition_adds_and_subtracts_codes(drawings: StrokeDataset) -> None:
    table = run("composition", examples=6, triples=("house - house + star",), conv_vae=ConvVAE())
    assert [row["network"] for row in table.rows] == ["SketchEmbedNet", "Conv-VAE"]
    # both houses are the same drawing: the pixels of the star are what is left
    for row in table.rows:
        assert (row["nearest class"], row["its share"], row["towards the added"]) == ("star", 100.0, 100.0)
    held_out = split_classes(CLASSES, Config.held_out_classes, 0)[1]
    unseen = [name for name in ("house", "star") if name in held_out]
    assert (
        f"Held out of training on this data: {', '.join(unseen) or 'none of the classes shown'}."
        in table.note
    )


def test_composition_takes_the_triples_that_the_data_has() -> None:
    table = run("composition", **SMALL["composition"])
    assert [row["triple"] for row in table.rows] == list(module.TRIPLES)
    assert "Drawn by rule: circle, square, triangle." in table.note
    with pytest.raises(ValueError, match="triples must name classes of the data or of circle"):
        run("composition", triples=("snowman - circle + dragon",))
    with pytest.raises(ValueError, match="triples must be given for data that has none of the classes"):
        FIGURE_PROTOCOLS["composition"](SketchEmbedNet(), SketchEmbedNet(), DataSpec("omniglot"))


# --- generation --------------------------------------------------------------------------------------------


def test_drawings_of_a_perfect_draughtsman_find_their_input(omniglot: Path) -> None:
    flags = {"temperatures": (0.0, 3.0), "images": 6, "omniglot": omniglot}
    table = run("drawings", **flags, conv_vae=ConvVAE())
    groups = ("seen classes", "unseen classes", "omniglot's evaluation characters")
    ways = [("SketchEmbedNet", 0.0), ("SketchEmbedNet", 3.0), ("Conv-VAE", None)]
    assert [(row["images"], row["network"], row["temperature"]) for row in table.rows] == [
        (group, *way) for group in groups for way in ways
    ]
    exact = [row["own input nearest"] for row in table.rows if not row["temperature"]]
    assert exact == [100.0] * 6
    assert [row["chance"] for row in table.rows[-1:]] == [16.67]
    assert "instances that training did not see" in table.note


def test_groups_hold_seen_and_unseen_classes_apart(
    drawings: StrokeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(
        module,
        "usable_drawings",
        lambda data, names, config: asked.append(names) or usable_drawings(data, names, config),
    )
    groups = module._groups(DataSpec("quickdraw"), None, SketchEmbedNet(), 5, 0)  # type: ignore[arg-type]
    assert [len(images) for images in groups.values()] == [5, 5]
    assert asked == list(split_classes(CLASSES, Config.held_out_classes, 0))


def test_rows_are_spread_over_labels() -> None:
    labels = np.repeat([4, 1, 0], [20, 3, 1])
    rows = module.spread_rows(labels, 6, seed=0)
    assert sorted(labels[rows].tolist()) == [0, 1, 1, 4, 4, 4]
    assert sorted(labels[rows[:3]].tolist()) == [0, 1, 4]
    assert sorted(module.spread_rows(labels, 99, seed=0).tolist()) == list(range(24))


def test_one_shot_samples_codes_and_points(omniglot: Path) -> None:
    flags = {"characters": 8, "samples": 3, "omniglot": omniglot}
    table = run("one_shot", **flags, temperature=0.0, conv_vae=ConvVAE())
    ways = [
        ("SketchEmbedNet", "code sampled"),
        ("SketchEmbedNet", "decoder at 0"),
        ("Conv-VAE", "code sampled"),
    ]
    assert [(row["network"], row["sampled"]) for row in table.rows] == ways
    assert all(row["own support nearest"] == 100.0 for row in table.rows)
    assert table.rows[1]["pixel deviation"] == 0.0  # the most likely points are always the same
    assert table.rows[0]["pixel deviation"] > 0.001
    assert "SketchEmbedNet: trained on procedural. Conv-VAE: trained on procedural." in table.note


def test_one_shot_takes_omniglot_as_its_data(omniglot: Path) -> None:
    network = SketchEmbedNet()
    network.trained_on = None
    (table,) = FIGURE_PROTOCOLS["one_shot"](
        network, network, DataSpec("omniglot", omniglot), characters=3, samples=1, shown=1
    )
    assert "SketchEmbedNet: trained on data not recorded." in table.note
    assert "strokes are given out for background characters alone" in table.note


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("arrangement", {"most": 1}, "most must be at least 2, got 1"),
        (
            "arrangement",
            {"shapes": ("circle", "blob")},
            "shapes must name classes of the data or of .*'blob'",
        ),
        ("spatial", {"examples": 5}, "examples must be at least 10, got 5"),
        ("composition", {"temperature": -1.0}, "temperature must be at least 0"),
        ("drawings", {"temperatures": ()}, "temperatures must hold a number"),
        ("drawings", {"temperatures": (-0.5,)}, "temperatures must be at least 0"),
        ("one_shot", {}, "omniglot must be the folder that holds omniglot, got None"),
        ("one_shot", {"samples": 0}, "samples must be at least 1, got 0"),
    ],
)
def test_bad_flags_are_named(name: str, flags: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(name, **flags)


def test_a_network_without_decoder_cannot_be_shown() -> None:
    with pytest.raises(ValueError, match="drawings needs a network that generates, got only Contrastive"):
        FIGURE_PROTOCOLS["drawings"](Contrastive(), Contrastive(), DataSpec())
