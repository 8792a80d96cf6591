"""Ranking-matrix and pair triplet losses in eager PyTorch: the oracle, at float32 or float64 (DESIGN 4.3).

Which triplets are active is decided without autograd, a few anchors at a time, and leaves integer weights
W [B, B]; the loss is then <W, D> plus the margins, whose gradient to D is W. Memory is O(B^2), not O(B^3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_CUBE_ELEMENTS = 1 << 22  # of the B x B x B cube held at once

# Philox4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype the arithmetic is done in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- distances ----------------------------------------------------------------------------------------------


def distances(query: Tensor, gallery: Tensor, squared: bool) -> Tensor:
    """D [B, B], ||query_i - gallery_j|| or its square, from differences; the gradient at 0 is 0."""
    if squared:  # not the square of a rounded root, which would move ties and kinks
        return _Squares.apply(query, gallery)
    return torch.cdist(query, gallery, compute_mode="donot_use_mm_for_euclid_dist")


def _blocks(query: Tensor) -> list[slice]:
    """Rows of the queries whose differences to all of the gallery are held at once."""
    batch, dims = query.shape
    step = max(1, _CUBE_ELEMENTS // max(1, batch * dims))
    return [slice(first, min(first + step, batch)) for first in range(0, batch, step)]


class _Squares(torch.autograd.Function):
    """||query_i - gallery_j||^2 [B, B] in O(B^2) memory: some rows of queries at a time, both ways."""

    @staticmethod
    def forward(query: Tensor, gallery: Tensor) -> Tensor:
        rows = [(query[block, None] - gallery).square().sum(2) for block in _blocks(query)]
        return torch.cat(rows) if rows else query.new_empty((0, 0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        query, gallery = ctx.saved_tensors
        to_query, to_gallery = torch.zeros_like(query), torch.zeros_like(gallery)
        for block in _blocks(query):
            pulls = 2 * grad[block, :, None] * (query[block, None] - gallery)
            to_query[block] = pulls.sum(1)
            to_gallery -= pulls.sum(0)
        return to_query, to_gallery


# --- the generator ------------------------------------------------------------------------------------------


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and low words of a * b, for 32-bit values held in int64."""
    high = (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16
    return high, (a * b) & _MASK  # the product wraps; its low word is right


def philox(seed: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The first two words of Philox4x32-10 at counter (first, second, 0, 0), key `seed`, held in int64."""
    key = [seed & _MASK, (seed >> 32) & _MASK]
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    x0, x1, x2, x3 = first, second, zero, zero
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(x0, _MULTIPLIERS[0])
        high1, low1 = _multiply(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ key[0], low1, high0 ^ x3 ^ key[1], low0
        key = [(word + weyl) & _MASK for word, weyl in zip(key, _WEYL, strict=True)]
    return x0, x1


def sampled_pairs(seed: Tensor, batch: int, samples: int) -> tuple[Tensor, Tensor]:
    """j, k [B, samples] int64 of every anchor i: j != i, and k is neither. Needs B >= 3."""
    anchor = torch.arange(batch, device=seed.device)[:, None]
    r0, r1 = philox(seed, anchor, torch.arange(samples, device=seed.device))
    j = (r0 * (batch - 1)) >> 32
    j = j + (j >= anchor).long()
    k = (r1 * (batch - 2)) >> 32
    k = k + (k >= torch.minimum(anchor, j)).long()
    return j, k + (k >= torch.maximum(anchor, j)).long()


# --- the ranking matrix -------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """What is left of the triplets: dL/dD = weights / Z and L = (<weights, D> + margin * active) / Z."""

    weights: Tensor  # [B, B] int32
    active: Tensor  # [] int64, how many triplets are active


@torch.no_grad()
def ranking_weights(dist: Tensor, teacher: Tensor, margin: float) -> Weights:
    """Of all ordered triplets (i, j, k). dist, teacher: [B, B]."""
    batch = dist.shape[0]
    weights = torch.zeros((batch, batch), dtype=torch.int32, device=dist.device)
    active = torch.zeros((), dtype=torch.int64, device=dist.device)
    if batch < 3:
        return Weights(weights, active)
    column = torch.arange(batch, device=dist.device)
    step = max(1, _CUBE_ELEMENTS // batch**2)
    for first in range(0, batch, step):
        rows = slice(first, min(first + step, batch))
        d, g = dist[rows], teacher[rows]
        anchor = column[rows, None, None]
        exists = (column[:, None] != column) & (column[:, None] != anchor) & (column != anchor)
        # j is drawn near and k pushed off: by (i, j, k) where R = +1, by (i, k, j) where R = -1
        times = (g[:, :, None] <= g[:, None, :]).int() + (~(g[:, None, :] <= g[:, :, None])).int()
        times = times * (exists & (d[:, :, None] + margin > d[:, None, :]))
        weights[rows] = times.sum(2, dtype=torch.int32) - times.sum(1, dtype=torch.int32)
        active += times.sum()
    return Weights(weights, active)


def ranking_loss(dist: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """The mean over all triplets; scalar of the dtype of dist, differentiable in it."""
    batch = dist.shape[0]
    weights, active = ranking_weights(dist.detach(), teacher, margin)
    diagonal = torch.eye(batch, dtype=torch.bool, device=dist.device)
    # An infinite distance that no active triplet holds counts nothing; NaN stays to be seen.
    idle = (weights == 0) & (torch.isinf(dist.detach()) | (batch < 3))
    counted = dist.masked_fill(diagonal | idle, 0.0).double()  # float64: the terms cancel
    total = (weights * counted).sum() + margin * active.double()
    return total.div(max(1, batch * (batch - 1) * (batch - 2))).to(dist.dtype)


def sampled_loss(dist: Tensor, teacher: Tensor, margin: float, samples: int, seed: Tensor) -> Tensor:
    """The mean over `samples` triplets an anchor; scalar of the dtype of dist, differentiable in it."""
    batch = dist.shape[0]
    if batch < 3:
        return ranking_loss(dist, teacher, margin)
    j, k = sampled_pairs(seed, batch, samples)
    nearer = teacher.gather(1, j) <= teacher.gather(1, k)
    drawn = dist.gather(1, torch.where(nearer, j, k))
    pushed = dist.gather(1, torch.where(nearer, k, j))
    return _hinge(drawn, pushed, margin).sum().div(batch * samples).to(dist.dtype)


def _hinge(drawn: Tensor, pushed: Tensor, margin: float) -> Tensor:
    """max(margin + drawn - pushed, 0) in float64; active is decided in the dtype of the distances."""
    active = drawn.detach() + margin > pushed.detach()
    gap = drawn.double() - pushed.double() + margin
    return torch.where(active | torch.isnan(gap.detach()), gap, 0.0)


# --- pairs: query i and gallery row i -----------------------------------------------------------------------


def negatives(batch: int, labels: Tensor | None, device: torch.device) -> Tensor:
    """[B, B] bool: which columns are negatives of which row."""
    if labels is not None:
        return labels[:, None] != labels
    return ~torch.eye(batch, dtype=torch.bool, device=device)


def _nth_true(allowed: Tensor, n: Tensor) -> Tensor:
    """The column of the n-th True of each row, n [B] counted from 0."""
    return (allowed.int().cumsum(1) == n[:, None] + 1).int().argmax(1)


@torch.no_grad()
def chosen_negatives(
    dist: Tensor, labels: Tensor | None, margin: float, mining: str, seed: Tensor | None
) -> Tensor:
    """[B] int64: the negative of each anchor, -1 where it has none."""
    batch = dist.shape[0]
    allowed = negatives(batch, labels, dist.device)
    if batch == 0:
        return torch.empty(0, dtype=torch.int64, device=dist.device)
    if mining == "random":
        anchor = torch.arange(batch, device=dist.device)
        assert seed is not None
        word, _ = philox(seed, anchor, torch.zeros_like(anchor))
        count = allowed.sum(1)
        chosen = _nth_true(allowed, (word * count) >> 32)
    else:
        own = dist.diagonal()[:, None]
        if mining == "semihard":
            allowed = allowed & (dist > own) & (own + margin > dist)
        chosen = torch.where(allowed & ~torch.isnan(dist), dist, torch.inf).argmin(1)
        # argmin may point at a column that is not allowed where all the allowed ones are infinite
        chosen = torch.where(allowed.gather(1, chosen[:, None])[:, 0], chosen, allowed.int().argmax(1))
    return torch.where(allowed.any(1), chosen, -1)


def pair_loss(dist: Tensor, labels: Tensor | None, margin: float, mining: str, seed: Tensor | None) -> Tensor:
    """max(margin + D_ii - D_ik, 0), the mean over the triplets considered; differentiable in dist."""
    batch = dist.shape[0]
    own = dist.diagonal()[:, None]
    if mining == "all":
        allowed = negatives(batch, labels, dist.device)
        terms, considered = torch.where(allowed, _hinge(own, dist, margin), 0.0), allowed
    else:
        chosen = chosen_negatives(dist.detach(), labels, margin, mining, seed)[:, None]
        considered = chosen >= 0
        terms = torch.where(considered, _hinge(own, dist.gather(1, chosen.clamp(min=0)), margin), 0.0)
    return (terms.sum() / considered.sum().clamp(min=1)).to(dist.dtype)
