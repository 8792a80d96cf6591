"""Training steps replayed from a CUDA graph: what the loop does around them on CPU, and graphs on a GPU.

On CPU stand-ins take the graph's place. Both fill the memory of the captured pass again at each replay; one
by calling the pass again, its step frozen as at the capture, the other by running the operators that tracing
recorded, so that no line of the method's Python runs, and a value read on the host is an error.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Hashable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from sketchfast import train as loop
from sketchfast.cuda_graph import CudaCapture, GraphedGradient, PassResult
from sketchfast.methods import get_method
from sketchfast.methods.base import DataSpec
from sketchfast.runs import read_checkpoint, read_run
from sketchfast.train import RunOptions, TrainSummary, train

sys.path.insert(0, str(Path(__file__).parent))
from test_train import assert_same
from toy_method import Toy, ToyConfig

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


class CallAgain:
    """Replays by calling the pass again."""

    #: one for each run of the loop
    made: list[CallAgain]

    def __init__(self, device: torch.device) -> None:
        self.keys_captured, self.replays = 0, 0
        self.made.append(self)

    @staticmethod
    def works_on(device: torch.device) -> bool:
        return True

    def record(self, run: Callable[[], PassResult]) -> tuple[PassResult, Callable[[], PassResult]]:
        return run(), run

    def __call__(self, run: Callable[[], PassResult]) -> tuple[PassResult, Callable[[], None]]:
        for _ in range(3):
            run()
        self.keys_captured += 1
        made, again = self.record(run)
        nan = float("nan")  # a capture computes nothing yet
        losses = {name: torch.full_like(value, nan) for name, value in made.losses.items()}
        gradients = [None if g is None else torch.full_like(g, nan) for g in made.gradients]

        def replay() -> None:
            self.replays += 1
            new = again()
            for name, value in new.losses.items():
                losses[name].copy_(value)
            for memory, value in zip(gradients, new.gradients, strict=True):
                assert (memory is None) is (value is None)
                if memory is not None:
                    memory.copy_(value)

        return PassResult(losses, gradients), replay


class Traced(CallAgain):
    """Replays the operators of the pass, as a graph replays its kernels."""

    def record(self, run: Callable[[], PassResult]) -> tuple[PassResult, Callable[[], PassResult]]:
        results: list[PassResult] = []

        def tensors() -> list[Tensor]:
            results[:] = [run()]
            [result] = results
            return [*result.losses.values(), *(g for g in result.gradients if g is not None)]

        graph = make_fx(tensors)()
        [first] = results
        names, there = list(first.losses), [g is not None for g in first.gradients]

        def again() -> PassResult:
            values = iter(graph())
            losses = {name: next(values).detach() for name in names}
            return PassResult(losses, [next(values) if is_there else None for is_there in there])

        shapes = again()  # of plain tensors
        return shapes, again


@pytest.fixture(params=[CallAgain, Traced])
def captures(request, monkeypatch) -> list[CallAgain]:
    """What the loop's runs capture with, on CPU."""
    monkeypatch.setattr(CallAgain, "made", [], raising=False)
    monkeypatch.setattr(loop, "CudaCapture", request.param)
    return CallAgain.made


class Graphed(Toy):
    """The toy, with a schedule, a branch on the host and a buffer that follows the step."""

    #: where the branch changes
    changes_at = 17

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.register_buffer("steps_trained", torch.zeros((), dtype=torch.int64))

    def schedule(self, step: int) -> dict[str, float]:
        return {"weight": 1 + step / 8, "steps": step + 1}

    def graph_key(self, step: int) -> Hashable:
        return step < self.changes_at

    def loss(self, batch: dict[str, Tensor], step: int, which: int = 0) -> dict[str, Tensor]:
        losses = super().loss(batch, step, which)
        scheduled = self.scheduled(step)
        losses["loss"] = losses["loss"] * scheduled["weight"]
        if self.graph_key(step):
            losses["early"] = losses["loss"] * 2
        losses["weight"] = scheduled["weight"]
        self.steps_trained.copy_(scheduled["steps"])
        return losses


@pytest.fixture
def graphed_toy(monkeypatch) -> type[Graphed]:
    monkeypatch.setattr(loop, "get_method", lambda name: Graphed)
    return Graphed


def run(out: Path, graph: str = "auto", *, resume: bool = False, accelerator="cpu", **config) -> TrainSummary:
    options = RunOptions(
        out,
        checkpoint_every=10,
        log_every=1,
        picture_every=4,
        accelerator=accelerator,
        cuda_graph=graph,
        resume=resume,
    )
    return train("toy", ToyConfig(**config), DataSpec(), options)


def weights(out: Path, step: int = 30) -> dict:
    return read_checkpoint(out / "checkpoints" / f"step-{step:09d}.pt")


def assert_same_run(a: Path, b: Path, step: int = 30) -> None:
    assert_same(weights(a, step), weights(b, step), ignore=("seconds",))
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()


# --- in the loop, with stand-ins --------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"second": 1e-3}, {"clip_value": 0.01, "adam": False}], ids=str)
def test_replays_train_as_eager_steps_do(tmp_path, captures, graphed_toy, config):
    """Two graphs, one on either side of the branch; a second pass of a step has graphs of its own."""
    run(tmp_path / "eager", "off", **config)
    assert not captures
    run(tmp_path / "graph", "on", **config)
    assert_same_run(tmp_path / "eager", tmp_path / "graph")
    [capture] = captures
    passes = 1 + ("second" in config)
    assert capture.keys_captured == 2 * passes
    assert capture.replays == 30 * passes
    assert weights(tmp_path / "graph")["model"]["steps_trained"].item() == 30
    assert read_run(tmp_path / "graph")["cuda_graph"] is True
    assert read_run(tmp_path / "eager")["cuda_graph"] is False


def test_resumed_replays_continue_bit_for_bit(tmp_path, captures, graphed_toy):
    run(tmp_path / "whole")
    run(tmp_path / "parts", steps=13)
    torch.rand(5)
    run(tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert [capture.replays for capture in captures] == [30, 13, 17]


def test_a_run_goes_on_without_its_graph(tmp_path, captures, graphed_toy):
    run(tmp_path / "whole")
    run(tmp_path / "parts", steps=13)
    run(tmp_path / "parts", "off", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_bf16_replays_train_as_eager_steps_do(tmp_path, captures, graphed_toy):
    for graph in ("off", "on"):
        options = RunOptions(
            tmp_path / graph, log_every=1, accelerator="cpu", precision="bf16-mixed", cuda_graph=graph
        )
        train("toy", ToyConfig(), DataSpec(), options)
    assert_same_run(tmp_path / "off", tmp_path / "on")


def test_a_non_finite_batch_leaves_everything_as_it_was(tmp_path, captures, graphed_toy, monkeypatch):
    fetch = loop._RankBatches.__getitem__

    def poisoned(self, step):
        batch = fetch(self, step)
        bad = step in (0, 5, 6)
        return {name: value * float("nan") for name, value in batch.items()} if bad else batch

    monkeypatch.setattr(loop._RankBatches, "__getitem__", poisoned)
    assert run(tmp_path / "eager", "off").skipped_steps == 3
    assert run(tmp_path / "graph", "on").skipped_steps == 3
    assert_same_run(tmp_path / "eager", tmp_path / "graph")
    assert captures[0].replays == 30
    run(tmp_path / "five", "on", steps=5)
    run(tmp_path / "seven", "on", steps=7)
    five, seven = weights(tmp_path / "five", 5), weights(tmp_path / "seven", 7)
    assert_same(five["model"], seven["model"])
    assert_same(five["optimizer"]["state"], seven["optimizer"]["state"])


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize(
    ("name", "changes", "keys"),
    [
        # without and with the pixel loss
        ("sketchembednet", {"alpha_interval": 2, "alpha_step": 0.1, "recurrent_dropout": 0.1}, 2),
        ("conv_vae", {}, 1),
        ("contrastive", {}, 1),
    ],
)
def test_methods_replay_as_their_eager_steps(tmp_path, captures, name, changes, keys, precision):
    # the native HyperLSTM's products write into given memory, which tracing cannot record
    impl = "reference" if loop.CudaCapture is Traced else "auto"
    config = dataclasses.replace(get_method(name).preset("tiny"), steps=6, max_length=8, impl=impl, **changes)
    for graph in ("off", "on"):
        options = RunOptions(
            tmp_path / graph,
            log_every=1,
            picture_every=0,
            accelerator="cpu",
            precision=precision,
            cuda_graph=graph,
        )
        train(name, config, DataSpec(), options)
    assert_same_run(tmp_path / "off", tmp_path / "on", 6)
    [capture] = captures
    assert capture.keys_captured == keys
    assert capture.replays == 6
    assert weights(tmp_path / "on", 6)["model"]["steps_trained"].item() == 6


# --- one pass, with stand-ins -----------------------------------------------------------------------------


def graphed_gradient(method: Toy, batches: list | None = None) -> GraphedGradient:
    """`batches` collects what the method's loss is given."""

    def gradient(batch, step, **options):
        if batches is not None:
            batches.append(batch)
        method.zero_grad(set_to_none=True)
        losses = method.loss(batch, step, **options)
        losses["loss"].backward()
        return {name: value.detach() for name, value in losses.items()}

    return GraphedGradient(method, gradient, CallAgain(torch.device("cpu")))


@pytest.fixture
def no_runs(monkeypatch):
    monkeypatch.setattr(CallAgain, "made", [], raising=False)


@pytest.mark.usefixtures("no_runs")
def test_batches_are_copied_into_the_captured_ones_memory():
    method, seen = Graphed(ToyConfig(noise=0.0)), []
    graphed = graphed_gradient(method, seen)
    first, second = (method.train_data(DataSpec()).__getitems__(list(range(i, i + 8))) for i in (0, 8))
    kept = {name: value.clone() for name, value in first.items()}
    a = graphed(first, 0)["loss"]
    memory = [parameter.grad for parameter in method.parameters()]
    b = graphed(second, 1)["loss"]
    assert a != b
    assert all(p.grad is m for p, m in zip(method.parameters(), memory, strict=True))
    assert len({batch["image"].data_ptr() for batch in seen}) == 1
    assert_same(first, kept)  # a batch belongs to the loader
    assert seen[0]["image"].data_ptr() not in (first["image"].data_ptr(), second["image"].data_ptr())
    assert torch.equal(seen[-1]["image"], second["image"])


@pytest.mark.usefixtures("no_runs")
def test_warm_up_and_capture_move_neither_buffers_nor_generators():
    torch.manual_seed(3)
    method = Graphed(ToyConfig())
    batch = method.train_data(DataSpec()).__getitems__(list(range(8)))
    graphed_gradient(method)(batch, 0)
    assert method.steps_trained.item() == 1
    assert method.body[2].num_batches_tracked.item() == 1
    after = torch.rand(())
    torch.manual_seed(3)
    method = Graphed(ToyConfig())
    batch = method.train_data(DataSpec()).__getitems__(list(range(8)))
    method.loss(batch, 0)
    assert torch.rand(()) == after


@pytest.mark.usefixtures("no_runs")
def test_a_batch_of_another_shape_runs_eagerly():
    method = Graphed(ToyConfig(noise=0.0, batch_norm=False))
    graphed = graphed_gradient(method)
    data = method.train_data(DataSpec())
    whole, part = data.__getitems__(list(range(8))), data.__getitems__(list(range(5)))
    first = graphed(whole, 0)
    gradient = method.head.weight.grad.clone()
    assert graphed(part, 1)["loss"] == method.loss(part, 1)["loss"]
    assert graphed.capture.replays == graphed.captured == 1
    assert graphed(whole, 0) == first
    assert torch.equal(method.head.weight.grad, gradient)


@pytest.mark.usefixtures("no_runs")
def test_a_step_of_no_key_runs_eagerly():
    method = Graphed(ToyConfig())
    method.graph_key = lambda step: None if step < 2 else "late"
    graphed = graphed_gradient(method)
    batch = method.train_data(DataSpec()).__getitems__(list(range(8)))
    for step in range(4):
        graphed(batch, step)
    assert graphed.capture.replays == 2


@pytest.mark.usefixtures("no_runs")
def test_a_failed_capture_says_how_to_train_without(monkeypatch):
    method = Graphed(ToyConfig())
    graphed = graphed_gradient(method)
    before = [buffer.clone() for buffer in method.buffers()]

    def fail(run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed.capture = fail
    batch = method.train_data(DataSpec()).__getitems__(list(range(8)))
    with pytest.raises(RuntimeError, match=r"of Graphed cannot be captured .* stream is capturing; .*off"):
        graphed(batch, 0)
    assert_same(list(method.buffers()), before)
    assert method.held_schedule is None


def test_tracing_refuses_a_value_read_on_the_host(tmp_path, monkeypatch, graphed_toy):
    """The stand-in sees what a real capture would not allow."""
    monkeypatch.setattr(CallAgain, "made", [], raising=False)
    monkeypatch.setattr(loop, "CudaCapture", Traced)
    original = Graphed.loss

    def reading(self, batch, step):
        losses = original(self, batch, step)
        return {**losses, "read": losses["error"] * losses["loss"].item()}

    monkeypatch.setattr(Graphed, "loss", reading)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        run(tmp_path, "on")


# --- the option -------------------------------------------------------------------------------------------


def test_what_cannot_be_captured_is_refused_with_the_reason(tmp_path, monkeypatch, graphed_toy):
    with pytest.raises(
        ValueError, match=r"cuda_graph must be auto or off where training is on cpu, got 'on'"
    ):
        run(tmp_path / "cpu", "on")
    assert not (tmp_path / "cpu").exists()
    monkeypatch.setattr(loop, "CudaCapture", CallAgain)
    monkeypatch.setattr(Graphed, "graph_key", Toy.graph_key)
    with pytest.raises(ValueError, match=r"where a step of toy with these settings cannot be captured"):
        run(tmp_path / "method", "on")
    with pytest.raises(ValueError, match=r"cuda_graph must be one of auto, on, off, got 'yes'"):
        run(tmp_path, "yes")


def test_auto_is_off_where_there_is_no_graph(tmp_path, graphed_toy):
    run(tmp_path, "auto", steps=2)
    assert read_run(tmp_path)["cuda_graph"] is False


def test_next_batch_is_on_its_way_before_the_loop_waits():
    fetched: list[int] = []
    batches = loop._DeviceBatches(
        (fetched.append(i) or torch.tensor(i) for i in range(3)), lambda batch: batch, torch.device("cpu")
    )
    seen = []
    for batch in batches:
        seen.append(batch.item())
        batches.prefetch()
        batches.prefetch()
        assert fetched == list(range(min(len(seen) + 1, 3)))
    assert seen == [0, 1, 2]


# --- on a GPU ---------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("config", [{}, {"second": 1e-3}, {"clip_norm": 0.5}], ids=str)
def test_graphs_train_as_eager_steps_do(tmp_path, graphed_toy, config):
    for graph in ("off", "on"):
        run(tmp_path / graph, graph, accelerator="cuda", **config)
    assert read_run(tmp_path / "on")["cuda_graph"] is True
    eager, graph = (weights(tmp_path / name) for name in ("off", "on"))
    for name, value in eager["model"].items():
        torch.testing.assert_close(graph["model"][name], value, rtol=1e-5, atol=1e-6)
    assert_same(eager["rng"], graph["rng"])  # the generator moved on by as much


@needs_gpu
def test_resumed_graphs_continue_bit_for_bit(tmp_path, graphed_toy):
    run(tmp_path / "whole", "on", accelerator="cuda")
    run(tmp_path / "parts", "on", accelerator="cuda", steps=13)
    run(tmp_path / "parts", "on", accelerator="cuda", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@needs_gpu
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", ["sketchembednet", "conv_vae", "contrastive"])
def test_methods_graphs_train_as_their_eager_steps(tmp_path, name, impl, precision):
    config = dataclasses.replace(get_method(name).preset("tiny"), steps=12, impl=impl)
    if name == "sketchembednet":
        config = dataclasses.replace(config, alpha_interval=3, alpha_step=0.1, recurrent_dropout=0.1)
    summaries = {}
    for graph in ("off", "on"):
        options = RunOptions(
            tmp_path / graph,
            log_every=1,
            picture_every=4,
            accelerator="cuda",
            precision=precision,
            cuda_graph=graph,
        )
        summaries[graph] = train(name, config, DataSpec(), options)
    assert read_run(tmp_path / "on")["cuda_graph"] is True
    tolerance = 1e-4 if precision == "32" else 2e-2
    eager, graph = (weights(tmp_path / name, 12) for name in ("off", "on"))
    for name, value in eager["model"].items():
        torch.testing.assert_close(graph["model"][name], value, rtol=tolerance, atol=tolerance)
    assert summaries["on"].last["loss"] == pytest.approx(summaries["off"].last["loss"], rel=tolerance)
    assert_same(eager["rng"], graph["rng"])


@needs_gpu
def test_a_host_read_in_the_captured_pass_is_an_error_that_names_the_way_out():
    device = torch.device("cuda")
    method = Graphed(ToyConfig()).to(device)
    method.loss = lambda batch, step: {"loss": method.head.weight.sum() * method.head.bias.sum().item()}
    graphed = graphed_gradient(method)
    graphed.capture = CudaCapture(device)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        graphed({"image": torch.zeros(8, 1, 8, 8, device=device)}, 0)
