"""`book.py bench recaption` and `bench judge`: what they compare differs in the captions alone, and errors add up."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from stable_diffusion_scratch.captions import caption, describe
from stable_diffusion_scratch.evaluation import share
from stable_diffusion_scratch.scenes import HELD_OUT

BENCH = Path(__file__).parents[1] / "bench"


def program(name: str):
    "The bench as a module; skipped in an installed copy, which has none."
    if not (BENCH / f"{name}.py").exists():
        pytest.skip(f"no bench/{name}.py in this copy")
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    return program("recaption")


@pytest.fixture(scope="module")
def some(bench):
    return bench.single(80, 1, "train")


def test_pictures_hold_one_known_object(bench, some):
    pictures, scenes = some
    assert pictures.shape == (80, 3, 16, 16) and pictures.abs().max() <= 1
    assert all((d.things[0][1], d.things[0][3]) not in HELD_OUT for d in describe(scenes))
    assert (scenes.place == 0).all() and scenes.turn[:, 0].std() > 0.2


def test_codes_keep_most_of_a_picture(bench, some):
    pictures, _ = some
    codes = bench.Codes(pictures)
    z = codes.encode(pictures)
    assert z.shape == (80, bench.COMPONENTS) and z.square().mean().item() == pytest.approx(1)
    assert (codes.decode(z) - pictures).square().mean() < 1e-3
    assert_close(codes.encode(codes.decode(z)), z, rtol=0, atol=0.1)


def test_terse_captions_are_true_and_short_and_machine_captions_are_the_writers(bench, some):
    pictures, scenes = some
    writer = bench.reader(0).eval()
    said = {kind: bench.written(kind, pictures, scenes, writer) for kind in bench.KINDS}
    assert said["true"] == describe(scenes)
    assert all(a.fits(b) and a.things[0][3] for a, b in zip(said["terse"], said["true"], strict=True))
    unsaid = sum(v is None for d in said["terse"] for v in d.things[0])
    assert abs(unsaid / 240 - (1 - bench.SAID)) < 0.1
    bench.CAPTIONED, before = 30, bench.CAPTIONED
    machine = bench.written("machine", pictures, scenes, writer)
    bench.CAPTIONED = before
    assert machine == said["true"][:30] + bench.read(writer, pictures[30:])


def test_words_are_told_apart_and_hidden_words_are_zero(bench):
    said, new = bench.everything()
    rows = bench.counts([caption(d) for d in said])
    assert len(rows.unique(dim=0)) == 96 and sum(new) == 16
    assert bench.counts([""]).sum() == 0


def test_two_kinds_of_one_seed_differ_in_the_captions_alone(bench, some):
    pictures, scenes = some
    latents, words = bench.Codes(pictures).encode(pictures), bench.counts([caption(d) for d in describe(scenes)])
    (a, losses), (b, again), (_, other) = (bench.learn_to_paint(latents, w, 3, 0) for w in (words, words, 0 * words))
    assert losses == again and torch.equal(a.leave.weight, b.leave.weight)
    assert losses[0] == pytest.approx(other[0], abs=0.5) and losses != other
    painted = bench.paint(a, words[:2], 0, steps=2)
    assert painted.shape == (2, bench.COMPONENTS) and torch.equal(painted, bench.paint(b, words[:2], 0, steps=2))


def test_pooled_shares_count_everything_once():
    pooled = program("judge").pooled
    one = {"all": share([True] * 9 + [False]), "accepts_wrong": share([False] * 10), "calibration": {"value": 0.02}}
    two = one | {"relation": share([True] * 10), "calibration": {"value": 0.04}}
    both = pooled([one, two])
    assert both["all"] == share([True] * 18 + [False] * 2) and both["relation"]["of"] == 10
    assert both["calibration"]["value"] == pytest.approx(0.03)
    assert list(both) == ["all", "relation", "accepts_wrong", "calibration"]
