"""book.py as a reader meets it: the first run, later runs, and everything that can go wrong around them.

Each test runs the real book.py in a project of its own, where `venv` and `pip` are stand-ins that take no time and fail
on demand (they are found first, through PYTHONPATH).
"""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import book

ROOT = Path(__file__).parent.parent
BASE = sys._base_executable  # the Python outside any environment

VENV = """
import os, sys
from pathlib import Path
if os.environ.get("FAKE") == "no-ensurepip":
    sys.exit("The virtual environment was not created successfully because ensurepip is not available.")
folder = Path(sys.argv[1])
(folder / "bin").mkdir(parents=True, exist_ok=True)
(folder / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages").mkdir(parents=True, exist_ok=True)
(folder / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).parent}\\n")
link = folder / "bin" / "python"
link.unlink(missing_ok=True)
link.symlink_to(sys.executable)
"""

PIP = """
import json, os, sys, time
from pathlib import Path
mode, words = os.environ.get("FAKE", ""), sys.argv[1:]
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(json.dumps(words) + "\\n")
torch = words[-1].startswith("torch==")
print("Collecting", words[-1])
if "--index-url" in words and mode == "no-index":
    sys.exit("ERROR: Could not find a version that satisfies the requirement")
if mode == "hang" and not torch:
    time.sleep(60)
if mode == "slow":
    time.sleep(0.7)
if mode == "no-space" and not torch:
    sys.exit("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
if mode == "no-network":
    sys.exit("NewConnectionError: Failed to establish a new connection: Network is unreachable")
site = next(Path(sys.prefix).glob("lib/python*/site-packages"))
for name in [words[-1]] if torch else json.loads(os.environ["FAKE_NAMES"]):
    name, _, version = name.partition("==")
    info = site / f"{name.replace('-', '_')}-{version or '1.0'}.dist-info"
    if not list(site.glob(f"{name.replace('-', '_')}-*.dist-info")):
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version or '1.0'}\\n")
"""


class Project:
    "A copy of what book.py needs, with stand-ins for venv and pip."

    def __init__(self, folder: Path, python: str = BASE):
        self.root, self.fakes, self.python = folder / "project", folder / "fakes", python
        self.root.mkdir()
        for name in ("book.py", "settings.ini", "setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, self.root)
        for where, text in {
            self.fakes / "venv" / "__main__.py": VENV,
            self.fakes / "pip" / "__main__.py": PIP,
            self.root / "dev" / "__main__.py": "import sys; print('dev:', sys.argv[1:])",
        }.items():
            where.parent.mkdir(parents=True)
            where.with_name("__init__.py").touch()
            where.write_text(text)

    def start(self, *words: str, mode: str = "", **options) -> subprocess.Popen:
        env = {
            **os.environ,
            "PYTHONPATH": str(self.fakes),
            "FAKE": mode,
            "FAKE_LOG": str(self.fakes / "log"),
            "FAKE_NAMES": json.dumps(book.required()),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([self.python, str(self.root / "book.py"), *words], env=env, **{**pipes, **options})

    def run(self, *words: str, mode: str = "", **options) -> tuple[int, str]:
        child = self.start(*words, mode=mode, **options)
        output = child.communicate(timeout=60)[0]
        assert "Traceback" not in output, output
        return child.returncode, output

    def pip_calls(self) -> list[list[str]]:
        log = self.fakes / "log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


# --- the command line ------------------------------------------------------------------------------------------------


def test_help_needs_no_environment(project):
    code, output = project.run("--help")
    assert code == 0 and all(name in output for name in book.COMMANDS)
    assert not (project.root / ".venv").exists()


@pytest.mark.parametrize("command", book.COMMANDS)
def test_every_subcommand_helps(command, capsys):
    with pytest.raises(SystemExit) as end:
        book.parse([command, "--help"])
    assert end.value.code == 0 and "usage: book.py " + command in capsys.readouterr().out


def test_reading_is_the_default():
    assert book.parse([]).command == "read"
    assert book.parse(["--once"]).once
    assert book.parse(["lab", "--no-browser", "--port", "9000"]).options == ["--no-browser", "--port", "9000"]
    assert book.parse(["read", "04", "--port", "9000"]).chapter == ["04"]


def test_a_wrong_subcommand_is_a_usage_error(project):
    code, output = project.run("reed")
    assert code == 2 and "invalid choice: 'reed'" in output and not (project.root / ".venv").exists()


def test_parses_on_old_pythons():
    ast.parse((ROOT / "book.py").read_text(), feature_version=(3, 6))


def old_pythons():
    for minor in range(6, 11):
        found = shutil.which(f"python3.{minor}")
        if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
            yield found


@pytest.mark.parametrize("python", [*old_pythons(), None])
def test_refuses_old_pythons(python):
    path = str(ROOT / "book.py")
    pretend = f"import sys, runpy; sys.version_info = (3, 10, 4); runpy.run_path({path!r}, run_name='__main__')"
    command = [python, path] if python else [sys.executable, "-c", pretend]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "needs Python 3.11 or later" in done.stderr and "Traceback" not in done.stderr


# --- making and keeping the environment ------------------------------------------------------------------------------


def test_first_run_installs_and_hands_over_second_only_hands_over(project):
    code, output = project.run("test", "--fast")
    assert code == 0 and "setting up the environment" in output and "dev: ['test', '--fast']" in output
    calls = project.pip_calls()
    assert calls[-2][-4:] == ["-c", "constraints.txt", "-e", ".[book,dev,docs]"]
    assert "--no-deps" in calls[-1] and calls[-1][-1] in book.required()  # the peers, without what they ask for
    code, output = project.run("test", "--fast")
    assert code == 0 and output == "dev: ['test', '--fast']\n" and project.pip_calls() == calls


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("nvidia-smi"), reason="for Linux without CUDA")
def test_torch_comes_first_from_the_cpu_index_and_else_from_the_ordinary_one(project):
    code, output = project.run("setup", mode="no-index")
    first, second, *rest = project.pip_calls()
    assert code == 0 and "did not answer" in output
    assert first[-1] == second[-1] == book.pinned("torch") and "--no-deps" in first and "--no-deps" in second
    assert first[first.index("--index-url") + 1] == book.TORCH_CPU_INDEX and first[first.index("--retries") + 1] == "0"
    assert not {"--index-url", "--extra-index-url"} & set(sum(rest, second))


def test_changed_requirements_are_installed(project):
    project.run("setup")
    with open(project.root / "constraints.txt", "a") as file:
        file.write("# changed\n")
    code, output = project.run("setup")
    assert code == 0 and "repairing" in output and "has changed" in output
    assert project.run("setup")[1] == "book.py: the environment is whole; nothing to do\n"


def test_a_missing_package_is_put_back(project):
    project.run("setup")
    shutil.rmtree(next((project.root / ".venv").rglob("einops-*.dist-info")))
    code, output = project.run("setup")
    assert code == 0 and "missing: einops" in output
    assert "nothing to do" in project.run("setup")[1]


def test_an_environment_made_by_hand_is_kept(project):
    project.run("setup")
    (project.root / ".venv" / "book-stamp.json").unlink()
    (project.root / ".venv" / "mine").touch()
    code, output = project.run("setup")
    assert code == 0 and "repairing" in output and (project.root / ".venv" / "mine").exists()


def test_a_vanished_python_and_a_moved_folder_are_rebuilt(project):
    project.run("setup")
    link = project.root / ".venv" / "bin" / "python"
    link.unlink()
    link.symlink_to("/nowhere/python3")
    code, output = project.run("setup")
    assert code == 0 and "rebuilding" in output and "Python does not run" in output
    project.root = project.root.rename(project.root.with_name("elsewhere"))
    code, output = project.run("setup")
    assert code == 0 and "the folder has moved" in output


def test_rebuild_on_request(project):
    project.run("setup")
    (project.root / ".venv" / "mine").touch()
    code, output = project.run("setup", "--rebuild")
    assert code == 0 and not (project.root / ".venv" / "mine").exists()


# --- what can go wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_installation_says_so_and_is_repaired(project, sign):
    child = project.start("setup", mode="hang")
    wait_for(lambda: len(project.pip_calls()) and "-e" in project.pip_calls()[-1])
    child.send_signal(sign)
    output = child.communicate(timeout=90)[0]
    assert child.returncode == 130 and "interrupted. Run the same command again" in output
    assert "Traceback" not in output
    code, output = project.run("setup")
    assert code == 0 and "rebuilding" in output and "was interrupted" in output


def test_a_killed_installation_is_repaired(project):
    child = project.start("setup", mode="hang", start_new_session=True)
    wait_for(lambda: len(project.pip_calls()) and "-e" in project.pip_calls()[-1])
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate(timeout=20)
    code, output = project.run("setup")
    assert code == 0 and "was interrupted" in output and "is ready" in output


def test_no_space_during_installation(project):
    code, output = project.run("setup", mode="no-space")
    assert code == 1 and "no space left on the disk while installing the packages (free:" in output
    assert "run again" in output
    code, output = project.run("setup")
    assert code == 0 and "rebuilding" in output


def test_no_network(project):
    code, output = project.run("setup", mode="no-network")
    assert code == 1 and "Check the network" in output and "install.log" in output
    code, output = project.run("setup")
    assert code == 0 and "is ready" in output


def test_no_venv_module(project):
    code, output = project.run("setup", mode="no-ensurepip")
    assert code == 1 and "python3-venv" in output
    assert project.run("setup")[0] == 0


def test_a_full_disk(tmp_path):
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mounted)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root and mount")
    try:
        project = Project(mounted)
        with open(mounted / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(b"0" * 4096)
        code, output = project.run("setup")
        assert code == 1 and "no space left on the disk" in output
        (mounted / "filler").unlink()
        assert project.run("setup")[0] == 0
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_a_directory_without_write_permission():
    options = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    pythons = [BASE, "/usr/bin/python3.11", "/usr/bin/python3", "/usr/local/bin/python3"]
    able = "import sys; sys.exit(sys.version_info < (3, 11))"
    with tempfile.TemporaryDirectory() as folder:
        python = next((p for p in pythons if runs(p, able, options)), None)
        if python is None:
            pytest.skip("no Python that another user may run")
        os.chmod(folder, 0o755)
        project = Project(Path(folder), python)
        os.chmod(project.root, 0o555)
        code, output = project.run("setup", **options)
        os.chmod(project.root, 0o755)
    assert code == 1 and "no permission to write" in output and str(project.root) in output


def runs(python: str, code: str, options: dict) -> bool:
    try:
        return subprocess.run([python, "-c", code], capture_output=True, cwd="/", **options).returncode == 0
    except OSError:
        return False


def test_two_at_once_install_once(project):
    first, second = project.start("setup", mode="slow"), project.start("setup", mode="slow")
    outputs = [child.communicate(timeout=30)[0] for child in (first, second)]
    assert first.returncode == second.returncode == 0
    assert sum("another book.py is installing" in output for output in outputs) == 1
    assert sum("-e" in call for call in project.pip_calls()) == 1
