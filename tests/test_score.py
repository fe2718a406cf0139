"The Gaussian mixture against autograd, near and far; the reversal on Gaussian data, where its law can be computed."

import pytest
import torch
from torch.testing import assert_close

from stable_diffusion_scratch.forward import flow, vp_cosine, vp_linear
from stable_diffusion_scratch.score import GaussianMixture, langevin, reverse, score_at, swiss_roll

double = {"dtype": torch.float64}


def mixture():
    means = torch.tensor([[-1.0, 0.3, 2.0], [1.5, -0.5, 0.0], [0.0, 4.0, -1.0]], **double)
    return GaussianMixture([0.2, 0.5, 0.3], means, [0.1, 0.7, 0.0])


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("sigma", [0.01, 0.3, 1.0, 40.0])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_score_and_denoiser_agree_with_autograd(scale, sigma, per_sample):
    x = (scale * torch.randn(64, 3, generator=torch.Generator().manual_seed(0), **double)).requires_grad_()
    level = torch.full((64,), sigma, **double) if per_sample else torch.tensor(sigma, **double)
    slope = torch.autograd.grad(mixture().log_prob(x, level).sum(), x)[0]
    assert slope.isfinite().all()
    assert_close(mixture().score(x, level), slope, rtol=1e-9, atol=1e-9)
    assert_close(mixture().denoise(x, level), x + sigma**2 * slope, rtol=1e-9, atol=1e-9)


def test_log_prob_is_a_density_and_samples_follow_it():
    line = GaussianMixture([1.0, 3.0], torch.tensor([[-1.0], [2.0]], **double), [0.3, 0.5])
    grid = torch.linspace(-20, 24, 8001, **double)
    for sigma in (0.0, 0.5, 2.0):
        p = line.log_prob(grid[:, None], sigma).exp()
        assert torch.trapezoid(p, grid) == pytest.approx(1, abs=1e-9)
    x = line.sample(200_000, torch.Generator().manual_seed(0))
    assert x.mean().item() == pytest.approx(1.25, abs=0.02)
    assert (x < 0.5).double().mean().item() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("weights, stds", [([1.0, -1.0], 0.1), ([1.0, 1.0], -0.1)])
def test_impossible_mixtures_are_refused(weights, stds):
    with pytest.raises(ValueError, match="weights > 0 and stds >= 0"):
        GaussianMixture(weights, torch.zeros(2, 1), stds)


@pytest.mark.parametrize("process", [vp_linear(), vp_cosine(), flow()], ids=["vp", "cosine", "flow"])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_reverse_keeps_the_marginal_of_gaussian_data(process, eta):
    data = GaussianMixture(1.0, torch.tensor([[0.5]], **double), 0.4)
    times = torch.linspace(0.9, 0.1, 801, **double)
    x = process.alpha(0.9) * data.sample(20_000, torch.Generator().manual_seed(0))
    x = x + process.sigma(0.9) * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), **double)
    *_, x = reverse(score_at(data.score, process), x, process, times, eta, torch.Generator().manual_seed(2))
    a, s = process.alpha(0.1).item(), process.sigma(0.1).item()
    assert x.mean().item() == pytest.approx(0.5 * a, abs=0.02)
    assert x.var().item() == pytest.approx((0.4 * a) ** 2 + s**2, rel=0.06)


def test_langevin_stays_in_its_target():
    data = GaussianMixture(1.0, torch.zeros(1, 2, **double), 0.5)
    x = langevin(
        lambda x: data.score(x, 0.0),
        data.sample(20_000, torch.Generator().manual_seed(0)),
        0.005,
        300,
        torch.Generator().manual_seed(1),
    )
    assert x.var().item() == pytest.approx(0.25, rel=0.04)


def test_swiss_roll_is_seeded_and_in_order():
    roll = swiss_roll(100, torch.Generator().manual_seed(0))
    assert torch.equal(roll, swiss_roll(100, torch.Generator().manual_seed(0)))
    assert (roll.norm(dim=1).diff() >= 0).all()  # along the roll the radius grows
