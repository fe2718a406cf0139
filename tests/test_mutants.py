"Mutants of sources, and who notices them: a small chapter with a check that bites and one that does not."

import sys

import nbformat
import pytest
from nbformat import v4

from dev import chapters, mutate, rerun
from dev.mutants import mutants_of

SOURCE = """
LIMIT: float = 0.5


def spread(x: Float[Tensor, "b 2"], k: int = 3) -> Float[Tensor, " b"]:
    "Not 2 things."
    if not k > 0:
        raise ValueError(f"k = {k + 1}: at least 1")
    return ((x[1:] - x[k]) ** 2).sum(-1, keepdim=True).sqrt() / max(k, 2)  # the root
"""


def changes(source, **options):
    return [m.key for m in mutants_of(source, **options)]


def test_kinds_of_mutants():
    keys = changes(SOURCE)
    assert len(keys) == len(set(keys)) == len(mutants_of(SOURCE))
    for part in (
        "LIMIT: LIMIT: float = 0.5 -> LIMIT: float = 1.0",
        "3 -> 6",
        "not k > 0 -> not (k < 0)",
        "not k > 0 -> (k > 0)",
        "x[1:] - x[k]) ** 2).sum -> ((x[1:] - x[k])).sum",
        "x[1:] - x[k]) ** 2 -> ((x[1:] + x[k])) ** 2",
        "1: -> 2:",
        "x[k] -> x[k + 1]",
        "-1 -> -2",
        "max(k, 2) -> min(k, 2)",
        "** 2).sum(-1, keepdim=True).sqrt() * max(k, 2))",
    ):
        assert any(part in key for key in keys), part
    assert not any("at least" in key or "Tensor" in key or "keepdim=False" in key or "Not" in key for key in keys)
    assert all("# the root" in m.source and m.source.count("\n") == SOURCE.count("\n") for m in mutants_of(SOURCE))


def test_names_do_not_depend_on_the_neighbours():
    assert changes(SOURCE) == changes(SOURCE.replace("LIMIT: float = 0.5", "LIMIT: float = 0.5\n\n\n#"))
    twice = "def f(x):\n    return x[0] + x[0]\n"
    assert changes(twice)[1:] == ["f: x[0] -> x[1]", "f: x[0] -> x[1] (2)"]


def test_tolerances_of_a_check_are_left_alone():
    source = "assert_close(2 * a, b, rtol=1e-9, atol=0)\nassert abs(a - b) < 3 and c == 4"
    keys = changes(source, of_check=True)
    assert len(keys) == 4, keys  # the factor (for /, doubled), the difference, and/or


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A package with one module, its chapter and its test."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "tests").mkdir()
    package = tmp_path / "small_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    cells = {
        "head": "#| default_exp growth",
        "code": "#| export\ndef area(r):\n    return 3 * r**2\n\n\ndef double(x):\n    return 2 * x",
        "check": "# check: eq-area\nassert area(2) == 12",
        "blind": "# check: eq-blind\nassert area(0) == 0",
    }
    (package / "growth.py").write_text(cells["code"].replace("#| export\n", "") + "\n")
    (tmp_path / "tests" / "test_growth.py").write_text(
        "from small_package.growth import double\n\n\ndef test_double():\n    assert double(0.0) == 0.0\n"
    )
    notebook = v4.new_notebook(cells=[v4.new_code_cell(text) for text in cells.values()])
    nbformat.write(notebook, tmp_path / "nbs" / "01_growth.ipynb")
    (tmp_path / "equivalent.toml").write_text("[growth]\n'double: 2 * x -> 4 * x' = 'a reason'\n'gone' = 'stale'\n")
    for module in (mutate, chapters):
        for name, value in {"ROOT": tmp_path, "NBS": tmp_path / "nbs", "CACHE": tmp_path / ".cache",
                            "PACKAGE": "small_package", "EXPLAINED": tmp_path / "equivalent.toml"}.items():  # fmt: skip
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(rerun, "stub_figures", lambda: None)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.daily
def test_who_notices_what(small, capsys):
    result = mutate.run(["growth"], thorough=True)["growth"]
    assert result["functions"]["area"] == {"mutants": 4, "by the chapter": 4}
    # 2 / x: division by zero; 2 * x doubled: noticed by nobody
    assert result["functions"]["double"] == {"mutants": 2, "by the tests alone": 1, "by the tests": 1, "survive": 1}
    assert result["survive"] == {"double: 2 * x -> 4 * x": "a reason"}
    assert result["checks"] == {
        "eq-area": {"functions": 4, "own": 1, "of": 1},
        "eq-blind": {"functions": 0, "own": 1, "of": 1},
    }
    said = capsys.readouterr().out
    assert "6 mutants of 2 exports; 4 noticed by the chapter, 1 by the tests alone; 1 survive, 1 explained" in said
    assert mutate.problems("growth", result) == ["equivalent.toml explains what is no mutant of growth: gone"]
    assert mutate.run(["growth"], thorough=True)["growth"] == result  # from the cache
    assert "__main__" in sys.modules and "small_package" not in sys.modules  # all of it in other processes


def test_what_is_a_problem(small):
    checks = {"eq-a": {"functions": 0, "own": 0, "of": 3}, "eq-b": {"functions": 0, "own": 1, "of": 1}}
    result = {"survive": {"f: a -> b": "", "f: c -> d": "equal"}, "keys": ["f: a -> b", "gone"], "checks": checks}
    found = mutate.problems("growth", {**result, "keys": [*result["keys"], "double: 2 * x -> 4 * x"]})
    assert found == ["growth: nobody notices  f: a -> b",
                     "growth: the check of eq-a notices no mutant, not even of its own lines"]  # fmt: skip


def test_a_fork_that_never_answers():
    def forever():
        while True:
            pass

    assert isinstance(rerun.forked(forever, cpu=0.1), str)
    assert isinstance(rerun.forked(lambda: 1 / 0), str)
    assert rerun.forked(lambda: {"a": [1]}) == {"a": [1]}
