"""A trainer's step: with our kernels and with the reference, and where the rest of it goes.

    python benchmarks/bench_train.py pm_jdot --preset small --rounds 20

Impls take turns, step by step, in one run; medians. The parts of a step are timed by wrapping the functions
named in PARTS (on a GPU with a synchronisation at either end, which costs a little); what is in none of them
is the losses and the loop. The data are made up, of the preset's sizes, and need no files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from harness import synchronize

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from sketchfast.methods import get_method
from sketchfast.methods.base import DataSpec, Method
from sketchfast.train import spread_pool

#: method -> part of a step -> what is timed for it: attributes of the method, or functions of its module
PARTS = {
    "pm_jdot": {
        "views": ["module.random_view"],
        "network": ["method.features"],
        "assignment (swav_assign)": ["method.assignments"],
        "plans (sinkhorn)": ["method.plan"],
    }
}


def made_up_images(config: Any) -> Any:
    """Noise in place of PM-JDOT's images."""
    from sketchfast.data.images import ImageSet, SketchPhotoSet

    size, count = config.source_size or config.image_size, max(4 * config.batch_size, 2 * config.prototypes)
    count += config.queries_per_class
    domains = [
        ImageSet(
            np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8),
            np.zeros(count, np.int64),
            ["noise"],
            [str(i) for i in range(count)],
        )
        for seed in (0, 1)
    ]
    return SketchPhotoSet(*domains, ["noise"], np.full(count, -1))


class Clock:
    """Seconds of each part of the step in hand."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] += time.perf_counter() - start

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        object.__setattr__(owner, attribute, timed)


class Trainer:
    """The loop's step, its parts timed."""

    def __init__(self, name: str, config: Any, device: str, start: int) -> None:
        module = import_module(f"sketchfast.methods.{name}")
        torch.manual_seed(0)
        self.clock, self.step_number = Clock(device), start
        self.method: Method = get_method(name)(config)
        self.samples: Any = self.method.train_data(DataSpec())
        self.method.to(device).train()
        self.optimizer, _ = self.method.optimizer()
        self.module, self.parts = module, PARTS[name]
        self.device = device
        self.batches = np.random.default_rng(0)

    def step(self) -> dict[str, float]:
        """Seconds of one step, whole and by part."""
        originals = {}
        self.clock.seconds.clear()
        for name, places in self.parts.items():
            for place in places:
                owner, attribute = place.split(".")
                target = self.module if owner == "module" else self.method
                originals[(owner, attribute)] = (target, getattr(target, attribute))
                self.clock.wrap(target, attribute, name)
        with self.clock.part("step"):
            with self.clock.part("data"):
                rows = self.batches.integers(0, len(self.samples), self.method.config.batch_size).tolist()
                batch = self.samples.__getitems__(rows)
                batch = type(batch)(*(part.to(self.device) for part in batch))
            loss = self.method.loss(batch, self.step_number)["loss"]
            with self.clock.part("backward"):
                self.optimizer.zero_grad()
                loss.backward()
            with self.clock.part("optimiser"):
                self.optimizer.step()
        for (owner, attribute), (target, call) in originals.items():
            if owner == "module":
                setattr(target, attribute, call)
            else:
                object.__delattr__(target, attribute)
        self.step_number += 1
        return dict(self.clock.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=sorted(PARTS))
    parser.add_argument("--preset", default="small", choices=("paper", "small", "tiny"))
    parser.add_argument("--impls", nargs="+", default=["native", "reference"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--variant", help="of pm_jdot: the row of Table 3")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cpu":
        spread_pool()
    module = import_module(f"sketchfast.methods.{args.method}")
    config = get_method(args.method).preset(args.preset)
    if args.variant:
        config = dataclasses.replace(config, variant=args.variant)
    images = made_up_images(config)
    module.read_images = lambda data, config: images  # type: ignore[attr-defined]
    # past the k-means start, and with bank and queue full after the warm-up
    start = config.align_after + 1
    trainers = {
        impl: Trainer(args.method, dataclasses.replace(config, impl=impl), args.device, start)
        for impl in args.impls
    }
    warm_up = 2 + max(config.bank_size // config.batch_size, config.queue_size // (2 * config.batch_size))
    for trainer in trainers.values():
        for _ in range(warm_up if args.device == "cuda" else min(warm_up, 12)):
            trainer.step()
    rounds: dict[str, list[dict[str, float]]] = {impl: [] for impl in trainers}
    for _ in range(args.rounds):
        for impl, trainer in trainers.items():
            rounds[impl].append(trainer.step())
    medians = {
        impl: {part: statistics.median([r[part] for r in steps if part in r]) for part in steps[0]}
        for impl, steps in rounds.items()
    }
    print(format_table(medians))
    if args.json:
        about = {
            "method": args.method,
            "preset": args.preset,
            "variant": config.variant,
            "torch": torch.__version__,
        }
        args.json.write_text(json.dumps({**about, "device": args.device, "seconds": medians}, indent=2))


def format_table(medians: dict[str, dict[str, float]]) -> str:
    """Markdown: milliseconds and share of the step, a column an impl."""
    parts = list(next(iter(medians.values())))
    parts.remove("step")
    lines = [
        "| part | " + " | ".join(f"{impl} ms | share" for impl in medians) + " |",
        "|---|" + "---:|---:|" * len(medians),
    ]
    rest = {impl: m["step"] - sum(m[part] for part in parts) for impl, m in medians.items()}
    for part in [*parts, "losses and the rest", "step"]:
        cells = []
        for impl, m in medians.items():
            seconds = rest[impl] if part == "losses and the rest" else m[part]
            cells.append(f"{1e3 * seconds:.3g} | {seconds / m['step']:.1%}")
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
