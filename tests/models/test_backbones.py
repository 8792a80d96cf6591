"""Backbones by name: pooling, size, weights, and the pixels they expect."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sketchfast.models.backbones import Pixels, create_backbone, load_backbone


def test_a_vision_transformer_takes_the_size_asked_for() -> None:
    images = torch.rand(2, 3, 64, 64)
    assert create_backbone("test_vit", image_size=64)(images).shape == (2, 64)
    assert create_backbone("test_resnet", image_size=64)(images).shape == (2, 96)
    with pytest.raises(ValueError, match=r"backbone test_vit cannot be had with global_pool nothing"):
        create_backbone("test_vit", pool="nothing")
    with pytest.raises(ValueError, match=r"backbone must be a timm model, got 'resnet51'"):
        create_backbone("resnet51", pool="avg", image_size=64)


@pytest.mark.parametrize("pool", ["", "token", "avg", "max"])
def test_any_pooling_takes_the_weights_of_a_vision_transformer(tmp_path, pool: str) -> None:
    torch.manual_seed(0)
    own = create_backbone("test_vit", image_size=64)
    nn.init.normal_(own.norm.weight)
    torch.save(own.state_dict(), tmp_path / "vit.pt")
    other = create_backbone("test_vit", pool=pool, image_size=64)
    with torch.no_grad():
        load_backbone(other, "test_vit", str(tmp_path / "vit.pt"))
        images = torch.rand(2, 3, 64, 64)
        tokens = other.eval().forward_features(images)
    assert torch.equal(other.norm.weight, own.norm.weight)
    pooled = {"avg": tokens[:, 1:].mean(1), "max": tokens[:, 1:].amax(1)}.get(pool, tokens[:, 0])
    torch.testing.assert_close(other(images), pooled)


def test_weights_of_a_file_are_taken_whole(tmp_path) -> None:
    torch.manual_seed(0)
    one, two = create_backbone("test_resnet"), create_backbone("test_resnet")
    torch.save({"state_dict": one.state_dict(), "teacher": torch.zeros(2)}, tmp_path / "start.pt")
    load_backbone(two, "test_resnet", str(tmp_path / "start.pt"))
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    with pytest.raises(ValueError, match="weights must be random, timm or a file that exists, got 'nothing'"):
        load_backbone(two, "test_resnet", "nothing")
    with pytest.raises(ValueError, match=r"weights must (fit|hold every tensor of) test_efficientnet"):
        load_backbone(create_backbone("test_efficientnet"), "test_efficientnet", str(tmp_path / "start.pt"))


def test_weights_that_cannot_be_had_say_what_to_do(monkeypatch) -> None:
    import timm

    backbone = create_backbone("test_resnet")

    def no_network(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(ValueError, match=r"weights must be a file or random where .* no connection"):
        load_backbone(backbone, "test_resnet", "timm")


def test_pixels() -> None:
    images = torch.rand(3, 3, 8, 8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    wanted = (images - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(Pixels()(images), wanted)
    grey = Pixels(grey=True, standardise=True)(images * 0.5 + 0.1)
    torch.testing.assert_close(grey, Pixels(grey=True, standardise=True)(images), atol=3e-2, rtol=0)
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert grey.is_contiguous(memory_format=torch.channels_last)
    assert list(Pixels().state_dict()) == []
