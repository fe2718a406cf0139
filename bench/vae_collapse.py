"""Posterior collapse under a decoder that can do without latents, and three cures, on the 1,797 digits, three seeds.

    .venv/bin/python bench/vae_collapse.py                  all variants; writes bench/results/vae_collapse.json
    .venv/bin/python bench/vae_collapse.py --only "in order" --steps 200 --json FILE

The encoder reads the 64 pixels and speaks with eight numbers. The decoder predicts each pixel as a normal with a
variance of its own, from the latents and, but for the first variant, from the pixels before it. The loss is the ELBO in
nats (pixels have the noise that fills a grey level). Judged on the 297 held-out digits: rate, active units, the ELBO,
and how often a linear map tells the digit from one sample of the latents. A minute on one core.
"""

import json
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from _study import study_parser
from sklearn.datasets import load_digits
from torch import Tensor, nn

from stable_diffusion_scratch.vae import Moments, active_units, free_bits, unit_rates

STEPS, BATCH, SEEDS, LATENTS, WIDTH, RATE = 400, 128, 3, 8, 96, 9e-3
VARIANTS = {  # context: pixels before it are seen; warm_up: share of the steps; floor: nats free per latent number
    "each by itself": {"context": False},
    "in order": {},
    "in order, warm-up": {"warm_up": 0.5},
    "in order, free bits": {"floor": 0.5},
    "in order, half hidden": {"hidden": 0.5},
}


class Listener(nn.Module):
    "A VAE for 64 pixels in a row whose decoder, with `context`, also reads the pixels before the one it predicts."

    def __init__(self, context: bool = True):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 64))
        self.look = nn.Parameter(torch.zeros(64, 64)) if context else None
        self.log_var = nn.Parameter(torch.zeros(64))

    def encode(self, x: Tensor) -> Moments:
        return Moments(*self.encoder(x).chunk(2, dim=1))

    def nats(self, x: Tensor, z: Tensor, seen: Tensor | None = None) -> Tensor:
        "-log p(x | z) of each picture; `seen` [b 64] says which pixels may be read, None: all."
        mean = self.decoder(z)
        if self.look is not None:  # row i looks at pixels 0 ... i - 1
            mean = mean + (x if seen is None else x * seen) @ self.look.tril(-1).T
        error = (x - mean) ** 2 * (-self.log_var).exp()
        return 0.5 * (error + self.log_var + math.log(2 * math.pi)).sum(1)


def digits(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    "All 1,797 pictures [n 64], noise added that fills a grey level, and what they show; the last 297 are held out."
    data = load_digits()
    grey = torch.tensor(data.images).float().flatten(1)
    return (grey + torch.rand(grey.shape, generator=generator)) / 8.5 - 1, torch.tensor(data.target)


def train(context=True, warm_up=0.0, floor=0.0, hidden=0.0, seed=0, steps=STEPS) -> tuple[Listener, list[float]]:
    "The trained network, and its rate at every tenth step."
    generator, rates = torch.Generator().manual_seed(seed), []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Listener(context)
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    data = digits(generator)[0][:1500]
    for step in range(steps):
        x = data[torch.randint(len(data), (BATCH,), generator=generator)]
        said = net.encode(x)
        seen = torch.rand(x.shape, generator=generator) >= hidden if hidden else None
        price = min(1.0, step / (warm_up * steps)) if warm_up else 1.0
        loss = net.nats(x, said.sample(generator), seen).mean() + price * free_bits(said, floor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
        if step % 10 == 0:
            rates.append(round(said.kl().mean().item(), 4))
    return net, rates


@torch.no_grad()
def score(net: Listener) -> dict[str, float]:
    "Rate, active units, -ELBO (nats) and how well the digit can be told, on the held-out digits."
    generator = torch.Generator().manual_seed(1234)
    x, shown = digits(generator)
    said = net.encode(x)
    z, unseen = said.sample(generator), Moments(said.mean[1500:], said.log_var[1500:])
    row = torch.cat([z, torch.ones(len(z), 1)], 1)
    readout = torch.linalg.lstsq(row[:1500], F.one_hot(shown[:1500], 10).float()).solution
    rate = unit_rates(unseen).sum().item()
    return {
        "rate": rate,
        "active": active_units(unseen),
        "nats": net.nats(x[1500:], z[1500:]).mean().item() + rate,
        "told": ((row[1500:] @ readout).argmax(1) == shown[1500:]).float().mean().item(),
    }


def study(names, seeds: range, steps: int, file: Path) -> None:
    "Scores and rates of every variant and seed; the file is written after each seed."
    settings, found = {"steps": steps, "batch": BATCH, "torch": torch.__version__}, {}
    for seed in seeds:
        for name in names:
            net, rates = train(**VARIANTS[name], seed=seed, steps=steps)
            entry = found.setdefault(name, {"options": VARIANTS[name], "seeds": [], "scores": [], "rates": []})
            entry["seeds"].append(seed)
            entry["scores"].append({measure: round(value, 4) for measure, value in score(net).items()})
            entry["rates"].append(rates)
            print(f"seed {seed} {name:22} {entry['scores'][-1]}", flush=True)
        file.write_text(json.dumps(settings | {"variants": found}) + "\n", encoding="utf-8")


def main() -> int:
    parser = study_parser(__doc__, VARIANTS, "variant", SEEDS, STEPS, "vae_collapse.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    study(given.only or list(VARIANTS), range(given.seeds), given.steps, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
