"""Conv-VAE and Contrastive: losses, gradients, the loop, and what sets them apart from SketchEmbedNet."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sketchfast.cli import main
from sketchfast.data.dataset import StrokeDataset
from sketchfast.data.procedural import procedural
from sketchfast.methods import get_method
from sketchfast.methods import sketchembednet as module
from sketchfast.methods.base import DataSpec
from sketchfast.methods.sketchembednet import SketchEmbedNet, SketchEncoder, StrokeBatch, stroke5
from sketchfast.methods.sketchembednet_baselines import Contrastive, ConvVAE, PixelDecoder, SketchRNN
from sketchfast.methods.sketchembednet_protocols import fewshot
from sketchfast.runs import load_method, read_checkpoint
from sketchfast.train import RunOptions, train

ROOT = Path(__file__).parents[2]
NAMES = {"conv_vae": ConvVAE, "contrastive": Contrastive}
kinds = pytest.mark.parametrize("kind", NAMES.values(), ids=NAMES)


@pytest.fixture(scope="module")
def drawings() -> StrokeDataset:
    return procedural(classes=8, instances=6, styles=2)


@pytest.fixture(autouse=True)
def _small_procedural(monkeypatch, drawings) -> None:
    monkeypatch.setattr(module, "read_drawings", lambda data, per_class=None: drawings)


def make(kind: type[SketchEncoder], seed: int = 0, **fields) -> SketchEncoder:
    torch.manual_seed(seed)
    return kind(replace(kind.preset("tiny"), impl="reference", **fields))


def make_batch(method: SketchEncoder, count: int = 8) -> StrokeBatch:
    """Drawings of as many classes as there are."""
    data = method.train_data(DataSpec())
    return data.__getitems__(list(range(0, len(data), len(data) // count))[:count])


# --- config -----------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("preset", ["paper", "small", "tiny"])
def test_presets_train_as_sketchembednet_does(kind: type[SketchEncoder], preset: str) -> None:
    """Same data, batches, steps, rates and encoder: a comparison is of the losses alone."""
    own, reference = kind.preset(preset), SketchEmbedNet.preset(preset)
    shared = [name for name in vars(reference) if hasattr(own, name)]
    assert {"steps", "batch_size", "learning_rate", "lr_decay_steps", "max_length"} <= set(shared)
    assert {"encoder", "latent_size", "image_size", "simplify_tolerance"} <= set(shared)
    assert {name: getattr(own, name) for name in shared} == {n: getattr(reference, n) for n in shared}
    with pytest.raises(ValueError, match="preset must be one of paper, small, tiny, got 'large'"):
        kind.preset("large")


def test_get_method_finds_them() -> None:
    assert {name: get_method(name) for name in NAMES} == NAMES
    assert all(next(iter(kind.protocols)) == "fewshot" for kind in NAMES.values())


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (ConvVAE, {"kl_weight": -1.0}, "kl_weight must be at least 0, got -1.0"),
        (ConvVAE, {"image_channels": 2}, "image_channels must be 1 or 3, got 2"),
        (ConvVAE, {"encoder": "vgg"}, "encoder must be one of conv4, resnet12, got 'vgg'"),
        (Contrastive, {"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
        (Contrastive, {"sketch_hidden_size": 0}, "sketch_hidden_size must be at least 1, got 0"),
        (Contrastive, {"symmetric": "yes"}, "symmetric must be a bool, got 'yes'"),
    ],
)
def test_bad_fields_are_named(kind: type[SketchEncoder], fields: dict, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        make(kind, **fields)


# --- learning ---------------------------------------------------------------------------------------------


@kinds
def test_the_loss_falls(kind: type[SketchEncoder]) -> None:
    method = make(kind, learning_rate=5e-3, lr_decay_steps=1000)
    batch = make_batch(method)
    optimizer, _ = method.optimizer()
    values = []
    for step in range(25):
        loss = method.loss(batch, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.6 * values[0]
    assert int(method.steps_trained) == 25


@kinds
@pytest.mark.parametrize("encoder", ["conv4", "resnet12"])
def test_gradients_reach_every_parameter(kind: type[SketchEncoder], encoder: str) -> None:
    method = make(kind, encoder=encoder)
    method.loss(make_batch(method, 4), 0)["loss"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@kinds
def test_sizes_other_than_the_papers(kind: type[SketchEncoder]) -> None:
    method = make(kind, image_size=37, latent_size=6)
    losses = method.loss(make_batch(method), 0)
    assert torch.isfinite(losses["loss"])
    assert method.embed(torch.rand(2, 1, 50, 50)).shape == (2, 6)


# --- Conv-VAE ---------------------------------------------------------------------------------------------


def test_the_bound_is_that_of_kingma_and_welling(monkeypatch) -> None:
    method = make(ConvVAE, kl_weight=0.7)
    batch = make_batch(method)
    images = method.render(batch)
    seen = {}
    monkeypatch.setattr(method, "encode", lambda images: seen.setdefault("q", ConvVAE.encode(method, images)))
    run = method.decoder.forward
    monkeypatch.setattr(method.decoder, "forward", lambda z: seen.setdefault("logits", run(z)))
    losses = method.loss(batch, 0)
    mean, log_variance = seen["q"]
    q = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance))
    divergence = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    p = torch.sigmoid(seen["logits"])
    likelihood = (images * p.log() + (1 - images) * (1 - p).log()).sum((1, 2, 3)).mean()
    assert losses["loss"].item() == pytest.approx((0.7 * divergence - likelihood).item() / 784, rel=1e-4)
    assert losses["divergence"].item() == pytest.approx(divergence.item() / 784, rel=1e-4)


def test_the_code_is_sampled_in_training() -> None:
    method = make(ConvVAE)
    batch = make_batch(method)
    values = {method.loss(batch, 0)["reconstruction"].item() for _ in range(3)}
    assert len(values) == 3
    with torch.no_grad():
        method.to_latent.bias[method.config.latent_size :] = -60  # no variance, no noise
        method.to_latent.weight[method.config.latent_size :] = 0
    values = {method.loss(batch, 0)["reconstruction"].item() for _ in range(3)}
    assert len(values) == 1


@pytest.mark.parametrize("side", [16, 28, 37, 84])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_decoder_hits_the_size(side: int, channels: int) -> None:
    decoder = PixelDecoder(5, (4, 3, 2, 2), channels, side)
    assert decoder(torch.randn(2, 5)).shape == (2, channels, side, side)


def test_generate_is_the_decoders_mean() -> None:
    method = make(ConvVAE).eval()
    z = torch.randn(3, 256)
    pictures = method.generate(z, temperature=0.5, seed=1)
    assert pictures.shape == (3, 28, 28)
    torch.testing.assert_close(pictures, torch.sigmoid(method.decoder(z))[:, 0])
    assert torch.equal(pictures, method.generate(z))
    with pytest.raises(ValueError, match=r"z must have shape \[B, 256\], got \(3, 5\)"):
        method.generate(torch.zeros(3, 5))
    with pytest.raises(TypeError, match="z must be floating point"):
        method.generate(torch.zeros(3, 256, dtype=torch.int64))


# --- Contrastive ------------------------------------------------------------------------------------------


def test_a_contrastive_network_cannot_generate() -> None:
    with pytest.raises(NotImplementedError, match="Contrastive has no decoder: it cannot generate"):
        make(Contrastive).generate(torch.zeros(1, 256))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_loss_is_infonce(symmetric: bool) -> None:
    method = make(Contrastive, temperature=0.2, symmetric=symmetric).double()
    batch = make_batch(method, 5)
    batch = StrokeBatch(batch.points.double(), batch.pen_down, batch.lengths)
    images = method.encode(method.render(batch))[0]
    sketches = method.sketch_encoder(stroke5(batch, method.offset_scale), batch.lengths)
    total = 0.0
    for i in range(5):
        to_sketches = [F.cosine_similarity(images[i], sketches[k], dim=0).item() / 0.2 for k in range(5)]
        to_images = [F.cosine_similarity(images[k], sketches[i], dim=0).item() / 0.2 for k in range(5)]
        one = -to_sketches[i] + math.log(sum(map(math.exp, to_sketches)))
        other = -to_images[i] + math.log(sum(map(math.exp, to_images)))
        total += 0.5 * (one + other) if symmetric else one
    assert method.loss(batch, 0)["loss"].item() == pytest.approx(total / 5, rel=1e-5)


def test_padding_does_not_reach_the_sketch_embedding() -> None:
    """Equal to an unpadded bidirectional LSTM, drawing by drawing."""
    torch.manual_seed(0)
    encoder = SketchRNN(6, 4)
    y, lengths = torch.randn(3, 9, 5), torch.tensor([9, 1, 4])
    codes = encoder(y, lengths)
    for row, length in enumerate(lengths.tolist()):
        own = y[row : row + 1, :length]
        state = torch.cat((encoder.forwards(own)[1][0][0], encoder.backwards(own.flip(1))[1][0][0]), dim=1)
        torch.testing.assert_close(codes[row : row + 1], encoder.to_latent(state))
    padded = torch.cat((y, torch.full((3, 4, 5), 7.0)), dim=1)
    torch.testing.assert_close(encoder(padded, lengths), codes)


RANKS = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
import test_sketchembednet_baselines as tests
torch.nn.BatchNorm2d.forward = tests.fixed_statistics
tests.ranks_run(Path(sys.argv[1]) / "two")
"""


def fixed_statistics(self: torch.nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """Batch statistics are each rank's own: without them ranks can be compared."""
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def ranks_run(out: Path) -> None:
    module.read_drawings = lambda data, per_class=None: procedural(classes=8, instances=6, styles=2)
    config = replace(Contrastive.preset("tiny"), steps=4, impl="reference")
    options = RunOptions(out, log_every=1, accelerator="cpu", picture_every=0)
    train("contrastive", config, DataSpec(), options, preset="tiny")


def test_two_ranks_are_one_rank_with_the_whole_batch(tmp_path, monkeypatch) -> None:
    """The negatives are the global batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", f"--master-port={port}", "--nproc-per-node", "2"]
    words = [*launch, str(script), str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-4000:]
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", fixed_statistics)
    monkeypatch.setattr(module, "read_drawings", module.read_drawings)  # put back afterwards
    ranks_run(tmp_path / "one")
    one, two = (
        read_checkpoint(tmp_path / name / "checkpoints" / "step-000000004.pt") for name in ("one", "two")
    )
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-3, atol=2e-5, msg=name)
    assert one["last"]["loss"] == pytest.approx(two["last"]["loss"], rel=1e-4)


# --- in the loop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_whole_run_bit_for_bit(tmp_path, name: str) -> None:
    words = ["train", name, "--preset", "tiny", "--data", "procedural", "--accelerator", "cpu"]
    states = []
    for folder, stops in (("whole", (4,)), ("parts", (2, 4))):
        out = tmp_path / folder
        for stop in stops:
            more = ["--resume"] if stop != stops[0] else []
            assert main([*words, "--log-every", "1", "--out", str(out), "--steps", str(stop), *more]) == 0
        states.append(read_checkpoint(out / "checkpoints" / "step-000000004.pt"))
    for key, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][key]), key
    rows = [(tmp_path / folder / "metrics.csv").read_bytes() for folder in ("whole", "parts")]
    assert rows[0] == rows[1]
    assert list((tmp_path / "whole" / "pictures").glob("*.png"))
    method, step = load_method(tmp_path / "whole")
    assert (type(method), step) == (NAMES[name], 4)


@kinds
def test_pictures_leave_the_mode_and_the_weights_alone(kind: type[SketchEncoder]) -> None:
    method = make(kind)
    batch = make_batch(method, 6)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    pictures = method.pictures(batch, count=5)
    assert next(iter(pictures)) == "input"
    for images in pictures.values():
        assert images.shape == (5, 28, 28)
        assert images.min() >= 0
        assert images.max() <= 1
    torch.testing.assert_close(pictures["input"], method.render(batch)[:5, 0])
    assert method.training
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


@kinds
def test_embedding_is_the_mean(kind: type[SketchEncoder]) -> None:
    method = make(kind).eval()
    images = method.render(make_batch(method))
    assert torch.equal(method.embed(images), method.encode(images)[0])


@kinds
def test_fewshot_runs_on_them(kind: type[SketchEncoder]) -> None:
    method, untrained = make(kind, 0, held_out_classes=0.5), make(kind, 1, held_out_classes=0.5)
    method.train_data(DataSpec())
    (table,) = fewshot(method, untrained, DataSpec(), episodes=2, ways=(3,), shots=(1,))
    assert [float(row["3-way 1-shot"].split()[0]) > 0 for row in table.rows] == [True, True]
    assert "hidden_size" not in table.note.replace("sketch_hidden_size", "")
