"""What the loop and the command line ask of a method: all of it is here, nothing else is assumed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..ops._contract import check_integer, check_number

PRESETS = ("paper", "small", "tiny")


@dataclass(frozen=True)
class TrainConfig:
    """What every method's training needs; a method's config dataclass derives from it and adds its own.

    Each field is a command-line flag; the docstring under a field is its help text.
    """

    steps: int = 300_000
    """optimiser steps"""
    batch_size: int = 256
    """samples a step, over all ranks"""
    learning_rate: float = 1e-3
    """initial learning rate"""
    clip_value: float = 0.0
    """clip each gradient element to +-this; 0 turns it off"""
    clip_norm: float = 0.0
    """clip the gradient's norm to this; 0 turns it off"""
    impl: str = "auto"
    """implementation of the kernels: auto, native, triton or reference"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            check_integer(name, getattr(self, name), 1)
        check_number("learning_rate", self.learning_rate, above=0)
        for name in ("clip_value", "clip_norm"):
            check_number(name, getattr(self, name), at_least=0)


@dataclass(frozen=True)
class DataSpec:
    """Which data set: a reader's name and, but for `procedural`, the folder or zip that holds it."""

    name: str = "procedural"
    root: Path | None = None


@dataclass
class Table:
    """One table of results: rows of plain values, printed, written as JSON and shown in the report."""

    title: str
    rows: list[dict[str, Any]]
    note: str = ""
    pictures: dict[str, bytes] = field(default_factory=dict)
    """caption -> PNG, written into the run folder and shown under the table"""


class Passes(Protocol):
    """What the loop lends to `Method.update` for one training step: passes over the same batch.

    Whatever it does with them, the step counts as one and is atomic: where a loss or gradient is not finite
    on any rank, `descend` does not return, and weights, buffers and optimisers are as before the step.
    """

    def gradient(self, **options: Any) -> dict[str, Tensor]:
        """`Method.loss(batch, step, **options)` at the weights as they are now, and its values, detached.

        Puts the gradient of `loss`, averaged over the ranks, into every parameter's `.grad`. Running
        statistics take in the step's first pass only. A value is logged under its name by the first pass of
        the step that has one of that name.
        """

    def descend(self, optimizer: int = 0, *, more: bool = False) -> None:
        """Clip what stands in `.grad`, and take a step of that one of the optimisers.

        `more`: another pass follows in this training step, so that this one may yet have to be undone.
        """


def _own_rows(rows: Tensor) -> Tensor:
    """One rank's batch is the global batch: `gather_rows` where there is nothing to gather."""
    return rows


def sized_rgb(images: Tensor, side: int) -> Tensor:
    """RGB images [B, 3, H, W] in [0, 1] at [B, 3, side, side]; TypeError or ValueError for others."""
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}")
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape [B, 3, H, W], got {tuple(images.shape)}")
    if images.shape[2:] == (side, side):
        return images
    return nn.functional.interpolate(images, (side, side), mode="bilinear", antialias=True)


class Method(nn.Module):
    """A published method: its network, its loss and its paper's protocols.

    A subclass is built from its config alone; parameters and buffers hold all that training changes.
    """

    Config: ClassVar[type[TrainConfig]]
    #: `embed` takes RGB images as they are, sketches dark on white; else ink alone, ink = 1
    takes_colour: bool = False
    #: protocol name -> function(method, untrained, data, **flags) -> tables; `untrained` has the same
    #: config and fresh weights, or those the run started from where it kept them (`before_training`), so
    #: that each table carries its own baseline. A keyword-only argument is a flag; one annotated
    #: `Method | None` is on the command line the folder of another run, `tuple[Method, ...]` of several
    protocols: ClassVar[dict[str, Callable[..., list[Table]]]] = {}

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        #: name of the data set the weights were trained on, where `runs.load_method` knows it
        self.trained_on: str | None = None
        #: a loss over the global batch calls this on its rows [b, ...] and gets all ranks' rows [B, ...],
        #: with gradient; the loop puts `train.gather_rows` here when it runs over ranks
        self.gather_rows: Callable[[Tensor], Tensor] = _own_rows
        #: what `scheduled` returns in a CUDA graph; the loop puts it here while it captures one
        self.held_schedule: dict[str, Tensor] | None = None

    @classmethod
    def preset(cls, name: str) -> TrainConfig:
        """The config of the preset `name`: paper, small or tiny."""
        raise NotImplementedError

    def train_data(self, data: DataSpec) -> torch.utils.data.Dataset:
        """A map-style data set; its `__getitems__(indices)`, where it has one, returns a batch ready made.

        Its `skipped`, where it has one, counts what was left out (an int, or by reason). Its `fingerprint` is
        a string that another data set does not share: by it a resumed run knows its data again.
        """
        raise NotImplementedError

    def loss(self, batch: Any, step: int) -> dict[str, Tensor]:
        """The batch's losses: `loss` is the one to minimise, the others are logged beside it."""
        raise NotImplementedError

    def schedule(self, step: int) -> dict[str, float]:
        """What `loss` takes from the number of the step, by name; it reads it from `scheduled`."""
        return {}

    def scheduled(self, step: int) -> dict[str, Tensor]:
        """`schedule(step)` as float32 scalars on the parameters' device.

        In a CUDA graph they are the same scalars at each replay, written anew before it.
        """
        if self.held_schedule is not None:
            return self.held_schedule
        device = next(self.parameters()).device
        return {name: torch.full((), value, device=device) for name, value in self.schedule(step).items()}

    def graph_key(self, step: int) -> Hashable:
        """All that `loss` decides on the host at `step`; None where it cannot be captured in a CUDA graph.

        Each new key is captured once and replayed after. A method that gives one promises that its `loss`
        * takes from `step` nothing but this key and what is in `scheduled(step)`,
        * waits for no value on the device and sends none there, and returns scalars on the device,
        * changes tensors in place alone, and draws random numbers from torch's generator on the device.
        """
        return None

    def optimizer(self) -> tuple[Any, Any]:
        """The paper's optimiser and, stepped once a training step, its schedule or None.

        A method whose `update` takes several returns two lists of equal length.
        """
        raise NotImplementedError

    def update(self, passes: Passes) -> None:
        """One training step: one gradient, one descent. Methods that nest or alternate losses override it."""
        passes.gradient()
        passes.descend()

    def before_training(self) -> dict[str, Any] | None:
        """What has to be computed once before the first step, as plain containers of tensors; None: nothing.

        Called after `train_data`, with the network on its device, by one rank alone and not on a resume: the
        result is kept as start.pt in the run folder, and every rank's `start_from` gets it, then and on each
        resume. A value under "state_dict" makes start.pt a file of weights that timm reads; "about" is a line
        of text to be shown.
        """
        return None

    def start_from(self, start: dict[str, Any]) -> None:
        """Take over what `before_training` returned, its tensors on CPU; must draw no random numbers."""

    def pictures(self, batch: Any, count: int = 8) -> dict[str, Tensor]:
        """Pictures of a batch: caption -> images [n, H, W] in [0, 1], ink = 1; the i-th of each match."""
        return {}

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of images in [0, 1]: ink [B, C, H, W], or RGB [B, 3, H, W] if `takes_colour`."""
        raise NotImplementedError

    def draw(self, images: Tensor, *, temperature: float = 0.0, seed: int = 0) -> list[Any]:
        """Sketches drawn from images [B, C, H, W]; temperature 0 takes the most likely point each time."""
        raise NotImplementedError


def embed_images(method: Method, images: NDArray[np.uint8], batch_size: int = 256) -> NDArray[np.float32]:
    """Embeddings [N, D] of images [N, H, W, 3] by a method that takes colour, in evaluation mode."""
    device, training = next(method.parameters()).device, method.training
    method.eval()
    parts = [
        method.embed(as_tensor(images[start : start + batch_size]).to(device).float() / 255).float().cpu()
        for start in range(0, len(images), batch_size)
    ]
    method.train(training)
    return torch.cat(parts).numpy()


def as_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Images [B, H, W, 3] as a tensor [B, 3, H, W] of their own memory order (channels last)."""
    return torch.from_numpy(np.require(images, requirements=["C", "W"])).permute(0, 3, 1, 2)


def different_settings(config: TrainConfig, paper: TrainConfig, told: Collection[str]) -> list[str]:
    """Each field of `config` in which it differs from `paper`, but for those in `told`."""
    return [
        f"{f.name} {getattr(config, f.name)} (default {getattr(paper, f.name)})"
        for f in fields(config)
        if f.name not in told and getattr(config, f.name) != getattr(paper, f.name)
    ]
