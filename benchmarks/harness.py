"""How the benchmarks time, and the tables they end in; conftest.py makes fixtures of it."""

from __future__ import annotations

import os

# Before torch starts its pool: a worker that is woken onto the core of the thread that spins for it costs
# that thread's whole time slice (8 ms here). Bound threads serve every contender alike.
os.environ.setdefault("OMP_PROC_BIND", "true")

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

SMOKE = os.environ.get("SKETCHFAST_BENCH") == "smoke"


@dataclass
class Rates:
    """What this machine does at best, measured: the denominators of every floor."""

    bytes_per_second: float
    flops_per_second: float

    def floor(self, bytes_moved: float, flops: float) -> float:
        """Seconds no version can beat: the larger of the two terms."""
        return max(bytes_moved / self.bytes_per_second, flops / self.flops_per_second)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], device: str, launches: int = 1) -> float:
    """Seconds a call takes: perf_counter on CPU, events around `launches` calls on a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # the queue fills behind this, so that launches do not wait for Python
    first.record()
    for _ in range(launches):
        call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / launches


def measured_rates(device: str) -> Rates:
    """Copy bandwidth and matrix-product rate, medians of warm runs."""
    count = (1 << 20) if SMOKE else (1 << 25 if device == "cpu" else 1 << 29)
    side = 256 if SMOKE else (1024 if device == "cpu" else 8192)
    source, matrix = torch.rand(count, device=device), torch.rand(side, side, device=device)
    target = torch.empty_like(source)

    def median(call: Callable[[], object]) -> float:
        return statistics.median([seconds_of(call, device) for _ in range(12)][2:])

    return Rates(
        2 * 4 * count / median(lambda: target.copy_(source)), 2 * side**3 / median(lambda: matrix @ matrix)
    )


def rows_of(benchmarks: list[dict]) -> list[dict]:
    """The rows of the summary, one a (group, rival)."""
    return [{"group": b["group"], **b["extra_info"]} for b in benchmarks if "ratio" in b["extra_info"]]


def times(ratio: float) -> str:
    """A ratio in three digits or all before the point: 1.83x, 60.3x, 1,730x."""
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def format_table(rows: list[dict]) -> str:
    """Markdown: ours against each rival, with target and share of the floor."""
    lines = [
        "| case | device | rival | rival ms | ours ms | ratio | target | share of floor |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        target = "-" if row["target"] is None else f"{row['target']:g}x"
        if row["target"] is not None and row["ratio"] < row["target"]:
            target += " (missed)"
        share = "-" if row["floor_share"] is None else f"{row['floor_share']:.0%}"
        lines.append(
            f"| {row['group']} | {row['device']} | {row['rival']} | {row['rival_ms']:.3g} |"
            f" {row['ours_ms']:.3g} | {times(row['ratio'])} | {target} | {share} |"
        )
    return "\n".join(lines)


def read_results(path: Path) -> tuple[list[dict], dict]:
    """(rows, machine, commit and facts) of a JSON file that `pytest --benchmark-json` wrote."""
    data = json.loads(path.read_text())
    about = {
        "date": data["datetime"][:10],
        "commit": (data.get("commit_info") or {}).get("id", "")[:12],
        "facts": data.get("facts", []),
        **data["machine_info"],
    }
    return rows_of(data["benchmarks"]), about


def read_curves(path: Path) -> list[dict]:
    """What the suite recorded over a range of sizes: `extra_info` with a `curve` of points."""
    found = (b["extra_info"] for b in json.loads(path.read_text())["benchmarks"])
    return [info for info in found if "curve" in info]
