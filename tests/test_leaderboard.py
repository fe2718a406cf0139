"The leaderboard: what a run costs, what is measured, and what a sampler of one's own needs to be on it."

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_diffusion_scratch import leaderboard as board
from stable_diffusion_scratch.samplers import SAMPLERS, Step, check_sigmas, last, register

PROBLEM = board.smooth(draws=16)


def priced(a: int, b: int):
    "A sampler that calls a times a step and b times more."

    def sampler(denoise, x, sigmas, *, noise=None, generator=None, start="ramp"):
        levels = check_sigmas(sigmas)
        for _ in range(a * (len(levels) - 1) + b):
            denoise(x, torch.tensor(1.0))
        yield Step(len(levels) - 2, levels[-1], x, x, a * (len(levels) - 1) + b)

    return sampler


@settings(deadline=None, max_examples=60)
@given(a=st.integers(1, 4), b=st.integers(-1, 6), budget=st.integers(1, 25), to_zero=st.booleans())
def test_the_most_steps_that_a_budget_allows(a, b, budget, to_zero):
    fits = [n for n in range(1, budget + 1) if a * n + b <= budget]
    assert board.steps_within(priced(a, b), budget, to_zero) == max(fits, default=0)


def test_counts_agree_with_what_samplers_say():
    for name, sampler in SAMPLERS.items():
        sigmas = board.GRIDS["karras"](PROBLEM, 6)
        g = torch.Generator().manual_seed(0)
        assert board.calls(sampler, sigmas) == last(sampler(PROBLEM.denoise, PROBLEM.x, sigmas, generator=g)).nfe, name


def test_a_registered_sampler_is_on_the_board_once():
    @register("of_my_own", "by_another_name", order=1, stochastic=False, source="here")
    def mine(denoise, x, sigmas, **options):
        yield from SAMPLERS["ddim"](denoise, x, sigmas, **options)

    try:
        names = [e.name for e in board.our_entrants()]
        assert names.count("of_my_own") == 1 and "by_another_name" not in names and "euler" not in names
        both = [e for e in board.our_entrants() if e.name in ("of_my_own", "ddim")]
        a, b = board.bench_samplers([PROBLEM], both, budgets=[5], grids=["karras"])
        assert a.median == b.median and a.nfe == b.nfe == 5
    finally:
        del SAMPLERS["of_my_own"], SAMPLERS["by_another_name"]


def test_fitted_weights_beat_ddim_on_fresh_starts():
    entrants = [board.fitted_entrant(PROBLEM), *(e for e in board.our_entrants() if e.name == "ddim")]
    fitted, ddim = board.bench_samplers([PROBLEM], entrants, budgets=[8], grids=["exponential"])
    assert fitted.median < ddim.median / 50 and fitted.worst < ddim.worst / 10


def test_a_board_survives_its_file(tmp_path):
    results = list(board.bench_samplers([PROBLEM], board.our_entrants(), budgets=[5], grids=["karras"]))
    board.write_board(results, tmp_path / "board.csv", ["made here"])
    again = board.read_board(tmp_path / "board.csv")
    assert [r.sampler for r in again] == [r.sampler for r in results]
    for a, b in zip(again, results, strict=True):
        assert a.median == pytest.approx(b.median, rel=1e-3) and a.stochastic is b.stochastic and math.isnan(a.pixels)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="the columns should be problem, library"):
        board.read_board(tmp_path / "other.csv")


def test_what_is_not_finite_comes_last():
    lines = [board.Result("p", "l", "s", False, "g", 5, 5, 5, m, 1.0) for m in (math.nan, 2.0, 1.0)]
    assert [r.median for r in board.ranked(lines)][:2] == [1.0, 2.0] and board.best(lines)[5].median == 1.0


def test_a_sampler_of_ours_may_not_fail_and_a_peer_may():
    def broken(denoise, x, sigmas, **options):
        yield Step(0, 0.0, x * math.nan if denoise is PROBLEM.denoise else denoise(x, 1.0), x, 1)

    def refuses(denoise, x, sigmas, **options):
        if denoise is PROBLEM.denoise:
            raise ValueError("no")
        yield Step(0, 0.0, denoise(x, 1.0), x, 1)

    found = [
        next(board.bench_samplers([PROBLEM], [board.Entrant("theirs", "x", s)], [5], ["karras"]))
        for s in (broken, refuses)
    ]
    assert all(math.isnan(r.median) and math.isnan(r.worst) and math.isnan(r.distance) for r in found)
    with pytest.raises(ValueError, match="no"):
        next(board.bench_samplers([PROBLEM], [board.Entrant("ours", "x", refuses)], [5], ["karras"]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"grids": ["kar"]}, "'kar' is not one of karras"),
        ({"budgets": [0]}, "counted from 1"),
        ({"budgets": [2.5]}, "counted from 1"),
    ],
)
def test_what_cannot_be_measured_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        next(board.bench_samplers([PROBLEM], board.our_entrants(), **options))


def test_a_missing_peer_is_named():
    with pytest.raises(ModuleNotFoundError, match="peers_requirements"), board.stand_ins("no_such_peer"):
        pass


def test_importing_it_needs_no_peer():
    program = (
        "import sys, stable_diffusion_scratch.leaderboard\n"
        "assert not {'k_diffusion', 'diffusers', 'matplotlib', 'torchsde', 'scipy', 'torchvision',"
        " 'stable_diffusion_scratch.pipeline'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
