"Changes of `denoisers` that its chapter does not notice: defaults, thresholds, floors, the range of random times."

import pytest
import torch

from stable_diffusion_scratch.denoisers import (
    WEIGHTINGS,
    EDMDenoiser,
    bits_per_dim,
    bound_terms,
    grid_decoder,
    loss_weight,
    prediction_target,
    sample_times,
)
from stable_diffusion_scratch.forward import DiscreteVP, vp_linear

double = {"dtype": torch.float64}
SNR = torch.tensor([0.5, 3.0, 8.0], **double)


@pytest.mark.parametrize(
    "name, weights",
    [
        ("uniform", [1, 1, 1]),
        ("snr", [0.5, 3, 8]),
        ("truncated-snr", [1, 3, 8]),
        ("min-snr", [0.5, 3, 5]),
        ("p2", [0.5 / 1.5, 3 / 4, 8 / 9]),
        ("edm", [4.5, 7, 12]),
    ],
)
def test_weightings_at_their_published_constants(name, weights):
    assert WEIGHTINGS[name](SNR).tolist() == pytest.approx(weights)
    alpha, sigma = (SNR / (1 + SNR)).sqrt(), (1 / (1 + SNR)).sqrt()
    assert loss_weight("x0", name, alpha, sigma).tolist() == pytest.approx(weights)


def test_weights_stay_finite_at_both_ends():
    nothing, all_of_it = torch.tensor(0.0, **double), torch.tensor(1.0, **double)
    assert loss_weight("x0", "snr", all_of_it, nothing).item() == pytest.approx(1e12)
    assert loss_weight("eps", "uniform", nothing, all_of_it).item() == pytest.approx(1e12)


def test_an_entry_off_the_grid_is_refused_from_a_thousandth_on():
    decode, sigma = grid_decoder(torch.tensor([0.0, 1.0], **double)), torch.tensor(0.1, **double)
    x0 = torch.zeros(2, 3, **double)
    assert decode(x0 + 0.0005, x0, sigma).shape == (2,)
    with pytest.raises(ValueError, match="off the grid"):
        decode(x0 + 0.0015, x0, sigma)
    x0[1, 2] = 0.3  # one entry alone
    with pytest.raises(ValueError, match="off the grid"):
        decode(x0, x0, sigma)


def test_edm_assumes_data_of_half_a_unit():
    seen = []

    def net(x, t, context):
        seen.append(t)
        return torch.ones_like(x)

    x, sigma = torch.ones(2, 1, **double), torch.tensor(2.0, **double)
    total = 0.25 + 4.0
    answer = EDMDenoiser(net)(x, sigma)
    assert answer.flatten().tolist() == pytest.approx([0.25 / total + 1.0 / total**0.5] * 2)
    assert seen[0].item() == pytest.approx(torch.tensor(2.0).log().item() / 4)


def test_random_times_cover_the_process_and_no_more():
    generator = torch.Generator().manual_seed(0)
    table = sample_times(DiscreteVP(torch.full((4,), 0.1, **double)), 400, generator)
    assert set(table.tolist()) == {0.0, 1.0, 2.0, 3.0}
    anywhere = sample_times(vp_linear(), 4000, generator)
    assert 0 <= anywhere.min() < 0.01 and 0.99 < anywhere.max() <= 1 and abs(anywhere.mean() - 0.5) < 0.02


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow", "score"])
def test_targets_are_finite_where_no_signal_is_left(kind):
    x0, noise = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), **double)
    target = prediction_target(kind, x0, noise, torch.tensor(0.0, **double), torch.tensor(1.0, **double))
    wanted = {"eps": noise, "x0": x0, "v": -x0, "flow": noise - x0, "score": -noise}
    assert target.tolist() == pytest.approx(wanted[kind].tolist())


def test_bits_per_dim_of_one_picture():
    assert bits_per_dim(torch.tensor(8.0, **double), torch.zeros(1, 2, 2)).item() == pytest.approx(
        2 / 0.6931471805599453
    )


def test_the_terms_of_the_bound_by_hand():
    process, x0 = vp_linear(), torch.tensor([[0.5, -1.0], [2.0, 0.25]], **double)
    times = torch.tensor([0.1, 0.4, 0.45], **double)
    seen = []

    def denoise(x, sigma, context):
        seen.append((sigma.item(), context))
        return x0 + 1

    def decode(clean, x, sigma):
        seen.append((sigma.item(), None))
        return clean.sum(1)

    terms = bound_terms(denoise, process, x0, times, decode, "a digit", torch.Generator().manual_seed(0))
    levels = process.noise_level(times)
    assert seen == [(levels[1].item(), "a digit"), (levels[2].item(), "a digit"), (levels[0].item(), None)]
    alpha, sigma = process.alpha(times[2]), process.sigma(times[2])
    standard = torch.distributions.Normal(torch.zeros(2, 2, **double), 1.0)
    prior = torch.distributions.kl_divergence(torch.distributions.Normal(alpha * x0, sigma), standard).sum(1)
    snr = (process.alpha(times) / process.sigma(times)) ** 2
    steps = [(snr[k - 1] - snr[k]).expand(2) for k in (1, 2)]  # an error of 1 in each of two entries
    torch.testing.assert_close(terms, torch.stack([prior, *steps, -x0.sum(1)], 1))
