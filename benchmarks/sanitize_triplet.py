"""One small case of every CUDA kernel of the triplet losses, for compute-sanitizer (see gpu.sh).

Every way to count (pairs of positions, the tree, column by column), every tile, sampled triplets and mined
pairs, forward and backward.
"""

from __future__ import annotations

from itertools import cycle

import torch

import sketchfast
from sketchfast.ops import triplet

#: Rows and columns: odd sizes about a warp, 32 x 32 and 64 x 64 tiles of distances, and of gradients.
SHAPES = ((1, 1), (2, 3), (33, 40), (150, 300), (490, 9), (970, 5), (65, 2100))
TEACHER_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def embeddings(batch: int, dimensions: int) -> tuple[torch.Tensor, torch.Tensor]:
    query, gallery = torch.randn(2, batch, dimensions, device="cuda")
    return query.requires_grad_(), gallery.requires_grad_()


def run(batch: int, dimensions: int, dtype: torch.dtype) -> None:
    query, gallery = embeddings(batch, dimensions)
    photos = torch.rand(2 * batch, 2 * batch, device="cuda").to(dtype).t()
    photos[batch // 2, batch:] = torch.nan  # rows that hold one are counted column by column
    indices = torch.randperm(2 * batch, device="cuda")[:batch]
    for samples in (None, 7):
        for metric in ("euclidean", "cosine"):
            loss = sketchfast.ranking_triplet_loss(
                query, gallery, photos, indices=indices, samples=samples, seed=3, metric=metric, impl="native"
            )
            loss.backward()
        dist = torch.rand(batch, batch, device="cuda", requires_grad=True)
        sketchfast.ranking_triplet_loss_from_distances(
            dist, photos[:batch, :batch], samples=samples, seed=3, impl="native"
        ).backward()
    labels = torch.randint(5, (batch,), device="cuda")
    for mining in triplet.MININGS:
        for given in (None, labels):
            sketchfast.triplet_loss(
                query, gallery, labels=given, mining=mining, seed=5, impl="native"
            ).backward()
    for embedded in (query, gallery):
        assert embedded.grad is not None
        assert embedded.grad.isfinite().all()


def main() -> None:
    torch.manual_seed(0)
    for tree_from in (1 << 40, 0):
        triplet.TREE_FROM["native", "cuda"] = tree_from
        for shape, dtype in zip(SHAPES, cycle(TEACHER_DTYPES), strict=False):
            run(*shape, dtype)
    torch.cuda.synchronize()
    print("every kernel of the triplet losses ran")


if __name__ == "__main__":
    main()
