"""What the studies of this folder share on their command lines: which variants, seeds and steps, threads, the file."""

import argparse
from collections.abc import Collection
from pathlib import Path


def study_parser(
    doc: str, names: Collection[str], what: str, seeds: int, steps: int, file: str
) -> argparse.ArgumentParser:
    "Options --only (names, each a `what`), --seeds, --steps, --threads, --json (results/`file`); a study adds its own."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, metavar=what.upper(), help=f"these {what}s alone")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"trainings of each ({seeds})")
    parser.add_argument("--steps", type=int, default=steps, help=f"steps of each ({steps})")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path(__file__).parent / "results" / file)
    return parser
