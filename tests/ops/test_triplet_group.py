"""The triplet losses over two ranks that gather their rows are the loss of one rank with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import sketchfast as sf

RANK = """
import sys
import torch
import torch.distributed as dist
import sketchfast as sf
from sketchfast.train import gather_rows

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
batch = torch.load(f"{out}/batch.pt", weights_only=True)
own = slice(rank * 12, rank * 12 + 12)
for samples in (None, 5):
    query, gallery = (batch[name][own].clone().requires_grad_() for name in ("query", "gallery"))
    indices = gather_rows(batch["indices"][own])
    queries, photos = gather_rows(query), gather_rows(gallery)
    teacher = batch["teacher"]
    loss = sf.ranking_triplet_loss(queries, photos, teacher, indices=indices, samples=samples, seed=3)
    loss = loss + sf.triplet_loss(queries, photos, mining="semihard")
    loss.backward()
    found = {"loss": loss.detach(), "query": query.grad / 2, "gallery": gallery.grad / 2}  # DDP averages
    torch.save(found, f"{out}/{samples}-{rank}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_are_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(24, 6, generator=generator) for name in ("query", "gallery")}
    batch["teacher"] = torch.rand(40, 40, generator=generator)
    batch["indices"] = torch.randperm(40, generator=generator)[:24]
    torch.save(batch, tmp_path / "batch.pt")
    command = [sys.executable, "-c", RANK]
    root = str(Path(sf.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    for samples in (None, 5):
        query, gallery = (batch[name].clone().requires_grad_() for name in ("query", "gallery"))
        loss = sf.ranking_triplet_loss(
            query, gallery, batch["teacher"], indices=batch["indices"], samples=samples, seed=3
        )
        loss = loss + sf.triplet_loss(query, gallery, mining="semihard")
        loss.backward()
        parts = [torch.load(tmp_path / f"{samples}-{rank}.pt", weights_only=True) for rank in range(2)]
        for part in parts:
            torch.testing.assert_close(part["loss"], loss.detach())
        for name, leaf in (("query", query), ("gallery", gallery)):
            torch.testing.assert_close(torch.cat([part[name] for part in parts]), leaf.grad)
