"""`sd-scratch` as its users meet it: what it paints and writes, and one clear line for everything that can go wrong."""

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from stable_diffusion_scratch import captioner, cli, leaderboard, pipeline, recipe
from stable_diffusion_scratch.pipeline import StableDiffusion
from stable_diffusion_scratch.scenes import sample_scenes
from stable_diffusion_scratch.vae import VAE, VAEConfig

PROMPT = "a large red metal sphere left of a small blue rubber cube"
COMMAND = [sys.executable, "-m", "stable_diffusion_scratch.cli"]
TINY = {
    "data": {"scenes": recipe.CHUNK, "seed": 0},
    "vae": {"channels": [8, 8, 8, 8], "latent_channels": 4, "layers": 1, "groups": 4, "sample_size": 64},
    "vae_training": {"steps": 6, "batch": 2, "rate": 1e-3, "beta": 1e-3, "decay": 0.9, "seed": 1},
    "text": {"max_length": 32, "width": 16, "layers": 1, "heads": 2, "mlp_width": 32},
    "unet": {"channels": [8, 16], "layers": 1, "depth": [1, 1], "heads": [2, 2], "groups": 4},
    "unet_training": {
        **{"steps": 6, "batch": 2, "rate": 1e-3, "decay": 0.9, "seed": 2},
        **{"empty": 0.1, "forget": 0.25},
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    "A tiny random model for 64 x 64 pictures, as a diffusers folder."
    tokenizer = recipe.caption_tokenizer(sample_scenes(50, torch.Generator().manual_seed(0)), 32)
    networks = recipe.drawn(0, lambda: recipe.text_to_image_networks(TINY, tokenizer))
    vae = recipe.drawn(1, lambda: VAE(VAEConfig(**TINY["vae"])))
    folder = tmp_path_factory.mktemp("model") / "tiny"
    StableDiffusion(networks["unet"], vae, networks["text_encoder"], tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bundled(model, monkeypatch):
    "The tiny model in the place of the one that comes with the book."
    monkeypatch.setattr(pipeline, "BUNDLED", model)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(words, capsys, code: int = 2) -> str:
    "Run it in this process; the one line that it says."
    assert cli.main([str(word) for word in words]) == code
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("sd-scratch: ") and said.err.count("\n") == 1
    return said.err


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "train", "evaluate", "bench"])
def test_help_has_every_option_and_examples(command):
    found = CliRunner().invoke(cli.app, [command, "--help"])
    assert found.exit_code == 0 and f"sd-scratch {command}" in found.stdout.split("Examples:")[1]
    function = getattr(cli, command)
    for name in function.__wrapped__.__annotations__:
        assert name in ("prompt", "what") or f"--{name.removesuffix('_file').replace('_', '-')}" in found.stdout


def test_help_and_simple_mistakes_do_not_wait_for_torch(tmp_path):
    mistakes = [
        ["--help"], [], ["generate", "--help"], ["generate"], ["paint"], ["generate", " "],
        ["generate", "x", "--steps", "-1"], ["generate", "x", "-o", "no/such/folder/x.png"],
        ["generate", "x", "--model", "nowhere"], ["evaluate", "--steps", "0"], ["train", "--config", "nothing"],
        ["train", "--data", "nowhere"], ["evaluate", "--judge", "me"],
        ["bench"], ["bench", "solvers"], ["bench", "samplers", "--calls", "0"],
    ]  # fmt: skip
    program = (
        "import sys\nfrom stable_diffusion_scratch import cli\n"
        f"codes = [cli.main(words) for words in {mistakes}]\nassert codes == [0, 0, 0] + 13 * [2], codes\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("\n") == 13, done.stderr


# --- generate: what cannot be done -----------------------------------------------------------------------------------


def mistakes(model: Path) -> list[tuple[list, str]]:
    "Words after `generate`, and what the line must say."
    tiny = ["--model", model]
    return [
        (["", *tiny], "the prompt is empty"),
        (["  \n", *tiny], "the prompt is empty"),
        ([], "Missing argument 'PROMPT'"),
        (["x", *tiny, "--steps", "-3"], "--steps -3: must be 1 or more"),
        (["x", *tiny, "--steps", "0"], "--steps 0: must be 1 or more"),
        (["x", *tiny, "--steps", "1001"], "1000"),
        (["x", *tiny, "--steps", "many"], "--steps"),
        (["x", *tiny, "--count", "0"], "--count 0: must be 1 or more"),
        (["x", *tiny, "--guidance", "-1"], "--guidance -1.0: must be 0 or more"),
        (["x", *tiny, "--guidance", "nan"], "--guidance nan"),
        (["x", *tiny, "--seed", "-1"], "--seed -1: must be 0 or more"),
        (["x", *tiny, "--seed", str(2**70)], "less than 2**62"),
        (["x", *tiny, "--colour"], "No such option"),
        (["x", *tiny, "--sampler", "dimm"], "--sampler 'dimm' is unknown; did you mean ddim? There are: ddim, ddpm"),
        (["x", *tiny, "--sampler", "?"], "is unknown; There are: ddim, ddpm"),
        (["x", *tiny, "--device", "gpu"], "--device gpu: cannot be used here; there are: cpu"),
        (["x", *tiny, "--device", "cuda:99"], "--device cuda:99: cannot be used here; there are: cpu"),
        (["x", *tiny, "--device", "meta"], "--device meta: cannot be used here"),
        (["x", *tiny, "-o", "no/folder/out.png"], "there is no folder no/folder; make it first"),
        (["x", *tiny, "-o", "out.txt"], "the name must end in .png or .jpg or .jpeg or .webp"),
        (["x", *tiny, "-o", "out"], "the name must end in .png"),
        (["x", *tiny, "-o", "folder.png"], "is no file that may be replaced"),
        (["x", *tiny, "-o", f"{'long' * 63}.png"], "cannot be written (File name too long)"),
        (["x", *tiny, "-o", "/proc/out.png"], "/proc/out.png: cannot be written"),
        (["x", *tiny, "-o", "folder.png", "--grid", "--count", "2"], "is no file that may be replaced"),
        (["x", *tiny, "-o", "taken.png", "--count", "2"], "taken-2.png: is there, and is no file that may be replaced"),
        (["x", "--model", "nowhere"], "--model nowhere: not a diffusers folder (it has no model_index.json)"),
        (["x", "--model", 300 * "long"], "File name too long"),
        (["x", "--model", "broken"], "unet/config.json is missing"),
        (["x", "--model", "cut"], "--model: cut/unet: Error while deserializing header"),
        (["a purpel cube"], "unknown word 'purpel'; the nearest known words: purple"),
        (["a red cube", "--negative", "blurry"], "--negative: unknown word 'blurry'; the nearest known words"),
        (["...!"], "the prompt: the caption is empty"),
    ]


@pytest.fixture
def wreckage(model, here) -> Path:
    "A folder with models that cannot be read, and names that are taken."
    subprocess.run(["cp", "-r", model, here / "cut"], check=True)
    weights = here / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (here / "broken").mkdir()
    (here / "broken" / "model_index.json").write_bytes((model / "model_index.json").read_bytes())
    (here / "folder.png").mkdir()
    (here / "taken-2.png").mkdir()
    return here


def test_mistakes_are_one_line_and_nothing_is_painted(model, wreckage, bundled, monkeypatch, capsys):
    monkeypatch.setattr(StableDiffusion, "finish", lambda *_: pytest.fail("painted"))
    before = names(wreckage)
    for words, line in mistakes(model):
        if not (line.startswith("/proc") and not Path("/proc").exists()):
            assert line in refused(["generate", *words], capsys), words
    assert names(wreckage) == before


@pytest.mark.daily
@pytest.mark.parametrize("words", [["a purpel cube"], ["x", "--sampler", "dimm"], ["", "-o", "x.png"], ["--foo"]])
def test_mistakes_are_one_line_in_a_process_of_their_own(words, tmp_path):
    done = subprocess.run([*COMMAND, "generate", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and names(tmp_path) == []
    assert done.stderr.startswith("sd-scratch: ") and done.stderr.count("\n") == 1


def test_without_a_bundled_model_the_remedy_is_named(here, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "BUNDLED", here / "scenes64")
    assert "train" in refused(["generate", PROMPT], capsys)


def test_a_fault_of_the_program_keeps_its_traceback(model, here, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "finish", lambda *_: [][0])
    with pytest.raises(IndexError):
        cli.main(["generate", "x", "--model", str(model)])


# --- generate: what is done ------------------------------------------------------------------------------------------


def test_a_picture_is_painted_and_its_path_printed(model, here, capsys):
    assert cli.main(["generate", "anything at all", "--model", str(model), "--steps", "2"]) == 0
    assert capsys.readouterr() == ("out.png\n", "") and names(here) == ["out.png"]
    with Image.open("out.png") as picture:
        assert picture.format == "PNG" and picture.size == (64, 64) and picture.mode == "RGB"


def test_options_reach_the_pipeline(model, here, capsys):
    asked = dict(negative="a blue cube", steps=3, guidance=2.5, sampler="ddpm", seed=7)
    words = [word for key, value in asked.items() for word in (f"--{key}", str(value))]
    assert cli.main(["generate", PROMPT, "--model", str(model), *words, "-o", "a.png"]) == 0
    expected = StableDiffusion.from_pretrained(model)(PROMPT, **asked)[0]
    assert Image.open("a.png").tobytes() == expected.tobytes()


@pytest.mark.parametrize("suffix, kind", [("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("PNG", "PNG")])
def test_the_name_decides_the_format(suffix, kind, model, here):
    assert cli.main(["generate", "x", "--model", str(model), "--steps", "1", "-o", f"out.{suffix}"]) == 0
    assert Image.open(f"out.{suffix}").format == kind


def test_several_pictures_are_those_of_the_following_seeds(model, here, capsys):
    common = ["generate", PROMPT, "--model", str(model), "--steps", "2"]
    assert cli.main([*common, "--seed", "5", "--count", "3"]) == 0
    assert capsys.readouterr().out.split() == ["out-1.png", "out-2.png", "out-3.png"] == names(here)
    assert cli.main([*common, "--seed", "7", "-o", "seventh.png"]) == 0
    alone, third = (Image.open(name).tobytes() for name in ("seventh.png", "out-3.png"))
    assert max(abs(a - b) for a, b in zip(alone, third, strict=True)) <= 1  # batches round differently
    assert Image.open("out-1.png").tobytes() != third


@pytest.mark.parametrize("count, columns, rows", [(1, 1, 1), (5, 3, 2), (4, 2, 2)])
def test_a_sheet(count, columns, rows, model, here, capsys):
    words = ["--model", model, "--steps", 1, "--count", count, "--grid", "-o", "sheet.png"]
    assert cli.main(["generate", "x", *map(str, words)]) == 0
    assert capsys.readouterr().out == "sheet.png\n" and names(here) == ["sheet.png"]
    assert Image.open("sheet.png").size == (66 * columns - 2, 66 * rows - 2)


def test_known_words_outside_the_grammar_are_painted_with_a_warning(bundled, here, capsys):
    assert cli.main(["generate", "cube red on sphere", "--steps", "1"]) == 0
    said = capsys.readouterr()
    assert said.out == "out.png\n" and said.err.count("\n") == 1
    assert "warning: cannot read 'cube red on sphere'" in said.err and "Painted all the same" in said.err


def test_a_prompt_in_the_grammar_needs_no_warning(bundled, here, capsys):
    assert cli.main(["generate", PROMPT, "--negative", "blue", "--steps", "1"]) == 0
    assert capsys.readouterr() == ("out.png\n", "")


def test_a_prompt_too_long_for_the_model_is_cut_with_a_warning(model, here, capsys):
    assert cli.main(["generate", 40 * "cube ", "--model", str(model), "--steps", "1"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("sd-scratch: warning: a text of") and said.err.count("\n") == 1


# --- disks, memory, Ctrl-C -------------------------------------------------------------------------------------------


def fails_half_way(error):
    def save(self, path, **options):
        Path(path).write_bytes(b"half")
        raise error

    return save


def test_a_full_disk_is_a_line_and_leaves_the_old_picture(model, here, monkeypatch, capsys):
    (here / "out.png").write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", fails_half_way(OSError(errno.ENOSPC, "No space left on device")))
    line = refused(["generate", "x", "--model", model, "--steps", "1"], capsys, code=1)
    assert "no space left on the disk; make room" in line
    assert names(here) == ["out.png"] and (here / "out.png").read_bytes() == b"old"


def test_no_memory_is_a_line(model, here, monkeypatch, capsys):
    def decode(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(StableDiffusion, "decode", decode)
    assert "out of memory; ask for less" in refused(["generate", "x", "--model", model], capsys, code=1)


def test_an_interrupted_save_leaves_nothing(model, here, monkeypatch, capsys):
    monkeypatch.setattr(Image.Image, "save", fails_half_way(KeyboardInterrupt()))
    line = refused(["generate", "x", "--model", model, "--steps", "1"], capsys, code=130)
    assert line == "sd-scratch: interrupted; no file is left half written\n" and names(here) == []


@pytest.mark.daily
def test_ctrl_c_while_it_paints_on_a_terminal(model, tmp_path):
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))
    words = ["generate", PROMPT, "--model", str(model), "--steps", "1000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": end}
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  (ignored where pytest itself ignores it)
    child = subprocess.Popen([*COMMAND, *words], cwd=tmp_path, preexec_fn=heed, **pipes)
    os.close(end)
    shown, deadline = b"", time.monotonic() + 120
    while not re.search(rb"\s[1-9]\d*/1000", shown):  # the bar moves
        assert time.monotonic() < deadline, shown
        shown += os.read(terminal, 1000)
    child.send_signal(signal.SIGINT)
    try:
        while part := os.read(terminal, 1000):
            shown += part
    except OSError:  # the other end is closed
        pass
    assert child.wait(20) == 130 and child.stdout.read() == b"" and names(tmp_path) == []
    assert shown.endswith(b"sd-scratch: interrupted; no file is left half written\r\n") and b"Traceback" not in shown


# --- train -----------------------------------------------------------------------------------------------------------


def toml(config: dict) -> str:
    tables = (
        "\n".join([f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())])
        for name, table in config.items()
    )
    return "\n\n".join(tables) + "\n"


@pytest.fixture
def tiny(here) -> Path:
    "A configuration that takes a moment, with scenes that are only noise."
    (here / "tiny.toml").write_text(toml(TINY))
    generator = torch.Generator().manual_seed(0)
    scenes = sample_scenes(recipe.CHUNK, generator)
    pictures = torch.randint(256, (recipe.CHUNK, 3, 64, 64), generator=generator, dtype=torch.uint8)
    folder = here / "runs" / "tiny" / "scenes"
    folder.mkdir(parents=True)
    save_file({"pictures": pictures} | vars(scenes), folder / "train-seed0-0000.safetensors")
    return here


def test_train_makes_a_model_that_paints(tiny, capsys):
    assert cli.main(["train", "--config", "tiny.toml"]) == 0
    said = capsys.readouterr()
    assert said.out == "runs/tiny/model\n" and "sd-scratch: unet: step 6 of 6, loss" in said.err
    assert cli.main(["generate", "x", "--model", "runs/tiny/model", "--steps", "1"]) == 0
    assert names(tiny) == ["out.png", "runs", "tiny.toml"]


def test_ctrl_c_in_training_saves_and_the_same_command_goes_on(tiny, monkeypatch, capsys):
    make = recipe.make

    def interrupted(config, folder, device):
        for now in make(config, folder, device):
            if (now.stage, now.step) == ("unet", 3):
                os.kill(os.getpid(), signal.SIGINT)
            yield now

    monkeypatch.setattr(recipe, "make", interrupted)
    assert cli.main(["train", "--config", "tiny.toml", "--device", "cpu"]) == 130
    said = capsys.readouterr()
    assert "stopped after step 3 of 6 (unet) and saved; the same command goes on" in said.err
    assert said.out == "" and said.err.splitlines()[-1].startswith("sd-scratch: stopped")
    monkeypatch.setattr(recipe, "make", make)
    assert cli.main(["train", "--config", "tiny.toml", "--device", "cpu"]) == 0
    assert "unet: step 6 of 6" in capsys.readouterr().err
    assert cli.main(["train", "--config", "tiny.toml", "--device", "cpu"]) == 0  # all is done
    assert capsys.readouterr() == ("runs/tiny/model\n", "")


def test_training_mistakes_are_one_line(tiny, capsys):
    (tiny / "bad.toml").write_text("[data\n")
    (tiny / "file").touch()
    assert "--config 'scenes' is unknown; did you mean scenes64? There are: digits, scenes64" in refused(
        ["train", "--config", "scenes"], capsys
    )
    assert "mine.toml" in refused(["train", "--config", "mine.toml"], capsys)
    assert "bad.toml" in refused(["train", "--config", "bad.toml"], capsys)
    assert "--out file/runs: cannot be written" in refused(["train", "--out", "file/runs"], capsys)
    words = ["train", "--config", "tiny.toml"]
    assert "--device gpu" in refused([*words, "--device", "gpu"], capsys)
    assert cli.main(words) == 0
    capsys.readouterr()
    (tiny / "tiny.toml").write_text(toml(TINY).replace("seed = 2", "seed = 3"))
    assert "was begun with another configuration" in refused(words, capsys)


@pytest.fixture
def photos(tiny) -> Path:
    "Three pictures with captions, one of them far too long, and a line whose picture is missing."
    folder = tiny / "photos"
    folder.mkdir()
    rows = [("0.png", "my grey cat"), ("1.png", "my white cat"), ("2.png", 50 * "very " + "old"), ("3.png", "gone")]
    for k, (name, _) in enumerate(rows[:3]):
        Image.new("RGB", (80, 70), (80 * k, 90, 20)).save(folder / name)
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return tiny


def test_train_on_pictures_of_ones_own(photos, capsys):
    words = ["train", "--config", "tiny.toml", "--data", "photos"]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert said.out == "runs/photos/model\n" and "vae: step 6 of 6" in said.err
    assert "warning: skipped 1 of 4 pictures: 3.png" in said.err
    assert said.err.count("warning: 1 of 3 captions are cut to 32 tokens; raise max_length in [text]") == 1
    assert cli.main(["generate", "my cat", "--model", "runs/photos/model", "--steps", "1"]) == 0
    assert sorted(path.name for path in Path("runs/photos/model").glob("*.csv")) == ["unet.csv", "vae.csv"]
    capsys.readouterr()
    index = photos / "photos" / "metadata.jsonl"
    index.write_text(index.read_text().replace("grey", "black").replace('{"file_name": "3.png", "text": "gone"}\n', ""))
    assert cli.main(words) == 2 and "or other pictures; choose another folder" in capsys.readouterr().err


def test_train_with_the_books_autoencoder(photos, bundled, capsys):
    assert cli.main(["train", "--config", "tiny.toml", "--data", "photos", "--keep-vae"]) == 0
    said = capsys.readouterr().err
    assert "vae: step" not in said and "unet: step 6 of 6" in said and re.search(r"back with -?\d+\.\d dB", said)
    kept, own = (StableDiffusion.from_pretrained(path).vae for path in (pipeline.BUNDLED, "runs/photos/model"))
    assert torch.allclose(kept.decoder.conv_in.weight, own.decoder.conv_in.weight, atol=1e-3)
    assert kept.config.scale != own.config.scale  # measured on these pictures


def test_mistakes_about_ones_own_pictures_are_one_line(photos, bundled, capsys):
    words = ["train", "--config", "tiny.toml", "--data"]
    assert "--data nowhere: is no folder" in refused([*words, "nowhere"], capsys)
    assert "--data runs: has no metadata.jsonl; write a line for each picture" in refused([*words, "runs"], capsys)
    index = photos / "photos" / "metadata.jsonl"
    index.write_text("{\n")
    assert "metadata.jsonl, line 1: need an object with file_name and text" in refused([*words, "photos"], capsys)
    index.write_text("")
    assert "--data: there are no pictures" in refused([*words, "photos"], capsys)
    for old, new, line in (
        ("sample_size = 64", "sample_size = 32", "--keep-vae: the book's autoencoder is for pictures of 64 pixels"),
        ("scenes = 500\nseed = 0", 'set = "digit"', "set 'digit' is unknown; did you mean digits? There are: digits"),
    ):
        (photos / "tiny.toml").write_text(toml(TINY).replace(old, new))
        assert line in refused(["train", "--config", "tiny.toml", "--keep-vae"], capsys)


@pytest.mark.daily
def test_ten_captions_from_the_digits(here, capsys):
    config = recipe.read_config(Path(recipe.__file__).parent / "configs" / "digits.toml")
    config["vae_training"] |= {"steps": 3, "batch": 4}
    config["unet_training"] |= {"steps": 3, "batch": 4}
    (here / "tiny.toml").write_text(toml(config).replace("'digits'", '"digits"').replace("= digits", '= "digits"'))
    assert cli.main(["train", "--config", "tiny.toml"]) == 0
    words = ["evaluate", "--model", "runs/tiny/model", "--judge", "digits", "--steps", "1"]
    assert cli.main([*words, "--prompts", "12", "--json", "found.json"]) == 0
    said, found = capsys.readouterr().out, json.loads((here / "found.json").read_text())
    assert found["a digit"]["all"]["of"] == 12 and found["a digit"]["one"]["of"] == 2
    assert found["judge"]["all"]["share"] > 0.95 and found["judge"]["all"]["of"] == 297
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["right,", "all", *cli.DIGITS]
    line = refused(["evaluate", "--model", "runs/tiny/model"], capsys)
    assert "the judge of scenes reads pictures of 64 x 64 only" in line
    assert "name a --model" in refused(["evaluate", "--judge", "digits"], capsys)


# --- evaluate --------------------------------------------------------------------------------------------------------


@pytest.mark.daily
def test_evaluate_prints_a_table_and_writes_its_numbers(model, here, capsys):
    words = ["--prompts", "4", "--steps", "1", "--json", "found.json", "--model", str(model)]
    assert cli.main(["evaluate", *words]) == 0
    said = capsys.readouterr()
    lines, found = said.out.splitlines(), json.loads((here / "found.json").read_text())
    assert said.err == "" and names(here) == ["found.json"]
    assert [line.split("  ")[0] for line in lines] == [
        "right, in %", "seen combinations", "all", "all, corrected", "count", "size", "color", "material", "shape",
        "relation", "accepts wrong", "", "against real pictures", "frechet distance", "frechet extrapolated",
        "kernel distance", "precision, %", "recall, %", "diversity in a prompt", "PSNR of the VAE, dB",
    ]  # fmt: skip
    assert found["prompts"] == 4 and found["judge"]["all"]["of"] == 2000
    assert all(found[kind]["all"]["of"] == 4 for kind in ("one object", "two objects", "held out"))
    assert found["two objects"]["relation"]["of"] == 4 and found["held out"]["relation"]["of"] == 2
    for side in ("painted", "real again"):
        for row in (*found["quality"][side].values(), found["diversity"][side], found["vae"]["psnr"]):
            assert row["low"] <= row.get("share", row.get("value")) <= row["high"]


def test_an_interrupted_evaluation_writes_nothing(model, here, monkeypatch, capsys):
    def interrupted(*words, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "paint_all", interrupted)
    assert cli.main(["evaluate", "--json", "found.json", "--model", str(model)]) == 130
    said = capsys.readouterr()
    assert said.out == "" and "interrupted" in said.err and names(here) == []


@pytest.mark.parametrize(
    "words, line",
    [
        (["--prompts", "1"], "--prompts 1: must be 2 or more"),
        (["--steps", "0"], "--steps 0"),
        (["--json", "found.txt"], "must end in .json"),
        (["--json", "no/found.json"], "there is no folder no"),
        (["--model", "nowhere"], "not a diffusers folder"),
        (["--sampler", "euler_ancestrall"], "did you mean euler_ancestral?"),
    ],
)
def test_evaluation_mistakes_are_one_line(words, line, here, capsys):
    assert line in refused(["evaluate", *words], capsys)


def test_without_a_judge_that_is_said(here, monkeypatch, model, capsys):
    monkeypatch.setattr(captioner, "JUDGE", here / "judge")
    assert "no judge in" in refused(["evaluate", "--model", model], capsys)


# --- bench -----------------------------------------------------------------------------------------------------------


def test_bench_ranks_samplers_and_writes_its_lines(here, capsys):
    words = ["--problem", "smooth", "--quick", "--sampler", "ddim", "--sampler", "ddpm", "--calls", "5", "--calls", "8"]
    files = ["--csv", "board.csv", "--plot", "board.png"]
    assert cli.main(["bench", "samplers", *words, "--grid", "karras", *files]) == 0
    said = capsys.readouterr()
    heads = [line for line in said.out.splitlines() if line.startswith("smooth, ")]
    assert said.err == "" and names(here) == ["board.csv", "board.png"]
    assert heads == [f"smooth, {n} calls, {kind}" for n in (5, 8) for kind in ("deterministic", "stochastic")]
    lines = leaderboard.read_board("board.csv")
    assert [(r.sampler, r.nfe) for r in lines] == [("ddim", 5), ("ddim", 8), ("ddpm", 5), ("ddpm", 8)]
    with Image.open("board.png") as picture:
        assert picture.width > 300


@pytest.mark.parametrize(
    "words, line",
    [
        (["solver"], "what to compare: 'solver' is unknown; did you mean samplers?"),
        (["samplers", "--calls", "0"], "--calls 0: must be 1 or more"),
        (["samplers", "--top", "0"], "--top 0: must be 1 or more"),
        (["samplers", "--problem", "smoth"], "--problem 'smoth' is unknown; did you mean smooth?"),
        (["samplers", "--grid", "kar"], "--grid 'kar' is unknown; did you mean karras?"),
        (["samplers", "--sampler", "dimm"], "--sampler 'dimm' is unknown; did you mean ddim?"),
        (["samplers", "--csv", "board.txt"], "must end in .csv"),
        (["samplers", "--csv", "no/board.csv"], "there is no folder no"),
        (["samplers", "--plot", "board.gif"], "must end in .png or .pdf or .svg"),
    ],
)
def test_bench_mistakes_are_one_line(words, line, here, capsys):
    assert line in refused(["bench", *words], capsys)


def test_bench_without_matplotlib_or_a_model(here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "stable_diffusion_scratch[book]" in refused(["bench", "samplers", "--plot", "x.png"], capsys)
    monkeypatch.setattr(pipeline, "BUNDLED", here / "nothing")
    words = ["bench", "samplers", "--problem", "scenes", "--calls", "5"]
    assert "there is no model in" in refused(words, capsys)
