"""Ours against a rival, interleaved in one run: medians, both warm.

pytest-benchmark times the rival; before each of its rounds, outside its clock, ours is timed a few times. On
a GPU a round is many launches between two events. SKETCHFAST_BENCH=smoke shrinks every size, to see that the
suite runs.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable

import pytest
import torch
from harness import SMOKE, Rates, format_table, measured_rates, seconds_of, synchronize

OURS_PER_ROUND = 5


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
        ours_per_round: int = OURS_PER_ROUND,
    ) -> None:
        rounds = 2 if SMOKE else rounds
        launches = 2 if SMOKE else launches
        seconds: list[float] = []

        def time_ours() -> None:
            # One untimed call: a rival's freed gigabytes stall the call after it.
            ours()
            synchronize(device)
            seconds.extend(seconds_of(ours, device, launches) for _ in range(ours_per_round))

        rival_launches = launches if device == "cuda" else 1
        benchmark.group = group
        # A target speaks of the real sizes.
        benchmark.extra_info.update(rival=name, device=device, target=None if SMOKE else target)
        rival()

        def timed_rival() -> None:
            for _ in range(rival_launches):
                rival()
            synchronize(device)

        benchmark.pedantic(timed_rival, setup=time_ours, rounds=rounds, iterations=1, warmup_rounds=1)
        ours_median = statistics.median(seconds[ours_per_round:])
        rival_median = benchmark.stats.stats.median / rival_launches
        benchmark.extra_info.update(
            ours_ms=ours_median * 1e3,
            rival_ms=rival_median * 1e3,
            ratio=rival_median / ours_median,
            floor_share=None if floor is None else floor / ours_median,
        )

    return run


FACTS: list[str] = []


@pytest.fixture
def say():
    """say(text): a line for the summary, and for the JSON file of the run."""
    return lambda text: FACTS.append(text) if text not in FACTS else None


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    output_json["facts"] = FACTS


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info.pop("node", None)


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
    for fact in FACTS:
        terminalreporter.write_line(fact)
