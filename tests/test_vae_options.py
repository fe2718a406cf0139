"`vae_options`: terms, tiles and words, each against an oracle; and what is refused. And the helpers of `vae` on rates."

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from stable_diffusion_scratch.vae import VAE, Moments, VAEConfig, active_units, free_bits, unit_rates
from stable_diffusion_scratch.vae_options import (
    VQVAE,
    Codebook,
    PatchCritic,
    adaptive_weight,
    borrowed_norms,
    critic_loss,
    decode_tiled,
    halo,
    perceptual_distance,
    perplexity,
    ramp,
    tile_starts,
)  # fmt: skip

NARROW = VAEConfig(channels=(4, 4), layers=1, groups=2, attention=False, latent_channels=3, sample_size=16)
RESULTS = Path(__file__).parent.parent / "bench" / "results"


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(config: VAEConfig = NARROW) -> VAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VAE(config).double().requires_grad_(False).eval()


def test_rates_of_each_number():
    said = Moments(randn(9, 3, 2, 2), randn(9, 3, 2, 2, seed=1))
    assert torch.allclose(unit_rates(said).sum(), said.kl().mean())
    assert torch.allclose(free_bits(said, 0.0), said.kl().mean())
    assert free_bits(said, 100.0).item() == pytest.approx(1200.0)
    silent = Moments(torch.zeros(9, 5), torch.zeros(9, 5))
    assert active_units(silent) == 0 and unit_rates(silent).abs().max() == 0
    assert active_units(Moments(randn(9, 5), torch.zeros(9, 5))) == 5


def test_perceptual_distance_is_a_sum_over_layers_and_a_mean_over_places():
    x, y = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    unit = lambda z: z / z.norm(dim=1, keepdim=True)  # noqa: E731
    by_hand = (unit(x) - unit(y)).square().sum((1, 2, 3)) / 16
    assert torch.allclose(perceptual_distance(lambda p: [p], x, y), by_hand)
    assert torch.allclose(perceptual_distance(lambda p: [p, p[..., ::2, ::2]], x, y) > by_hand, torch.tensor(True))
    assert perceptual_distance(lambda p: [p], x, x).abs().max() == 0
    flat = perceptual_distance(lambda p: [p], torch.zeros(2, 3, 4, 4, dtype=torch.float64), y)
    assert torch.allclose(flat, torch.ones(2, dtype=torch.float64))  # no direction at all is no nan


def test_critic_and_its_loss():
    critic = PatchCritic(3, (8, 16), groups=4)
    assert critic(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 7, 7)
    assert critic_loss(torch.tensor([1.0, 5.0]), torch.tensor([-1.0, -9.0])) == 0
    assert critic_loss(torch.zeros(3), torch.zeros(4)) == 2
    with pytest.raises(ValueError):
        PatchCritic(3, (8, 15), groups=4)


def test_adaptive_weight_makes_pulls_equal_and_is_bounded():
    weight = randn(5).requires_grad_()
    main, other = weight.square().sum(), 1e-3 * (randn(5, seed=1) * weight).sum()
    factor = adaptive_weight(main, other, weight)
    pulls = [torch.autograd.grad(v, weight)[0].norm() for v in (weight.square().sum(), factor * other)]
    assert pulls[1] / pulls[0] == pytest.approx(1, rel=2e-3)  # 1e-6 beside a pull of about 1e-3
    assert adaptive_weight(main, 0 * weight.sum(), weight, most=7.0) == 7


@pytest.mark.parametrize(
    "config", [NARROW, replace(NARROW, channels=(4,)), replace(NARROW, channels=(4, 4, 4), layers=2)]
)
def test_halo_is_what_convolutions_look_at(config):
    vae = small(config)
    for module in list(vae.decoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    n, f = 2 * halo(config) + 5, config.factor
    z, middle = randn(1, 3, 1, n).requires_grad_(), halo(config) + 2
    block = vae.decode(z)[..., f * middle : f * (middle + 1)]
    heard = torch.autograd.grad(block.square().sum(), z)[0].abs().sum((0, 1, 2)).nonzero().flatten()
    assert max(middle - heard.min(), heard.max() - middle) == halo(config)


@pytest.mark.parametrize("shape", [(1, 3, 5, 61), (2, 3, 50, 5), (1, 3, 47, 53)])
def test_tiles_with_the_whole_pictures_norms_are_the_whole(shape):
    vae, z = small(), randn(*shape)
    margin = halo(NARROW)
    if shape[0] > 1:  # statistics are a picture's own: borrowed one picture at a time
        parts = []
        for one in z.split(1):
            with borrowed_norms(vae.decoder, vae.from_latents(one)):
                parts.append(decode_tiled(vae, one, 4 * margin, 2 * margin, margin))
        assert torch.allclose(torch.cat(parts), vae.decode(z), rtol=0, atol=1e-10)
        return
    with borrowed_norms(vae.decoder, vae.from_latents(z)):
        tiled = decode_tiled(vae, z, 4 * margin, 2 * margin, margin)
    assert torch.allclose(tiled, vae.decode(z), rtol=0, atol=1e-10)


def test_a_picture_of_one_tile_is_decoded_as_a_whole():
    vae, z = small(replace(NARROW, attention=True)), randn(1, 3, 6, 7)
    assert torch.equal(decode_tiled(vae, z, tile=8, overlap=4), vae.decode(z))


def test_norms_are_given_back_even_after_an_error():
    vae, z = small(), randn(1, 3, 6, 6)
    before = vae.decode(z)
    with pytest.raises(KeyError), borrowed_norms(vae.decoder, z):
        raise KeyError("inside")
    assert torch.equal(vae.decode(z), before)


@pytest.mark.parametrize("tile, overlap, margin", [(8, 5, 0), (8, 3, 2), (8, -1, 0), (8, 4, -1)])
def test_overlaps_that_are_refused(tile, overlap, margin):
    with pytest.raises(ValueError, match="overlap should be from"):
        decode_tiled(small(), randn(1, 3, 16, 16), tile, overlap, margin)


def test_tiles_cover_everything_and_their_weights_are_positive_somewhere():
    for n, tile, overlap, margin in [(100, 24, 8, 2), (25, 24, 8, 4), (24, 24, 12, 6), (7, 24, 8, 0), (97, 16, 0, 0)]:
        total = torch.zeros(n)
        for start in tile_starts(n, tile, overlap):
            stop = min(start + tile, n)
            total[start:stop] += ramp(stop - start, (start > 0, stop < n), margin, overlap)
        assert total.min() > 0, (n, tile, overlap, margin)


def test_codebook_finds_the_nearest_word_and_passes_gradients_through():
    book, z = Codebook(11, 4).double(), randn(3, 4, 5, 2).requires_grad_()
    book.words.data = randn(11, 4, seed=1)
    said = book(z)
    distance = torch.cdist(z.detach().movedim(1, -1).reshape(-1, 4), book.words.detach())
    assert torch.equal(said.indices.flatten(), distance.argmin(1))
    assert torch.allclose(said.codebook.sum(), distance.amin(1).square().sum())
    assert torch.equal(said.codebook, said.commitment)
    direction = randn(3, 4, 5, 2, seed=2)
    to_z, to_words = torch.autograd.grad(
        (said.latents * direction).sum(), (z, book.words), allow_unused=True, retain_graph=True
    )
    assert torch.equal(to_z, direction) and to_words is None  # decoder's wish goes to the encoder alone
    assert torch.autograd.grad(said.codebook.sum(), z, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(said.commitment.sum(), book.words, allow_unused=True) == (None,)


def test_idle_words_are_moved_onto_answers():
    book, z = Codebook(5, 2).double(), randn(4, 2, 3, 3)
    book.words.data = torch.tensor([[0.0, 0.0], [9, 9], [-9, 9], [9, -9], [-9, -9]]).double()
    idle = book.revive(z, torch.Generator().manual_seed(0))
    assert idle.tolist() == [1, 2, 3, 4] and (book.words[0] == 0).all()
    rows = z.movedim(1, -1).reshape(-1, 2)
    assert all((rows == word).all(1).any() for word in book.words[1:])


def test_perplexity():
    assert perplexity(torch.arange(8).repeat(5), 8) == pytest.approx(8)
    assert perplexity(torch.zeros(3, 4, dtype=torch.long), 8) == pytest.approx(1)
    assert perplexity(torch.tensor([0, 0, 1, 1, 1, 1, 0, 0]), 8) == pytest.approx(2)
    assert perplexity(torch.tensor([0, 0, 0, 1]), 2) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) + 0.25 * math.log(4))
    )


def test_discrete_autoencoder():
    vq = VQVAE(replace(NARROW, in_channels=1), size=6)
    x = randn(2, 1, 8, 12).float()
    back, said = vq(x)
    assert back.shape == x.shape and said.indices.shape == (2, 4, 6) and torch.equal(vq.encode(x), said.indices)
    assert torch.allclose(vq.decode(said.indices), back, atol=1e-5)
    loss = (back - x).square().sum() + said.codebook.sum() + 0.25 * said.commitment.sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vq.parameters())
    with pytest.raises(ValueError, match="x should have shape"):
        vq(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="z should have shape"):
        vq.codebook(torch.zeros(2, 5, 4, 4))


@pytest.mark.parametrize("name", ["vae_collapse", "vae_terms"])
def test_stored_results_say_how_they_were_made(name):
    stored = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert {"steps", "batch", "torch", "variants"} <= stored.keys()
    for entry in stored["variants"].values():
        assert len(entry["seeds"]) == len(entry["scores"]) >= 1
        assert all(math.isfinite(value) for scores in entry["scores"] for value in scores.values())
