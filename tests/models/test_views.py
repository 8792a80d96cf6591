"""Random views of a batch: what each setting does, and that off is off."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch

from sketchfast.models import views
from sketchfast.models.views import LUMA, ViewSettings, random_view

OFF = {
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "flip": 0.0,
    "jitter": 0.0,
    "grey": 0.0,
    "blur": 0.0,
}


def settings(**fields) -> ViewSettings:
    return ViewSettings(**{**OFF, **fields})


def noise(count: int = 6, size: int = 24, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.rand(count, 3, size, size)


def test_all_off_is_the_image() -> None:
    images = (noise() * 255).byte()
    torch.testing.assert_close(random_view(images, 24, settings()), images.float() / 255, atol=1e-5, rtol=0)


def test_views_are_images_that_repeat_under_a_seed() -> None:
    images = noise(16)
    torch.manual_seed(1)
    first = random_view(images, 20, ViewSettings())
    second = random_view(images, 20, ViewSettings())
    torch.manual_seed(1)
    again = random_view(images, 20, ViewSettings())
    assert first.shape == (16, 3, 20, 20)
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert (first - second).abs().amax(dim=(1, 2, 3)).min() > 0.05


def test_a_crop_shows_a_box_of_the_asked_area_and_ratio() -> None:
    """On an image of its own coordinates a view tells where it was cut."""
    size = 128
    line = (torch.arange(size) + 0.5) / size
    x, y = line.expand(size, size), line[:, None].expand(size, size)
    images = torch.stack((x, y, torch.zeros_like(x))).expand(400, 3, size, size)
    torch.manual_seed(0)
    view = random_view(images, 64, settings(crop_scale=(0.2, 0.5), crop_ratio=(0.75, 4 / 3)))
    width = (view[:, 0, 0, -1] - view[:, 0, 0, 0]) * 64 / 63
    height = (view[:, 1, -1, 0] - view[:, 1, 0, 0]) * 64 / 63
    area, ratio = width * height, width / height
    assert 0.19 < area.min() < 0.22
    assert 0.47 < area.max() < 0.51
    assert 0.74 < ratio.min() < 0.8
    assert 1.27 < ratio.max() < 1.35
    assert view[:, 0].min() < 0.03
    assert view[:, 0].max() > 0.97  # crops lie everywhere


def test_flips_mirror_half_of_the_images() -> None:
    images = noise(200)
    view = random_view(images, 24, settings(flip=0.5))
    same = (view - images).abs().amax(dim=(1, 2, 3)) < 1e-4
    mirrored = (view - images.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert torch.equal(same, ~mirrored)
    assert 70 < same.sum() < 130


def test_grey_is_luma_and_touches_only_what_it_may() -> None:
    images = noise(8)
    photo = torch.arange(8) % 2 == 1
    view = random_view(images, 24, settings(grey=1.0), colour=photo)
    torch.testing.assert_close(view[~photo], images[~photo], atol=1e-5, rtol=0)
    luma = (images * torch.tensor(LUMA)[:, None, None]).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(view[photo], luma[photo], atol=1e-5, rtol=0)


@pytest.mark.parametrize("part", ["brightness", "contrast", "saturation"])
def test_jitter_is_torchvisions(monkeypatch, part: str) -> None:
    """One factor at a time against torchvision's function of that name."""
    from torchvision.transforms import functional

    images, factor = noise(5) * 0.5 + 0.25, 0.6
    factors = iter({"brightness": 1.0, "contrast": 1.0, "saturation": 1.0} | {part: factor})
    values = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0} | {part: factor}

    def uniform(like, low, high):
        if high == 1.0:
            return torch.zeros(len(like))  # every chance comes true
        return torch.full((len(like),), 0.0 if low < 0 else values[next(factors)])

    monkeypatch.setattr(views, "_uniform", uniform)
    got = views._recolour(images, settings(jitter=1.0), None)
    want = getattr(functional, f"adjust_{part}")(images, factor)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


def test_jitter_turns_the_hue_and_leaves_grey_grey() -> None:
    torch.manual_seed(0)
    grey = torch.rand(50, 1, 8, 8).expand(-1, 3, -1, -1) * 0.5 + 0.2
    view = random_view(grey, 8, settings(jitter=1.0))
    assert (view - view.mean(1, keepdim=True)).abs().max() < 1e-3
    assert (view - grey).abs().amax(dim=(1, 2, 3)).gt(0.05).sum() > 25

    red = torch.tensor([0.7, 0.4, 0.4])[:, None, None].expand(300, 3, 8, 8)
    view = random_view(red, 8, settings(jitter=0.5))
    hues = [(colorsys.rgb_to_hsv(*pixel.tolist())[0] + 0.5) % 1 - 0.5 for pixel in view[:, :, 0, 0]]
    assert 0.07 < max(hues) < 0.18
    assert -0.18 < min(hues) < -0.07  # up to 0.1 of a turn in YIQ, whose angles are not HSV's


def test_negatives() -> None:
    images = noise(100)
    view = random_view(images, 24, settings(invert=0.5))
    same = (view - images).abs().amax(dim=(1, 2, 3)) < 1e-4
    negative = (view - (1 - images)).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert torch.equal(same, ~negative)
    assert 30 < same.sum() < 70


def test_blur_keeps_the_mean_and_takes_away_detail() -> None:
    images = noise(60, 64)
    view = random_view(images, 64, settings(blur=1.0))
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    assert (view.std(dim=(1, 2, 3)) <= images.std(dim=(1, 2, 3)) + 1e-5).all()
    assert view.std(dim=(1, 2, 3)).min() < 0.9 * images.std(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(view[inner].mean(), images[inner].mean(), atol=2e-3, rtol=0)
    half = random_view(images, 64, settings(blur=0.5))
    untouched = (half - images).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert 12 < untouched.sum() < 50


def test_blur_is_torchvisions_at_one_sigma(monkeypatch) -> None:
    from torchvision.transforms.functional import gaussian_blur

    images, sigma = noise(4, 224), 1.5
    monkeypatch.setattr(
        views, "_uniform", lambda like, low, high: torch.full((len(like),), 0.0 if high == 1 else sigma)
    )
    radius = math.ceil(2.5 * 2.0)
    want = gaussian_blur(images, [2 * radius + 1] * 2, [sigma] * 2)
    torch.testing.assert_close(views._blur(images, 1.0), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must be greater than 0"),
        ({"crop_scale": (0.5, 1.5)}, r"crop_scale must lie in \(0, 1\]"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale must be a pair"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio must be a pair"),
        ({"flip": 1.5}, "flip must be a probability"),
        ({"grey": -0.1}, "grey must be at least 0"),
        ({"blur": 2.0}, "blur must be a probability"),
        ({"jitter": 1.3}, r"jitter must lie in \[0, 1.25\]"),
    ],
)
def test_bad_settings_are_named(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings(**fields)
    with pytest.raises(TypeError, match="crop_scale must be a pair"):
        settings(crop_scale=0.5)
