"""Loads the compiled ops, and says why where it cannot.

`_C.so` holds the CPU kernels and needs only libtorch_cpu; `_C_cuda.so` holds the CUDA kernels. Loading one
attaches its kernels to the schemas that `sketchfast.ops` defined.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARY = {"cpu": "_C.so", "cuda": "_C_cuda.so"}
HOW_TO_BUILD = (
    "reinstall with a C++17 compiler at hand (`pip install .`; SKETCHFAST_BUILD=cuda needs nvcc too)"
)


@cache
def unavailable_reason(device_type: str) -> str | None:
    """None where the compiled ops for this device type are loaded, else why they are not."""
    if device_type not in _LIBRARY:
        return f"no compiled kernels exist for device type {device_type!r}"
    path = _PACKAGE / _LIBRARY[device_type]
    if not path.exists():
        return f"{path.name} was not built: {HOW_TO_BUILD}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load under torch {torch.__version__}: {error}"
    return None
