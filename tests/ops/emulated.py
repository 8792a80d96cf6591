"""What the tests of emulated CUDA kernels share: building the emulator, guarded memory, thread schedules."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SCHEDULES = {"forward": 0, "reverse": 1, "shuffled": 2, "greedy": 3}
H200_SHARED = 232448  # bytes of shared memory a CTA may ask for
GUARD = 64


def build(source: str, folder: Path) -> ctypes.CDLL:
    """tests/cuda_emulator/`source`, compiled by the host's compiler; skips where that cannot."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the emulator with")
    path = ROOT / "tests" / "cuda_emulator" / source
    built = folder / f"{path.stem}.so"
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    options += [f"-I{ROOT / 'csrc'}", f"-I{path.parent}"]
    result = subprocess.run([compiler, *options, str(path), "-o", str(built)], capture_output=True, text=True)
    if "_Float16" in result.stderr:
        pytest.skip("this g++ has no _Float16 (g++ 12 has)")
    assert result.returncode == 0, result.stderr[:3000]
    return ctypes.CDLL(str(built))


class Guarded:
    """Tensors whose neighbouring memory is watched: reads there give NaN, writes there fail `check`."""

    def __init__(self) -> None:
        self.watched: list[tuple[Tensor, Tensor]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = int(torch.Size(shape).numel())
        whole = torch.full(
            (count + 2 * GUARD,), float("nan") if dtype.is_floating_point else -77, dtype=dtype
        )
        self.watched.append((whole, whole.clone()))
        return whole[GUARD : GUARD + count].view(shape)

    def copy(self, value: Tensor) -> Tensor:
        return self.empty(tuple(value.shape), value.dtype).copy_(value)

    def check(self) -> None:
        for whole, before in self.watched:
            for zone in (slice(None, GUARD), slice(len(whole) - GUARD, None)):
                torch.testing.assert_close(whole[zone], before[zone], rtol=0, atol=0, equal_nan=True)
