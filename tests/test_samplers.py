"""DDIM, DDPM and the way up against diffusers' schedulers as shipped; every sampler of the registry on any grid and
in law; and each small function, to the number."""

from dataclasses import FrozenInstanceError
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from stable_diffusion_scratch import samplers
from stable_diffusion_scratch.denoisers import EpsDenoiser
from stable_diffusion_scratch.forward import DiscreteVP, scaled_linear_betas
from stable_diffusion_scratch.samplers import (
    SAMPLERS,
    Step,
    check_sigmas,
    ddim,
    ddpm,
    encode,
    exponential_sigmas,
    karras_sigmas,
    last,
    normal_noise,
    register,
    split_noise,
    time_grid,
    with_zero,
)
from stable_diffusion_scratch.score import GaussianMixture

if find_spec("stable_diffusion_scratch.solvers"):  # adds its samplers to the registry
    import stable_diffusion_scratch.solvers  # noqa: F401

double = {"dtype": torch.float64}
DATA = GaussianMixture([0.3, 0.7], torch.tensor([[-1.0, 0.0], [1.0, 0.5]], **double), [0.3, 0.2])
PROCESS = DiscreteVP(scaled_linear_betas())
CONFIG = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
NAMES = sorted(SAMPLERS)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **double)


# --- diffusers, as shipped -------------------------------------------------------------------------------------------


def eps_net(x_t, t, context=None):
    "A network stand-in: the exact noise prediction for DATA, in x_t's dtype."
    x = PROCESS.to_ve(x_t.double(), t)
    x0 = DATA.denoise(x, PROCESS.noise_level(t))
    return ((x - x0) / PROCESS.noise_level(t).reshape(-1, 1)).to(x_t)


OURS = EpsDenoiser(eps_net, PROCESS)


def clipped(x, sigma):
    return OURS(x, sigma).clamp(-1, 1)


def run_theirs(scheduler, x_t, noises, **options):
    "diffusers' loop over its own timesteps, with its own tables."
    for k, t in enumerate(scheduler.timesteps):
        if "eta" in options:
            options["variance_noise"] = noises[k] if options["eta"] > 0 else None
        x_t = scheduler.step(eps_net(x_t, t.double()), t, x_t, **options).prev_sample
    return x_t


def run_ours(sampler, times, x_t, noises, denoise=OURS, sigmas=None, **options):
    "The same journey by a sampler of ours, given its noises."
    given_noises = iter(noises)
    sigmas = with_zero(PROCESS.noise_level(times)) if sigmas is None else sigmas
    x = PROCESS.to_ve(x_t, times[0])
    return last(sampler(denoise, x, sigmas, noise=lambda *_: next(given_noises), **options)).x


@pytest.mark.daily
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_ddim_is_that_of_diffusers_as_shipped(steps, spacing, eta):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**CONFIG, timestep_spacing=spacing, clip_sample=False)
    theirs.set_timesteps(steps)
    times = time_grid(steps, spacing=spacing)
    assert theirs.timesteps.tolist() == times.tolist()
    x_t, noises = normal(16, 2), normal(steps, 16, 2, seed=1)
    assert_close(
        run_ours(ddim, times, x_t, noises, eta=eta), run_theirs(theirs, x_t, noises, eta=eta), rtol=0, atol=1e-5
    )


@pytest.mark.daily
@pytest.mark.parametrize("spacing, steps", [("leading", 10), ("trailing", 10), ("linspace", 10), ("trailing", 12)])
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_is_that_of_diffusers_as_shipped(spacing, steps, clip):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(**CONFIG, timestep_spacing=spacing, clip_sample=clip, variance_type="fixed_small")
    theirs.set_timesteps(steps)
    times = time_grid(steps, spacing=spacing)
    assert theirs.timesteps.tolist() == times.tolist()
    x_t, shared, mine = normal(16, 2), torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    noises = [torch.randn(16, 2, generator=mine, **double) for _ in range(steps)]
    ours = run_ours(ddpm, times, x_t, noises, denoise=clipped if clip else OURS)
    assert_close(ours, run_theirs(theirs, x_t, noises, generator=shared), rtol=0, atol=1e-5)


@pytest.mark.daily
def test_a_thousand_steps_of_ddpm_differ_by_the_float32_tables_alone():
    from diffusers import DDPMScheduler

    ends = {}
    for tables in ("as shipped", "float64"):
        theirs = DDPMScheduler(**CONFIG, clip_sample=False, variance_type="fixed_small")
        if tables == "float64":
            theirs.alphas_cumprod, theirs.one = (1 - scaled_linear_betas()).cumprod(0), torch.tensor(1.0, **double)
        ends[tables] = run_theirs(theirs, normal(8, 2), None, generator=torch.Generator().manual_seed(1))
    mine = torch.Generator().manual_seed(1)
    noises = (torch.randn(8, 2, generator=mine, **double) for _ in range(1000))
    ours = run_ours(ddpm, time_grid(1000), normal(8, 2), noises)
    assert_close(ours, ends["float64"], rtol=0, atol=1e-10)
    assert 1e-7 < (ours - ends["as shipped"]).abs().max() < 1e-4


def strides(times, x_t, stride):
    "DDIM as diffusers walks it: the next time is t - stride, whatever the grid says."
    for t in times:
        eps = eps_net(x_t, t)
        x0 = (x_t - PROCESS.sigma(t) * eps) / PROCESS.alpha(t)
        end = t - stride < 0
        alpha, sigma = (1.0, 0.0) if end else (PROCESS.alpha(t - stride), PROCESS.sigma(t - stride))
        x_t = alpha * x0 + sigma * eps
    return x_t


@pytest.mark.daily
@pytest.mark.parametrize("spacing, steps", [("linspace", 10), ("trailing", 12), ("trailing", 7)])
def test_where_diffusers_ddim_leaves_its_grid_ours_does_not(spacing, steps):
    "It steps by 1000 // steps on every grid (0.42): pinned on both sides, and DDPM's scheduler sides with us."
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**CONFIG, timestep_spacing=spacing, clip_sample=False)
    theirs.set_timesteps(steps)
    times, x_t = time_grid(steps, spacing=spacing), normal(16, 2)
    assert theirs.timesteps.tolist() == times.tolist()
    shipped = run_theirs(theirs, x_t, None, eta=0.0)
    assert_close(strides(times, x_t, 1000 // steps), shipped, rtol=0, atol=1e-5)
    assert (run_ours(ddim, times, x_t, []) - shipped).abs().max() > 1e-3


@pytest.mark.daily
def test_a_trajectory_that_ends_in_noise_and_clipped_guesses():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**CONFIG, steps_offset=1, set_alpha_to_one=False, clip_sample=False)  # as Stable Diffusion
    theirs.set_timesteps(10)
    times, x_t = time_grid(10, spacing="leading") + 1, normal(16, 2)
    assert theirs.timesteps.tolist() == times.tolist()
    sigmas = PROCESS.noise_level(torch.cat([times, torch.zeros(1, **double)]))
    ours = PROCESS.alpha(0) * run_ours(ddim, times, x_t, [], sigmas=sigmas)
    assert_close(ours, run_theirs(theirs, x_t, None, eta=0.0), rtol=0, atol=1e-5)

    theirs = DDIMScheduler(**CONFIG, timestep_spacing="trailing")  # clips its guesses unless told not to
    theirs.set_timesteps(10)
    shipped = run_theirs(theirs, x_t, None, eta=0.0, use_clipped_model_output=True)
    assert_close(run_ours(ddim, time_grid(10), x_t, [], denoise=clipped), shipped, rtol=0, atol=1e-5)


@pytest.mark.daily
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_time_grids_are_those_of_diffusers(spacing):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(**CONFIG, timestep_spacing=spacing)
    for steps in (1, 2, 3, 7, 12, 20, 53, 333, 999, 1000):
        theirs.set_timesteps(steps)
        if steps > 1 or spacing != "linspace":  # a linspace of one entry: theirs is 0, where nothing is to be done
            assert time_grid(steps, spacing=spacing).tolist() == theirs.timesteps.tolist(), steps


@pytest.mark.daily
@pytest.mark.parametrize("steps", [10, 50])
def test_encode_is_the_inverse_scheduler_of_diffusers(steps):
    from diffusers import DDIMInverseScheduler

    theirs = DDIMInverseScheduler(**CONFIG, timestep_spacing="leading", clip_sample=False, set_alpha_to_one=False)
    theirs.set_timesteps(steps)
    stride, x_t = 1000 // steps, normal(16, 2)
    times = torch.arange(steps, **double) * stride  # its step at t goes from t - stride to t, told t
    assert theirs.timesteps.tolist() == times.tolist()
    shipped = x_t
    for t in theirs.timesteps[1:]:  # from time 0 on; it tells the network the upper time, we the lower
        shipped = theirs.step(eps_net(shipped, t.double() - stride), t, shipped).prev_sample
    sigmas = PROCESS.noise_level(times).flip(0)
    ours = last(encode(OURS, PROCESS.to_ve(x_t, 0), sigmas)).x
    assert_close(PROCESS.from_ve(ours, times[-1]), shipped, rtol=0, atol=1e-5)


# --- every sampler of the registry -----------------------------------------------------------------------------------

GRIDS = st.builds(
    lambda n, top, ratio, rho, zero: karras_sigmas(n, top * ratio, top, rho)[: None if zero else -1],
    st.integers(2, 12),
    st.floats(0.5, 100.0),
    st.floats(1e-3, 0.5),
    st.floats(1.0, 10.0),
    st.booleans(),
)
SHAPES = [(1, 2), (5, 2), (0, 2), (3,), (2, 1, 4, 4)]


def shrink(x, sigma):
    "The denoiser of normal data with standard deviation 1/2, for x of any shape."
    return x / (1 + 4 * sigma.to(x) ** 2)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25)
@given(sigmas=GRIDS, dtype=st.sampled_from([torch.float32, torch.float64]), shape=st.sampled_from(SHAPES))
def test_every_sampler_keeps_shape_dtype_and_finiteness(name, sigmas, dtype, shape):
    x = (sigmas[0] * normal(*shape)).to(dtype)
    before = x.clone()
    steps = list(SAMPLERS[name](shrink, x, sigmas, generator=torch.Generator().manual_seed(1)))
    assert len(steps) == len(sigmas) - 1 and torch.equal(x, before)
    for step in steps:
        for tensor in (step.x, step.x0):
            assert tensor.shape == shape and tensor.dtype == dtype and tensor.isfinite().all()
    assert [s.sigma for s in steps] == sigmas[1:].tolist() and [s.index for s in steps] == list(range(len(steps)))
    assert steps[0].nfe >= 1 and all(b.nfe > a.nfe for a, b in zip(steps, steps[1:], strict=False))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sigmas", [[1.0, 0.0], [1e4, 1e-4], [80.0, 0.0], [1.0, 1.0 - 1e-9], [3.0, 2.9, 0.01, 0.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_sampler_survives_the_edges(name, sigmas, dtype):
    "One step, huge steps, tiny steps; on a mixture, whose denoiser is not linear."
    data = GaussianMixture([0.3, 0.7], DATA.means.to(dtype), [0.3, 0.2])
    x = (sigmas[0] * normal(4, 2)).to(dtype)
    for step in SAMPLERS[name](data.denoise, x, sigmas, generator=torch.Generator().manual_seed(1)):
        assert step.x.dtype == step.x0.dtype == dtype and step.x.isfinite().all() and step.x0.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_nfe_counts_the_calls_and_the_seed_decides(name):
    sigmas, x, calls = karras_sigmas(6, 0.1, 10.0), 10 * normal(3, 2), []

    def denoise(x, sigma):
        assert torch.is_tensor(sigma) and sigma.dtype == torch.float64 and sigma.shape in ((), (len(x),))
        calls.append(sigma)
        return DATA.denoise(x, sigma)

    def end(seed):
        return last(SAMPLERS[name](denoise, x, sigmas, generator=torch.Generator().manual_seed(seed)))

    one = end(0)
    assert one.nfe == len(calls)
    assert torch.equal(one.x, end(0).x)
    assert torch.equal(one.x, end(1).x) != SAMPLERS[name].stochastic
    silent = SAMPLERS[name](denoise, x, sigmas, noise=lambda x, *_: torch.zeros_like(x))
    assert torch.equal(last(silent).x, one.x) != SAMPLERS[name].stochastic


@pytest.mark.parametrize("name", NAMES)
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


# Options under which a sampler is meant to be right in law: `edm` as published inflates its fresh noise by 1.003, and
# its churn per step does not shrink with the step before there are a hundred of them.
LAW = {"edm": dict(s_churn=4.0, s_noise=1.0)}
MEAN, STD = 0.7, 0.5
ONE = GaussianMixture(1.0, torch.full((1, 1), MEAN, **double), STD)


def end_law(sampler, sigmas, **options):
    """Mean and variance of the end, exactly, from the true start for ONE, and the number of noises: a sampler is affine
    in its start and its noises there, so it is run on a basis, one batch entry per input; and on a random input, to
    see that it is affine."""
    drawn = []
    last(sampler(ONE.denoise, torch.zeros(1, 1, **double), sigmas, noise=lambda x, *_: drawn.append(x) or x, **options))
    size = len(drawn) + 3
    mixed = normal(len(drawn) + 1)
    basis = torch.cat([torch.zeros(1, size - 2, **double), torch.eye(size - 2, **double), mixed[None]])  # [size inputs]
    rows = iter(basis.T[1:, :, None])
    end = last(sampler(ONE.denoise, basis.T[0, :, None].clone(), sigmas, noise=lambda *_: next(rows), **options)).x[
        :, 0
    ]
    offset, weights = end[0], end[1:-1] - end[0]
    assert_close(end[-1], offset + weights @ mixed, rtol=1e-9, atol=1e-9)
    mean = offset + weights[0] * MEAN
    variance = weights[0] ** 2 * (STD**2 + sigmas[0] ** 2) + (weights[1:] ** 2).sum()
    return mean.item(), variance.item(), len(drawn)


def law_error(sampler, steps, sigma_end, **options):
    sigmas = karras_sigmas(steps + 1, 0.05, 20.0)[:-1] if sigma_end else karras_sigmas(steps, 0.01, 20.0)
    mean, variance, drawn = end_law(sampler, sigmas, **options)
    assert (drawn > 0) == sampler.stochastic
    return abs(mean - MEAN), abs(variance - STD**2 - sigmas[-1].item() ** 2)


@pytest.mark.daily
@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_is_right_in_law(name):
    options, sampler = LAW.get(name, {}), SAMPLERS[name]
    coarse, middle, fine = (law_error(sampler, steps, 0.05, **options) for steps in (32, 64, 128))
    for of, at in ((0, "mean"), (1, "variance")):
        assert fine[of] < 0.02, (at, fine[of])
        small = 1e-9  # nothing left to shrink
        assert middle[of] < 0.65 * coarse[of] + small and fine[of] < 0.65 * middle[of] + small, (
            at,
            coarse,
            middle,
            fine,
        )
    assert max(law_error(sampler, 128, 0.0, **options)) < 0.02


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 2.0])
def test_the_law_of_ddim_is_the_recursion(eta):
    sigmas = karras_sigmas(9, 0.1, 10.0)
    v = STD**2 + 100.0
    for a, b in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        fresh2 = min(b**2, eta**2 * b**2 * (a**2 - b**2) / a**2)
        trust = STD**2 / (STD**2 + a**2)
        v = (trust + (b**2 - fresh2) ** 0.5 / a * (1 - trust)) ** 2 * v + fresh2
    mean, variance, drawn = end_law(ddim, sigmas, eta=eta)
    assert mean == pytest.approx(MEAN, abs=1e-12) and variance == pytest.approx(v, abs=1e-12)
    assert drawn == (8 if eta else 0)  # none in the step to 0


# --- to the number ---------------------------------------------------------------------------------------------------


def test_one_step_by_hand():
    "From 2 to 1 at x = 5 with D = 1: kept and fresh noise, and what a step says of itself."
    x, one = torch.full((1, 1), 5.0, **double), torch.ones(1, 1, **double)
    asked = []

    def denoise(x, sigma):
        return one

    def noise(x, sigma, lower):
        asked.append((x.item(), sigma, lower))
        return 10 * one

    (step,) = ddim(denoise, x, [2.0, 1.0], noise=noise)
    assert step.x.item() == 1 + 0.5 * 4 and asked == []
    assert (step.index, step.sigma, step.nfe) == (0, 1.0, 1) and step.x0 is one
    (step,) = ddim(denoise, x, [2.0, 1.0], noise=noise, eta=0.5)
    fresh = 0.5 * 0.75**0.5
    mean = 1 + (1 - fresh**2) ** 0.5 / 2 * 4
    assert step.x.item() == pytest.approx(mean + 10 * fresh, abs=1e-14)
    assert asked == [(pytest.approx(mean), 2.0, 1.0)]
    for sampler, options in ((ddpm, {}), (ddim, {"eta": 1.0}), (ddpm, {"start": "rk"})):
        (step,) = sampler(denoise, x, [2.0, 1.0], noise=noise, **options)
        assert step.x.item() == pytest.approx(1 + 4 / 4 + 10 * 0.75**0.5, abs=1e-14)
    (step,) = ddpm(denoise, x, [2.0, 1.0], noise=noise, eta=0.0)
    assert step.x.item() == 3.0
    (step,) = ddpm(denoise, x, [2.0, 0.0])
    assert step.x.item() == 1.0 and step.sigma == 0.0
    with pytest.raises(FrozenInstanceError):
        step.nfe = 3


def test_split_noise():
    assert split_noise(2.0, 1.0, 0.0) == (1.0, 0.0)
    assert split_noise(2.0, 1.0, 1.0) == pytest.approx((0.5, 0.75**0.5), abs=1e-15)
    assert split_noise(3.0, 1.5, 0.5) == pytest.approx(((2.25 - 0.421875) ** 0.5, 0.421875**0.5), abs=1e-15)
    assert split_noise(2.0, 1.0, 3.0) == (0.0, 1.0) and split_noise(2.0, 0.0, 1.0) == (0.0, 0.0)
    for eta in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"eta = {eta}"):
            split_noise(2.0, 1.0, eta)
        with pytest.raises(ValueError, match=f"eta = {eta}"):
            last(ddim(DATA.denoise, torch.zeros(1, 2, **double), [2.0, 1.0], eta=eta))


@settings(deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(0, 1, exclude_max=True), st.floats(0, 5))
def test_kept_and_fresh_noise_obey_pythagoras(sigma, ratio, eta):
    keep, fresh = split_noise(sigma, sigma * ratio, eta)
    assert keep >= 0 and fresh >= 0
    assert keep**2 + fresh**2 == pytest.approx((sigma * ratio) ** 2, rel=1e-12)


def test_normal_noise():
    x = torch.zeros(3, 2, dtype=torch.float32)
    drawn = normal_noise(x, torch.Generator().manual_seed(5))(x, 2.0, 1.0)
    assert torch.equal(drawn, torch.randn(3, 2, generator=torch.Generator().manual_seed(5)))
    assert normal_noise(x, torch.Generator())(x.double(), 2.0, 1.0).dtype == torch.float64
    with torch.random.fork_rng():
        torch.manual_seed(7)
        drawn = normal_noise(x, None)(x, 2.0, 1.0)
        torch.manual_seed(7)
        assert torch.equal(drawn, torch.randn(3, 2))
    generator = torch.Generator().manual_seed(0)  # the generator moves on: two draws differ
    noise = normal_noise(x, generator)
    assert not torch.equal(noise(x, 2.0, 1.0), noise(x, 2.0, 1.0))


def test_normal_noise_is_drawn_where_the_generator_is_and_moved_to_the_state(monkeypatch):
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: drawn.append(k["device"]) or randn(*a, **k))
    x, generator = torch.zeros(3, 2, device="meta"), torch.Generator().manual_seed(0)
    assert normal_noise(x, generator)(x, 2.0, 1.0).device.type == "meta"
    assert normal_noise(x, None)(x, 2.0, 1.0).device.type == "meta"
    assert [device.type for device in drawn] == ["cpu", "meta"]


def test_check_sigmas_gives_plain_numbers():
    assert check_sigmas(torch.tensor([2.0, 0.5, 0.0])) == [2.0, 0.5, 0.0]
    assert check_sigmas([2, 1]) == [2.0, 1.0] and all(type(v) is float for v in check_sigmas([2, 1]))
    for bad, message in (
        (torch.tensor(1.0), r"at least two noise levels, got shape \(\)"),
        ([1.0], r"got shape \(1,\)"),
        ([2.0, 1.0, 1.0], r"sigmas\[2\] = 1.0 is not below 1.0 before it"),
        ([2.0, 3.0], r"sigmas\[1\] = 3.0 is not below 2.0 before it"),
        ([0.0, 0.0], r"sigmas\[0\] = 0.0: levels must be positive"),
        ([2.0, -1.0], r"sigmas\[1\] = -1.0: levels must be positive and finite; only the last may be 0"),
        ([float("nan"), 1.0], r"sigmas\[0\] = nan"),
    ):
        with pytest.raises(ValueError, match=message):
            check_sigmas(bad)


def test_last():
    steps = [Step(i, 1.0, torch.zeros(1), torch.zeros(1), i) for i in range(3)]
    assert last(iter(steps)) is steps[2]
    with pytest.raises(ValueError, match="made no step"):
        last(iter([]))


def test_the_registry(monkeypatch):
    monkeypatch.setattr(samplers, "SAMPLERS", table := {})

    def mine():
        pass

    assert register("one", "two", order=3, stochastic=True, source="here")(mine) is mine
    assert table == {"one": mine, "two": mine}
    assert (mine.order, mine.stochastic, mine.source) == (3, True, "here")
    for names in (("one",), ("three", "two")):
        with pytest.raises(ValueError, match=f"called '{names[-1]}' already"):
            register(*names, order=1, stochastic=False, source="nowhere")(lambda: None)


def test_what_is_registered():
    assert SAMPLERS["ddim"] is SAMPLERS["euler"] is ddim and SAMPLERS["ddpm"] is SAMPLERS["euler_ancestral"] is ddpm
    assert (ddim.order, ddim.stochastic) == (1, False) and (ddpm.order, ddpm.stochastic) == (1, True)
    assert "Song 2021" in ddim.source and "Ho 2020" in ddpm.source
    assert all(isinstance(f.order, int) and isinstance(f.stochastic, bool) and f.source for f in SAMPLERS.values())


def test_one_step_from_infinity_is_the_mean_and_the_same_seed_is_the_same_sample():
    x = 1e6 * normal(4, 2)
    end = last(ddim(DATA.denoise, x, [1e6, 0.0])).x
    assert torch.equal(end, DATA.denoise(x, torch.tensor(1e6)))
    grid = [1e6, 10.0, 1.0, 0.0]

    def run(seed):
        return last(ddpm(DATA.denoise, x, grid, generator=torch.Generator().manual_seed(seed))).x

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_a_trajectory_may_be_handed_over():
    sigmas, x = karras_sigmas(8, 0.05, 10.0), 10 * normal(5, 2)
    whole = last(ddim(DATA.denoise, x, sigmas)).x
    half = last(ddim(DATA.denoise, x, sigmas[:4])).x
    assert torch.equal(last(ddim(DATA.denoise, half, sigmas[3:])).x, whole)


def test_encode_by_hand():
    "Up from 1 to 2 at x = 3, with D = sigma at every level."
    told = []

    def denoise(x, sigma):
        told.append((x.item(), sigma.item()))
        return sigma.reshape(1, 1).to(x)

    x = torch.full((1, 1), 3.0, **double)
    (step,) = encode(denoise, x, [2.0, 1.0])
    assert step.x.item() == 1 + 2 * (3 - 1) and told == [(3.0, 1.0)]
    assert (step.index, step.sigma, step.x0.item(), step.nfe) == (0, 2.0, 1.0, 1)
    told.clear()
    (step,) = encode(denoise, x, [2.0, 1.0], rounds=1)
    assert step.x.item() == 2 + 2 * (3 - 2) and step.nfe == 2 and step.x0.item() == 2.0
    assert told == [(3.0, 1.0), (5.0, 2.0)]
    steps = list(encode(denoise, x, [4.0, 2.0, 1.0], rounds=2))
    assert [(s.index, s.sigma, s.nfe) for s in steps] == [(0, 2.0, 3), (1, 4.0, 6)]
    for bad, message in (([1.0, 0.0], "end above 0"), ([1.0, 2.0], r"sigmas\[1\]")):
        with pytest.raises(ValueError, match=message):
            last(encode(denoise, x, bad))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_encode_is_undone_by_ddim(dtype, tolerance):
    data = GaussianMixture(1.0, torch.tensor([[0.5, -1.0]], dtype=dtype), 0.4)
    x, sigmas = data.sample(20, torch.Generator().manual_seed(0)), karras_sigmas(41, 0.05, 20.0)[:-1]
    for step in encode(data.denoise, x, sigmas, rounds=30):
        assert step.x.dtype == dtype
    assert_close(last(ddim(data.denoise, step.x, sigmas)).x, x, rtol=0, atol=tolerance)


def test_grids():
    for steps in (1, 3, 7, 20, 999, 1000):
        for spacing in ("trailing", "leading", "linspace"):
            times = time_grid(steps, spacing=spacing)
            assert len(times) == steps and (times.diff() < 0).all() and 0 <= times[-1] and times[0] <= 999
            assert times.dtype == torch.float64
    assert time_grid(4).tolist() == [999, 749, 499, 249] and time_grid(3, 10).tolist() == [9, 6, 2]
    assert time_grid(4, spacing="leading").tolist() == [750, 500, 250, 0]
    assert time_grid(3, 10, "leading").tolist() == [6, 3, 0]
    assert time_grid(3, 10, "linspace").tolist() == [9, 4, 0]  # 4.5 to even
    for steps in (0, 1001, -3):
        with pytest.raises(ValueError, match=f"steps = {steps}: between 1 and 1000"):
            time_grid(steps)
    with pytest.raises(ValueError, match="'karras' is not one of"):
        time_grid(5, spacing="karras")


def test_grids_of_noise_levels():
    for grid in (karras_sigmas(1, 0.1, 10.0), exponential_sigmas(1, 0.1, 10.0)):
        assert grid.tolist() == pytest.approx([10.0, 0.0]) and grid.dtype == torch.float64
    assert karras_sigmas(3, 1.0, 81.0, rho=4.0).tolist() == pytest.approx([81.0, 16.0, 1.0, 0.0])
    assert karras_sigmas(2, 0.01, 5.0, rho=1.0).tolist() == pytest.approx([5.0, 0.01, 0.0])
    middle = ((0.002 ** (1 / 7) + 80.0 ** (1 / 7)) / 2) ** 7  # rho is 7 unless given
    assert karras_sigmas(3, 0.002, 80.0)[1].item() == pytest.approx(middle)
    assert exponential_sigmas(3, 0.1, 10.0).tolist() == pytest.approx([10.0, 1.0, 0.1, 0.0])
    assert with_zero(torch.tensor([2.0, 1.0])).tolist() == [2.0, 1.0, 0.0]
    for dtype in (torch.float16, torch.float64):
        assert with_zero(torch.tensor([2.0], dtype=dtype)).dtype == dtype
