"""Ten captions learnt from the digits (`sd-scratch train --config digits`): how long that takes, and how well it goes.

    .venv/bin/python bench/digits_captions.py --json bench/results/digits_captions.json

Trains in a folder of its own (or goes on in --out), paints 500 captions and has them read, as `sd-scratch evaluate
--judge digits` does. Seconds are of the processor, on one thread: what a quiet machine's clock would say, whoever else
uses this one.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from stable_diffusion_scratch import cli


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits", help="a configuration with [data] set = digits")
    parser.add_argument("--prompts", type=int, default=500, help="captions that are painted and read (500)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep the model here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file, too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        out, report = given.out or Path(scratch) / "digits", Path(scratch) / "found.json"
        seconds = {}
        for name, words in (
            ("train", ["train", "--config", given.config, "--out", str(out)]),
            (
                "evaluate",
                ["evaluate", "--model", str(out / "model"), "--judge", "digits"]
                + ["--prompts", str(given.prompts), "--json", str(report)],
            ),
        ):
            began = time.process_time()
            if code := cli.main(words):
                return code
            seconds[name] = round(time.process_time() - began, 1)
        found = json.loads(report.read_text()) | {
            "model": given.config,
            "CPU seconds on one thread": seconds,
            "torch": torch.__version__,
            "system": f"{platform.system()}, {os.cpu_count()} cores",
        }
    print(f"processor seconds on one thread: {seconds}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
