"""Scenes and captions: what must hold for any seed, any size and any sentence."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from stable_diffusion_scratch import captions, scenes
from stable_diffusion_scratch.captions import Description, caption, describe, encode, forget, parse, sentences
from stable_diffusion_scratch.scenes import ATTRIBUTES, RELATIONS, Camera, Scenes, masks, place, render, sample_scenes


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


thing = st.tuples(*(st.sampled_from((None, *values)) for values in ATTRIBUTES.values()))
relation = st.sampled_from((None, *RELATIONS, "right of", "behind"))
description = st.one_of(
    st.builds(lambda a: Description((a,)), thing),
    st.builds(
        lambda a, b, r: Description((a, b), r), thing, thing, st.sampled_from((None, *RELATIONS, "right of", "behind"))
    ),
)
seeds = st.integers(0, 2**31)


# --- captions --------------------------------------------------------------------------------------------------------


@given(description, seeds)
@settings(max_examples=500, deadline=None)
def test_a_caption_is_read_back(said, seed):
    assert parse(caption(said, seeded(seed))) == said
    assert parse(caption(said)) == said


@given(description)
@settings(max_examples=20, deadline=None)
def test_every_sentence_is_read_back_and_uses_the_vocabulary(said):
    for sentence in sentences(said):
        assert parse(sentence) == said
        assert set(sentence.replace(",", "").split()) <= set(captions.VOCABULARY)


def test_every_word_of_the_vocabulary_is_used():
    things = (("small", None, "metal", "sphere"), ("large", "orange", "rubber", "cube"))
    pairs = [Description(things, r) for r in (None, *RELATIONS)]
    names = [Description(((s, c, m, n),)) for s in (None, "small") for c in ATTRIBUTES["color"] for m in (None, "metal")
             for n in (None, *ATTRIBUTES["shape"])]  # fmt: skip
    used = {word for d in (*pairs, *names) for s in sentences(d) for word in s.replace(",", "").split()}
    assert set(captions.VOCABULARY) - used == {"one"}  # understood, never written


@given(description, seeds)
@settings(max_examples=100, deadline=None)
def test_forgetting_leaves_something_true(said, seed):
    less = forget(said, seeded(seed), 0.5)
    assert less.fits(said)
    assert len(less.things) == len(said.things)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_scenes_and_descriptions_are_inverse(seed):
    attributes, relation = scenes.sample_attributes(50, seeded(seed), split="all")
    staged = Scenes(attributes, relation, torch.zeros(50, 2, 2), torch.zeros(50, 2))
    assert all(map(torch.equal, encode(describe(staged)), (attributes, relation)))


def test_unsaid_values_are_open_or_drawn():
    said = [parse("an object"), parse("a red thing and a cube")]
    attributes, relation = encode(said)
    assert attributes[0].eq(-1).all() and relation.eq(-1).all()
    assert sorted(attributes[1, :, scenes.COLOR].tolist()) == [-1, 0]
    attributes, relation = encode(said, seeded())
    assert (attributes[0, 0] >= 0).all() and (attributes[0, 1] == -1).all() and (attributes[1] >= 0).all()
    assert relation[0] == -1 and relation[1] >= 0


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "empty"),
        ("  ... ", "empty"),
        ("a red sphre", "unknown word 'sphre'; the nearest known words: sphere"),
        ("a larg cube", "unknown word 'larg'; the nearest known words: large"),
        ("a zzzz cube", "unknown word 'zzzz'; the nearest known words: ball, block, cube"),
        ("a red blue cube", "names a color twice: 'red' and 'blue'"),
        ("a metal cube made of rubber", "names a material twice"),
        ("a red", "cannot read 'a red'"),
        ("a red cube left of", "cannot read"),
        ("a cube left of a sphere left of a cube", "cannot read"),
        ("красный cube", "unknown word 'красный'"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(text, says):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert says in str(error.value) and "\n" not in str(error.value)


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused_with_a_value_error(text):
    try:
        assert isinstance(parse(text), Description)
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize("things", [(), (("small", "red", "metal"),), (("small", "pink", "metal", "cube"),)])
def test_a_description_outside_the_world_is_refused(things):
    with pytest.raises(ValueError):
        Description(things)
    with pytest.raises(ValueError):
        Description((("small", "red", "metal", "cube"),), "left of")


# --- scenes ----------------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from(scenes.SPLITS), st.sampled_from([1, 2, None]))
@settings(max_examples=15, deadline=None)
def test_the_rules_hold_for_any_seed(seed, split, objects):
    batch = sample_scenes(24, seeded(seed), split, objects)
    present = batch.attributes[..., scenes.SHAPE] >= 0
    assert present[:, 0].all() and (objects is None or (present.sum(1) == objects).all())
    assert ((batch.relation >= 0) == present[:, 1]).all()
    assert scenes.clearly_related(batch).all()
    pair = present[:, 1]
    apart = (batch.place[pair, 1] - batch.place[pair, 0]).norm(dim=1) - batch.reach[pair].sum(1)
    assert (apart >= scenes.MARGIN).all()  # nothing touches, whatever its turn
    seen, alone = masks(batch)
    assert (seen.sum((2, 3))[present] >= scenes.MIN_PIXELS).all()
    assert not seen[~present].any() and not (seen[:, 0] & seen[:, 1]).any() and not (seen & ~alone).any()
    unseen = scenes.held_out(batch.attributes).any(1)
    assert split == "all" or (unseen == (split == "held_out")).all()
    pictures = render(batch[:2], size=16)
    assert pictures.shape == (2, 3, 16, 16) and pictures.isfinite().all() and pictures.abs().max() <= 1


def test_every_kind_of_pair_can_be_placed():
    sizes = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(2), torch.arange(3), torch.arange(2))
    attributes = torch.zeros(len(sizes), 2, 4, dtype=torch.long)
    attributes[:, 0, [0, 3]], attributes[:, 1, [0, 3]] = sizes[:, :2], sizes[:, 2:4]
    batch = place(attributes, sizes[:, 4], seeded())
    assert scenes.clearly_related(batch).all() and scenes.clearly_visible(batch).all()


def test_the_same_seed_gives_the_same_picture_whatever_the_chunk():
    one, two = (sample_scenes(9, seeded(5)) for _ in range(2))
    assert torch.equal(render(one), render(two))
    assert_close(render(one, chunk=2), render(one), rtol=0, atol=1e-5)
    assert_close(torch.cat([render(one[i]) for i in range(9)]), render(one), rtol=0, atol=1e-5)


def test_attributes_are_uniform_over_what_training_may_see():
    attributes, relation = scenes.sample_attributes(20_000, seeded(), objects=2)
    kinds = attributes[:, 0, scenes.COLOR] * 3 + attributes[:, 0, scenes.SHAPE]
    counts = kinds.bincount(minlength=24)
    assert (counts > 0).sum() == 20
    expected = 20_000 / 20
    assert ((counts[counts > 0] - expected).abs() < 5 * expected**0.5).all()
    assert abs(relation.float().mean() - 0.5) < 0.02


def test_held_out_pairs_leave_every_value_in_training():
    pairs = {(c, s) for c in ATTRIBUTES["color"] for s in ATTRIBUTES["shape"]} - set(scenes.HELD_OUT)
    assert len(pairs) == 20
    assert all(sum(c == color for c, _ in pairs) >= 2 for color in ATTRIBUTES["color"])
    assert all(sum(s == shape for _, s in pairs) >= 6 for shape in ATTRIBUTES["shape"])


def test_float64_and_float32_pictures_agree():
    batch = sample_scenes(4, seeded(2))
    exact = Scenes(batch.attributes, batch.relation, batch.place.double(), batch.turn.double())
    difference = (render(batch, size=32).double() - render(exact, size=32)).abs()
    assert render(exact, size=8).dtype == torch.float64 and difference.mean() < 1e-4


def test_the_picture_is_where_the_mask_is():
    "Without its object a scene looks different at the object's pixels, its shadow's and nowhere above it."
    batch = place(torch.tensor([[[1, 0, 0, 0]]]), torch.tensor([-1]), seeded())
    empty = Scenes(torch.full((1, 1, 4), -1), batch.relation, batch.place, batch.turn)
    changed = (render(batch) - render(empty)).abs().amax(1)[0] > 0.2
    seen = masks(batch)[0][0, 0]
    assert (changed & seen).sum() > 0.95 * seen.sum()
    top = seen.any(1).int().argmax()
    assert not changed[: top - 1].any()


def test_a_projected_center_lies_in_the_mask():
    batch = sample_scenes(30, seeded(3), objects=1)
    column, row = ((Camera().project(batch.center[:, 0]) * torch.tensor([1, -1]) + 1) * 32).long().unbind(1)
    assert masks(batch)[0][torch.arange(30), 0, row, column].all()


def test_indexing_and_empty_batches():
    batch = sample_scenes(5, seeded())
    assert len(batch[2]) == len(batch[-1]) == 1 and len(batch[[0, 3]]) == 2 and len(batch[1:]) == 4
    assert torch.equal(batch[-1].place, batch[4:].place)
    with pytest.raises(IndexError):
        batch[5]
    assert len(list(batch)) == 5
    assert render(batch[:0]).shape == (0, 3, 64, 64)


def test_faults_are_named():
    with pytest.raises(ValueError, match="test"):
        sample_scenes(1, split="test")
    with pytest.raises(ValueError, match="3"):
        sample_scenes(1, objects=3)


@pytest.mark.parametrize("light", [(0.0, 0.0, 1.0), (1.0, 0.0, 0.2)])
def test_a_lamp_straight_above_or_low_gives_finite_pictures(light):
    pictures = render(sample_scenes(6, seeded()), light=light)
    assert pictures.isfinite().all()


def test_bounces_matter_to_metal_only():
    kinds = torch.tensor([[[1, 0, 0, 0]], [[1, 0, 1, 0]]])
    batch = Scenes(kinds, torch.full((2,), -1), torch.zeros(2, 1, 2), torch.zeros(2, 1))
    matte, shiny = (render(batch, bounces=0) - render(batch)).abs().amax((1, 2, 3))
    assert matte == 0 and shiny > 0.1


def test_a_large_solid_is_larger_by_the_ratio_of_radii():
    kinds = torch.tensor([[[0, 0, 0, s], [1, 0, 0, s]] for s in range(3)])
    batch = Scenes(kinds, torch.zeros(3).long(), torch.zeros(3, 2, 2), torch.zeros(3, 2))
    small, large = batch.extent.unbind(1)
    assert_close(large / small, torch.full((3,), 0.72 / 0.42))
    assert math.isclose(batch.center[0, 1, 2], 0.72, rel_tol=1e-6)


# --- light -----------------------------------------------------------------------------------------------------------


def one(size: int, color: int, material: int, shape: int, turn: float = 0.0, at=(0.0, 0.0)) -> Scenes:
    "A scene of one object, in float64."
    here = torch.tensor([[at]], dtype=torch.float64)
    return Scenes(torch.tensor([[[size, color, material, shape]]]), torch.tensor([-1]), here, here[..., 0] * 0 + turn)


@pytest.mark.parametrize("material", [0, 1])
def test_a_ball_is_as_bright_as_the_formulas_say(material):
    "(def-matte) and (def-metal) on a sphere, whose normals are its radii, with the constants of the chapter."
    scene = one(1, 1, material, 0)
    o, d = Camera().rays(48, dtype=torch.float64)
    light = torch.tensor(scenes.LIGHT, dtype=torch.float64)[:, None]
    light = light / light.norm()
    t, who = scenes.first_hit(scene, o[None], d[None])
    d = d[:, who[0] == 0]
    p = o + t[0, who[0] == 0] * d
    n = (p - scene.center[0, 0][:, None]) / scene.extent[0, 0]
    paint = torch.tensor(scenes.PAINT[1], dtype=torch.float64)[:, None]
    facing = (n * light).sum(0)
    half = (light - d) / (light - d).norm(dim=0)
    gloss = (facing > 0) * (n * half).sum(0).clamp(min=0)
    if material == 0:
        expected = paint * (0.34 + 0.18 * n[2] + 0.85 * facing.clamp(min=0)) + 0.05 * gloss**16
    else:
        cosine = -(n * d).sum(0)
        tint = 0.03 + 0.97 * paint
        seen = scenes.radiance(scene, p[None], (d + 2 * cosine * n)[None], light, bounces=0)[0]
        expected = (tint + (1 - tint) * (1 - cosine) ** 5) * 1.1 * seen + 1.5 * gloss**160
    assert (facing > 0).any() and (facing < 0).any() and gloss.max() > 0.99
    assert_close(scenes.radiance(scene, o[None], d[None], light)[0], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", range(3))
def test_turning_everything_changes_nothing(shape):
    "Object, rays and lamp turned together about the vertical: the same light on the object."
    o, d = Camera().rays(32, dtype=torch.float64)
    light = torch.tensor([[-0.4], [-0.5], [0.76]], dtype=torch.float64)
    light = light / light.norm()
    angle = torch.tensor([0.7], dtype=torch.float64)
    turned = [scenes.rotate(v, angle) for v in (o, d, light)]
    before = scenes.radiance(one(1, 0, 0, shape, turn=0.3), o[None], d[None], light)
    after = scenes.radiance(one(1, 0, 0, shape, turn=1.0), turned[0][None], turned[1][None], turned[2])
    on_it = masks(one(1, 0, 0, shape, turn=0.3), size=32)[0].flatten(1)[0]
    assert on_it.sum() > 40
    assert_close(after[0][:, on_it], before[0][:, on_it], rtol=0, atol=1e-9)


def test_a_shadow_takes_the_lamp_away_and_leaves_the_sky():
    scene, lamp = one(1, 0, 0, 0), torch.tensor([[0.0], [0.6], [0.8]], dtype=torch.float64)
    p = torch.tensor([[0.0, 2.0], [-0.72 * 0.6 / 0.8, 2.0], [0.0, 0.0]], dtype=torch.float64)  # behind it and far away
    o, down = p + torch.tensor([[0.0], [0.0], [1e-4]]), torch.tensor([[0.0], [0.0], [-1.0]], dtype=torch.float64)
    light = scenes.radiance(scene, o[None], down[None].expand(1, 3, 2), lamp)[0]
    fade = 0.72 + 0.38 * torch.exp(-(p[:2] ** 2).sum(0) / 10)
    sky = 0.5 * scenes.sky_seen(scene, p[None])[0, 0]
    lit = torch.tensor([0.0, 0.85 * 0.8], dtype=torch.float64)
    strips = scenes.SHEEN * scenes.strips(down[None])[0, 0]
    expected = torch.tensor(scenes.FLOOR, dtype=torch.float64)[:, None] * fade * (sky + lit) + strips
    assert_close(light, expected, rtol=0, atol=1e-3)


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [(-2.1, 0.0), (2.1, 0.0), (0.0, -2.6), (0.0, 5.0)])
def test_what_touches_the_border_does_not_count(at):
    scene = one(1, 0, 0, 0, at=at)
    seen = masks(scene)[0][0, 0]
    sides = [seen[:, 0].any(), seen[:, -1].any(), seen[-1].any(), seen[0].any()]
    assert sum(map(int, sides)) == 1 and seen.sum() > scenes.MIN_PIXELS
    assert not scenes.clearly_visible(scene) and scenes.clearly_visible(one(1, 0, 0, 0))


def test_a_cube_reaches_to_its_corners():
    reach = [one(1, 0, 0, shape).reach.item() for shape in range(3)]
    assert_close(reach, [0.72, 0.8 * 0.72 * math.sqrt(2), 0.8 * 0.72])


def test_pairs_may_share_colour_or_shape_but_not_both():
    attributes, relation = scenes.sample_attributes(4000, seeded(1))
    assert abs((relation < 0).float().mean() - 0.5) < 0.04  # one or two, with equal chance
    first, second = attributes[relation >= 0].unbind(1)
    same = first == second
    assert not (same[:, scenes.COLOR] & same[:, scenes.SHAPE]).any()
    assert same[:, scenes.COLOR].any() and same[:, scenes.SHAPE].any()


def test_objects_are_turned_by_up_to_a_quarter():
    turn = sample_scenes(200, seeded(), objects=1).turn[:, 0]
    assert 0 <= turn.min() < 0.1 and math.pi / 2 - 0.1 < turn.max() < math.pi / 2


def test_forgetting_nothing_and_everything():
    said = parse("a large red metal sphere left of a small blue rubber cube")
    assert forget(said, seeded(), 0.0) == said
    assert forget(said, seeded(), 1.0) == parse("a red sphere left of a blue cube")
    less = [forget(said, seeded(seed), 0.25) for seed in range(400)]
    for thing in range(2):
        for k in (scenes.SIZE, scenes.MATERIAL):
            assert 0.17 < sum(d.things[thing][k] is None for d in less) / 400 < 0.33
    both = sum(d.things[0][0] is None and d.things[0][2] is None for d in less) / 400
    assert 0.02 < both < 0.12  # each by a chance of its own


@pytest.mark.parametrize(
    "less, more, fits",
    [
        ("a red thing", "a red cube", True),
        ("a red cube", "a red thing", False),
        ("a red cube", "a red cube and a blue ball", False),
        ("a red cube and a blue ball", "a red cube", False),
        ("a blue ball and a red cube", "a red cube behind a blue ball", True),
        ("a red cube behind a blue ball", "a red cube and a blue ball", False),
        ("a red cube behind a blue ball", "a red cube left of a blue ball", False),
        ("a red cube behind a blue ball", "a red cube in front of a blue ball", False),
        ("a thing in front of a cube", "a red cube behind a blue ball", True),
    ],
)
def test_what_fits(less, more, fits):
    assert parse(less).fits(parse(more)) == fits
