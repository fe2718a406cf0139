"""Parametrisations as one algebra, the likelihood bound, weightings, the ideal denoiser, the wrappers around a perfect
network of every kind, and the digits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from stable_diffusion_scratch import denoisers
from stable_diffusion_scratch.denoisers import (
    KINDS,
    WEIGHTINGS,
    bits_per_dim,
    bound_terms,
    convert,
    edm_factors,
    edm_weight,
    grid_decoder,
    ideal_denoiser,
    loss_weight,
    min_snr,
    p2,
    posterior,
    prediction_target,
    sample_times,
    simple_loss,
    to_noise,
    to_x0,
    x0_weight,
)
from stable_diffusion_scratch.forward import (
    DiscreteVP,
    flow,
    linear_betas,
    per_sample,
    scaled_linear_betas,
    vp_cosine,
    vp_linear,
)
from stable_diffusion_scratch.score import GaussianMixture

double = {"dtype": torch.float64}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=20)
@given(alpha=st.floats(0.01, 1.0), sigma=st.floats(0.01, 1.0))
def test_predictions_are_undone(kind, alpha, sigma):
    alpha, sigma = torch.tensor(alpha, **double), torch.tensor(sigma, **double)
    x0, noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), **double)
    x_t = alpha * x0 + sigma * noise
    said = prediction_target(kind, x0, noise, alpha, sigma)
    assert_close(to_x0(kind, said, x_t, alpha, sigma), x0, rtol=0, atol=1e-8)
    assert_close(to_noise(kind, said, x_t, alpha, sigma), noise, rtol=0, atol=1e-8)


@pytest.mark.daily
@pytest.mark.parametrize("kind, theirs", [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_x0_is_that_of_diffusers(kind, theirs):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="linear", prediction_type=theirs, clip_sample=False)
    scheduler.set_timesteps(10)
    x_t, said = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    process = DiscreteVP(linear_betas())
    ours = to_x0(kind, said, x_t, process.alpha(500).float(), process.sigma(500).float())
    assert_close(ours, scheduler.step(said, 500, x_t).pred_original_sample, rtol=1e-4, atol=1e-4)


DOORS = {
    "eps": denoisers.EpsDenoiser,
    "x0": denoisers.X0Denoiser,
    "v": denoisers.VDenoiser,
    "flow": denoisers.FlowDenoiser,
}
DATA = GaussianMixture([0.3, 0.7], torch.tensor([[-1.0, 0.0], [1.0, 0.5]], **double), [0.3, 0.2])


def perfect(kind, process):
    def net(x_t, t, context=None):
        alpha, sigma = per_sample(process.alpha(t), x_t), per_sample(process.sigma(t), x_t)
        x0 = DATA.denoise(process.to_ve(x_t, t), process.noise_level(t))
        return prediction_target(kind, x0, (x_t - alpha * x0) / sigma, alpha, sigma)

    return net


@pytest.mark.parametrize("kind", DOORS)
@pytest.mark.parametrize(
    "process", [vp_linear(), vp_cosine(), flow(), DiscreteVP(linear_betas())], ids=["vp", "cosine", "flow", "table"]
)
@pytest.mark.parametrize("shape", [(), (8,)])
def test_behind_every_door_is_the_same_denoiser(kind, process, shape):
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), **double)
    sigma = torch.rand(shape, generator=torch.Generator().manual_seed(1), **double) * 3 + 0.1
    answer = DOORS[kind](perfect(kind, process), process)(x, sigma)
    assert_close(answer, DATA.denoise(x, sigma), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_dtype_shape_and_context_pass_through(dtype, shape):
    seen = []

    def net(x_t, t, context):
        seen.append((x_t.dtype, t.dtype, t.shape, context))
        return torch.zeros_like(x_t)

    x = torch.randn(2, 3, 4, 4, dtype=dtype)
    sigma = torch.full(shape, 0.7, **double)
    for door in (*DOORS.values(), denoisers.EDMDenoiser):
        out = door(net, vp_linear())(x, sigma, context="red cube")
        assert out.shape == x.shape and out.dtype == dtype
    assert all(s == (dtype, dtype, torch.Size(shape), "red cube") for s in seen)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'epsilon' is not one of eps, x0"):
        denoisers.Denoiser(None, vp_linear(), "epsilon")


def test_the_loss_is_lowest_at_the_perfect_network():
    process, x0, t = (
        vp_linear(),
        DATA.sample(20_000, torch.Generator().manual_seed(0)),
        torch.full((20_000,), 0.3, **double),
    )
    for kind in DOORS:
        net = perfect(kind, process)
        losses = [
            simple_loss(
                lambda x, t, c, k=k, net=net: k * net(x, t),
                process,
                x0,
                kind=kind,
                t=t,
                generator=torch.Generator().manual_seed(1),
            ).mean()
            for k in (0.9, 1.0, 1.1)
        ]
        assert losses[1] < min(losses[0], losses[2])


@pytest.mark.parametrize("process", [vp_linear(), vp_cosine(), flow()], ids=["vp", "cosine", "flow"])
@settings(deadline=None, max_examples=20)
@given(s=st.floats(0.02, 0.9), step=st.floats(0.01, 0.09))
def test_the_posterior_composes_with_the_forward_process(process, s, step):
    "x_s drawn from q(x_s | x_t, x0), with x_t from q(x_t | x0), has the law q(x_s | x0)."
    t, zero, one = s + step, torch.zeros(1, **double), torch.ones(1, **double)
    (of_x_t, var), (of_x0, _) = posterior(process, one, zero, t, s), posterior(process, zero, one, t, s)
    assert_close(of_x_t * process.alpha(t) + of_x0, process.alpha(s).expand(1), rtol=1e-9, atol=1e-12)
    assert_close(of_x_t**2 * process.sigma(t) ** 2 + var, (process.sigma(s) ** 2).expand(1), rtol=1e-9, atol=1e-12)
    # and x_t keeps its correlation with x_s: one step forward again gives Cov = alpha_t|s sigma_s^2
    along = of_x_t * process.sigma(t) ** 2
    assert_close(along, (process.alpha(t) / process.alpha(s) * process.sigma(s) ** 2).expand(1), rtol=1e-9, atol=1e-12)


def test_posterior_takes_a_time_per_sample():
    x_t, x0 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), **double)
    t, s = torch.tensor([0.2, 0.5, 0.9], **double), torch.tensor([0.1, 0.4, 0.3], **double)
    mean, var = posterior(vp_linear(), x_t, x0, t, s)
    for i in range(3):
        one, v = posterior(vp_linear(), x_t[i : i + 1], x0[i : i + 1], t[i], s[i])
        assert_close(mean[i : i + 1], one)
        assert_close(var[i, 0], v)


@pytest.mark.daily
def test_the_posterior_is_that_of_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="linear", clip_sample=False, prediction_type="sample")
    x_t, x0 = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, var = posterior(DiscreteVP(linear_betas()), x_t, x0, 500, 499)
    step = scheduler.step(x0, 500, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
    assert_close(mean + var.sqrt() * noise, step, rtol=1e-3, atol=1e-4)


S2 = 0.3  # the variance of Gaussian data, for which every term of the bound is a formula


def gaussian_guess(x, sigma, context=None):
    return S2 / (S2 + sigma**2) * x


def gaussian_decoder(x0, x, sigma):
    var = S2 * sigma**2 / (S2 + sigma**2)
    return torch.distributions.Normal(gaussian_guess(x, sigma), var.sqrt()).log_prob(x0).flatten(1).sum(1)


def test_every_term_of_the_bound_is_its_formula():
    process, times = vp_cosine(), torch.tensor([0.1, 0.3, 0.6, 0.8], **double)
    levels = process.noise_level(times)
    x0 = S2**0.5 * torch.randn(20_000, 2, 3, generator=torch.Generator().manual_seed(0), **double)
    terms = bound_terms(
        gaussian_guess, process, x0, times, gaussian_decoder, generator=torch.Generator().manual_seed(1)
    )
    assert terms.shape == (20_000, 5)
    a2, v = process.alpha(0.8) ** 2, process.sigma(0.8) ** 2
    expected = [6 * (a2 * S2 + v - 1 - v.log()) / 2]
    for k in (1, 2, 3):
        error = S2 * levels[k] ** 2 / (S2 + levels[k] ** 2)
        expected.append(6 * (levels[k - 1] ** -2 - levels[k] ** -2) / 2 * error)
    left = S2 * levels[0] ** 2 / (S2 + levels[0] ** 2)
    expected.append(6 * (2 * math.pi * math.e * left).log() / 2)
    for mean, se, value in zip(terms.mean(0), terms.std(0) / 20_000**0.5, expected, strict=True):
        assert abs(mean - value) < 5 * se + 1e-12 and se < 0.01 * abs(value) + 0.02


def test_the_bound_hands_on_context_and_dtype():
    seen = []

    def denoise(x, sigma, context):
        seen.append((x.dtype, sigma.shape, context))
        return x

    x0 = torch.zeros(3, 1, 2, 2)
    bound_terms(denoise, vp_linear(), x0, torch.tensor([0.1, 0.5, 0.9]), lambda *a: torch.zeros(3), "red cube")
    assert seen == [(torch.float32, torch.Size([]), "red cube")] * 2


def test_grid_decoder_is_a_softmax_over_the_grid():
    values = torch.tensor([-1.0, 0.0, 0.5], **double)
    x0 = torch.tensor([[-1.0, 0.5], [0.0, 0.0]], **double)
    x = torch.tensor([[-0.7, 0.2], [0.3, -2.0]], **double)
    for sigma in (torch.tensor(0.4, **double), torch.tensor([0.4, 0.9], **double)):
        found = grid_decoder(values)(x0, x, sigma)
        for i in range(2):
            level = sigma if sigma.ndim == 0 else sigma[i]
            by_hand = 0.0
            for j in range(2):
                chances = [math.exp(-((x[i, j] - v) ** 2) / (2 * level**2)) for v in values]
                by_hand += math.log(chances[(values == x0[i, j]).nonzero().item()] / sum(chances))
            assert_close(found[i].item(), by_hand, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="an entry of x0 is 0.2 off the grid; round it first"):
        grid_decoder(values)(x0 + 0.2, x, sigma)


def test_bits_per_dim():
    assert_close(bits_per_dim(torch.tensor([math.log(2), 0.0]), torch.zeros(5, 2, 4)), torch.tensor([1 / 8, 0.0]))


@settings(deadline=None, max_examples=30)
@given(alpha=st.floats(0.05, 1.0), sigma=st.floats(0.05, 1.0), seed=st.integers(0, 5))
def test_conversions_form_a_group(alpha, sigma, seed):
    "There and back is the identity, and a detour by a third kind changes nothing."
    alpha, sigma = torch.tensor(alpha, **double), torch.tensor(sigma, **double)
    x_t, said = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed), **double)
    for here in KINDS:
        assert_close(convert(here, here, said, x_t, alpha, sigma), said, rtol=1e-6, atol=1e-6)
        assert_close(convert(here, "x0", said, x_t, alpha, sigma), to_x0(here, said, x_t, alpha, sigma))
        assert_close(convert(here, "eps", said, x_t, alpha, sigma), to_noise(here, said, x_t, alpha, sigma))
        for there in KINDS:
            direct = convert(here, there, said, x_t, alpha, sigma)
            detour = convert("v", there, convert(here, "v", said, x_t, alpha, sigma), x_t, alpha, sigma)
            assert_close(detour, direct, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(alpha=st.floats(0.05, 1.0), sigma=st.floats(0.05, 1.0))
def test_weights_turn_any_error_into_that_of_x0(alpha, sigma):
    alpha, sigma = torch.tensor(alpha, **double), torch.tensor(sigma, **double)
    x0, noise, wrong = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), **double)
    x_t, snr = alpha * x0 + sigma * noise, (alpha / sigma) ** 2
    for kind in KINDS:
        truth = prediction_target(kind, x0, noise, alpha, sigma)
        said = convert("x0", kind, wrong, x_t, alpha, sigma)
        own = (said - truth) ** 2
        assert_close(own, x0_weight(kind, alpha, sigma) * (wrong - x0) ** 2, rtol=1e-6, atol=1e-9)
        for name, weigh in WEIGHTINGS.items():
            weighted = loss_weight(kind, name, alpha, sigma) * own
            assert_close(weighted, weigh(snr) * (wrong - x0) ** 2, rtol=1e-6, atol=1e-9)


def test_the_weightings_to_the_letter():
    snr = torch.tensor([0.25, 1.0, 5.0, 9.0], **double)
    expected = {
        "uniform": [1, 1, 1, 1],
        "snr": [0.25, 1, 5, 9],
        "truncated-snr": [1, 1, 5, 9],
        "min-snr": [0.25, 1, 5, 5],
        "p2": [0.2, 0.5, 5 / 6, 0.9],
        "edm": [4.25, 5, 9, 13],
    }
    assert WEIGHTINGS.keys() == expected.keys()
    for name, weigh in WEIGHTINGS.items():
        assert weigh(snr).tolist() == pytest.approx(expected[name]), name
    assert min_snr(snr, 2.0).tolist() == [0.25, 1, 2, 2]
    assert p2(snr, 3.0, 2.0).tolist() == pytest.approx([0.25 / 3.25**2, 1 / 16, 5 / 64, 9 / 144])
    assert edm_weight(snr, 2.0).tolist() == [0.5, 1.25, 5.25, 9.25]


def test_weights_are_finite_at_the_ends_of_a_schedule():
    ends = torch.tensor([0.0, 1.0], **double)
    for kind in KINDS:
        for name in WEIGHTINGS:
            assert loss_weight(kind, name, ends, 1 - ends).isfinite().all(), (kind, name)
    assert_close(loss_weight("eps", "min-snr", ends, 1 - ends)[0].item(), 1.0)


@pytest.mark.daily
def test_min_snr_is_that_of_diffusers_training_scripts():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    process, t = DiscreteVP(scaled_linear_betas()), torch.arange(0, 1000, 50)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    snr = compute_snr(scheduler, t).double()
    for kind, weight in (("eps", snr.clamp(max=5) / snr), ("v", snr.clamp(max=5) / (snr + 1))):
        assert_close(loss_weight(kind, "min-snr", process.alpha(t), process.sigma(t)), weight, rtol=1e-4, atol=0)


@pytest.mark.daily
def test_edm_factors_are_those_of_diffusers():
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_data=0.5, prediction_type="epsilon")
    x, raw = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for sigma in torch.tensor([0.01, 0.5, 2.0, 80.0]):
        c_in, c_skip, c_out = edm_factors(sigma, 0.5)
        assert_close(c_in * x, scheduler.precondition_inputs(x, sigma))
        assert_close(c_skip * x + c_out * raw, scheduler.precondition_outputs(x, raw, sigma))
        asked = []
        net = lambda x_in, noise, context, asked=asked: asked.append((x_in, noise)) or raw  # noqa: E731
        assert_close(denoisers.EDMDenoiser(net)(x, sigma), scheduler.precondition_outputs(x, raw, sigma))
        assert_close(asked[0], (c_in * x, torch.as_tensor(scheduler.precondition_noise(sigma))))


def test_the_ideal_denoiser_is_the_mixture_of_spikes():
    generator = torch.Generator().manual_seed(0)
    data, labels = torch.randn(30, 2, 3, generator=generator, **double), torch.arange(30) % 3
    x, sigma = torch.randn(8, 2, 3, generator=generator, **double), torch.rand(8, generator=generator) + 0.05
    spikes = GaussianMixture(1.0, data.flatten(1), 0.0)
    for level in (sigma, sigma[0], 0.3):
        assert_close(ideal_denoiser(data)(x, level).flatten(1), spikes.denoise(x.flatten(1), level), rtol=0, atol=1e-9)
    asked = torch.arange(8) % 3
    told = ideal_denoiser(data, labels)(x, sigma, asked)
    for i in range(8):
        mine = GaussianMixture(1.0, data.flatten(1)[labels == asked[i]], 0.0)
        alone = mine.denoise(x[i : i + 1].flatten(1), sigma[i])
        assert_close(told[i : i + 1].flatten(1), alone, rtol=0, atol=1e-9)
    assert ideal_denoiser(data)(x.float(), 0.5).dtype == torch.float32
    assert torch.equal(ideal_denoiser(data)(data, 0.0), data)  # and far away there is no underflow to NaN
    assert ideal_denoiser(data)(1e4 * x, 0.01).isfinite().all()
    with pytest.raises(ValueError, match="no picture has label 7"):
        ideal_denoiser(data, labels)(x, 0.5, torch.full((8,), 7))


def test_the_loss_to_the_letter():
    process, x0 = vp_linear(), torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), **double)
    t = torch.tensor([0.1, 0.4, 0.7, 0.9], **double)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), **double)
    alpha, sigma = process.alpha(t)[:, None, None, None], process.sigma(t)[:, None, None, None]
    seen = []
    net = lambda x, t, context: seen.append((x, t, context)) or 0.5 * x  # noqa: E731
    for kind in KINDS:
        for weighting in (None, "p2", lambda snr: snr**0.5):
            gen = torch.Generator().manual_seed(1)
            found = simple_loss(net, process, x0, "told", kind, t, gen, weighting)
            x_t = alpha * x0 + sigma * noise
            by_hand = ((0.5 * x_t - prediction_target(kind, x0, noise, alpha, sigma)) ** 2).mean((1, 2, 3))
            if weighting is not None:
                by_hand = by_hand * loss_weight(kind, weighting, process.alpha(t), process.sigma(t))
            assert_close(found, by_hand, rtol=1e-9, atol=1e-12)
            assert_close(seen[-1][0], x_t)
            assert torch.equal(seen[-1][1], t) and seen[-1][2] == "told"


@pytest.mark.parametrize("call", [to_x0, to_noise, prediction_target])
def test_unknown_names_are_refused(call):
    one = torch.ones(1)
    with pytest.raises(ValueError, match="kind 'noise' is not one of eps, x0, v, flow, score"):
        call("noise", one, one, one, one)
    with pytest.raises(ValueError, match="weighting 'p3' is not one of uniform, snr"):
        loss_weight("eps", "p3", one, one)


def test_training_times_cover_all_steps():
    gen = torch.Generator().manual_seed(0)
    drawn = sample_times(DiscreteVP(linear_betas()), 100_000, gen)
    assert drawn.dtype == torch.float64 and len(drawn.unique()) == 1000 and abs(drawn.mean() - 499.5) < 4
    drawn = sample_times(flow(), 100_000, gen)
    assert 0 <= drawn.min() and 0.999 < drawn.max() <= 1 and abs(drawn.mean() - 0.5) < 0.004


def test_the_digits_are_split_once_and_scaled():
    from sklearn.datasets import load_digits as source

    from stable_diffusion_scratch.digits import load_digits

    (pictures, labels), (unseen, unseen_labels) = load_digits(), load_digits(held_out=True)
    assert pictures.shape == (1500, 1, 8, 8) and unseen.shape == (297, 1, 8, 8)
    both = torch.cat([pictures, unseen]).flatten(1).double() * 8 + 8
    original, names = source(return_X_y=True)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    assert torch.equal(both, torch.tensor(original)[order])
    assert torch.equal(torch.cat([labels, unseen_labels]), torch.tensor(names)[order])


def test_the_digits_network_to_the_letter():
    from stable_diffusion_scratch.digits import NO_CLASS, DigitsNet

    torch.manual_seed(0)
    net = DigitsNet(width=32, depth=2, t_max=10.0)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 4.0, 10.0])
    silu, linear = torch.nn.functional.silu, torch.nn.functional.linear

    def layer(h, module):
        return linear(h, module.weight, module.bias)

    for context, labels in ((None, torch.full((3,), NO_CLASS)), (torch.tensor([1, 9, 4]),) * 2):
        frequency = math.pi / 10 * 2 ** (6 * torch.arange(16) / 15)
        waves = torch.cat([(t[:, None] * frequency).cos(), (t[:, None] * frequency).sin()], 1)
        told = silu(layer(waves, net.when) + net.what.weight[labels])
        h = layer(x.reshape(3, 64), net.read)
        for block in net.blocks:
            inner = layer(torch.nn.functional.layer_norm(h, (32,)), block.widen) + layer(told, block.tell)
            h = h + layer(silu(inner), block.back)
        out = layer(torch.nn.functional.layer_norm(h, (32,)), net.write[1])
        assert_close(net(x, t, context), out.reshape(3, 1, 8, 8), rtol=1e-4, atol=1e-5)


@pytest.mark.daily
@pytest.mark.parametrize("kind, weighting", [("v", None), ("eps", "min-snr")])
def test_training_digits_is_this_loop(kind, weighting):
    from stable_diffusion_scratch.digits import NO_CLASS, DigitsNet, load_digits, train_digits

    net, process, losses = train_digits(kind=kind, steps=4, batch=16, seed=3, weighting=weighting)
    assert process.t_max == 999 and not net.training and not any(p.requires_grad for p in net.parameters())
    pictures, labels = load_digits()
    torch.manual_seed(3)
    twin, gen, by_hand, shown = DigitsNet(), torch.Generator().manual_seed(3), [], []
    optimizer = torch.optim.AdamW(twin.parameters(), weight_decay=0.01)
    for step, decay in enumerate((1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2)):
        optimizer.param_groups[0]["lr"] = 3e-3 * (step + 1) / 100 * decay
        pick = torch.randint(1500, (16,), generator=gen)
        label = torch.where(torch.rand(16, generator=gen) < 0.1, NO_CLASS, labels[pick])
        shown.append(label)
        loss = simple_loss(twin, process, pictures[pick], label, kind, generator=gen, weighting=weighting).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        by_hand.append(loss.item())
    assert losses == pytest.approx(by_hand, rel=1e-4)
    assert 0 < (torch.cat(shown) == NO_CLASS).sum() < 20
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert_close(ours, theirs.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.daily
def test_the_judge_reads_unseen_digits():
    from stable_diffusion_scratch.digits import judge_digits, load_digits

    pictures, labels = load_digits(held_out=True)
    assert (judge_digits(pictures) == labels).float().mean() > 0.98
    overshot = torch.where(pictures.abs() == 1, 5 * pictures, pictures)  # a sampler may leave [-1, 1]
    assert torch.equal(judge_digits(overshot), judge_digits(pictures))
