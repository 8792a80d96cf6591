"""sketchfast: fast kernels for learning from sketches."""

from . import nn
from .ops.raster import raster_bce, rasterize, stroke_distance
from .ops.sinkhorn import (
    PointsOutput,
    SinkhornOutput,
    sinkhorn,
    sinkhorn_cost,
    sinkhorn_points,
    swav_assign,
)
from .ops.triplet import ranking_triplet_loss, ranking_triplet_loss_from_distances, triplet_loss

__version__ = "0.1.0"
__all__ = [
    "PointsOutput",
    "SinkhornOutput",
    "__version__",
    "nn",
    "ranking_triplet_loss",
    "ranking_triplet_loss_from_distances",
    "raster_bce",
    "rasterize",
    "sinkhorn",
    "sinkhorn_cost",
    "sinkhorn_points",
    "stroke_distance",
    "swav_assign",
    "triplet_loss",
]
