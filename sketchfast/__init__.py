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

__version__ = "0.1.0"
__all__ = [
    "PointsOutput",
    "SinkhornOutput",
    "__version__",
    "nn",
    "raster_bce",
    "rasterize",
    "sinkhorn",
    "sinkhorn_cost",
    "sinkhorn_points",
    "stroke_distance",
    "swav_assign",
]
