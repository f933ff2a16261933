"""How the site is built: ``make docs``."""

import logging
import os
import re
import shutil
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from sphinx.ext.mathjax import MATHJAX_URL

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "pyro_em"
author = "the pyro_em team"
copyright = author
release = metadata.version("pyro-em")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_nb",
]
default_role = "py:obj"  # `name` in a docstring links where it can
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature would be longer than its text
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
nb_execution_mode = "force"  # pages with cells run whenever they are built
nb_execution_excludepatterns = ["tutorials/*"]  # their outputs are committed
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # a few seconds each, on a machine that has nothing else to do
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"pyro_em {release}"
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]


# Cells find this checkout's library and ``models``, and one thread is enough for them.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
).rstrip(os.pathsep)
logging.getLogger("traitlets").setLevel(logging.WARNING)  # one line for each page that runs
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # of tqdm, without ipywidgets


def shapes_as_code(app, what, name, obj, options, lines: list[str]) -> None:
    """The shapes that docstrings note as ``# (*plates, K)`` are code, not emphasis."""
    shape = re.compile(r"(?<!`)# (\([^()]*\)(?:,? (?:and|or|->|of a glob) \([^()]*\))*)")
    lines[:] = [
        line if line.lstrip().startswith((">>>", "...")) else shape.sub(r"``\1``", line)
        for line in lines
    ]


def as_mathml(translator, node) -> None:
    """A formula that browsers draw by themselves, and MathJax more finely where there is a network."""
    from latex2mathml.converter import convert

    display = "block" if isinstance(node, nodes.math_block) else "inline"
    text = node.astext().replace("{aligned}", "{align*}")  # the one that the converter knows
    formula = convert(text, display=display)
    space = '<mspace width="0.17em"/>'
    translator.body.append(formula.replace("<mi>log</mi>", f"<mi>log</mi>{space}"))
    raise nodes.SkipNode


if find_spec("latex2mathml"):
    html_math_renderer = "mathml"
    html_js_files = [(MATHJAX_URL, {"async": "async"})]


def setup(app) -> None:
    """Hook in; and copy the notebooks, because Sphinx reads only below its own folder."""
    app.add_html_math_renderer("mathml", (as_mathml, None), (as_mathml, None))
    app.connect("autodoc-process-docstring", shapes_as_code, priority=400)
    target = HERE / "tutorials"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for notebook in sorted((ROOT / "tutorials").glob("*.ipynb")):
        text = notebook.read_text().replace("](../docs/", "](../")  # as seen from the site
        (target / notebook.name).write_text(text)
