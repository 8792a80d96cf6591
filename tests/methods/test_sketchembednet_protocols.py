"""The paper's tables: what stands in them, beside what, and what is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sketchfast.cli import main
from sketchfast.data.dataset import StrokeDataset
from sketchfast.data.procedural import CLASSES, procedural
from sketchfast.methods import get_method
from sketchfast.methods import sketchembednet as module
from sketchfast.methods import sketchembednet_protocols as protocols
from sketchfast.methods.base import DataSpec, Table
from sketchfast.methods.sketchembednet import SketchEncoder
from sketchfast.methods.sketchembednet_protocols import alpha_sweep, fewshot, linear, recognisability
from sketchfast.runs import read_results

DATA = Path(os.environ.get("SKETCHFAST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
NAMES = CLASSES[:10]


def few_drawings(data: DataSpec, per_class: int | None = None) -> StrokeDataset:
    """Ten classes of at most 12 procedural drawings, the first per_class of each."""
    instances = 6 if per_class is None else min(-(-per_class // 2), 6)
    return procedural(classes=NAMES, instances=instances, styles=2)


@pytest.fixture(autouse=True)
def _few_drawings(monkeypatch) -> None:
    monkeypatch.setattr(module, "read_drawings", few_drawings)


def make(name: str = "sketchembednet", seed: int = 0, trained_on: str | None = "procedural", **fields):
    kind = get_method(name)
    torch.manual_seed(seed)
    fields = {"impl": "reference", "held_out_classes": 0.4, "max_length": 60, **fields}
    network = kind(replace(kind.preset("tiny"), **fields)).eval()
    network.trained_on = trained_on
    return network


def untrained(name: str = "sketchembednet", **fields):
    return make(name, 99, None, **fields)


def value(cell: str) -> float:
    mean, _, half = cell.partition(" ± ")
    assert float(half) >= 0 or half == "nan"
    return float(mean)


def rows_by_name(table: Table) -> dict[str, dict]:
    first = next(iter(table.rows[0]))
    return {row[first]: row for row in table.rows}


# --- the registry and the networks ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sketchembednet", "conv_vae", "contrastive"])
def test_the_three_share_the_protocols(name: str) -> None:
    found = get_method(name).protocols
    assert list(found)[:4] == ["fewshot", "alpha_sweep", "linear", "recognisability"]
    assert found is SketchEncoder.protocols
    assert "fewshot" not in get_method("pm_jdot").protocols


@pytest.mark.parametrize("own", ["sketchembednet", "conv_vae", "contrastive"])
def test_networks_stand_in_the_papers_order(own: str) -> None:
    made = {name: make(name) for name in ("sketchembednet", "contrastive", "conv_vae")}
    others = {name: network for name, network in made.items() if name != own}
    found = module.compared_networks(made[own], untrained(own), **others)
    assert list(found) == ["untrained", "Conv-VAE", "Contrastive", "SketchEmbedNet"]
    assert found["SketchEmbedNet"] is made["sketchembednet"]
    assert found["Conv-VAE"] is made["conv_vae"]
    alone = module.compared_networks(made[own], untrained(own))
    assert list(alone) == ["untrained", module.NETWORKS[own]]


def test_a_run_of_another_kind_is_refused() -> None:
    method = make()
    with pytest.raises(ValueError, match="conv_vae must be a run of ConvVAE, got one of Contrastive"):
        fewshot(method, untrained(), DataSpec(), conv_vae=make("contrastive"))
    with pytest.raises(ValueError, match="sketchembednet must be left out"):
        fewshot(method, untrained(), DataSpec(), sketchembednet=make())


def test_ink_and_photos_reach_either_kind_of_network() -> None:
    ink = np.zeros((3, 28, 28), np.uint8)
    ink[:, 5:20, 7] = 255
    photos = np.repeat(255 - ink[..., None], 3, axis=3)
    for channels in (1, 3):
        network = make(image_channels=channels)
        assert network.takes_colour == (channels == 3)
        np.testing.assert_allclose(
            protocols._embed(network, ink), protocols._embed(network, photos), atol=1e-6
        )
        assert np.abs(protocols._embed(network, ink) - protocols._embed(network, 255 - ink)).max() > 1e-3


# --- few-shot ---------------------------------------------------------------------------------------------


def test_fewshot_on_held_out_classes() -> None:
    method, others = make(), {"conv_vae": make("conv_vae"), "contrastive": make("contrastive")}
    method.train_data(DataSpec())
    flags = {"episodes": 4, "ways": (3, 20), "shots": (1, 2)}
    (table,) = fewshot(method, untrained(), DataSpec(), **others, **flags)
    rows = rows_by_name(table)
    assert list(rows) == [
        "untrained",
        "Conv-VAE",
        "Contrastive",
        "SketchEmbedNet",
    ]  # the paper's are Omniglot's
    assert list(rows["Conv-VAE"]) == ["network", "encoder", "trained on", "3-way 1-shot", "3-way 2-shot"]
    assert all(0 < value(row[f"3-way {shot}-shot"]) <= 100 for row in rows.values() for shot in (1, 2))
    assert (rows["untrained"]["trained on"], rows["Conv-VAE"]["trained on"]) == (None, "procedural")
    assert "Not run, for want of classes or images: 20-way 1-shot, 20-way 2-shot." in table.note
    assert (
        f"SketchEmbedNet (procedural): Trained 0 steps (paper 300000) on {int(method.training_drawings)} "
        f"drawings of {int(method.training_classes)} classes" in table.note
    )
    assert "hidden_size 16 (paper 1024)" in table.note
    assert table.note.count("Conv-VAE (procedural), Contrastive (procedural): Trained") == 1
    (again,) = fewshot(method, method, DataSpec(), **flags)
    alike = rows_by_name(again)
    assert alike["untrained"]["3-way 1-shot"] == alike["SketchEmbedNet"]["3-way 1-shot"]
    assert alike["SketchEmbedNet"] == rows["SketchEmbedNet"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"per_class": 0}, "per_class must be at least 1, got 0"),
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"ways": (5, 1)}, "ways must be at least 2, got 1"),
        ({"shots": (0,)}, "shots must be at least 1, got 0"),
        ({"shots": ()}, "shots must hold a number, got \\(\\)"),
    ],
)
def test_fewshot_names_bad_flags(flags: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fewshot(make(), untrained(), DataSpec(), **flags)


def test_fewshot_needs_classes_that_no_network_was_trained_on() -> None:
    method = make(held_out_classes=0.0)
    with pytest.raises(ValueError, match="held_out_classes must leave a class"):
        fewshot(method, untrained(), DataSpec(), episodes=1)
    other = make("conv_vae", split_seed=3)
    with pytest.raises(ValueError, match=r"Conv-VAE must have kept the classes.*split_seed 0, got 3"):
        fewshot(make(), untrained(), DataSpec(), conv_vae=other, episodes=1)
    part = make()
    part.training_classes.fill_(7)  # here 6 of 10 are training classes: it was trained on other data
    for protocol in (fewshot, linear):
        with pytest.raises(ValueError, match=r"classes that SketchEmbedNet was trained on, 7, .* 10 here 6"):
            protocol(part, untrained(), DataSpec())
    other.trained_on = "quickdraw"  # where all classes of this data are unseen
    fewshot(make(), untrained(), DataSpec(), conv_vae=other, episodes=1, ways=(2,), shots=(1,))
    for name in ("omniglot", "mini_imagenet"):
        with pytest.raises(ValueError, match=f"root must be the folder that holds {name}"):
            fewshot(method, untrained(), DataSpec(name), episodes=1)


@pytest.mark.skipif(not (DATA / "omniglot").is_dir(), reason=f"no Omniglot in {DATA}")
def test_fewshot_on_omniglot_stands_above_the_papers_figures() -> None:
    data = DataSpec("omniglot", DATA / "omniglot")
    flags = {"episodes": 3, "ways": (5,), "shots": (1, 2), "split": "vinyals-val", "rotations": False}
    method, vae = make(trained_on="quickdraw"), make("conv_vae", trained_on="omniglot")
    (table,) = fewshot(method, untrained(), data, conv_vae=vae, contrastive=make("contrastive"), **flags)
    assert [(row["network"], row["trained on"]) for row in table.rows] == [
        ("untrained", None),
        ("paper: Random CNN", None),
        ("Conv-VAE", "Omniglot"),
        ("paper: Conv-VAE", "Omniglot"),
        ("Contrastive", "procedural"),  # the paper has none
        ("SketchEmbedNet", "Quickdraw"),
        ("paper: SketchEmbedNet", "Quickdraw"),
    ]
    rows = rows_by_name(table)
    assert value(rows["untrained"]["5-way 1-shot"]) > 25  # chance is 20; even random features are above
    assert rows["paper: SketchEmbedNet"]["5-way 1-shot"] == "96.96 ± 0.17"
    assert rows["paper: Conv-VAE"]["5-way 1-shot"] == "77.83 ± 0.41"
    assert "5-way 2-shot" not in rows["paper: Conv-VAE"]
    assert "3440 images of 172 classes" in table.note


def mini_imagenet(root: Path, classes: int = 6, images: int = 7) -> Path:
    """A folder of photos, each class of a colour of its own."""
    generator = np.random.default_rng(0)
    for number in range(classes):
        folder = root / "test" / f"n{number:08}"
        folder.mkdir(parents=True)
        colour = generator.integers(0, 256, 3)
        for image in range(images):
            pixels = np.clip(colour + generator.integers(-20, 20, (84, 84, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{image}.jpg")
    return root


def test_fewshot_on_mini_imagenet(tmp_path) -> None:
    data = DataSpec("mini_imagenet", mini_imagenet(tmp_path))
    colour = {"image_channels": 3, "image_size": 32, "encoder": "resnet12"}
    method = make(trained_on="sketchy", **colour)
    (table,) = fewshot(method, untrained(**colour), data, episodes=2)
    assert "6 of its 6 classes not in the published split's" in table.title
    names = ["untrained", "paper: Random CNN", "SketchEmbedNet", "paper: SketchEmbedNet"]
    rows = rows_by_name(table)
    assert list(rows) == names
    assert rows["paper: SketchEmbedNet"]["5-way 5-shot"] == "57.15 ± 0.38"
    assert rows["paper: Random CNN"]["5-way 1-shot"] == "28.59 ± 0.34"
    assert value(rows["SketchEmbedNet"]["5-way 5-shot"]) > 30
    assert "5-way 20-shot, 5-way 50-shot" in table.note  # seven photos a class are too few
    assert protocols._check_episodes(data, None) == 1000


def test_the_papers_tables_are_whole() -> None:
    for tasks, figures in protocols.PAPER_FEWSHOT.values():
        assert all(len(values) == len(tasks) for values in figures.values())
        assert all(0 < half < 1 < mean < 100 for values in figures.values() for mean, half in values)
    for task, figures in protocols.PAPER_ALPHA.values():
        assert list(figures) == [0.0, 0.25, 0.5, 0.75, 0.95, 1.0]
        assert task in ((20, 1), (5, 1))
    # Table 3's best is Table 1's
    assert protocols.PAPER_ALPHA["omniglot"][1][0.5] == 91.67
    assert protocols.PAPER_OMNIGLOT["SketchEmbedNet", "conv4", "Quickdraw"][2][0] == 91.67


# --- alpha_max --------------------------------------------------------------------------------------------


def test_the_sweep_is_a_row_a_run(monkeypatch) -> None:
    runs = tuple(make(seed=seed, alpha_max=alpha) for seed, alpha in ((1, 1.0), (2, 0.25)))
    method = make(alpha_max=0.5)
    (table,) = alpha_sweep(method, untrained(), DataSpec(), runs=runs, way=3, episodes=3)
    assert [row["alpha_max"] for row in table.rows] == [0.25, 0.5, 1.0, None]
    assert all(0 < value(row["3-way 1-shot"]) <= 100 for row in table.rows)
    assert "paper" not in table.rows[0]
    assert "differ" not in table.note
    (alone,) = fewshot(method, untrained(), DataSpec(), ways=(3,), shots=(1,), episodes=3)
    assert table.rows[1]["3-way 1-shot"] == rows_by_name(alone)["SketchEmbedNet"]["3-way 1-shot"]
    (table,) = alpha_sweep(
        method, untrained(), DataSpec(), runs=(make(alpha_max=0.0, steps=9),), way=3, episodes=1
    )
    assert "The runs differ in more than alpha_max: steps." in table.note
    with pytest.raises(ValueError, match="runs must be of SketchEmbedNet, got one of ConvVAE"):
        alpha_sweep(method, untrained(), DataSpec(), runs=(make("conv_vae"),))
    with pytest.raises(ValueError, match="way must be at least 2"):
        alpha_sweep(method, untrained(), DataSpec(), way=1)


def test_the_sweep_stands_beside_the_papers(tmp_path) -> None:
    data = DataSpec("mini_imagenet", mini_imagenet(tmp_path))
    method, other = make(alpha_max=0.75), make(alpha_max=0.6)
    (table,) = alpha_sweep(method, untrained(), data, runs=(other,), episodes=1)
    assert [row.get("paper") for row in table.rows] == [None, 39.31, None]
    assert "Paper: trained on Sketchy; the encoder is not said" in table.note
    (table,) = alpha_sweep(method, untrained(), data, shot=2, episodes=1)
    assert "paper" not in table.rows[0]


# --- linear -----------------------------------------------------------------------------------------------


def test_linear_on_training_and_unseen_classes() -> None:
    others = {"conv_vae": make("conv_vae"), "contrastive": make("contrastive")}
    (table,) = linear(make(), untrained(), DataSpec(), **others, labelled=8, test=4)
    rows = rows_by_name(table)
    assert list(rows) == ["untrained", "Conv-VAE", "Contrastive", "SketchEmbedNet"]
    for row in rows.values():
        assert list(row) == ["network", "trained on", "6-way, training classes", "4-way, unseen classes"]
        assert value(row["6-way, training classes"]) > 40
        assert value(row["4-way, unseen classes"]) > 60
    assert (
        "dimensions standardised (the paper does not say whether its were), L2 penalty 0.001." in table.note
    )
    assert "Unseen classes: 4 classes, 32 labelled drawings, 16 others to test." in table.note
    (again,) = linear(make(), untrained(), DataSpec(), **others, labelled=8, test=4)
    assert again == table
    (fewer,) = linear(make(), untrained(), DataSpec(), labelled=8, test=4, seen_classes=3, unseen_classes=2)
    assert {"3-way, training classes", "2-way, unseen classes"} <= set(fewer.rows[0])


def test_the_papers_figures_stand_beside_quickdraws(monkeypatch) -> None:
    method, vae = make(trained_on="quickdraw"), make("conv_vae", trained_on="omniglot")
    (table,) = linear(method, untrained(), DataSpec("quickdraw", Path()), conv_vae=vae, labelled=6, test=2)
    rows = rows_by_name(table)
    assert (rows["SketchEmbedNet"]["paper: 300-way"], rows["SketchEmbedNet"]["paper: 45-way"]) == (
        42.80,
        75.68,
    )
    assert rows["untrained"]["paper: 300-way"] == 0.85
    assert "paper: 300-way" not in rows["Conv-VAE"]  # trained on other data


def test_a_division_is_of_drawings_the_networks_have_not_seen_where_there_are_such() -> None:
    def division(drawings_per_class: int, trained_on: str | None = "procedural", names: str = "seen"):
        method = make(drawings_per_class=drawings_per_class, trained_on=trained_on)
        networks = module.compared_networks(method, untrained())
        drawings = protocols._Drawings(method, networks, DataSpec(), 12)
        return drawings.divide(getattr(drawings, names), 6, 8, 4, 0)

    # of 12 drawings a class 6 were trained on: the test takes 4 of the others
    assert division(6).trained_on == 0
    assert division(10).trained_on == 6 * 2
    assert division(0).trained_on == 6 * 4
    assert division(0, "omniglot").trained_on == 0
    assert division(0, names="unseen").trained_on == 0
    some = division(6)
    assert (len(some.train), len(some.test)) == (6 * 8, 6 * 4)
    assert np.bincount(some.train_labels).tolist() == [8] * 6
    test = {image.tobytes() for image in some.test}
    assert len(test) == 24
    assert test.isdisjoint(image.tobytes() for image in some.train)


def test_more_procedural_drawings_than_training_reads_are_unseen(monkeypatch) -> None:
    monkeypatch.setattr(
        module,
        "read_drawings",
        lambda data, per_class=None: few_drawings(data, 6 if per_class is None else 12),
    )
    method = make(drawings_per_class=0)
    drawings = protocols._Drawings(method, module.compared_networks(method, untrained()), DataSpec(), 12)
    # training reads 6 of 12 drawings a class
    assert drawings.divide(drawings.seen, 6, 8, 4, 0).trained_on == 0
    assert drawings.divide(drawings.seen, 6, 1, 11, 0).trained_on == 6 * 5


def test_a_class_with_few_drawings_is_divided_in_proportion(monkeypatch) -> None:
    drawings = few_drawings(DataSpec())
    _, unseen = module.split_classes(drawings.class_names, 0.4, 0)
    label = drawings.class_names.index(unseen[0])
    first = np.flatnonzero(drawings.labels == label)
    cut = drawings.subset(np.setdiff1d(np.arange(len(drawings)), first[3:]))
    lone = drawings.class_names.index(unseen[1])
    cut = cut.subset(np.setdiff1d(np.arange(len(cut)), np.flatnonzero(cut.labels == lone)[1:]))
    monkeypatch.setattr(module, "read_drawings", lambda data, per_class=None: cut)
    method = make()
    found = protocols._Drawings(method, module.compared_networks(method, untrained()), DataSpec(), 12)
    division = found.divide(found.unseen, 45, 8, 4, 0)
    assert division.classes == 3  # one drawing is too few
    assert np.bincount(division.train_labels).tolist() == [8, 8, 2]
    assert np.bincount(division.test_labels).tolist() == [4, 4, 1]
    assert found.divide(found.unseen, 2, 8, 4, 0).classes == 2
    with pytest.raises(ValueError, match="two drawings each of two such classes, got 1"):
        found.divide(found.unseen, 1, 8, 4, 0)


def test_linear_on_folders_of_photos(tmp_path) -> None:
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 4)):
        for name, colour in (("a", (200, 30, 30)), ("b", (30, 30, 200)), ("c", (30, 200, 30))):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + generator.integers(-30, 30, (40, 50, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / part / name / f"{number}.png")
    fields = {"image_channels": 3, "image_size": 32, "encoder": "resnet12"}
    method, data = make(trained_on="sketchy", **fields), DataSpec("ilsvrc", tmp_path)
    (table,) = linear(method, untrained(**fields), data, labelled=5)
    rows = rows_by_name(table)
    assert value(rows["SketchEmbedNet"]["top-1"]) > 80
    assert value(rows["SketchEmbedNet"]["top-5"]) == 100
    assert (rows["SketchEmbedNet"]["paper: top-1"], rows["untrained"]["paper: top-5"]) == (6.15, 4.78)
    assert "3 classes, 15 labelled images, 12 of the validation set" in table.note
    # a class without validation images, and files that are no images, change no other's label
    for file in (tmp_path / "val" / "a").iterdir():
        file.unlink()
    (tmp_path / "val" / "b" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "val" / "b" / "list.txt").write_text("")
    (table,) = linear(method, untrained(**fields), data, labelled=6)
    assert value(rows_by_name(table)["SketchEmbedNet"]["top-1"]) > 80
    assert "8 of the validation set to test. Left out: not an image 1, broken image 1." in table.note
    (tmp_path / "val" / "d").mkdir()
    (tmp_path / "val" / "d" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"val must hold classes of train, got \['d'\]"):
        linear(method, untrained(**fields), data)
    with pytest.raises(ValueError, match=r"<root>/val/<class>/<file>"):
        linear(method, untrained(**fields), DataSpec("ilsvrc", tmp_path / "train"))


# --- recognisability --------------------------------------------------------------------------------------

QUICK = {"per_class": 8, "test": 4, "epochs": 1, "width": 2}


def test_recognisability_of_what_the_networks_draw(monkeypatch) -> None:
    others = {"conv_vae": make("conv_vae"), "contrastive": make("contrastive")}
    monkeypatch.setattr(
        type(others["conv_vae"]), "generate", lambda self, z, **_: z.new_zeros(len(z), 28, 28)
    )
    method = make(trained_on="quickdraw")
    (table,) = recognisability(
        method, untrained(), DataSpec("quickdraw", Path()), **others, **QUICK, temperature=0.2, samplings=2
    )
    rows = rows_by_name(table)
    assert list(rows) == [
        "original data",
        "untrained",
        "Conv-VAE",
        "SketchEmbedNet",
    ]  # Contrastive draws nothing
    assert all(0 <= value(row[kind]) <= 100 for row in rows.values() for kind in ("seen", "unseen"))
    # blank pictures are all named alike, which is right for one class in six, and in four
    assert value(rows["Conv-VAE"]["seen"]) == pytest.approx(100 / 6, abs=0.01)
    assert value(rows["Conv-VAE"]["unseen"]) == 25
    assert rows["SketchEmbedNet"]["paper: unseen"] == "77.94 ± 1.07"
    assert "paper: seen" not in rows["untrained"]
    assert "drawn 2 times at temperature 0.2" in table.note
    assert "(the paper gives its training accuracy)" in table.note


def test_pictures_as_good_as_the_originals_score_as_they(monkeypatch) -> None:
    method = make()
    originals = []
    embed = protocols._embed
    monkeypatch.setattr(
        protocols, "_embed", lambda network, images: (originals.append(images), embed(network, images))[1]
    )
    monkeypatch.setattr(
        protocols,
        "_generated",
        lambda network, codes, *rest: torch.from_numpy(originals[-1]).float() / 255,
    )
    (table,) = recognisability(method, untrained(), DataSpec(), **{**QUICK, "epochs": 12, "width": 8})
    rows = rows_by_name(table)
    assert value(rows["original data"]["unseen"]) > 50
    for kind in ("seen", "unseen"):
        assert rows["SketchEmbedNet"][kind] == rows["original data"][kind]


def test_pictures_are_drawn_in_parts_and_sized() -> None:
    network = make(image_size=20)
    codes = torch.randn(300, 256)
    pictures = protocols._generated(network, codes, 28, 0.0, 0)
    assert pictures.shape == (300, 28, 28)
    assert ((pictures >= 0) & (pictures <= 1)).all()
    torch.testing.assert_close(pictures[256:258], protocols._generated(network, codes[256:258], 28, 0.0, 0))
    photos = make("conv_vae", image_channels=3)
    assert protocols._generated(photos, codes[:2], 28, 0.0, 0).shape == (2, 28, 28)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"classes": 1}, "classes must be at least 2"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"samplings": 0}, "samplings must be at least 1"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
    ],
)
def test_recognisability_names_bad_flags(flags: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recognisability(make(), untrained(), DataSpec(), **flags)


def test_recognisability_needs_a_network_that_draws() -> None:
    with pytest.raises(ValueError, match="needs a network that generates, got Contrastive"):
        recognisability(make("contrastive"), untrained("contrastive"), DataSpec(), **QUICK)


# --- on the command line ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Tiny runs of two of the networks, and a sweep's folder."""
    folder = tmp_path_factory.mktemp("runs")
    tiny = ["--preset", "tiny", "--steps", "1", "--max-length", "60", "--held-out-classes", "0.4"]
    kinds = {"conv_vae": ["conv_vae"], "sketchembednet": ["sketchembednet"]}
    kinds["sweep/1"] = ["sketchembednet", "--alpha-max", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_drawings", few_drawings)
        for out, words in kinds.items():
            assert main(["train", *words, *tiny, "--accelerator", "cpu", "--out", str(folder / out)]) == 0
    return folder


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("fewshot", "--conv-vae {0}/conv_vae --episodes 2 --ways 3 --shots 1"),
        ("alpha_sweep", "--runs {0}/sweep {0}/sketchembednet --episodes 2 --way 3"),
        ("linear", "--conv-vae {0}/conv_vae --labelled 4 --test 2"),
        ("recognisability", "--per-class 4 --test 2 --epochs 1 --classes 3 --width 2"),
    ],
)
def test_each_runs_on_the_command_line(capfd, runs, name: str, flags: str) -> None:
    run = runs / "sketchembednet"
    words = ["evaluate", str(run), name, "--accelerator", "cpu", *flags.format(runs).split()]
    assert main(words) == 0
    stored = read_results(run)["evaluations"][f"{name} on procedural"]
    (table,) = stored["tables"]
    assert table["title"] in " ".join(capfd.readouterr().out.replace("\n", " ").split())
    names = [next(iter(row.values())) for row in table["rows"]]
    assert (
        names
        == {
            "fewshot": ["untrained", "Conv-VAE", "SketchEmbedNet"],
            "alpha_sweep": [0.5, 1.0, None],  # the run itself is not taken twice
            "linear": ["untrained", "Conv-VAE", "SketchEmbedNet"],
            "recognisability": ["original data", "untrained", "SketchEmbedNet"],
        }[name]
    )
    assert "sketchembednet None" not in (run / "report.html").read_text()
