"""Evaluation: what is measured agrees with other libraries, and holds for any description."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from stable_diffusion_scratch import evaluation
from stable_diffusion_scratch.captioner import Judge, scatter
from stable_diffusion_scratch.captions import Description, parse
from stable_diffusion_scratch.evaluation import (
    compare,
    corrected,
    diversity,
    features,
    frechet_distance,
    kernel_distance,
    near_miss,
    own_error,
    prompt_accuracy,
    prompt_set,
    psnr,
    tabulate,
    wilson,
)
from stable_diffusion_scratch.scenes import ATTRIBUTES, HELD_OUT, RELATIONS, render, sample_scenes


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


whole = st.tuples(*(st.sampled_from(values) for values in ATTRIBUTES.values()))
part = st.tuples(*(st.sampled_from((None, *values)) for values in ATTRIBUTES.values()))
few = st.tuples(*(st.sampled_from(values[:2]) for values in ATTRIBUTES.values()))  # so that they meet
relations = st.sampled_from(RELATIONS)


def descriptions(thing, relation):
    return st.builds(lambda a: Description((a,)), thing) | st.builds(
        lambda a, b, r: Description((a, b), r), thing, thing, relation
    )


shown = descriptions(few, relations)
said = descriptions(part | few, st.sampled_from((None, *RELATIONS, "right of", "behind")))


@given(said, shown)
@settings(max_examples=2000, deadline=None)
def test_all_answers_right_is_what_fits_means(said, shown):
    assert all(compare(said, shown).values()) == said.fits(shown)


@given(descriptions(few, relations))
def test_a_true_description_has_every_answer_right(d):
    assert all(compare(d, d).values())
    assert set(compare(d, d)) == {"count", *ATTRIBUTES} | ({"relation"} if d.relation else set())
    assert not any(compare(d, None).values())


@given(descriptions(few, relations), st.integers(0, 2**31))
@settings(max_examples=500, deadline=None)
def test_a_near_miss_is_wrong_in_one_thing(d, seed):
    other = near_miss(d, seeded(seed))
    assert not other.fits(d)
    assert sum(not right for right in compare(other, d).values()) == 1


def test_exchanged_objects_are_an_error_of_the_relation_alone():
    a, b = ("small", "red", "metal", "cube"), ("large", "blue", "rubber", "sphere")
    answers = compare(Description((a, b), "left of"), Description((b, a), "left of"))
    assert [q for q, right in answers.items() if not right] == ["relation"]
    turned = compare(Description((a, b), "left of"), Description((a, b), "in front of"))
    assert [q for q, right in turned.items() if not right] == ["relation"]


@given(st.integers(1, 400), st.data())
@settings(deadline=None)
def test_wilson_is_scipys(n, data):
    stats = pytest.importorskip("scipy.stats")
    k = data.draw(st.integers(0, n))
    interval = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
    assert wilson(k, n) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_prompts_are_balanced_and_repeatable():
    texts, means = prompt_set(400, seed=3)
    assert (texts, means) == prompt_set(400, seed=3) != prompt_set(400, seed=4)
    assert [parse(text) for text in texts] == means
    assert sum(len(m.things) == 2 for m in means) == 200
    assert sum(m.relation == "left of" for m in means) == 100
    assert len(set(texts)) > 390 and any("right of" in text for text in texts)
    assert all(len(m.things) == 2 for m in prompt_set(9, objects=2)[1])
    assert all(len(m.things) == 1 for m in prompt_set(9, objects=1)[1])
    plain = prompt_set(9, objects=2, plain=True)[0]
    assert all("left of" in text or "in front of" in text for text in plain)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_prompts_respect_the_split(split):
    for m in prompt_set(200, split=split)[1]:
        assert any((t[1], t[3]) in HELD_OUT for t in m.things) == (split == "held_out")


def test_tables_are_json_and_count_what_was_asked(monkeypatch):
    one, two = prompt_set(1, 1)[1][0], prompt_set(1, 2)[1][0]
    monkeypatch.setattr(evaluation, "describe_picture", lambda judge, pictures: [one, None, two])
    table = prompt_accuracy(torch.zeros(3, 3, 64, 64), [one, one, two], judge=None)
    assert json.loads(json.dumps(table)) == table
    assert (table["all"]["right"], table["all"]["of"]) == (2, 3)
    assert (table["relation"]["right"], table["relation"]["of"]) == (1, 1)
    assert all(row["low"] <= row["share"] <= row["high"] for row in table.values())
    with pytest.raises(ValueError, match="2 pictures for 1 descriptions"):
        prompt_accuracy(torch.zeros(2, 3, 64, 64), [one], judge=None)
    with pytest.raises(ValueError, match="0 pictures"):
        prompt_accuracy(torch.zeros(0, 3, 64, 64), [], judge=None)


def test_own_error_runs_for_any_judge_and_refuses_what_cannot_be_described():
    scenes = sample_scenes(4, seeded(), "all")
    table = own_error(Judge().eval(), render(scenes), scenes)
    assert {"all", "count", "accepts_wrong"} <= set(table) and json.dumps(table)
    scenes = scatter(4, seeded(), counts=(1, 0, 0, 0))
    with pytest.raises(ValueError, match="one or two objects"):
        own_error(Judge().eval(), render(scenes), scenes)


@given(st.floats(0, 1), st.floats(0, 0.4), st.floats(0, 0.4))
def test_the_correction_undoes_the_judges_errors(share, rejects, accepts):
    measured = share * (1 - rejects) + (1 - share) * accepts
    assert corrected(measured, rejects, accepts) == pytest.approx(share, abs=1e-9)


def test_the_correction_refuses_a_coin():
    with pytest.raises(ValueError, match="no better than a coin"):
        corrected(0.5, 0.5, 0.5)
    assert corrected(0.001, 0.1, 0.01) == 0  # fewer than its errors alone would give


@pytest.mark.parametrize("n, m, d", [(200, 300, 5), (6, 300, 10), (5, 4, 10)])
def test_frechet_distance_against_scipy(n, m, d):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = torch.randn(n, d, generator=seeded(1)), 2 * torch.randn(m, d, generator=seeded(2)) + 1
    a, b = a.double(), b.double()
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    half = linalg.sqrtm(ca.numpy())
    root = torch.tensor(linalg.sqrtm(half @ cb.numpy() @ half).real)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (ca + cb - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 1) == pytest.approx(d)


def test_kernel_distance_has_no_bias_and_sees_a_shift():
    g = seeded(3)
    same = torch.tensor([kernel_distance(*torch.randn(2, 30, 4, generator=g)) for _ in range(400)])
    assert abs(same.mean()) < 4 * same.std() / 20
    assert kernel_distance(torch.randn(500, 4, generator=g), torch.randn(500, 4, generator=g) + 1) > 1


def test_psnr_and_diversity():
    x = torch.zeros(2, 3, 8, 8)
    assert_close(psnr(x, x + 0.2), torch.full((2,), 20.0))
    f = torch.randn(50, 3, generator=seeded(4)).double()
    pairs = torch.pdist(f)
    assert diversity(f) == pytest.approx((pairs**2).mean().sqrt().item())
    assert features(Judge().eval(), torch.zeros(3, 3, 64, 64), chunk=2).shape == (3, 96)


def test_tabulate_keeps_the_order_of_questions():
    assert list(tabulate([compare(m, m) for m in prompt_set(2)[1]])) == ["all", "count", *ATTRIBUTES, "relation"]
