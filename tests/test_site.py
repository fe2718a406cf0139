"""The site: what it makes of a notebook, that it refuses what is wrong, and how its pages behave in a browser."""

import importlib.util
import re
import sys
import threading

import browser as tools
import minibook
import nbformat
import pytest

from dev import api, read, site

needed = [m for m in ("sphinx", "myst_nb", "sphinx_book_theme") if importlib.util.find_spec(m) is None]
pytestmark = [
    pytest.mark.daily,
    pytest.mark.skipif(bool(needed), reason=f"the site's requirements are not installed ({', '.join(needed)})"),
]


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    "The small book of `minibook`, built."
    folder = tmp_path_factory.mktemp("mini")
    source, package = minibook.write(folder)
    site.build(out=folder / "site" / "html", source=source, package=package)
    return folder / "site" / "html"


@pytest.fixture(scope="session")
def book():
    "The book itself: as it was just built, else built now."
    if not site.is_fresh():
        read.build(executed=False)
    return site.HTML


@pytest.fixture(params=["mini", "book"])
def served(request):
    "Folder and address of a site that is being served."
    out = request.getfixturevalue(request.param)
    server = site.serve(out)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield out, f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


# What the reader makes of a cell ----------------------------------------------------------------------------------


@pytest.fixture
def reader():
    sys.path.insert(0, str(site.DOCS / "_ext"))
    try:
        import chapter_reader
    finally:
        sys.path.pop(0)
    return chapter_reader


def test_directives_become_tags(reader):
    cells = {
        "#| hide\nx = 1": ("x = 1", ["remove-cell"]),
        "#| export\n#| code-fold: true\nx = 1": ("x = 1", ["hide-input"]),
        "# | echo: false\nx = 1": ("x = 1", ["remove-input"]),
        "x = 1  #| not a directive": ("x = 1  #| not a directive", []),
        "#| default_exp forward": ("", ["remove-cell"]),
    }
    for source, (kept, tags) in cells.items():
        cell = minibook.code(source)
        reader.mark(cell, "forward")
        assert (cell.source, cell.metadata["tags"]) == (kept, tags), source


def test_references_leave_code_and_formulas_alone(reader):
    text = "By (eq-a), `(eq-b)`, $f(eq-c)$,\n\n$$\nx\n$$ (eq-d)\n\n```\n(eq-e)\n```\n[link](eq-f) (eq-g)= (def-h)"
    linked = reader.link_references(text)
    assert re.findall(r"\{eq\}`([\w-]+)`", linked) == ["eq-a", "def-h"]
    assert re.sub(r"\{eq\}`([\w-]+)`", r"(\1)", linked) == text


# What is on the built pages ---------------------------------------------------------------------------------------


def test_a_chapter_shows_its_marks(mini):
    page = (mini / "01_first.html").read_text()
    assert "<h1>1. Growth" in page
    assert "secret_preparation" not in page and "#|" not in page and "default_exp" not in page
    assert "How it is drawn" in page and "not run here" in page
    assert re.search(r'exported to.*?href="api/growth.html".*?stable_diffusion_scratch.growth', page, re.DOTALL)
    assert re.search(r'id="check-eq-growth">.*?href="#equation-eq-growth">\(1\.2\)</a>', page, re.DOTALL)
    assert re.search(r'class="checked" href="#check-eq-growth"', page)
    assert 'class="figure-caption"' in page
    other = (mini / "02_second.html").read_text()
    assert re.search(r'href="01_first.html#equation-eq-growth">\(1\.2\)</a>', other) and "(2.1)" in other
    assert re.search(r'href="\.\./01_first.html#equation-eq-growth"', (mini / "solutions/01_first.html").read_text())


def test_the_library_page_shows_signatures_as_written(mini):
    text = re.sub(r"<[^>]+>", "", (mini / "api/growth.html").read_text())
    text = re.sub(r"\s+", " ", text)
    assert "Float[Tensor, 'b c h w']" in text.replace("&#39;", "'")
    assert "alpha*x0 + sigma*eps" in text and "x &lt; 0" in text
    for name in ("LIMIT", "Growth", "grow", "at", "half"):
        assert f"{name}" in text
    assert "see (1.2)" in text
    assert "code-growth-grow" in (mini / "01_first.html").read_text()


def test_private_names_have_no_page(tmp_path):
    _, package = minibook.write(tmp_path)
    assert set(api.pages(package)) == {"index", "growth"}


def test_links_hold(mini, book):
    assert site.check_links(mini) == []
    assert site.check_links(book) == []


def test_the_link_checker_finds_faults(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="#no">x</a><a href="b.html">x</a><a href="https://arxiv.org">x</a><a href="../up.html">x</a>'
        '<img src="https://elsewhere.org/x.png"><p id="yes"><a href="a.html#yes">x</a>'
    )
    (tmp_path / "a.css").write_text("@import url(https://fonts.example.org/f.css);")
    found = site.check_links(tmp_path)
    assert len(found) == 5, found
    for part in ("#no leads to no anchor", "b.html leads to no file", "out of the site", "x.png from", "f.css from"):
        assert any(part in line for line in found), part


# What is refused, what is rebuilt ---------------------------------------------------------------------------------


def test_an_unknown_equation_is_refused_with_its_place(tmp_path):
    source, package = minibook.write(tmp_path)
    nbformat.write(minibook.notebook("# Wrong\n\nSee (eq-nowhere)."), source / "03_wrong.ipynb")
    with pytest.raises(site.SiteError, match=r"(?s)03_wrong.ipynb, cell 1.*eq-nowhere"):
        site.build(out=tmp_path / "site" / "html", source=source, package=package)
    (source / "03_wrong.ipynb").unlink()
    executed = tmp_path / "executed"
    executed.mkdir()
    nbformat.write(
        minibook.notebook("# Decay\n\nFresh from the kernel.\n\n$$y$$ (eq-decay)"), executed / "02_second.ipynb"
    )
    site.build(executed, out=tmp_path / "site" / "html", source=source, package=package)
    assert "Fresh from the kernel" in (tmp_path / "site" / "html" / "02_second.html").read_text()


def test_without_a_registry_the_error_names_the_remedy(tmp_path, monkeypatch):
    from dev import vendor

    for name in ("package.json", "package-lock.json", ".npmrc"):
        (tmp_path / name).write_bytes((site.DOCS / name).read_bytes())
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(vendor.VendorError, match="reaches an npm registry"):
        vendor.vendor(tmp_path)


# In a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_every_page_opens_clean(served, chromium):
    out, base = served
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page, wrong = context.new_page(), []
    faults = tools.watch(page, base)
    for file in site.html_pages(out):
        name = file.relative_to(out).as_posix()
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(base + name)
        page.wait_for_function("document.documentElement.dataset.book === 'ready'")
        faults += too_wide(page, 1280)
        page.set_viewport_size({"width": 390, "height": 900})
        faults += too_wide(page, 390)
        faults += page.evaluate(UNREADABLE)
        wrong += [f"{name}: {fault}" for fault in faults]
        faults.clear()
    context.close()
    assert wrong == []


UNREADABLE = r"""() => [
    ...[...document.querySelectorAll('.katex-error')].map(e => 'formula: ' + e.title),
    ...[...document.querySelectorAll('.math:not([data-rendered])')].map(e => 'formula left as TeX: ' + e.textContent),
    ...[...document.querySelectorAll('.bd-article p, .bd-article li, .bd-article td')]
        .filter(e => e.textContent.includes('$$')).map(e => 'raw $$: ' + e.textContent.slice(0, 80)),
]"""


def too_wide(page, width: int) -> list[str]:
    "Whether the page itself must be scrolled sideways."
    is_wide = page.evaluate("document.documentElement.scrollWidth")
    return [f"{is_wide} px wide in a window of {width}"] if is_wide > width else []


@pytest.mark.browser
def test_sliders_move_the_picture(served, chromium):
    out, base = served
    movable = [f.relative_to(out).as_posix() for f in site.html_pages(out) if "SliderModel" in f.read_text()]
    if not movable:
        pytest.skip("no page of this site has a slider")
    page = chromium.new_page()
    for name in movable:
        page.goto(base + name)
        before, after = tools.move_slider(page)
        assert before != after, f"{name}: the slider moved, the picture did not"
    page.close()


@pytest.mark.browser
def test_search_finds_a_word(served, chromium):
    out, base = served
    page = chromium.new_page()
    word = "nightingale" if (out / "02_second.html").exists() else "variance"
    page.goto(f"{base}search.html?q={word}")
    page.locator("#search-results li a").first.wait_for(timeout=15_000)
    page.close()


@pytest.mark.browser
def test_dark_mode_toggles(served, chromium):
    _, base = served
    page = chromium.new_context(color_scheme="light").new_page()
    page.goto(base + "index.html")
    seen = {mode: ground(page, mode) for mode in ("light", "dark", "auto")}
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.context.close()
    assert seen["light"] == seen["auto"] and max(seen["dark"]) < 80 < 200 < min(seen["light"]), seen


def ground(page, mode: str) -> list[int]:
    "The colour of the page's ground once its reader has chosen a mode."
    page.locator(".theme-switch-button:visible").first.click()
    page.locator(f".theme-change-button[data-mode={mode}]:visible").click()
    page.wait_for_timeout(400)  # colours fade
    return [int(n) for n in re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]]
