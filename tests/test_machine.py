"""`book.py train` and `book.py bench`: what they hand over, and what a model card is written from."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dev import Problem, machine

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    "The folder of a finished run."
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "scenes64"
    (folder / "model" / "unet").mkdir(parents=True)
    save_file(
        {"a": np.zeros((3, 4), "float16"), "b": np.zeros(5, "float16")}, folder / "model" / "unet" / "w.safetensors"
    )
    (folder / "config.json").write_text('{"data": {"scenes": 500}}')
    (folder / "unet.csv").write_text("step,loss\n1,4.0\n2,2.0\n")
    return folder


def called(monkeypatch, *codes: int) -> list[list[str]]:
    "The commands that are run from now on, instead of running them; they end with these codes."
    commands, left = [], list(codes)
    monkeypatch.setattr(machine, "_run", lambda command: commands.append(command[3:]) or left.pop(0))
    return commands


def test_training_is_followed_by_a_measurement_and_a_card(run, monkeypatch, capsys):
    commands = called(monkeypatch, 0, 0)
    assert machine.train(["--device", "cpu"]) == 0
    folder = Path("runs/scenes64")
    assert commands == [
        ["train", "--device", "cpu"],
        ["evaluate", "--prompts", "1000", "--seed", "1"]
        + ["--model", str(folder / "model"), "--json", str(folder / "scores.json")],
    ]
    card = json.loads((run / "card.json").read_text())
    assert card["weights"]["unet/w.safetensors"]["parameters"] == 17
    assert card["configuration"] == {"data": {"scenes": 500}}
    assert card["loss"] == {"unet": {"steps": 2, "last": 3.0, "averaged over": 2}}
    assert card["versions"].keys() == {"stable_diffusion_scratch", "torch", "numpy"}
    assert "card.json" in capsys.readouterr().out


@pytest.mark.parametrize("codes", [(130,), (0, 1)])
def test_what_ends_early_writes_no_card(codes, run, monkeypatch):
    commands = called(monkeypatch, *codes)
    assert machine.train([]) == codes[-1] and len(commands) == len(codes)
    assert not (run / "card.json").exists()


@pytest.mark.parametrize("words", [["--help"], ["--config", "x.toml", "--help"]])
def test_help_trains_nothing(words, run, monkeypatch):
    commands = called(monkeypatch, 0)
    assert machine.train(words) == 0 and commands == [["train", *words]]


@pytest.mark.parametrize(
    "options, folder",
    [
        ([], "runs/scenes64"),
        (["--config", "mine/tiny.toml"], "runs/tiny"),
        (["--config=tiny.toml", "--device", "cpu"], "runs/tiny"),
        (["--out", "elsewhere", "--config", "tiny.toml"], "elsewhere"),
        (["-o", "elsewhere"], "elsewhere"),
        (["-oelsewhere"], "elsewhere"),
    ],
)
def test_the_folder_is_that_of_the_command_line(options, folder):
    assert machine._folder(options) == Path(folder)


def test_a_run_without_weights_is_a_problem(run):
    (run / "model" / "unet" / "w.safetensors").unlink()
    with pytest.raises(Problem, match="holds no weights"):
        machine.card(run)


CHILD = (
    "import sys, time\ntry:\n print('ready', flush=True)\n time.sleep(60)\nexcept KeyboardInterrupt:\n sys.exit(130)"
)


def test_ctrl_c_belongs_to_the_child():
    "Both get it, as from a terminal; the child decides, and its exit code is what counts."
    program = f"import sys\nfrom dev import machine\nsys.exit(machine._run([sys.executable, '-c', {CHILD!r}]))"
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed,
    )
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.2)
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.wait(20) == 130


@pytest.mark.parametrize("words", [["--pairs", "0"], ["--model", "nowhere"], ["--json", "no/such/found.json"]])
@pytest.mark.daily
def test_bench_refuses_in_a_line(words, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "pipeline.py", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"book.py bench: error: {words[0]}")


@pytest.mark.daily
def test_bench_measures_both_and_their_pictures_agree(tmp_path):
    words = ["--pairs", "1", "--steps", "2", "--threads", "1", "--json", "found.json"]
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "pipeline.py", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["largest difference of a pixel"] <= 1 and found["CPU"]["ratio"]["median"] > 0
    assert "ours / diffusers" in done.stdout
