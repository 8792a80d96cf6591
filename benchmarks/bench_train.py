"""A trainer's step: with our kernels and with the reference, and where the rest of it goes.

    python benchmarks/bench_train.py pm_jdot --preset small --rounds 20
    python benchmarks/bench_train.py sketchembednet --preset paper --precision bf16-mixed

Impls take turns, step by step, in one run; medians. The parts of a step are timed by wrapping the functions
named in PARTS (on a GPU with a synchronisation at either end, which costs a little); what is in none of them
is the losses and the loop. Whole steps are timed apart, with nothing wrapped: eagerly, and on a GPU replayed
from a CUDA graph where the method can; with the time that the preset's steps would take, and the share of the
floor, the step's matrix products and convolutions at the rate of a large product here. The data are made up,
of the preset's sizes, and need no files.
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

from harness import seconds_of, synchronize

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from sketchfast.cuda_graph import CudaCapture, GraphedGradient
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
    "sketchembednet": {
        "images (rasterize)": ["method.render"],
        "encoder": ["method.encode"],
        "decoder (HyperLSTM)": ["method.decode"],
        "pen and stroke loss (mixture_loss)": ["module.mixture_loss"],
        "pixel loss (raster_bce)": ["method.pixel_loss"],
    },
}

#: of the methods whose config can vary the loss: the field
VARIANTS = {"pm_jdot": "variant", "photo_topology": "objective"}


def make_up_data(name: str, module: Any, config: Any) -> None:
    """Noise in place of what the method reads."""
    if name == "pm_jdot":
        count = max(4 * config.batch_size, 2 * config.prototypes) + config.queries_per_class
        images = noise(config.source_size or config.image_size, count)
        module.read_images = lambda data, config: images
    elif name == "sketchembednet":
        drawings = scribbles(4 * config.batch_size, config.max_length + 1)
        module.read_drawings = lambda data, per_class: drawings
    else:
        from sketchfast.data.pairs import split_instances

        pairs = noise(config.image_size, 400)
        pairs.pairs[:] = np.arange(400)
        module.read_split = lambda data, config: split_instances(pairs)


def scribbles(count: int, points: int) -> Any:
    """Random walks of as many points each."""
    from sketchfast.data.dataset import StrokeDataset

    random = np.random.default_rng(0)
    return StrokeDataset(
        np.cumsum(random.normal(size=(count, points, 2)), axis=1).astype(np.float32).reshape(-1, 2),
        random.random(count * points) < 0.9,
        np.arange(count + 1, dtype=np.int64) * points,
        np.arange(count, dtype=np.int64) % 2,
        ["trained on", "held out"],
    )


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
        self.times_parts = True

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not (self.times_parts or name == "step"):
            yield
            return
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

    def __init__(
        self, name: str, config: Any, device: str, start: int, precision: str = "32", graph: bool = False
    ) -> None:
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
        self.device, self.precision = device, precision
        self.batches = np.random.default_rng(0)
        self.passes: Callable[..., dict[str, torch.Tensor]] = self.eager_gradient
        if graph:
            self.passes = GraphedGradient(
                self.method, self.eager_gradient, CudaCapture(next(self.method.parameters()).device)
            )

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
                self.fetch()
            self.method.update(self)
        for (owner, attribute), (target, call) in originals.items():
            if owner == "module":
                setattr(target, attribute, call)
            else:
                object.__delattr__(target, attribute)
        self.step_number += 1
        return dict(self.clock.seconds)

    def whole_step(self) -> float:
        """Seconds of one step with nothing timed inside; its batch is there already, as in the loop."""
        self.clock.seconds.clear()
        self.clock.times_parts = False
        self.fetch()
        with self.clock.part("step"):
            self.method.update(self)
        self.clock.times_parts = True
        self.step_number += 1
        return self.clock.seconds["step"]

    def fetch(self) -> None:
        count = self.method.config.batch_size
        rows = self.batches.choice(len(self.samples), count, replace=False).tolist()
        batch = self.samples.__getitems__(rows)
        self.batch = type(batch)(*(part.to(self.device) for part in batch))

    def gradient(self, **options: Any) -> dict[str, torch.Tensor]:
        return self.passes(self.batch, self.step_number, **options)

    def eager_gradient(self, batch: Any, step: int, **options: Any) -> dict[str, torch.Tensor]:
        with self.autocast():
            losses = self.method.loss(batch, step, **options)
        with self.clock.part("backward"):
            self.method.zero_grad()
            losses["loss"].backward()
        return {name: value.detach() for name, value in losses.items()}

    def autocast(self) -> Any:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16-mixed")

    def descend(self, optimizer: int = 0, *, more: bool = False) -> None:
        config = self.method.config
        with self.clock.part("optimiser"):
            parameters = list(self.method.parameters())
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            norm.item()  # as the loop, which asks whether it is finite
            if config.clip_value > 0:
                torch.nn.utils.clip_grad_value_(parameters, config.clip_value)
            if config.clip_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, norm)
            self.optimizers[optimizer].step()


def floor_of(trainer: Trainer) -> tuple[float, float]:
    """Floating-point operations of a step's products and convolutions, and the seconds they take at best.

    Counted in a step of the reference: a fused kernel's are not seen.
    """
    with FlopCounterMode(display=False) as counter:
        trainer.whole_step()
    side = 1024 if trainer.device == "cpu" else 8192
    dtype = torch.bfloat16 if trainer.precision == "bf16-mixed" else torch.float32
    matrix = torch.rand(side, side, device=trainer.device, dtype=dtype)
    seconds = [seconds_of(lambda: matrix @ matrix, trainer.device) for _ in range(12)][2:]
    flops = counter.get_total_flops()
    return flops, flops / (2 * side**3 / statistics.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=sorted(PARTS))
    parser.add_argument("--preset", default="small", choices=("paper", "small", "tiny"))
    parser.add_argument("--impls", nargs="+", default=["native", "reference"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precision", default="32", choices=("32", "bf16-mixed"))
    parser.add_argument("--batch-size", type=int, help="in place of the preset's")
    parser.add_argument("--variant", help="of pm_jdot the row of Table 3, of photo_topology the objective")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cpu":
        spread_pool()
    module = import_module(f"sketchfast.methods.{args.method}")
    config = get_method(args.method).preset(args.preset)
    if args.batch_size:
        config = dataclasses.replace(config, batch_size=args.batch_size)
    variant = VARIANTS.get(args.method)
    if args.variant and variant is None:
        parser.error(f"{args.method} has no variants")
    if args.variant:
        config = dataclasses.replace(config, **{variant: args.variant})
    if hasattr(config, "pretrain_steps"):
        config = dataclasses.replace(config, pretrain_steps=0, weights="random")
    make_up_data(args.method, module, config)
    # past the k-means start, with bank and queue full after the warm-up, and with the pixel loss
    start = config.steps // 2 if hasattr(config, "alpha_max") else getattr(config, "align_after", 0) + 1

    def trainer_of(impl: str, graph: bool = False) -> Trainer:
        with_impl = dataclasses.replace(config, impl=impl)
        return Trainer(args.method, with_impl, args.device, start, args.precision, graph)

    trainers = {impl: trainer_of(impl) for impl in args.impls}
    captured = args.device == "cuda" and next(iter(trainers.values())).method.graph_key(start) is not None
    graphs = {f"{impl}, CUDA graph": trainer_of(impl, True) for impl in args.impls} if captured else {}
    held = max(getattr(config, "bank_size", 0), getattr(config, "queue_size", 0) // 2)
    warm_up = 2 + held // config.batch_size
    for trainer in (trainers | graphs).values():
        for _ in range(warm_up if args.device == "cuda" else min(warm_up, 12)):
            trainer.whole_step()
    rounds: dict[str, list[dict[str, float]]] = {impl: [] for impl in trainers}
    whole: dict[str, list[float]] = {name: [] for name in trainers | graphs}
    for _ in range(args.rounds):
        for impl, trainer in trainers.items():
            rounds[impl].append(trainer.step())
        for name, trainer in (trainers | graphs).items():
            whole[name].append(trainer.whole_step())
    medians = {
        impl: {part: statistics.median([r[part] for r in steps if part in r]) for part in steps[0]}
        for impl, steps in rounds.items()
    }
    flops, floor = floor_of(trainers.get("reference") or trainer_of("reference"))
    steps = {name: statistics.median(seconds) for name, seconds in whole.items()}
    print(format_table(medians))
    print()
    print(format_steps(steps, config.steps, floor))
    if args.json:
        about = {
            "method": args.method,
            "preset": args.preset,
            "batch_size": config.batch_size,
            "precision": args.precision,
            "variant": getattr(config, variant) if variant else None,
            "torch": torch.__version__,
        }
        figures = {"seconds": medians, "step_seconds": steps, "flops": flops, "floor_seconds": floor}
        args.json.write_text(json.dumps({**about, "device": args.device, **figures}, indent=2))


def format_steps(seconds: dict[str, float], count: int, floor: float) -> str:
    """Markdown: each contender's whole step, against the last, and what `count` of them take."""
    slowest = seconds.get("reference", max(seconds.values()))
    lines = [
        f"| whole step | ms | ratio to reference | {count:,} steps | share of floor |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, step in seconds.items():
        total = f"{count * step / 60:,.1f} min" if count * step < 7200 else f"{count * step / 3600:,.1f} h"
        lines.append(f"| {name} | {1e3 * step:.3g} | {slowest / step:.2f}x | {total} | {floor / step:.1%} |")
    return "\n".join(lines)


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
