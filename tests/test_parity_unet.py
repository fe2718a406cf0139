"`unet` against diffusers' UNet2DConditionModel: same weights, same outputs, same gradients; and what is refused."

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from parity import assert_same, redraw, relative, same_weights

from stable_diffusion_scratch.layers import peak_bytes
from stable_diffusion_scratch.unet import (
    DIFFUSERS_NAMES,
    Added,
    UNet,
    UNetConfig,
    diffusers_weights,
    from_diffusers,
    load_diffusers,
    plan,
    to_diffusers,
)  # fmt: skip

SD1 = UNetConfig(channels=(32, 64, 64), depth=(1, 1, 0), heads=(4, 4, 4), context_channels=24, groups=8, sample_size=16)
CASES = {
    "SD 1 style": SD1,
    "SD 2 style": replace(SD1, heads=(2, 4, 8), linear=True, layers=1),
    "SDXL style": replace(
        SD1, depth=(0, 1, 2), mid_depth=2, heads=(2, 4, 8), linear=True, pooled_channels=20, size_channels=16
    ),
    "scale and shift": replace(SD1, scale_shift=True, layers=1),
    "no attention in the middle": replace(SD1, mid_depth=0, depth=(0, 1, 0)),
    "one level": UNetConfig(
        channels=(32,), depth=(1,), heads=(4,), context_channels=24, groups=8, in_channels=9, out_channels=8
    ),
}


def inputs(config: UNetConfig, size=(16, 16), batch=2):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(batch, config.in_channels, *size, generator=g)
    text = torch.randn(batch, 7, config.context_channels, generator=g)
    added = None
    if config.pooled_channels:
        sizes = torch.randint(0, 1024, (batch, 6), generator=g).float()
        added = Added(torch.randn(batch, config.pooled_channels, generator=g), sizes)
    return x, text, added


def theirs_call(model, x, t, text, added):
    extra = {"text_embeds": added.pooled, "time_ids": added.sizes} if added else None
    return model(x, t, encoder_hidden_states=text, added_cond_kwargs=extra).sample


def pair(config: UNetConfig):
    ours, theirs = UNet(config).eval(), UNet2DConditionModel(**strip(to_diffusers(config)))
    same_weights(ours, theirs, DIFFUSERS_NAMES)
    return ours, theirs


def strip(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if not name.startswith("_")}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name):
    ours, theirs = pair(CASES[name])
    x, text, added = inputs(CASES[name])
    t = torch.tensor([981, 7])
    assert_same(ours, theirs, ours(x, t, text, added), theirs_call(theirs, x, t, text, added), DIFFUSERS_NAMES)


@pytest.mark.parametrize("size", [(13, 10), (8, 24), (5, 7)])
def test_any_size(size):
    ours, theirs = pair(SD1)
    x, text, _ = inputs(SD1, size)
    with torch.no_grad():
        assert relative(ours(x, 500, text), theirs_call(theirs, x, 500, text, None)) < 1e-5


@pytest.mark.parametrize(
    "t", [0, 999, 500.25, torch.tensor(3), torch.tensor([3.5, 800.0]), torch.tensor([3, 4], dtype=torch.int32)]
)
def test_kinds_of_timestep(t):
    ours, theirs = pair(SD1)
    x, text, _ = inputs(SD1)
    with torch.no_grad():
        assert relative(ours(x, t, text), theirs_call(theirs, x, t, text, None)) < 1e-5


@pytest.mark.parametrize("name", ["SD 1 style", "SDXL style"])
def test_what_is_computed_once_is_exact(name):
    ours = UNet(CASES[name]).eval()
    x, text, added = inputs(CASES[name])
    with torch.no_grad():
        memory = ours.embed_context(text)
        for t in (999, 20, torch.tensor([1, 2])):
            assert torch.equal(ours.predict(x, ours.embed_time(t, added), memory), ours(x, t, text, added))
        if added is None:
            shifts = ours.embed_time(torch.tensor([999, 20]))
            assert relative(ours.predict(x, [s[1:] for s in shifts], memory), ours(x, 20, text)) < 1e-6


def test_dtype_follows_the_weights():
    ours = UNet(SD1).to(torch.bfloat16)
    x, text, _ = inputs(SD1)
    assert ours(x.bfloat16(), torch.tensor([1, 2]), text.bfloat16()).dtype == torch.bfloat16
    ours = ours.double()
    assert ours(x.double(), torch.tensor(5, dtype=torch.float64), text.double()).dtype == torch.float64


PUBLISHED = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_and_names(name):
    config = getattr(UNetConfig, name)()
    with torch.device("meta"):
        ours = UNet(config)
        theirs = UNet2DConditionModel(**strip(to_diffusers(config)))
    assert sum(p.numel() for p in ours.parameters()) == PUBLISHED[name]
    expected = {key: weight.shape for key, weight in theirs.state_dict().items()}
    assert {key: weight.shape for key, weight in diffusers_weights(ours).items()} == expected


SD15_FILE = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


def test_configuration_round_trip():
    for config in [*CASES.values(), UNetConfig.sd15(), UNetConfig.sd21(), UNetConfig.sdxl()]:
        assert from_diffusers(to_diffusers(config)) == config
        with torch.device("meta"):
            model = UNet2DConditionModel(**strip(to_diffusers(config)))
        assert from_diffusers(dict(model.config)) == config  # every field diffusers writes is understood
    assert from_diffusers(SD15_FILE) == UNetConfig.sd15()


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"act_fn": "gelu"}, "act_fn = 'gelu' is not supported"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"num_attention_heads": 8}, "num_attention_heads"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types"),
        ({"mid_block_type": None}, "mid_block_type"),
        ({"addition_embed_type": "text"}, "addition_embed_type"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift"),
        ({"chanels": 3}, r"unknown fields \['chanels'\]"),
        ({"norm_num_groups": 33}, "320 is not a multiple of groups = 33"),
        ({"layers_per_block": [1, 2]}, "UNetConfig.layers"),
        ({"attention_head_dim": [8, 8]}, "UNetConfig.heads"),
    ],
)
def test_a_configuration_that_is_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        from_diffusers(SD15_FILE | change)


def test_what_diffusers_cannot_say():
    with pytest.raises(ValueError, match="one depth for the coarsest level and the middle"):
        to_diffusers(replace(SD1, depth=(1, 1, 1), mid_depth=2))


@pytest.mark.parametrize(
    "call, complaint",
    [
        (lambda u, x, text: u(x[0], 1, text), r"x should have shape \[\* 4 \* \*\]"),
        (lambda u, x, text: u(x[:, :3], 1, text), r"x should have shape \[\* 4 \* \*\], got \[2, 3, 16, 16\]"),
        (lambda u, x, text: u(x, 1, text[..., :5]), r"context should have shape \[\* \* 24\]"),
        (lambda u, x, text: u(x, 1, text[:1]), "text for 1"),
        (lambda u, x, text: u(x, torch.tensor([1, 2, 3]), text), "timesteps for 3"),
        (lambda u, x, text: u(x, torch.ones(2, 1), text), r"t should have shape \[\] or \[b\], got \[2, 1\]"),
        (lambda u, x, text: u(x, 1, text, Added(text, text)), "takes no `added`"),
    ],
)
def test_a_call_that_is_refused(call, complaint):
    x, text, _ = inputs(SD1)
    with pytest.raises(ValueError, match=complaint):
        call(UNet(SD1), x, text)


def test_added_is_asked_for_and_checked():
    config = CASES["SDXL style"]
    unet, (x, text, added) = UNet(config), inputs(config)
    with pytest.raises(ValueError, match="needs `added`"):
        unet(x, 1, text)
    with pytest.raises(ValueError, match=r"added.sizes should have shape \[2 6\], got \[2, 5\]"):
        unet(x, 1, text, Added(added.pooled, added.sizes[:, :5]))
    with pytest.raises(ValueError, match=r"added.pooled should have shape \[\* 20\]"):
        unet(x, 1, text, Added(added.pooled[:, :4], added.sizes))


@pytest.mark.parametrize("spoil, complaint", [
    (lambda w: w.pop("conv_in.bias"), r"missing conv_in\.bias"),
    (lambda w: w.update({"conv_on.bias": torch.ones(1)}), r"unknown conv_on\.bias"),
    (lambda w: w.update({"conv_in.bias": torch.ones(1)}), r"misshapen conv_in\.bias: \[1\], should be \[32\]"),
])  # fmt: skip
def test_a_file_that_does_not_fit(spoil, complaint):
    unet = UNet(SD1)
    weights = dict(diffusers_weights(unet))
    spoil(weights)
    with pytest.raises(ValueError, match=complaint):
        load_diffusers(unet, weights)


def test_diffusers_opens_the_folder(tmp_path):
    import json

    from safetensors.torch import load_file, save_file

    ours = UNet(CASES["SDXL style"]).eval()
    save_file(
        {k: w.contiguous() for k, w in diffusers_weights(ours).items()},
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(to_diffusers(ours.config)))
    theirs, report = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x, text, added = inputs(ours.config)
    with torch.no_grad():
        assert relative(ours(x, 5, text, added), theirs_call(theirs, x, 5, text, added)) < 1e-5
    theirs.save_pretrained(tmp_path / "again")
    back = UNet(from_diffusers(json.loads((tmp_path / "again" / "config.json").read_text())))
    load_diffusers(back, load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(w, ours.state_dict()[k]) for k, w in back.state_dict().items())


@pytest.mark.parametrize("name", ["SD 1 style", "SDXL style", "scale and shift"])
def test_checkpoints_change_no_gradient_and_save_memory(name):
    ours = redraw(UNet(CASES[name]))
    x, text, added = inputs(CASES[name])
    weights, found = sum(p.nbytes for p in ours.parameters()), {}  # their gradients are needed in any case
    for ours.checkpointing in (False, True):
        ours.zero_grad()
        peak = peak_bytes(lambda: ours(x, 500, text, added).square().mean().backward())
        found[ours.checkpointing] = peak - weights, [p.grad for p in ours.parameters()]
    assert found[True][0] < 0.8 * found[False][0]
    for a, b in zip(found[True][1], found[False][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)
    with torch.no_grad():  # nothing to go back for: no checkpoints
        assert ours(x, 500, text, added).grad_fn is None


def test_memory_format_goes_through_and_changes_nothing():
    ours = redraw(UNet(SD1))
    x, text, _ = inputs(SD1)
    with torch.no_grad():
        plain = ours(x, 500, text)
        last = ours.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), 500, text)
    assert relative(last, plain) < 1e-5 and last.is_contiguous(memory_format=torch.channels_last)


def test_without_bridges():
    config = replace(SD1, bridges=False)
    ours = redraw(UNet(config))
    x, text, _ = inputs(config, size=(13, 10))
    assert ours(x, 500, text).shape == x.shape
    assert all(block.conv1.in_channels <= 64 for level in ours.up for block in level.res)
    with pytest.raises(ValueError, match="UNetConfig.bridges must be True"):
        to_diffusers(config)


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_is_built(name):
    ours, widths = UNet(CASES[name]), plan(CASES[name])
    arrive = [[block.conv1.in_channels for block in level.res] for level in ours.levels()]
    assert arrive == [*widths.down, widths.mid, *widths.up]


@pytest.mark.parametrize("field, value", [
    ("linear", 1), ("scale_shift", "yes"), ("bridges", None), ("depth", (1, -1, 0)), ("depth", (1, 1)),
    ("channels", (32, 64, 65)), ("channels", ()), ("heads", (4, 4, 0)), ("mid_depth", 0.5), ("sample_size", "64"),
    ("in_channels", 0), ("context_channels", -3), ("pooled_channels", -1),
])  # fmt: skip
def test_a_field_that_does_not_fit_is_named(field, value):
    with pytest.raises(ValueError, match=rf"UNetConfig\.{field}"):
        replace(SD1, **{field: value})


def test_a_wrong_dtype_is_named():
    ours, (x, text, _) = UNet(SD1), inputs(SD1)
    with pytest.raises(ValueError, match=r"x is torch\.float64, the weights of UNet are torch\.float32"):
        ours(x.double(), 1, text)
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        ours(x.long(), 1, text)
    with pytest.raises(ValueError, match=r"context is torch\.float16"):
        ours(x, 1, text.half())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert ours(x, 1, text).isfinite().all()
