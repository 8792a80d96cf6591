"""PM-JDOT: sketch-based image retrieval learned without labels and without sketch-photo pairs.

Hu, Yang, Li, Hospedales, Song: "Towards Unsupervised Sketch-based Image Retrieval", BMVC 2022
(arXiv 2105.08237). One network embeds sketches and photos. SwAV's swapped prediction makes the features
semantic; joint-distribution optimal transport aligns the two domains, each with the same trainable
prototypes, over a memory bank of recent features. The authors published no code: what the paper leaves out
takes SwAV's defaults, and is a field of the config.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..models.backbones import Pixels, create_backbone, load_backbone
from ..models.views import ViewSettings, random_view
from ..ops._contract import check_integer, check_number, full_precision
from ..ops.sinkhorn import sinkhorn, swav_assign
from .base import (
    PRESETS,
    DataSpec,
    Method,
    Table,
    TrainConfig,
    as_tensor,
    different_settings,
    embed_images,
    sized_rgb,
)

if TYPE_CHECKING:
    from ..data.images import ImageSet, RetrievalSplit, SketchPhotoSet


class Variant(NamedTuple):
    """A row of Table 3: which of the three parts are on."""

    jdot: bool
    prototypes: bool
    memory_bank: bool


VARIANTS = {
    "v1": Variant(jdot=False, prototypes=False, memory_bank=False),
    "v2": Variant(jdot=True, prototypes=False, memory_bank=False),
    "v3": Variant(jdot=True, prototypes=True, memory_bank=False),
    "v4": Variant(jdot=True, prototypes=False, memory_bank=True),
    "v5": Variant(jdot=True, prototypes=True, memory_bank=True),
}


@dataclass(frozen=True)
class PMJDOTConfig(TrainConfig):
    """The paper's unsupervised run on Sketchy-Extended (sections 4.1 and 4.2.1)."""

    steps: int = 60_000
    """optimiser steps; the paper does not say how many"""
    batch_size: int = 128
    """sketches a step, and as many photos, over all ranks"""
    learning_rate: float = 0.01
    """initial learning rate"""
    lr_factor: float = 0.5
    """factor on the learning rate each lr_epochs"""
    lr_epochs: float = 10.0
    """epochs between two falls of the rate; an epoch is one pass over the larger of the two domains"""
    optimizer: str = "sgd"
    """sgd, SwAV's, or adamw; the paper leaves it out"""
    momentum: float = 0.9
    """momentum of sgd; SwAV's"""
    weight_decay: float = 1e-6
    """weight decay; SwAV's"""
    variant: str = "v5"
    """row of Table 3: v1 SwAV alone, v2 JDOT between two batches, v3 with prototypes, v4 with memory banks,
    v5 with both"""
    backbone: str = "resnet50"
    """feature extractor: the name of any timm model"""
    weights: str = "random"
    """start of the backbone: random, timm (timm's own for this name, from the network), or a file of weights;
    the paper starts from SwAV's ResNet-50"""
    head: str = "linear"
    """projection to the features: linear, or mlp (SwAV's public code: a hidden layer, batch norm, ReLU)"""
    feature_size: int = 128
    """size of a feature, which has length 1"""
    freeze_batch_norm: bool = False
    """keep the batch norms' running statistics, as after pre-training"""
    image_size: int = 96
    """side of the images the network sees, in pixels"""
    source_size: int = 0
    """side at which images are held and views cut from them; 0 takes image_size"""
    crop_scale: tuple[float, float] = (0.14, 1.0)
    """share of the area that a view shows, from and to; SwAV's"""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """aspect ratio of what a view shows, from and to"""
    flip: float = 0.5
    """probability that a view is mirrored"""
    jitter: float = 1.0
    """strength of a photo view's change of colours, 0 for none; SwAV's"""
    grey: float = 0.2
    """probability that a photo view is grey; SwAV's. 1: the network never sees colour, nor does it after
    training"""
    blur: float = 0.5
    """probability that a view is blurred; SwAV's"""
    invert: float = 0.0
    """probability that a view is a negative; not SwAV's, nor the paper's"""
    standardise: bool = False
    """scale each image to mean 0 and variance 1 instead of ImageNet's mean and variance; not the paper's"""
    prototypes: int = 125
    """K, how many prototypes; the paper takes as many as there are training classes"""
    kmeans: bool = True
    """start the prototypes at the k-means centroids of the photos' features; without, at random"""
    align_after: int = 0
    """steps of SwAV alone, in every variant; then the k-means start, and the alignment enters. It stands in
    for SwAV's pre-trained weights where there are none"""
    freeze_prototypes: int = 0
    """first steps in which the prototypes stay as they are"""
    temperature: float = 0.1
    """tau of the cluster probabilities (Eq. 2); SwAV's"""
    assign_epsilon: float = 0.05
    """epsilon of the cluster assignments (Eq. 3); SwAV's"""
    assign_iterations: int = 3
    """Sinkhorn iterations of the cluster assignments; SwAV's"""
    queue_size: int = 3840
    """features in the queue of the cluster assignments, beside the batch; 0 for none; SwAV's"""
    queue_start: int = 0
    """step from which the queue takes part, once it is full"""
    bank_size: int = 3840
    """E, features in each memory bank, the batch among them"""
    plan_epsilon: float = 0.005
    """lambda of the transport plans (Eq. 5); not in the paper: SwAV's epsilon at the scale of alpha"""
    plan_iterations: int = 100
    """most Sinkhorn iterations of a plan"""
    plan_tolerance: float = 1e-3
    """error of the row sums at which a plan is done"""
    alpha: float = 0.1
    """weight of the distance of features (Eqs. 7 and 8)"""
    beta: float = 0.001
    """weight of the distance of labels (Eqs. 7 and 8)"""
    mu: float = 1.0
    """weight of the semantic loss (Eq. 9)"""
    nu: float = 10.0
    """weight of the alignment loss (Eq. 9)"""
    split: str = "unsupervised"
    """what is kept out of training: unsupervised, some sketches of each class as queries; zero_shot, whole
    classes"""
    queries_per_class: int = 50
    """sketches of each class kept as queries; 50 on Sketchy-Extended, 10 on TUBerlin-Extended"""
    test_classes: str = "sketchy-21"
    """classes kept out of zero_shot training: a list of data/splits.py (sketchy-21 and tuberlin-30 are the
    paper's protocols), random-<count>-seed<seed>, or names joined by commas"""
    split_seed: int = 0
    """seed of the choice of queries"""
    instances: int = 70
    """of the procedural data: instances a class, each a sketch and a photo"""
    classes: int = 0
    """of the procedural data: how many classes; 0 takes all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("variant", tuple(VARIANTS)),
            ("head", ("linear", "mlp")),
            ("optimizer", ("sgd", "adamw")),
            ("split", ("unsupervised", "zero_shot")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("feature_size", "assign_iterations", "bank_size", "plan_iterations", "instances"):
            check_integer(name, getattr(self, name), 1)
        for name in (
            "source_size",
            "align_after",
            "freeze_prototypes",
            "queue_size",
            "queue_start",
            "classes",
        ):
            check_integer(name, getattr(self, name), 0)
        check_integer("image_size", self.image_size, 16)
        check_integer("prototypes", self.prototypes, 2)
        check_integer("queries_per_class", self.queries_per_class, 1)
        check_integer("split_seed", self.split_seed, 0)
        for name in ("temperature", "assign_epsilon", "plan_epsilon", "lr_epochs"):
            check_number(name, getattr(self, name), above=0)
        for name in ("weight_decay", "alpha", "beta", "mu", "nu", "plan_tolerance"):
            check_number(name, getattr(self, name), at_least=0)
        if not 0 <= check_number("momentum", self.momentum) < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum!r}")
        if not 0 < check_number("lr_factor", self.lr_factor) <= 1:
            raise ValueError(f"lr_factor must lie in (0, 1], got {self.lr_factor!r}")
        if self.parts.memory_bank and self.bank_size < self.batch_size:
            raise ValueError(
                f"bank_size must be at least batch_size, {self.batch_size}: the batch is a part of the bank, "
                f"got {self.bank_size}"
            )
        _ = self.views

    @property
    def parts(self) -> Variant:
        """Which of the paper's three parts the variant has."""
        return VARIANTS[self.variant]

    @property
    def views(self) -> ViewSettings:
        """The strength of the two views."""
        return ViewSettings(**{field.name: getattr(self, field.name) for field in fields(ViewSettings)})


# ---- data --------------------------------------------------------------------------------------------------


class ImageBatch(NamedTuple):
    """As many sketches as photos, without labels; row i of one has nothing to do with row i of the other."""

    sketches: Tensor
    """[B, 3, S, S] uint8 RGB"""
    photos: Tensor
    """[B, 3, S, S] uint8 RGB"""


class SketchPhotoBatches(torch.utils.data.Dataset):
    """Sketches and photos of the training set, labels left behind; a batch is two gathers.

    An epoch is one pass over the larger domain; beside each of its images stands one of the smaller domain,
    each of those equally often, give or take one. Item i is the i-th of a fixed shuffle of either domain,
    which draws from neither order nor labels: readers give images sorted by class.
    """

    def __init__(self, data: SketchPhotoSet) -> None:
        self.sketches, self.photos = data.sketches.images, data.photos.images
        for name, images in (("sketches", self.sketches), ("photos", self.photos)):
            if not len(images):
                raise ValueError(f"data must hold {name} to train on, got none")
        self.length = max(len(self.sketches), len(self.photos))
        self.rows = {
            name: np.random.default_rng(seed).permutation(self.length) % len(images)
            for seed, (name, images) in enumerate((("sketches", self.sketches), ("photos", self.photos)))
        }
        self.skipped = dict(data.skipped)
        self.fingerprint = data.fingerprint()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> ImageBatch:
        return ImageBatch(*(part[0] for part in self.__getitems__([index])))

    def __getitems__(self, indices: list[int]) -> ImageBatch:
        at = np.asarray(indices, dtype=np.int64)
        return ImageBatch(
            as_tensor(self.sketches[self.rows["sketches"][at]]),
            as_tensor(self.photos[self.rows["photos"][at]]),
        )


DATA_NAMES = ("procedural", "sketch_photo", "sketchy", "sketchy_extended", "tuberlin_extended")


def read_images(data: DataSpec, config: PMJDOTConfig) -> SketchPhotoSet:
    """Sketches and photos of the data set `data` names, `source_size` a side; ValueError if unknown."""
    size = config.source_size or config.image_size
    if data.name == "procedural":
        from ..data.procedural import procedural_sketch_photo

        return procedural_sketch_photo(config.instances, size=size, classes=config.classes or None)
    if data.name not in DATA_NAMES:
        raise ValueError(f"data must be one of {', '.join(DATA_NAMES)}, got {data.name!r}")
    if data.root is None:
        raise ValueError(f"root must be the folder that holds {data.name}, got None")
    if data.name == "sketch_photo":
        from ..data.sketch_photo import load_sketch_photo

        return load_sketch_photo(data.root, size=size)
    if data.name == "tuberlin_extended":
        from ..data.tuberlin import load_tuberlin_extended

        return load_tuberlin_extended(data.root, size=size)
    from ..data.sketchy import load_sketchy

    return load_sketchy(data.root, size=size, extended=data.name == "sketchy_extended")


def read_split(data: DataSpec, config: PMJDOTConfig) -> RetrievalSplit:
    """The data set cut into training set, queries and gallery, by the config's fields alone."""
    images = read_images(data, config)
    if config.split == "unsupervised":
        return images.split_unsupervised(config.queries_per_class, seed=config.split_seed)
    return images.split_zero_shot(test_classes(config.test_classes, images.class_names))


def test_classes(wanted: str, class_names: list[str]) -> list[str]:
    """The zero-shot test classes that the config's `test_classes` means among `class_names`."""
    from ..data.splits import zero_shot_test_classes

    names = [name.strip() for name in wanted.split(",")]
    unknown = [name for name in names if name not in class_names]
    if not unknown:
        return names
    if len(unknown) < len(names):  # some are classes: no name of a list
        raise ValueError(f"test_classes must be classes of the data, got {wanted!r} with {unknown[0]!r}")
    try:
        return zero_shot_test_classes(wanted, class_names)
    except ValueError as error:
        raise ValueError(
            f"test_classes must be classes of the data joined by commas, or a list of data/splits.py: {error}"
        ) from error


# ---- transport ---------------------------------------------------------------------------------------------


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """d_f = 1 - cos [.., n, m] of features [.., n, D] and [.., m, D] of length 1."""
    return 1 - x @ y.mT


def label_distance(p: Tensor, q: Tensor) -> Tensor:
    """d_l, the squared Euclidean distance [.., n, m] of labels or probabilities [.., n, K] and [.., m, K]."""
    squares = p.square().sum(-1)[..., :, None] + q.square().sum(-1)[..., None, :]
    return (squares - 2 * p @ q.mT).clamp(min=0)


class PMJDOT(Method):
    """Sketch-based image retrieval learned without labels and without sketch-photo pairs (Hu et al. 2022).

    A backbone and a projection to features of length 1, prototypes, the queue of SwAV and two memory banks.
    """

    Config = PMJDOTConfig
    config: PMJDOTConfig
    takes_colour = True
    queue: Tensor
    banks: Tensor
    filled: Tensor
    steps_trained: Tensor
    training_images: Tensor

    def __init__(self, config: PMJDOTConfig) -> None:
        super().__init__(config)
        size, parts = config.feature_size, config.parts
        self.backbone = create_backbone(config.backbone)
        width: int = self.backbone.num_features  # type: ignore[assignment]
        self.head: nn.Module = nn.Linear(width, size)
        if config.head == "mlp":
            self.head = nn.Sequential(
                nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, size)
            )
        # as every view in training
        self.pixels = Pixels(grey=config.grey == 1, standardise=config.standardise)
        #: U, each row of length 1
        self.prototypes = nn.Parameter(F.normalize(torch.randn(config.prototypes, size), dim=1))
        #: newest first, of each of the two views
        self.register_buffer("queue", torch.zeros(2, config.queue_size, size))
        #: newest first, of sketches and of photos
        self.register_buffer("banks", torch.zeros(2, config.bank_size if parts.memory_bank else 0, size))
        #: how many rows of queue and banks hold a feature
        self.register_buffer("filled", torch.zeros(2, dtype=torch.int64))
        # what a table of results must say of the training; in the checkpoint with the weights
        self.register_buffer("steps_trained", torch.zeros((), dtype=torch.int64))
        self.register_buffer("training_images", torch.zeros(2, dtype=torch.int64))
        self._training_photos: NDArray[np.uint8] | None = None
        self._steps_per_epoch: int | None = None

    @classmethod
    def preset(cls, name: str) -> PMJDOTConfig:
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        if name == "paper":
            return PMJDOTConfig()
        if name == "small":
            # From random weights features lie close together and would stay on a line. The k-means centroids
            # of such features nearly coincide, and SwAV alone would first of all cluster by domain: random
            # prototypes, frozen at first, batch norm before the projection, and the alignment from the start.
            return PMJDOTConfig(
                steps=1600,
                batch_size=64,
                learning_rate=0.002,
                optimizer="adamw",  # a third of the steps that sgd needs to the same loss
                backbone="test_resnet",
                head="mlp",
                image_size=48,
                # what a short run learns first is brightness: none of it, nor of colour
                crop_scale=(0.3, 1.0),
                jitter=0.8,
                grey=1.0,
                blur=0.0,
                invert=0.5,
                standardise=True,
                prototypes=32,
                kmeans=False,
                freeze_prototypes=100,
                queue_size=512,
                bank_size=512,
            )
        return PMJDOTConfig(
            steps=3,
            batch_size=8,
            backbone="test_resnet",
            feature_size=16,
            image_size=32,
            prototypes=5,
            align_after=1,
            queue_size=16,
            bank_size=16,
            queries_per_class=2,
            instances=6,
            classes=6,
        )

    # ---- data ----------------------------------------------------------------------------------------------

    def train_data(self, data: DataSpec) -> SketchPhotoBatches:
        """The training part of the split, and the start of the backbone's weights; see `read_split`."""
        batches = SketchPhotoBatches(read_split(data, self.config).train)
        self.training_images.copy_(torch.tensor([len(batches.sketches), len(batches.photos)]))
        self._training_photos = batches.photos
        self._steps_per_epoch = max(1, len(batches) // self.config.batch_size)
        self.load_weights()
        return batches

    def load_weights(self) -> None:
        """Put the configured start weights into the backbone; ValueError where they do not fit it."""
        load_backbone(self.backbone, self.config.backbone, self.config.weights)

    # ---- network -------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> PMJDOT:
        super().train(mode)
        if self.config.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Features x [B, D] of length 1, float32, of images [B, 3, S, S] in [0, 1]."""
        pixels = self.pixels(images)
        return F.normalize(self.head(self.backbone(pixels)).float(), dim=-1)

    def probabilities(self, x: Tensor, prototypes: Tensor) -> Tensor:
        """Cluster probabilities p or y [.., K] of features [.., D] (Eq. 2)."""
        return torch.softmax(x @ prototypes.mT / self.config.temperature, dim=-1)

    @torch.no_grad()
    def renormalise_prototypes(self) -> None:
        """Each prototype back to length 1, as SwAV does before every step."""
        self.prototypes.copy_(F.normalize(self.prototypes, dim=1))

    @torch.no_grad()
    def start_prototypes(self) -> None:
        """The prototypes at the K-means centroids of all training photos' features, network as it is."""
        photos, count = self._training_photos, self.config.prototypes
        if photos is None:
            raise RuntimeError("train_data must be called before the step of the k-means start")
        if len(photos) < count:
            raise ValueError(f"prototypes must be at most the training photos, {len(photos)}, got {count}")
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        x = embed_images(self, photos)
        with threadpool_limits(1):  # threads add up in the order they finish: other last bits each time
            centroids = KMeans(count, n_init=4, random_state=0).fit(x).cluster_centers_
        # the first rank's for all: another machine's features may differ in the last bits
        start = self.gather_rows(torch.as_tensor(centroids).to(self.prototypes))[:count]
        self.prototypes.copy_(F.normalize(start, dim=1))

    # ---- loss ----------------------------------------------------------------------------------------------

    def loss(self, batch: ImageBatch, step: int) -> dict[str, Tensor]:
        """L = mu L_se + nu L_a (Eq. 9), from `align_after` on; before that mu L_se.

        Features of all ranks are gathered, with gradient, and each rank computes the same loss of the whole
        batch. Queue and banks are replicas that take in the same rows everywhere.
        """
        config = self.config
        if step == config.align_after and config.kmeans and self.training:
            self.start_prototypes()
        self.renormalise_prototypes()
        queue_rows, bank_rows = self.filled.tolist()  # before the network: a GPU has nothing to wait for yet
        x = self.two_views(batch)
        with full_precision(x.device.type):
            # frozen: a gradient of 0 and not none, which data-parallel training takes for an error
            prototypes = self.prototypes * (step >= config.freeze_prototypes)
            prototypes = prototypes + self.prototypes.detach() * (step < config.freeze_prototypes)
            use_queue = step >= config.queue_start and 0 < config.queue_size == queue_rows
            semantic = self.semantic_loss(x, prototypes, self.queue if use_queue else self.queue[:, :0])
            losses = {"loss": config.mu * semantic, "semantic": semantic}
            if config.parts.jdot and step >= config.align_after:
                older = self.banks[:, : min(bank_rows, max(config.bank_size - x.shape[2], 0))]
                alignment = self.alignment_loss(x[:, 0], older, prototypes)
                losses |= alignment
                losses["loss"] = losses["loss"] + config.nu * sum(alignment.values())
        if self.training:
            self._remember(x.detach())
            self.steps_trained.fill_(step + 1)
        return losses

    def two_views(self, batch: ImageBatch) -> Tensor:
        """Features [2 domains, 2 views, B, D] of all ranks' images, sketches first, of two views of each."""
        config, count = self.config, len(batch.sketches)
        images = torch.cat((batch.sketches, batch.photos)).repeat(2, 1, 1, 1)
        is_photo = torch.arange(len(images), device=images.device) // count % 2 == 1
        with torch.no_grad(), full_precision(images.device.type):
            views = random_view(images, config.image_size, config.views, colour=is_photo)
        x = self.features(views).view(2, 2, count, -1)  # view, domain
        x = self.gather_rows(x.permute(2, 1, 0, 3))
        return x.permute(1, 2, 0, 3)

    def semantic_loss(self, x: Tensor, prototypes: Tensor, queue: Tensor) -> Tensor:
        """L_se (Eq. 1), a mean over the images of both domains, their domain ignored.

        `x` [2 domains, 2 views, B, D]; `queue` [2 views, Q, D], older features of that view.
        """
        x = x.transpose(0, 1).flatten(1, 2)  # [2 views, 2B, D]
        scores = x @ prototypes.T
        log_p = torch.log_softmax(scores / self.config.temperature, dim=-1)
        with torch.no_grad():
            z = [self.assignments(scores[view], queue[view] @ prototypes.T) for view in range(2)]
        return -(z[1] * log_p[0] + z[0] * log_p[1]).sum(dim=-1).mean()

    def assignments(self, scores: Tensor, queue_scores: Tensor) -> Tensor:
        """z [B, K], rows summing to 1 (Eqs. 3 and 4): the batch's rows of the plan over batch and queue."""
        config = self.config
        z = swav_assign(
            torch.cat((scores, queue_scores)),
            config.assign_epsilon,
            config.assign_iterations,
            impl=config.impl,
        )
        return z[: len(scores)]

    def alignment_loss(self, x: Tensor, older: Tensor, prototypes: Tensor) -> dict[str, Tensor]:
        """L_a^s and L_a^p (Eq. 8), or, without prototypes, the one alignment loss between the domains.

        `x` [2 domains, B, D] is the batch's first view, `older` [2 domains, n, D] what the banks hold beside
        it, n = 0 without banks. Gradient through x and prototypes in the distances; the plans are constants.
        """
        bank = torch.cat((x, older), dim=1)
        if self.config.parts.prototypes:
            sketch, photo = self._to_prototypes(x, bank, prototypes)
            return {"align_sketch": sketch, "align_photo": photo}
        return {"align": self._between_domains(bank, prototypes, count=x.shape[1])}

    def _to_prototypes(self, x: Tensor, bank: Tensor, prototypes: Tensor) -> Tensor:
        """[2]: each domain's batch against the prototypes, by the plan of its bank (Eqs. 5 to 8)."""
        config = self.config
        one_hot = torch.eye(config.prototypes, dtype=x.dtype, device=x.device)
        with torch.no_grad():
            y = self.probabilities(bank, prototypes)
            cost = config.alpha * cosine_distance(prototypes, bank) + config.beta * label_distance(one_hot, y)
            plan = self.plan(cost)[..., : x.shape[1]]  # [2, K, B]
            plan = plan / plan.sum(dim=(1, 2), keepdim=True)
        log_y = torch.log_softmax(x @ prototypes.T / config.temperature, dim=-1)
        distance = config.alpha * cosine_distance(prototypes, x) - config.beta * log_y.mT
        return (plan * distance).sum(dim=(1, 2))

    def _between_domains(self, bank: Tensor, prototypes: Tensor, count: int) -> Tensor:
        """The two domains against each other: DeepJDOT, over the pairs that hold an image of the batch.

        The paper does not write this out. The plan is between the two banks [2, E, D], whose first `count`
        rows are the batch; pairs of two older features have no gradient and are left out, and the rest of the
        plan is scaled to sum 1. Neither domain has labels, so the label distance d_c is the mean of both
        cross-entropies, each with the other domain's probabilities as its constant target.
        """
        config = self.config
        log_y = torch.log_softmax(bank @ prototypes.T / config.temperature, dim=-1)
        with torch.no_grad():
            y = log_y.exp()
            cost = config.alpha * cosine_distance(*bank) + config.beta * label_distance(*y)
            plan = self.plan(cost)
            parts = plan[:count], plan[count:, :count]
            mass = sum(part.sum() for part in parts)

        def distance(sketches: slice, photos: slice) -> Tensor:
            crossed = (y[0, sketches] @ log_y[1, photos].T + log_y[0, sketches] @ y[1, photos].T) / 2
            return config.alpha * cosine_distance(bank[0, sketches], bank[1, photos]) - config.beta * crossed

        batch, older, every = slice(count), slice(count, None), slice(None)
        total = (parts[0] * distance(batch, every)).sum() + (parts[1] * distance(older, batch)).sum()
        return total / mass

    def plan(self, cost: Tensor) -> Tensor:
        """The entropic plan (Eqs. 5 and 6) of a cost [.., n, m], uniform marginals of total 1."""
        config = self.config
        return sinkhorn(
            cost,
            config.plan_epsilon,
            max_iter=config.plan_iterations,
            tol=config.plan_tolerance,
            grad="none",
            impl=config.impl,
        ).plan

    @torch.no_grad()
    def _remember(self, x: Tensor) -> None:
        """Put the batch [2 domains, 2 views, B, D] on top of queue and banks; the oldest fall off the end."""
        self.filled += torch.tensor([2 * x.shape[2], x.shape[2]], device=x.device)
        self.filled.clamp_(max=torch.tensor([self.queue.shape[1], self.banks.shape[1]], device=x.device))
        for store, new in ((self.queue, x.transpose(0, 1).flatten(1, 2)), (self.banks, x[:, 0])):
            store.copy_(torch.cat((new, store), dim=1)[:, : store.shape[1]])

    def optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """The optimiser, and its rate, which falls by `lr_factor` each `lr_epochs`."""
        config = self.config
        if self._steps_per_epoch is None:
            raise RuntimeError("train_data must be called before optimizer: the schedule counts epochs")
        optimizer: torch.optim.Optimizer
        if config.optimizer == "adamw":
            optimizer = torch.optim.AdamW(
                self.parameters(), config.learning_rate, weight_decay=config.weight_decay
            )
        else:
            optimizer = torch.optim.SGD(
                self.parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay
            )
        every = max(1, round(config.lr_epochs * self._steps_per_epoch))
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, every, config.lr_factor)

    # ---- use -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Features [B, D] of length 1 of RGB images [B, 3, H, W] in [0, 1], resized where needed."""
        return self.features(sized_rgb(images, self.config.image_size))

    @torch.no_grad()
    def pictures(self, batch: ImageBatch, count: int = 8) -> dict[str, Tensor]:
        """Sketches of a batch, a view of each, and the batch's photos whose features are nearest."""
        sketches, photos = (part.float() / 255 for part in batch)
        x, y = self.embed(sketches[:count]), self.embed(photos)
        no_photo = torch.zeros(len(x), dtype=torch.bool, device=x.device)  # colours as in training
        view = random_view(sketches[:count], self.config.image_size, self.config.views, colour=no_photo)
        return {
            "sketch": sketches[:count],
            "a view of it": F.interpolate(view, sketches.shape[2:]),
            "the batch's nearest photo": photos[(x @ y.T).argmax(dim=1)],
        }


# ---- the paper's protocol ----------------------------------------------------------------------------------

#: Table 3 of the paper (v1 and v5 are also Table 1's SwAV and Ours): percent, by data set
PAPER_UNSUPERVISED = {
    "Sketchy-Extended": {
        "v1": (10.87, 12.51, 10.15),
        "v2": (21.07, 23.19, 18.53),
        "v3": (25.60, 28.62, 20.98),
        "v4": (24.83, 27.67, 20.78),
        "v5": (33.64, 36.31, 28.17),
    },
    "TUBerlin-Extended": {
        "v1": (3.36, 5.81, 2.89),
        "v2": (7.01, 9.96, 5.05),
        "v3": (9.01, 12.26, 5.62),
        "v4": (11.71, 15.66, 7.53),
        "v5": (14.78, 18.66, 9.93),
    },
}
#: Table 2, the row Ours
PAPER_ZERO_SHOT = {
    "Sketchy-Extended": {"v5": (38.44, 44.09, 34.68)},
    "TUBerlin-Extended": {"v5": (28.36, 31.53, 22.91)},
}


def retrieval(
    method: PMJDOT,
    untrained: PMJDOT,
    data: DataSpec,
    *,
    top: int = 200,
    queries_shown: int = 8,
    photos_shown: int = 10,
    seed: int = 0,
) -> list[Table]:
    """Category-level retrieval of photos by sketches (sections 4.1, 4.2), trained against untrained network.

    Queries and gallery are those of the split that the run was trained on (`split`, `queries_per_class`,
    `test_classes` and `split_seed` of its config): no query was seen in training. Labels serve here alone.

    Args:
        method, untrained: the trained network, and one of the same config with fresh weights.
        data: the data set the run was trained on.
        top: photos retrieved a query, for Prec@top and mAP@top; the paper's is 200.
        queries_shown: queries in the picture of what is retrieved.
        photos_shown: photos a query there.
        seed: of the choice of queries shown, and of t-SNE.
    """
    from ..evaluate.retrieval import retrieval_scores

    for name, value in (("top", top), ("queries_shown", queries_shown), ("photos_shown", photos_shown)):
        check_integer(name, value, 1)
    check_integer("seed", seed, 0)
    split = read_split(data, method.config)
    query, gallery = split.query, split.gallery
    query_labels, gallery_labels = torch.from_numpy(query.labels), torch.from_numpy(gallery.labels)
    # beyond the size of the smallest class no ranking could be right throughout
    smallest = int(gallery.class_counts[np.unique(query.labels)].min())
    rows: list[dict[str, Any]] = []
    for name, network in (("trained", method), ("untrained", untrained)):
        x, y = (torch.from_numpy(embed_images(network, part.images)) for part in (query, gallery))
        scores = retrieval_scores(x, y, query_labels, gallery_labels, top=top)
        row = {
            "network": name,
            f"Prec@{scores.top}": _percent(scores.precision_at),
            f"mAP@{scores.top}": _percent(scores.map_at),
            "mAP": _percent(scores.map_all),
        }
        if 0 < smallest < scores.top:
            within = retrieval_scores(x, y, query_labels, gallery_labels, top=smallest)
            row[f"Prec@{smallest}"] = _percent(within.precision_at)
        rows.append(row)
        if network is method:
            pictures = _retrieval_pictures(split, x, y, queries_shown, photos_shown, seed)
    rows += _paper_rows(method.config)
    note = (
        f"Percent; {len(query)} queries, gallery of {len(gallery)} photos of {len(gallery.class_names)} "
        f"classes, the smallest of {smallest}; split {split.name}. A random order has a precision of "
        f"{_chance(query, gallery)}. {training_facts(method)}"
    )
    return [Table(f"Retrieval of photos by sketches: {data.name}", rows, note, pictures)]


def _percent(fraction: float) -> float:
    return round(100 * fraction, 2)


def _chance(query: ImageSet, gallery: ImageSet) -> float:
    """The expected precision of a random order in percent, at any rank."""
    return _percent(float((gallery.class_counts[query.labels] / len(gallery)).mean()))


def _paper_rows(config: PMJDOTConfig) -> list[dict[str, Any]]:
    """The paper's figures for the same split protocol: the run's variant, and v1 and v5 beside it."""
    table = PAPER_UNSUPERVISED if config.split == "unsupervised" else PAPER_ZERO_SHOT
    wanted = dict.fromkeys(("v1", config.variant, "v5"))
    return [
        {
            "network": f"paper: {name}, {variant}",
            **dict(zip(("Prec@200", "mAP@200", "mAP"), figures[variant], strict=True)),
        }
        for name, figures in table.items()
        for variant in wanted
        if variant in figures
    ]


def _retrieval_pictures(
    split: RetrievalSplit, x: Tensor, y: Tensor, queries: int, photos: int, seed: int
) -> dict[str, bytes]:
    from ..evaluate.retrieval import nearest, retrieval_picture, tsne_picture

    query, gallery = split.query, split.gallery
    order = np.random.default_rng(seed).permutation(len(query))
    # one query a class, then the next of each, so that as many classes as fit are seen
    rank = np.empty(len(query), dtype=np.int64)
    for label in np.unique(query.labels):
        rows = order[query.labels[order] == label]
        rank[rows] = np.arange(len(rows))
    shown = order[np.argsort(rank[order], kind="stable")][:queries]
    index = nearest(x[torch.from_numpy(shown)], y, min(photos, len(gallery)))[1].numpy()
    right = gallery.labels[index] == query.labels[shown][:, None]
    return {
        "Queries and the photos nearest to them": retrieval_picture(
            query.images[shown], gallery.images, index, right
        ),
        "t-SNE of queries and gallery": tsne_picture(
            x, y, query.labels, gallery.labels, query.class_names, seed=seed
        ),
    }


def training_facts(method: PMJDOT) -> str:
    """What was trained, and every setting of the config in which it differs from the defaults."""
    config, paper = method.config, PMJDOTConfig()
    sketches, photos = method.training_images.tolist()
    start = "from random weights" if config.weights == "random" else f"from {config.weights} weights"
    facts = (
        f"Trained as {config.variant} for {int(method.steps_trained)} steps of {config.batch_size} sketches "
        f"and {config.batch_size} photos, on {sketches} sketches and {photos} photos, {start} (paper: SwAV's "
        f"ResNet-50 of ImageNet)"
    )
    if config.weights != "random":
        facts += "; the untrained network has random weights, not those"
    if config.align_after:
        facts += f", the first {config.align_after} of them SwAV alone"
    different = different_settings(config, paper, _TOLD_ELSEWHERE)
    if not different:
        return f"{facts}."
    return (
        f"{facts}. Settings other than the defaults, which are the paper's or, where it is silent, SwAV's or "
        f"ours: {', '.join(different)}."
    )


#: fields of the config that a table's note says in words, or that change no figure
_TOLD_ELSEWHERE = {
    "steps",
    "variant",
    "weights",
    "align_after",
    "impl",
    "split",
    "queries_per_class",
    "test_classes",
    "split_seed",
    "instances",
    "classes",
}


PMJDOT.protocols = {"retrieval": retrieval}
