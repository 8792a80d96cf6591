"""The package imports fast and bare, and its modules only import downwards."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sketchfast

PACKAGE = Path(sketchfast.__file__).parent
REPOSITORY = Path(__file__).resolve().parents[1]
HEAVY = [
    "triton",
    "lightning",
    "timm",
    "torchvision",
    "sklearn",
    "umap",
    "matplotlib",
    "PIL",
    "tyro",
    "rich",
    "torch._dynamo",
]


def run_python(code: str, directory: Path) -> str:
    """What the code prints, in a directory that holds no sketchfast: the installed one is imported."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=directory,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_brings_in_nothing_heavy(tmp_path):
    code = f"""
import sys, torch
before = set(sys.modules)
import sketchfast
print(sorted(m for m in {HEAVY} if m in sys.modules and m not in before))
"""
    assert run_python(code, tmp_path).strip() == "[]"


def test_works_without_triton_trainers_or_compiled_parts(tmp_path):
    """Absent packages raise ImportError, no library is found: the reference serves, with one warning."""
    code = f"""
import sys, warnings
for name in {HEAVY[:-1]}: sys.modules[name] = None
import pathlib, torch
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self: False if self.suffix == ".so" else exists(self)
import sketchfast
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        image = sketchfast.rasterize(torch.rand(1, 4, 2) * 8, torch.ones(1, 4), 8)
assert image.shape == (1, 8, 8)
print(len(seen), seen[0].message)
"""
    out = run_python(code, tmp_path)
    assert out.startswith("1 sketchfast: rasterize takes the slow reference implementation on cpu")
    assert "pip install" in out


LAYERS = [
    "kernels",
    "ops",
    "nn",
    "models evaluate",
    "methods",
    "runs report cuda_graph",
    "train",
    "cli",
    "__main__",
]
#: what may be imported from outside the order above
ALSO = {"data": {"ops", "_host"}, "testing": {"ops", "kernels", "_host"}}
USERS_OF_DATA = {"cli", "train", "methods", "evaluate", "data"}


def part_of(module: str) -> str:
    """sketchfast.ops.raster -> ops"""
    return module.split(".")[1] if "." in module else ""


def imports_of(path: Path) -> list[str]:
    """Absolute names of the sketchfast modules a file imports, anywhere in it."""
    package = ["sketchfast", *path.relative_to(PACKAGE).with_suffix("").parts]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [module] if part_of(module) else [f"{module}.{alias.name}" for alias in node.names]
    return [name for name in names if name.startswith("sketchfast.")]


def may_import(importer: str, imported: str) -> bool:
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer.split()} | {
        "report": 5,
        "__main__": 9,
    }
    if imported in ("_host", "__version__") or importer == imported:
        return True
    if importer in ALSO:
        return imported in ALSO[importer]
    if imported == "data":
        return importer in USERS_OF_DATA
    return imported in rank and importer in rank and rank[imported] < rank[importer]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    if path == PACKAGE / "__init__.py":
        return
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    for name in imports_of(path):
        assert may_import(parts[0], part_of(name)), f"{path.name} imports {name}"
        if parts[0] == "kernels" and len(parts) == 3:
            family = name.split(".")[2] if name.count(".") >= 2 else ""
            assert family in ("", parts[1]), f"kernel family {parts[1]} imports {name}"


@pytest.mark.parametrize(("importer", "imported"), [("ops", "nn"), ("data", "methods"), ("kernels", "ops")])
def test_the_rule_can_fail(importer, imported):
    assert not may_import(importer, imported)


def test_every_op_fills_its_slots():
    """`git ls-files | grep raster` lists all of one op."""
    for op in ("raster", "sinkhorn", "triplet", "hyperlstm", "mixture"):
        for slot in (
            f"csrc/{op}_math.h",
            f"csrc/cpu/{op}.cpp",
            f"csrc/cuda/{op}.cu",
            f"sketchfast/ops/{op}.py",
            f"sketchfast/kernels/reference/{op}.py",
            f"sketchfast/kernels/triton/{op}.py",
            f"tests/ops/test_{op}.py",
            f"benchmarks/bench_{op}.py",
        ):
            assert (REPOSITORY / slot).exists(), slot
