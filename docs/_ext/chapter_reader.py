"""Reads a chapter for the site: nbdev's `#|` directives become cell tags, plain-text references become links.

Nothing is written back: the notebook on disk stays as its author left it. The functions here know notebooks and
text only; what Sphinx does with the marks they leave is in `chapter_pages`.
"""

import ast
import re

import nbformat

DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(?P<name>[\w-]+)[ \t:]*(?P<value>.*?)\s*$")
CHECK = re.compile(r"^#\s*check:\s*(?P<labels>[\w\-, ]+?)\s*$")
LABEL = r"(?:eq|def)-[\w-]+"
# Left to right: what must not be touched (fences, code, formulas with their label, link targets), then a reference.
REFERENCE = re.compile(
    rf"(?P<keep>```.*?```|~~~.*?~~~|``[^`]+``|`[^`\n]+`|\$\$.*?\$\$(?:\s*\({LABEL}\))?|\$[^$\n]+\$|\]\([^)\n]*\))"
    rf"|\((?P<label>{LABEL})\)(?!=)",
    re.DOTALL,
)
EXPORTS = {"export", "exports", "exporti"}
TAGS = {  # directive and value -> tag MyST-NB knows
    ("hide", ""): "remove-cell",
    ("default_exp", None): "remove-cell",
    ("hide_input", ""): "remove-input",
    ("hide_output", ""): "remove-output",
    ("echo", "false"): "remove-input",
    ("output", "false"): "remove-output",
    ("include", "false"): "remove-cell",
    ("code-fold", "true"): "hide-input",
}


def read(text: str) -> nbformat.NotebookNode:
    "The notebook in `text`, ready for MyST-NB (its entry in `nb_custom_formats`)."
    book = nbformat.reads(text, as_version=4)
    book.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    default = next((m for c in book.cells if c.cell_type == "code" if (m := split(c.source)[0].get("default_exp"))), "")
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = link_references(cell.source)
        elif cell.cell_type == "code":
            mark(cell, default)
    return book


def split(source: str) -> tuple[dict[str, str], str]:
    "The directives of a code cell (name to value), and its source without them."
    directives, kept = {}, []
    for line in source.splitlines():
        found = DIRECTIVE.match(line)
        if found:
            directives[found["name"]] = found["value"].strip("\"'")
        else:
            kept.append(line)
    return directives, "\n".join(kept).strip("\n")


def mark(cell: nbformat.NotebookNode, default_module: str) -> None:
    "Turn the directives of a code cell into tags and into `metadata.book`, which `chapter_pages` draws."
    directives, source = split(cell.source)
    tags = {tag for (name, value), tag in TAGS.items() if name in directives and value in (None, directives[name])}
    if not source and not cell.outputs:
        tags.add("remove-cell")
    elif not source:
        tags.add("remove-input")
    book = {}
    if exported := EXPORTS & directives.keys():
        book["module"] = directives[exported.pop()] or default_module
        book["names"] = defined_names(source)
    if directives.get("eval") == "false":
        book["not_run"] = True
    first, _, rest = source.partition("\n")
    if found := CHECK.match(first):
        book["checks"] = re.split(r"[,\s]+", found["labels"])
        source = rest.strip("\n")
    cell.source = source
    cell.metadata["tags"] = sorted(tags | set(cell.metadata.get("tags", [])))
    cell.metadata["book"] = book
    cell.metadata["mystnb"] = {**options(directives), **cell.metadata.get("mystnb", {})}


def options(directives: dict[str, str]) -> dict:
    "What MyST-NB is told about a cell: its fold's summary, its figure's caption, the alternative text of its images."
    told = {}
    if "code-summary" in directives:
        told["code_prompt_show"] = told["code_prompt_hide"] = directives["code-summary"]
    if "fig-cap" in directives:
        told["figure"] = {"caption": link_references(directives["fig-cap"])}
    if "fig-alt" in directives:
        told["image"] = {"alt": directives["fig-alt"]}
    return told


def defined_names(source: str) -> list[str]:
    "Names that a cell defines at top level (none if it is not plain Python)."
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return []
    names = [n.name for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    targets = [t for n in body if isinstance(n, ast.Assign) for t in n.targets]
    targets += [n.target for n in body if isinstance(n, ast.AnnAssign)]
    return names + [t.id for t in targets if isinstance(t, ast.Name)]


def link_references(text: str) -> str:
    "Plain-text references `(eq-name)` and `(def-name)` as links; code, formulas and labels stay as they are."
    return REFERENCE.sub(lambda m: m["keep"] or f"{{eq}}`{m['label']}`", text)
