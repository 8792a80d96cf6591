"""Backbones by name: pooling, size, weights, and the pixels they expect."""

from __future__ import annotations

import pytest
import torch

from sketchfast.models.backbones import Pixels, create_backbone, load_backbone


def test_a_vision_transformer_takes_the_size_asked_for() -> None:
    images = torch.rand(2, 3, 64, 64)
    assert create_backbone("test_vit", image_size=64)(images).shape == (2, 64)
    assert create_backbone("test_resnet", image_size=64)(images).shape == (2, 96)
    with pytest.raises(ValueError, match=r"backbone test_vit cannot be had with global_pool nothing"):
        create_backbone("test_vit", pool="nothing")
    with pytest.raises(ValueError, match=r"backbone must be a timm model, got 'resnet51'"):
        create_backbone("resnet51", pool="avg", image_size=64)


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
