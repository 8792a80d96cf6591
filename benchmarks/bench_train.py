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
    },
    "photo_topology": {
        "network": ["method.features"],
        "pairs (triplet_loss)": ["module.triplet_loss"],
        "topology (ranking_triplet_loss)": ["module.ranking_triplet_loss"],
    },
}


def make_up_data(name: str, module: Any, config: Any) -> None:
    """Noise in place of what the method reads."""
    if name == "pm_jdot":
        count = max(4 * config.batch_size, 2 * config.prototypes) + config.queries_per_class
        images = noise(config.source_size or config.image_size, count)
        module.read_images = lambda data, config: images
    else:
        from sketchfast.data.pairs import split_instances

        pairs = noise(config.image_size, 400)
        pairs.pairs[:] = np.arange(400)
        module.read_split = lambda data, config: split_instances(pairs)


def noise(size: int, count: int) -> Any:
    """As many sketches as photos of noise."""
    from sketchfast.data.images import ImageSet, SketchPhotoSet

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
    """The loop's step, its parts timed: the passes that `Method.update` asks for."""

    def __init__(self, name: str, config: Any, device: str, start: int) -> None:
        module = import_module(f"sketchfast.methods.{name}")
        torch.manual_seed(0)
        self.clock, self.step_number = Clock(device), start
        self.method: Method = get_method(name)(config)
        self.samples: Any = self.method.train_data(DataSpec())
        self.method.to(device)
        if (ready := self.method.before_training()) is not None:
            self.method.start_from(ready)
        self.method.train()
        optimizers, _ = self.method.optimizer()
        self.optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
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
                count = self.method.config.batch_size
                rows = self.batches.choice(len(self.samples), count, replace=False).tolist()
                batch = self.samples.__getitems__(rows)
                self.batch = type(batch)(*(part.to(self.device) for part in batch))
            self.method.update(self)
        for (owner, attribute), (target, call) in originals.items():
            if owner == "module":
                setattr(target, attribute, call)
            else:
                object.__delattr__(target, attribute)
        self.step_number += 1
        return dict(self.clock.seconds)

    def gradient(self, **options: Any) -> dict[str, torch.Tensor]:
        losses = self.method.loss(self.batch, self.step_number, **options)
        with self.clock.part("backward"):
            self.method.zero_grad()
            losses["loss"].backward()
        return {name: value.detach() for name, value in losses.items()}

    def descend(self, optimizer: int = 0, *, more: bool = False) -> None:
        with self.clock.part("optimiser"):
            self.optimizers[optimizer].step()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=sorted(PARTS))
    parser.add_argument("--preset", default="small", choices=("paper", "small", "tiny"))
    parser.add_argument("--impls", nargs="+", default=["native", "reference"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--variant", help="of pm_jdot the row of Table 3, of photo_topology the objective")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cpu":
        spread_pool()
    module = import_module(f"sketchfast.methods.{args.method}")
    config = get_method(args.method).preset(args.preset)
    variant = "variant" if args.method == "pm_jdot" else "objective"
    if args.variant:
        config = dataclasses.replace(config, **{variant: args.variant})
    if hasattr(config, "pretrain_steps"):
        config = dataclasses.replace(config, pretrain_steps=0, weights="random")
    make_up_data(args.method, module, config)
    # past the k-means start, and with bank and queue full after the warm-up
    start = getattr(config, "align_after", 0) + 1
    trainers = {
        impl: Trainer(args.method, dataclasses.replace(config, impl=impl), args.device, start)
        for impl in args.impls
    }
    held = max(getattr(config, "bank_size", 0), getattr(config, "queue_size", 0) // 2)
    warm_up = 2 + held // config.batch_size
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
            "variant": getattr(config, variant),
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
