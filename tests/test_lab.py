"""The book's slider in a real JupyterLab, opened in headless Chromium."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import browser as tools
import nbformat
import pytest

from dev import ROOT

pytestmark = [
    pytest.mark.browser,
    pytest.mark.daily,
    pytest.mark.skipif(importlib.util.find_spec("jupyterlab") is None, reason="jupyterlab is not installed"),
]

SLIDER = """from stable_diffusion_scratch.plotting import slider
import matplotlib.pyplot as plt

def draw(height):
    fig, ax = plt.subplots(figsize=(3, 1))
    ax.plot([0, height])
    ax.set_ylim(0, 3)
    return fig

slider(draw, [1, 2, 3], "height")"""


@pytest.fixture
def lab(tmp_path):
    "Address of a JupyterLab that serves a folder with one small notebook, and knows no setting of this machine's user."
    work = tmp_path / "work"
    work.mkdir()
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cell = nbformat.v4.new_code_cell(SLIDER)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), work / "small.ipynb")
    server = start(work, tmp_path)
    try:
        yield wait_for(server)
    finally:
        server.process.terminate()
        server.process.wait(timeout=20)


def start(work, home):
    "Start the server; its own folders lie in `home`."
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR")
    names += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    environment = {**os.environ, **{n: str(home / n.lower()) for n in names}}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "JUPYTER_PREFER_ENV_PATH": "1"}
    no_news = home / "jupyter_config_dir" / "labconfig" / "page_config.json"
    no_news.parent.mkdir(parents=True)
    no_news.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--ServerApp.root_dir={work}", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    options += ["--IdentityProvider.token=", "--ServerApp.ip=127.0.0.1", "--allow-root", "--no-browser"]
    log = open(home / "lab.log", "w")  # noqa: SIM115 (the process keeps it)
    command = [sys.executable, "-m", "jupyterlab", *options]
    process = subprocess.Popen(command, cwd=work, env=environment, stdout=log, stderr=log)
    return Server(process, f"http://127.0.0.1:{port}/", home / "lab.log")


class Server:
    def __init__(self, process, address, log):
        self.process, self.address, self.log = process, address, log


def wait_for(server, seconds: float = 40) -> str:
    "The server's address, once it answers."
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.process.poll() is None:
        try:
            urllib.request.urlopen(server.address + "api", timeout=2).close()
            return server.address
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not answer within {seconds} s; it said:\n{server.log.read_text()[-2000:]}")


def run_all_cells(page, attempts: int = 10) -> None:
    "By the menu; again if need be: while JupyterLab connects to its kernel it drops the command, or asks for one."
    page.get_by_text(re.compile(r"Python 3.*\| Idle")).first.wait_for()
    for _ in range(attempts):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try:
            page.locator(".jp-InputPrompt", has_text=re.compile(r"\[(\d+|\*)\]")).first.wait_for(timeout=2000)
            return
        except tools.Timeout:
            if page.locator(".jp-Dialog").count():
                page.keyboard.press("Enter")
    pytest.fail(f"JupyterLab ran no cell though asked {attempts} times")


def test_the_slider_moves_in_jupyterlab(chromium, lab):
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.goto(lab + "lab/tree/small.ipynb")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    run_all_cells(page)
    before, after = tools.move_slider(page)
    page.close()
    assert before != after, "the slider moved, the picture did not"
