"""Fine-grained retrieval: which photo was this sketch drawn after? Ranks, accuracies and what they hide.

Beside Acc@k this holds what the photo topology paper (Li, Pang, Song: Photo Pre-Training, But for Sketch,
CVPR 2023) measures its models with: smoothness of what is retrieved, early retrieval and error attribution
(section 4), and robustness to deformed strokes (section 3). "Ours" is the model under test, "base" the one
it is compared with.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..data.deform import Deformation, cut_to_share, deform
from ..data.render import LINE_WIDTH, sketch_images
from ..data.strokes import Sketch
from ..ops._contract import check_integer, check_number
from . import retrieval as common

METRICS = ("euclidean", "cosine")
#: Images [n, H, W, 3] uint8, dark on white, to vectors [n, D]: a model in evaluation mode.
Embed = Callable[[NDArray[np.uint8]], Any]

# --------------------------------------------------------------------------------------------------
# Ranks and accuracies


def match_ranks(
    query: ArrayLike | Tensor,
    gallery: ArrayLike | Tensor,
    match: ArrayLike | Tensor,
    *,
    metric: str = "euclidean",
    chunk: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """How many other photos are at least as near to each query as its own: int64 [Q], 0 being the best.

    Ties count against the photo: an embedding that gives everything one place has rank G - 1 throughout, not
    0. The Euclidean distance is taken from float32 differences, never from products that cancel; both sides
    are first divided by one power of two, so that no square overflows, and no rank changes by it. The cosine
    is that of `retrieval.nearest`, exact up to one rounding; a zero vector has cosine 0 to all. Equal gallery
    rows tie exactly, and no rank depends on `chunk`.

    Args:
        query, gallery: [Q, D] and [G, D], any floating dtype, array or tensor.
        match: [Q] integers, the photo of each query as a row of gallery.
        metric: "euclidean" or "cosine".
        chunk: queries ranked at a time; None keeps to a million distances (16 million on CUDA), or one query.
        device: where to rank, CPU or CUDA; None is where `query` is. The result is on the CPU.

    Raises TypeError or ValueError that names the argument: dtypes, shapes, empty or non-finite vectors,
    matches outside the gallery. No gradients.
    """
    distances = _Distances(query, gallery, metric, chunk, device)
    own = torch.from_numpy(_matches(match, distances.queries, distances.photos))
    ranks = [
        (block <= block.gather(1, own[rows, None].to(block.device))).sum(dim=1).cpu() - 1
        for rows, block in distances
    ]
    return torch.cat(ranks)


def nearest_photos(
    query: ArrayLike | Tensor,
    gallery: ArrayLike | Tensor,
    k: int,
    *,
    metric: str = "euclidean",
    chunk: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The k photos nearest to each query, best first: int64 [Q, k].

    By the distances of `match_ranks`, whose arguments these are; of equally near photos the lowest row comes
    first. k is 1 to G. (`retrieval.nearest` is the same for cosine, with the similarities.)
    """
    distances = _Distances(query, gallery, metric, chunk, device)
    k = check_integer("k", k, 1, distances.photos)
    found = []
    for _, block in distances:
        keys = torch.empty(block.shape, dtype=torch.int64, device=block.device)
        common._pack(-block, torch.arange(distances.photos, device=block.device) << 1, keys)
        found.append(common._unpack(keys.topk(k, dim=1, largest=False).values.cpu())[1])
    return torch.cat(found)


_PAIRS_AT_ONCE = (2**20, 2**24)  # on CPU, on CUDA: each takes some 50 bytes, products, keys and work space


class _Distances:
    """Iterates over (rows of the queries, distances [n, G] float32, or what ranks as they do) in chunks."""

    def __init__(
        self,
        query: ArrayLike | Tensor,
        gallery: ArrayLike | Tensor,
        metric: str,
        chunk: int | None,
        device: torch.device | str | None,
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")
        self.cosine = metric == "cosine"
        rows, others = (common._unit_vectors if self.cosine else _scaled_vectors)(query, gallery)
        self.device = common._device_of(query, device)
        self.query, self.gallery = rows, others.to(self.device)
        self.queries, self.photos = len(rows), len(others)
        fitting = max(1, _PAIRS_AT_ONCE[self.device.type == "cuda"] // self.photos)
        self.chunk = fitting if chunk is None else check_integer("chunk", chunk, 1)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        gallery = self.gallery.double() if self.cosine else self.gallery
        for start in range(0, self.queries, self.chunk):
            rows = slice(start, min(start + self.chunk, self.queries))
            block = self.query[rows].to(self.device)
            if self.cosine:
                yield rows, -(block.double() @ gallery.T).float()  # 1 - cos would round once more
            else:
                yield rows, torch.cdist(block, gallery, compute_mode="donot_use_mm_for_euclid_dist")


def _scaled_vectors(query: ArrayLike | Tensor, gallery: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32 on the CPU, over the power of two that brings the largest number below 1."""
    sides = [
        _finite_rows("query", query),
        _finite_rows("gallery", gallery),
    ]
    if sides[0].shape[1] != sides[1].shape[1]:
        raise ValueError(
            f"gallery must have the {sides[0].shape[1]} columns of query, got shape {tuple(sides[1].shape)}"
        )
    exponent = np.frexp(max(float(np.abs(side).max()) for side in sides))[1]
    scaled = [torch.from_numpy(np.ldexp(side, -exponent).astype(np.float32)) for side in sides]
    return scaled[0], scaled[1]


def _finite_rows(name: str, value: ArrayLike | Tensor) -> NDArray[Any]:
    """[N, D] float32 or float64."""
    rows = common._floating_rows(name, value)
    if isinstance(rows, Tensor):
        rows = rows.cpu().to(torch.float64 if rows.dtype == torch.float64 else torch.float32).numpy()
    rows = rows.astype(np.float64 if rows.dtype.itemsize > 4 else np.float32, copy=False)
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return rows


def _matches(match: ArrayLike | Tensor, queries: int, photos: int) -> NDArray[np.int64]:
    own = common._labels("match", match, queries).numpy()
    if own.min() < 0 or own.max() >= photos:
        raise ValueError(f"match must lie in 0..{photos - 1}, got {own.min()}..{own.max()}")
    return own


def accuracy_at(ranks: ArrayLike | Tensor, tops: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Acc@k for each k of `tops`: the share of queries whose own photo is among the k nearest, in [0, 1].

    ranks: [Q] integers of `match_ranks`, 0 the best. A k of the gallery's size or more gives 1.

    Raises TypeError or ValueError that names the argument.
    """
    values = _ranks(ranks)
    return {top: float((values < top).mean()) for top in _tops(tops)}


def rank_percentile(ranks: ArrayLike | Tensor, gallery: int) -> float:
    """The mean share of the other photos that are farther from the query than its own, in [0, 1].

    1 - rank / (gallery - 1), averaged: 1 is perfect, 1/2 what a random order gives; 1 where the gallery is
    one photo. It tells rankings apart where hardly any query has its photo first, as half-made sketches do.

    Raises TypeError or ValueError that names the argument.
    """
    values = _ranks(ranks)
    gallery = check_integer("gallery", gallery, 1)
    if values.max() >= gallery:
        raise ValueError(f"ranks must be below gallery, {gallery}, got {values.max()}")
    return float(1 - values.mean() / max(gallery - 1, 1))


def _ranks(ranks: ArrayLike | Tensor, name: str = "ranks") -> NDArray[np.int64]:
    values = ranks.detach().cpu().numpy() if isinstance(ranks, Tensor) else np.asarray(ranks)
    if values.dtype.kind not in "iu":
        raise TypeError(f"{name} must have an integer dtype, got {values.dtype}")
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} must have shape [Q], Q at least 1, got {values.shape}")
    if values.min() < 0:
        raise ValueError(f"{name} must be 0 or more, got {values.min()}")
    return values.astype(np.int64)


def _tops(tops: Sequence[int]) -> list[int]:
    values = [check_integer(f"tops[{i}]", top, 1) for i, top in enumerate(tops)]
    if not values:
        raise ValueError("tops must hold at least one number, got none")
    return values


# --------------------------------------------------------------------------------------------------
# Appearance of what is retrieved


def smoothness(features: ArrayLike | Tensor, index: ArrayLike | Tensor) -> NDArray[np.float64]:
    """How alike the photos retrieved by each query look: float64 [Q], less is smoother (paper, section 4).

    The mean over all k(k-1)/2 pairs of the k retrieved photos of ||a/|a| - b/|b|||^2, in [0, 4]: the squared
    distance of features of length 1, twice the cosine distance, which is LPIPS (Zhang et al. 2018) without
    learnt weights on a feature map of one position. Features of length 1, because activations grow with a
    photo's contrast as well as with what it shows; a zero vector stays zero. Computed in float64 about the
    pairs' own mean, so that near-copies do not cancel.

    The paper takes the second last layer of VGG-16, and not how that is normalised: its absolute figures
    (0.025 to 0.07) do not compare with these, its ratios between models do. Here the features are an
    argument. Take them from a frozen network that no compared model has trained, such as the pre-trained
    teacher: a model's own features would call its own order smooth.

    Args:
        features: [G, F] appearance features of the gallery's photos, any floating dtype, array or tensor.
        index: [Q, k] integers, the photos of each query, best first (`nearest_photos`); the paper's k is 10.
            At least 2.

    Raises TypeError or ValueError that names the argument.
    """
    unit = _unit_features(features)
    photos = _retrieved("index", index, len(unit), least=2)
    k = photos.shape[1]
    result = np.empty(len(photos))
    for rows in _blocks(len(photos), k * unit.shape[1]):
        shown = unit[photos[rows]]
        spread = shown - shown.mean(axis=1, keepdims=True)
        # the mean over pairs of |a - b|^2 is 2k / (k - 1) times the mean of |a - mean|^2
        result[rows] = 2 / (k - 1) * np.einsum("qkf,qkf->q", spread, spread)
    return result


def fidelity(
    features: ArrayLike | Tensor, index: ArrayLike | Tensor, match: ArrayLike | Tensor
) -> NDArray[np.float64]:
    """How far the photos retrieved by each query look from its own: float64 [Q], less is nearer (section 4).

    The mean over the k retrieved photos of the Euclidean distance ||a/|a| - b/|b||| to the true photo, in [0,
    2]; the true photo counts 0 where it is among them. Features as for `smoothness`.

    Raises TypeError or ValueError that names the argument.
    """
    unit = _unit_features(features)
    photos = _retrieved("index", index, len(unit))
    own = _matches(match, len(photos), len(unit))
    result = np.empty(len(photos))
    for rows in _blocks(len(photos), photos.shape[1] * unit.shape[1]):
        gaps = unit[photos[rows]] - unit[own[rows]][:, None]
        result[rows] = np.sqrt(np.einsum("qkf,qkf->qk", gaps, gaps)).mean(axis=1)
    return result


def _unit_features(features: ArrayLike | Tensor) -> NDArray[np.float64]:
    values = _finite_rows("features", features).astype(np.float64)
    largest = np.abs(values).max(axis=1, keepdims=True)
    values /= np.where(largest > 0, largest, 1)  # so that no square over- or underflows
    length = np.sqrt(np.einsum("gf,gf->g", values, values))[:, None]
    values /= np.where(length > 0, length, 1)
    return values


def _retrieved(name: str, index: ArrayLike | Tensor, photos: int, least: int = 1) -> NDArray[np.int64]:
    order = common._ranked(name, index, "iu")
    if order.shape[1] < least:
        raise ValueError(f"{name} must have shape [Q, k], k at least {least}, got {order.shape}")
    if order.min() < 0 or order.max() >= photos:
        raise ValueError(f"{name} must lie in 0..{photos - 1}, got {order.min()}..{order.max()}")
    return order.astype(np.int64)


def _blocks(count: int, width: int) -> Iterator[slice]:
    """Slices of `count` rows, each of so many that `width` float64 a row take a few times 8 MB."""
    step = max(1, 2**20 // width)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


# --------------------------------------------------------------------------------------------------
# Unfinished and deformed sketches


class EarlyRow(NamedTuple):
    """One point of an early-retrieval curve."""

    share: float
    """of the drawn length that was there, in [0, 1]"""
    accuracy: dict[int, float]
    """Acc@k by k, in [0, 1]"""
    percentile: float
    """`rank_percentile`"""


def early_retrieval(
    embed: Embed,
    strokes: Sequence[Sketch],
    gallery: ArrayLike | Tensor,
    match: ArrayLike | Tensor,
    *,
    canvas: float,
    size: int,
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    tops: Sequence[int] = (1, 5, 10),
    metric: str = "euclidean",
    line_width: float = LINE_WIDTH,
    batch: int = 256,
) -> list[EarlyRow]:
    """Accuracy against the share of the drawing made so far (paper, section 4, Figure 5b), a row a share.

    Each sketch is cut to the share of its drawn length (`cut_to_share`: pen-down length in stroke order, the
    last point interpolated), drawn where it lies on its canvas (`sketch_images`), embedded and ranked
    (`match_ranks`). The sketch of share 1 is drawn by the same hand, so the last row is the accuracy to hold
    the others against; it equals the test set's Acc@k where that set's images were drawn like this.

    Args:
        embed: images uint8 [n, size, size, 3], dark on white, to vectors [n, D], floating; the model in
            evaluation mode.
        strokes: Q sketches, on square canvases from (0, 0) to (canvas, canvas).
        gallery: [G, D] vectors of the photos, by the same model.
        match: [Q] integers, the photo of each sketch.
        canvas: side of the canvas in the sketches' units.
        size: side of the images in pixels.
        shares: increasing, each in [0, 1].
        tops: k of the accuracies.
        metric: as for `match_ranks`.
        line_width: pixels across a line.
        batch: images embedded at a time.

    Raises TypeError or ValueError that names the argument, before anything is embedded; ValueError where
    embed gives something else than n finite vectors of the gallery's width.
    """
    shares, tops = _shares(shares), _tops(tops)
    setting = _Queries(embed, strokes, gallery, match, canvas, size, metric, line_width, batch)
    rows = []
    for share in shares:
        ranks = setting.ranks([cut_to_share(sketch, share) for sketch in strokes])
        rows.append(EarlyRow(share, accuracy_at(ranks, tops), rank_percentile(ranks, setting.photos)))
    return rows


def area_under_curve(rows: Sequence[EarlyRow], top: int | None = None) -> float:
    """The mean height of an early-retrieval curve over its shares, in [0, 1]: Acc@top, or the percentile.

    The trapezoid area between the first and the last share, over the distance between them; of one row, its
    height. top: one of the rows' k; None is the rank percentile. Curves compare where their shares are equal.

    Raises ValueError that names the argument.
    """
    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    if top is not None and any(top not in row.accuracy for row in rows):
        raise ValueError(f"top must be one of {list(rows[0].accuracy)}, got {top!r}")
    heights = np.array([row.percentile if top is None else row.accuracy[top] for row in rows])
    shares = np.array(_shares([row.share for row in rows]))
    if len(rows) == 1:
        return float(heights[0])
    return float((np.diff(shares) * (heights[1:] + heights[:-1]) / 2).sum() / (shares[-1] - shares[0]))


class Robustness(NamedTuple):
    """What deformed strokes cost; see `robustness`. Accuracies in [0, 1], drops in percent."""

    accuracy: float
    """Acc@1 of the sketches as they are"""
    deformed: tuple[float, ...]
    """Acc@1 of each version"""
    drops: tuple[float, ...]
    """100 (accuracy - deformed) / accuracy of each version; negative where it is better"""
    mean: float
    """of the drops"""
    deviation: float
    """of the drops: their standard deviation (divisor versions - 1), NaN of a single version"""


def robustness(
    embed: Embed,
    strokes: Sequence[Sketch],
    gallery: ArrayLike | Tensor,
    match: ArrayLike | Tensor,
    *,
    canvas: float,
    size: int,
    versions: int = 10,
    deformation: Deformation | None = None,
    seed: int = 0,
    metric: str = "euclidean",
    line_width: float = LINE_WIDTH,
    batch: int = 256,
) -> Robustness:
    """The relative drop of Acc@1 over deformed versions of each sketch (paper, section 3).

    Version v of sketch i is deformed by numbers of (seed, v, i) alone: the same for every model compared, and
    for a sketch whichever others there are. The undeformed sketches are drawn by the same hand, from their
    strokes, so nothing but the deformation differs. Where they have Acc@1 0 nothing can drop, and drops, mean
    and deviation are NaN.

    Args:
        versions: at least 1; the paper's are 10.
        deformation: kinds and strengths; None is `Deformation()`.
        seed: of the deformations, 0 or more.
        the rest: as for `early_retrieval`.

    Raises as `early_retrieval`.
    """
    versions, seed = check_integer("versions", versions, 1), check_integer("seed", seed, 0)
    deformation = Deformation() if deformation is None else deformation
    if not isinstance(deformation, Deformation):
        raise TypeError(f"deformation must be a Deformation, got {deformation!r}")
    setting = _Queries(embed, strokes, gallery, match, canvas, size, metric, line_width, batch)
    accuracy = accuracy_at(setting.ranks(strokes), (1,))[1]
    deformed = []
    for version in range(versions):
        drawn = [
            deform(sketch, deformation, np.random.default_rng((seed, version, i)), canvas)
            for i, sketch in enumerate(strokes)
        ]
        ranks = setting.ranks([d.sketch for d in drawn], [d.widths for d in drawn])
        deformed.append(accuracy_at(ranks, (1,))[1])
    drops = [100 * (accuracy - worse) / accuracy if accuracy else float("nan") for worse in deformed]
    deviation = float(np.std(drops, ddof=1)) if versions > 1 else float("nan")
    return Robustness(accuracy, tuple(deformed), tuple(drops), float(np.mean(drops)), deviation)


class _Queries:
    """What turns strokes into ranks: how they are drawn, embedded and compared with the gallery."""

    def __init__(
        self,
        embed: Embed,
        strokes: Sequence[Sketch],
        gallery: ArrayLike | Tensor,
        match: ArrayLike | Tensor,
        canvas: float,
        size: int,
        metric: str,
        line_width: float,
        batch: int,
    ) -> None:
        if not callable(embed):
            raise TypeError(f"embed must be callable, got {embed!r}")
        for number, sketch in enumerate(strokes):
            if not isinstance(sketch, Sketch):  # an item of a StrokeDataset, say
                raise TypeError(f"strokes[{number}] must be a Sketch, got {type(sketch).__name__}")
        if not len(strokes):
            raise ValueError("strokes must hold at least one sketch, got none")
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")
        self.embed, self.metric, self.gallery = embed, metric, _finite_rows("gallery", gallery)
        self.photos = len(self.gallery)
        self.match = _matches(match, len(strokes), self.photos)
        self.canvas = check_number("canvas", canvas, above=0)
        self.size = check_integer("size", size, 1)
        self.line_width = check_number("line_width", line_width, above=0)
        self.batch = check_integer("batch", batch, 1)

    def ranks(
        self, sketches: Sequence[Sketch], widths: Sequence[NDArray[np.float64]] | None = None
    ) -> Tensor:
        vectors = [
            self._embedded(
                sketches[start : start + self.batch], widths and widths[start : start + self.batch]
            )
            for start in range(0, len(sketches), self.batch)
        ]
        return match_ranks(np.concatenate(vectors), self.gallery, self.match, metric=self.metric)

    def _embedded(
        self, sketches: Sequence[Sketch], widths: Sequence[NDArray[np.float64]] | None
    ) -> NDArray[Any]:
        images = sketch_images(
            sketches, self.size, canvas=self.canvas, widths=widths, line_width=self.line_width
        )
        vectors = _finite_rows("the vectors of embed", self.embed(images))
        if vectors.shape != (len(sketches), self.gallery.shape[1]):
            raise ValueError(
                f"embed must give vectors [{len(sketches)}, {self.gallery.shape[1]}], the gallery's width, "
                f"got shape {vectors.shape}"
            )
        return vectors


def _shares(shares: Sequence[float]) -> list[float]:
    values = [check_number(f"shares[{i}]", share, at_least=0) for i, share in enumerate(shares)]
    if not values:
        raise ValueError("shares must hold at least one number, got none")
    if max(values) > 1 or any(later <= earlier for earlier, later in itertools.pairwise(values)):
        raise ValueError(f"shares must increase within [0, 1], got {values}")
    return values


# --------------------------------------------------------------------------------------------------
# Error attribution

#: The four scenarios of section 4; 0 is what the paper names none for. See `error_attribution`.
SCENARIOS: dict[int, str] = {
    1: "the sketch drifts away from the photos",
    2: "the true photo is near, the model misses it",
    3: "a style of drawing the models cannot deal with",
    4: "the sketch says too little to tell the photos apart",
    0: "what is retrieved differs, but lies near the true photo",
}
#: Whose problem a scenario is.
PROBLEM_OF: dict[int, str] = {1: "user", 2: "model", 3: "model", 4: "user", 0: "unattributed"}


class Thresholds(NamedTuple):
    """A score above its threshold is large, one at or below it small."""

    smoothness_ours: float
    smoothness_base: float
    fidelity_ours: float


@dataclass(frozen=True)
class ErrorAttribution:
    """What `error_attribution` finds. W queries are wrong, of Q.

    wrong: int64 [W], the queries whose own photo is not first, ascending. scenario: int64 [W], 1 to 4, or 0
    for the combination that the paper names no scenario for. thresholds: those used. smoothness_ours,
    smoothness_base, fidelity_ours: float64 [Q], of all queries.
    """

    wrong: NDArray[np.int64]
    scenario: NDArray[np.int64]
    thresholds: Thresholds
    smoothness_ours: NDArray[np.float64]
    smoothness_base: NDArray[np.float64]
    fidelity_ours: NDArray[np.float64]

    @property
    def problem(self) -> list[str]:
        """W times "user", "model" or "unattributed"."""
        return [PROBLEM_OF[scenario] for scenario in self.scenario.tolist()]

    @property
    def counts(self) -> dict[int, int]:
        """Wrong queries by scenario, in the order of SCENARIOS; they sum to W."""
        return {scenario: int((self.scenario == scenario).sum()) for scenario in SCENARIOS}

    @property
    def problem_counts(self) -> dict[str, int]:
        """Wrong queries by whose problem they are: "user", "model", "unattributed"."""
        problems = self.problem
        return {whose: problems.count(whose) for whose in ("user", "model", "unattributed")}


def error_attribution(
    ranks: ArrayLike | Tensor,
    match: ArrayLike | Tensor,
    ours: ArrayLike | Tensor,
    base: ArrayLike | Tensor,
    features: ArrayLike | Tensor,
    *,
    top: int = 5,
    thresholds: Thresholds | None = None,
) -> ErrorAttribution:
    """For each query that is retrieved wrong: is the model not good enough, or is the sketch? (section 4)

    With S_ours and S_base the `smoothness` of the `top` photos retrieved by either model, and F_ours the
    `fidelity` of those by ours:

        scenario  S_ours  F_ours  S_base   whose problem
               1  large   large   any      user: the sketch drifts away from the photos
               2  small   small   any      model: the true photo is near, and missed
               3  small   large   large    model: a style of drawing that base, sensitive to style, is lost in
               4  small   large   small    user: too simple a sketch to tell its photo from others like it
               0  large   small   any      unattributed: the paper names no scenario

    The paper gives no thresholds. By default each is the median of its score over all Q queries, right ones
    too, so that "large" means more than is usual with this gallery; a score equal to its threshold is small.
    S_ours and S_base have each their own, so that the smoother model is not always small. Pass the
    thresholds found on one set to attribute another's errors alike. A query is wrong where its rank is not 0,
    a tie for the first place included. The true photo, where it is among the `top`, counts in S and, as 0, in
    F. Without wrong queries the arrays are empty.

    Args:
        ranks: [Q] integers of `match_ranks` by ours.
        match: [Q] integers, the photo of each query.
        ours, base: [Q, k] integers, k at least `top`: the photos retrieved by either model, best first.
        features: [G, F] appearance features of the photos, as for `smoothness`.
        top: 2 or more; the paper's is 5.
        thresholds: None is the medians.

    Raises TypeError or ValueError that names the argument.
    """
    places = _ranks(ranks)
    top = check_integer("top", top, 2)
    unit = _unit_features(features)
    lists = {}
    for name, index in (("ours", ours), ("base", base)):
        photos = _retrieved(name, index, len(unit), least=top)
        if len(photos) != len(places):
            raise ValueError(
                f"{name} must have a row for each of the {len(places)} ranks, got {photos.shape}"
            )
        lists[name] = photos[:, :top]
    scores = (
        smoothness(unit, lists["ours"]),
        smoothness(unit, lists["base"]),
        fidelity(unit, lists["ours"], match),
    )
    if thresholds is None:
        thresholds = Thresholds(*(float(np.median(score)) for score in scores))
    thresholds = Thresholds(
        *(check_number(f"thresholds.{name}", value) for name, value in thresholds._asdict().items())
    )
    rough, base_rough, far = (score > limit for score, limit in zip(scores, thresholds, strict=True))
    scenario = np.select([rough & far, ~rough & ~far, ~rough & base_rough, ~rough], [1, 2, 3, 4], default=0)
    wrong = np.flatnonzero(places > 0)
    return ErrorAttribution(wrong, scenario[wrong], thresholds, *scores)


# --------------------------------------------------------------------------------------------------
# Pictures (a gallery of what is retrieved: `retrieval.retrieval_picture`, with index of `nearest_photos` and
# right = index == match[:, None])


def early_retrieval_picture(curves: Mapping[str, Sequence[EarlyRow]], *, title: str | None = None) -> bytes:
    """A PNG of early-retrieval curves, a panel for each Acc@k and one for the rank percentile.

    A dashed line at the height of the first curve's last row shows what the whole drawing gives.

    Args:
        curves: label, such as a model's name, to its rows; at most 9, with the same k in all.
        title: a line above the panels.

    Raises ValueError that names the argument.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    if not 1 <= len(curves) <= len(common._COLOURS):
        raise ValueError(f"curves must be 1 to {len(common._COLOURS)}, got {len(curves)}")
    tops = _common_tops(curves)
    panels: list[tuple[str, int | None]] = [(f"Acc@{top}", top) for top in tops]
    panels.append(("Mean rank percentile", None))

    width = 3.1 * len(panels)
    figure = Figure(figsize=(width, 3.4 + 0.4 * bool(title)), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, top) in zip(axes, panels, strict=True):
        for number, (label, rows) in enumerate(curves.items()):
            heights = [row.percentile if top is None else row.accuracy[top] for row in rows]
            colour, marker = common._COLOURS[number], common._MARKERS[number % len(common._MARKERS)]
            if number == 0:
                whole = f"{label}, {rows[-1].share:.0%} of the drawing"
                axis.axhline(heights[-1], color=colour, lw=0.8, linestyle="--", alpha=0.6, label=whole)
            shares = [row.share for row in rows]
            axis.plot(shares, heights, color=colour, marker=marker, markersize=4, label=label)
        axis.set_title(name, fontsize=11, loc="left")
        highest = axis.dataLim.y1
        axis.set(xlim=(0, 1.03), ylim=(0, 1.03 if highest > 0.9 else max(1.08 * highest, 0.01)))
        axis.set_xlabel("share of the drawing made", fontsize=9)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(5))
            side.set_major_formatter(PercentFormatter(1.0))
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = min(len(labels), len(panels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    if title:
        figure.suptitle(title, fontsize=12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _common_tops(curves: Mapping[str, Sequence[EarlyRow]]) -> list[int]:
    """The k of the accuracies, which all rows of all curves must hold."""
    found = {tuple(row.accuracy) for rows in curves.values() for row in rows}
    if len(found) != 1 or not all(len(rows) for rows in curves.values()):
        raise ValueError(f"curves must have rows, all with the same k, got {sorted(found)}")
    return list(found.pop())


def attribution_picture(
    query_images: ArrayLike | Tensor,
    gallery_images: ArrayLike | Tensor,
    ours: ArrayLike | Tensor,
    match: ArrayLike | Tensor,
    attribution: ErrorAttribution,
    *,
    rows: int = 2,
    top: int = 5,
    side: int = 112,
) -> bytes:
    """A PNG of wrong queries by scenario: the sketch, its photo, and the `top` photos retrieved by ours.

    As the paper's Figure 5c. Each scenario that occurs has a heading with its meaning, whose problem it is
    and its count, and its first `rows` queries. The true photo bears a tick wherever it stands, other photos
    a cross.

    Args:
        query_images: [Q, H, W, 3] uint8 RGB. gallery_images: [G, H', W', 3] uint8 RGB; only those shown are
            read.
        ours: [Q, k] integers, k at least `top`. match: [Q] integers.
        attribution: of these queries; at least one of them wrong.
        rows: queries a scenario, at least 1.
        side: pixels of a cell, at least 32.

    Raises TypeError or ValueError that names the argument.
    """
    from PIL import Image, ImageDraw

    queries = common._images("query_images", query_images)
    photos = common._images("gallery_images", gallery_images)
    rows, top = check_integer("rows", rows, 1), check_integer("top", top, 1)
    side = check_integer("side", side, 32)
    order = _retrieved("ours", ours, len(photos), least=top)[:, :top]
    own = _matches(match, len(queries), len(photos))
    if len(order) != len(queries):
        raise ValueError(
            f"ours must have a row for each of the {len(queries)} query_images, got {order.shape}"
        )
    if len(attribution.smoothness_ours) != len(queries) or not len(attribution.wrong):
        raise ValueError(
            f"attribution must be of these {len(queries)} queries, one or more of them wrong, got "
            f"{len(attribution.wrong)} wrong of {len(attribution.smoothness_ours)}"
        )
    groups = {
        scenario: attribution.wrong[attribution.scenario == scenario]
        for scenario in SCENARIOS
        if attribution.counts[scenario]
    }

    gap, margin, heading = 10, 16, 30
    lefts = [margin, margin + side + gap]
    lefts += [lefts[1] + side + 3 * gap + rank * (side + gap) for rank in range(top)]
    width = lefts[-1] + side + margin
    height = margin + 20 + sum(heading + min(rows, len(g)) * (side + gap) + gap for g in groups.values())
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for left, name in zip(lefts, ["query", "its photo", *map(str, range(1, top + 1))], strict=True):
        draw.text((left + side / 2, margin + 12), name, fill=common.MUTED, font=common._font(14), anchor="ms")
    y = margin + 20
    for scenario, members in groups.items():
        text = _scenario_heading(scenario, len(members), len(attribution.wrong))
        text = common._shortened(text, common._font(15), width - 2 * margin)
        draw.text((margin, y + 20), text, fill=common.INK, font=common._font(15), anchor="ls")
        y += heading
        for query in members[:rows].tolist():
            cells = [(queries[query], None), (photos[own[query]], True)]
            cells += [(photos[item], bool(item == own[query])) for item in order[query].tolist()]
            for left, (pixels, right) in zip(lefts, cells, strict=True):
                picture.paste(common._cell(pixels, side, right), (left, y))
            y += side + gap
        y += gap
    return common._png(picture)


def _scenario_heading(scenario: int, count: int, wrong: int) -> str:
    problem = PROBLEM_OF[scenario]
    whose = "unattributed" if scenario == 0 else f"the {problem}'s problem"
    number = "No scenario" if scenario == 0 else f"Scenario {scenario}"
    return f"{number} ({count} of {wrong} errors, {whose}): {SCENARIOS[scenario]}"
