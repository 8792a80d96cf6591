"""SketchEmbedNet: image representations learned by drawing what is seen.

Wang, Ren, Zemel: "SketchEmbedNet: Learning Novel Concepts by Imitating Drawings", ICML 2021
(arXiv 2009.04806). A convolutional encoder gives a Gaussian code z of an image; a HyperLSTM decodes it, point
by point, as pen strokes. No class label is used. Where paper and authors' code differ, a field of the config
says which is the default here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import nn as sketchnn
from ..data.dataset import LabelledImages, StrokeDataset, add_counts
from ..data.quickdraw import class_split
from ..data.strokes import Sketch, simplify
from ..models import mixture
from ..models.encoders import ENCODERS
from ..ops._contract import check_integer, check_number
from ..ops.mixture import mixture_loss
from ..ops.raster import raster_bce, rasterize
from .base import PRESETS, DataSpec, Method, TrainConfig, sized_rgb

PEN_DOWN, PEN_UP, PEN_END = 0, 1, 2


@dataclass(frozen=True)
class SketchEncoderConfig(TrainConfig):
    """What the networks on one encoder share: the paper's QuickDraw run (section 4.1)."""

    clip_value: float = 1.0
    """clip each gradient element to +-this; 0 turns it off"""
    encoder: str = "conv4"
    """image encoder: conv4 (the paper's on QuickDraw) or resnet12 (its on Sketchy)"""
    image_size: int = 28
    """side of the input image in pixels; 84 for Sketchy"""
    image_channels: int = 1
    """1: the input is the raster of the drawing itself, as on QuickDraw; 3: it is the colour photo that the
    drawing shows, as on Sketchy (data sketchy or procedural)"""
    keep_overlap: bool = False
    """data sketchy: train on the photos of mini-ImageNet's test classes too; the paper leaves them out"""
    max_length: int = 64
    """longest drawing in pen offsets; longer ones are left out; 100 for Sketchy"""
    simplify_tolerance: float = 0.0
    """Ramer-Douglas-Peucker tolerance in sides of a drawing's bounding box: fewer points, the same picture;
    0 takes the drawings as they are, as the paper does"""
    latent_size: int = 256
    """size of the embedding z"""
    lr_decay: float = 0.85
    """factor on the learning rate each lr_decay_steps, applied continuously"""
    lr_decay_steps: int = 15_000
    """steps over which the learning rate falls by lr_decay; 0 takes the paper's share of steps, a 20th"""
    held_out_classes: float = 45 / 345
    """share of the classes kept out of training, at least one; the paper keeps 45 of 345"""
    drawings_per_class: int = 0
    """at most so many drawings of each class, picked at random; 0 takes all"""
    split_seed: int = 0
    """seed of the choice of held-out classes"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, got {self.encoder!r}")
        if self.image_channels not in (1, 3):
            raise ValueError(f"image_channels must be 1 or 3, got {self.image_channels!r}")
        for name in ("image_size", "latent_size", "max_length"):
            check_integer(name, getattr(self, name), 1)
        for name in ("lr_decay_steps", "drawings_per_class", "split_seed"):
            check_integer(name, getattr(self, name), 0)
        if not isinstance(self.keep_overlap, bool):
            raise TypeError(f"keep_overlap must be a bool, got {self.keep_overlap!r}")
        self._check_shares("held_out_classes", "simplify_tolerance")
        if not 0 < check_number("lr_decay", self.lr_decay) <= 1:
            raise ValueError(f"lr_decay must lie in (0, 1], got {self.lr_decay!r}")

    def _check_shares(self, *names: str) -> None:
        for name in names:
            if not 0 <= check_number(name, getattr(self, name)) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}")

    def share_of_steps(self, field: str) -> int:
        """A schedule's interval in steps: as configured, or, where that is 0, in the paper's proportion."""
        paper = type(self)()
        return getattr(self, field) or max(round(self.steps * getattr(paper, field) / paper.steps), 1)


@dataclass(frozen=True)
class SketchEmbedNetConfig(SketchEncoderConfig):
    """The paper's QuickDraw run (section 4.1, "Implementation details")."""

    hidden_size: int = 1024
    """units of the decoder's HyperLSTM"""
    hyper_size: int = 512
    """units of the smaller LSTM that rescales its gates"""
    embed_size: int = 64
    """size of the hypernetwork's embeddings"""
    mixture_components: int = 30
    """bivariate Gaussians in the distribution of the next offset"""
    recurrent_dropout: float = 0.0
    """probability of dropping a new cell input, training only; the authors train without"""
    alpha_step: float = 0.05
    """what alpha, the weight of the pixel loss, gains each alpha_interval"""
    alpha_interval: int = 10_000
    """steps between gains of alpha; 0 takes the paper's share of steps, a 30th"""
    alpha_max: float = 0.5
    """cap of alpha; 0.75 for Sketchy"""
    pixel_loss_above: float = 0.1
    """the pixel loss is computed only where alpha exceeds this: 0.1 in the authors' code, 0 in the paper"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden_size", "hyper_size", "embed_size", "mixture_components"):
            check_integer(name, getattr(self, name), 1)
        check_integer("alpha_interval", self.alpha_interval, 0)
        self._check_shares("alpha_step", "alpha_max", "pixel_loss_above")
        if not 0 <= check_number("recurrent_dropout", self.recurrent_dropout) < 1:
            raise ValueError(f"recurrent_dropout must lie in [0, 1), got {self.recurrent_dropout!r}")


#: In which fields the paper's run on Sketchy differs from that on QuickDraw, the defaults. The authors' code
#: simplifies by 5 pixels of the photo and keeps 10 of the 125 classes for validation.
SKETCHY_RUN: dict[str, Any] = {
    "batch_size": 64,
    "encoder": "resnet12",
    "image_size": 84,
    "image_channels": 3,
    "max_length": 100,
    "simplify_tolerance": 0.02,
    "held_out_classes": 10 / 125,
    "alpha_max": 0.75,
}


class StrokeBatch(NamedTuple):
    """Drawings centred on their bounding box, whose longer side is 1."""

    points: Tensor
    """[B, T + 1, 2] float32; what lies past the length repeats the last point"""
    pen_down: Tensor
    """[B, T + 1] bool; False past the length"""
    lengths: Tensor
    """[B] int64: points of each drawing, 2 to T + 1"""


class PhotoStrokeBatch(NamedTuple):
    """A `StrokeBatch` with the photos that the drawings show."""

    points: Tensor
    pen_down: Tensor
    lengths: Tensor
    photos: Tensor
    """[B, 3, S, S] uint8, RGB"""


Batch = StrokeBatch | PhotoStrokeBatch


def _fingerprint(drawings: StrokeDataset) -> str:
    """A digest of names, labels, lengths, and a MiB of points at either end: gigabytes would take long."""
    end = 1 << 17
    digest = hashlib.blake2b("\n".join(drawings.class_names).encode(), digest_size=16)
    for part in (drawings.labels, drawings.offsets, drawings.points[:end], drawings.points[-end:]):
        digest.update(part.tobytes())
    return digest.hexdigest()


class StrokeBatches(torch.utils.data.Dataset):
    """Drawings as packed arrays; a batch is one gather, so that no step waits for data."""

    def __init__(self, drawings: StrokeDataset, max_points: int) -> None:
        self.points = torch.from_numpy(drawings.points)
        self.pen_down = torch.from_numpy(drawings.pen_down)
        self.starts = torch.from_numpy(drawings.offsets[:-1])
        self.lengths = torch.from_numpy(drawings.lengths)
        self.max_points = max_points
        #: how many drawings were left out, by reason
        self.skipped = dict(drawings.skipped)
        self.fingerprint = _fingerprint(drawings)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Batch:
        batch = self.__getitems__([index])
        return type(batch)(*(part[0] for part in batch))

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.strokes(indices)

    def strokes(self, indices: list[int]) -> StrokeBatch:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        lengths = self.lengths[rows]
        column = torch.arange(self.max_points)[None]
        source = self.starts[rows, None] + torch.minimum(column, lengths[:, None] - 1)
        points = self.points[source]
        low, high = points.amin(dim=1, keepdim=True), points.amax(dim=1, keepdim=True)
        extent = (high - low).amax(dim=2, keepdim=True)
        pen_down = self.pen_down[source] & (column < lengths[:, None] - 1)
        return StrokeBatch((points - (low + high) / 2) / extent, pen_down, lengths)


class PhotoStrokeBatches(StrokeBatches):
    """`StrokeBatches` with each drawing's photo, packed uint8; `extra["photo"]` says which it is."""

    def __init__(self, drawings: StrokeDataset, photos: NDArray[np.uint8], max_points: int) -> None:
        super().__init__(drawings, max_points)
        self.photos = torch.from_numpy(photos)
        self.photo_rows = torch.from_numpy(drawings.extra["photo"])
        digest = hashlib.blake2b(self.fingerprint.encode(), digest_size=16)
        for part in (drawings.extra["photo"], photos[:64], photos[-64:]):
            digest.update(np.ascontiguousarray(part).tobytes())
        self.fingerprint = digest.hexdigest()

    def __getitems__(self, indices: list[int]) -> PhotoStrokeBatch:
        photos = self.photos[self.photo_rows[torch.as_tensor(indices, dtype=torch.int64)]]
        return PhotoStrokeBatch(*self.strokes(indices), photos)


def stroke5(batch: Batch, offset_scale: Tensor) -> Tensor:
    """The paper's y [B, T + 1, 5]: (dx, dy) in units of `offset_scale`, then pen down, lifted, ended.

    Row 0 is the first point, the origin; row t leads to point t. Past the end all rows are (0, 0, 0, 0, 1).
    """
    steps = batch.points.shape[1]
    offsets = torch.diff(batch.points, dim=1, prepend=batch.points[:, :1]) / offset_scale
    ended = torch.arange(steps, device=offsets.device)[None] >= batch.lengths[:, None]
    pens = torch.stack((batch.pen_down, ~batch.pen_down & ~ended, ended), dim=-1)
    return torch.cat((offsets, pens.to(offsets.dtype)), dim=-1)


def read_drawings(data: DataSpec, per_class: int | None = None) -> StrokeDataset:
    """The drawings of the data set `data` names, at most `per_class` of each class; ValueError if unknown."""
    if data.name == "procedural":
        from ..data.procedural import procedural

        if per_class is None:
            return procedural()
        styles = min(per_class, 5)
        return procedural(instances=per_class // styles, styles=styles)
    if data.name not in ("quickdraw", "omniglot", "sketchy"):
        raise ValueError(f"data must be procedural, quickdraw, omniglot or sketchy, got {data.name!r}")
    if data.root is None:
        raise ValueError(f"root must be the folder that holds {data.name}, got None")
    from ..data.prepare import load_prepared

    prepared = load_prepared(data.name, data.root) if per_class is None else None
    if data.name == "quickdraw":
        from ..data.quickdraw import load_quickdraw

        return prepared or load_quickdraw(data.root, per_class=per_class)
    if data.name == "sketchy":
        return _at_most(_read_sketchy(data.root), per_class)
    from ..data.omniglot import load_omniglot_strokes

    # sampled in time, thousands of points a drawing; the authors simplify by the same tolerance in pixels
    strokes = prepared or load_omniglot_strokes(data.root)
    sketches = [simplify(strokes[index][0], 2.0) for index in range(len(strokes))]
    return _repacked(strokes, sketches)


def _read_sketchy(root: Path) -> StrokeDataset:
    """Sketchy's drawings that the publishers do not mark as invalid."""
    from ..data.prepare import load_prepared
    from ..data.sketchy import load_sketchy_strokes

    strokes = load_prepared("sketchy_strokes", root)
    if strokes is None or "size" not in strokes.extra:  # older caches have no sizes
        strokes = load_sketchy_strokes(root)
    return _without(strokes, ~strokes.extra["valid"], "marked invalid")


def _without(drawings: StrokeDataset, out: NDArray[np.bool_], reason: str) -> StrokeDataset:
    """The drawings but those of the mask `out`, which are counted in `skipped`."""
    kept = drawings.subset(~out)
    if out.any():
        add_counts(kept.skipped, {reason: int(out.sum())})
    return kept


def _at_most(drawings: StrokeDataset, per_class: int | None, seed: int = 0) -> StrokeDataset:
    """At most `per_class` drawings of each class, picked at random; all for None."""
    if per_class is None:
        return drawings
    order = np.random.default_rng(seed).permutation(len(drawings))
    parts = [order[drawings.labels[order] == label][:per_class] for label in np.unique(drawings.labels)]
    return drawings.subset(np.concatenate(parts))


#: The data sets whose drawings have photos.
PHOTO_DATA = ("procedural", "sketchy")


def read_photos(
    data: DataSpec, drawings: StrokeDataset, size: int
) -> tuple[StrokeDataset, NDArray[np.uint8]]:
    """The drawings of `read_drawings(data)` that have a photo, and the photos, uint8 RGB [P, 3, size, size].

    `extra["photo"]` int64 [N] of the drawings says which photo each shows. A photo keeps its proportions and
    is padded to a square with black, as in the paper. Its authors also cut it to the object's box beforehand,
    from a list beside the data set; here it is whole. The drawings stay as they are: as on QuickDraw they are
    scaled and centred by their own box.
    """
    if data.name == "procedural":
        return _procedural_photos(drawings, size)
    if data.name == "sketchy" and data.root is not None:
        return _sketchy_photos(data.root, drawings, size)
    raise ValueError(f"data must be one with photos ({', '.join(PHOTO_DATA)}), got {data.name!r}")


def _procedural_photos(drawings: StrokeDataset, size: int) -> tuple[StrokeDataset, NDArray[np.uint8]]:
    """A photo of each instance; the drawings by different hands of one share it."""
    from ..data.procedural import photo

    things, rows = np.unique(
        np.stack((drawings.labels, drawings.extra["instance"]), axis=1), axis=0, return_inverse=True
    )
    photos = np.stack(
        [photo(drawings.class_names[label], instance, size) for label, instance in things.tolist()]
    )
    return replace(drawings, extra={**drawings.extra, "photo": rows.reshape(-1).astype(np.int64)}), photos


def _sketchy_photos(
    root: Path, drawings: StrokeDataset, size: int
) -> tuple[StrokeDataset, NDArray[np.uint8]]:
    """Sketchy's photos, squares on disk, in the proportions of the documents drawn over them."""
    from ..data.sketchy import load_sketchy_photos, photo_of_sketch

    photos = load_sketchy_photos(root, size=size)
    place = {name: row for row, name in enumerate(photos.names)}
    rows = np.array(
        [place.get(photo_of_sketch(key) or "", -1) for key in drawings.extra["key"].tolist()], np.int64
    )
    known = (rows >= 0) & np.isfinite(drawings.extra["size"]).all(axis=1)
    kept = _without(drawings, ~known, "no photo or no size")
    if not len(kept):
        raise ValueError(
            f"data must hold photos of its drawings, got none for {len(drawings)} drawings in {root}"
        )
    used, first, photo_rows = np.unique(rows[known], return_index=True, return_inverse=True)
    pixels = np.zeros((len(used), 3, size, size), np.uint8)
    for target, row, (width, height) in zip(pixels, used, kept.extra["size"][first], strict=True):
        target[:] = _letterboxed(photos.images[row], float(width), float(height)).transpose(2, 0, 1)
    add_counts(kept.skipped, {f"photos: {reason}": count for reason, count in photos.skipped.items()})
    return replace(kept, extra={**kept.extra, "photo": photo_rows.reshape(-1).astype(np.int64)}), pixels


def _letterboxed(square: NDArray[np.uint8], width: float, height: float) -> NDArray[np.uint8]:
    """A picture that was stretched to a square [S, S, 3] in its own proportions, padded with black."""
    from PIL import Image

    size, longest = len(square), max(width, height)
    inner = (max(round(size * width / longest), 1), max(round(size * height / longest), 1))
    canvas = Image.new("RGB", (size, size))
    corner = ((size - inner[0]) // 2, (size - inner[1]) // 2)
    canvas.paste(Image.fromarray(square).resize(inner, Image.Resampling.BILINEAR), corner)
    return np.asarray(canvas)


def without_overlap(drawings: StrokeDataset) -> StrokeDataset:
    """Sketchy's drawings but those of mini-ImageNet's test classes; see `overlaps_mini_imagenet`."""
    from ..data.sketchy import overlaps_mini_imagenet

    out = np.array([overlaps_mini_imagenet(key) for key in drawings.extra["key"].tolist()], bool)
    return _without(drawings, out, "overlap with mini-ImageNet's test classes")


def _repacked(drawings: StrokeDataset, sketches: list[Sketch]) -> StrokeDataset:
    """`drawings` with its i-th replaced by the i-th of `sketches`."""
    return StrokeDataset.from_sketches(
        sketches,
        drawings.labels,
        drawings.class_names,
        skipped=drawings.skipped,
        info=drawings.info,
        extra=drawings.extra,
    )


def split_classes(class_names: list[str], held_out: float, seed: int) -> tuple[list[str], list[str]]:
    """(training, held-out) class names: a seeded draw that depends on the names and not on their order."""
    count = len(set(class_names))
    away = min(max(round(held_out * count), 1), count - 1) if held_out > 0 else 0
    return class_split(class_names, train=count - away, seed=seed)


def usable_drawings(
    drawings: StrokeDataset, class_names: list[str], config: SketchEncoderConfig
) -> StrokeDataset:
    """The drawings of `class_names` of 2 to max_length + 1 points and any extent, simplified as configured.

    Labels and class names stay as they were; what is left out of these classes is counted in `skipped`.
    """
    wanted = [index for index, name in enumerate(drawings.class_names) if name in set(class_names)]
    of_classes = drawings.subset(np.isin(drawings.labels, wanted))
    extended = _with_extent(of_classes)
    if config.simplify_tolerance > 0:
        extended = _with_extent(_simplified(extended, config.simplify_tolerance))
    kept = extended.subset(extended.lengths <= config.max_length + 1)
    if not len(kept):
        raise ValueError(
            f"data must hold drawings of 2 to {config.max_length + 1} points, got none among {len(drawings)}"
        )
    left_out = {
        "without extent": len(of_classes) - len(extended),
        f"longer than {config.max_length} offsets": len(extended) - len(kept),
    }
    skipped = dict(drawings.skipped)
    add_counts(skipped, {reason: count for reason, count in left_out.items() if count})
    return replace(kept, skipped=skipped)


def _with_extent(drawings: StrokeDataset) -> StrokeDataset:
    """The drawings of two points or more that do not all coincide."""
    drawings = drawings.subset(drawings.lengths >= 2)
    return drawings.subset(_extents(drawings) > 0) if len(drawings) else drawings


def _simplified(drawings: StrokeDataset, tolerance: float) -> StrokeDataset:
    extents = _extents(drawings).tolist()
    sketches = [simplify(drawings[index][0], tolerance * extent) for index, extent in enumerate(extents)]
    return _repacked(drawings, sketches)


def _extents(drawings: StrokeDataset) -> NDArray[np.float32]:
    """The longer side of each drawing's bounding box [N]; none may be empty."""
    starts = drawings.offsets[:-1]
    low, high = (bound.reduceat(drawings.points, starts, axis=0) for bound in (np.minimum, np.maximum))
    return (high - low).max(axis=1)


def _offset_deviation(drawings: StrokeDataset) -> float:
    """Standard deviation of all offsets, both axes, in sides of each drawing's bounding box."""
    row = np.repeat(np.arange(len(drawings)), drawings.lengths)
    within = row[1:] == row[:-1]
    offsets = np.diff(drawings.points, axis=0)[within] / _extents(drawings)[row[1:][within], None]
    return float(offsets.std(dtype=np.float64))


class SketchEncoder(Method):
    """An encoder of images to a Gaussian code z, trained on drawings: what the networks compared share."""

    Config = SketchEncoderConfig
    config: SketchEncoderConfig
    offset_scale: Tensor
    steps_trained: Tensor
    training_drawings: Tensor
    training_classes: Tensor

    def __init__(self, config: SketchEncoderConfig) -> None:
        super().__init__(config)
        self.takes_colour = config.image_channels == 3
        self.encoder = ENCODERS[config.encoder](config.image_channels)
        self.to_latent = nn.Linear(self.encoder.features, 2 * config.latent_size)
        #: standard deviation of the training set's offsets, in sides of the bounding box
        self.register_buffer("offset_scale", torch.ones(()))
        # what a table of results must say of the training; in the checkpoint with the weights
        for name in ("steps_trained", "training_drawings", "training_classes"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    @classmethod
    def preset(cls, name: str) -> Any:
        """The config of the preset `name`: the same data, batches and learning rates for every network."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        if name == "paper":
            return cls.Config()
        short = cls.Config(lr_decay_steps=0, simplify_tolerance=0.02)
        if name == "small":
            return replace(short, steps=4000, batch_size=64, learning_rate=2e-3, max_length=40)
        return replace(short, steps=3, batch_size=8, max_length=24, drawings_per_class=8)

    # ---- data ----------------------------------------------------------------------------------------------

    def train_data(self, data: DataSpec) -> StrokeBatches:
        """The drawings of the training classes, with their photos if those are the input.

        Also measures `offset_scale` on them.
        """
        config = self.config
        if config.image_channels == 3 and data.name not in PHOTO_DATA:
            raise ValueError(
                f"data must be one with photos ({', '.join(PHOTO_DATA)}) where image_channels is 3, "
                f"got {data.name!r}"
            )
        drawings = read_drawings(data, config.drawings_per_class or None)
        if data.name == "sketchy" and not config.keep_overlap:
            drawings = without_overlap(drawings)
        names, _ = split_classes(drawings.class_names, config.held_out_classes, config.split_seed)
        drawings = usable_drawings(drawings, names, config)
        photos = None
        if config.image_channels == 3:
            drawings, photos = read_photos(data, drawings, config.image_size)
        self.offset_scale.fill_(_offset_deviation(drawings))
        self.training_drawings.fill_(len(drawings))
        self.training_classes.fill_(len(np.unique(drawings.labels)))
        if photos is None:
            return StrokeBatches(drawings, config.max_length + 1)
        return PhotoStrokeBatches(drawings, photos, config.max_length + 1)

    # ---- network -------------------------------------------------------------------------------------------

    def to_pixels(self, points: Tensor) -> Tensor:
        """Points in sides of the bounding box, box centred on 0, to pixels: centred, the box padded."""
        size = self.config.image_size
        padding = 2 * round(size / 10)
        return points * (size - padding) + (size - 1) / 2

    def render(self, batch: Batch) -> Tensor:
        """The drawings as images [B, 1, S, S], ink = 1."""
        points = self.to_pixels(batch.points)
        size = self.config.image_size
        return rasterize(points, batch.pen_down, size, lengths=batch.lengths, impl=self.config.impl)[:, None]

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of z, each [B, latent_size]."""
        mean, log_variance = self.to_latent(self.encoder(images)).chunk(2, dim=-1)
        return mean, log_variance

    def inputs(self, batch: Batch) -> Tensor:
        """What the encoder sees of a batch: [B, image_channels, S, S] in [0, 1], ink = 1 or RGB."""
        return batch.photos / 255.0 if isinstance(batch, PhotoStrokeBatch) else self.render(batch)

    @staticmethod
    def sample_code(mean: Tensor, log_variance: Tensor) -> Tensor:
        """A reparameterised draw of z [B, latent_size]."""
        return mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)

    def count_step(self, step: int) -> None:
        """Note that training step `step`, counted from 0, was taken."""
        if self.training:
            self.steps_trained.copy_(self.scheduled(step)["steps_trained"])

    # ---- training ------------------------------------------------------------------------------------------

    def schedule(self, step: int) -> dict[str, float]:
        return {"steps_trained": step + 1}

    def graph_key(self, step: int) -> Hashable:
        return "same each step"

    def optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Adam, its rate decaying continuously by lr_decay each lr_decay_steps."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.config.learning_rate)
        gamma = self.config.lr_decay ** (1 / self.config.share_of_steps("lr_decay_steps"))
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)

    # ---- use -----------------------------------------------------------------------------------------------

    def fit_images(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] of any size as the encoder takes them: image_size a side, ink alone or RGB."""
        if self.takes_colour:
            return sized_rgb(images, self.config.image_size)
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}")
        if images.dim() != 4:
            raise ValueError(f"images must have shape [B, C, H, W], got {tuple(images.shape)}")
        images = images.mean(dim=1, keepdim=True)
        size = (self.config.image_size, self.config.image_size)
        if images.shape[2:] == size:
            return images
        return F.interpolate(images, size, mode="bilinear", antialias=True)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """The mean of z [B, latent_size] of images [B, C, H, W] in [0, 1], ink = 1, resized where needed."""
        return self.encode(self.fit_images(images))[0]

    def generate(self, z: Tensor, *, temperature: float = 0.0, seed: int = 0) -> Tensor:
        """Pictures [B, S, S] in [0, 1], ink = 1, decoded from codes z [B, latent_size].

        Temperature 0 gives the most likely picture; above it one is drawn, the same for one seed, where the
        decoder has something to draw. NotImplementedError for a network that cannot generate.
        """
        raise NotImplementedError(f"{type(self).__name__} has no decoder: it cannot generate from codes")

    def check_codes(self, z: Tensor) -> None:
        """TypeError or ValueError unless z is [B, latent_size] and floating point."""
        if not z.is_floating_point():
            raise TypeError(f"z must be floating point, got {z.dtype}")
        if z.dim() != 2 or z.shape[1] != self.config.latent_size:
            raise ValueError(f"z must have shape [B, {self.config.latent_size}], got {tuple(z.shape)}")


class SketchEmbedNet(SketchEncoder):
    """Encoder, Gaussian code, HyperLSTM decoder with a mixture density head; learns images by drawing them.

    The defaults are the paper's run on QuickDraw. Its run on natural images: --data sketchy --root DIR
    --image-channels 3 --image-size 84 --encoder resnet12 --max-length 100 --batch-size 64 --alpha-max 0.75
    --simplify-tolerance 0.02 --held-out-classes 0.08
    """

    Config = SketchEmbedNetConfig
    config: SketchEmbedNetConfig

    def __init__(self, config: SketchEmbedNetConfig) -> None:
        super().__init__(config)
        hidden, hyper, latent = config.hidden_size, config.hyper_size, config.latent_size
        self.to_state = nn.Linear(latent, 2 * (hidden + hyper))
        self.decoder = sketchnn.HyperLSTM(
            5 + latent,
            hidden,
            hyper,
            config.embed_size,
            recurrent_dropout=config.recurrent_dropout,
            impl=config.impl,
        )
        self.head = nn.Linear(hidden, mixture.output_size(config.mixture_components))

    @classmethod
    def preset(cls, name: str) -> SketchEmbedNetConfig:
        shared: SketchEmbedNetConfig = super().preset(name)
        if name == "small":
            return replace(
                shared,
                # in a short run the pixel loss costs accuracy at first: it comes later and stays smaller
                alpha_interval=400,
                alpha_max=0.25,
                hidden_size=256,
                hyper_size=64,
                embed_size=16,
                mixture_components=20,
            )
        if name == "tiny":
            return replace(
                shared, alpha_interval=0, hidden_size=16, hyper_size=8, embed_size=4, mixture_components=3
            )
        return shared

    # ---- network -------------------------------------------------------------------------------------------

    def initial_state(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden, hyper = self.config.hidden_size, self.config.hyper_size
        h, c, hyper_h, hyper_c = torch.tanh(self.to_state(z)).split((hidden, hidden, hyper, hyper), dim=-1)
        return h, c, hyper_h, hyper_c

    def decode(self, y: Tensor, z: Tensor) -> Tensor:
        """The head's output [T, B, 3 + 6 M] on what follows each of y [B, T, 5] (teacher forcing)."""
        out, _ = self.decoder(y.transpose(0, 1), self.initial_state(z), context=z)
        return self.head(out)

    # ---- loss ----------------------------------------------------------------------------------------------

    def alpha(self, step: int) -> float:
        """Weight of the pixel loss at training step `step`, counted from 0."""
        config = self.config
        return min(
            config.alpha_max, config.alpha_step * ((step + 1) // config.share_of_steps("alpha_interval"))
        )

    def schedule(self, step: int) -> dict[str, float]:
        return {**super().schedule(step), "alpha": self.alpha(step)}

    def graph_key(self, step: int) -> Hashable:
        return self.has_pixel_loss(step)

    def has_pixel_loss(self, step: int) -> bool:
        """Whether the pixel loss is part of the loss at `step`."""
        return self.alpha(step) > self.config.pixel_loss_above

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """L = L_pen + (1 - alpha) L_stroke + alpha L_pixel (Eq. 2), each a mean over batch and time.

        As in the authors' code the pen loss counts the padding, and the stroke loss, zero there, is divided
        by all T as well.
        """
        y = stroke5(batch, self.offset_scale)
        z = self.sample_code(*self.encode(self.inputs(batch)))
        predicted = self.decode(y[:, :-1], z)
        pen, stroke = mixture_loss(predicted, y[:, 1:].transpose(0, 1), impl=self.config.impl)
        alpha = self.scheduled(step)["alpha"]
        losses = {"loss": pen + (1 - alpha) * stroke, "pen": pen, "stroke": stroke}
        if self.has_pixel_loss(step):
            losses["pixel"] = self.pixel_loss(predicted, batch)
            losses["loss"] = losses["loss"] + alpha * losses["pixel"]
        losses["alpha"] = alpha
        self.count_step(step)
        return losses

    def pixel_loss(self, predicted: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of the blurred rasters of prediction (the head's output) and drawing (Eqs. 5 and 6).

        Two-sided, as in the authors' code. The prediction runs through samples of the likeliest component,
        from the drawing's own first point and at the drawing's scale.
        """
        best = mixture.likeliest_of(predicted)
        noise = torch.randn(*best.mean_x.shape, 2, dtype=best.mean_x.dtype, device=best.mean_x.device)
        offsets = mixture.sample_gaussian(best, noise).transpose(0, 1) * self.offset_scale
        points = torch.cumsum(torch.cat((batch.points[:, :1], offsets), dim=1), dim=1)
        pens = torch.softmax(predicted[..., :3].detach().float(), dim=-1)[..., PEN_DOWN].transpose(0, 1) > 0.5
        pens = torch.cat((batch.pen_down[:, :1], pens), dim=1)
        return raster_bce(
            self.to_pixels(points),
            pens,
            (self.to_pixels(batch.points), batch.pen_down),
            size=self.config.image_size,
            target_lengths=batch.lengths,
            blur_sigma=2.0,
            blur_taps=5,
            impl=self.config.impl,
        ).mean()

    # ---- use -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(self, images: Tensor, *, temperature: float = 0.0, seed: int = 0) -> list[Sketch]:
        """Sketches in pixels of the image_size canvas, centred and scaled to it, drawn from the mean of z.

        Temperature 0 takes the most likely point each time; above it points are drawn, the same for one seed.
        """
        points, pens, lengths = self.draw_strokes(images, temperature=temperature, seed=seed)
        arrays = zip(points.cpu().numpy(), pens.cpu().numpy(), lengths.tolist(), strict=True)
        return [Sketch(xy[:n].copy(), pen[:n].copy()) for xy, pen, n in arrays]

    def draw_strokes(
        self, images: Tensor, *, temperature: float = 0.0, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `draw` draws as tensors: points [B, T + 1, 2] in pixels, pen_down [B, T + 1], lengths [B]."""
        z = self.encode(self.fit_images(images))[0]
        return self.decode_strokes(z, temperature=temperature, seed=seed)

    @torch.no_grad()
    def generate(self, z: Tensor, *, temperature: float = 0.0, seed: int = 0) -> Tensor:
        """Pictures [B, S, S] in [0, 1], ink = 1, of the sketches decoded from codes z [B, latent_size]."""
        points, pens, lengths = self.decode_strokes(z, temperature=temperature, seed=seed)
        return rasterize(points, pens, self.config.image_size, lengths=lengths, impl=self.config.impl)

    def decode_strokes(
        self, z: Tensor, *, temperature: float = 0.0, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sketches that codes z [B, latent_size] stand for, as `draw_strokes` gives them."""
        self.check_codes(z)
        generator = torch.Generator(z.device).manual_seed(seed)
        state, context = self.initial_state(z), self.decoder.project(z)
        y = z.new_tensor([0.0, 0.0, 1.0, 0.0, 0.0]).expand(len(z), 5)
        ended = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        rows, alive = [y], [~ended]
        for step in range(self.config.max_length):
            out, state = self.decoder(y[None], state, context=context, step_offset=step)
            offset, pen = mixture.sample(mixture.parse_mixture(self.head(out[0])), temperature, generator)
            ended = ended | (pen == PEN_END)
            y = torch.cat((offset, F.one_hot(pen, 3).to(offset.dtype)), dim=-1)
            y = torch.where(ended[:, None], y.new_tensor([0.0, 0.0, 0.0, 0.0, 1.0]), y)
            rows.append(y)
            alive.append(~ended)
        sequence = torch.stack(rows, dim=1)
        lengths = torch.stack(alive, dim=1).sum(dim=1)
        # from the last point the pen leads nowhere
        inside = torch.arange(sequence.shape[1], device=z.device)[None] < lengths[:, None] - 1
        pens = (sequence[..., 2 + PEN_DOWN] > 0.5) & inside
        return self._centre(torch.cumsum(sequence[..., :2], dim=1)), pens, lengths

    def _centre(self, points: Tensor) -> Tensor:
        """Points scaled and centred by their own box, in pixels; what has no extent is centred only."""
        low, high = points.amin(dim=1, keepdim=True), points.amax(dim=1, keepdim=True)
        extent = (high - low).amax(dim=2, keepdim=True)
        return self.to_pixels((points - (low + high) / 2) / torch.where(extent > 0, extent, 1.0))

    @torch.no_grad()
    def pictures(self, batch: Batch, count: int = 8) -> dict[str, Tensor]:
        """Input image, the drawing's blur as the pixel loss sees it, and what the model draws."""
        batch = type(batch)(*(part[:count] for part in batch))
        images = self.inputs(batch)
        training = self.training
        self.eval()
        points, pens, lengths = self.draw_strokes(images)
        self.train(training)
        size, impl = self.config.image_size, self.config.impl
        return {
            "input": images if self.takes_colour else images[:, 0],
            "target": rasterize(
                self.to_pixels(batch.points),
                batch.pen_down,
                size,
                lengths=batch.lengths,
                blur_sigma=2.0,
                impl=impl,
            ),
            "drawn": rasterize(points, pens, size, lengths=lengths, impl=impl),
        }


# ---- what the paper's protocols share ----------------------------------------------------------------------


def embed_images(
    method: SketchEncoder, images: NDArray[np.uint8], batch_size: int = 512
) -> NDArray[np.float32]:
    """Embeddings [N, D] of images, computed in evaluation mode on the method's device.

    images: ink [N, H, W], dark on white to a network that takes colour; or RGB [N, H, W, 3].
    """
    device, training = method.offset_scale.device, method.training
    method.eval()
    parts = []
    for start in range(0, len(images), batch_size):
        pixels = torch.from_numpy(images[start : start + batch_size]).to(device).float() / 255
        if pixels.dim() == 4:
            pixels = pixels.permute(0, 3, 1, 2)
        elif method.takes_colour:
            pixels = (1 - pixels)[:, None].expand(-1, 3, -1, -1)
        else:
            pixels = pixels[:, None]
        parts.append(method.embed(pixels).cpu())
    method.train(training)
    return torch.cat(parts).numpy()


def _held_out_names(config: SketchEncoderConfig, drawings: StrokeDataset) -> list[str]:
    """Names of the classes kept out of training; ValueError where there are none."""
    _, names = split_classes(drawings.class_names, config.held_out_classes, config.split_seed)
    if not names:
        raise ValueError(
            f"held_out_classes must leave a class to evaluate on, got {config.held_out_classes!r}"
        )
    return names


def held_out_photos(method: SketchEncoder, data: DataSpec, per_class: int, seed: int) -> LabelledImages:
    """Photos of the classes kept out of training, RGB [N, S, S, 3], at most `per_class` of each."""
    drawings, photos = read_photos(data, read_drawings(data), method.config.image_size)
    names = _held_out_names(method.config, drawings)
    _, first = np.unique(drawings.extra["photo"], return_index=True)  # each photo once
    drawings = drawings.subset(first)
    wanted = [index for index, name in enumerate(drawings.class_names) if name in set(names)]
    drawings = _at_most(drawings.subset(np.isin(drawings.labels, wanted)), per_class, seed)
    images = photos[drawings.extra["photo"]].transpose(0, 2, 3, 1)
    return LabelledImages(np.ascontiguousarray(images), drawings.labels, drawings.class_names)


def held_out_images(
    method: SketchEncoder, drawings: StrokeDataset, per_class: int, seed: int
) -> LabelledImages:
    """Rendered drawings of the classes kept out of training, at most `per_class` of each."""
    config = method.config
    drawings = usable_drawings(drawings, _held_out_names(config, drawings), config)
    return rendered_images(method, _at_most(drawings, per_class, seed))


def rendered_images(method: SketchEncoder, drawings: StrokeDataset) -> LabelledImages:
    """Usable drawings as images [N, S, S] of the network's size, rendered on its device."""
    batches, images = StrokeBatches(drawings, method.config.max_length + 1), []
    for start in range(0, len(batches), 512):
        batch = batches.strokes(list(range(start, min(start + 512, len(batches)))))
        images.append(
            method.render(StrokeBatch(*(part.to(method.offset_scale.device) for part in batch))).cpu()
        )
    pixels = (torch.cat(images)[:, 0] * 255).round().to(torch.uint8).numpy()
    return LabelledImages(pixels, drawings.labels, drawings.class_names)


#: What the paper trains on, by channels of the input.
PAPER_DATA = {
    1: "QuickDraw, 300 classes of 70,000",
    3: "Sketchy, 75,471 drawings of 125 classes less mini-ImageNet's",
}


def paper_config(config: SketchEncoderConfig) -> SketchEncoderConfig:
    """The paper's run with an input of so many channels: on QuickDraw, or on Sketchy's photos."""
    paper = type(config)()
    if config.image_channels == 1:
        return paper
    return replace(paper, **{name: value for name, value in SKETCHY_RUN.items() if hasattr(paper, name)})


def training_facts(method: SketchEncoder) -> str:
    """What was trained, and in which of its settings it differs from the paper's run."""
    config, paper = method.config, paper_config(method.config)
    names = (
        "batch_size",
        "learning_rate",
        "alpha_max",
        "hidden_size",
        "hyper_size",
        "embed_size",
        "mixture_components",
        "max_length",
        "simplify_tolerance",
        "image_size",
        "image_channels",
        "latent_size",
        "recurrent_dropout",
        "pixel_loss_above",
        "kl_weight",
        "keep_overlap",
    )
    different = [
        f"{name} {getattr(config, name)} (paper {getattr(paper, name)})"
        for name in ("encoder", *names)
        if getattr(config, name, None) != getattr(paper, name, None)
    ]
    facts = (
        f"Trained {int(method.steps_trained)} steps (paper {paper.steps}) on {int(method.training_drawings)} "
        f"drawings of {int(method.training_classes)} classes (paper: {PAPER_DATA[config.image_channels]})."
    )
    return f"{facts} Other sizes: {', '.join(different)}." if different else facts


#: method -> its name in the paper's tables, in their order
NETWORKS = {"conv_vae": "Conv-VAE", "contrastive": "Contrastive", "sketchembednet": "SketchEmbedNet"}


def compared_networks(
    method: Method,
    untrained: Method | None,
    *,
    conv_vae: Method | None = None,
    contrastive: Method | None = None,
    sketchembednet: Method | None = None,
) -> dict[str, SketchEncoder]:
    """The networks given by name, in the order of the paper's tables.

    ValueError where a run is of another method than its flag names, or of the same as `method`.
    """
    from . import METHODS

    kinds = {flag: METHODS[flag] for flag in NETWORKS}
    own = type(method).__name__
    if own not in kinds.values():
        raise ValueError(f"method must be one of {', '.join(kinds.values())}, got {own}")
    found: dict[str, Any] = {} if untrained is None else {"untrained": untrained}
    given = {"conv_vae": conv_vae, "contrastive": contrastive, "sketchembednet": sketchembednet}
    for flag, run in given.items():
        kind = kinds[flag]
        if run is not None and type(run).__name__ != kind:
            raise ValueError(f"{flag} must be a run of {kind}, got one of {type(run).__name__}")
        if run is not None and own == kind:
            raise ValueError(f"{flag} must be left out: the run evaluated is one itself")
        if own == kind or run is not None:
            found[NETWORKS[flag]] = method if run is None else run
    return found


def trained_networks(networks: Mapping[str, SketchEncoder]) -> dict[str, SketchEncoder]:
    """Those of `compared_networks` that were trained."""
    return {name: network for name, network in networks.items() if name != "untrained"}


def networks_facts(networks: Mapping[str, SketchEncoder]) -> str:
    """What each of the networks was trained on and how, in which the paper's are others."""
    names: dict[str, list[str]] = {}
    for name, network in trained_networks(networks).items():
        where = "" if network.trained_on is None else f" ({network.trained_on})"
        names.setdefault(training_facts(network), []).append(name + where)
    return " ".join(f"{', '.join(alike)}: {facts}" for facts, alike in names.items())


# what the protocols need is defined above; importing them puts them into SketchEncoder.protocols
from . import sketchembednet_figures, sketchembednet_protocols  # noqa: E402, F401
