"""Mutation testing: change each exported function a little, and see whether the chapter's checks and the tests notice.

`.venv/bin/python -m dev.mutate forward` judges one module; `book.py test --full` those of `MODULES`. A mutant has one
change (see `dev/mutants.py`). The chapter judges first, its cells executed from the mutated definition on; who gets
past it meets the module's quick tests; each in a fork of a process that has everything imported (`dev/rerun.py`). Who
survives both must be explained in `dev/equivalent_mutants.toml`. A check that notices no mutant of any function is
given mutants of its own lines, to show that it could fail.

Our own because mutmut and cosmic-ray run a test command on mutated files: neither can execute a notebook from the
mutated cell on, nor say which labelled result's check did the killing.
"""

import argparse
import hashlib
import json
import sys
import time
import tomllib
import types
from collections import Counter
from pathlib import Path

from nbformat import NotebookNode

from dev import CACHE, PACKAGE, ROOT, Problem, chapters, notebooks, rerun
from dev.mutants import mutants_of
from dev.rerun import forked, label_of

# Not yet: `samplers` (112 mutants) and `solvers` (627) have not been judged to the end, so a run may find survivors.
MODULES = ("forward", "score", "denoisers")
EXPLAINED = ROOT / "dev" / "equivalent_mutants.toml"
QUICK = "not daily and not slow and not full"
CPU = 90  # seconds of a chapter with a mutant in it; one without takes less than half of that


# --- the chapter of a module -----------------------------------------------------------------------------------------


def chapter_of(module: str) -> Path:
    for path in chapters.find():
        first = notebooks.code_cells(notebooks.read(path))[:1]
        if first and f"default_exp {module}" in notebooks.directives(first[0].source):
            return path
    raise Problem(f"no chapter exports {module!r}")


def exported(cell: NotebookNode) -> bool:
    return any(line.startswith("export") for line in notebooks.directives(cell.source))


def judge_by_chapter(module: str, thorough: bool) -> dict:
    "All mutants of the module and who noticed them, and what each check notices; for a process of its own."
    chapter, reasons, found, own = rerun.Chapter(chapter_of(module)), explained(module), [], {}
    for i, cell in enumerate(chapter.cells):
        source, label = notebooks.plain(cell.source), label_of(cell)
        if exported(cell):
            for mutant in mutants_of(source):
                known = mutant.key in reasons and not thorough  # it would run to the very end
                noticed = [] if known else forked(lambda i=i, m=mutant: chapter.rest(i, m.source, thorough), CPU)
                noticed = [f"error: {noticed}"] if isinstance(noticed, str) else noticed
                found.append({"key": mutant.key, "old": source, "new": mutant.source, "noticed": noticed})
        elif label:
            bites = own.setdefault(label, [])
            if thorough or not any(label in m["noticed"] for m in found):
                for mutant in mutants_of(source, of_check=True):
                    bites.append("AssertionError" in forked(lambda m=mutant: chapter.run(m.source), CPU))
                    if bites[-1] and not thorough:
                        break
        if raised := chapter.run(source):
            raise Problem(f"{chapter.name} raises {', '.join(raised)} without any mutation, in\n{cell.source}")
    checks = {label: {"functions": sum(label in m["noticed"] for m in found), "own": sum(bites), "of": len(bites)}
              for label, bites in own.items()}  # fmt: skip
    return {"mutants": found, "checks": checks}


# --- the tests of a module -------------------------------------------------------------------------------------------


def tests_of(module: str) -> list[Path]:
    return sorted(p for stem in ("test_", "test_bite_") for p in (ROOT / "tests").glob(f"{stem}{module}.py"))


def passes_tests(module: str, source: str) -> bool:
    "Whether the module's quick tests pass with its text replaced by `source`; for a process of its own."
    import hypothesis
    import pytest

    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, phases=phases)
    hypothesis.settings.load_profile("mutants")
    name = f"{PACKAGE}.{module}"
    stand_in = types.ModuleType(name)
    package = __import__(PACKAGE)
    stand_in.__package__, sys.modules[name] = PACKAGE, stand_in
    setattr(package, module, stand_in)
    exec(compile(source, f"<{name}, mutated>", "exec"), stand_in.__dict__)
    options = ["-x", "--tb=no", "-p", "no:cacheprovider", "-m", QUICK]
    tests = [str(path) for path in tests_of(module)]
    return not tests or pytest.main([*options, *tests]) == 0


def judge_by_tests(module: str, mutants: list[dict]) -> None:
    "Add to each mutant whether the module's quick tests notice it."
    source = (ROOT / PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    source = source.replace("\nfrom .", f"\nfrom {PACKAGE}.")
    alone = forked(lambda: [passes_tests(module, source), time.process_time()])
    if isinstance(alone, str) or not alone[0]:
        raise Problem(f"{module}: its tests fail without any mutation; run: .venv/bin/python -m pytest tests")
    for mutant in mutants:
        old, new = (as_exported(mutant[which]) for which in ("old", "new"))
        if source.count(old) != 1:
            raise Problem(f"{PACKAGE}/{module}.py is not in step with its notebook; run: python3 book.py export")
        mutated = source.replace(old, new)
        mutant["tests"] = forked(lambda it=mutated: passes_tests(module, it), 3 * alone[1] + 20) is not True


def as_exported(cell: str) -> str:
    "A cell's code as nbdev writes it into the module, but for relative imports."
    lines = [line for line in cell.splitlines() if not line.startswith("#|")]
    return "\n".join(lines).strip()


# --- a module, and all of them ---------------------------------------------------------------------------------------


def judge(module: str, thorough: bool) -> dict:
    "Mutants by who noticed them, in all and by function; the checks' bites; the survivors, with their reasons."
    began = time.monotonic()
    result = forked(lambda: judge_by_chapter(module, thorough), quiet=False)
    if isinstance(result, str):
        raise Problem(f"{module}: its chapter could not be executed here (above)")
    mutants, reasons, functions = result["mutants"], explained(module), {}
    unexplained = [m for m in mutants if not m["noticed"] and m["key"] not in reasons]
    judge_by_tests(module, mutants if thorough else unexplained)
    for mutant in mutants:
        how = "by the chapter" if mutant["noticed"] else "by the tests alone" if mutant.get("tests") else "survive"
        counts = functions.setdefault(mutant["key"].split(":")[0].split(".")[0], Counter())
        counts.update(["mutants", how] + ["by the tests"] * (thorough and mutant["tests"]))
    alive = [m["key"] for m in mutants if not m["noticed"] and not m.get("tests")]
    return {"all": sum(functions.values(), Counter()), "functions": functions, "checks": result["checks"],
            "survive": {key: reasons.get(key, "") for key in alive}, "keys": [m["key"] for m in mutants],
            "seconds": round(time.monotonic() - began)}  # fmt: skip


def explained(module: str) -> dict[str, str]:
    "Why mutants of this module that survive do no harm, by key."
    return tomllib.loads(EXPLAINED.read_text(encoding="utf-8")).get(module, {})


def problems(module: str, result: dict) -> list[str]:
    "Survivors without a reason, reasons without a mutant, and checks that notice nothing: a line each."
    wrong = [f"{module}: nobody notices  {key}" for key, reason in result["survive"].items() if not reason]
    wrong += [f"{EXPLAINED.name} explains what is no mutant of {module}: {key}"
              for key in explained(module) if key not in result["keys"]]  # fmt: skip
    return wrong + [f"{module}: the check of {label} notices no mutant, not even of its own lines"
                    for label, c in result["checks"].items() if not c["functions"] + c["own"]]  # fmt: skip


def describe(module: str, result: dict) -> str:
    count, bites = Counter(result["all"]), []
    for label, c in result["checks"].items():
        bites.append(f"{label} {c['functions']}" + (f" (own lines {c['own']} of {c['of']})" if c["of"] else ""))
    return (f"  {module}: {count['mutants']} mutants of {len(result['functions'])} exports; {count['by the chapter']} "
            f"noticed by the chapter, {count['by the tests alone']} by the tests alone; {count['survive']} survive, "
            f"{sum(map(bool, result['survive'].values()))} explained  ({result['seconds']} s)\n"
            f"    noticed by each check: {', '.join(bites)}")  # fmt: skip


def key_of(module: str) -> str:
    "Changes with the chapter, what it imports, the tests, the explanations and this tool."
    files = [*tests_of(module), EXPLAINED, Path(__file__), Path(mutants_of.__code__.co_filename)]
    digest = hashlib.sha256(chapters.key_of(chapter_of(module)).encode())
    return hashlib.sha256(digest.digest() + b"".join(p.read_bytes() for p in files)).hexdigest()[:24]


def run(modules: list[str], thorough: bool = False) -> dict[str, dict]:
    "Judge modules one after the other, each a line or two; a run of the same sources is taken from the cache."
    import hypothesis  # noqa: F401  all of these once, for all forks
    import matplotlib.pyplot as plt
    import pytest  # noqa: F401
    import torch

    plt.switch_backend("agg")
    torch.set_num_threads(1)  # a fork has no other threads
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))  # its first call imports for half a second
    results = {}
    for module in modules:
        kept = CACHE / "mutants" / f"{module}-{key_of(module)}{'-thorough' * thorough}.json"
        if not kept.exists():
            notebooks.write_text(json.dumps(judge(module, thorough)), kept)
        results[module] = json.loads(kept.read_text(encoding="utf-8"))
        print(describe(module, results[module]), flush=True)
    return results


def check() -> list[str]:
    "The step of `book.py test --full`."
    present = [name for name in MODULES if (ROOT / PACKAGE / f"{name}.py").exists()]
    return [line for module, result in run(present).items() for line in problems(module, result)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.mutate", description=__doc__.split("\n")[0])
    parser.add_argument("module", nargs="+", help=f"of the package, for example: {', '.join(MODULES)}")
    parser.add_argument("--thorough", action="store_true", help="all checks and the tests judge every mutant")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the counts to this file")
    args = parser.parse_args()
    try:
        results = run(args.module, args.thorough)
    except Problem as problem:
        print(f"  {problem}")
        return 1
    wrong = [line for module, result in results.items() for line in problems(module, result)]
    print("\n".join(f"  {line}" for line in wrong))
    if args.json:
        known = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
        known |= {module: {k: v for k, v in result.items() if k != "keys"} for module, result in results.items()}
        args.json.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
