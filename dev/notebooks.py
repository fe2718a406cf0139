"""Notebooks as data: read, write as nbdev writes, clean, and carry outputs and ids from one version to the next."""

import difflib
import json
import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from dev import ROOT, Problem

KERNELSPEC = {"display_name": "python3", "language": "python", "name": "python3"}


def read(path: Path) -> NotebookNode:
    "The notebook at `path`; a file that is not one is a `Problem`."
    try:
        return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    except FileNotFoundError:
        raise Problem(f"there is no notebook {path}") from None
    except Exception as error:  # nbformat raises several kinds for a damaged file
        raise Problem(f"{path} is not a readable notebook ({error}); restore it: git checkout -- {path}") from None


def clean(nb: dict) -> dict:
    "The notebook (as JSON lists and dicts) as `nbdev_clean` would leave it; changed in place and returned."
    from nbdev.clean import clean_nb
    from nbdev.config import get_config

    cfg = get_config(path=str(ROOT))
    keys = [cfg.get(name, "").split() for name in ("allowed_metadata_keys", "allowed_cell_metadata_keys")]
    clean_nb(nb, cfg.clear_all, *keys, clean_ids=cfg.clean_ids)
    return nb


def text(nb: dict) -> str:
    "JSON as nbdev writes it: sorted keys, one-space indent, a final newline."
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def clean_text(stored: str) -> str:
    "The text of a notebook file after cleaning; equal to `stored` if the file is clean."
    return text(clean(json.loads(stored)))


def write(nb: NotebookNode, path: Path) -> bool:
    "Write `nb`, cleaned, to `path`; False if the file held exactly that already."
    return write_text(clean_text(nbformat.writes(nb)), path)


def write_text(new: str, path: Path) -> bool:
    "Write `new` to `path` in one move (an interruption leaves the old file or the new); False if nothing changed."
    if path.exists() and path.read_text(encoding="utf-8") == new:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(new, encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return True


def code_cells(nb: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def plain(source: str) -> str:
    "A cell without IPython's own syntax."
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!", "?")))


def directives(source: str) -> Iterator[str]:
    "The `#|` directives at the head of a cell, without the mark: 'export', 'eval: false', ..."
    for line in source.splitlines():
        if line.strip() and not line.startswith(("#|", "# |")):
            return
        if line.strip():
            yield line.split("|", 1)[1].strip()


def runs(cell: NotebookNode) -> bool:
    "Whether a reader's kernel executes this cell."
    skipped = {"eval: false", "eval:false"}
    return cell.cell_type == "code" and bool(cell.source.strip()) and not skipped & set(directives(cell.source))


def _key(cell: NotebookNode) -> tuple[str, str]:
    return cell.cell_type, cell.source.strip("\n")


def _best(cell: NotebookNode, olds: list[NotebookNode]) -> NotebookNode | None:
    "The old cell most like `cell`, of the same type, if any is alike at all."
    alike = [(difflib.SequenceMatcher(None, old.source, cell.source, autojunk=False).ratio(), -i)
             for i, old in enumerate(olds) if old.cell_type == cell.cell_type]  # fmt: skip
    ratio, position = max(alike, default=(0.0, 0))
    return olds[-position] if ratio > 0.3 else None


def carry_over(old: NotebookNode, new: NotebookNode) -> dict[str, int]:
    """Give the cells of `new` the ids of their ancestors in `old`, and unchanged cells their outputs too.

    Returns counts of cells: unchanged, changed, new, removed.
    """
    before, after = [_key(c) for c in old.cells], [_key(c) for c in new.cells]
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    same = {j + k: i + k for i, j, size in matcher.get_matching_blocks() for k in range(size)}
    left = [i for i in range(len(old.cells)) if i not in set(same.values())]
    for j in range(len(new.cells)):  # cells that moved
        moved = next((i for i in left if j not in same and before[i] == after[j]), None)
        if moved is not None:
            same[j] = moved
            left.remove(moved)

    changed, spare = 0, [old.cells[i] for i in left]
    for j, cell in enumerate(new.cells):
        if j in same:
            new.cells[j] = deepcopy(old.cells[same[j]])
        elif ancestor := _best(cell, spare):
            spare.remove(ancestor)
            cell.id, changed = ancestor.id, changed + 1
    added = len(new.cells) - len(same) - changed
    return {"unchanged": len(same), "changed": changed, "new": added, "removed": len(spare)}


def with_outputs(nb: NotebookNode, executed: NotebookNode) -> NotebookNode:
    "`nb` with the outputs and widget state of `executed`, a run of the same code cells (its prose may differ)."
    result = deepcopy(nb)
    ours, theirs = code_cells(result), code_cells(executed)
    if [c.source for c in ours] != [c.source for c in theirs]:
        raise Problem("the notebook's code changed while it was running; run the command again")
    for cell, run in zip(ours, theirs, strict=True):
        cell.outputs, cell.execution_count = deepcopy(run.outputs), run.execution_count
    result.metadata.pop("widgets", None)
    if "widgets" in executed.metadata:
        result.metadata.widgets = deepcopy(executed.metadata.widgets)
    return result
