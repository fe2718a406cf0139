"""What a perceptual and a patch-adversarial term buy: the bundled VAE's decoder, taught on with each, on scenes.

    .venv/bin/python bench/vae_terms.py                  all variants; writes bench/results/vae_terms.json and .png
    .venv/bin/python bench/vae_terms.py --only "squared error" both --steps 500 --seeds 3 --json FILE

All variants start from the same decoder and see the same scenes and the same samples of the (frozen) encoder's latents
in the same order; each pulls at the decoder's last layer as hard as squared error does (vae_options.adaptive_weight,
times the weight in VARIANTS). The features are those of the judge of the book, frozen. Judged are 96 unseen scenes: by
PSNR, by the distance in the judge's features (on which some variants were trained: no fair witness for those), by the
distance in the features of a network of random weights, and by how steep edges are and how much fine detail there is,
next to the original. Some minutes on one core.
"""

import hashlib
import json
import os
import sys
from copy import deepcopy
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from _study import study_parser
from PIL import Image
from torch import Tensor, nn

from stable_diffusion_scratch.captioner import load_judge
from stable_diffusion_scratch.data import to_bytes
from stable_diffusion_scratch.evaluation import psnr
from stable_diffusion_scratch.pipeline import BUNDLED, StableDiffusion
from stable_diffusion_scratch.scenes import render, sample_scenes
from stable_diffusion_scratch.vae import VAE
from stable_diffusion_scratch.vae_options import PatchCritic, adaptive_weight, critic_loss, perceptual_distance

STEPS, BATCH, SEEDS, SCENES = 160, 4, 1, 400
RATE, CRITIC_RATE, ALONE = 2e-4, 1e-3, 0.2  # Adam's rates; the critic learns alone for this share of the steps
VARIANTS = {  # weights of the perceptual and of the adversarial term; None: not taught at all
    "as bundled": None,
    "squared error": (0.0, 0.0),
    "perceptual": (1.0, 0.0),
    "adversarial": (0.0, 0.5),
    "both": (1.0, 0.5),
}
SHOWN = (0, 3, 5, 8)  # of the unseen scenes, in the picture


def pictures(n: int, seed: int) -> Tensor:
    "n scenes of all kinds: [n 3 64 64] in [-1, 1]."
    scenes = sample_scenes(n, torch.Generator().manual_seed(seed))
    return torch.cat([render(scenes[i : i + 50], 64) for i in range(0, n, 50)])


def layers_of(network: nn.Sequential):
    "What the network makes of pictures, layer by layer, as a function; its weights are frozen."
    network = deepcopy(network).requires_grad_(False).eval()

    def features(x: Tensor) -> list[Tensor]:
        found = []
        for layer in network:
            x = layer(x)
            found.append(x)
        return found

    return features


def random_network(seed: int = 7) -> nn.Sequential:
    "Three convolutions nobody has trained: a distance that no variant was taught."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        widths = (3, 32, 64, 64)
        pairs = zip(widths, widths[1:], strict=False)
        return nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.SiLU()) for a, b in pairs))


def teach(vae: VAE, weights: tuple[float, float], x: Tensor, features, seed: int, steps: int) -> VAE:
    "A copy whose decoder was taught on with these weights of the two terms."
    vae, generator = deepcopy(vae), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        critic = PatchCritic().to(memory_format=torch.channels_last)
    learned = [*vae.decoder.parameters(), *vae.from_latents.parameters()]
    optimizer = torch.optim.Adam(learned, RATE, betas=(0.5, 0.9), fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), CRITIC_RATE, betas=(0.5, 0.9), fused=True)
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / 20) * (1 - k / steps))
    for step in range(steps):
        real = x[torch.randint(len(x), (BATCH,), generator=generator)].contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            z = vae.encode(real).sample(generator)
        fake = vae.decode(z)
        loss = squared = ((fake - real) ** 2).mean()
        terms = []
        if weights[0]:
            terms.append((weights[0], perceptual_distance(features, fake, real).mean()))
        if weights[1] and step >= ALONE * steps:
            terms.append((weights[1], -critic(fake).mean()))
        for weight, value in terms:
            loss = loss + weight * adaptive_weight(squared, value, vae.decoder.conv_out.weight) * value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
        if weights[1]:
            critic_optimizer.zero_grad()
            critic_loss(critic(real), critic(fake.detach())).backward()
            critic_optimizer.step()
    return vae


def detail(x: Tensor, y: Tensor) -> dict[str, float]:
    "Of pictures y of x: steepness where x has its steepest 5 %, and power of the finest half of frequencies; x's is 1."
    slopes = [p.diff(dim=-1)[..., :-1, :].square() + p.diff(dim=-2)[..., :-1].square() for p in (x, y)]
    steep = slopes[0] >= slopes[0].flatten().sort().values[int(0.95 * slopes[0].numel())]
    frequency = torch.fft.fftfreq(x.shape[-1]).abs()
    fine = torch.maximum(frequency[:, None], frequency[None]) > 0.25
    power = [torch.fft.fft2(p).abs().square()[..., fine].sum() for p in (x, y)]
    edges = [slope[steep].sqrt().mean() for slope in slopes]
    return {"edges": (edges[1] / edges[0]).item(), "fine detail": (power[1] / power[0]).item()}


@torch.no_grad()
def score(vae: VAE, x: Tensor, features, unrelated) -> tuple[dict[str, float], Tensor]:
    "How well x comes back (one sample of the latents, the same for everyone), and what comes back."
    generator = torch.Generator().manual_seed(1234)
    y = torch.cat([vae.decode(vae.encode(part).sample(generator)) for part in x.split(16)]).clamp(-1, 1)
    found = {
        "PSNR": psnr(x, y).mean().item(),
        "judge's features": perceptual_distance(features, x, y).mean().item(),
        "random features": perceptual_distance(unrelated, x, y).mean().item(),
    }
    return found | detail(x, y), y


def study(names, seeds: range, steps: int, file: Path, n: int) -> None:
    "Scores of every variant and seed; the file is written after each, the picture after the first seed."
    vae = StableDiffusion.from_pretrained().vae.to(memory_format=torch.channels_last)
    digest = hashlib.sha256((BUNDLED / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    settings = {"steps": steps, "batch": BATCH, "scenes": n, "torch": torch.__version__, "bundled VAE": digest[:16]}
    features, unrelated = layers_of(load_judge().trunk), layers_of(random_network())
    shown, unseen, found, rows = pictures(n, 0), pictures(96, 1), {}, []
    rows.append(unseen[list(SHOWN)])
    for seed in seeds:
        for name in names:
            if VARIANTS[name] is None and seed != seeds[0]:
                continue
            taught = vae if VARIANTS[name] is None else teach(vae, VARIANTS[name], shown, features, seed, steps)
            scores, back = score(taught, unseen, features, unrelated)
            entry = found.setdefault(name, {"weights": VARIANTS[name], "seeds": [], "scores": []})
            entry["seeds"].append(seed)
            entry["scores"].append({measure: round(value, 5) for measure, value in scores.items()})
            print(f"seed {seed} {name:16} {entry['scores'][-1]}", flush=True)
            if seed == seeds[0]:
                rows.append(back[list(SHOWN)])
            file.write_text(json.dumps(settings | {"variants": found}, indent=1) + "\n", encoding="utf-8")
    sheet = torch.cat([torch.cat(list(row), -1) for row in rows], -2)  # [3 rows*64 shown*64]
    Image.fromarray(to_bytes(sheet).permute(1, 2, 0).numpy()).save(file.with_suffix(".png"), optimize=True)


def main() -> int:
    parser = study_parser(__doc__, VARIANTS, "variant", SEEDS, STEPS, "vae_terms.json")
    parser.add_argument("--scenes", type=int, default=SCENES, help=f"scenes to learn from ({SCENES})")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    study(given.only or list(VARIANTS), range(given.seeds), given.steps, given.json, given.scenes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
