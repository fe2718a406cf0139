"""How often the judge is wrong, and whether it knows: on unseen renders, and on renders passed through the bundled VAE.

    .venv/bin/python bench/judge.py             1,000 scenes of either kind; writes error.json beside the judge
    .venv/bin/python bench/judge.py --scenes 100 --json FILE

For one object and for two, as rendered and decoded: the share with everything right and that of each question, near
misses that are taken for true (`evaluation.own_error`), and the calibration error, at the temperature that is fitted on
half as many other scenes. What `sd-scratch evaluate` corrects its shares with is the decoded side: run this again when
the bundled VAE or the judge has been replaced. A few minutes of one core.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from stable_diffusion_scratch.captioner import JUDGE, confidence, describe_picture, load_judge, read, truth
from stable_diffusion_scratch.captions import describe
from stable_diffusion_scratch.data import from_bytes, to_bytes
from stable_diffusion_scratch.evaluation import calibration_error, decoded, fit_temperature, own_error, share
from stable_diffusion_scratch.pipeline import StableDiffusion
from stable_diffusion_scratch.scenes import render, sample_scenes

SEED = 20_000  # of none of the scenes that anything was trained on
KINDS = {"one object": 1, "two objects": 2}


def measured(judge, pictures, scenes, temperature) -> dict:
    "`own_error` of the judge, with its calibration error as it is and at this temperature."
    shown = describe_picture(judge, pictures)
    right = torch.tensor([a == b for a, b in zip(describe(scenes), shown, strict=True)])
    raw, mended = (confidence(read(judge, pictures, temperature=t)) for t in (1.0, temperature))
    found = {
        "value": calibration_error(mended, right),
        "sure": mended.mean().item(),
        "temperature": temperature,
        "without": calibration_error(raw, right),
    }
    return own_error(judge, pictures, scenes) | {"calibration": found}


def pooled(tables: list[dict]) -> dict:
    "Shares of several tables as one; the calibration error is averaged."
    both = {}
    for name in {name: None for table in tables for name in table}:
        rows = [table[name] for table in tables if name in table]
        if name == "calibration":
            both[name] = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        else:
            right, of = (sum(row[key] for row in rows) for key in ("right", "of"))
            both[name] = share([True] * right + [False] * (of - right))
    last = ("accepts_wrong", "calibration")
    return {name: row for name, row in both.items() if name not in last} | {name: both[name] for name in last}


def study(n: int) -> dict:
    "All of it, in the layout of error.json."
    judge, vae = load_judge(), StableDiffusion.from_pretrained().vae
    looks: dict = {"rendered": {}, "decoded": {}}
    seen = {"rendered": lambda x: from_bytes(to_bytes(x)), "decoded": lambda x: from_bytes(to_bytes(decoded(vae, x)))}
    half = sample_scenes(max(n // 2, 10), torch.Generator().manual_seed(SEED), "all")
    pictures = render(half)
    heat = {look: fit_temperature(judge, see(pictures), truth(half)) for look, see in seen.items()}
    for kind, objects in KINDS.items():
        scenes = sample_scenes(n, torch.Generator().manual_seed(SEED + objects), "all", objects)
        pictures = render(scenes)
        for look, see in seen.items():
            looks[look][kind] = row = measured(judge, see(pictures), scenes, heat[look])
            print(
                f"{kind}, {look}: all right {row['all']['share']:.1%}, accepts wrong"
                f" {row['accepts_wrong']['share']:.2%}, at temperature {heat[look]:.2f} confidence off by"
                f" {row['calibration']['value']:.2%} (without: {row['calibration']['without']:.2%})",
                flush=True,
            )
    for rows in looks.values():
        rows["both"] = pooled(list(rows.values()))
    flat = {name: row for name, row in looks["rendered"]["both"].items() if name != "calibration"}
    return flat | looks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1000, help="of either kind (1000)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", default=JUDGE / "error.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.json.write_text(json.dumps(study(given.scenes), indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
