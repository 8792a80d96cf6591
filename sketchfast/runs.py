"""What a run leaves on disk and how it is read back: config, checkpoints, metrics, results.

Every file but the growing metrics.csv is written under a temporary name, synced and renamed, so that a run
killed at any moment leaves whole files behind.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import platform
import subprocess
import typing
import warnings
import zipfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import __version__
from .methods import Method, get_method
from .methods.base import TrainConfig

CHECKPOINT_FORMAT = 1


def _require_plain(value: Any, path: str = "state") -> None:
    """TypeError unless `torch.load(weights_only=True)` will read `value` back."""
    if value is None or (
        isinstance(value, (bool, int, float, str, Tensor)) and not isinstance(value, np.generic)
    ):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            _require_plain(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _require_plain(item, f"{path}[{i}]")
    else:
        raise TypeError(
            f"{path} must be a tensor or a plain value to be checkpointed, got {type(value).__name__}"
        )


def _sync_folder(folder: Path) -> None:
    """A rename is on disk once its folder is (POSIX); elsewhere there is nothing to call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: Path, write: Callable[[typing.BinaryIO], object]) -> None:
    """Write a file under a temporary name, sync it, rename it: whoever looks sees the old or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; a NaN becomes null, as JSON has none."""

    def finite(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, Mapping):
            return {str(k): finite(v) for k, v in item.items()}
        if isinstance(item, (list, tuple)):
            return [finite(v) for v in item]
        if isinstance(item, np.generic):
            return finite(item.item())
        return str(item) if isinstance(item, Path) else item

    text = json.dumps(finite(value), indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def save_checkpoint(state: Mapping[str, Any], folder: Path, keep: int) -> Path:
    """Write `state` (with its "step") as `folder/step-NNNNNNNNN.pt`, then drop all but the newest `keep`."""
    _require_plain(state)
    path = folder / f"step-{state['step']:09d}.pt"
    write_whole(path, lambda file: torch.save(state, file))
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def _load_whole(path: Path) -> Any:
    """What `torch.save` wrote, on CPU, plain values and tensors only; an error of any type for damage."""
    with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on CPU; ValueError where the file is damaged or of another kind."""
    try:
        state = _load_whole(path)
        if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
            raise ValueError(f"not a sketchfast checkpoint of format {CHECKPOINT_FORMAT}")
    except Exception as error:  # damage surfaces as any of a dozen types
        raise ValueError(f"{path}: {error}") from error
    return state


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, None where there are none.

    A damaged one is passed over with a warning that names it; ValueError where all are damaged.
    """
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            warnings.warn(f"checkpoint passed over, it is damaged: {error}", RuntimeWarning, stacklevel=2)
    if paths:
        raise ValueError(f"{folder}: none of the {len(paths)} checkpoints can be read")
    return None


START_FILE = "start.pt"


def save_start(run: Path, start: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Keep what a method made ready before its first step, with all it was made from."""
    start = {**start, "identity": _as_text(identity)}
    _require_plain(start, "start")
    run.mkdir(parents=True, exist_ok=True)
    write_whole(run / START_FILE, lambda file: torch.save(start, file))


def read_start(run: Path, identity: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """What `save_start` kept, on CPU; None where there is nothing, or it was made from something else.

    ValueError where the file is damaged.
    """
    path = run / START_FILE
    if not path.exists():
        return None
    try:
        start = _load_whole(path)
        made_from = start.pop("identity")
    except Exception as error:  # damage surfaces as any of a dozen types
        raise ValueError(f"{path} is damaged: {error!r}") from error
    return start if identity is None or made_from == _as_text(identity) else None


def _as_text(identity: Mapping[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True, default=str)


# --------------------------------------------------------------------------------------------------
# The run folder


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    """The config's fields as JSON holds them (tuples as lists, paths as text)."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def config_from_json(config_type: type[TrainConfig], values: Mapping[str, Any]) -> TrainConfig:
    """The config that `config_to_json` wrote; ValueError names fields this version does not know."""
    hints = typing.get_type_hints(config_type)
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(config_type)})
    if unknown:
        raise ValueError(f"config has fields that {config_type.__name__} does not know: {', '.join(unknown)}")

    def typed(name: str, value: Any) -> Any:
        kinds = (typing.get_origin(hints[name]), *typing.get_args(hints[name]), hints[name])
        if isinstance(value, list):
            return tuple(value) if tuple in kinds else value
        return Path(value) if isinstance(value, str) and Path in kinds else value

    return config_type(**{name: typed(name, value) for name, value in values.items()})


def read_run(run: Path) -> dict[str, Any]:
    """What a run folder's config.json says; ValueError where `run` is not a run folder."""
    path = run / "config.json"
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{run} is not a run folder: `sketchfast train` writes config.json and checkpoints/ into one"
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(settings, dict) or not {"method", "config", "data", "run"} <= settings.keys():
        raise ValueError(
            f"{path} is not what `sketchfast train` writes: method, config, data or run is missing"
        )
    return settings


def load_method(run: Path) -> tuple[Method, int]:
    """The method of a run folder with its newest checkpoint's weights, in evaluation mode, and the step."""
    settings = read_run(run)
    found = newest_checkpoint(run / "checkpoints")
    if found is None:
        raise ValueError(f"{run} holds no checkpoint: it was stopped before the first one")
    kind = get_method(settings["method"])
    method = kind(config_from_json(kind.Config, settings["config"]))
    method.load_state_dict(found[1]["model"])
    method.trained_on = settings["data"]["name"]
    return method.eval(), found[1]["step"]


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"sketchfast": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "lightning", "numpy", "torchvision", "scikit-learn", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["gpu"] = torch.cuda.get_device_name()
    return found


def git_revision() -> str | None:
    """The revision of the source tree this runs from, `-dirty` where it was changed; None without git."""
    here = Path(__file__)
    # an installed package may lie in a repository of the user's, which does not track it
    tracked = _git(here.parent, "ls-files", "--error-unmatch", here.name)
    if tracked is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *command: str) -> str | None:
    """What a git command prints in `folder`, None where it fails."""
    try:
        done = subprocess.run(
            ["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class MetricsFile:
    """metrics.csv: one row a logged step, floats written in full.

    Fabric's own CSV logger deletes the file it finds, and with it the curve of the run to be resumed.
    """

    def __init__(self, path: Path, keep_to_step: int) -> None:
        self.path = path
        self.columns: list[str] = ["step"]
        rows = self._read(keep_to_step)
        self._rewrite(rows)

    def _read(self, keep_to_step: int) -> list[dict[str, str]]:
        """Rows up to the checkpoint's step: later ones will be written again, a half-written one too."""
        if not self.path.exists() or keep_to_step == 0:
            return []
        with open(self.path, newline="") as file:
            reader = csv.DictReader(file)
            self.columns = list(reader.fieldnames or ["step"])
            return [
                row for row in reader if (row["step"] or "").isdigit() and int(row["step"]) <= keep_to_step
            ]

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path, lambda file: file.write(text.getvalue().encode()))
        self._file = open(self.path, "a", newline="")  # noqa: SIM115 (kept open for the run)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row; a metric not seen before adds a column."""
        new = [name for name in values if name not in self.columns]
        if new:
            self._file.close()
            rows = self._read(step)
            self.columns += new
            self._rewrite(rows)
        row = {"step": step, **{name: repr(float(value)) for name, value in values.items()}}
        csv.DictWriter(self._file, self.columns, restval="", lineterminator="\n").writerow(row)
        self._file.flush()

    def sync(self) -> None:
        """Put the rows on disk, before a checkpoint says that they are there."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def update_results(run: Path, key: str, value: Any) -> None:
    """Set one entry of a run folder's results.json."""
    write_json(run / "results.json", {**read_results(run), key: value})


def read_results(run: Path) -> dict[str, Any]:
    """What a run folder's results.json holds, nothing where there is none; a damaged one is set aside."""
    path = run / "results.json"
    try:
        results = json.loads(path.read_text())
        if not isinstance(results, dict) or not isinstance(results.get("evaluations", {}), dict):
            raise ValueError("not what `sketchfast` writes")
    except FileNotFoundError:
        return {}
    except ValueError as error:  # no JSON, no UTF-8, or other JSON
        aside = path.with_name(path.name + ".damaged")
        os.replace(path, aside)
        warnings.warn(f"{path} is damaged, kept as {aside.name}: {error}", RuntimeWarning, stacklevel=2)
        return {}
    return results
