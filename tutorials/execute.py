"""Run notebooks from top to bottom and keep their outputs: ``python tutorials/execute.py [NAME …]``.

Each notebook remembers a digest of the sources that made its outputs, so that a test can tell when
somebody edited cells and forgot to run them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from pathlib import Path

import nbformat
from jupyter_client import KernelManager
from nbclient import NotebookClient
from tqdm.auto import tqdm

HERE = Path(__file__).parent
# Without ipywidgets tqdm says so on import, which is no output of the tutorial.
QUIET = "ignore:IProgress not found"


def digest(notebook: nbformat.NotebookNode) -> str:
    """A fingerprint of the code cells' sources."""
    sources = [c.source.strip() for c in notebook.cells if c.cell_type == "code"]
    return hashlib.sha256("\n\n".join(sources).encode()).hexdigest()[:16]


def execute(path: Path, kernel: KernelManager | None = None) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, as a new value; the file is left alone.

    Args:
        path: Of the notebook.
        kernel: To run it in, which stays alive; a kernel of its own by default.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    os.environ.setdefault("PYTHONWARNINGS", QUIET)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        km=kernel,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(
        {
            "executed": digest(notebook),
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
        }
    )
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
        tags = cell.metadata.get("tags")  # "hide-input": a cell that a reader may skip
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    return notebook


def main() -> None:
    """Execute all notebooks, or those named, in place."""
    parser = argparse.ArgumentParser(description="Execute tutorials and keep their outputs.")
    parser.add_argument("names", nargs="*", help="for example 02_gaussian_mixture; all by default")
    names = parser.parse_args().names or sorted(p.stem for p in HERE.glob("*.ipynb"))
    progress = tqdm(names)
    for name in progress:
        progress.set_description(name)
        begin = time.perf_counter()
        nbformat.write(execute(HERE / f"{name}.ipynb"), HERE / f"{name}.ipynb")
        progress.write(f"{name}: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
