"Changes of `samplers` that its chapter does not notice: what the registry says, and defaults."

import pytest
import torch

from stable_diffusion_scratch.samplers import SAMPLERS, ddim, ddpm, last

x = torch.ones(3, 2, dtype=torch.float64)
GRID = [3.0, 1.0, 0.5]


@pytest.mark.parametrize("name, stochastic", [("ddim", False), ("ddpm", True)])
def test_the_registry_says_what_a_sampler_is(name, stochastic):
    assert SAMPLERS[name].order == 1 and SAMPLERS[name].stochastic is stochastic and SAMPLERS[name].source


def test_ddim_adds_no_noise_and_ddpm_all_of_it_unless_told_otherwise():
    def run(sampler, **options):
        return last(sampler(lambda x, sigma: 0.5 * x, x, GRID, generator=torch.Generator().manual_seed(0), **options)).x

    assert torch.equal(run(ddim), run(ddim, eta=0.0)) and torch.equal(run(ddpm), run(ddim, eta=1.0))
    assert not torch.equal(run(ddim), run(ddpm))


def test_the_smallest_grid_has_two_levels():
    assert last(ddim(lambda x, sigma: 0 * x, x, [2.0, 1.0])).x.allclose(x / 2)
