"DDIM and DDPM against diffusers' schedulers, as properties on any grid, and on a trained network."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from stable_diffusion_scratch.denoisers import EpsDenoiser
from stable_diffusion_scratch.forward import DiscreteVP, scaled_linear_betas
from stable_diffusion_scratch.samplers import (
    SAMPLERS,
    exponential_sigmas,
    karras_sigmas,
    last,
    register,
    time_grid,
    with_zero,
)
from stable_diffusion_scratch.score import GaussianMixture

double = {"dtype": torch.float64}
DATA = GaussianMixture([0.3, 0.7], torch.tensor([[-1.0, 0.0], [1.0, 0.5]], **double), [0.3, 0.2])
PROCESS = DiscreteVP(scaled_linear_betas())


def eps_net(x_t, t, context=None):
    "A network stand-in: the exact noise prediction for DATA, in x_t's dtype."
    x = PROCESS.to_ve(x_t.double(), t)
    x0 = DATA.denoise(x, PROCESS.noise_level(t))
    return ((x - x0) / PROCESS.noise_level(t).reshape(-1, 1)).to(x_t)


@pytest.mark.daily
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_is_that_of_diffusers(spacing, eta):
    from diffusers import DDIMScheduler

    config = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    theirs = DDIMScheduler(**config, timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=True, steps_offset=0)
    theirs.set_timesteps(10)
    times = time_grid(10, spacing=spacing)
    assert theirs.timesteps.tolist() == times.tolist()
    if spacing == "linspace":
        return  # diffusers steps to t - 100, which is not the next time of this grid: only the grid is compared

    g = torch.Generator().manual_seed(0)
    x_t, noises = torch.randn(16, 2, generator=g, **double), torch.randn(10, 16, 2, generator=g, **double)
    theirs.alphas_cumprod = (1 - scaled_linear_betas()).cumprod(0)  # its float32 table, in float64
    sigmas, mine = with_zero(PROCESS.noise_level(times)), iter(noises)
    x = PROCESS.to_ve(x_t, times[0])
    steps = list(SAMPLERS["ddim"](EpsDenoiser(eps_net, PROCESS), x, sigmas, noise=lambda *_: next(mine), eta=eta))
    for k, t in enumerate(theirs.timesteps):
        said = eps_net(x_t, t.double())
        x_t = theirs.step(said, t, x_t, eta=eta, variance_noise=noises[k] if eta > 0 else None).prev_sample
    assert_close(steps[-1].x, x_t, rtol=0, atol=1e-5)


@pytest.mark.daily
def test_ddpm_is_that_of_diffusers_over_all_thousand_steps():
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        variance_type="fixed_small",
    )
    x_t = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), **double)
    mine, shared = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    noise = lambda x, *_: torch.randn(x.shape, generator=mine, **double)  # noqa: E731
    times = time_grid(1000)
    x = PROCESS.to_ve(x_t, times[0])
    ours = last(
        SAMPLERS["ddpm"](EpsDenoiser(eps_net, PROCESS), x, with_zero(PROCESS.noise_level(times)), noise=noise)
    ).x
    for t in theirs.timesteps:
        x_t = theirs.step(eps_net(x_t, t.double()), t, x_t, generator=shared).prev_sample
    assert_close(ours, x_t, rtol=0, atol=2e-3)  # a thousand steps on its float32 tables


GRIDS = st.builds(
    lambda n, top, ratio, rho, zero: karras_sigmas(n, top * ratio, top, rho)[: None if zero else -1],
    st.integers(2, 12),
    st.floats(0.5, 100.0),
    st.floats(1e-3, 0.5),
    st.floats(1.0, 10.0),
    st.booleans(),
)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@settings(deadline=None, max_examples=25)
@given(sigmas=GRIDS, dtype=st.sampled_from([torch.float32, torch.float64]), shape=st.sampled_from([(1, 2), (5, 2)]))
def test_every_sampler_keeps_shape_dtype_and_finiteness(name, sigmas, dtype, shape):
    data = GaussianMixture([0.3, 0.7], DATA.means.to(dtype), [0.3, 0.2])
    x = sigmas[0].to(dtype) * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    steps = list(SAMPLERS[name](data.denoise, x, sigmas, generator=torch.Generator().manual_seed(1)))
    assert len(steps) == len(sigmas) - 1
    assert all(s.x.shape == shape and s.x.dtype == dtype and s.x.isfinite().all() for s in steps)
    assert steps[-1].sigma == sigmas[-1].item() and [s.index for s in steps] == list(range(len(steps)))
    assert all(b.nfe > a.nfe for a, b in zip(steps, steps[1:], strict=False))


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize(
    "sigmas, message",
    [
        ([1.0], "at least two"),
        ([[2.0, 1.0]], "at least two"),
        ([1.0, 2.0], r"sigmas\[1\]"),
        ([2.0, 1.0, 1.0], r"sigmas\[2\]"),
        ([2.0, 0.0, 0.0], r"sigmas\[1\]"),
        ([2.0, -1.0], r"sigmas\[1\]"),
        ([float("inf"), 1.0], r"sigmas\[0\]"),
        ([2.0, float("nan")], r"sigmas\[1\]"),
    ],
)
def test_bad_grids_are_named(name, sigmas, message):
    with pytest.raises(ValueError, match=message):
        last(SAMPLERS[name](DATA.denoise, torch.zeros(1, 2, **double), sigmas))


def test_one_step_from_infinity_is_the_mean_and_the_same_seed_is_the_same_sample():
    x = 1e6 * torch.randn(4, 2, generator=torch.Generator().manual_seed(0), **double)
    end = last(SAMPLERS["ddim"](DATA.denoise, x, [1e6, 0.0])).x
    assert torch.equal(end, DATA.denoise(x, torch.tensor(1e6)))
    grid = [1e6, 10.0, 1.0, 0.0]

    def run(seed):
        return last(SAMPLERS["ddpm"](DATA.denoise, x, grid, generator=torch.Generator().manual_seed(seed))).x

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_registering_twice_is_refused():
    with pytest.raises(ValueError, match="'ddim' already"):
        register("ddim", order=1, stochastic=False, source="nowhere")(lambda *_, **__: None)


def test_grids():
    for steps in (1, 3, 7, 20, 999, 1000):
        for spacing in ("trailing", "leading", "linspace"):
            times = time_grid(steps, spacing=spacing)
            assert len(times) == steps and (times.diff() < 0).all() and 0 <= times[-1] and times[0] <= 999
    with pytest.raises(ValueError, match="between 1 and 1000"):
        time_grid(0)
    with pytest.raises(ValueError, match="'karras' is not one of"):
        time_grid(5, spacing="karras")
    for grid in (karras_sigmas(1, 0.1, 10.0), exponential_sigmas(1, 0.1, 10.0)):
        assert grid.tolist() == pytest.approx([10.0, 0.0])
