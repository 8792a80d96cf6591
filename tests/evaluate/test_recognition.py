"""The classifier that judges generated drawings: it learns, repeats, and is not flattered."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sketchfast.evaluate.recognition import _augmented, recognised, train_classifier


def drawings(per_class: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Upright bars, level bars and crosses at random places, uint8 [N, 16, 16]."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), per_class)
    images = np.zeros((len(labels), 16, 16), np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = generator.integers(3, 13, 2)
        if label != 1:
            image[2:14, column] = 255
        if label != 0:
            image[row, 2:14] = 255
    return images, labels


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 12, 5, padding=2), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(12, 3)
    )


def test_it_learns_and_is_not_flattered() -> None:
    images, labels = drawings(60)
    untrained = network()
    before = {name: value.clone() for name, value in untrained.state_dict().items()}
    trained = train_classifier(untrained, images, labels, epochs=15, batch_size=16, augment=False)
    assert trained is untrained
    assert not trained.training
    assert all((value != before[name]).any() for name, value in trained.state_dict().items())
    test, wanted = drawings(40, seed=1)
    right = recognised(trained, test, wanted)
    assert (right.shape, right.dtype) == ((120,), bool)
    assert right.mean() > 0.95
    assert recognised(trained, test, (wanted + 1) % 3).mean() < 0.05
    # floating images are the same images
    assert (recognised(trained, test / 255, wanted) == right).all()
    assert (recognised(trained, torch.from_numpy(test), wanted, batch_size=7) == right).all()
    noise = np.random.default_rng(0).integers(0, 256, test.shape, dtype=np.uint8)
    assert recognised(trained, noise, wanted).mean() < 0.6
    trained.train()
    recognised(trained, test, wanted)
    assert trained.training


def test_what_is_random_follows_from_the_seed() -> None:
    images, labels = drawings(20)
    one, same, other = (
        train_classifier(network(), images, labels, epochs=2, batch_size=16, seed=seed) for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    state = torch.get_rng_state()
    train_classifier(one, images, labels, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_few_images_make_one_batch() -> None:
    images, labels = drawings(1)
    train_classifier(network(), images, labels, epochs=1, batch_size=64)


def test_augmentation_moves_ink_and_keeps_it() -> None:
    images = torch.zeros(64, 1, 28, 28)
    images[:, 0, 8:20, 6:12] = 1
    turned = _augmented(images, torch.Generator().manual_seed(0))
    assert turned.shape == images.shape
    assert ((turned >= 0) & (turned <= 1 + 1e-5)).all()
    ink = turned.sum(dim=(1, 2, 3)) / images.sum(dim=(1, 2, 3))
    assert (ink > 0.7).all()
    assert (ink < 1.4).all()
    centres = (turned[:, 0].sum(dim=1) * torch.arange(28.0)).sum(dim=1) / turned.sum(dim=(1, 2, 3))
    mirrored = centres > 13.5
    assert 16 < mirrored.sum() < 48
    assert centres[~mirrored].std() > 0.3


IMAGES = np.zeros((4, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "flags", "error", "words"),
    [
        (IMAGES.astype(int), [0] * 4, {}, TypeError, "images must be uint8, or floating"),
        (IMAGES[0], [0] * 4, {}, ValueError, r"images must have shape \[N, H, W\]"),
        (IMAGES, [0] * 3, {}, ValueError, "labels must be 4, one an image, got 3"),
        (IMAGES, [0.0] * 4, {}, TypeError, "labels must have an integer dtype"),
        (IMAGES, [[0] * 4], {}, ValueError, r"labels must have shape \[N\]"),
        (IMAGES, [0] * 4, {"epochs": 0}, ValueError, "epochs must be at least 1"),
        (IMAGES, [0] * 4, {"batch_size": 1}, ValueError, "batch_size must be at least 2"),
        (IMAGES, [0] * 4, {"learning_rate": 0.0}, ValueError, "learning_rate must be greater than 0"),
        (IMAGES, [0] * 4, {"weight_decay": -1.0}, ValueError, "weight_decay must be at least 0"),
        (IMAGES, [0] * 4, {"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_bad_arguments_are_named(images, labels, flags, error, words) -> None:
    with pytest.raises(error, match=words):
        train_classifier(network(), images, labels, **flags)
    if not flags:
        with pytest.raises(error, match=words):
            recognised(network(), images, labels)
