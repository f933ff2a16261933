"""README's blocks run as they stand, and the plan it shows is the plan that is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pyro_em.families import _REGISTRY

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_readme_blocks_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # torch's own default
    before = dict(_REGISTRY)
    space: dict[str, object] = {}
    try:
        for block in re.findall(r"```python\n(.*?)```", README, re.S):
            exec(compile(block, "README.md", "exec"), space)
    finally:
        _REGISTRY.clear()
        _REGISTRY.update(before)
    shown = re.search(r"```text\n(.*?)```", README, re.S)
    assert shown is not None
    assert shown.group(1).strip() in capsys.readouterr().out
    assert (tmp_path / "gmm.pt").exists()
