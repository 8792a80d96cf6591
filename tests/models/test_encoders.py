"""The shapes of the encoders, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sketchfast.models.encoders import Conv4, ResNet12


@pytest.mark.parametrize(("encoder", "features"), [(Conv4, 64), (ResNet12, 512)])
@pytest.mark.parametrize("size", [(16, 16), (28, 28), (31, 45)])
def test_features(encoder, features: int, size: tuple[int, int]) -> None:
    model = encoder().eval()
    assert model.features == features
    out = model(torch.rand(2, 1, *size))
    assert out.shape == (2, features)
    assert (out >= 0).all()  # both end in ReLU, pool and mean


def biased_variance(x: torch.Tensor, **kwargs) -> torch.Tensor:
    return torch.var(x, unbiased=False, **kwargs)


def test_conv4_is_that_of_the_paper() -> None:
    model = Conv4().train()
    image = torch.rand(4, 1, 28, 28)
    x = image
    for convolution, norm in ((block[0], block[1]) for block in model.blocks):
        mean, variance = (
            f(convolution(x), dim=(0, 2, 3), keepdim=True) for f in (torch.mean, biased_variance)
        )
        shape = (1, -1, 1, 1)
        x = (convolution(x) - mean) / torch.sqrt(variance + norm.eps)
        x = x * norm.weight.view(shape) + norm.bias.view(shape)
        x = torch.nn.functional.max_pool2d(torch.relu(x), 2)
    torch.testing.assert_close(model(image), x.mean((2, 3)), rtol=1e-4, atol=1e-4)
    convolutions = [m for m in Conv4(3).modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size) for c in convolutions] == [
        (3, 64, (3, 3)),
        (64, 64, (3, 3)),
        (64, 64, (3, 3)),
        (64, 64, (3, 3)),
    ]


def test_resnet12_has_twelve_convolutions_beside_the_shortcuts() -> None:
    kernels = [m.kernel_size for m in ResNet12().modules() if isinstance(m, nn.Conv2d)]
    assert kernels.count((3, 3)) == 12
    assert kernels.count((1, 1)) == 4


@pytest.mark.parametrize("encoder", [Conv4, ResNet12])
@pytest.mark.parametrize(
    ("images", "error"),
    [
        (torch.zeros(2, 3, 28, 28), ValueError),
        (torch.zeros(2, 28, 28), ValueError),
        (torch.zeros(2, 1, 15, 28), ValueError),
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), TypeError),
    ],
)
def test_images_are_checked(encoder, images, error) -> None:
    with pytest.raises(error, match="images must"):
        encoder()(images)
