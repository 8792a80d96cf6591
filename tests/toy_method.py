"""A method that trains in a moment, with all the loop must carry: noise, batch statistics, a schedule."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sketchfast.methods
from sketchfast.methods.base import DataSpec, Method, Passes, Table, TrainConfig


@dataclass(frozen=True)
class ToyConfig(TrainConfig):
    """A regression of a sum."""

    steps: int = 30
    batch_size: int = 8
    learning_rate: float = 1e-2
    image_size: int = 8
    """side of the images, in pixels"""
    samples: int = 50
    """samples in the training set"""
    noise: float = 0.1
    """standard deviation of the noise on the hidden units"""
    widths: tuple[int, ...] = (16,)
    """hidden widths"""
    pause: float = 0.0
    """seconds to sleep a step"""
    bad_from: int = -1
    """first step with a non-finite loss; -1 = none"""
    bad_to: int = 1_000_000
    """first step after that with a finite one"""
    gather: bool = False
    """take the loss over the global batch"""
    batch_norm: bool = True
    """batch normalisation"""
    adam: bool = True
    """Adam, else plain gradient descent, which does not blow up rounding"""
    second: float = 0.0
    """rate of a second descent of each step, along the weights' decay; 0 = none"""
    bad_pass: int = 0
    """which pass of a step the non-finite loss is in"""
    start: bool = False
    """make a start ready before the first step"""


class ToyData(torch.utils.data.Dataset):
    def __init__(self, config: ToyConfig) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(config.samples, 1, config.image_size, config.image_size, generator=generator)
        self.noise = config.noise
        self.skipped = 2
        self.fingerprint = "toy"

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        images = self.images[indices]
        return {"image": images + self.noise * torch.randn(images.shape), "target": images.mean((1, 2, 3))}


class Toy(Method):
    Config = ToyConfig
    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        norm = nn.BatchNorm1d(config.widths[0]) if config.batch_norm else nn.Identity()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(config.image_size**2, config.widths[0]), norm)
        self.head = nn.Linear(config.widths[0], 1)

    @classmethod
    def preset(cls, name: str) -> ToyConfig:
        return {"paper": ToyConfig(), "small": ToyConfig(steps=20), "tiny": ToyConfig(steps=3)}[name]

    def train_data(self, data: DataSpec) -> ToyData:
        if data.name != "procedural":
            raise ValueError(f"data must be procedural, got {data.name!r}")
        return ToyData(self.config)

    def loss(self, batch: dict[str, Tensor], step: int, which: int = 0) -> dict[str, Tensor]:
        time.sleep(self.config.pause)
        hidden = self.body(batch["image"])
        hidden = hidden + self.config.noise * torch.randn_like(hidden)
        error = self.head(torch.relu(hidden))[:, 0] - batch["target"]
        if self.config.gather:
            error = self.gather_rows(error)
            error = error - error.mean() + error.std()
        loss = error.square().mean()
        losses = {"loss": loss, "error": error.abs().mean()}
        if which:
            size = sum(p.square().sum() for p in self.parameters())
            losses = {"loss": 0 * loss + size, "size": size}
        if self.config.bad_from <= step < self.config.bad_to and self.config.bad_from >= 0:
            losses["loss"] = losses["loss"] * (float("nan") if which == self.config.bad_pass else 1.0)
        return losses

    def update(self, passes: Passes) -> None:
        passes.gradient()
        passes.descend(more=self.config.second > 0)
        if self.config.second > 0:
            passes.gradient(which=1)
            passes.descend(1)

    def before_training(self) -> dict[str, Any] | None:
        return (
            {"head": torch.rand_like(self.head.weight), "about": "a new head"} if self.config.start else None
        )

    def start_from(self, start: dict[str, Any]) -> None:
        self.head.weight.data.copy_(start["head"])

    def optimizer(self) -> tuple[Any, Any]:
        kind = torch.optim.Adam if self.config.adam else torch.optim.SGD
        rates = [self.config.learning_rate, self.config.second]
        optimizers = [kind(self.parameters(), lr=rate) for rate in rates[: 1 + (self.config.second > 0)]]
        schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.99) for o in optimizers]
        return (optimizers, schedules) if self.config.second > 0 else (optimizers[0], schedules[0])

    def pictures(self, batch: dict[str, Tensor], count: int = 8) -> dict[str, Tensor]:
        images = batch["image"][:count, 0]
        return {"input": images, "drawn": torch.rand_like(images)}

    def embed(self, images: Tensor) -> Tensor:
        return self.body(images)


def _protocol(method: Method, untrained: Method, data: DataSpec, *, episodes: int = 5) -> list[Table]:
    """Weights' sizes.

    Args:
        episodes: how many
    """
    if data.name != "procedural":
        raise ValueError(f"data must be procedural, got {data.name!r}")
    rows = [
        {"encoder": name, "weight": float(m.head.weight.detach().abs().sum()), "episodes": episodes}  # type: ignore[union-attr, operator]
        for name, m in (("trained", method), ("untrained", untrained))
    ]
    return [Table("toy", rows, note=f"data {data.name}")]


Toy.protocols = {"weights": _protocol}


def register() -> None:
    """Make `get_method("toy")` find this."""
    sketchfast.methods.METHODS["toy"] = "Toy"
    sys.modules["sketchfast.methods.toy"] = sys.modules[__name__]


register()
