"`text`'s encoder against transformers' CLIPTextModel: same states, gradients and folders; and what is refused."

import json
from dataclasses import replace

import pytest
import torch
from parity import assert_same, relative, same_weights
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stable_diffusion_scratch.layers import costs
from stable_diffusion_scratch.text import (
    DIFFUSERS_NAMES,
    TextConfig,
    TextEncoder,
    Tokenizer,
    diffusers_weights,
    from_diffusers,
    load_diffusers,
    to_diffusers,
)  # fmt: skip

SMALL = TextConfig(
    vocab_size=60, width=32, layers=3, heads=4, mlp_width=48, max_length=12, start_id=58, end_id=59, pad_id=59
)
CASES = {
    "as SD 1": SMALL,
    "as SD 2": replace(SMALL, activation="gelu", pad_id=0),
    "as SDXL": replace(SMALL, activation="gelu", projection=24, pad_id=0),
    "one layer": replace(SMALL, layers=1, heads=1),
}
BARE = {ours: name.removeprefix("text_model.") for ours, name in DIFFUSERS_NAMES.items()}


def ids_of(config: TextConfig, b: int = 5, m: int | None = None) -> torch.Tensor:
    "Texts of random length, padded."
    m, generator = m or config.max_length, torch.Generator().manual_seed(4)
    ids = torch.randint(1, config.vocab_size - 2, (b, m), generator=generator)
    ids[:, 0] = config.start_id
    for row, length in zip(ids, torch.randint(1, m, (b,), generator=generator), strict=True):
        row[length], row[length + 1 :] = config.end_id, config.pad_id
    return ids


def pair(config: TextConfig):
    ours, settings = TextEncoder(config).eval(), CLIPTextConfig(**to_diffusers(config))
    theirs = CLIPTextModelWithProjection(settings) if config.projection else CLIPTextModel(settings)
    same_weights(ours, theirs, DIFFUSERS_NAMES if config.projection else BARE)
    return ours, theirs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("m", [None, 7])
def test_states_and_gradients(name, m):
    config = CASES[name]
    ours, theirs = pair(config)
    ids = ids_of(config, m=m)
    reference = theirs(ids, output_hidden_states=True)
    found = ours.outputs(ids)
    assert torch.equal(found.last, ours(ids))
    assert relative(found.last, reference.last_hidden_state) < 1e-5
    assert relative(found.penultimate, reference.hidden_states[-2]) < 1e-5
    pooled = reference.text_embeds if config.projection else reference.pooler_output
    assert relative(found.pooled, pooled) < 1e-5
    for state, expected in zip(ours.states(ids)[:-1], reference.hidden_states[:-1], strict=True):
        assert relative(state, expected) < 1e-5
    both = lambda last, pooled: torch.cat([last.flatten(), pooled.flatten()])  # noqa: E731
    y, expected = both(found.last, found.pooled), both(reference.last_hidden_state, pooled)
    assert_same(ours, theirs, y, expected, DIFFUSERS_NAMES if config.projection else BARE)


@pytest.mark.parametrize("config, count", [(TextConfig.clip_l(), 123_060_480), (TextConfig.openclip_h(), 340_387_840)])
def test_published_sizes_and_names(config, count):
    with torch.device("meta"):
        ours, theirs = TextEncoder(config), CLIPTextModel(CLIPTextConfig(**to_diffusers(config)))
    assert sum(p.numel() for p in ours.parameters()) == count
    expected = {"text_model." + name: weight.shape for name, weight in theirs.state_dict().items()}
    assert {name: weight.shape for name, weight in diffusers_weights(ours).items()} == expected


SD1_FILE = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}


# as published with Stable Diffusion 2: the fields in which it differs
SD2_FILE = SD1_FILE | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}


def test_configuration_round_trip():
    for config in [*CASES.values(), TextConfig.clip_l(), TextConfig.openclip_h()]:
        assert from_diffusers(to_diffusers(config)) == config
        assert from_diffusers(CLIPTextConfig(**to_diffusers(config)).to_dict()) == config
    assert from_diffusers(SD1_FILE) == TextConfig.clip_l()
    assert replace(from_diffusers(SD2_FILE), pad_id=0) == TextConfig.openclip_h()  # SD 2's tokenizer pads with "!"


def test_one_layer_less_is_the_penultimate_through_the_norm():
    "What Stable Diffusion 2 reads: a checkpoint without its last layer, as diffusers publishes it."
    config = CASES["as SD 2"]
    _, theirs = pair(config)
    ours, ids = TextEncoder(replace(config, layers=config.layers - 1)), ids_of(config)
    weights = theirs.state_dict()
    load_diffusers(ours, {n: w for n, w in weights.items() if f"layers.{config.layers - 1}." not in n})
    with torch.no_grad():
        states = theirs(ids, output_hidden_states=True).hidden_states
        expected = torch.nn.functional.layer_norm(
            states[-2], [config.width], weights["final_layer_norm.weight"], weights["final_layer_norm.bias"]
        )
        assert relative(ours(ids), expected) < 1e-5


def test_costs_see_the_attention_of_a_text():
    with torch.device("meta"):
        bill = costs(TextEncoder(SMALL), torch.zeros(2, 12, dtype=torch.long))
    seen = {name: cost.flops for name, cost in bill.items() if name.endswith("attention")}
    assert seen == {f"layers.{k}.attention": 4 * 2 * 12 * 12 * 32 for k in range(3)}


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"hidden_act": "relu"}, r"TextConfig.activation must be one of \['quick_gelu', 'gelu'\], got 'relu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported, only 0.0"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps = 1e-06 is not supported"),
        ({"model_type": "t5"}, "model_type 't5' is not supported"),
        ({"architectures": ["CLIPModel"]}, r"\['CLIPModel'\]"),
        ({"hiden_size": 3}, r"unknown fields \['hiden_size'\]"),
        ({"num_attention_heads": 7}, "7 do not divide 768 channels"),
        ({"num_hidden_layers": 0}, "TextConfig.layers must be a positive integer, got 0"),
        ({"eos_token_id": 49408}, "TextConfig.end_id must be one of 49408 ids, got 49408"),
    ],
)
def test_a_configuration_that_is_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        from_diffusers(SD1_FILE | change)


def test_calls_that_are_refused():
    encoder = TextEncoder(SMALL)
    with pytest.raises(ValueError, match=r"ids should have shape \[\* \*\], got \[12\]"):
        encoder(torch.zeros(12, dtype=torch.long))
    with pytest.raises(ValueError, match="ids has 13 tokens, the encoder has 12 positions"):
        encoder(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match=r"text 1 has no end token \(id 59\)"):
        encoder.outputs(torch.tensor([[58, 3, 59], [58, 3, 4]]))
    with pytest.raises(ValueError, match="TextConfig.projection"):
        replace(SMALL, projection=-1)


def test_names_of_every_release_are_read():
    ours, ids = TextEncoder(SMALL), ids_of(SMALL)
    weights = {name: weight.clone() for name, weight in diffusers_weights(ours).items()}
    positions = torch.arange(SMALL.max_length)[None]
    for file in (
        weights | {"text_model.embeddings.position_ids": positions},
        {name.removeprefix("text_model."): weight for name, weight in weights.items()},
    ):
        other = TextEncoder(SMALL)
        load_diffusers(other, file)
        assert torch.equal(other(ids), ours(ids))


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda w: w.pop("text_model.final_layer_norm.bias"), r"missing final_layer_norm\.bias"),
        (lambda w: w.update({"text_model.final_norm.bias": torch.ones(32)}), r"unknown final_norm\.bias"),
        (lambda w: w.update({"text_projection.weight": torch.ones(32, 32)}), r"unknown text_projection\.weight"),
        (lambda w: w.update({"text_model.final_layer_norm.bias": torch.ones(1)}), r"misshapen final_lay.*be \[32\]"),
    ],
)
def test_a_file_that_does_not_fit(spoil, complaint):
    encoder = TextEncoder(SMALL)
    weights = dict(diffusers_weights(encoder))
    spoil(weights)
    with pytest.raises(ValueError, match=complaint):
        load_diffusers(encoder, weights)


@pytest.mark.parametrize("name", CASES)
def test_transformers_opens_the_folder(name, tmp_path):
    config = CASES[name]
    kind = CLIPTextModelWithProjection if config.projection else CLIPTextModel
    ours, ids = TextEncoder(config), ids_of(config)
    weights = {name: weight.contiguous() for name, weight in diffusers_weights(ours).items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(to_diffusers(config)))
    theirs, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert relative(ours(ids), theirs(ids, output_hidden_states=True).last_hidden_state) < 1e-5
    theirs.save_pretrained(tmp_path / "again")
    back = TextEncoder(from_diffusers(json.loads((tmp_path / "again" / "config.json").read_text())))
    load_diffusers(back, load_file(tmp_path / "again" / "model.safetensors"))
    assert back.config == config
    assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in back.state_dict().items())


def test_initial_weights_keep_the_stream_in_scale():
    tokenizer = Tokenizer.train(["a red ball left of a blue cube"] * 3, max_length=12)
    config = TextConfig.for_tokenizer(tokenizer, width=128, layers=4, heads=4, mlp_width=512)
    encoder = TextEncoder(config)
    encoder.initialise(torch.Generator().manual_seed(0))
    again = TextEncoder(config)
    again.initialise(torch.Generator().manual_seed(0))
    assert torch.equal(encoder.tokens.weight, again.tokens.weight)
    assert abs(encoder.tokens.weight.std() / 0.02 - 1) < 0.05
    states = encoder.states(tokenizer(["a blue ball", "", "a red cube"]))
    assert all(0.01 < state.std() < 1 for state in states)


def test_a_token_sees_only_those_before_it():
    encoder, ids = TextEncoder(SMALL), ids_of(SMALL, 1)
    other = ids.clone()
    other[0, 6:] = 3
    assert torch.equal(encoder(ids)[:, :6], encoder(other)[:, :6])
    assert not torch.allclose(encoder(ids)[:, 6:], encoder(other)[:, 6:])
