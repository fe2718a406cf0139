"`pipeline`: folders that diffusers opens and writes, the same pictures as its pipeline, and what is refused."

import json
import warnings
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from parity import redraw
from PIL import Image
from safetensors.torch import load_file, save_file

from stable_diffusion_scratch import pipeline
from stable_diffusion_scratch.captions import captions
from stable_diffusion_scratch.forward import zero_terminal_snr
from stable_diffusion_scratch.pipeline import (
    INDEX,
    KINDS,
    SCHEDULER_ONLY,
    SCHEDULERS,
    SOLVER,
    Schedule,
    StableDiffusion,
    image_grid,
    noise_levels,
    schedule_from_diffusers,
    schedule_to_diffusers,
    to_images,
)
from stable_diffusion_scratch.samplers import SAMPLERS, Step, last
from stable_diffusion_scratch.scenes import sample_scenes
from stable_diffusion_scratch.text import TextConfig, TextEncoder, Tokenizer
from stable_diffusion_scratch.unet import UNet, UNetConfig
from stable_diffusion_scratch.vae import VAE, VAEConfig

PROMPTS = ["a red metal cube", "a blue sphere behind a small cylinder"]
G = torch.Generator().manual_seed(0)
TEXTS = captions(sample_scenes(100, G), G, 0.25)


def make(second: bool = False, **schedule) -> StableDiffusion:
    "A tiny random pipeline: quick GELU and padding with the end token as in SD 1, or as in SD 2."
    tokenizer = Tokenizer.train(TEXTS, 600, max_length=16, pad="!" if second else "<|endoftext|>")
    config = TextConfig.for_tokenizer(
        tokenizer, width=32, layers=2, heads=2, mlp_width=64, activation="gelu" if second else "quick_gelu"
    )
    unet = UNet(
        UNetConfig(
            channels=(32, 64),
            layers=1,
            depth=(1, 1),
            heads=(2, 4) if second else (4, 4),
            context_channels=32,
            groups=8,
            linear=second,
            sample_size=8,
        )
    )
    vae = VAE(VAEConfig(channels=(8, 16), layers=1, groups=4, scale=0.7, sample_size=16))
    networks = [redraw(net, seed) for seed, net in enumerate((unet, vae, TextEncoder(config)))]
    return StableDiffusion(*networks, tokenizer=tokenizer, schedule=Schedule(**schedule))


PIPE = make()


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(float) / 255


def last_pictures(pipe: StableDiffusion, *args, **options) -> torch.Tensor:
    return pipe.finish(last(pipe.steps(*args, **options)))


def open_theirs(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def paint_theirs(theirs, latents, prompts=PROMPTS, **options) -> np.ndarray:
    options = {"num_inference_steps": 20, "guidance_scale": 4.0, "output_type": "np"} | options
    return theirs(list(prompts), latents=latents, **options).images


def paint_ours(pipe, latents, prompts=PROMPTS, **options) -> np.ndarray:
    pictures = last_pictures(pipe, prompts, latents=latents, **options)
    return (pictures.permute(0, 2, 3, 1).numpy() + 1) / 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    PIPE.save_pretrained(path)
    return path


# ----------------------------------------------------------------------------- folders


def test_saved_and_opened_again_is_the_same(folder, tmp_path):
    again = StableDiffusion.from_pretrained(folder)
    assert again.schedule == PIPE.schedule and again.tokenizer == PIPE.tokenizer
    for name in ("unet", "vae", "text_encoder"):
        a, b = getattr(PIPE, name), getattr(again, name)
        assert a.config == b.config and not b.training
        weights = b.state_dict()
        assert all(torch.equal(w, weights[key]) for key, w in a.state_dict().items())
    assert pixels(again(PROMPTS, steps=2)).tolist() == pixels(PIPE(PROMPTS, steps=2)).tolist()
    again.save_pretrained(tmp_path / "again")
    files = [f.relative_to(folder) for f in sorted(folder.rglob("*")) if f.is_file()]
    assert len(files) == 12
    assert all((folder / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)


def test_half_precision_on_disk(tmp_path):
    PIPE.save_pretrained(tmp_path / "half", torch.float16)
    file = tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors"
    assert {w.dtype for w in load_file(file).values()} == {torch.float16}
    opened = StableDiffusion.from_pretrained(tmp_path / "half")
    assert opened.dtype == torch.float32
    a, b = pixels(opened(PROMPTS, steps=4)), pixels(PIPE(PROMPTS, steps=4))
    assert abs(a - b).mean() < 0.01
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))  # the name of a variant
    assert StableDiffusion.from_pretrained(tmp_path / "half").dtype == torch.float32


def test_a_folder_is_replaced_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    path = tmp_path / "model"
    PIPE.save_pretrained(path)
    (path / "scores.json").write_text("{}")
    before = {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}
    other = make(second=True)

    def nothing_changed():
        assert {f: f.read_bytes() for f in path.rglob("*") if f.is_file()} == before
        assert [f.name for f in tmp_path.iterdir()] == ["model"]

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            other.save_pretrained(path)
    nothing_changed()
    replace_, calls = pipeline.os.replace, []

    def failing(a, b):
        calls.append(a)
        if len(calls) == 9:
            raise OSError(5, "Input/output error")
        replace_(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.os, "replace", failing)
        with pytest.raises(OSError, match="Input/output"):
            other.save_pretrained(path)
    nothing_changed()
    other.save_pretrained(path)
    assert StableDiffusion.from_pretrained(path).unet.config == other.unet.config
    assert (path / "scores.json").read_text() == "{}"


def test_what_is_not_written(tmp_path):
    (tmp_path / "file").write_text("dear to me")
    with pytest.raises(FileExistsError, match="is a file"):
        PIPE.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "dear to me"
    large = make()
    large.unet.conv_in.weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match="unet: conv_in.weight is not finite as torch.float16"):
        large.save_pretrained(tmp_path / "large", torch.float16)
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "spoil, error, complaint",
    [
        (lambda p: (p / INDEX).unlink(), FileNotFoundError, "no model in .* for want of model_index.json"),
        (lambda p: (p / INDEX).write_text("{"), ValueError, "model_index.json is not JSON"),
        (lambda p: edit_json(p / INDEX, _class_name="StableDiffusionXLPipeline"), ValueError, "not the folder of"),
        (lambda p: edit_json(p / INDEX, unet=["diffusers", "UNet3D"]), ValueError, r"unet = \['diffusers', 'UNet3D'\]"),
        (lambda p: edit_json(p / INDEX, text_encoder_2=["a", "b"]), ValueError, r"unknown parts \['text_encoder_2'\]"),
        (lambda p: edit_json(p / "unet/config.json", act_fn="gelu"), ValueError, "unet: UNet config: act_fn = 'gelu'"),
        (lambda p: edit_json(p / "unet/config.json", layers_per_block=2), ValueError, "unet: weights do not fit UNet"),
        (lambda p: (p / "vae/config.json").unlink(), FileNotFoundError, "config.json is missing: is .*vae whole"),
        (
            lambda p: (p / "vae/diffusion_pytorch_model.safetensors").unlink(),
            FileNotFoundError,
            "vae has no diffusion_pytorch_model.safetensors",
        ),
        (lambda p: (p / "text_encoder/model.safetensors").write_bytes(b"x" * 99), ValueError, "text_encoder: "),
        (lambda p: (p / "tokenizer/merges.txt").unlink(), FileNotFoundError, "tokenizer has neither"),
        (lambda p: edit_json(p / "scheduler/scheduler_config.json", use_flow_sigmas=True), ValueError, "use_flow_sig"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(spoil, error, complaint, tmp_path):
    PIPE.save_pretrained(tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(error, match=complaint):
        StableDiffusion.from_pretrained(tmp_path / "model")


def test_an_unknown_weight_is_refused(folder, tmp_path):
    PIPE.save_pretrained(tmp_path)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"extra": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="vae: weights do not fit VAE: unknown extra"):
        StableDiffusion.from_pretrained(tmp_path)


def test_the_bundled_model_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "BUNDLED", tmp_path / "scenes64")
    with pytest.raises(FileNotFoundError, match="book.py train"):
        StableDiffusion.from_pretrained()
    PIPE.save_pretrained(tmp_path / "scenes64")
    assert StableDiffusion.from_pretrained().unet.config == PIPE.unet.config


# ----------------------------------------------------------------------------- the same pictures as diffusers


@pytest.fixture(scope="module")
def theirs(folder):
    return open_theirs(folder)


@pytest.mark.parametrize("negative", [None, "a green cube"])
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_diffusers_paints_the_same(theirs, negative, guidance):
    latents = PIPE.noise(2, seed=3)
    each = negative and [negative] * 2
    expected = paint_theirs(theirs, latents, guidance_scale=guidance, negative_prompt=each)
    found = paint_ours(PIPE, latents, guidance=guidance, negative=negative)
    assert expected.std() > 0.1  # a picture, not a blank
    assert abs(found - expected).mean() < 1e-4
    other = paint_ours(PIPE, latents, guidance=2.0, negative="a sphere")
    assert abs(other - expected).mean() > 1e-2  # and the comparison would notice


def test_diffusers_sees_the_schedule(theirs):
    assert type(theirs.scheduler).__name__ == "DDIMScheduler" and theirs.scheduler.config.steps_offset == 1
    assert theirs.scheduler.config.timestep_spacing == "trailing" and theirs.safety_checker is None
    assert theirs.unet.dtype == theirs.text_encoder.dtype == torch.float32


CASES = {
    "as SD 1": (False, {"kind": "eps", "grid": "leading", "to_zero": False}, "PNDMScheduler"),
    "as SD 2": (True, {"kind": "v", "grid": "leading", "to_zero": False}, "DDIMScheduler"),
    "cosine, x0": (False, {"kind": "x0", "betas": "squaredcos_cap_v2"}, "DDIMScheduler"),
    "zero SNR": (True, {"kind": "v", "zero_snr": True}, "DDIMScheduler"),
    "own table": (False, {"betas": tuple(torch.linspace(1e-3, 0.02, 600).tolist())}, "DDIMScheduler"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_folder_that_diffusers_saved(name, tmp_path):
    second, schedule, kind = CASES[name]
    make(second, **schedule).save_pretrained(tmp_path / "ours")
    theirs = open_theirs(tmp_path / "ours")
    theirs.scheduler = getattr(diffusers, kind).from_config(theirs.scheduler.config)
    theirs.save_pretrained(tmp_path / "theirs")
    pipe = StableDiffusion.from_pretrained(tmp_path / "theirs")
    assert pipe.schedule == replace(Schedule(**schedule), betas=pipe.schedule.betas)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    latents = pipe.noise(2, seed=1)
    found, expected = paint_ours(pipe, latents), paint_theirs(theirs, latents)
    assert expected.std() > 0.1 and abs(found - expected).mean() < 1e-4


# ----------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_every_scheduler_tells_its_process(name, betas):
    theirs = getattr(diffusers, name + "Scheduler")(beta_schedule=betas)
    fields = json.loads(theirs.to_json_string())
    assert fields.keys() - {"_class_name", "_diffusers_version"} - SOLVER - SCHEDULER_ONLY.keys()
    found = schedule_from_diffusers(fields)
    torch.testing.assert_close(found.process().betas.float(), theirs.betas.float(), rtol=1e-4, atol=1e-7)
    default = schedule_from_diffusers({"_class_name": fields["_class_name"], "beta_schedule": betas})
    assert default == found
    assert found.kind == "eps" and found.to_zero == (name != "PNDM")
    assert found.grid == fields.get("timestep_spacing", "linspace")


def test_zero_terminal_snr_is_theirs():
    fields = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
    theirs = diffusers.DDIMScheduler(**fields)
    found = schedule_from_diffusers(fields | {"_class_name": "DDIMScheduler"})
    alpha = found.process().alpha(torch.arange(1000)) ** 2
    torch.testing.assert_close(alpha.float(), theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    assert torch.equal(found.process().betas, zero_terminal_snr(replace(found, zero_snr=False).process().betas))


@pytest.mark.parametrize("kind", KINDS.values())
@pytest.mark.parametrize("grid", pipeline.GRIDS)
@pytest.mark.parametrize("to_zero", [True, False])
def test_schedules_survive_the_file(kind, grid, to_zero):
    for betas in ("scaled_linear", (0.1, 0.2, 0.3)):
        schedule = Schedule(betas, kind=kind, grid=grid, to_zero=to_zero)
        fields = schedule_to_diffusers(schedule)
        assert schedule_from_diffusers(json.loads(json.dumps(fields))) == schedule
        if grid != "karras" or kind != "x0":
            getattr(diffusers, fields["_class_name"]).from_config(fields)


SD15 = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"_class_name": "LCMScheduler"}, "scheduler 'LCMScheduler' is not supported, only DDIM, DDPM"),
        ({"_class_name": None}, "scheduler None is not supported"),
        ({"prediction_type": "flow"}, "prediction_type 'flow' is not one of"),
        ({"beta_schedule": "sigmoid"}, "Schedule.betas 'sigmoid' is not one of linear"),
        ({"timestep_spacing": "log"}, "grid 'log' is not one of trailing"),
        ({"thresholding": True}, "thresholding = True is not supported, only False"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type = 'one'"),
        ({"rescale_betas_zero_snr": True}, "zero_snr needs kind v or x0"),
        ({"beta_strat": 1}, r"unknown fields \['beta_strat'\]"),
    ],
)
def test_schedules_that_are_refused(change, complaint):
    published = schedule_from_diffusers(SD15)
    assert published == Schedule(kind="eps", grid="leading", to_zero=False)
    with pytest.raises(ValueError, match=complaint):
        schedule_from_diffusers(SD15 | change)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("to_zero", [True, False])
def test_noise_levels_are_those_of_diffusers(spacing, to_zero):
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    theirs.set_timesteps(20)
    process = Schedule(betas="linear", start=0.0001, end=0.02).process()
    level = lambda t: ((1 - theirs.alphas_cumprod[t]) / theirs.alphas_cumprod[t]).sqrt().double()  # noqa: E731
    found = noise_levels(process, 20, spacing, to_zero)
    torch.testing.assert_close(found[:20], level(theirs.timesteps), rtol=1e-4, atol=0)
    assert len(found) == 21
    zero = to_zero or spacing == "linspace"  # which has been at the first entry already
    torch.testing.assert_close(found[20], torch.zeros(()).double() if zero else level(0), rtol=1e-3, atol=0)
    for steps in (1, 2, 3, 7, 50, 333, 999):
        levels = noise_levels(process, steps, spacing, to_zero)
        assert (levels.diff() < 0).all() and len(levels) == steps + 1


# ----------------------------------------------------------------------------- painting


def test_steps_are_the_call():
    steps = list(PIPE.steps(PROMPTS, "a cube", steps=5, seed=4))
    assert [s.index for s in steps] == [0, 1, 2, 3, 4] and all(isinstance(s, Step) for s in steps)
    images = PIPE(PROMPTS, "a cube", steps=5, seed=4)
    assert pixels(images).tolist() == pixels(to_images(PIPE.finish(steps[-1]))).tolist()
    assert [image.size for image in images] == [(16, 16)] * 2 and images[0].mode == "RGB"
    assert steps[-1].sigma == 0 and not steps[-1].x.requires_grad and torch.is_grad_enabled()
    assert pixels(to_images(PIPE.decode(steps[-1].x0))).tolist() == pixels(images).tolist()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_picture_does_not_depend_on_its_batch(sampler):
    options = {"steps": 4, "sampler": sampler}
    batch = last_pictures(PIPE, PROMPTS, count=2, seed=7, **options)
    for k in range(4):
        alone = last_pictures(PIPE, PROMPTS[k // 2], seed=7 + k, **options)
        assert abs(alone - batch[k : k + 1]).max() < 1e-4
    chosen = last_pictures(PIPE, PROMPTS[0], count=2, seed=[8, 7], **options)
    assert abs(chosen - batch[[1, 0]]).max() < 1e-4
    given = last_pictures(PIPE, PROMPTS[0], count=2, seed=7, latents=PIPE.noise(2, 7), **options)
    assert torch.equal(given, last_pictures(PIPE, PROMPTS[0], count=2, seed=7, **options))
    assert abs(batch[0] - batch[1]).mean() > 1e-2


def test_fresh_noise_is_not_the_noise_one_began_with():
    seen = []

    def spy(denoise, x, sigmas, *, noise, generator=None):
        seen.extend([x / (1 + sigmas[0] ** 2) ** 0.5, noise(x, 1.0, 0.5)])
        yield Step(0, 0.0, x, x, 0)

    SAMPLERS["spy"] = spy
    try:
        for latents in (None, PIPE.noise(2, seed=5)):
            last(PIPE.steps("a cube", count=2, seed=5, sampler="spy", latents=latents))
    finally:
        del SAMPLERS["spy"]
    torch.testing.assert_close(seen[0], PIPE.noise(2, seed=5), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen[2], seen[0])
    assert torch.equal(seen[1], seen[3]) and abs(seen[1] - seen[0]).mean() > 0.5


def count_calls(monkeypatch) -> dict[str, int]:
    calls = dict.fromkeys(("predict", "embed_context", "embed_time"), 0)

    def counted(name, method):
        def call(*args):
            calls[name] += 1
            return method(*args)

        return call

    for name in calls:
        monkeypatch.setattr(PIPE.unet, name, counted(name, getattr(PIPE.unet, name)))
    return calls


def test_one_network_call_per_step_and_one_reading_of_the_text(monkeypatch):
    calls = count_calls(monkeypatch)
    PIPE(PROMPTS, steps=5)
    assert calls == {"predict": 5, "embed_context": 1, "embed_time": 1}
    calls.update(dict.fromkeys(calls, 0))
    PIPE(PROMPTS, steps=5, interval=(0.5, 5.0))  # guided in the middle: two batches of two sizes
    assert calls == {"predict": 5, "embed_context": 2, "embed_time": 1}


def test_timesteps_that_were_not_expected_are_embedded_when_they_come(monkeypatch):
    calls = count_calls(monkeypatch)
    PIPE(PROMPTS, steps=3, sampler="dpm2")  # asks between the levels, too
    assert calls["embed_time"] == 1 + 2 and calls["predict"] == 5


def test_what_is_remembered_changes_nothing():
    denoise = PIPE.denoiser(PROMPTS, guidance=3.0)
    x, generator = 5 * PIPE.noise(2), torch.Generator().manual_seed(1)
    texts = torch.cat([PIPE.encode_prompt(PROMPTS), PIPE.encode_prompt(["", ""])])
    for sigma in (torch.tensor(5.0), torch.tensor([5.0, 0.3]), torch.tensor(5.0)):
        t = PIPE.process.time(sigma)
        scaled = PIPE.process.from_ve(x, t)
        with torch.no_grad():
            v = PIPE.unet(scaled.repeat(2, 1, 1, 1), t.float().repeat(2) if t.ndim else t.float(), texts)
        alpha, s = (f(t).float().reshape(-1, 1, 1, 1) for f in (PIPE.process.alpha, PIPE.process.sigma))
        yes, no = (alpha * scaled - s * part for part in v.chunk(2))
        torch.testing.assert_close(denoise(x, sigma), no + 3 * (yes - no), rtol=1e-4, atol=1e-5)
        x = x + torch.randn(x.shape, generator=generator)


def test_word_maps_are_shares_of_looking_and_change_no_picture():
    pipe = make()
    step, maps = pipeline.word_maps(pipe, "a red cube", steps=2, seed=3)
    side = pipe.unet.config.sample_size
    assert maps.shape == (pipe.tokenizer.max_length, side, side) and (maps >= 0).all()
    assert torch.allclose(maps.sum(0), torch.ones(side, side), atol=1e-5)
    assert torch.equal(step.x, last(pipe.steps("a red cube", steps=2, seed=3)).x)
    assert not any(block._forward_hooks for block in pipe.unet.modules())


def test_inference_mode_stays_inside_the_call(folder):
    pipe = StableDiffusion.from_pretrained(folder)
    pipe("a red cube", steps=1)
    x = last(pipe.steps("a red cube", steps=1)).x
    assert not x.is_inference() and not torch.is_inference_mode_enabled()
    assert pipe.unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last)


def test_guidance_and_negative_prompts():
    plain = PIPE("a cube", steps=3, guidance=1.0, negative="a sphere")
    assert pixels(plain).tolist() == pixels(PIPE("a cube", steps=3, guidance=1.0)).tolist()
    none = last_pictures(PIPE, "a cube", steps=3, guidance=0.0)
    torch.testing.assert_close(none, last_pictures(PIPE, "", steps=3, guidance=1.0), rtol=0, atol=1e-5)
    each = last_pictures(PIPE, PROMPTS, ["a cube", ""], steps=3)
    torch.testing.assert_close(each[1:], last_pictures(PIPE, PROMPTS[1], steps=3, seed=1), rtol=0, atol=1e-4)
    contexts = PIPE.encode_prompt(PROMPTS), PIPE.encode_prompt(["a cube", ""])
    assert torch.equal(last_pictures(PIPE, *contexts, steps=3), each)
    ramp = last_pictures(PIPE, "a cube", steps=3, guidance=lambda sigma: 4.0)
    assert torch.equal(ramp, last_pictures(PIPE, "a cube", steps=3))


def test_sizes_and_dtypes():
    wide = PIPE("a cube", steps=2, height=10, width=24)
    assert wide[0].size == (24, 10)
    latents = torch.zeros(1, 4, 3, 5, dtype=torch.float64)
    assert PIPE("a cube", steps=2, latents=latents)[0].size == (10, 6)
    half = make().to(dtype=torch.bfloat16)
    step = last(half.steps("a cube", steps=2))
    assert step.x.dtype == torch.float32 and half.finish(step).dtype == torch.bfloat16
    double = make().to(dtype=torch.float64)
    assert last(double.steps("a cube", steps=2)).x.dtype == torch.float64
    a, b = pixels(double("a cube", steps=10)), pixels(PIPE("a cube", steps=10))
    assert abs(a - b).max() <= 1.01 / 255


def test_other_grids_paint_and_the_end_is_honoured():
    for grid in pipeline.GRIDS:
        step = last(PIPE.steps("a cube", steps=3, grid=grid))
        assert step.sigma == 0 and step.x.isfinite().all()
    pipe = make(grid="leading", to_zero=False)
    step = last(pipe.steps("a cube", steps=3))
    assert step.sigma == pytest.approx(pipe.process.noise_level(0).item())
    scaled = step.x * pipe.process.alpha(0).float()
    torch.testing.assert_close(pipe.finish(step), pipe.decode(scaled))


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"sampler": "dddim"}, "sampler 'dddim' is not one of ddim, ddpm, deis, .*, unipc"),
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"steps": 2.5}, "steps must be a positive integer, got 2.5"),
        ({"steps": 1001}, "between 1 and 1000"),
        ({"steps": 1000, "grid": "leading"}, "steps = 1000 are too many"),
        ({"grid": "lagging"}, "grid 'lagging' is not one of trailing"),
        ({"count": 0}, "nothing to paint: 1 prompts, count = 0"),
        ({"height": 9}, "height must be a positive multiple of 2, got 9"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"latents should have shape \[1 4 \* \*\], got \[2, 4, 8, 8\]"),
        ({"latents": torch.zeros(1, 4, 8, 8), "width": 20}, r"latents should have shape \[1 4 8 10\]"),
        ({"seed": [1, 2]}, "2 seeds for 1 pictures"),
        ({"negative": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"rescale": 2.0}, "rescale = 2.0"),
    ],
)
def test_calls_that_are_refused_at_once(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        PIPE.steps("a cube", **options)
    with pytest.raises(ValueError, match=complaint):
        PIPE("a cube", **options)


def test_more_that_is_refused():
    with pytest.raises(ValueError, match="nothing to paint: 0 prompts"):
        PIPE([])
    with pytest.raises(TypeError, match="etaa"):
        PIPE("a cube", etaa=1.0)
    with pytest.raises(ValueError, match="in_channels and the VAE's latents are 4 and 3"):
        StableDiffusion(
            PIPE.unet, VAE(VAEConfig(latent_channels=3, channels=(8, 16), groups=4)), PIPE.text_encoder, PIPE.tokenizer
        )
    long = replace(PIPE.tokenizer, max_length=99)
    with pytest.raises(ValueError, match="99 places for a text encoder of .* and 16"):
        StableDiffusion(PIPE.unet, PIPE.vae, PIPE.text_encoder, long)
    with pytest.raises(ValueError, match="grid 'x'"):
        Schedule(grid="x")
    with pytest.raises(ValueError, match="kind 'flow'"):
        Schedule(kind="flow")


def test_images():
    pictures = torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(4, 1, 1, 1).expand(4, 3, 2, 5)
    images = to_images(pictures)
    assert [image.getpixel((4, 1)) for image in images] == [(v,) * 3 for v in (0, 128, 255, 255)]
    sheet = image_grid(images, columns=3, gap=1)
    assert sheet.size == (17, 5) and sheet.getpixel((6, 0)) == (128,) * 3 and sheet.getpixel((5, 0)) == (255,) * 3
    assert image_grid(images[:2]).size == (12, 2)
    for wrong in ([], [images[0], Image.new("RGB", (3, 3))]):
        with pytest.raises(ValueError, match="a grid needs images of one size"):
            image_grid(wrong)
    with pytest.raises(ValueError, match=r"pictures should have shape \[\* 3 \* \*\]"):
        to_images(pictures[0])
