"""The triplet losses against what a user would pick instead: the B x B x B cube, compiled or not, and
pytorch-metric-learning.

    pytest benchmarks/bench_triplet.py --benchmark-json triplet.json

Every time is of a loss from embeddings with its backward. Rivals get the parts that do not change from batch
to batch (masks, index lists of positions) made beforehand. The curve goes over the batch size with both ways
of counting, so that their crossing shows, and measures memory in processes of their own.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from harness import SMOKE, seconds_of

import sketchfast as sf
from sketchfast.ops import triplet as ops_triplet
from sketchfast.testing import available_impls, devices

DIMENSIONS, MARGIN, SAMPLES = 128, 0.01, 10
BATCHES = (64, 128, 256, 512, 1024, 4096)
CUBE_BATCHES = (64, 128, 256)  # the cube of floats at 512 takes 0.5 GB, autograd several of them
CURVE = (64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
if SMOKE:
    BATCHES, CUBE_BATCHES, CURVE, DIMENSIONS = (16, 40), (16,), (16, 40), 8
#: (rival, batch) -> the ratio DESIGN.md's section 6 asks for
TARGETS = {
    "cpu": {("eager cube", 128): 25, ("eager cube", 256): 50},
    "cuda": {("eager cube", 256): 50},
}
CASES = [(d, i) for d in devices() for i in available_impls(d) if i in ("native", "triton")]
CASES = [case for case in CASES if case != ("cpu", "triton")]  # the interpreter is no rival of anything
cases = pytest.mark.parametrize(("device", "impl"), CASES)


def batch_of(batch: int, device: str, dimensions: int = DIMENSIONS) -> tuple[torch.Tensor, ...]:
    """(query, gallery, teacher): embeddings that require gradients, distances of another model."""
    generator = torch.Generator().manual_seed(batch)
    query, gallery = (torch.randn(batch, dimensions, generator=generator).to(device) for _ in range(2))
    photos = torch.randn(batch, 64, generator=generator)
    return query.requires_grad_(), gallery.requires_grad_(), torch.cdist(photos, photos).to(device)


def floor_of(rates, device: str, batch: int, dimensions: int = DIMENSIONS) -> float:
    """Teacher read and weights written and read once; three operations a difference forward, again and five
    more backward; a comparison sort of each anchor's columns."""
    moved = 4 * (3 * batch**2 + 6 * batch * dimensions)
    return rates[device].floor(moved, batch**2 * (11 * dimensions + 2 * math.log2(batch)))


def stepped(loss, query, gallery):
    """A step: loss and backward, gradients let go before."""

    def run():
        query.grad = gallery.grad = None
        loss().backward()

    return run


# --- the rivals, each as a maker (batch, device) -> loss(query, gallery, teacher) -----------------------


def different(batch: int, device: str) -> torch.Tensor:
    """[B, B, B]: 1 where i, j and k all differ."""
    apart = 1 - torch.eye(batch, device=device)
    return apart[:, :, None] * apart[:, None, :] * apart[None]


def cube_loss(batch: int, device: str):
    exists = different(batch, device)
    count = exists.sum()

    def loss(query, gallery, teacher):
        dist = torch.cdist(query, gallery)
        order = torch.where(teacher[:, :, None] <= teacher[:, None, :], 1.0, -1.0)
        terms = torch.relu(MARGIN + order * (dist[:, :, None] - dist[:, None, :]))
        return (terms * exists).sum() / count

    return loss


def compiled_cube(batch: int, device: str):
    torch._dynamo.reset()
    return torch.compile(cube_loss(batch, device))


def metric_learning(batch: int, device: str):
    """TripletMarginLoss given all ordered triplets, which of two is the positive looked up in the teacher."""
    found = pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, reducers

    assert found
    euclidean = distances.LpDistance(normalize_embeddings=False)
    of_triplets = losses.TripletMarginLoss(margin=MARGIN, distance=euclidean, reducer=reducers.MeanReducer())
    i, j, k = different(batch, device).nonzero(as_tuple=True)

    def loss(query, gallery, teacher):
        in_order = teacher[i, j] <= teacher[i, k]
        triplets = (i, torch.where(in_order, j, k), torch.where(in_order, k, j))
        return of_triplets(query, indices_tuple=triplets, ref_emb=gallery)

    return loss


RIVALS = {
    "eager cube": cube_loss,
    "torch.compile of the cube": compiled_cube,
    "pytorch-metric-learning": metric_learning,
}
rivals = pytest.mark.parametrize("rival", RIVALS)


@cases
@pytest.mark.parametrize("batch", CUBE_BATCHES)
@rivals
def test_all_triplets(versus, rates, device, impl, batch, rival):
    query, gallery, teacher = batch_of(batch, device)
    theirs = RIVALS[rival](batch, device)
    ours = sf.ranking_triplet_loss(query, gallery, teacher, margin=MARGIN, impl=impl)
    torch.testing.assert_close(theirs(query, gallery, teacher), ours, rtol=1e-3, atol=1e-5)
    versus(
        stepped(lambda: theirs(query, gallery, teacher), query, gallery),
        stepped(
            lambda: sf.ranking_triplet_loss(query, gallery, teacher, margin=MARGIN, impl=impl),
            query,
            gallery,
        ),
        group=f"ranking triplets B{batch} D{DIMENSIONS}, all, fwd+bwd, {impl}",
        name=rival,
        device=device,
        rounds=7,
        target=TARGETS[device].get((rival, batch)),
        floor=floor_of(rates, device, batch),
    )


def eager_sampled(query, gallery, teacher):
    """Random pairs an anchor, as one writes it: distances of all pairs, then a gather."""
    batch = query.shape[0]
    anchor = torch.arange(batch, device=query.device)[:, None]
    j = torch.randint(0, batch - 1, (batch, SAMPLES), device=query.device)
    j = j + (j >= anchor).long()
    k = torch.randint(0, batch - 2, (batch, SAMPLES), device=query.device)
    k = k + (k >= torch.minimum(anchor, j)).long()
    k = k + (k >= torch.maximum(anchor, j)).long()
    dist = torch.cdist(query, gallery)
    order = torch.where(teacher.gather(1, j) <= teacher.gather(1, k), 1.0, -1.0)
    return torch.relu(MARGIN + order * (dist.gather(1, j) - dist.gather(1, k))).mean()


@cases
@pytest.mark.parametrize("batch", BATCHES)
def test_sampled_triplets(versus, device, impl, batch):
    query, gallery, teacher = batch_of(batch, device)
    versus(
        stepped(lambda: eager_sampled(query, gallery, teacher), query, gallery),
        stepped(
            lambda: sf.ranking_triplet_loss(
                query, gallery, teacher, margin=MARGIN, samples=SAMPLES, impl=impl
            ),
            query,
            gallery,
        ),
        group=f"ranking triplets B{batch} D{DIMENSIONS}, {SAMPLES} sampled, fwd+bwd, {impl}",
        name="eager, gathered",
        device=device,
        rounds=9,
    )


# --- matched pairs --------------------------------------------------------------------------------------


def eager_pairs(mining: str):
    def loss(query, gallery):
        dist = torch.cdist(query, gallery)
        own = dist.diagonal()[:, None]
        eye = torch.eye(len(dist), dtype=torch.bool, device=dist.device)
        if mining == "hardest":
            return torch.relu(0.2 + own[:, 0] - dist.masked_fill(eye, torch.inf).amin(1)).mean()
        terms = torch.relu(0.2 + own - dist).masked_fill(eye, 0.0)
        return terms.sum() / (len(dist) * (len(dist) - 1))

    return loss


def metric_learning_pairs(batch: int, device: str):
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, reducers

    euclidean = distances.LpDistance(normalize_embeddings=False)
    triplets = losses.TripletMarginLoss(margin=0.2, distance=euclidean, reducer=reducers.MeanReducer())
    labels = torch.arange(batch, device=device)
    of_gallery = labels.clone()  # given the same tensor, it takes gallery for query and drops the pairs

    def loss(query, gallery):
        return triplets(query, labels, ref_emb=gallery, ref_labels=of_gallery)

    return loss


@cases
@pytest.mark.parametrize("batch", BATCHES[:-1])
@pytest.mark.parametrize("rival", ["eager all", "eager hardest", "pytorch-metric-learning all"])
def test_pairs(versus, device, impl, batch, rival):
    mining = rival.split()[-1]
    if rival.startswith("pytorch") and batch > max(CUBE_BATCHES):
        pytest.skip("its cube of B x B x B does not fit")
    query, gallery, _ = batch_of(batch, device)
    eager = rival.startswith("eager")
    theirs = eager_pairs(mining) if eager else metric_learning_pairs(batch, device)
    torch.testing.assert_close(
        theirs(query, gallery),
        sf.triplet_loss(query, gallery, mining=mining, impl=impl),
        rtol=1e-3,
        atol=1e-4,
    )
    versus(
        stepped(lambda: theirs(query, gallery), query, gallery),
        stepped(lambda: sf.triplet_loss(query, gallery, mining=mining, impl=impl), query, gallery),
        group=f"triplet_loss B{batch} D{DIMENSIONS}, {mining}, fwd+bwd, {impl}",
        name=rival.rsplit(" ", 1)[0],
        device=device,
        rounds=7,
    )


# --- the curve ------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
import torch, sketchfast as sf
sys.path.insert(0, sys.argv[1])
import bench_triplet

def megabytes(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 1024

batch, cube = int(sys.argv[2]), sys.argv[3] == "cube"
torch.set_num_threads(1)

def step(batch):
    query, gallery, teacher = bench_triplet.batch_of(batch, "cpu")
    if cube:
        loss = bench_triplet.cube_loss(batch, "cpu")(query, gallery, teacher)
    else:
        loss = sf.ranking_triplet_loss(query, gallery, teacher)
    Path("/proc/self/clear_refs").write_text("5")
    loss.backward()

step(8)
before = megabytes("VmRSS")
step(batch)
print(megabytes("VmHWM") - before)
"""


def peak_megabytes(batch: int, kind: str) -> float:
    """What a step adds to a process on the CPU at its peak, the batch and its teacher included."""
    from pathlib import Path

    command = [sys.executable, "-c", PEAK, str(Path(__file__).parent), str(batch), kind]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def milliseconds(call, device: str, rounds: int) -> float:
    call()
    times = sorted(seconds_of(call, device, 1 if device == "cpu" else 10) for _ in range(rounds))
    return times[len(times) // 2] * 1e3


@cases
def test_curve(benchmark, device, impl, say, monkeypatch):
    """Both ways of counting over the batch, the rule's choice, and the cube while it fits."""
    curve = []
    sizes = CURVE if device == "cpu" or SMOKE else (*CURVE, 8192)
    for batch in sizes:
        query, gallery, teacher = batch_of(batch, device)
        step = stepped(
            lambda q=query, g=gallery, t=teacher: sf.ranking_triplet_loss(q, g, t, impl=impl), query, gallery
        )
        rounds = 3 if SMOKE or batch > 1024 else 9
        point: dict[str, float] = {"batch": batch, "rule": milliseconds(step, device, rounds)}
        for name, start in (("tree", 0), ("pairs", 2**31)):
            if name == "pairs" and batch > 2048 and device == "cpu":
                continue
            with monkeypatch.context() as patch:
                patch.setitem(ops_triplet.TREE_FROM, (impl, device), start)
                point[name] = milliseconds(step, device, rounds)
        if batch <= max(CUBE_BATCHES):
            loss = cube_loss(batch, device)
            cube = stepped(lambda q=query, g=gallery, t=teacher, f=loss: f(q, g, t), query, gallery)
            point["cube"] = milliseconds(cube, device, 3)
        if device == "cpu" and sys.platform == "linux":
            point["megabytes"] = peak_megabytes(batch, "ours")
            if "cube" in point:
                point["cube megabytes"] = peak_megabytes(batch, "cube")
        curve.append(point)
    by_batch = {point["batch"]: point["rule"] for point in curve}
    benchmark.extra_info.update(
        curve=curve, device=device, impl=impl, tree_from=ops_triplet.TREE_FROM[impl, device]
    )
    benchmark.pedantic(lambda: None, rounds=1)  # the points are the result
    if not SMOKE:
        growth = by_batch[4096] / by_batch[1024]
        say(
            f"ranking triplets, {impl} on {device}: {by_batch[1024]:.3g} ms at B=1024"
            f"{' (target: under 60)' if device == 'cpu' else ''}; 4096 takes {growth:.1f} times that"
            f"{' (target: under 22)' if device == 'cpu' else ''}"
        )
    if device == "cuda" and not SMOKE:
        query, gallery, teacher = batch_of(8192, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sf.ranking_triplet_loss(query, gallery, teacher, impl=impl).backward()
        gigabytes = (torch.cuda.max_memory_allocated() - before) / 2**30
        say(f"ranking triplets, {impl}: {gigabytes:.2f} GiB at B=8192 (target: under 2)")
