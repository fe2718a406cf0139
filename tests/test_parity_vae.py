"`vae` against diffusers' AutoencoderKL: same weights, same moments, pictures, gradients; and what is refused."

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from parity import assert_same, relative, same_weights
from safetensors.torch import load_file, save_file

from stable_diffusion_scratch.layers import rename
from stable_diffusion_scratch.vae import (
    DIFFUSERS_NAMES,
    OLD_NAMES,
    VAE,
    Moments,
    VAEConfig,
    diffusers_weights,
    from_diffusers,
    load_diffusers,
    measure_scale,
    rate_distortion,
    to_diffusers,
)  # fmt: skip

SD = VAEConfig(channels=(16, 32, 32), layers=2, groups=8, sample_size=32)
CASES = {
    "SD style": SD,
    "more latents, grey": replace(SD, latent_channels=6, in_channels=1, layers=1, scale=0.5, shift=0.1),
    "no attention": replace(SD, attention=False, channels=(16, 16)),
    "one level": replace(SD, channels=(16,), layers=1),
}


def pair(config: VAEConfig):
    ours, theirs = VAE(config).eval(), AutoencoderKL(**strip(to_diffusers(config)))
    same_weights(ours, theirs, DIFFUSERS_NAMES)
    return ours, theirs


def strip(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if not name.startswith("_")}


def randn(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CASES)
def test_moments_pictures_and_gradients(name):
    config = CASES[name]
    ours, theirs = pair(config)
    x, noise_seed = randn(2, config.in_channels, 16, 24).tanh(), 5
    said, reference = ours.encode(x), theirs.encode(x).latent_dist
    assert relative(said.mean, reference.mean) < 1e-5 and relative(said.log_var, reference.logvar) < 1e-5
    assert relative(said.kl(), reference.kl()) < 1e-5
    z = said.sample(torch.Generator().manual_seed(noise_seed))
    reference_z = reference.sample(torch.Generator().manual_seed(noise_seed))
    assert relative(z, reference_z) < 1e-5
    # through the sample into the decoder: every weight of both halves gets a gradient
    assert_same(ours, theirs, ours.decode(z), theirs.decode(reference_z).sample, DIFFUSERS_NAMES)


def test_published_size_and_names():
    with torch.device("meta"):
        ours, theirs = VAE(VAEConfig.sd()), AutoencoderKL(**strip(to_diffusers(VAEConfig.sd())))
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863
    expected = {key: weight.shape for key, weight in theirs.state_dict().items()}
    assert {key: weight.shape for key, weight in diffusers_weights(ours).items()} == expected


SD_FILE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def test_configuration_round_trip():
    for config in [*CASES.values(), VAEConfig.sd()]:
        assert from_diffusers(to_diffusers(config)) == config
        with torch.device("meta"):
            model = AutoencoderKL(**strip(to_diffusers(config)))
        assert from_diffusers(dict(model.config)) == config
    assert from_diffusers(SD_FILE) == VAEConfig.sd()


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"act_fn": "gelu"}, "act_fn = 'gelu' is not supported"),
        ({"out_channels": 4}, "out_channels = 4"),
        ({"use_quant_conv": False}, "use_quant_conv"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 3}, "down_block_types"),
        ({"chanels": 3}, r"unknown fields \['chanels'\]"),
        ({"norm_num_groups": 33}, "multiples of groups = 33"),
        ({"scaling_factor": 0.0}, "VAEConfig.scale must be positive"),
        ({"latent_channels": 0}, "VAEConfig.latent_channels must be a positive integer, got 0"),
        ({"layers_per_block": True}, "VAEConfig.layers must be a positive integer, got True"),
        ({"scaling_factor": float("inf")}, "VAEConfig.scale must be positive and finite, got inf"),
        ({"shift_factor": float("nan")}, "VAEConfig.shift must be finite, got nan"),
        ({"mid_block_add_attention": 1}, "VAEConfig.attention must be True or False, got 1"),
        ({"block_out_channels": [128, 256, 512, 500]}, "VAEConfig.channels must be positive multiples of groups = 32"),
    ],
)
def test_a_configuration_that_is_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        from_diffusers(SD_FILE | change)


def test_calls_that_are_refused():
    vae = VAE(SD)
    with pytest.raises(ValueError, match=r"x should have shape \[\* 3 \* \*\], got \[3, 16, 16\]"):
        vae.encode(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=r"multiples of 4, got \[18, 16\]"):
        vae.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match=r"z should have shape \[\* 4 \* \*\], got \[1, 3, 4, 4\]"):
        vae.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"x is torch\.float64, the weights of VAE are torch\.float32"):
        vae.encode(torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"z is torch\.uint8, the weights of VAE are torch\.float32"):
        vae.decode(torch.zeros(1, 4, 4, 4, dtype=torch.uint8))


def test_old_names_of_attention():
    ours, other = VAE(SD), VAE(SD)
    back = {new: old for old, new in OLD_NAMES.items()}
    old = {rename(name, back): weight for name, weight in diffusers_weights(ours).items()}
    assert any("proj_attn" in name for name in old) and not any("to_q" in name for name in old)
    load_diffusers(other, old)
    assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in other.state_dict().items())


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda w: w.pop("quant_conv.bias"), r"missing quant_conv\.bias"),
        (lambda w: w.update({"quant_con.bias": torch.ones(1)}), r"unknown quant_con\.bias"),
        (lambda w: w.update({"quant_conv.bias": torch.ones(1)}), r"misshapen quant_conv\.bias: \[1\], should be \[8\]"),
    ],
)
def test_a_file_that_does_not_fit(spoil, complaint):
    vae = VAE(SD)
    weights = dict(diffusers_weights(vae))
    spoil(weights)
    with pytest.raises(ValueError, match=complaint):
        load_diffusers(vae, weights)


def test_diffusers_opens_the_folder(tmp_path):
    ours = VAE(SD).eval()
    save_file(
        {k: w.contiguous() for k, w in diffusers_weights(ours).items()},
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(to_diffusers(SD)))
    theirs, report = AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    z = randn(1, 4, 4, 4)
    with torch.no_grad():
        assert relative(ours.decode(z), theirs.decode(z).sample) < 1e-5
    theirs.save_pretrained(tmp_path / "again")
    back = VAE(from_diffusers(json.loads((tmp_path / "again" / "config.json").read_text())))
    load_diffusers(back, load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in back.state_dict().items())


def test_scale():
    vae = VAE(replace(SD, scale=0.2, shift=0.3))
    z = randn(2, 4, 3, 3)
    assert torch.allclose(vae.unscale(vae.scale(z)), z, atol=1e-6)
    x = randn(8, 3, 16, 16)
    scale = measure_scale(vae, x.split(4), torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert abs((vae.encode(x).sample(torch.Generator().manual_seed(1)) * scale).std() - 1) < 0.1


def test_rate_and_distortion_are_per_picture():
    vae, x = VAE(SD), randn(3, 3, 16, 16)
    rate, distortion = rate_distortion(vae, x, torch.Generator().manual_seed(0))
    assert rate.shape == distortion.shape == (3,) and (rate >= 0).all()
    assert torch.allclose(Moments(vae.encode(x).mean, vae.encode(x).log_var).kl(), rate)
