"""Are generated drawings recognisable? A classifier trained on real ones, shown what a network drew.

SketchEmbedNet section 4.5, after the inception score of Salimans et al. 2016. The classifier learns nothing
from the network under test, nor the network from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ..ops._contract import check_integer, check_number


def train_classifier(
    network: nn.Module,
    images: ArrayLike | Tensor,
    labels: ArrayLike,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    weight_decay: float = 5e-3,
    augment: bool = True,
    seed: int = 0,
) -> nn.Module:
    """Trains `network` in place on labelled drawings and gives it back in evaluation mode.

    AdamW under a one-cycle schedule. Its initial weights are the caller's affair; all else that is random
    follows from `seed`, and the global generators are left as they were.

    Args:
        network: [B, 1, H, W] in [0, 1], ink = 1, to class scores [B, C]; trained on the device it is on.
        images: [N, H, W] uint8, ink = 255.
        labels: [N] integers below C.
        epochs: passes over the images.
        batch_size: images a step, at least 2; the last few of an epoch that fill no batch are left out.
        learning_rate, weight_decay: AdamW's; the rate is the highest of the schedule.
        augment: turn each image by up to 15 degrees, shift, scale and shear it by up to a tenth, and mirror
            half of them, anew in each epoch.
        seed: of order and augmentation.

    Raises TypeError or ValueError that names the argument.
    """
    pixels, targets = _images(images), _labels(labels)
    if len(pixels) != len(targets):
        raise ValueError(f"labels must be {len(pixels)}, one an image, got {len(targets)}")
    check_integer("epochs", epochs, 1)
    batch_size = min(check_integer("batch_size", batch_size, 2), len(pixels))
    check_number("learning_rate", learning_rate, above=0)
    check_number("weight_decay", weight_decay, at_least=0)
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(check_integer("seed", seed, 0))
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps = epochs * (len(pixels) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    network.train()
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(len(pixels), generator=generator)
            for rows in order.split(batch_size)[: len(pixels) // batch_size]:
                batch = _scaled(pixels[rows]).to(device)
                if augment:
                    batch = _augmented(batch, generator)
                loss = F.cross_entropy(network(batch), targets[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return network.eval()


@torch.no_grad()
def recognised(
    network: nn.Module, images: ArrayLike | Tensor, labels: ArrayLike, *, batch_size: int = 512
) -> NDArray[np.bool_]:
    """Whether the classifier names each of images [N, H, W] (uint8, or floating in [0, 1]) as labelled: [N].

    Computed in evaluation mode. Raises TypeError or ValueError that names the argument.
    """
    pixels, targets = _images(images), _labels(labels)
    if len(pixels) != len(targets):
        raise ValueError(f"labels must be {len(pixels)}, one an image, got {len(targets)}")
    device, training = next(network.parameters()).device, network.training
    network.eval()
    named = [network(_scaled(part).to(device)).argmax(dim=1).cpu() for part in pixels.split(batch_size)]
    network.train(training)
    return (torch.cat(named) == targets).numpy()


def _scaled(images: Tensor) -> Tensor:
    """[B, 1, H, W] in [0, 1]."""
    return (images if images.is_floating_point() else images / 255).float()[:, None]


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [B, 1, H, W] under an affine map of its own; what comes from outside is background."""
    count = len(images)
    angle, shear, scale_x, scale_y, shift_x, shift_y = (
        torch.rand(6, count, generator=generator) * 2 - 1
    ) / 10
    angle = angle * (150 * torch.pi / 180)  # 15 degrees at most
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    scale_x, scale_y = (1 + scale_x) * mirror, 1 + scale_y
    rows = (
        torch.stack((scale_x * angle.cos(), shear - scale_y * angle.sin(), shift_x), dim=1),
        torch.stack((scale_x * angle.sin(), scale_y * angle.cos(), shift_y), dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.device), align_corners=False)


def _images(value: Any) -> Tensor:
    images = torch.as_tensor(value).detach().cpu()
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8, or floating point in [0, 1], got {images.dtype}")
    if images.dim() != 3 or not images.numel():
        raise ValueError(f"images must have shape [N, H, W], N at least 1, got {tuple(images.shape)}")
    return images


def _labels(value: ArrayLike) -> Tensor:
    labels = np.asarray(value)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels must have an integer dtype, got {labels.dtype}")
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape [N], got {labels.shape}")
    return torch.from_numpy(labels.astype(np.int64))
