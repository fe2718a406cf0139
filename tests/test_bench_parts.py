"""`book.py bench NAME`: which measurement runs, what its bound means, and that its parts agree with their peers'."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dev import Problem, machine

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import parts

    return parts


@pytest.mark.parametrize(
    "words, script, rest",
    [
        ([], "pipeline.py", []),
        (["--pairs", "5"], "pipeline.py", ["--pairs", "5"]),
        (["parts", "--pairs", "5"], "parts.py", ["--pairs", "5"]),
        (["pipeline", "--count", "2"], "pipeline.py", ["--count", "2"]),
    ],
)
def test_the_first_word_names_the_measurement(words, script, rest, monkeypatch):
    called = []
    monkeypatch.setattr(machine.os, "execv", lambda program, command: called.extend(command[1:]))
    machine.bench(words)
    assert called == [str(BENCH / script), *rest]


def test_a_measurement_that_is_not_there():
    with pytest.raises(Problem, match="no measurement 'partz'; there are: .*parts"):
        machine.bench(["partz"])


def test_the_bound_holds_the_median_as_often_as_it_says(parts):
    draws = torch.randn(400, 25, generator=torch.Generator().manual_seed(0)).exp()  # of median 1, skewed
    bounds = [parts.bound(row) for row in draws.tolist()]
    inside = sum(b["low"] <= 1 <= b["high"] for b in bounds) / len(bounds)
    assert 0.93 < inside <= 1  # at least 95 %, within the error of 400 trials
    assert all(b["low"] <= b["median"] <= b["high"] for b in bounds)
    assert parts.bound([1.0, 2.0, 3.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}  # too few for 95 %: the range
    assert parts.bound(list(range(25)))["low"] == 7 and parts.bound(list(range(25)))["high"] == 17  # tables: 8th, 18th


@pytest.mark.daily
def test_a_part_is_measured_beside_its_peer(tmp_path):
    words = ["--pairs", "1", "--only", "text encoder, forward and backward", "--json", "found.json"]
    done = subprocess.run([sys.executable, BENCH / "parts.py", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["parts"]["text encoder, forward and backward"]
    assert found["relative difference"] < 1e-5 and found["CPU"]["ratio"]["median"] > 0


@pytest.mark.daily
@pytest.mark.parametrize("words", [["--pairs", "0"], ["--json", "no/such/file.json"]])
def test_parts_refuses_in_a_line(words, tmp_path):
    done = subprocess.run([sys.executable, BENCH / "parts.py", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"book.py bench parts: error: {words[0]}")
