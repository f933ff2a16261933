"""The scripts of the how-to pages run, and find what they were made to show."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pyro
import pytest
import torch

from pyro_em import ExactPosteriorEM

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


def test_the_models_of_the_page_on_conjugate_latents() -> None:
    page = (DOCS / "conjugate_latents.md").read_text()
    space = {
        "pyro": pyro,
        "dist": pyro.distributions,
        "torch": torch,
        "constraints": torch.distributions.constraints,
        "ExactPosteriorEM": ExactPosteriorEM,
    }
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(block, "conjugate_latents.md", "exec"), space)
    beta = torch.tensor([[5.0, 3.0], [2.0, 2.0]]).lgamma().sum(-1)
    beta = beta - torch.tensor([8.0, 4.0]).lgamma()
    assert space["q"].log_evidence == pytest.approx(float(beta[0] - beta[1]), abs=1e-6)
    posterior = space["q"].marginal("p")
    assert (float(posterior.concentration1), float(posterior.concentration0)) == (5.0, 3.0)
    data = torch.tensor([3.0, 1.0, 7.0]), torch.ones(3), torch.tensor([0, 1, 2])
    plan = str(ExactPosteriorEM(space["rates"]).plan(*data))
    assert "conjugate to rate of 'x'" in plan
    plan = str(ExactPosteriorEM(space["by_batch"]).plan(data[0], data[2]))
    assert "conjugate to scale of 'mu', 'y'" in plan
