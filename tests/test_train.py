"""The loop: resume, kills, damage, skipped steps, ranks."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sketchfast import runs
from sketchfast import train as loop
from sketchfast.methods.base import DataSpec
from sketchfast.runs import (
    MetricsFile,
    config_from_json,
    config_to_json,
    list_checkpoints,
    load_method,
    newest_checkpoint,
    read_checkpoint,
    read_run,
    save_checkpoint,
    write_json,
)
from sketchfast.train import BatchOrder, RunOptions, TrainingDivergedError, picture_grid, train

sys.path.insert(0, str(Path(__file__).parent))
from toy_method import Toy, ToyConfig, ToyData

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_toy(out: Path, *, resume: bool = False, options: dict | None = None, **config):
    settings = {"checkpoint_every": 10, "log_every": 1, "picture_every": 0, "accelerator": "cpu"}
    run = RunOptions(out, resume=resume, **{**settings, **(options or {})})
    return train("toy", ToyConfig(**config), DataSpec(), run, preset="paper")


def weights(out: Path, step: int) -> dict:
    return read_checkpoint(out / "checkpoints" / f"step-{step:09d}.pt")


def curve(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same(a, b, path="state", ignore=("seconds",)):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in ignore:
                assert_same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


# --- the run folder ---------------------------------------------------------------------------------------


def test_run_folder_holds_what_it_should(tmp_path):
    summary = run_toy(tmp_path, options={"picture_every": 20, "keep": 2})
    assert summary.step == 30
    assert summary.skipped_steps == 0
    assert summary.skipped_files == 2
    names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert [n for n in names if not n.startswith("tensorboard/")] == [
        "checkpoints/step-000000020.pt",
        "checkpoints/step-000000030.pt",
        "config.json",
        "metrics.csv",
        "pictures/step-000000020.png",
        "pictures/step-000000030.png",
        "results.json",
    ]
    assert any(n.startswith("tensorboard/events") for n in names)
    settings = read_run(tmp_path)
    assert settings["method"] == "toy"
    assert settings["config"] == config_to_json(ToyConfig())
    assert settings["run"]["seed"] == 0
    assert settings["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    rows = curve(tmp_path)
    assert [int(r["step"]) for r in rows] == list(range(1, 31))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) / 4
    assert float(rows[1]["learning_rate"]) == pytest.approx(1e-2 * 0.99)
    assert json.loads((tmp_path / "results.json").read_text())["training"]["step"] == 30


def test_load_method_gives_the_trained_weights(tmp_path):
    run_toy(tmp_path, widths=(5,))
    method, step = load_method(tmp_path)
    assert step == 30
    assert isinstance(method, Toy)
    assert not method.training
    assert method.config == ToyConfig(widths=(5,))
    assert_same(dict(method.state_dict()), dict(weights(tmp_path, 30)["model"]))


def test_config_goes_through_json():
    config = ToyConfig(widths=(3, 4), noise=0.5)
    back = config_from_json(ToyConfig, json.loads(json.dumps(config_to_json(config))))
    assert back == config
    with pytest.raises(ValueError, match=r"does not know: nose"):
        config_from_json(ToyConfig, {"nose": 1})


def test_write_json_has_null_for_nan(tmp_path):
    write_json(tmp_path / "a.json", {"x": [float("nan"), np.float32(2), Path("p")]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, 2.0, "p"]}


# --- resume -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_exact(tmp_path, workers):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_toy(whole)
    options = {"workers": workers, "checkpoint_every": 7, "picture_every": 4}
    run_toy(parts, steps=13, options=options)
    random.random(), np.random.rand(), torch.rand(3)  # the resumed run must not depend on any of these
    (parts / "checkpoints" / "step-000000013.pt").unlink()  # as if killed at 13, last checkpoint at 7
    run_toy(parts, resume=True, options=options)
    a, b = weights(whole, 30), weights(parts, 30)
    assert_same(a, b, ignore=("seconds",))
    assert (whole / "metrics.csv").read_bytes() == (parts / "metrics.csv").read_bytes()


def test_killed_run_continues_bit_for_bit(tmp_path):
    """SIGKILL in mid-training, twice; weights and curve are those of a run never killed."""
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from toy_method import ToyConfig; from sketchfast.train import RunOptions, train\n"
        "from sketchfast.methods.base import DataSpec\n"
        "options = RunOptions(Path(sys.argv[1]), log_every=1, checkpoint_every=5, picture_every=0,\n"
        "                     resume=sys.argv[2] == 'resume', accelerator='cpu')\n"
        "train('toy', ToyConfig(steps=120, pause=float(sys.argv[3])), DataSpec(), options)\n"
    )

    def start(out: Path, mode: str, pause: float) -> subprocess.Popen:
        command = [sys.executable, "-c", code, str(out), mode, str(pause)]
        return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE)

    def rows(out: Path) -> int:
        path = out / "metrics.csv"
        return path.read_bytes().count(b"\n") - 1 if path.exists() else 0

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    beside = start(whole, "new", 0.02)
    for mode, enough in (("new", 23), ("resume", 61)):
        process = start(killed, mode, 0.02)
        deadline = time.monotonic() + 60
        while rows(killed) < enough and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        done = rows(killed)
        assert enough <= done < 120
        last = list_checkpoints(killed / "checkpoints")[-1]
        assert 0 < read_checkpoint(last)["step"] <= done
    process = start(killed, "resume", 0.02)
    assert process.wait(60) == 0, process.stderr.read().decode()
    assert beside.wait(60) == 0, beside.stderr.read().decode()
    assert_same(weights(whole, 120), weights(killed, 120), ignore=("seconds",))
    assert (whole / "metrics.csv").read_bytes() == (killed / "metrics.csv").read_bytes()
    assert rows(killed) == 120


def test_resume_extends_a_finished_run(tmp_path):
    run_toy(tmp_path, steps=10)
    assert run_toy(tmp_path, steps=15, resume=True).step == 15
    results = (tmp_path / "results.json").read_text()
    again = run_toy(tmp_path, steps=15, resume=True)  # nothing left to do
    assert again.step == 15
    assert again.last["loss"] > 0
    assert (tmp_path / "results.json").read_text() == results


def test_resume_refuses_another_run(tmp_path):
    run_toy(tmp_path, steps=10)
    with pytest.raises(ValueError, match=r"of another run: learning_rate was 0\.01, is 0\.5"):
        run_toy(tmp_path, resume=True, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"seed was 0, is 3"):
        run_toy(tmp_path, resume=True, options={"seed": 3})


def test_resume_refuses_other_data(tmp_path, monkeypatch):
    run_toy(tmp_path, steps=10)
    original = Toy.train_data

    def other(self, data):
        samples = original(self, data)
        samples.fingerprint = "other"
        return samples

    monkeypatch.setattr(Toy, "train_data", other)
    with pytest.raises(ValueError, match=r"of another run: data_fingerprint was 'toy', is 'other'"):
        run_toy(tmp_path, resume=True)
    monkeypatch.setattr(Toy, "train_data", lambda self, data: original(self, DataSpec()))
    options = RunOptions(tmp_path, resume=True, accelerator="cpu")
    with pytest.raises(ValueError, match=r"of another run: data was 'procedural', is 'quickdraw'"):
        train("toy", ToyConfig(), DataSpec("quickdraw"), options)


def test_checkpoints_without_config_are_not_overwritten(tmp_path):
    run_toy(tmp_path, steps=3)
    (tmp_path / "config.json").unlink()
    before = sorted((tmp_path / "checkpoints").iterdir())
    with pytest.raises(ValueError, match=r"already holds a run: config\.json is gone"):
        run_toy(tmp_path, steps=3)
    assert sorted((tmp_path / "checkpoints").iterdir()) == before


def test_git_revision_is_of_this_repository(tmp_path, monkeypatch):
    """A package installed under a stranger's repository must not report that one's revision."""
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-c", "core.hooksPath=/dev/null"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    (tmp_path / "runs.py").write_text("")
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    assert runs.git_revision() is None
    subprocess.run([*git, "add", "runs.py"], cwd=tmp_path, check=True)
    assert runs.git_revision() is not None


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    run_toy(tmp_path, steps=3)
    with pytest.raises(ValueError, match="already holds a run"):
        run_toy(tmp_path, steps=3)
    with pytest.raises(ValueError, match="holds no run to resume"):
        run_toy(tmp_path / "typo", steps=3, resume=True)


def test_interrupt_saves_and_resumes(tmp_path, monkeypatch):
    original = Toy.loss

    def interrupting(self, batch, step):
        if step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, step)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_toy(whole)
    monkeypatch.setattr(Toy, "loss", interrupting)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(loop.TrainingInterruptedError, match=r"stopped at step 13"):
        run_toy(stopped)
    assert signal.getsignal(signal.SIGTERM) is handler
    monkeypatch.setattr(Toy, "loss", original)
    run_toy(stopped, resume=True)
    assert_same(weights(whole, 30), weights(stopped, 30), ignore=("seconds",))


# --- checkpoints ------------------------------------------------------------------------------------------


def state(step: int) -> dict:
    return {
        "format": 1,
        "step": step,
        "model": {"w": torch.arange(1000.0) + step},
        "rng": [[1, (2, 3)], None],
    }


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "not_ours"])
def test_a_damaged_newest_checkpoint_falls_back(tmp_path, damage):
    for step in (1, 2):
        save_checkpoint(state(step), tmp_path, keep=3)
    path = tmp_path / "step-000000002.pt"
    whole = bytearray(path.read_bytes())
    if damage == "flipped":
        where = whole.find((torch.arange(1000.0) + 2).numpy().tobytes())
        assert where > 0
        whole[where + 99] ^= 1
    elif damage == "truncated":
        del whole[len(whole) // 2 :]
    elif damage == "empty":
        whole.clear()
    path.write_bytes(bytes(whole))
    if damage == "not_ours":
        torch.save({"w": 1}, path)
    with pytest.warns(RuntimeWarning, match="step-000000002.pt"):
        found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0].name == "step-000000001.pt"
    assert_same(found[1], state(1))


def test_training_resumes_past_a_damaged_checkpoint(tmp_path):
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    run_toy(whole)
    run_toy(hurt, steps=25)
    newest = hurt / "checkpoints" / "step-000000025.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(RuntimeWarning, match="damaged"):
        run_toy(hurt, resume=True, options={"keep": 1})
    assert_same(weights(whole, 30), weights(hurt, 30), ignore=("seconds",))
    assert (whole / "metrics.csv").read_bytes() == (hurt / "metrics.csv").read_bytes()


def test_all_checkpoints_damaged_is_an_error(tmp_path):
    save_checkpoint(state(1), tmp_path, keep=3)
    (tmp_path / "step-000000001.pt").write_bytes(b"")
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="none of the 1 checkpoints"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_a_kill_while_saving_loses_nothing_older(tmp_path, monkeypatch):
    save_checkpoint(state(1), tmp_path, keep=1)

    def killed(*_):
        raise KeyboardInterrupt

    for call in ("os.replace", "os.fsync", "torch.save"):
        with monkeypatch.context() as patch:
            patch.setattr(call, killed)
            with pytest.raises(KeyboardInterrupt):
                save_checkpoint(state(2), tmp_path, keep=1)
        found = newest_checkpoint(tmp_path)
        assert found is not None
        assert found[1]["step"] == 1


def test_only_plain_values_are_checkpointed(tmp_path):
    with pytest.raises(TypeError, match=r"state\['extra'\]\[0\] must be a tensor or a plain value"):
        save_checkpoint({"step": 1, "extra": [object()]}, tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_metrics_file_drops_later_and_half_written_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,0.5\n2,0.25\n3,0.125\n4,0.0")
    metrics = MetricsFile(path, 2)
    metrics.write(3, {"loss": 0.1, "pixel": 2.0})  # a new column
    metrics.write(4, {"loss": 1e-30})
    metrics.close()
    assert path.read_text() == "step,loss,pixel\n1,0.5,\n2,0.25,\n3,0.1,2.0\n4,1e-30,\n"


# --- steps that are not finite ----------------------------------------------------------------------------


def test_non_finite_steps_are_skipped_and_counted(tmp_path):
    summary = run_toy(tmp_path, bad_from=10, bad_to=13)
    assert summary.skipped_steps == 3
    rows = curve(tmp_path)
    assert [float(r["skipped"]) for r in rows[8:15]] == [0, 0, 1, 2, 3, 3, 3]
    assert all(torch.isfinite(v).all() for v in weights(tmp_path, 30)["model"].values())
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) / 4


def test_a_skipped_step_changes_neither_weights_nor_batch_statistics(tmp_path, monkeypatch):
    """Here the input itself is NaN, so that batch normalisation's averages would be too."""
    original = Toy.loss

    def poisoned(self, batch, step):
        if step >= 10:
            batch = {**batch, "image": batch["image"] * float("nan")}
        return original(self, batch, step)

    monkeypatch.setattr(Toy, "loss", poisoned)
    run_toy(tmp_path, steps=14)
    assert_same(weights(tmp_path, 10)["model"], weights(tmp_path, 14)["model"])
    assert weights(tmp_path, 14)["skipped"] == 4


def test_a_run_of_non_finite_steps_stops_training(tmp_path):
    with pytest.raises(TrainingDivergedError, match=r"stopped at step 15: .* 5 steps in a row"):
        run_toy(tmp_path, bad_from=10, options={"max_skipped": 5})
    assert weights(tmp_path, 10)["skipped"] == 0
    assert json.loads((tmp_path / "results.json").read_text())["training"]["skipped_steps"] == 5


@pytest.mark.parametrize(("clip", "bound"), [("clip_value", "largest"), ("clip_norm", "norm")])
def test_gradients_are_clipped(tmp_path, monkeypatch, clip, bound):
    seen = []

    def record(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer.register_step_pre_hook(
            lambda *_: seen.append(torch.cat([p.grad.flatten() for p in self.parameters()]).clone())
        )
        return optimizer, None

    monkeypatch.setattr(Toy, "optimizer", record)
    run_toy(tmp_path, steps=3, **{clip: 0.01})
    measure = {"largest": lambda g: g.abs().max(), "norm": lambda g: g.norm()}[bound]
    assert all(float(measure(g)) == pytest.approx(0.01, rel=1e-3) for g in seen)
    assert len(seen) == 3


def test_bf16_trains(tmp_path):
    summary = run_toy(tmp_path, options={"precision": "bf16-mixed"})
    assert summary.last["loss"] < 0.1
    assert all(v.dtype != torch.bfloat16 for v in weights(tmp_path, 30)["model"].values())


def test_bf16_leaves_the_batch_as_it_is(tmp_path, monkeypatch):
    original, seen = Toy.loss, []

    def recording(self, batch, step):
        losses = original(self, batch, step)
        seen.append((batch["image"], self.body[:2](batch["image"]).dtype, losses["loss"].dtype))
        return losses

    monkeypatch.setattr(Toy, "loss", recording)
    run_toy(tmp_path, steps=1, options={"precision": "bf16-mixed"})
    [(image, inside, loss)] = seen
    assert image.dtype == torch.float32
    assert not torch.equal(image, image.bfloat16().float())
    assert inside == torch.bfloat16
    assert loss == torch.float32


# --- several passes a step --------------------------------------------------------------------------------


def test_a_step_of_two_descents_is_both_optimisers_in_turn(tmp_path, monkeypatch):
    """Against the same two losses descended along in plain torch."""
    config = ToyConfig(steps=3, noise=0.0, adam=False, second=0.02, batch_norm=False)
    torch.manual_seed(0)
    start = Toy(config)
    monkeypatch.setattr(Toy, "__init__", lambda self, config, make=Toy.__init__: (
        make(self, config), self.load_state_dict(start.state_dict()))[0])  # fmt: skip
    run_toy(tmp_path, **dataclasses.asdict(config))
    plain, data = Toy(config), ToyData(config)
    order = BatchOrder(50, 8, 0)
    for step in range(3):
        for which, rate in ((0, 1e-2), (1, 0.02)):
            plain.zero_grad()
            plain.loss(data.__getitems__(order.indices(step)), step, which)["loss"].backward()
            for p in plain.parameters():
                p.data -= rate * 0.99**step * p.grad
    for name, value in weights(tmp_path, 3)["model"].items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-5, atol=1e-7)
    assert list(curve(tmp_path)[0]) == [
        *("step", "loss", "error", "size", "grad_norm", "grad_norm_1", "learning_rate", "skipped")
    ]


def test_running_statistics_take_in_one_pass_a_step(tmp_path):
    run_toy(tmp_path, steps=7, second=1e-4)
    assert weights(tmp_path, 7)["model"]["body.2.num_batches_tracked"].item() == 7


@pytest.mark.parametrize("bad_pass", [0, 1])
def test_a_skipped_step_of_several_descents_is_undone_whole(tmp_path, bad_pass):
    run_toy(tmp_path, steps=14, second=1e-3, bad_from=10, bad_pass=bad_pass)
    before, after = weights(tmp_path, 10), weights(tmp_path, 14)
    assert after["skipped"] == 4
    assert_same(before["model"], after["model"])
    for a, b in zip(before["optimizer"], after["optimizer"], strict=True):
        assert_same(a["state"], b["state"])
    first = run_toy(tmp_path / "first", steps=2, second=1e-3, bad_from=0, bad_pass=bad_pass)
    assert first.skipped_steps == 2
    assert weights(tmp_path / "first", 2)["optimizer"][0]["state"] == {}


def test_resume_of_several_optimisers_is_bit_exact(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_toy(whole, second=1e-4)
    run_toy(parts, second=1e-4, steps=11)
    run_toy(parts, second=1e-4, resume=True)
    assert_same(weights(whole, 30), weights(parts, 30), ignore=("seconds",))


# --- a start made ready -----------------------------------------------------------------------------------


def test_a_start_is_made_once_and_kept(tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_toy(whole, start=True)
    assert "a new head" in capsys.readouterr().err
    assert runs.read_run(whole)["start"] == "a new head"
    run_toy(parts, start=True, steps=12)
    kept = runs.read_start(parts)
    assert torch.equal(kept["head"], runs.read_start(whole)["head"])
    monkeypatch.setattr(Toy, "before_training", lambda self: pytest.fail("made again"))
    run_toy(parts, start=True, resume=True)
    assert_same(weights(whole, 30), weights(parts, 30), ignore=("seconds",))
    flipped = bytearray((parts / "start.pt").read_bytes())
    flipped[flipped.index(kept["head"].numpy().tobytes())] ^= 1
    for damaged in (b"", bytes(flipped)):
        (parts / "start.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"start\.pt is damaged"):
            run_toy(parts, start=True, resume=True, steps=40)


def test_making_a_start_moves_no_random_numbers(tmp_path, monkeypatch):
    run_toy(tmp_path / "one", steps=10)
    monkeypatch.setattr(Toy, "start_from", lambda self, start: None)
    run_toy(tmp_path / "two", steps=10, start=True)
    assert_same(weights(tmp_path / "one", 10)["model"], weights(tmp_path / "two", 10)["model"])


# --- threads ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux, two cores"
)
def test_workers_of_the_pool_keep_off_one_core(tmp_path):
    """A run of its own, as the workers must not have been started before."""
    code = (
        "import os, sys; from pathlib import Path; import torch; from toy_method import ToyConfig\n"
        "from sketchfast.train import RunOptions, train; from sketchfast.methods.base import DataSpec\n"
        "cores, started = os.sched_getaffinity(0), set(os.listdir('/proc/self/task'))\n"
        "options = RunOptions(Path(sys.argv[1]), picture_every=0, accelerator='cpu')\n"
        "train('toy', ToyConfig(steps=2), DataSpec(), options)\n"
        "assert os.sched_getaffinity(0) == cores\n"
        "masks = [os.sched_getaffinity(int(t)) for t in set(os.listdir('/proc/self/task')) - started]\n"
        "assert cores - {min(cores)} in masks, masks"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment(OMP_NUM_THREADS="2"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- data order -------------------------------------------------------------------------------------------


def test_each_epoch_is_a_shuffle_of_its_own():
    order = BatchOrder(length=10, batch_size=3, seed=5)
    epochs = [[i for b in range(3) for i in order.indices(3 * e + b)] for e in range(4)]
    assert all(len(set(e)) == 9 for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    assert BatchOrder(10, 3, 5).indices(10) == order.indices(10)
    assert BatchOrder(10, 3, 6).indices(10) != order.indices(10)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"batch_size": 51}, {}, "batch_size must be at most the number of samples, 50, got 51"),
        ({"batch_size": 0}, {}, "batch_size must be at least 1, got 0"),
        ({"steps": 0}, {}, "steps must be at least 1, got 0"),
        ({}, {"log_every": 0}, "log_every must be at least 1, got 0"),
        ({}, {"precision": "16"}, "precision must be one of 32, bf16-mixed, got '16'"),
        ({}, {"accelerator": "tpu"}, "accelerator must be one of auto, cpu, cuda, got 'tpu'"),
    ],
)
def test_bad_settings_are_named(tmp_path, config, options, message):
    with pytest.raises(ValueError, match=message):
        run_toy(tmp_path / "run", options=options, **config)
    assert not (tmp_path / "run").exists()


def test_unknown_method_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"method must be one of .*sketchembednet.*, got 'nothing'"):
        train("nothing", ToyConfig(), DataSpec(), RunOptions(tmp_path))


def test_picture_grid_is_dark_ink_on_white():
    ink = torch.zeros(3, 28, 28)
    ink[:, 10:20, 10:20] = 1
    grid = picture_grid({"one": ink, "two": ink[:2]})
    assert grid.dtype == np.uint8
    assert grid.shape[2] == 3
    assert grid[25:130, 10:100].min() == 0
    assert grid[25:130, 10:100].max() == 255


# --- ranks ------------------------------------------------------------------------------------------------

RANKS = """
import sys, torch, warnings
from pathlib import Path
from toy_method import ToyConfig
from sketchfast.methods.base import DataSpec
from sketchfast.train import RunOptions, gather_rows, train
import torch.distributed as dist

out = Path(sys.argv[1])
config = ToyConfig(steps=12, noise=0.0, batch_norm=False, gather=True, clip_norm=0.5, adam=False)
options = RunOptions(out / "two", log_every=1, checkpoint_every=6, accelerator="cpu")
train("toy", config, DataSpec(), options)
rank = dist.get_rank()

torch.manual_seed(0)
whole = torch.randn(6, 3, dtype=torch.float64)
mine = whole[3 * rank : 3 * rank + 3].clone().requires_grad_()
rows = gather_rows(mine)
assert torch.equal(rows, whole)
(rows.prod(1).cumsum(0) * torch.arange(6)).sum().backward()
torch.save(mine.grad, out / f"grad{rank}.pt")

try:
    gather_rows(torch.zeros(2 + rank, 3))
    message = "nothing"
except ValueError as error:
    message = str(error)
(out / f"error{rank}.txt").write_text(message)

bad = ToyConfig(steps=8, noise=0.0, batch_norm=False)
import toy_method
def loss(self, batch, step, original=toy_method.Toy.loss):
    losses = original(self, batch, step)
    if step == 3 and rank == 1:  # one rank only: both must skip
        losses["loss"] = losses["loss"] * float("inf")
    return losses
toy_method.Toy.loss = loss
summary = train("toy", bad, DataSpec(), RunOptions(out / "skip", accelerator="cpu"))
(out / f"skipped{rank}.txt").write_text(str(summary.skipped_steps))
try:
    train("toy", ToyConfig(batch_size=7), DataSpec(), RunOptions(out / "odd", accelerator="cpu"))
except ValueError as error:
    (out / f"odd{rank}.txt").write_text(str(error))
dist.destroy_process_group()
"""


def test_two_ranks_are_one_rank_with_the_whole_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        f"--master-port={port}",
    ]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-4000:]

    config = ToyConfig(steps=12, noise=0.0, batch_norm=False, gather=True, clip_norm=0.5, adam=False)
    run_toy(tmp_path / "one", **dataclasses.asdict(config))
    one, two = weights(tmp_path / "one", 12), weights(tmp_path / "two", 12)
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-6)
    assert len(two["rng"]) == 2
    curves = [curve(tmp_path / run) for run in ("one", "two")]
    for a, b in zip(*curves, strict=True):
        for name in a:
            assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-4)

    torch.manual_seed(0)
    whole = torch.randn(6, 3, dtype=torch.float64).requires_grad_()
    (whole.prod(1).cumsum(0) * torch.arange(6)).sum().backward()
    for rank in (0, 1):
        # both ranks computed the loss, so the sum over ranks is twice the gradient; the average is it
        grad = torch.load(tmp_path / f"grad{rank}.pt")
        torch.testing.assert_close(grad / 2, whole.grad[3 * rank : 3 * rank + 3])
        assert (
            "rows must be equally many on every rank, got 2 to 3"
            in (tmp_path / f"error{rank}.txt").read_text()
        )
        assert (tmp_path / f"skipped{rank}.txt").read_text() == "1"
        assert (
            "batch_size must divide equally over the ranks, got 7 over 2"
            in (tmp_path / f"odd{rank}.txt").read_text()
        )

    with pytest.warns(RuntimeWarning, match="on 2 ranks and goes on on 1"):
        run_toy(tmp_path / "two", resume=True, **{**dataclasses.asdict(config), "steps": 14})
