"""How much of a recipe's outcome is luck: `recipe.make`, shortened and at half the width, with three seeds, and two
ways of drawing the times of a batch (uniform, stratified: one in each of as many equal slots).

    .venv/bin/python bench/recipe.py                   writes bench/results/recipe.json; an hour of one core
    .venv/bin/python bench/recipe.py --steps 100 --seeds 1 --json FILE
    .venv/bin/python bench/recipe.py --only uniform-0 stratified-0     these runs: a way and a seed
    .venv/bin/python bench/recipe.py --folder runs/spread              keep everything there, and go on from there

Scenes and their latents (of the bundled autoencoder) are the same for all; a seed draws the first weights, the batches,
the captions and the noise of the text encoder's school and of the UNet. Both ways of a seed share the text encoder.
Judged are averaged weights on 200 unseen scenes (error of v given the true caption, at the same 20 times with the same
noise for all), for averages of several relative widths chosen after the run, and, for the width that is best in the
mean over all runs, prompts of one object: the share of 150 pictures in which the judge finds each thing right.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from _study import study_parser

from stable_diffusion_scratch.captioner import load_judge
from stable_diffusion_scratch.captions import captions
from stable_diffusion_scratch.denoisers import simple_loss
from stable_diffusion_scratch.evaluation import prompt_accuracy, prompt_set
from stable_diffusion_scratch.pipeline import StableDiffusion
from stable_diffusion_scratch.recipe import TIMES, make, read_config
from stable_diffusion_scratch.samplers import last
from stable_diffusion_scratch.scenes import render, sample_scenes
from stable_diffusion_scratch.training import mix, step_generator

STEPS, SEEDS, PROMPTS = 1200, 3, 150
WIDTHS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)  # of averages, as shares of the run


def plan(seed: int, times: str, steps: int) -> dict:
    "The configuration of the bundled model, made short and narrow."
    config = read_config()
    config["data"]["scenes"] = 4000
    config["unet"] |= {"channels": [32, 64]}
    config["text_training"] |= {"steps": steps // 3, "seed": 30 + seed}
    config["unet_training"] |= {
        "steps": steps, "rate": 1e-3, "seed": 20 + seed, "times": times,
        "widths": [0.05, 0.1], "snapshots": max(steps // 12, 1),
    }  # fmt: skip
    return config


def made(folder: Path, seed: int, times: str, steps: int, vae) -> Path:
    "The folder of this run, which begins with what other runs have made already."
    own = folder / f"{times}-{seed}"
    own.mkdir(parents=True, exist_ok=True)
    (folder / "scenes").mkdir(exist_ok=True)
    if not (own / "scenes").exists():
        (own / "scenes").symlink_to((folder / "scenes").resolve())
    for name, owner in (("latents.safetensors", "*"), ("text.safetensors", f"*-{seed}")):
        if not (own / name).exists() and (found := sorted(folder.glob(f"{owner}/{name}"))):
            shutil.copyfile(found[0], own / name)
    for progress in make(plan(seed, times, steps), own, vae=vae):
        if progress.step % 100 == 0:
            print(f"{own.name}: {progress.stage} {progress.step} of {progress.steps}", flush=True)
    return own


@torch.no_grad()
def error(pipe: StableDiffusion, scenes, latents) -> float:
    "Mean squared error of v for the true captions, at 20 times, with noise that is the same for all."
    context, found = pipe.encode_prompt(captions(scenes, step_generator(50, 0))), []
    for k in range(20):
        t = torch.full((len(latents),), 25.0 + 50 * k)
        found.append(simple_loss(pipe.unet, pipe.process, latents, context, "v", t, step_generator(50, 1 + k)))
    return torch.stack(found).mean().item()


def averages(own: Path, widths=WIDTHS) -> dict[float, dict]:
    "The UNet's weights, averaged with these widths, from the snapshots of the run."
    files = sorted((own / "unet-averages").glob("*.safetensors"))
    return {w: {k[5:]: v for k, v in mix(files, w).items() if k.startswith("unet.")} for w in widths}


def study(given, folder: Path) -> dict:
    "Everything, in the layout of the file."
    bundled, judge = StableDiffusion.from_pretrained(), load_judge()
    unseen = sample_scenes(200, step_generator(50, 100))
    with torch.no_grad():
        latents = bundled.vae.scale(bundled.vae.encode(render(unseen)).mean)
    prompts, means = prompt_set(PROMPTS, 1, 50, "train")
    runs = {}
    for name in given.only or [f"{times}-{seed}" for seed in range(given.seeds) for times in TIMES]:
        times, seed = name.split("-")
        own = made(folder, int(seed), times, given.steps, bundled.vae)
        pipe = StableDiffusion.from_pretrained(own / "model")
        row = {"times": times, "seed": int(seed), "decay": error(pipe, unseen, latents), "widths": {}}
        for width, weights in averages(own).items():
            pipe.unet.load_state_dict(weights, strict=False)
            row["widths"][width] = error(pipe, unseen, latents)
        runs[own] = row
        print(json.dumps(row), flush=True)
    best = min(WIDTHS, key=lambda w: sum(row["widths"][w] for row in runs.values()))
    for own, row in runs.items():
        pipe = StableDiffusion.from_pretrained(own / "model")
        pipe.unet.load_state_dict(averages(own, [best])[best], strict=False)
        pictures = pipe.finish(last(pipe.steps(prompts, steps=20, seed=50)))
        row["prompts"] = prompt_accuracy(pictures, means, judge)
        print(own.name, {name: round(part["share"], 3) for name, part in row["prompts"].items()}, flush=True)
    settings = {"steps": given.steps, "unet channels": [32, 64], "best width": best, "torch": torch.__version__}
    return settings | {"runs": list(runs.values())}


def main() -> int:
    names = [f"{times}-{seed}" for seed in range(10) for times in TIMES]
    parser = study_parser(__doc__, names, "run", SEEDS, STEPS, "recipe.json")
    parser.add_argument("--folder", type=Path, help="keep scenes, latents and runs here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        found = study(given, given.folder or Path(scratch))
    given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
