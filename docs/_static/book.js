// Renders every formula of the page. A formula KaTeX cannot read stays visible, in red, with its reason as title.
function renderFormulas() {
  for (const element of document.querySelectorAll(".math")) {
    const tex = element.textContent;
    katex.render(tex, element, { displayMode: element.classList.contains("display"), throwOnError: false });
    element.dataset.rendered = "true";
  }
}

// Wide tables scroll in a box of their own, reachable by keyboard.
function boxTables() {
  for (const table of document.querySelectorAll(".bd-article table")) {
    if (table.closest(".table-box, .highlight")) continue;
    const box = document.createElement("div");
    box.className = "table-box";
    table.replaceWith(box);
    box.append(table);
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
}

renderFormulas();
boxTables();
document.documentElement.dataset.book = "ready";
