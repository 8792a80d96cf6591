"""The tables of SketchEmbedNet's paper, for the three networks on its encoder.

Wang, Ren, Zemel: "SketchEmbedNet: Learning Novel Concepts by Imitating Drawings", ICML 2021 (sections 4.2,
4.3 and 4.5, Tables 1 to 5). A run's table has its own network, an untrained one ("Random CNN" in the paper)
and those of the runs given beside it, each above the paper's figures for the same encoder and training data.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data.archive import existing_path, layout_error, open_tree
from ..data.dataset import LabelledImages, StrokeDataset, add_counts
from ..data.images import ImageSet, find_images, read_images
from ..evaluate.fewshot import Accuracy, few_shot_accuracy, mean_accuracy
from ..evaluate.linear import linear_accuracy
from ..evaluate.recognition import recognised, train_classifier
from ..models.encoders import ResNet12
from ..ops._contract import check_integer, check_number
from . import sketchembednet as networks_module
from .base import DataSpec, Method, Table
from .sketchembednet import (
    SketchEncoder,
    compared_networks,
    held_out_images,
    held_out_photos,
    networks_facts,
    rendered_images,
    split_classes,
    trained_networks,
    training_facts,
    usable_drawings,
)

#: a data set's name here -> in the paper
DATA_NAMES = {
    "omniglot": "Omniglot",
    "quickdraw": "Quickdraw",
    "sketchy": "Sketchy",
    "mini_imagenet": "mini-ImageNet",
}

#: (network, encoder, training data)
Trained = tuple[str, str, str | None]
OMNIGLOT_TASKS = ((5, 1), (5, 5), (20, 1), (20, 5))
#: Table 1: accuracy in percent and its 95% interval for each (way, shot) of OMNIGLOT_TASKS
PAPER_OMNIGLOT: dict[Trained, tuple[tuple[float, float], ...]] = {
    ("untrained", "conv4", None): ((67.96, 0.44), (83.85, 0.31), (44.39, 0.23), (60.87, 0.22)),
    ("Conv-VAE", "conv4", "Omniglot"): ((77.83, 0.41), (92.91, 0.19), (62.59, 0.24), (84.01, 0.15)),
    ("Conv-VAE", "conv4", "Quickdraw"): ((81.49, 0.39), (94.09, 0.17), (66.24, 0.23), (86.02, 0.14)),
    ("Contrastive", "conv4", "Omniglot"): ((77.69, 0.40), (92.62, 0.20), (62.99, 0.25), (83.70, 0.16)),
    ("Contrastive", "conv4", "Quickdraw"): ((83.26, 0.40), (94.16, 0.21), (73.01, 0.25), (86.66, 0.17)),
    ("SketchEmbedNet", "conv4", "Omniglot"): ((94.88, 0.22), (99.01, 0.08), (86.18, 0.18), (96.69, 0.07)),
    ("SketchEmbedNet", "conv4", "Quickdraw"): ((96.96, 0.17), (99.50, 0.06), (91.67, 0.14), (98.30, 0.05)),
}
MINI_IMAGENET_TASKS = ((5, 1), (5, 5), (5, 20), (5, 50))
#: Table 2, as Table 1
PAPER_MINI_IMAGENET: dict[Trained, tuple[tuple[float, float], ...]] = {
    ("untrained", "conv4", None): ((26.85, 0.31), (33.37, 0.32), (38.51, 0.28), (41.41, 0.28)),
    ("Conv-VAE", "conv4", "mini-ImageNet"): ((23.30, 0.21), (26.22, 0.20), (29.93, 0.21), (32.57, 0.20)),
    ("Conv-VAE", "conv4", "Sketchy"): ((23.27, 0.18), (26.28, 0.19), (30.41, 0.19), (33.97, 0.19)),
    ("untrained", "resnet12", None): ((28.59, 0.34), (35.91, 0.34), (41.31, 0.33), (44.07, 0.31)),
    ("Conv-VAE", "resnet12", "mini-ImageNet"): ((23.82, 0.23), (28.16, 0.25), (33.64, 0.27), (37.81, 0.27)),
    ("Conv-VAE", "resnet12", "Sketchy"): ((24.61, 0.23), (28.85, 0.23), (35.72, 0.27), (40.44, 0.28)),
    ("Contrastive", "resnet12", "Sketchy"): ((30.56, 0.33), (39.06, 0.33), (45.17, 0.33), (47.84, 0.32)),
    ("SketchEmbedNet", "conv4", "Sketchy"): ((38.61, 0.42), (53.82, 0.41), (63.34, 0.35), (67.22, 0.32)),
    ("SketchEmbedNet", "resnet12", "Sketchy"): ((40.39, 0.44), (57.15, 0.38), (67.60, 0.33), (71.99, 0.3)),
}
#: data evaluated on -> tasks and figures
PAPER_FEWSHOT = {
    "omniglot": (OMNIGLOT_TASKS, PAPER_OMNIGLOT),
    "mini_imagenet": (MINI_IMAGENET_TASKS, PAPER_MINI_IMAGENET),
}
#: Table 3: alpha_max -> accuracy in percent, for the data evaluated on and the task
PAPER_ALPHA: dict[str, tuple[tuple[int, int], dict[float, float]]] = {
    "omniglot": ((20, 1), {0.0: 87.17, 0.25: 87.82, 0.5: 91.67, 0.75: 90.59, 0.95: 89.77, 1.0: 87.63}),
    "mini_imagenet": ((5, 1), {0.0: 38.0, 0.25: 38.75, 0.5: 38.11, 0.75: 39.31, 0.95: 38.53, 1.0: 37.78}),
}
#: which networks those figures are of
PAPER_ALPHA_RUNS = {
    "omniglot": "Conv4, trained on Quickdraw.",
    "mini_imagenet": "trained on Sketchy; the encoder is not said, Table 2 has other figures for both.",
}
#: Table 4a (QuickDraw): percent of training classes (300-way), of unseen classes (45-way)
PAPER_LINEAR = {
    "untrained": (0.85, 16.42),
    "Conv-VAE": (18.70, 53.06),
    "Contrastive": (41.58, 70.72),
    "SketchEmbedNet": (42.80, 75.68),
}
#: Table 4b (trained on Sketchy): top-1 and top-5 percent on ILSVRC
PAPER_ILSVRC = {
    "untrained": (1.58, 4.78),
    "Conv-VAE": (1.13, 3.78),
    "Contrastive": (3.95, 10.91),
    "SketchEmbedNet": (6.15, 16.20),
}
#: Table 5 (QuickDraw): percent recognised of 45 seen and 45 unseen classes
PAPER_RECOGNISED = {
    "original data": ("97.66", "96.09"),
    "Conv-VAE": ("76.28 ± 0.93", "75.07 ± 0.84"),
    "SketchEmbedNet": ("81.44 ± 0.95", "77.94 ± 1.07"),
}


# ---- the networks compared ---------------------------------------------------------------------------------


def _as_in_paper(name: str, network: SketchEncoder) -> Trained:
    """What the paper's tables call the network; training data the paper does not know as named here."""
    data = None if network.trained_on is None else DATA_NAMES.get(network.trained_on, network.trained_on)
    return name, network.config.encoder, data


def _paper_row(
    key: Trained, figures: Mapping[tuple[int, int], tuple[float, float]], tasks: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    name, encoder, data = key
    named = "Random CNN" if name == "untrained" else name
    cells = {_column(*task): "{:.2f} ± {:.2f}".format(*figures[task]) for task in tasks if task in figures}
    return {"network": f"paper: {named}", "encoder": encoder, "trained on": data, **cells}


def _embed(network: SketchEncoder, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Embeddings [N, D] of ink [N, H, W], ink = 255, or photos [N, H, W, 3], as the network takes images.

    A network of photos sees ink as a photo of it, dark on white; one of ink sees a photo's darkness.
    """
    if images.ndim == 4 and not network.takes_colour:
        images = 255 - images.mean(axis=3).round().astype(np.uint8)
    return networks_module.embed_images(network, images)


def _check_same_split(
    networks: Mapping[str, SketchEncoder], method: SketchEncoder, data: DataSpec, class_names: list[str]
) -> None:
    """ValueError where one of the networks was trained on classes that are held out here."""
    config = method.config
    seen = len(split_classes(class_names, config.held_out_classes, config.split_seed)[0])
    for name, network in trained_networks(networks).items():
        for field in ("held_out_classes", "split_seed"):
            got, wanted = getattr(network.config, field), getattr(method.config, field)
            if network.trained_on in (None, data.name) and got != wanted:
                raise ValueError(
                    f"{name} must have kept the classes out of training that the run did: {field} {wanted}, "
                    f"got {got}"
                )
        # which classes are held out depends on all names there are: a part of the data divides otherwise
        if network.trained_on in (None, data.name) and (trained := int(network.training_classes)) > seen:
            raise ValueError(
                f"data must hold the classes that {name} was trained on, {trained}, and those held out: of "
                f"the {len(class_names)} here {seen} would be training classes"
            )


# ---- few-shot classification (Tables 1 and 2) --------------------------------------------------------------


class _Task(NamedTuple):
    """Images of classes unseen in training, and what they are."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    what: str


def fewshot(
    method: SketchEncoder,
    untrained: SketchEncoder,
    data: DataSpec,
    *,
    conv_vae: Method | None = None,
    contrastive: Method | None = None,
    sketchembednet: Method | None = None,
    episodes: int | None = None,
    ways: tuple[int, ...] | None = None,
    shots: tuple[int, ...] | None = None,
    split: str | None = None,
    rotations: bool = True,
    per_class: int = 50,
    seed: int = 0,
    jobs: int = 1,
) -> list[Table]:
    """Few-shot classification of unseen classes (section 4.2, Tables 1 and 2), beside an untrained encoder.

    Args:
        method, untrained: the trained network, and one of the same config with fresh weights.
        data: omniglot or mini_imagenet (their images, as in the paper), or any stroke data (its held-out
            classes, rendered; to a network that takes colour their photos).
        conv_vae, contrastive, sketchembednet: runs to stand beside it.
        episodes: per column, the same for all networks; None is a quick 600, and 1000 on mini-ImageNet as the
            authors take; theirs for Omniglot are 2000.
        ways: classes of an episode, None those of the paper; a number above the classes there are is left
            out, and the note says so.
        shots: labelled images of each class, None those of the paper; the query is all its others.
        split: part of Omniglot's characters, None is the paper's, vinyals-test (evaluation is the published
            one); part of mini-ImageNet, None is test.
        rotations: whether a character of Omniglot makes four classes, one a quarter turn, as in the paper.
        per_class: images of each held-out class, for data other than Omniglot and mini-ImageNet.
        seed: of the episodes.
        jobs: processes that share the episodes, -1 for all cores; the result does not depend on it.
    """
    networks = compared_networks(
        method, untrained, conv_vae=conv_vae, contrastive=contrastive, sketchembednet=sketchembednet
    )
    episodes = _check_episodes(data, episodes)
    check_integer("per_class", per_class, 1)
    check_integer("seed", seed, 0)
    tasks = _tasks(data, ways, shots)
    task = _fewshot_images(method, networks, data, split, rotations, per_class, seed)
    vectors = {name: _embed(network, task.images) for name, network in networks.items()}
    counts = np.unique(task.labels, return_counts=True)[1]
    possible = [(way, shot) for way, shot in tasks if (counts > shot).sum() >= way]
    options: dict[str, Any] = {"episodes": episodes, "seed": seed, "jobs": jobs}
    paper_tasks, paper = PAPER_FEWSHOT.get(data.name, ((), {}))
    rows = []
    for name, network in networks.items():
        key = _as_in_paper(name, network)
        row: dict[str, Any] = {"network": name, "encoder": key[1], "trained on": key[2]}
        for way, shot in possible:
            found = few_shot_accuracy(vectors[name], task.labels, way=way, shot=shot, **options)
            row[_column(way, shot)] = found.percent()
        rows.append(row)
        if key in paper:
            rows.append(_paper_row(key, dict(zip(paper_tasks, paper[key], strict=True)), possible))
    note = (
        f"Accuracy in percent over {episodes} episodes, 95% intervals; {len(task.labels)} images of "
        f"{len(counts)} classes."
    )
    if left_out := [_column(*task_) for task_ in tasks if task_ not in possible]:
        note += f" Not run, for want of classes or images: {', '.join(left_out)}."
    return [Table(f"Few-shot classification: {task.what}", rows, f"{note} {networks_facts(networks)}")]


def _column(way: int, shot: int) -> str:
    return f"{way}-way {shot}-shot"


def _check_episodes(data: DataSpec, episodes: int | None) -> int:
    if episodes is None:
        return 1000 if data.name == "mini_imagenet" else 600
    return check_integer("episodes", episodes, 1)


def _tasks(
    data: DataSpec, ways: tuple[int, ...] | None, shots: tuple[int, ...] | None
) -> list[tuple[int, int]]:
    """Each (way, shot), the paper's where none are given."""
    paper, _ = PAPER_FEWSHOT.get(data.name, PAPER_FEWSHOT["omniglot"])
    ways = tuple(sorted({way for way, _ in paper})) if ways is None else ways
    shots = tuple(sorted({shot for _, shot in paper})) if shots is None else shots
    for name, values, least in (("ways", ways, 2), ("shots", shots, 1)):
        if not values:
            raise ValueError(f"{name} must hold a number, got {values!r}")
        for value in values:
            check_integer(name, value, least)
    return list(itertools.product(ways, shots))


def _fewshot_images(
    method: SketchEncoder,
    networks: Mapping[str, SketchEncoder],
    data: DataSpec,
    split: str | None,
    rotations: bool,
    per_class: int,
    seed: int,
) -> _Task:
    """The images that episodes are drawn from."""
    size = max(network.config.image_size for network in networks.values())
    images: LabelledImages | ImageSet
    if data.name == "omniglot":
        from ..data.omniglot import load_omniglot

        split = split or "vinyals-test"
        images = load_omniglot(_root(data), split=split, rotations=rotations, size=size)
        what = f"Omniglot, {split}{' with rotations as classes' if rotations else ''}"
    elif data.name == "mini_imagenet":
        from ..data.mini_imagenet import SIZE, TEST_CLASSES, load_mini_imagenet

        split = split or "test"
        images = load_mini_imagenet(_root(data), split=split, size=SIZE)
        what = f"mini-ImageNet, {split}"
        if split == "test" and (others := set(images.class_names) - set(TEST_CLASSES)):
            what += f" ({len(others)} of its {len(images.class_names)} classes not in the published split's)"
    elif method.takes_colour:
        images = held_out_photos(method, data, per_class, seed)
        _check_same_split(networks, method, data, images.class_names)
        what = f"photos of held-out classes of {data.name}"
    else:
        drawings = networks_module.read_drawings(data)
        _check_same_split(networks, method, data, drawings.class_names)
        images = held_out_images(method, drawings, per_class, seed)
        what = f"held-out classes of {data.name}"
    return _Task(images.images, images.labels, what)


def _root(data: DataSpec) -> Path:
    if data.root is None:
        raise ValueError(f"root must be the folder that holds {data.name}, got None")
    return data.root


# ---- weight of the pixel loss (Table 3) --------------------------------------------------------------------


def alpha_sweep(
    method: SketchEncoder,
    untrained: SketchEncoder,
    data: DataSpec,
    *,
    runs: tuple[Method, ...] = (),
    way: int | None = None,
    shot: int | None = None,
    episodes: int | None = None,
    split: str | None = None,
    rotations: bool = True,
    per_class: int = 50,
    seed: int = 0,
    jobs: int = 1,
) -> list[Table]:
    """Few-shot accuracy against alpha_max, the cap of the pixel loss's weight (section 4.2, Table 3).

    Nothing is trained here. The runs come from a loop, and one evaluation takes the folder they are in:

        for a in 0 0.25 0.5 0.75 0.95 1; do
          sketchfast train sketchembednet --alpha-max $a --data quickdraw --root PATH --out runs/alpha/$a
        done
        sketchfast evaluate runs/alpha/0.5 alpha_sweep --runs runs/alpha --data omniglot --root PATH

    Args:
        method, untrained: a trained SketchEmbedNet, and one of the same config with fresh weights.
        data: as in fewshot.
        runs: further SketchEmbedNet runs, or folders of them; those of another method are an error.
        way: classes of an episode; None is the paper's, 20 on Omniglot and 5 on mini-ImageNet, else 5.
        shot: labelled images of each class; None is the paper's 1.
        episodes, split, rotations, per_class, seed, jobs: as in fewshot.
    """
    swept = [method, *runs]
    for run in swept:
        if not isinstance(run, SketchEncoder) or not hasattr(run.config, "alpha_max"):
            raise ValueError(f"runs must be of SketchEmbedNet, got one of {type(run).__name__}")
    paper_task, paper = PAPER_ALPHA.get(data.name, ((5, 1), {}))
    way = paper_task[0] if way is None else check_integer("way", way, 2)
    shot = paper_task[1] if shot is None else check_integer("shot", shot, 1)
    check_integer("per_class", per_class, 1)
    options: dict[str, Any] = {
        "way": way,
        "shot": shot,
        "episodes": _check_episodes(data, episodes),
        "seed": check_integer("seed", seed, 0),
        "jobs": jobs,
    }
    networks = {f"run {number}": run for number, run in enumerate(swept) if isinstance(run, SketchEncoder)}
    task = _fewshot_images(method, networks, data, split, rotations, per_class, seed)
    rows: list[dict[str, Any]] = []
    for network in sorted(networks.values(), key=_alpha_max):
        accuracy = few_shot_accuracy(_embed(network, task.images), task.labels, **options)
        row = {
            "alpha_max": _alpha_max(network),
            "trained on": network.trained_on,
            "steps": int(network.steps_trained),
            _column(way, shot): accuracy.percent(),
        }
        if paper and (way, shot) == paper_task:
            row["paper"] = paper.get(_alpha_max(network))
        rows.append(row)
    random = few_shot_accuracy(_embed(untrained, task.images), task.labels, **options)
    rows.append(
        {"alpha_max": None, "trained on": "untrained", "steps": 0, _column(way, shot): random.percent()}
    )
    differing = _differing_fields([network.config for network in networks.values()], {"alpha_max"})
    note = (
        f"Accuracy in percent over {options['episodes']} episodes, 95% intervals; {task.what}. "
        f"{training_facts(method)}"
    )
    if any("paper" in row for row in rows):
        note += f" Paper: {PAPER_ALPHA_RUNS[data.name]}"
    if differing:
        note += f" The runs differ in more than alpha_max: {', '.join(differing)}."
    return [Table("Few-shot classification against the weight of the pixel loss", rows, note)]


def _alpha_max(network: SketchEncoder) -> float:
    return float(getattr(network.config, "alpha_max"))  # noqa: B009  (only SketchEmbedNet's config has it)


def _differing_fields(configs: Sequence[Any], but: set[str]) -> list[str]:
    """Names of the fields in which the configs are not all alike."""
    return [
        field.name
        for field in dataclasses.fields(configs[0])
        if field.name not in but and len({getattr(config, field.name) for config in configs}) > 1
    ]


# ---- labelled and unseen drawings --------------------------------------------------------------------------


class Division(NamedTuple):
    """Drawings of some classes: those a classifier learns from, and others to judge it by; labels from 0."""

    train: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    classes: int
    trained_on: int
    """how many of the test drawings are of the networks' training data"""


class _Drawings:
    """The drawings of a data set, its training and held-out classes, and which the networks learned from."""

    def __init__(
        self, method: SketchEncoder, networks: Mapping[str, SketchEncoder], data: DataSpec, per_class: int
    ) -> None:
        self.method, self.data = method, data
        # some are longer than max_length: four times as many as wanted leave enough
        self.drawings = networks_module.read_drawings(data, 4 * per_class)
        _check_same_split(networks, method, data, self.drawings.class_names)
        config = method.config
        self.seen, self.unseen = split_classes(
            self.drawings.class_names, config.held_out_classes, config.split_seed
        )
        if not self.unseen:
            raise ValueError(
                f"held_out_classes must leave a class to evaluate on, got {config.held_out_classes!r}"
            )
        learned = [n.config for n in trained_networks(networks).values() if n.trained_on in (None, data.name)]
        self._samples = sorted({c.drawings_per_class for c in learned})

    def divide(self, names: Sequence[str], classes: int, train: int, test: int, seed: int) -> Division:
        """At most `classes` of the classes `names`, those with most drawings; of equal ones by `seed`.

        Of each at most `train` and `test` drawings, in this proportion where it has fewer; first in test are
        those that none of the networks learned from.
        """
        usable = usable_drawings(self.drawings, list(names), self.method.config)
        rng = np.random.default_rng(seed)
        rows_of = {
            label: np.flatnonzero(usable.labels == label) for label in np.unique(usable.labels).tolist()
        }
        rows_of = {label: rng.permutation(rows) for label, rows in rows_of.items() if len(rows) >= 2}
        order = rng.permutation(list(rows_of)).tolist()
        chosen = sorted(order, key=lambda label: -min(len(rows_of[label]), train + test))[:classes]
        if len(chosen) < 2:
            raise ValueError(f"data must hold two drawings each of two such classes, got {len(chosen)}")
        learned = self._learned(usable, names)
        parts: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
        for label in chosen:
            rows = rows_of[label][np.argsort(learned[rows_of[label]], kind="stable")]
            held = min(test, max(len(rows) * test // (train + test), 1))
            parts[0].append(rows[held : held + train])
            parts[1].append(rows[:held])
        images = [rendered_images(self.method, usable.subset(np.concatenate(part))).images for part in parts]
        labels = [np.repeat(np.arange(len(part)), [len(rows) for rows in part]) for part in parts]
        return Division(
            images[0],
            labels[0],
            images[1],
            labels[1],
            len(chosen),
            int(learned[np.concatenate(parts[1])].sum()),
        )

    def _learned(self, usable: StrokeDataset, names: Sequence[str]) -> NDArray[np.bool_]:
        """For each drawing whether a network was trained on it, told by its points."""
        learned = np.zeros(len(usable), bool)
        if set(names) <= set(self.unseen) or not self._samples:
            return learned
        if self._samples[0] == 0 and self.data.name != "procedural":  # one was trained on all there are
            return ~learned
        keys = _contents(usable)
        for per_class in self._samples:
            sample = networks_module.read_drawings(self.data, per_class or None)
            known = set(_contents(usable_drawings(sample, list(names), self.method.config)))
            learned |= np.array([key in known for key in keys])
        return learned


def _contents(drawings: StrokeDataset) -> list[bytes]:
    return [drawings[index][0].points.tobytes() for index in range(len(drawings))]


def _division_note(what: str, division: Division) -> str:
    test = len(division.test_labels)
    learned = (
        f", {division.trained_on} of them in the unlabelled training data" if division.trained_on else ""
    )
    return (
        f"{what}: {division.classes} classes, {len(division.train_labels)} labelled drawings, "
        f"{test} others to test{learned}."
    )


# ---- linear classification (Table 4) -----------------------------------------------------------------------


def linear(
    method: SketchEncoder,
    untrained: SketchEncoder,
    data: DataSpec,
    *,
    conv_vae: Method | None = None,
    contrastive: Method | None = None,
    sketchembednet: Method | None = None,
    labelled: int = 256,
    test: int = 64,
    seen_classes: int = 300,
    unseen_classes: int = 45,
    l2: float = 1e-3,
    seed: int = 0,
) -> list[Table]:
    """A linear classifier on frozen embeddings (section 4.3, Table 4): new drawings, and new classes.

    On stroke data (Table 4a) one classifier learns labelled drawings of the training classes, another of the
    classes held out from the networks' training; both are judged by other drawings of theirs. Where a network
    was trained on a part of the drawings (drawings_per_class), those it has not seen come first in the test;
    the note says how many it has, always without labels. On ilsvrc (Table 4b) the root is a folder with
    `train/<class>/` and `val/<class>/`, and top-1 and top-5 are of its classes.

    Each dimension of an embedding is standardised first; the paper does not say whether it did, and without
    it an untrained network, whose embeddings hardly vary, does worse than here.

    Args:
        method, untrained: the trained network, and one of the same config with fresh weights.
        data: stroke data, or ilsvrc.
        conv_vae, contrastive, sketchembednet: runs to stand beside it.
        labelled: labelled images of each class, as in the paper; a class with fewer is divided in the same
            proportion.
        test: other images of each class to judge by; the paper gives no number.
        seen_classes: training classes at most, those with most drawings; the paper has 300.
        unseen_classes: held-out classes at most; the paper has 45.
        l2: weight of the L2 penalty, see evaluate.linear.linear_accuracy.
        seed: of the choice of drawings.
    """
    networks = compared_networks(
        method, untrained, conv_vae=conv_vae, contrastive=contrastive, sketchembednet=sketchembednet
    )
    check_integer("labelled", labelled, 1)
    check_integer("test", test, 1)
    check_integer("seen_classes", seen_classes, 2)
    check_integer("unseen_classes", unseen_classes, 2)
    check_number("l2", l2, at_least=0)
    check_integer("seed", seed, 0)
    if data.name == "ilsvrc":
        return [_ilsvrc_table(networks, _root(data), labelled, test, l2, seed)]
    drawings = _Drawings(method, networks, data, labelled + test)
    divisions = {
        "training classes": drawings.divide(drawings.seen, seen_classes, labelled, test, seed),
        "unseen classes": drawings.divide(drawings.unseen, unseen_classes, labelled, test, seed),
    }
    rows: list[dict[str, Any]] = []
    for name, network in networks.items():
        row: dict[str, Any] = {"network": name, "trained on": network.trained_on}
        for which, (what, division) in enumerate(divisions.items()):
            accuracy = linear_accuracy(
                _embed(network, division.train),
                division.train_labels,
                _embed(network, division.test),
                division.test_labels,
                l2=l2,
                device=network.offset_scale.device,
            )[1]
            row[f"{division.classes}-way, {what}"] = accuracy.percent()
            if _on_quickdraw(data, name, network):
                row[f"paper: {(300, 45)[which]}-way"] = PAPER_LINEAR[name][which]
        rows.append(row)
    notes = " ".join(_division_note(what.capitalize(), division) for what, division in divisions.items())
    note = f"Accuracy in percent, 95% intervals over the test drawings; {_fit_facts(l2)} {notes}"
    return [Table(f"Linear classification: {data.name}", rows, f"{note} {networks_facts(networks)}")]


def _fit_facts(l2: float) -> str:
    """What a reader who compares with the paper has to know of the classifier."""
    return f"dimensions standardised (the paper does not say whether its were), L2 penalty {l2:g}."


def _on_quickdraw(data: DataSpec, name: str, network: SketchEncoder) -> bool:
    """Whether the paper's figures of QuickDraw, trained there and on Conv4, are of this network's kind."""
    known = network.trained_on == "quickdraw" or name == "untrained"
    return data.name == "quickdraw" and known and network.config.encoder == "conv4"


ILSVRC_EXPECTED = """  <root>/train/<class>/<file>
  <root>/val/<class>/<file>"""
_IMAGES_AT_ONCE = 4096  # bounds the images in memory


class _Embedded(NamedTuple):
    """The same images as every network embeds them."""

    vectors: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int64]


def _ilsvrc_table(
    networks: Mapping[str, SketchEncoder], root: Path, labelled: int, test: int, l2: float, seed: int
) -> Table:
    parts, skipped = _embedded_folders(networks, root, {"train": labelled, "val": test}, seed)
    rows: list[dict[str, Any]] = []
    for name, network in networks.items():
        train, val = ((part.vectors[name], part.labels) for part in parts.values())
        found = linear_accuracy(*train, *val, l2=l2, tops=(1, 5), device=network.offset_scale.device)
        row: dict[str, Any] = {"network": name, "trained on": network.trained_on}
        known = name == "untrained" or network.trained_on == "sketchy"
        for which, top in enumerate((1, 5)):
            row[f"top-{top}"] = found[top].percent()
            if known and network.config.encoder == "resnet12":
                row[f"paper: top-{top}"] = PAPER_ILSVRC[name][which]
        rows.append(row)
    labels = {part: embedded.labels for part, embedded in parts.items()}
    note = (
        f"Accuracy in percent, 95% intervals over the test images; {_fit_facts(l2)} "
        f"{len(np.unique(labels['train']))} classes, {len(labels['train'])} labelled images, "
        f"{len(labels['val'])} of the validation set to test."
    )
    if skipped:
        note += f" Left out: {', '.join(f'{reason} {count}' for reason, count in skipped.items())}."
    return Table("Linear classification: ILSVRC", rows, f"{note} {networks_facts(networks)}")


def _embedded_folders(
    networks: Mapping[str, SketchEncoder], root: Path, per_class: Mapping[str, int], seed: int
) -> tuple[dict[str, _Embedded], dict[str, int]]:
    """At most so many images of each class of `<root>/<part>/<class>/<file>`; what was left out, by reason.

    All parts are labelled by the classes of the first. Each image is read once, for all networks.
    """
    size = max(network.config.image_size for network in networks.values())
    parts: dict[str, _Embedded] = {}
    skipped: dict[str, int] = {}
    with open_tree(existing_path(root), into_archive=True) as tree:
        found = {part: find_images(tree, part) for part in per_class}
        if not all(files for files, _ in found.values()):
            raise layout_error(root, ILSVRC_EXPECTED, tree.names)
        names = sorted({file.class_name for file in next(iter(found.values()))[0]})
        place = {name: label for label, name in enumerate(names)}
        for part, (files, passed_over) in found.items():
            if others := sorted({file.class_name for file in files} - set(names)):
                raise ValueError(
                    f"root: {part} must hold classes of {next(iter(found))}, got {others[:3]} beside them"
                )
            labels = np.array([place[file.class_name] for file in files])
            shuffled = np.random.default_rng(seed).permutation(len(files))
            chosen = [shuffled[labels[shuffled] == c][: per_class[part]] for c in np.unique(labels)]
            picked = [files[row] for row in np.concatenate(chosen)]
            vectors: dict[str, list[NDArray[np.float32]]] = {name: [] for name in networks}
            read: list[NDArray[np.int64]] = []
            add_counts(skipped, passed_over)
            for start in range(0, len(picked), _IMAGES_AT_ONCE):
                images = read_images(tree, picked[start : start + _IMAGES_AT_ONCE], names, size)
                add_counts(skipped, images.skipped)
                if len(images):
                    read.append(images.labels)
                    for name, network in networks.items():
                        vectors[name].append(_embed(network, images.images))
            if not read:
                raise ValueError(f"root: {part} must hold images that can be read, got none")
            embedded = {name: np.concatenate(of_network) for name, of_network in vectors.items()}
            parts[part] = _Embedded(embedded, np.concatenate(read))
    return parts, skipped


# ---- recognisability (Table 5) -----------------------------------------------------------------------------


def recognisability(
    method: SketchEncoder,
    untrained: SketchEncoder,
    data: DataSpec,
    *,
    conv_vae: Method | None = None,
    contrastive: Method | None = None,
    sketchembednet: Method | None = None,
    classes: int = 45,
    per_class: int = 500,
    test: int = 50,
    epochs: int = 20,
    width: int = 16,
    temperature: float = 0.0,
    samplings: int = 5,
    seed: int = 0,
) -> list[Table]:
    """How often a classifier of real drawings names what the networks draw (section 4.5, Table 5).

    One ResNet-12 is trained on drawings of training classes, another on those of held-out classes. The
    networks draw other examples of both from their embeddings, and the classifiers name the pictures;
    "original data" is what they make of the examples themselves. A network that cannot generate has no row.

    Args:
        method, untrained: the trained network, and one of the same config with fresh weights.
        data: stroke data.
        conv_vae, contrastive, sketchembednet: runs to stand beside it.
        classes: of each kind at most, those with most drawings; the paper has 45.
        per_class: real drawings of each class that a classifier learns from; a class with fewer is divided in
            the proportion of per_class and test.
        test: examples of each class that the networks draw.
        epochs: of the classifiers' training.
        width: channels of the classifier's first block; 64 is the encoder ResNet-12, 16 trains on a CPU.
        temperature: of drawing; 0 draws the likeliest.
        samplings: pictures of each example where the temperature is above 0.
        seed: of the choice of drawings, the classifiers and the drawing.
    """
    networks = compared_networks(
        method, untrained, conv_vae=conv_vae, contrastive=contrastive, sketchembednet=sketchembednet
    )
    for flag, value, least in (
        ("classes", classes, 2),
        ("per_class", per_class, 1),
        ("test", test, 1),
        ("epochs", epochs, 1),
        ("width", width, 1),
        ("samplings", samplings, 1),
        ("seed", seed, 0),
    ):
        check_integer(flag, value, least)
    check_number("temperature", temperature, at_least=0)
    able = {name: network for name, network in networks.items() if _generates(network)}
    if not trained_networks(able):
        raise ValueError(
            f"recognisability needs a network that generates, got {', '.join(trained_networks(networks))}"
        )
    drawings, size = _Drawings(method, networks, data, per_class + test), method.config.image_size
    seeds = range(seed, seed + (samplings if temperature > 0 else 1))
    cells: dict[str, dict[str, Accuracy]] = {}
    notes = []
    for what, names in {"seen": drawings.seen, "unseen": drawings.unseen}.items():
        division = drawings.divide(names, classes, per_class, test, seed)
        notes.append(_division_note(f"{what.capitalize()} classes", division))
        classifier = _classifier(method, division, epochs, width, seed)
        right = recognised(classifier, division.test, division.test_labels)
        cells.setdefault("original data", {})[what] = mean_accuracy(right.astype(np.float64))
        for name, network in able.items():
            codes = torch.from_numpy(_embed(network, division.test))
            named = [
                recognised(classifier, _generated(network, codes, size, temperature, s), division.test_labels)
                for s in seeds
            ]
            # an example is one observation, however often it was drawn
            cells.setdefault(name, {})[what] = mean_accuracy(np.mean(named, axis=0))
    rows: list[dict[str, Any]] = []
    for name, found in cells.items():
        row: dict[str, Any] = {
            "pictures": name,
            "trained on": able[name].trained_on if name in able else None,
        }
        for which, what in enumerate(("seen", "unseen")):
            row[what] = found[what].percent()
            if data.name == "quickdraw" and name in PAPER_RECOGNISED:
                row[f"paper: {what}"] = PAPER_RECOGNISED[name][which]
        rows.append(row)
    note = (
        f"Percent named rightly by a ResNet-12 of width {width} after {epochs} epochs, 95% intervals over "
        f"the examples; each drawn {len(seeds)} time{'s' * (len(seeds) > 1)} at temperature {temperature:g}. "
        "The original data are examples the classifier has not seen (the paper gives its training accuracy). "
        f"{' '.join(notes)}"
    )
    return [Table(f"Recognisability of drawings: {data.name}", rows, f"{note} {networks_facts(networks)}")]


def _generates(network: SketchEncoder) -> bool:
    return type(network).generate is not SketchEncoder.generate


def _classifier(method: SketchEncoder, division: Division, epochs: int, width: int, seed: int) -> nn.Module:
    """A ResNet-12 trained on the division's labelled drawings, on the method's device."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            ResNet12(1, (width, 2 * width, 4 * width, 8 * width)), nn.Linear(8 * width, division.classes)
        )
    network = network.to(method.offset_scale.device)
    batch_size = min(64, max(8, len(division.train) // 16))  # an epoch is 16 steps at least
    return train_classifier(
        network, division.train, division.train_labels, epochs=epochs, batch_size=batch_size, seed=seed
    )


@torch.no_grad()
def _generated(network: SketchEncoder, codes: Tensor, size: int, temperature: float, seed: int) -> Tensor:
    """Pictures [N, size, size] of codes [N, D], ink = 1; a part at a time, each under a seed of its own."""
    device = network.offset_scale.device
    pictures = []
    for number, part in enumerate(codes.split(256)):
        drawn = network.generate(part.to(device), temperature=temperature, seed=(seed << 20) + number).cpu()
        pictures.append(drawn if drawn.dim() == 3 else 1 - drawn.mean(dim=1))  # of photos: its darkness
    drawn = torch.cat(pictures)
    if drawn.shape[-1] == size:
        return drawn
    return F.interpolate(drawn[:, None], (size, size), mode="bilinear", antialias=True)[:, 0]


SketchEncoder.protocols = {
    "fewshot": fewshot,
    "alpha_sweep": alpha_sweep,
    "linear": linear,
    "recognisability": recognisability,
    **SketchEncoder.protocols,
}
