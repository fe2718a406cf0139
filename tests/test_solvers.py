"The solvers: measured orders, laws, identities between them, grids, hand-over, faults."

import ast
import inspect
import math
import textwrap

import pytest
import torch
from torch.testing import assert_close

from stable_diffusion_scratch import solvers
from stable_diffusion_scratch.forward import vp_linear
from stable_diffusion_scratch.samplers import SAMPLERS, exponential_sigmas, karras_sigmas, last
from stable_diffusion_scratch.score import GaussianMixture

double = {"dtype": torch.float64}
WIDE = GaussianMixture([0.3, 0.5, 0.2], torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.3, -1.2]], **double), [0.5, 0.6, 0.4])
X = 20 * torch.randn(16, 2, generator=torch.Generator().manual_seed(0), **double)
PUBLIC = (
    "ddpm ddim euler euler_ancestral heun dpm2 dpm2_ancestral lms pndm dpmpp_2s dpmpp_2m dpmpp_3m "
    "dpmpp_sde dpmpp_2m_sde deis unipc edm dpmpp_3m_published"
).split()
ORDERS = dict(ddim=1, heun=2, dpm2=2, pndm=2, dpmpp_2s=2, dpmpp_2m=2, deis=2, lms=3, dpmpp_3m=3, unipc=3)


def grid(steps):
    return karras_sigmas(steps + 1, 0.1, 20.0)[:-1]


@pytest.fixture(scope="module")
def truth():
    return last(solvers.unipc(WIDE.denoise, X, grid(600), start="rk", order=3)).x


def measured(sampler, truth, **options):
    coarse, fine = (
        (last(sampler(WIDE.denoise, X, grid(n), **options)).x - truth).norm(dim=1).median() for n in (64, 128)
    )
    return math.log2(coarse / fine)


def test_the_table_is_complete():
    assert set(PUBLIC) <= set(SAMPLERS)
    for name, order in ORDERS.items():
        assert SAMPLERS[name].order == order and not SAMPLERS[name].stochastic and SAMPLERS[name].source
    for name in ("ddpm", "dpm2_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "edm"):
        assert SAMPLERS[name].stochastic


@pytest.mark.daily
@pytest.mark.parametrize("name", sorted({f: n for n, f in SAMPLERS.items() if not f.stochastic}.values()))
def test_every_deterministic_solver_has_its_order(name, truth):
    assert measured(SAMPLERS[name], truth, start="rk") > SAMPLERS[name].order - 0.15


@pytest.mark.daily
def test_orders_that_are_options(truth):
    assert measured(solvers.lms, truth, start="rk", order=4) > 3.85
    assert measured(solvers.deis, truth, start="rk", order=3) > 2.85
    assert measured(solvers.unipc, truth, start="rk", order=3) > 3.85
    assert measured(solvers.unipc, truth, start="rk", corrector=False) < 2.2
    assert measured(solvers.dpmpp_3m_published, truth, start="rk") < 2.15  # as published: two


def test_one_method_under_two_names():
    sigmas, run = karras_sigmas(8, 0.05, 20.0), lambda s, **o: last(s(WIDE.denoise, X, sigmas, **o)).x
    assert torch.equal(run(solvers.heun), run(solvers.edm, s_churn=0.0))
    assert torch.equal(run(solvers.dpm2), run(solvers.dpm2_ancestral, eta=0.0))
    assert_close(run(solvers.dpmpp_sde, eta=0.0), run(solvers.dpmpp_2s), rtol=0, atol=1e-12)
    assert_close(run(solvers.lms, order=1), run(SAMPLERS["ddim"]), rtol=0, atol=1e-12)
    assert_close(run(solvers.deis, order=1), run(SAMPLERS["ddim"]), rtol=0, atol=1e-12)
    assert_close(run(solvers.unipc, corrector=False), run(solvers.dpmpp_2m), rtol=0, atol=1e-12)
    assert_close(run(solvers.dpmpp_2m_sde, eta=0.0), run(solvers.dpmpp_2m), rtol=0, atol=1e-12)


def test_a_denoiser_that_never_changes_its_mind_is_solved_exactly():
    clean = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), **double)
    for name, sampler in SAMPLERS.items():
        if not sampler.stochastic:
            end = last(sampler(lambda x, sigma: clean, X, [20.0, 5.0, 3.0, 0.5], start="rk")).x
            assert_close(end, clean + 0.5 / 20 * (X - clean), rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("name", ["ddpm", "dpm2_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "sde_then_3m"])
def test_end_variance_on_gaussian_data(name):
    line = GaussianMixture(1.0, torch.zeros(1, 1, **double), 0.5)

    def miss(steps):
        "Every row of the batch gets one input of size one: the start, or one noise."
        rows, x = iter(torch.eye(2 * steps + 1, **double)[1:, :, None]), torch.zeros(2 * steps + 1, 1, **double)
        x[0] = (20.0**2 + 0.25) ** 0.5
        sigmas = exponential_sigmas(steps + 1, 0.05, 20.0)[:-1]
        end = last(SAMPLERS[name](line.denoise, x, sigmas, noise=lambda *_: next(rows))).x
        return abs((end**2).sum().item() - 0.5**2 - 0.05**2)

    assert miss(48) < 0.7 * miss(24) < 0.5 * miss(12)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_either_start_on_any_grid(name, dtype):
    data = GaussianMixture([0.3, 0.5, 0.2], WIDE.means.to(dtype), [0.5, 0.6, 0.4])
    for sigmas in ([9.0, 0.0], [9.0, 1.0], [9.0, 8.9, 0.01, 0.0], [80.0, 7.0, 6.0, 5.0, 1.0, 1e-3]):
        for start in ("ramp", "rk"):
            g = torch.Generator().manual_seed(0)
            steps = list(SAMPLERS[name](data.denoise, X.to(dtype), sigmas, start=start, generator=g))
            assert [s.sigma for s in steps] == sigmas[1:]
            assert all(s.x.dtype == dtype and s.x.isfinite().all() for s in steps)


@pytest.mark.parametrize("name", ["lms", "deis", "pndm", "unipc", "dpmpp_2m", "dpmpp_3m"])
def test_unknown_start(name):
    with pytest.raises(ValueError, match="start = 'warm'"):
        last(SAMPLERS[name](WIDE.denoise, X, grid(4), start="warm"))


def test_calls_are_counted():
    calls = {name: last(SAMPLERS[name](WIDE.denoise, X, grid(6))).nfe for name in SAMPLERS}
    assert calls["dpmpp_3m"] == calls["unipc"] == calls["lms"] == calls["deis"] == 6
    assert calls["heun"] == calls["dpm2"] == calls["dpmpp_2s"] == 12 and calls["pndm"] == 7
    assert last(solvers.dpmpp_3m(WIDE.denoise, X, grid(6), start="rk")).nfe == 8


def test_hand_over():
    whole = list(solvers.hand_over(solvers.heun, SAMPLERS["ddim"], 2)(WIDE.denoise, X, grid(5)))
    assert [s.index for s in whole] == list(range(5)) and [s.nfe for s in whole] == [2, 4, 5, 6, 7]
    first = last(solvers.heun(WIDE.denoise, X, grid(5)[:3]))
    assert torch.equal(whole[-1].x, last(SAMPLERS["ddim"](WIDE.denoise, first.x, grid(5)[2:])).x)
    for k in (0, 5, 9):  # all of one sampler, all of the other
        assert len(list(solvers.hand_over(solvers.heun, solvers.lms, k)(WIDE.denoise, X, grid(5)))) == 5


def test_phi_and_taylor():
    for k in range(5):
        for z in (-30.0, -3.0, -1.0, -0.3, 0.0, 0.7, 2.0):
            v = torch.linspace(0, 1, 20_001, **double)
            value = (
                math.exp(z)
                if k == 0
                else torch.trapezoid(((1 - v) * z).exp() * v ** (k - 1), v) / math.factorial(k - 1)
            )
            assert abs(solvers.phi(k, z) / value - 1) < 1e-6
    points = [(t, torch.tensor([2.0 - t + 3 * t**2], **double)) for t in (0.5, 0.1, -0.4)]
    assert_close(torch.cat(solvers.taylor(points)), torch.tensor([2.25, 2.0, 6.0], **double), rtol=1e-9, atol=0)


def test_grids():
    process = vp_linear()
    for levels in (
        solvers.time_sigmas(7, 0.05, 10.0, process),
        solvers.beta_sigmas(7, 0.05, 10.0, process),
        solvers.ays_sigmas(7),
        solvers.ays_sigmas(25, "sdxl"),
    ):
        assert levels.dtype == torch.float64 and levels[-1] == 0 and (levels.diff() < 0).all()
    assert_close(
        solvers.time_sigmas(7, 0.05, 10.0, process)[[0, 6]], torch.tensor([10.0, 0.05], **double), rtol=1e-6, atol=0
    )
    with pytest.raises(ValueError, match="a = 0.3"):
        solvers.beta_sigmas(7, 0.05, 10.0, process, 0.3)


def test_beta_quantiles_are_those_of_scipy():
    beta = pytest.importorskip("scipy.stats").beta
    process = vp_linear()
    t_min, t_max = (process.time(torch.tensor(s, **double)) for s in (0.05, 10.0))
    u = (process.time(solvers.beta_sigmas(9, 0.05, 10.0, process, 0.6, 0.8)[:-1]) - t_min) / (t_max - t_min)
    expected = torch.from_numpy(beta.ppf(torch.linspace(1, 0, 9, **double).numpy(), 0.6, 0.8))
    assert_close(u, expected, rtol=0, atol=1e-5)


def test_adaptive_keeps_its_tolerance(truth):
    for tolerance in (1e-2, 1e-4):
        step = last(solvers.adaptive(WIDE.denoise, X, [20.0, 3.0, 0.1], tolerance=tolerance))
        assert (step.x - truth).norm(dim=1).max() < 2 * tolerance and step.sigma == 0.1
    assert last(solvers.adaptive(WIDE.denoise, X, [20.0, 0.0])).x.isfinite().all()


def test_an_optimised_grid_keeps_its_ends_and_is_better(truth):
    sigmas = grid(6)
    mine = solvers.optimised_sigmas(SAMPLERS["ddim"], WIDE.denoise, X, truth, sigmas, rounds=3)
    miss = lambda g: (last(SAMPLERS["ddim"](WIDE.denoise, X, g)).x - truth).norm(dim=1).mean()  # noqa: E731
    assert mine[0] == sigmas[0] and abs(mine[-1] / sigmas[-1] - 1) < 1e-12 and miss(mine) < miss(sigmas)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sampler_fits_on_thirty_lines(name):
    function = ast.parse(textwrap.dedent(inspect.getsource(SAMPLERS[name]))).body[0]
    assert function.end_lineno - function.lineno < 30  # from `def` to the end, docstring and all
