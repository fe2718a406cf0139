"""How much memory a training call of Stable Diffusion 1.5's UNet has alive at once, with checkpointing and without.

    .venv/bin/python bench/unet_memory.py                 writes bench/results/unet_memory.json
    .venv/bin/python bench/unet_memory.py --batch 1 --json FILE

Counted on PyTorch's fake tensors, which know their sizes and hold nothing (unlike those on the meta device they also
know by which kernel attention would run on a CPU). The weights themselves are not counted, their gradients are.
"""

import argparse
import json
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stable_diffusion_scratch.layers import peak_bytes
from stable_diffusion_scratch.unet import UNet, UNetConfig

CALLS = {"plain": False, "checkpointing": True}


def measure(config: UNetConfig, batch: int) -> dict[str, int]:
    "Peak bytes of a call and its way back in float32, on latents of the size that the model was trained on."
    with FakeTensorMode():
        side, net = config.sample_size, UNet(config)
        x, t = torch.rand(batch, config.in_channels, side, side), torch.rand(batch)
        text = torch.rand(batch, 77, config.context_channels)
        peaks = {}
        for name, way in CALLS.items():
            net.checkpointing = way
            net.zero_grad()
            peaks[name] = peak_bytes(lambda: net(x, t, text).square().mean().backward())
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    results = Path(__file__).parent / "results"
    parser.add_argument("--json", type=Path, metavar="FILE", default=results / "unet_memory.json")
    options = parser.parse_args()
    found = {"model": "sd15", "batch": options.batch, "torch": torch.__version__.split("+")[0]}
    found |= {"bytes": measure(UNetConfig.sd15(), options.batch)}
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
