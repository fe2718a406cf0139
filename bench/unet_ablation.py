"""What each choice in a UNet is worth, on the 1,797 digits: the same training for every variant, three seeds each.

    .venv/bin/python bench/unet_ablation.py                 all variants; writes bench/results/unet_ablation.json
    .venv/bin/python bench/unet_ablation.py --only base "no bridges" --steps 200 --json FILE

A variant differs from the base in one thing. All see the same pictures, noise and timesteps in the same order (the seed
draws them, and the first weights). Judged are the averaged weights (Polyak 1992), by the error of the prediction on the
297 held-out digits with noise that is the same for all, in three thirds of the timesteps. Half an hour on one core.
"""

import json
import os
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from _study import study_parser

from stable_diffusion_scratch.denoisers import simple_loss
from stable_diffusion_scratch.digits import load_digits
from stable_diffusion_scratch.forward import DiscreteVP, linear_betas
from stable_diffusion_scratch.unet import UNet, UNetConfig

STEPS, BATCH, SEEDS = 300, 32, 3
BANDS = {"little noise": (1, 333), "medium": (334, 666), "much": (667, 999)}  # timesteps, both included
BASE = UNetConfig(
    in_channels=1, out_channels=1, channels=(16, 32), layers=1, depth=(0, 1), mid_depth=1, heads=(2, 2),
    context_channels=10, groups=8, sample_size=8,
)  # fmt: skip
VARIANTS = {  # changed fields, and what the network is not told
    "base": ({}, None),
    "no bridges": ({"bridges": False}, None),
    "one scale": ({"channels": (24,), "layers": 1, "depth": (1,), "heads": (2,)}, None),
    "no attention": ({"depth": (0, 0), "mid_depth": 0}, None),
    "attention at 8 x 8, too": ({"depth": (1, 1)}, None),
    "attention in the middle alone": ({"depth": (0, 0)}, None),
    "transformers twice as deep": ({"depth": (0, 2), "mid_depth": 2}, None),
    "two residual blocks a level": ({"layers": 2}, None),
    "scale and shift": ({"scale_shift": True}, None),
    "not told the time": ({}, "time"),
    "not told the digit": ({}, "digit"),
}


def network(name: str) -> UNet:
    "The variant with this name; its weights come from torch's global generator."
    return UNet(replace(BASE, **VARIANTS[name][0]))


def told(name: str, net: UNet):
    "The network as it is called: (x, t, labels) -> prediction, with what this variant hides from it left out."
    hidden = VARIANTS[name][1]

    def call(x, t, labels):
        t = torch.zeros_like(t) if hidden == "time" else t
        names = F.one_hot(labels, 10).to(x.dtype)[:, None]  # [b 1 10]
        return net(x, t, 0 * names if hidden == "digit" else names)

    return call


def train(name: str, seed: int, steps: int = STEPS) -> tuple[UNet, list[float]]:
    "The averaged network and the loss of every step; v-prediction, Adam, the rate falling to zero along a cosine."
    process, (pictures, labels) = DiscreteVP(linear_betas()), load_digits()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network(name)
    average, losses = deepcopy(net), []
    optimizer = torch.optim.Adam(net.parameters(), 3e-3, fused=True)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 2), pct_start=0.1)
    for step in range(steps):
        pick = torch.randint(len(pictures), (BATCH,), generator=generator)
        call = told(name, net)
        loss = simple_loss(call, process, pictures[pick], labels[pick], "v", generator=generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
        decay = min(0.99, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
        losses.append(loss.item())
    return average.eval(), losses


@torch.no_grad()
def score(name: str, net: UNet, repeats: int = 2) -> dict[str, float]:
    "Mean squared error of v on the held-out digits, by band of timesteps and over all; the same noise for everyone."
    process, (pictures, labels) = DiscreteVP(linear_betas()), load_digits(held_out=True)
    generator, found = torch.Generator().manual_seed(1234), {}
    for band, (first, last) in BANDS.items():
        errors = []
        for _ in range(repeats):
            t = torch.randint(first, last + 1, (len(pictures),), generator=generator)
            errors.append(simple_loss(told(name, net), process, pictures, labels, "v", t, generator))
        found[band] = torch.cat(errors).mean().item()
    return found | {"all": sum(found.values()) / len(found)}


def study(names, seeds: range, steps: int, file: Path) -> None:
    "Scores of every variant and seed, with its size; the file is written after each seed."
    settings = {"steps": steps, "batch": BATCH, "torch": torch.__version__}
    found: dict = {}
    for seed in seeds:
        for name in names:
            net, losses = train(name, seed, steps)
            entry = found.setdefault(
                name, {"weights": sum(p.numel() for p in net.parameters()), "seeds": [], "scores": []}
            )
            entry["seeds"].append(seed)
            entry["scores"].append({band: round(value, 5) for band, value in score(name, net).items()})
            entry["changed"], entry["hidden"] = VARIANTS[name]
            print(f"seed {seed} {name:32} {entry['weights']:9,} weights {entry['scores'][-1]}", flush=True)
        file.write_text(json.dumps(settings | {"variants": found}, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = study_parser(__doc__, VARIANTS, "variant", SEEDS, STEPS, "unet_ablation.json")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    seeds = range(given.first, given.first + given.seeds)
    study(given.only or list(VARIANTS), seeds, given.steps, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
