"""Compiles every Triton kernel for sm_80 and sm_90 without a GPU, and prints what each takes of the chip.

    python benchmarks/aot_triton.py [--quick] [--jobs N]

The launchers run on meta tensors at the sizes of the benchmark suite, their kernels replaced by recorders, so
that what is compiled here is what they would launch: types, constants, warps. Registers and local memory are
read from the cubin. Data in local memory (spills) is flagged; the exit status is 1 where a kernel does not
compile or spills more than its limit. Not for a process with TRITON_INTERPRET set.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

ARCHITECTURES = (80, 90)
# Bytes a thread. ptxas spills a few values around its loops to fit one more block; more would be a defect.
LOCAL_LIMIT = 64
# A row of 8192 takes 32 warps, which leave 64 registers a thread; what waits around the loops is in memory.
# Rows of 4096 units in float32 on sm_80: addresses of several blocks, around loops. No other size spills.
LOCAL_LIMIT_OF = {"_tree_kernel": 512, "_backward_kernel": 192}
SIZES = ((256, 64, 28), (64, 100, 84), (64, 256, 256))  # (B, T, side), of the benchmark suite
SINKHORN_SIZES = ((1024, 64, 64), (1, 125, 3840), (64, 64, 128), (1, 3840, 125), (1, 2048, 2048))  # (N, K, E)
TRIPLET_SIZES = ((256, 128), (1024, 512), (8192, 128), (64, 128), (100, 8), (4096, 512))  # (B, D)
HYPERLSTM_SIZES = ((256, 1024), (256, 512), (16, 4096), (64, 513))  # (B, units)
MIXTURE_SIZES = ((64 * 256, 30), (40 * 64, 20), (64 * 256, 1), (100, 300))  # (positions, components)
TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Variant:
    """One kernel as a launcher launches it; plain data, so that it travels to a worker process."""

    module: str
    kernel: str
    label: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # positions of arguments divisible by 16
    warps: int
    most_registers: int | None


@dataclass
class Result:
    variant: Variant
    architecture: int
    registers: int = 0
    local: int = 0
    shared: int = 0
    error: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.error) or self.local > LOCAL_LIMIT_OF.get(self.variant.kernel, LOCAL_LIMIT)


class Recorder:
    """Stands in for a kernel: keeps what it is launched with."""

    def __init__(self, module: str, kernel: Any, label: str, variants: list[Variant]) -> None:
        self.module, self.kernel, self.label, self.variants = module, kernel, label, variants

    def __getitem__(self, grid: Any) -> Any:
        return self.record

    def record(
        self,
        *args: Any,
        num_warps: int = 4,
        maxnreg: int | None = None,
        enable_fp_fusion: bool = True,
        **kwargs: Any,
    ) -> None:
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, aligned = {}, {}, []
        for position, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            kind = "constexpr" if parameter.is_constexpr else _type_name(value)
            if parameter.do_not_specialize and isinstance(value, int):
                signature[parameter.name] = "i32"
                continue
            signature[parameter.name] = kind
            if kind == "constexpr":
                constants[parameter.name] = value
            elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                aligned.append(position)
        self.variants.append(
            Variant(
                self.module,
                self.kernel.__name__,
                self.label,
                tuple(signature.items()),
                tuple(constants.items()),
                tuple(aligned),
                num_warps,
                maxnreg,
            )
        )


def _type_name(value: Any) -> str:
    """The type Triton gives an argument; an integer of value 1 becomes a constant."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPE_NAMES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "constexpr" if value == 1 else "i32" if abs(value) < 2**31 else "i64"


def raster_variants(dtype: torch.dtype, batch: int, steps: int, side: int) -> Iterator[Variant]:
    """What the launchers of rasterize, stroke_distance and raster_bce launch, forward and backward."""
    from sketchfast.kernels.triton import raster

    points = torch.empty((batch, steps, 2), dtype=dtype, device="meta")
    strokes = (
        points,
        torch.empty((batch, steps), dtype=torch.bool, device="meta"),
        torch.empty(batch, dtype=torch.int64, device="meta"),
    )
    target = torch.empty((batch, side, side), dtype=torch.float32, device="meta")
    target_strokes = (points.float(), *strokes[1:])
    image = target.to(dtype)

    saved = torch.empty((batch, side, side), dtype=torch.int16, device="meta")
    nearest = saved.int()
    plain, blurred = (5.0, 2.0, 0.0, 5), (5.0, 2.0, 2.0, 5)
    none = (None, None, None)
    calls = {
        "fwd plain": lambda: raster.raster_fwd(*strokes, side, side, *plain, dtype, True),
        "fwd blur": lambda: raster.raster_fwd(*strokes, side, side, *blurred, dtype, True),
        "bwd plain": lambda: raster.raster_bwd(image, *strokes, saved, *plain),
        "bwd blur": lambda: raster.raster_bwd(image, *strokes, saved, *blurred),
        "plain image": lambda: raster.raster_bce(*strokes, target, *none, side, side, *plain, True),
        "blur image": lambda: raster.raster_bce(*strokes, target, *none, side, side, *blurred, True),
        "blur strokes": lambda: raster.raster_bce(
            *strokes, None, *target_strokes, side, side, *blurred, True
        ),
        "fwd": lambda: raster.stroke_distance_fwd(*strokes, side, side),
        "bwd distance": lambda: raster.stroke_distance_bwd(target, points, nearest),
    }
    if side == 84 and dtype == torch.float32:  # blocks of 64 x 64, and blurs that go through memory
        wide, widest = (5.0, 2.0, 3.0, 11), (5.0, 2.0, 9.0, 41)
        calls |= {
            "fwd wide": lambda: raster.raster_fwd(*strokes, side, side, *wide, dtype, True),
            "bwd wide": lambda: raster.raster_bwd(image, *strokes, saved, *wide),
            "wide image": lambda: raster.raster_bce(*strokes, target, *none, side, side, *wide, True),
            "fwd widest": lambda: raster.raster_fwd(*strokes, side, side, *widest, dtype, True),
            "bwd widest": lambda: raster.raster_bwd(image, *strokes, saved, *widest),
        }

    yield from recorded(raster, f"{side}^2 {TYPE_NAMES[dtype]}", calls)


def recorded(module: ModuleType, size: str, calls: dict[str, Callable[[], Any]]) -> Iterator[Variant]:
    """What each of the labelled calls launches of the kernels of `module`."""
    kernels = {name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")}
    for label, call in calls.items():
        variants: list[Variant] = []
        stand_ins = {
            name: Recorder(module.__name__, k, f"{size} {label}", variants) for name, k in kernels.items()
        }
        with mock.patch.multiple(module, **stand_ins):
            call()
        yield from variants


def sinkhorn_variants(dtype: torch.dtype, quick: bool) -> Iterator[Variant]:
    """What the launchers of the Sinkhorn family launch, at the sizes of the benchmark suite."""
    from sketchfast.kernels.triton import sinkhorn

    def meta(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    for count, rows, columns in SINKHORN_SIZES[:2] if quick else SINKHORN_SIZES:
        cost, epsilon = meta(count, rows, columns, kind=dtype), meta(count, kind=torch.float64)
        a, b, per_problem = meta(count, rows), meta(count, columns), meta(count)
        phi, gamma = a.double(), b.double()
        iterations = meta(count, kind=torch.int32)
        problem = (cost, epsilon, a, b)
        calls = {
            "fwd": lambda p=problem: sinkhorn.sinkhorn_fwd(*p[:2], None, None, None, 3, -1.0, "none"),
            "fwd a b tol": lambda p=problem: sinkhorn.sinkhorn_fwd(*p, p[3], 3, 1e-3, "none"),
            "value fwd": lambda p=problem: sinkhorn.sinkhorn_value_fwd(*p[:2], None, None, 3, -1.0),
            "value bwd": lambda c=cost, x=(per_problem, epsilon, phi, gamma): sinkhorn.sinkhorn_value_bwd(
                x[0], c, *x[1:]
            ),
            "unrolled": lambda c=cost, x=(a, b, epsilon, iterations): sinkhorn.sinkhorn_unrolled_bwd(
                c, x[0], x[1], c, x[2], None, None, None, x[3], 3
            ),
            "unrolled a b": lambda c=cost, x=(a, b, epsilon, iterations): sinkhorn.sinkhorn_unrolled_bwd(
                None, x[0], x[1], c, x[2], x[0], x[1], x[1], x[3], 3
            ),
            "adjoint": lambda c=cost, x=(a, b, epsilon, phi, gamma): sinkhorn.sinkhorn_adjoint(
                c, x[0], x[1], c, *x[2:]
            ),
            "cost gradient": lambda c=cost, x=(epsilon, phi, gamma): sinkhorn.sinkhorn_cost_gradient(
                c, c.double(), *x, c.dtype
            ),
        }
        yield from recorded(sinkhorn, f"{count}x{rows}x{columns} {TYPE_NAMES[dtype]}", calls)
    scores = meta(3840, 125, kind=dtype)
    yield from recorded(
        sinkhorn,
        f"3840x125 {TYPE_NAMES[dtype]}",
        {"swav": lambda: sinkhorn.swav_assign(scores, 0.05, 3)},
    )
    if dtype != torch.float32:  # points are float32 by the time they are here
        return
    for dims in (3, 64):
        x, y, epsilon = meta(1, 10000, dims), meta(1, 10000, dims), meta(1, kind=torch.float64)
        phi = meta(1, 10000, kind=torch.float64)
        yield from recorded(
            sinkhorn,
            f"points {dims}",
            {
                "fwd": lambda p=(x, y, epsilon): sinkhorn.sinkhorn_points_fwd(*p, None, None, 3, -1.0),
                "bwd": lambda p=(x, y, epsilon), q=phi: sinkhorn.sinkhorn_points_bwd(meta(1), *p, q, q),
            },
        )


def triplet_variants(batch: int, dims: int) -> Iterator[Variant]:
    """What the launchers of the triplet losses launch, forward and backward; counting by both of its ways."""
    from sketchfast.kernels.triton import triplet

    def meta(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    x, scale, seed = meta(batch, dims), meta(), meta(kind=torch.int64)
    dist, weights = meta(batch, batch), meta(batch, batch, kind=torch.int32)
    labels, chosen = meta(batch, kind=torch.int64), meta(batch, kind=torch.int32)
    sampled, rows = meta(batch, 64, kind=torch.int8), meta(3 * batch, 3 * batch)
    calls = {
        "pairs": lambda: triplet.triplet_ranking_fwd(x, x, dist, None, 0.01, False, batch + 1),
        "sampled": lambda: triplet.triplet_sampled_fwd(x, x, rows, labels, 0.01, False, 64, seed),
        "sampled bwd": lambda: triplet.triplet_sampled_bwd(scale, sampled, seed, x, x, False),
        "sampled matrix": lambda: triplet.triplet_matrix_fwd(dist, dist, None, 0.01, 64, seed, 1),
        "squared": lambda: triplet.triplet_ranking_fwd(x, x, rows, labels, 0.01, True, batch + 1),
        "bwd": lambda: triplet.triplet_embedding_bwd(scale, weights, x, x, False),
        "bwd squared": lambda: triplet.triplet_embedding_bwd(scale, weights, x, x, True),
        "chosen bwd": lambda: triplet.triplet_chosen_bwd(scale, chosen, x, x, False),
    }
    for mining in ("all", "hardest", "semihard", "random"):
        key = seed if mining == "random" else None
        calls[mining] = lambda m=mining, k=key: triplet.triplet_pairs_fwd(x, x, labels, 0.2, False, m, k)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        teacher = rows.to(dtype)
        calls[f"tree {TYPE_NAMES[dtype]}"] = lambda t=teacher: triplet.triplet_matrix_fwd(
            dist, t, labels, 0.01, 0, None, 1
        )
    yield from recorded(triplet, f"{batch}x{dims}", calls)


def hyperlstm_variants(dtype: torch.dtype, batch: int, width: int, quick: bool) -> Iterator[Variant]:
    """What the kernels of both LSTMs, of `width` units each, launch for a step and for a chunk's steps."""
    from sketchfast.kernels.triton import hyperlstm

    def meta(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    kernels, cell = hyperlstm.KERNELS, meta(batch, width)
    low, bias, seed = meta(batch, width, kind=dtype), meta(4, width), meta(kind=torch.int64)
    lengths = meta(batch, kind=torch.int64)
    slots = kernels.slots(cell, batch)
    norm = (bias, bias, cell[0], cell[0])

    def calls_of(norms: tuple[torch.Tensor | None, ...], settings: tuple[Any, ...]) -> dict[str, Callable]:
        def steps(count: int) -> tuple[torch.Tensor, ...]:
            # a part of the matrix that holds both LSTMs' gates, as the loop has it
            gates = meta(count, batch, 6 * width, kind=dtype)[..., : 4 * width]
            hidden = meta(count, batch, width, kind=dtype)
            return (
                gates,
                gates.contiguous(),
                meta(12, count, batch, width, kind=dtype),
                hidden,
                hidden.float(),
            )

        gates, x_part, scales, hidden, _ = steps(1)
        many, many_x, many_scales, many_hidden, cells = steps(8)
        end = (*norms, *settings)
        main_end = (*norms[:2], *norm[2:], *settings)
        step = (gates[0], x_part[0], scales[:, 0], bias, cell, cell)
        of_step = (gates[0], x_part[0], scales[:, 0], meta(slots, 14, width))
        return {
            "hyper": lambda: kernels.hyper_fwd(gates, x_part, cell, hidden, low, None, *end),
            "hyper chunk": lambda: kernels.hyper_fwd(many, None, cell, many_hidden, None, cells, *end),
            "main": lambda: kernels.main_fwd(
                gates, x_part, scales, bias, cell, hidden, None, None, *main_end
            ),
            "main chunk": lambda: kernels.main_fwd(
                many, many_x, many_scales, bias, cell, None, None, cells, *main_end
            ),
            "hyper bwd": lambda: kernels.hyper_bwd(
                gates[0], cell, cell, low, cell, gates[0], meta(slots, 10, width), *end
            ),
            "main bwd": lambda: kernels.main_bwd(*step, low, low, cell, *of_step, *main_end),
        }

    size = f"{batch}x{width} {TYPE_NAMES[dtype]}"
    yield from recorded(hyperlstm, size, calls_of(norm, (lengths, seed, 3, 0, 1.0, 0.1)))
    if not quick:
        without = calls_of((None,) * 4, (None, None, 3, 0, 1.0, 0.0))
        yield from recorded(hyperlstm, f"{size} bare", without)


def mixture_variants(positions: int, components: int, dtype: torch.dtype) -> Iterator[Variant]:
    """What the launchers of the mixture loss launch, with gradient rows and without, and backward."""
    from sketchfast.kernels.triton import mixture

    target = torch.empty((positions, 5), device="meta")
    rows = torch.empty((positions, 3 + 6 * components), device="meta")
    output, one = rows.to(dtype), target.new_empty(())
    calls = {
        "fwd": lambda: mixture.mixture_fwd(output, target, True),
        "fwd no grad": lambda: mixture.mixture_fwd(output, target, False),
        "bwd": lambda: mixture.mixture_bwd(one, one, rows, dtype),
    }
    yield from recorded(mixture, f"{positions}x{components} {TYPE_NAMES[dtype]}", calls)


def compile_variant(variant: Variant, architecture: int) -> Result:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    result = Result(variant, architecture)
    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    attributes = {(position,): [["tt.divisibility", 16]] for position in variant.aligned}
    options = {"num_warps": variant.warps, "maxnreg": variant.most_registers, "enable_fp_fusion": True}
    try:
        compiled = triton.compile(
            ASTSource(kernel, dict(variant.signature), dict(variant.constants), attributes),
            target=GPUTarget("cuda", architecture, 32),
            options=options,
        )
        result.registers, result.local = resource_usage(compiled.asm["cubin"])
        result.shared = compiled.metadata.shared
    except Exception as error:  # whatever the compiler raises is the finding
        result.error = f"{type(error).__name__}: {error}".strip()
    return result


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) a thread of the kernel in a cubin takes."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def unique(variants: list[Variant]) -> list[Variant]:
    """One variant of each distinct compilation; its label is that of the first."""
    seen: dict[tuple[Any, ...], Variant] = {}
    for variant in variants:
        key = (
            variant.kernel,
            variant.signature,
            variant.constants,
            variant.aligned,
            variant.warps,
            variant.most_registers,
        )
        seen.setdefault(key, variant)
    return list(seen.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one size, one dtype, one architecture")
    parser.add_argument(
        "--op", choices=("raster", "sinkhorn", "triplet", "hyperlstm", "mixture"), help="this op only"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: the interpreter and the compiler need separate processes")
    dtypes = (torch.float32,) if options.quick else (torch.float32, torch.bfloat16)
    sizes = SIZES[:1] if options.quick else SIZES
    architectures = ARCHITECTURES[1:] if options.quick else ARCHITECTURES
    found: list[Variant] = []
    if options.op in (None, "raster"):
        found += [
            v for dtype, size in itertools.product(dtypes, sizes) for v in raster_variants(dtype, *size)
        ]
    if options.op in (None, "sinkhorn"):
        for dtype in dtypes:
            found += sinkhorn_variants(dtype, options.quick)
    if options.op in (None, "triplet"):
        found += [
            v for size in TRIPLET_SIZES[: 2 if options.quick else None] for v in triplet_variants(*size)
        ]
    if options.op in (None, "hyperlstm"):
        for dtype, size in itertools.product(dtypes, HYPERLSTM_SIZES[: 1 if options.quick else None]):
            found += hyperlstm_variants(dtype, *size, options.quick or size != HYPERLSTM_SIZES[0])
    if options.op in (None, "mixture"):
        for size in MIXTURE_SIZES[: 2 if options.quick else None]:
            for dtype in dtypes:
                found += mixture_variants(*size, dtype)
    variants = unique(found)
    work = [(variant, architecture) for variant in variants for architecture in architectures]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compile_variant, *zip(*work, strict=True)))

    print(f"{'kernel':24}{'variant':32}{'arch':>6}{'warps':>6}{'regs':>6}{'local B':>8}{'shared B':>9}")
    for result in results:
        variant = result.variant
        print(
            f"{variant.kernel:24}{variant.label:32}{'sm_' + str(result.architecture):>6}{variant.warps:>6}"
            f"{result.registers:>6}{result.local:>8}{result.shared:>9}"
            + ("  FAILED: " + result.error if result.error else "  SPILLS" if result.local else "")
        )
    failed = sum(result.failed for result in results)
    spilling = sum(result.local > 0 for result in results)
    print(f"{len(results)} variants: {spilling} with data in local memory, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
