"""sketchfast: fast kernels for learning from sketches."""

__version__ = "0.1.0"
