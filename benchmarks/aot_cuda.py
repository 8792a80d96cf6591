"""Compiles the CUDA kernels ahead of time and prints what each needs: registers, spills, shared memory.

No GPU is needed, only nvcc and torch's headers. Exits with 1 where a kernel does not compile or spills
registers to local memory.

    python benchmarks/aot_cuda.py [--arch 80 90]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
#: The same as CMakeLists.txt gives.
OPTIONS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"


@dataclass
class Usage:
    kernel: str
    arch: str
    registers: int
    stack: int
    spills: int
    static_shared: int


def find_nvcc() -> str:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        sys.exit("aot_cuda: no nvcc on the path or in /usr/local/cuda/bin")
    return nvcc


def demangle(name: str) -> str:
    """The kernel's name without namespaces, return type and arguments."""
    if shutil.which("c++filt"):
        name = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"(\w+::)+", "", re.sub(r"\(sketchfast.*$", "", name).replace("void ", ""))


def parse(report: str, arch: str) -> list[Usage]:
    """The kernels in what ptxas -v wrote."""
    found: list[Usage] = []
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)'", line):
            found.append(Usage(demangle(entry[1]), arch, 0, 0, 0, 0))
        elif not found:
            continue
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line):
            found[-1].stack, found[-1].spills = int(frame[1]), int(frame[2]) + int(frame[3])
        elif used := re.search(r"Used (\d+) registers", line):
            found[-1].registers = int(used[1])
            shared = re.search(r"(\d+) bytes smem", line)
            found[-1].static_shared = int(shared[1]) if shared else 0
    return found


def compile_source(nvcc: str, source: Path, arch: str, folder: Path) -> list[Usage]:
    includes = [f"-I{ROOT / 'csrc'}", "-isystem", str(Path(torch.__file__).parent / "include")]
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    output = str(folder / f"{source.stem}_{arch}.cubin")
    command = [nvcc, *OPTIONS, STABLE_ABI, *includes, target, "-Xptxas=-v", "-cubin", "-o", output]
    result = subprocess.run([*command, str(source)], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"aot_cuda: {source.name} does not compile for sm_{arch}:\n{result.stderr[-4000:]}")
    return parse(result.stderr, f"sm_{arch}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--arch", nargs="+", default=["80", "90"], help="compute capabilities, as 80 90")
    arches = parser.parse_args().arch
    nvcc, usages = find_nvcc(), []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            for arch in arches:
                usages += compile_source(nvcc, source, arch, Path(folder))
    print(f"{'kernel':34} {'arch':6} {'registers':>9} {'stack B':>8} {'spills B':>8} {'static shared B':>16}")
    for u in sorted(usages, key=lambda u: (u.kernel, u.arch)):
        print(f"{u.kernel:34} {u.arch:6} {u.registers:9} {u.stack:8} {u.spills:8} {u.static_shared:16}")
    spilling = [f"{u.kernel} ({u.arch})" for u in usages if u.spills]
    if not usages:
        sys.exit("aot_cuda: no kernel was compiled")
    if spilling:
        sys.exit(f"aot_cuda: these kernels spill registers: {', '.join(spilling)}")


if __name__ == "__main__":
    main()
