"""Training runs: exact resumption after kills, whole files, refusals; and the recipe of the bundled model, in small."""

import errno
import json
import os
import random
import signal
import sys
import time
import types
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from stable_diffusion_scratch import training
from stable_diffusion_scratch.recipe import CHUNK, drawn, make, read_config, scene_set
from stable_diffusion_scratch.scenes import sample_scenes
from stable_diffusion_scratch.training import (
    STEPS_PER_SEED,
    Run,
    autopsy,
    averaged,
    deferred_interrupt,
    exponent,
    fit,
    in_turn,
    linear_loss,
    load_run,
    loss_picture,
    mix,
    mixing,
    profile_products,
    relative_width,
    save_failure,
    save_run,
    step_generator,
    to_csv,
    to_tensorboard,
    train,
    warmup_cosine,
    whole_file,
    with_bar,
)  # fmt: skip
from stable_diffusion_scratch.vae import VAE, VAEConfig


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


# --- a loss that is not finite ---------------------------------------------------------------------------------------


class Poison(nn.Module):
    "Answers with infinity if its input holds a number above 3."

    def forward(self, x):
        return torch.where(x > 3, torch.inf, x)


def poisoned_run(parts: int = 1) -> Run:
    run = small_run()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Sequential(nn.SiLU(), Poison()), nn.Linear(8, 4))
    return Run(net, run.loss, run.rate, parts=parts)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_fatal_batch_is_kept_and_repeats_elsewhere(tmp_path, parts):
    run, states = poisoned_run(parts), {}
    with pytest.raises(FloatingPointError) as caught:
        for report in fit(run, 5000, tmp_path / "run.safetensors"):
            states = {report.step: [value.clone() for value in state(run)]}
    message, fatal = str(caught.value), run.step
    file = tmp_path / f"run-failed-at-{fatal}.safetensors"
    assert f"step {fatal}: loss" in message and str(file) in message and "in 2.1 (Poison)" in message
    assert all(torch.equal(a, b) for a, b in zip(state(run), states[fatal], strict=True))  # buffers, too
    kept = load_file(file)
    again = poisoned_run(parts)
    load_run(again, file)
    assert all(torch.equal(a, b) for a, b in zip(state(again), states[fatal], strict=True))
    given = kept["given.0"]
    assert given.shape == (16, 4) and not torch.isfinite(again.model(given)).all()
    generator = torch.Generator()
    generator.set_state(kept["generator"])
    assert torch.equal(torch.randn(16, 4, generator=generator), given)
    fresh = poisoned_run(parts)
    load_run(fresh, file)
    with pytest.raises(FloatingPointError, match=f"step {fatal}: "):
        next(train(fresh, fatal + 1))
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "loss, where",
    [
        (lambda model, g: model(torch.full((4, 4), torch.nan)).sum(), "in what the network was given"),
        (lambda model, g: model(torch.ones(4, 4)).sum() * torch.inf, "in the loss, after the network"),
        (lambda model, g: (model(torch.ones(4, 4)).sum() * 0).sqrt(), "in the gradient of 0.weight"),
        (lambda model, g: model(torch.ones(4, 4)).sum(), "nowhere: a second try was finite"),
    ],
)
def test_where_a_number_was_lost(loss, where, tmp_path):
    run = small_run()
    run.loss = loss
    before = [value.clone() for value in run.model.state_dict().values()]
    given, part, said = autopsy(run)
    assert said.startswith(where) and part == 0 and given[0].shape == (4, 4)
    assert all(torch.equal(a, b) for a, b in zip(run.model.state_dict().values(), before, strict=True))
    assert all(p.grad is None for p in run.model.parameters())
    assert not run.model[0]._forward_hooks and not run.model[0]._forward_pre_hooks
    assert where in save_failure(run, tmp_path / "run.safetensors")


# --- averages chosen afterwards --------------------------------------------------------------------------------------


@given(st.floats(0.003, 0.2886))
def test_width_and_exponent_are_inverse(width):
    gamma = exponent(width)
    assert gamma >= 0 and relative_width(gamma) == pytest.approx(width, rel=1e-9)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.289, float("nan")])
def test_impossible_widths_are_refused(width):
    with pytest.raises(ValueError, match=r"relative width lies in \(0, 0.2887\]"):
        exponent(width)


def test_exponents_of_the_paper_and_its_cubic():
    "Karras 2024b: widths 0.05 and 0.10 have gamma 16.97 and 6.94; algorithm 2 takes the largest root of a cubic."
    assert exponent(0.05) == pytest.approx(16.97, abs=5e-3) and exponent(0.1) == pytest.approx(6.94, abs=5e-3)
    for width in (0.01, 0.07, 0.2, 0.28):
        t = width**-2
        assert exponent(width) == pytest.approx(np.roots([1, 7, 16 - t, 12 - t]).real.max(), rel=1e-7)


def test_the_power_average_is_the_weighted_sum_it_should_be():
    run = Run(small_run().model, small_run().loss, warmup_cosine(1e-2, 40, 5), widths=(0.1, 0.25))
    seen = []
    for _ in train(run, 40):
        seen.append(run.model[0].weight.detach().double().clone())
    for width, average in zip(run.widths, run.powers, strict=True):
        edges = (torch.arange(41).double() / 40) ** (exponent(width) + 1)
        expected = sum(w * p for w, p in zip(edges.diff(), seen, strict=True))
        torch.testing.assert_close(average["0.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert not any("running" in name for average in run.powers for name in average)


def test_mixed_averages_are_the_ones_that_were_not_kept(tmp_path):
    others = (0.03, 0.15, 0.25)
    run = Run(small_run().model, small_run().loss, lambda k: 1e-2, widths=(0.05, 0.1, *others))
    exhaust(fit(run, 400, tmp_path / "run.safetensors", snapshots=25))
    files = sorted((tmp_path / "run-averages").glob("*.safetensors"))
    assert len(files) == 16

    def between(one: dict, other: dict) -> float:
        return sum(((one[n] - other[n]) ** 2).sum().item() for n in one) ** 0.5

    for width, average in zip(run.widths, run.powers, strict=True):
        mixed = mix(files, width, use=(0.05, 0.1))
        assert mixed.keys() == average.keys()
        nearest = min(between(average, kept) for kept in run.powers[:2])
        assert between(mixed, average) <= 0.25 * nearest + 1e-6, width
    middle = mix(files, 0.1, step=200, use=(0.05, 0.1))
    kept = load_file(files[7])
    for name, value in middle.items():
        torch.testing.assert_close(value, kept[f"0.1.{name}"], rtol=1e-4, atol=1e-5)
    with averaged(run, middle) as model:
        assert torch.equal(model[0].weight, middle["0.weight"])
    with pytest.raises(ValueError, match="no snapshot with averages at step 201"):
        mix(files, 0.1, step=201)
    with pytest.raises(ValueError, match="no snapshot with averages at all"):
        mix([tmp_path / "run.safetensors"], 0.1)


def test_products_of_profiles_and_what_is_mixed():
    fine = (torch.arange(200_000).double() + 0.5) / 200_000
    shape = lambda g, t: (g + 1) / t * (fine / t) ** g * (fine <= t)  # noqa: E731
    for (g, t), (d, u) in (((3.0, 0.7), (9.0, 1.0)), ((0.0, 0.5), (16.0, 0.4)), ((2.0, 0.3), (2.0, 0.3))):
        product = profile_products(*(torch.tensor([z]).double() for z in (g, t, d, u)))
        assert product.item() == pytest.approx((shape(g, t) * shape(d, u)).mean().item(), rel=1e-3)
    one = mixing([0.05, 0.1, 0.1], [100, 50, 100], 0.1, 100)  # it was kept: take it
    torch.testing.assert_close(one, torch.tensor([0.0, 0.0, 1.0]).double(), rtol=0, atol=1e-9)


def test_a_run_without_these_averages_is_refused(tmp_path):
    exhaust(fit(small_run(), 3, tmp_path / "run.safetensors"))
    other = Run(small_run().model, small_run().loss, lambda k: 1e-2, widths=(0.1,))
    with pytest.raises(ValueError, match=r"no averages of the widths \(0.1,\)"):
        load_run(other, tmp_path / "run.safetensors")
    cut = Run(small_run().model, small_run().loss, lambda k: 1e-2, parts=2)
    with pytest.raises(ValueError, match="made with 1 parts, not 2"):
        load_run(cut, tmp_path / "run.safetensors")


# --- order, parts, yardsticks ----------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 5))
def test_in_turn_takes_each_once_a_round(n, batch, seed):
    steps = -(-3 * n // batch)
    drawn = torch.cat([in_turn(step_generator(seed, k), n, batch) for k in range(steps)])[: 3 * n]
    assert (drawn.reshape(3, n).sort(1).values == torch.arange(n)).all()
    assert torch.equal(in_turn(step_generator(seed, 1), n, batch), in_turn(step_generator(seed, 1), n, batch))


def test_in_turn_refuses_nothing_and_draws_nothing():
    generator = step_generator(2, 9)
    before = generator.get_state()
    in_turn(generator, 5, 3)
    assert torch.equal(generator.get_state(), before)
    for n, batch in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match=f"got {n} and {batch}"):
            in_turn(generator, n, batch)


def test_parts_are_the_whole_batch():
    "Three parts of 16 are a batch of 48 made of the same numbers."
    cut = Run(
        small_run().model[0], lambda m, g: (m(torch.randn(16, 4, generator=g)) ** 2).mean(), lambda k: 0.01, parts=3
    )
    rows = torch.cat([torch.randn(16, 4, generator=step_generator(0, k)) for k in range(3)])
    whole = Run(small_run().model[0], lambda m, g: (m(rows) ** 2).mean(), lambda k: 0.01)
    one, other = next(train(cut, 1)), next(train(whole, 1))
    assert one.loss == pytest.approx(other.loss, rel=1e-6) and one.norm == pytest.approx(other.norm, rel=1e-5)
    torch.testing.assert_close(cut.model.weight, whole.model.weight)
    assert STEPS_PER_SEED % 10 == 0


def test_linear_loss_of_known_cases():
    sigma = torch.tensor([0.1, 0.6, 0.99]).double()
    alpha = (1 - sigma**2).sqrt()
    v = linear_loss("v", torch.ones(7).double(), alpha, sigma)
    torch.testing.assert_close(v, torch.ones(3).double())
    x0 = linear_loss("x0", torch.tensor([4.0, 0.0]).double(), alpha, sigma)
    torch.testing.assert_close(x0, 4 * sigma**2 / (4 * alpha**2 + sigma**2) / 2)
    eps = linear_loss("eps", torch.tensor([4.0]).double(), alpha, sigma)
    torch.testing.assert_close(eps, 4 * alpha**2 / (4 * alpha**2 + sigma**2))


# --- watching --------------------------------------------------------------------------------------------------------


def test_whoever_stops_outside_has_it_saved_inside(tmp_path):
    run, path = small_run(), tmp_path / "run.safetensors"
    reports = with_bar(to_csv(fit(run, 50, path), tmp_path / "run.csv"), 50)
    assert next(reports).step == 1 and next(reports).step == 2
    reports.close()
    again = small_run()
    load_run(again, path)
    assert again.step == 2
    exhaust(with_bar(to_csv(fit(again, 50, path), tmp_path / "run.csv"), 50))
    rows = [line.split(",") for line in (tmp_path / "run.csv").read_text().splitlines()]
    assert rows[0] == ["step", "loss", "norm", "rate"] and [int(r[0]) for r in rows[1:]] == list(range(1, 51))


def test_tensorboard_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        to_tensorboard(iter(()), "folder")


def test_scalars_reach_the_board(monkeypatch, tmp_path):
    "With a stand-in, so that the calls can be seen; the real one reads them in the next test, where there is one."
    calls = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            calls.append(("open", log_dir, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("close")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    run = small_run()
    exhaust(train(run, 2))
    for report in to_tensorboard(train(run, 9), tmp_path):
        if report.step == 4:
            break
    assert calls[0] == ("open", str(tmp_path), 3) and calls[-1] == "close"
    assert [c for c in calls if c[0] == "loss"] == [("loss", run.losses[2], 3), ("loss", run.losses[3], 4)]
    assert {c[0] for c in calls[1:-1]} == {"loss", "norm", "rate"}


@pytest.mark.daily
def test_scalars_can_be_read_back_from_the_board(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = small_run()
    exhaust(to_tensorboard(train(run, 5), tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [e.step for e in events] == [1, 2, 3, 4, 5]
    assert [e.value for e in events] == pytest.approx(run.losses)


@pytest.mark.parametrize("losses", [[1.0], [2.0, 2.0, 2.0], [0.0, 1.0, 0.5] * 400])
def test_the_curve_as_a_picture(losses):
    image = loss_picture(losses)
    assert image.size == (640, 320) and len(image.getcolors(100_000)) > 2


def test_nothing_to_draw_is_said():
    with pytest.raises(ValueError, match="no loss above 0"):
        loss_picture([])


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
    del config["text_training"]  # a test of its own sends the encoder to school
    config["unet_training"] |= {"steps": 80, "batch": 4}
    return config


@pytest.fixture(scope="module")
def scenes_folder(tmp_path_factory):
    "A file of true scenes with pictures of noise: to render them takes longer than all that is tested with them."
    folder, generator = tmp_path_factory.mktemp("scenes"), step_generator(0, 0)
    scenes = sample_scenes(CHUNK, generator, "train")
    pictures = torch.randint(256, (CHUNK, 3, 64, 64), generator=generator, dtype=torch.uint8)
    tensors = {"pictures": pictures} | {name: value.contiguous() for name, value in vars(scenes).items()}
    save_file(tensors, folder / "train-seed0-0000.safetensors")
    read, _ = scene_set(folder, CHUNK)
    assert torch.equal(read, pictures)  # found, not rendered anew
    return folder


def die_at_random(context, target, arguments: tuple, chance: random.Random, most: int) -> int:
    "Start target(*arguments, pipe), which writes a byte per step; kill it after some of them. Returns how many."
    listen, say = context.Pipe(duplex=False)
    worker = context.Process(target=target, args=(*arguments, say))
    worker.start()
    say.close()
    done = chance.randint(1, most)
    for _ in range(done):
        listen.recv_bytes()  # EOFError if it ends by itself
    time.sleep(chance.random() * 0.03)  # in a step, in a save, between the two
    worker.kill()
    worker.join()
    listen.close()
    assert worker.exitcode == -signal.SIGKILL, "it ended before it was killed"
    return done


def same_files(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), one


@pytest.mark.daily
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_recipe_ends_in_the_same_weights(tmp_path, scenes_folder, kills):
    context, chance = forks.server(), random.Random(kills)
    config = tiny_config()
    config["vae_training"]["steps"], config["unet_training"]["steps"] = kills, 3 * kills + 4
    for name in ("quiet", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scenes").symlink_to(scenes_folder)
    arguments = json.dumps(config), str(tmp_path / "killed")
    lives = [die_at_random(context, forks.make_recipe, arguments, chance, 4) for _ in range(kills)]
    assert len(lives) == kills and len(set(lives)) > 1
    for name in ("killed", "quiet"):
        exhaust(make(config, tmp_path / name, every=1e9))
    for file in ("vae.safetensors", "unet.safetensors", "model/unet/diffusion_pytorch_model.safetensors"):
        same_files(tmp_path / "quiet" / file, tmp_path / "killed" / file)
    assert not list((tmp_path / "quiet").rglob("*.part"))


@pytest.mark.daily
@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_leaves_the_same_files(tmp_path, kills):
    context, chance = forks.server(), random.Random(kills)
    steps = 40 * kills
    paths = {name: tmp_path / name / "run.safetensors" for name in ("quiet", "killed")}
    for path in paths.values():
        path.parent.mkdir()
    for _ in range(kills):
        die_at_random(context, forks.train_small, (steps, str(paths["killed"])), chance, 8)
    for path in paths.values():
        exhaust(to_csv(fit(forks.sine_run(steps), steps, path, every=1e9, snapshots=7), f"{path}.csv"))
    names = sorted(p.relative_to(tmp_path / "quiet") for p in (tmp_path / "quiet").rglob("*.safetensors"))
    assert len(names) == 2 + steps // 7  # the run, a snapshot every 7 steps and one at the end
    for name in names:
        same_files(tmp_path / "quiet" / name, tmp_path / "killed" / name)
    tables = [Path(f"{path}.csv").read_text().splitlines() for path in paths.values()]
    assert tables[0] == tables[1] and len(tables[0]) == steps + 1


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


def test_averages_are_put_aside_and_times_drawn_as_the_recipe_says(tmp_path, scenes_folder):
    vae = drawn(0, lambda: VAE(VAEConfig(**tiny_config()["vae"])))
    losses = {}
    for times in ("uniform", "stratified"):
        config, folder = tiny_config(), tmp_path / times
        config["unet_training"] |= {"steps": 6, "times": times, "widths": [0.05, 0.1], "snapshots": 2}
        folder.mkdir()
        (folder / "scenes").symlink_to(scenes_folder)
        losses[times] = [progress.loss for progress in make(config, folder, vae=vae)]
        files = sorted((folder / "unet-averages").glob("*.safetensors"))
        assert [int(file.stem) for file in files] == [2, 4, 6]
        weights = load_file(folder / "unet.safetensors")
        for name, value in mix(files, 0.08).items():
            assert value.shape == weights[f"model.{name}"].shape
    assert losses["uniform"] != losses["stratified"]


@pytest.mark.parametrize(
    "wrong, said", [({"times": "sometimes"}, "times = 'sometimes'; known: uniform"), ({"widths": [0.5]}, "got 0.5")]
)
def test_a_recipe_that_cannot_be_followed_is_refused_at_once(tmp_path, wrong, said):
    config = tiny_config()
    config["unet_training"] |= wrong
    with pytest.raises(ValueError, match=said):
        next(make(config, tmp_path))
    assert not list(tmp_path.iterdir())


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
