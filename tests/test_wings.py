"""What CONTRIBUTING and the wings say of the house is so: the files that they name are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyro_em"
WINGS = sorted(p.parent for p in PACKAGE.glob("*/__init__.py"))
FOLDERS = sorted(p.parent for p in PACKAGE.glob("*/*/__init__.py"))


def _address(folder: Path) -> str:
    return ".".join(folder.relative_to(PACKAGE).parts)


@pytest.mark.parametrize("wing", [*WINGS, *FOLDERS], ids=_address)
def test_a_wing_says_what_it_may_import_and_names_files_that_are_there(wing: Path) -> None:
    tree = ast.parse((wing / "__init__.py").read_text())
    text = ast.get_docstring(tree) or ""
    assert "May import:" in text
    public = {
        a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names
    }
    files = {p.stem for p in wing.glob("*.py")}
    around = wing.parent if wing in FOLDERS else wing
    beside = {p.stem for p in around.rglob("*")} | {p.name for p in WINGS}
    known = files | public | beside
    for name in re.findall(r"(?<!`)`([a-z_]+)(?:\.\w+)*`(?!`)", text):
        assert name in known or name == "pyro_em", f"{wing.name}: {name}"
    if wing in FOLDERS:
        assert files - {"__init__"} <= set(re.findall(r"`(\w+)`", text)), wing.name


def test_no_circle_is_looked_for_in_every_wing_and_folder() -> None:
    ancestors = re.search(r"ancestors = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)
    assert ancestors is not None
    watched = set(re.findall(r"pyro_em\.([\w.]+)", ancestors[1]))
    assert watched == {_address(folder) for folder in [*WINGS, *FOLDERS]}


def test_the_files_that_contributing_names_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`([\w/]+/[\w.]*)`", text):
        places = (ROOT / name, PACKAGE / name, ROOT / "docs" / name)
        assert any(p.exists() for p in places), name


def test_the_layers_in_contributing_are_those_that_are_checked() -> None:
    layers = re.search(r"layers = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)
    assert layers is not None
    checked = [set(re.findall(r"pyro_em\.(\w+)", line)) for line in layers[1].splitlines()]
    drawn = (ROOT / "CONTRIBUTING.md").read_text().split("```text\n")[2].split("```")[0]
    shown = [set(re.findall(r"\w+", line.strip().split("  ")[0])) for line in drawn.splitlines()]
    assert [s for s in shown if s] == [s for s in reversed(checked) if s]
