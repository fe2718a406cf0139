"Changes of `score` that its chapter does not notice: defaults and counts."

import torch

from stable_diffusion_scratch.forward import vp_linear
from stable_diffusion_scratch.score import GaussianMixture, langevin, reverse, score_at

double = {"dtype": torch.float64}
DATA = GaussianMixture(1.0, torch.tensor([[0.5]], **double), 0.4)


def test_reverse_is_the_stochastic_one_unless_told_otherwise():
    process, times = vp_linear(), torch.tensor([0.9, 0.5, 0.1], **double)
    x = torch.ones(3, 1, **double)
    score = score_at(DATA.score, process)
    plain, stochastic = (
        list(reverse(score, x, process, times, *eta, generator=torch.Generator().manual_seed(0)))
        for eta in ((), (1.0,))
    )
    assert len(plain) == 2 and all(torch.equal(a, b) for a, b in zip(plain, stochastic, strict=True))


def test_langevin_takes_as_many_steps_as_it_is_told():
    calls = []
    langevin(lambda x: calls.append(x) or -x, torch.zeros(2, 1), 0.1, 3)
    assert len(calls) == 3
