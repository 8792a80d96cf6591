"""The command line, on a toy method; every command's result and every mistake's one line."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sketchfast import cli
from sketchfast.cli import load_ink, main
from sketchfast.report import format_cell, plot_curves, write_report
from sketchfast.runs import read_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
import toy_method

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("SKETCHFAST_DEBUG", raising=False)
    monkeypatch.setitem(sys.modules, "sketchfast.methods.toy", toy_method)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A trained run."""
    out = tmp_path_factory.mktemp("cli") / "run"
    words = "--accelerator cpu --steps 12 --checkpoint-every 4 --picture-every 3 --log-every 1 --widths 5"
    assert main(["train", "toy", "--out", str(out), *words.split()]) == 0
    return out


def failure(capfd, *args) -> str:
    """What a command that must fail with code 2 prints: one line, no traceback."""
    assert main([str(a) for a in args]) == 2
    message = capfd.readouterr().err
    assert "Traceback" not in message
    return message.strip()


# --- train ------------------------------------------------------------------------------------------------


def test_flags_override_the_preset(run):
    settings = json.loads((run / "config.json").read_text())
    assert settings["preset"] == "paper"
    assert settings["config"]["steps"] == 12
    assert settings["config"]["widths"] == [5]
    assert settings["config"]["batch_size"] == 8
    assert settings["data"] == {"name": "procedural", "root": None}
    assert settings["run"]["checkpoint_every"] == 4
    assert len(list((run / "pictures").glob("*.png"))) == 4


def test_preset_sets_the_defaults(tmp_path, capfd):
    assert main(["train", "toy", "--preset", "tiny", f"--out={tmp_path / 'r'}", "--accelerator", "cpu"]) == 0
    out = capfd.readouterr().out
    assert "3 steps on 50 samples" in out
    assert "2 files or drawings skipped" in out
    assert str(tmp_path / "r" / "report.html") in out


def test_every_config_field_is_a_flag_with_help(capfd):
    assert main(["train", "toy", "--help"]) == 0
    text = capfd.readouterr().out
    for name in toy_method.ToyConfig.__dataclass_fields__:
        assert re.search(f"--(no-)?{name.replace('_', '-')}\\b", text), name
    assert "standard deviation of the noise on the hidden units" in text
    assert "optimiser steps (default: 30)" in text
    assert main(["train", "toy", "--preset", "small", "--help"]) == 0
    assert "optimiser steps (default: 20)" in capfd.readouterr().out


def test_resume_takes_its_defaults_from_the_run(tmp_path):
    out = tmp_path / "run"
    words = ["--accelerator", "cpu", "--out", str(out)]
    assert main(["train", "toy", *words, "--steps", "5", "--widths", "7", "--seed", "4"]) == 0
    assert main(["train", "toy", *words, "--resume", "--steps", "9"]) == 0
    state = read_checkpoint(out / "checkpoints" / "step-000000009.pt")
    assert state["config"]["widths"] == [7]
    assert state["data"]["seed"] == 4


def test_a_diverged_run_ends_in_a_line_and_leaves_a_report(tmp_path, capfd):
    out = tmp_path / "run"
    words = f"--accelerator cpu --out {out} --bad-from 2 --max-skipped 3".split()
    assert main(["train", "toy", *words]) == 1
    message = capfd.readouterr().err
    assert "training stopped at step 5" in message
    assert "Traceback" not in message
    assert "5 / 30" in (out / "report.html").read_text()


# --- evaluate ---------------------------------------------------------------------------------------------


def test_evaluate_compares_with_an_untrained_twin(run, capfd):
    assert main(["evaluate", str(run), "weights", "--episodes", "7", "--accelerator", "cpu"]) == 0
    text = capfd.readouterr().out
    assert "untrained" in text
    stored = json.loads((run / "results.json").read_text())
    assert stored["training"]["step"] == 12
    result = stored["evaluations"]["weights on procedural"]
    assert result["flags"] == {"episodes": 7}
    assert result["step"] == 12
    trained, untrained = result["tables"][0]["rows"]
    head = read_checkpoint(run / "checkpoints" / "step-000000012.pt")["model"]["head.weight"]
    assert trained["weight"] == pytest.approx(float(head.abs().sum()))
    assert untrained["weight"] != trained["weight"]
    assert "Evaluation: weights on procedural" in (run / "report.html").read_text()


def test_results_of_another_choice_do_not_replace_each_other():
    def protocol(method, untrained, data, *, split: str = "test", rotations: bool = True, episodes: int = 5):
        """One."""

    flags = {"split": "test", "rotations": True, "episodes": 9}
    assert cli._choices(protocol, flags) == []
    assert cli._choices(protocol, flags | {"split": "evaluation", "rotations": False}) == [
        "split evaluation",
        "rotations False",
    ]


def test_evaluate_takes_the_first_protocol_by_default(run, capfd):
    assert main(["evaluate", str(run)]) == 0
    assert main(["evaluate", str(run), "weights", "--help"]) == 0
    assert re.search(r"--episodes INT\s+how many \(default: 5\)", capfd.readouterr().out)


def test_evaluate_sets_a_damaged_results_file_aside(run, tmp_path, capfd):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "results.json").write_text('{"training": {"st')
    with pytest.warns(RuntimeWarning, match=r"results\.json is damaged, kept as results\.json\.damaged"):
        assert main(["evaluate", str(copy), "weights", "--accelerator", "cpu"]) == 0
    assert (copy / "results.json.damaged").read_text() == '{"training": {"st'
    assert "weights on procedural" in json.loads((copy / "results.json").read_text())["evaluations"]


def test_an_impl_that_cannot_run_is_refused_before_any_work(run, tmp_path, capfd, monkeypatch):
    from sketchfast.ops import _contract

    monkeypatch.setattr(_contract, "unavailable_reason", lambda impl, device: f"no {impl} on {device}")
    words = ["train", "toy", "--out", tmp_path / "new", "--accelerator", "cpu", "--impl", "triton"]
    message = failure(capfd, *words)
    assert "impl must be one that runs here on cpu, got 'triton': no triton on cpu" in message
    assert not (tmp_path / "new").exists()
    assert "got 'triton': no triton on" in failure(capfd, "demo", "--impl", "triton", "--out", tmp_path / "d")
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = (copy / "config.json").read_text().replace('"impl": "auto"', '"impl": "native"')
    (copy / "config.json").write_text(config)
    assert "got 'native': no native on cpu" in failure(capfd, "evaluate", copy, "--accelerator", "cpu")


# --- embed and draw ---------------------------------------------------------------------------------------


def draw_png(path: Path, *, dark: bool = False, size: tuple[int, int] = (20, 20)) -> None:
    pixels = np.full(size[::-1], 0 if dark else 255, np.uint8)
    pixels[5:15, 8:12] = 255 if dark else 0
    Image.fromarray(pixels).save(path)


def test_load_ink_knows_paper_from_ink(tmp_path):
    draw_png(tmp_path / "light.png")
    draw_png(tmp_path / "dark.png", dark=True)
    light, dark = load_ink(tmp_path / "light.png", 20), load_ink(tmp_path / "dark.png", 20)
    assert light.shape == (1, 20, 20)
    assert torch.equal(light, dark)
    assert light[0, 10, 10] == 1
    assert light.mean() == pytest.approx(0.1)
    wide = tmp_path / "wide.png"
    draw_png(wide, size=(40, 20))
    square = load_ink(wide, 40)[0]
    assert square[:10].sum() == 0
    assert square[10:30].sum() == 40
    clear = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    clear.putpixel((5, 5), (0, 0, 0, 255))
    clear.save(tmp_path / "clear.png")
    assert load_ink(tmp_path / "clear.png", 10).sum() == 1


def test_embed_skips_and_counts_broken_files(run, tmp_path, capfd):
    folder = tmp_path / "images" / "inner"
    folder.mkdir(parents=True)
    for name in ("a.png", "inner/b.png"):
        draw_png(tmp_path / "images" / name)
    (folder / "broken.png").write_bytes(b"no image")
    whole = (folder / "b.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not an image")
    out = tmp_path / "out"
    code = main(["embed", str(run), str(tmp_path / "images"), "--out", str(out), "--batch-size", "3"])
    assert code == 0
    printed = capfd.readouterr()
    assert "2 embeddings of 5 values, 2 files skipped" in printed.out
    assert "skipped" in printed.err
    assert "broken.png" in printed.err
    stored = np.load(tmp_path / "out.npz")
    assert stored["embeddings"].shape == (2, 5)
    assert [Path(name).name for name in stored["names"]] == ["a.png", "b.png"]
    np.testing.assert_array_equal(stored["embeddings"][0], stored["embeddings"][1])


# --- data -------------------------------------------------------------------------------------------------


def test_prepared_data_is_used_until_its_files_change(tmp_path, capfd):
    from sketchfast.data.prepare import load_prepared

    line = '{"word": "cat", "drawing": [[[0, 9, 20], [0, 9, 3]]], "recognized": true, "key_id": "1"}\n'
    (tmp_path / "cat.ndjson").write_text(line * 3 + "{broken\n")
    assert load_prepared("quickdraw", tmp_path) is None
    assert main(["data", "prepare", "quickdraw", str(tmp_path)]) == 0
    assert "3 drawings of 1 classes, skipped: 1 " in capfd.readouterr().out
    first = load_prepared("quickdraw", tmp_path)
    assert first is not None
    assert len(first) == 3
    assert sum(first.skipped.values()) == 1
    (tmp_path / "cat.ndjson").write_text(line * 5)
    with pytest.warns(RuntimeWarning, match="its files changed"):
        assert load_prepared("quickdraw", tmp_path) is None
    assert main(["data", "prepare", "quickdraw", str(tmp_path)]) == 0
    assert len(load_prepared("quickdraw", tmp_path) or ()) == 5
    next(tmp_path.glob(".sketchfast*")).write_bytes(b"damaged")
    with pytest.warns(RuntimeWarning, match="passed over"):
        assert load_prepared("quickdraw", tmp_path) is None


def test_image_sets_are_prepared_as_they_are_read(tmp_path, capfd):
    from PIL import Image

    from sketchfast.data.sketch_photo import load_sketch_photo

    root = tmp_path / "set"
    for name, value in [("sketch/cat/a-1.png", 255), ("photo/cat/a.jpg", 90)]:
        (root / name).parent.mkdir(parents=True)
        Image.new("RGB", (20, 20), (value,) * 3).save(root / name)
    (root / "sketchy_pairs.json").write_text('[{"sketch": "sketch/cat/a-1.png", "photo": "photo/cat/a.jpg"}]')
    assert main(["data", "prepare", "sketch_photo", str(root), "--size=10"]) == 0
    out = capfd.readouterr().out
    assert "1 sketches (1 with their photo) and 1 photos of 1 classes, skipped: none" in out
    assert str(root / ".sketchfast-sketch_photo-10") in out
    assert isinstance(load_sketch_photo(root, size=10).photos.images, np.memmap)


# --- report -----------------------------------------------------------------------------------------------


def test_report_is_whole_and_alone(run):
    html = write_report(run).read_text()
    assert "toy on procedural" in html
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    images = [base64.b64decode(x) for x in re.findall(r"data:image/png;base64,([^\"]+)", html)]
    assert len(images) == 5  # four steps' samples and the curves
    for image in images:
        assert Image.open(io.BytesIO(image)).size[0] > 100
    for name in toy_method.ToyConfig.__dataclass_fields__:
        assert f"<td>{name}</td>" in html
    assert "<b>12</b><span>steps</span>" in html
    assert torch.__version__.split("+")[0] in html


def test_report_escapes_what_it_shows(tmp_path, run):
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["root"] = "<script>x</script>"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert "<script>" not in write_report(tmp_path).read_text()


def test_curves_with_gaps_and_nan_are_drawn():
    steps = np.arange(1.0, 50)
    values = np.sin(steps)
    values[::3] = np.nan
    png = plot_curves(steps, {"loss": values, "all_nan": values * np.nan, "skipped": steps * 0})
    assert Image.open(io.BytesIO(png)).format == "PNG"


@pytest.mark.parametrize(("value", "shown"), [(0.123456, "0.1235"), (7, "7"), (None, ""), ("x", "x")])
def test_cells(value, shown):
    assert format_cell(value) == shown


# --- mistakes ---------------------------------------------------------------------------------------------


def test_mistakes_end_in_one_line_and_code_2(run, tmp_path, capfd):
    empty = tmp_path / "empty"
    empty.mkdir()
    new = tmp_path / "new"
    image = tmp_path / "a.png"
    draw_png(image)
    text = tmp_path / "a.txt"
    text.write_text("text")
    cases = {
        ("trian",): "unknown command 'trian'; did you mean train?",
        ("train", "nothing", "--out", new): "method must be one of",
        ("train", "toy"): "--out DIR is missing",
        ("train", "--out", new): "METHOD is missing",
        ("train", "toy", "--out", new, "--preset", "huge"): "preset must be one of paper, small, tiny",
        ("train", "toy", "--out", new, "--impl", "fast"): "impl must be one of auto, native, triton",
        (
            "train",
            "toy",
            "--out",
            new,
            "--root",
            tmp_path / "no",
        ): "root must be a folder or file that exists",
        ("train", "toy", "--out", new, "--root", empty): "root must be left out with data procedural",
        ("train", "toy", "--out", new, "--data", "nothing"): "data must be procedural, got 'nothing'",
        ("train", "toy", "--out", new, "--batch-size", "99"): "batch_size must be at most the number of",
        ("train", "toy", "--out", run): "already holds a run",
        ("train", "toy", "--out", new, "--resume"): "holds no run to resume",
        ("train", "toy", "--out", run, "--resume", "--noise", "3"): "noise was 0.1, is 3.0",
        ("train", "toy", "--out", text): "Not a directory",
        ("evaluate", empty): "is not a run folder",
        (
            "evaluate",
            run,
            "nothing",
        ): "'nothing' is no protocol (weights), and data must be procedural, got 'nothing'",
        ("embed", run): "RUN or IMAGES is missing",
        ("embed", run, tmp_path / "no.png"): "IMAGES must be files or folders that exist",
        ("embed", run, empty): "no images",
        ("embed", run, text): "none of the 1 images can be read",
        ("draw", run): "IMAGE is missing",
        ("draw", empty, image): "is not a run folder",
        ("draw", run, text): "cannot identify image file",
        ("data", "fetch", "x"): "data has the command prepare",
        ("data", "prepare", "nothing", empty): "name must be one of mini_imagenet, omniglot, qmul_v1",
        ("data", "prepare", "quickdraw"): "ROOT is missing",
        ("data", "prepare", "quickdraw", empty, "--bogus", "x"): "'--bogus' is not understood",
        (
            "data",
            "prepare",
            "sketchy",
            empty,
            "--size",
            "big",
        ): "--size must be a number of pixels, got 'big'",
        ("data", "prepare", "sketchy", empty, "--size"): "--size must be a number of pixels",
        ("data", "prepare", "quickdraw", empty, "--size", "8"): "size must be None for strokes",
        ("info", "--nonsense"): "'--nonsense' is not understood",
    }
    for args, message in cases.items():
        printed = failure(capfd, *args)
        line = printed.splitlines()[-1]
        assert line.startswith("sketchfast: error: "), args
        assert message in line, args
    assert not new.exists()


@pytest.mark.parametrize("flag", ["--stepss", "--steps=many", "--precision=16"])
def test_bad_flags_are_named(tmp_path, capfd, flag):
    message = failure(capfd, "train", "toy", "--out", tmp_path / "new", flag)
    assert flag.split("=")[0] in message
    assert not (tmp_path / "new").exists()


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("SKETCHFAST_DEBUG", "1")
    with pytest.raises(ValueError, match="not a run folder"):
        main(["evaluate", str(tmp_path)])


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def broken(args):
        raise RuntimeError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "info", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info"])


# --- help and info ----------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from sketchfast.cli import main; assert main(['--help']) == 0\n"
        "heavy = {'lightning', 'matplotlib', 'tyro', 'rich', 'PIL', 'sklearn', 'jinja2', 'torchvision'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in cli.COMMANDS:
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("command", ["demo", "train", "evaluate", "embed", "draw", "data", "info"])
def test_every_command_has_help(command, capfd):
    assert main([command, "--help"]) == 0
    assert f"usage: sketchfast {command}" in capfd.readouterr().out


def test_info_tells_each_ops_impl(capfd):
    assert main(["info"]) == 0
    text = capfd.readouterr().out
    assert torch.__version__.split("+")[0] in text
    for op in ("rasterize", "stroke_distance", "raster_bce"):
        assert re.search(rf"{op}\s+cpu\s+(native|reference)", text)
    assert "_C (cpu)" in text


# --- SketchEmbedNet end to end ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The tiny demo's run."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["demo", "--preset", "tiny", "--out", str(out)]) == 0
    return out


def test_demo_trains_evaluates_and_reports(demo):
    results = json.loads((demo / "results.json").read_text())
    assert results["training"]["step"] == 3
    rows = results["evaluations"]["fewshot on procedural"]["tables"][0]["rows"]
    assert [row["network"] for row in rows] == ["untrained", "SketchEmbedNet"]
    assert all(0 < float(row["5-way 1-shot"].split()[0]) <= 100 for row in rows)
    html = (demo / "report.html").read_text()
    assert "sketchembednet on procedural" in html
    assert "untrained" in html
    assert html.count("data:image/png") >= 2
    assert float(dict(csv_row(demo))["loss"]) > 0


def csv_row(run: Path) -> list[tuple[str, str]]:
    head, *rows = (run / "metrics.csv").read_text().splitlines()
    return list(zip(head.split(","), rows[-1].split(","), strict=True))


def test_draw_writes_png_and_svg(demo, tmp_path, capfd):
    draw_png(tmp_path / "a.png")
    words = [
        "draw",
        str(demo),
        str(tmp_path / "a.png"),
        "--out",
        str(tmp_path / "new" / "b.png"),
        "--scale",
        "4",
    ]
    assert main([*words, "--temperature", "0.8", "--seed", "1"]) == 0
    png, svg = tmp_path / "new" / "b.png", tmp_path / "new" / "b.svg"
    assert Image.open(png).size == (112, 112)
    assert svg.read_text().startswith("<svg")
    first = svg.read_text()
    assert main([*words, "--temperature", "0.8", "--seed", "1"]) == 0
    assert svg.read_text() == first
    assert main([*words, "--temperature", "0.8", "--seed", "2"]) == 0
    assert svg.read_text() != first


def test_sketchembednet_resumes_bit_for_bit(demo, tmp_path):
    words = ["train", "sketchembednet", "--preset", "tiny", "--accelerator", "cpu", "--log-every", "1"]
    states = []
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        out = str(tmp_path / name)
        for stop in stops:
            more = ["--resume"] if stop != stops[0] else []
            assert main([*words, "--out", out, "--steps", str(stop), *more]) == 0
        states.append(read_checkpoint(tmp_path / name / "checkpoints" / "step-000000004.pt"))
    for key, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][key]), key
    rows = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("whole", "parts")]
    assert rows[0] == rows[1]


def test_a_killed_sketchembednet_run_continues_bit_for_bit(tmp_path):
    """SIGKILL in mid-training, after the checkpoint of step 9; log, weights and all else are as without."""
    flags = "--preset tiny --accelerator cpu --steps 24 --checkpoint-every 3 --log-every 1 --picture-every 0"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    last = "checkpoints/step-000000024.pt"

    def start(name: str, *more: str) -> subprocess.Popen:
        words = ["train", "sketchembednet", "--out", str(tmp_path / name), *flags.split(), *more]
        return subprocess.Popen([sys.executable, "-m", "sketchfast", *words], env=environment)

    process = start("killed")
    deadline = time.monotonic() + 60
    ninth = tmp_path / "killed" / "checkpoints" / "step-000000009.pt"
    while not ninth.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "killed" / last).exists()
    runs = [start("killed", "--resume"), start("whole")]
    assert [run.wait(90) for run in runs] == [0, 0]
    killed, whole = (read_checkpoint(tmp_path / name / last) for name in ("killed", "whole"))
    assert killed["last"] == whole["last"]
    for key, value in whole["model"].items():
        assert torch.equal(value, killed["model"][key]), key
    rows = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("killed", "whole")]
    assert rows[0] == rows[1]
    assert rows[0].count(b"\n") == 25


def test_demo_takes_a_free_folder(tmp_path):
    for name in ("demo", "demo-2"):
        assert cli._free_folder(tmp_path / "demo") == tmp_path / name
        (tmp_path / name).mkdir()
