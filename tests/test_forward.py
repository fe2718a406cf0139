"The forward process against diffusers' tables, and as properties of any schedule."

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from stable_diffusion_scratch import forward
from stable_diffusion_scratch.forward import DiscreteVP, ForwardProcess

PROCESSES = {
    "vp_linear": forward.vp_linear(),
    "sub_vp": forward.sub_vp(),
    "vp_cosine": forward.vp_cosine(),
    "ve": forward.ve(),
    "edm": forward.edm(),
    "flow": forward.flow(),
    "flow_shift": forward.flow(3.0),
    "ddpm": DiscreteVP(forward.linear_betas()),
    "sd": DiscreteVP(forward.scaled_linear_betas()),
    "sd_zero": DiscreteVP(forward.zero_terminal_snr(forward.scaled_linear_betas())),
    "cosine_table": DiscreteVP(forward.cosine_betas()),
}
TABLES = {
    "linear": (forward.linear_betas, {"beta_schedule": "linear"}),
    "scaled_linear": (
        forward.scaled_linear_betas,
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (forward.cosine_betas, {"beta_schedule": "squaredcos_cap_v2"}),
    "sigmoid": (forward.sigmoid_betas, {"beta_schedule": "sigmoid"}),
}


def double(values):
    return torch.tensor(values, dtype=torch.float64)


COSINE = math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
# (the process, then t, alpha and sigma by plain arithmetic); no parameter at its default, then all
AT = [
    (forward.vp_linear(0.5, 3.0), 0.4, math.exp(-0.2), math.sqrt(1 - math.exp(-0.4))),
    (forward.vp_linear(), 1.0, math.exp(-10.05 / 2), math.sqrt(1 - math.exp(-10.05))),
    (forward.vp_linear(), 0.1, math.exp(-0.1095 / 2), math.sqrt(1 - math.exp(-0.1095))),
    (forward.sub_vp(0.5, 3.0), 0.4, math.exp(-0.2), 1 - math.exp(-0.4)),
    (forward.sub_vp(), 0.1, math.exp(-0.1095 / 2), 1 - math.exp(-0.1095)),
    (forward.vp_cosine(0.0), 1 / 3, math.cos(math.pi / 6), 0.5),
    (forward.vp_cosine(0.25), 0.5, 0.5877852523 / 0.9510565163, math.sqrt(1 - (0.5877852523 / 0.9510565163) ** 2)),
    (forward.vp_cosine(), 0.0, 1.0, 0.0),
    (forward.vp_cosine(), 0.5, COSINE, math.sqrt(1 - COSINE**2)),
    (forward.ve(0.1, 10.0), 0.75, 1.0, 10**0.5),
    (forward.ve(), 0.0, 1.0, 0.01),
    (forward.ve(), 1.0, 1.0, 50.0),
    (forward.edm(1.0, 81.0, 4.0), 0.5, 1.0, 16.0),
    (forward.edm(), 0.0, 1.0, 0.002),
    (forward.edm(), 1.0, 1.0, 80.0),
    (forward.edm(), 0.5, 1.0, (0.5 * 0.002 ** (1 / 7) + 0.5 * 80 ** (1 / 7)) ** 7),
    (forward.flow(), 0.3, 0.7, 0.3),
    (forward.flow(4.0), 0.2, 0.5, 0.5),
]


@pytest.mark.parametrize("process, t, alpha, sigma", AT)
def test_each_process_at_a_time_worked_out_by_hand(process, t, alpha, sigma):
    assert process.t_max == 1.0 and process.betas is None
    assert process.alpha(t).dtype == process.sigma(t).dtype == torch.float64
    assert process.alpha(t) == pytest.approx(alpha, abs=2e-10)
    assert process.sigma(t) == pytest.approx(sigma, abs=2e-9)
    assert process.noise_level(t) == pytest.approx(sigma / alpha, abs=1e-8)
    expected = math.log(alpha**2 / sigma**2) if sigma else math.inf
    assert process.log_snr(t) == pytest.approx(expected, rel=1e-7, abs=1e-7)


# f and g^2 by hand
SDE = [
    (forward.vp_linear(0.5, 3.0), 0.4, -0.75, 1.5),
    (forward.sub_vp(0.5, 3.0), 0.4, -0.75, 1.5 * (1 - math.exp(-0.8))),
    (forward.ve(0.1, 10.0), 0.75, 0.0, 2 * 10 * math.log(100)),
    (forward.edm(1.0, 81.0, 4.0), 0.5, 0.0, 2 * 16 * 4 * 8 * 2),
    (forward.flow(), 0.3, -1 / 0.7, 0.6 / 0.7),
    (forward.vp_cosine(0.0), 0.5, -math.pi / 2, math.pi),
]


@pytest.mark.parametrize("process, t, f, g2", SDE)
def test_each_sde_at_a_time_worked_out_by_hand(process, t, f, g2):
    for time in (t, double(t), double([t, t])):
        found = forward.sde_coefficients(process, time)
        for value, wanted in zip(found, (f, g2), strict=True):
            assert value.dtype == torch.float64 and value.shape == torch.as_tensor(time).shape
            assert_close(value, torch.full_like(value, wanted), rtol=1e-9, atol=1e-12)
            assert not value.requires_grad
    asked = double(t).requires_grad_()  # the caller's tensor is left alone
    forward.sde_coefficients(process, asked)
    assert asked.grad is None


def test_where_the_signal_ends_all_stays_finite():
    x0, noise = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert forward.ALPHA_FLOOR == 1e-6
    for process, end in ((forward.flow(), 1.0), (DiscreteVP(forward.zero_terminal_snr(forward.linear_betas())), 999)):
        x = process.add_noise(x0, end, noise)
        assert_close(x, noise, rtol=0, atol=1e-5)
        assert process.noise_level(end) == pytest.approx(1e6, rel=1e-9)
        assert_close(process.to_ve(x, end), x * 1e6)
        assert_close(process.from_ve(x, end), x * 1e-6)
        assert_close(process.log_snr(end), double(-2 * math.log(1e6)))


def test_a_number_for_each_sample():
    x = torch.zeros(2, 3, 4, 4)
    assert forward.per_sample(double([1.0, 2.0]), x).shape == (2, 1, 1, 1)
    assert forward.per_sample(double(1.0), x).shape == ()
    assert forward.per_sample(double([1.0, 2.0]), torch.zeros(2)).shape == (2,)
    assert forward.per_sample(double(1.0), x.half()).dtype == torch.float16
    process = forward.flow()
    mixed = process.add_noise(torch.ones(2, 1, 2), double([0.25, 0.5]), -torch.ones(2, 1, 2))
    assert_close(mixed, torch.tensor([[[0.5, 0.5]], [[0.0, 0.0]]]))
    assert_close(process.to_ve(mixed, double([0.25, 0.5])), mixed / torch.tensor([0.75, 0.5])[:, None, None])


def test_the_tables_by_hand():
    assert_close(forward.linear_betas(3, 0.1, 0.5), double([0.1, 0.3, 0.5]))
    assert_close(forward.scaled_linear_betas(3, 0.01, 0.25), double([0.01, 0.09, 0.25]))
    assert_close(
        forward.sigmoid_betas(3, 0.1, 0.5, 2.0), double([0.1, 0.1, 0.1]) + 0.4 / (1 + double([2, 0, -2]).exp())
    )
    alpha = double([1, math.cos(math.pi / 6), 0.5]) ** 2  # a cosine from 0 to 60 degrees of 90
    assert_close(forward.cosine_betas(3, 0.0)[:2], 1 - alpha[1:] / alpha[:-1])
    assert forward.cosine_betas(3, 0.0)[-1] == 0.999 and forward.cosine_betas(3, 0.0, 0.9)[-1] == 0.9
    for make, first, last in (
        (forward.linear_betas, 1e-4, 0.02),
        (forward.scaled_linear_betas, 0.00085, 0.012),
        (forward.cosine_betas, 4.128422482e-5, 0.999),
        (forward.sigmoid_betas, 1e-4 + 0.0199 / (1 + math.exp(6)), 1e-4 + 0.0199 / (1 + math.exp(-6))),
    ):
        betas = make()
        assert betas.shape == (1000,) and betas.dtype == torch.float64
        assert betas[0] == pytest.approx(first, rel=1e-8) and betas[-1] == pytest.approx(last, rel=1e-12)
    s = inspect.signature(forward.cosine_betas).parameters["s"].default
    assert s == inspect.signature(forward.vp_cosine).parameters["s"].default == 0.008


def test_a_short_table_by_hand():
    chain = DiscreteVP(double([0.36, 0.75]))  # alpha bar 0.64, 0.16
    assert chain.t_max == 1.0 and len(chain.betas) == 2
    assert_close(chain.alpha([0, 1]), double([0.8, 0.4]))
    assert_close(chain.sigma([0, 1]), double([0.6, 0.84**0.5]))
    low, high = 0.75, 0.84**0.5 / 0.4
    quarter = low**0.75 * high**0.25  # straight in the log of the noise level
    assert_close(chain.noise_level([0, 0.25, 1]), double([low, quarter, high]))
    assert_close(chain.alpha(0.25) ** 2 + chain.sigma(0.25) ** 2, double(1.0))
    assert_close(chain.time(double([0.01, low, quarter, high, 99])), double([0, 0, 0.25, 1, 1]))
    assert_close(chain.noise_level([-5, 7]), double([low, high]))  # outside: the nearest end
    long = DiscreteVP(double([0.1] * 5))
    assert_close(long.alpha([0, 2, 4]) ** 2, 0.9 ** double([1, 3, 5]))
    assert_close(long.noise_level(2.5) ** 2, long.noise_level(2) * long.noise_level(3))
    assert_close(long.time(long.noise_level([1.25, 3.5])), double([1.25, 3.5]))
    assert_close(DiscreteVP(torch.tensor([0.1, 0.2])).betas, double([0.1, 0.2]), rtol=1e-7, atol=0)  # kept in double
    assert DiscreteVP(double([0.5, 1.0])).alpha(1) == pytest.approx(1e-6)  # a last beta of 1 is allowed


def test_zero_terminal_snr_by_hand():
    betas = double([0.36, 0.4375, 0.5])  # signal 0.8, 0.6, 0.6 / sqrt 2
    a, end = double([0.8, 0.6]), 0.6 / 2**0.5
    stretched = torch.cat([(a - end) * 0.8 / (0.8 - end), double([0.0])])
    mended = forward.zero_terminal_snr(betas)
    assert_close((1 - mended).cumprod(0).sqrt(), stretched)
    assert mended[0] == pytest.approx(0.36) and mended[-1] == 1 and mended.dtype == torch.float64
    assert forward.zero_terminal_snr(betas.float()).dtype == torch.float64


def test_the_noise_level_is_inverted_to_the_last_digits():
    process = ForwardProcess(torch.ones_like, lambda t: t**3, t_max=5.0)
    t = double([0.0, 1e-3, 1.7, 5.0])
    assert_close(process.time(t**3), t, rtol=0, atol=1e-14)
    assert process.time(126) == pytest.approx(5.0) and process.time(double([8, 27])).shape == (2,)
    assert ForwardProcess(torch.ones_like, torch.ones_like, time_fn=lambda level: level + 1).time(2) == 3


@pytest.mark.daily
@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_diffusers(name):
    from diffusers import DDPMScheduler

    ours, config = TABLES[name]
    theirs = DDPMScheduler(**config)
    assert_close(ours().float(), theirs.betas, rtol=1e-4, atol=1e-7)  # its tables are float32
    assert_close(
        DiscreteVP(ours()).alpha(torch.arange(1000)) ** 2, theirs.alphas_cumprod.double(), rtol=2e-4, atol=1e-7
    )


@pytest.mark.daily
def test_stable_diffusions_own_table_as_diffusers_reads_it():
    from diffusers import DDIMScheduler

    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    theirs = DDIMScheduler(**config).alphas_cumprod[[0, 500, 999]]
    assert_close(theirs, torch.tensor([0.99914998, 0.27633247, 0.00466010]), rtol=0, atol=1e-8)  # float32
    ours = DiscreteVP(forward.scaled_linear_betas()).alpha([0, 500, 999]) ** 2
    assert_close(ours, double([0.99915000, 0.27633268, 0.00466010]), rtol=0, atol=5e-9)
    assert_close(ours, theirs.double(), rtol=1e-6, atol=0)


@pytest.mark.daily
def test_zero_terminal_snr_is_that_of_diffusers():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = forward.scaled_linear_betas()
    assert_close(
        forward.zero_terminal_snr(betas).float(), rescale_zero_terminal_snr(betas.float()), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("name", PROCESSES)
def test_noise_level_grows_and_time_inverts_it(name):
    process = PROCESSES[name]
    t = torch.linspace(0.001, 0.999, 301, dtype=torch.float64) * process.t_max
    level = process.noise_level(t)
    assert (level.diff() > 0).all()
    assert_close(process.time(level), t, rtol=0, atol=1e-8 * process.t_max)
    assert process.time(0.0) == pytest.approx(0, abs=1e-12)  # outside: the nearest end
    assert process.time(1e12) == pytest.approx(process.t_max)


@pytest.mark.parametrize("name", PROCESSES)
@settings(deadline=None, max_examples=20)
@given(u=st.floats(0.001, 1.0), batch=st.integers(1, 3), single=st.booleans())
def test_the_two_frames_and_the_dtype(name, u, batch, single):
    process = PROCESSES[name]
    t = torch.tensor(u * process.t_max, dtype=torch.float64)
    t = t if single else t.expand(batch)
    x0, noise = torch.randn(2, batch, 3, 4, generator=torch.Generator().manual_seed(batch))
    x_t = process.add_noise(x0, t, noise)
    assert x_t.dtype == x0.dtype and x_t.isfinite().all()
    x = process.to_ve(x_t.double(), t)
    assert_close(process.from_ve(x, t), x_t.double(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "bad",
    [
        torch.ones(3, 3) / 10,
        torch.tensor([0.1]),
        torch.tensor([0.1, 1.5]),
        torch.tensor([-0.1, 0.5]),
        torch.tensor([0.0, 0.5]),
    ],
)
def test_bad_tables_are_named(bad):
    with pytest.raises(ValueError, match="betas must be"):
        DiscreteVP(bad)


def test_a_schedule_of_the_reader():
    process = ForwardProcess(lambda t: 1 - t**2, lambda t: t)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert_close(process.time(process.noise_level(t)), t, rtol=0, atol=1e-9)
    f, g2 = forward.sde_coefficients(process, t)
    assert_close(f, -2 * t / (1 - t**2))
    assert_close(g2, 2 * t - 2 * f * t**2)
