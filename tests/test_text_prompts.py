"`text`'s long and weighted prompts: windows, emphasis, what they leave unchanged, and what is refused."

from functools import partial, reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_diffusion_scratch.captions import EXAMPLE
from stable_diffusion_scratch.layers import attention
from stable_diffusion_scratch.pipeline import StableDiffusion
from stable_diffusion_scratch.samplers import last
from stable_diffusion_scratch.text import (
    LAST,
    TextConfig,
    TextEncoder,
    Tokenizer,
    cut_windows,
    emphasis,
    emphasise,
    encode_long,
    same_length,
    windows,
)

TEXTS = ["a red cube left of a blue ball", "a large green ball, and a thing behind it"]
TOKENIZER = Tokenizer.train(TEXTS * 3, max_length=10)
ENCODER = TextEncoder(TextConfig.for_tokenizer(TOKENIZER, width=16, layers=2, heads=2, mlp_width=32)).eval()
ENCODER.initialise(torch.Generator().manual_seed(0))
ENCODER.requires_grad_(False)
texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("  ab'1,"), max_size=60)


def said(ids) -> list[int]:
    "The ids of a window between start and the first end."
    row = ids.tolist()
    return row[1 : row.index(TOKENIZER.end_id)]


@settings(max_examples=150, deadline=None)
@given(texts.filter(lambda text: "<|" not in text))
def test_windows_say_the_text_and_nothing_else(text):
    ids, weights = windows(TOKENIZER, text)
    assert ids.shape[1] == weights.shape[1] == 10 and (weights == 1).all() and (ids[:, 0] == TOKENIZER.start_id).all()
    assert [k for row in ids for k in said(row)] == TOKENIZER.encode(text)[1:-1]
    assert all(row[1 + len(said(row)) :].eq(TOKENIZER.end_id).all() for row in ids)  # end, then padding
    assert all(said(row) for row in ids) or len(ids) == 1
    if len(TOKENIZER.encode(text)) <= 10:
        assert torch.equal(ids, TOKENIZER(text))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["a", "b" + LAST, "c" + LAST]), max_size=40), st.integers(1, 9))
def test_windows_end_with_words_where_they_can(pieces, room):
    cuts = cut_windows(pieces, room)
    assert [piece for place in cuts for piece in pieces[place]] == pieces
    for place in cuts[:-1]:
        inside = pieces[place]
        assert 1 <= len(inside) <= room
        broken = not inside[-1].endswith(LAST)
        assert not broken or (len(inside) == room and not any(piece.endswith(LAST) for piece in inside))
        rest = pieces[place.stop : place.start + room]  # no further word would have fitted
        assert not any(piece.endswith(LAST) for piece in rest)


def test_boundaries():
    for words, count in ((0, 1), (1, 1), (8, 1), (9, 2), (16, 2), (17, 3)):
        ids, _ = windows(TOKENIZER, " ".join(["red"] * words))
        assert len(ids) == count, words
    ids, _ = windows(TOKENIZER, "red " * 6 + "q" * 20 + " red")  # a word longer than a window
    assert [len(said(row)) for row in ids] == [6, 8, 8, 5]
    assert torch.equal(windows(TOKENIZER, "")[0], TOKENIZER(""))
    with pytest.raises(ValueError, match="max_length 2 has room for start and end only"):
        windows(Tokenizer(TOKENIZER.vocab, TOKENIZER.merges, max_length=2), "a")


def test_weights_stand_at_their_tokens():
    ids, weights = windows(TOKENIZER, [("a ", 1.0), ("red cube", 1.5), (" left of a blue ball, a thing", 0.5)])
    assert weights.tolist()[0] == [1, 1, 1.5, 1.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1]
    assert weights.tolist()[1] == [1, 0.5, 0.5, 0.5, 1, 1, 1, 1, 1, 1]
    assert torch.equal(ids, windows(TOKENIZER, "a red cube left of a blue ball, a thing")[0])


def test_short_prompts_are_unchanged():
    for text in ("", "a red cube", "a red cube left of a blue"):
        assert torch.equal(encode_long(ENCODER, TOKENIZER, text), ENCODER(TOKENIZER(text)))
        assert torch.equal(encode_long(ENCODER, TOKENIZER, text), encode_long(ENCODER, TOKENIZER, f"({text}:1)"))
    brackets = "a (red) cube"
    assert torch.equal(encode_long(ENCODER, TOKENIZER, brackets, weighted=False), ENCODER(TOKENIZER(brackets)))


def test_a_batch_of_lengths_reads_as_each_alone():
    short, long = "a red cube", "a red cube " * 7  # 1 and 3 windows
    both = encode_long(ENCODER, TOKENIZER, [short, long])
    assert both.shape == (2, 30, 16)
    assert torch.equal(both[1:], encode_long(ENCODER, TOKENIZER, long))
    alone = encode_long(ENCODER, TOKENIZER, short)
    q = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attention(q, both[:1], both[:1], 2), attention(q, alone, alone, 2))
    a, b = same_length(torch.zeros(1, 4, 2), torch.zeros(3, 6, 2))
    assert a.shape == (1, 12, 2) and b.shape == (3, 12, 2)
    with pytest.raises(ValueError, match="no text to encode"):
        encode_long(ENCODER, TOKENIZER, [])


@pytest.mark.parametrize(
    "text, parts",
    [
        ("", [("", 1.0)]),
        ("a cube", [("a cube", 1.0)]),
        ("(a)", [("a", 1.1)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("a (red:1.3) cube", [("a ", 1.0), ("red", 1.3), (" cube", 1.0)]),
        ("((a):2)", [("a", 2.2)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("[(a:2)]", [("a", 2 / 1.1)]),
        ("(a : +.5 )", [("a ", 0.5)]),
        ("(a:0)", [("a", 0.0)]),
        (r"\(a\) \[b\] \\ \:", [(r"(a) [b] \ :", 1.0)]),
        ("a:2 :: b: c", [("a:2 :: b: c", 1.0)]),
        ("(a: b)", [("a: b", 1.1)]),
        ("[a:2]", [("a:2", 1 / 1.1)]),
        ("a\\", [("a\\", 1.0)]),
        ("()", [("", 1.0)]),
        ("(日本 😀:1.5)\n", [("日本 😀", 1.5), ("\n", 1.0)]),
    ],
)
def test_emphasis(text, parts):
    found = emphasis(text)
    assert [part for part, _ in found] == [part for part, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("a (red cube", r"'\(' at position 2 of 'a \(red cube' has no partner; write \\\( for the character itself"),
        ("a) b", r"'\)' at position 1 of"),
        ("a:2) b", r"'\)' at position 3 of"),
        ("[a) b", r"'\)' at position 2 of .*'\[' at position 0 is still open"),
        ("(a] b", r"'\]' at position 2 of .*'\(' at position 0 is still open"),
        ("((a) b", r"'\(' at position 0 of"),
        ("[", r"'\[' at position 0 of"),
        ("(a:-1)", "the weight '-1' at position 2 of .* must be a number, 0 or more"),
        ("(a:1.2.3)", "the weight '1.2.3' at position 2"),
        ("(a:1e999)", "the weight '1e999' at position 2"),
    ],
)
def test_emphasis_that_is_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        emphasis(text)


@settings(max_examples=150, deadline=None)
@given(texts)
def test_what_is_escaped_is_text(text):
    escaped = reduce(lambda t, c: t.replace(c, "\\" + c), "\\()[]:", text)
    assert emphasis(escaped) == [(text, 1.0)]


trees = st.recursive(
    st.text("ab ", min_size=1, max_size=4),
    lambda inner: st.tuples(st.sampled_from(["()", "[]", 0.5, 3.0]), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_brackets_nest_and_multiply(tree):
    def write(tree) -> str:
        if isinstance(tree, str):
            return tree
        kind, inside = tree[0], "".join(map(write, tree[1]))
        return f"{kind[0]}{inside}{kind[1]}" if isinstance(kind, str) else f"({inside}:{kind})"

    def weigh(tree, factor=1.0) -> list[tuple[str, float]]:
        "One weight for each character."
        if isinstance(tree, str):
            return [(c, factor) for c in tree]
        factor *= {"()": 1.1, "[]": 1 / 1.1}.get(tree[0], tree[0])
        return [entry for part in tree[1] for entry in weigh(part, factor)]

    found = [(c, weight) for part, weight in emphasis(write(tree)) for c in part]
    assert [c for c, _ in found] == [c for c, _ in weigh(tree)]
    assert [w for _, w in found] == pytest.approx([w for _, w in weigh(tree)])


def test_emphasise_weighs_the_difference_from_the_mean():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 7, 5, generator=generator)
    weights = 1 + (torch.arange(7) == 3).float().expand(2, 7)  # the fourth row twice
    louder = emphasise(rows, weights)
    assert torch.equal(emphasise(rows, torch.ones(2, 7)), rows)
    torch.testing.assert_close(louder.mean(1), rows.mean(1))
    moved = (louder - rows) - (louder - rows)[:, :1]  # what is common to all rows taken off
    torch.testing.assert_close(moved[:, 3], rows[:, 3] - rows.mean(1))
    assert moved[:, [0, 1, 2, 4, 5, 6]].abs().max() < 1e-6
    common = torch.randn(5, generator=generator)
    torch.testing.assert_close(emphasise(rows + common, weights), louder + common)
    assert emphasise(rows.half(), weights).dtype == torch.float16
    with pytest.raises(ValueError, match=r"weights should have shape \[2 7\], got \[7\]"):
        emphasise(rows, torch.ones(7))


def test_gradients_reach_encoder_and_weights():
    encoder = TextEncoder(ENCODER.config)
    encode_long(encoder, TOKENIZER, ["a (red:1.5) cube", "a blue ball " * 5]).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.daily
def test_the_pipeline_paints_from_long_and_weighted_prompts():
    pipe = StableDiffusion.from_pretrained()
    listen = partial(encode_long, pipe.text_encoder, pipe.tokenizer)
    with torch.no_grad():
        plain, loud = listen(EXAMPLE), listen(EXAMPLE.replace("red", "(red:2)"))
        long, nothing = same_length(listen(f"{EXAMPLE}, {EXAMPLE}, {EXAMPLE}"), listen(""))
    assert torch.equal(plain, pipe.encode_prompt(EXAMPLE)) and long.shape == nothing.shape != plain.shape

    def latents(*contexts):
        return last(pipe.steps(*contexts, steps=3)).x

    expected = latents(EXAMPLE)
    torch.testing.assert_close(latents(plain.repeat(1, 2, 1), nothing[:, :64]), expected, rtol=0, atol=1e-2)
    assert not torch.allclose(latents(loud), expected, atol=1e-2)
    assert latents(long, nothing).isfinite().all()
