"""Digits under every parametrisation, compared fairly: the same network, data, noise and number of steps, three seeds.

    .venv/bin/python bench/digits_parametrisations.py                 about ten minutes of one core, and resumable
    .venv/bin/python bench/digits_parametrisations.py --help

Each run trains `digits.train_digits` and measures, on digits held out of training, the error of the guessed clean
picture at ten noise levels and the likelihood bound. Finished runs stay in the JSON file and are not run again; the
log beside it gets one line a run. Chapter 3 loads both of the files in bench/results/, and repeats the shorter run
that is kept under "repeat": v, seed 0, half the steps.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from stable_diffusion_scratch.denoisers import Denoiser, bits_per_dim, bound_terms, grid_decoder
from stable_diffusion_scratch.digits import load_digits, train_digits
from stable_diffusion_scratch.score import reverse, score_at

KINDS = ("eps", "x0", "v", "flow", "score")
TIMES = torch.tensor([5, 20, 50, 100, 200, 300, 450, 600, 800, 999])  # where the error is measured
GREYS = torch.arange(17) / 8 - 1  # the values of a digit's pixels
RESULTS = Path(__file__).parent / "results" / "digits_parametrisations.json"


def plan(seeds: int) -> list[dict]:
    "Every run, the most telling first: each kind with its own loss, with one common weight, and few pictures."
    runs = [dict(kind=k, weighting=None, pictures=1500) for k in KINDS]
    runs += [dict(kind=k, weighting="min-snr", pictures=1500) for k in KINDS if k != "score"]
    runs += [dict(kind="v", weighting=None, pictures=30)]
    return [dict(run, seed=seed) for seed in range(seeds) for run in runs]


@torch.no_grad()
def error_at(denoise, levels, pictures, labels, noisings: int = 4) -> list[float]:
    "Mean squared error of the guessed picture, per pixel, at each noise level."
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(noisings, *pictures.shape, generator=generator)
    guesses = [[denoise(pictures + s.float() * z, s, labels) for z in noise] for s in levels]
    return [sum(((g - pictures) ** 2).mean().item() for g in at) / noisings for at in guesses]


@torch.no_grad()
def bits(denoise, process, pictures, labels) -> float:
    "The bound of the whole chain, in bits per pixel, on every sixth picture."
    few, told = pictures[::6], labels[::6]
    steps = torch.arange(len(process.betas)).double()
    generator = torch.Generator().manual_seed(3)
    terms = bound_terms(denoise, process, few, steps, grid_decoder(GREYS), told, generator)
    return bits_per_dim(terms.double().sum(1).mean(), few).item()


def drawn(denoise, process, labels) -> torch.Tensor:
    "One digit for each label, drawn by a hundred steps of the reverse SDE of chapter 2."
    generator = torch.Generator().manual_seed(4)
    grid = process.time(torch.logspace(2, -2, 100, dtype=torch.float64))
    score = score_at(lambda x, s: (denoise(x, s, labels) - x) / s**2, process)
    *_, x = reverse(score, torch.randn(len(labels), 1, 8, 8, generator=generator), process, grid, 1.0, generator)
    return x


def nearest(x, pictures) -> list[list[float]]:
    "The distances to the nearest and the second nearest of the pictures, for each x."
    return torch.cdist(x.flatten(1), pictures.flatten(1)).topk(2, largest=False).values.tolist()


def measure(run: dict, steps: int) -> dict:
    "Train and judge one run."
    began = time.process_time()
    (pictures, labels), unseen = load_digits(), load_digits(held_out=True)
    data = pictures[: run["pictures"]], labels[: run["pictures"]]
    net, process, losses = train_digits(
        kind=run["kind"], steps=steps, seed=run["seed"], data=data, weighting=run["weighting"]
    )
    denoise, levels = Denoiser(net, process, run["kind"]), process.noise_level(TIMES)
    asked = data[1][torch.arange(100) % len(data[1])]  # labels that were trained
    near = torch.tensor(nearest(drawn(denoise, process, asked), data[0]))
    return run | {
        "loss": [round(sum(part) / len(part), 5) for part in zip(*[iter(losses)] * (steps // 20), strict=False)],
        "unseen": error_at(denoise, levels, *unseen),
        "training": error_at(denoise, levels, data[0][:297], data[1][:297]),
        "bits": bits(denoise, process, *unseen),
        "nearest": near[:, 0].quantile(torch.tensor([0.1, 0.5, 0.9])).tolist(),
        "copies": (near[:, 0] < 0.5 * near[:, 1]).float().mean().item(),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def rounded(value):
    "Numbers to five significant digits: enough for figures, and a small file."
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return [rounded(v) for v in value] if isinstance(value, list) else value


def keep(stored: dict, path: Path) -> None:
    "Write what there is, one run a line; a kill leaves the old file whole."
    lines = ",\n".join(json.dumps(r) for r in stored["runs"])
    head = json.dumps({k: v for k, v in stored.items() if k != "runs"})[:-1]
    beside = path.with_suffix(".tmp")
    beside.write_text(f'{head}, "runs": [\n{lines}\n]}}\n')
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="training steps of every run (800; at least 20)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every kind (3)")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="results; read first, if there")
    given = parser.parse_args()
    if given.steps < 20 or given.seeds < 1:
        parser.error("--steps must be 20 or more, --seeds 1 or more")
    about = {"steps": given.steps, "times": TIMES.tolist()}
    stored = json.loads(given.json.read_text()) if given.json.is_file() else about | {"runs": []}
    if stored["steps"] != given.steps:
        parser.error(f"{given.json} holds runs of {stored['steps']} steps; name another file with --json")
    stored |= {"torch": torch.__version__, "python": platform.python_version()}
    if "repeat" not in stored:
        short = measure(dict(kind="v", weighting=None, pictures=1500, seed=0), given.steps // 2)
        stored["repeat"] = {"steps": given.steps // 2, "unseen": rounded(short["unseen"])}
        keep(stored, given.json)
    names = ("kind", "weighting", "pictures", "seed")
    done = {tuple(run[n] for n in names) for run in stored["runs"]}
    for run in plan(given.seeds):
        if tuple(run[n] for n in names) in done:
            continue
        found = {name: rounded(value) for name, value in measure(run, given.steps).items()}
        stored["runs"].append(found)
        keep(stored, given.json)
        line = (
            f"{run['kind']:5s} {run['weighting'] or 'plain':8s} {run['pictures']:4d} pictures  seed {run['seed']}  "
            f"{found['bits']:8.4f} bits/dim  copies {found['copies']:.2f}  {found['cpu_seconds']:.0f} s"
        )
        print(line, flush=True)
        with given.json.with_suffix(".log").open("a") as log:
            log.write(line + "\n")


if __name__ == "__main__":
    main()
