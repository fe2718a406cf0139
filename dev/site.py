"""Builds, checks and serves the site: Sphinx and MyST-NB over the notebooks as they are stored or were just executed.

Sphinx never runs a notebook. Everything made lies beside the output (`docs/_build/src` staged pages,
`docs/_build/doctrees` Sphinx's memory) so that the next build does only what changed.
"""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dev import NBS, ROOT, Problem, api
from dev import PACKAGE as NAME
from dev.vendor import VendorError, vendor

DOCS, PACKAGE = ROOT / "docs", ROOT / NAME
HTML = DOCS / "_build" / "html"
PLACEHOLDER = "# stable_diffusion_scratch\n\nThe first page is not written yet.\n"


class SiteError(Problem):
    "The site could not be built; the message names what is wrong and what to do."


def build(executed: Path | None = None, out: Path = HTML, source: Path = NBS, package: Path = PACKAGE) -> None:
    """Build the site of the chapters in `source` and the modules of `package` into `out`.

    A notebook that exists below `executed` is taken from there. Raises SiteError."""
    out = Path(out).resolve()
    try:
        vendor()
    except VendorError as error:
        raise SiteError(str(error)) from error
    work = out.parent
    (work / "built").unlink(missing_ok=True)
    stage(Path(source), work / "src", executed and Path(executed), package)
    mirror(ROOT / "assets", work / "assets")
    run_sphinx(work / "src", work / "doctrees", out)
    (work / "built").touch()


def is_fresh(out: Path = HTML) -> bool:
    "Whether the book's site was built, without a warning, since anything it is made of last changed."
    stamp = Path(out).resolve().parent / "built"
    sources = [NBS, PACKAGE, ROOT / "assets", DOCS / "_ext", DOCS / "_static", DOCS / "conf.py"]
    files = [f for s in sources for f in (s.rglob("*") if s.is_dir() else [s]) if "__pycache__" not in f.parts]
    return stamp.exists() and stamp.stat().st_mtime > max(f.stat().st_mtime for f in files)


def stage(source: Path, target: Path, executed: Path | None, package: Path) -> None:
    "Make `target` hold the pages Sphinx shall see, touching only files that differ."
    wanted = {}
    for file in sorted(f for f in source.rglob("*") if f.is_file()):
        name = file.relative_to(source)
        if any(part.startswith((".", "_")) for part in name.parts):
            continue
        fresh = executed / name if executed else file
        wanted[name] = (fresh if fresh.exists() else file).read_bytes()
    wanted |= {Path("api") / f"{name}.md": text.encode() for name, text in api.pages(package).items()}
    if not wanted.keys() & {Path("index.ipynb"), Path("index.md")}:
        wanted[Path("index.md")] = PLACEHOLDER.encode()
    write_changed(wanted, target)


def mirror(source: Path, target: Path) -> None:
    files = (f for f in source.rglob("*") if f.is_file())
    write_changed({f.relative_to(source): f.read_bytes() for f in files}, target)


def write_changed(wanted: dict[Path, bytes], target: Path) -> None:
    "Make the folder `target` hold exactly the files of `wanted`, rewriting only those that differ."
    target.mkdir(parents=True, exist_ok=True)
    for old in [f for f in target.rglob("*") if f.is_file() and f.relative_to(target) not in wanted]:
        old.unlink()
    for name, content in wanted.items():
        file = target / name
        if not file.exists() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def run_sphinx(source: Path, doctrees: Path, out: Path) -> None:
    "Run Sphinx with warnings as errors. After a failure its memory is dropped: it would not repeat its warnings."
    if not (out / "searchindex.js").exists():  # the last build was interrupted: begin anew
        shutil.rmtree(doctrees, ignore_errors=True)
    options = ["-W", "--keep-going", "-n", "-q", "-j", "2", "-c", str(DOCS), "-d", str(doctrees)]
    command = [sys.executable, "-m", "sphinx", *options, str(source), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    if done.returncode:
        shutil.rmtree(doctrees, ignore_errors=True)
        said = (done.stdout + done.stderr).strip().replace(f"{source}{os.sep}", "nbs/")
        said = re.sub(r"(?<=\.ipynb):(\d{5,}): ", cell_and_line, said)
        raise SiteError(f"Sphinx refused the pages; mend what it names and build again:\n{said}")


def cell_and_line(found: re.Match) -> str:
    "Where in a notebook a warning is: MyST-NB counts 10,000 lines to a cell."
    cell, line = divmod(int(found[1]), 10_000)
    return f", cell {cell}, line {line}: "


# Checking ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    "What a built page offers (ids), points to (links) and loads."

    LOADS = {"img": "src", "script": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
    LOADED_LINKS = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "manifest"}

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        found = {k: v or "" for k, v in attributes}
        self.ids |= {found[k] for k in ("id", "name") if k in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "link" and self.LOADED_LINKS & set(found.get("rel", "").split()):
            self.loads.append(found["href"])
        if self.LOADS.get(tag) in found:
            self.loads.append(found[self.LOADS[tag]])


def check_links(out: Path = HTML) -> list[str]:
    "What is wrong with the built pages: links, anchors and images that lead nowhere, anything loaded from elsewhere."
    out = Path(out).resolve()
    pages = {f: Page(f.read_text(encoding="utf-8")) for f in html_pages(out)}
    if not pages:
        return [f"{out}: no page there; build the site first"]
    wrong = []
    for file, page in pages.items():
        name = file.relative_to(out)
        wrong += [f"{name}: loads {url} from elsewhere" for url in page.loads if is_external(url)]
        local = [url for url in page.links + page.loads if not urlsplit(url).scheme and not url.startswith("//")]
        wrong += [f"{name}: {problem}" for url in dict.fromkeys(local) if (problem := broken(url, file, pages, out))]
    for sheet in sorted(out.rglob("*.css")):
        text = re.sub(r"/\*.*?\*/", "", sheet.read_text(encoding="utf-8"), flags=re.DOTALL)
        for url in re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)", text):
            wrong.append(f"{sheet.relative_to(out)}: loads {url} from elsewhere")
    return wrong


def html_pages(out: Path) -> list[Path]:
    "The pages of a built site (templates that the theme copies into _static are none)."
    return sorted(f for f in out.rglob("*.html") if f.relative_to(out).parts[0] != "_static")


def is_external(url: str) -> bool:
    return url.startswith("//") or urlsplit(url).scheme in ("http", "https")


def broken(url: str, file: Path, pages: dict[Path, Page], out: Path) -> str:
    "Why a local link of a page leads nowhere; empty if it leads somewhere."
    parts = urlsplit(url)
    to = file if not parts.path else Path(os.path.normpath(file.parent / unquote(parts.path)))
    if out not in (to, *to.parents):
        return f"{url} leads out of the site"
    if to.is_dir():
        to = to / "index.html"
    if not to.exists():
        return f"{url} leads to no file"
    anchor = unquote(parts.fragment)
    if anchor and to in pages and anchor not in pages[to].ids:
        return f"{url} leads to no anchor"
    return ""


# Serving ----------------------------------------------------------------------------------------------------------


class QuietHandler(SimpleHTTPRequestHandler):
    "Serves files without a line for each, and lets no browser keep an old page."

    def log_message(self, *args) -> None:
        pass

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()


def serve(out: Path = HTML, port: int = 0) -> ThreadingHTTPServer:
    "A server of `out` on localhost (port 0: any free one); the caller runs `serve_forever` and `shutdown`."
    return ThreadingHTTPServer(("127.0.0.1", port), partial(QuietHandler, directory=str(out)))


if __name__ == "__main__":
    try:
        build()
    except SiteError as error:
        sys.exit(str(error))
    sys.exit("\n".join(check_links()) or 0)
