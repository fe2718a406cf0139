"""`book.py test`: everything that is checked, step by step, each with its time; all steps run, then a summary.

--fast   lint, notebooks in step, chapters that changed, quick tests
(plain)  all chapters and solutions (unchanged ones from the cache), tests, the site and its links
--full   also the tests marked `slow` or `full`, and the mutants of Part I
"""

import hashlib
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass

from dev import CACHE, ROOT, Problem, chapters, equations, export, refresh

BUDGET = 40  # seconds of a chapter on two quiet cores
LEFT_OUT = {"fast": "not daily and not slow and not full", "plain": "not slow and not full", "full": ""}
NOT_FAST = ("test_site.py", "test_lab.py", "test_package.py")  # browsers and builds
REPORT = CACHE / "pytest.xml"


@dataclass
class Result:
    "How a step went."

    title: str
    seconds: float
    problems: list[str]


# --- the steps: each returns what is wrong, a line (or a few) per problem --------------------------------------------


def lint() -> list[str]:
    commands = {"ruff check": ["check", "--output-format", "concise"], "ruff format": ["format", "--check"]}
    wrong = []
    for title, options in commands.items():
        done = subprocess.run([sys.executable, "-m", "ruff", *options, "-q"], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            wrong.append(f"{title}:\n{_indented(done.stdout + done.stderr)}")
    return wrong


def in_step() -> list[str]:
    too_large = refresh.size_problem()
    return export.problems() + ([too_large] if too_large else [])


def equation_coverage() -> list[str]:
    book = equations.book()
    print(f"  {equations.coverage(book)}")
    return equations.problems(book)


def run_chapters() -> list[str]:
    before = _assets()
    runs = chapters.run_all(chapters.find(solutions=True))
    for run in runs:
        if not run.cached and run.seconds > BUDGET:
            print(f"  note: {run.name} took {run.seconds:.0f} s; a chapter has {BUDGET} s on two quiet cores")
    for name in sorted(name for name, content in _assets().items() if before.get(name) != content):
        print(f"  note: running the chapters changed assets/{name}; commit it, or make it the same each time")
    return [f"{run.name} failed (above)" for run in runs if run.failure] or ([] if runs else ["there are no chapters"])


def pytest(depth: str) -> list[str]:
    "The tests, some files side by side, one thread each: most are too small for a second thread."
    workers = min(4, os.cpu_count() or 1)
    command = [sys.executable, "-m", "pytest", f"--junitxml={REPORT}", "-m", LEFT_OUT[depth]]
    command += ["-n", str(workers), "--dist", "loadfile"]
    if depth == "fast":
        command += [f"--ignore=tests/{name}" for name in NOT_FAST]
    REPORT.unlink(missing_ok=True)
    code = subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode
    return [f"pytest ended with exit code {code} (above)"] if code else []


def mutants() -> list[str]:
    from dev import mutate

    return mutate.check()


def build_site() -> list[str]:
    from dev import read, site

    read.build(executed=True)
    return site.check_links(site.HTML)


# --- running them ----------------------------------------------------------------------------------------------------


def _indented(text: str, limit: int = 40) -> str:
    lines = text.strip().splitlines()
    more = [f"... and {len(lines) - limit} lines more"] if len(lines) > limit else []
    return "\n".join(f"    {line}" for line in lines[:limit] + more)


def _assets() -> dict[str, str]:
    files = (p for p in (ROOT / "assets").rglob("*") if p.is_file())
    return {p.relative_to(ROOT / "assets").as_posix(): hashlib.md5(p.read_bytes()).hexdigest() for p in files}


def step(title: str, number: str, run: Callable[[], list[str]]) -> Result:
    "Run one step; a `Problem` it raises is one of its problems, anything else a bug that ends the run."
    print(f"[{number}] {title}", flush=True)
    began = time.monotonic()
    try:
        problems = run()
    except Problem as problem:
        problems = [str(problem)]
    result = Result(title, time.monotonic() - began, problems)
    for problem in problems:
        print(f"  {problem}")
    print(f"  {result.seconds:.1f} s  {'FAILED' if problems else 'ok'}", flush=True)
    return result


def browser_checks_skipped() -> list[str]:
    "Why browser checks were not run, as pytest's report has it; empty if they all ran."
    if not REPORT.exists():
        return []
    skipped = [case.find("skipped").get("message", "") for case in ElementTree.parse(REPORT).iter("testcase")
               if case.find("skipped") is not None]  # fmt: skip
    return [reason for reason in skipped if "chromium" in reason.lower()]


def warn_about_browser(depth: str) -> None:
    skipped = browser_checks_skipped()
    if depth == "fast" or skipped:
        how = "run the whole test" if not skipped else "install Chromium (Debian: apt install chromium) and run again"
        number = f"{len(skipped)} " if skipped else ""
        print(f"\n*** {number}BROWSER CHECKS WERE NOT RUN: the pages were not opened in a browser; {how}. ***")


def summary(results: list[Result]) -> int:
    print()
    width = max(len(r.title) for r in results)
    for result in results:
        state = f"FAILED ({len(result.problems)})" if result.problems else "ok"
        print(f"  {result.title:<{width}} {result.seconds:7.1f} s  {state}")
    failed = [r.title for r in results if r.problems]
    total = sum(r.seconds for r in results)
    print(f"book.py test: {'FAILED: ' + ', '.join(failed) if failed else 'all passed'} in {total:.0f} s", flush=True)
    return 1 if failed else 0


def main(fast: bool = False, full: bool = False) -> int:
    depth = "fast" if fast else "full" if full else "plain"
    CACHE.mkdir(exist_ok=True)
    steps: list[tuple[str, Callable[[], list[str]]]] = [
        ("lint", lint),
        ("notebooks, package and README.md in step", in_step),
        ("equations", equation_coverage),
        ("chapters and solutions", run_chapters),
    ]
    if not fast:
        steps.append(("site and its links", build_site))
    steps.append(("pytest", lambda: pytest(depth)))
    if full:
        steps.append(("mutants", mutants))
    results = [step(title, f"{i}/{len(steps)}", run) for i, (title, run) in enumerate(steps, 1)]
    warn_about_browser(depth)
    return summary(results)
