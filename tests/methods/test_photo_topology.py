"""Photo topology: its equations against literal float64, batches, teacher, steps, runs, protocols."""

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
from torch import nn

from sketchfast import cli
from sketchfast.data.images import ImageSet, SketchPhotoSet
from sketchfast.data.pairs import InstanceSplit, split_instances
from sketchfast.methods import get_method
from sketchfast.methods import photo_topology as module
from sketchfast.methods.base import DataSpec, embed_images
from sketchfast.methods.photo_topology import (
    PairBatch,
    PhotoBatches,
    PhotoTopology,
    PhotoTopologyConfig,
    attribution,
    early,
    instance_discrimination,
    photo_distances,
    retrieval,
    robustness,
    smoothness,
)
from sketchfast.ops._contract import unavailable_reason
from sketchfast.runs import load_method, read_checkpoint, read_start
from sketchfast.train import RunOptions, train

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("SKETCHFAST_DATA", ROOT.parent / "shared" / "data"))
#: no view differs from its image, and no start but the random weights
PLAIN = {"crop_scale": (1.0, 1.0), "flip": 0.0, "pretrain_steps": 0}
TINY = replace(PhotoTopology.preset("tiny"), impl="reference")


def pairs_of(photos: int = 24, each: int = 2, size: int = 32, seed: int = 0) -> SketchPhotoSet:
    """Photo p is a coloured bar at an angle of its own; its sketches are that bar, dark on white."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    bars = [np.abs(x * math.sin(a) - y * math.cos(a)) < 0.08 for a in np.linspace(0, math.pi, photos, False)]
    coloured = [np.where(b[..., None], rng.integers(128, 256, 3), rng.integers(0, 90, 3)) for b in bars]
    drawn = [np.where(b, 20 + 9 * n, 255)[..., None].repeat(3, 2) for b in bars for n in range(each)]
    names = [f"bar/{p}" for p in range(photos)]
    sets = [
        ImageSet(np.array(images, np.uint8), np.zeros(len(images), np.int64), ["bar"], labels)
        for images, labels in ((drawn, [f"{n}-{i}" for n in names for i in range(each)]), (coloured, names))
    ]
    return SketchPhotoSet(*sets, ["bar"], np.repeat(np.arange(photos), each), {"broken image": 2})


def split_of(**fields) -> InstanceSplit:
    return split_instances(pairs_of(**fields), test_share=0.25)


@pytest.fixture(autouse=True)
def _small_data(monkeypatch) -> None:
    monkeypatch.setattr(module, "read_split", lambda data, config: split_of())


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(seed: int = 0, **fields) -> PhotoTopology:
    torch.manual_seed(seed)
    method = PhotoTopology(replace(TINY, **{**PLAIN, **fields}))
    method.train_data(DataSpec())
    method.start_from(method.before_training())
    return method


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float64 vectors of length 1."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def run(out: Path, *, resume: bool = False, options: dict | None = None, **fields) -> dict:
    """The last checkpoint of a run."""
    config = replace(TINY, **{"steps": 6, **PLAIN, **fields})
    settings = {"log_every": 1, "picture_every": 0, "accelerator": "cpu", **(options or {})}
    train("photo_topology", config, DataSpec(), RunOptions(out, resume=resume, **settings), preset="tiny")
    return read_checkpoint(out / "checkpoints" / f"step-{config.steps:09d}.pt")


# --- config -----------------------------------------------------------------------------------------------


def test_default_is_the_paper() -> None:
    config = PhotoTopology.preset("paper")
    assert config == PhotoTopologyConfig()
    assert get_method("photo_topology") is PhotoTopology
    assert (config.objective, config.topology, config.triplets) == ("meta_first", "cross", "random")
    assert (config.samples, config.margin_nt, config.backbone) == (10, 0.01, "resnet50")
    assert (config.batch_size, config.image_size, config.optimizer) == (16, 256, "adam")
    for name in ("small", "tiny"):
        preset = PhotoTopology.preset(name)
        for field in ("objective", "topology", "triplets", "samples", "margin", "margin_nt", "mining"):
            assert getattr(preset, field) == getattr(config, field), field
    with pytest.raises(ValueError, match="preset must be one of"):
        PhotoTopology.preset("large")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"objective": "meta"}, "objective must be one of base, multi, meta_first, meta_full, got 'meta'"),
        ({"topology": "both"}, "topology must be one of cross, single"),
        ({"triplets": "all"}, "triplets must be one of random, nearest"),
        ({"mining": "easy"}, "mining must be one of all"),
        ({"metric": "l1"}, "metric must be one of"),
        ({"samples": -1}, "samples must be at least 0, got -1"),
        ({"triplets": "nearest", "samples": 0}, "samples must be at least 1 with triplets nearest, got 0"),
        ({"margin": -0.1}, "margin must be at least 0"),
        ({"eta_t": -1.0}, "eta_t must be at least 0"),
        ({"epsilon": 0.0}, "epsilon must be greater than 0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
        ({"flip": 2.0}, "flip must be a probability"),
        ({"test_share": 1.0}, r"test_share must lie in \(0, 1\)"),
        ({"crop_scale": (0.5, 2.0)}, r"crop_scale must lie in \(0, 1\]"),
        ({"teacher_backbone": "resnet18"}, "teacher_weights must be timm or a file where"),
        ({"teacher_weights": "random"}, "teacher_weights must be timm or a file, got 'random'"),
    ],
)
def test_bad_fields_are_named(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(TINY, **fields)


def test_backbones() -> None:
    vit = PhotoTopology(replace(TINY, backbone="test_vit", image_size=32, pool="avg", head=7))
    assert vit.embed(torch.rand(2, 3, 40, 40)).shape == (2, 7)
    pooled = [make(pool=pool, normalise=False).eval() for pool in ("avg", "max")]
    images = torch.rand(2, 3, 64, 64)
    average, largest = (m.features(images).detach() for m in pooled)
    assert (largest >= average - 1e-5).all()
    assert not torch.allclose(largest, average)
    with pytest.raises(ValueError, match="backbone must be a timm model, got 'resnet51'"):
        PhotoTopology(replace(TINY, backbone="resnet51"))
    with pytest.raises(ValueError, match="backbone test_resnet cannot be had with global_pool nothing"):
        PhotoTopology(replace(TINY, pool="nothing"))


# --- data -------------------------------------------------------------------------------------------------


def test_a_batch_holds_each_photo_once_with_a_sketch_of_it() -> None:
    data = pairs_of(photos=10, each=3)
    batches = PhotoBatches(data, replace(TINY, **PLAIN))
    assert len(batches) == 10
    assert batches.skipped == {"broken image": 2}
    seen: Counter = Counter()
    sketches = {image.tobytes(): row for row, image in enumerate(data.sketches.images)}
    for repeat in range(12):
        np.random.seed(repeat)
        batch = batches.__getitems__([3, 9, 0, 7])
        assert batch.rows.tolist() == [3, 9, 0, 7]
        for sketch, photo, row in zip(*batch, strict=True):
            pixels = (sketch.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            drawn = sketches[np.ascontiguousarray(pixels).tobytes()]
            assert data.pairs[drawn] == row
            seen[drawn] += 1
            assert np.array_equal((photo.permute(1, 2, 0) * 255).round().numpy(), data.photos.images[row])
    assert len(seen) == 12  # all three sketches of each of the four photos


def test_photos_without_a_sketch_are_left_out_but_ranked_by_the_teacher() -> None:
    data = pairs_of(photos=6, each=1)
    data = replace(data, sketches=data.sketches.subset([0, 2, 5]), pairs=data.pairs[[0, 2, 5]])
    batches = PhotoBatches(data, replace(TINY, **PLAIN))
    assert batches.rows.tolist() == [0, 2, 5]
    assert batches.__getitems__([1, 2]).rows.tolist() == [2, 5]
    assert len(batches.photos) == 6


def test_batches_of_an_epoch_share_no_photo() -> None:
    from sketchfast.train import BatchOrder

    batches = PhotoBatches(split_of().train, TINY)
    order = BatchOrder(len(batches), 6, seed=3)
    rows = [batches.__getitems__(order.indices(step)).rows for step in range(3)]
    assert all(len(set(r.tolist())) == 6 for r in rows)
    assert len(set(torch.cat(rows).tolist())) == 18


def test_views_are_crops_of_the_size_asked_for() -> None:
    batches = PhotoBatches(pairs_of(photos=4, size=48), replace(TINY, crop_scale=(0.3, 0.5)))
    torch.manual_seed(0)
    batch = batches.__getitems__([0, 1, 2, 3])
    assert batch.photos.shape == batch.sketches.shape == (4, 3, 32, 32)
    assert 0 <= batch.photos.min() <= batch.photos.max() <= 1


def test_a_batch_is_mirrored_as_one() -> None:
    method, batch = make(flip=0.5), make().train_data(DataSpec()).__getitems__([0, 1, 2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhotoTopology, "features", lambda self, images: images.flatten(1))
        plain = torch.cat((batch.sketches, batch.photos)).flatten(1)
        mirrored = torch.cat((batch.sketches, batch.photos)).flip(3).flatten(1)
        kinds = Counter()
        for step in range(40):
            x = torch.cat(method._embeddings(batch, step)[:2])
            kinds[next(n for n, y in (("plain", plain), ("mirrored", mirrored)) if torch.equal(x, y))] += 1
        assert 10 < kinds["mirrored"] < 30
        method.eval()
        assert all(torch.equal(torch.cat(method._embeddings(batch, s)[:2]), plain) for s in range(5))


def test_unknown_data_is_named(monkeypatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"data must be one of .*got 'mnist'"):
        PhotoTopology(TINY).train_data(DataSpec("mnist"))


def test_validation_holds_out_training_photos(monkeypatch) -> None:
    monkeypatch.undo()
    whole = module.read_split(DataSpec(), TINY)
    inner = module.read_split(DataSpec(), replace(TINY, split="validation"))
    held_out = set(inner.test.photos.names)
    assert held_out
    assert held_out | set(inner.train.photos.names) == set(whole.train.photos.names)
    assert inner.test_strokes is not None
    assert len(inner.test_strokes) == len(inner.test.sketches)


# --- equations --------------------------------------------------------------------------------------------


def plain_distance(x: torch.Tensor, y: torch.Tensor, metric: str) -> float:
    if metric == "cosine":
        return 1 - float(x @ y / (x.norm() * y.norm()))
    return (x - y).norm().item() ** (2 if metric == "sqeuclidean" else 1)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
def test_pair_loss_is_equation_1(metric: str) -> None:
    method, s, p = make(metric=metric), unit(6, 5), unit(6, 5, seed=1)
    terms = [
        max(0.2 + plain_distance(s[i], p[i], metric) - plain_distance(s[i], p[k], metric), 0)
        for i in range(6)
        for k in range(6)
        if k != i
    ]
    assert method.pair_loss(s, p, 0).item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)
    hardest = [
        max(
            0.2
            + plain_distance(s[i], p[i], metric)
            - min(plain_distance(s[i], p[k], metric) for k in range(6) if k != i),
            0,
        )
        for i in range(6)
    ]
    got = make(metric=metric, mining="hardest").pair_loss(s, p, 0).item()
    assert got == pytest.approx(sum(hardest) / 6, rel=1e-6)


@pytest.mark.parametrize("topology", ["cross", "single"])
def test_topology_loss_is_equations_3_and_4(monkeypatch, topology: str) -> None:
    method = make(objective="multi", topology=topology, samples=0, margin_nt=0.05, alpha=0.7, beta=3.0)
    s, p, rows = unit(5, 4), unit(5, 4, seed=1), torch.tensor([7, 2, 11, 0, 4])
    monkeypatch.setattr(method, "_embeddings", lambda batch, step: (s, p, rows))
    anchors = s if topology == "cross" else p
    terms = []
    for i in range(5):
        for j in range(5):
            for k in range(5):
                if len({i, j, k}) == 3:
                    r = 1 if method.teacher[rows[i], rows[j]] <= method.teacher[rows[i], rows[k]] else -1
                    near, far = (plain_distance(anchors[i], p[n], "euclidean") for n in (j, k))
                    terms.append(max(0.05 + r * (near - far), 0))
    losses = method.loss(None, 0)
    assert losses["topology"].item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)
    expected = 0.7 * losses["pairs"] + 3.0 * losses["topology"]  # Eq. 5
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert method.loss(None, 0, part="topology").keys() == {"loss", "topology"}
    assert method.loss(None, 0, part="pairs").keys() == {"loss", "pairs"}
    base = make(objective="base")
    monkeypatch.setattr(base, "_embeddings", lambda batch, step: (s, p, rows))
    assert base.loss(None, 0).keys() == {"loss", "pairs"}


def test_triplets_are_those_of_the_step(monkeypatch) -> None:
    method, s, p, rows = make(samples=4), unit(8, 4), unit(8, 4, seed=1), torch.arange(8)
    asked = []
    original = module.ranking_triplet_loss

    def noted(*tensors, **options):
        asked.append(options["samples"])
        return original(*tensors, **options)

    monkeypatch.setattr(module, "ranking_triplet_loss", noted)
    values = [method.topology_loss(s, p, rows, step).item() for step in (3, 3, 4)]
    assert values[0] == values[1] != values[2]
    assert asked == [4, 4, 4]
    other = make(samples=4, triplet_seed=1).topology_loss(s, p, rows, 3).item()
    assert other != values[0]


def test_nearest_triplets_are_table_3s() -> None:
    """The nearest of the batch by the teacher against others: K draws average to all of them."""
    method = make(triplets="nearest", samples=4000, margin_nt=0.3)
    s, p, rows = unit(5, 4), unit(5, 4, seed=1), torch.tensor([7, 2, 11, 0, 4])
    s.requires_grad_()
    means = []
    for i in range(5):
        others = [j for j in range(5) if j != i]
        nearest = min(others, key=lambda j, i=i: float(method.teacher[rows[i], rows[j]]))
        near = plain_distance(s[i], p[nearest], "euclidean")
        far = [plain_distance(s[i], p[k], "euclidean") for k in others if k != nearest]
        means.append(np.mean([max(0.3 + near - f, 0) for f in far]))
    loss = method.topology_loss(s, p, rows, 0)
    assert loss.item() == pytest.approx(np.mean(means), rel=0.02)
    loss.backward()
    assert torch.isfinite(s.grad).all()
    assert method.topology_loss(s[:2], p[:2], rows[:2], 0).item() == 0


def test_distance_0_has_a_finite_gradient() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    module.distance(x, torch.ones(3, 4), "euclidean").sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 4))


def test_instance_discrimination_is_nt_xent() -> None:
    z, tau = unit(6, 5), 0.3
    terms = []
    for i in range(6):
        scores = [math.exp(float(z[i] @ z[k]) / tau) for k in range(6) if k != i]
        terms.append(-math.log(math.exp(float(z[i] @ z[(i + 3) % 6]) / tau) / sum(scores)))
    assert instance_discrimination(z, tau).item() == pytest.approx(np.mean(terms))


@pytest.mark.parametrize("impl", ["native"])
@pytest.mark.parametrize("fields", [{}, {"samples": 0}, {"mining": "hardest"}])
def test_impls_agree(impl: str, fields: dict) -> None:
    if reason := unavailable_reason(impl, "cpu"):
        pytest.skip(reason)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("sketchfast::triplet_ranking_fwd_native", "CPU"):
        pytest.skip("the library was built without the triplet kernels")
    got = []
    for kind in ("reference", impl):
        method = make(impl=kind, objective="multi", **fields)
        np.random.seed(0)
        batch = method.train_data(DataSpec()).__getitems__(list(range(6)))
        losses = method.eval().loss(batch, 2)
        losses["loss"].backward()
        got.append((losses["loss"].item(), next(method.parameters()).grad))
    assert got[0][0] == pytest.approx(got[1][0], rel=1e-5)
    torch.testing.assert_close(got[0][1], got[1][1], rtol=1e-4, atol=1e-6)


# --- a step -----------------------------------------------------------------------------------------------


class PlainPasses:
    """The loop's passes without the loop."""

    def __init__(self, method: PhotoTopology, batch: PairBatch) -> None:
        self.method, self.batch = method, batch
        optimizers, _ = method.optimizer()
        self.optimizers = optimizers if isinstance(optimizers, list) else [optimizers]

    def gradient(self, **options) -> dict[str, torch.Tensor]:
        self.method.zero_grad()
        losses = self.method.loss(self.batch, 0, **options)
        losses["loss"].backward()
        return losses

    def descend(self, optimizer: int = 0, *, more: bool = False) -> None:
        self.optimizers[optimizer].step()


def smooth(**fields) -> tuple[PhotoTopology, PairBatch]:
    """A tiny smooth network in float64, in place of the backbone."""
    method = make(optimizer="sgd", samples=0, margin=0.8, margin_nt=0.5, learning_rate=0.05, **fields)
    torch.manual_seed(1)
    np.random.seed(1)
    method.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 6), nn.Tanh(), nn.Linear(6, 4))
    method.double()
    batch = method.train_data(DataSpec()).__getitems__(list(range(7)))
    return method, PairBatch(batch.sketches.double(), batch.photos.double(), batch.rows)


def literal_losses(method: PhotoTopology, batch: PairBatch):
    """(L_FG, L_NT) as functions of the weights, twice differentiable, in float64."""
    teacher, n = method.teacher[batch.rows][:, batch.rows], len(batch.rows)
    names = [name for name, _ in method.named_parameters()]

    def distances(weights, anchors_are_photos: bool = False):
        def psi(images):
            parts = {k.removeprefix("backbone."): w for k, w in zip(names, weights, strict=True)}
            return F.normalize(
                torch.func.functional_call(method.backbone, parts, (method.pixels(images),)), dim=1
            )

        s, p = psi(batch.sketches), psi(batch.photos)
        return ((s[:, None] - p) ** 2).sum(-1).sqrt()

    def pairs(*weights):
        d = distances(weights)
        terms = [torch.relu(0.8 + d[i, i] - d[i, k]) for i in range(n) for k in range(n) if k != i]
        return torch.stack(terms).mean()

    def topology(*weights):
        d = distances(weights)
        terms = [
            torch.relu(0.5 + (1 if teacher[i, j] <= teacher[i, k] else -1) * (d[i, j] - d[i, k]))
            for i in range(n)
            for j in range(n)
            for k in range(n)
            if len({i, j, k}) == 3
        ]
        return torch.stack(terms).mean()

    return pairs, topology


@pytest.mark.parametrize("sign", ["printed", "derived"])
def test_meta_steps_are_equations_8_and_9(sign: str) -> None:
    eta_s, eta_t = 0.05, 0.03
    ends = {}
    for objective in ("meta_first", "meta_full"):
        method, batch = smooth(objective=objective, eta_t=eta_t, second_order_sign=sign, epsilon=1e-5)
        start = [p.detach().clone() for p in method.parameters()]
        method.update(PlainPasses(method, batch))
        ends[objective] = [p.detach().clone() for p in method.parameters()]
    pairs, topology = literal_losses(method, batch)
    theta = tuple(t.clone().requires_grad_() for t in start)
    gradient = torch.autograd.grad(pairs(*theta), theta, create_graph=True)
    temp = tuple((t - eta_s * g).detach().requires_grad_() for t, g in zip(theta, gradient, strict=True))
    v = torch.autograd.grad(topology(*temp), temp)
    product = torch.autograd.grad(gradient, theta, v)  # H v, exactly
    first = [t - eta_t * d for t, d in zip(temp, v, strict=True)]
    assert max(float(d.abs().max()) for d in v) > 1e-3
    for got, wanted in zip(ends["meta_first"], first, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    assert max(float(h.abs().max()) for h in product) > 1e-3
    way = -1 if sign == "printed" else 1
    for full, one, h in zip(ends["meta_full"], ends["meta_first"], product, strict=True):
        torch.testing.assert_close(full - one, way * eta_t * eta_s * h, rtol=1e-3, atol=1e-8)


def test_base_and_multi_take_one_descent() -> None:
    for objective, weights in (("base", (1, 0)), ("multi", (1, 2.5))):
        method, batch = smooth(objective=objective, beta=2.5)
        start = tuple(p.detach().clone().requires_grad_() for p in method.parameters())
        losses = literal_losses(method, batch)
        total = sum(w * loss(*start) for w, loss in zip(weights, losses, strict=True))
        gradient = torch.autograd.grad(total, start)
        method.update(PlainPasses(method, batch))
        for got, t, g in zip(method.parameters(), start, gradient, strict=True):
            torch.testing.assert_close(got, t - 0.05 * g, rtol=0, atol=1e-9)


def test_a_step_without_topology_gradient_is_finite() -> None:
    """Nothing to keep, v = 0: the finite difference has no direction."""
    method, batch = smooth(objective="meta_full")
    method.config = replace(method.config, margin_nt=0.0)
    method._teacher = torch.zeros(18, 18, dtype=torch.float64)
    batch = PairBatch(batch.sketches[:2], batch.photos[:2], batch.rows[:2])  # fewer than three photos
    method.update(PlainPasses(method, batch))
    assert all(torch.isfinite(p).all() for p in method.parameters())


def test_the_rates_of_the_two_descents() -> None:
    (pairs, topology), schedules = make(eta_t=0.5, weight_decay=0.1, optimizer="adamw").optimizer()
    assert (pairs.param_groups[0]["lr"], topology.param_groups[0]["lr"]) == (1e-3, 0.5)
    assert (pairs.param_groups[0]["weight_decay"], topology.param_groups[0]["weight_decay"]) == (0.1, 0)
    assert schedules == [None, None]
    optimizer, schedule = make(objective="base", schedule="cosine").optimizer()
    assert isinstance(optimizer, torch.optim.Adam)
    assert schedule.T_max == 3


# --- start and teacher ------------------------------------------------------------------------------------


def test_the_teacher_is_the_start_and_never_changes(tmp_path) -> None:
    run(tmp_path, learning_rate=0.01)
    start = read_start(tmp_path)
    fresh = make()
    fresh.backbone.load_state_dict(start["state_dict"])
    photos = split_of().train.photos.images
    features = F.normalize(torch.from_numpy(embed_images(fresh, photos)), dim=1)
    torch.testing.assert_close(start["teacher"], features)
    method, _ = load_method(tmp_path)
    method.start_from(start)
    for distances, feature in zip(method.teacher, features, strict=True):
        torch.testing.assert_close(distances, (feature - features).norm(dim=1), rtol=1e-4, atol=1e-5)
    assert not method.teacher.requires_grad
    assert torch.equal(method.teacher, photo_distances(start["teacher"]))
    name, weight = next(load_method(tmp_path)[0].backbone.named_parameters())
    assert not torch.equal(weight, start["state_dict"][name])
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "step-000000006.pt")
    assert not any("teacher" in name for name in checkpoint["model"])


def test_distances_of_photos_are_taken_for_a_loss_alone(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(module, "photo_distances", lambda f: calls.append(1) or photo_distances(f))
    method = make(objective="base")
    batch = method.train_data(DataSpec()).__getitems__(list(range(4)))
    method.embed(batch.photos)
    method.loss(batch, 0)
    assert not calls
    for step in (0, 1):
        method.loss(batch, step, "topology")
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match="start_from must be called"):
        PhotoTopology(TINY).teacher  # noqa: B018


def test_other_runs_take_exactly_the_start(tmp_path, monkeypatch) -> None:
    run(tmp_path / "one", pretrain_steps=3)
    one = read_start(tmp_path / "one")
    assert "3 steps of self-supervised pre-training (SimCLR) on the 18 training photos" in one["about"]
    file = str(tmp_path / "one" / "start.pt")
    run(tmp_path / "two", weights=file, pretrain_steps=3, objective="base", options={"seed": 5})
    two = read_start(tmp_path / "two")
    assert all(torch.equal(v, two["state_dict"][k]) for k, v in one["state_dict"].items())
    assert torch.equal(one["teacher"], two["teacher"])
    of_one = "3 steps of self-supervised pre-training (SimCLR) on the 18 training photos from random ones"
    assert (
        f"start weights: the file {file} ({of_one}, seed 0, of a run with the same training set)"
        in two["about"]
    )
    monkeypatch.setattr(module, "read_split", lambda data, config: split_instances(pairs_of(), seed=1))
    run(tmp_path / "other", weights=file)
    assert "of a run with another training set);" in read_start(tmp_path / "other")["about"]
    monkeypatch.undo()
    monkeypatch.setattr(module, "read_split", lambda data, config: split_of())
    torch.save([1], tmp_path / "list.pt")
    for other in ("list.pt", "no.safetensors"):
        config = replace(TINY, weights=str(tmp_path / other))
        assert f"start weights: the file {tmp_path / other};" in module.start_facts(config, 18)
    run(tmp_path / "three", pretrain_steps=3)  # repeatable
    assert torch.equal(read_start(tmp_path / "three")["teacher"], one["teacher"])
    assert json.loads((tmp_path / "one" / "config.json").read_text())["start"] == one["about"]


def test_r_from_another_model(tmp_path) -> None:
    torch.manual_seed(9)
    other = module.create_backbone("test_efficientnet")
    torch.save(other.state_dict(), tmp_path / "other.pth")
    method = make(teacher_backbone="test_efficientnet", teacher_weights=str(tmp_path / "other.pth"))
    photos = split_of().train.photos.images
    x = module.as_tensor(photos).float() / 255
    with torch.no_grad():
        features = F.normalize(other.eval()(method.pixels(x)), dim=1)
    torch.testing.assert_close(method.teacher, photo_distances(features), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(make().teacher, method.teacher)


def test_a_start_left_by_another_run_is_not_taken(tmp_path) -> None:
    run(tmp_path, pretrain_steps=2)
    teacher = read_start(tmp_path)["teacher"]
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    run(tmp_path, pretrain_steps=3)
    assert not torch.equal(read_start(tmp_path)["teacher"], teacher)


def test_pre_training_tells_photos_apart() -> None:
    """After it two views of a photo are nearer to each other than before, against other photos."""
    scores = []
    for steps in (0, 60):
        method = make(pretrain_steps=steps, pretrain_rate=3e-3, pretrain_batch=16).eval()
        torch.manual_seed(1)
        photos = module.as_tensor(split_of().train.photos.images).repeat(2, 1, 1, 1)
        views = module.random_view(photos, 32, method.config.pretrain_views)
        with torch.no_grad():
            scores.append(instance_discrimination(method.features(views), 0.2).item())
    assert scores[1] < scores[0] - 0.2


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


@pytest.mark.parametrize("objective", ["meta_first", "meta_full"])
def test_resume_is_bit_exact(tmp_path, monkeypatch, objective: str) -> None:
    settings = {"objective": objective, "optimizer": "adamw", "pretrain_steps": 2, "crop_scale": (0.7, 1.0)}
    options = {"checkpoint_every": 4, "picture_every": 2}
    whole = run(tmp_path / "whole", **settings, options=options)
    run(tmp_path / "parts", **settings, options=options)
    for later in ("checkpoints/step-000000006.pt",):  # as if killed at 5
        (tmp_path / "parts" / later).unlink()
    torch.rand(7), np.random.rand()  # what a resumed run must not depend on
    monkeypatch.setattr(PhotoTopology, "before_training", lambda self: pytest.fail("computed again"))
    parts = run(tmp_path / "parts", **settings, options=options, resume=True)
    assert len(parts["optimizer"]) == 2
    assert_same_state(whole, parts)
    curves = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("whole", "parts")]
    assert curves[0] == curves[1]


def test_the_curve_has_both_losses_and_statistics_count_steps(tmp_path) -> None:
    state = run(tmp_path, objective="meta_full", clip_norm=0.5)
    counts = {v.item() for k, v in state["model"].items() if k.endswith("num_batches_tracked")}
    assert counts == {6}  # of 4 passes a step the first counts
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() == {
        *("step", "loss", "pairs", "topology", "grad_norm", "grad_norm_1", "learning_rate", "skipped")
    }
    assert all(row["loss"] == row["pairs"] and float(row["topology"]) > 0 for row in rows)


@pytest.mark.parametrize("part", ["pairs", "topology"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch, part: str) -> None:
    original = PhotoTopology.loss
    before = run(tmp_path / "one", steps=3)

    def poisoned(self, batch, step, part=""):
        losses = original(self, batch, step, part)
        if step >= 3 and part == poisoned_part:
            losses["loss"] = losses["loss"] * float("nan")
        return losses

    poisoned_part = part
    monkeypatch.setattr(PhotoTopology, "loss", poisoned)
    after = run(tmp_path / "two", steps=5)
    assert after["skipped"] == 2
    assert after["model"]["steps_trained"] == 3  # a step that was undone trained nothing
    for kind in ("model", "optimizer"):
        assert_same_state(before[kind], after[kind], kind)


RANKS = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
import test_photo_topology as tests
from sketchfast.methods import photo_topology as module
module.read_split = lambda data, config: tests.split_of(each=1)
torch.set_num_threads(1)
for objective in tests.RANKED:
    tests.run(Path(sys.argv[1]) / f"two-{objective}", **tests.ranked(objective))
torch.distributed.destroy_process_group()
"""
RANKED = ("multi", "meta_first", "meta_full")


def ranked(objective: str) -> dict:
    fields = {"optimizer": "sgd", "learning_rate": 0.05, "freeze_batch_norm": True, "flip": 0.5}
    return {"objective": objective, "steps": 3, "pretrain_steps": 2, "clip_norm": 1.0, **fields}


def test_two_ranks_are_one_rank_with_the_whole_batch(tmp_path, monkeypatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={port}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path), str(Path(__file__).parent)],
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    monkeypatch.setattr(module, "read_split", lambda data, config: split_of(each=1))
    for objective in RANKED:
        one = run(tmp_path / f"one-{objective}", **ranked(objective))
        two = read_checkpoint(tmp_path / f"two-{objective}" / "checkpoints" / "step-000000003.pt")
        for name, value in one["model"].items():
            torch.testing.assert_close(
                two["model"][name], value, rtol=1e-3, atol=1e-5, msg=f"{objective} {name}"
            )
        curves = []
        for which in ("one", "two"):
            with open(tmp_path / f"{which}-{objective}" / "metrics.csv", newline="") as file:
                curves.append([float(row[k]) for row in csv.DictReader(file) for k in ("pairs", "topology")])
        assert curves[0] == pytest.approx(curves[1], rel=1e-3)


# --- use and protocols ------------------------------------------------------------------------------------


def test_embed_and_pictures() -> None:
    method = make(head=5).eval()
    images = torch.rand(3, 3, 32, 32)
    assert method.embed(images).shape == (3, 5)
    torch.testing.assert_close(method.embed(images).norm(dim=1), torch.ones(3))
    assert method.embed(torch.rand(2, 3, 50, 40)).shape == (2, 5)
    with pytest.raises(TypeError, match="images must be floating point"):
        method.embed((images * 255).byte())
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, H, W\]"):
        method.embed(images[:, :1])
    pictures = method.pictures(method.train_data(DataSpec()).__getitems__([0, 1, 2, 3]), count=3)
    assert {tuple(rows.shape) for rows in pictures.values()} == {(3, 3, 32, 32)}


def test_retrieval_stands_beside_its_start_and_the_paper(monkeypatch) -> None:
    method, start = make(0, category="shoe"), make(1, category="shoe")
    (table,) = retrieval(method, start, DataSpec("qmul_v1_edges"), queries_shown=3, photos_shown=4)
    rows = {row["network"]: row for row in table.rows}
    assert list(rows)[:2] == ["trained", "start weights"]
    assert rows["paper: Ours (OBOW), Eq. 9"] == {
        "network": "paper: Ours (OBOW), Eq. 9",
        "backbone": "ResNet-50",
        "Acc@1": 76.52,
    }
    assert rows["paper: multi-task (OBOW), Eq. 5"]["Acc@1"] == 69.57
    assert rows["trained"].keys() == {"network", "backbone", "Acc@1", "Acc@5", "Acc@10"}
    assert "Percent of 12 sketches whose own photo, of a gallery of 6" in table.note
    assert "by chance Acc@1 is 16.67" in table.note
    assert "start weights: random" in table.note
    assert len(table.pictures) == 2
    assert all(png.startswith(b"\x89PNG") for png in table.pictures.values())
    test = split_of().test
    known = {im.tobytes(): row for row, im in enumerate(test.photos.images)}
    known |= {im.tobytes(): test.pairs[row] for row, im in enumerate(test.sketches.images)}
    oracle = {id(method): lambda images: np.eye(6, dtype=np.float32)[[known[i.tobytes()] for i in images]]}
    original = module.embed_images
    monkeypatch.setattr(
        module, "embed_images", lambda m, images: oracle.get(id(m), lambda i: original(m, i))(images)
    )
    (table,) = retrieval(method, start, DataSpec(), base=make(2, objective="base"))
    assert table.rows[0]["Acc@1"] == 100
    assert table.rows[1]["Acc@1"] < 100
    assert [row["network"] for row in table.rows] == ["trained", "start weights", "base run (base)"]
    assert "the paper has no" in table.note


def test_figures_are_not_compared_with_what_they_are_not_of(monkeypatch) -> None:
    """Edge maps are said to be none of the paper's photos; validation photos have no figures."""
    split = split_of()
    split.test.info["photos"] = "edge maps of the photos"
    monkeypatch.setattr(module, "read_split", lambda data, config: split)
    method, data = make(0, category="shoe"), DataSpec("qmul_v1_edges")
    (table,) = retrieval(method, make(1), data, queries_shown=1, photos_shown=1)
    assert "figures for QMUL-Shoe-V1, whose photos are photos, while here they are edge maps" in table.note
    method = make(0, category="shoe", split="validation")
    (table,) = retrieval(method, make(1), data, queries_shown=1, photos_shown=1)
    assert [row["network"] for row in table.rows] == ["trained", "start weights"]
    assert "the paper has no figures" in table.note


def test_a_note_says_how_the_base_run_differs_and_nothing_of_what_was_not_done() -> None:
    method, base = make(0, pretrain_batch=9), make(2, objective="base", margin=0.3)
    base.steps_trained.fill_(7)
    (table,) = smoothness(method, make(1), DataSpec(), base=base, top=3)
    wanted = "Base run: 7 steps on 18 photos and 36 sketches of them; its settings other than this run's: "
    assert f"{wanted}objective base, margin 0.3, pretrain_batch 8." in table.note
    assert "pretrain" not in table.note.split("Base run")[0]  # TINY's has no steps of it
    (table,) = smoothness(method, make(1), DataSpec(), top=3)
    assert "Base run" not in table.note


def test_a_base_run_that_knows_the_held_out_photos_is_refused(monkeypatch) -> None:
    def cut(data, config):
        return split_instances(pairs_of(), test_share=config.test_share, seed=config.split_seed)

    monkeypatch.setattr(module, "read_split", cut)
    method, base = make(0), make(1, split_seed=3)
    with pytest.raises(
        ValueError, match=r"base must not have been trained on photos held out .* split_seed 3"
    ):
        smoothness(method, make(2), DataSpec(), base=base, top=3)
    same_photos = make(1, category="bar")
    assert len(smoothness(method, make(2), DataSpec(), base=same_photos, top=3)[0].rows) == 3


def test_the_papers_benchmarks() -> None:
    assert module.benchmark_of("qmul_v1", "shoe") == "QMUL-Shoe-V1"
    assert module.benchmark_of("qmul_v2", "chair") == "QMUL-Chair-V2"
    assert module.benchmark_of("qmul_v1_edges", "handbag") == "QMUL-Handbag"
    assert module.benchmark_of("qmul_v2", "handbag") is module.benchmark_of("sketchy", "shoe") is None
    assert module.benchmark_of("qmul_v1", "") is None


def test_other_protocols() -> None:
    method, start, base = make(0), make(1), make(2, objective="base")
    (table,) = smoothness(method, start, DataSpec(), base=base, top=3)
    assert [row["network"] for row in table.rows] == ["trained", "start weights", "base run (base)"]
    (table,) = attribution(method, start, DataSpec(), base=base, top=3)
    assert sum(row["errors"] for row in table.rows) == int(table.note.split()[0])
    with pytest.raises(ValueError, match="base must be the folder of a run of objective base"):
        attribution(method, start, DataSpec())
    with pytest.raises(ValueError, match=r"data must hold the sketches as strokes .* procedural has strokes"):
        early(method, start, DataSpec())


# --- command line -----------------------------------------------------------------------------------------


def test_from_the_command_line(monkeypatch, tmp_path, capsys) -> None:
    """Tiny on procedural pairs: two runs from one start, compared; embeddings."""
    monkeypatch.undo()
    monkeypatch.setattr("sketchfast.data.pairs.PROCEDURAL_PHOTOS", 64)
    ours, base = tmp_path / "ours", tmp_path / "base"
    flags = ["--preset", "tiny", "--impl", "reference", "--accelerator", "cpu"]
    assert cli.main(["train", "photo_topology", *flags, "--out", str(ours)]) == 0
    assert "start weights: 2 steps of self-supervised" in capsys.readouterr().err
    more = ["--objective", "base", "--weights", str(ours / "start.pt")]
    assert cli.main(["train", "photo_topology", *flags, *more, "--out", str(base)]) == 0
    for protocol in ("retrieval", "attribution"):
        command = ["evaluate", str(ours), protocol, "--base", str(base), "--accelerator", "cpu"]
        assert cli.main(command) == 0, capsys.readouterr().err
    evaluations = json.loads((ours / "results.json").read_text())["evaluations"]
    assert len(evaluations) == 2
    assert evaluations["retrieval on procedural"]["flags"]["base"] == str(base)
    rows = evaluations["retrieval on procedural"]["tables"][0]["rows"]
    assert [row["network"] for row in rows] == ["trained", "start weights", "base run (base)"]
    assert "Nearest photos, trained" in (ours / "report.html").read_text()
    command = ["embed", str(ours), str(ours / "pictures"), "--out", str(tmp_path / "e.npz")]
    assert cli.main(command) == 0
    assert cli.main(["evaluate", str(ours), "attribution", "--accelerator", "cpu"]) == 2
    assert "base must be the folder of a run" in capsys.readouterr().err


def test_protocols_that_need_strokes(monkeypatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("sketchfast.data.pairs.PROCEDURAL_PHOTOS", 40)
    split = module.read_split(DataSpec(), TINY)
    monkeypatch.setattr(module, "read_split", lambda data, config: split)
    method, start, base = make(0), make(1), make(2, objective="base")
    (table,) = early(method, start, DataSpec(), base=base)
    assert len(table.rows) == 30
    assert table.pictures["Accuracy against the share drawn"].startswith(b"\x89PNG")
    # the whole sketch drawn anew is the sketch of the data set
    (whole,) = retrieval(method, start, DataSpec(), queries_shown=1, photos_shown=1)
    assert table.rows[9]["share drawn"] == 1
    assert table.rows[9]["Acc@5"] == pytest.approx(whole.rows[0]["Acc@5"], abs=100 / len(split.test.sketches))
    (table,) = robustness(method, start, DataSpec(), versions=2)
    assert [row["network"] for row in table.rows] == ["trained", "start weights"]
    assert table.rows[0]["Acc@1"] == whole.rows[0]["Acc@1"]


@pytest.mark.skipif(not (DATA / "qmul_v1_edges").is_dir(), reason=f"no qmul_v1_edges in {DATA}")
def test_a_step_on_qmul_shoes(monkeypatch) -> None:
    monkeypatch.undo()
    torch.manual_seed(0)
    method = PhotoTopology(replace(TINY, category="shoe", pretrain_steps=1, pretrain_batch=4))
    batches = method.train_data(DataSpec("qmul_v1_edges", DATA / "qmul_v1_edges"))
    assert method.training_images.tolist() == [304, 304]
    method.start_from(method.before_training())
    assert method.teacher.shape == (304, 304)
    batch = batches.__getitems__(list(range(6)))
    for part in ("pairs", "topology"):
        assert torch.isfinite(method.loss(batch, 0, part)["loss"])
