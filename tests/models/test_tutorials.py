"""Every tutorial runs from top to bottom, and what is committed is what its cells print."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager

TUTORIALS = Path(__file__).parents[2] / "tutorials"
sys.path.insert(0, str(TUTORIALS))

from execute import QUIET, digest, execute  # noqa: E402

NAMES = (
    "01_elbo",
    "02_gaussian_mixture",
    "03_hill_climbing",
    "04_exact_em_or_svi",
    "05_hidden_markov_models",
    "06_networks_and_fields",
    "07_intractable_posteriors",
    "08_discrete_and_continuous",
    "09_your_own_model",
    "10_time_series",
    "11_factors_and_random_effects",
    "12_conjugate_latents",
    "13_speed_and_scale",
)


def test_names() -> None:
    assert sorted(p.stem for p in TUTORIALS.glob("*.ipynb")) == sorted(NAMES)


# Figures are drawn once, in place: nobody looks at these.
AS_NEW = """
%reset -f
%matplotlib inline
import sys, warnings
import matplotlib.figure, matplotlib.pyplot, pyro, torch
matplotlib.pyplot.close("all")
matplotlib.pyplot.rcdefaults()
matplotlib.pyplot.uninstall_repl_displayhook()
sys.filters_as_new = getattr(sys, "filters_as_new", warnings.filters[:])
warnings.filters[:] = sys.filters_as_new
pyro.clear_param_store()
pyro.enable_validation(True)
torch.set_default_dtype(torch.float32)
def drawn(figure):
    figure.set_layout_engine("none")
    figure.canvas.draw()
    return b"drawn"
get_ipython().display_formatter.formatters["image/png"].for_type(matplotlib.figure.Figure, drawn)
%reset -f
"""


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """One process for all tutorials: importing the libraries takes longer than some of them."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(
        cwd=str(TUTORIALS),
        env={**os.environ, "PYRO_EM_QUICK": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": QUIET},
    )
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs(name: str, kernel: KernelManager) -> None:
    """All cells, the assertions among them, at the small setting; what they write is dropped.

    A tutorial sees no name, parameter or setting of another.
    """
    client = kernel.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    reply = client.execute_interactive(AS_NEW, timeout=60, output_hook=lambda _: None)
    client.stop_channels()
    assert reply["content"]["status"] == "ok", reply
    assert not errors_of(execute(TUTORIALS / f"{name}.ipynb", kernel))


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs(name: str) -> None:
    notebook = nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert notebook.metadata["executed"] == digest(notebook), "run `make tutorials`"
    assert not errors_of(notebook)
    claims = [c for c in code if re.search(r"^\s*assert ", c.source, re.M)]
    assert claims, "nothing is asserted"
    assert sum("image/png" in o.get("data", {}) for c in code for o in c.outputs) >= 1
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+?)\)", text)
    missing = [t for t in links if "://" not in t and not (TUTORIALS / t).exists()]
    assert not missing, missing


def errors_of(notebook: nbformat.NotebookNode) -> list[str]:
    """What a cell raised or wrote to stderr."""
    return [
        str(output.get("text") or output.get("ename"))
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
