"""Equation coverage: every labelled result of the book has a cell that checks it.

A result is displayed mathematics labelled `$$ ... $$ (eq-name)`; definitions, `(def-name)`, need no check. A check is
a code cell that begins `# check: eq-name` (or several names, separated by commas) and holds an assertion.
"""

import ast
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from nbformat import NotebookNode

from dev import NBS, notebooks

DISPLAY = re.compile(r"\$\$(?:(?!\$\$).)+\$\$(?:[^\S\n]*\(([^)\s]+)\))?", re.DOTALL)
FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
CHECK = re.compile(r"#\s*check:\s*(.*)")
NAME = re.compile(r"(eq|def)-[a-z0-9]+(-[a-z0-9]+)*")


def labels(nb: NotebookNode) -> list[str]:
    "The labels of displayed mathematics in the notebook's prose, in order."
    prose = (CODE.sub("", FENCE.sub("", c.source)) for c in nb.cells if c.cell_type == "markdown")
    return [label for text in prose for label in DISPLAY.findall(text) if label]


def checks(nb: NotebookNode) -> list[tuple[list[str], str]]:
    "(names, source) of every cell that declares a check; directives may stand above the declaration."
    found = []
    for cell in notebooks.code_cells(nb):
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#|")]
        declared = CHECK.match(lines[0]) if lines else None
        if declared:
            found.append(([n.strip() for n in declared[1].split(",") if n.strip()], cell.source))
    return found


def asserts(source: str) -> bool:
    "Whether the cell holds an assertion: `assert`, a call of `assert_...` or of `raises`."
    try:
        tree = ast.parse(notebooks.plain(source))
    except SyntaxError:
        return False
    calls = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
    names = [getattr(f, "attr", getattr(f, "id", "")) for f in calls]
    named = any(name.startswith("assert_") or name == "raises" for name in names)
    return named or any(isinstance(n, ast.Assert) for n in ast.walk(tree))


def problems(book: Mapping[str, NotebookNode]) -> list[str]:
    "What is wrong in `book`, notebooks by name: a line each, none if every result is checked."
    where: dict[str, str] = {}
    found = []
    for name, nb in book.items():
        for label in labels(nb):
            if not NAME.fullmatch(label):
                found.append(f"{name}: label ({label}) is neither (eq-name) nor (def-name) in lower case with hyphens")
            elif label in where:
                found.append(f"{name}: label ({label}) is used already in {where[label]}")
            where.setdefault(label, name)
    covered = set()
    for name, nb in book.items():
        for names, source in checks(nb):
            if not names:
                found.append(f"{name}: a cell begins '# check:' and names no equation")
            if not asserts(source) or not notebooks.runs(_code(source)):
                found.append(f"{name}: the cell '# check: {', '.join(names)}' asserts nothing when it runs")
                continue
            found += [f"{name}: '# check: {n}' names no labelled equation" for n in names if n not in where]
            covered |= set(names)
    missing = [label for label in where if label.startswith("eq-") and label not in covered]
    return found + [f"{where[m]}: result ({m}) has no cell that begins '# check: {m}'" for m in missing]


def _code(source: str) -> NotebookNode:
    return NotebookNode(cell_type="code", source=source)


def book() -> dict[str, NotebookNode]:
    "The notebooks of nbs/ and of its folders, by name."
    paths = [p for p in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    return {p.relative_to(NBS).with_suffix("").as_posix(): notebooks.read(Path(p)) for p in paths}


def coverage(book: Mapping[str, NotebookNode]) -> str:
    "How many results and definitions there are, in a line."
    every = [label for nb in book.values() for label in labels(nb)]
    results = {label for label in every if label.startswith("eq-")}
    covered = results & {n for nb in book.values() for names, s in checks(nb) for n in names if asserts(s)}
    return f"{len(covered)} of {len(results)} labelled results checked, {len(set(every)) - len(results)} definitions"


if __name__ == "__main__":
    sys.exit("\n".join(problems(book())) or 0)
