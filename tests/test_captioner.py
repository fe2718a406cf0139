"""The judge: what must hold for any weights and any scenes, and what the bundled weights can do."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from stable_diffusion_scratch import captioner
from stable_diffusion_scratch.captioner import (
    QUESTIONS,
    Judge,
    JudgeConfig,
    augment,
    caption_folder,
    confidence,
    describe_answers,
    describe_picture,
    judge_loss,
    load_judge,
    read,
    save_judge,
    say,
    scatter,
    surest,
    truth,
    write_captions,
)
from stable_diffusion_scratch.captions import Description, describe, parse
from stable_diffusion_scratch.data import folder_rows, gather
from stable_diffusion_scratch.scenes import ATTRIBUTES, SHAPE, Scenes, clearly_visible, render, sample_scenes


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Judge().eval()


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_truth_is_what_describe_says(split):
    scenes = sample_scenes(200, seeded(1), split)
    assert describe_answers(truth(scenes)) == describe(scenes)


def test_the_truth_does_not_depend_on_the_order_of_the_objects():
    scenes = scatter(200, seeded(2))
    turned = Scenes(scenes.attributes.flip(1), scenes.relation, scenes.place.flip(1), scenes.turn.flip(1))
    for question, answer in truth(scenes).items():
        assert torch.equal(answer, truth(turned)[question]), question


def test_the_relation_is_the_larger_of_the_two_distances():
    answers = truth(Scenes(
        torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]).expand(4, 2, 4), torch.full((4,), -1),
        torch.tensor([[[-1.0, 0.3], [0.5, -0.2]], [[0.5, -0.2], [-1, 0.3]],
                      [[0.3, -1.0], [-0.2, 0.5]], [[0.0, 1.0], [0.2, -1.0]]]), torch.zeros(4, 2),
    ))  # fmt: skip
    assert answers["relation"].tolist() == [0, 0, 1, 1]  # left of, left of, in front of, in front of
    assert answers["color"].tolist() == [[0, 1], [1, 0], [0, 1], [1, 0]]


def test_scattered_scenes_have_0_to_3_separate_objects_in_plain_view():
    scenes = scatter(300, seeded(3))
    present = scenes.attributes[..., SHAPE] >= 0
    assert present.sum(1).unique().tolist() == [0, 1, 2, 3]
    assert clearly_visible(scenes).all()
    apart = torch.cdist(scenes.place, scenes.place) - scenes.reach[:, None] - scenes.reach[:, :, None]
    pairs = present[:, None] & present[:, :, None] & ~torch.eye(3, dtype=torch.bool)
    assert (apart[pairs] > 0).all()
    for k, values in enumerate(ATTRIBUTES.values()):
        assert scenes.attributes[..., k][present].unique().tolist() == list(range(len(values)))
    assert torch.equal(scatter(300, seeded(3)).place, scenes.place)
    answers = truth(scenes)
    assert (answers["shape"][answers["count"] == 3] == -1).all()
    assert ((answers["relation"] >= 0) == (answers["count"] == 2)).all()


def test_probabilities(judge):
    pictures = 2 * torch.rand(5, 3, 64, 64, generator=seeded()) - 1
    probabilities = read(judge, pictures, chunk=2)
    assert list(probabilities) == list(QUESTIONS)
    for question, p in probabilities.items():
        assert p.shape == (5, *((2,) if question in ATTRIBUTES else ()), len(QUESTIONS[question]))
        assert_close(p.sum(-1), torch.ones(p.shape[:-1]))
        assert_close(p, read(judge, pictures)[question])
    sure = confidence(probabilities)
    assert sure.shape == (5,) and (sure > 0).all() and (sure <= 1).all()
    assert len(describe_picture(judge, pictures)) == 5
    assert describe_picture(judge, pictures[:0]) == []


def test_confidence_counts_only_what_is_said():
    half = {q: torch.full((4, *((2,) if q in ATTRIBUTES else ()), len(v)), 0.5) for q, v in QUESTIONS.items()}
    half["count"] = torch.eye(4)
    assert_close(confidence(half), torch.tensor([1.0, 2.0**-4, 2.0**-9, 1.0]))


def test_answers_outside_what_can_be_said_are_none():
    answers = {q: torch.zeros(4, 2, dtype=torch.long) if q in ATTRIBUTES else torch.zeros(4, dtype=torch.long)
               for q in QUESTIONS} | {"count": torch.arange(4)}  # fmt: skip
    thing = ("small", "red", "rubber", "sphere")
    assert describe_answers(answers) == [None, Description((thing,)), Description((thing, thing), "left of"), None]


@given(st.lists(st.floats(0.01, 1), max_size=9), st.floats(0.05, 1.0))
@settings(deadline=None)
def test_the_surest_facts_are_the_most_that_are_sure_enough(chances, threshold):
    kept = surest(chances, threshold)
    assert kept == sorted(set(kept)) and (not kept or math.prod(chances[k] for k in kept) >= threshold * (1 - 1e-9))
    more = sorted(chances, reverse=True)[: len(kept) + 1]
    assert len(more) == len(kept) or math.prod(more) < threshold * (1 + 1e-9)


def certain(count, /, **doubts):
    "Probabilities of one picture: answer 0 to every question, sure of it but for some doubts."
    p = {}
    for question, names in QUESTIONS.items():
        shape = (1, *((2,) if question in ATTRIBUTES else ()), len(names))
        sure = doubts.get(question, 1.0)
        p[question] = torch.full(shape, (1 - sure) / (len(names) - 1))
        p[question][..., 0] = sure
    if "count" not in doubts:
        p["count"] = torch.eye(len(QUESTIONS["count"]))[count][None]
    return p


def test_what_is_doubtful_is_left_unsaid():
    assert say(certain(1)) == [("a small red rubber sphere", Description((("small", "red", "rubber", "sphere"),)), 1)]
    (w,) = say(certain(1, material=0.6), 0.8)
    assert w.caption == "a small red sphere" and w.sure == 1 and parse(w.caption) == w.description
    (w,) = say(certain(1, shape=0.5, material=0.6), 0.8)
    assert w.caption == "a small red object"
    (w,) = say(certain(1, size=0.9, color=0.9), 0.8)
    assert w.caption == "a small red rubber sphere" and w.sure == pytest.approx(0.81)
    (w,) = say(certain(1, size=0.9, color=0.9), 0.85)
    assert w.sure == pytest.approx(0.9) and sum(v is None for v in w.description.things[0]) == 1
    (w,) = say(certain(2, relation=0.5), 0.8)
    assert w.description.relation is None and len(w.description.things) == 2


def test_silent_where_nothing_is_sure_or_nothing_can_be_said():
    nothing = dict.fromkeys(ATTRIBUTES, 0.3)
    for p in (certain(0), certain(3), certain(1, **nothing), certain(1, count=0.5)):
        (w,) = say(p)
        assert w.caption is None and w.description is None and 0 <= w.sure <= 1


def test_paraphrases_mean_the_same(judge):
    ways = {say(certain(2), generator=seeded(k))[0].caption for k in range(20)}
    assert len(ways) > 10 and {parse(way) for way in ways} == {say(certain(2))[0].description}
    assert write_captions(judge, torch.zeros(0, 3, 64, 64)) == []


@pytest.fixture
def album(tmp_path):
    "Four pictures, of which people have captioned one."
    if not (captioner.JUDGE / "model.safetensors").exists():
        pytest.skip("the judge's weights are not in this copy")
    scenes = sample_scenes(3, seeded(11), "all", 1)
    for k, picture in enumerate(render(scenes)):
        pixels = ((picture + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize((128, 128)).save(tmp_path / f"{k}.png")
    Image.new("RGB", (64, 64), (90, 20, 200)).save(tmp_path / "wall.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    mine = {"file_name": "0.png", "text": "mein erstes Bild: schön", "by": "me"}
    empty = {"file_name": "1.png", "text": ""}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(mine) + "\n\n" + json.dumps(empty) + "\n")
    return tmp_path, mine, describe(scenes)


def test_a_folder_gets_captions_where_it_had_none(album):
    folder, mine, truths = album
    before = (folder / "1.png").read_bytes()
    written = caption_folder(folder, threshold=0.5)
    assert list(written) == ["1.png", "2.png", "wall.jpg"] and (folder / "1.png").read_bytes() == before
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    said = {name: w for name, w in written.items() if w.caption}
    assert lines[0] == mine and [line["file_name"] for line in lines[1:]] == list(said)
    assert {"1.png", "2.png"} <= set(said) and all(said[f"{k}.png"].description.fits(truths[k]) for k in (1, 2))
    assert all(line["sure"] == pytest.approx(said[line["file_name"]].sure, abs=1e-4) for line in lines[1:])
    assert gather(folder_rows(folder), 64).captions[1:] == [w.caption for w in said.values()]


def test_a_threshold_of_one_writes_nothing_and_a_full_folder_is_refused(album):
    folder, mine, _ = album
    assert all(w.caption is None for w in caption_folder(folder, threshold=1.01).values())
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [mine]
    for name in ("1.png", "2.png", "wall.jpg"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="no picture without a caption"):
        caption_folder(folder)


def test_a_folder_with_a_line_that_cannot_be_read_is_left_alone(album):
    folder, _, _ = album
    (folder / "metadata.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match="line 1"):
        caption_folder(folder)
    assert (folder / "metadata.jsonl").read_text() == "nonsense\n"


def test_loss_asks_only_what_has_an_answer(judge):
    pictures = torch.zeros(2, 3, 64, 64)
    none = {q: torch.full((2, 2) if q in ATTRIBUTES else (2,), -1) for q in QUESTIONS}
    assert judge_loss(judge, pictures, none) == 0
    count = none | {"count": torch.tensor([1, 3])}
    p = read(judge, pictures)["count"]
    assert_close(judge_loss(judge, pictures, count), -(p[0, 1] * p[1, 3]).log() / 2)


def test_augmented_pictures_stay_pictures():
    pictures = render(sample_scenes(4, seeded(4)))
    a, b = (augment(pictures, seeded(5)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == pictures.shape
    assert a.abs().max() <= 1 and 0.005 < (a - pictures).square().mean() < 0.1


def test_saved_and_loaded(judge, tmp_path):
    pictures = torch.randn(2, 3, 64, 64, generator=seeded()).clamp(-1, 1)
    save_judge(judge, tmp_path / "exact", torch.float32)
    save_judge(judge, tmp_path / "half")
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 2**20
    exact, half = load_judge(tmp_path / "exact"), load_judge(tmp_path / "half")
    assert exact.config == half.config == judge.config and not half.training
    for question, p in read(judge, pictures).items():
        assert torch.equal(read(exact, pictures)[question], p)
        assert_close(read(half, pictures)[question], p, rtol=0, atol=0.01)
        assert half.state_dict()["layout.0.weight"].dtype == torch.float32


def test_errors_name_the_remedy(judge, tmp_path):
    with pytest.raises(FileNotFoundError, match="no judge in"):
        load_judge(tmp_path)
    save_judge(judge, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden": 64}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_judge(tmp_path)
    with pytest.raises(ValueError, match=r"pictures should have shape .*64"):
        judge(torch.zeros(1, 3, 32, 32))
    assert JudgeConfig([8, 16, 16]) == JudgeConfig((8, 16, 16))


def test_the_bundled_judge_reads_unseen_scenes():
    if not (captioner.JUDGE / "model.safetensors").exists():
        pytest.skip("the judge's weights are not in this copy")
    judge = load_judge()
    scenes = sample_scenes(100, seeded(123), "all")
    pictures = (render(scenes) * 127.5 + 127.5).round() / 127.5 - 1
    right = sum(a == b for a, b in zip(describe(scenes), describe_picture(judge, pictures), strict=True))
    assert right >= 97
