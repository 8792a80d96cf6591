"""PM-JDOT: its equations against plain loops, banks and queue, variants, resume, ranks, protocol."""

from __future__ import annotations

import csv
import json
import math
import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sketchfast import cli
from sketchfast.data.images import ImageSet, SketchPhotoSet
from sketchfast.data.splits import SKETCHY_CLASSES
from sketchfast.methods import get_method
from sketchfast.methods import pm_jdot as module
from sketchfast.methods.base import DataSpec
from sketchfast.methods.pm_jdot import (
    PMJDOT,
    VARIANTS,
    ImageBatch,
    PMJDOTConfig,
    SketchPhotoBatches,
    embed_images,
    retrieval,
)
from sketchfast.runs import read_checkpoint
from sketchfast.train import RunOptions, train

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("SKETCHFAST_DATA", ROOT.parent / "shared" / "data"))
#: no view differs from its image
PLAIN = {
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "flip": 0.0,
    "jitter": 0.0,
    "grey": 0.0,
    "blur": 0.0,
}
TINY = replace(PMJDOT.preset("tiny"), impl="reference", kmeans=False, align_after=0)


def image_set(domain: str, counts: list[int], size: int = 32, seed: int = 0) -> ImageSet:
    """Class c is a bar at angle c: dark on white as a sketch, coloured on a dark ground as a photo."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    y, x = np.mgrid[:size, :size] / size - 0.5
    images = np.empty((len(labels), size, size, 3), np.uint8)
    for image, label in zip(images, labels, strict=True):
        angle = math.pi * (label + 0.2 * rng.standard_normal()) / len(counts)
        bar = np.abs(x * np.sin(angle) - y * np.cos(angle)) < 0.08
        if domain == "sketches":
            image[:] = np.where(bar, 20, 255)[..., None]
        else:
            image[:] = np.where(bar[..., None], rng.integers(128, 256, 3), rng.integers(0, 90, 3))
    names = [f"{label}/{domain}{row}" for row, label in enumerate(labels)]
    return ImageSet(images, labels.astype(np.int64), [f"class {c}" for c in range(len(counts))], names)


def pictures_of(sketches: list[int], photos: list[int], **fields) -> SketchPhotoSet:
    one, two = image_set("sketches", sketches, **fields), image_set("photos", photos, **fields)
    return SketchPhotoSet(one, two, one.class_names, np.full(len(one), -1), {"broken image": 2})


@pytest.fixture(scope="module")
def images() -> SketchPhotoSet:
    return pictures_of([12, 12, 12], [8, 9, 10])


@pytest.fixture(autouse=True)
def _small_data(monkeypatch, images) -> None:
    monkeypatch.setattr(module, "read_images", lambda data, config: images)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(seed: int = 0, **fields) -> PMJDOT:
    torch.manual_seed(seed)
    method = PMJDOT(replace(TINY, **fields))
    method.train_data(DataSpec())
    return method


def make_batch(method: PMJDOT, first: int = 0) -> ImageBatch:
    count = method.config.batch_size
    return method.train_data(DataSpec()).__getitems__([(first + i) % 30 for i in range(count)])


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float64 features of length 1."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def plain_plan(cost: np.ndarray, epsilon: float, iterations: int = 2000) -> np.ndarray:
    """Sinkhorn's scaling form, uniform marginals."""
    rows, columns = cost.shape
    kernel = np.exp(-cost / epsilon)
    v = np.ones(columns)
    for _ in range(iterations):
        u = 1 / rows / (kernel @ v)
        v = 1 / columns / (kernel.T @ u)
    return u[:, None] * kernel * v


# --- config -----------------------------------------------------------------------------------------------


def test_default_is_the_paper() -> None:
    config = PMJDOT.preset("paper")
    assert config == PMJDOTConfig()
    assert get_method("pm_jdot") is PMJDOT
    assert (config.alpha, config.beta, config.mu, config.nu) == (0.1, 0.001, 1.0, 10.0)
    assert (config.learning_rate, config.lr_factor, config.lr_epochs) == (0.01, 0.5, 10.0)
    assert (config.batch_size, config.image_size, config.backbone) == (128, 96, "resnet50")
    assert (config.prototypes, config.bank_size, config.feature_size) == (125, 3840, 128)
    assert (config.temperature, config.assign_epsilon, config.assign_iterations) == (0.1, 0.05, 3)
    assert (config.variant, config.parts) == ("v5", (True, True, True))


def test_presets_share_all_but_sizes() -> None:
    for name in ("small", "tiny"):
        config, paper = PMJDOT.preset(name), PMJDOTConfig()
        for field in ("alpha", "beta", "mu", "nu", "temperature", "assign_epsilon", "variant"):
            assert getattr(config, field) == getattr(paper, field), field
    with pytest.raises(ValueError, match="preset must be one of"):
        PMJDOT.preset("large")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"variant": "v6"}, "variant must be one of v1, v2, v3, v4, v5, got 'v6'"),
        ({"head": "conv"}, "head must be one of linear, mlp, got 'conv'"),
        ({"split": "few"}, "split must be one of unsupervised, zero_shot, got 'few'"),
        ({"prototypes": 1}, "prototypes must be at least 2, got 1"),
        ({"image_size": 8}, "image_size must be at least 16, got 8"),
        ({"bank_size": 7}, "bank_size must be at least batch_size, 8.*got 7"),
        ({"queue_size": -1}, "queue_size must be at least 0, got -1"),
        ({"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
        ({"plan_epsilon": 0.0}, "plan_epsilon must be greater than 0"),
        ({"assign_epsilon": -1.0}, "assign_epsilon must be greater than 0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"lr_factor": 0.0}, r"lr_factor must lie in \(0, 1\], got 0.0"),
        ({"nu": -1.0}, "nu must be at least 0, got -1.0"),
        ({"queries_per_class": 0}, "queries_per_class must be at least 1, got 0"),
        ({"crop_scale": (0.5, 2.0)}, r"crop_scale must lie in \(0, 1\]"),
        ({"grey": 2.0}, "grey must be a probability"),
    ],
)
def test_bad_fields_are_named(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(TINY, **fields)


def test_a_bank_smaller_than_the_batch_is_fine_where_there_is_none() -> None:
    assert replace(TINY, variant="v3", bank_size=1).bank_size == 1


def test_unknown_backbone_is_named() -> None:
    with pytest.raises(ValueError, match="backbone must be a timm model, got 'resnet51'"):
        PMJDOT(replace(TINY, backbone="resnet51"))


# --- data -------------------------------------------------------------------------------------------------


def test_an_epoch_shows_each_image_of_both_domains() -> None:
    data = pictures_of([20, 3], [4, 3])
    batches = SketchPhotoBatches(data)
    assert len(batches) == 23
    assert batches.skipped == {"broken image": 2}
    assert sorted(batches.rows["sketches"]) == list(range(23))
    assert set(Counter(batches.rows["photos"].tolist()).values()) == {3, 4}
    batch = batches.__getitems__([5, 0])
    assert isinstance(batch, ImageBatch)  # and so no label
    assert batch.sketches.dtype == torch.uint8
    assert batch.sketches.shape == batch.photos.shape == (2, 3, 32, 32)
    row = batches.rows["photos"][5]
    assert np.array_equal(batch.photos[0].permute(1, 2, 0).numpy(), data.photos.images[row])
    for one, of_two in zip(batches[0], batch, strict=True):
        assert torch.equal(one, of_two[1])


def test_neighbours_in_a_batch_do_not_share_a_class() -> None:
    """Readers sort by class; a pairing by position would give the classes away."""
    data = pictures_of([40, 40, 40, 40], [40, 40, 40, 40], size=16)
    batches = SketchPhotoBatches(data)
    same = data.sketches.labels[batches.rows["sketches"]] == data.photos.labels[batches.rows["photos"]]
    assert 0.1 < same.mean() < 0.4


def test_fingerprint_tells_data_sets_apart(images) -> None:
    fingerprint = SketchPhotoBatches(images).fingerprint
    assert fingerprint == SketchPhotoBatches(pictures_of([12, 12, 12], [8, 9, 10])).fingerprint
    assert fingerprint != SketchPhotoBatches(pictures_of([12, 12, 12], [8, 9, 10], seed=1)).fingerprint
    assert fingerprint != SketchPhotoBatches(pictures_of([12, 11, 12], [8, 9, 10])).fingerprint


def test_queries_are_kept_out_of_training(images) -> None:
    method = make(queries_per_class=5)
    assert method.training_images.tolist() == [36 - 15, 27]
    split = module.read_split(DataSpec(), method.config)
    assert not set(split.query.names) & set(split.train.sketches.names)
    assert len(split.query) == 15
    zero_shot = make(split="zero_shot", test_classes="class 1")
    assert zero_shot.training_images.tolist() == [24, 18]


def test_zero_shot_classes_are_names_or_a_list() -> None:
    names = ["a", "b", "c", "d"]
    assert module.test_classes("b,d", names) == ["b", "d"]
    assert module.test_classes("a", names) == ["a"]
    drawn = module.test_classes("random-2-seed1", names)
    assert len(drawn) == 2
    assert set(drawn) < set(names)
    assert module.test_classes("b, d", names) == ["b", "d"]
    with pytest.raises(ValueError, match=r"test_classes must be classes of the data, got 'b,e' with 'e'"):
        module.test_classes("b,e", names)
    with pytest.raises(ValueError, match=r"test_classes must be classes of the data .* got 'e'"):
        module.test_classes("e", names)
    assert len(module.test_classes("sketchy-21", list(SKETCHY_CLASSES))) == 21


def test_unknown_data_is_named(monkeypatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match="data must be one of procedural, sketch_photo, sketchy"):
        PMJDOT(TINY).train_data(DataSpec("mnist"))
    with pytest.raises(ValueError, match="root must be the folder that holds sketchy, got None"):
        PMJDOT(TINY).train_data(DataSpec("sketchy"))


# --- equations --------------------------------------------------------------------------------------------


def test_probabilities_are_equation_2() -> None:
    method, x, u = make(), unit(4, 16), unit(5, 16, seed=1)
    got = method.probabilities(x, u)
    for i in range(4):
        terms = [math.exp(float(x[i] @ u[j]) / 0.1) for j in range(5)]
        for k in range(5):
            assert got[i, k].item() == pytest.approx(terms[k] / sum(terms))


@pytest.mark.parametrize("queued", [0, 12])
def test_assignments_are_the_batchs_rows_of_equations_3_and_4(queued: int) -> None:
    """Three iterations of the plain form over batch and queue: prototypes first, then samples."""
    method, u = make(), unit(5, 16, seed=1)
    batch, queue = unit(8, 16, seed=2), unit(queued, 16, seed=3)
    got = method.assignments(batch @ u.T, queue @ u.T)
    q = np.exp((torch.cat((batch, queue)) @ u.T).numpy() / 0.05)
    for _ in range(3):
        q /= q.sum(0, keepdims=True) * q.shape[1]
        q /= q.sum(1, keepdims=True) * q.shape[0]
    np.testing.assert_allclose(got.numpy(), q[:8] * q.shape[0], rtol=1e-6)


def test_semantic_loss_is_equation_1() -> None:
    method, u = make(), unit(5, 16, seed=1)
    x, queue = unit(2, 2, 4, 16, seed=2), unit(2, 12, 16, seed=3)  # domain, view, image
    got = method.semantic_loss(x, u, queue)
    total = 0.0
    for one, two in ((0, 1), (1, 0)):
        features = torch.cat((x[0, one], x[1, one]))
        p = method.probabilities(torch.cat((x[0, two], x[1, two])), u)
        z = method.assignments(features @ u.T, queue[one] @ u.T)
        for i in range(8):
            total -= sum(z[i, k].item() * math.log(p[i, k].item()) for k in range(5))
    assert got.item() == pytest.approx(total / 8)


def prototype_loss(method: PMJDOT, x: torch.Tensor, bank: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Equations 5 to 8 for one domain by loops; differentiable in x and u but for the plan."""
    config = method.config
    y = method.probabilities(bank, u)
    cost = np.empty((len(u), len(bank)))
    for i in range(len(u)):
        v = F.one_hot(torch.tensor(i), len(u))
        for j in range(len(bank)):
            cost[i, j] = config.alpha * (1 - (u[i] @ bank[j]).item())
            cost[i, j] += config.beta * (v - y[j]).square().sum().item()
    plan = plain_plan(cost, config.plan_epsilon)[:, : len(x)]
    plan /= plan.sum()
    total = torch.zeros((), dtype=x.dtype)
    for i in range(len(u)):
        for j in range(len(x)):
            d_f = 1 - u[i] @ x[j]
            d_c = -torch.log(method.probabilities(x[j : j + 1], u)[0, i])
            total = total + plan[i, j] * (config.alpha * d_f + config.beta * d_c)
    return total


@pytest.mark.parametrize("kept", [0, 11])
def test_alignment_with_prototypes_is_equations_5_to_8(kept: int) -> None:
    """Values and gradients: the plan is a constant, older features get nothing."""
    fields = {"plan_epsilon": 0.02, "plan_tolerance": 1e-9, "plan_iterations": 2000, "beta": 0.02}
    method = make(variant="v5", **fields)
    leaves = [unit(2, 6, 16, seed=4), unit(5, 16, seed=5), unit(2, kept, 16, seed=6)]
    x, u, older = (leaf.clone().requires_grad_() for leaf in leaves)
    losses = method.alignment_loss(x, older, u)
    assert list(losses) == ["align_sketch", "align_photo"]
    grads = torch.autograd.grad(sum(losses.values()), (x, u, older), allow_unused=True)
    x2, u2 = (leaf.clone().requires_grad_() for leaf in leaves[:2])
    want = [prototype_loss(method, x2[d], torch.cat((x2[d], leaves[2][d])).detach(), u2) for d in (0, 1)]
    for got, expected in zip(losses.values(), want, strict=True):
        assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    for got, expected in zip(grads[:2], torch.autograd.grad(sum(want), (x2, u2)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
    assert grads[2] is None or not grads[2].any()


def domain_loss(method: PMJDOT, bank: torch.Tensor, u: torch.Tensor, count: int) -> torch.Tensor:
    """DeepJDOT between the banks over the pairs that hold an image of the batch, by loops."""
    config, (s, p) = method.config, bank
    y_s, y_p = method.probabilities(s, u), method.probabilities(p, u)
    cost = np.array(
        [
            [
                config.alpha * (1 - (s[i] @ p[j]).item())
                + config.beta * (y_s[i] - y_p[j]).square().sum().item()
                for j in range(len(p))
            ]
            for i in range(len(s))
        ]
    )
    plan = plain_plan(cost, config.plan_epsilon)
    pairs = [(i, j) for i in range(len(s)) for j in range(len(p)) if i < count or j < count]
    mass, total = sum(plan[pair] for pair in pairs), torch.zeros((), dtype=bank.dtype)
    for i, j in pairs:
        crossed = -(y_s[i].detach() @ y_p[j].log() + y_p[j].detach() @ y_s[i].log()) / 2
        total = total + plan[i, j] / mass * (config.alpha * (1 - s[i] @ p[j]) + config.beta * crossed)
    return total


@pytest.mark.parametrize(("variant", "kept"), [("v2", 0), ("v4", 5)])
def test_alignment_between_domains_is_deepjdot(variant: str, kept: int) -> None:
    fields = {"plan_epsilon": 0.02, "plan_tolerance": 1e-9, "plan_iterations": 2000, "beta": 0.02}
    method = make(variant=variant, **fields)
    leaves = [unit(2, 4, 16, seed=4), unit(5, 16, seed=5), unit(2, kept, 16, seed=6)]
    x, u = (leaf.clone().requires_grad_() for leaf in leaves[:2])
    losses = method.alignment_loss(x, leaves[2], u)
    assert list(losses) == ["align"]
    x2, u2 = (leaf.clone().requires_grad_() for leaf in leaves[:2])
    want = domain_loss(method, torch.cat((x2, leaves[2]), dim=1), u2, count=4)
    assert losses["align"].item() == pytest.approx(want.item(), rel=1e-6)
    grads = torch.autograd.grad(losses["align"], (x, u))
    for got, expected in zip(grads, torch.autograd.grad(want, (x2, u2)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)


def test_plans_are_a_bank_apart_from_the_batch() -> None:
    """What older features say changes the plan, and so the loss of the same batch."""
    method, x, u = make(variant="v5"), unit(2, 6, 16), unit(5, 16, seed=1)
    none = method.alignment_loss(x, unit(2, 0, 16), u)["align_sketch"]
    some = method.alignment_loss(x, unit(2, 10, 16, seed=3), u)["align_sketch"]
    assert abs(none - some) > 1e-5


# --- the step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_differ_as_table_3_says(monkeypatch, variant: str) -> None:
    jdot, prototypes, memory_bank = VARIANTS[variant]
    method = make(variant=variant, prototypes=6)
    shapes: list[tuple[int, ...]] = []
    solve = module.sinkhorn
    monkeypatch.setattr(
        module, "sinkhorn", lambda cost, *a, **k: shapes.append(tuple(cost.shape)) or solve(cost, *a, **k)
    )
    for step in range(2):
        losses = method.loss(make_batch(method, 8 * step), step)
    keys = {"loss", "semantic"} | (
        {"align_sketch", "align_photo"} if prototypes else {"align"} if jdot else set()
    )
    assert losses.keys() == keys
    columns = 16 if memory_bank else 8
    want = {True: (2, 6, columns), False: (columns, columns)}[prototypes]
    assert shapes == ([] if not jdot else [(2, 6, 8) if prototypes else (8, 8), want])
    assert method.banks.shape[1] == (16 if memory_bank else 0)
    align = sum(losses[key] for key in keys - {"loss", "semantic"})
    torch.testing.assert_close(losses["loss"], losses["semantic"] + 10 * align)
    losses["loss"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert all(parameter.grad.any() for parameter in (method.prototypes, *method.head.parameters()))


def test_the_semantic_loss_is_the_same_for_every_variant() -> None:
    def semantic(variant: str) -> float:
        method = make(variant=variant, seed=1)
        torch.manual_seed(5)
        return method.loss(make_batch(method), 0)["semantic"].item()

    assert len({semantic(variant) for variant in VARIANTS}) == 1


def test_the_alignment_enters_at_its_step() -> None:
    method = make(align_after=2, kmeans=False)
    keys = [set(method.loss(make_batch(method), step)) for step in range(3)]
    assert keys[0] == keys[1] == {"loss", "semantic"}
    assert keys[2] == {"loss", "semantic", "align_sketch", "align_photo"}


def test_banks_and_queue_are_first_in_first_out(monkeypatch) -> None:
    method = make(batch_size=4, bank_size=10, queue_size=20)
    seen: list[torch.Tensor] = []
    views = method.two_views
    monkeypatch.setattr(method, "two_views", lambda batch: seen.append(views(batch)) or seen[-1])
    used: list[tuple[int, int]] = []
    align, semantic = method.alignment_loss, method.semantic_loss
    queues: list[int] = []
    monkeypatch.setattr(
        method,
        "alignment_loss",
        lambda x, older, u: used.append((x.shape[1], older.shape[1])) or align(x, older, u),
    )
    monkeypatch.setattr(
        method, "semantic_loss", lambda x, u, queue: queues.append(queue.shape[1]) or semantic(x, u, queue)
    )
    filled = []
    for step in range(4):
        method.loss(make_batch(method, 4 * step), step)
        filled.append(method.filled.tolist())
    assert filled == [[8, 4], [16, 8], [20, 10], [20, 10]]
    assert used == [(4, 0), (4, 4), (4, 6), (4, 6)]  # batch and older features: never above 10
    assert queues == [0, 0, 0, 20]  # once it is full
    first_views = [x[:, 0] for x in reversed(seen)]
    torch.testing.assert_close(method.banks, torch.cat(first_views, dim=1)[:, :10])
    both = [x.transpose(0, 1).flatten(1, 2) for x in reversed(seen)]
    torch.testing.assert_close(method.queue, torch.cat(both, dim=1)[:, :20])
    assert not method.banks.requires_grad
    assert {"banks", "queue", "filled", "prototypes"} <= method.state_dict().keys()


def test_the_queue_waits_for_its_step(monkeypatch) -> None:
    method = make(batch_size=4, queue_size=8, queue_start=3)
    queues: list[int] = []
    semantic = method.semantic_loss
    monkeypatch.setattr(
        method, "semantic_loss", lambda x, u, queue: queues.append(queue.shape[1]) or semantic(x, u, queue)
    )
    for step in range(5):
        method.loss(make_batch(method), step)
    assert queues == [0, 0, 0, 8, 8]
    empty = make(queue_size=0)
    for step in range(2):
        assert torch.isfinite(empty.loss(make_batch(empty), step)["loss"])


def test_evaluation_changes_nothing() -> None:
    method = make().eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.loss(make_batch(method), 0)
    method.pictures(make_batch(method))
    for name, value in method.state_dict().items():
        torch.testing.assert_close(value, before[name], msg=name)


def test_prototypes_have_length_1_in_every_step_and_move_unless_frozen() -> None:
    method = make(freeze_prototypes=2, learning_rate=1.0, lr_epochs=100)
    optimizer, _ = method.optimizer()
    moved = []
    for step in range(3):
        before = method.prototypes.detach().clone()
        optimizer.zero_grad()
        method.loss(make_batch(method), step)["loss"].backward()
        lengths = method.prototypes.detach().norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones(5))
        assert method.prototypes.grad is not None
        optimizer.step()
        moved.append(float((F.normalize(method.prototypes.detach(), dim=1) - before).abs().max()))
    assert moved[0] < 1e-6
    assert moved[1] < 1e-6
    assert moved[2] > 1e-3


def test_kmeans_start_is_the_photos_centroids_at_its_step_only() -> None:
    from sklearn.cluster import KMeans

    method = make(kmeans=True, align_after=1, learning_rate=1e-9, **PLAIN)
    method.loss(make_batch(method), 0)
    x = embed_images(method, method._training_photos)
    centroids = KMeans(5, n_init=4, random_state=0).fit(x).cluster_centers_
    before = method.prototypes.detach().clone()
    method.loss(make_batch(method), 1)
    want = F.normalize(torch.tensor(centroids), dim=1)
    torch.testing.assert_close(method.prototypes.detach(), want.float(), atol=1e-5, rtol=0)
    assert (method.prototypes - before).abs().max() > 0.05
    kept = method.prototypes.detach().clone()
    method.loss(make_batch(method), 2)
    torch.testing.assert_close(method.prototypes.detach(), kept)
    many = make(kmeans=True, prototypes=30)
    with pytest.raises(ValueError, match="prototypes must be at most the training photos, 27, got 30"):
        many.loss(make_batch(many), 0)


def test_rate_is_halved_by_epochs() -> None:
    method = make(batch_size=4, lr_epochs=2, learning_rate=0.5, queries_per_class=2)
    optimizer, schedule = method.optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    per_epoch = 30 // 4  # 30 sketches, 27 photos
    rates = []
    for _ in range(4 * per_epoch + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[: 2 * per_epoch] == [0.5] * (2 * per_epoch)
    assert rates[2 * per_epoch : 4 * per_epoch] == [0.25] * (2 * per_epoch)
    assert rates[4 * per_epoch] == 0.125


def test_training_lowers_the_loss() -> None:
    method = make(learning_rate=0.05, kmeans=True, align_after=5)
    optimizer, _ = method.optimizer()
    values = []
    for step in range(40):
        loss = method.loss(make_batch(method, 8 * step), step)["semantic"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert np.mean(values[-5:]) < np.mean(values[:3]) - 0.1
    assert int(method.steps_trained) == 40


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_features_have_length_1(head: str) -> None:
    method = make(head=head)
    x = method.two_views(make_batch(method))
    assert x.shape == (2, 2, 8, 16)
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(2, 2, 8))
    assert isinstance(method.head, torch.nn.Sequential) is (head == "mlp")


def test_views_are_ordered_by_domain_view_and_image() -> None:
    method = make(**PLAIN).eval()
    batch = make_batch(method)
    x = method.two_views(batch)
    for domain, images in enumerate(batch):
        want = method.embed(images.float() / 255)
        for view in range(2):
            torch.testing.assert_close(x[domain, view], want, atol=1e-4, rtol=0)
    sketch_views = make(
        jitter=1.0, grey=1.0, **{k: v for k, v in PLAIN.items() if k not in ("jitter", "grey")}
    )
    x = sketch_views.eval().two_views(batch)
    torch.testing.assert_close(x[0, 0], x[0, 1], atol=1e-4, rtol=0)  # colour changes photos alone
    assert (x[1, 0] - x[1, 1]).abs().max() > 1e-3


def test_batch_norm_can_be_frozen() -> None:
    method = make(freeze_batch_norm=True).train()
    statistics = {k: v.clone() for k, v in method.state_dict().items() if "running" in k}
    assert statistics
    method.loss(make_batch(method), 0)
    assert all(torch.equal(method.state_dict()[k], v) for k, v in statistics.items())
    assert method.training


# --- weights ----------------------------------------------------------------------------------------------


def test_start_weights_from_a_file(tmp_path) -> None:
    """As SwAV publishes them: `module.` before each name, its heads beside the backbone."""
    source = make(seed=7)
    state = {f"module.{k}": v for k, v in source.backbone.state_dict().items()}
    state["module.projection_head.0.weight"] = torch.zeros(2, 2)
    path = tmp_path / "swav.pth.tar"
    torch.save(state, path)
    method = make(seed=0, weights=str(path))
    for name, value in source.backbone.state_dict().items():
        assert torch.equal(method.backbone.state_dict()[name], value), name
    torch.save({k: v for k, v in state.items() if "conv1" not in k}, path)
    with pytest.raises(ValueError, match=r"weights must hold every tensor of test_resnet.*conv1"):
        make(weights=str(path))
    with pytest.raises(
        ValueError, match=r"weights must be random, timm or a file that exists, got 'no\.pth'"
    ):
        make(weights="no.pth")


@pytest.mark.parametrize("name", ["text.pth", "text.safetensors", "empty.pth", "list.pth"])
def test_a_file_that_holds_no_weights_is_named(tmp_path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"" if name.startswith("empty") else b"hello")
    if name == "list.pth":
        torch.save([1, 2], path)
    with pytest.raises(ValueError, match=f"weights must be a file of tensors, got .*{name}"):
        make(weights=str(path))


def test_weights_of_another_shape_are_named(tmp_path) -> None:
    state = make().backbone.state_dict()
    torch.save({k: v[:1] if v.ndim == 4 else v for k, v in state.items()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"weights must fit test_resnet, got .*other\.pth"):
        make(weights=str(tmp_path / "other.pth"))


def test_a_file_of_weights_runs_no_code(tmp_path) -> None:
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    path = tmp_path / "bad.pth"
    torch.save({"state_dict": Harm()}, path)
    with pytest.raises(ValueError, match="weights must be a file of tensors"):
        make(weights=str(path))
    assert not (tmp_path / "harm").exists()


# --- use --------------------------------------------------------------------------------------------------


def test_embed_takes_colour_of_any_size() -> None:
    method = make().eval()
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(method.embed(images), method.features(images).detach())
    assert method.embed(torch.rand(2, 3, 50, 40)).shape == (2, 16)
    assert (method.embed(images) - method.embed(images.flip(1))).abs().max() > 1e-3
    grey = make(grey=1.0).eval()  # saw no colour in training, and so sees none after
    luma = 0.299 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]
    torch.testing.assert_close(grey.embed(images), grey.embed(luma.expand(-1, 3, -1, -1)))
    with pytest.raises(TypeError, match="images must be floating point"):
        method.embed((images * 255).byte())
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, H, W\]"):
        method.embed(images[:, :1])


def test_standardised_images_differ_in_neither_brightness_nor_contrast() -> None:
    images = torch.rand(3, 3, 32, 32) * 0.5
    method = make(standardise=True).eval()
    torch.testing.assert_close(method.embed(images), method.embed(images * 1.5 + 0.2), atol=1e-3, rtol=0)
    plain = make().eval()
    assert (plain.embed(images) - plain.embed(images * 1.5 + 0.2)).abs().max() > 1e-2
    assert torch.isfinite(method.embed(torch.ones(1, 3, 32, 32))).all()  # a blank image


def test_pictures_are_rows_of_colour() -> None:
    method = make()
    pictures = method.pictures(make_batch(method), count=5)
    assert {tuple(images.shape) for images in pictures.values()} == {(5, 3, 32, 32)}
    assert all(images.min() >= 0 and images.max() <= 1 for images in pictures.values())


def test_a_sketchs_view_in_the_pictures_keeps_its_colours_as_in_training() -> None:
    method = make(**(PLAIN | {"jitter": 1.0, "grey": 1.0}))
    batch = make_batch(method)
    blue = torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None].expand_as(batch.sketches)
    pictures = method.pictures(ImageBatch(blue, batch.photos))
    torch.testing.assert_close(pictures["a view of it"], pictures["sketch"])


# --- protocol ---------------------------------------------------------------------------------------------


def test_retrieval_names_its_setting_and_the_papers_figures() -> None:
    method, untrained = make(0, queries_per_class=4), make(1, queries_per_class=4)
    (table,) = retrieval(method, untrained, DataSpec(), queries_shown=3, photos_shown=4)
    rows = {row["network"]: row for row in table.rows}
    assert list(rows)[:2] == ["trained", "untrained"]
    # the gallery has 27 photos, its smallest class 8
    assert rows["trained"].keys() == {"network", "Prec@27", "mAP@27", "mAP", "Prec@8"}
    assert rows["trained"]["Prec@27"] == pytest.approx(100 / 3, abs=0.01)
    assert rows["paper: Sketchy-Extended, v5"]["Prec@200"] == 33.64
    assert rows["paper: TUBerlin-Extended, v1"]["mAP"] == 2.89
    assert "12 queries, gallery of 27 photos of 3 classes, the smallest of 8" in table.note
    assert "A random order has a precision of 33.33" in table.note
    assert "from random weights (paper: SwAV's ResNet-50 of ImageNet)" in table.note
    assert "backbone test_resnet (default resnet50)" in table.note
    assert len(table.pictures) == 2
    assert all(png.startswith(b"\x89PNG") for png in table.pictures.values())
    (same,) = retrieval(method, method, DataSpec(), top=5)
    assert {k: v for k, v in same.rows[0].items() if k != "network"} == {
        k: v for k, v in same.rows[1].items() if k != "network"
    }
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        retrieval(method, untrained, DataSpec(), top=0)


def test_the_note_names_every_setting_and_calls_none_the_papers_that_is_not() -> None:
    fields = {"temperature": 0.2, "momentum": 0.5, "optimizer": "adamw", "clip_norm": 1.0, "lr_factor": 0.9}
    note = module.training_facts(make(**fields))
    for name, value in fields.items():
        assert f"{name} {value} (default {getattr(PMJDOTConfig(), name)})" in note
    assert "(paper sgd)" not in note
    assert "instances" not in note
    assert "from random weights" in note
    assert "the untrained network" not in note
    started = make()
    started.config = replace(started.config, weights="timm")
    assert "the untrained network has random weights" in module.training_facts(started)


def test_retrieval_of_unseen_classes() -> None:
    fields = {"split": "zero_shot", "test_classes": "class 2,class 0", "variant": "v3"}
    method, untrained = make(0, **fields), make(1, **fields)
    (table,) = retrieval(method, untrained, DataSpec())
    assert "24 queries, gallery of 18 photos of 2 classes" in table.note
    assert [row["network"] for row in table.rows[2:]] == [
        "paper: Sketchy-Extended, v5",
        "paper: TUBerlin-Extended, v5",
    ]


def test_features_of_perfect_classes_score_1(monkeypatch) -> None:
    method = make(0)

    def oracle(network, images):
        """The bar's class from the pixels: one feature a class for either domain."""
        pool = module.read_split(DataSpec(), method.config)
        known = {
            im.tobytes(): label
            for s in (pool.query, pool.gallery)
            for im, label in zip(s.images, s.labels, strict=True)
        }
        return np.eye(3, dtype=np.float32)[[known[im.tobytes()] for im in images]]

    monkeypatch.setattr(module, "embed_images", oracle)
    (table,) = retrieval(method, method, DataSpec(), top=8)
    assert table.rows[0]["Prec@8"] == table.rows[0]["mAP"] == 100


# --- runs -------------------------------------------------------------------------------------------------


def assert_same_state(a, b, path="state") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"seconds"}:
            assert_same_state(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.mark.parametrize("stopped", [2, 3, 5])
def test_resume_is_bit_exact(tmp_path, stopped: int) -> None:
    """Stopped before, at and after the k-means start (step 3), full banks and queue included."""
    config = replace(TINY, steps=8, kmeans=True, align_after=3, queue_size=32)

    def run(out: Path, steps: int, resume: bool = False) -> dict:
        options = RunOptions(out, checkpoint_every=stopped, log_every=1, picture_every=2, resume=resume)
        train("pm_jdot", replace(config, steps=steps), DataSpec(), options, preset="tiny")
        return read_checkpoint(out / "checkpoints" / f"step-{steps:09d}.pt")

    whole = run(tmp_path / "whole", 8)
    run(tmp_path / "parts", stopped)
    torch.rand(7)  # what a resumed run must not depend on
    parts = run(tmp_path / "parts", 8, resume=True)
    assert_same_state(whole, parts)
    curves = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("whole", "parts")]
    assert curves[0] == curves[1]


RANKS = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
import test_pm_jdot as tests
from sketchfast.methods import pm_jdot as module
module.read_images = lambda data, config: tests.pictures_of([12, 12, 12], [8, 9, 10])
torch.set_num_threads(1)
from sketchfast.methods.base import DataSpec
from sketchfast.train import RunOptions, train
for variant in ("v4", "v5"):
    out = Path(sys.argv[1]) / f"two-{variant}"
    options = RunOptions(out, log_every=1, accelerator="cpu", picture_every=0)
    train("pm_jdot", tests.ranks_config(variant), DataSpec(), options, preset="tiny")
torch.distributed.destroy_process_group()
"""


def ranks_config(variant: str) -> PMJDOTConfig:
    fields = {"steps": 5, "kmeans": True, "align_after": 2, "queue_size": 32, "learning_rate": 1e-3}
    return replace(TINY, variant=variant, freeze_batch_norm=True, **fields, **PLAIN)


def test_two_ranks_are_one_rank_with_the_whole_batch(tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        f"--master-port={port}",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), str(tmp_path), str(Path(__file__).parent)],
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for variant in ("v4", "v5"):
        options = RunOptions(tmp_path / f"one-{variant}", log_every=1, accelerator="cpu", picture_every=0)
        train("pm_jdot", ranks_config(variant), DataSpec(), options, preset="tiny")
        one, two = (
            read_checkpoint(tmp_path / f"{run}-{variant}" / "checkpoints" / "step-000000005.pt")["model"]
            for run in ("one", "two")
        )
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=f"{variant} {name}")
        curves = []
        for run in ("one", "two"):
            with open(tmp_path / f"{run}-{variant}" / "metrics.csv", newline="") as file:
                curves.append([float(row["loss"]) for row in csv.DictReader(file)])
        assert curves[0] == pytest.approx(curves[1], rel=1e-4)


# --- command line -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images) -> Path:
    """The images in the layout of sketch_photo."""
    from PIL import Image

    root = tmp_path_factory.mktemp("data")
    for domain, part in (("sketch", images.sketches), ("photo", images.photos)):
        for pixels, name in zip(part.images, part.names, strict=True):
            path = root / domain / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


def test_procedural_pictures_from_the_command_line(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.undo()
    run = tmp_path / "run"
    assert cli.main(["train", "pm_jdot", "--preset", "tiny", "--accelerator", "cpu", "--out", str(run)]) == 0
    assert cli.main(["evaluate", str(run), "--accelerator", "cpu"]) == 0
    assert "Retrieval of photos by sketches: procedural" in capsys.readouterr().out
    assert (run / "pictures" / "step-000000003.png").is_file()


def test_from_the_command_line(monkeypatch, tmp_path, folder, capsys) -> None:
    monkeypatch.undo()
    run = tmp_path / "run"
    flags = ["--preset", "tiny", "--data", "sketch_photo", "--root", str(folder), "--accelerator", "cpu"]
    assert cli.main(["train", "pm_jdot", *flags, "--out", str(run), "--variant", "v3"]) == 0
    assert json.loads((run / "config.json").read_text())["config"]["variant"] == "v3"
    assert cli.main(["evaluate", str(run), "retrieval", "--accelerator", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "Prec@27" in out
    assert "paper: Sketchy-Extended, v3" in out
    (evaluation,) = json.loads((run / "results.json").read_text())["evaluations"].values()
    pictures = evaluation["tables"][0]["pictures"]
    assert len(pictures) == 2
    report = (run / "report.html").read_text()
    for caption, path in pictures.items():
        assert (run / path).read_bytes().startswith(b"\x89PNG")
        assert f'alt="{caption}"' in report
    assert cli.main(["embed", str(run), str(folder / "photo"), "--out", str(tmp_path / "e.npz")]) == 0
    with np.load(tmp_path / "e.npz") as stored:
        vectors, names = stored["embeddings"], stored["names"]
    assert vectors.shape == (27, 16)
    from PIL import Image

    from sketchfast.runs import load_method

    method, _ = load_method(run)
    pixels = np.asarray(Image.open(names[3]).convert("RGB"))[None]
    np.testing.assert_allclose(embed_images(method, pixels)[0], vectors[3], atol=1e-5)
    assert cli.main(["draw", str(run), str(names[0])]) == 2
    assert "RUN must be of a method that draws, got one of pm_jdot" in capsys.readouterr().err
    assert cli.main(["train", "pm_jdot", *flags, "--out", str(tmp_path / "bad"), "--variant", "v9"]) == 2
    assert "variant must be one of" in capsys.readouterr().err


@pytest.mark.skipif(not (DATA / "sketch_photo").is_dir(), reason=f"no sketch_photo in {DATA}")
def test_a_step_on_sketch_photo(monkeypatch) -> None:
    monkeypatch.undo()
    torch.manual_seed(0)
    method = PMJDOT(replace(TINY, queries_per_class=50))
    batches = method.train_data(DataSpec("sketch_photo", DATA / "sketch_photo" / "sketch_photo_160.zip"))
    assert method.training_images.tolist() == [3929 - 7 * 50, 1670]
    assert torch.isfinite(method.loss(batches.__getitems__(list(range(8))), 0)["loss"])
