"""Sphinx's side of the book: numbers, badges, formulas and the table of contents.

* chapters carry the number of their file (`01_forward` is chapter 1), their equations count within it: (1.3);
* an exported cell says to which module, a check which equation it checks, a checked equation that it is;
* a paragraph all in italics below a cell or a picture is its caption;
* formulas are left as TeX for KaTeX, which `_static/book.js` calls in the reader's browser;
* the table of contents is built from the files that exist.
"""

import json
import re
import zlib
from pathlib import Path

import chapter_reader
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.domains.math import MathDomain
from sphinx.transforms import SphinxTransform

APPENDIX = 90  # files numbered from here on are appendices
NUMBERED = re.compile(r"(\d\d)([a-z]?)_")  # 06_scenes, and 06b_captions, its second page
OUTSIDE = re.compile(r"\[(?P<text>[^\]\n]*)\]\((?P<path>(?:\.\./)+[^)\s\"\\]+)\)")


def chapter_number(docname: str) -> str | None:
    "Number of a chapter, from the name of its file (6, or 6b); None for every other page."
    found = NUMBERED.match(docname)
    return f"{int(found[1])}{found[2]}" if found and int(found[1]) < APPENDIX else None


def equation_prefix(docname: str) -> str:
    "What stands before an equation's number: `1.` in a chapter, `S1.` in its solutions, `A.` in an appendix."
    found = NUMBERED.match(docname.rpartition("/")[2])
    if not found:
        return ""
    if int(found[1]) >= APPENDIX:
        return f"{chr(ord('A') + int(found[1]) - APPENDIX)}."
    return f"{'S' if docname.startswith('solutions/') else ''}{int(found[1])}{found[2]}."


class BookMathDomain(MathDomain):
    "Equations numbered within their chapter."

    def note_equation(self, docname: str, labelid: str, location=None) -> None:
        super().note_equation(docname, labelid, location)
        docname, number = self.equations[labelid]
        self.equations[labelid] = (docname, f"{equation_prefix(docname)}{number}")


class NumberTitle(SphinxTransform):
    "Puts a chapter's number before its title (unless the author did), hence into the contents as well."

    default_priority = 400

    def apply(self, **kwargs) -> None:
        number = chapter_number(self.env.docname)
        title = next(iter(self.document.findall(nodes.title)), None)
        if number is not None and title is not None and not title.astext()[:1].isdigit():
            title.insert(0, nodes.Text(f"{number}. "))


class DrawMarks(SphinxTransform):
    "Draws what `chapter_reader` noted about the cells: badges on cells, ticks on checked equations."

    default_priority = 400

    def apply(self, **kwargs) -> None:
        checked = {}
        for cell in list(self.document.findall(nodes.container)):
            if cell.get("nb_element") != "cell_code":
                continue
            book = cell.get("cell_metadata", {}).get("book") or {}
            badges = nodes.container(classes=["book-badges"])
            for label in book.get("checks", []):
                checked.setdefault(label, f"check-{label}")
                badges += self.check_badge(label, f"check-{label}")
            if book.get("not_run"):
                badges += nodes.inline("", "not run here", classes=["badge-not-run"])
            if module := book.get("module"):
                badges += self.export_badge(module, book["names"])
            if badges.children:
                cell.insert(0, badges)
                cell["classes"].append("has-badges")
        for formula in self.document.findall(nodes.math_block):
            if formula.get("label") in checked:
                formula["check"] = checked[formula["label"]]
        for paragraph in self.document.findall(nodes.paragraph):
            if is_caption(paragraph):
                paragraph["classes"].append("figure-caption")

    def check_badge(self, label: str, anchor: str) -> nodes.Element:
        badge = nodes.inline("", "✓ checks ", classes=["badge-check"], ids=[anchor])
        link = addnodes.pending_xref(
            "", nodes.literal("", label), refdomain="math", reftype="eq", reftarget=label, refwarn=True
        )
        link["refdoc"] = self.env.docname
        badge += link
        return badge

    def export_badge(self, module: str, names: list[str]) -> nodes.Element:
        badge = nodes.inline("", "exported to ", classes=["badge-export"])
        badge += [nodes.target("", "", ids=[code_anchor(module, name)]) for name in names]
        text = nodes.literal("", f"{self.config.project}.{module}")
        if f"api/{module}" not in self.env.found_docs:
            badge += text
            return badge
        link = addnodes.pending_xref(
            "", text, refdomain="std", reftype="doc", reftarget=f"/api/{module}", refexplicit=True, refwarn=True
        )
        link["refdoc"] = self.env.docname
        badge += link
        return badge


def is_caption(paragraph: nodes.paragraph) -> bool:
    "Whether a paragraph is all in italics and stands below a cell or a picture."
    above = paragraph.previous_sibling()
    if isinstance(above, nodes.paragraph) and [type(child) for child in above.children] == [nodes.image]:
        below_figure = True
    else:
        below_figure = isinstance(above, nodes.Element) and above.get("nb_element") == "cell_code"
    return below_figure and [type(child) for child in paragraph.children] == [nodes.emphasis]


def code_anchor(module: str, name: str) -> str:
    "Where in its chapter a name is defined."
    return f"code-{module}-{name}"


# Formulas ---------------------------------------------------------------------------------------------------------


def visit_inline_math(self, node: nodes.math) -> None:
    self.body.append(self.starttag(node, "span", "", CLASS="math"))
    self.body.append(f"{self.encode(node.astext())}</span>")
    raise nodes.SkipNode


def visit_display_math(self, node: nodes.math_block) -> None:
    tex = node.astext().strip()
    if r"\\" in tex and r"\begin" not in tex:
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    self.body.append(self.starttag(node, "div", "", CLASS="formula"))
    self.body.append(f'<div class="math display">{self.encode(tex)}</div>')
    if node["number"]:
        self.body.append('<span class="eqno">')
        if "check" in node:
            self.body.append(f'<a class="checked" href="#{node["check"]}" title="Checked by code: see how">✓</a>')
        anchor = nodes.make_id(f"equation-{node['label']}")
        self.body.append(f'<a href="#{anchor}" title="Link to this equation">({node["number"]})</a></span>')
    self.body.append("</div>\n")
    raise nodes.SkipNode


# Pages ------------------------------------------------------------------------------------------------------------


def contents(docnames: set[str]) -> str:
    "The table of contents, as MyST toctrees, of the pages that exist."
    numbered = sorted(d for d in docnames if NUMBERED.match(d))
    rest = sorted(d for d in docnames if "/" not in d and d != "index" and d not in numbered)
    groups = {
        "Chapters": [d for d in numbered if chapter_number(d) is not None],
        "Appendices": [d for d in numbered if chapter_number(d) is None] + rest,
        "Solutions": sorted(d for d in docnames if d.startswith("solutions/")),
        "The library": sorted((d for d in docnames if d.startswith("api/")), key=lambda d: (d != "api/index", d)),
    }
    trees = [
        "```{toctree}\n:hidden:\n:caption: " + name + "\n\n" + "\n".join(pages) + "\n```"
        for name, pages in groups.items()
        if pages
    ]
    return "\n\n".join(trees)


def prepare_source(app: Sphinx, docname: str, source: list[str]) -> None:
    "Before a page is parsed: the contents join the first page, references in plain pages and links out of the book."
    text, notebook = source[0], app.env.doc2path(docname).suffix == ".ipynb"
    text = unlink_outside(text, Path(app.srcdir), Path(docname).parent)
    if not notebook:
        text = chapter_reader.link_references(text)
    if docname == "index":
        text = append_contents(text, contents(app.env.found_docs), notebook)
    source[0] = text


def append_contents(text: str, trees: str, notebook: bool) -> str:
    if not notebook:
        return f"{text}\n\n{trees}\n"
    book = json.loads(text)
    book["cells"].append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": trees})
    return json.dumps(book)


def unlink_outside(text: str, root: Path, folder: Path) -> str:
    "Links to files of the repository that the site does not hold (`../LICENSE`) become their text; assets stay."

    def replace(found: re.Match) -> str:
        path = (root / folder / found["path"].partition("#")[0]).resolve()
        return found[0] if path.exists() else found["text"]

    return OUTSIDE.sub(replace, text)


def reread_contents(app: Sphinx, env, added: set, changed: set, removed: set) -> list[str]:
    "The first page holds the contents: read it again when pages come or go."
    return ["index"] if added or removed else []


def setup(app: Sphinx) -> dict:
    app.add_domain(BookMathDomain, override=True)
    app.add_html_math_renderer("katex", (visit_inline_math, None), (visit_display_math, None))
    app.add_transform(NumberTitle)
    app.add_transform(DrawMarks)
    app.connect("source-read", prepare_source)
    app.connect("env-get-outdated", reread_contents)
    own = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    memory = zlib.crc32(own)  # a change of the extension makes Sphinx forget what it built before
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": memory}
