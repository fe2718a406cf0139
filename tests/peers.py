"""k-diffusion's samplers in a process of their own: run as a program, this writes where they end, case by case.

    python tests/peers.py FILE

What the two sides share is here: the data, the starts, the grids and the noises. So that both sides draw the same, a
noise is a function of the noise levels that it is asked for, or of how many were asked for before.
"""

import functools
import importlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from stable_diffusion_scratch.leaderboard import stand_ins
from stable_diffusion_scratch.samplers import exponential_sigmas, karras_sigmas
from stable_diffusion_scratch.score import GaussianMixture

__all__ = ["CASES", "DATA", "GRIDS", "START", "noise_at", "nth_noise", "stand_ins"]

double = {"dtype": torch.float64}
DATA = GaussianMixture([0.3, 0.7], torch.tensor([[-1.0, 0.0], [1.0, 0.5]], **double), [0.5, 0.3])
START = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), **double)  # times sigmas[0]
GRIDS = {
    "karras to 0": karras_sigmas(9, 0.05, 20.0),
    "karras": karras_sigmas(9, 0.05, 20.0)[:-1],
    "exponential to 0": exponential_sigmas(6, 0.02, 80.0),
    "one step": torch.tensor([3.0, 1.0], **double),
    "one step to 0": torch.tensor([3.0, 0.0], **double),
}
CHURN = dict(s_churn=40.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003)
# ours, with its options: theirs, with its own
CASES = {
    "euler": ("euler", {}, "sample_euler", {}),
    "euler_ancestral": ("euler_ancestral", {}, "sample_euler_ancestral", {}),
    "heun": ("heun", {}, "sample_heun", {}),
    "edm": ("edm", {}, "sample_heun", CHURN),
    "dpm2": ("dpm2", {}, "sample_dpm_2", {}),
    "dpm2_ancestral": ("dpm2_ancestral", {}, "sample_dpm_2_ancestral", {}),
    "lms": ("lms", {"order": 4}, "sample_lms", {}),
    "lms of order 3": ("lms", {"order": 3}, "sample_lms", {"order": 3}),
    "dpmpp_2s": ("dpmpp_2s", {}, "sample_dpmpp_2s_ancestral", {"eta": 0.0}),
    "dpmpp_2m": ("dpmpp_2m", {}, "sample_dpmpp_2m", {}),
    "dpmpp_sde": ("dpmpp_sde", {}, "sample_dpmpp_sde", {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}, "sample_dpmpp_2m_sde", {}),
    "dpmpp_3m as published": ("dpmpp_3m_published", {}, "sample_dpmpp_3m_sde", {"eta": 0.0}),
}


def noise_at(x, sigma, lower):
    "The noise between two levels: the same for both sides, whoever asks and when."
    place = round(1e4 * float(sigma)) * 1_000_003 + round(1e4 * float(lower))
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(place % 2**62), **double)


def nth_noise(k: int):
    "The k-th noise, for a sampler that draws one in every step without being asked for levels."
    return torch.randn(START.shape, generator=torch.Generator().manual_seed(k), **double)


def main(path: Path) -> None:
    with stand_ins("k_diffusion"):
        k = importlib.import_module("k_diffusion.sampling")
    ends = {}
    for case, (_, _, function, options) in CASES.items():
        for grid, sigmas in GRIDS.items():
            steps = iter(range(100))
            torch.randn_like = lambda x, steps=steps: nth_noise(next(steps))  # what they draw by themselves
            given = dict(options)
            if "ancestral" in function or "sde" in function:
                given["noise_sampler"] = functools.partial(noise_at, START)
            x = sigmas[0] * START
            try:
                ends[f"{case}, {grid}"] = getattr(k, function)(DATA.denoise, x, sigmas, disable=True, **given)
            except UnboundLocalError:  # sample_dpmpp_3m_sde of a single step to 0
                print(f"k-diffusion's {function} fails on the grid {grid!r}", file=sys.stderr)
    save_file({name: end.contiguous() for name, end in ends.items()}, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
