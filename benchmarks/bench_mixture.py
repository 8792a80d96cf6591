"""The loss of a mixture density head against the formula a user would write, in eager PyTorch and compiled.

    pytest benchmarks/bench_mixture.py --benchmark-json mixture.json

Every time is of both losses from a head's output with their backward, a third of the positions padding, at
the sizes of SketchEmbedNet: the paper's run on QuickDraw and the preset `small`.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import SMOKE

from sketchfast.models.mixture import log_likelihood, output_size, parse_mixture
from sketchfast.ops.mixture import mixture_loss
from sketchfast.testing import available_impls, devices

SIZES = ((5 * 3, 4),) if SMOKE else ((64 * 256, 30), (40 * 64, 20))  # positions T * B, components
ALPHA = 0.1  # weight of the stroke loss is 1 - alpha
CASES = [(d, i) for d in devices() for i in available_impls(d) if i in ("native", "triton")]
CASES = [case for case in CASES if case != ("cpu", "triton")]  # the interpreter is no rival of anything


def head(positions: int, components: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, target): outputs about 0, which require gradients, and drawings."""
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(positions, output_size(components), generator=generator) * 0.5
    states = torch.randint(0, 3, (positions,), generator=generator)
    offsets = torch.randn(positions, 2, generator=generator) * (states < 2)[:, None]
    target = torch.cat((offsets, F.one_hot(states, 3)), 1)
    return output.to(device).requires_grad_(), target.to(device)


def eager(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    predicted = parse_mixture(output)
    pen = F.cross_entropy(predicted.pen_logits, target[:, 2:].argmax(-1))
    return pen, -(log_likelihood(predicted, target[:, :2]) * (1 - target[:, 4])).mean()


RIVALS = {"eager": lambda: eager, "torch.compile of it": lambda: torch.compile(eager)}


def floor_of(rates, device: str, positions: int, components: int) -> float:
    """The output read and its gradient written; exponentials and logarithms count as one operation each."""
    numbers = positions * output_size(components)
    return rates[device].floor(4 * 2 * numbers, 10 * numbers)


@pytest.mark.parametrize(("device", "impl"), CASES)
@pytest.mark.parametrize(("positions", "components"), SIZES)
@pytest.mark.parametrize("rival", RIVALS)
def test_mixture_loss(versus, rates, device, impl, positions, components, rival):
    output, target = head(positions, components, device)
    theirs = RIVALS[rival]()

    def step(loss):
        def run():
            output.grad = None
            pen, stroke = loss(output, target)
            (pen + (1 - ALPHA) * stroke).backward()

        return run

    def ours(x, y):
        return mixture_loss(x, y, impl=impl)

    torch.testing.assert_close(theirs(output, target), ours(output, target), rtol=1e-4, atol=1e-5)
    versus(
        step(theirs),
        step(ours),
        group=f"mixture loss {positions} positions, {components} components, fwd+bwd, {impl}",
        name=rival,
        device=device,
        rounds=15,
        floor=floor_of(rates, device, positions, components),
    )
