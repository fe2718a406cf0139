"""Training runs: exact resumption after kills, whole files, refusals; and the recipe of the bundled model, in small."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from stable_diffusion_scratch import training
from stable_diffusion_scratch.recipe import CHUNK, make, read_config, scene_set
from stable_diffusion_scratch.training import (
    Run,
    averaged,
    deferred_interrupt,
    fit,
    load_run,
    save_run,
    step_generator,
    train,
    warmup_cosine,
    whole_file,
)  # fmt: skip


def small_run(seed: int = 0, width: int = 8) -> Run:
    "A perceptron with a buffer that learns a sine."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.SiLU(), nn.Linear(width, 4))

    def loss(model, generator):
        x = torch.randn(16, 4, generator=generator)
        return ((model(x) - x.sin()) ** 2).mean()

    return Run(net, loss, warmup_cosine(1e-2, 50, 5), seed=seed)


def exhaust(steps) -> None:
    for _ in steps:
        pass


def state(run: Run) -> list[torch.Tensor]:
    moments = [v for p in run.model.parameters() for v in run.optimizer.state[p].values()]
    return [*run.model.state_dict().values(), *run.average.values(), *moments]


def test_stopped_anywhere_and_resumed_is_exact(tmp_path):
    straight = small_run()
    exhaust(train(straight, 50))
    for stop_after in (1, 7, 23, 50):
        path = tmp_path / f"{stop_after}.safetensors"
        for report in fit(small_run(), 50, path):
            if report.step == stop_after:
                break
        resumed = small_run()
        exhaust(fit(resumed, 50, path))
        assert resumed.step == 50 and resumed.losses == straight.losses
        assert all(torch.equal(a, b) for a, b in zip(state(resumed), state(straight), strict=True))


def test_what_is_drawn_in_between_changes_nothing():
    quiet, noisy = small_run(), small_run()
    exhaust(train(quiet, 10))
    for _ in train(noisy, 10):
        torch.randn(3)
        with averaged(noisy):
            pass
    assert noisy.losses == quiet.losses


def test_average_of_the_parameters_and_not_of_buffers():
    run = small_run()
    expected = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for report in train(run, 20):
        d = min(run.decay, (1 + report.step) / (10 + report.step))
        expected = {n: d * expected[n] + (1 - d) * p.detach() for n, p in run.model.named_parameters()}
    assert run.average.keys() == expected.keys() == dict(run.model.named_parameters()).keys()
    for name, value in expected.items():
        torch.testing.assert_close(run.average[name], value)
    own = {name: value.clone() for name, value in run.model.state_dict().items()}
    with averaged(run) as model:
        assert torch.equal(model[0].weight, run.average["0.weight"])
        assert torch.equal(model[1].running_mean, own["1.running_mean"])
    assert all(torch.equal(value, own[name]) for name, value in run.model.state_dict().items())


def test_divergence_stops_before_the_weights(tmp_path):
    run = small_run()
    exhaust(fit(run, 3, tmp_path / "run.safetensors"))
    before = [value.clone() for value in state(run)]
    run.loss = lambda model, generator: model[0].weight.sum() * torch.inf
    with pytest.raises(FloatingPointError, match=r"step 3: loss .*step_generator\(0, 3\)"):
        exhaust(fit(run, 5, tmp_path / "run.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(state(run), before, strict=True))


@given(st.floats(1e-6, 1), st.integers(1, 2000), st.integers(0, 500), st.floats(0, 1), st.integers(0, 3000))
def test_the_rate_stays_between_zero_and_its_peak(peak, steps, warmup, floor, k):
    rate = warmup_cosine(peak, steps, warmup, floor)(k)
    assert 0 <= rate <= peak * (1 + 1e-12)
    if k >= steps > warmup:
        assert rate == pytest.approx(floor * peak)


def test_streams_of_seeds_and_steps():
    draws = {tuple(torch.rand(2, generator=step_generator(s, k)).tolist()) for s in range(5) for k in range(50)}
    assert len(draws) == 250
    with pytest.raises(ValueError, match="seed 429"):
        step_generator(429, 0)
    with pytest.raises(ValueError, match="step -1"):
        step_generator(0, -1)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    exhaust(fit(small_run(), 5, path))
    old = path.read_bytes()

    def full(tensors, part, metadata):
        part.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part))

    monkeypatch.setattr(training, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        exhaust(fit(small_run(), 9, path))
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["run.safetensors"]


def test_whole_file_makes_folders_and_keeps_nothing_of_a_failure(tmp_path):
    with whole_file(tmp_path / "a" / "b.txt") as part:
        part.write_text("whole")
    assert (tmp_path / "a" / "b.txt").read_text() == "whole"
    with pytest.raises(RuntimeError), whole_file(tmp_path / "a" / "b.txt") as part:
        part.write_text("ha")
        raise RuntimeError
    assert (tmp_path / "a" / "b.txt").read_text() == "whole" and len(os.listdir(tmp_path / "a")) == 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_an_unreadable_run_is_said(tmp_path, damage):
    path = tmp_path / "run.safetensors"
    exhaust(fit(small_run(), 2, path))
    data = {"truncated": path.read_bytes()[:-100], "empty": b"", "text": b"not a run" * 100}[damage]
    path.write_bytes(data)
    run = small_run()
    with pytest.raises(ValueError, match="cannot read the run .*remove it"):
        load_run(run, path)
    assert run.step == 0


def test_another_network_or_seed_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    exhaust(fit(small_run(), 2, path))
    for run, message in ((small_run(width=9), "another network"), (small_run(seed=1), "seed 0, not 1")):
        before = run.model[0].weight.clone()
        with pytest.raises(ValueError, match=message):
            load_run(run, path)
        assert run.step == 0 and torch.equal(run.model[0].weight, before)


def test_the_first_interrupt_waits_and_the_second_does_not():
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert signal.getsignal(signal.SIGINT) is former


def test_save_and_load_are_inverse(tmp_path):
    run, other = small_run(), small_run()
    exhaust(train(run, 4))
    save_run(run, tmp_path / "run.safetensors")
    load_run(other, tmp_path / "run.safetensors")
    assert (other.step, other.losses) == (run.step, run.losses)
    assert all(torch.equal(a, b) for a, b in zip(state(run), state(other), strict=True))


# --- the recipe ------------------------------------------------------------------------------------------------------


def tiny_config() -> dict:
    "The recipe of the bundled model with everything made small."
    config = read_config()
    config["data"]["scenes"] = CHUNK
    config["vae"] |= {"channels": [8, 8, 8, 8]}
    config["unet"] |= {"channels": [16], "depth": [1], "heads": [2], "groups": 8}
    config["text"] |= {"width": 16, "layers": 1, "heads": 2, "mlp_width": 32}
    config["vae_training"] |= {"steps": 40, "batch": 2}
    config["unet_training"] |= {"steps": 80, "batch": 4}
    return config


@pytest.fixture(scope="module")
def scenes_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    scene_set(folder, CHUNK)
    return folder


@pytest.mark.daily
def test_killed_at_ten_random_moments_ends_in_the_same_weights(tmp_path, scenes_folder):
    program = (
        "import json, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from stable_diffusion_scratch.recipe import make\n"
        "if __name__ == '__main__':\n"
        "    for progress in make(json.loads(sys.argv[1]), sys.argv[2], every=0.0):\n"
        "        print(progress.stage, progress.step, flush=True)\n"
    )
    (tmp_path / "make.py").write_text(program)
    for name in ("quiet", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scenes").symlink_to(scenes_folder)

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, tmp_path / "make.py", json.dumps(tiny_config()), tmp_path / name]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    chance = random.Random(0)
    seen = []
    for _ in range(10):
        worker = start("killed")
        for _ in range(chance.randint(1, 12)):
            line = worker.stdout.readline()
        time.sleep(chance.random() * 0.03)  # in a step, in a save, between the two
        worker.kill()
        worker.communicate()
        assert worker.returncode == -signal.SIGKILL, "it ended before it was killed"
        seen.append(line.strip())
    assert len(set(seen)) > 5
    for name in ("killed", "quiet"):
        worker = start(name)
        worker.communicate()
        assert worker.returncode == 0
    for file in ("vae.safetensors", "unet.safetensors", "model/unet/diffusion_pytorch_model.safetensors"):
        one, other = load_file(tmp_path / "quiet" / file), load_file(tmp_path / "killed" / file)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), file
    assert not list((tmp_path / "quiet").rglob("*.part"))


@pytest.mark.daily
def test_an_encoder_that_goes_to_school_learns_nothing_afterwards(tmp_path, scenes_folder):
    (tmp_path / "scenes").symlink_to(scenes_folder)
    config = tiny_config()
    config["text_training"] = {"steps": 9, "batch": 4, "rate": 1e-3, "decay": 0.9, "forget": 0.25, "seed": 3}
    config["unet_training"] |= {"steps": 6}
    for progress in make(config, tmp_path):  # stopped in school, once
        if (progress.stage, progress.step) == ("text", 4):
            break
    stages = [progress.stage for progress in make(config, tmp_path)]
    assert stages == ["text"] * 5 + ["unet"] * 6
    learnt, used = load_file(tmp_path / "text.safetensors"), load_file(tmp_path / "unet.safetensors")
    names = [name for name in learnt if name.startswith("average.encoder.")]
    assert len(names) > 10
    for name in names:
        assert torch.equal(learnt[name], used[name.replace("average.encoder.", "model.text_encoder.")]), name
    config["text_training"]["steps"] = 0
    del config["text_training"]["seed"]
    with pytest.raises(ValueError, match=r"\[text_training\]: missing or unknown: seed"):
        next(make(config, tmp_path))


def test_another_configuration_is_refused(tmp_path, scenes_folder):
    (tmp_path / "scenes").symlink_to(scenes_folder)
    config = tiny_config()
    next(make(config, tmp_path))
    config["vae_training"]["beta"] = 1.0
    with pytest.raises(ValueError, match="another configuration"):
        next(make(config, tmp_path))


def test_an_unreadable_configuration_is_said(tmp_path):
    (tmp_path / "bad.toml").write_text("[data\n")
    for name in ("bad.toml", "none.toml"):
        with pytest.raises(ValueError, match=f"cannot read the configuration .*{name}"):
            read_config(tmp_path / name)


def test_a_number_of_scenes_that_makes_no_whole_files(tmp_path):
    with pytest.raises(ValueError, match="multiple of 500, got 700"):
        scene_set(tmp_path, 700)


@pytest.mark.parametrize("section, key", [("data", "scene"), ("vae", "layer"), ("text", "widht"), ("unet", "chanels")])
def test_a_wrong_key_is_said_before_anything_is_made(tmp_path, section, key):
    config = tiny_config()
    config[section][key] = 1
    with pytest.raises(ValueError, match=f"configuration, .*{key}"):
        next(make(config, tmp_path))
    assert os.listdir(tmp_path) == []
