"""sketchfast: fast kernels for learning from sketches."""

from .ops.raster import raster_bce, rasterize, stroke_distance

__version__ = "0.1.0"
__all__ = ["__version__", "raster_bce", "rasterize", "stroke_distance"]
