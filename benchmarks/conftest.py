"""How the benchmarks time: each rival interleaved with ours in one run, medians, both warm; and the tables.

pytest-benchmark times the rival; before each of its rounds, outside its clock, ours is timed a few times. On
a GPU a round is many launches over rotated inputs between two events. SKETCHFAST_BENCH=smoke shrinks every
size, to see that the suite runs.
"""

from __future__ import annotations

import os

# Before torch starts its pool: a worker that is woken onto the core of the thread that spins for it costs
# that thread's whole time slice (8 ms here). Bound threads serve every contender alike.
os.environ.setdefault("OMP_PROC_BIND", "true")

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

SMOKE = os.environ.get("SKETCHFAST_BENCH") == "smoke"
OURS_PER_ROUND = 5


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


@pytest.fixture(scope="session")
def rates() -> dict[str, Rates]:
    """The rates of each device."""
    return {d: measured_rates(d) for d in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])}


@pytest.fixture
def versus(benchmark, request):
    """versus(rival, ours, ...): times both interleaved and records medians, ratio, target and floor."""

    def run(
        rival: Callable[[], object],
        ours: Callable[[], object],
        *,
        group: str,
        name: str,
        device: str = "cpu",
        rounds: int = 7,
        target: float | None = None,
        floor: float | None = None,
        launches: int = 20,
    ) -> None:
        rounds = 2 if SMOKE else rounds
        launches = 2 if SMOKE else launches
        seconds: list[float] = []

        def time_ours() -> None:
            # One untimed call: a rival's freed gigabytes stall the call after it.
            ours()
            synchronize(device)
            seconds.extend(seconds_of(ours, device, launches) for _ in range(OURS_PER_ROUND))

        rival_launches = launches if device == "cuda" else 1
        benchmark.group = group
        benchmark.extra_info.update(rival=name, device=device, target=target)
        rival()

        def timed_rival() -> None:
            for _ in range(rival_launches):
                rival()
            synchronize(device)

        benchmark.pedantic(timed_rival, setup=time_ours, rounds=rounds, iterations=1, warmup_rounds=1)
        ours_median = statistics.median(seconds[OURS_PER_ROUND:])
        rival_median = benchmark.stats.stats.median / rival_launches
        benchmark.extra_info.update(
            ours_ms=ours_median * 1e3,
            rival_ms=rival_median * 1e3,
            ratio=rival_median / ours_median,
            floor_share=None if floor is None else floor / ours_median,
        )

    return run


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info.pop("node", None)


def rows_of(benchmarks: list[dict]) -> list[dict]:
    """The rows of the summary, one a (group, rival)."""
    return [{"group": b["group"], **b["extra_info"]} for b in benchmarks if "ratio" in b["extra_info"]]


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
            f" {row['ours_ms']:.3g} | {row['ratio']:.3g}x | {target} | {share} |"
        )
    return "\n".join(lines)


def pytest_terminal_summary(terminalreporter, config) -> None:
    session = getattr(config, "_benchmarksession", None)
    if session is None:
        return
    rows = [{"group": b.group, **b.extra_info} for b in session.benchmarks if "ratio" in (b.extra_info or {})]
    if rows:
        terminalreporter.write_line("")
        terminalreporter.write_line(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"
            + (", smoke sizes: no figure here is one" if SMOKE else "")
        )
        terminalreporter.write_line(format_table(rows))


def read_results(path: Path) -> tuple[list[dict], dict]:
    """(rows, machine and commit) of a JSON file that `pytest --benchmark-json` wrote."""
    data = json.loads(path.read_text())
    about = {
        "date": data["datetime"][:10],
        "commit": (data.get("commit_info") or {}).get("id", "")[:12],
        **data["machine_info"],
    }
    return rows_of(data["benchmarks"]), about
