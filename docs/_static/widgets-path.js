// Where the widget manager finds the rest of itself: beside this site, at any depth of page.
window.__jupyter_widgets_assets_path__ = document.documentElement.dataset.content_root + "_static/widgets/";
