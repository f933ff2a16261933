"""The scripts of the how-to pages run, and find what they were made to show."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pyro
import pytest
import torch

DOCS = Path(__file__).parent.parent.parent / "docs" / "how_to"


def test_data_larger_than_memory(capsys: pytest.CaptureFixture[str]) -> None:
    pyro.clear_param_store()
    torch.manual_seed(0)
    script = runpy.run_path(str(DOCS / "larger_than_memory.py"))
    script["main"](["--rows", "20000"])
    said = capsys.readouterr().out
    assert "Chunks(float32 (2,): 20,000 rows, 100,000 in a chunk)" in said
    counts = re.search(r"rows per component: \[(.*)\]", said)
    assert counts is not None
    assert all(5_000 < int(n) < 8_500 for n in counts[1].split())
    page = (DOCS / "larger_than_memory.md").read_text()
    source = (DOCS / "larger_than_memory.py").read_text()
    marks = re.findall(r':(?:start-after|end-before): "(.*)"', page)
    assert len(marks) == 6 and all(mark in source for mark in marks)
