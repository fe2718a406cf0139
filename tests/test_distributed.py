"""Many processes: real ones, joined through Gloo, make the run of one; shards; what cannot be shared is refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import torch
from safetensors.torch import load_file

from stable_diffusion_scratch.distributed import from_shards, join, noise_scale, write_shards
from stable_diffusion_scratch.training import fit, load_run, step_generator

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(folder: Path, count: int, steps: int, stop_in: int | None = None) -> list[dict]:
    "Two (or more) processes make the run in `folder`; what each of them ended with."
    context, port, out = forks.server("accelerate"), free_port(), str(folder / "out")
    arguments = (count, port, str(folder / "run.safetensors"), steps, out, stop_in)
    workers = [context.Process(target=forks.train_together, args=(r, *arguments)) for r in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    assert [worker.exitcode for worker in workers] == [0] * count
    return [torch.load(f"{out}-{r}.pt", weights_only=True) for r in range(count)]


@pytest.mark.daily
def test_two_processes_make_the_run_of_one(tmp_path):
    "The same global batch: losses equal to 1e-5; one can go on where two stopped, and two where one did."
    pytest.importorskip("accelerate")
    alone = forks.sine_run(30, parts=4)
    for _ in fit(alone, 30, tmp_path / "alone.safetensors"):
        pass
    first = together(tmp_path, 2, 30, stop_in=12)  # one of them wants to stop: both do, and it is saved
    assert [f["step"] for f in first] == [12, 12] and torch.equal(first[0]["weights"], first[1]["weights"])
    middle = forks.sine_run(30, parts=4)
    for report in fit(middle, 30, tmp_path / "run.safetensors"):
        if report.step == 17:
            break
    last = together(tmp_path, 2, 30)
    assert torch.equal(last[0]["weights"], last[1]["weights"])  # replicas, averages too: bit for bit
    assert len(last[0]["losses"]) == 30 and last[0]["losses"] == last[1]["losses"]
    assert last[0]["losses"] == pytest.approx(alone.losses, abs=1e-5)
    weights = torch.cat([p.detach().flatten() for p in [*alone.model.parameters(), *alone.powers[0].values()]])
    torch.testing.assert_close(last[0]["weights"], weights, rtol=0, atol=1e-4)
    kept = forks.sine_run(30, parts=4)
    load_run(kept, tmp_path / "run.safetensors")
    assert kept.step == 30
    files = {p.name for p in tmp_path.iterdir()}
    assert files == {"alone.safetensors", "run.safetensors", "out-0.pt", "out-1.pt"}  # only one of them wrote


@pytest.mark.slow
def test_the_launcher_of_accelerate_starts_two(tmp_path):
    pytest.importorskip("accelerate")
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import os, forks\n"
        "e = os.environ\n"
        "forks.train_together(int(e['RANK']), int(e['WORLD_SIZE']), int(e['MASTER_PORT']),\n"
        f"    {str(tmp_path / 'run.safetensors')!r}, 8, {str(tmp_path / 'out')!r})\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1"]
    command += ["--num_processes=2", "--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, tmp_path / "program.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (torch.load(tmp_path / f"out-{r}.pt", weights_only=True) for r in range(2))
    assert one["step"] == other["step"] == 8 and torch.equal(one["weights"], other["weights"])


def test_parts_that_cannot_be_shared_are_refused():
    run = forks.sine_run(5, parts=4)
    with pytest.raises(ValueError, match="3 processes cannot share 4 parts .* for example 6"):
        join(run, SimpleNamespace(num_processes=3, process_index=0))
    join(run, SimpleNamespace(num_processes=1, process_index=0))
    assert run.share == (0, 1) and run.total is None


def test_importing_it_needs_no_accelerate(tmp_path):
    "The floor test of test_package.py covers the import; this one says what the refusal looks like."
    program = (
        "import sys; sys.modules['accelerate'] = None\n"
        "from stable_diffusion_scratch.distributed import fit_together, noise_scale\nprint('fine')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr


def test_shards_hold_every_row_once_and_only_ours_are_opened(tmp_path):
    rows = {"x": torch.arange(24).reshape(24, 1), "label": torch.arange(24)}
    files = write_shards(rows, tmp_path, 4)
    assert [f.name for f in files][::3] == ["00000-of-00004.safetensors", "00003-of-00004.safetensors"]
    whole = torch.cat([load_file(f)["label"] for f in files])
    assert whole.sort().values.tolist() == list(range(24)) and {len(load_file(f)["x"]) for f in files} == {6}
    draw = from_shards(files, parts=8)
    for step in range(20):
        for part in range(1, 8, 2):
            batch = draw(step_generator(3, 8 * step + part), 5)
            assert batch["x"].shape == (5, 1) and torch.equal(batch["x"][:, 0], batch["label"])
            assert (batch["label"] % 4 == part % 4).all()
    assert set(draw.opened) == {1, 3}


@pytest.mark.parametrize("tensors, count", [({"x": 10}, 4), ({"x": 8, "y": 12}, 4), ({"x": 8}, 0)])
def test_unequal_shards_are_refused(tmp_path, tensors, count):
    with pytest.raises(ValueError, match=f"{count} shards need equally long tensors"):
        write_shards({name: torch.zeros(n) for name, n in tensors.items()}, tmp_path, count)
    assert not list(tmp_path.iterdir())


def test_shards_that_do_not_divide_the_parts_are_refused(tmp_path):
    files = write_shards({"x": torch.zeros(6)}, tmp_path, 3)
    with pytest.raises(ValueError, match="3 shards do not divide 4 parts"):
        from_shards(files, parts=4)
    with pytest.raises(ValueError, match="0 shards"):
        from_shards([], parts=4)


def test_the_noise_scale_is_unbiased():
    "Gradients G + noise of variance 4/batch an entry: |G|^2 and tr Sigma come back."
    generator = torch.Generator().manual_seed(0)
    true, batch = torch.linspace(-1, 1, 50).double(), 9
    noise = 2 / batch**0.5 * torch.randn(4000, 6, 50, generator=generator, dtype=torch.float64)
    found = torch.tensor([noise_scale(list(true + n), batch) for n in noise])
    mean, error = found.mean(0), found.std(0) / 4000**0.5
    assert abs(mean[0] - true.square().sum()) < 5 * error[0] and abs(mean[1] - 4 * 50) < 5 * error[1]
    with pytest.raises(ValueError, match="at least 2 parts, got 1"):
        noise_scale([true], 3)


def test_settings_name_accelerate_as_an_extra():
    text = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert "\ntrain_requirements = accelerate\n" in text
    assert "accelerate" not in next(line for line in text.splitlines() if line.startswith("requirements"))
    assert json.dumps("train") in (ROOT / "setup.py").read_text(encoding="utf-8")
