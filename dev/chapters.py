"""Chapters: find them, know what each depends on, execute each in a process of its own, and keep the runs.

A run is kept in `.cache/runs/` under a key made of the chapter's code cells, the package modules it imports (and
those that they import), the package's data files and the versions of Python and the libraries. The copy that the site
shows, today's text with the outputs of that run, is `.cache/executed/<name>.ipynb`.
"""

import ast
import hashlib
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nbformat

from book import locked
from dev import CACHE, NBS, PACKAGE, ROOT, Problem, notebooks

EXECUTED = CACHE / "executed"
RUNS = CACHE / "runs"
LIBRARIES = ("torch", "numpy", "matplotlib", "scikit-learn", "ipywidgets", "einops", "jaxtyping")
AT_ONCE = 4  # chapters at most; each takes a core and up to a gigabyte
RUNNING: set[subprocess.Popen] = set()  # their processes
NAMED = re.compile(rf"\b{PACKAGE}\.(\w+)")


@dataclass
class Run:
    "How the execution of a chapter went."

    name: str
    seconds: float
    cached: bool
    failure: str | None = None


def name_of(path: Path) -> str:
    "'04_ddim' or 'solutions/04_ddim'."
    return path.relative_to(NBS).with_suffix("").as_posix()


def find(solutions: bool = False) -> list[Path]:
    "The chapters in reading order, index first; with `solutions`, the solutions after them."
    pages = sorted(NBS.glob("*.ipynb"), key=lambda p: (p.stem != "index", p.stem))
    return pages + (sorted((NBS / "solutions").glob("*.ipynb")) if solutions else [])


def path_of(name: str, may_be_new: bool = False) -> Path:
    "The notebook meant by '04', '04_ddim', 'solutions/04' or a path; a `Problem` names the choices."
    wanted = re.sub(r"^(\./)?nbs/", "", re.sub(r"\.(ipynb|py)$", "", name))
    known = find(solutions=True)
    for path in known:
        if name_of(path) == wanted or re.fullmatch(rf"{re.escape(wanted)}_\w+", name_of(path)):
            return path
    new = re.fullmatch(r"(solutions/)?(\d\d[a-z]?_[a-z0-9_]+|index)", wanted)
    if may_be_new and new:
        return NBS / f"{wanted}.ipynb"
    hint = "; a new chapter needs its full name, for example 05_solvers" if may_be_new else ""
    raise Problem(f"no chapter {name!r}; there are: {', '.join(map(name_of, known)) or 'none yet'}{hint}")


def select(names: Iterable[str], solutions: bool = False) -> list[Path]:
    "The notebooks named, or all of them if none is named."
    return [path_of(name) for name in names] or find(solutions)


# --- what a chapter depends on ---------------------------------------------------------------------------------------


def _imports(source: str, where: Path | None = None) -> set[str]:
    "Names of the package's modules that Python `source` imports or names; `where` resolves relative imports."
    found = set(NAMED.findall(source))
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            inside = node.level and where is not None
            if inside and node.module:
                found.add(node.module.split(".")[0])
            elif inside or node.module == PACKAGE:
                found |= {alias.name for alias in node.names}
    return found


def modules_of(path: Path) -> list[Path]:
    "The package's files that the notebook's run depends on: modules, followed through their imports, and data."
    package = ROOT / PACKAGE
    wanted = set().union(
        *(_imports(notebooks.plain(c.source)) for c in notebooks.code_cells(notebooks.read(path))), {"__init__"}
    )
    seen: set[Path] = set()
    while wanted:
        name = wanted.pop()
        for file in (package / f"{name}.py", *(package / name).glob("**/*.py")):
            if file.is_file() and file not in seen:
                seen.add(file)
                wanted |= _imports(file.read_text(encoding="utf-8"), file)
    data = (p for p in package.rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"})
    return sorted(seen) + sorted(data)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def key_of(path: Path) -> str:
    "The key of the chapter's run: two runs with the same key give the same outputs."
    digest = hashlib.sha256()
    cells = [c.source for c in notebooks.code_cells(notebooks.read(path))]
    digest.update(repr((name_of(path), cells, platform.python_version(), sys.platform)).encode())
    digest.update(repr([(name, _version(name)) for name in LIBRARIES]).encode())
    for file in modules_of(path):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:24]


# --- running ---------------------------------------------------------------------------------------------------------


def _run_file(path: Path, key: str) -> Path:
    return RUNS / f"{name_of(path).replace('/', '-')}-{key}.ipynb"


def executed_file(path: Path) -> Path:
    return EXECUTED / f"{name_of(path)}.ipynb"


def _environment() -> dict[str, str]:
    "A kernel's environment: this environment's kernel, no habits of the user's own, one thread that does not spin."
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "JUPYTER_PREFER_ENV_PATH": "1", "PYTHONHASHSEED": "0"}
    quiet |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # the same sums on every machine; and two run at once
    return {**os.environ, **quiet, "IPYTHONDIR": str(CACHE / "ipython"), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


def _process(path: Path, out: Path) -> str | None:
    "Execute in a process of its own; None or the failure."
    command = [sys.executable, "-m", "dev.execute", str(path), str(out)]
    child = subprocess.Popen(command, cwd=ROOT, env=_environment(), stderr=subprocess.PIPE, text=True)
    RUNNING.add(child)
    try:
        _, errors = child.communicate()
    except BaseException:  # Ctrl-C, where the chapter runs in the main thread
        _end([child])
        raise
    finally:
        ended = child not in RUNNING
        RUNNING.discard(child)
    if ended or child.returncode in (-signal.SIGINT, 128 + signal.SIGINT):
        raise KeyboardInterrupt
    if child.returncode:
        return errors.rstrip() or f"  the process ended with code {child.returncode}"
    return None


def _end(children: Iterable[subprocess.Popen]) -> None:
    "Give each kernel a moment to end, then end it."
    children = list(children)
    for child in children:
        RUNNING.discard(child)
        child.terminate()
    for child in children:
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            child.kill()


def execute(path: Path, fresh: bool = False) -> Run:
    "Bring the executed copy of the chapter up to date, from the kept run if there is one and `fresh` is not asked."
    began, name = time.monotonic(), name_of(path)
    if not any(notebooks.runs(cell) for cell in notebooks.read(path).cells):
        notebooks.write_text(path.read_text(encoding="utf-8"), executed_file(path))
        return Run(name, time.monotonic() - began, cached=True)
    with locked(CACHE / "locks" / f"{name.replace('/', '-')}.lock", f"another book.py runs {name}; waiting for it"):
        kept = _run_file(path, key_of(path))
        cached = kept.exists() and not fresh
        if not cached:
            failure = _process(path, kept)
            if failure:
                executed_file(path).unlink(missing_ok=True)
                return Run(name, time.monotonic() - began, cached=False, failure=failure)
            _forget_older(kept)
        result = notebooks.with_outputs(notebooks.read(path), notebooks.read(kept))
        notebooks.write_text(nbformat.writes(result), executed_file(path))
    return Run(name, time.monotonic() - began, cached)


def _forget_older(kept: Path) -> None:
    "Keep the last three runs of a chapter."
    stem = kept.stem.rsplit("-", 1)[0]
    alike = [p for p in RUNS.glob(f"{stem}-*.ipynb") if p.stem.rsplit("-", 1)[0] == stem]
    for old in sorted(alike, key=lambda p: p.stat().st_mtime)[:-3]:
        old.unlink(missing_ok=True)


def run_all(paths: list[Path], fresh: bool = False, after=None) -> list[Run]:
    """Execute `paths`, as many at once as there are cores (four at most), with a line for each when it is done;
    `after(run)` is called after each. The runs come back in the order of `paths`."""
    width, digits = max((len(name_of(p)) for p in paths), default=0), len(str(len(paths)))
    with ThreadPoolExecutor(max(1, min(AT_ONCE, os.cpu_count() or 1))) as pool:
        waiting = [pool.submit(execute, path, fresh) for path in paths]
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                run = done.result()
                state = "failed" if run.failure else "unchanged, from the cache" if run.cached else "executed"
                line = f"  [{number:>{digits}}/{len(paths)}] {run.name:<{width}} {run.seconds:7.1f} s  {state}"
                print(line + (f"\n{run.failure}" if run.failure else ""), flush=True)
                if after:
                    after(run)
        except BaseException:  # Ctrl-C: none begins any more, those that run end
            pool.shutdown(wait=False, cancel_futures=True)
            _end(RUNNING)
            raise
    return [done.result() for done in waiting]
