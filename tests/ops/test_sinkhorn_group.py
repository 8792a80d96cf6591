"""swav_assign over a process group: the ranks together are one rank with the whole batch."""

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

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
scores = torch.load(f"{out}/scores.pt", weights_only=True)
for name, first in (("even", 12), ("uneven", 5), ("empty", 24)):
    rows = scores[:first] if rank == 0 else scores[first:]
    for scale in (1.0, 200.0):
        mine = sf.swav_assign(rows * scale, 0.05, 3, group=dist.group.WORLD)
        assert mine.shape == rows.shape
        torch.save(mine, f"{out}/{name}-{scale}-{rank}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_are_one(tmp_path):
    """Rows split evenly, unevenly, and with a rank that has none; also where the plain form overflows."""
    scores = torch.randn(24, 7, generator=torch.Generator().manual_seed(0))
    torch.save(scores, tmp_path / "scores.pt")
    command = [sys.executable, "-c", RANK]
    root = str(Path(sf.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    for name in ("even", "uneven", "empty"):
        for scale in (1.0, 200.0):
            parts = [torch.load(tmp_path / f"{name}-{scale}-{r}.pt", weights_only=True) for r in range(2)]
            whole = sf.swav_assign(scores * scale, 0.05, 3)
            torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-6)
