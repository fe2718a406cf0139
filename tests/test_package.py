"""The package as others install it: wheel and sdist in a clean environment, used from another directory."""

import configparser
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
NAME = "stable_diffusion_scratch"
PROMPT = "a large red metal sphere left of a small blue rubber cube"
HELPERS = {"plotting", "digits"}  # what only chapters share: these may need what chapters need
FORBIDDEN = {
    "nbdev", "fastcore", "execnb", "jupyter_core", "jupyter_client", "IPython", "ipywidgets", "matplotlib", "sklearn",
    "transformers", "diffusers", "accelerate", "torchvision", "datasets", "pytest",
}  # fmt: skip


def run(*command, cwd: Path, **options) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def modules() -> list[str]:
    files = sorted((ROOT / NAME).rglob("*.py"))
    dotted = [f.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for f in files]
    return [name.removesuffix(".__init__") for name in dotted if not name.endswith("_modidx")]


@pytest.mark.parametrize("module", modules())
def test_import_needs_little(module, tmp_path):
    if module.rsplit(".", 1)[-1] in HELPERS:
        pytest.skip("shared by chapters only; no floor imports it")
    program = f"import sys, json, {module}; print(json.dumps(sorted(m.split('.')[0] for m in sys.modules)))"
    loaded = set(json.loads(run(sys.executable, "-c", program, cwd=tmp_path)))
    assert not loaded & FORBIDDEN
    assert not loaded & {f"{NAME}.{helper}" for helper in HELPERS}


def test_no_floor_imports_the_chapters_helpers():
    "Not at its head; a command that is about digits may ask for them when it is called, and name the remedy."
    for module in modules():
        text = (ROOT / f"{module.replace('.', '/')}.py") if module != NAME else ROOT / NAME / "__init__.py"
        source = text.read_text(encoding="utf-8") if text.exists() else ""
        if module.rsplit(".", 1)[-1] not in HELPERS:
            assert not re.search(rf"^(from|import)\b.*\b({'|'.join(HELPERS)})\b", source, re.MULTILINE), module


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    "The sdist, and the wheel built from that sdist."
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT) if in_git() else ""
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("nbs/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source if listed else ROOT, cwd=out)
    return {"sdist": next(out.glob("*.tar.gz")), "wheel": next(out.glob("*.whl"))}


def in_git() -> bool:
    try:
        return subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def package_files() -> set[str]:
    files = (f for f in (ROOT / NAME).rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    return {f.relative_to(ROOT).as_posix() for f in files}


@pytest.mark.daily
def test_the_wheel_holds_the_package_and_no_more(built):
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata, entries = (
            next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith(end))
            for end in ("METADATA", "entry_points.txt")
        )
    assert names == package_files()
    required = {
        line.split(": ")[1]
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra" not in line
    }
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    assert required == set(settings["DEFAULT"]["requirements"].split())
    assert {f"{NAME}/configs/scenes64.toml", f"{NAME}/weights/scenes64/model_index.json"} <= names
    assert "sd-scratch = stable_diffusion_scratch.cli:main" in entries
    assert "Requires-Python: >=3.11" in metadata


@pytest.mark.daily
def test_the_sdist_can_build_itself(built):
    with tarfile.open(built["sdist"]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"} | package_files() <= names


def clean_environment(folder: Path, package: Path) -> Path:
    "A clean environment with this package, whose other packages are those of this one, read from where they are."
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    here = next(p for p in sys.path if p.endswith("site-packages"))
    there = next((folder / "lib").glob("python*")) / "site-packages"
    # .pth files found there are not read, so that an editable install of this tree stays out of sight
    (there / "borrowed.pth").write_text(f"import sys; sys.path.append({here!r})\n")
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "-q"]
    run(*pip, "--no-deps", "--no-build-isolation", "--no-index", package, cwd=folder.parent)
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> dict[str, Path]:
    "Clean environments with the wheel and with the sdist."
    return {kind: clean_environment(tmp_path_factory.mktemp(kind) / "clean", built[kind]) for kind in built}


@pytest.mark.daily
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installs_and_imports_elsewhere(kind, built, installed, tmp_path):
    names = [m for m in modules() if m.rsplit(".", 1)[-1] not in HELPERS]
    program = f"import {', '.join(names)}; print({NAME}.__file__, {NAME}.__version__)"
    file, version = run(installed[kind] / "bin" / "python", "-c", program, cwd=tmp_path).split()
    assert Path(file).is_relative_to(installed[kind]) and version in built["wheel"].name


@pytest.mark.daily
def test_the_wheel_paints_a_picture(installed, tmp_path):
    program = installed["wheel"] / "bin" / "sd-scratch"
    said = run(program, "generate", PROMPT, "--steps", "4", "-o", "out.png", cwd=tmp_path)
    assert said == "out.png\n"
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (64, 64) and picture.mode == "RGB" and picture.getextrema() != ((0, 0),) * 3
