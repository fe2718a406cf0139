"""A notebook as plain text: `.edit/NN_name.py` in jupytext's percent format, and back with ids and outputs kept.

Beside each scratch copy, `.edit/.base/NN_name.json` holds the two fingerprints of the moment they last agreed, so
that it is known which side has changed since: the scratch copy (bring it back), the notebook (write the scratch copy
anew) or both (refuse, and say how to choose).
"""

import hashlib
import json
import re
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from dev import NBS, ROOT, Problem, notebooks

EDIT = ROOT / ".edit"
FORMAT = "py:percent"
STARTER = """\
# %% [markdown]
# # {title}

# %%
#| default_exp {module}
"""


def to_scratch(nb: NotebookNode) -> str:
    "The cells as percent-format text, without outputs, ids or header."
    plain = nbformat.v4.new_notebook(cells=nb.cells)
    plain.metadata = {
        "kernelspec": notebooks.KERNELSPEC,
        "jupytext": {"notebook_metadata_filter": "-all", "cell_metadata_filter": "-all"},
    }
    return jupytext.writes(plain, FORMAT)


def from_scratch(text: str, source: Path) -> NotebookNode:
    "Percent-format text as a notebook with fresh ids."
    nb = jupytext.reads(text, FORMAT)
    if not nb.cells:
        raise Problem(f"{source} holds no cell: a cell begins with '# %%' or '# %% [markdown]'")
    nb.metadata = nbformat.from_dict({"kernelspec": notebooks.KERNELSPEC})
    nb.nbformat, nb.nbformat_minor = 4, 5
    for cell in nb.cells:
        cell.metadata = nbformat.from_dict({})
        cell.setdefault("id", nbformat.v4.new_code_cell().id)
    return nb


def _print_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _notebook_print(nb: NotebookNode) -> str:
    "A fingerprint of what an author writes: cell types and sources (a refresh changes neither)."
    return _print_of(json.dumps([[c.cell_type, c.source] for c in nb.cells]))


def scratch_of(notebook: Path) -> Path:
    return EDIT / notebook.relative_to(NBS).with_suffix(".py")


def _base_of(scratch: Path) -> Path:
    return EDIT / ".base" / scratch.relative_to(EDIT).with_suffix(".json")


def open_scratches() -> list[Path]:
    "The notebooks that have a scratch copy."
    found = (p.relative_to(EDIT) for p in sorted(EDIT.rglob("*.py")))
    return [NBS / p.with_suffix(".ipynb") for p in found if ".ipynb_checkpoints" not in p.parts]


def changes(notebook: Path) -> tuple[bool, bool]:
    "Whether the scratch copy and the notebook have changed since they last agreed."
    scratch = scratch_of(notebook)
    base_file = _base_of(scratch)
    base = json.loads(base_file.read_text()) if base_file.exists() else {"scratch": "", "notebook": ""}
    scratch_changed = scratch.exists() and _print_of(scratch.read_text(encoding="utf-8")) != base["scratch"]
    current = _notebook_print(notebooks.read(notebook)) if notebook.exists() else ""
    return scratch_changed, current != base["notebook"]


def write_scratch(notebook: Path) -> Path:
    "Write the scratch copy of `notebook` and note that the two agree."
    scratch, nb = scratch_of(notebook), notebooks.read(notebook)
    text = to_scratch(nb)
    notebooks.write_text(text, scratch)
    base = {"scratch": _print_of(text), "notebook": _notebook_print(nb)}
    notebooks.write_text(json.dumps(base), _base_of(scratch))
    return scratch


def bring_back(notebook: Path) -> str:
    "Write the scratch copy into `notebook`; says what became of the cells."
    scratch = scratch_of(notebook)
    new = from_scratch(scratch.read_text(encoding="utf-8"), scratch)
    if notebook.exists():
        old = notebooks.read(notebook)
        counts = notebooks.carry_over(old, new)
        new.metadata = old.metadata
    else:
        counts = {"new": len(new.cells)}
    notebooks.write(new, notebook)
    write_scratch(notebook)
    return ", ".join(f"{number} {what}" for what, number in counts.items() if number)


def start(notebook: Path) -> str:
    "A scratch copy to begin a chapter that does not exist yet."
    name = re.sub(r"^\d+_", "", notebook.stem)
    scratch = scratch_of(notebook)
    notebooks.write_text(STARTER.format(title=name.replace("_", " ").capitalize(), module=name), scratch)
    return f"a new chapter: write {_shown(scratch)}, then run the same command again"


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def edit(notebook: Path, keep: str | None = None) -> str:
    """One step of the round trip, whichever is due; returns a line that says what was done.

    `keep` ("scratch" or "notebook") settles which side wins when both have changed.
    """
    scratch = scratch_of(notebook)
    name = _shown(notebook)
    if not scratch.exists():
        if not notebook.exists():
            return start(notebook)
        return f"{name} opened as {_shown(write_scratch(notebook))}; edit it, then run the same command again"
    scratch_changed, notebook_changed = changes(notebook)
    if scratch_changed and notebook_changed and notebook.exists() and keep is None:
        raise Problem(
            f"{name} and its scratch copy {_shown(scratch)} have both changed since they last agreed: add "
            "--keep scratch (overwrite the notebook's cells) or --keep notebook (write the scratch copy anew)"
        )
    if scratch_changed and keep != "notebook":
        return f"{name} <- {_shown(scratch)}: {bring_back(notebook)}"
    if notebook_changed:
        write_scratch(notebook)
        return f"{_shown(scratch)} <- {name}: written anew"
    return f"{name} and {_shown(scratch)} agree: nothing to do"


def main(names: list[str], keep: str | None) -> int:
    from dev import chapters

    targets = [chapters.path_of(name, may_be_new=True) for name in names] or open_scratches()
    if not targets:
        raise Problem("no scratch copy is open: name a chapter, for example: python3 book.py edit 01")
    failed = False
    for notebook in targets:
        try:
            print(edit(notebook, keep))
        except Problem as problem:
            if len(targets) == 1:
                raise
            print(problem)
            failed = True
    return int(failed)
