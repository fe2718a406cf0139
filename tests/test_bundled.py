"""The model in the package: diffusers opens the folder and paints the same picture; it paints what is asked."""

import pytest
import torch

from stable_diffusion_scratch.captioner import describe_picture, load_judge
from stable_diffusion_scratch.captions import parse
from stable_diffusion_scratch.pipeline import BUNDLED, StableDiffusion, last

PROMPTS = ["a large red metal sphere", "a large yellow rubber cylinder left of a small blue metal cube"]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return StableDiffusion.from_pretrained()


@pytest.mark.daily
def test_diffusers_paints_the_same_picture(pipe):
    "From the same latents, 20 DDIM steps, guidance 4: less than 1/255 apart on average (in [0, 1])."
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(BUNDLED, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    latents = pipe.noise(len(PROMPTS), seed=3)
    ours = pipe.finish(last(pipe.steps(PROMPTS, steps=20, guidance=4.0, latents=latents)))
    expected = theirs(
        PROMPTS, num_inference_steps=20, guidance_scale=4.0, latents=latents.clone(), output_type="pt"
    ).images
    difference = ((ours + 1) / 2 - expected).abs().mean().item()
    print(f"mean difference {difference:.2e}")
    assert expected.std() > 0.05 and difference < 1 / 255 / 10


@pytest.mark.daily
def test_it_paints_what_is_asked(pipe):
    prompt = "a large red metal sphere"
    pictures = pipe.finish(last(pipe.steps(prompt, count=12, seed=5)))
    said = describe_picture(load_judge(), pictures)
    assert sum(seen is not None and parse(prompt).fits(seen) for seen in said) >= 9


def test_its_weights_are_small():
    assert sum(f.stat().st_size for f in BUNDLED.parent.rglob("*") if f.is_file()) <= 20e6
