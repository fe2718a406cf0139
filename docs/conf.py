"Sphinx's settings for the site. Build it with `python3 book.py read` or `dev.site.build`, never by hand."

import sys
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).parent
sys.path.insert(0, str(here / "_ext"))
settings = ConfigParser(delimiters=["="])
settings.read(here.parent / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project = settings["lib_name"]
author = settings["author"]
copyright = settings["copyright"]
version = release = settings["version"]

extensions = ["myst_nb", "sphinx_copybutton", "chapter_pages"]
exclude_patterns = ["**.ipynb_checkpoints"]
suppress_warnings = ["myst.header"]  # the bibliography goes from its title to one small heading per paper
nitpick_ignore_regex = [("py:.*", ".*")]  # signatures name torch's and jaxtyping's types
add_module_names = False
python_maximum_signature_line_length = 88
smartquotes = False

# Text
myst_enable_extensions = ["alert", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False
myst_dmath_double_inline = True

# Notebooks: shown as stored, never executed here; nothing is fetched from elsewhere
nb_execution_mode = "off"
nb_custom_formats = {".ipynb": ["chapter_reader.read", {}, False]}
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_ipywidgets_js = {"widgets-path.js": {}, "widgets/embed.js": {"defer": "defer"}}

# Pages
html_theme = "sphinx_book_theme"
html_title = settings["title"].replace("_", " ")
html_static_path = ["_static", "_vendor"]
html_css_files = ["katex/katex.min.css", "book.css"]
html_js_files = [("katex/katex.min.js", {"defer": "defer"}), ("book.js", {"defer": "defer"})]
html_math_renderer = "katex"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}
toc_object_entries_show_parents = "hide"
html_theme_options = {
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "use_source_button": False,
    "home_page_in_toc": False,
    "footer_content_items": ["copyright.html"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_selector = "div.cell_input div.highlight pre, div.highlight-python pre, div.highlight-bash pre"
