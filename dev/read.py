"""`book.py read`: the book in a browser at once, from stored outputs, and its pages replaced as chapters are re-run."""

import errno
import threading
import time
import webbrowser
from http.server import ThreadingHTTPServer

from book import locked
from dev import CACHE, Problem, chapters, site

PORTS_TRIED = 50


def build(executed: bool) -> float:
    "Build the site, from executed copies where there are any; returns the seconds it took."
    began = time.monotonic()
    with locked(CACHE / "locks" / "site.lock", "another book.py builds the site; waiting for it"):
        site.build(executed=chapters.EXECUTED if executed else None)
    return time.monotonic() - began


def serve(port: int) -> ThreadingHTTPServer:
    "A server of the site in a thread, on `port` or the next free one."
    for candidate in range(port, min(port + PORTS_TRIED, 65536)):
        try:
            server = site.serve(port=candidate)
        except OSError as error:
            if error.errno == errno.EACCES:
                raise Problem(f"port {candidate} needs root's rights; choose another: --port 8000") from None
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        if candidate != port:
            print(f"port {port} is in use; using {candidate}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server
    raise Problem(f"no free port from {port} to {port + PORTS_TRIED - 1}; choose another: --port 9000")


def rerun(names: list[str], after=None) -> bool:
    "Re-run the chapters; True if all succeeded."
    paths = chapters.select(names)
    if not paths:
        raise Problem("there is no chapter in nbs/; restore them: git checkout -- nbs")
    runs = chapters.run_all(paths, after=after)
    fresh = sum(not run.cached for run in runs)
    failed = [run.name for run in runs if run.failure]
    print(f"{len(runs)} chapters: {fresh - len(failed)} executed, {len(runs) - fresh} unchanged, {len(failed)} failed"
          + (f" ({', '.join(failed)})" if failed else ""), flush=True)  # fmt: skip
    return not failed


def once(names: list[str]) -> int:
    ok = rerun(names)
    print(f"site built in {build(executed=True):.1f} s: {site.HTML / 'index.html'}")
    return 0 if ok else 1


def open_page(url: str, names: list[str], browser: bool) -> None:
    page = f"{chapters.name_of(chapters.path_of(names[0]))}.html" if names else ""
    print(f"reading at {url}{page}  (Ctrl-C ends)", flush=True)
    if browser:
        webbrowser.open(url + page)


def replace_page(run: chapters.Run) -> None:
    "After a chapter was executed: its new page. A page that does not build is said, and the reading goes on."
    if run.cached or run.failure:
        return
    try:
        build(executed=True)
    except site.SiteError as problem:
        print(f"  its page was not replaced: {problem}", flush=True)


def main(names: list[str], once_only: bool = False, port: int = 8000, browser: bool = True) -> int:
    chapters.select(names)  # a wrong name is said before anything is built
    if once_only:
        return once(names)
    print("building the site from stored outputs ...", end=" ", flush=True)
    print(f"{build(executed=False):.1f} s")
    server = serve(port)
    url = f"http://localhost:{server.server_address[1]}/"
    open_page(url, names, browser)
    print("re-running the chapters; each page is replaced when its chapter is done", flush=True)
    try:
        rerun(names, after=replace_page)
        replace_page(chapters.Run("", 0.0, cached=False))
        print(f"done; still serving at {url}  (Ctrl-C ends)", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nended")
    finally:
        server.shutdown()
    return 0
