"""README runs as it stands, what it shows is what is printed; the tables of the site are complete."""

from __future__ import annotations

import pydoc
import re
from pathlib import Path

import pytest
import torch

import pyro_em
import pyro_em.testing

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MODELS = (ROOT / "docs" / "models.md").read_text()


def without_times(text: str) -> str:
    return re.sub(r"\d+\.\d+ s", "… s", text)


def test_readme_blocks_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # torch's own default
    space: dict[str, object] = {}
    calls = (ROOT / "docs" / "what_it_does.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", README + calls, re.S):
        exec(compile(block, "README.md", "exec"), space)
    printed = without_times(capsys.readouterr().out)
    shown = re.findall(r"```text\n(.*?)```", README, re.S)
    assert len(shown) == 2
    for block in shown:
        assert without_times(block).strip() in printed
    assert (tmp_path / "old_faithful.png").stat().st_size > 10_000
    assert (tmp_path / "gmm.pt").exists()


def test_every_model_has_a_row_and_every_row_a_model() -> None:
    """What the rows say is held against printed plans where the models are run."""
    rows = re.findall(r"^\| \[`(\w+)`\]", MODELS, re.M)
    files = [p.stem for p in (ROOT / "models").glob("*.py") if p.stem != "__init__"]
    assert sorted(rows) == sorted(files)


def test_links_lead_somewhere() -> None:
    """Of README. Those of the site are followed when it is built, but for files outside of it."""
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for target in re.findall(r"\]\(([^)]+)\)", MODELS):
        assert (ROOT / "docs" / target).exists(), target


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
