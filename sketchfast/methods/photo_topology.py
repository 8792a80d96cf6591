"""Photo topology: fine-grained sketch-based image retrieval that keeps what pre-training on photos taught.

Li, Pang, Song: "Photo Pre-Training, But for Sketch", CVPR 2023. A network that was pre-trained on photos is
fine-tuned with a triplet loss so that a sketch lies nearest to the photo it was drawn after. Photos that
were neighbours in the pre-trained model are to stay neighbours: a second loss over triplets of photos,
ranked as the pre-trained model ranks them and seen from a sketch, is added (multi-task) or is the meta
objective of each step. The authors' repository is empty: what the paper leaves out is a field of the config.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..models.backbones import Pixels, create_backbone, load_backbone
from ..models.views import ViewSettings, random_view
from ..ops._contract import check_integer, check_number, full_precision
from ..ops.triplet import ranking_triplet_loss, triplet_loss
from .base import (
    PRESETS,
    DataSpec,
    Method,
    Passes,
    Table,
    TrainConfig,
    as_tensor,
    different_settings,
    embed_images,
    sized_rgb,
)

if TYPE_CHECKING:
    from ..data.images import SketchPhotoSet
    from ..data.pairs import InstanceSplit
    from ..data.strokes import Sketch

#: the four ways to learn of sections 2 and 2.2: what a step descends along
OBJECTIVES = ("base", "multi", "meta_first", "meta_full")


@dataclass(frozen=True)
class PhotoTopologyConfig(TrainConfig):
    """The paper's ResNet-50 (section 3); where it is silent, what published baselines nearby do."""

    steps: int = 20_000
    """training steps; the paper does not say how many"""
    batch_size: int = 16
    """photos a step, each with one of its sketches, over all ranks; the baselines' (16 to 32)"""
    learning_rate: float = 1e-4
    """eta_s, the rate of the descent along the pairs' loss (Eqs. 8, 9), and the only one of base and multi;
    the baselines' of Adam. The paper says only that eta_s eta_t is 1e-8 to 1e-6"""
    eta_t: float | None = None
    """eta_t, the rate of the descent along the topology loss (Eqs. 8, 9); None takes learning_rate"""
    optimizer: str = "adam"
    """adam, adamw or sgd. The meta objectives take two, one a loss, each with its own state: with sgd a step
    is the paper's equation to the letter, with the others each gradient there is replaced by the direction
    that its optimiser makes of it"""
    momentum: float = 0.0
    """momentum of sgd"""
    weight_decay: float = 0.0
    """weight decay; of the pairs' optimiser alone, so that a step decays once"""
    schedule: str = "constant"
    """of both rates: constant, or cosine, down to 0 over `steps`"""
    objective: str = "meta_first"
    """base: the pairs' loss alone (Eq. 1); multi: the weighted sum (Eq. 5); meta_first: the topology loss as
    first-order meta objective (Eq. 9), the paper's; meta_full: with the second-order term (Eq. 8)"""
    alpha: float = 1.0
    """weight of the pairs' loss in multi (Eq. 5)"""
    beta: float = 1.0
    """weight of the topology loss in multi (Eq. 5)"""
    epsilon: float = 0.01
    """of meta_full: how far the weights are moved either way for the finite difference of Eq. 8, as the
    length of the whole move (DARTS); the paper's epsilon is this over the norm of the topology gradient"""
    second_order_sign: str = "printed"
    """sign of the second-order term of meta_full: printed, - eta_t eta_s as Eqs. 7 and 8 have it; or
    derived, + eta_t eta_s, which is the derivative of theta_temp = theta - eta_s grad"""
    topology: str = "cross"
    """the topology loss: cross, seen from sketches (Eq. 4), or single, from photos (Eq. 3)"""
    triplets: str = "random"
    """of the topology loss: random, `samples` pairs of photos an anchor; or nearest, the anchor's nearest
    photo of the batch by the teacher against `samples` random others, as nearer (Table 3, "Nearest")"""
    samples: int = 10
    """K, triplets an anchor; 0 takes all there are, random only"""
    margin: float = 0.2
    """Delta_sp, the margin of the pairs' loss (Eq. 1); the baselines' (0.1 to 0.3)"""
    margin_nt: float = 0.01
    """Delta_NT, the margin of the topology loss (Eqs. 3, 4)"""
    mining: str = "all"
    """which p_k of the batch a pair is set against in Eq. 1, which leaves it open: all, the mean over every
    k != i, which is what one random k comes to on average; random, one; hardest; semihard"""
    metric: str = "euclidean"
    """d: euclidean, sqeuclidean or cosine"""
    triplet_seed: int = 0
    """seed, with the step, of random triplets and of mirrored batches"""
    backbone: str = "resnet50"
    """network: the name of any timm model, such as resnet50 or vit_base_patch32_224"""
    weights: str = "timm"
    """start of the backbone, the pre-training to be kept: timm (timm's own for this name, from the network),
    a file of weights (start.pt of another run is one), or random"""
    pool: str = "max"
    """global pooling of the backbone: max (the baselines'), avg, or what else timm has for it; "" takes its
    own"""
    head: int = 0
    """size of a linear embedding behind the pooling; 0 for none"""
    normalise: bool = True
    """embeddings of length 1, the teacher's features too"""
    freeze_batch_norm: bool = False
    """keep the batch norms' running statistics, as after pre-training"""
    teacher_backbone: str = ""
    """network that R is taken from (Table 4): the name of a timm model; "" is the backbone"""
    teacher_weights: str = ""
    """its weights: timm or a file; "" is the start of the network itself"""
    pretrain_steps: int = 0
    """with random weights only: steps of self-supervised pre-training on the training photos before the
    first step, by instance discrimination (SimCLR, Chen et al. 2020), where no pre-trained weights can be
    had. start.pt in the run folder is then a file for `weights` of other runs"""
    pretrain_batch: int = 64
    """photos a step of pre-training, two views each"""
    pretrain_rate: float = 1e-3
    """learning rate of pre-training (AdamW), down to 0 by a cosine"""
    pretrain_temperature: float = 0.2
    """temperature of pre-training"""
    pretrain_seed: int = 0
    """seed of pre-training, but for the weights it begins from, which are of the run's seed"""
    image_size: int = 256
    """side of the images the network sees, in pixels"""
    grey: bool = False
    """the network never sees colour"""
    standardise: bool = False
    """scale each image to mean 0 and variance 1 instead of by ImageNet's mean and variance"""
    flip: float = 0.5
    """probability that a batch is mirrored, all of it, so that photos of a batch keep facing as they do"""
    crop_scale: tuple[float, float] = (0.8, 1.0)
    """share of the area that a training view shows, from and to, sketch and photo each for itself"""
    category: str = ""
    """class of the data to train on and retrieve from, such as shoe; "" takes all"""
    split: str = "test"
    """photos kept out of training: test, the data set's official ones or else a share of all; validation, in
    addition a share of the training photos, and these are evaluated on: for the choice of settings"""
    test_share: float = 0.2
    """share of the photos kept out where the data set has no official split, and of the training photos for
    validation"""
    split_seed: int = 0
    """seed of the choice of photos kept out"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("objective", OBJECTIVES),
            ("second_order_sign", ("printed", "derived")),
            ("topology", ("cross", "single")),
            ("triplets", ("random", "nearest")),
            ("mining", ("all", "random", "hardest", "semihard")),
            ("metric", ("euclidean", "sqeuclidean", "cosine")),
            ("optimizer", ("adam", "adamw", "sgd")),
            ("schedule", ("constant", "cosine")),
            ("split", ("test", "validation")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("samples", "triplet_seed", "head", "pretrain_steps", "pretrain_seed", "split_seed"):
            check_integer(name, getattr(self, name), 0)
        check_integer("pretrain_batch", self.pretrain_batch, 2)
        check_integer("image_size", self.image_size, 16)
        for name in ("epsilon", "pretrain_rate", "pretrain_temperature"):
            check_number(name, getattr(self, name), above=0)
        for name in ("alpha", "beta", "margin", "margin_nt", "weight_decay"):
            check_number(name, getattr(self, name), at_least=0)
        if self.eta_t is not None:
            check_number("eta_t", self.eta_t, at_least=0)
        if not 0 <= check_number("momentum", self.momentum) < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum!r}")
        if not 0 < check_number("test_share", self.test_share) < 1:
            raise ValueError(f"test_share must lie in (0, 1), got {self.test_share!r}")
        if check_number("flip", self.flip, at_least=0) > 1:
            raise ValueError(f"flip must be a probability in [0, 1], got {self.flip!r}")
        if self.triplets == "nearest" and self.samples == 0:
            raise ValueError("samples must be at least 1 with triplets nearest, got 0")
        if self.teacher_backbone and not self.teacher_weights:
            raise ValueError(
                "teacher_weights must be timm or a file where there is a teacher_backbone, "
                f"{self.teacher_backbone}, got ''"
            )
        if self.teacher_weights == "random":
            raise ValueError("teacher_weights must be timm or a file, got 'random'")
        _ = self.views

    @property
    def is_meta(self) -> bool:
        return self.objective.startswith("meta")

    @property
    def rates(self) -> tuple[float, float]:
        """eta_s and eta_t."""
        return self.learning_rate, self.learning_rate if self.eta_t is None else self.eta_t

    @property
    def views(self) -> ViewSettings:
        """A training view: a crop, nothing else."""
        return ViewSettings(self.crop_scale, (1.0, 1.0), flip=0, jitter=0, grey=0, blur=0)

    @property
    def pretrain_views(self) -> ViewSettings:
        """SimCLR's views, crops not as small as SwAV's: a crop of a sole is of no shoe in particular."""
        return ViewSettings(crop_scale=(0.3, 1.0), jitter=0.8, grey=1.0 if self.grey else 0.2)


# ---- data --------------------------------------------------------------------------------------------------


class PairBatch(NamedTuple):
    """B different photos, and one of the sketches of each: no row is a wrong negative of another."""

    sketches: Tensor
    """[B, 3, S, S] in [0, 1]; row i was drawn after photo i"""
    photos: Tensor
    """[B, 3, S, S] in [0, 1]"""
    rows: Tensor
    """[B] int64, which of the training photos these are"""


class PhotoBatches(torch.utils.data.Dataset):
    """Item i is the i-th photo that has a sketch, and a random one of its sketches, a view of each."""

    def __init__(self, data: SketchPhotoSet, config: PhotoTopologyConfig) -> None:
        self.sketches, self.photos = data.sketches.images, data.photos.images
        self.size, self.views = config.image_size, config.views
        paired = np.flatnonzero(data.pairs >= 0)
        #: sketches in the order of their photos: those of photo p are order[first[p] : first[p] + count[p]]
        self.order = paired[np.argsort(data.pairs[paired], kind="stable")]
        self.count = np.bincount(data.pairs[paired], minlength=len(self.photos))
        self.first = np.cumsum(self.count) - self.count
        self.rows = np.flatnonzero(self.count)
        if not len(self.rows):
            raise ValueError("data must hold photos with sketches drawn after them to train on, got none")
        self.skipped = dict(data.skipped)
        self.fingerprint = data.fingerprint()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PairBatch:
        return PairBatch(*(part[0] for part in self.__getitems__([index])))

    def __getitems__(self, indices: list[int]) -> PairBatch:
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        which = (np.random.random(len(rows)) * self.count[rows]).astype(np.int64)  # the loop seeds NumPy
        sketches = self.sketches[self.order[self.first[rows] + which]]
        views = self._views(np.concatenate((sketches, self.photos[rows])))
        return PairBatch(views[: len(rows)], views[len(rows) :], torch.from_numpy(rows))

    def _views(self, images: NDArray[np.uint8]) -> Tensor:
        pixels = as_tensor(images)
        if self.views.crop_scale == (1.0, 1.0) and pixels.shape[-1] == self.size:
            return pixels.float() / 255
        return random_view(pixels, self.size, self.views)


def read_split(data: DataSpec, config: PhotoTopologyConfig) -> InstanceSplit:
    """The data set cut into photos to learn from and photos held out, by the config's fields alone."""
    from ..data.pairs import PAIR_SETS, load_pairs, split_instances

    if data.name not in PAIR_SETS:
        raise ValueError(f"data must be one of {', '.join(PAIR_SETS)}, got {data.name!r}")
    share, seed = config.test_share, config.split_seed
    split = load_pairs(
        data.name,
        data.root,
        category=config.category or None,
        size=config.image_size,
        seed=seed,
        test_share=share,
    )
    if config.split == "test":
        return split
    inner = split_instances(
        split.train,
        test_share=share,
        seed=seed,
        strokes=split.train_strokes,
        canvas=None if split.train_strokes is None else split.canvas,
    )
    return replace(inner, name=f"{split.name}; of its training photos {share:g} held out, seed {seed}")


# ---- network and losses ------------------------------------------------------------------------------------


class PhotoTopology(Method):
    """Fine-grained sketch-based image retrieval that keeps the topology of photos (Li, Pang, Song 2023).

    One network embeds sketches and photos: a backbone, its global pooling, and, if asked for, a linear
    embedding. The teacher is the distances of all training photos under the network as it started, or under
    another one, computed once; no gradient changes it.
    """

    Config = PhotoTopologyConfig
    config: PhotoTopologyConfig
    takes_colour = True
    steps_trained: Tensor
    training_images: Tensor

    def __init__(self, config: PhotoTopologyConfig) -> None:
        super().__init__(config)
        self.backbone = create_backbone(config.backbone, pool=config.pool, image_size=config.image_size)
        width: int = self.backbone.num_features  # type: ignore[assignment]
        self.head: nn.Module = nn.Linear(width, config.head) if config.head else nn.Identity()
        self.pixels = Pixels(grey=config.grey, standardise=config.standardise)
        # what a table of results must say of the training; in the checkpoint with the weights
        self.register_buffer("steps_trained", torch.zeros((), dtype=torch.int64))
        self.register_buffer("training_images", torch.zeros(2, dtype=torch.int64))
        #: features [N, F] of all training photos, and their distances once a loss asked for them
        self._photo_features: Tensor | None = None
        self._teacher: Tensor | None = None
        #: what `start_from` was told of the start, for the tables
        self.start_about = ""
        self._training_photos: NDArray[np.uint8] | None = None
        self._fingerprint = ""
        self._pair_optimizer: torch.optim.Optimizer | None = None

    @classmethod
    def preset(cls, name: str) -> PhotoTopologyConfig:
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        if name == "paper":
            return PhotoTopologyConfig()
        if name == "small":
            return PhotoTopologyConfig(
                steps=1000,
                learning_rate=1e-3,
                optimizer="adamw",
                schedule="cosine",
                weight_decay=1e-4,
                backbone="test_resnet",
                weights="random",
                pool="avg",
                pretrain_steps=600,
                image_size=64,
                grey=True,
                standardise=True,
            )
        return PhotoTopologyConfig(
            steps=3,
            batch_size=6,
            learning_rate=1e-3,
            backbone="test_resnet",
            weights="random",
            pool="avg",
            pretrain_steps=2,
            pretrain_batch=8,
            image_size=32,
        )

    def train_data(self, data: DataSpec) -> PhotoBatches:
        """The training part of the split; see `read_split`."""
        batches = PhotoBatches(read_split(data, self.config).train, self.config)
        self.training_images.copy_(torch.tensor([len(batches.order), len(batches.photos)]))
        self._training_photos, self._fingerprint = batches.photos, batches.fingerprint
        return batches

    def train(self, mode: bool = True) -> PhotoTopology:
        super().train(mode)
        if self.config.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    # ---- start and teacher ---------------------------------------------------------------------------------

    def before_training(self) -> dict[str, Any]:
        """The backbone's start weights, and the teacher's features of all training photos."""
        config, photos = self.config, self._photos()
        load_backbone(self.backbone, config.backbone, config.weights)
        if config.weights == "random" and config.pretrain_steps:
            self._pretrain(photos)
        return {
            "state_dict": _on_cpu(self.backbone.state_dict()),
            "head": _on_cpu(self.head.state_dict()),
            "teacher": self._teacher_features(photos),
            "about": start_facts(config, len(photos), self._fingerprint),
        }

    def start_from(self, start: dict[str, Any]) -> None:
        self.backbone.load_state_dict(start["state_dict"])
        self.head.load_state_dict(start["head"])
        self.start_about = start["about"]
        self._photo_features, self._teacher = start["teacher"], None

    @property
    def teacher(self) -> Tensor:
        """Distances [N, N] of all training photos; no buffer: neither saved, nor copied, nor broadcast.

        From the first loss that needs them on: with 10,000 photos they take 400 MB, and minutes on a CPU.
        """
        if self._teacher is None:
            if self._photo_features is None:
                raise RuntimeError("start_from must be called before a loss that needs the teacher")
            self._teacher = photo_distances(self._photo_features.to(next(self.parameters()).device))
        return self._teacher

    def _photos(self) -> NDArray[np.uint8]:
        if self._training_photos is None:
            raise RuntimeError("train_data must be called before before_training")
        return self._training_photos

    def _pretrain(self, photos: NDArray[np.uint8]) -> None:
        """SimCLR on the training photos: of all views in a batch, which is of the same photo?"""
        from ..data.dataset import track

        config, device = self.config, next(self.parameters()).device
        if len(photos) < 2:
            raise ValueError(f"pretrain_steps must be 0 with fewer than 2 training photos, got {len(photos)}")
        torch.manual_seed(config.pretrain_seed)  # the loop puts the generators back
        order = np.random.default_rng(config.pretrain_seed)
        width: int = self.backbone.num_features  # type: ignore[assignment]
        projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128)).to(device)
        parameters = [*self.backbone.parameters(), *projection.parameters()]
        optimizer = torch.optim.AdamW(parameters, config.pretrain_rate, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.pretrain_steps)
        count = min(config.pretrain_batch, len(photos))
        self.backbone.train()
        for _ in track(range(config.pretrain_steps), "pre-training on photos", progress=True):
            rows = order.choice(len(photos), count, replace=False)
            images = as_tensor(photos[rows]).to(device).repeat(2, 1, 1, 1)
            with torch.no_grad():
                views = random_view(images, config.image_size, config.pretrain_views)
            z = F.normalize(projection(self.backbone(self.pixels(views))), dim=1)
            loss = instance_discrimination(z, config.pretrain_temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        if not torch.isfinite(loss):
            raise ValueError(
                f"pretrain_rate must be low enough for pre-training to converge, got {config.pretrain_rate}: "
                "its loss is not finite"
            )

    @torch.no_grad()
    def _teacher_features(self, photos: NDArray[np.uint8], batch_size: int = 128) -> Tensor:
        """Phi(p), [N, F] float32, of the start of the network or of the teacher asked for."""
        config, device = self.config, next(self.parameters()).device
        network = self.backbone
        if config.teacher_weights:
            name = config.teacher_backbone or config.backbone
            # its own pooling where it is a network of its own
            pool = "" if config.teacher_backbone else config.pool
            network = create_backbone(name, pool=pool, image_size=config.image_size)
            load_backbone(network, name, config.teacher_weights)
            network.to(device)
        network.eval()
        parts = [
            network(self.pixels(as_tensor(photos[start : start + batch_size]).to(device).float() / 255))
            for start in range(0, len(photos), batch_size)
        ]
        features = torch.cat(parts).float()
        return (F.normalize(features, dim=1) if config.normalise else features).cpu()

    # ---- losses --------------------------------------------------------------------------------------------

    def features(self, images: Tensor) -> Tensor:
        """Embeddings Psi [B, D], at least float32, of images [B, 3, S, S] in [0, 1]."""
        x = self.head(self.backbone(self.pixels(images)))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.normalize(x, dim=1) if self.config.normalise else x

    def loss(self, batch: PairBatch, step: int, part: str = "") -> dict[str, Tensor]:
        """The pairs' loss ("pairs", Eq. 1), the topology loss ("topology", Eqs. 3, 4), or all of them.

        Embeddings of all ranks are gathered, with gradient, and each rank computes the same loss of the whole
        batch. Triplets are drawn by (triplet_seed, step): the same in every pass of a step and on every impl.
        """
        config = self.config
        sketches, photos, rows = self._embeddings(batch, step)
        losses: dict[str, Tensor] = {}
        with full_precision(sketches.device.type):
            if part != "topology":
                losses["pairs"] = self.pair_loss(sketches, photos, step)
            if part == "topology" or (part == "" and config.objective != "base"):
                anchors = sketches if config.topology == "cross" else photos
                losses["topology"] = self.topology_loss(anchors, photos, rows, step)
        if len(losses) == 2:
            total = config.alpha * losses["pairs"] + config.beta * losses["topology"]
        else:
            (total,) = losses.values()
        if self.training:
            self.steps_trained.fill_(step + 1)
        return {"loss": total, **losses}

    def _embeddings(self, batch: PairBatch, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Psi of all ranks' sketches and photos [B, D], and the photos' rows [B].

        Both domains go through the network together: batch norms see in training the mixture whose running
        statistics serve afterwards.
        """
        images = torch.cat((batch.sketches, batch.photos))
        if self.training and _rng(self.config, step).random() < self.config.flip:
            images = images.flip(3)
        x = torch.stack(self.features(images).chunk(2), dim=1)
        with torch.no_grad():
            rows = self.gather_rows(batch.rows)
        sketches, photos = self.gather_rows(x).unbind(1)
        return sketches, photos, rows

    def pair_loss(self, sketches: Tensor, photos: Tensor, step: int) -> Tensor:
        """L_FG-SBIR (Eq. 1); `mining` says which p_k stand against a pair."""
        config = self.config
        return triplet_loss(
            sketches,
            photos,
            margin=config.margin,
            mining=config.mining,
            seed=_seed(config, step, 0),
            metric=config.metric,
            impl=config.impl,
        )

    def topology_loss(self, anchors: Tensor, photos: Tensor, rows: Tensor, step: int) -> Tensor:
        """L_NT: anchors s_i (Eq. 4) or p_i (Eq. 3) [B, D] rank photos p_j, p_k as the teacher ranks them."""
        config = self.config
        if config.triplets == "nearest":
            return self._nearest_loss(anchors, photos, rows, step)
        return ranking_triplet_loss(
            anchors,
            photos,
            self.teacher,
            indices=rows,
            margin=config.margin_nt,
            samples=config.samples or None,
            seed=_seed(config, step, 1),
            metric=config.metric,
            impl=config.impl,
        )

    def _nearest_loss(self, anchors: Tensor, photos: Tensor, rows: Tensor, step: int) -> Tensor:
        """Table 3's "Nearest": the teacher's nearest photo p_j of the batch against K random p_k.

        The op draws j at random too; here torch takes B (K + 1) distances.
        """
        config, count = self.config, len(rows)
        if count < 3:
            return 0 * (anchors.sum() + photos.sum())
        teacher = self.teacher[rows[:, None], rows].fill_diagonal_(float("inf"))
        nearest = teacher.argmin(dim=1)
        # k uniform over all but i and its nearest: step over both, the lower one first
        drawn = _rng(config, step, 1).integers(0, count - 2, (count, config.samples))
        k = torch.from_numpy(drawn).to(rows.device)
        anchor = torch.arange(count, device=rows.device)
        low, high = torch.minimum(anchor, nearest), torch.maximum(anchor, nearest)
        k = k + (k >= low[:, None])
        k = k + (k >= high[:, None])
        near = distance(anchors, photos[nearest], config.metric)
        far = distance(anchors[:, None], photos[k], config.metric)
        return (config.margin_nt + near[:, None] - far).clamp(min=0).mean()

    # ---- a step --------------------------------------------------------------------------------------------

    def optimizer(self) -> tuple[Any, Any]:
        """One optimiser, or with a meta objective two: of the pairs' loss, and of the topology loss."""
        config = self.config
        rates = config.rates if config.is_meta else config.rates[:1]
        optimizers = [
            self._make_optimizer(rate, config.weight_decay if number == 0 else 0.0)
            for number, rate in enumerate(rates)
        ]
        schedules: list[Any] = [None] * len(optimizers)
        if config.schedule == "cosine":
            schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, config.steps) for o in optimizers]
        self._pair_optimizer = optimizers[0]
        return (optimizers, schedules) if config.is_meta else (optimizers[0], schedules[0])

    def _make_optimizer(self, rate: float, weight_decay: float) -> torch.optim.Optimizer:
        kind, parameters = self.config.optimizer, self.parameters()
        if kind == "sgd":
            return torch.optim.SGD(parameters, rate, self.config.momentum, weight_decay=weight_decay)
        adam = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
        return adam(parameters, rate, weight_decay=weight_decay)

    def update(self, passes: Passes) -> None:
        """One step: a descent along the loss, or with a meta objective (Eqs. 8, 9) one along each.

        First from theta_n to theta_temp along the pairs' loss, then from there along the gradient that the
        topology loss has at theta_temp.
        """
        config = self.config
        if not config.is_meta:
            super().update(passes)
            return
        parameters: list[Tensor] = [p for p in self.parameters() if p.requires_grad]
        start = [p.detach().clone() for p in parameters] if config.objective == "meta_full" else []
        passes.gradient(part="pairs")
        passes.descend(0, more=True)
        passes.gradient(part="topology")
        if start:
            self._add_second_order(passes, parameters, start)
        passes.descend(1)

    @torch.no_grad()
    def _add_second_order(self, passes: Passes, parameters: list[Tensor], start: list[Tensor]) -> None:
        """To v, the topology gradient in `.grad`, add eta_s H v (Eq. 8), H the pairs' Hessian at theta_n.

        H v is the difference of the pairs' gradient at theta_n +- epsilon v, over 2 epsilon.
        """
        config = self.config
        assert self._pair_optimizer is not None
        temp = [p.detach().clone() for p in parameters]
        v = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
        epsilon = config.epsilon / torch.nn.utils.get_total_norm(v).clamp(min=1e-30)
        sides: list[list[Tensor]] = []
        for side in (1, -1):
            for p, at, direction in zip(parameters, start, v, strict=True):
                p.copy_(at + side * epsilon * direction)
            with torch.enable_grad():
                passes.gradient(part="pairs")
            sides.append([p.grad.clone() for p in parameters])  # type: ignore[union-attr]
        eta_s = self._pair_optimizer.param_groups[0]["lr"]  # as the schedule has it now
        factor = eta_s / (2 * epsilon) * (1 if config.second_order_sign == "printed" else -1)
        for p, at, direction, plus, minus in zip(parameters, temp, v, *sides, strict=True):
            p.copy_(at)
            p.grad = direction + factor * (plus - minus)

    # ---- use -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of RGB images [B, 3, H, W] in [0, 1], resized where needed."""
        return self.features(sized_rgb(images, self.config.image_size))

    @torch.no_grad()
    def pictures(self, batch: PairBatch, count: int = 8) -> dict[str, Tensor]:
        """Sketches of a batch, their photos, and those of the batch's photos that are nearest to them."""
        x, y = self.embed(batch.sketches[:count]), self.embed(batch.photos)
        near = distance(x[:, None], y, self.config.metric).argmin(dim=1)
        return {
            "sketch": batch.sketches[:count],
            "its photo": batch.photos[:count],
            "the batch's nearest photo": batch.photos[near],
        }


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def _seed(config: PhotoTopologyConfig, step: int, loss: int) -> int:
    """Seed of the triplets of a step, another for each of the two losses; below 2^63."""
    return ((config.triplet_seed << 32) + 2 * step + loss) % (1 << 63)


def _rng(config: PhotoTopologyConfig, step: int, loss: int = 0) -> np.random.Generator:
    return np.random.default_rng((config.triplet_seed, step, loss))


def distance(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """d of vectors [.., D], broadcast, as the ops define it."""
    if metric == "cosine":
        return 1 - F.cosine_similarity(x, y, dim=-1)
    squares = (x - y).square().sum(dim=-1)
    # at distance 0 the root has no gradient; the hinge's is taken as 0 there
    return squares if metric == "sqeuclidean" else torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)


def photo_distances(features: Tensor) -> Tensor:
    """Euclidean distances [N, N] float32 of features [N, F]: R is their order.

    From differences, each pair by itself: no rounding depends on chunks or threads, so that a resumed run has
    the teacher it had.
    """
    return torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")


def instance_discrimination(z: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (NT-Xent) of features z [2B, D] of length 1, rows i and i + B being of one image."""
    similarity = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    other = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(similarity, other)


def _file_facts(file: str, fingerprint: str) -> str:
    """The file of weights and, where another run wrote it as its start, what that run said of it.

    Its training photos may be held out in this run: it is said where the training sets differ.
    """
    try:
        start = torch.load(file, map_location="cpu", weights_only=True)
        told, same = start["about"], json.loads(start["identity"])["data_fingerprint"] == fingerprint
        told = told.split("; ")[0].removeprefix("start weights: ")
    except Exception:  # no file of ours: safetensors, tensors alone, ...
        return f"the file {file}"
    return f"the file {file} ({told}, of a run with {'the same' if same else 'another'} training set)"


def start_facts(config: PhotoTopologyConfig, photos: int, fingerprint: str = "") -> str:
    """A line on what the network started from and where R comes from; fingerprint: of the training set."""
    if config.weights in ("random", "timm"):
        start = "random" if config.weights == "random" else f"timm's pre-trained {config.backbone}"
    else:
        start = _file_facts(config.weights, fingerprint)
    if config.weights == "random" and config.pretrain_steps:
        start = (
            f"{config.pretrain_steps} steps of self-supervised pre-training (SimCLR) on the {photos} "
            f"training photos from random ones, seed {config.pretrain_seed}"
        )
    teacher = "those"
    if config.teacher_weights:
        teacher = f"{config.teacher_backbone or config.backbone} with weights {config.teacher_weights}"
    return f"start weights: {start}; the teacher's ranking of the {photos} training photos: by {teacher}"


# ---- the paper's protocols ---------------------------------------------------------------------------------

#: Tables 1 and 2, percent of Acc@1 by benchmark: (variant, backbone, figures in the order of BENCHMARKS)
BENCHMARKS = ("QMUL-Shoe-V1", "QMUL-Shoe-V2", "QMUL-Chair-V1", "QMUL-Chair-V2", "QMUL-Handbag")
PAPER = (
    ("Ours-Base (ImageNet), Eq. 1", "ResNet-50", (53.04, 36.04, 88.66, 67.82, 61.31)),
    ("Ours (ImageNet), Eq. 9", "ResNet-50", (67.83, 42.04, 94.85, 71.70, 65.48)),
    ("Ours-Base (CLIP), Eq. 1", "ViT-B/32", (70.43, 46.10, 93.81, 72.35, 65.48)),
    ("Ours (CLIP), Eq. 9", "ViT-B/32", (77.39, 49.70, 96.91, 74.92, 70.24)),
    ("Ours-Base (OBOW), Eq. 1", "ResNet-50", (68.70, 45.20, 92.78, 71.06, 66.67)),
    ("multi-task (OBOW), Eq. 5", "ResNet-50", (69.57, 48.05, 97.94, 75.88, 70.24)),
    ("meta-full (OBOW), Eq. 8", "ResNet-50", (73.91, 49.75, 97.94, 76.21, 71.43)),
    ("Ours (OBOW), Eq. 9", "ResNet-50", (76.52, 50.75, 98.97, 75.56, 72.02)),
)


def benchmark_of(data: str, category: str) -> str | None:
    """The paper's benchmark that this data is, None where it is none of the five."""
    if data not in ("qmul_v1", "qmul_v1_edges", "qmul_v2"):
        return None
    if category == "handbag":
        return None if data == "qmul_v2" else "QMUL-Handbag"
    version = "V2" if data == "qmul_v2" else "V1"
    return {"shoe": f"QMUL-Shoe-{version}", "chair": f"QMUL-Chair-{version}"}.get(category)


class _Evaluated(NamedTuple):
    """A network on the held-out photos."""

    name: str
    embed: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    query: NDArray[np.float32]
    gallery: NDArray[np.float32]


def _evaluate(method: Method, name: str, split: InstanceSplit) -> _Evaluated:
    if not method.takes_colour:
        raise ValueError(f"base must be a run of a method that embeds photos, got {type(method).__name__}")

    def embed(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return embed_images(method, images)

    return _Evaluated(name, embed, embed(split.test.sketches.images), embed(split.test.photos.images))


def _check_base(base: Method, method: PhotoTopology, data: DataSpec, split: InstanceSplit) -> None:
    """ValueError where the base run learnt from a photo that is held out here."""
    if not isinstance(base.config, PhotoTopologyConfig):
        return
    cuts = [[getattr(m.config, name) for name in _SPLIT_FIELDS] for m in (base, method)]
    if cuts[0] == cuts[1]:
        return
    learnt = read_split(data, base.config).train.photos.names
    if shared := set(learnt).intersection(split.test.photos.names):
        fields = ", ".join(f"{name} {value!r}" for name, value in zip(_SPLIT_FIELDS, cuts[0], strict=True))
        raise ValueError(
            f"base must not have been trained on photos held out here, got a run with {fields}, whose "
            f"training photos hold {len(shared)} of the {len(split.test.photos)}, such as {min(shared)}"
        )


#: fields of the config that say which photos are held out
_SPLIT_FIELDS = ("category", "split", "test_share", "split_seed")


def _networks(
    method: PhotoTopology,
    untrained: PhotoTopology,
    base: Method | None,
    data: DataSpec,
    split: InstanceSplit,
) -> list[_Evaluated]:
    """The trained network, what it started from and, if given, another run's."""
    if base is not None:
        _check_base(base, method, data, split)
    start = "start weights" if untrained.start_about else "random weights"
    networks = [_evaluate(method, "trained", split), _evaluate(untrained, start, split)]
    if base is not None:
        networks.append(_evaluate(base, _base_name(base), split))
    return networks


def _base_name(base: Method) -> str:
    return f"base run ({getattr(base.config, 'objective', type(base).__name__)})"


def _metric(method: PhotoTopology) -> str:
    return "cosine" if method.config.metric == "cosine" else "euclidean"


def _percent(fraction: float) -> float:
    return round(100 * fraction, 2)


def _accuracies(ranks: Tensor) -> dict[str, float]:
    from ..evaluate.fine_grained import accuracy_at

    return {f"Acc@{top}": _percent(share) for top, share in accuracy_at(ranks).items()}


def _test_strokes(split: InstanceSplit) -> tuple[list[Sketch], float]:
    """The queries as strokes, and the side of their canvas; ValueError where there are only images."""
    if split.test_strokes is None or split.canvas is None:
        raise ValueError(
            f"data must hold the sketches as strokes for this protocol, got {split.name}, which has only "
            "images of them; procedural has strokes"
        )
    return [split.test_strokes[i][0] for i in range(len(split.test_strokes))], split.canvas


def retrieval(
    method: PhotoTopology,
    untrained: PhotoTopology,
    data: DataSpec,
    *,
    base: Method | None = None,
    queries_shown: int = 8,
    photos_shown: int = 10,
    seed: int = 0,
) -> list[Table]:
    """Acc@1, 5 and 10 on the held-out photos (section 3, Tables 1 and 2), beside the weights it started from.

    Args:
        method, untrained: the trained network, and the one it started from.
        data: the data set the run was trained on.
        base: another run to stand beside it, such as one of objective base.
        queries_shown: queries in the picture of what is retrieved.
        photos_shown: photos a query there.
        seed: of the choice of queries shown.
    """
    from ..evaluate.fine_grained import match_ranks, nearest_photos
    from ..evaluate.retrieval import retrieval_picture

    for name, value in (("queries_shown", queries_shown), ("photos_shown", photos_shown)):
        check_integer(name, value, 1)
    check_integer("seed", seed, 0)
    split, metric = read_split(data, method.config), _metric(method)
    test = split.test
    shown = np.random.default_rng(seed).permutation(len(test.sketches))[:queries_shown]
    rows: list[dict[str, Any]] = []
    pictures: dict[str, bytes] = {}
    for network in _networks(method, untrained, base, data, split):
        ranks = match_ranks(network.query, network.gallery, test.pairs, metric=metric)
        backbone = (base if network.name.startswith("base run") else method).config.backbone  # type: ignore[union-attr]
        rows.append({"network": network.name, "backbone": backbone, **_accuracies(ranks)})
        k = min(photos_shown, len(test.photos))
        index = nearest_photos(network.query[shown], network.gallery, k, metric=metric).numpy()
        pictures[f"Nearest photos, {network.name}"] = retrieval_picture(
            test.sketches.images[shown],
            test.photos.images,
            index,
            index == test.pairs[shown, None],
            match=test.pairs[shown],
        )
    # its figures are of held-out test photos
    of_test = method.config.split == "test"
    benchmark = benchmark_of(data.name, method.config.category) if of_test else None
    rows += _paper_rows(benchmark)
    told = (
        f"beside the paper's figures for {benchmark}"
        if benchmark
        else "the paper has no figures on this data"
    )
    if benchmark and "photos" in test.info:
        told += f", whose photos are photos, while here they are {test.info['photos']}"
    note = (
        f"Percent of {len(test.sketches)} sketches whose own photo, of a gallery of {len(test.photos)}, is "
        f"among the nearest; by chance Acc@1 is {_percent(1 / len(test.photos))}; {told}. {split.name}. "
        f"{training_facts(method, untrained, base)}"
    )
    return [
        Table(f"Fine-grained retrieval: {data.name} {method.config.category}".strip(), rows, note, pictures)
    ]


def _paper_rows(benchmark: str | None) -> list[dict[str, Any]]:
    if benchmark is None:
        return []
    column = BENCHMARKS.index(benchmark)
    return [
        {"network": f"paper: {variant}", "backbone": backbone, "Acc@1": figures[column]}
        for variant, backbone, figures in PAPER
    ]


def smoothness(
    method: PhotoTopology,
    untrained: PhotoTopology,
    data: DataSpec,
    *,
    base: Method | None = None,
    top: int = 10,
) -> list[Table]:
    """How alike the photos retrieved by a query look, less being smoother (section 4, Figure 5a).

    Args:
        method, untrained: the trained network, and the one it started from.
        data: the data set the run was trained on.
        base: another run to stand beside it, such as one of objective base.
        top: photos retrieved a query; the paper's is 10.
    """
    from ..evaluate.fine_grained import nearest_photos
    from ..evaluate.fine_grained import smoothness as scores_of

    check_integer("top", top, 2)
    split, metric = read_split(data, method.config), _metric(method)
    networks = _networks(method, untrained, base, data, split)
    look = networks[1].gallery
    rows = []
    for network in networks:
        index = nearest_photos(network.query, network.gallery, min(top, len(network.gallery)), metric=metric)
        scores = scores_of(look, index)
        rows.append(
            {"network": network.name, "mean": float(scores.mean()), "median": float(np.median(scores))}
        )
    note = (
        f"Mean squared distance between the {min(top, len(look))} photos retrieved by each of "
        f"{len(split.test.sketches)} sketches, by features of length 1 of the {networks[1].name}, which "
        f"calls its own order smooth: compare the others. The paper's features are VGG-16's, its figures do "
        f"not compare. {split.name}. {training_facts(method, untrained, base)}"
    )
    return [Table(f"Smoothness of what is retrieved: {data.name}", rows, note)]


def early(
    method: PhotoTopology,
    untrained: PhotoTopology,
    data: DataSpec,
    *,
    base: Method | None = None,
) -> list[Table]:
    """Accuracy against the share of the sketch drawn so far (section 4, Figure 5b); needs strokes.

    Args:
        method, untrained: the trained network, and the one it started from.
        data: the data set the run was trained on.
        base: another run to stand beside it, such as one of objective base.
    """
    from ..evaluate.fine_grained import early_retrieval, early_retrieval_picture

    split = read_split(data, method.config)
    strokes, canvas = _test_strokes(split)
    curves = {
        network.name: early_retrieval(
            network.embed,
            strokes,
            network.gallery,
            split.test.pairs,
            canvas=canvas,
            size=method.config.image_size,
            metric=_metric(method),
        )
        for network in _networks(method, untrained, base, data, split)
    }
    rows = [
        {
            "network": name,
            "share drawn": row.share,
            **{f"Acc@{top}": _percent(value) for top, value in row.accuracy.items()},
            "rank percentile": _percent(row.percentile),
        }
        for name, curve in curves.items()
        for row in curve
    ]
    note = (
        f"Percent of {len(strokes)} sketches, each cut to that share of its drawn length and drawn anew; "
        f"gallery of {len(split.test.photos)} photos. {split.name}. {training_facts(method, untrained, base)}"
    )
    picture = {"Accuracy against the share drawn": early_retrieval_picture(curves)}
    return [Table(f"Early retrieval: {data.name}", rows, note, picture)]


def attribution(
    method: PhotoTopology,
    untrained: PhotoTopology,
    data: DataSpec,
    *,
    base: Method | None = None,
    top: int = 5,
) -> list[Table]:
    """Whose problem a wrong retrieval is, the model's or the sketch's (section 4, Figure 5c).

    Args:
        method, untrained: the trained network, and the one it started from.
        data: the data set the run was trained on.
        base: folder of a run of objective base on the same data; the protocol needs one.
        top: photos retrieved a query that are looked at; the paper's is 5.
    """
    from ..evaluate.fine_grained import (
        PROBLEM_OF,
        SCENARIOS,
        attribution_picture,
        error_attribution,
        match_ranks,
        nearest_photos,
    )

    if base is None:
        raise ValueError("base must be the folder of a run of objective base on the same data, got None")
    split, metric = read_split(data, method.config), _metric(method)
    top = min(check_integer("top", top, 2), len(split.test.photos))
    ours, start, other = _networks(method, untrained, base, data, split)
    index, base_index = (nearest_photos(n.query, n.gallery, top, metric=metric) for n in (ours, other))
    ranks = match_ranks(ours.query, ours.gallery, split.test.pairs, metric=metric)
    found = error_attribution(ranks, split.test.pairs, index, base_index, start.gallery, top=top)
    rows = [
        {
            "scenario": str(number or "none"),
            "meaning": SCENARIOS[number],
            "whose problem": PROBLEM_OF[number],
            "errors": count,
        }
        for number, count in found.counts.items()
    ]
    limits = ", ".join(f"{name} {value:.4g}" for name, value in found.thresholds._asdict().items())
    note = (
        f"{len(found.wrong)} of {len(ranks)} sketches retrieved wrong. A score above its median over all "
        f"sketches is large: {limits}. Appearance by features of the {start.name}; base: {other.name}. "
        f"{split.name}. {training_facts(method, untrained, base)}"
    )
    pictures = {}
    if len(found.wrong):
        images = split.test.sketches.images, split.test.photos.images
        pictures["Wrong retrievals by scenario"] = attribution_picture(
            *images, index, split.test.pairs, found, top=top
        )
    return [Table(f"Error attribution: {data.name}", rows, note, pictures)]


def robustness(
    method: PhotoTopology,
    untrained: PhotoTopology,
    data: DataSpec,
    *,
    base: Method | None = None,
    versions: int = 10,
    seed: int = 0,
) -> list[Table]:
    """What deformed strokes cost in Acc@1 (section 3, "Robustness to input perturbations"); needs strokes.

    Args:
        method, untrained: the trained network, and the one it started from.
        data: the data set the run was trained on.
        base: another run to stand beside it, such as one of objective base.
        versions: deformed versions of each sketch; the paper's are 10.
        seed: of the deformations.
    """
    from ..data.deform import Deformation
    from ..evaluate.fine_grained import robustness as measured

    split, deformation = read_split(data, method.config), Deformation()
    strokes, canvas = _test_strokes(split)
    rows = []
    for network in _networks(method, untrained, base, data, split):
        result = measured(
            network.embed,
            strokes,
            network.gallery,
            split.test.pairs,
            canvas=canvas,
            size=method.config.image_size,
            versions=versions,
            deformation=deformation,
            seed=seed,
            metric=_metric(method),
        )
        rows.append(
            {
                "network": network.name,
                "Acc@1": _percent(result.accuracy),
                "Acc@1 deformed": _percent(float(np.mean(result.deformed))),
                "relative drop": round(result.mean, 2),
                "its deviation": round(result.deviation, 2),
            }
        )
    note = (
        f"Percent; {len(strokes)} sketches in {versions} versions each, the deviation over the versions. "
        f"{deformation}. The paper's drops on QMUL-Shoe-V2: 19.16 (3.48) without, 13.84 (2.41) with the "
        f"topology loss (ImageNet). {split.name}. {training_facts(method, untrained, base)}"
    )
    return [Table(f"Robustness to deformed strokes: {data.name}", rows, note)]


def training_facts(method: PhotoTopology, untrained: PhotoTopology, base: Method | None = None) -> str:
    """What was trained from what, every setting in which it differs from the defaults, and base from it."""
    config, told = method.config, set(_TOLD_ELSEWHERE)
    if config.weights != "random" or not config.pretrain_steps:
        told |= {f.name for f in fields(config) if f.name.startswith("pretrain_")}  # they did nothing
    sketches, photos = method.training_images.tolist()
    facts = (
        f"Trained as {config.objective} for {int(method.steps_trained)} steps of {config.batch_size} pairs, "
        f"on {photos} photos and {sketches} sketches of them; "
        f"{untrained.start_about or 'start weights not kept'} (paper: pre-trained on ImageNet or larger)"
    )
    if different := different_settings(config, PhotoTopologyConfig(), told):
        facts += (
            ". Settings other than the defaults, which are the paper's or, where it is silent, published "
            f"baselines' or ours: {', '.join(different)}"
        )
    return f"{facts}.{_base_facts(base, config)}"


def _base_facts(base: Method | None, config: PhotoTopologyConfig) -> str:
    """What the base run was trained as, and every setting in which it differs from the run beside it."""
    if not isinstance(base, PhotoTopology):
        return "" if base is None else f" Base run: of the method {type(base).__name__}."
    sketches, photos = base.training_images.tolist()
    different = [
        f"{f.name} {getattr(base.config, f.name)}"
        for f in fields(config)
        if f.name != "impl" and getattr(base.config, f.name) != getattr(config, f.name)
    ]
    return (
        f" Base run: {int(base.steps_trained)} steps on {photos} photos and {sketches} sketches of them; "
        f"its settings other than this run's: {', '.join(different) or 'none'}."
    )


#: fields of the config that a table's note says in words, or that change no figure
_TOLD_ELSEWHERE = (
    "steps",
    "batch_size",
    "objective",
    "weights",
    "pretrain_seed",
    "impl",
    "category",
    "split",
)

PhotoTopology.protocols = {
    "retrieval": retrieval,
    "smoothness": smoothness,
    "early": early,
    "attribution": attribution,
    "robustness": robustness,
}
