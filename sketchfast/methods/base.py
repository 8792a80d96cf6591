"""What the loop and the command line ask of a method: all of it is here, nothing else is assumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
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


def _own_rows(rows: Tensor) -> Tensor:
    """One rank's batch is the global batch: `gather_rows` where there is nothing to gather."""
    return rows


class Method(nn.Module):
    """A published method: its network, its loss and its paper's protocols.

    A subclass is built from its config alone; parameters and buffers hold all that training changes.
    """

    Config: ClassVar[type[TrainConfig]]
    #: `embed` takes RGB images as they are, sketches dark on white; else ink alone, ink = 1
    takes_colour: ClassVar[bool] = False
    #: protocol name -> function(method, untrained, data, **flags) -> tables; `untrained` has the same
    #: config and fresh weights, so that each table carries its own baseline
    protocols: ClassVar[dict[str, Callable[..., list[Table]]]] = {}

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        #: a loss over the global batch calls this on its rows [b, ...] and gets all ranks' rows [B, ...],
        #: with gradient; the loop puts `train.gather_rows` here when it runs over ranks
        self.gather_rows: Callable[[Tensor], Tensor] = _own_rows

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

    def optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]:
        """The paper's optimiser and, stepped once a training step, its schedule."""
        raise NotImplementedError

    def pictures(self, batch: Any, count: int = 8) -> dict[str, Tensor]:
        """Pictures of a batch: caption -> images [n, H, W] in [0, 1], ink = 1; the i-th of each match."""
        return {}

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of images in [0, 1]: ink [B, C, H, W], or RGB [B, 3, H, W] if `takes_colour`."""
        raise NotImplementedError

    def draw(self, images: Tensor, *, temperature: float = 0.0, seed: int = 0) -> list[Any]:
        """Sketches drawn from images [B, C, H, W]; temperature 0 takes the most likely point each time."""
        raise NotImplementedError
