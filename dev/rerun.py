"""A chapter executed in this process, to go on from any of its cells in a fork: for what runs it hundreds of times."""

import ast
import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
import types
from pathlib import Path

from nbformat import NotebookNode

from dev import Problem, chapters, equations, notebooks


def forked(work, cpu: float = 36_000, quiet: bool = True):
    "What `work()` returns (as JSON) in a fork of this process, or a string that says why it returned nothing."
    sys.stdout.flush()
    ear, mouth = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(ear)
            resource.setrlimit(resource.RLIMIT_CPU, (int(cpu) + 1, int(cpu) + 6))
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2) if quiet else (1,):
                os.dup2(nowhere, stream)
            with os.fdopen(mouth, "w") as pipe:
                json.dump(work(), pipe)
        except Problem as problem:
            print(problem, file=sys.stderr, flush=True)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(mouth)
    said, end = b"", time.monotonic() + 20 * cpu + 60  # who sleeps uses no CPU
    try:
        while select.select([ear], [], [], max(0.0, end - time.monotonic()))[0] and (more := os.read(ear, 1 << 20)):
            said += more
    finally:
        os.close(ear)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return json.loads(said) if said else "ended or ran too long"


def label_of(cell: NotebookNode) -> str:
    "The results that a cell checks, or ''."
    return ", ".join(name for names, _ in equations.checks(NotebookNode(cells=[cell])) for name in names)


def stub_figures() -> None:
    "Render nothing that nobody sees, and write no file; sliders are widgets with empty pictures."
    import matplotlib.pyplot as plt

    from stable_diffusion_scratch import plotting

    plt.Figure.savefig = lambda *args, **kwargs: None
    plt.show = lambda *args, **kwargs: plt.close("all")
    slider = plotting.slider
    plotting.to_png = lambda *args, **kwargs: b""
    plotting.slider = lambda draw, *args, **kwargs: slider(lambda value: None, *args, **kwargs)
    plotting.save_gif = lambda *args, **kwargs: None


class Chapter:
    "A chapter being executed in this process, statement by statement."

    def __init__(self, path: Path):
        self.cells = [c for c in notebooks.code_cells(notebooks.read(path)) if notebooks.runs(c)]
        self.name = chapters.name_of(path)
        self.module = sys.modules["__main__"] = types.ModuleType("__main__")
        self.module.display = lambda *args, **kwargs: None
        os.chdir(path.parent)
        stub_figures()

    def run(self, source: str) -> list[str]:
        "Execute a cell; the names of the exceptions that its statements raised ('AssertionError', ...)."
        raised = []
        for statement in ast.parse(notebooks.plain(source)).body:
            try:
                exec(compile(ast.Module([statement], []), "<cell>", "exec"), self.module.__dict__)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # pytest's own failures are no `Exception`s
                raised.append(type(error).__name__)
        return raised

    def rest(self, first: int, source: str, thorough: bool) -> list[str]:
        "Go on from cell `first`, changed to `source`: the checks that fail (the first alone unless `thorough`)."
        noticed: list[str] = []
        for i, cell in enumerate(self.cells[first:], first):
            raised = self.run(source if i == first else cell.source)
            if "AssertionError" in raised:
                noticed.append(label_of(cell) or "another assertion")
            elif raised and not noticed:
                noticed.append(f"error: {raised[0]}")
            if noticed and (noticed[0].startswith("error") or not thorough):
                break
        return noticed
