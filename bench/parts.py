"""Time each part of the pipeline, this library's beside its peer's (diffusers, transformers), with the same weights.

    python3 book.py bench parts                        UNet, VAE, text encoder: forward, and forward with backward
    python3 book.py bench parts --pairs 40 --only "UNet, forward" --json FILE

Parts are of Stable Diffusion 1's make at a quarter of its width, with random weights loaded into both by name; their
outputs are compared first. Runs are interleaved in pairs, in alternating order, and the ratio is taken pair by pair, so
that what else the machine does meets both. The bound is a confidence interval of the median ratio from its order
statistics, which asks nothing of the distribution. A part counts as slower if the whole interval lies above 1.
"""

import argparse
import gc
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from pipeline import CLOCKS, clocked, machine
from torch import Tensor, nn

from stable_diffusion_scratch import text, unet, vae

OURS, THEIRS, CONFIDENCE = "ours", "peer", 0.95


class Pair(NamedTuple):
    "One part in both libraries: what is called, and the module whose gradients it fills."

    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    modules: tuple[nn.Module, nn.Module]
    backward: bool


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def bare(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if not name.startswith("_")}


def both(ours: nn.Module, theirs: nn.Module, load: Callable, settings: argparse.Namespace) -> tuple:
    "The peer's weights in ours; both in the same memory format."
    load(ours, theirs.state_dict())
    form = torch.channels_last if settings.channels_last else torch.contiguous_format
    return tuple(module.eval().to(memory_format=form) for module in (ours, theirs))


def unets(settings: argparse.Namespace) -> dict[str, tuple]:
    from diffusers import UNet2DConditionModel

    config = unet.UNetConfig(channels=(64, 128, 256, 256), context_channels=192)
    peer = UNet2DConditionModel(**bare(unet.to_diffusers(config)))
    mine, peer = both(unet.UNet(config), peer, unet.load_diffusers, settings)
    x, t, words = randn(2, 4, 16, 16), torch.tensor(500), randn(2, 77, 192)
    calls = lambda: mine(x, t, words), lambda: peer(x, t, encoder_hidden_states=words).sample
    return {"UNet": (*calls, (mine, peer))}


def vaes(settings: argparse.Namespace) -> dict[str, tuple]:
    from diffusers import AutoencoderKL

    config = vae.VAEConfig(channels=(32, 64, 128, 128))
    peer = AutoencoderKL(**bare(vae.to_diffusers(config)))
    mine, peer = both(vae.VAE(config), peer, vae.load_diffusers, settings)
    x, z = randn(1, 3, 128, 128), randn(1, 4, 16, 16)
    encode = lambda: mine.encode(x).mean, lambda: peer.encode(x).latent_dist.mean
    decode = lambda: mine.decode(z), lambda: peer.decode(z).sample
    return {"VAE encoder": (*encode, (mine, peer)), "VAE decoder": (*decode, (mine, peer))}


def text_encoders(settings: argparse.Namespace) -> dict[str, tuple]:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = text.TextConfig(width=192, heads=3, mlp_width=768)
    fields = bare(text.to_diffusers(config))
    peer = CLIPTextModel(CLIPTextConfig(**{k: v for k, v in fields.items() if k != "architectures"}))
    mine, peer = both(text.TextEncoder(config), peer, text.load_diffusers, settings)
    ids = torch.randint(0, 49000, (2, 77), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = config.start_id, config.end_id
    calls = lambda: mine(ids), lambda: peer(ids).last_hidden_state
    return {"text encoder": (*calls, (mine, peer))}


def pairs(settings: argparse.Namespace) -> dict[str, Pair]:
    "All parts, forward and forward with backward."
    found = {}
    for name, part in (unets(settings) | vaes(settings) | text_encoders(settings)).items():
        found[f"{name}, forward"] = Pair(*part, backward=False)
        found[f"{name}, forward and backward"] = Pair(*part, backward=True)
    return found


def runner(call: Callable[[], Tensor], module: nn.Module, backward: bool) -> Callable[[], Tensor]:
    "The call as it is timed: without gradients, or with those of all weights."

    def run() -> Tensor:
        if not backward:
            with torch.no_grad():
                return call()
        module.zero_grad()
        y = call()
        y.square().mean().backward()
        return y.detach()

    return run


def bound(ratios: list[float], confidence: float = CONFIDENCE) -> dict[str, float]:
    """The median, and the closest pair of order statistics that hold the true median with at least this probability,
    whatever the distribution (an interval from the sign test); all of the range where there are too few."""
    values, n = sorted(ratios), len(ratios)
    k, tail = 0, 0.5**n  # the chance that at most k of n lie below the median
    while k + 1 <= (n - 1) // 2 and 2 * (tail + math.comb(n, k + 1) * 0.5**n) <= 1 - confidence:
        k += 1
        tail += math.comb(n, k) * 0.5**n
    middle = (values[(n - 1) // 2] + values[n // 2]) / 2
    return {"median": round(middle, 4), "low": round(values[k], 4), "high": round(values[n - 1 - k], 4)}


def measure(run: dict[str, Callable], count: int) -> dict:
    "Interleaved runs of two calls: median seconds of each, and their ratio with its bound, for both clocks."
    runs: dict[str, list] = {name: [] for name in run}
    names = list(run)
    for call in run.values():  # warm-up
        call()
    gc.collect()
    gc.disable()
    for pair in range(count):
        for name in names if pair % 2 == 0 else names[::-1]:
            runs[name].append(clocked(run[name]))
    gc.enable()
    found = {}
    for k, clock in enumerate(CLOCKS):
        times = {name: [r[k] for r in runs[name]] for name in names}
        ratios = [a / b for a, b in zip(times[names[0]], times[names[1]], strict=True)]
        medians = {name: round(sorted(values)[len(values) // 2], 5) for name, values in times.items()}
        found[clock] = {"seconds": medians, "ratio": bound(ratios)}
    return found


def savings(settings: argparse.Namespace) -> dict:
    """What it saves to compute the text's keys and values and the timesteps' embeddings once for a trajectory of 20
    steps: one small picture with guidance, as the bundled model paints it."""
    config = unet.UNetConfig(
        in_channels=8, out_channels=8, channels=(64, 128), layers=1, depth=(1, 1), heads=(4, 4),
        context_channels=128, groups=16, sample_size=16,
    )  # fmt: skip
    net = unet.UNet(config).eval()
    x, words, steps = randn(2, 8, 16, 16), randn(2, 32, 128), torch.arange(999, 0, -50)

    @torch.no_grad()
    def once():
        memory, shifts = net.embed_context(words), net.embed_time(steps)
        for k in range(len(steps)):
            y = net.predict(x, [shift[k : k + 1] for shift in shifts], memory)
        return y

    @torch.no_grad()
    def every_step():
        for t in steps:
            y = net(x, t, words)
        return y

    a, b = once(), every_step()
    error = ((a - b).norm() / b.norm()).item()
    return {"relative difference": error} | measure({"once": once, "every step": every_step}, settings.pairs)


def compare(settings: argparse.Namespace) -> dict:
    "Every part that was asked for: agreement of the outputs, times, verdict."
    found = {}
    for name, pair in pairs(settings).items():
        if settings.only and name not in settings.only:
            continue
        run = {
            which: runner(call, module, pair.backward)
            for which, call, module in zip((OURS, THEIRS), (pair.ours, pair.theirs), pair.modules, strict=True)
        }
        a, b = run[OURS](), run[THEIRS]()
        found[name] = {"relative difference": ((a - b).norm() / b.norm()).item()} | measure(run, settings.pairs)
        found[name]["slower beyond the bound"] = found[name]["CPU"]["ratio"]["low"] > 1
        print(line(name, found[name], OURS, THEIRS), flush=True)
    return found


def line(name: str, found: dict, first: str, second: str) -> str:
    s, r, w = found["CPU"]["seconds"], found["CPU"]["ratio"], found["wall"]["ratio"]
    return (
        f"{name:36}{first} {s[first]:7.3f} s, {second} {s[second]:7.3f} s CPU; ratio {r['median']:.3f} "
        f"[{r['low']:.3f}, {r['high']:.3f}], wall {w['median']:.3f} [{w['low']:.3f}, {w['high']:.3f}]"
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="book.py bench parts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=25, help="timed runs of each (25)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--only", action="append", metavar="PART", help='for example "UNet, forward"; more than once')
    parser.add_argument("--channels-last", action="store_true", help="both in that memory format")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file, too")
    given = parser.parse_args()
    for name in ("pairs", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)}: must be 1 or more")
    if given.json is not None and not given.json.parent.is_dir():
        parser.error(f"--json {given.json}: there is no folder {given.json.parent}; make it first")
    return given


def peers() -> dict[str, str]:
    "Versions of the peers, which are kept from talking meanwhile."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import transformers
    transformers.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    return {"diffusers": diffusers.__version__, "transformers": transformers.__version__, "torch": torch.__version__}


def main() -> int:
    given = options()
    torch.set_num_threads(given.threads)
    found = {
        **{key: getattr(given, key) for key in ("pairs", "threads", "channels_last")},
        **{"confidence": CONFIDENCE, "python": platform.python_version(), **peers(), "machine": machine()},
    }
    found["parts"] = compare(given)
    unknown = set(given.only or ()) - found["parts"].keys() - {"savings"}
    if unknown:
        print(f"book.py bench parts: error: --only {unknown.pop()!r}: no such part", file=sys.stderr)
        return 2
    if not given.only or "savings" in given.only:
        found["savings"] = savings(given)
        print(line("text and times: once", found["savings"], "once", "every step"))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
