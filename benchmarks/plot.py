"""Figures and a table from the JSON files of the benchmarks.

    python benchmarks/plot.py benchmarks/results/cpu/*.json --out benchmarks/results/cpu

Writes ratios.png (ours against every rival, targets marked), a curve of time and memory for each that a suite
recorded, and README.md (the table, with date, versions, hardware and commit, and the facts the suites state
beside their times).
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness import format_table, read_curves, read_results, times


def plot_ratios(rows: list[dict], path: Path) -> None:
    """Horizontal bars of the ratio to each rival, on a logarithmic axis; a tick marks the target."""
    labels = [f"{row['group']}: {row['rival']}" for row in rows]
    ratios = [row["ratio"] for row in rows]
    figure, axes = plt.subplots(figsize=(9, 0.28 * len(rows) + 1.2), layout="constrained")
    met = [row["target"] is None or row["ratio"] >= row["target"] for row in rows]
    axes.barh(labels, ratios, color=["#4878a8" if ok else "#c05048" for ok in met])
    for i, row in enumerate(rows):
        if row["target"]:
            axes.plot([row["target"]] * 2, [i - 0.45, i + 0.45], color="black", linewidth=2)
        axes.text(ratios[i] * 1.05, i, times(ratios[i]), va="center", fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.set_xlabel("times faster than the rival, medians; black: target")
    axes.margins(y=0.01)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_curve(curve: dict, path: Path) -> None:
    """Time and memory of a step over the batch; the crossing the rule takes is marked."""
    points = curve["curve"]
    figure, (time, memory) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")

    def draw(axes, name: str, label: str, **style) -> None:
        known = [(p["batch"], p[name]) for p in points if name in p]
        if known:
            axes.loglog(*zip(*known, strict=True), label=label, marker=".", base=2, **style)

    draw(time, "pairs", "pair by pair, O(B³)", color="#4878a8", linestyle="--")
    draw(time, "tree", "tree of ranks, O(B² log B)", color="#5a9a5a", linestyle="--")
    draw(time, "rule", "the rule's choice", color="black")
    draw(time, "cube", "eager B × B × B", color="#c05048")
    time.axvline(curve["tree_from"], color="grey", linewidth=0.8, label=f"rule: B = {curve['tree_from']}")
    draw(memory, "megabytes", "ours", color="black")
    draw(memory, "cube megabytes", "eager B × B × B", color="#c05048")
    time.set(xlabel="batch", ylabel="ms, forward and backward", yscale="log")
    memory.set(xlabel="batch", ylabel="MB a step adds at its peak", yscale="log")
    for axes in (time, memory):
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def describe(about: dict) -> str:
    """One line: date, commit, hardware, versions."""
    processor = about.get("cpu", {}).get("brand_raw", about.get("processor", "unknown processor"))
    where = about.get("gpu") or f"{processor}, {about.get('threads')} threads"
    return (
        f"{about['date']}, commit {about['commit'] or 'unknown'}, {where}, torch {about.get('torch')}, "
        f"Python {about.get('python_version')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("json", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it names each font that is absent
    rows, lines = [], []
    curves: dict[str, dict] = {}
    for path in arguments.json:
        some, about = read_results(path)
        rows += some
        lines += [f"## {path.stem}", "", describe(about), "", format_table(some), ""]
        lines += [f"- {fact.strip()}" for fact in about["facts"]] + [""] * bool(about["facts"])
        for curve in read_curves(path):
            name = f"{path.stem}_{curve['impl']}_{curve['device']}.png"
            curves[name] = curve
            lines += [f"![time and memory over the batch]({name})", ""]
    if not rows:
        sys.exit(f"no results in {', '.join(map(str, arguments.json))}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "README.md").write_text("# Benchmark results\n\n" + "\n".join(lines))
    plot_ratios(rows, arguments.out / "ratios.png")
    for name, curve in curves.items():
        plot_curve(curve, arguments.out / name)


if __name__ == "__main__":
    main()
