"""`book.py train` and `book.py bench`: the bundled model made anew, and its time measured beside a peer's.

Training ends with what a model card is written from, in the folder of the run: scores.json (`sd-scratch evaluate`) and
card.json (weights, how they were made, and with what).
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from dev import ROOT, Problem

CLI = [sys.executable, "-m", "stable_diffusion_scratch.cli"]


def train(options: list[str]) -> int:
    "Run `sd-scratch train` with these options; after a whole run measure the model and write its card's inputs."
    if (code := _run([*CLI, "train", *options])) or "--help" in options:
        return code
    folder = _folder(options)
    words = ["--model", str(folder / "model"), "--json", str(folder / "scores.json")]
    if code := _run([*CLI, "evaluate", "--prompts", "1000", "--seed", "1", *words]):
        return code
    (folder / "card.json").write_text(json.dumps(card(folder), indent=2) + "\n", encoding="utf-8")
    print(f"for the model card: {folder / 'scores.json'}, {folder / 'card.json'}")
    return 0


def _run(command: list[str]) -> int:
    "The exit code of a child; Ctrl-C is the child's affair, which knows what to save."
    child = subprocess.Popen(command)
    try:
        with _deaf():
            return child.wait()
    except BaseException:  # terminated: so is the child, once it has saved
        child.terminate()
        child.wait()
        raise


@contextlib.contextmanager
def _deaf():
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


def _folder(options: list[str]) -> Path:
    "Where `sd-scratch train` with these options has put the run."
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="scenes64")
    parser.add_argument("--out", "-o", type=Path)
    given = parser.parse_known_args(options)[0]
    return given.out or Path("runs") / Path(given.config).stem


def card(folder: Path) -> dict:
    "What is known of the model in folder/model: its weights, its configuration, its last losses, what made it."
    from safetensors import safe_open

    weights = {}
    for path in sorted((folder / "model").rglob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            sizes = [file.get_slice(name).get_shape() for name in file.keys()]
        weights[path.relative_to(folder / "model").as_posix()] = {
            "parameters": sum(math.prod(size) for size in sizes),
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
    if not weights:
        raise Problem(f"{folder / 'model'} holds no weights")
    return {
        "weights": weights,
        "configuration": json.loads((folder / "config.json").read_text(encoding="utf-8")),
        "loss": {path.stem: _last_losses(path) for path in sorted(folder.glob("*.csv"))},
        "commit": _git("rev-parse", "HEAD"),
        "changed since": _git("status", "--porcelain", "--untracked-files=no").splitlines(),
        "python": platform.python_version(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("stable_diffusion_scratch", "torch", "numpy")},
    }


def _last_losses(path: Path, n: int = 200) -> dict:
    "Steps, and the mean loss of the last n, from a file of lines step,loss."
    losses = [float(line.split(",")[1]) for line in path.read_text(encoding="utf-8").split()[1:]]
    return {"steps": len(losses), "last": sum(losses[-n:]) / len(losses[-n:]), "averaged over": len(losses[-n:])}


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def bench(options: list[str]) -> int:
    "Become bench/pipeline.py, or the measurement that the first word names (bench/NAME.py); the rest is passed on."
    name, rest = "pipeline", options
    if options and not options[0].startswith("-"):
        name, *rest = options
        names = sorted(path.stem for path in (ROOT / "bench").glob("[!_]*.py"))
        if name not in names:
            raise Problem(f"no measurement {name!r}; there are: {', '.join(names)}")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(ROOT / "bench" / f"{name}.py"), *rest])
