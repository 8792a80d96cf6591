"""A method that trains in a moment, with all the loop must carry: noise, batch statistics, a schedule."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import sketchfast.methods
from sketchfast.methods.base import DataSpec, Method, Table, TrainConfig


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

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        time.sleep(self.config.pause)
        hidden = self.body(batch["image"])
        hidden = hidden + self.config.noise * torch.randn_like(hidden)
        error = self.head(torch.relu(hidden))[:, 0] - batch["target"]
        if self.config.gather:
            error = self.gather_rows(error)
            error = error - error.mean() + error.std()
        loss = error.square().mean()
        if self.config.bad_from <= step < self.config.bad_to and self.config.bad_from >= 0:
            loss = loss * float("nan")
        return {"loss": loss, "error": error.abs().mean()}

    def optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        kind = torch.optim.Adam if self.config.adam else torch.optim.SGD
        optimizer = kind(self.parameters(), lr=self.config.learning_rate)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)

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
