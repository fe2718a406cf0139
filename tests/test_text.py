"`text`'s tokenizer: same ids as transformers' CLIPTokenizer on folders that either has written; what is refused."

import json
import warnings
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from stable_diffusion_scratch.captions import VOCABULARY, captions
from stable_diffusion_scratch.scenes import sample_scenes
from stable_diffusion_scratch.text import BYTES, END, LAST, START, Tokenizer, join, learn, letters, words

GENERATOR = torch.Generator().manual_seed(0)
CAPTIONS = captions(sample_scenes(300, GENERATOR), GENERATOR, 0.25)
PROSE = (
    "It's a lovely day; I'd say we're all for the sphere, the sphery-est sphere! They've 25 cubes, you'll see. "
    "L'été à Zürich: 3½ Straße, ΟΔΥΣΣΕΥΣ, żółw, 日本語の文字, नमस्ते, 😀👩‍🚀."
)
ODD = [
    "", " ", "\n\t", "a", "A RED Ball", "  a \t red\n\nball ", "it's Bob's; we'LL've 'd", "''s !'s 's", "x²½Ⅷ٣12 3",
    "e\u0301 \u00e9 \u212b", "ΟΔΥΣΣΕΥΣ ΣΑΣ", "İstanbul STRASSE ß ẞ", "a_b __ _1", "a\u00a0b\u2003c\u200bd\u0085e\x1cf",
    "日本語 नमस्ते 😀👩‍🚀", START, END, f"a{END}b {START} red", "<|endoftext>", "!", "hello!! wow!", "a" * 300,
    "\ufeff\x00\x7f", "१२३ 一二三 ꙮ", "\u0378",
]  # fmt: skip


def make(pad: str = END, **options) -> Tokenizer:
    return Tokenizer.train([*CAPTIONS, PROSE, PROSE], max_length=32, pad=pad, **options)


@pytest.fixture(scope="module", params=[END, "!"])
def pair(request, tmp_path_factory):
    "Our tokenizer, and transformers' opened on the folder that ours saved."
    path = tmp_path_factory.mktemp("tokenizer")
    ours = make(request.param)
    ours.save(path)
    return ours, CLIPTokenizer.from_pretrained(path)


def theirs_ids(theirs, texts):
    return theirs(texts, padding="max_length", truncation=True, max_length=32).input_ids


def ours_ids(ours, texts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ours(texts).tolist()


def test_same_ids_as_transformers(pair):
    ours, theirs = pair
    for text in [*ODD, PROSE, *VOCABULARY, *CAPTIONS]:
        assert ours_ids(ours, text) == theirs_ids(theirs, [text]), text
    assert theirs.model_max_length == 32 and theirs.pad_token_id == ours.pad_id and len(theirs) == len(ours)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]) | st.sampled_from(" '!s'tdlmreév1_"), max_size=40))
@example("\u0130'S")
def test_same_ids_for_any_text(pair, text):
    ours, theirs = pair
    assert ours_ids(ours, text) == theirs_ids(theirs, [text])


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: START not in text))
def test_what_was_encoded_is_decoded(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == " ".join(words(text))


TOKENIZER = make()


def test_every_word_of_the_captions_is_one_token():
    tokenizer = Tokenizer.train([*CAPTIONS, *VOCABULARY, *VOCABULARY], max_length=32)
    assert all(len(tokenizer.pieces(word)) == 1 for word in VOCABULARY)
    assert tokenizer(CAPTIONS).shape == (300, 32)


def test_decoding_agrees_with_transformers(pair):
    ours, theirs = pair
    for text in [*CAPTIONS[:20], "it's 2½ cafés"]:
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)


def test_folders(pair, tmp_path):
    ours, theirs = pair
    ours.save(tmp_path / "ours")
    assert Tokenizer.from_folder(tmp_path / "ours") == ours
    theirs.save_pretrained(tmp_path / "theirs")  # tokenizer.json and tokenizer_config.json alone
    assert not (tmp_path / "theirs" / "vocab.json").exists()
    assert Tokenizer.from_folder(tmp_path / "theirs") == ours
    assert Tokenizer.from_folder(tmp_path / "theirs", max_length=9).max_length == 9
    with pytest.raises(FileNotFoundError, match="neither vocab.json and merges.txt nor tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    file = tmp_path / "theirs" / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["type"] = "Unigram"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="no tokenizer of CLIP's kind .*'Unigram'"):
        Tokenizer.from_folder(tmp_path / "theirs")
    config = tmp_path / "ours" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 10**30}))
    with pytest.raises(ValueError, match="pass max_length"):
        Tokenizer.from_folder(tmp_path / "ours")
    config.unlink()
    assert Tokenizer.from_folder(tmp_path / "ours").max_length == 77  # and special_tokens_map says how to pad
    assert Tokenizer.from_folder(tmp_path / "ours").pad == ours.pad


def test_the_layout_of_ids_is_clips():
    assert len(BYTES) == len(set(BYTES.values())) == 256 and TOKENIZER.vocab["!"] == 0
    assert TOKENIZER.vocab["!" + LAST] == 256 and TOKENIZER.vocab["a"] == 64
    assert (TOKENIZER.start_id, TOKENIZER.end_id) == (len(TOKENIZER) - 2, len(TOKENIZER) - 1)
    assert sorted(TOKENIZER.vocab.values()) == list(range(len(TOKENIZER)))
    assert len(make(vocab_size=600)) == 600 and make(vocab_size=514).merges == ()


def naive(counts, limit):
    "Byte-pair encoding by the book: count everything anew before each merge."
    spelled, merges = {word: letters(word) for word in counts}, []
    for _ in range(limit):
        seen = Counter()
        for word, pieces in spelled.items():
            for pair in pairwise(pieces):
                seen[pair] += counts[word]
        best = min(seen, key=lambda pair: (-seen[pair], pair), default=None)
        if best is None or seen[best] < 2:
            break
        merges.append(best)
        spelled = {word: join(pieces, best) for word, pieces in spelled.items()}
    return merges


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text("ab", min_size=1, max_size=9), st.integers(1, 5), max_size=8), st.integers(0, 30))
def test_learning_agrees_with_counting_anew(counts, limit):
    assert learn(counts, limit) == naive(counts, limit)


def test_a_long_text_is_cut_with_a_warning():
    text = "a red cube and " * 12 + "a blue ball"
    with pytest.warns(UserWarning, match=r"53 tokens is cut to 32; the model will not see .* a blue ball'"):
        ids = TOKENIZER(text)
    assert ids.shape == (1, 32) and ids[0, -1] == TOKENIZER.end_id and ids.dtype == torch.long
    kept = TOKENIZER.decode(ids[0].tolist())
    assert f"{kept} {TOKENIZER.truncated(text)}" == " ".join(words(text))
    assert TOKENIZER.truncated("a red cube") == "" and TOKENIZER([]).shape == (0, 32)


def test_what_is_refused():
    with pytest.raises(ValueError, match="vocab_size must be at least 514, got 100"):
        Tokenizer.train(["a"], vocab_size=100)
    with pytest.raises(ValueError, match=r"lacks '<\|endoftext\|>'"):
        Tokenizer({START: 0}, [])
    with pytest.raises(ValueError, match="lacks '<pad>'"):
        Tokenizer({START: 0, END: 1}, [], pad="<pad>")
    with pytest.raises(ValueError, match="max_length must be an integer, 2 or more, got 1"):
        Tokenizer({START: 0, END: 1}, [], max_length=1)
