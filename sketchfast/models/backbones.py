"""Pre-trained backbones by name: timm's networks, their weights, and the pixels they expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .views import to_grey

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def create_backbone(name: str, *, pool: str = "", image_size: int | None = None) -> nn.Module:
    """timm's network `name` with random weights, images [B, 3, S, S] to features [B, num_features].

    pool: timm's global pooling (avg, max, avgmax, catavgmax, token, as the network has it); "" takes its own.
    Whatever the pooling, a network's pre-trained weights fit: timm would give a vision transformer that pools
    its tokens a new norm behind the pooling in place of its own before it.
    image_size: S, for networks built for one size, such as vision transformers; the others take any.

    ValueError
    for a name timm does not know, or a pooling or size the network cannot have.
    """
    import timm

    options: dict[str, Any] = {"global_pool": pool} if pool else {}
    config = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    if image_size is not None and config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    try:
        network = timm.create_model(name, pretrained=False, num_classes=0, **options)
        if pool and "fc_norm.weight" in network.state_dict():
            own = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
            if "fc_norm.weight" not in own:
                network = timm.create_model(name, pretrained=False, num_classes=0, fc_norm=False, **options)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        if config is None:  # RuntimeError: timm's word for a name it does not know
            raise ValueError(f"backbone must be a timm model, got {name!r}: {error}") from error
        asked = ", ".join(f"{key} {value}" for key, value in options.items())
        raise ValueError(f"backbone {name} cannot be had with {asked}: {error}") from error
    return network.to(memory_format=torch.channels_last)


def load_backbone(backbone: nn.Module, name: str, weights: str) -> None:
    """Put start weights into timm's network `name`; ValueError where they do not fit it.

    weights: "random" leaves it as it is, "timm" takes timm's own for this name, from the network; else the
    name of a file of tensors, pickled (read with weights_only) or safetensors.
    """
    if weights == "random":
        return
    import timm

    if weights == "timm":
        options: dict[str, Any] = {} if (size := _fixed_size(backbone)) is None else {"img_size": size}
        try:
            found = timm.create_model(name, pretrained=True, num_classes=0, **options).state_dict()
        except Exception as error:  # no network, no such file there, no weights for this name
            raise ValueError(
                f"weights must be a file or random where timm's of {name} cannot be had: {error}"
            ) from error
    else:
        if not Path(weights).is_file():
            raise ValueError(f"weights must be random, timm or a file that exists, got {weights!r}")
        try:
            found = timm.models.load_state_dict(weights, use_ema=False, weights_only=True)
        except Exception as error:  # torch and safetensors raise a dozen kinds for what is no such file
            raise ValueError(f"weights must be a file of tensors, got {weights}: {error!r}") from error
    try:
        missing = backbone.load_state_dict(found, strict=False).missing_keys
    except RuntimeError as error:  # a shape that differs
        raise ValueError(f"weights must fit {name}, got {weights!r}: {error}") from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(
            f"weights must hold every tensor of {name}, got {weights!r} without {len(missing)} of them, "
            f"{missing[0]} the first"
        )


def _fixed_size(backbone: nn.Module) -> Any:
    """(H, W) that a vision transformer was built for, None for networks that take any."""
    return getattr(getattr(backbone, "patch_embed", None), "img_size", None)


class Pixels(nn.Module):
    """Images [B, 3, H, W] in [0, 1] as a backbone expects them, channels last.

    grey: without colour. standardise: each image to mean 0 and variance 1, instead of by ImageNet's mean and
    variance.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, grey: bool = False, standardise: bool = False) -> None:
        super().__init__()
        self.grey, self.standardise = grey, standardise
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.grey:
            images = to_grey(images)
        if self.standardise:
            variance, mean = torch.var_mean(images, dim=(1, 2, 3), correction=0, keepdim=True)
            images = (images - mean) / (variance + 1e-4).sqrt()
        else:
            images = (images - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)
