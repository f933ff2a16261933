"""README's blocks run as they stand, and the plan it shows is the plan that is printed."""

from __future__ import annotations

import pydoc
import re
from pathlib import Path

import pytest
import torch

import pyro_em
import pyro_em.testing
from pyro_em.families.family import BUILT_IN
from pyro_em.families.registry import REGISTRY

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def without_times(text: str) -> str:
    return re.sub(r"\d+\.\d+ s", "… s", text)


def test_readme_blocks_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # torch's own default
    before = dict(REGISTRY)
    for distribution in before.keys() - BUILT_IN.keys():  # what other tests have registered
        del REGISTRY[distribution]
    space: dict[str, object] = {}
    try:
        for block in re.findall(r"```python\n(.*?)```", README, re.S):
            exec(compile(block, "README.md", "exec"), space)
    finally:
        REGISTRY.clear()
        REGISTRY.update(before)
    printed = without_times(capsys.readouterr().out)
    shown = re.findall(r"```text\n(.*?)```", README, re.S)
    assert len(shown) == 2
    for block in shown:
        assert without_times(block).strip() in printed
    assert (tmp_path / "old_faithful.png").stat().st_size > 10_000
    assert (tmp_path / "gmm.pt").exists()


def test_every_model_has_a_row_and_every_row_a_model() -> None:
    """What the rows say is held against printed plans where the models are run."""
    rows = re.findall(r"^\| `(\w+)` \|", README, re.M)
    files = [p.stem for p in (ROOT / "models").glob("*.py") if p.stem != "__init__"]
    assert sorted(rows) == sorted(files)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def reference() -> str:
    """All pages of the API reference, one for each subject; each is in the table of contents."""
    pages = sorted((ROOT / "docs" / "api").glob("*.rst"))
    contents = (ROOT / "docs" / "api" / "index.rst").read_text().split()
    assert all(p.stem in contents for p in pages if p.stem != "index")
    return "".join(p.read_text() for p in pages)


def test_reference_has_every_public_name() -> None:
    shown = reference()
    missing = [n for n in pyro_em.__all__ if f"pyro_em.{n}\n" not in shown]
    suites = pyro_em.testing.__all__
    missing += [n for n in suites if f"pyro_em.testing.{n}\n" not in shown]
    assert not missing


def test_what_the_reference_shows_is_there() -> None:
    shown = reference()
    for name in re.findall(r":: (pyro_em[\w.]*)\n", shown):
        assert pydoc.locate(name) is not None, name
