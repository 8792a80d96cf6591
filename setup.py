"""Builds the compiled parts through CMake and Ninja; everything else is in pyproject.toml.

SKETCHFAST_BUILD=auto (default) builds what this machine can and says what that was; none builds nothing;
cpu leaves CUDA out; cuda fails where CUDA cannot be built. MAX_JOBS and TORCH_CUDA_ARCH_LIST are honoured.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHITECTURES = "80-real;90"  # 90 also as PTX, for what comes after
CHOICES = ("auto", "none", "cpu", "cuda")


class BuildError(RuntimeError):
    """A part that was asked for cannot be built."""


def requested_build() -> str:
    choice = os.environ.get("SKETCHFAST_BUILD", "auto")
    if choice not in CHOICES:
        raise BuildError(f"SKETCHFAST_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


def find_nvcc() -> str | None:
    """The one that CUDACXX or CUDA_HOME names, else the one on the PATH, else the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc"]
    candidates = [*named, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and Path(c).exists()), None)


def cuda_unavailable_reason() -> str | None:
    import torch

    if torch.version.cuda is None:
        return "this torch has no CUDA"
    return None if find_nvcc() else "no nvcc found"


def cuda_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") in CMake's words ("80-real;90")."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not asked:
        return DEFAULT_CUDA_ARCHITECTURES
    words = []
    for arch in re.split(r"[ ;,]+", asked.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if match is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST must look like '8.0;9.0+PTX', got {asked!r}")
        major, minor, feature, ptx = match.groups()
        words.append(f"{major}{minor}{feature}" + ("" if ptx else "-real"))
    return ";".join(words)


class CMakeBuild(build_ext):
    """One CMake run for all targets, in place of setuptools' compiler."""

    def run(self) -> None:
        choice = requested_build()
        for stale in self.output_dir().glob("*.so"):
            stale.unlink()  # what this run does not build must not be installed from an earlier one
        if choice == "none":
            print("sketchfast: SKETCHFAST_BUILD=none, nothing compiled: the reference implementations serve")
            return
        no_cuda = "SKETCHFAST_BUILD=cpu" if choice == "cpu" else cuda_unavailable_reason()
        if choice == "cuda" and no_cuda:
            raise BuildError(f"SKETCHFAST_BUILD=cuda, but {no_cuda}")
        try:
            self.run_cmake(cuda=no_cuda is None)
            built = "_C, _host" + ("" if no_cuda else ", _C_cuda")
            print(f"sketchfast: built {built}" + (f"; no _C_cuda: {no_cuda}" if no_cuda else ""))
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            self.recover(choice, cuda=no_cuda is None, error=error)

    def recover(self, choice: str, *, cuda: bool, error: Exception) -> None:
        """In auto a part that does not build is left out and named; asked for, it is an error."""
        if choice != "auto":
            raise BuildError(f"SKETCHFAST_BUILD={choice}, but the build failed: {error}") from error
        if cuda:
            print(f"sketchfast: the CUDA build failed ({error}); building without it", file=sys.stderr)
            try:
                self.run_cmake(cuda=False)
                print("sketchfast: built _C, _host; no _C_cuda: its build failed, see above")
                return
            except (subprocess.CalledProcessError, FileNotFoundError) as again:
                error = again
        print(
            f"sketchfast: nothing compiled ({error}): the slow reference implementations serve; install a"
            " C++17 compiler and reinstall for the fast ones",
            file=sys.stderr,
        )

    def run_cmake(self, *, cuda: bool) -> None:
        import pybind11
        import torch

        torch_root = Path(torch.__file__).parent
        build_dir = Path(self.build_temp).resolve() / ("cuda" if cuda else "cpu")
        build_dir.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            # Named on the command line: the cache may hold the path of an earlier build environment's ninja.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "SKETCHFAST_OUTPUT_DIR": self.output_dir(),
            "SKETCHFAST_HOST_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "TORCH_INCLUDE_DIRS": torch_root / "include",
            "TORCH_LIBRARY_DIR": torch_root / "lib",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "SKETCHFAST_CUDA": "ON" if cuda else "OFF",
        }
        if cuda:
            options["CMAKE_CUDA_COMPILER"] = find_nvcc()
            options["CMAKE_CUDA_ARCHITECTURES"] = cuda_architectures()
        flags = [f"-D{name}={value}" for name, value in options.items()]
        if options["CMAKE_MAKE_PROGRAM"] is None:
            raise FileNotFoundError("ninja is not on the PATH")
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build_dir, *flags], check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", build_dir, "--parallel", jobs], check=True)

    def output_dir(self) -> Path:
        """The package itself in a development install, else setuptools' staging directory."""
        placeholder = Path(self.get_ext_fullpath("sketchfast._host")).resolve()
        placeholder.parent.mkdir(parents=True, exist_ok=True)
        return placeholder.parent

    def get_outputs(self) -> list[str]:
        directory = self.output_dir()
        return [str(path) for path in directory.glob("*.so")]


# The extension stands for all targets; it makes setuptools tag the wheel with the platform.
setup(
    ext_modules=[Extension("sketchfast._host", sources=[], optional=False)],
    cmdclass={"build_ext": CMakeBuild},
)
