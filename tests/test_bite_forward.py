"Changes of `forward` that its chapter does not notice: the floor, the defaults, the ends of a table."

import pytest
import torch

from stable_diffusion_scratch import forward
from stable_diffusion_scratch.forward import DiscreteVP, flow

double = {"dtype": torch.float64}


def test_the_floor_of_alpha_is_a_millionth():
    assert forward.ALPHA_FLOOR == 1e-6 and flow().noise_level(1.0).item() == pytest.approx(1e6)


@pytest.mark.parametrize("name", ["linear_betas", "scaled_linear_betas", "cosine_betas", "sigmoid_betas"])
def test_tables_have_a_thousand_steps_unless_told_otherwise(name):
    assert len(getattr(forward, name)()) == 1000 and len(getattr(forward, name)(7)) == 7


@pytest.mark.parametrize("steps", [2, 3])
def test_short_tables_are_chains_too(steps):
    assert DiscreteVP(torch.full((steps,), 0.1, **double)).t_max == steps - 1


def test_a_table_ends_where_it_ends():
    process = DiscreteVP(torch.tensor([0.1, 0.2, 0.3], **double))
    assert process.noise_level(2.0) == process.noise_level(5.0) and process.noise_level(-1.0) == process.noise_level(0)


def test_edm_is_karras_unless_told_otherwise():
    process = forward.edm()
    assert process.sigma(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.002, 80.0])
    assert process.sigma(0.25).item() == pytest.approx((0.75 * 0.002 ** (1 / 7) + 0.25 * 80 ** (1 / 7)) ** 7)
