"""The mixture density head against torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as D

from sketchfast.models import mixture


def make(*shape: int, components: int = 4, scale: float = 1.0) -> tuple[torch.Tensor, mixture.Mixture]:
    torch.manual_seed(0)
    output = torch.randn(*shape, mixture.output_size(components), dtype=torch.float64) * scale
    return output, mixture.parse_mixture(output)


def as_distribution(m: mixture.Mixture) -> D.Distribution:
    sx, sy = torch.exp(m.log_sigma_x), torch.exp(m.log_sigma_y)
    cross = m.correlation * sx * sy
    covariance = torch.stack((torch.stack((sx**2, cross), -1), torch.stack((cross, sy**2), -1)), -2)
    means = torch.stack((m.mean_x, m.mean_y), -1)
    return D.MixtureSameFamily(D.Categorical(logits=m.log_weights), D.MultivariateNormal(means, covariance))


def test_parse_takes_pens_first_then_each_parameter_of_all_components() -> None:
    output = torch.arange(3 + 6 * 2, dtype=torch.float64) / 10
    m = mixture.parse_mixture(output)
    torch.testing.assert_close(m.pen_logits, output[:3])
    torch.testing.assert_close(m.log_weights, torch.log_softmax(output[3:5], -1))
    torch.testing.assert_close(m.mean_x, output[5:7])
    torch.testing.assert_close(m.mean_y, output[7:9])
    torch.testing.assert_close(m.log_sigma_x, output[9:11])
    torch.testing.assert_close(m.log_sigma_y, output[11:13])
    torch.testing.assert_close(m.correlation, torch.tanh(output[13:]))


@pytest.mark.parametrize("features", [3, 8, 10])
def test_parse_refuses_other_widths(features: int) -> None:
    with pytest.raises(ValueError, match="output must have 3 \\+ 6 M features"):
        mixture.parse_mixture(torch.zeros(2, features))


def test_log_likelihood_is_that_of_torch_distributions() -> None:
    _, m = make(5, 3)
    offsets = torch.randn(5, 3, 2, dtype=torch.float64) * 2
    torch.testing.assert_close(mixture.log_likelihood(m, offsets), as_distribution(m).log_prob(offsets))


def test_log_likelihood_gradient() -> None:
    output, _ = make(3)
    offsets = torch.randn(3, 2, dtype=torch.float64)
    run = lambda o, x: mixture.log_likelihood(mixture.parse_mixture(o), x)  # noqa: E731
    assert torch.autograd.gradcheck(run, (output.requires_grad_(), offsets.requires_grad_()))


@pytest.mark.parametrize("offset", [0.0, 1e-3, 50.0, 1e4])
def test_extreme_outputs_stay_finite_in_float32(offset: float) -> None:
    for scale in (0.0, 1.0, 30.0, 1e4):
        output = (make(64, scale=scale)[0].float()).requires_grad_()
        value = mixture.log_likelihood(mixture.parse_mixture(output), torch.full((64, 2), offset))
        value.sum().backward()
        assert torch.isfinite(value).all()
        assert torch.isfinite(output.grad).all()


def test_likeliest_component_and_its_samples() -> None:
    _, m = make(1, components=3)
    best = mixture.likeliest(m)
    index = m.log_weights[0].argmax()
    assert best.mean_x[0] == m.mean_x[0, index]
    assert best.correlation[0] == m.correlation[0, index]
    torch.manual_seed(1)
    noise = torch.randn(200_000, 1, 2, dtype=torch.float64)
    drawn = mixture.sample_gaussian(mixture.Gaussian(*(part.expand(200_000, 1) for part in best)), noise)[
        :, 0
    ]
    sx, sy = torch.exp(best.log_sigma_x[0]), torch.exp(best.log_sigma_y[0])
    cross = best.correlation[0] * sx * sy
    want = torch.stack((torch.stack((sx**2, cross)), torch.stack((cross, sy**2))))
    torch.testing.assert_close(
        drawn.mean(0), torch.stack((best.mean_x[0], best.mean_y[0])), atol=0.03, rtol=0
    )
    torch.testing.assert_close(torch.cov(drawn.T), want, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_likeliest_of_an_output_is_that_of_its_mixture(dtype: torch.dtype) -> None:
    output = (make(5, 3, scale=6.0)[0]).to(dtype).requires_grad_()
    got, want = mixture.likeliest_of(output), mixture.likeliest(mixture.parse_mixture(output))
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)
    grads = [torch.autograd.grad(sum(x.sin().sum() for x in parts), output)[0] for parts in (got, want)]
    torch.testing.assert_close(*grads)


def test_samples_carry_gradients_to_the_component() -> None:
    values = [torch.randn(3, dtype=torch.float64) * 0.3 for _ in range(5)]
    noise = torch.randn(3, 2, dtype=torch.float64)
    run = lambda *parts: mixture.sample_gaussian(mixture.Gaussian(*parts), noise)  # noqa: E731
    assert torch.autograd.gradcheck(run, [v.requires_grad_() for v in values])


def test_temperature_zero_takes_the_likeliest() -> None:
    _, m = make(6)
    offsets, pens = mixture.sample(m, 0.0)
    best = mixture.likeliest(m)
    assert torch.equal(offsets, torch.stack((best.mean_x, best.mean_y), -1))
    assert torch.equal(pens, m.pen_logits.argmax(-1))


def test_temperature_scales_variances_and_pens() -> None:
    output = torch.zeros(100_000, mixture.output_size(1))
    output[:, 0] = math.log(4.0)  # pens 4/6, 1/6, 1/6 at temperature 1; 16/18, 1/18, 1/18 at 1/2
    m = mixture.parse_mixture(output)
    for temperature, share in ((1.0, 4 / 6), (0.5, 16 / 18)):
        generator = torch.Generator().manual_seed(0)
        offsets, pens = mixture.sample(m, temperature, generator)
        assert offsets.var().item() == pytest.approx(temperature, rel=0.02)
        assert (pens == 0).float().mean().item() == pytest.approx(share, abs=0.01)
        again, _ = mixture.sample(m, temperature, torch.Generator().manual_seed(0))
        assert torch.equal(again, offsets)


@pytest.mark.parametrize("temperature", [-1.0, math.nan])
def test_temperature_is_checked(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        mixture.sample(make(2)[1], temperature)
