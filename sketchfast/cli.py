"""`sketchfast ...`: the command line. What is heavy to import is imported by the command that needs it."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from .methods.base import DataSpec, Method, Table
    from .train import TrainSummary

USAGE = """usage: sketchfast COMMAND ...

Learning from sketches: custom kernels, and trainers for published methods.

commands:
  demo                      draw data, train, evaluate and write a report, all in a few minutes; needs nothing
  train METHOD              train a method; every field of its config is a flag
  evaluate RUN [PROTOCOL]   run a protocol of the method's paper on a trained run
  embed RUN IMAGES...       embeddings of images (files or folders) as .npz
  draw RUN IMAGE            the sketch that a trained run draws of an image, as PNG and SVG
  data prepare NAME ROOT    read a downloaded data set once into a packed cache
  info                      versions, what was built, which implementation each op takes here and why

`sketchfast COMMAND --help` lists a command's flags. On several GPUs:
  torchrun --nproc-per-node N -m sketchfast train METHOD ...
"""

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says why in a line."""


# --- flags ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataOptions:
    """The training data."""

    data: str = "procedural"
    """name of the data set; procedural needs no files"""
    root: Path | None = None
    """folder or .zip that holds the data set"""


@dataclass(frozen=True)
class DemoOptions:
    """What the demo does."""

    preset: Literal["small", "tiny"] = "small"
    """small learns something, tiny only shows that everything runs"""
    out: Path = Path("runs/demo")
    """run folder; if it is taken, the next free name with a number is used"""
    steps: int | None = None
    """training steps; None = as many as the demo's minutes allow"""
    seed: int = 0
    """seed of the weights, the data order and everything random"""
    impl: str = "auto"
    """implementation of the kernels: auto, native, triton or reference"""


@dataclass(frozen=True)
class DeviceOptions:
    """Where to run."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """device; auto takes a GPU if there is one"""


@dataclass(frozen=True)
class EmbedOptions:
    """What to write."""

    out: Path = Path("embeddings.npz")
    """file to write: `embeddings` float32 [N, D] and `names` [N]"""
    batch_size: int = 64
    """images a batch"""


@dataclass(frozen=True)
class DrawOptions:
    """How to draw."""

    out: Path | None = None
    """file to write, its suffix replaced by .png and .svg; None = the image's name with -drawn here"""
    temperature: float = 0.0
    """0 takes the most likely point each time; higher draws more freely"""
    seed: int = 0
    """seed of the drawing at a temperature above 0"""
    scale: int = 8
    """pixels of the PNG to one of the canvas"""


def _parse(flags: Any, defaults: Any, args: Sequence[str], prog: str, description: str) -> Any:
    """The flags of one dataclass, or of a dict of them by heading; tyro prints help and bad flags itself."""
    import tyro

    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    if isinstance(defaults, dict):
        fields = [(name, type(v), dataclasses.field(default=v)) for name, v in defaults.items()]
        flags, defaults = dataclasses.make_dataclass("Flags", fields, frozen=True), None
    options = {} if defaults is None else {"default": defaults}
    return tyro.cli(flags, args=args, prog=prog, description=description, config=markers, **options)


def _positionals(args: Sequence[str], names: Sequence[str], prog: str, optional: int = 0) -> list[str]:
    """The leading words of `args`, one a name, of which the last `optional` may be absent."""
    words = []
    for word in args[: len(names)]:
        if word.startswith("-"):
            break
        words.append(word)
    if len(words) < len(names) - optional:
        raise UsageError(f"{names[len(words)]} is missing; usage: {prog} {' '.join(names)} [flags]")
    return words


def _peek(args: Sequence[str], flag: str) -> str | None:
    """The value of a flag that decides the defaults of the others."""
    for i, word in enumerate(args):
        if word == flag and i + 1 < len(args):
            return args[i + 1]
        if word.startswith(flag + "="):
            return word.split("=", 1)[1]
    return None


def _wants_help(args: Sequence[str]) -> bool:
    return any(word in ("-h", "--help") for word in args)


# --- train ------------------------------------------------------------------------------------------------


def train_command(args: Sequence[str]) -> int:
    from .methods import METHODS, get_method

    prog = "sketchfast train"
    if not args or args[0] in ("-h", "--help"):
        print(
            f"usage: {prog} METHOD --out DIR [--preset P] [--data NAME] [--root PATH] [flags]\n\n"
            f"methods: {', '.join(sorted(METHODS))}\n\n`{prog} METHOD --help` lists the method's flags."
        )
        return 0
    (name,) = _positionals(args, ("METHOD",), prog)
    kind = get_method(name)
    defaults, preset = _train_defaults(kind, args[1:])
    flags = _parse(None, defaults, args[1:], f"{prog} {name}", inspect.getdoc(kind) or "")
    _check_impl(flags.method.impl, flags.run.accelerator)
    if flags.preset.preset != preset:
        raise UsageError(f"preset must be {preset}, that of the run to be resumed, got {flags.preset.preset}")
    summary = _train(name, flags.method, _data_spec(flags.data), flags.run, preset)
    if int(os.environ.get("RANK", 0)) == 0:
        _say_trained(flags.run.out, summary)
    return 0


@dataclass(frozen=True)
class PresetOption:
    """The method's defaults."""

    preset: Literal["paper", "small", "tiny"] = "paper"
    """paper: the paper's sizes; small: learns something without a GPU in ten minutes; tiny: for tests"""


def _train_defaults(kind: type[Method], args: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The defaults of the flags, from the run to be resumed or from the preset; and the preset's name."""
    from .runs import config_from_json, read_run
    from .train import RunOptions

    out, preset = _peek(args, "--out"), _peek(args, "--preset") or "paper"
    run = RunOptions(Path(out or "runs/latest"))
    if "--resume" in args and out is not None and (Path(out) / "config.json").exists():
        settings = read_run(Path(out))
        known = {field.name for field in dataclasses.fields(RunOptions)} - {"out", "resume"}
        stored = {key: value for key, value in settings["run"].items() if key in known}
        root = settings["data"]["root"]
        return {
            "method": config_from_json(kind.Config, settings["config"]),
            "preset": PresetOption(settings["preset"]),
            "data": DataOptions(settings["data"]["name"], None if root is None else Path(root)),
            "run": dataclasses.replace(run, **stored),
        }, settings["preset"]
    from .methods.base import PRESETS

    if preset not in PRESETS:
        raise UsageError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if out is None and not _wants_help(args):
        raise UsageError("--out DIR is missing: the folder that will hold the run")
    defaults = {
        "method": kind.preset(preset),
        "preset": PresetOption(preset),  # type: ignore[arg-type]
        "data": DataOptions(),
        "run": run,
    }
    return defaults, preset


def _check_impl(impl: str, accelerator: str) -> None:
    from .ops._contract import IMPLS, unavailable_reason

    if impl not in IMPLS:
        raise UsageError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    device = _device(accelerator).type
    reason = None if impl == "auto" else unavailable_reason(impl, device)
    if reason is not None:
        raise UsageError(f"impl must be one that runs here on {device}, got {impl!r}: {reason}")


def _data_spec(options: DataOptions) -> DataSpec:
    from .methods.base import DataSpec

    if options.root is not None and not options.root.exists():
        raise UsageError(f"root must be a folder or file that exists, got {options.root}")
    if options.root is not None and options.data == "procedural":
        raise UsageError(
            f"root must be left out with data procedural, got {options.root}; --data names others"
        )
    return DataSpec(options.data, options.root)


def _train(name: str, config: Any, data: DataSpec, run: Any, preset: str) -> TrainSummary:
    from .report import write_report
    from .train import train

    try:
        return train(name, config, data, run, preset=preset)
    finally:  # a run that diverged or was stopped has a curve worth seeing too
        if (run.out / "config.json").exists() and int(os.environ.get("RANK", 0)) == 0:
            write_report(run.out)


def _say_trained(out: Path, summary: TrainSummary) -> None:
    skipped = f", {summary.skipped_steps} steps skipped" if summary.skipped_steps else ""
    files = f", {summary.skipped_files} files or drawings skipped" if summary.skipped_files else ""
    print(f"{summary.step} steps on {summary.samples} samples in {summary.seconds:.0f} s{skipped}{files}")
    print(f"report: {out / 'report.html'}")


# --- evaluate ---------------------------------------------------------------------------------------------


def evaluate_command(args: Sequence[str]) -> int:
    from .methods import get_method
    from .runs import read_run

    prog = "sketchfast evaluate"
    if not args or args[0] in ("-h", "--help"):
        print(
            f"usage: {prog} RUN [PROTOCOL] [--data NAME] [--root PATH] [flags]\n\n"
            "RUN is a folder that `sketchfast train` wrote. PROTOCOL is one of its method's (by default the\n"
            "first), or the name of a data set to run that one on.\n"
            f"`{prog} RUN PROTOCOL --help` lists the flags."
        )
        return 0
    words = _positionals(args, ("RUN", "PROTOCOL"), prog, optional=1)
    run = Path(words[0])
    settings = read_run(run)
    protocols = get_method(settings["method"]).protocols
    if not protocols:
        raise UsageError(f"method {settings['method']} has no protocol to evaluate")
    given = words[1] if len(words) > 1 else next(iter(protocols))
    name = given if given in protocols else next(iter(protocols))
    trained_on = settings["data"]
    keywords = _keyword_flags(protocols[name])
    data = DataOptions(trained_on["name"] if given in protocols else given)
    defaults = {"protocol": keywords(), "data": data, "device": DeviceOptions()}
    flags = _parse(None, defaults, args[len(words) :], f"{prog} RUN {given}", _summary(protocols[name]))
    chosen = {field.name: getattr(flags.protocol, field.name) for field in dataclasses.fields(keywords)}
    data = flags.data
    if data.root is None and data.data == trained_on["name"] and trained_on["root"] is not None:
        data = dataclasses.replace(data, root=Path(trained_on["root"]))
    try:
        tables = _evaluate(run, name, _data_spec(data), chosen, flags.device.accelerator)
    except ValueError as error:
        if given in protocols or "data must be" not in str(error):
            raise
        raise UsageError(f"{given!r} is no protocol ({', '.join(protocols)}), and {error}") from error
    _print_tables(tables)
    print(f"results: {run / 'results.json'}\nreport: {run / 'report.html'}")
    return 0


def _summary(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").split("\n\n")[0]


def _keyword_flags(function: Callable[..., Any]) -> type:
    """A dataclass of a protocol's keyword arguments, so that tyro makes flags of them, with their help."""
    import typing

    import docstring_parser
    import tyro

    from .methods.base import Method

    folders: dict[Any, Any] = {Method | None: Path | None, tuple[Method, ...]: tuple[Path, ...]}
    documented = docstring_parser.parse(inspect.getdoc(function) or "").params
    text = {param.arg_name: param.description for param in documented}
    hints = typing.get_type_hints(function)
    fields: list[Any] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            kind = folders.get(hints[name], hints[name])
            flag = typing.Annotated[kind, tyro.conf.arg(help=text.get(name))]  # type: ignore[valid-type]
            fields.append((name, flag, dataclasses.field(default=parameter.default)))
    return dataclasses.make_dataclass("Protocol", fields, frozen=True)


def _load_runs(function: Callable[..., Any], flags: dict[str, Any], run: Path, device: Any) -> dict[str, Any]:
    """The protocol's arguments that are other runs: on the command line their folders."""
    import typing

    from .methods.base import Method
    from .runs import load_method

    loaded: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(function).items():
        if not flags.get(name):
            continue
        if hint == (Method | None):
            loaded[name] = load_method(flags[name])[0].to(device)
        elif hint == tuple[Method, ...]:
            loaded[name] = tuple(
                load_method(folder)[0].to(device)
                for folder in _run_folders(flags[name])
                if folder.resolve() != run.resolve()
            )
    return loaded


def _run_folders(paths: Iterable[Path]) -> list[Path]:
    """The run folders named, and those in the folders named, in order."""
    found: list[Path] = []
    for path in paths:
        inside = [] if (path / "config.json").exists() else sorted(path.glob("*/config.json"))
        found += [file.parent for file in inside] or [path]
    return found


def _evaluate(run: Path, name: str, data: DataSpec, flags: dict[str, Any], accelerator: str) -> list[Table]:
    """Run a protocol on a run's newest checkpoint and an untrained twin; into results.json and the report."""
    import torch

    from .report import write_report
    from .runs import load_method, read_results, read_run, read_start, update_results
    from .train import spread_pool

    device = _device(accelerator)
    if device.type == "cpu":
        spread_pool()
    method, step = load_method(run)
    _check_impl(method.config.impl, accelerator)
    with torch.random.fork_rng():
        torch.manual_seed(read_run(run)["run"]["seed"] + 1)  # not the weights that training began from
        untrained = type(method)(method.config).eval()
    method, untrained = method.to(device), untrained.to(device)
    if (start := read_start(run)) is not None:
        untrained.start_from(start)
    protocol = type(method).protocols[name]
    loaded = _load_runs(protocol, flags, run, device)
    tables = protocol(method, untrained, data, **{**flags, **loaded})
    stored = read_results(run).get("evaluations", {})
    title = ", ".join([f"{name} on {data.name}", *_choices(protocol, flags)])
    stored[title] = {
        "step": step,
        "data": {"name": data.name, "root": None if data.root is None else str(data.root)},
        "flags": flags,
        "tables": [
            dataclasses.asdict(table) | {"pictures": _write_pictures(run, title, table)} for table in tables
        ],
    }
    update_results(run, "evaluations", stored)
    write_report(run)
    return tables


def _choices(function: Callable[..., Any], flags: dict[str, Any]) -> list[str]:
    """The flags that say what was evaluated, where they are not the default: results of another choice stand
    beside each other, those of another amount (of episodes, of drawings) replace one another."""
    defaults = inspect.signature(function).parameters
    return [
        f"{name} {value}"
        for name, value in flags.items()
        if isinstance(value, (str, bool)) and value != defaults[name].default
    ]


def _write_pictures(run: Path, title: str, table: Table) -> dict[str, str]:
    """A table's pictures as files of the run folder; caption -> path in it."""
    from .runs import write_whole

    def words(text: str) -> str:
        return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

    written: dict[str, str] = {}
    stem = words(title.replace(" on ", " "))
    for caption, png in table.pictures.items():
        path = Path("pictures") / f"{stem}-{words(caption)}.png"
        (run / path).parent.mkdir(exist_ok=True)
        write_whole(run / path, lambda file, png=png: file.write(png))  # type: ignore[misc]
        written[caption] = path.as_posix()
    return written


def _device(accelerator: str) -> Any:
    import torch

    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UsageError("accelerator must be one this machine has, got 'cuda' and torch finds no GPU")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def _print_tables(tables: Iterable[Table]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    from .report import format_cell, table_columns

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for table in tables:
        shown = RichTable(title=table.title, title_justify="left")
        columns = table_columns(table.rows)
        for column in columns:
            numeric = all(isinstance(row.get(column), (int, float, type(None))) for row in table.rows)
            shown.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in table.rows:
            shown.add_row(*(format_cell(row.get(column)) for column in columns))
        console.print(shown)
        if table.note:
            console.print(table.note, style="dim", highlight=False)


# --- embed and draw ---------------------------------------------------------------------------------------


def load_ink(path: Path, size: int) -> Tensor:
    """An image file as ink [1, size, size] in [0, 1], ink = 1: padded to a square and scaled.

    What the border shows is background, dark or light; transparency is white paper. OSError for a file that
    is no readable image.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        picture = ImageOps.exif_transpose(image).convert("RGBA")
    paper = Image.new("RGBA", picture.size, "white")
    grey = Image.alpha_composite(paper, picture).convert("L")
    pixels = np.asarray(grey)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if np.median(border) > 127:
        grey = ImageOps.invert(grey)
    square = ImageOps.pad(grey, (max(grey.size), max(grey.size)), color=0)
    scaled = square.resize((size, size), Image.Resampling.BILINEAR)  # Pillow's is antialiased
    return torch.from_numpy(np.asarray(scaled, dtype=np.float32) / 255)[None]


def load_rgb(path: Path, size: int) -> Tensor:
    """An image file as RGB [3, size, size] in [0, 1], stretched to a square as the data readers do.

    Transparency is white paper. OSError for a file that is no readable image.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        picture = ImageOps.exif_transpose(image).convert("RGBA")
    paper = Image.new("RGBA", picture.size, "white")
    colour = Image.alpha_composite(paper, picture).convert("RGB")
    pixels = np.asarray(colour.resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _image_size(method: Method) -> int:
    return int(getattr(method.config, "image_size", 224))


def _find_images(words: Sequence[str]) -> list[Path]:
    """The files named, and the images in the folders named, in order."""
    found: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        elif path.exists():
            found.append(path)
        else:
            raise UsageError(f"IMAGES must be files or folders that exist, got {path}")
    if not found:
        raise UsageError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {', '.join(words)}")
    return found


def embed_command(args: Sequence[str]) -> int:
    import numpy as np
    import torch

    from .runs import load_method

    prog = "sketchfast embed"
    words = _leading_words(args)
    if len(words) < 2 and not _wants_help(args):
        raise UsageError(f"RUN or IMAGES is missing; usage: {prog} RUN IMAGES... [flags]")
    defaults = {"embed": EmbedOptions(), "device": DeviceOptions()}
    about = "Embeddings of images (files, or folders searched for images) by a trained run."
    flags = _parse(None, defaults, args[len(words) :], f"{prog} RUN IMAGES...", about)
    if flags.embed.batch_size < 1:
        raise UsageError(f"batch-size must be at least 1, got {flags.embed.batch_size}")
    paths = _find_images(words[1:])
    method = load_method(Path(words[0]))[0].to(_device(flags.device.accelerator))
    device, size = next(method.parameters()).device, _image_size(method)
    load = load_rgb if method.takes_colour else load_ink
    names: list[str] = []
    parts: list[Any] = []
    skipped: list[Path] = []
    for start in range(0, len(paths), flags.embed.batch_size):
        images = []
        for path in paths[start : start + flags.embed.batch_size]:
            try:
                images.append(load(path, size))
                names.append(str(path))
            except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for broken files
                print(f"skipped {path}: {error}", file=sys.stderr)
                skipped.append(path)
        if images:
            with torch.no_grad():
                parts.append(method.embed(torch.stack(images).to(device)).float().cpu().numpy())
    if not parts:
        raise UsageError(f"none of the {len(paths)} images can be read")
    out = flags.embed.out if flags.embed.out.suffix == ".npz" else Path(f"{flags.embed.out}.npz")
    out.parent.mkdir(parents=True, exist_ok=True)
    embeddings = np.concatenate(parts)
    np.savez(out, embeddings=embeddings, names=np.array(names))
    print(f"{len(names)} embeddings of {embeddings.shape[1]} values, {len(skipped)} files skipped: {out}")
    return 0


def _leading_words(args: Sequence[str]) -> list[str]:
    stop = next((i for i, word in enumerate(args) if word.startswith("-")), len(args))
    return list(args[:stop])


def draw_command(args: Sequence[str]) -> int:
    from .methods.base import Method
    from .runs import load_method, read_run

    prog = "sketchfast draw"
    words = [] if _wants_help(args) else _positionals(args, ("RUN", "IMAGE"), prog)
    defaults = {"draw": DrawOptions(), "device": DeviceOptions()}
    about = "The sketch that a trained run draws of an image, as PNG and SVG."
    flags = _parse(None, defaults, args[len(words) :], f"{prog} RUN IMAGE", about)
    run, image = Path(words[0]), Path(words[1])
    if flags.draw.temperature < 0:
        raise UsageError(f"temperature must be at least 0, got {flags.draw.temperature}")
    if flags.draw.scale < 1:
        raise UsageError(f"scale must be at least 1, got {flags.draw.scale}")
    method = load_method(run)[0].to(_device(flags.device.accelerator))
    size = _image_size(method)
    load = load_rgb if method.takes_colour else load_ink
    picture = load(image, size)[None].to(next(method.parameters()).device)
    if type(method).draw is Method.draw:
        raise UsageError(f"RUN must be of a method that draws, got one of {read_run(run)['method']}")
    sketch = method.draw(picture, temperature=flags.draw.temperature, seed=flags.draw.seed)[0]
    out = flags.draw.out or Path(f"{image.stem}-drawn.svg")
    out.parent.mkdir(parents=True, exist_ok=True)
    svg, png = out.with_suffix(".svg"), out.with_suffix(".png")
    _write_sketch(sketch, size, flags.draw.scale, svg, png)
    print(f"{png}\n{svg}")
    return 0


def _write_sketch(sketch: Any, size: int, scale: int, svg: Path, png: Path) -> None:
    import torch
    from PIL import Image

    from .data.strokes import to_svg
    from .ops.raster import rasterize

    svg.write_text(to_svg(sketch, size=(size, size)))
    # pixel centres are integers, so scaling moves them by half a pixel; a line stays one canvas pixel wide
    points = (torch.as_tensor(sketch.points)[None] + 0.5) * scale - 0.5
    pens = torch.as_tensor(sketch.pen_down)[None]
    pixels = rasterize(points, pens, size * scale, sharpness=5.0 / scale**2)[0]
    Image.fromarray(((1 - pixels / pixels.max().clamp_min(1e-6)) * 255).byte().numpy()).save(png)


# --- data, info, demo -------------------------------------------------------------------------------------


def data_command(args: Sequence[str]) -> int:
    usage = "sketchfast data prepare NAME ROOT [--size PIXELS]"
    if not args or _wants_help(args):
        print(
            f"usage: {usage}\n\nRead a downloaded data set once into a packed cache beside it.\n"
            "--size: side of the images in pixels (image data sets only)."
        )
        return 0
    if args[0] != "prepare":
        raise UsageError(f"data has the command prepare, got {args[0]!r}; usage: {usage}")
    name, root = _positionals(args[1:], ("NAME", "ROOT"), "sketchfast data prepare")
    size = _size_flag(args[3:], usage)
    from .data.prepare import prepare

    path, data = prepare(name, Path(root), size=size, progress=True)
    skipped = ", ".join(f"{count} {reason}" for reason, count in data.skipped.items()) or "none"
    print(f"{_contents(data)} of {len(data.class_names)} classes, skipped: {skipped}\n{path}")
    return 0


def _size_flag(flags: Sequence[str], usage: str) -> int | None:
    """The value of `--size PIXELS` or `--size=PIXELS`, the only flag there may be."""
    words = [word for flag in flags for word in flag.split("=", 1)]
    if words[:1] != ["--size"]:
        _refuse(words, usage)
        return None
    if len(words) != 2 or not words[1].isdecimal():
        raise UsageError(f"--size must be a number of pixels, got {' '.join(words[1:])!r}; usage: {usage}")
    return int(words[1])


def _contents(data: Any) -> str:
    """How much a data set holds: strokes, images of one domain, or sketches and photos."""
    if hasattr(data, "pairs"):
        paired = int((data.pairs >= 0).sum())
        return f"{len(data.sketches)} sketches ({paired} with their photo) and {len(data.photos)} photos"
    return f"{len(data)} {'images' if hasattr(data, 'images') else 'drawings'}"


def _refuse(extra: Sequence[str], usage: str) -> None:
    if extra:
        raise UsageError(f"{extra[0]!r} is not understood; usage: {usage}")


def info_command(args: Sequence[str]) -> int:
    if _wants_help(args):
        print("usage: sketchfast info\n\nVersions, what was built, which implementation each op takes here.")
        return 0
    _refuse(args, "sketchfast info")
    import torch

    from .runs import git_revision, versions

    for name, version in versions().items():
        print(f"{name:14} {version}")
    print(f"{'git':14} {git_revision() or 'no'}")
    print(f"{'threads':14} {torch.get_num_threads()}")
    print("\nbuilt")
    for name, text in _built().items():
        print(f"  {name:12} {text}")
    print("\nwhat impl='auto' takes")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for op in _op_names():
        for device in devices:
            print(f"  {op:24} {device:5} {_choice(op, device)}")
    return 0


def _built() -> dict[str, str]:
    from .kernels import native

    found = {f"_C ({kind})": native.unavailable_reason(kind) or "loaded" for kind in ("cpu", "cuda")}
    try:
        from . import _host  # type: ignore[attr-defined]
    except ImportError as error:
        return {**found, "_host": f"not loaded: {error}"}
    return {**found, "_host": str(_host.build_info())}


def _op_names() -> list[str]:
    import sketchfast

    public = {name: getattr(sketchfast, name) for name in sketchfast.__all__}
    return [n for n, f in public.items() if inspect.isfunction(f) and ".ops." in f.__module__]


def _choice(op: str, device: str) -> str:
    """The impl that auto takes, and why none before it."""
    from .ops._contract import preference, unavailable_reason

    passed: list[str] = []
    for impl in preference(op, device):
        reason = unavailable_reason(impl, device)
        if reason is None:
            return impl + (f" ({'; '.join(passed)})" if passed else "")
        passed.append(f"{impl}: {reason}")
    return "none"


def demo_command(args: Sequence[str]) -> int:
    from .methods import get_method
    from .methods.base import DataSpec
    from .train import RunOptions

    about = "Draw procedural data, train SketchEmbedNet on it, compare it few-shot with an untrained encoder."
    options = _parse(DemoOptions, None, args, "sketchfast demo", about)
    _check_impl(options.impl, "auto")
    preset = get_method("sketchembednet").preset(options.preset)
    steps = DEMO_STEPS[options.preset] if options.steps is None else options.steps
    config = dataclasses.replace(preset, steps=steps, impl=options.impl, **_demo_schedule(steps))
    out = _free_folder(options.out)
    every = max(1, steps // 4)
    run = RunOptions(out, seed=options.seed, checkpoint_every=every, picture_every=every)
    print(f"training SketchEmbedNet ({options.preset}) for {steps} steps on procedural drawings into {out}")
    data = DataSpec()
    summary = _train("sketchembednet", config, data, run, options.preset)
    print("few-shot evaluation on classes held out of training, against an untrained encoder")
    _print_tables(_evaluate(out, "fewshot", data, {"episodes": DEMO_EPISODES[options.preset]}, "auto"))
    _say_trained(out, summary)
    return 0


def _demo_schedule(steps: int) -> dict[str, Any]:
    """A few hundred steps want a higher rate that falls less than the paper's, and the pixel loss later."""
    return {
        "learning_rate": 2e-3,
        "lr_decay_steps": max(1, steps // 5),
        "alpha_interval": max(1, steps // 10),
    }


DEMO_STEPS = {"small": 800, "tiny": 3}
DEMO_EPISODES = {"small": 200, "tiny": 5}


def _free_folder(out: Path) -> Path:
    """`out`, or the first of out-2, out-3, ... that does not exist."""
    number, free = 2, out
    while free.exists():
        free, number = out.with_name(f"{out.name}-{number}"), number + 1
    return free


# --- entry ------------------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo_command,
    "train": train_command,
    "evaluate": evaluate_command,
    "embed": embed_command,
    "draw": draw_command,
    "data": data_command,
    "info": info_command,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a run that failed, 2 for what the user got wrong."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if args[0] in ("-V", "--version"):
        from . import __version__

        print(f"sketchfast {__version__}")
        return 0
    if args[0] not in COMMANDS:
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; it must be one of {', '.join(COMMANDS)}"
        return _fail(f"unknown command {args[0]!r}{hint}", 2)
    return _run(COMMANDS[args[0]], args[1:])


def _run(command: Callable[[Sequence[str]], int], args: Sequence[str]) -> int:
    """The command's exit code; a wrong input is one line, and a traceback with SKETCHFAST_DEBUG=1."""
    debug = os.environ.get("SKETCHFAST_DEBUG") == "1"
    try:
        return command(args)
    except SystemExit as stop:  # tyro, after help (0) or a bad flag (2)
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:  # the reader of our output, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if debug:
            raise
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except RuntimeError as error:
        from .train import TrainingDivergedError, TrainingInterruptedError

        if debug or not isinstance(error, (TrainingDivergedError, TrainingInterruptedError)):
            raise
        return _fail(str(error), 130 if isinstance(error, TrainingInterruptedError) else 1)


def _fail(message: str, code: int) -> int:
    print(f"sketchfast: {' '.join(message.splitlines())}" if code == 130 else f"sketchfast: error: {message}",
          file=sys.stderr)  # fmt: skip
    return code
