"""The one training loop, for every method, on Lightning Fabric.

What a run leaves behind, all under `RunOptions.out`:

    config.json            method, preset, every config field, data, run options, seed, versions, git revision
    metrics.csv            the curve: one row every `log_every` steps, bit for bit the same after a resume
    tensorboard/           the same curve, with rates, and the pictures
    checkpoints/step-*.pt  model, optimiser, schedule, RNG, data position; the newest `keep` of them
    pictures/step-*.png    sample pictures
    start.pt               what the method made ready before the first step, where it does: weights, a teacher
    results.json           what training and the evaluations came to

Determinism: batch `s` is a function of (seed, s) alone, drawn and augmented under an RNG seeded by (seed, s,
rank), whichever process fetches it; everything random in the network draws from the global generators, whose
states are in the checkpoint. So a resumed run repeats an uninterrupted one bit for bit on CPU.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, default_collate

from .cuda_graph import CudaCapture, GraphedGradient
from .methods import Method, get_method
from .methods.base import DataSpec, TrainConfig
from .runs import (
    CHECKPOINT_FORMAT,
    MetricsFile,
    config_to_json,
    git_revision,
    list_checkpoints,
    newest_checkpoint,
    read_start,
    save_checkpoint,
    save_start,
    update_results,
    versions,
    write_json,
    write_whole,
)

_QUIET_SECONDS = 15.0
"""how often a run without a terminal prints a line"""


@dataclass(frozen=True)
class RunOptions:
    """How and where to train: nothing here is part of the method."""

    out: Path
    """run folder: config, metrics, checkpoints, pictures and the report go here"""
    seed: int = 0
    """seed of the weights, the data order and everything random"""
    precision: Literal["32", "bf16-mixed"] = "32"
    """float32, or bfloat16 autocast with float32 weights"""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """device to train on; auto takes a GPU if there is one"""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """replay each step's loss and gradient from a CUDA graph; auto does on one GPU where the method can"""
    workers: int = -1
    """processes that prepare batches ahead on each rank; 0 = none, -1 = 4 on a GPU and none on CPU"""
    log_every: int = 10
    """steps between two rows of metrics"""
    checkpoint_every: int = 500
    """steps between two checkpoints"""
    keep: int = 3
    """checkpoints kept"""
    picture_every: int = 500
    """steps between two sample pictures; 0 = none"""
    max_skipped: int = 20
    """stop after this many steps in a row with a non-finite loss or gradient"""
    resume: bool = False
    """go on from the newest checkpoint in the run folder"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        lowest = {"seed": 0, "workers": -1, "log_every": 1, "checkpoint_every": 1, "keep": 1}
        for name, least in (lowest | {"picture_every": 0, "max_skipped": 1}).items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        choices = {
            "precision": ("32", "bf16-mixed"),
            "accelerator": ("auto", "cpu", "cuda"),
            "cuda_graph": ("auto", "on", "off"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient was not finite for too many steps in a row."""


class TrainingInterruptedError(RuntimeError):
    """A signal asked training to stop; a checkpoint of the last whole step was written."""


# --------------------------------------------------------------------------------------------------
# Rows over ranks


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # type: ignore[override]
        world = dist.get_world_size()
        count = torch.tensor([rows.shape[0], -rows.shape[0]], device=rows.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        most, least = count[0].item(), -count[1].item()
        if most != least:
            raise ValueError(f"rows must be equally many on every rank, got {least} to {most}")
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """All ranks' rows [B, ...] in rank order, from this rank's rows [b, ...]; itself where there is one rank.

    The gradient of a rank's rows is the sum of what every rank's loss asks of them. Each rank computing the
    same loss of the gathered batch, the data-parallel average over ranks is then the gradient that one rank
    with the whole batch would have. ValueError where ranks hold different numbers of rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


# --------------------------------------------------------------------------------------------------
# Random numbers


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, in plain containers and tensors."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `rng_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _seed_all(*entropy: int, device: torch.device | None = None) -> None:
    word = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(word)
    np.random.seed(word)
    # torch.manual_seed would reseed every GPU too, which fetching a batch must not do
    torch.default_generator.manual_seed(word)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(word)


@contextmanager
def _own_rng(*entropy: int, device: torch.device | None = None) -> Iterator[None]:
    """Run the body under generators seeded by `entropy`, and leave the global ones as they were."""
    kept = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    cuda = torch.cuda.get_rng_state(device) if device is not None and device.type == "cuda" else None
    _seed_all(*entropy, device=device)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
        if cuda is not None and device is not None:
            torch.cuda.set_rng_state(cuda, device)


# --------------------------------------------------------------------------------------------------
# Data order


class BatchOrder:
    """Which samples make batch `step`: a shuffle each epoch by (seed, epoch), the last part batch dropped.

    Being a function of the step, it has no state: the data position in a checkpoint is the step.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if length < batch_size:
            raise ValueError(f"batch_size must be at most the number of samples, {length}, got {batch_size}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.batches_per_epoch = length // batch_size
        self._epoch = -1
        self._shuffled = np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> list[int]:
        """Indices of batch `step` (from 0), over all ranks."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._shuffled = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            self._epoch = epoch
        start = position * self.batch_size
        return self._shuffled[start : start + self.batch_size].tolist()


class _RankBatches(Dataset):
    """Item `step` is this rank's share of batch `step`, drawn under an RNG of its own."""

    def __init__(self, samples: Dataset, order: BatchOrder, rank: int, world: int) -> None:
        if order.batch_size % world:
            raise ValueError(
                f"batch_size must divide equally over the ranks, got {order.batch_size} over {world}"
            )
        self.samples, self.order, self.rank = samples, order, rank
        self.rows = order.batch_size // world

    def __getitem__(self, step: int) -> Any:
        mine = self.order.indices(step)[self.rank * self.rows : (self.rank + 1) * self.rows]
        with _own_rng(self.order.seed, step, self.rank):
            ready_made = getattr(self.samples, "__getitems__", None)
            return ready_made(mine) if ready_made else default_collate([self.samples[i] for i in mine])


class _DeviceBatches:
    """A loader's batches on the device, the next one on its way there while the last is computed with."""

    def __init__(self, batches: Iterable[Any], to_device: Callable[[Any], Any], device: torch.device) -> None:
        self._batches, self._to_device, self.device = iter(batches), to_device, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: list[Any] = []

    def prefetch(self) -> None:
        """Take the next batch and start its copy, once; called while the GPU computes."""
        if not self._ahead:
            with torch.cuda.stream(self._stream):  # without one: no change of stream
                self._ahead = [self._to_device(batch) for batch in itertools.islice(self._batches, 1)]

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.prefetch()
            if not self._ahead:
                return
            batch = self._ahead.pop()
            if self._stream is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_stream(self._stream)
                for leaf in tree_leaves(batch):
                    if isinstance(leaf, Tensor):
                        leaf.record_stream(current)  # or the next copy might take its memory too early
            yield batch


# --------------------------------------------------------------------------------------------------
# Pictures


def picture_grid(pictures: Mapping[str, Tensor], least_side: int = 112) -> np.ndarray:
    """One uint8 image [H, W, 3] of captioned rows: ink [n, H, W] dark on white, colour [n, 3, H, W] as is."""
    from PIL import Image, ImageDraw, ImageFont

    gap, caption = 6, 22
    rows: list[np.ndarray] = []
    for title, images in pictures.items():
        pixels = images.detach().float().cpu().clamp(0, 1).nan_to_num(0.0)
        colour = pixels if pixels.ndim == 4 else (1 - pixels)[:, None].expand(-1, 3, -1, -1)
        scale = max(1, -(-least_side // max(colour.shape[-2:])))
        tiles = colour.repeat_interleave(scale, -1).repeat_interleave(scale, -2).permute(0, 2, 3, 1)
        framed = torch.nn.functional.pad(tiles, (0, 0, gap // 2, gap // 2, gap // 2, gap // 2), value=0.92)
        strip = torch.cat(list(framed), dim=1).mul(255).round().to(torch.uint8).numpy()
        label = Image.new("RGB", (strip.shape[1], caption), (235, 235, 235))
        ImageDraw.Draw(label).text((gap, 3), title, fill=(60, 60, 60), font=ImageFont.load_default(14))
        rows += [np.asarray(label), strip]
    width = max(row.shape[1] for row in rows)
    return np.concatenate(
        [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=235) for row in rows]
    )


# --------------------------------------------------------------------------------------------------
# Progress


class _Progress:
    """A bar with loss, rate and time left on a terminal; elsewhere a line now and then."""

    def __init__(self, first: int, total: int, show: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.first, self.total, self.show = first, total, show
        self.began = self.printed = time.monotonic()
        console = Console(stderr=True)
        self.bar = None
        if show and console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self.bar.start()
            self.task = self.bar.add_task("", total=total, completed=first, text="")

    def update(self, step: int, loss: float, skipped: int) -> None:
        now = time.monotonic()
        rate = (step - self.first) / max(now - self.began, 1e-9)
        text = f"loss {loss:.4f}  {rate:.1f} steps/s" + (f"  {skipped} skipped" if skipped else "")
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
        elif self.show and (now - self.printed >= _QUIET_SECONDS or step == self.total):
            left = time.strftime("%H:%M:%S", time.gmtime((self.total - step) / max(rate, 1e-9)))
            print(f"step {step}/{self.total}  {text}  {left} left", file=sys.stderr, flush=True)
            self.printed = now

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


class _StopSignals(AbstractContextManager["_StopSignals"]):
    """SIGINT and SIGTERM ask for a stop after the step in hand; a second one acts as it always did."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(number, self._before[number])

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------
# The loop


@dataclass
class TrainSummary:
    """What a run came to; also under "training" in results.json."""

    step: int
    """steps done, skipped ones included"""
    skipped_steps: int
    """steps whose loss or gradient was not finite"""
    skipped_files: int | None
    """files the reader passed over, None where the data set does not say"""
    samples: int
    """samples in the training set"""
    seconds: float
    """wall-clock seconds in the loop, over all its resumes"""
    last: dict[str, float]
    """the last step's metrics"""


def train(
    name: str, config: TrainConfig, data: DataSpec, options: RunOptions, *, preset: str = "paper"
) -> TrainSummary:
    """Train the method called `name`; `options.out` is the run folder (see the module's docstring).

    Under torchrun each process calls this with the same arguments. ValueError for an unknown method, a folder
    that already holds a run (or, to resume, holds none or another), data too small for the batch, or a batch
    that does not split equally over the ranks. TrainingDivergedError after `options.max_skipped` steps in a
    row with a non-finite loss or gradient, TrainingInterruptedError once SIGINT or SIGTERM was heeded and a
    checkpoint written.
    """
    kind = get_method(name)
    found = _check_folder(options)
    if options.accelerator == "cpu" or not torch.cuda.is_available():
        spread_pool()
    fabric = _launch(options, None if found is None else found[1]["step"] + 1)
    loop = _Loop(fabric, kind, name, preset, config, data, options)
    if found is not None:
        loop.check_same(*found)
    loop.make_ready()
    if found is not None:
        loop.restore(*found)
    fabric.barrier()
    return loop.run()


def spread_pool() -> None:
    """Keep the CPU workers of torch's thread pool off one core; before the first parallel operation only.

    A worker that wakes on the core of the thread that spins for it costs that thread's whole time slice.
    """
    if not hasattr(os, "sched_setaffinity") or torch.get_num_threads() < 2:
        return
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        return
    try:
        os.sched_setaffinity(0, cores - {min(cores)})
        torch.ones(1 << 20).add_(1)  # starts the workers, which inherit the mask
    finally:
        os.sched_setaffinity(0, cores)


def _check_folder(options: RunOptions) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, None to begin."""
    has_config = (options.out / "config.json").exists()
    if not options.resume:
        if list_checkpoints(options.out / "checkpoints"):
            way_on = "resume it (--resume)" if has_config else "config.json is gone, put it back"
            raise ValueError(f"{options.out} already holds a run: {way_on} or choose another folder")
        return None
    if not has_config:
        raise ValueError(f"{options.out} holds no run to resume: config.json is not there")
    return newest_checkpoint(options.out / "checkpoints")


def _launch(options: RunOptions, purge_step: int | None) -> Any:
    """Fabric over torchrun's processes, or this one; TensorBoard hides what it has from `purge_step` on."""
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import TensorBoardLogger

    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("WORLD_SIZE", 1))
    if options.accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("accelerator must be one this machine has, got 'cuda' and torch finds no GPU")
    fabric = Fabric(
        accelerator=options.accelerator,
        devices=local,
        num_nodes=world // local,
        strategy="ddp" if world > 1 else "auto",
        precision="32-true" if options.precision == "32" else options.precision,
        loggers=TensorBoardLogger(options.out, name="tensorboard", version="", purge_step=purge_step),
    )
    if options.precision == "bf16-mixed":
        # Fabric would round the batch itself to bfloat16, and a drawing's offsets to a digit or two
        fabric.strategy.precision.convert_input = lambda data: data  # type: ignore[method-assign]
    fabric.launch()
    return fabric


#: fields of the config that a resumed run may have otherwise
_MAY_CHANGE = ("steps", "impl")


class _NotFiniteError(Exception):
    """A loss or gradient of this step is not finite on some rank."""


class _Passes:
    """`base.Passes` over one batch, and what it takes to undo them."""

    def __init__(self, loop: _Loop, batch: Any, stop: bool) -> None:
        self.loop, self.batch, self.stop = loop, batch, stop
        #: read from the device at each descent
        self.losses: dict[str, float] = {}
        self.norms: dict[str, float] = {}
        self._unread: list[dict[str, Tensor]] = []
        self._passes = 0
        # batch statistics see a bad batch: an average that has taken in a NaN never loses it
        self._buffers = [buffer.clone() for buffer in loop.method.buffers()]
        self._undo: list[tuple[int, dict[str, Any], list[Tensor]]] = []

    def gradient(self, **options: Any) -> dict[str, Tensor]:
        loop = self.loop
        counted = [] if self._passes == 0 else [buffer.clone() for buffer in loop.method.buffers()]
        self._passes += 1
        values = (loop.graphed or loop.gradient)(self.batch, loop.step, **options)
        if counted:
            self._put_back(loop.method.buffers(), counted)
        self._unread.append(values)
        return values

    def descend(self, optimizer: int = 0, *, more: bool = False) -> None:
        loop = self.loop
        norm = torch.nn.utils.get_total_norm([p.grad for p in loop.method.parameters() if p.grad is not None])
        if not self._read(norm, "grad_norm" if optimizer == 0 else f"grad_norm_{optimizer}"):
            raise _NotFiniteError
        if more:
            state = copy.deepcopy(loop.optimizers[optimizer].state_dict())
            self._undo.append((optimizer, state, [p.detach().clone() for p in loop.method.parameters()]))
        loop.clip(norm)
        loop.optimizers[optimizer].step()

    def undo(self) -> None:
        """Weights, buffers and optimisers as they were before the step."""
        for optimizer, state, parameters in reversed(self._undo):
            self._put_back(self.loop.method.parameters(), parameters)
            self.loop.optimizers[optimizer].load_state_dict(state)
        self._put_back(self.loop.method.buffers(), self._buffers)

    def _read(self, norm: Tensor, norm_name: str) -> bool:
        """Read losses and norm in one go; whether they are finite on every rank."""
        passes, self._unread = self._unread, []
        named = [item for losses in passes for item in losses.items()]
        device = self.loop.device
        tensors = [value.to(device, torch.float32) for value in (*(v for _, v in named), norm)]
        together = torch.stack(tensors)
        self.loop.stream.prefetch()
        *numbers, self.norms[norm_name] = together.tolist()  # waits for the GPU
        bad = not math.isfinite(self.norms[norm_name])
        for (name, _), number in zip(named, numbers, strict=True):
            self.losses.setdefault(name, number)
            bad |= name == "loss" and not math.isfinite(number)
        bad, self.stop = self.loop.any_rank(bad, self.stop)
        return not bad

    @staticmethod
    def _put_back(tensors: Iterable[Tensor], before: list[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


class _Loop:
    def __init__(
        self,
        fabric: Any,
        kind: type[Method],
        name: str,
        preset: str,
        config: TrainConfig,
        data: DataSpec,
        options: RunOptions,
    ) -> None:
        self.fabric, self.config, self.options = fabric, config, options
        self.device: torch.device = fabric.device
        _seed_all(options.seed, device=self.device)
        self.method = kind(config)
        captures = self._is_captured(name)
        samples = self.method.train_data(data)
        self.samples = len(samples)  # type: ignore[arg-type]
        skipped = getattr(samples, "skipped", None)  # a count, or counts by reason
        self.skipped_files: int | None = sum(skipped.values()) if isinstance(skipped, Mapping) else skipped
        #: a resumed run must find this unchanged
        self.data_identity = {
            "data": data.name,
            "data_fingerprint": getattr(samples, "fingerprint", None),
            "samples": self.samples,
            "seed": options.seed,
        }
        order = BatchOrder(self.samples, config.batch_size, options.seed)
        self.batches = _RankBatches(samples, order, fabric.global_rank, fabric.world_size)
        self.settings = {
            "method": name,
            "preset": preset,
            "config": config_to_json(config),
            "data": {"name": data.name, "root": None if data.root is None else str(data.root)},
            "run": {
                f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name != "resume"
            },
            "world_size": fabric.world_size,
            "parameters": sum(p.numel() for p in self.method.parameters()),
            "cuda_graph": captures,
            "versions": versions(),
            "git": git_revision(),
        }
        if fabric.world_size > 1:
            self.method.gather_rows = gather_rows
        optimizers, schedules = self.method.optimizer()
        #: checkpoints hold one state or a list of them, as the method has one optimiser or a list
        self.several = isinstance(optimizers, list)
        self.schedules = [s for s in (schedules if self.several else [schedules]) if s is not None]
        optimizers = optimizers if self.several else [optimizers]
        self.module, *self.optimizers = fabric.setup(self.method, *optimizers)
        self.module.mark_forward_method("loss")
        #: `gradient` by replays of a CUDA graph
        self.graphed: GraphedGradient | None = None
        if captures:
            self.graphed = GraphedGradient(self.method, self.gradient, CudaCapture(self.device))
        # each rank draws its own noise from here on
        _seed_all(options.seed, fabric.global_rank, device=self.device)
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.seconds = 0.0
        self.last: dict[str, float] = {}

    def _is_captured(self, name: str) -> bool:
        """Whether steps are replayed from a CUDA graph; ValueError where they must be and cannot."""
        wish, reason = self.options.cuda_graph, ""
        if wish == "off":
            return False
        if not CudaCapture.works_on(self.device):
            reason = f"training is on {self.device.type}"
        elif self.fabric.world_size > 1:  # the reduction over ranks would have to be captured too
            reason = f"training is on {self.fabric.world_size} ranks"
        elif self.method.graph_key(0) is None:
            reason = f"a step of {name} with these settings cannot be captured"
        if reason and wish == "on":
            raise ValueError(f"cuda_graph must be auto or off where {reason}, got 'on'")
        return not reason

    def make_ready(self) -> None:
        """Let the method prepare what it trains from, once a run; later ranks and resumes take the file."""
        if type(self.method).before_training is Method.before_training:
            return
        identity = {"method": self.settings["method"], **self.settings["config"], **self.data_identity}
        identity = {key: value for key, value in identity.items() if key not in _MAY_CHANGE}
        with self.fabric.rank_zero_first(), _own_rng(self.options.seed, device=self.device):
            start = read_start(self.options.out, identity)
            if start is None and (start := self.method.before_training()) is not None:
                save_start(self.options.out, start, identity)
                start = read_start(self.options.out, identity)  # on CPU, and as every later reader has it
            if start is not None:
                self.method.start_from(start)
        if start is not None and "about" in start and self.fabric.is_global_zero:
            self.settings["start"] = start["about"]
            print(start["about"], file=sys.stderr, flush=True)

    # state -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that the run's future depends on; every rank calls it."""
        rng = [rng_state(self.device)]
        if self.fabric.world_size > 1:
            rng = [{}] * self.fabric.world_size
            dist.all_gather_object(rng, rng_state(self.device))
        return {
            "format": CHECKPOINT_FORMAT,
            "step": self.step,
            "method": self.settings["method"],
            "config": self.settings["config"],
            "data": self.data_identity,
            "model": self.method.state_dict(),
            "optimizer": self._one_or_list([o.state_dict() for o in self.optimizers]),
            "schedule": self._one_or_list([s.state_dict() for s in self.schedules]),
            "rng": rng,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "seconds": self.seconds,
            "last": self.last,
        }

    def _one_or_list(self, states: list[Any]) -> Any:
        return states if self.several else next(iter(states), None)

    def restore(self, path: Path, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.method.load_state_dict(state["model"])
        for kind, parts in (("optimizer", self.optimizers), ("schedule", self.schedules)):
            for part, saved in zip(parts, state[kind] if self.several else [state[kind]], strict=False):
                part.load_state_dict(saved)
        self.step, self.skipped = state["step"], state["skipped"]
        self.skipped_in_a_row, self.seconds = state["skipped_in_a_row"], state["seconds"]
        self.last = dict(state["last"])
        if len(state["rng"]) == self.fabric.world_size:
            set_rng_state(state["rng"][self.fabric.global_rank], self.device)
        else:
            _seed_all(self.options.seed, self.fabric.global_rank, self.step, device=self.device)
            warnings.warn(
                f"the run was on {len(state['rng'])} ranks and goes on on {self.fabric.world_size}: "
                "its random numbers start afresh from here",
                RuntimeWarning,
                stacklevel=2,
            )
        if self.fabric.is_global_zero:
            for later in list_checkpoints(path.parent):
                if later.name > path.name:  # damaged: out of the way, or `keep` would count it
                    os.replace(later, later.with_name(later.name + ".damaged"))

    def check_same(self, path: Path, state: Mapping[str, Any]) -> None:
        """ValueError unless `state` is of this run."""
        now = {"method": self.settings["method"], **self.settings["config"]}
        # a field that is newer than the checkpoint stood at what is its default now
        then = {"method": state["method"], **config_to_json(type(self.config)()), **state["config"]}
        now |= self.data_identity
        then |= state["data"]
        changed = [
            f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
            for key in dict.fromkeys([*then, *now])
            if key not in _MAY_CHANGE and then.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(f"{path} is of another run: {'; '.join(changed)}")

    # steps -----------------------------------------------------------------------------------------------

    def run(self) -> TrainSummary:
        self._open_folder()
        self.stream = self._batches_ahead()
        progress = _Progress(self.step, self.config.steps, self.fabric.is_global_zero)
        self.module.train()
        try:
            with _StopSignals() as signals:
                began = time.monotonic() - self.seconds
                for batch in self.stream:
                    stop = self._step(batch, signals.asked)
                    self.seconds = time.monotonic() - began
                    progress.update(self.step, self.last["loss"], self.skipped)
                    self._after_step(stop)
        finally:
            progress.close()
            self._close_folder()
        return self.summary()

    def summary(self) -> TrainSummary:
        return TrainSummary(
            self.step, self.skipped, self.skipped_files, self.samples, round(self.seconds, 3), self.last
        )

    def _batches_ahead(self) -> _DeviceBatches:
        """This rank's batches from the data position on, on the device."""
        workers = self.options.workers
        if workers < 0:
            workers = 4 if self.device.type == "cuda" else 0
        loader: DataLoader[Any] = DataLoader(
            self.batches,
            sampler=range(self.step, self.config.steps),
            batch_size=None,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else the loader draws its seed from the run's own generator
            prefetch_factor=4 if workers else None,
        )
        return _DeviceBatches(loader, self.fabric.to_device, self.device)

    def gradient(self, batch: Any, step: int, **options: Any) -> dict[str, Tensor]:
        """The losses, detached, and their gradient in `.grad`; what a CUDA graph captures."""
        self.method.zero_grad(set_to_none=True)
        with self.fabric.autocast():  # on one rank Fabric calls `loss` without it
            losses = self.module.loss(batch, step, **options)
        self.fabric.backward(losses["loss"])
        return {name: value.detach() for name, value in losses.items()}

    def _step(self, batch: Any, stop: bool) -> bool:
        """One training step, skipped where a loss or gradient is not finite; True if any rank is to stop."""
        passes = _Passes(self, batch, stop)
        try:
            self.method.update(passes)
            self.skipped_in_a_row = 0
        except _NotFiniteError:
            passes.undo()
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        rate = self.optimizers[0].param_groups[0]["lr"]
        with warnings.catch_warnings():  # a skipped first step is no mistake in the order of calls
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for schedule in self.schedules:
                schedule.step()
        self.step += 1
        self.last = {
            **passes.losses,
            **passes.norms,
            "learning_rate": rate,
            "skipped": float(self.skipped),
        }
        return passes.stop

    def clip(self, norm: Tensor) -> None:
        parameters = list(self.method.parameters())
        if self.config.clip_value > 0:
            torch.nn.utils.clip_grad_value_(parameters, self.config.clip_value)
        if self.config.clip_norm > 0:
            if self.config.clip_value > 0:
                norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, norm)

    def any_rank(self, *flags: bool) -> list[bool]:
        """Each flag, True where it is True on any rank: all ranks skip and stop together."""
        if self.fabric.world_size == 1:
            return list(flags)
        shared = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in shared.tolist()]

    def _after_step(self, stop: bool) -> None:
        """Logs, pictures, checkpoint, and the ways to end early; in the order that a resume repeats."""
        options, done = self.options, self.step == self.config.steps
        if self.step % options.log_every == 0 or self.step == 1 or done:
            self._log()
        if self.skipped_in_a_row >= options.max_skipped:
            raise TrainingDivergedError(
                f"training stopped at step {self.step}: loss or gradient was not finite for "
                f"{self.skipped_in_a_row} steps in a row (loss {self.last['loss']}, gradient norm "
                f"{self.last['grad_norm']}); a lower learning rate or gradient clipping may help"
            )
        if options.picture_every and (self.step % options.picture_every == 0 or done):
            self._draw()
        if self.step % options.checkpoint_every == 0 or done or stop:
            self._save()
        if stop and not done:
            raise TrainingInterruptedError(
                f"stopped at step {self.step}, checkpoint written; --resume goes on"
            )

    # what is written -------------------------------------------------------------------------------------

    def _open_folder(self) -> None:
        if not self.fabric.is_global_zero:
            return
        out = self.options.out
        for folder in (out / "checkpoints", out / "pictures"):
            folder.mkdir(parents=True, exist_ok=True)
        for leftover in (out / "checkpoints").glob("*.tmp"):
            leftover.unlink()
        write_json(out / "config.json", self.settings)
        self.metrics = MetricsFile(out / "metrics.csv", self.step)

    def _close_folder(self) -> None:
        if self.fabric.is_global_zero:
            self.metrics.close()
            self.fabric.logger.finalize("")
            update_results(self.options.out, "training", dataclasses.asdict(self.summary()))

    def _log(self) -> None:
        values = self.last
        if self.fabric.world_size > 1:  # the mean over ranks is the whole batch's
            shared = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
            dist.all_reduce(shared)
            values = dict(zip(values, (shared / self.fabric.world_size).tolist(), strict=True))
        if self.fabric.is_global_zero:
            self.metrics.write(self.step, values)
            self.fabric.log_dict({**values, "hours": self.seconds / 3600}, step=self.step)

    def _draw(self) -> None:
        """Pictures of the first batch's samples, the same ones each time; they touch no run state."""
        if not self.fabric.is_global_zero:
            return
        autocast = self.fabric.autocast() if self.options.precision != "32" else nullcontext()
        self.method.eval()
        with torch.no_grad(), _own_rng(self.options.seed, self.step, device=self.device), autocast:
            pictures = self.method.pictures(self.fabric.to_device(self.batches[0]))
        self.module.train()
        if not pictures:
            return
        from PIL import Image

        grid = picture_grid(pictures)
        path = self.options.out / "pictures" / f"step-{self.step:09d}.png"
        write_whole(path, lambda file: Image.fromarray(grid).save(file, format="png"))
        self.fabric.logger.experiment.add_image("samples", grid, self.step, dataformats="HWC")

    def _save(self) -> None:
        state = self.state()
        if self.fabric.is_global_zero:
            self.metrics.sync()
            save_checkpoint(state, self.options.out / "checkpoints", self.options.keep)
        self.fabric.barrier()
