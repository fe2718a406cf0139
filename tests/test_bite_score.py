"Changes of `score` that its chapter may not notice: defaults, counts, and small functions to the number."

import pytest
import torch
from torch.testing import assert_close

from stable_diffusion_scratch.forward import vp_linear
from stable_diffusion_scratch.score import (
    GaussianMixture,
    denoising_loss,
    divergence,
    implicit_loss,
    langevin,
    largest_gap,
    log_likelihood,
    reverse,
    score_at,
    sliced_wasserstein,
)

double = {"dtype": torch.float64}
DATA = GaussianMixture(1.0, torch.tensor([[0.5]], **double), 0.4)


def test_reverse_is_the_stochastic_one_unless_told_otherwise():
    process, times = vp_linear(), torch.tensor([0.9, 0.5, 0.1], **double)
    x = torch.ones(3, 1, **double)
    score = score_at(DATA.score, process)
    plain, stochastic = (
        list(reverse(score, x, process, times, *eta, generator=torch.Generator().manual_seed(0)))
        for eta in ((), (1.0,))
    )
    assert len(plain) == 2 and all(torch.equal(a, b) for a, b in zip(plain, stochastic, strict=True))


def test_langevin_takes_as_many_steps_as_it_is_told():
    calls = []
    langevin(lambda x: calls.append(x) or -x, torch.zeros(2, 1), 0.1, 3)
    assert len(calls) == 3


# --- small functions, to the number ----------------------------------------------------------------------------------

A = torch.tensor([[2.0, 1.0], [-3.0, 0.5]], **double)


def linear(x):
    return x @ A.T


def test_divergence_of_a_linear_field_is_its_trace():
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), **double)
    value, spread = divergence(linear, x)
    assert_close(value, linear(x)), assert_close(spread, torch.full((3,), 2.5, **double))
    assert divergence(linear, x[:1])[1].tolist() == pytest.approx([2.5])  # one sample is a batch, too
    probes = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], **double)[:, None].expand(3, 3, 2)
    by_hand = (2 * (A.sum()) + (A[0, 0] + A[1, 1] - A[0, 1] - A[1, 0])) / 3  # e . A e, averaged over the probes
    assert_close(divergence(linear, x, probes)[1], by_hand.expand(3))
    pictures = x.reshape(3, 1, 2).repeat(1, 2, 1)
    assert_close(divergence(lambda y: 3 * y, pictures)[1], torch.full((3,), 12.0, **double))


def test_losses_by_hand():
    x = torch.tensor([[1.0, -2.0], [0.5, 0.0]], **double)
    square = (linear(x) ** 2).sum(1)
    assert_close(implicit_loss(linear, x), square + 2 * 2.5)
    noise, sigma = torch.tensor([[0.3, 0.1], [-1.0, 2.0]], **double), torch.tensor([0.5, 2.0], **double)
    wrong = linear(x + sigma[:, None] * noise) + noise / sigma[:, None]
    assert_close(denoising_loss(linear, x, noise, sigma), (wrong**2).sum(1))
    assert_close(denoising_loss(linear, x, noise, 0.5)[:1], (wrong**2).sum(1)[:1])


def test_distances_by_hand():
    for points, gap in (([0.9, 0.2], 0.4), ([0.1, 0.2], 0.8), ([0.25, 0.75], 0.25), ([0.6], 0.6)):
        assert largest_gap(torch.tensor(points, **double), lambda y: y).item() == pytest.approx(gap)
    a, b = torch.tensor([[0.0, 0.0], [1.0, 0.0]], **double), torch.tensor([[3.0, 0.0], [0.0, 0.0]], **double)
    axes = torch.eye(2, **double)
    assert sliced_wasserstein(a, b, axes[:1]).item() == pytest.approx(2**0.5)
    assert sliced_wasserstein(a, b, axes).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="of one shape"):
        sliced_wasserstein(a, b[:1], axes)


@pytest.mark.parametrize("exact", [True, False])
def test_log_likelihood_of_normal_data_converges_with_order_four(exact):
    x = torch.tensor([[0.3], [-1.2]], **double)
    score = lambda y, sigma: -y / (0.25 + sigma**2)  # noqa: E731

    def at(y, sigma):
        v = 0.25 + sigma**2
        return -(y**2).sum(1) / (2 * v) - (2 * torch.pi * v).log() / 2

    probes = None if exact else torch.tensor([1.0, -1.0], **double).reshape(2, 1, 1).expand(2, 2, 1)
    errors = []
    for steps in (8, 16, 32):
        sigmas = torch.linspace(0.1, 3.0, steps + 1, **double)
        found = log_likelihood(score, x, sigmas, lambda y, end=sigmas[-1]: at(y, end), probes)
        errors.append((found - at(x, sigmas[0])).abs().max().item())
    assert errors[2] < 1e-4 and errors[0] > 10 * errors[1] > 100 * errors[2]
