"""Execute one notebook in a fresh kernel: `python -m dev.execute notebook out`, a process of its own.

Exit code 0 and the executed copy in `out`, or exit code 1 and, on standard error, the failing cell and the end of
its traceback. Cells marked `#| eval: false` are left alone.
"""

import re
import sys
from pathlib import Path

import nbclient
import nbformat
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from dev import notebooks

CELL_SECONDS = 600  # a cell that takes longer is stuck
ANSI = re.compile(r"\x1b\[[0-9;]*m")
PROGRESS = re.compile(r"^\s*$|\d+%\|")  # what a progress bar leaves behind


class Client(nbclient.NotebookClient):
    "nbclient that honours `#| eval: false` and remembers the cell it is in."

    current = None

    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        if not notebooks.runs(cell):
            if cell.cell_type == "code":
                cell.outputs = []
            return cell
        self.current = cell
        return await super().async_execute_cell(cell, cell_index, *args, **kwargs)


def _indent(text: str, limit: int) -> str:
    lines = ANSI.sub("", text).rstrip().splitlines()
    cut = [f"... ({len(lines) - limit} lines above)"] if len(lines) > limit else []
    return "\n".join(f"    {line}" for line in cut + lines[-limit:])


def drop_progress_bars(nb: nbformat.NotebookNode) -> None:
    "Remove what progress bars wrote to standard error: it moved while the cell ran and means nothing afterwards."
    for cell in notebooks.code_cells(nb):
        bars = [o for o in cell.outputs if o.get("name") == "stderr" and all(map(PROGRESS.search, o.text.splitlines()))]
        cell.outputs = [o for o in cell.outputs if o not in bars]


def execute(path: Path, out: Path) -> str | None:
    "Execute `path`, write the executed copy to `out`; returns None or a description of the failure."
    nb = notebooks.read(path)
    client = Client(
        nb,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        store_widget_state=True,
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        trace = f"{error.traceback or ''}" or f"{error.ename}: {error.evalue}"
        return f"  the cell\n{_indent(client.current.source, 40)}\n  raised\n{_indent(trace, 30)}"
    except CellTimeoutError:
        return f"  the cell\n{_indent(client.current.source, 40)}\n  ran longer than {CELL_SECONDS} s"
    except DeadKernelError:
        where = client.current.source if client.current else "(before the first cell)"
        return f"  the cell\n{_indent(where, 40)}\n  ended the Python process (out of memory?)"
    drop_progress_bars(nb)
    notebooks.write_text(nbformat.writes(nb), out)
    return None


if __name__ == "__main__":
    failure = execute(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
    if failure:
        print(failure, file=sys.stderr)
    sys.exit(bool(failure))
