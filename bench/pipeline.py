"""How long a picture takes from prompt to pixels: this library and diffusers, on the same model folder.

    python3 book.py bench                        the bundled model (without it, a random one of the same make)
    python3 book.py bench --model FOLDER --count 4 --json FILE

Both start from the same latents, with the same steps, guidance and threads, in float32, and end with PIL images. Runs
are interleaved in pairs, in alternating order, so that what else the machine does meets both; the ratio is taken pair
by pair. Before that, both paint once (warm-up), and their pictures are compared. At the end one more run of each is
profiled: where the processor's time goes, by part of the pipeline (ours) and by kind of operation (both).
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from stable_diffusion_scratch import recipe
from stable_diffusion_scratch.pipeline import BUNDLED, INDEX, StableDiffusion
from stable_diffusion_scratch.scenes import sample_scenes
from stable_diffusion_scratch.vae import VAE, VAEConfig

PROMPT = "a large red metal sphere left of a small blue rubber cube"
OURS, THEIRS = "ours", "diffusers"
CLOCKS = ("wall", "CPU")  # seconds


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="book.py bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a diffusers folder (the bundled model)")
    parser.add_argument("--pairs", type=int, default=15, help="timed runs of each (15)")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps (20)")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale (4)")
    parser.add_argument("--count", type=int, default=1, help="pictures at a time (1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch (all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file, too")
    given = parser.parse_args()
    for name in ("pairs", "steps", "count", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)}: must be 1 or more")
    if given.model is not None and not (given.model / INDEX).is_file():
        parser.error(f"--model {given.model}: not a diffusers folder (it has no {INDEX})")
    if given.json is not None and not given.json.parent.is_dir():
        parser.error(f"--json {given.json}: there is no folder {given.json.parent}; make it first")
    return given


def random_model(folder: Path) -> Path:
    "A model of the bundled one's make with random weights: as fast, and blind."
    config = recipe.read_config()
    some = sample_scenes(1000, torch.Generator().manual_seed(0))
    tokenizer = recipe.caption_tokenizer(some, config["text"]["max_length"])
    networks = recipe.drawn(0, lambda: recipe.text_to_image_networks(config, tokenizer))
    vae = recipe.drawn(1, lambda: VAE(VAEConfig(**config["vae"])))
    StableDiffusion(networks["unet"], vae, networks["text_encoder"], tokenizer).save_pretrained(folder)
    return folder


def open_both(folder: Path) -> tuple[StableDiffusion, Callable]:
    "The folder as our pipeline and as that of diffusers, which is kept from talking meanwhile."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    return StableDiffusion.from_pretrained(folder), theirs


def clocked(paint: Callable) -> tuple[float, float]:
    "Seconds on the wall clock, and of all cores: the latter says more on a machine that others use, too."
    began = time.perf_counter(), time.process_time()
    paint()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    found = {"median": middle, "low": low, "high": high, "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def measure(folder: Path, given: argparse.Namespace) -> dict:
    "Seconds of both and their ratio, pair by pair."
    import diffusers

    ours, theirs = open_both(folder)
    prompts = [PROMPT] * given.count

    def painters(latents: torch.Tensor) -> dict[str, Callable]:
        return {
            OURS: lambda: ours(prompts, latents=latents, steps=given.steps, guidance=given.guidance),
            THEIRS: lambda: (
                theirs(prompts, latents=latents, num_inference_steps=given.steps, guidance_scale=given.guidance).images
            ),
        }

    pictures = {name: paint() for name, paint in painters(ours.noise(given.count)).items()}  # warm-up, too
    a, b = (np.stack([np.asarray(image).astype(int) for image in pictures[name]]) for name in (OURS, THEIRS))
    runs: dict[str, list[tuple[float, float]]] = {OURS: [], THEIRS: []}
    for pair in range(given.pairs):
        paint = painters(ours.noise(given.count, seed=pair))
        for name in (OURS, THEIRS) if pair % 2 == 0 else (THEIRS, OURS):
            runs[name].append(clocked(paint[name]))
    found = {
        "size": list(pictures[OURS][0].size),
        "largest difference of a pixel": int(abs(a - b).max()),
        "diffusers": diffusers.__version__,
    }
    for k, clock in enumerate(CLOCKS):
        times = {name: [run[k] for run in runs[name]] for name in runs}
        ratios = [mine / other for mine, other in zip(times[OURS], times[THEIRS], strict=True)]
        found[clock] = {**{name: spread(values) for name, values in times.items()}, "ratio": spread(ratios)}
    last = painters(ours.noise(given.count))
    found["where"] = {
        "seconds of ours": by_part(ours, last[OURS]),
        "share by operation": {name: by_kind(paint) for name, paint in last.items()},
    }
    return found | {"runs": {name: [[round(t, 4) for t in run] for run in both] for name, both in runs.items()}}


KINDS = {  # what an operation of PyTorch is called, and what kind it is; the first that fits
    "convolutions": ("conv",),
    "matrix products": ("addmm", "aten::mm", "bmm", "linear", "matmul"),
    "attention": ("attention",),
    "norms": ("norm",),
    "activations": ("silu", "gelu", "sigmoid", "softmax"),
    "copies and reshapes": (
        "copy",
        "contiguous",
        "view",
        "aten::t",
        "cat",
        "empty",
        "stride",
        "expand",
        "clone",
        "_to",
    ),
}


def by_kind(paint: Callable) -> dict[str, float]:
    "The share of each kind of operation in the time that PyTorch spends in operations."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        paint()
    shares = dict.fromkeys([*KINDS, "all else"], 0.0)
    for event in profile.key_averages():
        kind = next((k for k, names in KINDS.items() if any(n in event.key for n in names)), "all else")
        shares[kind] += event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: round(value / total, 3) for kind, value in shares.items()}


def by_part(pipe: StableDiffusion, paint: Callable, times: int = 5) -> dict[str, float]:
    "Processor seconds of one of our runs in each part of the pipeline; the medians of some runs."
    spent: dict[str, float] = {}

    def watch(part: str, function: Callable) -> Callable:
        def run(*args, **options):
            began = time.process_time()
            result = function(*args, **options)
            spent[part] = spent.get(part, 0.0) + time.process_time() - began
            return result

        return run

    unet = pipe.unet
    watched = [
        (unet, "predict", "UNet"), (unet, "embed_time", "timesteps"), (unet, "embed_context", "keys and values"),
        (pipe, "encode_prompt", "text encoder"), (pipe, "decode", "VAE decoder"),
    ]  # fmt: skip
    for thing, name, part in watched:
        object.__setattr__(thing, name, watch(part, getattr(thing, name)))
    runs = []
    try:
        for _ in range(times):
            spent.clear()
            whole = clocked(paint)[1]
            runs.append({**spent, "guidance, sampler and all else": whole - sum(spent.values())})
    finally:
        for thing, name, _ in watched:
            object.__delattr__(thing, name)
    return {part: round(float(np.median([run[part] for run in runs])), 4) for part in runs[0]}


def machine() -> dict:
    "What is measured on, and how busy it is with other work."
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"system": platform.system(), "processor": name, "cores": os.cpu_count(), "load": os.getloadavg()[0]}


def table(found: dict) -> str:
    w, h = found["size"]
    lines = [
        f"a picture from prompt to pixels: {found['model']}, {w} x {h}, DDIM, {found['steps']} steps, guidance "
        f"{found['guidance']:g}, {found['count']} at a time, {found['threads']} thread(s), float32, "
        f"{found['pairs']} pairs",
        f"{'seconds, and their ratio':<26}{'median':>8}{'quartiles':>18}{'range':>18}",
    ]
    for clock in CLOCKS:
        for name, label in {OURS: OURS, THEIRS: f"diffusers {found['diffusers']}", "ratio": "ours / diffusers"}.items():
            s = found[clock][name]
            quartiles, whole = f"{s['low']:.3f} - {s['high']:.3f}", f"{s['min']:.3f} - {s['max']:.3f}"
            lines.append(f"{clock + ', ' + label:<26}{s['median']:>8.3f}{quartiles:>18}{whole:>18}")
    lines.append(f"largest difference of a pixel between the two: {found['largest difference of a pixel']} of 255")
    parts, kinds = found["where"]["seconds of ours"], found["where"]["share by operation"]
    whole = sum(parts.values())
    lines += [
        "where ours spends its processor time",
        *(f"  {p:<32}{t:7.3f} {t / whole:7.1%}" for p, t in parts.items()),
    ]
    lines.append(f"{'time in operations, by kind':<34}{OURS:>9}{THEIRS:>12}")
    lines += [f"  {kind:<32}{kinds[OURS][kind]:9.1%}{kinds[THEIRS][kind]:12.1%}" for kind in kinds[OURS]]
    return "\n".join(lines)


def main() -> int:
    given = options()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder, name = given.model or BUNDLED, str(given.model or "the bundled model")
        if not (folder / INDEX).is_file():
            folder, name = random_model(Path(scratch) / "random"), "a random model"
        found = {
            "model": name,
            **{key: getattr(given, key) for key in ("pairs", "steps", "guidance", "count", "threads")},
            **{"python": platform.python_version(), "torch": torch.__version__, "machine": machine()},
            **measure(folder, given),
        }
    print(table(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
