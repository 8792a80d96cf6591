"""report.html of a run folder: pictures, curves, results and settings in one file that needs no other."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

_TEMPLATE = Path(__file__).with_name("report.html.j2")


def write_report(run: Path) -> Path:
    """Write `run`/report.html from what the run folder holds now, and return its path.

    ValueError where the folder has no config.json; everything else may be missing.
    """
    from jinja2 import Environment

    try:
        settings = json.loads((run / "config.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{run} is not a run folder: it has no config.json") from None
    results = _read_json(run / "results.json")
    steps, metrics = read_metrics(run / "metrics.csv")
    training = results.get("training", {})
    template = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE.read_text("utf-8"))
    html = template.render(
        title=f"{settings['method']} on {settings['data']['name']}",
        subtitle=f"preset {settings['preset']}, seed {settings['run']['seed']}, run folder {run.name}, "
        f"report of {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        facts=_facts(settings, training),
        evaluations=[_evaluation(run, name, value) for name, value in results.get("evaluations", {}).items()],
        pictures=[(int(p.stem.split("-")[-1]), _data_url(p.read_bytes())) for p in _chosen_pictures(run)],
        curves=_data_url(plot_curves(steps, metrics)) if len(steps) else None,
        settings=_settings(settings),
    )
    path = run / "report.html"
    temporary = path.with_name("report.html.tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(path)
    return path


def read_metrics(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps [n] and each metric [n] of a metrics.csv, NaN where a row has none; empty without a file."""
    if not path.exists():
        return np.zeros(0), {}
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        names = [name for name in reader.fieldnames or [] if name != "step"]
        rows = list(reader)
    steps = np.array([float(row["step"]) for row in rows])
    return steps, {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}


def plot_curves(steps: np.ndarray, metrics: Mapping[str, np.ndarray]) -> bytes:
    """The metrics over the steps as a PNG, a panel each, losses first."""
    from matplotlib.figure import Figure

    shown = {k: v for k, v in metrics.items() if k != "skipped" or np.nanmax(v, initial=0) > 0}
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.5 * rows), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (name, values), panel in zip(shown.items(), panels, strict=False):
        finite = np.isfinite(values)
        x, y = steps[finite], values[finite]
        panel.plot(x, y, color="#3056d3", alpha=0.3, linewidth=0.8)
        panel.plot(*_smooth(x, y), color="#3056d3", linewidth=1.6)
        if len(y) > 20 and name != "learning_rate":  # the first steps' heights would flatten the rest
            low, high = np.quantile(y, [0.0, 0.98])
            panel.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.1 * (high - low) + 1e-9)
        panel.set_title(name.replace("_", " "), fontsize=10, loc="left")
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.set_xlabel("step", fontsize=8)
    for panel in list(panels):
        panel.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _smooth(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moving average over a twentieth of the curve."""
    window = max(1, len(y) // 20)
    if window == 1:
        return x, y
    kernel = np.ones(window) / window
    return np.convolve(x, kernel, "valid"), np.convolve(y, kernel, "valid")


def _chosen_pictures(run: Path, most: int = 5) -> list[Path]:
    """At most `most` of the pictures, evenly spread, the last one among them."""
    paths = sorted((run / "pictures").glob("step-*.png"))
    if len(paths) <= most:
        return paths
    return [paths[i] for i in np.linspace(0, len(paths) - 1, most).round().astype(int)]


def _facts(settings: Mapping[str, Any], training: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    facts: list[tuple[str, str, bool]] = []
    if training:
        step, total = training["step"], settings["config"]["steps"]
        facts += [(f"{step:,}" if step == total else f"{step:,} / {total:,}", "steps", step != total)]
        facts += [(_duration(training["seconds"]), "training time", False)]
        if "loss" in training.get("last", {}):
            facts += [(format_cell(training["last"]["loss"]), "last loss", False)]
        facts += [(f"{training['samples']:,}", "training samples", False)]
        facts += [(str(training["skipped_steps"]), "skipped steps", training["skipped_steps"] > 0)]
        if training.get("skipped_files") is not None:
            facts += [(f"{training['skipped_files']:,}", "skipped files or drawings", False)]
    return [*facts, (f"{settings.get('parameters', 0):,}", "parameters", False)]


def _evaluation(run: Path, name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    flags = ", ".join(f"{k} {v}" for k, v in value.get("flags", {}).items() if v not in (None, [], ()))
    data = value["data"]["name"] + (f" in {value['data']['root']}" if value["data"].get("root") else "")
    about = f"checkpoint of step {value['step']:,}, data {data}" + (f", {flags}" if flags else "")
    return {"name": name, "about": about, "tables": [_table(run, table) for table in value["tables"]]}


def _table(run: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    columns = table_columns(table["rows"])
    numeric = {
        c for c in columns if all(isinstance(r.get(c), (int, float, type(None))) for r in table["rows"])
    }
    rows = [[(c, format_cell(row.get(c))) for c in columns] for row in table["rows"]]
    files = {caption: run / path for caption, path in table.get("pictures", {}).items()}
    pictures = {caption: _data_url(file.read_bytes()) for caption, file in files.items() if file.is_file()}
    return {**table, "columns": columns, "numeric": numeric, "rows": rows, "pictures": pictures}


def table_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every column of the rows, in the order of first sight."""
    return list(dict.fromkeys(column for row in rows for column in row))


def format_cell(value: Any) -> str:
    """A value as tables show it: floats to four significant digits."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, list, bool]]:
    run = {**settings["run"], "world_size": settings.get("world_size"), "git revision": settings.get("git")}
    return [
        ("Method", list(settings["config"].items()), True),
        ("Run", [*settings["data"].items(), *run.items()], False),
        ("Versions", list(settings["versions"].items()), False),
    ]


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
