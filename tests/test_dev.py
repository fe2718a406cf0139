"""The tools behind book.py: the round trip of `edit`, what `refresh` keeps, what a chapter's run depends on, README."""

import base64
import io
import json
import signal
import socket
import threading
import time
import urllib.request

import nbformat
import pytest
from nbformat import v4
from PIL import Image, ImageDraw

from dev import ROOT as TOOLS
from dev import Problem, chapters, check, edit, execute, export, notebooks, refresh


def md(text):
    return v4.new_markdown_cell(text)


def code(text, *outputs):
    return v4.new_code_cell(text, outputs=list(outputs))


def printed(text):
    return v4.new_output("stream", name="stdout", text=text)


def shown(**data):
    return v4.new_output("display_data", data={kind.replace("_", "/"): value for kind, value in data.items()})


@pytest.fixture
def book(tmp_path, monkeypatch):
    "An empty book in a folder of its own; returns that folder."
    for module in (edit, chapters, export, refresh):
        for name, value in {
            "ROOT": tmp_path,
            "NBS": tmp_path / "nbs",
            "EDIT": tmp_path / ".edit",
            "CACHE": tmp_path / ".cache",
            "EXECUTED": tmp_path / ".cache" / "executed",
            "RUNS": tmp_path / ".cache" / "runs",
            "INDEX": tmp_path / "nbs" / "index.ipynb",
            "README": tmp_path / "README.md",
        }.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    (tmp_path / "nbs").mkdir()
    for name in ("dev", "book.py"):  # the tools themselves, for the processes that chapters run in
        (tmp_path / name).symlink_to(TOOLS / name)
    return tmp_path


def save(book, name, *cells):
    nb = v4.new_notebook(cells=list(cells), metadata={"kernelspec": notebooks.KERNELSPEC})
    path = book / "nbs" / f"{name}.ipynb"
    notebooks.write(nb, path)
    return path


# --- edit ------------------------------------------------------------------------------------------------------------

CELLS = [
    md("# Title\n\nText with $x$ and\n\n$$\na = b\n$$ (eq-a)\n"),
    code("#| export\ndef f():\n    return 1\n\n\nclass A:\n    pass", printed("one\n")),
    code("%matplotlib inline\n!ls\nf()", printed("two\n")),
    md("- a list\n\n```python\n# %% not a cell? it is quoted\n```"),
    code("# a comment\n\nx = '''\ntext\n'''"),
    code("#| eval: false\nf(", printed("kept\n")),
]


def test_opening_and_closing_changes_nothing(book):
    path = save(book, "01_first", *CELLS)
    before = path.read_text()
    assert "opened" in edit.edit(path)
    scratch = edit.scratch_of(path)
    assert "agree" in edit.edit(path)
    scratch.write_text(scratch.read_text() + "\n")  # touched, and yet the same cells
    edit.edit(path)
    assert path.read_text() == before


def test_changed_cells_keep_ids_and_unchanged_cells_keep_outputs(book):
    path = save(book, "01_first", md("# Title"), code("a = 1", printed("1\n")), code("b = 22222", printed("2\n")))
    old = notebooks.read(path)
    edit.edit(path)
    scratch = edit.scratch_of(path)
    scratch.write_text(scratch.read_text().replace("b = 22222", "b = 22223") + "\n# %%\nnew_cell = True\n")
    assert edit.edit(path).endswith("2 unchanged, 1 changed, 1 new")
    new = notebooks.read(path)
    assert [c.id for c in new.cells[:3]] == [c.id for c in old.cells]
    assert new.cells[1].outputs == old.cells[1].outputs and new.cells[2].outputs == []
    assert "agree" in edit.edit(path)


def test_moved_and_removed_cells(book):
    path = save(book, "01_first", code("a = 1", printed("1\n")), code("b = 2", printed("2\n")), md("gone"))
    ids = [c.id for c in notebooks.read(path).cells]
    edit.edit(path)
    edit.scratch_of(path).write_text("# %%\nb = 2\n\n# %%\na = 1\n")
    assert edit.edit(path).endswith("2 unchanged, 1 removed")
    new = notebooks.read(path)
    assert [c.id for c in new.cells] == [ids[1], ids[0]] and all(c.outputs for c in new.cells)


def test_newer_work_is_not_overwritten(book):
    path = save(book, "01_first", code("a = 1"))
    edit.edit(path)
    scratch = edit.scratch_of(path)
    scratch.write_text("# %%\na = 'scratch'\n")
    save(book, "01_first", code("a = 'notebook'"))
    for _ in range(2):
        with pytest.raises(Problem, match="have both changed.*--keep"):
            edit.edit(path)
    assert "'scratch'" in scratch.read_text() and "'notebook'" in path.read_text()
    edit.edit(path, keep="notebook")
    assert "'notebook'" in scratch.read_text()
    scratch.write_text("# %%\na = 'scratch'\n")
    save(book, "01_first", code("a = 'other'"))
    edit.edit(path, keep="scratch")
    assert "'scratch'" in path.read_text()


def test_a_changed_notebook_rewrites_an_unchanged_scratch(book):
    path = save(book, "01_first", code("a = 1"))
    edit.edit(path)
    save(book, "01_first", code("a = 2"))
    assert "written anew" in edit.edit(path) and "a = 2" in edit.scratch_of(path).read_text()


def test_a_new_chapter(book):
    path = chapters.path_of("05_solvers", may_be_new=True)
    assert "a new chapter" in edit.edit(path)
    assert "#| default_exp solvers" in edit.scratch_of(path).read_text()
    assert "new" in edit.edit(path) and notebooks.read(path).cells[1].source == "#| default_exp solvers"


def test_an_empty_scratch_does_not_empty_the_notebook(book):
    path = save(book, "01_first", code("a = 1"))
    edit.edit(path)
    edit.scratch_of(path).write_text("")
    with pytest.raises(Problem, match="holds no cell"):
        edit.edit(path)


# --- refresh ---------------------------------------------------------------------------------------------------------


def picture(colour="blue", dot=None):
    image = Image.new("RGBA", (200, 100), "white")
    draw = ImageDraw.Draw(image)
    for i in range(0, 200, 2):
        draw.line((i, 0, 200 - i, 100), fill=(i, 255 - i, 100, 255))
    draw.rectangle((20, 20, 60, 60), fill=colour)
    if dot:
        draw.rectangle((dot, 90, dot + 3, 93), fill="red")
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=0)
    return base64.b64encode(out.getvalue()).decode()


def test_pictures_are_stored_small_and_only_if_they_changed():
    small = refresh.small_png(picture())
    assert len(small) < len(picture()) / 10 and refresh.same_picture(small, picture())
    assert refresh.same_picture(small, refresh.small_png(picture()))
    assert not refresh.same_picture(small, refresh.small_png(picture(dot=120)))


def stored(before, after):
    old = v4.new_notebook(cells=[code("plot()", *before)])
    executed = v4.new_notebook(cells=[code("plot()", *after)])
    nb, changed = refresh.store(old, executed, "01_first")
    return nb.cells[0].outputs, changed


def test_an_output_that_says_the_same_keeps_its_bytes():
    other_bytes = refresh.small_png(picture())
    outputs, changed = stored([shown(image_png=picture())], [shown(image_png=other_bytes)])
    assert changed == 0 and outputs[0].data["image/png"] == picture()
    outputs, changed = stored([shown(text_plain="<A at 0x7f01>")], [shown(text_plain="<A at 0x8f02>")])
    assert changed == 0 and outputs[0].data["text/plain"] == "<A at 0x7f01>"
    outputs, changed = stored([printed("loss 1.0\n"), printed("x")], [printed("loss 1.1\n")])
    assert changed == 2 and outputs[0].text == "loss 1.1\n"


def widgets(tag):
    "A notebook with one view, whose ids all contain `tag`."
    ids = {name: (tag + name).ljust(32, tag) for name in ("b0", "c1", "d2", "e3")}
    state = {
        ids["b0"]: {"model_name": "VBox", "state": {"children": [f"IPY_MODEL_{ids['c1']}", f"IPY_MODEL_{ids['d2']}"]}},
        ids["c1"]: {"model_name": "Slider", "state": {"value": 3, "msg_id": tag}},
        ids["d2"]: {"model_name": "Label", "state": {"value": "three"}},
        ids["e3"]: {"model_name": "Link", "state": {"source": [f"IPY_MODEL_{ids['c1']}", "value"]}},
    }
    state = dict(sorted(state.items(), reverse=tag > "5"))
    nb = v4.new_notebook(cells=[code("w", shown(text_plain="VBox()"))])
    nb.cells[0].outputs[0].data[refresh.WIDGET_VIEW] = {"model_id": ids["b0"], "version_major": 2}
    nb.metadata.widgets = nbformat.from_dict({refresh.WIDGET_STATE: {"state": state, "version_major": 2}})
    return nb


def test_widget_ids_do_not_change_from_run_to_run():
    first, second = widgets("0"), widgets("9")
    for nb in (first, second):
        refresh.number_widgets(nb, "01_first")
    texts = [json.dumps([nb.metadata.widgets, nb.cells[0].outputs], sort_keys=True) for nb in (first, second)]
    assert texts[0] == texts[1]
    view = first.cells[0].outputs[0].data[refresh.WIDGET_VIEW]["model_id"]
    assert view in first.metadata.widgets[refresh.WIDGET_STATE]["state"]


def with_links(tag, links):
    "`widgets(tag)` with `links` more links, from its slider to labels 0, 1, ..., whose ids sort by `tag`."
    nb = widgets(tag)
    state = nb.metadata.widgets[refresh.WIDGET_STATE]["state"]
    slider = next(id for id in state if state[id]["model_name"] == "Slider")
    for i in range(links):
        label, link = (f"{i if tag < '5' else 9 - i}{kind}{tag}".ljust(32, tag) for kind in "fa")
        state[label] = nbformat.from_dict({"model_name": "Label", "state": {"value": f"label {i}"}})
        ends = {"source": [f"IPY_MODEL_{slider}", "value"], "target": [f"IPY_MODEL_{label}", "value"]}
        state[link] = nbformat.from_dict({"model_name": "Link", "state": ends})
    return nb


def test_links_between_widgets_are_numbered_by_what_they_join():
    first, second = with_links("0", 4), with_links("9", 4)
    for nb in (first, second):
        refresh.number_widgets(nb, "01_first")
    assert first.metadata.widgets == second.metadata.widgets


def shown_model(nb, cell):
    view = nb.cells[cell].outputs[0].data[refresh.WIDGET_VIEW]["model_id"]
    return nb.metadata.widgets[refresh.WIDGET_STATE]["state"][view]


def test_a_stored_view_shows_its_own_widget_after_another_came_before_it():
    "A new widget above moves every number: views and state must move together."
    old, _ = refresh.store(widgets("0"), widgets("0"), "01_first")
    source = code("more", shown(text_plain="Label()"))
    source.outputs[0].data[refresh.WIDGET_VIEW] = {"model_id": "8" * 32, "version_major": 2}
    executed = widgets("9")
    executed.cells.insert(0, source)
    state = executed.metadata.widgets[refresh.WIDGET_STATE]["state"]
    state["8" * 32] = nbformat.from_dict({"model_name": "Label", "state": {"value": "first"}})
    old.cells.insert(0, code("more"))
    new, _ = refresh.store(old, executed, "01_first")
    assert shown_model(new, 0)["state"]["value"] == "first" and shown_model(new, 1)["model_name"] == "VBox"
    again, changed = refresh.store(new, executed, "01_first")
    assert changed == 0 and again == new


def test_a_view_of_an_older_numbering_gets_the_id_that_the_state_has():
    "The stored notebook's ids were made otherwise (by hand, by JupyterLab): the outputs say the same, and yet."
    new, _ = refresh.store(widgets("0"), widgets("9"), "01_first")
    assert shown_model(new, 0)["model_name"] == "VBox"


def test_all_notebooks_together_have_a_limit(book, monkeypatch):
    save(book, "01_first", code("a = 1", printed("x" * 5000)))
    assert refresh.size_problem() is None
    monkeypatch.setattr(refresh, "LIMIT", 4000)
    assert "01_first" in refresh.size_problem()


# --- chapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(book):
    folder = book / "stable_diffusion_scratch"
    folder.mkdir()
    for name, text in {
        "__init__": "",
        "forward": "import torch",
        "score": "from .forward import x",
        "samplers": "def f():\n    from stable_diffusion_scratch import score",
        "other": "",
    }.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_a_run_depends_on_what_it_imports(book, package):
    path = save(book, "04_ddim", code("%time\nfrom stable_diffusion_scratch.samplers import *"), md("prose"))
    assert [p.stem for p in chapters.modules_of(path)] == ["__init__", "forward", "samplers", "score"]
    key = chapters.key_of(path)
    (package / "other.py").write_text("changed = True")
    save(book, "04_ddim", code("%time\nfrom stable_diffusion_scratch.samplers import *"), md("other prose"))
    assert chapters.key_of(path) == key
    (package / "forward.py").write_text("import torch as t")
    assert chapters.key_of(path) != key


def test_chapters_by_name(book):
    save(book, "index"), save(book, "01_first"), save(book, "10_tenth")
    solution = book / "nbs" / "solutions" / "01_first.ipynb"
    notebooks.write(v4.new_notebook(), solution)
    assert [chapters.name_of(p) for p in chapters.find(True)] == ["index", "01_first", "10_tenth", "solutions/01_first"]
    assert chapters.path_of("01").stem == chapters.path_of("nbs/01_first.ipynb").stem == "01_first"
    assert chapters.path_of("solutions/01") == solution
    with pytest.raises(Problem, match="no chapter '1'; there are: index, 01_first"):
        chapters.path_of("1")


@pytest.mark.daily
def test_running_chapters(book, package, capsys):
    good = save(book, "01_good", code("from pathlib import Path\nprint(Path.cwd().name)"), code("#| eval: false\n1/0"))
    bad = save(book, "02_bad", code("fine = 1"), code("nothing = {}\nnothing['asked for']"))
    save(book, "03_text", md("prose alone"))
    runs = chapters.run_all(chapters.find())
    said = capsys.readouterr().out
    assert [bool(run.failure) for run in runs] == [False, True, False]
    assert "nothing['asked for']" in runs[1].failure and "KeyError: 'asked for'" in said
    assert notebooks.read(chapters.executed_file(good)).cells[0].outputs[0].text == "nbs\n"
    assert not chapters.executed_file(bad).exists() and (book / ".cache" / "executed" / "03_text.ipynb").exists()

    again = chapters.execute(good)
    assert again.cached and again.seconds < 1
    save(book, "01_good", md("new prose"), *notebooks.read(good).cells)
    assert chapters.execute(good).cached
    executed = notebooks.read(chapters.executed_file(good))
    assert executed.cells[0].source == "new prose" and executed.cells[1].outputs


@pytest.mark.daily
def test_chapters_run_side_by_side_and_are_interrupted_together(book, package, monkeypatch, capsys):
    for name in ("01_slow", "02_slow", "03_never"):
        save(book, name, code(f"import time\ntime.sleep(600)  # {name}"))
    copy = chapters.executed_file(book / "nbs" / "01_slow.ipynb")
    notebooks.write_text("the last run", copy)
    monkeypatch.setattr(chapters, "AT_ONCE", 2)
    monkeypatch.setattr(chapters.os, "cpu_count", lambda: 8)
    seen = []

    def interrupt():
        while len(chapters.RUNNING) < 2:
            time.sleep(0.05)
        seen.extend(chapters.RUNNING)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            chapters.run_all(chapters.find())
    finally:
        signal.signal(signal.SIGINT, former)
    assert len(seen) == 2 and all(child.poll() is not None for child in seen) and not chapters.RUNNING
    assert copy.read_text() == "the last run" and capsys.readouterr().out == ""


@pytest.mark.daily
def test_a_cell_that_never_ends_and_a_kernel_that_dies(book, tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "CELL_SECONDS", 1)
    endless = save(book, "01_endless", code("while True: pass"))
    assert "ran longer than 1 s" in execute.execute(endless, tmp_path / "out.ipynb")
    dying = save(book, "02_dying", code("import os\nos._exit(3)"))
    assert "ended the Python process" in execute.execute(dying, tmp_path / "out.ipynb")


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inside, outside",
    [
        ("![roll](../assets/roll.gif)", "![roll](assets/roll.gif)"),
        ("[one](01_forward.ipynb#drop)", "[one](nbs/01_forward.ipynb#drop)"),
        ('<img src="../assets/roll.gif" width="3">', '<img src="assets/roll.gif" width="3">'),
        ("[a](https://a.b/c) [m](mailto:a@b) [x](#there)", "[a](https://a.b/c) [m](mailto:a@b) [x](#there)"),
        ("`[a](b.md)` and\n```\n[c](d.md)\n```\n[e](f.md)", "`[a](b.md)` and\n```\n[c](d.md)\n```\n[e](nbs/f.md)"),
        ("[licence](../LICENSE)", "[licence](LICENSE)"),
    ],
)
def test_links_of_the_readme(inside, outside):
    assert export.relink(inside) == outside


def test_readme_from_index(book):
    save(
        book, "index", md("# Title"), code("#| hide\nsecret = 1"), code("#| code-fold: true\nprint(2)", printed("2\n"))
    )
    text = export.readme()
    assert text.startswith("# Title") and "secret" not in text and "#|" not in text and "    2" in text
    (book / "README.md").write_text(text)
    assert export.readme_problems() == []
    (book / "README.md").write_text(text + "more\n")
    assert "python3 book.py export" in export.readme_problems()[0]
    save(book, "index", code("plot()", shown(image_png=picture())))
    with pytest.raises(Problem, match="picture among its outputs"):
        export.readme()


def test_damaged_notebooks_are_named(tmp_path):
    (tmp_path / "01.ipynb").write_text("{")
    with pytest.raises(Problem, match="not a readable notebook"):
        notebooks.read(tmp_path / "01.ipynb")


def test_writing_is_clean_and_idempotent(tmp_path):
    path = tmp_path / "a.ipynb"
    cell = code("1", v4.new_output("execute_result", data={"text/plain": "1"}, execution_count=4))
    cell.metadata["tags"] = ["x"]
    assert notebooks.write(v4.new_notebook(cells=[cell]), path)
    assert notebooks.clean_text(path.read_text()) == path.read_text() and '"tags"' not in path.read_text()
    assert not notebooks.write(notebooks.read(path), path)


# --- read and test ---------------------------------------------------------------------------------------------------


def test_a_port_in_use_gives_the_next(capsys, monkeypatch, tmp_path):
    from functools import partial

    from dev import read, site

    (tmp_path / "index.html").write_text("the book")
    monkeypatch.setattr(site, "serve", partial(site.serve, tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = read.serve(port)
    try:
        found = server.server_address[1]
        assert found > port and f"port {port} is in use; using {found}" in capsys.readouterr().out
        assert urllib.request.urlopen(f"http://127.0.0.1:{found}/").read() == b"the book"
    finally:
        server.shutdown()
        server.server_close()


def test_reading_once_runs_then_renders(monkeypatch, capsys):
    from dev import read

    done = []
    monkeypatch.setattr(chapters, "select", lambda names: [*names])
    monkeypatch.setattr(
        chapters, "run_all", lambda paths, after=None: [chapters.Run("04", 1.0, False, done.append("ran"))]
    )
    monkeypatch.setattr(read.site, "build", lambda executed: done.append(executed))
    assert read.main(["04"], once_only=True) == 0
    assert done == ["ran", read.chapters.EXECUTED] and "1 chapters: 1 executed" in capsys.readouterr().out


def test_all_steps_run_and_the_summary_names_the_failed(monkeypatch, capsys, tmp_path):
    def fails():
        raise Problem("a thing is wrong")

    for name in ("lint", "in_step", "equation_coverage", "run_chapters", "build_site"):
        monkeypatch.setattr(check, name, lambda: [])
    monkeypatch.setattr(check, "lint", fails)
    monkeypatch.setattr(check, "pytest", lambda depth: [])
    monkeypatch.setattr(check, "REPORT", tmp_path / "pytest.xml")
    assert check.main() == 1
    said = capsys.readouterr().out
    assert "a thing is wrong" in said and "FAILED: lint in" in said and "[6/6] pytest" in said
    monkeypatch.setattr(check, "lint", lambda: [])
    (tmp_path / "pytest.xml").write_text('<a><testcase><skipped message="no Chromium on this machine"/></testcase></a>')
    assert check.main() == 0
    said = capsys.readouterr().out
    assert "1 BROWSER CHECKS WERE NOT RUN" in said and "mutants" not in said
    monkeypatch.setattr(check, "mutants", lambda: ["forward: nobody notices  f: a + b -> (a - b)"])
    assert check.main(full=True) == 1
    assert "[7/7] mutants" in capsys.readouterr().out


def test_the_lock_is_exclusive(tmp_path, capsys):
    from book import locked

    order = []

    def second():
        with locked(tmp_path / "x" / "lock", "waiting for the first"):
            order.append("second")

    with locked(tmp_path / "x" / "lock", "not said"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"] and capsys.readouterr().out == "book.py: waiting for the first\n"


def test_every_stored_slider_has_its_state():
    "A view whose model is not in the notebook's widget state is a blank on the page."
    for path in sorted((TOOLS / "nbs").rglob("*.ipynb")):
        nb = json.loads(path.read_text(encoding="utf-8"))
        widgets = nb["metadata"].get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
        for cell in nb["cells"]:
            for output in cell.get("outputs", []):
                view = output.get("data", {}).get("application/vnd.jupyter.widget-view+json")
                assert not view or view["model_id"] in widgets["state"], path
