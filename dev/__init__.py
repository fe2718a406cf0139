"""The tools behind `book.py`: they run in the environment that `book.py` keeps, and only there.

`chapters` finds and executes notebooks, `export` makes the package and README.md from them, `refresh` stores
outputs, `edit` opens a notebook as plain text and brings it back, `check` is `book.py test`, `read` serves the book.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
CACHE = ROOT / ".cache"
PACKAGE = "stable_diffusion_scratch"


class Problem(Exception):
    "What went wrong and what to do about it, in a line or two: printed without a traceback."
