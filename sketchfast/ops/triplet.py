"""Triplet losses: the ranking-matrix loss of all B x B x B triplets of a batch, and that of matched pairs.

Definitions: D_ij = ||query_i - gallery_j||, teacher_ij the distance of photos i and j under a frozen model.
A ranking triplet is three batch positions i, j, k, all different; R = +1 where teacher_ij <= teacher_ik, else
-1; its term is max(margin + R * (D_ij - D_ik), 0), active where D + margin, rounded to the dtype of the
arithmetic, is greater than the other distance. No triplet is ever listed: an active one leaves +1 at the
distance it shrinks and -1 at the one it grows, in weights W [B, B] of integers, so that with Z triplets
dL/dD = W / Z and L = (<W, D> + margin * active) / Z.

Source: "Photo Pre-Training, But for Sketch" (Li, Pang, Song 2023), the ranking matrix R and Eq. 3 and 4; its
Eq. 1, the loss of matched pairs, is that of Yu et al. 2016.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.reference import triplet as reference
from . import _contract as contract

METRICS = ("euclidean", "sqeuclidean", "cosine")
MININGS = ("all", "hardest", "semihard", "random")

#: The one rule of how all triplets are counted, by impl and device: from this batch size on with a search
#: tree over ranks, O(B^2 log B); below it pair by pair, O(B^3), which has no tree to build. Where the two
#: cross in benchmarks/bench_triplet.py.
TREE_FROM = {
    ("native", "cpu"): 512,
    ("native", "cuda"): 1024,
    ("triton", "cuda"): 512,
    ("triton", "cpu"): 64,
}


def _op(name: str, impl: str) -> Any:
    return getattr(torch.ops.sketchfast, f"{name}_{impl}")


# --- schemas, fakes, autograd -------------------------------------------------------------------------------
#
# query, gallery [B, D] and dist [B, B] arrive contiguous in the dtype of the arithmetic; teacher [N, N] as
# the user holds it, of any float dtype and strides, with the batch's rows `indices` [B] int64 (clamped to
# [0, N)). loss is a scalar of the dtype of the arithmetic, scale what the integers count for in backward.


def _scalar(like: Tensor) -> Tensor:
    return like.new_empty(())


def _square(like: Tensor) -> Tensor:
    return like.new_empty((like.shape[0], like.shape[0]), dtype=torch.int32)


def _fake_gradients(impl: str):
    def fake(*args):  # (..., query, gallery, squared)
        return torch.empty_like(args[-3]), torch.empty_like(args[-2])

    return fake


contract.define(
    "triplet",
    "triplet_embedding_bwd",
    "(Tensor scale, Tensor weights, Tensor query, Tensor gallery, bool squared) -> (Tensor, Tensor)",
    _fake_gradients,
)


def _setup_ranking(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, gallery, _, _, _, ctx.squared, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], query, gallery)


def _triplets(batch: Any) -> Any:
    """How many ordered triplets there are, at least 1."""
    return max(1, batch * (batch - 1) * (batch - 2))


def _backward_ranking(impl: str):
    def backward(ctx: Any, grad: Tensor | None, _weights: None):
        if grad is None:
            return (None,) * 7
        scale = grad / _triplets(ctx.saved_tensors[0].shape[0])
        grads = _op("triplet_embedding_bwd", impl)(scale, *ctx.saved_tensors, ctx.squared)
        return *grads, None, None, None, None, None

    return backward


# weights [B, B] int32: W of all ranking triplets. tree_from: see TREE_FROM.
contract.define(
    "triplet",
    "triplet_ranking_fwd",
    "(Tensor query, Tensor gallery, Tensor teacher, Tensor? indices, float margin, bool squared,"
    " SymInt tree_from) -> (Tensor loss, Tensor weights)",
    lambda impl: lambda query, *_: (_scalar(query), _square(query)),
    setup_context=_setup_ranking,
    backward=_backward_ranking,
)


def _setup_sampled(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, gallery, _, _, _, ctx.squared, _, seed = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], seed, query, gallery)


def _backward_sampled(impl: str):
    def backward(ctx: Any, grad: Tensor | None, _active: None):
        if grad is None:
            return (None,) * 8
        active = ctx.saved_tensors[0]
        scale = grad / max(1, active.shape[0] * active.shape[1])
        grads = _op("triplet_sampled_bwd", impl)(scale, *ctx.saved_tensors, ctx.squared)
        return *grads, None, None, None, None, None, None

    return backward


contract.define(
    "triplet",
    "triplet_sampled_bwd",
    "(Tensor scale, Tensor active, Tensor seed, Tensor query, Tensor gallery, bool squared)"
    " -> (Tensor, Tensor)",
    _fake_gradients,
)
# active [B, samples] int8: R of the s-th triplet of anchor i where it is active, else 0; backward draws the
# triplets again. seed [] int64.
contract.define(
    "triplet",
    "triplet_sampled_fwd",
    "(Tensor query, Tensor gallery, Tensor teacher, Tensor? indices, float margin, bool squared,"
    " SymInt samples, Tensor seed) -> (Tensor loss, Tensor active)",
    lambda impl: (
        lambda query, gallery, teacher, indices, margin, squared, samples, seed: (
            _scalar(query),
            query.new_empty((query.shape[0], samples), dtype=torch.int8),
        )
    ),
    setup_context=_setup_sampled,
    backward=_backward_sampled,
)


def _setup_matrix(ctx: Any, inputs: tuple, output: tuple) -> None:
    dist, _, _, _, ctx.samples, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.dtype = dist.dtype


def _backward_matrix(impl: str):
    def backward(ctx: Any, grad: Tensor | None, _weights: None):
        if grad is None:
            return (None,) * 7
        (weights,) = ctx.saved_tensors
        batch = weights.shape[0]
        triplets = max(1, batch * ctx.samples) if ctx.samples else _triplets(batch)
        return weights.to(ctx.dtype) * (grad / triplets), None, None, None, None, None, None

    return backward


# samples 0: all triplets. Else seed is given, and weights are those of the sampled triplets.
contract.define(
    "triplet",
    "triplet_matrix_fwd",
    "(Tensor dist, Tensor teacher, Tensor? indices, float margin, SymInt samples, Tensor? seed,"
    " SymInt tree_from) -> (Tensor loss, Tensor weights)",
    lambda impl: lambda dist, *_: (_scalar(dist), _square(dist)),
    setup_context=_setup_matrix,
    backward=_backward_matrix,
)


def _setup_pairs(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, gallery, _, _, ctx.squared, ctx.mining, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], query, gallery)


def _backward_pairs(impl: str):
    def backward(ctx: Any, grad: Tensor | None, *_rest: None):
        if grad is None:
            return (None,) * 7
        state, considered, query, gallery = ctx.saved_tensors
        name = "triplet_embedding_bwd" if ctx.mining == "all" else "triplet_chosen_bwd"
        scale = grad / considered.clamp(min=1)
        grads = _op(name, impl)(scale, state, query, gallery, ctx.squared)
        return *grads, None, None, None, None, None

    return backward


contract.define(
    "triplet",
    "triplet_chosen_bwd",
    "(Tensor scale, Tensor chosen, Tensor query, Tensor gallery, bool squared) -> (Tensor, Tensor)",
    _fake_gradients,
)


def _fake_pairs_fwd(impl: str):
    def fake(query, gallery, labels, margin, squared, mining, seed):
        state = _square(query) if mining == "all" else query.new_empty(query.shape[0], dtype=torch.int32)
        return _scalar(query), state, query.new_empty((), dtype=torch.int64)

    return fake


# state: for mining "all" the weights W [B, B] int32, else [B] int32, the negative of each anchor whose
# triplet is active, else -1. considered [] int64: how many triplets the mean is over. labels [B] int64.
contract.define(
    "triplet",
    "triplet_pairs_fwd",
    "(Tensor query, Tensor gallery, Tensor? labels, float margin, bool squared, str mining, Tensor? seed)"
    " -> (Tensor loss, Tensor state, Tensor considered)",
    _fake_pairs_fwd,
    setup_context=_setup_pairs,
    backward=_backward_pairs,
)

# --- checks -------------------------------------------------------------------------------------------------


class _Embeddings(NamedTuple):
    """Query and gallery as the kernels take them; with the cosine the loss is `factor` of theirs."""

    query: Tensor
    gallery: Tensor
    margin: float
    squared: bool
    factor: float


def _check_embeddings(query: Any, gallery: Any, margin: Any, metric: Any, check_values: bool) -> _Embeddings:
    query = contract.check_tensor("query", query, ("B", "D"), contract.FLOAT_DTYPES)
    gallery = contract.check_tensor("gallery", gallery, tuple(query.shape), contract.FLOAT_DTYPES, query)
    if gallery.dtype != query.dtype:
        raise TypeError(f"gallery must be of the dtype of query, {query.dtype}, got {gallery.dtype}")
    if query.shape[1] < 1:
        raise ValueError(f"query must have at least one column, got {contract.describe(query)}")
    margin = contract.check_number("margin", margin, at_least=0)
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")
    if check_values:
        contract.check_finite("query", query.detach())
        contract.check_finite("gallery", gallery.detach())
    dtype = reference.compute_dtype(query.dtype)
    query, gallery = query.to(dtype), gallery.to(dtype)
    if metric == "cosine":
        # 1 - cos = ||x/|x| - y/|y|||^2 / 2: no difference of two numbers near 1, and halving is exact.
        query, gallery = _unit_vectors(query, first=True), _unit_vectors(gallery, first=False)
        return _Embeddings(query.contiguous(), gallery.contiguous(), 2 * margin, True, 0.5)
    return _Embeddings(query.contiguous(), gallery.contiguous(), margin, metric == "sqeuclidean", 1.0)


def _unit_vectors(x: Tensor, first: bool) -> Tensor:
    """[B, D + 2]: x / |x|, and 1 in a column of its side where x is 0, so that its cosine to all is 0."""
    largest = x.detach().abs().amax(1, keepdim=True)
    zero = largest == 0
    scaled = x / torch.where(zero | torch.isinf(largest), 1.0, largest)  # |x| neither over- nor underflows
    length = torch.linalg.vector_norm(torch.where(zero, 1.0, scaled), dim=1, keepdim=True)
    unit = torch.where(zero, 0.0, scaled) / length
    column, other = zero.to(x.dtype), torch.zeros_like(length)
    return torch.cat((unit, column, other) if first else (unit, other, column), 1)


def _check_teacher(
    teacher: Any, indices: Any, like: Tensor, check_values: bool
) -> tuple[Tensor, Tensor | None]:
    """The teacher as it is, never copied, and its rows as int64."""
    batch = like.shape[0]
    if indices is None:
        teacher = contract.check_tensor("teacher", teacher, (batch, batch), contract.FLOAT_DTYPES, like)
    else:
        teacher = contract.check_tensor("teacher", teacher, ("N", "N"), contract.FLOAT_DTYPES, like)
        if teacher.shape[0] != teacher.shape[1]:
            raise ValueError(f"teacher must be square, got {contract.describe(teacher)}")
        indices = contract.check_tensor("indices", indices, (batch,), contract.INTEGER_DTYPES, like)
        indices = indices.detach().long().contiguous()
        # Free on the CPU; under torch.compile and on a GPU only when asked for, the kernels clamp.
        if check_values or (indices.device.type == "cpu" and not torch.compiler.is_compiling()):
            _check_indices(indices, teacher.shape[0])
    teacher = teacher.detach()
    if check_values:
        _check_off_diagonal("teacher", teacher if indices is None else teacher[indices][:, indices])
    return teacher, indices


def _check_indices(indices: Tensor, rows: int) -> None:
    wrong = (indices < 0) | (indices >= rows)
    if bool(wrong.any()):
        where = int(wrong.int().argmax())
        raise ValueError(f"indices must be in [0, {rows}), got {int(indices[where])} at index ({where},)")


def _check_off_diagonal(name: str, matrix: Tensor) -> None:
    diagonal = torch.eye(matrix.shape[0], dtype=torch.bool, device=matrix.device)
    contract.check_finite(name, matrix.masked_fill(diagonal, 0.0))


def _check_sampling(samples: Any, seed: Any, like: Tensor) -> tuple[int, Tensor | None]:
    if samples is None:
        return 0, None
    return contract.check_integer("samples", samples, 1, at_most=2**31 - 1), _seed(seed, like)


def _seed(seed: Any, like: Tensor) -> Tensor:
    """[] int64 on the device; None draws one there, so that a replayed CUDA graph draws anew."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=like.device)
    if isinstance(seed, Tensor):
        seed = contract.check_tensor("seed", seed, ("1",) * min(seed.dim(), 1), (torch.int64,), like)
        if seed.numel() != 1:
            raise ValueError(f"seed must hold one number, got {contract.describe(seed)}")
        return seed.detach().reshape(())
    seed = contract.check_integer("seed", seed, -(2**63), at_most=2**64 - 1)
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=like.device)


def _check_labels(labels: Any, like: Tensor) -> Tensor | None:
    if labels is None:
        return None
    labels = contract.check_tensor("labels", labels, (like.shape[0],), contract.INTEGER_DTYPES, like)
    return labels.detach().long().contiguous()


def _take(teacher: Tensor, indices: Tensor | None) -> Tensor:
    """The teacher of the batch, for the reference; clamped as the kernels do."""
    if indices is None:
        return teacher
    rows = indices.clamp(0, teacher.shape[0] - 1)
    return teacher[rows[:, None], rows]


# --- public functions ---------------------------------------------------------------------------------------


def ranking_triplet_loss(
    query: Tensor,
    gallery: Tensor,
    teacher: Tensor,
    *,
    indices: Tensor | None = None,
    margin: float = 0.01,
    samples: int | None = None,
    seed: int | Tensor | None = None,
    metric: str = "euclidean",
    check_values: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Holds the distances of sketches to photos to the order of the photos' distances under a frozen teacher.

    The mean over triplets of three different batch positions (i, j, k) of
    max(margin + R * (D_ij - D_ik), 0), D_ij = ||query_i - gallery_j||, R = +1 where teacher_ij <= teacher_ik,
    else -1; zeros count. The B x B x B triplets are never formed: O(B^2 log B) time, O(B^2) memory (on a GPU
    as long as its shared memory holds a row, up to B of about 8,000; pair by pair beyond).

    Args:
        query: [B, D] float16, bfloat16, float32 or float64, the sketches' embeddings (or the photos', for the
            single-domain loss).
        gallery: [B, D] of the same dtype, the photos' embeddings; row i is query i's own.
        teacher: [B, B] of any float dtype, distances between the B photos, in any unit (only their order
            counts); or [N, N] between all training photos, with `indices`. Its diagonal is ignored.
        indices: [B] integer, the batch's rows in an [N, N] teacher, which is read in place.
        margin: >= 0, in the unit of D.
        samples: None takes all B (B-1) (B-2) triplets; else this many an anchor, with replacement, by
            Philox4x32-10: key `seed`, counter (i, s, 0, 0), the same on every impl and device.
        seed: an int, or one int64 on the device; None draws it from torch's generator of the device.
        metric: "euclidean"; "sqeuclidean", its square; "cosine", 1 - cos (of a zero vector: 1).
        check_values: also check that values are finite and `indices` in [0, N) (on CPU tensors always
            checked, elsewhere clamped without); waits for a GPU.
        impl: "auto", "native", "triton" or "reference".

    Returns:
        [] float32 (float64 for float64), 0 where B < 3. Gradients to query and gallery, once; none to
        teacher. The gradient of a term is 0 at its kink, that of a distance 0 where it is 0.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; the message names it.
        RuntimeError: an explicit `impl` that cannot run here; a second backward.

    Source: "Photo Pre-Training, But for Sketch" (Li, Pang, Song 2023), Eq. 4; Eq. 3 with photos as queries.
    """
    found = _check_embeddings(query, gallery, margin, metric, check_values)
    teacher, indices = _check_teacher(teacher, indices, query, check_values)
    count, seed = _check_sampling(samples, seed, query)
    device = query.device.type
    chosen = contract.choose_impl("ranking_triplet_loss", impl, device, query.dtype)
    x, y, margin, squared, factor = found
    if chosen == "reference":
        with contract.full_precision(device):
            dist = reference.distances(contract.once(x), contract.once(y), squared)
            loss = _reference_ranking(dist, _take(teacher, indices), margin, count, seed)
    elif count:
        loss = _op("triplet_sampled_fwd", chosen)(x, y, teacher, indices, margin, squared, count, seed)[0]
    else:
        tree_from = TREE_FROM[chosen, device]
        loss = _op("triplet_ranking_fwd", chosen)(x, y, teacher, indices, margin, squared, tree_from)[0]
    return loss if factor == 1.0 else loss * factor


def _reference_ranking(
    dist: Tensor, teacher: Tensor, margin: float, samples: int, seed: Tensor | None
) -> Tensor:
    if seed is None:
        return reference.ranking_loss(dist, teacher, margin)
    return reference.sampled_loss(dist, teacher, margin, samples, seed)


def ranking_triplet_loss_from_distances(
    dist: Tensor,
    teacher: Tensor,
    *,
    indices: Tensor | None = None,
    margin: float = 0.01,
    samples: int | None = None,
    seed: int | Tensor | None = None,
    check_values: bool = False,
    impl: str = "auto",
) -> Tensor:
    """`ranking_triplet_loss` of distances that are already there: its core.

    Args:
        dist: [B, B] float16, bfloat16, float32 or float64; the distance of query i to gallery row j, of any
            metric. Its diagonal is ignored. Compared in float32 (float64 for float64).
        teacher, indices, margin, samples, seed, check_values, impl: as for `ranking_triplet_loss`.

    Returns:
        [] float32 (float64 for float64), 0 where B < 3. Gradient to dist, once: W / Z, W integers.

    Raises:
        As `ranking_triplet_loss`.

    Source: "Photo Pre-Training, But for Sketch" (Li, Pang, Song 2023), Eq. 4.
    """
    dist = contract.check_tensor("dist", dist, ("B", "B"), contract.FLOAT_DTYPES)
    if dist.shape[0] != dist.shape[1]:
        raise ValueError(f"dist must be square, got {contract.describe(dist)}")
    teacher, indices = _check_teacher(teacher, indices, dist, check_values)
    margin = contract.check_number("margin", margin, at_least=0)
    count, seed = _check_sampling(samples, seed, dist)
    if check_values:
        _check_off_diagonal("dist", dist.detach())
    device = dist.device.type
    chosen = contract.choose_impl("ranking_triplet_loss_from_distances", impl, device, dist.dtype)
    matrix = dist.to(reference.compute_dtype(dist.dtype))
    if chosen == "reference":
        with contract.full_precision(device):
            return _reference_ranking(contract.once(matrix), _take(teacher, indices), margin, count, seed)
    op = _op("triplet_matrix_fwd", chosen)
    return op(matrix.contiguous(), teacher, indices, margin, count, seed, TREE_FROM[chosen, device])[0]


def triplet_loss(
    query: Tensor,
    gallery: Tensor,
    *,
    labels: Tensor | None = None,
    margin: float = 0.2,
    mining: str = "all",
    seed: int | Tensor | None = None,
    metric: str = "euclidean",
    check_values: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Pulls query i to gallery row i and pushes it off the others: the mean of max(margin + D_ii - D_ik, 0).

    Args:
        query, gallery, metric, check_values, impl: as for `ranking_triplet_loss`.
        labels: [B] integer; columns of the anchor's own label are no negatives. None: every k != i is one.
        margin: >= 0, in the unit of D.
        mining: "all" negatives of an anchor; "hardest", the least D_ik; "semihard", the least D_ik that is
            greater than D_ii and less than D_ii + margin; "random", one by Philox4x32-10: key `seed`, counter
            (i, 0, 0, 0), the floor(r0 * n / 2^32)-th of the anchor's n negatives. Of equal distances the
            lowest k. Anchors without a negative are left out.
        seed: for "random": as for `ranking_triplet_loss`.

    Returns:
        [] float32 (float64 for float64): the mean over the triplets considered, zeros included, 0 where there
        is none. Gradients to query and gallery, once, as of `ranking_triplet_loss`.

    Raises:
        As `ranking_triplet_loss`.

    Source: "Sketch Me That Shoe" (Yu et al. 2016); Eq. 1 of "Photo Pre-Training, But for Sketch" (Li, Pang,
        Song 2023). Semi-hard mining: FaceNet (Schroff et al. 2015).
    """
    found = _check_embeddings(query, gallery, margin, metric, check_values)
    labels = _check_labels(labels, query)
    if mining not in MININGS:
        raise ValueError(f"mining must be one of {', '.join(map(repr, MININGS))}, got {mining!r}")
    key = _seed(seed, query) if mining == "random" else None
    chosen = contract.choose_impl("triplet_loss", impl, query.device.type, query.dtype)
    x, y, margin, squared, factor = found
    if chosen == "reference":
        with contract.full_precision(query.device.type):
            dist = reference.distances(contract.once(x), contract.once(y), squared)
            loss = reference.pair_loss(dist, labels, margin, mining, key)
    else:
        loss = _op("triplet_pairs_fwd", chosen)(x, y, labels, margin, squared, mining, key)[0]
    return loss if factor == 1.0 else loss * factor
