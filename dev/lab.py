"""`book.py lab`: JupyterLab on the chapters."""

import os
import sys

from dev import NBS


def main(options: list[str]) -> int:
    "Become JupyterLab, opened on nbs/; `options` are passed on."
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={NBS}", *options]
    sys.stdout.flush()
    os.execv(sys.executable, command)
