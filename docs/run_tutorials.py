"""Execute every tutorial once and keep the notebooks in build/docs/notebooks, which the site shows.

    python docs/run_tutorials.py                    # all of them, in a kernel of this interpreter
    python docs/run_tutorials.py 03_drift           # some of them
    python docs/run_tutorials.py --write            # and write their pages, docs/tutorials/*.md, for GitHub

A tutorial must not fail, print to standard error, take more than a minute of one core or draw a figure without a
caption. If one does, the script names it with its cell and exits with status 1. `build_site.py` makes the site.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
import psutil
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = ROOT / "tutorials"
PAGES = ROOT / "docs" / "tutorials"
NOTEBOOKS = ROOT / "build" / "docs" / "notebooks"
LIMIT = 60.0  # seconds of processor time, so that other work on the machine does not count
BUDGET = 25.0  # seconds on average
# What a cell's tag folds away, and what stands there instead: a whole cell, or the code in front of its outputs.
FOLDED = {"hide-cell": "Solution", "hide-input": "Code"}
TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
CAPTION = re.compile(r"^\*(Figure:?.*?)\*\s*$", re.MULTILINE | re.DOTALL)


class ThisInterpreter(KernelSpecManager):
    """Finds one kernel, the running interpreter, for any kernels that the machine has installed."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """Return the running interpreter for every name."""
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python", language="python")


def tutorials() -> list[Path]:
    """The scripts 01_….py, 02_….py, … in order, and the appendices behind them."""
    return sorted(TUTORIALS.glob("*.py"))


def execute(script: Path) -> tuple[nbformat.NotebookNode, float]:
    """Run a script in the repository's root → a notebook with outputs, and seconds of processor time.

    Raises `RuntimeError` with the tutorial and the cell.
    """
    notebook = jupytext.read(script)
    try:
        with tempfile.TemporaryDirectory() as sockets:  # files, because anyone on the machine can listen to ports
            kernel = AsyncKernelManager(
                kernel_name="python", kernel_spec_manager=ThisInterpreter(), transport="ipc", ip=f"{sockets}/kernel"
            )
            place = {"metadata": {"path": str(ROOT)}}
            try:
                # A busy machine may take ten times as long.
                NotebookClient(notebook, km=kernel, timeout=int(10 * LIMIT), resources=place).execute()
                seconds = sum(psutil.Process(kernel.provisioner.pid).cpu_times()[:4])  # with ended subprocesses
            finally:
                run_sync(kernel.shutdown_kernel)(now=True)  # the client does not end a kernel that it was given
    except (CellExecutionError, CellTimeoutError) as error:
        number = sum(cell.cell_type == "code" and "execution" in cell.metadata for cell in notebook.cells)
        raise RuntimeError(f"{script.name}, code cell {number}:\n{TERMINAL_COLOURS.sub('', str(error))}") from None
    captions = figures(notebook)
    for number, cell in enumerate(code_cells(notebook), start=1):
        complaints = [output.text for output in cell.outputs if output.get("name") == "stderr"]
        if complaints:
            raise RuntimeError(f"{script.name}, code cell {number} prints to standard error:\n{''.join(complaints)}")
        if sum("image/png" in output.get("data", {}) for output in cell.outputs) != len(captions.get(cell.id, [])):
            raise RuntimeError(f"{script.name}, code cell {number}: a figure without *Figure: …* in the cell after it")
        del cell.metadata["execution"]  # times of day
    return notebook, seconds


def timed(script: Path) -> tuple[float, nbformat.NotebookNode | None, str | None]:
    """Execute a script → its seconds of processor time, and the notebook or what is wrong."""
    try:
        notebook, seconds = execute(script)
    except RuntimeError as error:
        return 0.0, None, str(error)
    return seconds, notebook, None


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The code cells that are not empty. Only they are executed."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def reading_minutes(notebook: nbformat.NotebookNode) -> float:
    """Estimate the minutes to read a tutorial: 150 words or 15 lines of code in one, without what is folded."""
    minutes = 0.0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            minutes += len(cell.source.split()) / 150
        elif not FOLDED.keys() & set(cell.metadata.get("tags", [])):
            minutes += sum(bool(line.strip()) for line in cell.source.splitlines()) / 15
    return minutes


def figures(notebook: nbformat.NotebookNode) -> dict[str, list[str]]:
    """Captions by the id of the cell that draws: one per figure, from the next prose cell."""
    found: dict[str, list[str]] = {}
    for index, cell in enumerate(notebook.cells):
        drawn = sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        after = (later.source for later in notebook.cells[index + 1 :] if later.cell_type == "markdown")
        if drawn:
            captions = CAPTION.findall(next(after, ""))
            found[cell.id] = [plain(caption.removeprefix("Figure:")) for caption in captions[:drawn]]
    return found


def plain(markdown: str) -> str:
    """Turn a caption into an alternative text: one line without links, code marks or brackets.

    >>> plain(" the drift of [layer 3](x.md),\\n in `keys`")
    'the drift of layer 3, in keys'
    """
    return " ".join(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", markdown).replace("`", "").split()).translate(BRACKETS)


BRACKETS = str.maketrans("[]", "()")


def fenced(text: str, language: str) -> str:
    """Put a text into a fence that is longer than any fence within it."""
    longest = max((len(run) for run in re.findall(r"^`{3,}", text, re.MULTILINE)), default=2)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def page(notebook: nbformat.NotebookNode, name: str) -> tuple[str, dict[str, bytes]]:
    """Turn a notebook into Markdown for GitHub, and its images by file name."""
    images: dict[str, bytes] = {}
    captions = figures(notebook)
    parts = [f"<!-- Written from tutorials/{name}.py by `make tutorials`: change that, not this. -->"]
    for cell in notebook.cells:
        if not cell.source.strip():
            continue
        if cell.cell_type == "markdown":
            parts.append(cell.source.strip())
            continue
        tag = next((tag for tag in cell.metadata.get("tags", []) if tag in FOLDED), None)
        parts += [f"<details><summary>{FOLDED[tag]}</summary>"] if tag else []
        parts.append(fenced(cell.source, "python"))
        parts += ["</details>"] if tag == "hide-input" else []
        parts += outputs(cell, iter(captions.get(cell.id, [])), images, name)
        parts += ["</details>"] if tag == "hide-cell" else []
    return "\n\n".join(parts) + "\n", images


def in_few_colours(png: bytes) -> bytes:
    """Give a picture a palette of 24 colours: it looks the same at a fraction of the size."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(24, kmeans=1).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def outputs(cell: nbformat.NotebookNode, captions: Iterator[str], images: dict[str, bytes], name: str) -> Iterator[str]:
    """Yield the texts and images of a cell in order, with neighbouring prints as one text. Fills `images`."""
    printed = ""
    for output in cell.outputs:
        if output.output_type == "stream":
            printed += output.text
            continue
        if printed.strip():
            yield fenced(printed, "text")
        printed = ""
        data = output.get("data", {})
        if "image/png" in data:
            file = f"{name}_{len([image for image in images if image.startswith(name)]) + 1}.png"
            images[file] = in_few_colours(base64.b64decode(data["image/png"]))
            yield f"![{next(captions)}](images/{file})"
        elif data.get("text/plain", "").strip():
            yield fenced(data["text/plain"], "text")
    if printed.strip():
        yield fenced(printed, "text")


def write_page(notebook: nbformat.NotebookNode, name: str) -> None:
    """Write docs/tutorials/NAME.md and its images, in place of the old ones."""
    text, images = page(notebook, name)
    (PAGES / "images").mkdir(parents=True, exist_ok=True)
    for old in (PAGES / "images").glob(f"{name}_*.png"):
        old.unlink()
    for file, content in images.items():
        (PAGES / "images" / file).write_bytes(content)
    (PAGES / f"{name}.md").write_text(text, encoding="utf-8")


def remove_leftovers() -> None:
    """Delete pages and images of tutorials that no longer exist."""
    names = {script.stem for script in tutorials()}
    for path in [*PAGES.glob("*.md"), *(PAGES / "images").glob("*.png")]:
        stem = path.stem if path.suffix == ".md" else path.stem.rpartition("_")[0]
        if stem not in names:
            path.unlink()


def main() -> int:
    """Run the tutorials that the command line names."""
    parser = argparse.ArgumentParser(description="execute the tutorials")
    parser.add_argument("names", nargs="*", help="such as 03_drift (default: all)")
    parser.add_argument("--write", action="store_true", help="write docs/tutorials/*.md and images too")
    options = parser.parse_args()
    chosen = [script for script in tutorials() if not options.names or script.stem in options.names]
    unknown = set(options.names) - {script.stem for script in chosen}
    if unknown:
        parser.error(f"no tutorial {', '.join(sorted(unknown))}; there are {', '.join(p.stem for p in tutorials())}")
    # Two at a time, each with one thread: times and rounding should not depend on a large machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    NOTEBOOKS.mkdir(parents=True, exist_ok=True)
    if not options.names:
        for old in NOTEBOOKS.glob("*.ipynb"):
            old.unlink()
    taken, failures = [], []
    with ThreadPoolExecutor(2) as pool:
        for script, (seconds, notebook, failure) in zip(chosen, pool.map(timed, chosen), strict=True):
            reading = f"{reading_minutes(jupytext.read(script)):3.0f} min to read"
            print(f"{script.stem:26}{seconds:6.1f} s, {reading}{'   failed' if failure else ''}", flush=True)
            if failure is None and seconds > LIMIT:
                failure = f"{script.name} took {seconds:.0f} s of {LIMIT:.0f}"
            failures += [] if failure is None else [failure]
            if notebook is None:
                continue
            taken.append(seconds)
            nbformat.write(notebook, NOTEBOOKS / f"{script.stem}.ipynb")
            if options.write:
                write_page(notebook, script.stem)
    if options.write:
        remove_leftovers()
    if taken:
        mean = sum(taken) / len(taken)
        verdict = "within" if mean <= BUDGET else "OVER"
        print(f"{'mean':26}{mean:6.1f} s, {verdict} the budget of {BUDGET:.0f} s")
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
