#!/usr/bin/env python3
"""The one entry point of the book: makes its environment by itself, then reads, checks, opens or refreshes it.

    python3 book.py                 read the book in a browser while every chapter is re-run on your machine
    python3 book.py --help          all subcommands

Needs Python 3.11 or later on Linux or macOS, and nothing else. Everything it installs goes to .venv/ beside this file,
everything it makes meanwhile to .cache/; both may be deleted at any time. The work itself is done by the package dev/,
run by the Python of .venv.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (this file must also parse on the Pythons that it refuses)
    sys.exit(
        "book.py needs Python 3.11 or later, and this is Python {}.{} ({}).\n"
        "Install a newer one and use it by name, for example: python3.11 book.py".format(
            *sys.version_info[:2], sys.executable
        )
    )

import argparse
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

try:
    import fcntl
except ImportError:
    sys.exit("book.py runs on Linux and macOS; on Windows, use it inside WSL.")

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "book-stamp.json"  # written last: this environment is whole, and made from these files
UNFINISHED = VENV / "book-unfinished"  # there while something is being installed
LOG = ROOT / ".cache" / "install.log"
EXTRAS = "book,dev,docs"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SPACE = 4e9  # bytes that a new environment takes, with room for downloads

# --- the command line ------------------------------------------------------------------------------------------------

COMMANDS = {
    "read": "serve the book on localhost and re-run every chapter meanwhile (the default)",
    "test": "check everything: lint, notebooks and package in step, chapters, tests, site",
    "lab": "open the chapters in JupyterLab",
    "edit": "open a chapter as plain text (.edit/NN_name.py), and bring it back",
    "refresh": "export, re-run a chapter and store its outputs",
    "export": "make the package and README.md from the notebooks",
    "train": "train the bundled model anew, or go on with it, and measure it",
    "bench": "measure beside a peer: a picture from prompt to pixels, or what bench/ has by name",
    "setup": "make or repair the environment, and nothing more",
}
PASSED_ON = {  # subcommands whose options are those of another program
    "lab": "passed on to JupyterLab, for example --no-browser",
    "train": "passed on to `sd-scratch train`, for example --out runs/mine; for all of them: .venv/bin/sd-scratch "
    "train --help",
    "bench": "a measurement (the name of a file in bench/, such as parts or judge; pipeline if none) and "
    "its options, for example: parts --pairs 5; for all of them: .venv/bin/python bench/parts.py --help",
}


def parser():
    "The parser of the whole command line; `python -m dev` uses it too."
    top = argparse.ArgumentParser(
        prog="book.py",
        description="Read, run, check and write the book. Without a subcommand: read.",
        epilog="Each subcommand makes or repairs the environment in .venv by itself; `python3 book.py test --help` "
        "and the like say more. Nothing outside this folder is changed.",
    )
    kinds = top.add_subparsers(dest="command", metavar="subcommand", required=True)
    sub = {
        name: kinds.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        for name, text in COMMANDS.items()
    }
    names = {"nargs": "*", "metavar": "NN"}

    sub["read"].add_argument("chapter", help="only these chapters are re-run, for example 04", **names)
    sub["read"].add_argument("--once", action="store_true", help="re-run, render and end, without serving")
    sub["read"].add_argument(
        "--port", type=int, default=8000, help="the port to serve on; the next free one if it is in use (8000)"
    )
    sub["read"].add_argument("--no-browser", action="store_true", help="print the address, open no browser")

    depth = sub["test"].add_mutually_exclusive_group()
    depth.add_argument(
        "--fast", action="store_true", help="the writer's loop: no site, quick tests, only chapters that changed"
    )
    depth.add_argument("--full", action="store_true", help="also the tests that are too long for every day")

    for name, text in PASSED_ON.items():
        sub[name].add_argument("options", nargs=argparse.REMAINDER, metavar="...", help=text)

    sub["edit"].add_argument(
        "chapter", help="for example 04, solutions/04, or a new one: 05_solvers; none: all that are open", **names
    )
    sub["edit"].add_argument("--keep", choices=["scratch", "notebook"], help="which side wins if both have changed")

    sub["refresh"].add_argument("chapter", help="for example 04; none: every chapter and solution", **names)
    sub["setup"].add_argument("--rebuild", action="store_true", help="delete .venv and make it anew")
    return top


def parse(argv):
    "The parsed command line; options without a subcommand are those of `read`."
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["read", *argv]
    if argv[0] in PASSED_ON and argv[1:2] not in (["-h"], ["--help"]):  # all that follows is the other program's
        args = parser().parse_args(argv[:1])
        args.options = argv[1:]
        return args
    return parser().parse_args(argv)


# --- saying what happened --------------------------------------------------------------------------------------------


class Stop(Exception):
    "What happened and what to do, in a line or two."


def say(message):
    "Print a problem; returns the exit code for it."
    sys.stdout.flush()
    print(f"book.py: {message}", file=sys.stderr, flush=True)
    return 1


def free(path):
    "Free space where `path` lies (or will lie), for people."
    while not path.exists():
        path = path.parent
    return f"{shutil.disk_usage(path).free / 1e9:.1f} GB"


def no_space(doing):
    places = {ROOT, Path(tempfile.gettempdir()), Path.home()}
    left = ", ".join(f"{free(place)} in {place}" for place in sorted(places))
    return f"no space left on the disk while {doing} (free: {left}).\nMake room and run again: that repairs it."


def guarded(main):
    "Run `main()`; what goes wrong around a program (Ctrl-C, disk, permissions) is said in a line, not in a traceback."

    def terminated(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminated)
    try:
        return main()
    except Stop as stop:
        return say(str(stop))
    except KeyboardInterrupt:
        say("interrupted. Run the same command again to go on; it repairs what is half done.")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = error.filename or "a file"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return say(no_space(f"writing {where}"))
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return say(
                f"no permission to write {where} ({error.strerror}).\n"
                f"Make {ROOT} yours (chown) or clone the book where you may write."
            )
        raise


@contextlib.contextmanager
def locked(path, waiting):
    "Hold the lock file `path`, so that two book.py do not do the same work at once; says `waiting` if it has to wait."
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"book.py: {waiting}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield


# --- the environment -------------------------------------------------------------------------------------------------


def settings():
    "The keys of settings.ini."
    lines = (ROOT / "settings.ini").read_text(encoding="utf-8").splitlines()
    return dict(re.split(r"\s*=\s*", line, maxsplit=1) for line in lines if re.match(r"\w+\s*=", line))


def pinned(name):
    "'name==version' as constraints.txt has it."
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.lower().startswith(f"{name}=="):
            return line.split(";")[0].strip()
    raise Stop(f"constraints.txt names no version of {name}; restore it: git checkout -- constraints.txt")


def required():
    "Names of the distributions that must be installed."
    cfg = settings()
    keys = ["requirements"] + [f"{extra}_requirements" for extra in [*EXTRAS.split(","), "peers"]]
    names = [re.split(r"[<>=!~\[;]", word)[0] for key in keys for word in cfg[key].split()]
    return [cfg["lib_name"], *names]


PROBE = """
import sys, json, importlib.metadata as m
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps([sys.version_info[:3], {name: version(name) for name in sys.argv[1:]}]))
"""


def probe(names):
    "Ask the environment's Python for its version and those of the distributions `names`; None if it does not run."
    try:
        done = subprocess.run([PYTHON, "-c", PROBE, *names], cwd=VENV, capture_output=True, text=True, timeout=60)
        return json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def inspect():
    "(version of the environment's Python, required distributions it lacks), or None if it does not run."
    found = probe(required())
    return found and (tuple(found[0]), [name for name, version in found[1].items() if version is None])


def key(version):
    "The fingerprint of what an environment is made from."
    digest = hashlib.sha256(repr(list(version)).encode())
    for name in ("settings.ini", "setup.py", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def diagnosis():
    "(None, '') if the environment is whole; else ('make' | 'rebuild' | 'repair', why)."
    if not VENV.exists() and not VENV.is_symlink():
        return "make", "there is no environment yet"
    if UNFINISHED.exists():
        return "rebuild", "the last installation was interrupted"
    found = inspect()
    if found is None or found[0] < (3, 11):
        return "rebuild", "its Python does not run any more"
    version, absent = found
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        stamp = {}
    if stamp and stamp.get("root") != str(ROOT):
        return "rebuild", "the folder has moved"
    if absent:
        return "repair", "missing: " + ", ".join(absent)
    if not stamp:
        return "repair", "it is not known to be whole"
    if stamp.get("key") != key(version):
        return "repair", "settings.ini, setup.py or constraints.txt has changed"
    return None, ""


def distrust_environment():
    "Have the next run make the environment anew."
    UNFINISHED.touch()


class Progress:
    "One line that says what is going on and for how long; rewritten on a terminal, repeated now and then elsewhere."

    def __init__(self, title):
        self.title, self.activity, self.began = title, "", time.monotonic()
        self.terminal = sys.stdout.isatty()
        self.next = 0.0 if self.terminal else 15.0
        if not self.terminal:
            print(f"  {title} ...", flush=True)

    def elapsed(self):
        return time.monotonic() - self.began

    def tick(self):
        if self.elapsed() < self.next:
            return
        self.next = self.elapsed() + (0.2 if self.terminal else 15.0)
        line = f"  {self.title}  {self.elapsed():4.0f} s  {self.activity}"
        if self.terminal:
            print("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        else:
            print(line, flush=True)

    def done(self, word="done"):
        print(
            f"{chr(13) + chr(27) + '[K' if self.terminal else ''}  {self.title}  {self.elapsed():4.0f} s  {word}",
            flush=True,
        )


def activity(line):
    "A line of pip's output in a few words, or None."
    found = re.match(r"\s*(Collecting|Downloading|Using cached|Processing)\s+(\S+)(.*)", line)
    if found:
        size = re.search(r"\(([\d.]+ [kMG]?B)\)", found[3])
        return f"{found[1].lower()} {found[2].rsplit('/', 1)[-1]}{' (' + size[1] + ')' if size else ''}"
    if line.startswith("Installing collected packages:"):
        return f"unpacking {line.count(',') + 1} packages"
    return None


def run_logged(title, command):
    "Run `command` with a line of progress, its output in the log; returns (exit code, its last lines)."
    progress, last = Progress(title), []
    with open(LOG, "a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(map(str, command))}\n")
        log.flush()
        child = subprocess.Popen(command, cwd=ROOT, env=environment_variables(), stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True, errors="replace")  # fmt: skip

        def follow():
            for line in child.stdout:
                last.append(line.rstrip())
                del last[:-200]
                progress.activity = activity(line) or progress.activity
                with contextlib.suppress(OSError, ValueError):
                    log.write(line)

        reader = threading.Thread(target=follow, daemon=True)
        reader.start()
        try:
            while child.poll() is None:
                progress.tick()
                time.sleep(0.1)
        except BaseException:
            child.terminate()
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
            progress.done("interrupted")
            raise
        reader.join(5)
    progress.done("done" if child.returncode == 0 else "failed")
    return child.returncode, last


def failure(what, last):
    "The `Stop` for an installation step that failed with the output `last`."
    text = "\n".join(last)
    if "No space left on device" in text or "Errno 28" in text:
        return Stop(no_space(what))
    if re.search(
        r"NewConnectionError|name resolution|Read timed out|ConnectTimeout|Network is unreachable|ProxyError", text
    ):
        why = "the packages could not be fetched. Check the network and run the same command again."
    elif "ensurepip" in text:
        why = "this Python lacks the venv module. Install it (Debian, Ubuntu: apt install python3-venv) and run again."
    else:
        why = "run the same command again; if it fails in the same way, try: python3 book.py setup --rebuild"
    tail = "\n".join(f"    {line}" for line in last[-12:] if line.strip())
    return Stop(f"{what} failed: {why}\n{tail}\n    (all of it: {LOG})")


def environment_variables():
    "For children: the environment's programs first, no user's site or pip target, no spinning threads."
    env = dict(os.environ, OMP_WAIT_POLICY="PASSIVE", PYTHONNOUSERSITE="1", PIP_USER="0", PIP_NO_INPUT="1",
               PIP_DISABLE_PIP_VERSION_CHECK="1", VIRTUAL_ENV=str(VENV), PYTHONUNBUFFERED="1")  # fmt: skip
    env["PATH"] = f"{VENV / 'bin'}{os.pathsep}{env.get('PATH', os.defpath)}"
    env.pop("PYTHONHOME", None)
    return env


def pip(title, *arguments):
    return run_logged(title, [PYTHON, "-m", "pip", "install", "--progress-bar", "off", *arguments])


def torch_is_there():
    found = probe(["torch"])
    return bool(found) and (found[1]["torch"] or "").split("+")[0] == pinned("torch").split("==")[1]


def install_torch():
    "On Linux without an NVIDIA driver: torch first and alone, from PyTorch's CPU wheels (ordinary ones carry CUDA)."
    if not sys.platform.startswith("linux") or shutil.which("nvidia-smi") or torch_is_there():
        return
    quick = ["--no-deps", "--retries", "0", "--timeout", "5", "--index-url", TORCH_CPU_INDEX]
    code, last = pip(f"{pinned('torch')}, CPU build", *quick, pinned("torch"))
    if code and not any("No space left" in line for line in last):
        print("  PyTorch's own index did not answer: taking the same version from the ordinary index", flush=True)
        code, last = pip(pinned("torch"), "--no-deps", pinned("torch"))
    if code:
        raise failure("installing torch", last)


def install():
    """Everything the environment holds, into the virtual environment that is there. The peers come last, without what
    they ask for: torchvision has no build that fits, and breaks whatever imports it."""
    install_torch()
    code, last = pip("the other packages", "-c", "constraints.txt", "-e", f".[{EXTRAS}]")
    if code:
        raise failure("installing the packages", last)
    peers = settings()["peers_requirements"].split()
    code, last = pip("libraries to compare with", "-c", "constraints.txt", "--no-deps", *peers)
    if code:
        raise failure("installing the libraries to compare with", last)


def remove_environment():
    if VENV.is_symlink() or VENV.is_file():
        VENV.unlink()
    elif VENV.exists():
        shutil.rmtree(VENV)


def make_environment():
    "A bare virtual environment, marked as unfinished from its first moment."
    VENV.mkdir()
    UNFINISHED.touch()
    code, last = run_logged("virtual environment", [sys.executable, "-m", "venv", VENV])
    if code:
        raise failure("making the virtual environment", last)


def mend(action, why):
    "Make, rebuild or repair the environment; its stamp is written last."
    doing = {"make": "setting up", "rebuild": "rebuilding", "repair": "repairing"}[action]
    print(f"book.py: {doing} the environment in .venv ({why})", flush=True)
    began = time.monotonic()
    if action == "rebuild":
        remove_environment()
    if action != "repair":
        if shutil.disk_usage(ROOT).free < SPACE:
            print(
                f"book.py: only {free(ROOT)} are free in {ROOT}; the environment may take {SPACE / 1e9:.0f} GB",
                flush=True,
            )
        make_environment()
    UNFINISHED.touch()
    STAMP.unlink(missing_ok=True)
    try:
        install()
    except Stop as stop:
        if "no space" not in str(stop):  # pip ended by itself and left nothing half written: go on from here next time
            UNFINISHED.unlink()
        raise
    found = inspect()
    if found is None or found[1]:
        raise Stop("the installation ended without an error, and yet something is missing: "
                   f"{', '.join(found[1]) if found else 'Python'}. Try: python3 book.py setup --rebuild")  # fmt: skip
    STAMP.write_text(json.dumps({"key": key(found[0]), "root": str(ROOT)}))
    UNFINISHED.unlink()
    print(f"book.py: the environment is ready ({time.monotonic() - began:.0f} s)", flush=True)


def ensure_environment(rebuild=False):
    "Make sure that the environment is whole, one book.py at a time."
    if not rebuild and diagnosis()[0] is None:
        return False
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with locked(ROOT / ".cache" / "locks" / "environment.lock", "another book.py is installing; waiting for it"):
        action, why = ("rebuild", "as asked") if rebuild else diagnosis()  # the other one may have done it meanwhile
        if action:
            LOG.write_text("")
            mend(action, why)
        return bool(action)


def main():
    args = parse(sys.argv[1:])
    changed = ensure_environment(rebuild=getattr(args, "rebuild", False))
    if args.command == "setup":
        if not changed:
            print("book.py: the environment is whole; nothing to do")
        return 0
    os.chdir(ROOT)
    sys.stdout.flush()
    os.execve(PYTHON, [str(PYTHON), "-m", "dev", *sys.argv[1:]], environment_variables())


if __name__ == "__main__":
    sys.exit(guarded(main))
