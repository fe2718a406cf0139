"The blocks of `layers` against diffusers', with the same weights."

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from parity import assert_same, relative, same_weights

from stable_diffusion_scratch import layers

TABLE = {
    "from_time": "time_emb_proj",
    "skip": "conv_shortcut",
    "self_attention": "attn1",
    "cross_attention": "attn2",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
    "mlp.expand": "ff.net.0.proj",
    "mlp.contract": "ff.net.2",
    "blocks": "transformer_blocks",
    "linear1": "linear_1",
    "linear2": "linear_2",
}


def randn(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("out", [32, 64])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_residual_block(out, scale_shift):
    ours = layers.ResBlock(32, out, 48, groups=8, eps=1e-6, scale_shift=scale_shift)
    mode = "scale_shift" if scale_shift else "default"
    theirs = ResnetBlock2D(
        in_channels=32, out_channels=out, temb_channels=48, groups=8, eps=1e-6, time_embedding_norm=mode
    )
    same_weights(ours, theirs, TABLE)
    x, embedding = randn(2, 32, 7, 9), randn(2, 48, seed=3)
    assert_same(ours, theirs, ours(x, ours.read(embedding)), theirs(x, embedding), TABLE)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_spatial_transformer(linear, depth):
    ours = layers.SpatialTransformer(32, 4, 24, depth=depth, linear=linear, groups=8)
    theirs = Transformer2DModel(
        4, 8, 32, num_layers=depth, norm_num_groups=8, cross_attention_dim=24, use_linear_projection=linear
    )
    same_weights(ours, theirs, TABLE)
    x, text = randn(2, 32, 6, 5), randn(2, 7, 24, seed=3)
    assert_same(ours, theirs, ours(x, ours.read(text)), theirs(x, encoder_hidden_states=text).sample, TABLE)


def test_transformer_block():
    ours, theirs = layers.TransformerBlock(32, 4, 24), BasicTransformerBlock(32, 4, 8, cross_attention_dim=24)
    same_weights(ours, theirs, TABLE)
    x, text = randn(2, 15, 32), randn(2, 7, 24, seed=3)
    memory = ours.cross_attention.read(text)
    assert_same(ours, theirs, ours(x, memory), theirs(x, encoder_hidden_states=text), TABLE)


@pytest.mark.parametrize("lopsided", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_downsample(lopsided, size):
    ours, theirs = (
        layers.Downsample(16, lopsided),
        Downsample2D(16, use_conv=True, padding=0 if lopsided else 1, name="op"),
    )
    same_weights(ours, theirs, {})
    x = randn(2, 16, *size)
    assert_same(ours, theirs, ours(x), theirs(x), {})


def test_upsample():
    ours, theirs = layers.Upsample(16), Upsample2D(16, use_conv=True)
    same_weights(ours, theirs, {})
    x = randn(2, 16, 5, 4)
    assert_same(ours, theirs, ours(x), theirs(x), {})
    assert relative(ours(x, (9, 8)), theirs(x, (9, 8))) < 1e-6


def test_timestep_embedding():
    t = torch.tensor([0, 1, 500, 999])
    theirs = get_timestep_embedding(t, 320, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(layers.timestep_embedding(t, 320), theirs)
    assert torch.equal(layers.timestep_embedding(t.reshape(2, 2), 320), theirs.reshape(2, 2, 320))
    assert layers.timestep_embedding(t.half(), 8).dtype == torch.float32


def test_embedding_mlp():
    ours, theirs = layers.EmbeddingMLP(32, 128), TimestepEmbedding(32, 128)
    same_weights(ours, theirs, TABLE)
    x = randn(3, 32)
    assert_same(ours, theirs, ours(x), theirs(x), TABLE)


def test_the_fused_kernel_when_logits_are_huge():
    q, k, v = (scale * randn(1, 9, 16, seed=s) for s, scale in enumerate((1e3, 1e3, 1.0)))
    table = (q.double() @ k.double().transpose(1, 2) / 4).softmax(-1) @ v.double()
    assert relative(layers.attention(q, k, v).double(), table) < 1e-4


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda w: w.pop("norm.weight"), r"missing norm\.weight \[16\]"),
        (lambda w: w.update({"nrom.weight": torch.ones(16)}), r"unknown nrom\.weight"),
        (
            lambda w: w.update({"proj_in.weight": torch.ones(16, 8, 1, 1)}),
            r"misshapen proj_in\.weight: \[16, 8, 1, 1\], should be \[16, 16, 1, 1\]",
        ),
        (lambda w: w.update({"norm.weight": torch.ones(16, dtype=torch.int64)}), r"norm\.weight: torch\.int64"),
    ],
)
def test_weights_that_do_not_fit(change, complaint):
    model = layers.SpatialTransformer(16, 2, 8, groups=4)
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    before = {name: w.clone() for name, w in weights.items()}
    change(weights)
    with pytest.raises(ValueError, match=complaint):
        layers.load_weights(model, weights)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())  # nothing was loaded by half


def test_other_faults_are_named():
    with pytest.raises(ValueError, match="3 heads do not divide 16 channels"):
        layers.Attention(16, 3)
    with pytest.raises(ValueError, match="even number of channels, got 7"):
        layers.timestep_embedding(torch.tensor([1]), 7)
    with pytest.raises(ValueError, match=r"latents should have shape \[\* 4 \* \*\], got \[2, 3, 8, 8\]"):
        layers.check_shape("latents", torch.ones(2, 3, 8, 8), None, 4, None, None)
    with pytest.raises(ValueError, match="the same name"):
        layers.named_weights(layers.Attention(8, 2), {"q": "k"})


def test_costs_are_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model, x = layers.SpatialTransformer(16, 2, 8, depth=2, groups=4), torch.randn(2, 16, 4, 4)
    memory = model.read(torch.randn(2, 5, 8))
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model.to("meta")(x.to("meta"), [(k.to("meta"), v.to("meta")) for k, v in memory])
    bill = layers.costs(model, x.to("meta"), [(k.to("meta"), v.to("meta")) for k, v in memory])
    assert sum(bill.values(), layers.Cost()).flops == counter.get_total_flops()


def test_attention_that_is_causal():
    ours, x = layers.Attention(16, 2), randn(1, 6, 16)
    y = ours(x, causal=True)
    for n in range(1, 7):  # what comes later changes nothing
        assert relative(ours(x[:, :n], causal=True), y[:, :n]) < 1e-6
    assert relative(ours(x), y) > 1e-2


def test_costs_know_keywords_and_causal_attention():
    ours, x = layers.Attention(16, 2, context_channels=8), torch.randn(2, 6, 16)
    memory = ours.read(torch.randn(2, 5, 8))
    named, plain = layers.costs(ours, x=x, memory=memory), layers.costs(ours, x, memory)
    assert named == plain and plain[""].flops == 4 * 2 * 6 * 5 * 16
    own = layers.Attention(16, 2)
    assert layers.costs(own, x, causal=True)[""].flops == 4 * 2 * 6 * 6 * 16


def test_peak_bytes_counts_what_is_alive_at_once():
    x = torch.ones(1000)
    assert layers.peak_bytes(lambda: x.view(10, 100).T) == 0  # views are nothing new
    assert layers.peak_bytes(lambda: x * 2) == 4000
    assert layers.peak_bytes(lambda: ((x * 2) * 2) * 2) == 8000  # one is freed before the next but one
    assert layers.peak_bytes(lambda: [x * k for k in range(5)]) == 20000
    assert layers.peak_bytes(lambda: x.add_(1)) == 0


def test_a_machine_bounds_what_a_cost_can_reach():
    machine = layers.Machine(flops=1e9, bandwidth=1e8)
    assert machine.attainable(layers.Cost(flops=10**6, bytes=10)) == pytest.approx(1e9)
    assert machine.attainable(layers.Cost(flops=100, bytes=100)) == pytest.approx(1e8)


def test_a_wrong_dtype_is_named():
    model = torch.nn.Linear(2, 2).half()
    with pytest.raises(ValueError, match=r"latents is torch\.float32, the weights of Linear are torch\.float16"):
        layers.check_dtype("latents", torch.ones(2), model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layers.check_dtype("latents", torch.ones(2), model)
        with pytest.raises(ValueError, match="torch.int64"):
            layers.check_dtype("latents", torch.ones(2, dtype=torch.int64), model)


def test_a_field_that_is_no_integer_is_named():
    class Config:
        layers, depth = 2.0, -1

    with pytest.raises(ValueError, match=r"Config\.layers must be a positive integer, got 2\.0"):
        layers.check_integers(Config(), 1, "layers")
    with pytest.raises(ValueError, match=r"Config\.depth must be an integer, 0 or more, got -1"):
        layers.check_integers(Config(), 0, "depth")
