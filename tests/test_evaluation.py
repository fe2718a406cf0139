"""Evaluation: what is measured agrees with other libraries, and holds for any description."""

import contextlib
import importlib
import importlib.util
import json
import math
import sys
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from stable_diffusion_scratch import evaluation
from stable_diffusion_scratch.captioner import QUESTIONS, Judge, read, scatter, truth
from stable_diffusion_scratch.captions import Description, parse
from stable_diffusion_scratch.evaluation import (
    calibration_error,
    compare,
    corrected,
    decoded,
    diversity,
    extrapolated,
    features,
    fit_temperature,
    frechet_distance,
    is_new,
    jackknife,
    kernel_distance,
    near_miss,
    own_error,
    precision_recall,
    prompt_accuracy,
    prompt_kinds,
    prompt_set,
    psnr,
    reliability,
    report,
    stated_error,
    tabulate,
    variety,
    wilson,
    within_reach,
)
from stable_diffusion_scratch.leaderboard import stand_ins
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


CLOUDS = [(200, 200, 5), (300, 300, 32), (120, 150, 40)]  # pictures on either side, features


def clouds(n: int, m: int, d: int):
    "Features of two sets that differ, neither round nor centred."
    a = torch.randn(n, d, generator=seeded(n)).double() @ torch.randn(d, d, generator=seeded(1)).double() / d**0.5
    return a + 0.5, torch.randn(m, d, generator=seeded(m + 1)).double().abs()


@contextlib.contextmanager
def peer(package: str, modules: list[str], *unused: str):
    """Modules of a peer, for their formulas alone: what else they import (its `unused` modules, of networks and files,
    which ask for torchvision) is empty. Skipped where there is no such peer."""
    pytest.importorskip("scipy")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no {package} here")
    with stand_ins(package):
        for name in unused:
            sys.modules[f"{package}.{name}"] = MagicMock(__all__=[], __spec__=None)
        yield [importlib.import_module(f"{package}.{module}") for module in modules]


@pytest.mark.parametrize("shape", CLOUDS)
def test_the_four_distances_are_torch_fidelitys(shape):
    a, b = clouds(*shape)
    with peer("torch_fidelity", ["metric_fid", "metric_kid", "metric_prc"], "utils") as modules:
        fid, kid, prc = modules
    stats = [fid.fid_features_to_statistics(x) for x in (a, b)]
    theirs = fid.fid_statistics_to_metric(*stats, False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6, abs=1e-6)

    least = min(len(a), len(b))
    kernel = dict(kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)
    theirs = kid.kernel_mmd(a[:least].numpy(), b[:least].numpy(), **kernel)
    assert kernel_distance(a[:least], b[:least]) == pytest.approx(theirs, rel=1e-6, abs=1e-6)

    options = dict(prc_neighborhood=3, prc_batch_size=10_000, save_cpu_ram=False, verbose=False)
    theirs = prc.prc_features_to_metric(b, a, **options)  # painted, real
    assert precision_recall(a, b) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
@pytest.mark.parametrize("shape", CLOUDS)
def test_both_distances_are_clean_fids(shape):
    a, b = clouds(*shape)
    with peer("cleanfid", ["fid"], "utils", "features", "resize", "downloads_helper", "wrappers") as modules:
        (module,) = modules
    statistics = [value.numpy() for x in (a, b) for value in (x.mean(0), torch.cov(x.T))]
    assert frechet_distance(a, b) == pytest.approx(module.frechet_distance(*statistics), rel=1e-6, abs=1e-6)
    least = min(len(a), len(b))
    theirs = module.kernel_distance(a[:least].numpy(), b[:least].numpy(), num_subsets=1, max_subset_size=least)
    assert kernel_distance(a[:least], b[:least]) == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_precision_and_recall_by_a_naive_loop_and_at_the_extremes():
    real, painted = clouds(40, 30, 3)
    distance = lambda x, y: math.dist(x.tolist(), y.tolist())  # noqa: E731

    def inside(x, of, k=3):
        return any(distance(x, y) <= sorted(distance(y, z) for z in of)[k] for y in of)

    naive = [sum(inside(x, of) for x in xs) / len(xs) for xs, of in ((painted, real), (real, painted))]
    assert precision_recall(real, painted) == pytest.approx(naive)
    assert precision_recall(real, real) == (1, 1) and precision_recall(real, real + 1e6) == (0, 0)
    one_place = real[:1] + 1e-9 * torch.randn(30, 3, generator=seeded(9)).double()
    assert precision_recall(real, one_place)[0] == 1 and precision_recall(real, one_place)[1] < 0.1
    with pytest.raises(ValueError, match="3 points have no neighbour number 3"):
        within_reach(real, real[:3])


def test_what_is_extrapolated_loses_the_surplus_of_equals():
    pairs = torch.randn(100, 2, 200, 6, generator=seeded(5)).double()
    plain, mended = (torch.tensor([f(*pair) for pair in pairs]) for f in (frechet_distance, extrapolated))
    assert abs(mended.mean()) < 0.2 * plain.mean()


@given(st.integers(2, 60), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_the_jackknife_of_a_mean_is_the_textbooks(n, seed):
    x = torch.randn(n, generator=seeded(seed)).double()
    row = jackknife(lambda x: x.mean().item(), x, groups=n)
    assert (row["high"] - row["low"]) / 3.92 == pytest.approx((x.var() / n).sqrt().item(), abs=1e-9)
    assert row["value"] == pytest.approx(x.mean().item())


def test_calibration_of_a_forecast_that_is_right_and_of_one_that_is_too_sure():
    sure = torch.rand(20_000, generator=seeded(6))
    right = torch.rand(20_000, generator=seeded(7)) < sure
    assert calibration_error(sure, right) < 0.02
    assert calibration_error(sure.sqrt(), right) == pytest.approx((sure.sqrt() - sure).mean().item(), abs=0.02)
    rows = reliability(sure, right, [0.0, 0.5, 1.0])
    assert sum(row["of"] for row in rows) == 20_000 and rows[0]["sure"] < 0.5 < rows[1]["sure"]
    assert calibration_error(torch.ones(3), torch.ones(3, dtype=torch.bool)) == 0


def test_the_fitted_temperature_makes_the_truth_likeliest():
    scenes = sample_scenes(40, seeded(8), "all")
    answers, noise = truth(scenes), seeded(9)
    logits = {}  # of a judge that often errs, and is far too sure of it
    for question, names in QUESTIONS.items():
        right = torch.nn.functional.one_hot(answers[question].clamp(min=0), len(names)).float()
        logits[question] = 8 * (right + torch.randn(right.shape, generator=noise))

    def judge(pictures):
        return logits

    def loss(temperature):
        total = 0.0
        for question, p in read(judge, torch.zeros(1, 1), temperature=temperature).items():
            y = answers[question].flatten()
            q = p.flatten(0, -2)[torch.arange(len(y)), y.clamp(min=0)]
            total -= q[y >= 0].double().log().sum().item()
        return total

    best = fit_temperature(judge, torch.zeros(1, 1), answers)
    assert 4 < best < 16
    assert loss(best) < min(loss(0.9 * best), loss(1.1 * best), loss(1.0))
    plain, hot = (read(judge, torch.zeros(1, 1), temperature=t) for t in (1.0, best))
    assert all(torch.equal(plain[q].argmax(-1), hot[q].argmax(-1)) for q in QUESTIONS)


def test_stated_errors_by_look_and_kind(tmp_path):
    for kind, least in (("one object", 0.98), ("two objects", 0.95)):
        assert stated_error(look="rendered", kind=kind)["all"]["share"] >= least
        assert stated_error(look="decoded", kind=kind)["all"]["of"] > 0
    assert set(stated_error()) == {"all", "count", *ATTRIBUTES, "relation", "accepts_wrong"}
    (tmp_path / "error.json").write_text(json.dumps({"all": {"share": 1.0}}))
    assert stated_error(tmp_path) == {"all": {"share": 1.0}}
    with pytest.raises(ValueError, match="book.py bench judge"):
        stated_error(tmp_path, "decoded")


def test_kinds_of_prompts():
    kinds = prompt_kinds(20, seed=3)
    assert list(kinds) == ["one object", "two objects", "held out"]
    sizes = {kind: {len(m.things) for m in means} for kind, (_, means) in kinds.items()}
    assert sizes == {"one object": {1}, "two objects": {2}, "held out": {1, 2}}
    assert all(map(is_new, kinds["held out"][1])) and not all(map(is_new, kinds["one object"][1]))
    assert kinds["one object"] == prompt_set(20, 1, 3)


@pytest.mark.daily
def test_a_report_of_the_painter_that_renders_what_it_reads():
    judge = evaluation_judge()
    calls = []

    def painter(prompts, seed, title):
        calls.append((len(prompts), title))
        return evaluation.renders([parse(prompt) for prompt in prompts], seed + 50)

    found = report(painter, judge, 12, errors={"one object": stated_error()})
    assert calls == [(12, "one object"), (12, "two objects"), (12, "held out"), (4 * 2, "diversity")]
    assert json.loads(json.dumps(found)) == found
    assert all(found[kind]["all"]["share"] > 0.8 for kind in prompt_kinds(1))
    assert "corrected" in found["one object"]["all"] and "corrected" not in found["two objects"]["all"]
    assert found["one object"]["seen combinations"]["of"] < 12
    assert 0.5 < found["diversity"]["painted"]["value"] / found["diversity"]["real again"]["value"] < 2


def evaluation_judge():
    from stable_diffusion_scratch import captioner

    if not (captioner.JUDGE / "model.safetensors").exists():
        pytest.skip("the judge's weights are not in this copy")
    return captioner.load_judge()


def test_decoded_pictures_are_pictures():
    from stable_diffusion_scratch.vae import VAE, VAEConfig

    torch.manual_seed(0)
    vae = VAE(VAEConfig(channels=(8, 8), layers=1, groups=4, latent_channels=2)).eval()
    x = torch.rand(3, 3, 16, 16, generator=seeded(1)) * 2 - 1
    assert_close(decoded(vae, x, chunk=2), vae.decode(vae.encode(x).mean).clamp(-1, 1).detach())


def test_variety_is_the_mean_diversity_of_the_prompts():
    f = torch.randn(6, 4, 3, generator=seeded(4))
    within = (f.double() - f.double().mean(1, keepdim=True)).square().sum((1, 2)) / 3
    assert variety(f) == pytest.approx((2 * within.mean()).sqrt().item())
    assert variety(f[:1]) == pytest.approx(diversity(f[0]))


def test_psnr_and_diversity():

    x = torch.zeros(2, 3, 8, 8)
    assert_close(psnr(x, x + 0.2), torch.full((2,), 20.0))
    f = torch.randn(50, 3, generator=seeded(4)).double()
    pairs = torch.pdist(f)
    assert diversity(f) == pytest.approx((pairs**2).mean().sqrt().item())
    assert features(Judge().eval(), torch.zeros(3, 3, 64, 64), chunk=2).shape == (3, 96)


def test_tabulate_keeps_the_order_of_questions():
    assert list(tabulate([compare(m, m) for m in prompt_set(2)[1]])) == ["all", "count", *ATTRIBUTES, "relation"]
