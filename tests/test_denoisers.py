"Parametrisations as one algebra, and the wrappers around a perfect network of every kind."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from stable_diffusion_scratch import denoisers
from stable_diffusion_scratch.denoisers import KINDS, prediction_target, simple_loss, to_noise, to_x0
from stable_diffusion_scratch.forward import DiscreteVP, flow, linear_betas, per_sample, vp_cosine, vp_linear
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
