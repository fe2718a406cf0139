"The forward process against diffusers' tables, and as properties of any schedule."

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
    "bad", [torch.ones(3, 3) / 10, torch.tensor([0.1]), torch.tensor([0.1, 1.5]), torch.tensor([-0.1, 0.5])]
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
