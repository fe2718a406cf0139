"""`book.py refresh NN`: export, re-run a chapter, and store its outputs in the notebook with a small diff.

Pictures are stored as small PNG; an output that shows the same picture or says the same as the stored one keeps the
stored bytes; widget ids are numbered, so that they do not change from run to run.
"""

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from PIL import Image, ImageChops, ImageStat

from dev import ROOT, Problem, chapters, edit, export, notebooks

LIMIT = 10_000_000  # bytes, all notebooks together
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
# what differs between two runs and says nothing: hex ids, addresses, matplotlib's SVG ids and dates
VOLATILE = re.compile(
    r"(?<![^\W_])[0-9a-f]{32}(?![^\W_])|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    r"|\b[mpc][0-9a-f]{10}\b|\bat 0x[0-9a-f]+|<dc:date>[^<]*"
)


# --- pictures --------------------------------------------------------------------------------------------------------


def _open(png: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    image = image.convert("RGBA")
    return image.convert("RGB") if image.getchannel("A").getextrema() == (255, 255) else image


def _bytes(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def small_png(png: str) -> str:
    "The picture (base64 PNG) with an adaptive palette where that does not show, in as few bytes as Pillow finds."
    image = _open(png)
    method = Image.Quantize.MEDIANCUT if image.mode == "RGB" else Image.Quantize.FASTOCTREE
    palette = image.quantize(256, method=method, dither=Image.Dither.NONE)
    error = ImageStat.Stat(ImageChops.difference(image, palette.convert(image.mode))).mean
    candidates = [base64.b64decode(png), _bytes(image)]
    if max(error) < 1.5:  # of 255
        candidates.append(_bytes(palette))
    return base64.b64encode(min(candidates, key=len)).decode()


def same_picture(old: str, new: str) -> bool:
    "Whether two base64 PNGs show the same, up to what another palette changes."
    first, second = _open(old), _open(new)
    if first.size != second.size or first.mode != second.mode:
        return False
    difference = ImageChops.difference(first, second)
    return all(high <= 8 for _, high in (band.getextrema() for band in difference.split()))


# --- widgets ---------------------------------------------------------------------------------------------------------


def _rename(value, names: dict[str, str], pattern: re.Pattern):
    return json.loads(pattern.sub(lambda m: names[m[0]], json.dumps(value)))


def _walk(waiting: list[str], state: dict, order: dict[str, int]) -> None:
    "Add the models `waiting` to `order`, each followed by those it refers to."
    for model in waiting:
        if model in state and model not in order:
            order[model] = len(order)
            _walk(re.findall(r"IPY_MODEL_(\w+)", json.dumps(state[model], sort_keys=True)), state, order)


def _order(state: dict, nb: NotebookNode) -> list[str]:
    "Ids of the widget models in an order that no random id decides: as shown, then (links) by what they refer to."
    order: dict[str, int] = {}
    views = [o.data.get(WIDGET_VIEW) for c in notebooks.code_cells(nb) for o in c.outputs if "data" in o]
    _walk([view["model_id"] for view in views if view], state, order)

    def content(model: str) -> tuple[int, str]:
        said = VOLATILE.sub(lambda m: f"<{order.get(m[0], '')}>", json.dumps(state[model], sort_keys=True))
        return said.count("<>"), said

    while rest := state.keys() - order:  # those first whose references are all numbered
        _walk([min(rest, key=content)], state, order)
    return list(order)


def number_widgets(nb: NotebookNode, name: str) -> None:
    "Replace the random ids of widget models by ids made of the chapter's name and their order; empties `msg_id`s."
    widgets = nb.metadata.get("widgets", {}).get(WIDGET_STATE)
    if not widgets or not widgets["state"]:
        return
    order = _order(widgets["state"], nb)
    names = {old: hashlib.md5(f"{name}/{i}".encode()).hexdigest() for i, old in enumerate(order)}
    pattern = re.compile("|".join(map(re.escape, order)))
    state = _rename(widgets["state"], names, pattern)
    for model in state.values():
        if model.get("state", {}).get("msg_id"):
            model["state"]["msg_id"] = ""
    nb.metadata.widgets[WIDGET_STATE] = nbformat.from_dict({**widgets, "state": state})
    for cell in notebooks.code_cells(nb):
        cell.outputs = [nbformat.from_dict(_rename(o, names, pattern)) for o in cell.outputs]


# --- outputs ---------------------------------------------------------------------------------------------------------


def _calm(text: str) -> str:
    "Text with everything that changes from run to run replaced by its order of appearance."
    seen: dict[str, str] = {}
    return VOLATILE.sub(lambda m: seen.setdefault(m[0], f"<{len(seen)}>"), text)


def _same_data(kind: str, old, new) -> bool:
    if kind == "image/png":
        return same_picture(old, new)
    if kind == WIDGET_VIEW:  # its id is a name in the notebook's widget state
        return old == new
    return _calm(json.dumps(old, sort_keys=True)) == _calm(json.dumps(new, sort_keys=True))


def same_output(old: NotebookNode, new: NotebookNode) -> bool:
    "Whether a reader would see no difference between two outputs."
    if old.output_type != new.output_type:
        return False
    if "data" not in old:
        plain = [{k: v for k, v in o.items() if k != "execution_count"} for o in (old, new)]
        return _calm(json.dumps(plain[0], sort_keys=True)) == _calm(json.dumps(plain[1], sort_keys=True))
    kinds = old.data.keys()
    return kinds == new.data.keys() and all(_same_data(k, old.data[k], new.data[k]) for k in kinds)


def _shrink(output: NotebookNode) -> NotebookNode:
    if "image/png" in output.get("data", {}):
        output.data["image/png"] = small_png(output.data["image/png"])
    return output


def store(old: NotebookNode, executed: NotebookNode, name: str) -> tuple[NotebookNode, int]:
    "The notebook to store: `old` with the outputs of `executed`, kept where they are the same; and how many changed."
    executed = nbformat.from_dict(executed)
    number_widgets(executed, name)
    result, changed = notebooks.with_outputs(old, executed), 0
    for before, after in zip(notebooks.code_cells(old), notebooks.code_cells(result), strict=True):
        outputs = []
        for i, new in enumerate(map(_shrink, after.outputs)):
            kept = i < len(before.outputs) and same_output(before.outputs[i], new)
            outputs.append(before.outputs[i] if kept else new)
            changed += not kept
        changed += max(0, len(before.outputs) - len(outputs))
        after.outputs = outputs
    if _same_widgets(old, result):
        result.metadata.widgets = old.metadata.widgets
    return result, changed


def _same_widgets(old: NotebookNode, new: NotebookNode) -> bool:
    "Whether both hold the same widget models under the same ids, up to what changes from run to run inside them."
    states = [nb.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state") for nb in (old, new)]
    if not all(states) or states[0].keys() != states[1].keys():
        return False
    return len({_calm(json.dumps(nb.metadata.widgets, sort_keys=True)) for nb in (old, new)}) == 1


# --- the command -----------------------------------------------------------------------------------------------------


def size_problem() -> str | None:
    "None, or that the notebooks together are too large, with the largest."
    sizes = {chapters.name_of(p): p.stat().st_size for p in chapters.find(solutions=True)}
    total = sum(sizes.values())
    if total <= LIMIT:
        return None
    largest = ", ".join(f"{n} {s / 1e6:.2f} MB" for n, s in sorted(sizes.items(), key=lambda kv: -kv[1])[:4])
    return f"all notebooks together take {total / 1e6:.2f} MB, more than {LIMIT / 1e6:.0f} MB; the largest: {largest}"


def tidy(paths: list[Path]) -> None:
    "Let ruff format and mend the notebooks' code; what it cannot mend is printed and left to the author."
    names = [str(p.relative_to(ROOT)) for p in paths]
    for command in (["check", "--fix", "-q", "--output-format", "concise"], ["format", "-q"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, *names], cwd=ROOT)


def refresh(path: Path) -> bool:
    "Run one chapter and store its outputs; False if it failed."
    name, size = chapters.name_of(path), path.stat().st_size
    print(f"  {name} ", end="", flush=True)
    run = chapters.execute(path, fresh=True)
    if run.failure:
        print(f"{run.seconds:7.1f} s  failed; nothing stored\n{run.failure}", flush=True)
        return False
    nb, changed = store(notebooks.read(path), notebooks.read(chapters.executed_file(path)), name)
    notebooks.write(nb, path)
    now = path.stat().st_size
    print(f"{run.seconds:7.1f} s  {changed} outputs changed, {now / 1000:.0f} kB (was {size / 1000:.0f})", flush=True)
    return True


def main(names: list[str]) -> int:
    for notebook in [chapters.path_of(n, may_be_new=True) for n in names] or edit.open_scratches():
        if edit.scratch_of(notebook).exists() and edit.changes(notebook)[0]:
            print(f"  {edit.edit(notebook)}")
    paths = chapters.select(names, solutions=True)
    tidy(paths)
    for path in paths:
        if edit.scratch_of(path).exists() and not edit.changes(path)[0]:
            edit.write_scratch(path)
    for name in export.export():
        print(f"  wrote {name}")
    done = [refresh(path) for path in paths]
    if problem := size_problem():
        raise Problem(problem)
    return 0 if all(done) else 1
