"""Loads the compiled ops, and says why where it cannot.

`_C.so` holds the CPU kernels and needs only libtorch_cpu; `_C_cuda.so` holds the CUDA kernels. Loading one
attaches its kernels to the schemas that `sketchfast.ops` defined.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
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
    return _gpu_too_old_reason() if device_type == "cuda" else None


def _gpu_too_old_reason() -> str | None:
    """Why the machine code and PTX in _C_cuda.so cannot run on this GPU: it is older than all of them."""
    if not torch.cuda.is_available():
        return None
    try:
        host = import_module("sketchfast._host")
    except ImportError:
        return None
    built = [int(arch) for arch in re.findall(r"\d+", host.build_info()["cuda"])]
    major, minor = torch.cuda.get_device_capability()
    if not built or 10 * major + minor >= min(built):
        return None
    return f"_C_cuda.so was built for sm_{min(built)} and newer, this GPU is sm_{major}{minor}"
