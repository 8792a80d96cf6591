"""sketchfast: fast kernels for learning from sketches."""

from . import nn
from .ops.raster import raster_bce, rasterize, stroke_distance

__version__ = "0.1.0"
__all__ = ["__version__", "nn", "raster_bce", "rasterize", "stroke_distance"]
