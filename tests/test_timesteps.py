"""Ways to draw training times: distributions, means that must not change, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_diffusion_scratch.forward import DiscreteVP, flow, linear_betas, vp_cosine
from stable_diffusion_scratch.timesteps import log_normal_times, stratified_times, table_times

TABLE = DiscreteVP(linear_betas())


@pytest.mark.parametrize("process", [flow(), vp_cosine(), TABLE], ids=["flow", "cosine", "table"])
def test_the_log_noise_level_is_normal(process):
    t = log_normal_times(process, 20_000, torch.Generator().manual_seed(0), mean=-0.3, std=0.7)
    z = (process.noise_level(t).log() + 0.3) / 0.7
    assert t.dtype == torch.float64 and abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    assert abs((z < 1).double().mean() - 0.8413) < 0.02


def test_levels_that_a_table_never_has_go_to_its_ends():
    t = log_normal_times(TABLE, 2000, torch.Generator().manual_seed(0), std=30.0)
    assert set(t[[0]].shape) == {1} and t.min() == 0 and t.max() == 999 and torch.equal(t, t.round())


@given(st.integers(1, 60), st.integers(0, 9))
@settings(max_examples=30)
def test_every_slot_has_one(n, seed):
    process = flow()
    t = stratified_times(process, n, torch.Generator().manual_seed(seed)) / process.t_max
    assert torch.equal((t * n).floor().sort().values, torch.arange(n).double())
    steps = stratified_times(TABLE, 1000, torch.Generator().manual_seed(seed))
    assert torch.equal(steps.sort().values, torch.arange(1000).double())


def test_each_time_alone_is_uniform():
    first = [stratified_times(TABLE, 8, torch.Generator().manual_seed(k))[0].item() for k in range(2000)]
    counts = torch.bincount((torch.tensor(first) // 125).long(), minlength=8)
    assert ((counts - 250).abs() < 5 * math.sqrt(250)).all()


def test_the_factor_keeps_the_mean():
    weights = torch.linspace(0.2, 3, 50)
    t, factor = table_times(weights, 100_000, torch.Generator().manual_seed(0))
    values = (t / 50) ** 2
    expected = ((torch.arange(50).double() / 50) ** 2).mean()
    error = (factor * values).std() / 100_000**0.5
    assert abs((factor * values).mean() - expected) < 5 * error
    assert factor.dtype == t.dtype == torch.float64 and t.max() <= 49
    assert abs(values.mean() - expected) > 0.1  # without it, another mean


def test_a_step_that_would_never_be_drawn_is_refused():
    weights = torch.ones(5)
    weights[3] = 0
    with pytest.raises(ValueError, match="weight 0.0 at step 3"):
        table_times(weights, 4)
